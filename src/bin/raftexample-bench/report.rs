//! What is shown of a measurement: a table, and JSON.

use std::collections::BTreeMap;
use std::io::{self, Write};
use std::path::Path;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use clap::ValueEnum;
use hdrhistogram::Histogram;
use serde::{Deserialize, Serialize};

use crate::options::{Options, TargetChoice, Workload};
use crate::tally::Tally;

/// Grows when fields change their meaning.
const FORMAT_VERSION: u32 = 1;

/// With less of its threads' time left than this, the generator may be what limits the rate.
const SPARE_SHARE_MIN: f64 = 0.15;

/// A whole measurement.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Report {
    pub(crate) format_version: u32,
    /// Of the generator.
    pub(crate) version: String,
    /// When it began, in seconds since 1970.
    pub(crate) started_unix_seconds: u64,
    pub(crate) api: String,
    pub(crate) operation: String,
    /// Of mixed requests only.
    pub(crate) put_ratio: Option<f64>,
    /// As chosen: leader, follower, all or a URL. Each point says which nodes that were.
    pub(crate) target: String,
    pub(crate) keys: u64,
    /// None: uniform.
    pub(crate) zipf_exponent: Option<f64>,
    pub(crate) value_bytes: usize,
    pub(crate) warm_up_ms: u64,
    pub(crate) duration_ms: u64,
    pub(crate) timeout_ms: u64,
    pub(crate) threads: usize,
    pub(crate) seed: u64,
    pub(crate) points: Vec<Point>,
}

/// What one number of connections, at one rate, came to.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Point {
    pub(crate) connections: usize,
    /// None: closed loop.
    pub(crate) offered_per_second: Option<u64>,
    pub(crate) targets: Vec<String>,
    /// Successes within the measurement, by its duration.
    pub(crate) requests_per_second: f64,
    /// Of all successes.
    pub(crate) latency: Latency,
    /// Of mixed requests only: of the writes among them.
    pub(crate) put_latency: Option<Latency>,
    /// Of mixed requests only: of the reads among them.
    pub(crate) get_latency: Option<Latency>,
    /// Surely without effect.
    pub(crate) failed: u64,
    /// A write among them may have taken effect.
    pub(crate) unknown: u64,
    /// Both of the above, by kind, and attempts to connect that were refused.
    pub(crate) failures: BTreeMap<String, u64>,
    pub(crate) generator: GeneratorCost,
}

/// Latencies of successes, in microseconds.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Latency {
    pub(crate) count: u64,
    pub(crate) mean_us: f64,
    pub(crate) min_us: f64,
    pub(crate) p50_us: f64,
    pub(crate) p90_us: f64,
    pub(crate) p99_us: f64,
    pub(crate) p999_us: f64,
    pub(crate) max_us: f64,
}

/// What the load cost the generator itself during the measurement.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct GeneratorCost {
    /// User and system, of all threads.
    pub(crate) processor_us_per_request: f64,
    /// Of the time of its threads, from 0 to 1; a little more with what the main thread takes.
    pub(crate) busy_share: f64,
}

impl Report {
    /// Without points.
    pub(crate) fn new(options: &Options) -> Self {
        let millis = |duration: Duration| u64::try_from(duration.as_millis()).unwrap_or(u64::MAX);
        Self {
            format_version: FORMAT_VERSION,
            version: env!("CARGO_PKG_VERSION").to_owned(),
            started_unix_seconds: SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs()),
            api: name(&options.api),
            operation: name(&options.workload),
            put_ratio: (options.workload == Workload::Mixed).then_some(options.put_ratio),
            target: match &options.target {
                TargetChoice::Leader => "leader".to_owned(),
                TargetChoice::Follower => "follower".to_owned(),
                TargetChoice::All => "all".to_owned(),
                TargetChoice::One(url) => url.to_string(),
            },
            keys: options.keys,
            zipf_exponent: options.zipf_exponent,
            value_bytes: options.value_bytes,
            warm_up_ms: millis(options.warm_up),
            duration_ms: millis(options.duration),
            timeout_ms: millis(options.timeout),
            threads: options.threads,
            seed: options.seed,
            points: Vec::new(),
        }
    }

    /// Writes the table's head.
    ///
    /// # Errors
    /// What `out` refuses.
    pub(crate) fn write_head(&self, options: &Options, out: &mut dyn Write) -> io::Result<()> {
        let keys = match self.zipf_exponent {
            None => "uniform keys".to_owned(),
            Some(exponent) => format!("Zipf keys ({exponent})"),
        };
        let pace = if options.rates.is_empty() { "closed loop" } else { "open loop" };
        writeln!(
            out,
            "{} on {} ({}), {} {keys}, values of {} bytes, {:?} after {:?} of warm-up, {pace}; latencies in ms",
            self.operation, self.target, self.api, self.keys, self.value_bytes, options.duration, options.warm_up,
        )?;
        writeln!(
            out,
            "{:>5} {:>5} {:>9} {:>9} {:>8} {:>8} {:>8} {:>8} {:>8} {:>8} {:>7} {:>7} {:>7} {:>5}",
            "conns",
            "op",
            "offered/s",
            "done/s",
            "mean",
            "p50",
            "p90",
            "p99",
            "p99.9",
            "max",
            "failed",
            "unknown",
            "gen us",
            "gen %",
        )
    }
}

impl Point {
    /// What `tally` comes to; `processor_time` is what the generator took during the measurement.
    pub(crate) fn new(
        options: &Options,
        connections: usize,
        offered_per_second: Option<u64>,
        targets: Vec<String>,
        tally: &Tally,
        processor_time: Duration,
    ) -> Self {
        let seconds = tally.duration().as_secs_f64();
        let mixed = options.workload == Workload::Mixed;
        let threads = options.threads.min(connections);
        Self {
            connections,
            offered_per_second,
            targets,
            requests_per_second: tally.answered_in_window as f64 / seconds,
            latency: Latency::new(&tally.all()),
            put_latency: mixed.then(|| Latency::new(&tally.puts)),
            get_latency: mixed.then(|| Latency::new(&tally.gets)),
            failed: tally.failures(false),
            unknown: tally.failures(true),
            failures: tally.failures.iter().map(|(kind, count)| (kind.to_string(), *count)).collect(),
            generator: GeneratorCost {
                processor_us_per_request: processor_time.as_secs_f64() * 1e6 / tally.requests().max(1) as f64,
                busy_share: processor_time.as_secs_f64() / seconds / threads as f64,
            },
        }
    }

    /// Whether the nodes may be able to do more than the generator.
    pub(crate) fn generator_is_busy(&self) -> bool {
        1.0 - self.generator.busy_share < SPARE_SHARE_MIN
    }

    /// Writes its rows of the table, with what is to be said about them.
    ///
    /// # Errors
    /// What `out` refuses.
    pub(crate) fn write_rows(&self, operation: &str, out: &mut dyn Write) -> io::Result<()> {
        let offered = self.offered_per_second.map_or("-".to_owned(), |rate| rate.to_string());
        write!(out, "{:>5} {:>5} {offered:>9} {:>9.0}", self.connections, short(operation), self.requests_per_second)?;
        self.latency.write_columns(out)?;
        writeln!(
            out,
            " {:>7} {:>7} {:>7.2} {:>5.0}",
            self.failed,
            self.unknown,
            self.generator.processor_us_per_request,
            self.generator.busy_share * 100.0,
        )?;
        for (name, latency) in [("put", &self.put_latency), ("get", &self.get_latency)] {
            if let Some(latency) = latency {
                write!(out, "{:>5} {name:>5} {:>9} {:>9}", "", "", "")?;
                latency.write_columns(out)?;
                writeln!(out)?;
            }
        }
        if !self.failures.is_empty() {
            let kinds: Vec<_> = self.failures.iter().map(|(kind, count)| format!("{kind}: {count}")).collect();
            writeln!(out, "      without success: {}", kinds.join(", "))?;
        }
        if self.generator_is_busy() {
            writeln!(out, "      the generator was busy nearly all the time: the nodes may be able to do more")?;
        }
        out.flush()
    }
}

impl Latency {
    fn new(nanoseconds: &Histogram<u64>) -> Self {
        let micros = |nanos: u64| nanos as f64 / 1e3;
        // An empty histogram's least value is none at all.
        let min = if nanoseconds.is_empty() { 0 } else { nanoseconds.min() };
        Self {
            count: nanoseconds.len(),
            mean_us: nanoseconds.mean() / 1e3,
            min_us: micros(min),
            p50_us: micros(nanoseconds.value_at_quantile(0.5)),
            p90_us: micros(nanoseconds.value_at_quantile(0.9)),
            p99_us: micros(nanoseconds.value_at_quantile(0.99)),
            p999_us: micros(nanoseconds.value_at_quantile(0.999)),
            max_us: micros(nanoseconds.max()),
        }
    }

    fn write_columns(&self, out: &mut dyn Write) -> io::Result<()> {
        for micros in [self.mean_us, self.p50_us, self.p90_us, self.p99_us, self.p999_us, self.max_us] {
            write!(out, " {:>8.3}", micros / 1e3)?;
        }
        Ok(())
    }
}

/// Writes `report` to `path`.
///
/// # Errors
/// One line.
pub(crate) fn write_json(report: &Report, path: &Path) -> Result<(), String> {
    let mut text = serde_json::to_string_pretty(report).map_err(|error| error.to_string())?;
    text.push('\n');
    std::fs::write(path, text).map_err(|error| format!("failed to write {}: {error}", path.display()))
}

fn name(value: &impl ValueEnum) -> String {
    value.to_possible_value().map(|value| value.get_name().to_owned()).unwrap_or_default()
}

/// An operation's name that fits its column.
fn short(operation: &str) -> &str {
    if operation == "stale-get" { "stale" } else { operation }
}
