//! What peers may say to a replica, sensible or not.

use bytes::Bytes;
use protobuf::Message as _;
use raft::eraftpb::{ConfChangeV2, ConfState, Entry, EntryType, Message, MessageType};
use raftexample::command::{Command, Condition, RequestId};
use raftexample::membership::{Membership, NodeId};
use raftexample::membership_change::MembershipChange;
use raftexample::peer_protocol::SnapshotHeader;
use raftexample::raft_core::RaftCore;

use crate::choices::Choices;
use crate::node::{CLUSTER, founders};
use crate::snapshot;

/// What a message is made to fit to.
pub struct Facts {
    id: NodeId,
    boot: u64,
    term: u64,
    /// Indexes at which something begins or ends.
    indexes: [u64; 6],
    membership: Membership,
    /// The log's terms, from its first index on.
    first_index: u64,
    terms: Vec<u64>,
}

impl Facts {
    pub fn of(core: &RaftCore, boot: u64) -> Facts {
        let log = core.log();
        let first_index = log.first_index();
        let terms = (first_index..=log.last_index()).map(|index| log.term(index).unwrap_or(0)).collect();
        let indexes = [
            core.commit_index(),
            core.last_index(),
            core.last_index(),
            core.handed_out(),
            core.snapshot_index(),
            first_index,
        ];
        let membership = (**core.membership()).clone();
        Facts { id: core.id(), boot, term: core.term(), indexes, membership, first_index, terms }
    }

    fn term_of(&self, index: u64) -> u64 {
        let position = index.checked_sub(self.first_index).and_then(|position| usize::try_from(position).ok());
        position.and_then(|position| self.terms.get(position)).copied().unwrap_or(u64::from(index > 0))
    }
}

/// Another node's id: mostly a member's.
pub fn peer(choices: &mut Choices<'_>) -> NodeId {
    choices.pick(&[2, 2, 3, 3, 4, 5, 9])
}

pub fn index(choices: &mut Choices<'_>, facts: &Facts) -> u64 {
    let near = choices.pick(&facts.indexes);
    match choices.below(16) {
        0 => near.saturating_sub(1),
        1 => near.saturating_sub(2),
        2 => near.saturating_add(1),
        3 => near.saturating_add(2),
        4 => near.saturating_add(10),
        5 => choices.number(),
        _ => near,
    }
}

fn term(choices: &mut Choices<'_>, facts: &Facts) -> u64 {
    match choices.below(16) {
        0 => choices.number(),
        1 => facts.term.saturating_sub(1),
        2..=4 => facts.term.saturating_add(1),
        5 => facts.term.saturating_add(choices.below(4) as u64),
        _ => facts.term,
    }
}

fn log_term(choices: &mut Choices<'_>, facts: &Facts, index: u64) -> u64 {
    if choices.one_in(6) { choices.below(5) as u64 } else { facts.term_of(index) }
}

/// A raft message of any type, for this node.
pub fn message(choices: &mut Choices<'_>, facts: &Facts) -> Message {
    let msg_type = <MessageType as protobuf::ProtobufEnum>::values()[choices.below(19)];
    let mut message = Message { msg_type, from: peer(choices), to: facts.id, ..Message::default() };
    message.term = if msg_type == MessageType::MsgReadIndex { 0 } else { term(choices, facts) };
    message.index = index(choices, facts);
    message.log_term = log_term(choices, facts, message.index);
    message.reject = choices.one_in(4);
    if choices.flag() {
        message.commit = index(choices, facts);
        message.commit_term = log_term(choices, facts, message.commit);
        message.reject_hint = index(choices, facts);
    }
    match choices.byte() {
        0..=15 => message.context = Bytes::from_static(b"CampaignTransfer"),
        16..=31 => message.context = Bytes::copy_from_slice(choices.piece()),
        32..=47 => message.context = read_context(choices, facts),
        48 => message.request_snapshot = 1,
        49 => message.priority = -1,
        50 => message.deprecated_priority = 7,
        _ => {}
    }
    match msg_type {
        MessageType::MsgReadIndex | MessageType::MsgReadIndexResp => {
            let data = read_context(choices, facts);
            let entries = vec![Entry { data, ..Entry::default() }; if choices.one_in(8) { 2 } else { 1 }];
            message.set_entries(entries.into());
        }
        MessageType::MsgAppend => {
            let mut entries = Vec::new();
            for number in 1..=choices.below(5) as u64 {
                let at = if choices.one_in(32) { index(choices, facts) } else { message.index.saturating_add(number) };
                let term = if choices.one_in(8) { term(choices, facts) } else { message.term };
                entries.push(entry(choices, facts, at, term));
            }
            message.set_entries(entries.into());
        }
        MessageType::MsgSnapshot => {
            let membership = membership(choices, facts);
            let metadata = message.mut_snapshot().mut_metadata();
            (metadata.index, metadata.term) = (index(choices, facts), term(choices, facts));
            metadata.set_conf_state(membership.conf_state);
        }
        _ => {}
    }
    message
}

/// The name of a read round: this run's, or some other one's.
fn read_context(choices: &mut Choices<'_>, facts: &Facts) -> Bytes {
    let numbers = [facts.id, facts.boot, choices.below(6) as u64];
    let mut context: Vec<u8> = numbers.iter().flat_map(|number| number.to_le_bytes()).collect();
    if choices.one_in(4) {
        context[usize::from(choices.byte()) % 24] ^= 1;
    }
    context.into()
}

/// An entry of any kind that could be in a log, and some that could not.
pub fn entry(choices: &mut Choices<'_>, facts: &Facts, index: u64, term: u64) -> Entry {
    let mut entry = Entry { index, term, ..Entry::default() };
    let boot = if choices.flag() { facts.boot } else { 1 };
    let id = RequestId { node: choices.below(5) as NodeId, boot, sequence: choices.below(8) as u64 };
    let context = Bytes::copy_from_slice(&id.encode());
    match choices.below(24) {
        0..=3 => {}
        4..=12 => {
            let (key, value) = (Bytes::from_static(b"key"), Bytes::copy_from_slice(choices.bytes(2)));
            let command = Command::Put { key, value, condition: Condition::default(), token: None };
            (entry.context, entry.data) = (context, command.encode().into());
        }
        13..=18 => {
            let change = change(choices);
            let mut conf_change = facts.membership.conf_change(&change).unwrap_or_default();
            conf_change.context = change.encode().into();
            entry.entry_type = EntryType::EntryConfChangeV2;
            entry.data = conf_change.write_to_bytes().expect("it is in memory").into();
            entry.context = context;
        }
        19 => entry.entry_type = EntryType::EntryConfChangeV2,
        20 => {
            let (member, directory) = (choices.below(6) as NodeId, choices.below(3) as u128);
            (entry.context, entry.data) = (context, Command::RecordDirectory { member, directory }.encode().into());
        }
        21 => (entry.context, entry.data) = (context, Bytes::copy_from_slice(choices.piece())),
        22 => {
            let conf_change =
                ConfChangeV2 { context: Bytes::copy_from_slice(choices.piece()), ..ConfChangeV2::default() };
            entry.entry_type = choices.pick(&[EntryType::EntryConfChangeV2, EntryType::EntryConfChange]);
            entry.data = conf_change.write_to_bytes().expect("it is in memory").into();
        }
        _ => entry.context = Bytes::copy_from_slice(choices.piece()),
    }
    entry
}

fn change(choices: &mut Choices<'_>) -> MembershipChange {
    let id = choices.below(8) as NodeId;
    let url = |id: NodeId| format!("http://127.0.0.1:1238{id}");
    match choices.below(5) {
        0 => MembershipChange::Add { id, url: url(id), promote: choices.flag() },
        1 => MembershipChange::Promote { id },
        2 => MembershipChange::Remove { id },
        3 => {
            let members: Vec<_> = (0..choices.below(5)).map(|_| choices.below(8) as NodeId).collect();
            MembershipChange::Replace(members.into_iter().map(|id| (id, url(id), choices.flag())).collect())
        }
        _ => MembershipChange::LeaveJoint,
    }
}

fn membership(choices: &mut Choices<'_>, facts: &Facts) -> Membership {
    let mut ids = |count: usize| -> Vec<u64> { (0..choices.below(count)).map(|_| choices.below(6) as u64).collect() };
    let conf_state = ConfState {
        voters: ids(4),
        learners: ids(3),
        voters_outgoing: ids(3),
        learners_next: ids(2),
        ..ConfState::default()
    };
    match choices.below(8) {
        0 => Membership { conf_state, ..founders(3) },
        1 => Membership { conf_state: ConfState { auto_leave: true, ..conf_state }, ..facts.membership.clone() },
        2 => founders(1 + choices.below(4) as u64),
        3 => {
            let mut membership = founders(4);
            membership.removed.insert(choices.below(6) as u64);
            membership
        }
        _ => facts.membership.clone(),
    }
}

/// A snapshot's file, and what its sender says of it: mostly the truth.
pub fn snapshot(choices: &mut Choices<'_>, facts: &Facts) -> (SnapshotHeader, Vec<u8>) {
    let (index, leader_term) = (index(choices, facts), term(choices, facts));
    let term = leader_term.min(log_term(choices, facts, index).max(choices.below(3) as u64));
    let mut membership = membership(choices, facts);
    // Only in ascending order can they stand in a file.
    for ids in [
        &mut membership.conf_state.voters,
        &mut membership.conf_state.learners,
        &mut membership.conf_state.voters_outgoing,
        &mut membership.conf_state.learners_next,
    ] {
        ids.sort_unstable();
        ids.dedup();
    }
    let mut file = snapshot::Forged::new(CLUSTER);
    file.begin([index, term, choices.below(2) as u64 * index], &membership);
    if choices.one_in(4) {
        let etag = index.saturating_sub(choices.below(3) as u64);
        file.item(etag, b"key", b"of the snapshot");
    }
    let told = if choices.one_in(16) { index.wrapping_add(1) } else { index };
    let file = file.end();
    (SnapshotHeader { index: told, term, leader_term, bytes: file.len() as u64 }, file)
}
