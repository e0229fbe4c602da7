//! The published, immutable view of the store.

use super::history::{CHANGES_MAX, Change, History, HistoryGone};
use super::item::Item;
use super::keys::Keys;

/// The store as it was at one applied index: what readers see. Cloning it is cheap and so is keeping it, apart from
/// the memory of values that have since been overwritten.
#[derive(Clone)]
pub struct Version {
    pub(super) applied_index: u64,
    pub(super) applied_term: u64,
    pub(super) keys: Keys,
    pub(super) history: History,
}

/// Part of the keys under a prefix.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Listing {
    /// Ascending by the bytes of their keys.
    pub items: Vec<Item>,
    /// Whether more keys follow: ask again, after the last key.
    pub more: bool,
}

/// Part of the changes under a prefix.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Changes {
    /// Ascending by index.
    pub changes: Vec<Change>,
    /// Every change up to this index has been looked at: ask again, after it.
    pub index: u64,
}

impl Default for Version {
    /// The empty store before any entry.
    fn default() -> Self {
        Version { applied_index: 0, applied_term: 0, keys: Keys::default(), history: History::new(CHANGES_MAX, 0) }
    }
}

impl Version {
    /// The index of the last entry that is applied in this version.
    pub fn applied_index(&self) -> u64 {
        self.applied_index
    }

    /// The term of that entry.
    pub fn applied_term(&self) -> u64 {
        self.applied_term
    }

    /// How many keys there are.
    pub fn keys(&self) -> usize {
        self.keys.len()
    }

    /// The length of all keys and values in bytes.
    pub fn bytes(&self) -> u64 {
        self.keys.bytes()
    }

    /// The item of a key.
    pub fn get(&self, key: &[u8]) -> Option<Item> {
        self.keys.get(key).cloned()
    }

    /// Up to `limit` items whose keys begin with `prefix` and are above `after`.
    pub fn list(&self, prefix: &[u8], after: Option<&[u8]>, limit: usize) -> Listing {
        let after = after.filter(|after| *after >= prefix);
        let mut rest = self
            .keys
            .from(after.unwrap_or(prefix))
            .skip_while(|item| after == Some(item.key()))
            .take_while(|item| item.key().starts_with(prefix));
        let items = rest.by_ref().take(limit).cloned().collect();
        Listing { items, more: rest.next().is_some() }
    }

    /// Up to `limit` changes, at least 1, of keys that begin with `prefix`, with indexes above `after`.
    ///
    /// It looks at every change after `after`, so a waiting client should go on from [`Changes::index`].
    ///
    /// # Errors
    /// If changes after `after` have been forgotten.
    pub fn changes(&self, prefix: &[u8], after: u64, limit: usize) -> Result<Changes, HistoryGone> {
        let under_prefix = self.history.after(after)?.filter(|change| change.key.starts_with(prefix));
        let changes: Vec<Change> = under_prefix.take(limit.max(1)).map(Change::to_owned).collect();
        let index = match changes.last() {
            Some(last) if changes.len() >= limit => last.index,
            _ => self.applied_index.max(after),
        };
        Ok(Changes { changes, index })
    }

    /// The keys of all changes after `after`, ascending by index.
    ///
    /// # Errors
    /// If changes after `after` have been forgotten.
    pub fn changed_keys(&self, after: u64) -> Result<impl Iterator<Item = &[u8]>, HistoryGone> {
        Ok(self.history.after(after)?.map(|change| change.key))
    }

    /// The index of the key's last change, deletion included, if that is above `after`.
    ///
    /// For a key that does not exist it looks at every change after `after`, newest first, so a waiting client should
    /// not ask again for what was looked at before.
    ///
    /// # Errors
    /// If the key does not exist and changes after `after` have been forgotten, its deletion perhaps among them.
    pub fn last_change(&self, key: &[u8], after: u64) -> Result<Option<u64>, HistoryGone> {
        if let Some(item) = self.keys.get(key) {
            return Ok(Some(item.etag()).filter(|&index| index > after));
        }
        let mut newest_first = self.history.after(after)?.rev();
        Ok(newest_first.find(|change| change.key == key).map(|change| change.index))
    }

    /// The lowest index whose later changes are all known.
    pub fn changes_known_after(&self) -> u64 {
        self.history.known_after()
    }
}

#[cfg(test)]
mod tests {
    use super::super::history::Operation;
    use super::*;

    fn version(keys: &[&str]) -> Version {
        let mut version = Version::default();
        for key in keys {
            version.applied_index += 1;
            version.keys.insert(Item::new(version.applied_index, key.as_bytes(), b"value"));
            let key = key.as_bytes();
            version.history.push(Change { index: version.applied_index, operation: Operation::Put, key });
        }
        version
    }

    fn list(version: &Version, prefix: &str, after: Option<&str>, limit: usize) -> (Vec<String>, bool) {
        let listing = version.list(prefix.as_bytes(), after.map(str::as_bytes), limit);
        (listing.items.iter().map(|item| String::from_utf8_lossy(item.key()).into_owned()).collect(), listing.more)
    }

    #[test]
    fn a_list_goes_on_where_the_last_one_ended() {
        let version = version(&["b/2", "a", "b/1", "c", "b/3", "b"]);
        let strings = |keys: &[&str]| keys.iter().map(ToString::to_string).collect::<Vec<_>>();
        assert_eq!(list(&version, "", None, 9), (strings(&["a", "b", "b/1", "b/2", "b/3", "c"]), false));
        assert_eq!(list(&version, "b/", None, 2), (strings(&["b/1", "b/2"]), true));
        assert_eq!(list(&version, "b/", Some("b/2"), 2), (strings(&["b/3"]), false));
        assert_eq!(list(&version, "b/", None, 3), (strings(&["b/1", "b/2", "b/3"]), false));
        assert_eq!(list(&version, "b/", Some("b/11"), 1), (strings(&["b/2"]), true), "after an absent key");
        assert_eq!(list(&version, "b/", Some("a"), 1), (strings(&["b/1"]), true), "after a key below the prefix");
        assert_eq!(list(&version, "b/", Some("c"), 9), (vec![], false), "after a key above the prefix");
        assert_eq!(list(&version, "", None, 0), (vec![], true));
        assert_eq!(list(&Version::default(), "", None, 5), (vec![], false));
    }

    #[test]
    fn changes_say_how_far_they_reach() {
        let version = version(&["b/2", "a", "b/1", "c", "b/2", "c"]);
        let changes = |prefix: &[u8], after, limit| {
            let Changes { changes, index } = version.changes(prefix, after, limit).unwrap();
            (changes.iter().map(|change| change.index).collect::<Vec<_>>(), index)
        };
        assert_eq!(changes(b"b/", 0, 9), (vec![1, 3, 5], 6));
        assert_eq!(changes(b"b/", 0, 2), (vec![1, 3], 3));
        assert_eq!(changes(b"b/", 3, 2), (vec![5], 6));
        assert!(version.changed_keys(3).unwrap().eq([&b"c"[..], b"b/2", b"c"]));
        assert_eq!(changes(b"x", 3, 2), (vec![], 6));
        assert_eq!(changes(b"", 6, 2), (vec![], 6));
        assert_eq!(changes(b"", 8, 2), (vec![], 8), "an index to come");
    }

    #[test]
    fn the_last_change_of_a_key_counts_its_deletion() {
        let mut version = version(&["a", "b"]);
        version.keys.remove(b"a");
        version.history.push(Change { index: 9, operation: Operation::Delete, key: b"a" });
        version.applied_index = 9;
        assert_eq!(version.last_change(b"a", 8), Ok(Some(9)));
        assert_eq!(version.last_change(b"a", 9), Ok(None));
        assert_eq!(version.last_change(b"b", 1), Ok(Some(2)));
        assert_eq!(version.last_change(b"b", 2), Ok(None));
        assert_eq!(version.last_change(b"never", 0), Ok(None));

        version.history = History::new(1, 5);
        assert_eq!(version.last_change(b"b", 1), Ok(Some(2)), "of a key that exists everything is known");
        assert_eq!(version.last_change(b"a", 4), Err(HistoryGone { known_after: 5 }));
        assert_eq!(version.changes(b"", 4, 1), Err(HistoryGone { known_after: 5 }));
        assert_eq!(version.changed_keys(4).err(), Some(HistoryGone { known_after: 5 }));
        assert_eq!(version.changes_known_after(), 5);
    }
}
