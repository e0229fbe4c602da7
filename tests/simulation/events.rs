//! Virtual time: it stands still while something happens, and jumps to what happens next.

use std::collections::BTreeMap;
use std::time::Duration;

/// What is going to happen, by time, and at one time in the order in which it was planned.
pub struct Events<E> {
    now: Duration,
    planned: BTreeMap<(Duration, u64), E>,
    sequence: u64,
}

impl<E> Events<E> {
    /// Nothing is planned, and it is zero o'clock.
    pub fn new() -> Events<E> {
        Events { now: Duration::ZERO, planned: BTreeMap::new(), sequence: 0 }
    }

    /// The time of the event that happens now.
    pub fn now(&self) -> Duration {
        self.now
    }

    /// Plans an event for `delay` from now.
    pub fn plan(&mut self, delay: Duration, event: E) {
        self.sequence += 1;
        self.planned.insert((self.now + delay, self.sequence), event);
    }

    /// The next event; its time is now.
    pub fn next(&mut self) -> Option<E> {
        let ((time, _), event) = self.planned.pop_first()?;
        self.now = time;
        Some(event)
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
