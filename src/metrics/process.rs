//! The process as the operating system sees it, under the names that Prometheus has for every program.

use std::fs;
use std::time::{SystemTime, UNIX_EPOCH};

use prometheus::{Counter, IntGauge};
use rustix::param::{clock_ticks_per_second, page_size};
use rustix::process::{Resource, getrlimit};

use super::{Families, signed};

/// Read when the metrics are asked for. What can't be read keeps its last value.
pub(super) struct Process {
    cpu: Counter,
    open_fds: IntGauge,
    max_fds: IntGauge,
    virtual_memory: IntGauge,
    resident_memory: IntGauge,
    threads: IntGauge,
}

/// Figures from `/proc/self/stat`.
#[derive(Debug, PartialEq, Eq)]
struct Stat {
    /// In user and kernel mode, in clock ticks.
    cpu_ticks: u64,
    threads: i64,
    virtual_bytes: i64,
    resident_pages: i64,
}

impl Process {
    pub(super) fn new(family: &Families) -> Process {
        let started = family.gauge("process_start_time_seconds", "When the process started, in Unix time.");
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        started.set(signed(now.as_secs()));
        Process {
            cpu: family.fractional_counter("process_cpu_seconds_total", "Processor time, user and system."),
            open_fds: family.gauge("process_open_fds", "Open file descriptors."),
            max_fds: family.gauge("process_max_fds", "Open file descriptors, at most."),
            virtual_memory: family.gauge("process_virtual_memory_bytes", "Virtual memory."),
            resident_memory: family.gauge("process_resident_memory_bytes", "Resident memory."),
            threads: family.gauge("process_threads", "Threads."),
        }
    }

    pub(super) fn read(&self) {
        if let Some(stat) = fs::read_to_string("/proc/self/stat").ok().as_deref().and_then(parse_stat) {
            let seconds = stat.cpu_ticks as f64 / clock_ticks_per_second() as f64;
            self.cpu.inc_by((seconds - self.cpu.get()).max(0.0));
            self.threads.set(stat.threads);
            self.virtual_memory.set(stat.virtual_bytes);
            self.resident_memory.set(stat.resident_pages.saturating_mul(signed(page_size())));
        }
        if let Ok(descriptors) = fs::read_dir("/proc/self/fd") {
            // Without the one that lists them.
            self.open_fds.set(signed(descriptors.count().saturating_sub(1)));
        }
        if let Some(limit) = getrlimit(Resource::Nofile).current {
            self.max_fds.set(signed(limit));
        }
    }
}

/// Reads the line of `/proc/self/stat`, see proc_pid_stat(5).
fn parse_stat(line: &str) -> Option<Stat> {
    // The second field is the program's name in parentheses, which may hold anything.
    let (_, behind_name) = line.rsplit_once(')')?;
    let fields: Vec<&str> = behind_name.split_ascii_whitespace().collect();
    // Numbered from 1 in the manual, and the third is the first behind the name.
    let field = |number: usize| fields.get(number - 3).copied();
    let cpu_ticks = field(14)?.parse::<u64>().ok()? + field(15)?.parse::<u64>().ok()?;
    Some(Stat {
        cpu_ticks,
        threads: field(20)?.parse().ok()?,
        virtual_bytes: field(23)?.parse().ok()?,
        resident_pages: field(24)?.parse().ok()?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_line_of_a_process_is_read_whatever_its_name() {
        let line =
            "71 (a) b) S 1 71 71 0 -1 4194560 100 0 0 0 17 4 0 0 20 0 12 0 99 3000000 500 18446744073709551615 1";
        let stat = Stat { cpu_ticks: 21, threads: 12, virtual_bytes: 3_000_000, resident_pages: 500 };
        assert_eq!(parse_stat(line), Some(stat));
        assert_eq!(parse_stat("71 (a) S 1"), None);
        assert_eq!(parse_stat(""), None);
    }
}
