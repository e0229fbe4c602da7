//! A backend without a cluster: it applies to a state machine of its own, and refuses what it is told to.

use std::sync::{Arc, Mutex, MutexGuard};
use std::thread;
use std::time::{Duration, Instant};

use bytes::Bytes;

use crate::command::{Command, Condition, RequestId};
use crate::membership::{Member, Membership};
use crate::message::{
    AdminReply, AdminRequest, Ask, Backend, ClientRequest, MemberProgress, Refusal, Reply, SnapshotInfo, Status,
    Transfer, WriteReply,
};
use crate::store::{Applied, Item, StateMachine, Version};
use crate::watch::Watchers;

/// How long a test waits for clients to wait.
pub(super) const PATIENCE: Duration = Duration::from_secs(60);

/// See the module.
pub(super) struct Fake {
    watchers: Watchers,
    state: Mutex<State>,
}

struct State {
    machine: StateMachine,
    membership: Arc<Membership>,
    writes: u64,
    reads: u64,
    stale_reads: u64,
    write_answer: Option<WriteReply>,
    read_refusal: Option<Refusal>,
    snapshot_refusal: Option<Refusal>,
    admin_answer: Option<AdminReply>,
    admin: Option<AdminRequest>,
    stalled: Option<&'static str>,
}

impl Fake {
    pub(super) fn new() -> Self {
        let mut membership = Membership::default();
        for (id, port) in [(1, 12379), (2, 22379), (3, 32379)] {
            let url = format!("http://127.0.0.1:{port}");
            membership.members.insert(id, Member { url, directory: None, promote: false });
        }
        membership.conf_state.voters = vec![1, 3];
        membership.conf_state.learners = vec![2];
        let state = State {
            machine: StateMachine::new(),
            membership: Arc::new(membership),
            writes: 0,
            reads: 0,
            stale_reads: 0,
            write_answer: None,
            read_refusal: None,
            snapshot_refusal: None,
            admin_answer: None,
            admin: None,
            stalled: None,
        };
        Fake { watchers: Watchers::new(), state: Mutex::new(state) }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("no test panics with it")
    }

    /// Writes a key of its own so many times.
    pub(super) fn write_often(&self, key: &'static [u8], count: usize) {
        let command = Command::encode_put(key, b"", &Condition::default(), None);
        let command = Command::decode(&command.into()).expect("it was encoded");
        let mut state = self.state();
        let told = state.machine.applied_index();
        for _ in 0..count {
            state.writes += 1;
            let id = RequestId { node: 1, boot: 1, sequence: state.writes };
            let index = state.machine.applied_index() + 1;
            state.machine.apply(index, 1, id, &command);
        }
        self.watchers.changed(told, state.machine.applied_index(), [key]);
    }

    /// What a key has.
    pub(super) fn item(&self, key: &[u8]) -> Option<Item> {
        self.state().machine.version().get(key)
    }

    /// How many writes got here.
    pub(super) fn writes(&self) -> u64 {
        self.state().writes
    }

    /// How many linearizable reads got here.
    pub(super) fn reads(&self) -> u64 {
        self.state().reads
    }

    /// Answers all further writes so, and applies none.
    pub(super) fn answer_writes(&self, reply: WriteReply) {
        self.state().write_answer = Some(reply);
    }

    /// Refuses linearizable reads.
    pub(super) fn refuse_reads(&self, refusal: Option<Refusal>) {
        self.state().read_refusal = refusal;
    }

    /// Refuses snapshots.
    pub(super) fn refuse_snapshots(&self, refusal: Refusal) {
        self.state().snapshot_refusal = Some(refusal);
    }

    /// Answers all further admin requests so.
    pub(super) fn answer_admin(&self, reply: AdminReply) {
        self.state().admin_answer = Some(reply);
    }

    /// The last admin request, once.
    pub(super) fn take_admin(&self) -> Option<AdminRequest> {
        self.state().admin.take()
    }

    /// Makes a thread look stalled.
    pub(super) fn stall(&self, thread: &'static str) {
        self.state().stalled = Some(thread);
    }

    /// Ends what waits.
    pub(super) fn stop(&self) {
        self.watchers.stop();
    }

    /// Returns when so many clients wait.
    pub(super) fn await_watches(&self, count: usize) {
        let deadline = Instant::now() + PATIENCE;
        while self.watchers.count() < count {
            assert!(Instant::now() < deadline, "only {} of {count} clients wait", self.watchers.count());
            thread::yield_now();
        }
    }
}

impl Backend for Arc<Fake> {
    type Session = ();

    fn session(&self) {}

    fn submit(&self, requests: &mut Vec<ClientRequest>) {
        for ClientRequest { ask, deadline, reply } in requests.drain(..) {
            reply.send(match ask {
                Ask::Write(command) => Reply::Write(self.write(&mut (), command, deadline)),
                Ask::Read => Reply::Read(self.read(&mut (), deadline)),
                Ask::StaleRead => Reply::Read(self.stale()),
            });
        }
    }

    fn write(&self, (): &mut (), command: Bytes, _deadline: Instant) -> WriteReply {
        let mut state = self.state();
        state.writes += 1;
        if let Some(reply) = &state.write_answer {
            return reply.clone();
        }
        let command = Command::decode(&command).expect("the API encodes what can be decoded");
        let id = RequestId { node: 1, boot: 1, sequence: state.writes };
        let index = state.machine.applied_index() + 1;
        let applied = state.machine.apply(index, 1, id, &command);
        if let Command::Put { key, .. } | Command::Delete { key, .. } = &command {
            self.watchers.changed(index - 1, index, [&key[..]]);
        }
        drop(state);
        match applied {
            Applied::First(outcome) => WriteReply::Applied(outcome),
            other => panic!("a new request came to {other:?}"),
        }
    }

    fn read(&self, (): &mut (), _deadline: Instant) -> Result<Arc<Version>, Refusal> {
        let mut state = self.state();
        state.reads += 1;
        match &state.read_refusal {
            Some(refusal) => Err(refusal.clone()),
            None => Ok(Arc::new(state.machine.version())),
        }
    }

    fn stale(&self) -> Result<Arc<Version>, Refusal> {
        Ok(Arc::new(self.state().machine.version()))
    }

    /// Every other time the applier has to be asked.
    fn newest(&self) -> Option<Arc<Version>> {
        let mut state = self.state();
        state.stale_reads += 1;
        (state.stale_reads % 2 == 1).then(|| Arc::new(state.machine.version()))
    }

    fn applied(&self) -> (u64, u64) {
        let state = self.state();
        (state.machine.applied_index(), state.machine.keys() as u64)
    }

    fn status(&self, _deadline: Instant) -> Result<Status, Refusal> {
        if self.state().stalled == Some("driver") {
            return Err(Refusal::Overloaded("the driver does not answer"));
        }
        let progress = |id, match_index, last_contact| {
            let transfer = (id == 2).then_some(Transfer { index: 1, sent: 100, bytes: 1234 });
            MemberProgress { id, match_index, last_contact, snapshot: false, transfer }
        };
        Ok(Status {
            id: 1,
            role: "leader",
            leader: 1,
            term: 3,
            commit_index: 9,
            first_index: 2,
            last_index: 10,
            snapshot_index: 1,
            membership: Arc::clone(&self.state().membership),
            progress: vec![progress(1, 10, None), progress(2, 4, Some(Duration::from_millis(70)))],
            change: Some("promoting member 2".to_owned()),
        })
    }

    fn live(&self) -> Result<(), &'static str> {
        self.state().stalled.map_or(Ok(()), Err)
    }

    fn admin(&self, request: AdminRequest, _deadline: Instant) -> AdminReply {
        let mut state = self.state();
        state.admin = Some(request);
        state.admin_answer.clone().unwrap_or_else(|| AdminReply::Done(Arc::clone(&state.membership)))
    }

    fn snapshot(&self, _deadline: Instant) -> Result<SnapshotInfo, Refusal> {
        match &self.state().snapshot_refusal {
            Some(refusal) => Err(refusal.clone()),
            None => Ok(SnapshotInfo { index: 7, bytes: 1234 }),
        }
    }

    fn watchers(&self) -> &Watchers {
        &self.watchers
    }

    fn uptime(&self) -> Duration {
        Duration::from_millis(5)
    }
}
