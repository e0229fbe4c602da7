use crate::load::{CLOSED_UNDER_A_REQUEST_MAX, Load};
use crate::support::{Cluster, FAST, wait_for};

/// Rounds of the kill -9 test; set the variable for a long run.
const KILL_ROUNDS_VARIABLE: &str = "RAFTEXAMPLE_KILL_ROUNDS";
const KILL_ROUNDS: usize = 3;

const WRITERS: usize = 8;

#[test]
fn all_killed_at_once_under_load_lose_nothing() {
    let rounds = std::env::var(KILL_ROUNDS_VARIABLE).ok().map_or(KILL_ROUNDS, |rounds| {
        rounds.parse().unwrap_or_else(|_| panic!("{KILL_ROUNDS_VARIABLE}={rounds} is no number"))
    });
    let mut cluster = Cluster::start(3, FAST);
    let mut last = None;
    for round in 1..=rounds {
        println!("round {round} of {rounds}");
        let load = Load::start(&cluster, WRITERS);
        load.wait_for_writes(200 + 37 * round % 100);
        cluster.kill_all();
        let written = load.stop();
        cluster.restart_all();
        written.verify(&cluster);
        // The next round writes the same keys.
        last = Some(written);
    }
    // What a killed node left behind must do for a second start too.
    cluster.kill_all();
    cluster.restart_all();
    last.expect("at least one round").verify(&cluster);
}

#[test]
fn a_node_that_missed_a_thousand_writes_catches_up() {
    let mut cluster = Cluster::start(3, FAST);
    let leader = cluster.leader();
    let follower = cluster.others(leader)[0];
    cluster.kill(follower);
    let mut client = cluster.client(leader);
    for number in 0..1000 {
        let put = client.put(&format!("/missed/{number}"), format!("value {number}").as_bytes());
        assert_eq!(put.status, 204, "{}", put.text());
    }
    cluster.restart(follower);
    cluster.wait_caught_up(follower);
    // Its own state, without asking anyone.
    let mut client = cluster.client(follower);
    for number in 0..1000 {
        let get = client.get(&format!("/missed/{number}?consistency=stale"));
        assert_eq!((get.status, get.text()), (200, format!("value {number}")));
    }
    assert_eq!(client.put("/own", b"value").status, 204);
}

#[test]
fn a_single_node_comes_back() {
    let mut cluster = Cluster::start(1, FAST);
    let mut etags = Vec::new();
    for number in 0..100 {
        let put = cluster.client(1).put(&format!("/key/{number}"), &[number; 1000]);
        assert_eq!(put.status, 204);
        etags.push(put.header("etag").expect("a success has an ETag").to_owned());
    }
    assert_eq!(cluster.client(1).must("DELETE", "/key/0", b"").status, 204);
    for orderly in [false, true, false] {
        if orderly {
            assert_eq!(cluster.terminate(1).code(), Some(0));
        } else {
            cluster.kill(1);
        }
        cluster.restart(1);
        let mut client = cluster.client(1);
        assert_eq!(client.get("/key/0").status, 404);
        for number in 1..100 {
            let get = client.get(&format!("/key/{number}"));
            assert_eq!((get.status, &get.body), (200, &vec![number; 1000]));
            assert_eq!(get.header("etag"), Some(etags[usize::from(number)].as_str()), "a restart changes no ETag");
        }
    }
}

#[test]
fn sigterm_under_load_answers_what_is_in_flight() {
    let mut cluster = Cluster::start(3, FAST);
    let load = Load::start(&cluster, WRITERS);
    load.wait_for_writes(300);
    for id in cluster.ids() {
        cluster.ask_to_end(id);
    }
    for id in cluster.ids() {
        assert_eq!(cluster.wait_end(id).code(), Some(0), "node {id}");
    }
    let written = load.stop();
    assert!(written.lost <= 3 * CLOSED_UNDER_A_REQUEST_MAX, "{} requests were cut off", written.lost);
    cluster.restart_all();
    written.verify(&cluster);
}

#[test]
fn sigterm_directly_after_the_start_leaves_a_usable_directory() {
    // From its first word on, a node ends as it should: with nobody there to elect it, or to elect.
    let mut cluster = Cluster::launch(3, FAST);
    for id in cluster.ids() {
        assert_eq!(cluster.terminate(id).code(), Some(0), "node {id}");
    }
    for _ in 0..3 {
        for id in cluster.ids() {
            let logged = cluster.log(id).len();
            cluster.spawn(id);
            wait_for("the first word", || (cluster.log(id).len() > logged).then_some(()));
            assert_eq!(cluster.terminate(id).code(), Some(0), "node {id}");
        }
    }
    for id in cluster.ids() {
        cluster.spawn(id);
    }
    assert_eq!(cluster.client(cluster.leader()).put("/key", b"value").status, 204);
}
