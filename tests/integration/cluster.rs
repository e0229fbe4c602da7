use std::time::{Duration, Instant};

use crate::client::{Client, Response};
use crate::load::{CLOSED_UNDER_A_REQUEST_MAX, Load};
use crate::support::{Cluster, FAST, wait_for};

/// The default election timeout, in tests that measure with the default timing.
const ELECTION_TIMEOUT: Duration = Duration::from_secs(1);

/// Eight writers keep all three nodes busy and leave the machine some air.
const WRITERS: usize = 8;

#[track_caller]
fn assert_value(client: &mut Client, target: &str, value: &[u8]) {
    let response = client.get(target);
    assert_eq!((response.status, response.text().as_str()), (200, &*String::from_utf8_lossy(value)), "{target}");
    assert_eq!(response.body, value, "{target}");
}

#[test]
fn every_node_takes_every_request() {
    let cluster = Cluster::start(3, FAST);
    for writer in cluster.ids() {
        let key = format!("/key-{writer}");
        let put = cluster.client(writer).put(&key, b"first");
        assert_eq!((put.status, put.body.as_slice()), (204, &b""[..]));
        let etag = put.header("etag").expect("a success has an ETag").to_owned();
        assert!(etag.starts_with('"') && etag.ends_with('"'), "{etag}");
        for reader in cluster.ids() {
            let mut client = cluster.client(reader);
            let get = client.get(&key);
            assert_eq!((get.status, get.text().as_str()), (200, "first"), "written by {writer}, read on {reader}");
            assert_eq!(get.header("etag"), Some(etag.as_str()));
            assert_eq!(get.header("content-type"), Some("application/octet-stream"));
            assert!(get.header("raftexample-index").is_some_and(|index| index.parse::<u64>().is_ok()));
            let head = client.must("HEAD", &key, b"");
            assert_eq!((head.status, head.body.len()), (200, 0));
            assert_eq!((head.header("etag"), head.header("content-length")), (Some(etag.as_str()), Some("5")));
        }
        let mut deleter = cluster.client(writer % 3 + 1);
        assert_eq!(deleter.must("DELETE", &key, b"").status, 204);
        assert_eq!(deleter.must("DELETE", &key, b"").status, 404);
        for reader in cluster.ids() {
            let get = cluster.client(reader).get(&key);
            assert_eq!(get.status, 404, "deleted, and still on node {reader}");
            assert_eq!(get.header("content-type"), Some("application/problem+json"));
            assert_eq!(cluster.client(reader).must("HEAD", &key, b"").status, 404);
        }
    }
}

#[test]
fn keys_and_values_are_any_bytes() {
    let cluster = Cluster::start(3, FAST);
    let all_bytes: Vec<u8> = (0..=255).collect();
    let all_escaped: String = all_bytes.iter().map(|byte| format!("%{byte:02X}")).collect();
    let not_utf8: &[u8] = b"\xff\xfea\x00\r\n\r\n";
    let large = vec![0xa5; 1 << 20];
    let pairs: [(&str, &[u8]); 6] = [
        (&format!("/{all_escaped}"), &all_bytes),
        ("/%00", not_utf8),
        ("/a/../b//c/", b""),
        ("/a+b%20c", b"a plus is a plus"),
        ("/%2F", b"the key is one slash"),
        ("/large", &large),
    ];
    let mut writer = cluster.client(1);
    for (target, value) in pairs {
        assert_eq!(writer.put(target, value).status, 204, "{target}");
    }
    for reader in cluster.ids() {
        let mut client = cluster.client(reader);
        for (target, value) in pairs {
            assert_value(&mut client, target, value);
        }
        assert_value(&mut client, "/%61+b%20c", b"a plus is a plus");
        assert_eq!(client.get("/a%20b%20c").status, 404, "a plus is no space");
        assert_eq!(client.get("/b/c/").status, 404, "dots and slashes are part of the key");
    }
}

#[test]
fn status_is_the_same_story_on_all_nodes() {
    let cluster = Cluster::start(3, FAST);
    cluster.client(2).put("/key", b"value");
    let leader = cluster.leader();
    for id in cluster.ids() {
        cluster.wait_caught_up(id);
        let status = cluster.status(id).expect("it answers");
        assert_eq!(status["id"], id);
        assert_eq!(status["leader"], leader);
        assert_eq!(status["role"], if id == leader { "leader" } else { "follower" });
        assert_eq!(status["keys"], 1);
        assert_eq!(status["members"].as_array().map(Vec::len), Some(3));
        assert_eq!(status["version"], env!("CARGO_PKG_VERSION"));
        for name in
            ["term", "commit_index", "applied_index", "first_index", "last_index", "snapshot_index", "uptime_ms"]
        {
            assert!(status[name].is_u64(), "{name} in {status}");
        }
        assert_eq!(cluster.client(id).get("/_/livez").status, 200);
    }
}

#[test]
fn a_killed_leader_costs_clients_one_election() {
    let mut cluster = Cluster::start(3, &[]);
    let leader = cluster.leader();
    let load = Load::start(&cluster, WRITERS);
    load.wait_for_writes(200);
    cluster.kill(leader);
    load.wait_for_writes(200);
    let written = load.stop();
    // The requests that the leader itself had taken are lost with it; the others are answered by the next leader.
    assert_eq!(written.other_than_success(), 0, "{:?}", written.statuses);
    assert!(written.lost <= WRITERS, "each writer's connection can break once");
    let gap = written.longest_gap();
    assert!(gap < ELECTION_TIMEOUT * 5 / 2, "no write succeeded for {gap:?}");
    cluster.restart(leader);
    cluster.wait_caught_up(leader);
    written.verify(&cluster);
}

#[test]
fn a_killed_follower_costs_clients_nothing() {
    let mut cluster = Cluster::start(3, &[]);
    let leader = cluster.leader();
    let follower = cluster.others(leader)[0];
    let load = Load::start(&cluster, WRITERS);
    load.wait_for_writes(200);
    cluster.kill(follower);
    load.wait_for_writes(500);
    cluster.spawn(follower);
    load.wait_for_writes(500);
    cluster.wait_ready(follower);
    let written = load.stop();
    assert_eq!(cluster.leader(), leader, "the leader stays");
    assert_eq!(written.other_than_success(), 0, "{:?}", written.statuses);
    let gap = written.longest_gap();
    assert!(gap < ELECTION_TIMEOUT, "no write succeeded for {gap:?}");
    cluster.wait_caught_up(follower);
    written.verify(&cluster);
}

#[test]
fn a_leader_that_ends_orderly_hands_over() {
    let mut cluster = Cluster::start(3, &[]);
    let load = Load::start(&cluster, WRITERS);
    for _ in 0..3 {
        load.wait_for_writes(100);
        let leader = cluster.leader();
        assert_eq!(cluster.terminate(leader).code(), Some(0));
        cluster.restart(leader);
        cluster.wait_caught_up(leader);
    }
    let written = load.stop();
    assert_eq!(written.statuses.get(&504), None, "{:?}", written.statuses);
    assert!(written.lost <= 3 * CLOSED_UNDER_A_REQUEST_MAX, "{} requests were cut off", written.lost);
    let gap = written.longest_gap();
    assert!(gap < ELECTION_TIMEOUT, "no write succeeded for {gap:?}");
    written.verify(&cluster);
}

#[test]
fn a_paused_leader_is_replaced_and_reads_nothing_stale() {
    let cluster = Cluster::start(3, &[]);
    let old_leader = cluster.leader();
    let others = cluster.others(old_leader);
    assert_eq!(cluster.client(old_leader).put("/key", b"0").status, 204);

    // Connected before the pause, so that nothing but the read itself is left to do after it.
    let mut readers: Vec<Client> = (0..4).map(|_| cluster.client(old_leader)).collect();
    for reader in &mut readers {
        assert_value(reader, "/key", b"0");
    }
    cluster.pause(old_leader);
    let pause = Instant::now();
    let mut last = 0;
    while pause.elapsed() < ELECTION_TIMEOUT * 3 {
        last += 1;
        let value = last.to_string();
        let (writer, reader) = (others[last % 2], others[(last + 1) % 2]);
        let put = cluster.client(writer).put("/key", value.as_bytes());
        assert_eq!(put.status, 204, "{}", put.text());
        assert_value(&mut cluster.client(reader), "/key", value.as_bytes());
    }
    // These lie in the paused process's sockets when it wakes, and still believes that it leads.
    for reader in &mut readers {
        reader.send("GET", "/key", &[], b"").unwrap();
    }
    cluster.resume(old_leader);
    for reader in &mut readers {
        let response = reader.receive("GET").unwrap_or_else(|failure| panic!("{failure}"));
        assert_current(&response, &last.to_string());
    }
    cluster.wait_ready(old_leader);
    assert_value(&mut readers[0], "/key", last.to_string().as_bytes());
    let leader = cluster.leader();
    assert_ne!(leader, old_leader, "one that comes back disturbs nobody");
}

/// A read that cannot be confirmed is refused; what it must not be is old.
#[track_caller]
fn assert_current(response: &Response, value: &str) {
    match response.status {
        200 => assert_eq!(response.text(), value, "stale"),
        503 => assert!(response.header("retry-after").is_some()),
        other => panic!("{other} {}", response.text()),
    }
}

#[test]
fn without_a_majority_answers_are_quick_and_honest() {
    let request_timeout = Duration::from_secs(2);
    let mut flags = FAST.to_vec();
    flags.extend(["--request-timeout", "2s"]);
    let mut cluster = Cluster::start(3, &flags);
    let leader = cluster.leader();
    let mut client = cluster.client(leader);
    assert_eq!(client.put("/before", b"value").status, 204);
    for other in cluster.others(leader) {
        cluster.kill(other);
    }

    // The leader has not noticed yet and appends it: nobody can say what becomes of it.
    let handed_over = timed(request_timeout, || client.put("/handed-over", b"value"));
    assert_eq!((handed_over.status, handed_over.outcome().as_str()), (504, "unknown"), "{}", handed_over.text());

    // It has stepped down now, and nothing reaches Raft any more.
    wait_for("a leader that steps down", || {
        cluster.status(leader).and_then(|status| (status["leader"] == 0).then_some(()))
    });
    let refused = timed(request_timeout, || client.put("/refused", b"value"));
    assert_eq!((refused.status, refused.outcome().as_str()), (503, "not-applied"), "{}", refused.text());
    assert!(refused.header("retry-after").is_some());
    assert_eq!(refused.header("content-type"), Some("application/problem+json"));
    let read = timed(request_timeout, || client.get("/before"));
    assert_eq!(read.status, 503, "{}", read.text());
    assert!(read.header("retry-after").is_some());
    let stale = timed(request_timeout, || client.get("/before?consistency=stale"));
    assert_eq!((stale.status, stale.text().as_str()), (200, "value"));
    assert_eq!(client.get("/_/readyz").status, 503);
    assert_eq!(client.get("/_/livez").status, 200, "waiting for others is no reason to be restarted");

    for other in cluster.others(leader) {
        cluster.restart(other);
    }
    let mut client = cluster.client(leader);
    assert_value(&mut client, "/before", b"value");
    assert_eq!(client.get("/refused").status, 404, "not-applied means never");
    assert!(matches!(client.get("/handed-over").status, 200 | 404));
}

/// Asserts that an answer comes within the request timeout, and a second for a busy machine.
#[track_caller]
fn timed(request_timeout: Duration, request: impl FnOnce() -> Response) -> Response {
    let start = Instant::now();
    let response = request();
    let took = start.elapsed();
    assert!(took < request_timeout + Duration::from_secs(1), "answered after {took:?}");
    response
}

#[test]
fn a_write_during_an_election_waits_for_the_next_leader() {
    let mut cluster = Cluster::start(3, &[]);
    let leader = cluster.leader();
    let survivor = cluster.others(leader)[0];
    let mut client = cluster.client(survivor);
    assert_eq!(client.put("/key", b"before").status, 204);
    cluster.kill(leader);
    assert_eq!(client.put("/key", b"after").status, 204, "sent to a node whose leader has just died");
    assert_value(&mut client, "/key", b"after");
}
