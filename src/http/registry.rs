//! The open connections of one server: how many there may be, and a way to end them from outside.

use std::net::{Shutdown, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// The connection reads what a stop need not wait for: a next request, a stream without end, what is thrown away.
const INTERRUPTIBLE: u8 = 0;
/// The connection owes its client an answer.
const ANSWERING: u8 = 1;

/// A connection as others than its thread see it.
#[derive(Debug)]
pub(super) struct Link {
    stream: TcpStream,
    phase: AtomicU8,
}

impl Link {
    pub(super) fn stream(&self) -> &TcpStream {
        &self.stream
    }
}

/// All connections of one server. The lock is taken when a connection begins, when it ends, and to stop, never for a
/// request.
#[derive(Debug)]
pub(super) struct Registry {
    connections_max: usize,
    slots: Mutex<Slots>,
    ended: Condvar,
    stopping: AtomicBool,
    refused: AtomicU64,
}

#[derive(Debug, Default)]
struct Slots {
    /// By slot number; a free slot is `None` and stands in `free`.
    links: Vec<Option<Arc<Link>>>,
    free: Vec<usize>,
}

impl Slots {
    fn open(&self) -> usize {
        self.links.len() - self.free.len()
    }
}

impl Registry {
    pub(super) fn new(connections_max: usize) -> Registry {
        Registry {
            connections_max,
            slots: Mutex::default(),
            ended: Condvar::new(),
            stopping: AtomicBool::new(false),
            refused: AtomicU64::new(0),
        }
    }

    /// Takes a connection in, or gives it back if there are too many.
    pub(super) fn admit(self: &Arc<Self>, stream: TcpStream) -> Result<Place, TcpStream> {
        let mut slots = self.lock();
        if slots.open() >= self.connections_max {
            return Err(stream);
        }
        let link = Arc::new(Link { stream, phase: AtomicU8::new(INTERRUPTIBLE) });
        let slot = slots.free.pop().unwrap_or_else(|| {
            slots.links.push(None);
            slots.links.len() - 1
        });
        slots.links[slot] = Some(Arc::clone(&link));
        Ok(Place { registry: Arc::clone(self), link, slot })
    }

    pub(super) fn is_stopping(&self) -> bool {
        self.stopping.load(Ordering::SeqCst)
    }

    pub(super) fn open(&self) -> usize {
        self.lock().open()
    }

    pub(super) fn limit(&self) -> usize {
        self.connections_max
    }

    pub(super) fn refused(&self) -> u64 {
        self.refused.load(Ordering::Relaxed)
    }

    pub(super) fn count_refused(&self) {
        self.refused.fetch_add(1, Ordering::Relaxed);
    }

    /// From now on connections end when they owe no answer. Those that owe none already end at once.
    pub(super) fn stop(&self) {
        self.stopping.store(true, Ordering::SeqCst);
        for link in self.lock().links.iter().flatten() {
            if link.phase.load(Ordering::SeqCst) == INTERRUPTIBLE {
                interrupt(link);
            }
        }
    }

    /// Waits until no connection is left. When `deadline` comes first, cuts off those that are left and returns how
    /// many they were.
    pub(super) fn drain(&self, deadline: Instant) -> usize {
        let mut slots = self.lock();
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            if slots.open() == 0 || left == Duration::ZERO {
                break;
            }
            (slots, _) = self.ended.wait_timeout(slots, left).unwrap_or_else(PoisonError::into_inner);
        }
        for link in slots.links.iter().flatten() {
            // Fails only for a connection that is gone already.
            let _ = link.stream.shutdown(Shutdown::Both);
        }
        slots.open()
    }

    fn lock(&self) -> MutexGuard<'_, Slots> {
        // Nothing that could panic stands between two changes that belong together.
        self.slots.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Ends the reads of a connection: of what has not arrived by now, nothing will be read.
fn interrupt(link: &Link) {
    // Fails only for a connection that is gone already.
    let _ = link.stream.shutdown(Shutdown::Read);
}

/// A connection's place in the registry, given back when dropped.
#[derive(Debug)]
pub(super) struct Place {
    registry: Arc<Registry>,
    link: Arc<Link>,
    slot: usize,
}

impl Place {
    /// A number below the limit of connections that no other open connection has.
    pub(super) fn slot(&self) -> usize {
        self.slot
    }

    pub(super) fn link(&self) -> Arc<Link> {
        Arc::clone(&self.link)
    }

    pub(super) fn registry(&self) -> Arc<Registry> {
        Arc::clone(&self.registry)
    }

    pub(super) fn is_stopping(&self) -> bool {
        self.registry.is_stopping()
    }

    /// Reads from here on may be ended by a stop, and are if it has come already.
    pub(super) fn set_interruptible(&self) {
        // The store comes before the load here, and in `stop` as well: one of the two sees the other's.
        self.link.phase.store(INTERRUPTIBLE, Ordering::SeqCst);
        if self.is_stopping() {
            interrupt(&self.link);
        }
    }

    /// A request is here whole enough that its client is owed an answer: a stop waits for it.
    pub(super) fn set_answering(&self) {
        self.link.phase.store(ANSWERING, Ordering::SeqCst);
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut slots = self.registry.lock();
        slots.links[self.slot] = None;
        slots.free.push(self.slot);
        drop(slots);
        self.registry.ended.notify_all();
    }
}
