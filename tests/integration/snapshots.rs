use std::path::{Path, PathBuf};
use std::process::Command;

use crate::client::Client;
use crate::load::Load;
use crate::proxy::{Fate, Proxy};
use crate::support::{Cluster, Detour, FAST, free_port, wait_for};

const WRITERS: usize = 4;

/// Rounds of killing and restarting; set the variable for a long run.
const KILL_ROUNDS_VARIABLE: &str = "RAFTEXAMPLE_KILL_ROUNDS";
const KILL_ROUNDS: usize = 3;

/// Flags of a cluster that takes a snapshot only when it is asked to, and then keeps nothing behind it.
const ON_DEMAND: (&str, &str) = ("1000000", "0");

fn flags<'a>((count, catch_up): (&'a str, &'a str)) -> Vec<&'a str> {
    [FAST, &["--snapshot-count", count, "--snapshot-catchup-entries", catch_up]].concat()
}

/// Has a node take a snapshot, and returns its index.
#[track_caller]
fn take_snapshot(cluster: &Cluster, id: u64) -> u64 {
    let response = cluster.client(id).must("POST", "/_/snapshot", b"");
    assert_eq!(response.status, 200, "{}", response.text());
    let index = response.json()["index"].as_u64().expect("an index");
    wait_for("the snapshot's marker", || (cluster.status_number(id, "snapshot_index") >= index).then_some(()));
    index
}

/// Has these nodes take snapshots, so that none of their logs begins at or before `index`.
#[track_caller]
fn compact_beyond(cluster: &Cluster, ids: &[u64], index: u64) {
    for id in ids {
        cluster.wait_caught_up(*id);
        take_snapshot(cluster, *id);
        let first_index = cluster.status_number(*id, "first_index");
        assert!(first_index > index, "the log of node {id} begins at {first_index}, and should behind {index}");
    }
}

#[track_caller]
fn put_all(client: &mut Client, pairs: &[(String, Vec<u8>)]) {
    for (target, value) in pairs {
        let response = client.put(target, value);
        assert_eq!(response.status, 204, "{target}: {}", response.text());
    }
}

/// Checks a node's own state, without asking anyone.
#[track_caller]
fn assert_own_state(cluster: &Cluster, id: u64, pairs: &[(String, Vec<u8>)]) {
    let mut client = cluster.client(id);
    for (target, value) in pairs {
        let response = client.get(&format!("{target}?consistency=stale"));
        assert_eq!(response.status, 200, "{target} on node {id}");
        assert!(response.body == *value, "{target} on node {id}: {} bytes differ", response.body.len());
    }
    let keys = cluster.status_number(id, "keys");
    assert_eq!(keys, pairs.len() as u64, "node {id} has keys that nobody wrote");
}

/// Large enough that a snapshot of it does not fit the buffers between two nodes.
fn large_values() -> Vec<(String, Vec<u8>)> {
    let value = |seed: usize| (0..1 << 20).map(|at: usize| (at.wrapping_mul(seed * 2 + 1) >> 3) as u8).collect();
    (0..24).map(|number| (format!("/large/{number}"), value(number))).collect()
}

fn files(directory: &Path, ending: &str) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().path());
    let mut paths: Vec<PathBuf> = entries.filter(|path| path.to_string_lossy().ends_with(ending)).collect();
    paths.sort();
    paths
}

/// Runs a node that can't start to its end, and returns its last words.
fn refused_start(command: &mut Command) -> String {
    let output = command.output().unwrap();
    let words = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(1), "{words}");
    words.lines().last().unwrap_or_default().to_owned()
}

/// Writers go on while members are killed and come back, one after the other and the leader among them.
fn survive_kills(settings: (&str, &str), rounds: usize) {
    println!("a snapshot every {} entries, {} kept behind it", settings.0, settings.1);
    let mut cluster = Cluster::start(3, &flags(settings));
    let load = Load::start(&cluster, WRITERS);
    for round in 0..rounds {
        let leader = cluster.leader();
        let victim = if round % 2 == 0 { leader } else { cluster.others(leader)[round / 2 % 2] };
        load.wait_for_writes(60);
        cluster.kill(victim);
        load.wait_for_writes(60);
        cluster.restart(victim);
    }
    load.wait_for_writes(60);
    let written = load.stop();
    for id in cluster.ids() {
        cluster.wait_caught_up(id);
    }
    written.verify(&cluster);
    cluster.kill_all();
    cluster.restart_all();
    written.verify(&cluster);
}

#[test]
fn every_combination_of_interval_and_catch_up_survives_kills() {
    for count in ["1", "2", "5"] {
        for catch_up in ["0", "1", "5"] {
            survive_kills((count, catch_up), 2);
        }
    }
    survive_kills(("10", "1000"), 2);
}

#[test]
fn a_snapshot_every_50_entries_and_nothing_behind_it_survives_kills() {
    let rounds = std::env::var(KILL_ROUNDS_VARIABLE).ok().map_or(KILL_ROUNDS, |rounds| {
        rounds.parse().unwrap_or_else(|_| panic!("{KILL_ROUNDS_VARIABLE}={rounds} is no number"))
    });
    survive_kills(("50", "0"), rounds);
}

#[test]
fn a_follower_that_saw_only_the_snapshot_has_every_byte() {
    let mut cluster = Cluster::start(3, &flags(ON_DEMAND));
    let leader = cluster.leader();
    let follower = cluster.others(leader)[0];
    let last_index = cluster.status_number(follower, "last_index");
    cluster.kill(follower);
    let all_bytes: Vec<u8> = (0..=255).collect();
    let all_escaped: String = all_bytes.iter().map(|byte| format!("%{byte:02X}")).collect();
    let mut pairs = vec![
        (format!("/{all_escaped}"), all_bytes),
        ("/%FF%FE%00".to_owned(), b"\xff\xfe\x00\r\n".to_vec()),
        ("/empty".to_owned(), Vec::new()),
        ("/%22%7B".to_owned(), b"{\"json\":\"\\u0000\"}".to_vec()),
        ("/large".to_owned(), vec![0xa5; 1 << 20]),
    ];
    pairs.extend((0..200).map(|number| (format!("/many/{number}"), vec![number as u8; 100])));
    put_all(&mut cluster.client(leader), &pairs);
    compact_beyond(&cluster, &cluster.others(follower), last_index);
    cluster.restart(follower);
    cluster.wait_caught_up(follower);
    assert!(cluster.log(follower).contains("restored the snapshot of index"), "it had to be sent one");
    assert_own_state(&cluster, follower, &pairs);
    // Directly after the snapshot, before any further write.
    cluster.kill(follower);
    cluster.restart(follower);
    assert_own_state(&cluster, follower, &pairs);
    let etag = |id: u64| cluster.client(id).get("/large?consistency=stale").header("etag").map(str::to_owned);
    assert_eq!(etag(follower), etag(leader));
    assert_eq!(cluster.client(follower).put("/new", b"value").status, 204);
}

#[test]
fn a_snapshot_of_an_empty_store_is_taken_sent_and_loaded() {
    let mut cluster = Cluster::start(3, &flags(ON_DEMAND));
    let last_index = cluster.status_number(3, "last_index");
    cluster.kill_all();
    for id in [1, 2] {
        cluster.spawn(id);
    }
    for id in [1, 2] {
        cluster.wait_ready(id);
    }
    // Entries that leave the store empty: the first one after the start may reach member 3 before the snapshot does.
    for _ in 0..20 {
        assert_eq!(cluster.client(1).must("DELETE", "/nothing", b"").status, 404);
    }
    compact_beyond(&cluster, &[1, 2], last_index + 10);
    cluster.restart(3);
    cluster.wait_caught_up(3);
    assert!(cluster.log(3).contains("restored the snapshot of index"), "it had to be sent one");
    cluster.kill_all();
    cluster.restart_all();
    assert_own_state(&cluster, 3, &[]);
    assert_eq!(cluster.client(3).put("/first", b"value").status, 204);
}

#[test]
fn a_tail_that_was_never_committed_gives_way_to_a_snapshot() {
    let mut cluster = Cluster::start(3, &flags(ON_DEMAND));
    let old_leader = cluster.leader();
    let others = cluster.others(old_leader);
    let mut pairs = vec![("/kept".to_owned(), b"value".to_vec())];
    put_all(&mut cluster.client(old_leader), &pairs);
    // Not paused: in their sockets they would find the tail after all.
    for id in &others {
        cluster.kill(*id);
    }
    let last_index = cluster.status_number(old_leader, "last_index");
    let mut writers: Vec<Client> = (0..20).map(|_| cluster.client(old_leader)).collect();
    for (number, writer) in writers.iter_mut().enumerate() {
        writer.send("PUT", &format!("/lost/{number}"), &[], b"never committed").unwrap();
    }
    wait_for("a tail in the old leader's log", || {
        (cluster.status_number(old_leader, "last_index") >= last_index + 20).then_some(())
    });
    cluster.kill(old_leader);
    for id in &others {
        cluster.spawn(*id);
    }
    let leader = cluster.leader_among(&others);
    pairs.extend((0..40).map(|number| (format!("/new/{number}"), b"committed".to_vec())));
    put_all(&mut cluster.client(leader), &pairs[1..]);
    compact_beyond(&cluster, &others, last_index + 20);
    cluster.restart(old_leader);
    cluster.wait_caught_up(old_leader);
    assert!(cluster.log(old_leader).contains("restored the snapshot of index"), "it had to be sent one");
    assert_own_state(&cluster, old_leader, &pairs);
}

/// A cluster whose third member is behind a proxy, and down, and needs a snapshot of all of [`large_values`].
fn waiting_for_a_large_snapshot() -> (Cluster, Proxy, Vec<(String, Vec<u8>)>) {
    let listens_at = free_port();
    let proxy = Proxy::start(listens_at);
    let detour = Detour { id: 3, port: proxy.port(), listens_at };
    let mut cluster = Cluster::start_with_detour(3, &flags(ON_DEMAND), detour);
    let last_index = cluster.status_number(3, "last_index");
    cluster.kill(3);
    let pairs = large_values();
    put_all(&mut cluster.client(cluster.leader_among(&[1, 2])), &pairs);
    compact_beyond(&cluster, &[1, 2], last_index);
    (cluster, proxy, pairs)
}

#[test]
fn a_transfer_cut_anywhere_is_made_again() {
    let (mut cluster, proxy, pairs) = waiting_for_a_large_snapshot();
    let bytes: usize = pairs.iter().map(|(_, value)| value.len()).sum();
    // In the head, at the border of head and body, in the first blocks, in the middle, and just before the end.
    let cuts = [1, 100, 500, 1_000, 5_000, 150_000, 1_000_000, bytes / 2, bytes - 1, bytes + 300];
    proxy.plan(cuts.map(Fate::CutAfter));
    cluster.spawn(3);
    wait_for("an end of the cuts", || (proxy.left() == 0).then_some(()));
    cluster.wait_ready(3);
    cluster.wait_caught_up(3);
    assert_own_state(&cluster, 3, &pairs);
    assert!(proxy.seen() >= cuts.len(), "{} transfers", proxy.seen());
    assert_eq!(files(cluster.data_dir(3), ".tmp"), [] as [PathBuf; 0]);
}

#[test]
fn a_transfer_shows_its_progress_and_outlives_its_leader() {
    let (mut cluster, proxy, pairs) = waiting_for_a_large_snapshot();
    let leader = cluster.leader_among(&[1, 2]);
    proxy.plan([Fate::HoldAfter(8 << 20)]);
    cluster.spawn(3);
    wait_for("a transfer that is held", || proxy.is_holding().then_some(()));
    let transfer = wait_for("its progress in the status", || {
        let status = cluster.status(leader)?;
        let member = status["members"].as_array()?.iter().find(|member| member["id"] == 3)?.clone();
        (member["snapshot"]["sent"].as_u64()? > 8 << 20).then(|| member["snapshot"].clone())
    });
    assert!(transfer["size"].as_u64() > transfer["sent"].as_u64(), "{transfer}");
    assert_eq!(transfer["index"].as_u64(), Some(cluster.status_number(leader, "snapshot_index")));
    // Meanwhile the follower hears its leader, and the cluster does its work.
    assert_eq!(cluster.status_number(3, "leader"), leader);
    assert_eq!(cluster.client(leader).put("/large/0", &pairs[0].1).status, 204);

    cluster.kill(leader);
    proxy.release();
    // Member 3 alone makes the other one a majority, so it is the next leader that sends the snapshot.
    cluster.wait_ready(3);
    assert_own_state(&cluster, 3, &pairs);
    assert!(proxy.seen() >= 2, "{} transfers", proxy.seen());
    cluster.restart(leader);
    cluster.wait_caught_up(leader);
    assert_own_state(&cluster, leader, &pairs);
}

/// Where the blocks of a snapshot file begin, with their section, see the module's documentation of the format.
fn blocks(file: &[u8]) -> Vec<(usize, u8, usize)> {
    let mut blocks = Vec::new();
    let mut at = 12;
    while at < file.len() {
        let length = u32::from_le_bytes(file[at + 1..at + 5].try_into().unwrap()) as usize;
        blocks.push((at, file[at], length));
        at += 9 + length;
    }
    blocks
}

#[test]
fn a_node_refuses_to_start_with_a_damaged_snapshot() {
    let mut cluster = Cluster::start(1, &flags(ON_DEMAND));
    for number in 0..30 {
        let headers = [("Idempotency-Key", format!("token-{number}"))];
        let headers = [(headers[0].0, headers[0].1.as_str())];
        let mut client = cluster.client(1);
        let put = client.request("PUT", &format!("/key/{number}"), &headers, b"value").unwrap();
        assert_eq!(put.status, 204);
    }
    take_snapshot(&cluster, 1);
    wait_for("the end of the older one", || (files(cluster.data_dir(1), ".snapshot").len() == 1).then_some(()));
    cluster.kill(1);
    // What a crash leaves is removed: it was never named.
    let half_written = cluster.data_dir(1).join("00000000000000ff.snapshot.tmp");
    std::fs::write(&half_written, b"raftsnap").unwrap();
    let snapshots = files(cluster.data_dir(1), ".snapshot");
    let [snapshot] = &snapshots[..] else { panic!("{snapshots:?}") };
    let whole = std::fs::read(snapshot).unwrap();
    let name = snapshot.file_name().unwrap().to_string_lossy().into_owned();
    let blocks = blocks(&whole);
    let sections: Vec<u8> = blocks.iter().map(|(_, section, _)| *section).collect();
    assert_eq!(sections, [1, 2, 3, 5, 6, 7, 8], "a snapshot with something of everything");
    // Magic, format version, and for each block its section, length, checksum, and both ends of what it holds.
    let mut places = vec![0, 7, 8];
    for (at, _, length) in blocks {
        places.extend([at, at + 1, at + 5, at + 9, at + 8 + length]);
    }
    for place in places {
        let mut damaged = whole.clone();
        damaged[place] ^= 0x10;
        std::fs::write(snapshot, &damaged).unwrap();
        let words = refused_start(&mut cluster.command(1));
        assert!(words.contains(&name) && words.contains("restore the data directory"), "byte {place}: {words}");
    }
    std::fs::write(snapshot, &whole[..whole.len() - 1]).unwrap();
    assert!(refused_start(&mut cluster.command(1)).contains(&name));
    std::fs::remove_file(snapshot).unwrap();
    let words = refused_start(&mut cluster.command(1));
    assert!(words.contains(&name) && words.contains("add it under a new id"), "{words}");
    assert!(!half_written.exists());
    // Nothing of all that has harmed the rest.
    std::fs::write(snapshot, &whole).unwrap();
    cluster.restart(1);
    assert_eq!(cluster.client(1).get("/key/29").text(), "value");
}

#[test]
fn disk_use_is_bounded_by_the_state_and_not_by_history() {
    const SEGMENT_BYTES: u64 = raftexample::raft_log::SEGMENT_BYTES;
    const ROUNDS: usize = 5;
    let cluster = Cluster::start(1, &flags(("20", "0")));
    let pairs = large_values();
    for _ in 0..ROUNDS * 2 {
        put_all(&mut cluster.client(1), &pairs);
    }
    let state: u64 = pairs.iter().map(|(_, value)| value.len() as u64).sum();
    assert!(ROUNDS as u64 * 2 * state > 3 * SEGMENT_BYTES, "too little for the log to be shortened");
    // A snapshot and one that is being written; a segment in use, and one that begins before the last snapshot.
    let bound = 2 * (state + state / 10) + 2 * SEGMENT_BYTES;
    let used = || -> u64 {
        files(cluster.data_dir(1), "").iter().filter_map(|path| path.metadata().ok()).map(|file| file.len()).sum()
    };
    wait_for("little enough on disk", || (used() <= bound).then_some(()));
    assert!(files(cluster.data_dir(1), ".snapshot").len() <= 2);
}

#[test]
fn a_full_store_takes_no_more_values_until_some_are_deleted() {
    let cluster = Cluster::start(3, &[FAST, &["--max-store-bytes", "100000"]].concat());
    let leader = cluster.leader();
    // Counted here: how many there are, a follower may know a little later.
    let mut keys = Vec::new();
    for id in [leader, cluster.others(leader)[0]] {
        let mut client = cluster.client(id);
        let refused = wait_for("a full store", || {
            let key = format!("/{id}-{}", keys.len());
            let put = client.put(&key, &[1; 10_000]);
            if put.status == 204 {
                keys.push(key);
                return None;
            }
            Some(put)
        });
        assert_eq!((refused.status, refused.outcome().as_str()), (507, "not-applied"));
        assert!(refused.text().contains("--max-store-bytes"), "{}", refused.text());
        assert_eq!(client.get(&keys[0]).status, 200);
        // Two, because what is under way when the limit is reached is still taken.
        for key in keys.drain(keys.len() - 2..) {
            assert_eq!(client.must("DELETE", &key, b"").status, 204);
        }
        wait_for("room for a value", || (client.put("/small", b"small").status == 204).then_some(()));
    }
}
