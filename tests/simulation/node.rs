//! One node: a disk that outlives it, and the real parts of a node around a simulated driver.
//!
//! What threads do in a real node, events do here, and they come in any order that threads could bring about: the
//! replica digests some inputs before it processes them, the applier is behind it, and snapshots are written and sent
//! while all goes on.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use raft::eraftpb::{Message, MessageType};
use raftexample::acquaintances::Acquaintances;
use raftexample::applier::{Applier, Done};
use raftexample::data_dir::{self, Beginning, OpenOptions, SnapshotFiles};
use raftexample::disk::Disk;
use raftexample::membership::{ClusterId, Membership, NodeId};
use raftexample::memory_disk::MemoryDisk;
use raftexample::message_check::Offence;
use raftexample::peer_network::removal;
use raftexample::peer_protocol::{Hello, HelloRefusal, LogPosition, NodeIdentity, PeerMessage};
use raftexample::raft_core::{CoreOptions, RaftCore};
use raftexample::raft_log::LogOptions;
use raftexample::replica::{Answer, Apply, Host, Replica};
use raftexample::store::Capture;

use crate::invariants::{Checked, Content, Invariants, Shown};
use crate::random::Random;

/// The cluster of all runs.
pub const CLUSTER: ClusterId = ClusterId([7; 16]);

/// Who waits for an answer: a client, and which of its attempts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Waiter {
    pub client: usize,
    pub attempt: u64,
}

/// How nodes are set up in one run.
#[derive(Clone, Debug)]
pub struct Settings {
    pub heartbeat: Duration,
    pub election_ticks: usize,
    pub snapshot_count: u64,
    pub catchup_entries: u64,
    pub log: LogOptions,
}

impl Settings {
    /// Small snapshots and segments, so that much happens in little time.
    pub fn draw(random: &mut Random) -> Settings {
        Settings {
            heartbeat: Duration::from_millis(100),
            election_ticks: 5 + random.below(8) as usize,
            snapshot_count: *random.pick(&[3, 20, 100, 1000]),
            catchup_entries: *random.pick(&[0, 5, 100]),
            log: LogOptions {
                segment_bytes: *random.pick(&[4 << 10, 16 << 10, 256 << 10]),
                cache_bytes: *random.pick(&[0, 2 << 10, 1 << 20]),
            },
        }
    }

    /// Within which a healthy cluster has a leader again.
    pub fn election_time(&self) -> Duration {
        self.heartbeat * self.election_ticks as u32 * 2
    }
}

/// What a node does to the world.
pub enum Effect {
    Send(NodeId, PeerMessage),
    SendSnapshot(NodeId, Message),
    Answer(Waiter, Answer),
    Offended(NodeId, Offence),
}

/// The world as a replica sees it during one call.
pub struct SimulatedHost<'a> {
    id: NodeId,
    peers: &'a BTreeSet<NodeId>,
    transfers: &'a mut BTreeSet<NodeId>,
    queue: &'a mut VecDeque<Apply<Waiter>>,
    invariants: &'a mut Invariants,
    random: &'a mut Random,
    pub effects: &'a mut Vec<Effect>,
    pub checked: Checked,
}

impl SimulatedHost<'_> {
    fn note(&mut self, checked: Checked) {
        if self.checked.is_ok() {
            self.checked = checked;
        }
    }
}

/// One in so many messages comes over a new connection.
const RECONNECTS: u64 = 100;

/// How often a peer's queue is full: one in so many messages.
const QUEUE_FULL: u64 = 500;

impl Host<Waiter> for SimulatedHost<'_> {
    fn send(&mut self, to: NodeId, message: PeerMessage) -> bool {
        if let PeerMessage::Raft(message) = &message {
            let checked = if message.from == self.id && message.to == to {
                self.invariants.sends(message)
            } else {
                Err(format!("node {} sends a message from {} to {}", self.id, message.from, message.to))
            };
            self.note(checked);
        }
        if !self.peers.contains(&to) || self.random.one_in(QUEUE_FULL) {
            return false;
        }
        self.effects.push(Effect::Send(to, message));
        true
    }

    fn send_snapshot(&mut self, to: NodeId, message: Message) -> bool {
        let starts = self.peers.contains(&to) && self.transfers.insert(to);
        if starts {
            self.effects.push(Effect::SendSnapshot(to, message));
        }
        starts
    }

    fn apply(&mut self, apply: Apply<Waiter>) {
        let handed_out = match &apply {
            Apply::Command { index, term, id, command, .. } => {
                Some((*index, *term, Content::of(&(id.encode(), &command[..]))))
            }
            Apply::Nothing { index, term } => Some((*index, *term, Content::of(&"nothing"))),
            Apply::Membership { index, term, membership } => Some((*index, *term, Content::of(&membership.encode()))),
            Apply::Restore { .. } | Apply::Reads(_) | Apply::Admin(_) => None,
        };
        if let Some((index, term, content)) = handed_out {
            let checked = self.invariants.hands_out(self.id, index, term, content);
            self.note(checked);
        }
        self.queue.push_back(apply);
    }

    fn answer(&mut self, waiter: Waiter, answer: Answer) {
        self.effects.push(Effect::Answer(waiter, answer));
    }

    fn offended(&mut self, from: NodeId, offence: Offence) {
        self.effects.push(Effect::Offended(from, offence));
    }
}

/// A running node.
pub struct Process {
    id: NodeId,
    started: Duration,
    pub replica: Replica<Waiter>,
    pub applier: Applier,
    pub files: SnapshotFiles,
    queue: VecDeque<Apply<Waiter>>,
    me: NodeIdentity,
    /// Where the log ends, as hellos tell it.
    position: LogPosition,
    acquaintances: Acquaintances,
    /// Whose hello was taken, with their boot.
    met: BTreeSet<(NodeId, u64)>,
    /// Whom to talk to before this node has a membership.
    contacts: Membership,
    peers: BTreeSet<NodeId>,
    transfers: BTreeSet<NodeId>,
    snapshot_at: u64,
    /// A snapshot that is being written.
    pub capture: Option<Capture>,
    pub turn_planned: bool,
    pub apply_planned: bool,
    /// It has applied its own removal, and waits for a member to confirm it.
    pub retirement_planned: bool,
    random: Random,
}

/// Why a process ended or can't be started.
pub type Ended = String;

/// A machine with its disk, whether a node runs on it or not.
pub struct Machine {
    pub id: NodeId,
    pub disk: MemoryDisk,
    pub process: Option<Process>,
    /// Counts starts, so that events for an earlier process are told from those for this one.
    pub run: u64,
    /// The time between ticks: clocks differ.
    pub tick: Duration,
    /// Whether a fault was put into its disk, so that the node may end of it.
    pub disk_is_faulty: bool,
    /// Stopped until then, as by SIGSTOP.
    pub paused_until: Duration,
    /// Whether its node found that it was removed from the cluster: it never comes back.
    pub is_removed: bool,
}

impl Machine {
    pub fn new(id: NodeId, settings: &Settings, random: &mut Random) -> Machine {
        let tick = settings.heartbeat * (90 + random.below(21) as u32) / 100;
        Machine {
            id,
            disk: MemoryDisk::new(),
            process: None,
            run: 0,
            tick,
            disk_is_faulty: false,
            paused_until: Duration::ZERO,
            is_removed: false,
        }
    }

    /// Starts a node on the disk as it is. One that is no founder is told of members by its `contacts`.
    pub fn start(
        &mut self,
        founders: &Membership,
        contacts: Membership,
        settings: &Settings,
        now: Duration,
        random: &mut Random,
    ) -> Result<(), Ended> {
        self.run += 1;
        let disk: Arc<dyn Disk> = Arc::new(self.disk.clone());
        let options = OpenOptions {
            id: self.id,
            cluster: CLUSTER,
            beginning: match founders.members.contains_key(&self.id) {
                true => Beginning::Found(founders.clone()),
                false => Beginning::Join,
            },
            directory: u128::from(random.next()),
            boot_random: random.next() as u32,
            log: settings.log,
        };
        let opened = data_dir::open(&disk, &options).map_err(|error| error.to_string())?;
        let options = CoreOptions {
            id: self.id,
            election_ticks: settings.election_ticks,
            election_seed: random.next(),
            membership: opened.membership.clone(),
            snapshot_index: opened.snapshot_index,
            logger: slog::Logger::root(slog::Discard, slog::o!()),
        };
        let core = RaftCore::open(opened.log, options).map_err(|error| error.to_string())?;
        let me = NodeIdentity {
            cluster: Some(CLUSTER),
            id: self.id,
            directory: opened.identity.directory,
            boot: opened.boot,
            url: url(self.id),
        };
        let position = LogPosition::default();
        position.set(core.term(), core.last_index());
        let acquaintances = Acquaintances::open(disk.clone()).map_err(|error| error.to_string())?;
        let applier = Applier::new(opened.state, opened.membership.clone());
        let mut process = Process {
            id: self.id,
            started: now,
            replica: Replica::new(core, opened.boot, settings.election_ticks),
            snapshot_at: applier.applied_index() + settings.snapshot_count,
            applier,
            files: SnapshotFiles::new(disk, CLUSTER),
            queue: VecDeque::new(),
            me,
            position,
            acquaintances,
            met: BTreeSet::new(),
            contacts,
            peers: BTreeSet::new(),
            transfers: BTreeSet::new(),
            capture: None,
            turn_planned: false,
            apply_planned: false,
            retirement_planned: false,
            random: random.fork(),
        };
        process.follow_members();
        self.process = Some(process);
        Ok(())
    }
}

impl Process {
    /// The time as the node sees it.
    pub fn clock(&self, now: Duration) -> Duration {
        now - self.started
    }

    /// What the invariants look at.
    pub fn shown(&self) -> Shown {
        let core = self.replica.core();
        Shown {
            term: core.term(),
            leads: core.is_leader(),
            commit: core.commit_index(),
            handed_out: core.handed_out(),
            last_index: core.last_index(),
        }
    }

    /// Calls the replica, and collects what it does.
    pub fn call<R>(
        &mut self,
        invariants: &mut Invariants,
        effects: &mut Vec<Effect>,
        call: impl FnOnce(&mut Replica<Waiter>, &mut SimulatedHost<'_>) -> R,
    ) -> (R, Checked) {
        let mut host = SimulatedHost {
            id: self.id,
            peers: &self.peers,
            transfers: &mut self.transfers,
            queue: &mut self.queue,
            invariants,
            random: &mut self.random,
            effects,
            checked: Ok(()),
        };
        let result = call(&mut self.replica, &mut host);
        (result, host.checked)
    }

    /// Opens connections to whom the membership now names, as the driver does after a turn.
    pub fn follow_members(&mut self) {
        let membership = self.replica.core().membership();
        let known = if membership.members.is_empty() { &self.contacts } else { &**membership };
        // Who has introduced itself can be answered, also where its admission is not known yet: a leader that gets no
        // answer sends nothing that would make it known.
        let met = self.met.iter().map(|(id, _)| *id).filter(|id| !membership.removed.contains(id));
        self.peers = known.members.keys().copied().chain(met).filter(|id| *id != self.id).collect();
    }

    /// What the driver does with every tick, beside the replica's.
    pub fn ticked(&mut self) {
        let (me, acquaintances) = (&self.me, &self.acquaintances);
        let directory = |id| if id == me.id { Some(me.directory) } else { acquaintances.directory(id) };
        self.replica.record_directories(&directory);
        let core = self.replica.core();
        self.position.set(core.term(), core.last_index());
    }

    /// Whom it has connections to.
    pub fn peers(&self) -> impl Iterator<Item = NodeId> + '_ {
        self.peers.iter().copied()
    }

    /// What it says first on a connection.
    pub fn hello(&self, to: NodeId) -> Hello {
        Hello::new(&self.me, to, &self.position)
    }

    /// Decides whether to take messages of a peer that introduces itself, on a new connection or on one it has.
    pub fn meet(&mut self, hello: &Hello) -> Result<(), HelloRefusal> {
        let membership = self.replica.core().membership();
        if membership.removed.contains(&hello.from) {
            return Err(removal(self.id, membership));
        }
        if self.met.contains(&(hello.from, hello.boot)) && !self.random.one_in(RECONNECTS) {
            return Ok(());
        }
        let promises = self.replica.promises(hello.from);
        self.acquaintances.meet(hello, promises, self.replica.core().membership())?;
        self.met.insert((hello.from, hello.boot));
        Ok(())
    }

    /// Why it has to end, if it met somebody and could not write that down.
    pub fn failed(&self) -> Option<Ended> {
        self.acquaintances.failed().map(str::to_owned)
    }

    /// The transfer of a snapshot has ended.
    pub fn transfer_ended(&mut self, to: NodeId) {
        self.transfers.remove(&to);
    }

    /// Whether something waits to be applied.
    pub fn has_to_apply(&self) -> bool {
        !self.queue.is_empty()
    }

    /// Applies some of what waits, one batch, and says who is to be told what.
    pub fn apply(&mut self, invariants: &mut Invariants) -> Result<Vec<(Waiter, Done)>, Result<Ended, String>> {
        let mut done = Vec::new();
        let batch = 1 + self.random.below(self.queue.len() as u64) as usize;
        for apply in self.queue.drain(..batch) {
            self.applier.apply(apply, &mut done).map_err(|error| Ok(error.to_string()))?;
            let (index, digest) = (self.applier.applied_index(), digest(&self.applier));
            invariants.applied(self.id, index, digest).map_err(Err)?;
        }
        self.applier.forget_replaced();
        Ok(done)
    }

    /// Whether a snapshot is due; begins it if so.
    pub fn begin_snapshot(&mut self, wanted: bool, settings: &Settings) -> bool {
        let applied = self.applier.applied_index();
        if self.capture.is_some() || !(wanted || applied >= self.snapshot_at) {
            return false;
        }
        self.snapshot_at = applied + settings.snapshot_count;
        self.capture = Some(self.applier.capture());
        true
    }

    /// Compares the whole log with what others have.
    pub fn check_log(&self, invariants: &mut Invariants) -> Checked {
        let log = self.replica.core().log();
        let (first, last) = (log.first_index(), log.last_index());
        if first > last {
            return Ok(());
        }
        let entries = log.entries(first, last + 1, u64::MAX).map_err(|error| format!("{error:?}"))?;
        invariants.has(self.id, log.term(first - 1).ok(), &entries)
    }
}

/// How often the whole state is compared, and not only the keys: it takes its time.
const FULL_DIGEST_EVERY: u64 = 50;

fn digest(applier: &Applier) -> u64 {
    let version = applier.version();
    let items = version.list(b"", None, usize::MAX).items;
    let items: Vec<_> = items.iter().map(|item| (item.key().to_vec(), item.etag(), item.value().to_vec())).collect();
    let full = applier.applied_index().is_multiple_of(FULL_DIGEST_EVERY);
    let full = full.then(|| raftexample::snapshot::digest(&applier.capture()));
    Content::of(&(items, full)).number()
}

/// A message in one line.
pub fn describe(message: &PeerMessage) -> String {
    match message {
        PeerMessage::Raft(message) => describe_raft(message),
        PeerMessage::Forward(writes) => format!("forward of {} writes", writes.len()),
        PeerMessage::ForwardRefused { ids, reason } => format!("refusal of {} writes: {reason:?}", ids.len()),
        other => format!("{other:?}"),
    }
}

fn describe_raft(message: &Message) -> String {
    let Message { term, index, log_term, commit, reject, reject_hint, .. } = *message;
    let kind = format!("{:?}", message.msg_type);
    let kind = kind.trim_start_matches("Msg");
    match message.msg_type {
        MessageType::MsgAppend => {
            let count = message.entries.len();
            format!("{kind} t{term} {count} entries behind {index}/{log_term}, commit {commit}")
        }
        MessageType::MsgHeartbeat | MessageType::MsgHeartbeatResponse => format!("{kind} t{term} commit {commit}"),
        _ if reject => format!("{kind} t{term} rejects {index}, hint {reject_hint}/{log_term}"),
        _ => format!("{kind} t{term} {index}/{log_term} commit {commit}"),
    }
}

/// Member ids with the URLs that they have in a simulation.
pub fn founders(ids: impl IntoIterator<Item = NodeId>) -> Membership {
    let members: BTreeMap<NodeId, String> = ids.into_iter().map(|id| (id, url(id))).collect();
    Membership::founding(members)
}

/// A node's URL.
pub fn url(id: NodeId) -> String {
    format!("http://node-{id}:1")
}
