//! The loop of one thread, which drives its share of the connections.

use std::collections::VecDeque;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use rustix::buffer::spare_capacity;
use rustix::event::epoll::{self, EventData, EventFlags};
use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::fd::OwnedFd;
use rustix::io::Errno;

use crate::connection::{Connection, InFlight, Link};
use crate::request::Requests;
use crate::schedule::{Clock, Schedule, nanos};
use crate::tally::{Failure, Tally};

/// How often to look for answers that are late and connections to make again.
const TICK: Duration = Duration::from_millis(50);

/// How long to leave a node alone that has refused a connection: a dead one must not cost the others processor time.
const RECONNECT_DELAY: Duration = Duration::from_millis(100);

/// More than this in one `epoll_wait` would save little, and let the first answers wait for the last.
const EVENTS_MAX: usize = 128;

/// What one `read` takes: more than most answers.
const READ_BYTES: usize = 64 << 10;

/// One thread's share of a run.
pub(crate) struct Worker {
    connections: Vec<Connection>,
    /// Those that are up and have nothing under way; the one that has waited longest is first.
    idle: VecDeque<usize>,
    in_flight: usize,
    requests: Requests,
    schedule: Schedule,
    tally: Tally,
    clock: Clock,
    timeout: u64,
    /// For whoever watches: successes so far.
    answered: Arc<AtomicU64>,
    answered_here: u64,
    epoll: OwnedFd,
    buffer: Box<[u8]>,
}

impl Worker {
    /// Takes connections that are up.
    ///
    /// # Errors
    /// What `epoll` refuses.
    pub(crate) fn new(
        connections: Vec<Connection>,
        requests: Requests,
        schedule: Schedule,
        tally: Tally,
        timeout: Duration,
        answered: Arc<AtomicU64>,
    ) -> io::Result<Self> {
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        for (id, connection) in connections.iter().enumerate() {
            let stream = connection.stream().expect("the connections of a new worker are up");
            epoll::add(&epoll, stream, event_data(id, connection), EventFlags::IN)?;
        }
        Ok(Self {
            idle: (0..connections.len()).collect(),
            connections,
            in_flight: 0,
            requests,
            schedule,
            tally,
            clock: Clock::start(),
            timeout: nanos(timeout),
            answered,
            answered_here: 0,
            epoll,
            buffer: vec![0; READ_BYTES].into_boxed_slice(),
        })
    }

    /// Runs until the schedule has ended and nothing is under way. All workers of a run get the same `clock`.
    ///
    /// # Errors
    /// What `epoll` refuses; failures of the nodes are counted and are none.
    pub(crate) fn run(mut self, clock: Clock) -> io::Result<Tally> {
        self.clock = clock;
        // A request of an open loop would be up to 50 us late by default. Refused, it is that late.
        let _ = rustix::thread::set_current_timer_slack(std::num::NonZeroU64::new(1));
        let mut events = Vec::with_capacity(EVENTS_MAX);
        let mut tick_at = 0;
        loop {
            let now = self.clock.now();
            if now >= tick_at {
                self.tick(now)?;
                tick_at = now + nanos(TICK);
            }
            self.start_requests(now)?;
            if self.is_done(now) {
                return Ok(self.tally);
            }
            self.wait(&mut events, tick_at)?;
            for event in events.drain(..) {
                self.take_event(event)?;
            }
            self.answered.store(self.answered_here, Ordering::Relaxed);
        }
    }

    fn is_done(&self, now: u64) -> bool {
        match self.schedule {
            // A fill needs every key, and the first failure says why it cannot be.
            Schedule::Count { .. } if !self.tally.failures.is_empty() => true,
            _ => self.in_flight == 0 && self.schedule.next_due(now).is_none(),
        }
    }

    /// Waits for events, for the time of the next request if a connection is free for it, or for the next tick.
    fn wait(&self, events: &mut Vec<epoll::Event>, tick_at: u64) -> io::Result<()> {
        let now = self.clock.now();
        let due = if self.idle.is_empty() { None } else { self.schedule.next_due(now) };
        let mut timeout = timespec(tick_at.saturating_sub(now));
        if let Some(due) = due.filter(|due| *due < tick_at) {
            // epoll_wait has milliseconds, and would make requests late by up to one; ppoll has nanoseconds.
            let mut ready = [PollFd::new(&self.epoll, PollFlags::IN)];
            ignore_signal(rustix::event::poll(&mut ready, timespec(due.saturating_sub(now)).as_ref()))?;
            timeout = timespec(0);
        }
        ignore_signal(epoll::wait(&self.epoll, spare_capacity(events), timeout.as_ref()))
    }

    /// Gives requests that are due to connections that are free.
    fn start_requests(&mut self, now: u64) -> io::Result<()> {
        while let Some(&id) = self.idle.front() {
            let Some(start) = self.schedule.next(now) else { break };
            self.idle.pop_front();
            let connection = &mut self.connections[id];
            let (operation, request) = self.requests.next(connection.target);
            self.in_flight += 1;
            match connection.send(request, InFlight { operation, start, sent_at: now }) {
                Ok(true) => {}
                Ok(false) => self.watch(id, EventFlags::IN | EventFlags::OUT)?,
                Err(failure) => self.lose(id, failure, now)?,
            }
        }
        Ok(())
    }

    fn take_event(&mut self, event: epoll::Event) -> io::Result<()> {
        let (id, generation) = id_and_generation(event.data);
        let flags = event.flags;
        let connection = &mut self.connections[id];
        // An earlier event of the same batch may have found the connection lost and begun to make it again.
        if connection.generation != generation {
            return Ok(());
        }
        match &connection.link {
            Link::Down { .. } => return Ok(()),
            Link::Connecting { .. } => return self.finish_connecting(id),
            Link::Up(_) => {}
        }
        if flags.contains(EventFlags::OUT) {
            match connection.send_rest() {
                Ok(true) => self.watch(id, EventFlags::IN)?,
                Ok(false) => {}
                Err(failure) => return self.lose(id, failure, self.clock.now()),
            }
        }
        if !flags.intersects(EventFlags::IN | EventFlags::HUP | EventFlags::ERR) {
            return Ok(());
        }
        let received = self.connections[id].receive(&mut self.buffer);
        let now = self.clock.now();
        match received {
            Ok(None) => Ok(()),
            Ok(Some(answer)) => {
                self.take_answer(id, answer.status, now);
                if answer.keep_alive && self.connections[id].is_sent() {
                    self.idle.push_back(id);
                } else {
                    self.connect(id, now)?;
                }
                self.start_requests(now)
            }
            Err(failure) => self.lose(id, failure, now),
        }
    }

    fn take_answer(&mut self, id: usize, status: u16, now: u64) {
        let Some(in_flight) = self.connections[id].in_flight.take() else { return };
        self.in_flight -= 1;
        if (200..300).contains(&status) {
            self.answered_here += 1;
            self.tally.succeeded(in_flight.operation, in_flight.start, now);
        } else {
            self.tally.failed(Failure::Status(status), in_flight.start);
        }
    }

    /// Counts what was under way on a connection as failed, and makes the connection again.
    fn lose(&mut self, id: usize, failure: Failure, now: u64) -> io::Result<()> {
        match self.connections[id].in_flight.take() {
            Some(in_flight) => {
                self.in_flight -= 1;
                self.tally.failed(failure, in_flight.start);
            }
            // A server may close a connection that nothing is under way on.
            None => self.idle.retain(|idle| *idle != id),
        }
        self.connect(id, now)
    }

    fn connect(&mut self, id: usize, now: u64) -> io::Result<()> {
        let connection = &mut self.connections[id];
        let outcome = connection.reconnect(now);
        match connection.stream() {
            Some(stream) if outcome.is_ok() => {
                Ok(epoll::add(&self.epoll, stream, event_data(id, connection), EventFlags::OUT)?)
            }
            _ => {
                self.refuse(id, now);
                Ok(())
            }
        }
    }

    fn finish_connecting(&mut self, id: usize) -> io::Result<()> {
        let connection = &mut self.connections[id];
        let Link::Connecting { stream, .. } = std::mem::replace(&mut connection.link, Link::Down { retry_at: 0 })
        else {
            return Ok(());
        };
        let now = self.clock.now();
        if !matches!(stream.take_error(), Ok(None)) {
            self.refuse(id, now);
            return Ok(());
        }
        connection.link = Link::Up(stream);
        self.watch(id, EventFlags::IN)?;
        self.idle.push_back(id);
        self.start_requests(now)
    }

    fn refuse(&mut self, id: usize, now: u64) {
        self.tally.failed(Failure::NotConnected, now);
        self.connections[id].link = Link::Down { retry_at: now + nanos(RECONNECT_DELAY) };
    }

    fn watch(&self, id: usize, flags: EventFlags) -> io::Result<()> {
        let connection = &self.connections[id];
        match connection.stream() {
            Some(stream) => Ok(epoll::modify(&self.epoll, stream, event_data(id, connection), flags)?),
            None => Ok(()),
        }
    }

    /// Looks after what no event tells of.
    fn tick(&mut self, now: u64) -> io::Result<()> {
        let limit = now.saturating_sub(self.timeout);
        for id in 0..self.connections.len() {
            let connection = &self.connections[id];
            match (&connection.link, &connection.in_flight) {
                (Link::Down { retry_at }, _) if *retry_at <= now => self.connect(id, now)?,
                (Link::Connecting { since, .. }, _) if *since < limit => self.refuse(id, now),
                (_, Some(in_flight)) if in_flight.sent_at < limit => self.lose(id, Failure::TimedOut, now)?,
                _ => {}
            }
        }
        while let Some(start) = self.schedule.overdue(limit) {
            self.tally.failed(Failure::NotSent, start);
        }
        Ok(())
    }
}

fn timespec(nanos: u64) -> Option<Timespec> {
    Timespec::try_from(Duration::from_nanos(nanos)).ok()
}

fn ignore_signal(outcome: Result<usize, Errno>) -> io::Result<()> {
    match outcome {
        Ok(_) | Err(Errno::INTR) => Ok(()),
        Err(errno) => Err(errno.into()),
    }
}

fn event_data(id: usize, connection: &Connection) -> EventData {
    EventData::new_u64(u64::from(connection.generation) << 32 | id as u64)
}

fn id_and_generation(data: EventData) -> (usize, u32) {
    let data = data.u64();
    ((data & u64::from(u32::MAX)) as usize, (data >> 32) as u32)
}
