//! Changes of the [`Membership`]: what they say in the log, when they are allowed, and what they lead to.
//!
//! The leader checks a change before it proposes it, and every node checks it again when it applies it: the
//! membership may have moved on in between. Both ask [`Membership::conf_change`], which looks at nothing but the
//! membership, so that all nodes decide alike; a change that is not allowed any more is a no-op everywhere.

use std::collections::BTreeSet;

use raft::eraftpb::{ConfChangeSingle, ConfChangeType, ConfChangeV2, ConfState};

use crate::codec::{self, Fields, Malformed};
use crate::membership::{Member, Membership, NodeId, Role};

/// Members of one cluster, at most: Raft's traffic grows with their square, and no majority of so many is quick.
pub const MEMBERS_MAX: usize = 64;

/// The longest peer URL in bytes: a host name has at most 253.
pub const URL_BYTES_MAX: usize = 512;

/// One change of the membership.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum MembershipChange {
    /// A new member enters as a learner.
    Add {
        /// An id that was never used.
        id: NodeId,
        /// An address that no member has.
        url: String,
        /// Whether the leader makes it a voter when it has caught up.
        promote: bool,
    },
    /// A learner becomes a voter.
    Promote {
        /// The learner.
        id: NodeId,
    },
    /// A member leaves, for ever.
    Remove {
        /// The member.
        id: NodeId,
    },
    /// Exactly these become the members, through a joint configuration (Raft thesis 4.3): id, URL, whether it votes.
    Replace(Vec<(NodeId, String, bool)>),
    /// The joint configuration ends: the entry that raft itself proposes, without data.
    LeaveJoint,
}

const VERSION: u8 = 1;

impl MembershipChange {
    /// The change as it stands in the log, in the context of raft's own configuration change.
    pub fn encode(&self) -> Vec<u8> {
        let mut out = vec![VERSION];
        match self {
            MembershipChange::Add { id, url, promote } => {
                codec::put_u8(&mut out, 1);
                codec::put_u64(&mut out, *id);
                codec::put_bytes(&mut out, url.as_bytes());
                codec::put_u8(&mut out, u8::from(*promote));
            }
            MembershipChange::Promote { id } => {
                codec::put_u8(&mut out, 2);
                codec::put_u64(&mut out, *id);
            }
            MembershipChange::Remove { id } => {
                codec::put_u8(&mut out, 3);
                codec::put_u64(&mut out, *id);
            }
            MembershipChange::Replace(members) => {
                codec::put_u8(&mut out, 4);
                codec::put_u32(&mut out, members.len() as u32);
                for (id, url, voter) in members {
                    codec::put_u64(&mut out, *id);
                    codec::put_bytes(&mut out, url.as_bytes());
                    codec::put_u8(&mut out, u8::from(*voter));
                }
            }
            MembershipChange::LeaveJoint => codec::put_u8(&mut out, 5),
        }
        out
    }

    /// Reads what [`Self::encode`] wrote.
    pub fn decode(bytes: &[u8]) -> Result<MembershipChange, Malformed> {
        let mut fields = Fields::new(bytes, "membership change");
        if fields.u8()? != VERSION {
            return Err(Malformed("membership change of an unknown version"));
        }
        let change = match fields.u8()? {
            1 => MembershipChange::Add { id: fields.u64()?, url: url(&mut fields)?, promote: flag(&mut fields)? },
            2 => MembershipChange::Promote { id: fields.u64()? },
            3 => MembershipChange::Remove { id: fields.u64()? },
            4 => {
                let count = fields.count(13)?;
                let member = |_| Ok((fields.u64()?, url(&mut fields)?, flag(&mut fields)?));
                MembershipChange::Replace((0..count).map(member).collect::<Result<_, Malformed>>()?)
            }
            5 => MembershipChange::LeaveJoint,
            _ => return Err(Malformed("membership change of an unknown kind")),
        };
        fields.finish()?;
        Ok(change)
    }
}

fn url(fields: &mut Fields<'_>) -> Result<String, Malformed> {
    let malformed = fields.malformed();
    String::from_utf8(fields.bytes(URL_BYTES_MAX)?.to_vec()).map_err(|_| malformed)
}

fn flag(fields: &mut Fields<'_>) -> Result<bool, Malformed> {
    match fields.u8()? {
        0 => Ok(false),
        1 => Ok(true),
        _ => Err(fields.malformed()),
    }
}

impl Membership {
    /// The membership of a new cluster: all founders vote.
    pub fn founding(members: impl IntoIterator<Item = (NodeId, String)>) -> Membership {
        let members: std::collections::BTreeMap<_, _> =
            members.into_iter().map(|(id, url)| (id, Member { url, directory: None, promote: false })).collect();
        let conf_state = ConfState { voters: members.keys().copied().collect(), ..ConfState::default() };
        Membership { members, removed: Default::default(), conf_state }
    }

    /// Whether two sets of voters are in force at once.
    pub fn is_joint(&self) -> bool {
        !self.conf_state.voters_outgoing.is_empty()
    }

    /// A member's role; during a joint change, the role it had or will have that votes.
    pub fn role(&self, id: NodeId) -> Option<Role> {
        self.members.get(&id).map(|_| if self.is_voter(id) { Role::Voter } else { Role::Learner })
    }

    /// Whether `id` counts for a quorum now.
    pub fn is_voter(&self, id: NodeId) -> bool {
        self.conf_state.voters.contains(&id) || self.conf_state.voters_outgoing.contains(&id)
    }

    /// Whether its members are those that have a role, and none of them was removed: so it is after every change, and of
    /// anything else no change could be told whether it has been made.
    pub fn is_consistent(&self) -> bool {
        let ConfState { voters, learners, voters_outgoing, learners_next, .. } = &self.conf_state;
        let with_role: BTreeSet<NodeId> =
            [voters, learners, voters_outgoing, learners_next].into_iter().flatten().copied().collect();
        self.members.keys().eq(&with_role) && self.removed.is_disjoint(&with_role)
    }

    /// Raft's form of `change`, or why it is not allowed now. `Err` is for a person to read.
    pub fn conf_change(&self, change: &MembershipChange) -> Result<ConfChangeV2, String> {
        if self.is_joint() != (*change == MembershipChange::LeaveJoint) {
            return Err(if self.is_joint() {
                "a change of several members is in progress".to_owned()
            } else {
                "no change of several members is in progress".to_owned()
            });
        }
        let single = |kind, id| {
            let change = ConfChangeSingle { change_type: kind, node_id: id, ..ConfChangeSingle::default() };
            Ok(vec![change])
        };
        let changes = match change {
            MembershipChange::Add { id, url, .. } => {
                self.check_new(*id, url)?;
                if self.members.len() >= MEMBERS_MAX {
                    return Err(format!("a cluster has at most {MEMBERS_MAX} members"));
                }
                single(ConfChangeType::AddLearnerNode, *id)
            }
            MembershipChange::Promote { id } => match self.role(*id) {
                None => Err(format!("{id} is not a member")),
                Some(Role::Voter) => Err(format!("member {id} votes already")),
                Some(Role::Learner) => single(ConfChangeType::AddNode, *id),
            },
            MembershipChange::Remove { id } => {
                if !self.members.contains_key(id) {
                    return Err(format!("{id} is not a member"));
                }
                if self.conf_state.voters == [*id] {
                    return Err(format!("member {id} is the last voter"));
                }
                single(ConfChangeType::RemoveNode, *id)
            }
            MembershipChange::Replace(wanted) => self.replace(wanted),
            MembershipChange::LeaveJoint => Ok(Vec::new()),
        }?;
        let mut conf_change = ConfChangeV2::default();
        conf_change.set_changes(changes.into());
        Ok(conf_change)
    }

    fn replace(&self, wanted: &[(NodeId, String, bool)]) -> Result<Vec<ConfChangeSingle>, String> {
        if wanted.len() > MEMBERS_MAX {
            return Err(format!("a cluster has at most {MEMBERS_MAX} members"));
        }
        if !wanted.iter().any(|(_, _, voter)| *voter) {
            return Err("no voter would be left".to_owned());
        }
        let mut changes = Vec::new();
        let mut change = |kind, id| {
            changes.push(ConfChangeSingle { change_type: kind, node_id: id, ..ConfChangeSingle::default() });
        };
        for (position, (id, url, voter)) in wanted.iter().enumerate() {
            if wanted[..position].iter().any(|(other, other_url, _)| other == id || other_url == url) {
                return Err(format!("id {id} or its URL is listed twice"));
            }
            let role = self.role(*id);
            match self.members.get(id) {
                None => self.check_new(*id, url)?,
                Some(member) if member.url != *url => {
                    return Err(format!("member {id} has the URL {}: remove it and add it under a new id", member.url));
                }
                Some(_) => {}
            }
            match (role, voter) {
                (Some(Role::Voter), true) | (Some(Role::Learner), false) => {}
                (_, true) => change(ConfChangeType::AddNode, *id),
                (_, false) => change(ConfChangeType::AddLearnerNode, *id),
            }
        }
        for id in self.members.keys().filter(|id| !wanted.iter().any(|(other, _, _)| other == *id)) {
            change(ConfChangeType::RemoveNode, *id);
        }
        if changes.is_empty() { Err("these are the members already".to_owned()) } else { Ok(changes) }
    }

    fn check_new(&self, id: NodeId, url: &str) -> Result<(), String> {
        if id == 0 {
            return Err("ids begin at 1".to_owned());
        }
        if url.len() > URL_BYTES_MAX {
            return Err(format!("a URL has at most {URL_BYTES_MAX} bytes"));
        }
        if self.removed.contains(&id) {
            return Err(format!("id {id} was removed, and an id is never used again: take a new one"));
        }
        if let Some(member) = self.members.get(&id) {
            return Err(format!("id {id} is in use by {}", member.url));
        }
        if let Some((other, _)) = self.members.iter().find(|(_, member)| member.url == url) {
            return Err(format!("member {other} has the URL {url}"));
        }
        Ok(())
    }

    /// The membership after an allowed `change`, with the roles as raft now has them.
    pub fn after(&self, change: &MembershipChange, conf_state: ConfState) -> Membership {
        let mut next = Membership { conf_state, ..self.clone() };
        let mut add = |id: NodeId, url: &String, promote| {
            next.members.entry(id).or_insert_with(|| Member { url: url.clone(), directory: None, promote });
        };
        match change {
            MembershipChange::Add { id, url, promote } => add(*id, url, *promote),
            MembershipChange::Replace(wanted) => wanted.iter().for_each(|(id, url, _)| add(*id, url, false)),
            MembershipChange::Promote { .. } | MembershipChange::Remove { .. } | MembershipChange::LeaveJoint => {}
        }
        // Whoever has no role any more has left. A voter that is going keeps its address until the joint
        // configuration ends, because its vote still counts.
        let ConfState { voters, learners, voters_outgoing, learners_next, .. } = &next.conf_state;
        let has_role =
            |id: &NodeId| [voters, learners, voters_outgoing, learners_next].iter().any(|ids| ids.contains(id));
        let gone: Vec<NodeId> = next.members.keys().copied().filter(|id| !has_role(id)).collect();
        for id in gone {
            next.members.remove(&id);
            next.removed.insert(id);
        }
        next
    }

    /// The membership with the data directory of `member` on record, or why that is a no-op.
    pub fn with_directory(&self, member: NodeId, directory: u128) -> Result<Membership, String> {
        let mut next = self.clone();
        match next.members.get_mut(&member) {
            None => Err(format!("{member} is not a member")),
            Some(Member { directory: Some(known), .. }) if *known != directory => {
                Err(format!("member {member} is known by another data directory"))
            }
            Some(member) => {
                member.directory = Some(directory);
                Ok(next)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn three() -> Membership {
        Membership::founding((1..=3).map(|id| (id, format!("http://127.0.0.1:{id}"))))
    }

    #[test]
    fn a_member_has_a_role_and_a_role_has_a_member() {
        let good = three();
        assert!(good.is_consistent() && Membership::default().is_consistent());
        let mut without_role = good.clone();
        without_role.conf_state.voters.pop();
        let mut without_member = good.clone();
        without_member.members.remove(&2);
        let mut removed = good;
        removed.removed.insert(2);
        for membership in [without_role, without_member, removed] {
            assert!(!membership.is_consistent(), "{membership:?}");
        }
    }

    fn conf_state(voters: &[u64], learners: &[u64], outgoing: &[u64]) -> ConfState {
        ConfState {
            voters: voters.to_vec(),
            learners: learners.to_vec(),
            voters_outgoing: outgoing.to_vec(),
            ..ConfState::default()
        }
    }

    #[test]
    fn changes_survive_their_encoding_and_no_truncation_does() {
        let changes = [
            MembershipChange::Add { id: 4, url: "http://h:1".to_owned(), promote: true },
            MembershipChange::Promote { id: 4 },
            MembershipChange::Remove { id: u64::MAX },
            MembershipChange::Replace(vec![(1, "http://a:1".to_owned(), true), (9, "http://b:1".to_owned(), false)]),
            MembershipChange::LeaveJoint,
        ];
        for change in changes {
            let bytes = change.encode();
            assert_eq!(MembershipChange::decode(&bytes), Ok(change));
            for end in 0..bytes.len() {
                assert!(MembershipChange::decode(&bytes[..end]).is_err());
            }
        }
    }

    #[test]
    fn additions_are_refused_for_used_ids_removed_ids_and_used_urls() {
        let membership = three();
        let add = |id, url: &str| MembershipChange::Add { id, url: url.to_owned(), promote: true };
        assert!(membership.conf_change(&add(4, "http://new:1")).is_ok());
        assert!(membership.conf_change(&add(0, "http://new:1")).is_err());
        assert!(membership.conf_change(&add(3, "http://new:1")).is_err());
        assert!(membership.conf_change(&add(4, "http://127.0.0.1:2")).is_err());
        let without_3 = membership.after(&MembershipChange::Remove { id: 3 }, conf_state(&[1, 2], &[], &[]));
        assert!(without_3.removed.contains(&3));
        assert!(without_3.conf_change(&add(3, "http://new:1")).unwrap_err().contains("never used again"));
    }

    #[test]
    fn the_last_voter_stays() {
        let one = Membership::founding([(1, "http://h:1".to_owned())]);
        assert!(one.conf_change(&MembershipChange::Remove { id: 1 }).unwrap_err().contains("last voter"));
        assert!(one.conf_change(&MembershipChange::Replace(vec![(1, "http://h:1".to_owned(), false)])).is_err());
    }

    #[test]
    fn a_leaving_voter_keeps_its_address_until_the_joint_configuration_ends() {
        let wanted = vec![(1, "http://127.0.0.1:1".to_owned(), true), (4, "http://h:4".to_owned(), true)];
        let change = MembershipChange::Replace(wanted);
        let conf_change = three().conf_change(&change).unwrap();
        assert_eq!(conf_change.changes.len(), 3, "4 enters, 2 and 3 leave");
        let joint = three().after(&change, conf_state(&[1, 4], &[], &[1, 2, 3]));
        assert_eq!(joint.members.keys().copied().collect::<Vec<_>>(), [1, 2, 3, 4]);
        assert!(joint.conf_change(&MembershipChange::Promote { id: 4 }).is_err(), "one change at a time");
        assert!(joint.conf_change(&MembershipChange::LeaveJoint).is_ok());
        let left = joint.after(&MembershipChange::LeaveJoint, conf_state(&[1, 4], &[], &[]));
        assert_eq!(left.members.keys().copied().collect::<Vec<_>>(), [1, 4]);
        assert_eq!(left.removed.into_iter().collect::<Vec<_>>(), [2, 3]);
    }

    #[test]
    fn a_data_directory_is_recorded_once() {
        let membership = three().with_directory(2, 77).unwrap();
        assert!(membership.with_directory(2, 77).is_ok());
        assert!(membership.with_directory(2, 78).is_err());
        assert!(membership.with_directory(9, 1).is_err());
    }
}
