//! Any requests to the API of a node that is made of a state machine alone: each is refused as documented and without a
//! trace, or means what a simple reading of it says.

use std::borrow::Cow;
use std::collections::VecDeque;
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::{Arc, LazyLock, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use bytes::Bytes;
use raftexample::api::{Api, Limits};
use raftexample::command::{Command, RequestId};
use raftexample::http::{self, Admission, Body, Head, OfflineConnection, Response, Service, Taking};
use raftexample::membership::Membership;
use raftexample::message::{
    AdminReply, AdminRequest, Backend, ClientRequest, Refusal, SnapshotInfo, Status, WriteReply,
};
use raftexample::metrics::Metrics;
use raftexample::store::{Applied, StateMachine, Version};
use raftexample::watch::Watchers;
use std::io::Read;

use crate::choices::Choices;

const LIMITS: Limits = Limits { key_bytes_max: 40, value_bytes_max: 200, request_timeout: Duration::from_secs(1) };

/// Of a request line: so few that inputs go beyond.
const REQUEST_LINE_BYTES: usize = 1264;

/// Requests of one connection that are looked at.
const REQUESTS_MAX: usize = 12;

static METRICS: LazyLock<Arc<Metrics>> = LazyLock::new(|| Arc::new(Metrics::new()));

pub fn run(input: &[u8]) {
    let mut choices = Choices::new(input);
    let faults = (0..4).map(|_| choices.byte()).collect();
    let node = Arc::new(Fake::new(faults));
    let api = Api::new(Shared(node.clone()), LIMITS, METRICS.clone());
    let mut session = api.session(SocketAddr::from((Ipv4Addr::LOCALHOST, 1)));
    let mut connection = OfflineConnection::new(choices.rest());
    let limits = http::Limits { request_line_bytes: REQUEST_LINE_BYTES, ..LIMITS.server() };
    for _ in 0..REQUESTS_MAX {
        let answered = connection.next(&limits, Taking::Whole(1000), |head, body| {
            let Ok(body) = body else { return false };
            let before = node.state().calls.len();
            let response = match api.admit(&mut session, head) {
                Admission::Answer(response) => response,
                Admission::Buffer(bytes_max) if body.len() > bytes_max => return false,
                Admission::Buffer(_) => api.answer(&mut session, head, Body::Buffered(Cow::Borrowed(&body))),
                Admission::Stream => panic!("no request of the API is a stream"),
            };
            let calls = node.state().calls[before..].to_vec();
            check(&node, head, &body, response, &calls);
            true
        });
        if !matches!(answered, Ok(Some(true))) {
            return;
        }
    }
}

/// What reached the node.
#[derive(Clone, Debug, PartialEq)]
enum Call {
    Write(Command),
    Admin(AdminRequest),
    Snapshot,
}

fn check(node: &Fake, head: &Head<'_>, body: &[u8], response: Response, calls: &[Call]) {
    let status = response.status_code().0;
    let field = |name: &'static str| {
        let mut values = response.headers().iter().filter(|header| header.field.equiv(name));
        let value = values.next().map(|header| header.value.to_string());
        assert!(values.next().is_none(), "{name} is repeated");
        value
    };
    let (etag, content_type, allow) = (field("ETag"), field("Content-Type"), field("Allow"));
    assert!(response.headers().iter().all(|header| !header.value.as_bytes().contains(&b'\n')));
    let is_temporary = field("Retry-After").is_some();
    let mut answer = Vec::new();
    response.into_reader().read_to_end(&mut answer).expect("it is in memory");
    let method = head.method().as_str();
    let what = format!("{method} {}: {status} {}", head.target().escape_ascii(), answer.escape_ascii());

    const STATUSES: [u16; 16] = [200, 204, 304, 400, 404, 405, 409, 410, 412, 413, 414, 422, 501, 503, 504, 507];
    assert!(STATUSES.contains(&status), "{what}");
    assert_eq!(is_temporary, status == 503, "{what}");
    assert_eq!(allow.is_some(), status == 405 || (method == "OPTIONS" && status == 204), "{what}");
    assert!(calls.len() <= 1, "{what} called {calls:?}");
    if status >= 400 {
        assert_eq!(content_type.as_deref(), Some("application/problem+json"), "{what}");
        let problem: serde_json::Value = serde_json::from_slice(&answer).unwrap_or_else(|_| panic!("{what}"));
        assert_eq!(problem["status"], status, "{what}");
        assert!(problem["title"].is_string() && problem["detail"].is_string(), "{what}");
        let is_write = !matches!(method, "GET" | "HEAD" | "OPTIONS" | "TRACE");
        let outcome = problem.get("outcome").and_then(serde_json::Value::as_str);
        assert!(is_write || outcome.is_none(), "{what}");
        assert!(
            outcome.is_none_or(|outcome| outcome == if status == 504 { "unknown" } else { "not-applied" }),
            "{what}"
        );
        // Who is told that a request is wrong must be able to rely on its not having been tried.
        let is_refused_unseen = matches!(status, 405 | 413 | 414 | 501);
        assert!(!is_refused_unseen || calls.is_empty(), "{what} called {calls:?}");
    }
    let path = head.target().split(|byte| *byte == b'?').next().unwrap_or_default();
    let key = percent_decode(path.strip_prefix(b"/").unwrap_or(path));
    let Some(key) = key else {
        assert!(status == 400 && calls.is_empty() || head.target() == b"*", "{what}");
        return;
    };
    if key.is_empty() || key.starts_with(b"_/") || head.target() == b"*" {
        assert!(!calls.iter().any(|call| matches!(call, Call::Write(_))), "{what} called {calls:?}");
        if key.is_empty() && status == 200 && method == "GET" {
            check_listing(node, &answer, &what);
        }
        return;
    }
    assert!(key.len() <= LIMITS.key_bytes_max || status == 414, "{what}");
    match (method, calls) {
        ("PUT", [Call::Write(Command::Put { key: put, value, .. })]) => {
            assert!(*put == key && *value == body && body.len() <= LIMITS.value_bytes_max, "{what} called {calls:?}");
            assert_eq!(status == 204, etag.is_some() && status != 412, "{what}");
        }
        ("DELETE", [Call::Write(Command::Delete { key: deleted, .. })]) => assert_eq!(*deleted, key, "{what}"),
        (_, []) => assert!(!matches!((method, status), ("PUT" | "DELETE", 200 | 204)), "{what}"),
        (_, calls) => panic!("{what} called {calls:?}"),
    }
    if matches!(method, "GET" | "HEAD") {
        let item = node.state().machine.version().get(&key);
        match status {
            200 => {
                let item = item.unwrap_or_else(|| panic!("{what}"));
                assert!(item.value() == answer && etag == Some(format!("\"{}\"", item.etag())), "{what}");
            }
            404 => assert!(item.is_none(), "{what}"),
            412 => assert!(item.is_some() && head.get("If-Match").is_some(), "{what}"),
            304 => {
                let query = head.target().windows(11).any(|bytes| bytes == b"after-index" || bytes.contains(&b'%'));
                assert!(head.get("If-None-Match").is_some() || query, "{what}");
            }
            _ => assert!(matches!(status, 400 | 410 | 414 | 503), "{what}"),
        }
    }
}

fn check_listing(node: &Fake, answer: &[u8], what: &str) {
    let page: serde_json::Value = serde_json::from_slice(answer).unwrap_or_else(|_| panic!("{what}"));
    let version = node.state().machine.version();
    let Some(keys) = page.get("keys") else {
        assert!(page["changes"].is_array() && page["index"].is_u64(), "{what}");
        return;
    };
    let mut before = Vec::new();
    for item in keys.as_array().unwrap_or_else(|| panic!("{what}")) {
        let key =
            item["key"].as_str().and_then(|key| percent_decode(key.as_bytes())).unwrap_or_else(|| panic!("{what}"));
        let found = version.get(&key).unwrap_or_else(|| panic!("{what}"));
        assert!(key > before && item["size"] == found.value().len(), "{what}");
        before = key;
    }
}

/// Decodes as RFC 3986 says; `None` if that is not possible.
fn percent_decode(bytes: &[u8]) -> Option<Vec<u8>> {
    let mut decoded = Vec::new();
    let mut rest: VecDeque<u8> = bytes.iter().copied().collect();
    while let Some(byte) = rest.pop_front() {
        if byte == b'%' {
            let digits = [rest.pop_front()?, rest.pop_front()?];
            if !digits.iter().all(u8::is_ascii_hexdigit) {
                return None;
            }
            decoded.push(u8::from_str_radix(std::str::from_utf8(&digits).ok()?, 16).ok()?);
        } else {
            decoded.push(byte);
        }
    }
    Some(decoded)
}

struct State {
    machine: StateMachine,
    calls: Vec<Call>,
    /// What goes wrong, in turn.
    faults: VecDeque<u8>,
}

/// A node without Raft.
struct Fake {
    state: Mutex<State>,
    watchers: Watchers,
}

#[derive(Clone)]
struct Shared(Arc<Fake>);

impl Fake {
    fn new(faults: VecDeque<u8>) -> Fake {
        let mut machine = StateMachine::new();
        machine.advance(1, 1);
        let watchers = Watchers::new();
        // Nobody waits: there is nobody else who could change anything.
        watchers.stop();
        Fake { state: Mutex::new(State { machine, calls: Vec::new(), faults }), watchers }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn fault(&self) -> Option<Refusal> {
        match self.state().faults.pop_front() {
            Some(200..=209) => Some(Refusal::NoLeader),
            Some(210..=219) => Some(Refusal::Overloaded("busy")),
            Some(220..=229) => Some(Refusal::Stopping),
            _ => None,
        }
    }

    fn version(&self) -> Arc<Version> {
        Arc::new(self.state().machine.version())
    }
}

impl Backend for Shared {
    type Session = ();

    fn session(&self) {}

    fn submit(&self, _requests: &mut Vec<ClientRequest>) {}

    fn write(&self, _session: &mut (), command: Bytes, _deadline: Instant) -> WriteReply {
        let decoded = Command::decode(&command).expect("the API makes commands");
        let fault = self.0.fault();
        let mut state = self.0.state();
        state.calls.push(Call::Write(decoded.clone()));
        match (fault, state.faults.front()) {
            (Some(refusal), _) => return WriteReply::NotApplied(refusal),
            (None, Some(240..=244)) => return WriteReply::NotApplied(Refusal::Full("full".to_owned())),
            (None, Some(245..=249)) => return WriteReply::Unknown("who knows"),
            _ => {}
        }
        let index = state.machine.applied_index() + 1;
        let id = RequestId { node: 1, boot: 1, sequence: index };
        match state.machine.apply(index, 1, id, &decoded) {
            Applied::First(outcome) => WriteReply::Applied(outcome),
            other => panic!("{other:?}"),
        }
    }

    fn read(&self, _session: &mut (), _deadline: Instant) -> Result<Arc<Version>, Refusal> {
        self.0.fault().map_or_else(|| Ok(self.0.version()), Err)
    }

    fn stale(&self) -> Result<Arc<Version>, Refusal> {
        Ok(self.0.version())
    }

    fn newest(&self) -> Option<Arc<Version>> {
        Some(self.0.version())
    }

    fn applied(&self) -> (u64, u64) {
        let version = self.0.version();
        (version.applied_index(), version.keys() as u64)
    }

    fn status(&self, _deadline: Instant) -> Result<Status, Refusal> {
        Ok(Status {
            id: 1,
            role: "leader",
            leader: 1,
            term: 1,
            commit_index: 1,
            first_index: 1,
            last_index: 1,
            snapshot_index: 1,
            membership: Arc::new(Membership::founding([(1, "http://127.0.0.1:12381".to_owned())])),
            progress: Vec::new(),
            change: None,
        })
    }

    fn live(&self) -> Result<(), &'static str> {
        Ok(())
    }

    fn admin(&self, request: AdminRequest, _deadline: Instant) -> AdminReply {
        self.0.state().calls.push(Call::Admin(request));
        match self.0.fault() {
            Some(_) => AdminReply::Refused(Refusal::Conflict("no".to_owned())),
            None => AdminReply::Done(Arc::new(Membership::default())),
        }
    }

    fn snapshot(&self, _deadline: Instant) -> Result<SnapshotInfo, Refusal> {
        self.0.state().calls.push(Call::Snapshot);
        Ok(SnapshotInfo { index: 1, bytes: 1 })
    }

    fn watchers(&self) -> &Watchers {
        &self.0.watchers
    }

    fn uptime(&self) -> Duration {
        Duration::ZERO
    }
}
