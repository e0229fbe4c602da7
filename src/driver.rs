//! The driver: the thread that owns Raft.
//!
//! It takes events from one bounded queue, lets its [`Replica`] digest all that are waiting, and processes them in one
//! go, so that many writes share one sync. Its ticker is the deadline of its wait: a stall of any length gives one
//! tick, not a burst.
//!
//! It waits for nobody but the applier's queue (and the applier waits for nobody), so no cycle of threads can wait
//! for each other: connections and peer connections wait for the driver, the driver for the applier.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, RecvTimeoutError, Sender, TrySendError};
use raft::eraftpb::Message;

use crate::acquaintances::Promises;
use crate::byte_budget::Share;
use crate::disk::Disk;
use crate::fail_point::fail_point;
use crate::membership::{Membership, NodeId};
use crate::message::{
    AdminReply, AdminRequest, Ask, ClientRequest, Refusal, Reply, ReplyTo, SnapshotInfo, Status, Transfer,
};
use crate::message_check::Offence;
use crate::metrics::{Metrics, RaftPosition};
use crate::peer_protocol::{Hello, HelloAnswer, HelloRefusal, PeerMessage};
use crate::publication::Publication;
use crate::raft_core::{APPEND_BYTES_MAX, APPENDS_IN_FLIGHT_MAX, CoreError};
use crate::raft_log::SEGMENT_BYTES;
use crate::replica::{Answer, Apply, FORWARDED_MAX, Host, Note, PENDING_READS_MAX, PENDING_WRITES_MAX, Replica};
use crate::store::{Capture, Replacement};

/// Events that wait for the driver, and requests of event loops in them. More than there are connections (each waits for
/// its one request), so a client meets the limit only when the driver is stuck; it is then told 503. Peer connections wait, and TCP slows the peer.
pub const EVENTS_MAX: usize = 8 * 1024;

/// Bytes of peers' messages that wait for the driver, of all peers together; beyond them peer connections wait, in the
/// order of arrival. Above what a leader sends to one follower before it waits for an answer, so that the limit is met
/// only by a node that is slower than its peers for long, or by a peer that is no Raft leader.
pub const PEER_BYTES_MAX: usize = 64 << 20;

const _: () = assert!(APPENDS_IN_FLIGHT_MAX as u64 * APPEND_BYTES_MAX < PEER_BYTES_MAX as u64);

/// Events taken in before the replica processes them: bounds what one sync covers, and how late a tick can be.
pub const EVENTS_PER_TURN_MAX: usize = 1024;

/// Batches on their way to the applier. When it is full the driver waits: that is what slows clients down to the
/// speed of the state machine. Each holds what one turn hands out: usually a few entries, and when a long log is read
/// back at a start up to [`HANDED_OUT_BYTES_MAX`](crate::replica::HANDED_OUT_BYTES_MAX). With the batch that is being
/// applied and the one that the driver holds while it waits, ten of these are in memory at most.
pub const APPLY_BATCHES_MAX: usize = 8;

/// A thread that makes no progress for so long is reported by `/_/livez`.
pub const PROGRESS_TIMEOUT: Duration = Duration::from_secs(10);

/// How long a node that has applied its own removal waits until a member confirms that it knows of it too. That
/// takes a second: each stream to a peer begins with an introduction, and a removed node's is refused.
pub const REMOVAL_CONFIRMATION_TIMEOUT: Duration = Duration::from_secs(10);

/// How long a leader waits for a proposal that tells its followers what is committed, before it tells them for itself.
/// A client that writes one value after the other proposes again within it, and saves each follower a message and its
/// answer; whoever reads a follower's own state sees it later by no more than this.
pub const COMMIT_ANNOUNCEMENT_DELAY: Duration = Duration::from_millis(1);

/// How often the applier is asked for a snapshot that a follower needs, while it is being made.
pub const SNAPSHOT_ASK_INTERVAL: Duration = Duration::from_secs(2);

/// How long a stopping leader waits for another to take over, and for requests in flight to end.
pub const HAND_OVER_TIMEOUT: Duration = Duration::from_secs(2);

/// How long a node that ends waits for its peers to take its last messages: a member that it has answered for, and who
/// waits for that elsewhere, should not have to wait until its deadline.
pub const LAST_MESSAGES_TIMEOUT: Duration = Duration::from_millis(500);

/// Free bytes of the disk below which PUTs are refused. The log allocates its next segment whole, so below one segment
/// the next roll may end the node; a second one is for what comes in before the free space is looked at again, and for
/// the snapshot that lets the log be shortened. 64 MiB at least, so that small segments leave room for that too.
pub const FREE_BYTES_RESERVE: u64 = if 2 * SEGMENT_BYTES > 64 << 20 { 2 * SEGMENT_BYTES } else { 64 << 20 };

/// How often the disk is asked for its free space. Within it no more comes in than the reserve covers.
pub const FREE_BYTES_INTERVAL: Duration = Duration::from_secs(1);

/// Tells whether there is room for more keys and values.
pub struct Room {
    disk: Arc<dyn Disk>,
    publication: Arc<Publication>,
    store_bytes_max: u64,
    reserve_bytes: u64,
    /// The free bytes when last asked for, if they are below the reserve.
    below_reserve: Option<u64>,
    /// `None`: never asked.
    look_again_at: Option<Instant>,
}

impl Room {
    /// Room on `disk` above `reserve_bytes`, which is [`FREE_BYTES_RESERVE`] unless the disk is a small one of a test, and
    /// for `store_bytes_max` bytes of keys and values in what is applied.
    pub fn new(disk: Arc<dyn Disk>, publication: Arc<Publication>, store_bytes_max: u64, reserve_bytes: u64) -> Room {
        Room { disk, publication, store_bytes_max, reserve_bytes, below_reserve: None, look_again_at: None }
    }

    /// Why there is no room now; `None` if there is.
    pub fn full(&mut self, now: Instant) -> Option<String> {
        if self.look_again_at.is_none_or(|at| now >= at) {
            self.look_again_at = Some(now + FREE_BYTES_INTERVAL);
            self.look();
        }
        if let Some(free) = self.below_reserve {
            let reserve = self.reserve_bytes;
            return Some(format!(
                "the disk of this node has {free} bytes left, and {reserve} are kept in reserve: free some space; \
                 DELETE still works"
            ));
        }
        let (bytes, max) = (self.publication.bytes(), self.store_bytes_max);
        (bytes >= max).then(|| {
            format!("the store holds {bytes} bytes of keys and values, and --max-store-bytes is {max}: delete some")
        })
    }

    /// Whether the disk had less than the reserve when it was last asked.
    pub fn is_disk_short(&self) -> bool {
        self.below_reserve.is_some()
    }

    fn look(&mut self) {
        // A file system that can't tell will say so itself when it is full.
        let free = self.disk.free_bytes().unwrap_or(u64::MAX);
        let below_reserve = Some(free).filter(|free| *free < self.reserve_bytes);
        match (self.below_reserve, below_reserve) {
            (None, Some(free)) => log::warn!(
                "the disk has {free} bytes left, below the reserve of {}: refusing PUT until there is more",
                self.reserve_bytes
            ),
            (Some(_), None) => log::info!("the disk has {free} bytes left: taking PUT again"),
            _ => {}
        }
        self.below_reserve = below_reserve;
    }
}

/// How many requests of event loops wait for the driver. They come many in an event, so the queue's own limit does not
/// count them.
#[derive(Clone, Debug, Default)]
pub struct QueuedRequests(Arc<AtomicUsize>);

/// The part of [`QueuedRequests`] that one event holds until it is taken.
#[derive(Debug)]
pub struct QueueShare {
    queued: Arc<AtomicUsize>,
    requests: usize,
}

impl QueuedRequests {
    /// Room for so many more; `None` if there would be more than [`EVENTS_MAX`].
    pub fn admit(&self, requests: usize) -> Option<QueueShare> {
        let queued = self.0.fetch_add(requests, Ordering::Relaxed);
        // Dropped, it gives back what it holds.
        let share = QueueShare { queued: self.0.clone(), requests };
        (queued + requests <= EVENTS_MAX).then_some(share)
    }
}

impl Drop for QueueShare {
    fn drop(&mut self) {
        self.queued.fetch_sub(self.requests, Ordering::Relaxed);
    }
}

/// What happens to the driver.
pub enum Event {
    /// A client's write or linearizable read.
    Client(ClientRequest),
    /// All of them that came to an event loop at once: at most one for each of its connections.
    Clients(Vec<ClientRequest>, QueueShare),
    /// A client's request to change the cluster.
    Admin {
        /// What is asked.
        request: AdminRequest,
        /// When the client gives up.
        deadline: Instant,
        /// Who waits.
        reply: ReplyTo,
    },
    /// A member says that this node was removed from the cluster.
    Removed(NodeId),
    /// A member refuses this node for its data directory.
    Disowned(NodeId, HelloRefusal),
    /// What does the node say of itself?
    Status(Sender<Status>),
    /// A peer introduces itself.
    Hello(Box<Hello>, Sender<Result<HelloAnswer, HelloRefusal>>),
    /// Messages of a peer that has introduced itself, and their share of [`PEER_BYTES_MAX`].
    Peer(NodeId, Vec<PeerMessage>, Share),
    /// A peer could not be reached.
    Unreachable(NodeId),
    /// Sending a snapshot to a peer ended, well or not.
    SnapshotSent(NodeId, bool),
    /// A snapshot that a peer sent is on disk, complete.
    SnapshotReceived {
        /// The peer.
        from: NodeId,
        /// The Raft message that announces it.
        message: Box<Message>,
        /// The membership that the file holds.
        membership: Arc<Membership>,
        /// The state that the file holds.
        state: Box<Replacement>,
    },
    /// A snapshot of this node's own state is on disk, complete.
    SnapshotWritten {
        /// Its index and size.
        info: SnapshotInfo,
        /// The membership that the file holds.
        membership: Arc<Membership>,
    },
    /// Another thread found that this node can't keep its promises any more; why, and the way out.
    Failed(String),
    /// Hand leadership over if held, answer what is in flight, and end.
    Stop,
}

impl Event {
    /// Tells whoever waits for an answer that the node is stopping.
    fn refuse(self) {
        match self {
            Event::Client(request) => request.refuse(Refusal::Stopping),
            Event::Clients(requests, _) => requests.into_iter().for_each(|request| request.refuse(Refusal::Stopping)),
            Event::Admin { reply, .. } => reply.send(Reply::Admin(AdminReply::Refused(Refusal::Stopping))),
            // The others hear of it when their place for an answer is dropped.
            _ => {}
        }
    }
}

/// Threads that the driver's messages go to.
pub trait Network: Send {
    /// Queues a message for a peer; false if it was surely not sent.
    fn send(&mut self, to: NodeId, message: PeerMessage) -> bool;
    /// Sends a snapshot file in the background, which ends in [`Event::SnapshotSent`]; false if that was not begun.
    fn send_snapshot(&mut self, to: NodeId, message: Message) -> bool;
    /// How far the snapshot has come that is on its way to a peer.
    fn transfer(&self, to: NodeId) -> Option<Transfer>;
    /// Opens connections to all members, and closes those to others if the membership is another than the last time.
    fn follow(&mut self, membership: &Arc<Membership>);
    /// Checks who a peer says it is.
    fn hello(
        &mut self,
        hello: &Hello,
        promises: Promises,
        membership: &Membership,
    ) -> Result<HelloAnswer, HelloRefusal>;
    /// Why this node has to end, if checking a hello found that.
    fn failed(&self) -> Option<&str>;
    /// Sends what is queued, if that can be done `within` this time, and ends all connections.
    fn stop(&mut self, within: Duration);
    /// The data directory of a member, this node included, if it is known.
    fn directory(&self, member: NodeId) -> Option<u128>;
    /// Where this node's log ends, for its own introductions.
    fn position(&mut self, term: u64, last_index: u64);
}

/// What goes to the applier's thread.
pub enum ToApplier {
    /// Apply these.
    Batch(Vec<Apply<ReplyTo>>),
    /// A follower needs a snapshot newer than the newest.
    SnapshotWanted,
    /// The disk is short of space: a snapshot lets the log be shortened, and should not be rested from.
    DiskShort,
    /// Somebody has asked for a version.
    VersionWanted,
    /// A client asks for a snapshot.
    Snapshot(Sender<Result<SnapshotInfo, Refusal>>),
}

/// What the snapshotter is asked to write.
pub struct ToSnapshotter {
    /// The state.
    pub capture: Box<Capture>,
    /// Who waits for it.
    pub reply: Option<Sender<Result<SnapshotInfo, Refusal>>>,
}

/// When a thread last made progress, in milliseconds since the node started.
#[derive(Clone, Debug)]
pub struct Progress {
    started: Instant,
    at: Arc<AtomicU64>,
}

impl Progress {
    /// A thread that starts now.
    pub fn new(started: Instant) -> Progress {
        Progress { started, at: Arc::new(AtomicU64::new(0)) }
    }

    /// Notes progress now.
    pub fn note(&self) {
        self.at.store(self.started.elapsed().as_millis() as u64, Ordering::Relaxed);
    }

    /// Whether the last progress is longer ago than [`PROGRESS_TIMEOUT`].
    pub fn stalled(&self) -> bool {
        let at = Duration::from_millis(self.at.load(Ordering::Relaxed));
        self.started.elapsed().saturating_sub(at) > PROGRESS_TIMEOUT
    }
}

/// The driver's settings.
pub struct DriverOptions {
    /// One tick.
    pub heartbeat_interval: Duration,
    /// Entries kept behind a snapshot for followers that are a little late.
    pub snapshot_catchup_entries: u64,
    /// Here goes the index of a snapshot that the log names: older ones are not needed. Not in the way of what is to be
    /// written.
    pub removals: Sender<u64>,
    /// Tells when PUTs are to be refused.
    pub room: Room,
}

/// The driver's state; [`Driver::run`] is its thread.
pub struct Driver<N: Network> {
    /// The node above Raft.
    pub replica: Replica<ReplyTo>,
    /// Events in.
    pub events: Receiver<Event>,
    /// Batches out.
    pub applier: Sender<ToApplier>,
    /// Messages out.
    pub network: N,
    /// Settings.
    pub options: DriverOptions,
    /// Notes that the driver makes progress.
    pub progress: Progress,
    /// The zero of the replica's time.
    pub started: Instant,
    /// Whether there is more to do without a new event.
    pub more: bool,
    /// When the followers are told what is committed, if nothing else tells them before.
    pub announce_by: Option<Instant>,
    /// When a snapshot was last asked for on behalf of a follower.
    pub snapshot_asked: Option<Instant>,
    /// What was refused of peers' messages.
    pub offences: Offences,
    /// What is counted and measured.
    pub measures: Measures,
}

/// What the driver counts and measures, and what it has to remember for that.
pub struct Measures {
    metrics: Arc<Metrics>,
    /// When the read round under way was begun.
    read_round_began: Option<Instant>,
    /// The last leader that was known.
    leader: NodeId,
}

impl Measures {
    /// Measures for a driver that starts.
    pub fn new(metrics: Arc<Metrics>) -> Measures {
        Measures { metrics, read_round_began: None, leader: raft::INVALID_ID }
    }

    fn note(&mut self, note: Note) {
        match note {
            Note::Proposed(writes) => self.metrics.proposal_batch.observe(writes as f64),
            Note::Forwarded(writes) => self.metrics.forward_batch.observe(writes as f64),
            Note::ReadRoundBegun => {
                self.read_round_began = Some(Instant::now());
                self.metrics.read_rounds.begin();
            }
            Note::ReadRoundConfirmed(reads) => {
                if let Some(began) = self.read_round_began.take() {
                    self.metrics.read_rounds.confirm(began, reads);
                }
            }
            Note::ReadRoundLost => self.metrics.read_rounds.lose(),
        }
    }

    /// Shows where the replica stands, for whoever asks before the next turn.
    fn show<W>(&mut self, replica: &Replica<W>) {
        let core = replica.core();
        let has_leader = core.leader() != raft::INVALID_ID;
        self.metrics.position.set(RaftPosition {
            term: core.term(),
            leads: core.is_leader(),
            has_leader,
            last_index: core.last_index(),
            commit_index: core.commit_index(),
            snapshot_index: core.snapshot_index(),
        });
        if has_leader && core.leader() != self.leader {
            self.leader = core.leader();
            self.metrics.position.leader_changed();
        }
        let (waiting, queues) = (replica.waiting(), &self.metrics.queues);
        queues.proposals.set(waiting.writes, PENDING_WRITES_MAX);
        queues.reads.set(waiting.reads, PENDING_READS_MAX);
        queues.forwarded.set(waiting.forwarded, FORWARDED_MAX);
    }
}

/// How many messages of each peer were refused, by cause.
#[derive(Debug, Default)]
pub struct Offences(BTreeMap<(NodeId, &'static str), u64>);

impl Offences {
    /// Counts one. Returns how many there were if that is to be logged, as the first, second, fourth, eighth of a cause
    /// are: a peer that goes on must not fill the log.
    fn count(&mut self, from: NodeId, offence: &Offence) -> Option<u64> {
        let count = self.0.entry((from, offence.kind())).or_default();
        *count += 1;
        count.is_power_of_two().then_some(*count)
    }
}

/// How the driver ended.
#[derive(Debug, PartialEq, Eq)]
pub enum DriverEnd {
    /// It was told to.
    Stopped,
    /// This node was removed from the cluster.
    Removed,
    /// Another member refuses this node for its data directory; why, and the way out.
    Disowned(String),
    /// It can't keep its promises any more; why, and the way out.
    Failed(String),
}

/// The surroundings of a driver's replica: a macro, because they borrow only some of the driver's fields.
macro_rules! host {
    ($driver:expr) => {
        DriverHost {
            network: &mut $driver.network,
            offences: &mut $driver.offences,
            measures: &mut $driver.measures,
            applier: &$driver.applier,
            batch: Vec::new(),
        }
    };
}

impl<N: Network> Driver<N> {
    /// Runs until told to stop, until this node is removed, or until it can't keep its promises: then with the reason.
    ///
    /// What comes in after the end is refused for as long as the process lives: who found the queue still open should
    /// not wait for an answer until his deadline.
    pub fn run(self) -> Result<DriverEnd, CoreError> {
        let late = self.events.clone();
        let end = self.drive();
        let refusing = thread::Builder::new().name("late-events".to_owned());
        if let Err(error) = refusing.spawn(move || late.iter().for_each(Event::refuse)) {
            log::warn!("failed to start the thread that refuses late requests: {error}");
        }
        end
    }

    fn drive(mut self) -> Result<DriverEnd, CoreError> {
        let mut next_tick = Instant::now() + self.options.heartbeat_interval;
        let mut stop_by: Option<Instant> = None;
        let mut removed_by: Option<Instant> = None;
        let mut members = Arc::new(Membership::default());
        loop {
            let turn = self.turn(next_tick)?;
            if turn.ticked {
                let interval = self.options.heartbeat_interval;
                let now = Instant::now();
                // After a stall the missed ticks are not made up for: they would only start elections.
                next_tick = if now > next_tick + interval { now + interval } else { next_tick + interval };
            }
            // Also at each tick, for a sender that could not be started the last time.
            if turn.ticked || !Arc::ptr_eq(&members, self.replica.core().membership()) {
                members = self.replica.core().membership().clone();
                self.network.follow(&members);
            }
            if let Some(end) = turn.end {
                self.end(end == DriverEnd::Removed);
                return Ok(end);
            }
            if self.replica.core().is_removed() {
                // The others may not know yet that the change is committed, and need this node until they do.
                let by = *removed_by.get_or_insert_with(|| Instant::now() + REMOVAL_CONFIRMATION_TIMEOUT);
                if turn.stop || Instant::now() >= by {
                    self.end(true);
                    return Ok(DriverEnd::Removed);
                }
                continue;
            }
            if turn.stop && stop_by.is_none() {
                stop_by = Some(Instant::now() + HAND_OVER_TIMEOUT);
                if self.replica.core().is_leader() && self.replica.hand_over() {
                    log::info!("stopping: handing leadership over");
                }
            }
            let handed_over = !self.replica.core().is_leader() || !self.replica.core().is_transferring();
            if stop_by.is_some_and(|by| Instant::now() >= by || (self.replica.is_idle() && handed_over)) {
                self.end(false);
                return Ok(DriverEnd::Stopped);
            }
        }
    }

    /// Answers all who wait, those too who have only just asked, on this node and elsewhere.
    fn end(&mut self, removed: bool) {
        let mut host = host!(self);
        self.replica.stop(removed, &mut host);
        self.events.try_iter().take(EVENTS_MAX).for_each(Event::refuse);
        self.network.stop(LAST_MESSAGES_TIMEOUT);
    }

    /// One event or tick, and whatever else is waiting; then one round of processing.
    fn turn(&mut self, next_tick: Instant) -> Result<Turn, CoreError> {
        let mut turn = Turn::default();
        self.replica.set_full(self.options.room.full(Instant::now()));
        let wait_until = match self.announce_by {
            _ if self.more => Instant::now(),
            Some(by) => next_tick.min(by),
            None => next_tick,
        };
        let mut host = host!(self);
        match self.events.recv_deadline(wait_until) {
            Ok(event) => turn.take(event, &mut self.replica, &mut host, &self.options, self.started)?,
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => turn.stop = true,
        }
        for event in self.events.try_iter().take(EVENTS_PER_TURN_MAX - 1) {
            turn.take(event, &mut self.replica, &mut host, &self.options, self.started)?;
        }
        fail_point("driver-events-taken");
        let now = Instant::now();
        if now >= next_tick {
            turn.ticked = true;
            self.replica.tick(now - self.started, &mut host);
            let network = &*host.network;
            self.replica.record_directories(&|member| network.directory(member));
            host.network.position(self.replica.core().term(), self.replica.core().last_index());
            if self.options.room.is_disk_short() {
                // Full, it is said again at the next tick.
                let _ = self.applier.try_send(ToApplier::DiskShort);
            }
        }
        self.more = self.replica.process(&mut host)?;
        host.pass_on(true);
        self.announce_by = match self.announce_by {
            _ if !self.replica.core().owes_commit() => None,
            Some(by) if now >= by => {
                self.replica.announce_commit();
                self.more = true;
                None
            }
            Some(by) => Some(by),
            None => Some(Instant::now() + COMMIT_ANNOUNCEMENT_DELAY),
        };
        self.measures.show(&self.replica);
        let asked_lately = self.snapshot_asked.is_some_and(|at| now < at + SNAPSHOT_ASK_INTERVAL);
        if self.replica.take_snapshot_wanted()
            && !asked_lately
            && self.applier.try_send(ToApplier::SnapshotWanted).is_ok()
        {
            self.snapshot_asked = Some(now);
        }
        if let Some(index) = turn.snapshot_written {
            // Only now: a message that announces an older one may just have been on its way to the network.
            // Full, it is writing the next one, behind which this order will be given again.
            let _ = self.options.removals.try_send(index);
        }
        self.progress.note();
        Ok(turn)
    }
}

/// What has come up in one turn.
#[derive(Default)]
struct Turn {
    ticked: bool,
    stop: bool,
    /// Ends the driver at once.
    end: Option<DriverEnd>,
    /// The index of a snapshot of this node's own state that the log names now: older ones are not needed.
    snapshot_written: Option<u64>,
}

impl Turn {
    /// Lets the replica take one event in.
    fn take<N: Network>(
        &mut self,
        event: Event,
        replica: &mut Replica<ReplyTo>,
        host: &mut DriverHost<'_, N>,
        options: &DriverOptions,
        started: Instant,
    ) -> Result<(), CoreError> {
        match event {
            Event::Client(request) => take_client(request, replica, host, started),
            Event::Clients(requests, _) => {
                for request in requests {
                    take_client(request, replica, host, started);
                }
            }
            Event::Admin { request, deadline, reply } => {
                replica.admin(request, deadline.saturating_duration_since(started), reply, host);
            }
            Event::Removed(member) => {
                log::info!("member {member} says that this node was removed from the cluster");
                self.end = Some(DriverEnd::Removed);
            }
            Event::Disowned(member, refusal) => {
                self.end = Some(DriverEnd::Disowned(format!("member {member} refuses this node: {refusal}")));
            }
            Event::Status(reply) => {
                let mut status = replica.status();
                for member in &mut status.progress {
                    member.transfer = host.network.transfer(member.id);
                }
                // Whoever asked may have given up waiting.
                drop(reply.try_send(status));
            }
            Event::Hello(hello, reply) => {
                let promises = replica.promises(hello.from);
                let answer = host.network.hello(&hello, promises, replica.core().membership());
                drop(reply.try_send(answer));
                if let Some(reason) = host.network.failed() {
                    self.end = Some(DriverEnd::Failed(reason.to_owned()));
                }
            }
            Event::Failed(reason) => self.end = Some(DriverEnd::Failed(reason)),
            Event::Peer(from, messages, share) => {
                for message in messages {
                    replica.peer(from, message, host)?;
                }
                drop(share);
            }
            Event::Unreachable(id) => replica.unreachable(id),
            Event::SnapshotSent(to, delivered) => replica.snapshot_sent(to, delivered),
            Event::SnapshotReceived { from, message, membership, state } => {
                replica.snapshot_received(from, *message, membership, state, host)?;
            }
            Event::SnapshotWritten { info, membership } => {
                let compact_to = info.index.saturating_sub(options.snapshot_catchup_entries);
                replica.snapshot_written(info.index, membership, compact_to)?;
                if replica.core().snapshot_index() == info.index {
                    self.snapshot_written = Some(info.index);
                }
            }
            Event::Stop => self.stop = true,
        }
        Ok(())
    }
}

/// Lets the replica take a client's request in.
fn take_client<N: Network>(
    request: ClientRequest,
    replica: &mut Replica<ReplyTo>,
    host: &mut DriverHost<'_, N>,
    started: Instant,
) {
    let deadline = request.deadline.saturating_duration_since(started);
    match request.ask {
        Ask::Write(command) => replica.write(command, deadline, request.reply, host),
        Ask::Read => replica.read(deadline, request.reply, host),
        Ask::StaleRead => host.apply(Apply::Reads(vec![request.reply])),
    }
}

/// The replica's surroundings during one turn.
struct DriverHost<'a, N> {
    network: &'a mut N,
    offences: &'a mut Offences,
    measures: &'a mut Measures,
    applier: &'a Sender<ToApplier>,
    /// What the applier has not got yet.
    batch: Vec<Apply<ReplyTo>>,
}

impl<N> DriverHost<'_, N> {
    /// Sends the applier its next batch, if there is room or `waits` says to wait for it.
    fn pass_on(&mut self, waits: bool) {
        if self.batch.is_empty() {
            return;
        }
        fail_point("driver-batch-before");
        // The applier is gone only when it has failed, and then the process ends with its reason.
        match self.applier.try_send(ToApplier::Batch(std::mem::take(&mut self.batch))) {
            Err(TrySendError::Full(batch)) if waits => drop(self.applier.send(batch)),
            Err(TrySendError::Full(ToApplier::Batch(batch))) => self.batch = batch,
            _ => {}
        }
        fail_point("driver-batch-after");
    }
}

impl<N: Network> Host<ReplyTo> for DriverHost<'_, N> {
    fn send(&mut self, to: NodeId, message: PeerMessage) -> bool {
        self.network.send(to, message)
    }

    fn send_snapshot(&mut self, to: NodeId, message: Message) -> bool {
        self.network.send_snapshot(to, message)
    }

    fn apply(&mut self, apply: Apply<ReplyTo>) {
        self.batch.push(apply);
    }

    fn before_sync(&mut self) {
        // Without room it goes after the sync: the log, and whoever waits for its answers, does not wait for the applier.
        self.pass_on(false);
    }

    fn answer(&mut self, waiter: ReplyTo, answer: Answer) {
        let reply = match answer {
            Answer::Write(reply) => Reply::Write(reply),
            Answer::Read(refusal) => Reply::Read(Err(refusal)),
            Answer::Admin(reply) => Reply::Admin(reply),
        };
        waiter.send(reply);
    }

    fn note(&mut self, note: Note) {
        self.measures.note(note);
    }

    fn offended(&mut self, from: NodeId, offence: Offence) {
        self.measures.metrics.peers.received(from).offended(&offence);
        match offence {
            // Ordinary until both sides have applied the same change of the membership.
            Offence::Removed(_) | Offence::Stranger(_) => {
                log::debug!("dropped a message of node {from}: {offence}");
            }
            _ => {
                if let Some(count) = self.offences.count(from, &offence) {
                    log::warn!("dropped a message of member {from}: {offence} ({count} of this kind)");
                }
            }
        }
    }
}

#[cfg(test)]
mod tests;
