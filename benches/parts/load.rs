use bytes::Bytes;
use raft::eraftpb::Entry;
use raftexample::command::{Command, Condition, RequestId};

/// Of a value.
pub(crate) const VALUE_BYTES: usize = 128;

/// Entries of a batch: one writer alone, and what a leader drains at once under 64 of them.
pub(crate) const BATCHES: [usize; 2] = [1, 16];

/// A key as the load generator names it.
pub(crate) fn key(number: u64) -> String {
    format!("key-{number:012}")
}

/// An encoded PUT of [`VALUE_BYTES`].
pub(crate) fn put(number: u64) -> Bytes {
    Command::encode_put(key(number).as_bytes(), &[b'v'; VALUE_BYTES], &Condition::default(), None).into()
}

/// The request that becomes the entry of this index.
pub(crate) fn request(index: u64) -> RequestId {
    RequestId { node: 1, boot: 1 << 32, sequence: index }
}

/// Entries of term 1 with a PUT each, from `first` on.
pub(crate) fn entries(first: u64, count: usize) -> Vec<Entry> {
    let entry = |index| Entry {
        index,
        term: 1,
        context: Bytes::copy_from_slice(&request(index).encode()),
        data: put(index),
        ..Entry::default()
    };
    (first..first + count as u64).map(entry).collect()
}
