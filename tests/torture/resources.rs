//! What a process takes of its machine, as the kernel tells.

use std::fmt;

/// Descriptors, threads and memory of a process.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Resources {
    pub descriptors: u64,
    pub threads: u64,
    pub resident_bytes: u64,
}

impl Resources {
    /// Those of a process; `None` if it is gone.
    pub fn of(process: u32) -> Option<Resources> {
        let status = std::fs::read_to_string(format!("/proc/{process}/status")).ok()?;
        let number = |name: &str| {
            let line = status.lines().find(|line| line.starts_with(name))?;
            line[name.len()..].split_whitespace().next()?.parse::<u64>().ok()
        };
        let descriptors = std::fs::read_dir(format!("/proc/{process}/fd")).ok()?.count() as u64;
        Some(Resources { descriptors, threads: number("Threads:")?, resident_bytes: number("VmRSS:")? << 10 })
    }

    /// The larger of each.
    pub fn max(self, other: Resources) -> Resources {
        Resources {
            descriptors: self.descriptors.max(other.descriptors),
            threads: self.threads.max(other.threads),
            resident_bytes: self.resident_bytes.max(other.resident_bytes),
        }
    }

    /// Whether none is above that of `limit`.
    pub fn is_within(self, limit: Resources) -> bool {
        self.max(limit) == limit
    }
}

impl fmt::Display for Resources {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Resources { descriptors, threads, resident_bytes } = self;
        write!(f, "{descriptors} descriptors, {threads} threads, {} MiB", resident_bytes >> 20)
    }
}
