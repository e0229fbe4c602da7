use std::time::Duration;

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

use crate::support::wait_for;

/// What a process holds, as Linux says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Usage {
    threads: usize,
    descriptors: usize,
    resident_bytes: usize,
}

impl Usage {
    pub(crate) fn of(process: u32) -> Self {
        let count = |what: &str| std::fs::read_dir(format!("/proc/{process}/{what}")).unwrap().count();
        let status = std::fs::read_to_string(format!("/proc/{process}/status")).unwrap();
        let resident = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
        let kilobytes: usize = resident.trim().trim_end_matches(" kB").parse().unwrap();
        Self { threads: count("task"), descriptors: count("fd"), resident_bytes: kilobytes << 10 }
    }

    /// Waits until a process has no more threads and descriptors than here.
    #[track_caller]
    fn wait_back(&self, process: u32) -> Self {
        wait_for(&format!("a process with no more than {self:?}"), || {
            let now = Self::of(process);
            (now.threads <= self.threads && now.descriptors <= self.descriptors).then_some(now)
        })
    }
}

/// Does the same twice, first to warm up: the second time must leave nothing behind, and at most `grown_bytes` of memory,
/// which the allocator keeps in another place than the first time.
#[track_caller]
pub(crate) fn leaves_nothing_behind(processes: &[u32], grown_bytes: usize, mut what: impl FnMut(usize)) {
    let before: Vec<Usage> = processes.iter().map(|process| Usage::of(*process)).collect();
    what(0);
    let warm: Vec<Usage> = processes.iter().zip(&before).map(|(process, before)| before.wait_back(*process)).collect();
    what(1);
    for ((process, before), warm) in processes.iter().zip(before).zip(warm) {
        let after = before.wait_back(*process);
        println!("process {process}: {before:?}, warm {warm:?}, after {after:?}");
        let grown = after.resident_bytes.saturating_sub(warm.resident_bytes);
        assert!(grown <= grown_bytes, "memory has grown by {grown} bytes");
    }
}

/// Lets this process, and those that it starts, open so many descriptors. `false`: it may not.
pub(crate) fn allow_descriptors(count: u64) -> bool {
    let Rlimit { current, maximum } = getrlimit(Resource::Nofile);
    if current.is_none_or(|current| current >= count) {
        return true;
    }
    setrlimit(Resource::Nofile, Rlimit { current: Some(count), maximum }).is_ok()
}

/// A pause of a client that is slow on purpose.
pub(crate) fn dawdle(pause: Duration) {
    std::thread::sleep(pause);
}
