use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread::{Builder, JoinHandle};
use std::time::{Duration, Instant};

use crate::client::{Client, Failure};
use crate::support::{Cluster, wait_for};

/// Each writer overwrites this many keys in turn: enough that a lost write is not always hidden by the next one, few
/// enough that all can be read again at the end.
const KEYS_PER_WRITER: usize = 20;

/// A node that ends in order answers what is in flight. But it also closes connections that idle, and a writer may
/// just then send its next request on one: HTTP has no answer to that. It is rare; all writers at once it is not.
pub(crate) const CLOSED_UNDER_A_REQUEST_MAX: usize = 1;

/// Writers that go on until they are stopped, and remember what they were told. Writer `i` begins at node `i` modulo
/// their number, and moves on to the next node when its own cannot be reached.
pub(crate) struct Load {
    stop: Arc<AtomicBool>,
    acknowledged: Arc<AtomicUsize>,
    writers: Vec<JoinHandle<Written>>,
    started: Instant,
}

/// What became of the writes.
#[derive(Debug, Default)]
pub(crate) struct Written {
    keys: Vec<Key>,
    /// When each success was heard of; before them the start, after them the end.
    times: Vec<Instant>,
    /// Answers by status.
    pub(crate) statuses: BTreeMap<u16, usize>,
    /// Answers whose status and `outcome` do not fit together.
    pub(crate) dishonest: Vec<String>,
    /// Requests for which no connection could be made.
    pub(crate) not_sent: usize,
    /// Requests whose connection broke before the answer.
    pub(crate) lost: usize,
    /// Requests that were never answered at all.
    pub(crate) timed_out: usize,
}

/// One key, written by one writer, one write after the other.
///
/// A write of unknown outcome may take effect at any later time, so its key is left alone from then on: it must have
/// the value of that write or of the last acknowledged one.
#[derive(Debug)]
struct Key {
    name: String,
    acknowledged: Option<(String, String)>,
    unknown: Option<String>,
}

impl Load {
    pub(crate) fn start(cluster: &Cluster, writers: usize) -> Self {
        static LOADS: AtomicUsize = AtomicUsize::new(0);
        // A key that an earlier load of the same test has written would be taken for a broken promise.
        Self::start_under(&format!("load-{}", LOADS.fetch_add(1, Ordering::Relaxed)), cluster, writers)
    }

    /// As [`Self::start`], with keys under a prefix of its own: what an earlier load left there would be taken for a
    /// broken promise.
    pub(crate) fn start_under(prefix: &str, cluster: &Cluster, writers: usize) -> Self {
        let addresses: Vec<SocketAddr> = cluster.ids().into_iter().map(|id| cluster.address(id)).collect();
        let stop = Arc::new(AtomicBool::new(false));
        let acknowledged = Arc::new(AtomicUsize::new(0));
        let started = Instant::now();
        let writers = (0..writers).map(|number| {
            let (addresses, stop, acknowledged) = (addresses.clone(), Arc::clone(&stop), Arc::clone(&acknowledged));
            let prefix = format!("{prefix}/{number}");
            let body = move || Writer::new(number, prefix, addresses, acknowledged).run(&stop);
            Builder::new().name(format!("writer-{number}")).spawn(body).unwrap()
        });
        let writers = writers.collect();
        Self { stop, acknowledged, writers, started }
    }

    /// Waits until this many more writes have been acknowledged.
    #[track_caller]
    pub(crate) fn wait_for_writes(&self, count: usize) {
        let target = self.acknowledged.load(Ordering::Relaxed) + count;
        wait_for("acknowledged writes", || (self.acknowledged.load(Ordering::Relaxed) >= target).then_some(()));
    }

    /// Ends all writers after the answer they wait for.
    #[track_caller]
    pub(crate) fn stop(self) -> Written {
        self.stop.store(true, Ordering::Relaxed);
        let end = Instant::now();
        let mut all = Written::default();
        for writer in self.writers {
            all.add(writer.join().expect("a writer panicked"));
        }
        all.times.push(self.started);
        all.times.push(end);
        all.times.sort();
        println!(
            "acknowledged {}, statuses {:?}, not sent {}, lost {}, timed out {}, longest gap {:?}",
            all.acknowledged(),
            all.statuses,
            all.not_sent,
            all.lost,
            all.timed_out,
            all.longest_gap()
        );
        all
    }
}

impl Written {
    /// How many writes succeeded.
    pub(crate) fn acknowledged(&self) -> usize {
        self.statuses.get(&204).copied().unwrap_or(0)
    }

    /// How many answers were neither a success nor anything else.
    pub(crate) fn other_than_success(&self) -> usize {
        self.statuses.values().sum::<usize>() - self.acknowledged()
    }

    /// The longest time in which no writer at all heard of a success.
    pub(crate) fn longest_gap(&self) -> Duration {
        self.times.windows(2).map(|pair| pair[1] - pair[0]).max().unwrap_or_default()
    }

    /// Reads all keys, on all nodes in turn, and panics if a promise was broken.
    #[track_caller]
    pub(crate) fn verify(&self, cluster: &Cluster) {
        self.verify_on(cluster, &cluster.ids());
    }

    /// As [`Self::verify`], on these nodes.
    #[track_caller]
    pub(crate) fn verify_on(&self, cluster: &Cluster, nodes: &[u64]) {
        assert!(self.acknowledged() > 0, "nothing was written, so nothing is tested");
        assert_eq!(self.timed_out, 0, "requests were never answered");
        assert!(self.dishonest.is_empty(), "status and outcome do not fit: {:?}", self.dishonest);
        let mut clients: Vec<Client> = nodes.iter().map(|id| cluster.client(*id)).collect();
        let mut broken = Vec::new();
        for (number, key) in self.keys.iter().enumerate() {
            let turn = number % clients.len();
            let response = clients[turn].get(&format!("/{}", key.name));
            let found = match response.status {
                200 => Some((response.text(), response.header("etag").unwrap_or_default().to_owned())),
                404 => None,
                other => panic!("GET {} on node {}: {other} {}", key.name, nodes[turn], response.text()),
            };
            let is_acknowledged = found == key.acknowledged;
            let is_unknown = matches!((&found, &key.unknown), (Some((value, _)), Some(unknown)) if value == unknown);
            if !is_acknowledged && !is_unknown {
                broken.push(format!("node {} has {found:?} for {key:?}", nodes[turn]));
            }
        }
        assert!(broken.is_empty(), "{} of {} keys: {:#?}", broken.len(), self.keys.len(), broken);
    }

    fn add(&mut self, other: Self) {
        self.keys.extend(other.keys);
        self.times.extend(other.times);
        for (status, count) in other.statuses {
            *self.statuses.entry(status).or_default() += count;
        }
        self.dishonest.extend(other.dishonest);
        self.not_sent += other.not_sent;
        self.lost += other.lost;
        self.timed_out += other.timed_out;
    }
}

struct Writer {
    number: usize,
    /// Of the names of its keys.
    prefix: String,
    addresses: Vec<SocketAddr>,
    node: usize,
    client: Client,
    acknowledged: Arc<AtomicUsize>,
    current: Vec<Key>,
    written: Written,
}

impl Writer {
    fn new(number: usize, prefix: String, addresses: Vec<SocketAddr>, acknowledged: Arc<AtomicUsize>) -> Self {
        let node = number % addresses.len();
        let client = Client::new(addresses[node]);
        let current = (0..KEYS_PER_WRITER).map(|slot| Key::new(&prefix, slot, 0)).collect();
        Self { number, prefix, addresses, node, client, acknowledged, current, written: Written::default() }
    }

    fn run(mut self, stop: &AtomicBool) -> Written {
        let mut sequence = 0;
        while !stop.load(Ordering::Relaxed) {
            sequence += 1;
            self.write(sequence % KEYS_PER_WRITER, sequence);
        }
        let mut written = self.written;
        written.keys.extend(self.current);
        written.keys.retain(|key| key.acknowledged.is_some() || key.unknown.is_some());
        written
    }

    fn write(&mut self, slot: usize, sequence: usize) {
        let value = format!("writer {} write {sequence}", self.number);
        let target = format!("/{}", self.current[slot].name);
        match self.client.request("PUT", &target, &[], value.as_bytes()) {
            Ok(response) => {
                *self.written.statuses.entry(response.status).or_default() += 1;
                match (response.status, response.outcome().as_str()) {
                    (204, _) => {
                        let etag = response.header("etag").unwrap_or_default().to_owned();
                        self.current[slot].acknowledged = Some((value, etag));
                        self.written.times.push(Instant::now());
                        self.acknowledged.fetch_add(1, Ordering::Relaxed);
                    }
                    (503 | 507, "not-applied") => std::thread::sleep(Duration::from_millis(10)),
                    (504, "unknown") => self.retire(slot, sequence, value),
                    (status, outcome) => {
                        self.written.dishonest.push(format!("{status} {outcome:?} {}", response.text()));
                        self.retire(slot, sequence, value);
                    }
                }
            }
            Err(Failure::NotSent(_)) => {
                self.written.not_sent += 1;
                self.move_on();
                // All may be down: do not spin.
                std::thread::sleep(Duration::from_millis(10));
            }
            Err(Failure::Lost(_)) => {
                self.written.lost += 1;
                self.retire(slot, sequence, value);
                self.move_on();
            }
            Err(Failure::TimedOut) => {
                self.written.timed_out += 1;
                self.retire(slot, sequence, value);
            }
        }
    }

    fn move_on(&mut self) {
        self.node = (self.node + 1) % self.addresses.len();
        self.client = Client::new(self.addresses[self.node]);
    }

    /// Leaves a key alone whose last write may still take effect.
    fn retire(&mut self, slot: usize, sequence: usize, value: String) {
        let mut key = std::mem::replace(&mut self.current[slot], Key::new(&self.prefix, slot, sequence));
        key.unknown = Some(value);
        self.written.keys.push(key);
    }
}

impl Key {
    fn new(prefix: &str, slot: usize, generation: usize) -> Self {
        Self { name: format!("{prefix}/{slot}/{generation}"), acknowledged: None, unknown: None }
    }
}
