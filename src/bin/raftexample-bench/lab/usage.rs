//! What a process takes of the machine, from `/proc`.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::Duration;

use serde::{Deserialize, Serialize};

/// Resident memory in bytes.
///
/// # Errors
/// One line, when the process is gone.
pub(crate) fn resident_bytes(pid: u32) -> Result<u64, String> {
    let path = format!("/proc/{pid}/status");
    let text = std::fs::read_to_string(&path).map_err(|error| format!("failed to read {path}: {error}"))?;
    kilobytes(&text, "VmRSS:").map(|kilobytes| kilobytes * 1024).ok_or_else(|| format!("{path} names no VmRSS"))
}

/// The number in a line such as `VmRSS:     1234 kB`.
fn kilobytes(status: &str, name: &str) -> Option<u64> {
    let line = status.lines().find_map(|line| line.strip_prefix(name))?;
    line.split_whitespace().next()?.parse().ok()
}

/// How many descriptors are open.
///
/// # Errors
/// One line, when the process is gone.
pub(crate) fn descriptors(pid: u32) -> Result<usize, String> {
    let path = format!("/proc/{pid}/fd");
    let entries = std::fs::read_dir(&path).map_err(|error| format!("failed to read {path}: {error}"))?;
    Ok(entries.count())
}

/// What threads of one name have taken since they started.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct ThreadTime {
    /// On a processor, user and system.
    pub(crate) running: Duration,
    /// How often they went to sleep, and so had to be woken.
    pub(crate) sleeps: u64,
}

impl ThreadTime {
    /// What came after `before`.
    pub(crate) fn since(self, before: Self) -> Self {
        Self { running: self.running.saturating_sub(before.running), sleeps: self.sleeps.saturating_sub(before.sleeps) }
    }
}

/// What the threads of a process have taken, by name; numbers at the end of a name count as one. Threads that end
/// while this looks are left out.
pub(crate) fn thread_times(pid: u32) -> BTreeMap<String, ThreadTime> {
    let mut times: BTreeMap<String, ThreadTime> = BTreeMap::new();
    let Ok(tasks) = std::fs::read_dir(format!("/proc/{pid}/task")) else { return times };
    for task in tasks.filter_map(Result::ok) {
        if let Some((name, time)) = thread_time(&task.path()) {
            let sum = times.entry(name).or_default();
            sum.running += time.running;
            sum.sleeps += time.sleeps;
        }
    }
    times
}

fn thread_time(task: &Path) -> Option<(String, ThreadTime)> {
    let read = |file: &str| std::fs::read_to_string(task.join(file)).ok();
    // Nanoseconds on a processor come first; `stat` would count in ticks of 10 ms.
    let nanoseconds = read("schedstat")?.split_whitespace().next()?.parse().ok()?;
    let sleeps = kilobytes(&read("status")?, "voluntary_ctxt_switches:")?;
    Some((group(read("comm")?.trim()), ThreadTime { running: Duration::from_nanos(nanoseconds), sleeps }))
}

/// A thread's name without its number.
fn group(name: &str) -> String {
    let digits = |c: char| c.is_ascii_digit();
    // Of a peer's sender, `peer-2-main`, the number stands in the middle.
    name.split('-').filter(|part| !part.is_empty() && !part.chars().all(digits)).collect::<Vec<_>>().join("-")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_process_has_memory_and_descriptors_and_threads() {
        let pid = std::process::id();
        assert!(resident_bytes(pid).unwrap() > 1 << 20);
        assert!(descriptors(pid).unwrap() >= 3);
        let times = thread_times(pid);
        assert!(times.values().map(|time| time.running).sum::<Duration>() > Duration::ZERO, "{times:?}");
        assert!(resident_bytes(0).is_err());
    }

    #[test]
    fn numbers_of_threads_do_not_count() {
        for (name, expected) in [("driver", "driver"), ("http-17", "http"), ("peer-2-main", "peer-main"), ("7", "")] {
            assert_eq!(group(name), expected);
        }
    }
}
