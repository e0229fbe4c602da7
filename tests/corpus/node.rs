//! One node on a disk in memory, and what must hold of it whatever it is told.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use raft::eraftpb::{HardState, Message, MessageType};
use raftexample::applier::Applier;
use raftexample::data_dir::{self, Beginning, OpenOptions, Received, SnapshotFiles};
use raftexample::disk::Disk;
use raftexample::membership::{ClusterId, Membership, NodeId};
use raftexample::memory_disk::MemoryDisk;
use raftexample::message::AdminRequest;
use raftexample::message_check::Offence;
use raftexample::peer_protocol::{PeerMessage, SnapshotHeader};
use raftexample::raft_core::{CoreError, CoreOptions, RaftCore};
use raftexample::raft_log::LogOptions;
use raftexample::replica::{Answer, Apply, Host, Replica};
use raftexample::store::Replacement;

pub const CLUSTER: ClusterId = ClusterId([7; 16]);
pub const ELECTION_TICKS: usize = 5;
const ME: NodeId = 1;
const TICK: Duration = Duration::from_millis(100);

/// The node has ended, for a reason that it names.
#[derive(Debug)]
pub struct Ended;

pub type Result<T> = std::result::Result<T, Ended>;

pub fn founders(count: u64) -> Membership {
    Membership::founding((1..=count).map(|id| (id, format!("http://127.0.0.1:1238{id}"))))
}

/// What the node did during one call, in order.
#[derive(Default)]
struct Done {
    apply: Vec<Apply<u32>>,
    sent: Vec<(NodeId, PeerMessage)>,
    answered: Vec<u32>,
}

impl Host<u32> for Done {
    fn send(&mut self, to: NodeId, message: PeerMessage) -> bool {
        self.sent.push((to, message));
        // Peers beyond the members have no connection.
        to < 8
    }

    fn send_snapshot(&mut self, to: NodeId, message: Message) -> bool {
        assert_eq!((message.from, message.to), (ME, to));
        to < 4
    }

    fn apply(&mut self, apply: Apply<u32>) {
        self.apply.push(apply);
    }

    fn answer(&mut self, waiter: u32, _answer: Answer) {
        self.answered.push(waiter);
    }

    fn offended(&mut self, _from: NodeId, _offence: Offence) {}
}

struct Process {
    replica: Replica<u32>,
    applier: Applier,
    files: SnapshotFiles,
    boot: u64,
    now: Duration,
    /// The highest commit index that it showed.
    commit: u64,
    /// Who has not been answered yet.
    waiting: BTreeSet<u32>,
}

pub struct Node {
    disk: MemoryDisk,
    beginning: Beginning,
    process: Process,
    /// What was handed out, by index: the term, and what it says.
    committed: BTreeMap<u64, (u64, String)>,
    /// For whom it voted, by term, in all of its runs.
    votes: BTreeMap<u64, NodeId>,
    /// The highest term that it spoke in.
    term: u64,
    waiters: u32,
    /// What it said since somebody listened.
    said: Vec<Message>,
    /// Messages of peers that it took in since it did anything about them.
    taken_in: usize,
}

impl Node {
    pub fn start(beginning: Beginning) -> Node {
        let disk = MemoryDisk::new();
        let process = Process::start(&disk, &beginning);
        let (committed, votes) = (BTreeMap::new(), BTreeMap::new());
        let mut node =
            Node { disk, beginning, process, committed, votes, term: 0, waiters: 0, said: Vec::new(), taken_in: 0 };
        node.process().expect("a new node works");
        node
    }

    pub fn core(&self) -> &RaftCore {
        self.process.replica.core()
    }

    pub fn boot(&self) -> u64 {
        self.process.boot
    }

    /// What it said to others since this was asked last.
    pub fn take_said(&mut self) -> Vec<Message> {
        std::mem::take(&mut self.said)
    }

    fn call<T>(
        &mut self,
        call: impl FnOnce(&mut Replica<u32>, &mut Done) -> std::result::Result<T, CoreError>,
    ) -> Result<T> {
        let mut done = Done::default();
        let result = call(&mut self.process.replica, &mut done);
        // What it did before it ended counts.
        self.look_at(done)?;
        match result {
            Ok(value) => Ok(value),
            Err(CoreError::Entry { .. } | CoreError::LostLog { .. }) => Err(Ended),
            Err(error) => panic!("the node ended over what a peer said: {error}"),
        }
    }

    /// A tick, behind which the node does what there is to do, as the driver lets it: no second one comes before.
    pub fn tick(&mut self) -> Result<()> {
        self.process.now += TICK;
        let now = self.process.now;
        self.call(|replica, done| {
            replica.tick(now, done);
            replica.record_directories(&|id| Some(u128::from(id)));
            Ok(())
        })?;
        self.process()
    }

    pub fn process(&mut self) -> Result<()> {
        for _ in 0..100 {
            if !self.call(|replica, done| replica.process(done))? {
                self.taken_in = 0;
                return Ok(());
            }
        }
        panic!("the node is never done");
    }

    pub fn peer(&mut self, from: NodeId, message: PeerMessage) -> Result<()> {
        self.taken_in += 1;
        self.call(|replica, done| replica.peer(from, message, done))
    }

    fn waiter(&mut self) -> u32 {
        self.waiters += 1;
        self.process.waiting.insert(self.waiters);
        self.waiters
    }

    pub fn write(&mut self, command: Bytes, patience: Duration) -> Result<()> {
        let (waiter, deadline) = (self.waiter(), self.process.now + patience);
        self.call(|replica, done| {
            replica.write(command, deadline, waiter, done);
            Ok(())
        })
    }

    pub fn read(&mut self, patience: Duration) -> Result<()> {
        let (waiter, deadline) = (self.waiter(), self.process.now + patience);
        self.call(|replica, done| {
            replica.read(deadline, waiter, done);
            Ok(())
        })
    }

    pub fn admin(&mut self, request: AdminRequest, patience: Duration) -> Result<()> {
        let (waiter, deadline) = (self.waiter(), self.process.now + patience);
        self.call(|replica, done| {
            replica.admin(request, deadline, waiter, done);
            Ok(())
        })
    }

    /// Takes a snapshot of what is applied, and keeps so many entries behind it.
    pub fn take_snapshot(&mut self, keep: u64) -> Result<()> {
        let capture = self.process.applier.capture();
        // A joiner that was sent nothing yet has nothing to keep.
        if capture.index() == 0 {
            return Ok(());
        }
        self.process.files.write(&capture).expect("the disk is good");
        let (index, membership) = (capture.index(), capture.membership().clone());
        self.call(|replica, _| replica.snapshot_written(index, membership, index.saturating_sub(keep)))
    }

    /// Takes a snapshot's file from a peer, as the peer server does.
    pub fn receive_snapshot(&mut self, from: NodeId, header: SnapshotHeader, file: &[u8]) -> Result<()> {
        self.taken_in += 1;
        let SnapshotHeader { index, term, leader_term, .. } = header;
        let Ok(received) = self.process.files.receive(index, term, &mut &file[..]) else { return Ok(()) };
        let Received { state, membership, .. } = received;
        let mut message =
            Message { msg_type: MessageType::MsgSnapshot, from, to: ME, term: leader_term, ..Message::default() };
        let metadata = message.mut_snapshot().mut_metadata();
        (metadata.index, metadata.term) = (index, term);
        metadata.set_conf_state(membership.conf_state.clone());
        let state = Box::new(Replacement::new(state, drop));
        self.call(|replica, done| replica.snapshot_received(from, message, membership, state, done))
    }

    /// What the node hears of its surroundings.
    pub fn hear_of(&mut self, what: usize, id: NodeId, flag: bool) -> Result<()> {
        self.call(|replica, _| {
            match what {
                0 => replica.unreachable(id),
                1 => replica.snapshot_sent(id, flag),
                2 => replica.set_full(flag.then(|| "full".to_owned())),
                3 => drop(replica.hand_over()),
                _ => drop((replica.promises(id), replica.status(), replica.take_snapshot_wanted())),
            }
            Ok(())
        })
    }

    /// The power fails, and comes back.
    pub fn crash(&mut self, seed: u64) -> Result<()> {
        let before = OnDisk::of(self.core());
        self.disk.crash(seed);
        self.process = Process::start(&self.disk, &self.beginning);
        let after = OnDisk::of(self.core());
        assert_eq!(before, after, "the log was synced, and is not what it was");
        self.check_log();
        // From here on the node knows no more to be committed than it wrote down, and a leader that lies can replace
        // the rest: against that Raft has no defence.
        let commit = self.core().commit_index();
        self.committed.retain(|index, _| *index <= commit);
        self.said.clear();
        self.process()
    }

    fn look_at(&mut self, done: Done) -> Result<()> {
        for (to, message) in &done.sent {
            assert_ne!(*to, ME, "the node sends to itself: {message:?}");
            if let PeerMessage::Raft(message) = message {
                assert_eq!((message.from, message.to), (ME, *to));
                self.look_at_message(message);
                self.said.push(message.clone());
            }
        }
        let excess = self.said.len().saturating_sub(64);
        self.said.drain(..excess);
        let mut answered = done.answered;
        let mut ended = Ok(());
        for apply in done.apply {
            self.look_at_apply(&apply);
            let mut told = Vec::new();
            if self.process.applier.apply(apply, &mut told).is_err() {
                ended = Err(Ended);
                break;
            }
            answered.extend(told.into_iter().map(|(waiter, _)| waiter));
        }
        for waiter in answered {
            assert!(self.process.waiting.remove(&waiter), "a request was answered twice");
        }
        let commit = self.core().commit_index();
        assert!(commit >= self.process.commit, "the commit index fell");
        self.process.commit = commit;
        ended?;
        self.check_log();
        Ok(())
    }

    fn look_at_apply(&mut self, apply: &Apply<u32>) {
        let applied = self.process.applier.applied_index();
        let (index, term, content) = match apply {
            Apply::Command { index, term, id, command, .. } => (*index, *term, format!("{id:?} {command:?}")),
            Apply::Nothing { index, term } => (*index, *term, "nothing".to_owned()),
            Apply::Membership { index, term, membership } => {
                (*index, *term, membership.encode().escape_ascii().to_string())
            }
            Apply::Restore { index, .. } => {
                assert!(*index > applied, "a snapshot of {index} took the place of what was applied up to {applied}");
                return;
            }
            Apply::Reads(_) | Apply::Admin(_) => return,
        };
        assert_eq!(index, applied + 1, "what is handed out has a gap");
        let said = (term, content);
        let before = self.committed.entry(index).or_insert_with(|| said.clone());
        assert_eq!(*before, said, "what was committed at {index} is now another");
    }

    fn look_at_message(&mut self, message: &Message) {
        let granted = match message.msg_type {
            MessageType::MsgRequestVote => ME,
            MessageType::MsgRequestVoteResponse if !message.reject => message.to,
            _ => 0,
        };
        if granted != 0 {
            let voted = *self.votes.entry(message.term).or_insert(granted);
            assert_eq!(voted, granted, "two votes in term {}", message.term);
        }
        match message.msg_type {
            // They speak of a term that nobody has reached, or of none.
            MessageType::MsgRequestPreVote | MessageType::MsgRequestPreVoteResponse | MessageType::MsgReadIndex => {}
            _ => {
                assert!(message.term >= self.term, "it speaks in term {} after {}", message.term, self.term);
                self.term = message.term;
            }
        }
        // A later message of a leader that lies may have taken back what an earlier one brought, before it was written.
        if message.msg_type == MessageType::MsgAppendResponse && !message.reject && self.taken_in <= 1 {
            let last_index = self.core().log().last_index();
            assert!(message.index <= last_index, "index {} is acknowledged, {last_index} is the last", message.index);
        }
    }

    /// What was committed is still in the log, as far as that reaches back.
    fn check_log(&self) {
        let log = self.core().log();
        for (index, (term, _)) in self.committed.range(log.first_index()..) {
            assert_eq!(log.term(*index).ok(), Some(*term), "what was committed at {index} is gone");
        }
    }
}

impl Process {
    fn start(disk: &MemoryDisk, beginning: &Beginning) -> Process {
        let disk: Arc<dyn Disk> = Arc::new(disk.clone());
        let log = LogOptions { segment_bytes: 16 << 10, cache_bytes: 2000 };
        let (id, cluster, beginning) = (ME, CLUSTER, beginning.clone());
        let options = OpenOptions { id, cluster, beginning, directory: 1, boot_random: 7, log };
        let opened = data_dir::open(&disk, &options).unwrap_or_else(|error| panic!("it does not start: {error}"));
        let options = CoreOptions {
            id,
            election_ticks: ELECTION_TICKS,
            election_seed: opened.boot,
            membership: opened.membership.clone(),
            snapshot_index: opened.snapshot_index,
            logger: slog::Logger::root(slog::Discard, slog::o!()),
        };
        let core = RaftCore::open(opened.log, options).unwrap_or_else(|error| panic!("it does not start: {error}"));
        Process {
            commit: core.commit_index(),
            replica: Replica::new(core, opened.boot, ELECTION_TICKS),
            applier: Applier::new(opened.state, opened.membership),
            files: SnapshotFiles::new(disk, CLUSTER),
            boot: opened.boot,
            now: Duration::ZERO,
            waiting: BTreeSet::new(),
        }
    }
}

/// What the log says.
#[derive(Debug, PartialEq)]
struct OnDisk {
    hard_state: HardState,
    first_index: u64,
    terms: Vec<u64>,
}

impl OnDisk {
    fn of(core: &RaftCore) -> OnDisk {
        let log = core.log();
        let first_index = log.first_index();
        let terms = (first_index..=log.last_index()).map(|index| log.term(index).expect("it is there")).collect();
        OnDisk { hard_state: log.hard_state().clone(), first_index, terms }
    }
}
