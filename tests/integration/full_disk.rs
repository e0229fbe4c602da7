use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use crate::small_disk::SmallDisk;
use crate::support::{Cluster, FAST, wait_for};

/// A cluster of one on a small disk.
fn on_a_small_disk(flags: &[&str]) -> Option<(SmallDisk, Cluster)> {
    let mut cluster = Cluster::start(1, &[FAST, flags].concat());
    cluster.kill(1);
    let disk = SmallDisk::mount(cluster.data_dir(1))?;
    cluster.restart(1);
    Some((disk, cluster))
}

#[test]
fn below_the_reserve_puts_are_refused_and_all_else_goes_on() {
    let Some((disk, cluster)) = on_a_small_disk(&[]) else { return };
    let mut client = cluster.client(1);
    for key in ["/one", "/two"] {
        assert_eq!(client.put(key, b"value").status, 204);
    }
    disk.fill_but(raftexample::driver::FREE_BYTES_RESERVE - (1 << 20));
    let refused = wait_for("a refusal", || {
        let put = client.put("/one", b"new");
        (put.status != 204).then_some(put)
    });
    assert_eq!((refused.status, refused.outcome().as_str()), (507, "not-applied"));
    assert!(refused.text().contains("bytes left"), "{}", refused.text());
    assert_eq!(client.must("DELETE", "/two", b"").status, 204);
    assert_eq!(client.get("/one").status, 200);
    assert_eq!(client.get("/two").status, 404);
    disk.free();
    wait_for("a PUT that is taken again", || (client.put("/one", b"newer").status == 204).then_some(()));
    assert_eq!(client.get("/one").text(), "newer");
}

#[test]
fn a_snapshot_that_finds_no_room_is_written_later() {
    let Some((disk, cluster)) = on_a_small_disk(&["--snapshot-count", "1000000"]) else { return };
    let mut client = cluster.client(1);
    for number in 0..20 {
        assert_eq!(client.put(&format!("/{number}"), &vec![number; 1 << 20]).status, 204);
    }
    let before = cluster.status_number(1, "snapshot_index");
    // Room for half of it; and then so much that the disk is full when it is nearly written.
    for left in [10 << 20, 20_100 << 10] {
        disk.fill_but(left);
        let refused = client.must("POST", "/_/snapshot", b"");
        assert_eq!(refused.status, 507, "{}", refused.text());
        assert_eq!(client.get("/7").body, vec![7; 1 << 20]);
        disk.free();
    }
    assert!(cluster.log(1).contains("the node goes on and tries again"), "it says so");
    // By itself, and without any further write.
    wait_for("a snapshot", || (cluster.status_number(1, "snapshot_index") > before).then_some(()));
}

#[test]
fn a_disk_that_is_full_all_the_same_ends_the_node_and_loses_nothing() {
    let Some((disk, mut cluster)) = on_a_small_disk(&["--max-key-bytes", "65536"]) else { return };
    for number in 0..50 {
        assert_eq!(cluster.client(1).put(&format!("/{number}"), &vec![number; 1000]).status, 204);
    }
    disk.fill_but(0);
    // Deletions are taken to the end: here as much of them as fills the log's segment.
    let ended = AtomicBool::new(false);
    thread::scope(|scope| {
        for writer in 0..4 {
            let (mut client, ended) = (cluster.client(1), &ended);
            scope.spawn(move || {
                let key = format!("/{writer}{}", "k".repeat(60_000));
                while !ended.load(Ordering::Relaxed) {
                    match client.request("DELETE", &key, &[], b"") {
                        Ok(answer) => assert!([404, 503, 504].contains(&answer.status), "{}", answer.text()),
                        Err(_) => ended.store(true, Ordering::Relaxed),
                    }
                }
            });
        }
    });
    assert_eq!(cluster.wait_end(1).code(), Some(1));
    let log = cluster.log(1);
    let words = log.lines().last().unwrap_or_default();
    assert!(words.contains("free some space and start the node again"), "{words}");
    // Still full: it says so again.
    cluster.spawn(1);
    assert_eq!(cluster.wait_end(1).code(), Some(1));
    let log = cluster.log(1);
    let words = log.lines().last().unwrap_or_default();
    assert!(words.contains("free some space and start the node again"), "{words}");
    disk.free();
    cluster.restart(1);
    for number in 0..50 {
        assert_eq!(cluster.client(1).get(&format!("/{number}")).body, vec![number; 1000]);
    }
    assert_eq!(cluster.client(1).put("/more", b"value").status, 204);
}
