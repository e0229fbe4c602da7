use std::path::Path;
use std::sync::Mutex;
use std::thread;
use std::time::{Duration, Instant};

use crate::support::free_port;

/// `all`: every case; else every so-manieth.
const VARIABLE: &str = "RAFTEXAMPLE_DISK_FAULTS";

/// What a worker has for itself, for one case after the other.
pub(crate) struct Bench {
    pub(crate) directory: tempfile::TempDir,
    pub(crate) client_port: u16,
    pub(crate) peer_port: u16,
}

impl Bench {
    pub(crate) fn new() -> Bench {
        Bench { directory: tempfile::tempdir().unwrap(), client_port: free_port(), peer_port: free_port() }
    }

    pub(crate) fn path(&self) -> &Path {
        self.directory.path()
    }
}

/// Every `stride`th of the cases, or all if that is asked for.
pub(crate) fn chosen<T>(cases: Vec<T>, stride: usize) -> Vec<T> {
    let stride = match std::env::var(VARIABLE).as_deref() {
        Ok("all") => 1,
        Ok(other) => panic!("{VARIABLE}={other} is not `all`"),
        Err(_) => stride,
    };
    cases.into_iter().step_by(stride).collect()
}

/// Runs all cases, some at a time, and panics at the end with everything that was found.
pub(crate) fn run_all<T: Send + std::fmt::Debug>(
    what: &str,
    cases: Vec<T>,
    run: impl Fn(&Bench, &T) -> Result<(), String> + Sync,
) {
    let total = cases.len();
    let started = Instant::now();
    let queue = Mutex::new(cases.into_iter());
    let found = Mutex::new(Vec::new());
    let workers = thread::available_parallelism().map_or(2, usize::from).clamp(2, 8);
    thread::scope(|scope| {
        for _ in 0..workers {
            scope.spawn(|| {
                let bench = Bench::new();
                loop {
                    let Some(case) = queue.lock().unwrap().next() else { return };
                    if let Err(problem) = run(&bench, &case) {
                        found.lock().unwrap().push(format!("{case:?}: {problem}"));
                    }
                }
            });
        }
    });
    let found = found.into_inner().unwrap();
    let took = Duration::from_secs(started.elapsed().as_secs());
    println!("{what}: {total} cases in {took:?}, {} with a finding", found.len());
    assert!(total > 0 && found.is_empty(), "{what}: {} of {total}:\n{}", found.len(), found.join("\n"));
}
