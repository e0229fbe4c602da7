//! Tests of the program as a user runs it: child processes, sockets, signals and files, and nothing of its inside.
//! What needs no process is tested beside the code. One binary, so that one lock keeps clusters apart: each test has
//! the machine for itself, since many of them measure times.

#![allow(clippy::unwrap_used, reason = "all of this is a test")]
#![allow(clippy::print_stdout, reason = "cargo shows it for a test that fails")]

/// Conditions, tokens and listings while leaders die.
mod api;
/// The load generator's own clusters.
mod bench;
/// The patches of `make breakage`.
mod breakage;
/// A client that repeats what may be repeated, at another node if need be.
mod caller;
/// A copy of what `make` needs to run a cluster.
mod checkout;
/// One request at a time over one connection, from scratch, so that a test may send what no decent client sends.
mod client;
/// Flags, environment, exit statuses.
mod cli;
/// What a cluster does while members die, pause and come back.
mod cluster;
/// What a node says of itself to Prometheus, read strictly.
mod exposition;
/// What a node does on a disk without room.
mod full_disk;
/// Writers that remember what was promised to them.
mod load;
/// Members that join, leave and are replaced, and every way to get that wrong.
mod membership;
/// What is counted and measured, and the README's table of it.
mod metrics;
/// The make targets, where the README's walk does not go.
mod make;
/// Cuts and holds snapshots between nodes.
mod proxy;
/// What survives the end of processes.
mod recovery;
/// The README's commands and tables.
mod readme;
/// A file system that is soon full.
mod small_disk;
/// Snapshots, compaction and catch-up.
mod snapshots;
/// Child processes with ports and directories of their own.
mod support;
/// Following changes, and many who wait.
mod watch;
