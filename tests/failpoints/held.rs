use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use raftexample::fail_point::FAIL_POINTS;

use crate::load::Load;
use crate::orders::Orders;
use crate::register::Register;
use crate::support::{Cluster, FAST, wait_for};
use crate::{
    AT_FOUNDING, AT_PEERS, AT_RECEIVER, AT_START, SNAPSHOTS, WRITERS, assert_killed_at, kill_until_it_needs_a_snapshot,
    under_load,
};

/// That of [`FAST`].
const ELECTION_TIMEOUT: Duration = Duration::from_millis(500);

/// Where work passes from one thread to another.
const HAND_OVERS: [&str; 5] = ["loop-", "driver-", "applier-", "snapshot-order-", "peer-"];

/// Steps of the driver: a leader that is held there is heard of no more.
const OF_DRIVER: [&str; 4] = ["driver-", "log-write-", "log-compact-", "snapshot-marker-"];

fn is_one_of(prefixes: &[&str], point: &str) -> bool {
    prefixes.iter().any(|prefix| point.starts_with(prefix))
}

/// A cluster whose nodes are not started yet, and what they are told to do.
fn cluster_under_orders() -> (Cluster, BTreeMap<u64, Orders>) {
    let mut cluster = Cluster::launch(3, &[FAST, SNAPSHOTS].concat());
    cluster.kill_all();
    let orders = cluster.ids().into_iter().map(|id| (id, Orders::new(&cluster, id))).collect();
    for id in cluster.ids() {
        std::fs::remove_dir_all(cluster.data_dir(id)).unwrap();
    }
    (cluster, orders)
}

/// The names of the threads that a node has for as long as it lives.
fn threads(cluster: &Cluster, id: u64) -> Vec<String> {
    let tasks = std::fs::read_dir(format!("/proc/{}/task", cluster.process_id(id))).unwrap();
    let name = |task: std::io::Result<std::fs::DirEntry>| std::fs::read_to_string(task.unwrap().path().join("comm"));
    // A thread may end between being listed and being asked for its name.
    let mut names: Vec<String> = tasks.filter_map(|task| name(task).ok()).map(|name| name.trim().to_owned()).collect();
    let is_of_connection = |name: &str| {
        let number = ["http-", "peer-", "snapshot-"].iter().find_map(|prefix| name.strip_prefix(prefix));
        number.is_some_and(|number| number.bytes().all(|byte| byte.is_ascii_digit()))
    };
    names.retain(|name| !is_of_connection(name));
    names.sort();
    names
}

#[test]
fn the_program_of_this_test_looks_for_orders() {
    // What the test of a program without the feature looks for, it would find.
    let program = std::fs::read(env!("CARGO_BIN_EXE_raftexample")).unwrap();
    assert!(program.windows(10).any(|bytes| bytes == b"FAILPOINTS"));
}

#[test]
fn a_member_held_at_any_step_costs_the_others_an_election_at_most() {
    let (mut cluster, orders) = cluster_under_orders();
    let founding = [AT_FOUNDING, AT_START].concat();
    founding.iter().for_each(|point| orders[&1].hold(point));
    for id in cluster.ids() {
        orders[&id].spawn(&mut cluster, id);
    }
    // The other two found the cluster, and go on without it.
    [2, 3].into_iter().for_each(|id| cluster.wait_ready(id));
    orders[&1].hold_at_each(&founding, |point| {
        assert_eq!(cluster.client(2).put("/founding", point.as_bytes()).status, 204);
    });
    for id in cluster.ids() {
        cluster.wait_ready(id);
    }
    let threads_before: Vec<_> = cluster.ids().into_iter().map(|id| threads(&cluster, id)).collect();
    for name in ["driver", "applier", "snapshotter", "peer-1-fast", "peer-1-bulk", "http-loop-0"] {
        assert!(threads_before[1].iter().any(|other| other == name), "no {name} among {threads_before:?}");
    }

    let (load, register) = (Load::start(&cluster, WRITERS), Register::start(&cluster));
    for point in [&under_load()[..], AT_PEERS].concat() {
        hold_leader(&cluster, &orders, &load, point);
    }
    hold_receiver(&mut cluster, &orders, &load);
    let written = load.stop();
    register.stop();
    for id in cluster.ids() {
        cluster.wait_ready(id);
        cluster.wait_caught_up(id);
    }
    written.verify(&cluster);
    for (id, before) in cluster.ids().into_iter().zip(threads_before) {
        wait_for("the same threads as before", || (threads(&cluster, id) == before).then_some(()));
        assert_eq!(cluster.client(id).get("/_/livez").status, 200);
    }
}

fn hold_leader(cluster: &Cluster, orders: &BTreeMap<u64, Orders>, load: &Load, point: &str) {
    let leader = cluster.leader();
    let (others, orders) = (cluster.others(leader), &orders[&leader]);
    orders.hold(point);
    orders.wait_held(point);
    let began = Instant::now();
    if is_one_of(&OF_DRIVER, point) {
        wait_for("another leader", || {
            let leaders = others.iter().map(|id| cluster.status_number(*id, "leader"));
            leaders.into_iter().all(|id| others.contains(&id)).then_some(())
        });
    }
    load.wait_for_writes(20);
    if is_one_of(&HAND_OVERS, point) {
        wait_for("an election timeout", || (began.elapsed() > ELECTION_TIMEOUT).then_some(()));
    }
    assert!(orders.is_held(point));
    println!("{point} held leader {leader} for {:?}", began.elapsed());
    orders.release(point);
    cluster.wait_ready(leader);
    cluster.wait_caught_up(leader);
}

/// Lets a follower fall behind, so that it is sent a snapshot, and holds it at every step of that.
fn hold_receiver(cluster: &mut Cluster, orders: &BTreeMap<u64, Orders>, load: &Load) {
    let follower = kill_until_it_needs_a_snapshot(cluster);
    AT_RECEIVER.iter().for_each(|point| orders[&follower].hold(point));
    orders[&follower].spawn(cluster, follower);
    orders[&follower].hold_at_each(AT_RECEIVER, |_| load.wait_for_writes(20));
    cluster.wait_caught_up(follower);
}

#[test]
fn a_leader_killed_where_work_passes_between_threads_loses_nothing() {
    let (mut cluster, orders) = cluster_under_orders();
    for id in cluster.ids() {
        orders[&id].spawn(&mut cluster, id);
    }
    for id in cluster.ids() {
        cluster.wait_ready(id);
    }
    let (load, register) = (Load::start(&cluster, WRITERS), Register::start(&cluster));
    for point in FAIL_POINTS.iter().filter(|point| is_one_of(&HAND_OVERS, point)) {
        println!("{point}");
        let leader = cluster.leader();
        orders[&leader].kill(point);
        assert_killed_at(&mut cluster, leader, point);
        orders[&leader].release(point);
        load.wait_for_writes(20);
        orders[&leader].spawn(&mut cluster, leader);
        cluster.wait_ready(leader);
        cluster.wait_caught_up(leader);
    }
    let written = load.stop();
    register.stop();
    written.verify(&cluster);
    cluster.kill_all();
    cluster.restart_all();
    written.verify(&cluster);
}
