//! What clients did and what they were told.

use std::fmt;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use raftexample::membership::NodeId;

use crate::random::Random;

/// The condition of a write.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Condition {
    /// None.
    Always,
    /// `If-None-Match: *`.
    Absent,
    /// `If-Match`, with this tag.
    Tag(u64),
}

/// What a client asks for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Request {
    /// GET, or HEAD, or a wait for a change of the key: all are told the key's state at an index.
    Read {
        /// Whether it is linearizable.
        fresh: bool,
        /// `after-index`.
        after_index: Option<u64>,
    },
    /// PUT. No two write the same value.
    Put(u64, Condition),
    /// DELETE.
    Delete(Condition),
    /// The keys under a prefix, which is in the place of the key.
    List {
        /// Whether it is linearizable.
        fresh: bool,
        /// Where the page begins.
        after: Option<String>,
        /// How many keys there may be on it.
        limit: usize,
    },
}

impl Request {
    /// Whether it may change something.
    pub fn is_write(&self) -> bool {
        matches!(self, Request::Put(..) | Request::Delete(_))
    }

    /// The value that it writes.
    pub fn value(&self) -> Option<u64> {
        match self {
            Request::Put(value, _) => Some(*value),
            _ => None,
        }
    }
}

/// A key in a listing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Item {
    /// The key.
    pub key: String,
    /// Its tag.
    pub tag: u64,
    /// Its value, if values were asked for.
    pub value: Option<u64>,
}

/// What became of a request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum End {
    /// To a read: this value with this tag. The value is not told by HEAD, nor by 304.
    Found { value: Option<u64>, tag: u64, index: u64 },
    /// To a read: there is no such key.
    Missing { index: u64 },
    /// To a list: this page, and whether there is more.
    Listed { index: u64, items: Vec<Item>, more: bool },
    /// To a PUT: done, with this tag.
    Stored(u64),
    /// To a DELETE: done.
    Deleted,
    /// To a DELETE: there was nothing.
    Absent,
    /// To a conditional write: the key has another tag, this one, or is absent.
    Failed(Option<u64>),
    /// It surely had no effect, now or later: this status said so, or nobody was reached (0).
    Refused(u16),
    /// Nobody said what became of it.
    Unknown,
}

impl End {
    /// The log index that an answer reflects.
    pub fn index(&self) -> Option<u64> {
        match self {
            End::Found { index, .. } | End::Missing { index } | End::Listed { index, .. } | End::Stored(index) => {
                Some(*index)
            }
            _ => None,
        }
    }

    /// Whether it is an answer to what was asked.
    pub fn is_answer(&self) -> bool {
        !matches!(self, End::Refused(_) | End::Unknown)
    }
}

/// One request, all its attempts, and its end.
#[derive(Clone, Debug)]
pub struct Operation {
    /// Who asked.
    pub client: usize,
    /// Which node was asked, at last.
    pub node: NodeId,
    /// Which of that node's starts it was, by counting; 0 if it may have been another.
    pub boot: u64,
    /// The key, or the prefix.
    pub key: String,
    /// What was asked.
    pub request: Request,
    /// Whether it had an `Idempotency-Key`.
    pub token: bool,
    /// How often it was sent.
    pub attempts: u32,
    /// When it was sent for the first time.
    pub called: Duration,
    /// When its end was known.
    pub returned: Duration,
    /// The highest index that any client had been told of before it was sent.
    pub floor: u64,
    /// Its end.
    pub end: End,
}

impl fmt::Display for Operation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Operation { client, node, key, request, called, returned, end, attempts, .. } = self;
        let token = if self.token { " with a token" } else { "" };
        write!(
            f,
            "{:.3} s to {:.3} s: client {client} at node {node}: {request:?} of {key}{token}, {attempts} times: {end:?}",
            called.as_secs_f64(),
            returned.as_secs_f64()
        )
    }
}

/// A promise that was broken.
#[derive(Clone, Debug)]
pub struct Violation {
    /// Which, and how.
    pub what: String,
    /// When it was seen.
    pub at: Duration,
    /// Those who have seen it: operations that can't all be right.
    pub operations: Vec<Operation>,
}

/// What all threads of a run share.
pub struct Run {
    start: Instant,
    /// The highest index that any client has been told of.
    newest: AtomicU64,
    values: AtomicU64,
    /// Clients are to stop.
    pub stop: AtomicBool,
    violations: Mutex<Vec<Violation>>,
}

/// Violations that are kept: one defect shows itself in many ways, and one of them is enough.
const VIOLATIONS_MAX: usize = 50;

impl Run {
    /// A run that begins now.
    pub fn new() -> Run {
        Run {
            start: Instant::now(),
            newest: AtomicU64::new(0),
            values: AtomicU64::new(0),
            stop: AtomicBool::new(false),
            violations: Mutex::default(),
        }
    }

    /// The time since the run began.
    pub fn now(&self) -> Duration {
        self.start.elapsed()
    }

    /// A value that nobody has written yet.
    pub fn next_value(&self) -> u64 {
        self.values.fetch_add(1, Ordering::Relaxed) + 1
    }

    /// The highest index that any client has been told of.
    pub fn newest(&self) -> u64 {
        self.newest.load(Ordering::SeqCst)
    }

    /// Whether clients are to stop.
    pub fn stopping(&self) -> bool {
        self.stop.load(Ordering::Relaxed)
    }

    /// Waits, as long as the run goes on.
    pub fn pause(&self, time: Duration) {
        let until = Instant::now() + time;
        while !self.stopping() && Instant::now() < until {
            std::thread::sleep(Duration::from_millis(20).min(until.saturating_duration_since(Instant::now())));
        }
    }

    /// Takes note of an end that was just told, and compares its index with what was told before it was asked for.
    pub fn told(&self, operation: &Operation) {
        let Some(index) = operation.end.index() else { return };
        self.newest.fetch_max(index, Ordering::SeqCst);
        let old = match operation.request {
            Request::Put(..) => index <= operation.floor,
            Request::Read { fresh, .. } | Request::List { fresh, .. } => fresh && index < operation.floor,
            Request::Delete(_) => false,
        };
        if old {
            let what = format!("stale: it reflects index {index}, and {} was told before it began", operation.floor);
            self.violated(what, vec![operation.clone()]);
        }
    }

    /// Takes note of a broken promise.
    pub fn violated(&self, what: String, operations: Vec<Operation>) {
        let mut violations = self.violations.lock().unwrap_or_else(PoisonError::into_inner);
        if violations.len() < VIOLATIONS_MAX {
            println!("VIOLATION: {what}");
            violations.push(Violation { what, at: self.now(), operations });
        }
    }

    /// Those so far.
    pub fn violations(&self) -> Vec<Violation> {
        self.violations.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Whether there are any.
    pub fn is_violated(&self) -> bool {
        !self.violations.lock().unwrap_or_else(PoisonError::into_inner).is_empty()
    }
}

/// The longest padding of most values, and of some: large enough to come in many pieces.
const PADDING_BYTES_MAX: u64 = 200;
const LARGE_PADDING_BYTES_MAX: u64 = 100_000;
const LARGE_ONE_IN: u64 = 200;

/// The bytes of a value: its number, and a padding that follows from it.
pub fn bytes_of(value: u64) -> Vec<u8> {
    let mut random = Random::new(value);
    let max = if random.one_in(LARGE_ONE_IN) { LARGE_PADDING_BYTES_MAX } else { PADDING_BYTES_MAX };
    let length = random.below(max) as usize;
    let mut bytes = format!("{value}:").into_bytes();
    let end = bytes.len() + length;
    while bytes.len() < end {
        bytes.extend_from_slice(&random.next().to_le_bytes());
    }
    bytes.truncate(end);
    bytes
}

/// The value of these bytes, if they are one's.
pub fn value_of(bytes: &[u8]) -> Option<u64> {
    let digits = bytes.iter().position(|byte| *byte == b':')?;
    let value = std::str::from_utf8(&bytes[..digits]).ok()?.parse().ok()?;
    (bytes_of(value) == bytes).then_some(value)
}
