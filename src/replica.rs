//! What a node does with its requests, above Raft and below threads.
//!
//! [`Replica`] is driven by calls and acts through a [`Host`]: the driver thread is one, the simulator another. Its
//! time is the [`Duration`] since the node started, told by every tick.
//!
//! **Writes.** The node that takes a write names it with a [`RequestId`] and keeps it until its entry is handed out or
//! its deadline has passed. The leader proposes it; any other node forwards it to the leader with a message of our
//! own, because raft's silent forwarding tells nobody what became of it. When the leader or the term changes,
//! everything that is still waiting is handed over again under the same name: the state machine applies a name once.
//! So a write in flight when the leader dies is answered after one election.
//!
//! **Honest ends.** A write that was never handed over when its deadline comes was surely not applied. From the first
//! hand-over on some log may hold it, whatever a peer says later, so its end is unknown until it is seen applied. There
//! is one exception: handed over once, to a leader that says that it is full, a write is in no log and will be in none.
//! For a forward is for the leader of one term, who takes those of one origin only in their order: a second copy of it,
//! or one that has been under way for long, is taken by nobody.
//!
//! **Full.** While the store or the disk is full ([`Replica::set_full`]), a PUT is refused where its client enters, and
//! by the leader if another node forwards it. Everything else goes on: a DELETE is how room is made.
//!
//! **Reads** (Raft thesis 6.4, "ReadIndex"). A read may see the state as of a commit index that the leader held *after*
//! the read arrived, once a quorum has confirmed after that moment that it still leads. Rounds are numbered; a read
//! belongs to the next round to be issued, and any round as late or later answers it. One round is under way while the
//! next gathers. A lost round is followed by a new one under a NEW context: a late confirmation of the old context
//! must not answer reads that arrived after it was issued.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use raft::StateRole;
use raft::eraftpb::{Message, MessageType};

use crate::acquaintances::Promises;
use crate::administration::{Administration, Surroundings};
use crate::codec::{self, Fields, Malformed};
use crate::command::{COMMAND_BYTES_MAX, Command, Kind, RequestId};
use crate::membership::{Membership, NodeId};
use crate::message::{AdminReply, AdminRequest, MemberProgress, Refusal, Status, WriteReply};
use crate::message_check::Offence;
use crate::peer_protocol::{ForwardName, ForwardRefusal, ForwardedWrite, PeerMessage};
use crate::raft_core::{COMMITTED_BYTES_MAX, Committed, CoreError, Output, RaftCore};
use crate::store::Replacement;

/// Writes that wait on this node, at most; one more is refused with 503. More than there are client connections, so
/// it is reached only by a mistake of ours.
pub const PENDING_WRITES_MAX: usize = 16 * 1024;

/// Reads that wait on this node, at most, as for writes.
pub const PENDING_READS_MAX: usize = 16 * 1024;

/// Writes that other nodes have forwarded and that are not proposed yet; one more is refused and comes again.
pub const FORWARDED_MAX: usize = 64 * 1024;

/// Bytes of commands in one proposal or one forward; a single larger command goes alone.
pub const PROPOSAL_BYTES_MAX: usize = 1 << 20;

/// Entries that a leader keeps beyond `--snapshot-catchup-entries` for a follower to whom a snapshot is on its way; one
/// that takes longer gets another snapshot.
pub const HELD_BACK_ENTRIES_MAX: u64 = 10_000;

/// Election timeouts for which they are kept once the snapshot has arrived: loading it takes a while.
const RESTORING_ELECTION_TIMEOUTS: u64 = 10;

/// Rounds of [`Replica::process`] without a new event: a tick must not wait for long.
const ROUNDS_MAX: usize = 8;

/// Bytes of entries that one call of [`Replica::process`] hands to the applier: it stops once [`COMMITTED_BYTES_MAX`]
/// have come together, and the last call of [`RaftCore::process_ready`] hands out below three times that. Only keys
/// beside values of the largest size can add their length.
pub const HANDED_OUT_BYTES_MAX: u64 = 4 * COMMITTED_BYTES_MAX;

/// Ticks after which a read round without an answer is given up for a new one.
pub const READ_ROUND_TICKS: u64 = 2;

/// What the applier must do, in order.
#[derive(Debug)]
pub enum Apply<W> {
    /// Apply a client's command, and answer who waits for it here.
    Command {
        /// The log index.
        index: u64,
        /// The entry's term.
        term: u64,
        /// The request's name.
        id: RequestId,
        /// The encoded command.
        command: Bytes,
        /// Who waits, if the request was taken by this run of this node.
        waiter: Option<W>,
    },
    /// Note that this index holds nothing for the keys.
    Nothing {
        /// The log index.
        index: u64,
        /// The entry's term.
        term: u64,
    },
    /// The membership from here on.
    Membership {
        /// The log index.
        index: u64,
        /// The entry's term.
        term: u64,
        /// The membership.
        membership: Arc<Membership>,
    },
    /// Take this state, of a received snapshot, in place of the whole state.
    Restore {
        /// The snapshot's index.
        index: u64,
        /// The membership that it holds.
        membership: Arc<Membership>,
        /// The state that it holds.
        state: Box<Replacement>,
    },
    /// Answer these reads from the state as it is now.
    Reads(Vec<W>),
    /// Tell who asked for a change of the cluster that it is done, and what the membership is now.
    Admin(W),
}

/// What a waiting request is told without the applier.
#[derive(Debug, PartialEq)]
pub enum Answer {
    /// To a write.
    Write(WriteReply),
    /// To a read.
    Read(Refusal),
    /// To a request that changes the cluster.
    Admin(AdminReply),
}

/// Something that is worth counting, or measuring by a host that has a clock.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Note {
    /// So many writes were proposed at once, by this leader.
    Proposed(usize),
    /// So many writes were forwarded to the leader at once.
    Forwarded(usize),
    /// A read round was begun.
    ReadRoundBegun,
    /// The read round under way was confirmed for so many reads.
    ReadRoundConfirmed(usize),
    /// The read round under way was given up.
    ReadRoundLost,
}

/// What waits in a replica.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Waiting {
    /// Writes of this node's clients, at most [`PENDING_WRITES_MAX`].
    pub writes: usize,
    /// Reads of this node's clients, at most [`PENDING_READS_MAX`].
    pub reads: usize,
    /// Writes that other nodes have forwarded, at most [`FORWARDED_MAX`].
    pub forwarded: usize,
}

/// Whatever surrounds a [`Replica`].
pub trait Host<W> {
    /// Queues a message for a peer. False if it was surely not sent.
    fn send(&mut self, to: NodeId, message: PeerMessage) -> bool;
    /// Begins to send the snapshot that `message` announces, as a file; [`Replica::snapshot_sent`] must follow. False
    /// if it was not begun.
    fn send_snapshot(&mut self, to: NodeId, message: Message) -> bool;
    /// Hands something to the applier, in order.
    fn apply(&mut self, apply: Apply<W>);
    /// What was handed to the applier so far should reach it now: a sync of the log follows, which takes long.
    fn before_sync(&mut self) {}
    /// Answers a waiting request.
    fn answer(&mut self, waiter: W, answer: Answer);
    /// A peer's message was refused.
    fn offended(&mut self, from: NodeId, offence: Offence);
    /// Something happened that only a host with metrics takes note of.
    fn note(&mut self, _note: Note) {}
}

/// What a replica tells its administration: a macro, because it borrows only some of the replica's fields.
macro_rules! surroundings {
    ($replica:expr) => {
        Surroundings {
            boot: $replica.boot,
            ticks: $replica.ticks,
            now: $replica.now,
            election_ticks: $replica.election_ticks,
            heard: &|id| $replica.heard.get(&id).is_some_and(|(at, _)| $replica.ticks - at <= $replica.election_ticks),
        }
    };
}

/// The name of a read round, as raft carries it: unique in the cluster and for all time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct ReadContext {
    node: NodeId,
    boot: u64,
    round: u64,
}

impl ReadContext {
    fn encode(self) -> Vec<u8> {
        let mut out = Vec::with_capacity(24);
        codec::put_u64(&mut out, self.node);
        codec::put_u64(&mut out, self.boot);
        codec::put_u64(&mut out, self.round);
        out
    }

    fn decode(bytes: &[u8]) -> Result<ReadContext, Malformed> {
        let mut fields = Fields::new(bytes, "read context");
        let context = ReadContext { node: fields.u64()?, boot: fields.u64()?, round: fields.u64()? };
        fields.finish()?;
        Ok(context)
    }
}

struct PendingWrite<W> {
    command: Bytes,
    deadline: Duration,
    waiter: W,
    /// How often it was proposed here or forwarded: from the first time on some log may hold it.
    hand_overs: u32,
    /// The tick of the last hand-over.
    handed_over_at: u64,
    state: WriteState,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum WriteState {
    /// In `Writes::next`: to be handed over by the next `process`.
    Next,
    /// Refused or undeliverable: to be handed over at the next tick.
    AtNextTick,
    /// In this node's own log.
    Proposed,
    /// On its way to the leader.
    Forwarded,
}

struct Writes<W> {
    sequence: u64,
    pending: BTreeMap<u64, PendingWrite<W>>,
    next: Vec<u64>,
}

struct Reads<W> {
    waiting: VecDeque<(u64, Duration, W)>,
    /// The last round that was issued.
    issued: u64,
    /// The tick at which the round under way was issued.
    under_way: Option<u64>,
    /// Confirmed reads whose index has not been handed out yet.
    confirmed: Vec<(u64, Vec<(Duration, W)>)>,
}

impl<W> Reads<W> {
    /// Lets confirmed reads through whose index has been handed out: the applier answers them behind it.
    fn release(&mut self, handed_out: u64, host: &mut impl Host<W>) {
        for (_, waiters) in self.confirmed.extract_if(.., |(index, _)| *index <= handed_out) {
            host.apply(Apply::Reads(waiters.into_iter().map(|(_, waiter)| waiter).collect()));
        }
    }
}

/// One node above its Raft core.
pub struct Replica<W> {
    core: RaftCore,
    boot: u64,
    election_ticks: u64,
    ticks: u64,
    now: Duration,
    writes: Writes<W>,
    reads: Reads<W>,
    forwarded: Vec<(NodeId, ForwardedWrite)>,
    /// Forwards of this boot, so far.
    forwards: u64,
    /// The last forward of each origin that this node looked at as leader of a term, by members and whoever was one in it.
    last_forwards: (u64, BTreeMap<NodeId, ForwardName>),
    followed: (NodeId, u64),
    /// When each peer was last heard from, in ticks and in time.
    heard: BTreeMap<NodeId, (u64, Duration)>,
    /// The highest term each peer has spoken in, since the start.
    spoken: BTreeMap<NodeId, u64>,
    administration: Administration<W>,
    /// Followers to whom a snapshot is on its way, or was lately: its index, and the tick until which that counts.
    restoring: BTreeMap<NodeId, (u64, u64)>,
    full: Option<String>,
}

impl<W> Replica<W> {
    /// A replica around `core`, in the run of this node that is named `boot`.
    pub fn new(core: RaftCore, boot: u64, election_ticks: usize) -> Replica<W> {
        let mut replica = Replica {
            core,
            boot,
            election_ticks: election_ticks as u64,
            ticks: 0,
            now: Duration::ZERO,
            writes: Writes { sequence: 0, pending: BTreeMap::new(), next: Vec::new() },
            reads: Reads { waiting: VecDeque::new(), issued: 0, under_way: None, confirmed: Vec::new() },
            forwarded: Vec::new(),
            forwards: 0,
            last_forwards: (0, BTreeMap::new()),
            followed: (raft::INVALID_ID, 0),
            heard: BTreeMap::new(),
            spoken: BTreeMap::new(),
            administration: Administration::default(),
            restoring: BTreeMap::new(),
            full: None,
        };
        // A single voter has nobody whose leadership it could disturb.
        if replica.core.membership().conf_state.voters == [replica.core.id()] && !replica.core.membership().is_joint() {
            replica.core.campaign();
        }
        replica
    }

    /// The Raft core, to look at.
    pub fn core(&self) -> &RaftCore {
        &self.core
    }

    /// One heartbeat interval has passed, and it is `now`.
    pub fn tick(&mut self, now: Duration, host: &mut impl Host<W>) {
        self.now = now;
        self.ticks += 1;
        self.core.tick();
        self.expire(host);
        self.retry();
        if self.reads.under_way.is_some_and(|issued| self.ticks - issued >= READ_ROUND_TICKS) {
            self.give_up_read_round(host);
        }
        let around = surroundings!(self);
        self.administration.tick(&mut self.core, &around, host);
    }

    /// Another round may begin, under a new context.
    fn give_up_read_round(&mut self, host: &mut impl Host<W>) {
        if self.reads.under_way.take().is_some() {
            host.note(Note::ReadRoundLost);
        }
    }

    /// Answers whoever has waited too long.
    fn expire(&mut self, host: &mut impl Host<W>) {
        let now = self.now;
        for (_, write) in self.writes.pending.extract_if(.., |_, write| write.deadline <= now) {
            host.answer(write.waiter, Answer::Write(end_of(write.hand_overs, Refusal::NoLeader)));
        }
        let pending = &self.writes.pending;
        self.writes.next.retain(|sequence| pending.contains_key(sequence));
        let waiting = std::mem::take(&mut self.reads.waiting);
        for (round, deadline, waiter) in waiting {
            if deadline <= now {
                host.answer(waiter, Answer::Read(Refusal::NoLeader));
            } else {
                self.reads.waiting.push_back((round, deadline, waiter));
            }
        }
        // Their index may be long in coming: a snapshot may be on its way here.
        for (_, waiters) in &mut self.reads.confirmed {
            for (_, waiter) in waiters.extract_if(.., |(deadline, _)| *deadline <= now) {
                host.answer(waiter, Answer::Read(Refusal::NoLeader));
            }
        }
        self.reads.confirmed.retain(|(_, waiters)| !waiters.is_empty());
    }

    /// Hands over again what was refused, or forwarded so long ago that it is lost.
    fn retry(&mut self) {
        for (&sequence, write) in &mut self.writes.pending {
            let lost = write.state == WriteState::Forwarded && self.ticks - write.handed_over_at >= self.election_ticks;
            if lost || write.state == WriteState::AtNextTick {
                write.state = WriteState::Next;
                self.writes.next.push(sequence);
            }
        }
    }

    /// From now on PUTs are refused, and why; or no longer.
    pub fn set_full(&mut self, full: Option<String>) {
        self.full = full;
    }

    /// Why this node takes no such command now.
    fn full_for(&self, command: &[u8]) -> Option<&String> {
        self.full.as_ref().filter(|_| Command::kind_of(command) == Ok(Kind::Put))
    }

    /// Takes a client's write. It is answered through the host, or by the applier.
    pub fn write(&mut self, command: Bytes, deadline: Duration, waiter: W, host: &mut impl Host<W>) {
        if self.core.is_removed() {
            host.answer(waiter, Answer::Write(WriteReply::NotApplied(Refusal::Stopping)));
            return;
        }
        if let Some(why) = self.full_for(&command) {
            host.answer(waiter, Answer::Write(WriteReply::NotApplied(Refusal::Full(why.clone()))));
            return;
        }
        if self.writes.pending.len() >= PENDING_WRITES_MAX {
            let refusal = Refusal::Overloaded("too many writes are waiting on this node");
            host.answer(waiter, Answer::Write(WriteReply::NotApplied(refusal)));
            return;
        }
        let writes = &mut self.writes;
        writes.sequence += 1;
        writes.next.push(writes.sequence);
        let write =
            PendingWrite { command, deadline, waiter, hand_overs: 0, handed_over_at: 0, state: WriteState::Next };
        writes.pending.insert(writes.sequence, write);
    }

    /// Takes a client's linearizable read.
    pub fn read(&mut self, deadline: Duration, waiter: W, host: &mut impl Host<W>) {
        if self.core.is_removed() {
            host.answer(waiter, Answer::Read(Refusal::Stopping));
            return;
        }
        if self.waiting().reads >= PENDING_READS_MAX {
            host.answer(waiter, Answer::Read(Refusal::Overloaded("too many reads are waiting on this node")));
            return;
        }
        self.reads.waiting.push_back((self.reads.issued + 1, deadline, waiter));
    }

    /// Takes a client's request to change the cluster.
    pub fn admin(&mut self, request: AdminRequest, deadline: Duration, waiter: W, host: &mut impl Host<W>) {
        if self.core.is_removed() {
            host.answer(waiter, Answer::Admin(AdminReply::Refused(Refusal::Stopping)));
            return;
        }
        self.writes.sequence += 1;
        let around = surroundings!(self);
        self.administration.take(self.writes.sequence, request, deadline, waiter, &around, host);
    }

    /// Takes a message from a peer whose identity the transport has checked. An error ends the node.
    pub fn peer(&mut self, from: NodeId, message: PeerMessage, host: &mut impl Host<W>) -> Result<(), CoreError> {
        self.heard.insert(from, (self.ticks, self.now));
        match message {
            PeerMessage::Raft(message) => {
                // A snapshot is announced by its file, see `snapshot_received`.
                if message.msg_type == MessageType::MsgSnapshot {
                    host.offended(from, Offence::Type(MessageType::MsgSnapshot));
                } else {
                    let spoken = spoken_term(&message);
                    match self.core.step(message)? {
                        Ok(()) => {
                            let term = self.spoken.entry(from).or_default();
                            *term = spoken.max(*term);
                        }
                        Err(offence) => host.offended(from, offence),
                    }
                }
            }
            PeerMessage::Forward { name, writes } => self.take_forwarded(from, name, writes, host),
            PeerMessage::ForwardRefused { ids, reason } => self.forward_refused(&ids, &reason, host),
            PeerMessage::AdminForward { term, id, request } => {
                if id.node != from {
                    host.offended(from, Offence::Malformed("forwarded request"));
                } else if term == self.core.term() {
                    let around = surroundings!(self);
                    self.administration.asked(id, request, &self.core, &around, host);
                }
            }
            PeerMessage::AdminAnswer { id, outcome } if id.node == self.core.id() && id.boot == self.boot => {
                self.administration.answered(id, outcome, host);
            }
            PeerMessage::AdminAnswer { .. } => {}
        }
        Ok(())
    }

    fn take_forwarded(
        &mut self,
        from: NodeId,
        name: ForwardName,
        writes: Vec<ForwardedWrite>,
        host: &mut impl Host<W>,
    ) {
        // What no state machine could read would end every node that applies it, at each of its starts. And what only
        // leaders propose, of their own knowledge, comes from no correct member.
        let of_client =
            |data: &Bytes| matches!(Command::decode(data), Ok(Command::Put { .. } | Command::Delete { .. }));
        let sound = |write: &ForwardedWrite| {
            write.id.node == from && write.data.len() <= COMMAND_BYTES_MAX && of_client(&write.data)
        };
        if !writes.iter().all(sound) {
            host.offended(from, Offence::Malformed("forwarded write"));
            return;
        }
        let writes = writes.into_iter().map(|write| (from, write));
        if !self.core.is_leader() || name.term != self.core.term() {
            refuse(writes.collect(), self.refusal(), host);
            return;
        }
        let (term, last_forwards) = &mut self.last_forwards;
        if *term != name.term {
            *term = name.term;
            last_forwards.clear();
        }
        let last = last_forwards.entry(from).or_default();
        if name <= *last {
            // A copy, whose first was taken or refused, or one that a later forward has overtaken: that counts as lost,
            // and its origin hands over again.
            return;
        }
        *last = name;
        if self.forwarded.len() + writes.len() > FORWARDED_MAX {
            refuse(writes.collect(), self.refusal(), host);
            return;
        }
        let (refused, taken): (Vec<_>, Vec<_>) = writes.partition(|(_, write)| self.full_for(&write.data).is_some());
        self.forwarded.extend(taken);
        if let Some(why) = &self.full {
            refuse(refused, ForwardRefusal::Full(why.clone()), host);
        }
    }

    /// Why this node can't take a forward now.
    fn refusal(&self) -> ForwardRefusal {
        match self.core.is_leader() {
            true => ForwardRefusal::Dropped,
            false => ForwardRefusal::NotLeader { leader: self.core.leader() },
        }
    }

    fn forward_refused(&mut self, ids: &[RequestId], reason: &ForwardRefusal, host: &mut impl Host<W>) {
        for id in ids.iter().filter(|id| id.node == self.core.id() && id.boot == self.boot) {
            let Some(write) = self.writes.pending.get_mut(&id.sequence) else { continue };
            if let ForwardRefusal::Full(why) = reason
                && write.hand_overs == 1
            {
                let write = self.writes.pending.remove(&id.sequence).expect("it was just looked at");
                host.answer(write.waiter, Answer::Write(WriteReply::NotApplied(Refusal::Full(why.clone()))));
            } else if write.state == WriteState::Forwarded {
                write.state = WriteState::AtNextTick;
            }
        }
    }

    /// The transport could not deliver to `id`.
    pub fn unreachable(&mut self, id: NodeId) {
        self.core.report_unreachable(id);
        if id == self.core.leader() {
            for write in self.writes.pending.values_mut().filter(|write| write.state == WriteState::Forwarded) {
                write.state = WriteState::AtNextTick;
            }
        }
    }

    /// What `peer` must still have if its data directory is the one it had.
    pub fn promises(&self, peer: NodeId) -> Promises {
        let progress = self.core.progress();
        let matched = progress.iter().find(|(id, ..)| *id == peer).map(|(_, matched, ..)| (self.core.term(), *matched));
        Promises { term: self.spoken.get(&peer).copied().unwrap_or(0), acknowledged: matched }
    }

    /// Has the leader write each member's data directory into the replicated state, once it is known.
    pub fn record_directories(&mut self, directory: &dyn Fn(NodeId) -> Option<u128>) {
        // A recording in flight is not repeated at every tick, and a lost one is made again.
        if !self.core.is_leader() || !self.ticks.is_multiple_of(self.election_ticks) {
            return;
        }
        let members = self.core.membership().members.iter();
        let unrecorded = members.filter(|(_, member)| member.directory.is_none()).map(|(id, _)| *id);
        let known: Vec<(NodeId, u128)> = unrecorded.filter_map(|id| Some((id, directory(id)?))).collect();
        for (member, directory) in known {
            self.writes.sequence += 1;
            let id = RequestId { node: self.core.id(), boot: self.boot, sequence: self.writes.sequence };
            let command = Command::RecordDirectory { member, directory };
            self.core.propose(vec![(id, Bytes::from(command.encode()))]);
        }
    }

    /// How sending a snapshot ended.
    pub fn snapshot_sent(&mut self, to: NodeId, delivered: bool) {
        self.core.report_snapshot(to, delivered);
        if let Some((_, until)) = self.restoring.get_mut(&to) {
            *until = self.ticks + RESTORING_ELECTION_TIMEOUTS * self.election_ticks;
        }
    }

    /// A snapshot's file is complete and durable here, and `message` announces it; `state` is what it holds.
    pub fn snapshot_received(
        &mut self,
        from: NodeId,
        message: Message,
        membership: Arc<Membership>,
        state: Box<Replacement>,
        host: &mut impl Host<W>,
    ) -> Result<(), CoreError> {
        self.heard.insert(from, (self.ticks, self.now));
        if message.get_snapshot().get_metadata().get_conf_state() != &membership.conf_state {
            host.offended(from, Offence::Type(MessageType::MsgSnapshot));
        } else if !membership.is_consistent() {
            host.offended(from, Offence::Malformed("its members are not those of its configuration"));
        } else if let Err(offence) = self.core.step_snapshot(message, membership, state)? {
            host.offended(from, offence);
        }
        Ok(())
    }

    /// A snapshot of the state at `index` is on disk; the log up to `compact_to` is not needed any more.
    pub fn snapshot_written(
        &mut self,
        index: u64,
        membership: Arc<Membership>,
        compact_to: u64,
    ) -> Result<(), CoreError> {
        // Without the entries behind the snapshot that it is being sent, a follower would need the next one at once.
        let ticks = self.ticks;
        self.restoring.retain(|_, (_, until)| *until >= ticks);
        let needed = self.restoring.values().map(|(index, _)| *index).min().unwrap_or(compact_to);
        let held_back = needed.max(compact_to.saturating_sub(HELD_BACK_ENTRIES_MAX));
        self.core.snapshot_written(index, membership, compact_to.min(held_back))
    }

    /// Whether a follower waits for a snapshot newer than the newest; cleared by asking.
    pub fn take_snapshot_wanted(&mut self) -> bool {
        self.core.take_snapshot_wanted()
    }

    /// Starts to hand leadership to the voter whose log is longest. False if this node does not lead or is alone.
    pub fn hand_over(&mut self) -> bool {
        let me = self.core.id();
        let voters = self.core.membership().conf_state.voters.clone();
        let best =
            self.core.progress().into_iter().filter(|(id, _, active, _)| *id != me && *active && voters.contains(id));
        match best.max_by_key(|(_, matched, _, _)| *matched) {
            Some((id, ..)) => {
                self.core.transfer_leader(id);
                true
            }
            None => false,
        }
    }

    /// Answers all who wait, because the node stops, maybe since it was `removed` from the cluster.
    pub fn stop(&mut self, removed: bool, host: &mut impl Host<W>) {
        for (_, write) in std::mem::take(&mut self.writes.pending) {
            host.answer(write.waiter, Answer::Write(end_of(write.hand_overs, Refusal::Stopping)));
        }
        let confirmed = std::mem::take(&mut self.reads.confirmed)
            .into_iter()
            .flat_map(|(_, waiters)| waiters)
            .map(|(_, waiter)| waiter);
        let waiting = std::mem::take(&mut self.reads.waiting).into_iter().map(|(_, _, waiter)| waiter);
        for waiter in confirmed.chain(waiting) {
            host.answer(waiter, Answer::Read(Refusal::Stopping));
        }
        self.administration.stop(&self.core, removed, host);
    }

    /// How much waits here.
    pub fn waiting(&self) -> Waiting {
        let confirmed: usize = self.reads.confirmed.iter().map(|(_, waiters)| waiters.len()).sum();
        Waiting {
            writes: self.writes.pending.len(),
            reads: self.reads.waiting.len() + confirmed,
            forwarded: self.forwarded.len(),
        }
    }

    /// Whether a request waits on this node.
    pub fn is_idle(&self) -> bool {
        let reads = &self.reads;
        self.writes.pending.is_empty()
            && reads.waiting.is_empty()
            && reads.confirmed.is_empty()
            && self.administration.is_idle()
    }

    /// Does everything that all calls since the last one have made possible. An error ends the node.
    ///
    /// Many writes taken before one call share one proposal, one batch in the log and one sync.
    /// When it returns true there is more to do, and it should be called again before waiting for an event. One call
    /// hands out no more than [`HANDED_OUT_BYTES_MAX`].
    pub fn process(&mut self, host: &mut impl Host<W>) -> Result<bool, CoreError> {
        let mut bytes = 0;
        for _ in 0..ROUNDS_MAX {
            let before = self.core.handed_out();
            self.follow(host);
            self.hand_over_writes(host);
            self.ask_read_index(host);
            let around = surroundings!(self);
            self.administration.process(&mut self.core, &around, host);
            bytes += self.process_ready(host)?;
            self.reads.release(self.core.handed_out(), host);
            if self.core.is_removed() {
                // The others take nothing from here any more: whoever still waits hears so, and whoever comes later
                // is refused.
                self.stop(true, host);
            }
            let changed = self.followed != (self.core.leader(), self.core.term());
            // A request that changes the cluster may be done, or go on, with what was just handed out.
            let reconfigured = !self.administration.is_idle() && before != self.core.handed_out();
            let has_ready = self.core.has_ready();
            if !(changed || reconfigured || has_ready || self.wants_read_index()) {
                return Ok(false);
            }
            // The applier should have what there is, rather than all there will be at once.
            if has_ready || bytes >= COMMITTED_BYTES_MAX {
                return Ok(true);
            }
        }
        Ok(true)
    }

    /// Notices another leader or term: what waits is handed over again.
    fn follow(&mut self, host: &mut impl Host<W>) {
        let now_followed = (self.core.leader(), self.core.term());
        if self.followed == now_followed {
            return;
        }
        self.followed = now_followed;
        self.give_up_read_round(host);
        for (&sequence, write) in &mut self.writes.pending {
            if write.state != WriteState::Next {
                write.state = WriteState::Next;
                self.writes.next.push(sequence);
            }
        }
        self.writes.next.sort_unstable();
    }

    fn hand_over_writes(&mut self, host: &mut impl Host<W>) {
        if self.core.is_leader() {
            self.propose_forwarded(host);
            self.propose_own(host);
        } else {
            let reason = self.refusal();
            refuse(std::mem::take(&mut self.forwarded), reason, host);
            self.forward_own(host);
        }
    }

    fn propose_forwarded(&mut self, host: &mut impl Host<W>) {
        let mut forwarded = std::mem::take(&mut self.forwarded).into_iter().peekable();
        while forwarded.peek().is_some() {
            let mut bytes = 0;
            let mut batch = Vec::new();
            while let Some(next) = forwarded.next_if(|(_, write)| fits(&mut bytes, write.data.len())) {
                batch.push(next);
            }
            if self.core.propose(batch.iter().map(|(_, write)| (write.id, write.data.clone())).collect()) {
                host.note(Note::Proposed(batch.len()));
            } else {
                refuse(batch, ForwardRefusal::Dropped, host);
            }
        }
    }

    /// The next writes to hand over, up to [`PROPOSAL_BYTES_MAX`].
    fn next_batch(&mut self) -> Vec<(RequestId, Bytes)> {
        let (node, boot) = (self.core.id(), self.boot);
        let mut bytes = 0;
        let mut taken = 0;
        let mut batch = Vec::new();
        for &sequence in &self.writes.next {
            // Answered or expired meanwhile, or named twice: a write is `Next` once.
            let Some(write) = self.writes.pending.get(&sequence).filter(|write| write.state == WriteState::Next) else {
                taken += 1;
                continue;
            };
            if !fits(&mut bytes, write.command.len()) {
                break;
            }
            taken += 1;
            batch.push((RequestId { node, boot, sequence }, write.command.clone()));
        }
        self.writes.next.drain(..taken);
        batch
    }

    /// Notes that `sequences` were handed over, or could not be.
    fn mark(&mut self, sequences: &[u64], handed_over: Option<WriteState>) {
        for sequence in sequences {
            let write = self.writes.pending.get_mut(sequence).expect("only waiting writes are handed over");
            write.hand_overs += u32::from(handed_over.is_some());
            write.handed_over_at = self.ticks;
            write.state = handed_over.unwrap_or(WriteState::AtNextTick);
        }
    }

    fn propose_own(&mut self, host: &mut impl Host<W>) {
        while !self.writes.next.is_empty() {
            let batch = self.next_batch();
            let sequences: Vec<u64> = batch.iter().map(|(id, _)| id.sequence).collect();
            let proposed = self.core.propose(batch);
            if proposed {
                host.note(Note::Proposed(sequences.len()));
            }
            self.mark(&sequences, proposed.then_some(WriteState::Proposed));
        }
    }

    fn forward_own(&mut self, host: &mut impl Host<W>) {
        let leader = self.core.leader();
        if leader == raft::INVALID_ID {
            return;
        }
        while !self.writes.next.is_empty() {
            let batch = self.next_batch();
            let sequences: Vec<u64> = batch.iter().map(|(id, _)| id.sequence).collect();
            let writes = batch.into_iter().map(|(id, data)| ForwardedWrite { id, data }).collect();
            self.forwards += 1;
            let name = ForwardName { term: self.core.term(), boot: self.boot, number: self.forwards };
            let sent = host.send(leader, PeerMessage::Forward { name, writes });
            if sent {
                host.note(Note::Forwarded(sequences.len()));
            }
            self.mark(&sequences, sent.then_some(WriteState::Forwarded));
        }
    }

    fn wants_read_index(&self) -> bool {
        let newest = self.reads.waiting.back().map(|(round, _, _)| *round);
        self.reads.under_way.is_none() && newest.is_some() && self.core.can_read_index()
    }

    fn ask_read_index(&mut self, host: &mut impl Host<W>) {
        if !self.wants_read_index() {
            return;
        }
        self.reads.issued += 1;
        self.reads.under_way = Some(self.ticks);
        let context = ReadContext { node: self.core.id(), boot: self.boot, round: self.reads.issued };
        self.core.read_index(context.encode());
        host.note(Note::ReadRoundBegun);
    }

    /// Returns the bytes of entries that were handed out.
    fn process_ready(&mut self, host: &mut impl Host<W>) -> Result<u64, CoreError> {
        let id = self.core.id();
        let (writes, reads) = (&mut self.writes, &mut self.reads);
        let mut output = ReplicaOutput {
            id,
            boot: self.boot,
            writes,
            reads,
            host,
            restoring: &mut self.restoring,
            snapshots_not_begun: Vec::new(),
            unreachable: Vec::new(),
        };
        let bytes = self.core.process_ready(&mut output)?;
        let ReplicaOutput { snapshots_not_begun, unreachable, .. } = output;
        for to in unreachable {
            self.core.report_unreachable(to);
        }
        // Left unreported, raft would wait for the end of these for ever.
        for to in snapshots_not_begun {
            self.core.report_snapshot(to, false);
        }
        Ok(bytes)
    }

    /// Tells the followers of a leader what is committed: see [`RaftCore::announce_commit`].
    pub fn announce_commit(&mut self) {
        self.core.announce_commit();
    }

    /// What this node says of itself; how far transfers of snapshots have come, only the network knows.
    pub fn status(&self) -> Status {
        let core = &self.core;
        let me = core.id();
        let role = match core.role() {
            StateRole::Leader => "leader",
            StateRole::Candidate => "candidate",
            StateRole::PreCandidate => "pre-candidate",
            StateRole::Follower if core.membership().is_voter(me) => "follower",
            StateRole::Follower => "learner",
        };
        let contact = |id| {
            if id == me {
                Some(Duration::ZERO)
            } else {
                self.heard.get(&id).map(|&(_, at)| self.now.saturating_sub(at))
            }
        };
        let describe = |(id, match_index, _, snapshot)| {
            let last_contact = contact(id);
            MemberProgress { id, match_index, last_contact, snapshot, transfer: None }
        };
        Status {
            id: me,
            role,
            leader: core.leader(),
            term: core.term(),
            commit_index: core.commit_index(),
            first_index: core.log().first_index(),
            last_index: core.last_index(),
            snapshot_index: core.snapshot_index(),
            membership: core.membership().clone(),
            progress: core.progress().into_iter().map(describe).collect(),
            change: self.administration.progress().map(str::to_owned),
        }
    }
}

/// Tells the origins of forwards that this node can't propose them now: they look for the leader again.
fn refuse<W>(forwarded: Vec<(NodeId, ForwardedWrite)>, reason: ForwardRefusal, host: &mut impl Host<W>) {
    let mut refused: BTreeMap<NodeId, Vec<RequestId>> = BTreeMap::new();
    for (from, write) in forwarded {
        refused.entry(from).or_default().push(write.id);
    }
    for (from, ids) in refused {
        // Lost, the origin hands the writes over again by itself.
        let _ = host.send(from, PeerMessage::ForwardRefused { ids, reason: reason.clone() });
    }
}

/// The answer to a write that will not be waited for any longer.
fn end_of(hand_overs: u32, refusal: Refusal) -> WriteReply {
    if hand_overs > 0 {
        WriteReply::Unknown("the write was handed to Raft and not seen applied in time")
    } else {
        WriteReply::NotApplied(refusal)
    }
}

/// The term that a message proves to be in its sender's hard state. A pre-vote asks with a term that nobody has
/// reached yet.
fn spoken_term(message: &Message) -> u64 {
    match message.msg_type {
        MessageType::MsgRequestPreVote | MessageType::MsgRequestPreVoteResponse | MessageType::MsgReadIndex => 0,
        _ => message.term,
    }
}

/// Whether another command of `len` bytes still fits into a batch of `bytes`; counts it if so.
fn fits(bytes: &mut usize, len: usize) -> bool {
    let fits = *bytes == 0 || *bytes + len <= PROPOSAL_BYTES_MAX;
    if fits {
        *bytes += len.max(1);
    }
    fits
}

/// Matches what the core puts out with who waits for it.
struct ReplicaOutput<'a, W, H> {
    id: NodeId,
    boot: u64,
    writes: &'a mut Writes<W>,
    reads: &'a mut Reads<W>,
    host: &'a mut H,
    restoring: &'a mut BTreeMap<NodeId, (u64, u64)>,
    snapshots_not_begun: Vec<NodeId>,
    unreachable: Vec<NodeId>,
}

impl<W, H: Host<W>> Output for ReplicaOutput<'_, W, H> {
    fn send(&mut self, message: Message) {
        let to = message.to;
        if message.msg_type == MessageType::MsgSnapshot {
            let index = message.get_snapshot().get_metadata().index;
            if self.host.send_snapshot(to, message) {
                self.restoring.insert(to, (index, u64::MAX));
            } else {
                self.snapshots_not_begun.push(to);
            }
        } else {
            // Raft counts on losses, but it sends entries optimistically: a gap that it hears of is closed sooner.
            let is_append = message.msg_type == MessageType::MsgAppend;
            if !self.host.send(to, PeerMessage::Raft(message)) && is_append {
                self.unreachable.push(to);
            }
        }
    }

    fn committed(&mut self, committed: Committed) {
        let apply = match committed {
            Committed::Command { index, term, id, command } => {
                let ours = id.node == self.id && id.boot == self.boot;
                let waiter = ours.then(|| self.writes.pending.remove(&id.sequence)).flatten().map(|write| write.waiter);
                Apply::Command { index, term, id, command, waiter }
            }
            Committed::Nothing { index, term } => Apply::Nothing { index, term },
            Committed::Membership { index, term, membership, .. } => Apply::Membership { index, term, membership },
            Committed::Restore { index, membership, state } => {
                // What was applied inside the snapshot will not be handed out here: handed over again, it comes back
                // as a repeat, and whoever waits is told that the outcome is unknown rather than kept waiting.
                for write in self.writes.pending.values_mut().filter(|write| write.state != WriteState::Next) {
                    write.state = WriteState::AtNextTick;
                }
                Apply::Restore { index, membership, state }
            }
        };
        self.host.apply(apply);
    }

    fn read_index(&mut self, context: Vec<u8>, index: u64) {
        // Confirmations of another node's or an earlier run's rounds are of no use to anyone here.
        let Ok(ReadContext { node, boot, round }) = ReadContext::decode(&context) else { return };
        if node != self.id || boot != self.boot {
            return;
        }
        let served = self.reads.waiting.partition_point(|(needed, _, _)| *needed <= round);
        let waiters: Vec<_> =
            self.reads.waiting.drain(..served).map(|(_, deadline, waiter)| (deadline, waiter)).collect();
        if round == self.reads.issued && self.reads.under_way.take().is_some() {
            self.host.note(Note::ReadRoundConfirmed(waiters.len()));
        }
        if !waiters.is_empty() {
            self.reads.confirmed.push((index, waiters));
        }
    }

    fn before_sync(&mut self, handed_out: u64) {
        self.reads.release(handed_out, self.host);
        self.host.before_sync();
    }
}

#[cfg(test)]
mod tests {
    use raft::eraftpb::Entry;

    use super::*;
    use crate::command::Condition;
    use crate::fixtures::{ELECTION_TICKS, core_on, founders, log_on, voter_and_learner, write_committed};
    use crate::memory_disk::MemoryDisk;
    use crate::peer_protocol::AdminOutcome;
    use crate::raft_core::{FOUNDING_INDEX, FOUNDING_TERM};

    /// Keeps what a replica puts out.
    #[derive(Default)]
    struct Kept {
        sent: Vec<(NodeId, PeerMessage)>,
        answers: Vec<(u32, Answer)>,
        applied: Vec<Apply<u32>>,
        /// Peers to whom a snapshot was sent.
        snapshots: Vec<NodeId>,
        /// Set where some are to be expected.
        offences: Option<Vec<NodeId>>,
    }

    impl Host<u32> for Kept {
        fn send(&mut self, to: NodeId, message: PeerMessage) -> bool {
            self.sent.push((to, message));
            true
        }

        fn send_snapshot(&mut self, to: NodeId, _message: Message) -> bool {
            self.snapshots.push(to);
            true
        }

        fn apply(&mut self, apply: Apply<u32>) {
            self.applied.push(apply);
        }

        fn answer(&mut self, waiter: u32, answer: Answer) {
            self.answers.push((waiter, answer));
        }

        fn offended(&mut self, from: NodeId, offence: Offence) {
            self.offences.as_mut().unwrap_or_else(|| panic!("{offence} of {from}")).push(from);
        }
    }

    impl Kept {
        /// The names of the writes that were forwarded since the last call.
        fn forwarded(&mut self) -> Vec<RequestId> {
            let forwards = std::mem::take(&mut self.sent).into_iter().filter_map(|(_, message)| match message {
                PeerMessage::Forward { writes, .. } => Some(writes),
                _ => None,
            });
            forwards.flatten().map(|write| write.id).collect()
        }
    }

    fn replica(id: NodeId, members: u64) -> Replica<u32> {
        replica_with(id, members, &[])
    }

    /// A replica that starts with these entries in its log, all of them committed.
    fn replica_with(id: NodeId, members: u64, entries: &[Entry]) -> Replica<u32> {
        replica_of(id, &founders(members), entries)
    }

    fn replica_of(id: NodeId, founding: &Membership, entries: &[Entry]) -> Replica<u32> {
        let mut log = log_on(&MemoryDisk::new(), id, founding);
        write_committed(&mut log, entries);
        Replica::new(core_on(log, id, founding), 9, ELECTION_TICKS)
    }

    /// A follower of member 2.
    fn follower() -> (Replica<u32>, Kept) {
        let (mut replica, mut kept) = (replica(1, 3), Kept::default());
        let heartbeat = Message { msg_type: MessageType::MsgHeartbeat, from: 2, to: 1, term: 5, ..Message::default() };
        replica.peer(2, PeerMessage::Raft(heartbeat), &mut kept).unwrap();
        replica.process(&mut kept).unwrap();
        assert_eq!(replica.core().leader(), 2);
        (replica, kept)
    }

    fn put() -> Bytes {
        let (key, value) = (Bytes::from_static(b"key"), Bytes::from_static(b"value"));
        Command::Put { key, value, condition: Condition::default(), token: None }.encode().into()
    }

    fn delete() -> Bytes {
        Command::Delete { key: Bytes::from_static(b"key"), condition: Condition::default(), token: None }
            .encode()
            .into()
    }

    fn full(answer: &Answer) -> bool {
        matches!(answer, Answer::Write(WriteReply::NotApplied(Refusal::Full(_))))
    }

    const LATER: Duration = Duration::from_secs(60);

    #[test]
    fn a_long_log_that_is_read_back_at_a_start_is_handed_out_in_bounded_pieces() {
        // More than twice what one call may hand out.
        const ENTRIES: u64 = 3 * (HANDED_OUT_BYTES_MAX >> 20);
        let value = Bytes::from(vec![7; 1 << 20]);
        let put = Command::Put { key: Bytes::from_static(b"key"), value, condition: Condition::default(), token: None };
        let data = Bytes::from(put.encode());
        let entries: Vec<Entry> = (1..=ENTRIES)
            .map(|sequence| {
                let context = Bytes::copy_from_slice(&RequestId { node: 2, boot: 1, sequence }.encode());
                let index = FOUNDING_INDEX + sequence;
                Entry { index, term: FOUNDING_TERM, context, data: data.clone(), ..Entry::default() }
            })
            .collect();
        let mut replica = replica_with(1, 3, &entries);
        drop(entries);
        let (mut kept, mut calls) = (Kept::default(), 0);
        loop {
            let more = replica.process(&mut kept).unwrap();
            let bytes = kept.applied.drain(..).map(|apply| match apply {
                Apply::Command { command, .. } => command.len() as u64,
                _ => 0,
            });
            let bytes: u64 = bytes.sum();
            assert!(bytes <= HANDED_OUT_BYTES_MAX, "{bytes} bytes in one call");
            calls += 1;
            if !more {
                break;
            }
        }
        assert_eq!(replica.core().handed_out(), FOUNDING_INDEX + ENTRIES);
        assert!(calls > 3, "{calls} calls");
    }

    #[test]
    fn a_full_node_refuses_puts_of_its_clients_and_takes_deletes() {
        let (mut replica, mut kept) = follower();
        replica.set_full(Some("full".to_owned()));
        replica.write(put(), LATER, 1, &mut kept);
        replica.write(delete(), LATER, 2, &mut kept);
        replica.process(&mut kept).unwrap();
        assert!(matches!(&kept.answers[..], [(1, answer)] if full(answer)), "{:?}", kept.answers);
        assert_eq!(kept.forwarded().len(), 1);
        replica.set_full(None);
        replica.write(put(), LATER, 3, &mut kept);
        replica.process(&mut kept).unwrap();
        assert_eq!((kept.answers.len(), kept.forwarded().len()), (1, 1));
    }

    #[test]
    fn a_full_leader_refuses_forwarded_puts_and_takes_deletes() {
        let (mut leader, mut kept) = (replica(1, 1), Kept::default());
        leader.process(&mut kept).unwrap();
        assert!(leader.core().is_leader());
        leader.set_full(Some("full".to_owned()));
        let last_index = leader.core().last_index();
        let id = |sequence| RequestId { node: 2, boot: 1, sequence };
        let writes = vec![ForwardedWrite { id: id(1), data: put() }, ForwardedWrite { id: id(2), data: delete() }];
        let forward = forward_to(&leader, 1, writes);
        leader.peer(2, forward.clone(), &mut kept).unwrap();
        leader.process(&mut kept).unwrap();
        assert_eq!(leader.core().last_index(), last_index + 1);
        let reason = ForwardRefusal::Full("full".to_owned());
        assert_eq!(kept.sent, [(2, PeerMessage::ForwardRefused { ids: vec![id(1)], reason })]);

        // Its client has been told that it was not applied and never will be: a copy that arrives once there is room
        // must not change that.
        leader.set_full(None);
        leader.peer(2, forward, &mut kept).unwrap();
        leader.process(&mut kept).unwrap();
        assert_eq!((leader.core().last_index(), kept.sent.len()), (last_index + 1, 1));
        // Boot, number, and whether it is taken: only what comes behind all others of its origin.
        let forwards = [(1, 3, 1), (1, 2, 0), (1, 3, 0), (2, 1, 1), (1, 4, 0), (2, 2, 1)];
        for (sequence, (boot, number, taken)) in (3..).zip(forwards) {
            let last_index = leader.core().last_index();
            let name = ForwardName { term: leader.core().term(), boot, number };
            let writes = vec![ForwardedWrite { id: id(sequence), data: put() }];
            leader.peer(2, PeerMessage::Forward { name, writes }, &mut kept).unwrap();
            leader.process(&mut kept).unwrap();
            assert_eq!(leader.core().last_index(), last_index + taken, "{name:?}");
        }
    }

    #[test]
    fn a_forward_to_the_leader_of_another_term_is_refused() {
        let (mut leader, mut kept) = leader_of(&founders(1), &[]);
        let last_index = leader.core().last_index();
        for (term, proposed) in
            [(leader.core().term() - 1, 0), (leader.core().term() + 1, 0), (leader.core().term(), 1)]
        {
            let writes = vec![ForwardedWrite { id: id(2, 1), data: put() }];
            let forward = PeerMessage::Forward { name: ForwardName { term, boot: 1, number: 1 }, writes };
            leader.peer(2, forward, &mut kept).unwrap();
            leader.process(&mut kept).unwrap();
            assert_eq!(leader.core().last_index(), last_index + proposed, "{term}");
        }
        let ids = vec![id(2, 1)];
        let refusal = PeerMessage::ForwardRefused { ids, reason: ForwardRefusal::Dropped };
        assert_eq!(kept.sent, [(2, refusal.clone()), (2, refusal)], "it is to hand the write over again");
    }

    #[test]
    fn a_write_that_a_full_leader_refuses_was_not_applied_if_nobody_else_ever_had_it() {
        let reason = ForwardRefusal::Full("full".to_owned());
        let (mut replica, mut kept) = follower();
        replica.write(put(), LATER, 1, &mut kept);
        replica.process(&mut kept).unwrap();
        let ids = kept.forwarded();
        replica.peer(2, PeerMessage::ForwardRefused { ids, reason: reason.clone() }, &mut kept).unwrap();
        assert!(matches!(&kept.answers[..], [(1, answer)] if full(answer)), "{:?}", kept.answers);
        assert!(replica.is_idle());

        let (mut replica, mut kept) = follower();
        replica.write(put(), LATER, 1, &mut kept);
        replica.process(&mut kept).unwrap();
        assert_eq!(kept.forwarded().len(), 1);
        // Taken for lost, and forwarded once more: the first one may be in the leader's log.
        replica.unreachable(2);
        replica.tick(Duration::from_millis(100), &mut kept);
        replica.process(&mut kept).unwrap();
        let ids = kept.forwarded();
        assert_eq!(ids.len(), 1);
        replica.peer(2, PeerMessage::ForwardRefused { ids, reason }, &mut kept).unwrap();
        assert!(kept.answers.is_empty() && !replica.is_idle(), "{:?}", kept.answers);
        replica.tick(LATER, &mut kept);
        assert!(matches!(&kept.answers[..], [(1, Answer::Write(WriteReply::Unknown(_)))]), "{:?}", kept.answers);
    }

    fn id(node: NodeId, sequence: u64) -> RequestId {
        RequestId { node, boot: 1, sequence }
    }

    /// What member 2 sends to `leader`.
    fn forward_to(leader: &Replica<u32>, number: u64, writes: Vec<ForwardedWrite>) -> PeerMessage {
        PeerMessage::Forward { name: ForwardName { term: leader.core().term(), boot: 1, number }, writes }
    }

    /// A replica that votes alone, and leads.
    fn leader_of(founding: &Membership, entries: &[Entry]) -> (Replica<u32>, Kept) {
        let (mut leader, mut kept) = (replica_of(1, founding, entries), Kept::default());
        while leader.process(&mut kept).unwrap() {}
        assert!(leader.core().is_leader());
        (leader, kept)
    }

    #[test]
    fn a_forward_that_would_end_every_node_is_in_no_log() {
        let (mut leader, mut kept) = leader_of(&founders(1), &[]);
        let last_index = leader.core().last_index();
        let (good, undecodable) = (put(), Bytes::from_static(b"no command"));
        let too_long = Bytes::from(vec![0; COMMAND_BYTES_MAX + 1]);
        // Of a false one the member that it names would be refused by all others.
        let directory = Bytes::from(Command::RecordDirectory { member: 3, directory: 7 }.encode());
        let unsound = [(2, undecodable), (2, Bytes::new()), (2, too_long), (3, good.clone()), (2, directory)];
        for (number, (from, data)) in (1..).zip(unsound) {
            kept.offences = Some(Vec::new());
            // A sound one beside it does not help.
            let sound = ForwardedWrite { id: id(2, 1), data: good.clone() };
            let writes = vec![sound, ForwardedWrite { id: id(from, 2), data }];
            let forward = forward_to(&leader, number, writes);
            leader.peer(2, forward, &mut kept).unwrap();
            leader.process(&mut kept).unwrap();
            assert_eq!(kept.offences.take(), Some(vec![2]));
            assert_eq!(leader.core().last_index(), last_index);
        }
        let forward = forward_to(&leader, 6, vec![ForwardedWrite { id: id(2, 1), data: good }]);
        leader.peer(2, forward, &mut kept).unwrap();
        leader.process(&mut kept).unwrap();
        assert_eq!(leader.core().last_index(), last_index + 1);
    }

    #[test]
    fn a_change_that_was_refused_once_is_refused_again_when_it_comes_late() {
        let (mut leader, mut kept) = leader_of(&voter_and_learner(), &[]);
        let term = leader.core().term();
        let ask = |sequence, request| PeerMessage::AdminForward { term, id: id(2, sequence), request };
        // The learner has never answered, so its promotion waits.
        let promotion =
            ask(1, AdminRequest::AddMember { id: 2, url: founders(2).members[&2].url.clone(), voter: Some(true) });
        let removal = ask(2, AdminRequest::RemoveMember { id: 2 });
        for request in [promotion, removal.clone()] {
            leader.peer(2, request, &mut kept).unwrap();
            leader.process(&mut kept).unwrap();
        }
        let answer = |kept: &mut Kept| {
            let told = std::mem::take(&mut kept.sent).into_iter();
            let mut answers = told.filter(|(_, message)| matches!(message, PeerMessage::AdminAnswer { .. }));
            (answers.next(), answers.next())
        };
        let refusal = answer(&mut kept);
        let name = match &refusal {
            (Some((2, PeerMessage::AdminAnswer { id, outcome: AdminOutcome::Refused(_) })), None) => Some(*id),
            _ => None,
        };
        assert_eq!(name, Some(id(2, 2)), "{refusal:?}");
        // Nobody asks for the promotion any more.
        for _ in 0..=2 * ELECTION_TICKS + 1 {
            leader.tick(Duration::ZERO, &mut kept);
            leader.process(&mut kept).unwrap();
        }
        kept.sent.clear();
        let last_index = leader.core().last_index();
        leader.peer(2, removal, &mut kept).unwrap();
        leader.process(&mut kept).unwrap();
        assert_eq!(leader.core().last_index(), last_index);
        assert_eq!(answer(&mut kept), refusal);
        // Another one is taken.
        leader.peer(2, ask(3, AdminRequest::RemoveMember { id: 2 }), &mut kept).unwrap();
        leader.process(&mut kept).unwrap();
        assert_eq!(leader.core().last_index(), last_index + 1);
    }

    #[test]
    fn a_change_that_was_begun_goes_on_when_it_is_asked_for_again_and_is_never_refused() {
        let (mut leader, mut kept) = leader_of(&founders(1), &[]);
        let term = leader.core().term();
        let ask = |sequence, request| PeerMessage::AdminForward { term, id: id(2, sequence), request };
        let add = |sequence, id: NodeId| {
            let url = format!("http://127.0.0.1:1238{id}");
            ask(sequence, AdminRequest::AddMember { id, url, voter: Some(true) })
        };
        let tell = |leader: &mut Replica<u32>, kept: &mut Kept, message| {
            leader.peer(2, message, kept).unwrap();
            while leader.process(kept).unwrap() {}
            let sent = std::mem::take(&mut kept.sent).into_iter();
            let answers = sent.filter_map(|(_, message)| match message {
                PeerMessage::AdminAnswer { id, outcome } => Some((id.sequence, outcome)),
                _ => None,
            });
            answers.collect::<Vec<_>>()
        };
        let silence = |leader: &mut Replica<u32>, kept: &mut Kept| {
            for _ in 0..=2 * ELECTION_TICKS {
                leader.tick(Duration::ZERO, kept);
                while leader.process(kept).unwrap() {}
            }
        };
        // Added as a learner, it does not catch up, and nobody asks any more.
        assert_eq!(tell(&mut leader, &mut kept, add(1, 5)), []);
        assert!(leader.core().membership().members.contains_key(&5));
        silence(&mut leader, &mut kept);
        // It goes on, and is still the one that others have to wait for.
        assert_eq!(tell(&mut leader, &mut kept, add(1, 5)), []);
        let refused = tell(&mut leader, &mut kept, add(2, 6));
        assert!(matches!(&refused[..], [(2, AdminOutcome::Refused(_))]), "{refused:?}");
        silence(&mut leader, &mut kept);
        // Behind another one it can't go on; that it was not done would be a lie.
        assert_eq!(tell(&mut leader, &mut kept, add(3, 7)), []);
        assert_eq!(tell(&mut leader, &mut kept, add(1, 5)), [(1, AdminOutcome::Unknown)]);
        assert_eq!(tell(&mut leader, &mut kept, add(1, 5)), [(1, AdminOutcome::Unknown)], "again");
    }

    #[test]
    fn a_confirmed_read_whose_index_does_not_come_is_refused_at_its_deadline() {
        let (mut replica, mut kept) = follower();
        let second = Duration::from_secs(1);
        replica.read(second, 1, &mut kept);
        replica.read(2 * second, 2, &mut kept);
        replica.process(&mut kept).unwrap();
        let asked = std::mem::take(&mut kept.sent).into_iter().find_map(|(_, message)| match message {
            PeerMessage::Raft(message) if message.msg_type == MessageType::MsgReadIndex => Some(message),
            _ => None,
        });
        let mut answer = asked.expect("a follower asks its leader");
        (answer.msg_type, answer.from, answer.to) = (MessageType::MsgReadIndexResp, 2, 1);
        // Far behind what this node has: a snapshot is on its way, say.
        (answer.term, answer.index) = (5, 1000);
        replica.peer(2, PeerMessage::Raft(answer), &mut kept).unwrap();
        replica.process(&mut kept).unwrap();
        assert!(replica.reads.waiting.is_empty() && replica.reads.confirmed.len() == 1);
        for (now, answered) in [(second / 2, 0), (second, 1), (second * 3 / 2, 1), (2 * second, 2)] {
            replica.tick(now, &mut kept);
            assert_eq!(kept.answers.len(), answered, "at {now:?}");
        }
        assert_eq!(kept.answers, [(1, Answer::Read(Refusal::NoLeader)), (2, Answer::Read(Refusal::NoLeader))]);
        assert!(replica.is_idle() && kept.applied.iter().all(|apply| !matches!(apply, Apply::Reads(_))));
    }

    #[test]
    fn entries_behind_a_snapshot_are_kept_for_the_follower_that_is_sent_it_up_to_a_bound() {
        let last = FOUNDING_INDEX + HELD_BACK_ENTRIES_MAX + 1000;
        let entry = |index| Entry { index, term: FOUNDING_TERM, ..Entry::default() };
        let entries: Vec<Entry> = (FOUNDING_INDEX + 1..=last).map(entry).collect();
        let membership = voter_and_learner();
        let (mut leader, mut kept) = leader_of(&membership, &entries);
        // The learner has nothing at all, and the log begins behind the founding state: it is sent that as a snapshot.
        let (term, last_index) = (leader.core().term(), leader.core().last_index());
        let mut nothing =
            Message { msg_type: MessageType::MsgAppendResponse, from: 2, to: 1, term, ..Message::default() };
        (nothing.index, nothing.reject, nothing.reject_hint) = (last_index - 1, true, 0);
        leader.peer(2, PeerMessage::Raft(nothing), &mut kept).unwrap();
        leader.process(&mut kept).unwrap();
        assert_eq!(kept.snapshots, [2]);

        let membership = Arc::new(membership);
        let compact_to = |leader: &mut Replica<u32>, index| {
            leader.snapshot_written(index, membership.clone(), index).unwrap();
            leader.core().log().first_index()
        };
        assert_eq!(compact_to(&mut leader, 100), FOUNDING_INDEX + 1, "what it needs next is kept");
        let bound = |index| index - HELD_BACK_ENTRIES_MAX + 1;
        assert_eq!(compact_to(&mut leader, last - 500), bound(last - 500), "but not without end");
        leader.snapshot_sent(2, true);
        assert_eq!(compact_to(&mut leader, last - 400), bound(last - 400), "it has to load it");
        for _ in 0..=RESTORING_ELECTION_TIMEOUTS * ELECTION_TICKS as u64 {
            leader.tick(Duration::ZERO, &mut kept);
        }
        assert_eq!(compact_to(&mut leader, last - 300), last - 300 + 1, "and no longer than that takes");
    }
}
