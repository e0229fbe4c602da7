//! An ordered, persistent map of items by key: cloned in constant time, changed without touching its clones.
//!
//! It is a B+ tree: sorted leaves of a few items each, and above them branches that know the bounds between their
//! children. A clone shares all of it, and a change copies what is shared of the path from the root to one leaf.
//!
//! The maps of `imbl` would do as well, but for their price. `OrdMap<Key, Item>` needs a second allocation for every
//! key. `OrdSet<Item>` keeps copies of elements as separators in its inner nodes, and does not renew them when an element
//! is replaced: overwritten values would stay in memory, unseen and uncounted. And to find the leaf of a key in an `OrdMap`
//! of leaves takes two cursors with memory of their own, and a third search to change it.
//!
//! What a search costs is the memory that it has to wait for, so it follows as few pointers as it can: bounds are as short
//! as they may be and lie in the branch, a leaf knows a hash of each of its keys, and whoever has several keys to change
//! looks ahead for all of them.

use std::hint::black_box;
use std::slice;
use std::sync::Arc as StdArc;

use triomphe::Arc;

use super::item::Item;

/// The most items of a leaf. More make a change dearer, as it copies a leaf that a clone of the map shares; fewer cost
/// memory for bounds and leaves. The unit tests want deep trees of few keys.
const LEAF_ITEMS_MAX: usize = if cfg!(test) { 8 } else { 32 };

/// The most children of a branch, for the same reasons.
const BRANCH_CHILDREN_MAX: usize = if cfg!(test) { 8 } else { 16 };

/// A node with less than this part of what it may have is joined with a neighbour, if there is room.
const PART_MIN: usize = 4;

/// Leaves room in a joined leaf, so that the next insertion does not split it again.
const JOINED_ITEMS_MAX: usize = LEAF_ITEMS_MAX * 3 / 4;

/// And in a joined branch.
const JOINED_CHILDREN_MAX: usize = BRANCH_CHILDREN_MAX * 3 / 4;

/// Keys that are looked ahead for at once. A processor waits for about so many places in memory at the same time.
pub const LOOK_AHEAD_KEYS: usize = 16;

/// With fewer keys the processor's caches hold what it would be looked ahead for.
const LOOK_AHEAD_LEN_MIN: usize = if cfg!(test) { 20 } else { 20_000 };

/// Longer bounds are allocated: with so many bytes a bound takes 32.
const SHORT_BYTES: usize = 22;

/// A key's place among bounds: its first [`SHORT_BYTES`], filled up with zeros, and behind them how many there are, or one
/// more than that if there are more. Compared as numbers these are in the order of the keys; if they are equal, the rest
/// of the bytes decides.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Position<'k>([u64; 3], &'k [u8]);

impl<'k> Position<'k> {
    fn of(key: &'k [u8]) -> Position<'k> {
        let mut padded = [0; SHORT_BYTES + 2];
        let (short, rest) = key.split_at(key.len().min(SHORT_BYTES));
        padded[..short.len()].copy_from_slice(short);
        padded[SHORT_BYTES + 1] = key.len().min(SHORT_BYTES + 1) as u8;
        let word = |i: usize| u64::from_be_bytes(*padded[i..].first_chunk().expect("three words are 24 bytes"));
        Position([word(0), word(8), word(16)], rest)
    }
}

/// Keys that are not below it belong to the node behind it, the others to the one before.
#[derive(Clone)]
enum Bound {
    Short([u64; 3]),
    Long(StdArc<[u8]>),
}

impl Bound {
    fn new(bound: &[u8]) -> Bound {
        match Position::of(bound) {
            Position(words, []) => Bound::Short(words),
            _ => Bound::Long(bound.into()),
        }
    }

    /// The shortest one above `below`, which is lower than `key`, that is not above `key`.
    fn between(below: &[u8], key: &[u8]) -> Bound {
        let common = below.iter().zip(key).take_while(|(left, right)| left == right).count();
        Bound::new(&key[..=common])
    }

    fn position(&self) -> Position<'_> {
        match self {
            Bound::Short(words) => Position(*words, &[]),
            Bound::Long(bytes) => Position::of(bytes),
        }
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

    fn put(&mut self, item: Item, rightmost: bool) -> Inserted {
        if let Some(i) = self.find(item.key()) {
            return Inserted::Replaced(std::mem::replace(&mut self.items[i], item));
        }
        let i = self.not_below(item.key());
        self.hashes.copy_within(i..self.items.len(), i + 1);
        self.hashes[i] = hash(item.key());
        self.items.reserve_exact(1);
        self.items.insert(i, item);
        if self.items.len() <= LEAF_ITEMS_MAX {
            return Inserted::Added;
        }
        let upper = Leaf::of(self.items.split_off(split_at(LEAF_ITEMS_MAX, i, rightmost)));
        self.items.shrink_to_fit();
        let bound = Bound::between(self.items[self.items.len() - 1].key(), upper.items[0].key());
        Inserted::Split(bound, Node::Leaf(upper))
    }

    fn remove(&mut self, i: usize) -> Item {
        self.hashes.copy_within(i + 1..self.items.len(), i);
        let old = self.items.remove(i);
        if self.items.len() <= self.items.capacity() / 2 {
            self.items.shrink_to_fit();
        }
        old
    }
}

/// Whoever chooses keys with equal hashes has to fill a leaf with them to slow down the search of that leaf, by as much
/// as a comparison for each.
fn hash(key: &[u8]) -> u32 {
    crc32c::crc32c(key)
}

/// What lies above some nodes.
#[derive(Clone)]
struct Branch {
    /// Those between one child and the next.
    bounds: Vec<Bound>,
    children: Vec<Arc<Node>>,
}

#[derive(Clone)]
enum Node {
    Branch(Branch),
    Leaf(Leaf),
}

/// What became of an insertion.
enum Inserted {
    /// An item with the same key was there.
    Replaced(Item),
    /// There was none.
    Added,
    /// Nor here, and this node has given its upper half away, which begins at the bound.
    Split(Bound, Node),
}

impl Branch {
    /// The child that a key belongs to.
    fn child_of(&self, key: Position<'_>) -> usize {
        self.bounds.partition_point(|bound| bound.position() <= key)
    }

    /// Takes in what a child has given away.
    fn add_behind(&mut self, i: usize, bound: Bound, upper: Node, rightmost: bool) -> Inserted {
        self.bounds.insert(i, bound);
        self.children.insert(i + 1, Arc::new(upper));
        if self.children.len() <= BRANCH_CHILDREN_MAX {
            return Inserted::Added;
        }
        let children = self.children.split_off(split_at(BRANCH_CHILDREN_MAX, i + 1, rightmost));
        let bounds = self.bounds.split_off(self.children.len());
        let bound = self.bounds.pop().expect("there is one before each child but the first");
        Inserted::Split(bound, Node::Branch(Branch { bounds, children }))
    }

    /// Joins a child from which something was removed with a neighbour, if it has become small.
    fn tidy(&mut self, i: usize) {
        if self.children.len() == 1 {
            return;
        }
        if self.children[i].is_empty() {
            self.children.remove(i);
            // Its keys belong to the child before it from now on, or else to the one behind.
            self.bounds.remove(i.saturating_sub(1));
            return;
        }
        if !self.children[i].is_small() {
            return;
        }
        // With the child behind it, or else with the one before: keys that go in ascending order leave the one behind full.
        let behind = Some(i).filter(|i| i + 1 < self.children.len());
        let mut pairs = behind.into_iter().chain(i.checked_sub(1));
        if let Some(lower) = pairs.find(|lower| self.children[*lower].has_room_for(&self.children[lower + 1])) {
            let bound = self.bounds.remove(lower);
            let upper = self.children.remove(lower + 1);
            Arc::make_mut(&mut self.children[lower]).join(bound, &upper);
        }
    }
}

/// Where a node of one more than `max` is split whose new part is the one at `new`. If nothing follows, that part alone
/// goes into a new node, because keys that come in ascending order, as from a snapshot, then leave full nodes behind.
fn split_at(max: usize, new: usize, rightmost: bool) -> usize {
    if rightmost && new == max { max } else { max / 2 }
}

impl Node {
    /// Puts an item in place of the one with its key. Behind the rightmost node there is no other.
    fn insert(&mut self, item: Item, rightmost: bool) -> Inserted {
        match self {
            Node::Leaf(leaf) => leaf.put(item, rightmost),
            Node::Branch(branch) => {
                let i = branch.child_of(Position::of(item.key()));
                let rightmost = rightmost && i + 1 == branch.children.len();
                match Arc::make_mut(&mut branch.children[i]).insert(item, rightmost) {
                    Inserted::Split(bound, upper) => branch.add_behind(i, bound, upper, rightmost),
                    inserted => inserted,
                }
            }
        }
    }

    /// Takes out a key that is there.
    fn remove(&mut self, key: &[u8]) -> Item {
        match self {
            Node::Leaf(leaf) => leaf.remove(leaf.find(key).expect("it was found before")),
            Node::Branch(branch) => {
                let i = branch.child_of(Position::of(key));
                let old = Arc::make_mut(&mut branch.children[i]).remove(key);
                branch.tidy(i);
                old
            }
        }
    }

    /// Whether it holds no item: then it is a leaf, or has one child that holds none.
    fn is_empty(&self) -> bool {
        match self {
            Node::Leaf(leaf) => leaf.items.is_empty(),
            Node::Branch(branch) => branch.children.len() == 1 && branch.children[0].is_empty(),
        }
    }

    fn is_small(&self) -> bool {
        match self {
            Node::Leaf(leaf) => leaf.items.len() < LEAF_ITEMS_MAX / PART_MIN,
            Node::Branch(branch) => branch.children.len() < BRANCH_CHILDREN_MAX / PART_MIN,
        }
    }

    /// Whether what the node behind it holds would fit in, and some more.
    fn has_room_for(&self, upper: &Node) -> bool {
        match (self, upper) {
            (Node::Leaf(lower), Node::Leaf(upper)) => lower.items.len() + upper.items.len() <= JOINED_ITEMS_MAX,
            (Node::Branch(lower), Node::Branch(upper)) => {
                lower.children.len() + upper.children.len() <= JOINED_CHILDREN_MAX
            }
            _ => unreachable!("all leaves are at the same depth"),
        }
    }

    /// Takes in what the node behind it holds.
    fn join(&mut self, bound: Bound, upper: &Node) {
        match (self, upper) {
            (Node::Leaf(lower), Node::Leaf(upper)) => {
                *lower = Leaf::of(lower.items.iter().chain(&upper.items).cloned().collect());
            }
            (Node::Branch(lower), Node::Branch(upper)) => {
                lower.bounds.push(bound);
                lower.bounds.extend_from_slice(&upper.bounds);
                lower.children.extend_from_slice(&upper.children);
            }
            _ => unreachable!("all leaves are at the same depth"),
        }
    }
}

/// The items of a store in the order of their keys.
#[derive(Clone)]
pub(crate) struct Keys {
    /// No leaf in it is empty, unless it is the root.
    root: Arc<Node>,
    len: usize,
    bytes: u64,
}

impl Default for Keys {
    fn default() -> Keys {
        Keys { root: Arc::new(Node::Leaf(Leaf::of(Vec::new()))), len: 0, bytes: 0 }
    }
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
        let (position, mut node) = (Position::of(key), &*self.root);
        loop {
            match node {
                Node::Branch(branch) => node = &branch.children[branch.child_of(position)],
                Node::Leaf(leaf) => return leaf.find(key).map(|i| &leaf.items[i]),
            }
        }
    }

    /// Reads what a change of each of these keys, [`LOOK_AHEAD_KEYS`] at most, will read, and does nothing with it: the
    /// places in memory that several keys lead to are waited for together, those that one leads to one after the other.
    pub(crate) fn look_ahead<'k>(&self, keys: impl Iterator<Item = &'k [u8]>) {
        if self.len < LOOK_AHEAD_LEN_MIN {
            return;
        }
        let mut paths = [const { None }; LOOK_AHEAD_KEYS];
        for (path, key) in paths.iter_mut().zip(keys) {
            *path = Some((Position::of(key), hash(key), &*self.root));
        }
        while let Some((.., Node::Branch(_))) = paths[0] {
            for (position, _, node) in paths.iter_mut().flatten() {
                let Node::Branch(branch) = node else { unreachable!("all leaves are at the same depth") };
                *node = &branch.children[branch.child_of(*position)];
            }
            for (.., node) in paths.iter().flatten() {
                match node {
                    Node::Branch(branch) => black_box(branch.children.len()),
                    Node::Leaf(leaf) => black_box(leaf.items.len()),
                };
            }
        }
        let leaves = paths.iter().flatten().filter_map(|(_, hash, node)| match node {
            Node::Leaf(leaf) => Some((hash, leaf)),
            Node::Branch(_) => None,
        });
        for (_, leaf) in leaves.clone() {
            // The cache lines that a leaf lies in.
            black_box((leaf.hashes[LEAF_ITEMS_MAX / 2], leaf.hashes[LEAF_ITEMS_MAX]));
        }
        let mut items = [const { None }; LOOK_AHEAD_KEYS];
        for (item, (hash, leaf)) in items.iter_mut().zip(leaves) {
            *item = leaf.hashes.iter().position(|known| known == hash).and_then(|i| leaf.items.get(i));
        }
        for item in items.iter().flatten() {
            black_box(item.etag());
        }
    }

    /// The item with the greatest key.
    pub(crate) fn last(&self) -> Option<&Item> {
        let mut node = &*self.root;
        loop {
            match node {
                Node::Branch(branch) => node = branch.children.last().expect("a branch has children"),
                Node::Leaf(leaf) => return leaf.items.last(),
            }
        }
    }

    /// Puts an item in place of the one with its key, which is returned.
    pub(crate) fn insert(&mut self, item: Item) -> Option<Item> {
        self.bytes += item.bytes();
        match Arc::make_mut(&mut self.root).insert(item, true) {
            Inserted::Replaced(old) => {
                self.bytes -= old.bytes();
                return Some(old);
            }
            Inserted::Added => {}
            Inserted::Split(bound, upper) => {
                let children = vec![self.root.clone(), Arc::new(upper)];
                self.root = Arc::new(Node::Branch(Branch { bounds: vec![bound], children }));
            }
        }
        self.len += 1;
        None
    }

    /// Takes a key out and returns its item.
    pub(crate) fn remove(&mut self, key: &[u8]) -> Option<Item> {
        // What is not there copies nothing.
        self.get(key)?;
        let old = Arc::make_mut(&mut self.root).remove(key);
        while let Node::Branch(Branch { children, .. }) = &*self.root
            && let [only] = &children[..]
        {
            self.root = only.clone();
        }
        self.len -= 1;
        self.bytes -= old.bytes();
        Some(old)
    }

    /// All items.
    pub(crate) fn iter(&self) -> impl Iterator<Item = &Item> {
        self.from(b"")
    }

    /// The items whose keys are not below `from`.
    pub(crate) fn from(&self, from: &[u8]) -> impl Iterator<Item = &Item> {
        let (position, mut behind, mut node) = (Position::of(from), Vec::new(), &*self.root);
        loop {
            match node {
                Node::Branch(branch) => {
                    let i = branch.child_of(position);
                    behind.push(branch.children[i + 1..].iter());
                    node = &branch.children[i];
                }
                Node::Leaf(leaf) => return Items { behind, items: leaf.items[leaf.not_below(from)..].iter() },
            }
        }
    }
}

/// Items in the order of their keys.
struct Items<'k> {
    /// The nodes that are still to come, those that come first at the end.
    behind: Vec<slice::Iter<'k, Arc<Node>>>,
    /// The rest of a leaf.
    items: slice::Iter<'k, Item>,
}

impl<'k> Iterator for Items<'k> {
    type Item = &'k Item;

    fn next(&mut self) -> Option<&'k Item> {
        loop {
            if let Some(item) = self.items.next() {
                return Some(item);
            }
            match self.behind.last_mut()?.next().map(|node| &**node) {
                Some(Node::Branch(branch)) => self.behind.push(branch.children.iter()),
                Some(Node::Leaf(leaf)) => self.items = leaf.items.iter(),
                None => drop(self.behind.pop()),
            }
        }
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
            let mut depths = Vec::new();
            check(&self.root, (Position::of(b""), None), 0, &mut depths);
            assert!(depths.iter().all(|depth| *depth == depths[0]), "all leaves are at the same depth: {depths:?}");
            assert!(self.len == 0 || !self.root.is_empty());
            assert!(!matches!(&*self.root, Node::Branch(branch) if branch.children.len() == 1));
            assert!(self.iter().is_sorted_by(|one, next| one.key() < next.key()));
            assert_eq!(self.len, self.iter().count());
            assert_eq!(self.bytes, self.iter().map(Item::bytes).sum::<u64>());
        }

        fn ascending(count: u32) -> Keys {
            let mut keys = Keys::default();
            for n in 0..count {
                keys.insert(Item::new(1, &n.to_be_bytes(), b""));
            }
            keys
        }

        fn leaves(&self) -> usize {
            let mut depths = Vec::new();
            check(&self.root, (Position::of(b""), None), 0, &mut depths);
            depths.len()
        }
    }

    /// Checks a node whose keys are within bounds, and notes how deep its leaves lie.
    fn check(node: &Node, (from, to): (Position<'_>, Option<Position<'_>>), depth: usize, depths: &mut Vec<usize>) {
        match node {
            Node::Leaf(leaf) => {
                assert!(!leaf.items.is_empty() || depth == 0, "an empty leaf");
                assert!(leaf.items.len() <= LEAF_ITEMS_MAX);
                assert!(leaf.items.iter().zip(leaf.hashes).all(|(item, known)| hash(item.key()) == known));
                let mut positions = leaf.items.iter().map(|item| Position::of(item.key()));
                assert!(positions.all(|position| from <= position && to.is_none_or(|to| position < to)));
                depths.push(depth);
            }
            Node::Branch(Branch { bounds, children }) => {
                assert!((1..=BRANCH_CHILDREN_MAX).contains(&children.len()) && bounds.len() + 1 == children.len());
                let ends = bounds.iter().map(|bound| Some(bound.position())).chain([to]);
                let mut from = from;
                for (child, end) in children.iter().zip(ends) {
                    assert!(end.is_none_or(|end| from < end));
                    check(child, (from, end), depth + 1, depths);
                    from = end.unwrap_or(from);
                }
            }
        }
    }

    /// Few enough keys to meet again, enough for many leaves; some of them with more in common than a short bound holds.
    fn key(n: u16) -> Vec<u8> {
        let n = n % 300;
        let common = if n.is_multiple_of(2) { SHORT_BYTES } else { 0 };
        [&vec![0; common], &n.to_be_bytes()[usize::from(n.is_multiple_of(3))..]].concat()
    }

    proptest! {
        #[test]
        fn positions_are_in_the_order_of_their_keys(
            // Much in common, about as long as a short bound, and with zeros at the end.
            left in (0..30_usize, vec(0..3_u8, 0..4)), right in (0..30_usize, vec(0..3_u8, 0..4)),
        ) {
            let [left, right] = [left, right].map(|(common, rest)| [vec![0; common], rest].concat());
            prop_assert_eq!(Position::of(&left).cmp(&Position::of(&right)), left.cmp(&right));
            prop_assert_eq!(Bound::new(&left).position().cmp(&Position::of(&right)), left.cmp(&right));
        }
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
                keys.look_ahead([&key[..], &[], &[255; 40]].into_iter());
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
        let keys = Keys::ascending(1000);
        keys.check_invariants();
        assert_eq!(keys.leaves(), 1000_usize.div_ceil(LEAF_ITEMS_MAX));
    }

    #[test]
    fn descending_keys_and_deletions_do_not_leave_many_small_leaves() {
        let mut keys = Keys::default();
        for n in (0..4000_u32).rev() {
            keys.insert(Item::new(1, &n.to_be_bytes(), b""));
        }
        keys.check_invariants();
        assert!(keys.leaves() <= 4000 / (LEAF_ITEMS_MAX / 2) + 1, "{} leaves", keys.leaves());
        let (full, half_full) = (Keys::ascending(4000), keys.clone());
        for (mut keys, downwards) in
            [(full.clone(), false), (full, true), (half_full.clone(), false), (half_full, true)]
        {
            for n in 0..4000_u32 {
                let n = if downwards { 3999 - n } else { n };
                if n % LEAF_ITEMS_MAX as u32 != 0 {
                    keys.remove(&n.to_be_bytes());
                }
            }
            keys.check_invariants();
            assert!(keys.leaves() <= keys.len() / (LEAF_ITEMS_MAX / PART_MIN), "{} of {}", keys.leaves(), keys.len());
        }
        for n in 0..4000_u32 {
            keys.remove(&n.to_be_bytes());
        }
        keys.check_invariants();
        assert!(keys.root.is_empty() && keys.leaves() == 1 && keys.len() == 0 && keys.bytes() == 0);
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
