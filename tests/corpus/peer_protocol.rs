//! What peers say: hellos, and streams of frames however they are cut.

use raftexample::membership::Membership;
use raftexample::peer_protocol::{
    ELEMENTS_MAX, FrameError, FrameReader, HELLO_BYTES_MAX, Hello, HelloAnswer, HelloRefusal, PeerMessage,
    SnapshotHeader,
};

use crate::choices::{Choices, Pieces};

pub fn run(input: &[u8]) {
    let mut choices = Choices::new(input);
    match choices.below(4) {
        0 => json(choices.below(4), choices.rest()),
        1 => frames(choices.rest()),
        _ => frames(&well_framed(&mut choices)),
    }
}

fn json(kind: usize, json: &[u8]) {
    match kind {
        0 => {
            let Ok(hello) = Hello::from_json(json) else { return };
            assert!(json.len() <= HELLO_BYTES_MAX && hello.from != 0 && hello.protocol_min <= hello.protocol_max);
            let again = hello.to_json();
            // An escape may be shorter than what it stands for.
            if again.len() <= HELLO_BYTES_MAX {
                assert_eq!(Hello::from_json(again.as_bytes()), Ok(hello.clone()));
            }
            if let Ok(protocol) = hello.common_protocol() {
                assert!((hello.protocol_min..=hello.protocol_max).contains(&protocol));
            }
            // Its boot is later than all that it continues.
            for boot in [hello.boot, 0, hello.earlier_boots.first().copied().unwrap_or(1)] {
                assert!(!hello.continues(boot) || hello.boot > boot);
            }
        }
        1 => {
            if let Ok(answer) = serde_json::from_slice::<HelloAnswer>(json) {
                let again = serde_json::to_vec(&answer).expect("it was JSON");
                assert_eq!(serde_json::from_slice::<HelloAnswer>(&again).expect("it is JSON"), answer);
                let _ = answer.members.map(|members| Membership::decode(&members));
            }
        }
        2 => {
            if let Some(refusal) = HelloRefusal::from_json(json) {
                assert_eq!(HelloRefusal::from_json(refusal.to_json().as_bytes()), Some(refusal.clone()));
                assert!((400..600).contains(&refusal.status()) && !refusal.to_string().is_empty());
            }
        }
        _ => {
            if let Ok(header) = SnapshotHeader::from_json(json) {
                assert_eq!(SnapshotHeader::from_json(header.to_json().as_bytes()), Ok(header));
            }
        }
    }
}

/// Frames whose length and checksum are right, whatever is in them, and sometimes one that is cut.
fn well_framed(choices: &mut Choices<'_>) -> Vec<u8> {
    let mut stream = Vec::new();
    while !choices.is_empty() {
        let kind = match choices.byte() {
            common @ 0..=199 => common % 5 + 1,
            any => any.wrapping_mul(37),
        };
        let length = usize::from(choices.short() % 2048);
        let payload = choices.bytes(length);
        let start = stream.len();
        stream.extend_from_slice(&(payload.len() as u32 + 1).to_le_bytes());
        stream.push(kind);
        stream.extend_from_slice(payload);
        let checksum = crc32c::crc32c(&stream[start..]);
        stream.extend_from_slice(&checksum.to_le_bytes());
    }
    stream
}

fn frames(stream: &[u8]) {
    let (messages, end) = read(stream, usize::MAX);
    // However the network cuts the stream, the same arrives.
    for piece in [1, 7, 64] {
        assert_eq!(read(stream, piece), (messages.clone(), end), "in pieces of {piece}");
    }
    let mut again = Vec::new();
    for message in &messages {
        let before = again.len();
        message.encode(&mut again);
        assert_eq!(again.len() - before, message.frame_bytes(), "{message:?}");
        let entries = if let PeerMessage::Raft(message) = message { message.entries.len() } else { 0 };
        assert!(message.is_within_limits() || entries > ELEMENTS_MAX / 2, "{message:?} came, and could not be sent");
        let _ = message.lane();
    }
    assert_eq!(read(&again, usize::MAX), (messages, End::Whole), "what was decoded and encoded is not the same");
}

/// How a stream ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum End {
    Whole,
    Torn,
    Length,
    Checksum,
    Message,
}

/// All messages of a stream of which each read gives at most `piece` bytes.
fn read(stream: &[u8], piece: usize) -> (Vec<PeerMessage>, End) {
    let mut reader = FrameReader::new(Pieces { stream, piece });
    let mut messages = Vec::new();
    loop {
        let before = messages.len();
        match reader.next_batch(&mut messages) {
            Ok(true) => assert!(messages.len() > before, "a batch has a message"),
            Ok(false) => return (messages, End::Whole),
            Err(FrameError::Io(_)) => return (messages, End::Torn),
            Err(FrameError::Length(_)) => return (messages, End::Length),
            Err(FrameError::Checksum) => return (messages, End::Checksum),
            Err(FrameError::Message(_)) => return (messages, End::Message),
        }
    }
}
