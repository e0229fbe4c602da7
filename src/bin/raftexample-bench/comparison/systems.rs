//! What the rows compare: clusters, started when a row needs them and ended when it does not.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Duration;

use crate::lab::Bench;
use crate::lab::cluster::{Cluster, Launch, Program};
use crate::options::{Api, Options, TargetChoice, Workload};
use crate::report::Point;
use crate::run::measure;

/// No snapshot comes by itself within a measurement.
const NO_SNAPSHOTS: &[&str] = &["--snapshot-count", "1000000000"];

/// Behind a snapshot, nothing is left to replay.
const NO_CATCHUP: &[&str] = &["--snapshot-catchup-entries", "0"];

/// For nodes that start again and again: alone in its cluster, each waits for its own election before it serves.
const QUICK_ELECTIONS: &[&str] = &["--heartbeat-interval", "10ms", "--election-timeout", "50ms"];

/// Of the values that keys are filled with in the rows about many keys.
pub(crate) const MANY_VALUE_BYTES: usize = 100;

/// Of the values that keys are filled with before a row that reads.
const VALUE_BYTES: usize = 128;

/// Clusters that rows are measured on. Rows that name the same one share it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum System {
    /// Three nodes of ours with default flags, and so are the others unless they say otherwise.
    Three,
    Five,
    /// Three nodes, with many keys.
    ManyKeys,
    /// Three nodes, with few keys.
    FewKeys,
    /// Three nodes, with large values.
    LargeValues,
    /// Three nodes, with many keys, that write snapshots only when they are told to.
    Snapshots,
    /// One node, whose many keys all stand in its log.
    InLog,
    /// One node, with the same keys in a snapshot.
    InSnapshot,
    Etcd,
    GoRaftexample,
    Echo,
}

/// How much is measured.
#[derive(Clone, Debug)]
pub(crate) struct Scale {
    /// Of the rows that say nothing else.
    pub(crate) rounds: usize,
    /// Of the row that kills leaders.
    pub(crate) kills: usize,
    pub(crate) warm_up: Duration,
    pub(crate) duration: Duration,
    /// What is many.
    pub(crate) many_keys: u64,
    /// What `dd` writes at a time.
    pub(crate) dd_bytes: u64,
}

/// Programs of others. None: not there.
#[derive(Clone, Debug)]
pub(crate) struct Peers {
    pub(crate) etcd: Option<PathBuf>,
    pub(crate) go_raftexample: Option<PathBuf>,
}

/// The clusters that run, and how to start others.
pub(crate) struct Systems {
    pub(crate) bench: Bench,
    pub(crate) scale: Scale,
    peers: Peers,
    running: BTreeMap<System, Cluster>,
}

/// A load on one of the systems. All else is as the scale says.
#[derive(Clone, Debug)]
pub(crate) struct Load {
    pub(crate) system: System,
    pub(crate) workload: Workload,
    pub(crate) connections: usize,
    pub(crate) place: Place,
    /// None: the one of the system.
    pub(crate) api: Option<Api>,
    pub(crate) keys: u64,
    pub(crate) value_bytes: usize,
}

/// Where a load goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Place {
    Leader,
    /// One of them.
    Follower,
    /// The first node, whatever it is: of programs that do not say who leads.
    First,
}

impl Load {
    /// On the leader, 128 bytes, 10,000 keys.
    pub(crate) fn new(system: System, workload: Workload, connections: usize) -> Self {
        let place = match system {
            System::GoRaftexample | System::Echo => Place::First,
            _ => Place::Leader,
        };
        Self { system, workload, connections, place, api: None, keys: 10_000, value_bytes: VALUE_BYTES }
    }
}

impl Systems {
    pub(crate) fn new(bench: Bench, scale: Scale, peers: Peers) -> Self {
        Self { bench, scale, peers, running: BTreeMap::new() }
    }

    /// Why a system cannot be had; None: it can.
    pub(crate) fn refusal(&self, system: System) -> Option<&'static str> {
        match system {
            System::Etcd if self.peers.etcd.is_none() => {
                Some("there is no etcd: install Debian's package etcd-server, or name one with --etcd")
            }
            System::GoRaftexample if self.peers.go_raftexample.is_none() => Some(
                "there is no Go raftexample: build it from Debian's golang-etcd-server-dev, or name one with --go-raftexample",
            ),
            _ => None,
        }
    }

    /// Ends all systems but these, and starts those of them that do not run.
    ///
    /// # Errors
    /// One line.
    pub(crate) fn hold(&mut self, systems: &[System]) -> Result<(), String> {
        self.running.retain(|system, _| systems.contains(system));
        for system in systems {
            if !self.running.contains_key(system) {
                let cluster = self.start(*system)?;
                self.running.insert(*system, cluster);
            }
        }
        Ok(())
    }

    /// One that is held.
    ///
    /// # Errors
    /// One line, when it is not.
    pub(crate) fn cluster(&mut self, system: System) -> Result<&mut Cluster, String> {
        self.running.get_mut(&system).ok_or_else(|| format!("{system:?} does not run"))
    }

    fn start(&self, system: System) -> Result<Cluster, String> {
        let launch = self.launch(system)?;
        let mut cluster = Cluster::start(launch, &self.bench.path().join(format!("{system:?}").to_lowercase()))?;
        match system {
            System::ManyKeys | System::Snapshots | System::InLog | System::InSnapshot => {
                cluster.fill(Api::Raftexample, self.scale.many_keys, MANY_VALUE_BYTES)?;
            }
            _ => {}
        }
        if system == System::InSnapshot {
            cluster.snapshot(0)?;
        }
        Ok(cluster)
    }

    fn launch(&self, system: System) -> Result<Launch, String> {
        let ours = |nodes, flags: &[&[&str]]| Ok(self.bench.raftexample(nodes, &flags.concat()));
        let other = |program, path: Option<&PathBuf>, nodes| match path {
            Some(path) => Ok(Launch { program, path: path.clone(), flags: Vec::new(), nodes }),
            None => Err(self.refusal(system).unwrap_or("a program is missing").to_owned()),
        };
        match system {
            System::Three | System::ManyKeys | System::FewKeys | System::LargeValues => ours(3, &[]),
            System::Five => ours(5, &[]),
            System::Snapshots => ours(3, &[NO_SNAPSHOTS]),
            System::InLog | System::InSnapshot => ours(1, &[NO_SNAPSHOTS, NO_CATCHUP, QUICK_ELECTIONS]),
            System::Etcd => other(Program::Etcd, self.peers.etcd.as_ref(), 3),
            System::GoRaftexample => other(Program::GoRaftexample, self.peers.go_raftexample.as_ref(), 3),
            System::Echo => other(Program::Echo, Some(&self.bench.own_binary), 1),
        }
    }

    /// What the options of a load are.
    ///
    /// # Errors
    /// One line, when the system does not run or nobody leads it.
    pub(crate) fn options(&mut self, load: &Load) -> Result<Options, String> {
        let (warm_up, duration) = (self.scale.warm_up, self.scale.duration);
        let cluster = self.cluster(load.system)?;
        let target = match load.place {
            Place::Leader => TargetChoice::Leader,
            Place::First => TargetChoice::One(cluster.url(0)),
            Place::Follower => {
                let follower = *cluster.followers()?.first().ok_or("there is no follower")?;
                TargetChoice::One(cluster.url(follower))
            }
        };
        Ok(Options {
            target,
            workload: load.workload,
            keys: load.keys,
            value_bytes: load.value_bytes,
            warm_up,
            duration,
            ..Options::closed_loop(cluster.urls(), load.api.unwrap_or(cluster.api()))
        })
    }

    /// Measures a load; fills the keys before if it reads.
    ///
    /// # Errors
    /// One line; also when no request succeeded.
    pub(crate) fn measure(&mut self, load: &Load) -> Result<Point, String> {
        let options = self.options(load)?;
        if load.workload != Workload::Put {
            self.cluster(load.system)?.fill(options.api, load.keys, load.value_bytes)?;
        }
        measure(&options, load.connections, None).and_then(answered)
    }
}

/// A point of which there is something to compare.
///
/// # Errors
/// One line, when no request succeeded.
pub(crate) fn answered(point: Point) -> Result<Point, String> {
    if point.latency.count == 0 {
        return Err(format!("no request succeeded: {:?}", point.failures));
    }
    Ok(point)
}
