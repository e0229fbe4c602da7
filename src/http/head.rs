//! Request heads: where one ends, what it says, and which ones are refused.

use std::borrow::Cow;
use std::mem::MaybeUninit;
use std::net::TcpStream;
use std::str::FromStr;

use rustix::net::RecvFlags;
use tiny_http::{HTTPVersion, Method, StatusCode};

use super::fault::Fault;
use super::limits::{HEADERS_MAX, Limits};

/// Room for the header lines of one head; lives on the connection thread's stack.
pub(super) type HeaderSlots<'a> = [MaybeUninit<httparse::Header<'a>>; HEADERS_MAX];

/// How the end of a body is found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Framing {
    /// Exactly so many bytes follow the head; 0 without a `Content-Length`.
    Length(u64),
    /// Chunks, each with its size, up to one of size 0.
    Chunked,
}

/// Method, target and headers of a request. Borrowed from the connection's buffer.
#[derive(Debug)]
pub struct Head<'a> {
    method: Method,
    target: Cow<'a, [u8]>,
    version: HTTPVersion,
    headers: &'a [httparse::Header<'a>],
    framing: Framing,
    keep_alive: bool,
    expects_continue: bool,
    client: Option<&'a TcpStream>,
}

impl<'a> Head<'a> {
    /// The method; one that no RFC names is `NonStandard`. `CONNECT` never gets here.
    pub fn method(&self) -> &Method {
        &self.method
    }

    /// Path and query as they were sent: undecoded, and beginning with `/`. Of an absolute-form target only this part
    /// is left. The one exception is `*`, which comes only with `OPTIONS`.
    pub fn target(&self) -> &[u8] {
        &self.target
    }

    /// 1.0 or 1.1.
    pub fn version(&self) -> &HTTPVersion {
        &self.version
    }

    /// All header lines in the order they were sent, values without surrounding blanks. Values may hold bytes above
    /// 0x7f.
    pub fn headers(&self) -> impl Iterator<Item = (&'a str, &'a [u8])> + use<'a> {
        self.headers.iter().map(|header| (header.name, header.value))
    }

    /// The values of every header line of that name, in order. Names are compared without regard to case.
    pub fn get_all(&self, name: &str) -> impl Iterator<Item = &'a [u8]> {
        self.headers().filter(move |(other, _)| other.eq_ignore_ascii_case(name)).map(|(_, value)| value)
    }

    /// The value of the first header line of that name.
    pub fn get(&self, name: &str) -> Option<&'a [u8]> {
        self.headers().find(|(other, _)| other.eq_ignore_ascii_case(name)).map(|(_, value)| value)
    }

    /// How many bytes of body follow; 0 if the request has none, `None` if it comes in chunks. A declared length too
    /// large for the type is `u64::MAX`.
    pub fn content_length(&self) -> Option<u64> {
        match self.framing {
            Framing::Length(bytes) => Some(bytes),
            Framing::Chunked => None,
        }
    }

    /// Whether the client has closed its side, so that an answer would be for nobody. For requests that wait long;
    /// one system call that never blocks. Not noticed while bytes of a further request lie unread.
    pub fn client_gone(&self) -> bool {
        let Some(client) = self.client else { return false };
        let mut byte = [0; 1];
        match rustix::net::recv(client, &mut byte, RecvFlags::PEEK | RecvFlags::DONTWAIT) {
            Ok((_, received)) => received == 0,
            Err(error) => error != rustix::io::Errno::AGAIN && error != rustix::io::Errno::INTR,
        }
    }

    pub(super) fn framing(&self) -> Framing {
        self.framing
    }

    /// Whether the client allows another request on this connection.
    pub(super) fn keep_alive(&self) -> bool {
        self.keep_alive
    }

    /// Whether the client holds its body back until it is told to go on.
    pub(super) fn expects_continue(&self) -> bool {
        self.expects_continue
    }

    /// The socket that [`client_gone`](Head::client_gone) looks at.
    pub(super) fn set_client(&mut self, client: &'a TcpStream) {
        self.client = Some(client);
    }

    /// Parses a whole head, as [`HeadScan`] cut it out, its last empty line included.
    ///
    /// # Errors
    /// 400 for what is no HTTP/1 head or leaves the body's length in doubt, 417, 431 and 501 for what it asks.
    pub(super) fn parse(
        bytes: &'a [u8],
        slots: &'a mut [MaybeUninit<httparse::Header<'a>>],
    ) -> Result<Head<'a>, Fault> {
        let mut request = httparse::Request::new(&mut []);
        match request.parse_with_uninit_headers(bytes, slots) {
            Ok(httparse::Status::Complete(length)) if length == bytes.len() => {}
            Ok(_) => return Err(Fault::bad_request("the request head is malformed")),
            Err(error) => return Err(malformed(error)),
        }
        let (Some(method), Some(target), Some(minor)) = (request.method, request.path, request.version) else {
            return Err(Fault::bad_request("the request line is malformed"));
        };
        let headers: &'a [httparse::Header<'a>] = request.headers;
        let method = Method::from_str(method).map_err(|()| Fault::bad_request("the method is malformed"))?;
        let target = origin_form(&method, target.as_bytes())?;
        let control = Control::gather(headers, minor)?;
        Ok(Head {
            method,
            target,
            version: HTTPVersion(1, minor),
            headers,
            framing: control.framing(minor)?,
            keep_alive: !control.close && (minor == 1 || control.keep_alive),
            expects_continue: control.expects_continue,
            client: None,
        })
    }
}

/// Reads the head that `bytes` begin with just as a connection does, for those who have bytes and no connection, and
/// returns what `take` makes of it, which gets the offset behind the head too. `None`: its end is not there yet.
///
/// # Errors
/// The status that a client would be refused with.
pub fn read_head<T>(
    bytes: &[u8],
    limits: &Limits,
    take: impl FnOnce(&Head<'_>, usize) -> T,
) -> Result<Option<T>, StatusCode> {
    let Some(span) = HeadScan::default().advance(bytes, limits).map_err(|fault| fault.status)? else {
        return Ok(None);
    };
    let mut slots: HeaderSlots<'_> = [const { MaybeUninit::uninit() }; HEADERS_MAX];
    let slots = &mut slots[..limits.headers.min(HEADERS_MAX)];
    let head = Head::parse(&bytes[span.start..span.end], slots).map_err(|fault| fault.status)?;
    Ok(Some(take(&head, span.end)))
}

/// The fault that stands for an error of the parser.
fn malformed(error: httparse::Error) -> Fault {
    match error {
        httparse::Error::HeaderName => Fault::bad_request("a header name is malformed"),
        httparse::Error::HeaderValue => Fault::bad_request("a header value is malformed"),
        httparse::Error::NewLine => Fault::bad_request("a line does not end in CR LF"),
        httparse::Error::TooManyHeaders => Fault::new(431, "the request has too many header lines"),
        httparse::Error::Token | httparse::Error::Version | httparse::Error::Status => {
            Fault::bad_request("the request line is malformed")
        }
    }
}

/// Path and query of a request target.
fn origin_form<'a>(method: &Method, target: &'a [u8]) -> Result<Cow<'a, [u8]>, Fault> {
    if *method == Method::Connect {
        return Err(Fault::new(501, "this server is no proxy: CONNECT is not implemented"));
    }
    if target.starts_with(b"/") || (target == b"*" && *method == Method::Options) {
        return Ok(Cow::Borrowed(target));
    }
    let Some(rest) = strip_scheme(target) else {
        return Err(Fault::bad_request("the request target is neither a path nor an absolute URL"));
    };
    let path = rest.iter().position(|byte| matches!(byte, b'/' | b'?' | b'#')).unwrap_or(rest.len());
    match &rest[path..] {
        _ if path == 0 => Err(Fault::bad_request("the URL in the request line names no host")),
        rest if rest.starts_with(b"/") => Ok(Cow::Borrowed(rest)),
        rest => Ok(Cow::Owned([b"/", rest].concat())),
    }
}

/// What follows `http://` or `https://`.
fn strip_scheme(target: &[u8]) -> Option<&[u8]> {
    let colon = target.iter().position(|byte| *byte == b':')?;
    let (scheme, rest) = target.split_at(colon);
    let http = scheme.eq_ignore_ascii_case(b"http") || scheme.eq_ignore_ascii_case(b"https");
    rest.strip_prefix(b"://").filter(|_| http)
}

/// The headers that steer the connection, gathered in one pass.
#[derive(Default)]
struct Control<'a> {
    host: bool,
    content_length: Option<&'a [u8]>,
    transfer_encoding: Option<&'a [u8]>,
    close: bool,
    keep_alive: bool,
    expects_continue: bool,
}

impl<'a> Control<'a> {
    fn gather(headers: &[httparse::Header<'a>], minor: u8) -> Result<Control<'a>, Fault> {
        let mut control = Control::default();
        for header in headers {
            let is = |name: &str| header.name.eq_ignore_ascii_case(name);
            // By length first: most headers are none of these.
            match header.name.len() {
                4 if is("host") => control.host(header.value)?,
                6 if is("expect") => control.expect(header.value, minor)?,
                10 if is("connection") => control.connection(header.value),
                14 if is("content-length") => {
                    set_once(&mut control.content_length, header.value, "Content-Length is repeated")?;
                }
                17 if is("transfer-encoding") => {
                    set_once(&mut control.transfer_encoding, header.value, "Transfer-Encoding is repeated")?;
                }
                _ => {}
            }
        }
        if minor == 1 && !control.host {
            return Err(Fault::bad_request("an HTTP/1.1 request needs a Host header"));
        }
        Ok(control)
    }

    fn host(&mut self, value: &[u8]) -> Result<(), Fault> {
        if std::mem::replace(&mut self.host, true) {
            return Err(Fault::bad_request("Host is repeated"));
        }
        let valid = |byte: &u8| byte.is_ascii_alphanumeric() || b"-._~!$&'()*+;=%:[]".contains(byte);
        if !value.iter().all(valid) {
            return Err(Fault::bad_request("Host is malformed"));
        }
        Ok(())
    }

    fn expect(&mut self, value: &[u8], minor: u8) -> Result<(), Fault> {
        if !value.eq_ignore_ascii_case(b"100-continue") {
            return Err(Fault::new(417, "the only expectation that can be met is 100-continue"));
        }
        // An HTTP/1.0 client would take the interim answer for the final one.
        self.expects_continue = minor == 1;
        Ok(())
    }

    fn connection(&mut self, value: &[u8]) {
        for option in value.split(|byte| *byte == b',').map(<[u8]>::trim_ascii) {
            self.close |= option.eq_ignore_ascii_case(b"close");
            self.keep_alive |= option.eq_ignore_ascii_case(b"keep-alive");
        }
    }

    /// How the body ends. Whatever two readers could read differently is refused.
    fn framing(&self, minor: u8) -> Result<Framing, Fault> {
        match (self.transfer_encoding, self.content_length) {
            (Some(_), Some(_)) => Err(Fault::bad_request("both Transfer-Encoding and Content-Length are given")),
            (Some(_), None) if minor == 0 => Err(Fault::bad_request("HTTP/1.0 has no Transfer-Encoding")),
            (Some(codings), None) => transfer_encoding(codings),
            (None, Some(length)) => content_length(length).map(Framing::Length),
            (None, None) => Ok(Framing::Length(0)),
        }
    }
}

/// Keeps the value of a header that may stand only once: which of two counts, two readers could decide differently.
fn set_once<'a>(field: &mut Option<&'a [u8]>, value: &'a [u8], repeated: &'static str) -> Result<(), Fault> {
    if field.replace(value).is_some() { Err(Fault::bad_request(repeated)) } else { Ok(()) }
}

fn transfer_encoding(value: &[u8]) -> Result<Framing, Fault> {
    if value.eq_ignore_ascii_case(b"chunked") {
        return Ok(Framing::Chunked);
    }
    let mut codings = value.split(|byte| *byte == b',').map(<[u8]>::trim_ascii);
    if codings.all(|coding| coding.is_empty() || coding.eq_ignore_ascii_case(b"chunked")) {
        return Err(Fault::bad_request("Transfer-Encoding is malformed"));
    }
    Err(Fault::new(501, "the only transfer coding that is implemented is chunked"))
}

/// Digits only: no sign, no blank, no list. A number too large for the type is a valid one that no limit admits.
fn content_length(value: &[u8]) -> Result<u64, Fault> {
    if value.is_empty() || !value.iter().all(u8::is_ascii_digit) {
        return Err(Fault::bad_request("Content-Length is malformed"));
    }
    let append = |number: u64, digit: &u8| number.saturating_mul(10).saturating_add(u64::from(digit - b'0'));
    Ok(value.iter().fold(0, append))
}

/// Where a head begins and ends in what arrived.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct HeadSpan {
    /// Offset of the request line: 0, or 2 behind an empty line.
    pub(super) start: usize,
    /// Offset behind the empty line that ends the head.
    pub(super) end: usize,
}

/// Looks for the end of a head in bytes that arrive piece by piece, each byte once, and refuses what can be refused
/// before the end is there. Lines must end in CR LF; what stands in them is for [`Head::parse`].
#[derive(Debug, Default)]
pub(super) struct HeadScan {
    start: usize,
    line_start: usize,
    scanned: usize,
    /// Offset behind the request line; 0 until it is there.
    headers_start: usize,
}

impl HeadScan {
    /// Goes on with `bytes`: all that arrived of this request and behind it, so a longer slice at every call.
    ///
    /// # Errors
    /// 400, 414, 431 or 505, as soon as what is there leaves no other outcome.
    pub(super) fn advance(&mut self, bytes: &[u8], limits: &Limits) -> Result<Option<HeadSpan>, Fault> {
        while let Some(offset) = bytes[self.scanned..].iter().position(|byte| *byte == b'\n') {
            let newline = self.scanned + offset;
            let Some(line) = bytes[self.line_start..newline].strip_suffix(b"\r") else {
                return Err(Fault::bad_request("a line does not end in CR LF"));
            };
            self.scanned = newline + 1;
            self.line_start = newline + 1;
            if self.headers_start == 0 {
                self.request_line(line, limits)?;
            } else if line.is_empty() {
                self.check_size(newline + 1, limits)?;
                return Ok(Some(HeadSpan { start: self.start, end: newline + 1 }));
            }
        }
        self.scanned = bytes.len();
        self.check_size(bytes.len(), limits)?;
        // Binary protocols, TLS above all, show themselves in the first byte: no need to wait for a line.
        match bytes.get(self.start) {
            Some(byte) if !byte.is_ascii_graphic() && *byte != b'\r' => {
                Err(Fault::bad_request("the request line is malformed"))
            }
            _ => Ok(None),
        }
    }

    fn request_line(&mut self, line: &[u8], limits: &Limits) -> Result<(), Fault> {
        if line.is_empty() {
            // Old clients send a stray CR LF behind a body; one is forgiven, a flood of them is not.
            if self.start > 0 {
                return Err(Fault::bad_request("the request line is empty"));
            }
            self.start = self.line_start;
            return Ok(());
        }
        if line.len() > limits.request_line_bytes {
            return Err(LONG_REQUEST_LINE);
        }
        self.headers_start = self.line_start;
        check_version(line)
    }

    fn check_size(&self, length: usize, limits: &Limits) -> Result<(), Fault> {
        if self.headers_start == 0 {
            // CR and LF are not counted, and the CR may be here already.
            let request_line = length - self.start;
            return if request_line > limits.request_line_bytes + 1 { Err(LONG_REQUEST_LINE) } else { Ok(()) };
        }
        if length - self.headers_start > limits.header_bytes {
            return Err(Fault::new(431, "the header lines are too long"));
        }
        Ok(())
    }
}

const LONG_REQUEST_LINE: Fault = Fault::new(414, "the request line is too long");

/// Looks at the version as soon as the request line is there: a client of another version sends no head as we know it,
/// so waiting for the end of one would be waiting for the timeout.
fn check_version(line: &[u8]) -> Result<(), Fault> {
    let version = line.rsplit(|byte| *byte == b' ').next().unwrap_or_default();
    match version {
        b"HTTP/1.1" | b"HTTP/1.0" => Ok(()),
        [b'H', b'T', b'T', b'P', b'/', number @ ..] if is_version(number) => {
            Err(Fault::new(505, "the only versions that are spoken here are HTTP/1.1 and HTTP/1.0"))
        }
        _ => Err(Fault::bad_request("the request line does not end in an HTTP version")),
    }
}

fn is_version(number: &[u8]) -> bool {
    !number.is_empty() && number.iter().all(|byte| byte.is_ascii_digit() || *byte == b'.')
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// What became of a request: its parts, or the status of its refusal. `None` if more bytes are awaited.
    #[derive(Debug, PartialEq, Eq)]
    enum Outcome {
        Head { method: String, target: Vec<u8>, framing: Framing, keep_alive: bool, length: usize },
        Refused(u16),
        Incomplete,
    }

    fn receive(bytes: &[u8]) -> Outcome {
        receive_within(bytes, &Limits::default())
    }

    fn receive_within(bytes: &[u8], limits: &Limits) -> Outcome {
        let head = read_head(bytes, limits, |head, length| Outcome::Head {
            method: head.method().as_str().to_owned(),
            target: head.target().to_owned(),
            framing: head.framing(),
            keep_alive: head.keep_alive(),
            length,
        });
        match head {
            Ok(Some(outcome)) => outcome,
            Ok(None) => Outcome::Incomplete,
            Err(status) => Outcome::Refused(status.0),
        }
    }

    fn framing(bytes: &[u8]) -> Framing {
        match receive(bytes) {
            Outcome::Head { framing, .. } => framing,
            other => panic!("{} gave {other:?}", bytes.escape_ascii()),
        }
    }

    #[test]
    fn plain_requests_are_understood() {
        let get = receive(b"GET /a%20b?consistency=stale HTTP/1.1\r\nHost: example:80\r\n\r\nnext");
        let expected = Outcome::Head {
            method: "GET".to_owned(),
            target: b"/a%20b?consistency=stale".to_vec(),
            framing: Framing::Length(0),
            keep_alive: true,
            length: 59,
        };
        assert_eq!(get, expected);
        assert_eq!(framing(b"PUT / HTTP/1.1\r\nHost:\r\nContent-Length: 17\r\n\r\n"), Framing::Length(17));
        assert_eq!(framing(b"PUT / HTTP/1.1\r\nhost: [::1]:8\r\ncontent-length:0017 \r\n\r\n"), Framing::Length(17));
        assert_eq!(framing(b"PUT / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: Chunked\r\n\r\n"), Framing::Chunked);
        assert_eq!(framing(b"\r\nGET / HTTP/1.0\r\n\r\n"), Framing::Length(0));
        let huge = framing(b"PUT / HTTP/1.1\r\nHost: a\r\nContent-Length: 99999999999999999999999\r\n\r\n");
        assert_eq!(huge, Framing::Length(u64::MAX));
    }

    /// Requests that two readers could understand differently, or that nobody should: each with its refusal.
    #[test]
    fn doubtful_requests_are_refused() {
        let long_line = format!("GET /{} HTTP/1.1\r\nHost: a\r\n\r\n", "k".repeat(20_000));
        let unended_line = format!("GET /{}", "k".repeat(20_000));
        let long_header = format!("GET / HTTP/1.1\r\nHost: a\r\nA: {}\r\n\r\n", "v".repeat(20_000));
        let many_headers = format!("GET / HTTP/1.1\r\nHost: a\r\n{}\r\n", "A: b\r\n".repeat(100));
        let whole: &[(&str, u16)] = &[
            ("GET / HTTP/1.1\r\n\r\n", 400),
            ("GET / HTTP/1.1\r\nHost: a\r\nHost: a\r\n\r\n", 400),
            ("GET / HTTP/1.0\r\nHost: a\r\nHost: b\r\n\r\n", 400),
            ("GET / HTTP/1.1\r\nHost: a b\r\n\r\n", 400),
            ("GET / HTTP/1.1\r\nHost: a/b\r\n\r\n", 400),
            ("GET / HTTP/1.1\r\nHost: user@a\r\n\r\n", 400),
            ("GET / HTTP/1.1\r\nHost: a, b\r\n\r\n", 400),
            // Request line.
            ("GET  / HTTP/1.1\r\nHost: a\r\n\r\n", 400),
            ("GET / HTTP/1.1 \r\nHost: a\r\n\r\n", 400),
            ("GET / x HTTP/1.1\r\nHost: a\r\n\r\n", 400),
            ("GET\t/\tHTTP/1.1\r\nHost: a\r\n\r\n", 400),
            (" GET / HTTP/1.1\r\nHost: a\r\n\r\n", 400),
            ("GET / HTTP/1.1\rHost: a\r\n\r\n", 400),
            ("GET /\r\n\r\n", 400),
            ("GET / http/1.1\r\nHost: a\r\n\r\n", 400),
            ("GET / HTTP/\r\nHost: a\r\n\r\n", 400),
            ("GET a HTTP/1.1\r\nHost: a\r\n\r\n", 400),
            ("GET * HTTP/1.1\r\nHost: a\r\n\r\n", 400),
            ("GET http:///a HTTP/1.1\r\nHost: a\r\n\r\n", 400),
            ("GET ftp://a/a HTTP/1.1\r\nHost: a\r\n\r\n", 400),
            ("GET /a\0b HTTP/1.1\r\nHost: a\r\n\r\n", 400),
            ("G\0T / HTTP/1.1\r\nHost: a\r\n\r\n", 400),
            ("GE(T / HTTP/1.1\r\nHost: a\r\n\r\n", 400),
            ("CONNECT a:80 HTTP/1.1\r\nHost: a\r\n\r\n", 501),
            ("\r\n\r\nGET / HTTP/1.1\r\nHost: a\r\n\r\n", 400),
            ("\nGET / HTTP/1.1\r\nHost: a\r\n\r\n", 400),
            ("GET / HTTP/2.0\r\n", 505),
            ("GET / HTTP/1.2\r\nHost: a\r\n\r\n", 505),
            ("GET / HTTP/0.9\r\n\r\n", 505),
            ("GET / HTTP/11\r\nHost: a\r\n\r\n", 505),
            ("PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 505),
            // Lines and names.
            ("GET / HTTP/1.1\nHost: a\n\n", 400),
            ("GET / HTTP/1.1\r\nHost: a\n\r\n", 400),
            ("GET / HTTP/1.1\r\nHost: a\r\n\n", 400),
            ("GET / HTTP/1.1\r\nHost: a\r\nA: b\rC: d\r\n\r\n", 400),
            ("GET / HTTP/1.1\r\nHost: a\r\nA: b\r\n c\r\n\r\n", 400),
            ("GET / HTTP/1.1\r\n Host: a\r\n\r\n", 400),
            ("GET / HTTP/1.1\r\nHost : a\r\n\r\n", 400),
            ("GET / HTTP/1.1\r\nHost\t: a\r\n\r\n", 400),
            ("GET / HTTP/1.1\r\nHost: a\r\nA\r\n\r\n", 400),
            ("GET / HTTP/1.1\r\nHost: a\r\n: b\r\n\r\n", 400),
            ("GET / HTTP/1.1\r\nHost: a\r\nA b: c\r\n\r\n", 400),
            ("GET / HTTP/1.1\r\nHost: a\r\nA\0: b\r\n\r\n", 400),
            ("GET / HTTP/1.1\r\nHost: a\r\nA: b\0c\r\n\r\n", 400),
            ("GET / HTTP/1.1\r\nHost: a\r\nA: b\x7fc\r\n\r\n", 400),
            // Length.
            ("PUT / HTTP/1.1\r\nHost: a\r\nContent-Length: \r\n\r\n", 400),
            ("PUT / HTTP/1.1\r\nHost: a\r\nContent-Length: abc\r\n\r\n", 400),
            ("PUT / HTTP/1.1\r\nHost: a\r\nContent-Length: -1\r\n\r\n", 400),
            ("PUT / HTTP/1.1\r\nHost: a\r\nContent-Length: +5\r\n\r\n", 400),
            ("PUT / HTTP/1.1\r\nHost: a\r\nContent-Length: 0x5\r\n\r\n", 400),
            ("PUT / HTTP/1.1\r\nHost: a\r\nContent-Length: 5 5\r\n\r\n", 400),
            ("PUT / HTTP/1.1\r\nHost: a\r\nContent-Length: 5, 5\r\n\r\n", 400),
            ("PUT / HTTP/1.1\r\nHost: a\r\nContent-Length: 5,6\r\n\r\n", 400),
            ("PUT / HTTP/1.1\r\nHost: a\r\nContent-Length: 5.0\r\n\r\n", 400),
            ("PUT / HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\nContent-Length: 5\r\n\r\n", 400),
            ("PUT / HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\ncontent-length: 6\r\n\r\n", 400),
            ("PUT / HTTP/1.1\r\nHost: a\r\nContent-Length : 5\r\n\r\n", 400),
            // Transfer coding.
            ("PUT / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\nContent-Length: 5\r\n\r\n", 400),
            ("PUT / HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n", 400),
            ("PUT / HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\nTransfer-Encoding: identity\r\n\r\n", 400),
            ("PUT / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n", 400),
            ("PUT / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\nTransfer-Encoding: identity\r\n\r\n", 400),
            ("PUT / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked, chunked\r\n\r\n", 400),
            ("PUT / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: ,chunked\r\n\r\n", 400),
            ("PUT / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding:\r\n\r\n", 400),
            ("PUT / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: identity\r\n\r\n", 501),
            ("PUT / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: xchunked\r\n\r\n", 501),
            ("PUT / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: \"chunked\"\r\n\r\n", 501),
            ("PUT / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked;a=b\r\n\r\n", 501),
            ("PUT / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: gzip, chunked\r\n\r\n", 501),
            ("PUT / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked, gzip\r\n\r\n", 501),
            ("PUT / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: \x0bchunked\r\n\r\n", 400),
            ("PUT / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding\x0b: chunked\r\n\r\n", 400),
            ("PUT / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding : chunked\r\n\r\n", 400),
            ("PUT / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding:\r\n chunked\r\n\r\n", 400),
            ("PUT / HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n", 400),
            // What is asked for.
            ("PUT / HTTP/1.1\r\nHost: a\r\nExpect: 200-ok\r\n\r\n", 417),
            ("PUT / HTTP/1.1\r\nHost: a\r\nExpect: 100-continue, 100-continue\r\n\r\n", 417),
            // Size.
            (&long_line, 414),
            (&unended_line, 414),
            (&long_header, 431),
            (&many_headers, 431),
        ];
        for (request, status) in whole {
            assert_eq!(receive(request.as_bytes()), Outcome::Refused(*status), "{}", request.escape_debug());
        }
    }

    #[test]
    fn what_is_no_http_is_refused_at_its_first_byte() {
        assert_eq!(receive(b"\x16\x03\x01"), Outcome::Refused(400));
        assert_eq!(receive(b"\0"), Outcome::Refused(400));
        assert_eq!(receive(b"\r\n\x80"), Outcome::Refused(400));
    }

    #[test]
    fn targets_become_path_and_query() {
        let target = |line: &str| match receive(format!("{line} HTTP/1.1\r\nHost: a\r\n\r\n").as_bytes()) {
            Outcome::Head { target, .. } => String::from_utf8(target).unwrap(),
            other => panic!("{line} gave {other:?}"),
        };
        assert_eq!(target("GET /"), "/");
        assert_eq!(target("GET //a/../b?c=d&e"), "//a/../b?c=d&e");
        assert_eq!(target("GET /\u{fc}"), "/\u{fc}");
        assert_eq!(target("GET http://a:80/b?c"), "/b?c");
        assert_eq!(target("GET HTTPS://a//b"), "//b");
        assert_eq!(target("GET http://a"), "/");
        assert_eq!(target("GET http://a?b=/c"), "/?b=/c");
        assert_eq!(target("OPTIONS *"), "*");
    }

    #[test]
    fn connections_stay_open_as_their_version_has_it() {
        let keep_alive = |version: &str, connection: &str| {
            let request = format!("GET / HTTP/{version}\r\nHost: a\r\n{connection}\r\n");
            match receive(request.as_bytes()) {
                Outcome::Head { keep_alive, .. } => keep_alive,
                other => panic!("{request} gave {other:?}"),
            }
        };
        assert!(keep_alive("1.1", ""));
        assert!(keep_alive("1.1", "Connection: upgrade, x\r\n"));
        assert!(!keep_alive("1.1", "Connection: Close\r\n"));
        assert!(!keep_alive("1.1", "Connection: keep-alive\r\nConnection: x ,close\r\n"));
        assert!(!keep_alive("1.0", ""));
        assert!(keep_alive("1.0", "Connection: Keep-Alive\r\n"));
        assert!(!keep_alive("1.0", "Connection: keep-alive, close\r\n"));
    }

    #[test]
    fn headers_are_found_without_regard_to_case() {
        let bytes = b"GET / HTTP/1.1\r\nHost: a\r\nIf-Match: \"1\"\r\nX: \xff\r\nIF-MATCH:  \"2\"\t\r\n\r\n";
        let mut slots: HeaderSlots<'_> = [const { MaybeUninit::uninit() }; HEADERS_MAX];
        let head = Head::parse(bytes, &mut slots).unwrap();
        assert_eq!(head.get("if-match"), Some(&b"\"1\""[..]));
        assert_eq!(head.get_all("If-Match").collect::<Vec<_>>(), [b"\"1\"", b"\"2\""]);
        assert_eq!(head.get("x"), Some(&b"\xff"[..]));
        assert_eq!(head.get("absent"), None);
        assert_eq!(head.headers().count(), 4);
        assert_eq!(head.content_length(), Some(0));
        assert!(!head.client_gone());
    }

    #[test]
    fn every_part_of_a_request_awaits_the_rest() {
        let request: &[u8] = b"\r\nPUT /k HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\nX-Y: z\r\n\r\n";
        for length in 0..request.len() {
            assert_eq!(receive(&request[..length]), Outcome::Incomplete, "{length} bytes");
        }
        assert!(matches!(receive(request), Outcome::Head { length, .. } if length == request.len()));
    }

    #[test]
    fn arriving_byte_by_byte_changes_nothing() {
        let request: &[u8] = b"\r\nGET /k HTTP/1.1\r\nHost: a\r\nX-Y: z\r\n\r\nGET /next";
        let whole = HeadScan::default().advance(request, &Limits::default());
        let mut scan = HeadScan::default();
        let piecewise =
            (1..=request.len()).find_map(|length| scan.advance(&request[..length], &Limits::default()).transpose());
        assert_eq!(piecewise, whole.transpose());
    }

    #[test]
    fn limits_hold_to_the_byte() {
        let limits = Limits { request_line_bytes: 20, header_bytes: 13, headers: 1, ..Limits::default() };
        let exact = b"GET /123456 HTTP/1.1\r\nHost: abc\r\n\r\n";
        assert!(matches!(receive_within(exact, &limits), Outcome::Head { .. }));
        assert_eq!(receive_within(b"GET /1234567 HTTP/1.1\r\n", &limits), Outcome::Refused(414));
        assert_eq!(receive_within(b"GET /123456 HTTP/1.1\r", &limits), Outcome::Incomplete);
        assert_eq!(receive_within(b"GET /1234567 HTTP/1.1\r", &limits), Outcome::Refused(414));
        assert_eq!(receive_within(b"GET / HTTP/1.1\r\nHost: abcd\r\n\r\n", &limits), Outcome::Refused(431));
        assert_eq!(receive_within(b"GET / HTTP/1.1\r\nHost: abcdefgh", &limits), Outcome::Refused(431));
        assert_eq!(receive_within(b"GET / HTTP/1.1\r\nHost:\r\nA:\r\n\r\n", &limits), Outcome::Refused(431));
    }

    /// Pieces of requests, so that random ones get past the first checks.
    fn piece() -> impl Strategy<Value = Vec<u8>> {
        let pieces: Vec<&'static [u8]> = vec![
            b"GET ",
            b"PUT ",
            b"/",
            b"http://",
            b"a",
            b" ",
            b" HTTP/1.1",
            b" HTTP/1.0",
            b"\r\n",
            b"\r\n",
            b"\r",
            b"\n",
            b"Host: a\r\n",
            b"Content-Length: ",
            b"Transfer-Encoding: ",
            b"chunked",
            b"5",
            b":",
            b",",
            b"Connection: ",
            b"close",
            b"Expect: 100-continue",
            b"\0",
            b"\xff",
        ];
        prop_oneof![
            9 => proptest::sample::select(pieces).prop_map(<[u8]>::to_vec),
            1 => proptest::collection::vec(any::<u8>(), 0..8),
        ]
    }

    proptest! {
        #[test]
        fn nothing_panics_and_nothing_doubtful_passes(pieces in proptest::collection::vec(piece(), 0..40)) {
            let bytes = pieces.concat();
            if let Outcome::Head { target, length, .. } = receive(&bytes) {
                prop_assert!(length <= bytes.len());
                prop_assert!(bytes[..length].ends_with(b"\r\n\r\n"));
                prop_assert!(target.starts_with(b"/"));
                prop_assert!(!bytes[..length].contains(&0));
                let breaks = bytes[..length].iter().filter(|byte| matches!(byte, b'\r' | b'\n')).count();
                prop_assert_eq!(breaks, 2 * bytes[..length].windows(2).filter(|pair| pair == b"\r\n").count());
            }
        }

        #[test]
        fn random_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..400)) {
            receive(&bytes);
        }
    }
}
