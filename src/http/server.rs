//! The listening side: accepting, refusing, stopping.

use std::fmt;
use std::io;
use std::net::{SocketAddr, TcpListener, TcpStream, ToSocketAddrs};
use std::sync::Arc;
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use log::{debug, warn};
use rustix::io::Errno;

use super::connection::{self, Beginning, turn_away};
use super::event_loop::Runner;
use super::limits::Limits;
use super::mailbox::{EventLoop, Letter, Mailbox};
use super::registry::Registry;
use super::response::Encoder;
use super::service::Service;

/// How long accepting rests when descriptors or memory have run out. The connections wait in the kernel meanwhile.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);
/// The same complaint is logged once in this time.
const COMPLAINT_INTERVAL: Duration = Duration::from_secs(1);
/// How long waking the accept thread by connecting to it may take.
const WAKE_TIMEOUT: Duration = Duration::from_secs(1);

/// A bound port that nobody serves yet. Connections already queue up in the kernel.
#[derive(Debug)]
pub struct Listener {
    listener: TcpListener,
    local_addr: SocketAddr,
}

impl Listener {
    /// Binds `addr`. Port 0 lets the kernel choose one; [`local_addr`](Listener::local_addr) tells which.
    ///
    /// # Errors
    /// What binding says: the port is taken, the address is not this machine's, the name does not resolve.
    pub fn bind(addr: impl ToSocketAddrs) -> io::Result<Listener> {
        let listener = TcpListener::bind(addr)?;
        let local_addr = listener.local_addr()?;
        Ok(Listener { listener, local_addr })
    }

    /// The address that is bound.
    pub fn local_addr(&self) -> SocketAddr {
        self.local_addr
    }

    /// Serves the port from a thread `<name>-accept` and one thread `<name>-<number>` per connection. A name of up to
    /// 8 bytes leaves these within what Linux shows.
    ///
    /// # Errors
    /// If the accept thread cannot be started.
    pub fn serve<S: Service>(self, service: Arc<S>, limits: Limits, name: &str) -> io::Result<Handle> {
        self.serve_in_loops(service, limits, name, Vec::new())
    }

    /// Serves the port from event loops, each in a thread `<name>-loop-<number>`, which give to threads only the
    /// connections that need one; without event loops as [`serve`](Listener::serve).
    ///
    /// # Errors
    /// If a thread cannot be started.
    pub fn serve_in_loops<S: Service>(
        self,
        service: Arc<S>,
        limits: Limits,
        name: &str,
        event_loops: Vec<EventLoop<S::Reply>>,
    ) -> io::Result<Handle> {
        let listener = Arc::new(self.listener);
        let registry = Arc::new(Registry::new(limits.connections));
        let limits = Arc::new(limits);
        let mut loops = Loops { mailboxes: Vec::new(), threads: Vec::new() };
        for (number, event_loop) in event_loops.into_iter().enumerate() {
            loops.mailboxes.push(event_loop.mailbox());
            let runner = Runner::new(Arc::clone(&service), Arc::clone(&limits), name.to_owned(), event_loop);
            let builder = thread::Builder::new().name(format!("{name}-loop-{number}"));
            loops.threads.push(builder.spawn(move || runner.run())?);
        }
        let acceptor = Acceptor {
            listener: Arc::clone(&listener),
            service,
            limits,
            mailboxes: loops.mailboxes.clone(),
            registry: Arc::clone(&registry),
            name: name.to_owned(),
            encoder: Encoder::default(),
            complained: None,
        };
        let thread = thread::Builder::new().name(format!("{name}-accept")).spawn(move || acceptor.run())?;
        let accepting = Some((listener, thread));
        Ok(Handle { local_addr: self.local_addr, registry, accepting, loops: Box::new(loops) })
    }
}

/// What a [`Handle::stop`] left behind.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stopped {
    /// Connections that still owed an answer, or had not noticed yet, when the time was up. They were cut off.
    pub cut_off: usize,
}

/// The connections of a server, to look at.
#[derive(Clone, Debug)]
pub struct Connections(Arc<Registry>);

impl Connections {
    /// Connections open now.
    pub fn open(&self) -> usize {
        self.0.open()
    }

    /// Connections open at once, at most.
    pub fn limit(&self) -> usize {
        self.0.limit()
    }

    /// Connections turned away because there were too many, or no thread could be had.
    pub fn refused(&self) -> u64 {
        self.0.refused()
    }
}

/// A running server. Dropping it stops it without waiting for anyone.
pub struct Handle {
    local_addr: SocketAddr,
    registry: Arc<Registry>,
    accepting: Option<(Arc<TcpListener>, JoinHandle<()>)>,
    loops: Box<dyn End>,
}

impl fmt::Debug for Handle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Handle").field("local_addr", &self.local_addr).finish_non_exhaustive()
    }
}

/// Event loops whatever they are sent.
trait End: Send + Sync {
    /// Ends them; connections that they still hold are closed.
    fn end(&mut self);
}

struct Loops<R> {
    mailboxes: Vec<Arc<Mailbox<R>>>,
    threads: Vec<JoinHandle<()>>,
}

impl<R: Send> End for Loops<R> {
    fn end(&mut self) {
        for mailbox in &self.mailboxes {
            mailbox.send(Letter::End);
        }
        for thread in self.threads.drain(..) {
            if thread.join().is_err() {
                warn!("an event loop had panicked");
            }
        }
    }
}

impl Handle {
    /// The address that is served.
    pub fn local_addr(&self) -> SocketAddr {
        self.local_addr
    }

    /// Connections open now.
    pub fn connections_open(&self) -> usize {
        self.registry.open()
    }

    /// Connections turned away because there were too many, or no thread could be had.
    pub fn connections_refused(&self) -> u64 {
        self.registry.refused()
    }

    /// What there is to know of the connections, for as long as anybody wants to know it.
    pub fn connections(&self) -> Connections {
        Connections(Arc::clone(&self.registry))
    }

    /// Stops: accepts nothing more, ends connections that owe no answer, streams included, and waits up to `within` for
    /// the others to be answered with `Connection: close`. Then cuts off what is left.
    pub fn stop(mut self, within: Duration) -> Stopped {
        self.halt(within)
    }

    fn halt(&mut self, within: Duration) -> Stopped {
        let Some((listener, thread)) = self.accepting.take() else { return Stopped { cut_off: 0 } };
        let deadline = Instant::now() + within;
        self.registry.stop();
        if rustix::net::shutdown(&*listener, rustix::net::Shutdown::Both).is_err() {
            // Where a listening socket cannot be shut down, a connection wakes its thread as well.
            let _ = TcpStream::connect_timeout(&self.local_addr, WAKE_TIMEOUT);
        }
        if thread.join().is_err() {
            warn!("the accept thread of {} had panicked", self.local_addr);
        }
        // The port is free from here on, however long the answers take.
        drop(listener);
        // A connection accepted while the flag went up sees it before its first read, and is in the registry by now.
        let stopped = Stopped { cut_off: self.registry.drain(deadline) };
        self.loops.end();
        stopped
    }
}

impl Drop for Handle {
    fn drop(&mut self) {
        self.halt(Duration::ZERO);
    }
}

/// The accept thread.
struct Acceptor<S: Service> {
    listener: Arc<TcpListener>,
    service: Arc<S>,
    limits: Arc<Limits>,
    registry: Arc<Registry>,
    name: String,
    /// Of the event loops; without any, each connection gets a thread.
    mailboxes: Vec<Arc<Mailbox<S::Reply>>>,
    encoder: Encoder,
    /// The last complaint and when it was made.
    complained: Option<(Option<i32>, Instant)>,
}

impl<S: Service> Acceptor<S> {
    fn run(mut self) {
        while !self.registry.is_stopping() {
            match self.listener.accept() {
                Ok((stream, peer)) => self.begin(stream, peer),
                Err(error) if is_of_one_connection(&error) => {
                    debug!("a connection was gone before it was accepted: {error}")
                }
                Err(error) if self.registry.is_stopping() => debug!("accepting ends: {error}"),
                Err(error) => {
                    self.complain("failed to accept a connection, trying again", &error);
                    thread::sleep(ACCEPT_PAUSE);
                }
            }
        }
    }

    /// Gives a connection to an event loop or to a thread of its own.
    fn begin(&mut self, stream: TcpStream, peer: SocketAddr) {
        let place = match self.registry.admit(stream) {
            Ok(place) => place,
            Err(stream) => return self.refuse(&stream, "too many connections"),
        };
        if !self.mailboxes.is_empty() {
            let mailbox = &self.mailboxes[place.slot() % self.mailboxes.len()];
            return mailbox.send(Letter::Connection(place, peer));
        }
        let link = place.link();
        let name = format!("{}-{}", self.name, place.slot());
        let (service, limits) = (Arc::clone(&self.service), Arc::clone(&self.limits));
        let builder = thread::Builder::new().name(name).stack_size(self.limits.stack_bytes);
        let spawned = builder.spawn(move || connection::run(&*service, &limits, &place, peer, Beginning::New));
        if let Err(error) = spawned {
            self.complain("failed to start a thread for a connection", &error);
            self.refuse(link.stream(), "no thread for this connection");
        }
    }

    /// Turns a connection away, without waiting for its client in any way.
    fn refuse(&mut self, stream: &TcpStream, detail: &str) {
        self.registry.count_refused();
        turn_away(&*self.service, &mut self.encoder, stream, detail);
    }

    /// Logs an error, unless the same was logged a moment ago.
    fn complain(&mut self, what: &str, error: &io::Error) {
        let cause = error.raw_os_error();
        let recent = |&(other, at): &(Option<i32>, Instant)| other == cause && at.elapsed() < COMPLAINT_INTERVAL;
        if !self.complained.as_ref().is_some_and(recent) {
            warn!("{what}: {error}");
            self.complained = Some((cause, Instant::now()));
        }
    }
}

/// Whether an error of accept is about the connection that was to be accepted, so that the next one may do better.
/// Linux hands over errors that befell a connection while it was queued.
fn is_of_one_connection(error: &io::Error) -> bool {
    let Some(errno) = Errno::from_io_error(error) else { return false };
    matches!(
        errno,
        Errno::CONNABORTED
            | Errno::INTR
            | Errno::AGAIN
            | Errno::PROTO
            | Errno::NETDOWN
            | Errno::NOPROTOOPT
            | Errno::HOSTDOWN
            | Errno::HOSTUNREACH
            | Errno::NETUNREACH
            | Errno::OPNOTSUPP
            | Errno::TIMEDOUT
            | Errno::PERM
    )
}
