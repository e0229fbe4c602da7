//! Clients: each does one thing at a time, on any node, and is told what became of it, or not.

use std::fmt;
use std::time::Duration;

use bytes::Bytes;
use raftexample::command::{Command, Condition, Kind, Tags, Token};
use raftexample::membership::NodeId;
use raftexample::message::WriteReply;
use raftexample::store::{Outcome, Version};

use crate::node::Waiter;
use crate::random::Random;
use crate::register::{Answer, Call, History, OperationId};

/// How often a client with an idempotency token tries again what it was not told the end of.
const ATTEMPTS_MAX: u64 = 5;

/// What a client is doing.
#[derive(Clone, Debug)]
struct Busy {
    operation: OperationId,
    key: String,
    call: Call,
    /// Named by the client, and so safe to repeat.
    token: Option<u64>,
    /// Attempts so far.
    attempts: u64,
    /// Whether every attempt so far surely had no effect.
    refused: bool,
}

/// One client.
pub struct Client {
    number: usize,
    busy: Option<Busy>,
    /// Counts attempts of all operations: an answer to an earlier one is not looked at.
    attempt: u64,
    /// The last tag it was told for each key.
    tags: Vec<Option<u64>>,
    random: Random,
}

/// What a client sends to a node.
#[derive(Clone, Debug)]
pub enum Request {
    Write(Bytes),
    Read,
}

/// Keys that clients use: few, so that they get into each other's way.
const KEYS: u64 = 3;

/// The longest padding of a value, so that logs grow over several segments.
const PADDING_BYTES_MAX: u64 = 1500;

impl Client {
    pub fn new(number: usize, random: Random) -> Client {
        Client { number, busy: None, attempt: 0, tags: vec![None; KEYS as usize], random }
    }

    /// Names the current attempt.
    pub fn waiter(&self) -> Waiter {
        Waiter { client: self.number, attempt: self.attempt }
    }

    /// Whether it waits for this answer.
    pub fn waits(&self, waiter: Waiter) -> bool {
        self.busy.is_some() && waiter == self.waiter()
    }

    /// How long it does nothing now.
    pub fn pause(&mut self) -> Duration {
        self.random.time(&(Duration::from_millis(1)..Duration::from_millis(250)))
    }

    /// Chooses what to do, or does again what has no end yet. `reads` says whether it may only read.
    pub fn act(&mut self, history: &mut History, next_value: &mut u64, reads: bool, now: Duration) -> Request {
        self.attempt += 1;
        if self.busy.is_none() {
            let key = self.random.below(KEYS) as usize;
            *next_value += 1;
            let call = match self.random.below(10) {
                _ if reads => Call::Get,
                0..4 => Call::Get,
                4..7 => Call::Put(*next_value),
                7 => self.tags[key].filter(|_| self.random.one_in(2)).map_or(Call::Delete, Call::DeleteIf),
                _ => Call::PutIf(self.tags[key], *next_value),
            };
            let token = (call != Call::Get && self.random.one_in(3)).then_some(*next_value);
            let key = format!("key-{key}");
            let operation = history.call(&key, call, now);
            self.busy = Some(Busy { operation, key, call, token, attempts: 0, refused: true });
        }
        let busy = self.busy.as_mut().expect("just chosen");
        busy.attempts += 1;
        request(busy)
    }

    /// What it is doing, for the trace.
    pub fn doing(&self) -> impl fmt::Display + '_ {
        fmt::from_fn(|f| self.busy.as_ref().map_or(Ok(()), |busy| write!(f, "{:?} of {}", busy.call, busy.key)))
    }

    /// Whether it wants to add something, and not to read or to remove.
    pub fn puts(&self) -> bool {
        self.busy.as_ref().is_some_and(|busy| matches!(busy.call, Call::Put(_) | Call::PutIf(..)))
    }

    /// A write has ended. Answers whether the client goes on to something else.
    pub fn write_ended(&mut self, reply: &WriteReply, history: &mut History, now: Duration) -> Result<(), String> {
        let busy = self.busy.as_mut().ok_or("a client that does nothing is answered")?;
        match reply {
            WriteReply::Applied(outcome) => {
                let answer = match *outcome {
                    Outcome::Put { etag } => Answer::Put(etag),
                    Outcome::Deleted { index } => Answer::Deleted(Some(index)),
                    Outcome::Absent => Answer::Absent,
                    Outcome::ConditionFailed { etag } => Answer::Failed(etag),
                    Outcome::TokenReused => return Err("a token is taken for another write's".to_owned()),
                };
                history.answer(busy.operation, answer, now);
                self.learn(answer);
                self.busy = None;
            }
            WriteReply::NotApplied(_) => self.attempt_failed(true, history),
            WriteReply::Unknown(_) => self.attempt_failed(false, history),
        }
        Ok(())
    }

    /// A read has ended well.
    pub fn read_ended(&mut self, version: &Version, history: &mut History, now: Duration) {
        let Some(busy) = self.busy.take() else { return };
        let item = version.get(busy.key.as_bytes());
        let answer = Answer::Found(item.map(|item| (value_of(item.value()), item.etag())));
        history.answer(busy.operation, answer, now);
        self.busy = Some(busy);
        self.learn(answer);
        self.busy = None;
    }

    /// The attempt came to nothing; `refused` says whether it surely had no effect.
    pub fn attempt_failed(&mut self, refused: bool, history: &mut History) {
        let Some(busy) = self.busy.as_mut() else { return };
        busy.refused &= refused;
        if busy.token.is_none() || busy.attempts >= ATTEMPTS_MAX {
            if busy.refused {
                history.refuse(busy.operation);
            }
            self.busy = None;
        }
    }

    fn learn(&mut self, answer: Answer) {
        let Some(busy) = &self.busy else { return };
        let key: usize = busy.key.trim_start_matches("key-").parse().expect("keys are numbered");
        self.tags[key] = match answer {
            Answer::Found(found) => found.map(|(_, tag)| tag),
            Answer::Put(tag) => Some(tag),
            Answer::Deleted(_) | Answer::Absent => None,
            Answer::Failed(tag) => tag,
        };
    }

    /// Any of the nodes.
    pub fn choose(&mut self, nodes: &[NodeId]) -> NodeId {
        *self.random.pick(nodes)
    }
}

fn request(busy: &Busy) -> Request {
    let condition = match busy.call {
        Call::PutIf(Some(tag), _) | Call::DeleteIf(tag) => {
            Condition { if_match: Some(Tags::List(vec![tag])), if_none_match: None }
        }
        Call::PutIf(None, _) => Condition { if_match: None, if_none_match: Some(Tags::Any) },
        _ => Condition::default(),
    };
    let key = Bytes::from(busy.key.clone());
    let token = |kind, value: &[u8]| {
        busy.token.map(|token| Token::new(&token.to_le_bytes(), kind, busy.key.as_bytes(), &condition, value))
    };
    let command = match busy.call {
        Call::Get => return Request::Read,
        Call::Put(value) | Call::PutIf(_, value) => {
            let value = bytes_of(value);
            let token = token(Kind::Put, &value);
            Command::Put { key, value, condition, token }
        }
        Call::Delete | Call::DeleteIf(_) => {
            let token = token(Kind::Delete, b"");
            Command::Delete { key, condition, token }
        }
    };
    Request::Write(Bytes::from(command.encode()))
}

fn bytes_of(value: u64) -> Bytes {
    let padding = Random::new(value).below(PADDING_BYTES_MAX) as usize;
    let mut bytes = value.to_le_bytes().to_vec();
    bytes.resize(8 + padding, value as u8);
    Bytes::from(bytes)
}

fn value_of(bytes: &[u8]) -> u64 {
    let (head, _) = bytes.split_first_chunk().expect("all values were made by a client");
    u64::from_le_bytes(*head)
}
