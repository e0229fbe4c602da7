//! Which seeds are run, and what is said of one that fails.
//!
//! | variable | meaning |
//! |---|---|
//! | `SIM_SEED` | run this seed only, and print all that happens |
//! | `SIM_SEEDS` | how many seeds to run |
//! | `SIM_START` | the first of them |

use std::any::Any;
use std::cell::Cell;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Once;

use crate::trace::Trace;

fn variable(name: &str) -> Option<u64> {
    let value = std::env::var(name).ok()?;
    Some(value.parse().unwrap_or_else(|_| panic!("{name} is a number, not {value:?}")))
}

/// Runs a scenario with `count` seeds, or as the environment says. `Err` and panics fail the test, with the seed and
/// what happened last.
pub fn each(scenario: &str, count: u64, run: impl Fn(u64, &mut Trace) -> Result<(), String>) {
    let one = variable("SIM_SEED");
    let start = one.or(variable("SIM_START")).unwrap_or(0);
    let count = one.map_or_else(|| variable("SIM_SEEDS").unwrap_or(count), |_| 1);
    for seed in start..start + count {
        let mut trace = Trace::new(one.is_some());
        let result = catch_unwind(AssertUnwindSafe(|| run(seed, &mut trace)));
        let reason = match result {
            Ok(Ok(())) => continue,
            Ok(Err(reason)) => reason,
            Err(panic) => format!("panic: {}", text(&*panic)),
        };
        panic!(
            "{scenario} fails with seed {seed}: {reason}\n{trace}\
             {reason}\nto see it again: SIM_SEED={seed} cargo test --test simulation {scenario} -- --nocapture"
        );
    }
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
        let mut trace = Trace::new(false);
        run(seed, &mut trace).unwrap_or_else(|reason| panic!("seed {seed} fails: {reason}\n{trace}"));
        trace.fingerprint()
    };
    assert_eq!(fingerprint(), fingerprint(), "two runs with seed {seed} differ");
}
