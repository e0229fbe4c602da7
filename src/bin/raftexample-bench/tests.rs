//! Whole measurements of small servers in this process, each a thread for a connection, which do as a test wants.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use clap::Parser;

use crate::command_line::CommandLine;
use crate::options::{Api, Options, TargetChoice};
use crate::report::{Point, Report};
use crate::run::{measure_while, run};

const NO_CONTENT: &str = "HTTP/1.1 204 No Content\r\nETag: \"7\"\r\n\r\n";
const REFUSED: &str = "HTTP/1.1 503 Service Unavailable\r\nRetry-After: 1\r\nContent-Length: 2\r\n\r\n{}";
const UNKNOWN: &str = "HTTP/1.1 504 Gateway Timeout\r\nContent-Length: 2\r\n\r\n{}";
const HELLO: &str = "HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nContent-Length: 5\r\n\r\nhello";

/// What a server does about a request; its number counts from 0, over all connections.
type Behaviour = dyn Fn(u64, &Request, &mut TcpStream) -> Then + Send + Sync;

enum Then {
    KeepOpen,
    Close,
}

struct Request {
    /// As in `PUT /key`.
    line: String,
    body: Vec<u8>,
}

/// Serves until it is dropped.
struct Server {
    address: SocketAddr,
    requests: Arc<AtomicU64>,
    /// How often which request came.
    lines: Arc<Mutex<BTreeMap<String, u64>>>,
    stopping: Arc<AtomicBool>,
}

impl Server {
    fn start(behaviour: impl Fn(u64, &Request, &mut TcpStream) -> Then + Send + Sync + 'static) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let server = Self {
            address: listener.local_addr().unwrap(),
            requests: Arc::default(),
            lines: Arc::default(),
            stopping: Arc::default(),
        };
        let (requests, lines, stopping) = (server.requests.clone(), server.lines.clone(), server.stopping.clone());
        let behaviour: Arc<Behaviour> = Arc::new(behaviour);
        spawn("accept", move || {
            while let Ok((stream, _)) = listener.accept() {
                if stopping.load(Ordering::Relaxed) {
                    return;
                }
                let (requests, lines, behaviour) = (requests.clone(), lines.clone(), behaviour.clone());
                spawn("serve", move || serve(stream, &requests, &lines, &*behaviour));
            }
        });
        server
    }

    /// Answers everything with the same text.
    fn answering(text: &'static str) -> Self {
        Self::start(move |_, _, stream| write(stream, text))
    }

    fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    fn requests(&self) -> u64 {
        self.requests.load(Ordering::Relaxed)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.stopping.store(true, Ordering::Relaxed);
        // Wakes it, so that it sees.
        let _ = TcpStream::connect(self.address);
    }
}

fn spawn(name: &str, body: impl FnOnce() + Send + 'static) {
    thread::Builder::new().name(name.to_owned()).spawn(body).unwrap();
}

fn serve(stream: TcpStream, requests: &AtomicU64, lines: &Mutex<BTreeMap<String, u64>>, behaviour: &Behaviour) {
    stream.set_nodelay(true).unwrap();
    let mut writer = stream.try_clone().unwrap();
    let mut reader = BufReader::new(stream);
    while let Some(request) = read_request(&mut reader) {
        let number = requests.fetch_add(1, Ordering::Relaxed);
        *lines.lock().unwrap().entry(request.line.clone()).or_default() += 1;
        match behaviour(number, &request, &mut writer) {
            Then::KeepOpen => {}
            Then::Close => return,
        }
    }
}

/// None: the client has closed the connection.
fn read_request(reader: &mut BufReader<TcpStream>) -> Option<Request> {
    let mut line = String::new();
    let mut body_bytes = 0;
    loop {
        let mut header = String::new();
        if reader.read_line(&mut header).ok()? == 0 {
            return None;
        }
        match header.trim_end() {
            "" => break,
            text if line.is_empty() => line = text.trim_end_matches(" HTTP/1.1").to_owned(),
            text => {
                if let Some(length) = text.strip_prefix("Content-Length: ") {
                    body_bytes = length.parse().unwrap();
                }
            }
        }
    }
    let mut body = vec![0; body_bytes];
    reader.read_exact(&mut body).ok()?;
    Some(Request { line, body })
}

fn write(stream: &mut TcpStream, text: &str) -> Then {
    match stream.write_all(text.as_bytes()) {
        Ok(()) => Then::KeepOpen,
        Err(_) => Then::Close,
    }
}

/// Runs with a short measurement and no warm-up, unless `arguments` say otherwise, on `servers`.
fn bench(servers: &[&Server], arguments: &[&str]) -> (Result<Report, String>, String) {
    let endpoints = servers.iter().map(|server| server.url()).collect::<Vec<_>>().join(",");
    let defaults = ["raftexample-bench", "--target=all", "--warm-up=0", "--duration=300ms", "--endpoints", &endpoints];
    let mut line: Vec<_> = defaults.to_vec();
    // The later of two equal flags would be an error.
    line.retain(|default| {
        let flag = default.split('=').next().unwrap();
        !arguments.iter().any(|argument| flag.starts_with("--") && argument.split('=').next() == Some(flag))
    });
    line.extend(arguments);
    let options = Options::from_cli(CommandLine::try_parse_from(line).unwrap().load).unwrap();
    let mut out = Vec::new();
    let report = run(&options, &mut out);
    (report, String::from_utf8(out).unwrap())
}

/// The only point of a run.
fn point(servers: &[&Server], arguments: &[&str]) -> Point {
    let (report, _) = bench(servers, arguments);
    let mut points = report.unwrap().points;
    assert_eq!(points.len(), 1);
    points.remove(0)
}

#[test]
fn closed_loop_counts_every_request_once() {
    for (threads, connections) in [("--threads=1", "--connections=1"), ("--threads=2", "--connections=7")] {
        let server = Server::answering(NO_CONTENT);
        let point = point(&[&server], &[threads, connections]);
        assert!(point.latency.count > 0);
        // Without a warm-up everything that was sent counts.
        assert_eq!(point.latency.count, server.requests());
        assert_eq!((point.failed, point.unknown), (0, 0));
        assert!(point.requests_per_second <= point.latency.count as f64 / 0.3);
        assert!(point.latency.min_us <= point.latency.p50_us && point.latency.p50_us <= point.latency.max_us);
        assert!(point.generator.processor_us_per_request > 0.0);
    }
}

#[test]
fn warm_up_does_not_count() {
    // Slow first, so that one request of the warm-up would show.
    let server = Server::start(|number, _, stream| {
        if number == 0 {
            thread::sleep(Duration::from_millis(500));
        }
        write(stream, NO_CONTENT)
    });
    let point = point(&[&server], &["--warm-up=400ms", "--connections=1", "--rate=100"]);
    // Requests 40 to 69 are those of the window; the first of them still waited 100 ms for the slow one.
    assert_eq!(point.latency.count, 30);
    assert_eq!(server.requests(), 70);
    assert!(point.latency.max_us < 480_000.0, "{:?}", point.latency);
}

#[test]
fn what_starts_while_work_is_done_counts() {
    let server = Server::answering(NO_CONTENT);
    let url = server.url().parse().unwrap();
    let warm_up = Duration::from_millis(50);
    let options = Options { target: TargetChoice::All, warm_up, ..Options::closed_loop(vec![url], Api::Raftexample) };
    let mut meanwhile = 0;
    let work = || {
        let before = server.requests();
        let deadline = Instant::now() + Duration::from_secs(20);
        while server.requests() < before + 100 && Instant::now() < deadline {
            thread::sleep(Duration::from_millis(1));
        }
        meanwhile = server.requests() - before;
        Ok(())
    };
    let point = measure_while(&options, 2, work).unwrap();
    assert!(meanwhile >= 100, "{meanwhile}");
    // Both connections may have been waiting for an answer when the work began.
    assert!(point.latency.count >= meanwhile - 2, "{} of {meanwhile}", point.latency.count);
    assert!(point.latency.count < server.requests(), "the warm-up was counted");
    assert_eq!(measure_while(&options, 2, || Err("it failed".to_owned())).unwrap_err(), "it failed");
}

#[test]
fn what_is_no_success_is_counted_apart_and_has_no_latency() {
    let server = Server::start(|number, _, stream| match number % 4 {
        0 => write(stream, NO_CONTENT),
        1 => {
            // It would show in the latencies.
            thread::sleep(Duration::from_millis(30));
            write(stream, REFUSED)
        }
        2 => {
            thread::sleep(Duration::from_millis(30));
            write(stream, UNKNOWN)
        }
        _ => write(stream, "HTTP/1.1 413 Content Too Large\r\nContent-Length: 0\r\n\r\n"),
    });
    let point = point(&[&server], &["--connections=1"]);
    let requests = server.requests();
    let of_kind = |kind: u64| requests / 4 + u64::from(requests % 4 > kind);
    assert_eq!(point.latency.count, of_kind(0));
    assert_eq!(point.failures["status 503"], of_kind(1));
    assert_eq!(point.failures["status 504"], of_kind(2));
    assert_eq!(point.failures["status 413"], of_kind(3));
    assert_eq!(point.failed, of_kind(1) + of_kind(3));
    assert_eq!(point.unknown, of_kind(2));
    assert!(point.latency.p50_us < 30_000.0, "{:?}", point.latency);
}

#[test]
fn answers_may_come_in_pieces_and_requests_go_out_in_pieces() {
    let server = Server::start(|number, request, stream| {
        assert_eq!(request.body.len(), 8 << 20);
        if number % 2 == 0 {
            return write(stream, NO_CONTENT);
        }
        for piece in HELLO.as_bytes().chunks(20) {
            stream.write_all(piece).unwrap();
            thread::sleep(Duration::from_millis(2));
        }
        Then::KeepOpen
    });
    let point = point(&[&server], &["--connections=2", "--value-bytes=8MiB"]);
    assert!(point.latency.count >= 2);
    assert_eq!(point.latency.count, server.requests());
    assert_eq!((point.failed, point.unknown), (0, 0));
}

#[test]
fn open_loop_starts_by_the_clock() {
    let server = Server::answering(NO_CONTENT);
    let point = point(&[&server], &["--rate=700", "--connections=8", "--threads=2", "--duration=1s"]);
    assert_eq!(point.latency.count, 700);
    assert_eq!(server.requests(), 700);
    assert!((500.0..=700.0).contains(&point.requests_per_second), "{}", point.requests_per_second);
}

#[test]
fn open_loop_counts_latency_from_the_intended_start() {
    let server = Server::start(|number, _, stream| {
        if number == 100 {
            thread::sleep(Duration::from_millis(200));
        }
        write(stream, NO_CONTENT)
    });
    let point = point(&[&server], &["--rate=500", "--connections=1", "--duration=1s"]);
    assert_eq!(point.latency.count, 500);
    // It sends one at a time: 100 of the 500 fell into the stall, and waited from 200 ms down to nothing.
    assert!(point.latency.max_us >= 200_000.0, "{:?}", point.latency);
    assert!(point.latency.p99_us >= 180_000.0, "{:?}", point.latency);
    assert!(point.latency.p90_us >= 80_000.0, "{:?}", point.latency);
    assert!(point.latency.mean_us >= 15_000.0, "{:?}", point.latency);
}

#[test]
fn requests_that_find_no_connection_are_counted() {
    let server = Server::start(|number, _, stream| {
        if number == 0 {
            return write(stream, NO_CONTENT);
        }
        thread::sleep(Duration::from_millis(400));
        Then::Close
    });
    let point = point(&[&server], &["--rate=100", "--connections=1", "--timeout=150ms"]);
    assert_eq!(point.latency.count, 1);
    // Whichever way, all 30 are accounted for.
    assert_eq!(point.failed + point.unknown, 29);
    assert!(point.failures["timed out"] >= 1);
    assert!(point.failures["not sent in time"] >= 1);
}

#[test]
fn lost_connections_are_made_again() {
    let server = Server::start(|number, _, stream| match number % 4 {
        0 => write(stream, NO_CONTENT),
        1 => Then::Close,
        2 => {
            let _ = write(stream, "HTTP/1.1 204 No Content\r\nConnection: close\r\n\r\n");
            Then::Close
        }
        _ => {
            let _ = write(stream, "HTTP/1.1 200 OK\r\nContent-Length: 50\r\n\r\nnot all");
            Then::Close
        }
    });
    let point = point(&[&server], &["--connections=3"]);
    let requests = server.requests();
    assert!(requests > 12);
    assert_eq!(point.latency.count + point.unknown, requests);
    assert_eq!(point.failures.keys().collect::<Vec<_>>(), ["connection lost"]);
}

#[test]
fn nobody_there_is_an_error() {
    let address = Server::answering(NO_CONTENT).address;
    // The listener is gone when a connection to it is refused.
    while TcpStream::connect(address).is_ok() {
        thread::yield_now();
    }
    let gone = Server { address, requests: Arc::default(), lines: Arc::default(), stopping: Arc::default() };
    assert!(bench(&[&gone], &[]).0.unwrap_err().contains("failed to connect"));
}

#[test]
fn no_success_at_all_is_an_error() {
    let server = Server::answering(REFUSED);
    let (report, table) = bench(&[&server], &["--connections=1"]);
    assert!(report.unwrap_err().contains("no request succeeded"));
    assert!(table.contains("status 503"), "{table}");
}

#[test]
fn connections_go_to_all_targets_and_all_threads() {
    let servers = [Server::answering(HELLO), Server::answering(HELLO), Server::answering(HELLO)];
    let servers: Vec<_> = servers.iter().collect();
    let point = point(&servers, &["--connections=3", "--threads=2", "--rate=300", "--api=raw"]);
    assert_eq!(point.latency.count, 90);
    assert!(servers.iter().all(|server| server.requests() > 0));
    assert_eq!(servers.iter().map(|server| server.requests()).sum::<u64>(), 90);
}

#[test]
fn load_goes_to_the_leader_or_to_the_followers() {
    let node = |role: &'static str| {
        Server::start(move |_, request, stream| match request.line.as_str() {
            "GET /_/status" => {
                let body = format!(r#"{{"id": 1, "role": "{role}", "leader": 2, "members": []}}"#);
                write(stream, &format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n{body}", body.len()))
            }
            _ => write(stream, NO_CONTENT),
        })
    };
    let (one, two, three) = (node("follower"), node("leader"), node("follower"));
    let loaded = |target| {
        let point = point(&[&one, &two, &three], &[target, "--connections=2"]);
        point.targets.iter().map(|url| url.trim_end_matches('/').to_owned()).collect::<Vec<_>>()
    };
    assert_eq!(loaded("--target=leader"), [two.url()]);
    assert_eq!(loaded("--target=follower"), [one.url(), three.url()]);
    assert_eq!(loaded(&format!("--target={}", three.url())), [three.url()]);
}

#[test]
fn reads_find_all_keys_written() {
    let server = Server::start(|_, request, stream| {
        write(stream, if request.line.starts_with("PUT") { NO_CONTENT } else { HELLO })
    });
    let point = point(&[&server], &["--operation=get", "--keys=101", "--threads=2", "--connections=4"]);
    let lines = server.lines.lock().unwrap();
    let puts: Vec<_> = lines.iter().filter(|(line, _)| line.starts_with("PUT")).collect();
    assert_eq!(puts.len(), 101);
    assert!(puts.iter().all(|(_, count)| **count == 1));
    assert_eq!(point.latency.count, server.requests() - 101);
    assert!(lines.keys().filter(|line| line.starts_with("GET")).count() <= 101);
}

#[test]
fn a_fill_that_fails_ends_the_run() {
    let server = Server::answering(REFUSED);
    let (report, _) = bench(&[&server], &["--operation=get", "--keys=101"]);
    let refusal = report.unwrap_err();
    assert!(refusal.contains("status 503") && refusal.contains("--no-fill"), "{refusal}");
}

#[test]
fn mixed_requests_keep_to_the_ratio_and_have_their_own_latencies() {
    let server = Server::start(|_, request, stream| {
        write(stream, if request.line.starts_with("PUT") { NO_CONTENT } else { HELLO })
    });
    let arguments = ["--operation=mixed", "--put-ratio=0.25", "--no-fill", "--rate=4000", "--connections=4"];
    let point = point(&[&server], &arguments);
    let (puts, gets) = (point.put_latency.unwrap().count, point.get_latency.unwrap().count);
    assert_eq!(puts + gets, 1200);
    assert_eq!(point.latency.count, 1200);
    // Five standard deviations around 300.
    assert!((225..375).contains(&puts), "{puts}");
}

#[test]
fn a_sweep_fills_the_table_the_json_and_the_plot() {
    let server = Server::answering(NO_CONTENT);
    let directory = tempfile::tempdir().unwrap();
    let (json, plot) = (directory.path().join("a.json"), directory.path().join("a.svg"));
    let files = [format!("--json={}", json.display()), format!("--plot={}", plot.display())];
    let arguments = ["--connections=1,2,8", "--duration=100ms", "--distribution=zipf", &files[0], &files[1]];
    let (report, table) = bench(&[&server], &arguments);
    assert_eq!(report.unwrap().points.len(), 3);

    let rows: Vec<_> = table.lines().skip(2).filter(|line| !line.contains("generator")).collect();
    assert_eq!(rows.len(), 3, "{table}");
    for (row, connections) in rows.iter().zip(["1", "2", "8"]) {
        assert_eq!(row.split_whitespace().next(), Some(connections), "{table}");
        assert_eq!(row.split_whitespace().count(), table.lines().nth(1).unwrap().split_whitespace().count() - 2);
    }

    let text = std::fs::read_to_string(json).unwrap();
    let report: Report = serde_json::from_str(&text).unwrap();
    assert_eq!(report.points.iter().map(|point| point.connections).collect::<Vec<_>>(), [1, 2, 8]);
    assert_eq!((report.operation.as_str(), report.zipf_exponent), ("put", Some(0.99)));
    let total: u64 = report.points.iter().map(|point| point.latency.count).sum();
    assert_eq!(total, server.requests());

    let svg = std::fs::read_to_string(plot).unwrap();
    assert!(svg.starts_with("<svg") && svg.trim_end().ends_with("</svg>"));
    for part in ["p50", "p99.9", "c=8", "requests per second", "polyline"] {
        assert!(svg.contains(part), "no {part} in the plot");
    }
}
