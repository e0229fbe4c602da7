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

use crate::http::{self, Admission, Begun, Body, Caller, Head, Method, Response, Service, StatusCode};
use crate::message::{ANSWER_GRACE, Ask, Backend, ClientRequest, Refusal, Reply, ReplyTo, STALE_READ_TIMEOUT};
use crate::metrics::{self, Metrics};

use self::keys::Waiting;
use self::problem::Problem;
use self::request::{Request, is_write};
use self::target::Consistency;

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
    /// The limits of the server in front of the API.
    pub fn server(&self) -> http::Limits {
        let defaults = http::Limits::default();
        // The longest request line that a client may have reason to send: with two keys, as a listing's `prefix` and
        // `after`, and every byte of them percent-encoded.
        let request_line_bytes = 2 * 3 * self.key_bytes_max + REQUEST_LINE_BYTES_BESIDE_KEYS;
        http::Limits {
            request_line_bytes: defaults.request_line_bytes.max(request_line_bytes),
            gathered_bytes: defaults.gathered_bytes.min(self.value_bytes_max as u64),
            ..defaults
        }
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

/// What is kept of a request that waits for its reply.
pub struct Pending {
    waiting: Waiting,
    method: Method,
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

    /// Ends a request of an event loop. Without a reply the node did not answer in time.
    fn answer_waiting(&self, waiting: Waiting, reply: Option<Reply>) -> Response {
        match (waiting, reply) {
            (Waiting::Write { repeatable }, reply) => keys::answer_waiting_write(repeatable, reply),
            (Waiting::Read { key, condition, .. }, Some(Reply::Read(Ok(version)))) => {
                keys::answer_read(&version, &key, &condition)
            }
            // The applier is busy, stuck or gone. A version as new as what this node has answered is a stale read.
            (Waiting::Read { key, condition, stale: true }, _) => match self.backend.newest() {
                Some(version) => keys::answer_read(&version, &key, &condition),
                None => answer::problem(&Refusal::APPLIER_STUCK.into(), false),
            },
            (Waiting::Read { .. }, Some(Reply::Read(Err(refusal)))) => answer::problem(&refusal.into(), false),
            (Waiting::Read { .. }, Some(_)) => unreachable!("a read is answered as a read"),
            (Waiting::Read { .. }, None) => answer::problem(&Refusal::NoLeader.into(), false),
        }
    }

    /// Counts a request that was answered; `took` is `None` if waiting was what it asked for.
    fn count(&self, method: &Method, response: &Response, consistency: metrics::Consistency, took: Option<Duration>) {
        self.metrics.requests.answered(Some(method), response.status_code().0, consistency, took);
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
    type Turn = Vec<ClientRequest>;
    type Pending = Pending;
    type Reply = Reply;

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
            let response = answer::problem(&problem, is_write(head.method()));
            self.count(head.method(), &response, metrics::Consistency::None, took);
            Admission::Answer(response)
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
        let (consistency, waits) = request.as_ref().map_or((metrics::Consistency::None, false), Request::reading);
        let response = request
            .and_then(|request| self.dispatch(&mut session.backend, head, request, &body))
            .unwrap_or_else(|problem| answer::problem(&problem, is_write(head.method())));
        let took = (!waits).then(|| session.began.elapsed());
        self.count(head.method(), &response, consistency, took);
        response
    }

    fn begin(
        &self,
        turn: &mut Vec<ClientRequest>,
        head: &Head<'_>,
        body: &[u8],
        caller: Caller<Reply>,
        now: Instant,
    ) -> Begun<Pending> {
        // What is wrong with a request is said in one place, on a thread.
        let Ok(request) = Request::parse(head, &self.limits) else { return Begun::ForThread };
        if body.len() > request.body_bytes_max(&self.limits) {
            return Begun::ForThread;
        }
        let (waiting, ask) = match request {
            Request::GetKey { key, query, condition } if query.after_index.is_none() => {
                let stale = query.consistency == Consistency::Stale;
                if stale && let Some(version) = self.backend.newest() {
                    let response = keys::answer_read(&version, &key, &condition);
                    self.count(head.method(), &response, metrics::Consistency::Stale, Some(now.elapsed()));
                    return Begun::Answered(response);
                }
                let ask = if stale { Ask::StaleRead } else { Ask::Read };
                (Waiting::Read { key: key.into_owned(), condition, stale }, ask)
            }
            Request::PutKey { key, condition, idempotency_key } => {
                let (command, repeatable) = keys::put_command(&key, body, &condition, idempotency_key);
                (Waiting::Write { repeatable }, Ask::Write(command.into()))
            }
            Request::DeleteKey { key, condition, idempotency_key } => {
                let (command, repeatable) = keys::delete_command(&key, condition, idempotency_key);
                (Waiting::Write { repeatable }, Ask::Write(command.into()))
            }
            _ => return Begun::ForThread,
        };
        let (patience, grace) = match ask {
            Ask::StaleRead => (STALE_READ_TIMEOUT, Duration::ZERO),
            Ask::Write(_) | Ask::Read => (self.limits.request_timeout, ANSWER_GRACE),
        };
        let deadline = now + patience;
        turn.push(ClientRequest { ask, deadline, reply: ReplyTo::Loop(caller) });
        let pending = Pending { waiting, method: head.method().clone(), began: now };
        Begun::Waits(pending, deadline + grace)
    }

    fn submit(&self, turn: &mut Vec<ClientRequest>) {
        self.backend.submit(turn);
    }

    fn finish(&self, pending: Pending, reply: Option<Reply>, now: Instant) -> Response {
        let Pending { waiting, method, began } = pending;
        let consistency = match waiting {
            Waiting::Read { stale: true, .. } => metrics::Consistency::Stale,
            Waiting::Read { stale: false, .. } => metrics::Consistency::Linearizable,
            Waiting::Write { .. } => metrics::Consistency::None,
        };
        let response = self.answer_waiting(waiting, reply);
        self.count(&method, &response, consistency, Some(now.saturating_duration_since(began)));
        response
    }

    fn fault(&self, status: StatusCode, detail: &str) -> Response {
        // The server refuses before the request gets here, whatever it was: if it was a write, it was not applied.
        self.metrics.requests.answered(None, status.0, metrics::Consistency::None, None);
        answer::problem(&Problem::new(status.0, detail.to_owned()), true)
    }
}
