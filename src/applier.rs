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

/// What a waiting request is told once its batch is published.
#[derive(Debug)]
pub enum Done {
    /// A write was applied, or can't be told what it came to.
    Write(WriteReply),
    /// A read may look at the published version.
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

    /// Applies one item. Who waits for it is put into `done`, to be told after [`Self::version`] is published.
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

/// When snapshots are taken: after so many applied entries, and some time after one that could not be written.
#[derive(Clone, Debug)]
pub struct SnapshotSchedule {
    /// Entries between two snapshots.
    count: u64,
    /// The applied index of the newest snapshot, written or on its way.
    captured: u64,
    /// The applied index from which on one is due.
    due_at: u64,
    /// When one is due because the last one failed, whatever is applied until then.
    retry_at: Option<Instant>,
}

impl SnapshotSchedule {
    /// One snapshot every `count` entries, the last of which is that of `index`.
    pub fn new(count: u64, index: u64) -> SnapshotSchedule {
        SnapshotSchedule { count, captured: index, due_at: index.saturating_add(count), retry_at: None }
    }

    /// Whether it is time for one, with the state at `applied`.
    pub fn is_due(&self, applied: u64, now: Instant) -> bool {
        match self.retry_at {
            Some(at) => now >= at,
            None => applied >= self.due_at,
        }
    }

    /// Whether one of the state at `applied` would be the same as the newest.
    pub fn has(&self, applied: u64) -> bool {
        self.captured == applied
    }

    /// One of the state at `applied` is on its way to the disk.
    pub fn captured(&mut self, applied: u64) {
        *self = SnapshotSchedule::new(self.count, applied);
    }

    /// One that the leader sent, of `index`, took the place of the state. A retry is not given up: the failed one may
    /// have been of a later state than the next that is due.
    pub fn restored(&mut self, index: u64) {
        self.captured = index;
        self.due_at = index.saturating_add(self.count);
    }

    /// The last one could not be written.
    pub fn failed(&mut self, now: Instant) {
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
