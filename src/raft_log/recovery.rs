//! Reading the log back at start, and telling what a crash leaves behind from damage.
//!
//! Everything is read and judged before anything is changed. What may be found, and what is done:
//!
//! * **A torn tail**: in the last segment, batches that were being written when the power went. It is cut off: zeroed,
//!   synced, and logged. It is one only if *all* of this holds for the first batch that cannot be read whole:
//!   - at least one of its sectors is all zeros, as before it was written. Disks write sectors whole and page caches
//!     take whole pages, so a batch whose sectors were all written once and which is bad now was damaged later;
//!   - no batch behind it says that this one was known to be durable. Behind one unsynced batch there may be others,
//!     also whole ones: they fall with it, for nobody was ever told that they are durable;
//!   - no sector behind it is anything but zeros, a good batch header, or the inside of a batch.
//! * **A last segment without a place**: a crash came between making it and sealing the one before. It holds nothing of
//!   its own and is removed.
//! * **Leftover segments** behind a compaction that was cut short. They are removed.
//! * **Anything else is damage** and refused: with a file and an offset, before anything was changed.
//!
//! What stays undetectable from this directory alone: the newest batches replaced by zeros, a whole sector at a time
//! (a disk that acknowledged syncs and lost them), and an older copy of the whole directory. A leader's commit index
//! beyond the last index tells both. Each header carries the batches' number and link, so nothing else can be missing.
//!
//! What is read may come from the page cache and may never have reached the disk: a sync that fails marks pages clean,
//! and a process that starts again sees them. So batches that no later batch proves durable are written once more, in
//! place and with the same bytes, and synced, before anyone trusts them.

use std::collections::VecDeque;

use super::batch::{self, BatchHeader, SECTOR_BYTES, Sector};
use super::record::{Record, take_record};
use super::segment::{self, BATCHES_START, Segment, SegmentHeader};
use super::state::{LogState, Place};
use super::{LogError, LogIdentity, list};
use crate::codec::Fields;
use crate::disk::{Disk, remove_if_there};

/// How much is read at once.
const WINDOW_BYTES: u64 = 1 << 20;

/// A log that was read back and may be appended to.
pub(super) struct Recovered {
    /// All segments, oldest first; the last one is appended to.
    pub(super) segments: VecDeque<Segment>,
    pub(super) state: LogState,
    /// Where the next batch goes in the last segment.
    pub(super) end: u64,
    /// The number of the last batch. It and all before it are durable.
    pub(super) number: u64,
    /// The last batch's link.
    pub(super) link: u32,
}

/// Reads the log back and makes it fit to be appended to.
pub(super) fn recover(disk: &dyn Disk, identity: &LogIdentity, cache_bytes_max: usize) -> Result<Recovered, LogError> {
    let names = list(disk)?;
    let sequences = newest_run(&names);
    let (Some(&oldest), Some(&newest)) = (sequences.first(), sequences.last()) else {
        return Err(LogError::Missing { path: disk.path(&segment::name(1)) });
    };
    let mut opened = Vec::new();
    for &sequence in &sequences {
        opened.push(Segment::open(disk, sequence, identity)?);
    }
    let mut replay = Replay::new(cache_bytes_max);
    let end = replay.segments(disk, &opened)?;
    if replay.state.missing().is_some() {
        return Err(LogError::Missing { path: disk.path(&segment::name(oldest - 1)) });
    }

    // From here on the log is known to be good, and things are changed.
    let mut segments: VecDeque<Segment> = opened.into_iter().map(|(segment, _, _)| segment).collect();
    if end.unplaced {
        segments.pop_back();
        remove(disk, &segment::name(newest))?;
        sync_directory(disk)?;
    }
    make_durable(&mut segments, &end, &replay)?;
    // Also makes sure of the names that a process before this one may have left unsynced.
    sync_directory(disk)?;
    for name in names.iter().filter(|name| is_waste(name, oldest)) {
        log::info!("removing '{}', which the raft log does not need", disk.path(name).display());
        remove(disk, name)?;
    }
    let Replay { state, number, link, .. } = replay;
    Ok(Recovered { segments, state, end: end.offset, number, link })
}

/// The newest segments without a gap between their numbers, oldest first. Older ones are leftovers of a compaction, or
/// one in between is missing: which of the two, the log's own content tells.
fn newest_run(names: &[String]) -> Vec<u64> {
    let mut sequences: Vec<u64> = names.iter().filter_map(|name| segment::sequence_of(name)).collect();
    sequences.sort_unstable();
    let gap = sequences.windows(2).rposition(|pair| pair[0] + 1 != pair[1]);
    sequences.split_off(gap.map_or(0, |gap| gap + 1))
}

fn is_waste(name: &str, oldest: u64) -> bool {
    segment::is_unfinished(name) || segment::sequence_of(name).is_some_and(|sequence| sequence < oldest)
}

fn remove(disk: &dyn Disk, name: &str) -> Result<(), LogError> {
    remove_if_there(disk, name).map_err(|source| LogError::Io { action: "remove", path: disk.path(name), source })
}

fn sync_directory(disk: &dyn Disk) -> Result<(), LogError> {
    disk.sync_directory().map_err(|source| LogError::Io { action: "sync directory", path: disk.path(""), source })
}

/// Zeroes the torn tail and writes again what nothing proves durable.
fn make_durable(segments: &mut VecDeque<Segment>, end: &LogEnd, replay: &Replay) -> Result<(), LogError> {
    let mut touched = vec![segments.len() - 1];
    for batch in &replay.unproven {
        let segment = &mut segments[batch.segment];
        let mut sectors = vec![0; batch.bytes as usize];
        segment.read(&mut sectors, batch.offset)?;
        segment.write(&sectors, batch.offset)?;
        touched.push(batch.segment);
    }
    if let Some(active) = segments.back_mut()
        && end.torn_until > end.offset
    {
        log::warn!(
            "cutting {} bytes of unfinished batches off raft log '{}' at offset {}: a crash interrupted their write",
            end.torn_until - end.offset,
            active.path.display(),
            end.offset
        );
        let zeros = vec![0; WINDOW_BYTES as usize];
        let mut offset = end.offset;
        while offset < end.torn_until {
            let count = (end.torn_until - offset).min(WINDOW_BYTES);
            active.write(&zeros[..count as usize], offset)?;
            offset += count;
        }
    }
    touched.sort_unstable();
    touched.dedup();
    touched.into_iter().try_for_each(|index| segments[index].sync())
}

/// Where the log ends.
struct LogEnd {
    /// Behind the last whole batch.
    offset: u64,
    /// Behind the last byte that is not zero.
    torn_until: u64,
    /// The last segment is one that was never put to use: the log ends in the one before.
    unplaced: bool,
}

/// How one segment ends.
enum SegmentEnd {
    Sealed,
    /// What is at this offset is not a whole batch that follows the one before.
    Open(u64),
}

/// A batch that no later one proves durable.
struct Unproven {
    number: u64,
    /// Position in the list of segments.
    segment: usize,
    offset: u64,
    bytes: u64,
}

/// The log as far as it has been read.
struct Replay {
    state: LogState,
    number: u64,
    link: u32,
    /// The newest batch that is proven durable.
    proven: u64,
    unproven: VecDeque<Unproven>,
    /// Used again and again.
    records: Vec<u8>,
}

impl Replay {
    fn new(cache_bytes_max: usize) -> Self {
        let state = LogState::new(cache_bytes_max);
        Replay { state, number: 0, link: 0, proven: 0, unproven: VecDeque::new(), records: Vec::new() }
    }

    fn segments(&mut self, disk: &dyn Disk, opened: &[(Segment, SegmentHeader, u32)]) -> Result<LogEnd, LogError> {
        for (position, (segment, header, header_crc)) in opened.iter().enumerate() {
            if position == 0 {
                self.number = header.first_batch.saturating_sub(1);
            } else if header.previous != self.link || header.first_batch != self.number + 1 {
                return Err(segment.corrupt(0, "the segment does not follow the one before it"));
            }
            self.link = *header_crc;
            let SegmentEnd::Open(offset) = self.segment(segment, position)? else { continue };
            if offset == BATCHES_START {
                return Err(segment.corrupt(offset, "the segment's first batch is not valid"));
            }
            let unplaced = match &opened[position + 1..] {
                [] => false,
                [next] => self.is_unplaced(next)?,
                _ => return Err(segment.corrupt(offset, "an invalid batch, and later segments follow")),
            };
            if !unplaced && position + 1 < opened.len() {
                return Err(segment.corrupt(offset, "an invalid batch, and the next segment is in use"));
            }
            let torn_until = self.judge_tail(segment, offset)?;
            return Ok(LogEnd { offset, torn_until, unplaced });
        }
        let next = opened.last().map_or(1, |(segment, _, _)| segment.sequence + 1);
        Err(LogError::Missing { path: disk.path(&segment::name(next)) })
    }

    /// Takes in batches up to the first that is not whole or does not follow.
    fn segment(&mut self, segment: &Segment, position: usize) -> Result<SegmentEnd, LogError> {
        let mut window = Window::new(segment);
        let mut offset = BATCHES_START;
        while offset < segment.bytes {
            let Sector::First(header) = Sector::read(window.get(offset, SECTOR_BYTES as u64)?) else { break };
            let bytes = header.disk_bytes();
            let follows = header.number == self.number + 1 && header.previous == self.link;
            if !follows || bytes > segment.bytes - offset {
                break;
            }
            let sectors = window.get(offset, bytes)?;
            if batch::read_batch(&header, sectors, &mut self.records).is_err() {
                break;
            }
            let sealed = self.apply(segment, offset).map_err(|reason| segment.corrupt(offset, reason))?;
            self.passed(&header, position, offset);
            offset += bytes;
            if sealed {
                return Ok(SegmentEnd::Sealed);
            }
        }
        Ok(SegmentEnd::Open(offset))
    }

    /// Takes in the records of the batch at `offset`; returns whether it seals the segment.
    fn apply(&mut self, segment: &Segment, offset: u64) -> Result<bool, String> {
        let start = batch::data_offset(offset) + batch::HEADER_BYTES as u64;
        let len = self.records.len();
        let mut fields = Fields::new(&self.records, "record");
        let mut sealed = false;
        while !fields.rest().is_empty() {
            let at = len - fields.rest().len();
            let record = take_record(&mut fields).map_err(|malformed| malformed.to_string())?;
            sealed |= record == Record::Seal;
            let bytes = len - fields.rest().len() - at;
            let place = Place { segment: segment.sequence, offset: start + at as u64, bytes: bytes as u32 };
            self.state.apply(record, place)?;
        }
        self.state.check_settled()?;
        Ok(sealed)
    }

    fn passed(&mut self, header: &BatchHeader, segment: usize, offset: u64) {
        self.number = header.number;
        self.link = header.crc;
        self.proven = self.proven.max(header.synced);
        self.unproven.push_back(Unproven { number: header.number, segment, offset, bytes: header.disk_bytes() });
        while self.unproven.front().is_some_and(|batch| batch.number <= self.proven) {
            self.unproven.pop_front();
        }
    }

    /// Whether this segment, the last one, was made and never put to use: it holds its first batch and nothing else,
    /// and that batch does not claim that the one missing before it is durable.
    fn is_unplaced(&self, (segment, header, header_crc): &(Segment, SegmentHeader, u32)) -> Result<bool, LogError> {
        let mut window = Window::new(segment);
        let Sector::First(first) = Sector::read(window.get(BATCHES_START, SECTOR_BYTES as u64)?) else {
            return Ok(false);
        };
        let fits = first.number == header.first_batch
            && first.previous == *header_crc
            && first.disk_bytes() <= segment.bytes - BATCHES_START;
        if !fits || first.synced > self.number {
            return Ok(false);
        }
        let mut records = Vec::new();
        let sectors = window.get(BATCHES_START, first.disk_bytes())?;
        if batch::read_batch(&first, sectors, &mut records).is_err() {
            return Ok(false);
        }
        let mut offset = BATCHES_START + first.disk_bytes();
        while offset < segment.bytes {
            if Sector::read(window.get(offset, SECTOR_BYTES as u64)?) != Sector::Unwritten {
                return Ok(false);
            }
            offset += SECTOR_BYTES as u64;
        }
        Ok(true)
    }

    /// Decides whether what lies at `offset`, where the next batch should be, is a torn tail; returns where its last
    /// sector that is not zero ends. The rules are in the module's documentation.
    fn judge_tail(&self, segment: &Segment, offset: u64) -> Result<u64, LogError> {
        let next = self.number + 1;
        let mut window = Window::new(segment);
        // The sectors of the bad batch, as far as they are known, and whether one was never written.
        let mut batch_end = offset + SECTOR_BYTES as u64;
        let mut torn = false;
        let mut torn_until = offset;
        let mut at = offset;
        while at < segment.bytes {
            let sector = Sector::read(window.get(at, SECTOR_BYTES as u64)?);
            match &sector {
                Sector::Unwritten => torn |= at < batch_end,
                Sector::Damaged => return Err(segment.corrupt(at, "a sector that is neither written nor empty")),
                Sector::Next if at == offset => return Err(segment.corrupt(at, "the inside of a batch, not its start")),
                Sector::Next => {}
                Sector::First(header) if at == offset => {
                    batch_end = at + header.disk_bytes();
                    if header.number != next || header.previous != self.link || batch_end > segment.bytes {
                        return Err(segment.corrupt(at, format!("batch {} out of order", header.number)));
                    }
                }
                Sector::First(header) => {
                    if at < batch_end || header.number < next {
                        return Err(segment.corrupt(at, format!("batch {} out of order", header.number)));
                    }
                    if header.synced >= next {
                        let reason = format!("batch {next} is gone or bad, and was durable by batch {}", header.number);
                        return Err(segment.corrupt(offset, reason));
                    }
                }
            }
            at += SECTOR_BYTES as u64;
            if sector != Sector::Unwritten {
                torn_until = at;
            }
        }
        if torn_until > offset && !torn {
            return Err(segment.corrupt(offset, "a batch that was written whole fails its checksum"));
        }
        Ok(torn_until)
    }
}

/// Reads a segment forward, a large piece at a time.
struct Window<'a> {
    segment: &'a Segment,
    buffer: Vec<u8>,
    start: u64,
}

impl<'a> Window<'a> {
    fn new(segment: &'a Segment) -> Self {
        Window { segment, buffer: Vec::new(), start: 0 }
    }

    /// `len` bytes at `offset`, which must be in the file.
    fn get(&mut self, offset: u64, len: u64) -> Result<&[u8], LogError> {
        let end = offset + len;
        if offset < self.start || end > self.start + self.buffer.len() as u64 {
            let wanted = len.max(WINDOW_BYTES).min(self.segment.bytes - offset);
            self.buffer.resize(wanted as usize, 0);
            self.segment.read(&mut self.buffer, offset)?;
            self.start = offset;
        }
        let at = (offset - self.start) as usize;
        Ok(&self.buffer[at..at + len as usize])
    }
}
