//! The applier: owns the key-value state, and is the only one who changes it.
//!
//! Everything that reaches the state comes through one queue, from one thread, in log order. After each batch it is
//! published how far the state is, with an immutable [`Version`] of it if anyone wants one, and only then are the
//! waiting requests answered: who reads after an answer sees at least what the answer spoke of.

use std::fmt;
use std::sync::Arc;

use bytes::Bytes;

use crate::command::{Command, CommandError, RequestId};
use crate::fail_point::fail_point;
use crate::membership::Membership;
use crate::message::WriteReply;
use crate::replica::Apply;
use crate::store::{Applied, Capture, StateMachine, Version};

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
    /// A received snapshot can't be loaded.
    Restore {
        /// The snapshot's index.
        index: u64,
        /// What is wrong with it.
        reason: String,
    },
}

impl fmt::Display for ApplyError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            ApplyError::Command { index, source } => write!(f, "failed to apply the committed entry {index}: {source}"),
            ApplyError::Restore { index, reason } => {
                write!(f, "failed to load the snapshot of index {index}: {reason}")
            }
        }
    }
}

impl std::error::Error for ApplyError {}

/// Loads the state that a received snapshot holds, by its index.
pub type LoadSnapshot<'a> = &'a mut dyn FnMut(u64) -> Result<StateMachine, String>;

/// The state machine with what a snapshot of it needs. No thread of its own: see [`crate::node`].
pub struct Applier {
    state: StateMachine,
    membership: Arc<Membership>,
}

impl Applier {
    /// An applier that continues `state`, reached under `membership`.
    pub fn new(state: StateMachine, membership: Arc<Membership>) -> Applier {
        Applier { state, membership }
    }

    /// Applies one item. Who waits for it is put into `done`, to be told after [`Self::version`] is published.
    pub fn apply<W>(
        &mut self,
        apply: Apply<W>,
        load: LoadSnapshot<'_>,
        done: &mut Vec<(W, Done)>,
    ) -> Result<(), ApplyError> {
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
            Apply::Restore { index, membership } => {
                fail_point("restore-before");
                self.state = load(index).map_err(|reason| ApplyError::Restore { index, reason })?;
                self.membership = membership;
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

/// A repeat with somebody still waiting means that the first application was inside a snapshot that this node
/// received, or fell below the window: what came of it is not known here.
fn reply(applied: Applied) -> WriteReply {
    match applied {
        Applied::First(outcome) => WriteReply::Applied(outcome),
        Applied::Membership => unreachable!("changes of the membership are applied by the core"),
        Applied::Repeat => WriteReply::Unknown("the write was applied or refused before this node could see it"),
    }
}
