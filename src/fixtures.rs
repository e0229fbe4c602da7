//! What tests of several modules begin with.

use std::sync::Arc;

use raft::eraftpb::{ConfState, Entry, HardState};

use crate::disk::Disk;
use crate::membership::{ClusterId, Membership, NodeId};
use crate::memory_disk::MemoryDisk;
use crate::raft_core::{CoreOptions, FOUNDING_INDEX, FOUNDING_TERM, RaftCore};
use crate::raft_log::{Batch, LogIdentity, LogOptions, Marker, RaftLog};

/// The cluster of all tests.
pub(crate) const CLUSTER: ClusterId = ClusterId(*b"sixteen byte id!");

/// The election timeout of all tests.
pub(crate) const ELECTION_TICKS: usize = 10;

/// Founding members 1 to `count`, all of them voters.
pub(crate) fn founders(count: u64) -> Membership {
    Membership::founding((1..=count).map(|id| (id, format!("http://127.0.0.1:1238{id}"))))
}

/// Member 1 with a vote, and member 2 without.
pub(crate) fn voter_and_learner() -> Membership {
    let conf_state = ConfState { voters: vec![1], learners: vec![2], ..ConfState::default() };
    Membership { conf_state, ..founders(2) }
}

/// The log of member `id`: a founder's, or what lies on `disk` already.
pub(crate) fn log_on(disk: &MemoryDisk, id: NodeId, founding: &Membership) -> RaftLog {
    let disk: Arc<dyn Disk> = Arc::new(disk.clone());
    let identity = LogIdentity { cluster: CLUSTER, node: id, directory: id.into() };
    if RaftLog::exists(&*disk).unwrap() {
        return RaftLog::open(disk, identity, LogOptions::default()).unwrap();
    }
    let marker = Marker { index: FOUNDING_INDEX, term: FOUNDING_TERM, conf_state: founding.conf_state.clone() };
    let hard_state = HardState { term: FOUNDING_TERM, commit: FOUNDING_INDEX, ..HardState::default() };
    RaftLog::create(disk, identity, LogOptions::default(), marker, hard_state).unwrap()
}

/// Appends entries that are committed already.
pub(crate) fn write_committed(log: &mut RaftLog, entries: &[Entry]) {
    let Some(last) = entries.last() else { return };
    let hard_state = HardState { term: last.term, commit: last.index, ..HardState::default() };
    log.write(&Batch { marker: None, entries, hard_state: Some(&hard_state) }, true).unwrap();
}

/// The core of member `id`, which continues `log` behind the founding state.
pub(crate) fn core_on(log: RaftLog, id: NodeId, founding: &Membership) -> RaftCore {
    let options = CoreOptions {
        id,
        election_ticks: ELECTION_TICKS,
        election_seed: id,
        membership: Arc::new(founding.clone()),
        snapshot_index: FOUNDING_INDEX,
        logger: slog::Logger::root(slog::Discard, slog::o!()),
    };
    RaftCore::open(log, options).unwrap()
}
