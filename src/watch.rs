//! Who waits for which keys to change.
//!
//! A client that waits costs the applier nothing while other keys change: it is entered here under its key or prefix,
//! and the applier, after it has published how far it is, wakes only those whose keys are among the changes. With no one
//! waiting that is one atomic load.

use std::collections::{BTreeMap, HashMap};
use std::ops::Bound;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering, fence};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use bytes::Bytes;
use crossbeam_channel::{Receiver, RecvTimeoutError, Sender, bounded};

/// Clients that may wait at the same time. Each holds a connection and its thread besides, so that this leaves half of
/// the connections ([`crate::http::limits::CONNECTIONS_MAX`]) to requests that do not wait. What they cost writers while
/// nothing of theirs changes is one search per change, however many they are; a change that all of them wait for
/// takes the applier a wake-up each.
pub const WATCHES_MAX: usize = 2048;

/// What a client waits for.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Interest {
    /// A change of this key.
    Key(Bytes),
    /// A change of any key that begins so.
    Prefix(Bytes),
}

/// How a wait ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wake {
    /// There may be a change; look again. Up to this index there is none since the last look.
    Changed(u64),
    /// The deadline has passed.
    TimedOut,
    /// The node is shutting down.
    Stopping,
}

/// The clients that wait on one node.
#[derive(Debug, Default)]
pub struct Watchers {
    /// How many are entered; read without the lock by the applier, each time that it has published how far it is.
    count: AtomicUsize,
    /// The index up to which all were woken for whom there was a change.
    told: AtomicU64,
    registry: Mutex<Registry>,
}

#[derive(Debug, Default)]
struct Registry {
    next_id: u64,
    stopped: bool,
    keys: HashMap<Bytes, Vec<Waiter>>,
    /// In order, so that the prefixes of a key are found without looking at all the others.
    prefixes: BTreeMap<Bytes, Vec<Waiter>>,
}

#[derive(Debug)]
struct Waiter {
    id: u64,
    /// Has room for one wake-up, with the index up to which there was no change: a second one before the first is seen
    /// says nothing new. Dropped at shutdown.
    wakes_tx: Sender<u64>,
}

/// A client that is entered, until this is dropped.
#[derive(Debug)]
pub struct Watch<'a> {
    watchers: &'a Watchers,
    interest: Interest,
    id: u64,
    wakes_rx: Receiver<u64>,
}

impl Watchers {
    /// Nobody waits.
    pub fn new() -> Self {
        Watchers::default()
    }

    /// Enters a client: what is published from now on wakes it. So it must look at the newest version *after* this,
    /// and only then wait.
    ///
    /// `None` if [`WATCHES_MAX`] clients are entered already.
    pub fn watch(&self, interest: Interest) -> Option<Watch<'_>> {
        let (wakes_tx, wakes_rx) = bounded(1);
        let mut registry = self.lock();
        if self.count.load(Ordering::Relaxed) >= WATCHES_MAX {
            return None;
        }
        let id = registry.next_id;
        registry.next_id += 1;
        if !registry.stopped {
            let waiters = match &interest {
                Interest::Key(key) => registry.keys.entry(key.clone()).or_default(),
                Interest::Prefix(prefix) => registry.prefixes.entry(prefix.clone()).or_default(),
            };
            waiters.push(Waiter { id, wakes_tx });
        }
        self.count.fetch_add(1, Ordering::Relaxed);
        // Pairs with the one in `any`: either the applier sees this client, or the client's next look at the newest
        // version sees what the applier has published.
        fence(Ordering::SeqCst);
        Some(Watch { watchers: self, interest, id, wakes_rx })
    }

    /// Whether anyone waits. To be asked after it was published how far the applier is; if not, nobody needs to be woken.
    pub fn any(&self) -> bool {
        fence(Ordering::SeqCst);
        self.count.load(Ordering::Relaxed) > 0
    }

    /// How many clients wait.
    pub fn count(&self) -> usize {
        self.count.load(Ordering::Relaxed)
    }

    /// Wakes those who wait for one of these keys: of all that have changed after the index `told`, where the last call
    /// ended, up to `index`. To be called after it was published that the applier is so far.
    pub fn changed<'k>(&self, told: u64, index: u64, keys: impl IntoIterator<Item = &'k [u8]>) {
        let registry = self.lock();
        for key in keys {
            registry.keys.get(key).into_iter().flatten().for_each(|waiter| waiter.wake(told));
            registry.wake_prefixes_of(key, told);
        }
        drop(registry);
        self.told.store(index, Ordering::Release);
    }

    /// Wakes everyone: a snapshot has replaced the state, and what that changed is not known key by key.
    pub fn all_changed(&self) {
        let registry = self.lock();
        registry.keys.values().chain(registry.prefixes.values()).flatten().for_each(|waiter| waiter.wake(0));
    }

    /// Ends all waits, also those that begin later.
    pub fn stop(&self) {
        let mut registry = self.lock();
        registry.stopped = true;
        registry.keys.clear();
        registry.prefixes.clear();
    }

    fn lock(&self) -> MutexGuard<'_, Registry> {
        // A panic ends the node; until it has, the maps are whole.
        self.registry.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Registry {
    /// Wakes those who wait for a prefix of `key`, the longest first.
    ///
    /// Of all prefixes up to some beginning of `key`, the greatest either is one of it, or shares a shorter beginning
    /// with it, and then none between the two can be one: it would be greater. So each step shortens the beginning.
    fn wake_prefixes_of(&self, key: &[u8], told: u64) {
        let mut beginning = Some(key);
        while let Some(bound) = beginning {
            let up_to_bound = (Bound::Unbounded, Bound::Included(bound));
            let Some((prefix, waiters)) = self.prefixes.range::<[u8], _>(up_to_bound).next_back() else { return };
            let shared = prefix.iter().zip(bound).take_while(|(a, b)| a == b).count();
            beginning = if shared == prefix.len() {
                waiters.iter().for_each(|waiter| waiter.wake(told));
                // The empty one is the last.
                shared.checked_sub(1).map(|shorter| &key[..shorter])
            } else {
                Some(&key[..shared])
            };
        }
    }

    /// Forgets a waiter, if it is still known.
    fn forget(&mut self, interest: &Interest, id: u64) {
        let is_left = |waiters: &mut Vec<Waiter>| {
            waiters.retain(|waiter| waiter.id != id);
            !waiters.is_empty()
        };
        match interest {
            Interest::Key(key) => {
                if self.keys.get_mut(key).is_some_and(|waiters| !is_left(waiters)) {
                    self.keys.remove(key);
                }
            }
            Interest::Prefix(prefix) => {
                if self.prefixes.get_mut(prefix).is_some_and(|waiters| !is_left(waiters)) {
                    self.prefixes.remove(prefix);
                }
            }
        }
    }
}

impl Waiter {
    fn wake(&self, told: u64) {
        // Full: it is awake already.
        let _ = self.wakes_tx.try_send(told);
    }
}

impl Watch<'_> {
    /// Waits until a key of this interest may have changed, or `deadline` has passed.
    pub fn wait(&self, deadline: Instant) -> Wake {
        match self.wakes_rx.recv_deadline(deadline) {
            Ok(told) => Wake::Changed(told),
            Err(RecvTimeoutError::Timeout) => Wake::TimedOut,
            Err(RecvTimeoutError::Disconnected) => Wake::Stopping,
        }
    }

    /// The index up to which there is no change since the last look, as far as is known; 0 if that is not.
    pub fn unchanged_up_to(&self) -> u64 {
        // Read first: whoever was to be woken up to there has been.
        let told = self.watchers.told.load(Ordering::Acquire);
        self.wakes_rx.try_recv().unwrap_or(told)
    }
}

impl Drop for Watch<'_> {
    fn drop(&mut self) {
        self.watchers.lock().forget(&self.interest, self.id);
        self.watchers.count.fetch_sub(1, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use proptest::collection::vec;
    use proptest::prelude::*;

    use super::*;

    const LONG: Duration = Duration::from_secs(20);

    fn key(name: &'static str) -> Interest {
        Interest::Key(Bytes::from_static(name.as_bytes()))
    }

    fn prefix(name: &'static str) -> Interest {
        Interest::Prefix(Bytes::from_static(name.as_bytes()))
    }

    /// Which of these watches are awake.
    fn awake(watches: &[Watch<'_>]) -> Vec<bool> {
        watches.iter().map(|watch| matches!(watch.wait(Instant::now()), Wake::Changed(_))).collect()
    }

    #[test]
    fn a_change_wakes_those_who_wait_for_it() {
        let watchers = Watchers::new();
        let interests = [key("a/b"), key("a"), prefix("a/"), prefix(""), prefix("b"), key("a/b")];
        let watches: Vec<_> = interests.map(|interest| watchers.watch(interest).expect("there is room")).into();
        watchers.changed(0, 2, [&b"a/b"[..], b"x"]);
        watchers.changed(2, 3, [&b"a/b"[..]]);
        assert_eq!(awake(&watches), [true, false, true, true, false, true]);
        assert_eq!(awake(&watches), [false; 6], "one wake-up is enough");
        watchers.all_changed();
        assert_eq!(awake(&watches), [true; 6]);
    }

    proptest! {
        #[test]
        fn the_prefixes_of_a_key_are_found(
            prefixes in vec(vec(b'a'..b'd', 0..6), 0..40), key in vec(b'a'..b'd', 0..8),
        ) {
            let watchers = Watchers::new();
            let expected: Vec<_> = prefixes.iter().map(|prefix| key.starts_with(prefix)).collect();
            let interests = prefixes.into_iter().map(|prefix| Interest::Prefix(prefix.into()));
            let watches: Vec<_> = interests.map(|interest| watchers.watch(interest).expect("there is room")).collect();
            watchers.changed(0, 1, [&*key]);
            prop_assert_eq!(awake(&watches), expected);
        }
    }

    #[test]
    fn who_was_not_woken_knows_that_nothing_has_changed() {
        let watchers = Watchers::new();
        let watch = watchers.watch(key("a")).expect("there is room");
        assert_eq!(watch.unchanged_up_to(), 0);
        watchers.changed(7, 8, [&b"b"[..]]);
        assert_eq!(watch.unchanged_up_to(), 8);
        watchers.changed(8, 9, [&b"a"[..]]);
        watchers.changed(9, 10, [&b"a"[..]]);
        assert_eq!(watch.wait(Instant::now()), Wake::Changed(8), "the first one counts");
        watchers.changed(10, 11, [&b"a"[..]]);
        assert_eq!(watch.unchanged_up_to(), 10, "it is awake");
        watchers.all_changed();
        assert_eq!(watch.unchanged_up_to(), 0, "nobody knows what has changed");
    }

    #[test]
    fn who_has_gone_is_forgotten() {
        let watchers = Watchers::new();
        assert!(!watchers.any());
        let watches: Vec<_> = (0..WATCHES_MAX).map(|_| watchers.watch(prefix("")).expect("there is room")).collect();
        assert!(watchers.watch(prefix("")).is_none(), "there is a limit");
        assert!(watchers.any());
        drop(watches);
        assert!(!watchers.any());
        assert!(watchers.lock().prefixes.is_empty());
        assert!(watchers.watch(key("")).is_some());
    }

    #[test]
    fn stopping_ends_all_waits() {
        let watchers = Watchers::new();
        std::thread::scope(|scope| {
            let early = watchers.watch(key("a")).expect("there is room");
            let waiting = scope.spawn(move || early.wait(Instant::now() + LONG));
            watchers.stop();
            assert_eq!(waiting.join().expect("it ends"), Wake::Stopping);
        });
        assert_eq!(watchers.watch(key("a")).expect("there is room").wait(Instant::now() + LONG), Wake::Stopping);
    }
}
