//! The command line, and the checked settings it becomes.

use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, ValueEnum};
use raftexample::config::{MAX_VALUE_BYTES_MAX, parse_duration, parse_size};
use url::Url;

/// More connections than this say nothing more about a server, and meet the usual limit of 1024 descriptors.
pub(crate) const CONNECTIONS_MAX: usize = 1024;

/// More threads than this would be a measurement of the generator.
pub(crate) const THREADS_MAX: usize = 8;

/// Keys are numbers of [`crate::request::KEY_DIGITS`] digits.
pub(crate) const KEYS_MAX: u64 = 1_000_000_000;

/// No thread could keep to a schedule with less than a microsecond between requests.
pub(crate) const RATE_MAX: u64 = 1_000_000;

/// Longer is a typing mistake. Also what the latency histograms are made for.
pub(crate) const TIME_MAX: Duration = Duration::from_secs(60 * 60);

/// What was typed of a load. The comments of the fields are the text of `--help`.
#[derive(Clone, Debug, Args)]
pub(crate) struct Cli {
    /// Client URLs of the cluster's nodes
    #[arg(
        long,
        value_name = "URL,URL,…",
        value_delimiter = ',',
        default_value = "http://127.0.0.1:12380,http://127.0.0.1:22380,http://127.0.0.1:32380"
    )]
    endpoints: Vec<String>,

    /// Which nodes get the load: leader, follower (all of them), all, or the URL of one node [default: leader; all with
    /// --api raw]
    #[arg(long, value_name = "TARGET")]
    target: Option<String>,

    /// What the nodes speak
    #[arg(long, value_enum, default_value = "raftexample")]
    api: Api,

    /// What is requested; reads are linearizable unless they are called stale
    #[arg(long, value_enum, default_value = "put")]
    operation: Workload,

    /// The share of PUTs among mixed requests, from 0 to 1
    #[arg(long, value_name = "SHARE", default_value = "0.5")]
    put_ratio: f64,

    /// What --api raw requests
    #[arg(long, value_name = "PATH", default_value = "/")]
    path: String,

    /// How many keys there are
    #[arg(long, value_name = "N", default_value = "10000", value_parser = clap::value_parser!(u64).range(1..=KEYS_MAX))]
    keys: u64,

    /// How large a value is, as in 128 or 20KiB
    #[arg(long, value_name = "N", default_value = "128", value_parser = value_bytes)]
    value_bytes: usize,

    /// How often which key is requested
    #[arg(long, value_enum, default_value = "uniform")]
    distribution: KeyDistribution,

    /// With Zipf keys, the n-th is requested as often as n to the power of minus this
    #[arg(long, value_name = "EXPONENT", default_value = "0.99")]
    zipf_exponent: f64,

    /// How many connections, 1 to 1024; several numbers are measured one after the other
    #[arg(long, value_name = "N,N,…", value_delimiter = ',', default_value = "64", value_parser = connections)]
    connections: Vec<usize>,

    /// Open loop: start this many requests per second, and count latency from when each should have started; several
    /// numbers are measured one after the other [default: closed loop]
    #[arg(long, value_name = "N,N,…", value_delimiter = ',', value_parser = clap::value_parser!(u64).range(1..=RATE_MAX))]
    rate: Vec<u64>,

    /// How long to load before anything counts
    #[arg(long, value_name = "D", default_value = "1s", value_parser = duration)]
    warm_up: Duration,

    /// How long to measure each point
    #[arg(long, value_name = "D", default_value = "10s", value_parser = duration)]
    duration: Duration,

    /// How long to wait for one answer
    #[arg(long, value_name = "D", default_value = "10s", value_parser = duration)]
    timeout: Duration,

    /// How many threads make the load
    #[arg(long, value_name = "N", default_value = "1", value_parser = clap::value_parser!(u64).range(1..=THREADS_MAX as u64))]
    threads: u64,

    /// Where the sequence of keys starts: equal seeds, equal keys
    #[arg(long, value_name = "N", default_value = "1")]
    seed: u64,

    /// Do not write all keys once before a measurement that reads
    #[arg(long)]
    no_fill: bool,

    /// Write the results to a file, as JSON
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,

    /// Draw throughput against latency into a file, as SVG
    #[arg(long, value_name = "FILE.svg")]
    plot: Option<PathBuf>,
}

/// What the nodes speak.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Api {
    /// The REST API of this crate
    Raftexample,
    /// etcd's version 2, HTTP
    EtcdV2,
    /// etcd's version 3 through its JSON gateway
    EtcdV3Json,
    /// GET of one path, on any HTTP server
    Raw,
}

/// What is requested.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Workload {
    /// Writes
    Put,
    /// Linearizable reads
    Get,
    /// Reads of what the node has, without asking others
    StaleGet,
    /// Writes and linearizable reads
    Mixed,
}

/// How often which key is requested.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum KeyDistribution {
    /// Every key equally often
    Uniform,
    /// A few keys often, most of them seldom
    Zipf,
}

/// Which nodes get the load.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum TargetChoice {
    /// The node that says that it leads.
    Leader,
    /// All that say that they follow, in turn.
    Follower,
    /// All endpoints, in turn.
    All,
    /// This one.
    One(Url),
}

/// The settings, checked: who holds them may use each field as it is.
#[derive(Clone, Debug)]
pub(crate) struct Options {
    /// Client URLs; at least one.
    pub(crate) endpoints: Vec<Url>,
    pub(crate) target: TargetChoice,
    pub(crate) api: Api,
    pub(crate) workload: Workload,
    /// Only looked at for [`Workload::Mixed`]; 0 to 1.
    pub(crate) put_ratio: f64,
    pub(crate) path: String,
    /// 1 to [`KEYS_MAX`].
    pub(crate) keys: u64,
    pub(crate) value_bytes: usize,
    /// None: uniform.
    pub(crate) zipf_exponent: Option<f64>,
    /// At least one number; each from 1 to [`CONNECTIONS_MAX`].
    pub(crate) connections: Vec<usize>,
    /// Empty: closed loop. In requests per second.
    pub(crate) rates: Vec<u64>,
    pub(crate) warm_up: Duration,
    /// More than zero.
    pub(crate) duration: Duration,
    /// More than zero.
    pub(crate) timeout: Duration,
    /// At least one.
    pub(crate) threads: usize,
    pub(crate) seed: u64,
    /// Whether all keys are to be written once before the measurement.
    pub(crate) fill: bool,
    pub(crate) json: Option<PathBuf>,
    pub(crate) plot: Option<PathBuf>,
}

impl Options {
    /// Writes of 128 bytes over 64 connections to the leader of `endpoints`, as fast as they are answered: what the
    /// command line says when it says nothing. `endpoints` are not empty.
    pub(crate) fn closed_loop(endpoints: Vec<Url>, api: Api) -> Self {
        Self {
            endpoints,
            target: TargetChoice::Leader,
            api,
            workload: Workload::Put,
            put_ratio: 0.5,
            path: "/".to_owned(),
            keys: 10_000,
            value_bytes: 128,
            zipf_exponent: None,
            connections: vec![64],
            rates: Vec::new(),
            warm_up: Duration::from_secs(1),
            duration: Duration::from_secs(10),
            timeout: Duration::from_secs(10),
            threads: 1,
            seed: 1,
            fill: false,
            json: None,
            plot: None,
        }
    }

    /// Checks what the types of [`Cli`] have not.
    ///
    /// # Errors
    /// One line that names the flag.
    pub(crate) fn from_cli(cli: Cli) -> Result<Self, String> {
        let endpoints =
            cli.endpoints.iter().map(|text| node_url("--endpoints", text)).collect::<Result<Vec<_>, _>>()?;
        let target = match (cli.target.as_deref(), cli.api) {
            (None, Api::Raw) | (Some("all"), _) => TargetChoice::All,
            (Some("leader" | "follower"), Api::Raw) => {
                return Err("--target: --api raw knows of no roles; give all or a URL".to_owned());
            }
            (None | Some("leader"), _) => TargetChoice::Leader,
            (Some("follower"), _) => TargetChoice::Follower,
            (Some(text), _) => TargetChoice::One(node_url("--target", text)?),
        };
        if cli.api == Api::Raw && cli.operation == Workload::Mixed {
            return Err("--operation mixed: --api raw has only GET".to_owned());
        }
        // A path that breaks the request line would count as failures of the server.
        if !cli.path.starts_with('/') || !cli.path.bytes().all(|byte| byte.is_ascii_graphic()) {
            return Err(format!("--path '{}': write a path, escaped, that begins with /", cli.path.escape_debug()));
        }
        if !(0.0..=1.0).contains(&cli.put_ratio) {
            return Err(format!("--put-ratio {}: write a share from 0 to 1", cli.put_ratio));
        }
        if !(0.0..=10.0).contains(&cli.zipf_exponent) {
            return Err(format!("--zipf-exponent {}: write an exponent from 0 to 10", cli.zipf_exponent));
        }
        for (flag, duration) in [("--duration", cli.duration), ("--timeout", cli.timeout)] {
            if duration.is_zero() {
                return Err(format!("{flag}: write a duration of at least 1ms"));
            }
        }
        let workload = if cli.api == Api::Raw { Workload::Get } else { cli.operation };
        Ok(Self {
            endpoints,
            target,
            api: cli.api,
            workload,
            put_ratio: cli.put_ratio,
            path: cli.path,
            keys: cli.keys,
            value_bytes: cli.value_bytes,
            zipf_exponent: (cli.distribution == KeyDistribution::Zipf).then_some(cli.zipf_exponent),
            connections: cli.connections,
            rates: cli.rate,
            warm_up: cli.warm_up,
            duration: cli.duration,
            timeout: cli.timeout,
            threads: usize::try_from(cli.threads).unwrap_or(THREADS_MAX),
            seed: cli.seed,
            fill: !cli.no_fill && cli.api != Api::Raw && workload != Workload::Put,
            json: cli.json,
            plot: cli.plot,
        })
    }
}

/// Reads the URL of a node: a host, perhaps a port, and no path, since paths are ours.
fn node_url(flag: &str, text: &str) -> Result<Url, String> {
    let refusal = |reason: String| format!("{flag} '{}': {reason}", text.escape_debug());
    let url = Url::parse(text).map_err(|error| refusal(error.to_string()))?;
    let plain = url.path() == "/" && url.query().is_none() && url.fragment().is_none() && url.username().is_empty();
    if url.scheme() != "http" || !url.has_host() || !plain {
        return Err(refusal("write a URL such as http://127.0.0.1:12380".to_owned()));
    }
    Ok(url)
}

fn connections(text: &str) -> Result<usize, String> {
    match text.parse() {
        Ok(number) if (1..=CONNECTIONS_MAX).contains(&number) => Ok(number),
        _ => Err(format!("write a whole number from 1 to {CONNECTIONS_MAX}")),
    }
}

fn value_bytes(text: &str) -> Result<usize, String> {
    match usize::try_from(parse_size(text)?) {
        Ok(bytes) if bytes <= MAX_VALUE_BYTES_MAX => Ok(bytes),
        _ => Err(format!("write at most {MAX_VALUE_BYTES_MAX} bytes")),
    }
}

/// Reads a duration of at most [`TIME_MAX`]; zero may be written without a unit.
///
/// # Errors
/// What to write instead.
pub(crate) fn duration(text: &str) -> Result<Duration, String> {
    // Zero is fine for a warm-up, and what people write for it has no unit.
    let duration = if text == "0" { Duration::ZERO } else { parse_duration(text)? };
    if duration > TIME_MAX { Err("write a duration of at most 1h".to_owned()) } else { Ok(duration) }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;
    use crate::command_line::CommandLine;

    fn options(arguments: &[&str]) -> Result<Options, String> {
        let line = CommandLine::try_parse_from([&["raftexample-bench"], arguments].concat());
        Options::from_cli(line.map_err(|error| error.to_string())?.load)
    }

    #[test]
    fn defaults_load_the_leader_of_the_local_cluster() {
        let options = options(&[]).unwrap();
        let same = Options::closed_loop(options.endpoints.clone(), options.api);
        assert_eq!(format!("{options:?}"), format!("{same:?}"));
        assert_eq!(options.endpoints.len(), 3);
        assert_eq!(options.target, TargetChoice::Leader);
        assert_eq!((options.connections, options.rates), (vec![64], vec![]));
        assert!(!options.fill, "writes need no keys");
    }

    #[test]
    fn lists_and_units_are_read() {
        let arguments = ["--connections=1,16,1024", "--rate=100,200", "--value-bytes=20KiB", "--operation=get"];
        let options = options(&[&arguments[..], &["--target=http://[::1]:80", "--warm-up=0"]].concat()).unwrap();
        assert_eq!(options.connections, [1, 16, 1024]);
        assert_eq!(options.rates, [100, 200]);
        assert_eq!(options.value_bytes, 20 << 10);
        assert_eq!(options.warm_up, Duration::ZERO);
        assert_eq!(options.target, TargetChoice::One(Url::parse("http://[::1]:80").unwrap()));
        assert!(options.fill);
    }

    #[test]
    fn raw_has_no_roles_and_no_keys() {
        let options = options(&["--api=raw", "--operation=put"]).unwrap();
        assert_eq!((options.target, options.workload, options.fill), (TargetChoice::All, Workload::Get, false));
    }

    #[test]
    fn nonsense_is_refused_by_name() {
        for (argument, flag) in [
            ("--connections=0", "--connections"),
            ("--connections=1025", "--connections"),
            ("--connections=1,,2", "--connections"),
            ("--rate=0", "--rate"),
            ("--duration=0", "--duration"),
            ("--duration=10", "--duration"),
            ("--timeout=2h", "--timeout"),
            ("--endpoints=https://127.0.0.1:1", "--endpoints"),
            ("--endpoints=http://127.0.0.1:1/x", "--endpoints"),
            ("--target=nobody", "--target"),
            ("--put-ratio=1.5", "--put-ratio"),
            ("--put-ratio=nan", "--put-ratio"),
            ("--zipf-exponent=-1", "--zipf-exponent"),
            ("--path=x", "--path"),
            ("--path=/ x", "--path"),
            ("--keys=0", "--keys"),
            ("--value-bytes=17MiB", "--value-bytes"),
            ("--threads=9", "--threads"),
        ] {
            let refusal = options(&[argument]).unwrap_err();
            assert!(refusal.contains(flag), "{argument}: {refusal}");
        }
        assert!(options(&["--api=raw", "--target=leader"]).unwrap_err().contains("--target"));
        assert!(options(&["--api=raw", "--operation=mixed"]).unwrap_err().contains("--operation"));
    }
}
