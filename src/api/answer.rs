//! How answers look: their statuses, header fields and JSON.

use serde::Serialize;

use crate::http::{Header, Payload, Response, respond};
use crate::metrics;
use crate::store::Item;

use super::problem::Problem;

/// When a client should try again after a 503. A new leader is elected in about this time.
const RETRY_AFTER: &str = "1";

/// The value of a key. Its bytes are shared with the store, not copied.
pub(super) fn value(item: Item, index: u64) -> Response {
    let etag = item.etag();
    respond(200, Payload::from_owner(item))
        .with_header(header("Content-Type", "application/octet-stream"))
        .with_header(etag_header(etag))
        .with_header(index_header(index))
        .with_header(revalidate())
}

/// 204, with the entity tag that the request gave the key.
pub(super) fn stored(etag: u64) -> Response {
    done().with_header(etag_header(etag))
}

/// 204.
pub(super) fn done() -> Response {
    respond(204, Payload::empty())
}

/// 204 to `OPTIONS`.
pub(super) fn options(allow: &'static str) -> Response {
    done().with_header(header("Allow", allow))
}

/// 304, with the entity tag of the key if it exists.
pub(super) fn not_modified(etag: Option<u64>, index: u64) -> Response {
    let response = respond(304, Payload::empty()).with_header(index_header(index)).with_header(revalidate());
    match etag {
        Some(etag) => response.with_header(etag_header(etag)),
        None => response,
    }
}

/// 200 with a JSON document. One that reflects the keys has the index that it reflects.
pub(super) fn json(document: &impl Serialize, index: Option<u64>) -> Response {
    let text = serde_json::to_vec(document).expect("documents are structs and lists of strings and numbers");
    let response = json_payload(text);
    match index {
        Some(index) => response.with_header(index_header(index)),
        None => response,
    }
}

/// 200 with a JSON document that never changes.
pub(super) fn json_text(text: &'static str) -> Response {
    json_payload(text)
}

/// 200 with the node's metrics.
pub(super) fn metrics(text: String) -> Response {
    respond(200, text).with_header(header("Content-Type", metrics::CONTENT_TYPE)).with_header(revalidate())
}

fn json_payload(payload: impl Into<Payload>) -> Response {
    respond(200, payload).with_header(header("Content-Type", "application/json")).with_header(revalidate())
}

/// A problem document; `write` says whether the request was meant to change something.
pub(super) fn problem(problem: &Problem, write: bool) -> Response {
    let mut response = respond(problem.status(), problem.to_json(write))
        .with_header(header("Content-Type", "application/problem+json"))
        .with_header(revalidate());
    if problem.is_temporary() {
        response.add_header(header("Retry-After", RETRY_AFTER));
    }
    if let Some(allow) = problem.allow() {
        response.add_header(header("Allow", allow));
    }
    if let Some(etag) = problem.etag() {
        response.add_header(etag_header(etag));
    }
    if let Some(index) = problem.index() {
        response.add_header(index_header(index));
    }
    response
}

/// What a key was a moment ago is no answer to a read that must be linearizable; without this, a cache between may
/// give one by its own guess of how long it holds (RFC 9111 section 4.2.2).
fn revalidate() -> Header {
    header("Cache-Control", "no-cache")
}

fn etag_header(etag: u64) -> Header {
    header("ETag", format!("\"{etag}\""))
}

fn index_header(index: u64) -> Header {
    header("Raftexample-Index", index.to_string())
}

fn header(name: &'static str, value: impl Into<Vec<u8>> + AsRef<[u8]>) -> Header {
    Header::from_bytes(name, value).expect("the header fields written here are ASCII")
}
