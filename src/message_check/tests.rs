//! A whole cluster on one thread, the messages that no correct member sends, and those that one does.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::panic::{AssertUnwindSafe, catch_unwind};

use bytes::Bytes;
use raft::eraftpb::{
    ConfChangeSingle, ConfChangeTransition, ConfChangeType, ConfChangeV2, ConfState, Entry, EntryType, HardState,
    Message, MessageType, Snapshot,
};
use raft::{
    CAMPAIGN_TRANSFER, Config, GetEntriesContext, RaftState, RawNode, SnapshotStatus, StateRole, Storage, StorageError,
};

use super::*;
use crate::membership::Member;

/// A storage that, unlike raft's own `MemStorage`, keeps the term of the entry before its first, and checks what is
/// written to it.
#[derive(Clone)]
struct MemoryLog {
    /// What a restart begins with.
    snapshot: (u64, u64, ConfState),
    /// The entry before the first one: index and term.
    marker: (u64, u64),
    entries: Vec<Entry>,
    hard_state: HardState,
}

impl MemoryLog {
    /// A founder's log begins behind index 1 of term 1; a joiner's is empty.
    fn new(founders: &[NodeId]) -> MemoryLog {
        let start = u64::from(!founders.is_empty());
        let conf_state = ConfState { voters: founders.to_vec(), ..ConfState::default() };
        let hard_state = HardState { term: start, commit: start, ..HardState::default() };
        MemoryLog { snapshot: (start, start, conf_state), marker: (start, start), entries: Vec::new(), hard_state }
    }

    fn last(&self) -> u64 {
        self.marker.0 + self.entries.len() as u64
    }

    fn write(&mut self, snapshot: &Snapshot, entries: &[Entry], hard_state: Option<&HardState>) {
        let metadata = snapshot.get_metadata();
        if metadata.index != 0 {
            self.snapshot = (metadata.index, metadata.term, metadata.get_conf_state().clone());
            self.marker = (metadata.index, metadata.term);
            self.entries.clear();
        }
        if let Some(first) = entries.first() {
            assert!(first.index > self.marker.0, "an entry before the log's first");
            assert!(first.index <= self.last() + 1, "a hole before the first entry written");
            self.entries.truncate((first.index - self.marker.0 - 1) as usize);
        }
        for entry in entries {
            assert_eq!(entry.index, self.last() + 1, "a hole between the entries written");
            self.entries.push(entry.clone());
        }
        if let Some(hard_state) = hard_state {
            assert!(hard_state.commit <= self.last(), "committed more than there is");
            self.hard_state = hard_state.clone();
        }
    }

    fn compact(&mut self, applied: u64, conf_state: ConfState, keep: u64) {
        self.snapshot = (applied, self.term(applied).unwrap(), conf_state);
        self.hard_state.commit = self.hard_state.commit.max(applied);
        let to = applied.saturating_sub(keep).max(self.marker.0);
        let marker = (to, self.term(to).unwrap());
        self.entries.drain(..(to - self.marker.0) as usize);
        self.marker = marker;
    }
}

impl Storage for MemoryLog {
    fn initial_state(&self) -> raft::Result<RaftState> {
        Ok(RaftState { hard_state: self.hard_state.clone(), conf_state: self.snapshot.2.clone() })
    }

    fn entries(
        &self,
        low: u64,
        high: u64,
        max_size: impl Into<Option<u64>>,
        _context: GetEntriesContext,
    ) -> raft::Result<Vec<Entry>> {
        if low <= self.marker.0 {
            return Err(StorageError::Compacted.into());
        }
        let offset = self.marker.0 + 1;
        let mut entries = self.entries[(low - offset) as usize..(high - offset) as usize].to_vec();
        raft::util::limit_size(&mut entries, max_size.into());
        Ok(entries)
    }

    fn term(&self, index: u64) -> raft::Result<u64> {
        if index == self.marker.0 {
            return Ok(self.marker.1);
        }
        let position = index.checked_sub(self.marker.0 + 1).ok_or(StorageError::Compacted)?;
        Ok(self.entries.get(position as usize).ok_or(StorageError::Unavailable)?.term)
    }

    fn first_index(&self) -> raft::Result<u64> {
        Ok(self.marker.0 + 1)
    }

    fn last_index(&self) -> raft::Result<u64> {
        Ok(self.last())
    }

    fn snapshot(&self, request_index: u64, to: u64) -> raft::Result<Snapshot> {
        let (index, term, conf_state) = &self.snapshot;
        if *index < request_index.max(1) || !ids(conf_state).contains(&to) {
            return Err(StorageError::SnapshotTemporarilyUnavailable.into());
        }
        let mut snapshot = Snapshot::default();
        snapshot.mut_metadata().index = *index;
        snapshot.mut_metadata().term = *term;
        snapshot.mut_metadata().set_conf_state(conf_state.clone());
        Ok(snapshot)
    }
}

fn ids(conf_state: &ConfState) -> BTreeSet<NodeId> {
    let ConfState { voters, learners, voters_outgoing, learners_next, .. } = conf_state;
    [voters, learners, voters_outgoing, learners_next].into_iter().flatten().copied().collect()
}

struct Node {
    raw: RawNode<MemoryLog>,
    membership: Membership,
    applied: u64,
    reads: Vec<(Vec<u8>, u64)>,
}

impl Node {
    fn open(id: NodeId, log: MemoryLog) -> Node {
        let (applied, _, conf_state) = log.snapshot.clone();
        // Different for each node and the same in each run: raft would draw it from the thread's generator.
        let election_ticks = 10 + 2 * id as usize;
        let config = Config {
            id,
            election_tick: 10,
            heartbeat_tick: 2,
            min_election_tick: election_ticks,
            max_election_tick: election_ticks + 1,
            applied,
            max_size_per_msg: 200,
            max_inflight_msgs: 4,
            check_quorum: true,
            pre_vote: true,
            ..Config::default()
        };
        let logger = slog::Logger::root(slog::Discard, slog::o!());
        let raw = RawNode::new(&config, log, &logger).unwrap();
        let mut node = Node { raw, membership: Membership::default(), applied, reads: Vec::new() };
        node.set_membership(conf_state);
        node
    }

    fn set_membership(&mut self, conf_state: ConfState) {
        let present = ids(&conf_state);
        self.membership.removed.extend(self.membership.members.keys().filter(|id| !present.contains(id)));
        let member = Member { url: String::new(), directory: None, promote: false };
        self.membership.members = present.into_iter().map(|id| (id, member.clone())).collect();
        self.membership.conf_state = conf_state;
    }

    fn is_removed(&self) -> bool {
        self.membership.removed.contains(&self.raw.raft.id)
    }

    fn is_leader(&self) -> bool {
        self.raw.raft.state == StateRole::Leader
    }

    fn last(&self) -> u64 {
        self.raw.raft.raft_log.last_index()
    }

    /// Whatever a hostile message might change: term, vote, leader, role, log, commit index, reads.
    fn state(&self) -> impl PartialEq + use<> {
        let raft = &self.raw.raft;
        let log = (self.last(), raft.raft_log.committed, self.raw.store().snapshot.0);
        (raft.term, raft.vote, raft.leader_id, raft.state, log, self.reads.len())
    }

    fn check(&self, message: &Message) -> Result<(), Offence> {
        let raft = &self.raw.raft;
        check(message, &View::of(raft, &self.membership, &|index| term_of(raft, index)))
    }

    fn step(&mut self, message: Message) {
        match self.raw.step(message) {
            Ok(()) | Err(raft::Error::StepPeerNotFound | raft::Error::ProposalDropped) => {}
            Err(error) => panic!("a checked message was refused by raft: {error}"),
        }
    }

    /// A follower that is asked for a read index passes the request on in the name of who asked, perhaps back to it.
    /// The transport takes from a node only what is its own, and the read is asked for again.
    fn send(&self, messages: Vec<Message>, wire: &mut VecDeque<Message>) {
        wire.extend(messages.into_iter().filter(|message| message.from == self.raw.raft.id));
    }

    /// Does what raft wants done. A leader that crashes has sent its messages and written nothing.
    fn process(&mut self, wire: &mut VecDeque<Message>, crash: bool) {
        while self.raw.has_ready() && !self.is_removed() {
            let mut ready = self.raw.ready();
            self.send(ready.take_messages(), wire);
            if crash {
                return;
            }
            self.raw.mut_store().write(ready.snapshot(), ready.entries(), ready.hs());
            self.send(ready.take_persisted_messages(), wire);
            self.reads.extend(ready.take_read_states().into_iter().map(|read| (read.request_ctx, read.index)));
            if !ready.snapshot().is_empty() {
                self.applied = ready.snapshot().get_metadata().index;
                self.set_membership(ready.snapshot().get_metadata().get_conf_state().clone());
            }
            let mut committed = ready.take_committed_entries();
            let mut light = self.raw.advance_append(ready);
            self.send(light.take_messages(), wire);
            if let Some(commit) = light.commit_index() {
                self.raw.mut_store().hard_state.commit = commit;
            }
            committed.append(&mut light.take_committed_entries());
            for entry in committed {
                self.apply(&entry);
            }
            if !self.is_removed() {
                self.raw.advance_apply_to(self.applied);
            }
        }
    }

    fn apply(&mut self, entry: &Entry) {
        assert_eq!(entry.index, self.applied + 1);
        self.applied = entry.index;
        if entry.entry_type != EntryType::EntryNormal {
            let change = ConfChangeV2::parse_from_carllerche_bytes(&entry.data).unwrap();
            if let Ok(conf_state) = self.raw.apply_conf_change(&change) {
                self.set_membership(conf_state);
            }
        }
    }

    fn propose(&mut self, bytes: usize) {
        // Dropped if there is no leader: that is an answer too.
        let _ = self.raw.propose(Vec::new(), vec![7; bytes]);
    }
}

struct Cluster {
    nodes: BTreeMap<NodeId, Node>,
    wire: VecDeque<Message>,
}

impl Cluster {
    fn new() -> Cluster {
        let founders = [1, 2, 3];
        let nodes = founders.map(|id| (id, Node::open(id, MemoryLog::new(&founders)))).into();
        Cluster { nodes, wire: VecDeque::new() }
    }

    /// Node 1 leads, and all have the same log with a few committed entries.
    fn led() -> Cluster {
        let mut cluster = Cluster::new();
        cluster.node(1).raw.campaign().unwrap();
        cluster.settle();
        for _ in 0..5 {
            cluster.node(1).propose(8);
            cluster.settle();
        }
        cluster.node(1).raw.ping();
        cluster.settle();
        assert!(cluster.node(1).is_leader());
        for node in cluster.nodes.values() {
            assert_eq!((node.last(), node.applied, node.raw.raft.term), (7, 7, 2));
        }
        cluster
    }

    fn node(&mut self, id: NodeId) -> &mut Node {
        self.nodes.get_mut(&id).unwrap()
    }

    /// Delivers everything in order until nothing moves. Nothing of it may be refused.
    fn settle(&mut self) {
        loop {
            for node in self.nodes.values_mut() {
                node.process(&mut self.wire, false);
            }
            let Some(message) = self.wire.pop_front() else { return };
            self.deliver(message).unwrap();
        }
    }

    fn deliver(&mut self, message: Message) -> Result<(), Offence> {
        let Some(node) = self.nodes.get_mut(&message.to).filter(|node| !node.is_removed()) else { return Ok(()) };
        node.check(&message)?;
        node.step(message);
        node.process(&mut self.wire, false);
        Ok(())
    }

    /// Raft waits for this after every snapshot.
    fn report_snapshot(&mut self, message: &Message, status: SnapshotStatus) {
        if message.msg_type == MessageType::MsgSnapshot
            && let Some(node) = self.nodes.get_mut(&message.from)
            && !node.is_removed()
        {
            node.raw.report_snapshot(message.to, status);
            node.process(&mut self.wire, false);
        }
    }
}

fn message(msg_type: MessageType, from: NodeId, to: NodeId, term: u64) -> Message {
    Message { msg_type, from, to, term, ..Message::default() }
}

fn entry(index: u64, term: u64) -> Entry {
    Entry { index, term, data: Bytes::from_static(b"data"), ..Entry::default() }
}

/// An append to follower 2 of [`Cluster::led`].
fn append(index: u64, log_term: u64, commit: u64, entries: &[(u64, u64)]) -> Message {
    let mut append = message(MessageType::MsgAppend, 1, 2, 2);
    (append.index, append.log_term, append.commit) = (index, log_term, commit);
    append.set_entries(entries.iter().map(|&(index, term)| entry(index, term)).collect::<Vec<_>>().into());
    append
}

fn heartbeat(from: NodeId, to: NodeId, term: u64, commit: u64) -> Message {
    Message { commit, ..message(MessageType::MsgHeartbeat, from, to, term) }
}

fn snapshot(index: u64, term: u64, conf_state: ConfState) -> Message {
    let mut message = message(MessageType::MsgSnapshot, 1, 2, 2);
    let metadata = message.mut_snapshot().mut_metadata();
    (metadata.index, metadata.term) = (index, term);
    metadata.set_conf_state(conf_state);
    message
}

fn conf_state(voters: &[NodeId], learners: &[NodeId], outgoing: &[NodeId], next: &[NodeId]) -> ConfState {
    ConfState {
        voters: voters.to_vec(),
        learners: learners.to_vec(),
        voters_outgoing: outgoing.to_vec(),
        learners_next: next.to_vec(),
        ..ConfState::default()
    }
}

fn with_context(mut message: Message, context: &'static [u8]) -> Message {
    message.context = Bytes::from_static(context);
    message
}

fn read(msg_type: MessageType, from: NodeId, to: NodeId, term: u64, index: u64) -> Message {
    let mut read = Message { index, ..message(msg_type, from, to, term) };
    read.set_entries(vec![Entry { data: Bytes::from_static(b"round"), ..Entry::default() }].into());
    read
}

/// What raft does with a message that [`check`] refuses.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Unchecked {
    /// It panics, at once or when the Ready is processed.
    Panics,
    /// It believes it: the harm comes later, as the row says.
    Harm,
    /// Nothing; the check is stricter than it must be, so that a fault is noticed.
    Nothing,
}

/// Checks that `message` is refused by its receiver in [`Cluster::led`], and what would happen if it weren't.
fn refused(message: Message, kind: &str, unchecked: Unchecked) {
    let mut cluster = Cluster::led();
    refused_by(&mut cluster, message, kind, unchecked);
}

fn refused_by(cluster: &mut Cluster, message: Message, kind: &str, unchecked: Unchecked) {
    let node = cluster.nodes.get_mut(&message.to).unwrap_or_else(|| panic!("no node for {message:?}"));
    let offence = node.check(&message).expect_err(&format!("not refused: {message:?}"));
    assert_eq!(offence.kind(), kind, "{message:?}: {offence}");
    assert!(!offence.to_string().is_empty());
    let mut wire = VecDeque::new();
    let before = node.state();
    let outcome = catch_unwind(AssertUnwindSafe(|| {
        // Raft may refuse it as well.
        let _ = node.raw.step(message.clone());
        node.process(&mut wire, false);
    }));
    let changed = before != node.state();
    let found = match outcome {
        Err(_) => Unchecked::Panics,
        Ok(()) if changed => Unchecked::Harm,
        Ok(()) => Unchecked::Nothing,
    };
    assert_eq!(found, unchecked, "raft took {message:?}");
}

fn accepted(message: Message) {
    let mut cluster = Cluster::led();
    cluster.deliver(message.clone()).unwrap_or_else(|offence| panic!("{message:?}: {offence}"));
}

use Unchecked::{Harm, Nothing, Panics};

#[test]
fn a_message_for_another_or_from_nobody_is_refused() {
    let mut misrouted = Cluster::led();
    let message_for_3 = heartbeat(1, 3, 2, 7);
    assert_eq!(misrouted.node(2).check(&message_for_3), Err(Offence::To(3)));
    refused(heartbeat(0, 2, 2, 7), "from", Harm);
    refused(heartbeat(2, 2, 2, 7), "from", Harm);
}

#[test]
fn types_that_do_not_travel_are_refused() {
    use MessageType::*;
    for kind in [MsgHup, MsgBeat, MsgUnreachable, MsgSnapStatus, MsgCheckQuorum] {
        refused(message(kind, 1, 2, 2), "type", Nothing);
    }
    // A leader panics on a proposal without entries, a follower on one with a term.
    refused(message(MsgPropose, 2, 1, 0), "type", Panics);
    refused(message(MsgPropose, 1, 2, 2), "type", Panics);
    refused(message(MsgTransferLeader, 1, 2, 2), "type", Panics);
    refused(message(MsgTransferLeader, 2, 1, 2), "type", Nothing);
}

#[test]
fn impossible_terms_are_refused() {
    // Raft would send the vote with term 0, and panic there.
    let mut vote = message(MessageType::MsgRequestVote, 1, 2, 0);
    (vote.index, vote.log_term) = (7, 2);
    refused(vote, "term", Panics);
    // In all of these raft would take the message for its own.
    refused(heartbeat(1, 2, 0, 0), "term", Nothing);
    refused(Message { term: 0, ..append(7, 2, 7, &[(8, 2)]) }, "term", Harm);
    refused(read(MessageType::MsgReadIndexResp, 1, 2, 0, 1000), "term", Panics);
    // A read with a term panics where it is passed on.
    refused(read(MessageType::MsgReadIndex, 3, 2, 2, 0), "term", Panics);
    // The next election adds 1.
    for term in [u64::MAX, u64::MAX - 1, NUMBER_MAX + 1, 2 + TERM_LEAP_MAX + 1] {
        refused(heartbeat(3, 2, term, 7), "term", Harm);
    }
    accepted(heartbeat(3, 2, 2 + TERM_LEAP_MAX, 7));
}

#[test]
fn a_term_at_the_end_would_panic_in_the_next_election() {
    let mut cluster = Cluster::led();
    let node = cluster.node(2);
    let hostile = heartbeat(3, 2, u64::MAX, 7);
    assert!(node.check(&hostile).is_err());
    node.step(hostile);
    let election = catch_unwind(AssertUnwindSafe(|| {
        let mut wire = VecDeque::new();
        for _ in 0..100 {
            node.raw.tick();
            node.process(&mut wire, false);
        }
    }));
    assert!(election.is_err());
}

#[test]
fn impossible_numbers_are_refused() {
    let response = message(MessageType::MsgAppendResponse, 2, 1, 2);
    refused(Message { index: u64::MAX, ..response.clone() }, "malformed", Panics);
    refused(Message { reject: true, reject_hint: u64::MAX, index: 6, ..response.clone() }, "malformed", Nothing);
    refused(Message { request_snapshot: 1 << 40, reject: true, ..response.clone() }, "malformed", Nothing);
    refused(Message { log_term: 3, reject: true, ..response.clone() }, "malformed", Nothing);
    refused(Message { context: vec![1; CONTEXT_BYTES_MAX + 1].into(), ..heartbeat(1, 2, 2, 7) }, "malformed", Nothing);
    refused(heartbeat(1, 2, 2, NUMBER_MAX + 1), "malformed", Panics);
    let mut vote = message(MessageType::MsgRequestPreVote, 3, 2, 3);
    (vote.index, vote.log_term, vote.priority) = (7, 2, -1);
    refused(vote, "malformed", Nothing);
}

#[test]
fn what_this_version_does_not_know_is_refused() {
    let mut unknown_field = heartbeat(1, 2, 2, 7);
    unknown_field.mut_unknown_fields().add_varint(99, 1);
    refused(unknown_field, "unknown-fields", Nothing);
    let mut unknown_in_entry = append(7, 2, 7, &[(8, 2)]);
    unknown_in_entry.mut_entries()[0].mut_unknown_fields().add_varint(99, 1);
    refused(unknown_in_entry, "unknown-fields", Harm);
    // Unknown types of messages and entries don't get this far.
    assert!(Message::parse_from_bytes(&[0x08, 77]).is_err());
    assert!(Entry::parse_from_bytes(&[0x08, 77]).is_err());
    let mut unknown_in_roles = snapshot(9, 2, conf_state(&[1, 2, 3], &[], &[], &[]));
    unknown_in_roles.mut_snapshot().mut_metadata().mut_conf_state().mut_unknown_fields().add_varint(9, 4);
    refused(unknown_in_roles, "unknown-fields", Harm);
}

#[test]
fn a_leaders_commit_beyond_the_log_stops_the_node_if_a_member_says_so() {
    refused(heartbeat(1, 2, 2, 8), "lost-log", Panics);
    refused(heartbeat(3, 2, 9, 8), "lost-log", Panics);
    // Of an older term: raft ignores it, and what it says of our log may have been true.
    accepted(heartbeat(3, 2, 1, 8));
    let mut cluster = Cluster::led();
    for _ in 0..11 {
        cluster.node(2).raw.tick();
    }
    refused_by(&mut cluster, heartbeat(77, 2, 3, 8), "commit-beyond-log", Panics);
    // A node without members, but with a past: its directory was emptied.
    cluster.nodes.insert(4, Node::open(4, MemoryLog::new(&[])));
    refused_by(&mut cluster, heartbeat(1, 4, 2, 5), "lost-log", Panics);
}

#[test]
fn impossible_appends_are_refused() {
    // Beyond the log's end a log term of 0 matches: raft commits, or slices, what is not there.
    refused(append(20, 0, 20, &[]), "malformed", Panics);
    refused(append(20, 0, 7, &[(21, 2)]), "malformed", Panics);
    refused(append(0, 2, 7, &[(1, 2)]), "malformed", Nothing);
    // Not contiguous: a conflict at a committed index, a slice out of range, a hole in the log.
    refused(append(7, 2, 7, &[(5, 1)]), "malformed", Panics);
    refused(append(7, 2, 7, &[(20, 2)]), "malformed", Panics);
    refused(append(7, 2, 7, &[(8, 2), (10, 2)]), "malformed", Panics);
    refused(append(7, 2, 7, &[(8, 2), (8, 2)]), "malformed", Panics);
    // Terms that fall, or are ahead of the leader's; a term of 0 matches what is not there.
    refused(append(7, 2, 7, &[(8, 1)]), "malformed", Harm);
    refused(append(7, 2, 7, &[(8, 3)]), "malformed", Harm);
    refused(append(7, 2, 8, &[(8, 0)]), "malformed", Panics);
    refused(append(7, 3, 7, &[]), "malformed", Nothing);
    refused(append(u64::MAX, 2, 7, &[]), "malformed", Nothing);
    accepted(append(7, 2, 8, &[(8, 2), (9, 2)]));
    accepted(append(3, 2, 7, &[(4, 2), (5, 2)]));
    accepted(append(20, 2, 7, &[(21, 2)]));
}

#[test]
fn entries_that_no_node_could_apply_are_refused() {
    let with = |entry_type, data: Vec<u8>| {
        let mut message = append(7, 2, 7, &[(8, 2)]);
        message.mut_entries()[0].entry_type = entry_type;
        message.mut_entries()[0].data = data.into();
        message
    };
    refused(with(EntryType::EntryConfChange, Vec::new()), "malformed", Harm);
    refused(with(EntryType::EntryConfChangeV2, b"garbage".to_vec()), "malformed", Harm);
    refused(with(EntryType::EntryNormal, vec![0; ENTRY_BYTES_MAX + 1]), "malformed", Harm);
    accepted(with(EntryType::EntryConfChangeV2, Vec::new()));
    accepted(with(EntryType::EntryNormal, vec![0; ENTRY_BYTES_MAX]));
}

#[test]
fn a_leader_that_contradicts_what_is_committed_is_refused() {
    // Raft ignores what lies before its commit index, and notices nothing.
    refused(append(2, 2, 7, &[(3, 2), (4, 2), (5, 2), (6, 2), (7, 2)]).with_entry_term(1), "malformed", Nothing);
    refused(append(1, 2, 7, &[(2, 2)]), "contradicts-committed", Nothing);
    refused(Message { from: 3, term: 3, ..append(1, 1, 7, &[(2, 3)]) }, "contradicts-committed", Harm);
    refused(append(7, 1, 7, &[]), "contradicts-committed", Nothing);
    // At the commit index it would throw away what is applied.
    refused(snapshot(7, 1, conf_state(&[1, 2, 3], &[], &[], &[])), "contradicts-committed", Harm);
    // From an old term it can be what another leader has replaced.
    accepted(Message { from: 3, term: 1, ..append(1, 1, 1, &[(2, 1)]) });
}

trait WithEntryTerm {
    fn with_entry_term(self, term: u64) -> Self;
}

impl WithEntryTerm for Message {
    fn with_entry_term(mut self, term: u64) -> Message {
        self.mut_entries()[0].term = term;
        self
    }
}

#[test]
fn impossible_snapshots_are_refused() {
    let all = || conf_state(&[1, 2, 3], &[], &[], &[]);
    refused(snapshot(0, 2, all()), "malformed", Nothing);
    refused(snapshot(9, 0, all()), "malformed", Panics);
    refused(snapshot(9, 3, all()), "malformed", Harm);
    refused(snapshot(u64::MAX, 2, all()), "malformed", Panics);
    refused(message(MessageType::MsgSnapshot, 1, 2, 2), "malformed", Nothing);
    let many: Vec<NodeId> = (1..=CONF_STATE_IDS_MAX as u64 + 1).collect();
    for (impossible, unchecked) in [
        (conf_state(&[], &[], &[], &[]), Nothing),
        (conf_state(&[], &[2], &[], &[]), Panics),
        (conf_state(&[1, 3], &[], &[], &[]), Nothing),
        (conf_state(&[1, 2, 2], &[], &[], &[]), Harm),
        (conf_state(&[0, 1, 2], &[], &[], &[]), Panics),
        (conf_state(&[1, 2, 3], &[3], &[], &[]), Panics),
        (conf_state(&[1, 2], &[3], &[2, 3], &[]), Panics),
        (conf_state(&[1, 2], &[], &[1, 2], &[2]), Panics),
        (conf_state(&[1, 2], &[], &[1, 2], &[3]), Panics),
        (conf_state(&[1, 2], &[], &[], &[3]), Panics),
        (ConfState { auto_leave: true, ..all() }, Panics),
        (conf_state(&many, &[], &[], &[]), Harm),
    ] {
        refused(snapshot(9, 2, impossible), "malformed", unchecked);
    }
    accepted(snapshot(9, 2, all()));
    accepted(snapshot(9, 2, conf_state(&[1, 3], &[2], &[], &[])));
    accepted(snapshot(9, 2, ConfState { auto_leave: true, ..conf_state(&[1, 3], &[4], &[1, 2, 3], &[2]) }));
    // Late, and of use to nobody.
    accepted(snapshot(3, 2, all()));
}

#[test]
fn impossible_responses_are_refused() {
    let response = message(MessageType::MsgAppendResponse, 2, 1, 2);
    // The leader would think that the follower has it, send from there, and let its commit index run with it.
    refused(Message { index: 8, ..response.clone() }, "beyond-log", Nothing);
    refused(Message { reject: true, index: 7, reject_hint: 8, ..response.clone() }, "beyond-log", Nothing);
    accepted(Message { index: 7, ..response.clone() });
    // A late one of an older term is no offence, wherever the log ends now.
    accepted(Message { index: 70, term: 1, ..response });
    // Votes for more than was asked.
    refused(message(MessageType::MsgRequestVoteResponse, 3, 2, 3), "too-early", Harm);
    refused(message(MessageType::MsgRequestPreVoteResponse, 3, 2, 4), "too-early", Nothing);
    accepted(message(MessageType::MsgRequestVoteResponse, 3, 2, 2));
    accepted(Message { reject: true, ..message(MessageType::MsgRequestVoteResponse, 3, 2, 9) });
}

#[test]
fn a_vote_that_was_not_asked_for_would_elect_a_leader_without_a_log() {
    let mut cluster = Cluster::led();
    let node = cluster.node(2);
    // In one batch, before anything is written: entries, the call to campaign, and the vote.
    node.step(append(7, 2, 7, &[(8, 2)]));
    let timeout_now = message(MessageType::MsgTimeoutNow, 1, 2, 2);
    assert_eq!(node.check(&timeout_now), Ok(()));
    node.step(timeout_now);
    let vote = message(MessageType::MsgRequestVoteResponse, 3, 2, 3);
    refused_by(&mut cluster, vote, "too-early", Panics);
}

#[test]
fn an_only_voter_is_not_called_to_campaign_over_entries_it_has_not_written() {
    let mut log = MemoryLog::new(&[2]);
    log.snapshot.2.learners = vec![1];
    let mut cluster = Cluster { nodes: [(2, Node::open(2, log))].into(), wire: VecDeque::new() };
    let node = cluster.node(2);
    node.step(append(1, 1, 1, &[(2, 2)]));
    assert_eq!(node.check(&message(MessageType::MsgTimeoutNow, 1, 2, 1)), Ok(()), "late, and ignored");
    refused_by(&mut cluster, message(MessageType::MsgTimeoutNow, 1, 2, 2), "too-early", Panics);
}

#[test]
fn impossible_votes_are_refused() {
    let request = |index, log_term, commit, commit_term| {
        let request = message(MessageType::MsgRequestVote, 3, 2, 3);
        Message { index, log_term, commit, commit_term, ..request }
    };
    for impossible in [request(0, 2, 0, 0), request(7, 0, 0, 0), request(7, 3, 0, 0), request(7, 2, 8, 2)] {
        refused(impossible, "malformed", Nothing);
    }
    refused(request(7, 1, 7, 2), "malformed", Nothing);
    refused(with_context(request(7, 2, 7, 2), b"CampaignCoup"), "malformed", Nothing);
    accepted(request(7, 2, 7, 2));
    accepted(with_context(request(7, 2, 7, 2), CAMPAIGN_TRANSFER));
}

#[test]
fn impossible_reads_are_refused() {
    // The leader looks for the context in the first of no entries.
    refused(message(MessageType::MsgReadIndex, 2, 1, 0), "malformed", Panics);
    let mut two = read(MessageType::MsgReadIndex, 2, 1, 0, 0);
    two.mut_entries().push(entry(0, 0));
    refused(two, "malformed", Nothing);
    let mut empty = read(MessageType::MsgReadIndex, 2, 1, 0, 0);
    empty.mut_entries()[0].data = Bytes::new();
    refused(empty, "malformed", Nothing);
    refused(message(MessageType::MsgReadIndexResp, 1, 2, 2), "malformed", Nothing);
    refused(read(MessageType::MsgReadIndexResp, 1, 2, 2, 0), "malformed", Harm);
    // Only the leader answers reads: raft would believe anybody, and commit by the answer.
    refused(read(MessageType::MsgReadIndexResp, 3, 2, 2, 7), "second-leader", Harm);
    accepted(read(MessageType::MsgReadIndex, 2, 1, 0, 0));
    accepted(read(MessageType::MsgReadIndex, 3, 2, 0, 0));
    accepted(read(MessageType::MsgReadIndexResp, 1, 2, 2, 1000));
}

#[test]
fn a_second_leader_in_a_term_is_refused() {
    refused(heartbeat(3, 2, 2, 7), "second-leader", Harm);
    refused(heartbeat(3, 1, 2, 7), "second-leader", Nothing);
    refused(Message { from: 3, ..append(7, 2, 7, &[]) }, "second-leader", Harm);
    accepted(heartbeat(3, 2, 3, 7));
    accepted(heartbeat(3, 1, 3, 7));
}

#[test]
fn a_stranger_gets_nothing_while_there_is_a_leader() {
    let stranger = 77;
    // It would depose the leader, or make a follower depose it.
    refused(heartbeat(stranger, 1, 3, 7), "stranger", Harm);
    refused(heartbeat(stranger, 2, 3, 7), "stranger", Harm);
    refused(Message { from: stranger, term: 3, ..append(7, 2, 7, &[(8, 3)]) }, "stranger", Harm);
    refused(message(MessageType::MsgTimeoutNow, stranger, 2, 2), "stranger", Harm);
    refused(read(MessageType::MsgReadIndex, stranger, 1, 0, 0), "stranger", Nothing);
    refused(read(MessageType::MsgReadIndexResp, stranger, 2, 3, 7), "stranger", Harm);
    let vote = Message { index: 7, log_term: 2, ..message(MessageType::MsgRequestVote, stranger, 2, 3) };
    refused(with_context(vote.clone(), CAMPAIGN_TRANSFER), "stranger", Harm);
    // Raft itself keeps to its leader.
    let mut cluster = Cluster::led();
    cluster.deliver(vote).unwrap();
    assert_eq!(cluster.node(2).raw.raft.term, 2);
    // So does it with the responses of strangers.
    let response = message(MessageType::MsgHeartbeatResponse, stranger, 1, 9);
    cluster.deliver(response).unwrap();
    assert!(cluster.node(1).is_leader());
    assert_eq!(cluster.node(1).raw.raft.term, 2);
}

#[test]
fn a_stranger_is_voted_for_and_followed_when_there_is_no_leader() {
    let mut cluster = Cluster::led();
    let silence = |node: &mut Node| {
        for _ in 0..10 {
            node.raw.tick();
        }
    };
    silence(cluster.node(2));
    let vote = Message { index: 7, log_term: 2, ..message(MessageType::MsgRequestVote, 77, 2, 3) };
    cluster.deliver(vote).unwrap();
    assert_eq!((cluster.node(2).raw.raft.term, cluster.node(2).raw.raft.vote), (3, 77));
    silence(cluster.node(3));
    cluster.deliver(heartbeat(77, 3, 3, 7)).unwrap();
    assert_eq!(cluster.node(3).raw.raft.leader_id, 77);
    // A node that joins knows nobody yet, and follows whoever comes.
    cluster.nodes.insert(4, Node::open(4, MemoryLog::new(&[])));
    cluster.deliver(heartbeat(1, 4, 2, 0)).unwrap();
    cluster.deliver(heartbeat(3, 4, 3, 0)).unwrap();
    assert_eq!(cluster.node(4).raw.raft.leader_id, 3);
}

#[test]
fn a_removed_member_is_refused() {
    let mut cluster = Cluster::led();
    cluster.node(2).membership.removed.insert(3);
    refused_by(&mut cluster, heartbeat(3, 2, 3, 7), "removed", Harm);
}

#[test]
fn an_offence_says_what_is_wrong() {
    let offence = Offence::LostLog { from: 1, commit: 9, last_index: 7 };
    assert_eq!(offence.to_string(), "1 says that index 9 is committed here, and the log here ends at 7");
}

/// SplitMix64 (Steele, Lea and Flood 2014).
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&mut self, limit: usize) -> usize {
        (self.next() % limit as u64) as usize
    }

    fn one_in(&mut self, n: usize) -> bool {
        self.below(n) == 0
    }

    fn pick<T: Clone>(&mut self, items: &[T]) -> T {
        items[self.below(items.len())].clone()
    }

    /// A number near what `node` holds, or near the end of what there is.
    fn number(&mut self, node: &Node) -> u64 {
        let raft = &node.raw.raft;
        let near = self.pick(&[0, 1, raft.term, node.last(), raft.raft_log.committed, node.applied]);
        match self.below(8) {
            0 => self.pick(&[1 << 32, NUMBER_MAX, NUMBER_MAX + 1, u64::MAX - 1, u64::MAX]),
            1 => self.next(),
            2 => near.saturating_sub(1),
            3 => near + 1,
            4 => near + self.below(5) as u64,
            _ => near,
        }
    }

    fn ids(&mut self) -> Vec<NodeId> {
        (0..self.below(4)).map(|_| self.pick(&[0, 1, 2, 3, 4, 77])).collect()
    }
}

const TYPES: [MessageType; 19] = {
    use MessageType::*;
    [
        MsgHup,
        MsgBeat,
        MsgPropose,
        MsgAppend,
        MsgAppendResponse,
        MsgRequestVote,
        MsgRequestVoteResponse,
        MsgSnapshot,
        MsgHeartbeat,
        MsgHeartbeatResponse,
        MsgUnreachable,
        MsgSnapStatus,
        MsgCheckQuorum,
        MsgTransferLeader,
        MsgTimeoutNow,
        MsgReadIndex,
        MsgReadIndexResp,
        MsgRequestPreVote,
        MsgRequestPreVoteResponse,
    ]
};

/// Changes a few fields of `message`, mostly to numbers that mean something to its receiver.
fn mutate(message: &mut Message, node: &Node, random: &mut Random) {
    for _ in 0..=random.below(3) {
        let number = random.number(node);
        match random.below(17) {
            0 => message.from = random.pick(&[0, 1, 2, 3, 4, 77]),
            1 | 2 => message.term = number,
            3 => message.log_term = number,
            4 => message.index = number,
            5 => message.commit = number,
            6 => message.commit_term = number,
            7 => message.reject = !message.reject,
            8 => message.reject_hint = number,
            9 => message.context = random.pick(&[Bytes::new(), Bytes::from_static(CAMPAIGN_TRANSFER), "x".into()]),
            10 => message.msg_type = random.pick(&TYPES),
            11 => mutate_snapshot(message, node, random),
            12 => drop(message.mut_entries().pop()),
            // A run of entries that fits.
            13 | 14 => {
                let term = message.log_term.max(1);
                let entries = (1..=random.below(4) as u64).map(|n| entry(message.index.wrapping_add(n), term));
                message.set_entries(entries.collect::<Vec<_>>().into());
            }
            15 => message.request_snapshot = number,
            _ => {
                let position = random.below(message.entries.len().max(1));
                if let Some(entry) = message.mut_entries().get_mut(position) {
                    match random.below(4) {
                        0 => entry.index = number,
                        1 => entry.term = number,
                        2 => entry.entry_type = EntryType::EntryConfChangeV2,
                        _ => entry.data = random.pick(&[Bytes::new(), b"x"[..].into()]),
                    }
                }
            }
        }
    }
}

fn mutate_snapshot(message: &mut Message, node: &Node, random: &mut Random) {
    let metadata = message.mut_snapshot().mut_metadata();
    metadata.index = random.number(node);
    metadata.term = random.number(node);
    let mut conf_state = conf_state(&[1, 2, 3], &[], &[], &[]);
    if random.one_in(2) {
        conf_state = self::conf_state(&random.ids(), &random.ids(), &random.ids(), &random.ids());
        conf_state.auto_leave = random.one_in(2);
    }
    metadata.set_conf_state(conf_state);
}

/// How many seeds a test runs; more at will, for a long search.
fn seeds(default: u64) -> u64 {
    std::env::var("SIM_SEEDS").map_or(default, |seeds| seeds.parse().expect("SIM_SEEDS is a number"))
}

/// Runs a cluster with hostile messages in between its own. Returns how many of them were refused and taken.
fn hostile_run(seed: u64) -> (usize, usize) {
    let mut random = Random(seed);
    let mut cluster = if random.one_in(4) { Cluster::new() } else { Cluster::led() };
    cluster.nodes.insert(4, Node::open(4, MemoryLog::new(&[])));
    let mut seen: Vec<Message> = Vec::new();
    let (mut refused, mut taken) = (0, 0);
    for _ in 0..400 {
        let id = 1 + random.below(4) as u64;
        let Cluster { nodes, wire } = &mut cluster;
        let node = nodes.get_mut(&id).unwrap();
        if node.is_removed() {
            continue;
        }
        match random.below(10) {
            0 => _ = node.raw.tick(),
            1 => (0..random.below(40)).for_each(|_| _ = node.raw.tick()),
            2 => node.propose(random.below(300)),
            3 => node.raw.read_index(random.next().to_le_bytes().to_vec()),
            4 if random.one_in(4) => node.raw.mut_store_compact(node.applied, &node.membership, &mut random),
            4 | 5 => {
                if let Some(message) = wire.pop_front()
                    && let Some(receiver) = nodes.get_mut(&message.to).filter(|node| !node.is_removed())
                {
                    seen.push(message.clone());
                    if receiver.check(&message).is_ok() {
                        receiver.step(message);
                    }
                }
            }
            _ => {
                let mut message = match random.one_in(3) || seen.is_empty() {
                    true => self::message(random.pick(&TYPES), random.pick(&[1, 2, 3, 4, 77]), id, node.raw.raft.term),
                    false => random.pick(&seen),
                };
                mutate(&mut message, node, &mut random);
                if !random.one_in(20) {
                    message.to = id;
                }
                if node.check(&message).is_err() {
                    refused += 1;
                } else {
                    taken += 1;
                    node.step(message);
                }
            }
        }
        // A batch of several messages before anything is written is as good as one.
        if random.one_in(2) {
            nodes.values_mut().for_each(|node| node.process(wire, false));
        }
        wire.truncate(200);
    }
    (refused, taken)
}

trait Compact {
    fn mut_store_compact(&mut self, applied: u64, membership: &Membership, random: &mut Random);
}

impl Compact for RawNode<MemoryLog> {
    fn mut_store_compact(&mut self, applied: u64, membership: &Membership, random: &mut Random) {
        if applied > self.store().snapshot.0 && self.snap().is_none() && applied <= self.raft.raft_log.applied {
            self.mut_store().compact(applied, membership.conf_state.clone(), random.below(4) as u64);
        }
    }
}

#[test]
fn nothing_that_passes_makes_raft_panic() {
    let (mut refused, mut taken) = (0, 0);
    for seed in 0..seeds(1500) {
        let run = catch_unwind(|| hostile_run(seed));
        let (more_refused, more_taken) = run.unwrap_or_else(|_| panic!("raft panicked with seed {seed}"));
        (refused, taken) = (refused + more_refused, taken + more_taken);
    }
    assert!(refused > 10_000 && taken > 10_000, "hardly a test: {refused} refused, {taken} taken");
}

/// What a healthy run has come to, so that a test can tell that it has tested something.
#[derive(Debug, Default)]
struct Healthy {
    delivered: BTreeMap<String, usize>,
    strangers: usize,
    applied: u64,
    snapshots: usize,
    removed: usize,
}

/// A cluster that elects, writes, reads, hands over, changes its members, compacts and restarts, over a network that
/// loses, repeats and reorders. Panics if a message is refused.
fn healthy_run(seed: u64, healthy: &mut Healthy) {
    let mut random = Random(seed);
    let mut cluster = Cluster::new();
    let mut next_id = 4;
    for _ in 0..3000 {
        if cluster.wire.len() > 300 {
            cluster.wire.truncate(150);
        }
        if !random.one_in(4) && !cluster.wire.is_empty() {
            healthy_delivery(&mut cluster, &mut random, healthy);
            continue;
        }
        let id = random.pick(&cluster.nodes.keys().copied().collect::<Vec<_>>());
        let Cluster { nodes, wire } = &mut cluster;
        let node = nodes.get_mut(&id).unwrap();
        if node.is_removed() {
            continue;
        }
        match random.below(40) {
            0..16 => _ = node.raw.tick(),
            16..26 if node.is_leader() => node.propose(random.below(150)),
            26..30 => node.raw.read_index(random.next().to_le_bytes().to_vec()),
            30 => (0..25).for_each(|_| _ = node.raw.tick()),
            31 if node.is_leader() => {
                let to = random.pick(&node.membership.conf_state.voters);
                node.raw.transfer_leader(to);
            }
            32 | 33 if node.is_leader() && node.membership.members.len() < 6 => {
                healthy_change(node, next_id, &mut random)
            }
            34 | 35 => node.raw.mut_store_compact(node.applied, &node.membership, &mut random),
            36 => {
                // Whatever it had to send is lost, but for what a leader sends before it writes.
                let crash = node.is_leader();
                node.process(wire, crash);
                let node = nodes.remove(&id).unwrap();
                nodes.insert(id, reopen(node));
                continue;
            }
            _ => {}
        }
        node.process(wire, false);
        let known = node.membership.members.keys().copied().max().unwrap_or(0);
        if known == next_id {
            cluster.nodes.insert(next_id, Node::open(next_id, MemoryLog::new(&[])));
            next_id += 1;
        }
    }
    healthy.applied += cluster.nodes.values().map(|node| node.applied).max().unwrap();
    healthy.removed += cluster.nodes.values().filter(|node| node.is_removed()).count();
}

fn reopen(node: Node) -> Node {
    let id = node.raw.raft.id;
    let removed = node.membership.removed;
    let log = node.raw.store().clone();
    let mut node = Node::open(id, log);
    node.membership.removed = removed;
    node
}

fn healthy_delivery(cluster: &mut Cluster, random: &mut Random, healthy: &mut Healthy) {
    let position = if random.one_in(3) { random.below(cluster.wire.len()) } else { 0 };
    let message = cluster.wire.remove(position).unwrap();
    if random.one_in(20) {
        cluster.wire.push_back(message.clone());
    } else if random.one_in(25) {
        cluster.report_snapshot(&message, SnapshotStatus::Failure);
        return;
    }
    match cluster.deliver(message.clone()) {
        Ok(()) => {
            *healthy.delivered.entry(format!("{:?}", message.msg_type)).or_default() += 1;
            healthy.snapshots += usize::from(message.msg_type == MessageType::MsgSnapshot);
            cluster.report_snapshot(&message, SnapshotStatus::Finish);
        }
        // As their documentation says: ordinary around changes of the membership, and the second only for a while.
        Err(Offence::Removed(_)) => cluster.report_snapshot(&message, SnapshotStatus::Failure),
        Err(Offence::Stranger(_)) => {
            healthy.strangers += 1;
            cluster.report_snapshot(&message, SnapshotStatus::Failure);
        }
        Err(offence) => panic!("refused in a healthy cluster: {message:?}: {offence}"),
    }
}

/// Proposes to add, promote, demote or remove somebody, alone or with others.
fn healthy_change(leader: &mut Node, next_id: NodeId, random: &mut Random) {
    let members: Vec<NodeId> = leader.membership.members.keys().copied().collect();
    let mut change = ConfChangeV2::default();
    let mut changes = Vec::new();
    for _ in 0..=random.below(2) {
        let (change_type, node_id) = match random.below(4) {
            0 | 1 if next_id < 12 => (ConfChangeType::AddLearnerNode, next_id),
            2 if members.len() > 3 => (ConfChangeType::RemoveNode, random.pick(&members)),
            _ => (ConfChangeType::AddNode, random.pick(&members)),
        };
        changes.push(ConfChangeSingle { change_type, node_id, ..ConfChangeSingle::default() });
    }
    if changes.len() > 1 {
        change.set_transition(ConfChangeTransition::Implicit);
    }
    change.set_changes(changes.into());
    let _ = leader.raw.propose_conf_change(Vec::new(), change);
}

#[test]
fn nothing_that_a_healthy_cluster_sends_is_refused() {
    let mut healthy = Healthy::default();
    for seed in 0..seeds(150) {
        let run = catch_unwind(AssertUnwindSafe(|| healthy_run(seed, &mut healthy)));
        run.unwrap_or_else(|_| panic!("failed with seed {seed}"));
    }
    for kind in &TYPES[3..] {
        let travels = ![
            MessageType::MsgUnreachable,
            MessageType::MsgSnapStatus,
            MessageType::MsgCheckQuorum,
            MessageType::MsgTransferLeader,
        ]
        .contains(kind);
        let count = healthy.delivered.get(&format!("{kind:?}")).copied().unwrap_or(0);
        assert_eq!(count > 10, travels, "{count} {kind:?} in {healthy:?}");
    }
    let delivered: usize = healthy.delivered.values().sum();
    assert!(healthy.applied > 5000 && healthy.snapshots > 100 && healthy.removed > 20, "hardly a test: {healthy:?}");
    assert!(healthy.strangers * 200 < delivered, "strangers are the exception: {healthy:?}");
}
