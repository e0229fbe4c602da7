//! Responses and how they are written: the head into one reused buffer, and everything in one system call.

use std::io::{self, Read, Write};
use std::time::{SystemTime, UNIX_EPOCH};

use bytes::{Buf, Bytes};
use httpdate::HttpDate;
use tiny_http::{Header, StatusCode};

/// A body up to this size is copied behind its head and written with it; a larger one is written from where it lies.
/// Copying so little is cheaper than a second I/O vector, and it bounds the buffer.
const COPIED_BYTES_MAX: usize = 4096;

/// What a [`Service`](super::Service) answers. `Connection`, `Content-Length` and `Date` are the server's to write.
pub type Response = tiny_http::Response<Payload>;

/// The body of a response: bytes that are held, not copied, until they are written.
#[derive(Clone, Debug, Default)]
pub struct Payload(Bytes);

impl Payload {
    /// No bytes.
    pub const fn empty() -> Payload {
        Payload(Bytes::new())
    }

    /// The bytes of anything that can lend them, such as a value shared with the store.
    pub fn from_owner(owner: impl AsRef<[u8]> + Send + 'static) -> Payload {
        Payload(Bytes::from_owner(owner))
    }

    /// Bytes left to read.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether no bytes are left to read.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

impl From<Bytes> for Payload {
    fn from(bytes: Bytes) -> Payload {
        Payload(bytes)
    }
}

impl From<Vec<u8>> for Payload {
    fn from(bytes: Vec<u8>) -> Payload {
        Payload(Bytes::from(bytes))
    }
}

impl From<String> for Payload {
    fn from(text: String) -> Payload {
        Payload(Bytes::from(text))
    }
}

impl From<&'static str> for Payload {
    fn from(text: &'static str) -> Payload {
        Payload(Bytes::from_static(text.as_bytes()))
    }
}

impl Read for Payload {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let read = buffer.len().min(self.0.len());
        self.0.copy_to_slice(&mut buffer[..read]);
        Ok(read)
    }
}

/// A response without headers of its own; add them with `with_header`.
///
/// To answer HEAD, give the body that GET would get (it is not sent), or an empty one and the length it would have
/// with `with_data(Payload::empty(), Some(length))`.
pub fn respond(status: u16, payload: impl Into<Payload>) -> Response {
    let payload = payload.into();
    let length = payload.len();
    Response::new(StatusCode(status), Vec::new(), payload, Some(length), None)
}

/// What the connection's side adds to a response.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Delivery {
    /// The request was HEAD: the length is told, the body kept.
    pub(super) head_only: bool,
    /// This is the connection's last response.
    pub(super) close: bool,
    /// The client is of version 1.0 and must be told that its connection stays open.
    pub(super) keep_alive: bool,
}

/// Lays out responses, one after another, in one buffer.
#[derive(Debug, Default)]
pub(super) struct Encoder {
    output: Vec<u8>,
    date: DateLine,
}

impl Encoder {
    /// Lays out `response`. Returned are the bytes to write: first the head, with the body behind it if that is small,
    /// then the body if it is large.
    pub(super) fn encode(&mut self, response: Response, delivery: Delivery) -> (&[u8], Bytes) {
        let status = response.status_code();
        let claimed_length = response.data_length();
        self.begin(&response);
        let body = response.into_reader().0;
        // Where a body is sent its own length counts, so that a response that claims another cannot put the connection
        // out of step.
        let length = if delivery.head_only { claimed_length.unwrap_or(body.len()) } else { body.len() };
        if !is_bodiless(status) {
            self.output.extend_from_slice(b"Content-Length: ");
            push_decimal(&mut self.output, length as u64);
            self.output.extend_from_slice(b"\r\n");
        }
        self.end(delivery);
        if delivery.head_only || is_bodiless(status) {
            return (&self.output, Bytes::new());
        }
        if body.len() > COPIED_BYTES_MAX {
            return (&self.output, body);
        }
        self.output.extend_from_slice(&body);
        (&self.output, Bytes::new())
    }

    /// Status line, date and the response's own headers.
    fn begin(&mut self, response: &Response) {
        let status = response.status_code();
        let output = &mut self.output;
        output.clear();
        output.extend_from_slice(b"HTTP/1.1 ");
        push_decimal(output, u64::from(status.0));
        output.push(b' ');
        output.extend_from_slice(status.default_reason_phrase().as_bytes());
        output.extend_from_slice(b"\r\nDate: ");
        output.extend_from_slice(self.date.now());
        output.extend_from_slice(b"\r\n");
        for header in response.headers() {
            push_header(output, header);
        }
    }

    fn end(&mut self, delivery: Delivery) {
        if delivery.close {
            self.output.extend_from_slice(b"Connection: close\r\n");
        } else if delivery.keep_alive {
            self.output.extend_from_slice(b"Connection: keep-alive\r\n");
        }
        self.output.extend_from_slice(b"\r\n");
    }
}

/// Statuses whose responses end with their head, whatever they carry.
fn is_bodiless(status: StatusCode) -> bool {
    matches!(status.0, 100..=199 | 204 | 304)
}

/// Writes a header line. `Header` admits line breaks in its value, and one in a value taken from a request would begin
/// a header, or a response, of the client's own making: control characters become blanks.
fn push_header(output: &mut Vec<u8>, header: &Header) {
    if header.field.equiv("Date") {
        return;
    }
    output.extend_from_slice(header.field.as_str().as_bytes());
    output.extend_from_slice(b": ");
    let value = header.value.as_bytes();
    if value.iter().any(u8::is_ascii_control) {
        output.extend(value.iter().map(|byte| if byte.is_ascii_control() { b' ' } else { *byte }));
    } else {
        output.extend_from_slice(value);
    }
    output.extend_from_slice(b"\r\n");
}

fn push_decimal(output: &mut Vec<u8>, mut number: u64) {
    // u64::MAX has twenty digits.
    let mut digits = [0; 20];
    let mut first = digits.len();
    loop {
        first -= 1;
        // The remainder is below ten.
        digits[first] = b'0' + (number % 10) as u8;
        number /= 10;
        if number == 0 {
            break;
        }
    }
    output.extend_from_slice(&digits[first..]);
}

/// The value of `Date`, made anew when the second changes.
#[derive(Debug, Default)]
struct DateLine {
    second: u64,
    text: Vec<u8>,
}

impl DateLine {
    fn now(&mut self) -> &[u8] {
        self.at(SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs())
    }

    fn at(&mut self, second: u64) -> &[u8] {
        if self.second != second || self.text.is_empty() {
            self.second = second;
            self.text.clear();
            let date = HttpDate::from(UNIX_EPOCH + std::time::Duration::from_secs(second.min(LAST_SECOND)));
            // Writing into a Vec does not fail.
            let _ = write!(self.text, "{date}");
        }
        &self.text
    }
}

/// The end of the year 9999, behind which an HTTP date cannot be written.
const LAST_SECOND: u64 = 253_402_300_799;

#[cfg(test)]
mod tests {
    use super::*;

    /// The bytes of a response, with the date, which is now, checked and taken out.
    fn encode(response: Response, delivery: Delivery) -> String {
        let mut encoder = Encoder::default();
        let (head, body) = encoder.encode(response, delivery);
        let text = String::from_utf8([head, &body].concat()).unwrap();
        let (before, rest) = text.split_once("Date: ").unwrap();
        let (date, after) = rest.split_once("\r\n").unwrap();
        assert_eq!(date.len(), "Sun, 06 Nov 1994 08:49:37 GMT".len());
        format!("{before}{after}")
    }

    fn header(name: &str, value: &str) -> Header {
        Header::from_bytes(name, value).unwrap()
    }

    #[test]
    fn a_body_follows_its_length() {
        let response = respond(200, "hello").with_header(header("ETag", "\"7\""));
        assert_eq!(
            encode(response, Delivery::default()),
            "HTTP/1.1 200 OK\r\nETag: \"7\"\r\nContent-Length: 5\r\n\r\nhello"
        );
        let empty = encode(respond(404, Payload::empty()), Delivery::default());
        assert_eq!(empty, "HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n");
    }

    #[test]
    fn statuses_without_body_have_no_length_either() {
        let no_content = encode(respond(204, "dropped"), Delivery { close: true, ..Delivery::default() });
        assert_eq!(no_content, "HTTP/1.1 204 No Content\r\nConnection: close\r\n\r\n");
        let not_modified = encode(respond(304, "dropped"), Delivery { keep_alive: true, ..Delivery::default() });
        assert_eq!(not_modified, "HTTP/1.1 304 Not Modified\r\nConnection: keep-alive\r\n\r\n");
    }

    #[test]
    fn head_gets_the_length_and_no_body() {
        let head = Delivery { head_only: true, ..Delivery::default() };
        assert_eq!(encode(respond(200, "hello"), head), "HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n");
        let told = respond(200, "").with_data(Payload::empty(), Some(99));
        assert_eq!(encode(told, head), "HTTP/1.1 200 OK\r\nContent-Length: 99\r\n\r\n");
    }

    #[test]
    fn a_claimed_length_is_not_believed() {
        let response = respond(200, "hello").with_header(header("Content-Length", "3"));
        assert_eq!(encode(response, Delivery::default()), "HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello");
    }

    #[test]
    fn header_values_cannot_break_out_of_their_line() {
        let response = respond(200, "").with_header(header("X", "a\r\nY: b\0"));
        assert_eq!(
            encode(response, Delivery::default()),
            "HTTP/1.1 200 OK\r\nX: a  Y: b \r\nContent-Length: 0\r\n\r\n"
        );
    }

    #[test]
    fn large_bodies_are_not_copied() {
        let body = Bytes::from(vec![1; COPIED_BYTES_MAX + 1]);
        let mut encoder = Encoder::default();
        let (head, tail) = encoder.encode(respond(200, body.clone()), Delivery::default());
        assert!(head.ends_with(b"\r\n\r\n"));
        assert_eq!(tail.as_ptr(), body.as_ptr());
        let (whole, tail) = encoder.encode(respond(200, vec![1; COPIED_BYTES_MAX]), Delivery::default());
        assert!(whole.ends_with(&[1; COPIED_BYTES_MAX]));
        assert!(tail.is_empty());
    }

    #[test]
    fn the_date_changes_with_the_second() {
        let mut date = DateLine::default();
        assert_eq!(date.at(784_111_777), b"Sun, 06 Nov 1994 08:49:37 GMT");
        assert_eq!(date.at(784_111_778), b"Sun, 06 Nov 1994 08:49:38 GMT");
        assert_eq!(date.at(u64::MAX), b"Fri, 31 Dec 9999 23:59:59 GMT");
    }

    #[test]
    fn payloads_are_read_like_any_reader() {
        let mut text = String::new();
        Payload::from_owner(vec![b'a', b'b']).read_to_string(&mut text).unwrap();
        Payload::from("c".to_owned()).read_to_string(&mut text).unwrap();
        Payload::from(Bytes::from_static(b"d")).read_to_string(&mut text).unwrap();
        assert_eq!(text, "abcd");
        assert!(Payload::empty().is_empty());
    }

    #[test]
    fn decimals_are_written_whole() {
        for number in [0, 9, 10, 204, 4096, u64::MAX] {
            let mut text = Vec::new();
            push_decimal(&mut text, number);
            assert_eq!(text, number.to_string().as_bytes());
        }
    }
}
