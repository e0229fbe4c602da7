//! Records: what a batch says, one after the other.
//!
//! A record is a kind, a length, a CRC32C of both and the payload, and the payload. The batch has checksums of its own;
//! this one is for an entry that is read back alone. All numbers are little-endian.

use bytes::Bytes;
use raft::eraftpb::{ConfState, Entry, EntryType, HardState};

use super::{Marker, Position};
use crate::codec::{Fields, Malformed, put_bytes, put_u8, put_u32, put_u64};

/// Kind, length, checksum.
pub(super) const RECORD_HEADER_BYTES: usize = 9;

/// What [`put_hard_state`] appends.
pub(super) const HARD_STATE_BYTES: usize = RECORD_HEADER_BYTES + 3 * 8;

/// The kinds of records, as on disk. A number is never used again for something else.
mod kind {
    pub(super) const ENTRY: u8 = 1;
    pub(super) const HARD_STATE: u8 = 2;
    pub(super) const MARKER: u8 = 3;
    pub(super) const RESTART: u8 = 4;
    pub(super) const COMPACT: u8 = 5;
    pub(super) const CHECKPOINT: u8 = 6;
    pub(super) const SEAL: u8 = 7;
}

/// One step of the log's history.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Record {
    /// The log now ends with this entry: whatever had its index or a later one is gone.
    Entry(Entry),
    /// Raft's term, vote and commit index.
    HardState(HardState),
    /// There is a snapshot.
    Marker(Marker),
    /// The log now begins and ends behind this snapshot, which came from the leader.
    Restart(Marker),
    /// Entries up to here are not needed.
    Compact(Position),
    /// Begins a segment: what the log was when the segment was made. Its markers and hard state follow.
    Checkpoint {
        /// The last entry that is not needed.
        compacted: Position,
        /// The last entry.
        last: Position,
    },
    /// Ends a segment: the next one exists.
    Seal,
}

fn put_record(out: &mut Vec<u8>, kind: u8, payload: impl FnOnce(&mut Vec<u8>)) {
    let start = out.len();
    put_u8(out, kind);
    put_u32(out, 0);
    put_u32(out, 0);
    let payload_start = out.len();
    payload(out);
    let len = (out.len() - payload_start) as u32;
    out[start + 1..start + 5].copy_from_slice(&len.to_le_bytes());
    let crc = record_crc(kind, &out[payload_start..]);
    out[start + 5..start + RECORD_HEADER_BYTES].copy_from_slice(&crc.to_le_bytes());
}

fn record_crc(kind: u8, payload: &[u8]) -> u32 {
    let head = crc32c::crc32c(&[&[kind][..], &(payload.len() as u32).to_le_bytes()].concat());
    crc32c::crc32c_append(head, payload)
}

/// Appends an entry. Its `sync_log` and unknown fields are not kept: nothing of Raft reads them.
pub(super) fn put_entry(out: &mut Vec<u8>, entry: &Entry) {
    put_record(out, kind::ENTRY, |out| {
        put_u8(out, entry_type_code(entry.entry_type));
        put_u64(out, entry.index);
        put_u64(out, entry.term);
        put_bytes(out, &entry.context);
        out.extend_from_slice(&entry.data);
    });
}

/// The bytes that [`put_entry`] appends.
pub(super) fn entry_bytes(entry: &Entry) -> usize {
    RECORD_HEADER_BYTES + 1 + 8 + 8 + 4 + entry.context.len() + entry.data.len()
}

/// Appends a hard state.
pub(super) fn put_hard_state(out: &mut Vec<u8>, hard_state: &HardState) {
    put_record(out, kind::HARD_STATE, |out| {
        put_u64(out, hard_state.term);
        put_u64(out, hard_state.vote);
        put_u64(out, hard_state.commit);
    });
}

/// Appends a snapshot marker.
pub(super) fn put_marker(out: &mut Vec<u8>, marker: &Marker) {
    put_record(out, kind::MARKER, |out| put_marker_fields(out, marker));
}

/// Appends a new beginning behind a snapshot.
pub(super) fn put_restart(out: &mut Vec<u8>, marker: &Marker) {
    put_record(out, kind::RESTART, |out| put_marker_fields(out, marker));
}

/// Appends a compaction.
pub(super) fn put_compact(out: &mut Vec<u8>, to: Position) {
    put_record(out, kind::COMPACT, |out| put_position(out, to));
}

/// Appends the beginning of a segment.
pub(super) fn put_checkpoint(out: &mut Vec<u8>, compacted: Position, last: Position) {
    put_record(out, kind::CHECKPOINT, |out| {
        put_position(out, compacted);
        put_position(out, last);
    });
}

/// Appends the end of a segment.
pub(super) fn put_seal(out: &mut Vec<u8>) {
    put_record(out, kind::SEAL, |_| {});
}

fn put_position(out: &mut Vec<u8>, position: Position) {
    put_u64(out, position.index);
    put_u64(out, position.term);
}

fn put_marker_fields(out: &mut Vec<u8>, marker: &Marker) {
    put_position(out, Position { index: marker.index, term: marker.term });
    let conf_state = &marker.conf_state;
    for ids in [&conf_state.voters, &conf_state.learners, &conf_state.voters_outgoing, &conf_state.learners_next] {
        put_u32(out, ids.len() as u32);
        ids.iter().for_each(|id| put_u64(out, *id));
    }
    put_u8(out, u8::from(conf_state.auto_leave));
}

/// Takes the next record off `fields`, checksum and all.
pub(super) fn take_record(fields: &mut Fields<'_>) -> Result<Record, Malformed> {
    let kind = fields.u8()?;
    let len = fields.u32()? as usize;
    let crc = fields.u32()?;
    let payload = fields.take(len)?;
    if record_crc(kind, payload) != crc {
        return Err(Malformed("checksum of a record"));
    }
    let mut fields = Fields::new(payload, "record");
    let record = match kind {
        kind::ENTRY => return take_entry(fields).map(Record::Entry),
        kind::HARD_STATE => Record::HardState(HardState {
            term: fields.u64()?,
            vote: fields.u64()?,
            commit: fields.u64()?,
            ..HardState::default()
        }),
        kind::MARKER => Record::Marker(take_marker(&mut fields)?),
        kind::RESTART => Record::Restart(take_marker(&mut fields)?),
        kind::COMPACT => Record::Compact(take_position(&mut fields)?),
        kind::CHECKPOINT => {
            Record::Checkpoint { compacted: take_position(&mut fields)?, last: take_position(&mut fields)? }
        }
        kind::SEAL => Record::Seal,
        _ => return Err(Malformed("kind of a record")),
    };
    fields.finish()?;
    Ok(record)
}

fn take_entry(mut fields: Fields<'_>) -> Result<Entry, Malformed> {
    let entry_type = entry_type_of(fields.u8()?).ok_or(fields.malformed())?;
    Ok(Entry {
        entry_type,
        index: fields.u64()?,
        term: fields.u64()?,
        context: Bytes::copy_from_slice(fields.bytes(usize::MAX)?),
        data: Bytes::copy_from_slice(fields.rest()),
        ..Entry::default()
    })
}

fn take_position(fields: &mut Fields<'_>) -> Result<Position, Malformed> {
    Ok(Position { index: fields.u64()?, term: fields.u64()? })
}

fn take_marker(fields: &mut Fields<'_>) -> Result<Marker, Malformed> {
    let Position { index, term } = take_position(fields)?;
    let conf_state = ConfState {
        voters: take_ids(fields)?,
        learners: take_ids(fields)?,
        voters_outgoing: take_ids(fields)?,
        learners_next: take_ids(fields)?,
        auto_leave: fields.u8()? != 0,
        ..ConfState::default()
    };
    Ok(Marker { index, term, conf_state })
}

fn take_ids(fields: &mut Fields<'_>) -> Result<Vec<u64>, Malformed> {
    let count = fields.count(8)?;
    (0..count).map(|_| fields.u64()).collect()
}

/// On disk an entry's type is a number of ours.
fn entry_type_code(entry_type: EntryType) -> u8 {
    match entry_type {
        EntryType::EntryNormal => 0,
        EntryType::EntryConfChange => 1,
        EntryType::EntryConfChangeV2 => 2,
    }
}

fn entry_type_of(code: u8) -> Option<EntryType> {
    match code {
        0 => Some(EntryType::EntryNormal),
        1 => Some(EntryType::EntryConfChange),
        2 => Some(EntryType::EntryConfChangeV2),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn all_kinds() -> (Vec<u8>, Vec<Record>) {
        let entry = Entry {
            entry_type: EntryType::EntryConfChangeV2,
            index: 5,
            term: 2,
            context: Bytes::from_static(b"context"),
            data: Bytes::from_static(b"data"),
            ..Entry::default()
        };
        let hard_state = HardState { term: 2, vote: 3, commit: 4, ..HardState::default() };
        let mut conf_state = ConfState::from((vec![1, 2], vec![3]));
        conf_state.voters_outgoing = vec![4];
        conf_state.learners_next = vec![5, 6];
        conf_state.auto_leave = true;
        let marker = Marker { index: 4, term: 1, conf_state };
        let (compacted, last) = (Position { index: 3, term: 1 }, Position { index: 5, term: 2 });
        let mut out = Vec::new();
        put_entry(&mut out, &entry);
        assert_eq!(out.len(), entry_bytes(&entry));
        put_hard_state(&mut out, &hard_state);
        put_marker(&mut out, &marker);
        put_restart(&mut out, &marker);
        put_compact(&mut out, compacted);
        put_checkpoint(&mut out, compacted, last);
        put_seal(&mut out);
        let records = vec![
            Record::Entry(entry),
            Record::HardState(hard_state),
            Record::Marker(marker.clone()),
            Record::Restart(marker),
            Record::Compact(compacted),
            Record::Checkpoint { compacted, last },
            Record::Seal,
        ];
        (out, records)
    }

    fn read_all(bytes: &[u8]) -> Result<Vec<Record>, Malformed> {
        let mut fields = Fields::new(bytes, "records");
        let mut records = Vec::new();
        while !fields.rest().is_empty() {
            records.push(take_record(&mut fields)?);
        }
        Ok(records)
    }

    #[test]
    fn records_come_back() {
        let (bytes, records) = all_kinds();
        assert_eq!(read_all(&bytes), Ok(records));
    }

    #[test]
    fn every_flipped_bit_is_an_error() {
        let (mut bytes, _) = all_kinds();
        for bit in 0..bytes.len() * 8 {
            bytes[bit / 8] ^= 1 << (bit % 8);
            assert!(read_all(&bytes).is_err(), "bit {bit}");
            bytes[bit / 8] ^= 1 << (bit % 8);
        }
    }
}
