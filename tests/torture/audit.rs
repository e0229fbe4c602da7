//! The judgement, when all is quiet: what clients were told, against the sequence of changes that the cluster itself
//! tells of, and against what its members have at the end.
//!
//! The sequence has each change's log index. With it, every answer that carries an index (reads of any kind, stale
//! ones too, and listings) can be checked to the letter: it must be the state behind the last change up to that
//! index. Together with [`Run::told`], which checks that indexes do not go back in time, that is a proof of
//! linearizability that needs no search. The search of [`crate::linearizability`] is done all the same: it does not
//! need to believe the sequence.

use std::collections::{BTreeMap, BTreeSet};

use raftexample::membership::NodeId;

use crate::followers::{Change, Feed};
use crate::history::{Condition, End, Item, Operation, Request, Run};
use crate::linearizability::{Timed, Violation};
use crate::register::{self, Answer, Call};

/// The final keys of a member, with their values.
pub type Contents = BTreeMap<String, (u64, u64)>;

/// All that is known when a run is over.
pub struct Evidence<'a> {
    /// What clients did.
    pub operations: &'a [Operation],
    /// What followers were told.
    pub feeds: &'a [Feed],
    /// What each member has at the end.
    pub contents: &'a BTreeMap<NodeId, Contents>,
}

/// What was checked, for the report: a check of nothing would be none.
#[derive(Clone, Copy, Debug, Default)]
pub struct Checked {
    /// Changes in the sequence.
    pub changes: usize,
    /// Registers whose history was searched for an order.
    pub registers: usize,
    /// Answers compared with the state at their index.
    pub states: usize,
    /// Acknowledged keys of the sets that were found at the end.
    pub set_keys: usize,
}

/// Checks everything, and tells the run of what is violated.
pub fn judge(run: &Run, evidence: &Evidence<'_>) -> Checked {
    let registers = check_registers(run, evidence.operations);
    let mut checked = Checked { registers, set_keys: check_sets(run, evidence), ..Checked::default() };
    check_members(run, evidence);
    check_stale_order(run, evidence.operations);
    let Some(feed) = check_feeds(run, evidence.feeds) else { return checked };
    checked.changes = feed.changes.len();
    let history = Sequence::new(feed);
    check_writes(run, evidence.operations, &history);
    check_values(run, evidence.operations);
    checked.states = check_states(run, evidence.operations, &history);
    for (node, contents) in evidence.contents {
        let tags = contents.iter().map(|(key, (_, tag))| (key.clone(), *tag)).collect::<BTreeMap<_, _>>();
        if tags != history.last_state() {
            run.violated(format!("node {node} ends with other keys than the sequence of changes"), Vec::new());
        }
    }
    checked
}

// ----------------------------------------------------------------------------------------------------- the registers

/// An operation as the model of a register knows it; `None` for what it does not, or what says nothing.
fn as_register(operation: &Operation) -> Option<Timed<register::Operation>> {
    let call = match operation.request {
        Request::Read { fresh: true, after_index: None } => Call::Get,
        Request::Put(value, Condition::Always) => Call::Put(value),
        Request::Put(value, Condition::Absent) => Call::PutIf(None, value),
        Request::Put(value, Condition::Tag(tag)) => Call::PutIf(Some(tag), value),
        Request::Delete(Condition::Always) => Call::Delete,
        Request::Delete(Condition::Tag(tag)) => Call::DeleteIf(tag),
        _ => return None,
    };
    let answer = match operation.end {
        End::Found { value: Some(value), tag, .. } => Some(Answer::Found(Some((value, tag)))),
        End::Missing { .. } => Some(Answer::Found(None)),
        End::Stored(tag) => Some(Answer::Put(tag)),
        End::Deleted => Some(Answer::Deleted(None)),
        End::Absent => Some(Answer::Absent),
        End::Failed(tag) => Some(Answer::Failed(tag)),
        End::Unknown if call != Call::Get => None,
        _ => return None,
    };
    let operation_of_register = register::Operation { call, answer };
    let returned = answer.map(|_| operation.returned);
    Some(Timed { called: operation.called, returned, operation: operation_of_register })
}

/// Looks for an order of what was done to each key. Returns how many keys there were.
fn check_registers(run: &Run, operations: &[Operation]) -> usize {
    let mut keys: BTreeMap<&str, Vec<usize>> = BTreeMap::new();
    for (at, operation) in operations.iter().enumerate() {
        if as_register(operation).is_some() {
            keys.entry(&operation.key).or_default().push(at);
        }
    }
    for (key, places) in &keys {
        let mut history: Vec<_> = places.iter().filter_map(|at| as_register(&operations[*at])).collect();
        let Err(violation) = register::check_key(&mut history) else { continue };
        let what = register::describe(key, &history, &violation);
        let concerned = match violation {
            Violation::Inexplicable { stuck, .. } => stuck.iter().map(|at| operations[places[*at]].clone()).collect(),
            Violation::TooHard => Vec::new(),
        };
        run.violated(what, concerned);
    }
    keys.len()
}

// ----------------------------------------------------------------------------------------------- the sets and members

/// Each key of a set was written once. If that was acknowledged, it must be there; if it was refused, it must not.
fn check_sets(run: &Run, evidence: &Evidence<'_>) -> usize {
    let mut found = 0;
    let writes = evidence.operations.iter().filter(|operation| operation.key.starts_with("s/"));
    for operation in writes {
        let Some(value) = operation.request.value() else { continue };
        for (node, contents) in evidence.contents {
            let there = contents.get(&operation.key);
            match operation.end {
                End::Stored(tag) if there == Some(&(value, tag)) => found += 1,
                End::Stored(_) => {
                    let what = format!("lost: {} was acknowledged, and node {node} has {there:?}", operation.key);
                    run.violated(what, vec![operation.clone()]);
                }
                End::Refused(_) if there.is_some() => {
                    let what = format!("{} was refused, and node {node} has it", operation.key);
                    run.violated(what, vec![operation.clone()]);
                }
                _ => {}
            }
        }
    }
    found
}

fn check_members(run: &Run, evidence: &Evidence<'_>) {
    let mut all = evidence.contents.iter();
    let Some((first, expected)) = all.next() else { return };
    for (node, contents) in all.filter(|(_, contents)| *contents != expected) {
        let differs = |key: &&String| contents.get(*key) != expected.get(*key);
        let keys: BTreeSet<&String> = contents.keys().chain(expected.keys()).filter(differs).collect();
        let some: Vec<&&String> = keys.iter().take(5).collect();
        let what = format!("nodes {first} and {node} differ in {} keys, such as {some:?}", keys.len());
        run.violated(what, Vec::new());
    }
}

/// What one node shows without asking anyone never goes back, as long as it runs.
fn check_stale_order(run: &Run, operations: &[Operation]) {
    let mut nodes: BTreeMap<(NodeId, u64), Vec<&Operation>> = BTreeMap::new();
    for operation in operations.iter().filter(|operation| !operation.request.is_write() && operation.boot > 0) {
        if operation.end.index().is_some() {
            nodes.entry((operation.node, operation.boot)).or_default().push(operation);
        }
    }
    for reads in nodes.values_mut() {
        let mut returns = reads.clone();
        returns.sort_by_key(|operation| operation.returned);
        reads.sort_by_key(|operation| operation.called);
        let mut returned = returns.into_iter().peekable();
        let mut newest: Option<&Operation> = None;
        for read in reads.iter() {
            while let Some(earlier) = returned.next_if(|earlier| earlier.returned < read.called) {
                if newest.is_none_or(|newest| newest.end.index() < earlier.end.index()) {
                    newest = Some(earlier);
                }
            }
            if let Some(newest) = newest.filter(|newest| newest.end.index() > read.end.index()) {
                let what = format!("node {} went back to an older state", read.node);
                run.violated(what, vec![newest.clone(), (*read).clone()]);
            }
        }
    }
}

// ------------------------------------------------------------------------------------------------------- the sequence

/// The one that has everything, if the others agree with it.
fn check_feeds<'a>(run: &Run, feeds: &'a [Feed]) -> Option<&'a Feed> {
    let whole = feeds.iter().filter(|feed| feed.gaps.is_empty()).max_by_key(|feed| feed.index);
    let Some(whole) = whole else {
        run.violated("no follower has seen all changes, so nothing can be judged by them".to_owned(), Vec::new());
        return None;
    };
    for feed in feeds {
        let in_gap = |index: u64| feed.gaps.iter().any(|(after, until)| index > *after && index <= *until);
        let expected = whole.changes.iter().filter(|change| change.index <= feed.index && !in_gap(change.index));
        let told = feed.changes.iter();
        let different = expected.zip(told).find(|(expected, told)| expected != told);
        let count = whole.changes.iter().filter(|change| change.index <= feed.index && !in_gap(change.index)).count();
        if let Some((one, other)) = different {
            run.violated(format!("two followers were told different changes: {one:?} and {other:?}"), Vec::new());
        } else if count != feed.changes.len() {
            let what = format!(
                "a follower was told {} changes up to index {}, another {count}",
                feed.changes.len(),
                feed.index
            );
            run.violated(what, Vec::new());
        }
    }
    Some(whole)
}

/// All changes, by key.
struct Sequence<'a> {
    end: u64,
    keys: BTreeMap<&'a str, Vec<&'a Change>>,
    by_index: BTreeMap<u64, &'a Change>,
}

impl<'a> Sequence<'a> {
    fn new(feed: &'a Feed) -> Sequence<'a> {
        let mut keys: BTreeMap<&str, Vec<&Change>> = BTreeMap::new();
        for change in &feed.changes {
            keys.entry(&change.key).or_default().push(change);
        }
        let by_index = feed.changes.iter().map(|change| (change.index, change)).collect();
        Sequence { end: feed.index, keys, by_index }
    }

    /// The tag of a key at an index; `None` if it was absent.
    fn tag_at(&self, key: &str, index: u64) -> Option<u64> {
        let changes = self.keys.get(key)?;
        let count = changes.partition_point(|change| change.index <= index);
        let last = changes[..count].last()?;
        last.put.then_some(last.index)
    }

    fn last_state(&self) -> BTreeMap<String, u64> {
        let tags = self.keys.keys().filter_map(|key| Some((key.to_string(), self.tag_at(key, self.end)?)));
        tags.collect()
    }

    /// The keys of a listing at an index, and whether there are more.
    fn list_at(&self, prefix: &str, after: Option<&str>, limit: usize, index: u64) -> (Vec<(&'a str, u64)>, bool) {
        use std::ops::Bound::{Excluded, Included, Unbounded};
        let from = match after {
            Some(after) if after >= prefix => Excluded(after),
            _ => Included(prefix),
        };
        let keys = self.keys.range::<str, _>((from, Unbounded)).map(|(key, _)| *key);
        let keys = keys.take_while(|key| key.starts_with(prefix));
        let mut tags = keys.filter_map(|key| Some((key, self.tag_at(key, index)?)));
        let page = tags.by_ref().take(limit).collect();
        (page, tags.next().is_some())
    }
}

/// Every acknowledged write is in the sequence, where it was said to be; and the sequence has no more of them than
/// there were writes: more means that one was applied twice.
fn check_writes(run: &Run, operations: &[Operation], sequence: &Sequence<'_>) {
    let mut tags: BTreeMap<u64, &Operation> = BTreeMap::new();
    // For each key, puts and deletes: those acknowledged, and those that nobody was told of.
    let mut counts: BTreeMap<&str, [(usize, usize); 2]> = BTreeMap::new();
    for operation in operations.iter().filter(|operation| operation.request.is_write()) {
        let put = operation.request.value().is_some();
        let count = &mut counts.entry(&operation.key).or_default()[usize::from(!put)];
        match operation.end {
            End::Stored(tag) => {
                count.0 += 1;
                if sequence.by_index.get(&tag).is_none_or(|change| !change.put || change.key != operation.key) {
                    let what =
                        format!("lost: {} was acknowledged at index {tag}, which is no such change", operation.key);
                    run.violated(what, vec![operation.clone()]);
                }
                if let Some(other) = tags.insert(tag, operation) {
                    run.violated(format!("two writes have the tag {tag}"), vec![other.clone(), operation.clone()]);
                }
            }
            End::Deleted => count.0 += 1,
            End::Unknown => count.1 += 1,
            _ => {}
        }
    }
    let keys: BTreeSet<&str> = counts.keys().chain(sequence.keys.keys()).copied().collect();
    for key in keys {
        let changes = sequence.keys.get(key).map_or(&[][..], Vec::as_slice);
        let puts = changes.iter().filter(|change| change.put).count();
        let counts = counts.get(key).copied().unwrap_or_default();
        let both = [(counts[0], puts, "written"), (counts[1], changes.len() - puts, "deleted")];
        for ((acknowledged, unknown), seen, name) in both {
            if seen < acknowledged || seen > acknowledged + unknown {
                let what = format!(
                    "{key} was {name} {seen} times, by {acknowledged} acknowledged requests and {unknown} of unknown end"
                );
                let concerned = operations.iter().filter(|operation| operation.key == key).cloned().collect();
                run.violated(what, concerned);
            }
        }
    }
}

/// The keys, tags and values that an operation was told together.
fn seen_by(operation: &Operation) -> Vec<(&str, u64, u64)> {
    match &operation.end {
        End::Found { value: Some(value), tag, .. } => vec![(&operation.key, *tag, *value)],
        End::Listed { items, .. } => {
            items.iter().filter_map(|item| Some((item.key.as_str(), item.tag, item.value?))).collect()
        }
        End::Stored(tag) => {
            operation.request.value().map(|value| (operation.key.as_str(), *tag, value)).into_iter().collect()
        }
        _ => Vec::new(),
    }
}

/// A tag has one value, a value has one tag and the key it was written to, and nobody sees one whose write was
/// refused or failed.
fn check_values(run: &Run, operations: &[Operation]) {
    let writes: BTreeMap<u64, &Operation> =
        operations.iter().filter_map(|operation| Some((operation.request.value()?, operation))).collect();
    let mut tags: BTreeMap<u64, (u64, &Operation)> = BTreeMap::new();
    let mut values: BTreeMap<u64, (u64, &Operation)> = BTreeMap::new();
    for operation in operations {
        for (key, tag, value) in seen_by(operation) {
            let (of_tag, first) = tags.entry(tag).or_insert((value, operation));
            if *of_tag != value {
                let what = format!("the tag {tag} stands for the values {of_tag} and {value}");
                run.violated(what, vec![(*first).clone(), operation.clone()]);
            }
            let (of_value, first) = values.entry(value).or_insert((tag, operation));
            if *of_value != tag {
                let what = format!("the value {value} was written once, and has the tags {of_value} and {tag}");
                run.violated(what, vec![(*first).clone(), operation.clone()]);
            }
            match writes.get(&value) {
                Some(write) if write.key != key => {
                    run.violated(
                        format!("{key} has a value that was written to another key"),
                        vec![(*write).clone(), operation.clone()],
                    );
                }
                Some(write) if matches!(write.end, End::Refused(_) | End::Failed(_)) => {
                    let what = format!("{key} has a value whose write was not applied");
                    run.violated(what, vec![(*write).clone(), operation.clone()]);
                }
                Some(_) => {}
                None => run.violated(format!("{key} has a value that nobody has written"), vec![operation.clone()]),
            }
        }
    }
}

/// Every answer with an index is the state at that index. Returns how many there were.
fn check_states(run: &Run, operations: &[Operation], sequence: &Sequence<'_>) -> usize {
    let mut compared = 0;
    for operation in operations.iter().filter(|operation| !operation.request.is_write()) {
        let expected = match &operation.end {
            End::Found { index, tag, .. } => {
                let at = sequence.tag_at(&operation.key, *index);
                (at != Some(*tag)).then(|| format!("tag {at:?}"))
            }
            End::Missing { index } => sequence.tag_at(&operation.key, *index).map(|tag| format!("tag {tag}")),
            End::Listed { index, items, more } => {
                let Request::List { after, limit, .. } = &operation.request else { continue };
                let (page, more_there) = sequence.list_at(&operation.key, after.as_deref(), *limit, *index);
                // A page may also end early, because of its bytes: then there is more.
                let count = if *more { items.len().min(page.len()) } else { page.len() };
                let told: Vec<(&str, u64)> = items.iter().map(|Item { key, tag, .. }| (key.as_str(), *tag)).collect();
                let more_there = more_there || count < page.len();
                (told != page[..count] || *more != more_there).then(|| format!("{page:?}, more: {more_there}"))
            }
            _ => continue,
        };
        compared += 1;
        if let Some(expected) = expected {
            let what = format!("{:?} is told another state than there was at its index: {expected}", operation.key);
            run.violated(what, vec![operation.clone()]);
        }
    }
    compared
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    /// A client, call and return in milliseconds, a key, a request, and its end.
    fn operation(client: usize, (called, returned): (u64, u64), key: &str, request: Request, end: End) -> Operation {
        let ms = Duration::from_millis;
        let key = key.to_owned();
        let (called, returned) = (ms(called), ms(returned));
        Operation { client, node: 1, boot: 1, key, request, token: false, attempts: 1, called, returned, floor: 0, end }
    }

    const GET: Request = Request::Read { fresh: true, after_index: None };
    const STALE_GET: Request = Request::Read { fresh: false, after_index: None };

    fn put(value: u64) -> Request {
        Request::Put(value, Condition::Always)
    }

    fn found(value: u64, tag: u64, index: u64) -> End {
        End::Found { value: Some(value), tag, index }
    }

    fn change(index: u64, put: bool, key: &str) -> Change {
        Change { index, put, key: key.to_owned() }
    }

    /// Three changes, and all who saw them right.
    struct Story {
        operations: Vec<Operation>,
        feeds: Vec<Feed>,
        contents: BTreeMap<NodeId, Contents>,
    }

    impl Story {
        fn true_one() -> Story {
            let list = Request::List { fresh: true, after: None, limit: 1 };
            let items = vec![Item { key: "r/1".to_owned(), tag: 6, value: Some(11) }];
            let operations = vec![
                operation(0, (1, 2), "r/1", put(10), End::Stored(5)),
                operation(1, (3, 4), "r/1", GET, found(10, 5, 5)),
                operation(0, (5, 6), "r/1", put(11), End::Stored(6)),
                operation(1, (7, 8), "r/1", STALE_GET, found(10, 5, 5)),
                operation(1, (9, 10), "s/1", put(12), End::Stored(8)),
                operation(1, (11, 12), "", list, End::Listed { index: 8, items, more: true }),
                operation(0, (13, 14), "r/2", Request::Delete(Condition::Always), End::Absent),
                operation(0, (15, 16), "r/2", GET, End::Missing { index: 9 }),
            ];
            let changes = vec![change(5, true, "r/1"), change(6, true, "r/1"), change(8, true, "s/1")];
            let feed = Feed { changes, index: 10, gaps: Vec::new(), pages: 1 };
            let contents: Contents = [("r/1".to_owned(), (11, 6)), ("s/1".to_owned(), (12, 8))].into();
            let contents = [(1, contents.clone()), (2, contents)].into();
            Story { operations, feeds: vec![feed.clone(), feed], contents }
        }

        fn violations(&self) -> Vec<String> {
            let run = Run::new();
            let evidence = Evidence { operations: &self.operations, feeds: &self.feeds, contents: &self.contents };
            judge(&run, &evidence);
            run.violations().into_iter().map(|violation| violation.what).collect()
        }
    }

    /// Changes a true story, and makes sure that somebody says so in these words.
    #[track_caller]
    fn assert_found(words: &str, lie: impl FnOnce(&mut Story)) {
        let mut story = Story::true_one();
        lie(&mut story);
        let violations = story.violations();
        assert!(violations.iter().any(|what| what.contains(words)), "{words:?} is not in {violations:#?}");
    }

    #[test]
    fn a_true_story_is_believed() {
        assert_eq!(Story::true_one().violations(), Vec::<String>::new());
    }

    #[test]
    fn a_stale_read_is_found() {
        assert_found("is not linearizable", |story| story.operations[3].request = GET);
        let run = Run::new();
        let mut read = operation(1, (3, 4), "r/1", GET, found(10, 5, 5));
        run.told(&read);
        assert!(!run.is_violated());
        read.floor = 6;
        run.told(&read);
        assert!(run.violations()[0].what.contains("stale"));
        // The same of a read that may be stale is none.
        read.request = STALE_GET;
        run.told(&read);
        assert_eq!(run.violations().len(), 1);
    }

    #[test]
    fn a_stale_read_of_a_state_that_never_was_is_found() {
        assert_found("another state than there was", |story| story.operations[3].end = found(10, 5, 7));
        assert_found("another state than there was", |story| story.operations[3].end = End::Missing { index: 6 });
        assert_found("went back", |story| {
            story.operations.push(operation(2, (20, 21), "r/1", STALE_GET, found(10, 5, 5)));
        });
    }

    #[test]
    fn a_listing_that_is_no_cut_is_found() {
        assert_found("another state than there was", |story| {
            story.operations[5].end = End::Listed { index: 8, items: Vec::new(), more: false };
        });
        assert_found("another state than there was", |story| {
            let items = vec![Item { key: "r/1".to_owned(), tag: 5, value: Some(10) }];
            story.operations[5].end = End::Listed { index: 8, items, more: true };
        });
    }

    #[test]
    fn a_lost_write_is_found() {
        assert_found("lost: s/1", |story| {
            for contents in story.contents.values_mut() {
                contents.remove("s/1");
            }
        });
        assert_found("lost: r/1", |story| {
            for feed in &mut story.feeds {
                feed.changes.remove(1);
            }
        });
        assert_found("differ in 1 keys", |story| {
            story.contents.get_mut(&2).unwrap().remove("r/1");
        });
        assert_found("other keys than the sequence", |story| {
            for contents in story.contents.values_mut() {
                contents.insert("r/9".to_owned(), (1, 1));
            }
        });
    }

    #[test]
    fn a_write_that_was_applied_twice_is_found() {
        assert_found("was written 3 times, by 2 acknowledged", |story| {
            story.feeds.iter_mut().for_each(|feed| feed.changes.push(change(9, true, "r/1")));
        });
        assert_found("was deleted 1 times, by 0 acknowledged", |story| {
            story.feeds.iter_mut().for_each(|feed| feed.changes.push(change(9, false, "r/1")));
        });
        assert_found("was written once, and has the tags", |story| {
            story.operations.push(operation(2, (20, 21), "r/1", GET, found(11, 9, 9)));
        });
        // A write of unknown end may be there, once.
        let mut story = Story::true_one();
        story.operations.push(operation(2, (17, 18), "r/1", put(20), End::Unknown));
        assert_eq!(story.violations(), Vec::<String>::new());
        for feed in &mut story.feeds {
            feed.changes.push(change(9, true, "r/1"));
        }
        for contents in story.contents.values_mut() {
            contents.insert("r/1".to_owned(), (20, 9));
        }
        assert_eq!(story.violations(), Vec::<String>::new());
    }

    #[test]
    fn a_refused_write_that_took_effect_is_found() {
        assert_found("whose write was not applied", |story| story.operations[0].end = End::Refused(503));
        assert_found("was refused, and node", |story| story.operations[4].end = End::Refused(503));
        assert_found("whose write was not applied", |story| {
            story.operations[0].request = Request::Put(10, Condition::Absent);
            story.operations[0].end = End::Failed(Some(4));
        });
    }

    #[test]
    fn values_and_tags_that_are_mixed_up_are_found() {
        assert_found("stands for the values", |story| {
            story.operations.push(operation(2, (20, 21), "r/1", GET, found(12, 6, 9)));
        });
        assert_found("written to another key", |story| {
            story.operations.push(operation(2, (20, 21), "r/1", GET, found(12, 8, 9)));
        });
        assert_found("nobody has written", |story| {
            story.operations.push(operation(2, (20, 21), "r/1", GET, found(99, 9, 9)));
        });
        assert_found("two writes have the tag", |story| story.operations[2].end = End::Stored(5));
    }

    #[test]
    fn followers_that_disagree_are_found() {
        assert_found("two followers were told different", |story| story.feeds[1].changes[1].put = false);
        assert_found("a follower was told 2 changes", |story| {
            story.feeds[0].changes.pop();
        });
        assert_found("no follower has seen all", |story| {
            story.feeds.iter_mut().for_each(|feed| feed.gaps.push((0, 5)));
        });
        // What a follower has missed, as it was told, it need not know.
        let mut story = Story::true_one();
        story.feeds[1].changes.remove(0);
        story.feeds[1].gaps.push((0, 5));
        assert_eq!(story.violations(), Vec::<String>::new());
    }
}
