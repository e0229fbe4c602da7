//! Virtual time: it stands still while something happens, and jumps to what happens next.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::time::Duration;

/// What is going to happen, by time, and at one time in the order in which it was planned.
pub struct Events<E> {
    now: Duration,
    /// Time, number of the plan, and place in `planned`: the heap moves these, and not the events, which are large.
    times: BinaryHeap<Reverse<(Duration, u64, usize)>>,
    planned: Vec<Option<E>>,
    /// Places in `planned` that are free.
    free: Vec<usize>,
    sequence: u64,
}

impl<E> Events<E> {
    /// Nothing is planned, and it is zero o'clock.
    pub fn new() -> Events<E> {
        Events { now: Duration::ZERO, times: BinaryHeap::new(), planned: Vec::new(), free: Vec::new(), sequence: 0 }
    }

    /// The time of the event that happens now.
    pub fn now(&self) -> Duration {
        self.now
    }

    /// Plans an event for `delay` from now.
    pub fn plan(&mut self, delay: Duration, event: E) {
        self.sequence += 1;
        let place = self.free.pop().unwrap_or_else(|| {
            self.planned.push(None);
            self.planned.len() - 1
        });
        self.planned[place] = Some(event);
        self.times.push(Reverse((self.now + delay, self.sequence, place)));
    }

    /// The next event; its time is now.
    pub fn next(&mut self) -> Option<E> {
        let Reverse((time, _, place)) = self.times.pop()?;
        self.now = time;
        self.free.push(place);
        self.planned[place].take()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn events_come_by_time_and_then_in_the_order_of_their_planning() {
        let mut events = Events::new();
        let ms = Duration::from_millis;
        for (delay, name) in [(5, 'c'), (2, 'a'), (5, 'd'), (2, 'b')] {
            events.plan(ms(delay), name);
        }
        assert_eq!((events.next(), events.next()), (Some('a'), Some('b')));
        events.plan(ms(1), 'x');
        assert_eq!((events.next(), events.now()), (Some('x'), ms(3)));
        assert_eq!((events.next(), events.next(), events.next()), (Some('c'), Some('d'), None));
        assert_eq!(events.now(), ms(5));
    }
}
