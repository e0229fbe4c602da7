//! The faults, and when they come: all chosen by the seed.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use raftexample::driver::FREE_BYTES_RESERVE;
use raftexample::membership::NodeId;
use rustix::process::Signal;

use crate::history::Run;
use crate::members::{Ending, Members, Standing};
use crate::proxy::{Link, Party};
use crate::random::Random;

/// Faults that may be there at the same time.
const FAULTS_MAX: usize = 3;

/// Between the beginnings of two faults.
const PAUSE: Range<Duration> = Duration::from_millis(50)..Duration::from_millis(1500);

/// How long a fault stays: most are shorter than two elections, some outlast every timeout of the program.
const SHORT: Range<Duration> = Duration::from_millis(50)..Duration::from_millis(2500);
const LONG: Range<Duration> = Duration::from_secs(3)..Duration::from_secs(8);
const LONG_PERCENT: u64 = 15;

/// How often the schedule is looked at.
const STEP: Duration = Duration::from_millis(10);

/// How long a node may take to end after SIGTERM: what is in flight has `--request-timeout`, handing over leadership
/// two seconds; the rest is for a busy machine.
const TERMINATION_TIMEOUT: Duration = Duration::from_secs(20);

/// How late connections are: below and above the election timeout.
const DELAYS: [Range<Duration>; 3] = [
    Duration::from_millis(1)..Duration::from_millis(20),
    Duration::from_millis(20)..Duration::from_millis(200),
    Duration::from_millis(200)..Duration::from_millis(900),
];

/// Seconds that a clock jumps by.
const JUMPS: [i64; 6] = [-86_400 * 365, -3600, -2, 2, 3600, 86_400 * 365];

/// Something that was done to the cluster, for the report.
#[derive(Clone, Debug)]
pub struct Event {
    /// What, for counting.
    pub kind: &'static str,
    /// What exactly.
    pub what: String,
    /// The nodes it was done to; none for the network as a whole.
    pub nodes: Vec<NodeId>,
    /// Its time.
    pub from: Duration,
    /// Its end, once that has come.
    pub until: Option<Duration>,
}

/// What was done, in the order of its beginnings.
#[derive(Default)]
pub struct Log(Mutex<Vec<Event>>);

impl Log {
    fn events(&self) -> MutexGuard<'_, Vec<Event>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Something begins. Returns its place, for [`Log::end`].
    pub fn begin(&self, run: &Run, kind: &'static str, what: String, nodes: &[NodeId]) -> usize {
        let mut events = self.events();
        events.push(Event { kind, what, nodes: nodes.to_vec(), from: run.now(), until: None });
        events.len() - 1
    }

    /// It is over.
    pub fn end(&self, run: &Run, place: usize) {
        self.events()[place].until = Some(run.now());
    }

    /// Something that takes no time.
    pub fn moment(&self, run: &Run, kind: &'static str, what: String, nodes: &[NodeId]) {
        let place = self.begin(run, kind, what, nodes);
        self.end(run, place);
    }

    /// All so far.
    pub fn all(&self) -> Vec<Event> {
        self.events().clone()
    }

    /// How many there were of each kind.
    pub fn counts(&self) -> BTreeMap<&'static str, usize> {
        let mut counts = BTreeMap::new();
        for event in self.events().iter() {
            *counts.entry(event.kind).or_default() += 1;
        }
        counts
    }
}

/// How a fault is ended.
enum Undo {
    /// They are down, or were told to end.
    Start(Vec<NodeId>),
    Resume(Vec<NodeId>),
    Unblock(Vec<Link>),
    EndDelay(Vec<Link>),
    Release,
    FreeDisk(NodeId),
    SetClock(NodeId),
}

impl Undo {
    /// Nodes to which nothing else is done as long as this lasts.
    fn nodes(&self) -> &[NodeId] {
        match self {
            Undo::Start(nodes) | Undo::Resume(nodes) => nodes,
            _ => &[],
        }
    }
}

struct Active {
    from: Instant,
    until: Instant,
    event: usize,
    undo: Undo,
}

/// The one who does it.
pub struct Chaos {
    run: Arc<Run>,
    members: Arc<Mutex<Members>>,
    log: Arc<Log>,
    random: Random,
    active: Vec<Active>,
}

/// The members, whatever became of others who had them.
pub fn lock(members: &Mutex<Members>) -> MutexGuard<'_, Members> {
    members.lock().unwrap_or_else(PoisonError::into_inner)
}

fn list(nodes: &[NodeId]) -> String {
    nodes.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ")
}

impl Chaos {
    /// Nothing is done yet.
    pub fn new(run: Arc<Run>, members: Arc<Mutex<Members>>, log: Arc<Log>, random: Random) -> Chaos {
        Chaos { run, members, log, random, active: Vec::new() }
    }

    /// Does one thing after the other, and several at a time, until `end`, or the first violation.
    pub fn rage(&mut self, end: Instant) {
        let mut next = Instant::now();
        while Instant::now() < end && !self.run.stopping() && !self.run.is_violated() {
            self.look_after_nodes();
            self.finish_due();
            if Instant::now() >= next && self.active.len() < FAULTS_MAX {
                self.begin();
                next = Instant::now() + self.random.time(&PAUSE);
            }
            thread::sleep(STEP);
        }
    }

    /// Ends all faults, and waits until all nodes have been started.
    pub fn heal(&mut self) {
        for active in &mut self.active {
            active.until = Instant::now();
        }
        while !self.active.is_empty() {
            self.look_after_nodes();
            self.finish_due();
            thread::sleep(STEP);
        }
    }

    /// Notices nodes that have ended by themselves, and starts those again that may do so.
    pub fn look_after_nodes(&mut self) {
        let endings = lock(&self.members).look_for_ends();
        for (id, ending) in endings {
            match ending {
                Ending::AsTold => {}
                Ending::Removed => self.log.moment(&self.run, "removed", format!("{id} has left"), &[id]),
                Ending::Restartable(why) => {
                    let event = self.log.begin(&self.run, "gave up", format!("{id} has ended: {why}"), &[id]);
                    let from = Instant::now();
                    let until = from + self.random.time(&SHORT);
                    self.active.push(Active { from, until, event, undo: Undo::Start(vec![id]) });
                }
                Ending::Unexpected(what) => self.run.violated(what, Vec::new()),
            }
        }
    }

    fn finish_due(&mut self) {
        let now = Instant::now();
        let (due, active) = std::mem::take(&mut self.active).into_iter().partition(|active| active.until <= now);
        self.active = active;
        for active in due {
            if let Some(left) = self.finish(active) {
                self.active.push(left);
            }
        }
    }

    /// Returns it if it is not over yet.
    fn finish(&mut self, active: Active) -> Option<Active> {
        let mut members = lock(&self.members);
        match &active.undo {
            Undo::Start(nodes) => {
                for id in nodes {
                    if members.is_up(*id) {
                        if active.from.elapsed() < TERMINATION_TIMEOUT {
                            drop(members);
                            return Some(active);
                        }
                        let what = format!("node {id} has not ended {TERMINATION_TIMEOUT:?} after SIGTERM");
                        self.run.violated(what, Vec::new());
                    } else if members.member(*id).standing != Standing::Gone {
                        members.start(*id);
                    }
                }
            }
            Undo::Resume(nodes) => nodes.iter().for_each(|id| members.signal(*id, Signal::CONT)),
            Undo::Unblock(links) => links.iter().for_each(|link| members.network.unblock(*link)),
            Undo::EndDelay(links) => links.iter().for_each(|link| members.network.weather.end_delay(*link)),
            Undo::Release => members.network.weather.release(),
            Undo::FreeDisk(id) => members.free_disk(*id),
            Undo::SetClock(id) => members.set_clock(*id, 0),
        }
        self.log.end(&self.run, active.event);
        None
    }

    fn begin(&mut self) {
        match self.random.below(100) {
            0..24 => self.kill(),
            24..40 => self.stop(),
            40..46 => self.terminate(),
            46..70 => self.partition(),
            70..90 => self.disturb(),
            90..95 => self.fill_disk(),
            _ => self.change_clock(),
        }
    }

    fn began(&mut self, kind: &'static str, what: String, nodes: &[NodeId], undo: Undo) {
        let range = if self.random.percent(LONG_PERCENT) { LONG } else { SHORT };
        let event = self.log.begin(&self.run, kind, what, nodes);
        let from = Instant::now();
        self.active.push(Active { from, until: from + self.random.time(&range), event, undo });
    }

    /// Some of the nodes that run undisturbed: mostly one, sometimes all.
    fn victims(&mut self) -> Vec<NodeId> {
        let busy: Vec<NodeId> = self.active.iter().flat_map(|active| active.undo.nodes()).copied().collect();
        let members = lock(&self.members);
        let mut nodes = members.present();
        nodes.retain(|id| members.is_up(*id) && !busy.contains(id));
        drop(members);
        self.random.shuffle(&mut nodes);
        let count = match self.random.below(10) {
            0..6 => 1,
            6..8 => 2,
            8 => 1 + self.random.below(nodes.len().max(1) as u64) as usize,
            _ => nodes.len(),
        };
        nodes.truncate(count);
        nodes.sort_unstable();
        nodes
    }

    fn kill(&mut self) {
        let nodes = self.victims();
        if nodes.is_empty() {
            return;
        }
        lock(&self.members).kill(&nodes);
        self.began("SIGKILL", format!("SIGKILL to {}", list(&nodes)), &nodes, Undo::Start(nodes.clone()));
    }

    fn stop(&mut self) {
        let nodes = self.victims();
        if nodes.is_empty() {
            return;
        }
        let members = lock(&self.members);
        nodes.iter().for_each(|id| members.signal(*id, Signal::STOP));
        drop(members);
        self.began("SIGSTOP", format!("SIGSTOP to {}", list(&nodes)), &nodes, Undo::Resume(nodes.clone()));
    }

    fn terminate(&mut self) {
        let Some(id) = self.victims().into_iter().find(|id| lock(&self.members).has_spoken(*id)) else { return };
        lock(&self.members).terminate(id);
        self.began("SIGTERM", format!("SIGTERM to {id}"), &[id], Undo::Start(vec![id]));
    }

    fn partition(&mut self) {
        if self.active.iter().any(|active| matches!(active.undo, Undo::Unblock(_))) {
            return;
        }
        let nodes = lock(&self.members).present();
        let (what, links) = partition(nodes, &mut self.random);
        if links.is_empty() {
            return;
        }
        let members = lock(&self.members);
        links.iter().for_each(|link| members.network.block(*link));
        drop(members);
        self.began("partition", what, &[], Undo::Unblock(links));
    }

    /// Lets proxies make trouble.
    fn disturb(&mut self) {
        let parties: Vec<Party> = self.parties();
        let mut links = Vec::new();
        for from in &parties {
            for to in parties.iter().filter(|to| *to != from && self.random.percent(40)) {
                links.push((*from, *to));
            }
        }
        let weather = Arc::clone(&lock(&self.members).network.weather);
        match self.random.below(4) {
            0 => {
                let range = self.random.pick(&DELAYS).clone();
                links.iter().for_each(|link| weather.delay(*link, range.clone()));
                let what = format!("{} links late by {range:?}", links.len());
                self.began("delay", what, &[], Undo::EndDelay(links));
            }
            1 => {
                let count: usize = links.iter().map(|link| weather.hold(*link)).sum();
                self.began("hold", format!("{count} connections held, new ones overtake them"), &[], Undo::Release);
            }
            2 => {
                let count: usize = links.iter().map(|link| weather.cut(*link)).sum();
                self.log.moment(&self.run, "cut", format!("{count} connections cut"), &[]);
            }
            _ => {
                let half = |link: &Link| weather.half_close(*link, self.random.one_in(2));
                let count: usize = links.iter().map(half).sum();
                self.log.moment(&self.run, "half-close", format!("{count} connections half-closed"), &[]);
            }
        }
    }

    fn parties(&self) -> Vec<Party> {
        let present = lock(&self.members).present();
        present.into_iter().map(Party::Node).chain([Party::Clients]).collect()
    }

    fn fill_disk(&mut self) {
        if self.active.iter().any(|active| matches!(active.undo, Undo::FreeDisk(_))) {
            return;
        }
        let mut members = lock(&self.members);
        let small = members.present().into_iter().find(|id| members.member(*id).disk.is_some());
        let Some(id) = small else { return };
        let left = if self.random.one_in(3) { 0 } else { self.random.below(FREE_BYTES_RESERVE) };
        members.fill_disk(id, left);
        drop(members);
        self.began("full disk", format!("{} KiB left on the disk of {id}", left >> 10), &[id], Undo::FreeDisk(id));
    }

    fn change_clock(&mut self) {
        if !lock(&self.members).has_clocks() {
            return;
        }
        let nodes = lock(&self.members).present();
        let id = *self.random.pick(&nodes);
        if self.active.iter().any(|active| matches!(active.undo, Undo::SetClock(busy) if busy == id)) {
            return;
        }
        let jump = *self.random.pick(&JUMPS);
        lock(&self.members).set_clock(id, jump);
        self.began("clock", format!("the clock of {id} jumps by {jump} s"), &[id], Undo::SetClock(id));
    }
}

/// Both directions.
fn between(a: Party, b: Party) -> [Link; 2] {
    [(a, b), (b, a)]
}

/// A partition of any shape: what it is, and which links are cut.
fn partition(mut nodes: Vec<NodeId>, random: &mut Random) -> (String, Vec<Link>) {
    random.shuffle(&mut nodes);
    let party = |id: &NodeId| Party::Node(*id);
    let apart = |some: &[NodeId], others: &[NodeId]| -> Vec<Link> {
        some.iter().flat_map(|a| others.iter().flat_map(move |b| between(party(a), party(b)))).collect()
    };
    let half = nodes.len() / 2;
    match random.below(7) {
        0 => (format!("{} alone", nodes[0]), apart(&nodes[..1], &nodes[1..])),
        1 => {
            let (some, others) = nodes.split_at(half);
            (format!("{} apart from {}", list(some), list(others)), apart(some, others))
        }
        2 => (format!("ring of majorities {}", list(&nodes)), ring(&nodes)),
        3 => {
            let (some, others) = nodes.split_at(half);
            let Some((bridge, others)) = others.split_first() else { return (String::new(), Vec::new()) };
            (format!("{} and {} with the bridge {bridge}", list(some), list(others)), apart(some, others))
        }
        4 => {
            let (one, others) = (party(&nodes[0]), &nodes[1..]);
            let deaf = random.one_in(2);
            let links = others.iter().map(|other| if deaf { (party(other), one) } else { (one, party(other)) });
            (
                format!("{} {} the others", nodes[0], if deaf { "does not hear" } else { "is not heard by" }),
                links.collect(),
            )
        }
        5 => {
            let pairs = nodes.iter().flat_map(|a| nodes.iter().map(move |b| (party(a), party(b))));
            let links: Vec<Link> = pairs.filter(|(a, b)| a != b && random.percent(40)).collect();
            (format!("{} directions of {}", links.len(), list(&nodes)), links)
        }
        _ => {
            let count = 1 + random.below(nodes.len() as u64) as usize;
            let links = nodes[..count].iter().flat_map(|id| between(party(id), Party::Clients));
            // Only answers, only requests, or both.
            let (mode, nodes) = (random.below(3), list(&nodes[..count]));
            let cut = |link: &Link| mode == 2 || (mode == 0) == (link.1 == Party::Clients);
            let what = ["answers of", "requests to", "all between clients and"][mode as usize];
            (format!("{what} {nodes}"), links.filter(cut).collect())
        }
    }
}

/// Each node is connected with a majority, and no two with the same. Three nodes that are all connected are one
/// partition already, so there each hears one other only.
fn ring(nodes: &[NodeId]) -> Vec<Link> {
    let count = nodes.len();
    let mut links = Vec::new();
    for from in 0..count {
        for to in (0..count).filter(|to| *to != from) {
            let steps = (to + count - from) % count;
            let reach = (count / 2).div_ceil(2).max(1);
            let connected = if count < 5 { steps == 1 } else { steps <= reach || count - steps <= reach };
            if !connected {
                links.push((Party::Node(nodes[from]), Party::Node(nodes[to])));
            }
        }
    }
    links
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn in_a_ring_each_node_hears_a_majority_of_its_own() {
        for count in 5..8 {
            let nodes: Vec<NodeId> = (1..=count).collect();
            let cut = ring(&nodes);
            let heard = |by: NodeId| -> BTreeSet<NodeId> {
                nodes.iter().copied().filter(|id| !cut.contains(&(Party::Node(*id), Party::Node(by)))).collect()
            };
            let views: BTreeSet<BTreeSet<NodeId>> = nodes.iter().map(|id| heard(*id)).collect();
            assert_eq!(views.len() as u64, count, "{count} nodes: {views:?}");
            assert!(views.iter().all(|view| view.len() as u64 > count / 2), "{count} nodes: {views:?}");
        }
        assert_eq!(ring(&[1, 2, 3]).len(), 3, "of three, each is not heard by one");
    }

    #[test]
    fn partitions_come_in_all_shapes_and_cut_something() {
        let mut shapes = BTreeSet::new();
        for seed in 0..200 {
            let mut random = Random::new(seed);
            let (what, links) = partition(vec![1, 2, 3, 4, 5], &mut random);
            let distinct: BTreeSet<&Link> = links.iter().collect();
            assert_eq!(distinct.len(), links.len(), "{what}: {links:?}");
            assert!(links.iter().all(|(from, to)| from != to), "{what}: {links:?}");
            shapes.insert(what.replace(|c: char| c.is_ascii_digit() || c == ',' || c == ' ', ""));
        }
        assert!(shapes.len() >= 10, "{shapes:?}");
    }
}
