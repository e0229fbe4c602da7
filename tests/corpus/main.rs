//! Replays the inputs that fuzzing has found worth keeping: they lie in `fuzz/corpus`, and each module here takes those
//! of its name. `make fuzz` looks for more of them with the same code, see `fuzz/fuzz_targets`.

#![allow(missing_docs, unreachable_pub, reason = "a test has no users")]
#![allow(clippy::result_large_err, reason = "the library's errors are passed on as they are")]

mod choices;
mod http;
mod api;
mod command;
mod snapshot;
mod raft_log;
mod forged_log;
mod peer_protocol;
mod replica;
mod peers;
mod node;

use std::fs;
use std::panic::{self, AssertUnwindSafe};
use std::path::Path;

/// All inputs together: they are replayed with every change, and cloned with every copy of the source.
const BYTES_MAX: usize = 300_000;

fn corpus(target: &str) -> Vec<(String, Vec<u8>)> {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus").join(target);
    let files = fs::read_dir(&directory).unwrap_or_else(|error| panic!("{}: {error}", directory.display()));
    let paths = files.map(|file| file.expect("the directory can be read").path());
    let mut inputs: Vec<_> =
        paths.map(|path| (path.display().to_string(), fs::read(&path).expect("the file can be read"))).collect();
    inputs.sort();
    assert!(!inputs.is_empty(), "{} is empty", directory.display());
    inputs
}

fn replay(target: &str, run: fn(&[u8])) {
    for (path, input) in corpus(target) {
        // The message of the panic itself stands above this one.
        panic::catch_unwind(AssertUnwindSafe(|| run(&input))).unwrap_or_else(|_| panic!("it was the input {path}"));
    }
}

macro_rules! targets {
    ($($target:ident)*) => {
        const TARGETS: &[&str] = &[$(stringify!($target)),*];
        mod inputs {
            $(#[test]
            fn $target() {
                super::replay(stringify!($target), super::$target::run);
            })*
        }
    };
}

targets! { http api command snapshot raft_log peer_protocol replica }

#[test]
fn every_target_has_its_few_inputs() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz");
    let names = |directory: &str, suffix: &str| {
        let files = fs::read_dir(root.join(directory)).expect("the directory is there");
        let names = files.map(|file| file.expect("it can be read").file_name().into_string().expect("names are ASCII"));
        let mut names: Vec<_> = names.map(|name| name.trim_end_matches(suffix).to_owned()).collect();
        names.sort();
        names
    };
    let mut targets: Vec<_> = TARGETS.to_vec();
    targets.sort_unstable();
    assert_eq!(names("corpus", ""), targets, "the directories in fuzz/corpus");
    assert_eq!(names("fuzz_targets", ".rs"), targets, "the programs in fuzz/fuzz_targets");
    let bytes: usize = TARGETS.iter().flat_map(|target| corpus(target)).map(|(_, input)| input.len()).sum();
    assert!(bytes <= BYTES_MAX, "the inputs have {bytes} bytes: keep fewer, see `make fuzz-corpus`");
}
