//! The standard loads on three nodes, and what a PUT costs each thread of them.

use std::collections::BTreeMap;
use std::io::{self, Write};
use std::time::Duration;

use clap::Args;
use serde::Serialize;

use crate::lab::cluster::Cluster;
use crate::lab::machine::Machine;
use crate::lab::usage::{ThreadTime, thread_times};
use crate::lab::{Bench, LabCli};
use crate::options::{Options, TargetChoice, Workload, duration};
use crate::report::Report;
use crate::run::{measure, run};

/// The nodes of the cluster.
const NODES: usize = 3;

/// What is measured: a load, where it goes, and over how many connections.
const STEPS: &[(Workload, TargetChoice, &[usize])] = &[
    (Workload::Put, TargetChoice::Leader, &[1, 16, 64, 256]),
    (Workload::Put, TargetChoice::Follower, &[64]),
    (Workload::Get, TargetChoice::Leader, &[1, 16, 64, 256]),
    (Workload::Get, TargetChoice::Follower, &[64]),
    (Workload::StaleGet, TargetChoice::Leader, &[64]),
    (Workload::Mixed, TargetChoice::Leader, &[64]),
];

/// PUTs over so many connections are looked into, thread by thread.
const PROFILED_CONNECTIONS: [usize; 2] = [1, 64];

/// What was typed. The comments of the fields are the text of `--help`.
#[derive(Clone, Debug, Args)]
pub(crate) struct StandardCli {
    #[command(flatten)]
    lab: LabCli,

    /// How long to load before anything counts
    #[arg(long, value_name = "D", default_value = "1s", value_parser = duration)]
    warm_up: Duration,

    /// How long to measure each point
    #[arg(long, value_name = "D", default_value = "4s", value_parser = duration)]
    duration: Duration,

    /// Flags of the nodes, as one word each; several by repeating it
    #[arg(long, value_name = "FLAG", allow_hyphen_values = true)]
    node_flag: Vec<String>,
}

/// All of it, as JSON.
#[derive(Debug, Serialize)]
struct Results {
    machine: Machine,
    node_flags: Vec<String>,
    loads: Vec<Report>,
    profiles: Vec<Profile>,
}

/// What one PUT took of each thread's time.
#[derive(Debug, Serialize)]
struct Profile {
    connections: usize,
    requests_per_second: f64,
    leader: BTreeMap<String, PerPut>,
    follower: BTreeMap<String, PerPut>,
}

#[derive(Debug, Serialize)]
struct PerPut {
    processor_us: f64,
    sleeps: f64,
}

/// Does all of it, and prints as it goes.
///
/// # Errors
/// One line.
pub(crate) fn measure_standard(cli: &StandardCli, out: &mut dyn Write) -> Result<(), String> {
    if cli.duration.is_zero() {
        return Err("--duration: write a duration of at least 1ms".to_owned());
    }
    let bench = Bench::open(&cli.lab, "standard")?;
    let written = |error: io::Error| format!("failed to write the table: {error}");
    write!(out, "{}", bench.preamble()).map_err(written)?;
    let flags: Vec<&str> = cli.node_flag.iter().map(String::as_str).collect();
    let cluster = Cluster::start(bench.raftexample(NODES, &flags), &bench.path().join("standard"))?;
    let mut results = Results {
        machine: bench.machine.clone(),
        node_flags: cli.node_flag.clone(),
        loads: Vec::new(),
        profiles: Vec::new(),
    };
    let base =
        Options { warm_up: cli.warm_up, duration: cli.duration, ..Options::closed_loop(cluster.urls(), cluster.api()) };
    let mut filled = false;
    for (workload, target, connections) in STEPS {
        writeln!(out).map_err(written)?;
        // One fill is enough for all that read.
        let fill = !filled && *workload != Workload::Put;
        filled |= fill;
        let (workload, target, connections) = (*workload, target.clone(), connections.to_vec());
        results.loads.push(run(&Options { workload, target, connections, fill, ..base.clone() }, out)?);
    }
    for connections in PROFILED_CONNECTIONS {
        let profile = profile(&cluster, &base, connections)?;
        profile.write(out).map_err(written)?;
        results.profiles.push(profile);
    }
    let resident: Result<Vec<u64>, String> = (0..NODES).map(|index| cluster.resident_bytes(index)).collect();
    let resident: Vec<String> = resident?.iter().map(|bytes| format!("{} MiB", bytes >> 20)).collect();
    writeln!(out, "\nresident memory of the nodes at the end: {}", resident.join(", ")).map_err(written)?;
    writeln!(out, "results: {}", bench.write_json(&results)?.display()).map_err(written)
}

fn profile(cluster: &Cluster, base: &Options, connections: usize) -> Result<Profile, String> {
    let leader = cluster.pid(cluster.leader()?)?;
    let follower = *cluster.followers()?.first().ok_or("there is no follower")?;
    let follower = cluster.pid(follower)?;
    // Without a warm-up all requests count, and so does all that the threads took for them.
    let options = Options { warm_up: Duration::ZERO, ..base.clone() };
    let before = (thread_times(leader), thread_times(follower));
    let point = measure(&options, connections, None)?;
    let after = (thread_times(leader), thread_times(follower));
    Ok(Profile {
        connections,
        requests_per_second: point.requests_per_second,
        leader: per_put(&before.0, &after.0, point.latency.count),
        follower: per_put(&before.1, &after.1, point.latency.count),
    })
}

fn per_put(
    before: &BTreeMap<String, ThreadTime>,
    after: &BTreeMap<String, ThreadTime>,
    puts: u64,
) -> BTreeMap<String, PerPut> {
    let puts = puts.max(1) as f64;
    let threads = after.iter().map(|(name, time)| {
        let taken = time.since(before.get(name).copied().unwrap_or_default());
        let per_put =
            PerPut { processor_us: taken.running.as_secs_f64() * 1e6 / puts, sleeps: taken.sleeps as f64 / puts };
        (name.clone(), per_put)
    });
    // Connection threads that ended with their connections took what can no more be seen.
    threads.collect()
}

impl Profile {
    fn write(&self, out: &mut dyn Write) -> io::Result<()> {
        writeln!(
            out,
            "\none PUT of {:.0} a second over {} connections: processor time in us, and how often a thread slept",
            self.requests_per_second, self.connections
        )?;
        for (role, threads) in [("leader", &self.leader), ("follower", &self.follower)] {
            let sum: f64 = threads.values().map(|per_put| per_put.processor_us).sum();
            writeln!(out, "  {role:<10} {:<14} {sum:>8.2} us", "in all")?;
            for (name, per_put) in threads.iter().filter(|(_, per_put)| per_put.processor_us >= 0.01) {
                writeln!(out, "  {:<10} {name:<14} {:>8.2} us {:>8.3}", "", per_put.processor_us, per_put.sleeps)?;
            }
        }
        Ok(())
    }
}
