//! What snapshots cost, and what they save.

use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{Builder, scope};
use std::time::{Duration, Instant};

use super::rows::{Reading, Side};
use super::systems::{Load, MANY_VALUE_BYTES, System, Systems, answered};
use crate::lab::disk::dd_bytes_per_second;
use crate::lab::usage::resident_bytes;
use crate::options::{Options, Workload};
use crate::run::{measure, measure_while};

/// How often to look at a node's memory.
const SAMPLE_INTERVAL: Duration = Duration::from_millis(5);

/// A node is idle when its memory has stayed the same, to a hundredth, for so long.
const IDLE_TIME: Duration = Duration::from_secs(1);

/// How long it may take to become idle.
const IDLE_TIMEOUT: Duration = Duration::from_secs(60);

/// Writes to all keys, over 64 connections.
fn writes(systems: &Systems) -> Load {
    Load {
        keys: systems.scale.many_keys,
        value_bytes: MANY_VALUE_BYTES,
        ..Load::new(System::Snapshots, Workload::Put, 64)
    }
}

/// Writes while all nodes write snapshots, and then without for just as long. Only what starts while a snapshot is being
/// written counts for the first: from the order to write one, given to all nodes at once, until the last node has it on
/// disk and has given up the log before it; if that was quick, over and over for the time of a measurement.
pub(crate) fn put(systems: &mut Systems) -> Result<[Reading; 2], String> {
    let load = writes(systems);
    let options = systems.options(&load)?;
    let cluster = systems.cluster(System::Snapshots)?;
    let mut lasted = Duration::ZERO;
    let meanwhile = measure_while(&options, load.connections, || {
        let start = Instant::now();
        while lasted < options.duration {
            cluster.snapshot_everywhere()?;
            lasted = start.elapsed();
        }
        Ok(())
    })?;
    let otherwise = measure(&Options { duration: lasted, ..options.clone() }, load.connections, None)?;
    Ok([Reading::of_load(answered(meanwhile)?), Reading::of_load(answered(otherwise)?)])
}

/// Of the leader: the most memory that it has while all nodes write a snapshot, without a load and with one, and what
/// it had idle before. Each round has a cluster of its own: what a process once had it may keep, so one that has written
/// a snapshot does not tell what it would have without.
pub(crate) fn memory(systems: &mut Systems) -> Result<[Reading; 2], String> {
    systems.hold(&[])?;
    systems.hold(&[System::Snapshots])?;
    let load = writes(systems);
    let options = systems.options(&load)?;
    let cluster = systems.cluster(System::Snapshots)?;
    let leader = cluster.leader()?;
    let pid = cluster.pid(leader)?;
    let idle = idle_memory(pid)? as f64 / 1e6;
    let at_rest = most_memory_while(pid, || cluster.snapshot_everywhere())?;
    let mut under_load = 0;
    measure_while(&options, load.connections, || {
        under_load = most_memory_while(pid, || cluster.snapshot_everywhere())?;
        Ok(())
    })?;
    let mut most = Reading::of([at_rest as f64 / 1e6, under_load as f64 / 1e6]);
    if cluster.leader()? != leader {
        most.notes.push("another node leads now: some of it is a follower's memory".to_owned());
    }
    Ok([most, Reading::of([idle; 2])])
}

fn idle_memory(pid: u32) -> Result<u64, String> {
    let deadline = Instant::now() + IDLE_TIMEOUT;
    let (mut bytes, mut since) = (resident_bytes(pid)?, Instant::now());
    while since.elapsed() < IDLE_TIME {
        if Instant::now() >= deadline {
            return Err(format!("the memory of a node without a load went on changing for {IDLE_TIMEOUT:?}"));
        }
        std::thread::sleep(SAMPLE_INTERVAL);
        let now = resident_bytes(pid)?;
        if now.abs_diff(bytes) > bytes / 100 {
            (bytes, since) = (now, Instant::now());
        }
    }
    resident_bytes(pid)
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
