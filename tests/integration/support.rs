use std::collections::HashSet;
use std::fs::{File, OpenOptions};
use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use tempfile::TempDir;

use crate::client::Client;

/// How long anything may take that has to happen in the end. Far above what it takes, so that only a defect runs into
/// it, on a slow machine too.
pub(crate) const DEADLINE: Duration = Duration::from_secs(60);

/// Short timeouts, for tests that do not measure: an election is over in about a second.
pub(crate) const FAST: &[&str] = &["--heartbeat-interval", "50ms", "--election-timeout", "500ms"];

/// Waits until `probe` gives something; panics with `what` when it takes too long.
#[track_caller]
pub(crate) fn wait_for<T>(what: &str, mut probe: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + DEADLINE;
    loop {
        if let Some(found) = probe() {
            return found;
        }
        assert!(Instant::now() < deadline, "waited {DEADLINE:?} in vain: {what}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// The program, with nothing of this process's own settings.
pub(crate) fn program() -> Command {
    without_settings(Command::new(env!("CARGO_BIN_EXE_raftexample")))
}

/// A command that starts the program, with nothing of this process's own settings.
pub(crate) fn without_settings(mut command: Command) -> Command {
    for (name, _) in std::env::vars_os().filter(|(name, _)| name.to_string_lossy().starts_with("RAFTEXAMPLE_")) {
        command.env_remove(name);
    }
    command.env_remove("RUST_LOG").env_remove("RUST_LOG_STYLE").stdin(Stdio::null());
    command
}

/// Picks a port that is free now, and that this process has not picked before.
///
/// Not one of the kernel's own choice, as binding port 0 gives: while a node is down, a port from the kernel's range
/// may be given to an outgoing connection, even to a peer's attempt to reach that very port, which then meets itself.
pub(crate) fn free_port() -> u16 {
    static PICKED: Mutex<Option<HashSet<u16>>> = Mutex::new(None);
    let mut picked = PICKED.lock().unwrap_or_else(PoisonError::into_inner);
    let picked = picked.get_or_insert_default();
    let first = 10_000;
    let end = ephemeral_ports_start().max(first + 10_000);
    // Another run of the tests at the same time starts somewhere else.
    let mut port = first + (std::process::id() * 97 % u32::from(end - first)) as u16;
    for _ in first..end {
        if picked.insert(port) && TcpListener::bind((Ipv4Addr::LOCALHOST, port)).is_ok() {
            return port;
        }
        port = if port + 1 == end { first } else { port + 1 };
    }
    panic!("no free port from {first} to {end}");
}

fn ephemeral_ports_start() -> u16 {
    let range = std::fs::read_to_string("/proc/sys/net/ipv4/ip_local_port_range").unwrap_or_default();
    range.split_whitespace().next().and_then(|start| start.parse().ok()).unwrap_or(32_768)
}

/// Keeps tests that need the machine for themselves apart.
pub(crate) fn exclusive() -> MutexGuard<'static, ()> {
    static MACHINE: Mutex<()> = Mutex::new(());
    MACHINE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A child process that does not outlive its owner.
pub(crate) struct Process {
    child: Child,
}

impl Process {
    /// Starts `command`, both outputs going to the end of the file `log`.
    pub(crate) fn spawn(command: &mut Command, log: &Path) -> Self {
        let log: File = OpenOptions::new().create(true).append(true).open(log).unwrap();
        command.stdout(log.try_clone().unwrap()).stderr(log);
        Self { child: command.spawn().unwrap() }
    }

    pub(crate) fn signal(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.child), signal).unwrap();
    }

    pub(crate) fn id(&self) -> u32 {
        self.child.id()
    }

    pub(crate) fn exit_status(&mut self) -> Option<ExitStatus> {
        self.child.try_wait().unwrap()
    }

    /// Waits until it has ended by itself.
    #[track_caller]
    pub(crate) fn wait(&mut self) -> ExitStatus {
        wait_for("the end of the process", || self.exit_status())
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // Fails if it has ended already, which is as good.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// One member: its addresses and files, and its process while it runs.
struct Node {
    id: u64,
    peer_url: String,
    /// The value of `--cluster`.
    peer_list: String,
    /// Whether it joins, instead of founding the cluster.
    joins: bool,
    address: SocketAddr,
    data_dir: PathBuf,
    log: PathBuf,
    /// Besides those of the whole cluster.
    flags: Vec<String>,
    process: Option<Process>,
}

/// One member whose peers reach it at another port than it listens at: something lies between.
#[derive(Clone, Copy)]
pub(crate) struct Detour {
    pub(crate) id: u64,
    /// In its URL.
    pub(crate) port: u16,
    pub(crate) listens_at: u16,
}

/// A cluster of child processes on this machine. Ends with its owner; shows the logs if that is by a panic.
pub(crate) struct Cluster {
    nodes: Vec<Node>,
    flags: Vec<String>,
    // Fields are dropped in order: the directory after the processes that write to it, the machine last.
    directory: TempDir,
    _exclusive: MutexGuard<'static, ()>,
}

impl Cluster {
    /// Starts `size` nodes with these flags besides the necessary ones, and waits until all are ready.
    #[track_caller]
    pub(crate) fn start(size: usize, flags: &[&str]) -> Self {
        let cluster = Self::launch(size, flags);
        for id in cluster.ids() {
            cluster.wait_ready(id);
        }
        cluster
    }

    /// As [`Self::start`], without waiting for more than that no process ends at once.
    #[track_caller]
    pub(crate) fn launch(size: usize, flags: &[&str]) -> Self {
        let mut exclusive = exclusive();
        // Somebody may take a port between its choice and its use: then all begins anew with others.
        for _ in 0..5 {
            let mut cluster = Self::prepare(size, flags, None, exclusive);
            for id in cluster.ids() {
                cluster.spawn(id);
            }
            if cluster.all_listen() {
                return cluster;
            }
            println!("a port was lost; trying others");
            exclusive = cluster.into_exclusive();
        }
        panic!("no ports could be had");
    }

    /// As [`Self::start`], with one member behind a proxy that runs already.
    #[track_caller]
    pub(crate) fn start_with_detour(size: usize, flags: &[&str], detour: Detour) -> Self {
        let mut cluster = Self::prepare(size, flags, Some(detour), exclusive());
        cluster.restart_all();
        cluster
    }

    fn prepare(size: usize, flags: &[&str], detour: Option<Detour>, exclusive: MutexGuard<'static, ()>) -> Self {
        let directory = TempDir::new().unwrap();
        let detour_of = |id: u64| detour.filter(|detour| detour.id == id);
        let peer_port = |id| detour_of(id).map_or_else(free_port, |detour| detour.port);
        let peers: Vec<String> = (1..=size as u64).map(|id| format!("http://127.0.0.1:{}", peer_port(id))).collect();
        let own_flags = |id| match detour_of(id) {
            Some(detour) => vec!["--peer-listen".to_owned(), format!("127.0.0.1:{}", detour.listens_at)],
            None => Vec::new(),
        };
        let nodes = (1..).zip(&peers).map(|(id, url)| Node {
            id,
            peer_url: url.clone(),
            peer_list: peers.join(","),
            joins: false,
            address: SocketAddr::from((Ipv4Addr::LOCALHOST, free_port())),
            data_dir: directory.path().join(format!("node-{id}")),
            log: directory.path().join(format!("node-{id}.log")),
            flags: own_flags(id),
            process: None,
        });
        Self {
            nodes: nodes.collect(),
            flags: flags.iter().map(ToString::to_string).collect(),
            directory,
            _exclusive: exclusive,
        }
    }

    fn into_exclusive(mut self) -> MutexGuard<'static, ()> {
        self.kill_all();
        drop(self);
        exclusive()
    }

    /// Waits until each node takes connections. `false` if one lost a port to another program; panics if one has ended
    /// for any other reason.
    fn all_listen(&mut self) -> bool {
        for index in 0..self.nodes.len() {
            let node = &mut self.nodes[index];
            let log = node.log.clone();
            let process = node.process.as_mut().expect("just spawned");
            let address = node.address;
            let lost = wait_for("a node that listens, or ends", || match process.exit_status() {
                Some(status) if read_text(&log).contains("in use") => {
                    println!("node {} ended with {status}", index + 1);
                    Some(true)
                }
                Some(status) => panic!("node {} ended with {status}", index + 1),
                None => std::net::TcpStream::connect(address).is_ok().then_some(false),
            });
            if lost {
                return false;
            }
        }
        true
    }

    /// Prepares a node that is to join, told of all that were prepared before it, and does not start it.
    pub(crate) fn prepare_joiner(&mut self, id: u64) {
        let peer_url = format!("http://127.0.0.1:{}", free_port());
        let mut peers: Vec<String> = self.nodes.iter().map(|node| format!("{}={}", node.id, node.peer_url)).collect();
        peers.push(format!("{id}={peer_url}"));
        self.nodes.push(Node {
            id,
            peer_url,
            peer_list: peers.join(","),
            joins: true,
            address: SocketAddr::from((Ipv4Addr::LOCALHOST, free_port())),
            data_dir: self.directory.path().join(format!("node-{id}")),
            log: self.directory.path().join(format!("node-{id}.log")),
            flags: Vec::new(),
            process: None,
        });
    }

    /// All ids, those of stopped nodes too.
    pub(crate) fn ids(&self) -> Vec<u64> {
        self.nodes.iter().map(|node| node.id).collect()
    }

    #[track_caller]
    fn node(&self, id: u64) -> &Node {
        self.nodes.iter().find(|node| node.id == id).expect("it was prepared")
    }

    #[track_caller]
    fn node_mut(&mut self, id: u64) -> &mut Node {
        self.nodes.iter_mut().find(|node| node.id == id).expect("it was prepared")
    }

    /// Whether the process runs (a paused one does).
    pub(crate) fn is_up(&self, id: u64) -> bool {
        self.node(id).process.is_some()
    }

    /// Whether a node that was started has ended by itself.
    #[allow(dead_code, reason = "used where nodes are killed from within")]
    #[allow(dead_code, reason = "only the test of the fail-points asks, which borrows this file")]
    pub(crate) fn has_ended(&mut self, id: u64) -> bool {
        self.node_mut(id).process.as_mut().is_some_and(|process| process.exit_status().is_some())
    }

    /// Where a node takes clients.
    pub(crate) fn address(&self, id: u64) -> SocketAddr {
        self.node(id).address
    }

    pub(crate) fn client(&self, id: u64) -> Client {
        Client::new(self.address(id))
    }

    pub(crate) fn data_dir(&self, id: u64) -> &Path {
        &self.node(id).data_dir
    }

    /// All that a node has logged, in all its runs.
    pub(crate) fn log(&self, id: u64) -> String {
        read_text(&self.node(id).log)
    }

    /// The value of `--cluster` of the founders.
    pub(crate) fn peer_list(&self) -> &str {
        &self.nodes[0].peer_list
    }

    /// Gives a node another value of `--cluster` from its next start on.
    pub(crate) fn set_peer_list(&mut self, id: u64, peer_list: String) {
        self.node_mut(id).peer_list = peer_list;
    }

    /// Where its peers reach a node.
    pub(crate) fn peer_url(&self, id: u64) -> &str {
        &self.node(id).peer_url
    }

    /// The command line that starts a node.
    pub(crate) fn command(&self, id: u64) -> Command {
        let node = self.node(id);
        let mut command = program();
        command.args(["--id", &id.to_string(), "--cluster", &node.peer_list]);
        command.args(node.joins.then_some("--join"));
        command.args(["--port", &node.address.port().to_string()]).arg("--data-dir").arg(&node.data_dir);
        command.args(&self.flags).args(&node.flags).current_dir(self.directory.path());
        command
    }

    /// Starts a node that is down, and waits for nothing.
    #[track_caller]
    pub(crate) fn spawn(&mut self, id: u64) {
        self.spawn_with(id, &[]);
    }

    /// Starts a node that is down with these environment variables, and waits for nothing.
    #[track_caller]
    pub(crate) fn spawn_with(&mut self, id: u64, variables: &[(&str, &str)]) {
        assert!(!self.is_up(id), "node {id} runs already");
        let mut command = self.command(id);
        command.envs(variables.iter().copied());
        let node = self.node_mut(id);
        node.process = Some(Process::spawn(&mut command, &node.log));
    }

    /// Starts a node that is down, and waits until it is ready.
    #[track_caller]
    pub(crate) fn restart(&mut self, id: u64) {
        self.spawn(id);
        self.wait_ready(id);
    }

    /// Starts all, which are down, and waits until they are ready.
    #[track_caller]
    pub(crate) fn restart_all(&mut self) {
        for id in self.ids() {
            self.spawn(id);
        }
        for id in self.ids() {
            self.wait_ready(id);
        }
    }

    /// SIGKILL: it ends between two instructions.
    pub(crate) fn kill(&mut self, id: u64) {
        drop(self.node_mut(id).process.take());
    }

    /// SIGKILL for all, one directly after the other, before any is waited for.
    pub(crate) fn kill_all(&mut self) {
        for process in self.nodes.iter().filter_map(|node| node.process.as_ref()) {
            process.signal(Signal::KILL);
        }
        for node in &mut self.nodes {
            node.process = None;
        }
    }

    /// SIGSTOP: it stands still and keeps its sockets.
    pub(crate) fn pause(&self, id: u64) {
        self.process(id).signal(Signal::STOP);
    }

    /// SIGCONT: it goes on as if nothing had been.
    pub(crate) fn resume(&self, id: u64) {
        self.process(id).signal(Signal::CONT);
    }

    /// SIGTERM, without waiting for the end.
    pub(crate) fn ask_to_end(&self, id: u64) {
        self.process(id).signal(Signal::TERM);
    }

    /// Waits until a node has ended, by itself or as asked.
    #[track_caller]
    pub(crate) fn wait_end(&mut self, id: u64) -> ExitStatus {
        let mut process = self.node_mut(id).process.take().expect("it runs");
        process.wait()
    }

    /// SIGTERM, and its end.
    #[track_caller]
    pub(crate) fn terminate(&mut self, id: u64) -> ExitStatus {
        self.ask_to_end(id);
        self.wait_end(id)
    }

    /// The process id of a node that runs.
    #[allow(dead_code, reason = "only tests that borrow this file look at a process from outside")]
    pub(crate) fn process_id(&self, id: u64) -> u32 {
        self.process(id).id()
    }

    fn process(&self, id: u64) -> &Process {
        self.node(id).process.as_ref().expect("it runs")
    }

    /// What a node says of itself; `None` if it does not answer.
    pub(crate) fn status(&self, id: u64) -> Option<Value> {
        let response = self.client(id).request("GET", "/_/status", &[], b"").ok()?;
        (response.status == 200).then(|| response.json())
    }

    /// A number from a node's status; 0 if it does not answer.
    pub(crate) fn status_number(&self, id: u64, name: &str) -> u64 {
        self.status(id).and_then(|status| status[name].as_u64()).unwrap_or(0)
    }

    /// Waits until a majority of `asked` follows one leader, which is one of them, and returns it.
    #[track_caller]
    pub(crate) fn leader_among(&self, asked: &[u64]) -> u64 {
        wait_for("a leader", || {
            let said: Vec<u64> = asked.iter().map(|id| self.status_number(*id, "leader")).collect();
            let votes = |leader: u64| said.iter().filter(|id| **id == leader).count();
            let leader = asked.iter().copied().max_by_key(|id| votes(*id))?;
            (votes(leader) > self.nodes.len() / 2).then_some(leader)
        })
    }

    /// Waits until a majority of the nodes that run follows one leader, and returns it.
    #[track_caller]
    pub(crate) fn leader(&self) -> u64 {
        let up: Vec<u64> = self.ids().into_iter().filter(|id| self.is_up(*id)).collect();
        self.leader_among(&up)
    }

    /// All but one.
    pub(crate) fn others(&self, id: u64) -> Vec<u64> {
        self.ids().into_iter().filter(|other| *other != id).collect()
    }

    /// Waits until a node can serve.
    #[track_caller]
    pub(crate) fn wait_ready(&self, id: u64) {
        wait_for("a ready node", || {
            let response = self.client(id).request("GET", "/_/readyz", &[], b"").ok()?;
            (response.status == 200).then_some(())
        });
    }

    /// Waits until a node has applied all that the others know to be committed now.
    #[track_caller]
    pub(crate) fn wait_caught_up(&self, id: u64) {
        let others = self.others(id);
        let commit_index = others.iter().map(|other| self.status_number(*other, "commit_index")).max().unwrap_or(0);
        wait_for("a node that has caught up", || {
            (self.status_number(id, "applied_index") >= commit_index).then_some(())
        });
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        self.kill_all();
        if std::thread::panicking() {
            for node in &self.nodes {
                println!("---- the end of the log of node {} ----", node.id);
                println!("{}", tail(&read_text(&node.log), 60));
            }
        }
    }
}

/// A file's text; empty if there is none.
pub(crate) fn read_text(path: &Path) -> String {
    String::from_utf8_lossy(&std::fs::read(path).unwrap_or_default()).into_owned()
}

fn tail(text: &str, count: usize) -> String {
    let lines: Vec<&str> = text.lines().collect();
    lines[lines.len().saturating_sub(count)..].join("\n")
}
