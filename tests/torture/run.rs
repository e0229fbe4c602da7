//! A run, from the first node to the last check.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, RwLock};
use std::thread::{Builder, JoinHandle};
use std::time::{Duration, Instant};

use raftexample::membership::NodeId;
use serde_json::Value;

use crate::audit::{Checked, Contents, Evidence, judge};
use crate::chaos::{Chaos, Event, Log, lock};
use crate::client::Client as Connection;
use crate::clients::{Client, Slots, read_page};
use crate::followers::{Feed, Observation, follow, observe};
use crate::history::{End, Operation, Run};
use crate::members::{Doors, Ending, Members, Standing, faketime};
use crate::network::Network;
use crate::operator::Operator;
use crate::random::Random;
use crate::report::Report;
use crate::resources::Resources;
use crate::sandbox;
use crate::settings::{Kind, Settings};

const CLIENTS: usize = 8;
const FOLLOWERS: usize = 3;

/// Short timeouts: elections are what this is about. A request takes no longer than this, or has no answer.
const FLAGS: &[&str] = &["--heartbeat-interval", "50ms", "--election-timeout", "500ms", "--request-timeout", "2s"];

/// How often there are snapshots, in entries, and how many entries are kept behind them: from hardly any to many.
const SNAPSHOT_COUNTS: [&str; 3] = ["50", "500", "5000"];
const CATCHUP_ENTRIES: [&str; 3] = ["0", "50", "1000"];

/// How long anything may take that has to happen once all is well.
const QUIET_TIMEOUT: Duration = Duration::from_secs(60);

/// How long after the end of all faults a write may take to succeed at any node: the start of a program that has a
/// log to read, an election or two, and connections that are made anew.
const HEALED_WRITE_TIMEOUT: Duration = Duration::from_secs(15);

/// What clients go on for after that, so that they see a cluster that is well again.
const CALM: Duration = Duration::from_secs(1);

/// What a node may still have when nobody asks it for anything: two connections to each peer in each direction, and
/// its own threads.
const DESCRIPTORS_MAX: u64 = 100;
const THREADS_MAX: u64 = 80;
/// With room for what the allocator keeps; the contents of a run are some MiB.
const RESIDENT_BYTES_MAX: u64 = 512 << 20;

/// All threads of a run that are not those of faults.
struct Threads {
    clients: Vec<JoinHandle<Vec<Operation>>>,
    followers: Vec<JoinHandle<Feed>>,
    observer: JoinHandle<Vec<Observation>>,
    operator: JoinHandle<()>,
    /// The index that followers are to come to, known at the end.
    end: Arc<AtomicU64>,
}

/// One run.
struct Torture {
    settings: Settings,
    run: Arc<Run>,
    members: Arc<Mutex<Members>>,
    doors: Doors,
    log: Arc<Log>,
    random: Random,
    interrupted: Arc<AtomicBool>,
    facts: Vec<String>,
}

/// What a run has left.
#[derive(Default)]
struct Outcome {
    operations: Vec<Operation>,
    observations: Vec<Observation>,
    checked: Checked,
}

/// Runs it, and panics if a promise was broken.
pub fn torture(settings: &Settings, network: Kind, facts: Vec<String>) {
    let loopback = if network == Kind::Loopback { " NETWORK=loopback" } else { "" };
    let again = format!(
        "seed {}, {} nodes, {} s of faults; again: make torture SECONDS={} NODES={} SEED={}{loopback}",
        settings.seed,
        settings.nodes,
        settings.chaos.as_secs(),
        settings.chaos.as_secs(),
        settings.nodes,
        settings.seed
    );
    println!("{again}");
    let directory = directory(settings);
    let mut torture = Torture::new(settings, network, facts, &directory);
    let outcome = torture.start().map(|()| torture.go_on());
    let outcome = outcome.unwrap_or_else(|problem| {
        torture.run.violated(problem, Vec::new());
        Outcome::default()
    });
    let (events, violations): (Vec<Event>, _) = (torture.log.all(), torture.run.violations());
    let report = Report {
        again,
        facts: torture.facts.clone(),
        operations: &outcome.operations,
        events: &events,
        faults: torture.log.counts(),
        observations: &outcome.observations,
        checked: outcome.checked,
        violations: &violations,
    };
    println!("{}", report.summary());
    let page = report.write(&directory).expect("the report can be written");
    // Ends all nodes, before anybody looks at what they have left.
    drop(torture);
    if violations.is_empty() {
        clean(&directory);
    }
    println!("report: {}", page.display());
    assert!(violations.is_empty(), "{} violations, see {}", violations.len(), page.display());
    assert!(!outcome.operations.is_empty(), "nothing was done, so nothing is tested");
}

/// Where a run leaves what it has to leave.
fn directory(settings: &Settings) -> PathBuf {
    let name = format!("torture-{}-{}", settings.seed, sandbox::number());
    let directory = Path::new(env!("CARGO_TARGET_TMPDIR")).join(name);
    // One that a process of the same number has left, long ago.
    let _ = std::fs::remove_dir_all(&directory);
    std::fs::create_dir_all(&directory).unwrap();
    directory
}

/// Deletes data and logs of the nodes: nobody has to look at them.
fn clean(directory: &Path) {
    for entry in std::fs::read_dir(directory).unwrap().flatten() {
        if entry.file_name() == "report.html" {
            continue;
        }
        let path = entry.path();
        let _ = if path.is_dir() { std::fs::remove_dir_all(path) } else { std::fs::remove_file(path) };
    }
}

impl Drop for Torture {
    /// Whatever ends a run, nothing that it has started goes on: others may still hold the members.
    fn drop(&mut self) {
        self.run.stop.store(true, Ordering::Relaxed);
        lock(&self.members).end();
    }
}

impl Torture {
    fn new(settings: &Settings, kind: Kind, facts: Vec<String>, directory: &Path) -> Torture {
        let mut random = Random::new(settings.seed);
        let doors: Doors = Arc::new(RwLock::default());
        let mut flags: Vec<String> = FLAGS.iter().map(ToString::to_string).collect();
        flags.extend(["--snapshot-count".to_owned(), random.pick(&SNAPSHOT_COUNTS).to_string()]);
        flags.extend(["--snapshot-catchup-entries".to_owned(), random.pick(&CATCHUP_ENTRIES).to_string()]);
        let network = Network::new(kind, directory.join("network.log")).expect("it was tried out before");
        let program = std::fs::canonicalize(&settings.program).expect("the program has been built");
        let flags_text = flags.join(" ");
        let members = Members::new(network, flags, directory.to_owned(), program, Arc::clone(&doors));
        let mut torture = Torture {
            settings: settings.clone(),
            run: Arc::new(Run::new()),
            members: Arc::new(Mutex::new(members)),
            doors,
            log: Arc::default(),
            random,
            interrupted: sandbox::interruption(),
            facts,
        };
        torture.facts.push(format!("network: {kind:?}; flags: {flags_text}"));
        if faketime().is_none() {
            torture.facts.push("clocks do not jump: libfaketime is not installed here".to_owned());
        }
        torture
    }

    /// Starts the nodes, and makes sure that what is done to their network is done.
    fn start(&mut self) -> Result<(), String> {
        let behind_proxy: Vec<bool> = (0..self.settings.nodes).map(|_| self.random.one_in(2)).collect();
        let mut members = lock(&self.members);
        // Outside of a sandbox a mount would outlast a run that is killed.
        members.found(&behind_proxy, self.random.one_in(2) && sandbox::is_inside())?;
        let ids = members.present();
        if members.member(ids[0]).disk.is_some() {
            self.facts.push(format!("node {} has a small disk", ids[0]));
        }
        for id in &ids {
            members.start(*id);
        }
        if let [a, b, ..] = ids[..] {
            members.network.prove((a, &members.member(a).place), (b, &members.member(b).place))?;
        }
        drop(members);
        for id in ids {
            self.wait_ready(id)?;
        }
        Ok(())
    }

    /// Waits for something that has to happen once all is well.
    fn wait(&self, what: &str, mut probe: impl FnMut() -> bool) -> Result<(), String> {
        let deadline = Instant::now() + QUIET_TIMEOUT;
        while !probe() {
            if Instant::now() > deadline {
                return Err(format!("waited {QUIET_TIMEOUT:?} in vain: {what}"));
            }
            if self.interrupted.load(Ordering::Relaxed) {
                return Err("interrupted".to_owned());
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        Ok(())
    }

    fn ask(&self, id: NodeId, target: &str) -> Option<Vec<u8>> {
        let address = lock(&self.members).member(id).place.direct;
        let mut connection = Connection::with_timeouts(address, Duration::from_secs(1), Duration::from_secs(5));
        let response = connection.request("GET", target, &[], b"").ok()?;
        (response.status == 200).then_some(response.body)
    }

    fn wait_ready(&self, id: NodeId) -> Result<(), String> {
        self.wait(&format!("node {id} is ready"), || self.ask(id, "/_/readyz").is_some())
    }

    fn go_on(&mut self) -> Outcome {
        let threads = self.spawn();
        let mut chaos =
            Chaos::new(Arc::clone(&self.run), Arc::clone(&self.members), Arc::clone(&self.log), self.random.fork());
        let end = Instant::now() + self.settings.chaos;
        while Instant::now() < end && !self.interrupted.load(Ordering::Relaxed) && !self.run.is_violated() {
            chaos.rage(end.min(Instant::now() + Duration::from_millis(500)));
        }
        if self.interrupted.load(Ordering::Relaxed) {
            self.run.violated("interrupted".to_owned(), Vec::new());
            return Outcome::default();
        }
        chaos.heal();
        let alive = self.prove_alive();
        self.run.pause(if self.run.is_violated() { Duration::ZERO } else { CALM });
        self.run.stop.store(true, Ordering::Relaxed);
        let problem = |problem: Result<(), String>| problem.unwrap_or_else(|what| self.run.violated(what, Vec::new()));
        while !threads.operator.is_finished() {
            chaos.look_after_nodes();
            chaos.heal();
            std::thread::sleep(Duration::from_millis(20));
        }
        problem(self.settle(&mut chaos));
        self.conclude(threads, alive)
    }

    fn spawn(&mut self) -> Threads {
        let slots = Arc::new(Slots::new());
        let end = Arc::new(AtomicU64::new(u64::MAX));
        let clients = (0..CLIENTS).map(|number| {
            let client = self.client(number, &slots);
            Builder::new().name(format!("client-{number}")).spawn(move || client.work()).unwrap()
        });
        let clients = clients.collect();
        let followers = (0..FOLLOWERS).map(|number| {
            let (run, doors, end) = (Arc::clone(&self.run), Arc::clone(&self.doors), Arc::clone(&end));
            let random = self.random.fork();
            let body = move || follow(&run, &doors, random, &end);
            Builder::new().name(format!("follower-{number}")).spawn(body).unwrap()
        });
        let followers = followers.collect();
        let (run, doors, over) = (Arc::clone(&self.run), Arc::clone(&self.doors), Arc::clone(&end));
        let observer = Builder::new().name("observer".to_owned()).spawn(move || observe(&run, &doors, &over)).unwrap();
        let operator = Operator {
            run: Arc::clone(&self.run),
            members: Arc::clone(&self.members),
            doors: Arc::clone(&self.doors),
            log: Arc::clone(&self.log),
            random: self.random.fork(),
        };
        let operator = Builder::new().name("operator".to_owned()).spawn(move || operator.work()).unwrap();
        Threads { clients, followers, observer, operator, end }
    }

    fn client(&mut self, number: usize, slots: &Arc<Slots>) -> Client {
        let (run, doors) = (Arc::clone(&self.run), Arc::clone(&self.doors));
        Client::new(number, self.random.fork(), run, doors, Arc::clone(slots))
    }

    /// Writes at every node, soon after all faults are over. Returns what was written.
    fn prove_alive(&mut self) -> Vec<Operation> {
        let healed = Instant::now();
        let mut client = self.client(CLIENTS, &Arc::new(Slots::new()));
        let members = lock(&self.members);
        let staying = members.staying();
        drop(members);
        let mut longest = Duration::ZERO;
        for id in staying {
            loop {
                let doors = self.doors.read().unwrap().clone();
                let Some(door) = doors.into_iter().find(|door| door.id == id) else { break };
                if lock(&self.members).member(id).standing != Standing::Member {
                    break;
                }
                if client.write_at(door) {
                    longest = healed.elapsed();
                    break;
                }
                if healed.elapsed() > HEALED_WRITE_TIMEOUT {
                    let what = format!(
                        "no write succeeded at node {id} within {HEALED_WRITE_TIMEOUT:?} of the end of all faults"
                    );
                    self.run.violated(what, Vec::new());
                    break;
                }
            }
        }
        self.facts.push(format!("after the end of all faults every node took a write within {longest:?}"));
        client.operations
    }

    /// Waits until those who were removed have ended, and all others are at the same index.
    fn settle(&self, chaos: &mut Chaos) -> Result<(), String> {
        self.wait("nodes that were removed have ended", || {
            chaos.look_after_nodes();
            chaos.heal();
            let members = lock(&self.members);
            members.present().len() == members.staying().len()
        })?;
        self.wait("all nodes have applied the same", || {
            let indexes: Vec<Option<u64>> =
                lock_present(&self.members).into_iter().map(|id| self.applied(id)).collect();
            indexes.iter().all(|index| index.is_some() && *index == indexes[0])
        })
    }

    fn applied(&self, id: NodeId) -> Option<u64> {
        serde_json::from_slice::<Value>(&self.ask(id, "/_/status")?).ok()?["applied_index"].as_u64()
    }

    /// Collects what all have seen, and judges it.
    fn conclude(&mut self, threads: Threads, alive: Vec<Operation>) -> Outcome {
        let mut operations = alive;
        for client in threads.clients {
            operations.extend(client.join().expect("a client does not panic"));
        }
        let nodes = lock_present(&self.members);
        let applied = nodes.iter().filter_map(|id| self.applied(*id)).max().unwrap_or(0);
        threads.end.store(applied.max(self.run.newest()), Ordering::Relaxed);
        let feeds: Vec<Feed> =
            threads.followers.into_iter().map(|follower| follower.join().expect("a follower does not panic")).collect();
        let observations = threads.observer.join().expect("an observer does not panic");
        let mut contents: BTreeMap<NodeId, Contents> = BTreeMap::new();
        for id in &nodes {
            match self.contents(*id) {
                Ok(found) => drop(contents.insert(*id, found)),
                Err(problem) => self.run.violated(problem, Vec::new()),
            }
        }
        self.check_resources(&nodes);
        self.check_ends(&nodes);
        let evidence = Evidence { operations: &operations, feeds: &feeds, contents: &contents };
        let checked = judge(&self.run, &evidence);
        Outcome { operations, observations, checked }
    }

    /// All keys of a node with their values and tags, as it has them itself.
    fn contents(&self, id: NodeId) -> Result<Contents, String> {
        let mut contents = Contents::new();
        let mut after = String::new();
        loop {
            let target = format!("/?values=true&consistency=stale&after={after}");
            let page = self.ask(id, &target).ok_or_else(|| format!("node {id} does not list its keys"))?;
            let page = read_page(&page).map_err(|problem| format!("node {id} lists its keys: {problem}"))?;
            let End::Listed { items, more, .. } = page else { return Err("no page".to_owned()) };
            for item in items {
                after.clone_from(&item.key);
                contents.insert(item.key, (item.value.unwrap_or_default(), item.tag));
            }
            if !more {
                return Ok(contents);
            }
        }
    }

    /// Clients have gone, so what nodes had for them must be gone too.
    fn check_resources(&mut self, nodes: &[NodeId]) {
        let limit =
            Resources { descriptors: DESCRIPTORS_MAX, threads: THREADS_MAX, resident_bytes: RESIDENT_BYTES_MAX };
        let members = lock(&self.members);
        let processes: Vec<(NodeId, u32)> =
            nodes.iter().filter_map(|id| Some((*id, members.process_id(*id)?))).collect();
        drop(members);
        let mut most = Resources::default();
        for (id, process) in processes {
            let mut last = Resources::default();
            let settled = self.wait("a node that takes little", || {
                last = Resources::of(process).unwrap_or_default();
                last.is_within(limit)
            });
            if settled.is_err() {
                self.run.violated(format!("node {id} still takes {last} when all clients have gone"), Vec::new());
            }
            most = most.max(last);
        }
        self.facts.push(format!("at the end no node took more than {most}"));
    }

    /// All nodes end in order when they are asked to.
    fn check_ends(&self, nodes: &[NodeId]) {
        let mut members = lock(&self.members);
        nodes.iter().for_each(|id| members.terminate(*id));
        drop(members);
        let ended = self.wait("all nodes have ended after SIGTERM", || {
            let mut members = lock(&self.members);
            for (_, ending) in members.look_for_ends() {
                if let Ending::Unexpected(what) = ending {
                    self.run.violated(what, Vec::new());
                }
            }
            nodes.iter().all(|id| !members.is_up(*id))
        });
        ended.unwrap_or_else(|what| self.run.violated(what, Vec::new()));
    }
}

fn lock_present(members: &Mutex<Members>) -> Vec<NodeId> {
    lock(members).present()
}
