use std::cell::Cell;
use std::net::SocketAddr;
use std::time::Duration;

use bytes::Bytes;
use protobuf::ProtobufEnum;
use raft::eraftpb::{Entry, EntryType, Message, MessageType};
use raftexample::command::{Command, Condition, RequestId};
use raftexample::membership::NodeId;
use raftexample::message::{AdminRequest, Refusal};
use raftexample::peer_protocol::{
    AdminOutcome, FRAME_BYTES_MAX, ForwardName, ForwardRefusal, ForwardedWrite, HELLO_HEADER, HELLO_PATH, Hello,
    HelloAnswer, LogPosition, NodeIdentity, PeerMessage, SNAPSHOT_HEADER, SNAPSHOT_PATH, STREAM_PATH, SnapshotHeader,
};
use raftexample::peer_sender::say_hello;

use crate::exposition::Exposition;
use crate::support::{Cluster, FAST, wait_for};
use crate::usage::{dawdle, leaves_nothing_behind};
use crate::wire::{Answer, Wire};

/// The member that this test takes the place of.
const IMPOSTOR: NodeId = 3;

/// Connections to the peer port, at most.
const CONNECTIONS_MAX: usize = 512;

/// See the constant of the same name for clients.
const GROWN_BYTES_MAX: usize = 24 << 20;

/// A member of a cluster of three that says and sends what no node would.
struct Impostor {
    me: NodeIdentity,
    position: LogPosition,
}

/// One of the two whom it talks to.
#[derive(Clone, Copy)]
struct Victim {
    id: NodeId,
    address: SocketAddr,
}

impl Impostor {
    /// Asks member 3 who it is, ends it for good, and takes its place.
    fn replace(cluster: &mut Cluster) -> Self {
        let asking =
            NodeIdentity { cluster: None, id: 99, directory: 0, boot: 0, earlier_boots: [].into(), url: String::new() };
        let hello = Hello::new(&asking, IMPOSTOR, &LogPosition::default());
        let HelloAnswer { cluster: id, directory, boot, .. } =
            say_hello(cluster.peer_url(IMPOSTOR), &hello).expect("it answers who only asks");
        cluster.kill(IMPOSTOR);
        let url = cluster.peer_url(IMPOSTOR).to_owned();
        let position = LogPosition::default();
        position.set(cluster.status_number(1, "term"), cluster.status_number(1, "last_index"));
        Self {
            me: NodeIdentity { cluster: id, id: IMPOSTOR, directory, boot, earlier_boots: [].into(), url },
            position,
        }
    }

    fn hello(&self, to: Victim) -> Hello {
        Hello::new(&self.me, to.id, &self.position)
    }

    /// Sends a whole stream, and returns the status of its answer.
    fn stream(&self, to: Victim, lane: &str, bytes: &[u8]) -> u16 {
        let mut wire = self.begin_stream(to, lane, &self.hello(to).to_json());
        if !bytes.is_empty() {
            wire.send(format!("{:x}\r\n", bytes.len()));
            wire.send(bytes);
            wire.send("\r\n");
        }
        wire.send("0\r\n\r\n");
        only_status(&mut wire)
    }

    fn begin_stream(&self, to: Victim, lane: &str, hello: &str) -> Wire {
        let mut wire = Wire::connect(to.address);
        wire.send(format!(
            "POST {STREAM_PATH}{lane} HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n{HELLO_HEADER}: {hello}\r\n\r\n"
        ));
        wire
    }

    /// Sends messages that are whole frames.
    fn send(&self, to: Victim, messages: &[PeerMessage]) {
        let mut bytes = Vec::new();
        messages.iter().for_each(|message| message.encode(&mut bytes));
        assert_eq!(self.stream(to, "bulk", &bytes), 204, "the frames are right, whatever is in them: {messages:?}");
    }

    fn snapshot(&self, to: Victim, header: &str, body: &[u8]) -> u16 {
        let (hello, length) = (self.hello(to).to_json(), body.len());
        let mut wire = Wire::connect(to.address);
        wire.send(format!(
            "POST {SNAPSHOT_PATH} HTTP/1.1\r\nHost: x\r\nContent-Length: {length}\r\n\
             {HELLO_HEADER}: {hello}\r\n{SNAPSHOT_HEADER}: {header}\r\n\r\n"
        ));
        wire.send(body);
        only_status(&mut wire)
    }
}

/// The status of the one answer that there is.
#[track_caller]
fn only_status(wire: &mut Wire) -> u16 {
    wire.half_close();
    match &wire.answers()[..] {
        [Answer { status, .. }] => *status,
        other => panic!("{other:?}"),
    }
}

fn post(victim: Victim, target: &str, body: &str) -> u16 {
    let mut wire = Wire::connect(victim.address);
    let length = body.len();
    wire.send(format!("POST {target} HTTP/1.1\r\nHost: x\r\nContent-Length: {length}\r\n\r\n{body}"));
    only_status(&mut wire)
}

fn refused(cluster: &Cluster, victim: Victim, cause: &str) -> u64 {
    let metrics = Exposition::parse(&cluster.client(victim.id).get("/_/metrics").text()).unwrap();
    metrics.value("raftexample_peer_messages_refused_total", &[("peer", "3"), ("cause", cause)]) as u64
}

#[test]
fn nothing_that_a_hostile_peer_says_stops_a_node_or_stays_behind() {
    let mut cluster = Cluster::start(3, FAST);
    assert_eq!(cluster.client(1).put("/key", b"value").status, 204);
    let impostor = Impostor::replace(&mut cluster);
    let address = |id| cluster.peer_url(id).trim_start_matches("http://").parse().unwrap();
    let victims = [1, 2].map(|id| Victim { id, address: address(id) });
    let (term, members) = (cluster.status_number(1, "term"), cluster.client(1).get("/_/members").text());
    let processes = [1, 2].map(|id| cluster.process_id(id));
    leaves_nothing_behind(&processes, GROWN_BYTES_MAX, |round| {
        for victim in victims {
            hostile_hellos(&impostor, victim);
            hostile_frames(&cluster, &impostor, victim);
            hostile_snapshots(&impostor, victim);
            hostile_raft_messages(&cluster, &impostor, victim);
            hostile_requests(&cluster, &impostor, victim, round);
            crowd(&cluster, victim);
            assert_eq!(cluster.client(victim.id).put("/key", b"value").status, 204);
        }
    });
    for victim in victims {
        assert_eq!(cluster.client(victim.id).get("/_/members").text(), members);
        assert_eq!(cluster.client(victim.id).get("/key").text(), "value");
        assert_eq!(cluster.client(victim.id).get("/stolen").status, 404, "no request was taken for another node's");
        assert!(!cluster.log(victim.id).contains("panicked"));
    }
    let elections = cluster.status_number(1, "term") - term;
    assert!(elections < 10, "{elections} elections: a member can force one, not an absurd term");

    // The one thing that a member may say which ends a node: that it has lost what it had acknowledged.
    let [leader, follower] = if cluster.leader() == 1 { victims } else { [victims[1], victims[0]] };
    let term = cluster.status_number(follower.id, "term") + 1;
    let commit = cluster.status_number(follower.id, "last_index") + 1000;
    let heartbeat = raft_message(MessageType::MsgHeartbeat, follower, term);
    impostor.send(follower, &[PeerMessage::Raft(Message { commit, ..heartbeat })]);
    assert_eq!(cluster.wait_end(follower.id).code(), Some(1));
    let log = cluster.log(follower.id);
    let last = log.lines().last().unwrap_or_default();
    assert!(last.starts_with("raftexample: ") && last.contains(&commit.to_string()), "{last}");
    assert_eq!(cluster.client(leader.id).get("/key?consistency=stale").text(), "value");
}

fn hostile_hellos(impostor: &Impostor, victim: Victim) {
    let good = impostor.hello(victim);
    let with = |change: fn(&mut Hello)| {
        let mut hello = good.clone();
        change(&mut hello);
        hello.to_json()
    };
    let long = "x".repeat(5000);
    let cases = [
        (good.to_json(), 200),
        ("".to_owned(), 400),
        ("{".to_owned(), 400),
        ("[".repeat(2000), 400),
        ("null".to_owned(), 400),
        (good.to_json().replace("\"term\":", "\"term\":-"), 400),
        (good.to_json().replace("\"term\":", "\"term\":1e999,\"x\":"), 400),
        (with(|hello| hello.from = 0), 400),
        (with(|hello| (hello.protocol_min, hello.protocol_max) = (2, 1)), 400),
        (with(|hello| (hello.protocol_min, hello.protocol_max) = (u32::MAX, u32::MAX)), 406),
        (with(|hello| (hello.protocol_min, hello.protocol_max) = (0, 0)), 406),
        (with(|hello| hello.to = u64::MAX), 421),
        (with(|hello| hello.cluster.as_mut().unwrap().0[0] ^= 1), 412),
        (with(|hello| hello.directory ^= 1), 409),
        // Of an older run, and of one that does not remember the one that was met.
        (with(|hello| hello.boot = 0), 409),
        (with(|hello| (hello.boot, hello.earlier_boots) = (u64::MAX, vec![7])), 409),
    ];
    for (hello, status) in cases {
        assert_eq!(post(victim, HELLO_PATH, &hello), status, "{hello}");
        if status != 200 {
            let mut wire = impostor.begin_stream(victim, "fast", &hello);
            wire.send("0\r\n\r\n");
            assert_eq!(only_status(&mut wire), status, "{hello}");
        }
    }
    assert_eq!(post(victim, HELLO_PATH, &long), 413);
    assert_eq!(only_status(&mut impostor.begin_stream(victim, "fast", &long)), 400);
    assert_eq!(only_status(&mut impostor.begin_stream(victim, "fast", &"x".repeat(17 << 10))), 431);
    assert_eq!(only_status(&mut impostor.begin_stream(victim, "slow", &good.to_json())), 404);
    assert_eq!(post(victim, "/", ""), 404);
    assert_eq!(post(victim, &STREAM_PATH.repeat(10), ""), 404);
    let mut wire = Wire::connect(victim.address);
    wire.send(format!("GET {HELLO_PATH} HTTP/1.1\r\nHost: x\r\n\r\n"));
    assert_eq!(only_status(&mut wire), 405);
}

/// A frame with a right checksum around any payload.
fn frame(kind: u8, payload: &[u8]) -> Vec<u8> {
    let mut frame = (payload.len() as u32 + 1).to_le_bytes().to_vec();
    frame.push(kind);
    frame.extend_from_slice(payload);
    let checksum = crc32c::crc32c(&frame);
    frame.extend_from_slice(&checksum.to_le_bytes());
    frame
}

fn hostile_frames(cluster: &Cluster, impostor: &Impostor, victim: Victim) {
    let heartbeat = raft_message(MessageType::MsgHeartbeatResponse, victim, 1);
    let encoded = |message: Message| {
        let mut bytes = Vec::new();
        PeerMessage::Raft(message).encode(&mut bytes);
        bytes
    };
    let good = encoded(heartbeat.clone());
    let wrong_checksum = [&good[..good.len() - 1], &[good[good.len() - 1] ^ 1]].concat();
    let count = |kind| frame(kind, &u32::MAX.to_le_bytes());
    let malformed = [
        vec![0xff; 64],
        vec![0; 64],
        (FRAME_BYTES_MAX as u32).to_le_bytes().to_vec(),
        u32::MAX.to_le_bytes().to_vec(),
        [b"GET / HTTP/1.1\r\n\r\n".to_vec(), vec![b'x'; 2 << 20]].concat(),
        wrong_checksum.clone(),
        [good.clone(), wrong_checksum].concat(),
        frame(0, b""),
        frame(6, b"a kind that must be understood"),
        frame(1, &[0xff; 1000]),
        // Fields that protobuf keeps although nobody knows them, and entries that cost more than their bytes.
        frame(1, &[0x88, 0x02, 1]),
        frame(1, &[7 << 3 | 2, 0].repeat(1 << 17)),
        count(2),
        count(3),
        frame(4, &[7; 10]),
        frame(4, &[&[0; 24][..], &[9]].concat()),
        frame(5, &[&[0; 24][..], &[2, 6], &2_u32.to_le_bytes(), &[0xff, 0xfe]].concat()),
        frame(5, &[0xff; 3000]),
    ];
    let before = refused(cluster, victim, "malformed-frame");
    for bytes in &malformed {
        for lane in ["fast", "bulk"] {
            let status = impostor.stream(victim, lane, bytes);
            assert_eq!(status, 400, "{}", bytes[..bytes.len().min(100)].escape_ascii());
        }
    }
    assert_eq!(refused(cluster, victim, "malformed-frame") - before, 2 * malformed.len() as u64);

    let before = refused(cluster, victim, "misrouted");
    for (from, to) in
        [(victim.id, victim.id), (0, victim.id), (IMPOSTOR, 0), (IMPOSTOR, IMPOSTOR), (IMPOSTOR, u64::MAX)]
    {
        assert_eq!(impostor.stream(victim, "fast", &encoded(Message { from, to, ..heartbeat.clone() })), 400);
    }
    assert_eq!(refused(cluster, victim, "misrouted") - before, 5);

    let before = refused(cluster, victim, "unknown-kind");
    assert_eq!(impostor.stream(victim, "fast", &[frame(0x80, b"from the future"), frame(0xff, b"")].concat()), 204);
    assert_eq!(refused(cluster, victim, "unknown-kind") - before, 2);

    // Streams that stop within a frame: in order, by the end of the connection, by a reset, and in silence.
    assert_eq!(impostor.stream(victim, "fast", &good[..good.len() / 2]), 503);
    let part = format!("{:x}\r\n", good.len());
    let stopped = || {
        let mut wire = impostor.begin_stream(victim, "fast", &impostor.hello(victim).to_json());
        wire.send(&part);
        wire.send(&good[..good.len() / 2]);
        wire
    };
    stopped().half_close();
    stopped().reset();
    let silent = stopped();
    dawdle(Duration::from_millis(20));
    assert_eq!(impostor.stream(victim, "fast", &good), 204, "the next one is served");
    silent.reset();
}

fn hostile_snapshots(impostor: &Impostor, victim: Victim) {
    let header = |index, bytes| SnapshotHeader { index, term: 1, leader_term: 1, bytes }.to_json();
    for (header, body, status) in [
        (String::new(), &b""[..], 400),
        ("{}".to_owned(), b"", 400),
        (header(1 << 40, u64::MAX), b"raftsnap", 507),
        (header(1 << 40, 0), b"", 422),
        (header(u64::MAX, 8), b"raftsnap", 422),
        (header(0, 100), &[7; 100], 422),
        (header(1 << 40, 1 << 20), &[7; 1000], 422),
        (header(1 << 40, 10), &[7; 1 << 20], 422),
    ] {
        assert_eq!(impostor.snapshot(victim, &header, body), status, "{header}");
    }
}

fn raft_message(msg_type: MessageType, to: Victim, term: u64) -> Message {
    Message { msg_type, from: IMPOSTOR, to: to.id, term, ..Message::default() }
}

/// All types, with numbers from everywhere. What is a plausible lie is left out: there is no defence against a member
/// that leads, votes or acknowledges falsely.
fn hostile_raft_messages(cluster: &Cluster, impostor: &Impostor, victim: Victim) {
    let (term, last) = (cluster.status_number(victim.id, "term"), cluster.status_number(victim.id, "last_index"));
    let commit = cluster.status_number(victim.id, "commit_index");
    let entry = |index, term, data: &[u8]| Entry { index, term, data: data.to_vec().into(), ..Entry::default() };
    let mut odd_change = entry(last + 1, term, &[0xff; 40]);
    odd_change.entry_type = EntryType::EntryConfChangeV2;
    let of_term = |entries: Vec<Entry>| move |message: Message| Message { entries: entries.clone().into(), ..message };
    let bodies: Vec<Box<dyn Fn(Message) -> Message>> = vec![
        Box::new(|message| message),
        Box::new(|message| Message { index: u64::MAX, log_term: u64::MAX, commit: u64::MAX, ..message }),
        Box::new(move |message| Message { index: commit, log_term: 0, ..message }),
        Box::new(move |message| Message { index: commit, log_term: u64::MAX / 2, ..message }),
        Box::new(|message| Message { reject: true, reject_hint: u64::MAX, ..message }),
        Box::new(|message| Message { request_snapshot: u64::MAX, reject: true, ..message }),
        Box::new(|message| Message { context: vec![7; 10_000].into(), ..message }),
        Box::new(|message| Message { context: b"CampaignOfNobody".to_vec().into(), ..message }),
        Box::new(of_term(vec![entry(u64::MAX, term, b"x"), entry(0, 0, b"")])),
        Box::new(of_term(vec![entry(last + 9, term, b"x")])),
        Box::new(of_term(vec![odd_change])),
        Box::new(of_term(vec![entry(1, term, &[7; 1000]); 1000])),
    ];
    let mut sent = 0;
    let count = |cause: &str| refused(cluster, victim, cause);
    let causes = ["type", "term", "malformed", "second-leader"];
    let before = causes.map(count);
    let mut types: Vec<MessageType> = MessageType::values().to_vec();
    // It makes a follower a candidate, whom nobody hears from for a moment: what is said of its leader comes first.
    types.sort_by_key(|msg_type| *msg_type == MessageType::MsgTimeoutNow);
    for msg_type in types {
        let mut messages = Vec::new();
        for term in [0, 1, term, u64::MAX / 2, u64::MAX] {
            messages.extend(bodies.iter().map(|body| PeerMessage::Raft(body(raft_message(msg_type, victim, term)))));
        }
        sent += messages.len();
        impostor.send(victim, &messages);
    }
    // They are taken in the order of their arrival.
    wait_for("the last of them", || {
        let metrics = Exposition::parse(&cluster.client(victim.id).get("/_/metrics").text()).unwrap();
        let queue = metrics.value("raftexample_queue_length", &[("queue", "driver")]);
        (queue == 0.0 && count("type") > before[0]).then_some(())
    });
    let added: Vec<u64> = causes.iter().zip(before).map(|(cause, before)| count(cause) - before).collect();
    println!("{sent} forged messages to node {}, refused {causes:?}: {added:?}", victim.id);
    assert!(added.iter().all(|count| *count > 0), "{causes:?}: {added:?}");
    assert_eq!(added[0], 8 * 5 * bodies.len() as u64, "seven types never travel, and a snapshot does as a file");
}

/// What travels beside Raft.
fn hostile_requests(cluster: &Cluster, impostor: &Impostor, victim: Victim, round: usize) {
    let put = |key: &'static [u8]| {
        let (key, value) = (Bytes::from_static(key), Bytes::from_static(b"forged"));
        Bytes::from(Command::Put { key, value, condition: Condition::default(), token: None }.encode())
    };
    let id = |node, sequence| RequestId { node, boot: u64::MAX, sequence };
    // Of the victim's own term, or it would look at nothing.
    let term = cluster.status_number(victim.id, "term");
    let name = ForwardName { term, boot: u64::MAX, number: round as u64 + 1 };
    let forward = |node, data| PeerMessage::Forward { name, writes: vec![ForwardedWrite { id: id(node, 1), data }] };
    let before = refused(cluster, victim, "malformed");
    let record = Command::RecordDirectory { member: victim.id, directory: 7 };
    impostor.send(
        victim,
        &[
            forward(victim.id, put(b"stolen")),
            forward(u64::MAX, put(b"stolen")),
            forward(IMPOSTOR, Bytes::new()),
            forward(IMPOSTOR, Bytes::from_static(&[0xff; 100])),
            forward(IMPOSTOR, put(b"stolen").slice(..10)),
            // Leaders propose it themselves; of a forged one the victim would end.
            forward(IMPOSTOR, record.encode().into()),
        ],
    );
    wait_for("all forged forwards to be refused", || {
        (refused(cluster, victim, "malformed") - before >= 6).then_some(())
    });

    let ids: Vec<RequestId> = (0..1000).map(|sequence| id(victim.id, sequence)).collect();
    // Each is a request of its own: one with the name of another would get the answer to that.
    let sequence = Cell::new(1000 * round as u64);
    let admin = |request| {
        sequence.set(sequence.get() + 1);
        PeerMessage::AdminForward { term, id: id(IMPOSTOR, sequence.get()), request }
    };
    let long_url = format!("http://{}:1", "x".repeat(1000));
    impostor.send(
        victim,
        &[
            PeerMessage::Forward { name, writes: vec![] },
            PeerMessage::ForwardRefused { ids: ids.clone(), reason: ForwardRefusal::Dropped },
            PeerMessage::ForwardRefused { ids: ids.clone(), reason: ForwardRefusal::NotLeader { leader: u64::MAX } },
            PeerMessage::ForwardRefused { ids, reason: ForwardRefusal::Full("it is".to_owned()) },
            PeerMessage::AdminAnswer { id: id(victim.id, 1), outcome: AdminOutcome::Done { index: u64::MAX } },
            PeerMessage::AdminAnswer { id: id(victim.id, 2), outcome: AdminOutcome::Unknown },
            PeerMessage::AdminAnswer { id: id(0, 3), outcome: AdminOutcome::Refused(Refusal::Stopping) },
            admin(AdminRequest::AddMember { id: 0, url: "http://127.0.0.1:1".to_owned(), voter: None }),
            admin(AdminRequest::AddMember { id: 1, url: "http://127.0.0.1:1".to_owned(), voter: Some(true) }),
            admin(AdminRequest::AddMember { id: 9, url: String::new(), voter: Some(true) }),
            admin(AdminRequest::AddMember { id: 9, url: "nonsense".to_owned(), voter: None }),
            admin(AdminRequest::AddMember { id: u64::MAX, url: long_url, voter: Some(true) }),
            admin(AdminRequest::RemoveMember { id: 0 }),
            admin(AdminRequest::RemoveMember { id: u64::MAX }),
            admin(AdminRequest::TransferLeader { id: u64::MAX }),
            admin(AdminRequest::ReplaceMembers(vec![])),
            admin(AdminRequest::ReplaceMembers(vec![(1, String::new(), true), (1, String::new(), true)])),
            admin(AdminRequest::ReplaceMembers((1..10_000).map(|id| (id, format!("http://h:{id}"), true)).collect())),
        ],
    );
}

/// As many connections as the port takes, and more: members that are connected talk on.
fn crowd(cluster: &Cluster, victim: Victim) {
    let mut crowd = Vec::new();
    wait_for("a port that is full", || {
        crowd.extend((0..CONNECTIONS_MAX / 2).map(|_| Wire::connect(victim.address)));
        let metrics = Exposition::parse(&cluster.client(victim.id).get("/_/metrics").text()).unwrap();
        let open = metrics.value("raftexample_http_connections", &[("port", "peer")]);
        assert!(open <= CONNECTIONS_MAX as f64);
        (open == CONNECTIONS_MAX as f64).then_some(())
    });
    let answers = Wire::connect(victim.address).answers();
    assert_eq!(answers.iter().map(|answer| (answer.status, answer.closes)).collect::<Vec<_>>(), [(503, true)]);
    for id in [1, 2] {
        assert_eq!(cluster.client(id).put("/key", b"value").status, 204);
    }
}
