//! What the applier shows to readers: an immutable version of the store, made when somebody wants one.
//!
//! A published version shares the store's nodes, so every write behind it copies the nodes it changes: with a version
//! for every batch, that copying is most of what a write costs at the applier. So while nobody reads on this node,
//! only the numbers are published, and a version once a second, so that what was overwritten does not stay in memory; a
//! reader who finds the version older than the numbers asks the applier for a new one. Who reads often finds one for
//! every batch.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use arc_swap::ArcSwap;

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
    fn load(&self) -> Arc<Self::Version>;
    fn store(&self, version: Arc<Self::Version>);
    fn index(version: &Self::Version) -> u64;
}

/// A number that one thread writes and others read: what was written before it is seen by whoever has read it.
trait Number {
    fn load(&self) -> u64;
    fn store(&self, value: u64);
}

impl Place for ArcSwap<Version> {
    type Version = Version;

    fn load(&self) -> Arc<Version> {
        self.load_full()
    }

    fn store(&self, version: Arc<Version>) {
        ArcSwap::store(self, version);
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
        // The number first: the version may become newer meanwhile, never older.
        let applied_index = self.applied_index.load();
        Some(self.version.load()).filter(|version| P::index(version) >= applied_index)
    }

    /// For the applier: a version comes before its number is noted.
    fn replace(&self, version: Arc<P::Version>) {
        self.version.store(version);
    }

    /// For the applier, before it answers anyone.
    fn note(&self, applied_index: u64) {
        self.applied_index.store(applied_index);
    }
}

/// The newest published version, and how far the applier is.
pub struct Publication {
    newest: Newest<ArcSwap<Version>, AtomicU64>,
    keys: AtomicU64,
    bytes: AtomicU64,
    started: Instant,
    /// When a reader has asked last, in milliseconds since `started`.
    asked_at: AtomicU64,
    /// When a version was published last, likewise.
    published_at: AtomicU64,
}

impl Publication {
    /// Publishes a first version.
    pub fn new(version: Version) -> Publication {
        let publication = Publication {
            newest: Newest { version: ArcSwap::from_pointee(Version::default()), applied_index: AtomicU64::new(0) },
            keys: AtomicU64::new(0),
            bytes: AtomicU64::new(0),
            started: Instant::now(),
            asked_at: AtomicU64::new(0),
            published_at: AtomicU64::new(0),
        };
        publication.publish(version);
        publication
    }

    /// The version that holds everything applied until now; `None` if there is none, and then the applier has to be
    /// asked. Either way there will be one for every batch for a while.
    pub fn newest(&self) -> Option<Arc<Version>> {
        // Stored only when it changes: many readers would take the line from each other.
        let now = self.millis();
        if self.asked_at.load(Ordering::Relaxed) != now {
            self.asked_at.store(now, Ordering::Relaxed);
        }
        self.newest.version()
    }

    /// The version that was published last, however old.
    pub fn last(&self) -> Arc<Version> {
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

    /// Whether somebody has read lately, or the last version is old. For the applier.
    pub fn is_wanted(&self) -> bool {
        let (now, interval) = (self.millis(), DEMAND_INTERVAL.as_millis() as u64);
        // A reader's clock may be a millisecond ahead.
        let since = |at: &AtomicU64| now.saturating_sub(at.load(Ordering::Relaxed));
        since(&self.asked_at) < interval || since(&self.published_at) >= interval
    }

    /// Says how far the state has come. For the applier, before it answers anyone.
    pub fn note(&self, applied_index: u64, keys: u64, bytes: u64) {
        self.keys.store(keys, Ordering::Relaxed);
        self.bytes.store(bytes, Ordering::Relaxed);
        self.newest.note(applied_index);
    }

    /// Publishes a version. For the applier; versions come in the order of their indexes.
    pub fn publish(&self, version: Version) -> Arc<Version> {
        let version = Arc::new(version);
        self.newest.replace(version.clone());
        self.published_at.store(self.millis(), Ordering::Relaxed);
        self.note(version.applied_index(), version.keys() as u64, version.bytes());
        version
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
        assert_eq!((publication.last().applied_index(), publication.applied_index()), (0, 1));
        assert!(publication.is_wanted(), "somebody has asked");
        publication.publish(state.version());
        assert_eq!(publication.newest().unwrap().applied_index(), 1);
    }

    #[test]
    fn a_reader_whose_clock_is_ahead_harms_nobody() {
        let publication = Publication::new(Version::default());
        publication.asked_at.store(publication.millis() + 1000, Ordering::Relaxed);
        assert!(publication.is_wanted());
    }

    #[test]
    fn an_old_version_is_replaced_although_nobody_reads() {
        let publication = Publication::new(Version::default());
        let past = Instant::now().checked_sub(DEMAND_INTERVAL * 3).unwrap();
        let publication = Publication { started: past, ..publication };
        assert!(publication.is_wanted(), "published three intervals ago");
        publication.publish(Version::default());
        assert!(!publication.is_wanted(), "asked three intervals ago, and published just now");
    }

    impl Place for loom::sync::Mutex<Arc<u64>> {
        type Version = u64;

        fn load(&self) -> Arc<u64> {
            self.lock().unwrap().clone()
        }

        fn store(&self, version: Arc<u64>) {
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
            let newest = Newest { version: loom::sync::Mutex::new(Arc::new(0)), applied_index: AtomicU64::new(0) };
            let shared = loom::sync::Arc::new((newest, AtomicU64::new(0)));
            let applier = shared.clone();
            let applying = loom::thread::spawn(move || {
                let (newest, answered) = &*applier;
                // One batch with a version, and one without.
                newest.replace(Arc::new(1));
                newest.note(1);
                answered.store(1, Ordering::Release);
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
