//! Other nodes, one by one: what went to them, what came from them, what was dropped or refused, and why.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use prometheus::{Histogram, HistogramVec, IntCounter, IntCounterVec, IntGauge, IntGaugeVec};

use super::{Families, STEP_SECONDS, signed};
use crate::membership::NodeId;
use crate::message_check::Offence;
use crate::peer_protocol::Lane;

/// The label of all who are no peers of this node: whoever reaches the port can claim any id.
const OTHERS: &str = "other";

/// A message of a stream that is not between the two who said hello.
const MISROUTED: &str = "misrouted";
/// A frame that makes no sense, which ends its stream.
const MALFORMED_FRAME: &str = "malformed-frame";
/// A message of a kind that a newer node sends and this one skips.
const UNKNOWN_KIND: &str = "unknown-kind";

/// What a peer asks for.
const REQUESTS: [&str; 2] = ["hello", "snapshot"];

/// Why a message for a peer did not get there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DropCause {
    /// Its lane's queue was full.
    QueueFull,
    /// It was beyond a limit of the protocol.
    TooLarge,
    /// It waited too long for a connection.
    Stale,
    /// The connection broke while it was being written.
    Broken,
    /// Its lane has ended.
    Ended,
}

/// The labels of [`DropCause`].
const DROP_CAUSES: [&str; 5] = ["queue-full", "too-large", "stale", "broken", "ended"];

/// One lane to a peer.
#[derive(Debug)]
pub struct LaneMetrics {
    messages: IntGauge,
    bytes: IntGauge,
    messages_max: IntGauge,
    bytes_max: IntGauge,
    connected: IntGauge,
}

impl LaneMetrics {
    /// How much may wait in this lane, to any peer.
    pub fn set_limits(&self, messages: usize, bytes: usize) {
        self.messages_max.set(signed(messages));
        self.bytes_max.set(signed(bytes));
    }

    /// A message of so many bytes is waiting from now on.
    pub fn queued(&self, bytes: usize) {
        self.messages.inc();
        self.bytes.add(signed(bytes));
    }

    /// A message of so many bytes waits no more.
    pub fn taken(&self, bytes: usize) {
        self.messages.dec();
        self.bytes.sub(signed(bytes));
    }

    /// Whether there is a connection over which messages go.
    pub fn set_connected(&self, connected: bool) {
        self.connected.set(i64::from(connected));
    }
}

/// What goes to one peer.
#[derive(Debug)]
pub struct Sent {
    sent: IntCounter,
    sent_bytes: IntCounter,
    dropped: [IntCounter; DROP_CAUSES.len()],
    round_trip: Histogram,
    lanes: [LaneMetrics; Lane::ALL.len()],
}

impl Sent {
    /// So many messages, of so many bytes together, were handed to a connection.
    pub fn sent(&self, messages: u64, bytes: u64) {
        self.sent.inc_by(messages);
        self.sent_bytes.inc_by(bytes);
    }

    /// So many messages were dropped.
    pub fn dropped(&self, messages: u64, cause: DropCause) {
        self.dropped[cause as usize].inc_by(messages);
    }

    /// The peer has answered so long after the last byte that was for it.
    pub fn round_trip(&self, took: Duration) {
        self.round_trip.observe(took.as_secs_f64());
    }

    /// One of its lanes.
    pub fn lane(&self, lane: Lane) -> &LaneMetrics {
        &self.lanes[lane as usize]
    }
}

/// What comes from one peer, or from all who are none.
#[derive(Debug)]
pub struct Received {
    received: IntCounter,
    refused: BTreeMap<&'static str, IntCounter>,
    requests_refused: BTreeMap<&'static str, IntCounter>,
}

impl Received {
    /// So many messages have come in and were handed to the driver.
    pub fn received(&self, messages: u64) {
        self.received.inc_by(messages);
    }

    /// The driver has refused a message.
    pub fn offended(&self, offence: &Offence) {
        self.refuse(offence.kind(), 1);
    }

    /// A stream was ended for a message that is not between the two who said hello.
    pub fn misrouted(&self) {
        self.refuse(MISROUTED, 1);
    }

    /// A stream was ended for a frame that makes no sense.
    pub fn malformed(&self) {
        self.refuse(MALFORMED_FRAME, 1);
    }

    /// So many messages of unknown kinds were skipped.
    pub fn skipped(&self, messages: u64) {
        self.refuse(UNKNOWN_KIND, messages);
    }

    fn refuse(&self, cause: &'static str, messages: u64) {
        self.refused[cause].inc_by(messages);
    }

    /// A hello was refused, alone or at the head of something else.
    pub fn hello_refused(&self) {
        self.requests_refused["hello"].inc();
    }

    /// A snapshot was refused, before it was sent or behind it.
    pub fn snapshot_refused(&self) {
        self.requests_refused["snapshot"].inc();
    }
}

/// Both directions of one peer.
struct Peer {
    sent: Arc<Sent>,
    received: Arc<Received>,
}

/// The metrics of all peers. A peer has series from [`Peers::add`] to [`Peers::retain`]; everybody else shares those of
/// the label `other`.
pub struct Peers {
    sent: IntCounterVec,
    sent_bytes: IntCounterVec,
    dropped: IntCounterVec,
    received: IntCounterVec,
    refused: IntCounterVec,
    requests_refused: IntCounterVec,
    round_trip: HistogramVec,
    connected: IntGaugeVec,
    queue_messages: IntGaugeVec,
    queue_bytes: IntGaugeVec,
    queue_messages_max: IntGaugeVec,
    queue_bytes_max: IntGaugeVec,
    known: Mutex<BTreeMap<NodeId, Peer>>,
    others: Arc<Received>,
}

impl Peers {
    pub(super) fn new(family: &Families) -> Peers {
        let counters = |name, help, labels| family.counters(name, help, labels);
        let gauges = |name, help, labels| family.gauges(name, help, labels);
        let received = counters(
            "raftexample_peer_messages_received_total",
            "Messages of a peer that were handed to the driver.",
            &["peer"],
        );
        let refused = counters(
            "raftexample_peer_messages_refused_total",
            "Messages of a peer that were not taken for what they say, where they come from, or when.",
            &["peer", "cause"],
        );
        let requests_refused = counters(
            "raftexample_peer_requests_refused_total",
            "Hellos and snapshots of a peer that were refused.",
            &["peer", "request"],
        );
        let others = Arc::new(receive_from(OTHERS, &received, &refused, &requests_refused));
        Peers {
            sent: counters(
                "raftexample_peer_messages_sent_total",
                "Messages for a peer that were handed to a connection.",
                &["peer"],
            ),
            sent_bytes: counters(
                "raftexample_peer_sent_bytes_total",
                "Bytes of the messages sent to a peer.",
                &["peer"],
            ),
            dropped: counters(
                "raftexample_peer_messages_dropped_total",
                "Messages for a peer that surely did not get there; Raft sends again what still matters.",
                &["peer", "cause"],
            ),
            received,
            refused,
            requests_refused,
            round_trip: family.histograms(
                "raftexample_peer_round_trip_seconds",
                "Time from the last byte of a stream of small messages to the peer's answer, once a second.",
                &["peer"],
                STEP_SECONDS,
            ),
            connected: gauges(
                "raftexample_peer_connected",
                "1 if messages go to this peer, else 0.",
                &["peer", "lane"],
            ),
            queue_messages: gauges(
                "raftexample_peer_queue_messages",
                "Messages that wait for a peer.",
                &["peer", "lane"],
            ),
            queue_bytes: gauges(
                "raftexample_peer_queue_bytes",
                "Bytes of the messages that wait for a peer.",
                &["peer", "lane"],
            ),
            queue_messages_max: gauges(
                "raftexample_peer_queue_messages_max",
                "How many messages may wait for one peer.",
                &["lane"],
            ),
            queue_bytes_max: gauges(
                "raftexample_peer_queue_bytes_max",
                "How many bytes of messages may wait for one peer.",
                &["lane"],
            ),
            known: Mutex::default(),
            others,
        }
    }

    /// The metrics of what goes to a peer, whose series there are from now on.
    pub fn add(&self, id: NodeId) -> Arc<Sent> {
        let mut known = self.lock();
        let peer = known.entry(id).or_insert_with(|| {
            let label = id.to_string();
            let received = receive_from(&label, &self.received, &self.refused, &self.requests_refused);
            Peer { sent: Arc::new(self.send_to(&label)), received: Arc::new(received) }
        });
        peer.sent.clone()
    }

    /// The metrics of what comes from a node.
    pub fn received(&self, id: NodeId) -> Arc<Received> {
        self.lock().get(&id).map_or(&self.others, |peer| &peer.received).clone()
    }

    /// Ends the series of all peers but these.
    pub fn retain(&self, keep: impl Fn(NodeId) -> bool) {
        let mut known = self.lock();
        for (id, _) in known.extract_if(.., |id, _| !keep(*id)) {
            self.remove(&id.to_string());
        }
    }

    fn send_to(&self, peer: &str) -> Sent {
        let lane = |lane: Lane| LaneMetrics {
            messages: self.queue_messages.with_label_values(&[peer, lane.name()]),
            bytes: self.queue_bytes.with_label_values(&[peer, lane.name()]),
            messages_max: self.queue_messages_max.with_label_values(&[lane.name()]),
            bytes_max: self.queue_bytes_max.with_label_values(&[lane.name()]),
            connected: self.connected.with_label_values(&[peer, lane.name()]),
        };
        Sent {
            sent: self.sent.with_label_values(&[peer]),
            sent_bytes: self.sent_bytes.with_label_values(&[peer]),
            dropped: DROP_CAUSES.map(|cause| self.dropped.with_label_values(&[peer, cause])),
            round_trip: self.round_trip.with_label_values(&[peer]),
            lanes: Lane::ALL.map(lane),
        }
    }

    fn remove(&self, peer: &str) {
        // Fails for what is gone already.
        let _ = self.sent.remove_label_values(&[peer]);
        let _ = self.sent_bytes.remove_label_values(&[peer]);
        let _ = self.received.remove_label_values(&[peer]);
        let _ = self.round_trip.remove_label_values(&[peer]);
        for cause in DROP_CAUSES {
            let _ = self.dropped.remove_label_values(&[peer, cause]);
        }
        for cause in refusal_causes() {
            let _ = self.refused.remove_label_values(&[peer, cause]);
        }
        for request in REQUESTS {
            let _ = self.requests_refused.remove_label_values(&[peer, request]);
        }
        for lane in Lane::ALL {
            for gauges in [&self.queue_messages, &self.queue_bytes, &self.connected] {
                let _ = gauges.remove_label_values(&[peer, lane.name()]);
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<NodeId, Peer>> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Why a message may be refused.
fn refusal_causes() -> impl Iterator<Item = &'static str> {
    Offence::KINDS.into_iter().chain([MISROUTED, MALFORMED_FRAME, UNKNOWN_KIND])
}

fn receive_from(
    peer: &str,
    received: &IntCounterVec,
    refused: &IntCounterVec,
    requests_refused: &IntCounterVec,
) -> Received {
    let of = |family: &IntCounterVec, label| (label, family.with_label_values(&[peer, label]));
    Received {
        received: received.with_label_values(&[peer]),
        refused: refusal_causes().map(|cause| of(refused, cause)).collect(),
        requests_refused: REQUESTS.into_iter().map(|request| of(requests_refused, request)).collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::metrics::Metrics;

    #[test]
    fn a_peer_has_series_as_long_as_it_is_one() {
        let metrics = Metrics::new();
        let peer = |text: &str| text.lines().filter(|line| line.contains(r#"peer="7""#)).count();
        metrics.peers.received(7).received(3);
        assert_eq!(peer(&metrics.text()), 0);
        let sent = metrics.peers.add(7);
        metrics.peers.add(8);
        metrics.peers.received(7).received(5);
        sent.dropped(2, DropCause::Stale);
        sent.lane(Lane::Bulk).queued(100);
        let text = metrics.text();
        for line in [
            r#"raftexample_peer_messages_received_total{peer="other"} 3"#,
            r#"raftexample_peer_messages_received_total{peer="7"} 5"#,
            r#"raftexample_peer_messages_dropped_total{cause="stale",peer="7"} 2"#,
            r#"raftexample_peer_queue_bytes{lane="bulk",peer="7"} 100"#,
            r#"raftexample_peer_messages_refused_total{cause="too-early",peer="7"} 0"#,
        ] {
            assert!(text.lines().any(|found| found == line), "{line} is missing in:\n{text}");
        }
        metrics.peers.retain(|id| id == 8);
        // Whoever still counts does no harm.
        sent.sent(1, 10);
        let text = metrics.text();
        assert_eq!(peer(&text), 0, "{text}");
        assert!(text.contains(r#"peer="8""#));
        metrics.peers.add(7);
        assert!(metrics.text().contains(r#"raftexample_peer_messages_received_total{peer="7"} 0"#));
    }

    #[test]
    fn every_offence_has_its_counter() {
        let metrics = Metrics::new();
        let offences = [
            Offence::To(1),
            Offence::From(1),
            Offence::Removed(1),
            Offence::Stranger(1),
            Offence::Type(Default::default()),
            Offence::UnknownFields,
            Offence::Term(0),
            Offence::Malformed(""),
            Offence::SecondLeader { term: 1, known: 1, other: 2 },
            Offence::ContradictsCommitted { index: 1, ours: 1, theirs: 2 },
            Offence::BeyondLog { index: 2, last_index: 1 },
            Offence::TooEarly,
            Offence::CommitBeyondLog { from: 1, commit: 2, last_index: 1 },
            Offence::LostLog { from: 1, commit: 2, last_index: 1 },
        ];
        let received = metrics.peers.received(1);
        offences.iter().for_each(|offence| received.offended(offence));
        received.misrouted();
        received.malformed();
        received.skipped(1);
        assert_eq!(refusal_causes().count(), offences.len() + 3);
        let text = metrics.text();
        let counted = |line: &&str| line.starts_with("raftexample_peer_messages_refused_total") && line.ends_with(" 1");
        assert_eq!(text.lines().filter(counted).count(), refusal_causes().count(), "{text}");
    }
}
