//! When requests start. Times are nanoseconds since the start of the run.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// The clock of one run, shared by its workers.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Clock {
    start: Instant,
}

impl Clock {
    /// Starts now.
    pub(crate) fn start() -> Self {
        Self { start: Instant::now() }
    }

    /// Nanoseconds since the start.
    pub(crate) fn now(&self) -> u64 {
        nanos(self.start.elapsed())
    }
}

/// A duration in nanoseconds; more than 584 years are as many.
pub(crate) fn nanos(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}

/// When the requests of one worker start.
#[derive(Clone, Debug)]
pub(crate) enum Schedule {
    /// As soon as a connection is free.
    Closed {
        /// None starts behind it.
        window: Window,
    },
    /// By the clock.
    Open(OpenLoop),
    /// As soon as a connection is free, so many times.
    Count {
        /// How many are left.
        left: u64,
    },
}

impl Schedule {
    /// When the next request was to start, if that is not after `now`; each is handed out once.
    pub(crate) fn next(&mut self, now: u64) -> Option<u64> {
        match self {
            Self::Closed { window } => (now < window.end()).then_some(now),
            Self::Open(open) => {
                let due = open.due()?;
                (due <= now).then(|| {
                    open.next += open.step;
                    due
                })
            }
            Self::Count { left } => {
                *left = left.checked_sub(1)?;
                Some(now)
            }
        }
    }

    /// When a free connection is to be given its next request; None: never.
    pub(crate) fn next_due(&self, now: u64) -> Option<u64> {
        match self {
            Self::Closed { window } => (now < window.end()).then_some(now),
            Self::Open(open) => open.due(),
            Self::Count { left } => (*left > 0).then_some(now),
        }
    }

    /// Takes out a request that should have started before `limit`, and has found no connection since.
    pub(crate) fn overdue(&mut self, limit: u64) -> Option<u64> {
        match self {
            Self::Open(open) if open.due()? < limit => {
                let due = open.due();
                open.next += open.step;
                due
            }
            _ => None,
        }
    }
}

/// A fixed rate: request `i` of all workers is due at `i / rate`, and each worker takes every `step`-th.
#[derive(Clone, Debug)]
pub(crate) struct OpenLoop {
    /// The number of the next request of this worker.
    next: u64,
    /// The number of workers.
    step: u64,
    /// Requests per second, of all workers.
    rate: u64,
    /// None is due from here on.
    end: u64,
}

impl OpenLoop {
    /// The requests of worker `worker` of `workers`; `rate` is for all of them, per second, and not 0.
    pub(crate) fn new(rate: u64, worker: u64, workers: u64, end: u64) -> Self {
        Self { next: worker, step: workers, rate, end }
    }

    fn due(&self) -> Option<u64> {
        // By division each time: adding up a rounded interval would drift away from the rate.
        let due = u128::from(self.next) * 1_000_000_000 / u128::from(self.rate);
        u64::try_from(due).ok().filter(|due| *due < self.end)
    }
}

/// What of a run counts. Clones are the same window: what is set of it while the run goes on, is set for all workers.
#[derive(Clone, Debug)]
pub(crate) struct Window(Arc<Bounds>);

#[derive(Debug)]
struct Bounds {
    start: AtomicU64,
    end: AtomicU64,
}

impl Window {
    /// Begins and ends as is known before.
    pub(crate) fn new(range: Range<u64>) -> Self {
        Self(Arc::new(Bounds { start: AtomicU64::new(range.start), end: AtomicU64::new(range.end) }))
    }

    /// From the end of the warm-up, for the duration of the measurement.
    pub(crate) fn after(warm_up: Duration, duration: Duration) -> Self {
        Self::new(nanos(warm_up)..nanos(warm_up + duration))
    }

    /// Nothing counts until [`Self::start_at`].
    pub(crate) fn closed() -> Self {
        Self::new(u64::MAX..u64::MAX)
    }

    /// Opens it.
    pub(crate) fn start_at(&self, start: u64) {
        self.0.start.store(start, Ordering::Relaxed);
    }

    /// Ends it. What a worker has counted before it knows, a moment later at most, stays counted.
    pub(crate) fn end_at(&self, end: u64) {
        self.0.end.store(end, Ordering::Relaxed);
    }

    /// [`u64::MAX`] until it is known.
    pub(crate) fn end(&self) -> u64 {
        self.0.end.load(Ordering::Relaxed)
    }

    pub(crate) fn contains(&self, time: u64) -> bool {
        self.0.start.load(Ordering::Relaxed) <= time && time < self.end()
    }

    pub(crate) fn duration(&self) -> Duration {
        Duration::from_nanos(self.end().saturating_sub(self.0.start.load(Ordering::Relaxed)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn open_loop_keeps_the_rate_without_drift() {
        // Three does not divide a second.
        let mut workers = [0, 1].map(|worker| Schedule::Open(OpenLoop::new(3, worker, 2, 10_000_000_000)));
        let mut dues: Vec<_> =
            workers.iter_mut().flat_map(|schedule| std::iter::from_fn(|| schedule.next(u64::MAX))).collect();
        dues.sort_unstable();
        assert_eq!(dues.len(), 30);
        assert_eq!(dues[..4], [0, 333_333_333, 666_666_666, 1_000_000_000]);
        assert_eq!(dues[27], 9_000_000_000);
    }

    #[test]
    fn open_loop_waits_for_the_time_and_catches_up() {
        let mut schedule = Schedule::Open(OpenLoop::new(1000, 0, 1, 5_000_000));
        assert_eq!(schedule.next(0), Some(0));
        assert_eq!(schedule.next(999_999), None);
        assert_eq!(schedule.next_due(999_999), Some(1_000_000));
        // Late: it still says when each should have started.
        assert_eq!(schedule.next(3_500_000), Some(1_000_000));
        assert_eq!(schedule.overdue(2_500_000), Some(2_000_000));
        assert_eq!(schedule.overdue(2_500_000), None);
        assert_eq!(schedule.next(9_000_000), Some(3_000_000));
        assert_eq!(schedule.next(9_000_000), Some(4_000_000));
        assert_eq!((schedule.next(9_000_000), schedule.next_due(9_000_000)), (None, None));
    }

    #[test]
    fn a_window_opens_and_ends_for_all_at_once() {
        let window = Window::closed();
        let mut schedule = Schedule::Closed { window: window.clone() };
        assert!(!window.contains(100));
        assert_eq!((schedule.next(50), schedule.next_due(50)), (Some(50), Some(50)));
        window.start_at(100);
        assert!(!window.contains(99) && window.contains(100) && window.contains(1_000_000));
        window.end_at(150);
        assert_eq!((schedule.next(150), schedule.next_due(150)), (None, None));
        assert!(window.contains(149) && !window.contains(150));
        assert_eq!(window.duration(), Duration::from_nanos(50));
    }

    #[test]
    fn closed_loop_starts_at_once_until_the_end() {
        let mut schedule = Schedule::Closed { window: Window::new(0..10) };
        assert_eq!((schedule.next(9), schedule.next(9), schedule.next(10)), (Some(9), Some(9), None));
        assert_eq!(schedule.overdue(100), None);
        let mut schedule = Schedule::Count { left: 2 };
        assert_eq!((schedule.next(5), schedule.next(6), schedule.next(7)), (Some(5), Some(6), None));
    }
}
