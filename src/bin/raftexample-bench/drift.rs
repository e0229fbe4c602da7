//! The same load for a long time: what grows shows.

use std::io::{self, Write};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use clap::Args;
use serde::Serialize;

use crate::lab::cluster::Cluster;
use crate::lab::machine::Machine;
use crate::lab::usage::{descriptors, resident_bytes};
use crate::lab::{Bench, LabCli};
use crate::options::{Options, Workload, duration};
use crate::run::{fill, measure};

/// The nodes of the cluster.
const NODES: usize = 3;

/// Connections of the load.
const CONNECTIONS: usize = 64;

/// How often to look at the nodes.
const SAMPLE_INTERVAL: Duration = Duration::from_millis(100);

/// The run is compared by its first and its last part of so many.
const PARTS: usize = 4;

/// Takes one figure out of several.
type Of = fn(&Interval) -> f64;

/// What was typed. The comments of the fields are the text of `--help`.
#[derive(Clone, Debug, Args)]
pub(crate) struct DriftCli {
    #[command(flatten)]
    lab: LabCli,

    /// How long in all
    #[arg(long, value_name = "D", default_value = "10m", value_parser = duration)]
    duration: Duration,

    /// How long each part is that gets a line
    #[arg(long, value_name = "D", default_value = "15s", value_parser = duration)]
    interval: Duration,

    /// What is requested
    #[arg(long, value_enum, default_value = "put")]
    operation: Workload,
}

/// All of it, as JSON.
#[derive(Debug, Serialize)]
struct Results {
    machine: Machine,
    intervals: Vec<Interval>,
}

/// What one part of the run came to; of the nodes the largest.
#[derive(Clone, Debug, Serialize)]
struct Interval {
    requests_per_second: f64,
    p50_us: f64,
    p99_us: f64,
    failed: u64,
    resident_bytes: u64,
    descriptors: usize,
}

/// Does all of it, and prints as it goes.
///
/// # Errors
/// One line.
pub(crate) fn measure_drift(cli: &DriftCli, out: &mut dyn Write) -> Result<(), String> {
    let count = usize::try_from(cli.duration.as_millis() / cli.interval.as_millis().max(1)).unwrap_or(usize::MAX);
    if cli.interval.is_zero() || count < PARTS {
        return Err(format!("--interval: write at most a {PARTS}th of --duration, and at least 1ms"));
    }
    let bench = Bench::open(&cli.lab, "drift")?;
    let written = |error: io::Error| format!("failed to write the table: {error}");
    write!(out, "{}", bench.preamble()).map_err(written)?;
    let cluster = Cluster::start(bench.raftexample(NODES, &[]), &bench.path().join("drift"))?;
    let options = Options {
        workload: cli.operation,
        warm_up: Duration::ZERO,
        duration: cli.interval,
        ..Options::closed_loop(cluster.urls(), cluster.api())
    };
    if cli.operation != Workload::Put {
        fill(&options)?;
    }
    let mut results = Results { machine: bench.machine.clone(), intervals: Vec::new() };
    writeln!(
        out,
        "{:>8} {:>9} {:>9} {:>9} {:>7} {:>9} {:>11}",
        "until", "done/s", "p50 ms", "p99 ms", "failed", "MiB", "descriptors"
    )
    .map_err(written)?;
    for number in 1..=count {
        let interval = measure_interval(&cluster, &options)?;
        interval.write(cli.interval * number as u32, out).map_err(written)?;
        results.intervals.push(interval);
    }
    write_drift(&results.intervals, out).map_err(written)?;
    writeln!(out, "results: {}", bench.write_json(&results)?.display()).map_err(written)
}

fn measure_interval(cluster: &Cluster, options: &Options) -> Result<Interval, String> {
    let pids = (0..NODES).map(|index| cluster.pid(index)).collect::<Result<Vec<_>, _>>()?;
    let stop = AtomicBool::new(false);
    let (point, most) = thread::scope(|scope| {
        let sampler = thread::Builder::new().name("sampler".to_owned()).spawn_scoped(scope, || sample(&pids, &stop));
        let point = measure(options, CONNECTIONS, None);
        stop.store(true, Ordering::Relaxed);
        let sampler = sampler.map_err(|error| format!("failed to start a thread: {error}"))?;
        let most = sampler.join().map_err(|_| "the sampler panicked".to_owned())?;
        Ok::<_, String>((point?, most?))
    })?;
    Ok(Interval {
        requests_per_second: point.requests_per_second,
        p50_us: point.latency.p50_us,
        p99_us: point.latency.p99_us,
        failed: point.failed + point.unknown,
        resident_bytes: most.0,
        descriptors: most.1,
    })
}

/// The most memory and descriptors that any of the nodes had.
fn sample(pids: &[u32], stop: &AtomicBool) -> Result<(u64, usize), String> {
    let mut most = (0, 0);
    while !stop.load(Ordering::Relaxed) {
        for pid in pids {
            most = (resident_bytes(*pid)?.max(most.0), descriptors(*pid)?.max(most.1));
        }
        thread::sleep(SAMPLE_INTERVAL);
    }
    Ok(most)
}

impl Interval {
    fn write(&self, until: Duration, out: &mut dyn Write) -> io::Result<()> {
        writeln!(
            out,
            "{:>6} s {:>9.0} {:>9.3} {:>9.3} {:>7} {:>9.1} {:>11}",
            until.as_secs(),
            self.requests_per_second,
            self.p50_us / 1e3,
            self.p99_us / 1e3,
            self.failed,
            self.resident_bytes as f64 / f64::from(1 << 20),
            self.descriptors,
        )?;
        out.flush()
    }
}

/// Says what the last part of the run had to that of an early one. The very first is left out: caches fill in it.
fn write_drift(intervals: &[Interval], out: &mut dyn Write) -> io::Result<()> {
    let part = intervals.len() / PARTS;
    let (early, late) = (&intervals[part..2 * part], &intervals[intervals.len() - part..]);
    let figures: [(&str, Of); 4] = [
        ("rate", |interval| interval.requests_per_second),
        ("p99", |interval| interval.p99_us),
        ("memory", |interval| interval.resident_bytes as f64),
        ("descriptors", |interval| interval.descriptors as f64),
    ];
    write!(out, "the last quarter by the second:")?;
    for (name, of) in figures {
        let mean = |part: &[Interval]| part.iter().map(of).sum::<f64>() / part.len().max(1) as f64;
        write!(out, " {name} {:.2}", mean(late) / mean(early))?;
    }
    writeln!(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_grows_shows() {
        let interval = |n: u64| Interval {
            requests_per_second: 100.0,
            p50_us: 1.0,
            p99_us: 200.0,
            failed: 0,
            resident_bytes: n << 20,
            descriptors: 80,
        };
        let intervals: Vec<_> = (1..=8).map(interval).collect();
        let mut out = Vec::new();
        write_drift(&intervals, &mut out).unwrap();
        let text = String::from_utf8(out).unwrap();
        // 7 and 8 MiB at the end, 3 and 4 in the second quarter.
        assert_eq!(text, "the last quarter by the second: rate 1.00 p99 1.00 memory 2.14 descriptors 1.00\n");
    }
}
