//! The way into an event loop: what other threads put there, and how they wake it.

use std::fmt;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use crossbeam_channel::{Receiver, Sender, TryIter, bounded};
use log::warn;
use mio::{Events, Poll, Token, Waker};

use super::registry::Place;

/// Letters that fit for each connection there may be: its arrival, the answer it waits for, and answers that come after
/// it has given up waiting. One that finds no room is dropped, and its connection gives up at its deadline.
const LETTERS_PER_CONNECTION: usize = 4;

/// Sockets whose events are taken at once. What does not fit is told by the next wait.
const EVENTS_MAX: usize = 1024;

/// The token of the mailbox among those of the sockets.
pub(super) const MAIL: Token = Token(usize::MAX);

/// What an event loop is told.
pub(super) enum Letter<R> {
    /// A new connection.
    Connection(Place, SocketAddr),
    /// The answer that a request waits for.
    Reply(Ticket, R),
    /// Nobody is left to serve.
    End,
}

/// Names a request of an event loop that waits for its answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Ticket {
    /// The connection's slot in the loop.
    pub(super) slot: usize,
    /// Different for each request of the loop: a slot is used again.
    pub(super) serial: u64,
}

/// The queue into one event loop, which sleeps on sockets and not on a channel.
///
/// Letters are put first and the loop is woken afterwards, once for however many: a batch of answers costs one system
/// call.
pub struct Mailbox<R> {
    letters: Sender<Letter<R>>,
    waker: Waker,
    /// Letters lie here that the loop has not been woken for.
    filled: AtomicBool,
}

impl<R> fmt::Debug for Mailbox<R> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Mailbox").field("letters", &self.letters.len()).finish_non_exhaustive()
    }
}

impl<R> Mailbox<R> {
    /// Puts a letter in, for which [`Mailbox::wake`] must follow. Gives it back if there is no room.
    pub(super) fn put(&self, letter: Letter<R>) -> Result<(), Letter<R>> {
        put_and_raise(&self.filled, || self.letters.try_send(letter).map_err(|error| error.into_inner()))
    }

    /// Puts a letter in, waiting for room, and wakes the loop. Nobody reads it if the loop has ended.
    pub(super) fn send(&self, letter: Letter<R>) {
        if put_and_raise(&self.filled, || self.letters.send(letter)).is_ok() {
            self.wake();
        }
    }

    /// Wakes the loop, if anything was put in since it was last woken.
    pub fn wake(&self) {
        wake_if_raised(&self.filled, || {
            if let Err(error) = self.waker.wake() {
                // The loop looks at its mail whenever it looks at its deadlines, so this delays answers and loses none.
                warn!("failed to wake an event loop: {error}");
            }
        });
    }
}

/// Says that letters lie there that nobody was woken for. A test puts a model of an atomic in its place.
trait Flag {
    fn raise(&self);
    /// Whether it was raised.
    fn lower(&self) -> bool;
}

impl Flag for AtomicBool {
    fn raise(&self) {
        self.store(true, Ordering::Release);
    }

    fn lower(&self) -> bool {
        self.swap(false, Ordering::AcqRel)
    }
}

/// The letter first: whoever lowers the flag wakes the loop for it too.
fn put_and_raise<E>(filled: &impl Flag, put: impl FnOnce() -> Result<(), E>) -> Result<(), E> {
    put()?;
    filled.raise();
    Ok(())
}

/// The flag first: a letter that comes while the loop is woken raises it again.
fn wake_if_raised(filled: &impl Flag, wake: impl FnOnce()) {
    if filled.lower() {
        wake();
    }
}

/// Where the answer to one request of an event loop goes.
pub struct Caller<R> {
    mailbox: Arc<Mailbox<R>>,
    ticket: Ticket,
}

impl<R> fmt::Debug for Caller<R> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Caller").field(&self.ticket).finish()
    }
}

impl<R> Caller<R> {
    pub(super) fn new(mailbox: Arc<Mailbox<R>>, ticket: Ticket) -> Caller<R> {
        Caller { mailbox, ticket }
    }

    /// Answers the request. The loop sees it when [`Mailbox::wake`] is called, or when it wakes for another reason.
    pub fn put(self, reply: R) {
        // Without room it is dropped: see `LETTERS_PER_CONNECTION`.
        drop(self.mailbox.put(Letter::Reply(self.ticket, reply)));
    }

    /// Answers the request, and wakes the loop at once.
    pub fn reply(self, reply: R) {
        let mailbox = Arc::clone(&self.mailbox);
        self.put(reply);
        mailbox.wake();
    }
}

/// What an event loop waits at: its sockets and its mailbox. Made before the loop runs, so that those who answer can be
/// given the way in first.
pub struct EventLoop<R> {
    pub(super) poll: Poll,
    pub(super) events: Events,
    pub(super) mailbox: Arc<Mailbox<R>>,
    letters: Receiver<Letter<R>>,
}

impl<R> fmt::Debug for EventLoop<R> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("EventLoop").field("mailbox", &self.mailbox).finish_non_exhaustive()
    }
}

impl<R> EventLoop<R> {
    /// A loop that nobody runs yet, for a server of at most so many connections.
    ///
    /// # Errors
    /// What the system says: mostly that descriptors have run out.
    pub fn new(connections_max: usize) -> io::Result<EventLoop<R>> {
        let poll = Poll::new()?;
        let waker = Waker::new(poll.registry(), MAIL)?;
        let (sender, letters) = bounded(connections_max.saturating_mul(LETTERS_PER_CONNECTION).saturating_add(1));
        let mailbox = Arc::new(Mailbox { letters: sender, waker, filled: AtomicBool::new(false) });
        Ok(EventLoop { poll, events: Events::with_capacity(EVENTS_MAX), mailbox, letters })
    }

    /// The way in.
    pub fn mailbox(&self) -> Arc<Mailbox<R>> {
        Arc::clone(&self.mailbox)
    }

    /// The letters that are there.
    pub(super) fn letters(&self) -> TryIter<'_, Letter<R>> {
        self.letters.try_iter()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    fn is_woken(event_loop: &mut EventLoop<u32>, within: Duration) -> bool {
        event_loop.poll.poll(&mut event_loop.events, Some(within)).unwrap();
        event_loop.events.iter().any(|event| event.token() == MAIL)
    }

    fn caller(event_loop: &EventLoop<u32>, serial: u64) -> Caller<u32> {
        Caller::new(event_loop.mailbox(), Ticket { slot: 0, serial })
    }

    #[test]
    fn many_letters_wake_once() {
        let mut event_loop = EventLoop::new(1).unwrap();
        caller(&event_loop, 1).put(7);
        caller(&event_loop, 2).put(8);
        assert!(!is_woken(&mut event_loop, Duration::ZERO));
        event_loop.mailbox().wake();
        assert!(is_woken(&mut event_loop, Duration::from_secs(10)));
        event_loop.mailbox().wake();
        assert!(!is_woken(&mut event_loop, Duration::ZERO), "nothing new");
        let replies: Vec<u32> = event_loop
            .letters()
            .filter_map(|letter| if let Letter::Reply(_, reply) = letter { Some(reply) } else { None })
            .collect();
        assert_eq!(replies, [7, 8]);
        caller(&event_loop, 3).reply(9);
        assert!(is_woken(&mut event_loop, Duration::from_secs(10)));
    }

    impl Flag for loom::sync::atomic::AtomicBool {
        fn raise(&self) {
            self.store(true, Ordering::Release);
        }

        fn lower(&self) -> bool {
            self.swap(false, Ordering::AcqRel)
        }
    }

    /// Driver and applier put letters and wake, the loop reads whenever it is woken: in every order that two processors
    /// and the memory between them allow, no letter stays behind.
    #[test]
    fn no_letter_lies_there_that_the_loop_was_not_woken_for() {
        use loom::sync::atomic::{AtomicBool, AtomicUsize};
        use loom::sync::{Arc, Mutex};

        loom::model(|| {
            let mailbox = Arc::new((Mutex::new(0), AtomicBool::new(false), AtomicUsize::new(0)));
            let answer = |mailbox: &(Mutex<usize>, AtomicBool, AtomicUsize)| {
                let (letters, filled, woken) = mailbox;
                let put = || {
                    *letters.lock().unwrap() += 1;
                    Ok::<(), ()>(())
                };
                put_and_raise(filled, put).unwrap();
                wake_if_raised(filled, || _ = woken.fetch_add(1, Ordering::AcqRel));
            };
            let drain = |mailbox: &(Mutex<usize>, AtomicBool, AtomicUsize)| {
                let woken = mailbox.2.swap(0, Ordering::AcqRel) > 0;
                if woken { std::mem::take(&mut *mailbox.0.lock().unwrap()) } else { 0 }
            };
            let others = [0; 2].map(|_| {
                let mailbox = mailbox.clone();
                loom::thread::spawn(move || answer(&mailbox))
            });
            let mut read = drain(&mailbox);
            others.into_iter().for_each(|thread| thread.join().unwrap());
            read += drain(&mailbox);
            assert_eq!(read, 2, "the loop sleeps, and a letter lies there");
        });
    }

    #[test]
    fn a_full_mailbox_drops_what_comes_late_and_stays_usable() {
        let event_loop = EventLoop::new(1).unwrap();
        for serial in 0..10 {
            caller(&event_loop, serial).reply(serial as u32);
        }
        assert_eq!(event_loop.letters().count(), LETTERS_PER_CONNECTION + 1);
        caller(&event_loop, 10).reply(10);
        assert_eq!(event_loop.letters().count(), 1);
    }
}
