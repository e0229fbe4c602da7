//! Which data directory each peer showed at the first meeting, and what it has promised since.
//!
//! A node promises things under its id: votes, acknowledged entries. They lie in its data directory. If the directory
//! is wiped, or an older copy is put in its place, the promises are gone and the id must not be used again. So a node
//! writes down and syncs a peer's directory id before it takes the first message from it, and refuses the id with
//! another directory, or with one that is older than it was.
//!
//! What this can't detect, member by member: a directory that was wiped before the member had met it, and an older copy
//! of which the member has met no later start, if it has been restarted since and so forgotten the term and the log index
//! that it saw. And a majority of the members of any earlier time whose directories are all lost, cut off from the others,
//! have nobody who could tell them.

use std::collections::BTreeMap;
use std::sync::Arc;

use crate::codec::{self, Fields};
use crate::data_dir::{DataError, read_sealed, seal, write_sealed};
use crate::disk::Disk;
use crate::membership::{Membership, NodeId};
use crate::peer_protocol::{Hello, HelloRefusal};

const FILE: &str = "peers";

/// Nodes remembered, at most: all members there can be, and as many that were met before they became members.
pub const ACQUAINTANCES_MAX: usize = 2 * crate::membership_change::MEMBERS_MAX;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Acquaintance {
    directory: u128,
    /// The latest boot of it that was seen.
    boot: u64,
}

/// What this node remembers of its peers' data directories.
pub struct Acquaintances {
    disk: Arc<dyn Disk>,
    met: BTreeMap<NodeId, Acquaintance>,
    failed: Option<String>,
}

/// What a peer must at least have, from its messages since this node started.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Promises {
    /// The highest term it has spoken in.
    pub term: u64,
    /// The term that this node leads in, and the highest index that the peer has acknowledged in it. In a later term
    /// another leader may have replaced those entries by fewer.
    pub acknowledged: Option<(u64, u64)>,
}

impl Acquaintances {
    /// Reads what earlier runs wrote.
    ///
    /// # Errors
    /// If the file is damaged or can't be read.
    pub fn open(disk: Arc<dyn Disk>) -> Result<Acquaintances, DataError> {
        let mut met = BTreeMap::new();
        if let Some(bytes) = read_sealed(&disk, FILE)? {
            let decode = || -> Result<BTreeMap<NodeId, Acquaintance>, codec::Malformed> {
                let mut fields = Fields::new(&bytes, "list of peers");
                let count = fields.count(32)?;
                for _ in 0..count {
                    met.insert(fields.u64()?, Acquaintance { directory: fields.u128()?, boot: fields.u64()? });
                }
                fields.finish()?;
                Ok(met)
            };
            met = decode().map_err(|error| DataError::Unusable(format!("the data directory has a {error}")))?;
        }
        Ok(Acquaintances { disk, met, failed: None })
    }

    /// Meets a peer: remembers it, durably, when this returns `Ok`.
    ///
    /// # Errors
    /// The refusal. Its cause may also be this node's own disk; then it is [`HelloRefusal::NotReady`].
    pub fn meet(&mut self, hello: &Hello, promises: Promises, membership: &Membership) -> Result<(), HelloRefusal> {
        let committed = membership.members.get(&hello.from).and_then(|member| member.directory);
        let known = self.met.get(&hello.from).copied();
        let directory = committed.or(known.map(|known| known.directory));
        if directory.is_some_and(|directory| directory != hello.directory) {
            return Err(HelloRefusal::OtherDirectory);
        }
        if known.is_some_and(|known| hello.boot == known.boot) {
            return Ok(());
        }
        // A boot is synced before its run says a word: a directory that does not remember the one that was met was
        // copied before that. However often it is started, it will not.
        if known.is_some_and(|known| !hello.continues(known.boot)) {
            return Err(HelloRefusal::OlderCopy);
        }
        // A new run: it must have come back with all that it promised. (A hello within a run may be a little old.)
        let lost = |(term, index)| hello.term <= term && hello.last_index < index;
        if hello.term < promises.term || promises.acknowledged.is_some_and(lost) {
            return Err(HelloRefusal::OlderCopy);
        }
        self.met.retain(|id, _| !membership.removed.contains(id));
        if self.met.len() >= ACQUAINTANCES_MAX && known.is_none() {
            return Err(HelloRefusal::NotReady("it remembers too many nodes".to_owned()));
        }
        self.met.insert(hello.from, Acquaintance { directory: hello.directory, boot: hello.boot });
        self.write().map_err(|error| {
            self.met.remove(&hello.from);
            self.met.extend(known.map(|known| (hello.from, known)));
            self.failed = self.failed.take().or_else(|| error.is_fatal().then(|| error.to_string()));
            HelloRefusal::NotReady(error.to_string())
        })
    }

    /// Why this node has to end, if [`Self::meet`] found that: see [`DataError::is_fatal`].
    pub fn failed(&self) -> Option<&str> {
        self.failed.as_deref()
    }

    /// The data directory of a peer, if it was met.
    pub fn directory(&self, peer: NodeId) -> Option<u128> {
        self.met.get(&peer).map(|met| met.directory)
    }

    fn write(&self) -> Result<(), DataError> {
        let mut out = Vec::new();
        codec::put_u32(&mut out, self.met.len() as u32);
        for (id, Acquaintance { directory, boot }) in &self.met {
            codec::put_u64(&mut out, *id);
            codec::put_u128(&mut out, *directory);
            codec::put_u64(&mut out, *boot);
        }
        write_sealed(&self.disk, FILE, seal(&out))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fixtures::founders;
    use crate::memory_disk::{Failure, MemoryDisk, Operation};
    use crate::peer_protocol::{LogPosition, NodeIdentity};

    /// From the run that the boot counter gives this number.
    fn hello(directory: u128, run: u64, term: u64, last_index: u64) -> Hello {
        let earlier_boots = (1..run).rev().map(|run| run << 32).collect();
        let url = "http://h:1".to_owned();
        let me = NodeIdentity { cluster: None, id: 2, directory, boot: run << 32, earlier_boots, url };
        let position = LogPosition::default();
        position.set(term, last_index);
        Hello::new(&me, 1, &position)
    }

    #[test]
    fn another_directory_is_refused_also_after_a_restart() {
        let disk = MemoryDisk::new();
        let membership = founders(3);
        let mut met = Acquaintances::open(Arc::new(disk.clone())).unwrap();
        met.meet(&hello(7, 1, 1, 1), Promises::default(), &membership).unwrap();
        disk.crash(3);
        let mut met = Acquaintances::open(Arc::new(disk)).unwrap();
        assert_eq!(met.directory(2), Some(7));
        let refused = met.meet(&hello(8, 2, 1, 1), Promises::default(), &membership);
        assert_eq!(refused, Err(HelloRefusal::OtherDirectory));
        met.meet(&hello(7, 2, 1, 1), Promises::default(), &membership).unwrap();
    }

    #[test]
    fn a_directory_that_cannot_be_synced_ends_the_node_and_a_full_disk_does_not() {
        let (disk, membership) = (MemoryDisk::new(), founders(3));
        let mut met = Acquaintances::open(Arc::new(disk.clone())).unwrap();
        let meet = |met: &mut Acquaintances| met.meet(&hello(7, 1, 1, 1), Promises::default(), &membership);
        disk.fail(Some(Operation::Sync), 1, Failure::Error);
        assert!(matches!(meet(&mut met), Err(HelloRefusal::NotReady(_))));
        assert_eq!(met.failed(), None, "nothing counts on a temporary file");
        disk.fail(Some(Operation::SyncDirectory), 1, Failure::Error);
        assert!(matches!(meet(&mut met), Err(HelloRefusal::NotReady(_))));
        assert!(met.failed().is_some_and(|reason| reason.contains("sync the directory of 'peers'")));
    }

    #[test]
    fn the_committed_directory_counts_without_a_meeting() {
        let membership = founders(3).with_directory(2, 7).unwrap();
        let mut met = Acquaintances::open(Arc::new(MemoryDisk::new())).unwrap();
        let refused = met.meet(&hello(8, 1, 1, 1), Promises::default(), &membership);
        assert_eq!(refused, Err(HelloRefusal::OtherDirectory));
    }

    #[test]
    fn an_older_copy_is_refused_by_boot_term_and_acknowledged_index() {
        let membership = founders(3);
        let mut met = Acquaintances::open(Arc::new(MemoryDisk::new())).unwrap();
        met.meet(&hello(7, 5, 3, 10), Promises::default(), &membership).unwrap();
        let promises = Promises { term: 4, acknowledged: Some((4, 20)) };
        for old in [hello(7, 4, 9, 99), hello(7, 6, 3, 20), hello(7, 6, 4, 19)] {
            assert_eq!(met.meet(&old, promises, &membership), Err(HelloRefusal::OlderCopy));
        }
        met.meet(&hello(7, 5, 0, 0), promises, &membership).expect("within a run the hello may be old");
        let twin = Hello { boot: 5 << 32 | 1, ..hello(7, 5, 9, 99) };
        assert_eq!(met.meet(&twin, promises, &membership), Err(HelloRefusal::OlderCopy), "two runs of one number");
        let unfamiliar = Hello { earlier_boots: vec![6 << 32 | 1, 5 << 32 | 1, 4 << 32], ..hello(7, 7, 9, 99) };
        assert_eq!(met.meet(&unfamiliar, promises, &membership), Err(HelloRefusal::OlderCopy), "a copy started often");
        met.meet(&hello(7, 6, 4, 20), promises, &membership).unwrap();
        met.meet(&hello(7, 7, 5, 12), promises, &membership).expect("a later leader may have shortened its log");
    }
}
