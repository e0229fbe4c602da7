use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use crate::checkout::root;

/// What a breakage may break: the promises of the README, in a word each.
const PROMISES: [&str; 6] = ["linearizable", "durable", "at most once", "available", "honest", "bounded"];

fn breakages() -> Vec<PathBuf> {
    let entries = std::fs::read_dir(root().join("tests/breakage")).unwrap();
    let mut paths: Vec<PathBuf> = entries.map(|entry| entry.unwrap().path()).collect();
    paths.sort();
    paths
}

/// Asks git whether a patch applies to the tree as it is; `None` if there is no git.
fn check(patch: &Path) -> Option<Output> {
    let mut git = Command::new("git");
    git.args(["apply", "--check"]).arg(patch).current_dir(root());
    // In a repository around this tree, git would leave out what is not part of that, and call it applied.
    let outside = root().parent().map(PathBuf::from).unwrap_or_default();
    git.env("GIT_CEILING_DIRECTORIES", outside).output().ok()
}

#[test]
fn every_breakage_applies_and_says_what_it_breaks() {
    let patches = breakages();
    assert!(patches.len() >= 8, "{patches:?}");
    let mut rotten = Vec::new();
    for patch in &patches {
        let text = std::fs::read_to_string(patch).unwrap();
        let first = text.lines().next().unwrap_or_default();
        let promises = first.trim_end_matches(").").rsplit_once(" (").map(|(_, promises)| promises).unwrap_or_default();
        let is_known = |promise: &str| PROMISES.contains(&promise);
        assert!(promises.split(", ").all(is_known), "{}: its first line is {first:?}", patch.display());
        let Some(output) = check(patch) else {
            println!("skipped: there is no git here to try the patches of `make breakage` with");
            return;
        };
        if !output.status.success() {
            rotten.push(format!("{}: {}", patch.display(), String::from_utf8_lossy(&output.stderr)));
        }
    }
    assert!(rotten.is_empty(), "these do not apply any more, make them anew:\n{}", rotten.join("\n"));
}
