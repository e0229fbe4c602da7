//! A data directory in memory that behaves at a crash as badly as a real one may.
//!
//! It keeps what the running system sees apart from what is durable. [`MemoryDisk::crash`] drops the first and goes on
//! from the second plus an arbitrary part of what was not synced, drawn from the caller's seed: there is no randomness,
//! clock or thread in here, so the same calls and the same seeds give the same bytes.
//!
//! What a crash may do, chosen to be at least as bad as a Linux file system on an honest disk:
//! * A sector of [`SECTOR_BYTES`] is written whole or not at all, and each sector for itself: of one unsynced write any
//!   subset of sectors may survive, and of two writes to a sector the older state as well as the newer.
//! * An unsynced length is the old or any newer one, whatever becomes of the data.
//! * Of unsynced creations, renames and removals any subset survives, in any order; one rename is atomic. (A journal
//!   would keep them in order; nothing here relies on one.)
//! * A failed [`sync_data`](DiskFile::sync_data) loses the unsynced data for good while reads still show it, and later
//!   syncs succeed, as on Linux. A failed directory sync leaves names as they were: unsynced.

use std::collections::BTreeMap;
use std::io;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::disk::{Disk, DiskFile};
use crate::random::SplitMix64;

/// What the disk writes atomically.
pub const SECTOR_BYTES: usize = 512;

/// "Input/output error" of Linux.
const EIO: i32 = 5;
/// "No space left on device" of Linux.
const ENOSPC: i32 = 28;

type Sector = [u8; SECTOR_BYTES];

/// What a caller can do to the disk, for counting and failing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Operation {
    /// [`Disk::create`].
    Create,
    /// [`Disk::open`].
    Open,
    /// [`Disk::list`].
    List,
    /// [`Disk::rename`].
    Rename,
    /// [`Disk::remove`].
    Remove,
    /// [`Disk::sync_directory`].
    SyncDirectory,
    /// [`DiskFile::read_at`].
    Read,
    /// [`DiskFile::write_all_at`].
    Write,
    /// [`DiskFile::set_len`].
    SetLen,
    /// [`DiskFile::sync_data`].
    Sync,
}

impl Operation {
    fn changes(self) -> bool {
        !matches!(self, Operation::Open | Operation::List | Operation::Read)
    }
}

/// How an operation goes wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Failure {
    /// EIO, with nothing done; of a sync: with the unsynced data lost.
    Error,
    /// A write stops half way, at the end of a sector (page caches take whole pages), then EIO. For anything else the
    /// same as [`Failure::Error`].
    Short,
}

struct Fault {
    /// `None`: any operation that changes something.
    operation: Option<Operation>,
    /// Fires when it has counted down to 0.
    remaining: u64,
    failure: Failure,
}

/// How many operations there have been since the disk was made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// All that change something, syncs included.
    pub changes: u64,
    /// Writes.
    pub writes: u64,
    /// Syncs of files.
    pub syncs: u64,
    /// Syncs of the directory.
    pub directory_syncs: u64,
}

#[derive(Clone, Default)]
struct Content {
    len: u64,
    /// Sectors that are not there are zeros, so that a large preallocated file costs nothing. A sector is shared by all
    /// states of the file that have it, and replaced when it changes.
    sectors: BTreeMap<u64, Arc<Sector>>,
}

impl Content {
    fn sector(&self, number: u64) -> Arc<Sector> {
        self.sectors.get(&number).cloned().unwrap_or_else(|| Arc::new([0; SECTOR_BYTES]))
    }

    /// The sector, to be changed.
    fn sector_mut(&mut self, number: u64) -> &mut Sector {
        Arc::make_mut(self.sectors.entry(number).or_insert_with(|| Arc::new([0; SECTOR_BYTES])))
    }

    /// Applies a length: nothing lies beyond it.
    fn set_len(&mut self, len: u64) {
        self.len = len;
        let sector_bytes = SECTOR_BYTES as u64;
        self.sectors.split_off(&len.div_ceil(sector_bytes));
        if let Some(sector) = self.sectors.get_mut(&(len / sector_bytes)) {
            Arc::make_mut(sector)[(len % sector_bytes) as usize..].fill(0);
        }
    }

    fn read(&self, buffer: &mut [u8], offset: u64) {
        for (at, byte_count, number, within) in pieces(offset, buffer.len()) {
            let target = &mut buffer[at..at + byte_count];
            match self.sectors.get(&number) {
                Some(sector) => target.copy_from_slice(&sector[within..within + byte_count]),
                None => target.fill(0),
            }
        }
    }

    fn bytes(&self) -> Vec<u8> {
        let mut bytes = vec![0; self.len as usize];
        self.read(&mut bytes, 0);
        bytes
    }
}

/// Cuts a range at sector boundaries: place in the range, length, sector, place in the sector.
fn pieces(offset: u64, len: usize) -> impl Iterator<Item = (usize, usize, u64, usize)> {
    let mut at = 0;
    std::iter::from_fn(move || {
        if at == len {
            return None;
        }
        let position = offset + at as u64;
        let within = (position % SECTOR_BYTES as u64) as usize;
        let count = (SECTOR_BYTES - within).min(len - at);
        let piece = (at, count, position / SECTOR_BYTES as u64, within);
        at += count;
        Some(piece)
    })
}

#[derive(Clone, Default)]
struct Inode {
    current: Content,
    durable: Content,
    /// Every state a sector was in since the last sync, each with the number of the change that made it.
    dirty: BTreeMap<u64, Vec<(u64, Arc<Sector>)>>,
    /// Every length since the last sync, likewise.
    lengths: Vec<(u64, u64)>,
    /// Open handles: on Unix a file lives as long as one of them, whatever its name.
    handles: usize,
}

impl Inode {
    fn write(&mut self, change: u64, bytes: &[u8], offset: u64) {
        for (at, count, number, within) in pieces(offset, bytes.len()) {
            self.current.sector_mut(number)[within..within + count].copy_from_slice(&bytes[at..at + count]);
            self.dirty.entry(number).or_default().push((change, self.current.sector(number)));
        }
        let end = offset + bytes.len() as u64;
        if end > self.current.len {
            self.current.len = end;
            self.lengths.push((change, end));
        }
    }

    fn set_len(&mut self, change: u64, len: u64) {
        let gone: Vec<u64> =
            self.current.sectors.range(len / SECTOR_BYTES as u64..).map(|(&number, _)| number).collect();
        self.current.set_len(len);
        for number in gone {
            self.dirty.entry(number).or_default().push((change, self.current.sector(number)));
        }
        self.lengths.push((change, len));
    }

    fn sync(&mut self) {
        if self.dirty.is_empty() && self.lengths.is_empty() {
            return;
        }
        for (number, mut states) in std::mem::take(&mut self.dirty) {
            if let Some((_, sector)) = states.pop() {
                self.durable.sectors.insert(number, sector);
            }
        }
        self.lengths.clear();
        self.durable.set_len(self.current.len);
    }

    fn sync_failed(&mut self) {
        self.dirty.clear();
        self.lengths.clear();
    }

    fn crash(&mut self, loss: Loss, random: &mut SplitMix64) {
        for (number, states) in std::mem::take(&mut self.dirty) {
            if let Some(state) = loss.choose(&states, random) {
                self.durable.sectors.insert(number, state);
            }
        }
        let len = loss.choose(&self.lengths, random).unwrap_or(self.durable.len);
        self.lengths.clear();
        self.durable.set_len(len);
        self.current = self.durable.clone();
        self.handles = 0;
    }
}

/// What a crash does to the unsynced part of one file or of the directory.
#[derive(Clone, Copy)]
enum Loss {
    Everything,
    Nothing,
    /// Changes before this one survive, later ones do not, and of this one any part.
    After(u64),
    /// Each sector, length and name for itself.
    Scattered,
}

impl Loss {
    fn draw(changes: u64, random: &mut SplitMix64) -> Loss {
        match random.below(6) {
            0 => Loss::Everything,
            1 => Loss::Nothing,
            // Recent changes are the likely ones to be unsynced.
            2 | 3 => Loss::After(changes.saturating_sub(random.below(8))),
            _ => Loss::Scattered,
        }
    }

    /// Which of the unsynced `states` survives, oldest first; `None`: none of them.
    fn choose<T: Clone>(self, states: &[(u64, T)], random: &mut SplitMix64) -> Option<T> {
        let kept = match self {
            Loss::Everything => 0,
            Loss::Nothing => states.len(),
            Loss::After(cut) => {
                let before = states.partition_point(|&(change, _)| change < cut);
                let torn = states.get(before).is_some_and(|&(change, _)| change == cut);
                before + usize::from(torn && random.below(2) == 0)
            }
            Loss::Scattered => random.below(states.len() as u64 + 1) as usize,
        };
        kept.checked_sub(1).map(|last| states[last].1.clone())
    }

    fn keeps(self, change: u64, random: &mut SplitMix64) -> bool {
        self.choose(&[(change, ())], random).is_some()
    }
}

type Inumber = u64;

#[derive(Clone)]
enum NameChange {
    Link { name: String, inode: Inumber },
    Rename { from: String, to: String, inode: Inumber },
    Unlink { name: String },
}

impl NameChange {
    /// Makes the change; the file whose name is gone by that.
    fn apply(&self, names: &mut BTreeMap<String, Inumber>) -> Option<Inumber> {
        match self {
            NameChange::Link { name, inode } => names.insert(name.clone(), *inode),
            NameChange::Rename { from, to, inode } => {
                if names.get(from) == Some(inode) {
                    names.remove(from);
                }
                names.insert(to.clone(), *inode)
            }
            NameChange::Unlink { name } => names.remove(name),
        }
    }

    fn speaks_of(&self, number: Inumber) -> bool {
        match self {
            NameChange::Link { inode, .. } | NameChange::Rename { inode, .. } => *inode == number,
            NameChange::Unlink { .. } => false,
        }
    }
}

#[derive(Default)]
struct State {
    inodes: BTreeMap<Inumber, Inode>,
    inodes_made: u64,
    names: BTreeMap<String, Inumber>,
    durable_names: BTreeMap<String, Inumber>,
    name_changes: Vec<(u64, NameChange)>,
    /// Counts crashes: handles of an earlier life are stale.
    life: u64,
    capacity: Option<u64>,
    faults: Vec<Fault>,
    /// The power fails at this change.
    power_ends_at: Option<u64>,
    counts: Counts,
}

impl State {
    /// Counts an operation, and fails it if it is its turn. A failing sync and a short write are returned instead: they
    /// have something to do before they fail.
    fn begin(&mut self, operation: Operation) -> io::Result<Option<Failure>> {
        if operation.changes() {
            self.counts.changes += 1;
        }
        match operation {
            Operation::Write => self.counts.writes += 1,
            Operation::Sync => self.counts.syncs += 1,
            Operation::SyncDirectory => self.counts.directory_syncs += 1,
            _ => {}
        }
        if self.power_ends_at.is_some_and(|end| self.counts.changes >= end) {
            return Err(io::Error::other("the simulated power is gone"));
        }
        let mut failure = None;
        self.faults.retain_mut(|fault| {
            let counts = fault.operation.map_or(operation.changes(), |wanted| wanted == operation);
            if counts {
                fault.remaining -= 1;
            }
            if fault.remaining == 0 {
                failure = Some(fault.failure);
            }
            fault.remaining > 0
        });
        match (operation, failure) {
            // These two have something left to do before they fail.
            (Operation::Sync, failure) | (Operation::Write, failure @ (None | Some(Failure::Short))) => Ok(failure),
            (_, None) => Ok(None),
            (_, Some(_)) => Err(io::Error::from_raw_os_error(EIO)),
        }
    }

    fn change_name(&mut self, change: NameChange) {
        let _ = change.apply(&mut self.names);
        self.name_changes.push((self.counts.changes, change));
    }

    fn named(&self, name: &str) -> io::Result<Inumber> {
        self.names
            .get(name)
            .copied()
            .ok_or_else(|| io::Error::new(io::ErrorKind::NotFound, format!("there is no file '{name}'")))
    }

    /// The sum of all lengths.
    fn used(&self) -> u64 {
        self.names.values().filter_map(|inode| self.inodes.get(inode)).map(|inode| inode.current.len).sum()
    }

    /// The bytes that still fit.
    fn free(&self) -> u64 {
        self.capacity.map_or(u64::MAX, |capacity| capacity.saturating_sub(self.used()))
    }

    /// Fails if `bytes` more do not fit.
    fn allocate(&self, bytes: u64) -> io::Result<()> {
        match bytes > self.free() {
            true => Err(io::Error::from_raw_os_error(ENOSPC)),
            false => Ok(()),
        }
    }

    /// Makes all changes of names durable.
    fn sync_names(&mut self) {
        for (_, change) in std::mem::take(&mut self.name_changes) {
            if let Some(nameless) = change.apply(&mut self.durable_names) {
                self.forget_if_unreachable(nameless);
            }
        }
    }

    /// Forgets a file if nobody can reach it, now or after a crash.
    fn forget_if_unreachable(&mut self, number: Inumber) {
        let is_named = |names: &BTreeMap<String, Inumber>| names.values().any(|named| *named == number);
        let is_open = self.inodes.get(&number).is_some_and(|inode| inode.handles > 0);
        let may_be_named = self.name_changes.iter().any(|(_, change)| change.speaks_of(number));
        if !(is_open || may_be_named || is_named(&self.names) || is_named(&self.durable_names)) {
            self.inodes.remove(&number);
        }
    }

    /// Forgets all files that nobody can reach.
    fn forget_unreachable(&mut self) {
        let numbers: Vec<Inumber> = self.inodes.keys().copied().collect();
        numbers.into_iter().for_each(|number| self.forget_if_unreachable(number));
    }
}

/// A simulated data directory. Clones are the same directory.
#[derive(Clone, Default)]
pub struct MemoryDisk {
    state: Arc<Mutex<State>>,
}

impl MemoryDisk {
    /// An empty directory.
    pub fn new() -> Self {
        MemoryDisk::default()
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Power loss and restart: keeps what was synced and what `seed` draws of the rest. Files opened before are stale:
    /// all their operations fail. Faults and a limit of [`stop_at`](Self::stop_at) are gone.
    pub fn crash(&self, seed: u64) {
        let mut random = SplitMix64::new(seed);
        let mut state = self.state();
        let changes = state.counts.changes;
        // Sometimes one fate for all, which keeps the order of changes between files; sometimes each its own.
        let common = (random.below(2) == 0).then(|| Loss::draw(changes, &mut random));
        let loss = common.unwrap_or_else(|| Loss::draw(changes, &mut random));
        for (change, name_change) in std::mem::take(&mut state.name_changes) {
            if loss.keeps(change, &mut random) {
                let _ = name_change.apply(&mut state.durable_names);
            }
        }
        state.names = state.durable_names.clone();
        for inode in state.inodes.values_mut() {
            let loss = common.unwrap_or_else(|| Loss::draw(changes, &mut random));
            inode.crash(loss, &mut random);
        }
        state.life += 1;
        state.faults.clear();
        state.power_ends_at = None;
        state.forget_unreachable();
    }

    /// Lets the `nth` operation of this kind from now on fail once (1: the next). `None` counts every operation that
    /// changes something.
    ///
    /// # Panics
    /// If `nth` is 0.
    pub fn fail(&self, operation: Option<Operation>, nth: u64, failure: Failure) {
        assert!(nth > 0, "operations are counted from 1");
        self.state().faults.push(Fault { operation, remaining: nth, failure });
    }

    /// Cuts the power at the `nth` change from now on (1: the next): it and everything after it fails, reading too,
    /// until [`crash`](Self::crash). What was not synced by then is in doubt.
    pub fn stop_at(&self, nth: u64) {
        let mut state = self.state();
        state.power_ends_at = Some(state.counts.changes + nth);
    }

    /// Forgets faults that have not fired, and gives the power back without a crash.
    pub fn clear_faults(&self) {
        let mut state = self.state();
        state.faults.clear();
        state.power_ends_at = None;
    }

    /// Limits the sum of all lengths; beyond it there is ENOSPC, and of a write only the sectors that fit are done.
    pub fn set_capacity(&self, bytes: Option<u64>) {
        self.state().capacity = bytes;
    }

    /// The sum of all lengths.
    pub fn used_bytes(&self) -> u64 {
        self.state().used()
    }

    /// How many operations there have been.
    pub fn counts(&self) -> Counts {
        self.state().counts
    }

    /// A copy of everything as the running system sees it, all of it durable: an older copy of the directory, in time.
    pub fn fork(&self) -> MemoryDisk {
        let copy = MemoryDisk::new();
        let state = self.state();
        let mut target = copy.state();
        target.inodes_made = state.inodes_made;
        target.capacity = state.capacity;
        target.names = state.names.clone();
        target.durable_names = state.names.clone();
        for number in state.names.values() {
            if let Some(inode) = state.inodes.get(number) {
                let (current, durable) = (inode.current.clone(), inode.current.clone());
                target.inodes.insert(*number, Inode { current, durable, ..Inode::default() });
            }
        }
        drop(target);
        drop(state);
        copy
    }

    /// The content of a file as the running system sees it; `None` if there is none of that name.
    pub fn read_file(&self, name: &str) -> Option<Vec<u8>> {
        let state = self.state();
        let number = state.names.get(name)?;
        state.inodes.get(number).map(|inode| inode.current.bytes())
    }

    /// Replaces the content of a file, or makes it, durably, counting nothing.
    pub fn write_file(&self, name: &str, bytes: &[u8]) {
        let mut state = self.state();
        let number = state.names.get(name).copied().unwrap_or_else(|| {
            state.inodes_made += 1;
            state.inodes_made
        });
        state.names.insert(name.to_string(), number);
        state.durable_names.insert(name.to_string(), number);
        let inode = state.inodes.entry(number).or_default();
        *inode = Inode { handles: inode.handles, ..Inode::default() };
        inode.write(0, bytes, 0);
        inode.sync();
    }

    /// Flips one bit of a file, counted from bit 0 of byte 0, durably.
    ///
    /// # Panics
    /// If there is no such file or bit.
    pub fn flip_bit(&self, name: &str, bit: u64) {
        let mut state = self.state();
        let number = *state.names.get(name).expect("the file to damage exists");
        let inode = state.inodes.get_mut(&number).expect("a name stands for a file");
        assert!(bit / 8 < inode.current.len, "the bit to flip is in the file");
        let byte = bit / 8;
        for content in [&mut inode.current, &mut inode.durable] {
            content.sector_mut(byte / SECTOR_BYTES as u64)[(byte % SECTOR_BYTES as u64) as usize] ^= 1 << (bit % 8);
        }
    }

    fn handle(&self, state: &mut State, inode: Inumber) -> Box<dyn DiskFile> {
        if let Some(inode) = state.inodes.get_mut(&inode) {
            inode.handles += 1;
        }
        Box::new(MemoryFile { disk: self.clone(), inode, life: state.life })
    }
}

impl Disk for MemoryDisk {
    fn list(&self) -> io::Result<Vec<String>> {
        let mut state = self.state();
        state.begin(Operation::List)?;
        Ok(state.names.keys().cloned().collect())
    }

    fn create(&self, name: &str, reserve_bytes: u64) -> io::Result<Box<dyn DiskFile>> {
        let mut state = self.state();
        state.begin(Operation::Create)?;
        if state.names.contains_key(name) {
            return Err(io::Error::new(io::ErrorKind::AlreadyExists, format!("there is a file '{name}'")));
        }
        state.inodes_made += 1;
        let number = state.inodes_made;
        state.inodes.insert(number, Inode::default());
        state.change_name(NameChange::Link { name: name.to_string(), inode: number });
        state.allocate(reserve_bytes)?;
        let change = state.counts.changes;
        if let Some(inode) = state.inodes.get_mut(&number)
            && reserve_bytes > 0
        {
            inode.set_len(change, reserve_bytes);
        }
        Ok(self.handle(&mut state, number))
    }

    fn open(&self, name: &str) -> io::Result<Box<dyn DiskFile>> {
        let mut state = self.state();
        state.begin(Operation::Open)?;
        let number = state.named(name)?;
        Ok(self.handle(&mut state, number))
    }

    fn rename(&self, from: &str, to: &str) -> io::Result<()> {
        let mut state = self.state();
        state.begin(Operation::Rename)?;
        let inode = state.named(from)?;
        state.change_name(NameChange::Rename { from: from.to_string(), to: to.to_string(), inode });
        Ok(())
    }

    fn remove(&self, name: &str) -> io::Result<()> {
        let mut state = self.state();
        state.begin(Operation::Remove)?;
        state.named(name)?;
        state.change_name(NameChange::Unlink { name: name.to_string() });
        Ok(())
    }

    fn sync_directory(&self) -> io::Result<()> {
        let mut state = self.state();
        state.begin(Operation::SyncDirectory)?;
        state.sync_names();
        Ok(())
    }

    fn free_bytes(&self) -> io::Result<u64> {
        Ok(self.state().free())
    }

    fn path(&self, name: &str) -> PathBuf {
        PathBuf::from("memory").join(name)
    }
}

struct MemoryFile {
    disk: MemoryDisk,
    inode: Inumber,
    life: u64,
}

impl MemoryFile {
    /// Does `act` with the file if it is not stale and no fault is due.
    fn with<T>(
        &self,
        operation: Operation,
        act: impl FnOnce(&mut State, Option<Failure>) -> io::Result<T>,
    ) -> io::Result<T> {
        let mut state = self.disk.state();
        if state.life != self.life {
            return Err(io::Error::other("stale handle: the file was opened before a crash"));
        }
        let failure = state.begin(operation)?;
        act(&mut state, failure)
    }
}

fn inode(state: &mut State, number: Inumber) -> io::Result<&mut Inode> {
    state.inodes.get_mut(&number).ok_or_else(|| io::Error::other("stale handle: the file is gone"))
}

impl DiskFile for MemoryFile {
    fn len(&self) -> io::Result<u64> {
        self.with(Operation::Read, |state, _| Ok(inode(state, self.inode)?.current.len))
    }

    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
        self.with(Operation::Read, |state, _| {
            let content = &inode(state, self.inode)?.current;
            let count = content.len.saturating_sub(offset).min(buffer.len() as u64) as usize;
            content.read(&mut buffer[..count], offset);
            Ok(count)
        })
    }

    fn write_all_at(&mut self, bytes: &[u8], offset: u64) -> io::Result<()> {
        self.with(Operation::Write, |state, failure| {
            let change = state.counts.changes;
            let half = (offset + bytes.len() as u64 / 2) / SECTOR_BYTES as u64 * SECTOR_BYTES as u64;
            let written = if failure.is_some() { &bytes[..half.saturating_sub(offset) as usize] } else { bytes };
            let len = inode(state, self.inode)?.current.len;
            let room_to = len.saturating_add(state.free());
            let fitting = (room_to / SECTOR_BYTES as u64 * SECTOR_BYTES as u64).saturating_sub(offset) as usize;
            let is_full = offset + written.len() as u64 > room_to;
            let written = if is_full { &written[..fitting.min(written.len())] } else { written };
            inode(state, self.inode)?.write(change, written, offset);
            match (is_full, failure) {
                (true, _) => Err(io::Error::from_raw_os_error(ENOSPC)),
                (false, Some(_)) => Err(io::Error::from_raw_os_error(EIO)),
                (false, None) => Ok(()),
            }
        })
    }

    fn sync_data(&mut self) -> io::Result<()> {
        self.with(Operation::Sync, |state, failure| {
            let inode = inode(state, self.inode)?;
            if failure.is_some() {
                inode.sync_failed();
                return Err(io::Error::from_raw_os_error(EIO));
            }
            inode.sync();
            Ok(())
        })
    }

    fn set_len(&mut self, bytes: u64) -> io::Result<()> {
        self.with(Operation::SetLen, |state, _| {
            let change = state.counts.changes;
            let len = inode(state, self.inode)?.current.len;
            state.allocate(bytes.saturating_sub(len))?;
            inode(state, self.inode)?.set_len(change, bytes);
            Ok(())
        })
    }
}

impl Drop for MemoryFile {
    fn drop(&mut self) {
        let mut state = self.disk.state();
        if state.life != self.life {
            return;
        }
        if let Some(inode) = state.inodes.get_mut(&self.inode) {
            inode.handles = inode.handles.saturating_sub(1);
        }
        state.forget_if_unreachable(self.inode);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::disk::write_atomically;

    #[test]
    fn a_crash_keeps_what_was_synced_and_loses_at_most_the_rest() {
        let (mut lost, mut kept, mut torn) = (0, 0, 0);
        for seed in 0..200 {
            let disk = MemoryDisk::new();
            let mut file = disk.create("f", 4096).unwrap();
            file.write_all_at(&[1; 1024], 0).unwrap();
            file.sync_data().unwrap();
            disk.sync_directory().unwrap();
            file.write_all_at(&[2; 2048], 512).unwrap();
            disk.crash(seed);
            assert!(file.sync_data().is_err(), "the handle is stale");
            let bytes = disk.read_file("f").unwrap();
            assert_eq!(bytes.len(), 4096);
            assert_eq!(bytes[..512], [1; 512]);
            let sectors: Vec<u8> = bytes.chunks(512).map(|sector| sector[0]).collect();
            assert!(bytes.chunks(512).all(|sector| sector.iter().all(|byte| *byte == sector[0])), "whole sectors");
            match sectors[1..5].iter().filter(|byte| **byte == 2).count() {
                0 => lost += 1,
                4 => kept += 1,
                _ => torn += 1,
            }
            assert_eq!(sectors[5..], [0, 0, 0]);
        }
        assert!(lost > 20 && kept > 20 && torn > 20, "{lost} {kept} {torn}");
    }

    #[test]
    fn names_that_were_not_synced_may_be_lost_one_by_one() {
        let mut seen = std::collections::BTreeSet::new();
        for seed in 0..300 {
            let disk = MemoryDisk::new();
            drop(disk.create("a", 0).unwrap());
            drop(disk.create("b", 0).unwrap());
            disk.sync_directory().unwrap();
            disk.remove("a").unwrap();
            disk.rename("b", "c").unwrap();
            disk.crash(seed);
            seen.insert(disk.list().unwrap().join(" "));
        }
        assert_eq!(seen.into_iter().collect::<Vec<_>>(), ["a b", "a c", "b", "c"]);
    }

    #[test]
    fn after_a_failed_sync_the_data_is_seen_and_lost() {
        let disk = MemoryDisk::new();
        let mut file = disk.create("f", 0).unwrap();
        file.sync_data().unwrap();
        disk.sync_directory().unwrap();
        file.write_all_at(b"gone", 0).unwrap();
        disk.fail(Some(Operation::Sync), 1, Failure::Error);
        assert!(file.sync_data().is_err());
        file.sync_data().unwrap();
        assert_eq!(disk.read_file("f").unwrap(), b"gone");
        disk.crash(0);
        assert_eq!(disk.read_file("f").unwrap(), b"");
    }

    #[test]
    fn a_file_put_in_place_atomically_is_the_old_or_the_new_one() {
        for stop in 1..8 {
            for seed in 0..50 {
                let disk = MemoryDisk::new();
                write_atomically(&disk, "f", b"old").unwrap();
                disk.stop_at(stop);
                let done = write_atomically(&disk, "f", b"new").is_ok();
                disk.crash(seed);
                let bytes = disk.read_file("f").unwrap();
                assert!(bytes == b"new" || (bytes == b"old" && !done), "stop {stop}, seed {seed}");
            }
        }
    }

    #[test]
    fn faults_strike_once_and_capacity_ends_in_enospc() {
        let disk = MemoryDisk::new();
        let mut file = disk.create("f", 0).unwrap();
        disk.fail(Some(Operation::Write), 2, Failure::Short);
        file.write_all_at(&[1; 1200], 0).unwrap();
        assert_eq!(file.write_all_at(&[2; 1200], 0).unwrap_err().raw_os_error(), Some(EIO));
        assert_eq!(disk.read_file("f").unwrap(), [[2; 512].as_slice(), &[1; 688]].concat());
        disk.set_capacity(Some(1202));
        assert_eq!(file.write_all_at(&[3; 4], 1200).unwrap_err().kind(), io::ErrorKind::StorageFull);
        assert_eq!(disk.create("g", 3).err().unwrap().kind(), io::ErrorKind::StorageFull);
        assert_eq!(disk.free_bytes().unwrap(), 2);
        assert_eq!(disk.counts().writes, 3);
    }

    #[test]
    fn an_open_file_outlives_its_name_and_a_copy_is_apart() {
        let disk = MemoryDisk::new();
        disk.write_file("f", b"text");
        let copy = disk.fork();
        let file = disk.open("f").unwrap();
        disk.remove("f").unwrap();
        disk.sync_directory().unwrap();
        let mut bytes = [0; 4];
        file.read_exact_at(&mut bytes, 0).unwrap();
        assert_eq!(&bytes, b"text");
        copy.flip_bit("f", 1);
        assert_eq!((disk.read_file("f"), copy.read_file("f")), (None, Some(b"vext".to_vec())));
    }
}
