//! Which requests were applied: so that one that is proposed twice is applied once.
//!
//! For every boot of every node it keeps the newest sequence that was applied, and the ranges of sequences below it
//! that were not: they may be lost, or still come, as requests overtake each other on their way to a leader. All of
//! it is bounded and forgets only in the safe direction: a request that might have been applied before is skipped.

use std::collections::{BTreeMap, BTreeSet};

use crate::command::RequestId;
use crate::membership::NodeId;

/// The boots kept per node. Requests of earlier ones are skipped: they come from processes that are long gone, and
/// nobody waits for them. More than one, because the requests of the last process may be committed after the first
/// ones of the next.
pub const BOOTS_PER_NODE_MAX: usize = 4;

/// The ranges of missing sequences kept per boot; the lowest are dropped, as if they had been applied. A request is
/// in danger only while this many gaps lie above it, so it is more than the requests that a node has in flight.
pub const MISSING_RANGES_MAX: usize = 4096;

/// What was applied of one boot's requests.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Window {
    /// The highest sequence that was applied. Sequences count from 1.
    pub(crate) newest: u64,
    /// First and last of each range below `newest` that was not applied: ascending, with applied ones between.
    pub(crate) missing: Vec<(u64, u64)>,
}

impl Window {
    /// Records that `sequence` is applied. `false` if it was before, or may have been.
    fn record(&mut self, sequence: u64) -> bool {
        if sequence > self.newest {
            if sequence > self.newest + 1 {
                self.missing.push((self.newest + 1, sequence - 1));
            }
            self.newest = sequence;
        } else {
            let i = self.missing.partition_point(|&(_, last)| last < sequence);
            match self.missing.get(i).copied() {
                Some((first, last)) if first <= sequence => {
                    let lower = (first < sequence).then(|| (first, sequence - 1));
                    let upper = (sequence < last).then(|| (sequence + 1, last));
                    self.missing.splice(i..=i, lower.into_iter().chain(upper));
                }
                _ => return false,
            }
        }
        if self.missing.len() > MISSING_RANGES_MAX {
            self.missing.remove(0);
        }
        true
    }

    /// Whether this is what [`Window::record`] could have made: for windows from a snapshot.
    fn is_valid(&self) -> bool {
        self.newest > 0
            && self.missing.len() <= MISSING_RANGES_MAX
            && self.missing.iter().all(|&(first, last)| 1 <= first && first <= last && last < self.newest)
            && self.missing.windows(2).all(|pair| pair[0].1 < pair[1].0 - 1)
    }
}

/// The windows of all nodes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Windows {
    nodes: BTreeMap<NodeId, BTreeMap<u64, Window>>,
    /// Nodes that were removed. Their windows are gone, so nothing of theirs is applied again.
    removed: BTreeSet<NodeId>,
}

impl Windows {
    /// Records that a request is applied. `false` if it must be skipped: it was applied before, or may have been.
    pub(crate) fn record(&mut self, id: RequestId) -> bool {
        if id.sequence == 0 || self.removed.contains(&id.node) {
            return false;
        }
        let boots = self.nodes.entry(id.node).or_default();
        let full = boots.len() >= BOOTS_PER_NODE_MAX;
        if full && boots.first_key_value().is_some_and(|(&oldest, _)| id.boot < oldest) {
            return false;
        }
        if full && !boots.contains_key(&id.boot) {
            boots.pop_first();
        }
        boots.entry(id.boot).or_default().record(id.sequence)
    }

    /// Drops what is kept of a removed node, whose id never comes back; what is still on its way from it is skipped.
    pub(crate) fn forget_node(&mut self, node: NodeId) {
        self.nodes.remove(&node);
        self.removed.insert(node);
    }

    /// All windows by node and boot.
    pub(crate) fn iter(&self) -> impl Iterator<Item = (NodeId, u64, &Window)> {
        self.nodes.iter().flat_map(|(&node, boots)| boots.iter().map(move |(&boot, window)| (node, boot, window)))
    }

    /// The nodes that were removed, ascending.
    pub(crate) fn removed(&self) -> impl Iterator<Item = NodeId> {
        self.removed.iter().copied()
    }

    /// Takes a window from a snapshot, in the order of [`Windows::iter`]. `false` if it cannot be one.
    pub(crate) fn restore(&mut self, node: NodeId, boot: u64, window: Window) -> bool {
        let above = match self.nodes.last_key_value() {
            None => true,
            Some((&last, _)) if last < node => true,
            Some((&last, boots)) => last == node && boots.last_key_value().is_some_and(|(&last, _)| last < boot),
        };
        let boots = self.nodes.entry(node).or_default();
        if !above || !window.is_valid() || boots.len() >= BOOTS_PER_NODE_MAX || self.removed.contains(&node) {
            return false;
        }
        boots.insert(boot, window);
        true
    }

    /// Takes a removed node from a snapshot: ascending, before any window. `false` if it cannot be one.
    pub(crate) fn restore_removed(&mut self, node: NodeId) -> bool {
        let above = self.removed.last().is_none_or(|&last| last < node);
        above && self.nodes.is_empty() && self.removed.insert(node)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use proptest::collection::vec;
    use proptest::prelude::*;

    use super::*;

    fn id(node: NodeId, boot: u64, sequence: u64) -> RequestId {
        RequestId { node, boot, sequence }
    }

    proptest! {
        #[test]
        fn each_request_is_applied_exactly_once(
            requests in vec((1..3_u64, 1..=BOOTS_PER_NODE_MAX as u64, 1..200_u64), 1..800),
        ) {
            let (mut windows, mut applied) = (Windows::default(), HashSet::new());
            for (node, boot, sequence) in requests {
                let first = applied.insert((node, boot, sequence));
                prop_assert_eq!(windows.record(id(node, boot, sequence)), first);
            }
            let mut restored = Windows::default();
            for (node, boot, window) in windows.iter() {
                prop_assert!(restored.restore(node, boot, window.clone()));
                prop_assert_eq!(window.missing.iter().map(|(first, last)| last - first + 1).sum::<u64>(),
                    window.newest - applied.iter().filter(|id| (id.0, id.1) == (node, boot)).count() as u64);
            }
            prop_assert_eq!(restored, windows);
        }

        #[test]
        fn beyond_the_bounds_nothing_is_applied_twice(requests in vec((1..12_u64, 1..40_u64), 1..800)) {
            let (mut windows, mut applied) = (Windows::default(), HashSet::new());
            for (boot, sequence) in requests {
                if windows.record(id(1, boot, sequence)) {
                    prop_assert!(applied.insert((boot, sequence)), "{} of boot {} twice", sequence, boot);
                }
                prop_assert!(windows.iter().count() <= BOOTS_PER_NODE_MAX);
            }
        }
    }

    #[test]
    fn an_older_boot_than_those_kept_is_skipped() {
        let mut windows = Windows::default();
        for boot in [10, 30, 20, 40] {
            assert!(windows.record(id(1, boot, 1)));
        }
        assert!(!windows.record(id(1, 5, 1)), "older than all four");
        assert!(windows.record(id(1, 10, 2)), "the oldest one still counts");
        assert!(windows.record(id(1, 25, 1)), "a new one between them takes the place of the oldest");
        assert!(!windows.record(id(1, 10, 3)));
        assert!(windows.record(id(1, 20, 2)) && windows.record(id(2, 1, 1)), "others are not touched");
    }

    #[test]
    fn the_lowest_gaps_are_given_up_first() {
        let mut windows = Windows::default();
        let gaps = MISSING_RANGES_MAX as u64 + 10;
        for n in 1..=gaps {
            assert!(windows.record(id(1, 1, 2 * n)));
        }
        for n in 0..10 {
            assert!(!windows.record(id(1, 1, 2 * n + 1)), "gap {n} was given up");
        }
        for n in 10..gaps {
            assert!(windows.record(id(1, 1, 2 * n + 1)), "gap {n} was kept");
            assert!(!windows.record(id(1, 1, 2 * n + 1)));
        }
    }

    #[test]
    fn a_gap_that_is_split_counts_against_the_limit() {
        let mut windows = Windows::default();
        assert!(windows.record(id(1, 1, u64::MAX)));
        for n in 1..=2 * MISSING_RANGES_MAX as u64 {
            assert!(windows.record(id(1, 1, 2 * n)));
        }
        let (_, _, window) = windows.iter().next().unwrap();
        assert_eq!(window.missing.len(), MISSING_RANGES_MAX);
        assert!(window.is_valid());
    }

    #[test]
    fn sequences_count_from_1() {
        let mut windows = Windows::default();
        assert!(!windows.record(id(1, 1, 0)));
        assert_eq!(windows, Windows::default());
    }

    #[test]
    fn a_removed_nodes_requests_are_skipped_for_ever() {
        let mut windows = Windows::default();
        assert!(windows.record(id(3, 1, 1)) && windows.record(id(2, 1, 1)));
        windows.forget_node(3);
        assert!(!windows.record(id(3, 1, 1)) && !windows.record(id(3, 9, 1)));
        assert_eq!(windows.iter().map(|(node, ..)| node).collect::<Vec<_>>(), [2]);
        assert!(windows.record(id(2, 1, 2)));
    }

    #[test]
    fn a_window_that_no_run_could_make_is_refused() {
        for (newest, missing) in [
            (0, vec![]),
            (5, vec![(0, 1)]),
            (5, vec![(2, 1)]),
            (5, vec![(4, 5)]),
            (9, vec![(1, 2), (3, 4)]),
            (9, vec![(3, 4), (1, 1)]),
        ] {
            let window = Window { newest, missing };
            assert!(!Windows::default().restore(1, 1, window.clone()), "{window:?}");
        }
        let mut windows = Windows::default();
        let window = Window { newest: 9, missing: vec![(1, 2), (4, 4)] };
        assert!(windows.restore_removed(7) && !windows.restore_removed(7));
        assert!(windows.restore(2, 5, window.clone()));
        assert!(!windows.restore(2, 5, window.clone()) && !windows.restore(1, 6, window.clone()));
        assert!(!windows.restore(7, 1, window));
    }
}
