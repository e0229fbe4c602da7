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
//! The files, in reading order: `options` (the command line), `target` (which nodes), `random` (which keys), `request`
//! and `answer` (the bytes), `schedule` (when), `tally` (what is counted), `connection`, `worker` (the loop), `run`
//! (fill, sweep), and `report`, `plot` and `progress` (what is shown).

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

#[cfg(test)]
mod tests;

use std::io::Write;
use std::process::ExitCode;

use clap::Parser;
use raftexample::config::usage_error;

use crate::options::{Cli, Options};

/// The command line cannot be understood.
const EXIT_USAGE: u8 = 2;
/// Anything else went wrong, or no request of a whole measurement succeeded.
const EXIT_FAILURE: u8 = 1;

fn main() -> ExitCode {
    let options = match Cli::try_parse() {
        Ok(cli) => Options::from_cli(cli),
        Err(answer) if !answer.use_stderr() => {
            return if answer.print().is_ok() { ExitCode::SUCCESS } else { ExitCode::from(EXIT_FAILURE) };
        }
        Err(error) => Err(usage_error(&error)),
    };
    let outcome = match options {
        Ok(options) => run::run(&options, &mut std::io::stdout().lock()).map_err(|reason| (EXIT_FAILURE, reason)),
        Err(reason) => Err((EXIT_USAGE, reason)),
    };
    match outcome {
        Ok(_) => ExitCode::SUCCESS,
        Err((status, reason)) => {
            // Nobody is left to tell if standard error is closed; the status still tells.
            let _ = writeln!(std::io::stderr(), "raftexample-bench: {reason}");
            ExitCode::from(status)
        }
    }
}
