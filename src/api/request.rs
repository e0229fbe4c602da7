//! What a client asks for, read from the head of its request.

use std::borrow::Cow;

use crate::command::Condition;
use crate::http::{Head, Method};
use crate::membership::NodeId;
use crate::metrics::Consistency;

use super::Limits;
use super::precondition::{parse_condition, parse_idempotency_key};
use super::problem::Problem;
use super::target::{self, Query, Resource, parameters, parse_decimal};

/// The methods of `/`.
const KEYS_METHODS: &str = "GET, HEAD, OPTIONS";
/// The methods of a key.
const KEY_METHODS: &str = "GET, HEAD, PUT, DELETE, OPTIONS";
/// The methods of what the node says of itself.
const REPORT_METHODS: &str = "GET, HEAD, OPTIONS";
/// The methods of `/_/members`.
const MEMBERS_METHODS: &str = "GET, HEAD, PUT, OPTIONS";
/// The methods of `/_/members/{id}`.
const MEMBER_METHODS: &str = "PUT, DELETE, OPTIONS";
/// The methods of `/_/leader`.
const LEADER_METHODS: &str = "PUT, OPTIONS";
/// The methods of `/_/snapshot`.
const SNAPSHOT_METHODS: &str = "POST, OPTIONS";

/// The longest peer URL in bytes: a host name has at most 253.
const URL_BYTES_MAX: usize = 512;
/// The longest decimal `u64` and a line's end.
const ID_BYTES_MAX: usize = 32;
/// The longest list of members in bytes: over a hundred with the longest URLs.
const MEMBERS_BYTES_MAX: usize = 64 << 10;

/// A request that is well-formed as far as its head says. Writes lack their body.
#[derive(Debug)]
pub(super) enum Request<'h> {
    /// `GET` or `HEAD` of a key.
    GetKey { key: Cow<'h, [u8]>, query: Query<'h>, condition: Condition },
    /// `PUT` of a key.
    PutKey { key: Cow<'h, [u8]>, condition: Condition, idempotency_key: Option<&'h [u8]> },
    /// `DELETE` of a key.
    DeleteKey { key: Cow<'h, [u8]>, condition: Condition, idempotency_key: Option<&'h [u8]> },
    /// `GET` or `HEAD` of `/`.
    ListKeys { query: Query<'h> },
    /// `OPTIONS` of anything: its methods.
    Options { allow: &'static str },
    /// `GET /_/status`.
    Status,
    /// `GET /_/livez`.
    Live,
    /// `GET /_/readyz`.
    Ready,
    /// `GET /_/openapi.json`.
    Describe,
    /// `GET /_/metrics`.
    Metrics,
    /// `GET /_/members`.
    Members,
    /// `PUT /_/members`.
    ReplaceMembers,
    /// `PUT /_/members/{id}`; `voter` is what `role` says.
    AddMember { id: NodeId, voter: Option<bool> },
    /// `DELETE /_/members/{id}`.
    RemoveMember { id: NodeId },
    /// `PUT /_/leader`.
    TransferLeader,
    /// `POST /_/snapshot`.
    Snapshot,
}

impl<'h> Request<'h> {
    /// Reads the head of a request.
    ///
    /// # Errors
    /// What is wrong with it, whatever its body.
    pub(super) fn parse(head: &'h Head<'_>, limits: &Limits) -> Result<Self, Problem> {
        if head.target() == b"*" {
            // The head comes with OPTIONS only.
            return Ok(Request::Options { allow: KEY_METHODS });
        }
        let (resource, query) = target::parse(head.target())?;
        match resource {
            Resource::Key(key) if key.len() > limits.key_bytes_max => {
                Err(Problem::new(414, format!("the key is longer than {} bytes", limits.key_bytes_max)))
            }
            Resource::Key(key) => Self::of_key(head, key, query),
            Resource::Keys => match head.method() {
                Method::Get | Method::Head => Ok(Request::ListKeys { query: Query::parse(query, parameters::KEYS)? }),
                method => without_parameters(method, query, KEYS_METHODS, None),
            },
            Resource::Node(path) => Self::of_node(head.method(), &path, query),
        }
    }

    fn of_key(head: &'h Head<'_>, key: Cow<'h, [u8]>, query: &'h [u8]) -> Result<Self, Problem> {
        let condition = || parse_condition(head.get_all("If-Match"), head.get_all("If-None-Match"));
        let idempotency_key = || parse_idempotency_key(head.get_all("Idempotency-Key"));
        let request = match head.method() {
            Method::Get | Method::Head => {
                let query = Query::parse(query, parameters::KEY)?;
                return Ok(Request::GetKey { key, query, condition: condition()? });
            }
            Method::Put => Request::PutKey { key, condition: condition()?, idempotency_key: idempotency_key()? },
            Method::Delete => Request::DeleteKey { key, condition: condition()?, idempotency_key: idempotency_key()? },
            method => return without_parameters(method, query, KEY_METHODS, None),
        };
        Query::parse(query, parameters::NONE)?;
        Ok(request)
    }

    fn of_node(method: &Method, path: &[u8], query: &'h [u8]) -> Result<Self, Problem> {
        let read = matches!(method, Method::Get | Method::Head);
        let put = *method == Method::Put;
        match path {
            b"status" => without_parameters(method, query, REPORT_METHODS, read.then_some(Request::Status)),
            b"livez" => without_parameters(method, query, REPORT_METHODS, read.then_some(Request::Live)),
            b"readyz" => without_parameters(method, query, REPORT_METHODS, read.then_some(Request::Ready)),
            b"openapi.json" => without_parameters(method, query, REPORT_METHODS, read.then_some(Request::Describe)),
            b"metrics" => without_parameters(method, query, REPORT_METHODS, read.then_some(Request::Metrics)),
            b"members" => {
                let replace = put.then_some(Request::ReplaceMembers);
                without_parameters(method, query, MEMBERS_METHODS, replace.or(read.then_some(Request::Members)))
            }
            b"leader" => without_parameters(method, query, LEADER_METHODS, put.then_some(Request::TransferLeader)),
            b"snapshot" => {
                let post = *method == Method::Post;
                without_parameters(method, query, SNAPSHOT_METHODS, post.then_some(Request::Snapshot))
            }
            _ => match path.strip_prefix(b"members/") {
                Some(id) => Self::of_member(method, id, query),
                None => Err(Problem::not_found(format!("the node has nothing under /_/{}", path.escape_ascii()))),
            },
        }
    }

    fn of_member(method: &Method, id: &[u8], query: &'h [u8]) -> Result<Self, Problem> {
        let id = parse_id(id)?;
        if *method == Method::Put {
            let voter = Query::parse(query, parameters::MEMBER)?.voter;
            return Ok(Request::AddMember { id, voter });
        }
        let remove = (*method == Method::Delete).then_some(Request::RemoveMember { id });
        without_parameters(method, query, MEMBER_METHODS, remove)
    }

    /// How fresh a state it sees, and whether it waits for a change of that.
    pub(super) fn reading(&self) -> (Consistency, bool) {
        match self {
            Request::GetKey { query, .. } | Request::ListKeys { query } => {
                let consistency = match query.consistency {
                    target::Consistency::Linearizable => Consistency::Linearizable,
                    target::Consistency::Stale => Consistency::Stale,
                };
                (consistency, query.after_index.is_some())
            }
            Request::Ready | Request::Members => (Consistency::Linearizable, false),
            _ => (Consistency::None, false),
        }
    }

    /// The longest body that this request may have, in bytes.
    pub(super) fn body_bytes_max(&self, limits: &Limits) -> usize {
        match self {
            Request::PutKey { .. } => limits.value_bytes_max,
            Request::AddMember { .. } => URL_BYTES_MAX,
            Request::TransferLeader => ID_BYTES_MAX,
            Request::ReplaceMembers => MEMBERS_BYTES_MAX,
            _ => 0,
        }
    }
}

/// The request, if the resource has it; else the answer to `OPTIONS`; else 405. None of them takes parameters.
fn without_parameters<'h>(
    method: &Method,
    query: &[u8],
    allow: &'static str,
    request: Option<Request<'h>>,
) -> Result<Request<'h>, Problem> {
    let options = (*method == Method::Options).then_some(Request::Options { allow });
    let request = request.or(options).ok_or_else(|| Problem::method_not_allowed(allow))?;
    Query::parse(query, parameters::NONE)?;
    Ok(request)
}

/// Reads a member's id.
///
/// # Errors
/// 400 if it is no decimal number from 1.
pub(super) fn parse_id(text: &[u8]) -> Result<NodeId, Problem> {
    parse_decimal(text).filter(|id| *id > 0).ok_or_else(|| {
        Problem::bad_request(format!("'{}' is no member's id: expected a decimal number from 1", text.escape_ascii()))
    })
}

/// Whether a request with this method is meant to change something, so that its failure has an outcome.
pub(super) fn is_write(method: &Method) -> bool {
    !matches!(method, Method::Get | Method::Head | Method::Options | Method::Trace)
}
