use std::fmt;
use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::{Duration, Instant};

/// How long a request may take in all. Above the request timeout of every test's cluster, so that running into it is
/// a defect of the node.
pub(crate) const CLIENT_TIMEOUT: Duration = Duration::from_secs(15);

/// A client with one keep-alive connection.
pub(crate) struct Client {
    address: SocketAddr,
    /// How long a connection, and then a request, may take.
    timeouts: (Duration, Duration),
    connection: Option<Connection>,
}

/// An answer.
#[derive(Debug)]
pub(crate) struct Response {
    pub(crate) status: u16,
    headers: Vec<(String, String)>,
    pub(crate) body: Vec<u8>,
}

/// Why there is no answer.
#[derive(Debug)]
pub(crate) enum Failure {
    /// No connection could be made: the node has not seen the request.
    NotSent(io::Error),
    /// The connection broke under the request, which the node may or may not have seen.
    Lost(io::Error),
    /// No answer came in time.
    TimedOut,
}

impl Client {
    pub(crate) fn new(address: SocketAddr) -> Self {
        Self::with_timeouts(address, CLIENT_TIMEOUT, CLIENT_TIMEOUT)
    }

    /// One that waits for a connection, and for an answer, no longer than this.
    pub(crate) fn with_timeouts(address: SocketAddr, connect: Duration, answer: Duration) -> Self {
        Self { address, timeouts: (connect, answer), connection: None }
    }

    /// Sends a request and waits for its answer. `target` stands in the request line as it is.
    pub(crate) fn request(
        &mut self,
        method: &str,
        target: &str,
        headers: &[(&str, &str)],
        body: &[u8],
    ) -> Result<Response, Failure> {
        self.send(method, target, headers, body)?;
        self.receive(method)
    }

    /// Sends a request, and leaves its answer for [`Self::receive`].
    pub(crate) fn send(
        &mut self,
        method: &str,
        target: &str,
        headers: &[(&str, &str)],
        body: &[u8],
    ) -> Result<(), Failure> {
        // The node closes connections that idle, or when it stops. That a request on such a one is lost is no finding.
        self.connection.take_if(|connection| connection.is_closed());
        let connection = match &mut self.connection {
            Some(connection) => connection,
            none => none.insert(Connection::open(self.address, self.timeouts).map_err(Failure::NotSent)?),
        };
        let mut message = format!("{method} {target} HTTP/1.1\r\nHost: {}\r\n", self.address).into_bytes();
        for (name, value) in headers {
            write!(message, "{name}: {value}\r\n").unwrap();
        }
        if !body.is_empty() || method == "PUT" {
            write!(message, "Content-Length: {}\r\n", body.len()).unwrap();
        }
        message.extend_from_slice(b"\r\n");
        message.extend_from_slice(body);
        connection.deadline = Instant::now() + self.timeouts.1;
        connection.stream.write_all(&message).map_err(|error| {
            self.connection = None;
            Failure::Lost(error)
        })
    }

    /// Waits for the answer to what [`Self::send`] has sent.
    pub(crate) fn receive(&mut self, method: &str) -> Result<Response, Failure> {
        let mut connection = self.connection.take().expect("send comes first");
        let response = connection.read_response(method).map_err(|error| match error.kind() {
            io::ErrorKind::TimedOut | io::ErrorKind::WouldBlock => Failure::TimedOut,
            _ => Failure::Lost(error),
        })?;
        if response.header("connection").is_none_or(|value| !value.eq_ignore_ascii_case("close")) {
            self.connection = Some(connection);
        }
        Ok(response)
    }

    /// GET; a failure fails the test.
    #[track_caller]
    pub(crate) fn get(&mut self, target: &str) -> Response {
        self.must("GET", target, b"")
    }

    /// PUT; a failure fails the test.
    #[track_caller]
    pub(crate) fn put(&mut self, target: &str, value: &[u8]) -> Response {
        self.must("PUT", target, value)
    }

    /// Any request without headers; a failure fails the test.
    #[track_caller]
    pub(crate) fn must(&mut self, method: &str, target: &str, body: &[u8]) -> Response {
        match self.request(method, target, &[], body) {
            Ok(response) => response,
            Err(failure) => panic!("{method} {target} at {}: {failure}", self.address),
        }
    }
}

impl Response {
    /// The value of a header; `name` in lower case.
    pub(crate) fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(known, _)| known == name).map(|(_, value)| value.as_str())
    }

    /// The body as text, for messages and comparisons.
    pub(crate) fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }

    /// The body as JSON.
    #[track_caller]
    pub(crate) fn json(&self) -> serde_json::Value {
        serde_json::from_slice(&self.body).unwrap_or_else(|error| panic!("{error} in {}", self.text()))
    }

    /// The `outcome` of a refused write; empty if the answer has none.
    pub(crate) fn outcome(&self) -> String {
        let problem: serde_json::Value = serde_json::from_slice(&self.body).unwrap_or_default();
        problem["outcome"].as_str().unwrap_or_default().to_owned()
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NotSent(error) => write!(f, "no connection: {error}"),
            Self::Lost(error) => write!(f, "lost: {error}"),
            Self::TimedOut => f.write_str("no answer in time"),
        }
    }
}

struct Connection {
    stream: TcpStream,
    buffer: Vec<u8>,
    deadline: Instant,
}

impl Connection {
    fn open(address: SocketAddr, (connect, answer): (Duration, Duration)) -> io::Result<Self> {
        let stream = TcpStream::connect_timeout(&address, connect)?;
        stream.set_nodelay(true)?;
        stream.set_write_timeout(Some(answer))?;
        Ok(Self { stream, buffer: Vec::new(), deadline: Instant::now() })
    }

    /// Whether the other side has closed it, or has sent what nobody asked for.
    fn is_closed(&self) -> bool {
        let mut byte = [0];
        let peeked = self.stream.set_nonblocking(true).and_then(|()| self.stream.peek(&mut byte));
        let open = matches!(&peeked, Err(error) if error.kind() == io::ErrorKind::WouldBlock);
        !open || self.stream.set_nonblocking(false).is_err()
    }

    fn read_response(&mut self, method: &str) -> io::Result<Response> {
        let mut response = self.read_head()?;
        while response.status < 200 {
            response = self.read_head()?;
        }
        if method == "HEAD" || matches!(response.status, 204 | 304) {
            return Ok(response);
        }
        if response.header("transfer-encoding").is_some_and(|coding| coding.eq_ignore_ascii_case("chunked")) {
            response.body = self.read_chunks()?;
        } else if let Some(length) = response.header("content-length") {
            let length = length.parse().map_err(|_| invalid("a bad Content-Length"))?;
            response.body = self.read_exactly(length)?;
        } else {
            return Err(invalid("a body without a length on a keep-alive connection"));
        }
        Ok(response)
    }

    fn read_head(&mut self) -> io::Result<Response> {
        loop {
            let mut headers = [httparse::EMPTY_HEADER; 64];
            let mut head = httparse::Response::new(&mut headers);
            match head.parse(&self.buffer).map_err(|error| invalid(&error.to_string()))? {
                httparse::Status::Complete(length) => {
                    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
                    let response = Response {
                        status: head.code.unwrap_or_default(),
                        headers: head.headers.iter().map(|h| (h.name.to_lowercase(), text(h.value))).collect(),
                        body: Vec::new(),
                    };
                    self.buffer.drain(..length);
                    return Ok(response);
                }
                httparse::Status::Partial => self.read_more()?,
            }
        }
    }

    fn read_chunks(&mut self) -> io::Result<Vec<u8>> {
        let mut body = Vec::new();
        loop {
            let line = loop {
                match self.buffer.windows(2).position(|pair| pair == b"\r\n") {
                    Some(end) => break self.read_exactly(end + 2)?,
                    None => self.read_more()?,
                }
            };
            let digits = String::from_utf8_lossy(&line);
            let length = usize::from_str_radix(digits.trim(), 16).map_err(|_| invalid("a bad chunk size"))?;
            let chunk = self.read_exactly(length + 2)?;
            if length == 0 {
                return Ok(body);
            }
            body.extend_from_slice(&chunk[..length]);
        }
    }

    fn read_exactly(&mut self, length: usize) -> io::Result<Vec<u8>> {
        while self.buffer.len() < length {
            self.read_more()?;
        }
        Ok(self.buffer.drain(..length).collect())
    }

    fn read_more(&mut self) -> io::Result<()> {
        let left = self.deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(io::ErrorKind::TimedOut.into());
        }
        self.stream.set_read_timeout(Some(left))?;
        let mut bytes = [0; 16 << 10];
        match self.stream.read(&mut bytes)? {
            0 => Err(io::Error::new(io::ErrorKind::UnexpectedEof, "the node closed the connection")),
            length => {
                self.buffer.extend_from_slice(&bytes[..length]);
                Ok(())
            }
        }
    }
}

fn invalid(reason: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, reason)
}
