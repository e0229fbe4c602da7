//! Fail-points: the steps at which a test may end the process, as a crash would, or let one of its threads sleep.
//!
//! They are the steps of persistence, and those at which work passes from one thread to another. With the feature
//! `failpoints`, and only then, the environment says where:
//! `FAILPOINTS='snapshot-rename-before=3*off->return'` kills the process when it comes to that step for the fourth
//! time, and `FAILPOINTS='disk-sync-before=20%sleep(300)'` lets every fifth thread that comes there sleep for 300 ms.
//! `return(DIRECTORY)` looks for an order whenever a thread comes to the step: a file of the step's name, which is
//! taken away. Its text is `kill`, or `hold`, which lets the thread sleep for as long as there is a file of the step's
//! name with [`HELD`] behind it. Without the feature a step costs nothing.

/// The end of the name of the file that says which thread is held. Whoever removes it lets the thread go.
pub const HELD: &str = ".held";

/// The steps, in the order of a node's life. `disk-` stands for every file, that is mostly the log; of the others each
/// is one place.
pub const FAIL_POINTS: &[&str] = &[
    "identity-before",
    "identity-after",
    "founding-snapshot-after",
    "founding-log-after",
    "boot-before",
    "boot-after",
    "atomic-temporary-after",
    "atomic-rename-after",
    "log-write-before",
    "log-write-after",
    "disk-create-after",
    "disk-write-before",
    "disk-write-after",
    "disk-sync-before",
    "disk-sync-after",
    "disk-rename-before",
    "disk-rename-after",
    "disk-directory-sync-before",
    "disk-directory-sync-after",
    "disk-remove-before",
    "disk-remove-after",
    "snapshot-temporary-before",
    "snapshot-temporary-written",
    "snapshot-temporary-synced",
    "snapshot-rename-before",
    "snapshot-rename-after",
    "snapshot-directory-synced",
    "snapshot-marker-before",
    "snapshot-marker-after",
    "log-compact-before",
    "log-compact-after",
    "snapshot-removal-before",
    "snapshot-removal-after",
    "receive-before",
    "receive-piece",
    "receive-verified",
    "receive-in-place",
    "install-before",
    "install-after",
    "restore-before",
    "restore-after",
    "receive-report-before",
    "loop-submit-before",
    "driver-events-taken",
    "driver-send-before",
    "driver-batch-before",
    "driver-batch-after",
    "applier-batch-taken",
    "applier-publish-before",
    "applier-answer-before",
    "applier-wake-before",
    "snapshot-order-before",
    "snapshot-order-taken",
    "snapshot-report-before",
    "peer-write-before",
    "peer-deliver-before",
];

/// The process comes to this step.
#[inline]
pub fn fail_point(name: &'static str) {
    #[cfg(feature = "failpoints")]
    fail::fail_point!(name, |directory: Option<String>| match directory {
        None => kill_this_process(),
        Some(directory) => obey(std::path::Path::new(&directory), name),
    });
    let _ = name;
}

/// Arms what the environment names, for as long as the returned value lives.
#[cfg(feature = "failpoints")]
pub fn arm_from_environment() -> impl Drop {
    fail::FailScenario::setup()
}

/// Does what lies in `directory` to be done at the step `name`, once.
#[cfg(feature = "failpoints")]
fn obey(directory: &std::path::Path, name: &str) {
    let held = directory.join(format!("{name}{HELD}"));
    // Of several threads that come here at once one gets it.
    if std::fs::rename(directory.join(name), &held).is_err() {
        return;
    }
    if std::fs::read(&held).is_ok_and(|order| order == b"kill") {
        kill_this_process();
    }
    while held.exists() {
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
}

/// As `kill -9` does it: nothing is flushed, no destructor runs, and no other thread gets a word in.
#[cfg(feature = "failpoints")]
fn kill_this_process() {
    let _ = rustix::process::kill_process(rustix::process::getpid(), rustix::process::Signal::KILL);
    loop {
        std::thread::park();
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;
    use std::path::Path;

    use super::FAIL_POINTS;

    /// All `fail_point("...")` under a directory.
    fn names_in(directory: &Path, names: &mut Vec<String>) {
        for entry in std::fs::read_dir(directory).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                names_in(&path, names);
            } else if !path.ends_with("fail_point.rs") {
                let text = std::fs::read_to_string(&path).unwrap();
                let calls = text.split("fail_point(\"").skip(1);
                names.extend(calls.map(|rest| rest.split('"').next().unwrap_or_default().to_owned()));
            }
        }
    }

    #[test]
    fn the_table_lists_every_step_in_the_source_once() {
        let mut names = Vec::new();
        names_in(&Path::new(env!("CARGO_MANIFEST_DIR")).join("src"), &mut names);
        let found: BTreeSet<&str> = names.iter().map(String::as_str).collect();
        assert_eq!(found.len(), names.len(), "each step is one place: {names:?}");
        assert_eq!(found, FAIL_POINTS.iter().copied().collect());
        assert_eq!(found.len(), FAIL_POINTS.len());
    }
}
