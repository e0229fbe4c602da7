//! What is left of a run: a page for people, and a few lines for those who did not open it.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::audit::Checked;
use crate::chaos::Event;
use crate::followers::Observation;
use crate::history::{End, Operation, Violation};
use crate::timeline::{Scene, draw, escape};

/// How much is drawn before and after a violation.
const MARGIN: Duration = Duration::from_secs(3);

/// Violations that have a picture: those behind them are mostly the same one, seen by others.
const PICTURES_MAX: usize = 5;

/// Operations in a picture.
const OPERATIONS_MAX: usize = 3000;

/// The widest window: an operation that was never answered may have begun long ago.
const WINDOW_MAX: Duration = Duration::from_secs(20);

/// All that there is to tell.
pub struct Report<'a> {
    /// The seed, and the rest of what is needed to try again.
    pub again: String,
    /// One line each: the cluster, the network, what was left out.
    pub facts: Vec<String>,
    /// What clients did.
    pub operations: &'a [Operation],
    /// What was done to the nodes.
    pub events: &'a [Event],
    /// How many times each.
    pub faults: BTreeMap<&'static str, usize>,
    /// What nodes said of themselves.
    pub observations: &'a [Observation],
    /// What was looked at.
    pub checked: Checked,
    /// What was found.
    pub violations: &'a [Violation],
}

/// How many operations of each kind had which end.
pub fn count_operations(operations: &[Operation]) -> BTreeMap<&'static str, usize> {
    let mut counts = BTreeMap::new();
    for operation in operations {
        let end = match operation.end {
            End::Refused(_) => "refused",
            End::Unknown => "of unknown end",
            End::Listed { .. } => "listings",
            _ if operation.request.is_write() => "writes",
            _ => "reads",
        };
        *counts.entry(end).or_default() += 1;
        if operation.attempts > 1 {
            *counts.entry("repeated under a token").or_default() += 1;
        }
    }
    counts
}

fn tally(counts: &BTreeMap<&'static str, usize>) -> String {
    counts.iter().map(|(name, count)| format!("{count} {name}")).collect::<Vec<_>>().join(", ")
}

impl Report<'_> {
    /// For a terminal.
    pub fn summary(&self) -> String {
        let Checked { changes, registers, states, set_keys } = self.checked;
        let mut lines = vec![self.again.clone()];
        lines.extend(self.facts.iter().cloned());
        lines.push(format!(
            "operations: {} in all: {}",
            self.operations.len(),
            tally(&count_operations(self.operations))
        ));
        lines.push(format!("faults: {}", tally(&self.faults)));
        lines.push(format!(
            "checked: {registers} keys for linearizability, {states} reads against {changes} changes, {set_keys} \
             copies of acknowledged keys"
        ));
        lines.push(format!("violations: {}", self.violations.len()));
        lines.extend(self.violations.iter().take(PICTURES_MAX).map(|violation| format!("  {}", violation.what)));
        lines.join("\n")
    }

    /// Writes the page, and for a run with violations all operations, into `directory`. Returns where the page is.
    pub fn write(&self, directory: &Path) -> std::io::Result<PathBuf> {
        if !self.violations.is_empty() {
            let lines: Vec<String> = self.operations.iter().map(ToString::to_string).collect();
            std::fs::write(directory.join("operations.txt"), lines.join("\n"))?;
        }
        let path = directory.join("report.html");
        std::fs::write(&path, self.page())?;
        Ok(path)
    }

    fn page(&self) -> String {
        let mut page = format!(
            "<!doctype html><meta charset=\"utf-8\"><title>torture: {}</title><style>body{{font-family:sans-serif}}\
             pre{{background:#f4f4f4;padding:8px;overflow:auto}}</style>\n<h1>Torture</h1><pre>{}</pre>\n",
            escape(&self.again),
            escape(&self.summary())
        );
        for violation in self.violations.iter().take(PICTURES_MAX) {
            self.show(&mut page, violation);
        }
        page.push_str("<h2>All that was done</h2><pre>");
        for Event { what, from, until, .. } in self.events {
            let until = until.map_or_else(|| "the end".to_owned(), |until| format!("{:.3} s", until.as_secs_f64()));
            let _ = writeln!(page, "{:.3} s to {until}: {}", from.as_secs_f64(), escape(what));
        }
        page.push_str("</pre>\n");
        page
    }

    fn show(&self, page: &mut String, violation: &Violation) {
        let concerned = &violation.operations;
        let start = concerned.iter().map(|operation| operation.called).min().unwrap_or(violation.at);
        let end = concerned.iter().map(|operation| operation.returned).max().unwrap_or(violation.at);
        let start = start.max(end.saturating_sub(WINDOW_MAX)).saturating_sub(MARGIN);
        let window = start..end + MARGIN;
        // All that was done with the keys concerned; if it is about none, whatever was done.
        let keys: Vec<&str> = concerned.iter().map(|operation| operation.key.as_str()).collect();
        let shown = |operation: &&Operation| {
            operation.called < window.end
                && operation.returned >= window.start
                && (keys.is_empty() || keys.contains(&operation.key.as_str()))
        };
        let mut operations: Vec<&Operation> = self.operations.iter().filter(shown).collect();
        operations.sort_by_key(|operation| operation.called);
        operations.truncate(OPERATIONS_MAX);
        let lines: Vec<String> = operations.iter().map(|operation| escape(&operation.to_string())).collect();
        let scene = Scene { window, operations, concerned, events: self.events, observations: self.observations };
        let _ = writeln!(page, "<h2>Violation</h2><pre>{}</pre>", escape(&violation.what));
        let _ = writeln!(page, "<p>In red what can't all be right. Point at a bar to read it.</p>{}", draw(&scene));
        let _ = writeln!(page, "<details><summary>operations</summary><pre>{}</pre></details>", lines.join("\n"));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::history::Request;

    #[test]
    fn a_page_names_the_seed_the_faults_and_the_violation() {
        let ms = Duration::from_millis;
        let operation = |called| Operation {
            client: 3,
            node: 2,
            boot: 1,
            key: "r/1".to_owned(),
            request: Request::Read { fresh: true, after_index: None },
            token: false,
            attempts: 1,
            called: ms(called),
            returned: ms(called + 100),
            floor: 7,
            end: End::Missing { index: 5 },
        };
        let operations = [operation(5000), operation(90_000)];
        let violation =
            Violation { what: "stale & old".to_owned(), at: ms(5100), operations: operations[..1].to_vec() };
        let event =
            Event { kind: "SIGKILL", what: "SIGKILL to 2".to_owned(), nodes: vec![2], from: ms(4000), until: None };
        let report = Report {
            again: "seed 77".to_owned(),
            facts: vec!["a fact".to_owned()],
            operations: &operations,
            events: &[event],
            faults: [("SIGKILL", 1)].into(),
            observations: &[],
            checked: Checked::default(),
            violations: &[violation],
        };
        let directory = tempfile::TempDir::new().unwrap();
        let page = std::fs::read_to_string(report.write(directory.path()).unwrap()).unwrap();
        for words in
            ["seed 77", "a fact", "1 SIGKILL", "2 reads", "violations: 1", "stale &amp; old", "<svg", "read wrong"]
        {
            assert!(page.contains(words), "{words:?} is missing in {page}");
        }
        assert_eq!(
            page.matches("client 3 at node 2").count(),
            2,
            "one in the picture and one in its list, not the late one"
        );
        let all = std::fs::read_to_string(directory.path().join("operations.txt")).unwrap();
        assert_eq!(all.lines().count(), 2);
    }
}
