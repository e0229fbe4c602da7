//! Which of the program's works is asked for.

use clap::{Parser, Subcommand};

use crate::comparison::CompareCli;
use crate::drift::DriftCli;
use crate::lab::disk::SyncCli;
use crate::lab::echo::EchoCli;
use crate::options::Cli;
use crate::standard::StandardCli;

/// What was typed.
#[derive(Clone, Debug, Parser)]
#[command(
    name = "raftexample-bench",
    version,
    about = "Puts load on a running cluster and measures it; its subcommands start clusters of their own",
    long_about = None,
    args_conflicts_with_subcommands = true
)]
pub(crate) struct CommandLine {
    #[command(flatten)]
    pub(crate) load: Cli,

    #[command(subcommand)]
    pub(crate) work: Option<Work>,
}

/// What starts clusters of its own, in temporary directories, and ends them.
#[derive(Clone, Debug, Subcommand)]
pub(crate) enum Work {
    /// Start three nodes, measure the standard loads, and print a table
    Standard(StandardCli),
    /// Measure side by side with etcd, Go's raftexample and the bare machine, and print ratios
    Compare(CompareCli),
    /// Load three nodes for a long time, and tell whether memory, descriptors or latency grow
    Drift(DriftCli),
    /// Answer every HTTP request with the same bytes
    #[command(hide = true)]
    Echo(EchoCli),
    /// Append to a file and sync it, again and again
    #[command(hide = true)]
    Sync(SyncCli),
}
