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

use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use cluster::{Minority, Scenario, Tally};
use random::Random;

fn scenario(nodes: u64) -> Scenario {
    Scenario { nodes, clients: 5, chaos: Duration::from_secs(30), minority: Minority::Healed, spares: 0 }
}

const BROKEN_MINORITIES: [Minority; 5] =
    [Minority::AsItIs, Minority::Dead, Minority::Mute, Minority::Deaf, Minority::Bridged];

/// Runs scenarios with many seeds.
fn run(name: &str, count: u64, scenario: impl Fn(u64) -> Scenario + Sync) -> Tally {
    let sum = Mutex::new(Tally::default());
    seeds::each(name, count, |seed, trace| {
        let tally = cluster::run(&scenario(seed), seed, trace)?;
        sum.lock().unwrap_or_else(PoisonError::into_inner).add(&tally);
        Ok(())
    });
    let sum = sum.into_inner().unwrap_or_else(PoisonError::into_inner);
    println!("{name}: {sum:?}");
    sum
}

#[test]
fn three_nodes() {
    run("three_nodes", 60, |_| scenario(3));
}

#[test]
fn five_nodes() {
    run("five_nodes", 20, |_| scenario(5));
}

#[test]
fn one_node() {
    run("one_node", 30, |_| scenario(1));
}

#[test]
fn a_majority_that_is_healed_serves() {
    run("a_majority_that_is_healed_serves", 50, left_broken);
}

/// Each kind of a broken minority, of three nodes and of five.
fn left_broken(seed: u64) -> Scenario {
    let kinds = BROKEN_MINORITIES.len() as u64;
    let minority = BROKEN_MINORITIES[(seed % kinds) as usize];
    Scenario { minority, ..scenario(if (seed / kinds).is_multiple_of(2) { 3 } else { 5 }) }
}

fn changing() -> Scenario {
    Scenario { spares: 5, ..scenario(3) }
}

#[test]
fn changing_members() {
    run("changing_members", 60, |_| changing());
}

/// Any of the above: this is what is run with ever new seeds.
fn any(seed: u64) -> Scenario {
    let mut random = Random::new(seed);
    let scenario = match random.below(10) {
        0 => scenario(1),
        1..4 => scenario(3),
        4 => scenario(5),
        5..7 => left_broken(random.next()),
        _ => changing(),
    };
    // Most mistakes need little time, and some a long one.
    Scenario { chaos: Duration::from_secs(10 + random.below(21)), ..scenario }
}

#[test]
fn any_cluster() {
    let tally = run("any_cluster", 200, any);
    if !seeds::are_chosen() {
        // A schedule in which these do not come about tests less than it says.
        let happened = [
            ("starts_cut_short", tally.starts_cut_short),
            ("directories_lost", tally.directories_lost),
            ("disowned", tally.disowned),
            ("lost_members_replaced", tally.lost_members_replaced),
            ("deaths_of_full_disks", tally.deaths_of_full_disks),
            ("puts_refused_as_full", tally.puts_refused_as_full),
            ("snapshots_failed", tally.snapshots_failed),
            ("snapshots_installed", tally.snapshots_installed),
            ("transfers_done", tally.transfers_done),
            ("retired", tally.retired),
        ];
        let missing: Vec<_> = happened.iter().filter(|(_, count)| *count == 0).collect();
        assert!(missing.is_empty(), "these never happen: {missing:?}");
        assert!(tally.beyond_repair < 10, "too many runs end without a majority: {tally:?}");
    }
}

#[test]
fn a_seed_makes_a_run() {
    for seed in 0..10 {
        seeds::repeat(seed, |seed, trace| cluster::run(&any(seed), seed, trace).map(drop));
    }
}
