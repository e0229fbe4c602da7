//! What a run has started and made, so that whoever interrupts the run interrupts all of it.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

use rustix::process::{Pid, Signal, WaitOptions, kill_process, waitpid};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::iterator::Signals;

static STARTED: Mutex<Started> = Mutex::new(Started { processes: Vec::new(), directories: BTreeSet::new() });

/// Children that have not been waited for, and directories that are there.
#[derive(Debug)]
pub(crate) struct Started {
    pub(crate) processes: Vec<Pid>,
    directories: BTreeSet<PathBuf>,
}

/// What there is at the moment. Whoever starts a child or waits for one holds this meanwhile: so no number in it can
/// have been given to another process.
pub(crate) fn started() -> MutexGuard<'static, Started> {
    STARTED.lock().unwrap_or_else(PoisonError::into_inner)
}

/// From here on SIGINT, SIGTERM and SIGHUP end all children, delete all directories, and then this process.
///
/// # Errors
/// One line, when the signals cannot be watched.
pub(crate) fn watch_signals() -> Result<(), String> {
    let failed = |error: std::io::Error| format!("failed to watch for signals: {error}");
    let mut signals = Signals::new([SIGINT, SIGTERM, SIGHUP]).map_err(failed)?;
    let body = move || {
        if let Some(signal) = signals.forever().next() {
            // Never given back: nothing is started any more.
            let mut started = started();
            started.end_all();
            let _ = signal_hook::low_level::emulate_default_handler(signal);
        }
    };
    std::thread::Builder::new().name("signals".to_owned()).spawn(body).map_err(failed)?;
    Ok(())
}

impl Started {
    fn end_all(&mut self) {
        for pid in &self.processes {
            let _ = kill_process(*pid, Signal::KILL);
        }
        for pid in std::mem::take(&mut self.processes) {
            let _ = waitpid(Some(pid), WaitOptions::empty());
        }
        for directory in std::mem::take(&mut self.directories) {
            let _ = std::fs::remove_dir_all(directory);
        }
    }
}

/// A directory that goes with its owner.
#[derive(Debug)]
pub(crate) struct Directory {
    path: PathBuf,
}

impl Directory {
    /// Makes a directory in `parent`, which is made too, if need be. It is called after this process, and so is the
    /// only one of its name.
    ///
    /// # Errors
    /// One line.
    pub(crate) fn create(parent: &Path) -> Result<Self, String> {
        let failed = |error: std::io::Error| format!("failed to make a directory in {}: {error}", parent.display());
        std::fs::create_dir_all(parent).map_err(failed)?;
        let path = parent.canonicalize().map_err(failed)?.join(format!("run-{}", std::process::id()));
        // What a process of the same number has left when it was killed.
        let _ = std::fs::remove_dir_all(&path);
        started().directories.insert(path.clone());
        std::fs::create_dir(&path).map_err(failed)?;
        Ok(Self { path })
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for Directory {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.path);
        started().directories.remove(&self.path);
    }
}
