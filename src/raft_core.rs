//! The Raft rules: a [`RawNode`] with its log, and nothing else.
//!
//! No thread, channel, socket, clock or source of randomness is used here: messages and ticks come in as calls, and
//! what is left to do goes out through [`Output`]. So a test can drive five of these through a partition in
//! milliseconds, and the rules that must hold stand in one place:
//!
//! * **Order** ([`RaftCore::process_ready`]): a leader's messages may leave before its own sync (Raft thesis 10.2.1);
//!   entries, term and vote are written in one batch and synced; only then do the messages leave that speak of them
//!   (votes and append responses: raft's `persisted_messages`). What is committed by then is handed out before the
//!   sync: raft hands out only what is on this node's disk already (crate file `raft_log.rs`, `next_entries_since`), so
//!   whoever waits for it need not wait for what comes behind. Changes of the configuration come after the sync.
//! * **Commits are told with what is said anyway**: the next append. Raft by itself would send each
//!   follower another message for each commit, and be answered. Only the followers where somebody may wait for it,
//!   because the entry came from there, are told at once, and all of them if one is told a read index. The others are
//!   told by [`RaftCore::announce_commit`], which the caller owes within moments while [`RaftCore::owes_commit`].
//! * **Applied means handed out.** Raft's applied index is what [`Output::committed`] has received, in log order.
//!   The membership is applied here, as its entries are handed out; the keys by whoever consumes the output, in the
//!   same order. A read index may be answered once the consumer has applied up to it.
//! * **Type before emptiness**: an entry that leaves a joint configuration has no data, just as a new leader's no-op
//!   has none; they are told apart by their type.
//! * **Nothing from a peer reaches raft unchecked** ([`crate::message_check`]): the crate panics on many of them.

use std::cell::Cell;
use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::io;
use std::sync::Arc;

use bytes::Bytes;
use raft::eraftpb::{ConfChangeV2, ConfState, Entry, EntryType, HardState, Message, MessageType, Snapshot};
use raft::{
    Config, GetEntriesContext, RaftState, RawNode, ReadOnlyOption, SnapshotStatus, StateRole, Storage, StorageError,
};

use crate::codec::Malformed;
use crate::command::{Command, CommandError, Kind, RequestId};
use crate::fail_point::fail_point;
use crate::membership::{Membership, NodeId};
use crate::membership_change::MembershipChange;
use crate::message_check::{self, Offence, View};
use crate::raft_log::{Batch, LogError, Marker, RaftLog};
use crate::random::SplitMix64;
use crate::store::Replacement;

/// The index at which every founder's log begins. Not zero, so that a joiner, which starts at zero, is sent a
/// snapshot with the founding members rather than a log that never names them.
pub const FOUNDING_INDEX: u64 = 1;

/// The term of the founding state.
pub const FOUNDING_TERM: u64 = 1;

/// Entries of one append message, in bytes. Raft's own default of 0 means one entry per message.
pub const APPEND_BYTES_MAX: u64 = 1 << 20;

/// Append messages on their way to one follower before the leader waits for an answer.
/// Times [`APPEND_BYTES_MAX`] it fits the queue to that follower.
pub const APPENDS_IN_FLIGHT_MAX: usize = 48;

/// Bytes of entries that a leader takes before the first of them is committed. Beyond it proposals are dropped, and
/// proposed again at the next tick until their deadline. Above four of the largest values a request can carry.
pub const UNCOMMITTED_BYTES_MAX: u64 = 128 << 20;

/// Bytes of committed entries that raft hands out at once: about one of the largest values a request can carry, and
/// far more than an ordinary turn commits. A Ready has them twice, before and behind its own entries are written.
pub const COMMITTED_BYTES_MAX: u64 = 16 << 20;

/// Readies that one call of [`RaftCore::process_ready`] works off: usually there are one or two.
pub const READIES_MAX: usize = 4;

/// Where a [`RaftCore`] puts what is left to do. Called in an order that keeps Raft's promises; the receiver keeps
/// the order of `committed` calls, and may lose any message.
pub trait Output {
    /// Send a message, or drop it. Never blocks.
    fn send(&mut self, message: Message);
    /// Apply this, behind all that came before.
    fn committed(&mut self, committed: Committed);
    /// A read index was confirmed by a quorum: whoever asked with this context may read once `index` is applied.
    fn read_index(&mut self, context: Vec<u8>, index: u64);
    /// The disk comes next, which takes long: what was put out so far, up to this index, should not wait for it.
    fn before_sync(&mut self, _handed_out: u64) {}
}

/// Something to apply.
#[derive(Debug)]
pub enum Committed {
    /// A client's command.
    Command {
        /// The log index.
        index: u64,
        /// The entry's term.
        term: u64,
        /// Who asked.
        id: RequestId,
        /// The encoded [`Command`].
        command: Bytes,
    },
    /// An entry without effect on the keys: a new leader's no-op.
    Nothing {
        /// The log index.
        index: u64,
        /// The entry's term.
        term: u64,
    },
    /// A change of the membership, already applied to the core.
    Membership {
        /// The log index.
        index: u64,
        /// The entry's term.
        term: u64,
        /// Who asked; `None` for the entry that leaves a joint configuration.
        id: Option<RequestId>,
        /// The membership from here on.
        membership: Arc<Membership>,
        /// Why the change was made a no-op, on every node alike.
        refused: Option<String>,
    },
    /// A received snapshot took the place of the log up to its index. Its file is on disk.
    Restore {
        /// The snapshot's index.
        index: u64,
        /// The membership that it holds.
        membership: Arc<Membership>,
        /// The state that it holds.
        state: Box<Replacement>,
    },
}

/// Why the core can't go on. All of these end the node.
#[derive(Debug)]
pub enum CoreError {
    /// A failed write, a failed sync, or a log that can't be read back.
    Log(Box<LogError>),
    /// raft refused its configuration or state.
    Raft(raft::Error),
    /// A committed entry that this version can't read.
    Entry {
        /// The log index.
        index: u64,
        /// What is wrong with it.
        reason: String,
    },
    /// A leader says that entries are committed which this node acknowledged and no longer has.
    LostLog {
        /// The leader.
        from: NodeId,
        /// The index it says is committed.
        commit: u64,
        /// This node's last index.
        last_index: u64,
    },
}

impl fmt::Display for CoreError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            CoreError::Log(source) if is_full(source) => {
                write!(f, "{source}; free some space and start the node again: nothing acknowledged is lost")
            }
            CoreError::Log(source) => write!(f, "{source}"),
            CoreError::Raft(source) => write!(f, "raft refused its state: {source}"),
            CoreError::Entry { index, reason } => write!(
                f,
                "failed to read the committed entry {index}: {reason}; a newer version wrote it: start that one"
            ),
            CoreError::LostLog { from, commit, last_index } => write!(
                f,
                "this node lost part of its log: member {from} has committed index {commit} with this node's help, \
                 and the log here ends at {last_index}; remove this member and add it again under a new id with an \
                 empty data directory"
            ),
        }
    }
}

fn is_full(error: &LogError) -> bool {
    matches!(error, LogError::Io { source, .. } if source.kind() == io::ErrorKind::StorageFull)
}

impl std::error::Error for CoreError {}

impl From<LogError> for CoreError {
    fn from(source: LogError) -> Self {
        CoreError::Log(Box::new(source))
    }
}

impl From<raft::Error> for CoreError {
    fn from(source: raft::Error) -> Self {
        CoreError::Raft(source)
    }
}

/// What a core is opened with.
pub struct CoreOptions {
    /// This node.
    pub id: NodeId,
    /// Ticks without a leader before an election; a leader's tick is one heartbeat.
    pub election_ticks: usize,
    /// Seeds the election timeouts, which lie between one and two `election_ticks`.
    pub election_seed: u64,
    /// The membership of the snapshot that the log continues.
    pub membership: Arc<Membership>,
    /// The index of that snapshot: everything behind it is handed out again.
    pub snapshot_index: u64,
    /// Receives raft's own log lines.
    pub logger: slog::Logger,
}

/// A snapshot that raft has taken and not put out yet.
struct Incoming {
    index: u64,
    membership: Arc<Membership>,
    state: Box<Replacement>,
}

/// One Raft participant with its log.
pub struct RaftCore {
    raw: RawNode<LogStorage>,
    membership: Arc<Membership>,
    handed_out: u64,
    election_ticks: usize,
    election_timeout: usize,
    random: SplitMix64,
    followed: Option<(u64, StateRole, NodeId)>,
    written: HardState,
    incoming: Option<Incoming>,
    removed: bool,
    /// The commit index that all followers were told, or will be by what is on its way.
    announced: u64,
    /// On which other nodes somebody may wait for an entry, and which of them know more.
    awaited_elsewhere: BTreeMap<NodeId, Awaited>,
}

/// What somebody on another node may wait for.
#[derive(Default)]
struct Awaited {
    /// The last of those entries, or one behind it.
    last: u64,
    /// The commit index that the node was told, if that is above what all were.
    told: u64,
}

impl RaftCore {
    /// Continues `log` behind the snapshot named in `options`.
    pub fn open(log: RaftLog, options: CoreOptions) -> Result<RaftCore, CoreError> {
        let CoreOptions { id, election_ticks, election_seed, membership, snapshot_index, logger } = options;
        let config = Config {
            id,
            election_tick: election_ticks,
            heartbeat_tick: 1,
            applied: snapshot_index,
            max_size_per_msg: APPEND_BYTES_MAX,
            max_inflight_msgs: APPENDS_IN_FLIGHT_MAX,
            check_quorum: true,
            pre_vote: true,
            // Raft would draw its timeouts from the thread's generator; see `draw_election_timeout`.
            min_election_tick: election_ticks,
            max_election_tick: 2 * election_ticks,
            read_only_option: ReadOnlyOption::Safe,
            // See `announce_commit`. Raft itself still tells of changes of the configuration at once.
            skip_bcast_commit: true,
            batch_append: false,
            priority: 0,
            max_uncommitted_size: UNCOMMITTED_BYTES_MAX,
            max_committed_size_per_ready: COMMITTED_BYTES_MAX,
        };
        let mut written = log.hard_state().clone();
        // The commit index is not synced on its own; a snapshot's index is committed by definition.
        written.commit = written.commit.max(snapshot_index);
        let storage = LogStorage {
            log,
            hard_state: written.clone(),
            conf_state: membership.conf_state.clone(),
            snapshot: SnapshotLabel { index: snapshot_index, membership: membership.clone() },
            snapshot_wanted: Cell::new(false),
        };
        let raw = RawNode::new(&config, storage, &logger)?;
        let removed = membership.removed.contains(&id);
        let mut core = RaftCore {
            raw,
            membership,
            handed_out: snapshot_index,
            election_ticks,
            election_timeout: election_ticks,
            random: SplitMix64::new(election_seed),
            followed: None,
            written,
            incoming: None,
            removed,
            announced: 0,
            awaited_elsewhere: BTreeMap::new(),
        };
        core.draw_election_timeout();
        Ok(core)
    }

    /// One heartbeat interval has passed.
    pub fn tick(&mut self) {
        self.raw.tick();
        self.draw_election_timeout();
    }

    /// Takes a message from a peer. An offending one is returned and has changed nothing.
    pub fn step(&mut self, message: Message) -> Result<Result<(), Offence>, CoreError> {
        let raft = &self.raw.raft;
        let term_of = |index| message_check::term_of(raft, index);
        let view = View::of(raft, &self.membership, &term_of);
        match message_check::check(&message, &view) {
            Ok(()) => {}
            Err(Offence::LostLog { from, commit, last_index }) => {
                return Err(CoreError::LostLog { from, commit, last_index });
            }
            Err(offence) => return Ok(Err(offence)),
        }
        if message.msg_type == MessageType::MsgReadIndex && !self.is_leader() {
            // Raft would pass it on to the leader in the name of who asked, and the transport takes from a node only
            // what is its own. Whoever asked will ask the new leader.
            return Ok(Ok(()));
        }
        let result = self.raw.step(message);
        self.draw_election_timeout();
        match result {
            // A response from a node that was removed meanwhile, or a proposal that can't be taken now: ordinary.
            Ok(()) | Err(raft::Error::StepPeerNotFound | raft::Error::ProposalDropped) => Ok(Ok(())),
            Err(source) => Err(source.into()),
        }
    }

    /// Takes the message that announces a snapshot whose file, with this membership and state, is complete and durable
    /// here. Raft may still have no use for it; otherwise [`Committed::Restore`] follows.
    pub fn step_snapshot(
        &mut self,
        message: Message,
        membership: Arc<Membership>,
        state: Box<Replacement>,
    ) -> Result<Result<(), Offence>, CoreError> {
        let index = message.get_snapshot().get_metadata().index;
        let stepped = self.step(message)?;
        // One that raft has no use for must not take the place of an earlier one that it has taken and not yet put out.
        if stepped.is_ok() && self.raw.snap().is_some_and(|taken| taken.get_metadata().index == index) {
            self.incoming = Some(Incoming { index, membership, state });
        }
        Ok(stepped)
    }

    /// Appends `commands` to the log, all or none, if this node leads and can take them. They are surely in no log
    /// if it answers false.
    pub fn propose(&mut self, commands: Vec<(RequestId, Bytes)>) -> bool {
        let elsewhere: BTreeSet<NodeId> =
            commands.iter().map(|(id, _)| id.node).filter(|node| *node != self.id()).collect();
        let entries = commands.into_iter().map(|(id, data)| Entry {
            context: Bytes::copy_from_slice(&id.encode()),
            data,
            ..Entry::default()
        });
        let is_taken = self.propose_entries(entries.collect());
        if is_taken {
            let last = self.last_index();
            for node in elsewhere {
                self.awaited_elsewhere.entry(node).or_default().last = last;
            }
        }
        is_taken
    }

    /// Proposes a change of the membership. `Err` says why it is refused; it is then in no log.
    pub fn propose_membership(&mut self, id: RequestId, change: &MembershipChange) -> Result<(), String> {
        if !self.is_leader() {
            return Err("this node does not lead".to_owned());
        }
        if self.raw.raft.has_pending_conf() || self.membership.is_joint() {
            return Err("another change of the membership is in progress; try again when it is done".to_owned());
        }
        let mut conf_change = self.membership.conf_change(change)?;
        conf_change.context = Bytes::from(change.encode());
        let entry = Entry {
            entry_type: EntryType::EntryConfChangeV2,
            context: Bytes::copy_from_slice(&id.encode()),
            data: Bytes::from(protobuf::Message::write_to_bytes(&conf_change).expect("a message in memory encodes")),
            ..Entry::default()
        };
        // Raft turns a change that it can't take now into an empty normal entry, without a word: `has_pending_conf`
        // and `is_joint` above are all its reasons.
        if self.propose_entries(vec![entry]) { Ok(()) } else { Err("leadership is being handed over".to_owned()) }
    }

    /// Proposes to end a joint configuration: raft's own leader does so by itself, unless it changed in between.
    pub fn propose_leave_joint(&mut self) {
        let entry = Entry { entry_type: EntryType::EntryConfChangeV2, ..Entry::default() };
        // Dropped, it is proposed again later.
        let _ = self.propose_entries(vec![entry]);
    }

    /// Whether a change of the configuration is in the log and not applied yet, as far as the leader knows.
    pub fn has_pending_change(&self) -> bool {
        self.raw.raft.has_pending_conf()
    }

    fn propose_entries(&mut self, entries: Vec<Entry>) -> bool {
        if !self.is_leader() || entries.is_empty() {
            return false;
        }
        let mut message = Message { msg_type: MessageType::MsgPropose, from: self.raw.raft.id, ..Message::default() };
        message.set_entries(entries.into());
        let is_taken = self.raw.step(message).is_ok();
        if is_taken {
            // With the appends.
            self.announced = self.commit_index();
        }
        is_taken
    }

    /// Whether this node leads and has committed more than it has told its followers. Unless it proposes something that
    /// tells them, [`Self::announce_commit`] should do so soon: their readers see nothing newer until then. A heartbeat
    /// does not pay this debt: to a follower whose answer to an append is still on its way it tells less.
    pub fn owes_commit(&self) -> bool {
        let has_followers = || self.raw.raft.prs().iter().any(|(id, _)| *id != self.id());
        self.is_leader() && self.commit_index() > self.announced && has_followers()
    }

    /// Tells the followers what is committed, if they don't know. Left out, one of the next heartbeats tells them.
    pub fn announce_commit(&mut self) {
        self.tell_commit(true);
    }

    /// Tells what is committed to the followers that have not been told, or only to those of them on which somebody may wait
    /// for it: the others hear of it with the next append, or by [`Self::announce_commit`].
    fn tell_commit(&mut self, to_all: bool) {
        let announced = self.announced;
        let is_awaited = || self.awaited_elsewhere.values().any(|awaited| awaited.last > awaited.told.max(announced));
        if !self.owes_commit() || !(to_all || is_awaited()) {
            return;
        }
        let (commit, raft) = (self.commit_index(), &mut self.raw.raft);
        let followers: Vec<NodeId> = raft.prs().iter().map(|(node, _)| *node).filter(|node| *node != raft.id).collect();
        // A node that is a member no more cannot be told anything.
        self.awaited_elsewhere.retain(|node, _| followers.contains(node));
        let mut are_all_told = true;
        for node in followers {
            let awaited = self.awaited_elsewhere.entry(node).or_default();
            let told = awaited.told.max(announced);
            if told < commit && (to_all || awaited.last > told) {
                // Raft says nothing to a follower that it holds back from, which is told when all are.
                let is_held_back = raft.prs().get(node).is_none_or(|progress| progress.is_paused());
                raft.send_append(node);
                if to_all || !is_held_back {
                    awaited.told = commit;
                }
            }
            are_all_told &= awaited.told.max(announced) == commit;
        }
        if are_all_told {
            self.announced = commit;
        }
    }

    /// Asks a quorum for a read index. Raft drops the request without a word when there is no leader, when the
    /// leader has committed nothing in its term yet, or when a message is lost: ask again, with a NEW context.
    pub fn read_index(&mut self, context: Vec<u8>) {
        self.raw.read_index(context);
    }

    /// Whether asking for a read index can succeed now, as far as this node knows.
    pub fn can_read_index(&self) -> bool {
        let raft = &self.raw.raft;
        match raft.state {
            StateRole::Leader => raft.commit_to_current_term(),
            _ => raft.leader_id != raft::INVALID_ID,
        }
    }

    /// Starts an election now, if this node votes. Only useful for a single voter, who has nobody to wait for.
    pub fn campaign(&mut self) {
        // An error says that an election makes no sense now, and then none is started.
        let _ = self.raw.campaign();
        self.draw_election_timeout();
    }

    /// Starts to hand leadership to `to`; raft gives up after one election timeout. Proposals are dropped meanwhile.
    pub fn transfer_leader(&mut self, to: NodeId) {
        self.raw.transfer_leader(to);
    }

    /// The transport failed to deliver to `id`: raft probes it instead of sending optimistically.
    pub fn report_unreachable(&mut self, id: NodeId) {
        self.raw.report_unreachable(id);
    }

    /// How sending a snapshot to `id` ended. Without it raft would never send to that follower again.
    pub fn report_snapshot(&mut self, id: NodeId, delivered: bool) {
        self.raw.report_snapshot(id, if delivered { SnapshotStatus::Finish } else { SnapshotStatus::Failure });
    }

    /// Whether [`Self::process_ready`] has anything to do.
    pub fn has_ready(&self) -> bool {
        self.raw.has_ready()
    }

    /// Persists what raft has made of all calls since the last one, and puts out what is left to do.
    ///
    /// While [`Self::has_ready`], there is more: a caller that waits for an event first would lose time. One call stops
    /// at the first Ready that brings what it has handed out to [`COMMITTED_BYTES_MAX`], so that a long log that is read
    /// back at a start does not come all at once: it hands out below three times that. Returns these bytes. An error
    /// ends the node: nothing that depends on the failed write has left it.
    pub fn process_ready(&mut self, output: &mut impl Output) -> Result<u64, CoreError> {
        let mut bytes = 0;
        for _ in 0..READIES_MAX {
            if bytes >= COMMITTED_BYTES_MAX || !self.has_ready() {
                break;
            }
            bytes += self.process_one(output)?;
        }
        Ok(bytes)
    }

    /// Works off one Ready; the bytes of the entries that it handed out.
    fn process_one(&mut self, output: &mut impl Output) -> Result<u64, CoreError> {
        // A follower that is told a read index needs the commit index too.
        let tells_read_index = |message: &Message| message.msg_type == MessageType::MsgReadIndexResp;
        let to_all = self.raw.raft.msgs.iter().any(tells_read_index);
        self.tell_commit(to_all);
        let mut ready = self.raw.ready();
        // A single voter becomes leader within one Ready: the term that its messages speak of is not written yet.
        let promises = ready.hs().is_some_and(|new| (new.term, new.vote) != (self.written.term, self.written.vote));
        let mut early = ready.take_messages();
        if !promises {
            early.drain(..).for_each(|message| output.send(message));
        }
        let mut committed = ready.take_committed_entries();
        let changes_from = committed.iter().position(is_configuration).unwrap_or(committed.len());
        let behind = committed.split_off(changes_from);
        let mut bytes = self.hand_out_all(committed, output)?;
        for state in ready.take_read_states() {
            output.read_index(state.request_ctx, state.index);
        }
        let restored = self.persist(&ready, output)?;
        early.into_iter().for_each(|message| output.send(message));
        for message in ready.take_persisted_messages() {
            output.send(message);
        }
        if let Some(Incoming { index, membership, state }) = restored {
            output.committed(Committed::Restore { index, membership, state });
        }
        let mut light = self.raw.advance_append(ready);
        for message in light.take_messages() {
            output.send(message);
        }
        // Changes of the configuration are applied only now: a leader that learns of its own removal would panic in
        // `advance_append`.
        bytes += self.hand_out_all(behind, output)?;
        bytes += self.hand_out_all(light.take_committed_entries(), output)?;
        self.raw.advance_apply_to(self.handed_out);
        self.draw_election_timeout();
        Ok(bytes)
    }

    /// Hands out committed entries in their order; their bytes.
    fn hand_out_all(&mut self, entries: Vec<Entry>, output: &mut impl Output) -> Result<u64, CoreError> {
        let mut bytes = 0;
        for entry in entries {
            bytes += (entry.data.len() + entry.context.len()) as u64;
            self.handed_out = entry.index;
            self.hand_out(entry, output)?;
        }
        Ok(bytes)
    }

    /// Writes a Ready in one batch; returns the snapshot that it installed.
    fn persist(&mut self, ready: &raft::Ready, output: &mut impl Output) -> Result<Option<Incoming>, CoreError> {
        if let Some(hard_state) = ready.hs() {
            self.raw.mut_store().hard_state = hard_state.clone();
        }
        let snapshot = ready.snapshot().get_metadata();
        let marker = (snapshot.index != 0).then(|| Marker {
            index: snapshot.index,
            term: snapshot.term,
            conf_state: snapshot.get_conf_state().clone(),
        });
        if !ready.must_sync() && marker.is_none() && ready.entries().is_empty() {
            return Ok(None);
        }
        output.before_sync(self.handed_out);
        let hard_state = self.hard_state_with(0);
        let storage = self.raw.mut_store();
        let changed = (hard_state != self.written).then_some(&hard_state);
        match &marker {
            Some(marker) => {
                fail_point("install-before");
                storage.log.install_marker(marker, ready.entries(), changed)?;
                fail_point("install-after");
            }
            None => {
                fail_point("log-write-before");
                storage.log.write(&Batch { marker: None, entries: ready.entries(), hard_state: changed }, true)?;
                fail_point("log-write-after");
            }
        }
        self.written = hard_state;
        let Some(Marker { index, .. }) = marker else { return Ok(None) };
        let incoming = self.incoming.take().expect("a snapshot is stepped through `step_snapshot`");
        assert_eq!(incoming.index, index, "raft installs the snapshot that was stepped last");
        self.raw.mut_store().snapshot = SnapshotLabel { index, membership: incoming.membership.clone() };
        self.membership = incoming.membership.clone();
        self.handed_out = index;
        Ok(Some(incoming))
    }

    fn hand_out(&mut self, entry: Entry, output: &mut impl Output) -> Result<(), CoreError> {
        let (index, term) = (entry.index, entry.term);
        let malformed = |reason: Malformed| CoreError::Entry { index, reason: reason.to_string() };
        let id = match entry.context.is_empty() {
            true => None,
            false => Some(RequestId::decode(&entry.context).map_err(malformed)?),
        };
        match (entry.entry_type, id) {
            (EntryType::EntryConfChangeV2 | EntryType::EntryConfChange, id) => {
                let refused = self.apply_conf_change(&entry).map_err(malformed)?;
                if refused.is_none() {
                    self.persist_commit(index)?;
                }
                self.put_membership(index, term, id, refused, output);
            }
            (EntryType::EntryNormal, None) => output.committed(Committed::Nothing { index, term }),
            (EntryType::EntryNormal, Some(id)) => match record_directory(&entry.data) {
                Some(Ok((member, directory))) => {
                    let membership = self.membership.with_directory(member, directory);
                    let refused = membership.map(|next| self.membership = Arc::new(next)).err();
                    self.put_membership(index, term, Some(id), refused, output);
                }
                Some(Err(error)) => return Err(CoreError::Entry { index, reason: error.to_string() }),
                None => output.committed(Committed::Command { index, term, id, command: entry.data }),
            },
        }
        Ok(())
    }

    /// Writes down that a change of the configuration is committed, before anybody is told. Otherwise a restart could
    /// go back to voters who have left for good, and wait for their votes for ever.
    fn persist_commit(&mut self, index: u64) -> Result<(), CoreError> {
        if self.written.commit >= index {
            return Ok(());
        }
        let hard_state = self.hard_state_with(index);
        let batch = Batch { marker: None, entries: &[], hard_state: Some(&hard_state) };
        self.raw.mut_store().log.write(&batch, true)?;
        self.written = hard_state;
        Ok(())
    }

    /// The hard state to write next, with everything up to `commit` committed. Never behind what was written: raft's
    /// own copy of the commit index can be.
    fn hard_state_with(&self, commit: u64) -> HardState {
        let mut hard_state = self.raw.store().hard_state.clone();
        hard_state.commit = hard_state.commit.max(self.written.commit).max(commit);
        hard_state
    }

    fn put_membership(
        &mut self,
        index: u64,
        term: u64,
        id: Option<RequestId>,
        refused: Option<String>,
        output: &mut impl Output,
    ) {
        let membership = self.membership.clone();
        self.removed = membership.removed.contains(&self.id());
        output.committed(Committed::Membership { index, term, id, membership, refused });
    }

    /// Applies a committed configuration entry, or says why it is a no-op. Every node decides alike, from the log.
    fn apply_conf_change(&mut self, entry: &Entry) -> Result<Option<String>, Malformed> {
        let conf_change: ConfChangeV2 = protobuf::Message::parse_from_carllerche_bytes(&entry.data)
            .map_err(|_| Malformed("configuration change"))?;
        let change = if conf_change.context.is_empty() {
            MembershipChange::LeaveJoint
        } else {
            MembershipChange::decode(&conf_change.context)?
        };
        // Raft is told what follows from the change here and now, not what its proposer thought.
        let conf_change = match self.membership.conf_change(&change) {
            Ok(conf_change) => conf_change,
            Err(reason) => return Ok(Some(reason)),
        };
        // "removed all voters" and the like can be found only here, after the commit, and on every node.
        Ok(match self.raw.apply_conf_change(&conf_change) {
            Ok(conf_state) => {
                self.membership = Arc::new(self.membership.after(&change, conf_state));
                // Raft leaves a leader in office that has no vote any more, where it would only drop proposals.
                if self.is_leader() && !self.membership.is_voter(self.id()) {
                    let term = self.term();
                    self.raw.raft.become_follower(term, raft::INVALID_ID);
                }
                None
            }
            Err(error) => Some(error.to_string()),
        })
    }

    /// A snapshot of this index is on disk: marks it in the log, so that a restart begins there, and drops the log up
    /// to `compact_to`, which is at most the snapshot's index. One that is not newer than the newest that the log names
    /// is of no use, and nothing happens: [`Self::snapshot_index`] tells.
    pub fn snapshot_written(
        &mut self,
        index: u64,
        membership: Arc<Membership>,
        compact_to: u64,
    ) -> Result<(), CoreError> {
        assert!(index <= self.handed_out, "a snapshot holds only what was handed out");
        let storage = self.raw.mut_store();
        // The log names a newer one than is in use if that was damaged at the start, and an older one took its place.
        let newest_marker = storage.log.marker().index;
        if index <= storage.snapshot.index || index < newest_marker {
            return Ok(());
        }
        let term = storage.term(index)?;
        let marker = Marker { index, term, conf_state: membership.conf_state.clone() };
        let hard_state = self.hard_state_with(index);
        let storage = self.raw.mut_store();
        fail_point("snapshot-marker-before");
        storage.log.write(&Batch { marker: Some(&marker), entries: &[], hard_state: Some(&hard_state) }, true)?;
        fail_point("snapshot-marker-after");
        self.written = hard_state;
        storage.snapshot = SnapshotLabel { index, membership };
        storage.snapshot_wanted.set(false);
        fail_point("log-compact-before");
        storage.log.compact_to(compact_to.min(index))?;
        fail_point("log-compact-after");
        Ok(())
    }

    /// Whether a follower needs a snapshot newer than the newest; cleared by asking.
    pub fn take_snapshot_wanted(&mut self) -> bool {
        self.raw.store().snapshot_wanted.replace(false)
    }

    /// Puts a timeout from our own seed in the place of raft's, whenever raft has drawn a new one: that is when term,
    /// role or leader changed. Called after every call that could have changed them, so raft's own is never in force.
    fn draw_election_timeout(&mut self) {
        let raft = &mut self.raw.raft;
        let followed = (raft.term, raft.state, raft.leader_id);
        if self.followed != Some(followed) {
            self.followed = Some(followed);
            let extra = self.random.below(self.election_ticks as u64);
            self.election_timeout = self.election_ticks + extra as usize;
            if raft.state == StateRole::Leader {
                // What earlier leaders have left in the log came from anywhere.
                let last = raft.raft_log.last_index();
                let others = raft.prs().iter().map(|(node, _)| *node).filter(|node| *node != raft.id);
                self.awaited_elsewhere = others.map(|node| (node, Awaited { last, told: 0 })).collect();
            }
        }
        raft.set_randomized_election_timeout(self.election_timeout);
    }

    /// This node's id.
    pub fn id(&self) -> NodeId {
        self.raw.raft.id
    }

    /// Whether this node has applied its own removal. It still votes and answers, until others know it too: one of
    /// them may have to be elected by those who are about to leave before it can tell.
    pub fn is_removed(&self) -> bool {
        self.removed
    }

    /// Whether this node leads, as far as it knows.
    pub fn is_leader(&self) -> bool {
        self.raw.raft.state == StateRole::Leader
    }

    /// Whether leadership is being handed over.
    pub fn is_transferring(&self) -> bool {
        self.raw.raft.lead_transferee.is_some()
    }

    /// Raft's role.
    pub fn role(&self) -> StateRole {
        self.raw.raft.state
    }

    /// The leader this node follows, or 0.
    pub fn leader(&self) -> NodeId {
        self.raw.raft.leader_id
    }

    /// The current term.
    pub fn term(&self) -> u64 {
        self.raw.raft.term
    }

    /// The highest index known to be committed.
    pub fn commit_index(&self) -> u64 {
        self.raw.raft.raft_log.committed
    }

    /// The highest index handed out.
    pub fn handed_out(&self) -> u64 {
        self.handed_out
    }

    /// The last index of the log, written or not.
    pub fn last_index(&self) -> u64 {
        self.raw.raft.raft_log.last_index()
    }

    /// The newest snapshot's index.
    pub fn snapshot_index(&self) -> u64 {
        self.raw.store().snapshot.index
    }

    /// The log on disk.
    pub fn log(&self) -> &RaftLog {
        &self.raw.store().log
    }

    /// The membership as handed out.
    pub fn membership(&self) -> &Arc<Membership> {
        &self.membership
    }

    /// What a leader knows of each member: id, match index, recently active, snapshot under way.
    pub fn progress(&self) -> Vec<(NodeId, u64, bool, bool)> {
        if !self.is_leader() {
            return Vec::new();
        }
        let describe = |(&id, progress): (&u64, &raft::Progress)| {
            (id, progress.matched, progress.recent_active, progress.state == raft::ProgressState::Snapshot)
        };
        let mut all: Vec<_> = self.raw.raft.prs().iter().map(describe).collect();
        all.sort_unstable();
        all
    }
}

/// Whether an entry changes the configuration.
fn is_configuration(entry: &Entry) -> bool {
    entry.entry_type != EntryType::EntryNormal
}

/// What a command says of the membership; `None` if it is about keys, or for the applier to refuse.
fn record_directory(command: &Bytes) -> Option<Result<(NodeId, u128), CommandError>> {
    if Command::kind_of(command) != Ok(Kind::RecordDirectory) {
        return None;
    }
    match Command::decode(command) {
        Ok(Command::RecordDirectory { member, directory }) => Some(Ok((member, directory))),
        Ok(Command::Put { .. } | Command::Delete { .. }) => None,
        Err(error) => Some(Err(error)),
    }
}

/// The snapshot that is offered to followers.
struct SnapshotLabel {
    index: u64,
    membership: Arc<Membership>,
}

/// The log as raft reads it.
struct LogStorage {
    log: RaftLog,
    /// The newest hard state, whose commit index may be ahead of the disk.
    hard_state: HardState,
    /// The conf state of the snapshot that the log continued at start.
    conf_state: ConfState,
    snapshot: SnapshotLabel,
    /// A follower needs a newer snapshot than there is.
    snapshot_wanted: Cell<bool>,
}

impl Storage for LogStorage {
    fn initial_state(&self) -> raft::Result<RaftState> {
        Ok(RaftState { hard_state: self.hard_state.clone(), conf_state: self.conf_state.clone() })
    }

    fn entries(
        &self,
        low: u64,
        high: u64,
        max_size: impl Into<Option<u64>>,
        _context: GetEntriesContext,
    ) -> raft::Result<Vec<Entry>> {
        self.log.entries(low, high, max_size.into().unwrap_or(u64::MAX)).map_err(storage_error)
    }

    fn term(&self, index: u64) -> raft::Result<u64> {
        self.log.term(index).map_err(storage_error)
    }

    fn first_index(&self) -> raft::Result<u64> {
        Ok(self.log.first_index())
    }

    fn last_index(&self) -> raft::Result<u64> {
        Ok(self.log.last_index())
    }

    /// Offers the newest snapshot by its label only: the file travels by itself. Raft panics on any error but this
    /// one, and a receiver ignores a snapshot whose configuration does not contain it.
    fn snapshot(&self, request_index: u64, to: u64) -> raft::Result<Snapshot> {
        let SnapshotLabel { index, membership } = &self.snapshot;
        let contains_receiver = membership.members.contains_key(&to);
        let term = self.log.term(*index);
        match term {
            Ok(term) if *index != 0 && *index >= request_index && contains_receiver => {
                let mut snapshot = Snapshot::default();
                let metadata = snapshot.mut_metadata();
                metadata.index = *index;
                metadata.term = term;
                metadata.set_conf_state(membership.conf_state.clone());
                Ok(snapshot)
            }
            _ => {
                self.snapshot_wanted.set(true);
                Err(StorageError::SnapshotTemporarilyUnavailable.into())
            }
        }
    }
}

fn storage_error(error: crate::raft_log::ReadError) -> raft::Error {
    match error {
        crate::raft_log::ReadError::Compacted => StorageError::Compacted.into(),
        crate::raft_log::ReadError::Unavailable => StorageError::Unavailable.into(),
        // Raft has no way to pass this on but a panic, which the process's panic hook turns into its end.
        crate::raft_log::ReadError::Failed(error) => StorageError::Other(Box::new(error)).into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fixtures::{core_on, founders, log_on, voter_and_learner};
    use crate::memory_disk::{Failure, MemoryDisk, Operation};
    use crate::store::StateMachine;

    #[derive(Default)]
    struct Put {
        restored: Vec<u64>,
        handed_out: u64,
        sent: Vec<MessageType>,
    }

    impl Output for Put {
        fn send(&mut self, message: Message) {
            self.sent.push(message.msg_type);
        }

        fn committed(&mut self, committed: Committed) {
            match committed {
                Committed::Restore { index, .. } => self.restored.push(index),
                Committed::Command { index, .. }
                | Committed::Nothing { index, .. }
                | Committed::Membership { index, .. } => self.handed_out = index,
            }
        }

        fn read_index(&mut self, _context: Vec<u8>, _index: u64) {}
    }

    /// A core on a disk of its own.
    fn core(founders: &Membership) -> RaftCore {
        core_on(log_on(&MemoryDisk::new(), 1, founders), 1, founders)
    }

    fn announced(index: u64, membership: &Membership) -> Message {
        let mut message = Message { msg_type: MessageType::MsgSnapshot, from: 2, to: 1, term: 3, ..Message::default() };
        let metadata = message.mut_snapshot().mut_metadata();
        (metadata.index, metadata.term) = (index, 3);
        metadata.set_conf_state(membership.conf_state.clone());
        message
    }

    /// A state that nobody looks at.
    fn empty() -> Box<Replacement> {
        Box::new(Replacement::new(StateMachine::new(), drop))
    }

    #[test]
    fn of_snapshots_in_short_succession_the_newest_is_installed() {
        for (arrivals, installed) in [([20, 30], 30), ([30, 20], 30), ([20, 20], 20)] {
            let membership = Arc::new(founders(3));
            let mut core = core(&membership);
            for index in arrivals {
                // What raft has no use for is no offence.
                core.step_snapshot(announced(index, &membership), membership.clone(), empty()).unwrap().unwrap();
            }
            let mut put = Put::default();
            core.process_ready(&mut put).unwrap();
            assert_eq!(put.restored, [installed]);
            assert_eq!((core.snapshot_index(), core.log().marker().index), (installed, installed));
            // One of its own that was begun before, and one that comes late.
            core.snapshot_written(installed - 5, membership.clone(), 0).unwrap();
            core.step_snapshot(announced(10, &membership), membership.clone(), empty()).unwrap().unwrap();
            core.process_ready(&mut put).unwrap();
            assert_eq!((put.restored.len(), core.snapshot_index()), (1, installed));
        }
    }

    #[test]
    fn a_single_voter_says_nothing_in_a_term_that_is_not_on_disk() {
        // It is elected, appends and speaks to the learner, all in one Ready.
        let (disk, membership) = (MemoryDisk::new(), voter_and_learner());
        let mut core = core_on(log_on(&disk, 1, &membership), 1, &membership);
        core.campaign();
        assert!(core.is_leader());
        let mut put = Put::default();
        disk.fail(Some(Operation::Sync), 1, Failure::Error);
        core.process_ready(&mut put).expect_err("its term can't be written");
        assert_eq!(put.sent, []);
        // The same with a disk that works, or there would have been nothing to say.
        drop(core);
        disk.crash(1);
        let mut core = core_on(log_on(&disk, 1, &membership), 1, &membership);
        core.campaign();
        core.process_ready(&mut put).unwrap();
        assert!(put.sent.contains(&MessageType::MsgAppend), "{:?}", put.sent);
    }

    #[test]
    fn behind_an_older_snapshot_the_next_one_waits_for_the_newest_marker() {
        let membership = Arc::new(founders(1));
        let mut log = log_on(&MemoryDisk::new(), 1, &membership);
        let entry = |index| Entry { index, term: 1, ..Entry::default() };
        let entries: Vec<Entry> = (2..=30).map(entry).collect();
        let marker = Marker { index: 20, term: 1, conf_state: membership.conf_state.clone() };
        let hard_state = HardState { term: 1, vote: 0, commit: 30, ..HardState::default() };
        log.write(&Batch { marker: None, entries: &entries, hard_state: Some(&hard_state) }, true).unwrap();
        log.write(&Batch { marker: Some(&marker), entries: &[], hard_state: None }, true).unwrap();
        // The snapshot of 20 is damaged: the node has begun with that of the founding.
        let mut core = core_on(log, 1, &membership);
        let mut put = Put::default();
        core.process_ready(&mut put).unwrap();
        assert_eq!(put.handed_out, 30);
        core.snapshot_written(15, membership.clone(), 15).unwrap();
        assert_eq!((core.snapshot_index(), core.log().first_index()), (FOUNDING_INDEX, 2), "it may not be used");
        core.snapshot_written(25, membership, 25).unwrap();
        assert_eq!((core.snapshot_index(), core.log().first_index()), (25, 26));
    }
}

#[cfg(test)]
mod tests_of_several {
    use super::*;
    use crate::command::Condition;
    use crate::fixtures::{core_on, founders, log_on};
    use crate::memory_disk::{Failure, MemoryDisk, Operation};

    fn open(disk: &MemoryDisk, id: NodeId) -> RaftCore {
        core_on(log_on(disk, id, &founders(2)), id, &founders(2))
    }

    /// Takes messages, and what was handed out before a sync.
    #[derive(Default)]
    struct Sent(Vec<Message>, Vec<u64>);

    impl Output for Sent {
        fn send(&mut self, message: Message) {
            self.0.push(message);
        }

        fn committed(&mut self, _committed: Committed) {}

        fn read_index(&mut self, _context: Vec<u8>, _index: u64) {}

        fn before_sync(&mut self, handed_out: u64) {
            self.1.push(handed_out);
        }
    }

    /// Lets them talk until they have nothing more to say, or `enough`.
    fn talk<const COUNT: usize>(cores: &mut [RaftCore; COUNT], enough: impl Fn(&[RaftCore; COUNT]) -> bool) {
        loop {
            let mut sent = Sent::default();
            for core in cores.iter_mut() {
                core.process_ready(&mut sent).unwrap();
            }
            if sent.0.is_empty() || enough(cores) {
                return;
            }
            for message in sent.0 {
                let to = message.to as usize - 1;
                // What one says that has left meanwhile is refused, and that is no matter.
                let _ = cores[to].step(message).unwrap();
            }
        }
    }

    /// Two members on disks of their own, of which 1 leads.
    fn led_by_1() -> ([MemoryDisk; 2], [RaftCore; 2]) {
        let disks = [MemoryDisk::new(), MemoryDisk::new()];
        let mut cores = [open(&disks[0], 1), open(&disks[1], 2)];
        cores[0].campaign();
        talk(&mut cores, |_| false);
        assert!(cores[0].is_leader() && cores[1].leader() == 1);
        (disks, cores)
    }

    fn remove(core: &mut RaftCore, id: NodeId) {
        let request = RequestId { node: core.id(), boot: 1, sequence: 1 };
        core.propose_membership(request, &MembershipChange::Remove { id }).unwrap();
    }

    #[test]
    fn a_removal_is_on_disk_before_anyone_hears_of_it() {
        let (disks, mut cores) = led_by_1();
        remove(&mut cores[0], 2);
        talk(&mut cores, |cores| !cores[0].membership().is_voter(2));
        drop(cores);
        disks[0].crash(1);
        let mut alone = open(&disks[0], 1);
        alone.process_ready(&mut Sent::default()).unwrap();
        assert_eq!(alone.membership().conf_state.voters, [1], "it waits for the vote of a member that has left");
        alone.campaign();
        alone.process_ready(&mut Sent::default()).unwrap();
        assert!(alone.is_leader());
    }

    #[test]
    fn who_leaves_steps_down_and_elects_who_stays() {
        let (_disks, mut cores) = led_by_1();
        remove(&mut cores[0], 1);
        talk(&mut cores, |cores| cores[0].is_removed());
        assert!(cores[0].is_removed() && !cores[0].is_leader());
        assert!(cores[1].membership().is_voter(1), "2 was not told yet, and counts on its vote");
        // Until it has not heard from a leader for so long that others may lead.
        for _ in 0..20 {
            cores[0].tick();
            cores[0].process_ready(&mut Sent::default()).unwrap();
        }
        cores[1].campaign();
        talk(&mut cores, |_| false);
        assert!(cores[1].is_leader());
        assert_eq!(cores[1].membership().conf_state.voters, [2]);
    }

    /// A write that `node` took, as its `sequence`th.
    fn write(node: NodeId, sequence: u64) -> Vec<(RequestId, Bytes)> {
        let put = Command::encode_put(b"key", b"value", &Condition::default(), None);
        vec![(RequestId { node, boot: 1, sequence }, put.into())]
    }

    #[test]
    fn what_is_committed_does_not_wait_for_the_sync_of_what_comes_behind_it() {
        let (disks, mut cores) = led_by_1();
        assert!(cores[0].propose(write(1, 1)));
        let first = cores[0].last_index();
        // 2 has it on its disk, and 1 hears so just when the next one is proposed.
        for (from, to) in [(0, 1), (1, 0)] {
            let mut sent = Sent::default();
            cores[from].process_ready(&mut sent).unwrap();
            for message in sent.0 {
                cores[to].step(message).unwrap().unwrap();
            }
        }
        assert_eq!(cores[0].commit_index(), first);
        assert!(cores[0].propose(write(1, 2)));
        assert!(cores[0].handed_out() < first);
        disks[0].fail(Some(Operation::Sync), 1, Failure::Error);
        let mut sent = Sent::default();
        cores[0].process_ready(&mut sent).expect_err("the second can't be synced");
        assert_eq!(sent.1, [first], "the first was handed out before");
        assert_eq!(cores[0].handed_out(), first);
    }

    #[test]
    fn who_has_no_followers_owes_nobody() {
        let disk = MemoryDisk::new();
        let mut core = core_on(log_on(&disk, 1, &founders(1)), 1, &founders(1));
        core.campaign();
        core.process_ready(&mut Sent::default()).unwrap();
        assert!(core.is_leader() && core.propose(write(1, 1)));
        core.process_ready(&mut Sent::default()).unwrap();
        assert_eq!((core.commit_index(), core.owes_commit()), (core.last_index(), false));
    }

    #[test]
    fn a_commit_is_told_with_the_next_append_and_at_once_where_somebody_may_wait() {
        let (_disks, mut cores) = led_by_1();
        assert!(!cores[0].owes_commit(), "a new leader tells that it leads, and what that has committed");
        let told = |cores: &[RaftCore; 2]| (cores[0].owes_commit(), cores[1].commit_index());

        assert!(cores[0].propose(write(1, 1)));
        talk(&mut cores, |_| false);
        let first = cores[0].commit_index();
        assert_eq!((first, cores[0].handed_out()), (cores[0].last_index(), cores[0].last_index()));
        assert_eq!(told(&cores), (true, first - 1), "its client is on the leader");
        assert!(cores[0].propose(write(1, 2)));
        talk(&mut cores, |_| false);
        assert_eq!(told(&cores), (true, first), "the next append told it");
        cores[0].announce_commit();
        talk(&mut cores, |_| false);
        assert_eq!(told(&cores), (false, first + 1));

        assert!(cores[0].propose(write(2, 1)));
        talk(&mut cores, |_| false);
        assert_eq!(told(&cores), (false, first + 2), "its client waits on 2");

        assert!(cores[0].propose(write(1, 3)));
        talk(&mut cores, |_| false);
        assert_eq!(told(&cores), (true, first + 2));
        cores[1].read_index(vec![1]);
        talk(&mut cores, |_| false);
        assert_eq!(told(&cores), (false, first + 3), "a reader on 2 waits for the index it was told");

        assert!(cores[0].propose(write(1, 4)));
        talk(&mut cores, |_| false);
        assert_eq!(told(&cores), (true, first + 3));
        cores[0].tick();
        talk(&mut cores, |_| false);
        assert_eq!(told(&cores), (true, first + 4), "a heartbeat told it, but might have told less");
        cores[0].announce_commit();
        assert!(!cores[0].owes_commit());
    }

    #[test]
    fn a_commit_is_told_at_once_only_to_those_who_wait_for_it() {
        let founding = founders(3);
        let disks = [MemoryDisk::new(), MemoryDisk::new(), MemoryDisk::new()];
        let open = |id: NodeId| core_on(log_on(&disks[id as usize - 1], id, &founding), id, &founding);
        let mut cores = [open(1), open(2), open(3)];
        cores[0].campaign();
        talk(&mut cores, |_| false);
        assert!(cores[0].is_leader() && !cores[0].owes_commit(), "what was there before came from anywhere");
        let told = |cores: &[RaftCore; 3]| [1, 2].map(|i| cores[i].commit_index() == cores[0].commit_index());

        assert!(cores[0].propose(write(2, 1)));
        talk(&mut cores, |_| false);
        assert_eq!((told(&cores), cores[0].owes_commit()), ([true, false], true));
        cores[0].announce_commit();
        let mut sent = Sent::default();
        cores[0].process_ready(&mut sent).unwrap();
        assert_eq!(sent.0.iter().map(|message| message.to).collect::<Vec<_>>(), [3], "2 knows it already");
        assert!(!cores[0].owes_commit());
        assert!(cores[0].propose([write(1, 1), write(3, 1)].concat()));
        talk(&mut cores, |_| false);
        assert_eq!((told(&cores), cores[0].owes_commit()), ([false, true], true));
        assert!(cores[0].propose([write(2, 2), write(3, 2)].concat()));
        talk(&mut cores, |_| false);
        assert_eq!((told(&cores), cores[0].owes_commit()), ([true, true], false));
        assert!(cores[0].propose(write(1, 2)));
        talk(&mut cores, |_| false);
        assert_eq!((told(&cores), cores[0].owes_commit()), ([false, false], true), "nobody waits elsewhere");
        cores[0].announce_commit();
        talk(&mut cores, |_| false);
        assert_eq!((told(&cores), cores[0].owes_commit()), ([true, true], false));
    }
}
