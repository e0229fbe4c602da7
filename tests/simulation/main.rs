//! Whole clusters in one thread, from a seed: real nodes on a simulated network, disk and clock.
//!
//! Nothing in a run depends on anything but its seed, so a run that fails can be looked at again and again. See
//! [`seeds`] for the environment variables.

#![allow(missing_docs, unreachable_pub, reason = "a test has no users")]
#![allow(clippy::print_stdout, reason = "a run that is looked at prints what happens")]
#![allow(clippy::result_large_err, reason = "the library's errors are passed on as they are")]

mod random;
mod events;
mod network;
mod trace;
mod linearizability;
mod register;
mod invariants;
mod seeds;
mod node;
mod clients;
mod cluster;

use std::cell::RefCell;
use std::time::Duration;

use cluster::{Scenario, Tally};

fn scenario(nodes: u64) -> Scenario {
    Scenario { nodes, clients: 5, chaos: Duration::from_secs(30), leaves_minority_broken: false, spares: 0 }
}

/// Runs a scenario with many seeds.
fn run(name: &str, count: u64, scenario: &Scenario) -> Tally {
    let sum = RefCell::new(Tally::default());
    seeds::each(name, count, |seed, trace| {
        let tally = cluster::run(scenario, seed, trace)?;
        sum.borrow_mut().add(&tally);
        Ok(())
    });
    println!("{name}: {:?}", sum.borrow());
    sum.into_inner()
}

#[test]
fn three_nodes() {
    run("three_nodes", 120, &scenario(3));
}

#[test]
fn five_nodes() {
    run("five_nodes", 30, &scenario(5));
}

#[test]
fn one_node() {
    run("one_node", 100, &scenario(1));
}

#[test]
fn a_majority_that_is_healed_serves() {
    let scenario = Scenario { leaves_minority_broken: true, ..scenario(5) };
    run("a_majority_that_is_healed_serves", 30, &scenario);
}

#[test]
fn changing_members() {
    let scenario = Scenario { spares: 5, ..scenario(3) };
    run("changing_members", 80, &scenario);
}

#[test]
fn a_seed_makes_a_run() {
    for seed in 0..3 {
        let scenario = Scenario { spares: 5, ..scenario(3) };
        seeds::repeat(seed, |seed, trace| cluster::run(&scenario, seed, trace).map(drop));
    }
}
