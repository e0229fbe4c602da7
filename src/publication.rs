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

/// The newest published version, and how far the applier is.
pub struct Publication {
    version: ArcSwap<Version>,
    applied_index: AtomicU64,
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
            version: ArcSwap::from_pointee(Version::default()),
            applied_index: AtomicU64::new(0),
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
        // The number first: the version may become newer meanwhile, never older.
        let applied_index = self.applied_index.load(Ordering::Acquire);
        Some(self.version.load_full()).filter(|version| version.applied_index() >= applied_index)
    }

    /// The version that was published last, however old.
    pub fn last(&self) -> Arc<Version> {
        self.version.load_full()
    }

    /// The index of the last entry that is applied.
    pub fn applied_index(&self) -> u64 {
        self.applied_index.load(Ordering::Acquire)
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
        self.applied_index.store(applied_index, Ordering::Release);
    }

    /// Publishes a version. For the applier; versions come in the order of their indexes.
    pub fn publish(&self, version: Version) -> Arc<Version> {
        let version = Arc::new(version);
        self.version.store(version.clone());
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
}
