//! The driver's way to its peers: one [`PeerSender`] for each member, and one thread for each snapshot on its way.

use std::cell::Cell;
use std::collections::BTreeMap;
use std::io::{self, Read};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use crossbeam_channel::Sender;
use raft::eraftpb::Message;

use crate::acquaintances::{Acquaintances, Promises};
use crate::data_dir::SnapshotFiles;
use crate::disk::DiskFile;
use crate::driver::{Event, Network};
use crate::fail_point::fail_point;
use crate::membership::{Membership, NodeId};
use crate::message::Transfer;
use crate::metrics::Metrics;
use crate::peer_protocol::{Hello, HelloAnswer, HelloRefusal, LogPosition, NodeIdentity, PeerMessage, SnapshotHeader};
use crate::peer_sender::{PeerReport, PeerSender, SenderConfig, SnapshotSendError, send_snapshot};

/// How often the progress of a snapshot transfer is logged.
const PROGRESS_INTERVAL: Duration = Duration::from_secs(5);

/// All peers of one node.
pub struct PeerNetwork {
    me: NodeIdentity,
    position: Arc<LogPosition>,
    files: SnapshotFiles,
    events: Sender<Event>,
    senders: BTreeMap<NodeId, (String, PeerSender)>,
    metrics: Arc<Metrics>,
    acquaintances: Acquaintances,
    /// Whom to talk to as long as this node has no membership of its own: a joiner's first contacts.
    contacts: Membership,
    /// The membership that the senders were last made to fit.
    followed: Option<Arc<Membership>>,
    /// Followers to whom a snapshot is on its way. Shared with the transfers' threads, which end their own entry: the
    /// driver hears of the end by a message, but a new transfer may be due before that message is taken.
    transfers: Transfers,
}

/// The snapshots on their way, by receiver.
#[derive(Clone, Default)]
struct Transfers(Arc<Mutex<BTreeMap<NodeId, Arc<Progress>>>>);

struct Progress {
    index: u64,
    bytes: u64,
    sent: AtomicU64,
}

impl Transfers {
    fn lock(&self) -> MutexGuard<'_, BTreeMap<NodeId, Arc<Progress>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl PeerNetwork {
    /// The network of node `me`; what happens on it is told through `events`.
    pub fn new(
        me: NodeIdentity,
        position: Arc<LogPosition>,
        files: SnapshotFiles,
        acquaintances: Acquaintances,
        contacts: Membership,
        events: Sender<Event>,
        metrics: Arc<Metrics>,
    ) -> PeerNetwork {
        let (senders, transfers, followed) = (BTreeMap::new(), Transfers::default(), None);
        PeerNetwork { me, position, files, events, senders, metrics, acquaintances, contacts, followed, transfers }
    }

    fn spawn_sender(&self, peer: NodeId, url: &str) -> io::Result<PeerSender> {
        let (me, url, position) = (self.me.clone(), url.to_owned(), self.position.clone());
        let config = SenderConfig { me, peer, url, position, metrics: self.metrics.peers.add(peer) };
        let events = self.events.clone();
        PeerSender::spawn(config, move |report| {
            let event = match report {
                // What was queued while there was no connection may be lost.
                PeerReport::Connected { peer, .. } | PeerReport::Unreachable { peer, .. } => Event::Unreachable(peer),
                PeerReport::Refused { peer, refusal, .. } => refused(peer, refusal),
            };
            // Only hints, and repeated: a full queue means that the driver has more important news to digest.
            drop(events.try_send(event));
        })
    }

    /// Opens the way to a peer that has introduced itself and is no member as far as is known here. What is known
    /// here may be old: a leader that was added since waits for this node's answers, and so does the candidate whom
    /// only this node's vote can elect. The next change of the membership decides whether it stays.
    fn answer_stranger(&mut self, hello: &Hello, membership: &Membership) {
        if membership.members.contains_key(&hello.from) || self.senders.contains_key(&hello.from) {
            return;
        }
        match self.spawn_sender(hello.from, &hello.url) {
            Ok(sender) => drop(self.senders.insert(hello.from, (hello.url.clone(), sender))),
            Err(error) => log::error!("failed to start the sender for node {}: {error}", hello.from),
        }
    }

    /// Starts a transfer. The file is opened here and now: it stays readable when it is removed for a newer one.
    fn start_transfer(&self, to: NodeId, url: String, message: &Message) -> Result<(), String> {
        let metadata = message.get_snapshot().get_metadata();
        let (file, bytes) = self.files.open(metadata.index).map_err(|error| error.to_string())?;
        let header = SnapshotHeader { index: metadata.index, term: metadata.term, leader_term: message.term, bytes };
        let progress = Arc::new(Progress { index: metadata.index, bytes, sent: AtomicU64::new(0) });
        let hello = Hello::new(&self.me, to, &self.position);
        let (events, transfers, metrics) = (self.events.clone(), self.transfers.clone(), self.metrics.clone());
        transfers.lock().insert(to, progress.clone());
        let body = move || {
            log::info!("sending the snapshot of index {} ({bytes} bytes) to member {to}", header.index);
            let started = Instant::now();
            let result = send_file(to, &url, &hello, &header, file, &progress);
            match &result {
                Ok(()) => {
                    log::info!("sent a snapshot of {bytes} bytes to member {to} in {:?}", started.elapsed());
                    metrics.snapshots.send.done(bytes, started.elapsed());
                }
                Err(error) => {
                    log::warn!("failed to send a snapshot to member {to}: {error}; raft asks for it again");
                    metrics.snapshots.send.failed();
                }
            }
            transfers.lock().remove(&to);
            // Without this raft would never send to the follower again. The driver waits for no transfer.
            let _ = events.send(Event::SnapshotSent(to, result.is_ok()));
        };
        let spawned = thread::Builder::new().name(format!("snapshot-{to}")).spawn(body);
        spawned.map(drop).map_err(|error| {
            self.transfers.lock().remove(&to);
            error.to_string()
        })
    }
}

fn send_file(
    to: NodeId,
    url: &str,
    hello: &Hello,
    header: &SnapshotHeader,
    file: Box<dyn DiskFile>,
    progress: &Progress,
) -> Result<(), SnapshotSendError> {
    let logged = Cell::new(Instant::now());
    let note = |sent: u64| {
        progress.sent.store(sent, Ordering::Relaxed);
        if logged.get().elapsed() >= PROGRESS_INTERVAL {
            logged.set(Instant::now());
            log::info!("snapshot for member {to}: {sent} of {} bytes", header.bytes);
        }
    };
    send_snapshot(url, hello, header, FileReader { file, offset: 0 }, &note)
}

struct FileReader {
    file: Box<dyn DiskFile>,
    offset: u64,
}

impl Read for FileReader {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let got = self.file.read_at(buffer, self.offset)?;
        self.offset += got as u64;
        Ok(got)
    }
}

/// Decides whether node `me`, with this membership, takes what a peer sends that introduces itself so. If it does, it
/// remembers the peer's data directory, durably, when this returns.
///
/// # Errors
/// The refusal, for the peer.
pub fn admit(
    hello: &Hello,
    me: &NodeIdentity,
    promises: Promises,
    membership: &Membership,
    acquaintances: &mut Acquaintances,
) -> Result<HelloAnswer, HelloRefusal> {
    let protocol = hello.check(me)?;
    if membership.removed.contains(&hello.from) {
        return Err(removal(me.id, membership));
    }
    // Who only asks for the cluster's id sends nothing that has to be trusted.
    if hello.cluster.is_some() {
        acquaintances.meet(hello, promises, membership)?;
    }
    let NodeIdentity { cluster, id, directory, boot, .. } = me.clone();
    Ok(HelloAnswer { protocol, cluster, id, directory, boot, members: Some(membership.encode()) })
}

/// What it means for a node that `peer` refuses it.
pub fn refused(peer: NodeId, refusal: HelloRefusal) -> Event {
    match refusal {
        HelloRefusal::Removed => Event::Removed(peer),
        HelloRefusal::OtherDirectory | HelloRefusal::OlderCopy => Event::Disowned(peer, refusal),
        _ => Event::Unreachable(peer),
    }
}

/// What a removed node is told by node `me`. Only a voter tells it the truth, which ends it: the voters may not know yet
/// that the change is committed, and need the votes of those who leave until they do; a node that does not vote can't
/// teach them.
fn removal(me: NodeId, membership: &Membership) -> HelloRefusal {
    match membership.conf_state.voters.contains(&me) {
        true => HelloRefusal::Removed,
        false => HelloRefusal::NotReady("only a voter tells who was removed".to_owned()),
    }
}

impl Network for PeerNetwork {
    fn send(&mut self, to: NodeId, message: PeerMessage) -> bool {
        fail_point("driver-send-before");
        self.senders.get(&to).is_some_and(|(_, sender)| sender.send(message).is_ok())
    }

    fn send_snapshot(&mut self, to: NodeId, message: Message) -> bool {
        let Some((url, _)) = self.senders.get(&to) else { return false };
        if self.transfers.lock().contains_key(&to) {
            return false;
        }
        let started = self.start_transfer(to, url.clone(), &message);
        if let Err(error) = &started {
            log::warn!("failed to send a snapshot to member {to}: {error}; raft asks for it again");
        }
        started.is_ok()
    }

    fn transfer(&self, to: NodeId) -> Option<Transfer> {
        let transfers = self.transfers.lock();
        let Progress { index, bytes, sent } = &**transfers.get(&to)?;
        Some(Transfer { index: *index, bytes: *bytes, sent: sent.load(Ordering::Relaxed) })
    }

    fn follow(&mut self, membership: &Arc<Membership>) {
        let is_new = self.followed.as_ref().is_none_or(|followed| !Arc::ptr_eq(followed, membership));
        self.followed = Some(membership.clone());
        let membership = if membership.members.is_empty() { &self.contacts } else { &**membership };
        if is_new {
            let keep = |id: &NodeId, url: &String| membership.members.get(id).is_some_and(|member| member.url == *url);
            self.senders.retain(|id, (url, _)| keep(id, url));
            self.metrics.peers.retain(|id| self.senders.contains_key(&id));
        }
        for (id, member) in membership.members.iter().filter(|(id, _)| **id != self.me.id) {
            if self.senders.contains_key(id) {
                continue;
            }
            match self.spawn_sender(*id, &member.url) {
                Ok(sender) => drop(self.senders.insert(*id, (member.url.clone(), sender))),
                // Tried again at the next tick; until then the member is unreachable.
                Err(error) => log::error!("failed to start the sender for member {id}: {error}"),
            }
        }
    }

    fn hello(
        &mut self,
        hello: &Hello,
        promises: Promises,
        membership: &Membership,
    ) -> Result<HelloAnswer, HelloRefusal> {
        let answer = admit(hello, &self.me, promises, membership, &mut self.acquaintances)?;
        if hello.cluster.is_some() {
            self.answer_stranger(hello, membership);
        }
        Ok(answer)
    }

    fn failed(&self) -> Option<&str> {
        self.acquaintances.failed()
    }

    fn stop(&mut self, within: Duration) {
        PeerSender::stop(std::mem::take(&mut self.senders).into_values().map(|(_, sender)| sender), within);
    }

    fn directory(&self, member: NodeId) -> Option<u128> {
        if member == self.me.id { Some(self.me.directory) } else { self.acquaintances.directory(member) }
    }

    fn position(&mut self, term: u64, last_index: u64) {
        self.position.set(term, last_index);
    }
}

#[cfg(test)]
mod tests {
    use crossbeam_channel::bounded;

    use super::*;
    use crate::fixtures::{CLUSTER, founders};
    use crate::memory_disk::MemoryDisk;

    fn identity(id: NodeId) -> NodeIdentity {
        let url = format!("http://127.0.0.1:{id}");
        NodeIdentity { cluster: Some(CLUSTER), id, directory: id.into(), boot: 1, earlier_boots: [].into(), url }
    }

    /// A leader that was added while this node was away needs its answers for longer than a tick.
    #[test]
    fn a_stranger_is_answered_until_the_membership_changes() {
        let disk: Arc<dyn crate::disk::Disk> = Arc::new(MemoryDisk::new());
        let (events, _events) = bounded(1024);
        let mut network = PeerNetwork::new(
            identity(1),
            Arc::default(),
            SnapshotFiles::new(disk.clone(), CLUSTER),
            Acquaintances::open(disk).unwrap(),
            Membership::default(),
            events,
            Arc::new(Metrics::new()),
        );
        let membership = Arc::new(founders(3));
        network.follow(&membership);
        let hello = Hello::new(&identity(4), 1, &LogPosition::default());
        network.hello(&hello, Promises::default(), &membership).unwrap();
        let peers = |network: &PeerNetwork| network.senders.keys().copied().collect::<Vec<_>>();
        assert_eq!(peers(&network), [2, 3, 4]);
        network.follow(&membership);
        assert_eq!(peers(&network), [2, 3, 4], "at each tick");
        network.follow(&Arc::new(founders(2)));
        assert_eq!(peers(&network), [2]);
        network.stop(Duration::ZERO);
    }
}
