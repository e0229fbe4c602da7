//! What the disk can do by itself: the yardstick of everything that waits for it.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use clap::Args;
use hdrhistogram::Histogram;
use raftexample::config::parse_duration;
use rustix::fs::{FallocateFlags, fallocate};

use super::process::Process;

/// What a node's log writes for a PUT of 128 bytes on its own: entry and checksums fill one sector.
const SYNC_BYTES: usize = 512;

/// The file is preallocated, and begun again from its start when it is full: as large as a segment of a node's log.
const FILE_BYTES: u64 = 64 << 20;

/// No disk that is worth measuring takes a minute for one sync.
const SYNC_NANOS_MAX: u64 = 60_000_000_000;

/// How long a writer may take beyond its measurement.
const WRITER_GRACE: Duration = Duration::from_secs(10);

/// How long `dd` may take.
const DD_TIMEOUT: Duration = Duration::from_secs(120);

#[derive(Clone, Debug, Args)]
pub(crate) struct SyncCli {
    /// The file to write and sync again and again; it is made
    #[arg(long)]
    file: PathBuf,

    /// How long
    #[arg(long, value_parser = parse_duration)]
    duration: Duration,
}

/// Appends a sector and syncs it, again and again; returns what to print, the median time of both in microseconds.
///
/// # Errors
/// One line.
pub(crate) fn sync_repeatedly(cli: &SyncCli) -> Result<String, String> {
    let failed = |error: std::io::Error| format!("failed to write {}: {error}", cli.file.display());
    let file: File = OpenOptions::new().write(true).create(true).truncate(true).open(&cli.file).map_err(failed)?;
    fallocate(&file, FallocateFlags::empty(), 0, FILE_BYTES).map_err(|errno| failed(errno.into()))?;
    file.sync_all().map_err(failed)?;
    let mut nanoseconds: Histogram<u64> =
        Histogram::new_with_bounds(1, SYNC_NANOS_MAX, 3).map_err(|error| error.to_string())?;
    let bytes = [0x55; SYNC_BYTES];
    let end = Instant::now() + cli.duration;
    let mut offset = 0;
    while Instant::now() < end {
        let start = Instant::now();
        file.write_all_at(&bytes, offset).and_then(|()| file.sync_data()).map_err(failed)?;
        nanoseconds.saturating_record(u64::try_from(start.elapsed().as_nanos()).unwrap_or(u64::MAX));
        offset = (offset + SYNC_BYTES as u64) % FILE_BYTES;
    }
    Ok(format!("{}\n", nanoseconds.value_at_quantile(0.5) as f64 / 1e3))
}

/// The median time, in microseconds, of one sync of what one PUT writes, while as many processes do so as a cluster has
/// nodes. `bench` is this program.
///
/// # Errors
/// One line.
pub(crate) fn sync_median_us(
    bench: &Path,
    directory: &Path,
    writers: usize,
    duration: Duration,
) -> Result<f64, String> {
    let mut processes = Vec::new();
    for number in 1..=writers {
        let log = directory.join(format!("sync-{number}.log"));
        let _ = std::fs::remove_file(&log);
        let file = directory.join(format!("sync-{number}"));
        let mut command = Command::new(bench);
        command.args(["sync", "--duration", &format!("{}ms", duration.as_millis()), "--file"]).arg(file);
        processes.push((Process::spawn(&mut command, &log)?, log));
    }
    let mut medians = Vec::new();
    for (process, log) in &mut processes {
        process.wait(duration + WRITER_GRACE)?;
        let text = std::fs::read_to_string(&*log).map_err(|error| format!("{}: {error}", log.display()))?;
        let median: f64 = text.trim().parse().map_err(|_| format!("a writer printed no number: {text}"))?;
        medians.push(median);
    }
    for number in 1..=writers {
        let _ = std::fs::remove_file(directory.join(format!("sync-{number}")));
    }
    Ok(medians.iter().sum::<f64>() / medians.len().max(1) as f64)
}

/// Bytes per second of `dd` to a new file, its sync included.
///
/// # Errors
/// One line.
pub(crate) fn dd_bytes_per_second(directory: &Path, bytes: u64) -> Result<f64, String> {
    const BLOCK_BYTES: u64 = 1 << 20;
    let file = directory.join("dd");
    let count = bytes.div_ceil(BLOCK_BYTES).max(1);
    let mut command = Command::new("dd");
    command.arg("if=/dev/zero").arg(format!("of={}", file.display()));
    command.args([&format!("bs={BLOCK_BYTES}"), &format!("count={count}"), "conv=fdatasync"]);
    command.env("LC_ALL", "C");
    let log = directory.join("dd.log");
    let _ = std::fs::remove_file(&log);
    Process::spawn(&mut command, &log)?.wait(DD_TIMEOUT)?;
    let _ = std::fs::remove_file(&file);
    let text = std::fs::read_to_string(&log).map_err(|error| format!("failed to read {}: {error}", log.display()))?;
    let seconds = dd_seconds(&text).ok_or_else(|| format!("dd did not say how long it took: {text}"))?;
    Ok((count * BLOCK_BYTES) as f64 / seconds)
}

/// How long `dd` says that it took: `... copied, 0.5 s, 500 MB/s`.
fn dd_seconds(text: &str) -> Option<f64> {
    let (_, rest) = text.rsplit_once("copied, ")?;
    rest.split_whitespace().next()?.parse().ok().filter(|seconds| *seconds > 0.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dd_says_how_long_it_took() {
        let text = "64+0 records in\n64+0 records out\n67108864 bytes (67 MB, 64 MiB) copied, 0.0625 s, 1.1 GB/s\n";
        assert_eq!(dd_seconds(text), Some(0.0625));
        assert_eq!(dd_seconds("dd: failed to open"), None);
    }

    #[test]
    fn syncing_has_a_median() {
        let directory = tempfile::tempdir().unwrap();
        let cli = SyncCli { file: directory.path().join("file"), duration: Duration::from_millis(20) };
        let text = sync_repeatedly(&cli).unwrap();
        // A system call takes longer than this, a disk or none behind it.
        assert!(text.trim().parse::<f64>().unwrap() > 0.05, "{text}");
    }
}
