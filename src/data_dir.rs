//! A node's data directory: who it belongs to, its snapshots, and what a start makes of them.
//!
//! | file | holds |
//! |---|---|
//! | `identity` | cluster, node and directory id; written once, before anything else |
//! | `peers` | the data directories of the peers that were met |
//! | `boot` | the numbers of the latest starts of the node; its first writing completes the founding |
//! | `<index>.snapshot` | the state at that applied index, 16 hexadecimal digits |
//! | `<index>.log` | a segment of the log |
//! | `*.tmp` | a file that was being written when the node died; removed at the next start |
//!
//! All state is at all times the newest snapshot that the log names, and the log behind it. A founder begins with a
//! snapshot of the founding state at [`FOUNDING_INDEX`]; a joiner with nothing, at index 0.

use std::fmt;
use std::io::{self, Read, Write};
use std::sync::Arc;

use raft::eraftpb::HardState;

use crate::codec::{self, Fields};
use crate::disk::{self, Disk, DiskFile, remove_if_there};
use crate::fail_point::fail_point;
use crate::membership::{ClusterId, Membership, NodeId};
use crate::message::SnapshotInfo;
use crate::raft_core::{FOUNDING_INDEX, FOUNDING_TERM};
use crate::raft_log::{LogError, LogIdentity, LogOptions, Marker, RaftLog};
use crate::snapshot::{self, SnapshotError};
use crate::store::{Capture, StateMachine};

const IDENTITY: &str = "identity";
const BOOT: &str = "boot";
const TEMPORARY: &str = ".tmp";
const SNAPSHOT: &str = ".snapshot";
const LOG: &str = ".log";
const VERSION: u8 = 1;

/// The longest small file, in bytes: all are far shorter.
const SMALL_FILE_BYTES_MAX: u64 = 64 << 10;

/// Bytes of a snapshot that are gathered before they are written, or read at once.
const SNAPSHOT_BUFFER_BYTES: usize = 256 << 10;

/// Earlier starts that a directory remembers, at most. A peer that has met one of them can tell by it a directory that has
/// gone on from an older copy; one that has not heard of this node for more starts than these can't.
pub const EARLIER_BOOTS_MAX: usize = 32;

/// How a node with an empty data directory begins.
#[derive(Clone, Debug)]
pub enum Beginning {
    /// As a founder of the cluster with these members.
    Found(Membership),
    /// As a joiner, who is sent everything.
    Join,
}

/// What [`open`] is told.
#[derive(Clone, Debug)]
pub struct OpenOptions {
    /// This node.
    pub id: NodeId,
    /// The cluster, if the directory is new.
    pub cluster: ClusterId,
    /// How to begin, if the directory is new.
    pub beginning: Beginning,
    /// Names a new directory; random.
    pub directory: u128,
    /// The lower half of this run's boot number; random.
    pub boot_random: u32,
    /// The log's settings.
    pub log: LogOptions,
}

/// A data directory at the start of a run.
pub struct Opened {
    /// Cluster, node and directory.
    pub identity: LogIdentity,
    /// Names this run of the node; greater than that of every run before. How often the node was started is in the upper
    /// half.
    pub boot: u64,
    /// Names the runs before, the latest first, at most [`EARLIER_BOOTS_MAX`].
    pub earlier_boots: Vec<u64>,
    /// The log behind the snapshot.
    pub log: RaftLog,
    /// The state that the snapshot holds.
    pub state: StateMachine,
    /// The membership that the snapshot holds.
    pub membership: Arc<Membership>,
    /// The snapshot's index; 0 for a joiner that has none.
    pub snapshot_index: u64,
}

/// Why a data directory can't be used.
#[derive(Debug)]
pub enum DataError {
    /// A file can't be read or written.
    Io {
        /// What was attempted, on which file.
        what: String,
        /// The cause.
        source: io::Error,
    },
    /// A file is in its place, and the directory could not be synced. Ends the node, see [`DataError::is_fatal`].
    Unsynced {
        /// The file.
        name: String,
        /// The cause.
        source: io::Error,
    },
    /// The log can't be used.
    Log(Box<LogError>),
    /// Something does not fit; the text says what, and the way out.
    Unusable(String),
}

impl DataError {
    /// Whether the node has to end. Most failures leave what counts as it was: a file that can't be completed or synced
    /// is removed, and nobody has counted on it. But after a failed sync of the directory nobody knows which names are
    /// durable, and the system reports it once: a later sync for another file, such as the log's next segment, may
    /// succeed although this one is lost.
    pub fn is_fatal(&self) -> bool {
        matches!(self, DataError::Unsynced { .. })
    }

    /// Whether the disk was full.
    pub fn is_full(&self) -> bool {
        match self {
            DataError::Io { source, .. } => source.kind() == io::ErrorKind::StorageFull,
            DataError::Log(error) => {
                matches!(&**error, LogError::Io { source, .. } if source.kind() == io::ErrorKind::StorageFull)
            }
            _ => false,
        }
    }
}

impl fmt::Display for DataError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            DataError::Io { what, source } => write!(f, "failed to {what}: {source}"),
            DataError::Unsynced { name, source } => write!(
                f,
                "failed to sync the directory of '{name}': {source}; what it holds is in doubt: check the disk, and start \
                 the node again"
            ),
            DataError::Log(source) => write!(f, "{source}"),
            DataError::Unusable(reason) => f.write_str(reason),
        }
    }
}

impl std::error::Error for DataError {}

impl From<LogError> for DataError {
    fn from(source: LogError) -> Self {
        DataError::Log(Box::new(source))
    }
}

fn io_error(what: impl Into<String>) -> impl FnOnce(io::Error) -> DataError {
    let what = what.into();
    move |source| DataError::Io { what, source }
}

/// Opens a data directory, founds it if it is new, and counts the start.
pub fn open(disk: &Arc<dyn Disk>, options: &OpenOptions) -> Result<Opened, DataError> {
    let names = disk.list().map_err(io_error("list the data directory"))?;
    for name in names.iter().filter(|name| name.ends_with(TEMPORARY)) {
        log::info!("removing {name}, which was being written when the node ended");
        disk.remove(name).map_err(io_error(format!("remove {name}")))?;
    }
    let stored = if let Some(stored) = read_identity(disk, options.id)? {
        Some(stored)
    } else if let Some(name) = names.iter().find(|name| name.ends_with(LOG) || name.ends_with(SNAPSHOT)) {
        return Err(DataError::Unusable(format!(
            "the data directory holds {name} but no file '{IDENTITY}': it is not complete; restore it, or remove this \
             member from the cluster and add it under a new id with an empty directory"
        )));
    } else {
        None
    };
    let mut earlier_boots = read_boots(disk)?;
    let boots = (earlier_boots.first().unwrap_or(&0) >> 32) as u32;
    let identity = match stored {
        Some(stored) if boots > 0 => stored,
        stored => {
            if let Some(stored) = stored {
                remove_unfinished(disk, stored, options)?;
            }
            let identity = LogIdentity { cluster: options.cluster, node: options.id, directory: options.directory };
            fail_point("identity-before");
            write_sealed(disk, IDENTITY, encode_identity(&identity))?;
            fail_point("identity-after");
            identity
        }
    };
    let log = if boots == 0 {
        found(disk, &identity, options)?
    } else if RaftLog::exists(&**disk).map_err(io_error("look for the log"))? {
        RaftLog::open(disk.clone(), identity, options.log)?
    } else {
        return Err(DataError::Unusable(
            "the log is missing from the data directory of a node that has run: restore it, or remove this member from \
             the cluster and add it under a new id with an empty directory"
                .to_owned(),
        ));
    };
    let boots = boots.checked_add(1).ok_or_else(|| DataError::Unusable("too many starts".to_owned()))?;
    let boot = (u64::from(boots) << 32) | u64::from(options.boot_random);
    earlier_boots.truncate(EARLIER_BOOTS_MAX);
    fail_point("boot-before");
    write_sealed(disk, BOOT, encode_boots(boot, &earlier_boots))?;
    fail_point("boot-after");
    let (state, membership, snapshot_index) = load_newest(disk, identity.cluster, &log)?;
    Ok(Opened { identity, boot, earlier_boots, log, state, membership, snapshot_index })
}

/// Removes what is left of a founding that was cut short before the first boot was counted: nothing was ever served or
/// sent from there, so it is made again.
fn remove_unfinished(disk: &Arc<dyn Disk>, identity: LogIdentity, options: &OpenOptions) -> Result<(), DataError> {
    let names = disk.list().map_err(io_error("list the data directory"))?;
    let is_of_log = |name: &&String| name.ends_with(LOG);
    let is_snapshot = |name: &&String| name.ends_with(SNAPSHOT);
    let mut has_run = names.iter().filter(is_snapshot).any(|name| *name != SnapshotFiles::name(FOUNDING_INDEX));
    if names.iter().any(|name| name.ends_with(LOG)) {
        let log = RaftLog::open(disk.clone(), identity, options.log)?;
        let HardState { term, vote, commit, .. } = *log.hard_state();
        has_run |= log.last_index() > FOUNDING_INDEX || term > FOUNDING_TERM || vote != 0 || commit > FOUNDING_INDEX;
    }
    if has_run {
        return Err(DataError::Unusable(format!(
            "the file '{BOOT}' is missing from the data directory of a node that has run: restore it, or remove this \
             member from the cluster and add it under a new id with an empty directory"
        )));
    }
    log::info!("founding again: the first start was cut short");
    // The log first: without it nobody asks for the snapshot.
    for name in names.iter().filter(is_of_log).chain(names.iter().filter(is_snapshot)) {
        disk.remove(name).map_err(io_error(format!("remove {name}")))?;
    }
    disk.sync_directory().map_err(io_error("sync the data directory"))
}

fn found(disk: &Arc<dyn Disk>, identity: &LogIdentity, options: &OpenOptions) -> Result<RaftLog, DataError> {
    let (marker, hard_state) = match &options.beginning {
        Beginning::Found(membership) => {
            let mut state = StateMachine::new();
            state.advance(FOUNDING_INDEX, FOUNDING_TERM);
            let capture = state.capture(Arc::new(membership.clone()));
            SnapshotFiles::new(disk.clone(), identity.cluster).write(&capture)?;
            fail_point("founding-snapshot-after");
            let marker =
                Marker { index: FOUNDING_INDEX, term: FOUNDING_TERM, conf_state: membership.conf_state.clone() };
            (marker, HardState { term: FOUNDING_TERM, vote: 0, commit: FOUNDING_INDEX, ..HardState::default() })
        }
        Beginning::Join => (Marker { index: 0, term: 0, conf_state: Default::default() }, HardState::default()),
    };
    let log = RaftLog::create(disk.clone(), *identity, options.log, marker, hard_state)?;
    fail_point("founding-log-after");
    Ok(log)
}

/// The newest snapshot that the log names and that is whole, provided that the log goes on behind it.
fn load_newest(
    disk: &Arc<dyn Disk>,
    cluster: ClusterId,
    log: &RaftLog,
) -> Result<(StateMachine, Arc<Membership>, u64), DataError> {
    let files = SnapshotFiles::new(disk.clone(), cluster);
    let mut damage = String::new();
    for marker in log.markers().rev() {
        if marker.index == 0 {
            return Ok((StateMachine::new(), Arc::new(Membership::default()), 0));
        }
        if marker.index + 1 < log.first_index() {
            break;
        }
        match files.load(marker.index) {
            Ok((state, membership)) => {
                files.remove_all_but(marker.index)?;
                return Ok((state, membership, marker.index));
            }
            Err(error) => {
                log::warn!("{error}; looking for an older snapshot that the log still covers");
                if damage.is_empty() {
                    damage = error.to_string();
                }
            }
        }
    }
    Err(DataError::Unusable(format!(
        "{damage}, and no older snapshot with the log behind it is left: restore the data directory, or remove this \
         member from the cluster and add it under a new id with an empty directory"
    )))
}

fn encode_identity(identity: &LogIdentity) -> Vec<u8> {
    let mut out = identity.cluster.0.to_vec();
    codec::put_u64(&mut out, identity.node);
    codec::put_u128(&mut out, identity.directory);
    seal(&out)
}

fn encode_boots(boot: u64, earlier: &[u64]) -> Vec<u8> {
    let mut out = Vec::new();
    codec::put_u32(&mut out, 1 + earlier.len() as u32);
    [boot].iter().chain(earlier).for_each(|boot| codec::put_u64(&mut out, *boot));
    seal(&out)
}

/// A small file's content with its version before it and its checksum behind it.
pub(crate) fn seal(content: &[u8]) -> Vec<u8> {
    let mut out = vec![VERSION];
    out.extend_from_slice(content);
    let sum = crc32c::crc32c(&out);
    codec::put_u32(&mut out, sum);
    out
}

/// Writes a small sealed file so that it is there whole, or as it was.
pub(crate) fn write_sealed(disk: &Arc<dyn Disk>, name: &str, sealed: Vec<u8>) -> Result<(), DataError> {
    disk::replace(&**disk, name, &sealed).map_err(io_error(format!("write '{name}'")))?;
    sync_name(&**disk, name)
}

/// Makes the name of a file durable that was just put in place.
fn sync_name(disk: &dyn Disk, name: &str) -> Result<(), DataError> {
    disk.sync_directory().map_err(|source| DataError::Unsynced { name: name.to_owned(), source })
}

/// Reads the content of a small sealed file; `None` if there is no such file.
pub(crate) fn read_sealed(disk: &Arc<dyn Disk>, name: &str) -> Result<Option<Vec<u8>>, DataError> {
    let file = match disk.open(name) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(io_error(format!("open '{name}'"))(error)),
    };
    let len = file.len().map_err(io_error(format!("read '{name}'")))?;
    let mut bytes = vec![0; len.min(SMALL_FILE_BYTES_MAX) as usize];
    let got = read_full(&*file, &mut bytes, 0).map_err(io_error(format!("read '{name}'")))?;
    bytes.truncate(got);
    let damaged = || {
        DataError::Unusable(format!(
            "the file '{name}' of the data directory is damaged: restore the directory, or remove this member from the \
             cluster and add it under a new id with an empty directory"
        ))
    };
    let (body, sum) = bytes.split_last_chunk::<4>().ok_or_else(damaged)?;
    if crc32c::crc32c(body) != u32::from_le_bytes(*sum) {
        return Err(damaged());
    }
    match body.split_first() {
        Some((&VERSION, rest)) => Ok(Some(rest.to_vec())),
        Some((version, _)) => Err(DataError::Unusable(format!(
            "the file '{name}' of the data directory has format {version}, and this version knows {VERSION}: start a \
             newer version"
        ))),
        None => Err(damaged()),
    }
}

fn read_identity(disk: &Arc<dyn Disk>, id: NodeId) -> Result<Option<LogIdentity>, DataError> {
    let Some(bytes) = read_sealed(disk, IDENTITY)? else { return Ok(None) };
    let decode = || -> Result<LogIdentity, codec::Malformed> {
        let mut fields = Fields::new(&bytes, "identity");
        let identity =
            LogIdentity { cluster: ClusterId(fields.bytes16()?), node: fields.u64()?, directory: fields.u128()? };
        fields.finish()?;
        Ok(identity)
    };
    let identity = decode().map_err(|error| DataError::Unusable(format!("the data directory has a {error}")))?;
    if identity.node != id {
        return Err(DataError::Unusable(format!(
            "the data directory belongs to node {}, and this is node {id}: give --id {} or another --data-dir",
            identity.node, identity.node
        )));
    }
    Ok(Some(identity))
}

/// Whether nothing was ever founded in this directory.
///
/// # Errors
/// If that can't be read.
pub fn is_new(disk: &Arc<dyn Disk>, id: NodeId) -> Result<bool, DataError> {
    Ok(read_identity(disk, id)?.is_none())
}

/// The latest starts, the latest first; none if there was none.
fn read_boots(disk: &Arc<dyn Disk>) -> Result<Vec<u64>, DataError> {
    let Some(bytes) = read_sealed(disk, BOOT)? else { return Ok(Vec::new()) };
    let decode = || {
        let mut fields = Fields::new(&bytes, "list of starts");
        let boots = (0..fields.count(8)?).map(|_| fields.u64()).collect::<Result<Vec<u64>, _>>()?;
        // A directory that has this file has started, and an empty list would have it founded again.
        if boots.is_empty() { Err(fields.malformed()) } else { fields.finish().map(|()| boots) }
    };
    decode().map_err(|error| DataError::Unusable(format!("the data directory has a {error}")))
}

fn read_full(file: &dyn DiskFile, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
    let mut got = 0;
    while got < buffer.len() {
        match file.read_at(&mut buffer[got..], offset + got as u64)? {
            0 => break,
            some => got += some,
        }
    }
    Ok(got)
}

/// A snapshot that a peer has sent: in place, durable, and read.
pub struct Received {
    /// The state that it holds.
    pub state: StateMachine,
    /// The membership that it holds.
    pub membership: Arc<Membership>,
    /// Its index and size.
    pub info: SnapshotInfo,
}

/// The snapshot files of one data directory.
#[derive(Clone)]
pub struct SnapshotFiles {
    disk: Arc<dyn Disk>,
    cluster: ClusterId,
}

impl SnapshotFiles {
    /// The snapshots on `disk`, which are of `cluster`.
    pub fn new(disk: Arc<dyn Disk>, cluster: ClusterId) -> SnapshotFiles {
        SnapshotFiles { disk, cluster }
    }

    fn name(index: u64) -> String {
        format!("{index:016x}{SNAPSHOT}")
    }

    /// Writes a snapshot so that it is there whole, or not at all: temporary file, sync, rename, sync of the directory.
    pub fn write(&self, capture: &Capture) -> Result<SnapshotInfo, DataError> {
        self.write_then(capture, &mut || {})
    }

    /// The same, with a call before it gets its name: writing takes long, and older ones may be removable by then.
    pub fn write_then(&self, capture: &Capture, written: &mut dyn FnMut()) -> Result<SnapshotInfo, DataError> {
        let name = Self::name(capture.index());
        // Tried all the same, it would take the last of the space from the log before it fails.
        self.check_room(&name, capture.visible().0.bytes())?;
        let temporary = format!("{name}{TEMPORARY}");
        fail_point("snapshot-temporary-before");
        let bytes = self.fill(&temporary, &mut |file| {
            snapshot::write(capture, self.cluster, &mut &mut *file)?;
            fail_point("snapshot-temporary-written");
            Ok(())
        })?;
        fail_point("snapshot-temporary-synced");
        written();
        fail_point("snapshot-rename-before");
        self.rename(&temporary, &name)?;
        fail_point("snapshot-rename-after");
        sync_name(&*self.disk, &name)?;
        fail_point("snapshot-directory-synced");
        Ok(SnapshotInfo { index: capture.index(), bytes })
    }

    /// Whether a snapshot of so many bytes fits the disk.
    ///
    /// # Errors
    /// `StorageFull` if it does not.
    pub fn check_room(&self, name: &str, bytes: u64) -> Result<(), DataError> {
        let free = self.disk.free_bytes().map_err(io_error("ask for the free space of the data directory"))?;
        if bytes <= free {
            return Ok(());
        }
        let source = io::Error::new(io::ErrorKind::StorageFull, format!("{bytes} bytes are needed, {free} are free"));
        Err(DataError::Io { what: format!("write {name}"), source })
    }

    /// Stores the snapshot of `index` that a peer sends, reads it back, and puts it in place only then.
    ///
    /// # Errors
    /// If that fails; if it is not whole; if it is not the state of this cluster at this index and `term`; or if another
    /// one of that index is here, which the log may name: what a peer sends does not take its place.
    pub fn receive(&self, index: u64, term: u64, body: &mut dyn Read) -> Result<Received, DataError> {
        let name = Self::name(index);
        let temporary = format!("{name}.received{TEMPORARY}");
        fail_point("receive-before");
        let bytes = self.fill(&temporary, &mut |file| {
            let mut pieces = ReceivedPieces(body);
            io::copy(&mut pieces, file).map(drop)
        })?;
        let loaded = self.load_from(&temporary, index).and_then(|contents| match contents.header.term == term {
            true => Ok(contents),
            false => Err(DataError::Unusable(format!(
                "the snapshot {name} is of term {}, and was announced with term {term}",
                contents.header.term
            ))),
        });
        let loaded = loaded.and_then(|contents| self.check_place(&temporary, index).map(|()| contents));
        match loaded {
            Ok(snapshot::Contents { state, membership, .. }) => {
                fail_point("receive-verified");
                self.rename(&temporary, &name)?;
                sync_name(&*self.disk, &name)?;
                fail_point("receive-in-place");
                Ok(Received { state, membership: Arc::new(membership), info: SnapshotInfo { index, bytes } })
            }
            Err(error) => {
                remove_if_there(&*self.disk, &temporary).map_err(io_error(format!("remove {temporary}")))?;
                Err(error)
            }
        }
    }

    /// Whether the file may take the place of a snapshot of this index: there is none, or the same, or a damaged one.
    fn check_place(&self, file: &str, index: u64) -> Result<(), DataError> {
        let name = Self::name(index);
        let names = self.disk.list().map_err(io_error("list the data directory"))?;
        if !names.contains(&name) || self.same_bytes(file, &name)? || self.load_from(&name, index).is_err() {
            return Ok(());
        }
        Err(DataError::Unusable(format!("the snapshot {name} is here already, and was received with another content")))
    }

    fn same_bytes(&self, left: &str, right: &str) -> Result<bool, DataError> {
        let read = || {
            let (left, right) = (self.disk.open(left)?, self.disk.open(right)?);
            let mut pieces = [vec![0; SNAPSHOT_BUFFER_BYTES], vec![0; SNAPSHOT_BUFFER_BYTES]];
            let mut offset = 0;
            loop {
                let [left_piece, right_piece] = &mut pieces;
                let got = read_full(&*left, left_piece, offset)?;
                if read_full(&*right, right_piece, offset)? != got || left_piece[..got] != right_piece[..got] {
                    return Ok(false);
                }
                if got == 0 {
                    return Ok(true);
                }
                offset += got as u64;
            }
        };
        read().map_err(io_error(format!("compare {left} to {right}")))
    }

    /// Writes and syncs a file; its length. A file that can't be completed is removed.
    fn fill(&self, name: &str, fill: &mut dyn FnMut(&mut dyn Write) -> io::Result<()>) -> Result<u64, DataError> {
        remove_if_there(&*self.disk, name).map_err(io_error(format!("remove {name}")))?;
        let mut file = self.disk.create(name, 0).map_err(io_error(format!("create {name}")))?;
        let mut sink = FileSink { file: &mut *file, offset: 0, buffer: Vec::with_capacity(SNAPSHOT_BUFFER_BYTES) };
        let filled = fill(&mut sink).and_then(|()| sink.flush());
        let bytes = sink.offset;
        match filled.and_then(|()| file.sync_data()) {
            Ok(()) => Ok(bytes),
            Err(source) => {
                drop(file);
                // If this fails as well, the next start removes it.
                let _ = self.disk.remove(name);
                Err(DataError::Io { what: format!("write {name}"), source })
            }
        }
    }

    fn rename(&self, temporary: &str, name: &str) -> Result<(), DataError> {
        self.disk.rename(temporary, name).map_err(io_error(format!("rename {temporary} to {name}")))
    }

    fn check_header(&self, name: &str, header: &snapshot::Header, index: u64) -> Result<(), DataError> {
        if (header.cluster, header.index) == (self.cluster, index) {
            return Ok(());
        }
        let (cluster, index) = (header.cluster, header.index);
        Err(DataError::Unusable(format!("the snapshot {name} is of cluster {cluster} at index {index}")))
    }

    /// Reads a snapshot and checks every byte of it.
    pub fn load(&self, index: u64) -> Result<(StateMachine, Arc<Membership>), DataError> {
        let contents = self.load_from(&Self::name(index), index)?;
        Ok((contents.state, Arc::new(contents.membership)))
    }

    fn load_from(&self, name: &str, index: u64) -> Result<snapshot::Contents, DataError> {
        let file = self.disk.open(name).map_err(io_error(format!("open the snapshot {name}")))?;
        let mut source = FileSource { file: &*file, offset: 0, buffer: Vec::new(), position: 0 };
        let contents = snapshot::read(&mut source).map_err(|error| unusable(name, &error))?;
        self.check_header(name, &contents.header, index)?;
        Ok(contents)
    }

    /// Opens a snapshot to send it; it stays readable when the file is removed meanwhile. Also its size in bytes.
    pub fn open(&self, index: u64) -> Result<(Box<dyn DiskFile>, u64), DataError> {
        let name = Self::name(index);
        let file = self.disk.open(&name).map_err(io_error(format!("open the snapshot {name}")))?;
        let bytes = file.len().map_err(io_error(format!("read the snapshot {name}")))?;
        Ok((file, bytes))
    }

    /// Removes every snapshot but the one of `index`.
    pub fn remove_all_but(&self, index: u64) -> Result<(), DataError> {
        let keep = Self::name(index);
        let names = self.disk.list().map_err(io_error("list the data directory"))?;
        for name in names.iter().filter(|name| name.ends_with(SNAPSHOT) && **name != keep) {
            self.disk.remove(name).map_err(io_error(format!("remove the snapshot {name}")))?;
        }
        Ok(())
    }

    /// Removes the snapshots older than `index`.
    pub fn remove_older(&self, index: u64) -> Result<(), DataError> {
        let keep = Self::name(index);
        let names = self.disk.list().map_err(io_error("list the data directory"))?;
        // Names of equal length with fixed-width numbers sort as their numbers do.
        for name in names.iter().filter(|name| name.ends_with(SNAPSHOT) && **name < keep) {
            fail_point("snapshot-removal-before");
            self.disk.remove(name).map_err(io_error(format!("remove the snapshot {name}")))?;
            fail_point("snapshot-removal-after");
        }
        Ok(())
    }
}

fn unusable(name: &str, error: &SnapshotError) -> DataError {
    DataError::Unusable(format!("the snapshot {name} can't be used: {error}"))
}

/// What a peer sends, piece by piece.
struct ReceivedPieces<'a>(&'a mut dyn Read);

impl Read for ReceivedPieces<'_> {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        let got = self.0.read(out)?;
        fail_point("receive-piece");
        Ok(got)
    }
}

struct FileSink<'a> {
    file: &'a mut dyn DiskFile,
    offset: u64,
    buffer: Vec<u8>,
}

impl Write for FileSink<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.buffer.len() + bytes.len() > SNAPSHOT_BUFFER_BYTES {
            self.flush()?;
        }
        self.buffer.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.file.write_all_at(&self.buffer, self.offset)?;
        self.offset += self.buffer.len() as u64;
        self.buffer.clear();
        Ok(())
    }
}

/// A file from its beginning, read in large pieces.
struct FileSource<'a> {
    file: &'a dyn DiskFile,
    offset: u64,
    buffer: Vec<u8>,
    position: usize,
}

impl Read for FileSource<'_> {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        if self.position == self.buffer.len() {
            self.buffer.resize(SNAPSHOT_BUFFER_BYTES, 0);
            let got = read_full(self.file, &mut self.buffer, self.offset)?;
            self.buffer.truncate(got);
            self.offset += got as u64;
            self.position = 0;
        }
        let some = out.len().min(self.buffer.len() - self.position);
        out[..some].copy_from_slice(&self.buffer[self.position..self.position + some]);
        self.position += some;
        Ok(some)
    }
}

#[cfg(test)]
mod tests {
    use raft::eraftpb::Entry;

    use super::*;
    use crate::fixtures::{CLUSTER, founders};
    use crate::memory_disk::{Failure, MemoryDisk, Operation};
    use crate::raft_log::Batch;

    /// Segments that a disk in memory need not be asked for.
    const SMALL: LogOptions = LogOptions { segment_bytes: 16 << 10, cache_bytes: 1 << 20 };

    fn options(beginning: Beginning) -> OpenOptions {
        OpenOptions { id: 1, cluster: CLUSTER, beginning, directory: 7, boot_random: 5, log: SMALL }
    }

    fn open_as_founder(disk: &MemoryDisk) -> Result<Opened, DataError> {
        let disk: Arc<dyn Disk> = Arc::new(disk.clone());
        open(&disk, &options(Beginning::Found(founders(3))))
    }

    #[track_caller]
    fn refused(disk: &MemoryDisk) -> String {
        open_as_founder(disk).err().expect("it should not open").to_string()
    }

    fn marker(index: u64) -> Marker {
        Marker { index, term: 1, conf_state: founders(3).conf_state }
    }

    fn advance_to(state: &mut StateMachine, index: u64) {
        for index in state.applied_index() + 1..=index {
            state.advance(index, 1);
        }
    }

    /// A snapshot at `index` on disk, and its marker in the log, which holds entries behind it.
    fn take_snapshot(disk: &MemoryDisk, opened: &mut Opened, index: u64) {
        while opened.log.last_index() < index + 5 {
            let entry = Entry { index: opened.log.last_index() + 1, term: 1, ..Entry::default() };
            let commit = HardState { term: 1, commit: entry.index, ..HardState::default() };
            opened.log.write(&Batch { marker: None, entries: &[entry], hard_state: Some(&commit) }, true).unwrap();
        }
        advance_to(&mut opened.state, index);
        let files = SnapshotFiles::new(Arc::new(disk.clone()), opened.identity.cluster);
        files.write(&opened.state.capture(opened.membership.clone())).unwrap();
        opened.log.write(&Batch { marker: Some(&marker(index)), entries: &[], hard_state: None }, true).unwrap();
    }

    #[test]
    fn a_founding_is_made_again_until_its_boot_is_counted_wherever_it_is_cut() {
        for beginning in [Beginning::Found(founders(3)), Beginning::Join] {
            let index = if matches!(beginning, Beginning::Join) { 0 } else { FOUNDING_INDEX };
            for cut in 1.. {
                let disk = MemoryDisk::new();
                let shared: Arc<dyn Disk> = Arc::new(disk.clone());
                disk.stop_at(cut);
                let whole = open(&shared, &options(beginning.clone())).is_ok();
                for crash in 0..4 {
                    let disk = disk.fork();
                    disk.clear_faults();
                    disk.crash(cut * 10 + crash);
                    let shared: Arc<dyn Disk> = Arc::new(disk.clone());
                    let opened = open(&shared, &options(beginning.clone()));
                    let opened = opened.unwrap_or_else(|error| panic!("cut at {cut}: {error}"));
                    assert_eq!((opened.snapshot_index, opened.log.last_index()), (index, index), "cut at {cut}");
                    assert_eq!(opened.membership.members.is_empty(), index == 0);
                    drop(opened);
                    let again = open(&shared, &options(beginning.clone())).unwrap();
                    assert!(again.boot >> 32 >= 2);
                }
                if whole {
                    assert!(cut > 10, "so few steps?");
                    break;
                }
            }
        }
    }

    #[test]
    fn a_directory_that_lost_its_boot_counter_or_its_log_is_refused() {
        let disk = MemoryDisk::new();
        let mut opened = open_as_founder(&disk).unwrap();
        let vote = HardState { term: 2, vote: 3, commit: FOUNDING_INDEX, ..HardState::default() };
        opened.log.write(&Batch { marker: None, entries: &[], hard_state: Some(&vote) }, true).unwrap();
        drop(opened);
        let without_boot = disk.fork();
        without_boot.remove(BOOT).unwrap();
        assert!(refused(&without_boot).contains("the file 'boot' is missing"));
        for name in disk.list().unwrap().iter().filter(|name| name.ends_with(LOG)) {
            disk.remove(name).unwrap();
        }
        assert!(refused(&disk).contains("the log is missing"));
    }

    #[test]
    fn a_damaged_snapshot_is_replaced_by_an_older_one_only_if_the_log_covers_the_gap() {
        let disk = MemoryDisk::new();
        let mut opened = open_as_founder(&disk).unwrap();
        take_snapshot(&disk, &mut opened, 10);
        take_snapshot(&disk, &mut opened, 20);
        let newest = SnapshotFiles::name(20);
        let bits = disk.read_file(&newest).unwrap().len() as u64 * 8;
        for bit in (0..bits).step_by(97) {
            let disk = disk.fork();
            disk.flip_bit(&newest, bit);
            let opened = open_as_founder(&disk).unwrap();
            assert_eq!((opened.snapshot_index, opened.state.applied_index()), (10, 10));
            assert_eq!(opened.log.first_index(), FOUNDING_INDEX + 1);
        }
        let without = disk.fork();
        without.remove(&newest).unwrap();
        assert_eq!(open_as_founder(&without).unwrap().snapshot_index, 10);
        let opened_whole = open_as_founder(&disk.fork()).unwrap();
        assert_eq!(opened_whole.snapshot_index, 20);

        opened.log.compact_to(11).unwrap();
        drop(opened);
        disk.flip_bit(&newest, bits / 2);
        let words = refused(&disk);
        assert!(words.contains(&newest) && words.contains("no older snapshot"), "{words}");
    }

    #[test]
    fn what_was_not_finished_or_not_named_is_removed_at_start() {
        let disk = MemoryDisk::new();
        let mut opened = open_as_founder(&disk).unwrap();
        take_snapshot(&disk, &mut opened, 10);
        drop(opened);
        let whole = disk.read_file(&SnapshotFiles::name(10)).unwrap();
        // A crash came before the marker, in the middle of writing, and in the middle of receiving.
        disk.write_file(&SnapshotFiles::name(15), &whole);
        disk.write_file("0000000000000010.snapshot.tmp", &whole[..whole.len() / 2]);
        disk.write_file("0000000000000011.snapshot.received.tmp", b"");
        assert_eq!(open_as_founder(&disk).unwrap().snapshot_index, 10);
        let names = disk.list().unwrap();
        assert!(!names.iter().any(|name| name.ends_with(TEMPORARY)), "{names:?}");
        let snapshots: Vec<_> = names.iter().filter(|name| name.ends_with(SNAPSHOT)).collect();
        assert_eq!(snapshots, [&SnapshotFiles::name(10)]);
    }

    #[test]
    fn a_received_snapshot_is_put_in_place_only_when_it_is_whole_and_meant() {
        let disk = MemoryDisk::new();
        let cluster = CLUSTER;
        let files = SnapshotFiles::new(Arc::new(disk.clone()), cluster);
        let mut state = StateMachine::new();
        advance_to(&mut state, 9);
        files.write(&state.capture(Arc::new(founders(3)))).unwrap();
        let whole = disk.read_file(&SnapshotFiles::name(9)).unwrap();
        let receiver = MemoryDisk::new();
        let received = SnapshotFiles::new(Arc::new(receiver.clone()), cluster);
        for end in (0..whole.len()).step_by(7) {
            assert!(received.receive(9, 1, &mut &whole[..end]).is_err(), "cut at {end}");
        }
        for place in (0..whole.len()).step_by(5) {
            let mut damaged = whole.clone();
            damaged[place] ^= 1;
            assert!(received.receive(9, 1, &mut &damaged[..]).is_err(), "damaged at {place}");
        }
        assert!(received.receive(8, 1, &mut &whole[..]).is_err(), "of another index");
        assert!(received.receive(9, 2, &mut &whole[..]).is_err(), "of another term");
        let foreign = SnapshotFiles::new(Arc::new(receiver.clone()), ClusterId([1; 16]));
        assert!(foreign.receive(9, 1, &mut &whole[..]).is_err(), "of another cluster");
        assert_eq!(receiver.list().unwrap(), [] as [String; 0], "nothing of all that is kept");
        let Received { state, membership, info } = received.receive(9, 1, &mut &whole[..]).unwrap();
        assert_eq!(state.applied_index(), 9);
        assert_eq!((info.index, info.bytes, &*membership), (9, whole.len() as u64, &founders(3)));
        assert_eq!(received.load(9).unwrap().0.applied_index(), 9);
    }

    #[test]
    fn a_received_snapshot_takes_no_other_ones_place() {
        let disk = MemoryDisk::new();
        let files = SnapshotFiles::new(Arc::new(disk.clone()), CLUSTER);
        let mut state = StateMachine::new();
        advance_to(&mut state, 9);
        // The log may name it, and a start would go on from what a peer made of it.
        files.write(&state.capture(Arc::new(founders(3)))).unwrap();
        let own = disk.read_file(&SnapshotFiles::name(9)).unwrap();
        let mut other = Vec::new();
        snapshot::write(&state.capture(Arc::new(founders(2))), CLUSTER, &mut other).unwrap();
        assert!(files.receive(9, 1, &mut &other[..]).is_err());
        assert_eq!(disk.list().unwrap(), [SnapshotFiles::name(9)]);
        assert_eq!(disk.read_file(&SnapshotFiles::name(9)).unwrap(), own);
        assert!(files.receive(9, 1, &mut &own[..]).is_ok(), "the same comes twice");
        disk.flip_bit(&SnapshotFiles::name(9), 100);
        assert!(files.receive(9, 1, &mut &other[..]).is_ok(), "a damaged one is of no use");
        assert_eq!(*files.load(9).unwrap().1, founders(2));
    }

    #[test]
    fn only_a_failed_sync_of_the_directory_is_fatal() {
        let cluster = CLUSTER;
        let mut state = StateMachine::new();
        advance_to(&mut state, 9);
        let capture = state.capture(Arc::new(founders(3)));
        let mut whole = Vec::new();
        snapshot::write(&capture, cluster, &mut whole).unwrap();
        for operation in [Operation::Create, Operation::Write, Operation::Sync, Operation::Rename] {
            let disk = MemoryDisk::new();
            let files = SnapshotFiles::new(Arc::new(disk.clone()), cluster);
            for _ in 0..2 {
                disk.fail(Some(operation), 1, Failure::Error);
                assert!(!files.write(&capture).expect_err("it fails").is_fatal(), "{operation:?}");
                disk.fail(Some(operation), 1, Failure::Error);
                assert!(!files.receive(9, 1, &mut &whole[..]).err().expect("it fails").is_fatal(), "{operation:?}");
            }
            files.write(&capture).unwrap();
        }
        let disk = MemoryDisk::new();
        let files = SnapshotFiles::new(Arc::new(disk.clone()), cluster);
        disk.fail(Some(Operation::SyncDirectory), 1, Failure::Error);
        assert!(files.write(&capture).expect_err("it fails").is_fatal());
        disk.fail(Some(Operation::SyncDirectory), 1, Failure::Error);
        assert!(files.receive(9, 1, &mut &whole[..]).err().expect("it fails").is_fatal());
    }

    #[test]
    fn a_disk_that_fills_up_under_a_snapshot_keeps_nothing_of_it() {
        let disk = MemoryDisk::new();
        let files = SnapshotFiles::new(Arc::new(disk.clone()), CLUSTER);
        let mut state = StateMachine::new();
        advance_to(&mut state, 9);
        let capture = state.capture(Arc::new(founders(3)));
        for capacity in [0, 10, 100] {
            disk.set_capacity(Some(capacity));
            assert!(files.write(&capture).unwrap_err().is_full());
            assert_eq!(disk.list().unwrap(), [] as [String; 0]);
        }
        disk.set_capacity(None);
        assert_eq!(files.write(&capture).unwrap().index, 9);
    }

    /// Bounded here; set the variable for more.
    const KEYS_VARIABLE: &str = "RAFTEXAMPLE_SNAPSHOT_KEYS";
    const KEYS: u64 = 200_000;

    #[test]
    fn many_small_keys_come_back_from_a_real_file() {
        let keys = std::env::var(KEYS_VARIABLE).ok().map_or(KEYS, |keys| keys.parse().unwrap());
        let state = StateMachine::with_keys(keys);
        let directory = tempfile::tempdir().unwrap();
        let disk: Arc<dyn Disk> = Arc::new(crate::disk::OsDisk::open(directory.path()).unwrap());
        let files = SnapshotFiles::new(disk, CLUSTER);
        let capture = state.capture(Arc::new(founders(3)));
        files.write(&capture).unwrap();
        let (loaded, membership) = files.load(keys).unwrap();
        assert_eq!(snapshot::digest(&loaded.capture(membership)), snapshot::digest(&capture));
        assert_eq!(loaded.version().keys() as u64, keys);
    }
}
