use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use tempfile::TempDir;

use crate::support::{Process, free_port, read_text};

/// The program that the walk runs; without it, the one that was built for the tests.
const BINARY_VARIABLE: &str = "README_BINARY";
/// The program as the README names it.
pub(crate) const BINARY: &str = "target/release/raftexample";
/// The ports that stand in the README, and in its walk are replaced by free ones.
pub(crate) const PORTS: [u16; 10] = [12380, 22380, 32380, 42380, 12379, 22379, 32379, 42379, 52379, 52380];

/// The checkout that the tests were built from.
pub(crate) fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
}

/// A directory with what `make` needs of a checkout to run a cluster, and ports that are free.
pub(crate) struct Checkout {
    directory: TempDir,
    binary: PathBuf,
    /// As they stand in the README, and what stands for them.
    pub(crate) ports: Vec<(String, String)>,
}

impl Checkout {
    pub(crate) fn new() -> Self {
        let directory = TempDir::new().unwrap();
        for file in ["Makefile", "Procfile", ".make/cluster.sh"] {
            let copy = directory.path().join(file);
            std::fs::create_dir_all(copy.parent().unwrap()).unwrap();
            std::fs::copy(root().join(file), copy).unwrap();
        }
        // To a terminal curl shows no progress; to the file that stands for one it would.
        std::fs::write(directory.path().join(".curlrc"), "silent\nshow-error\nnoproxy = \"*\"\n").unwrap();
        let binary = std::env::var_os(BINARY_VARIABLE).unwrap_or_else(|| env!("CARGO_BIN_EXE_raftexample").into());
        // A free port that stands in the README would be replaced by the next one.
        let free = || std::iter::repeat_with(free_port).find(|port| !PORTS.contains(port)).expect("it never ends");
        let ports = PORTS.iter().map(|port| (port.to_string(), free().to_string())).collect();
        Self { directory, binary: root().join(binary), ports }
    }

    /// A shell command, with the ports and the program of the README replaced.
    pub(crate) fn command(&self, text: &str) -> Command {
        let mut text = text.to_owned();
        for (written, free) in &self.ports {
            text = text.replace(written, free);
        }
        // Last, since a path may have any number in it.
        text = text.replace(BINARY, &self.binary.display().to_string());
        let ports = |range: &[(String, String)]| range.iter().map(|pair| pair.1.clone()).collect::<Vec<_>>().join(" ");
        let mut command = Command::new("sh");
        command.args(["-c", &text]).current_dir(self.directory.path()).stdin(Stdio::null());
        command.env("NODE_BINARY", &self.binary).env("MAKEFLAGS", "--no-print-directory");
        command.env("KEY_VALUE_PORTS", ports(&self.ports[..4])).env("PEER_PORTS", ports(&self.ports[4..8]));
        command.env("CURL_HOME", self.directory.path());
        command.env_remove("RUST_LOG").env_remove("CLUSTER_DIR").env_remove("MAKELEVEL");
        command
    }

    /// Runs a shell command to its end; its status and all that it printed.
    #[track_caller]
    pub(crate) fn run(&self, command: &mut Command) -> (Option<i32>, String) {
        let log = self.directory.path().join("output");
        // Through a file and not a pipe: the nodes that make starts go on, and hold what they have inherited.
        let status = Process::spawn(command, &log).wait();
        let output = read_text(&log);
        std::fs::remove_file(&log).unwrap();
        (status.code(), output)
    }

    /// A file of the cluster that make runs.
    pub(crate) fn cluster_file(&self, name: &str) -> PathBuf {
        self.path().join(".cluster").join(name)
    }

    pub(crate) fn path(&self) -> &Path {
        self.directory.path()
    }
}

impl Drop for Checkout {
    fn drop(&mut self) {
        // Whatever became of the test, its cluster does not outlive it.
        let _ = self.command("make clean").stdout(Stdio::null()).status();
    }
}
