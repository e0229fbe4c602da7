use std::io::{self, Read};

use criterion::{BenchmarkId, Criterion, Throughput};
use raft::eraftpb::{Message, MessageType};
use raftexample::peer_protocol::{FrameReader, PeerMessage};

use crate::load::{BATCHES, entries};

/// What it takes to make the frame of an append message, and to read one.
pub(crate) fn all(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("peer frame");
    for count in BATCHES {
        group.throughput(Throughput::Elements(count as u64));
        let message = append_message(count);
        group.bench_function(BenchmarkId::new("encode", count), |bencher| {
            let mut frame = Vec::new();
            bencher.iter(|| {
                frame.clear();
                message.encode(&mut frame);
                frame.len()
            });
        });
        group.bench_function(BenchmarkId::new("decode", count), |bencher| {
            let mut frame = Vec::new();
            message.encode(&mut frame);
            let mut reader = FrameReader::new(Repeated { frame, at: 0 });
            let mut messages = Vec::new();
            bencher.iter(|| {
                messages.clear();
                assert!(reader.next_batch(&mut messages).unwrap() && messages.len() == 1);
            });
        });
    }
    group.finish();
}

fn append_message(count: usize) -> PeerMessage {
    let mut message = Message {
        msg_type: MessageType::MsgAppend,
        from: 1,
        to: 2,
        term: 1,
        log_term: 1,
        index: 1,
        commit: 1,
        ..Message::default()
    };
    message.set_entries(entries(2, count).into());
    PeerMessage::Raft(message)
}

/// The same frame without an end, of which each read gets at most one.
struct Repeated {
    frame: Vec<u8>,
    at: usize,
}

impl Read for Repeated {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let rest = &self.frame[self.at..];
        let count = rest.len().min(buffer.len());
        buffer[..count].copy_from_slice(&rest[..count]);
        self.at = (self.at + count) % self.frame.len();
        Ok(count)
    }
}
