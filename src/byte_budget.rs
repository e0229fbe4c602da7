//! A bound on the bytes that wait somewhere, where a queue counts pieces of any size.

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

/// Bytes that may wait. Whoever has more waits for its turn, in the order of arrival: the small one behind a large one
/// too, which is what keeps the large one from waiting for ever.
pub struct ByteBudget {
    max: usize,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    used: usize,
    /// The next number to draw, and the one whose turn it is.
    drawn: u64,
    turn: u64,
    closed: bool,
}

/// Bytes that wait. Dropped, they are free for others.
#[must_use]
pub struct Share {
    budget: Arc<ByteBudget>,
    bytes: usize,
}

/// Whose end closes the budget.
#[must_use]
pub struct Closer(Arc<ByteBudget>);

impl ByteBudget {
    /// A budget of `max` bytes, all of them free.
    pub fn new(max: usize) -> Arc<ByteBudget> {
        Arc::new(ByteBudget { max, state: Mutex::default(), changed: Condvar::new() })
    }

    /// Takes `bytes` as soon as they are free and all who came earlier have theirs. More than the whole budget are taken
    /// when all of it is free. `None` once it is closed.
    pub fn take(self: &Arc<Self>, bytes: usize) -> Option<Share> {
        let mut state = self.lock();
        let number = state.drawn;
        state.drawn += 1;
        while !state.closed && (number != state.turn || (state.used > 0 && state.used + bytes > self.max)) {
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        if state.closed {
            return None;
        }
        state.turn += 1;
        state.used += bytes;
        self.changed.notify_all();
        Some(Share { budget: self.clone(), bytes })
    }

    /// Bytes taken and not free again.
    pub fn used(&self) -> usize {
        self.lock().used
    }

    /// What closes this budget when it is dropped: nothing is taken any more, and nobody waits.
    pub fn closer(self: &Arc<Self>) -> Closer {
        Closer(self.clone())
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Share {
    fn drop(&mut self) {
        self.budget.lock().used -= self.bytes;
        self.budget.changed.notify_all();
    }
}

impl Drop for Closer {
    fn drop(&mut self) {
        self.0.lock().closed = true;
        self.0.changed.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use std::thread;
    use std::time::Duration;

    use crossbeam_channel::bounded;

    use super::*;

    const DEADLINE: Duration = Duration::from_secs(60);

    /// Waits until `count` have drawn a number, so that they stand in the order in which they came.
    fn wait_drawn(budget: &ByteBudget, count: u64) {
        let started = std::time::Instant::now();
        while budget.lock().drawn < count {
            assert!(started.elapsed() < DEADLINE, "nobody came");
            thread::yield_now();
        }
    }

    #[test]
    fn who_comes_first_is_served_first_whatever_its_size() {
        let budget = ByteBudget::new(100);
        let first = budget.take(60).unwrap();
        let second = budget.take(40).unwrap();
        let (served_tx, served) = bounded(3);
        thread::scope(|scope| {
            for (number, bytes) in [(3, 250), (4, 1), (5, 100)] {
                let (served, budget) = (served_tx.clone(), &budget);
                scope.spawn(move || served.send((number, budget.take(bytes))).unwrap());
                wait_drawn(budget, number);
            }
            assert!(served.is_empty(), "none of it fits");
            drop(first);
            assert!(served.is_empty() && budget.used() == 40, "one byte would fit now, and its turn has not come");
            drop(second);
            for number in 3..=5 {
                let (served, share) = served.recv_timeout(DEADLINE).unwrap();
                assert_eq!(served, number);
                assert!(share.is_some() && budget.used() <= 250);
            }
        });
        assert_eq!(budget.used(), 0);
    }

    #[test]
    fn nobody_waits_for_a_closed_budget() {
        let budget = ByteBudget::new(1);
        let share = budget.take(1).unwrap();
        thread::scope(|scope| {
            let waiting = scope.spawn(|| budget.take(1).is_none());
            wait_drawn(&budget, 2);
            drop(budget.closer());
            assert!(waiting.join().unwrap());
        });
        drop(share);
        assert!(budget.take(1).is_none());
    }
}
