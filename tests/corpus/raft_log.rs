//! The log at start: one that was damaged opens as it was or not at all, and segments whose checksums are good may say
//! anything.

use std::sync::Arc;

use bytes::Bytes;
use raft::eraftpb::{ConfState, Entry, EntryType, HardState};
use raftexample::disk::Disk;
use raftexample::membership::ClusterId;
use raftexample::memory_disk::{MemoryDisk, SECTOR_BYTES};
use raftexample::raft_log::{Batch, LogError, LogIdentity, LogOptions, Marker, RaftLog};

use crate::choices::Choices;
use crate::forged_log;

pub const IDENTITY: LogIdentity = LogIdentity { cluster: ClusterId([7; 16]), node: 3, directory: 0xD1CE };

/// The smallest segments, so that a few writes fill one, and hardly a cache, so that entries are read back.
const OPTIONS: LogOptions = LogOptions { segment_bytes: 4 << 10, cache_bytes: 500 };

/// What is done to a log before it is damaged.
const STEPS_MAX: usize = 40;

pub fn run(input: &[u8]) {
    let mut choices = Choices::new(input);
    match choices.below(3) {
        0 => forged(&mut choices),
        1 => written(&mut choices, crash),
        _ => written(&mut choices, damage),
    }
}

fn open(disk: &MemoryDisk) -> Result<RaftLog, LogError> {
    RaftLog::open(Arc::new(disk.clone()), IDENTITY, OPTIONS)
}

/// Everything that a log answers.
#[derive(Clone, Debug, PartialEq)]
struct Shown {
    first_index: u64,
    entries: Vec<Entry>,
    hard_state: HardState,
    markers: Vec<Marker>,
}

impl Shown {
    fn of(log: &RaftLog) -> Shown {
        let (first_index, last_index) = (log.first_index(), log.last_index());
        let entries = log.entries(first_index, last_index + 1, u64::MAX).expect("all entries can be read");
        for (entry, index) in entries.iter().zip(first_index..) {
            assert_eq!((entry.index, Ok(entry.term)), (index, log.term(index).map_err(drop)));
        }
        assert_eq!(entries.len() as u64, last_index + 1 - first_index);
        Shown { first_index, entries, hard_state: log.hard_state().clone(), markers: log.markers().cloned().collect() }
    }

    fn last_index(&self) -> u64 {
        self.first_index + self.entries.len() as u64 - 1
    }
}

/// Whether nothing can be said of what is found afterwards but that it was there once.
type Excused = bool;

/// Writes a log, does something to its files, and opens it.
fn written(choices: &mut Choices<'_>, spoil: fn(&mut Choices<'_>, &MemoryDisk) -> Excused) {
    let disk = MemoryDisk::new();
    let (marker, hard_state) = (marker(1, 1), hard_state(1, 0, 1));
    let log = RaftLog::create(Arc::new(disk.clone()), IDENTITY, OPTIONS, marker, hard_state);
    let mut log = log.expect("the disk is good");
    let mut history = vec![Shown::of(&log)];
    let mut synced = 0;
    for _ in 0..1 + choices.below(STEPS_MAX) {
        let now = &history[history.len() - 1];
        let (result, syncs) = step(choices, &mut log, now);
        let shown = Shown::of(&log);
        match result {
            Ok(()) => {
                history.push(shown);
                synced = if syncs { history.len() - 1 } else { synced };
            }
            Err(LogError::Misuse(_)) => assert_eq!(shown, *now, "a refused batch has changed the log"),
            Err(error) => panic!("{error}"),
        }
    }
    drop(log);
    let excused = spoil(choices, &disk);
    let Ok(mut log) = open(&disk) else { return };
    let shown = Shown::of(&log);
    let oldest = if excused { 0 } else { synced };
    assert!(history[oldest..].contains(&shown), "a log opened with what it never was, or without what was synced");
    go_on(&mut log);
    drop(log);
    let reopened = open(&disk).expect("a log that was opened and written to opens again");
    assert_eq!(reopened.last_index(), shown.last_index() + 1);
}

/// The log that was opened is fit to be written to.
fn go_on(log: &mut RaftLog) {
    let term = newest_term(log) + 1;
    let index = log.last_index() + 1;
    let entries = [entry(index, term, b"more")];
    let hard_state = hard_state(term, 2, index);
    log.write(&Batch { marker: None, entries: &entries, hard_state: Some(&hard_state) }, true).expect("a good batch");
    assert_eq!(log.entries(index, index + 1, u64::MAX).expect("it is there"), entries);
}

/// One call that may or may not keep the log's rules, and whether it syncs.
fn step(choices: &mut Choices<'_>, log: &mut RaftLog, now: &Shown) -> (Result<(), LogError>, bool) {
    let HardState { term, commit, .. } = now.hard_state;
    let near = |choices: &mut Choices<'_>, number: u64| (number + choices.byte() as u64 % 8).saturating_sub(3);
    match choices.below(12) {
        // Where there is nothing to give up nothing happens, no sync either.
        0 => (log.compact_to(near(choices, commit)), log.first_index() > now.first_index),
        1 => {
            let marker = marker(near(choices, commit + 3), near(choices, term + 3));
            let from = marker.index + 1;
            let entries = entries(choices, from, marker.term);
            let hard_state = hard_state(marker.term.max(term), 1, marker.index);
            (log.install_marker(&marker, &entries, Some(&hard_state)), true)
        }
        kind => {
            let from = if kind < 4 { near(choices, commit + 3) } else { now.last_index() + 1 };
            let term = term + u64::from(kind < 4);
            let entries = entries(choices, from, term);
            let last = entries.last().map_or(now.last_index(), |entry| entry.index);
            let hard_state =
                (kind < 8).then(|| hard_state(term, 1, commit.max(last.saturating_sub(choices.byte() as u64 % 4))));
            let marker = choices.one_in(6).then(|| {
                let index = near(choices, commit);
                marker(index, log.term(index).unwrap_or(term))
            });
            let sync = choices.flag();
            let batch = Batch { marker: marker.as_ref(), entries: &entries, hard_state: hard_state.as_ref() };
            (log.write(&batch, sync), sync)
        }
    }
}

fn entries(choices: &mut Choices<'_>, from: u64, term: u64) -> Vec<Entry> {
    let count = choices.below(5) as u64;
    let mut entries: Vec<_> = (from..from + count).map(|index| entry(index, term, choices.bytes(3))).collect();
    for entry in &mut entries {
        // Long ones fill sectors and segments; those of zeros look like nothing was written.
        match choices.byte() {
            200..=229 => entry.data = vec![choices.byte(); 700].into(),
            230..=254 => entry.data = vec![0; 1200].into(),
            255 => entry.data = vec![1; 5000].into(),
            _ => {}
        }
        if choices.one_in(16) {
            entry.entry_type = EntryType::EntryConfChangeV2;
        }
    }
    entries
}

fn entry(index: u64, term: u64, data: &[u8]) -> Entry {
    let context = Bytes::from(vec![index as u8; 24]);
    Entry { index, term, context, data: Bytes::copy_from_slice(data), ..Entry::default() }
}

fn marker(index: u64, term: u64) -> Marker {
    Marker { index, term, conf_state: ConfState::from((vec![1, 2, 3], vec![index])) }
}

fn hard_state(term: u64, vote: u64, commit: u64) -> HardState {
    HardState { term, vote, commit, ..HardState::default() }
}

fn crash(choices: &mut Choices<'_>, disk: &MemoryDisk) -> Excused {
    disk.crash(choices.long());
    let log = open(disk).unwrap_or_else(|error| panic!("what a crash left behind does not open: {error}"));
    drop(log);
    false
}

/// Changes files in ways that checksums surely tell, or that no checksum can.
fn damage(choices: &mut Choices<'_>, disk: &MemoryDisk) -> Excused {
    let mut excused = false;
    for _ in 0..1 + choices.below(2) {
        let names = disk.list().expect("the disk is good");
        let Some(name) = names.get(choices.below(names.len().max(1))) else { return excused };
        let before = disk.read_file(name).expect("it was listed");
        if before.len() < SECTOR_BYTES {
            continue;
        }
        let sector = |choices: &mut Choices<'_>| choices.below(before.len() / SECTOR_BYTES) * SECTOR_BYTES;
        let mut after = before.clone();
        match choices.below(8) {
            0 | 1 => {
                for _ in 0..1 + choices.below(3) {
                    let position = sector(choices) + usize::from(choices.short()) % SECTOR_BYTES;
                    after[position] ^= 1 << choices.below(8);
                }
            }
            2 => {
                let at = sector(choices);
                after[at..at + SECTOR_BYTES].fill(0);
            }
            3 | 4 => {
                let (from, to) = (sector(choices), sector(choices));
                after.copy_within(from..from + SECTOR_BYTES, to);
            }
            5 => after.truncate(sector(choices)),
            6 => after.resize(after.len() + SECTOR_BYTES, 0),
            _ => {
                disk.remove(name).expect("it was listed");
                // Also under another name, where it has no business.
                let other = &names[choices.below(names.len())];
                if choices.flag() {
                    disk.write_file(other, &before);
                }
                continue;
            }
        }
        // Sectors that are as if they had never been written are what a lying disk leaves; nobody can tell.
        let sectors = before.chunks(SECTOR_BYTES).zip(after.chunks(SECTOR_BYTES));
        excused |= sectors
            .into_iter()
            .any(|(before, after)| before.iter().any(|byte| *byte != 0) && after.iter().all(|byte| *byte == 0));
        disk.write_file(name, &after);
    }
    excused
}

/// Segments of which only the contents are false.
fn forged(choices: &mut Choices<'_>) {
    let disk = MemoryDisk::new();
    forged_log::write(choices, &disk);
    let Ok(mut log) = open(&disk) else { return };
    let shown = Shown::of(&log);
    for marker in &shown.markers {
        assert!(marker.index <= shown.hard_state.commit && shown.hard_state.commit <= shown.last_index());
    }
    let _ = log.compact_to(log.marker().index);
    assert_eq!(Shown::of(&log).last_index(), shown.last_index());
    drop(log);
    // What was compacted may have said what only it said.
    let Ok(mut log) = open(&disk) else { return };
    if log.last_index().max(newest_term(&log)) < u64::MAX / 2 {
        go_on(&mut log);
    }
}

/// Of the last entry, or of Raft if that is higher.
fn newest_term(log: &RaftLog) -> u64 {
    let last = log.term(log.last_index()).expect("there is a term of the last index");
    log.hard_state().term.max(last)
}
