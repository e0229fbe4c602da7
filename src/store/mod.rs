//! The replicated state: keys, what makes writes happen once, and the history of changes.
//!
//! [`StateMachine`] applies committed entries in order. It is deterministic: it asks no clock and no randomness, so
//! every node that has applied the same entries has the same state, bit for bit in a snapshot. One thread owns it and
//! makes a [`Version`] for readers. A [`Capture`] is all of it at one index, for another thread to write a snapshot from.

mod history;
mod item;
mod keys;
mod replacement;
mod tokens;
mod version;
mod windows;

use std::sync::Arc;

use imbl::Vector;

pub use self::history::{CHANGES_MAX, Change, HistoryGone, Operation};
pub use self::item::Item;
pub use self::keys::LOOK_AHEAD_KEYS;
pub use self::replacement::Replacement;
pub use self::tokens::TOKENS_MAX;
pub use self::version::{Changes, Listing, Version};
pub use self::windows::{BOOTS_PER_NODE_MAX, MISSING_RANGES_MAX};

pub(crate) use self::history::History;
pub(crate) use self::keys::Keys;
pub(crate) use self::tokens::{Remembered, Tokens};
pub(crate) use self::windows::{Window, Windows};

use crate::command::{Command, Condition, RequestId, Token};
use crate::membership::{Membership, NodeId};

/// What became of a write.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// The key is set.
    Put {
        /// Its new entity tag: the index of this write.
        etag: u64,
    },
    /// The key is removed.
    Deleted {
        /// The index of this write.
        index: u64,
    },
    /// There was nothing to delete. 404.
    Absent,
    /// The condition did not hold, so nothing was changed. 412.
    ConditionFailed {
        /// The key's entity tag; `None` if it does not exist.
        etag: Option<u64>,
    },
    /// The idempotency token belongs to another write, so nothing was changed. 422.
    TokenReused,
}

/// What applying an entry did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Applied {
    /// The request was applied, for the first time; or a request before it had the same token, and this is what became
    /// of that.
    First(Outcome),
    /// Nothing: the request was applied before, or may have been, or its node has been removed. Not an answer for a
    /// client: the entry that was applied gave that.
    Repeat,
    /// The command changes the membership, which is kept elsewhere.
    Membership,
}

/// The replicated state. See the module.
pub struct StateMachine {
    /// The part that readers see, as of the last applied entry.
    visible: Version,
    windows: Windows,
    tokens: Tokens,
}

/// All of the replicated state at one applied index. It stays as it is while entries are applied, and shares what they
/// do not change.
#[derive(Clone)]
pub struct Capture {
    pub(crate) version: Version,
    pub(crate) windows: Windows,
    pub(crate) tokens: Vector<Remembered>,
    pub(crate) membership: Arc<Membership>,
}

impl Capture {
    /// The index of the last entry that is in it.
    pub fn index(&self) -> u64 {
        self.version.applied_index
    }

    /// The term of that entry.
    pub fn term(&self) -> u64 {
        self.version.applied_term
    }

    /// The membership at that index.
    pub fn membership(&self) -> &Arc<Membership> {
        &self.membership
    }

    /// The keys and the history, for a snapshot's writer.
    pub(crate) fn visible(&self) -> (&Keys, &History) {
        (&self.version.keys, &self.version.history)
    }
}

impl Default for StateMachine {
    fn default() -> Self {
        StateMachine::new()
    }
}

impl StateMachine {
    /// The empty state before any entry.
    pub fn new() -> Self {
        StateMachine { visible: Version::default(), windows: Windows::default(), tokens: Tokens::new(TOKENS_MAX) }
    }

    /// The state that a snapshot holds.
    pub(crate) fn restore(
        (index, term): (u64, u64),
        (keys, history): (Keys, History),
        windows: Windows,
        tokens: Tokens,
    ) -> Self {
        let visible = Version { applied_index: index, applied_term: term, keys, history };
        StateMachine { visible, windows, tokens }
    }

    /// The index of the last applied entry.
    pub fn applied_index(&self) -> u64 {
        self.visible.applied_index
    }

    /// How many keys there are.
    pub fn keys(&self) -> usize {
        self.visible.keys()
    }

    /// The length of all keys and values in bytes.
    pub fn bytes(&self) -> u64 {
        self.visible.bytes()
    }

    /// The state for readers, as of the last applied entry.
    pub fn version(&self) -> Version {
        self.visible.clone()
    }

    /// All of the state, with the membership as of the last applied entry.
    pub fn capture(&self, membership: Arc<Membership>) -> Capture {
        Capture {
            version: self.visible.clone(),
            windows: self.windows.clone(),
            tokens: self.tokens.log().clone(),
            membership,
        }
    }

    /// Applies the entry at `index`: a command of the request `id`.
    ///
    /// # Panics
    /// As [`StateMachine::advance`].
    pub fn apply(&mut self, index: u64, term: u64, id: RequestId, command: &Command) -> Applied {
        self.advance(index, term);
        if !self.windows.record(id) {
            return Applied::Repeat;
        }
        match command {
            Command::Put { key, value, condition, token } => {
                Applied::First(self.once(token.as_ref(), |state| state.put(index, key, value, condition)))
            }
            Command::Delete { key, condition, token } => {
                Applied::First(self.once(token.as_ref(), |state| state.delete(index, key, condition)))
            }
            Command::RecordDirectory { .. } => Applied::Membership,
        }
    }

    /// Readies the processor's caches for changes of these keys, [`LOOK_AHEAD_KEYS`] at most. Nothing else comes of it.
    pub fn look_ahead<'k>(&self, keys: impl Iterator<Item = &'k [u8]>) {
        self.visible.keys.look_ahead(keys);
    }

    /// Passes an entry that is no command: a leader's empty one, or a change of the membership.
    ///
    /// # Panics
    /// If `index` is not the next one, or `term` is lower than the last: a lost or repeated entry would make this node
    /// differ from the others for ever.
    pub fn advance(&mut self, index: u64, term: u64) {
        let (last_index, last_term) = (self.visible.applied_index, self.visible.applied_term);
        assert!(index == last_index + 1, "entry {index} is applied behind entry {last_index}");
        assert!(term >= last_term, "entry {index} of term {term} is applied behind one of term {last_term}");
        self.visible.applied_index = index;
        self.visible.applied_term = term;
    }

    /// Drops what is kept about the requests of a node, when it is removed from the cluster: its id never comes back.
    /// Entries of it that are committed later are skipped.
    pub fn forget_node(&mut self, node: NodeId) {
        self.windows.forget_node(node);
    }

    /// Makes a write, unless its token is known: then that write's outcome stands.
    fn once(&mut self, token: Option<&Token>, write: impl FnOnce(&mut Self) -> Outcome) -> Outcome {
        let Some(token) = token else { return write(self) };
        if let Some(outcome) = self.tokens.get(token) {
            return outcome;
        }
        let outcome = write(self);
        self.tokens.remember(token, &outcome);
        outcome
    }

    fn put(&mut self, index: u64, key: &[u8], value: &[u8], condition: &Condition) -> Outcome {
        if let Err(failed) = self.check(key, condition) {
            return failed;
        }
        self.visible.keys.insert(Item::new(index, key, value));
        self.changed(index, Operation::Put, key);
        Outcome::Put { etag: index }
    }

    fn delete(&mut self, index: u64, key: &[u8], condition: &Condition) -> Outcome {
        if let Err(failed) = self.check(key, condition) {
            return failed;
        }
        if self.visible.keys.remove(key).is_none() {
            return Outcome::Absent;
        }
        self.changed(index, Operation::Delete, key);
        Outcome::Deleted { index }
    }

    fn check(&self, key: &[u8], condition: &Condition) -> Result<(), Outcome> {
        if *condition == Condition::default() {
            return Ok(());
        }
        let etag = self.visible.keys.get(key).map(Item::etag);
        if condition.holds(etag) { Ok(()) } else { Err(Outcome::ConditionFailed { etag }) }
    }

    fn changed(&mut self, index: u64, operation: Operation, key: &[u8]) {
        self.visible.history.push(Change { index, operation, key });
    }
}

#[cfg(test)]
impl StateMachine {
    /// A state of `keys` small keys, each put by an entry of its own, the first at index 1.
    pub(crate) fn with_keys(keys: u64) -> StateMachine {
        let mut state = StateMachine::new();
        for number in 1..=keys {
            let key = number.to_le_bytes().to_vec().into();
            let value = number.to_string().into_bytes().into();
            let command = Command::Put { key, value, condition: Condition::default(), token: None };
            state.apply(number, 1, RequestId { node: 1, boot: 1, sequence: number }, &command);
        }
        state
    }
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;

    use super::*;
    use crate::command::{Kind, Tags};

    /// A state machine that is fed one request after the other.
    struct Feed {
        state: StateMachine,
        sequence: u64,
    }

    impl Feed {
        fn new() -> Self {
            Feed { state: StateMachine::new(), sequence: 0 }
        }

        fn apply(&mut self, command: &Command) -> Outcome {
            self.sequence += 1;
            let id = RequestId { node: 1, boot: 1, sequence: self.sequence };
            match self.state.apply(self.state.applied_index() + 1, 1, id, command) {
                Applied::First(outcome) => outcome,
                other => panic!("{other:?}"),
            }
        }

        fn put(&mut self, key: &str, value: &str) -> Outcome {
            self.apply(&put(key, value, Condition::default(), None))
        }

        fn delete(&mut self, key: &str) -> Outcome {
            self.apply(&delete(key, Condition::default(), None))
        }

        fn value(&self, key: &str) -> Option<(u64, String)> {
            let item = self.state.version().get(key.as_bytes())?;
            Some((item.etag(), String::from_utf8_lossy(item.value()).into_owned()))
        }
    }

    fn put(key: &str, value: &str, condition: Condition, token: Option<&str>) -> Command {
        let (key, value) = (Bytes::copy_from_slice(key.as_bytes()), Bytes::copy_from_slice(value.as_bytes()));
        let token = token.map(|token| Token::new(token.as_bytes(), Kind::Put, &key, &condition, &value));
        Command::Put { key, value, condition, token }
    }

    fn delete(key: &str, condition: Condition, token: Option<&str>) -> Command {
        let key = Bytes::copy_from_slice(key.as_bytes());
        let token = token.map(|token| Token::new(token.as_bytes(), Kind::Delete, &key, &condition, b""));
        Command::Delete { key, condition, token }
    }

    fn if_match(tag: u64) -> Condition {
        Condition { if_match: Some(Tags::List(vec![tag])), if_none_match: None }
    }

    fn if_absent() -> Condition {
        Condition { if_match: None, if_none_match: Some(Tags::Any) }
    }

    #[test]
    fn writes_are_seen_with_the_index_that_made_them() {
        let mut feed = Feed::new();
        assert_eq!(feed.put("a", "1"), Outcome::Put { etag: 1 });
        assert_eq!(feed.put("b", "22"), Outcome::Put { etag: 2 });
        let before = feed.state.version();
        assert_eq!(feed.put("a", "333"), Outcome::Put { etag: 3 });
        assert_eq!(feed.value("a"), Some((3, "333".to_string())));
        assert_eq!((feed.state.version().keys(), feed.state.bytes()), (2, 7));
        assert_eq!(feed.delete("b"), Outcome::Deleted { index: 4 });
        assert_eq!(feed.delete("b"), Outcome::Absent);
        assert_eq!(feed.value("b"), None);
        assert_eq!((feed.state.version().keys(), feed.state.bytes()), (1, 4));

        assert_eq!((before.applied_index(), before.keys(), before.bytes()), (2, 2, 5));
        assert_eq!(before.get(b"a").unwrap().value(), b"1");
        assert_eq!(before.changes(b"", 0, 9).unwrap().changes.len(), 2);
        let changes = feed.state.version().changes(b"", 2, 9).unwrap();
        let changes: Vec<_> = changes.changes.iter().map(|c| (c.index, c.operation, &*c.key)).collect();
        assert_eq!(changes, [(3, Operation::Put, &b"a"[..]), (4, Operation::Delete, b"b")]);
    }

    #[test]
    fn a_request_is_applied_once_however_often_it_is_committed() {
        let mut state = StateMachine::new();
        let id = RequestId { node: 2, boot: 7, sequence: 1 };
        let command = put("k", "v", Condition::default(), None);
        assert_eq!(state.apply(1, 1, id, &command), Applied::First(Outcome::Put { etag: 1 }));
        assert_eq!(state.apply(2, 3, id, &command), Applied::Repeat);
        assert_eq!(state.version().get(b"k").unwrap().etag(), 1);
        assert_eq!((state.applied_index(), state.version().applied_term()), (2, 3));
        let other_boot = RequestId { boot: 8, ..id };
        assert_eq!(state.apply(3, 3, other_boot, &command), Applied::First(Outcome::Put { etag: 3 }));
        state.forget_node(2);
        assert_eq!(state.apply(4, 3, RequestId { sequence: 2, ..id }, &command), Applied::Repeat);
    }

    #[test]
    fn a_recorded_directory_counts_as_a_request_and_changes_no_key() {
        let mut state = StateMachine::new();
        let id = RequestId { node: 1, boot: 1, sequence: 1 };
        let command = Command::RecordDirectory { member: 2, directory: 3 };
        assert_eq!(state.apply(1, 1, id, &command), Applied::Membership);
        assert_eq!(state.apply(2, 1, id, &command), Applied::Repeat);
        assert_eq!(state.version().changes(b"", 0, 9).unwrap().changes, []);
    }

    #[test]
    fn conditions_are_decided_when_the_write_is_applied() {
        let mut feed = Feed::new();
        let create = put("k", "v", if_absent(), None);
        assert_eq!(feed.apply(&put("k", "v", if_match(1), None)), Outcome::ConditionFailed { etag: None });
        assert_eq!(feed.apply(&create), Outcome::Put { etag: 2 });
        assert_eq!(feed.apply(&create), Outcome::ConditionFailed { etag: Some(2) });
        assert_eq!(feed.apply(&put("k", "w", if_match(2), None)), Outcome::Put { etag: 4 });
        assert_eq!(feed.apply(&delete("k", if_match(2), None)), Outcome::ConditionFailed { etag: Some(4) });
        assert_eq!(feed.value("k"), Some((4, "w".to_string())));
        assert_eq!(feed.apply(&delete("k", if_match(4), None)), Outcome::Deleted { index: 6 });
        assert_eq!(feed.apply(&delete("k", if_match(4), None)), Outcome::ConditionFailed { etag: None });
        assert_eq!(feed.apply(&delete("k", if_absent(), None)), Outcome::Absent);
        assert_eq!(feed.state.version().changes(b"", 0, 9).unwrap().changes.len(), 3, "failures change nothing");
    }

    #[test]
    fn a_token_repeats_the_first_outcome_whatever_happened_since() {
        let mut feed = Feed::new();
        let plain = Condition::default;
        let first = put("k", "v", plain(), Some("put"));
        let absent = delete("other", plain(), Some("absent"));
        let failed = put("k", "w", if_match(99), Some("failed"));
        let deleted = delete("k", plain(), Some("deleted"));
        let outcomes: Vec<_> = [&first, &absent, &failed, &deleted].map(|command| feed.apply(command)).into();
        assert_eq!(
            outcomes,
            [
                Outcome::Put { etag: 1 },
                Outcome::Absent,
                Outcome::ConditionFailed { etag: Some(1) },
                Outcome::Deleted { index: 4 }
            ]
        );
        feed.put("other", "now it exists");
        let repeats: Vec<_> = [&first, &absent, &failed, &deleted].map(|command| feed.apply(command)).into();
        assert_eq!(repeats, outcomes);
        assert_eq!(feed.value("k"), None, "the repeated put did not put again");

        assert_eq!(feed.apply(&put("k", "x", plain(), Some("put"))), Outcome::TokenReused);
        assert_eq!(feed.apply(&delete("k", plain(), Some("put"))), Outcome::TokenReused);
        assert_eq!(feed.value("k"), None);
        assert_eq!(feed.apply(&first), outcomes[0], "the token still belongs to the first write");
    }

    #[test]
    fn a_capture_stays_as_it_is() {
        let mut feed = Feed::new();
        feed.apply(&put("a", "1", Condition::default(), Some("t")));
        let capture = feed.state.capture(Arc::new(Membership::default()));
        feed.apply(&put("b", "2", Condition::default(), Some("u")));
        feed.state.forget_node(1);
        assert_eq!((capture.index(), capture.term(), capture.tokens.len()), (1, 1, 1));
        assert_eq!(capture.version.keys(), 1);
        assert_eq!(capture.windows.iter().count(), 1);
        assert_eq!(capture.windows.removed().count(), 0);
    }

    #[test]
    fn a_gap_in_the_entries_is_noticed() {
        for (index, term) in [(1, 5), (3, 5), (2, 4)] {
            let mut state = StateMachine::new();
            state.advance(1, 5);
            let applied = std::panic::catch_unwind(move || state.advance(index, term));
            assert!(applied.is_err(), "entry {index} of term {term} behind entry 1 of term 5");
        }
    }
}
