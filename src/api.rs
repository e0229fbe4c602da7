//! The REST API: from a client's request to a call of the [`Backend`], and from its reply to an answer.
//!
//! [`Api`] is the [`Service`] behind the client port. It holds no state of its own: what a request says is read from
//! its head (`request.rs`), what it changes or reads is the backend's, and everything that is no success is a
//! problem document (`problem.rs`). Answers to reads carry `Raftexample-Index`, the applied index that they reflect.

mod problem;
mod target;
mod precondition;
mod request;
mod answer;
mod keys;
mod node;
#[cfg(test)]
mod tests;

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::http::{Admission, Body, Head, Method, Response, Service, StatusCode};
use crate::message::Backend;
use crate::metrics::{Consistency, Metrics};

use self::problem::Problem;
use self::request::{Request, is_write};

/// Bytes of a request line beside the keys in it: method, version, and the parameters that are short.
const REQUEST_LINE_BYTES_BESIDE_KEYS: usize = 1024;

/// What `GET /_/openapi.json` answers: an OpenAPI 3.1 document. The tests hold every answer that they see against it.
const DESCRIPTION: &str = include_str!("api/openapi.json");

/// What one request may take.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// The longest key in bytes, decoded; a longer one gets 414.
    pub key_bytes_max: usize,
    /// The longest value in bytes; a longer one gets 413.
    pub value_bytes_max: usize,
    /// How long a request may wait for a leader, a commit or a read index.
    pub request_timeout: Duration,
}

impl Limits {
    /// The longest request line that a client may have reason to send, in bytes: with two keys, as a listing's `prefix`
    /// and `after`, and every byte of them percent-encoded.
    pub fn request_line_bytes(&self) -> usize {
        2 * 3 * self.key_bytes_max + REQUEST_LINE_BYTES_BESIDE_KEYS
    }
}

/// Answers clients.
#[derive(Debug)]
pub struct Api<B: Backend> {
    backend: B,
    limits: Limits,
    metrics: Arc<Metrics>,
}

/// State of one connection.
#[derive(Debug)]
pub struct Session<S> {
    /// The backend's.
    backend: S,
    /// When the head of the request that is being answered was here.
    began: Instant,
}

impl<B: Backend> Api<B> {
    /// The API of the node behind `backend`, which counts the requests among `metrics`.
    pub fn new(backend: B, limits: Limits, metrics: Arc<Metrics>) -> Self {
        Api { backend, limits, metrics }
    }

    fn deadline(&self) -> Instant {
        Instant::now() + self.limits.request_timeout
    }

    fn dispatch(
        &self,
        session: &mut B::Session,
        head: &Head<'_>,
        request: Request<'_>,
        body: &[u8],
    ) -> Result<Response, Problem> {
        match request {
            Request::GetKey { key, query, condition } => match query.after_index {
                None => self.get_key(session, &key, query.consistency, &condition),
                Some(index) => self.wait_for_key(session, head, (&key, index), &query, &condition),
            },
            Request::PutKey { key, condition, idempotency_key } => {
                self.put_key(session, &key, body, &condition, idempotency_key)
            }
            Request::DeleteKey { key, condition, idempotency_key } => {
                self.delete_key(session, &key, condition, idempotency_key)
            }
            Request::ListKeys { query } => match query.after_index {
                None => self.list_keys(session, &query),
                Some(index) => self.wait_for_changes(session, head, index, &query),
            },
            Request::Options { allow } => Ok(answer::options(allow)),
            Request::Status => self.status(),
            Request::Live => self.live(),
            Request::Ready => self.ready(session),
            Request::Describe => Ok(answer::json_text(DESCRIPTION)),
            Request::Metrics => Ok(self.metrics()),
            Request::Members => self.members(session),
            Request::ReplaceMembers => self.replace_members(body),
            Request::AddMember { id, voter } => self.add_member(id, voter, body),
            Request::RemoveMember { id } => self.remove_member(id),
            Request::TransferLeader => self.transfer_leader(body),
            Request::Snapshot => self.snapshot(),
        }
    }
}

impl<B: Backend> Service for Api<B> {
    type Session = Session<B::Session>;

    fn session(&self, _peer: SocketAddr) -> Self::Session {
        Session { backend: self.backend.session(), began: Instant::now() }
    }

    fn admit(&self, session: &mut Self::Session, head: &Head<'_>) -> Admission {
        session.began = Instant::now();
        if matches!(head.method(), Method::Get | Method::Head | Method::Delete) {
            // There is no body to wait for, so what is wrong can as well be said in `answer`.
            return Admission::Buffer(0);
        }
        let refuse = |problem: Problem| {
            let took = Some(session.began.elapsed());
            self.metrics.requests.answered(Some(head.method()), problem.status(), Consistency::None, took);
            Admission::Answer(answer::problem(&problem, is_write(head.method())))
        };
        let body_bytes_max = match Request::parse(head, &self.limits) {
            Ok(request) => request.body_bytes_max(&self.limits),
            Err(problem) => return refuse(problem),
        };
        if head.content_length().is_some_and(|bytes| bytes > body_bytes_max as u64) {
            return refuse(Problem::new(413, format!("the body is longer than {body_bytes_max} bytes")));
        }
        // A chunked body shows its length only as it is read.
        Admission::Buffer(body_bytes_max)
    }

    fn answer(&self, session: &mut Self::Session, head: &Head<'_>, body: Body<'_>) -> Response {
        let Body::Buffered(body) = body else { unreachable!("no request is admitted with a streamed body") };
        let request = Request::parse(head, &self.limits);
        let (consistency, waits) = request.as_ref().map_or((Consistency::None, false), Request::reading);
        let response = request
            .and_then(|request| self.dispatch(&mut session.backend, head, request, &body))
            .unwrap_or_else(|problem| answer::problem(&problem, is_write(head.method())));
        let took = (!waits).then(|| session.began.elapsed());
        self.metrics.requests.answered(Some(head.method()), response.status_code().0, consistency, took);
        response
    }

    fn fault(&self, status: StatusCode, detail: &str) -> Response {
        // The server refuses before the request gets here, whatever it was: if it was a write, it was not applied.
        self.metrics.requests.answered(None, status.0, Consistency::None, None);
        answer::problem(&Problem::new(status.0, detail.to_owned()), true)
    }
}
