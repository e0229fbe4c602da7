//! The applier: owns the key-value state, and is the only one who changes it.
//!
//! Everything that reaches the state comes through one queue, from one thread, in log order. After each batch it is
//! published how far the state is, with an immutable [`Version`] of it if anyone wants one, and only then are the
//! waiting requests answered: who reads after an answer sees at least what the answer spoke of.

use std::fmt;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;

use crate::command::{Command, CommandError, RequestId};
use crate::fail_point::fail_point;
use crate::membership::Membership;
use crate::message::WriteReply;
use crate::replica::Apply;
use crate::store::{Applied, Capture, Replacement, StateMachine, Version};

/// How long after a snapshot that could not be written the next attempt is made: the disk is mostly full then, and what
/// is full stays so for a while.
pub const SNAPSHOT_RETRY_INTERVAL: Duration = Duration::from_secs(10);

/// Bytes of snapshots that a node writes in a second, in the long run: it rests behind each for as long as its bytes ask
/// for. While one is written, a sync of the log waits behind its bytes, and each change copies what the snapshot shares;
/// a disk that can sync a log writes many times as much.
pub const SNAPSHOT_BYTES_PER_SECOND: u64 = 3 << 20;

/// Bytes of the log that end the rest, unless the snapshot before it was larger: then as many as it had. A restart reads
/// them back, and until the next snapshot they lie on the disk.
pub const SNAPSHOT_REST_BYTES: u64 = 64 << 20;

/// Bytes that an entry counts besides its command: about what it takes in the log, and for its place in memory.
const ENTRY_BYTES: u64 = 100;

/// What a waiting request is told once it is known how far the state is.
#[derive(Debug)]
pub enum Done {
    /// A write was applied, or can't be told what it came to.
    Write(WriteReply),
    /// A read may look at the version of this moment.
    Read,
    /// A change of the cluster is done, with this membership.
    Admin(Arc<Membership>),
}

/// Why the applier can't go on. It ends the node.
#[derive(Debug)]
pub enum ApplyError {
    /// A committed command that this version can't read.
    Command {
        /// The log index.
        index: u64,
        /// What is wrong with it.
        source: CommandError,
    },
}

impl fmt::Display for ApplyError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            ApplyError::Command { index, source } => write!(f, "failed to apply the committed entry {index}: {source}"),
        }
    }
}

impl std::error::Error for ApplyError {}

/// The state machine with what a snapshot of it needs. No thread of its own: see [`crate::node`].
pub struct Applier {
    state: StateMachine,
    membership: Arc<Membership>,
    /// What received snapshots have replaced.
    replaced: Vec<Replacement>,
}

impl Applier {
    /// An applier that continues `state`, reached under `membership`.
    pub fn new(state: StateMachine, membership: Arc<Membership>) -> Applier {
        Applier { state, membership, replaced: Vec::new() }
    }

    /// Applies one item. Who waits for it is put into `done`, to be told after it was published how
    /// far the state is.
    pub fn apply<W>(&mut self, apply: Apply<W>, done: &mut Vec<(W, Done)>) -> Result<(), ApplyError> {
        match apply {
            Apply::Command { index, term, id, command, waiter } => {
                let applied = self.command(index, term, id, &command)?;
                if let Some(waiter) = waiter {
                    done.push((waiter, Done::Write(reply(applied))));
                }
            }
            Apply::Nothing { index, term } => self.state.advance(index, term),
            Apply::Membership { index, term, membership } => {
                self.state.advance(index, term);
                for id in membership.removed.difference(&self.membership.removed) {
                    self.state.forget_node(*id);
                }
                self.membership = membership;
            }
            Apply::Restore { index, membership, mut state } => {
                fail_point("restore-before");
                state.replace(&mut self.state);
                assert_eq!(self.state.applied_index(), index, "a snapshot holds the state at its index");
                self.membership = membership;
                self.replaced.push(*state);
                fail_point("restore-after");
            }
            Apply::Admin(waiter) => done.push((waiter, Done::Admin(self.membership.clone()))),
            Apply::Reads(waiters) => done.extend(waiters.into_iter().map(|waiter| (waiter, Done::Read))),
        }
        Ok(())
    }

    /// To be called before [`Self::apply`] with what is next, as many as [`LOOK_AHEAD_KEYS`](crate::store::LOOK_AHEAD_KEYS).
    /// It changes nothing but how long that takes.
    pub fn look_ahead<W>(&self, next: &[Apply<W>]) {
        self.state.look_ahead(next.iter().filter_map(|apply| match apply {
            Apply::Command { command, .. } => Command::key_of(command),
            _ => None,
        }));
    }

    fn command(&mut self, index: u64, term: u64, id: RequestId, command: &Bytes) -> Result<Applied, ApplyError> {
        let command = Command::decode(command).map_err(|source| ApplyError::Command { index, source })?;
        Ok(self.state.apply(index, term, id, &command))
    }

    /// The state as it is now, immutable and cheap.
    pub fn version(&self) -> Version {
        self.state.version()
    }

    /// Lets go of the states that snapshots have replaced, once no version of them is published any more: whoever lets
    /// go last of a large state spends time on freeing it, and that should be the thread it goes back to.
    pub fn forget_replaced(&mut self) {
        self.replaced.clear();
    }

    /// The index of the last entry applied.
    pub fn applied_index(&self) -> u64 {
        self.state.applied_index()
    }

    /// Everything that a snapshot of this moment holds, for another thread to write.
    pub fn capture(&self) -> Capture {
        self.state.capture(self.membership.clone())
    }

    /// The state, to compare.
    pub fn state(&self) -> &StateMachine {
        &self.state
    }
}

/// When snapshots are taken: after so many applied entries, some time after one that could not be written, and not while
/// one is being written or rested from.
#[derive(Clone, Debug)]
pub struct SnapshotSchedule {
    /// Entries between two snapshots, at least.
    count: u64,
    /// The applied index of the newest snapshot, written or on its way.
    captured: u64,
    /// The applied index from which on one is due.
    due_at: u64,
    /// One is on its way.
    under_way: bool,
    /// The rest behind the last one.
    rest: Option<Rest>,
    /// Bytes of the log behind the newest.
    bytes: u64,
    /// When one is due because the last one failed, whatever is applied until then.
    retry_at: Option<Instant>,
}

/// Until when, and until how many bytes of the log, no snapshot is due.
#[derive(Clone, Copy, Debug)]
struct Rest {
    until: Instant,
    bytes: u64,
}

impl SnapshotSchedule {
    /// One snapshot every `count` entries, the last of which is that of `index`.
    pub fn new(count: u64, index: u64) -> SnapshotSchedule {
        let due_at = index.saturating_add(count);
        SnapshotSchedule { count, captured: index, due_at, under_way: false, rest: None, bytes: 0, retry_at: None }
    }

    /// Whether it is time for one, with the state at `applied`.
    pub fn is_due(&self, applied: u64, now: Instant) -> bool {
        match self.retry_at {
            Some(at) => now >= at,
            None => applied >= self.due_at && !self.under_way && self.is_rested(now),
        }
    }

    fn is_rested(&self, now: Instant) -> bool {
        self.rest.is_none_or(|rest| now >= rest.until || self.bytes >= rest.bytes)
    }

    /// Whether one of the state at `applied` would be the same as the newest.
    pub fn has(&self, applied: u64) -> bool {
        self.captured == applied
    }

    /// A command of so many bytes was applied.
    pub fn applied(&mut self, bytes: usize) {
        self.bytes += bytes as u64 + ENTRY_BYTES;
    }

    /// One of the state at `applied` is on its way to the disk; [`Self::written`] or [`Self::failed`] follows.
    pub fn captured(&mut self, applied: u64) {
        *self = SnapshotSchedule { under_way: true, ..SnapshotSchedule::new(self.count, applied) };
    }

    /// It is on the disk, with so many bytes.
    pub fn written(&mut self, bytes: u64, now: Instant) {
        self.under_way = false;
        // One that failed was of an earlier state.
        self.retry_at = None;
        let until = now + Duration::from_millis(bytes / (SNAPSHOT_BYTES_PER_SECOND / 1000));
        self.rest = Some(Rest { until, bytes: bytes.max(SNAPSHOT_REST_BYTES) });
    }

    /// Ends the rest: the disk is short of space, and a snapshot lets the log be shortened.
    pub fn end_rest(&mut self) {
        self.rest = None;
    }

    /// One that the leader sent, of `index`, took the place of the state. A retry is not given up: the failed one may
    /// have been of a later state than the next that is due.
    pub fn restored(&mut self, index: u64) {
        self.captured = index;
        self.due_at = index.saturating_add(self.count);
        self.bytes = 0;
    }

    /// The last one could not be written.
    pub fn failed(&mut self, now: Instant) {
        self.under_way = false;
        self.retry_at = Some(now + SNAPSHOT_RETRY_INTERVAL);
    }
}

/// A repeat with somebody still waiting means that the first application was inside a snapshot that this node
/// received, or fell below the window: what came of it is not known here.
fn reply(applied: Applied) -> WriteReply {
    match applied {
        Applied::First(outcome) => WriteReply::Applied(outcome),
        Applied::Membership => unreachable!("changes of the membership are applied by the core"),
        Applied::Repeat => WriteReply::Unknown("the write was applied or refused before this node could see it"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    #[test]
    fn a_snapshot_is_due_after_its_entries_and_a_rest_in_proportion_to_the_bytes_of_the_last_one() {
        let began = Instant::now();
        let mut schedule = SnapshotSchedule::new(100, 1000);
        assert!(!schedule.is_due(1099, began) && schedule.is_due(1100, began), "there was none to rest from");
        schedule.captured(1100);
        assert!(!schedule.is_due(5000, began + 100 * SECOND), "it is still being written");
        schedule.written(10 * SNAPSHOT_BYTES_PER_SECOND, began);
        assert!(!schedule.is_due(5000, began + 9 * SECOND));
        assert!(schedule.is_due(5000, began + 11 * SECOND) && !schedule.is_due(1199, began + 11 * SECOND));
        schedule.written(100, began);
        assert!(schedule.is_due(5000, began), "a small one is not worth a rest");
    }

    #[test]
    fn a_rest_is_over_when_the_log_has_grown_as_large_as_the_snapshot() {
        let began = Instant::now();
        for (snapshot_bytes, log_bytes) in [(1 << 20, SNAPSHOT_REST_BYTES), (1 << 30, 1 << 30)] {
            let mut schedule = SnapshotSchedule::new(100, 0);
            schedule.captured(0);
            schedule.applied(1000);
            schedule.written(snapshot_bytes, began);
            schedule.applied((log_bytes - 3 * ENTRY_BYTES) as usize - 1001);
            assert!(!schedule.is_due(100, began));
            schedule.applied(1);
            assert!(schedule.is_due(100, began) && !schedule.is_due(99, began));
            schedule.captured(100);
            schedule.written(snapshot_bytes, began);
            assert!(!schedule.is_due(200, began), "the next one begins from zero");
            schedule.end_rest();
            assert!(schedule.is_due(200, began), "the disk is short");
        }
    }

    #[test]
    fn after_a_failure_a_snapshot_is_due_in_a_while_whatever_is_applied() {
        let began = Instant::now();
        let mut schedule = SnapshotSchedule::new(100, 0);
        schedule.captured(100);
        schedule.failed(began);
        assert!(!schedule.is_due(1000, began) && schedule.is_due(100, began + SNAPSHOT_RETRY_INTERVAL));
        schedule.restored(500);
        assert!(schedule.is_due(500, began + SNAPSHOT_RETRY_INTERVAL), "the failed one may have been of a later state");
        schedule.captured(500);
        assert!(schedule.has(500) && !schedule.is_due(500, began + SNAPSHOT_RETRY_INTERVAL));
    }
}
