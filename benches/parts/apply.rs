use std::sync::Arc;

use bytes::Bytes;
use criterion::{BatchSize, BenchmarkId, Criterion, Throughput};
use raftexample::applier::Applier;
use raftexample::membership::Membership;
use raftexample::random::SplitMix64;
use raftexample::replica::Apply;
use raftexample::store::{StateMachine, Version};

use crate::load::{put, request};

/// A store that a processor's caches hold, and one that they do not.
const KEYS: [u64; 2] = [1000, 1_000_000];

/// As many writes are remembered for those who follow changes: before, the history would still grow.
const HISTORY: u64 = 100_000;

/// Writes that the applier answers at once.
const CHUNK: usize = 8;

/// What it takes to decode one PUT of a random key that is there, apply it, and publish the version, as after every
/// batch: a reader may hold the one before, so what the PUT changes of the map is copied. And what it takes for eight of
/// them while nobody reads.
pub(crate) fn all(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("apply");
    for keys in KEYS {
        // Filled by the first call, if there is one.
        let mut store = None;
        group.bench_function(BenchmarkId::new("put among keys", keys), |bencher| {
            let store = store.get_or_insert_with(|| Store::filled(keys));
            let mut random = SplitMix64::new(1);
            bencher.iter_batched(
                || put(random.below(keys)),
                |command| {
                    store.apply(command);
                    store.publish();
                },
                BatchSize::SmallInput,
            );
        });
        let mut store = None;
        group.throughput(Throughput::Elements(CHUNK as u64));
        group.bench_function(BenchmarkId::new("eight puts without a reader among keys", keys), |bencher| {
            let store = store.get_or_insert_with(|| Store::unread(keys));
            let mut random = SplitMix64::new(1);
            bencher.iter_batched(
                || [(); CHUNK].map(|()| put(random.below(keys))),
                |commands| store.apply_all(commands),
                BatchSize::SmallInput,
            );
        });
    }
    group.finish();
}

struct Store {
    applier: Applier,
    published: Version,
}

impl Store {
    fn filled(keys: u64) -> Store {
        let applier = Applier::new(StateMachine::new(), Arc::new(Membership::founding([])));
        let mut store = Store { published: applier.version(), applier };
        for number in 0..keys.max(HISTORY) {
            store.apply(put(number % keys));
        }
        store.publish();
        assert_eq!(store.published.keys() as u64, keys);
        store
    }

    /// Nobody holds a version of it.
    fn unread(keys: u64) -> Store {
        Store { published: Version::default(), ..Store::filled(keys) }
    }

    fn apply(&mut self, command: Bytes) {
        self.apply_all([command]);
    }

    /// As a node applies a batch, or a part of a longer one.
    fn apply_all<const COUNT: usize>(&mut self, commands: [Bytes; COUNT]) {
        let mut index = self.applier.applied_index();
        let applies = commands.map(|command| {
            index += 1;
            Apply::Command { index, term: 1, id: request(index), command, waiter: Some(()) }
        });
        self.applier.look_ahead(&applies);
        let mut done = Vec::new();
        for apply in applies {
            self.applier.apply(apply, &mut done).unwrap();
        }
        assert_eq!(done.len(), COUNT);
    }

    fn publish(&mut self) {
        self.published = self.applier.version();
    }
}
