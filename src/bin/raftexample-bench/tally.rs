//! What is counted: latencies of successes, and all else by kind.

use std::collections::BTreeMap;
use std::fmt;
use std::time::Duration;

use hdrhistogram::Histogram;

use crate::options::TIME_MAX;
use crate::request::Operation;
use crate::schedule::{Window, nanos};

/// Figures are exact to one in a thousand.
const SIGNIFICANT_DIGITS: u8 = 3;

/// Why a request has no latency.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Failure {
    /// An answer that is no success.
    Status(u16),
    /// The connection ended before the whole answer was there.
    ConnectionLost,
    /// No answer came in time.
    TimedOut,
    /// What came was no answer.
    Malformed,
    /// In an open loop: no connection was free in time.
    NotSent,
    /// A lost connection could not be made again. Counts attempts, not requests.
    NotConnected,
}

impl Failure {
    /// Whether a request has failed, and not only an attempt to connect.
    pub(crate) fn is_of_request(self) -> bool {
        self != Self::NotConnected
    }

    /// Whether a write may have taken effect all the same.
    pub(crate) fn outcome_unknown(self) -> bool {
        match self {
            // What an API or a proxy says of a request that it passed on and then lost sight of.
            Self::Status(status) => matches!(status, 500 | 502 | 504),
            Self::ConnectionLost | Self::TimedOut | Self::Malformed => true,
            Self::NotSent | Self::NotConnected => false,
        }
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Status(status) => write!(f, "status {status}"),
            Self::ConnectionLost => f.write_str("connection lost"),
            Self::TimedOut => f.write_str("timed out"),
            Self::Malformed => f.write_str("malformed answer"),
            Self::NotSent => f.write_str("not sent in time"),
            Self::NotConnected => f.write_str("not connected"),
        }
    }
}

/// What one worker has counted, or all of them together.
#[derive(Clone, Debug)]
pub(crate) struct Tally {
    /// Requests that should have started within it count.
    window: Window,
    /// Latencies of successful writes, in nanoseconds.
    pub(crate) puts: Histogram<u64>,
    /// Latencies of successful reads, in nanoseconds.
    pub(crate) gets: Histogram<u64>,
    /// All else.
    pub(crate) failures: BTreeMap<Failure, u64>,
    /// Successes that came within the window, whenever they started: what the rate is made of. Of an overloaded
    /// server, answers of the window's requests go on after its end.
    pub(crate) answered_in_window: u64,
}

impl Tally {
    /// Counts nothing yet.
    pub(crate) fn new(window: Window) -> Self {
        Self {
            window,
            puts: empty_histogram(),
            gets: empty_histogram(),
            failures: BTreeMap::new(),
            answered_in_window: 0,
        }
    }

    /// A success at `now` of a request that should have started at `start`.
    pub(crate) fn succeeded(&mut self, operation: Operation, start: u64, now: u64) {
        if self.window.contains(now) {
            self.answered_in_window += 1;
        }
        if self.window.contains(start) {
            let histogram = match operation {
                Operation::Put => &mut self.puts,
                Operation::Get => &mut self.gets,
            };
            histogram.saturating_record(now.saturating_sub(start));
        }
    }

    /// A failure of what should have started at `start`.
    pub(crate) fn failed(&mut self, failure: Failure, start: u64) {
        if self.window.contains(start) {
            *self.failures.entry(failure).or_default() += 1;
        }
    }

    /// Adds what another worker has counted in the same run.
    pub(crate) fn add(&mut self, other: &Self) {
        for (sum, part) in [(&mut self.puts, &other.puts), (&mut self.gets, &other.gets)] {
            sum.add(part).expect("all histograms have the same range");
        }
        for (failure, count) in &other.failures {
            *self.failures.entry(*failure).or_default() += count;
        }
        self.answered_in_window += other.answered_in_window;
    }

    /// The latencies of all successes, in nanoseconds.
    pub(crate) fn all(&self) -> Histogram<u64> {
        let mut all = self.puts.clone();
        all.add(&self.gets).expect("all histograms have the same range");
        all
    }

    /// How many requests had a result of any kind.
    pub(crate) fn requests(&self) -> u64 {
        self.puts.len() + self.gets.len() + self.failures(true) + self.failures(false)
    }

    /// How many requests failed whose outcome is known, or is not.
    pub(crate) fn failures(&self, outcome_unknown: bool) -> u64 {
        let of_requests = self.failures.iter().filter(|(kind, _)| kind.is_of_request());
        of_requests.filter(|(kind, _)| kind.outcome_unknown() == outcome_unknown).map(|(_, count)| count).sum()
    }

    /// How long the window is.
    pub(crate) fn duration(&self) -> Duration {
        self.window.duration()
    }
}

fn empty_histogram() -> Histogram<u64> {
    Histogram::new_with_bounds(1, nanos(TIME_MAX), SIGNIFICANT_DIGITS).expect("1 ns to an hour is a valid range")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_should_start_in_the_window_counts() {
        let mut tally = Tally::new(Window::new(100..200));
        tally.succeeded(Operation::Put, 99, 150);
        tally.succeeded(Operation::Put, 100, 199);
        tally.succeeded(Operation::Get, 199, 250);
        tally.succeeded(Operation::Get, 200, 260);
        tally.failed(Failure::TimedOut, 99);
        tally.failed(Failure::TimedOut, 150);
        tally.failed(Failure::Status(503), 151);
        tally.failed(Failure::NotConnected, 152);
        assert_eq!((tally.puts.len(), tally.gets.len()), (1, 1));
        assert_eq!((tally.puts.max(), tally.gets.max()), (99, 51));
        assert_eq!(tally.answered_in_window, 2);
        assert_eq!((tally.failures(true), tally.failures(false)), (1, 1));
        assert_eq!(tally.requests(), 4, "an attempt to connect is no request");

        let mut sum = tally.clone();
        sum.add(&tally);
        assert_eq!((sum.requests(), sum.answered_in_window, sum.all().len()), (8, 4, 4));
    }
}
