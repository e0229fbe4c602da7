//! What happened in a run: its last lines are shown when it fails, and all of them make a fingerprint.
//!
//! Most runs go well, and nobody looks at them: they write nothing. One that has failed is run again, to write it all
//! down.

use std::collections::VecDeque;
use std::fmt;
use std::hash::{DefaultHasher, Hasher};
use std::time::Duration;

/// Lines that are kept for a failure.
const LINES_KEPT: usize = 300;

/// What becomes of the lines.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Use {
    Nothing,
    Keep,
    Print,
}

/// Records a run.
pub struct Trace {
    lines: VecDeque<String>,
    count: u64,
    fingerprint: DefaultHasher,
    used: Use,
}

impl Trace {
    fn new(used: Use) -> Trace {
        // The default hasher has fixed keys, other than that of a hash map.
        Trace { lines: VecDeque::new(), count: 0, fingerprint: DefaultHasher::new(), used }
    }

    /// Records nothing: the fingerprint is that of an empty run.
    pub fn off() -> Trace {
        Trace::new(Use::Nothing)
    }

    /// Keeps the last lines.
    pub fn kept() -> Trace {
        Trace::new(Use::Keep)
    }

    /// Keeps the last lines, and prints all of them as they come.
    pub fn printed() -> Trace {
        Trace::new(Use::Print)
    }

    /// Notes what happens at a time.
    pub fn note(&mut self, time: Duration, what: fmt::Arguments<'_>) {
        if self.used == Use::Nothing {
            return;
        }
        let line = format!("{:>12.6} {what}", time.as_secs_f64());
        self.fingerprint.write(line.as_bytes());
        self.count += 1;
        if self.used == Use::Print {
            println!("{line}");
        }
        if self.lines.len() == LINES_KEPT {
            self.lines.pop_front();
        }
        self.lines.push_back(line);
    }

    /// Equal for equal runs, and for others almost surely not.
    pub fn fingerprint(&self) -> (u64, u64) {
        (self.count, self.fingerprint.finish())
    }
}

impl fmt::Display for Trace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let left_out = self.count - self.lines.len() as u64;
        if left_out > 0 {
            writeln!(f, "... {left_out} lines before these")?;
        }
        self.lines.iter().try_for_each(|line| writeln!(f, "{line}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_lines_are_kept_and_all_of_them_count() {
        let run = |last: u64| {
            let mut trace = Trace::kept();
            (0..999).for_each(|n| trace.note(Duration::from_millis(n), format_args!("event {n}")));
            trace.note(Duration::from_secs(1), format_args!("event {last}"));
            trace
        };
        let trace = run(999);
        let text = trace.to_string();
        assert!(text.starts_with("... 700 lines before these\n    0.700000 event 700\n"), "{text}");
        assert!(text.ends_with("    1.000000 event 999\n"), "{text}");
        assert_eq!(trace.fingerprint(), run(999).fingerprint());
        assert_ne!(trace.fingerprint(), run(1000).fingerprint());
    }
}
