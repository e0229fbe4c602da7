//! What a measurement was made on: figures without it say little.

use std::path::Path;

use rustix::fs::statfs;
use serde::{Deserialize, Serialize};

/// What `statfs` says of a file system in memory, where a sync costs nothing.
const TMPFS_MAGIC: i64 = 0x0102_1994;
const RAMFS_MAGIC: i64 = 0x8584_58f6;

/// The machine, as far as it matters to the figures.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Machine {
    pub(crate) processor: String,
    pub(crate) cores: usize,
    pub(crate) memory_bytes: u64,
    pub(crate) kernel: String,
    /// Of the file system that the clusters write to: type, as in `ext4`, and device.
    pub(crate) file_system: String,
    /// Whether that is in memory, so that figures of writes say nothing about durable ones.
    pub(crate) in_memory: bool,
}

impl Machine {
    /// Looks at the machine, and at the file system of `directory`, which is there.
    pub(crate) fn look(directory: &Path) -> Self {
        let read = |path: &str| std::fs::read_to_string(path).unwrap_or_default();
        let memory = number_after(&read("/proc/meminfo"), "MemTotal:").unwrap_or(0) * 1024;
        let processor = read("/proc/cpuinfo");
        let processor = processor.lines().find(|line| line.starts_with("model name"));
        let processor = processor.and_then(|line| line.split_once(':')).map_or("unknown", |(_, name)| name.trim());
        #[allow(clippy::unnecessary_cast, reason = "it is of another type on other machines")]
        let magic = statfs(directory).map_or(0, |file_system| file_system.f_type as i64);
        Self {
            processor: processor.to_owned(),
            cores: std::thread::available_parallelism().map_or(0, usize::from),
            memory_bytes: memory,
            kernel: read("/proc/sys/kernel/osrelease").trim().to_owned(),
            file_system: mount_of(&read("/proc/self/mounts"), directory),
            in_memory: magic == TMPFS_MAGIC || magic == RAMFS_MAGIC,
        }
    }

    /// One line.
    pub(crate) fn in_words(&self) -> String {
        format!(
            "{} cores of {}, {} MiB of memory, Linux {}, {}",
            self.cores,
            self.processor,
            self.memory_bytes >> 20,
            self.kernel,
            self.file_system
        )
    }
}

fn number_after(text: &str, name: &str) -> Option<u64> {
    let line = text.lines().find_map(|line| line.strip_prefix(name))?;
    line.split_whitespace().next()?.parse().ok()
}

/// Type and device of the mount with the longest path above `directory`.
fn mount_of(mounts: &str, directory: &Path) -> String {
    let mounts = mounts.lines().filter_map(|line| {
        let mut words = line.split(' ');
        let (device, path, kind) = (words.next()?, words.next()?, words.next()?);
        directory.starts_with(path).then_some((path.len(), device, kind))
    });
    let longest = mounts.max_by_key(|(length, ..)| *length);
    longest.map_or("unknown".to_owned(), |(_, device, kind)| format!("{kind} on {device}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_nearest_mount_counts() {
        let mounts = "/dev/a / ext4 rw 0 0\ntmpfs /var/tmp tmpfs rw 0 0\n/dev/b /var btrfs rw 0 0\n";
        assert_eq!(mount_of(mounts, Path::new("/var/tmp/x")), "tmpfs on tmpfs");
        assert_eq!(mount_of(mounts, Path::new("/var/lib")), "btrfs on /dev/b");
        assert_eq!(mount_of(mounts, Path::new("/variant")), "ext4 on /dev/a");
        assert_eq!(mount_of("", Path::new("/")), "unknown");
    }

    #[test]
    fn a_machine_has_cores_and_memory() {
        let machine = Machine::look(&std::env::temp_dir());
        assert!(machine.cores > 0 && machine.memory_bytes > 0 && !machine.kernel.is_empty(), "{machine:?}");
    }
}
