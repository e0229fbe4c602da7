//! Changing the cluster step by step: what a leader does next for a client's [`AdminRequest`].
//!
//! The plan is not remembered anywhere. [`next_step`] looks at the membership as it is and says what is missing, so a
//! new leader goes on where the old one died, and asking twice does no harm:
//!
//! | request | steps |
//! |---|---|
//! | add | learner; (later, by itself) voter, when it has caught up |
//! | promote | wait until it has caught up; voter |
//! | remove | hand leadership over, if it is the leader; remove |
//! | replace | add who is new as learners; wait until they have caught up; hand over, if the leader is to go; one joint change |
//! | transfer | hand leadership over |
//!
//! A change is refused if the voters it leaves would have no majority among those heard from within one election
//! timeout: such a cluster could not even undo it (etcd's "strict reconfiguration check").

use crate::membership::{Member, Membership, NodeId};
use crate::membership_change::MembershipChange;
use crate::message::{AdminRequest, Refusal};

/// A learner this many entries behind the leader's last index counts as caught up: a fraction of a second of load.
pub const CAUGHT_UP_ENTRIES: u64 = 1000;

/// What a leader knows when it decides.
pub struct LeaderView<'a> {
    /// The leader itself.
    pub me: NodeId,
    /// The membership as applied.
    pub membership: &'a Membership,
    /// The last index of its log.
    pub last_index: u64,
    /// The first index of its log: who needs an earlier one needs a snapshot first.
    pub first_index: u64,
    /// The match index of a member, if it was heard from within an election timeout; its own last index for the leader.
    pub match_index: &'a dyn Fn(NodeId) -> Option<u64>,
}

/// What to do next.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Step {
    /// Nothing: it is done.
    Done,
    /// Nothing, ever.
    Refuse(Refusal),
    /// Nothing yet; for what it waits, in words for an operator.
    Wait(String),
    /// Propose this.
    Propose(MembershipChange),
    /// Hand leadership over, to this voter.
    Transfer(NodeId),
}

fn conflict(reason: impl Into<String>) -> Step {
    Step::Refuse(Refusal::Conflict(reason.into()))
}

fn behind(ids: impl IntoIterator<Item = NodeId>) -> Step {
    let ids: Vec<String> = ids.into_iter().map(|id| id.to_string()).collect();
    Step::Wait(format!("waiting until member {} has caught up", ids.join(" and ")))
}

impl LeaderView<'_> {
    /// Who needs a snapshot first has not caught up, however short the leader's log is.
    fn caught_up(&self, id: NodeId) -> bool {
        let near = |matched| matched + 1 >= self.first_index && matched + CAUGHT_UP_ENTRIES >= self.last_index;
        (self.match_index)(id).is_some_and(near)
    }

    /// Whether `voters` have a majority among those that were heard from.
    fn quorate(&self, voters: &[NodeId]) -> bool {
        let heard = voters.iter().filter(|id| (self.match_index)(**id).is_some()).count();
        heard * 2 > voters.len()
    }

    /// The voter of `among` that has the longest log, the leader apart.
    fn successor(&self, among: impl Fn(NodeId) -> bool) -> Option<NodeId> {
        let voters = self.membership.conf_state.voters.iter().copied().filter(|id| *id != self.me && among(*id));
        voters.filter_map(|id| Some(((self.match_index)(id)?, id))).max().map(|(_, id)| id)
    }

    fn voters_with(&self, id: NodeId) -> Vec<NodeId> {
        self.membership.conf_state.voters.iter().copied().chain([id]).collect()
    }

    fn voters_without(&self, id: NodeId) -> Vec<NodeId> {
        self.membership.conf_state.voters.iter().copied().filter(|other| *other != id).collect()
    }

    fn promote(&self, id: NodeId) -> Step {
        if !self.caught_up(id) {
            behind([id])
        } else if !self.quorate(&self.voters_with(id)) {
            conflict(format!("with member {id} voting, the voters heard from lately would be no majority"))
        } else {
            Step::Propose(MembershipChange::Promote { id })
        }
    }
}

/// What the leader does next for `request`, given that no other change is under way.
pub fn next_step(request: &AdminRequest, view: &LeaderView<'_>) -> Step {
    if view.membership.is_joint() {
        return Step::Wait("the old and the new voters decide together, until both have agreed to end that".to_owned());
    }
    if !view.quorate(&view.membership.conf_state.voters) {
        return conflict("no majority of the voters was heard from lately: nothing can be decided now");
    }
    let step = match request {
        AdminRequest::AddMember { id, url, voter } => add(*id, url, *voter, view),
        AdminRequest::RemoveMember { id } => remove(*id, view),
        AdminRequest::ReplaceMembers(wanted) => replace(wanted, view),
        AdminRequest::TransferLeader { id } => transfer(*id, view),
    };
    match step {
        Step::Propose(change) => match view.membership.conf_change(&change) {
            Ok(_) => Step::Propose(change),
            Err(reason) => conflict(reason),
        },
        other => other,
    }
}

fn add(id: NodeId, url: &str, voter: Option<bool>, view: &LeaderView<'_>) -> Step {
    let add = || Step::Propose(MembershipChange::Add { id, url: url.to_owned(), promote: voter != Some(false) });
    let Some(Member { url: known, .. }) = view.membership.members.get(&id) else { return add() };
    let votes = view.membership.is_voter(id);
    match voter {
        _ if known != url => conflict(format!("id {id} is in use by {known}")),
        Some(false) if votes => conflict(format!("member {id} votes: remove it, and add a learner under a new id")),
        Some(false) if view.membership.members[&id].promote => {
            conflict(format!("member {id} was added to become a voter"))
        }
        Some(true) if !votes => view.promote(id),
        _ => Step::Done,
    }
}

fn remove(id: NodeId, view: &LeaderView<'_>) -> Step {
    if view.membership.removed.contains(&id) {
        return Step::Done;
    }
    if view.membership.is_voter(id) && !view.quorate(&view.voters_without(id)) {
        // The last voter is refused as such, by the membership.
        if view.membership.conf_state.voters.len() > 1 {
            return conflict(format!("without member {id}, the voters heard from lately would be no majority"));
        }
    }
    if id == view.me && view.membership.conf_state.voters.len() > 1 {
        return match view.successor(|_| true) {
            Some(successor) => Step::Transfer(successor),
            None => conflict("no other voter can lead"),
        };
    }
    Step::Propose(MembershipChange::Remove { id })
}

/// Whether the cluster has exactly the `wanted` members, in a configuration of their own.
pub fn are_members(wanted: &[(NodeId, String, bool)], membership: &Membership) -> bool {
    let is_there = |(id, url, voter): &(NodeId, String, bool)| {
        membership.members.get(id).is_some_and(|member| member.url == *url) && membership.is_voter(*id) == *voter
    };
    !membership.is_joint() && wanted.len() == membership.members.len() && wanted.iter().all(is_there)
}

fn replace(wanted: &[(NodeId, String, bool)], view: &LeaderView<'_>) -> Step {
    let membership = view.membership;
    if are_members(wanted, membership) {
        return Step::Done;
    }
    // All of it is checked before the first step is taken.
    if let Err(reason) = membership.conf_change(&MembershipChange::Replace(wanted.to_vec())) {
        return conflict(reason);
    }
    let votes_wanted = |id: NodeId| wanted.iter().any(|(other, _, voter)| *other == id && *voter);
    if let Some((id, url, _)) = wanted.iter().find(|(id, _, _)| !membership.members.contains_key(id)) {
        return Step::Propose(MembershipChange::Add { id: *id, url: url.clone(), promote: false });
    }
    let missing = wanted.iter().filter(|(id, _, voter)| *voter && !membership.is_voter(*id) && !view.caught_up(*id));
    let missing: Vec<NodeId> = missing.map(|(id, ..)| *id).collect();
    if !missing.is_empty() {
        return behind(missing);
    }
    let voters: Vec<NodeId> = wanted.iter().filter(|(_, _, voter)| *voter).map(|(id, _, _)| *id).collect();
    if !view.quorate(&voters) {
        return conflict("the wanted voters heard from lately would be no majority");
    }
    if !votes_wanted(view.me) {
        // A leader that is not to vote any more lets one lead that is. If there is none yet, one is made.
        return match (view.successor(votes_wanted), voters.iter().find(|id| !membership.is_voter(**id))) {
            (Some(successor), _) => Step::Transfer(successor),
            (None, Some(id)) => view.promote(*id),
            (None, None) => Step::Wait("waiting for a voter that stays, to lead".to_owned()),
        };
    }
    Step::Propose(MembershipChange::Replace(wanted.to_vec()))
}

fn transfer(id: NodeId, view: &LeaderView<'_>) -> Step {
    match id {
        _ if id == view.me => Step::Done,
        _ if !view.membership.conf_state.voters.contains(&id) => conflict(format!("{id} is not a member that votes")),
        _ if (view.match_index)(id).is_none() => conflict(format!("member {id} was not heard from lately")),
        // Until it has the log it could not be elected, and clients would wait for nothing.
        _ if !view.caught_up(id) => behind([id]),
        _ => Step::Transfer(id),
    }
}

/// The next learner that is to become a voter and can.
pub fn promotion(view: &LeaderView<'_>) -> Option<MembershipChange> {
    let learners =
        view.membership.members.iter().filter(|(id, member)| member.promote && !view.membership.is_voter(**id));
    let mut steps = learners.map(|(id, _)| view.promote(*id));
    steps.find_map(|step| match step {
        Step::Propose(change) => Some(change),
        _ => None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use raft::eraftpb::ConfState;

    const LAST: u64 = 5000;

    fn url(id: NodeId) -> String {
        format!("http://127.0.0.1:{id}")
    }

    fn cluster(voters: &[NodeId], learners: &[NodeId]) -> Membership {
        let mut membership = Membership::founding(voters.iter().chain(learners).map(|id| (*id, url(*id))));
        membership.conf_state =
            ConfState { voters: voters.to_vec(), learners: learners.to_vec(), ..ConfState::default() };
        membership
    }

    /// The step that node 1, who leads, takes when the nodes in `heard` are near and up to date.
    fn step(membership: &Membership, heard: &[NodeId], request: &AdminRequest) -> Step {
        let match_index = |id| heard.contains(&id).then_some(LAST);
        next_step(
            request,
            &LeaderView { me: 1, membership, last_index: LAST, first_index: 2, match_index: &match_index },
        )
    }

    fn refused(step: Step) -> String {
        match step {
            Step::Refuse(Refusal::Conflict(reason)) => reason,
            other => panic!("expected a refusal, got {other:?}"),
        }
    }

    #[test]
    fn adding_again_is_done_and_with_another_url_a_conflict() {
        let three = cluster(&[1, 2, 3], &[]);
        let add = |id, url: String, voter| AdminRequest::AddMember { id, url, voter };
        let proposed = MembershipChange::Add { id: 4, url: url(4), promote: true };
        assert_eq!(step(&three, &[1, 2, 3], &add(4, url(4), None)), Step::Propose(proposed));
        let with_learner = cluster(&[1, 2, 3], &[4]);
        assert_eq!(step(&with_learner, &[1, 2, 3], &add(4, url(4), None)), Step::Done);
        assert!(refused(step(&with_learner, &[1, 2, 3], &add(4, url(5), None))).contains("in use"));
        assert!(refused(step(&three, &[1, 2, 3], &add(3, url(3), Some(false)))).contains("votes"));
    }

    #[test]
    fn a_learner_is_promoted_when_it_has_caught_up_and_a_majority_is_near() {
        let membership = cluster(&[1, 2, 3], &[4]);
        let request = AdminRequest::AddMember { id: 4, url: url(4), voter: Some(true) };
        assert!(matches!(step(&membership, &[1, 2, 3], &request), Step::Wait(_)), "4 was not heard from");
        let promote = Step::Propose(MembershipChange::Promote { id: 4 });
        assert_eq!(step(&membership, &[1, 2, 4], &request), promote);
        assert!(refused(step(&cluster(&[1, 2], &[3]), &[1, 3], &request)).contains("no majority"));
    }

    #[test]
    fn the_dead_one_of_two_can_not_be_removed_and_the_last_one_neither() {
        let two = cluster(&[1, 2], &[]);
        let remove = |id| AdminRequest::RemoveMember { id };
        assert_eq!(step(&two, &[1, 2], &remove(2)), Step::Propose(MembershipChange::Remove { id: 2 }));
        assert!(refused(step(&two, &[1], &remove(2))).contains("no majority"));
        assert!(refused(step(&cluster(&[1], &[]), &[1], &remove(1))).contains("last voter"));
        assert!(refused(step(&two, &[1, 2], &remove(9))).contains("not a member"));
    }

    #[test]
    fn a_leader_hands_over_before_it_is_removed() {
        let three = cluster(&[1, 2, 3], &[]);
        let remove_self = AdminRequest::RemoveMember { id: 1 };
        assert!(matches!(step(&three, &[1, 2, 3], &remove_self), Step::Transfer(2 | 3)));
    }

    #[test]
    fn replacing_adds_then_waits_then_hands_over_then_changes_all_at_once() {
        let wanted =
            |ids: &[NodeId]| AdminRequest::ReplaceMembers(ids.iter().map(|id| (*id, url(*id), true)).collect());
        let request = wanted(&[2, 4, 5]);
        let add = |id| Step::Propose(MembershipChange::Add { id, url: url(id), promote: false });
        assert_eq!(step(&cluster(&[1, 2, 3], &[]), &[1, 2, 3], &request), add(4));
        assert_eq!(step(&cluster(&[1, 2, 3], &[4]), &[1, 2, 3, 4], &request), add(5));
        let ready = cluster(&[1, 2, 3], &[4, 5]);
        assert_eq!(step(&ready, &[1, 2, 3, 4], &request), behind([5]));
        assert_eq!(step(&ready, &[1, 2, 3, 4, 5], &request), Step::Transfer(2));
        let AdminRequest::ReplaceMembers(list) = wanted(&[1, 4, 5]) else { unreachable!() };
        let change = Step::Propose(MembershipChange::Replace(list.clone()));
        assert_eq!(step(&ready, &[1, 2, 3, 4, 5], &AdminRequest::ReplaceMembers(list)), change);
        assert_eq!(step(&cluster(&[1, 4, 5], &[]), &[1, 4, 5], &wanted(&[5, 4, 1])), Step::Done);
    }

    #[test]
    fn replacing_all_members_makes_a_new_voter_to_lead_first() {
        let request = AdminRequest::ReplaceMembers(vec![(4, url(4), true)]);
        let ready = cluster(&[1, 2, 3], &[4]);
        assert_eq!(step(&ready, &[1, 2, 3, 4], &request), Step::Propose(MembershipChange::Promote { id: 4 }));
        assert_eq!(step(&cluster(&[1, 2, 3, 4], &[]), &[1, 2, 3, 4], &request), Step::Transfer(4));
    }

    #[test]
    fn nothing_happens_during_a_joint_change() {
        let mut joint = cluster(&[1, 2], &[]);
        joint.conf_state.voters_outgoing = vec![3];
        assert!(matches!(step(&joint, &[1, 2], &AdminRequest::RemoveMember { id: 2 }), Step::Wait(_)));
    }

    #[test]
    fn an_empty_log_has_not_caught_up_with_a_short_one() {
        let membership = cluster(&[1], &[4]);
        let request = AdminRequest::AddMember { id: 4, url: url(4), voter: Some(true) };
        let near = |matched| {
            let match_index = move |id| Some(if id == 1 { 500 } else { matched });
            next_step(
                &request,
                &LeaderView {
                    me: 1,
                    membership: &membership,
                    last_index: 500,
                    first_index: 2,
                    match_index: &match_index,
                },
            )
        };
        assert_eq!(near(0), behind([4]));
        assert_eq!(near(1), Step::Propose(MembershipChange::Promote { id: 4 }));
    }

    #[test]
    fn leadership_goes_only_to_a_voter_that_can_be_elected() {
        let membership = cluster(&[1, 2], &[3]);
        let to = |id, matched| {
            let match_index = move |other| (other != 4).then_some(if other == id { matched } else { LAST });
            let view = LeaderView {
                me: 1,
                membership: &membership,
                last_index: LAST,
                first_index: 2,
                match_index: &match_index,
            };
            next_step(&AdminRequest::TransferLeader { id }, &view)
        };
        assert_eq!(to(1, LAST), Step::Done);
        assert_eq!(to(2, LAST), Step::Transfer(2));
        assert_eq!(to(2, 1), behind([2]));
        assert!(refused(to(3, LAST)).contains("votes"));
        assert!(refused(to(4, LAST)).contains("votes"));
    }

    #[test]
    fn a_learner_that_is_to_vote_is_no_read_replica() {
        let mut membership = cluster(&[1], &[2]);
        let stays = AdminRequest::AddMember { id: 2, url: url(2), voter: Some(false) };
        assert_eq!(step(&membership, &[1], &stays), Step::Done);
        membership.members.get_mut(&2).expect("a member").promote = true;
        assert!(refused(step(&membership, &[1], &stays)).contains("become a voter"));
    }
}
