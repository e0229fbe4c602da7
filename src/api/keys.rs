//! The key-value API: keys, the listing, and waiting for changes.

use std::sync::Arc;
use std::time::{Duration, Instant};

use base64::display::Base64Display;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;
use serde::{Serialize, Serializer};

use crate::command::{Command, Condition, Kind, Token};
use crate::http::{Head, Response};
use crate::message::{Backend, Refusal, Reply, WriteReply};
use crate::store::{Change, Changes, Item, Listing, Operation, Outcome, Version};
use crate::watch::{Interest, Wake, Watch};

use super::precondition::{Unmet, check_read};
use super::problem::Problem;
use super::target::{Consistency, PAGE_ITEMS_MAX, Query, WAIT_DEFAULT, percent_encode_key};
use super::{Api, answer};

/// Bytes of keys and values at which a page ends, though it has fewer items than were asked for: a page is built in
/// memory, and a thousand of the largest values would be 16 GiB. Only the last item may go beyond.
const PAGE_BYTES_MAX: usize = 4 << 20;

/// How often a request that waits looks whether its client is still there.
const CLIENT_CHECK_INTERVAL: Duration = Duration::from_secs(5);

/// What is said behind an unknown outcome to a client that gave an `Idempotency-Key`.
const REPEAT: &str = "A repeat with the same Idempotency-Key is safe, and gets the outcome.";

/// What is said behind an unknown outcome to a client that gave none.
const NO_REPEAT: &str = "Without an Idempotency-Key a repeat may be applied a second time, over what others wrote in \
                         between: read the key first, or repeat under If-Match or If-None-Match. A later 412 or 404 \
                         may be the work of this request.";

#[derive(Serialize)]
struct KeysDocument<'v> {
    /// The applied index at which the page was cut.
    index: u64,
    keys: Vec<KeyDocument<'v>>,
    /// What to give as `after` for the next page.
    #[serde(serialize_with = "encoded_or_null")]
    next: Option<&'v [u8]>,
}

#[derive(Serialize)]
struct KeyDocument<'v> {
    #[serde(serialize_with = "encoded")]
    key: &'v [u8],
    /// Of the value, in bytes.
    size: usize,
    /// As it stands in an `ETag` field, so that it can stand in `If-Match`.
    #[serde(serialize_with = "quoted")]
    etag: u64,
    #[serde(skip_serializing_if = "Option::is_none", serialize_with = "base64")]
    value: Option<&'v [u8]>,
}

#[derive(Serialize)]
struct ChangesDocument<'v> {
    /// What to give as `after-index` next: there is nothing untold up to here.
    index: u64,
    changes: Vec<ChangeDocument<'v>>,
}

#[derive(Serialize)]
struct ChangeDocument<'v> {
    index: u64,
    op: &'static str,
    #[serde(serialize_with = "encoded")]
    key: &'v [u8],
}

impl<B: Backend> Api<B> {
    pub(super) fn get_key(
        &self,
        session: &mut B::Session,
        key: &[u8],
        consistency: Consistency,
        condition: &Condition,
    ) -> Result<Response, Problem> {
        let version = self.read(session, consistency)?;
        answer_key(&version, key, condition)
    }

    pub(super) fn put_key(
        &self,
        session: &mut B::Session,
        key: &[u8],
        value: &[u8],
        condition: &Condition,
        idempotency_key: Option<&[u8]>,
    ) -> Result<Response, Problem> {
        let (command, repeatable) = put_command(key, value, condition, idempotency_key);
        self.write(session, command, repeatable)
    }

    pub(super) fn delete_key(
        &self,
        session: &mut B::Session,
        key: &[u8],
        condition: Condition,
        idempotency_key: Option<&[u8]>,
    ) -> Result<Response, Problem> {
        let (command, repeatable) = delete_command(key, condition, idempotency_key);
        self.write(session, command, repeatable)
    }

    fn write(&self, session: &mut B::Session, command: Vec<u8>, repeatable: bool) -> Result<Response, Problem> {
        answer_write(self.backend.write(session, command.into(), self.deadline()), repeatable)
    }

    fn read(&self, session: &mut B::Session, consistency: Consistency) -> Result<Arc<Version>, Problem> {
        match consistency {
            Consistency::Linearizable => Ok(self.backend.read(session, self.deadline())?),
            Consistency::Stale => Ok(self.backend.stale()?),
        }
    }

    pub(super) fn list_keys(&self, session: &mut B::Session, query: &Query<'_>) -> Result<Response, Problem> {
        let version = self.read(session, query.consistency)?;
        let limit = query.limit.unwrap_or(PAGE_ITEMS_MAX);
        let listing = version.list(&query.prefix, query.after.as_deref(), limit);
        let page = keys_page(version.applied_index(), &listing, query.values == Some(true));
        Ok(answer::json(&page, Some(page.index)))
    }

    /// Waits until the last change of `key` is after `index`, then answers as [`Api::get_key`].
    pub(super) fn wait_for_key(
        &self,
        session: &mut B::Session,
        head: &Head<'_>,
        (key, index): (&[u8], u64),
        query: &Query<'_>,
        condition: &Condition,
    ) -> Result<Response, Problem> {
        let interest = Interest::Key(Bytes::copy_from_slice(key));
        // The key did not change up to here, so the history is not looked through again.
        let mut after = index;
        let changed = |version: &Version, unchanged_up_to| {
            after = after.max(unchanged_up_to);
            let change = version.last_change(key, after).map_err(|gone| Problem::gone(gone.known_after))?;
            after = after.max(version.applied_index());
            Ok(change)
        };
        match self.wait_for(session, head, interest, query, changed)? {
            (version, Some(_)) => answer_key(&version, key, condition),
            (version, None) => {
                let etag = version.get(key).map(|item| item.etag());
                Ok(answer::not_modified(etag, version.applied_index()))
            }
        }
    }

    /// Waits until there is a change after `index` under the prefix, and answers all that there are.
    pub(super) fn wait_for_changes(
        &self,
        session: &mut B::Session,
        head: &Head<'_>,
        index: u64,
        query: &Query<'_>,
    ) -> Result<Response, Problem> {
        let interest = Interest::Prefix(Bytes::copy_from_slice(&query.prefix));
        let limit = query.limit.unwrap_or(PAGE_ITEMS_MAX);
        // Nothing under the prefix changed up to here, so it is not looked through again.
        let mut after = index;
        let changed = |version: &Version, unchanged_up_to| {
            after = after.max(unchanged_up_to);
            let changes =
                version.changes(&query.prefix, after, limit).map_err(|gone| Problem::gone(gone.known_after))?;
            after = changes.index;
            Ok(Some(changes).filter(|changes| !changes.changes.is_empty()))
        };
        let (version, changes) = self.wait_for(session, head, interest, query, changed)?;
        let changes = changes.unwrap_or_else(|| Changes { changes: Vec::new(), index: after });
        Ok(answer::json(&changes_page(&changes), Some(version.applied_index())))
    }

    /// Waits until `look` finds something in a version, or the time that the query grants is up; returned is the last
    /// version that was looked at.
    ///
    /// One read index at the beginning is enough for a linearizable answer: what this node applies later is newer than
    /// what was committed when the request came. When the time is up there is another, because the answer then says
    /// that nothing happened up to now, and not just that this node has heard of nothing.
    ///
    /// `look` is also told up to which index it need not look, as nothing has changed there since the last time: under load
    /// the history is shorter than a wait. A version is held only while it is looked at: with it, what others overwrite
    /// meanwhile would stay in memory.
    fn wait_for<T>(
        &self,
        session: &mut B::Session,
        head: &Head<'_>,
        interest: Interest,
        query: &Query<'_>,
        mut look: impl FnMut(&Version, u64) -> Result<Option<T>, Problem>,
    ) -> Result<(Arc<Version>, Option<T>), Problem> {
        let deadline = Instant::now() + query.timeout.unwrap_or(WAIT_DEFAULT);
        let watch = self.backend.watchers().watch(interest).ok_or(Refusal::Overloaded("too many requests wait"))?;
        let mut look_at = |version: Arc<Version>, unchanged_up_to| {
            let found = look(&version, unchanged_up_to)?;
            Ok::<_, Problem>((version, found))
        };
        let first = look_at(self.read(session, query.consistency)?, 0)?;
        if first.1.is_some() {
            return Ok(first);
        }
        drop(first);
        while let Some(unchanged_up_to) = wait_while_connected(&watch, head, deadline)? {
            let next = look_at(self.backend.stale()?, unchanged_up_to)?;
            if next.1.is_some() {
                return Ok(next);
            }
        }
        let unchanged_up_to = watch.unchanged_up_to();
        look_at(self.read(session, query.consistency)?, unchanged_up_to)
    }
}

/// Waits for a change, and returns up to which index there was none; `None` if the deadline has passed.
fn wait_while_connected(watch: &Watch<'_>, head: &Head<'_>, deadline: Instant) -> Result<Option<u64>, Problem> {
    loop {
        let check_at = Instant::now() + CLIENT_CHECK_INTERVAL;
        match watch.wait(deadline.min(check_at)) {
            Wake::Changed(told) => return Ok(Some(told)),
            Wake::Stopping => return Err(Refusal::Stopping.into()),
            Wake::TimedOut if deadline <= check_at => return Ok(None),
            Wake::TimedOut if head.client_gone() => return Err(Problem::new(503, "the client has gone")),
            Wake::TimedOut => {}
        }
    }
}

/// Answers a read from `version`.
fn answer_key(version: &Version, key: &[u8], condition: &Condition) -> Result<Response, Problem> {
    let index = version.applied_index();
    let Some(item) = version.get(key) else {
        return Err(Problem::not_found("the key does not exist").at(index));
    };
    match check_read(condition, item.etag()) {
        Ok(()) => Ok(answer::value(item, index)),
        Err(Unmet::NotModified) => Ok(answer::not_modified(Some(item.etag()), index)),
        Err(Unmet::Failed) => Err(Problem::precondition_failed(Some(item.etag())).at(index)),
    }
}

/// The command of a PUT, and whether it may be sent again.
pub(super) fn put_command(
    key: &[u8],
    value: &[u8],
    condition: &Condition,
    idempotency_key: Option<&[u8]>,
) -> (Vec<u8>, bool) {
    let token = idempotency_key.map(|name| Token::new(name, Kind::Put, key, condition, value));
    (Command::encode_put(key, value, condition, token.as_ref()), token.is_some())
}

/// The command of a DELETE, and whether it may be sent again.
pub(super) fn delete_command(key: &[u8], condition: Condition, idempotency_key: Option<&[u8]>) -> (Vec<u8>, bool) {
    let token = idempotency_key.map(|name| Token::new(name, Kind::Delete, key, &condition, b""));
    let repeatable = token.is_some();
    (Command::Delete { key: Bytes::copy_from_slice(key), condition, token }.encode(), repeatable)
}

/// A request of an event loop that waits for the driver or the applier.
pub(super) enum Waiting {
    /// A write; whether it may be sent again.
    Write { repeatable: bool },
    /// A read of a key.
    Read { key: Vec<u8>, condition: Condition, stale: bool },
}

/// Ends such a write. Without a reply the node did not answer in time.
pub(super) fn answer_waiting_write(repeatable: bool, reply: Option<Reply>) -> Response {
    let reply = match reply {
        Some(Reply::Write(reply)) => reply,
        Some(_) => unreachable!("a write is answered as a write"),
        None => WriteReply::Unknown("the node did not answer in time"),
    };
    answer_write(reply, repeatable).unwrap_or_else(|problem| answer::problem(&problem, true))
}

/// Answers a read of a key, or says what is wrong with it.
pub(super) fn answer_read(version: &Version, key: &[u8], condition: &Condition) -> Response {
    answer_key(version, key, condition).unwrap_or_else(|problem| answer::problem(&problem, false))
}

/// How a write ended.
fn answer_write(reply: WriteReply, repeatable: bool) -> Result<Response, Problem> {
    match reply {
        WriteReply::Applied(outcome) => answer_outcome(outcome),
        WriteReply::NotApplied(refusal) => Err(refusal.into()),
        WriteReply::Unknown(known) => Err(Problem::unknown(known, if repeatable { REPEAT } else { NO_REPEAT })),
    }
}

/// What a write came to.
fn answer_outcome(outcome: Outcome) -> Result<Response, Problem> {
    match outcome {
        Outcome::Put { etag } => Ok(answer::stored(etag)),
        Outcome::Deleted { .. } => Ok(answer::done()),
        Outcome::Absent => Err(Problem::not_found("the key does not exist")),
        Outcome::ConditionFailed { etag } => Err(Problem::precondition_failed(etag)),
        Outcome::TokenReused => Err(Problem::new(
            422,
            "this Idempotency-Key was used with another method, key, value or condition: give each write its own",
        )),
    }
}

/// Cuts a listing to the bytes of one page.
fn keys_page<'v>(index: u64, listing: &'v Listing, with_values: bool) -> KeysDocument<'v> {
    let document = |item: &'v Item| KeyDocument {
        key: item.key(),
        size: item.value().len(),
        etag: item.etag(),
        value: with_values.then(|| item.value()),
    };
    let bytes = |item: &Item| item.key().len() + if with_values { item.value().len() } else { 0 };
    let fitting = fitting(listing.items.iter().map(bytes));
    let keys: Vec<_> = listing.items[..fitting].iter().map(document).collect();
    let more = listing.more || fitting < listing.items.len();
    let next = if more { keys.last().map(|last| last.key) } else { None };
    KeysDocument { index, keys, next }
}

/// Cuts changes to the bytes of one page.
fn changes_page(changes: &Changes) -> ChangesDocument<'_> {
    let fitting = fitting(changes.changes.iter().map(|change| change.key.len()));
    let page: Vec<_> = changes.changes[..fitting].iter().map(change_document).collect();
    let index = match page.last() {
        Some(last) if fitting < changes.changes.len() => last.index,
        _ => changes.index,
    };
    ChangesDocument { index, changes: page }
}

fn change_document(change: &Change) -> ChangeDocument<'_> {
    let op = match change.operation {
        Operation::Put => "put",
        Operation::Delete => "delete",
    };
    ChangeDocument { index: change.index, op, key: &change.key }
}

/// How many items of these lengths fit into one page: at least one, if there is any.
fn fitting(lengths: impl Iterator<Item = usize>) -> usize {
    let mut bytes = 0;
    lengths
        .take_while(|length| {
            let fits = bytes < PAGE_BYTES_MAX;
            bytes += length;
            fits
        })
        .count()
}

fn encoded<S: Serializer>(key: &&[u8], serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_str(&percent_encode_key(key))
}

fn encoded_or_null<S: Serializer>(key: &Option<&[u8]>, serializer: S) -> Result<S::Ok, S::Error> {
    key.map(percent_encode_key).serialize(serializer)
}

fn quoted<S: Serializer>(etag: &u64, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_str(&format_args!("\"{etag}\""))
}

fn base64<S: Serializer>(value: &Option<&[u8]>, serializer: S) -> Result<S::Ok, S::Error> {
    value.map(|value| Base64Display::new(value, &STANDARD).to_string()).serialize(serializer)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_page_ends_at_its_bytes_but_has_an_item() {
        assert_eq!(fitting([].into_iter()), 0);
        assert_eq!(fitting([16 << 20, 1].into_iter()), 1);
        assert_eq!(fitting([1, 16 << 20, 1].into_iter()), 2);
        assert_eq!(fitting([1 << 20; 9].into_iter()), 4);
        assert_eq!(fitting([1; 1000].into_iter()), 1000);
        let items = vec![Item::new(1, b"a", &[0; PAGE_BYTES_MAX]), Item::new(2, b"b", b""), Item::new(3, b"c", b"")];
        let listing = Listing { items, more: false };
        let page = keys_page(3, &listing, true);
        assert_eq!((page.keys.len(), page.next), (1, Some(&b"a"[..])));
        let page = keys_page(3, &listing, false);
        assert_eq!((page.keys.len(), page.next), (3, None), "sizes alone are short");
    }
}
