//! Kills the program at every step of persistence and wherever work passes between threads, as
//! [`raftexample::fail_point`] names them, starts it again, and checks that nothing acknowledged is lost; and holds it
//! there for longer than an election takes. Needs the feature `failpoints`, which `make test` sets.

#![allow(clippy::unwrap_used, reason = "all of this is a test")]
#![allow(clippy::print_stdout, reason = "cargo shows it for a test that fails")]
#![allow(dead_code, reason = "other tests use the rest of what is shared with them")]

#[path = "../integration/client.rs"]
mod client;
/// Members of a running cluster that are held, or killed, at any step at any time.
mod held;
/// What is to be done at a node's fail-points while it runs.
mod orders;
/// One key that is read on all nodes while it is written.
mod register;
#[path = "../integration/load.rs"]
mod load;
#[path = "../integration/support.rs"]
mod support;

use std::collections::BTreeSet;
use std::os::unix::process::ExitStatusExt;

use raftexample::fail_point::FAIL_POINTS;

use crate::load::Load;
use crate::support::{Cluster, FAST, wait_for};

const WRITERS: usize = 4;

const SIGKILL: i32 = 9;

/// A snapshot every few entries, and nothing kept behind it.
const SNAPSHOTS: &[&str] = &["--snapshot-count", "5", "--snapshot-catchup-entries", "0"];

/// Reached at every start.
const AT_START: &[&str] = &["boot-before", "boot-after", "atomic-temporary-after", "atomic-rename-after"];

/// Reached only at the first start.
const AT_FOUNDING: &[&str] = &["identity-before", "identity-after", "founding-snapshot-after", "founding-log-after"];

/// Reached by a node that is sent a snapshot.
const AT_RECEIVER: &[&str] = &[
    "receive-before",
    "receive-piece",
    "receive-verified",
    "receive-in-place",
    "install-before",
    "install-after",
    "restore-before",
    "restore-after",
    "receive-report-before",
];

/// Reached only by a node that has peers.
const AT_PEERS: &[&str] = &["driver-send-before", "peer-write-before", "peer-deliver-before"];

fn is_of_disk(point: &str) -> bool {
    point.starts_with("disk-")
}

/// What is reached again and again while clients write.
fn under_load() -> Vec<&'static str> {
    let others: BTreeSet<&str> = [AT_START, AT_FOUNDING, AT_RECEIVER, AT_PEERS].concat().into_iter().collect();
    FAIL_POINTS.iter().copied().filter(|point| !others.contains(point)).collect()
}

/// Starts a node that is to be killed when it comes to `point` after having passed it `passes` times.
fn spawn_to_die(cluster: &mut Cluster, id: u64, point: &str, passes: usize) {
    let order = format!("{point}={passes}*off->return");
    cluster.spawn_with(id, &[("FAILPOINTS", &order)]);
}

#[track_caller]
fn assert_killed_at(cluster: &mut Cluster, id: u64, point: &str) {
    assert_eq!(cluster.wait_end(id).signal(), Some(SIGKILL), "node {id} should have been killed at {point}");
}

/// Orders snapshots until a node ends: under load it rests between those that it takes by itself.
fn order_snapshots_until_it_ends(cluster: &mut Cluster, id: u64) {
    let mut client = cluster.client(id);
    wait_for("the end of a node", || {
        // Refused while another is being written, and broken off at the end.
        let _ = client.request("POST", "/_/snapshot", &[], b"");
        cluster.has_ended(id).then_some(())
    });
}

#[test]
fn a_founding_cut_anywhere_is_made_again() {
    let mut points: Vec<&str> = [AT_FOUNDING, AT_START].concat();
    points.extend(FAIL_POINTS.iter().filter(|point| is_of_disk(point)));
    for point in points {
        // The n-th time, for as long as there is one before the node serves.
        for passes in 0.. {
            let mut cluster = Cluster::launch(1, &[FAST, SNAPSHOTS].concat());
            cluster.kill(1);
            std::fs::remove_dir_all(cluster.data_dir(1)).unwrap();
            spawn_to_die(&mut cluster, 1, point, passes);
            let mut client = cluster.client(1);
            let served = wait_for("a node that serves, or is killed", || {
                if cluster.has_ended(1) {
                    return Some(false);
                }
                client.request("GET", "/_/livez", &[], b"").is_ok().then_some(true)
            });
            if served {
                assert!(passes > 0 || point == "disk-remove-before" || point == "disk-remove-after", "{point}");
                break;
            }
            assert_killed_at(&mut cluster, 1, point);
            cluster.restart(1);
            assert_eq!(cluster.client(1).put("/key", b"value").status, 204, "{point} after {passes}");
            cluster.kill(1);
            cluster.restart(1);
            assert_eq!(cluster.client(1).get("/key").text(), "value", "{point} after {passes}");
        }
    }
}

#[test]
fn the_only_copy_survives_a_crash_at_every_step() {
    let mut cluster = Cluster::start(1, &[FAST, SNAPSHOTS].concat());
    for (number, point) in [under_load(), AT_START.to_vec()].concat().into_iter().enumerate() {
        println!("{point}");
        let load = Load::start_under(point, &cluster, WRITERS);
        load.wait_for_writes(20);
        cluster.kill(1);
        // What a start writes comes before the load.
        let passes = if AT_START.contains(&point) { 0 } else { 17 + number % 3 };
        spawn_to_die(&mut cluster, 1, point, passes);
        order_snapshots_until_it_ends(&mut cluster, 1);
        assert_killed_at(&mut cluster, 1, point);
        cluster.restart(1);
        load.wait_for_writes(20);
        load.stop().verify(&cluster);
    }
}

#[test]
fn the_removal_of_a_segment_may_be_cut_short() {
    // Before the segment two temporary files are removed in vain, of the boot counter and of the snapshot.
    for (point, passes) in [("disk-remove-before", 2), ("disk-remove-after", 0)] {
        let flags = ["--snapshot-count", "1000000", "--snapshot-catchup-entries", "0"];
        let mut cluster = Cluster::start(1, &[FAST, &flags].concat());
        let value = vec![7; 1 << 20];
        for number in 0..raftexample::raft_log::SEGMENT_BYTES >> 20 {
            assert_eq!(cluster.client(1).put(&format!("/{}", number % 8), &value).status, 204);
        }
        assert!(segments(&cluster) > 1);
        cluster.kill(1);
        spawn_to_die(&mut cluster, 1, point, passes);
        // Ready, it has applied everything again: an earlier snapshot would let no segment go.
        cluster.wait_ready(1);
        let killed = cluster.client(1).request("POST", "/_/snapshot", &[], b"");
        println!("{point}: {killed:?}");
        assert_killed_at(&mut cluster, 1, point);
        cluster.restart(1);
        for number in 0..8 {
            assert!(cluster.client(1).get(&format!("/{number}")).body == value);
        }
        assert_eq!(segments(&cluster), 1, "{point}: what was begun is ended at the start");
    }
}

fn segments(cluster: &Cluster) -> usize {
    let names = std::fs::read_dir(cluster.data_dir(1)).unwrap().map(|entry| entry.unwrap().file_name());
    names.filter(|name| name.to_string_lossy().ends_with(".log")).count()
}

/// Kills a follower, and waits until the others have nothing but a snapshot for it.
fn kill_until_it_needs_a_snapshot(cluster: &mut Cluster) -> u64 {
    let follower = cluster.others(cluster.leader())[0];
    let others = cluster.others(follower);
    cluster.kill(follower);
    let last_index = others.iter().map(|id| cluster.status_number(*id, "last_index")).max().unwrap_or(0);
    wait_for("a log that begins behind that of the follower", || {
        others.iter().all(|id| cluster.status_number(*id, "first_index") > last_index).then_some(())
    });
    follower
}

#[test]
fn a_follower_survives_a_crash_at_every_step_of_a_snapshot_that_it_is_sent() {
    // A leader keeps entries for some election timeouts for a follower that was sent a snapshot: short ones, then.
    let timing = ["--heartbeat-interval", "50ms", "--election-timeout", "250ms"];
    let mut cluster = Cluster::start(3, &[&timing, SNAPSHOTS].concat());
    let load = Load::start(&cluster, WRITERS);
    for point in AT_RECEIVER {
        println!("{point}");
        let follower = kill_until_it_needs_a_snapshot(&mut cluster);
        spawn_to_die(&mut cluster, follower, point, 0);
        assert_killed_at(&mut cluster, follower, point);
        load.wait_for_writes(20);
        cluster.restart(follower);
        cluster.wait_caught_up(follower);
    }
    let written = load.stop();
    for id in cluster.ids() {
        cluster.wait_caught_up(id);
    }
    written.verify(&cluster);
    cluster.kill_all();
    cluster.restart_all();
    written.verify(&cluster);
}
