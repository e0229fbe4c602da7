//! The processes: how they are started, what is done to them, and how they ended.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::PathBuf;
use std::process::{ExitStatus, Stdio};
use std::sync::{Arc, PoisonError, RwLock};

use raftexample::membership::NodeId;
use rustix::process::Signal;

use crate::network::{Network, Place};
use crate::small_disk::SmallDisk;
use crate::support::{Process, read_text, without_settings};

/// Where clients find a node.
#[derive(Clone, Copy, Debug)]
pub struct Door {
    /// The node.
    pub id: NodeId,
    /// Its own address.
    pub direct: SocketAddr,
    /// That of the proxy before it.
    pub detour: SocketAddr,
    /// Which of its starts this is; 0 while it is down.
    pub boot: u64,
}

/// All doors that there are, kept up to date for the clients.
pub type Doors = Arc<RwLock<Vec<Door>>>;

/// What a member is to the cluster.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Standing {
    /// Started to join; perhaps a member, perhaps not yet.
    Joining,
    /// A member.
    Member,
    /// Its removal was asked for.
    Leaving,
    /// It has ended for good.
    Gone,
}

/// One node.
pub struct Member {
    /// Its id.
    pub id: NodeId,
    /// Where it is.
    pub place: Place,
    /// What it is to the cluster.
    pub standing: Standing,
    /// Its small disk, if it has one.
    pub disk: Option<SmallDisk>,
    /// Whether that is full now.
    disk_full: bool,
    /// Whether it was at any time since the node's start, so that it may end because of that.
    starved: bool,
    told_to_end: bool,
    joins: bool,
    peer_list: String,
    data_dir: PathBuf,
    log: PathBuf,
    /// The log's length at the node's start.
    logged_before: usize,
    process: Option<Process>,
    boots: u64,
    /// Set around the program where clocks can be changed.
    clock: Option<PathBuf>,
}

/// A library that gives a program another time of day, and the places where distributions put it.
const FAKETIME: &[&str] = &[
    "/usr/lib/x86_64-linux-gnu/faketime/libfaketime.so.1",
    "/usr/lib/aarch64-linux-gnu/faketime/libfaketime.so.1",
    "/usr/lib64/faketime/libfaketime.so.1",
    "/usr/lib/faketime/libfaketime.so.1",
];

/// The library, from the environment or where it usually is.
pub fn faketime() -> Option<PathBuf> {
    let named = std::env::var_os("TORTURE_FAKETIME").map(PathBuf::from);
    named.into_iter().chain(FAKETIME.iter().map(PathBuf::from)).find(|path| path.is_file())
}

/// How a process ended that nobody had ended.
#[derive(Debug, PartialEq, Eq)]
pub enum Ending {
    /// It was removed from the cluster.
    Removed,
    /// It was sent SIGTERM, and has ended as it should.
    AsTold,
    /// It may start again: it had no disk space, or found no member to join, as it said.
    Restartable(String),
    /// There was no reason for it.
    Unexpected(String),
}

/// All nodes.
pub struct Members {
    nodes: BTreeMap<NodeId, Member>,
    /// The network between them.
    pub network: Network,
    flags: Vec<String>,
    directory: PathBuf,
    program: PathBuf,
    doors: Doors,
    faketime: Option<PathBuf>,
    last_id: NodeId,
    /// No node is started any more.
    over: bool,
}

impl Members {
    /// No node yet. `flags` are those of all; data and logs go to `directory`.
    pub fn new(network: Network, flags: Vec<String>, directory: PathBuf, program: PathBuf, doors: Doors) -> Members {
        let nodes = BTreeMap::new();
        Members { nodes, network, flags, directory, program, doors, faketime: faketime(), last_id: 0, over: false }
    }

    /// Prepares the founders; `behind_proxy` says of each whether it is. With `small_disk` the first has one.
    pub fn found(&mut self, behind_proxy: &[bool], small_disk: bool) -> Result<(), String> {
        for behind_proxy in behind_proxy {
            self.prepare(*behind_proxy, Standing::Member)?;
        }
        let urls: Vec<String> = self.nodes.values().map(|member| member.place.peer_url.clone()).collect();
        for member in self.nodes.values_mut() {
            member.peer_list = urls.join(",");
        }
        if small_disk && let Some(first) = self.nodes.values_mut().next() {
            std::fs::create_dir_all(&first.data_dir).map_err(|error| error.to_string())?;
            first.disk = SmallDisk::mount(&first.data_dir);
        }
        Ok(())
    }

    /// Prepares one more, to join those that there are. Its id and peer URL.
    pub fn prepare_joiner(&mut self, behind_proxy: bool) -> Result<(NodeId, String), String> {
        let id = self.prepare(behind_proxy, Standing::Joining)?;
        let present = self.nodes.values().filter(|member| member.standing != Standing::Gone);
        let list: Vec<String> = present.map(|member| format!("{}={}", member.id, member.place.peer_url)).collect();
        let member = self.member_mut(id);
        member.peer_list = list.join(",");
        Ok((id, member.place.peer_url.clone()))
    }

    fn prepare(&mut self, behind_proxy: bool, standing: Standing) -> Result<NodeId, String> {
        self.last_id += 1;
        let id = self.last_id;
        let place = self.network.place(id, behind_proxy)?;
        let clock = self.faketime.is_some().then(|| self.directory.join(format!("node-{id}.clock")));
        let member = Member {
            id,
            place,
            standing,
            disk: None,
            disk_full: false,
            starved: false,
            told_to_end: false,
            joins: standing == Standing::Joining,
            peer_list: String::new(),
            data_dir: self.directory.join(format!("node-{id}")),
            log: self.directory.join(format!("node-{id}.log")),
            logged_before: 0,
            process: None,
            boots: 0,
            clock,
        };
        self.nodes.insert(id, member);
        if self.faketime.is_some() {
            self.set_clock(id, 0);
        }
        self.publish();
        Ok(id)
    }

    /// A node.
    pub fn member(&self, id: NodeId) -> &Member {
        &self.nodes[&id]
    }

    /// A node, to be changed.
    pub fn member_mut(&mut self, id: NodeId) -> &mut Member {
        self.nodes.get_mut(&id).expect("nodes are never forgotten")
    }

    /// All nodes that have not ended for good.
    pub fn present(&self) -> Vec<NodeId> {
        self.nodes.values().filter(|member| member.standing != Standing::Gone).map(|member| member.id).collect()
    }

    /// Those of them that nobody has asked to leave.
    pub fn staying(&self) -> Vec<NodeId> {
        let stays = |member: &&Member| !matches!(member.standing, Standing::Leaving | Standing::Gone);
        self.nodes.values().filter(stays).map(|member| member.id).collect()
    }

    /// Whether clocks can be changed.
    pub fn has_clocks(&self) -> bool {
        self.faketime.is_some()
    }

    /// Lets a node's clock of the day be this many seconds ahead or behind. Monotonic clocks stay as they are.
    pub fn set_clock(&self, id: NodeId, seconds: i64) {
        let clock = self.member(id).clock.as_ref().expect("only asked where clocks can be changed");
        // Replaced and not overwritten: the program may read it at any moment.
        let temporary = clock.with_extension("new");
        std::fs::write(&temporary, format!("{seconds:+}s\n")).unwrap();
        std::fs::rename(&temporary, clock).unwrap();
    }

    /// Starts a node that is down.
    pub fn start(&mut self, id: NodeId) {
        if self.over {
            return;
        }
        let faketime = self.faketime.clone();
        let (program, flags, directory) = (self.program.clone(), self.flags.clone(), self.directory.clone());
        let member = self.member_mut(id);
        assert!(member.process.is_none(), "node {id} runs already");
        let mut command = without_settings(member.place.command(&program));
        command.args(["--id", &id.to_string(), "--cluster", &member.peer_list]);
        command.args(member.joins.then_some("--join"));
        command.args(&member.place.flags).arg("--data-dir").arg(&member.data_dir).args(&flags);
        if let (Some(library), Some(clock)) = (&faketime, &member.clock) {
            command.env("LD_PRELOAD", library).env("FAKETIME_TIMESTAMP_FILE", clock);
            command.envs([("FAKETIME_NO_CACHE", "1"), ("FAKETIME_DONT_FAKE_MONOTONIC", "1")]);
        }
        // A group of its own: Ctrl-C is for the one who asks the questions.
        command.process_group(0);
        command.stdin(Stdio::null()).current_dir(&directory);
        member.boots += 1;
        member.starved = member.disk_full;
        member.told_to_end = false;
        member.logged_before = read_text(&member.log).len();
        member.process = Some(Process::spawn(&mut command, &member.log));
        self.publish();
    }

    /// Whether a node's process runs (a paused one does).
    pub fn is_up(&self, id: NodeId) -> bool {
        self.member(id).process.is_some()
    }

    /// Its process id.
    pub fn process_id(&self, id: NodeId) -> Option<u32> {
        self.member(id).process.as_ref().map(Process::id)
    }

    /// Takes all space but so many bytes from a node that has a small disk.
    pub fn fill_disk(&mut self, id: NodeId, left: u64) {
        let member = self.member_mut(id);
        (member.disk_full, member.starved) = (true, true);
        member.disk.as_ref().expect("only asked of a member with a small disk").fill_but(left);
    }

    /// Gives it back.
    pub fn free_disk(&mut self, id: NodeId) {
        let member = self.member_mut(id);
        member.disk_full = false;
        member.disk.as_ref().expect("only asked of a member with a small disk").free();
    }

    /// Sends a signal to a node that runs.
    pub fn signal(&self, id: NodeId, signal: Signal) {
        if let Some(process) = &self.member(id).process {
            process.signal(signal);
        }
    }

    /// SIGTERM, without waiting for the end.
    pub fn terminate(&mut self, id: NodeId) {
        self.member_mut(id).told_to_end = true;
        self.signal(id, Signal::TERM);
    }

    /// SIGKILL for these, one directly after the other, before any is waited for.
    pub fn kill(&mut self, ids: &[NodeId]) {
        for id in ids {
            self.signal(*id, Signal::KILL);
        }
        for id in ids {
            self.member_mut(*id).process = None;
        }
        self.publish();
    }

    /// SIGKILL for all, for good.
    pub fn end(&mut self) {
        self.over = true;
        let all: Vec<NodeId> = self.nodes.keys().copied().collect();
        self.kill(&all);
        // Nothing uses a disk any more.
        self.nodes.values_mut().for_each(|member| member.disk = None);
    }

    /// The end of a node, if it has come.
    fn ended(&mut self, id: NodeId) -> Option<ExitStatus> {
        let status = self.member_mut(id).process.as_mut()?.exit_status()?;
        self.member_mut(id).process = None;
        self.publish();
        Some(status)
    }

    /// Looks for nodes that have ended by themselves.
    pub fn look_for_ends(&mut self) -> Vec<(NodeId, Ending)> {
        let mut endings = Vec::new();
        for id in self.present() {
            let Some(status) = self.ended(id) else { continue };
            let ending = self.ending(id, status);
            if ending == Ending::Removed {
                self.member_mut(id).standing = Standing::Gone;
                self.publish();
            }
            endings.push((id, ending));
        }
        endings
    }

    fn ending(&self, id: NodeId, status: ExitStatus) -> Ending {
        let member = self.member(id);
        let last = self.last_words(id);
        match (member.standing, status.code()) {
            (Standing::Leaving, Some(0)) if self.words(id).contains("removed from the cluster") => Ending::Removed,
            (_, Some(0)) if member.told_to_end => Ending::AsTold,
            (_, Some(1)) if member.starved && last.contains("free some space") => Ending::Restartable(last),
            (_, Some(1)) if member.joins && last.contains("failed to join") => Ending::Restartable(last),
            _ => {
                let status = status.signal().map_or_else(|| format!("{status}"), |signal| format!("signal {signal}"));
                Ending::Unexpected(format!("node {id} ended by itself with {status}: {last}"))
            }
        }
    }

    /// What a node has logged since its start.
    fn words(&self, id: NodeId) -> String {
        let member = self.member(id);
        let text = read_text(&member.log);
        text.get(member.logged_before..).unwrap_or_default().to_owned()
    }

    /// Whether it has come so far that it says something. Before, not even SIGTERM is its own.
    pub fn has_spoken(&self, id: NodeId) -> bool {
        !self.words(id).is_empty()
    }

    /// The last line that a node has logged since its start.
    pub fn last_words(&self, id: NodeId) -> String {
        self.words(id).lines().last().unwrap_or("it has logged nothing").to_owned()
    }

    fn publish(&self) {
        let present = self.nodes.values().filter(|member| member.standing != Standing::Gone);
        let doors = present.map(|member| Door {
            id: member.id,
            direct: member.place.direct,
            detour: member.place.detour,
            boot: if member.process.is_some() { member.boots } else { 0 },
        });
        *self.doors.write().unwrap_or_else(PoisonError::into_inner) = doors.collect();
    }
}
