//! An ordered, persistent map of items by key: cloned in constant time, changed without touching its clones.
//!
//! It has two levels: sorted leaves of a few items each, found through an `imbl::OrdMap` by a lower bound of their keys.
//! Neither `OrdMap<Key, Item>` nor `OrdSet<Item>` alone would do. The first needs a second allocation for every key.
//! The second keeps copies of elements as separators in its inner nodes, and does not renew them when an element is
//! replaced: overwritten values would stay in memory, unseen and uncounted. Bounds are keys alone.

use std::ops::Bound;
use std::sync::Arc as StdArc;

use imbl::OrdMap;
use triomphe::Arc;

use super::item::Item;

/// The most items of a leaf. More make a change dearer, as it copies a leaf that a clone of the map shares; fewer cost
/// memory for bounds and leaves.
const LEAF_ITEMS_MAX: usize = 32;

/// A leaf with fewer items than this is joined with a neighbour, if both fit into [`JOINED_ITEMS_MAX`].
const LEAF_ITEMS_MIN: usize = LEAF_ITEMS_MAX / 4;

/// Leaves room in a joined leaf, so that the next insertion does not split it again.
const JOINED_ITEMS_MAX: usize = LEAF_ITEMS_MAX * 3 / 4;

type Leaf = Arc<Vec<Item>>;

/// The items of a store in the order of their keys.
#[derive(Clone, Default)]
pub(crate) struct Keys {
    /// A leaf's keys are not below its bound, and below the next leaf's. The first bound is the empty key; no other
    /// leaf is empty.
    leaves: OrdMap<StdArc<[u8]>, Leaf>,
    len: usize,
    bytes: u64,
}

impl Keys {
    /// How many keys there are.
    pub(crate) fn len(&self) -> usize {
        self.len
    }

    /// The length of all keys and values in bytes.
    pub(crate) fn bytes(&self) -> u64 {
        self.bytes
    }

    /// The item of a key.
    pub(crate) fn get(&self, key: &[u8]) -> Option<&Item> {
        let (_, leaf) = self.leaves.get_prev(key)?;
        position(leaf, key).ok().map(|i| &leaf[i])
    }

    /// The item with the greatest key.
    pub(crate) fn last(&self) -> Option<&Item> {
        self.leaves.get_max().and_then(|(_, leaf)| leaf.last())
    }

    /// Puts an item in place of the one with its key, which is returned.
    pub(crate) fn insert(&mut self, item: Item) -> Option<Item> {
        self.bytes += item.bytes();
        let Some((bound, leaf)) = self.leaves.get_prev_mut(item.key()) else {
            // The map is empty: otherwise its lowest bound is the empty key, and nothing is below that.
            self.leaves.insert(StdArc::from([]), Arc::new(vec![item]));
            self.len += 1;
            return None;
        };
        match position(leaf, item.key()) {
            Ok(i) => {
                let old = std::mem::replace(&mut Arc::make_mut(leaf)[i], item);
                self.bytes -= old.bytes();
                Some(old)
            }
            Err(i) => {
                let items = Arc::make_mut(leaf);
                items.reserve_exact(1);
                items.insert(i, item);
                self.len += 1;
                if items.len() > LEAF_ITEMS_MAX {
                    let bound = bound.clone();
                    self.split(&bound, i == LEAF_ITEMS_MAX);
                }
                None
            }
        }
    }

    /// Halves a leaf. `appended` says that its last item is the new one: if no leaf follows, it alone goes into a new
    /// leaf, because keys that come in ascending order, as from a snapshot, then leave full leaves behind.
    fn split(&mut self, bound: &[u8], appended: bool) {
        let last = self.leaves.get_max().is_some_and(|(max, _)| **max == *bound);
        let leaf = self.leaves.get_mut(bound).expect("the leaf that was just changed is there");
        let items = Arc::make_mut(leaf);
        let upper = items.split_off(if appended && last { LEAF_ITEMS_MAX } else { LEAF_ITEMS_MAX / 2 });
        items.shrink_to_fit();
        self.leaves.insert(StdArc::from(upper[0].key()), Arc::new(upper));
    }

    /// Takes a key out and returns its item.
    pub(crate) fn remove(&mut self, key: &[u8]) -> Option<Item> {
        let (bound, leaf) = self.leaves.get_prev(key)?;
        let (i, bound) = (position(leaf, key).ok()?, bound.clone());
        let leaf = self.leaves.get_mut(&bound).expect("the leaf that was just found is there");
        let items = Arc::make_mut(leaf);
        let old = items.remove(i);
        let left = items.len();
        self.len -= 1;
        self.bytes -= old.bytes();
        if left == 0 && !bound.is_empty() {
            self.leaves.remove(&bound);
        } else if left < LEAF_ITEMS_MIN {
            self.join(&bound);
        }
        Some(old)
    }

    /// Joins a small leaf with the one behind it, or else with the one before it.
    fn join(&mut self, bound: &StdArc<[u8]>) {
        let behind = self.leaves.range::<_, [u8]>((Bound::Excluded(&**bound), Bound::Unbounded)).next();
        let pair = match behind {
            Some((behind, _)) => Some((bound.clone(), behind.clone())),
            None => {
                let before = self.leaves.range::<_, [u8]>((Bound::Unbounded, Bound::Excluded(&**bound))).next_back();
                before.map(|(before, _)| (before.clone(), bound.clone()))
            }
        };
        let Some((lower, upper)) = pair else {
            if self.len == 0 {
                self.leaves = OrdMap::new();
            }
            return;
        };
        let (lower_leaf, upper_leaf) = (&self.leaves[&lower], &self.leaves[&upper]);
        if lower_leaf.len() + upper_leaf.len() > JOINED_ITEMS_MAX {
            return;
        }
        let joined = lower_leaf.iter().chain(upper_leaf.iter()).cloned().collect();
        self.leaves.remove(&upper);
        self.leaves.insert(lower, Arc::new(joined));
    }

    /// All items.
    pub(crate) fn iter(&self) -> impl Iterator<Item = &Item> {
        self.leaves.values().flat_map(|leaf| leaf.iter())
    }

    /// The items whose keys are not below `from`.
    pub(crate) fn from(&self, from: &[u8]) -> impl Iterator<Item = &Item> {
        let first = self.leaves.get_prev(from).map(|(bound, leaf)| {
            let start = position(leaf, from).unwrap_or_else(|i| i);
            (bound, &leaf[start..])
        });
        let rest = match &first {
            Some((bound, _)) => Bound::Excluded(&***bound),
            None => Bound::Unbounded,
        };
        let rest = self.leaves.range::<_, [u8]>((rest, Bound::Unbounded));
        first.map_or(&[][..], |(_, items)| items).iter().chain(rest.flat_map(|(_, leaf)| leaf.iter()))
    }
}

fn position(leaf: &[Item], key: &[u8]) -> Result<usize, usize> {
    leaf.binary_search_by(|item| item.key().cmp(key))
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::collection::vec;
    use proptest::prelude::*;

    use super::*;

    impl Keys {
        fn check_invariants(&self) {
            let mut below: Option<&[u8]> = None;
            for (i, (bound, leaf)) in self.leaves.iter().enumerate() {
                assert!(!leaf.is_empty() || i == 0 && self.len > 0, "an empty leaf at {bound:?}");
                assert!(leaf.len() <= LEAF_ITEMS_MAX);
                for item in leaf.iter() {
                    assert!(*item.key() >= **bound && below.is_none_or(|below| below < item.key()));
                    below = Some(item.key());
                }
            }
            assert_eq!(self.len, self.iter().count());
            assert_eq!(self.bytes, self.iter().map(Item::bytes).sum::<u64>());
        }
    }

    /// Few enough keys to meet again, enough for many leaves.
    fn key(n: u16) -> Vec<u8> {
        (n % 300).to_be_bytes()[usize::from(n.is_multiple_of(3))..].to_vec()
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]
        #[test]
        fn it_is_a_map_whose_clones_stay_as_they_are(
            steps in vec((any::<u16>(), 0..10u8), 1..3000), deletions in 0..9u8, look_from: u16,
        ) {
            let (mut keys, mut model) = (Keys::default(), BTreeMap::new());
            let mut old = None;
            for (index, (n, dice)) in steps.into_iter().enumerate() {
                let key = key(n);
                if index % 500 == 250 {
                    old = Some((keys.clone(), model.clone()));
                }
                if dice < deletions {
                    prop_assert_eq!(keys.remove(&key), model.remove(&key));
                } else {
                    let item = Item::new(index as u64, &key, &vec![dice; usize::from(dice)]);
                    prop_assert_eq!(keys.insert(item.clone()), model.insert(key.clone(), item));
                }
                prop_assert_eq!(keys.get(&key), model.get(&key));
            }
            for (keys, model) in old.into_iter().chain([(keys, model)]) {
                keys.check_invariants();
                prop_assert!(keys.iter().eq(model.values()));
                prop_assert_eq!(keys.last(), model.values().last());
                let from = self::key(look_from);
                prop_assert!(keys.from(&from).eq(model.range(from.clone()..).map(|(_, item)| item)));
            }
        }
    }

    #[test]
    fn ascending_keys_fill_their_leaves() {
        let mut keys = Keys::default();
        for n in 0..1000_u32 {
            keys.insert(Item::new(1, &n.to_be_bytes(), b""));
        }
        keys.check_invariants();
        assert_eq!(keys.leaves.len(), 1000_usize.div_ceil(LEAF_ITEMS_MAX));
    }

    #[test]
    fn descending_keys_and_deletions_do_not_leave_many_small_leaves() {
        let mut keys = Keys::default();
        for n in (0..4000_u32).rev() {
            keys.insert(Item::new(1, &n.to_be_bytes(), b""));
        }
        keys.check_invariants();
        assert!(keys.leaves.len() <= 4000 / (LEAF_ITEMS_MAX / 2) + 1, "{} leaves", keys.leaves.len());
        for n in (0..4000_u32).filter(|n| n % 10 != 0) {
            keys.remove(&n.to_be_bytes());
        }
        keys.check_invariants();
        assert!(keys.leaves.len() <= 400 / (LEAF_ITEMS_MIN / 2), "{} leaves", keys.leaves.len());
        for n in 0..4000_u32 {
            keys.remove(&n.to_be_bytes());
        }
        assert!(keys.leaves.is_empty() && keys.len() == 0 && keys.bytes() == 0);
    }

    #[test]
    fn an_overwritten_or_deleted_value_is_freed() {
        let mut keys = Keys::default();
        let items: Vec<_> = (0..1000_u32).map(|n| Item::new(1, &n.to_be_bytes(), b"old")).collect();
        for item in &items {
            keys.insert(item.clone());
        }
        for n in 0..1000_u32 {
            if n % 2 == 0 {
                keys.insert(Item::new(2, &n.to_be_bytes(), b"new"));
            } else {
                keys.remove(&n.to_be_bytes());
            }
        }
        assert!(items.iter().all(Item::is_unshared), "only the test still holds the old values");
    }
}
