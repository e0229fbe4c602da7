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

use base64::Engine;
use base64::prelude::BASE64_STANDARD;

/// All inputs together: they are replayed with every change, and cloned with every copy of the source.
const BYTES_MAX: usize = 300_000;

/// The inputs of a target by name: a line of its file each, the name and then the bytes in base64.
fn corpus(target: &str) -> Vec<(String, Vec<u8>)> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("fuzz/corpus/{target}.inputs"));
    let text = fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    let inputs = text.lines().map(|line| {
        let (name, input) = line.split_once(' ').expect("a name and an input");
        (name.to_owned(), BASE64_STANDARD.decode(input).expect("base64"))
    });
    let inputs: Vec<_> = inputs.collect();
    assert!(!inputs.is_empty(), "{} is empty", path.display());
    inputs
}

fn replay(target: &str, run: fn(&[u8])) {
    for (name, input) in corpus(target) {
        // The message of the panic itself stands above this one.
        panic::catch_unwind(AssertUnwindSafe(|| run(&input)))
            .unwrap_or_else(|_| panic!("it was the input {name} in fuzz/corpus/{target}.inputs"));
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
    assert_eq!(names("corpus", ".inputs"), targets, "the files in fuzz/corpus");
    assert_eq!(names("fuzz_targets", ".rs"), targets, "the programs in fuzz/fuzz_targets");
    let bytes: usize = TARGETS.iter().flat_map(|target| corpus(target)).map(|(_, input)| input.len()).sum();
    assert!(bytes <= BYTES_MAX, "the inputs have {bytes} bytes: keep fewer, see `make fuzz-corpus`");
}
