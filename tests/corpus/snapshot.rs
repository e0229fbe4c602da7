//! Snapshot files: any bytes, blocks with good checksums and anything in them, and good files that were damaged.

use std::sync::Arc;

use bytes::Bytes;
use raftexample::command::{Command, Condition, Kind, RequestId, Token};
use raftexample::membership::{ClusterId, Membership};
use raftexample::snapshot::{self, Contents};
use raftexample::store::{Applied, StateMachine};

use crate::choices::Choices;

const CLUSTER: ClusterId = ClusterId([7; 16]);
const PREAMBLE: &[u8] = b"raftsnap\x01\0\0\0";

pub fn run(input: &[u8]) {
    let mut choices = Choices::new(input);
    match choices.below(4) {
        0 => read_any(choices.rest()),
        1 => damaged(&mut choices),
        _ => read_any(&well_checked(&mut choices)),
    }
}

/// What is read at all is a state like any other: written again it is the same, and it can be gone on from.
fn read_any(bytes: &[u8]) {
    let _ = snapshot::peek(&mut &bytes[..]);
    let Ok(contents) = snapshot::read(&mut &bytes[..]) else { return };
    let Contents { header, membership, mut state, totals } = contents;
    assert_eq!(totals.bytes, bytes.len() as u64);
    assert_eq!((state.keys() as u64, state.bytes()), (totals.keys, totals.key_value_bytes));
    let membership = Arc::new(membership);
    let first = write(&state, &membership, header.cluster);
    let again = snapshot::read(&mut &first[..]).expect("what was written can be read");
    assert_eq!(again.header, header);
    assert_eq!(again.membership, *membership);
    let second = write(&again.state, &membership, header.cluster);
    assert!(first == second, "a state that was written and read makes other bytes");
    if header.index < u64::MAX - 100 {
        go_on(&mut state);
    }
}

fn write(state: &StateMachine, membership: &Arc<Membership>, cluster: ClusterId) -> Vec<u8> {
    let mut out = Vec::new();
    snapshot::write(&state.capture(membership.clone()), cluster, &mut out).expect("a Vec takes everything");
    out
}

/// Requests that a window may or may not have seen are applied at most once.
fn go_on(state: &mut StateMachine) {
    for node in 0..4 {
        for sequence in [1, 2, 5, u64::MAX] {
            let id = RequestId { node, boot: 1, sequence };
            let command = put(b"key", &sequence.to_le_bytes(), Some(&[node as u8, sequence as u8]));
            let index = state.applied_index() + 1;
            let _ = state.apply(index, u64::MAX, id, &command);
            let repeat = state.apply(index + 1, u64::MAX, id, &command);
            assert!(matches!(repeat, Applied::Repeat), "{id:?} was applied twice");
        }
        state.forget_node(node);
    }
}

fn put(key: &[u8], value: &[u8], token: Option<&[u8]>) -> Command {
    let condition = Condition::default();
    let token = token.map(|token| Token::new(token, Kind::Put, key, &condition, value));
    Command::Put { key: Bytes::copy_from_slice(key), value: Bytes::copy_from_slice(value), condition, token }
}

/// Blocks that are chained as they should be, of records that may make no sense, and often the right totals.
fn well_checked(choices: &mut Choices<'_>) -> Vec<u8> {
    let mut forged = Forged::new(CLUSTER);
    if !choices.one_in(8) {
        let header = [choices.number(), choices.number(), choices.number()];
        let members = (1..=u64::from(choices.byte() % 4)).map(|id| (id, format!("http://h:{id}")));
        forged.begin(header, &Membership::founding(members));
    }
    let mut section = 3;
    while !choices.is_empty() {
        section = match choices.byte() {
            0..=99 => section,
            100..=199 => (section + 1).min(7),
            other => (other.wrapping_mul(7) % 10) | if other > 250 { 0x80 } else { 0 },
        };
        let payload = match choices.one_in(16) {
            true => choices.piece().to_vec(),
            false => records(choices, section, &mut forged.totals),
        };
        forged.block(section, &payload);
    }
    forged.end()
}

/// A file that is written block by block.
pub struct Forged {
    cluster: ClusterId,
    file: Vec<u8>,
    checksum: u32,
    blocks: u64,
    /// Keys, their bytes, windows, tokens, changes.
    totals: [u64; 5],
}

impl Forged {
    pub fn new(cluster: ClusterId) -> Forged {
        let checksum = crc32c::crc32c(PREAMBLE);
        Forged { cluster, file: PREAMBLE.to_vec(), checksum, blocks: 0, totals: [0; 5] }
    }

    /// Index, term, and the index from which on all changes are known; and the members.
    pub fn begin(&mut self, header: [u64; 3], membership: &Membership) {
        let mut payload = self.cluster.0.to_vec();
        header.iter().for_each(|number| payload.extend_from_slice(&number.to_le_bytes()));
        self.block(1, &payload);
        self.block(2, &membership.encode());
    }

    pub fn item(&mut self, etag: u64, key: &[u8], value: &[u8]) {
        let mut payload = etag.to_le_bytes().to_vec();
        for bytes in [key, value] {
            payload.extend_from_slice(&(bytes.len() as u32).to_le_bytes());
            payload.extend_from_slice(bytes);
        }
        self.totals[0] += 1;
        self.totals[1] += (key.len() + value.len()) as u64;
        self.block(3, &payload);
    }

    fn block(&mut self, section: u8, payload: &[u8]) {
        let mut head = vec![section];
        head.extend_from_slice(&(payload.len() as u32).to_le_bytes());
        self.checksum = crc32c::crc32c_append(crc32c::crc32c_append(self.checksum, &head), payload);
        self.file.extend_from_slice(&head);
        self.file.extend_from_slice(&self.checksum.to_le_bytes());
        self.file.extend_from_slice(payload);
        self.blocks += 1;
    }

    pub fn end(mut self) -> Vec<u8> {
        let bytes = self.file.len() as u64 + 9 + 7 * 8;
        let totals = self.totals.into_iter().chain([self.blocks, bytes]);
        let payload: Vec<u8> = totals.flat_map(u64::to_le_bytes).collect();
        self.block(8, &payload);
        self.file
    }
}

fn records(choices: &mut Choices<'_>, section: u8, totals: &mut [u64; 5]) -> Vec<u8> {
    let mut out = Vec::new();
    for _ in 0..1 + choices.below(4) {
        match section {
            3 => {
                out.extend_from_slice(&choices.number().to_le_bytes());
                for _ in 0..2 {
                    let piece = choices.piece();
                    out.extend_from_slice(&(piece.len() as u32).to_le_bytes());
                    out.extend_from_slice(piece);
                    totals[1] += piece.len() as u64;
                }
                totals[0] += 1;
            }
            4 => out.extend_from_slice(&choices.number().to_le_bytes()),
            5 => {
                let ranges = choices.below(4) as u32;
                for _ in 0..3 {
                    out.extend_from_slice(&choices.number().to_le_bytes());
                }
                out.extend_from_slice(&ranges.to_le_bytes());
                for _ in 0..2 * ranges {
                    out.extend_from_slice(&choices.number().to_le_bytes());
                }
                totals[2] += 1;
            }
            6 => {
                // The two hashes, and what came of the request, whose length only the reader knows.
                let length = 16 + 16 + choices.below(24);
                let mut token = choices.bytes(length).to_vec();
                token.resize(length, 0);
                out.extend_from_slice(&token);
                totals[3] += 1;
            }
            7 => {
                out.extend_from_slice(&choices.number().to_le_bytes());
                out.push(1 + choices.byte() % 3);
                let key = choices.piece();
                out.extend_from_slice(&(key.len() as u32).to_le_bytes());
                out.extend_from_slice(key);
                totals[4] += 1;
            }
            _ => out.extend_from_slice(choices.piece()),
        }
    }
    out
}

/// A good snapshot with a fault that its checksums surely tell.
fn damaged(choices: &mut Choices<'_>) {
    let mut state = StateMachine::new();
    for sequence in 1..=1 + choices.below(6) as u64 {
        let (key, value) = (choices.bytes(2), choices.piece());
        let key = if key.is_empty() { b"key" } else { key };
        let token = choices.flag().then_some(key);
        let id = RequestId { node: 1 + sequence % 2, boot: 1, sequence: 2 * sequence };
        state.apply(sequence, 1, id, &put(key, value, token));
    }
    let membership = Arc::new(Membership::founding([(1, "http://h:1".to_owned())]));
    let good = write(&state, &membership, CLUSTER);
    assert!(snapshot::read(&mut &good[..]).is_ok());
    let mut bad = good.clone();
    let at = |choices: &mut Choices<'_>, length: usize| usize::from(choices.short()) % length;
    match choices.below(5) {
        // Three flipped bits, anywhere.
        0 => {
            for _ in 0..1 + choices.below(3) {
                let position = at(choices, bad.len());
                bad[position] ^= 1 << choices.below(8);
            }
        }
        // One run of bits.
        1 => {
            let position = at(choices, bad.len() - 4);
            bad[position..position + 4].iter_mut().for_each(|byte| *byte ^= choices.byte());
        }
        2 => bad.truncate(at(choices, good.len())),
        3 => bad.extend_from_slice(choices.piece()),
        // A part that is there twice, or is missing.
        _ => {
            let (from, to) = (at(choices, good.len()), at(choices, good.len()));
            bad = [&good[..from], &good[to..]].concat();
        }
    }
    assert!(bad == good || snapshot::read(&mut &bad[..]).is_err(), "damage was not noticed");
}
