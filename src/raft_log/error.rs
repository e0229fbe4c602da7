//! What can go wrong with the log.

use std::fmt;
use std::io;
use std::path::PathBuf;

use super::LogIdentity;

/// Why the log could not be opened, written or read. After any of them but [`LogError::Misuse`] the node has to stop.
#[derive(Debug)]
pub enum LogError {
    /// The disk failed.
    Io {
        /// What was attempted, as a verb.
        action: &'static str,
        /// On which file.
        path: PathBuf,
        /// What the disk said.
        source: io::Error,
    },
    /// The file says what no crash leaves behind. Nothing was changed.
    Corrupt {
        /// The file.
        path: PathBuf,
        /// Where in it, in bytes; the damage lies there or soon after.
        offset: u64,
        /// What is wrong there.
        reason: String,
    },
    /// The file has a format of another version of this program.
    UnsupportedVersion {
        /// The file.
        path: PathBuf,
        /// The version it says it has.
        found: u32,
    },
    /// The log belongs to another cluster, node or data directory.
    ForeignLog {
        /// The file that says so.
        path: PathBuf,
        /// Whose it is.
        found: LogIdentity,
        /// Whose it should be.
        expected: LogIdentity,
    },
    /// There is no log to open.
    Missing {
        /// The file that was looked for.
        path: PathBuf,
    },
    /// There is a log already where one was to be created.
    AlreadyExists {
        /// Its first file.
        path: PathBuf,
    },
    /// An earlier operation failed: what is on disk is in doubt until the log is opened again.
    Poisoned,
    /// The caller asked for what would break the log's rules. Nothing was written, and the log goes on.
    Misuse(String),
}

impl fmt::Display for LogError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            LogError::Io { action, path, source } => write!(f, "failed to {action} '{}': {source}", path.display()),
            LogError::Corrupt { path, offset, reason } => write!(
                f,
                "raft log '{}' is damaged at offset {offset}: {reason}; nothing was changed. Give the node its own \
                 undamaged disk back, or remove this member from the cluster and add it under a new id with an empty \
                 data directory",
                path.display()
            ),
            LogError::UnsupportedVersion { path, found } => write!(
                f,
                "raft log '{}' has format version {found}, this program knows version {}: start the program version \
                 that wrote it",
                path.display(),
                super::segment::FORMAT_VERSION
            ),
            LogError::ForeignLog { path, found, expected } => write!(
                f,
                "raft log '{}' belongs to {found}, but this is {expected}: give each node its own --data-dir",
                path.display()
            ),
            LogError::Missing { path } => write!(
                f,
                "raft log '{}' is missing: the data directory is incomplete. Give the node its own disk back, or \
                 remove this member from the cluster and add it under a new id with an empty data directory",
                path.display()
            ),
            LogError::AlreadyExists { path } => {
                write!(f, "failed to create raft log: '{}' is there already", path.display())
            }
            LogError::Poisoned => write!(f, "the raft log failed earlier and takes no more writes: restart the node"),
            LogError::Misuse(what) => write!(f, "refused to write to the raft log: {what}"),
        }
    }
}

impl std::error::Error for LogError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            LogError::Io { source, .. } => Some(source),
            _ => None,
        }
    }
}

/// Why an entry or a term cannot be had.
#[derive(Debug)]
pub enum ReadError {
    /// It lies before the log.
    Compacted,
    /// It lies behind the log.
    Unavailable,
    /// It could not be read back.
    Failed(Box<LogError>),
}

impl fmt::Display for ReadError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            ReadError::Compacted => write!(f, "the entry is compacted"),
            ReadError::Unavailable => write!(f, "the entry is not in the log"),
            ReadError::Failed(error) => error.fmt(f),
        }
    }
}

impl std::error::Error for ReadError {}
