use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use crate::caller::{Caller, take, together};
use crate::client::Client;
use crate::support::{Cluster, FAST, wait_for};

/// Writes that the watcher has to see.
const WATCHED_WRITES: usize = 10_000;

/// Clients that the issue of waiting is about: each holds a connection, and costs nobody anything.
const IDLE_WAITERS: usize = 1000;

/// As many as may wait on one node.
const WAITERS_MAX: usize = 2048;

/// A change as its writer and its watcher know it: its index and its key.
type Change = (u64, String);

#[test]
fn a_watcher_sees_every_write_once_and_in_order() {
    const WRITERS: usize = 16;
    let mut cluster = Cluster::start(3, FAST);
    let leader = cluster.leader();
    let mut writers = Caller::several(&cluster, "writer", WRITERS);
    // It begins at the node that dies, so it has to go elsewhere.
    let mut watcher = Caller::new(&cluster, "watcher", leader as usize - 1);
    let (left, done) = (AtomicUsize::new(WATCHED_WRITES), AtomicUsize::new(0));
    let write = |number: usize, writer: &mut Caller| {
        let mut written = Vec::new();
        while take(&left) {
            written.push(put(writer, format!("watched/{number}/{}", written.len() % 50)));
            done.fetch_add(1, Ordering::Relaxed);
        }
        written
    };
    let (mut written, seen) = thread::scope(|scope| {
        let watching = scope.spawn(|| watch(&mut watcher));
        let written = together(&mut writers, write, || {
            wait_for("a third of the writes", || (done.load(Ordering::Relaxed) >= WATCHED_WRITES / 3).then_some(()));
            cluster.kill(leader);
        });
        let mut written: Vec<Change> = written.into_iter().flatten().collect();
        written.push(put(&mut writers[0], LAST_KEY.to_owned()));
        (written, watching.join().expect("the watcher panicked"))
    });
    assert!(watcher.repeats > 0, "the watcher never had to go elsewhere");
    written.sort();
    assert_eq!(written.len(), WATCHED_WRITES + 1);
    if let Some(at) = (0..written.len().max(seen.len())).find(|at| written.get(*at) != seen.get(*at)) {
        panic!("change {at} is {:?}, and was seen as {:?}", written.get(at), seen.get(at));
    }
}

/// The key whose change ends the watch.
const LAST_KEY: &str = "watched/last";

fn put(writer: &mut Caller, key: String) -> Change {
    let answer = writer.write("PUT", &format!("/{key}"), None, b"value");
    assert_eq!(answer.status, 204, "{}", answer.text());
    let etag = answer.header("etag").expect("a success has an ETag");
    (etag.trim_matches('"').parse().unwrap(), key)
}

/// Follows the changes from the beginning until the last key's.
fn watch(watcher: &mut Caller) -> Vec<Change> {
    let (mut seen, mut index) = (Vec::new(), 0);
    while seen.last().is_none_or(|(_, key)| key != LAST_KEY) {
        let answer = watcher.read(&format!("/?prefix=watched/&after-index={index}&timeout=2s"));
        assert_eq!(answer.status, 200, "{}", answer.text());
        let page = answer.json();
        for change in page["changes"].as_array().expect("a list") {
            assert_eq!(change["op"], "put");
            seen.push((change["index"].as_u64().unwrap(), change["key"].as_str().unwrap().to_owned()));
        }
        index = page["index"].as_u64().expect("an index");
    }
    seen
}

#[test]
fn an_index_from_the_future_is_waited_for() {
    let cluster = Cluster::start(1, FAST);
    let mut client = cluster.client(1);
    let put = client.put("/k", b"1");
    let etag = put.header("etag").unwrap();
    let future = etag.trim_matches('"').parse::<u64>().unwrap() + 2;
    let page = client.get(&format!("/?after-index={future}&timeout=0s")).json();
    assert_eq!(page, serde_json::json!({"index": future, "changes": []}));
    let answer = client.get(&format!("/k?after-index={future}&timeout=0s"));
    assert_eq!((answer.status, answer.header("etag")), (304, Some(etag)));
    let mut waiting = [cluster.client(1), cluster.client(1)];
    waiting[0].send("GET", &format!("/?after-index={future}&timeout=1m"), &[], b"").unwrap();
    waiting[1].send("GET", &format!("/k?after-index={future}&timeout=1m"), &[], b"").unwrap();
    let mut last = String::new();
    // Two changes up to that index are none after it.
    for value in ["2", "3", "4"] {
        last = client.put("/k", value.as_bytes()).header("etag").unwrap().to_owned();
    }
    let page = waiting[0].receive("GET").unwrap().json();
    let index = future + 1;
    assert_eq!(page["changes"], serde_json::json!([{"index": index, "op": "put", "key": "k"}]));
    let answer = waiting[1].receive("GET").unwrap();
    assert_eq!((answer.status, answer.text().as_str(), answer.header("etag")), (200, "4", Some(&*last)));
}

#[test]
fn a_thousand_who_wait_cost_writers_nothing() {
    let mut cluster = Cluster::start(3, FAST);
    let leader = cluster.leader();
    let before = put_latency(&cluster, leader);
    let waiters: Vec<_> = (0..IDLE_WAITERS).map(|number| idle_waiter(&cluster, leader, number)).collect();
    let during = put_latency(&cluster, leader);
    let mut more: Vec<_> = (IDLE_WAITERS..WAITERS_MAX).map(|number| idle_waiter(&cluster, leader, number)).collect();
    let refused = wait_for("a node whose places for waiting are all taken", || {
        let answer = cluster.client(leader).get("/idle?after-index=1000000&timeout=0s");
        if answer.status == 503 && answer.text().contains("wait") {
            return Some(answer);
        }
        // They may still be on their way, and this request may have taken the place of the last one.
        more.push(idle_waiter(&cluster, leader, more.len()));
        None
    });
    assert!(refused.header("retry-after").is_some());
    drop((waiters, more));
    wait_for("a node that forgets who has gone", || {
        let answer = cluster.client(leader).get("/idle?after-index=1000000&timeout=0s");
        (answer.status == 304).then_some(())
    });
    let after = put_latency(&cluster, leader);
    println!("median PUT: {before:?} before, {during:?} with {IDLE_WAITERS} who wait, {after:?} after");
    // Twice, and a millisecond, is for the noise of a machine that does other things too: looking at each waiter for
    // each write, or a thread of each that wakes, costs far more.
    assert!(during < before.max(after) * 2 + Duration::from_millis(1), "{during:?}, not {before:?} to {after:?}");

    // Those who wait when the node ends are told so, and do not hold it up.
    let mut waiters: Vec<_> = (0..20).map(|number| idle_waiter(&cluster, leader, number)).collect();
    let asked = Instant::now();
    assert_eq!(cluster.terminate(leader).code(), Some(0));
    assert!(asked.elapsed() < Duration::from_secs(5), "it took {:?}", asked.elapsed());
    for waiter in &mut waiters {
        let answer = waiter.receive("GET").unwrap_or_else(|failure| panic!("{failure}"));
        assert_eq!(answer.status, 503, "{}", answer.text());
    }
}

/// A client whose request waits for what does not happen: half of them for a key, half for a prefix.
fn idle_waiter(cluster: &Cluster, id: u64, number: usize) -> Client {
    let target = match number % 2 {
        0 => format!("/idle/{number}?after-index=1000000&timeout=5m"),
        _ => format!("/?prefix=idle/{number}/&after-index=1000000&timeout=5m"),
    };
    let mut client = cluster.client(id);
    client.send("GET", &target, &[], b"").unwrap_or_else(|failure| panic!("waiter {number}: {failure}"));
    client
}

/// The median time of a write.
fn put_latency(cluster: &Cluster, id: u64) -> Duration {
    let mut client = cluster.client(id);
    let mut times: Vec<_> = (0..300)
        .map(|_| {
            let start = Instant::now();
            assert_eq!(client.put("/busy", b"value").status, 204);
            start.elapsed()
        })
        .collect();
    times.sort();
    times[times.len() / 2]
}
