//! The threads of a node with the ends of their queues in a test's hands.

use std::time::Duration;

use super::*;
use crate::command::{Command, Condition, RequestId};
use crate::fixtures::{self, CLUSTER};
use crate::memory_disk::{Failure, MemoryDisk, Operation};
use crate::store::StateMachine;

/// Within which everything here happens, on a busy machine too.
const DEADLINE: Duration = Duration::from_secs(60);

#[track_caller]
fn wait_until(mut condition: impl FnMut() -> bool) {
    let started = Instant::now();
    while !condition() {
        assert!(started.elapsed() < DEADLINE, "it did not come to that");
        thread::sleep(Duration::from_millis(1));
    }
}

fn three() -> Arc<Membership> {
    Arc::new(fixtures::founders(3))
}

/// A snapshot of so many keys as it travels, and its header.
fn snapshot_of(keys: u64) -> (SnapshotHeader, Vec<u8>) {
    let mut file = Vec::new();
    crate::snapshot::write(&StateMachine::with_keys(keys).capture(three()), CLUSTER, &mut file).unwrap();
    (SnapshotHeader { index: keys, term: 1, leader_term: 1, bytes: file.len() as u64 }, file)
}

fn inbox(events: Sender<Event>) -> Inbox {
    let files = SnapshotFiles::new(Arc::new(MemoryDisk::new()), CLUSTER);
    let peer_bytes = ByteBudget::new(PEER_BYTES_MAX);
    Inbox { events, files, me: 1, peer_bytes, receiving: AtomicBool::new(false), metrics: Arc::default() }
}

#[test]
fn a_received_snapshot_is_read_and_what_it_replaces_is_freed_by_the_peers_thread() {
    let (events, driver) = bounded(1);
    let inbox = inbox(events);
    let (header, file) = snapshot_of(10);
    let receive = || inbox.receive_snapshot(2, &header, &mut &file[..]);
    thread::scope(|scope| {
        let receiving = scope.spawn(receive);
        let Ok(Event::SnapshotReceived { from: 2, message, mut state, .. }) = driver.recv_timeout(DEADLINE) else {
            panic!("the driver hears of the snapshot");
        };
        assert_eq!(message.get_snapshot().get_metadata().index, 10);
        // Two states are in memory: no third one is taken in.
        assert!(matches!(inbox.offer_snapshot(3, &header), Err(SnapshotRefusal::Unwanted(_))));
        assert!(matches!(receive(), Err(SnapshotRefusal::Unwanted(_))));
        let mut in_use = StateMachine::with_keys(5);
        state.replace(&mut in_use);
        assert_eq!((in_use.applied_index(), in_use.version().keys()), (10, 10));
        assert!(!receiving.is_finished(), "it waits for what is left");
        drop(state);
        assert!(receiving.join().unwrap().is_ok());

        // The next one, for which nobody has a use: or the node has stopped.
        let receiving = scope.spawn(receive);
        drop(driver.recv_timeout(DEADLINE).unwrap());
        assert!(receiving.join().unwrap().is_ok());
        drop(driver);
        assert_eq!(receive(), Err(SnapshotRefusal::Stopping));
    });
}

#[test]
fn a_directory_that_cannot_be_synced_behind_a_snapshot_ends_the_node() {
    let (events, driver) = bounded(1);
    let (header, file) = snapshot_of(10);
    let disk = MemoryDisk::new();
    let files = SnapshotFiles::new(Arc::new(disk.clone()), CLUSTER);
    let inbox = Inbox { files: files.clone(), ..inbox(events.clone()) };
    disk.fail(Some(Operation::SyncDirectory), 1, Failure::Error);
    assert_eq!(inbox.receive_snapshot(2, &header, &mut &file[..]), Err(SnapshotRefusal::Stopping));
    assert!(matches!(driver.try_recv(), Ok(Event::Failed(reason)) if reason.contains("failed to sync the directory")));

    let (orders_tx, orders) = bounded(CAPTURES_MAX);
    let capture = Box::new(StateMachine::with_keys(10).capture(three()));
    let (reply, replies) = bounded(1);
    orders_tx.send(ToSnapshotter { capture, reply: Some(reply) }).unwrap();
    let (_removals_tx, removals) = bounded(REMOVALS_MAX);
    disk.fail(Some(Operation::SyncDirectory), 1, Failure::Error);
    let reason = SnapshotterThread {
        orders,
        removals,
        files,
        events,
        ends: bounded(SNAPSHOT_ENDS_MAX).0,
        metrics: Arc::default(),
    }
    .run()
    .unwrap_err();
    assert!(reason.contains("failed to sync the directory"), "{reason}");
    assert!(driver.is_empty() && replies.recv().is_err(), "the log must not name it");
}

#[test]
fn a_snapshot_of_another_term_than_announced_is_refused() {
    // With nobody to hear of it: it must not come to that.
    let inbox = inbox(bounded(1).0);
    let (header, file) = snapshot_of(10);
    for term in [2, 0] {
        let refused = inbox.receive_snapshot(2, &SnapshotHeader { term, ..header }, &mut &file[..]);
        assert!(matches!(refused, Err(SnapshotRefusal::Damaged(_))), "{refused:?}");
    }
}

fn append(bytes: usize) -> PeerMessage {
    let entry = raft::eraftpb::Entry { data: vec![7; bytes].into(), ..Default::default() };
    PeerMessage::Raft(Message { msg_type: MessageType::MsgAppend, entries: vec![entry].into(), ..Message::default() })
}

#[test]
fn peers_wait_while_too_many_bytes_of_theirs_wait_for_the_driver() {
    const PEERS: usize = 4;
    const EACH: usize = 10;
    const BYTES: usize = 4 << 20;
    let (events, driver) = bounded(EVENTS_MAX);
    let inbox = inbox(events);
    thread::scope(|scope| {
        for peer in 1..=PEERS {
            let inbox = &inbox;
            scope.spawn(move || (0..EACH).for_each(|_| inbox.deliver(peer as u64, vec![append(BYTES)]).unwrap()));
        }
        let is_full = |bytes| (PEER_BYTES_MAX - BYTES - 1000..=PEER_BYTES_MAX).contains(&bytes);
        wait_until(|| is_full(inbox.peer_bytes.used()));
        // One that fits nowhere has its turn too, alone.
        scope.spawn(|| inbox.deliver(0, vec![append(PEER_BYTES_MAX)]).unwrap());
        let mut delivered = [0; PEERS + 1];
        for _ in 0..=PEERS * EACH {
            let waiting = inbox.peer_bytes.used();
            assert!(waiting <= PEER_BYTES_MAX || driver.len() <= 1, "{waiting} bytes in {} events", driver.len());
            let Ok(Event::Peer(from, messages, share)) = driver.recv_timeout(DEADLINE) else {
                panic!("what a peer sends arrives, however much it is");
            };
            assert_eq!(messages.len(), 1);
            delivered[from as usize] += 1;
            drop(share);
        }
        assert_eq!(delivered, [1, EACH, EACH, EACH, EACH]);
    });
    assert_eq!(inbox.peer_bytes.used(), 0);

    // When the driver has ended, nobody waits for it.
    inbox.deliver(1, vec![append(PEER_BYTES_MAX)]).unwrap();
    thread::scope(|scope| {
        let waiting = scope.spawn(|| inbox.deliver(2, vec![append(1)]));
        drop(inbox.peer_bytes.closer());
        assert_eq!(waiting.join().unwrap(), Err(peer_server::Stopped));
    });
}

/// Bounded here; set the variable for more. With `--nocapture` it shows how long who was busy.
const KEYS_VARIABLE: &str = "RAFTEXAMPLE_SNAPSHOT_KEYS";
const KEYS: u64 = 50_000;

#[test]
fn the_applier_neither_reads_nor_frees_a_large_state() {
    let keys = std::env::var(KEYS_VARIABLE).ok().map_or(KEYS, |keys| keys.parse().unwrap());
    let Appliers { applier, batches, publication, .. } = applier(StateMachine::with_keys(keys));
    let (back, rest) = bounded(1);
    let at_return = publication.clone();
    let state = Replacement::new(StateMachine::with_keys(keys + 1), move |rest| {
        drop(back.try_send((rest, at_return.published().map(|version| version.applied_index()))));
    });
    let (reply, replies) = bounded(1);
    thread::scope(|scope| {
        let applier = scope.spawn(|| applier.run());
        let started = Instant::now();
        let restore = Apply::Restore { index: keys + 1, membership: three(), state: Box::new(state) };
        batches.send(ToApplier::Batch(vec![restore, Apply::Reads(vec![ReplyTo::Thread(reply)])])).unwrap();
        let Ok(Reply::Read(Ok(version))) = replies.recv_timeout(DEADLINE) else { panic!("a read is answered") };
        println!("{keys} keys were replaced in {:?}", started.elapsed());
        assert_eq!((version.applied_index(), version.keys() as u64), (keys + 1, keys + 1));
        let (rest, published_then) = rest.recv_timeout(DEADLINE).unwrap();
        assert_eq!(rest.version().keys() as u64, keys, "the old state comes back whole");
        assert_eq!(published_then, None, "it is not published any more, or the applier would free it after all");
        let started = Instant::now();
        drop(rest);
        println!("and freed in {:?}", started.elapsed());
        drop(batches);
        assert_eq!(applier.join().unwrap(), Ok(()));
    });
}

#[test]
fn what_was_overwritten_is_freed_while_nobody_reads() {
    let state = StateMachine::with_keys(5);
    let (key, old) = state.version().list(b"", None, 1).items.pop().map(|item| (item.key().to_vec(), item)).unwrap();
    let Appliers { applier, batches, version_requests, publication, .. } = applier(state);
    let put = |sequence| {
        let key = key.clone().into();
        let put = Command::Put { key, value: "new".into(), condition: Condition::default(), token: None };
        let id = RequestId { node: 1, boot: 2, sequence };
        Apply::Command { index: 5 + sequence, term: 1, id, command: put.encode().into(), waiter: None }
    };
    thread::scope(|scope| {
        let applier = scope.spawn(|| applier.run());
        assert_eq!(publication.published().unwrap().applied_index(), 5);
        batches.send(ToApplier::Batch(vec![put(1)])).unwrap();
        wait_until(|| publication.published().is_none() && old.is_unshared());
        assert_eq!(publication.applied_index(), 6);

        // Who has waited for a read index gets a version, and nobody else.
        let (reply, replies) = bounded(1);
        batches.send(ToApplier::Batch(vec![put(2), Apply::Reads(vec![ReplyTo::Thread(reply)])])).unwrap();
        let Ok(Reply::Read(Ok(version))) = replies.recv_timeout(DEADLINE) else { panic!("a read is answered") };
        assert_eq!((version.applied_index(), publication.published().is_none()), (7, true));

        // Who looks for one and finds none asks for it, and so do all for a while.
        batches.send(ToApplier::Batch(vec![put(3)])).unwrap();
        wait_until(|| publication.applied_index() == 8);
        wait_until(|| {
            let (reply, replies) = bounded(1);
            let before = publication.newest();
            version_requests.send(vec![ReplyTo::Thread(reply)]).unwrap();
            batches.send(ToApplier::VersionWanted).unwrap();
            let Ok(Reply::Read(Ok(version))) = replies.recv_timeout(DEADLINE) else { panic!("a read is answered") };
            assert_eq!(version.applied_index(), 8);
            before.is_some_and(|version| version.applied_index() == 8)
        });
        let old = publication.newest().unwrap().get(&key).unwrap();

        // Until it is long ago that somebody did.
        let mut sequence = 3;
        wait_until(|| {
            sequence += 1;
            batches.send(ToApplier::Batch(vec![put(sequence)])).unwrap();
            publication.published().is_none() && old.is_unshared()
        });
        drop(batches);
        assert_eq!(applier.join().unwrap(), Ok(()));
    });
}

#[test]
fn a_snapshot_is_taken_on_request_while_older_ones_wait_to_be_removed() {
    let Appliers { applier, batches, orders, removals, .. } = applier(StateMachine::with_keys(5));
    thread::scope(|scope| {
        let applier = scope.spawn(|| applier.run());
        let state = Box::new(Replacement::new(StateMachine::with_keys(10), drop));
        batches.send(ToApplier::Batch(vec![Apply::Restore { index: 10, membership: three(), state }])).unwrap();
        wait_until(|| removals.is_full());
        let request = || {
            let (reply, replies) = bounded(1);
            batches.send(ToApplier::Snapshot(reply)).unwrap();
            replies
        };
        let taken = request();
        wait_until(|| orders.is_full());
        assert!(taken.is_empty(), "it is answered when it is on disk");
        // One more than may wait.
        let refused = request().recv_timeout(DEADLINE).unwrap();
        assert!(matches!(refused, Err(Refusal::Overloaded(_))), "{refused:?}");
        assert_eq!(orders.recv_timeout(DEADLINE).unwrap().capture.index(), 10);
        drop(batches);
        assert_eq!(applier.join().unwrap(), Ok(()));
    });
}

/// An applier's thread that is not started yet, and the other ends of its queues.
struct Appliers {
    applier: ApplierThread,
    batches: Sender<ToApplier>,
    version_requests: Sender<Vec<ReplyTo>>,
    publication: Arc<Publication>,
    orders: Receiver<ToSnapshotter>,
    removals: Receiver<u64>,
}

fn applier(state: StateMachine) -> Appliers {
    let (batches_tx, batches) = bounded(APPLY_BATCHES_MAX);
    let (version_requests_tx, version_requests) = bounded(VERSION_REQUESTS_MAX);
    let (snapshotter, orders) = bounded(CAPTURES_MAX);
    let (removals_tx, removals) = bounded(REMOVALS_MAX);
    let captured = state.applied_index();
    let applier = Applier::new(state, three());
    let publication = Arc::new(Publication::new(applier.version()));
    let applier = ApplierThread {
        applier,
        batches,
        version_requests,
        snapshotter,
        removals: removals_tx,
        publication: publication.clone(),
        watchers: Arc::new(Watchers::default()),
        told: captured,
        mailboxes: Vec::new(),
        metrics: Arc::default(),
        progress: Progress::new(Instant::now()),
        schedule: SnapshotSchedule::new(u64::MAX, captured),
        snapshot_ends: bounded(SNAPSHOT_ENDS_MAX).1,
    };
    Appliers { applier, batches: batches_tx, version_requests: version_requests_tx, publication, orders, removals }
}
