//! Clusters of processes on this machine, started for a measurement and ended with it.
//!
//! All that is started or made is known to [`reaper`], so that an interrupted run leaves nothing behind.

pub(crate) mod reaper;
pub(crate) mod process;
pub(crate) mod ports;
pub(crate) mod cluster;
pub(crate) mod usage;
pub(crate) mod disk;
pub(crate) mod machine;
pub(crate) mod echo;

use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use clap::Args;
use serde::Serialize;

use cluster::{Launch, Program};
use machine::Machine;
use reaper::Directory;

/// The node's program, which is built together with this one.
const NODE_BINARY: &str = "raftexample";

/// What all works have in common that start clusters.
#[derive(Clone, Debug, Args)]
pub(crate) struct LabCli {
    /// The program that the nodes run [default: raftexample, beside this program]
    #[arg(long, value_name = "PATH", env = "NODE_BINARY")]
    node_binary: Option<PathBuf>,

    /// Where clusters write and results stay: a directory on the disk that is to be measured
    #[arg(long, value_name = "DIR", default_value = "target/bench")]
    directory: PathBuf,

    /// Write the results there, as JSON [default: a new file in --directory]
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
}

/// A place for clusters: programs, a directory, and the machine.
#[derive(Debug)]
pub(crate) struct Bench {
    pub(crate) node_binary: PathBuf,
    /// This program.
    pub(crate) own_binary: PathBuf,
    pub(crate) machine: Machine,
    pub(crate) directory: Directory,
    json: PathBuf,
}

impl Bench {
    /// Prepares for `work`, after which the file of results is called.
    ///
    /// # Errors
    /// One line, with the way out.
    pub(crate) fn open(cli: &LabCli, work: &str) -> Result<Self, String> {
        reaper::watch_signals()?;
        let own_binary =
            std::env::current_exe().map_err(|error| format!("failed to find this program's own file: {error}"))?;
        let node_binary = cli.node_binary.clone().unwrap_or_else(|| own_binary.with_file_name(NODE_BINARY));
        // Nodes are started in other directories, where a relative path would lead elsewhere.
        let node_binary = node_binary.canonicalize().map_err(|error| {
            format!(
                "failed to find the node's program {}: {error}; build it, or name it with --node-binary",
                node_binary.display()
            )
        })?;
        let directory = Directory::create(&cli.directory)?;
        let json = cli.json.clone().unwrap_or_else(|| cli.directory.join(format!("{work}-{}.json", unix_seconds())));
        let machine = Machine::look(directory.path());
        Ok(Self { node_binary, own_binary, machine, directory, json })
    }

    /// How to start nodes of ours.
    pub(crate) fn raftexample(&self, nodes: usize, flags: &[&str]) -> Launch {
        let flags = flags.iter().map(ToString::to_string).collect();
        Launch { program: Program::Raftexample, path: self.node_binary.clone(), flags, nodes }
    }

    /// Where clusters and scratch files lie.
    pub(crate) fn path(&self) -> &Path {
        self.directory.path()
    }

    /// What to know before the figures: the machine, and what spoils them.
    pub(crate) fn preamble(&self) -> String {
        let mut text = format!("on {}\n", self.machine.in_words());
        if self.machine.in_memory {
            text.push_str("this file system is in memory, where a sync costs nothing: name another --directory\n");
        }
        text
    }

    /// Writes the results; returns where they are.
    ///
    /// # Errors
    /// One line.
    pub(crate) fn write_json(&self, results: &impl Serialize) -> Result<&Path, String> {
        let mut text = serde_json::to_string_pretty(results).map_err(|error| error.to_string())?;
        text.push('\n');
        std::fs::write(&self.json, text)
            .map_err(|error| format!("failed to write {}: {error}", self.json.display()))?;
        Ok(&self.json)
    }
}

/// Now, in seconds since 1970.
pub(crate) fn unix_seconds() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}
