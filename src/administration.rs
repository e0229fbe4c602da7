//! Requests that change the cluster, from the node that took one to the leader and back.
//!
//! The node that took a request asks the leader, and asks again when the leader changes or does not answer; the leader
//! works on one request at a time, step by step as [`crate::reconfiguration`] plans it, and refuses a second one. Both
//! sides forget everything at a crash: the plan starts from the membership as it is. What a leader has answered it
//! remembers for its term: a question that comes again, or late, must not do what its client was told is not done.
//!
//! An answer says at which index the request was done; the asking node tells its client when it has applied that
//! index itself, so that the client's next question here sees the change.

use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

use crate::command::RequestId;
use crate::membership::NodeId;
use crate::message::{AdminReply, AdminRequest, Refusal};
use crate::peer_protocol::{AdminOutcome, PeerMessage};
use crate::raft_core::RaftCore;
use crate::reconfiguration::{LeaderView, Step, are_members, next_step, promotion};
use crate::replica::{Answer, Apply, Host};

/// Requests of clients that wait on one node, at most; one more is refused. An operator has one or two under way.
pub const PENDING_ADMIN_MAX: usize = 64;

/// Ticks between a change and a hand-over that follows it. A voter that has not applied its own promotion yet lets the
/// order to take over pass, and for an election timeout nobody could write.
const SETTLE_TICKS: u64 = 2;

/// A request that a client of this node waits for.
struct Pending<W> {
    request: AdminRequest,
    deadline: Duration,
    waiter: W,
    /// When it arrived, in ticks.
    since: u64,
    /// The leader and term asked last, and when.
    asked: Option<((NodeId, u64), u64)>,
    /// How many different leaders or terms were asked.
    leaders_asked: u32,
    /// Done once this index is handed out here.
    done_at: Option<u64>,
}

/// What a leader knows of a request that it does not work on.
#[derive(Clone)]
enum Known {
    /// It was answered.
    Answered(AdminOutcome),
    /// Something was done for it, until its origin was silent for too long.
    Begun,
}

/// The latest requests of one node that the leader of a term has answered or given up, at most [`PENDING_ADMIN_MAX`], by
/// their boot and sequence.
#[derive(Default)]
struct Answers {
    latest: VecDeque<((u64, u64), Known)>,
    /// Requests up to this one may be forgotten.
    forgotten: (u64, u64),
}

impl Answers {
    fn of(&self, id: RequestId) -> Option<Known> {
        let name = (id.boot, id.sequence);
        let latest = self.latest.iter().rev().find(|(known, _)| *known == name).map(|(_, known)| known.clone());
        latest.or((name <= self.forgotten).then_some(Known::Answered(AdminOutcome::Unknown)))
    }

    fn note(&mut self, id: RequestId, known: Known) {
        self.latest.push_back(((id.boot, id.sequence), known));
        if self.latest.len() > PENDING_ADMIN_MAX
            && let Some((name, _)) = self.latest.pop_front()
        {
            self.forgotten = self.forgotten.max(name);
        }
    }
}

/// The request that this node, as leader, works on.
struct Leading {
    id: RequestId,
    request: AdminRequest,
    /// When something was last proposed or handed over for it, in ticks.
    acted: Option<u64>,
    /// When it came here, in ticks.
    since: u64,
    /// When its origin last asked, in ticks; an origin that stays away has crashed or given up.
    asked: u64,
    /// What is being done for it now, for an operator.
    progress: String,
}

impl Leading {
    /// Notes and logs what is being done, once.
    fn tell(&mut self, progress: String) {
        if self.progress != progress {
            log::info!("changing the cluster: {progress}");
            self.progress = progress;
        }
    }
}

/// What is known of time and of the others, told by the replica.
pub struct Surroundings<'a> {
    /// Names this run of the node.
    pub boot: u64,
    /// Ticks since the start.
    pub ticks: u64,
    /// The node's time.
    pub now: Duration,
    /// Ticks of one election timeout.
    pub election_ticks: u64,
    /// Whether a member was heard from within one election timeout.
    pub heard: &'a dyn Fn(NodeId) -> bool,
}

/// All requests of the kind on one node.
pub struct Administration<W> {
    pending: BTreeMap<u64, Pending<W>>,
    leading: Option<Leading>,
    /// The answers of this node as the leader of a term, by who asked: members, and whoever was one lately.
    answers: (u64, BTreeMap<NodeId, Answers>),
    /// Since when the configuration is joint without a change under way, in ticks.
    joint_since: Option<u64>,
}

impl<W> Default for Administration<W> {
    fn default() -> Self {
        Administration { pending: BTreeMap::new(), leading: None, answers: (0, BTreeMap::new()), joint_since: None }
    }
}

impl<W> Administration<W> {
    /// Takes a client's request, named by a sequence number of this run.
    pub fn take(
        &mut self,
        sequence: u64,
        request: AdminRequest,
        deadline: Duration,
        waiter: W,
        around: &Surroundings<'_>,
        host: &mut impl Host<W>,
    ) {
        if self.pending.len() >= PENDING_ADMIN_MAX {
            let refusal = Refusal::Overloaded("too many changes of the cluster wait on this node");
            host.answer(waiter, Answer::Admin(AdminReply::Refused(refusal)));
            return;
        }
        let since = around.ticks;
        let pending = Pending { request, deadline, waiter, since, asked: None, leaders_asked: 0, done_at: None };
        self.pending.insert(sequence, pending);
    }

    /// Whether a client waits.
    pub fn is_idle(&self) -> bool {
        self.pending.is_empty()
    }

    /// One tick has passed: ends what has waited too long, and does what the leader does unasked.
    pub fn tick(&mut self, core: &mut RaftCore, around: &Surroundings<'_>, host: &mut impl Host<W>) {
        let voters = &core.membership().conf_state.voters;
        let near = voters.iter().filter(|id| **id == core.id() || (around.heard)(**id)).count();
        // A joiner that was not added yet knows no voters, and who leads neither.
        let quorate = voters.is_empty() || near * 2 > voters.len();
        let ended = |pending: &Pending<W>| {
            let waited = around.ticks - pending.since;
            let hopeless = !quorate && core.leader() == raft::INVALID_ID && waited >= around.election_ticks;
            pending.deadline <= around.now || (hopeless && pending.leaders_asked == 0)
        };
        for (_, pending) in self.pending.extract_if(.., |_, pending| ended(pending)) {
            let reply = match pending.leaders_asked {
                0 if quorate => AdminReply::Refused(Refusal::NoLeader),
                0 => AdminReply::Refused(Refusal::Conflict(
                    "no majority of the voters was heard from lately: nothing can be decided now".to_owned(),
                )),
                _ => AdminReply::Unknown("the change was begun and not seen done in time"),
            };
            host.answer(pending.waiter, Answer::Admin(reply));
        }
        let silent = |leading: &mut Leading| around.ticks - leading.asked > 2 * around.election_ticks;
        if let Some(leading) = self.leading.take_if(silent)
            && leading.acted.is_some()
        {
            // Should its origin be heard from again, a plan made anew could not tell that something was done for it.
            self.note(leading.id, Known::Begun, core);
        }
        self.lead_unasked(core, around);
    }

    /// Promotes learners that have caught up, and ends a joint configuration that nobody else ends: raft itself
    /// forgets to when its leader changes at the wrong moment.
    fn lead_unasked(&mut self, core: &mut RaftCore, around: &Surroundings<'_>) {
        if !core.is_leader() || core.has_pending_change() || core.is_transferring() {
            self.joint_since = None;
            return;
        }
        if core.membership().is_joint() {
            let since = *self.joint_since.get_or_insert(around.ticks);
            if around.ticks - since >= around.election_ticks {
                log::info!("ending the joint configuration that was left over by an earlier leader");
                core.propose_leave_joint();
            }
            return;
        }
        self.joint_since = None;
        if let Some(change) = with_view(core, around, promotion) {
            let id = RequestId { node: core.id(), boot: around.boot, sequence: 0 };
            // Refused, it is tried again at the next tick.
            if core.propose_membership(id, &change).is_ok() {
                log::info!("proposed {change:?}: it has caught up");
            }
        }
    }

    /// Asks the leader, works on what this node leads, and answers what is done.
    pub fn process(&mut self, core: &mut RaftCore, around: &Surroundings<'_>, host: &mut impl Host<W>) {
        self.ask(core, around, host);
        self.lead(core, around, host);
        let handed_out = core.handed_out();
        let done = |pending: &Pending<W>| pending.done_at.is_some_and(|index| index <= handed_out);
        for (_, pending) in self.pending.extract_if(.., |_, pending| done(pending)) {
            host.apply(Apply::Admin(pending.waiter));
        }
    }

    fn ask(&mut self, core: &mut RaftCore, around: &Surroundings<'_>, host: &mut impl Host<W>) {
        let followed = (core.leader(), core.term());
        if followed.0 == raft::INVALID_ID {
            return;
        }
        let mut own = Vec::new();
        for (&sequence, pending) in self.pending.iter_mut().filter(|(_, pending)| pending.done_at.is_none()) {
            let same_leader = pending.asked.is_some_and(|(asked, _)| asked == followed);
            let due = pending.asked.is_none_or(|(_, at)| !same_leader || around.ticks - at >= around.election_ticks);
            if !due {
                continue;
            }
            let id = RequestId { node: core.id(), boot: around.boot, sequence };
            let request = pending.request.clone();
            let asked = match core.is_leader() {
                true => {
                    own.push((id, request));
                    true
                }
                false => host.send(followed.0, PeerMessage::AdminForward { term: followed.1, id, request }),
            };
            if asked {
                pending.asked = Some((followed, around.ticks));
                pending.leaders_asked += u32::from(!same_leader);
            }
        }
        for (id, request) in own {
            self.asked(id, request, core, around, host);
        }
    }

    /// A node, this one or another, asks this one as the leader.
    pub fn asked(
        &mut self,
        id: RequestId,
        request: AdminRequest,
        core: &RaftCore,
        around: &Surroundings<'_>,
        host: &mut impl Host<W>,
    ) {
        if !core.is_leader() {
            // The origin asks again when it knows the new leader.
            return;
        }
        let known = self.answers_of(core).get(&id.node).and_then(|answers| answers.of(id));
        match (&mut self.leading, known) {
            (Some(leading), _) if leading.id == id => leading.asked = around.ticks,
            (_, Some(Known::Answered(outcome))) => self.tell(id, outcome, core, host),
            // An earlier change may still be under way, of this very request through an earlier leader too.
            (None, known) => {
                let (since, asked) = (around.ticks, around.ticks);
                let acted = known.map(|_| around.ticks);
                self.leading = Some(Leading { id, request, acted, since, asked, progress: String::new() });
            }
            (Some(_), None) => self.answer(id, AdminOutcome::Refused(in_progress()), core, host),
            (Some(_), Some(Known::Begun)) => self.answer(id, AdminOutcome::Unknown, core, host),
        }
    }

    fn lead(&mut self, core: &mut RaftCore, around: &Surroundings<'_>, host: &mut impl Host<W>) {
        if !core.is_leader() {
            self.leading = None;
            return;
        }
        let Some(leading) = &mut self.leading else { return };
        let busy = core.has_pending_change() || core.is_transferring();
        let patient = leading.acted.is_some() || around.ticks - leading.since <= around.election_ticks;
        if busy && patient {
            return;
        }
        let outcome = match with_view(core, around, |view| next_step(&leading.request, view)) {
            _ if busy || (core.membership().is_joint() && !patient) => AdminOutcome::Refused(in_progress()),
            Step::Wait(reason) => {
                leading.tell(reason);
                return;
            }
            Step::Done => AdminOutcome::Done { index: core.handed_out() },
            Step::Refuse(_) if leading.acted.is_some() => AdminOutcome::Unknown,
            Step::Refuse(refusal) => AdminOutcome::Refused(refusal),
            Step::Propose(change) => {
                match core.propose_membership(leading.id, &change) {
                    Ok(()) => {
                        leading.acted = Some(around.ticks);
                        leading.tell(format!("proposed {change:?}"));
                    }
                    Err(reason) => leading.tell(format!("can't propose {change:?} now: {reason}")),
                }
                return;
            }
            Step::Transfer(_) if leading.acted.is_some_and(|at| around.ticks - at < SETTLE_TICKS) => return,
            Step::Transfer(to) => {
                leading.tell(format!("handing leadership over to member {to}"));
                leading.acted = Some(around.ticks);
                core.transfer_leader(to);
                return;
            }
        };
        let id = leading.id;
        self.leading = None;
        self.answer(id, outcome, core, host);
    }

    /// What was answered in this term.
    fn answers_of(&mut self, core: &RaftCore) -> &mut BTreeMap<NodeId, Answers> {
        let (term, answers) = &mut self.answers;
        if *term != core.term() {
            *term = core.term();
            answers.clear();
        }
        answers
    }

    fn note(&mut self, id: RequestId, known: Known, core: &RaftCore) {
        self.answers_of(core).entry(id.node).or_default().note(id, known);
    }

    fn answer(&mut self, id: RequestId, outcome: AdminOutcome, core: &RaftCore, host: &mut impl Host<W>) {
        self.note(id, Known::Answered(outcome.clone()), core);
        self.tell(id, outcome, core, host);
    }

    fn tell(&mut self, id: RequestId, outcome: AdminOutcome, core: &RaftCore, host: &mut impl Host<W>) {
        if id.node == core.id() {
            self.answered(id, outcome, host);
        } else {
            // Lost, the origin asks again.
            let _ = host.send(id.node, PeerMessage::AdminAnswer { id, outcome });
        }
    }

    /// The leader has answered a request of this run of this node.
    pub fn answered(&mut self, id: RequestId, outcome: AdminOutcome, host: &mut impl Host<W>) {
        let Some(pending) = self.pending.get_mut(&id.sequence) else { return };
        let reply = match outcome {
            AdminOutcome::Done { index } => {
                pending.done_at = Some(index);
                return;
            }
            // An earlier leader may have begun it; that this one refuses says nothing about that.
            AdminOutcome::Refused(refusal) if pending.leaders_asked <= 1 => AdminReply::Refused(refusal),
            AdminOutcome::Refused(_) | AdminOutcome::Unknown => {
                AdminReply::Unknown("the change was begun, and its end is not known")
            }
        };
        let pending = self.pending.remove(&id.sequence).expect("it was just there");
        host.answer(pending.waiter, Answer::Admin(reply));
    }

    /// What this node, as leader, does for a request at present.
    pub fn progress(&self) -> Option<&str> {
        self.leading.as_ref().map(|leading| leading.progress.as_str()).filter(|progress| !progress.is_empty())
    }

    /// Answers all who wait, because the node stops, maybe since it was `removed`: for some that is the answer.
    pub fn stop(&mut self, core: &RaftCore, removed: bool, host: &mut impl Host<W>) {
        for (_, pending) in std::mem::take(&mut self.pending) {
            let done = match &pending.request {
                AdminRequest::RemoveMember { id } => removed && *id == core.id(),
                AdminRequest::ReplaceMembers(wanted) => removed && are_members(wanted, core.membership()),
                AdminRequest::AddMember { .. } | AdminRequest::TransferLeader { .. } => false,
            };
            let reply = match pending.leaders_asked {
                _ if done => AdminReply::Done(core.membership().clone()),
                0 => AdminReply::Refused(Refusal::Stopping),
                _ => AdminReply::Unknown("the node stops; the change was begun, and its end is not known"),
            };
            host.answer(pending.waiter, Answer::Admin(reply));
        }
    }
}

fn in_progress() -> Refusal {
    Refusal::Conflict("another change of the cluster is in progress".to_owned())
}

/// Shows the leader's knowledge to `decide`.
fn with_view<T>(core: &RaftCore, around: &Surroundings<'_>, decide: impl FnOnce(&LeaderView<'_>) -> T) -> T {
    let me = core.id();
    let progress = core.progress();
    let match_index = |id| {
        let matched = progress.iter().find(|(member, ..)| *member == id).map(|(_, matched, ..)| *matched);
        matched.filter(|_| id == me || (around.heard)(id))
    };
    let view = LeaderView {
        me,
        membership: core.membership(),
        last_index: core.last_index(),
        first_index: core.log().first_index(),
        match_index: &match_index,
    };
    decide(&view)
}
