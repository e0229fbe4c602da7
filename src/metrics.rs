//! What a node counts and measures, and how Prometheus reads it.
//!
//! [`Metrics`] holds one typed metric for each thing worth knowing, handed to the threads that count. To count is an
//! atomic addition or a few of them, with no lock and no allocation: whoever counts often keeps the metric itself,
//! resolved from its labels beforehand. What others know anyway (lengths of queues, sizes, figures of the process) is
//! not counted along the way but looked at when somebody asks: see [`Metrics::read_with`].
//!
//! Names follow the conventions of Prometheus: base units, the unit last, `_total` behind counters. The values of every
//! label come from a list that is fixed, or are ids of peers whose series go when the peer does, so the number of
//! series is bounded.
//!
//! The `prometheus` crate, and not its like: `prometheus-client` takes a lock for each observation of a histogram and
//! writes OpenMetrics, and the exporter of `metrics` keeps single observations in memory until somebody drains them.

mod peers;
mod process;
mod requests;

use std::fmt;
use std::sync::{Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use prometheus::core::Collector;
use prometheus::{
    Counter, Histogram, HistogramOpts, HistogramVec, IntCounter, IntCounterVec, IntGauge, IntGaugeVec, Opts, Registry,
    TextEncoder,
};

pub use self::peers::{DropCause, LaneMetrics, Peers, Received, Sent};
use self::process::Process;
pub use self::requests::{Consistency, Requests};

/// The media type of [`Metrics::text`].
pub const CONTENT_TYPE: &str = "text/plain; version=0.0.4; charset=utf-8";

/// For a request: from a read without a round trip to the end of the longest patience.
const REQUEST_SECONDS: &[f64] =
    &[0.0001, 0.000_25, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0];

/// For a step inside a node, a sync, or a round between nodes: from memory to a disk that is in trouble.
const STEP_SECONDS: &[f64] =
    &[0.000_01, 0.000_05, 0.0001, 0.000_25, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.1, 0.5, 2.5];

/// For the file of a whole store.
const SNAPSHOT_SECONDS: &[f64] = &[0.001, 0.01, 0.05, 0.25, 1.0, 5.0, 15.0, 60.0, 300.0];

/// For entries, reads or writes that share one batch.
const BATCH_COUNTS: &[f64] = &[1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0, 1024.0];

/// For one write to the log: from a sector to a full batch.
const WRITE_BYTES: &[f64] = &[512.0, 2048.0, 8192.0, 32_768.0, 131_072.0, 524_288.0, 2_097_152.0, 16_777_216.0];

/// For the file of a whole store: from 1 KiB in steps of eight.
const SNAPSHOT_BYTES: &[f64] =
    &[1024.0, 8192.0, 65_536.0, 524_288.0, 4_194_304.0, 33_554_432.0, 268_435_456.0, 2_147_483_648.0];

/// Looks at what is not counted along the way, and puts it into the metrics.
type Reader = Box<dyn Fn(&Metrics) + Send + Sync>;

/// All metrics of one node. Shared by its threads.
pub struct Metrics {
    /// Clients' requests.
    pub requests: Requests,
    /// Connections to the key-value port.
    pub client_connections: Connections,
    /// Connections to the peer port.
    pub peer_connections: Connections,
    /// What waits inside the node.
    pub queues: Queues,
    /// Where this node stands.
    pub position: Position,
    /// How many writes a leader proposed at once.
    pub proposal_batch: Histogram,
    /// How many writes were forwarded to the leader at once.
    pub forward_batch: Histogram,
    /// Rounds that confirm a read index.
    pub read_rounds: ReadRounds,
    /// The log on disk.
    pub log: LogMetrics,
    /// How long the applier took over a batch, until its effects were published.
    pub apply_duration: Histogram,
    /// Snapshots of the whole store.
    pub snapshots: Snapshots,
    /// Other nodes, one by one.
    pub peers: Peers,
    /// What is stored, and where.
    pub store: StoreMetrics,
    process: Process,
    registry: Registry,
    reader: OnceLock<Reader>,
    /// One scrape at a time: what is read must not be put in place twice, or in another order.
    scrape: Mutex<()>,
}

impl fmt::Debug for Metrics {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Metrics")
    }
}

impl Default for Metrics {
    fn default() -> Metrics {
        Metrics::new()
    }
}

impl Metrics {
    /// Metrics of a node that starts now.
    pub fn new() -> Metrics {
        let family = Families::default();
        let build = family.gauges("raftexample_build_info", "The version that runs; always 1.", &["version"]);
        build.with_label_values(&[env!("CARGO_PKG_VERSION")]).set(1);
        let [client_connections, peer_connections] = Connections::of_ports(&family);
        Metrics {
            requests: Requests::new(&family),
            client_connections,
            peer_connections,
            queues: Queues::new(&family),
            position: Position::new(&family),
            proposal_batch: family.histogram(
                "raftexample_proposal_batch_entries",
                "Writes that this node, as the leader, proposed to Raft in one batch.",
                BATCH_COUNTS,
            ),
            forward_batch: family.histogram(
                "raftexample_forward_batch_entries",
                "Writes that this node forwarded to the leader in one message.",
                BATCH_COUNTS,
            ),
            read_rounds: ReadRounds::new(&family),
            log: LogMetrics::new(&family),
            apply_duration: family.histogram(
                "raftexample_apply_duration_seconds",
                "Time to apply one batch of committed entries and publish the result.",
                STEP_SECONDS,
            ),
            snapshots: Snapshots::new(&family),
            peers: Peers::new(&family),
            store: StoreMetrics::new(&family),
            process: Process::new(&family),
            registry: family.registry,
            reader: OnceLock::new(),
            scrape: Mutex::default(),
        }
    }

    /// Has `reader` look, whenever the metrics are asked for, at what nobody counts along the way. The first one stays.
    pub fn read_with(&self, reader: impl Fn(&Metrics) + Send + Sync + 'static) {
        let _ = self.reader.set(Box::new(reader));
    }

    /// Everything as Prometheus reads it, in its text format; see [`CONTENT_TYPE`]. Waits for no other thread but one
    /// that does the same.
    pub fn text(&self) -> String {
        let _one_at_a_time = self.scrape.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(reader) = self.reader.get() {
            reader(self);
        }
        self.position.derive();
        self.process.read();
        let mut text = String::new();
        if let Err(error) = TextEncoder::new().encode_utf8(&self.registry.gather(), &mut text) {
            // Of families without names or series, which the registry does not take. The text ends before the first.
            log::error!("failed to write all metrics: {error}");
        }
        text
    }

    /// The sum of all series of a family: of their values, or of a histogram's number of observations.
    #[cfg(test)]
    pub(crate) fn total(&self, name: &str) -> f64 {
        let families = self.registry.gather();
        let family = families.iter().find(|family| family.name() == name).expect("it is registered");
        let of = |metric: &prometheus::proto::Metric| {
            let values = [metric.get_counter().get_value(), metric.get_gauge().get_value()];
            values.iter().sum::<f64>() + metric.get_histogram().get_sample_count() as f64
        };
        family.get_metric().iter().map(of).sum()
    }
}

/// Adds what has come to a total since this counter was last brought up to it.
fn catch_up(counter: &IntCounter, total: u64) {
    counter.inc_by(total.saturating_sub(counter.get()));
}

/// As a gauge takes it. Nothing that is counted here comes near the limit.
fn signed(value: impl TryInto<i64>) -> i64 {
    value.try_into().unwrap_or(i64::MAX)
}

/// Makes metrics and registers them. A name or label that the library refuses is a mistake in this module, which every
/// start of a node would show.
#[derive(Default)]
struct Families {
    registry: Registry,
}

impl Families {
    fn add<M: Collector + Clone + 'static>(&self, metric: prometheus::Result<M>) -> M {
        let metric = metric.expect("names and labels are well-formed");
        self.registry.register(Box::new(metric.clone())).expect("names are unique");
        metric
    }

    fn counter(&self, name: &str, help: &str) -> IntCounter {
        self.add(IntCounter::new(name, help))
    }

    fn fractional_counter(&self, name: &str, help: &str) -> Counter {
        self.add(Counter::new(name, help))
    }

    fn counters(&self, name: &str, help: &str, labels: &[&str]) -> IntCounterVec {
        self.add(IntCounterVec::new(Opts::new(name, help), labels))
    }

    fn gauge(&self, name: &str, help: &str) -> IntGauge {
        self.add(IntGauge::new(name, help))
    }

    fn gauges(&self, name: &str, help: &str, labels: &[&str]) -> IntGaugeVec {
        self.add(IntGaugeVec::new(Opts::new(name, help), labels))
    }

    fn histogram(&self, name: &str, help: &str, buckets: &[f64]) -> Histogram {
        self.add(Histogram::with_opts(HistogramOpts::new(name, help).buckets(buckets.to_vec())))
    }

    fn histograms(&self, name: &str, help: &str, labels: &[&str], buckets: &[f64]) -> HistogramVec {
        self.add(HistogramVec::new(HistogramOpts::new(name, help).buckets(buckets.to_vec()), labels))
    }
}

/// The connections to one port. Read when the metrics are asked for.
pub struct Connections {
    open: IntGauge,
    limit: IntGauge,
    refused: IntCounter,
}

impl Connections {
    /// Those of the key-value port, and those of the peer port.
    fn of_ports(family: &Families) -> [Connections; 2] {
        let open = family.gauges("raftexample_http_connections", "Open connections.", &["port"]);
        let limit = family.gauges("raftexample_http_connections_max", "Open connections, at most.", &["port"]);
        let refused = family.counters(
            "raftexample_http_connections_refused_total",
            "Connections turned away because there were too many, or no thread could be had.",
            &["port"],
        );
        ["client", "peer"].map(|port| Connections {
            open: open.with_label_values(&[port]),
            limit: limit.with_label_values(&[port]),
            refused: refused.with_label_values(&[port]),
        })
    }

    /// How many there are now, may be, and were refused since the start.
    pub fn set(&self, open: usize, limit: usize, refused: u64) {
        self.open.set(signed(open));
        self.limit.set(signed(limit));
        catch_up(&self.refused, refused);
    }
}

/// A queue, or something else that waits and has a limit.
pub struct Queue {
    length: IntGauge,
    limit: IntGauge,
}

impl Queue {
    /// How much waits now, and may wait.
    pub fn set(&self, length: usize, limit: usize) {
        self.length.set(signed(length));
        self.limit.set(signed(limit));
    }
}

/// What waits inside the node.
pub struct Queues {
    /// Events for the driver.
    pub driver: Queue,
    /// Batches for the applier.
    pub applier: Queue,
    /// Requests, and turns of the event loops, whose stale reads wait for the applier.
    pub versions: Queue,
    /// Orders for the snapshotter.
    pub snapshotter: Queue,
    /// Writes of clients that were taken here and are not applied yet.
    pub proposals: Queue,
    /// Writes that other nodes have forwarded and that are not proposed yet.
    pub forwarded: Queue,
    /// Linearizable reads whose index is not confirmed or not applied yet.
    pub reads: Queue,
    /// Requests that wait for a change.
    pub watches: Queue,
}

impl Queues {
    fn new(family: &Families) -> Queues {
        let lengths = family.gauges(
            "raftexample_queue_length",
            "What waits in the node: events (driver), batches (applier), stale reads without a version \
             (versions), orders (snapshotter), writes of clients not applied yet (proposals), other nodes' writes not \
             proposed yet (forwarded), linearizable reads (reads), requests for a change (watches).",
            &["queue"],
        );
        let limits =
            family.gauges("raftexample_queue_length_max", "How much may wait in each of these queues.", &["queue"]);
        let queue =
            |name: &str| Queue { length: lengths.with_label_values(&[name]), limit: limits.with_label_values(&[name]) };
        Queues {
            driver: queue("driver"),
            applier: queue("applier"),
            versions: queue("versions"),
            snapshotter: queue("snapshotter"),
            proposals: queue("proposals"),
            forwarded: queue("forwarded"),
            reads: queue("reads"),
            watches: queue("watches"),
        }
    }
}

/// Where a node stands in Raft: what its driver knows, and how far its applier has come.
pub struct Position {
    term: IntGauge,
    is_leader: IntGauge,
    has_leader: IntGauge,
    leader_changes: IntCounter,
    last_index: IntGauge,
    commit_index: IntGauge,
    applied_index: IntGauge,
    apply_lag: IntGauge,
    snapshot_index: IntGauge,
}

impl Position {
    fn new(family: &Families) -> Position {
        Position {
            term: family.gauge("raftexample_term", "Raft's current term."),
            is_leader: family.gauge("raftexample_is_leader", "1 if this node leads, else 0."),
            has_leader: family.gauge("raftexample_has_leader", "1 if this node knows a leader, else 0."),
            leader_changes: family.counter(
                "raftexample_leader_changes_total",
                "How often this node has seen another node lead, the first leader included.",
            ),
            last_index: family.gauge("raftexample_last_index", "The index of the log's last entry."),
            commit_index: family
                .gauge("raftexample_commit_index", "The highest index known to this node to be committed."),
            applied_index: family.gauge("raftexample_applied_index", "The highest index applied."),
            apply_lag: family
                .gauge("raftexample_apply_lag_entries", "Entries known to be committed and not applied yet."),
            snapshot_index: family.gauge("raftexample_snapshot_index", "The index of the newest snapshot."),
        }
    }

    /// What the driver has come to.
    pub fn set(&self, raft: RaftPosition) {
        self.term.set(signed(raft.term));
        self.is_leader.set(i64::from(raft.leads));
        self.has_leader.set(i64::from(raft.has_leader));
        self.last_index.set(signed(raft.last_index));
        self.commit_index.set(signed(raft.commit_index));
        self.snapshot_index.set(signed(raft.snapshot_index));
    }

    /// Another node leads than did before. The same one in a new term is no change.
    pub fn leader_changed(&self) {
        self.leader_changes.inc();
    }

    /// What the applier has applied.
    pub fn set_applied(&self, index: u64) {
        self.applied_index.set(signed(index));
    }

    /// The applier may have come further than the driver had said a moment before.
    fn derive(&self) {
        self.apply_lag.set((self.commit_index.get() - self.applied_index.get()).max(0));
    }
}

/// What a driver says of itself.
#[derive(Clone, Copy, Debug)]
pub struct RaftPosition {
    /// Raft's current term.
    pub term: u64,
    /// Whether this node leads.
    pub leads: bool,
    /// Whether it knows who leads.
    pub has_leader: bool,
    /// The last index of its log.
    pub last_index: u64,
    /// The highest index known to be committed.
    pub commit_index: u64,
    /// The newest snapshot's index.
    pub snapshot_index: u64,
}

/// Rounds that confirm a read index for all reads that were waiting when they began.
pub struct ReadRounds {
    begun: IntCounter,
    lost: IntCounter,
    duration: Histogram,
    reads: Histogram,
}

impl ReadRounds {
    fn new(family: &Families) -> ReadRounds {
        ReadRounds {
            begun: family.counter("raftexample_read_index_rounds_total", "ReadIndex rounds that were begun."),
            lost: family.counter(
                "raftexample_read_index_rounds_lost_total",
                "ReadIndex rounds without an answer in time, or ended by a change of the leader; another one follows.",
            ),
            duration: family.histogram(
                "raftexample_read_index_round_duration_seconds",
                "Time from the beginning of a ReadIndex round to its confirmation by a quorum.",
                STEP_SECONDS,
            ),
            reads: family.histogram(
                "raftexample_read_index_round_reads",
                "Reads that one ReadIndex round has confirmed.",
                BATCH_COUNTS,
            ),
        }
    }

    /// A round was begun.
    pub fn begin(&self) {
        self.begun.inc();
    }

    /// A round was given up.
    pub fn lose(&self) {
        self.lost.inc();
    }

    /// A round that was begun at `began` was confirmed for so many reads.
    pub fn confirm(&self, began: Instant, reads: usize) {
        self.duration.observe(began.elapsed().as_secs_f64());
        self.reads.observe(reads as f64);
    }
}

/// The log's way to the disk.
pub struct LogMetrics {
    write_duration: Histogram,
    write_bytes: Histogram,
    sync_duration: Histogram,
}

impl LogMetrics {
    fn new(family: &Families) -> LogMetrics {
        LogMetrics {
            write_duration: family.histogram(
                "raftexample_log_write_duration_seconds",
                "Time to hand one batch of the log to the operating system.",
                STEP_SECONDS,
            ),
            write_bytes: family.histogram(
                "raftexample_log_write_bytes",
                "Size of one batch of the log, with what it takes to fill whole sectors.",
                WRITE_BYTES,
            ),
            sync_duration: family.histogram(
                "raftexample_log_sync_duration_seconds",
                "Time until the disk has confirmed what was written to the log.",
                STEP_SECONDS,
            ),
        }
    }

    /// So many bytes were written.
    pub fn wrote(&self, bytes: usize, took: Duration) {
        self.write_duration.observe(took.as_secs_f64());
        self.write_bytes.observe(bytes as f64);
    }

    /// What was written is durable.
    pub fn synced(&self, took: Duration) {
        self.sync_duration.observe(took.as_secs_f64());
    }
}

/// Something that is done with a whole snapshot.
pub struct SnapshotMetrics {
    duration: Histogram,
    bytes: Histogram,
    failures: IntCounter,
}

impl SnapshotMetrics {
    /// It went well.
    pub fn done(&self, bytes: u64, took: Duration) {
        self.duration.observe(took.as_secs_f64());
        self.bytes.observe(bytes as f64);
    }

    /// It failed.
    pub fn failed(&self) {
        self.failures.inc();
    }
}

/// What is done with snapshots.
pub struct Snapshots {
    /// Writing one of this node's own state.
    pub write: SnapshotMetrics,
    /// Sending one to a follower.
    pub send: SnapshotMetrics,
    /// Receiving one from the leader, and reading the state that it holds.
    pub receive: SnapshotMetrics,
}

impl Snapshots {
    fn new(family: &Families) -> Snapshots {
        let durations = family.histograms(
            "raftexample_snapshot_duration_seconds",
            "Time to write one snapshot, send it, or receive and read it.",
            &["operation"],
            SNAPSHOT_SECONDS,
        );
        let sizes = family.histograms(
            "raftexample_snapshot_size_bytes",
            "Size of a snapshot's file.",
            &["operation"],
            SNAPSHOT_BYTES,
        );
        let failures = family.counters(
            "raftexample_snapshot_failures_total",
            "Snapshots that could not be written, sent, or received and read.",
            &["operation"],
        );
        let operation = |name: &str| SnapshotMetrics {
            duration: durations.with_label_values(&[name]),
            bytes: sizes.with_label_values(&[name]),
            failures: failures.with_label_values(&[name]),
        };
        Snapshots { write: operation("write"), send: operation("send"), receive: operation("receive") }
    }
}

/// What is stored, and the room for more. Read when the metrics are asked for.
pub struct StoreMetrics {
    keys: IntGauge,
    bytes: IntGauge,
    bytes_max: IntGauge,
    disk_free: IntGauge,
    disk_reserve: IntGauge,
}

impl StoreMetrics {
    fn new(family: &Families) -> StoreMetrics {
        StoreMetrics {
            keys: family.gauge("raftexample_store_keys", "Keys in the store."),
            bytes: family.gauge("raftexample_store_bytes", "Bytes of keys and values in the store."),
            bytes_max: family.gauge("raftexample_store_bytes_max", "Bytes at which a PUT is refused with 507."),
            disk_free: family.gauge("raftexample_disk_free_bytes", "Bytes left on the disk of the data directory."),
            disk_reserve: family.gauge(
                "raftexample_disk_reserve_bytes",
                "Free bytes of the disk below which a PUT is refused with 507.",
            ),
        }
    }

    /// What is stored, and the size at which PUTs are refused.
    pub fn set(&self, keys: u64, bytes: u64, bytes_max: u64) {
        self.keys.set(signed(keys));
        self.bytes.set(signed(bytes));
        self.bytes_max.set(signed(bytes_max));
    }

    /// The bytes that are left on the disk, and must be left for PUTs to be taken.
    pub fn set_disk_free(&self, bytes: u64, reserve: u64) {
        self.disk_free.set(signed(bytes));
        self.disk_reserve.set(signed(reserve));
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicU64, Ordering};
    use std::thread;

    use prometheus::proto::MetricType;

    use super::*;

    #[test]
    fn names_and_help_follow_the_conventions() {
        let metrics = Metrics::new();
        metrics.peers.add(1);
        let families = metrics.registry.gather();
        assert!(families.len() > 50, "{}", families.len());
        for family in families {
            let (name, help, kind) = (family.name(), family.help(), family.get_field_type());
            assert!(name.starts_with("raftexample_") || name.starts_with("process_"), "{name}");
            assert_eq!(name.ends_with("_total"), kind == MetricType::COUNTER, "{name}");
            // Nothing that has another base unit, or repeats its type.
            for wrong in ["_ms", "_millis", "_kb", "_mb", "_counter", "_gauge", "_histogram", "_count", "_sum"] {
                assert!(!name.ends_with(wrong), "{name}");
            }
            let units = ["_seconds", "_bytes", "_entries", "_reads"];
            assert!(kind != MetricType::HISTOGRAM || units.iter().any(|unit| name.ends_with(unit)), "{name}");
            assert!(help.ends_with('.') && !help.contains('\n'), "{name}: {help}");
        }
    }

    #[test]
    fn what_is_read_is_read_once_for_each_scrape_and_totals_do_not_fall() {
        let metrics = Arc::new(Metrics::new());
        let refused = AtomicU64::new(10);
        metrics.read_with(move |metrics| {
            let refused = refused.fetch_add(1, Ordering::Relaxed);
            metrics.client_connections.set(3, 4096, refused);
            // A total that seems to fall is that of another look, a moment before.
            metrics.peer_connections.set(0, 512, refused % 2);
        });
        thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| (0..25).for_each(|_| drop(metrics.text())));
            }
        });
        let text = metrics.text();
        for line in [
            r#"raftexample_http_connections{port="client"} 3"#,
            r#"raftexample_http_connections_max{port="peer"} 512"#,
            r#"raftexample_http_connections_refused_total{port="client"} 110"#,
            r#"raftexample_http_connections_refused_total{port="peer"} 1"#,
        ] {
            assert!(text.lines().any(|found| found == line), "{line} is missing in:\n{text}");
        }
    }

    #[test]
    fn the_lag_is_what_is_committed_and_not_applied() {
        let metrics = Metrics::new();
        let raft = RaftPosition {
            term: 3,
            leads: false,
            has_leader: true,
            last_index: 12,
            commit_index: 10,
            snapshot_index: 2,
        };
        metrics.position.set(raft);
        metrics.position.set_applied(7);
        assert!(metrics.text().contains("\nraftexample_apply_lag_entries 3\n"));
        // The driver of the next turn has not said yet what the applier has done already.
        metrics.position.set_applied(11);
        assert!(metrics.text().contains("\nraftexample_apply_lag_entries 0\n"));
    }

    #[test]
    fn the_process_is_described() {
        let metrics = Metrics::new();
        let text = metrics.text();
        for name in ["cpu_seconds_total", "open_fds", "max_fds", "resident_memory_bytes", "threads"] {
            let start = format!("process_{name} ");
            let value = text.lines().find_map(|line| line.strip_prefix(&start)).expect("it is there");
            let value: f64 = value.parse().unwrap();
            // A process that has just begun may not have used a clock tick.
            assert!(value > 0.0 || name == "cpu_seconds_total" && value == 0.0, "{name} is {value}");
        }
    }
}
