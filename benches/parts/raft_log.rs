use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use criterion::{BenchmarkId, Criterion, SamplingMode, Throughput};
use raft::eraftpb::{ConfState, Entry, HardState};
use raftexample::disk::{Disk, OsDisk};
use raftexample::membership::ClusterId;
use raftexample::memory_disk::MemoryDisk;
use raftexample::raft_log::{Batch, LogIdentity, LogOptions, Marker, RaftLog};
use tempfile::TempDir;

use crate::load::{BATCHES, entries};

/// How many batches are appended before the log is compacted, which does not count: neither the disk nor the memory of
/// a long measurement fills up.
const BATCHES_KEPT: u64 = 1000;

/// Entries of a log that is read.
const ENTRIES_READ: usize = 10_000;

/// Not much more than they take: opening a log looks at the unwritten rest of its last segment too.
const SEGMENT_BYTES_READ: u64 = 3 << 20;

const IDENTITY: LogIdentity = LogIdentity { cluster: ClusterId([1; 16]), node: 1, directory: 1 };

pub(crate) fn all(criterion: &mut Criterion) {
    append(criterion);
    read(criterion);
}

/// What it takes to append a batch with its hard state. In memory it is the encoding, and what the simulated disk does
/// to remember what a crash would lose.
fn append(criterion: &mut Criterion) {
    // The disk that the build is on, and not one that /tmp may be in memory.
    let parent = Path::new(env!("CARGO_TARGET_TMPDIR"));
    let mut group = criterion.benchmark_group("log append");
    group.sampling_mode(SamplingMode::Flat);
    for count in BATCHES {
        group.throughput(Throughput::Elements(count as u64));
        group.bench_function(BenchmarkId::new("in memory", count), |bencher| {
            let mut appender = Appender::new(Arc::new(MemoryDisk::new()), count, false);
            bencher.iter_custom(|iterations| appender.time(iterations));
        });
        for (name, sync) in [("on disk", false), ("on disk with sync", true)] {
            group.bench_function(BenchmarkId::new(name, count), |bencher| {
                let directory = TempDir::new_in(parent).unwrap();
                let mut appender = Appender::new(Arc::new(OsDisk::open(directory.path()).unwrap()), count, sync);
                bencher.iter_custom(|iterations| appender.time(iterations));
            });
        }
    }
    group.finish();
}

/// What it takes to read entries back that are not in memory any more, and to open a log: all its checksums are
/// checked.
fn read(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("log read");
    group.sampling_mode(SamplingMode::Flat);
    group.throughput(Throughput::Elements(ENTRIES_READ as u64));
    let memory = MemoryDisk::new();
    let options = LogOptions { segment_bytes: SEGMENT_BYTES_READ, cache_bytes: 0 };
    let mut log = create(Arc::new(memory.clone()), options);
    for batch in entries(2, ENTRIES_READ).chunks(BATCHES[1]) {
        log.write(&Batch { entries: batch, ..Batch::default() }, true).unwrap();
    }
    let end = log.last_index() + 1;
    group.bench_function("entries", |bencher| {
        bencher.iter(|| {
            let read = log.entries(2, end, u64::MAX).unwrap();
            assert_eq!(read.len(), ENTRIES_READ);
            read
        });
    });
    group.bench_function("open", |bencher| {
        bencher.iter(|| {
            let log = RaftLog::open(Arc::new(memory.clone()), IDENTITY, options).unwrap();
            assert_eq!(log.last_index() + 1, end);
            log
        });
    });
    group.finish();
}

fn create(disk: Arc<dyn Disk>, options: LogOptions) -> RaftLog {
    let marker = Marker { index: 1, term: 1, conf_state: ConfState::default() };
    let hard_state = HardState { term: 1, commit: 1, ..HardState::default() };
    RaftLog::create(disk, IDENTITY, options, marker, hard_state).unwrap()
}

/// Appends batch after batch as a leader does.
struct Appender {
    log: RaftLog,
    batch: Vec<Entry>,
    sync: bool,
}

impl Appender {
    fn new(disk: Arc<dyn Disk>, count: usize, sync: bool) -> Appender {
        Appender { log: create(disk, LogOptions::default()), batch: entries(2, count), sync }
    }

    /// How long so many batches take.
    fn time(&mut self, batches: u64) -> Duration {
        let mut spent = Duration::ZERO;
        for first in (0..batches).step_by(BATCHES_KEPT as usize) {
            let start = Instant::now();
            for _ in first..batches.min(first + BATCHES_KEPT) {
                self.append();
            }
            spent += start.elapsed();
            self.compact();
        }
        spent
    }

    fn append(&mut self) {
        let last = self.log.last_index();
        // What came before is committed by now, as it is when one batch follows the other.
        let hard_state = HardState { term: 1, vote: 1, commit: last, ..HardState::default() };
        for (entry, index) in self.batch.iter_mut().zip(last + 1..) {
            entry.index = index;
        }
        let batch = Batch { marker: None, entries: &self.batch, hard_state: Some(&hard_state) };
        self.log.write(&batch, self.sync).unwrap();
    }

    fn compact(&mut self) {
        let index = self.log.last_index();
        let marker = Marker { index, term: 1, conf_state: ConfState::default() };
        let hard_state = HardState { term: 1, vote: 1, commit: index, ..HardState::default() };
        let batch = Batch { marker: Some(&marker), entries: &[], hard_state: Some(&hard_state) };
        self.log.write(&batch, true).unwrap();
        self.log.compact_to(index).unwrap();
    }
}
