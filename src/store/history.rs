//! The last changes, without their values: for clients that wait for changes.

use std::sync::Arc;

use imbl::Vector;

/// The changes that are kept; one more pushes out the oldest. One costs about 75 bytes besides its key.
pub const CHANGES_MAX: usize = 100_000;

/// What happened to a key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Operation {
    /// It was set.
    Put,
    /// It was removed.
    Delete,
}

/// One change of one key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Change {
    /// The log index of the entry that made it. No two changes have the same.
    pub index: u64,
    /// What happened.
    pub operation: Operation,
    /// To which key.
    pub key: Arc<[u8]>,
}

/// Changes after the asked index have been forgotten.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HistoryGone {
    /// The lowest index whose later changes are all known: the place to go on from, after reading the keys again.
    pub known_after: u64,
}

/// The last changes in the order of their indexes. A clone is cheap and stays as it is.
#[derive(Clone)]
pub(crate) struct History {
    max: usize,
    changes: Vector<Change>,
    known_after: u64,
}

impl History {
    /// Keeps at most `max` changes. All after `known_after` will be known; it is 0 for a store that begins empty.
    pub(crate) fn new(max: usize, known_after: u64) -> Self {
        History { max, changes: Vector::new(), known_after }
    }

    /// Adds a change that is newer than all others.
    pub(crate) fn push(&mut self, change: Change) {
        self.changes.push_back(change);
        if self.changes.len() > self.max {
            let oldest = self.changes.pop_front().expect("it has just grown");
            self.known_after = oldest.index;
        }
    }

    /// Takes a change from a snapshot, in order. `false` if it cannot be the next.
    pub(crate) fn restore(&mut self, change: Change) -> bool {
        let newest = self.changes.last().map_or(self.known_after, |newest| newest.index);
        let fits = self.changes.len() < self.max && change.index > newest && !change.key.is_empty();
        if fits {
            self.changes.push_back(change);
        }
        fits
    }

    /// The lowest index whose later changes are all known.
    pub(crate) fn known_after(&self) -> u64 {
        self.known_after
    }

    /// How many changes are kept.
    pub(crate) fn len(&self) -> usize {
        self.changes.len()
    }

    /// All changes, ascending.
    pub(crate) fn iter(&self) -> impl DoubleEndedIterator<Item = &Change> {
        self.changes.iter()
    }

    /// The changes after `index`, ascending.
    pub(crate) fn after(&self, index: u64) -> Result<impl DoubleEndedIterator<Item = &Change>, HistoryGone> {
        if index < self.known_after {
            return Err(HistoryGone { known_after: self.known_after });
        }
        let start = match self.changes.binary_search_by(|change| change.index.cmp(&index)) {
            Ok(found) => found + 1,
            Err(next) => next,
        };
        Ok(self.changes.focus().narrow(start..).into_iter())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn change(index: u64) -> Change {
        Change { index, operation: Operation::Put, key: Arc::from(&index.to_be_bytes()[..]) }
    }

    fn after(history: &History, index: u64) -> Result<Vec<u64>, HistoryGone> {
        history.after(index).map(|changes| changes.map(|change| change.index).collect())
    }

    #[test]
    fn changes_after_an_index_are_all_or_an_error() {
        let mut history = History::new(100, 0);
        assert_eq!(after(&history, 0), Ok(vec![]));
        for index in 1..=1000 {
            history.push(change(3 * index));
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
        assert!(!history.restore(change(10)));
        assert!(history.restore(change(11)) && !history.restore(change(11)));
        assert!(!history.restore(Change { key: Arc::from([]), ..change(12) }));
        assert!(history.restore(change(13)) && history.restore(change(14)));
        assert!(!history.restore(change(15)), "more than are kept");
        assert_eq!(after(&history, 10), Ok(vec![11, 13, 14]));
    }
}
