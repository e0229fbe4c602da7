//! What must be when things stop going wrong: service, one state, and an honest history.

use std::sync::Arc;
use std::time::Duration;

use raftexample::membership::{Membership, NodeId};
use raftexample::message::AdminRequest;

use super::{CLIENT_TIMEOUT, Death, Machine, Minority, REQUEST_TIMEOUT, World, ms};
use crate::invariants::Checked;
use crate::network::Weather;
use crate::node;

/// Whether those voters for whom `counts` are a majority, in both halves of a joint configuration.
fn has_majority(membership: &Membership, counts: impl Fn(&NodeId) -> bool) -> bool {
    let conf_state = &membership.conf_state;
    let halves = [&conf_state.voters, &conf_state.voters_outgoing];
    halves.into_iter().all(|half| half.is_empty() || half.iter().filter(|id| counts(id)).count() > half.len() / 2)
}

impl World<'_> {
    /// Nothing goes wrong any more: of all, or of a majority, while the rest is left as the scenario says.
    pub(super) fn heal(&mut self) -> Checked {
        let there = |machine: &&Machine| machine.run > 0 && !machine.is_removed && !machine.is_lost();
        let mut ids: Vec<NodeId> = self.machines.values().filter(there).map(|machine| machine.id).collect();
        self.random.shuffle(&mut ids);
        // A lost directory is not healed: it belongs to the minority.
        let lost = self.machines.values().filter(|machine| machine.is_lost() && !machine.is_removed).count();
        let broken = match self.scenario.minority {
            Minority::Healed => 0,
            _ => ((ids.len() + lost - 1) / 2).saturating_sub(lost),
        };
        let healed = ids.split_off(broken);
        let minority = self.scenario.minority;
        self.note(format_args!("healed: {healed:?}, left {minority:?}: {ids:?}"));
        self.faults = false;
        self.network.set_weather(Weather::fine());
        for &from in &healed {
            for &to in &healed {
                self.network.mend(from, to);
            }
        }
        if broken == 0 {
            self.network.heal();
        }
        for &id in &healed {
            self.repair(id)?;
        }
        for id in ids {
            self.leave_broken(id, &healed)?;
        }
        self.served = healed;
        Ok(())
    }

    /// Nothing goes wrong with this node any more; it runs.
    fn repair(&mut self, id: NodeId) -> Checked {
        self.makes_room(id);
        let machine = self.machines.get_mut(&id).expect("machines stay");
        machine.paused_until = Duration::ZERO;
        if machine.process.is_some() && machine.disk_is_faulty {
            self.dies(id, Death::PowerLoss, "its disk is replaced");
        }
        self.start(id)
    }

    /// Leaves a node of the minority as the scenario says, for good.
    fn leave_broken(&mut self, id: NodeId, healed: &[NodeId]) -> Checked {
        let others: Vec<NodeId> = self.machines.keys().copied().filter(|other| *other != id).collect();
        match self.scenario.minority {
            Minority::Healed | Minority::AsItIs => return Ok(()),
            Minority::Dead => {
                self.running(id, |world| world.dies(id, Death::PowerLoss, "for good"));
                self.machines.get_mut(&id).expect("machines stay").is_dead = true;
                return Ok(());
            }
            Minority::Mute => others.iter().for_each(|&to| {
                self.network.mend(to, id);
                self.network.cut(id, to);
            }),
            Minority::Deaf => others.iter().for_each(|&from| {
                self.network.mend(id, from);
                self.network.cut(from, id);
            }),
            Minority::Bridged => {
                let bridge = *self.random.pick(healed);
                self.network.split(&[id], &others);
                self.network.mend(id, bridge);
                self.network.mend(bridge, id);
            }
        }
        self.repair(id)
    }

    /// The membership that was applied last, as far as any node that runs knows.
    pub(super) fn newest_membership(&self) -> Option<Arc<Membership>> {
        let processes = self.machines.values().filter_map(|machine| machine.process.as_ref());
        let newest = processes.max_by_key(|process| process.replica.core().handed_out());
        newest.map(|process| process.replica.core().membership().clone())
    }

    /// Whether the members have lost more directories than a cluster can do without. That takes a change of the
    /// membership that went on while a directory was lost; no node may serve then, and none can.
    pub(super) fn is_beyond_repair(&self) -> bool {
        let membership = self.newest_membership();
        membership.is_none_or(|membership| !has_majority(&membership, |voter| !self.machines[voter].is_lost()))
    }

    /// What an operator does about members whose directories are lost: removes them, and adds others in their place.
    /// Where the membership is fixed they stay away.
    pub(super) fn replace_lost_members(&mut self) -> Checked {
        if self.scenario.spares == 0 {
            return Ok(());
        }
        let end = self.events.now() + self.settings.election_time() * 6 + REQUEST_TIMEOUT * 10;
        while let Some((request, lost)) = self.next_replacement() {
            if self.events.now() >= end {
                return Err(format!("member {lost}, whose directory is lost, could not be replaced: {request:?}"));
            }
            let nodes: Vec<NodeId> =
                self.served.iter().copied().filter(|id| self.machines[id].process.is_some()).collect();
            if nodes.is_empty() {
                return Err("no healed node runs".to_owned());
            }
            let node = *self.random.pick(&nodes);
            if let AdminRequest::AddMember { id, .. } = request {
                self.will_start(id);
            }
            self.ask_for(request, node)?;
            self.run_for(ms(1000))?;
        }
        Ok(())
    }

    /// What is to be asked next, and for which lost member; `None` when all are replaced.
    fn next_replacement(&mut self) -> Option<(AdminRequest, NodeId)> {
        let membership = self.newest_membership()?;
        let lost = membership.members.keys().find(|id| self.machines[id].is_lost());
        if let Some(&id) = lost {
            self.to_replace.insert(id, None);
            return Some((AdminRequest::RemoveMember { id }, id));
        }
        let spare = |id: &&NodeId| self.machines[id].run == 0 && !membership.removed.contains(id);
        let unused: Option<NodeId> = self.machines.keys().find(spare).copied();
        for (&lost, substitute) in &mut self.to_replace {
            // All spares may have been used; then the cluster stays smaller.
            let Some(id) = substitute.or(unused) else { continue };
            *substitute = Some(id);
            if !membership.conf_state.voters.contains(&id) {
                let voter = membership.members.contains_key(&id).then_some(true);
                return Some((AdminRequest::AddMember { id, url: node::url(id), voter }, lost));
            }
        }
        self.tally.lost_members_replaced += self.to_replace.values().flatten().count() as u64;
        None
    }

    /// With nothing going wrong, everything that clients ask is done.
    ///
    /// Where a minority stays broken, a healed node may still be cut off from a leader that the others hear, in one
    /// direction or both: its pre-votes are rightly refused for as long as that one leads, and Raft has no remedy. The
    /// others must serve.
    pub(super) fn check_service(&mut self) -> Checked {
        if self.scenario.minority != Minority::Healed {
            let (machines, network) = (&self.machines, &self.network);
            let follows = |id: &NodeId| {
                let leader = machines[id].process.as_ref().map_or(0, |process| process.replica.core().leader());
                leader != 0 && network.is_up(*id, leader) && network.is_up(leader, *id)
            };
            self.served.retain(follows);
            if self.served.is_empty() {
                return Err("no node of a healed majority reaches a leader".to_owned());
            }
            self.run_for(CLIENT_TIMEOUT)?;
        }
        if self.scenario.spares > 0 {
            self.serve_members()?;
        }
        let (called, answered) = self.history.counts();
        (self.attempts_failed, self.hidden_by_snapshots) = (0, 0);
        let installed = self.tally.snapshots_installed;
        self.run_for(ms(3000))?;
        // A snapshot may hold what its receiver's clients wait for: each has one request. They are told the truth.
        let hidden_max = (self.tally.snapshots_installed - installed) * self.scenario.clients as u64;
        self.attempts_failed += self.hidden_by_snapshots.saturating_sub(hidden_max);
        let (called_now, answered_now) = self.history.counts();
        if self.attempts_failed > 0 || answered_now - answered < self.scenario.clients {
            return Err(format!(
                "of {} requests to a healed cluster {} were answered, and {} attempts failed",
                called_now - called,
                answered_now - answered,
                self.attempts_failed
            ));
        }
        Ok(())
    }

    /// From now on clients ask the members there are; all of them must be running, and no change half done.
    fn serve_members(&mut self) -> Checked {
        let membership = self.newest_membership().ok_or("no node runs")?;
        self.note(format_args!("the members are {:?}", membership.conf_state));
        if membership.is_joint() {
            return Err(format!("the configuration stays joint: {:?}", membership.conf_state));
        }
        self.served = membership.members.keys().copied().collect();
        let lost = self.served.iter().find(|id| self.machines[id].process.is_none());
        if let Some(id) = lost {
            return Err(format!("member {id} does not run"));
        }
        self.run_for(CLIENT_TIMEOUT)
    }

    /// Clients have seen one copy of each key, and all healed nodes come to the same.
    pub(super) fn finish(&mut self) -> Checked {
        self.clients_act = false;
        self.run_for(CLIENT_TIMEOUT + ms(1000))?;
        self.check_histories()?;
        if self.is_beyond_repair() {
            return Ok(());
        }
        let mut ends = Vec::new();
        for id in self.served.clone() {
            let process = self.machines[&id].process.as_ref().ok_or(format!("node {id} does not run"))?;
            process.check_log(&mut self.invariants)?;
            process.check_snapshots(&self.settings)?;
            let digest = raftexample::snapshot::digest(&process.applier.capture());
            ends.push((process.applier.applied_index(), digest));
        }
        if ends.iter().any(|end| *end != ends[0]) {
            let indexes: Vec<u64> = ends.iter().map(|(index, _)| *index).collect();
            return Err(format!("healed nodes end apart, having applied {indexes:?}"));
        }
        let committed = self.invariants.committed();
        match ends.first() {
            Some((applied, _)) if *applied == committed => Ok(()),
            _ => Err(format!("{committed} was handed out, and the healed nodes have applied {ends:?}")),
        }
    }

    /// Clients have seen one copy of each key.
    fn check_histories(&mut self) -> Checked {
        (self.tally.calls, self.tally.answered) = self.history.counts();
        (self.tally.terms, self.tally.committed) = (self.invariants.terms(), self.invariants.committed());
        self.history.check()
    }
}
