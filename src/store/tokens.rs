//! The idempotency tokens that are remembered, and what became of the writes that carried them.

use std::hash::{BuildHasher, RandomState};

use imbl::Vector;

use super::Outcome;
use crate::command::Token;

/// The tokens that are remembered; one more pushes out the oldest by log position.
///
/// One costs 41 bytes in the log of tokens and 8 to 16 in the table that finds it: about 50 MB for all of them.
pub const TOKENS_MAX: usize = 1_000_000;

/// The outcome of the first write with a token, as compact as it gets: there are a million of these.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Remembered {
    id: [u8; 16],
    fingerprint: [u8; 16],
    /// What became of it: see [`Remembered::new`].
    kind: u8,
    /// An index, if the outcome has one: little-endian bytes, as an aligned number would cost 7 bytes of padding.
    index: [u8; 8],
}

impl Remembered {
    /// The length of the encoding in bytes.
    pub(crate) const BYTES: usize = 16 + 16 + 1 + 8;

    fn new(token: &Token, outcome: &Outcome) -> Self {
        let (kind, index) = match *outcome {
            Outcome::Put { etag } => (1, etag),
            Outcome::Deleted { index } => (2, index),
            Outcome::Absent => (3, 0),
            Outcome::ConditionFailed { etag: None } => (4, 0),
            Outcome::ConditionFailed { etag: Some(etag) } => (5, etag),
            Outcome::TokenReused => unreachable!("a reused token is known already and not remembered again"),
        };
        Remembered { id: token.id, fingerprint: token.fingerprint, kind, index: index.to_le_bytes() }
    }

    fn outcome(&self) -> Outcome {
        let index = u64::from_le_bytes(self.index);
        match self.kind {
            1 => Outcome::Put { etag: index },
            2 => Outcome::Deleted { index },
            3 => Outcome::Absent,
            4 => Outcome::ConditionFailed { etag: None },
            _ => Outcome::ConditionFailed { etag: Some(index) },
        }
    }

    /// The bytes for a snapshot.
    pub(crate) fn encode(&self) -> [u8; Self::BYTES] {
        let mut out = [0; Self::BYTES];
        out[..16].copy_from_slice(&self.id);
        out[16..32].copy_from_slice(&self.fingerprint);
        out[32] = self.kind;
        out[33..].copy_from_slice(&self.index);
        out
    }

    /// Reads the bytes of a snapshot; `None` if no outcome looks like that.
    pub(crate) fn decode(bytes: &[u8; Self::BYTES]) -> Option<Self> {
        let (id, rest) = bytes.split_first_chunk()?;
        let (fingerprint, rest) = rest.split_first_chunk()?;
        let (&kind, index) = rest.split_first()?;
        let index = *index.first_chunk()?;
        let index_is_used = matches!(kind, 1 | 2 | 5);
        (index_is_used || matches!(kind, 3 | 4) && index == [0; 8]).then_some(Remembered {
            id: *id,
            fingerprint: *fingerprint,
            kind,
            index,
        })
    }
}

/// Remembers the last so many tokens, first in, first out.
pub(crate) struct Tokens {
    max: usize,
    /// In the order of the log. A persistent vector, so that a snapshot takes it in constant time.
    log: Vector<Remembered>,
    table: Table,
    /// The place of the log's first token in a ring of `max` places: what the table finds is a place.
    first_place: usize,
}

impl Tokens {
    /// Remembers at most `max` tokens, from 1.
    pub(crate) fn new(max: usize) -> Self {
        Tokens { max, log: Vector::new(), table: Table::new(), first_place: 0 }
    }

    /// The outcome of the write that first carried this token: [`Outcome::TokenReused`] if that was another write.
    pub(crate) fn get(&self, token: &Token) -> Option<Outcome> {
        let remembered = self.find(&token.id)?;
        if remembered.fingerprint == token.fingerprint {
            Some(remembered.outcome())
        } else {
            Some(Outcome::TokenReused)
        }
    }

    /// Remembers the outcome of a write whose token is not known yet.
    pub(crate) fn remember(&mut self, token: &Token, outcome: &Outcome) {
        self.push(Remembered::new(token, outcome));
    }

    /// Takes a token from a snapshot, in the order of the log. `false` if there are too many or it is there already.
    pub(crate) fn restore(&mut self, remembered: Remembered) -> bool {
        if self.log.len() >= self.max || self.find(&remembered.id).is_some() {
            return false;
        }
        self.push(remembered);
        true
    }

    /// All tokens in the order of the log: shared, not copied.
    pub(crate) fn log(&self) -> &Vector<Remembered> {
        &self.log
    }

    fn push(&mut self, remembered: Remembered) {
        if self.log.len() >= self.max {
            let oldest = self.log.pop_front().expect("at least one token is remembered");
            self.table.remove(&oldest.id, self.first_place, |place| {
                if place == self.first_place {
                    oldest.id
                } else {
                    at(&self.log, self.max, self.first_place + 1, place).id
                }
            });
            self.first_place = (self.first_place + 1) % self.max;
        }
        let place = |i: usize| (self.first_place + i) % self.max;
        if self.table.is_full() {
            // In the order of the log, which is the order in memory: in any other, each token is a cache miss.
            let ids = self.log.iter().map(|remembered| &remembered.id);
            self.table.grow(ids.enumerate().map(|(i, id)| (id, place(i))));
        }
        self.table.insert(&remembered.id, place(self.log.len()));
        self.log.push_back(remembered);
    }

    fn find(&self, id: &[u8; 16]) -> Option<&Remembered> {
        let place = self.table.find(id, |place| at(&self.log, self.max, self.first_place, place).id == *id)?;
        Some(at(&self.log, self.max, self.first_place, place))
    }
}

fn at(log: &Vector<Remembered>, max: usize, first_place: usize, place: usize) -> &Remembered {
    &log[(place + max - first_place) % max]
}

/// No place: an empty slot of the table.
const EMPTY: u32 = u32::MAX;

/// Finds places by token id: open addressing with linear probing, at most half full.
///
/// A `HashMap<[u8; 16], u32>` would keep every id a second time, at more than 40 bytes each.
struct Table {
    slots: Vec<u32>,
    used: usize,
    /// Keyed anew in every process, so that nobody can make up ids that collide. Nothing that is replicated depends
    /// on it: it decides where a place is found, not whether.
    hasher: RandomState,
}

impl Table {
    fn new() -> Self {
        Table { slots: vec![EMPTY; 16], used: 0, hasher: RandomState::new() }
    }

    fn home(&self, id: &[u8; 16]) -> usize {
        // The mask keeps it below the number of slots, a power of two.
        self.hasher.hash_one(id) as usize & (self.slots.len() - 1)
    }

    fn next(&self, slot: usize) -> usize {
        (slot + 1) & (self.slots.len() - 1)
    }

    fn find(&self, id: &[u8; 16], is_it: impl Fn(usize) -> bool) -> Option<usize> {
        let mut slot = self.home(id);
        while self.slots[slot] != EMPTY {
            if is_it(self.slots[slot] as usize) {
                return Some(self.slots[slot] as usize);
            }
            slot = self.next(slot);
        }
        None
    }

    /// Whether it must [grow](Table::grow) before the next insertion.
    fn is_full(&self) -> bool {
        (self.used + 1) * 2 > self.slots.len()
    }

    /// Doubles the slots; `all` are the ids and places that are in it.
    fn grow<'a>(&mut self, all: impl Iterator<Item = (&'a [u8; 16], usize)>) {
        self.slots = vec![EMPTY; self.slots.len() * 2];
        self.used = 0;
        for (id, place) in all {
            self.insert(id, place);
        }
    }

    /// Adds the place of an id that is not in the table.
    fn insert(&mut self, id: &[u8; 16], place: usize) {
        let mut slot = self.home(id);
        while self.slots[slot] != EMPTY {
            slot = self.next(slot);
        }
        self.slots[slot] = u32::try_from(place).expect("there are fewer tokens than 2^32");
        self.used += 1;
    }

    /// Takes out a place that is in the table, and closes the gap so that probing needs no marks of deleted ones.
    /// `id_at` gives the id of any place in the table, this one included.
    fn remove(&mut self, id: &[u8; 16], place: usize, id_at: impl Fn(usize) -> [u8; 16]) {
        let mut gap = self.home(id);
        while self.slots[gap] as usize != place {
            assert!(self.slots[gap] != EMPTY, "a remembered token is in the table");
            gap = self.next(gap);
        }
        let mut slot = self.next(gap);
        while self.slots[slot] != EMPTY {
            let home = self.home(&id_at(self.slots[slot] as usize));
            // It may move to the gap unless its home lies behind the gap: distances count around the end.
            let mask = self.slots.len() - 1;
            if slot.wrapping_sub(home) & mask >= slot.wrapping_sub(gap) & mask {
                self.slots[gap] = self.slots[slot];
                gap = slot;
            }
            slot = self.next(slot);
        }
        self.slots[gap] = EMPTY;
        self.used -= 1;
    }
}

#[cfg(test)]
mod tests {
    use std::collections::VecDeque;

    use proptest::collection::vec;
    use proptest::prelude::*;

    use super::*;

    fn token(n: u8, fingerprint: u8) -> Token {
        Token { id: [n; 16], fingerprint: [fingerprint; 16] }
    }

    fn outcome(n: u64) -> Outcome {
        match n % 5 {
            0 => Outcome::Put { etag: n },
            1 => Outcome::Deleted { index: n },
            2 => Outcome::Absent,
            3 => Outcome::ConditionFailed { etag: None },
            _ => Outcome::ConditionFailed { etag: Some(n) },
        }
    }

    proptest! {
        #[test]
        fn the_last_so_many_are_remembered(max in 1..70_usize, tokens in vec(any::<u8>(), 1..1000)) {
            let (mut tokens_under_test, mut model) = (Tokens::new(max), VecDeque::new());
            for (index, n) in tokens.into_iter().enumerate() {
                let known = model.iter().find(|(known, _)| *known == n).map(|(_, outcome)| *outcome);
                prop_assert_eq!(tokens_under_test.get(&token(n, 1)), known);
                prop_assert_eq!(tokens_under_test.get(&token(n, 2)), known.map(|_| Outcome::TokenReused));
                if known.is_none() {
                    let outcome = outcome(index as u64);
                    tokens_under_test.remember(&token(n, 1), &outcome);
                    model.push_back((n, outcome));
                    if model.len() > max {
                        model.pop_front();
                    }
                }
            }
            let mut restored = Tokens::new(max);
            for remembered in tokens_under_test.log() {
                let decoded = Remembered::decode(&remembered.encode());
                prop_assert_eq!(decoded, Some(*remembered));
                prop_assert!(restored.restore(*remembered));
                prop_assert!(!restored.restore(*remembered));
            }
            prop_assert_eq!(restored.table.used, model.len());
            for n in 0..=u8::MAX {
                let known = model.iter().find(|(known, _)| *known == n).map(|(_, outcome)| *outcome);
                prop_assert_eq!(tokens_under_test.get(&token(n, 1)), known);
                prop_assert_eq!(restored.get(&token(n, 1)), known);
            }
        }
    }

    #[test]
    fn no_other_bytes_are_an_outcome() {
        let mut bytes = Remembered::new(&token(1, 1), &Outcome::Absent).encode();
        assert!(Remembered::decode(&bytes).is_some());
        bytes[40] = 1;
        assert!(Remembered::decode(&bytes).is_none(), "an absent key has no index");
        for kind in [0, 6, 255] {
            bytes[32] = kind;
            assert!(Remembered::decode(&bytes).is_none());
        }
    }

    #[test]
    fn one_costs_its_encoding_and_not_more() {
        assert_eq!(size_of::<Remembered>(), Remembered::BYTES);
    }
}
