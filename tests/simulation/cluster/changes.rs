//! Changes of the cluster: members come and go, and leadership is handed over.

use raftexample::membership::{Membership, NodeId};
use raftexample::message::AdminRequest;

use super::{Event, REQUEST_TIMEOUT, World, ms};
use crate::invariants::Checked;
use crate::node::{self, Waiter};

impl World<'_> {
    /// Somebody asks a node to change the cluster.
    pub(super) fn change(&mut self) -> Checked {
        if !self.faults {
            return Ok(());
        }
        let pause = self.random.time(&(ms(200)..ms(4000)));
        self.events.plan(pause, Event::Change);
        let running: Vec<NodeId> =
            self.machines.values().filter(|machine| machine.process.is_some()).map(|machine| machine.id).collect();
        if running.is_empty() {
            return Ok(());
        }
        let node = *self.random.pick(&running);
        let request = self.draw_change();
        self.ask_for(request, node)
    }

    /// Asks a node for a change of the cluster.
    pub(super) fn ask_for(&mut self, request: AdminRequest, node: NodeId) -> Checked {
        self.note(format_args!("change {} is asked of {node}: {request:?}", self.changes.len()));
        self.tally.changes += 1;
        let waiter = Waiter { client: usize::MAX, attempt: self.changes.len() as u64 };
        self.changes.push(request.clone());
        let now = self.events.now();
        let Some(process) = self.process(node) else { return Ok(()) };
        let deadline = process.clock(now) + REQUEST_TIMEOUT * 2;
        self.input(node, |replica, host| {
            replica.admin(request, deadline, waiter, host);
            Ok(())
        })
    }

    fn draw_change(&mut self) -> AdminRequest {
        let ids: Vec<NodeId> = self.machines.keys().copied().collect();
        let id = *self.random.pick(&ids);
        if self.scenario.spares == 0 {
            return AdminRequest::TransferLeader { id };
        }
        let lost = self.machines.values().find(|machine| machine.is_lost() && !machine.is_removed);
        if let Some(id) = lost.map(|machine| machine.id).filter(|_| self.random.one_in(6)) {
            return AdminRequest::RemoveMember { id };
        }
        let request = match self.random.below(8) {
            0..3 => {
                let voter = *self.random.pick(&[None, None, Some(true), Some(false)]);
                AdminRequest::AddMember { id, url: node::url(id), voter }
            }
            3 | 4 => AdminRequest::RemoveMember { id },
            5 => {
                let mut wanted = ids;
                self.random.shuffle(&mut wanted);
                wanted.truncate(1 + self.random.below(4) as usize);
                let member = |id| (id, node::url(id), !self.random.one_in(4));
                AdminRequest::ReplaceMembers(wanted.into_iter().map(member).collect())
            }
            _ => AdminRequest::TransferLeader { id },
        };
        let joining: Vec<NodeId> = match &request {
            AdminRequest::AddMember { id, .. } => vec![*id],
            AdminRequest::ReplaceMembers(members) => members.iter().map(|(id, ..)| *id).collect(),
            AdminRequest::RemoveMember { .. } | AdminRequest::TransferLeader { .. } => Vec::new(),
        };
        for id in joining {
            self.will_start(id);
        }
        request
    }

    /// Starts a node for the first time, soon, if it has not run yet.
    pub(super) fn will_start(&mut self, id: NodeId) {
        if self.machines[&id].run == 0 {
            let delay = ms(self.random.below(2000));
            self.events.plan(delay, Event::Start(id));
        }
    }

    /// A change is done, says the node that was asked, with this membership.
    pub(super) fn changed(&mut self, waiter: Waiter, membership: &Membership) -> Checked {
        let request = self.changes[waiter.attempt as usize].clone();
        self.note(format_args!("change {} is done: {:?}", waiter.attempt, membership.conf_state));
        self.tally.changes_done += 1;
        self.tally.transfers_done += u64::from(matches!(request, AdminRequest::TransferLeader { .. }));
        let holds = match &request {
            // It may have been removed, or others added, by a later change that is applied already.
            AdminRequest::AddMember { id, .. } => {
                membership.members.contains_key(id) || membership.removed.contains(id)
            }
            AdminRequest::RemoveMember { id } => membership.removed.contains(id),
            AdminRequest::ReplaceMembers(_) | AdminRequest::TransferLeader { .. } => true,
        };
        if holds { Ok(()) } else { Err(format!("{request:?} is done, and the membership is {membership:?}")) }
    }
}
