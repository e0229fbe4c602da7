//! All chance in a simulation comes from one seed.

use std::ops::Range;
use std::time::Duration;

use raftexample::random::SplitMix64;

/// A generator with the questions that a simulation asks of it.
#[derive(Clone, Debug)]
pub struct Random(SplitMix64);

impl Random {
    /// Equal seeds give equal answers.
    pub fn new(seed: u64) -> Random {
        Random(SplitMix64::new(seed))
    }

    /// A generator of its own for one part of the simulation: how often that part asks does not change what the
    /// others are told.
    pub fn fork(&mut self) -> Random {
        Random::new(self.next())
    }

    /// Any number.
    pub fn next(&mut self) -> u64 {
        self.0.next_u64()
    }

    /// A number below `bound`, which is not 0.
    pub fn below(&mut self, bound: u64) -> u64 {
        self.0.below(bound)
    }

    /// True once in `n` times.
    pub fn one_in(&mut self, n: u64) -> bool {
        self.below(n) == 0
    }

    /// True in so many of a hundred cases.
    pub fn percent(&mut self, percent: u64) -> bool {
        self.below(100) < percent
    }

    /// A time in a range that is not empty.
    pub fn time(&mut self, range: &Range<Duration>) -> Duration {
        let micros = (range.end - range.start).as_micros() as u64;
        range.start + Duration::from_micros(self.below(micros.max(1)))
    }

    /// One of `items`, which are not none.
    pub fn pick<'a, T>(&mut self, items: &'a [T]) -> &'a T {
        &items[self.below(items.len() as u64) as usize]
    }

    /// Puts `items` into any order.
    pub fn shuffle<T>(&mut self, items: &mut [T]) {
        for last in (1..items.len()).rev() {
            items.swap(last, self.below(last as u64 + 1) as usize);
        }
    }
}
