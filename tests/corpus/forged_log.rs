//! Writes segments as the log's format says, with good checksums and links, and records that mean what they like.

use raftexample::memory_disk::MemoryDisk;

use crate::choices::Choices;
use crate::raft_log::IDENTITY;

const SECTOR_BYTES: usize = 512;
const FIRST: u8 = 0xB6;
const NEXT: u8 = 0x6D;
const SEGMENT_BYTES: usize = 16 << 10;

/// The chain of batches so far.
#[derive(Default)]
struct Chain {
    number: u64,
    link: u32,
}

pub fn write(choices: &mut Choices<'_>, disk: &MemoryDisk) {
    let mut chain = Chain::default();
    let mut sequence = 1;
    while sequence <= 4 {
        let mut file = header(sequence, chain.number + 1, chain.link);
        // The first batch is chained to it.
        chain.link = crc32c::crc32c(&file);
        file.extend_from_slice(&chain.link.to_le_bytes());
        file.resize(SECTOR_BYTES, 0);
        let mut records = Vec::new();
        // What a segment begins with, as a rule.
        if !choices.one_in(16) {
            record(&mut records, 6, &numbers(choices, 4));
            record(&mut records, 3, &marker(choices));
            record(&mut records, 2, &numbers(choices, 3));
        }
        let mut sealed = false;
        while !choices.is_empty() && !sealed {
            match choices.byte() {
                0..=159 => sealed = any_record(choices, &mut records),
                160..=239 => batch(choices, &mut file, &mut chain, &mut records),
                _ => {
                    batch(choices, &mut file, &mut chain, &mut records);
                    record(&mut records, 7, b"");
                    sealed = true;
                }
            }
        }
        batch(choices, &mut file, &mut chain, &mut records);
        file.resize(file.len().max(SEGMENT_BYTES), 0);
        // The length is part of the header, and the header of the chain: longer files are refused, which is fine.
        disk.write_file(&format!("{sequence:016x}.log"), &file);
        sequence += 1;
        if choices.is_empty() && !sealed {
            return;
        }
    }
}

/// A header without its checksum.
fn header(sequence: u64, first_batch: u64, previous: u32) -> Vec<u8> {
    let mut out = b"RAFTLOG\n\x01\0\0\0".to_vec();
    out.extend_from_slice(&IDENTITY.cluster.0);
    out.extend_from_slice(&IDENTITY.node.to_le_bytes());
    out.extend_from_slice(&IDENTITY.directory.to_le_bytes());
    for number in [sequence, SEGMENT_BYTES as u64, first_batch] {
        out.extend_from_slice(&number.to_le_bytes());
    }
    out.extend_from_slice(&previous.to_le_bytes());
    out
}

fn batch(choices: &mut Choices<'_>, file: &mut Vec<u8>, chain: &mut Chain, records: &mut Vec<u8>) {
    let records = std::mem::take(records);
    chain.number += 1;
    let synced = chain.number.saturating_sub(1 + choices.below(3) as u64);
    let mut data = (records.len() as u32).to_le_bytes().to_vec();
    data.extend_from_slice(&chain.number.to_le_bytes());
    data.extend_from_slice(&synced.to_le_bytes());
    data.extend_from_slice(&chain.link.to_le_bytes());
    data.extend_from_slice(&crc32c::crc32c(&records).to_le_bytes());
    chain.link = crc32c::crc32c(&data);
    data.extend_from_slice(&chain.link.to_le_bytes());
    data.extend_from_slice(&records);
    for (position, piece) in data.chunks(SECTOR_BYTES - 1).enumerate() {
        file.push(if position == 0 { FIRST } else { NEXT });
        file.extend_from_slice(piece);
    }
    file.resize(file.len().next_multiple_of(SECTOR_BYTES), 0);
}

fn record(out: &mut Vec<u8>, kind: u8, payload: &[u8]) {
    let length = (payload.len() as u32).to_le_bytes();
    let crc = crc32c::crc32c_append(crc32c::crc32c_append(crc32c::crc32c(&[kind]), &length), payload);
    out.push(kind);
    out.extend_from_slice(&length);
    out.extend_from_slice(&crc.to_le_bytes());
    out.extend_from_slice(payload);
}

/// Whether it was a seal.
fn any_record(choices: &mut Choices<'_>, out: &mut Vec<u8>) -> bool {
    let kind = choices.byte() % 9;
    let payload = match kind {
        1 => {
            let mut entry = vec![choices.byte() % 4];
            entry.extend_from_slice(&numbers(choices, 2));
            entry.extend_from_slice(&0_u32.to_le_bytes());
            entry.extend_from_slice(choices.bytes(2));
            entry
        }
        2 => numbers(choices, 3),
        3 | 4 => marker(choices),
        5 => numbers(choices, 2),
        6 => numbers(choices, 4),
        7 => Vec::new(),
        _ => choices.piece().to_vec(),
    };
    record(out, kind, &payload);
    kind == 7
}

fn numbers(choices: &mut Choices<'_>, count: usize) -> Vec<u8> {
    (0..count).flat_map(|_| choices.number().to_le_bytes()).collect()
}

fn marker(choices: &mut Choices<'_>) -> Vec<u8> {
    let mut out = numbers(choices, 2);
    let voters = choices.below(3) as u32;
    out.extend_from_slice(&voters.to_le_bytes());
    out.extend_from_slice(&numbers(choices, voters as usize));
    out.extend_from_slice(&[0; 12]);
    out.push(0);
    out
}
