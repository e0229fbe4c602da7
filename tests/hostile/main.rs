//! Clients and peers that no decent program would be, against nodes of their own: whatever they do, the node goes on,
//! serves who comes next, and keeps nothing of it. How a connection is served in detail is tested in `http_server`,
//! what may reach Raft in `message_check`.

#![allow(clippy::unwrap_used, reason = "all of this is a test")]
#![allow(clippy::print_stdout, reason = "cargo shows it for a test that fails")]
#![allow(dead_code, reason = "other tests use the rest of what is shared with them")]

#[path = "../integration/client.rs"]
mod client;
#[path = "../integration/exposition.rs"]
mod exposition;
#[path = "../integration/support.rs"]
mod support;

/// Requests that are wrong, doubtful or none, and what each gets.
mod corpus;
/// The key-value port.
mod clients;
/// The peer port.
mod peers;
/// A connection that sends anything and ends in any way.
mod wire;
/// What a process holds.
mod usage;
