//! What the applier shows to readers: an immutable version of the store, while somebody wants one.
//!
//! A published version shares the store's nodes, so every write behind it copies the nodes it changes, and what was
//! overwritten stays in memory: with a version for every batch, that copying is most of what a write costs at the
//! applier. So while nobody reads on this node, only the numbers are published, and a version that is older than they are is
//! withdrawn. A reader who finds none asks the applier. Who reads often finds one for every batch.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use arc_swap::ArcSwapOption;

use crate::store::Version;

/// How long after a reader has asked a version is published for every batch.
pub const DEMAND_INTERVAL: Duration = Duration::from_secs(1);

/// The newest version and how far the applier is: what it and the readers agree on without a lock. A test puts models in
/// the place of both.
struct Newest<P, N> {
    version: P,
    applied_index: N,
}

/// Where a version lies, to be replaced as a whole.
trait Place {
    type Version;
    fn load(&self) -> Option<Arc<Self::Version>>;
    fn store(&self, version: Option<Arc<Self::Version>>);
    fn index(version: &Self::Version) -> u64;
}

/// A number that one thread writes and others read: what was written before it is seen by whoever has read it.
trait Number {
    fn load(&self) -> u64;
    fn store(&self, value: u64);
}

impl Place for ArcSwapOption<Version> {
    type Version = Version;

    fn load(&self) -> Option<Arc<Version>> {
        self.load_full()
    }

    fn store(&self, version: Option<Arc<Version>>) {
        ArcSwapOption::store(self, version);
    }

    fn index(version: &Version) -> u64 {
        version.applied_index()
    }
}

impl Number for AtomicU64 {
    fn load(&self) -> u64 {
        AtomicU64::load(self, Ordering::Acquire)
    }

    fn store(&self, value: u64) {
        AtomicU64::store(self, value, Ordering::Release);
    }
}

impl<P: Place, N: Number> Newest<P, N> {
    /// The version, if it holds everything applied until now.
    fn version(&self) -> Option<Arc<P::Version>> {
        // The number first: the version may become newer meanwhile, or be withdrawn; it never becomes older.
        let applied_index = self.applied_index.load();
        self.version.load().filter(|version| P::index(version) >= applied_index)
    }

    /// For the applier, who takes versions in the order of their indexes, or none.
    fn replace(&self, version: Option<Arc<P::Version>>) {
        self.version.store(version);
    }

    /// For the applier, before it answers anyone.
    fn note(&self, applied_index: u64) {
        self.applied_index.store(applied_index);
    }
}

/// The newest published version, and how far the applier is.
pub struct Publication {
    newest: Newest<ArcSwapOption<Version>, AtomicU64>,
    keys: AtomicU64,
    bytes: AtomicU64,
    started: Instant,
    /// Until when a version is published for every batch, in milliseconds since `started`.
    wanted_until: AtomicU64,
}

impl Publication {
    /// Publishes a first version.
    pub fn new(version: Version) -> Publication {
        let publication = Publication {
            newest: Newest { version: ArcSwapOption::empty(), applied_index: AtomicU64::new(0) },
            keys: AtomicU64::new(0),
            bytes: AtomicU64::new(0),
            started: Instant::now(),
            wanted_until: AtomicU64::new(0),
        };
        publication.publish(version);
        publication
    }

    /// The version that holds everything applied until now; `None` if there is none, and then the applier has to be
    /// asked. Either way there will be one for every batch for a while.
    pub fn newest(&self) -> Option<Arc<Version>> {
        // Stored only when it changes: many readers would take the line from each other.
        let until = self.millis() + DEMAND_INTERVAL.as_millis() as u64;
        if self.wanted_until.load(Ordering::Relaxed) != until {
            self.wanted_until.store(until, Ordering::Relaxed);
        }
        self.newest.version()
    }

    /// What is published, however old. For the applier: to readers it may be older than an answer that they have seen.
    pub fn published(&self) -> Option<Arc<Version>> {
        self.newest.version.load_full()
    }

    /// The index of the last entry that is applied.
    pub fn applied_index(&self) -> u64 {
        self.newest.applied_index.load(Ordering::Acquire)
    }

    /// How many keys there are.
    pub fn keys(&self) -> u64 {
        self.keys.load(Ordering::Relaxed)
    }

    /// The length of all keys and values in bytes.
    pub fn bytes(&self) -> u64 {
        self.bytes.load(Ordering::Relaxed)
    }

    /// Whether somebody has read lately. For the applier.
    pub fn is_wanted(&self) -> bool {
        self.millis() < self.wanted_until.load(Ordering::Relaxed)
    }

    /// Says how far the state has come. For the applier, before it answers anyone.
    pub fn note(&self, applied_index: u64, keys: u64, bytes: u64) {
        self.keys.store(keys, Ordering::Relaxed);
        self.bytes.store(bytes, Ordering::Relaxed);
        self.newest.note(applied_index);
    }

    /// Publishes a version, and behind it how far the state has come: who looks in between finds one. For the applier;
    /// versions come in the order of their indexes.
    pub fn publish(&self, version: Version) -> Arc<Version> {
        let version = Arc::new(version);
        self.newest.replace(Some(version.clone()));
        self.note(version.applied_index(), version.keys() as u64, version.bytes());
        version
    }

    /// Publishes none for now. For the applier.
    pub fn withdraw(&self) {
        self.newest.replace(None);
    }

    fn millis(&self) -> u64 {
        // Half a billion years fit.
        self.started.elapsed().as_millis() as u64
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::StateMachine;

    #[test]
    fn a_version_is_newest_until_more_is_applied() {
        let mut state = StateMachine::new();
        let publication = Publication::new(state.version());
        assert_eq!(publication.newest().unwrap().applied_index(), 0);
        state.advance(1, 1);
        publication.note(1, 0, 0);
        assert!(publication.newest().is_none());
        assert_eq!((publication.published().unwrap().applied_index(), publication.applied_index()), (0, 1));
        publication.publish(state.version());
        assert_eq!(publication.newest().unwrap().applied_index(), 1);
        publication.withdraw();
        assert!(publication.newest().is_none() && publication.published().is_none());
        assert_eq!(publication.applied_index(), 1);
    }

    #[test]
    fn a_version_is_wanted_for_a_while_after_somebody_has_asked() {
        let publication = Publication::new(Version::default());
        assert!(!publication.is_wanted());
        publication.newest();
        assert!(publication.is_wanted());
        let started = publication.started.checked_sub(DEMAND_INTERVAL).unwrap();
        assert!(!Publication { started, ..publication }.is_wanted(), "that was an interval ago");
    }

    impl Place for loom::sync::Mutex<Option<Arc<u64>>> {
        type Version = u64;

        fn load(&self) -> Option<Arc<u64>> {
            self.lock().unwrap().clone()
        }

        fn store(&self, version: Option<Arc<u64>>) {
            *self.lock().unwrap() = version;
        }

        fn index(version: &u64) -> u64 {
            *version
        }
    }

    impl Number for loom::sync::atomic::AtomicU64 {
        fn load(&self) -> u64 {
            loom::sync::atomic::AtomicU64::load(self, Ordering::Acquire)
        }

        fn store(&self, value: u64) {
            loom::sync::atomic::AtomicU64::store(self, value, Ordering::Release);
        }
    }

    /// In every order that the memory between two processors allows: who reads after an answer sees what it spoke of, or
    /// is told to ask the applier.
    #[test]
    fn a_reader_sees_what_was_answered_before() {
        use loom::sync::atomic::AtomicU64;

        loom::model(|| {
            let newest = Newest { version: loom::sync::Mutex::new(None), applied_index: AtomicU64::new(0) };
            let shared = loom::sync::Arc::new((newest, AtomicU64::new(0)));
            let applier = shared.clone();
            let applying = loom::thread::spawn(move || {
                let (newest, answered) = &*applier;
                // One batch with a version, and one without.
                newest.replace(Some(Arc::new(1)));
                newest.note(1);
                answered.store(1, Ordering::Release);
                newest.replace(None);
                newest.note(2);
                answered.store(2, Ordering::Release);
            });
            let (newest, answered) = &*shared;
            let seen = answered.load(Ordering::Acquire);
            if let Some(version) = newest.version() {
                assert!(*version >= seen, "version {version} behind the answer {seen}");
            }
            applying.join().unwrap();
            assert!(newest.version().is_none(), "the applier has to be asked");
        });
    }
}
