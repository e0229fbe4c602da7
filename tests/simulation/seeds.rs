//! Which seeds are run, and what is said of one that fails.
//!
//! | variable | meaning |
//! |---|---|
//! | `SIM_SEED` | run this seed only, and print all that happens |
//! | `SIM_SEEDS` | how many seeds to run |
//! | `SIM_START` | the first of them |
//! | `SIM_THREADS` | how many to run at a time, instead of one for each processor |

use std::any::Any;
use std::cell::Cell;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, Once, PoisonError};
use std::thread;
use std::time::Instant;

use crate::trace::Trace;

fn variable(name: &str) -> Option<u64> {
    let value = std::env::var(name).ok().filter(|value| !value.is_empty())?;
    Some(value.parse().unwrap_or_else(|_| panic!("{name} is a number, not {value:?}")))
}

/// How it went with one seed; a panic is a failure like others.
fn outcome(seed: u64, trace: &mut Trace, run: &impl Fn(u64, &mut Trace) -> Result<(), String>) -> Result<(), String> {
    let result = catch_unwind(AssertUnwindSafe(|| run(seed, trace)));
    result.unwrap_or_else(|panic| Err(format!("panic: {}", text(&*panic))))
}

/// Whether the environment says which seeds to run.
pub fn are_chosen() -> bool {
    ["SIM_SEED", "SIM_SEEDS", "SIM_START"].into_iter().any(|name| variable(name).is_some())
}

/// Runs a scenario with `count` seeds, or as the environment says, on all processors. `Err` and panics fail the test,
/// with the seed and what happened last.
///
/// # Panics
/// If a run fails.
pub fn each(scenario: &str, count: u64, run: impl Fn(u64, &mut Trace) -> Result<(), String> + Sync) {
    if let Some(seed) = variable("SIM_SEED") {
        let mut trace = Trace::printed();
        let result = outcome(seed, &mut trace, &run);
        return result.unwrap_or_else(|reason| panic!("{scenario} fails with seed {seed}: {reason}"));
    }
    let start = variable("SIM_START").unwrap_or(0);
    let count = variable("SIM_SEEDS").unwrap_or(count);
    let began = Instant::now();
    let failure = first_failure(start, count, &run);
    if let Some((seed, reason)) = failure {
        report(scenario, seed, &reason, &run);
    }
    let seconds = began.elapsed().as_secs_f64();
    println!("{scenario}: seeds {start} to {}, {:.0} a minute", start + count, count as f64 * 60.0 / seconds);
}

/// Runs `count` seeds from `start` on until one fails: which, and why.
fn first_failure(
    start: u64,
    count: u64,
    run: &(impl Fn(u64, &mut Trace) -> Result<(), String> + Sync),
) -> Option<(u64, String)> {
    let processors = thread::available_parallelism().map_or(1, |processors| processors.get() as u64);
    let next = AtomicU64::new(start);
    let failure = Mutex::new(None);
    let work = || {
        loop {
            let seed = next.fetch_add(1, Ordering::Relaxed);
            if seed >= start + count {
                return;
            }
            if let Err(reason) = outcome(seed, &mut Trace::off(), run) {
                next.store(start + count, Ordering::Relaxed);
                failure.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert((seed, reason));
            }
        }
    };
    thread::scope(|scope| {
        for number in 0..variable("SIM_THREADS").unwrap_or(processors).clamp(1, count.max(1)) {
            let named = thread::Builder::new().name(format!("seeds-{number}"));
            named.spawn_scoped(scope, work).expect("the system has room for a thread");
        }
    });
    failure.into_inner().unwrap_or_else(PoisonError::into_inner)
}

/// Fails the test, with what happened last in the run of `seed`, which failed for `reason`.
fn report(scenario: &str, seed: u64, reason: &str, run: &impl Fn(u64, &mut Trace) -> Result<(), String>) -> ! {
    let mut trace = Trace::kept();
    let again = outcome(seed, &mut trace, run).err();
    let differs = match &again {
        Some(again) if again == reason => String::new(),
        again => format!("a second run with this seed went another way: {again:?}\n"),
    };
    panic!(
        "{scenario} fails with seed {seed}: {reason}\n{trace}{reason}\n{differs}\
         to see it again: SIM_SEED={seed} cargo test --test simulation -- --exact {scenario} --nocapture"
    );
}

thread_local! {
    static QUIET: Cell<bool> = const { Cell::new(false) };
}

/// Catches a panic of a node, without the usual noise about it. Raft has no other way to pass on that the log can't be
/// read, and a real process ends of it.
pub fn surviving<R>(call: impl FnOnce() -> R) -> Result<R, String> {
    static HOOK: Once = Once::new();
    HOOK.call_once(|| {
        let loud = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |panic| {
            if !QUIET.get() {
                loud(panic);
            }
        }));
    });
    QUIET.set(true);
    let result = catch_unwind(AssertUnwindSafe(call));
    QUIET.set(false);
    result.map_err(|panic| format!("panic: {}", text(&*panic)))
}

/// What a panic says.
fn text(panic: &(dyn Any + Send)) -> &str {
    let owned = panic.downcast_ref::<String>().map(String::as_str);
    owned.or(panic.downcast_ref::<&str>().copied()).unwrap_or("without a text")
}

/// Runs a scenario twice with one seed: it must go the same way.
pub fn repeat(seed: u64, run: impl Fn(u64, &mut Trace) -> Result<(), String>) {
    let fingerprint = || {
        let mut trace = Trace::kept();
        run(seed, &mut trace).unwrap_or_else(|reason| panic!("seed {seed} fails: {reason}\n{trace}"));
        trace.fingerprint()
    };
    let (count, hash) = fingerprint();
    assert!(count > 0, "nothing happened");
    assert_eq!((count, hash), fingerprint(), "two runs with seed {seed} differ");
}
