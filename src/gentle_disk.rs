//! A disk for work that has time: it writes slowly so that the syncs of others need not wait.
//!
//! A snapshot is written while clients wait for the log. Written as fast as possible it takes a processor and the disk's
//! queue for itself for as long as it lasts, and every sync of the log behind it is late by that much. So whoever
//! writes through a [`GentleDisk`] rests in proportion to what each write took, and its bytes go to the disk in
//! pieces rather than all at once with the sync at the end.

use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use crate::disk::{Disk, DiskFile};

/// Bytes after which a file is synced. A sync of the log meets at most so many of ours in the disk's queue: with 1 MiB the
/// slowest of a hundred PUTs took 8 % longer, with 8 MiB 40 %.
pub const SYNC_BYTES: u64 = 256 << 10;

/// Rest for each unit of work: a third of the time is worked. More rest would make a gigabyte take minutes.
pub const RESTS_PER_WORK: u32 = 2;

/// The longest rest behind one write: on a busy machine a write takes long because others run, and resting much longer
/// for that would let the snapshot fall behind.
pub const REST_MAX: Duration = Duration::from_millis(20);

/// A disk whose new files are written gently. Everything else is done at once.
pub struct GentleDisk(Arc<dyn Disk>);

impl GentleDisk {
    /// The same files as `disk`.
    pub fn new(disk: Arc<dyn Disk>) -> GentleDisk {
        GentleDisk(disk)
    }
}

impl Disk for GentleDisk {
    fn list(&self) -> io::Result<Vec<String>> {
        self.0.list()
    }

    fn create(&self, name: &str, reserve_bytes: u64) -> io::Result<Box<dyn DiskFile>> {
        let file = self.0.create(name, reserve_bytes)?;
        Ok(Box::new(GentleFile { file, unsynced: 0, rested: Instant::now() }))
    }

    fn open(&self, name: &str) -> io::Result<Box<dyn DiskFile>> {
        self.0.open(name)
    }

    fn rename(&self, from: &str, to: &str) -> io::Result<()> {
        self.0.rename(from, to)
    }

    fn remove(&self, name: &str) -> io::Result<()> {
        self.0.remove(name)
    }

    fn sync_directory(&self) -> io::Result<()> {
        self.0.sync_directory()
    }

    fn free_bytes(&self) -> io::Result<u64> {
        self.0.free_bytes()
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path(name)
    }
}

struct GentleFile {
    file: Box<dyn DiskFile>,
    unsynced: u64,
    /// Since when it has been at work: making the bytes of a write counts too.
    rested: Instant,
}

impl DiskFile for GentleFile {
    fn len(&self) -> io::Result<u64> {
        self.file.len()
    }

    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
        self.file.read_at(buffer, offset)
    }

    fn write_all_at(&mut self, bytes: &[u8], offset: u64) -> io::Result<()> {
        self.file.write_all_at(bytes, offset)?;
        self.unsynced += bytes.len() as u64;
        if self.unsynced >= SYNC_BYTES {
            self.sync_data()?;
        }
        thread::sleep((self.rested.elapsed() * RESTS_PER_WORK).min(REST_MAX));
        self.rested = Instant::now();
        Ok(())
    }

    fn sync_data(&mut self) -> io::Result<()> {
        self.unsynced = 0;
        self.file.sync_data()
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
    fn what_is_written_gently_is_the_same_and_durable_piece_by_piece() {
        let memory = MemoryDisk::new();
        let disk = GentleDisk::new(Arc::new(memory.clone()));
        let piece = vec![7; 100 << 10];
        let mut file = disk.create("a", 0).unwrap();
        let syncs = memory.counts().syncs;
        for number in 0..10 {
            file.write_all_at(&piece, number * piece.len() as u64).unwrap();
        }
        // Three pieces reach the bytes of a sync.
        assert_eq!(memory.counts().syncs - syncs, 3);
        file.sync_data().unwrap();
        assert_eq!(memory.read_file("a").unwrap(), vec![7; 1000 << 10]);
    }

    #[test]
    fn a_write_is_followed_by_rest() {
        let disk = GentleDisk::new(Arc::new(MemoryDisk::new()));
        let mut file = disk.create("a", 0).unwrap();
        let started = Instant::now();
        thread::sleep(Duration::from_millis(5));
        file.write_all_at(b"x", 0).unwrap();
        let elapsed = started.elapsed();
        assert!(elapsed >= Duration::from_millis(15), "{elapsed:?}: the five of work count");
    }
}
