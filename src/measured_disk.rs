//! A disk that measures what the raft log asks of it.
//!
//! The log itself has no clock, so that it can be simulated: this stands between it and the real disk. Everything else
//! in the data directory goes through untouched.

use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;

use crate::disk::{Disk, DiskFile, TEMPORARY_SUFFIX};
use crate::metrics::Metrics;
use crate::raft_log;

/// See the module.
pub struct MeasuredDisk<D> {
    disk: D,
    metrics: Arc<Metrics>,
}

impl<D: Disk> MeasuredDisk<D> {
    /// Measures `disk`.
    pub fn new(disk: D, metrics: Arc<Metrics>) -> MeasuredDisk<D> {
        MeasuredDisk { disk, metrics }
    }

    fn measured(&self, name: &str, file: Box<dyn DiskFile>) -> Box<dyn DiskFile> {
        // A segment is written under its temporary name until its beginning is durable.
        match raft_log::is_segment(name.strip_suffix(TEMPORARY_SUFFIX).unwrap_or(name)) {
            true => Box::new(MeasuredFile { file, metrics: self.metrics.clone() }),
            false => file,
        }
    }
}

impl<D: Disk> Disk for MeasuredDisk<D> {
    fn list(&self) -> io::Result<Vec<String>> {
        self.disk.list()
    }

    fn create(&self, name: &str, reserve_bytes: u64) -> io::Result<Box<dyn DiskFile>> {
        Ok(self.measured(name, self.disk.create(name, reserve_bytes)?))
    }

    fn open(&self, name: &str) -> io::Result<Box<dyn DiskFile>> {
        Ok(self.measured(name, self.disk.open(name)?))
    }

    fn rename(&self, from: &str, to: &str) -> io::Result<()> {
        self.disk.rename(from, to)
    }

    fn remove(&self, name: &str) -> io::Result<()> {
        self.disk.remove(name)
    }

    fn sync_directory(&self) -> io::Result<()> {
        self.disk.sync_directory()
    }

    fn free_bytes(&self) -> io::Result<u64> {
        self.disk.free_bytes()
    }

    fn path(&self, name: &str) -> PathBuf {
        self.disk.path(name)
    }
}

/// A segment of the log.
struct MeasuredFile {
    file: Box<dyn DiskFile>,
    metrics: Arc<Metrics>,
}

impl DiskFile for MeasuredFile {
    fn len(&self) -> io::Result<u64> {
        self.file.len()
    }

    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
        self.file.read_at(buffer, offset)
    }

    fn write_all_at(&mut self, bytes: &[u8], offset: u64) -> io::Result<()> {
        let started = Instant::now();
        self.file.write_all_at(bytes, offset)?;
        self.metrics.log.wrote(bytes.len(), started.elapsed());
        Ok(())
    }

    fn sync_data(&mut self) -> io::Result<()> {
        let started = Instant::now();
        self.file.sync_data()?;
        self.metrics.log.synced(started.elapsed());
        Ok(())
    }

    fn set_len(&mut self, bytes: u64) -> io::Result<()> {
        self.file.set_len(bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory_disk::MemoryDisk;

    #[test]
    fn only_the_log_is_measured() {
        let metrics = Arc::new(Metrics::new());
        let disk = MeasuredDisk::new(MemoryDisk::new(), metrics.clone());
        let counted = || {
            [
                "raftexample_log_write_bytes",
                "raftexample_log_write_duration_seconds",
                "raftexample_log_sync_duration_seconds",
            ]
            .map(|name| metrics.total(name))
        };
        for name in ["identity", "0000000000000001.snapshot", "0000000000000001.snapshot.tmp", "boot.tmp"] {
            let mut file = disk.create(name, 0).unwrap();
            file.write_all_at(b"something", 0).unwrap();
            file.sync_data().unwrap();
        }
        assert_eq!(counted(), [0.0; 3]);
        let mut segment = disk.create("0000000000000001.log.tmp", 0).unwrap();
        segment.write_all_at(&[1; 512], 0).unwrap();
        segment.write_all_at(&[1; 512], 512).unwrap();
        segment.sync_data().unwrap();
        drop(segment);
        disk.rename("0000000000000001.log.tmp", "0000000000000001.log").unwrap();
        disk.open("0000000000000001.log").unwrap().sync_data().unwrap();
        assert_eq!(counted(), [2.0, 2.0, 2.0]);
        let text = metrics.text();
        assert!(text.contains("raftexample_log_write_bytes_sum 1024\n"), "{text}");
    }
}
