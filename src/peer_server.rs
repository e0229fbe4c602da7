//! Serves the peer port: hellos, streams of messages, and snapshots, for whoever stands behind [`PeerInbox`].
//!
//! A request's hello is looked at before its body is. What a peer sends afterwards is delivered batch by batch, as much
//! as has arrived at once, and the inbox holds a fast peer back by taking its time: its connection is not read
//! meanwhile, and TCP does the rest. A stream is ended at the first frame that makes no sense or is not what its hello
//! said it would be; nothing of that frame, or behind it, is delivered.

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::fmt;
use std::io::Read;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use log::{debug, info, warn};

use crate::fail_point::fail_point;
use crate::http::{
    Admission, Begun, Body, Caller, Head, Header, Limits, Method, Response, Service, StatusCode, respond,
};
use crate::membership::NodeId;
use crate::metrics::{Metrics, Received};
use crate::peer_protocol::{
    FrameError, FrameReader, HELLO_BYTES_MAX, HELLO_HEADER, HELLO_PATH, Hello, HelloAnswer, HelloRefusal, Lane,
    LoggedCauses, PeerMessage, SNAPSHOT_HEADER, SNAPSHOT_PATH, STREAM_PATH, SnapshotHeader, SnapshotRefusal,
};

/// Troubles remembered for logging each once. More than a cluster has members; further ones are counted and not logged.
const LOGGED_TOPICS_MAX: usize = 256;

/// Connections to the peer port: two lanes of each member, a snapshot, and what died and is not yet noticed. Far more
/// than a Raft cluster has, for a flood of others must not shut members out at once.
const CONNECTIONS_MAX: usize = 512;

/// The longest silence of a peer. Streams end themselves each second, and a snapshot's sender only reads a file.
const SILENCE_MAX: Duration = Duration::from_secs(10);

/// The limits of the HTTP server behind the peer port.
pub fn limits() -> Limits {
    Limits { connections: CONNECTIONS_MAX, body_timeout: SILENCE_MAX, idle_timeout: SILENCE_MAX, ..Limits::default() }
}

/// The node has stopped and takes no more messages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stopped;

impl fmt::Display for Stopped {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("the node is stopping")
    }
}

impl std::error::Error for Stopped {}

/// What the peer server needs of its node. Called from many connections at once.
pub trait PeerInbox: Send + Sync + 'static {
    /// Accepts a peer or refuses it: [`Hello::check`], and what only the membership knows. May block for a bounded
    /// time, for instance until the peer's data directory is recorded. Asked for each hello, stream and snapshot, so
    /// at least once a second and lane.
    ///
    /// # Errors
    /// The refusal, which ends the conversation.
    fn hello(&self, hello: &Hello) -> Result<HelloAnswer, HelloRefusal>;

    /// Takes messages from an accepted peer, in the order of their lane. Blocks while there is no room and never
    /// drops. Each raft message is from `from` and to this node; nothing else about it is checked.
    ///
    /// # Errors
    /// If the node is stopping.
    fn deliver(&self, from: NodeId, messages: Vec<PeerMessage>) -> Result<(), Stopped>;

    /// Whether the snapshot that `from` is about to send would be taken: before it sends the first byte.
    ///
    /// # Errors
    /// The refusal, which saves the transfer.
    fn offer_snapshot(&self, from: NodeId, header: &SnapshotHeader) -> Result<(), SnapshotRefusal>;

    /// Stores an offered snapshot durably, for the driver to install. `body` blocks until bytes arrive, gives up on a
    /// sender that is silent for long, and ends early with an error if the connection breaks. It may hold more or
    /// fewer bytes than the header says.
    ///
    /// # Errors
    /// The refusal.
    fn receive_snapshot(
        &self,
        from: NodeId,
        header: &SnapshotHeader,
        body: &mut dyn Read,
    ) -> Result<(), SnapshotRefusal>;
}

/// The [`Service`] of the peer port.
pub struct PeerServer<I> {
    me: NodeId,
    inbox: I,
    metrics: Arc<Metrics>,
    causes: Mutex<BTreeMap<Topic, LoggedCauses>>,
}

/// What trouble is about: it is over when this very thing succeeds, while others may go well all the time. The same id
/// at two URLs is two senders, one of which is misconfigured.
type Topic = (NodeId, String, &'static str);

fn topic(hello: &Hello, request: &'static str) -> Topic {
    (hello.from, hello.url.clone(), request)
}

/// State of one connection: what was admitted and is to be answered.
#[derive(Debug, Default)]
pub struct PeerSession {
    admitted: Option<Admitted>,
}

#[derive(Debug)]
enum Admitted {
    Hello,
    Stream(Hello, Lane),
    Snapshot(Hello, SnapshotHeader),
}

/// Why a stream ended other than at its end.
enum StreamEnd {
    Broken(FrameError),
    Misrouted(String),
    Stopped,
}

impl<I: PeerInbox> PeerServer<I> {
    /// Serves node `me`.
    pub fn new(me: NodeId, inbox: I, metrics: Arc<Metrics>) -> Self {
        PeerServer { me, inbox, metrics, causes: Mutex::default() }
    }

    /// Routes a request and hears its hello, if that is in the head.
    fn route(&self, head: &Head<'_>) -> Result<Admitted, Response> {
        let target = str::from_utf8(head.target()).unwrap_or_default();
        let lane = target.strip_prefix(STREAM_PATH).and_then(Lane::from_name);
        if lane.is_none() && target != HELLO_PATH && target != SNAPSHOT_PATH {
            return Err(text(404, "nothing is here: clients use the key-value port"));
        }
        if *head.method() != Method::Post {
            return Err(text(405, "peers use POST").with_header(header("Allow", "POST")));
        }
        if target == HELLO_PATH {
            return Ok(Admitted::Hello);
        }
        let json = head.get(HELLO_HEADER).unwrap_or_default();
        let (hello, _) = self.hear(json).map_err(|refusal| refuse(&refusal))?;
        if hello.cluster.is_none() {
            // A joiner that looks for its cluster may ask, and is not looked at closely for that.
            let refusal = HelloRefusal::Malformed("only a hello may leave the cluster out".to_owned());
            self.refused(topic(&hello, "hello"), &refusal);
            return Err(refuse(&refusal));
        }
        if let Some(lane) = lane {
            return Ok(Admitted::Stream(hello, lane));
        }
        let json = head.get(SNAPSHOT_HEADER).unwrap_or_default();
        let header = SnapshotHeader::from_json(json).map_err(|e| text(400, e.to_string()))?;
        match self.inbox.offer_snapshot(hello.from, &header) {
            Ok(()) => Ok(Admitted::Snapshot(hello, header)),
            Err(refusal) => Err(self.refuse_snapshot(&hello, &header, &refusal)),
        }
    }

    /// Reads a hello and asks the inbox about it.
    fn hear(&self, json: &[u8]) -> Result<(Hello, HelloAnswer), HelloRefusal> {
        let hello = Hello::from_json(json).inspect_err(|refusal| self.refused(Topic::default(), refusal))?;
        let answer = hello.common_protocol().and_then(|_| self.inbox.hello(&hello));
        let answer = answer.inspect_err(|refusal| self.refused(topic(&hello, "hello"), refusal))?;
        self.succeeded(topic(&hello, "hello"));
        Ok((hello, answer))
    }

    fn refused(&self, topic: Topic, refusal: &HelloRefusal) {
        self.metrics.peers.received(topic.0).hello_refused();
        let ((from, url, _), status) = (&topic, refusal.status());
        let words = format!("refused node {from} at '{url}' with status {status}: {refusal}");
        // By status: the words of a malformed hello are the sender's choice.
        if self.is_news(topic, &status.to_string()) {
            warn!("{words}");
        }
    }

    /// Whether `cause` is to be logged.
    fn is_news(&self, topic: Topic, cause: &str) -> bool {
        let mut causes = self.causes.lock().unwrap_or_else(PoisonError::into_inner);
        if causes.len() >= LOGGED_TOPICS_MAX && !causes.contains_key(&topic) {
            return false;
        }
        causes.entry(topic).or_default().is_new(cause)
    }

    fn succeeded(&self, topic: Topic) {
        let mut causes = self.causes.lock().unwrap_or_else(PoisonError::into_inner);
        if causes.remove(&topic).is_some() {
            info!("node {} at '{}': {} works again", topic.0, topic.1, topic.2);
        }
    }

    fn answer_hello(&self, body: &[u8]) -> Response {
        match self.hear(body) {
            Ok((_, answer)) => match serde_json::to_string(&answer) {
                Ok(json) => json_response(200, json),
                Err(e) => text(500, e.to_string()),
            },
            Err(refusal) => refuse(&refusal),
        }
    }

    /// Delivers a stream to its end.
    fn answer_stream(&self, hello: &Hello, lane: Lane, body: &mut dyn Read) -> Response {
        let mut frames = FrameReader::new(body);
        let received = self.metrics.peers.received(hello.from);
        let end = self.receive(hello.from, &mut frames, &received);
        received.skipped(frames.skipped());
        let cause = match end {
            Ok(()) => {
                self.succeeded(topic(hello, lane.name()));
                return respond(204, "");
            }
            Err(StreamEnd::Stopped) => return refuse(&HelloRefusal::NotReady(Stopped.to_string())),
            Err(StreamEnd::Broken(FrameError::Io(e))) => {
                debug!("lost the stream of node {} at '{}': {e}", hello.from, hello.url);
                // Seen by a sender only if it is this node that stops.
                return refuse(&HelloRefusal::NotReady("it ended the stream".into()));
            }
            Err(StreamEnd::Broken(e)) => {
                received.malformed();
                e.to_string()
            }
            Err(StreamEnd::Misrouted(cause)) => {
                received.misrouted();
                cause
            }
        };
        if self.is_news(topic(hello, lane.name()), &cause) {
            warn!("ended the stream of node {} at '{}': {cause}", hello.from, hello.url);
        }
        refuse(&HelloRefusal::Malformed(cause))
    }

    fn receive(
        &self,
        from: NodeId,
        frames: &mut FrameReader<&mut dyn Read>,
        received: &Received,
    ) -> Result<(), StreamEnd> {
        loop {
            let mut messages = Vec::new();
            let read = frames.next_batch(&mut messages);
            let misrouted = messages.iter().position(|message| self.is_misrouted(from, message));
            let misrouted = misrouted.map(|at| messages.split_off(at).swap_remove(0));
            if !messages.is_empty() {
                let count = messages.len() as u64;
                fail_point("peer-deliver-before");
                self.inbox.deliver(from, messages).map_err(|Stopped| StreamEnd::Stopped)?;
                received.received(count);
            }
            if let Some(PeerMessage::Raft(message)) = misrouted {
                let (from, to) = (message.from, message.to);
                return Err(StreamEnd::Misrouted(format!("it holds a raft message from node {from} to node {to}")));
            }
            if !read.map_err(StreamEnd::Broken)? {
                return Ok(());
            }
        }
    }

    /// Whether a raft message is not between the two who said hello.
    fn is_misrouted(&self, from: NodeId, message: &PeerMessage) -> bool {
        matches!(message, PeerMessage::Raft(message) if message.from != from || message.to != self.me)
    }

    fn answer_snapshot(&self, hello: &Hello, header: &SnapshotHeader, body: &mut dyn Read) -> Response {
        match self.inbox.receive_snapshot(hello.from, header, body) {
            Ok(()) => {
                self.succeeded(topic(hello, "snapshot"));
                respond(204, "")
            }
            Err(refusal) => self.refuse_snapshot(hello, header, &refusal),
        }
    }

    fn refuse_snapshot(&self, hello: &Hello, header: &SnapshotHeader, refusal: &SnapshotRefusal) -> Response {
        self.metrics.peers.received(hello.from).snapshot_refused();
        if self.is_news(topic(hello, "snapshot"), &refusal.to_string()) {
            warn!("refused the snapshot of node {} at index {}: {refusal}", hello.from, header.index);
        }
        text(refusal.status(), refusal.to_string())
    }
}

impl<I: PeerInbox> Service for PeerServer<I> {
    type Session = PeerSession;
    type Turn = ();
    type Pending = Infallible;
    type Reply = Infallible;

    fn session(&self, _peer: SocketAddr) -> PeerSession {
        PeerSession::default()
    }

    fn admit(&self, session: &mut PeerSession, head: &Head<'_>) -> Admission {
        session.admitted = None;
        match self.route(head) {
            Ok(admitted) => {
                let admission = match admitted {
                    Admitted::Hello => Admission::Buffer(HELLO_BYTES_MAX),
                    Admitted::Stream(..) | Admitted::Snapshot(..) => Admission::Stream,
                };
                session.admitted = Some(admitted);
                admission
            }
            Err(response) => Admission::Answer(response),
        }
    }

    /// Not asked: all that peers send takes long.
    fn begin(&self, (): &mut (), _: &Head<'_>, _: &[u8], _: Caller<Infallible>, _: Instant) -> Begun<Infallible> {
        Begun::ForThread
    }

    fn submit(&self, (): &mut ()) {}

    fn finish(&self, pending: Infallible, _: Option<Infallible>, _: Instant) -> Response {
        match pending {}
    }

    fn answer(&self, session: &mut PeerSession, _head: &Head<'_>, body: Body<'_>) -> Response {
        match (session.admitted.take(), body) {
            (Some(Admitted::Hello), Body::Buffered(json)) => self.answer_hello(&json),
            (Some(Admitted::Stream(hello, lane)), Body::Stream(body)) => self.answer_stream(&hello, lane, body),
            (Some(Admitted::Snapshot(hello, header)), Body::Stream(body)) => {
                self.answer_snapshot(&hello, &header, body)
            }
            _ => text(500, "the request was not admitted like this"),
        }
    }

    fn fault(&self, status: StatusCode, detail: &str) -> Response {
        text(status.0, detail.to_owned())
    }
}

fn refuse(refusal: &HelloRefusal) -> Response {
    json_response(refusal.status(), refusal.to_json())
}

fn json_response(status: u16, json: String) -> Response {
    respond(status, json).with_header(header("Content-Type", "application/json"))
}

fn text(status: u16, text: impl Into<String>) -> Response {
    respond(status, text.into()).with_header(header("Content-Type", "text/plain; charset=utf-8"))
}

fn header(name: &str, value: &str) -> Header {
    Header::from_bytes(name, value).expect("names and values here are ASCII")
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{self, Write};
    use std::net::{Ipv4Addr, Shutdown, TcpListener, TcpStream};
    use std::process::Command;
    use std::sync::atomic::{AtomicU64, Ordering};

    use bytes::Bytes;
    use crossbeam_channel::{Receiver, Sender, bounded};
    use raft::eraftpb::{Entry, Message, MessageType};
    use rustix::net::{AddressFamily, SocketType};

    use crate::http::{Handle, Listener};
    use crate::membership::ClusterId;
    use crate::peer_protocol::{LogPosition, NodeIdentity};
    use crate::peer_sender::{
        Dropped, HelloError, PeerReport, PeerSender, SenderConfig, SnapshotSendError, say_hello, send_snapshot,
    };

    /// Far above what any step takes, even on a busy machine.
    const DEADLINE: Duration = Duration::from_secs(60);

    /// Node 2. Node 1 sends.
    struct Inbox {
        me: NodeIdentity,
        refusal: Mutex<Option<HelloRefusal>>,
        delivered: Sender<PeerMessage>,
        /// Appends wait for a permit each, if there is a gate.
        gate: Option<Receiver<()>>,
        snapshots: Sender<(SnapshotHeader, Vec<u8>)>,
    }

    impl PeerInbox for Arc<Inbox> {
        fn hello(&self, hello: &Hello) -> Result<HelloAnswer, HelloRefusal> {
            let protocol = hello.check(&self.me)?;
            if let Some(refusal) = &*self.refusal.lock().unwrap() {
                return Err(refusal.clone());
            }
            let NodeIdentity { cluster, id, directory, boot, .. } = self.me;
            Ok(HelloAnswer { protocol, cluster, id, directory, boot, members: Some(vec![1, 2]) })
        }

        fn deliver(&self, from: NodeId, messages: Vec<PeerMessage>) -> Result<(), Stopped> {
            assert_eq!(from, 1);
            for message in messages {
                if let (Some(gate), Lane::Bulk) = (&self.gate, message.lane()) {
                    gate.recv().map_err(|_| Stopped)?;
                }
                self.delivered.send(message).map_err(|_| Stopped)?;
            }
            Ok(())
        }

        fn offer_snapshot(&self, _from: NodeId, header: &SnapshotHeader) -> Result<(), SnapshotRefusal> {
            if header.bytes > 1 << 30 { Err(SnapshotRefusal::NoSpace("1 GiB is free".into())) } else { Ok(()) }
        }

        fn receive_snapshot(
            &self,
            from: NodeId,
            header: &SnapshotHeader,
            body: &mut dyn Read,
        ) -> Result<(), SnapshotRefusal> {
            assert_eq!(from, 1);
            let mut file = Vec::new();
            body.read_to_end(&mut file).map_err(|e| SnapshotRefusal::Damaged(e.to_string()))?;
            if file.len() as u64 != header.bytes {
                return Err(SnapshotRefusal::Damaged("of another length".into()));
            }
            self.snapshots.send((*header, file)).map_err(|_| SnapshotRefusal::Stopping)
        }
    }

    fn identity(id: NodeId, url: String) -> NodeIdentity {
        let (cluster, earlier_boots) = (Some(ClusterId([7; 16])), [].into());
        NodeIdentity { cluster, id, directory: u128::from(id), boot: 5, earlier_boots, url }
    }

    struct Server {
        handle: Handle,
        server: Arc<PeerServer<Arc<Inbox>>>,
        inbox: Arc<Inbox>,
        delivered: Receiver<PeerMessage>,
        snapshots: Receiver<(SnapshotHeader, Vec<u8>)>,
    }

    impl Server {
        fn start(listener: Listener, gate: Option<Receiver<()>>) -> Server {
            let (delivered_tx, delivered_rx) = bounded(100_000);
            let (snapshots_tx, snapshots_rx) = bounded(10);
            let me = identity(2, format!("http://{}", listener.local_addr()));
            let refusal = Mutex::new(None);
            let inbox = Arc::new(Inbox { me, refusal, delivered: delivered_tx, gate, snapshots: snapshots_tx });
            let server = Arc::new(PeerServer::new(2, Arc::clone(&inbox), Arc::new(Metrics::new())));
            let handle = listener.serve(Arc::clone(&server), limits(), "peer").unwrap();
            Server { handle, server, inbox, delivered: delivered_rx, snapshots: snapshots_rx }
        }

        fn new() -> Server {
            Server::start(Listener::bind("127.0.0.1:0").unwrap(), None)
        }

        fn url(&self) -> String {
            self.inbox.me.url.clone()
        }

        /// Hellos and snapshots.
        fn requests_refused(&self) -> u64 {
            self.server.metrics.total("raftexample_peer_requests_refused_total") as u64
        }

        fn messages_refused(&self) -> u64 {
            self.server.metrics.total("raftexample_peer_messages_refused_total") as u64
        }

        fn next(&self) -> PeerMessage {
            self.delivered.recv_timeout(DEADLINE).unwrap()
        }
    }

    fn hello(to: NodeId) -> Hello {
        Hello::new(&identity(1, "http://127.0.0.1:1".into()), to, &LogPosition::default())
    }

    fn sender(url: String) -> (PeerSender, Receiver<PeerReport>) {
        let (reports_tx, reports_rx) = bounded(10_000);
        let me = identity(1, "http://127.0.0.1:1".into());
        let metrics = Metrics::new().peers.add(2);
        let config = SenderConfig { me, peer: 2, url, position: Arc::default(), metrics };
        let sender = PeerSender::spawn(config, move |report| drop(reports_tx.try_send(report))).unwrap();
        (sender, reports_rx)
    }

    /// Waits for a report of a kind.
    fn wait_for(reports: &Receiver<PeerReport>, wanted: impl Fn(&PeerReport) -> bool) {
        let deadline = Instant::now() + DEADLINE;
        while !wanted(&reports.recv_deadline(deadline).expect("the report comes in time")) {}
    }

    fn wait_until(condition: impl Fn() -> bool) {
        let deadline = Instant::now() + DEADLINE;
        while !condition() {
            assert!(Instant::now() < deadline, "the condition holds in time");
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    fn is_connected(report: &PeerReport) -> bool {
        matches!(report, PeerReport::Connected { .. })
    }

    fn heartbeat(commit: u64) -> PeerMessage {
        let msg_type = MessageType::MsgHeartbeat;
        PeerMessage::Raft(Message { msg_type, from: 1, to: 2, term: 1, commit, ..Message::default() })
    }

    fn append(index: u64, data: Bytes) -> PeerMessage {
        let msg_type = MessageType::MsgAppend;
        let mut message = Message { msg_type, from: 1, to: 2, term: 1, index, ..Message::default() };
        message.entries.push(Entry { term: 1, index: index + 1, data, ..Entry::default() });
        PeerMessage::Raft(message)
    }

    /// Sends until there is room: lanes drop rather than wait.
    fn send_surely(sender: &PeerSender, message: &PeerMessage) {
        wait_until(|| sender.send(message.clone()).is_ok());
    }

    #[test]
    fn order_is_kept_within_a_lane_and_across_streams() {
        let server = Server::new();
        let (sender, _reports) = sender(server.url());
        let started = Instant::now();
        let (mut sent, mut heard, mut appended) = (0, 0, 0);
        // Longer than two streams live.
        while sent < 2000 || started.elapsed() < Duration::from_millis(2500) {
            send_surely(&sender, &heartbeat(sent));
            send_surely(&sender, &append(sent, vec![1; (sent as usize * 37) % 3000].into()));
            sent += 1;
            while heard + 500 < sent || appended + 500 < sent {
                match server.next() {
                    PeerMessage::Raft(m) if m.msg_type == MessageType::MsgHeartbeat => {
                        assert_eq!(m.commit, heard);
                        heard += 1;
                    }
                    PeerMessage::Raft(m) => {
                        assert_eq!((m.index, m.entries[0].data.len()), (appended, (appended as usize * 37) % 3000));
                        appended += 1;
                    }
                    other => panic!("{other:?}"),
                }
            }
        }
        PeerSender::stop([sender], DEADLINE);
        wait_until(|| server.delivered.len() as u64 == 2 * sent - heard - appended);
        assert_eq!((server.requests_refused(), server.messages_refused()), (0, 0));
    }

    #[test]
    fn a_restarted_peer_is_found_again() {
        let server = Server::new();
        let (url, addr) = (server.url(), server.handle.local_addr());
        let (sender, reports) = sender(url);
        send_surely(&sender, &heartbeat(1));
        assert_eq!(server.next(), heartbeat(1));
        wait_for(&reports, is_connected);
        server.handle.stop(Duration::ZERO);
        for lane in Lane::ALL {
            wait_for(&reports, |report| *report == PeerReport::Unreachable { peer: 2, lane });
        }
        let server = Server::start(Listener::bind(addr).unwrap(), None);
        wait_for(&reports, is_connected);
        wait_until(|| {
            let _ = sender.send(heartbeat(2));
            !server.delivered.is_empty()
        });
        assert_eq!(server.next(), heartbeat(2));
    }

    #[test]
    fn heartbeats_pass_a_bulk_lane_that_is_not_read() {
        let (gate_tx, gate_rx) = bounded(0);
        let server = Server::start(Listener::bind("127.0.0.1:0").unwrap(), Some(gate_rx));
        let (sender, reports) = sender(server.url());
        wait_for(&reports, is_connected);
        wait_for(&reports, is_connected);
        let data = Bytes::from(vec![7; 1 << 20]);
        wait_until(|| sender.send(append(1, data.clone())) == Err(Dropped::Full));
        for commit in 0..50 {
            send_surely(&sender, &heartbeat(commit));
            assert_eq!(server.next(), heartbeat(commit));
        }
        // Dropped first, or the bulk lane's connection would be waited for.
        drop(gate_tx);
    }

    #[test]
    fn a_peer_that_is_not_there_is_reported_once_per_attempt_and_costs_a_bounded_queue() {
        // A socket that is bound and does not listen: nobody answers, and nobody else gets the port.
        let socket = rustix::net::socket(AddressFamily::INET, SocketType::STREAM, None).unwrap();
        rustix::net::bind(&socket, &SocketAddr::from((Ipv4Addr::LOCALHOST, 0))).unwrap();
        let url = format!("http://{}", SocketAddr::try_from(rustix::net::getsockname(&socket).unwrap()).unwrap());
        let (sender, reports) = sender(url);
        for lane in Lane::ALL {
            wait_for(&reports, |report| *report == PeerReport::Unreachable { peer: 2, lane });
        }
        let data = Bytes::from(vec![7; 1 << 20]);
        let sent = (0..1000).take_while(|i| sender.send(append(*i, data.clone())).is_ok()).count();
        assert!(sent <= 64, "{sent} MiB are queued");
        let huge = append(1, vec![0; 20 << 20].into());
        assert_eq!(sender.send(huge), Err(Dropped::TooLarge));
        while reports.try_recv().is_ok() {}
        let started = Instant::now();
        let until = started + Duration::from_millis(500);
        let attempts = std::iter::from_fn(|| reports.recv_deadline(until).ok()).count();
        // Pauses are half of the shortest backoff at least, on each of the two lanes.
        let most = 2 * (started.elapsed().as_millis() / 25 + 1) as usize;
        assert!(attempts <= most, "{attempts} reports in {:?}", started.elapsed());
    }

    #[test]
    fn refusals_arrive_with_their_cause_and_are_remembered_for_the_log() {
        let server = Server::new();
        for refusal in [
            HelloRefusal::Removed,
            HelloRefusal::OtherDirectory,
            HelloRefusal::OtherCluster { ours: ClusterId([1; 16]) },
            HelloRefusal::NotReady("starting".into()),
        ] {
            *server.inbox.refusal.lock().unwrap() = Some(refusal.clone());
            let (_sender, reports) = sender(server.url());
            // More than one attempt, and one line in the log.
            for _ in 0..3 {
                wait_for(&reports, |report| matches!(report, PeerReport::Refused { refusal: r, .. } if *r == refusal));
            }
            let cause = refusal.status().to_string();
            assert!(!server.server.is_news(topic(&hello(2), "hello"), &cause), "{refusal:?} was logged");
        }
        assert!(server.requests_refused() >= 12);
        *server.inbox.refusal.lock().unwrap() = None;
        let answer = say_hello(&server.url(), &hello(0)).unwrap();
        assert_eq!((answer.id, answer.directory, answer.members), (2, 2, Some(vec![1, 2])));
        assert!(server.server.causes.lock().unwrap().is_empty(), "the next refusal is news");
    }

    #[test]
    fn both_sides_check_who_the_other_is() {
        let server = Server::new();
        let refused = |hello: &Hello| match say_hello(&server.url(), hello) {
            Err(HelloError::Refused(refusal)) => refusal.status(),
            other => panic!("{other:?}"),
        };
        assert_eq!(refused(&hello(3)), 421);
        assert_eq!(refused(&Hello { cluster: Some(ClusterId([8; 16])), ..hello(2) }), 412);
        assert_eq!(refused(&Hello { protocol_min: 8, protocol_max: 9, ..hello(2) }), 406);
        assert_eq!(refused(&Hello { from: 0, ..hello(2) }), 400);
        let anonymous = Hello { cluster: None, ..hello(2) };
        assert!(say_hello(&server.url(), &anonymous).is_ok());
        let header = SnapshotHeader { index: 1, term: 1, leader_term: 1, bytes: 0 };
        let sent = send_snapshot(&server.url(), &anonymous, &header, std::io::empty(), &|_| {});
        assert!(matches!(sent, Err(SnapshotSendError::Refused { status: 400, .. })), "{sent:?}");
    }

    #[test]
    fn messages_of_others_end_the_stream_but_not_what_came_before() {
        let server = Server::new();
        let (sender, reports) = sender(server.url());
        wait_for(&reports, is_connected);
        let PeerMessage::Raft(mut stray) = heartbeat(2) else { unreachable!() };
        stray.from = 3;
        for message in [heartbeat(1), PeerMessage::Raft(stray), heartbeat(3)] {
            send_surely(&sender, &message);
        }
        assert_eq!(server.next(), heartbeat(1));
        wait_for(
            &reports,
            |report| matches!(report, PeerReport::Refused { refusal: HelloRefusal::Malformed(text), .. } if text.contains("node 3")),
        );
        assert_eq!(server.messages_refused(), 1);
        send_surely(&sender, &heartbeat(4));
        assert_eq!(server.next(), heartbeat(4));
    }

    /// Sends bytes as they are and returns all of the answer.
    fn raw(server: &Server, request: &[u8]) -> String {
        let mut stream = TcpStream::connect(server.handle.local_addr()).unwrap();
        stream.write_all(request).unwrap();
        stream.shutdown(Shutdown::Write).unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        answer
    }

    #[test]
    fn requests_that_no_peer_sends_get_a_status() {
        let server = Server::new();
        let status = |request: String| raw(&server, request.as_bytes())["HTTP/1.1 ".len()..][..3].to_owned();
        let post = |path: &str, headers: &str, body: &str| {
            status(format!("POST {path} HTTP/1.1\r\nHost: h\r\n{headers}Content-Length: {}\r\n\r\n{body}", body.len()))
        };
        let hello = format!("{HELLO_HEADER}: {}\r\n", hello(2).to_json());
        assert_eq!(post("/", "", ""), "404");
        assert_eq!(post("/raft/v1/stream/slow", &hello, ""), "404");
        assert_eq!(status(format!("GET {HELLO_PATH} HTTP/1.1\r\nHost: h\r\n\r\n")), "405");
        assert_eq!(post(HELLO_PATH, "", ""), "400");
        assert_eq!(post(HELLO_PATH, "", &" ".repeat(HELLO_BYTES_MAX + 1)), "413");
        assert_eq!(post("/raft/v1/stream/fast", "", ""), "400");
        assert_eq!(post("/raft/v1/stream/fast", &hello, ""), "204");
        assert_eq!(post("/raft/v1/stream/fast", &hello, "no frame"), "400");
        assert_eq!(post(SNAPSHOT_PATH, &hello, ""), "400");
        let old =
            format!("{HELLO_HEADER}: {}\r\n", Hello { protocol_max: 0, protocol_min: 0, ..self::hello(2) }.to_json());
        let request = format!("POST {SNAPSHOT_PATH} HTTP/1.1\r\nHost: h\r\n{old}\r\n");
        let answer = raw(&server, request.as_bytes());
        assert!(answer.starts_with("HTTP/1.1 406 "), "{answer}");
    }

    #[test]
    fn a_snapshot_arrives_whole_and_a_refused_one_is_not_read() {
        let server = Server::new();
        let file: Vec<u8> = (0..3_000_000_u32).map(|i| (i * 7) as u8).collect();
        let header = SnapshotHeader { index: 9, term: 2, leader_term: 3, bytes: file.len() as u64 };
        let progress = AtomicU64::new(0);
        let count = |sent| progress.store(sent, Ordering::Relaxed);
        send_snapshot(&server.url(), &hello(2), &header, &file[..], &count).unwrap();
        assert_eq!(progress.load(Ordering::Relaxed), header.bytes);
        assert!(server.snapshots.recv().unwrap() == (header, file.clone()));

        struct Untouched;
        impl Read for Untouched {
            fn read(&mut self, _: &mut [u8]) -> io::Result<usize> {
                panic!("the peer has refused")
            }
        }
        let large = SnapshotHeader { bytes: 2 << 30, ..header };
        let refused = send_snapshot(&server.url(), &hello(2), &large, Untouched, &count).unwrap_err();
        assert!(matches!(refused, SnapshotSendError::Refused { status: 507, ref text } if text == "1 GiB is free"));
        let refused = send_snapshot(&server.url(), &hello(3), &header, Untouched, &count).unwrap_err();
        assert!(matches!(refused, SnapshotSendError::Refused { status: 421, .. }), "{refused}");
        let short = send_snapshot(&server.url(), &hello(2), &header, &file[1..], &count).unwrap_err();
        assert!(matches!(short, SnapshotSendError::Refused { status: 422, .. }), "{short}");
    }

    #[test]
    fn a_snapshot_that_cannot_be_read_to_its_end_does_not_arrive() {
        let server = Server::new();
        struct Broken(usize);
        impl Read for Broken {
            fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
                self.0 = self.0.checked_sub(1).ok_or_else(|| io::Error::other("bad sector"))?;
                out.fill(1);
                Ok(out.len())
            }
        }
        let header = SnapshotHeader { index: 9, term: 2, leader_term: 3, bytes: 1 << 20 };
        let broken = send_snapshot(&server.url(), &hello(2), &header, Broken(3), &|_| ()).unwrap_err();
        assert!(matches!(broken, SnapshotSendError::Source(ref e) if e.to_string() == "bad sector"), "{broken}");
        wait_until(|| server.requests_refused() == 1);
        assert!(server.snapshots.is_empty());
    }

    #[test]
    fn proxies_of_the_environment_are_not_used() {
        // Whoever sees this variable is the child below, and says hello in spite of all the others.
        const CHILD: &str = "RAFTEXAMPLE_TEST_PROXY_CHILD";
        let server = Server::new();
        if std::env::var_os(CHILD).is_some() {
            say_hello(&server.url(), &hello(2)).unwrap();
            return;
        }
        let nobody = TcpListener::bind("127.0.0.1:0").unwrap();
        let proxy = format!("http://{}", nobody.local_addr().unwrap());
        let mut child = Command::new(std::env::current_exe().unwrap());
        child.args(["--exact", "peer_server::tests::proxies_of_the_environment_are_not_used"]).env(CHILD, "1");
        for variable in ["ALL_PROXY", "HTTP_PROXY", "http_proxy", "HTTPS_PROXY", "all_proxy"] {
            child.env(variable, &proxy);
        }
        let output = child.env_remove("NO_PROXY").env_remove("no_proxy").output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stdout));
        assert!(String::from_utf8_lossy(&output.stdout).contains("1 passed"), "the child ran this test");
    }

    #[test]
    fn stopping_sends_what_is_queued_and_waits_for_nobody_who_does_not_answer() {
        let server = Server::new();
        let (alive, reports) = sender(server.url());
        wait_for(&reports, is_connected);
        for commit in 0..100 {
            send_surely(&alive, &heartbeat(commit));
        }
        PeerSender::stop([alive], DEADLINE);
        for commit in 0..100 {
            assert_eq!(server.next(), heartbeat(commit));
        }

        let silent = TcpListener::bind("127.0.0.1:0").unwrap();
        let (stuck, _reports) = sender(format!("http://{}", silent.local_addr().unwrap()));
        let mut connections = vec![silent.accept().unwrap().0, silent.accept().unwrap().0];
        let (alive, reports) = sender(server.url());
        wait_for(&reports, is_connected);
        send_surely(&alive, &heartbeat(100));
        let started = Instant::now();
        PeerSender::stop([stuck, alive], Duration::from_secs(1));
        for connection in &mut connections {
            // The hello, and then the end: the connection was cut.
            connection.read_to_end(&mut Vec::new()).unwrap();
        }
        assert!(started.elapsed() < Duration::from_secs(3), "{:?}", started.elapsed());
        assert_eq!(server.next(), heartbeat(100), "the other one has not taken its time");
    }

    #[test]
    fn a_connection_that_swallows_everything_is_given_up() {
        let answer = HelloAnswer { protocol: 1, cluster: None, id: 2, directory: 2, boot: 5, members: None };
        let answer = serde_json::to_string(&answer).unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let (sender, reports) = sender(format!("http://{}", listener.local_addr().unwrap()));
        // Like a host that vanished behind a partition: it was well when the hello came.
        let hold = |mut stream: TcpStream| {
            let mut request = [0; 4096];
            let mut read = 0;
            while !request[..read].ends_with(b"}") {
                read += stream.read(&mut request[read..]).unwrap();
            }
            write!(stream, "HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n{answer}", answer.len()).unwrap();
            stream
        };
        let _held = [hold(listener.accept().unwrap().0), hold(listener.accept().unwrap().0)];
        wait_for(&reports, is_connected);
        let started = Instant::now();
        send_surely(&sender, &heartbeat(1));
        wait_for(&reports, |report| *report == PeerReport::Unreachable { peer: 2, lane: Lane::Fast });
        assert!(started.elapsed() < Duration::from_secs(15), "{:?}", started.elapsed());
    }
}
