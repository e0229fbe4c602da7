//! The last changes, without their values: for clients that wait for changes.
//!
//! They lie in blocks, each of which is one buffer of keys and one of what happened to them. A change with an allocation
//! of its own would take one from the heap at each write, and give back the one of a write that is long forgotten: with
//! many keys, that is as dear as the write itself.

use std::cmp::Ordering;
use std::sync::Arc;

use imbl::Vector;

/// The changes that are kept; one more pushes out the oldest. One costs about 20 bytes besides its key.
pub const CHANGES_MAX: usize = 100_000;

/// Changes of a block. What is published shares it, and then the next change copies it: with more of them that is dearer.
const BLOCK_CHANGES_MAX: usize = if cfg!(test) { 4 } else { 64 };

/// Bytes of keys at which a block is full, though it has fewer changes than it may have; for the same reason.
const BLOCK_KEY_BYTES: usize = 2048;

/// What happened to a key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Operation {
    /// It was set.
    Put,
    /// It was removed.
    Delete,
}

/// One change of one key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Change<K = Box<[u8]>> {
    /// The log index of the entry that made it. No two changes have the same.
    pub index: u64,
    /// What happened.
    pub operation: Operation,
    /// To which key.
    pub key: K,
}

impl Change<&[u8]> {
    /// The same, for those who keep it for longer than the history.
    pub(crate) fn to_owned(self) -> Change {
        Change { index: self.index, operation: self.operation, key: self.key.into() }
    }
}

/// Changes after the asked index have been forgotten.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HistoryGone {
    /// The lowest index whose later changes are all known: the place to go on from, after reading the keys again.
    pub known_after: u64,
}

/// Some changes that follow each other.
#[derive(Clone)]
struct Block {
    changes: Vec<Place>,
    /// One behind the other.
    keys: Vec<u8>,
}

/// What a block knows of a change.
#[derive(Clone, Copy)]
struct Place {
    index: u64,
    operation: Operation,
    /// Where its key ends; it begins where the one before ends.
    key_end: u32,
}

impl Block {
    fn is_full(&self) -> bool {
        self.changes.len() >= BLOCK_CHANGES_MAX || self.keys.len() >= BLOCK_KEY_BYTES
    }

    fn push(&mut self, change: Change<&[u8]>) {
        self.keys.extend_from_slice(change.key);
        let key_end = u32::try_from(self.keys.len()).expect("a block ends long before, and a key is 64 KiB at most");
        self.changes.push(Place { index: change.index, operation: change.operation, key_end });
        if self.is_full() {
            // As much as there is may stay unused, and no more.
            self.changes.shrink_to(2 * self.changes.len());
            self.keys.shrink_to(2 * self.keys.len());
        }
    }

    fn get(&self, i: usize) -> Change<&[u8]> {
        let Place { index, operation, key_end } = self.changes[i];
        let key_start = i.checked_sub(1).map_or(0, |before| self.changes[before].key_end);
        Change { index, operation, key: &self.keys[key_start as usize..key_end as usize] }
    }

    /// The changes from the one at `first` on.
    fn from(&self, first: usize) -> impl DoubleEndedIterator<Item = Change<&[u8]>> {
        (first..self.changes.len()).map(|i| self.get(i))
    }

    fn newest(&self) -> u64 {
        self.changes.last().expect("no block is empty").index
    }
}

/// The last changes in the order of their indexes. A clone is cheap and stays as it is.
#[derive(Clone)]
pub(crate) struct History {
    max: usize,
    /// None of them is empty.
    blocks: Vector<Arc<Block>>,
    /// How many changes at the beginning of the first block are forgotten; never all of them.
    forgotten: usize,
    len: usize,
    known_after: u64,
}

impl History {
    /// Keeps at most `max` changes. All after `known_after` will be known; it is 0 for a store that begins empty.
    pub(crate) fn new(max: usize, known_after: u64) -> Self {
        History { max, blocks: Vector::new(), forgotten: 0, len: 0, known_after }
    }

    /// Adds a change that is newer than all others.
    pub(crate) fn push(&mut self, change: Change<&[u8]>) {
        match self.blocks.back_mut() {
            Some(block) if !block.is_full() => Arc::make_mut(block).push(change),
            _ => {
                // About as large as the one before: growing step by step would ask the heap over and over.
                let key_bytes = self.blocks.last().map_or(0, |block| block.keys.len()).max(change.key.len());
                let (changes, keys) = (Vec::with_capacity(BLOCK_CHANGES_MAX), Vec::with_capacity(key_bytes));
                let mut block = Block { changes, keys };
                block.push(change);
                self.blocks.push_back(Arc::new(block));
            }
        }
        self.len += 1;
        if self.len > self.max {
            self.forget_oldest();
        }
    }

    fn forget_oldest(&mut self) {
        let oldest = self.blocks.front().expect("there is more than may be kept");
        self.known_after = oldest.changes[self.forgotten].index;
        self.len -= 1;
        self.forgotten += 1;
        if self.forgotten == oldest.changes.len() {
            self.blocks.pop_front();
            self.forgotten = 0;
        }
    }

    /// Takes a change from a snapshot, in order. `false` if it cannot be the next.
    pub(crate) fn restore(&mut self, change: Change<&[u8]>) -> bool {
        let newest = self.blocks.last().map_or(self.known_after, |block| block.newest());
        let fits = self.len < self.max && change.index > newest && !change.key.is_empty();
        if fits {
            self.push(change);
        }
        fits
    }

    /// The lowest index whose later changes are all known.
    pub(crate) fn known_after(&self) -> u64 {
        self.known_after
    }

    /// How many changes are kept.
    pub(crate) fn len(&self) -> usize {
        self.len
    }

    /// All changes, ascending.
    pub(crate) fn iter(&self) -> impl DoubleEndedIterator<Item = Change<&[u8]>> {
        self.from(0, self.forgotten)
    }

    /// The changes after `index`, ascending.
    pub(crate) fn after(&self, index: u64) -> Result<impl DoubleEndedIterator<Item = Change<&[u8]>>, HistoryGone> {
        if index < self.known_after {
            return Err(HistoryGone { known_after: self.known_after });
        }
        // The first block that has any of them: none compares as equal.
        let ends_before = |block: &Arc<Block>| if block.newest() <= index { Ordering::Less } else { Ordering::Greater };
        let block = self.blocks.binary_search_by(ends_before).unwrap_or_else(|first| first);
        let first =
            self.blocks.get(block).map_or(0, |block| block.changes.partition_point(|place| place.index <= index));
        Ok(self.from(block, first))
    }

    /// The changes from one of a block on.
    fn from(&self, block: usize, first: usize) -> impl DoubleEndedIterator<Item = Change<&[u8]>> {
        let blocks = self.blocks.focus().narrow(block..).into_iter();
        blocks.enumerate().flat_map(move |(i, block)| block.from(if i == 0 { first } else { 0 }))
    }
}

#[cfg(test)]
mod tests {
    use std::collections::VecDeque;

    use proptest::collection::vec;
    use proptest::prelude::*;

    use super::*;

    fn change(index: u64, key: &[u8]) -> Change<&[u8]> {
        Change { index, operation: if index.is_multiple_of(3) { Operation::Delete } else { Operation::Put }, key }
    }

    fn after(history: &History, index: u64) -> Result<Vec<u64>, HistoryGone> {
        history.after(index).map(|changes| changes.map(|change| change.index).collect())
    }

    #[test]
    fn changes_after_an_index_are_all_or_an_error() {
        let mut history = History::new(100, 0);
        assert_eq!(after(&history, 0), Ok(vec![]));
        for index in 1..=1000 {
            history.push(change(3 * index, b"key"));
            let lowest = 3 * index.saturating_sub(100);
            assert_eq!(history.known_after(), lowest);
            if lowest > 0 {
                assert_eq!(after(&history, lowest - 1), Err(HistoryGone { known_after: lowest }));
            }
            assert_eq!(after(&history, lowest).unwrap().len(), index.min(100) as usize);
        }
        assert_eq!(after(&history, 2993), Ok(vec![2994, 2997, 3000]));
        assert_eq!(after(&history, 2994), Ok(vec![2997, 3000]));
        assert_eq!(after(&history, 3000), Ok(vec![]));
        assert_eq!(after(&history, u64::MAX), Ok(vec![]));
    }

    #[test]
    fn a_restored_history_ascends_from_where_it_begins() {
        let mut history = History::new(3, 10);
        let mut restore = |index, key| history.restore(change(index, key));
        assert!(!restore(10, b"k"));
        assert!(restore(11, b"k") && !restore(11, b"k"));
        assert!(!restore(12, b""));
        assert!(restore(13, b"k") && restore(14, b"k"));
        assert!(!restore(15, b"k"), "more than are kept");
        assert_eq!(after(&history, 10), Ok(vec![11, 13, 14]));
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]
        #[test]
        fn it_is_a_queue_whose_clones_stay_as_they_are(
            // Blocks that end with their last change, and some that end with a long key.
            keys in vec((1_u64..4, prop_oneof![9 => 1_usize..30, 1 => 1000..3000_usize]), 1..1000),
            max in 1..500_usize, cloned_at: prop::sample::Index, look_after: prop::sample::Index,
        ) {
            let (mut history, mut model, mut known_after) = (History::new(max, 0), VecDeque::new(), 0);
            let (cloned_at, mut clone, mut index) = (cloned_at.index(keys.len()), None, 0);
            for (i, (step, key_bytes)) in keys.into_iter().enumerate() {
                index += step;
                let key = vec![index as u8; key_bytes];
                history.push(change(index, &key));
                model.push_back(change(index, &key).to_owned());
                if model.len() > max {
                    known_after = model.pop_front().expect("it is longer than that").index;
                }
                if i == cloned_at {
                    clone = Some((history.clone(), model.clone(), known_after));
                }
            }
            for (history, model, known_after) in clone.into_iter().chain([(history, model, known_after)]) {
                prop_assert!(history.blocks.iter().all(|block| !block.changes.is_empty()));
                prop_assert_eq!((history.len(), history.known_after()), (model.len(), known_after));
                prop_assert!(history.iter().map(Change::to_owned).eq(model.iter().cloned()));
                prop_assert!(history.iter().rev().map(Change::to_owned).eq(model.iter().rev().cloned()));
                let last = model.back().expect("one was pushed").index;
                let after = known_after + look_after.index((last - known_after) as usize + 2) as u64;
                let rest = history.after(after).expect("they are all known");
                prop_assert!(rest.map(Change::to_owned).eq(model.iter().filter(|change| change.index > after).cloned()));
            }
        }
    }
}
