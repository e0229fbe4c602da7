use crate::load::Load;
use crate::shim::{Fault, Shim};
use crate::support::{Cluster, FAST, wait_for};

const WRITERS: usize = 4;

#[test]
fn the_others_go_on_when_one_disk_fails() {
    let Some(shim) = Shim::build() else { return };
    let mut cluster = Cluster::start(3, FAST);
    let load = Load::start(&cluster, WRITERS);
    let of_log = |call: &str, kind| Fault { call: call.to_owned(), file: "#.log".to_owned(), nth: 30, kind };
    // The sync that fails loses what was written; then a full disk; then half of a write.
    for (leads, fault) in [
        (true, of_log("fdatasync", "lost")),
        (false, of_log("fdatasync", "lost")),
        (true, of_log("pwrite", "28")),
        (false, of_log("pwrite", "torn")),
    ] {
        let leader = cluster.leader();
        let id = if leads { leader } else { cluster.others(leader)[0] };
        cluster.kill(id);
        let trace = cluster.data_dir(id).with_extension("trace");
        let variables = shim.variables(cluster.data_dir(id), &trace, Some(&fault));
        let variables: Vec<(&str, &str)> =
            variables.iter().map(|(name, value)| (name.as_str(), value.as_str())).collect();
        cluster.spawn_with(id, &variables);
        assert_eq!(cluster.wait_end(id).code(), Some(1), "{fault:?}");
        let log = cluster.log(id);
        let words = log.lines().last().unwrap_or_default();
        assert!(words.starts_with("raftexample: failed to ") && words.contains(".log'"), "{fault:?}: {words}");
        load.wait_for_writes(50);
        cluster.restart(id);
        cluster.wait_caught_up(id);
        load.wait_for_writes(50);
    }
    let written = load.stop();
    for id in cluster.ids() {
        cluster.wait_caught_up(id);
    }
    written.verify(&cluster);
}

#[test]
fn a_damaged_list_of_peers_is_refused() {
    let mut cluster = Cluster::start(3, FAST);
    let id = cluster.others(cluster.leader())[0];
    wait_for("a list of peers", || cluster.data_dir(id).join("peers").exists().then_some(()));
    cluster.kill(id);
    let file = cluster.data_dir(id).join("peers");
    let whole = std::fs::read(&file).unwrap();
    let mut damages: Vec<(String, Vec<u8>)> = Vec::new();
    for at in (0..whole.len()).step_by(5) {
        let mut bytes = whole.clone();
        bytes[at] ^= 1 << (at % 8);
        damages.push((format!("bit {} of byte {at}", at % 8), bytes));
    }
    for len in [0, 3, 4, 5, whole.len() / 2, whole.len() - 1] {
        damages.push((format!("cut to {len}"), whole[..len].to_vec()));
    }
    for (what, bytes) in damages {
        std::fs::write(&file, &bytes).unwrap();
        cluster.spawn(id);
        assert_eq!(cluster.wait_end(id).code(), Some(1), "{what}");
        let log = cluster.log(id);
        let words = log.lines().last().unwrap_or_default();
        assert!(words.starts_with("raftexample: ") && words.contains("peers"), "{what}: {words}");
    }
    std::fs::write(&file, &whole).unwrap();
    cluster.restart(id);
    cluster.wait_caught_up(id);
}
