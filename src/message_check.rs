//! What a Raft message must look like before it may reach raft.
//!
//! The raft crate trusts its peers: many messages that no correct member sends make it panic, commit what is not
//! committed, or count a term up until it wraps. [`check`] stands in front of `RawNode::step` and refuses them. It
//! looks at a message and at a [`View`] of this node's own state, changes nothing, and never panics.
//!
//! It holds both ways: **nothing that passes makes raft panic**, whatever came before it, and **nothing that a correct
//! member sends is refused** for good, however late, often or out of order it arrives. So rules about the log hold
//! only for messages of a term that raft will act on; a late message of an older term may contradict the log that has
//! been replaced since, and raft ignores it.
//!
//! # Senders that this node does not know
//!
//! The transport has checked the cluster's id and the sender's. The membership here can lag behind the cluster's: the
//! next leader may be a member whose admission this node has not applied yet, and the node must vote for it and follow
//! it, or a cluster could wait for ever. On the other hand nobody unknown should depose a leader that works. So a
//! *stranger* gets what raft itself gives an ordinary candidate: nothing while this node leads, or hears from its
//! leader, and everything once an election timeout has passed without one. A new leader that is a stranger here is
//! followed after at most that time: the old one falls by its own quorum check, or by an answer from a member it does
//! know. What shortens an election timeout (`MsgTimeoutNow`, a vote for a leader transfer) is not taken from strangers
//! at all; that delays a hand-over, and never an election. A node without any membership, one that joins, knows nobody
//! and has no strangers.
//!
//! Raft has no defence against members that lie about what they hold or have committed, and this is none.

use std::fmt;

use protobuf::Message as _;
use raft::eraftpb::{ConfChangeV2, ConfState, Entry, EntryType, Message, MessageType};
use raft::{CAMPAIGN_TRANSFER, INVALID_ID, Raft, StateRole, Storage};

use crate::membership::{Membership, NodeId};

/// Terms that a message may be ahead of ours. Real terms rise with elections, so a node that is this far behind was
/// away for centuries; the limit keeps one message from using up the terms there are.
pub const TERM_LEAP_MAX: u64 = 1 << 32;

/// The highest term and index in any message: raft adds to both, and in a release build of its own would wrap.
pub const NUMBER_MAX: u64 = u64::MAX / 2;

/// Data and context of one entry in bytes: the largest value, key and conditions that a client can send.
pub const ENTRY_BYTES_MAX: usize = 17 << 20;

/// A message's context in bytes: the name of a read round, or of a kind of campaign.
pub const CONTEXT_BYTES_MAX: usize = 256;

/// Ids in one list of a snapshot's configuration: raft's restore takes time with their square.
pub const CONF_STATE_IDS_MAX: usize = 256;

/// What the check needs to know of this node.
pub struct View<'a> {
    /// This node.
    pub id: NodeId,
    /// Its role.
    pub role: StateRole,
    /// Its term.
    pub term: u64,
    /// The leader it follows in this term, itself included; 0 if it knows none.
    pub leader: NodeId,
    /// Whether it leads, or has heard from its leader within an election timeout.
    pub hears_leader: bool,
    /// The last index of its log, persisted or not.
    pub last_index: u64,
    /// The highest persisted index that is still part of its log.
    pub persisted: u64,
    /// The highest index it knows to be committed.
    pub commit: u64,
    /// The membership as it has applied it.
    pub membership: &'a Membership,
    /// The term of an index of its log; `None` where it has no entry, or none any more.
    pub term_of: &'a dyn Fn(u64) -> Option<u64>,
}

impl<'a> View<'a> {
    /// The view of a node with this `raft` and `membership`. `term_of` asks raft's log, see [`term_of`]; it is passed
    /// in because a view only borrows it.
    pub fn of<S: Storage>(raft: &Raft<S>, membership: &'a Membership, term_of: &'a dyn Fn(u64) -> Option<u64>) -> Self {
        View {
            id: raft.id,
            role: raft.state,
            term: raft.term,
            leader: raft.leader_id,
            // The rule by which raft ignores votes, see its `Raft::step`.
            hears_leader: raft.leader_id != INVALID_ID && raft.election_elapsed < raft.election_timeout(),
            last_index: raft.raft_log.last_index(),
            persisted: raft.raft_log.persisted,
            commit: raft.raft_log.committed,
            membership,
            term_of,
        }
    }

    fn leads(&self) -> bool {
        self.role == StateRole::Leader
    }

    fn is_only_voter(&self) -> bool {
        let ConfState { voters, voters_outgoing, .. } = &self.membership.conf_state;
        voters.iter().chain(voters_outgoing).all(|voter| *voter == self.id)
    }

    /// Whether `id` has no place in the membership as it is here, during a joint change in neither half of it.
    fn is_stranger(&self, id: NodeId) -> bool {
        let Membership { members, conf_state, .. } = self.membership;
        let ConfState { voters, learners, voters_outgoing, learners_next, .. } = conf_state;
        !members.is_empty()
            && !members.contains_key(&id)
            && ![voters, learners, voters_outgoing, learners_next].iter().any(|ids| ids.contains(&id))
    }
}

/// The term of `index` in raft's log, in the form that [`View::term_of`] wants: raft itself answers 0 for what it has
/// not got.
pub fn term_of<S: Storage>(raft: &Raft<S>, index: u64) -> Option<u64> {
    raft.raft_log.term(index).ok().filter(|&term| term != 0)
}

/// Why a message was not stepped. The sender is at fault unless the variant says otherwise; the message is dropped,
/// counted and logged. Only [`Offence::LostLog`] is about this node, and ends it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Offence {
    /// It is for another node.
    To(NodeId),
    /// It says to come from nobody, or from this node.
    From(NodeId),
    /// It comes from a node that was removed. Ordinary for a while after a removal.
    Removed(NodeId),
    /// It comes from a node that is not a member as far as is known here, and may not do this, or not now. Ordinary
    /// when this node has not yet applied the sender's admission; it may do so later.
    Stranger(NodeId),
    /// Messages of this type never travel between nodes.
    Type(MessageType),
    /// It has fields that this version does not know.
    UnknownFields,
    /// Its term is zero where it may not be, not zero where it must be, or absurdly high.
    Term(u64),
    /// A number, a list or a context in it is impossible.
    Malformed(&'static str),
    /// It comes from a leader, but of this term another leader is known.
    SecondLeader {
        /// The term.
        term: u64,
        /// The leader that is known here.
        known: NodeId,
        /// The sender.
        other: NodeId,
    },
    /// An entry, or a snapshot, differs from what is committed at its index.
    ContradictsCommitted {
        /// The index.
        index: u64,
        /// The committed entry's term.
        ours: u64,
        /// The message's.
        theirs: u64,
    },
    /// It answers for entries that this leader does not have.
    BeyondLog {
        /// The index.
        index: u64,
        /// This node's last index.
        last_index: u64,
    },
    /// It answers or follows something that this node can't have said yet.
    TooEarly,
    /// A stranger says that entries are committed which are not here. Said by a member, it would be a
    /// [`Offence::LostLog`].
    CommitBeyondLog {
        /// The sender.
        from: NodeId,
        /// The index it says is committed.
        commit: u64,
        /// This node's last index.
        last_index: u64,
    },
    /// The leader says that an index is committed which this node acknowledged and no longer has: a leader sends in
    /// its heartbeats at most the index up to which it knows the receiver's log to match. This node has lost what it
    /// promised to keep, and must stop: with its vote and its acknowledgements others would lose it too.
    LostLog {
        /// The leader.
        from: NodeId,
        /// The index it says is committed.
        commit: u64,
        /// This node's last index.
        last_index: u64,
    },
}

impl Offence {
    /// All names that [`Offence::kind`] gives.
    pub const KINDS: [&str; 14] = [
        "to",
        "from",
        "removed",
        "stranger",
        "type",
        "unknown-fields",
        "term",
        "malformed",
        "second-leader",
        "contradicts-committed",
        "beyond-log",
        "too-early",
        "commit-beyond-log",
        "lost-log",
    ];

    /// A name for counting.
    pub fn kind(&self) -> &'static str {
        match self {
            Offence::To(_) => "to",
            Offence::From(_) => "from",
            Offence::Removed(_) => "removed",
            Offence::Stranger(_) => "stranger",
            Offence::Type(_) => "type",
            Offence::UnknownFields => "unknown-fields",
            Offence::Term(_) => "term",
            Offence::Malformed(_) => "malformed",
            Offence::SecondLeader { .. } => "second-leader",
            Offence::ContradictsCommitted { .. } => "contradicts-committed",
            Offence::BeyondLog { .. } => "beyond-log",
            Offence::TooEarly => "too-early",
            Offence::CommitBeyondLog { .. } => "commit-beyond-log",
            Offence::LostLog { .. } => "lost-log",
        }
    }
}

impl fmt::Display for Offence {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Offence::To(to) => write!(f, "it is for node {to}"),
            Offence::From(from) => write!(f, "it says to come from {from}"),
            Offence::Removed(from) => write!(f, "member {from} was removed"),
            Offence::Stranger(from) => write!(f, "{from} is not a member as far as this node knows"),
            Offence::Type(kind) => write!(f, "a {kind:?} never travels between nodes"),
            Offence::UnknownFields => write!(f, "it has fields that this version does not know"),
            Offence::Term(term) => write!(f, "its term {term} is impossible"),
            Offence::Malformed(what) => write!(f, "{what}"),
            Offence::SecondLeader { term, known, other } => {
                write!(f, "{other} says to lead in term {term}, but its leader is {known}")
            }
            Offence::ContradictsCommitted { index, ours, theirs } => {
                write!(f, "its entry {index} is of term {theirs}, and the committed one of term {ours}")
            }
            Offence::BeyondLog { index, last_index } => {
                write!(f, "it acknowledges index {index}, and the log here ends at {last_index}")
            }
            Offence::TooEarly => write!(f, "it answers what this node has not sent yet"),
            Offence::CommitBeyondLog { from, commit, last_index } | Offence::LostLog { from, commit, last_index } => {
                write!(f, "{from} says that index {commit} is committed here, and the log here ends at {last_index}")
            }
        }
    }
}

/// Decides whether `message` may be stepped into the raft that `view` shows.
///
/// The view must be of this very moment: what an earlier message of the same batch has changed counts.
pub fn check(message: &Message, view: &View<'_>) -> Result<(), Offence> {
    let check_type: fn(&Message, &View<'_>) -> Result<(), Offence> = match message.msg_type {
        MessageType::MsgAppend => check_append,
        MessageType::MsgHeartbeat => check_heartbeat,
        MessageType::MsgSnapshot => check_snapshot,
        MessageType::MsgAppendResponse => check_append_response,
        // Raft takes from it a context, looked up among those it has sent, and a commit index that is for show.
        // `RawNode::step` itself drops this and the other responses if they come from a stranger.
        MessageType::MsgHeartbeatResponse => |_, _| Ok(()),
        MessageType::MsgRequestVote | MessageType::MsgRequestPreVote => check_vote_request,
        MessageType::MsgRequestVoteResponse | MessageType::MsgRequestPreVoteResponse => check_vote_response,
        MessageType::MsgTimeoutNow => check_timeout_now,
        MessageType::MsgReadIndex => check_read_index,
        MessageType::MsgReadIndexResp => check_read_index_response,
        // The first five are raft's notes to itself. Proposals travel as messages of our own, which tell what became
        // of them, and a transfer of leadership is asked for at the leader.
        MessageType::MsgHup
        | MessageType::MsgBeat
        | MessageType::MsgUnreachable
        | MessageType::MsgSnapStatus
        | MessageType::MsgCheckQuorum
        | MessageType::MsgPropose
        | MessageType::MsgTransferLeader => return Err(Offence::Type(message.msg_type)),
    };
    check_envelope(message, view)?;
    check_numbers(message, view)?;
    check_type(message, view)
}

/// What holds for every type: who sent it to whom.
fn check_envelope(message: &Message, view: &View<'_>) -> Result<(), Offence> {
    if message.to != view.id {
        return Err(Offence::To(message.to));
    }
    if message.from == INVALID_ID || message.from == view.id {
        return Err(Offence::From(message.from));
    }
    if view.membership.removed.contains(&message.from) {
        return Err(Offence::Removed(message.from));
    }
    let has_unknown_fields = has_unknown_fields(message)
        || message.entries.iter().any(has_unknown_fields)
        || message.snapshot.as_ref().is_some_and(|snapshot| {
            let metadata = snapshot.get_metadata();
            has_unknown_fields(snapshot)
                || has_unknown_fields(metadata)
                || has_unknown_fields(metadata.get_conf_state())
        });
    if has_unknown_fields { Err(Offence::UnknownFields) } else { Ok(()) }
}

/// What holds for every type: numbers that raft can add to, and a term that it can tell from a local message's.
fn check_numbers(message: &Message, view: &View<'_>) -> Result<(), Offence> {
    let term = message.term;
    // `MsgReadIndex` has none, so that a read outlives the term it was asked in. In all others, raft takes a zero for
    // a message of its own, and panics when it sends the answer.
    if (term == 0) != (message.msg_type == MessageType::MsgReadIndex) {
        return Err(Offence::Term(term));
    }
    // A term near the end wraps to 0 in a later election.
    if term > view.term.saturating_add(TERM_LEAP_MAX) || term > NUMBER_MAX {
        return Err(Offence::Term(term));
    }
    let Message { log_term, index, commit, commit_term, reject_hint, .. } = *message;
    if [log_term, index, commit, commit_term, reject_hint].iter().any(|&number| number > NUMBER_MAX) {
        return Err(Offence::Malformed("an index or a term in it is impossibly high"));
    }
    if term != 0 && log_term.max(commit_term) > term {
        return Err(Offence::Malformed("it speaks of entries of a later term than its own"));
    }
    if message.context.len() > CONTEXT_BYTES_MAX {
        return Err(Offence::Malformed("its context is too long"));
    }
    // No node asks for a snapshot by itself or has a priority: with either, raft takes paths that nothing else takes.
    if message.request_snapshot != 0 || message.priority != 0 || message.deprecated_priority != 0 {
        return Err(Offence::Malformed("it asks for what no node of this cluster uses"));
    }
    Ok(())
}

/// What only a leader sends: there is one in each term, and it may have to wait until this node is ready for it.
fn check_leader(message: &Message, view: &View<'_>) -> Result<(), Offence> {
    if message.term == view.term && view.leader != INVALID_ID && view.leader != message.from {
        return Err(Offence::SecondLeader { term: message.term, known: view.leader, other: message.from });
    }
    if message.term > view.term && view.hears_leader && view.is_stranger(message.from) {
        return Err(Offence::Stranger(message.from));
    }
    Ok(())
}

fn check_append(message: &Message, view: &View<'_>) -> Result<(), Offence> {
    check_leader(message, view)?;
    // Of an index that its log has not got, raft says that its term is 0: a zero would match there, and the commit
    // index would run ahead of the log.
    if (message.log_term == 0) != (message.index == 0) {
        return Err(Offence::Malformed("its entries follow no possible entry"));
    }
    let (mut index, mut term) = (message.index, message.log_term.max(1));
    for entry in message.entries.iter() {
        // With a hole raft would take each entry for another one's.
        if entry.index != index + 1 {
            return Err(Offence::Malformed("its entries are not contiguous"));
        }
        if entry.term < term || entry.term > message.term {
            return Err(Offence::Malformed("its entries' terms are not in order"));
        }
        check_entry(entry)?;
        (index, term) = (entry.index, entry.term);
    }
    if index > NUMBER_MAX {
        return Err(Offence::Malformed("an index or a term in it is impossibly high"));
    }
    check_committed(message.index, message.log_term, message, view)?;
    message.entries.iter().try_for_each(|entry| check_committed(entry.index, entry.term, message, view))
}

fn check_entry(entry: &Entry) -> Result<(), Offence> {
    if entry.data.len() + entry.context.len() > ENTRY_BYTES_MAX {
        return Err(Offence::Malformed("an entry is too long"));
    }
    match entry.entry_type {
        EntryType::EntryNormal => Ok(()),
        EntryType::EntryConfChange => Err(Offence::Malformed("an entry is of a type that no node proposes")),
        // Once committed, every node must be able to read it.
        EntryType::EntryConfChangeV2 => {
            let readable = ConfChangeV2::parse_from_carllerche_bytes(&entry.data)
                .is_ok_and(|change| !has_unknown_fields(&change) && !change.changes.iter().any(has_unknown_fields));
            if readable { Ok(()) } else { Err(Offence::Malformed("a configuration change in it can't be read")) }
        }
    }
}

/// The leader of this or a later term has every entry that is committed (Raft's leader completeness), so what it sends
/// is the same up to there. What it sends may be older than our commit index: then it arrives late, or twice.
fn check_committed(index: u64, term: u64, message: &Message, view: &View<'_>) -> Result<(), Offence> {
    if index > view.commit || message.term < view.term {
        return Ok(());
    }
    match (view.term_of)(index) {
        Some(ours) if ours != term => Err(Offence::ContradictsCommitted { index, ours, theirs: term }),
        _ => Ok(()),
    }
}

fn check_heartbeat(message: &Message, view: &View<'_>) -> Result<(), Offence> {
    check_leader(message, view)?;
    let (from, commit, last_index) = (message.from, message.commit, view.last_index);
    if commit <= last_index || message.term < view.term {
        Ok(())
    } else if view.is_stranger(from) {
        Err(Offence::CommitBeyondLog { from, commit, last_index })
    } else {
        Err(Offence::LostLog { from, commit, last_index })
    }
}

fn check_snapshot(message: &Message, view: &View<'_>) -> Result<(), Offence> {
    check_leader(message, view)?;
    let metadata = message.get_snapshot().get_metadata();
    let (index, term) = (metadata.index, metadata.term);
    if index == 0 || index > NUMBER_MAX || term == 0 || term > message.term {
        return Err(Offence::Malformed("its snapshot is of no possible entry"));
    }
    check_conf_state(metadata.get_conf_state(), view.id)?;
    // A snapshot behind the commit index is one that comes late. One *at* it, of another term, raft would install.
    check_committed(index, term, message, view)
}

/// Raft rebuilds its configuration from this, and panics if the result reads differently.
fn check_conf_state(conf_state: &ConfState, id: NodeId) -> Result<(), Offence> {
    let ConfState { voters, learners, voters_outgoing, learners_next, auto_leave, .. } = conf_state;
    for ids in [voters, learners, voters_outgoing, learners_next] {
        if ids.len() > CONF_STATE_IDS_MAX {
            return Err(Offence::Malformed("its configuration is too large"));
        }
        let is_repeated = |(position, other)| ids[..position].contains(other);
        if ids.contains(&INVALID_ID) || ids.iter().enumerate().any(is_repeated) {
            return Err(Offence::Malformed("its configuration lists an id twice, or the id 0"));
        }
    }
    let overlap = |left: &[u64], right: &[u64]| left.iter().any(|id| right.contains(id));
    let is_joint = !voters_outgoing.is_empty();
    let is_possible = !voters.is_empty()
        && !overlap(learners, voters)
        && !overlap(learners, voters_outgoing)
        && !overlap(learners_next, voters)
        && !overlap(learners_next, learners)
        && learners_next.iter().all(|id| voters_outgoing.contains(id))
        && (is_joint || !auto_leave);
    if !is_possible {
        return Err(Offence::Malformed("its configuration is impossible"));
    }
    // The sender has looked; raft ignores it otherwise.
    if [voters, learners, voters_outgoing].iter().any(|ids| ids.contains(&id)) {
        Ok(())
    } else {
        Err(Offence::Malformed("its configuration does not contain this node"))
    }
}

fn check_append_response(message: &Message, view: &View<'_>) -> Result<(), Offence> {
    // Only a leader makes use of it, and in its own term it loses no entry. In any other role the log may have been
    // cut meanwhile, by a new leader or, where it was not synced, by a crash.
    if !view.leads() || message.term != view.term {
        return Ok(());
    }
    let last_index = view.last_index;
    let index = message.index.max(if message.reject { message.reject_hint } else { 0 });
    if index > last_index { Err(Offence::BeyondLog { index, last_index }) } else { Ok(()) }
}

fn check_vote_request(message: &Message, view: &View<'_>) -> Result<(), Offence> {
    let Message { index, log_term, commit, commit_term, .. } = *message;
    // A candidate campaigns in a new term, in which there are no entries yet, and commits no more than it has.
    if (index == 0) != (log_term == 0) || log_term >= message.term || commit > index || commit_term > log_term {
        return Err(Offence::Malformed("it describes no possible log"));
    }
    let for_transfer = message.context[..] == *CAMPAIGN_TRANSFER;
    if !message.context.is_empty() && !for_transfer {
        return Err(Offence::Malformed("it is for an unknown kind of campaign"));
    }
    // Without this context raft ignores the request for as long as it hears from a leader, whoever asks.
    if for_transfer && view.is_stranger(message.from) { Err(Offence::Stranger(message.from)) } else { Ok(()) }
}

fn check_vote_response(message: &Message, view: &View<'_>) -> Result<(), Offence> {
    if message.reject {
        return Ok(());
    }
    // Granted is what was asked for: a vote in our term, a pre-vote in the next; less, if the answer comes late.
    let is_pre_vote = message.msg_type == MessageType::MsgRequestPreVoteResponse;
    let term_max = if is_pre_vote { view.term + 1 } else { view.term };
    if message.term > term_max {
        return Err(Offence::TooEarly);
    }
    // Our request leaves when everything is persisted, and a candidate's log does not change. Raft panics when it is
    // elected with less.
    let counts = matches!(view.role, StateRole::Candidate | StateRole::PreCandidate) && message.term >= view.term;
    if counts && view.persisted < view.last_index { Err(Offence::TooEarly) } else { Ok(()) }
}

/// The leader sends it when our log is complete, which it knows from an answer of ours in its term. Entries that it
/// appended since may be here already; raft panics over them only where nobody else has to vote.
fn check_timeout_now(message: &Message, view: &View<'_>) -> Result<(), Offence> {
    if view.is_stranger(message.from) {
        return Err(Offence::Stranger(message.from));
    }
    let elects_itself = message.term == view.term && view.is_only_voter() && view.persisted < view.last_index;
    if message.term > view.term || elects_itself { Err(Offence::TooEarly) } else { Ok(()) }
}

fn check_read_index(message: &Message, view: &View<'_>) -> Result<(), Offence> {
    check_read_entry(message)?;
    // A follower passes it on to the leader it knows: the sender's may be an old one.
    if view.leads() && view.is_stranger(message.from) { Err(Offence::Stranger(message.from)) } else { Ok(()) }
}

/// Comes from the leader that a read was sent to. Its index may well be beyond this node's log, which then follows;
/// raft also takes it for the commit index, if its own entry there is of the same term.
fn check_read_index_response(message: &Message, view: &View<'_>) -> Result<(), Offence> {
    check_leader(message, view)?;
    check_read_entry(message)?;
    if view.leader != message.from && view.is_stranger(message.from) {
        return Err(Offence::Stranger(message.from));
    }
    if message.index == 0 { Err(Offence::Malformed("it answers with no index")) } else { Ok(()) }
}

/// Raft keeps a read's context as the data of its only entry, and looks there without asking.
fn check_read_entry(message: &Message) -> Result<(), Offence> {
    match message.get_entries() {
        [entry] if !entry.data.is_empty() && entry.data.len() <= CONTEXT_BYTES_MAX => Ok(()),
        _ => Err(Offence::Malformed("it does not carry exactly one context")),
    }
}

fn has_unknown_fields(message: &impl protobuf::Message) -> bool {
    message.get_unknown_fields().fields.as_ref().is_some_and(|fields| !fields.is_empty())
}

#[cfg(test)]
mod tests;
