use std::io::Write;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use crate::client::Client;
use crate::corpus::{SMUGGLED_KEY, cases};
use crate::exposition::Exposition;
use crate::support::{Cluster, FAST, wait_for};
use crate::usage::{allow_descriptors, dawdle, leaves_nothing_behind};
use crate::wire::{Answer, Wire};

/// Of a node, as the README says.
const CONNECTIONS_MAX: usize = 4096;

/// What a second round of the same may leave of memory: other connections are in threads, and those in other arenas.
const GROWN_BYTES_MAX: usize = 24 << 20;

#[test]
fn every_case_gets_its_status_and_nothing_else() {
    let cluster = Cluster::start(1, FAST);
    let mut wrong = Vec::new();
    for case in cases() {
        let mut wire = Wire::connect(cluster.address(1));
        wire.send(&case.bytes);
        let mut answers: Vec<Answer> = wire.answer().into_iter().collect();
        // Where the request ends in doubt the node closes; else its client does.
        if answers.iter().all(|answer| !answer.closes) {
            wire.half_close();
        }
        answers.extend(wire.answers());
        let is_right = matches!(&answers[..], [only] if only.status == case.status);
        if !is_right {
            let got: Vec<_> =
                answers.iter().map(|answer| (answer.status, answer.body.escape_ascii().to_string())).collect();
            wrong.push(format!("{}: {} expected, got {got:?}", case.name, case.status));
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
    assert_eq!(cluster.client(1).get(SMUGGLED_KEY).status, 404);
}

#[test]
fn nothing_that_hostile_clients_do_stays_behind() {
    // Those of this test, and the node inherits the limit.
    let is_crowd = allow_descriptors(2 * CONNECTIONS_MAX as u64);
    if !is_crowd {
        println!(
            "SKIPPED: the crowd of connections, because this process may not open {} descriptors",
            2 * CONNECTIONS_MAX
        );
    }
    let cluster = Cluster::start(1, FAST);
    let node = cluster.address(1);
    assert_eq!(cluster.client(1).put("/large", &vec![7; 1 << 20]).status, 204);
    leaves_nothing_behind(&[cluster.process_id(1)], GROWN_BYTES_MAX, |_| {
        let done = AtomicBool::new(false);
        thread::scope(|scope| {
            let fresh = scope.spawn(|| fresh_clients(node, &done));
            let slow = scope.spawn(|| slow_clients(node));
            broken_off(node);
            random_bytes(node);
            pipelining(node);
            let greedy = never_reading(node);
            slow.join().unwrap();
            drop(greedy);
            done.store(true, Ordering::Relaxed);
            assert!(fresh.join().unwrap() > 0);
        });
        if is_crowd {
            crowd(node);
        }
    });
    assert_eq!(cluster.client(1).get(SMUGGLED_KEY).status, 404);
    assert_eq!(cluster.client(1).get("/_/livez").status, 200);
}

/// Comes anew for each request, and is served each time.
fn fresh_clients(node: SocketAddr, done: &AtomicBool) -> usize {
    let mut served = 0;
    while !done.load(Ordering::Relaxed) {
        let value = served.to_string();
        assert_eq!(Client::new(node).put("/fresh", value.as_bytes()).status, 204);
        assert_eq!(Client::new(node).get("/fresh").text(), value);
        served += 1;
        dawdle(Duration::from_millis(10));
    }
    served
}

/// Some that never come to an end, and some that are slow and no worse.
fn slow_clients(node: SocketAddr) {
    let endless = |begin: &str| {
        let mut wire = Wire::connect(node);
        wire.send(begin);
        wire
    };
    let mut heads: Vec<Wire> = (0..20)
        .map(|number| endless(["G", "GET / HTTP/1.1\r\n", "GET / HTTP/1.1\r\nHost: x\r\nX: "][number % 3]))
        .collect();
    let length = "PUT /slow HTTP/1.1\r\nHost: x\r\nContent-Length: 8\r\n\r\n";
    let chunks = "PUT /slow HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n";
    let mut bodies = [(endless(length), "slowbody"), (endless(chunks), "1\r\nx\r\n0\r\n\r\n")];
    let mut at = 0;
    while heads.iter().any(|wire| !wire.is_answered()) {
        dawdle(Duration::from_millis(250));
        for wire in heads.iter_mut().filter(|wire| !wire.is_answered()) {
            wire.send("x");
        }
        for (wire, body) in &mut bodies {
            wire.send(body.get(at..=at).unwrap_or_default());
        }
        at += 1;
    }
    for (wire, _) in &mut bodies {
        assert_eq!(wire.answer().map(|answer| answer.status), Some(204), "slow, and in time");
    }
    for wire in &mut heads {
        let statuses: Vec<_> = wire.answers().iter().map(|answer| answer.status).collect();
        assert_eq!(statuses, [408]);
    }
}

/// Ends requests of every kind in every phase, with a reset and in order.
fn broken_off(node: SocketAddr) {
    let requests = [
        "PUT /broken HTTP/1.1\r\nHost: x\r\nContent-Length: 10\r\n\r\n0123456789".to_owned(),
        "PUT /broken HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n".to_owned(),
        "PUT /broken HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\nContent-Length: 5\r\n\r\nhello".to_owned(),
        format!("PUT /broken HTTP/1.1\r\nHost: x\r\nContent-Length: 500000\r\n\r\n{}", "x".repeat(500_000)),
        "GET /large HTTP/1.1\r\nHost: x\r\n\r\n".to_owned(),
        "GET /?values=true HTTP/1.1\r\nHost: x\r\n\r\n".to_owned(),
        "GET /broken?after-index=99999999&timeout=60s HTTP/1.1\r\nHost: x\r\n\r\n".to_owned(),
    ];
    for request in requests {
        let head = request.find("\r\n\r\n").unwrap() + 4;
        let cuts = [0, 1, 4, 20, head - 3, head - 1, head, head + 1, (head + request.len()) / 2, request.len() - 1];
        for cut in cuts.into_iter().chain([request.len()]).filter(|cut| *cut <= request.len()) {
            let part = &request[..cut];
            let mut wire = Wire::connect(node);
            wire.send(part);
            wire.reset();
            // Reset when the node is at it, or has answered.
            let mut wire = Wire::connect(node);
            wire.send(part);
            dawdle(Duration::from_millis(1));
            wire.reset();
            let waits = request.contains("after-index");
            let mut wire = Wire::connect(node);
            wire.send(part);
            wire.half_close();
            if waits && cut == request.len() {
                // It waits for a change; that its client is gone it finds out by itself.
                continue;
            }
            let statuses: Vec<_> = wire.answers().iter().map(|answer| answer.status).collect();
            let is_whole = cut == request.len();
            match &statuses[..] {
                [] | [400 | 408] | [100, 400] if !is_whole => {}
                [200 | 204] | [100, 204] if is_whole => {}
                _ => panic!("{statuses:?} after {cut} bytes of {}", &request[..head]),
            }
        }
    }
}

fn random_bytes(node: SocketAddr) {
    // A fixed seed: any sequence will do, but the same each time.
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut random = move || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state
    };
    let beginnings: [&[u8]; 4] = [
        b"",
        b"GET /",
        b"PUT /r HTTP/1.1\r\nHost: x\r\n",
        b"PUT /r HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n",
    ];
    for number in 0..400 {
        let mut bytes = beginnings[number % 4].to_vec();
        bytes.extend((0..random() % 2000).map(|_| random().to_le_bytes()[3]));
        let mut wire = Wire::connect(node);
        wire.send(&bytes);
        wire.half_close();
        let statuses: Vec<_> = wire.answers().iter().map(|answer| answer.status).collect();
        assert!(
            statuses.iter().all(|status| (400..=505).contains(status)),
            "{statuses:?} for {}",
            bytes.escape_ascii()
        );
    }
}

/// Sends thousands of requests before it reads an answer.
fn pipelining(node: SocketAddr) {
    const REQUESTS: usize = 5000;
    let mut wire = Wire::connect(node);
    let mut sending = wire.writer();
    thread::scope(|scope| {
        scope.spawn(move || {
            let get = "GET /missing?consistency=stale HTTP/1.1\r\nHost: x\r\n\r\n";
            let put = "PUT /pipelined HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\n\r\n1";
            sending.write_all([get, get, get, get, put].concat().repeat(REQUESTS / 5).as_bytes()).unwrap();
        });
        for number in 0..REQUESTS {
            let status = if number % 5 == 4 { 204 } else { 404 };
            assert_eq!(wire.answer().map(|answer| answer.status), Some(status), "request {number}");
        }
    });
}

/// Clients that ask for far more than any socket holds, and read nothing of it.
fn never_reading(node: SocketAddr) -> Vec<Wire> {
    let requests = "GET /large HTTP/1.1\r\nHost: x\r\n\r\n".repeat(2000);
    (0..16)
        .map(|_| {
            let mut wire = Wire::connect(node);
            wire.stuff(requests.as_bytes());
            wait_for("a beginning of the answer", || wire.is_answered().then_some(()));
            wire
        })
        .collect()
}

/// As many connections as the node takes, and more; all of them idle.
fn crowd(node: SocketAddr) {
    let mut watcher = Client::new(node);
    let mut connections = |name: &str| {
        let metrics = Exposition::parse(&watcher.get("/_/metrics").text()).unwrap();
        metrics.value(&format!("raftexample_http_connections{name}"), &[("port", "client")]) as usize
    };
    let refused_before = connections("_refused_total");
    assert_eq!(connections("_max"), CONNECTIONS_MAX);
    let mut crowd: Vec<Wire> = Vec::new();
    while connections("") < CONNECTIONS_MAX {
        let missing = CONNECTIONS_MAX - connections("");
        crowd.extend((0..missing).map(|_| Wire::connect(node)));
    }
    // No more than there is room for.
    let refused = connections("_refused_total");
    for _ in 0..100 {
        let answers = Wire::connect(node).answers();
        let statuses: Vec<_> = answers.iter().map(|answer| (answer.status, answer.closes)).collect();
        assert_eq!(statuses, [(503, true)]);
    }
    assert_eq!(connections("_refused_total"), refused + 100);
    // Those inside are served all the same.
    for wire in crowd.iter_mut().step_by(64) {
        wire.send("GET /fresh?consistency=stale HTTP/1.1\r\nHost: x\r\n\r\n");
        assert_eq!(wire.answer().map(|answer| answer.status), Some(200));
    }
    crowd.truncate(CONNECTIONS_MAX / 2);
    wait_for("room", || (connections("") < CONNECTIONS_MAX).then_some(()));
    assert_eq!(Client::new(node).put("/fresh", b"again").status, 204);
    assert!(refused >= refused_before);
}
