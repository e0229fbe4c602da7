//! Load on a running cluster, and what came of it: rate, latency, failures.
//!
//! One or a few threads drive all connections with non-blocking sockets: a thread per connection would take the
//! processor from the nodes that it measures, where both share a machine. A request costs one `write`, one `read` and
//! a share of one `epoll_wait`.
//!
//! In a **closed loop** (the default) each connection sends its next request when the last one is answered, so a slow
//! server is asked less. In an **open loop** (`--rate`) requests start by the clock, whatever the server does, and the
//! latency of each counts from when it should have started: a stall shows in all requests that it delayed.
//!
//! Only requests answered with success have a latency. All else is counted by kind.
//!
//! The subcommands start clusters of their own, and measure them with the same load: `standard` prints a table of this
//! store alone, `compare` ratios to others, `drift` what a long time does to it.
//!
//! The files, in reading order: `options` (the command line of a load), `target` (which nodes), `random` (which keys),
//! `request` and `answer` (the bytes), `schedule` (when), `tally` (what is counted), `connection`, `worker` (the loop),
//! `run` (fill, sweep), and `report`, `plot` and `progress` (what is shown). Then `lab` (clusters), `standard`, `drift`
//! and `comparison`, and `command_line`.

mod options;
mod target;
mod random;
mod request;
mod answer;
mod schedule;
mod tally;
mod connection;
mod worker;
mod progress;
mod report;
mod plot;
mod run;
mod lab;
mod standard;
mod drift;
mod comparison;
mod command_line;

#[cfg(test)]
mod tests;

use std::io::Write;
use std::process::ExitCode;

use clap::Parser;
use raftexample::config::usage_error;

use crate::command_line::{CommandLine, Work};
use crate::options::{Cli, Options};

/// The command line cannot be understood.
const EXIT_USAGE: u8 = 2;
/// Anything else went wrong, or no request of a whole measurement succeeded.
const EXIT_FAILURE: u8 = 1;

fn main() -> ExitCode {
    let outcome = match CommandLine::try_parse() {
        Ok(CommandLine { work: Some(work), .. }) => start(&work).map_err(|reason| (EXIT_FAILURE, reason)),
        Ok(CommandLine { load, .. }) => measure_running_cluster(load),
        Err(answer) if !answer.use_stderr() => {
            return if answer.print().is_ok() { ExitCode::SUCCESS } else { ExitCode::from(EXIT_FAILURE) };
        }
        Err(error) => Err((EXIT_USAGE, usage_error(&error))),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err((status, reason)) => {
            // Nobody is left to tell if standard error is closed; the status still tells.
            let _ = writeln!(std::io::stderr(), "raftexample-bench: {reason}");
            ExitCode::from(status)
        }
    }
}

fn measure_running_cluster(cli: Cli) -> Result<(), (u8, String)> {
    let options = Options::from_cli(cli).map_err(|reason| (EXIT_USAGE, reason))?;
    run::run(&options, &mut std::io::stdout().lock()).map_err(|reason| (EXIT_FAILURE, reason))?;
    Ok(())
}

fn start(work: &Work) -> Result<(), String> {
    run::raise_descriptor_limit();
    let out = &mut std::io::stdout().lock();
    match work {
        Work::Standard(cli) => standard::measure_standard(cli, out),
        Work::Compare(cli) => comparison::compare(cli, out),
        Work::Drift(cli) => drift::measure_drift(cli, out),
        Work::Echo(cli) => lab::echo::run(cli),
        Work::Sync(cli) => {
            let median = lab::disk::sync_repeatedly(cli)?;
            out.write_all(median.as_bytes()).map_err(|error| format!("failed to print: {error}"))
        }
    }
}
