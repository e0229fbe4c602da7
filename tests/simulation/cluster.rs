//! A cluster, its clients, and what befalls them.

mod changes;
mod faults;
mod healing;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use raft::eraftpb::{Message, MessageType};
use raftexample::applier::Done;
use raftexample::data_dir::Received;
use raftexample::driver::{self, REMOVAL_CONFIRMATION_TIMEOUT};
use raftexample::membership::{Membership, NodeId};
use raftexample::message::{AdminRequest, Refusal, WriteReply};
use raftexample::message_check::Offence;
use raftexample::peer_network;
use raftexample::peer_protocol::{Hello, HelloRefusal, PeerMessage};
use raftexample::raft_core::CoreError;
use raftexample::replica::{Answer, Replica};
use raftexample::store::Replacement;

use crate::clients::{Client, Request};
use crate::events::Events;
use crate::invariants::{Checked, Invariants};
use crate::network::{Network, Weather};
use crate::node::{self, Described, Effect, Machine, Met, Process, Settings, SimulatedHost, Waiter};
use crate::random::Random;
use crate::register::History;
use crate::seeds::surviving;
use crate::trace::Trace;

const fn ms(millis: u64) -> Duration {
    Duration::from_millis(millis)
}

/// How long a node lets a request wait.
const REQUEST_TIMEOUT: Duration = ms(3000);

/// How long a client waits for an answer.
const CLIENT_TIMEOUT: Duration = ms(4000);

/// How a node says that its disk is full.
const NO_SPACE: &str = "No space left on device";

/// How a node says that it found out by itself that its data directory is not the one that it had.
const LOST_LOG: &str = "this node lost part of its log";

/// How often a node tries again to make a connection, in ticks.
const HELLO_TICKS: u64 = 3;

/// One in so many answers does not reach its client.
const ANSWERS_LOST: u64 = 200;

/// One in so many turns comes late, as behind a sync that took long: much is taken in until then.
const SLOW_TURNS: u64 = 100;

/// How much later these come.
const SLOW_FACTOR: u64 = 500;

/// The power ends again in one of so many starts, or soon after it: what a start does has to survive that too.
const STARTS_CUT_SHORT: u64 = 8;

/// What is going to happen.
pub enum Event {
    Tick(NodeId, u64),
    Turn(NodeId, u64),
    Apply(NodeId, u64),
    Introduce {
        hello: Hello,
        run: u64,
    },
    Retire(NodeId, u64),
    Arrive {
        hello: Hello,
        run: u64,
        to: NodeId,
        message: PeerMessage,
    },
    Refused {
        node: NodeId,
        run: u64,
        peer: NodeId,
        refusal: HelloRefusal,
    },
    Unreachable {
        node: NodeId,
        run: u64,
        peer: NodeId,
    },
    SnapshotArrives {
        from: NodeId,
        run: u64,
        to: NodeId,
        message: Message,
        file: Vec<u8>,
    },
    SnapshotReceived {
        node: NodeId,
        run: u64,
        from: NodeId,
        message: Message,
        membership: Arc<Membership>,
        state: Box<Replacement>,
    },
    SnapshotSent {
        node: NodeId,
        run: u64,
        to: NodeId,
        delivered: bool,
    },
    SnapshotWritten(NodeId, u64),
    Act(usize),
    Request {
        waiter: Waiter,
        node: NodeId,
        request: Request,
    },
    GiveUp(Waiter),
    Start(NodeId),
    PowerLoss(NodeId, u64),
    /// There is room on the disk again.
    RoomMade(NodeId),
    Fault,
    /// Somebody wants to change the cluster.
    Change,
}

impl Event {
    /// The node it happens to, and in which of its runs; 0 for any.
    fn place(&self) -> Option<(NodeId, u64)> {
        match *self {
            Event::Tick(node, run)
            | Event::Turn(node, run)
            | Event::Apply(node, run)
            | Event::Retire(node, run)
            | Event::SnapshotWritten(node, run)
            | Event::Unreachable { node, run, .. }
            | Event::Refused { node, run, .. }
            | Event::SnapshotReceived { node, run, .. }
            | Event::SnapshotSent { node, run, .. } => Some((node, run)),
            Event::Arrive { to, .. } | Event::SnapshotArrives { to, .. } => Some((to, 0)),
            Event::Request { node, .. } => Some((node, 0)),
            Event::Introduce { ref hello, .. } => Some((hello.to, 0)),
            Event::Act(_)
            | Event::GiveUp(_)
            | Event::Start(_)
            | Event::PowerLoss(..)
            | Event::RoomMade(_)
            | Event::Fault
            | Event::Change => None,
        }
    }
}

/// How a node is ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Death {
    /// The process ends, and the system keeps what it wrote.
    Kill,
    /// The machine ends, and what was not synced is in doubt.
    PowerLoss,
}

/// What becomes of a minority when a majority is healed, for good. The majority must serve.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Minority {
    /// It is healed too.
    Healed,
    /// It stays as it is.
    AsItIs,
    /// It is dead.
    Dead,
    /// It hears the others, and nobody hears it.
    Mute,
    /// The others hear it, and it hears nobody.
    Deaf,
    /// Each of it has links to one healed node, and to nobody else.
    Bridged,
}

/// What kind of run it is.
#[derive(Clone, Debug)]
pub struct Scenario {
    /// Founding members.
    pub nodes: u64,
    /// Clients.
    pub clients: usize,
    /// How long things go wrong.
    pub chaos: Duration,
    /// What becomes of a minority when the rest is healed.
    pub minority: Minority,
    /// Machines that can join, numbered behind the founders.
    pub spares: u64,
}

/// What a run came to, so that tests can tell that they have tested something.
#[derive(Clone, Copy, Debug, Default)]
pub struct Tally {
    pub calls: usize,
    pub answered: usize,
    pub terms: usize,
    pub committed: u64,
    pub deaths: u64,
    pub starts_cut_short: u64,
    pub disk_errors: u64,
    pub snapshots_written: u64,
    pub snapshots_installed: u64,
    pub changes: u64,
    pub changes_done: u64,
    pub transfers_done: u64,
    pub retired: u64,
    pub directories_lost: u64,
    pub disowned: u64,
    pub lost_members_replaced: u64,
    pub beyond_repair: u64,
    pub disks_full: u64,
    pub deaths_of_full_disks: u64,
    pub puts_refused_as_full: u64,
    pub snapshots_failed: u64,
}

impl Tally {
    /// Adds what another run came to.
    pub fn add(&mut self, other: &Tally) {
        self.calls += other.calls;
        self.answered += other.answered;
        self.terms += other.terms;
        self.committed += other.committed;
        self.deaths += other.deaths;
        self.starts_cut_short += other.starts_cut_short;
        self.disk_errors += other.disk_errors;
        self.snapshots_written += other.snapshots_written;
        self.snapshots_installed += other.snapshots_installed;
        self.changes += other.changes;
        self.changes_done += other.changes_done;
        self.transfers_done += other.transfers_done;
        self.retired += other.retired;
        self.directories_lost += other.directories_lost;
        self.disowned += other.disowned;
        self.lost_members_replaced += other.lost_members_replaced;
        self.beyond_repair += other.beyond_repair;
        self.disks_full += other.disks_full;
        self.deaths_of_full_disks += other.deaths_of_full_disks;
        self.puts_refused_as_full += other.puts_refused_as_full;
        self.snapshots_failed += other.snapshots_failed;
    }
}

/// All there is.
pub struct World<'t> {
    scenario: Scenario,
    settings: Settings,
    founders: Membership,
    events: Events<Event>,
    network: Network,
    machines: BTreeMap<NodeId, Machine>,
    clients: Vec<Client>,
    /// Where each client waits for an answer.
    waiting: BTreeMap<usize, NodeId>,
    history: History,
    next_value: u64,
    invariants: Invariants,
    /// The latest run of a peer (second) that a node (first) has met, and remembers on its disk.
    met: BTreeMap<(NodeId, NodeId), Met>,
    /// The voters of every configuration that there ever was: of a joint one both halves.
    configurations: BTreeSet<Vec<NodeId>>,
    /// Whether data directories are lost in this run: few are, so that most runs have all their nodes to the end.
    loses_directories: bool,
    random: Random,
    trace: &'t mut Trace,
    tally: Tally,
    /// The nodes that clients use.
    served: Vec<NodeId>,
    faults: bool,
    clients_act: bool,
    /// What was asked for, by its number.
    changes: Vec<AdminRequest>,
    /// Attempts that failed since the count began.
    attempts_failed: u64,
    /// Writes whose node did not see them applied, because a snapshot that it received held them already.
    hidden_by_snapshots: u64,
    /// Lost members that were removed when all was healed, and who takes their place.
    to_replace: BTreeMap<NodeId, Option<NodeId>>,
}

/// Runs a scenario from a seed.
pub fn run(scenario: &Scenario, seed: u64, trace: &mut Trace) -> Result<Tally, String> {
    let mut world = World::new(scenario, seed, trace);
    for id in world.served.clone() {
        world.start(id)?;
    }
    (0..scenario.clients).for_each(|client| world.events.plan(Duration::ZERO, Event::Act(client)));
    world.events.plan(ms(500), Event::Fault);
    world.events.plan(ms(1000), Event::Change);
    world.run_for(scenario.chaos)?;
    world.heal()?;
    world.run_for(world.settings.election_time() * 6 + CLIENT_TIMEOUT)?;
    if world.is_beyond_repair() {
        world.tally.beyond_repair += 1;
    } else {
        world.replace_lost_members()?;
        world.check_service()?;
    }
    world.finish()?;
    Ok(world.tally)
}

impl<'t> World<'t> {
    fn new(scenario: &Scenario, seed: u64, trace: &'t mut Trace) -> World<'t> {
        let mut random = Random::new(seed);
        let settings = Settings::draw(&mut random);
        let weather = Weather::draw(&mut random);
        let ids: Vec<NodeId> = (1..=scenario.nodes).collect();
        let machines = (1..=scenario.nodes + scenario.spares).map(|id| (id, Machine::new(id, &settings, &mut random)));
        let machines = machines.collect();
        let network = Network::new(weather.clone(), random.fork());
        let clients = (0..scenario.clients).map(|number| Client::new(number, random.fork())).collect();
        trace.note(Duration::ZERO, format_args!("{scenario:?} {settings:?} {weather:?}"));
        World {
            scenario: scenario.clone(),
            settings,
            founders: node::founders(ids.iter().copied()),
            events: Events::new(),
            network,
            machines,
            clients,
            waiting: BTreeMap::new(),
            history: History::default(),
            next_value: 0,
            invariants: Invariants::default(),
            met: BTreeMap::new(),
            configurations: [ids.clone()].into(),
            loses_directories: random.one_in(3),
            random,
            trace,
            tally: Tally::default(),
            served: ids,
            faults: true,
            clients_act: true,
            changes: Vec::new(),
            attempts_failed: 0,
            hidden_by_snapshots: 0,
            to_replace: BTreeMap::new(),
        }
    }

    fn note(&mut self, what: std::fmt::Arguments<'_>) {
        self.trace.note(self.events.now(), what);
    }

    fn run_for(&mut self, time: Duration) -> Checked {
        let end = self.events.now() + time;
        while self.events.now() < end {
            let Some(event) = self.events.next() else { return Err("nothing will ever happen again".to_owned()) };
            self.happens(event)?;
        }
        Ok(())
    }

    fn happens(&mut self, event: Event) -> Checked {
        if let Some((id, run)) = event.place() {
            let machine = &self.machines[&id];
            if run != 0 && run != machine.run {
                return Ok(());
            }
            let now = self.events.now();
            if machine.paused_until > now && machine.process.is_some() {
                self.events.plan(machine.paused_until - now, event);
                return Ok(());
            }
        }
        match event {
            Event::Tick(id, run) => self.tick(id, run),
            Event::Turn(id, _) => self.turn(id),
            Event::Apply(id, _) => self.apply(id),
            Event::Arrive { hello, run, to, message } => self.arrive(&hello, run, to, message),
            Event::Introduce { hello, run } => {
                self.meets(&hello, run, hello.to)?;
                Ok(())
            }
            Event::Retire(id, _) => {
                self.retires(id, "nobody has confirmed its removal for long");
                Ok(())
            }
            Event::Refused { node, run, peer, refusal } => self.refused(node, run, peer, refusal),
            Event::Unreachable { node, peer, .. } => self.input(node, |replica, _| {
                replica.unreachable(peer);
                Ok(())
            }),
            Event::SnapshotArrives { from, run, to, message, file } => {
                self.snapshot_arrives(from, run, to, &message, &file)
            }
            Event::SnapshotReceived { node, from, message, membership, state, .. } => {
                self.note(format_args!("{node} takes the snapshot of {from}"));
                self.input(node, |replica, host| replica.snapshot_received(from, message, membership, state, host))
            }
            Event::SnapshotSent { node, to, delivered, .. } => {
                self.note(format_args!("{node} sent a snapshot to {to}: {delivered}"));
                if let Some(process) = self.process(node) {
                    process.transfer_ended(to);
                }
                self.input(node, |replica, _| {
                    replica.snapshot_sent(to, delivered);
                    Ok(())
                })
            }
            Event::SnapshotWritten(id, _) => self.write_snapshot(id),
            Event::Act(client) => self.act(client),
            Event::Request { waiter, node, request } => self.request(waiter, node, request),
            Event::GiveUp(waiter) => {
                if self.clients[waiter.client].waits(waiter) {
                    self.note(format_args!("client {} gives up", waiter.client));
                    self.attempt_failed(waiter.client, false);
                }
                Ok(())
            }
            Event::Start(id) => self.start(id),
            Event::PowerLoss(id, run) => {
                if self.machines[&id].run == run && self.machines[&id].process.is_some() {
                    self.dies(id, Death::PowerLoss, "the power is gone");
                }
                Ok(())
            }
            Event::RoomMade(id) => {
                self.makes_room(id);
                Ok(())
            }
            Event::Fault => self.fault(),
            Event::Change => self.change(),
        }
    }

    fn process(&mut self, id: NodeId) -> Option<&mut Process> {
        self.machines.get_mut(&id).and_then(|machine| machine.process.as_mut())
    }

    /// Lets the replica of a node take something in, which it will process in its next turn.
    fn input(
        &mut self,
        id: NodeId,
        call: impl FnOnce(&mut Replica<Waiter>, &mut SimulatedHost<'_>) -> Result<(), CoreError>,
    ) -> Checked {
        let now = self.events.now();
        if let Some(process) = self.process(id) {
            process.look_for_room(now);
        }
        self.call(id, call)?;
        let slowness = if self.faults && self.random.one_in(SLOW_TURNS) { SLOW_FACTOR } else { 1 };
        let delay = Duration::from_micros(self.random.below(300) * slowness);
        if let Some(process) = self.process(id)
            && !std::mem::replace(&mut process.turn_planned, true)
        {
            let run = self.machines[&id].run;
            self.events.plan(delay, Event::Turn(id, run));
        }
        Ok(())
    }

    fn call(
        &mut self,
        id: NodeId,
        call: impl FnOnce(&mut Replica<Waiter>, &mut SimulatedHost<'_>) -> Result<(), CoreError>,
    ) -> Checked {
        let Some(process) = self.machines.get_mut(&id).and_then(|machine| machine.process.as_mut()) else {
            return Ok(());
        };
        let mut effects = Vec::new();
        let called = surviving(|| process.call(&mut self.invariants, &mut effects, call));
        for effect in effects {
            self.effect(id, effect)?;
        }
        match called {
            Ok((result, checked)) => {
                checked?;
                match result {
                    Ok(()) => self.observe(id),
                    Err(error) => self.ended(id, &error.to_string()),
                }
            }
            Err(panic) => self.ended(id, &panic),
        }
    }

    /// A node has ended by itself: it may, if its disk fails or is full, or was replaced by another one.
    fn ended(&mut self, id: NodeId, reason: &str) -> Checked {
        let machine = &self.machines[&id];
        if machine.is_lost() && reason.contains(LOST_LOG) {
            self.disowned(id, reason);
            return Ok(());
        }
        let is_full = machine.disk_is_full && reason.contains(NO_SPACE);
        if !(is_full || machine.disk_is_faulty) || reason.contains(LOST_LOG) {
            return Err(format!("node {id} ended: {reason}"));
        }
        self.tally.deaths_of_full_disks += u64::from(is_full);
        let death = if self.random.one_in(2) { Death::Kill } else { Death::PowerLoss };
        self.dies(id, death, reason);
        Ok(())
    }

    /// Compares what a node shows with all that was seen before.
    fn observe(&mut self, id: NodeId) -> Checked {
        let Some(process) = self.machines[&id].process.as_ref() else { return Ok(()) };
        let shown = process.shown();
        if self.invariants.is_new_leader(id, &shown) {
            let log = process.replica.core().log();
            self.invariants.leads(id, shown.term, log.first_index(), |index| log.term(index).ok())?;
            if !self.machines[&id].disk_is_faulty {
                process.check_log(&mut self.invariants)?;
            }
            self.trace.note(self.events.now(), format_args!("{id} leads: {shown:?}"));
        }
        self.invariants.shows(id, shown)
    }

    fn tick(&mut self, id: NodeId, run: u64) -> Checked {
        let now = self.events.now();
        let tick = self.machines[&id].tick;
        self.events.plan(tick, Event::Tick(id, run));
        let Some(process) = self.process(id) else { return Ok(()) };
        let begins_snapshot = process.begin_snapshot(false, now);
        let clock = process.clock(now);
        self.input(id, |replica, host| {
            replica.tick(clock, host);
            Ok(())
        })?;
        if begins_snapshot {
            self.plan_snapshot(id);
        }
        let Some(process) = self.process(id) else { return Ok(()) };
        process.ticked();
        if self.random.one_in(HELLO_TICKS) {
            self.introduces_itself(id);
        }
        Ok(())
    }

    /// A node opens the connections that it has not got, and says hello. Those of a removed node, which has nothing else
    /// to say, are made anew.
    fn introduces_itself(&mut self, id: NodeId) {
        let (now, run) = (self.events.now(), self.machines[&id].run);
        let Some(process) = self.process(id) else { return };
        let hellos: Vec<Hello> = process.unconnected().into_iter().map(|to| process.hello(to)).collect();
        for hello in hellos {
            if let Some(&delay) = self.network.send(now, id, hello.to).first() {
                self.events.plan(delay, Event::Introduce { hello, run });
            }
        }
    }

    fn turn(&mut self, id: NodeId) -> Checked {
        let Some(process) = self.process(id) else { return Ok(()) };
        process.turn_planned = false;
        // Otherwise the next heartbeat tells, or the next proposal.
        let announces = self.random.one_in(4);
        self.call(id, |replica, host| {
            if announces {
                replica.announce_commit();
            }
            while replica.process(host)? {}
            Ok(())
        })?;
        let now = self.events.now();
        let apply_delay = Duration::from_micros(self.random.below(3000));
        let run = self.machines[&id].run;
        let Some(process) = self.process(id) else { return Ok(()) };
        let is_reconfigured = process.follow_members();
        let plans_retirement =
            process.replica.core().is_removed() && !std::mem::replace(&mut process.retirement_planned, true);
        let plans_apply = process.has_to_apply() && !std::mem::replace(&mut process.apply_planned, true);
        let begins_snapshot = process.replica.take_snapshot_wanted() && process.begin_snapshot(true, now);
        if is_reconfigured {
            let halves = self.machines[&id].process.as_ref().map(|process| process.voters());
            self.configurations.extend(halves.into_iter().flatten());
            self.introduces_itself(id);
        }
        if plans_retirement {
            self.events.plan(REMOVAL_CONFIRMATION_TIMEOUT, Event::Retire(id, run));
        }
        if plans_apply {
            self.events.plan(apply_delay, Event::Apply(id, run));
        }
        if begins_snapshot {
            self.plan_snapshot(id);
        }
        Ok(())
    }

    fn apply(&mut self, id: NodeId) -> Checked {
        let now = self.events.now();
        let Some(process) = self.machines.get_mut(&id).and_then(|machine| machine.process.as_mut()) else {
            return Ok(());
        };
        process.apply_planned = false;
        let done = match process.apply(&mut self.invariants) {
            Ok(done) => done,
            Err(Ok(ended)) => return self.ended(id, &ended),
            Err(Err(violation)) => return Err(violation),
        };
        let version = process.applier.version();
        let begins_snapshot = process.begin_snapshot(false, now);
        if process.has_to_apply() {
            process.apply_planned = true;
            let delay = Duration::from_micros(self.random.below(3000));
            self.events.plan(delay, Event::Apply(id, self.machines[&id].run));
        }
        if begins_snapshot {
            self.plan_snapshot(id);
        }
        for (waiter, done) in done {
            if let Done::Admin(membership) = &done {
                self.changed(waiter, membership)?;
                continue;
            }
            if !self.is_answered(waiter) {
                continue;
            }
            let now = self.events.now();
            let client = &mut self.clients[waiter.client];
            match done {
                Done::Write(reply) => {
                    self.trace.note(now, format_args!("client {} of {id}: {reply:?}", waiter.client));
                    match reply {
                        WriteReply::Applied(_) => {}
                        WriteReply::Unknown(_) => self.hidden_by_snapshots += 1,
                        WriteReply::NotApplied(_) => self.attempts_failed += 1,
                    }
                    client.write_ended(&reply, &mut self.history, now)?;
                }
                Done::Admin(_) => unreachable!("told above"),
                Done::Read => {
                    self.trace.note(
                        now,
                        format_args!("client {} of {id}: read at {}", waiter.client, version.applied_index()),
                    );
                    client.read_ended(&version, &mut self.history, now);
                }
            }
            self.goes_on(waiter.client);
        }
        Ok(())
    }

    /// Whether an answer reaches the client, and the client still waits for it.
    fn is_answered(&mut self, waiter: Waiter) -> bool {
        let lost = self.faults && self.random.one_in(ANSWERS_LOST);
        !lost && self.clients[waiter.client].waits(waiter)
    }

    fn plan_snapshot(&mut self, id: NodeId) {
        let run = self.machines[&id].run;
        let delay = ms(self.random.below(100));
        self.events.plan(delay, Event::SnapshotWritten(id, run));
    }

    fn write_snapshot(&mut self, id: NodeId) -> Checked {
        let keep = self.settings.catchup_entries;
        let Some(process) = self.process(id) else { return Ok(()) };
        let Some(capture) = process.capture.take() else { return Ok(()) };
        let files = process.files.clone();
        let info = match files.write(&capture) {
            Ok(info) => info,
            Err(error) if error.is_fatal() => return self.ended(id, &error.to_string()),
            Err(error) => {
                let machine = &self.machines[&id];
                if !(machine.disk_is_faulty || machine.disk_is_full && error.is_full()) {
                    return Err(format!("node {id} can't write a snapshot: {error}"));
                }
                let now = self.events.now();
                self.note(format_args!("{id} goes on without the snapshot of {}: {error}", capture.index()));
                self.tally.snapshots_failed += 1;
                if let Some(process) = self.process(id) {
                    process.snapshot_failed(now);
                }
                return Ok(());
            }
        };
        self.tally.snapshots_written += 1;
        let now = self.events.now();
        if let Some(process) = self.process(id) {
            process.snapshot_written(info.bytes, now);
        }
        self.note(format_args!("{id} wrote the snapshot of {}", info.index));
        let membership = capture.membership().clone();
        self.input(id, |replica, _| replica.snapshot_written(info.index, membership, info.index.saturating_sub(keep)))?;
        if self.process(id).is_some() {
            // What can't be removed now is removed after the next one.
            let _ = files.remove_older(info.index);
        }
        Ok(())
    }

    fn effect(&mut self, id: NodeId, effect: Effect) -> Checked {
        match effect {
            Effect::Send(to, message) => self.send(id, to, message),
            Effect::SendSnapshot(to, message) => self.send_snapshot(id, to, message),
            Effect::Answer(waiter, answer) => return self.answer(waiter, answer),
            Effect::Offended(from, offence) => {
                self.note(format_args!("{id} refuses a message of {from}: {offence}"));
                // Whose directory is lost contradicts others, until it is told to end.
                let is_lost = [id, from].iter().any(|id| self.machines[id].is_lost());
                if !(is_lost || matches!(offence, Offence::Removed(_) | Offence::Stranger(_))) {
                    return Err(format!("node {id} refuses a message of node {from}: {offence}"));
                }
            }
        }
        Ok(())
    }

    fn send(&mut self, from: NodeId, to: NodeId, message: PeerMessage) {
        let now = self.events.now();
        if self.machines.get(&to).is_none_or(|machine| machine.process.is_none()) {
            if self.random.one_in(3) {
                let (delay, run) = (ms(self.random.below(50)), self.machines[&from].run);
                self.events.plan(delay, Event::Unreachable { node: from, run, peer: to });
            }
            return;
        }
        let Some(hello) = self.process(from).map(|process| process.hello(to)) else { return };
        let run = self.machines[&from].run;
        for delay in self.network.send(now, from, to) {
            self.events.plan(delay, Event::Arrive { hello: hello.clone(), run, to, message: message.clone() });
        }
    }

    /// Whether a node takes what a peer sends over a connection that began with this hello; tells the peer if not.
    fn meets(&mut self, hello: &Hello, run: u64, to: NodeId) -> Result<bool, String> {
        let from = hello.from;
        if !self.network.is_up(from, to) {
            return Ok(false);
        }
        let Some(process) = self.process(to) else { return Ok(false) };
        let Err(refusal) = process.meet(hello) else {
            self.has_met(to, from, Met { run, boots: hello.boot >> 32 })?;
            return Ok(true);
        };
        if let Some(reason) = process.failed() {
            self.ended(to, &reason)?;
        }
        self.note(format_args!("{to} refuses {from}: {refusal}"));
        if self.network.is_up(to, from) {
            let delay = ms(self.random.below(20));
            self.events.plan(delay, Event::Refused { node: from, run, peer: to, refusal });
        }
        Ok(false)
    }

    /// A node has taken a hello. It must not, if it knows its sender by what the lost data directory has held and this
    /// one does not: by a later start than that of the copy, or by any if the directory was wiped. (A joiner that met it
    /// once, long ago, and is no member can't know better.)
    fn has_met(&mut self, node: NodeId, peer: NodeId, now: Met) -> Checked {
        let machine = &self.machines[&peer];
        let known = self.met.entry((node, peer)).or_insert(now);
        let knows_better = !machine.is_impostor(known.run) && known.boots > machine.came_back_with;
        if machine.is_impostor(now.run) && knows_better {
            return Err(format!(
                "node {node} has met run {} of node {peer}, and takes run {} for it",
                known.run, now.run
            ));
        }
        if now.run > known.run {
            *known = now;
        }
        if now.run == machine.run
            && let Some(process) = self.process(peer)
        {
            process.is_welcome(node);
        }
        Ok(())
    }

    fn arrive(&mut self, hello: &Hello, run: u64, to: NodeId, message: PeerMessage) -> Checked {
        let from = hello.from;
        if !self.meets(hello, run, to)? {
            return Ok(());
        }
        self.note(format_args!("{from} -> {to}: {}", Described(&message)));
        self.input(to, |replica, host| replica.peer(from, message, host))
    }

    /// A peer does not take this node's messages.
    fn refused(&mut self, id: NodeId, run: u64, peer: NodeId, refusal: HelloRefusal) -> Checked {
        if self.process(id).is_none() {
            return Ok(());
        }
        match peer_network::refused(peer, refusal.clone()) {
            driver::Event::Removed(_) => self.retires(id, "it is told of its removal"),
            driver::Event::Disowned(_, refusal) if self.machines[&id].is_impostor(run) => {
                self.disowned(id, &format!("{peer} refuses it: {refusal}"));
            }
            // Its disk fails, and it may end of that.
            _ if matches!(refusal, HelloRefusal::NotReady(_)) => {}
            _ => return Err(format!("node {peer} refuses node {id}: {refusal}")),
        }
        Ok(())
    }

    /// A node ends because its data directory is not the one that it had. Its operator may be slow to understand.
    fn disowned(&mut self, id: NodeId, reason: &str) {
        self.note(format_args!("{id} is disowned: {reason}"));
        self.tally.disowned += 1;
        self.leaves(id);
        self.machines[&id].disk.clear_faults();
        if self.faults && self.random.one_in(2) {
            let delay = self.random.time(&(ms(10)..ms(4000)));
            self.events.plan(delay, Event::Start(id));
        }
    }

    /// A node ends because it was removed from the cluster.
    fn retires(&mut self, id: NodeId, reason: &str) {
        self.note(format_args!("{id} retires: {reason}"));
        self.tally.retired += 1;
        self.leaves(id);
        self.machines.get_mut(&id).expect("machines stay").is_removed = true;
    }

    fn send_snapshot(&mut self, from: NodeId, to: NodeId, message: Message) {
        let run = self.machines[&from].run;
        let index = message.get_snapshot().get_metadata().index;
        let file = self.process(from).and_then(|process| read_snapshot(process, index));
        let arrival = self.network.send(self.events.now(), from, to).first().copied();
        let transfer = ms(5 + self.random.below(50));
        match (file, arrival) {
            (Some(file), Some(arrival)) => {
                self.events.plan(arrival + transfer, Event::SnapshotArrives { from, run, to, message, file });
            }
            _ => {
                self.events.plan(transfer, Event::SnapshotSent { node: from, run, to, delivered: false });
            }
        }
    }

    /// Does what a node does with a snapshot's file, see the peer inbox of a real one.
    fn snapshot_arrives(
        &mut self,
        from: NodeId,
        run: u64,
        to: NodeId,
        announced: &Message,
        mut file: &[u8],
    ) -> Checked {
        let metadata = announced.get_snapshot().get_metadata();
        let receive = |process: &mut Process| {
            process.files.check_room("a snapshot", file.len() as u64)?;
            process.files.receive(metadata.index, metadata.term, &mut file)
        };
        let received = self.process(to).map(receive);
        let (returns, delay) = (self.network.is_up(to, from), ms(1 + self.random.below(20)));
        let delivered = matches!(received, Some(Ok(_))) && returns;
        self.events.plan(delay, Event::SnapshotSent { node: from, run, to, delivered });
        let Received { state, membership, info } = match received {
            Some(Ok(received)) => received,
            Some(Err(error)) if error.is_fatal() => return self.ended(to, &error.to_string()),
            _ => return Ok(()),
        };
        let mut message = Message { msg_type: MessageType::MsgSnapshot, from, to, ..Message::default() };
        message.term = announced.term;
        let label = message.mut_snapshot().mut_metadata();
        (label.index, label.term) = (info.index, metadata.term);
        label.set_conf_state(membership.conf_state.clone());
        self.tally.snapshots_installed += 1;
        let delay = Duration::from_micros(self.random.below(5000));
        let run = self.machines[&to].run;
        let state = Box::new(Replacement::new(state, drop));
        self.events.plan(delay, Event::SnapshotReceived { node: to, run, from, message, membership, state });
        Ok(())
    }

    fn act(&mut self, client: usize) -> Checked {
        if !self.clients_act || self.waiting.contains_key(&client) {
            return Ok(());
        }
        let now = self.events.now();
        if self.faults {
            let there = |machine: &&Machine| machine.run > 0 && !machine.is_removed;
            self.served = self.machines.values().filter(there).map(|machine| machine.id).collect();
        }
        if self.served.is_empty() {
            return Err("all nodes were removed".to_owned());
        }
        let actor = &mut self.clients[client];
        let request = actor.act(&mut self.history, &mut self.next_value, false, now);
        let (waiter, node) = (actor.waiter(), actor.choose(&self.served));
        self.trace.note(now, format_args!("client {client} asks {node}: {}", actor.doing()));
        self.waiting.insert(client, node);
        let delay = Duration::from_micros(50 + self.random.below(500));
        self.events.plan(delay, Event::Request { waiter, node, request });
        self.events.plan(CLIENT_TIMEOUT, Event::GiveUp(waiter));
        Ok(())
    }

    fn request(&mut self, waiter: Waiter, node: NodeId, request: Request) -> Checked {
        let now = self.events.now();
        let Some(process) = self.process(node) else {
            if self.clients[waiter.client].waits(waiter) {
                self.attempt_failed(waiter.client, true);
            }
            return Ok(());
        };
        let deadline = process.clock(now) + REQUEST_TIMEOUT;
        self.input(node, |replica, host| {
            match request {
                Request::Write(command) => replica.write(command, deadline, waiter, host),
                Request::Read => replica.read(deadline, waiter, host),
            }
            Ok(())
        })
    }

    fn answer(&mut self, waiter: Waiter, answer: Answer) -> Checked {
        if let Answer::Admin(reply) = &answer {
            self.note(format_args!("change {} ends: {reply:?}", waiter.attempt));
            return Ok(());
        }
        if !self.is_answered(waiter) {
            return Ok(());
        }
        self.note(format_args!("client {} is told {answer:?}", waiter.client));
        match answer {
            Answer::Write(reply) => {
                self.attempts_failed += 1;
                if let WriteReply::NotApplied(Refusal::Full(why)) = &reply {
                    self.tally.puts_refused_as_full += 1;
                    if !self.clients[waiter.client].puts() {
                        return Err(format!("client {} may not even delete: {why}", waiter.client));
                    }
                }
                self.clients[waiter.client].write_ended(&reply, &mut self.history, self.events.now())?;
                self.goes_on(waiter.client);
            }
            Answer::Read(_) => self.attempt_failed(waiter.client, true),
            Answer::Admin(_) => unreachable!("told above"),
        }
        Ok(())
    }

    fn attempt_failed(&mut self, client: usize, refused: bool) {
        self.attempts_failed += 1;
        self.clients[client].attempt_failed(refused, &mut self.history);
        self.goes_on(client);
    }

    fn goes_on(&mut self, client: usize) {
        self.waiting.remove(&client);
        let pause = self.clients[client].pause();
        self.events.plan(pause, Event::Act(client));
    }

    fn start(&mut self, id: NodeId) -> Checked {
        let now = self.events.now();
        let Some(contacts) = self.contacts(id) else {
            self.events.plan(ms(300), Event::Start(id));
            return Ok(());
        };
        let machine = self.machines.get_mut(&id).expect("machines stay");
        if machine.process.is_some() || machine.is_removed || machine.is_dead {
            return Ok(());
        }
        if self.faults && self.random.one_in(STARTS_CUT_SHORT) {
            machine.power_ends_during_start(&mut self.random);
        }
        let started = surviving(|| machine.start(&self.founders, contacts, &self.settings, now, &mut self.random));
        if let Err(reason) = started.and_then(|started| started) {
            if !(machine.disk_is_faulty || machine.disk_is_full && reason.contains(NO_SPACE)) {
                return Err(format!("node {id} can't be started: {reason}"));
            }
            self.tally.starts_cut_short += u64::from(machine.disk_is_faulty);
            self.dies(id, Death::PowerLoss, &reason);
            return Ok(());
        }
        let (run, tick) = (machine.run, machine.tick);
        let process = machine.process.as_ref().expect("just started");
        let shown = process.shown();
        if !machine.disk_is_faulty {
            process.check_log(&mut self.invariants)?;
        }
        self.invariants.restarts(id, shown)?;
        self.note(format_args!("{id} starts: {shown:?}"));
        self.events.plan(tick, Event::Tick(id, run));
        self.events.plan(Duration::ZERO, Event::Turn(id, run));
        Ok(())
    }

    /// What a node that starts is told of the cluster by a member: a founder knows it, a joiner has to ask.
    fn contacts(&mut self, id: NodeId) -> Option<Membership> {
        if self.founders.members.contains_key(&id) {
            return Some(Membership::default());
        }
        let members = self.machines.values().filter_map(|machine| machine.process.as_ref());
        let known: Vec<&Arc<Membership>> = members
            .map(|process| process.replica.core().membership())
            .filter(|membership| !membership.members.is_empty())
            .collect();
        match known.is_empty() {
            // Who has joined before starts without.
            true => (self.machines[&id].run > 0).then(Membership::default),
            false => Some((**self.random.pick(&known)).as_ref().clone()),
        }
    }

    /// Ends a node and plans its restart. Clients that wait for it are left without an answer.
    fn dies(&mut self, id: NodeId, death: Death, reason: &str) {
        self.note(format_args!("{id} dies by {death:?}: {reason}"));
        self.tally.deaths += 1;
        self.leaves(id);
        let machine = self.machines.get_mut(&id).expect("machines stay");
        match death {
            Death::Kill => machine.disk.clear_faults(),
            Death::PowerLoss => machine.disk.crash(self.random.next()),
        }
        let delay = self.random.time(&(ms(10)..ms(4000)));
        self.events.plan(delay, Event::Start(id));
    }

    /// A node's process is gone.
    fn leaves(&mut self, id: NodeId) {
        let machine = self.machines.get_mut(&id).expect("machines stay");
        machine.process = None;
        machine.disk_is_faulty = false;
        machine.paused_until = Duration::ZERO;
        let left: Vec<usize> =
            self.waiting.iter().filter(|(_, node)| **node == id).map(|(client, _)| *client).collect();
        for client in left {
            self.attempt_failed(client, false);
        }
    }
}

fn read_snapshot(process: &Process, index: u64) -> Option<Vec<u8>> {
    let (file, bytes) = process.files.open(index).ok()?;
    let mut content = vec![0; bytes as usize];
    file.read_exact_at(&mut content, 0).ok()?;
    Some(content)
}
