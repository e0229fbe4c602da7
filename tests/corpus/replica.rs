//! A live replica among peers that say anything: it may refuse, or end for a reason that it names, but it does not
//! panic, and what was committed stays as it was, also when the power fails.
//!
//! The messages are made so that they get far: terms and indexes near the node's own, ids that it knows, entries of the
//! kinds there are; see `peers` for them, and `node` for the node and what must hold of it. Honest answers to what the
//! node said last are among them, so it is elected and led, too.

use std::time::Duration;

use bytes::Bytes;
use raft::StateRole;
use raft::eraftpb::{Message, MessageType};
use raftexample::command::{Command, Condition, RequestId};
use raftexample::data_dir::Beginning;
use raftexample::membership::NodeId;
use raftexample::message::AdminRequest;
use raftexample::peer_protocol::{AdminOutcome, ForwardName, ForwardRefusal, ForwardedWrite, PeerMessage};

use crate::choices::Choices;
use crate::node::{ELECTION_TICKS, Node, Result, founders};
use crate::peers::{self, Facts};

/// What is done to one node, at most.
const STEPS_MAX: usize = 200;

/// How long a client waits: some are answered by their deadline.
const DEADLINE: Duration = Duration::from_secs(3);

pub fn run(input: &[u8]) {
    let mut choices = Choices::new(input);
    let beginning = match choices.below(6) {
        0 => Beginning::Found(founders(1)),
        1 => Beginning::Found(founders(2)),
        2 => Beginning::Found(founders(5)),
        3 => Beginning::Join,
        _ => Beginning::Found(founders(3)),
    };
    let mut node = Node::start(beginning);
    for _ in 0..STEPS_MAX {
        // An end is an error that names its reason, and is not looked behind.
        if choices.is_empty() || step(&mut node, &mut choices).is_err() {
            return;
        }
    }
}

fn step(node: &mut Node, choices: &mut Choices<'_>) -> Result<()> {
    let kind = choices.byte();
    match kind % 32 {
        0 | 1 => node.tick()?,
        2 => {
            for _ in 0..2 * ELECTION_TICKS {
                node.tick()?;
                if node.core().role() != StateRole::Follower {
                    break;
                }
            }
        }
        3 => elect(node)?,
        4 | 5 => answer_honestly(node, choices)?,
        6..=15 => {
            let message = peers::message(choices, &facts(node));
            node.peer(message.from, PeerMessage::Raft(message))?;
        }
        16 => follow(node, choices)?,
        17..=19 => lead(node, choices)?,
        20 => {
            let from = peers::peer(choices);
            let writes = (0..choices.below(4)).map(|_| forwarded(choices, from)).collect();
            // Mostly of the present term, and in any order.
            let (term, number) = (node.core().term(), u64::from(choices.byte()));
            let name = ForwardName { term: term - u64::from(number == 255).min(term), boot: 1, number };
            node.peer(from, PeerMessage::Forward { name, writes })?;
        }
        21 => {
            let (id, request) = (request_id(node, choices), admin_request(choices));
            let term = node.core().term();
            node.peer(id.node, PeerMessage::AdminForward { term, id, request })?;
        }
        22 => {
            let id = request_id(node, choices);
            let reason = choices.flag().then_some(ForwardRefusal::Dropped);
            let reason = reason.unwrap_or_else(|| ForwardRefusal::Full("full".to_owned()));
            node.peer(peers::peer(choices), PeerMessage::ForwardRefused { ids: vec![id, id], reason })?;
        }
        23 => {
            let id = request_id(node, choices);
            let outcome = match choices.flag() {
                true => AdminOutcome::Done { index: peers::index(choices, &facts(node)) },
                false => AdminOutcome::Unknown,
            };
            node.peer(peers::peer(choices), PeerMessage::AdminAnswer { id, outcome })?;
        }
        24 => node.write(Bytes::from(command(choices).encode()), DEADLINE)?,
        25 => node.read(DEADLINE)?,
        26 => node.admin(admin_request(choices), DEADLINE)?,
        27 => {
            let keep = choices.byte().into();
            node.take_snapshot(keep)?;
        }
        28 => {
            let (header, file) = peers::snapshot(choices, &facts(node));
            node.receive_snapshot(peers::peer(choices), header, &file)?;
        }
        29 => {
            let seed = choices.long();
            node.crash(seed)?;
        }
        _ => node.hear_of(choices.below(5), peers::peer(choices), choices.flag())?,
    }
    // Some calls are taken in together before the node does anything.
    if kind < 200 { node.process() } else { Ok(()) }
}

fn facts(node: &Node) -> Facts {
    Facts::of(node.core(), node.boot())
}

fn request_id(node: &Node, choices: &mut Choices<'_>) -> RequestId {
    let boot = if choices.flag() { node.boot() } else { choices.number() };
    RequestId { node: choices.below(5) as NodeId, boot, sequence: choices.below(8) as u64 }
}

fn command(choices: &mut Choices<'_>) -> Command {
    let key = Bytes::from(vec![b'k', choices.byte() % 4]);
    match choices.flag() {
        true => {
            let value = Bytes::copy_from_slice(choices.bytes(3));
            Command::Put { key, value, condition: Condition::default(), token: None }
        }
        false => Command::Delete { key, condition: Condition::default(), token: None },
    }
}

fn forwarded(choices: &mut Choices<'_>, from: NodeId) -> ForwardedWrite {
    let node = if choices.one_in(8) { choices.number() } else { from };
    let id = RequestId { node, boot: choices.below(2) as u64, sequence: choices.below(16) as u64 };
    let data = match choices.one_in(8) {
        true => Bytes::copy_from_slice(choices.bytes(6)),
        false => Bytes::from(command(choices).encode()),
    };
    ForwardedWrite { id, data }
}

fn admin_request(choices: &mut Choices<'_>) -> AdminRequest {
    let id = choices.below(8) as NodeId;
    let url = |id: NodeId| format!("http://127.0.0.1:1238{id}");
    match choices.below(4) {
        0 => AdminRequest::AddMember { id, url: url(id), voter: choices.pick(&[None, Some(true), Some(false)]) },
        1 => AdminRequest::RemoveMember { id },
        2 => {
            let members = (0..choices.below(5)).map(|_| choices.below(8) as NodeId);
            let members: Vec<_> = members.collect();
            AdminRequest::ReplaceMembers(members.into_iter().map(|id| (id, url(id), choices.flag())).collect())
        }
        _ => AdminRequest::TransferLeader { id },
    }
}

/// Lets the node campaign, and all others vote for it.
fn elect(node: &mut Node) -> Result<()> {
    for _ in 0..3 * ELECTION_TICKS {
        if node.core().is_leader() {
            return Ok(());
        }
        node.tick()?;
        for answer in honest_answers(node) {
            node.peer(answer.from, PeerMessage::Raft(answer))?;
            node.process()?;
        }
    }
    Ok(())
}

/// Answers some of what the node said.
fn answer_honestly(node: &mut Node, choices: &mut Choices<'_>) -> Result<()> {
    let mut answers = honest_answers(node);
    if choices.one_in(4) {
        answers.reverse();
    }
    let kept = choices.below(8) + 1;
    for answer in answers.into_iter().take(kept) {
        node.peer(answer.from, PeerMessage::Raft(answer))?;
        if choices.flag() {
            node.process()?;
        }
    }
    Ok(())
}

fn honest_answers(node: &mut Node) -> Vec<Message> {
    let last_index = node.core().last_index();
    let answer = |message: Message| {
        let mut answer = Message { from: message.to, to: message.from, term: message.term, ..Message::default() };
        answer.msg_type = match message.msg_type {
            MessageType::MsgRequestPreVote => MessageType::MsgRequestPreVoteResponse,
            MessageType::MsgRequestVote => MessageType::MsgRequestVoteResponse,
            MessageType::MsgAppend => {
                answer.index = message.index + message.entries.len() as u64;
                MessageType::MsgAppendResponse
            }
            MessageType::MsgHeartbeat => {
                answer.context = message.context;
                MessageType::MsgHeartbeatResponse
            }
            MessageType::MsgReadIndex => {
                (answer.index, answer.term) = (last_index, message.term.max(1));
                answer.entries = message.entries;
                MessageType::MsgReadIndexResp
            }
            _ => return None,
        };
        Some(answer)
    };
    node.take_said().into_iter().filter_map(answer).collect()
}

/// A peer leads, from now on or already.
fn follow(node: &mut Node, choices: &mut Choices<'_>) -> Result<()> {
    let core = node.core();
    let (from, term) = match core.leader() {
        leader if leader != 0 && leader != core.id() => (leader, core.term()),
        _ => (peers::peer(choices), core.term() + 1),
    };
    let commit = core.commit_index() + choices.below(4) as u64;
    let commit = commit.min(core.last_index());
    let msg_type = MessageType::MsgHeartbeat;
    node.peer(from, PeerMessage::Raft(Message { msg_type, from, to: core.id(), term, commit, ..Message::default() }))
}

/// The leader appends, as one does that is right.
fn lead(node: &mut Node, choices: &mut Choices<'_>) -> Result<()> {
    if node.core().leader() == 0 || node.core().is_leader() {
        follow(node, choices)?;
    }
    let facts = facts(node);
    let core = node.core();
    let back = core.last_index() - core.commit_index();
    let index = core.last_index() - (choices.below(3) as u64).min(back);
    let log_term = core.log().term(index).unwrap_or(0);
    let (from, term) = (core.leader(), core.term());
    let entries: Vec<_> =
        (index + 1..=index + choices.below(4) as u64).map(|index| peers::entry(choices, &facts, index, term)).collect();
    let commit = index.min(core.commit_index() + choices.below(8) as u64) + choices.below(3) as u64;
    let msg_type = MessageType::MsgAppend;
    let mut message = Message { msg_type, from, to: core.id(), term, index, log_term, commit, ..Message::default() };
    message.set_entries(entries.into());
    node.peer(from, PeerMessage::Raft(message))
}
