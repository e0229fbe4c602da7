//! Could these operations have happened one after the other, each at some moment between its call and its return?
//!
//! The search is that of Wing and Gong (1993) with Lowe's memory of what has been tried (2017): take any operation
//! that no other one surely precedes, apply it to a model, and go on; go back where the model says that it can't have
//! returned what it did. A pair of operations taken so far and state reached is searched once.

use std::collections::HashSet;
use std::fmt::Debug;
use std::hash::Hash;
use std::time::Duration;

/// A sequential object.
pub trait Model {
    /// What is asked, with what was answered. An operation without an answer may have happened or not, at any time
    /// after its call: the model must allow for both.
    type Operation: Debug;
    /// The object's state.
    type State: Clone + Eq + Hash + Debug + Default;

    /// The state after the operation, or `None` if it can't have been answered like that.
    fn apply(state: &Self::State, operation: &Self::Operation) -> Option<Self::State>;

    /// Operations without an answer that are of one class would do the same, so only one of them is tried at a time:
    /// without this, a handful of lost answers makes the search endless. `None` for all that have an answer.
    fn class(operation: &Self::Operation) -> Option<u64>;
}

/// An operation and its time.
#[derive(Clone, Debug)]
pub struct Timed<O> {
    /// When it was called.
    pub called: Duration,
    /// When it was answered; `None` if it never was.
    pub returned: Option<Duration>,
    /// What it was.
    pub operation: O,
}

/// Steps after which a search is given up. Histories of a simulation take a thousandth of them.
pub const STEPS_MAX: u64 = 20_000_000;

/// Why a history is not known to be linearizable. Operations are named by their places in it.
#[derive(Debug)]
pub enum Violation {
    /// There is no order that explains it.
    Inexplicable {
        /// The longest order that explains some of the operations.
        explained: Vec<usize>,
        /// The object behind them.
        state: String,
        /// The operations of which one must come next, and none can.
        stuck: Vec<usize>,
    },
    /// The search was given up after [`STEPS_MAX`].
    TooHard,
}

/// One call or return in the list of those that are still to be explained.
#[derive(Clone, Copy, Debug)]
struct Point {
    operation: usize,
    is_call: bool,
    previous: usize,
    next: usize,
}

/// The points in the order of their time, as a list from which pairs can be taken out and put back.
struct Points {
    points: Vec<Point>,
    returns: Vec<usize>,
    calls: Vec<usize>,
}

/// The head of the list: stands before the first point and behind the last.
const HEAD: usize = 0;

impl Points {
    fn new<O>(history: &[Timed<O>]) -> Points {
        let mut order: Vec<(Duration, bool, usize)> = Vec::new();
        for (operation, timed) in history.iter().enumerate() {
            // At one instant calls come first: operations that touch are concurrent.
            order.push((timed.called, false, operation));
            order.push((timed.returned.unwrap_or(Duration::MAX), true, operation));
        }
        order.sort_unstable();
        let (mut calls, mut returns) = (vec![HEAD; history.len()], vec![HEAD; history.len()]);
        let mut points = vec![Point { operation: usize::MAX, is_call: false, previous: HEAD, next: HEAD }];
        for (_, is_return, operation) in order {
            let at = points.len();
            if is_return {
                returns[operation] = at
            } else {
                calls[operation] = at
            }
            points[at - 1].next = at;
            points.push(Point { operation, is_call: !is_return, previous: at - 1, next: HEAD });
        }
        points[HEAD].previous = points.len() - 1;
        Points { points, returns, calls }
    }

    fn is_empty(&self) -> bool {
        self.points[HEAD].next == HEAD
    }

    /// The operations that are called before the first return, in the order of their calls.
    fn open(&self) -> Vec<usize> {
        let mut open = Vec::new();
        let mut at = self.points[HEAD].next;
        while at != HEAD && self.points[at].is_call {
            open.push(self.points[at].operation);
            at = self.points[at].next;
        }
        open
    }

    fn take_out(&mut self, operation: usize) {
        for at in [self.calls[operation], self.returns[operation]] {
            let Point { previous, next, .. } = self.points[at];
            self.points[previous].next = next;
            self.points[next].previous = previous;
        }
    }

    fn put_back(&mut self, operation: usize) {
        for at in [self.returns[operation], self.calls[operation]] {
            let Point { previous, next, .. } = self.points[at];
            self.points[previous].next = at;
            self.points[next].previous = at;
        }
    }
}

/// Looks for an order that explains `history`.
pub fn check<M: Model>(history: &[Timed<M::Operation>]) -> Result<(), Violation> {
    let mut points = Points::new(history);
    let mut state = M::State::default();
    let mut taken = vec![0_u64; history.len().div_ceil(64)];
    let mut tried: HashSet<(Vec<u64>, M::State)> = HashSet::new();
    let mut order: Vec<(usize, M::State)> = Vec::new();
    let mut untried = vec![candidates::<M>(history, &points)];
    let mut best: (Vec<usize>, M::State, Vec<usize>) = (Vec::new(), state.clone(), Vec::new());
    for _ in 0..STEPS_MAX {
        if points.is_empty() {
            return Ok(());
        }
        if let Some(operation) = untried.last_mut().and_then(Vec::pop) {
            let Some(applied) = M::apply(&state, &history[operation].operation) else { continue };
            taken[operation / 64] ^= 1 << (operation % 64);
            if tried.insert((taken.clone(), applied.clone())) {
                points.take_out(operation);
                order.push((operation, std::mem::replace(&mut state, applied)));
                untried.push(candidates::<M>(history, &points));
            } else {
                taken[operation / 64] ^= 1 << (operation % 64);
            }
        } else {
            if order.len() >= best.0.len() {
                best = (order.iter().map(|(operation, _)| *operation).collect(), state.clone(), points.open());
            }
            untried.pop();
            let Some((operation, before)) = order.pop() else {
                let (explained, state, stuck) = best;
                return Err(Violation::Inexplicable { explained, state: format!("{state:?}"), stuck });
            };
            state = before;
            taken[operation / 64] ^= 1 << (operation % 64);
            points.put_back(operation);
        }
    }
    Err(Violation::TooHard)
}

/// What may come next, the most promising last: first what was answered, for it must come soon.
fn candidates<M: Model>(history: &[Timed<M::Operation>], points: &Points) -> Vec<usize> {
    let mut answered = Vec::new();
    let mut classes: Vec<(u64, usize)> = Vec::new();
    for operation in points.open() {
        match M::class(&history[operation].operation) {
            None => answered.push(operation),
            Some(class) if classes.iter().all(|(known, _)| *known != class) => classes.push((class, operation)),
            Some(_) => {}
        }
    }
    classes.into_iter().map(|(_, operation)| operation).chain(answered.into_iter().rev()).collect()
}
