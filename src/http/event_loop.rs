//! Many connections in one thread: it sleeps until some of them have sent something or an answer is there for them.
//!
//! A request that is whole and quickly begun costs here one read, one write, and a share of what is done once for all
//! that came together: one wait, one message to those who answer, one wake-up by them. A thread for each connection
//! costs two wake-ups a request. What is rare or slow is not done here: a request that may wait for something else than
//! its reply, a large or chunked body, a client that does not take its answer, and everything that has to be refused
//! moves with its connection to a thread of its own (`connection.rs`), and stays there until the connection ends.
//!
//! ```text
//! Reading -> Service::begin -> answered: written at once, back to Reading
//!                           -> waits: Waiting until Letter::Reply or the deadline -> Service::finish -> Reading
//!                           -> for a thread: moves there with what it has sent so far
//! ```
//!
//! Readiness is edge-triggered: a socket is read until it gave less than was asked for, and then left alone until it is
//! reported again.

use std::collections::VecDeque;
use std::io::{self, ErrorKind, IoSlice, Read, Write};
use std::mem::MaybeUninit;
use std::net::{Shutdown, SocketAddr};
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use bytes::{Buf, Bytes};
use log::{debug, warn};
use mio::unix::SourceFd;
use mio::{Interest, Token};
use tiny_http::{HTTPVersion, Method};

use super::connection::{self, Beginning, turn_away};
use super::head::{Framing, Head, HeadScan, HeadSpan, HeaderSlots};
use super::limits::{HEADERS_MAX, Limits, allowance};
use super::mailbox::{Caller, EventLoop, Letter, MAIL, Ticket};
use super::registry::{Link, Place};
use super::response::{Delivery, Encoder, Response};
use super::service::{Begun, Service};
use super::socket::Input;

/// Requests of one connection that are answered before the others get their turn: who pipelines is not served alone.
const REQUESTS_PER_TURN_MAX: usize = 16;

/// How often deadlines are looked at, at most: they are seconds, and looking at them looks at every connection.
const SWEEP_INTERVAL_MIN: Duration = Duration::from_millis(20);
/// And at least, with the mail.
const SWEEP_INTERVAL_MAX: Duration = Duration::from_secs(1);

/// A connection of this loop.
struct Connection<P> {
    place: Place,
    link: Arc<Link>,
    peer: SocketAddr,
    input: Input,
    state: State<P>,
    /// What its state allows at the longest.
    deadline: Instant,
    /// There may be something to read.
    readable: bool,
    /// The client has closed its side: its end is read however little was there before.
    ends: bool,
    /// It stands among those that are served next.
    queued: bool,
}

enum State<P> {
    /// A request is awaited, or arriving.
    Reading {
        scan: HeadScan,
        /// Where its head lies, and how many bytes it has with its body, once that is known.
        whole: Option<(HeadSpan, usize)>,
    },
    /// A request waits for its answer.
    Waiting { serial: u64, pending: P, delivery: Delivery },
}

impl<P> State<P> {
    fn reading() -> State<P> {
        State::Reading { scan: HeadScan::default(), whole: None }
    }
}

/// What becomes of a connection.
enum Step {
    /// It goes on with what it has.
    Continue,
    /// It stays, until there is more.
    Stay,
    /// It ends.
    Close,
    /// It goes on in a thread.
    Thread(Beginning),
}

/// What arrived of a request.
enum Arrived {
    /// Its head lies there, and it has so many bytes with its body, all of which are here.
    Whole(HeadSpan, usize),
    /// Not enough yet.
    Part,
    /// Nothing more will come.
    End,
    /// What a thread is to see to.
    Odd,
}

/// The thread of an event loop.
pub(super) struct Runner<S: Service> {
    service: Arc<S>,
    limits: Arc<Limits>,
    name: String,
    event_loop: EventLoop<S::Reply>,
    /// By the number of their place.
    connections: Vec<Option<Box<Connection<S::Pending>>>>,
    ready: VecDeque<usize>,
    turn: S::Turn,
    encoder: Encoder,
    serial: u64,
    now: Instant,
    next_sweep: Instant,
}

impl<S: Service> Runner<S> {
    pub(super) fn new(service: Arc<S>, limits: Arc<Limits>, name: String, event_loop: EventLoop<S::Reply>) -> Self {
        let now = Instant::now();
        Runner {
            service,
            limits,
            name,
            event_loop,
            connections: Vec::new(),
            ready: VecDeque::new(),
            turn: S::Turn::default(),
            encoder: Encoder::default(),
            serial: 0,
            now,
            next_sweep: now,
        }
    }

    /// Serves until [`Letter::End`].
    pub(super) fn run(mut self) {
        loop {
            self.wait();
            if !self.read_mail() {
                return;
            }
            // What is queued meanwhile is for the next turn.
            for _ in 0..self.ready.len() {
                if let Some(slot) = self.ready.pop_front() {
                    self.serve(slot);
                }
            }
            if self.now >= self.next_sweep {
                self.sweep();
            }
            self.service.submit(&mut self.turn);
        }
    }

    /// Waits for sockets, mail or a deadline, and notes which sockets have something.
    fn wait(&mut self) {
        let wait = match self.ready.is_empty() {
            true => self.next_sweep.saturating_duration_since(Instant::now()),
            false => Duration::ZERO,
        };
        if let Err(error) = self.event_loop.poll.poll(&mut self.event_loop.events, Some(wait)) {
            assert!(error.kind() == ErrorKind::Interrupted, "waiting for sockets fails only by a mistake: {error}");
        }
        self.now = Instant::now();
        for event in self.event_loop.events.iter().filter(|event| event.token() != MAIL) {
            let slot = event.token().0;
            if let Some(Some(connection)) = self.connections.get_mut(slot) {
                connection.readable = true;
                connection.ends |= event.is_read_closed() || event.is_error();
                if !std::mem::replace(&mut connection.queued, true) {
                    self.ready.push_back(slot);
                }
            }
        }
    }

    /// `false`: this was the last time.
    fn read_mail(&mut self) -> bool {
        // It has an end: each connection waits for one reply.
        let mail: Vec<Letter<S::Reply>> = self.event_loop.letters().collect();
        for letter in mail {
            match letter {
                Letter::Connection(place, peer) => self.welcome(place, peer),
                Letter::Reply(ticket, reply) => self.reply(ticket, reply),
                Letter::End => return false,
            }
        }
        true
    }

    fn welcome(&mut self, place: Place, peer: SocketAddr) {
        let (slot, link) = (place.slot(), place.link());
        let stream = link.stream();
        let registered = stream.set_nodelay(true).and_then(|()| stream.set_nonblocking(true)).and_then(|()| {
            let registry = self.event_loop.poll.registry();
            registry.register(&mut SourceFd(&stream.as_raw_fd()), Token(slot), Interest::READABLE)
        });
        if let Err(error) = registered {
            debug!("closing the connection from {peer}: failed to watch it: {error}");
            return;
        }
        place.set_interruptible();
        if self.connections.len() <= slot {
            self.connections.resize_with(slot + 1, || None);
        }
        let deadline = self.now + self.limits.idle_timeout;
        self.next_sweep = self.next_sweep.min(deadline);
        self.ready.push_back(slot);
        self.connections[slot] = Some(Box::new(Connection {
            place,
            link,
            peer,
            input: Input::new(),
            state: State::reading(),
            deadline,
            readable: true,
            ends: false,
            queued: true,
        }));
    }

    /// Answers the request that waits for this reply, if it still does.
    fn reply(&mut self, ticket: Ticket, reply: S::Reply) {
        let Some(connection) = self.connections.get_mut(ticket.slot) else { return };
        if !matches!(connection.as_deref(), Some(Connection { state: State::Waiting { serial, .. }, .. }) if *serial == ticket.serial)
        {
            return;
        }
        if let Some(connection) = connection.take() {
            self.finish(connection, Some(reply));
        }
    }

    /// Ends the wait of a connection, with the reply or without.
    fn finish(&mut self, mut connection: Box<Connection<S::Pending>>, reply: Option<S::Reply>) {
        let State::Waiting { pending, delivery, .. } = std::mem::replace(&mut connection.state, State::reading())
        else {
            unreachable!("only who waits is answered");
        };
        let response = self.service.finish(pending, reply, self.now);
        let step = self.deliver(&mut connection, response, delivery);
        self.settle(connection, step);
    }

    /// Works off what a connection has sent.
    fn serve(&mut self, slot: usize) {
        let Some(mut connection) = self.connections.get_mut(slot).and_then(Option::take) else { return };
        connection.queued = false;
        let mut step = Step::Continue;
        for _ in 0..REQUESTS_PER_TURN_MAX {
            step = self.proceed(&mut connection);
            if !matches!(step, Step::Continue) {
                break;
            }
        }
        self.settle(connection, step);
    }

    /// Puts a connection where it belongs now.
    fn settle(&mut self, mut connection: Box<Connection<S::Pending>>, step: Step) {
        let slot = connection.place.slot();
        match step {
            Step::Continue => {
                let more = connection.readable || !connection.input.is_empty();
                if more && !std::mem::replace(&mut connection.queued, true) {
                    self.ready.push_back(slot);
                }
                self.connections[slot] = Some(connection);
            }
            Step::Stay => self.connections[slot] = Some(connection),
            Step::Close => {}
            Step::Thread(beginning) => self.hand_over(*connection, beginning),
        }
    }

    /// Takes the next request of a connection, if it is here.
    fn proceed(&mut self, connection: &mut Connection<S::Pending>) -> Step {
        match self.receive(connection) {
            Arrived::Whole(span, length) => self.begin(connection, span, length),
            Arrived::Part => Step::Stay,
            Arrived::End => Step::Close,
            Arrived::Odd => Step::Thread(Beginning::Request { input: connection.take_input(), deadline: None }),
        }
    }

    /// Reads until a request is here, or nothing more is.
    fn receive(&mut self, connection: &mut Connection<S::Pending>) -> Arrived {
        loop {
            let begun = !connection.input.is_empty();
            let State::Reading { scan, whole } = &mut connection.state else { return Arrived::Part };
            if whole.is_none() && begun {
                *whole = match scan.advance(connection.input.unread(), &self.limits) {
                    Ok(None) => None,
                    Ok(Some(span)) => match length_of(connection.input.unread(), span, &self.limits) {
                        Some(length) => Some((span, length)),
                        None => return Arrived::Odd,
                    },
                    Err(_) => return Arrived::Odd,
                };
                if let Some((span, length)) = *whole {
                    // A stop waits for its body.
                    connection.place.set_answering();
                    connection.deadline = self.now + allowance(self.limits.body_timeout, (length - span.end) as u64);
                    self.next_sweep = self.next_sweep.min(connection.deadline);
                }
            }
            match *whole {
                Some((span, length)) if connection.input.unread().len() >= length => {
                    return Arrived::Whole(span, length);
                }
                _ if !connection.readable => return Arrived::Part,
                _ => {}
            }
            let has_head = whole.is_some();
            match connection.read() {
                // Its client is told that the body broke off, or that this server stops.
                Ok(0) if has_head => return Arrived::Odd,
                Ok(0) => return Arrived::End,
                Ok(_) if !begun => {
                    connection.deadline = self.now + self.limits.head_timeout;
                    self.next_sweep = self.next_sweep.min(connection.deadline);
                }
                Ok(_) => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Arrived::Part,
                Err(_) => return Arrived::End,
            }
        }
    }

    /// Begins to answer the request at the beginning of the input.
    fn begin(&mut self, connection: &mut Connection<S::Pending>, span: HeadSpan, length: usize) -> Step {
        let bytes = &connection.input.unread()[..length];
        let mut slots: HeaderSlots<'_> = [const { MaybeUninit::uninit() }; HEADERS_MAX];
        let slots = &mut slots[..self.limits.headers.min(HEADERS_MAX)];
        let Ok(head) = Head::parse(&bytes[span.start..span.end], slots) else {
            unreachable!("it was parsed when it arrived");
        };
        connection.place.set_answering();
        self.serial += 1;
        let ticket = Ticket { slot: connection.place.slot(), serial: self.serial };
        let caller = Caller::new(self.event_loop.mailbox(), ticket);
        let delivery = Delivery {
            head_only: *head.method() == Method::Head,
            close: !head.keep_alive(),
            keep_alive: *head.version() == HTTPVersion(1, 0),
        };
        match self.service.begin(&mut self.turn, &head, &bytes[span.end..], caller, self.now) {
            Begun::Answered(response) => {
                connection.consume(length);
                connection.state = State::reading();
                self.deliver(connection, response, delivery)
            }
            Begun::Waits(pending, until) => {
                connection.consume(length);
                connection.state = State::Waiting { serial: ticket.serial, pending, delivery };
                connection.deadline = until;
                self.next_sweep = self.next_sweep.min(until);
                Step::Stay
            }
            Begun::ForThread => Step::Thread(Beginning::Request { input: connection.take_input(), deadline: None }),
        }
    }

    /// Writes an answer, as far as the client takes it at once.
    fn deliver(&mut self, connection: &mut Connection<S::Pending>, response: Response, delivery: Delivery) -> Step {
        let delivery = Delivery { close: delivery.close || connection.place.is_stopping(), ..delivery };
        let (mut head, mut body) = self.encoder.encode(response, delivery);
        if write(connection.link.stream(), &mut head, &mut body).is_err() {
            return Step::Close;
        }
        let is_written = head.is_empty() && body.is_empty();
        if !is_written || (delivery.close && !connection.input.is_empty()) {
            let (input, head) = (connection.take_input(), head.to_vec());
            return Step::Thread(Beginning::Answer { input, head, body, close: delivery.close });
        }
        if delivery.close {
            // A connection that is gone already is finished too.
            let _ = connection.link.stream().shutdown(Shutdown::Write);
            return Step::Close;
        }
        connection.place.set_interruptible();
        let patience = if connection.input.is_empty() { self.limits.idle_timeout } else { self.limits.head_timeout };
        connection.deadline = self.now + patience;
        self.next_sweep = self.next_sweep.min(connection.deadline);
        Step::Continue
    }

    /// Ends what has taken too long.
    fn sweep(&mut self) {
        let mut next = self.now + SWEEP_INTERVAL_MAX;
        for slot in 0..self.connections.len() {
            let Some(connection) = &self.connections[slot] else { continue };
            if connection.deadline > self.now {
                next = next.min(connection.deadline);
            } else if let Some(connection) = self.connections[slot].take() {
                self.expire(connection);
            }
        }
        // An earlier deadline of an answer that was written just now is looked at a second late.
        self.next_sweep = next.max(self.now + SWEEP_INTERVAL_MIN);
    }

    fn expire(&mut self, mut connection: Box<Connection<S::Pending>>) {
        match &connection.state {
            State::Waiting { .. } => self.finish(connection, None),
            // An idle connection just ends; to a client that began a request it is said why.
            State::Reading { .. } if connection.input.is_empty() => {}
            State::Reading { .. } => {
                let deadline = Some(connection.deadline);
                let beginning = Beginning::Request { input: connection.take_input(), deadline };
                self.hand_over(*connection, beginning);
            }
        }
    }

    /// Gives a connection a thread of its own.
    fn hand_over(&mut self, connection: Connection<S::Pending>, beginning: Beginning) {
        let Connection { place, link, peer, .. } = connection;
        let stream = link.stream();
        let blocking = self.event_loop.poll.registry().deregister(&mut SourceFd(&stream.as_raw_fd()));
        if let Err(error) = blocking.and_then(|()| stream.set_nonblocking(false)) {
            debug!("closing the connection from {peer}: failed to give it to a thread: {error}");
            return;
        }
        let owes_answer = matches!(beginning, Beginning::Request { .. });
        let builder = thread::Builder::new().name(format!("{}-{}", self.name, place.slot()));
        let (service, limits, registry) = (Arc::clone(&self.service), Arc::clone(&self.limits), place.registry());
        let run = move || connection::run(&*service, &limits, &place, peer, beginning);
        if let Err(error) = builder.stack_size(self.limits.stack_bytes).spawn(run) {
            warn!("failed to start a thread for a connection: {error}");
            registry.count_refused();
            // Behind a part of an answer the client would take it for the rest.
            if owes_answer {
                turn_away(&*self.service, &mut self.encoder, stream, "no thread for this connection");
            }
        }
    }
}

impl<P> Connection<P> {
    /// Reads once.
    fn read(&mut self) -> io::Result<usize> {
        let mut stream = self.link.stream();
        let (mut room, ends) = (0, self.ends);
        let result = self.input.fill_with(|buffer| {
            room = buffer.len();
            loop {
                match stream.read(buffer) {
                    Err(error) if error.kind() == ErrorKind::Interrupted => {}
                    result => return result,
                }
            }
        });
        self.readable = match &result {
            // Less than asked for is all there is, unless the end is behind it.
            Ok(read) => *read == room || ends,
            Err(_) => false,
        };
        result
    }

    /// Uses up a request's bytes, and gives back the room that a large one needed.
    fn consume(&mut self, length: usize) {
        self.input.take(length);
        if self.input.is_empty() {
            self.input.clear();
        }
    }

    fn take_input(&mut self) -> Input {
        std::mem::replace(&mut self.input, Input::empty())
    }
}

/// How long a request is with its body, or that it is none for an event loop.
fn length_of(bytes: &[u8], span: HeadSpan, limits: &Limits) -> Option<usize> {
    let mut slots: HeaderSlots<'_> = [const { MaybeUninit::uninit() }; HEADERS_MAX];
    let head = Head::parse(&bytes[span.start..span.end], &mut slots[..limits.headers.min(HEADERS_MAX)]).ok()?;
    let Framing::Length(body) = head.framing() else { return None };
    let length = span.end + usize::try_from(body).ok().filter(|_| body <= limits.gathered_bytes)?;
    // Whoever waits to be told to go on is told so by a thread.
    if head.expects_continue() && bytes.len() < length { None } else { Some(length) }
}

/// Writes as much as is taken at once; what is left, is left in `head` and `body`.
fn write(mut stream: &std::net::TcpStream, head: &mut &[u8], body: &mut Bytes) -> io::Result<()> {
    while !head.is_empty() || !body.is_empty() {
        let result = match body.is_empty() {
            true => stream.write(head),
            false => stream.write_vectored(&[IoSlice::new(head), IoSlice::new(body)]),
        };
        let written = match result {
            Ok(0) => return Err(ErrorKind::WriteZero.into()),
            Ok(written) => written,
            Err(error) if error.kind() == ErrorKind::Interrupted => continue,
            Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(()),
            Err(error) => return Err(error),
        };
        let of_head = written.min(head.len());
        *head = &head[of_head..];
        body.advance(written - of_head);
    }
    Ok(())
}
