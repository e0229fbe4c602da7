//! What must be true in every moment of every run: the properties of Raft's figure 3, and that nobody breaks a promise
//! by crashing.
//!
//! The checks look from outside at all nodes together, and remember across crashes what the nodes can't be trusted to
//! remember themselves. Each answers with a sentence if the property does not hold.

use std::collections::BTreeMap;
use std::hash::{DefaultHasher, Hash, Hasher};

use raft::eraftpb::{Entry, Message, MessageType};
use raftexample::membership::NodeId;

/// What a check found.
pub type Checked = Result<(), String>;

/// What a running node shows of itself.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Shown {
    /// Its term.
    pub term: u64,
    /// Whether it leads.
    pub leads: bool,
    /// Its commit index.
    pub commit: u64,
    /// How far its entries were handed out to be applied.
    pub handed_out: u64,
    /// The last index of its log.
    pub last_index: u64,
}

/// An entry, by a fingerprint of its content.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Content(u64);

impl Content {
    /// The fingerprint of anything that can be hashed.
    pub fn of(what: &impl Hash) -> Content {
        // The default hasher has fixed keys, other than that of a hash map.
        let mut hasher = DefaultHasher::new();
        what.hash(&mut hasher);
        Content(hasher.finish())
    }

    /// The fingerprint itself.
    pub fn number(self) -> u64 {
        self.0
    }

    /// The fingerprint of an entry of a log.
    pub fn of_entry(entry: &Entry) -> Content {
        Content::of(&(entry.entry_type as i32, &entry.data[..], &entry.context[..]))
    }
}

/// Everything that was ever seen.
#[derive(Default)]
pub struct Invariants {
    leaders: BTreeMap<u64, NodeId>,
    votes: BTreeMap<(NodeId, u64), NodeId>,
    /// The highest term of which a node has spoken as its own.
    spoken: BTreeMap<NodeId, u64>,
    /// The last append that a node acknowledged: in which term, up to which index.
    acknowledged: BTreeMap<NodeId, (u64, u64)>,
    /// By index and term: content, and the term of the entry before, where it was seen.
    entries: BTreeMap<(u64, u64), (Content, Option<u64>)>,
    /// By index: the term and content of what was handed out.
    committed: BTreeMap<u64, (u64, Content)>,
    /// By index: the highest term that had a leader when the entry was first handed out. It was committed in that term
    /// or before.
    committed_by: BTreeMap<u64, u64>,
    /// By applied index: the state.
    digests: BTreeMap<u64, u64>,
    /// What each running node showed last.
    shown: BTreeMap<NodeId, Shown>,
}

impl Invariants {
    /// The highest index that any node has handed out.
    pub fn committed(&self) -> u64 {
        self.committed.last_key_value().map_or(0, |(&index, _)| index)
    }

    /// The highest term that had a leader.
    pub fn terms(&self) -> usize {
        self.leaders.len()
    }

    /// A node runs and shows this. There is one leader in a term; nothing falls.
    pub fn shows(&mut self, node: NodeId, shown: Shown) -> Checked {
        let last = self.shown.insert(node, shown).unwrap_or_default();
        if shown.term < last.term || shown.commit < last.commit || shown.handed_out < last.handed_out {
            return Err(format!("node {node} fell from {last:?} to {shown:?}"));
        }
        if shown.handed_out > shown.commit || shown.commit > shown.last_index {
            return Err(format!("node {node} shows what can't be: {shown:?}"));
        }
        if shown.leads {
            let leader = *self.leaders.entry(shown.term).or_insert(node);
            if leader != node {
                return Err(format!("nodes {leader} and {node} both lead in term {}", shown.term));
            }
        }
        Ok(())
    }

    /// Whether the node was not yet known to lead in the term it shows.
    pub fn is_new_leader(&self, node: NodeId, shown: &Shown) -> bool {
        shown.leads && self.leaders.get(&shown.term) != Some(&node)
    }

    /// A node has become leader in term `leads_in`: its log has every entry that was committed in an earlier one. (An
    /// election may be won so late that there is a later leader already.) `term_of` answers for its log, whose first
    /// index is `first_index`.
    pub fn leads(
        &self,
        node: NodeId,
        leads_in: u64,
        first_index: u64,
        term_of: impl Fn(u64) -> Option<u64>,
    ) -> Checked {
        // What counts is not the entry's own term: an entry of an earlier term may be committed by a later leader, and a
        // leader between the two need not have it.
        let earlier = |index: &u64| self.committed_by.get(index).is_some_and(|term| *term < leads_in);
        let committed = self.committed.range(first_index..).filter(|(index, _)| earlier(index));
        for (&index, &(term, _)) in committed {
            let theirs = term_of(index);
            if theirs != Some(term) {
                return Err(format!("leader {node} has {theirs:?} at {index}, where term {term} was committed"));
            }
        }
        Ok(())
    }

    /// A node was restarted, after a crash or not, and shows this: it remembers what it has promised.
    pub fn restarts(&mut self, node: NodeId, shown: Shown) -> Checked {
        let spoken = self.spoken.get(&node).copied().unwrap_or(0);
        if shown.term < spoken {
            return Err(format!("node {node} spoke of term {spoken} and restarts in term {}", shown.term));
        }
        if let Some(&(term, index)) = self.acknowledged.get(&node)
            && term == shown.term
            && shown.last_index < index
        {
            let last_index = shown.last_index;
            return Err(format!("node {node} acknowledged index {index} in term {term} and restarts at {last_index}"));
        }
        self.shown.insert(node, shown);
        Ok(())
    }

    /// A node's data directory is lost, and with it all that it promised. Whoever comes back under its id is another
    /// one, whose promises nobody may count on.
    pub fn forgets(&mut self, node: NodeId) {
        self.spoken.remove(&node);
        self.acknowledged.remove(&node);
        self.shown.remove(&node);
        self.votes.retain(|(voter, _), _| *voter != node);
    }

    /// A node sends this: it votes once in a term, and entries are the same wherever they are.
    pub fn sends(&mut self, message: &Message) -> Checked {
        let Message { from, to, term, .. } = *message;
        match message.msg_type {
            // These speak of the term after the sender's own.
            MessageType::MsgRequestPreVote => return Ok(()),
            MessageType::MsgRequestPreVoteResponse if !message.reject => return Ok(()),
            MessageType::MsgRequestVote => self.votes(from, term, from)?,
            MessageType::MsgRequestVoteResponse if !message.reject => self.votes(from, term, to)?,
            MessageType::MsgAppendResponse if !message.reject => {
                self.acknowledged.insert(from, (term, message.index));
            }
            MessageType::MsgAppend => self.has(from, Some(message.log_term), &message.entries)?,
            _ => {}
        }
        let spoken = self.spoken.entry(from).or_default();
        *spoken = (*spoken).max(term);
        Ok(())
    }

    fn votes(&mut self, node: NodeId, term: u64, candidate: NodeId) -> Checked {
        let before = *self.votes.entry((node, term)).or_insert(candidate);
        if before == candidate {
            Ok(())
        } else {
            Err(format!("node {node} voted for {before} and for {candidate} in term {term}"))
        }
    }

    /// A node has these entries in its log, behind one of `previous_term` if that is known. Of the same index and term
    /// they have the same content everywhere, and the same entries before them.
    pub fn has<'a>(
        &mut self,
        node: NodeId,
        previous_term: Option<u64>,
        entries: impl IntoIterator<Item = &'a Entry>,
    ) -> Checked {
        let mut previous = previous_term;
        for entry in entries {
            let content = Content::of_entry(entry);
            let known = self.entries.entry((entry.index, entry.term)).or_insert((content, previous));
            known.1 = known.1.or(previous);
            if known.0 != content || previous.is_some_and(|previous| known.1 != Some(previous)) {
                let Entry { index, term, .. } = entry;
                return Err(format!("entry {index} of term {term} of node {node} is another than elsewhere"));
            }
            previous = Some(entry.term);
        }
        Ok(())
    }

    /// A node hands this out to be applied: at one index it is the same on all nodes.
    pub fn hands_out(&mut self, node: NodeId, index: u64, term: u64, content: Content) -> Checked {
        let newest = self.leaders.last_key_value().map_or(term, |(&newest, _)| newest.max(term));
        self.committed_by.entry(index).or_insert(newest);
        let known = *self.committed.entry(index).or_insert((term, content));
        if known == (term, content) {
            Ok(())
        } else {
            Err(format!("node {node} hands out {content:?} of term {term} at {index}, where {known:?} was committed"))
        }
    }

    /// A node has applied all up to `index`, and its state has this digest.
    pub fn applied(&mut self, node: NodeId, index: u64, digest: u64) -> Checked {
        let known = *self.digests.entry(index).or_insert(digest);
        if known == digest {
            Ok(())
        } else {
            Err(format!("the state of node {node} at index {index} differs from another's"))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(msg_type: MessageType, from: NodeId, to: NodeId, term: u64) -> Message {
        Message { msg_type, from, to, term, ..Message::default() }
    }

    fn entry(index: u64, term: u64, data: &'static [u8]) -> Entry {
        Entry { index, term, data: data.into(), ..Entry::default() }
    }

    #[test]
    fn two_leaders_in_a_term_are_found() {
        let mut invariants = Invariants::default();
        let leads = Shown { term: 5, leads: true, ..Shown::default() };
        assert!(invariants.is_new_leader(1, &leads));
        invariants.shows(1, leads).unwrap();
        assert!(!invariants.is_new_leader(1, &leads));
        invariants.shows(1, leads).unwrap();
        invariants.shows(2, Shown { term: 6, ..leads }).unwrap();
        assert!(invariants.shows(3, leads).is_err());
        assert_eq!(invariants.terms(), 2);
    }

    #[test]
    fn what_falls_is_found() {
        let shown = Shown { term: 5, leads: false, commit: 7, handed_out: 6, last_index: 9 };
        for fallen in [
            Shown { term: 4, ..shown },
            Shown { commit: 6, ..shown },
            Shown { handed_out: 5, ..shown },
            Shown { handed_out: 8, ..shown },
            Shown { commit: 10, ..shown },
        ] {
            let mut invariants = Invariants::default();
            invariants.shows(1, shown).unwrap();
            assert!(invariants.shows(1, fallen).is_err(), "{fallen:?}");
        }
        // The log may be cut, and a restart may forget what is committed.
        let mut invariants = Invariants::default();
        invariants.shows(1, shown).unwrap();
        invariants.shows(1, Shown { last_index: 8, ..shown }).unwrap();
        invariants.restarts(1, Shown { commit: 3, handed_out: 3, ..shown }).unwrap();
        invariants.shows(1, Shown { commit: 4, handed_out: 3, ..shown }).unwrap();
    }

    #[test]
    fn broken_promises_are_found() {
        let mut invariants = Invariants::default();
        let acknowledged = Message { index: 9, ..message(MessageType::MsgAppendResponse, 2, 1, 5) };
        invariants.sends(&acknowledged).unwrap();
        let shown = Shown { term: 5, last_index: 9, ..Shown::default() };
        invariants.restarts(2, shown).unwrap();
        invariants.restarts(2, Shown { term: 6, last_index: 8, ..shown }).unwrap();
        assert!(invariants.restarts(2, Shown { last_index: 8, ..shown }).is_err());
        assert!(invariants.restarts(2, Shown { term: 4, ..shown }).is_err());
        // A term that was only asked about is not promised.
        invariants.sends(&message(MessageType::MsgRequestPreVote, 2, 1, 6)).unwrap();
        invariants.restarts(2, shown).unwrap();
        invariants.sends(&message(MessageType::MsgRequestVote, 2, 1, 6)).unwrap();
        assert!(invariants.restarts(2, shown).is_err());
    }

    #[test]
    fn two_votes_in_a_term_are_found() {
        let mut invariants = Invariants::default();
        let vote = |to, term| message(MessageType::MsgRequestVoteResponse, 3, to, term);
        invariants.sends(&vote(1, 5)).unwrap();
        invariants.sends(&vote(1, 5)).unwrap();
        invariants.sends(&vote(2, 6)).unwrap();
        invariants.sends(&Message { reject: true, ..vote(2, 5) }).unwrap();
        assert!(invariants.sends(&vote(2, 5)).is_err());
        assert!(invariants.sends(&message(MessageType::MsgRequestVote, 3, 1, 6)).is_err());
    }

    #[test]
    fn logs_that_do_not_match_are_found() {
        let mut invariants = Invariants::default();
        invariants.has(1, Some(1), &[entry(2, 1, b"a"), entry(3, 2, b"b"), entry(4, 2, b"c")]).unwrap();
        invariants.has(2, Some(1), &[entry(2, 1, b"a"), entry(3, 3, b"x")]).unwrap();
        invariants.has(2, None, &[entry(4, 2, b"c")]).unwrap();
        assert!(invariants.has(2, Some(2), &[entry(4, 2, b"d")]).is_err());
        assert!(invariants.has(2, Some(1), &[entry(4, 2, b"c")]).is_err());
        let mut append = message(MessageType::MsgAppend, 1, 2, 2);
        (append.index, append.log_term) = (2, 1);
        append.set_entries(vec![entry(3, 2, b"other")].into());
        assert!(invariants.sends(&append).is_err());
    }

    #[test]
    fn a_leader_without_a_committed_entry_is_found() {
        let mut invariants = Invariants::default();
        for (index, term) in [(2, 1), (3, 1), (4, 2)] {
            invariants.hands_out(1, index, term, Content::of(&index)).unwrap();
        }
        assert_eq!(invariants.committed(), 4);
        let log = |last: Option<u64>| move |index: u64| [None, None, None, Some(1), last][index as usize];
        invariants.leads(2, 3, 3, log(Some(2))).unwrap();
        assert!(invariants.leads(2, 3, 3, log(Some(1))).is_err());
        assert!(invariants.leads(2, 3, 3, log(None)).is_err());
        // Elected before that was committed, and told of it only now.
        invariants.leads(2, 2, 3, log(None)).unwrap();
    }

    #[test]
    fn a_late_leader_need_not_have_what_a_later_one_committed() {
        let mut invariants = Invariants::default();
        invariants.shows(3, Shown { leads: true, term: 8, ..Shown::default() }).unwrap();
        invariants.hands_out(1, 2, 6, Content::of(&"a")).unwrap();
        invariants.leads(2, 7, 2, |_| None).expect("its entry of term 6 was committed in term 8");
        assert!(invariants.leads(2, 9, 2, |_| None).is_err());
    }

    #[test]
    fn nodes_that_apply_different_things_are_found() {
        let mut invariants = Invariants::default();
        invariants.hands_out(1, 2, 1, Content::of(&"a")).unwrap();
        invariants.hands_out(2, 2, 1, Content::of(&"a")).unwrap();
        assert!(invariants.hands_out(3, 2, 1, Content::of(&"b")).is_err());
        assert!(invariants.hands_out(3, 2, 2, Content::of(&"a")).is_err());
        invariants.applied(1, 2, 77).unwrap();
        invariants.applied(2, 2, 77).unwrap();
        assert!(invariants.applied(3, 2, 78).is_err());
    }
}
