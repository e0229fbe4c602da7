//! That the measurements run, print what they promise, and leave nothing behind. The figures decide nothing here.

use std::path::{Path, PathBuf};
use std::process::Command;

use rustix::process::Signal;
use serde_json::Value;
use tempfile::TempDir;

use crate::support::{Process, exclusive, read_text, wait_for};

const PROGRAM: &str = env!("CARGO_BIN_EXE_raftexample-bench");

/// As short as it can be with an answer in each.
const SHORT: &[&str] = &["--warm-up", "50ms", "--duration", "200ms"];

struct Run {
    directory: TempDir,
}

impl Run {
    fn new() -> Self {
        Self { directory: TempDir::new().unwrap() }
    }

    fn command(&self, work: &str, arguments: &[&str]) -> Command {
        let mut command = Command::new(PROGRAM);
        command.arg(work).args(["--node-binary", env!("CARGO_BIN_EXE_raftexample")]);
        command.arg("--directory").arg(self.results()).arg("--json").arg(self.json()).args(arguments);
        command
    }

    /// Where clusters are, and nothing else is.
    fn results(&self) -> PathBuf {
        self.directory.path().join("results")
    }

    fn json(&self) -> PathBuf {
        self.directory.path().join("results.json")
    }

    fn log(&self) -> PathBuf {
        self.directory.path().join("output")
    }

    /// Runs to the end; the status and what was printed.
    #[track_caller]
    fn run(&self, command: &mut Command) -> (Option<i32>, String) {
        let status = Process::spawn(command, &self.log()).wait();
        (status.code(), read_text(&self.log()))
    }

    /// As [`Self::run`], with success, after which nothing is left but the results.
    #[track_caller]
    fn succeed(&self, command: &mut Command) -> (String, Value) {
        let (status, output) = self.run(command);
        assert_eq!(status, Some(0), "{output}");
        assert!(entries(&self.results()).is_empty(), "it left {:?}", entries(&self.results()));
        assert!(processes_of(&self.results()).is_empty(), "nodes go on");
        let json = serde_json::from_str(&read_text(&self.json())).unwrap();
        (output, json)
    }
}

fn entries(directory: &Path) -> Vec<PathBuf> {
    std::fs::read_dir(directory).map_or(Vec::new(), |entries| entries.map(|entry| entry.unwrap().path()).collect())
}

/// Processes that name a path below `directory` on their command line, and are no generator.
fn processes_of(directory: &Path) -> Vec<String> {
    let needle = format!("{}/run-", directory.display());
    let lines = entries(Path::new("/proc")).into_iter().filter_map(|process| {
        let line = std::fs::read(process.join("cmdline")).ok()?;
        let line = String::from_utf8_lossy(&line).replace('\0', " ");
        line.contains(&needle).then_some(line)
    });
    lines.collect()
}

/// The figure of a row with this name.
#[track_caller]
fn figure<'a>(results: &'a Value, row: &str, name: &str) -> &'a Value {
    let rows = results["rows"].as_array().unwrap();
    let row = rows.iter().find(|value| value["name"] == row).unwrap();
    let figures = row["figures"].as_array().unwrap();
    figures.iter().find(|value| value["name"] == name).unwrap_or_else(|| panic!("no {name} in {row:#}"))
}

#[test]
fn the_standard_loads_run_on_a_cluster_of_their_own() {
    let _exclusive = exclusive();
    let run = Run::new();
    let (output, results) = run.succeed(&mut run.command("standard", SHORT));
    for words in
        ["put on leader", "put on follower", "get on leader", "stale-get on leader", "mixed on leader", "driver"]
    {
        assert!(output.contains(words), "{words:?} is missing in: {output}");
    }
    for load in results["loads"].as_array().unwrap() {
        for point in load["points"].as_array().unwrap() {
            assert!(point["requests_per_second"].as_f64().unwrap() > 0.0, "{point:#}");
            assert_eq!((point["failed"].as_u64(), point["unknown"].as_u64()), (Some(0), Some(0)), "{point:#}");
        }
    }
    let driver = &results["profiles"][0]["leader"]["driver"];
    assert!(driver["processor_us"].as_f64().unwrap() > 0.0, "{driver}");
}

#[test]
fn rows_are_measured_in_rounds_and_come_to_ratios() {
    let _exclusive = exclusive();
    let run = Run::new();
    let mut command = run.command("compare", SHORT);
    command.args(["--rounds", "3", "--many-keys", "2000"]);
    let rows = "put-follower,stale-get,put-sync,memory,snapshot-put,snapshot-write,snapshot-memory,restart";
    command.args(["--rows", rows]);
    let (output, results) = run.succeed(&mut command);
    assert!(output.contains("goal >= 0.85"), "{output}");
    for (row, name) in [
        ("put-follower", "rate"),
        ("put-follower", "p99"),
        ("stale-get", "rate"),
        ("put-sync", "p50"),
        ("memory", "memory"),
        ("snapshot-put", "p99"),
        ("snapshot-write", "bytes"),
        ("snapshot-memory", "at rest"),
        ("snapshot-memory", "under load"),
        ("restart", "time"),
    ] {
        let figure = figure(&results, row, name);
        let ratio = |name: &str| figure["ratio"][name].as_f64().unwrap();
        assert!(0.0 < ratio("min") && ratio("min") <= ratio("median") && ratio("median") <= ratio("max"), "{figure:#}");
    }
    let rounds = |place: usize| results["rows"][place]["rounds"].as_array().unwrap().len();
    assert_eq!((rounds(0), results["rows"][0]["name"].as_str()), (3, Some("put-follower")));
    // Values of 100 bytes with their keys: nothing was measured but what was filled in.
    let memory = figure(&results, "memory", "memory");
    assert_eq!(memory["theirs"]["median"].as_f64().unwrap(), 2000.0 * 118.0 / 1e6);
}

#[test]
fn a_killed_leader_costs_an_election() {
    let _exclusive = exclusive();
    let run = Run::new();
    let (output, results) = run.succeed(&mut run.command("compare", &["--kills", "1", "--rows", "leader-kill"]));
    let next = figure(&results, "leader-kill", "next");
    // Below the shortest election timeout nobody can know that the leader is dead.
    assert!(next["ours"]["median"].as_f64().unwrap() >= 800.0, "{next:#}");
    assert!(!output.contains("was answered with"), "a write was refused: {output}");
}

#[test]
fn rows_about_programs_that_are_missing_are_left_out() {
    let run = Run::new();
    let mut command = run.command("compare", SHORT);
    let (output, results) = run.succeed(command.args(["--rows", "put-1,get-go"]).env("PATH", "/nonexistent"));
    assert!(output.contains("not measured: there is no etcd") && output.contains("no Go raftexample"), "{output}");
    assert_eq!(results["rows"].as_array().unwrap().len(), 2);
}

#[test]
fn what_is_wrong_is_said() {
    let run = Run::new();
    for (work, arguments, words) in [
        ("compare", &["--rows", "nothing"][..], "there are put-1, "),
        ("compare", &["--rounds", "0"], "--rounds"),
        ("compare", &["--duration", "0"], "--duration"),
        ("compare", &["--etcd", "/nonexistent"], "--etcd"),
        ("drift", &["--duration", "1s", "--interval", "1s"], "--interval"),
        ("standard", &["--duration", "0"], "--duration"),
    ] {
        let (status, output) = run.run(&mut run.command(work, arguments));
        assert!(matches!(status, Some(1 | 2)) && output.contains(words), "{work} {arguments:?}: {status:?} {output}");
        std::fs::remove_file(run.log()).unwrap();
    }
    let mut command = Command::new(PROGRAM);
    command.args(["standard", "--node-binary", "/nonexistent", "--directory"]).arg(run.results());
    let (status, output) = run.run(&mut command);
    assert!(status == Some(1) && output.contains("--node-binary"), "{output}");
}

#[test]
fn the_drift_of_a_short_run_is_told() {
    let _exclusive = exclusive();
    let run = Run::new();
    let arguments = ["--duration", "1s", "--interval", "200ms"];
    let (output, results) = run.succeed(&mut run.command("drift", &arguments));
    assert!(output.contains("the last quarter by the second: rate "), "{output}");
    let intervals = results["intervals"].as_array().unwrap();
    assert_eq!(intervals.len(), 5);
    assert!(intervals.iter().all(|interval| interval["descriptors"].as_u64().unwrap() > 64), "{intervals:#?}");
}

#[test]
fn an_interrupted_run_leaves_nothing_behind() {
    let _exclusive = exclusive();
    for signal in [Signal::INT, Signal::TERM] {
        let run = Run::new();
        let mut process = Process::spawn(&mut run.command("drift", &["--duration", "10m"]), &run.log());
        wait_for("three nodes", || (processes_of(&run.results()).len() == 3).then_some(()));
        process.signal(signal);
        let status = process.wait();
        assert!(!status.success(), "{status}");
        assert!(processes_of(&run.results()).is_empty(), "nodes go on");
        assert!(entries(&run.results()).is_empty(), "it left {:?}", entries(&run.results()));
    }
}
