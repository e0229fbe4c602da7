use std::collections::BTreeMap;

use crate::cases::{Bench, chosen, run_all};
use crate::node::{End, Node, Promises, Script, copy_directory};
use crate::shim::{Fault, Seen, Shim, seen};

/// Of how many faults `make test` takes one.
const STRIDE: usize = 9;

/// No log is kept behind a snapshot.
const FLAGS: &[&str] = &["--snapshot-catchup-entries", "0"];

const EIO: &str = "5";
const EINTR: &str = "4";
const ENOSPC: &str = "28";
const EOPNOTSUPP: &str = "95";

/// What a node does while one of its calls fails.
#[derive(Clone, Copy, Debug)]
enum Part {
    /// The first start: founds the cluster.
    Founding,
    /// A later start, which reads back what there is.
    Restart,
    /// A start with a nearly full segment of the log: rolls, and deletes the old one.
    Roll,
}

/// A directory to begin with, and what was promised from it. Without one: an empty one.
#[derive(Default)]
struct Image {
    directory: Option<tempfile::TempDir>,
    promises: Promises,
}

impl Image {
    fn put_in_place(&self, node: &Node) {
        match &self.directory {
            Some(image) => copy_directory(image.path(), &node.data_dir),
            None => drop(std::fs::remove_dir_all(&node.data_dir)),
        }
    }
}

/// What is sent to a node in each part; how often a snapshot was refused.
fn script(part: Part, node: &Node, promises: &mut Promises) -> Result<(End, usize), String> {
    let mut script = Script::new(node, promises);
    let mut refusals = 0;
    macro_rules! step {
        ($step:expr) => {
            if $step? == End::Cut {
                return Ok((End::Cut, refusals));
            }
        };
    }
    step!(script.put("a", b"first"));
    step!(script.put("long", &[7; 3000]));
    if let Part::Roll = part {
        // The second has no room in the first segment.
        step!(script.put("large", &[1; 1 << 20]));
        step!(script.put("large", &[2; 1 << 20]));
    }
    step!(script.put_with("token", b"once", Some(&format!("{part:?}"))));
    let (end, refused) = script.snapshot()?;
    refusals += refused;
    step!(Ok::<End, String>(end));
    step!(script.put("a", b"second"));
    step!(script.put("deleted", b"value"));
    step!(script.delete("deleted"));
    let (end, refused) = script.snapshot()?;
    refusals += refused;
    step!(Ok::<End, String>(end));
    step!(script.put("last", b"value"));
    Ok((End::Whole, refusals))
}

/// Makes the directory that a part begins with.
fn image(part: Part) -> Image {
    if let Part::Founding = part {
        return Image::default();
    }
    let bench = Bench::new();
    let mut node = Node::new(&bench);
    let mut promises = Promises::default();
    node.start(FLAGS, &[]);
    assert!(node.wait_ready(), "{}", node.log());
    assert_eq!(script(Part::Founding, &node, &mut promises).unwrap(), (End::Whole, 0));
    if let Part::Roll = part {
        let mut script = Script::new(&node, &mut promises);
        for _ in 0..(raftexample::raft_log::SEGMENT_BYTES >> 20) - 2 {
            assert_eq!(script.put("large", &vec![9; 1 << 20]).unwrap(), End::Whole);
        }
        assert_eq!(script.put("large", b"small again").unwrap(), End::Whole);
    }
    node.kill();
    let directory = tempfile::tempdir().unwrap();
    copy_directory(&node.data_dir, directory.path());
    Image { directory: Some(directory), promises }
}

/// What can go wrong with a call.
fn kinds(call: &str) -> &'static [&'static str] {
    match call {
        "pwrite" => &[EIO, ENOSPC, EINTR, "short", "torn"],
        "fdatasync" => &[EIO, "lost"],
        "create" | "mkdir" | "rename" => &[EIO, ENOSPC],
        "fallocate" => &[ENOSPC, EOPNOTSUPP, EINTR, EIO],
        "pread" => &[EIO, "short"],
        _ => &[EIO],
    }
}

/// Whether nothing has failed for the program: such things happen, and are to be gone over.
fn is_harmless(fault: &Fault) -> bool {
    matches!(fault.kind, "short" | EINTR | EOPNOTSUPP)
}

/// Whether the node has to end. `None`: it may do either, as with a look at what is free.
fn must_end(fault: &Fault, at_start: bool) -> Option<bool> {
    let is_of = |names: &[&str]| names.iter().any(|name| fault.file.starts_with(name));
    match fault.call.as_str() {
        _ if is_harmless(fault) => Some(false),
        "fsync" | "flock" | "mkdir" => Some(true),
        "stat" | "fstatfs" => None,
        _ if is_of(&["#.log", "identity", "boot", "peers", "LOCK"]) => Some(true),
        // It is looked through twice.
        _ if is_of(&["."]) && at_start => None,
        _ => Some(at_start),
    }
}

/// Counts the calls of a run without a fault, and those before the node was ready.
fn count(shim: &Shim, part: Part, image: &Image) -> (BTreeMap<(String, String), usize>, Vec<Seen>) {
    let bench = Bench::new();
    let mut node = Node::new(&bench);
    image.put_in_place(&node);
    let trace = bench.path().join("trace");
    node.start(FLAGS, &shim.variables(&node.data_dir, &trace, None));
    assert!(node.wait_ready(), "{}", node.log());
    let mut at_start = BTreeMap::new();
    for call in seen(&trace) {
        *at_start.entry((call.call, call.file)).or_default() += 1;
    }
    assert_eq!(script(part, &node, &mut image.promises.clone()).unwrap(), (End::Whole, 0));
    node.kill();
    (at_start, seen(&trace))
}

#[derive(Clone, Debug)]
struct Case {
    fault: Fault,
    at_start: bool,
}

fn cases(calls: &[Seen], at_start: &BTreeMap<(String, String), usize>) -> Vec<Case> {
    let mut counts: BTreeMap<(&str, &str), usize> = BTreeMap::new();
    for call in calls {
        *counts.entry((&call.call, &call.file)).or_default() += 1;
    }
    let mut cases = Vec::new();
    for ((call, file), count) in counts {
        let before = at_start.get(&(call.to_owned(), file.to_owned())).copied().unwrap_or(0);
        for nth in 1..=count {
            for &kind in kinds(call) {
                let fault = Fault { call: call.to_owned(), file: file.to_owned(), nth, kind };
                cases.push(Case { fault, at_start: nth <= before });
            }
        }
    }
    cases
}

fn run(shim: &Shim, part: Part, image: &Image, bench: &Bench, case: &Case) -> Result<(), String> {
    let mut node = Node::new(bench);
    image.put_in_place(&node);
    let trace = bench.path().join("trace");
    let _ = std::fs::remove_file(&trace);
    let mut promises = image.promises.clone();
    node.start(FLAGS, &shim.variables(&node.data_dir, &trace, Some(&case.fault)));
    let (end, refusals) = match node.wait_ready() {
        true => script(part, &node, &mut promises)?,
        false => (End::Cut, 0),
    };
    let calls = seen(&trace);
    let Some(at) = calls.iter().position(|call| call.is_fault) else {
        // Counts of what a clock decides, or two threads at once, may differ.
        return if end == End::Whole { promises.check(&node) } else { Err("it ended without a fault".to_owned()) };
    };
    judge(case, &mut node, end, refusals)?;
    let is_log = |call: &&Seen| call.file == "#.log" && ["pwrite", "fdatasync"].contains(&call.call.as_str());
    if case.fault.file == "#.log"
        && !is_harmless(&case.fault)
        && seen(&trace)[at + 1..].iter().any(|call| is_log(&call))
    {
        return Err("it went on writing to its log".to_owned());
    }
    node.kill();
    node.start(FLAGS, &[]);
    if !node.wait_ready() {
        return Err(format!("it does not start again: {}", node.log().lines().last().unwrap_or_default()));
    }
    promises.check(&node)?;
    let names = std::fs::read_dir(&node.data_dir).unwrap().map(|entry| entry.unwrap().file_name());
    match names.into_iter().find(|name| name.to_string_lossy().ends_with(".tmp")) {
        Some(name) => Err(format!("{name:?} is left behind")),
        None => Ok(()),
    }
}

/// Whether the node did what it has to do, and said what it has to say.
fn judge(case: &Case, node: &mut Node, end: End, refusals: usize) -> Result<(), String> {
    let Case { fault, at_start } = case;
    let must_end = must_end(fault, *at_start);
    if end == End::Whole && must_end != Some(true) {
        let is_writing = ["create", "pwrite", "fdatasync", "rename"].contains(&fault.call.as_str());
        if is_harmless(fault) && refusals > 0 {
            return Err("a snapshot was refused".to_owned());
        }
        if is_harmless(fault) || !is_writing {
            return Ok(());
        }
        let log = node.log();
        let says = log.lines().any(|line| line.contains("WARN") && line.contains(stem(&fault.file)));
        return if says && refusals == 1 { Ok(()) } else { Err(format!("{refusals} refusals, and it says {says}")) };
    }
    if must_end == Some(false) {
        return Err(format!("it ended: {}", node.log().lines().last().unwrap_or_default()));
    }
    if end == End::Whole {
        // The fault may have come with the very last call.
        println!("{fault:?}: the end comes after the last answer");
    }
    let words = node.last_words()?;
    let cause = if fault.kind == ENOSPC { "No space left" } else { "Input/output error" };
    let place = if fault.file.starts_with('.') || fault.call == "flock" { "directory" } else { stem(&fault.file) };
    let way_out = fault.kind != ENOSPC || words.contains("free some space and start the node again");
    if words.contains(cause) && words.contains(place) && way_out { Ok(()) } else { Err(format!("it says: {words}")) }
}

/// What of a file's name is in what is said of it.
fn stem(class: &str) -> &str {
    class.trim_start_matches('#').trim_end_matches(".tmp")
}

fn each_call_fails(part: Part) {
    let Some(shim) = Shim::build() else { return };
    let image = image(part);
    let (at_start, calls) = count(&shim, part, &image);
    let all = cases(&calls, &at_start);
    println!("{part:?}: {} calls, {} faults", calls.len(), all.len());
    assert_complete(part, &calls);
    run_all(&format!("{part:?}"), chosen(all, STRIDE), |bench, case| run(&shim, part, &image, bench, case));
}

/// Whether the shim sees all: a file that is made is also written, synced and named by calls that it knows.
fn assert_complete(part: Part, calls: &[Seen]) {
    let has = |call: &str, file: &str| calls.iter().any(|seen| seen.call == call && seen.file == file);
    for made in calls.iter().filter(|seen| seen.call == "create" && seen.file != "LOCK") {
        for call in ["pwrite", "fdatasync", "rename"] {
            assert!(has(call, &made.file), "no {call} of {} was seen", made.file);
        }
    }
    let expected: &[(&str, &str)] = match part {
        Part::Founding => &[("mkdir", "."), ("fsync", ".."), ("flock", "LOCK"), ("fallocate", "#.log.tmp")],
        Part::Restart => {
            &[("pread", "#.log"), ("pread", "#.snapshot"), ("pread", "identity"), ("unlink", "#.snapshot")]
        }
        Part::Roll => &[("fallocate", "#.log.tmp"), ("unlink", "#.log"), ("list", "."), ("fstatfs", ".")],
    };
    for (call, file) in expected.iter().chain(&[("pwrite", "#.log"), ("fdatasync", "#.log"), ("fsync", ".")]) {
        assert!(has(call, file), "no {call} of {file} was seen in {part:?}");
    }
}

#[test]
fn each_call_of_a_founding_fails() {
    each_call_fails(Part::Founding);
}

#[test]
fn each_call_of_a_restart_fails() {
    each_call_fails(Part::Restart);
}

#[test]
fn each_call_of_a_roll_of_the_log_fails() {
    each_call_fails(Part::Roll);
}
