use std::collections::BTreeMap;

use crate::checkout::root;
use crate::exposition::Exposition;
use crate::support::{Cluster, FAST, wait_for};

impl Cluster {
    #[track_caller]
    fn metrics(&self, id: u64) -> Exposition {
        let response = self.client(id).get("/_/metrics");
        assert_eq!(response.status, 200, "{}", response.text());
        assert_eq!(response.header("content-type"), Some("text/plain; version=0.0.4; charset=utf-8"));
        Exposition::parse(&response.text()).unwrap()
    }

    /// The sum of a node's samples of this name that have these labels; 0 if there is none.
    #[track_caller]
    fn metric(&self, id: u64, sample: &str, labels: &[(&str, &str)]) -> f64 {
        self.metrics(id).find(sample, labels).unwrap_or(0.0)
    }

    /// Waits until a node's metric is above a bound.
    #[track_caller]
    fn wait_above(&self, id: u64, sample: &str, labels: &[(&str, &str)], bound: f64) {
        let what = format!("{sample} {labels:?} of node {id} above {bound}");
        wait_for(&what, || (self.metric(id, sample, labels) > bound).then_some(()));
    }
}

/// Type, labels and meaning of a metric, by its name.
type Table = BTreeMap<String, (String, String, String)>;

/// What the README says.
fn written() -> Table {
    let readme = std::fs::read_to_string(root().join("README.md")).unwrap();
    let (_, section) = readme.split_once("\n## Metrics\n").expect("a section of that name");
    let section = section.split("\n## ").next().unwrap();
    let rows = section.lines().filter(|line| line.starts_with("| `"));
    let row = |line: &str| {
        let cells: Vec<&str> = line.trim_matches('|').split('|').map(str::trim).collect();
        let [name, kind, labels, meaning] = cells[..] else { panic!("not four cells: {line}") };
        (name.replace('`', ""), (kind.to_owned(), labels.replace('`', ""), meaning.to_owned()))
    };
    rows.map(row).collect()
}

#[test]
fn the_metrics_are_those_of_the_readme() {
    let cluster = Cluster::start(3, FAST);
    for id in cluster.ids() {
        let Exposition { families } = cluster.metrics(id);
        let row =
            |family: &crate::exposition::Family| (family.kind.clone(), family.labels().join(", "), family.help.clone());
        let given: Table = families.iter().map(|(name, family)| (name.clone(), row(family))).collect();
        let table: Vec<String> = given.iter().map(|(name, row)| as_row(name, row)).collect();
        assert_eq!(written(), given, "left: README, right: node {id}, whose table is\n{}", table.join("\n"));
    }
}

fn as_row(name: &str, (kind, labels, help): &(String, String, String)) -> String {
    let labels: Vec<String> = labels.split(", ").filter(|label| !label.is_empty()).map(|l| format!("`{l}`")).collect();
    format!("| `{name}` | {kind} | {} | {help} |", labels.join(", ")).replace("|  |", "| |")
}

#[test]
fn what_happens_is_counted() {
    const WRITES: usize = 20;
    // With long timeouts: who leads must not change meanwhile.
    let cluster = Cluster::start(3, &["--election-timeout", "3s"]);
    let leader = cluster.leader();
    let follower = cluster.others(leader)[0];
    let leader_label = leader.to_string();
    let before = [cluster.metrics(leader), cluster.metrics(follower)];
    let grown = |id: u64, sample: &str, labels: &[(&str, &str)]| {
        let before = before[usize::from(id == follower)].find(sample, labels).unwrap_or(0.0);
        cluster.metric(id, sample, labels) - before
    };
    let mut client = cluster.client(follower);
    for write in 0..WRITES {
        assert_eq!(client.put(&format!("/k{write}"), &[0; 1000]).status, 204);
        assert_eq!(client.get(&format!("/k{write}")).status, 200);
    }
    let count = WRITES as f64;
    let put = &[("method", "PUT"), ("status", "204"), ("consistency", "none")];
    let get = &[("method", "GET"), ("status", "200"), ("consistency", "linearizable")];
    assert_eq!(grown(follower, "raftexample_http_requests_total", put), count);
    assert_eq!(grown(follower, "raftexample_http_requests_total", get), count);
    assert_eq!(grown(follower, "raftexample_http_request_duration_seconds_count", &[("method", "PUT")]), count);
    assert!(grown(follower, "raftexample_forward_batch_entries_sum", &[]) >= count);
    assert_eq!(grown(follower, "raftexample_proposal_batch_entries_sum", &[]), 0.0);
    assert!(grown(leader, "raftexample_proposal_batch_entries_sum", &[]) >= count);
    assert!(grown(follower, "raftexample_read_index_rounds_total", &[]) >= count);
    assert!(grown(follower, "raftexample_read_index_round_reads_sum", &[]) >= count);
    assert!(grown(follower, "raftexample_read_index_round_duration_seconds_count", &[]) >= count);
    assert!(grown(follower, "raftexample_apply_duration_seconds_count", &[]) >= count);
    for id in [leader, follower] {
        assert!(grown(id, "raftexample_log_write_duration_seconds_count", &[]) >= count);
        assert!(grown(id, "raftexample_log_sync_duration_seconds_count", &[]) >= count);
        assert!(grown(id, "raftexample_log_write_bytes_sum", &[]) >= count * 1000.0);
        assert!(grown(id, "raftexample_store_bytes", &[]) >= count * 1000.0);
        assert_eq!(grown(id, "raftexample_store_keys", &[]), count);
        assert!(grown(id, "raftexample_applied_index", &[]) >= count);
        assert!(grown(id, "raftexample_commit_index", &[]) >= count);
        assert!(grown(id, "process_cpu_seconds_total", &[]) >= 0.0);
        let after = cluster.metrics(id);
        assert_eq!(after.value("raftexample_is_leader", &[]), f64::from(u8::from(id == leader)));
        assert_eq!(after.value("raftexample_has_leader", &[]), 1.0);
        assert!(after.value("raftexample_http_connections", &[("port", "client")]) >= 1.0);
        assert!(after.value("raftexample_http_connections", &[("port", "peer")]) >= 2.0);
        assert!(after.value("raftexample_queue_length_max", &[("queue", "proposals")]) > 1000.0);
        assert!(after.value("raftexample_disk_free_bytes", &[]) > 0.0);
        assert!(after.value("process_resident_memory_bytes", &[]) > 1e6);
        assert!(after.value("process_open_fds", &[]) > 5.0);
    }
    for sample in ["raftexample_peer_messages_sent_total", "raftexample_peer_messages_received_total"] {
        assert!(grown(follower, sample, &[("peer", &leader_label)]) >= count, "{sample}");
    }
    // Streams end once a second, and then the peer answers.
    cluster.wait_above(follower, "raftexample_peer_round_trip_seconds_count", &[("peer", &leader_label)], 0.0);
    // On both lanes.
    cluster.wait_above(follower, "raftexample_peer_connected", &[("peer", &leader_label)], 1.0);
}

#[test]
fn leader_changes_and_losses_are_counted_by_every_node() {
    let mut cluster = Cluster::start(3, FAST);
    let leader = cluster.leader();
    let next = cluster.others(leader)[0];
    let changes = "raftexample_leader_changes_total";
    let before: BTreeMap<u64, f64> =
        cluster.ids().into_iter().map(|id| (id, cluster.metric(id, changes, &[]))).collect();
    assert!(before.values().all(|count| *count >= 1.0), "the first leader counts: {before:?}");
    let response = cluster.client(leader).must("PUT", "/_/leader", next.to_string().as_bytes());
    assert_eq!(response.status, 204, "{}", response.text());
    for (id, before) in &before {
        cluster.wait_above(*id, changes, &[], *before);
    }
    cluster.wait_above(next, "raftexample_is_leader", &[], 0.0);
    // Nobody leads any more, and the one that is left says so without asking anybody.
    for id in cluster.others(leader) {
        cluster.kill(id);
    }
    wait_for("a node without a leader", || {
        (cluster.metric(leader, "raftexample_has_leader", &[]) == 0.0).then_some(())
    });
    let to_next: &[_] = &[("peer", &*next.to_string())];
    wait_for("lost connections", || {
        (cluster.metric(leader, "raftexample_peer_connected", to_next) == 0.0).then_some(())
    });
    cluster.wait_above(leader, "raftexample_peer_messages_dropped_total", to_next, 0.0);
}

#[test]
fn snapshots_are_counted_and_the_series_of_a_member_go_with_it() {
    let mut cluster = Cluster::start(3, FAST);
    let mut client = cluster.client(1);
    assert_eq!(client.put("/k", b"value").status, 204);
    let operation = |name| [("operation", name)];
    assert_eq!(cluster.metric(1, "raftexample_snapshot_size_bytes_count", &operation("write")), 0.0);
    let snapshot = client.must("POST", "/_/snapshot", b"");
    assert_eq!(snapshot.status, 200, "{}", snapshot.text());
    let after = cluster.metrics(1);
    assert_eq!(after.value("raftexample_snapshot_duration_seconds_count", &operation("write")), 1.0);
    let size = snapshot.json()["size"].as_f64().expect("a size");
    assert_eq!(after.value("raftexample_snapshot_size_bytes_sum", &operation("write")), size);
    cluster.wait_above(1, "raftexample_snapshot_index", &[], 1.0);

    // Whoever joins is sent a snapshot, whatever the leader's log holds.
    cluster.prepare_joiner(4);
    cluster.spawn(4);
    let url = cluster.peer_url(4).to_owned();
    let added = client.must("PUT", "/_/members/4", url.as_bytes());
    assert_eq!(added.status, 204, "{}", added.text());
    cluster.wait_ready(4);
    cluster.wait_above(4, "raftexample_snapshot_duration_seconds_count", &operation("receive"), 0.0);
    assert!(cluster.metric(4, "raftexample_snapshot_size_bytes_sum", &operation("receive")) > 0.0);
    let sent = |id| cluster.metric(id, "raftexample_snapshot_size_bytes_sum", &operation("send"));
    assert!([1, 2, 3].map(sent).iter().sum::<f64>() > 0.0);
    for id in [1, 2, 3] {
        wait_for("series of the new member", || cluster.metrics(id).has_label("peer", "4").then_some(()));
    }
    let removed = client.must("DELETE", "/_/members/4", b"");
    assert_eq!(removed.status, 204, "{}", removed.text());
    for id in [1, 2, 3] {
        wait_for("the end of its series", || (!cluster.metrics(id).has_label("peer", "4")).then_some(()));
    }
    assert!(cluster.metrics(1).has_label("peer", "3"));
    assert_eq!(cluster.wait_end(4).code(), Some(0));
}
