//! A client that sends exactly the bytes it is given.

use std::collections::BTreeSet;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

use super::description;

/// How long an answer may take before the test fails.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(60);

/// One connection, opened again when the server has closed it. Every answer must be as documented.
pub(super) struct Client {
    server: SocketAddr,
    stream: Option<TcpStream>,
    /// The documented operations that were asked for, by their ids, and the statuses that they got.
    pub(super) seen: BTreeSet<(&'static str, u16)>,
}

/// An answer as it came.
#[derive(Clone, Debug)]
pub(super) struct Answer {
    pub(super) status: u16,
    pub(super) fields: Vec<(String, String)>,
    pub(super) body: Vec<u8>,
}

impl Answer {
    /// The value of the only line of a header field.
    pub(super) fn field(&self, name: &str) -> Option<&str> {
        let mut values = self.fields.iter().filter(|(other, _)| other.eq_ignore_ascii_case(name));
        let value = values.next().map(|(_, value)| &**value);
        assert!(values.next().is_none(), "{name} is repeated: {self:?}");
        value
    }

    pub(super) fn json(&self) -> serde_json::Value {
        serde_json::from_slice(&self.body).unwrap_or_else(|error| panic!("{error}: {self:?}"))
    }
}

impl Client {
    pub(super) fn new(server: SocketAddr) -> Self {
        Client { server, stream: None, seen: BTreeSet::new() }
    }

    /// Sends a request whose first line begins with `request`, with these header lines and this body.
    pub(super) fn send(&mut self, request: &str, fields: &[&str], body: &[u8]) -> Answer {
        let mut raw = format!("{request} HTTP/1.1\r\nHost: test\r\n").into_bytes();
        for field in fields {
            raw.extend_from_slice(field.as_bytes());
            raw.extend_from_slice(b"\r\n");
        }
        if !body.is_empty() || ["PUT", "POST"].iter().any(|method| request.starts_with(method)) {
            raw.extend_from_slice(format!("Content-Length: {}\r\n", body.len()).as_bytes());
        }
        raw.extend_from_slice(b"\r\n");
        raw.extend_from_slice(body);
        self.send_raw(&raw, request.starts_with("HEAD"))
    }

    /// Sends these bytes and reads one answer.
    pub(super) fn send_raw(&mut self, raw: &[u8], head_only: bool) -> Answer {
        self.connect().write_all(raw).expect("the server reads");
        self.receive(raw, head_only)
    }

    /// Reads one answer, to a request that begins with `raw`.
    pub(super) fn receive(&mut self, raw: &[u8], head_only: bool) -> Answer {
        let answer = read_answer(self.connect(), head_only);
        if answer.field("Connection") == Some("close") {
            self.stream = None;
        }
        if let Some(operation) = description::check(raw, &answer) {
            self.seen.insert((operation.id(), answer.status));
        }
        answer
    }

    fn connect(&mut self) -> &mut TcpStream {
        self.stream.get_or_insert_with(|| {
            let stream = TcpStream::connect(self.server).expect("the server listens");
            stream.set_read_timeout(Some(ANSWER_TIMEOUT)).expect("a timeout can be set");
            stream
        })
    }
}

fn read_answer(stream: &mut TcpStream, head_only: bool) -> Answer {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        let mut byte = [0];
        stream.read_exact(&mut byte).unwrap_or_else(|error| panic!("{error} after '{}'", head.escape_ascii()));
        head.push(byte[0]);
    }
    let head = String::from_utf8(head).expect("heads of ours are ASCII");
    let mut lines = head.trim_end().split("\r\n");
    let status = lines.next().and_then(|line| line.split(' ').nth(1)).and_then(|status| status.parse().ok());
    let fields = lines.map(|line| line.split_once(": ").expect("a name and a value"));
    let fields = fields.map(|(name, value)| (name.to_owned(), value.to_owned())).collect();
    let mut answer = Answer { status: status.expect("a status line"), fields, body: Vec::new() };
    let length = answer.field("Content-Length").map_or(0, |length| length.parse().expect("a length"));
    if !head_only {
        answer.body.resize(length, 0);
        stream.read_exact(&mut answer.body).expect("the whole body");
    }
    answer
}
