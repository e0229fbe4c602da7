//! A key-value store with a REST API, replicated by Raft on plain threads and channels.
//!
//! The crate is the program `raftexample`; the library exists so that its parts can be read, tested and taken
//! separately. Read the modules in the order below: each uses only those above it, with one exception
//! ([`administration`] and [`replica`] know each other).
//!
//! | to learn | read |
//! |---|---|
//! | what stands in the log | [`command`], [`membership_change`] |
//! | what must be on disk before what leaves the node | [`raft_core`], `RaftCore::process_one` |
//! | the ReadIndex rule | [`replica`], its first page |
//! | what happens to a write whose leader dies | [`replica`] and `store/windows.rs` |
//! | what survives a torn write, and what refuses to start | [`raft_log`] and [`data_dir`] |
//! | which messages of a peer never reach raft | [`message_check`] |
//! | which threads there are, and who waits for whom | [`node`] |
//!
//! Two things are deliberately absent. There is no clock, socket, thread or source of randomness in [`replica`] and
//! what it stands on, only a [`disk`] that can be simulated: the tests drive whole clusters through partitions and
//! power cuts in one thread, from a seed. And there is no lock between the threads of [`node`] where a message would
//! do: the applier publishes immutable versions of the keys, everything else has one owner.

pub mod fail_point;
pub mod codec;
pub mod random;
pub mod config;
pub mod membership;
pub mod membership_change;
pub mod command;
pub mod disk;
pub mod gentle_disk;
pub mod memory_disk;
pub mod raft_log;
pub mod store;
pub mod snapshot;
pub mod publication;
pub mod watch;
pub mod http;
pub mod message;
pub mod message_check;
pub mod raft_core;
pub mod data_dir;
pub mod peer_protocol;
pub mod metrics;
pub mod measured_disk;
pub mod acquaintances;
pub mod reconfiguration;
pub mod administration;
pub mod replica;
pub mod peer_sender;
pub mod peer_server;
pub mod byte_budget;
pub mod applier;
pub mod driver;
pub mod peer_network;
pub mod api;
pub mod node;

#[cfg(test)]
mod fixtures;
