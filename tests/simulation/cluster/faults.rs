//! What goes wrong: power, disks, links, processes and their operators.

use raftexample::membership::{Membership, NodeId};
use raftexample::memory_disk::{Failure, MemoryDisk, Operation};

use super::{Death, Event, Machine, World, ms};
use crate::invariants::Checked;
use crate::network::Weather;

impl World<'_> {
    /// Something goes wrong, or right again.
    pub(super) fn fault(&mut self) -> Checked {
        if !self.faults {
            return Ok(());
        }
        let pause = self.random.time(&(ms(20)..ms(2000)));
        self.events.plan(pause, Event::Fault);
        let there = |machine: &&Machine| machine.run > 0 && !machine.is_removed;
        let ids: Vec<NodeId> = self.machines.values().filter(there).map(|machine| machine.id).collect();
        if ids.is_empty() {
            return Err("all nodes were removed".to_owned());
        }
        let id = *self.random.pick(&ids);
        match self.random.below(20) {
            0 => self.running(id, |world| world.dies(id, Death::PowerLoss, "power loss")),
            1 => self.running(id, |world| world.dies(id, Death::Kill, "kill")),
            2 if self.random.one_in(3) => {
                for id in ids {
                    self.running(id, |world| world.dies(id, Death::PowerLoss, "power loss of all"));
                }
            }
            3 | 4 => self.running(id, |world| world.power_will_end(id)),
            5 => self.running(id, |world| world.disk_will_fail(id)),
            6 | 7 if ids.len() > 1 => {
                let partition = self.network.draw_partition(&ids);
                self.note(format_args!("partition: {partition}"));
            }
            8 | 9 => {
                self.note(format_args!("all links are mended"));
                self.network.heal();
            }
            10 => {
                let cuts: Vec<_> = self.network.cuts().collect();
                if let Some(&(from, to)) = (!cuts.is_empty()).then(|| self.random.pick(&cuts)) {
                    self.note(format_args!("the link from {from} to {to} is mended"));
                    self.network.mend(from, to);
                }
            }
            11 => {
                let weather = Weather::draw(&mut self.random);
                self.note(format_args!("{weather:?}"));
                self.network.set_weather(weather);
            }
            12 | 13 => {
                let pause = self.random.time(&(ms(100)..ms(5000)));
                self.note(format_args!("{id} stands still for {pause:?}"));
                let until = self.events.now() + pause;
                self.machines.get_mut(&id).expect("machines stay").paused_until = until;
            }
            14 => {
                self.note(format_args!("{id} hands over, if it leads"));
                return self.input(id, |replica, _| {
                    replica.hand_over();
                    Ok(())
                });
            }
            15 => self.disk_fills(id),
            16 if self.loses_directories => self.copies(id),
            17 | 18 if self.loses_directories => self.loses_directory(),
            _ => {
                let now = self.events.now();
                if self.process(id).is_some_and(|process| process.begin_snapshot(true, now)) {
                    self.plan_snapshot(id);
                }
            }
        }
        Ok(())
    }

    pub(super) fn running(&mut self, id: NodeId, happens: impl FnOnce(&mut Self)) {
        if self.process(id).is_some() {
            happens(self);
        }
    }

    /// The power will end in the middle of something.
    fn power_will_end(&mut self, id: NodeId) {
        let nth = 1 + self.random.below(40);
        self.note(format_args!("the power of {id} ends at change {nth}"));
        let machine = self.machines.get_mut(&id).expect("machines stay");
        machine.disk.stop_at(nth);
        machine.disk_is_faulty = true;
        let (delay, run) = (ms(self.random.below(3000)), machine.run);
        self.events.plan(delay, Event::PowerLoss(id, run));
    }

    fn disk_will_fail(&mut self, id: NodeId) {
        let nth = 1 + self.random.below(20);
        let operation =
            *self.random.pick(&[None, Some(Operation::Sync), Some(Operation::Write), Some(Operation::Sync)]);
        let failure = *self.random.pick(&[Failure::Error, Failure::Short]);
        self.note(format_args!("the disk of {id} fails {operation:?} {nth}: {failure:?}"));
        self.tally.disk_errors += 1;
        let machine = self.machines.get_mut(&id).expect("machines stay");
        machine.disk.fail(operation, nth, failure);
        machine.disk_is_faulty = true;
    }

    /// Something else takes the space on the disk of a node, for a while.
    fn disk_fills(&mut self, id: NodeId) {
        let left = self.random.below(self.settings.reserve_bytes * 3 / 2);
        let machine = self.machines.get_mut(&id).expect("machines stay");
        machine.disk.set_capacity(Some(machine.disk.used_bytes() + left));
        machine.disk_is_full = true;
        self.tally.disks_full += 1;
        self.note(format_args!("the disk of {id} has {left} bytes left"));
        let delay = self.random.time(&(ms(500)..ms(8000)));
        self.events.plan(delay, Event::RoomMade(id));
    }

    /// There is room on the disk of a node again.
    pub(super) fn makes_room(&mut self, id: NodeId) {
        let machine = self.machines.get_mut(&id).expect("machines stay");
        if std::mem::take(&mut machine.disk_is_full) {
            machine.disk.set_capacity(None);
            self.note(format_args!("there is room on the disk of {id}"));
        }
    }

    /// Somebody takes a copy of a data directory, against all advice.
    fn copies(&mut self, id: NodeId) {
        let machine = self.machines.get_mut(&id).expect("machines stay");
        if machine.boots > 0 && !machine.is_lost() {
            machine.copy();
            self.note(format_args!("the directory of {id} is copied"));
        }
    }

    /// A member's data directory is wiped, or replaced by an older copy of it, and it is started again under its id.
    ///
    /// Others must notice, and no promise of the cluster is broken by that, as long as it befalls a minority. What nobody
    /// can notice is not done here:
    /// * A wiped directory that some other member has not met: for that one the wiped node is a new one. So all must have
    ///   met it, those too that are members only as far as they know. (Who becomes a member later need not: as long as it
    ///   is no voter nobody counts on its opinion, and once it is, its log holds all that the lost directory has helped
    ///   to commit.)
    /// * Directories of a majority of the members that the cluster had at any time: wiped founders, or copies from that time,
    ///   go on among themselves as the cluster of that time, if they hear of nobody else.
    /// * A copy whose later promises somebody may have forgotten. All must have met a run as late as the one in which it
    ///   would come back: that is on their disks. Terms and indexes that they have only seen are forgotten when they
    ///   stop.
    fn loses_directory(&mut self) {
        let Some(membership) = self.newest_membership() else { return };
        let can_lose = |id: &NodeId| self.is_unneeded(*id) && self.known_boots(*id, &membership) > 0;
        let candidates: Vec<NodeId> = membership.members.keys().copied().filter(can_lose).collect();
        if candidates.is_empty() {
            return;
        }
        let id = *self.random.pick(&candidates);
        let known_boots = self.known_boots(id, &membership);
        let copy = self.machines[&id].copy.clone().filter(|(boots, _)| known_boots > *boots);
        let copy = copy.filter(|_| self.random.one_in(2));
        match &copy {
            Some((boots, _)) => self.note(format_args!("{id} goes back to its directory of start {boots}")),
            None => self.note(format_args!("the directory of {id} is wiped")),
        }
        if self.process(id).is_some() {
            self.dies(id, Death::Kill, "its directory is replaced");
        }
        let (start, disk) = copy.unwrap_or_else(|| (0, MemoryDisk::new()));
        self.machines.get_mut(&id).expect("machines stay").lose(disk, start);
        self.invariants.forgets(id);
        // What it knew of others is lost as well.
        self.met.retain(|(node, _), _| *node != id);
        self.tally.directories_lost += 1;
    }

    /// The number of a member's start that all who must know have met, and remember; 0 if there is none.
    fn known_boots(&self, id: NodeId, membership: &Membership) -> u64 {
        let has_been_member = |id: NodeId| membership.members.contains_key(&id) || membership.removed.contains(&id);
        let others = self.machines.values().filter(|machine| machine.id != id && has_been_member(machine.id));
        let others = others.filter(|machine| machine.run > 0 && !machine.is_removed && !machine.is_lost());
        let known = others.map(|other| self.met.get(&(other.id, id)).map_or(0, |met| met.boots)).min();
        known.unwrap_or(0)
    }

    /// Whether the cluster can do without the directory of this member as well, now and at any earlier time.
    fn is_unneeded(&self, id: NodeId) -> bool {
        let machine = &self.machines[&id];
        let is_left = |voter: &&NodeId| **voter != id && !self.machines[*voter].is_lost();
        let has_majority =
            |voters: &Vec<NodeId>| voters.is_empty() || voters.iter().filter(is_left).count() > voters.len() / 2;
        !machine.is_lost() && !machine.is_removed && self.configurations.iter().all(has_majority)
    }
}
