//! What nodes say to each other: the hello that starts every conversation, and the frames that follow it.
//!
//! Peers talk HTTP/1.1. Three requests exist, each a `POST` on the peer port:
//!
//! | path | body | answer |
//! |---|---|---|
//! | [`HELLO_PATH`] | a [`Hello`] as JSON | 200 and a [`HelloAnswer`] as JSON, or a [`HelloRefusal`] with its status |
//! | [`STREAM_PATH`]`fast` or `bulk` | frames, chunked, as long as the sender likes | 204 when the body has ended and all of it is delivered |
//! | [`SNAPSHOT_PATH`] | a snapshot file | 204 when it is durable, or a [`SnapshotRefusal`] with its status |
//!
//! The last two repeat the hello in the header [`HELLO_HEADER`] and are refused like a hello: nothing of a body is
//! looked at before both sides agree on protocol, cluster, and who is who.
//!
//! A frame is
//!
//! ```text
//! u32 length of kind and payload | u8 kind | payload | u32 CRC32C of all before it
//! ```
//!
//! in little-endian. Every length is checked before anything is allocated for it, and what protobuf would turn into
//! many times its size (unknown fields, empty entries) is refused before protobuf sees it.

use std::collections::BTreeSet;
use std::fmt;
use std::io::{self, Read};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use bytes::Bytes;
use protobuf::Message as _;
use raft::eraftpb::{Message, MessageType};
use serde::{Deserialize, Serialize};

use crate::codec::{Fields, Malformed, put_bytes, put_u8, put_u32, put_u64};
use crate::command::RequestId;
use crate::membership::{ClusterId, NodeId};
use crate::message::{AdminRequest, Refusal};

/// The newest protocol this node speaks. A change of any format on this page that an older node would misread
/// makes the next one.
pub const PROTOCOL_VERSION: u32 = 1;

/// The oldest protocol this node still speaks: one release back, for rolling upgrades.
pub const PROTOCOL_OLDEST: u32 = 1;

/// Where the hello is said.
pub const HELLO_PATH: &str = "/raft/v1/hello";

/// Where streams of frames go; [`Lane::name`] follows.
pub const STREAM_PATH: &str = "/raft/v1/stream/";

/// Where snapshot files go.
pub const SNAPSHOT_PATH: &str = "/raft/v1/snapshot";

/// Carries the [`Hello`] of a stream or a snapshot.
pub const HELLO_HEADER: &str = "raftexample-hello";

/// Carries the [`SnapshotHeader`].
pub const SNAPSHOT_HEADER: &str = "raftexample-snapshot";

/// The longest hello, as body or header. Its long parts are the URL, see [`URL_BYTES_MAX`], and the earlier boots, see
/// [`crate::data_dir::EARLIER_BOOTS_MAX`].
pub const HELLO_BYTES_MAX: usize = 4096;

/// The longest answer to a hello or to a stream: it may hold a membership of thousands of members.
pub const ANSWER_BYTES_MAX: usize = 1 << 20;

/// The longest frame, header and checksum included. It must hold the longest raft message, which is one entry with a
/// key of 64 KiB and a value of 16 MiB (appends of several entries stay below 1 MiB); the rest is room for growth.
pub const FRAME_BYTES_MAX: usize = 20 << 20;

/// Repeated elements in one raft message: entries, and members of a configuration. An append is cut at 1 MiB and an
/// entry with its context takes more than 32 bytes, so no honest message comes near. Bounds what parsing allocates.
pub const ELEMENTS_MAX: usize = 1 << 16;

/// The longest URL of a peer in an admin request.
pub const URL_BYTES_MAX: usize = 2048;

/// The longest text of a refusal; longer ones are cut when they are sent.
pub const TEXT_BYTES_MAX: usize = 2048;

/// Kinds from here on may be skipped by a receiver that does not know them; lower ones must be understood.
pub const KIND_OPTIONAL: u8 = 0x80;

/// Length and kind.
const FRAME_HEADER_BYTES: usize = 5;
const CHECKSUM_BYTES: usize = 4;
/// What a frame adds to its payload.
const FRAME_OVERHEAD_BYTES: usize = FRAME_HEADER_BYTES + CHECKSUM_BYTES;

const KIND_RAFT: u8 = 1;
const KIND_FORWARD: u8 = 2;
const KIND_FORWARD_REFUSED: u8 = 3;
const KIND_ADMIN_FORWARD: u8 = 4;
const KIND_ADMIN_ANSWER: u8 = 5;

/// A `RequestId` on the wire.
const REQUEST_ID_BYTES: usize = 24;

/// One of the two connections to a peer. Order is kept within a lane, not between lanes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Lane {
    /// Small and urgent: heartbeats, votes, responses, reads, refusals, admin.
    Fast,
    /// Log entries and forwarded writes.
    Bulk,
}

impl Lane {
    /// Both lanes.
    pub const ALL: [Lane; 2] = [Lane::Fast, Lane::Bulk];

    /// As in paths, thread names and logs.
    pub fn name(self) -> &'static str {
        match self {
            Lane::Fast => "fast",
            Lane::Bulk => "bulk",
        }
    }

    /// The lane of this name.
    pub fn from_name(name: &str) -> Option<Lane> {
        Lane::ALL.into_iter().find(|lane| lane.name() == name)
    }
}

// ---------------------------------------------------------------------------------------------------------- hello

/// Who a node is, as it tells its peers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NodeIdentity {
    /// The cluster; `None` while a joiner has not learned it.
    pub cluster: Option<ClusterId>,
    /// The node's Raft id.
    pub id: NodeId,
    /// The identity of its data directory.
    pub directory: u128,
    /// Its boot, as in [`RequestId`].
    pub boot: u64,
    /// The boots before, the latest first, as far as its data directory remembers them.
    pub earlier_boots: Arc<[u64]>,
    /// Its own peer URL.
    pub url: String,
}

/// Where a node's log ends, kept up to date by the driver and told in every hello.
#[derive(Debug, Default)]
pub struct LogPosition {
    term: AtomicU64,
    last_index: AtomicU64,
}

impl LogPosition {
    /// Replaces both. Readers may see one before the other: the hello tells them for logs and plausibility only.
    pub fn set(&self, term: u64, last_index: u64) {
        self.term.store(term, Ordering::Relaxed);
        self.last_index.store(last_index, Ordering::Relaxed);
    }
}

/// The first thing said on every connection.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hello {
    /// The oldest protocol the sender speaks.
    pub protocol_min: u32,
    /// The newest protocol the sender speaks.
    pub protocol_max: u32,
    /// The sender's cluster; `None` from a joiner that wants to learn it.
    #[serde(with = "hex_cluster")]
    pub cluster: Option<ClusterId>,
    /// The sender.
    pub from: NodeId,
    /// Whom the sender takes us for; 0 for whoever answers at this URL.
    pub to: NodeId,
    /// The sender's data directory.
    #[serde(with = "hex_u128")]
    pub directory: u128,
    /// The sender's boot.
    pub boot: u64,
    /// The sender's boots before, the latest first, as far as it remembers them.
    #[serde(default)]
    pub earlier_boots: Vec<u64>,
    /// The sender's Raft term.
    pub term: u64,
    /// The last index of the sender's log.
    pub last_index: u64,
    /// Where the sender listens for its peers.
    pub url: String,
}

impl Hello {
    /// What `me` says to `to` (0: whoever answers) with its log at `position`.
    pub fn new(me: &NodeIdentity, to: NodeId, position: &LogPosition) -> Self {
        Hello {
            protocol_min: PROTOCOL_OLDEST,
            protocol_max: PROTOCOL_VERSION,
            cluster: me.cluster,
            from: me.id,
            to,
            directory: me.directory,
            boot: me.boot,
            earlier_boots: me.earlier_boots.to_vec(),
            term: position.term.load(Ordering::Relaxed),
            last_index: position.last_index.load(Ordering::Relaxed),
            url: me.url.clone(),
        }
    }

    /// Whether the sender's data directory can be the one that showed `boot`, continued: it was started more often since,
    /// and that start is among the earlier ones, if those reach back so far.
    pub fn continues(&self, boot: u64) -> bool {
        let count = |boot: u64| boot >> 32;
        let later = self.earlier_boots.iter().take_while(|earlier| count(**earlier) > count(boot)).count();
        count(self.boot) > count(boot) && self.earlier_boots.get(later).is_none_or(|earlier| *earlier == boot)
    }

    /// JSON on one line of visible ASCII, so that it fits a header as well as a body.
    pub fn to_json(&self) -> String {
        serde_json::to_string(self).expect("a hello has no maps and no floats")
    }

    /// Reads what [`Hello::to_json`] wrote; fields it does not know are left to newer versions.
    pub fn from_json(json: &[u8]) -> Result<Self, HelloRefusal> {
        if json.len() > HELLO_BYTES_MAX {
            return Err(HelloRefusal::Malformed(format!("a hello has at most {HELLO_BYTES_MAX} bytes")));
        }
        let hello: Hello = serde_json::from_slice(json).map_err(|e| HelloRefusal::Malformed(e.to_string()))?;
        if hello.from == 0 || hello.protocol_min > hello.protocol_max {
            return Err(HelloRefusal::Malformed("a node's id is at least 1, protocol_min at most protocol_max".into()));
        }
        Ok(hello)
    }

    /// The newest protocol both sides speak.
    pub fn common_protocol(&self) -> Result<u32, HelloRefusal> {
        let protocol = self.protocol_max.min(PROTOCOL_VERSION);
        if protocol < self.protocol_min.max(PROTOCOL_OLDEST) {
            return Err(HelloRefusal::NoCommonProtocol { min: PROTOCOL_OLDEST, max: PROTOCOL_VERSION });
        }
        Ok(protocol)
    }

    /// What can be told without knowing the membership: a common protocol, the same cluster, and that `me` is meant.
    /// Returns the protocol to speak.
    pub fn check(&self, me: &NodeIdentity) -> Result<u32, HelloRefusal> {
        let protocol = self.common_protocol()?;
        if let (Some(theirs), Some(ours)) = (self.cluster, me.cluster)
            && theirs != ours
        {
            return Err(HelloRefusal::OtherCluster { ours });
        }
        if self.to != 0 && self.to != me.id {
            return Err(HelloRefusal::WrongId { ours: me.id });
        }
        Ok(protocol)
    }
}

/// Accepts a hello.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HelloAnswer {
    /// The protocol to speak on this connection.
    pub protocol: u32,
    /// The answerer's cluster; `None` while it has not learned it itself.
    #[serde(with = "hex_cluster")]
    pub cluster: Option<ClusterId>,
    /// Who answers.
    pub id: NodeId,
    /// The answerer's data directory.
    #[serde(with = "hex_u128")]
    pub directory: u128,
    /// The answerer's boot.
    pub boot: u64,
    /// The membership as the answerer has applied it, encoded: what a joiner needs to find the others.
    #[serde(default, with = "hex_bytes")]
    pub members: Option<Vec<u8>>,
}

/// Why a conversation is refused. Each has its HTTP status; the body says the same as JSON.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "cause", content = "is", rename_all = "kebab-case")]
pub enum HelloRefusal {
    /// The two belong to different clusters. 412.
    OtherCluster {
        /// The refusing node's cluster.
        #[serde(with = "hex_cluster_id")]
        ours: ClusterId,
    },
    /// Someone else was expected at this URL. 421.
    WrongId {
        /// The refusing node.
        ours: NodeId,
    },
    /// The sender was removed from the cluster, for ever. 410.
    Removed,
    /// The sender's id is known with another data directory: its disk was wiped or swapped, and with it promises of
    /// that id were lost. 409.
    OtherDirectory,
    /// The sender's data directory is older than it was: a copy took its place, and later promises were lost. 409.
    OlderCopy,
    /// No protocol that both speak. 406, for 426 has to name a protocol that HTTP could be upgraded to.
    NoCommonProtocol {
        /// The oldest the refusing node speaks.
        min: u32,
        /// The newest the refusing node speaks.
        max: u32,
    },
    /// The hello, or a frame of the stream behind it, makes no sense. 400.
    Malformed(String),
    /// Not now: starting, stopping, or too busy. 503.
    NotReady(String),
}

impl HelloRefusal {
    /// The HTTP status that goes with the cause.
    pub fn status(&self) -> u16 {
        match self {
            HelloRefusal::OtherCluster { .. } => 412,
            HelloRefusal::WrongId { .. } => 421,
            HelloRefusal::Removed => 410,
            HelloRefusal::OtherDirectory | HelloRefusal::OlderCopy => 409,
            HelloRefusal::NoCommonProtocol { .. } => 406,
            HelloRefusal::Malformed(_) => 400,
            HelloRefusal::NotReady(_) => 503,
        }
    }

    /// The body of the refusal.
    pub fn to_json(&self) -> String {
        serde_json::to_string(self).expect("a refusal has no maps and no floats")
    }

    /// Reads what [`HelloRefusal::to_json`] wrote; `None` for anything else, such as a proxy's error page.
    pub fn from_json(json: &[u8]) -> Option<Self> {
        serde_json::from_slice(json).ok()
    }
}

impl fmt::Display for HelloRefusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            HelloRefusal::OtherCluster { ours } => {
                write!(f, "it belongs to another cluster, {ours}: compare the two nodes' --cluster lists")
            }
            HelloRefusal::WrongId { ours } => write!(f, "it is node {ours}: the URL is another member's"),
            HelloRefusal::Removed => write!(f, "this node was removed from the cluster"),
            HelloRefusal::OtherDirectory => write!(
                f,
                "this node's id is known with another data directory: remove the member and add it again under a new id"
            ),
            HelloRefusal::OlderCopy => write!(
                f,
                "this node's data directory is an older copy: remove the member and add it again under a new id, with \
                 an empty directory"
            ),
            HelloRefusal::NoCommonProtocol { min, max } => {
                write!(f, "it speaks peer protocol {min} to {max} only: upgrade one release at a time")
            }
            HelloRefusal::Malformed(text) => write!(f, "it could not make sense of what was sent: {text}"),
            HelloRefusal::NotReady(text) => write!(f, "it is not ready: {text}"),
        }
    }
}

/// What a snapshot file is, told before its first byte.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SnapshotHeader {
    /// The applied index it holds.
    pub index: u64,
    /// The term of the entry at that index.
    pub term: u64,
    /// The term of the leader that sends it: the term of its `MsgSnapshot`.
    pub leader_term: u64,
    /// The length of the file in bytes.
    pub bytes: u64,
}

impl SnapshotHeader {
    /// JSON for [`SNAPSHOT_HEADER`].
    pub fn to_json(&self) -> String {
        serde_json::to_string(self).expect("a snapshot header is four numbers")
    }

    /// Reads what [`SnapshotHeader::to_json`] wrote.
    pub fn from_json(json: &[u8]) -> Result<Self, Malformed> {
        serde_json::from_slice(json).map_err(|_| Malformed("snapshot header"))
    }
}

/// Why a snapshot was not taken.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SnapshotRefusal {
    /// It is not needed, or not now: older than what is here, or another one is arriving. 409.
    Unwanted(String),
    /// It does not fit the disk. 507.
    NoSpace(String),
    /// It arrived damaged, incomplete, or too slowly. 422.
    Damaged(String),
    /// The node is shutting down. 503.
    Stopping,
}

impl SnapshotRefusal {
    /// The HTTP status that goes with the cause.
    pub fn status(&self) -> u16 {
        match self {
            SnapshotRefusal::Unwanted(_) => 409,
            SnapshotRefusal::NoSpace(_) => 507,
            SnapshotRefusal::Damaged(_) => 422,
            SnapshotRefusal::Stopping => 503,
        }
    }
}

impl fmt::Display for SnapshotRefusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            SnapshotRefusal::Unwanted(text) | SnapshotRefusal::NoSpace(text) | SnapshotRefusal::Damaged(text) => {
                f.write_str(text)
            }
            SnapshotRefusal::Stopping => f.write_str("the node is shutting down"),
        }
    }
}

/// Remembers which causes of trouble were logged, so that a cause is logged once and not with every attempt.
#[derive(Debug, Default)]
pub(crate) struct LoggedCauses(BTreeSet<String>);

/// Beyond so many causes nothing more is logged until things are well again: a peer chooses some of the words.
const LOGGED_CAUSES_MAX: usize = 64;

impl LoggedCauses {
    /// Whether `cause` should be logged now.
    pub(crate) fn is_new(&mut self, cause: &str) -> bool {
        self.0.len() < LOGGED_CAUSES_MAX && !self.0.contains(cause) && self.0.insert(cause.to_owned())
    }

    /// All is well: the next trouble is news. Returns whether there was any.
    pub(crate) fn clear(&mut self) -> bool {
        !std::mem::take(&mut self.0).is_empty()
    }
}

// ------------------------------------------------------------------------------------------------------- messages

/// A client's write on its way to the leader.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ForwardedWrite {
    /// Names the write for all time: a leader may get it twice.
    pub id: RequestId,
    /// The encoded command.
    pub data: Bytes,
}

/// Names a forward so that its leader takes it once: those of one origin rise, in the order of these fields.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct ForwardName {
    /// The leader's term: in another one nobody takes it.
    pub term: u64,
    /// The origin's boot, as in a [`RequestId`].
    pub boot: u64,
    /// Counts the forwards of that boot from 1.
    pub number: u64,
}

/// Why forwarded writes were not proposed. None of them will be applied because of that forward, however often it
/// arrives; an earlier one may have put them into a log.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ForwardRefusal {
    /// The receiver does not lead.
    NotLeader {
        /// Who does, as far as the receiver knows; 0 if it knows nobody.
        leader: NodeId,
    },
    /// Raft dropped the proposal (a transfer is in progress, or too much is uncommitted), or the leader leads in another
    /// term than the origin knows of, or has too many forwards waiting.
    Dropped,
    /// The store or the disk is full.
    Full(String),
}

/// How a forwarded admin request ended on the leader.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum AdminOutcome {
    /// Committed at `index` (0 if nothing had to be): the asking node answers its client once it has applied that.
    Done {
        /// The log index of the change.
        index: u64,
    },
    /// Surely not done.
    Refused(Refusal),
    /// It may still take effect.
    Unknown,
}

/// Everything that travels in frames.
#[derive(Clone, Debug, PartialEq)]
pub enum PeerMessage {
    /// Raft's own.
    Raft(Message),
    /// Writes for a leader. Raft's `MsgPropose` never travels.
    Forward {
        /// Names the forward.
        name: ForwardName,
        /// The writes.
        writes: Vec<ForwardedWrite>,
    },
    /// The answer to a [`PeerMessage::Forward`] that was not proposed. Success is seen in the log.
    ForwardRefused {
        /// The refused writes.
        ids: Vec<RequestId>,
        /// Why.
        reason: ForwardRefusal,
    },
    /// An admin request for a leader.
    AdminForward {
        /// The leader's term: in another one nobody takes it.
        term: u64,
        /// Names the request. A leader that is asked twice in one term says the same twice, or that it does not know any
        /// more.
        id: RequestId,
        /// What is asked.
        request: AdminRequest,
    },
    /// The answer to a [`PeerMessage::AdminForward`].
    AdminAnswer {
        /// The request.
        id: RequestId,
        /// How it ended.
        outcome: AdminOutcome,
    },
}

impl PeerMessage {
    /// The connection it travels on: whatever may be large keeps off the one that heartbeats use.
    pub fn lane(&self) -> Lane {
        match self {
            PeerMessage::Raft(message) => match message.msg_type {
                MessageType::MsgAppend | MessageType::MsgSnapshot | MessageType::MsgPropose => Lane::Bulk,
                _ => Lane::Fast,
            },
            PeerMessage::Forward { .. } => Lane::Bulk,
            PeerMessage::ForwardRefused { .. } | PeerMessage::AdminForward { .. } | PeerMessage::AdminAnswer { .. } => {
                Lane::Fast
            }
        }
    }

    /// The bytes of its frame; for a text or URL beyond its limit, a little more.
    pub fn frame_bytes(&self) -> usize {
        FRAME_OVERHEAD_BYTES
            + match self {
                PeerMessage::Raft(message) => message.compute_size() as usize,
                PeerMessage::Forward { writes, .. } => {
                    let writes = writes.iter().map(|write| REQUEST_ID_BYTES + 4 + write.data.len());
                    3 * 8 + 4 + writes.sum::<usize>()
                }
                PeerMessage::ForwardRefused { ids, reason } => {
                    4 + REQUEST_ID_BYTES * ids.len()
                        + match reason {
                            ForwardRefusal::NotLeader { .. } => 9,
                            ForwardRefusal::Dropped => 1,
                            ForwardRefusal::Full(text) => 5 + text.len(),
                        }
                }
                PeerMessage::AdminForward { request, .. } => 8 + REQUEST_ID_BYTES + admin_request_bytes(request),
                PeerMessage::AdminAnswer { outcome, .. } => {
                    REQUEST_ID_BYTES
                        + match outcome {
                            AdminOutcome::Done { .. } => 9,
                            AdminOutcome::Refused(refusal) => 2 + refusal_text(refusal).map_or(0, |t| 4 + t.len()),
                            AdminOutcome::Unknown => 1,
                        }
                }
            }
    }

    /// Whether a receiver would take it: what is beyond a limit must not be sent, for it ends the whole stream.
    pub fn is_within_limits(&self) -> bool {
        let counted = match self {
            PeerMessage::Raft(message) => message.entries.len() <= ELEMENTS_MAX / 2,
            PeerMessage::AdminForward { request: AdminRequest::AddMember { url, .. }, .. } => {
                url.len() <= URL_BYTES_MAX
            }
            PeerMessage::AdminForward { request: AdminRequest::ReplaceMembers(members), .. } => {
                members.iter().all(|(_, url, _)| url.len() <= URL_BYTES_MAX)
            }
            _ => true,
        };
        counted && self.frame_bytes() <= FRAME_BYTES_MAX
    }

    /// Appends its frame to `out`. The caller has looked at [`PeerMessage::is_within_limits`].
    pub fn encode(&self, out: &mut Vec<u8>) {
        let start = out.len();
        out.extend_from_slice(&[0; FRAME_HEADER_BYTES]);
        let kind = self.encode_payload(out);
        let body_bytes = u32::try_from(out.len() - start - 4).expect("a frame is shorter than 4 GiB");
        out[start..start + 4].copy_from_slice(&body_bytes.to_le_bytes());
        out[start + 4] = kind;
        let checksum = crc32c::crc32c(&out[start..]);
        put_u32(out, checksum);
    }

    fn encode_payload(&self, out: &mut Vec<u8>) -> u8 {
        match self {
            PeerMessage::Raft(message) => {
                message.write_to_vec(out).expect("a Vec takes everything, and proto3 has no required fields");
                KIND_RAFT
            }
            PeerMessage::Forward { name, writes } => {
                [name.term, name.boot, name.number].into_iter().for_each(|number| put_u64(out, number));
                put_count(out, writes.len());
                for write in writes {
                    put_request_id(out, write.id);
                    put_bytes(out, &write.data);
                }
                KIND_FORWARD
            }
            PeerMessage::ForwardRefused { ids, reason } => {
                put_count(out, ids.len());
                ids.iter().for_each(|id| put_request_id(out, *id));
                put_forward_refusal(out, reason);
                KIND_FORWARD_REFUSED
            }
            PeerMessage::AdminForward { term, id, request } => {
                put_u64(out, *term);
                put_request_id(out, *id);
                put_admin_request(out, request);
                KIND_ADMIN_FORWARD
            }
            PeerMessage::AdminAnswer { id, outcome } => {
                put_request_id(out, *id);
                put_admin_outcome(out, outcome);
                KIND_ADMIN_ANSWER
            }
        }
    }

    /// Reads a payload; `Ok(None)` is an unknown kind that may be skipped. Entry and command bytes are slices of
    /// `payload` and keep all of it in memory: who stores them for long should copy them.
    fn decode(kind: u8, payload: &Bytes) -> Result<Option<Self>, Malformed> {
        let mut fields = Fields::new(payload, "peer message");
        let message = match kind {
            KIND_RAFT => return raft_message(payload).map(|message| Some(PeerMessage::Raft(message))),
            KIND_FORWARD => {
                let name = ForwardName { term: fields.u64()?, boot: fields.u64()?, number: fields.u64()? };
                let mut writes = Vec::with_capacity(fields.count(REQUEST_ID_BYTES + 4)?);
                for _ in 0..writes.capacity() {
                    let id = request_id(&mut fields)?;
                    writes.push(ForwardedWrite { id, data: payload.slice_ref(fields.bytes(FRAME_BYTES_MAX)?) });
                }
                PeerMessage::Forward { name, writes }
            }
            KIND_FORWARD_REFUSED => {
                let count = fields.count(REQUEST_ID_BYTES)?;
                let ids = (0..count).map(|_| request_id(&mut fields)).collect::<Result<_, _>>()?;
                PeerMessage::ForwardRefused { ids, reason: forward_refusal(&mut fields)? }
            }
            KIND_ADMIN_FORWARD => {
                let (term, id) = (fields.u64()?, request_id(&mut fields)?);
                PeerMessage::AdminForward { term, id, request: admin_request(&mut fields)? }
            }
            KIND_ADMIN_ANSWER => {
                PeerMessage::AdminAnswer { id: request_id(&mut fields)?, outcome: admin_outcome(&mut fields)? }
            }
            KIND_OPTIONAL.. => return Ok(None),
            _ => return Err(Malformed("peer message: its kind is not known here")),
        };
        fields.finish()?;
        Ok(Some(message))
    }
}

fn put_count(out: &mut Vec<u8>, count: usize) {
    put_u32(out, u32::try_from(count).expect("a frame holds fewer than 4 Gi items"));
}

fn put_request_id(out: &mut Vec<u8>, id: RequestId) {
    put_u64(out, id.node);
    put_u64(out, id.boot);
    put_u64(out, id.sequence);
}

fn request_id(fields: &mut Fields<'_>) -> Result<RequestId, Malformed> {
    Ok(RequestId { node: fields.u64()?, boot: fields.u64()?, sequence: fields.u64()? })
}

/// Text for humans: cut rather than refused when it is too long.
fn put_text(out: &mut Vec<u8>, text: &str) {
    put_bytes(out, &text.as_bytes()[..text.floor_char_boundary(TEXT_BYTES_MAX)]);
}

fn text(fields: &mut Fields<'_>, bytes_max: usize) -> Result<String, Malformed> {
    let bytes = fields.bytes(bytes_max)?;
    std::str::from_utf8(bytes).map(str::to_owned).map_err(|_| fields.malformed())
}

fn put_forward_refusal(out: &mut Vec<u8>, reason: &ForwardRefusal) {
    match reason {
        ForwardRefusal::NotLeader { leader } => {
            put_u8(out, 1);
            put_u64(out, *leader);
        }
        ForwardRefusal::Dropped => put_u8(out, 2),
        ForwardRefusal::Full(text) => {
            put_u8(out, 3);
            put_text(out, text);
        }
    }
}

fn forward_refusal(fields: &mut Fields<'_>) -> Result<ForwardRefusal, Malformed> {
    match fields.u8()? {
        1 => Ok(ForwardRefusal::NotLeader { leader: fields.u64()? }),
        2 => Ok(ForwardRefusal::Dropped),
        3 => Ok(ForwardRefusal::Full(text(fields, TEXT_BYTES_MAX)?)),
        _ => Err(fields.malformed()),
    }
}

fn admin_request_bytes(request: &AdminRequest) -> usize {
    1 + match request {
        AdminRequest::AddMember { url, .. } => 8 + 4 + url.len() + 1,
        AdminRequest::RemoveMember { .. } | AdminRequest::TransferLeader { .. } => 8,
        AdminRequest::ReplaceMembers(members) => {
            4 + members.iter().map(|(_, url, _)| 8 + 4 + url.len() + 1).sum::<usize>()
        }
    }
}

fn put_admin_request(out: &mut Vec<u8>, request: &AdminRequest) {
    match request {
        AdminRequest::AddMember { id, url, voter } => {
            put_u8(out, 1);
            put_u64(out, *id);
            put_bytes(out, url.as_bytes());
            put_u8(out, voter.map_or(2, u8::from));
        }
        AdminRequest::RemoveMember { id } => {
            put_u8(out, 2);
            put_u64(out, *id);
        }
        AdminRequest::ReplaceMembers(members) => {
            put_u8(out, 3);
            put_count(out, members.len());
            for (id, url, voter) in members {
                put_u64(out, *id);
                put_bytes(out, url.as_bytes());
                put_u8(out, u8::from(*voter));
            }
        }
        AdminRequest::TransferLeader { id } => {
            put_u8(out, 4);
            put_u64(out, *id);
        }
    }
}

fn admin_request(fields: &mut Fields<'_>) -> Result<AdminRequest, Malformed> {
    match fields.u8()? {
        1 => {
            let (id, url) = (fields.u64()?, text(fields, URL_BYTES_MAX)?);
            let voter = match fields.u8()? {
                0 => Some(false),
                1 => Some(true),
                2 => None,
                _ => return Err(fields.malformed()),
            };
            Ok(AdminRequest::AddMember { id, url, voter })
        }
        2 => Ok(AdminRequest::RemoveMember { id: fields.u64()? }),
        3 => {
            let mut members = Vec::new();
            for _ in 0..fields.count(8 + 4 + 1)? {
                let (id, url) = (fields.u64()?, text(fields, URL_BYTES_MAX)?);
                members.push((id, url, flag(fields)?));
            }
            Ok(AdminRequest::ReplaceMembers(members))
        }
        4 => Ok(AdminRequest::TransferLeader { id: fields.u64()? }),
        _ => Err(fields.malformed()),
    }
}

fn flag(fields: &mut Fields<'_>) -> Result<bool, Malformed> {
    match fields.u8()? {
        0 => Ok(false),
        1 => Ok(true),
        _ => Err(fields.malformed()),
    }
}

fn put_admin_outcome(out: &mut Vec<u8>, outcome: &AdminOutcome) {
    match outcome {
        AdminOutcome::Done { index } => {
            put_u8(out, 1);
            put_u64(out, *index);
        }
        AdminOutcome::Refused(refusal) => {
            put_u8(out, 2);
            put_u8(out, refusal_kind(refusal));
            if let Some(text) = refusal_text(refusal) {
                put_text(out, text);
            }
        }
        AdminOutcome::Unknown => put_u8(out, 3),
    }
}

fn admin_outcome(fields: &mut Fields<'_>) -> Result<AdminOutcome, Malformed> {
    match fields.u8()? {
        1 => Ok(AdminOutcome::Done { index: fields.u64()? }),
        2 => Ok(AdminOutcome::Refused(match fields.u8()? {
            1 => Refusal::NoLeader,
            // Which of the leader's limits it was stays in the leader's log: the text is a constant of its program.
            2 => Refusal::Overloaded("the leader is overloaded"),
            3 => Refusal::Stopping,
            4 => Refusal::Full(text(fields, TEXT_BYTES_MAX)?),
            5 => Refusal::Conflict(text(fields, TEXT_BYTES_MAX)?),
            6 => Refusal::Invalid(text(fields, TEXT_BYTES_MAX)?),
            _ => return Err(fields.malformed()),
        })),
        3 => Ok(AdminOutcome::Unknown),
        _ => Err(fields.malformed()),
    }
}

fn refusal_kind(refusal: &Refusal) -> u8 {
    match refusal {
        Refusal::NoLeader => 1,
        Refusal::Overloaded(_) => 2,
        Refusal::Stopping => 3,
        Refusal::Full(_) => 4,
        Refusal::Conflict(_) => 5,
        Refusal::Invalid(_) => 6,
    }
}

fn refusal_text(refusal: &Refusal) -> Option<&str> {
    match refusal {
        Refusal::NoLeader | Refusal::Overloaded(_) | Refusal::Stopping => None,
        Refusal::Full(text) | Refusal::Conflict(text) | Refusal::Invalid(text) => Some(text),
    }
}

// --------------------------------------------------------------------------------------------------- raft messages

/// What a protobuf field may hold.
enum Wire {
    Number,
    /// A number up to this one: protobuf would keep others as unknown fields.
    Enum(u64),
    Bytes,
    /// Repeated, one by one or packed.
    Numbers,
    Nested(&'static [(u64, Wire)]),
}

const CONF_STATE: &[(u64, Wire)] =
    &[(1, Wire::Numbers), (2, Wire::Numbers), (3, Wire::Numbers), (4, Wire::Numbers), (5, Wire::Number)];
const SNAPSHOT_METADATA: &[(u64, Wire)] = &[(1, Wire::Nested(CONF_STATE)), (2, Wire::Number), (3, Wire::Number)];
const SNAPSHOT: &[(u64, Wire)] = &[(1, Wire::Bytes), (2, Wire::Nested(SNAPSHOT_METADATA))];
const ENTRY: &[(u64, Wire)] =
    &[(1, Wire::Enum(2)), (2, Wire::Number), (3, Wire::Number), (4, Wire::Bytes), (5, Wire::Number), (6, Wire::Bytes)];
/// The fields of a raft message as of raft 0.7.
const MESSAGE: &[(u64, Wire)] = &[
    (1, Wire::Enum(18)),
    (2, Wire::Number),
    (3, Wire::Number),
    (4, Wire::Number),
    (5, Wire::Number),
    (6, Wire::Number),
    (7, Wire::Nested(ENTRY)),
    (8, Wire::Number),
    (9, Wire::Nested(SNAPSHOT)),
    (10, Wire::Number),
    (11, Wire::Number),
    (12, Wire::Bytes),
    (13, Wire::Number),
    (14, Wire::Number),
    (15, Wire::Number),
    (16, Wire::Number),
];

const MALFORMED_RAFT: Malformed = Malformed("raft message");

/// Parses a raft message whose shape is known before protobuf allocates anything for it.
fn raft_message(payload: &Bytes) -> Result<Message, Malformed> {
    check_shape(payload, MESSAGE, &mut { ELEMENTS_MAX })?;
    Message::parse_from_carllerche_bytes(payload).map_err(|_| MALFORMED_RAFT)
}

/// Walks encoded fields without building anything. Unknown fields would cost some seventy times their size in memory,
/// and an entry of two bytes costs a hundred: the first are refused, the second counted against `elements_left`.
/// The recursion is as deep as the tables above.
fn check_shape(mut bytes: &[u8], shape: &[(u64, Wire)], elements_left: &mut usize) -> Result<(), Malformed> {
    while !bytes.is_empty() {
        let key = varint(&mut bytes)?;
        let (_, wire) = shape.iter().find(|(number, _)| *number == key >> 3).ok_or(MALFORMED_RAFT)?;
        let elements = match (wire, key & 7) {
            (Wire::Number, 0) => varint(&mut bytes).map(|_| 0)?,
            (Wire::Enum(max), 0) => {
                if varint(&mut bytes)? > *max {
                    return Err(MALFORMED_RAFT);
                }
                0
            }
            (Wire::Bytes, 2) => length_delimited(&mut bytes).map(|_| 0)?,
            (Wire::Numbers, 0) => varint(&mut bytes).map(|_| 1)?,
            (Wire::Numbers, 2) => length_delimited(&mut bytes)?.len(),
            (Wire::Nested(shape), 2) => {
                check_shape(length_delimited(&mut bytes)?, shape, elements_left)?;
                1
            }
            _ => return Err(MALFORMED_RAFT),
        };
        *elements_left = elements_left.checked_sub(elements).ok_or(MALFORMED_RAFT)?;
    }
    Ok(())
}

fn varint(bytes: &mut &[u8]) -> Result<u64, Malformed> {
    let mut value = 0_u64;
    for shift in (0..64).step_by(7) {
        let (byte, rest) = bytes.split_first().ok_or(MALFORMED_RAFT)?;
        *bytes = rest;
        value |= u64::from(byte & 0x7f) << shift;
        if byte & 0x80 == 0 {
            return Ok(value);
        }
    }
    Err(MALFORMED_RAFT)
}

fn length_delimited<'a>(bytes: &mut &'a [u8]) -> Result<&'a [u8], Malformed> {
    let len = usize::try_from(varint(bytes)?).map_err(|_| MALFORMED_RAFT)?;
    let (head, rest) = bytes.split_at_checked(len).ok_or(MALFORMED_RAFT)?;
    *bytes = rest;
    Ok(head)
}

// --------------------------------------------------------------------------------------------------------- frames

/// Why a stream of frames cannot be read on.
#[derive(Debug)]
pub enum FrameError {
    /// The connection broke, or ended inside a frame.
    Io(io::Error),
    /// The frame says to be longer than [`FRAME_BYTES_MAX`], or shorter than possible.
    Length(u32),
    /// The checksum is not that of the frame.
    Checksum,
    /// The frame arrived whole, and means nothing here.
    Message(Malformed),
}

impl fmt::Display for FrameError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            FrameError::Io(e) => write!(f, "failed to read a frame: {e}"),
            FrameError::Length(bytes) => write!(f, "a frame of {bytes} bytes"),
            FrameError::Checksum => write!(f, "a frame with a wrong checksum"),
            FrameError::Message(e) => e.fmt(f),
        }
    }
}

impl std::error::Error for FrameError {}

/// The bytes read ahead. What fits is delivered as one batch, so it also bounds a batch of small messages.
const READ_AHEAD_BYTES: usize = 64 << 10;

/// Reads frames off a stream in batches: all that has already arrived, and never waits for more than the first.
pub struct FrameReader<R> {
    source: R,
    buffer: Box<[u8]>,
    start: usize,
    end: usize,
    skipped: u64,
}

impl<R: Read> FrameReader<R> {
    /// Reads from `source`, which need not be buffered.
    pub fn new(source: R) -> Self {
        FrameReader { source, buffer: vec![0; READ_AHEAD_BYTES].into(), start: 0, end: 0, skipped: 0 }
    }

    /// How many frames of unknown, optional kinds were skipped.
    pub fn skipped(&self) -> u64 {
        self.skipped
    }

    /// Waits for a frame and appends it to `messages`, together with all whole frames that came with it. `Ok(false)`
    /// is the end of the stream; what was appended before an error is whole and in order.
    pub fn next_batch(&mut self, messages: &mut Vec<PeerMessage>) -> Result<bool, FrameError> {
        let before = messages.len();
        loop {
            while self.take_buffered(messages)? {}
            if messages.len() > before {
                return Ok(true);
            }
            match self.buffered_frame_bytes()? {
                Some(frame_bytes) if frame_bytes > self.buffer.len() => self.take_large(frame_bytes, messages)?,
                _ => {
                    if !self.fill()? {
                        return Ok(false);
                    }
                }
            }
        }
    }

    /// The length of the frame that is next in the buffer, as far as its header is there.
    fn buffered_frame_bytes(&self) -> Result<Option<usize>, FrameError> {
        let Some((len, _)) = self.buffer[self.start..self.end].split_first_chunk() else { return Ok(None) };
        let len = u32::from_le_bytes(*len);
        let frame_bytes = (len as usize).saturating_add(FRAME_OVERHEAD_BYTES - 1);
        if len == 0 || frame_bytes > FRAME_BYTES_MAX {
            return Err(FrameError::Length(len));
        }
        Ok(Some(frame_bytes))
    }

    fn take_buffered(&mut self, messages: &mut Vec<PeerMessage>) -> Result<bool, FrameError> {
        let Some(frame_bytes) = self.buffered_frame_bytes()? else { return Ok(false) };
        if frame_bytes > self.end - self.start {
            return Ok(false);
        }
        // A copy of its own: what is kept of a message must not keep its neighbours in memory.
        let frame = Bytes::copy_from_slice(&self.buffer[self.start..self.start + frame_bytes]);
        self.start += frame_bytes;
        self.take_frame(frame, messages)?;
        Ok(true)
    }

    /// A frame that does not fit the buffer. Memory is taken as its bytes arrive, not as its header promises.
    fn take_large(&mut self, frame_bytes: usize, messages: &mut Vec<PeerMessage>) -> Result<(), FrameError> {
        let mut frame = self.buffer[self.start..self.end].to_vec();
        (self.start, self.end) = (0, 0);
        let rest_bytes = frame_bytes - frame.len();
        let read = self.source.by_ref().take(rest_bytes as u64).read_to_end(&mut frame).map_err(FrameError::Io)?;
        if read < rest_bytes {
            return Err(FrameError::Io(io::ErrorKind::UnexpectedEof.into()));
        }
        self.take_frame(frame.into(), messages)
    }

    fn take_frame(&mut self, frame: Bytes, messages: &mut Vec<PeerMessage>) -> Result<(), FrameError> {
        let (checked, checksum) = frame.split_at(frame.len() - CHECKSUM_BYTES);
        if crc32c::crc32c(checked).to_le_bytes() != checksum {
            return Err(FrameError::Checksum);
        }
        let (kind, payload) = (frame[4], frame.slice(FRAME_HEADER_BYTES..checked.len()));
        match PeerMessage::decode(kind, &payload).map_err(FrameError::Message)? {
            Some(message) => messages.push(message),
            None => self.skipped += 1,
        }
        Ok(())
    }

    /// Reads what there is behind the buffered part of a frame. `Ok(false)`: the stream ended between two frames.
    fn fill(&mut self) -> Result<bool, FrameError> {
        self.buffer.copy_within(self.start..self.end, 0);
        (self.start, self.end) = (0, self.end - self.start);
        loop {
            match self.source.read(&mut self.buffer[self.end..]) {
                Ok(0) if self.end == 0 => return Ok(false),
                Ok(0) => return Err(FrameError::Io(io::ErrorKind::UnexpectedEof.into())),
                Ok(n) => {
                    self.end += n;
                    return Ok(true);
                }
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(FrameError::Io(e)),
            }
        }
    }
}

// ---------------------------------------------------------------------------------------- ids as hex digits in JSON

mod hex_u128 {
    use serde::{Deserialize, Deserializer, Serializer, de};

    pub(super) fn serialize<S: Serializer>(id: &u128, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(&format_args!("{id:032x}"))
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<u128, D::Error> {
        parse(&String::deserialize(deserializer)?).ok_or_else(|| de::Error::custom("an id has 32 hex digits"))
    }

    pub(super) fn parse(digits: &str) -> Option<u128> {
        let hex = digits.len() == 32 && digits.bytes().all(|b| b.is_ascii_hexdigit());
        if hex { u128::from_str_radix(digits, 16).ok() } else { None }
    }
}

mod hex_cluster_id {
    use super::{ClusterId, hex_u128};
    use serde::{Deserializer, Serializer};

    pub(super) fn serialize<S: Serializer>(id: &ClusterId, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(id)
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<ClusterId, D::Error> {
        hex_u128::deserialize(deserializer).map(|id| ClusterId(id.to_be_bytes()))
    }
}

mod hex_cluster {
    use super::{ClusterId, hex_u128};
    use serde::{Deserialize, Deserializer, Serializer, de};

    pub(super) fn serialize<S: Serializer>(id: &Option<ClusterId>, serializer: S) -> Result<S::Ok, S::Error> {
        match id {
            Some(id) => serializer.collect_str(id),
            None => serializer.serialize_none(),
        }
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<ClusterId>, D::Error> {
        let Some(digits) = Option::<String>::deserialize(deserializer)? else { return Ok(None) };
        let id = hex_u128::parse(&digits).ok_or_else(|| de::Error::custom("a cluster id has 32 hex digits"))?;
        Ok(Some(ClusterId(id.to_be_bytes())))
    }
}

mod hex_bytes {
    use serde::{Deserialize, Deserializer, Serializer, de};
    use std::fmt::Write;

    pub(super) fn serialize<S: Serializer>(bytes: &Option<Vec<u8>>, serializer: S) -> Result<S::Ok, S::Error> {
        let Some(bytes) = bytes else { return serializer.serialize_none() };
        let mut digits = String::with_capacity(2 * bytes.len());
        for byte in bytes {
            write!(digits, "{byte:02x}").expect("a String takes everything");
        }
        serializer.serialize_str(&digits)
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<Vec<u8>>, D::Error> {
        let Some(digits) = Option::<String>::deserialize(deserializer)? else { return Ok(None) };
        let value = |digit: u8| char::from(digit).to_digit(16);
        let (pairs, rest) = digits.as_bytes().as_chunks::<2>();
        let bytes = pairs.iter().map(|[high, low]| Some((value(*high)? << 4 | value(*low)?) as u8)).collect();
        match bytes {
            Some(bytes) if rest.is_empty() => Ok(Some(bytes)),
            _ => Err(de::Error::custom("bytes are pairs of hex digits")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use raft::eraftpb::{Entry, Snapshot};

    fn request(sequence: u64) -> RequestId {
        RequestId { node: 2, boot: 7 << 32 | 5, sequence }
    }

    fn append(data: &[&[u8]]) -> PeerMessage {
        let mut message = Message { msg_type: MessageType::MsgAppend, to: 1, from: 2, term: 3, ..Message::default() };
        for (i, data) in data.iter().enumerate() {
            let data = Bytes::copy_from_slice(data);
            message.entries.push(Entry { term: 3, index: i as u64 + 1, data, ..Entry::default() });
        }
        PeerMessage::Raft(message)
    }

    /// A raft message with every field there is.
    fn full() -> PeerMessage {
        let mut snapshot = Snapshot { data: Bytes::from_static(b"data"), ..Snapshot::default() };
        snapshot.mut_metadata().index = 4;
        snapshot.mut_metadata().term = 3;
        let conf_state = snapshot.mut_metadata().mut_conf_state();
        (conf_state.voters, conf_state.learners) = (vec![1, 2, 3], vec![4]);
        (conf_state.voters_outgoing, conf_state.learners_next) = (vec![1, 2], vec![5]);
        conf_state.auto_leave = true;
        let mut message =
            Message { msg_type: MessageType::MsgRequestPreVoteResponse, to: 1, from: 2, term: 3, ..Message::default() };
        (message.log_term, message.index, message.commit, message.commit_term) = (5, 6, 7, 8);
        (message.request_snapshot, message.reject, message.reject_hint) = (9, true, 10);
        (message.deprecated_priority, message.priority) = (11, -12);
        message.context = Bytes::from_static(b"context");
        message.set_snapshot(snapshot);
        let (data, context) = (Bytes::from_static(b"d"), Bytes::from_static(b"c"));
        let entry_type = raft::eraftpb::EntryType::EntryConfChangeV2;
        message.entries.push(Entry {
            entry_type,
            term: 1,
            index: 2,
            data,
            context,
            sync_log: true,
            ..Entry::default()
        });
        PeerMessage::Raft(message)
    }

    fn samples() -> Vec<PeerMessage> {
        let (id, url) = (request(9), "http://[::1]:4".to_owned());
        let name = ForwardName { term: 7, boot: u64::MAX, number: 9 };
        let forward = |data: &'static [u8]| ForwardedWrite { id, data: Bytes::from_static(data) };
        let mut all = vec![
            full(),
            append(&[b"one", b"", b"three"]),
            PeerMessage::Forward { name, writes: vec![forward(b"put"), forward(b"")] },
            PeerMessage::Forward { name: ForwardName { boot: 0, ..name }, writes: vec![] },
        ];
        for reason in
            [ForwardRefusal::NotLeader { leader: 3 }, ForwardRefusal::Dropped, ForwardRefusal::Full("é".into())]
        {
            all.push(PeerMessage::ForwardRefused { ids: vec![id, request(10)], reason });
        }
        let mut requests = vec![AdminRequest::RemoveMember { id: 3 }, AdminRequest::TransferLeader { id: 2 }];
        requests.push(AdminRequest::ReplaceMembers(vec![(1, url.clone(), true), (2, String::new(), false)]));
        for voter in [None, Some(false), Some(true)] {
            requests.push(AdminRequest::AddMember { id: 4, url: url.clone(), voter });
        }
        all.extend(requests.into_iter().map(|request| PeerMessage::AdminForward { term: 7, id, request }));
        let refusals = [
            Refusal::NoLeader,
            Refusal::Overloaded("the leader is overloaded"),
            Refusal::Stopping,
            Refusal::Full("full".into()),
            Refusal::Conflict("in use".into()),
            Refusal::Invalid(String::new()),
        ];
        let mut outcomes = vec![AdminOutcome::Done { index: 44 }, AdminOutcome::Unknown];
        outcomes.extend(refusals.map(AdminOutcome::Refused));
        all.extend(outcomes.into_iter().map(|outcome| PeerMessage::AdminAnswer { id, outcome }));
        all
    }

    fn encoded(messages: &[PeerMessage]) -> Vec<u8> {
        let mut out = Vec::new();
        messages.iter().for_each(|message| message.encode(&mut out));
        out
    }

    /// All messages of a stream, and how it ended.
    fn decoded(stream: impl Read) -> (Vec<PeerMessage>, Result<(), FrameError>) {
        let (mut reader, mut messages) = (FrameReader::new(stream), Vec::new());
        loop {
            match reader.next_batch(&mut messages) {
                Ok(true) => {}
                Ok(false) => return (messages, Ok(())),
                Err(e) => return (messages, Err(e)),
            }
        }
    }

    /// A frame with a right checksum around any payload.
    fn frame(kind: u8, payload: &[u8]) -> Vec<u8> {
        let mut out = Vec::new();
        put_u32(&mut out, payload.len() as u32 + 1);
        out.push(kind);
        out.extend_from_slice(payload);
        let checksum = crc32c::crc32c(&out);
        put_u32(&mut out, checksum);
        out
    }

    /// Gives one byte at a time, as a slow network does.
    struct Drip<'a>(&'a [u8]);

    impl Read for Drip<'_> {
        fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
            let n = out.len().min(1);
            self.0.read(&mut out[..n])
        }
    }

    #[test]
    fn every_kind_of_message_survives_the_wire() {
        for message in samples() {
            let frame = encoded(std::slice::from_ref(&message));
            assert_eq!(frame.len(), message.frame_bytes(), "{message:?}");
            assert_eq!(decoded(&frame[..]).0, [message]);
        }
        let (messages, end) = decoded(&encoded(&samples())[..]);
        assert!(end.is_ok());
        assert_eq!(messages, samples());
        assert_eq!(decoded(Drip(&encoded(&samples()))).0, samples());
    }

    #[test]
    fn what_has_arrived_together_is_one_batch() {
        let stream = encoded(&samples());
        let mut messages = Vec::new();
        assert!(FrameReader::new(&stream[..]).next_batch(&mut messages).unwrap());
        assert_eq!(messages, samples());
    }

    #[test]
    fn frames_larger_than_the_buffer_keep_their_place() {
        let large = vec![7; 3 * READ_AHEAD_BYTES];
        for filler in [0, 1, READ_AHEAD_BYTES - 60, READ_AHEAD_BYTES - 1, READ_AHEAD_BYTES] {
            let messages = [append(&[&vec![1; filler]]), append(&[&large]), append(&[b"x"]), append(&[&large, &large])];
            let (read, end) = decoded(&encoded(&messages)[..]);
            assert!(end.is_ok());
            assert!(read == messages, "filler of {filler} bytes");
        }
    }

    #[test]
    fn no_truncated_stream_ends_well_unless_between_frames() {
        for message in samples() {
            let frame = encoded(&[message]);
            for end in 1..frame.len() {
                let (messages, result) = decoded(&frame[..end]);
                assert!(messages.is_empty() && matches!(result, Err(FrameError::Io(_))), "cut at {end}: {result:?}");
            }
        }
    }

    #[test]
    fn no_flipped_bit_goes_unnoticed() {
        for message in samples() {
            let mut frame = encoded(&[message]);
            for bit in 0..8 * frame.len() {
                frame[bit / 8] ^= 1 << (bit % 8);
                let (messages, result) = decoded(&frame[..]);
                assert!(messages.is_empty() && result.is_err(), "bit {bit}");
                frame[bit / 8] ^= 1 << (bit % 8);
            }
        }
    }

    #[test]
    fn truncated_payloads_with_a_right_checksum_are_refused_too() {
        for message in samples().into_iter().filter(|m| !matches!(m, PeerMessage::Raft(_))) {
            let whole = encoded(&[message]);
            let payload = &whole[FRAME_HEADER_BYTES..whole.len() - CHECKSUM_BYTES];
            for end in 0..payload.len() {
                let (messages, result) = decoded(&frame(whole[4], &payload[..end])[..]);
                assert!(messages.is_empty() && matches!(result, Err(FrameError::Message(_))), "cut at {end}");
            }
        }
    }

    #[test]
    fn lengths_beyond_the_limit_are_refused_and_lying_ones_cost_nothing() {
        for len in [0, (FRAME_BYTES_MAX - FRAME_OVERHEAD_BYTES + 2) as u32, u32::MAX] {
            let (_, result) = decoded(&len.to_le_bytes()[..]);
            assert!(matches!(result, Err(FrameError::Length(l)) if l == len), "{len}");
        }
        /// Fails if it is asked to fill a buffer that only a believed length would explain.
        struct Wary(usize);
        impl Read for Wary {
            fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
                assert!(out.len() <= 2 * READ_AHEAD_BYTES, "a buffer of {} bytes", out.len());
                let n = out.len().min(std::mem::take(&mut self.0));
                out[..n].fill(1);
                if n >= 4 {
                    out[..4].copy_from_slice(&(FRAME_BYTES_MAX as u32 - 8).to_le_bytes());
                }
                Ok(n)
            }
        }
        for sent in [4, 5, 1000, READ_AHEAD_BYTES] {
            assert!(matches!(decoded(Wary(sent)).1, Err(FrameError::Io(_))));
        }
    }

    #[test]
    fn the_longest_frame_passes() {
        let empty = append(&[b""]).frame_bytes();
        // The lengths of the data, of its entry and of the message grow to four bytes each.
        let longest = append(&[&vec![0; FRAME_BYTES_MAX - empty - 10]]);
        assert!((FRAME_BYTES_MAX - 16..=FRAME_BYTES_MAX).contains(&longest.frame_bytes()), "{}", longest.frame_bytes());
        assert!(decoded(&encoded(std::slice::from_ref(&longest))[..]).0 == [longest]);
    }

    #[test]
    fn unknown_kinds_are_skipped_if_they_say_so() {
        let mut stream = frame(KIND_OPTIONAL, b"from the future");
        append(&[b"x"]).encode(&mut stream);
        let (mut reader, mut messages) = (FrameReader::new(&stream[..]), Vec::new());
        assert!(reader.next_batch(&mut messages).unwrap());
        assert_eq!((messages.len(), reader.skipped()), (1, 1));
        let (messages, result) = decoded(&frame(KIND_OPTIONAL - 1, b"from the future")[..]);
        assert!(messages.is_empty() && matches!(result, Err(FrameError::Message(_))));
    }

    #[test]
    fn protobuf_never_sees_what_would_blow_up() {
        let refused = |payload: &[u8]| matches!(decoded(&frame(KIND_RAFT, payload)[..]).1, Err(FrameError::Message(_)));
        assert!(refused(&[7 << 3 | 2, 0].repeat(ELEMENTS_MAX + 1)), "empty entries");
        assert!(!refused(&[7 << 3 | 2, 0].repeat(ELEMENTS_MAX)));
        assert!(refused(&[0x88, 0x02, 1]), "unknown field of the message");
        assert!(refused(&[7 << 3 | 2, 2, 7 << 3, 1]), "unknown field of an entry");
        assert!(refused(&[1 << 3, 19]), "unknown message type");
        assert!(refused(&[7 << 3 | 2, 2, 1 << 3, 3]), "unknown entry type");
        assert!(refused(&[2 << 3 | 2, 1, 0]), "wrong wire type");
        assert!(refused(&[2 << 3 | 3, 2 << 3 | 4]), "group");
        assert!(refused(&[2 << 3, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 1]), "long varint");
        let voters = [&[1 << 3 | 2, 0x81, 0x80, 0x04][..], &[1; ELEMENTS_MAX + 1]].concat();
        let nested = |field: u8, bytes: Vec<u8>| {
            let len = bytes.len() as u32;
            [&[field << 3 | 2, len as u8 | 0x80, (len >> 7) as u8 | 0x80, (len >> 14) as u8][..], &bytes].concat()
        };
        assert!(refused(&nested(9, nested(2, nested(1, voters)))), "packed voters");
    }

    proptest! {
        #[test]
        fn arbitrary_payloads_never_panic_nor_leave_unknown_fields(kind in 0_u8..8, payload: Vec<u8>) {
            for message in decoded(&frame(kind, &payload)[..]).0 {
                if let PeerMessage::Raft(message) = &message {
                    prop_assert!(message.unknown_fields.fields.is_none());
                    prop_assert!(message.entries.iter().all(|e| e.unknown_fields.fields.is_none()));
                }
                prop_assert_eq!(&decoded(&encoded(std::slice::from_ref(&message))[..]).0[0], &message);
            }
        }
    }

    #[test]
    fn long_texts_are_cut_between_characters() {
        let text = "é".repeat(TEXT_BYTES_MAX);
        let message = PeerMessage::ForwardRefused { ids: vec![], reason: ForwardRefusal::Full(format!("a{text}")) };
        let messages = decoded(&encoded(&[message])[..]).0;
        let [PeerMessage::ForwardRefused { reason: ForwardRefusal::Full(cut), .. }] = &messages[..] else {
            panic!("{messages:?}")
        };
        assert_eq!(cut.len(), TEXT_BYTES_MAX - 1);
    }

    #[test]
    fn what_a_receiver_would_refuse_is_not_within_limits() {
        assert!(samples().iter().all(PeerMessage::is_within_limits));
        let too_long = vec![0; FRAME_BYTES_MAX];
        let long_url = AdminRequest::AddMember { id: 4, url: "h".repeat(URL_BYTES_MAX + 1), voter: None };
        for message in [
            append(&[&too_long]),
            append(&vec![&b""[..]; ELEMENTS_MAX]),
            PeerMessage::Forward {
                name: ForwardName::default(),
                writes: vec![ForwardedWrite { id: request(1), data: too_long.into() }],
            },
            PeerMessage::AdminForward { term: 7, id: request(1), request: long_url },
        ] {
            assert!(!message.is_within_limits());
        }
    }

    #[test]
    fn a_cause_is_logged_once_until_all_is_well() {
        let mut causes = LoggedCauses::default();
        assert!(causes.is_new("refused") && causes.is_new("timed out"));
        assert!(!causes.is_new("refused"));
        assert!(causes.clear() && !causes.clear());
        assert!(causes.is_new("refused"));
        assert!((0..1000).filter(|i| causes.is_new(&i.to_string())).count() < LOGGED_CAUSES_MAX);
    }

    fn identity(id: NodeId, cluster: Option<[u8; 16]>) -> NodeIdentity {
        let url = format!("http://127.0.0.1:{id}");
        let earlier_boots = Arc::new([u64::MAX; crate::data_dir::EARLIER_BOOTS_MAX]);
        NodeIdentity {
            cluster: cluster.map(ClusterId),
            id,
            directory: u128::MAX - 1,
            boot: u64::MAX,
            earlier_boots,
            url,
        }
    }

    #[test]
    fn hellos_survive_json_and_leave_room_for_newer_fields() {
        let position = LogPosition::default();
        position.set(3, 4);
        for cluster in [None, Some([0xab; 16])] {
            let hello = Hello::new(&identity(1, cluster), 2, &position);
            let json = hello.to_json();
            assert!(json.bytes().all(|b| (b' '..=b'~').contains(&b)), "{json}");
            assert_eq!(Hello::from_json(json.as_bytes()), Ok(hello.clone()));
            let newer = json.replacen('{', "{\"zone\":\"b\",", 1);
            assert_eq!(Hello::from_json(newer.as_bytes()), Ok(hello));
        }
        for members in [None, Some(vec![]), Some(vec![0, 255, 16])] {
            let answer = HelloAnswer { protocol: 1, cluster: None, id: 3, directory: 5, boot: 6, members };
            assert_eq!(serde_json::from_str::<HelloAnswer>(&serde_json::to_string(&answer).unwrap()).unwrap(), answer);
        }
        for bad in ["", "{}", "[]", "\"from\""] {
            assert_eq!(Hello::from_json(bad.as_bytes()).unwrap_err().status(), 400);
        }
        assert_eq!(Hello::from_json(&[b' '; HELLO_BYTES_MAX + 1]).unwrap_err().status(), 400);
    }

    #[test]
    fn a_hello_finds_out_every_mismatch() {
        let (ours, theirs) = (Some([1; 16]), Some([2; 16]));
        let me = identity(2, ours);
        let hello = Hello::new(&identity(1, ours), 2, &LogPosition::default());
        assert_eq!(hello.check(&me), Ok(PROTOCOL_VERSION));
        assert_eq!(Hello { to: 0, ..hello.clone() }.check(&me), Ok(PROTOCOL_VERSION));
        assert_eq!(Hello { cluster: None, ..hello.clone() }.check(&me), Ok(PROTOCOL_VERSION));
        assert_eq!(Hello { protocol_max: 99, ..hello.clone() }.check(&me), Ok(PROTOCOL_VERSION));
        let status = |hello: Hello| hello.check(&me).unwrap_err().status();
        assert_eq!(status(Hello { cluster: theirs.map(ClusterId), ..hello.clone() }), 412);
        assert_eq!(status(Hello { to: 3, ..hello.clone() }), 421);
        assert_eq!(status(Hello { protocol_min: 98, protocol_max: 99, ..hello.clone() }), 406);
        assert_eq!(status(Hello { protocol_min: 0, protocol_max: 0, ..hello }), 406);
    }

    #[test]
    fn refusals_survive_json() {
        for refusal in [
            HelloRefusal::OtherCluster { ours: ClusterId([0x0f; 16]) },
            HelloRefusal::WrongId { ours: 3 },
            HelloRefusal::Removed,
            HelloRefusal::OtherDirectory,
            HelloRefusal::OlderCopy,
            HelloRefusal::NoCommonProtocol { min: 1, max: 2 },
            HelloRefusal::Malformed("no".into()),
            HelloRefusal::NotReady("starting".into()),
        ] {
            assert_eq!(HelloRefusal::from_json(refusal.to_json().as_bytes()), Some(refusal));
        }
        assert_eq!(HelloRefusal::from_json(b"<html>"), None);
        let header = SnapshotHeader { index: 1, term: 2, leader_term: 3, bytes: u64::MAX };
        assert_eq!(SnapshotHeader::from_json(header.to_json().as_bytes()), Ok(header));
    }
}
