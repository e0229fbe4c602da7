//! What crosses between the client side and the node: requests, their answers, and the node's description.

use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use crossbeam_channel::Sender;

use crate::http::Caller;
use crate::membership::{Membership, NodeId};
use crate::store::{Outcome, Version};
use crate::watch::Watchers;

/// Why a request was refused: it was not applied and never will be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// No leader, or no quorum, within the deadline. 503.
    NoLeader,
    /// A named limit is reached. 503.
    Overloaded(&'static str),
    /// The node is shutting down. 503.
    Stopping,
    /// The store or the disk is full. 507.
    Full(String),
    /// The change contradicts the membership as it is. 409.
    Conflict(String),
    /// The request makes no sense, whatever the state. 400.
    Invalid(String),
}

impl Refusal {
    /// Of a stale read that finds no version as new as what this node has answered, and gets none.
    pub const APPLIER_STUCK: Refusal = Refusal::Overloaded("the applier does not answer");
}

/// How a write ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum WriteReply {
    /// Committed and applied on this node.
    Applied(Outcome),
    /// Surely not applied, now or later.
    NotApplied(Refusal),
    /// Handed to Raft, and not seen applied: it may still take effect. 504. The text says what is known.
    Unknown(&'static str),
}

/// What a client that waits is sent.
pub enum Reply {
    /// To a write.
    Write(WriteReply),
    /// To a request that changes the cluster.
    Admin(AdminReply),
    /// To a read: the version that holds everything the read must see.
    Read(Result<Arc<Version>, Refusal>),
}

/// Where the reply to a request goes.
pub enum ReplyTo {
    /// To a thread that waits for it, in a queue with room for this one.
    Thread(Sender<Reply>),
    /// To a connection of an event loop.
    Loop(Caller<Reply>),
}

impl ReplyTo {
    /// Sends the reply. Whoever waited may have given up.
    pub fn send(self, reply: Reply) {
        match self {
            ReplyTo::Thread(waiter) => drop(waiter.try_send(reply)),
            ReplyTo::Loop(caller) => caller.reply(reply),
        }
    }

    /// Sends the reply; an event loop sees it when it is woken, which is for the caller to do, once for many replies.
    pub fn put(self, reply: Reply) {
        match self {
            ReplyTo::Thread(waiter) => drop(waiter.try_send(reply)),
            ReplyTo::Loop(caller) => caller.put(reply),
        }
    }
}

/// What a client asks the driver for.
pub enum Ask {
    /// To replicate this encoded command.
    Write(Bytes),
    /// For a version that holds all that was committed when the request came.
    Read,
    /// For a version that holds all that is applied here.
    StaleRead,
}

/// A write or a read on its way to the driver.
pub struct ClientRequest {
    /// What is asked.
    pub ask: Ask,
    /// When the client gives up.
    pub deadline: Instant,
    /// Who waits.
    pub reply: ReplyTo,
}

impl ClientRequest {
    /// Answers that it was refused: nothing was done about it.
    pub fn refuse(self, refusal: Refusal) {
        let reply = match self.ask {
            Ask::Write(_) => Reply::Write(WriteReply::NotApplied(refusal)),
            Ask::Read | Ask::StaleRead => Reply::Read(Err(refusal)),
        };
        self.reply.send(reply);
    }
}

/// How long a client's request is waited for past its deadline: the driver looks at deadlines once a tick, and a slow disk
/// may hold it up.
pub const ANSWER_GRACE: Duration = Duration::from_secs(2);

/// How long a stale read waits for the applier to give it a version; then it is refused.
pub const STALE_READ_TIMEOUT: Duration = Duration::from_secs(1);

/// A change of the membership or of the leadership.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum AdminRequest {
    /// Adds a member (or promotes a learner).
    AddMember {
        /// The new member.
        id: NodeId,
        /// Its peer URL, normalized.
        url: String,
        /// `None`: enters as learner and is promoted when caught up. `Some(false)`: stays a learner. `Some(true)`: promotes one.
        voter: Option<bool>,
    },
    /// Removes a member.
    RemoveMember {
        /// The member.
        id: NodeId,
    },
    /// Moves to exactly this set of members: id, URL, whether it votes.
    ReplaceMembers(Vec<(NodeId, String, bool)>),
    /// Hands leadership to a member.
    TransferLeader {
        /// The next leader.
        id: NodeId,
    },
}

/// How an admin request ended.
#[derive(Clone, Debug, PartialEq)]
pub enum AdminReply {
    /// Done and applied on this node; the membership after it.
    Done(Arc<Membership>),
    /// Surely not done.
    Refused(Refusal),
    /// It may still take effect.
    Unknown(&'static str),
}

/// A snapshot that is on disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SnapshotInfo {
    /// The applied index it holds.
    pub index: u64,
    /// The size of its file in bytes.
    pub bytes: u64,
}

/// What a node says of itself.
#[derive(Clone, Debug)]
pub struct Status {
    /// This node.
    pub id: NodeId,
    /// `leader`, `follower`, `candidate`, `pre-candidate` or `learner`.
    pub role: &'static str,
    /// The leader this node follows; 0 if it knows none.
    pub leader: NodeId,
    /// Raft's current term.
    pub term: u64,
    /// The highest index known to be committed.
    pub commit_index: u64,
    /// The first index that is still in the log.
    pub first_index: u64,
    /// The last index in the log.
    pub last_index: u64,
    /// The index of the newest snapshot.
    pub snapshot_index: u64,
    /// The membership as this node has applied it.
    pub membership: Arc<Membership>,
    /// On the leader: what it knows of each member.
    pub progress: Vec<MemberProgress>,
    /// On the leader: what it does at present for a request to change the cluster.
    pub change: Option<String>,
}

/// What a leader knows of a member.
#[derive(Clone, Debug)]
pub struct MemberProgress {
    /// The member.
    pub id: NodeId,
    /// The highest index known to be in its log.
    pub match_index: u64,
    /// How long ago it was last heard from; `None` if never in this term.
    pub last_contact: Option<Duration>,
    /// A snapshot is on its way to it, or is about to be sent again.
    pub snapshot: bool,
    /// How far that has come, while it is being sent.
    pub transfer: Option<Transfer>,
}

/// A snapshot that is being sent to a member.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Transfer {
    /// The applied index it holds.
    pub index: u64,
    /// How many bytes have been handed to the network.
    pub sent: u64,
    /// The size of its file in bytes.
    pub bytes: u64,
}

/// The node as the client API sees it. The real one sends events to the driver; tests of the API use a small fake.
pub trait Backend: Send + Sync + 'static {
    /// Lives with one connection and is used by its thread only: the place for a reply channel that is used again and again.
    type Session: Send;

    /// A session for a new connection.
    fn session(&self) -> Self::Session;

    /// Takes in requests of an event loop, and empties the list; each gets a [`Reply`] by its [`ReplyTo`], at the latest
    /// a while after its deadline, unless the node is stuck. Does not wait.
    fn submit(&self, requests: &mut Vec<ClientRequest>);

    /// Replicates an encoded command, and waits until it is applied here or `deadline` has passed.
    fn write(&self, session: &mut Self::Session, command: Bytes, deadline: Instant) -> WriteReply;

    /// Waits for a confirmed read index to be applied here, and returns a version at least as new.
    fn read(&self, session: &mut Self::Session, deadline: Instant) -> Result<Arc<Version>, Refusal>;

    /// This node's own newest version, asking no other node. May wait [`STALE_READ_TIMEOUT`] for the applier.
    fn stale(&self) -> Result<Arc<Version>, Refusal>;

    /// The same without waiting; `None` if the applier has to be asked, by [`Ask::StaleRead`].
    fn newest(&self) -> Option<Arc<Version>>;

    /// The index of the last entry that is applied here, and how many keys there are.
    fn applied(&self) -> (u64, u64);

    /// What the node says of itself; waits for the driver, never for other nodes.
    fn status(&self, deadline: Instant) -> Result<Status, Refusal>;

    /// `Err` names the thread that has made no progress for 10 seconds.
    fn live(&self) -> Result<(), &'static str>;

    /// Changes the membership or the leadership and waits for the result.
    fn admin(&self, request: AdminRequest, deadline: Instant) -> AdminReply;

    /// Takes a snapshot and waits until it is on disk.
    fn snapshot(&self, deadline: Instant) -> Result<SnapshotInfo, Refusal>;

    /// Those who wait for changes on this node. Whoever publishes a version wakes them.
    fn watchers(&self) -> &Watchers;

    /// How long this process has run.
    fn uptime(&self) -> Duration;
}
