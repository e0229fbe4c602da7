//! Fail-points: the steps of persistence at which a test may end the process, as a crash would.
//!
//! With the feature `failpoints`, and only then, the environment says where:
//! `FAILPOINTS='snapshot-rename-before=3*off->return'` kills the process when it comes to that step for the fourth
//! time. Without the feature a step costs nothing.

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
];

/// The process comes to this step.
#[inline]
pub fn fail_point(name: &'static str) {
    #[cfg(feature = "failpoints")]
    fail::fail_point!(name, |_| kill_this_process());
    let _ = name;
}

/// Arms what the environment names, for as long as the returned value lives.
#[cfg(feature = "failpoints")]
pub fn arm_from_environment() -> impl Drop {
    fail::FailScenario::setup()
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
