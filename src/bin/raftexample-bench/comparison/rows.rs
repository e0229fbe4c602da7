//! The rows: what is compared with what, by which figures, and what is hoped for.

use super::figure::{Figure, Goal};
use super::kills::{ELECTION_TIMEOUT_MS, kill_leader};
use super::snapshots;
use super::systems::{Load, MANY_VALUE_BYTES, Place, Scale, System, Systems};
use crate::lab::disk::{dd_bytes_per_second, sync_median_us};
use crate::options::{Api, Workload};
use crate::report::Point;
use crate::request::KEY_BYTES;

/// Of the row about large values.
const LARGE_VALUE_BYTES: usize = 20_000;

/// What is few in the row about many keys.
const FEW_KEYS: u64 = 1000;

/// Writers of the row about one sync, and copies of what is written: one for each node.
const NODES: usize = 3;

/// One comparison.
pub(crate) struct Row {
    /// What it is called on the command line.
    pub(crate) name: &'static str,
    pub(crate) ours: &'static str,
    pub(crate) theirs: &'static str,
    pub(crate) figures: &'static [Figure],
    /// What has to run meanwhile. All of it runs while either side is measured, so that it costs both the same.
    pub(crate) systems: &'static [System],
    pub(crate) rounds: Rounds,
    pub(crate) measure: Measure,
}

/// How a round is measured. A reading has a value for each figure.
#[derive(Clone, Copy)]
pub(crate) enum Measure {
    /// One side at a time. Who begins alternates.
    InTurn(fn(&mut Systems, Side) -> Result<Reading, String>),
    /// Ours and theirs, where one depends on the other.
    Together(fn(&mut Systems) -> Result<[Reading; 2], String>),
}

/// How often both sides are measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Rounds {
    /// As the scale says.
    Usual,
    /// As many as leaders are killed.
    Kills,
    /// What does not vary.
    Once,
}

impl Rounds {
    pub(crate) fn count(self, scale: &Scale) -> usize {
        match self {
            Self::Usual => scale.rounds,
            Self::Kills => scale.kills,
            Self::Once => 1,
        }
    }
}

/// Whose turn it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Side {
    Ours,
    Theirs,
}

/// What one measurement of one side came to.
#[derive(Clone, Debug)]
pub(crate) struct Reading {
    /// In the order of the row's figures, in their units.
    pub(crate) values: Vec<f64>,
    /// All of the load, if it was one.
    pub(crate) load: Option<Point>,
    /// What spoils it.
    pub(crate) notes: Vec<String>,
}

impl Reading {
    /// Values of something that is no load.
    pub(crate) fn of(values: impl Into<Vec<f64>>) -> Self {
        Self { values: values.into(), load: None, notes: Vec::new() }
    }

    /// Rate, p50 and p99 of a load.
    pub(crate) fn of_load(point: Point) -> Self {
        let latency = &point.latency;
        let values = vec![point.requests_per_second, latency.p50_us / 1e3, latency.p99_us / 1e3];
        Self::with_load(values, point)
    }

    /// Values that follow from a load.
    pub(crate) fn with_load(values: Vec<f64>, point: Point) -> Self {
        let mut notes = Vec::new();
        if point.failed + point.unknown > 0 {
            let kinds: Vec<_> = point.failures.iter().map(|(kind, count)| format!("{kind}: {count}")).collect();
            notes.push(kinds.join(", "));
        }
        if point.generator_is_busy() {
            notes.push("the generator was busy nearly all the time".to_owned());
        }
        Self { values, load: Some(point), notes }
    }
}

/// Rate, p50 and p99, as [`Reading::of_load`] has them.
const fn load_figures(rate: Option<Goal>, p50: Option<Goal>, p99: Option<Goal>) -> [Figure; 3] {
    [
        Figure { name: "rate", unit: "/s", goal: rate },
        Figure { name: "p50", unit: "ms", goal: p50 },
        Figure { name: "p99", unit: "ms", goal: p99 },
    ]
}

const fn figure(name: &'static str, unit: &'static str, goal: Option<Goal>) -> Figure {
    Figure { name, unit, goal }
}

/// Measures the same load on two systems.
fn both(systems: &mut Systems, side: Side, ours: Load, theirs: Load) -> Result<Reading, String> {
    let load = if side == Side::Ours { ours } else { theirs };
    systems.measure(&load).map(Reading::of_load)
}

fn put(system: System, connections: usize) -> Load {
    Load::new(system, Workload::Put, connections)
}

fn get(system: System, connections: usize) -> Load {
    Load::new(system, Workload::Get, connections)
}

fn stale_get(system: System, connections: usize) -> Load {
    Load::new(system, Workload::StaleGet, connections)
}

/// etcd, spoken to in its version 3.
fn in_v3(load: Load) -> Load {
    Load { api: Some(Api::EtcdV3Json), ..load }
}

/// All rows, those that share clusters beside each other.
pub(crate) const ROWS: &[Row] = &[
    Row {
        name: "put-1",
        ours: "PUT, 1 connection",
        theirs: "etcd v2 HTTP",
        figures: &load_figures(Some(Goal::AtLeast(2.2)), Some(Goal::AtMost(0.45)), None),
        systems: &[System::Three, System::Etcd],
        rounds: Rounds::Usual,
        measure: Measure::InTurn(|systems, side| both(systems, side, put(System::Three, 1), put(System::Etcd, 1))),
    },
    Row {
        name: "put-64",
        ours: "PUT, 64 connections",
        theirs: "etcd v2 HTTP",
        figures: &load_figures(Some(Goal::AtLeast(4.0)), None, Some(Goal::AtMost(0.2))),
        systems: &[System::Three, System::Etcd],
        rounds: Rounds::Usual,
        measure: Measure::InTurn(|systems, side| both(systems, side, put(System::Three, 64), put(System::Etcd, 64))),
    },
    Row {
        name: "put-256",
        ours: "PUT, 256 connections",
        theirs: "etcd v2 HTTP",
        figures: &load_figures(Some(Goal::AtLeast(3.0)), None, Some(Goal::AtMost(0.25))),
        systems: &[System::Three, System::Etcd],
        rounds: Rounds::Usual,
        measure: Measure::InTurn(|systems, side| both(systems, side, put(System::Three, 256), put(System::Etcd, 256))),
    },
    Row {
        name: "get-64",
        ours: "linearizable GET, 64 connections",
        theirs: "etcd v2 HTTP, quorum GET",
        figures: &load_figures(Some(Goal::AtLeast(5.0)), None, None),
        systems: &[System::Three, System::Etcd],
        rounds: Rounds::Usual,
        measure: Measure::InTurn(|systems, side| both(systems, side, get(System::Three, 64), get(System::Etcd, 64))),
    },
    Row {
        name: "put-1-v3",
        ours: "PUT, 1 connection",
        theirs: "etcd v3 JSON",
        figures: &load_figures(None, None, None),
        systems: &[System::Three, System::Etcd],
        rounds: Rounds::Usual,
        measure: Measure::InTurn(|systems, side| {
            both(systems, side, put(System::Three, 1), in_v3(put(System::Etcd, 1)))
        }),
    },
    Row {
        name: "put-64-v3",
        ours: "PUT, 64 connections",
        theirs: "etcd v3 JSON",
        figures: &load_figures(None, None, None),
        systems: &[System::Three, System::Etcd],
        rounds: Rounds::Usual,
        measure: Measure::InTurn(|systems, side| {
            both(systems, side, put(System::Three, 64), in_v3(put(System::Etcd, 64)))
        }),
    },
    Row {
        name: "get-64-v3",
        ours: "linearizable GET, 64 connections",
        theirs: "etcd v3 JSON, linearizable range",
        figures: &load_figures(None, None, None),
        systems: &[System::Three, System::Etcd],
        rounds: Rounds::Usual,
        measure: Measure::InTurn(|systems, side| {
            both(systems, side, get(System::Three, 64), in_v3(get(System::Etcd, 64)))
        }),
    },
    Row {
        name: "get-go",
        ours: "linearizable GET, 64 connections",
        theirs: "Go raftexample, stale GET",
        figures: &load_figures(Some(Goal::AtLeast(0.6)), None, None),
        systems: &[System::Three, System::GoRaftexample],
        rounds: Rounds::Usual,
        measure: Measure::InTurn(|systems, side| {
            both(systems, side, get(System::Three, 64), get(System::GoRaftexample, 64))
        }),
    },
    Row {
        name: "put-follower",
        ours: "PUT, 64 connections, through a follower",
        theirs: "our own leader",
        figures: &load_figures(Some(Goal::AtLeast(0.85)), None, None),
        systems: &[System::Three],
        rounds: Rounds::Usual,
        measure: Measure::InTurn(|systems, side| {
            let leader = put(System::Three, 64);
            both(systems, side, Load { place: Place::Follower, ..leader.clone() }, leader)
        }),
    },
    Row {
        name: "stale-get",
        ours: "stale GET, 64 connections",
        theirs: "the same HTTP loop, echoing the same bytes",
        figures: &load_figures(Some(Goal::AtLeast(0.9)), None, None),
        systems: &[System::Three, System::Echo],
        rounds: Rounds::Usual,
        measure: Measure::InTurn(|systems, side| {
            both(systems, side, stale_get(System::Three, 64), stale_get(System::Echo, 64))
        }),
    },
    Row {
        name: "put-sync",
        ours: "PUT, 1 connection",
        theirs: "one fdatasync of the same bytes, three writers at once",
        figures: &[figure("p50", "ms", Some(Goal::AtMost(1.7)))],
        systems: &[System::Three],
        rounds: Rounds::Usual,
        measure: Measure::InTurn(put_by_sync),
    },
    Row {
        name: "leader-kill",
        ours: "leader killed under load, to the answer of a write in flight and of the next one",
        theirs: "election timeout",
        figures: &[
            figure("in flight", "ms", Some(Goal::Within(1.5, 2.5))),
            figure("next", "ms", Some(Goal::Within(1.5, 2.5))),
        ],
        systems: &[System::Three],
        rounds: Rounds::Kills,
        measure: Measure::InTurn(|systems, side| match side {
            Side::Ours => kill_leader(systems),
            Side::Theirs => Ok(Reading::of([ELECTION_TIMEOUT_MS; 2])),
        }),
    },
    Row {
        name: "five-nodes",
        ours: "PUT, 64 connections, five nodes",
        theirs: "three nodes",
        figures: &load_figures(Some(Goal::AtLeast(0.6)), None, None),
        systems: &[System::Three, System::Five],
        rounds: Rounds::Usual,
        measure: Measure::InTurn(|systems, side| both(systems, side, put(System::Five, 64), put(System::Three, 64))),
    },
    Row {
        name: "put-20k",
        ours: "PUT of 20 KB values, 64 connections",
        theirs: "a third of dd conv=fdatasync",
        figures: &[figure("bytes", "MB/s", Some(Goal::AtLeast(0.5)))],
        systems: &[System::LargeValues],
        rounds: Rounds::Usual,
        measure: Measure::InTurn(put_by_dd),
    },
    Row {
        name: "memory",
        ours: "resident memory of the largest node, many keys of 100 bytes",
        theirs: "key and value bytes",
        figures: &[figure("memory", "MB", Some(Goal::AtMost(3.0)))],
        systems: &[System::ManyKeys],
        rounds: Rounds::Once,
        measure: Measure::InTurn(memory),
    },
    Row {
        name: "put-many-keys",
        ours: "PUT, 64 connections, many keys",
        theirs: "1000 keys",
        figures: &load_figures(Some(Goal::AtLeast(0.9)), None, None),
        systems: &[System::ManyKeys, System::FewKeys],
        rounds: Rounds::Usual,
        measure: Measure::InTurn(|systems, side| {
            let many = Load { keys: systems.scale.many_keys, ..put(System::ManyKeys, 64) };
            both(systems, side, many, Load { keys: FEW_KEYS, ..put(System::FewKeys, 64) })
        }),
    },
    Row {
        name: "snapshot-put",
        ours: "PUT, 64 connections, many keys, while all nodes write snapshots",
        theirs: "otherwise",
        figures: &load_figures(None, None, Some(Goal::AtMost(2.0))),
        systems: &[System::Snapshots],
        rounds: Rounds::Usual,
        measure: Measure::Together(snapshots::put),
    },
    Row {
        name: "snapshot-write",
        ours: "writing a snapshot of many keys",
        theirs: "dd conv=fdatasync of as many bytes",
        figures: &[figure("bytes", "MB/s", None)],
        systems: &[System::Snapshots],
        rounds: Rounds::Usual,
        measure: Measure::InTurn(snapshots::write),
    },
    Row {
        name: "snapshot-memory",
        ours: "most resident memory of the leader while all nodes write a snapshot of many keys",
        theirs: "idle before",
        figures: &[
            figure("at rest", "MB", Some(Goal::AtMost(1.3))),
            figure("under load", "MB", Some(Goal::AtMost(1.3))),
        ],
        // It starts its own.
        systems: &[],
        rounds: Rounds::Usual,
        measure: Measure::Together(snapshots::memory),
    },
    Row {
        name: "snapshot-load",
        ours: "starting with a snapshot of many keys, from kill -9 to serving",
        theirs: "dd conv=fdatasync of as many bytes",
        figures: &[figure("bytes", "MB/s", None)],
        systems: &[System::InSnapshot],
        rounds: Rounds::Usual,
        measure: Measure::InTurn(snapshots::load),
    },
    Row {
        name: "restart",
        ours: "starting with a snapshot of many keys",
        theirs: "replaying the same writes from the log",
        figures: &[figure("time", "ms", None)],
        systems: &[System::InSnapshot, System::InLog],
        rounds: Rounds::Usual,
        measure: Measure::InTurn(snapshots::restart),
    },
];

fn put_by_sync(systems: &mut Systems, side: Side) -> Result<Reading, String> {
    match side {
        Side::Ours => {
            let point = systems.measure(&put(System::Three, 1))?;
            Ok(Reading::with_load(vec![point.latency.p50_us / 1e3], point))
        }
        Side::Theirs => {
            let bench = &systems.bench;
            let median_us = sync_median_us(&bench.own_binary, bench.path(), NODES, systems.scale.duration)?;
            Ok(Reading::of([median_us / 1e3]))
        }
    }
}

fn put_by_dd(systems: &mut Systems, side: Side) -> Result<Reading, String> {
    match side {
        Side::Ours => {
            let point = systems.measure(&Load { value_bytes: LARGE_VALUE_BYTES, ..put(System::LargeValues, 64) })?;
            Ok(Reading::with_load(vec![point.requests_per_second * LARGE_VALUE_BYTES as f64 / 1e6], point))
        }
        Side::Theirs => {
            let bytes_per_second = dd_bytes_per_second(systems.bench.path(), systems.scale.dd_bytes)?;
            Ok(Reading::of([bytes_per_second / 1e6 / NODES as f64]))
        }
    }
}

fn memory(systems: &mut Systems, side: Side) -> Result<Reading, String> {
    let bytes = match side {
        Side::Ours => {
            let cluster = systems.cluster(System::ManyKeys)?;
            let resident = (0..cluster.size()).map(|index| cluster.resident_bytes(index));
            resident.collect::<Result<Vec<_>, _>>()?.into_iter().max().unwrap_or(0)
        }
        Side::Theirs => systems.scale.many_keys * (KEY_BYTES + MANY_VALUE_BYTES) as u64,
    };
    Ok(Reading::of([bytes as f64 / 1e6]))
}
