//! One key of the store, as a model for the linearizability check, and the history of what clients did to it.

use std::collections::BTreeMap;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::time::Duration;

use crate::linearizability::{self, Model, Timed, Violation};

/// What a client wants of a key. No two writes of a run write the same value, so a value names its write.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Call {
    /// Read it.
    Get,
    /// Set it.
    Put(u64),
    /// Remove it.
    Delete,
    /// Set it, if its tag is this one; `None`: if it is absent.
    PutIf(Option<u64>, u64),
    /// Remove it, if its tag is this one.
    DeleteIf(u64),
}

/// What the client was told. A tag is the log index of the write that set the key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Answer {
    /// To a get: value and tag, if there is any.
    Found(Option<(u64, u64)>),
    /// To a put: done, with this tag.
    Put(u64),
    /// To a delete: done, at this log index, if the client was told of it.
    Deleted(Option<u64>),
    /// To a delete: there was nothing.
    Absent,
    /// To a conditional put or delete: the key has another tag, this one, or is absent.
    Failed(Option<u64>),
}

/// A call with its answer, if there was one.
#[derive(Clone, Copy, Debug)]
pub struct Operation {
    /// The call.
    pub call: Call,
    /// The answer.
    pub answer: Option<Answer>,
}

/// The tag of a value: unknown until somebody is told it, if the one who wrote it was not.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Tag {
    Known(u64),
    Unknown,
}

/// A key.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct State {
    value: Option<(u64, Tag)>,
    /// The highest index known of any write to the key: indexes only rise.
    index: u64,
}

impl State {
    /// The state after a write at `index`, which may be unknown.
    fn written(&self, value: Option<u64>, index: Option<u64>) -> Option<State> {
        match index {
            Some(index) if index <= self.index => None,
            Some(index) => Some(State { value: value.map(|value| (value, Tag::Known(index))), index }),
            None => Some(State { value: value.map(|value| (value, Tag::Unknown)), index: self.index }),
        }
    }

    /// The same state, in which the key now is known to have this tag; `None` if it can't have it.
    fn tagged(&self, tag: Option<u64>) -> Option<State> {
        match (self.value, tag) {
            (None, None) => Some(self.clone()),
            (Some((_, Tag::Known(known))), Some(tag)) if known == tag => Some(self.clone()),
            (Some((value, Tag::Unknown)), Some(tag)) => self.written(Some(value), Some(tag)),
            _ => None,
        }
    }

    /// Whether a condition on the tag holds. A tag that nobody has been told can't be in a condition.
    fn has_tag(&self, tag: Option<u64>) -> bool {
        match self.value {
            None => tag.is_none(),
            Some((_, Tag::Known(known))) => tag == Some(known),
            Some((_, Tag::Unknown)) => false,
        }
    }
}

/// One key, with get, put, delete and conditional put.
pub struct Register;

impl Model for Register {
    type Operation = Operation;
    type State = State;

    fn apply(state: &State, operation: &Operation) -> Option<State> {
        match (operation.call, operation.answer) {
            (Call::Get, None) => Some(state.clone()),
            (Call::Get, Some(Answer::Found(found))) => {
                let same_value = state.value.map(|(value, _)| value) == found.map(|(value, _)| value);
                if same_value { state.tagged(found.map(|(_, tag)| tag)) } else { None }
            }
            (Call::Put(value), None) => state.written(Some(value), None),
            (Call::Put(value), Some(Answer::Put(tag))) => state.written(Some(value), Some(tag)),
            (Call::Delete, None) => state.written(None, None),
            (Call::Delete, Some(Answer::Deleted(index))) if state.value.is_some() => state.written(None, index),
            (Call::Delete, Some(Answer::Absent)) if state.value.is_none() => Some(state.clone()),
            (Call::PutIf(tag, value), None) => match state.has_tag(tag) {
                true => state.written(Some(value), None),
                false => Some(state.clone()),
            },
            (Call::PutIf(condition, value), Some(Answer::Put(tag))) if state.has_tag(condition) => {
                state.written(Some(value), Some(tag))
            }
            (Call::PutIf(condition, _), Some(Answer::Failed(tag))) if !state.has_tag(condition) => state.tagged(tag),
            (Call::DeleteIf(tag), None) => match state.has_tag(Some(tag)) {
                true => state.written(None, None),
                false => Some(state.clone()),
            },
            (Call::DeleteIf(tag), Some(Answer::Deleted(index))) if state.has_tag(Some(tag)) => {
                state.written(None, index)
            }
            (Call::DeleteIf(condition), Some(Answer::Failed(tag))) if !state.has_tag(Some(condition)) => {
                state.tagged(tag)
            }
            _ => None,
        }
    }

    fn class(operation: &Operation) -> Option<u64> {
        // The default hasher has fixed keys, other than that of a hash map.
        let mut hasher = DefaultHasher::new();
        operation.call.hash(&mut hasher);
        operation.answer.is_none().then(|| hasher.finish())
    }
}

/// The value of writes whose own value nobody has seen: they differ in nothing.
const UNSEEN: u64 = u64::MAX;

/// Completes what is known of writes that nobody was told of, by what readers saw of them.
fn complete(operations: &mut [Timed<Operation>]) {
    let mut seen: BTreeMap<u64, u64> = BTreeMap::new();
    for timed in operations.iter() {
        if let Some(Answer::Found(Some((value, tag)))) = timed.operation.answer {
            seen.insert(value, tag);
        }
    }
    for Timed { operation, .. } in operations.iter_mut().filter(|timed| timed.operation.answer.is_none()) {
        if let Call::Put(value) | Call::PutIf(_, value) = &mut operation.call {
            match seen.get(value) {
                Some(&tag) => operation.answer = Some(Answer::Put(tag)),
                None => *value = UNSEEN,
            }
        }
    }
}

/// Names an operation between its call and its answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct OperationId(usize);

/// What all clients did.
#[derive(Default)]
pub struct History {
    operations: Vec<(String, Timed<Operation>)>,
    /// Calls that surely had no effect.
    refused: Vec<usize>,
}

impl History {
    /// A client calls. Until it is told otherwise, the call may take effect at any later time.
    pub fn call(&mut self, key: &str, call: Call, now: Duration) -> OperationId {
        let operation = Operation { call, answer: None };
        self.operations.push((key.to_owned(), Timed { called: now, returned: None, operation }));
        OperationId(self.operations.len() - 1)
    }

    /// A client is answered.
    pub fn answer(&mut self, id: OperationId, answer: Answer, now: Duration) {
        let (_, timed) = &mut self.operations[id.0];
        timed.operation.answer = Some(answer);
        timed.returned = Some(now);
    }

    /// A client is told that its call was not applied and never will be.
    pub fn refuse(&mut self, id: OperationId) {
        self.refused.push(id.0);
    }

    /// How many calls there were, and how many of them were answered.
    pub fn counts(&self) -> (usize, usize) {
        let answered = self.operations.iter().filter(|(_, timed)| timed.returned.is_some()).count();
        (self.operations.len(), answered)
    }

    /// Whether every key behaved as if there were one copy of it.
    pub fn check(&self) -> Result<(), String> {
        let mut keys: BTreeMap<&str, Vec<Timed<Operation>>> = BTreeMap::new();
        for (number, (key, timed)) in self.operations.iter().enumerate() {
            // What a read without an answer would have seen says nothing.
            let says_nothing = timed.operation.call == Call::Get && timed.returned.is_none();
            if !says_nothing && !self.refused.contains(&number) {
                keys.entry(key).or_default().push(timed.clone());
            }
        }
        for (key, mut operations) in keys {
            check_key(&mut operations).map_err(|violation| describe(key, &operations, &violation))?;
        }
        Ok(())
    }
}

/// Whether one key behaved as if there were one copy of it. Completes `operations` by what can be told from all of
/// them.
pub fn check_key(operations: &mut [Timed<Operation>]) -> Result<(), Violation> {
    complete(operations);
    linearizability::check::<Register>(operations)
}

/// A violation in words.
pub fn describe(key: &str, operations: &[Timed<Operation>], violation: &Violation) -> String {
    let Violation::Inexplicable { explained, state, stuck } = violation else {
        return format!("the {} operations on key {key:?} are too hard to check", operations.len());
    };
    let show = |places: &[usize]| -> Vec<String> { places.iter().map(|at| format!("{:?}", operations[*at])).collect() };
    format!(
        "key {key:?} is not linearizable; explained up to\n  {}\n  state: {state}\nand then none of\n  {}",
        show(&explained[explained.len().saturating_sub(20)..]).join("\n  "),
        show(stuck).join("\n  ")
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::random::Random;

    /// A history of one key: call time, return time (0: never), call, answer.
    fn check(operations: &[(u64, u64, Call, Option<Answer>)]) -> Result<(), String> {
        let mut history = History::default();
        for &(called, returned, call, answer) in operations {
            let id = history.call("k", call, Duration::from_secs(called));
            if let Some(answer) = answer {
                history.answer(id, answer, Duration::from_secs(returned));
            }
        }
        history.check()
    }

    use Answer::{Absent, Deleted, Failed, Found};
    use Call::{Delete, DeleteIf, Get, Put, PutIf};

    const fn done(tag: u64) -> Option<Answer> {
        Some(Answer::Put(tag))
    }

    #[test]
    fn one_after_the_other_is_linearizable() {
        check(&[
            (1, 2, Get, Some(Found(None))),
            (3, 4, Put(10), done(5)),
            (5, 6, Get, Some(Found(Some((10, 5))))),
            (7, 8, PutIf(Some(5), 11), done(6)),
            (9, 10, PutIf(Some(5), 12), Some(Failed(Some(6)))),
            (11, 12, PutIf(None, 13), Some(Failed(Some(6)))),
            (13, 14, Delete, Some(Deleted(Some(9)))),
            (15, 16, Delete, Some(Absent)),
            (17, 18, PutIf(None, 14), done(11)),
            (19, 20, Get, Some(Found(Some((14, 11))))),
            (21, 22, DeleteIf(9), Some(Failed(Some(11)))),
            (23, 24, DeleteIf(11), Some(Deleted(None))),
            (25, 26, DeleteIf(11), Some(Failed(None))),
            (27, 28, Get, Some(Found(None))),
        ])
        .unwrap();
    }

    #[test]
    fn concurrent_operations_may_happen_in_any_order() {
        // The second read overlaps the write and the first read; it may come before both.
        check(&[(1, 9, Put(10), done(5)), (2, 4, Get, Some(Found(Some((10, 5))))), (3, 8, Get, Some(Found(None)))])
            .unwrap();
    }

    #[test]
    fn a_stale_read_is_found() {
        let violation =
            check(&[(1, 2, Put(10), done(5)), (3, 4, Put(11), done(6)), (5, 6, Get, Some(Found(Some((10, 5)))))]);
        assert!(violation.unwrap_err().contains("Found(Some((10, 5)))"));
        // Also where the newer value was only seen by another reader.
        let violation = check(&[
            (1, 2, Put(10), done(5)),
            (3, 20, Put(11), done(6)),
            (4, 5, Get, Some(Found(Some((11, 6))))),
            (6, 7, Get, Some(Found(Some((10, 5))))),
        ]);
        assert!(violation.is_err());
    }

    #[test]
    fn a_lost_update_is_found() {
        let lost = [(1, 2, Put(10), done(5)), (3, 4, Get, Some(Found(None)))];
        assert!(check(&lost).is_err());
        // Two conditional writes on the same tag.
        let both = [(1, 2, Put(10), done(5)), (3, 6, PutIf(Some(5), 11), done(6)), (4, 7, PutIf(Some(5), 12), done(7))];
        assert!(check(&both).is_err());
        let both =
            [(1, 2, Put(10), done(5)), (3, 6, DeleteIf(5), Some(Deleted(None))), (4, 7, PutIf(Some(5), 12), done(7))];
        assert!(check(&both).is_err());
    }

    #[test]
    fn a_write_that_is_applied_twice_is_found() {
        let twice =
            [(1, 2, Put(10), done(5)), (3, 4, Delete, Some(Deleted(Some(6)))), (5, 6, Get, Some(Found(Some((10, 7)))))];
        assert!(check(&twice).is_err());
        // Nobody was told of the first application; the second one has another tag.
        let twice =
            [(1, 0, Put(10), None), (2, 3, Get, Some(Found(Some((10, 5))))), (4, 5, Get, Some(Found(Some((10, 7)))))];
        assert!(check(&twice).is_err());
        let twice = [
            (1, 0, Put(10), None),
            (2, 3, Get, Some(Found(Some((10, 5))))),
            (4, 5, Put(11), done(6)),
            (6, 7, Get, Some(Found(Some((10, 5))))),
        ];
        assert!(check(&twice).is_err());
    }

    #[test]
    fn what_was_not_answered_may_have_happened_or_not_and_late() {
        check(&[(1, 0, Put(10), None), (2, 3, Get, Some(Found(None)))]).unwrap();
        check(&[(1, 0, Put(10), None), (2, 3, Get, Some(Found(Some((10, 5)))))]).unwrap();
        check(&[
            (1, 0, Put(10), None),
            (2, 3, Put(11), done(5)),
            (4, 5, Get, Some(Found(Some((11, 5))))),
            (6, 7, Get, Some(Found(Some((10, 6))))),
        ])
        .unwrap();
        check(&[
            (1, 0, Delete, None),
            (2, 3, Put(11), done(5)),
            (4, 5, Get, Some(Found(None))),
            (6, 7, PutIf(None, 12), done(9)),
        ])
        .unwrap();
        check(&[(1, 2, Put(10), done(5)), (3, 0, PutIf(Some(5), 11), None), (4, 5, Get, Some(Found(Some((11, 6)))))])
            .unwrap();
        // But not before it was called.
        assert!(check(&[(2, 3, Get, Some(Found(Some((10, 5))))), (4, 0, Put(10), None)]).is_err());
    }

    #[test]
    fn a_refused_write_that_took_effect_is_found() {
        let mut history = History::default();
        let put = history.call("k", Put(10), Duration::from_secs(1));
        history.refuse(put);
        let get = history.call("k", Get, Duration::from_secs(2));
        history.answer(get, Found(Some((10, 5))), Duration::from_secs(3));
        assert!(history.check().is_err());
        assert_eq!(history.counts(), (2, 1));
    }

    #[test]
    fn tags_rise() {
        let falling = [(1, 2, Put(10), done(6)), (3, 4, Put(11), done(5))];
        assert!(check(&falling).is_err());
        let falling = [(1, 2, Put(10), done(6)), (3, 4, Delete, Some(Deleted(Some(7)))), (5, 6, Put(11), done(7))];
        assert!(check(&falling).is_err());
    }

    #[test]
    fn keys_are_checked_for_themselves() {
        let mut history = History::default();
        for (key, found) in [("a", None), ("b", Some((10, 5)))] {
            let get = history.call(key, Get, Duration::from_secs(5));
            history.answer(get, Found(found), Duration::from_secs(6));
        }
        let put = history.call("b", Put(10), Duration::from_secs(1));
        history.answer(put, Answer::Put(5), Duration::from_secs(2));
        history.check().unwrap();
    }

    /// Operations on one true register, each taking effect at a random moment between call and return.
    fn true_history(random: &mut Random, operations: u64) -> Vec<(String, Timed<Operation>)> {
        let mut pending: Vec<(Duration, Duration, Duration, Call)> = Vec::new();
        for value in 0..operations {
            let called = Duration::from_micros(random.below(operations * 100));
            let length = 1 + random.below(1000);
            let effect = called + Duration::from_micros(random.below(length));
            let condition = (!random.one_in(3)).then(|| random.below(operations));
            let call = *random.pick(&[
                Get,
                Get,
                Put(value),
                Delete,
                PutIf(condition, value),
                DeleteIf(condition.unwrap_or(0)),
            ]);
            pending.push((effect, called, called + Duration::from_micros(length), call));
        }
        pending.sort_by_key(|(effect, called, ..)| (*effect, *called));
        let mut state: Option<(u64, u64)> = None;
        let mut index = 0;
        let mut history = Vec::new();
        for (_, called, returned, call) in pending {
            index += 1;
            let tag = state.map(|(_, tag)| tag);
            let answer = match call {
                Get => Found(state),
                Delete if state.is_none() => Absent,
                Delete => Deleted(Some(index)),
                Put(_) => Answer::Put(index),
                PutIf(condition, _) if condition == tag => Answer::Put(index),
                DeleteIf(condition) if Some(condition) == tag => Deleted(Some(index)),
                PutIf(..) | DeleteIf(_) => Failed(tag),
            };
            match (call, answer) {
                (Put(value) | PutIf(_, value), Answer::Put(tag)) => state = Some((value, tag)),
                (Delete, _) | (DeleteIf(_), Deleted(_)) => state = None,
                _ => {}
            }
            // Some clients are gone before the answer comes.
            let answer = (!random.one_in(10)).then_some(answer);
            let returned = answer.map(|_| returned);
            history.push(("k".to_owned(), Timed { called, returned, operation: Operation { call, answer } }));
        }
        history
    }

    #[test]
    fn true_histories_pass_and_small_lies_are_found() {
        let mut found = 0;
        for seed in 0..300 {
            let mut random = Random::new(seed);
            let operations = true_history(&mut random, 60);
            let mut history = History { operations, refused: Vec::new() };
            history.check().unwrap_or_else(|violation| panic!("seed {seed}: {violation}"));
            // Another value than was read: there is none such, or it was there at another time.
            let reads: Vec<usize> =
                (0..60).filter(|&n| matches!(history.operations[n].1.operation.answer, Some(Found(Some(_))))).collect();
            if reads.is_empty() {
                continue;
            }
            let (one, other) = (*random.pick(&reads), *random.pick(&reads));
            let lie = history.operations[other].1.operation.answer;
            if history.operations[one].1.operation.answer != lie {
                history.operations[one].1.operation.answer = lie;
                found += usize::from(history.check().is_err());
            }
        }
        assert!(found > 100, "only {found} lies were found");
    }
}
