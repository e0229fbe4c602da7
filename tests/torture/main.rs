//! Torture of real processes: clients that use the whole API, while nodes are killed, paused, cut off, starved and
//! replaced; and a judgement of all that clients were told.
//!
//! A run follows from its seed, as far as a run of processes can: which faults and operations come, and with which
//! pauses, but not how long the machine takes over them. See [`settings`] for the environment variables; without any,
//! `cargo test` runs it for a few seconds on loopback addresses.

#![allow(missing_docs, unreachable_pub, reason = "a test has no users")]
#![allow(clippy::unwrap_used, reason = "all of this is a test")]
#![allow(clippy::print_stdout, reason = "a run says what it does")]
#![allow(dead_code, reason = "other tests use the rest of what is shared with them")]

#[path = "../integration/client.rs"]
mod client;
#[path = "../integration/support.rs"]
mod support;
#[path = "../integration/small_disk.rs"]
mod small_disk;
#[path = "../simulation/random.rs"]
mod random;
#[path = "../simulation/linearizability.rs"]
mod linearizability;
#[path = "../simulation/register.rs"]
mod register;

/// What a run is asked for.
mod settings;
/// Namespaces around it.
mod sandbox;
/// Connections that are late, held and cut.
mod proxy;
/// The network, and how it is cut.
mod network;
/// The processes.
mod members;
/// What clients did and were told.
mod history;
/// Those who do it.
mod clients;
/// Those who watch.
mod followers;
/// What is done to the nodes.
mod chaos;
/// Changes of the members, and what else an operator does.
mod operator;
/// What a node takes of its machine.
mod resources;
/// What is right and what is not.
mod audit;
/// A picture of it.
mod timeline;
/// A page about it.
mod report;
/// From the first node to the last check.
mod run;

use settings::{Kind, Settings};

#[test]
fn torture() {
    let settings = Settings::from_environment();
    let mut facts = Vec::new();
    let network = match settings.network {
        Some(Kind::Loopback) => Kind::Loopback,
        wanted if sandbox::is_inside() => wanted.unwrap_or(Kind::Namespaces),
        wanted => {
            let problem = sandbox::enter();
            assert_eq!(wanted, None, "namespaces can't be had here: {problem}");
            facts.push(format!("on loopback addresses, since namespaces can't be had here: {problem}"));
            Kind::Loopback
        }
    };
    run::torture(&settings, network, facts);
}
