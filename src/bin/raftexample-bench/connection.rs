//! One non-blocking connection to a node, with at most one request under way.

use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketFlags, SocketType};

use crate::answer::{Answer, AnswerReader};
use crate::request::Operation;
use crate::tally::Failure;

/// How long to wait for the first connections. A listener whose queue is full drops the first attempt silently, and
/// the next one comes a second later.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// A request under way. Times are nanoseconds since the start of the run.
#[derive(Clone, Copy, Debug)]
pub(crate) struct InFlight {
    /// What it does.
    pub(crate) operation: Operation,
    /// When it should have started: what its latency is counted from.
    pub(crate) start: u64,
    /// When it was sent: what its timeout is counted from.
    pub(crate) sent_at: u64,
}

/// One connection, or the attempt at one.
#[derive(Debug)]
pub(crate) struct Connection {
    /// The number of its target.
    pub(crate) target: usize,
    address: SocketAddr,
    /// Grows with each reconnection, so that an event of an earlier socket is known as such.
    pub(crate) generation: u32,
    pub(crate) link: Link,
    pub(crate) in_flight: Option<InFlight>,
    /// What of the request the socket has not taken yet.
    unsent: Vec<u8>,
    answer: AnswerReader,
}

/// Where a connection stands.
#[derive(Debug)]
pub(crate) enum Link {
    /// To be made again, not before a time.
    Down {
        /// In nanoseconds since the start of the run.
        retry_at: u64,
    },
    /// Being made.
    Connecting {
        /// What it is made of.
        stream: TcpStream,
        /// In nanoseconds since the start of the run.
        since: u64,
    },
    /// Made.
    Up(TcpStream),
}

impl Connection {
    /// Makes a connection, and waits for it: a run starts with all of them.
    ///
    /// # Errors
    /// One line.
    pub(crate) fn open(target: usize, address: SocketAddr) -> Result<Self, String> {
        let stream = TcpStream::connect_timeout(&address, CONNECT_TIMEOUT).and_then(|stream| {
            stream.set_nonblocking(true)?;
            stream.set_nodelay(true)?;
            Ok(stream)
        });
        let stream = stream.map_err(|error| format!("failed to connect to {address}: {error}"))?;
        let answer = AnswerReader::default();
        Ok(Self { target, address, generation: 0, link: Link::Up(stream), in_flight: None, unsent: Vec::new(), answer })
    }

    /// The socket, if there is one.
    pub(crate) fn stream(&self) -> Option<&TcpStream> {
        match &self.link {
            Link::Down { .. } => None,
            Link::Connecting { stream, .. } | Link::Up(stream) => Some(stream),
        }
    }

    /// Begins to make the connection again. What was under way on the last one is forgotten.
    ///
    /// # Errors
    /// What the system refuses at once.
    pub(crate) fn reconnect(&mut self, now: u64) -> io::Result<()> {
        self.generation = self.generation.wrapping_add(1);
        self.in_flight = None;
        self.unsent.clear();
        self.answer = AnswerReader::default();
        let family = if self.address.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
        let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
        let socket = rustix::net::socket_with(family, SocketType::STREAM, flags, None)?;
        match rustix::net::connect(&socket, &self.address) {
            Ok(()) | Err(Errno::INPROGRESS) => {}
            Err(errno) => return Err(errno.into()),
        }
        let stream = TcpStream::from(socket);
        stream.set_nodelay(true)?;
        self.link = Link::Connecting { stream, since: now };
        Ok(())
    }

    /// Whether a request under way has gone out whole. An answer may come earlier, and what is left of the request
    /// would then be taken for the next one.
    pub(crate) fn is_sent(&self) -> bool {
        self.unsent.is_empty()
    }

    /// Sends as much of a request as the socket takes. True: all of it.
    ///
    /// # Errors
    /// The connection is lost.
    pub(crate) fn send(&mut self, request: &[u8], in_flight: InFlight) -> Result<bool, Failure> {
        self.in_flight = Some(in_flight);
        let sent = self.write(request)?;
        self.unsent.extend_from_slice(&request[sent..]);
        Ok(self.unsent.is_empty())
    }

    /// Sends more of a request that has not gone out whole. True: all of it.
    ///
    /// # Errors
    /// The connection is lost.
    pub(crate) fn send_rest(&mut self) -> Result<bool, Failure> {
        let rest = std::mem::take(&mut self.unsent);
        let sent = self.write(&rest)?;
        self.unsent = rest;
        self.unsent.drain(..sent);
        Ok(self.unsent.is_empty())
    }

    /// Reads once. Some: the answer is complete.
    ///
    /// # Errors
    /// The connection is lost, or sends what is no answer.
    pub(crate) fn receive(&mut self, buffer: &mut [u8]) -> Result<Option<Answer>, Failure> {
        let Link::Up(stream) = &mut self.link else { return Ok(None) };
        let received = match stream.read(buffer) {
            Ok(0) => return Err(Failure::ConnectionLost),
            Ok(received) => &buffer[..received],
            Err(error) if is_temporary(&error) => return Ok(None),
            Err(_) => return Err(Failure::ConnectionLost),
        };
        if self.in_flight.is_none() {
            return Err(Failure::Malformed);
        }
        self.answer.read(received).map_err(|_| Failure::Malformed)
    }

    fn write(&mut self, bytes: &[u8]) -> Result<usize, Failure> {
        let Link::Up(stream) = &mut self.link else { return Err(Failure::ConnectionLost) };
        match stream.write(bytes) {
            Ok(written) => Ok(written),
            Err(error) if is_temporary(&error) => Ok(0),
            Err(_) => Err(Failure::ConnectionLost),
        }
    }
}

fn is_temporary(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted)
}
