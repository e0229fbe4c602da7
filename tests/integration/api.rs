use std::sync::Barrier;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;

use serde_json::Value;

use crate::caller::{Caller, take, together};
use crate::client::Response;
use crate::support::{Cluster, FAST, wait_for};

/// Clients that compete for one key.
const CLIENTS: usize = 16;

/// Status and entity tag: what an `Idempotency-Key` is remembered with.
fn told(response: &Response) -> (u16, Option<String>) {
    (response.status, response.header("etag").map(str::to_owned))
}

/// The changes after an index of what begins with `prefix`, at most the thousand of one answer.
#[track_caller]
fn changes(cluster: &Cluster, id: u64, prefix: &str, index: &str) -> Vec<Value> {
    let response = cluster.client(id).get(&format!("/?prefix={prefix}&after-index={index}&timeout=0s"));
    assert_eq!(response.status, 200, "{}", response.text());
    response.json()["changes"].as_array().expect("a list").clone()
}

#[test]
fn a_thousand_increments_count_to_a_thousand() {
    const INCREMENTS: usize = 1000;
    let mut cluster = Cluster::start(3, FAST);
    let zero = cluster.client(1).put("/counter", b"0");
    let zero_index = zero.header("etag").expect("a success has an ETag").trim_matches('"');
    let leader = cluster.leader();
    let (left, done) = (AtomicUsize::new(INCREMENTS), AtomicUsize::new(0));
    let mut callers = Caller::several(&cluster, "counter", CLIENTS);
    let count = |_, caller: &mut Caller| {
        let mut conflicts = 0;
        while take(&left) {
            conflicts += increment(caller, "/counter");
            done.fetch_add(1, Ordering::Relaxed);
        }
        conflicts
    };
    let conflicts = together(&mut callers, count, || {
        wait_for("a third of the increments", || (done.load(Ordering::Relaxed) >= INCREMENTS / 3).then_some(()));
        cluster.kill(leader);
    });
    let conflicts: usize = conflicts.into_iter().sum();
    let repeats: usize = callers.iter().map(|caller| caller.repeats).sum();
    println!("{conflicts} conflicts, {repeats} repeats");
    assert!(conflicts > 0 && repeats > 0, "nobody was in anybody's way, so nothing is tested");
    cluster.restart(leader);
    for id in cluster.ids() {
        assert_eq!(cluster.client(id).get("/counter").text(), INCREMENTS.to_string());
        assert_eq!(changes(&cluster, id, "counter", zero_index).len(), INCREMENTS);
    }
}

/// Adds one by compare-and-set. Returned is how often somebody else was faster.
fn increment(caller: &mut Caller, target: &str) -> usize {
    let mut conflicts = 0;
    loop {
        let read = caller.read(target);
        let (value, etag) = (read.text().parse::<usize>().unwrap(), read.header("etag").unwrap());
        let write = caller.write("PUT", target, Some(("If-Match", etag)), (value + 1).to_string().as_bytes());
        match write.status {
            204 => return conflicts,
            412 => conflicts += 1,
            other => panic!("{other} {}", write.text()),
        }
    }
}

#[test]
fn a_lock_is_taken_by_exactly_one() {
    let cluster = Cluster::start(3, FAST);
    let mut callers = Caller::several(&cluster, "lock", CLIENTS);
    for round in 0..10 {
        let start = Barrier::new(CLIENTS);
        let lock = |number: usize, caller: &mut Caller| {
            start.wait();
            caller.write("PUT", "/lock", Some(("If-None-Match", "*")), number.to_string().as_bytes())
        };
        let answers = together(&mut callers, lock, || {});
        let winners: Vec<_> = (0..CLIENTS).filter(|number| answers[*number].status == 204).collect();
        let [winner] = winners[..] else { panic!("round {round}: taken by {winners:?}") };
        let etag = answers[winner].header("etag").unwrap();
        for (number, answer) in answers.iter().enumerate().filter(|(number, _)| *number != winner) {
            assert_eq!(told(answer), (412, Some(etag.to_owned())), "client {number}: {}", answer.text());
            assert_eq!(answer.outcome(), "not-applied");
        }
        assert_eq!(callers[(winner + 1) % CLIENTS].read("/lock").text(), winner.to_string());
        let release = |caller: &mut Caller| caller.write("DELETE", "/lock", Some(("If-Match", etag)), b"").status;
        assert_eq!(release(&mut callers[winner]), 204);
        assert_eq!(release(&mut callers[winner]), 412, "released already");
    }
}

#[test]
fn a_token_is_applied_once_whoever_repeats_it() {
    const SENDERS: usize = 50;
    let mut cluster = Cluster::start(3, FAST);
    for round in 0..3 {
        let leader = cluster.leader();
        let (key, token) = (format!("once-{round}"), format!("token-{round}"));
        let (target, answered) = (format!("/{key}"), AtomicUsize::new(0));
        let mut callers = Caller::several(&cluster, "once", SENDERS);
        let send = |_, caller: &mut Caller| {
            // More than once each, so that some are in flight at any moment of the leader's death.
            let answers: [_; 4] = std::array::from_fn(|_| {
                let answer = caller.repeat("PUT", &target, &[("Idempotency-Key", token.as_str())], b"value");
                answered.fetch_add(1, Ordering::Relaxed);
                told(&answer)
            });
            answers
        };
        let answers = together(&mut callers, send, || {
            // Before the first answer, among the first ones, and in the middle.
            wait_for("answers", || (answered.load(Ordering::Relaxed) >= round * SENDERS).then_some(()));
            cluster.kill(leader);
        });
        let answers: Vec<_> = answers.into_iter().flatten().collect();
        assert_eq!((answers[0].0, answers[0].1.is_some()), (204, true));
        assert!(answers.iter().all(|answer| *answer == answers[0]), "round {round}: {answers:?}");
        cluster.restart(leader);
        for id in cluster.ids() {
            let changes = changes(&cluster, id, &key, "0");
            assert_eq!(changes.len(), 1, "applied more than once: {changes:?}");
            assert_eq!(Some(format!("\"{}\"", changes[0]["index"])), answers[0].1);
        }
    }
}

#[test]
fn tokens_survive_leaders_restarts_and_snapshots() {
    // Every few writes there is a snapshot, and nothing of the log is kept behind it.
    let flags = [FAST, &["--snapshot-count", "10", "--snapshot-catchup-entries", "0"]].concat();
    let mut cluster = Cluster::start(3, &flags);
    let mut caller = Caller::new(&cluster, "unused", 0);
    // Method, key, condition, value, status of the first answer.
    let writes = [
        ("PUT", "/k", None, "one", 204),
        ("PUT", "/k", Some(("If-None-Match", "*")), "two", 412),
        ("DELETE", "/nothing", None, "", 404),
        ("DELETE", "/k", Some(("If-Match", "*")), "", 204),
        ("PUT", "/k", Some(("If-Match", "*")), "three", 412),
    ];
    let send = |caller: &mut Caller, number: usize| {
        let (method, target, condition, value, _) = writes[number];
        let token = format!("write-{number}");
        let headers: Vec<_> = condition.into_iter().chain([("Idempotency-Key", token.as_str())]).collect();
        caller.repeat(method, target, &headers, value.as_bytes())
    };
    let first: Vec<_> = (0..writes.len()).map(|number| told(&send(&mut caller, number))).collect();
    assert_eq!(first.iter().map(|told| told.0).collect::<Vec<_>>(), writes.map(|write| write.4));
    assert_eq!(caller.write("PUT", "/k", None, b"last").status, 204);
    let check = |cluster: &Cluster, when: &str| {
        for id in cluster.ids() {
            let mut caller = Caller::new(cluster, when, id as usize);
            for (number, first) in first.iter().enumerate() {
                assert_eq!(told(&send(&mut caller, number)), *first, "write {number} to node {id} {when}");
            }
            let token = ("Idempotency-Key", "write-0");
            for (method, target, headers, value) in [
                ("PUT", "/k", &[token][..], "another value"),
                ("PUT", "/another-key", &[token], "one"),
                ("DELETE", "/k", &[token], ""),
                ("PUT", "/k", &[token, ("If-None-Match", "*")], "one"),
            ] {
                let answer = caller.repeat(method, target, headers, value.as_bytes());
                assert_eq!(answer.status, 422, "{method} {target} to node {id} {when}: {}", answer.text());
                assert_eq!(answer.outcome(), "not-applied");
            }
            assert_eq!(caller.read("/k").text(), "last", "a repeat was applied {when}");
        }
    };
    check(&cluster, "at once");
    for number in 0..30 {
        assert_eq!(caller.write("PUT", &format!("/filler-{number}"), None, b"").status, 204);
    }
    wait_for("a snapshot on each node", || {
        cluster.ids().into_iter().all(|id| cluster.status_number(id, "snapshot_index") > 30).then_some(())
    });
    let leader = cluster.leader();
    assert_eq!(cluster.terminate(leader).code(), Some(0));
    cluster.restart(leader);
    check(&cluster, "after a change of the leader");
    cluster.kill_all();
    cluster.restart_all();
    check(&cluster, "after a restart of all");
}

#[test]
fn a_listing_is_one_cut_through_all_writes() {
    const KEYS: usize = 10;
    const LISTINGS: usize = 300;
    let cluster = Cluster::start(3, FAST);
    for key in 0..KEYS {
        assert_eq!(cluster.client(1).put(&format!("/cut/{key}"), b"0").status, 204);
    }
    let listed = AtomicUsize::new(0);
    thread::scope(|scope| {
        scope.spawn(|| {
            // Round by round, key by key: at any index the first keys have one more than the last, or all the same.
            let mut writer = cluster.client(1);
            for round in 1.. {
                for key in 0..KEYS {
                    if listed.load(Ordering::Relaxed) >= LISTINGS {
                        return;
                    }
                    assert_eq!(writer.put(&format!("/cut/{key}"), round.to_string().as_bytes()).status, 204);
                }
            }
        });
        for id in cluster.ids() {
            let (cluster, listed) = (&cluster, &listed);
            scope.spawn(move || {
                let mut reader = cluster.client(id);
                let mut last_index = 0;
                while listed.fetch_add(1, Ordering::Relaxed) < LISTINGS {
                    let page = reader.get("/?prefix=cut/&values=true").json();
                    let index = page["index"].as_u64().expect("an index");
                    assert!(index >= last_index, "node {id} went back from {last_index} to {index}");
                    last_index = index;
                    assert_cut(&page, index);
                }
            });
        }
    });
}

/// Asserts that a page is what the writer of the test above left at one moment.
fn assert_cut(page: &Value, index: u64) {
    use base64::engine::Engine;
    let keys = page["keys"].as_array().expect("a list");
    let value = |key: &Value| {
        let value = base64::engine::general_purpose::STANDARD.decode(key["value"].as_str().expect("a value")).unwrap();
        String::from_utf8(value).unwrap().parse::<u64>().unwrap()
    };
    let values: Vec<u64> = keys.iter().map(value).collect();
    assert!(values.is_sorted_by(|a, b| a >= b) && values[0] - values[values.len() - 1] <= 1, "no cut: {values:?}");
    let etag = |key: &Value| key["etag"].as_str().and_then(|etag| etag.trim_matches('"').parse::<u64>().ok()).unwrap();
    let etags: Vec<u64> = keys.iter().map(etag).collect();
    assert!(etags.iter().all(|etag| *etag <= index), "a write after index {index}: {etags:?}");
}

/// Whether or not anybody has read lately, which is what decides if a version is published for every batch.
#[test]
fn a_stale_read_sees_what_its_node_has_answered() {
    let cluster = Cluster::start(1, FAST);
    let mut client = cluster.client(1);
    for round in 0..3 {
        for number in 0..20 {
            let value = format!("{round}-{number}");
            assert_eq!(client.put("/key", value.as_bytes()).status, 204);
            assert_eq!(client.get("/key?consistency=stale").text(), value);
        }
        for number in 0..20 {
            assert_eq!(client.put(&format!("/other-{number}"), b"x").status, 204);
        }
        // Until nobody has read for so long that only numbers are published.
        std::thread::sleep(raftexample::publication::DEMAND_INTERVAL);
    }
}
