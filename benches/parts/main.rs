//! The parts of a node, each alone, with the sizes that a cluster under load gives them. What a cluster does is not their
//! sum: there they wait for each other and share the processors. These tell what a change of one of them costs or saves.

#![allow(clippy::unwrap_used, reason = "all of this is a measurement, and ends with the first failure")]

/// Requests and entries as a load makes them.
mod load;
/// The log: append, read back, open.
mod raft_log;
/// Frames between nodes.
mod peer;
/// A PUT in the state machine.
mod apply;
/// Request heads.
mod http;
/// A read round among three cores.
mod read_index;

use std::time::Duration;

use criterion::{Criterion, criterion_group, criterion_main};

/// Short: all of them together in less than a minute. What varies more than ten percent from run to run is the disk's.
fn short() -> Criterion {
    Criterion::default()
        .warm_up_time(Duration::from_millis(300))
        .measurement_time(Duration::from_secs(1))
        .sample_size(20)
        .without_plots()
}

criterion_group! {
    name = parts;
    config = short();
    targets = raft_log::all, peer::all, apply::all, http::all, read_index::all
}
criterion_main!(parts);
