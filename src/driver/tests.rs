//! A driver whose peers, disk and applier are in a test's hands.

use crossbeam_channel::bounded;
use raft::eraftpb::MessageType;

use super::*;
use crate::byte_budget::ByteBudget;
use crate::command::{Command, Condition};
use crate::fixtures::{ELECTION_TICKS, core_on, founders, log_on, voter_and_learner};
use crate::memory_disk::MemoryDisk;
use crate::message::WriteReply;
use crate::store::Version;

/// Within which everything here happens, on a busy machine too.
const DEADLINE: Duration = Duration::from_secs(60);

/// A network that reaches nobody, or a test.
#[derive(Default)]
struct Nobody {
    failed: Option<String>,
    /// Gets what is sent.
    sent: Option<Sender<PeerMessage>>,
    /// Comes in while the last messages are sent.
    late: Option<(Sender<Event>, Event)>,
}

impl Network for Nobody {
    fn send(&mut self, _to: NodeId, message: PeerMessage) -> bool {
        self.sent.as_ref().is_some_and(|sent| sent.try_send(message).is_ok())
    }

    fn send_snapshot(&mut self, _to: NodeId, _message: Message) -> bool {
        false
    }

    fn transfer(&self, _to: NodeId) -> Option<Transfer> {
        None
    }

    fn follow(&mut self, _membership: &Arc<Membership>) {}

    fn hello(&mut self, _: &Hello, _: Promises, _: &Membership) -> Result<HelloAnswer, HelloRefusal> {
        Err(HelloRefusal::NotReady("it is a test".to_owned()))
    }

    fn failed(&self) -> Option<&str> {
        self.failed.as_deref()
    }

    fn stop(&mut self, _within: Duration) {
        if let Some((events, event)) = self.late.take() {
            events.send(event).unwrap();
        }
    }

    fn directory(&self, _member: NodeId) -> Option<u128> {
        None
    }

    fn position(&mut self, _term: u64, _last_index: u64) {}
}

/// A driver of one of `members`, and the ends of its queues.
fn driver(members: u64, network: Nobody) -> (Driver<Nobody>, Sender<Event>, Receiver<ToApplier>) {
    driver_among(&founders(members), network)
}

/// The same, of one of these.
fn driver_among(founders: &Membership, network: Nobody) -> (Driver<Nobody>, Sender<Event>, Receiver<ToApplier>) {
    let disk = MemoryDisk::new();
    let core = core_on(log_on(&disk, 1, founders), 1, founders);
    let (events_tx, events) = bounded(EVENTS_MAX);
    let (applier, batches) = bounded(APPLY_BATCHES_MAX);
    let (removals, _) = bounded(1);
    let started = Instant::now();
    let room = Room::new(Arc::new(disk), Arc::new(Publication::new(Version::default())), u64::MAX, FREE_BYTES_RESERVE);
    let driver = Driver {
        replica: Replica::new(core, 1, ELECTION_TICKS),
        events,
        applier,
        network,
        options: DriverOptions {
            heartbeat_interval: Duration::from_millis(10),
            snapshot_catchup_entries: 0,
            removals,
            room,
        },
        progress: Progress::new(started),
        started,
        more: false,
        announce_by: None,
        snapshot_asked: None,
        measures: Measures::new(Arc::default()),
        offences: Offences::default(),
    };
    (driver, events_tx, batches)
}

#[test]
fn offences_are_counted_by_peer_and_cause_and_not_all_of_them_are_logged() {
    let mut offences = Offences::default();
    let (malformed, of_type) = (Offence::Malformed("it is"), Offence::Type(MessageType::MsgHup));
    let logged: Vec<u64> = (0..100).filter_map(|_| offences.count(2, &malformed)).collect();
    assert_eq!(logged, [1, 2, 4, 8, 16, 32, 64]);
    assert_eq!(offences.count(3, &malformed), Some(1), "another peer");
    assert_eq!(offences.count(2, &of_type), Some(1), "another cause");
    assert_eq!(offences.count(2, &malformed), None);

    let mut network = Nobody::default();
    let mut measures = Measures::new(Arc::default());
    let (applier, _batches) = bounded(APPLY_BATCHES_MAX);
    let mut host = DriverHost {
        network: &mut network,
        offences: &mut offences,
        measures: &mut measures,
        applier: &applier,
        batch: Vec::new(),
    };
    host.offended(4, Offence::Stranger(4));
    host.offended(5, Offence::Removed(5));
    host.offended(6, of_type);
    let counted: Vec<_> = offences.0.iter().map(|((from, _), count)| (*from, *count)).collect();
    assert_eq!(counted.iter().filter(|(from, _)| *from >= 4).collect::<Vec<_>>(), [&(6, 1)], "the others are ordinary");
    assert!(counted.contains(&(2, 101)), "{counted:?}");
}

#[test]
fn a_disk_that_lost_a_sync_ends_the_driver() {
    let (driver, events, _batches) = driver(1, Nobody::default());
    events.send(Event::Failed("the disk".to_owned())).unwrap();
    assert_eq!(driver.run().unwrap(), DriverEnd::Failed("the disk".to_owned()));

    // Found while a peer introduced itself.
    let (driver, events, _batches) =
        self::driver(1, Nobody { failed: Some("the list of peers".to_owned()), ..Nobody::default() });
    let me = crate::peer_protocol::NodeIdentity {
        cluster: None,
        id: 2,
        directory: 2,
        boot: 1,
        earlier_boots: Arc::default(),
        url: String::new(),
    };
    let hello = Hello::new(&me, 1, &crate::peer_protocol::LogPosition::default());
    let (reply, answers) = bounded(1);
    events.send(Event::Hello(Box::new(hello), reply)).unwrap();
    assert_eq!(driver.run().unwrap(), DriverEnd::Failed("the list of peers".to_owned()));
    assert!(answers.recv().unwrap().is_err());
}

#[test]
fn at_its_end_the_driver_sends_its_last_messages_and_refuses_who_comes_late() {
    for end in [
        (Event::Stop, DriverEnd::Stopped),
        (Event::Removed(2), DriverEnd::Removed),
        (Event::Disowned(2, HelloRefusal::OtherDirectory), DriverEnd::Disowned(String::new())),
    ] {
        let (mut driver, events, _batches) = driver(1, Nobody::default());
        let (reply, replies) = bounded(2);
        let request = |ask| {
            let (deadline, reply) = (Instant::now() + DEADLINE, ReplyTo::Thread(reply.clone()));
            ClientRequest { ask, deadline, reply }
        };
        let late = Event::Clients(
            vec![request(Ask::Read), request(Ask::Write(bytes::Bytes::from_static(b"command")))],
            QueuedRequests::default().admit(2).unwrap(),
        );
        driver.network.late = Some((events.clone(), late));
        events.send(end.0).unwrap();
        let ended = driver.run().unwrap();
        assert_eq!(std::mem::discriminant(&ended), std::mem::discriminant(&end.1), "{ended:?}");
        let answers = [replies.recv_timeout(DEADLINE).unwrap(), replies.recv_timeout(DEADLINE).unwrap()];
        assert!(matches!(
            answers,
            [Reply::Read(Err(Refusal::Stopping)), Reply::Write(WriteReply::NotApplied(Refusal::Stopping))]
        ));
    }
}

#[test]
fn requests_in_events_are_counted() {
    let queued = QueuedRequests::default();
    let half = queued.admit(EVENTS_MAX / 2).unwrap();
    let rest = queued.admit(EVENTS_MAX - EVENTS_MAX / 2).unwrap();
    assert!(queued.admit(1).is_none());
    assert!(queued.admit(1).is_none(), "what was not admitted is not counted");
    drop(half);
    assert!(queued.admit(1).is_some());
    drop(rest);
    assert!(queued.admit(EVENTS_MAX).is_some());
}

#[test]
fn followers_hear_of_a_commit_soon_though_nothing_is_proposed_behind_it() {
    let (sent_tx, sent) = bounded(100);
    let (mut driver, events, _batches) =
        driver_among(&voter_and_learner(), Nobody { sent: Some(sent_tx), ..Nobody::default() });
    // No heartbeat tells them.
    driver.options.heartbeat_interval = 2 * DEADLINE;
    let driving = thread::Builder::new().spawn(move || driver.run()).unwrap();
    let (reply, _replies) = bounded(1);
    let put = Command::encode_put(b"key", b"value", &Condition::default(), None).into();
    let request =
        ClientRequest { ask: Ask::Write(put), deadline: Instant::now() + 2 * DEADLINE, reply: ReplyTo::Thread(reply) };
    events.send(Event::Client(request)).unwrap();
    let mut written = None;
    loop {
        let PeerMessage::Raft(append) = sent.recv_timeout(DEADLINE).expect("it was not told") else { continue };
        if append.msg_type != MessageType::MsgAppend {
            continue;
        }
        let last = append.index + append.entries.len() as u64;
        if append.entries.iter().any(|entry| !entry.data.is_empty()) {
            written = Some(last);
        }
        if written.is_some_and(|index| append.commit >= index) {
            break;
        }
        let message = Message {
            msg_type: MessageType::MsgAppendResponse,
            from: 2,
            to: 1,
            term: append.term,
            index: last,
            ..Message::default()
        };
        let share = ByteBudget::new(1).take(1).unwrap();
        events.send(Event::Peer(2, vec![PeerMessage::Raft(message)], share)).unwrap();
    }
    events.send(Event::Stop).unwrap();
    assert_eq!(driving.join().unwrap().unwrap(), DriverEnd::Stopped);
}

#[test]
fn the_applier_hears_that_the_disk_is_short() {
    let (mut driver, events, batches) = driver(1, Nobody::default());
    let publication = Arc::new(Publication::new(Version::default()));
    let disk = MemoryDisk::new();
    disk.set_capacity(Some(1 << 20));
    driver.options.room = Room::new(Arc::new(disk), publication, u64::MAX, 2 << 20);
    let driving = thread::Builder::new().spawn(move || driver.run()).unwrap();
    let is_said = |message| matches!(message, ToApplier::DiskShort);
    while !is_said(batches.recv_timeout(DEADLINE).expect("nobody says so")) {}
    events.send(Event::Stop).unwrap();
    assert_eq!(driving.join().unwrap().unwrap(), DriverEnd::Stopped);
}

#[test]
fn a_sync_does_not_wait_for_a_full_applier_and_nothing_is_lost() {
    let (mut network, mut offences) = (Nobody::default(), Offences::default());
    let mut measures = Measures::new(Arc::default());
    let (applier, batches) = bounded(1);
    let mut host = DriverHost {
        network: &mut network,
        offences: &mut offences,
        measures: &mut measures,
        applier: &applier,
        batch: Vec::new(),
    };
    for index in 1..=3 {
        host.apply(Apply::Nothing { index, term: 1 });
        host.before_sync();
    }
    let index = |apply: &Apply<ReplyTo>| if let Apply::Nothing { index, .. } = apply { *index } else { 0 };
    let taken = || match batches.try_recv() {
        Ok(ToApplier::Batch(batch)) => batch.iter().map(index).collect(),
        _ => Vec::new(),
    };
    assert_eq!(taken(), [1]);
    host.pass_on(true);
    assert_eq!(taken(), [2, 3]);
}
