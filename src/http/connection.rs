//! One connection from its first request to its last.

use std::io::{self, ErrorKind, Read, Write};
use std::mem::MaybeUninit;
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::time::Instant;

use bytes::Bytes;
use log::debug;
use tiny_http::{HTTPVersion, Header, Method, StatusCode};

use super::body::{BROKEN_OFF, BodyReader};
use super::fault::Fault;
use super::head::{Framing, Head, HeadScan, HeaderSlots};
use super::limits::{HEADERS_MAX, Limits, allowance};
use super::registry::Place;
use super::response::{Delivery, Encoder, Response};
use super::service::{Admission, Body, Service};
use super::socket::{INPUT_BYTES, Input, Patience, Socket};

/// Reads from a refused connection before it is closed: a request that is there already must not turn the refusal into
/// a reset. They do not wait.
const REFUSED_READS: usize = 16;

/// What becomes of a connection behind an answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Next {
    /// The next request is awaited.
    Continue,
    /// Nothing of the client's is unread: the connection is closed.
    Close,
    /// The client may still be sending: its bytes are read for a while and dropped. Closing at once would reset the
    /// connection, and the answer could be lost with it.
    Linger,
}

/// What is left of a request's body when its answer is ready.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Rest {
    /// Nothing: the next request follows.
    Nothing,
    /// A part small enough to be skipped.
    Skippable,
    /// Too much, or nobody knows how much.
    Unknown,
}

/// Where a connection stands when its thread begins.
pub(super) enum Beginning {
    /// Nothing was read of it.
    New,
    /// So much was read of its next request. One that was begun long ago has to be whole by `deadline`.
    Request { input: Input, deadline: Option<Instant> },
    /// So much is left of an answer, behind which the connection is closed or not.
    Answer { input: Input, head: Vec<u8>, body: Bytes, close: bool },
}

/// Runs a connection until it ends. Its place in the registry is held so long.
pub(super) fn run<S: Service>(service: &S, limits: &Limits, place: &Place, peer: SocketAddr, beginning: Beginning) {
    let link = place.link();
    let stream = link.stream();
    // Every answer is one write; waiting for more would only delay it.
    if let Err(error) = stream.set_nodelay(true) {
        debug!("closing the connection from {peer}: failed to set TCP_NODELAY: {error}");
        return;
    }
    let (input, deadline, answer) = match beginning {
        Beginning::New => (Input::new(), None, None),
        Beginning::Request { input, deadline } => (input, deadline, None),
        Beginning::Answer { input, head, body, close } => (input, None, Some((head, body, close))),
    };
    let mut connection = Connection {
        service,
        limits,
        place,
        session: service.session(peer),
        socket: Socket::new(stream),
        input,
        encoder: Encoder::default(),
        deadline,
    };
    if let Some((head, body, close)) = answer {
        match connection.socket.write(&head, &body, limits.write_timeout) {
            Err(_) => return connection.close(Next::Close),
            Ok(()) if close => return connection.close(Next::Linger),
            Ok(()) => {}
        }
    }
    let mut head = Vec::new();
    let next = loop {
        let next = match connection.receive_head(&mut head) {
            Ok(true) => connection.serve(&head),
            Ok(false) => break Next::Close,
            Err(fault) => connection.refuse(fault, false),
        };
        connection.deadline = None;
        if next != Next::Continue {
            break next;
        }
    };
    connection.close(next);
}

struct Connection<'c, S: Service> {
    service: &'c S,
    limits: &'c Limits,
    place: &'c Place,
    session: S::Session,
    socket: Socket<'c>,
    input: Input,
    encoder: Encoder,
    /// When the first request has to be whole, if it was begun before this thread was.
    deadline: Option<Instant>,
}

impl<S: Service> Connection<'_, S> {
    /// Waits for the next request and moves its head to `head`, so that the input is free for the body. `false` when
    /// there will be none: the client closed, was idle too long, or this server stops.
    fn receive_head(&mut self, head: &mut Vec<u8>) -> Result<bool, Fault> {
        self.place.set_interruptible();
        // What one long head needed is not kept for all that follow.
        head.clear();
        head.shrink_to(INPUT_BYTES);
        let mut scan = HeadScan::default();
        let mut patience = Patience::For(self.limits.idle_timeout);
        loop {
            if let Some(span) = scan.advance(self.input.unread(), self.limits)? {
                self.place.set_answering();
                head.extend_from_slice(&self.input.take(span.end)[span.start..]);
                return Ok(true);
            }
            if self.place.is_stopping() {
                return Ok(false);
            }
            if let (Patience::For(_), false) = (patience, self.input.is_empty()) {
                let deadline = self.deadline.unwrap_or_else(|| Instant::now() + self.limits.head_timeout);
                patience = Patience::Until(deadline);
            }
            match self.input.fill(&mut self.socket, patience) {
                // A head that breaks off is nobody's request: there is no one to tell.
                Ok(0) => return Ok(false),
                Ok(_) => {}
                Err(error) if error.kind() == ErrorKind::TimedOut && !self.input.is_empty() => {
                    return Err(Fault::new(408, "the request head did not arrive in time"));
                }
                Err(_) => return Ok(false),
            }
        }
    }

    /// Answers the request that begins with `head`.
    fn serve(&mut self, head: &[u8]) -> Next {
        let mut slots: HeaderSlots<'_> = [const { MaybeUninit::uninit() }; HEADERS_MAX];
        let slots = &mut slots[..self.limits.headers.min(HEADERS_MAX)];
        let mut head = match Head::parse(head, slots) {
            Ok(head) => head,
            Err(fault) => return self.refuse(fault, false),
        };
        head.set_client(self.socket.stream());
        match self.answer(&head) {
            Ok((response, rest)) => self.deliver(response, rest, &head),
            Err(fault) => self.refuse(fault, *head.method() == Method::Head),
        }
    }

    /// Asks the service, reading the body as it admits it.
    fn answer(&mut self, head: &Head<'_>) -> Result<(Response, Rest), Fault> {
        match self.service.admit(&mut self.session, head) {
            Admission::Answer(response) => Ok((response, self.unread_rest(head))),
            Admission::Buffer(bytes_max) => {
                let bytes = head.content_length().unwrap_or(bytes_max as u64).min(bytes_max as u64);
                if head.content_length().is_none_or(|length| length == bytes) {
                    self.invite_body(head)?;
                }
                let deadline = Instant::now() + allowance(self.limits.body_timeout, bytes);
                let patience = Patience::Until(self.deadline.unwrap_or(deadline));
                let reader = BodyReader::new(&mut self.input, &mut self.socket, head.framing(), patience);
                let body = reader.read_whole(bytes_max)?;
                Ok((self.service.answer(&mut self.session, head, Body::Buffered(body)), Rest::Nothing))
            }
            Admission::Stream => {
                self.invite_body(head)?;
                // A stream may have no end: a stop must not wait for one.
                self.place.set_interruptible();
                let patience = Patience::For(self.limits.body_timeout);
                let mut reader = BodyReader::new(&mut self.input, &mut self.socket, head.framing(), patience);
                let response = self.service.answer(&mut self.session, head, Body::Stream(&mut reader));
                let rest = if reader.is_at_end() { Rest::Nothing } else { Rest::Unknown };
                self.place.set_answering();
                Ok((response, rest))
            }
        }
    }

    /// Tells a client that waits for it to send its body, unless the body is on its way already.
    fn invite_body(&mut self, head: &Head<'_>) -> Result<(), Fault> {
        if !head.expects_continue() || head.framing() == Framing::Length(0) || !self.input.is_empty() {
            return Ok(());
        }
        let written = self.socket.write(b"HTTP/1.1 100 Continue\r\n\r\n", b"", self.limits.write_timeout);
        written.map_err(|_| BROKEN_OFF)
    }

    /// How much of an unread body there is to get rid of.
    fn unread_rest(&self, head: &Head<'_>) -> Rest {
        match head.framing() {
            Framing::Length(0) => Rest::Nothing,
            // Having the answer, the client may send its body or leave it: what comes next could be either.
            _ if head.expects_continue() => Rest::Unknown,
            Framing::Length(bytes) if bytes <= self.limits.drain_bytes => Rest::Skippable,
            Framing::Length(_) | Framing::Chunked => Rest::Unknown,
        }
    }

    /// Writes the answer to `head` and settles what is left of its request.
    fn deliver(&mut self, response: Response, rest: Rest, head: &Head<'_>) -> Next {
        let close = !head.keep_alive() || rest == Rest::Unknown || self.place.is_stopping();
        let delivery = Delivery {
            head_only: *head.method() == Method::Head,
            close,
            keep_alive: *head.version() == HTTPVersion(1, 0),
        };
        if self.write(response, delivery).is_err() {
            return Next::Close;
        }
        if close {
            return if rest == Rest::Nothing && self.input.is_empty() { Next::Close } else { Next::Linger };
        }
        if rest == Rest::Skippable {
            self.place.set_interruptible();
            let patience = Patience::Until(Instant::now() + self.limits.drain_timeout);
            let mut reader = BodyReader::new(&mut self.input, &mut self.socket, head.framing(), patience);
            return if reader.skip() { Next::Continue } else { Next::Close };
        }
        Next::Continue
    }

    /// Answers a fault, after which the connection ends.
    fn refuse(&mut self, fault: Fault, head_only: bool) -> Next {
        // A stop may have ended the read of a body whose head had just arrived.
        let fault = if fault == BROKEN_OFF && self.place.is_stopping() { STOPPING } else { fault };
        debug!("refusing a request: {} {}", fault.status.0, fault.detail);
        let response = self.service.fault(fault.status, fault.detail);
        match self.write(response, Delivery { head_only, close: true, keep_alive: false }) {
            Ok(()) => Next::Linger,
            Err(_) => Next::Close,
        }
    }

    fn write(&mut self, response: Response, delivery: Delivery) -> io::Result<()> {
        let (head, body) = self.encoder.encode(response, delivery);
        self.socket.write(head, &body, self.limits.write_timeout)
    }

    fn close(mut self, next: Next) {
        self.socket.finish();
        if next != Next::Linger {
            return;
        }
        self.place.set_interruptible();
        let patience = Patience::Until(Instant::now() + self.limits.drain_timeout);
        let mut drained = 0;
        while drained <= self.limits.drain_bytes {
            self.input.clear();
            match self.input.fill(&mut self.socket, patience) {
                Ok(0) | Err(_) => return,
                Ok(read) => drained += read as u64,
            }
        }
    }
}

/// Turns a connection away, without waiting for its client in any way.
pub(super) fn turn_away<S: Service>(service: &S, encoder: &mut Encoder, mut stream: &TcpStream, detail: &str) {
    let mut response = service.fault(StatusCode(503), detail);
    if !response.headers().iter().any(|header| header.field.equiv("Retry-After")) {
        let retry = Header::from_bytes("Retry-After", "1");
        response.add_header(retry.expect("the header is ASCII"));
    }
    let (head, body) = encoder.encode(response, Delivery { close: true, ..Delivery::default() });
    // Best effort: a client that does not take this learns of the refusal by the close.
    let _ = stream.set_nonblocking(true).and_then(|()| stream.write_all(head)).and_then(|()| stream.write_all(&body));
    let _ = stream.shutdown(Shutdown::Write);
    let mut scratch = [0; 4096];
    for _ in 0..REFUSED_READS {
        if !matches!(stream.read(&mut scratch), Ok(1..)) {
            break;
        }
    }
}

const STOPPING: Fault = Fault::new(503, "this server is stopping");
