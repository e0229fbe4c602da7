//! One node: a disk that outlives it, and the real parts of a node around a simulated driver.
//!
//! What threads do in a real node, events do here, and they come in any order that threads could bring about: the
//! replica digests some inputs before it processes them, the applier is behind it, and snapshots are written and sent
//! while all goes on.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::fmt;
use std::sync::Arc;
use std::time::{Duration, Instant};

use raft::eraftpb::{Message, MessageType};
use raftexample::acquaintances::Acquaintances;
use raftexample::applier::{Applier, Done, SnapshotSchedule};
use raftexample::data_dir::{self, Beginning, OpenOptions, SnapshotFiles};
use raftexample::disk::Disk;
use raftexample::driver::Room;
use raftexample::membership::{ClusterId, Membership, NodeId};
use raftexample::memory_disk::MemoryDisk;
use raftexample::message_check::Offence;
use raftexample::peer_network::admit;
use raftexample::peer_protocol::{Hello, HelloRefusal, LogPosition, NodeIdentity, PeerMessage};
use raftexample::publication::Publication;
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
    /// Free bytes of the disk below which PUTs are refused.
    pub reserve_bytes: u64,
}

impl Settings {
    /// Small snapshots and segments, so that much happens in little time.
    pub fn draw(random: &mut Random) -> Settings {
        let log = LogOptions {
            segment_bytes: *random.pick(&[4 << 10, 16 << 10, 256 << 10]),
            cache_bytes: *random.pick(&[0, 2 << 10, 1 << 20]),
        };
        Settings {
            heartbeat: Duration::from_millis(100),
            election_ticks: 5 + random.below(8) as usize,
            snapshot_count: if random.one_in(2) { 1 + random.below(5) } else { *random.pick(&[20, 100, 1000]) },
            catchup_entries: *random.pick(&[0, 5, 100]),
            log,
            // In the proportion of the real one: two segments, and some.
            reserve_bytes: 2 * log.segment_bytes + (16 << 10),
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

/// About how many changes of the disk a start makes, its founding and the first term included.
const CHANGES_OF_A_START: u64 = 30;

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
    /// The membership and the number of nodes met that `peers` follow from.
    followed: Option<(Arc<Membership>, usize)>,
    /// Who has taken its hello.
    connected: BTreeSet<NodeId>,
    transfers: BTreeSet<NodeId>,
    /// The real time at which it was made: what takes an [`Instant`] is given this one plus virtual time.
    epoch: Instant,
    schedule: SnapshotSchedule,
    room: Room,
    publication: Arc<Publication>,
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
    /// Whether it stays down, whatever is planned.
    pub is_dead: bool,
    /// Whether its disk is full for a while, so that the node may end of it.
    pub disk_is_full: bool,
    /// How often a node was founded or continued here, as the boot counter on its disk says.
    pub boots: u64,
    /// What somebody once copied of its data directory, and the boot counter in it.
    pub copy: Option<(u64, MemoryDisk)>,
    /// The start whose directory it came back with when it had lost its own; 0 if that was wiped.
    pub came_back_with: u64,
    /// Its data directory was lost after this run: wiped, or replaced by the copy. Later runs are impostors.
    pub lost_after: Option<u64>,
}

/// One run of a node, as others know it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Met {
    pub run: u64,
    pub boots: u64,
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
            is_dead: false,
            disk_is_full: false,
            boots: 0,
            copy: None,
            came_back_with: 0,
            lost_after: None,
        }
    }

    /// Whether its data directory is not the one that it made its promises with.
    pub fn is_lost(&self) -> bool {
        self.lost_after.is_some()
    }

    /// Whether what this run says is said without the data directory that it made its promises with.
    pub fn is_impostor(&self, run: u64) -> bool {
        self.lost_after.is_some_and(|last| run > last)
    }

    /// Takes a copy of the data directory as it is.
    pub fn copy(&mut self) {
        let copy = self.disk.fork();
        copy.set_capacity(None);
        self.copy = Some((self.boots, copy));
    }

    /// Replaces the data directory by another one, under the same id.
    pub fn lose(&mut self, disk: MemoryDisk, came_back_with: u64) {
        assert!(self.process.is_none(), "a directory is replaced while no node uses it");
        (self.disk, self.disk_is_full) = (disk, false);
        self.lost_after = Some(self.run);
        self.came_back_with = came_back_with;
    }

    /// Lets the power end within the changes of the disk that the next start makes, or its first messages cause.
    pub fn power_ends_during_start(&mut self, random: &mut Random) {
        self.disk.stop_at(1 + random.below(CHANGES_OF_A_START));
        self.disk_is_faulty = true;
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
        self.boots = opened.boot >> 32;
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
            earlier_boots: opened.earlier_boots.into(),
            url: url(self.id),
        };
        let position = LogPosition::default();
        position.set(core.term(), core.last_index());
        let acquaintances = Acquaintances::open(disk.clone()).map_err(|error| error.to_string())?;
        let applier = Applier::new(opened.state, opened.membership.clone());
        let publication = Arc::new(Publication::new(applier.version()));
        let mut process = Process {
            id: self.id,
            started: now,
            replica: Replica::new(core, opened.boot, settings.election_ticks),
            epoch: Instant::now(),
            schedule: SnapshotSchedule::new(settings.snapshot_count, opened.snapshot_index),
            room: Room::new(disk.clone(), publication.clone(), u64::MAX, settings.reserve_bytes),
            publication,
            applier,
            files: SnapshotFiles::new(disk, CLUSTER),
            queue: VecDeque::new(),
            me,
            position,
            acquaintances,
            met: BTreeSet::new(),
            contacts,
            peers: BTreeSet::new(),
            followed: None,
            connected: BTreeSet::new(),
            transfers: BTreeSet::new(),
            capture: None,
            turn_planned: false,
            apply_planned: false,
            retirement_planned: false,
            random: random.fork(),
        };
        let _ = process.follow_members();
        self.process = Some(process);
        Ok(())
    }
}

impl Process {
    /// The voters of its configuration; of a joint one both halves.
    pub fn voters(&self) -> [Vec<NodeId>; 2] {
        let conf_state = &self.replica.core().membership().conf_state;
        [conf_state.voters.clone(), conf_state.voters_outgoing.clone()]
    }

    /// The time as the node sees it.
    pub fn clock(&self, now: Duration) -> Duration {
        now - self.started
    }

    fn instant(&self, now: Duration) -> Instant {
        self.epoch + self.clock(now)
    }

    /// Looks whether PUTs are to be refused, as the driver does in each turn.
    pub fn look_for_room(&mut self, now: Duration) {
        let now = self.instant(now);
        self.replica.set_full(self.room.full(now));
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

    /// Opens connections to whom the membership now names, as the driver does after a turn. Whether anything is new.
    pub fn follow_members(&mut self) -> bool {
        let membership = self.replica.core().membership();
        let followed = (membership.clone(), self.met.len());
        if self.followed.as_ref().is_some_and(|(known, met)| Arc::ptr_eq(known, membership) && *met == followed.1) {
            return false;
        }
        let known = if membership.members.is_empty() { &self.contacts } else { &**membership };
        // Who has introduced itself can be answered, also where its admission is not known yet: a leader that gets no
        // answer sends nothing that would make it known.
        let met = self.met.iter().map(|(id, _)| *id).filter(|id| !membership.removed.contains(id));
        self.peers = known.members.keys().copied().chain(met).filter(|id| *id != self.id).collect();
        self.followed = Some(followed);
        true
    }

    /// What the driver does with every tick, beside the replica's.
    pub fn ticked(&mut self) {
        let (me, acquaintances) = (&self.me, &self.acquaintances);
        let directory = |id| if id == me.id { Some(me.directory) } else { acquaintances.directory(id) };
        self.replica.record_directories(&directory);
        let core = self.replica.core();
        self.position.set(core.term(), core.last_index());
    }

    /// Those whom it wants a connection to, and has none, or makes it anew.
    pub fn unconnected(&self) -> Vec<NodeId> {
        let is_wanted = |id: &NodeId| self.retirement_planned || !self.connected.contains(id);
        self.peers.iter().copied().filter(is_wanted).collect()
    }

    /// A peer has taken this run's hello.
    pub fn is_welcome(&mut self, peer: NodeId) {
        self.connected.insert(peer);
    }

    /// What it says first on a connection.
    pub fn hello(&self, to: NodeId) -> Hello {
        Hello::new(&self.me, to, &self.position)
    }

    /// Decides whether to take messages of a peer that introduces itself, on a new connection or on one it has.
    pub fn meet(&mut self, hello: &Hello) -> Result<(), HelloRefusal> {
        let membership = self.replica.core().membership();
        let is_connected = self.met.contains(&(hello.from, hello.boot)) && !membership.removed.contains(&hello.from);
        if is_connected && !self.random.one_in(RECONNECTS) {
            return Ok(());
        }
        let promises = self.replica.promises(hello.from);
        admit(hello, &self.me, promises, membership, &mut self.acquaintances)?;
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
            match &apply {
                Apply::Command { command, .. } => self.schedule.applied(command.len()),
                Apply::Restore { index, .. } => self.schedule.restored(*index),
                _ => {}
            }
            self.applier.apply(apply, &mut done).map_err(|error| Ok(error.to_string()))?;
            let (index, digest) = (self.applier.applied_index(), digest(&self.applier));
            invariants.applied(self.id, index, digest).map_err(Err)?;
        }
        self.publication.publish(self.applier.version());
        self.applier.forget_replaced();
        Ok(done)
    }

    /// Begins a snapshot if one is due, or if it is `wanted` and would not be the same as the newest. Whether it does.
    pub fn begin_snapshot(&mut self, wanted: bool, now: Duration) -> bool {
        let applied = self.applier.applied_index();
        let is_due = self.schedule.is_due(applied, self.instant(now)) || (wanted && !self.schedule.has(applied));
        if self.capture.is_some() || !is_due {
            return false;
        }
        self.schedule.captured(applied);
        self.capture = Some(self.applier.capture());
        true
    }

    /// The snapshot that was begun is on the disk.
    pub fn snapshot_written(&mut self, bytes: u64, now: Duration) {
        let now = self.instant(now);
        self.schedule.written(bytes, now);
    }

    /// The snapshot that was begun could not be written.
    pub fn snapshot_failed(&mut self, now: Duration) {
        let now = self.instant(now);
        self.schedule.failed(now);
    }

    /// With nothing going wrong for long, the newest snapshot is not older than the settings say.
    pub fn check_snapshots(&self, settings: &Settings) -> Checked {
        let (applied, newest) = (self.applier.applied_index(), self.replica.core().snapshot_index());
        if applied < newest + settings.snapshot_count {
            return Ok(());
        }
        Err(format!("node {} has applied index {applied}, and its newest snapshot is of {newest}", self.id))
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
pub struct Described<'a>(pub &'a PeerMessage);

impl fmt::Display for Described<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            PeerMessage::Raft(message) => describe(message, f),
            PeerMessage::Forward { name, writes } => {
                write!(f, "forward {} of {} writes to the leader of {}", name.number, writes.len(), name.term)
            }
            PeerMessage::ForwardRefused { ids, reason } => write!(f, "refusal of {} writes: {reason:?}", ids.len()),
            other => write!(f, "{other:?}"),
        }
    }
}

fn describe(message: &Message, f: &mut fmt::Formatter<'_>) -> fmt::Result {
    let Message { term, index, log_term, commit, reject, reject_hint, .. } = *message;
    let kind = format!("{:?}", message.msg_type);
    let kind = kind.trim_start_matches("Msg");
    match message.msg_type {
        MessageType::MsgAppend => {
            let count = message.entries.len();
            write!(f, "{kind} t{term} {count} entries behind {index}/{log_term}, commit {commit}")
        }
        MessageType::MsgHeartbeat | MessageType::MsgHeartbeatResponse => write!(f, "{kind} t{term} commit {commit}"),
        _ if reject => write!(f, "{kind} t{term} rejects {index}, hint {reject_hint}/{log_term}"),
        _ => write!(f, "{kind} t{term} {index}/{log_term} commit {commit}"),
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
