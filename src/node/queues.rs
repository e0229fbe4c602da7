//! What happens when the queues between a node's threads are full, and afterwards.

use std::cell::Cell;
use std::collections::BTreeSet;
use std::path::Path;

use super::*;
use crate::acquaintances::Promises;
use crate::command::{Command, Condition, RequestId};
use crate::fixtures::{CLUSTER, ELECTION_TICKS, core_on, founders, log_on};
use crate::memory_disk::MemoryDisk;
use crate::message::Transfer;
use crate::peer_protocol::{ForwardName, ForwardRefusal, ForwardedWrite};
use crate::replica::{FORWARDED_MAX, PENDING_READS_MAX, PENDING_WRITES_MAX};
use crate::store::StateMachine;

/// Within which everything here happens, on a busy machine too.
const DEADLINE: Duration = Duration::from_secs(60);

/// Not in a scope: a test that fails must not wait for threads that nobody ends any more.
fn spawn<T: Send + 'static>(body: impl FnOnce() -> T + Send + 'static) -> thread::JoinHandle<T> {
    thread::Builder::new().spawn(body).unwrap()
}

#[track_caller]
fn wait_until(what: &str, mut condition: impl FnMut() -> bool) {
    let started = Instant::now();
    while !condition() {
        assert!(started.elapsed() < DEADLINE, "waited in vain: {what}");
        thread::sleep(Duration::from_millis(1));
    }
}

/// A network that takes hellos, and keeps what is sent.
struct Kept(Sender<(NodeId, PeerMessage)>);

impl crate::driver::Network for Kept {
    fn send(&mut self, to: NodeId, message: PeerMessage) -> bool {
        self.0.try_send((to, message)).is_ok()
    }

    fn send_snapshot(&mut self, _to: NodeId, _message: Message) -> bool {
        false
    }

    fn transfer(&self, _to: NodeId) -> Option<Transfer> {
        None
    }

    fn follow(&mut self, _membership: &Arc<Membership>) {}

    fn hello(&mut self, _: &Hello, _: Promises, _: &Membership) -> Result<HelloAnswer, HelloRefusal> {
        Ok(HelloAnswer { protocol: 1, cluster: Some(CLUSTER), id: 1, directory: 1, boot: 1, members: None })
    }

    fn failed(&self) -> Option<&str> {
        None
    }

    fn stop(&mut self, _within: Duration) {}

    fn directory(&self, member: NodeId) -> Option<u128> {
        Some(member.into())
    }

    fn position(&mut self, _term: u64, _last_index: u64) {}
}

/// The threads of node 1, wired as in [`Node::start`] and not started, without ports.
struct Wired {
    driver: Driver<Kept>,
    applier: ApplierThread,
    snapshotter: SnapshotterThread,
    backend: NodeBackend,
    inbox: Inbox,
    /// Ways into the queues, to look at them.
    events: Sender<Event>,
    batches: Sender<ToApplier>,
    orders: Sender<ToSnapshotter>,
    removals: Sender<u64>,
    sent: Receiver<(NodeId, PeerMessage)>,
}

fn wired(members: u64) -> Wired {
    let (memory, founding) = (MemoryDisk::new(), founders(members));
    let core = core_on(log_on(&memory, 1, &founding), 1, &founding);
    let disk: Arc<dyn Disk> = Arc::new(memory);
    let (events_tx, events) = bounded(EVENTS_MAX);
    let (applier_tx, batches) = bounded(APPLY_BATCHES_MAX);
    let (version_requests_tx, version_requests) = bounded(VERSION_REQUESTS_MAX);
    let (orders_tx, orders) = bounded(CAPTURES_MAX);
    let (removals_tx, removals) = bounded(REMOVALS_MAX);
    let (sent_tx, sent) = bounded(100_000);
    let (started, metrics) = (Instant::now(), Arc::new(Metrics::new()));
    let files = SnapshotFiles::new(disk.clone(), CLUSTER);
    let mut state = StateMachine::new();
    state.advance(core.snapshot_index(), core.term());
    let applier = Applier::new(state, Arc::new(founding));
    let publication = Arc::new(Publication::new(applier.version()));
    let watchers = Arc::new(Watchers::default());
    let (ends, snapshot_ends) = bounded(SNAPSHOT_ENDS_MAX);
    let schedule = SnapshotSchedule::new(u64::MAX, core.snapshot_index());
    Wired {
        backend: NodeBackend {
            events: events_tx.clone(),
            queued: QueuedRequests::default(),
            applier: applier_tx.clone(),
            version_requests: version_requests_tx,
            publication: publication.clone(),
            watchers: watchers.clone(),
            driver_progress: Progress::new(started),
            applier_progress: Progress::new(started),
            started,
        },
        inbox: Inbox {
            events: events_tx.clone(),
            files: files.clone(),
            me: 1,
            peer_bytes: ByteBudget::new(PEER_BYTES_MAX),
            receiving: AtomicBool::new(false),
            metrics: metrics.clone(),
        },
        applier: ApplierThread {
            told: applier.applied_index(),
            applier,
            batches,
            version_requests,
            snapshotter: orders_tx.clone(),
            publication: publication.clone(),
            removals: removals_tx.clone(),
            watchers,
            mailboxes: Vec::new(),
            metrics: metrics.clone(),
            progress: Progress::new(started),
            schedule,
            snapshot_ends,
        },
        snapshotter: SnapshotterThread {
            orders,
            removals,
            files,
            events: events_tx.clone(),
            ends,
            metrics: metrics.clone(),
        },
        driver: Driver {
            replica: Replica::new(core, 1, ELECTION_TICKS),
            events,
            applier: applier_tx.clone(),
            network: Kept(sent_tx),
            options: DriverOptions {
                heartbeat_interval: Duration::from_millis(10),
                snapshot_catchup_entries: u64::MAX,
                removals: removals_tx.clone(),
                room: Room::new(disk, publication, u64::MAX, 0),
            },
            progress: Progress::new(started),
            started,
            more: false,
            announce_by: None,
            snapshot_asked: None,
            offences: Offences::default(),
            measures: Measures::new(metrics),
        },
        events: events_tx,
        batches: applier_tx,
        orders: orders_tx,
        removals: removals_tx,
        sent,
    }
}

fn put(number: u64) -> Bytes {
    let (key, value) = (number.to_string().into(), Bytes::from_static(b"value"));
    Command::Put { key, value, condition: Condition::default(), token: None }.encode().into()
}

fn heartbeat_of_stranger() -> PeerMessage {
    let message = Message { msg_type: MessageType::MsgHeartbeat, from: 9, to: 1, term: 1, ..Message::default() };
    PeerMessage::Raft(message)
}

/// Bytes of a peer of which two do not fit together.
fn append_of_stranger() -> PeerMessage {
    let entry = raft::eraftpb::Entry { data: vec![7; PEER_BYTES_MAX / 2 + 1].into(), ..Default::default() };
    let entries = vec![entry].into();
    PeerMessage::Raft(Message {
        msg_type: MessageType::MsgAppend,
        from: 9,
        to: 1,
        term: 1,
        entries,
        ..Message::default()
    })
}

fn is_overloaded(refusal: &Refusal) -> bool {
    matches!(refusal, Refusal::Overloaded(_))
}

/// Whether a request found no room.
fn is_refused(reply: &Reply) -> bool {
    match reply {
        Reply::Write(WriteReply::NotApplied(refusal)) | Reply::Read(Err(refusal)) => is_overloaded(refusal),
        Reply::Admin(AdminReply::Refused(refusal)) => is_overloaded(refusal),
        _ => false,
    }
}

/// For messages: a reply says nothing of itself.
fn what(reply: &Reply) -> String {
    match reply {
        Reply::Write(reply) => format!("{reply:?}"),
        Reply::Read(Err(refusal)) => format!("{refusal:?}"),
        Reply::Read(Ok(version)) => format!("a read at {}", version.applied_index()),
        Reply::Admin(reply) => format!("{reply:?}"),
    }
}

#[test]
fn with_all_queues_full_who_may_not_wait_is_refused_and_who_waits_goes_on_afterwards() {
    let Wired { driver, applier, snapshotter, backend, inbox, events, batches, orders, removals, .. } = wired(1);
    let (reply, replies) = bounded(4 * EVENTS_MAX);
    let by = Instant::now() + 2 * DEADLINE;
    let request = |number: u64| {
        let ask = if number.is_multiple_of(2) { Ask::Write(put(number)) } else { Ask::Read };
        ClientRequest { ask, deadline: by, reply: ReplyTo::Thread(reply.clone()) }
    };
    let me = NodeIdentity {
        cluster: Some(CLUSTER),
        id: 2,
        directory: 2,
        boot: 1,
        earlier_boots: [].into(),
        url: "http://127.0.0.1:1".to_owned(),
    };
    let hello = Hello::new(&me, 1, &LogPosition::default());
    let mut snapshot = Vec::new();
    let capture = || StateMachine::with_keys(10).capture(Arc::new(founders(1)));
    crate::snapshot::write(&capture(), CLUSTER, &mut snapshot).unwrap();
    let header = SnapshotHeader { index: 10, term: 1, leader_term: 1, bytes: snapshot.len() as u64 };

    let inbox = Arc::new(inbox);
    // The applier stands still: it is the one that nobody may wait for in a circle.
    let driving = spawn(move || driver.run());
    let snapshotting = spawn(move || snapshotter.run());
    // Without a leader requests wait elsewhere.
    wait_until("a leader", || backend.status(by).is_ok_and(|status| status.leader == 1));
    let mut sent: usize = 0;
    wait_until("a full queue of events", || {
        while !events.is_full() {
            backend.submit(&mut vec![request(sent as u64)]);
            match replies.try_recv() {
                // It was full, and the driver has gone on: it waits for the applier only after some turns.
                Ok(reply) => assert!(is_refused(&reply) && what(&reply).contains(QUEUE_FULL), "{}", what(&reply)),
                Err(_) => sent += 1,
            }
        }
        batches.is_full() && events.is_full()
    });
    assert_eq!((events.len(), batches.len()), (EVENTS_MAX, APPLY_BATCHES_MAX));

    // Those who wait, and are let go when there is room.
    let peers = [heartbeat_of_stranger(), append_of_stranger(), append_of_stranger()];
    let delivering = peers.map(|message| {
        let inbox = inbox.clone();
        spawn(move || inbox.deliver(9, vec![message]))
    });
    wait_until("the bytes of one of the large ones", || inbox.peer_bytes.used() > PEER_BYTES_MAX / 2);
    let receiving = {
        let inbox = inbox.clone();
        spawn(move || inbox.receive_snapshot(2, &header, &mut &snapshot[..]))
    };
    wait_until("a snapshot that is received", || inbox.receiving.load(Ordering::Relaxed));
    let transferring = {
        let events = events.clone();
        spawn(move || events.send(Event::SnapshotSent(2, false)).is_ok())
    };
    for _ in 0..=CAPTURES_MAX {
        let order = ToSnapshotter { capture: Box::new(capture()), reply: None };
        orders.send(order).unwrap();
    }
    wait_until("a snapshotter that waits behind what it wrote", || orders.is_full());
    removals.send(1).unwrap();
    assert!(removals.is_full());

    // Those who are refused.
    for number in 0..10 {
        backend.submit(&mut vec![request(number)]);
        assert!(is_refused(&replies.try_recv().unwrap()));
    }
    let stale = || ClientRequest { ask: Ask::StaleRead, deadline: by, reply: ReplyTo::Thread(reply.clone()) };
    for _ in 0..VERSION_REQUESTS_MAX {
        backend.submit(&mut vec![stale()]);
    }
    assert!(replies.is_empty(), "stale reads do not wait in the queue that is full");
    backend.submit(&mut vec![stale()]);
    assert!(is_refused(&replies.try_recv().unwrap()));
    let mut session = backend.session();
    let refused = backend.write(&mut session, put(0), by);
    assert!(matches!(&refused, WriteReply::NotApplied(refusal) if is_overloaded(refusal)), "{refused:?}");
    assert!(backend.read(&mut session, by).is_err_and(|refusal| is_overloaded(&refusal)));
    assert!(backend.status(by).is_err_and(|refusal| is_overloaded(&refusal)));
    assert!(backend.snapshot(by).is_err_and(|refusal| is_overloaded(&refusal)));
    let transfer = || backend.admin(AdminRequest::TransferLeader { id: 1 }, by);
    assert!(is_refused(&Reply::Admin(transfer())));
    assert!(matches!(inbox.hello(&hello), Err(HelloRefusal::NotReady(_))), "after a while");
    assert!(matches!(inbox.offer_snapshot(3, &header), Err(SnapshotRefusal::Unwanted(_))));
    assert!(backend.newest().is_some(), "what is published is read all the same");

    // All of them still wait.
    assert!(delivering.iter().all(|peer| !peer.is_finished()));
    assert!(!receiving.is_finished() && !transferring.is_finished());
    assert!(!driving.is_finished() && !snapshotting.is_finished());
    assert!(replies.is_empty());

    // The pressure is gone.
    let applying = spawn(move || applier.run());
    for _ in 0..sent + VERSION_REQUESTS_MAX {
        let reply = replies.recv_timeout(DEADLINE).expect("each of them is answered");
        let is_done = matches!(reply, Reply::Write(WriteReply::Applied(_)) | Reply::Read(Ok(_)));
        assert!(is_done, "{}", what(&reply));
    }
    delivering.into_iter().for_each(|peer| assert_eq!(peer.join().unwrap(), Ok(())));
    assert_eq!(receiving.join().unwrap(), Ok(()));
    assert!(transferring.join().unwrap());
    wait_until("the driver to take all of it", || inbox.peer_bytes.used() == 0);
    assert!(inbox.hello(&hello).is_ok());
    assert!(matches!(backend.write(&mut session, put(0), by), WriteReply::Applied(_)));
    assert!(backend.read(&mut session, by).is_ok_and(|version| version.keys() == sent.div_ceil(2)));
    assert!(backend.status(by).is_ok());
    assert!(!is_refused(&Reply::Admin(transfer())));
    wait_until("a snapshotter that has nothing to do", || orders.is_empty() && removals.is_empty());
    assert!(backend.snapshot(by).is_ok());

    events.send(Event::Stop).unwrap();
    assert_eq!(driving.join().unwrap().unwrap(), DriverEnd::Stopped);
    // They end when nobody is left who gives them anything.
    drop((backend, batches, orders, removals));
    assert_eq!(applying.join().unwrap(), Ok(()));
    assert_eq!(snapshotting.join().unwrap(), Ok(()));
}

#[test]
fn without_a_leader_so_many_requests_wait_and_no_more_until_their_deadline() {
    let Wired { driver, backend, events, sent, .. } = wired(3);
    let (reply, replies) = bounded(PENDING_WRITES_MAX + PENDING_READS_MAX + 100);
    // Long enough to fill all of it on a slow machine.
    let by = Instant::now() + Duration::from_secs(8);
    let request = |ask| ClientRequest { ask, deadline: by, reply: ReplyTo::Thread(reply.clone()) };
    let fill = |max: usize, ask: fn(u64) -> Ask| {
        let mut numbers = 0..max as u64;
        while !numbers.is_empty() {
            wait_until("room for more events", || events.is_empty());
            let mut some: Vec<_> = numbers.by_ref().take(EVENTS_MAX / 2).map(|number| request(ask(number))).collect();
            backend.submit(&mut some);
        }
        wait_until("all of them to be taken", || events.is_empty());
        backend.submit(&mut vec![request(ask(0))]);
        let refused = replies.recv_timeout(DEADLINE).unwrap();
        assert!(is_refused(&refused), "one more than may wait");
    };
    let driving = spawn(move || driver.run());
    fill(PENDING_WRITES_MAX, |number| Ask::Write(put(number)));
    fill(PENDING_READS_MAX, |_| Ask::Read);
    for _ in 0..=crate::administration::PENDING_ADMIN_MAX {
        let request = AdminRequest::RemoveMember { id: 3 };
        events.send(Event::Admin { request, deadline: by, reply: ReplyTo::Thread(reply.clone()) }).unwrap();
    }
    assert!(is_refused(&replies.recv_timeout(DEADLINE).unwrap()), "one change of the cluster more than may wait");

    // What other nodes forward is sent back at once: here is no leader.
    let forward = ForwardedWrite { id: RequestId { node: 2, boot: 1, sequence: 1 }, data: put(1) };
    let share = ByteBudget::new(PEER_BYTES_MAX).take(1).unwrap();
    let forward = PeerMessage::Forward { name: ForwardName::default(), writes: vec![forward] };
    events.send(Event::Peer(2, vec![forward], share)).unwrap();
    wait_until("a refused forward", || {
        let refused = |message| matches!(message, (2, PeerMessage::ForwardRefused { .. }));
        sent.try_iter().any(refused)
    });

    // At the deadline all who waited are told, and there is room for as many again.
    for _ in 0..PENDING_WRITES_MAX + PENDING_READS_MAX + crate::administration::PENDING_ADMIN_MAX {
        let reply = replies.recv_timeout(DEADLINE).expect("each of them is answered");
        // Without a majority no change can be decided: that is told as soon as it is known.
        let is_known = matches!(reply, Reply::Admin(AdminReply::Refused(Refusal::Conflict(_))));
        assert!(is_known || (!is_refused(&reply) && Instant::now() >= by), "{} before its deadline", what(&reply));
    }
    backend.submit(&mut vec![request(Ask::Write(put(0))), request(Ask::Read)]);
    for _ in 0..2 {
        let reply = replies.recv_timeout(DEADLINE).unwrap();
        assert!(!is_refused(&reply), "nothing is too much any more");
    }
    events.send(Event::Stop).unwrap();
    assert_eq!(driving.join().unwrap().unwrap(), DriverEnd::Stopped);
}

#[test]
fn a_leader_sends_back_more_forwarded_writes_than_may_wait() {
    let Wired { driver, applier, events, sent, .. } = wired(1);
    let (term, number) = (driver.replica.core().term(), Cell::new(0));
    let forward = |count: usize| {
        number.set(number.get() + 1);
        let name = ForwardName { term, boot: 1, number: number.get() };
        let writes = (1..=count as u64)
            .map(|sequence| ForwardedWrite { id: RequestId { node: 2, boot: 1, sequence }, data: put(0) });
        let share = ByteBudget::new(PEER_BYTES_MAX).take(1).unwrap();
        events.send(Event::Peer(2, vec![PeerMessage::Forward { name, writes: writes.collect() }], share)).unwrap();
    };
    let publication = applier.publication.clone();
    let driving = spawn(move || driver.run());
    let applying = spawn(move || applier.run());
    // Before it leads it sends back everything.
    wait_until("a leader that takes one", || {
        forward(1);
        publication.keys() == 1
    });
    sent.try_iter().for_each(drop);
    forward(FORWARDED_MAX + 1);
    let (to, refused) = sent.recv_timeout(DEADLINE).unwrap();
    let PeerMessage::ForwardRefused { ids, reason: ForwardRefusal::Dropped } = refused else {
        panic!("{refused:?}");
    };
    assert_eq!((to, ids.len()), (2, FORWARDED_MAX + 1));
    let before = publication.applied_index();
    forward(1000);
    wait_until("fewer to be taken", || publication.applied_index() >= before + 1000);
    events.send(Event::Stop).unwrap();
    assert_eq!(driving.join().unwrap().unwrap(), DriverEnd::Stopped);
    assert_eq!(applying.join().unwrap(), Ok(()));
}

#[test]
fn a_stale_read_is_served_behind_orders_that_publish_nothing() {
    let Wired { driver, applier, backend, batches, .. } = wired(1);
    while batches.try_send(ToApplier::DiskShort).is_ok() {}
    let (reply, replies) = bounded(1);
    let deadline = Instant::now() + DEADLINE;
    backend.submit(&mut vec![ClientRequest { ask: Ask::StaleRead, deadline, reply: ReplyTo::Thread(reply) }]);
    let applying = spawn(move || applier.run());
    let Ok(Reply::Read(Ok(version))) = replies.recv_timeout(DEADLINE) else { panic!("a stale read is answered") };
    assert_eq!(version.applied_index(), backend.applied().0);
    drop((driver, backend, batches));
    assert_eq!(applying.join().unwrap(), Ok(()));
}

/// The rows of the table in this module's documentation, cell by cell.
fn table() -> Vec<Vec<&'static str>> {
    let lines = include_str!("../node.rs").lines().filter_map(|line| line.strip_prefix("//! | "));
    let rows = lines.map(|line| line.trim_end_matches('|').split(" | ").map(str::trim).collect());
    rows.filter(|row: &Vec<&str>| row.len() == 5 && row[0] != "who").collect()
}

#[test]
fn nobody_waits_in_a_circle() {
    let rows = table();
    assert!(rows.len() > 20, "{rows:?}");
    for row in &rows {
        let does = ["waits", "refuses", "drops"];
        assert!(does.iter().any(|word| row[4].starts_with(word)), "what happens when it is full? {row:?}");
    }
    let mut waits: BTreeSet<(&str, &str)> =
        rows.iter().filter(|row| row[4].starts_with("waits")).map(|row| (row[0], row[1])).collect();
    for known in [("driver", "applier"), ("snapshotter", "driver"), ("peer connection", "driver")] {
        assert!(waits.contains(&known), "{known:?} among {waits:?}");
    }
    // Whom nobody waits for is in no circle; without him another one may be free.
    while !waits.is_empty() {
        let before = waits.len();
        let waited_for: BTreeSet<&str> = waits.iter().map(|(_, whom)| *whom).collect();
        waits.retain(|(who, _)| waited_for.contains(who));
        assert!(waits.len() < before, "a circle: {waits:?}");
    }
}

/// All `NAME` in `bounded(NAME)` under a directory.
fn bounds_in(directory: &Path, names: &mut BTreeSet<String>) {
    for entry in std::fs::read_dir(directory).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            bounds_in(&path, names);
            continue;
        }
        let text = std::fs::read_to_string(&path).unwrap();
        let is_constant = |name: &&str| name.ends_with("_MAX") && name.bytes().all(|byte| byte != b' ' && byte != b'.');
        let calls = text.split("bounded(").skip(1).filter_map(|rest| rest.split(')').next());
        names.extend(calls.filter(is_constant).map(str::to_owned));
    }
}

#[test]
fn the_table_names_the_room_of_every_queue() {
    let mut names = BTreeSet::new();
    bounds_in(&Path::new(env!("CARGO_MANIFEST_DIR")).join("src"), &mut names);
    assert!(names.len() >= 4, "{names:?}");
    let room: Vec<&str> = table().into_iter().map(|row| row[3]).collect();
    for name in names {
        assert!(room.iter().any(|room| room.contains(&format!("`{name}`"))), "{name} is in no row");
    }
}
