//! A cluster of one program's processes, with ports and directories of its own.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread::{Builder, ScopedJoinHandle, scope};
use std::time::{Duration, Instant};

use rustix::process::Signal;
use serde_json::Value;
use url::Url;

use super::ports::free_port;
use super::process::{POLL_INTERVAL, Process};
use super::usage;
use crate::options::{Api, Options, TargetChoice, Workload};
use crate::run::fill;
use crate::target::choose;

/// How long a node may take until it serves, a long log to read included.
const READY_TIMEOUT: Duration = Duration::from_secs(120);

/// How long one request about a node's state may take.
const STATUS_TIMEOUT: Duration = Duration::from_secs(2);

/// How long a snapshot may take to be written.
const SNAPSHOT_TIMEOUT: Duration = Duration::from_secs(120);

/// Somebody may take a port between its choice and its use; then all begins anew with others, so often.
const PORT_ATTEMPTS: usize = 3;

/// Nodes are on this machine, and reach each other and their clients here.
const HOST: &str = "127.0.0.1";

/// What the nodes run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Program {
    Raftexample,
    Etcd,
    GoRaftexample,
    /// No cluster at all: HTTP and nothing behind it.
    Echo,
}

/// A program that is there, and its flags besides those of ports, members and directories.
#[derive(Clone, Debug)]
pub(crate) struct Launch {
    pub(crate) program: Program,
    pub(crate) path: PathBuf,
    pub(crate) flags: Vec<String>,
    pub(crate) nodes: usize,
}

/// Running nodes.
#[derive(Debug)]
pub(crate) struct Cluster {
    launch: Launch,
    nodes: Vec<Node>,
    directory: PathBuf,
    agent: ureq::Agent,
    /// Up to which number all keys were written, by what the nodes speak: etcd keeps two stores.
    filled: Vec<(Api, u64)>,
}

#[derive(Debug)]
struct Node {
    /// From 1.
    id: usize,
    client_port: u16,
    peer_port: u16,
    directory: PathBuf,
    log: PathBuf,
    process: Option<Process>,
}

impl Cluster {
    /// Starts the nodes in `directory`, which is made, and waits until all are ready.
    ///
    /// # Errors
    /// One line, with the end of the log of a node that does not start.
    pub(crate) fn start(launch: Launch, directory: &Path) -> Result<Self, String> {
        let mut refusal = String::new();
        for _ in 0..PORT_ATTEMPTS {
            let mut cluster = Self::prepare(launch.clone(), directory)?;
            match cluster.start_all() {
                Ok(()) => return Ok(cluster),
                Err(reason) if reason.contains("in use") => refusal = reason,
                Err(reason) => return Err(reason),
            }
        }
        Err(refusal)
    }

    fn prepare(launch: Launch, directory: &Path) -> Result<Self, String> {
        let _ = std::fs::remove_dir_all(directory);
        let mut nodes = Vec::new();
        for id in 1..=launch.nodes {
            let node = Node {
                id,
                client_port: free_port()?,
                peer_port: free_port()?,
                directory: directory.join(format!("node-{id}")),
                log: directory.join(format!("node-{id}.log")),
                process: None,
            };
            let failed = |error| format!("failed to make the directory {}: {error}", node.directory.display());
            std::fs::create_dir_all(&node.directory).map_err(failed)?;
            nodes.push(node);
        }
        // An answer that is no success is an answer all the same.
        let agent = ureq::Agent::config_builder().timeout_global(Some(STATUS_TIMEOUT)).http_status_as_error(false);
        let agent = agent.build().into();
        Ok(Self { launch, nodes, directory: directory.to_owned(), agent, filled: Vec::new() })
    }

    fn start_all(&mut self) -> Result<(), String> {
        for index in 0..self.nodes.len() {
            self.spawn(index)?;
        }
        (0..self.nodes.len()).try_for_each(|index| self.wait_ready(index))
    }

    /// How many nodes it has, running or not.
    pub(crate) fn size(&self) -> usize {
        self.nodes.len()
    }

    /// What its nodes speak, unless something else is asked for. The Go program's GET and PUT are those of ours.
    pub(crate) fn api(&self) -> Api {
        if self.launch.program == Program::Etcd { Api::EtcdV2 } else { Api::Raftexample }
    }

    /// Where a node takes clients.
    pub(crate) fn address(&self, index: usize) -> SocketAddr {
        SocketAddr::from(([127, 0, 0, 1], self.nodes[index].client_port))
    }

    /// The client URL of a node.
    pub(crate) fn url(&self, index: usize) -> Url {
        let text = format!("http://{}", self.address(index));
        Url::parse(&text).expect("an address makes a URL")
    }

    /// The client URLs of all nodes.
    pub(crate) fn urls(&self) -> Vec<Url> {
        (0..self.size()).map(|index| self.url(index)).collect()
    }

    /// The process of a node.
    ///
    /// # Errors
    /// One line, when it does not run.
    pub(crate) fn pid(&self, index: usize) -> Result<u32, String> {
        let process = self.nodes[index].process.as_ref();
        process.map(Process::id).ok_or_else(|| format!("node {} does not run", index + 1))
    }

    /// The node that leads, from 0. Waits for one.
    ///
    /// # Errors
    /// One line, when there is none.
    pub(crate) fn leader(&self) -> Result<usize, String> {
        let options = Options { target: TargetChoice::Leader, ..Options::closed_loop(self.urls(), self.api()) };
        let targets = choose(&options)?;
        let port = targets.first().map(|target| target.address.port());
        let index = self.nodes.iter().position(|node| Some(node.client_port) == port);
        index.ok_or_else(|| "the leader is none of the nodes".to_owned())
    }

    /// All that run and do not lead.
    ///
    /// # Errors
    /// One line, when nobody leads.
    pub(crate) fn followers(&self) -> Result<Vec<usize>, String> {
        let leader = self.leader()?;
        Ok((0..self.size()).filter(|index| *index != leader && self.nodes[*index].process.is_some()).collect())
    }

    /// Writes keys 0 to `keys`, once for this cluster and what it is spoken to in.
    ///
    /// # Errors
    /// One line.
    pub(crate) fn fill(&mut self, api: Api, keys: u64, value_bytes: usize) -> Result<(), String> {
        let filled = self.filled.iter().any(|(of, count)| *of == api && *count >= keys);
        if filled || self.launch.program == Program::Echo {
            return Ok(());
        }
        let target = if self.launch.program == Program::GoRaftexample {
            TargetChoice::One(self.url(0))
        } else {
            TargetChoice::Leader
        };
        let options = Options::closed_loop(self.urls(), api);
        fill(&Options { target, keys, value_bytes, workload: Workload::Put, ..options })?;
        if self.launch.program == Program::GoRaftexample {
            self.wait_for_last_key(keys)?;
        }
        self.filled.push((api, keys));
        Ok(())
    }

    /// The Go program answers before a write is applied.
    fn wait_for_last_key(&self, keys: u64) -> Result<(), String> {
        let url = format!("{}{}", self.url(0), crate::request::key_name(keys - 1));
        wait_until("the last write to be applied", READY_TIMEOUT, || {
            Ok(self.agent.get(&url).call().is_ok_and(|answer| answer.status() == 200))
        })
    }

    /// The JSON that one of our nodes says of itself.
    pub(crate) fn status(&self, index: usize) -> Option<Value> {
        let mut answer = self.agent.get(format!("{}_/status", self.url(index))).call().ok()?;
        serde_json::from_str(&answer.body_mut().read_to_string().ok()?).ok()
    }

    /// A number of [`Self::status`]; 0 if the node does not answer.
    pub(crate) fn status_number(&self, index: usize, name: &str) -> u64 {
        self.status(index).and_then(|status| status[name].as_u64()).unwrap_or(0)
    }

    /// Has one of our nodes write a snapshot, and returns its size in bytes.
    ///
    /// # Errors
    /// One line.
    pub(crate) fn snapshot(&self, index: usize) -> Result<u64, String> {
        write_snapshot(self.address(index)).map(|snapshot| snapshot.bytes)
    }

    /// Has all of our nodes write a snapshot at the same time, as they do by themselves after so many entries. Returns
    /// when all are on disk, and the logs before them are given up.
    ///
    /// # Errors
    /// One line.
    pub(crate) fn snapshot_everywhere(&self) -> Result<(), String> {
        let snapshots = scope(|scope| {
            let mut writers = Vec::new();
            for node in 0..self.size() {
                let address = self.address(node);
                let writer = Builder::new().name("snapshot".to_owned());
                let writer = writer.spawn_scoped(scope, move || write_snapshot(address));
                writers.push(writer.map_err(|error| format!("failed to start a thread: {error}"))?);
            }
            let join = |writer: ScopedJoinHandle<_>| writer.join().map_err(|_| "a thread panicked".to_owned())?;
            writers.into_iter().map(join).collect::<Result<Vec<_>, String>>()
        })?;
        for (node, snapshot) in snapshots.iter().enumerate() {
            wait_until("a log to begin behind its snapshot", SNAPSHOT_TIMEOUT, || {
                Ok(self.status_number(node, "snapshot_index") >= snapshot.index)
            })?;
        }
        Ok(())
    }

    /// Resident memory of a node in bytes.
    ///
    /// # Errors
    /// One line, when it does not run.
    pub(crate) fn resident_bytes(&self, index: usize) -> Result<u64, String> {
        usage::resident_bytes(self.pid(index)?)
    }

    /// Ends a node with SIGKILL.
    pub(crate) fn kill(&mut self, index: usize) {
        // Dropping it does just that.
        self.nodes[index].process = None;
    }

    /// Starts a node that was ended, and returns without waiting for it.
    ///
    /// # Errors
    /// One line.
    pub(crate) fn spawn(&mut self, index: usize) -> Result<(), String> {
        let mut command = self.command(index)?;
        let node = &mut self.nodes[index];
        node.process = Some(Process::spawn(&mut command, &node.log)?);
        Ok(())
    }

    /// Waits until a node serves.
    ///
    /// # Errors
    /// One line, when it has ended, or takes too long.
    pub(crate) fn wait_ready(&mut self, index: usize) -> Result<(), String> {
        self.wait_for_node(index, "to be ready", |cluster| cluster.is_ready(index))
    }

    /// Waits until a node does as wanted; gives up when its process ends.
    ///
    /// # Errors
    /// One line, with the end of its log.
    pub(crate) fn wait_for_node(
        &mut self,
        index: usize,
        what: &str,
        condition: impl Fn(&Self) -> bool,
    ) -> Result<(), String> {
        let deadline = Instant::now() + READY_TIMEOUT;
        while !condition(self) {
            let log = self.nodes[index].log.display().to_string();
            let process = self.nodes[index].process.as_mut().ok_or("the node does not run")?;
            if let Some(status) = process.exit_status()? {
                return Err(format!("node {} ended with {status}, see {log}: {}", index + 1, process.log_tail()));
            }
            if Instant::now() >= deadline {
                return Err(format!("node {} took too long {what}, see {log}: {}", index + 1, process.log_tail()));
            }
            std::thread::sleep(POLL_INTERVAL);
        }
        Ok(())
    }

    fn is_ready(&self, index: usize) -> bool {
        let (path, expected) = match self.launch.program {
            Program::Raftexample => ("_/readyz", Some(200)),
            Program::Etcd => ("health", Some(200)),
            // Any answer will do: they have no such thing.
            Program::GoRaftexample | Program::Echo => ("ready", None),
        };
        let answer = self.agent.get(format!("{}{path}", self.url(index))).call();
        answer.is_ok_and(|answer| expected.is_none_or(|expected| answer.status() == expected))
    }

    fn command(&self, index: usize) -> Result<Command, String> {
        let node = &self.nodes[index];
        let mut command = Command::new(&self.launch.path);
        // The user's settings are for the user's nodes.
        for (name, _) in std::env::vars_os() {
            let text = name.to_string_lossy();
            if text.starts_with("RAFTEXAMPLE_") || text.starts_with("ETCD_") || text.starts_with("RUST_LOG") {
                command.env_remove(&name);
            }
        }
        command.current_dir(&self.directory);
        match self.launch.program {
            Program::Raftexample => self.raftexample_arguments(node, &mut command),
            Program::Etcd => self.etcd_arguments(node, &mut command),
            Program::GoRaftexample => self.go_arguments(node, &mut command),
            Program::Echo => {
                command.args(["echo", "--port", &node.client_port.to_string()]);
            }
        }
        command.args(&self.launch.flags);
        Ok(command)
    }

    fn peer_urls(&self) -> String {
        let urls = self.nodes.iter().map(|node| format!("http://{HOST}:{}", node.peer_port));
        urls.collect::<Vec<_>>().join(",")
    }

    fn raftexample_arguments(&self, node: &Node, command: &mut Command) {
        command.args(["--id", &node.id.to_string(), "--cluster", &self.peer_urls()]);
        command.args(["--port", &node.client_port.to_string(), "--data-dir"]).arg(&node.directory);
    }

    fn etcd_arguments(&self, node: &Node, command: &mut Command) {
        let client_url = format!("http://{HOST}:{}", node.client_port);
        let peer_url = format!("http://{HOST}:{}", node.peer_port);
        let members = self.nodes.iter().map(|node| format!("node-{}=http://{HOST}:{}", node.id, node.peer_port));
        command.args(["--name", &format!("node-{}", node.id), "--data-dir"]).arg(&node.directory);
        command.args(["--listen-client-urls", &client_url, "--advertise-client-urls", &client_url]);
        command.args(["--listen-peer-urls", &peer_url, "--initial-advertise-peer-urls", &peer_url]);
        command.args(["--initial-cluster", &members.collect::<Vec<_>>().join(",")]);
        command.args(["--initial-cluster-state", "new", "--enable-v2"]);
    }

    /// It writes to directories of its own naming where it is started.
    fn go_arguments(&self, node: &Node, command: &mut Command) {
        command.current_dir(&node.directory);
        command.args(["--id", &node.id.to_string(), "--cluster", &self.peer_urls()]);
        command.args(["--port", &node.client_port.to_string()]);
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        for node in &self.nodes {
            // All at once: one after the other, the last would hold elections meanwhile.
            if let Some(process) = &node.process {
                process.signal(Signal::KILL);
            }
        }
        self.nodes.clear();
        let _ = std::fs::remove_dir_all(&self.directory);
    }
}

/// A snapshot on disk.
#[derive(Clone, Copy, Debug)]
struct Snapshot {
    index: u64,
    bytes: u64,
}

/// Has one of our nodes write a snapshot.
///
/// # Errors
/// One line, with what the node says.
fn write_snapshot(address: SocketAddr) -> Result<Snapshot, String> {
    let url = format!("http://{address}/_/snapshot");
    let agent = ureq::Agent::config_builder().timeout_global(Some(SNAPSHOT_TIMEOUT)).http_status_as_error(false);
    let agent: ureq::Agent = agent.build().into();
    let failed = |reason: String| format!("failed to take a snapshot, POST {url}: {reason}");
    let deadline = Instant::now() + SNAPSHOT_TIMEOUT;
    loop {
        let mut answer = agent.post(&url).send_empty().map_err(|error| failed(error.to_string()))?;
        let text = answer.body_mut().read_to_string().map_err(|error| failed(error.to_string()))?;
        let json: Value = serde_json::from_str(&text).unwrap_or_default();
        match (json["index"].as_u64(), json["size"].as_u64(), answer.status().as_u16()) {
            (Some(index), Some(bytes), _) => return Ok(Snapshot { index, bytes }),
            // It may not be done with the one before.
            (_, _, 503) if Instant::now() < deadline => std::thread::sleep(POLL_INTERVAL),
            (_, _, status) => return Err(failed(format!("{status} {}", json["detail"]))),
        }
    }
}

/// Waits until `condition` holds.
///
/// # Errors
/// One line that says `what` was waited for; and what the condition says.
pub(crate) fn wait_until(
    what: &str,
    within: Duration,
    mut condition: impl FnMut() -> Result<bool, String>,
) -> Result<(), String> {
    let deadline = Instant::now() + within;
    while !condition()? {
        if Instant::now() >= deadline {
            return Err(format!("waited {within:?} in vain for {what}"));
        }
        std::thread::sleep(POLL_INTERVAL);
    }
    Ok(())
}
