//! A key-value store with a REST API, replicated by Raft on plain threads and channels.

pub mod fail_point;
pub mod codec;
pub mod random;
pub mod membership;
pub mod membership_change;
pub mod command;
pub mod disk;
pub mod memory_disk;
pub mod raft_log;
pub mod store;
pub mod snapshot;
pub mod watch;
pub mod message;
pub mod message_check;
pub mod raft_core;
pub mod data_dir;
pub mod peer_protocol;
pub mod acquaintances;
pub mod reconfiguration;
pub mod administration;
pub mod replica;
pub mod http;
