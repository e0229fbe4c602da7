//! A whole measurement: fill, then each point, then what is shown of them.

use std::io::Write;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use rustix::time::{ClockId, clock_gettime};

use crate::connection::Connection;
use crate::options::{Options, Workload};
use crate::plot;
use crate::progress::Progress;
use crate::random::{Keys, Zipf};
use crate::report::{Point, Report, write_json};
use crate::request::Requests;
use crate::schedule::{Clock, OpenLoop, Schedule, Window, nanos};
use crate::tally::Tally;
use crate::target::{Target, choose};
use crate::worker::Worker;

/// As many connections write the keys before a measurement: enough to keep the nodes busy.
const FILL_CONNECTIONS: usize = 64;

/// How often the main thread looks after the others.
const WATCH_INTERVAL: Duration = Duration::from_millis(100);

/// Does all that `options` say, and writes the table to `out`.
///
/// # Errors
/// One line: a node cannot be reached or found, a file not be written, or no request of a point succeeded.
pub(crate) fn run(options: &Options, out: &mut dyn Write) -> Result<Report, String> {
    raise_descriptor_limit();
    if options.fill {
        fill(options)?;
    }
    let mut report = Report::new(options);
    let written = |error: std::io::Error| format!("failed to write the table: {error}");
    report.write_head(options, out).map_err(written)?;
    let rates: Vec<_> =
        if options.rates.is_empty() { vec![None] } else { options.rates.iter().copied().map(Some).collect() };
    for rate in rates {
        for &connections in &options.connections {
            let point = measure(options, connections, rate)?;
            point.write_rows(&report.operation, out).map_err(written)?;
            report.points.push(point);
        }
    }
    if let Some(path) = &options.json {
        write_json(&report, path)?;
    }
    if let Some(path) = &options.plot {
        plot::draw(&report, path)?;
    }
    match report.points.iter().find(|point| point.latency.count == 0) {
        Some(point) => Err(format!("no request succeeded with {} connections", point.connections)),
        None => Ok(report),
    }
}

/// Writes every key once, so that reads find them.
///
/// # Errors
/// One line, when any write fails.
pub(crate) fn fill(options: &Options) -> Result<(), String> {
    let targets = choose(options)?;
    let keys = options.keys;
    let connections = FILL_CONNECTIONS.min(usize::try_from(keys).unwrap_or(FILL_CONNECTIONS));
    let workers = options.threads.min(connections) as u64;
    let load = Load::start(options, &targets, connections, |worker| Share {
        workload: Workload::Put,
        keys: Keys::EachOnce { next: worker, step: workers },
        // Keys `worker`, `worker + workers`, ... below `keys`.
        schedule: Schedule::Count { left: (keys - worker).div_ceil(workers) },
        tally: Tally::new(Window::new(0..u64::MAX)),
    })?;
    let progress = Progress::start(format!("writing {keys} keys"), keys);
    while !load.is_finished() {
        std::thread::sleep(WATCH_INTERVAL.min(Duration::from_millis(10)));
        let answered = load.answered();
        progress.set(answered, answered, Duration::from_nanos(load.clock.now()));
    }
    let tally = load.finish()?;
    if tally.puts.len() == keys {
        return Ok(());
    }
    let kinds: Vec<_> = tally.failures.iter().map(|(kind, count)| format!("{kind}: {count}")).collect();
    Err(format!("failed to write all {keys} keys before reading them: {}; --no-fill goes without", kinds.join(", ")))
}

/// Measures one number of connections at one rate; None: closed loop.
///
/// # Errors
/// One line, when no node can be chosen or reached. That no request succeeds is none.
pub(crate) fn measure(options: &Options, connections: usize, rate: Option<u64>) -> Result<Point, String> {
    let window = Window::after(options.warm_up, options.duration);
    measure_within(options, connections, rate, &window, |load, progress| {
        load.watch_until(window.end(), progress);
        Ok(())
    })
}

/// Measures a closed loop for as long as `work` takes, which begins with the end of the warm-up: requests count that
/// start meanwhile.
///
/// # Errors
/// As [`measure`], and what `work` says.
pub(crate) fn measure_while(
    options: &Options,
    connections: usize,
    work: impl FnOnce() -> Result<(), String>,
) -> Result<Point, String> {
    let window = Window::closed();
    measure_within(options, connections, None, &window, |load, _| {
        window.start_at(load.clock.now());
        let outcome = work();
        window.end_at(load.clock.now());
        outcome
    })
}

/// Measures what starts within `window`. `wait` is called at the end of the warm-up, and returns when it has ended.
fn measure_within(
    options: &Options,
    connections: usize,
    rate: Option<u64>,
    window: &Window,
    wait: impl FnOnce(&Load, &Progress) -> Result<(), String>,
) -> Result<Point, String> {
    let targets = choose(options)?;
    let workers = options.threads.min(connections) as u64;
    let load = Load::start(options, &targets, connections, |worker| Share {
        workload: options.workload,
        keys: match options.zipf_exponent {
            None => Keys::Uniform { count: options.keys },
            Some(exponent) => Keys::Zipf(Zipf::new(options.keys, exponent)),
        },
        schedule: match rate {
            None => Schedule::Closed { window: window.clone() },
            Some(rate) => Schedule::Open(OpenLoop::new(rate, worker, workers, window.end())),
        },
        tally: Tally::new(window.clone()),
    })?;
    let total = nanos(options.warm_up + options.duration) / 1_000_000;
    let progress = Progress::start(format!("{connections} connections"), total);
    load.watch_until(nanos(options.warm_up), &progress);
    let processor_time_before = processor_time();
    let outcome = wait(&load, &progress);
    let processor_time = processor_time().saturating_sub(processor_time_before);
    let tally = load.finish()?;
    outcome?;
    drop(progress);
    let urls = targets.iter().map(|target| target.url.to_string()).collect();
    Ok(Point::new(options, connections, rate, urls, &tally, processor_time))
}

/// What differs between the workers of one load.
struct Share {
    workload: Workload,
    keys: Keys,
    schedule: Schedule,
    tally: Tally,
}

/// Workers under way.
struct Load {
    clock: Clock,
    workers: Vec<(JoinHandle<std::io::Result<Tally>>, Arc<AtomicU64>)>,
}

impl Load {
    /// Makes all connections, over the targets in turn, and then starts the workers; `share` gets a worker's number.
    fn start(
        options: &Options,
        targets: &[Target],
        connections: usize,
        share: impl Fn(u64) -> Share,
    ) -> Result<Self, String> {
        let threads = options.threads.min(connections);
        let mut connections_by_worker: Vec<Vec<_>> = (0..threads).map(|_| Vec::new()).collect();
        for number in 0..connections {
            let target = number % targets.len();
            // Each worker gets connections to all targets, and not by chance of the numbers only to some.
            let worker = number / targets.len() % threads;
            connections_by_worker[worker].push(Connection::open(target, targets[target].address)?);
        }
        // With fewer connections than that many times the targets, some worker would have none, and its part of an
        // open loop would never be sent.
        spread(&mut connections_by_worker);
        let mut workers = Vec::new();
        for (number, connections) in connections_by_worker.into_iter().enumerate() {
            let Share { workload, keys, schedule, tally } = share(number as u64);
            let seed = options.seed.wrapping_add(number as u64);
            let requests = Requests::new(options, workload, keys, seed, targets);
            let answered = Arc::new(AtomicU64::new(0));
            let worker = Worker::new(connections, requests, schedule, tally, options.timeout, answered.clone())
                .map_err(|error| format!("failed to watch the connections: {error}"))?;
            workers.push((number, worker, answered));
        }
        let clock = Clock::start();
        let workers = workers.into_iter().map(|(number, worker, answered)| {
            let thread = std::thread::Builder::new().name(format!("load-{number}")).spawn(move || worker.run(clock));
            thread.map(|thread| (thread, answered)).map_err(|error| format!("failed to start a thread: {error}"))
        });
        Ok(Self { clock, workers: workers.collect::<Result<_, _>>()? })
    }

    /// Returns at a time of the run, or when all workers have ended.
    fn watch_until(&self, end: u64, progress: &Progress) {
        loop {
            let now = self.clock.now();
            progress.set(now / 1_000_000, self.answered(), Duration::from_nanos(now));
            if now >= end || self.is_finished() {
                return;
            }
            std::thread::sleep(WATCH_INTERVAL.min(Duration::from_nanos(end - now)));
        }
    }

    fn answered(&self) -> u64 {
        self.workers.iter().map(|(_, answered)| answered.load(Ordering::Relaxed)).sum()
    }

    fn is_finished(&self) -> bool {
        self.workers.iter().all(|(thread, _)| thread.is_finished())
    }

    /// Waits for what is under way, and adds up what the workers have counted.
    fn finish(self) -> Result<Tally, String> {
        let mut sum: Option<Tally> = None;
        for (thread, _) in self.workers {
            let tally = thread.join().map_err(|_| "a load thread panicked".to_owned())?;
            let tally = tally.map_err(|error| format!("failed to wait for the connections: {error}"))?;
            match &mut sum {
                None => sum = Some(tally),
                Some(sum) => sum.add(&tally),
            }
        }
        sum.ok_or_else(|| "there were no load threads".to_owned())
    }
}

/// Gives each worker without connections one of the worker with most of them.
fn spread(connections_by_worker: &mut [Vec<Connection>]) {
    while let Some(empty) = connections_by_worker.iter().position(Vec::is_empty) {
        let most = connections_by_worker.iter_mut().max_by_key(|connections| connections.len());
        let Some(connection) = most.and_then(Vec::pop) else { return };
        connections_by_worker[empty].push(connection);
    }
}

/// What all threads of this process have taken so far, user and system.
fn processor_time() -> Duration {
    Duration::try_from(clock_gettime(ClockId::ProcessCPUTime)).unwrap_or_default()
}

/// 1024 connections and a few files are more than the usual limit. What the system refuses shows when connecting.
pub(crate) fn raise_descriptor_limit() {
    let limit = getrlimit(Resource::Nofile);
    let _ = setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, ..limit });
}
