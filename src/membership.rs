//! Who belongs to the cluster: members with their addresses and roles, and the ids that were ever removed.
//!
//! It is replicated state: it changes only when a committed entry is applied, travels in snapshots, and a restart
//! takes it from there and not from the command line.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use raft::eraftpb::ConfState;

use crate::codec::{Fields, Malformed, put_bytes, put_u8, put_u32, put_u64, put_u128};

/// A member's Raft id, from 1. Never used again after a removal.
pub type NodeId = u64;

/// Names one cluster for all time: a hash of its founding list.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct ClusterId(pub [u8; 16]);

impl fmt::Display for ClusterId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for byte in self.0 {
            write!(f, "{byte:02x}")?;
        }
        Ok(())
    }
}

impl fmt::Debug for ClusterId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "ClusterId({self})")
    }
}

/// Whether a member votes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// Votes and counts for a quorum.
    Voter,
    /// Receives the log and serves reads, and does neither.
    Learner,
}

/// One member.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Member {
    /// Where the others reach its peer port: `http://host:port`.
    pub url: String,
    /// The identity of its data directory, once a leader has met it and committed it.
    pub directory: Option<u128>,
    /// Whether the leader makes this learner a voter when it has caught up. Meaningless for a voter.
    pub promote: bool,
}

/// The cluster's membership at one applied index. Immutable: a change makes the next one.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Membership {
    /// All members by id.
    pub members: BTreeMap<NodeId, Member>,
    /// Ids that were removed and are never used again.
    pub removed: BTreeSet<NodeId>,
    /// The roles, as Raft counts them; holds two sets of voters during a joint change.
    pub conf_state: ConfState,
}

/// The longest URL of a member in bytes that a snapshot or a peer may carry.
pub const URL_BYTES_MAX: usize = 2048;

/// The encoding that this version writes, and the only one it reads.
const MEMBERSHIP_VERSION: u8 = 1;

impl Membership {
    /// The bytes for snapshots and peers: the same for equal memberships. The order of ids within the
    /// `ConfState` means nothing, so they are sorted.
    pub fn encode(&self) -> Vec<u8> {
        let mut out = vec![MEMBERSHIP_VERSION];
        put_count(&mut out, self.members.len());
        for (&id, member) in &self.members {
            put_u64(&mut out, id);
            put_bytes(&mut out, member.url.as_bytes());
            put_u8(&mut out, u8::from(member.directory.is_some()));
            put_u128(&mut out, member.directory.unwrap_or(0));
            put_u8(&mut out, u8::from(member.promote));
        }
        put_ids(&mut out, self.removed.iter().copied());
        let roles = &self.conf_state;
        for ids in [&roles.voters, &roles.learners, &roles.voters_outgoing, &roles.learners_next] {
            put_ids(&mut out, ids.iter().copied().collect::<BTreeSet<_>>().into_iter());
        }
        put_u8(&mut out, u8::from(roles.auto_leave));
        out
    }

    /// Reads what [`Membership::encode`] wrote. Whether it makes sense as a membership is not checked here.
    ///
    /// # Errors
    /// If the version is unknown, or the bytes are anything that `encode` would not write.
    pub fn decode(bytes: &[u8]) -> Result<Self, Malformed> {
        let mut fields = Fields::new(bytes, "membership");
        if fields.u8()? != MEMBERSHIP_VERSION {
            return Err(Malformed("membership: its version is unknown"));
        }
        let mut membership = Membership::default();
        for _ in 0..fields.count(8 + 4 + 1 + 16 + 1)? {
            let id = fields.u64()?;
            let url = String::from_utf8(fields.bytes(URL_BYTES_MAX)?.to_vec()).map_err(|_| fields.malformed())?;
            let directory = match (take_bool(&mut fields)?, fields.u128()?) {
                (true, directory) => Some(directory),
                (false, 0) => None,
                (false, _) => return Err(fields.malformed()),
            };
            let promote = take_bool(&mut fields)?;
            if membership.members.last_key_value().is_some_and(|(&last, _)| last >= id) {
                return Err(fields.malformed());
            }
            membership.members.insert(id, Member { url, directory, promote });
        }
        membership.removed = take_ids(&mut fields)?.into_iter().collect();
        membership.conf_state.voters = take_ids(&mut fields)?;
        membership.conf_state.learners = take_ids(&mut fields)?;
        membership.conf_state.voters_outgoing = take_ids(&mut fields)?;
        membership.conf_state.learners_next = take_ids(&mut fields)?;
        membership.conf_state.auto_leave = take_bool(&mut fields)?;
        fields.finish()?;
        Ok(membership)
    }
}

fn put_count(out: &mut Vec<u8>, count: usize) {
    put_u32(out, u32::try_from(count).expect("a cluster has fewer than 2^32 members"));
}

fn put_ids(out: &mut Vec<u8>, ids: impl ExactSizeIterator<Item = NodeId>) {
    put_count(out, ids.len());
    for id in ids {
        put_u64(out, id);
    }
}

/// Ids in ascending order: the one order that is written.
fn take_ids(fields: &mut Fields<'_>) -> Result<Vec<NodeId>, Malformed> {
    let count = fields.count(8)?;
    let ids = (0..count).map(|_| fields.u64()).collect::<Result<Vec<_>, _>>()?;
    if ids.is_sorted_by(|a, b| a < b) { Ok(ids) } else { Err(fields.malformed()) }
}

fn take_bool(fields: &mut Fields<'_>) -> Result<bool, Malformed> {
    match fields.u8()? {
        0 => Ok(false),
        1 => Ok(true),
        _ => Err(fields.malformed()),
    }
}

#[cfg(test)]
mod codec_tests {
    use super::*;

    fn membership() -> Membership {
        let member = |url: &str, directory, promote| Member { url: url.to_string(), directory, promote };
        let mut membership = Membership::default();
        membership.members.insert(1, member("http://127.0.0.1:12379", Some(u128::MAX - 1), false));
        membership.members.insert(2, member("http://[::1]:22379", None, false));
        membership.members.insert(7, member("http://node-7.example:1", Some(0), true));
        membership.removed.extend([3, u64::MAX]);
        membership.conf_state.voters = vec![1, 2];
        membership.conf_state.voters_outgoing = vec![1, 2, 3];
        membership.conf_state.learners = vec![7];
        membership.conf_state.learners_next = vec![8];
        membership.conf_state.auto_leave = true;
        membership
    }

    #[test]
    fn a_membership_survives_its_encoding_and_no_part_of_it_is_one() {
        for membership in [membership(), Membership::default()] {
            let encoded = membership.encode();
            assert_eq!(Membership::decode(&encoded), Ok(membership));
            for end in 0..encoded.len() {
                assert!(Membership::decode(&encoded[..end]).is_err(), "cut at {end}");
            }
            assert!(Membership::decode(&[&encoded[..], &[0]].concat()).is_err());
        }
    }

    #[test]
    fn the_order_of_roles_does_not_show() {
        let mut other = membership();
        other.conf_state.voters.reverse();
        other.conf_state.voters_outgoing.rotate_left(1);
        assert_eq!(other.encode(), membership().encode());
    }

    #[test]
    fn what_decodes_after_a_flip_was_not_encoded_otherwise() {
        let encoded = membership().encode();
        for position in 0..encoded.len() {
            for bit in 0..8 {
                let mut flipped = encoded.clone();
                flipped[position] ^= 1 << bit;
                if let Ok(membership) = Membership::decode(&flipped) {
                    assert_eq!(membership.encode(), flipped, "bit {bit} of byte {position}");
                }
            }
        }
    }

    #[test]
    fn a_newer_version_is_named() {
        let mut encoded = membership().encode();
        encoded[0] = 2;
        assert_eq!(Membership::decode(&encoded), Err(Malformed("membership: its version is unknown")));
    }
}
