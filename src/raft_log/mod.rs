//! The write-ahead log of one Raft group, in segments on a [`Disk`].
//!
//! It keeps entries, Raft's hard state and the markers of snapshots. What belongs together is written as one batch,
//! with one write, and holds as a whole or not at all: see `batch` for how it looks, `segment` for the files, `record`
//! for what batches say, `state` for what is kept in memory, and `recovery` for what happens at start.
//!
//! # Promises
//! * After [`RaftLog::write`] with `sync`, or anything else that says it syncs, everything up to there survives a crash.
//! * After a crash [`RaftLog::open`] finds everything synced, and then possibly batches written later, without a gap.
//! * Damage is refused, not repaired: see `recovery` for the exact line between a torn tail and damage.
//! * After a failed write or sync nothing more is written: [`LogError::Poisoned`]. The node has to stop, because what
//!   is on disk is in doubt until it has been read back.
//!
//! # Segments
//! Each begins with a checkpoint of all that is not entries, so that those before it can be deleted as soon as none of
//! their entries is needed. They are preallocated, because appending to a file commits its size to the file system's
//! journal with every sync. At a roll the next segment is made durable first, then the full one is sealed and synced,
//! then the next one is used: a seal proves that a next segment exists, so a deleted one is noticed.
//!
//! # Memory
//! Per entry that is not compacted 32 bytes; the newest entries themselves up to [`LogOptions::cache_bytes`]; older ones
//! are read back when asked for.

mod batch;
mod error;
mod record;
mod recovery;
mod segment;
mod state;
#[cfg(test)]
mod tests;

use std::collections::VecDeque;
use std::fmt;
use std::io;
use std::path::PathBuf;
use std::sync::Arc;

use raft::eraftpb::{ConfState, Entry, HardState};

pub use error::{LogError, ReadError};

use self::batch::{BATCH_BYTES_MAX, BatchWriter, HEADER_BYTES};
use self::record::Record;
use self::segment::{BATCHES_START, Segment, SegmentHeader};
use self::state::{LogState, Place, Slot};
use crate::codec::Fields;
use crate::disk::Disk;
use crate::membership::{ClusterId, NodeId};

/// The default size of a segment: large enough that rolling, with its three syncs, is rare, and small enough that what
/// a compaction leaves behind is little beside the store.
pub const SEGMENT_BYTES: u64 = 64 << 20;

/// The default memory for recent entries: followers that are a little behind, and the applier, are served from it.
pub const CACHE_BYTES: usize = 64 << 20;

/// The smallest segment: smaller ones would hold little but their own beginning.
const SEGMENT_BYTES_MIN: u64 = 4 << 10;

/// How much of a segment is read at once when entries are read back. A larger entry is read alone.
const READ_BYTES_MAX: u64 = 1 << 20;

/// Whose log it is. A log is opened only by its owner.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LogIdentity {
    /// The cluster.
    pub cluster: ClusterId,
    /// The node.
    pub node: NodeId,
    /// The data directory.
    pub directory: u128,
}

impl fmt::Display for LogIdentity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "node {} of cluster {} with data directory {:032x}", self.node, self.cluster, self.directory)
    }
}

/// The place of an entry in Raft's history.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Position {
    /// Its index.
    pub index: u64,
    /// Its term.
    pub term: u64,
}

/// Says that a snapshot exists, and is durable, which holds everything up to and with the entry at `index`.
#[derive(Clone, Debug, PartialEq)]
pub struct Marker {
    /// The last entry in the snapshot.
    pub index: u64,
    /// Its term.
    pub term: u64,
    /// The roles of the members at that entry.
    pub conf_state: ConfState,
}

/// What is written as a whole.
#[derive(Clone, Copy, Debug, Default)]
pub struct Batch<'a> {
    /// A snapshot that this node has taken of an entry in the log; not below the newest marker.
    pub marker: Option<&'a Marker>,
    /// Entries with consecutive indices. They replace what the log has from the first one's index on.
    pub entries: &'a [Entry],
    /// Raft's hard state. Its commit index must reach up to the newest marker, and not beyond the last entry.
    pub hard_state: Option<&'a HardState>,
}

/// What may be chosen.
#[derive(Clone, Copy, Debug)]
pub struct LogOptions {
    /// The size of a segment, at least 4 KiB. A larger batch gets a larger segment.
    pub segment_bytes: u64,
    /// The memory for recent entries, with what it takes to keep them. 0: all are read back.
    pub cache_bytes: usize,
}

impl Default for LogOptions {
    fn default() -> Self {
        LogOptions { segment_bytes: SEGMENT_BYTES, cache_bytes: CACHE_BYTES }
    }
}

/// A file of the log, for a status page.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SegmentStatus {
    /// Where it is.
    pub path: PathBuf,
    /// Its size, preallocated space included.
    pub bytes: u64,
}

/// The names of all files in the data directory.
fn list(disk: &dyn Disk) -> Result<Vec<String>, LogError> {
    disk.list().map_err(|source| LogError::Io { action: "list directory", path: disk.path(""), source })
}

/// See the module's documentation.
pub struct RaftLog {
    disk: Arc<dyn Disk>,
    identity: LogIdentity,
    options: LogOptions,
    /// Oldest first, numbered without a gap, never empty. The last one is written to.
    segments: VecDeque<Segment>,
    state: LogState,
    writer: BatchWriter,
    /// Where the next batch goes in the last segment.
    end: u64,
    /// The number of the last batch.
    written: u64,
    /// The number of the last batch that is durable.
    synced: u64,
    /// The last batch's link of the chain.
    link: u32,
    poisoned: bool,
}

impl fmt::Debug for RaftLog {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (first, last) = (self.first_index(), self.last_index());
        write!(f, "RaftLog {{ entries {first}..={last}, {} segments, batch {} }}", self.segments.len(), self.written)
    }
}

/// Whether a file of this name is a segment of a log.
pub fn is_segment(name: &str) -> bool {
    segment::sequence_of(name).is_some()
}

impl RaftLog {
    /// Whether there is a log in this directory. One whose creation was cut short counts as none: its only trace is a
    /// file with a temporary name, which the next creation removes.
    pub fn exists(disk: &dyn Disk) -> io::Result<bool> {
        Ok(disk.list()?.iter().any(|name| segment::sequence_of(name).is_some()))
    }

    /// Makes a log that begins behind the snapshot that `marker` names. When it returns the log is durable.
    ///
    /// # Errors
    /// [`LogError::AlreadyExists`]; [`LogError::Misuse`] if the hard state's commit index is not the marker's index.
    /// After a disk error, as after a crash, either there is no log or the whole one.
    pub fn create(
        disk: Arc<dyn Disk>,
        identity: LogIdentity,
        options: LogOptions,
        marker: Marker,
        hard_state: HardState,
    ) -> Result<RaftLog, LogError> {
        if let Some(name) = list(&*disk)?.iter().find(|name| segment::sequence_of(name).is_some()) {
            return Err(LogError::AlreadyExists { path: disk.path(name) });
        }
        let mut state = LogState::new(options.cache_bytes);
        let position = Position { index: marker.index, term: marker.term };
        let nowhere = Place { segment: 0, offset: 0, bytes: 0 };
        let checkpoint = Record::Checkpoint { compacted: position, last: position };
        for record in [checkpoint, Record::Marker(marker), Record::HardState(hard_state)] {
            state.apply(record, nowhere).map_err(LogError::Misuse)?;
        }
        state.check_settled().map_err(LogError::Misuse)?;
        let header = SegmentHeader { identity, sequence: 1, file_bytes: 0, first_batch: 1, previous: 0 };
        let (segment, link, end) = create_segment(&*disk, &options, &state, header, 0, 0)?;
        let (segments, writer) = (VecDeque::from([segment]), BatchWriter::default());
        Ok(RaftLog {
            disk,
            identity,
            options,
            segments,
            state,
            writer,
            end,
            written: 1,
            synced: 1,
            link,
            poisoned: false,
        })
    }

    /// Reads the log back. When it returns, everything it holds is durable.
    ///
    /// # Errors
    /// All of [`LogError`] but the last two; `Corrupt`, `UnsupportedVersion`, `ForeignLog` and `Missing` are found
    /// before anything is changed.
    pub fn open(disk: Arc<dyn Disk>, identity: LogIdentity, options: LogOptions) -> Result<RaftLog, LogError> {
        let recovered = recovery::recover(&*disk, &identity, options.cache_bytes)?;
        let recovery::Recovered { segments, state, end, number, link } = recovered;
        let writer = BatchWriter::default();
        let mut log = RaftLog {
            disk,
            identity,
            options,
            segments,
            state,
            writer,
            end,
            written: number,
            synced: number,
            link,
            poisoned: false,
        };
        // A crash may have come between a compaction and its end.
        log.delete_unneeded_segments()?;
        Ok(log)
    }

    /// Appends a batch, and with `sync` makes it and everything before it durable. An empty batch only syncs.
    ///
    /// # Errors
    /// [`LogError::Misuse`] if the batch breaks the log's rules (a gap, a committed entry replaced, a term or commit
    /// index that falls, a marker of an entry that is not there): nothing has happened. After any other error the
    /// batch may or may not be found at the next start, and the log is poisoned.
    pub fn write(&mut self, batch: &Batch<'_>, sync: bool) -> Result<(), LogError> {
        self.usable()?;
        self.state.check(batch, false).map_err(LogError::Misuse)?;
        self.encode(batch, record::put_marker)?;
        self.guarded(|log| {
            if log.writer.records_len() > 0 {
                let offset = log.append()?;
                log.take_in(batch, Record::Marker, offset)?;
            }
            if sync { log.sync() } else { Ok(()) }
        })
    }

    /// Begins the log anew behind a snapshot that came from the leader and is durable, and syncs. Everything before is
    /// forgotten, entries behind the snapshot's index included: they may be of another history.
    ///
    /// # Errors
    /// As [`write`](Self::write). `hard_state` must bring the commit index up to the marker.
    pub fn install_marker(
        &mut self,
        marker: &Marker,
        entries: &[Entry],
        hard_state: Option<&HardState>,
    ) -> Result<(), LogError> {
        self.usable()?;
        let batch = Batch { marker: Some(marker), entries, hard_state };
        self.state.check(&batch, true).map_err(LogError::Misuse)?;
        self.encode(&batch, record::put_restart)?;
        self.guarded(|log| {
            let offset = log.append()?;
            log.sync()?;
            log.take_in(&batch, Record::Restart, offset)?;
            log.delete_unneeded_segments()
        })
    }

    /// Gives up the entries up to and with `index`, syncs, and deletes the segments that hold no others. Nothing happens
    /// if they are gone already.
    ///
    /// # Errors
    /// [`LogError::Misuse`] if no snapshot marker reaches up to `index`. Otherwise as [`write`](Self::write).
    pub fn compact_to(&mut self, index: u64) -> Result<(), LogError> {
        self.usable()?;
        if index <= self.state.compacted.index {
            return Ok(());
        }
        let term = self.state.term(index).filter(|_| index <= self.marker().index);
        let Some(term) = term else {
            return Err(LogError::Misuse(format!(
                "compaction to {index}, the newest marker is {}",
                self.marker().index
            )));
        };
        let to = Position { index, term };
        record::put_compact(self.writer.begin(), to);
        self.guarded(|log| {
            log.append()?;
            // Before the first deletion: without this record the rest would look incomplete.
            log.sync()?;
            log.state.compact(to);
            log.delete_unneeded_segments()
        })
    }

    /// The index of the first entry that can be read, or would be if it existed.
    pub fn first_index(&self) -> u64 {
        self.state.compacted.index + 1
    }

    /// The index of the last entry; of the newest marker if there is none behind it.
    pub fn last_index(&self) -> u64 {
        self.state.last.index
    }

    /// The term of an entry, or of the last one that was compacted.
    ///
    /// # Errors
    /// `Compacted` or `Unavailable`, never `Failed`.
    pub fn term(&self, index: u64) -> Result<u64, ReadError> {
        if index < self.state.compacted.index {
            return Err(ReadError::Compacted);
        }
        self.state.term(index).ok_or(ReadError::Unavailable)
    }

    /// The entries from `low` up to but not including `high`, as many as fit into `bytes_max` bytes of log, but at least
    /// one unless the range is empty.
    ///
    /// # Errors
    /// `Compacted` if `low` lies before the first index, `Unavailable` if `high` lies behind the last by more than one,
    /// `Failed` if entries had to be read back and could not.
    pub fn entries(&self, low: u64, high: u64, bytes_max: u64) -> Result<Vec<Entry>, ReadError> {
        if low < self.first_index() {
            return Err(ReadError::Compacted);
        }
        if high > self.last_index() + 1 {
            return Err(ReadError::Unavailable);
        }
        let mut bytes = 0;
        let mut end = low;
        while end < high {
            bytes += self.slot(end).bytes as u64;
            if bytes > bytes_max && end > low {
                break;
            }
            end += 1;
        }
        let mut entries = Vec::with_capacity((end.saturating_sub(low)) as usize);
        let mut at = low;
        let cached_from = self.state.cache_start().min(end);
        while at < cached_from {
            at = self.read_back(at, cached_from, &mut entries).map_err(|error| ReadError::Failed(Box::new(error)))?;
        }
        if at < end {
            entries.extend(self.state.cached(at, end).cloned());
        }
        Ok(entries)
    }

    /// Raft's hard state, as last written.
    pub fn hard_state(&self) -> &HardState {
        &self.state.hard_state
    }

    /// The marker of the newest snapshot.
    pub fn marker(&self) -> &Marker {
        self.state.markers.back().expect("a log has a marker from its creation on")
    }

    /// The markers of the snapshots from which the log goes on without a gap, oldest first; the newest few if there
    /// are many.
    pub fn markers(&self) -> impl DoubleEndedIterator<Item = &Marker> {
        self.state.markers.iter()
    }

    /// The log's files, oldest first.
    pub fn segments(&self) -> Vec<SegmentStatus> {
        let status = |segment: &Segment| SegmentStatus { path: segment.path.clone(), bytes: segment.bytes };
        self.segments.iter().map(status).collect()
    }

    fn usable(&self) -> Result<(), LogError> {
        if self.poisoned { Err(LogError::Poisoned) } else { Ok(()) }
    }

    /// Poisons the log if `change` fails.
    fn guarded(&mut self, change: impl FnOnce(&mut Self) -> Result<(), LogError>) -> Result<(), LogError> {
        let result = change(self);
        self.poisoned |= result.is_err();
        result
    }

    fn slot(&self, index: u64) -> &Slot {
        self.state.slot(index).expect("there is a slot for every entry from the first index to the last")
    }

    fn active(&mut self) -> &mut Segment {
        self.segments.back_mut().expect("a log has a segment")
    }

    /// Lays the records of a batch out for [`append`](Self::append).
    fn encode(&mut self, batch: &Batch<'_>, put_marker: fn(&mut Vec<u8>, &Marker)) -> Result<(), LogError> {
        let bytes: usize = batch.entries.iter().map(record::entry_bytes).sum();
        if bytes > BATCH_BYTES_MAX / 2 {
            return Err(LogError::Misuse(format!("{bytes} bytes of entries in one batch")));
        }
        let out = self.writer.begin();
        out.reserve(bytes);
        if let Some(marker) = batch.marker {
            put_marker(out, marker);
        }
        batch.entries.iter().for_each(|entry| record::put_entry(out, entry));
        if let Some(hard_state) = batch.hard_state {
            record::put_hard_state(out, hard_state);
        }
        Ok(())
    }

    /// Writes the laid out batch, in a new segment if this one is full, and returns where it lies.
    fn append(&mut self) -> Result<u64, LogError> {
        let bytes = batch::disk_bytes(self.writer.records_len());
        if self.end + bytes + seal_bytes() > self.active().bytes {
            self.roll(bytes)?;
        }
        let offset = self.end;
        let (link, sectors) = self.writer.finish(self.written + 1, self.synced, self.link);
        let active = self.segments.back_mut().expect("a log has a segment");
        active.write(sectors, offset)?;
        self.written += 1;
        self.link = link;
        self.end += bytes;
        Ok(offset)
    }

    fn sync(&mut self) -> Result<(), LogError> {
        if self.synced < self.written {
            self.active().sync()?;
            self.synced = self.written;
        }
        Ok(())
    }

    /// Brings the state in memory up to the batch that was written at `offset`.
    fn take_in(&mut self, batch: &Batch<'_>, marker: fn(Marker) -> Record, offset: u64) -> Result<(), LogError> {
        let segment = self.active().sequence;
        let hard_state_bytes = batch.hard_state.map_or(0, |_| record::HARD_STATE_BYTES);
        let entries_bytes: usize = batch.entries.iter().map(record::entry_bytes).sum();
        let behind_entries = HEADER_BYTES + self.writer.records_len() - hard_state_bytes;
        let mut at = batch::data_offset(offset) + (behind_entries - entries_bytes) as u64;
        let nowhere = Place { segment, offset: 0, bytes: 0 };
        let mut take_in = || {
            if let Some(new) = batch.marker {
                self.state.apply(marker(new.clone()), nowhere)?;
            }
            for entry in batch.entries {
                let bytes = record::entry_bytes(entry) as u32;
                self.state.append(entry.clone(), Place { segment, offset: at, bytes })?;
                at += u64::from(bytes);
            }
            if let Some(new) = batch.hard_state {
                self.state.apply(Record::HardState(new.clone()), nowhere)?;
            }
            self.state.check_settled()
        };
        take_in().map_err(LogError::Misuse)
    }

    /// Goes on in a new segment that has room for a batch of `bytes` on disk. The order keeps every crash harmless:
    /// first the next segment is durable, then the seal of this one with everything before it, then the next is used.
    fn roll(&mut self, bytes: u64) -> Result<(), LogError> {
        let mut writer = BatchWriter::default();
        record::put_seal(writer.begin());
        let (seal_link, seal) = writer.finish(self.written + 1, self.synced, self.link);
        let header = SegmentHeader {
            identity: self.identity,
            sequence: self.active().sequence + 1,
            file_bytes: 0,
            first_batch: self.written + 2,
            previous: seal_link,
        };
        let (next, link, end) = create_segment(&*self.disk, &self.options, &self.state, header, self.synced, bytes)?;
        let offset = self.end;
        self.active().write(seal, offset)?;
        self.active().sync()?;
        self.segments.push_back(next);
        self.written += 2;
        self.synced = self.written;
        self.link = link;
        self.end = end;
        Ok(())
    }

    /// Deletes the segments whose entries are all compacted, oldest first. What a crash lets come back is recognized at
    /// the next start and deleted again.
    fn delete_unneeded_segments(&mut self) -> Result<(), LogError> {
        let needed = self.state.oldest_segment().unwrap_or(u64::MAX);
        let mut deleted = false;
        while self.segments.len() > 1 && self.segments[0].sequence < needed {
            let name = segment::name(self.segments[0].sequence);
            self.disk.remove(&name).map_err(|source| self.segments[0].io("remove", source))?;
            self.segments.pop_front();
            deleted = true;
        }
        if deleted {
            let path = self.disk.path("");
            self.disk.sync_directory().map_err(|source| LogError::Io { action: "sync directory", path, source })?;
        }
        Ok(())
    }

    /// Reads entries from `low` on back from one segment, at most up to `high`; returns the index behind them.
    fn read_back(&self, low: u64, high: u64, entries: &mut Vec<Entry>) -> Result<u64, LogError> {
        let first = *self.slot(low);
        let behind = |slot: &Slot| slot.offset + u64::from(slot.bytes);
        let mut end = behind(&first);
        let mut next = low + 1;
        while next < high {
            let slot = self.slot(next);
            if slot.segment != first.segment || behind(slot) - first.offset > READ_BYTES_MAX {
                break;
            }
            end = behind(slot);
            next += 1;
        }
        let oldest = self.segments[0].sequence;
        let segment = &self.segments[(first.segment - oldest) as usize];
        let data = segment.read_data(first.offset, (end - first.offset) as usize)?;
        for index in low..next {
            let slot = self.slot(index);
            let at = (slot.offset - first.offset) as usize;
            let mut fields = Fields::new(&data[at..at + slot.bytes as usize], "record");
            match record::take_record(&mut fields) {
                Ok(Record::Entry(entry)) if entry.index == index && entry.term == slot.term => entries.push(entry),
                _ => {
                    let offset = slot.offset / batch::SECTOR_DATA_BYTES as u64 * batch::SECTOR_BYTES as u64;
                    return Err(segment.corrupt(offset, format!("entry {index} is not what was written")));
                }
            }
        }
        Ok(next)
    }
}

/// The room that a seal takes: every segment keeps it free.
fn seal_bytes() -> u64 {
    batch::disk_bytes(record::RECORD_HEADER_BYTES)
}

/// Makes a segment that begins with a checkpoint of `state` and has room for a batch of `batch_bytes` on disk; its size
/// in `header` is filled in here. Returns it with its last link and the place of the next batch.
fn create_segment(
    disk: &dyn Disk,
    options: &LogOptions,
    state: &LogState,
    mut header: SegmentHeader,
    synced: u64,
    batch_bytes: u64,
) -> Result<(Segment, u32, u64), LogError> {
    let mut checkpoint = BatchWriter::default();
    let out = checkpoint.begin();
    record::put_checkpoint(out, state.compacted, state.last);
    state.markers.iter().for_each(|marker| record::put_marker(out, marker));
    record::put_hard_state(out, &state.hard_state);
    let needed = BATCHES_START + batch::disk_bytes(checkpoint.records_len()) + batch_bytes + seal_bytes();
    header.file_bytes =
        options.segment_bytes.max(SEGMENT_BYTES_MIN).max(needed).next_multiple_of(batch::SECTOR_BYTES as u64);
    Segment::create(disk, &header, &mut checkpoint, synced)
}
