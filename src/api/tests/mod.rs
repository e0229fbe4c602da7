//! The API over real sockets: a server on a free port, in front of a state machine without a cluster.

mod fake;
mod client;
mod description;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::{Duration, Instant};

use proptest::prelude::*;
use serde_json::{Value, json};

use crate::http::{EventLoop, Handle, Limits as HttpLimits, Listener};
use crate::message::{AdminReply, AdminRequest, Refusal, WriteReply};
use crate::metrics::Metrics;
use crate::store::CHANGES_MAX;

use self::client::{Answer, Client};
use self::fake::{Fake, PATIENCE};
use super::target::parameters;
use super::{Api, Limits};

const LIMITS: Limits = Limits { key_bytes_max: 32, value_bytes_max: 1000, request_timeout: Duration::from_secs(5) };

/// A served API, the backend behind it, and a connection to it.
struct Server {
    backend: Arc<Fake>,
    client: Client,
    handle: Handle,
}

impl Server {
    fn start() -> Self {
        Self::start_within(LIMITS.server())
    }

    fn start_within(limits: HttpLimits) -> Self {
        Self::start_with(limits, 1)
    }

    fn start_with(limits: HttpLimits, event_loops: usize) -> Self {
        let backend = Arc::new(Fake::new());
        let api = Arc::new(Api::new(Arc::clone(&backend), LIMITS, Arc::new(Metrics::new())));
        let listener = Listener::bind("127.0.0.1:0").expect("a free port");
        let event_loops = (0..event_loops).map(|_| EventLoop::new(limits.connections).expect("a descriptor")).collect();
        let handle = listener.serve_in_loops(api, limits, "api", event_loops).expect("a thread");
        let client = Client::new(handle.local_addr());
        Server { backend, client, handle }
    }

    fn another_client(&self) -> Client {
        Client::new(self.handle.local_addr())
    }

    /// `request` is a method and a target, `fields` are header lines.
    fn send(&mut self, request: &str, fields: &[&str], body: &[u8]) -> Answer {
        self.client.send(request, fields, body)
    }

    fn get(&mut self, target: &str) -> Answer {
        self.send(&format!("GET {target}"), &[], b"")
    }

    /// Writes a key and returns its entity tag.
    fn put(&mut self, target: &str, value: &[u8]) -> String {
        let answer = self.send(&format!("PUT {target}"), &[], value);
        assert_eq!(answer.status, 204, "PUT {target}: {answer:?}");
        answer.field("ETag").expect("an entity tag").to_owned()
    }
}

/// What an event loop begins itself and what a thread does gets the same answer, byte for byte.
#[test]
fn event_loops_and_threads_answer_alike() {
    let requests: &[(&str, &[&str], &[u8])] = &[
        ("PUT /k", &[], b"value"),
        ("GET /k", &[], b""),
        ("HEAD /k", &[], b""),
        ("GET /k?consistency=stale", &[], b""),
        ("HEAD /k?consistency=stale", &[], b""),
        ("GET /absent", &[], b""),
        ("GET /absent?consistency=stale", &[], b""),
        ("GET /k", &["If-None-Match: \"1\""], b""),
        ("GET /k", &["If-Match: \"7\""], b""),
        ("PUT /k", &["If-None-Match: *"], b"other"),
        ("PUT /k", &["If-Match: \"1\""], b"other"),
        ("PUT /token", &["Idempotency-Key: a"], b"1"),
        ("PUT /token", &["Idempotency-Key: a"], b"1"),
        ("PUT /token", &["Idempotency-Key: a"], b"2"),
        ("DELETE /k", &[], b""),
        ("DELETE /k", &[], b""),
        ("DELETE /token", &["Idempotency-Key: b"], b""),
        ("GET /k", &[], b"a body"),
        ("PUT /k", &["If-Match: unquoted"], b"x"),
        ("PUT /k", &["Idempotency-Key: "], b"x"),
        ("GET /k?unknown=1", &[], b""),
        ("POST /k", &[], b""),
        ("OPTIONS /k", &[], b""),
        ("GET /?limit=1", &[], b""),
        ("PUT /%zz", &[], b"x"),
        ("GET /_/nothing", &[], b""),
    ];
    let (in_loops, in_threads) =
        (Server::start_with(HttpLimits::default(), 1), Server::start_with(HttpLimits::default(), 0));
    for refused in [false, true] {
        if refused {
            for server in [&in_loops, &in_threads] {
                server.backend.refuse_reads(Some(Refusal::NoLeader));
                server.backend.answer_writes(WriteReply::Unknown("it was handed over"));
            }
        }
        for (request, fields, body) in requests {
            // A new connection for each: one that needed a thread would keep it.
            let [in_loop, in_thread] = [&in_loops, &in_threads].map(|server| {
                let mut answer = server.another_client().send(request, fields, body);
                answer.fields.retain(|(name, _)| !name.eq_ignore_ascii_case("Date"));
                format!("{answer:?}")
            });
            assert_eq!(in_loop, in_thread, "{request} {fields:?}");
        }
    }
}

/// Every status that [`description`] says an operation has, from a server of its own where the state matters. (That no
/// answer has one that it does not say, every test here checks.)
#[test]
fn every_documented_status_is_produced() {
    let documented: BTreeSet<_> = description::operations()
        .iter()
        .flat_map(|operation| operation.statuses().into_iter().map(|status| (operation.id(), status)))
        .collect();
    assert!(documented.len() > 100, "{documented:?}");
    let mut seen = BTreeSet::new();
    for operation in description::operations() {
        seen.extend(statuses_of_http(&operation));
    }
    seen.extend(statuses_of_keys());
    seen.extend(statuses_of_the_node());
    seen.extend(statuses_of_a_full_server());
    let missing: Vec<_> = documented.difference(&seen).collect();
    assert!(missing.is_empty(), "documented, and produced by no test: {missing:?}");
}

type Seen = BTreeSet<(&'static str, u16)>;

/// What is wrong with a request whatever it asks for.
fn statuses_of_http(operation: &description::Operation) -> Seen {
    let server = Server::start_within(HttpLimits { head_timeout: Duration::from_millis(20), ..HttpLimits::default() });
    let target = operation.path.replace("{key}", "k").replace("{id}", "4");
    let line = format!("{} {target}", operation.method);
    let many = "X: y\r\n".repeat(101);
    let long = "x".repeat(20_000);
    let mut seen = Seen::new();
    for (raw, status) in [
        (format!("{line}?no-such-parameter=1 HTTP/1.1\r\nHost: a\r\n\r\n"), 400),
        (format!("{line} HTTP/1.1\r\n"), 408),
        (format!("{line} HTTP/1.1\r\nHost: a\r\nContent-Length: 1000000000\r\n\r\n"), 413),
        (format!("{line}?{long} HTTP/1.1\r\nHost: a\r\n\r\n"), 414),
        (format!("{line} HTTP/1.1\r\nHost: a\r\nExpect: magic\r\nContent-Length: 1\r\n\r\n"), 417),
        (format!("{line} HTTP/1.1\r\nHost: a\r\n{many}\r\n"), 431),
        (format!("{line} HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: gzip\r\n\r\n"), 501),
        (format!("{line} HTTP/2.0\r\nHost: a\r\n\r\n"), 505),
    ] {
        let mut client = server.another_client();
        let answer = client.send_raw(raw.as_bytes(), false);
        problem(&answer, status);
        seen.append(&mut client.seen);
    }
    seen
}

/// Sends requests without a body, each with at most one header line, and asserts their statuses.
fn send_all(server: &mut Server, cases: &[(&str, &str, u16)]) {
    for (request, field, status) in cases {
        let fields: Vec<_> = Some(*field).filter(|field| !field.is_empty()).into_iter().collect();
        let answer = server.send(request, &fields, b"");
        assert_eq!(answer.status, *status, "{request} {field}: {answer:?}");
    }
}

fn statuses_of_keys() -> Seen {
    let mut server = Server::start();
    send_all(
        &mut server,
        &[
            ("PUT /k", "Idempotency-Key: a", 204),
            ("PUT /k", "If-None-Match: *", 412),
            ("PUT /other", "Idempotency-Key: a", 422),
            ("GET /", "", 200),
            ("GET /k", "", 200),
            ("GET /k", "If-None-Match: *", 304),
            ("GET /k", "If-Match: \"4711\"", 412),
            ("GET /nothing", "", 404),
            ("DELETE /k", "Idempotency-Key: a", 422),
            ("DELETE /k", "", 204),
            ("DELETE /k", "", 404),
            ("DELETE /k", "If-Match: *", 412),
        ],
    );
    server.backend.write_often(b"other", CHANGES_MAX + 2);
    send_all(&mut server, &[("GET /?after-index=0", "", 410), ("GET /k?after-index=0", "", 410)]);
    server.backend.refuse_reads(Some(Refusal::NoLeader));
    send_all(&mut server, &[("GET /", "", 503), ("GET /k", "", 503)]);
    server.backend.answer_writes(WriteReply::NotApplied(Refusal::NoLeader));
    send_all(&mut server, &[("PUT /k", "", 503), ("DELETE /k", "", 503)]);
    server.backend.answer_writes(WriteReply::Unknown("the deadline has passed"));
    send_all(&mut server, &[("PUT /k", "", 504), ("DELETE /k", "", 504)]);
    server.backend.answer_writes(WriteReply::NotApplied(Refusal::Full("the store holds all it may".to_owned())));
    send_all(&mut server, &[("PUT /k", "", 507)]);
    std::mem::take(&mut server.client.seen)
}

fn statuses_of_the_node() -> Seen {
    let mut server = Server::start();
    let reports = ["status", "livez", "readyz", "openapi.json", "metrics", "members"];
    for report in reports {
        assert_eq!(server.get(&format!("/_/{report}")).status, 200, "{report}");
    }
    assert_eq!(server.send("POST /_/snapshot", &[], b"").status, 200);
    let changes = [
        ("PUT /_/members", "[]", 200),
        ("PUT /_/members/4", "http://127.0.0.1:42379", 204),
        ("DELETE /_/members/4", "", 204),
        ("PUT /_/leader", "1", 204),
    ];
    let refused = |refusal| AdminReply::Refused(refusal);
    for (reply, refusal) in [
        (None, None),
        (Some(refused(Refusal::Conflict("another change is in progress".to_owned()))), Some(409)),
        (Some(refused(Refusal::NoLeader)), Some(503)),
        (Some(AdminReply::Unknown("the leader changed")), Some(504)),
    ] {
        if let Some(reply) = reply {
            server.backend.answer_admin(reply);
        }
        for (request, body, success) in changes {
            assert_eq!(server.send(request, &[], body.as_bytes()).status, refusal.unwrap_or(success), "{request}");
        }
    }
    server.backend.refuse_reads(Some(Refusal::NoLeader));
    server.backend.stall("driver");
    server.backend.refuse_snapshots(Refusal::Overloaded("another snapshot is being written"));
    send_all(
        &mut server,
        &[
            ("GET /_/status", "", 503),
            ("GET /_/livez", "", 503),
            ("GET /_/readyz", "", 503),
            ("GET /_/members", "", 503),
            ("POST /_/snapshot", "", 503),
        ],
    );
    server.backend.refuse_snapshots(Refusal::Full("failed to write the snapshot: no space left on device".to_owned()));
    send_all(&mut server, &[("POST /_/snapshot", "", 507)]);
    std::mem::take(&mut server.client.seen)
}

/// What even those requests get that ask nobody, when there are too many connections.
fn statuses_of_a_full_server() -> Seen {
    let mut server = Server::start_within(HttpLimits { connections: 1, ..HttpLimits::default() });
    assert_eq!(server.get("/_/openapi.json").status, 200);
    let mut seen = Seen::new();
    for report in ["openapi.json", "metrics"] {
        let mut client = server.another_client();
        // It is answered before it is sent.
        problem(&client.receive(format!("GET /_/{report} HTTP/1.1\r\n").as_bytes(), false), 503);
        seen.append(&mut client.seen);
    }
    seen
}

#[test]
fn the_description_is_that_of_this_program() {
    let mut server = Server::start();
    let answer = server.get("/_/openapi.json");
    assert_eq!((answer.status, answer.field("Content-Type")), (200, Some("application/json")));
    let document = answer.json();
    assert_eq!(document["openapi"], "3.1.0");
    assert_eq!(document["info"]["version"], env!("CARGO_PKG_VERSION"));
    let mut methods: BTreeMap<&str, BTreeSet<&str>> = BTreeMap::new();
    for operation in description::operations() {
        let methods = methods.entry(operation.path).or_insert_with(|| ["OPTIONS"].into());
        methods.insert(operation.method);
        if operation.method == "GET" {
            methods.insert("HEAD");
        }
        let taken = match (operation.path, operation.method) {
            ("/", _) => parameters::KEYS,
            ("/{key}", "GET") => parameters::KEY,
            ("/_/members/{id}", "PUT") => parameters::MEMBER,
            _ => parameters::NONE,
        };
        assert_eq!(operation.parameters("query"), taken.iter().copied().collect(), "{}", operation.id());
        let conditions = ["If-Match", "If-None-Match"];
        let headers = match (operation.path, operation.method) {
            ("/{key}", "GET") => &conditions[..],
            ("/{key}", _) => &["If-Match", "If-None-Match", "Idempotency-Key"],
            _ => &[],
        };
        assert_eq!(operation.parameters("header"), headers.iter().copied().collect(), "{}", operation.id());
    }
    for (path, methods) in methods {
        let target = path.replace("{key}", "k").replace("{id}", "4");
        let answer = server.send(&format!("OPTIONS {target}"), &[], b"");
        let allowed: BTreeSet<_> = answer.field("Allow").expect("the methods").split(", ").collect();
        assert_eq!(methods, allowed, "left: described, right: answered for {path}");
    }
}

/// Asserts that an answer is a problem document, and returns it.
fn problem(answer: &Answer, status: u16) -> Value {
    assert_eq!(answer.status, status, "{answer:?}");
    assert_eq!(answer.field("Content-Type"), Some("application/problem+json"), "{answer:?}");
    let document = answer.json();
    assert_eq!(document["status"], status);
    assert!(document["title"].as_str().is_some_and(|title| !title.is_empty()), "{document}");
    assert!(document["detail"].as_str().is_some_and(|detail| !detail.is_empty()), "{document}");
    assert_eq!(answer.field("Retry-After").is_some(), status == 503, "{answer:?}");
    document
}

#[test]
fn a_key_lives_and_dies() {
    let mut server = Server::start();
    assert_eq!(server.get("/k").status, 404);
    let first = server.put("/k", b"one");
    let second = server.put("/k", b"\x00\xfftwo");
    assert_ne!(first, second);
    let index = second.trim_matches('"').to_owned();
    let answer = server.get("/k");
    assert_eq!((answer.status, &*answer.body), (200, &b"\x00\xfftwo"[..]));
    assert_eq!(answer.field("ETag"), Some(&*second));
    assert_eq!(answer.field("Raftexample-Index"), Some(&*index));
    assert_eq!(answer.field("Content-Type"), Some("application/octet-stream"));
    assert_eq!(answer.field("Content-Length"), Some("5"));
    assert_eq!(answer.field("Cache-Control"), Some("no-cache"));
    let answer = server.send("DELETE /k", &[], b"");
    assert_eq!((answer.status, answer.body.len(), answer.field("ETag")), (204, 0, None));
    let document = problem(&server.get("/k"), 404);
    assert!(document.get("outcome").is_none(), "a read has no outcome");
    let document = problem(&server.send("DELETE /k", &[], b""), 404);
    assert_eq!(document["outcome"], "not-applied");
    let empty = server.put("/k", b"");
    let answer = server.get("/k");
    assert_eq!((answer.status, answer.body.len(), answer.field("ETag")), (200, 0, Some(&*empty)));
}

#[test]
fn keys_are_any_bytes() {
    // Written under the first name, read under the others, listed under the last.
    let cases: &[&[&str]] = &[
        &["/%00%FF", "/%00%ff", "/%00%FF"],
        &["/%2e%2e/", "/../", "/../"],
        &["/./a", "/%2E/a", "/./a"],
        &["//", "/%2F", "//"],
        &["//_/x", "/%2f%5f%2fx", "//_/x"],
        &["/a//b", "/a%2F%2Fb", "/a//b"],
        &["/a+b", "/a%2Bb", "/a%2Bb"],
        &["/a%20b", "/a%20b"],
        &["/%3Fx=1", "/%3fx%3D1", "/%3Fx%3D1"],
        &["/%2525", "/%2525"],
        &["/_", "/%5F", "/_"],
        &["/__/x", "/_%5f/x", "/__/x"],
        &["/caf\u{e9}", "/caf%C3%A9"],
        &["/~-.*", "/~-.%2A"],
        &["/0123456789012345678901234567890_", "/0123456789012345678901234567890%5F"],
    ];
    for names in cases {
        let mut server = Server::start();
        let etag = server.put(names[0], names[0].as_bytes());
        for name in *names {
            let answer = server.get(name);
            assert_eq!((answer.status, answer.field("ETag")), (200, Some(&*etag)), "{name}");
            assert_eq!(answer.body, names[0].as_bytes(), "{name}");
        }
        let listed = &server.get("/").json()["keys"][0]["key"];
        let canonical = names.last().expect("at least one");
        if names.len() != 2 || names[0] == *canonical {
            assert_eq!(listed, &canonical[1..], "{names:?}");
        }
        let again = format!("/{}", listed.as_str().expect("a string"));
        assert_eq!(server.get(&again).field("ETag"), Some(&*etag), "{again}");
    }
}

#[test]
fn what_makes_no_sense_is_refused() {
    let long = "x".repeat(33);
    let cases: &[(&str, &[&str], u16, &str)] = &[
        ("GET /%zz", &[], 400, "percent-encoding"),
        ("PUT /%4", &[], 400, "percent-encoding"),
        ("PUT /k?x=1", &[], 400, "'x'"),
        ("PUT /k?consistency=stale", &[], 400, "'consistency'"),
        ("DELETE /k?", &[], 404, "does not exist"),
        ("DELETE /k?after-index=1", &[], 400, "'after-index'"),
        ("GET /k?consistency=eventual", &[], 400, "'consistency'"),
        ("GET /k?limit=1", &[], 400, "'limit'"),
        ("GET /k?after-index=1&after-index=1", &[], 400, "repeated"),
        ("GET /k?timeout=1s", &[], 400, "'timeout'"),
        ("GET /k?after-index=1&timeout=301s", &[], 400, "'timeout'"),
        ("GET /?limit=0", &[], 400, "'limit'"),
        ("GET /?values", &[], 400, "'values'"),
        ("GET /_/status?verbose=1", &[], 400, "'verbose'"),
        ("GET /_/livez?x=", &[], 400, "'x'"),
        ("GET /_/", &[], 404, "/_/"),
        ("GET /%5F/nothing", &[], 404, "/_/nothing"),
        ("PUT /_%2Fx", &[], 404, "/_/x"),
        ("GET /_/members/", &[], 400, "''"),
        ("DELETE /_/members/0", &[], 400, "'0'"),
        ("DELETE /_/members/01", &[], 400, "'01'"),
        ("DELETE /_/members/x", &[], 400, "'x'"),
        ("DELETE /_/members/4/5", &[], 400, "'4/5'"),
        ("DELETE /_/members/18446744073709551616", &[], 400, "'18446744073709551616'"),
        ("PUT /_/members/4?role=leader", &[], 400, "'role'"),
        ("PUT /", &[], 405, "GET, HEAD"),
        ("DELETE /", &[], 405, "GET, HEAD"),
        ("POST /k", &[], 405, "PUT"),
        ("PATCH /k", &[], 405, "PUT"),
        ("TRACE /k", &[], 405, "PUT"),
        ("BREW /k", &[], 405, "PUT"),
        ("POST /_/status", &[], 405, "GET"),
        ("DELETE /_/members", &[], 405, "PUT"),
        ("GET /_/members/4", &[], 405, "DELETE"),
        ("GET /_/leader", &[], 405, "PUT"),
        ("GET /_/snapshot", &[], 405, "POST"),
        ("PUT /k", &["If-Match: 7"], 400, "If-Match"),
        ("PUT /k", &["If-None-Match: \"7\" \"8\""], 400, "If-None-Match"),
        ("PUT /k", &["If-None-Match: *, \"8\""], 400, "If-None-Match"),
        ("PUT /k", &["If-Match:"], 400, "If-Match"),
        ("GET /k", &["If-Match: x"], 400, "If-Match"),
        ("DELETE /k", &["If-Match: *", "If-Match: *"], 400, "If-Match"),
        ("PUT /k", &["Idempotency-Key: a", "Idempotency-Key: a"], 400, "Idempotency-Key"),
        ("PUT /k", &["Idempotency-Key:"], 400, "Idempotency-Key"),
        ("PUT /k", &["Idempotency-Key: a b"], 400, "Idempotency-Key"),
        ("DELETE /k", &["Idempotency-Key: caf\u{e9}"], 400, "Idempotency-Key"),
        (&format!("GET /{long}"), &[], 414, "32 bytes"),
        (&format!("PUT /{long}"), &[], 414, "32 bytes"),
        (&format!("DELETE /{long}"), &[], 414, "32 bytes"),
    ];
    let mut server = Server::start();
    for (request, fields, status, detail) in cases {
        let answer = server.send(request, fields, b"");
        let document = problem(&answer, *status);
        let said = document["detail"].as_str().expect("a string");
        assert!(said.contains(detail), "{request} {fields:?}: {said}");
        let read = ["GET", "TRACE"].iter().any(|method| request.starts_with(method));
        let outcome = if read { Value::Null } else { json!("not-applied") };
        assert_eq!(document["outcome"], outcome, "{request}");
        assert_eq!(answer.field("Allow").is_some(), *status == 405, "{request}");
    }
    assert_eq!(server.backend.writes(), 1, "only the DELETE without an error reached the backend");
}

#[test]
fn options_names_the_methods() {
    let mut server = Server::start();
    let cases = [
        ("*", "GET, HEAD, PUT, DELETE, OPTIONS"),
        ("/", "GET, HEAD, OPTIONS"),
        ("/k", "GET, HEAD, PUT, DELETE, OPTIONS"),
        ("/_/status", "GET, HEAD, OPTIONS"),
        ("/_/members", "GET, HEAD, PUT, OPTIONS"),
        ("/_/members/4", "PUT, DELETE, OPTIONS"),
        ("/_/leader", "PUT, OPTIONS"),
        ("/_/snapshot", "POST, OPTIONS"),
    ];
    for (target, allow) in cases {
        let answer = server.send(&format!("OPTIONS {target}"), &[], b"");
        assert_eq!((answer.status, answer.field("Allow")), (204, Some(allow)), "{target}");
    }
    problem(&server.send("OPTIONS /_/nothing", &[], b""), 404);
}

#[test]
fn a_body_too_long_is_refused_before_it_is_read() {
    let mut server = Server::start();
    let refused = |answer: &Answer| assert_eq!(problem(answer, 413)["outcome"], "not-applied");
    // No byte of the body is ever sent, and nobody waits for one.
    let began = Instant::now();
    refused(&server.another_client().send_raw(b"PUT /k HTTP/1.1\r\nHost: a\r\nContent-Length: 1001\r\n\r\n", false));
    assert!(began.elapsed() < LIMITS.server().body_timeout / 2);
    let long = [&b"3e9\r\n"[..], &[b'x'; 1001], b"\r\n0\r\n\r\n"].concat();
    let chunked = b"PUT /k HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n";
    refused(&server.another_client().send_raw(&[&chunked[..], &long].concat(), false));
    refused(&server.another_client().send("DELETE /k", &[], b"x"));
    server.put("/k", &[b'x'; 1000]);
    server.put(&format!("/{}", "%ff".repeat(32)), b"");
    assert_eq!(server.get("/k").body.len(), 1000);
    assert_eq!(server.backend.writes(), 2);
}

#[test]
fn conditions_hold_or_not() {
    // Field, methods that succeed on a key whose tag is 2 as on none: of GET, HEAD, PUT, DELETE.
    let existing: &[(&str, [u16; 4])] = &[
        ("If-Match: *", [200, 200, 204, 204]),
        ("If-Match: \"2\"", [200, 200, 204, 204]),
        ("If-Match: \"1\", \"2\"", [200, 200, 204, 204]),
        ("If-Match: \"1\"", [412; 4]),
        ("If-Match: W/\"2\"", [412; 4]),
        ("If-Match: \"02\"", [412; 4]),
        ("If-Match: \"x\"", [412; 4]),
        ("If-None-Match: *", [304, 304, 412, 412]),
        ("If-None-Match: \"2\"", [304, 304, 412, 412]),
        ("If-None-Match: W/\"2\"", [304, 304, 412, 412]),
        ("If-None-Match: \"1\", W/\"2\"", [304, 304, 412, 412]),
        ("If-None-Match: \"1\"", [200, 200, 204, 204]),
        ("If-None-Match: \"x\"", [200, 200, 204, 204]),
        ("If-Modified-Since: Sat, 29 Oct 2044 19:43:31 GMT", [200, 200, 204, 204]),
        ("If-Unmodified-Since: Sat, 29 Oct 1994 19:43:31 GMT", [200, 200, 204, 204]),
        ("Range: bytes=0-0", [200, 200, 204, 204]),
    ];
    let absent: &[(&str, [u16; 4])] = &[
        ("If-Match: *", [404, 404, 412, 412]),
        ("If-Match: \"1\"", [404, 404, 412, 412]),
        ("If-None-Match: *", [404, 404, 204, 404]),
        ("If-None-Match: \"1\"", [404, 404, 204, 404]),
    ];
    let methods = ["GET", "HEAD", "PUT", "DELETE"];
    for (exists, cases) in [(true, existing), (false, absent)] {
        for (field, statuses) in cases {
            for (method, status) in methods.iter().zip(statuses) {
                let mut server = Server::start();
                server.put("/other", b"");
                if exists {
                    assert_eq!(server.put("/k", b"old"), "\"2\"");
                }
                let answer = server.send(&format!("{method} /k"), &[field], b"");
                assert_eq!(answer.status, *status, "{method} with {field}, exists: {exists}");
                let tag = match (status, *method) {
                    (204, "PUT") if exists => Some("\"3\""),
                    (204, "PUT") => Some("\"2\""),
                    (204 | 404, _) => None,
                    _ => exists.then_some("\"2\""),
                };
                assert_eq!(answer.field("ETag"), tag, "{method} with {field}, exists: {exists}");
                let index = answer.field("Raftexample-Index").is_some();
                assert_eq!(index, matches!(*method, "GET" | "HEAD"), "{method} with {field}");
                if *status == 412 && *method != "HEAD" {
                    problem(&answer, 412);
                }
            }
        }
    }
}

#[test]
fn a_token_names_one_write() {
    let mut server = Server::start();
    let token = &["Idempotency-Key: \"8e03978e\""];
    let first = server.send("PUT /k", token, b"v");
    assert_eq!(first.status, 204);
    server.put("/k", b"by another");
    let repeat = server.send("PUT /k", token, b"v");
    assert_eq!((repeat.status, repeat.field("ETag")), (204, first.field("ETag")));
    assert_eq!(server.get("/k").body, b"by another");
    for (request, fields, body) in [
        ("PUT /k", &token[..], &b"w"[..]),
        ("PUT /j", token, b"v"),
        ("DELETE /k", token, b""),
        ("PUT /k", &[token[0], "If-Match: *"], b"v"),
    ] {
        let document = problem(&server.send(request, fields, body), 422);
        assert_eq!(document["outcome"], "not-applied", "{request}");
    }
    let token = &["Idempotency-Key: d"];
    assert_eq!(server.send("DELETE /nothing", token, b"").status, 404);
    server.put("/nothing", b"");
    assert_eq!(server.send("DELETE /nothing", token, b"").status, 404, "a repeat gets the first answer");
    assert_eq!(server.get("/nothing").status, 200);
}

#[test]
fn every_refusal_has_its_answer() {
    let mut server = Server::start();
    let unavailable = [Refusal::NoLeader, Refusal::Overloaded("too many requests"), Refusal::Stopping];
    for refusal in unavailable {
        server.backend.answer_writes(WriteReply::NotApplied(refusal.clone()));
        for request in ["PUT /k", "DELETE /k"] {
            assert_eq!(problem(&server.send(request, &[], b""), 503)["outcome"], "not-applied");
        }
        server.backend.answer_admin(AdminReply::Refused(refusal.clone()));
        assert_eq!(problem(&server.send("DELETE /_/members/3", &[], b""), 503)["outcome"], "not-applied");
        server.backend.refuse_reads(Some(refusal));
        for target in ["/k", "/", "/_/members", "/k?after-index=1", "/?after-index=1"] {
            assert!(problem(&server.get(target), 503).get("outcome").is_none());
        }
        assert_eq!(server.get("/?consistency=stale").status, 200);
        problem(&server.get("/k?consistency=stale"), 404);
        server.backend.refuse_reads(None);
    }
    server.backend.answer_writes(WriteReply::NotApplied(Refusal::Full("the store holds all it may".to_owned())));
    assert_eq!(problem(&server.send("PUT /k", &[], b""), 507)["outcome"], "not-applied");
    let refusals = [
        (Refusal::Conflict("another change is in progress".to_owned()), 409),
        (Refusal::Invalid("no".to_owned()), 400),
    ];
    for (refusal, status) in refusals {
        server.backend.answer_admin(AdminReply::Refused(refusal));
        assert_eq!(problem(&server.send("DELETE /_/members/3", &[], b""), status)["outcome"], "not-applied");
    }
    server.backend.answer_writes(WriteReply::Unknown("the deadline has passed"));
    let document = problem(&server.send("PUT /k", &["Idempotency-Key: t"], b""), 504);
    assert_eq!(document["outcome"], "unknown");
    let detail = document["detail"].as_str().expect("a string");
    assert!(detail.contains("the deadline has passed") && detail.contains("Idempotency-Key is safe"), "{detail}");
    let document = problem(&server.send("DELETE /k", &[], b""), 504);
    let detail = document["detail"].as_str().expect("a string");
    assert!(detail.contains("applied a second time") && detail.contains("412 or 404"), "{detail}");
    assert_eq!(document["outcome"], "unknown");
    server.backend.answer_admin(AdminReply::Unknown("the leader changed"));
    assert_eq!(problem(&server.send("DELETE /_/members/3", &[], b""), 504)["outcome"], "unknown");
}

#[test]
fn faults_of_http_are_problems_too() {
    let server = Server::start();
    for (raw, status) in [
        ("PUT /k HTTP/1.1\r\nHost: a\r\nContent-Length: x\r\n\r\n", 400),
        ("PUT /k HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: gzip\r\n\r\n", 501),
        ("PUT /k HTTP/1.1\r\nHost: a\r\nExpect: magic\r\nContent-Length: 1\r\n\r\n", 417),
        ("CONNECT a:1 HTTP/1.1\r\nHost: a\r\n\r\n", 501),
        ("GARBAGE\r\n\r\n", 400),
    ] {
        let document = problem(&server.another_client().send_raw(raw.as_bytes(), false), status);
        assert_eq!(document["outcome"], "not-applied", "{raw}");
    }
}

#[test]
fn head_is_get_without_its_body() {
    let mut server = Server::start();
    server.put("/k", b"value");
    let etag = server.put("/k", b"value");
    let fields = format!("If-None-Match: {etag}");
    let targets = [
        "/k",
        "/nothing",
        "/",
        "/?limit=0",
        "/k?after-index=1",
        "/?after-index=1",
        "/_/members",
        "/_/livez",
        "/_/readyz",
        "/_/nothing",
        "/_/leader",
    ];
    for (target, fields) in targets.iter().map(|target| (*target, None)).chain([("/k", Some(&*fields))]) {
        let fields: Vec<_> = fields.into_iter().collect();
        let get = server.send(&format!("GET {target}"), &fields, b"");
        let head = server.send(&format!("HEAD {target}"), &fields, b"");
        let told =
            |answer: &Answer| answer.fields.iter().filter(|(name, _)| name != "Date").cloned().collect::<Vec<_>>();
        assert_eq!((get.status, told(&get)), (head.status, told(&head)), "{target}");
        assert!(head.body.is_empty());
    }
}

#[test]
fn the_metrics_are_those_of_the_requests() {
    for event_loops in [0, 1] {
        counts_requests(&mut Server::start_with(HttpLimits::default(), event_loops));
    }
}

fn counts_requests(server: &mut Server) {
    server.put("/k", b"value");
    server.get("/k");
    server.get("/k?consistency=stale");
    server.get("/k?after-index=0");
    server.get("/nothing");
    server.send("HEAD /", &[], b"");
    problem(&server.get("/_/livez?x=1"), 400);
    problem(&server.send("PUT /k?x=1", &[], b""), 400);
    problem(&server.another_client().send_raw(b"nonsense\r\n\r\n", false), 400);
    // Its own count is one behind.
    assert_eq!(server.get("/_/metrics").status, 200);
    let answer = server.get("/_/metrics");
    assert_eq!(answer.field("Content-Type"), Some("text/plain; version=0.0.4; charset=utf-8"));
    let text = String::from_utf8(answer.body).expect("text");
    let requests = [
        (r#"consistency="none",method="PUT",status="204""#, 1),
        (r#"consistency="linearizable",method="GET",status="200""#, 2),
        (r#"consistency="stale",method="GET",status="200""#, 1),
        (r#"consistency="linearizable",method="GET",status="404""#, 1),
        (r#"consistency="linearizable",method="HEAD",status="200""#, 1),
        (r#"consistency="none",method="GET",status="400""#, 1),
        (r#"consistency="none",method="PUT",status="400""#, 1),
        (r#"consistency="none",method="other",status="400""#, 1),
        (r#"consistency="none",method="GET",status="200""#, 1),
    ];
    for (labels, count) in requests {
        let line = format!("raftexample_http_requests_total{{{labels}}} {count}");
        assert!(text.lines().any(|found| found == line), "{line} is missing in:\n{text}");
    }
    // Not the one that asked to wait.
    let line = r#"raftexample_http_request_duration_seconds_count{consistency="linearizable",method="GET"} 2"#;
    assert!(text.lines().any(|found| found == line), "{line} is missing in:\n{text}");
    let answer = server.send("HEAD /_/metrics", &[], b"");
    assert_eq!((answer.status, answer.body.len()), (200, 0));
    let answer = server.send("POST /_/metrics", &[], b"");
    problem(&answer, 405);
    assert_eq!(answer.field("Allow"), Some("GET, HEAD, OPTIONS"));
}

#[test]
fn a_listing_comes_in_pages() {
    let mut server = Server::start();
    assert_eq!(server.get("/").json(), json!({"index": 0, "keys": [], "next": null}));
    for key in ["b/2", "a", "b/1", "b/%FF", "b", "c"] {
        server.put(&format!("/{key}"), key.as_bytes());
    }
    let answer = server.get("/");
    assert_eq!(answer.field("Content-Type"), Some("application/json"));
    assert_eq!(answer.field("Raftexample-Index"), Some("6"));
    let names = |document: &Value| -> Vec<String> {
        let keys = document["keys"].as_array().expect("a list");
        keys.iter().map(|key| key["key"].as_str().expect("a string").to_owned()).collect()
    };
    assert_eq!(names(&answer.json()), ["a", "b", "b/1", "b/2", "b/%FF", "c"]);
    let page = server.get("/?prefix=b%2F&limit=2").json();
    assert_eq!(
        page,
        json!({
            "index": 6,
            "keys": [{"key": "b/1", "size": 3, "etag": "\"3\""}, {"key": "b/2", "size": 3, "etag": "\"1\""}],
            "next": "b/2",
        })
    );
    let page = server.get("/?prefix=b/&limit=2&after=b/2&values=true").json();
    let expected = json!([{"key": "b/%FF", "size": 5, "etag": "\"4\"", "value": "Yi8lRkY="}]);
    assert_eq!((&page["keys"], &page["next"]), (&expected, &Value::Null));
    assert_eq!(names(&server.get("/?after=b").json()), ["b/1", "b/2", "b/%FF", "c"]);
    assert_eq!(names(&server.get("/?prefix=b&after=a").json()).len(), 4);
    assert_eq!(names(&server.get("/?prefix=b&after=c").json()).len(), 0);
    assert_eq!(names(&server.get("/?prefix=&after=").json()).len(), 6);
    assert_eq!(server.get("/?limit=6").json()["next"], Value::Null);
}

#[test]
fn a_wait_ends_with_the_change() {
    let mut server = Server::start();
    server.put("/k", b"1");
    server.put("/other", b"2");
    assert_eq!(server.get("/k?after-index=0").body, b"1", "it has changed since");
    let waits = ["/k?after-index=1&timeout=1m", "/new?after-index=2&timeout=1m", "/?prefix=n&after-index=2&timeout=1m"];
    let waiting = waits.map(|target| {
        let mut client = server.another_client();
        std::thread::Builder::new().spawn(move || client.send(&format!("GET {target}"), &[], b"")).expect("a thread")
    });
    server.backend.await_watches(3);
    server.put("/elsewhere", b"3");
    server.put("/k", b"4");
    server.put("/new", b"5");
    let [key, new, prefix] = waiting.map(|thread| thread.join().expect("an answer"));
    assert_eq!((key.status, &*key.body, key.field("ETag")), (200, &b"4"[..], Some("\"4\"")));
    assert_eq!((new.status, &*new.body), (200, &b"5"[..]));
    assert_eq!(prefix.json(), json!({"index": 5, "changes": [{"index": 5, "op": "put", "key": "new"}]}));
    server.send("DELETE /k", &[], b"");
    assert_eq!(server.get("/k?after-index=5&timeout=0s").status, 404, "a deletion is a change");
    let changes = server.get("/?prefix=k&after-index=1").json();
    let expected = json!([{"index": 4, "op": "put", "key": "k"}, {"index": 6, "op": "delete", "key": "k"}]);
    assert_eq!((&changes["index"], &changes["changes"]), (&json!(6), &expected));
    let changes = server.get("/?after-index=0&limit=2").json();
    assert_eq!((&changes["index"], changes["changes"].as_array().map(Vec::len)), (&json!(2), Some(2)));
}

#[test]
fn a_wait_ends_with_its_time() {
    let mut server = Server::start();
    let etag = server.put("/k", b"1");
    let began = Instant::now();
    let answer = server.get("/k?after-index=1&timeout=50ms");
    assert!(began.elapsed() >= Duration::from_millis(50));
    assert_eq!((answer.status, answer.field("ETag")), (304, Some(&*etag)));
    assert_eq!(answer.field("Raftexample-Index"), Some("1"));
    let answer = server.get("/nothing?after-index=1&timeout=0s");
    assert_eq!((answer.status, answer.field("ETag")), (304, None));
    let answer = server.get("/?after-index=1&timeout=0s");
    assert_eq!((answer.status, answer.json()), (200, json!({"index": 1, "changes": []})));
    let reads = server.backend.reads();
    server.get("/k?after-index=1&timeout=0s");
    assert_eq!(server.backend.reads() - reads, 2, "before the wait, and when its time is up");
    server.get("/k?after-index=1&timeout=0s&consistency=stale");
    assert_eq!(server.backend.reads() - reads, 2, "a stale read asks nobody");
    server.backend.stop();
    problem(&server.get("/k?after-index=1&timeout=1m"), 503);
}

#[test]
fn a_wait_for_what_is_forgotten_begins_again() {
    let mut server = Server::start();
    let etag = server.put("/k", b"1");
    server.backend.write_often(b"other", CHANGES_MAX + 2);
    for target in ["/?after-index=2", "/nothing?after-index=2"] {
        let document = problem(&server.get(target), 410);
        assert_eq!(document["index"], 3, "one change and two more are forgotten");
        assert!(document.get("outcome").is_none());
    }
    assert_eq!(server.get("/k?after-index=0").field("ETag"), Some(&*etag), "a key that exists is its own history");
    let page = server.get("/?after-index=3").json();
    assert_eq!((&page["index"], page["changes"].as_array().map(Vec::len)), (&json!(1003), Some(1000)));
    let index = server.get("/nothing").field("Raftexample-Index").expect("an index").to_owned();
    assert_eq!(server.get(&format!("/nothing?after-index={index}&timeout=0s")).status, 304);
}

#[test]
fn a_wait_outlives_the_history_of_what_it_does_not_wait_for() {
    let mut server = Server::start();
    server.put("/k", b"1");
    let waits =
        ["/new?timeout=1m", "/?prefix=n&timeout=1m", "/never?timeout=1s", "/?prefix=x&timeout=1s"].map(|target| {
            let mut client = server.another_client();
            let request = format!("GET {target}&after-index=1");
            std::thread::Builder::new().spawn(move || client.send(&request, &[], b"")).expect("a thread")
        });
    server.backend.await_watches(4);
    server.backend.write_often(b"other", CHANGES_MAX + 2);
    server.put("/new", b"5");
    let [new, prefix, never, nothing] = waits.map(|thread| thread.join().expect("an answer"));
    assert_eq!((new.status, &*new.body), (200, &b"5"[..]));
    assert_eq!((prefix.status, prefix.json()["changes"][0]["key"].as_str()), (200, Some("new")));
    assert_eq!(never.status, 304);
    assert_eq!((nothing.status, &nothing.json()["changes"]), (200, &json!([])));
}

#[test]
fn who_waits_keeps_nothing_in_memory() {
    let mut server = Server::start();
    server.put("/k", b"old");
    let old = server.backend.item(b"k").expect("it was put");
    let mut client = server.another_client();
    let wait = move || client.send("GET /new?after-index=1&timeout=1m", &[], b"");
    let waiting = std::thread::Builder::new().spawn(wait).expect("a thread");
    server.backend.await_watches(1);
    server.put("/k", b"new");
    let deadline = Instant::now() + PATIENCE;
    while !old.is_unshared() {
        assert!(Instant::now() < deadline, "somebody holds the old value");
        std::thread::yield_now();
    }
    assert!(!waiting.is_finished());
    server.put("/new", b"");
    assert_eq!(waiting.join().expect("an answer").status, 200);
}

#[test]
fn the_node_tells_of_itself() {
    let mut server = Server::start();
    server.put("/k", b"1");
    let mut status = server.get("/_/status").json();
    assert!(status["uptime_ms"].take().is_u64());
    assert_eq!(
        status,
        json!({
            "id": 1, "role": "leader", "leader": 1, "term": 3, "commit_index": 9, "applied_index": 1,
            "first_index": 2, "last_index": 10, "snapshot_index": 1, "keys": 1, "uptime_ms": null,
            "version": env!("CARGO_PKG_VERSION"), "change": "promoting member 2",
            "members": [
                {"id": 1, "url": "http://127.0.0.1:12379", "role": "voter",
                 "match_index": 10, "lag": 0, "last_contact_ms": null},
                {"id": 2, "url": "http://127.0.0.1:22379", "role": "learner",
                 "match_index": 4, "lag": 6, "last_contact_ms": 70, "snapshot": {"index": 1, "sent": 100, "size": 1234}},
                {"id": 3, "url": "http://127.0.0.1:32379", "role": "voter"},
            ],
        })
    );
    let members = json!({"members": [
        {"id": 1, "url": "http://127.0.0.1:12379", "role": "voter"},
        {"id": 2, "url": "http://127.0.0.1:22379", "role": "learner"},
        {"id": 3, "url": "http://127.0.0.1:32379", "role": "voter"},
    ]});
    assert_eq!(server.get("/_/members").json(), members);
    assert_eq!(server.get("/_/livez").status, 200);
    assert_eq!(server.get("/_/readyz").status, 200);
    server.backend.refuse_reads(Some(Refusal::NoLeader));
    let document = problem(&server.get("/_/readyz"), 503);
    assert!(document["detail"].as_str().is_some_and(|detail| detail.contains("leader")), "{document}");
    problem(&server.get("/_/members"), 503);
    assert_eq!(server.get("/_/status").status, 200);
    server.backend.stall("applier");
    let document = problem(&server.get("/_/livez"), 503);
    assert!(document["detail"].as_str().is_some_and(|detail| detail.contains("applier")), "{document}");
}

#[test]
fn the_node_is_administered() {
    let mut server = Server::start();
    let mut administer = |request: &str, body: &str| {
        let answer = server.send(request, &[], body.as_bytes());
        (answer, server.backend.take_admin())
    };
    let url = "http://127.0.0.1:42379";
    for (target, voter) in
        [("/_/members/4", None), ("/_/members/4?role=learner", Some(false)), ("/_%2Fmembers/4?role=voter", Some(true))]
    {
        for body in [url, "HTTP://127.0.0.1:42379/\n"] {
            let (answer, asked) = administer(&format!("PUT {target}"), body);
            assert_eq!(answer.status, 204, "{answer:?}");
            assert_eq!(asked, Some(AdminRequest::AddMember { id: 4, url: url.to_owned(), voter }));
        }
    }
    let (answer, asked) = administer("DELETE /_/members/3", "");
    assert_eq!((answer.status, asked), (204, Some(AdminRequest::RemoveMember { id: 3 })));
    let (answer, asked) = administer("PUT /_/leader", "2\n");
    assert_eq!((answer.status, asked), (204, Some(AdminRequest::TransferLeader { id: 2 })));
    let (answer, asked) = administer(
        "PUT /_/members",
        r#"[{"id": 1, "url": "http://a:1", "role": "voter"},
        {"id": 5, "url": "http://b:2/", "role": "learner"}]"#,
    );
    let wanted = vec![(1, "http://a:1".to_owned(), true), (5, "http://b:2".to_owned(), false)];
    assert_eq!((answer.status, asked), (200, Some(AdminRequest::ReplaceMembers(wanted))));
    assert_eq!(answer.json()["members"][1]["id"], 2, "the members as they are now");
    for (request, body) in [
        ("PUT /_/members/4", ""),
        ("PUT /_/members/4", "https://a:1"),
        ("PUT /_/members/4", "http://a"),
        ("PUT /_/members/4", "http://a:1/x"),
        ("PUT /_/members/4", "http://u@a:1"),
        ("PUT /_/leader", ""),
        ("PUT /_/leader", "two"),
        ("PUT /_/leader", "0"),
        ("PUT /_/members", ""),
        ("PUT /_/members", "{}"),
        ("PUT /_/members", r#"[{"id": 1, "url": "http://a:1"}]"#),
        ("PUT /_/members", r#"[{"id": 1, "url": "http://a:1", "role": "leader"}]"#),
        ("PUT /_/members", r#"[{"id": 1, "url": "http://a:1", "role": "voter", "x": 1}]"#),
        ("PUT /_/members", r#"[{"id": 0, "url": "http://a:1", "role": "voter"}]"#),
        ("PUT /_/members", r#"[{"id": 1, "url": "a", "role": "voter"}]"#),
        (
            "PUT /_/members",
            r#"[{"id":1,"url":"http://a:1","role":"voter"},{"id":1,"url":"http://b:1","role":"voter"}]"#,
        ),
        (
            "PUT /_/members",
            r#"[{"id":1,"url":"http://a:1","role":"voter"},{"id":2,"url":"http://a:1","role":"voter"}]"#,
        ),
    ] {
        let (answer, asked) = administer(request, body);
        assert_eq!(problem(&answer, 400)["outcome"], "not-applied", "{request} {body}");
        assert_eq!(asked, None, "{request} {body}");
    }
    assert_eq!(server.send("POST /_/snapshot", &[], b"").json(), json!({"index": 7, "size": 1234}));
    server.backend.refuse_snapshots(Refusal::Overloaded("another snapshot is being written"));
    assert!(problem(&server.send("POST /_/snapshot", &[], b""), 503).get("outcome").is_none());
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 20, ..ProptestConfig::default() })]
    #[test]
    fn every_key_can_be_written_read_and_listed(
        mut keys in prop::collection::btree_map(
            prop::collection::vec(any::<u8>(), 1..32), prop::collection::vec(any::<u8>(), 0..20), 1..20,
        ),
    ) {
        let mut server = Server::start();
        keys.retain(|key, _| !key.starts_with(b"_/"));
        let target = |key: &[u8]| key.iter().fold("/".to_owned(), |target, byte| format!("{target}%{byte:02x}"));
        for (key, value) in &keys {
            server.put(&target(key), value);
        }
        let listed = server.get("/").json();
        let listed: Vec<_> = listed["keys"].as_array().expect("a list").iter().map(|key| key["key"].clone()).collect();
        prop_assert_eq!(listed.len(), keys.len());
        for ((key, value), listed) in keys.iter().zip(listed) {
            prop_assert_eq!(&server.get(&target(key)).body, value);
            let listed = format!("/{}", listed.as_str().expect("a string"));
            prop_assert_eq!(&server.get(&listed).body, value, "{}", listed);
        }
    }
}
