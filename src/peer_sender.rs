//! Takes messages to one peer: two threads, `peer-2-fast` and `peer-2-bulk`, each with its own queue and connection,
//! so that heartbeats never wait behind log entries.
//!
//! ```text
//! driver -- PeerSender::send --> bounded queue --> lane thread: hello, then POST after POST of frames --> peer
//!   ^---------------------------- PeerReport ----------'
//! ```
//!
//! A lane's POST is an endless chunked body that ends itself after [`STREAM_LIFETIME`]; the answer says that all of it
//! was delivered, and the next POST follows on the same connection. Writing alone would not do: a host that vanished
//! without a word takes bytes into its socket buffer for a long time, and a connection that survived a partition
//! waits as long again for TCP's next retransmission. The answer that stays out finds both within seconds. One POST per
//! batch would find them too, and was measured to double the time from node to node (110 against 50 µs there and back
//! for 200 bytes on loopback) and to carry a third to a half of the messages.
//!
//! Nothing is promised about a message: on any failure what is in hand is dropped, the driver is told once per
//! attempt, and the lane tries again after a short, growing, jittered pause. Raft sends again what still matters.

use std::convert::Infallible;
use std::fmt;
use std::io::{self, Read};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, RecvTimeoutError, Sender, TryRecvError, TrySendError, bounded};
use log::{debug, info, warn};
use ureq::{Agent, Body, SendBody, http};

use crate::fail_point::fail_point;
use crate::membership::NodeId;
use crate::metrics::{DropCause, Sent};
use crate::peer_protocol::{
    ANSWER_BYTES_MAX, FRAME_BYTES_MAX, HELLO_HEADER, HELLO_PATH, Hello, HelloAnswer, HelloRefusal, Lane, LogPosition,
    LoggedCauses, NodeIdentity, PeerMessage, SNAPSHOT_HEADER, SNAPSHOT_PATH, STREAM_PATH, SnapshotHeader,
};
use crate::raft_core::APPEND_BYTES_MAX;

/// When a stream ends itself to be answered. Dead connections are found within this and [`ANSWER_TIMEOUT`]; a round
/// trip each second costs nothing measurable.
pub const STREAM_LIFETIME: Duration = Duration::from_secs(1);

/// For a connection to be made. Short, because a packet lost to a partition is sent again only by the next attempt.
pub const CONNECT_TIMEOUT: Duration = Duration::from_secs(1);

/// For an answer, once everything is sent. A peer that delivers nothing for so long is no help to anyone.
pub const ANSWER_TIMEOUT: Duration = Duration::from_secs(3);

/// The same for the bulk lane, where the sockets of both sides may hold megabytes that a slow link must carry first.
pub const BULK_ANSWER_TIMEOUT: Duration = Duration::from_secs(5);

/// For a single write: how long a peer may leave its socket full.
pub const WRITE_TIMEOUT: Duration = Duration::from_secs(5);

/// For the answer to a snapshot, which the peer first makes durable and opens.
pub const SNAPSHOT_ANSWER_TIMEOUT: Duration = Duration::from_secs(60);

/// The first pause after a failure: a peer that is restarted is missed for about so long.
pub const BACKOFF_MIN: Duration = Duration::from_millis(50);

/// The longest pause: half the default election timeout, so that a peer that comes back hears its leader in time.
pub const BACKOFF_MAX: Duration = Duration::from_millis(500);

/// Messages that waited longer for a connection are dropped: Raft has sent newer ones, or given up.
pub const MESSAGE_AGE_MAX: Duration = Duration::from_millis(500);

/// Messages waiting in the fast lane: some hundred per tick at most.
pub const FAST_MESSAGES_MAX: usize = 4096;

/// Bytes waiting in the fast lane.
pub const FAST_BYTES_MAX: usize = 4 << 20;

/// Messages waiting in the bulk lane: Raft itself keeps fewer appends in flight.
pub const BULK_MESSAGES_MAX: usize = 1024;

/// Bytes waiting in the bulk lane. Most are shared with the log in memory.
pub const BULK_BYTES_MAX: usize = 64 << 20;

const _: () = assert!(FRAME_BYTES_MAX < BULK_BYTES_MAX, "the longest frame fits an empty queue");

/// How long a lane waits for the answer to a stream or a hello.
const fn answer_timeout(lane: Lane) -> Duration {
    match lane {
        Lane::Fast => ANSWER_TIMEOUT,
        Lane::Bulk => BULK_ANSWER_TIMEOUT,
    }
}

/// What is gathered into one write, if so much is waiting. Also the size of the buffers of `ureq`.
const fn write_bytes(lane: Lane) -> usize {
    match lane {
        Lane::Fast => 16 << 10,
        Lane::Bulk => 128 << 10,
    }
}

/// Room for frames that a lane keeps between two writes: that of the usual message. A larger one gets its room for itself,
/// because memory that is given back and taken anew for each write costs as much time as the copy into it.
const fn frames_bytes_kept(lane: Lane) -> usize {
    match lane {
        Lane::Fast => 2 * write_bytes(lane),
        Lane::Bulk => 2 * APPEND_BYTES_MAX as usize,
    }
}

/// Whom a [`PeerSender`] talks to, and for whom.
#[derive(Clone, Debug)]
pub struct SenderConfig {
    /// This node.
    pub me: NodeIdentity,
    /// The peer.
    pub peer: NodeId,
    /// The peer's URL: `http://host:port`.
    pub url: String,
    /// Where this node's log ends, for the hello.
    pub position: Arc<LogPosition>,
    /// Counts what becomes of the messages.
    pub metrics: Arc<Sent>,
}

/// What a lane tells the driver.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PeerReport {
    /// A connection was made and the hello accepted. What was sent while there was none may be lost.
    Connected {
        /// The peer.
        peer: NodeId,
        /// The lane.
        lane: Lane,
        /// Who answered.
        answer: HelloAnswer,
    },
    /// An attempt failed: messages were dropped. For `RawNode::report_unreachable`.
    Unreachable {
        /// The peer.
        peer: NodeId,
        /// The lane.
        lane: Lane,
    },
    /// The peer refused this node: [`HelloRefusal::Removed`] says that it does not belong any more. Comes instead of
    /// [`PeerReport::Unreachable`] and means that too.
    Refused {
        /// The peer.
        peer: NodeId,
        /// The lane.
        lane: Lane,
        /// Why.
        refusal: HelloRefusal,
    },
}

/// Why a message was not even queued.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Dropped {
    /// The lane's queue is full: the peer is slow or away. For `RawNode::report_unreachable`.
    Full,
    /// It is beyond a limit of the protocol: no peer would take it, now or later.
    TooLarge,
    /// The lane's thread has ended, which only a panic explains.
    Gone,
}

impl Dropped {
    fn cause(self) -> DropCause {
        match self {
            Dropped::Full => DropCause::QueueFull,
            Dropped::TooLarge => DropCause::TooLarge,
            Dropped::Gone => DropCause::Ended,
        }
    }
}

type Reports = Arc<dyn Fn(PeerReport) + Send + Sync>;

/// The way to one peer at one URL. Dropping it stops both threads without waiting for them: they send what is queued
/// if they are connected, and are gone when the step they are in ends or times out, at most [`WRITE_TIMEOUT`] and
/// [`BULK_ANSWER_TIMEOUT`] later. [`PeerSender::stop`] waits, for a bounded time.
pub struct PeerSender {
    fast: LaneQueue,
    bulk: LaneQueue,
}

impl PeerSender {
    /// Starts both lanes, which connect at once. `reports` is called from their threads and must not block.
    ///
    /// # Errors
    /// If the system gives no threads.
    pub fn spawn(config: SenderConfig, reports: impl Fn(PeerReport) + Send + Sync + 'static) -> io::Result<Self> {
        let config = Arc::new(config);
        let reports: Reports = Arc::new(reports);
        Ok(PeerSender {
            fast: LaneThread::spawn(Lane::Fast, Arc::clone(&config), Arc::clone(&reports))?,
            bulk: LaneThread::spawn(Lane::Bulk, config, reports)?,
        })
    }

    /// Queues a message for its lane. Never blocks.
    ///
    /// # Errors
    /// If it was dropped.
    pub fn send(&self, message: PeerMessage) -> Result<(), Dropped> {
        match message.lane() {
            Lane::Fast => self.fast.send(message),
            Lane::Bulk => self.bulk.send(message),
        }
    }

    /// Stops all lanes, gives them `within` to send what is queued, and then cuts their connections.
    pub fn stop(senders: impl IntoIterator<Item = PeerSender>, within: Duration) {
        let deadline = Instant::now() + within;
        let lanes = senders.into_iter().flat_map(|sender| [sender.fast, sender.bulk]);
        // All at once: a peer that does not answer must not take the others' time.
        let lanes: Vec<_> = lanes.map(|lane| (lane.ended, lane.agent)).collect();
        for (ended, agent) in lanes {
            let _ = ended.recv_deadline(deadline);
            agent.shutdown();
        }
    }
}

/// The driver's end of a lane. Dropping `queue` and `_stop` is what ends the thread.
struct LaneQueue {
    queue: Sender<Queued>,
    bytes: Arc<AtomicUsize>,
    bytes_max: usize,
    lane: Lane,
    metrics: Arc<Sent>,
    _stop: Sender<Infallible>,
    ended: Receiver<Infallible>,
    agent: Agent,
}

struct Queued {
    message: PeerMessage,
    bytes: usize,
    at: Instant,
}

impl LaneQueue {
    fn send(&self, message: PeerMessage) -> Result<(), Dropped> {
        let bytes = message.frame_bytes();
        self.enqueue(message, bytes).inspect_err(|dropped| self.metrics.dropped(1, dropped.cause()))
    }

    fn enqueue(&self, message: PeerMessage, bytes: usize) -> Result<(), Dropped> {
        if bytes > self.bytes_max || !message.is_within_limits() {
            return Err(Dropped::TooLarge);
        }
        // Only this thread adds, so the sum cannot pass the limit between check and addition.
        if self.bytes.load(Ordering::Relaxed) + bytes > self.bytes_max {
            return Err(Dropped::Full);
        }
        self.bytes.fetch_add(bytes, Ordering::Relaxed);
        self.metrics.lane(self.lane).queued(bytes);
        self.queue.try_send(Queued { message, bytes, at: Instant::now() }).map_err(|e| {
            self.bytes.fetch_sub(bytes, Ordering::Relaxed);
            self.metrics.lane(self.lane).taken(bytes);
            match e {
                TrySendError::Full(_) => Dropped::Full,
                TrySendError::Disconnected(_) => Dropped::Gone,
            }
        })
    }
}

// ---------------------------------------------------------------------------------------------------- lane thread

/// The thread of one lane.
struct LaneThread {
    lane: Lane,
    config: Arc<SenderConfig>,
    agent: Agent,
    stream_url: String,
    queue: LaneEnd,
    stop: Receiver<Infallible>,
    reports: Reports,
    causes: LoggedCauses,
    backoff: Duration,
    _ended: Sender<Infallible>,
}

/// How a conversation failed.
enum Failure {
    Refused(HelloRefusal),
    Broken(String),
}

impl From<HelloError> for Failure {
    fn from(error: HelloError) -> Self {
        match error {
            HelloError::Refused(refusal) => Failure::Refused(refusal),
            HelloError::Failed(cause) => Failure::Broken(cause),
        }
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Failure::Refused(refusal) => write!(f, "refused: {refusal}"),
            Failure::Broken(cause) => f.write_str(cause),
        }
    }
}

impl LaneThread {
    fn spawn(lane: Lane, config: Arc<SenderConfig>, reports: Reports) -> io::Result<LaneQueue> {
        let (messages_max, bytes_max) = match lane {
            Lane::Fast => (FAST_MESSAGES_MAX, FAST_BYTES_MAX),
            Lane::Bulk => (BULK_MESSAGES_MAX, BULK_BYTES_MAX),
        };
        let (queue_tx, queue_rx) = bounded(messages_max);
        let (stop_tx, stop_rx) = bounded(0);
        let (ended_tx, ended_rx) = bounded(0);
        let bytes = Arc::new(AtomicUsize::new(0));
        let agent = agent(write_bytes(lane), answer_timeout(lane));
        let thread = LaneThread {
            lane,
            stream_url: format!("{}{STREAM_PATH}{}", config.url, lane.name()),
            agent: agent.clone(),
            queue: LaneEnd {
                queue: queue_rx,
                bytes: Arc::clone(&bytes),
                lane,
                metrics: Arc::clone(&config.metrics),
                held: None,
                disconnected: false,
            },
            stop: stop_rx,
            reports,
            causes: LoggedCauses::default(),
            backoff: BACKOFF_MIN,
            _ended: ended_tx,
            config,
        };
        let metrics = Arc::clone(&thread.config.metrics);
        metrics.lane(lane).set_limits(messages_max, bytes_max);
        let name = format!("peer-{}-{}", thread.config.peer, lane.name());
        thread::Builder::new().name(name).spawn(|| thread.run())?;
        Ok(LaneQueue { queue: queue_tx, bytes, bytes_max, lane, metrics, _stop: stop_tx, ended: ended_rx, agent })
    }

    /// Connects, talks, and starts over until the driver drops its end.
    fn run(mut self) {
        loop {
            let result = self.converse();
            self.config.metrics.lane(self.lane).set_connected(false);
            let Err(failure) = result else { return };
            if self.is_stopped() {
                return;
            }
            self.report(failure);
            // Half to one and a half: lanes and nodes that lost the same peer do not come back in step.
            let jitter = getrandom::u32().map_or(0.5, |random| f64::from(random) / f64::from(u32::MAX));
            let pause = self.backoff.mul_f64(0.5 + jitter);
            self.backoff = (self.backoff * 2).min(BACKOFF_MAX);
            if self.stop.recv_timeout(pause) != Err(RecvTimeoutError::Timeout) {
                return;
            }
            self.queue.discard_stale();
        }
    }

    fn is_stopped(&self) -> bool {
        self.stop.try_recv() == Err(TryRecvError::Disconnected)
    }

    /// One connection: the hello, and stream after stream. Returns when the queue has come to its end.
    fn converse(&mut self) -> Result<(), Failure> {
        let hello = Hello::new(&self.config.me, self.config.peer, &self.config.position);
        let answer = hello_on(&self.agent, &self.config.url, &hello)?;
        let protocol = answer.protocol;
        let SenderConfig { peer, url, .. } = &*self.config;
        debug!("connected to node {peer} at {url} ({} lane, boot {:x})", self.lane.name(), answer.boot);
        (self.reports)(PeerReport::Connected { peer: self.config.peer, lane: self.lane, answer });
        self.config.metrics.lane(self.lane).set_connected(true);
        self.queue.discard_stale();
        while !self.queue.disconnected {
            self.stream(protocol)?;
            // Only now: a peer may accept hellos and refuse what follows.
            self.backoff = BACKOFF_MIN;
            if self.causes.clear() {
                info!(
                    "node {} at {} takes messages again ({} lane)",
                    self.config.peer,
                    self.config.url,
                    self.lane.name()
                );
            }
        }
        Ok(())
    }

    /// One POST, from its first frame to its answer.
    fn stream(&mut self, protocol: u32) -> Result<(), Failure> {
        let hello = Hello::new(&self.config.me, self.config.peer, &self.config.position);
        let hello = Hello { protocol_min: protocol, protocol_max: protocol, ..hello };
        let mut body = LaneBody {
            queue: &mut self.queue,
            until: Instant::now() + STREAM_LIFETIME,
            frames: Vec::with_capacity(write_bytes(self.lane)),
            sent: 0,
            messages: 0,
            ended: None,
        };
        let result = self
            .agent
            .post(&self.stream_url)
            .header(HELLO_HEADER, hello.to_json())
            .send(SendBody::from_reader(&mut body));
        // What was taken before may be lost as well: only an answer would tell.
        self.config.metrics.dropped(body.messages, DropCause::Broken);
        let ended = body.ended;
        let mut response = result.map_err(|e| Failure::Broken(e.to_string()))?;
        if response.status() == http::StatusCode::NO_CONTENT {
            // On the other lane megabytes may be before the end.
            if let (Lane::Fast, Some(ended)) = (self.lane, ended) {
                self.config.metrics.round_trip(ended.elapsed());
            }
            return Ok(());
        }
        Err(refusal(&mut response).into())
    }

    fn report(&mut self, failure: Failure) {
        let (peer, lane) = (self.config.peer, self.lane);
        let cause = failure.to_string();
        if self.causes.is_new(&cause) {
            warn!("failed to talk to node {peer} at {} ({} lane): {cause}", self.config.url, lane.name());
        }
        (self.reports)(match failure {
            Failure::Refused(refusal) => PeerReport::Refused { peer, lane, refusal },
            Failure::Broken(_) => PeerReport::Unreachable { peer, lane },
        });
    }
}

/// The thread's end of the queue; keeps count of its bytes.
struct LaneEnd {
    queue: Receiver<Queued>,
    bytes: Arc<AtomicUsize>,
    lane: Lane,
    metrics: Arc<Sent>,
    /// Taken from the queue and found to be young enough to stay.
    held: Option<Queued>,
    /// The driver has dropped its end, and everything it sent is taken.
    disconnected: bool,
}

impl LaneEnd {
    /// Waits for a message until `until`.
    fn wait(&mut self, until: Instant) -> Option<Queued> {
        if let Some(queued) = self.try_take() {
            return Some(queued);
        }
        match self.queue.recv_deadline(until) {
            Ok(queued) => Some(self.taken(queued)),
            Err(e) => {
                self.disconnected = e == RecvTimeoutError::Disconnected;
                None
            }
        }
    }

    fn try_take(&mut self) -> Option<Queued> {
        let queued = self.held.take().or_else(|| self.queue.try_recv().ok())?;
        Some(self.taken(queued))
    }

    fn taken(&self, queued: Queued) -> Queued {
        self.bytes.fetch_sub(queued.bytes, Ordering::Relaxed);
        self.metrics.lane(self.lane).taken(queued.bytes);
        queued
    }

    /// Drops what has waited too long; the queue is in order of age.
    fn discard_stale(&mut self) {
        let now = Instant::now();
        while let Some(queued) = self.held.take().or_else(|| self.queue.try_recv().ok()) {
            if now.saturating_duration_since(queued.at) <= MESSAGE_AGE_MAX {
                self.held = Some(queued);
                return;
            }
            self.taken(queued);
            self.metrics.dropped(1, DropCause::Stale);
        }
    }
}

/// The body of a stream: frames of whatever is queued, as many in one read as fit it.
struct LaneBody<'a> {
    queue: &'a mut LaneEnd,
    until: Instant,
    frames: Vec<u8>,
    sent: usize,
    /// The messages in `frames`.
    messages: u64,
    /// When the end was reached.
    ended: Option<Instant>,
}

impl LaneBody<'_> {
    /// Encodes what is waiting, or waits. Nothing encoded means the end.
    fn refill(&mut self, wanted_bytes: usize) {
        if self.messages > 0 {
            self.queue.metrics.sent(self.messages, self.frames.len() as u64);
        }
        self.frames.clear();
        self.frames.shrink_to(frames_bytes_kept(self.queue.lane));
        (self.sent, self.messages) = (0, 0);
        // Before the wait: under load it would never come to its deadline.
        if Instant::now() >= self.until {
            return;
        }
        let mut next = self.queue.wait(self.until);
        while let Some(queued) = next {
            self.frames.reserve(queued.bytes);
            queued.message.encode(&mut self.frames);
            self.messages += 1;
            next = if self.frames.len() < wanted_bytes { self.queue.try_take() } else { None };
        }
        if self.messages > 0 {
            fail_point("peer-write-before");
        }
    }
}

impl Read for LaneBody<'_> {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        if self.sent == self.frames.len() {
            self.refill(out.len());
            if self.frames.is_empty() {
                self.ended = Some(Instant::now());
            }
        }
        let n = out.len().min(self.frames.len() - self.sent);
        out[..n].copy_from_slice(&self.frames[self.sent..self.sent + n]);
        self.sent += n;
        Ok(n)
    }
}

// ----------------------------------------------------------------------------------------------- single requests

/// A client for one peer. Its settings are the ones that matter, all of them written down: the environment must not
/// reroute Raft, a redirect is an answer like any other, and so is a status. No timeout of `ureq` that spans phases
/// is set, for each such request would cost a thread.
fn agent(buffer_bytes: usize, answer_timeout: Duration) -> Agent {
    Agent::config_builder()
        .proxy(None)
        .max_redirects(0)
        .max_redirects_will_error(false)
        .http_status_as_error(false)
        .no_delay(true)
        .timeout_connect(Some(CONNECT_TIMEOUT))
        .timeout_send_request(Some(WRITE_TIMEOUT))
        .timeout_per_write(Some(WRITE_TIMEOUT))
        .timeout_recv_response(Some(answer_timeout))
        .timeout_recv_body(Some(ANSWER_TIMEOUT))
        .input_buffer_size(buffer_bytes)
        .output_buffer_size(buffer_bytes)
        .max_idle_connections_per_host(1)
        .user_agent(concat!("raftexample/", env!("CARGO_PKG_VERSION")))
        .build()
        .new_agent()
}

/// Why a hello was not accepted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum HelloError {
    /// The peer said so.
    Refused(HelloRefusal),
    /// There was no answer, or none that makes sense. Says why.
    Failed(String),
}

impl fmt::Display for HelloError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            HelloError::Refused(refusal) => refusal.fmt(f),
            HelloError::Failed(cause) => f.write_str(cause),
        }
    }
}

impl std::error::Error for HelloError {}

/// Says hello to whoever answers at `url`, on a connection of its own: how a joiner learns the cluster. Takes at most
/// [`CONNECT_TIMEOUT`], two [`ANSWER_TIMEOUT`]s, and what the resolver takes for a host name.
///
/// # Errors
/// If nobody answers, or the answer is a refusal, or comes from another cluster or node than `hello` names.
pub fn say_hello(url: &str, hello: &Hello) -> Result<HelloAnswer, HelloError> {
    hello_on(&agent(write_bytes(Lane::Fast), ANSWER_TIMEOUT), url, hello)
}

fn hello_on(agent: &Agent, url: &str, hello: &Hello) -> Result<HelloAnswer, HelloError> {
    let failed = |e: ureq::Error| HelloError::Failed(e.to_string());
    let mut response = agent
        .post(format!("{url}{HELLO_PATH}"))
        .content_type("application/json")
        .send(hello.to_json())
        .map_err(failed)?;
    if response.status() != http::StatusCode::OK {
        return Err(refusal(&mut response));
    }
    let body = read_answer(&mut response).map_err(failed)?;
    let answer: HelloAnswer = serde_json::from_slice(&body)
        .map_err(|e| HelloError::Failed(format!("its answer to the hello is malformed: {e}")))?;
    // The peer has checked the same. But what answers at a wrong URL may not even be one of ours.
    if !(hello.protocol_min..=hello.protocol_max).contains(&answer.protocol) {
        return Err(HelloError::Failed(format!("it chose protocol {}, which was not offered", answer.protocol)));
    }
    if hello.to != 0 && hello.to != answer.id {
        return Err(HelloError::Failed(format!("node {} answered", answer.id)));
    }
    match (hello.cluster, answer.cluster) {
        (Some(ours), Some(theirs)) if ours != theirs => {
            Err(HelloError::Failed(format!("a node of another cluster answered, {theirs}")))
        }
        _ => Ok(answer),
    }
}

/// What an answer says that is not the hoped-for one.
fn refusal(response: &mut http::Response<Body>) -> HelloError {
    let status = response.status();
    match read_answer(response).ok().and_then(|body| HelloRefusal::from_json(&body)) {
        Some(refusal) => HelloError::Refused(refusal),
        None => HelloError::Failed(format!("it answered with status {status}")),
    }
}

fn read_answer(response: &mut http::Response<Body>) -> Result<Vec<u8>, ureq::Error> {
    response.body_mut().with_config().limit(ANSWER_BYTES_MAX as u64).read_to_vec()
}

/// Why a snapshot was not taken by the peer.
#[derive(Debug)]
pub enum SnapshotSendError {
    /// The peer said so: 409 not wanted, 422 damaged, 507 no space, or a refused hello. Says why.
    Refused {
        /// The HTTP status.
        status: u16,
        /// The peer's words.
        text: String,
    },
    /// The connection broke or timed out. Whether the peer has the snapshot is unknown.
    Broken(String),
    /// The snapshot could not be read, or its reader was told to give up.
    Source(io::Error),
}

impl fmt::Display for SnapshotSendError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            SnapshotSendError::Refused { status, text } => write!(f, "refused with status {status}: {text}"),
            SnapshotSendError::Broken(cause) => f.write_str(cause),
            SnapshotSendError::Source(e) => write!(f, "failed to read the snapshot: {e}"),
        }
    }
}

impl std::error::Error for SnapshotSendError {}

/// Sends a snapshot file on a connection of its own and waits until the peer has it on disk. `progress` hears after
/// each piece how many bytes were sent. There is no limit on the whole, only [`WRITE_TIMEOUT`] on each write and
/// [`SNAPSHOT_ANSWER_TIMEOUT`] on the answer; to give up earlier, let `reader` return an error.
///
/// The peer is asked before the first byte (`Expect: 100-continue`), so a refusal costs no transfer.
///
/// # Errors
/// For `RawNode::report_snapshot`: any of them means failure.
pub fn send_snapshot(
    url: &str,
    hello: &Hello,
    header: &SnapshotHeader,
    reader: impl Read,
    progress: &dyn Fn(u64),
) -> Result<(), SnapshotSendError> {
    let mut body = SnapshotBody { reader, progress, sent: 0, error: None };
    let sent = agent(write_bytes(Lane::Bulk), SNAPSHOT_ANSWER_TIMEOUT)
        .post(format!("{url}{SNAPSHOT_PATH}"))
        .header(HELLO_HEADER, hello.to_json())
        .header(SNAPSHOT_HEADER, header.to_json())
        .header(http::header::EXPECT, "100-continue")
        .send(SendBody::from_reader(&mut body));
    if let Some(e) = body.error {
        return Err(SnapshotSendError::Source(e));
    }
    let mut response = sent.map_err(|e| SnapshotSendError::Broken(e.to_string()))?;
    if response.status() == http::StatusCode::NO_CONTENT {
        return Ok(());
    }
    let body = read_answer(&mut response).unwrap_or_default();
    let text = match HelloRefusal::from_json(&body) {
        Some(refusal) => refusal.to_string(),
        None => String::from_utf8_lossy(&body).into_owned(),
    };
    Err(SnapshotSendError::Refused { status: response.status().as_u16(), text })
}

struct SnapshotBody<'a, R> {
    reader: R,
    progress: &'a dyn Fn(u64),
    sent: u64,
    error: Option<io::Error>,
}

impl<R: Read> Read for SnapshotBody<'_, R> {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        loop {
            match self.reader.read(out) {
                Ok(n) => {
                    self.sent += n as u64;
                    (self.progress)(self.sent);
                    return Ok(n);
                }
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => {
                    let kind = e.kind();
                    self.error = Some(e);
                    return Err(kind.into());
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{BufRead, BufReader, Write};
    use std::net::TcpListener;

    use raft::eraftpb::Message;

    use crate::membership::ClusterId;
    use crate::metrics::Metrics;

    fn identity() -> NodeIdentity {
        let url = "http://127.0.0.1:1".to_owned();
        NodeIdentity { cluster: Some(ClusterId([7; 16])), id: 1, directory: 1, boot: 1, earlier_boots: [].into(), url }
    }

    /// Answers one hello with `answer`, whatever it says, and returns what the sender makes of it.
    fn answered(answer: String) -> Result<HelloAnswer, HelloError> {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let server = thread::Builder::new().spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let mut request = BufReader::new(stream.try_clone().unwrap());
            let (mut line, mut length) = (String::new(), 0);
            while line != "\r\n" {
                line.clear();
                request.read_line(&mut line).unwrap();
                if let Some(bytes) = line.to_ascii_lowercase().strip_prefix("content-length: ") {
                    length = bytes.trim().parse().unwrap();
                }
            }
            request.read_exact(&mut vec![0; length]).unwrap();
            stream.write_all(answer.as_bytes()).unwrap();
        });
        let result = say_hello(&url, &Hello::new(&identity(), 2, &LogPosition::default()));
        server.unwrap().join().unwrap();
        result
    }

    fn answer(status: &str, body: &str) -> String {
        format!("HTTP/1.1 {status}\r\nLocation: http://127.0.0.1:1/\r\nContent-Length: {}\r\n\r\n{body}", body.len())
    }

    #[test]
    fn only_the_right_node_of_the_right_cluster_is_believed() {
        let right =
            HelloAnswer { protocol: 1, cluster: Some(ClusterId([7; 16])), id: 2, directory: 9, boot: 8, members: None };
        let said = |answer: &HelloAnswer| serde_json::to_string(answer).unwrap();
        assert_eq!(answered(answer("200 OK", &said(&right))), Ok(right.clone()));
        for (wrong, cause) in [
            (HelloAnswer { protocol: 2, ..right.clone() }, "protocol 2"),
            (HelloAnswer { id: 3, ..right.clone() }, "node 3"),
            (HelloAnswer { cluster: Some(ClusterId([8; 16])), ..right }, "another cluster"),
        ] {
            let error = answered(answer("200 OK", &said(&wrong))).unwrap_err();
            assert!(error.to_string().contains(cause), "{error}");
        }
    }

    #[test]
    fn other_servers_are_no_peers() {
        for (reply, cause) in [
            (answer("200 OK", "<html>welcome</html>"), "malformed"),
            (answer("302 Found", ""), "status 302"),
            (answer("404 Not Found", "{}"), "status 404"),
            ("SSH-2.0-OpenSSH\r\n".to_owned(), ""),
            (String::new(), ""),
        ] {
            let error = answered(reply).unwrap_err();
            assert!(matches!(&error, HelloError::Failed(text) if text.contains(cause)), "{error:?}");
        }
        let refusal = HelloRefusal::WrongId { ours: 3 };
        assert_eq!(answered(answer("421 Misdirected Request", &refusal.to_json())), Err(HelloError::Refused(refusal)));
    }

    #[test]
    fn what_waits_for_a_peer_is_bounded_by_count_and_by_bytes() {
        // It takes connections, and says nothing: nothing leaves the queues meanwhile.
        let silent = TcpListener::bind("127.0.0.1:0").unwrap();
        let url = format!("http://{}", silent.local_addr().unwrap());
        let metrics = Metrics::new();
        let config =
            SenderConfig { me: identity(), peer: 2, url, position: Arc::default(), metrics: metrics.peers.add(2) };
        let data = bytes::Bytes::from(vec![7; 1 << 20]);
        let of = |msg_type, bytes| {
            let context = data.slice(..bytes);
            PeerMessage::Raft(Message { msg_type, context, ..Message::default() })
        };
        let fast = |bytes| of(raft::eraftpb::MessageType::MsgHeartbeat, bytes);
        let bulk = |bytes| of(raft::eraftpb::MessageType::MsgAppend, bytes);
        let fill = |sender: &PeerSender, message: &PeerMessage| {
            let room = (0..).find_map(|sent| sender.send(message.clone()).err().map(|why| (sent, why)));
            let (sent, why) = room.unwrap();
            assert_eq!(why, Dropped::Full);
            sent
        };
        let spawn = || PeerSender::spawn(config.clone(), |_| ()).unwrap();
        let by_count = spawn();
        assert_eq!(fill(&by_count, &fast(1)), FAST_MESSAGES_MAX);
        assert_eq!(fill(&by_count, &bulk(1)), BULK_MESSAGES_MAX);
        let by_bytes = spawn();
        for (message, max) in [(fast(1 << 16), FAST_BYTES_MAX), (bulk(1 << 20), BULK_BYTES_MAX)] {
            assert_eq!(fill(&by_bytes, &message), max / message.frame_bytes());
        }
        assert_eq!(metrics.total("raftexample_peer_messages_dropped_total"), 4.0);

        // The peer is gone, and what waited for it grows old: there is room again.
        drop(silent);
        let until = Instant::now() + Duration::from_secs(60);
        for sender in [by_count, by_bytes] {
            for message in [fast(1), bulk(1)] {
                while sender.send(message.clone()).is_err() {
                    assert!(Instant::now() < until, "no room again");
                    thread::sleep(Duration::from_millis(5));
                }
            }
        }
    }

    fn lane_end(queue: Receiver<Queued>, bytes: Arc<AtomicUsize>, metrics: &Metrics) -> LaneEnd {
        let metrics = metrics.peers.add(2);
        LaneEnd { queue, bytes, lane: Lane::Fast, metrics, held: None, disconnected: false }
    }

    fn queued(index: u64, at: Instant) -> Queued {
        let message = PeerMessage::Raft(Message { index, ..Message::default() });
        Queued { bytes: message.frame_bytes(), message, at }
    }

    #[test]
    fn what_waited_too_long_is_dropped_and_the_rest_stays_in_order() {
        let (queue_tx, queue) = bounded(10);
        let now = Instant::now();
        let old = now.checked_sub(2 * MESSAGE_AGE_MAX).unwrap();
        let mut total = 0;
        for message in [queued(1, old), queued(2, old), queued(3, now), queued(4, now)] {
            total += message.bytes;
            queue_tx.send(message).ok().unwrap();
        }
        drop(queue_tx);
        let bytes = Arc::new(AtomicUsize::new(total));
        let metrics = Metrics::new();
        let mut end = lane_end(queue, Arc::clone(&bytes), &metrics);
        end.discard_stale();
        end.discard_stale();
        let later = now + Duration::from_secs(60);
        for index in [3, 4] {
            let Some(Queued { message: PeerMessage::Raft(message), .. }) = end.wait(later) else {
                panic!("no {index}")
            };
            assert_eq!(message.index, index);
        }
        assert!(!end.disconnected);
        assert!(end.wait(later).is_none());
        assert!(end.disconnected);
        assert_eq!(bytes.load(Ordering::Relaxed), 0, "all bytes are accounted for");
        assert_eq!(metrics.total("raftexample_peer_messages_dropped_total"), 2.0);
    }

    #[test]
    fn a_stream_gathers_what_waits_and_ends_in_time() {
        let (queue_tx, queue) = bounded(100);
        let metrics = Metrics::new();
        let mut end = lane_end(queue, Arc::default(), &metrics);
        end.bytes.store(1 << 20, Ordering::Relaxed);
        let frame_bytes = queued(300, Instant::now()).bytes;
        for index in 0..10 {
            queue_tx.send(queued(300 + index, Instant::now())).ok().unwrap();
        }
        let until = Instant::now() + Duration::from_millis(50);
        let mut body = LaneBody { queue: &mut end, until, frames: Vec::new(), sent: 0, messages: 0, ended: None };
        let mut out = vec![0; 100 * frame_bytes];
        assert_eq!(body.read(&mut out).unwrap(), 10 * frame_bytes);
        assert_eq!(body.read(&mut out).unwrap(), 0, "nothing came until the end");
        assert!(Instant::now() >= until);
        assert!(body.ended.is_some() && body.messages == 0, "all of it was taken");
        assert_eq!(metrics.total("raftexample_peer_messages_sent_total"), 10.0);
        assert_eq!(metrics.total("raftexample_peer_sent_bytes_total"), (10 * frame_bytes) as f64);
        queue_tx.send(queued(1, Instant::now())).ok().unwrap();
        assert_eq!(body.read(&mut out).unwrap(), 0, "a busy stream ends as well");
        assert!(!end.disconnected);
        assert!(end.try_take().is_some(), "and leaves what waits to the next one");
    }
}
