use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{Builder, JoinHandle, sleep};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::client::{Client, Failure, Response};
use crate::load::Load;
use crate::support::{Cluster, FAST, Process, free_port, program, read_text, wait_for};

/// Rounds of the tests that kill nodes in the middle of a change; set the variable for a long run.
const CHANGE_ROUNDS_VARIABLE: &str = "RAFTEXAMPLE_CHANGE_ROUNDS";
const CHANGE_ROUNDS: usize = 6;

/// The defaults, in tests that measure with the default timing.
const ELECTION_TIMEOUT: Duration = Duration::from_secs(1);
const REQUEST_TIMEOUT: Duration = Duration::from_secs(5);

const WRITERS: usize = 6;

fn rounds() -> usize {
    std::env::var(CHANGE_ROUNDS_VARIABLE).ok().map_or(CHANGE_ROUNDS, |rounds| {
        rounds.parse().unwrap_or_else(|_| panic!("{CHANGE_ROUNDS_VARIABLE}={rounds} is no number"))
    })
}

/// Where nobody listens.
fn nowhere() -> String {
    format!("http://127.0.0.1:{}", free_port())
}

/// A document of `PUT /_/members`.
fn wanted(cluster: &Cluster, voters: &[u64]) -> Vec<u8> {
    let members = voters.iter().map(|id| json!({"id": id, "url": cluster.peer_url(*id), "role": "voter"}));
    Value::from_iter(members).to_string().into_bytes()
}

impl Cluster {
    /// Asks node `at` for a member with the address that was prepared for it.
    #[track_caller]
    fn add(&self, at: u64, id: u64, query: &str) -> Response {
        self.client(at).must("PUT", &format!("/_/members/{id}{query}"), self.peer_url(id).as_bytes())
    }

    #[track_caller]
    fn remove(&self, at: u64, id: u64) -> Response {
        self.client(at).must("DELETE", &format!("/_/members/{id}"), b"")
    }

    #[track_caller]
    fn transfer(&self, at: u64, id: u64) -> Response {
        self.client(at).must("PUT", "/_/leader", id.to_string().as_bytes())
    }

    /// Starts a node that was prepared, adds it through node `at`, and waits until it votes and has caught up.
    #[track_caller]
    fn join(&mut self, at: u64, id: u64) {
        self.spawn(id);
        let added =
            retry(|| self.client(at).request("PUT", &format!("/_/members/{id}"), &[], self.peer_url(id).as_bytes()));
        assert_eq!(added.status, 204, "{}", added.text());
        wait_for("a voter", || (self.roles(at)?.get(&id)? == "voter").then_some(()));
        self.wait_ready(id);
        self.wait_caught_up(id);
    }

    /// Each member's role, as node `at` says.
    fn roles(&self, at: u64) -> Option<BTreeMap<u64, String>> {
        let response = self.client(at).request("GET", "/_/members", &[], b"").ok()?;
        (response.status == 200).then(|| roles(&response))
    }

    /// Waits until node `at` says that exactly these are members, and vote.
    #[track_caller]
    fn wait_voters(&self, at: u64, voters: &[u64]) {
        let expected: BTreeMap<u64, String> = voters.iter().map(|id| (*id, "voter".to_owned())).collect();
        wait_for("the wanted members", || (self.roles(at)? == expected).then_some(()));
    }

    /// Waits until all these nodes follow one of them.
    #[track_caller]
    fn leader_of(&self, nodes: &[u64]) -> u64 {
        wait_for("a leader whom all follow", || {
            let said: Vec<u64> = nodes.iter().map(|id| self.status_number(*id, "leader")).collect();
            (nodes.contains(&said[0]) && said.iter().all(|leader| *leader == said[0])).then_some(said[0])
        })
    }

    /// Waits until a node that was removed has ended, as it should.
    #[track_caller]
    fn assert_leaves(&mut self, id: u64) {
        assert_eq!(self.wait_end(id).code(), Some(0), "node {id}");
        let log = self.log(id);
        // Another thread may have had a word after the last one.
        let told = log.lines().rev().take(5).filter(|line| line.contains("its data directory can be deleted")).count();
        assert_eq!(told, 1, "{log}");
    }

    /// Waits until a node that starts has ended with status 1 and a last line that has all of `words`.
    #[track_caller]
    fn assert_refused(&mut self, id: u64, words: &[&str]) {
        self.spawn(id);
        assert_eq!(self.wait_end(id).code(), Some(1), "node {id}");
        let log = self.log(id);
        let last = log.lines().last().unwrap_or_default();
        for word in words {
            assert!(last.contains(word), "{word:?} is missing in: {last}");
        }
    }
}

fn roles(response: &Response) -> BTreeMap<u64, String> {
    let document = response.json();
    let members = document["members"].as_array().expect("a list").iter();
    members.map(|member| (member["id"].as_u64().unwrap(), member["role"].as_str().unwrap().to_owned())).collect()
}

/// Asks again as long as the answer may be about another change, or about none, as a person would.
#[track_caller]
fn retry(mut request: impl FnMut() -> Result<Response, Failure>) -> Response {
    wait_for("an answer other than a conflict", || {
        request().ok().filter(|response| !matches!(response.status, 409 | 503 | 504))
    })
}

#[track_caller]
fn assert_status(response: &Response, status: u16, word: &str) {
    assert_eq!(response.status, status, "{}", response.text());
    assert!(response.text().contains(word), "{word:?} is missing in: {}", response.text());
    if status == 409 {
        assert_eq!(response.outcome(), "not-applied", "{}", response.text());
    }
}

fn copy_directory(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).unwrap();
    for entry in std::fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        std::fs::copy(entry.path(), to.join(entry.file_name())).unwrap();
    }
}

/// One that writes growing numbers and reads them back on another node each time: what it reads may never be older
/// than what was acknowledged.
struct Watch {
    stop: Arc<AtomicBool>,
    thread: JoinHandle<usize>,
}

impl Watch {
    fn start(cluster: &Cluster) -> Self {
        let mut clients: Vec<Client> = cluster.ids().into_iter().map(|id| cluster.client(id)).collect();
        let stop = Arc::new(AtomicBool::new(false));
        let stopping = Arc::clone(&stop);
        let body = move || {
            let (mut acknowledged, mut reads, mut next) = (0, 0, 0);
            while !stopping.load(Ordering::Relaxed) {
                next += 1;
                let turn = next as usize;
                let count = clients.len();
                let value = next.to_string();
                if let Ok(response) = clients[turn % count].request("PUT", "/watched", &[], value.as_bytes())
                    && response.status == 204
                {
                    acknowledged = next;
                }
                if let Ok(response) = clients[(turn / count + turn) % count].request("GET", "/watched", &[], b"")
                    && response.status == 200
                {
                    let read: u64 = response.text().parse().unwrap();
                    assert!(read >= acknowledged, "read {read} after {acknowledged} was acknowledged");
                    reads += 1;
                }
            }
            reads
        };
        Self { stop, thread: Builder::new().name("watch".to_owned()).spawn(body).unwrap() }
    }

    #[track_caller]
    fn stop(self) {
        self.stop.store(true, Ordering::Relaxed);
        let reads = self.thread.join().expect("a stale read");
        println!("{reads} reads were watched");
        assert!(reads > 0, "nothing was read, so nothing is tested");
    }
}

#[test]
fn a_machine_is_replaced() {
    let mut cluster = Cluster::start(3, FAST);
    assert_eq!(cluster.client(1).put("/before", b"value").status, 204);
    cluster.prepare_joiner(4);
    cluster.join(1, 4);
    cluster.wait_voters(2, &[1, 2, 3, 4]);
    let url = cluster.peer_url(4).to_owned();
    assert!(cluster.client(3).get("/_/members").text().contains(&url));
    assert_eq!(cluster.client(4).put("/on-4", b"value").status, 204);

    assert_status(&cluster.remove(4, 3), 204, "");
    cluster.assert_leaves(3);
    cluster.wait_voters(1, &[1, 2, 4]);
    // With its data it is told again at each start; on a new disk too, if it comes under its old id.
    cluster.spawn(3);
    cluster.assert_leaves(3);
    std::fs::remove_dir_all(cluster.data_dir(3)).unwrap();
    cluster.spawn(3);
    cluster.assert_leaves(3);

    cluster.prepare_joiner(5);
    cluster.join(2, 5);
    cluster.wait_voters(5, &[1, 2, 4, 5]);
    for key in ["/before", "/on-4"] {
        assert_eq!(cluster.client(5).get(&format!("{key}?consistency=stale")).status, 200, "{key}");
    }
    for id in [1, 2, 4, 5] {
        let status = cluster.status(id).expect("it answers");
        assert_eq!(status["members"].as_array().map(Vec::len), Some(4), "{status}");
    }
}

#[test]
fn what_cannot_be_added_is_refused_with_the_reason() {
    let cluster = Cluster::start(3, FAST);
    let leader = cluster.leader();
    let follower = cluster.others(leader)[0];
    let (url, other) = (nowhere(), nowhere());
    for at in [leader, follower] {
        let mut client = cluster.client(at);
        let mut put = |target: &str, body: &str| client.must("PUT", &format!("/_/members{target}"), body.as_bytes());
        for _ in 0..2 {
            assert_status(&put("/4?role=learner", &url), 204, "");
        }
        assert_status(&put("/4", &format!("{url}/\n")), 204, "");
        assert_status(&put("/4", &other), 409, &url);
        assert_status(&put("/5", &url), 409, "member 4");
        assert_status(&put("/5", cluster.peer_url(1)), 409, "member 1");
        assert_status(&put("/1?role=learner", cluster.peer_url(1)), 409, "votes");
        assert_status(&put("/1?role=voter", cluster.peer_url(1)), 204, "");
        for id in ["0", "-1", "four", "18446744073709551616", "4x"] {
            assert_status(&put(&format!("/{id}"), &other), 400, "");
        }
        for url in
            ["", "127.0.0.1:1", "https://127.0.0.1:1", "http://127.0.0.1", "http://127.0.0.1:0x1", "http://a:1/b"]
        {
            assert_status(&put("/5", url), 400, "");
        }
        assert_status(&put("/5?role=boss", &other), 400, "role");
        for body in ["", "[]", "{}", "[1]", r#"[{"id": 1}]"#] {
            let status = put("", body).status;
            assert!(matches!(status, 400 | 409), "{body}: {status}");
        }
        let mut set = wanted(&cluster, &[1, 2]);
        assert_eq!(set.pop(), Some(b']'));
        set.extend_from_slice(format!(r#",{{"id":3,"url":"{other}","role":"voter"}}]"#).as_bytes());
        assert_status(&client.must("PUT", "/_/members", &set), 409, "new id");
        assert_status(&cluster.remove(at, 9), 409, "not a member");
        assert_status(&cluster.transfer(at, 4), 409, "votes");
        assert_status(&cluster.transfer(at, 9), 409, "not a member");
        assert_status(&client.must("PUT", "/_/leader", b"nobody"), 400, "");
        assert_status(&cluster.transfer(at, leader), 204, "");
    }
    for _ in 0..2 {
        assert_status(&cluster.remove(follower, 4), 204, "");
    }
    let again = cluster.client(leader).must("PUT", "/_/members/4", url.as_bytes());
    assert_status(&again, 409, "new one");
    cluster.wait_voters(follower, &[1, 2, 3]);
}

#[test]
fn a_learner_serves_reads_and_votes_on_demand() {
    let mut cluster = Cluster::start(1, FAST);
    assert_eq!(cluster.client(1).put("/key", b"value").status, 204);
    cluster.prepare_joiner(2);
    // Added before it starts: the leader tries until somebody answers there.
    assert_status(&cluster.add(1, 2, "?role=learner"), 204, "");
    cluster.spawn(2);
    cluster.wait_ready(2);
    assert_eq!(cluster.client(2).get("/key").text(), "value", "linearizable, on a learner");
    assert_eq!(cluster.client(2).put("/key", b"from a learner").status, 204);
    cluster.wait_caught_up(2);
    // It has had what it takes to be promoted for as many ticks as an election has.
    let uptime = cluster.status_number(2, "uptime_ms");
    wait_for("half a second", || (cluster.status_number(2, "uptime_ms") > uptime + 500).then_some(()));
    assert_eq!(cluster.status(2).expect("it answers")["role"], "learner");
    assert_eq!(cluster.roles(1).expect("it answers")[&2], "learner");

    // Without it nothing is lost, since it does not count.
    cluster.pause(2);
    assert_eq!(cluster.client(1).put("/key", b"alone").status, 204);
    cluster.resume(2);
    assert_eq!(cluster.client(2).get("/key").text(), "alone");
    let promoted =
        retry(|| cluster.client(2).request("PUT", "/_/members/2?role=voter", &[], cluster.peer_url(2).as_bytes()));
    assert_status(&promoted, 204, "");
    cluster.wait_voters(2, &[1, 2]);
    assert_status(&cluster.transfer(1, 2), 204, "");
    assert_eq!(cluster.leader_of(&[1, 2]), 2);
}

#[test]
fn a_learner_out_of_reach_stays_one_and_can_be_removed() {
    let mut cluster = Cluster::start(3, &[FAST, &["--request-timeout", "2s"]].concat());
    cluster.prepare_joiner(4);
    let leader = cluster.leader();
    assert_status(&cluster.add(leader, 4, ""), 204, "");
    let asked = Instant::now();
    let promoted = cluster.add(leader, 4, "?role=voter");
    assert_status(&promoted, 504, "");
    assert_eq!(promoted.outcome(), "unknown");
    assert!(asked.elapsed() < Duration::from_secs(3), "{:?}", asked.elapsed());
    let status = cluster.status(leader).expect("it answers");
    assert!(status["change"].as_str().is_some_and(|change| change.contains("member 4")), "{status}");
    assert_eq!(cluster.roles(leader).expect("it answers")[&4], "learner");
    assert_eq!(cluster.client(1).put("/key", b"value").status, 204);
    let removed = retry(|| cluster.client(2).request("DELETE", "/_/members/4", &[], b""));
    assert_status(&removed, 204, "");
    cluster.wait_voters(3, &[1, 2, 3]);
    // It hears of it when it comes for the first time.
    cluster.assert_refused(4, &["id 4 was removed", "new one"]);
}

#[test]
fn a_joiner_is_not_given_a_snapshot_from_before_its_time() {
    let mut cluster =
        Cluster::start(1, &[FAST, &["--snapshot-count", "20", "--snapshot-catchup-entries", "0"]].concat());
    for number in 0..50 {
        assert_eq!(cluster.client(1).put(&format!("/{number}"), b"value").status, 204);
    }
    assert!(cluster.status_number(1, "first_index") > 20);
    for id in [2, 3] {
        cluster.prepare_joiner(id);
        cluster.join(1, id);
    }
    for number in 0..50 {
        assert_eq!(cluster.client(3).get(&format!("/{number}?consistency=stale")).status, 200);
    }
    // The addresses came with it.
    cluster.kill_all();
    cluster.restart_all();
    cluster.wait_voters(3, &[1, 2, 3]);
}

#[test]
fn a_leader_is_removed_under_load() {
    for ask_leader in [false, true] {
        let mut cluster = Cluster::start(4, &[]);
        let leader = cluster.leader();
        let load = Load::start(&cluster, WRITERS);
        load.wait_for_writes(100);
        let at = if ask_leader { leader } else { cluster.others(leader)[0] };
        assert_status(&cluster.remove(at, leader), 204, "");
        cluster.assert_leaves(leader);
        load.wait_for_writes(300);
        let written = load.stop();
        let gap = written.longest_gap();
        assert!(gap < ELECTION_TIMEOUT, "no write succeeded for {gap:?}");
        let unknown = written.statuses.get(&504).copied().unwrap_or(0);
        assert!(unknown <= WRITERS, "{unknown} writes were handed over by a node that had left");
        let others = cluster.others(leader);
        cluster.wait_voters(others[1], &others);
        written.verify_on(&cluster, &others);
    }
}

#[test]
fn a_dead_member_is_removed_unless_too_few_are_left() {
    let mut cluster = Cluster::start(3, FAST);
    let leader = cluster.leader();
    let others = cluster.others(leader);
    let (first, second) = (others[0], others[1]);
    cluster.kill(first);
    assert_status(&cluster.remove(second, first), 204, "");
    cluster.wait_voters(second, &[leader.min(second), leader.max(second)]);

    cluster.kill(second);
    // Asked before, the leader would propose it, and the outcome be unknown.
    wait_for("a leader that steps down", || (cluster.status(leader)?["leader"] == 0).then_some(()));
    assert_status(&cluster.remove(leader, second), 409, "majority");
    // Removed while it was down, with all its data.
    cluster.spawn(second);
    cluster.spawn(first);
    cluster.assert_leaves(first);

    cluster.wait_ready(second);
    let leader = cluster.leader_of(&[leader, second]);
    let follower = cluster.others(leader).into_iter().find(|id| *id != first).unwrap();
    // Asked of the one that leaves.
    assert_status(&cluster.remove(follower, follower), 204, "");
    cluster.assert_leaves(follower);
    assert_status(&cluster.remove(leader, leader), 409, "last voter");
    // The one that is left needs nobody, also if it remembers the others from before.
    cluster.kill(leader);
    cluster.restart(leader);
    assert_eq!(cluster.client(leader).put("/key", b"value").status, 204);
}

#[test]
fn the_one_that_stays_of_two_never_waits_for_the_other() {
    for round in 0..rounds() {
        let mut cluster = Cluster::start(2, FAST);
        let leader = cluster.leader();
        let other = cluster.others(leader)[0];
        // The leader hands over, and both have to agree to the removal.
        assert_status(&cluster.remove(other, leader), 204, "");
        sleep(Duration::from_millis(round as u64));
        cluster.kill(other);
        cluster.spawn(other);
        cluster.assert_leaves(leader);
        cluster.wait_ready(other);
        cluster.wait_voters(other, &[other]);
    }
}

#[test]
fn of_two_changes_at_once_one_wins_and_the_other_hears_so() {
    let cluster = Cluster::start(3, FAST);
    let mut conflicts = 0;
    for round in 0..10_u64 {
        let mut clients = [1, 2].map(|at| cluster.client(at));
        let ids = [4 + 2 * round, 5 + 2 * round];
        for (client, id) in clients.iter_mut().zip(ids) {
            client.send("PUT", &format!("/_/members/{id}?role=learner"), &[], nowhere().as_bytes()).unwrap();
        }
        let answers =
            clients.each_mut().map(|client| client.receive("PUT").unwrap_or_else(|failure| panic!("{failure}")));
        let roles = cluster.roles(3).expect("it answers");
        for (answer, id) in answers.iter().zip(ids) {
            match answer.status {
                204 => assert_eq!(roles[&id], "learner"),
                409 => assert!(!roles.contains_key(&id) && answer.text().contains("in progress"), "{}", answer.text()),
                other => panic!("{other} {}", answer.text()),
            }
        }
        let won = answers.iter().filter(|answer| answer.status == 204).count();
        assert!(won > 0, "somebody has to win");
        conflicts += 2 - won;
    }
    println!("{conflicts} of 10 rounds had a loser");
    assert_eq!(cluster.client(1).put("/key", b"value").status, 204);
}

#[test]
fn a_change_without_a_majority_ends_in_time_and_leaves_nothing_stuck() {
    let mut cluster = Cluster::start(3, &[FAST, &["--request-timeout", "2s"]].concat());
    let leader = cluster.leader();
    for other in cluster.others(leader) {
        cluster.kill(other);
    }
    let url = nowhere();
    // The leader has not noticed yet; and then it has.
    let asked = Instant::now();
    let first = cluster.client(leader).must("PUT", "/_/members/4?role=learner", url.as_bytes());
    match first.status {
        504 => assert_eq!(first.outcome(), "unknown"),
        _ => assert_status(&first, 409, "majority"),
    }
    let second = cluster.client(leader).must("PUT", "/_/members/5?role=learner", nowhere().as_bytes());
    assert_status(&second, 409, "majority");
    assert!(asked.elapsed() < Duration::from_secs(6), "{:?}", asked.elapsed());
    for other in cluster.others(leader) {
        cluster.restart(other);
    }
    let mut client = cluster.client(leader);
    let added = retry(|| client.request("PUT", "/_/members/4?role=learner", &[], url.as_bytes()));
    assert_status(&added, 204, "");
    assert_status(&cluster.remove(1, 4), 204, "");
    cluster.wait_voters(2, &[1, 2, 3]);
}

#[test]
fn a_leader_that_dies_during_a_change_leaves_nothing_stuck() {
    let mut cluster = Cluster::start(3, FAST);
    let mut outcomes: BTreeMap<u16, usize> = BTreeMap::new();
    for round in 0..rounds() as u64 {
        let leader = cluster.leader();
        let at = cluster.others(leader)[round as usize % 2];
        // From before it is proposed until after it is applied.
        let delay = Duration::from_micros(700 * (round % 16));
        let (id, url) = (4 + round / 2, nowhere());
        let (method, target) = match round % 2 {
            0 => ("PUT", format!("/_/members/{id}?role=learner")),
            _ => ("DELETE", format!("/_/members/{id}")),
        };
        let mut client = cluster.client(at);
        let body = if method == "PUT" { url.as_bytes() } else { b"" };
        client.send(method, &target, &[], body).unwrap();
        sleep(delay);
        cluster.kill(leader);
        let answer = client.receive(method).unwrap_or_else(|failure| panic!("{failure}"));
        *outcomes.entry(answer.status).or_default() += 1;
        let present = wait_for("the members", || Some(cluster.roles(at)?.contains_key(&id)));
        match answer.status {
            204 => assert_eq!(present, round % 2 == 0, "acknowledged, and not so"),
            504 => assert_eq!(answer.outcome(), "unknown"),
            other => panic!("{other} {}", answer.text()),
        }
        cluster.restart(leader);
        if round % 2 == 0 {
            let known = cluster.client(at).get("/_/members").json();
            let member = known["members"].as_array().unwrap().iter().find(|member| member["id"] == id);
            let url = member.map_or(url.as_str(), |member| member["url"].as_str().unwrap()).to_owned();
            let again = retry(|| cluster.client(at).request("PUT", &target, &[], url.as_bytes()));
            assert_status(&again, 204, "");
        } else {
            assert_status(&retry(|| cluster.client(at).request("DELETE", &target, &[], b"")), 204, "");
        }
    }
    println!("answers: {outcomes:?}");
    assert_eq!(cluster.client(1).put("/key", b"value").status, 204);
}

#[test]
fn a_wiped_disk_is_refused_under_its_old_id_and_does_not_vote() {
    let mut cluster = Cluster::start(3, FAST);
    assert_eq!(cluster.client(1).put("/key", b"value").status, 204);
    let leader = cluster.leader();
    let others = cluster.others(leader);
    let (wiped, other) = (others[0], others[1]);
    cluster.wait_caught_up(wiped);
    cluster.kill(wiped);
    std::fs::remove_dir_all(cluster.data_dir(wiped)).unwrap();
    cluster.assert_refused(wiped, &["new id"]);
    std::fs::remove_dir_all(cluster.data_dir(wiped)).unwrap();
    // No more so with a single one to elect.
    cluster.kill(other);
    cluster.kill(leader);
    cluster.spawn(leader);
    wait_for("a node that listens", || cluster.status(leader));
    cluster.assert_refused(wiped, &["new id"]);
    assert_eq!(cluster.client(leader).put("/key", b"more").status, 503);
    assert_eq!(cluster.status_number(leader, "leader"), 0);

    // The way out that it named.
    cluster.restart(other);
    assert_status(
        &retry(|| cluster.client(other).request("DELETE", &format!("/_/members/{wiped}"), &[], b"")),
        204,
        "",
    );
    cluster.prepare_joiner(4);
    cluster.join(leader, 4);
    assert_eq!(cluster.client(4).get("/key?consistency=stale").text(), "value");
}

#[test]
fn an_older_copy_of_a_data_directory_is_refused() {
    let mut cluster = Cluster::start(3, FAST);
    let follower = cluster.others(cluster.leader())[0];
    assert_eq!(cluster.terminate(follower).code(), Some(0));
    let copy = cluster.data_dir(follower).with_extension("copy");
    copy_directory(cluster.data_dir(follower), &copy);
    for restarts in [0, 1] {
        for _ in 0..=restarts {
            cluster.restart(follower);
            assert_eq!(cluster.client(follower).put("/key", b"promised").status, 204);
            assert_eq!(cluster.terminate(follower).code(), Some(0));
        }
        let newest = cluster.data_dir(follower).with_extension("newest");
        std::fs::rename(cluster.data_dir(follower), &newest).unwrap();
        copy_directory(&copy, cluster.data_dir(follower));
        cluster.assert_refused(follower, &["older copy", "new id"]);
        std::fs::remove_dir_all(cluster.data_dir(follower)).unwrap();
        std::fs::rename(&newest, cluster.data_dir(follower)).unwrap();
    }
    cluster.restart(follower);
    assert_eq!(cluster.client(follower).get("/key").text(), "promised");
}

#[test]
fn a_node_of_another_cluster_is_refused_and_named_once() {
    let cluster = Cluster::start(3, FAST);
    let directory = tempfile::TempDir::new().unwrap();
    let log = directory.path().join("log");
    let mut command = program();
    let peers = format!("{},{}", cluster.peer_url(1), nowhere());
    command.args(["--id", "2", "--cluster", &peers, "--port", &free_port().to_string()]).args(FAST);
    let stranger = Process::spawn(command.arg("--data-dir").arg(directory.path().join("data")), &log);
    let count = |text: &str| text.lines().filter(|line| line.contains("another cluster")).count();
    wait_for("a refusal", || (count(&read_text(&log)) > 0 && count(&cluster.log(1)) > 0).then_some(()));
    let uptime = cluster.status_number(1, "uptime_ms");
    assert_eq!(cluster.client(2).put("/key", b"value").status, 204);
    wait_for("two seconds", || (cluster.status_number(1, "uptime_ms") > uptime + 2000).then_some(()));
    // Once for each of its two connections.
    assert!(count(&read_text(&log)) <= 2, "{}", read_text(&log));
    assert!(count(&cluster.log(1)) <= 2, "{}", cluster.log(1));
    cluster.wait_voters(1, &[1, 2, 3]);
    drop(stranger);
}

#[test]
fn ids_may_have_holes() {
    let mut cluster = Cluster::start(1, FAST);
    for id in [7, u64::MAX, 3] {
        cluster.prepare_joiner(id);
        cluster.join(1, id);
    }
    cluster.wait_voters(3, &[1, 3, 7, u64::MAX]);
    assert_status(&cluster.transfer(7, u64::MAX), 204, "");
    assert_status(&cluster.remove(3, 1), 204, "");
    cluster.assert_leaves(1);
    cluster.wait_voters(7, &[3, 7, u64::MAX]);
}

#[test]
fn a_changed_cluster_list_does_not_matter_later() {
    let mut cluster = Cluster::start(3, FAST);
    cluster.prepare_joiner(4);
    cluster.join(1, 4);
    cluster.kill_all();
    for id in cluster.ids() {
        let url = cluster.peer_url(id).to_owned();
        // Nobody but itself, and for the joiner somebody who does not exist.
        let list = if id == 4 { format!("9={},4={url}", nowhere()) } else { format!("{id}={url}") };
        cluster.set_peer_list(id, list);
    }
    cluster.restart_all();
    cluster.wait_voters(4, &[1, 2, 3, 4]);
    assert_eq!(cluster.client(4).put("/key", b"value").status, 204);
}

#[test]
fn all_members_are_replaced_in_one_step() {
    let mut cluster = Cluster::start(3, &[]);
    for id in 4..=6 {
        cluster.prepare_joiner(id);
    }
    let load = Load::start(&cluster, WRITERS);
    load.wait_for_writes(100);
    for id in 4..=6 {
        cluster.spawn(id);
    }
    let body = wanted(&cluster, &[4, 5, 6]);
    wait_for("a node that listens", || cluster.status(4));
    assert_eq!(cluster.client(4).must("PUT", "/_/members", &body).status, 503, "not added yet, it knows nobody");
    // It goes on where it was each time it is asked.
    let replaced = retry(|| {
        let at = if cluster.status(1).is_some() { 1 } else { 4 };
        cluster.client(at).request("PUT", "/_/members", &[], &body)
    });
    assert_status(&replaced, 200, "");
    assert_eq!(roles(&replaced).into_keys().collect::<Vec<_>>(), [4, 5, 6]);
    for id in 1..=3 {
        cluster.assert_leaves(id);
    }
    load.wait_for_writes(100);
    let written = load.stop();
    let gap = written.longest_gap();
    assert!(gap < ELECTION_TIMEOUT * 5 / 2, "no write succeeded for {gap:?}");
    written.verify_on(&cluster, &[4, 5, 6]);
    let leader = cluster.leader_of(&[4, 5, 6]);
    assert!(cluster.log(leader).contains("changing the cluster: "), "progress is logged");
    // Down to one, which is not the leader, and asked twice.
    let last = if leader == 4 { 5 } else { 4 };
    let body = wanted(&cluster, &[last]);
    for _ in 0..2 {
        let replaced = retry(|| cluster.client(last).request("PUT", "/_/members", &[], &body));
        assert_status(&replaced, 200, "");
    }
    written.verify_on(&cluster, &[last]);
}

#[test]
fn a_joint_change_goes_on_after_all_nodes_restart() {
    let mut cluster = Cluster::start(3, FAST);
    for id in 4..=5 {
        cluster.prepare_joiner(id);
        cluster.spawn(id);
        assert_status(&cluster.add(1, id, "?role=learner"), 204, "");
        cluster.wait_ready(id);
        cluster.wait_caught_up(id);
    }
    let leader = cluster.leader();
    let leaving = [1, 2, 3].into_iter().filter(|id| *id != leader).collect::<Vec<_>>();
    let body = wanted(&cluster, &[leader, 4, 5]);
    // The old voters agree to begin it, and the new ones can't agree to end it.
    let joint = (0..rounds()).any(|_| {
        for id in 4..=5 {
            cluster.kill(id);
        }
        let mut client = cluster.client(leader);
        client.send("PUT", "/_/members", &[], &body).unwrap();
        let answer = client.receive("PUT").unwrap_or_else(|failure| panic!("{failure}"));
        if answer.status == 504 {
            return true;
        }
        assert_status(&answer, 409, "majority");
        for id in 4..=5 {
            cluster.restart(id);
        }
        false
    });
    assert!(joint, "the change never got into its middle");
    assert_eq!(cluster.client(leader).get("/key").status, 503, "one half decides nothing");
    cluster.kill_all();
    for id in cluster.ids() {
        cluster.spawn(id);
    }
    for id in leaving {
        cluster.assert_leaves(id);
    }
    cluster.wait_voters(5, &[leader.min(4), 4, 5]);
    assert_eq!(cluster.client(leader).put("/key", b"value").status, 204);
}

#[test]
fn any_node_may_die_while_the_members_are_replaced() {
    for round in 0..rounds().div_ceil(2) as u64 {
        let mut cluster = Cluster::start(3, FAST);
        for id in 4..=6 {
            cluster.prepare_joiner(id);
            cluster.spawn(id);
            assert_status(&cluster.add(1, id, "?role=learner"), 204, "");
            cluster.wait_ready(id);
        }
        assert_eq!(cluster.client(1).put("/key", b"value").status, 204);
        let wanted_ids = [[3, 4, 5], [4, 5, 6]][round as usize % 2];
        let body = wanted(&cluster, &wanted_ids);
        let mut client = cluster.client(3);
        client.send("PUT", "/_/members", &[], &body).unwrap();
        sleep(Duration::from_millis(20 * (round % 8)));
        let victim = 1 + round * 5 % 6;
        cluster.kill(victim);
        // Whatever this one hears, if it was not the victim itself.
        let _ = client.receive("PUT");
        if victim != 6 || wanted_ids.contains(&6) {
            cluster.spawn(victim);
        }
        let replaced = retry(|| {
            // A node that left has done what was asked of it.
            cluster.client(4).request("PUT", "/_/members", &[], &body)
        });
        assert_status(&replaced, 200, "");
        for id in wanted_ids {
            cluster.wait_ready(id);
            cluster.wait_voters(id, &wanted_ids);
            assert_eq!(cluster.client(id).get("/key").text(), "value");
        }
        for id in (1..=6).filter(|id| !wanted_ids.contains(id) && cluster.is_up(*id)).collect::<Vec<_>>() {
            cluster.assert_leaves(id);
        }
    }
}

#[test]
fn an_interrupted_hand_over_leaves_a_working_leader() {
    let mut cluster = Cluster::start(3, FAST);
    for target in cluster.ids() {
        assert_status(&cluster.transfer(target % 3 + 1, target), 204, "");
        assert_eq!(cluster.leader_of(&[1, 2, 3]), target);
    }
    let leader = cluster.leader();
    let target = cluster.others(leader)[0];
    // Stopped rather than killed: it may wake up later, and begin to do as it was told.
    cluster.pause(target);
    let mut client = cluster.client(leader);
    client.send("PUT", "/_/leader", &[], target.to_string().as_bytes()).unwrap();
    let asked = Instant::now();
    assert_eq!(cluster.client(cluster.others(leader)[1]).put("/key", b"value").status, 204);
    assert!(asked.elapsed() < Duration::from_secs(3), "a write waited {:?} for the hand-over", asked.elapsed());
    let answer = client.receive("PUT").unwrap_or_else(|failure| panic!("{failure}"));
    assert!(matches!(answer.status, 409 | 504), "{} {}", answer.status, answer.text());
    cluster.resume(target);
    cluster.wait_ready(target);
    cluster.kill(target);
    let up = cluster.others(target);
    let answer = wait_for("a refusal", || Some(cluster.transfer(up[0], target)).filter(|answer| answer.status == 409));
    assert_status(&answer, 409, "not heard from");
    assert_eq!(cluster.client(up[1]).put("/key", b"value").status, 204);
}

#[test]
fn growing_and_shrinking_under_load_loses_nothing_and_reads_nothing_stale() {
    let mut cluster = Cluster::start(1, &[]);
    for id in 2..=5 {
        cluster.prepare_joiner(id);
    }
    let load = Load::start(&cluster, WRITERS);
    let watch = Watch::start(&cluster);
    for id in 2..=5 {
        cluster.join(1, id);
        load.wait_for_writes(50);
    }
    cluster.wait_voters(3, &[1, 2, 3, 4, 5]);
    let mut members = vec![1, 2, 3, 4, 5];
    while members.len() > 1 {
        // The leader is among those that go.
        let leader = cluster.leader_of(&members);
        let leaver = if members.len() % 2 == 0 { leader } else { *members.iter().find(|id| **id != leader).unwrap() };
        members.retain(|id| *id != leaver);
        let target = format!("/_/members/{leaver}");
        assert_status(&retry(|| cluster.client(members[0]).request("DELETE", &target, &[], b"")), 204, "");
        cluster.assert_leaves(leaver);
        load.wait_for_writes(50);
    }
    watch.stop();
    let written = load.stop();
    let gap = written.longest_gap();
    assert!(gap < ELECTION_TIMEOUT * 5 / 2, "no write succeeded for {gap:?}");
    written.verify_on(&cluster, &members);
}

#[test]
fn a_rolling_replacement_of_all_members_costs_clients_little() {
    let mut cluster = Cluster::start(3, &[]);
    for id in 4..=6 {
        cluster.prepare_joiner(id);
    }
    let load = Load::start(&cluster, WRITERS);
    let watch = Watch::start(&cluster);
    for old in 1..=3 {
        let (new, at) = (old + 3, old + 1);
        cluster.join(at, new);
        assert_status(&retry(|| cluster.client(at).request("DELETE", &format!("/_/members/{old}"), &[], b"")), 204, "");
        cluster.assert_leaves(old);
        load.wait_for_writes(100);
    }
    watch.stop();
    let written = load.stop();
    let gap = written.longest_gap();
    assert!(gap < ELECTION_TIMEOUT + REQUEST_TIMEOUT, "no write succeeded for {gap:?}");
    assert!(gap < ELECTION_TIMEOUT * 5 / 2, "nobody died, and no write succeeded for {gap:?}");
    cluster.wait_voters(5, &[4, 5, 6]);
    written.verify_on(&cluster, &[4, 5, 6]);
}
