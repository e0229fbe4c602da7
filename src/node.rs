//! A whole node: which threads there are, what they own, and how they end.
//!
//! ```text
//!        clients                                              other nodes
//!           | HTTP, --port                                       | HTTP, peer URL
//!   +-------v--------+                                  +--------v--------+
//!   | http-loop-N    | and http-N for what takes long   | peer-N          | one thread per connection
//!   +---+--------+---+                                  +--------+--------+
//!       |        | events (8192)                                 | events (64 MiB): waits when full
//!       |        v                                               v
//!       |   +--------------------------------------------------------+
//!       |   | driver: RaftCore with its log, requests, ticks         |<---- unreachable, snapshot sent
//!       |   +----+-----------------------+---------------------------+              |
//!       |        | apply (8 batches):    | outboxes: dropped when full    +---------+-----------+
//!       |        v waits when full       +------------------------------->| peer-<id>-<lane>    |
//!       |   +---------+   captures (1)  +-------------+                   +---------------------+
//!       +-->| applier |---------------->| snapshotter |-----> events
//!           +----+----+  skipped if full+-------------+
//!                | publishes a Version; answers the connections that wait: mailbox of the event loop, 1 for each thread
//! ```
//!
//! **Who waits for whom.** Every queue is bounded, and when it is full its sender waits, refuses whom it works for, or
//! drops what can be had again. A connection is the thread of one that has its own, or of a peer; a lane and a transfer
//! are those of the peer senders. What waits for an answer is a queue in the other direction.
//!
//! | who | for whom | with what | room | when full, or until it is there |
//! |---|---|---|---|---|
//! | accept | event loop | a connection | `LETTERS_PER_CONNECTION` for each | waits |
//! | event loop | driver | requests | `EVENTS_MAX` events and requests | refuses: 503 |
//! | event loop | applier | stale reads | `VERSION_REQUESTS_MAX` | refuses: 503 |
//! | event loop | applier | that a version is wanted | `APPLY_BATCHES_MAX` | drops: then it has something else to take |
//! | connection | driver | a request | `EVENTS_MAX` | refuses: 503 |
//! | connection | driver | the answer | 1 | waits until the request's deadline |
//! | connection | applier | a stale read | `VERSION_REQUESTS_MAX` | refuses: 503 |
//! | connection | applier | that a version is wanted | `APPLY_BATCHES_MAX` | drops: then it has something else to take |
//! | connection | applier | an order for a snapshot | `APPLY_BATCHES_MAX` | refuses: 503 |
//! | connection | applier | the answer | 1 | waits until the request's deadline, or for `STALE_READ_TIMEOUT` |
//! | connection | applier | a change, if its client waits for one | 1, for `WATCHES_MAX` | waits until the request's deadline |
//! | peer connection | driver | a hello, and the answer | `EVENTS_MAX` | waits for `HELLO_TIMEOUT`, and refuses then |
//! | peer connection | driver | messages | `EVENTS_MAX` and `PEER_BYTES_MAX` | waits, and TCP slows the peer down |
//! | peer connection | driver | a received snapshot | `EVENTS_MAX` | waits |
//! | peer connection | applier | the state that it replaces | 1 | waits, and refuses other snapshots meanwhile |
//! | snapshotter | driver | a written snapshot | `EVENTS_MAX` | waits |
//! | transfer | driver | the end of a transfer | `EVENTS_MAX` | waits |
//! | transfer | peer connection | a snapshot, on another node | TCP | waits until a timeout |
//! | lane | peer connection | messages, on another node | TCP | waits until a timeout |
//! | lane | driver | how it goes | `EVENTS_MAX` | drops |
//! | driver | applier | a batch | `APPLY_BATCHES_MAX` | waits |
//! | driver | applier | that a snapshot is wanted, that the disk is short | `APPLY_BATCHES_MAX` | drops |
//! | driver | lane | messages | `FAST_MESSAGES_MAX` and `FAST_BYTES_MAX`, `BULK_MESSAGES_MAX` and `BULK_BYTES_MAX` | drops |
//! | driver | snapshotter | which snapshots may go | `REMOVALS_MAX` | drops |
//! | driver | event loop | an answer | `LETTERS_PER_CONNECTION` for each | drops |
//! | applier | snapshotter | a capture | `CAPTURES_MAX` | drops, or refuses who asked for it |
//! | applier | snapshotter | which snapshots may go | `REMOVALS_MAX` | drops |
//! | snapshotter | applier | how a snapshot went | `SNAPSHOT_ENDS_MAX` | drops, and is never full |
//! | applier | event loop | an answer | `LETTERS_PER_CONNECTION` for each | drops |
//! | applier | connection | an answer, or that something has changed | 1 | drops |
//!
//! Whoever waits stands above whom it waits for in this order: lanes and transfers, connections, the snapshotter, the
//! driver, the applier. The applier and the event loops wait for nobody. So there is no cycle, within a node or through
//! others, and no queue however full can stop all of them. Two more hold for an end only: the driver gives its lanes
//! `LAST_MESSAGES_TIMEOUT`, when nothing needs it any more, and a stop waits for all, each for a bounded time.
//!
//! **How it ends**: the first of these threads to end, for whatever reason, ends the node. Both ports are bound and all
//! files opened before the first thread starts, so whatever is wrong by then is an ordinary error of [`run`].

use std::fmt;
use std::io::Read;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use bytes::Bytes;
use crossbeam_channel::{Receiver, RecvTimeoutError, Select, Sender, TryRecvError, TrySendError, bounded, select};
use raft::eraftpb::{Message, MessageType};
use slog::Drain;

use crate::acquaintances::Acquaintances;
use crate::api::{self, Api};
use crate::applier::{Applier, Done, SNAPSHOT_RETRY_INTERVAL, SnapshotSchedule};
use crate::byte_budget::ByteBudget;
use crate::config::{Address, Config};
use crate::data_dir::{self, Beginning, OpenOptions, Received, SnapshotFiles};
use crate::disk::{Disk, OsDisk};
use crate::driver::{
    APPLY_BATCHES_MAX, Driver, DriverEnd, DriverOptions, EVENTS_MAX, Event, FREE_BYTES_RESERVE, Measures, Offences,
    PEER_BYTES_MAX, Progress, QueuedRequests, Room, ToApplier, ToSnapshotter,
};
use crate::fail_point::fail_point;
use crate::gentle_disk::GentleDisk;
use crate::http::{self, EventLoop, Mailbox};
use crate::measured_disk::MeasuredDisk;
use crate::membership::{ClusterId, Membership, NodeId};
use crate::message::{
    ANSWER_GRACE, AdminReply, AdminRequest, Ask, Backend, ClientRequest, Refusal, Reply, ReplyTo, STALE_READ_TIMEOUT,
    SnapshotInfo, Status, WriteReply,
};
use crate::metrics::Metrics;
use crate::peer_network::PeerNetwork;
use crate::peer_protocol::{
    Hello, HelloAnswer, HelloRefusal, LogPosition, NodeIdentity, PeerMessage, SnapshotHeader, SnapshotRefusal,
};
use crate::peer_sender::{HelloError, say_hello};
use crate::peer_server::{self, PeerInbox, PeerServer};
use crate::publication::Publication;
use crate::raft_core::{CoreOptions, RaftCore};
use crate::raft_log::LogOptions;
use crate::replica::{Apply, Replica};
use crate::store::{Capture, LOOK_AHEAD_KEYS, Replacement, Version};
use crate::watch::{WATCHES_MAX, Watchers};

/// Captures that wait for the snapshotter: one is being written, one may wait; a further one is skipped.
pub const CAPTURES_MAX: usize = 1;

/// Snapshots whose end the applier has not heard of: it looks before it orders one, and then those may have ended that were
/// being written and waiting, and the new one.
pub const SNAPSHOT_ENDS_MAX: usize = 3;

const _: () = assert!(SNAPSHOT_ENDS_MAX == CAPTURES_MAX + 2);

/// Stale reads that wait for the applier, each a request or those of one turn of an event loop: as many as there are
/// connections.
pub const VERSION_REQUESTS_MAX: usize = http::limits::CONNECTIONS_MAX;

/// Answers that the applier gives at once, before it goes on with its batch: the event loop writes them meanwhile. Fewer
/// cost more wake-ups; with all of a batch at once, clients wait for those behind them.
const ANSWERS_AT_ONCE: usize = 8;

/// Orders to remove older snapshots: one says it all until it is obeyed.
pub const REMOVALS_MAX: usize = 1;

/// The snapshotter's niceness, from 0, as for others, to 19: against one busy thread it gets a tenth of a processor.
const SNAPSHOTTER_NICENESS: i32 = 10;

/// How often a thread that has nothing to do says that it is alive.
const IDLE_INTERVAL: Duration = Duration::from_secs(1);

/// Why a node ended.
#[derive(Debug)]
pub struct NodeError(String);

impl fmt::Display for NodeError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for NodeError {}

/// The applier's thread.
pub struct ApplierThread {
    applier: Applier,
    batches: Receiver<ToApplier>,
    /// Stale reads that have found no version.
    version_requests: Receiver<Vec<ReplyTo>>,
    snapshotter: Sender<ToSnapshotter>,
    publication: Arc<Publication>,
    removals: Sender<u64>,
    watchers: Arc<Watchers>,
    /// The index up to which those who wait for changes have been told of them.
    told: u64,
    /// Ways into the event loops whose connections wait for answers.
    mailboxes: Vec<Arc<Mailbox<Reply>>>,
    metrics: Arc<Metrics>,
    progress: Progress,
    schedule: SnapshotSchedule,
    snapshot_ends: Receiver<SnapshotEnd>,
}

/// Takes what comes next, or sleeps until it comes. `recv` would give up the processor over and over for a while before
/// it sleeps: where each thread's next work is a long way off, that takes the processor from those whose work is there.
fn sleep_until_received<T>(receiver: &Receiver<T>, timeout: Duration) -> Result<T, RecvTimeoutError> {
    match receiver.try_recv() {
        Ok(next) => return Ok(next),
        Err(TryRecvError::Disconnected) => return Err(RecvTimeoutError::Disconnected),
        Err(TryRecvError::Empty) => {}
    }
    let mut select = Select::new();
    select.recv(receiver);
    match select.select_timeout(timeout) {
        Ok(operation) => operation.recv(receiver).map_err(|_| RecvTimeoutError::Disconnected),
        Err(_) => Err(RecvTimeoutError::Timeout),
    }
}

/// How a snapshot went that the applier has ordered.
pub enum SnapshotEnd {
    /// It is on the disk, with so many bytes.
    Written(u64),
    /// It could not be written.
    Failed,
}

impl ApplierThread {
    fn run(mut self) -> Result<(), String> {
        let mut done: Vec<(ReplyTo, Done)> = Vec::new();
        loop {
            match sleep_until_received(&self.batches, IDLE_INTERVAL) {
                Ok(ToApplier::Batch(batch)) => {
                    fail_point("applier-batch-taken");
                    let started = Instant::now();
                    let mut restored = None;
                    let mut batch = batch.into_iter();
                    while !batch.as_slice().is_empty() {
                        let ahead = batch.as_slice().len().min(LOOK_AHEAD_KEYS);
                        self.applier.look_ahead(&batch.as_slice()[..ahead]);
                        for apply in batch.by_ref().take(ahead) {
                            if done.len() >= ANSWERS_AT_ONCE {
                                self.publish(&mut done);
                            }
                            match &apply {
                                Apply::Command { command, .. } => self.schedule.applied(command.len()),
                                Apply::Restore { index, .. } => restored = Some(*index),
                                _ => {}
                            }
                            self.applier.apply(apply, &mut done).map_err(|error| error.to_string())?;
                        }
                    }
                    fail_point("applier-publish-before");
                    self.publish(&mut done);
                    self.metrics.apply_duration.observe(started.elapsed().as_secs_f64());
                    if let Some(index) = restored {
                        self.restored(index);
                    }
                }
                // Taken again before anything more is applied, it would be the same.
                Ok(ToApplier::SnapshotWanted) if self.schedule.has(self.applier.applied_index()) => {}
                Ok(ToApplier::SnapshotWanted) => self.capture(None),
                Ok(ToApplier::DiskShort) => self.schedule.end_rest(),
                Ok(ToApplier::Snapshot(reply)) => self.capture(Some(reply)),
                Ok(ToApplier::VersionWanted) | Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => return Ok(()),
            }
            // Whatever was taken: who found the queue full relies on what is in it.
            if !self.version_requests.is_empty() {
                self.publish(&mut done);
            }
            if self.is_snapshot_due() {
                self.capture(None);
            }
            self.progress.note();
        }
    }

    /// Makes the new state visible, and only then tells those who wait for it.
    fn publish(&mut self, done: &mut Vec<(ReplyTo, Done)>) {
        done.extend(self.version_requests.try_iter().flatten().map(|waiter| (waiter, Done::Read)));
        let state = self.applier.state();
        let wanted = self.publication.is_wanted() || self.watchers.count() > 0;
        let version = match self.publication.published() {
            Some(published) if published.applied_index() == state.applied_index() => published,
            _ if wanted => self.publication.publish(state.version()),
            published => {
                if published.is_some() {
                    self.publication.withdraw();
                }
                self.publication.note(state.applied_index(), state.keys() as u64, state.bytes());
                // For those only who have it coming.
                Arc::new(state.version())
            }
        };
        self.applier.forget_replaced();
        let told = std::mem::replace(&mut self.told, version.applied_index());
        // Asked only now: a client that begins to wait later sees how far the state was said to be.
        if self.watchers.any() {
            match version.changed_keys(told) {
                Ok(keys) => self.watchers.changed(told, version.applied_index(), keys),
                // A snapshot took the place of more than the history holds.
                Err(_) => self.watchers.all_changed(),
            }
        }
        if !done.is_empty() {
            fail_point("applier-answer-before");
        }
        for (waiter, done) in done.drain(..) {
            let reply = match done {
                Done::Write(reply) => Reply::Write(reply),
                Done::Read => Reply::Read(Ok(version.clone())),
                Done::Admin(membership) => Reply::Admin(AdminReply::Done(membership)),
            };
            waiter.put(reply);
        }
        fail_point("applier-wake-before");
        self.mailboxes.iter().for_each(|mailbox| mailbox.wake());
    }

    /// A snapshot from the leader is in place: it is as good as one of this node's own, and the log names it.
    fn restored(&mut self, index: u64) {
        log::info!("restored the snapshot of index {index}");
        self.schedule.restored(index);
        // Full, the order comes again behind the next snapshot.
        let _ = self.removals.try_send(index);
    }

    fn is_snapshot_due(&mut self) -> bool {
        self.hear_of_snapshots();
        self.schedule.is_due(self.applier.applied_index(), Instant::now())
    }

    /// Notes how the last snapshots went.
    fn hear_of_snapshots(&mut self) {
        let now = Instant::now();
        for end in self.snapshot_ends.try_iter() {
            match end {
                SnapshotEnd::Written(bytes) => self.schedule.written(bytes, now),
                SnapshotEnd::Failed => self.schedule.failed(now),
            }
        }
    }

    /// Takes a snapshot of this moment, unless one is still being written.
    fn capture(&mut self, reply: Option<Sender<Result<SnapshotInfo, Refusal>>>) {
        self.hear_of_snapshots();
        let capture = Box::new(self.applier.capture());
        fail_point("snapshot-order-before");
        match self.snapshotter.try_send(ToSnapshotter { capture, reply }) {
            Ok(()) => self.schedule.captured(self.applier.applied_index()),
            Err(TrySendError::Full(ToSnapshotter { reply: Some(reply), .. })) => {
                drop(reply.try_send(Err(Refusal::Overloaded("another snapshot is being written"))));
            }
            // Tried again after the next batch; or the node ends.
            Err(_) => {}
        }
    }
}

/// The snapshotter's thread: writes snapshots, so that neither the driver nor the applier waits for a large file.
pub struct SnapshotterThread {
    orders: Receiver<ToSnapshotter>,
    removals: Receiver<u64>,
    files: SnapshotFiles,
    events: Sender<Event>,
    /// Tells the applier how it went.
    ends: Sender<SnapshotEnd>,
    metrics: Arc<Metrics>,
}

impl SnapshotterThread {
    fn run(self) -> Result<(), String> {
        be_nice();
        loop {
            select! {
                recv(self.orders) -> order => match order {
                    Ok(ToSnapshotter { capture, reply }) => {
                        fail_point("snapshot-order-taken");
                        self.write(&capture, reply)?;
                    }
                    Err(_) => break,
                },
                recv(self.removals) -> index => match index {
                    Ok(index) => self.remove_older(index),
                    Err(_) => break,
                },
            }
        }
        // Who gives orders has ended, and says why: this thread must not be the first to end because of that.
        self.removals.iter().for_each(|index| self.remove_older(index));
        Ok(())
    }

    fn remove_older(&self, index: u64) {
        if let Err(error) = self.files.remove_older(index) {
            log::warn!("{error}; it will be tried again after the next snapshot");
        }
    }

    fn tell(&self, end: SnapshotEnd) {
        let told = self.ends.try_send(end);
        // The applier looks before each order that it gives. It is gone only when the node ends.
        assert!(!matches!(told, Err(TrySendError::Full(_))), "more snapshots have ended than were ordered");
    }

    /// A snapshot that can't be written costs disk space and a longer restart, not the node: the log still has it all.
    ///
    /// # Errors
    /// If the failure is one that ends the node.
    fn write(&self, capture: &Capture, reply: Option<Sender<Result<SnapshotInfo, Refusal>>>) -> Result<(), String> {
        let started = Instant::now();
        // There are never more than two with their names: the last one, and the one before until it is told to go.
        let mut remove = || self.removals.try_iter().for_each(|index| self.remove_older(index));
        let result = match self.files.write_then(capture, &mut remove) {
            Ok(info) => {
                let took = started.elapsed();
                log::info!("wrote the snapshot of index {}: {} bytes in {took:?}", info.index, info.bytes);
                self.metrics.snapshots.write.done(info.bytes, took);
                self.tell(SnapshotEnd::Written(info.bytes));
                let event = Event::SnapshotWritten { info, membership: capture.membership().clone() };
                fail_point("snapshot-report-before");
                // Waits for the driver, who waits for nobody here.
                let _ = self.events.send(event);
                Ok(info)
            }
            Err(error) if error.is_fatal() => return Err(error.to_string()),
            Err(error) => {
                log::warn!("{error}; the node goes on and tries again in {SNAPSHOT_RETRY_INTERVAL:?}");
                self.tell(SnapshotEnd::Failed);
                self.metrics.snapshots.write.failed();
                Err(Refusal::Full(error.to_string()))
            }
        };
        if let Some(reply) = reply {
            drop(reply.try_send(result));
        }
        Ok(())
    }
}

/// Lets the threads that clients wait for go first.
fn be_nice() {
    let me = rustix::thread::gettid();
    if let Err(error) = rustix::process::setpriority_process(Some(me), SNAPSHOTTER_NICENESS) {
        log::debug!("the snapshotter runs at the priority of all others: {error}");
    }
}

/// The node as its client connections see it.
pub struct NodeBackend {
    events: Sender<Event>,
    queued: QueuedRequests,
    applier: Sender<ToApplier>,
    version_requests: Sender<Vec<ReplyTo>>,
    publication: Arc<Publication>,
    watchers: Arc<Watchers>,
    driver_progress: Progress,
    applier_progress: Progress,
    started: Instant,
}

/// One connection's place for its one answer.
pub struct Session {
    reply: Sender<Reply>,
    replies: Receiver<Reply>,
}

impl Session {
    fn new() -> Session {
        let (reply, replies) = bounded(1);
        Session { reply, replies }
    }

    fn reply_to(&self) -> ReplyTo {
        ReplyTo::Thread(self.reply.clone())
    }
}

impl NodeBackend {
    /// Waits for the applier to give a version that is as new as it is.
    fn ask_applier(&self) -> Result<Arc<Version>, Refusal> {
        let session = Session::new();
        let deadline = Instant::now() + STALE_READ_TIMEOUT;
        self.submit_stale(vec![ClientRequest { ask: Ask::StaleRead, deadline, reply: session.reply_to() }]);
        match session.replies.recv_deadline(deadline) {
            Ok(Reply::Read(result)) => result,
            Ok(_) => unreachable!("a read is answered as a read"),
            Err(_) => Err(Refusal::APPLIER_STUCK),
        }
    }

    /// Asks the applier itself: a stale read must not wait for the driver's disk, nor behind what the driver has handed to
    /// the applier.
    fn submit_stale(&self, requests: Vec<ClientRequest>) {
        if requests.is_empty() {
            return;
        }
        let waiters = requests.into_iter().map(|request| request.reply).collect();
        let (waiters, refusal) = match self.version_requests.try_send(waiters) {
            Ok(()) => {
                // Full, the applier has something to take, and looks for requests behind it.
                let _ = self.applier.try_send(ToApplier::VersionWanted);
                return;
            }
            Err(TrySendError::Full(waiters)) => (waiters, Refusal::APPLIER_STUCK),
            Err(TrySendError::Disconnected(waiters)) => (waiters, Refusal::Stopping),
        };
        waiters.into_iter().for_each(|waiter| waiter.send(Reply::Read(Err(refusal.clone()))));
    }

    fn submit_to_driver(&self, requests: Vec<ClientRequest>) {
        if requests.is_empty() {
            return;
        }
        let Some(share) = self.queued.admit(requests.len()) else {
            requests.into_iter().for_each(|request| request.refuse(Refusal::Overloaded(QUEUE_FULL)));
            return;
        };
        fail_point("loop-submit-before");
        let Err(error) = self.events.try_send(Event::Clients(requests, share)) else { return };
        let (Event::Clients(requests, _), refusal) = (match error {
            TrySendError::Full(event) => (event, Refusal::Overloaded(QUEUE_FULL)),
            TrySendError::Disconnected(event) => (event, Refusal::Stopping),
        }) else {
            unreachable!("what was sent comes back");
        };
        requests.into_iter().for_each(|request| request.refuse(refusal.clone()));
    }

    /// Sends a request to the driver and waits for its answer. `None`: none came, and it will not be looked at later.
    fn ask(&self, session: &mut Session, event: Event, deadline: Instant) -> Result<Option<Reply>, Refusal> {
        self.events.try_send(event).map_err(refusal)?;
        match session.replies.recv_deadline(deadline + ANSWER_GRACE) {
            Ok(reply) => Ok(Some(reply)),
            Err(_) => {
                // A late answer must not be taken for that of the connection's next request.
                *session = Session::new();
                Ok(None)
            }
        }
    }
}

/// What a client is told whose request finds no room in a queue.
const QUEUE_FULL: &str = "the node's queue is full";

fn refusal<T>(error: TrySendError<T>) -> Refusal {
    match error {
        TrySendError::Full(_) => Refusal::Overloaded(QUEUE_FULL),
        TrySendError::Disconnected(_) => Refusal::Stopping,
    }
}

impl Backend for NodeBackend {
    type Session = Session;

    fn session(&self) -> Session {
        Session::new()
    }

    fn submit(&self, requests: &mut Vec<ClientRequest>) {
        if requests.is_empty() {
            return;
        }
        let is_stale = |request: &ClientRequest| matches!(request.ask, Ask::StaleRead);
        if !requests.iter().any(is_stale) {
            return self.submit_to_driver(std::mem::take(requests));
        }
        let (stale, others) = requests.drain(..).partition(is_stale);
        self.submit_stale(stale);
        self.submit_to_driver(others);
    }

    fn write(&self, session: &mut Session, command: Bytes, deadline: Instant) -> WriteReply {
        let event = Event::Client(ClientRequest { ask: Ask::Write(command), deadline, reply: session.reply_to() });
        match self.ask(session, event, deadline) {
            Ok(Some(Reply::Write(reply))) => reply,
            Ok(Some(_)) => unreachable!("a write is answered as a write"),
            Ok(None) => WriteReply::Unknown("the node did not answer in time"),
            Err(refusal) => WriteReply::NotApplied(refusal),
        }
    }

    fn read(&self, session: &mut Session, deadline: Instant) -> Result<Arc<Version>, Refusal> {
        let event = Event::Client(ClientRequest { ask: Ask::Read, deadline, reply: session.reply_to() });
        match self.ask(session, event, deadline)? {
            Some(Reply::Read(result)) => result,
            Some(_) => unreachable!("a read is answered as a read"),
            None => Err(Refusal::NoLeader),
        }
    }

    fn stale(&self) -> Result<Arc<Version>, Refusal> {
        self.newest().map_or_else(|| self.ask_applier(), Ok)
    }

    fn newest(&self) -> Option<Arc<Version>> {
        self.publication.newest()
    }

    fn applied(&self) -> (u64, u64) {
        (self.publication.applied_index(), self.publication.keys())
    }

    fn status(&self, deadline: Instant) -> Result<Status, Refusal> {
        let (reply, replies) = bounded(1);
        self.events.try_send(Event::Status(reply)).map_err(refusal)?;
        replies.recv_deadline(deadline).map_err(|_| Refusal::Overloaded("the driver does not answer"))
    }

    fn live(&self) -> Result<(), &'static str> {
        match (self.driver_progress.stalled(), self.applier_progress.stalled()) {
            (true, _) => Err("driver"),
            (_, true) => Err("applier"),
            _ => Ok(()),
        }
    }

    fn admin(&self, request: AdminRequest, deadline: Instant) -> AdminReply {
        let mut session = Session::new();
        let event = Event::Admin { request, deadline, reply: session.reply_to() };
        match self.ask(&mut session, event, deadline) {
            Ok(Some(Reply::Admin(reply))) => reply,
            Ok(Some(_)) => unreachable!("a change of the cluster is answered as one"),
            Ok(None) => AdminReply::Unknown("the node did not answer in time"),
            Err(refusal) => AdminReply::Refused(refusal),
        }
    }

    fn snapshot(&self, deadline: Instant) -> Result<SnapshotInfo, Refusal> {
        let (reply, replies) = bounded(1);
        self.applier.try_send(ToApplier::Snapshot(reply)).map_err(refusal)?;
        replies.recv_deadline(deadline).map_err(|_| Refusal::Overloaded("the snapshot is not on disk yet"))?
    }

    fn uptime(&self) -> Duration {
        self.started.elapsed()
    }

    fn watchers(&self) -> &Watchers {
        &self.watchers
    }
}

/// What the metrics look at when somebody asks for them.
struct Gauges {
    events: Sender<Event>,
    applier: Sender<ToApplier>,
    version_requests: Sender<Vec<ReplyTo>>,
    snapshotter: Sender<ToSnapshotter>,
    publication: Arc<Publication>,
    watchers: Arc<Watchers>,
    disk: Arc<dyn Disk>,
    store_bytes_max: u64,
}

impl Gauges {
    fn read(&self, metrics: &Metrics, clients: &http::Connections, peers: &http::Connections) {
        let queues = &metrics.queues;
        queues.driver.set(self.events.len(), EVENTS_MAX);
        queues.applier.set(self.applier.len(), APPLY_BATCHES_MAX);
        queues.versions.set(self.version_requests.len(), VERSION_REQUESTS_MAX);
        queues.snapshotter.set(self.snapshotter.len(), CAPTURES_MAX);
        queues.watches.set(self.watchers.count(), WATCHES_MAX);
        metrics.client_connections.set(clients.open(), clients.limit(), clients.refused());
        metrics.peer_connections.set(peers.open(), peers.limit(), peers.refused());
        metrics.position.set_applied(self.publication.applied_index());
        metrics.store.set(self.publication.keys(), self.publication.bytes(), self.store_bytes_max);
        if let Ok(free) = self.disk.free_bytes() {
            metrics.store.set_disk_free(free, FREE_BYTES_RESERVE);
        }
    }
}

/// How long a joiner looks for a member that answers.
const JOIN_TIMEOUT: Duration = Duration::from_secs(30);

/// How long it waits before it asks all of them again.
const JOIN_PAUSE: Duration = Duration::from_millis(500);

/// How long shutdown waits for a server's connections, beyond the requests in flight.
const SERVER_STOP_TIMEOUT: Duration = Duration::from_secs(1);

/// How long the driver may take over a peer's introduction; it syncs what it learns.
const HELLO_TIMEOUT: Duration = Duration::from_secs(2);

/// The peer server's way to the driver.
struct Inbox {
    events: Sender<Event>,
    files: SnapshotFiles,
    me: NodeId,
    peer_bytes: Arc<ByteBudget>,
    /// One snapshot at a time is received: a second one would only compete for the disk.
    receiving: AtomicBool,
    metrics: Arc<Metrics>,
}

impl PeerInbox for Inbox {
    fn hello(&self, hello: &Hello) -> Result<HelloAnswer, HelloRefusal> {
        let (reply, replies) = bounded(1);
        let not_ready = |_| HelloRefusal::NotReady("the driver does not answer".to_owned());
        self.events.send_timeout(Event::Hello(Box::new(hello.clone()), reply), HELLO_TIMEOUT).map_err(not_ready)?;
        match replies.recv_timeout(HELLO_TIMEOUT) {
            Ok(answer) => answer,
            Err(_) => Err(HelloRefusal::NotReady("the driver does not answer".to_owned())),
        }
    }

    fn deliver(&self, from: NodeId, messages: Vec<PeerMessage>) -> Result<(), peer_server::Stopped> {
        // Waits while too much is waiting already: TCP then slows the peer down.
        let bytes = messages.iter().map(PeerMessage::frame_bytes).sum();
        let share = self.peer_bytes.take(bytes).ok_or(peer_server::Stopped)?;
        self.events.send(Event::Peer(from, messages, share)).map_err(|_| peer_server::Stopped)
    }

    fn offer_snapshot(&self, _from: NodeId, header: &SnapshotHeader) -> Result<(), SnapshotRefusal> {
        if self.receiving.load(Ordering::Acquire) {
            return Err(SnapshotRefusal::Unwanted("another snapshot is being received".to_owned()));
        }
        let what = format!("the snapshot of index {}", header.index);
        self.files.check_room(&what, header.bytes).map_err(|error| SnapshotRefusal::NoSpace(error.to_string()))
    }

    fn receive_snapshot(
        &self,
        from: NodeId,
        header: &SnapshotHeader,
        body: &mut dyn Read,
    ) -> Result<(), SnapshotRefusal> {
        if self.receiving.swap(true, Ordering::Acquire) {
            return Err(SnapshotRefusal::Unwanted("another snapshot is being received".to_owned()));
        }
        let result = self.receive(from, header, body);
        self.receiving.store(false, Ordering::Release);
        result
    }
}

impl Inbox {
    fn receive(&self, from: NodeId, header: &SnapshotHeader, body: &mut dyn Read) -> Result<(), SnapshotRefusal> {
        log::info!("receiving the snapshot of index {} ({} bytes) from member {from}", header.index, header.bytes);
        let started = Instant::now();
        let received = self.files.receive(header.index, header.term, &mut body.take(header.bytes));
        let Received { state, membership, info } = received.map_err(|error| {
            if error.is_fatal() {
                // The driver ends the node. Stopping, it does so anyway.
                drop(self.events.send(Event::Failed(error.to_string())));
                return SnapshotRefusal::Stopping;
            }
            log::warn!("refused the snapshot of index {} from member {from}: {error}", header.index);
            self.metrics.snapshots.receive.failed();
            match error.is_full() {
                true => SnapshotRefusal::NoSpace(error.to_string()),
                false => SnapshotRefusal::Damaged(error.to_string()),
            }
        })?;
        log::info!("received the snapshot of index {}: {} bytes", info.index, info.bytes);
        self.metrics.snapshots.receive.done(info.bytes, started.elapsed());
        let mut message = Message { msg_type: MessageType::MsgSnapshot, from, to: self.me, ..Message::default() };
        message.term = header.leader_term;
        let metadata = message.mut_snapshot().mut_metadata();
        metadata.index = header.index;
        metadata.term = header.term;
        metadata.set_conf_state(membership.conf_state.clone());
        let (back, rest) = bounded(1);
        // There is room for the one state that comes back.
        let state = Box::new(Replacement::new(state, move |rest| drop(back.try_send(rest))));
        let event = Event::SnapshotReceived { from, message: Box::new(message), membership, state };
        fail_point("receive-report-before");
        self.events.send(event).map_err(|_| SnapshotRefusal::Stopping)?;
        // The driver and the applier have more important things to do than to free what they don't need any more.
        // Until then no other snapshot is received: there are no more than two states in memory.
        drop(rest.recv());
        Ok(())
    }
}

/// What ended, and how.
struct ThreadExit {
    name: &'static str,
    result: Result<End, String>,
}

/// A thread's orderly end.
#[derive(Debug, PartialEq, Eq)]
enum End {
    /// It was told to, or what it served has ended.
    Done,
    /// A signal asks the process to end.
    Signal,
    /// This node was removed from the cluster.
    Removed,
}

fn spawn(
    name: &'static str,
    exits: &Sender<ThreadExit>,
    body: impl FnOnce() -> Result<End, String> + Send + 'static,
) -> Result<(), NodeError> {
    let exits = exits.clone();
    let thread = move || {
        let result = body();
        // Room for every thread's one exit.
        let _ = exits.send(ThreadExit { name, result });
    };
    let spawned = thread::Builder::new().name(name.to_owned()).spawn(thread);
    spawned.map(drop).map_err(|error| NodeError(format!("failed to start the thread '{name}': {error}")))
}

/// Runs a node until a signal or a failure ends it.
///
/// # Errors
/// Whatever keeps the node from starting, or from keeping its promises; the text says what was attempted on what, and
/// the way out.
pub fn run(config: Config) -> Result<(), NodeError> {
    match Node::start(config)? {
        Some(node) => node.wait(),
        None => Ok(()),
    }
}

/// A running node.
struct Node {
    exits: Receiver<ThreadExit>,
    events: Sender<Event>,
    client_server: http::Handle,
    peer_server: http::Handle,
    watchers: Arc<Watchers>,
    request_timeout: Duration,
}

/// The threads that [`Node::start`] spawns, so that all their exits find room.
const THREADS: usize = 4;

impl Node {
    /// `None`: a signal came while it still looked for the cluster to join.
    fn start(config: Config) -> Result<Option<Node>, NodeError> {
        let started = Instant::now();
        // First of all, so that a signal during a long start is not lost.
        let (exits_tx, exits) = bounded(THREADS + 1);
        spawn_signals(&exits_tx)?;
        let disk = OsDisk::open(&config.data_dir).map_err(|error| {
            let is_full = error.kind() == std::io::ErrorKind::StorageFull;
            NodeError(format!("{error}{}", way_out(is_full)))
        })?;
        let metrics = Arc::new(Metrics::new());
        let disk: Arc<dyn Disk> = Arc::new(MeasuredDisk::new(disk, metrics.clone()));
        let client_port = bind("--port", &config.listen)?;
        let peer_port = bind("--peer-listen", &config.peer_listen)?;
        let contacts = match config.join {
            true => match find_cluster(&config, &disk, &exits)? {
                Some(contacts) => Some(contacts),
                None => return Ok(None),
            },
            false => None,
        };
        let opened = open_data_dir(&config, &disk, contacts.as_ref().map(|(cluster, _)| *cluster))?;
        let data_dir::Opened { identity, boot, earlier_boots, log, state, membership, snapshot_index } = opened;
        log::info!(
            "node {} of cluster {} starts for the {}th time with the snapshot of index {snapshot_index} and the log up to {}",
            config.id,
            identity.cluster,
            boot >> 32,
            log.last_index()
        );
        let me = NodeIdentity {
            cluster: Some(identity.cluster),
            id: config.id,
            directory: identity.directory,
            boot,
            earlier_boots: earlier_boots.into(),
            url: config.url.to_string(),
        };
        let core = RaftCore::open(
            log,
            CoreOptions {
                id: config.id,
                election_ticks: config.election_ticks,
                election_seed: random_u64()?,
                membership: membership.clone(),
                snapshot_index,
                logger: slog::Logger::root(slog_stdlog::StdLog.fuse(), slog::o!()),
            },
        )
        .map_err(|error| NodeError(error.to_string()))?;

        let position = Arc::new(LogPosition::default());
        position.set(core.term(), core.last_index());
        let acquaintances = Acquaintances::open(disk.clone()).map_err(|error| NodeError(error.to_string()))?;
        let (events_tx, events) = bounded(EVENTS_MAX);
        let (applier_tx, batches) = bounded(APPLY_BATCHES_MAX);
        let (version_requests_tx, version_requests) = bounded(VERSION_REQUESTS_MAX);
        let (snapshotter, orders) = bounded(CAPTURES_MAX);
        let (removals_tx, removals) = bounded(REMOVALS_MAX);
        let files = SnapshotFiles::new(disk.clone(), identity.cluster);
        let gentle_files = SnapshotFiles::new(Arc::new(GentleDisk::new(disk.clone())), identity.cluster);
        let applier = Applier::new(state, membership);
        let publication = Arc::new(Publication::new(applier.version()));
        let watchers = Arc::new(Watchers::default());
        let (driver_progress, applier_progress) = (Progress::new(started), Progress::new(started));

        let event_loops = event_loops()?;
        let (ends, snapshot_ends) = bounded(SNAPSHOT_ENDS_MAX);
        let room = Room::new(disk.clone(), publication.clone(), config.max_store_bytes, FREE_BYTES_RESERVE);
        let gauges = Gauges {
            events: events_tx.clone(),
            applier: applier_tx.clone(),
            version_requests: version_requests_tx.clone(),
            snapshotter: snapshotter.clone(),
            publication: publication.clone(),
            watchers: watchers.clone(),
            disk,
            store_bytes_max: config.max_store_bytes,
        };
        let backend = NodeBackend {
            events: events_tx.clone(),
            queued: QueuedRequests::default(),
            applier: applier_tx.clone(),
            version_requests: version_requests_tx,
            publication: publication.clone(),
            watchers: watchers.clone(),
            driver_progress: driver_progress.clone(),
            applier_progress: applier_progress.clone(),
            started,
        };
        let applier = ApplierThread {
            told: applier.applied_index(),
            applier,
            batches,
            version_requests,
            snapshotter,
            removals: removals_tx.clone(),
            publication,
            watchers: watchers.clone(),
            mailboxes: event_loops.iter().map(EventLoop::mailbox).collect(),
            metrics: metrics.clone(),
            progress: applier_progress,
            schedule: SnapshotSchedule::new(config.snapshot_count, snapshot_index),
            snapshot_ends,
        };
        let snapshotter = SnapshotterThread {
            orders,
            removals,
            files: gentle_files,
            events: events_tx.clone(),
            ends,
            metrics: metrics.clone(),
        };
        let driver = Driver {
            replica: Replica::new(core, boot, config.election_ticks),
            events,
            applier: applier_tx,
            network: PeerNetwork::new(
                me.clone(),
                position,
                files.clone(),
                acquaintances,
                contacts.map(|(_, members)| members).unwrap_or_default(),
                events_tx.clone(),
                metrics.clone(),
            ),
            options: DriverOptions {
                heartbeat_interval: config.heartbeat_interval,
                snapshot_catchup_entries: config.snapshot_catchup_entries,
                removals: removals_tx,
                room,
            },
            progress: driver_progress,
            started,
            more: false,
            announce_by: None,
            snapshot_asked: None,
            offences: Offences::default(),
            measures: Measures::new(metrics.clone()),
        };
        spawn("applier", &exits_tx, move || applier.run().map(|()| End::Done))?;
        spawn("snapshotter", &exits_tx, move || snapshotter.run().map(|()| End::Done))?;
        let peer_bytes = ByteBudget::new(PEER_BYTES_MAX);
        let closer = peer_bytes.closer();
        spawn("driver", &exits_tx, move || {
            let end = driver.run();
            // Nobody takes what is still waiting.
            drop(closer);
            match end {
                Ok(DriverEnd::Stopped) => Ok(End::Done),
                Ok(DriverEnd::Removed) => Ok(End::Removed),
                Ok(DriverEnd::Disowned(reason) | DriverEnd::Failed(reason)) => Err(reason),
                Err(error) => Err(error.to_string()),
            }
        })?;
        let inbox = Inbox {
            events: events_tx.clone(),
            files,
            me: config.id,
            peer_bytes,
            receiving: AtomicBool::new(false),
            metrics: metrics.clone(),
        };
        let peer_server = peer_port
            .serve(Arc::new(PeerServer::new(config.id, inbox, metrics.clone())), peer_server::limits(), "peer")
            .map_err(|error| NodeError(format!("failed to serve the peer port: {error}")))?;
        let limits = api::Limits {
            key_bytes_max: config.max_key_bytes,
            value_bytes_max: config.max_value_bytes,
            request_timeout: config.request_timeout,
        };
        let client_limits = limits.server();
        let client_server = client_port
            .serve_in_loops(Arc::new(Api::new(backend, limits, metrics.clone())), client_limits, "http", event_loops)
            .map_err(|error| NodeError(format!("failed to serve the key-value port: {error}")))?;
        let (clients, peers) = (client_server.connections(), peer_server.connections());
        metrics.read_with(move |metrics| gauges.read(metrics, &clients, &peers));
        log::info!("serving clients at {}, peers at {}", client_server.local_addr(), peer_server.local_addr());
        let request_timeout = config.request_timeout;
        Ok(Some(Node { exits, events: events_tx, client_server, peer_server, watchers, request_timeout }))
    }

    /// Waits for the first thread to end, and ends the others.
    fn wait(self) -> Result<(), NodeError> {
        let exit = self.exits.recv().map_err(|_| NodeError("every thread has ended".to_owned()))?;
        match exit.result {
            Ok(End::Signal) => self.stop(),
            Ok(End::Removed) => {
                self.watchers.stop();
                // All answers are given; what is left is to send them.
                let _ = self.client_server.stop(SERVER_STOP_TIMEOUT);
                log::info!("this node was removed from the cluster: it ends, and its data directory can be deleted");
                Ok(())
            }
            Ok(End::Done) => Err(NodeError(format!("the thread '{}' has ended", exit.name))),
            Err(reason) => Err(NodeError(reason)),
        }
    }

    /// Clients first: no new ones, answers for those who wait; then leadership; then the end.
    fn stop(self) -> Result<(), NodeError> {
        log::info!("stopping: no new connections, answering what is in flight");
        let by = Instant::now() + self.request_timeout;
        self.watchers.stop();
        let driver_stops = self.events.send_timeout(Event::Stop, self.request_timeout);
        let stopped = self.client_server.stop(self.request_timeout.saturating_sub(SERVER_STOP_TIMEOUT));
        if stopped.cut_off > 0 {
            log::warn!("cut off {} connections that did not end in time", stopped.cut_off);
        }
        if driver_stops.is_ok() {
            loop {
                match self.exits.recv_deadline(by) {
                    Ok(ThreadExit { name: "driver", result }) => {
                        result.map_err(NodeError)?;
                        break;
                    }
                    Ok(ThreadExit { result, .. }) => {
                        result.map_err(NodeError)?;
                    }
                    Err(_) => {
                        log::warn!("the driver did not end in time; what it has acknowledged is on disk");
                        break;
                    }
                }
            }
        }
        let _ = self.peer_server.stop(Duration::ZERO);
        log::info!("stopped");
        Ok(())
    }
}

fn bind(flag: &str, address: &Address) -> Result<http::Listener, NodeError> {
    http::Listener::bind(address.to_string()).map_err(|error| {
        NodeError(format!("failed to listen at {address}: {error}; free the port or give another {flag}"))
    })
}

/// The event loops of the client port: one for every two processors, because the driver, the applier and the peers
/// want some too, and four at most, which keep any driver busy.
fn event_loops() -> Result<Vec<EventLoop<Reply>>, NodeError> {
    let processors = thread::available_parallelism().map_or(1, usize::from);
    let loops = (0..(processors / 2).clamp(1, 4)).map(|_| EventLoop::new(http::limits::CONNECTIONS_MAX));
    loops.collect::<Result<_, _>>().map_err(|error| NodeError(format!("failed to make an event loop: {error}")))
}

fn random_u64() -> Result<u64, NodeError> {
    getrandom::u64().map_err(|error| NodeError(format!("failed to draw a random number from the system: {error}")))
}

/// Asks the members that a joiner was told of until one names its cluster, and the others of it. `None`: a signal came.
fn find_cluster(
    config: &Config,
    disk: &Arc<dyn Disk>,
    exits: &Receiver<ThreadExit>,
) -> Result<Option<(ClusterId, Membership)>, NodeError> {
    let is_new = data_dir::is_new(disk, config.id).map_err(|error| NodeError(error.to_string()))?;
    let (url, earlier_boots) = (config.url.to_string(), [].into());
    let me = NodeIdentity { cluster: None, id: config.id, directory: 0, boot: 0, earlier_boots, url };
    let hello = Hello::new(&me, 0, &LogPosition::default());
    let by = Instant::now() + JOIN_TIMEOUT;
    loop {
        let mut reason = "there is no other member in --cluster".to_owned();
        for (_, url) in config.members.iter().filter(|(id, _)| **id != config.id) {
            match say_hello(&url.to_string(), &hello) {
                Ok(HelloAnswer { cluster: Some(cluster), members: Some(members), .. }) => {
                    match Membership::decode(&members) {
                        Ok(members) => return Ok(Some((cluster, members))),
                        Err(error) => reason = format!("{url} answered with a {error}"),
                    }
                }
                Ok(_) => reason = format!("{url} has not joined a cluster itself"),
                // With its old data directory it is told in a moment, and ends; with a new one it is no member's heir.
                Err(HelloError::Refused(HelloRefusal::Removed)) if is_new => {
                    return Err(NodeError(format!(
                        "failed to join the cluster at {url}: id {} was removed from it, and an id is never used \
                         again; take a new one",
                        config.id
                    )));
                }
                Err(error) => reason = format!("{url}: {error}"),
            }
        }
        if !is_new {
            // It knows its cluster, and usually the members too.
            return Ok(Some((ClusterId([0; 16]), Membership::default())));
        }
        if Instant::now() >= by {
            return Err(NodeError(format!(
                "failed to find a cluster to join: {reason}; give --cluster the peer URL of a member that runs"
            )));
        }
        match exits.recv_timeout(JOIN_PAUSE) {
            Ok(ThreadExit { result: Err(reason), .. }) => return Err(NodeError(reason)),
            Ok(_) => {
                log::info!("stopped before a member of the cluster had answered");
                return Ok(None);
            }
            Err(_) => {}
        }
    }
}

fn open_data_dir(
    config: &Config,
    disk: &Arc<dyn Disk>,
    joined: Option<ClusterId>,
) -> Result<data_dir::Opened, NodeError> {
    let members = config.members.iter().map(|(id, url)| (*id, url.to_string()));
    let options = OpenOptions {
        id: config.id,
        cluster: joined.unwrap_or_else(|| config.cluster_id()),
        beginning: if config.join { Beginning::Join } else { Beginning::Found(Membership::founding(members)) },
        directory: (u128::from(random_u64()?) << 64) | u128::from(random_u64()?),
        boot_random: random_u64()? as u32,
        log: LogOptions::default(),
    };
    let what = config.data_dir.display();
    data_dir::open(disk, &options).map_err(|error| {
        NodeError(format!("failed to open the data directory {what}: {error}{}", way_out(error.is_full())))
    })
}

/// What a message about the disk at start ends with.
fn way_out(is_full: bool) -> &'static str {
    if is_full { "; free some space and start the node again" } else { "" }
}

fn spawn_signals(exits: &Sender<ThreadExit>) -> Result<(), NodeError> {
    let signals = signal_hook::iterator::Signals::new([signal_hook::consts::SIGTERM, signal_hook::consts::SIGINT]);
    let mut signals = signals.map_err(|error| NodeError(format!("failed to watch for signals: {error}")))?;
    spawn("signals", exits, move || {
        let _ = signals.forever().next();
        Ok(End::Signal)
    })
}

#[cfg(test)]
mod queues;
#[cfg(test)]
mod tests;
