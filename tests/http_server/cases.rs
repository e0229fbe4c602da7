use std::collections::HashMap;
use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use raftexample::http::{
    Admission, Begun, Body, Caller, EventLoop, Handle, Head, Header, Limits, Listener, Payload, Response, Service,
    StatusCode, respond,
};

/// What every wait of these tests is bounded by: far above what anything takes, below what a person waits.
const DEADLINE: Duration = Duration::from_secs(20);
const BODY_BYTES_MAX: usize = 1024 * 1024;

/// How long an event loop waits for the reply to `/never`.
const NEVER_TIMEOUT: Duration = Duration::from_millis(200);

/// A service whose paths name what it does.
#[derive(Default)]
struct Paths {
    /// Opened, it lets the requests for `/wait` go.
    gate: Mutex<bool>,
    opened: Condvar,
    waiting: AtomicBool,
    saw_client_gone: AtomicBool,
    /// Where the pieces of a streamed body go.
    pieces: Mutex<Option<mpsc::Sender<Vec<u8>>>>,
    /// Requests of event loops that waited for a reply.
    submitted: AtomicUsize,
    /// Who waits for the reply to `/never`.
    never: Mutex<Option<Caller<Vec<u8>>>>,
}

impl Paths {
    fn open_gate(&self) {
        *self.gate.lock().unwrap() = true;
        self.opened.notify_all();
    }

    fn wait(&self, head: &Head<'_>) -> Response {
        self.waiting.store(true, Ordering::SeqCst);
        let mut open = self.gate.lock().unwrap();
        while !*open {
            if head.client_gone() {
                self.saw_client_gone.store(true, Ordering::SeqCst);
                return respond(503, "");
            }
            (open, _) = self.opened.wait_timeout(open, Duration::from_millis(5)).unwrap();
        }
        respond(200, "waited")
    }

    fn stream(&self, body: &mut dyn Read) -> Response {
        let pieces = self.pieces.lock().unwrap().take();
        let mut buffer = vec![0; 16 * 1024];
        let mut total = 0;
        loop {
            match body.read(&mut buffer) {
                Ok(0) => return respond(200, total.to_string()),
                Ok(read) => {
                    total += read;
                    if let Some(pieces) = &pieces {
                        pieces.send(buffer[..read].to_vec()).unwrap();
                    }
                }
                Err(error) => return respond(400, format!("{:?}", error.kind())),
            }
        }
    }
}

impl Service for Paths {
    /// Requests of the connection so far.
    type Session = usize;

    type Turn = Vec<(Vec<u8>, Caller<Vec<u8>>)>;
    type Pending = ();
    type Reply = Vec<u8>;

    fn begin(
        &self,
        turn: &mut Self::Turn,
        head: &Head<'_>,
        body: &[u8],
        caller: Caller<Vec<u8>>,
        now: Instant,
    ) -> Begun<()> {
        let target = std::str::from_utf8(head.target()).unwrap();
        match target {
            "/empty" => Begun::Answered(respond(204, "")),
            "/echo" => {
                turn.push((body.to_vec(), caller));
                Begun::Waits((), now + DEADLINE)
            }
            "/never" => {
                *self.never.lock().unwrap() = Some(caller);
                Begun::Waits((), now + NEVER_TIMEOUT)
            }
            _ => match target.strip_prefix("/size/").and_then(|size| size.parse().ok()) {
                Some(size) => Begun::Answered(respond(200, vec![b'x'; size])),
                None => Begun::ForThread,
            },
        }
    }

    fn submit(&self, turn: &mut Self::Turn) {
        for (body, caller) in turn.drain(..) {
            self.submitted.fetch_add(1, Ordering::SeqCst);
            caller.reply(body);
        }
    }

    fn finish(&self, (): (), reply: Option<Vec<u8>>, _: Instant) -> Response {
        reply.map_or_else(|| respond(504, ""), |body| respond(200, body))
    }

    fn session(&self, peer: SocketAddr) -> usize {
        assert!(peer.ip().is_loopback());
        0
    }

    fn admit(&self, requests: &mut usize, head: &Head<'_>) -> Admission {
        *requests += 1;
        match head.target() {
            b"/early" => Admission::Answer(respond(404, "early")),
            b"/stream" | b"/unread" => Admission::Stream,
            b"/small" => Admission::Buffer(1000),
            _ => Admission::Buffer(BODY_BYTES_MAX),
        }
    }

    fn answer(&self, requests: &mut usize, head: &Head<'_>, body: Body<'_>) -> Response {
        let target = std::str::from_utf8(head.target()).unwrap();
        match (target, body) {
            ("/echo", Body::Buffered(body)) => respond(200, body.into_owned()),
            ("/count", _) => respond(200, requests.to_string()),
            ("/wait", _) => self.wait(head),
            ("/empty", _) => respond(204, ""),
            ("/panic", _) => panic!("asked to"),
            ("/stream", Body::Stream(body)) => self.stream(body),
            ("/unread", _) => respond(200, "unread"),
            (target, _) => match target.strip_prefix("/size/").and_then(|size| size.parse().ok()) {
                Some(size) => respond(200, vec![b'x'; size]),
                None => respond(404, Payload::empty()),
            },
        }
    }

    fn fault(&self, status: StatusCode, detail: &str) -> Response {
        respond(status.0, detail.to_owned()).with_header(Header::from_bytes("Content-Type", "text/plain").unwrap())
    }
}

fn serve(limits: Limits, name: &str) -> (Arc<Paths>, Handle) {
    let paths = Arc::new(Paths::default());
    let listener = Listener::bind("127.0.0.1:0").unwrap();
    let event_loops = (0..EVENT_LOOPS).map(|_| EventLoop::new(limits.connections).unwrap()).collect();
    (Arc::clone(&paths), listener.serve_in_loops(paths, limits, name, event_loops).unwrap())
}

fn start() -> (Arc<Paths>, Handle) {
    serve(Limits::default(), "http")
}

struct Answer {
    status: u16,
    headers: HashMap<String, String>,
    body: Vec<u8>,
}

impl Answer {
    fn header(&self, name: &str) -> Option<&str> {
        self.headers.get(name).map(String::as_str)
    }

    fn closes(&self) -> bool {
        self.header("connection") == Some("close")
    }
}

struct Client {
    stream: TcpStream,
    received: Vec<u8>,
}

impl Client {
    fn connect(server: &Handle) -> Client {
        let stream = TcpStream::connect(server.local_addr()).unwrap();
        stream.set_read_timeout(Some(DEADLINE)).unwrap();
        stream.set_write_timeout(Some(DEADLINE)).unwrap();
        stream.set_nodelay(true).unwrap();
        Client { stream, received: Vec::new() }
    }

    fn send(&mut self, bytes: impl AsRef<[u8]>) {
        self.stream.write_all(bytes.as_ref()).unwrap();
    }

    /// Sends a request without body and reads its answer.
    fn get(&mut self, target: &str) -> Answer {
        self.send(get(target));
        self.answer()
    }

    fn answer(&mut self) -> Answer {
        self.try_answer(false).expect("an answer")
    }

    fn answer_to_head(&mut self) -> Answer {
        self.try_answer(true).expect("an answer")
    }

    /// The next answer, or none if the server closes instead.
    fn try_answer(&mut self, head_only: bool) -> Option<Answer> {
        let (mut answer, head_bytes) = loop {
            if let Some(parsed) = parse(&self.received) {
                break parsed;
            }
            if !self.receive() {
                assert!(self.received.is_empty(), "half an answer: {}", self.received.escape_ascii());
                return None;
            }
        };
        self.received.drain(..head_bytes);
        let length = answer.header("content-length").map_or(0, |length| length.parse().unwrap());
        if !head_only {
            while self.received.len() < length {
                assert!(self.receive(), "the body ends early");
            }
            answer.body = self.received.drain(..length).collect();
        }
        Some(answer)
    }

    /// Reads until the server closes, which it must without sending anything.
    fn assert_closed(mut self) {
        assert!(!self.receive(), "unexpected: {}", self.received.escape_ascii());
        assert!(self.received.is_empty(), "unexpected: {}", self.received.escape_ascii());
    }

    fn receive(&mut self) -> bool {
        let mut buffer = [0; 16 * 1024];
        match self.stream.read(&mut buffer) {
            Ok(read) => {
                self.received.extend_from_slice(&buffer[..read]);
                read > 0
            }
            Err(error) if error.kind() == ErrorKind::ConnectionReset => false,
            Err(error) => panic!("no byte from the server: {error}"),
        }
    }
}

fn parse(bytes: &[u8]) -> Option<(Answer, usize)> {
    let mut headers = [httparse::EMPTY_HEADER; 20];
    let mut response = httparse::Response::new(&mut headers);
    let httparse::Status::Complete(length) = response.parse(bytes).unwrap() else { return None };
    let text = |header: &&mut httparse::Header<'_>| {
        (header.name.to_ascii_lowercase(), String::from_utf8(header.value.to_vec()).unwrap())
    };
    let headers: HashMap<_, _> = response.headers.iter_mut().map(|header| text(&header)).collect();
    Some((Answer { status: response.code.unwrap(), headers, body: Vec::new() }, length))
}

fn get(target: &str) -> String {
    format!("GET {target} HTTP/1.1\r\nHost: test\r\n\r\n")
}

fn put(target: &str, body: &str) -> String {
    format!("PUT {target} HTTP/1.1\r\nHost: test\r\nContent-Length: {}\r\n\r\n{body}", body.len())
}

/// Waits for a condition that must come true.
fn eventually(what: &str, condition: impl Fn() -> bool) {
    let deadline = Instant::now() + DEADLINE;
    while !condition() {
        assert!(Instant::now() < deadline, "never came true: {what}");
        thread::sleep(Duration::from_millis(2));
    }
}

/// Runs `body` in a process where nothing else runs: this test, started again by itself.
fn alone(test: &str, body: impl FnOnce()) {
    const MARK: &str = "RAFTEXAMPLE_TEST_ALONE";
    if std::env::var_os(MARK).is_some() {
        return body();
    }
    let (_, module) = module_path!().split_once("::").unwrap();
    let test = format!("{module}::{test}");
    let mut command = Command::new(std::env::current_exe().unwrap());
    let output = command.args([&*test, "--exact", "--nocapture"]).env(MARK, "1").output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success() && text.contains("1 passed"), "{text}{}", String::from_utf8_lossy(&output.stderr));
}

fn open_descriptors() -> usize {
    std::fs::read_dir("/proc/self/fd").unwrap().count()
}

fn threads_named(prefix: &str) -> usize {
    let tasks = std::fs::read_dir("/proc/self/task").unwrap();
    // A thread may end between being listed and being asked for its name.
    let names = tasks.map(|task| std::fs::read_to_string(task.unwrap().path().join("comm")).unwrap_or_default());
    names.filter(|name| name.starts_with(prefix)).count()
}

// Ordinary service.

#[test]
fn requests_on_one_connection_are_answered() {
    let (_, server) = start();
    let mut client = Client::connect(&server);
    let answer = client.get("/size/5");
    assert_eq!((answer.status, answer.body.as_slice(), answer.closes()), (200, &b"xxxxx"[..], false));
    assert!(answer.header("date").is_some());
    client.send(put("/echo", "hello"));
    assert_eq!(client.answer().body, b"hello");
    let empty = client.get("/empty");
    assert_eq!((empty.status, empty.header("content-length")), (204, None));
    client.send("GET http://other/count?no HTTP/1.1\r\nHost: test\r\n\r\n");
    assert_eq!(client.answer().status, 404);
    // Counted are the requests that a thread has seen; an event loop had the first three.
    assert_eq!(client.get("/count").body, if EVENT_LOOPS == 0 { b"5" } else { b"2" });
}

#[test]
fn bodies_of_every_size_and_framing_arrive() {
    let (_, server) = start();
    let mut client = Client::connect(&server);
    for size in [0, 1, 4095, 4096, 4097, 8191, 8192, 8193, 65_536, 65_537, 300_000, BODY_BYTES_MAX] {
        let body = vec![b'v'; size];
        client.send(format!("PUT /echo HTTP/1.1\r\nHost: test\r\nContent-Length: {size}\r\n\r\n"));
        client.send(&body);
        assert!(client.answer().body == body, "{size} bytes with a length");
        client.send("PUT /echo HTTP/1.1\r\nHost: test\r\nTransfer-Encoding: chunked\r\n\r\n");
        for chunk in body.chunks(100_000) {
            client.send(format!("{:x}\r\n", chunk.len()));
            client.send(chunk);
            client.send("\r\n");
        }
        client.send("0\r\n\r\n");
        assert!(client.answer().body == body, "{size} bytes in chunks");
    }
}

#[test]
fn a_request_may_arrive_byte_by_byte() {
    let (_, server) = start();
    let mut client = Client::connect(&server);
    for byte in put("/echo", "hello").bytes() {
        client.send([byte]);
    }
    assert_eq!(client.answer().body, b"hello");
}

#[test]
fn pipelined_requests_are_answered_in_order() {
    let (_, server) = start();
    let mut client = Client::connect(&server);
    let requests: String =
        (0..500).map(|size| get(&format!("/size/{size}")) + &put("/echo", &size.to_string())).collect();
    client.send(requests);
    for size in 0..500 {
        assert_eq!(client.answer().body.len(), size);
        assert_eq!(client.answer().body, size.to_string().as_bytes());
    }
}

#[test]
fn long_targets_arrive_whole() {
    let (_, server) = serve(Limits { request_line_bytes: 200 * 1024, ..Limits::default() }, "http");
    let mut client = Client::connect(&server);
    for bytes in [1_000, 8_200, 50_000, 190_000] {
        assert_eq!(client.get(&format!("/size/7?{}", "k".repeat(bytes))).status, 404);
    }
    assert_eq!(client.get("/size/7").body, b"xxxxxxx");
}

#[test]
fn head_is_answered_without_a_body() {
    let (_, server) = start();
    let mut client = Client::connect(&server);
    client.send("HEAD /size/5000 HTTP/1.1\r\nHost: test\r\n\r\n");
    assert_eq!(client.answer_to_head().header("content-length"), Some("5000"));
    client.send("HEAD /size/5 HTTP/1.1\r\nHost: test\r\nContent-Length: x\r\n\r\n");
    let refused = client.answer();
    assert_eq!((refused.status, refused.closes()), (400, true));
    client.assert_closed();
}

#[test]
fn versions_and_connection_headers_decide_what_follows() {
    let (_, server) = start();
    let mut client = Client::connect(&server);
    client.send("GET /size/1 HTTP/1.0\r\nConnection: keep-alive\r\n\r\n");
    assert_eq!(client.answer().header("connection"), Some("keep-alive"));
    client.send("GET /size/1 HTTP/1.0\r\n\r\n");
    assert!(client.answer().closes());
    client.assert_closed();

    let mut client = Client::connect(&server);
    client.send("GET /size/1 HTTP/1.1\r\nHost: test\r\nConnection: close\r\n\r\n");
    assert!(client.answer().closes());
    client.assert_closed();
}

#[test]
fn expectations_are_met_only_when_the_body_is_wanted() {
    let (_, server) = start();
    let expect = |target: &str, length: usize| {
        format!("PUT {target} HTTP/1.1\r\nHost: test\r\nExpect: 100-Continue\r\nContent-Length: {length}\r\n\r\n")
    };
    let mut client = Client::connect(&server);
    client.send(expect("/echo", 5));
    let interim = client.answer();
    assert_eq!((interim.status, interim.headers.len()), (100, 0));
    client.send("hello");
    assert_eq!(client.answer().body, b"hello");
    // A body that has begun to arrive, or is none, needs no invitation.
    client.send(expect("/echo", 5) + "hello");
    assert_eq!(client.answer().status, 200);
    client.send(expect("/echo", 0));
    assert_eq!(client.answer().status, 200);
    // An answer without the body ends the connection: whether the body still comes, nobody knows.
    client.send(expect("/early", 5));
    let early = client.answer();
    assert_eq!((early.status, early.closes()), (404, true));

    let mut client = Client::connect(&server);
    client.send(expect("/echo", BODY_BYTES_MAX + 1));
    assert_eq!(client.answer().status, 413);

    let mut client = Client::connect(&server);
    client.send("PUT /echo HTTP/1.1\r\nHost: test\r\nExpect: more\r\nContent-Length: 5\r\n\r\n");
    assert_eq!(client.answer().status, 417);
}

#[test]
fn unread_bodies_never_become_requests() {
    let (_, server) = start();
    let smuggled = get("/count");
    // Small and of known length: skipped, and the connection goes on.
    let mut client = Client::connect(&server);
    client.send(put("/early", &smuggled));
    let early = client.answer();
    assert_eq!((early.status, early.closes()), (404, false));
    assert_eq!(client.get("/count").body, b"2");
    // In chunks, or left unread by the service: the connection ends.
    for target in ["/early", "/unread"] {
        let mut client = Client::connect(&server);
        client.send(format!("POST {target} HTTP/1.1\r\nHost: test\r\nTransfer-Encoding: chunked\r\n\r\n"));
        client.send(format!("{:x}\r\n{smuggled}\r\n0\r\n\r\n{smuggled}", smuggled.len()));
        assert!(client.answer().closes());
        client.stream.shutdown(Shutdown::Write).unwrap();
        client.assert_closed();
    }
}

#[test]
fn a_client_that_sends_everything_before_it_reads_sees_its_refusal() {
    let (_, server) = start();
    let mut client = Client::connect(&server);
    client.send("PUT /echo HTTP/1.1\r\nHost: test\r\nContent-Length: 8000000\r\n\r\n");
    client.send(vec![0; 8_000_000]);
    let refused = client.answer();
    assert_eq!((refused.status, refused.closes()), (413, true));
}

#[test]
fn streams_are_handed_out_as_they_arrive() {
    let (paths, server) = start();
    let (pieces_tx, pieces_rx) = mpsc::channel();
    *paths.pieces.lock().unwrap() = Some(pieces_tx);
    let mut client = Client::connect(&server);
    client.send("POST /stream HTTP/1.1\r\nHost: test\r\nTransfer-Encoding: chunked\r\n\r\n");
    // Neither the end of a chunk nor the rest of it is waited for.
    client.send("a\r\nhello");
    assert_eq!(pieces_rx.recv_timeout(DEADLINE).unwrap(), b"hello");
    client.send("world");
    assert_eq!(pieces_rx.recv_timeout(DEADLINE).unwrap(), b"world");
    client.send(format!("\r\n{:x}\r\n", 100_000));
    client.send(vec![b'x'; 100_000]);
    let mut arrived = 0;
    while arrived < 100_000 {
        arrived += pieces_rx.recv_timeout(DEADLINE).unwrap().len();
    }
    client.send("\r\n0\r\n\r\n");
    assert_eq!(client.answer().body, b"100010");
    assert_eq!(client.get("/count").body, b"2");
}

#[test]
fn streams_end_with_their_client_and_with_malformed_chunks() {
    let (_, server) = serve(Limits { body_timeout: Duration::from_millis(200), ..Limits::default() }, "http");
    let cases: [(&str, bool, &[u8]); 3] =
        [("5\r\nhel", true, b"UnexpectedEof"), ("x\r\n", true, b"InvalidData"), ("5\r\nhel", false, b"TimedOut")];
    for (sent, ends, error) in cases {
        let mut client = Client::connect(&server);
        client.send("POST /stream HTTP/1.1\r\nHost: test\r\nTransfer-Encoding: chunked\r\n\r\n");
        client.send(sent);
        if ends {
            client.stream.shutdown(Shutdown::Write).unwrap();
        }
        let answer = client.answer();
        assert_eq!((answer.body.as_slice(), answer.closes()), (error, true));
    }
}

#[test]
fn a_waiting_request_notices_that_its_client_is_gone() {
    let (paths, server) = start();
    let mut client = Client::connect(&server);
    client.send(get("/wait"));
    eventually("the request waits", || paths.waiting.load(Ordering::SeqCst));
    assert!(!paths.saw_client_gone.load(Ordering::SeqCst));
    drop(client);
    eventually("the service sees it", || paths.saw_client_gone.load(Ordering::SeqCst));
    eventually("the connection ends", || server.connections_open() == 0);
}

// Faults that must not come back.

#[test]
fn sixty_four_connections_opened_at_once_and_held_are_all_answered() {
    let (_, server) = start();
    let mut clients: Vec<Client> = (0..64).map(|_| Client::connect(&server)).collect();
    for _ in 0..3 {
        for client in &mut clients {
            client.send(get("/size/1"));
        }
        for client in &mut clients {
            assert_eq!(client.answer().status, 200);
        }
    }
    assert_eq!(server.connections_open(), 64);
    drop(clients);
    eventually("all connections end", || server.connections_open() == 0);
}

#[test]
fn an_absurd_length_is_refused_and_survived() {
    let (_, server) = start();
    for length in ["1000000000000", "18446744073709551615", "99999999999999999999999999"] {
        let mut client = Client::connect(&server);
        client.send(format!("POST /echo HTTP/1.1\r\nHost: test\r\nContent-Length: {length}\r\n\r\n"));
        let refused = client.answer();
        assert_eq!((refused.status, refused.closes()), (413, true));
        let mut client = Client::connect(&server);
        client.send(format!("POST /early HTTP/1.1\r\nHost: test\r\nContent-Length: {length}\r\n\r\n"));
        assert!(client.answer().closes());
    }
    assert_eq!(Client::connect(&server).get("/size/1").status, 200);
}

#[test]
fn other_versions_leave_no_thread_and_no_descriptor_behind() {
    alone("other_versions_leave_no_thread_and_no_descriptor_behind", || {
        let (_, server) = serve(Limits::default(), "ver");
        assert_eq!(Client::connect(&server).get("/size/1").status, 200);
        eventually("the first connection ends", || server.connections_open() == 0);
        eventually("and its thread", || threads_named("ver-") == 1 + EVENT_LOOPS);
        let before = open_descriptors();
        for _ in 0..50 {
            let mut client = Client::connect(&server);
            client.send("GET / HTTP/2.0\r\n\r\n");
            assert_eq!(client.answer().status, 505);
        }
        eventually("all connections end", || server.connections_open() == 0);
        eventually("only the threads of the server are left", || threads_named("ver-") == 1 + EVENT_LOOPS);
        eventually("all descriptors are closed", || open_descriptors() == before);
    });
}

#[test]
fn running_out_of_descriptors_ends_when_they_are_free_again() {
    alone("running_out_of_descriptors_ends_when_they_are_free_again", || {
        let (_, server) = start();
        let limit = rustix::process::Rlimit { current: Some(100), maximum: Some(100) };
        rustix::process::setrlimit(rustix::process::Resource::Nofile, limit).unwrap();
        let mut hoard = Vec::new();
        while let Ok(file) = std::fs::File::open("/dev/null") {
            hoard.push(file);
        }
        // Every descriptor given back goes to a client or to the server, whoever is first; soon one client has its own
        // and the server none to accept it with.
        let mut answered = Vec::new();
        let mut client = loop {
            let Ok(stream) = TcpStream::connect(server.local_addr()) else {
                assert!(hoard.pop().is_some(), "the server is never short of descriptors");
                continue;
            };
            let mut client = Client { stream, received: Vec::new() };
            client.stream.set_read_timeout(Some(Duration::from_millis(300))).unwrap();
            client.send(get("/size/1"));
            match client.stream.peek(&mut [0]) {
                Ok(_) => answered.push(client),
                Err(error) => {
                    assert_eq!(error.kind(), ErrorKind::WouldBlock);
                    break client;
                }
            }
        };
        assert_eq!(server.connections_open(), answered.len());
        client.stream.set_read_timeout(Some(DEADLINE)).unwrap();
        drop(hoard);
        assert_eq!(client.answer().status, 200);
        for client in &mut answered {
            assert_eq!(client.answer().status, 200);
            assert_eq!(client.get("/size/1").status, 200);
        }
        assert_eq!(Client::connect(&server).get("/size/1").status, 200);
    });
}

#[test]
fn pipelining_does_not_grow_memory() {
    const REQUESTS: usize = 64 * 1024;
    alone("pipelining_does_not_grow_memory", || {
        let (_, server) = start();
        let mut client = Client::connect(&server);
        assert_eq!(client.get("/size/1").status, 200);
        let before = memory_peak_bytes();
        let mut sending = client.stream.try_clone().unwrap();
        let sender = thread::Builder::new().spawn(move || {
            let request = format!("GET /empty HTTP/1.1\r\nHost: test\r\nX: {}\r\n\r\n", "x".repeat(984));
            assert_eq!(request.len(), 1024);
            let batch = request.repeat(64);
            for _ in 0..REQUESTS / 64 {
                sending.write_all(batch.as_bytes()).unwrap();
            }
        });
        for _ in 0..REQUESTS {
            assert_eq!(client.answer().status, 204);
        }
        sender.unwrap().join().unwrap();
        let grown = memory_peak_bytes() - before;
        assert!(grown < 4 * 1024 * 1024, "{grown} bytes for 64 MiB of requests");
    });
}

fn memory_peak_bytes() -> usize {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap();
    line.trim().trim_end_matches(" kB").parse::<usize>().unwrap() * 1024
}

#[test]
fn a_client_that_does_not_read_is_cut_off() {
    let (_, server) = serve(Limits { write_timeout: Duration::from_millis(200), ..Limits::default() }, "http");
    let client = Client::connect(&server);
    client.stream.set_nonblocking(true).unwrap();
    let requests = get("/size/60000").repeat(1000);
    // More answers than any socket buffer holds; what of the requests does not fit either is not needed.
    let _ = (&client.stream).write(requests.as_bytes());
    eventually("the server has answered", || client.stream.peek(&mut [0]).is_ok());
    eventually("the connection ends", || server.connections_open() == 0);
}

/// Sends `bytes` one by one, until the server has had enough.
fn trickle(client: &mut Client, bytes: &[u8], pause: Duration) -> Answer {
    let mut sending = client.stream.try_clone().unwrap();
    let bytes = bytes.to_vec();
    let sender = thread::Builder::new().spawn(move || {
        for byte in bytes {
            if sending.write_all(&[byte]).is_err() {
                return;
            }
            thread::sleep(pause);
        }
    });
    let answer = client.answer();
    client.stream.shutdown(Shutdown::Both).unwrap();
    sender.unwrap().join().unwrap();
    answer
}

#[test]
fn trickling_clients_are_cut_off() {
    let limits = Limits {
        head_timeout: Duration::from_millis(300),
        body_timeout: Duration::from_millis(300),
        drain_timeout: Duration::from_millis(100),
        ..Limits::default()
    };
    let (_, server) = serve(limits, "http");
    let body = "PUT /echo HTTP/1.1\r\nHost: test\r\nContent-Length: 1000\r\n\r\n";
    let chunks = "PUT /small HTTP/1.1\r\nHost: test\r\nTransfer-Encoding: chunked\r\n\r\n";
    let long_head = format!("GET / HTTP/1.1\r\nHost: test\r\nX: {}", "x".repeat(1000));
    for (head, trickled) in [("", long_head), (body, "x".repeat(1000)), (chunks, "1\r\nx\r\n".repeat(1000))] {
        let mut client = Client::connect(&server);
        client.send(head);
        let begun = Instant::now();
        let answer = trickle(&mut client, trickled.as_bytes(), Duration::from_millis(30));
        assert_eq!((answer.status, answer.closes()), (408, true), "{head}");
        assert!(begun.elapsed() >= Duration::from_millis(290), "{head}");
        assert!(begun.elapsed() < Duration::from_secs(10), "{head}");
        eventually("the connection ends", || server.connections_open() == 0);
    }
}

#[test]
fn idle_connections_are_closed_in_silence() {
    let (_, server) = serve(Limits { idle_timeout: Duration::from_millis(100), ..Limits::default() }, "http");
    Client::connect(&server).assert_closed();
    let mut client = Client::connect(&server);
    assert_eq!(client.get("/size/1").status, 200);
    client.assert_closed();
}

#[test]
fn answers_of_several_segments_are_not_delayed() {
    let (_, server) = start();
    let mut client = Client::connect(&server);
    let mut median = |target: &str| {
        let mut times: Vec<Duration> = (0..201)
            .map(|_| {
                let begun = Instant::now();
                assert_eq!(client.get(target).status, 200);
                begun.elapsed()
            })
            .collect();
        times.sort_unstable();
        times[100]
    };
    let small = median("/size/30");
    for target in ["/size/3000", "/size/5000"] {
        let large = median(target);
        // A delayed acknowledgement would show as 40 ms.
        assert!(large < Duration::from_millis(10), "{target} takes {large:?}");
        assert!(large < small * 4 + Duration::from_micros(200), "{target} takes {large:?}, 30 bytes {small:?}");
    }
}

#[test]
fn connections_beyond_the_limit_are_told_to_come_again() {
    let (_, server) = serve(Limits { connections: 2, ..Limits::default() }, "http");
    let mut first = Client::connect(&server);
    let mut second = Client::connect(&server);
    assert_eq!(first.get("/size/1").status, 200);
    assert_eq!(second.get("/size/1").status, 200);
    let mut third = Client::connect(&server);
    let refused = third.answer();
    assert_eq!((refused.status, refused.closes()), (503, true));
    assert_eq!(refused.header("retry-after"), Some("1"));
    third.assert_closed();
    assert_eq!((server.connections_open(), server.connections_refused()), (2, 1));
    drop(first);
    eventually("there is room again", || server.connections_open() == 1);
    assert_eq!(Client::connect(&server).get("/size/1").status, 200);
    assert_eq!(second.get("/size/1").status, 200);
}

#[test]
fn clients_that_reset_or_send_rubbish_do_no_harm() {
    let (_, server) = start();
    // A fixed seed: any sequence will do, but the same each time.
    let mut state = 0x2545_f491_4f6c_dd1d_u64;
    let mut random = move || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state
    };
    for round in 0..300 {
        let client = Client::connect(&server);
        let mut bytes: Vec<u8> = (0..random() % 300).map(|_| random().to_le_bytes()[0]).collect();
        if round % 3 == 0 {
            bytes.splice(0..0, *b"PUT /echo HTTP/1.1\r\nHost: test\r\nTransfer-Encoding: chunked\r\n\r\n");
        }
        let _ = (&client.stream).write_all(&bytes);
        // Dropped with an answer unread, which resets the connection as often as not.
    }
    eventually("all connections end", || server.connections_open() == 0);
    assert_eq!(Client::connect(&server).get("/size/1").status, 200);
}

#[test]
fn a_request_cut_off_anywhere_is_never_answered_with_success() {
    let (_, server) = start();
    let request = put("/echo", "hello");
    for length in 0..request.len() {
        let mut client = Client::connect(&server);
        client.send(&request[..length]);
        client.stream.shutdown(Shutdown::Write).unwrap();
        if let Some(answer) = client.try_answer(false) {
            assert_eq!(answer.status, 400, "after {length} bytes");
        }
    }
    eventually("all connections end", || server.connections_open() == 0);
}

#[test]
fn a_panicking_service_costs_its_connection_and_its_place_is_given_back() {
    let (_, server) = serve(Limits { connections: 1, ..Limits::default() }, "http");
    let mut client = Client::connect(&server);
    client.send(get("/panic"));
    client.assert_closed();
    eventually("the place is free", || server.connections_open() == 0);
    assert_eq!(Client::connect(&server).get("/size/1").status, 200);
}

// Stopping.

#[test]
fn a_stop_answers_what_is_in_flight_and_ends_what_is_idle() {
    let (paths, server) = start();
    let addr = server.local_addr();
    let mut idle = Client::connect(&server);
    assert_eq!(idle.get("/size/1").status, 200);
    let mut half = Client::connect(&server);
    half.send("GET / HTTP/1.1\r\n");
    let (pieces, pieces_rx) = mpsc::channel();
    *paths.pieces.lock().unwrap() = Some(pieces);
    let mut streaming = Client::connect(&server);
    streaming.send("POST /stream HTTP/1.1\r\nHost: test\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n");
    assert_eq!(pieces_rx.recv_timeout(DEADLINE).unwrap(), b"hello", "the service has begun with it");
    let mut busy = Client::connect(&server);
    busy.send(get("/wait") + &get("/count"));
    eventually("the request waits", || paths.waiting.load(Ordering::SeqCst));

    let stopping = thread::Builder::new().spawn(move || server.stop(DEADLINE)).unwrap();
    idle.assert_closed();
    half.assert_closed();
    assert!(streaming.answer().closes());
    eventually("the port is closed", || TcpStream::connect(addr).is_err());
    assert!(!stopping.is_finished());
    paths.open_gate();
    let answer = busy.answer();
    assert_eq!((answer.body.as_slice(), answer.closes()), (&b"waited"[..], true));
    busy.assert_closed();
    assert_eq!(stopping.join().unwrap().cut_off, 0);
    // The port is free for the next process.
    Listener::bind(addr).unwrap();
}

#[test]
fn a_stop_cuts_off_what_takes_too_long() {
    let (paths, server) = start();
    let mut busy = Client::connect(&server);
    busy.send(get("/wait"));
    eventually("the request waits", || paths.waiting.load(Ordering::SeqCst));
    assert_eq!(server.stop(Duration::from_millis(50)).cut_off, 1);
    busy.assert_closed();
    eventually("the service sees it", || paths.saw_client_gone.load(Ordering::SeqCst));
}

#[test]
fn a_stop_waits_for_bodies_that_are_on_their_way() {
    let (_, server) = start();
    let addr = server.local_addr();
    let mut client = Client::connect(&server);
    client.send("PUT /echo HTTP/1.1\r\nHost: test\r\nExpect: 100-continue\r\nContent-Length: 5\r\n\r\n");
    assert_eq!(client.answer().status, 100);
    let stopping = thread::Builder::new().spawn(move || server.stop(DEADLINE)).unwrap();
    eventually("the port is closed", || TcpStream::connect(addr).is_err());
    client.send("hello");
    let answer = client.answer();
    assert_eq!((answer.body.as_slice(), answer.closes()), (&b"hello"[..], true));
    assert_eq!(stopping.join().unwrap().cut_off, 0);
}

#[test]
fn a_body_that_breaks_off_is_refused() {
    let (_, server) = start();
    let mut client = Client::connect(&server);
    client.send("PUT /echo HTTP/1.1\r\nHost: test\r\nContent-Length: 5\r\n\r\nhel");
    client.stream.shutdown(Shutdown::Write).unwrap();
    let answer = client.answer();
    assert_eq!((answer.status, answer.closes()), (400, true));
}

#[test]
fn a_stop_is_quick_when_many_connections_are_idle() {
    let (_, server) = start();
    let mut clients: Vec<Client> = (0..100).map(|_| Client::connect(&server)).collect();
    for client in &mut clients {
        assert_eq!(client.get("/size/1").status, 200);
    }
    let begun = Instant::now();
    assert_eq!(server.stop(DEADLINE).cut_off, 0);
    assert!(begun.elapsed() < DEADLINE / 2);
}
