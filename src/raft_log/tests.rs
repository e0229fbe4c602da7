//! Tests of the whole log on a disk in memory: against a model, under crashes, faults and damage.

use std::collections::BTreeMap;

use bytes::Bytes;
use raft::eraftpb::EntryType;

use super::*;
use crate::disk::OsDisk;
use crate::memory_disk::{Failure, MemoryDisk, Operation};
use crate::random::SplitMix64;

const SMALL: LogOptions = LogOptions { segment_bytes: 4 << 10, cache_bytes: 2000 };

fn identity() -> LogIdentity {
    LogIdentity { cluster: ClusterId([7; 16]), node: 3, directory: 0xD1CE }
}

fn marker(index: u64, term: u64) -> Marker {
    Marker { index, term, conf_state: ConfState::from((vec![1, 2, 3], vec![index])) }
}

fn hard_state(term: u64, commit: u64) -> HardState {
    HardState { term, vote: term % 3, commit, ..HardState::default() }
}

fn entry(index: u64, term: u64, data: Vec<u8>) -> Entry {
    Entry { index, term, data: data.into(), context: Bytes::from(vec![index as u8; 24]), ..Entry::default() }
}

fn create(disk: &MemoryDisk, options: LogOptions) -> Result<RaftLog, LogError> {
    RaftLog::create(Arc::new(disk.clone()), identity(), options, marker(1, 1), hard_state(1, 1))
}

fn open(disk: &MemoryDisk, options: LogOptions) -> Result<RaftLog, LogError> {
    RaftLog::open(Arc::new(disk.clone()), identity(), options)
}

fn log_files(disk: &MemoryDisk) -> Vec<String> {
    let mut names = disk.list().unwrap();
    names.retain(|name| name.ends_with(".log"));
    names
}

fn all_entries(log: &RaftLog) -> Vec<Entry> {
    log.entries(log.first_index(), log.last_index() + 1, u64::MAX).unwrap()
}

/// What a log should hold: the simplest thing that could be right.
#[derive(Clone, Debug, PartialEq)]
struct Model {
    compacted: Position,
    entries: BTreeMap<u64, Entry>,
    hard_state: HardState,
    markers: Vec<Marker>,
}

/// One step, drawn so that it keeps the log's rules.
#[derive(Clone, Debug)]
enum Step {
    Write { marker: Option<Marker>, entries: Vec<Entry>, hard_state: Option<HardState>, sync: bool },
    Install { marker: Marker, entries: Vec<Entry>, hard_state: HardState },
    Compact { index: u64 },
}

impl Model {
    fn new() -> Model {
        let compacted = Position { index: 1, term: 1 };
        Model { compacted, entries: BTreeMap::new(), hard_state: hard_state(1, 1), markers: vec![marker(1, 1)] }
    }

    fn last(&self) -> Position {
        let last = self.entries.last_key_value();
        last.map_or(self.compacted, |(&index, entry)| Position { index, term: entry.term })
    }

    fn term(&self, index: u64) -> u64 {
        if index == self.compacted.index { self.compacted.term } else { self.entries[&index].term }
    }

    fn step(&mut self, step: &Step) {
        match step {
            Step::Write { marker, entries, hard_state, .. } => {
                self.markers.extend(marker.clone());
                self.append(entries);
                self.hard_state = hard_state.clone().unwrap_or(self.hard_state.clone());
            }
            Step::Install { marker, entries, hard_state } => {
                self.entries.clear();
                self.compacted = Position { index: marker.index, term: marker.term };
                self.markers = vec![marker.clone()];
                self.append(entries);
                self.hard_state = hard_state.clone();
            }
            Step::Compact { index } => {
                self.compacted = Position { index: *index, term: self.term(*index) };
                self.entries = self.entries.split_off(&(index + 1));
                self.markers.retain(|marker| marker.index >= *index);
            }
        }
        self.markers.dedup_by_key(|marker| marker.index);
        let surplus = self.markers.len().saturating_sub(state::MARKERS_MAX);
        self.markers.drain(..surplus);
    }

    fn append(&mut self, entries: &[Entry]) {
        for entry in entries {
            self.entries.split_off(&entry.index);
            self.entries.insert(entry.index, entry.clone());
        }
    }

    fn draw_entries(&self, random: &mut SplitMix64, from: u64, term: u64) -> Vec<Entry> {
        let count = random.below(6);
        let draw = |index| {
            let len = match random.below(30) {
                0 => 6000,
                1..5 => 600,
                _ => random.below(100),
            };
            let data = if random.below(4) == 0 { vec![0; len as usize] } else { vec![index as u8; len as usize] };
            let mut entry = entry(index, term, data);
            if random.below(5) == 0 {
                entry.entry_type = EntryType::EntryConfChangeV2;
            }
            entry
        };
        (from..from + count).map(draw).collect()
    }

    fn draw_step(&self, random: &mut SplitMix64) -> Step {
        let HardState { term, commit, .. } = self.hard_state;
        let last = self.last();
        match random.below(20) {
            0 => {
                let index = commit + random.below(20);
                let index = index.max(commit);
                let term = term + random.below(2);
                let entries = self.draw_entries(random, index + 1, term);
                Step::Install { marker: marker(index, term), entries, hard_state: hard_state(term, index) }
            }
            1 => {
                let newest = self.markers.last().unwrap().index;
                let low = self.compacted.index + 1;
                if newest < low {
                    return self.draw_write(random, commit, last, term);
                }
                Step::Compact { index: low + random.below(newest + 1 - low) }
            }
            _ => self.draw_write(random, commit, last, term),
        }
    }

    fn draw_write(&self, random: &mut SplitMix64, commit: u64, last: Position, term: u64) -> Step {
        let mut term = term;
        let mut from = last.index + 1;
        if random.below(5) == 0 {
            // A new leader replaces what is not committed.
            term += 1;
            from = commit + 1 + random.below(last.index - commit + 1);
        }
        let entries = self.draw_entries(random, from, term);
        let last = entries.last().map_or(last.index, |entry| entry.index);
        let new_commit = commit + random.below(last - commit + 1);
        let hard_state = (term > self.hard_state.term || random.below(2) == 0).then(|| hard_state(term, new_commit));
        let commit = hard_state.as_ref().map_or(commit, |hard_state| hard_state.commit);
        let oldest = self.markers.last().unwrap().index.max(self.compacted.index);
        // A marker is of an entry that was in the log before.
        let newest = commit.min(if entries.is_empty() { last } else { from - 1 });
        let marker = (random.below(6) == 0 && newest >= oldest).then(|| {
            let index = oldest + random.below(newest - oldest + 1);
            marker(index, self.term(index))
        });
        Step::Write { marker, entries, hard_state, sync: random.below(3) > 0 }
    }

    /// Everything the log answers is what the model says.
    fn check(&self, log: &RaftLog, context: &str) {
        assert_eq!(log.first_index(), self.compacted.index + 1, "{context}");
        assert_eq!(log.last_index(), self.last().index, "{context}");
        assert_eq!(log.hard_state(), &self.hard_state, "{context}");
        assert_eq!(log.markers().cloned().collect::<Vec<_>>(), self.markers, "{context}");
        assert_eq!(log.marker(), self.markers.last().unwrap(), "{context}");
        let expected: Vec<Entry> = self.entries.values().cloned().collect();
        assert_eq!(all_entries(log), expected, "{context}");
        for index in self.compacted.index..=self.last().index {
            assert_eq!(log.term(index).unwrap(), self.term(index), "{context}: term of {index}");
        }
        assert!(matches!(log.term(self.compacted.index - 1), Err(ReadError::Compacted)), "{context}");
        assert!(matches!(log.term(self.last().index + 1), Err(ReadError::Unavailable)), "{context}");
    }

    fn holds(&self, log: &RaftLog) -> bool {
        log.first_index() == self.compacted.index + 1
            && log.last_index() == self.last().index
            && log.hard_state() == &self.hard_state
            && log.markers().eq(self.markers.iter())
            && all_entries(log).iter().eq(self.entries.values())
    }
}

fn take(log: &mut RaftLog, step: &Step) -> Result<(), LogError> {
    match step {
        Step::Write { marker, entries, hard_state, sync } => {
            log.write(&Batch { marker: marker.as_ref(), entries, hard_state: hard_state.as_ref() }, *sync)
        }
        Step::Install { marker, entries, hard_state } => log.install_marker(marker, entries, Some(hard_state)),
        Step::Compact { index } => log.compact_to(*index),
    }
}

fn syncs(step: &Step) -> bool {
    !matches!(step, Step::Write { sync: false, .. })
}

/// A log and all the states it may come back in after a crash: the newest synced one and every later one.
struct Run {
    disk: MemoryDisk,
    log: RaftLog,
    random: SplitMix64,
    possible: Vec<Model>,
}

impl Run {
    fn new(seed: u64) -> Run {
        let disk = MemoryDisk::new();
        let log = create(&disk, SMALL).unwrap();
        Run { disk, log, random: SplitMix64::new(seed), possible: vec![Model::new()] }
    }

    fn model(&self) -> &Model {
        self.possible.last().unwrap()
    }

    /// Takes a step; after an error its outcome is open.
    fn step(&mut self) -> Result<(), LogError> {
        let newest = self.possible.len() - 1;
        let step = self.possible[newest].draw_step(&mut self.random);
        let mut model = self.model().clone();
        model.step(&step);
        self.possible.push(model);
        take(&mut self.log, &step)?;
        if syncs(&step) {
            self.possible.drain(..self.possible.len() - 1);
        }
        Ok(())
    }

    /// Opens the log again, which must be in one of the possible states and then is in no other.
    fn reopen(&mut self, context: &str) {
        self.log = open(&self.disk, SMALL).unwrap_or_else(|error| panic!("{context}: {error}"));
        let held = self.possible.iter().rposition(|model| model.holds(&self.log));
        let held = held.unwrap_or_else(|| panic!("{context}: {:?} is in no possible state", self.log));
        self.possible = vec![self.possible[held].clone()];
        self.model().check(&self.log, context);
    }
}

#[test]
fn the_log_is_what_a_simple_model_says() {
    for seed in 0..60 {
        let mut run = Run::new(seed);
        for step in 0..80 {
            run.step().unwrap();
            run.model().check(&run.log, &format!("seed {seed}, step {step}"));
            if run.random.below(15) == 0 {
                run.possible.drain(..run.possible.len() - 1);
                run.reopen(&format!("seed {seed}, reopened after step {step}"));
            }
        }
    }
}

#[test]
fn after_a_crash_everything_synced_is_there() {
    for seed in 0..600 {
        let mut run = Run::new(seed);
        for crash in 0..6 {
            for _ in 0..run.random.below(25) {
                run.step().unwrap();
            }
            let crash_seed = run.random.next_u64();
            run.disk.crash(crash_seed);
            run.reopen(&format!("seed {seed}, crash {crash}"));
        }
    }
}

#[test]
fn after_a_crash_at_any_operation_everything_synced_is_there() {
    for seed in 0..300 {
        let mut run = Run::new(seed);
        for crash in 0..8 {
            run.disk.stop_at(1 + run.random.below(60));
            while run.step().is_ok() {}
            let crash_seed = run.random.next_u64();
            run.disk.crash(crash_seed);
            // The power may fail again while the log is opened.
            run.disk.stop_at(1 + run.random.below(8));
            if open(&run.disk, SMALL).is_err() {
                let crash_seed = run.random.next_u64();
                run.disk.crash(crash_seed);
            }
            run.disk.clear_faults();
            run.reopen(&format!("seed {seed}, crash {crash}"));
        }
    }
}

#[test]
fn a_failed_operation_poisons_the_log_and_the_next_start_is_clean() {
    for seed in 0..200 {
        let mut run = Run::new(seed);
        for round in 0..6 {
            let failure = if run.random.below(2) == 0 { Failure::Error } else { Failure::Short };
            let operation = [None, Some(Operation::Write), Some(Operation::Sync)][run.random.below(3) as usize];
            run.disk.fail(operation, 1 + run.random.below(25), failure);
            while run.step().is_ok() {}
            let counts = run.disk.counts();
            let refused = run.log.write(&Batch { hard_state: Some(&hard_state(99, 1)), ..Batch::default() }, true);
            assert!(matches!(refused, Err(LogError::Poisoned)));
            assert!(matches!(run.log.compact_to(1), Err(LogError::Poisoned)));
            assert_eq!(run.disk.counts(), counts, "a poisoned log leaves the disk alone");
            // The process starts again with the page cache as it was, and what it then finds has to be durable.
            let context = format!("seed {seed}, round {round}");
            run.reopen(&context);
            let crash_seed = run.random.next_u64();
            run.disk.crash(crash_seed);
            run.reopen(&format!("{context}, after a crash"));
        }
    }
}

#[test]
fn a_full_disk_poisons_the_log_and_space_heals_it() {
    for seed in 0..50 {
        let mut run = Run::new(seed);
        run.disk.set_capacity(Some(20_000 + run.random.below(20_000)));
        let error = loop {
            if let Err(error) = run.step() {
                break error;
            }
        };
        assert!(
            matches!(&error, LogError::Io { source, .. } if source.kind() == io::ErrorKind::StorageFull),
            "{error}"
        );
        run.reopen("while the disk is full");
        run.disk.set_capacity(None);
        run.reopen("with space again");
        for _ in 0..20 {
            run.step().unwrap();
        }
    }
}

#[test]
fn a_creation_that_is_cut_short_leaves_no_log_or_a_whole_one() {
    for stop in 1..20 {
        for seed in 0..40 {
            let disk = MemoryDisk::new();
            disk.stop_at(stop);
            let created = create(&disk, SMALL).is_ok();
            disk.crash(seed);
            let exists = RaftLog::exists(&disk).unwrap();
            assert!(exists || !created, "stop {stop}, seed {seed}");
            let log = if exists { open(&disk, SMALL) } else { create(&disk, SMALL) }.unwrap();
            Model::new().check(&log, "after creation");
            assert_eq!(disk.list().unwrap(), ["0000000000000001.log"]);
        }
    }
}

/// A log of several segments with a marker at 30, all synced.
fn long_log(disk: &MemoryDisk) -> RaftLog {
    let mut log = create(disk, SMALL).unwrap();
    for index in 2..=60 {
        let entries = [entry(index, 1, vec![index as u8; 300])];
        log.write(&Batch { entries: &entries, ..Batch::default() }, true).unwrap();
    }
    let (marker, hard_state) = (marker(30, 1), hard_state(1, 50));
    log.write(&Batch { marker: Some(&marker), hard_state: Some(&hard_state), ..Batch::default() }, true).unwrap();
    log
}

#[test]
fn a_compaction_that_is_cut_short_is_finished_at_the_next_start() {
    let mut finished = false;
    let mut stop = 0;
    while !finished {
        stop += 1;
        for seed in 0..60 {
            let disk = MemoryDisk::new();
            let mut log = long_log(&disk);
            let files_before = log_files(&disk).len();
            disk.stop_at(stop);
            finished = log.compact_to(30).is_ok();
            disk.crash(seed);
            let log = open(&disk, SMALL).unwrap();
            assert_eq!(log.last_index(), 60);
            assert_eq!(all_entries(&log).last().unwrap().index, 60);
            match log.first_index() {
                // Writing that down may have taken a new segment.
                2 => assert!(!finished && log_files(&disk).len() >= files_before),
                31 => assert!(log_files(&disk).len() < files_before),
                other => panic!("first index {other}"),
            }
            assert_eq!(log_files(&disk).len(), log.segments().len());
            assert_eq!(open(&disk, SMALL).unwrap().first_index(), log.first_index());
        }
    }
    assert!(stop > 4, "there were several deletions");
}

#[test]
fn a_snapshot_from_the_leader_starts_the_log_anew() {
    let disk = MemoryDisk::new();
    let mut log = long_log(&disk);
    let new = marker(55, 4);
    let too_old = marker(49, 4);
    let refused = log.install_marker(&too_old, &[], Some(&hard_state(4, 50)));
    assert!(matches!(refused, Err(LogError::Misuse(_))));
    assert!(matches!(log.install_marker(&new, &[], None), Err(LogError::Misuse(_))), "the commit index stays behind");
    log.install_marker(&new, &[entry(56, 4, vec![1])], Some(&hard_state(4, 55))).unwrap();
    disk.crash(1);
    let log = open(&disk, SMALL).unwrap();
    assert_eq!((log.first_index(), log.last_index(), log.term(55).unwrap()), (56, 56, 4));
    assert_eq!(log.markers().collect::<Vec<_>>(), [&new]);
    assert_eq!(log_files(&disk).len(), 1);
}

#[test]
fn what_breaks_the_rules_is_refused_and_the_log_goes_on() {
    let disk = MemoryDisk::new();
    let mut log = long_log(&disk);
    let before = disk.counts();
    let entries = |list: &[(u64, u64)]| list.iter().map(|&(i, t)| entry(i, t, vec![])).collect::<Vec<_>>();
    for bad in [&[(62, 1)][..], &[(50, 2)], &[(61, 1), (63, 1)], &[(61, 2), (62, 1)], &[(61, 0)], &[(55, 0)]] {
        let entries = entries(bad);
        let result = log.write(&Batch { entries: &entries, ..Batch::default() }, true);
        assert!(matches!(result, Err(LogError::Misuse(_))), "{bad:?}");
    }
    for bad in [hard_state(0, 50), hard_state(1, 49), hard_state(1, 61)] {
        let result = log.write(&Batch { hard_state: Some(&bad), ..Batch::default() }, true);
        assert!(matches!(result, Err(LogError::Misuse(_))), "{bad:?}");
    }
    for bad in [marker(29, 1), marker(40, 2), marker(51, 1), marker(61, 1)] {
        let result = log.write(&Batch { marker: Some(&bad), ..Batch::default() }, true);
        assert!(matches!(result, Err(LogError::Misuse(_))), "{bad:?}");
    }
    // A snapshot of an entry that the same batch replaces: the next segment would begin with a lie.
    let (marker, entries_anew, hard_state) = (marker(55, 1), entries(&[(53, 2), (54, 2), (55, 2)]), hard_state(2, 55));
    let batch = Batch { marker: Some(&marker), entries: &entries_anew, hard_state: Some(&hard_state) };
    assert!(matches!(log.write(&batch, true), Err(LogError::Misuse(_))));
    assert!(matches!(log.compact_to(31), Err(LogError::Misuse(_))));
    log.compact_to(1).unwrap();
    assert_eq!(disk.counts(), before, "nothing was written");
    log.write(&Batch { entries: &entries(&[(51, 3)]), ..Batch::default() }, true).unwrap();
    assert_eq!((log.last_index(), log.term(51).unwrap()), (51, 3));
}

#[test]
fn entries_beyond_the_cache_are_read_back_and_limits_hold() {
    let disk = MemoryDisk::new();
    let log = long_log(&disk);
    assert!(log.state.cache_start() > 50, "most entries are not in memory");
    let all = all_entries(&log);
    assert!(all.iter().zip(2..).all(|(entry, index)| entry.index == index && entry.data == vec![index as u8; 300]));
    assert_eq!(all.len(), 59);
    for (low, high, bytes_max, count) in
        [(2, 61, 0, 1), (2, 61, 1000, 2), (60, 61, 0, 1), (5, 5, 0, 0), (50, 61, u64::MAX, 11), (61, 61, 9, 0)]
    {
        let some = log.entries(low, high, bytes_max).unwrap();
        assert_eq!(some, all[low as usize - 2..][..count], "{low}..{high} within {bytes_max}");
    }
    assert!(matches!(log.entries(1, 5, 9), Err(ReadError::Compacted)));
    assert!(matches!(log.entries(5, 62, 9), Err(ReadError::Unavailable)));
    disk.fail(Some(Operation::Read), 1, Failure::Error);
    let Err(ReadError::Failed(error)) = log.entries(2, 5, 9) else { panic!("the disk fails") };
    assert!(matches!(*error, LogError::Io { .. }), "{error}");
    // Damage behind the log's back is found by the reader.
    disk.flip_bit("0000000000000001.log", (512 + 512 + 200) * 8);
    let Err(ReadError::Failed(error)) = log.entries(2, 5, 999) else { panic!("the entry is damaged") };
    assert!(matches!(*error, LogError::Corrupt { .. }), "{error}");
}

#[test]
fn one_sync_a_batch_and_none_without_need() {
    let disk = MemoryDisk::new();
    let mut log = create(&disk, LogOptions::default()).unwrap();
    let before = disk.counts();
    for index in 2..=21 {
        let entries = [entry(index, 1, vec![1; 100])];
        let hard_state = hard_state(1, index - 1);
        log.write(&Batch { entries: &entries, hard_state: Some(&hard_state), ..Batch::default() }, index % 2 == 0)
            .unwrap();
    }
    log.write(&Batch::default(), true).unwrap();
    log.write(&Batch::default(), true).unwrap();
    let after = disk.counts();
    assert_eq!((after.writes - before.writes, after.syncs - before.syncs), (20, 11));
}

/// All states that a log passes through, from the oldest to the newest, with the directory as it was then.
fn history(steps: usize, seed: u64) -> (MemoryDisk, Vec<Model>) {
    let disk = MemoryDisk::new();
    let mut log = create(&disk, SMALL).unwrap();
    let mut random = SplitMix64::new(seed);
    let mut models = vec![Model::new()];
    for _ in 0..steps {
        let mut model = models.last().unwrap().clone();
        let mut step = model.draw_step(&mut random);
        if let Step::Write { sync, .. } = &mut step {
            *sync = true;
        }
        take(&mut log, &step).unwrap();
        model.step(&step);
        models.push(model);
    }
    (disk, models)
}

#[test]
fn every_flipped_bit_is_refused_or_changes_nothing() {
    for (steps, seed) in [(1, 5), (6, 1), (40, 2), (40, 3)] {
        let (disk, models) = history(steps, seed);
        for name in log_files(&disk) {
            let len = disk.read_file(&name).unwrap().len() as u64;
            for byte in 0..len {
                // All bits where there is little, one class of bits a byte where there is much.
                let bits = if steps < 10 { 0..8 } else { byte % 8..byte % 8 + 1 };
                for bit in bits {
                    let copy = disk.fork();
                    copy.flip_bit(&name, byte * 8 + bit);
                    if let Ok(log) = open(&copy, SMALL) {
                        models.last().unwrap().check(&log, &format!("{name}, byte {byte}, bit {bit}"));
                    }
                }
            }
        }
    }
}

#[test]
fn a_flipped_bit_in_a_written_batch_is_always_refused_and_changes_nothing() {
    let (disk, _) = history(12, 4);
    let names = log_files(&disk);
    for name in names {
        let bytes = disk.read_file(&name).unwrap();
        let (header_and_batches, _) = bytes.split_at(bytes.iter().rposition(|byte| *byte != 0).unwrap() + 1);
        for byte in 0..header_and_batches.len() as u64 {
            let copy = disk.fork();
            copy.flip_bit(&name, byte * 8 + byte % 8);
            let before = copy.counts();
            let error = open(&copy, SMALL).unwrap_err();
            let named = matches!(&error, LogError::Corrupt { path, .. } | LogError::UnsupportedVersion { path, .. }
                | LogError::ForeignLog { path, .. } if path.ends_with(&name));
            // Damage to a link is found in the segment that follows.
            assert!(named || matches!(&error, LogError::Corrupt { .. }), "{name}, byte {byte}: {error}");
            assert_eq!(copy.counts(), before, "nothing was changed");
        }
    }
}

#[test]
fn every_truncation_is_refused() {
    for (steps, seed) in [(1, 5), (40, 2)] {
        let (disk, _) = history(steps, seed);
        for name in log_files(&disk) {
            let bytes = disk.read_file(&name).unwrap();
            for len in 0..bytes.len() {
                let copy = disk.fork();
                copy.write_file(&name, &bytes[..len]);
                let error = open(&copy, SMALL).unwrap_err();
                assert!(matches!(error, LogError::Corrupt { .. }), "{name} cut at {len}: {error}");
            }
        }
    }
}

#[test]
fn a_zeroed_sector_is_refused_wherever_a_later_batch_proves_it() {
    for (segment_bytes, files) in [(4 << 10, 10), (8 << 10, 4), (64 << 10, 1)] {
        let disk = MemoryDisk::new();
        let mut log = create(&disk, LogOptions { segment_bytes, ..SMALL }).unwrap();
        for index in 2..=20 {
            let entries = [entry(index, 1, vec![9; 700])];
            log.write(&Batch { entries: &entries, ..Batch::default() }, true).unwrap();
        }
        let names = log_files(&disk);
        assert_eq!(names.len(), files);
        for name in &names {
            let bytes = disk.read_file(name).unwrap();
            let used = bytes.iter().rposition(|byte| *byte != 0).unwrap() + 1;
            let last_batch = used.next_multiple_of(512) - 1024;
            for sector in (0..used).step_by(512) {
                let mut damaged = bytes.clone();
                damaged[sector..sector + 512].fill(0);
                let copy = disk.fork();
                copy.write_file(name, &damaged);
                match open(&copy, SMALL) {
                    // As if the last write had not finished: the one thing that cannot be told from it.
                    Ok(log) => {
                        assert!(name == names.last().unwrap() && sector >= last_batch, "{name}, sector at {sector}");
                        assert_eq!(log.last_index(), 19);
                    }
                    Err(error) => assert!(matches!(error, LogError::Corrupt { .. }), "{error}"),
                }
            }
        }
    }
}

#[test]
fn a_next_segment_proves_what_was_durable_before_it_was_made() {
    let disk = MemoryDisk::new();
    let mut log = create(&disk, SMALL).unwrap();
    let mut index = 2;
    loop {
        // The first write behind a new segment and a seal.
        disk.fail(Some(Operation::Write), 3, Failure::Error);
        let entries = [entry(index, 1, vec![9; 400])];
        if log.write(&Batch { entries: &entries, ..Batch::default() }, true).is_err() {
            break;
        }
        disk.clear_faults();
        index += 1;
    }
    let names = log_files(&disk);
    assert_eq!(names.len(), 2);
    let log = open(&disk.fork(), SMALL).unwrap();
    assert_eq!((log.last_index(), log.segments().len()), (index - 1, 2));
    let bytes = disk.read_file(&names[0]).unwrap();
    let seal = bytes.iter().rposition(|byte| *byte != 0).unwrap() / 512 * 512;
    for (first_zero, entries_lost) in [(seal, 0), (seal - 512, 1), (seal - 1024, 2)] {
        let mut damaged = bytes.clone();
        damaged[first_zero..].fill(0);
        let copy = disk.fork();
        copy.write_file(&names[0], &damaged);
        match open(&copy, SMALL) {
            Ok(log) => {
                assert_eq!((log.last_index(), entries_lost), (index - 1, 0), "only the seal is gone");
                assert_eq!(log_files(&copy), names[..1], "the next segment is made again when it is needed");
            }
            Err(error) => assert!(entries_lost > 0 && matches!(error, LogError::Corrupt { .. }), "{error}"),
        }
    }
}

#[test]
fn every_missing_segment_is_noticed() {
    let (disk, models) = history(60, 9);
    let names = log_files(&disk);
    assert!(names.len() > 2, "{names:?}");
    for name in &names {
        let copy = disk.fork();
        copy.remove(name).unwrap();
        match open(&copy, SMALL) {
            Ok(log) => models.last().unwrap().check(&log, name),
            Err(error) => assert!(matches!(&error, LogError::Missing { path } if path.ends_with(name)), "{error}"),
        }
    }
    for name in &names {
        for other in names.iter().filter(|other| *other != name) {
            let copy = disk.fork();
            copy.write_file(name, &disk.read_file(other).unwrap());
            assert!(matches!(open(&copy, SMALL), Err(LogError::Corrupt { .. })), "{other} in the place of {name}");
        }
    }
}

#[test]
fn a_torn_tail_is_cut_off_for_good() {
    let disk = MemoryDisk::new();
    let mut log = create(&disk, LogOptions { segment_bytes: 16 << 10, ..SMALL }).unwrap();
    let name = &log_files(&disk)[0];
    log.write(&Batch { entries: &[entry(2, 1, vec![2; 10])], ..Batch::default() }, true).unwrap();
    let synced = disk.read_file(name).unwrap();
    // Three batches on their way, and only the third and a part of the first reach the disk.
    for index in 3..=5 {
        log.write(&Batch { entries: &[entry(index, 1, vec![3; 600])], ..Batch::default() }, false).unwrap();
    }
    let mut torn = disk.read_file(name).unwrap();
    let start = synced.iter().rposition(|byte| *byte != 0).unwrap().next_multiple_of(512);
    torn[start + 512..start + 1024].fill(0);
    torn[start + 1024..start + 2048].fill(0);
    disk.write_file(name, &torn);
    let mut log = open(&disk, SMALL).unwrap();
    assert_eq!(log.last_index(), 2);
    assert_eq!(disk.read_file(name).unwrap(), synced, "the tail is as if nothing had been written");
    log.write(&Batch { entries: &[entry(3, 2, vec![])], ..Batch::default() }, true).unwrap();
    disk.crash(3);
    assert_eq!(open(&disk, SMALL).unwrap().term(3).unwrap(), 2);
}

#[test]
fn another_owner_and_another_version_are_refused_by_name() {
    let disk = MemoryDisk::new();
    create(&disk, SMALL).unwrap();
    let others = [
        LogIdentity { node: 4, ..identity() },
        LogIdentity { cluster: ClusterId([8; 16]), ..identity() },
        LogIdentity { directory: 1, ..identity() },
    ];
    for other in others {
        let error = RaftLog::open(Arc::new(disk.clone()), other, SMALL).unwrap_err();
        let text = error.to_string();
        assert!(text.contains(&other.to_string()) && text.contains(&identity().to_string()), "{text}");
    }
    let mut bytes = disk.read_file("0000000000000001.log").unwrap();
    bytes[8] = 2;
    disk.write_file("0000000000000001.log", &bytes);
    let error = open(&disk, SMALL).unwrap_err();
    assert!(matches!(error, LogError::UnsupportedVersion { found: 2, .. }));
    assert!(error.to_string().contains("format version 2, this program knows version 1"), "{error}");
    assert!(matches!(create(&disk, SMALL), Err(LogError::AlreadyExists { .. })));
    assert!(matches!(open(&MemoryDisk::new(), SMALL), Err(LogError::Missing { .. })));
}

#[test]
fn a_batch_larger_than_a_segment_gets_a_larger_one() {
    let disk = MemoryDisk::new();
    let mut log = create(&disk, SMALL).unwrap();
    let large = entry(2, 1, (0..100_000u32).map(|n| n as u8).collect());
    log.write(&Batch { entries: std::slice::from_ref(&large), ..Batch::default() }, true).unwrap();
    log.write(&Batch { entries: &[entry(3, 1, vec![])], ..Batch::default() }, true).unwrap();
    let log = open(&disk, SMALL).unwrap();
    assert_eq!(log.entries(2, 3, 0).unwrap(), [large]);
    assert_eq!(log.segments().len(), 2, "the first one, without entries, is gone");
}

#[test]
fn the_real_disk_behaves_the_same() {
    let directory = tempfile::tempdir().unwrap();
    let mut random = SplitMix64::new(11);
    let disk: Arc<dyn Disk> = Arc::new(OsDisk::open(directory.path()).unwrap());
    assert!(!RaftLog::exists(&*disk).unwrap());
    let mut log = RaftLog::create(disk.clone(), identity(), SMALL, marker(1, 1), hard_state(1, 1)).unwrap();
    let mut model = Model::new();
    for step_number in 0..120 {
        let step = model.draw_step(&mut random);
        take(&mut log, &step).unwrap();
        model.step(&step);
        if step_number % 10 == 0 {
            drop(log);
            log = RaftLog::open(disk.clone(), identity(), SMALL).unwrap();
        }
        model.check(&log, &format!("step {step_number}"));
    }
    assert!(RaftLog::exists(&*disk).unwrap());
}
