use std::path::{Path, PathBuf};
use std::process::Command;

use crate::support::read_text;

const SOURCE: &str = include_str!("shim.c");

/// What is to fail: the `nth` of these calls on files of this class. See `shim.c` for the words.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Fault {
    pub(crate) call: String,
    pub(crate) file: String,
    pub(crate) nth: usize,
    pub(crate) kind: &'static str,
}

/// A call on the data directory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Seen {
    pub(crate) call: String,
    pub(crate) file: String,
    pub(crate) is_fault: bool,
}

/// The compiled shim.
pub(crate) struct Shim {
    directory: tempfile::TempDir,
}

impl Shim {
    /// Compiles it. `None`, with a word about it, where the kernel or the processor can't do what it needs.
    pub(crate) fn build() -> Option<Shim> {
        let shim = Shim { directory: tempfile::tempdir().unwrap() };
        let source = shim.directory.path().join("shim.c");
        std::fs::write(&source, SOURCE).unwrap();
        let flags = ["-std=c11", "-O1", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", "-o"];
        let built = Command::new("cc").args(flags).arg(shim.library()).arg(&source).output();
        let built = built.expect("a C compiler named cc, which building the program takes as well");
        assert!(built.status.success(), "{}", String::from_utf8_lossy(&built.stderr));
        let mut probe = crate::support::program();
        probe.arg("--version").envs(shim.variables(Path::new("/nowhere/data"), &shim.directory.path().join("t"), None));
        let probe = probe.output().unwrap();
        if probe.status.code() == Some(77) {
            println!("SKIPPED: {}", String::from_utf8_lossy(&probe.stderr));
            return None;
        }
        assert!(probe.status.success(), "{probe:?}");
        Some(shim)
    }

    fn library(&self) -> PathBuf {
        self.directory.path().join("shim.so")
    }

    /// The environment of a node that is to be watched.
    pub(crate) fn variables(&self, data_dir: &Path, trace: &Path, fault: Option<&Fault>) -> Vec<(String, String)> {
        let text = |path: &Path| path.to_str().unwrap().to_owned();
        let mut variables = vec![
            ("LD_PRELOAD".to_owned(), text(&self.library())),
            ("SHIM_DIRECTORY".to_owned(), text(data_dir)),
            ("SHIM_TRACE".to_owned(), text(trace)),
        ];
        if let Some(Fault { call, file, nth, kind }) = fault {
            let nth = nth.to_string();
            let fault = [("SHIM_CALL", call.as_str()), ("SHIM_FILE", file), ("SHIM_NTH", &nth), ("SHIM_FAULT", kind)];
            variables.extend(fault.map(|(name, value)| (name.to_owned(), value.to_owned())));
        }
        variables
    }
}

/// Reads a trace.
pub(crate) fn seen(trace: &Path) -> Vec<Seen> {
    let text = read_text(trace);
    let line = |line: &str| {
        let words: Vec<&str> = line.split(' ').collect();
        assert!(words.len() >= 4, "a line of the trace: {line}");
        Seen { call: words[1].to_owned(), file: words[2].to_owned(), is_fault: words.get(4) == Some(&"FAULT") }
    };
    text.lines().map(line).collect()
}
