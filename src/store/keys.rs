//! An ordered, persistent map of items by key: cloned in constant time, changed without touching its clones.
//!
//! It has two levels: sorted leaves of a few items each, found through an `imbl::OrdMap` by a lower bound of their keys.
//! Neither `OrdMap<Key, Item>` nor `OrdSet<Item>` alone would do. The first needs a second allocation for every key.
//! The second keeps copies of elements as separators in its inner nodes, and does not renew them when an element is
//! replaced: overwritten values would stay in memory, unseen and uncounted. Bounds are keys alone.
//!
//! What a search costs is the memory that it has to wait for, so it follows as few pointers as it can: bounds are as short
//! as they may be and lie in the map's own nodes, and a leaf knows a hash of each of its keys.

use std::borrow::Borrow;
use std::cmp::Ordering;
use std::ops;
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

/// Longer bounds are allocated: with so many bytes a bound takes 24.
const SHORT_BOUND_BYTES: usize = 22;

/// A leaf's lower bound.
#[derive(Clone)]
enum Bound {
    Short { length: u8, bytes: [u8; SHORT_BOUND_BYTES] },
    Long(StdArc<[u8]>),
}

impl Bound {
    fn new(bound: &[u8]) -> Bound {
        let mut bytes = [0; SHORT_BOUND_BYTES];
        match bytes.get_mut(..bound.len()) {
            Some(place) => {
                place.copy_from_slice(bound);
                Bound::Short { length: bound.len() as u8, bytes }
            }
            None => Bound::Long(bound.into()),
        }
    }

    /// The shortest one above `below`, which is lower than `key`, that is not above `key`.
    fn between(below: &[u8], key: &[u8]) -> Bound {
        let common = below.iter().zip(key).take_while(|(left, right)| left == right).count();
        Bound::new(&key[..=common])
    }
}

impl Borrow<[u8]> for Bound {
    fn borrow(&self) -> &[u8] {
        match self {
            Bound::Short { length, bytes } => &bytes[..usize::from(*length)],
            Bound::Long(bytes) => bytes,
        }
    }
}

impl ops::Deref for Bound {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        self.borrow()
    }
}

impl PartialEq for Bound {
    fn eq(&self, other: &Bound) -> bool {
        **self == **other
    }
}

impl Eq for Bound {}

impl PartialOrd for Bound {
    fn partial_cmp(&self, other: &Bound) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Bound {
    fn cmp(&self, other: &Bound) -> Ordering {
        (**self).cmp(other)
    }
}

/// A few items in the order of their keys.
#[derive(Clone)]
struct Leaf {
    items: Vec<Item>,
    /// Of their keys, in the same order, and then anything. There is room for the one that is too many until a split.
    hashes: [u32; LEAF_ITEMS_MAX + 1],
}

impl Leaf {
    fn of(items: Vec<Item>) -> Leaf {
        let mut hashes = [0; LEAF_ITEMS_MAX + 1];
        hashes.iter_mut().zip(&items).for_each(|(place, item)| *place = hash(item.key()));
        Leaf { items, hashes }
    }

    /// Where the item of a key is.
    fn find(&self, key: &[u8]) -> Option<usize> {
        let hash = hash(key);
        let mut known = self.hashes.iter().zip(&self.items);
        known.position(|(known, item)| *known == hash && item.key() == key)
    }

    /// Where the first item is whose key is not below this one.
    fn not_below(&self, key: &[u8]) -> usize {
        self.items.partition_point(|item| item.key() < key)
    }

    fn insert(&mut self, i: usize, item: Item) {
        self.hashes.copy_within(i..self.items.len(), i + 1);
        self.hashes[i] = hash(item.key());
        self.items.reserve_exact(1);
        self.items.insert(i, item);
    }

    fn remove(&mut self, i: usize) -> Item {
        self.hashes.copy_within(i + 1..self.items.len(), i);
        self.items.remove(i)
    }

    fn split_off(&mut self, at: usize) -> Leaf {
        let upper = Leaf::of(self.items.split_off(at));
        self.items.shrink_to_fit();
        upper
    }
}

/// Whoever chooses keys with equal hashes has to fill a leaf with them to slow down the search of that leaf, by as much
/// as a comparison for each.
fn hash(key: &[u8]) -> u32 {
    crc32c::crc32c(key)
}

/// The items of a store in the order of their keys.
#[derive(Clone, Default)]
pub(crate) struct Keys {
    /// A leaf's keys are not below its bound, and below the next leaf's. The first bound is the empty key; no other
    /// leaf is empty.
    leaves: OrdMap<Bound, Arc<Leaf>>,
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
        leaf.find(key).map(|i| &leaf.items[i])
    }

    /// The item with the greatest key.
    pub(crate) fn last(&self) -> Option<&Item> {
        self.leaves.get_max().and_then(|(_, leaf)| leaf.items.last())
    }

    /// Puts an item in place of the one with its key, which is returned.
    pub(crate) fn insert(&mut self, item: Item) -> Option<Item> {
        self.bytes += item.bytes();
        let Some((bound, leaf)) = self.leaves.get_prev_mut(item.key()) else {
            // The map is empty: otherwise its lowest bound is the empty key, and nothing is below that.
            self.leaves.insert(Bound::new(b""), Arc::new(Leaf::of(vec![item])));
            self.len += 1;
            return None;
        };
        if let Some(i) = leaf.find(item.key()) {
            let old = std::mem::replace(&mut Arc::make_mut(leaf).items[i], item);
            self.bytes -= old.bytes();
            return Some(old);
        }
        let i = leaf.not_below(item.key());
        let leaf = Arc::make_mut(leaf);
        leaf.insert(i, item);
        self.len += 1;
        if leaf.items.len() > LEAF_ITEMS_MAX {
            let bound = bound.clone();
            self.split(&bound, i == LEAF_ITEMS_MAX);
        }
        None
    }

    /// Halves a leaf. `appended` says that its last item is the new one: if no leaf follows, it alone goes into a new
    /// leaf, because keys that come in ascending order, as from a snapshot, then leave full leaves behind.
    fn split(&mut self, bound: &[u8], appended: bool) {
        let last = self.leaves.get_max().is_some_and(|(max, _)| **max == *bound);
        let leaf = self.leaves.get_mut(bound).expect("the leaf that was just changed is there");
        let lower = Arc::make_mut(leaf);
        let upper = lower.split_off(if appended && last { LEAF_ITEMS_MAX } else { LEAF_ITEMS_MAX / 2 });
        let between = Bound::between(lower.items[lower.items.len() - 1].key(), upper.items[0].key());
        self.leaves.insert(between, Arc::new(upper));
    }

    /// Takes a key out and returns its item.
    pub(crate) fn remove(&mut self, key: &[u8]) -> Option<Item> {
        let (bound, leaf) = self.leaves.get_prev(key)?;
        let (i, bound) = (leaf.find(key)?, bound.clone());
        let leaf = Arc::make_mut(self.leaves.get_mut(&bound).expect("the leaf that was just found is there"));
        let old = leaf.remove(i);
        let left = leaf.items.len();
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
    fn join(&mut self, bound: &Bound) {
        let behind = self.leaves.range::<_, [u8]>((ops::Bound::Excluded(&**bound), ops::Bound::Unbounded)).next();
        let pair = match behind {
            Some((behind, _)) => Some((bound.clone(), behind.clone())),
            None => {
                let before =
                    self.leaves.range::<_, [u8]>((ops::Bound::Unbounded, ops::Bound::Excluded(&**bound))).next_back();
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
        if lower_leaf.items.len() + upper_leaf.items.len() > JOINED_ITEMS_MAX {
            return;
        }
        let joined = lower_leaf.items.iter().chain(&upper_leaf.items).cloned().collect();
        self.leaves.remove(&upper);
        self.leaves.insert(lower, Arc::new(Leaf::of(joined)));
    }

    /// All items.
    pub(crate) fn iter(&self) -> impl Iterator<Item = &Item> {
        self.leaves.values().flat_map(|leaf| &leaf.items)
    }

    /// The items whose keys are not below `from`.
    pub(crate) fn from(&self, from: &[u8]) -> impl Iterator<Item = &Item> {
        let first = self.leaves.get_prev(from).map(|(bound, leaf)| (bound, &leaf.items[leaf.not_below(from)..]));
        let rest = match &first {
            Some((bound, _)) => ops::Bound::Excluded(&***bound),
            None => ops::Bound::Unbounded,
        };
        let rest = self.leaves.range::<_, [u8]>((rest, ops::Bound::Unbounded));
        first.map_or(&[][..], |(_, items)| items).iter().chain(rest.flat_map(|(_, leaf)| &leaf.items))
    }
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
                assert!(!leaf.items.is_empty() || i == 0 && self.len > 0, "an empty leaf at {:?}", &**bound);
                assert!(leaf.items.len() <= LEAF_ITEMS_MAX);
                assert!(below.is_none_or(|below| *below < **bound));
                assert!(leaf.items.iter().zip(leaf.hashes).all(|(item, known)| hash(item.key()) == known));
                for item in &leaf.items {
                    assert!(*item.key() >= **bound && below.is_none_or(|below| below < item.key()));
                    below = Some(item.key());
                }
            }
            assert_eq!(self.len, self.iter().count());
            assert_eq!(self.bytes, self.iter().map(Item::bytes).sum::<u64>());
        }
    }

    /// Few enough keys to meet again, enough for many leaves; some of them with more in common than a short bound holds.
    fn key(n: u16) -> Vec<u8> {
        let n = n % 300;
        let common = if n.is_multiple_of(2) { SHORT_BOUND_BYTES } else { 0 };
        [&vec![0; common], &n.to_be_bytes()[usize::from(n.is_multiple_of(3))..]].concat()
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
