use std::collections::VecDeque;
use std::sync::Arc;

use criterion::Criterion;
use raft::eraftpb::{HardState, Message};
use raftexample::membership::{ClusterId, Membership, NodeId};
use raftexample::memory_disk::MemoryDisk;
use raftexample::raft_core::{Committed, CoreOptions, FOUNDING_INDEX, FOUNDING_TERM, Output, RaftCore};
use raftexample::raft_log::{LogIdentity, LogOptions, Marker, RaftLog};

const NODES: u64 = 3;

/// What three cores take together for a read round that the leader begins: its heartbeats to both others, and their
/// answers. Messages go from hand to hand: no threads, encoding or network.
pub(crate) fn all(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("read index");
    group.bench_function("round of three", |bencher| {
        let mut cluster = Cluster::led_by_first();
        let mut round: u64 = 0;
        bencher.iter(|| {
            round += 1;
            cluster.cores[0].read_index(round.to_le_bytes().to_vec());
            cluster.talk();
            assert_eq!(cluster.mail.confirmed.take(), Some(round));
        });
    });
    group.finish();
}

struct Cluster {
    cores: Vec<RaftCore>,
    mail: Mail,
}

/// What the cores have put out and nobody has taken yet.
#[derive(Default)]
struct Mail {
    messages: VecDeque<Message>,
    /// The newest read round that a quorum has confirmed.
    confirmed: Option<u64>,
}

impl Output for Mail {
    fn send(&mut self, message: Message) {
        self.messages.push_back(message);
    }

    fn committed(&mut self, _committed: Committed) {}

    fn read_index(&mut self, context: Vec<u8>, _index: u64) {
        self.confirmed = Some(u64::from_le_bytes(context.try_into().unwrap()));
    }
}

impl Cluster {
    fn led_by_first() -> Cluster {
        let founders = (1..=NODES).map(|id| (id, format!("http://127.0.0.1:{id}2379")));
        let membership = Arc::new(Membership::founding(founders));
        let cores = (1..=NODES).map(|id| core(id, &membership)).collect();
        let mut cluster = Cluster { cores, mail: Mail::default() };
        cluster.cores[0].campaign();
        cluster.talk();
        // Before it has committed something in its term it may answer no reads.
        assert!(cluster.cores[0].is_leader() && cluster.cores[0].can_read_index());
        cluster
    }

    /// Until nobody has anything more to say.
    fn talk(&mut self) {
        loop {
            for core in &mut self.cores {
                while core.has_ready() {
                    core.process_ready(&mut self.mail).unwrap();
                }
            }
            if self.mail.messages.is_empty() {
                return;
            }
            for message in self.mail.messages.drain(..) {
                self.cores[message.to as usize - 1].step(message).unwrap().unwrap();
            }
        }
    }
}

fn core(id: NodeId, membership: &Arc<Membership>) -> RaftCore {
    let identity = LogIdentity { cluster: ClusterId([1; 16]), node: id, directory: id.into() };
    let marker = Marker { index: FOUNDING_INDEX, term: FOUNDING_TERM, conf_state: membership.conf_state.clone() };
    let hard_state = HardState { term: FOUNDING_TERM, commit: FOUNDING_INDEX, ..HardState::default() };
    let log = RaftLog::create(Arc::new(MemoryDisk::new()), identity, LogOptions::default(), marker, hard_state);
    let options = CoreOptions {
        id,
        election_ticks: 10,
        election_seed: id,
        membership: membership.clone(),
        snapshot_index: FOUNDING_INDEX,
        logger: slog::Logger::root(slog::Discard, slog::o!()),
    };
    RaftCore::open(log.unwrap(), options).unwrap()
}
