use std::net::{Ipv4Addr, TcpListener};
use std::path::Path;
use std::process::{Command, Output};

use rustix::process::Signal;
use tempfile::TempDir;

use crate::support::{Cluster, FAST, Process, exclusive, free_port, program, read_text, wait_for};

/// Runs a command that has to end by itself.
#[track_caller]
fn run(command: &mut Command, directory: &Path) -> (Option<i32>, String) {
    let log = directory.join("output");
    let mut process = Process::spawn(command.current_dir(directory), &log);
    let status = process.wait();
    let text = read_text(&log);
    std::fs::remove_file(&log).unwrap();
    (status.code(), text)
}

/// Asserts that a command ends with `status` and one line that has all of `words`.
#[track_caller]
fn assert_ends(command: &mut Command, status: i32, words: &[&str]) {
    let directory = TempDir::new().unwrap();
    // Without the log, all that is left is what the program has to say at its end.
    let (code, text) = run(command.env("RUST_LOG", "off"), directory.path());
    assert_eq!(code, Some(status), "{text}");
    assert!(text.starts_with("raftexample: ") && text.ends_with('\n') && text.lines().count() == 1, "{text:?}");
    for word in words {
        assert!(text.contains(word), "{word:?} is missing in: {text}");
    }
}

/// A node of its own, with ports that are free.
fn single_node(data_dir: &Path) -> Command {
    let mut command = program();
    command.args(["--cluster", &format!("http://127.0.0.1:{}", free_port()), "--port", &free_port().to_string()]);
    command.arg("--data-dir").arg(data_dir);
    command
}

#[test]
fn a_program_that_is_used_has_no_fail_points() {
    let program = std::fs::read(env!("CARGO_BIN_EXE_raftexample")).unwrap();
    assert!(!program.windows(10).any(|bytes| bytes == b"FAILPOINTS"), "it was built with the feature failpoints");
    let mut cluster = Cluster::launch(1, FAST);
    cluster.kill(1);
    cluster.spawn_with(1, &[("FAILPOINTS", "boot-before=return;driver-events-taken=return")]);
    cluster.wait_ready(1);
}

#[test]
fn a_bad_command_line_is_one_line_and_status_2() {
    let members = "http://127.0.0.1:9021,http://127.0.0.1:9022";
    let cases: &[(&[&str], &[&str])] = &[
        (&["--id", "0"], &["--id", "from 1"]),
        (&["--id", "one"], &["--id", "'one'"]),
        (&["--id", "3", "--cluster", members], &["--id", "--cluster"]),
        (&["--cluster", "127.0.0.1:9021"], &["--cluster", "http://"]),
        (&["--cluster", "http://127.0.0.1"], &["--cluster", "port"]),
        (&["--cluster", "https://127.0.0.1:9021"], &["--cluster", "http"]),
        (&["--cluster", "http://a:1,http://a:1"], &["--cluster", "already"]),
        (&["--cluster", "1=http://a:1,1=http://b:1"], &["--cluster", "already"]),
        (&["--port", "70000"], &["--port", "65535"]),
        (&["--port", "9021"], &["--port", "127.0.0.1:9021"]),
        (&["--peer-listen", "nowhere"], &["--peer-listen", "host:port"]),
        (&["--election-timeout", "499ms"], &["--election-timeout", "500ms"]),
        (&["--heartbeat-interval", "0s"], &["--heartbeat-interval"]),
        (&["--request-timeout", "5"], &["--request-timeout", "5s"]),
        (&["--snapshot-count", "0"], &["--snapshot-count", "from 1"]),
        (&["--max-value-bytes", "17MiB"], &["--max-value-bytes", "16777216"]),
        (&["--max-key-bytes", "65537"], &["--max-key-bytes", "65536"]),
        (&["--max-store-bytes", "0"], &["--max-store-bytes"]),
        (&["--prot", "1"], &["--prot", "--port", "--help"]),
        (&["--port"], &["--port", "--help"]),
        (&["extra"], &["extra", "--help"]),
    ];
    for (flags, words) in cases {
        assert_ends(program().args(*flags), 2, words);
    }
}

#[test]
fn a_flag_wins_over_the_environment() {
    assert_ends(program().env("RAFTEXAMPLE_ID", "seven"), 2, &["--id", "'seven'"]);
    assert_ends(program().env("RAFTEXAMPLE_ID", "seven").args(["--id", "eight"]), 2, &["--id", "'eight'"]);
    assert_ends(program().env("RAFTEXAMPLE_REQUEST_TIMEOUT", "0s"), 2, &["--request-timeout"]);
    assert_ends(program().env("RAFTEXAMPLE_JOIN", "perhaps"), 2, &["--join", "'perhaps'"]);
}

#[test]
fn help_and_version_go_to_standard_output() {
    for (flag, words) in [
        ("--help", &["--cluster", "RAFTEXAMPLE_CLUSTER", "RUST_LOG"][..]),
        ("-h", &["--cluster"]),
        ("--version", &[concat!("raftexample ", env!("CARGO_PKG_VERSION"))]),
    ] {
        let Output { status, stdout, stderr } = program().arg(flag).output().unwrap();
        let text = String::from_utf8(stdout).unwrap();
        assert_eq!((status.code(), stderr.as_slice()), (Some(0), &b""[..]), "{flag}");
        assert!(words.iter().all(|word| text.contains(word)), "{text}");
    }
}

#[test]
fn a_port_in_use_is_named() {
    let _exclusive = exclusive();
    let directory = TempDir::new().unwrap();
    let data_dir = directory.path().join("data");
    let taken = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let address = taken.local_addr().unwrap().to_string();
    let port = taken.local_addr().unwrap().port().to_string();
    let url = format!("http://{address}");
    let own = free_port().to_string();

    let client_port = ["--cluster", &format!("http://127.0.0.1:{own}"), "--port", &port];
    assert_ends(program().args(client_port).arg("--data-dir").arg(&data_dir), 1, &[&address, "--port"]);
    let peer_port = ["--cluster", &url, "--port", &own];
    assert_ends(program().args(peer_port).arg("--data-dir").arg(&data_dir), 1, &[&address, "--peer-listen"]);
}

#[test]
fn a_directory_that_cannot_be_used_is_named() {
    let _exclusive = exclusive();
    let directory = TempDir::new().unwrap();
    let file = directory.path().join("file");
    std::fs::write(&file, "no directory").unwrap();
    assert_ends(&mut single_node(&file), 1, &[&file.display().to_string()]);
    // Nobody can make one there, not even root.
    assert_ends(&mut single_node(Path::new("/proc/none/data")), 1, &["/proc/none/data"]);
}

#[test]
fn a_second_start_says_that_one_runs() {
    let cluster = Cluster::start(1, FAST);
    let data_dir = cluster.data_dir(1).display().to_string();
    assert_ends(&mut cluster.command(1), 1, &[&data_dir]);
    // It is the directory that counts, not the ports.
    let (port, peer_listen) = (free_port().to_string(), format!("127.0.0.1:{}", free_port()));
    let mut elsewhere = program();
    elsewhere.args(["--cluster", cluster.peer_list(), "--port", &port, "--peer-listen", &peer_listen]);
    assert_ends(elsewhere.arg("--data-dir").arg(&data_dir), 1, &[&data_dir]);
    assert_eq!(cluster.client(1).put("/key", b"value").status, 204, "the first one does not mind");
}

#[test]
fn a_directory_of_another_node_is_refused() {
    let mut cluster = Cluster::start(3, FAST);
    cluster.kill_all();
    let node_1 = cluster.data_dir(1).to_owned();
    let node_2 = cluster.data_dir(2).to_owned();
    std::fs::remove_dir_all(&node_2).unwrap();
    std::fs::rename(&node_1, &node_2).unwrap();
    assert_ends(&mut cluster.command(2), 1, &[&node_2.display().to_string()]);
}

#[test]
fn sigint_is_an_orderly_end_too() {
    let _exclusive = exclusive();
    let directory = TempDir::new().unwrap();
    let log = directory.path().join("log");
    for signal in [Signal::INT, Signal::TERM] {
        let mut process = Process::spawn(&mut single_node(&directory.path().join(format!("{signal:?}"))), &log);
        wait_for("the first word", || (!read_text(&log).is_empty()).then_some(()));
        process.signal(signal);
        assert_eq!(process.wait().code(), Some(0), "{signal:?}");
        std::fs::remove_file(&log).unwrap();
    }
}
