use std::net::TcpListener;
use std::process::{Command, Stdio};

use crate::checkout::Checkout;
use crate::support::{Process, exclusive};

#[track_caller]
fn assert_make(checkout: &Checkout, target: &str, status: i32, words: &[&str]) -> String {
    let (code, output) = checkout.run(&mut checkout.command(&format!("make {target}")));
    assert_eq!(code, Some(status), "make {target}: {output}");
    for word in words {
        assert!(output.contains(word), "{word:?} is missing in what make {target} printed: {output}");
    }
    output
}

#[test]
fn help_names_all_targets() {
    let checkout = Checkout::new();
    let targets = [
        "build",
        "cluster",
        "kill-N",
        "stop-N",
        "restart-N",
        "add-4",
        "remove-4",
        "status",
        "logs",
        "stop",
        "clean",
        "bench",
        "bench-etcd",
        "bench-drift",
        "bench-parts",
        "test",
        "sim",
        "breakage",
        "torture",
        "fuzz",
        "fuzz-corpus",
        "check",
    ];
    let lines = targets.map(|target| format!("make {target} "));
    let lines: Vec<&str> = lines.iter().map(String::as_str).collect();
    assert_make(&checkout, "", 0, &lines);
    assert_make(&checkout, "help", 0, &lines);
}

#[test]
fn a_second_make_cluster_starts_only_what_is_down() {
    let _exclusive = exclusive();
    let checkout = Checkout::new();
    assert_make(&checkout, "cluster", 0, &["node 1 started", "node 2 started", "node 3 started"]);
    assert_make(&checkout, "cluster", 0, &["node 1 runs already", "node 2 runs already", "node 3 runs already"]);
    assert_make(&checkout, "stop-2", 0, &["node 2 ended by SIGTERM"]);
    assert_make(&checkout, "stop-2", 0, &["node 2 does not run"]);
    assert_make(&checkout, "cluster", 0, &["node 1 runs already", "node 2 started", "node 3 runs already"]);
    assert_make(&checkout, "restart-1", 0, &["node 1 ended by SIGTERM", "node 1 started", "caught up"]);
    assert_make(&checkout, "logs", 0, &["node-1.log", "node-2.log", "node-3.log"]);
    assert_make(&checkout, "stop", 0, &["node 1 ended", "node 2 ended", "node 3 ended"]);
    assert_make(&checkout, "status", 0, &["down"]);
    assert!(checkout.cluster_file("node-1").is_dir(), "stopping deletes nothing");
    assert_make(&checkout, "clean", 0, &["no node runs"]);
    assert!(!checkout.cluster_file("").exists());
}

#[test]
fn a_node_that_does_not_come_up_shows_its_log() {
    let _exclusive = exclusive();
    let checkout = Checkout::new();
    let mut command = checkout.command("make cluster");
    let (code, output) = checkout.run(command.env("NODE_BINARY", checkout.path().join("nothing-there")));
    assert_ne!(code, Some(0), "{output}");
    assert!(output.contains("node 1 has ended") && output.contains("No such file"), "{output}");
}

#[test]
fn a_port_of_another_program_is_named() {
    let checkout = Checkout::new();
    let port = &checkout.ports[0].1;
    let _taken = TcpListener::bind(format!("127.0.0.1:{port}")).unwrap();
    assert_make(&checkout, "cluster", 2, &["another program", port]);
}

#[test]
fn a_process_that_got_the_number_of_a_node_is_left_alone() {
    let checkout = Checkout::new();
    std::fs::create_dir(checkout.cluster_file("")).unwrap();
    let mut sleep = Command::new("sleep");
    let log = checkout.path().join("sleep.log");
    let mut bystander = Process::spawn(sleep.arg("600").stdin(Stdio::null()), &log);
    std::fs::write(checkout.cluster_file("node-2.pid"), bystander.id().to_string()).unwrap();
    for target in ["kill-2", "stop-2"] {
        assert_make(&checkout, target, 0, &["node 2 does not run"]);
    }
    for target in ["stop", "clean"] {
        assert_make(&checkout, target, 0, &["no node runs"]);
    }
    assert_eq!(bystander.exit_status(), None, "it was ended");
}

#[test]
fn a_fourth_node_comes_and_goes() {
    let _exclusive = exclusive();
    let checkout = Checkout::new();
    assert_make(&checkout, "add-4", 2, &["no node of the cluster is ready"]);
    assert_make(&checkout, "restart-4", 2, &["make add-4"]);
    assert_make(&checkout, "cluster", 0, &["all three are ready"]);
    assert_make(&checkout, "add-4", 0, &["node 4 started", "node 4 is a voter"]);
    assert_make(&checkout, "add-4", 0, &["node 4 runs already", "node 4 is a voter"]);
    assert_make(&checkout, "kill-4", 0, &["node 4 ended by SIGKILL"]);
    assert_make(&checkout, "restart-4", 0, &["node 4 started", "caught up"]);
    assert_make(&checkout, "remove-4", 0, &["node 4 ended by its removal"]);
    let status = assert_make(&checkout, "status", 0, &["leader"]);
    assert_eq!(status.lines().count(), 4, "a header and three nodes: {status}");
    assert_make(&checkout, "add-4", 2, &["never used again"]);
}
