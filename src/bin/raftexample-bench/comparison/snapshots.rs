//! What snapshots cost, and what they save.

use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::{Builder, scope};
use std::time::{Duration, Instant};

use super::rows::{Reading, Side};
use super::systems::{Load, MANY_VALUE_BYTES, System, Systems};
use crate::lab::cluster::write_snapshot;
use crate::lab::disk::dd_bytes_per_second;
use crate::lab::usage::resident_bytes;
use crate::options::Workload;

/// How often to look at a node's memory.
const SAMPLE_INTERVAL: Duration = Duration::from_millis(5);

/// Writes to all keys, over 64 connections.
fn writes(systems: &Systems) -> Load {
    Load {
        keys: systems.scale.many_keys,
        value_bytes: MANY_VALUE_BYTES,
        ..Load::new(System::Snapshots, Workload::Put, 64)
    }
}

/// Our side writes snapshots on all nodes, one after the other without a pause, theirs none.
pub(crate) fn put(systems: &mut Systems, side: Side) -> Result<Reading, String> {
    let load = writes(systems);
    if side == Side::Theirs {
        return systems.measure(&load).map(Reading::of_load);
    }
    let cluster = systems.cluster(System::Snapshots)?;
    let addresses: Vec<SocketAddr> = (0..cluster.size()).map(|index| cluster.address(index)).collect();
    let (point, snapshots) = while_snapshots_are_written(&addresses, || systems.measure(&load))?;
    let mut reading = Reading::of_load(point);
    if snapshots == 0 {
        reading.notes.push("no snapshot was finished meanwhile".to_owned());
    }
    Ok(reading)
}

/// Does `work` while each node writes one snapshot after the other; returns how many were finished meanwhile.
fn while_snapshots_are_written<T>(
    addresses: &[SocketAddr],
    work: impl FnOnce() -> Result<T, String>,
) -> Result<(T, u64), String> {
    let stop = AtomicBool::new(false);
    let finished = AtomicU64::new(0);
    scope(|scope| {
        let mut writers = Vec::new();
        for address in addresses {
            let body = || {
                while !stop.load(Ordering::Relaxed) {
                    write_snapshot(*address)?;
                    finished.fetch_add(1, Ordering::Relaxed);
                }
                Ok::<_, String>(())
            };
            let writer = Builder::new().name("snapshots".to_owned()).spawn_scoped(scope, body);
            writers.push(writer.map_err(|error| format!("failed to start a thread: {error}"))?);
        }
        let outcome = work();
        let count = finished.load(Ordering::Relaxed);
        stop.store(true, Ordering::Relaxed);
        for writer in writers {
            writer.join().map_err(|_| "a thread panicked".to_owned())??;
        }
        Ok((outcome?, count))
    })
}

/// Of a node alone: what it has idle, and the most it has while it writes a snapshot, without a load and with one.
///
/// Either side begins with a restart and the same writes: what a process once had it may keep, so one that has written
/// a snapshot does not tell what it would have without.
pub(crate) fn memory(systems: &mut Systems, side: Side) -> Result<Reading, String> {
    restart_time(systems, System::InSnapshot)?;
    systems.cluster(System::InSnapshot)?.wait_ready(0)?;
    let load = Load { system: System::InSnapshot, ..writes(systems) };
    systems.measure(&load)?;
    let cluster = systems.cluster(System::InSnapshot)?;
    let (pid, address) = (cluster.pid(0)?, cluster.address(0));
    if side == Side::Theirs {
        let bytes = resident_bytes(pid)? as f64 / 1e6;
        return Ok(Reading::of([bytes, bytes]));
    }
    let at_rest = most_memory_while(pid, || write_snapshot(address).map(|_| ()))?;
    let under_load =
        most_memory_while(pid, || while_snapshots_are_written(&[address], || systems.measure(&load)).map(|_| ()))?;
    Ok(Reading::of([at_rest as f64 / 1e6, under_load as f64 / 1e6]))
}

fn most_memory_while(pid: u32, work: impl FnOnce() -> Result<(), String>) -> Result<u64, String> {
    let stop = AtomicBool::new(false);
    scope(|scope| {
        let body = || {
            let mut most = resident_bytes(pid)?;
            while !stop.load(Ordering::Relaxed) {
                std::thread::sleep(SAMPLE_INTERVAL);
                most = most.max(resident_bytes(pid)?);
            }
            Ok::<_, String>(most)
        };
        let sampler = Builder::new().name("sampler".to_owned()).spawn_scoped(scope, body);
        let outcome = work();
        stop.store(true, Ordering::Relaxed);
        let sampler = sampler.map_err(|error| format!("failed to start a thread: {error}"))?;
        let most = sampler.join().map_err(|_| "a thread panicked".to_owned())??;
        outcome.map(|()| most)
    })
}

/// MB/s of one node that writes a snapshot while the others rest.
pub(crate) fn write(systems: &mut Systems, side: Side) -> Result<Reading, String> {
    let cluster = systems.cluster(System::Snapshots)?;
    let start = Instant::now();
    let bytes = cluster.snapshot(0)?;
    let ours = bytes as f64 / start.elapsed().as_secs_f64();
    match side {
        Side::Ours => Ok(Reading::of([ours / 1e6])),
        Side::Theirs => Ok(Reading::of([dd_bytes_per_second(systems.bench.path(), bytes)? / 1e6])),
    }
}

/// MB/s of a snapshot that is read at a start, all of which counts.
pub(crate) fn load(systems: &mut Systems, side: Side) -> Result<Reading, String> {
    let bytes = systems.cluster(System::InSnapshot)?.snapshot(0)?;
    let bytes_per_second = match side {
        Side::Ours => bytes as f64 / restart_time(systems, System::InSnapshot)?.as_secs_f64(),
        Side::Theirs => dd_bytes_per_second(systems.bench.path(), bytes)?,
    };
    Ok(Reading::of([bytes_per_second / 1e6]))
}

/// Milliseconds from the start of the killed node until it serves with all that it had.
pub(crate) fn restart(systems: &mut Systems, side: Side) -> Result<Reading, String> {
    let system = if side == Side::Ours { System::InSnapshot } else { System::InLog };
    Ok(Reading::of([restart_time(systems, system)?.as_secs_f64() * 1e3]))
}

fn restart_time(systems: &mut Systems, system: System) -> Result<Duration, String> {
    let keys = systems.scale.many_keys;
    let cluster = systems.cluster(system)?;
    cluster.kill(0);
    let start = Instant::now();
    cluster.spawn(0)?;
    cluster.wait_for_node(0, "to apply what it had", |cluster| cluster.status_number(0, "keys") >= keys)?;
    Ok(start.elapsed())
}
