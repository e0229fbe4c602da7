//! A child process that does not outlive its owner.

use std::fs::{File, OpenOptions};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};

use super::reaper::{Started, started};

/// How often to look whether a process has ended, or does what it was started for.
pub(crate) const POLL_INTERVAL: Duration = Duration::from_millis(10);

/// How much of a log stands in an error.
const TAIL_LINES: usize = 5;

/// A child, and where its outputs go.
#[derive(Debug)]
pub(crate) struct Process {
    child: Child,
    log: PathBuf,
}

impl Process {
    /// Starts `command`, with no input, both outputs at the end of the file `log`, and in a process group of its own:
    /// a Ctrl-C is for this process, which then ends the children.
    ///
    /// # Errors
    /// One line.
    pub(crate) fn spawn(command: &mut Command, log: &Path) -> Result<Self, String> {
        let name = command.get_program().to_string_lossy().into_owned();
        let failed = |error: std::io::Error| format!("failed to start {name}: {error}");
        let file: File = OpenOptions::new().create(true).append(true).open(log).map_err(failed)?;
        command.stdin(Stdio::null()).stdout(file.try_clone().map_err(failed)?).stderr(file).process_group(0);
        let mut started = started();
        let child = command.spawn().map_err(failed)?;
        started.processes.push(Pid::from_child(&child));
        Ok(Self { child, log: log.to_owned() })
    }

    pub(crate) fn id(&self) -> u32 {
        self.child.id()
    }

    /// Sends a signal; to a process that has ended already, which has no effect.
    pub(crate) fn signal(&self, signal: Signal) {
        let _ = kill_process(Pid::from_child(&self.child), signal);
    }

    /// The exit status, once it has ended.
    ///
    /// # Errors
    /// One line, when the system does not tell.
    pub(crate) fn exit_status(&mut self) -> Result<Option<ExitStatus>, String> {
        let mut started = started();
        let status = self.child.try_wait().map_err(|error| format!("failed to ask for a child process: {error}"))?;
        if status.is_some() {
            self.forget(&mut started);
        }
        Ok(status)
    }

    /// Waits until it has ended by itself.
    ///
    /// # Errors
    /// One line, when that takes longer than `within`, or it has failed.
    pub(crate) fn wait(&mut self, within: Duration) -> Result<(), String> {
        let deadline = Instant::now() + within;
        loop {
            match self.exit_status()? {
                Some(status) if status.success() => return Ok(()),
                Some(status) => return Err(format!("a child process ended with {status}: {}", self.log_tail())),
                None if Instant::now() >= deadline => {
                    return Err(format!("a child process did not end within {within:?}: {}", self.log_tail()));
                }
                None => std::thread::sleep(POLL_INTERVAL),
            }
        }
    }

    /// Its number may be another process's from now on.
    fn forget(&self, started: &mut Started) {
        let pid = Pid::from_child(&self.child);
        started.processes.retain(|other| *other != pid);
    }

    /// The last lines of its outputs, in one line.
    pub(crate) fn log_tail(&self) -> String {
        let text = String::from_utf8_lossy(&std::fs::read(&self.log).unwrap_or_default()).into_owned();
        let lines: Vec<&str> = text.lines().collect();
        lines[lines.len().saturating_sub(TAIL_LINES)..].join(" | ")
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let mut started = started();
        // Fails if it has ended already, which is as good.
        let _ = self.child.kill();
        let _ = self.child.wait();
        self.forget(&mut started);
    }
}
