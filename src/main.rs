//! The program: flags, logger, and the exit status. All else is in the library.

use std::io::Write;
use std::process::ExitCode;

use clap::Parser;
use raftexample::config::{Cli, Config, usage_error};

/// The command line cannot be understood.
const EXIT_USAGE: u8 = 2;
/// Anything else went wrong.
const EXIT_FAILURE: u8 = 1;

fn main() -> ExitCode {
    let config = match Cli::try_parse() {
        Ok(cli) => Config::from_cli(cli),
        // Help and version are errors to clap; they go to standard output, and are none to us.
        Err(answer) if !answer.use_stderr() => {
            return if answer.print().is_ok() { ExitCode::SUCCESS } else { ExitCode::from(EXIT_FAILURE) };
        }
        Err(error) => Err(usage_error(&error)),
    };
    let config = match config {
        Ok(config) => config,
        Err(line) => return fail(EXIT_USAGE, &line),
    };
    #[cfg(feature = "failpoints")]
    let _armed = raftexample::fail_point::arm_from_environment();
    env_logger::Builder::from_env(env_logger::Env::default().default_filter_or("info")).init();
    end_process_on_panic();
    match raftexample::node::run(config) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => fail(EXIT_FAILURE, &error),
    }
}

/// Says why the process ends. The only place that does, so that a reason is printed once.
fn fail(status: u8, reason: &dyn std::fmt::Display) -> ExitCode {
    // Nobody is left to tell if standard error is closed; the status still tells.
    let _ = writeln!(std::io::stderr(), "raftexample: {reason}");
    ExitCode::from(status)
}

/// A panic in any thread ends the process: a replica whose applier is dead must not vote, and one whose driver is dead
/// must not keep clients waiting.
fn end_process_on_panic() {
    std::panic::set_hook(Box::new(|panic| {
        let thread = std::thread::current();
        let name = thread.name().unwrap_or("unnamed");
        let message = panic.payload_as_str().unwrap_or("(no message)");
        let location = panic.location().map(ToString::to_string).unwrap_or_default();
        let _ = writeln!(std::io::stderr(), "raftexample: thread '{name}' panicked at {location}: {message}");
        #[expect(clippy::disallowed_methods, reason = "this is main, and the reason has just been printed")]
        std::process::exit(i32::from(EXIT_FAILURE));
    }));
}
