//! What the log holds, in memory: where each entry lies, the recent entries themselves, hard state and markers.
//!
//! The same steps lead here when a batch has been written and when it is found again at start.

use std::collections::VecDeque;

use raft::eraftpb::{Entry, HardState};

use super::record::Record;
use super::{Batch, Marker, Position};

/// How many snapshot markers are remembered. One would do; the others let an older snapshot serve if the newest file
/// is damaged and the entries behind it are still there.
pub(super) const MARKERS_MAX: usize = 8;

/// The highest index that a log begins behind. Nobody gets there, and from here on numbers can still be added to.
const START_MAX: u64 = u64::MAX / 2;

/// Where an entry lies.
#[derive(Clone, Copy, Debug)]
pub(super) struct Slot {
    pub(super) term: u64,
    /// The segment's sequence number.
    pub(super) segment: u64,
    /// The place of its record there, tags not counted.
    pub(super) offset: u64,
    /// The length of its record.
    pub(super) bytes: u32,
}

/// The place of a record.
#[derive(Clone, Copy, Debug)]
pub(super) struct Place {
    pub(super) segment: u64,
    pub(super) offset: u64,
    pub(super) bytes: u32,
}

/// See the module's documentation. Invariants between batches: `compacted <= newest marker <= commit <= last`, and the
/// slots are those of the entries `compacted + 1 ..= last`, with terms that never fall. While a log whose oldest
/// segments were deleted is read back, its first slots may be missing; at the end they may not.
pub(super) struct LogState {
    pub(super) compacted: Position,
    pub(super) last: Position,
    /// The index of the first slot.
    slots_start: u64,
    slots: VecDeque<Slot>,
    /// The last entries, as many as fit.
    cache: VecDeque<Entry>,
    cache_bytes: usize,
    cache_bytes_max: usize,
    /// Oldest first.
    pub(super) markers: VecDeque<Marker>,
    pub(super) hard_state: HardState,
}

impl LogState {
    /// A log that holds nothing, not even a marker: the state before its first checkpoint.
    pub(super) fn new(cache_bytes_max: usize) -> Self {
        LogState {
            compacted: Position::default(),
            last: Position::default(),
            slots_start: 1,
            slots: VecDeque::new(),
            cache: VecDeque::new(),
            cache_bytes: 0,
            cache_bytes_max,
            markers: VecDeque::new(),
            hard_state: HardState::default(),
        }
    }

    /// The slot of an entry, if there is one.
    pub(super) fn slot(&self, index: u64) -> Option<&Slot> {
        self.slots.get(usize::try_from(index.checked_sub(self.slots_start)?).ok()?)
    }

    /// The term of an entry, or of the last compacted one.
    pub(super) fn term(&self, index: u64) -> Option<u64> {
        match index {
            _ if index == self.compacted.index => Some(self.compacted.term),
            _ if index == self.last.index => Some(self.last.term),
            _ => self.slot(index).map(|slot| slot.term),
        }
    }

    /// The index of the first cached entry; behind the last index if there is none.
    pub(super) fn cache_start(&self) -> u64 {
        self.last.index + 1 - self.cache.len() as u64
    }

    /// The cached entries from `low` up to but not including `high`, which all are cached.
    pub(super) fn cached(&self, low: u64, high: u64) -> impl Iterator<Item = &Entry> {
        let start = self.cache_start();
        self.cache.range((low - start) as usize..(high - start) as usize)
    }

    /// The oldest segment that holds an entry; `None` if there are no entries.
    pub(super) fn oldest_segment(&self) -> Option<u64> {
        self.slots.front().map(|slot| slot.segment)
    }

    /// Whether the batch keeps the rules: checked before anything of it is written. With `restart` its marker is a
    /// snapshot from the leader, which the log begins behind.
    pub(super) fn check(&self, batch: &Batch<'_>, restart: bool) -> Result<(), String> {
        let mut marker = self.markers.back().map_or(0, |marker| marker.index);
        let mut last = self.last;
        let mut settled = self.hard_state.commit;
        if let Some(new) = batch.marker {
            if restart {
                check_restart(new, settled)?;
                last = Position { index: new.index, term: new.term };
            } else if new.index < marker || self.term(new.index) != Some(new.term) {
                return Err(format!("a marker at index {}, term {} that the log does not hold", new.index, new.term));
            }
            marker = new.index;
            // What a snapshot holds is committed: the same batch does not replace it.
            settled = settled.max(new.index);
        }
        if let Some(first) = batch.entries.first() {
            check_reach(first.index, settled, last.index)?;
            let before = if first.index == last.index + 1 { Some(last.term) } else { self.term(first.index - 1) };
            let mut term = before.unwrap_or(0);
            for (entry, index) in batch.entries.iter().zip(first.index..) {
                if entry.index != index || entry.term < term {
                    return Err(format!("entry {} of term {} behind term {term}", entry.index, entry.term));
                }
                term = entry.term;
                last = Position { index, term };
            }
        }
        if let Some(new) = batch.hard_state {
            check_hard_state(&self.hard_state, new)?;
        }
        check_settled(marker, batch.hard_state.unwrap_or(&self.hard_state).commit, last.index)
    }

    /// Takes in one record of a batch that is on disk at `place`.
    ///
    /// # Errors
    /// If it contradicts what came before: then it is not of this log, or damaged with a good checksum.
    pub(super) fn apply(&mut self, record: Record, place: Place) -> Result<(), String> {
        match record {
            Record::Entry(entry) => self.append(entry, place)?,
            Record::HardState(hard_state) => {
                check_hard_state(&self.hard_state, &hard_state)?;
                self.hard_state = hard_state;
            }
            Record::Marker(marker) => self.add_marker(marker)?,
            Record::Restart(marker) => {
                check_restart(&marker, self.hard_state.commit)?;
                let position = Position { index: marker.index, term: marker.term };
                self.restart(position, position);
                self.markers.push_back(marker);
            }
            Record::Compact(to) => {
                if to.index < self.compacted.index || self.markers.back().is_none_or(|newest| newest.index < to.index) {
                    return Err(format!("a compaction to {} without a snapshot", to.index));
                }
                self.compact(to);
            }
            Record::Checkpoint { compacted, last } => self.checkpoint(compacted, last)?,
            Record::Seal => {}
        }
        Ok(())
    }

    /// What must hold when a batch is taken in.
    pub(super) fn check_settled(&self) -> Result<(), String> {
        let marker = self.markers.back().ok_or("there is no snapshot marker")?;
        check_settled(marker.index, self.hard_state.commit, self.last.index)
    }

    /// The first entry that should be there and is not, because its segment is gone.
    pub(super) fn missing(&self) -> Option<u64> {
        (self.compacted.index + 1 < self.slots_start).then_some(self.compacted.index + 1)
    }

    /// Takes an entry in, which replaces the one of its index and all later ones.
    pub(super) fn append(&mut self, entry: Entry, place: Place) -> Result<(), String> {
        let index = entry.index;
        check_reach(index, self.hard_state.commit.max(self.compacted.index), self.last.index)?;
        if self.term(index - 1).is_some_and(|before| before > entry.term) {
            return Err(format!("entry {index} of term {} behind a later term", entry.term));
        }
        if index <= self.last.index {
            self.truncate(index);
        }
        self.last = Position { index, term: entry.term };
        let Place { segment, offset, bytes } = place;
        self.slots.push_back(Slot { term: entry.term, segment, offset, bytes });
        self.cache_bytes += cost(&entry);
        self.cache.push_back(entry);
        while self.cache_bytes > self.cache_bytes_max {
            self.drop_oldest_cached();
        }
        Ok(())
    }

    /// Forgets the entries from `index` on; the caller sets `last`.
    fn truncate(&mut self, index: u64) {
        let cached = index.saturating_sub(self.cache_start()) as usize;
        self.cache_bytes -= self.cache.iter().skip(cached).map(cost).sum::<usize>();
        self.cache.truncate(cached);
        if index < self.slots_start {
            self.slots_start = index;
        }
        self.slots.truncate((index - self.slots_start) as usize);
    }

    fn drop_oldest_cached(&mut self) {
        if let Some(entry) = self.cache.pop_front() {
            self.cache_bytes -= cost(&entry);
        }
    }

    fn checkpoint(&mut self, compacted: Position, last: Position) -> Result<(), String> {
        let is_possible = if compacted.index == last.index { compacted == last } else { compacted.index < last.index };
        if !is_possible || last.index > START_MAX {
            return Err(format!("a log that was compacted to {} and ends at {}", compacted.index, last.index));
        }
        if self.markers.is_empty() {
            self.restart(compacted, last);
        } else if (compacted, last) != (self.compacted, self.last) {
            return Err("the segment goes on from another state of the log".to_string());
        }
        // All that is remembered is said again behind a checkpoint.
        self.markers.clear();
        Ok(())
    }

    fn restart(&mut self, compacted: Position, last: Position) {
        self.slots.clear();
        self.cache.clear();
        self.cache_bytes = 0;
        self.markers.clear();
        (self.compacted, self.last, self.slots_start) = (compacted, last, last.index + 1);
    }

    fn add_marker(&mut self, marker: Marker) -> Result<(), String> {
        let newest = self.markers.back().map_or(self.compacted.index, |newest| newest.index);
        let term = self.term(marker.index);
        if marker.index < newest || marker.index > self.last.index || term.is_some_and(|term| term != marker.term) {
            return Err(format!("a marker at {} that does not fit into the log", marker.index));
        }
        if self.markers.back().is_some_and(|newest| newest.index == marker.index) {
            self.markers.pop_back();
        }
        self.markers.push_back(marker);
        if self.markers.len() > MARKERS_MAX {
            self.markers.pop_front();
        }
        Ok(())
    }

    /// Forgets the entries up to `to`.
    pub(super) fn compact(&mut self, to: Position) {
        while self.cache_start() <= to.index.min(self.last.index) && !self.cache.is_empty() {
            self.drop_oldest_cached();
        }
        let gone = (to.index + 1).saturating_sub(self.slots_start).min(self.slots.len() as u64);
        self.slots.drain(..gone as usize);
        self.slots_start += gone;
        self.compacted = to;
        // A snapshot before the first entry has nothing that could follow it.
        self.markers.retain(|marker| marker.index >= to.index);
    }
}

/// What an entry takes in the cache, in bytes.
fn cost(entry: &Entry) -> usize {
    size_of::<Entry>() + entry.context.len() + entry.data.len()
}

/// An entry may follow the last one, or replace one that is not `settled` (committed, or covered by a snapshot).
fn check_reach(index: u64, settled: u64, last: u64) -> Result<(), String> {
    if index <= settled {
        return Err(format!("entry {index} would replace a committed one, the commit index is {settled}"));
    }
    if index > last + 1 {
        return Err(format!("entry {index} would leave a gap, the last index is {last}"));
    }
    Ok(())
}

fn check_restart(marker: &Marker, commit: u64) -> Result<(), String> {
    if marker.index > START_MAX {
        return Err(format!("a snapshot at {}, which no log reaches", marker.index));
    }
    if marker.index < commit {
        return Err(format!("a snapshot at {} would undo commits up to {commit}", marker.index));
    }
    Ok(())
}

fn check_hard_state(old: &HardState, new: &HardState) -> Result<(), String> {
    if new.term < old.term || new.commit < old.commit {
        return Err(format!(
            "hard state of term {} and commit {} behind term {} and commit {}",
            new.term, new.commit, old.term, old.commit
        ));
    }
    Ok(())
}

fn check_settled(marker: u64, commit: u64, last: u64) -> Result<(), String> {
    if marker > commit || commit > last {
        return Err(format!("commit index {commit} is not between the snapshot at {marker} and the last entry {last}"));
    }
    Ok(())
}
