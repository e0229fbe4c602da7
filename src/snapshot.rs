//! The snapshot format: all replicated state at one applied index, as a stream.
//!
//! ```text
//! file  = magic (8 bytes), format version (u32), block...
//! block = section (u8), length (u32), CRC32C (u32), payload
//! ```
//!
//! Numbers are little-endian. A block's checksum covers its section, its length and its payload, and goes on from the
//! checksum of the block before it: a block that is damaged, lost, repeated or from another file does not fit. The
//! sections come in the order of `Section`; a long one takes several blocks. The last block holds [`Totals`], and
//! nothing may follow it, so a file that is cut short is noticed wherever the cut is.
//!
//! A reader skips a section that it does not know if its highest bit is set, and refuses the file if it is not. The
//! same state always makes the same bytes.
//!
//! Here are streams only. Where a file lies, and how it becomes durable, is its owner's business.

use std::fmt;
use std::io::{self, Read, Write};

use sha2::{Digest, Sha256};

use crate::codec::{Fields, Malformed, put_bytes, put_u8, put_u32, put_u64};
use crate::command::{KEY_BYTES_MAX, VALUE_BYTES_MAX};
use crate::membership::{ClusterId, Membership, NodeId};
use crate::store::{
    CHANGES_MAX, Capture, Change, History, Item, Keys, MISSING_RANGES_MAX, Operation, Remembered, StateMachine,
    TOKENS_MAX, Tokens, Window, Windows,
};

const MAGIC: [u8; 8] = *b"raftsnap";

/// The format that this version writes, and the only one it reads.
const FORMAT_VERSION: u32 = 1;

/// A block is written when it has grown to this: large enough that system calls and checksums cost little, small
/// enough to hold in memory beside everything else.
const BLOCK_BYTES: usize = 128 << 10;

/// A longer block is refused before it is read. A block ends with the record that makes it longer than
/// [`BLOCK_BYTES`]; the longest record is an item, and 64 KiB leave room for the fields around key and value.
const BLOCK_BYTES_MAX: usize = BLOCK_BYTES + KEY_BYTES_MAX + VALUE_BYTES_MAX + (64 << 10);

/// Section, length and checksum.
const BLOCK_HEAD_BYTES: usize = 1 + 4 + 4;

/// Set in a section that a reader may skip if it does not know it.
const OPTIONAL: u8 = 0x80;

/// What a block holds, in the order of the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Section {
    /// [`Header`], once.
    Header = 1,
    /// The encoded [`Membership`], once.
    Membership = 2,
    /// Items, ascending by key: etag (u64), key, value, each behind its length (u32).
    Keys = 3,
    /// Ids of nodes whose requests are skipped, ascending (u64 each).
    Removed = 4,
    /// Request windows, ascending: node, boot, newest sequence (u64 each), count (u32) of missing ranges, which are
    /// first and last (u64 each).
    Windows = 5,
    /// Idempotency tokens in the order of the log, of equal length.
    Tokens = 6,
    /// Changes, ascending: index (u64), operation (u8), key behind its length (u32).
    Changes = 7,
    /// [`Totals`], once.
    End = 8,
}

impl Section {
    fn from_u8(byte: u8) -> Option<Self> {
        use Section::*;
        [Header, Membership, Keys, Removed, Windows, Tokens, Changes, End]
            .into_iter()
            .find(|&known| known as u8 == byte)
    }

    /// Whether a block of this section may come behind one of `last`, `None` at the beginning.
    fn may_follow(self, last: Option<Section>) -> bool {
        match last {
            None => self == Section::Header,
            Some(Section::Header) => self == Section::Membership,
            Some(Section::End) => false,
            Some(last) => self > Section::Membership && self >= last,
        }
    }
}

/// Which state a snapshot holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// The cluster it belongs to.
    pub cluster: ClusterId,
    /// The index of the last entry that is in it.
    pub index: u64,
    /// The term of that entry.
    pub term: u64,
    /// Every change after this index is in its history.
    pub changes_known_after: u64,
}

/// What a snapshot consists of.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Totals {
    /// How many keys.
    pub keys: u64,
    /// The length of all keys and values in bytes.
    pub key_value_bytes: u64,
    /// How many request windows.
    pub windows: u64,
    /// How many idempotency tokens.
    pub tokens: u64,
    /// How many changes.
    pub changes: u64,
    /// How many blocks before the last.
    pub blocks: u64,
    /// The length of the whole in bytes.
    pub bytes: u64,
}

/// All that a snapshot holds.
pub struct Contents {
    /// Which state it is.
    pub header: Header,
    /// The membership at its index.
    pub membership: Membership,
    /// The state at its index.
    pub state: StateMachine,
    /// What it consists of.
    pub totals: Totals,
}

/// Why a snapshot cannot be read.
#[derive(Debug)]
pub enum SnapshotError {
    /// The stream failed.
    Io(io::Error),
    /// It is something else.
    NoSnapshot,
    /// A newer node wrote it.
    UnknownFormat(u32),
    /// A newer node wrote it, with a section that must be understood.
    UnknownSection(u8),
    /// Its bytes are not those that were written.
    Damaged {
        /// Where the block begins in which this was noticed.
        offset: u64,
        /// What is wrong with it.
        what: &'static str,
    },
}

impl fmt::Display for SnapshotError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            SnapshotError::Io(source) => write!(f, "failed to read the snapshot: {source}"),
            SnapshotError::NoSnapshot => write!(f, "not a snapshot: it does not begin like one"),
            SnapshotError::UnknownFormat(version) => {
                write!(f, "unknown snapshot format {version}: a newer node wrote it, upgrade this one")
            }
            SnapshotError::UnknownSection(section) => {
                write!(f, "unknown snapshot section {section}: a newer node wrote it, upgrade this one")
            }
            SnapshotError::Damaged { offset, what } => {
                write!(f, "damaged snapshot: {what} in the block at byte {offset}")
            }
        }
    }
}

impl std::error::Error for SnapshotError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            SnapshotError::Io(source) => Some(source),
            _ => None,
        }
    }
}

type Result<T> = std::result::Result<T, SnapshotError>;

impl Header {
    fn encode(&self, out: &mut Vec<u8>) {
        out.extend_from_slice(&self.cluster.0);
        put_u64(out, self.index);
        put_u64(out, self.term);
        put_u64(out, self.changes_known_after);
    }

    fn decode(payload: &[u8]) -> std::result::Result<Self, Malformed> {
        let mut fields = Fields::new(payload, "header");
        let header = Header {
            cluster: ClusterId(fields.bytes16()?),
            index: fields.u64()?,
            term: fields.u64()?,
            changes_known_after: fields.u64()?,
        };
        fields.finish()?;
        let valid = header.changes_known_after <= header.index;
        if valid { Ok(header) } else { Err(Malformed("header: its history begins behind its index")) }
    }
}

impl Totals {
    const BYTES: usize = 7 * 8;

    fn encode(&self, out: &mut Vec<u8>) {
        let Totals { keys, key_value_bytes, windows, tokens, changes, blocks, bytes } = *self;
        for total in [keys, key_value_bytes, windows, tokens, changes, blocks, bytes] {
            put_u64(out, total);
        }
    }

    fn decode(payload: &[u8]) -> std::result::Result<Self, Malformed> {
        let mut fields = Fields::new(payload, "totals");
        let totals = Totals {
            keys: fields.u64()?,
            key_value_bytes: fields.u64()?,
            windows: fields.u64()?,
            tokens: fields.u64()?,
            changes: fields.u64()?,
            blocks: fields.u64()?,
            bytes: fields.u64()?,
        };
        fields.finish()?;
        Ok(totals)
    }
}

/// Writes all of a capture. It buffers by itself: `out` need not.
///
/// # Errors
/// Those of `out`.
///
/// # Panics
/// If the encoded membership is longer than 16 MiB, which a hundred thousand members would be.
pub fn write(capture: &Capture, cluster: ClusterId, out: &mut impl Write) -> io::Result<Totals> {
    let (keys, history) = capture.visible();
    let mut totals = Totals { keys: keys.len() as u64, key_value_bytes: keys.bytes(), ..Totals::default() };
    let header =
        Header { cluster, index: capture.index(), term: capture.term(), changes_known_after: history.known_after() };
    let mut blocks = BlockWriter::new(out)?;
    blocks.record(Section::Header as u8, |out| header.encode(out))?;
    blocks.record(Section::Membership as u8, |out| out.extend_from_slice(&capture.membership().encode()))?;
    for item in keys.iter() {
        blocks.record(Section::Keys as u8, |out| encode_item(item, out))?;
    }
    for node in capture.windows.removed() {
        blocks.record(Section::Removed as u8, |out| put_u64(out, node))?;
    }
    for (node, boot, window) in capture.windows.iter() {
        blocks.record(Section::Windows as u8, |out| encode_window(node, boot, window, out))?;
        totals.windows += 1;
    }
    for token in &capture.tokens {
        blocks.record(Section::Tokens as u8, |out| out.extend_from_slice(&token.encode()))?;
        totals.tokens += 1;
    }
    for change in history.iter() {
        blocks.record(Section::Changes as u8, |out| encode_change(change, out))?;
        totals.changes += 1;
    }
    blocks.finish(totals)
}

/// The SHA-256 of the snapshot that [`write()`] makes of a capture: equal on nodes whose replicated state is equal.
pub fn digest(capture: &Capture) -> [u8; 32] {
    let mut hash = Sha256::new();
    write(capture, ClusterId([0; 16]), &mut hash).expect("a hash takes any bytes");
    hash.finalize().into()
}

/// Reads a snapshot to its end, and builds the state that it holds.
///
/// # Errors
/// If the stream fails, or anything in it is not as [`write()`] writes it.
pub fn read(input: &mut impl Read) -> Result<Contents> {
    let mut blocks = BlockReader::new(input)?;
    let header = blocks.header()?;
    let mut parts = Parts::new(header);
    while let Some(section) = blocks.next_section()? {
        parts.take_block(section, &blocks.payload).map_err(|Malformed(what)| blocks.damaged(what))?;
    }
    parts.finish(blocks.totals).map_err(|what| blocks.damaged(what))
}

/// Reads and checks the header only.
///
/// # Errors
/// If the stream fails, or does not begin like a snapshot.
pub fn peek(input: &mut impl Read) -> Result<Header> {
    BlockReader::new(input)?.header()
}

fn encode_item(item: &Item, out: &mut Vec<u8>) {
    put_u64(out, item.etag());
    put_bytes(out, item.key());
    put_bytes(out, item.value());
}

fn encode_window(node: NodeId, boot: u64, window: &Window, out: &mut Vec<u8>) {
    put_u64(out, node);
    put_u64(out, boot);
    put_u64(out, window.newest);
    put_u32(out, u32::try_from(window.missing.len()).expect("a window has at most MISSING_RANGES_MAX ranges"));
    for &(first, last) in &window.missing {
        put_u64(out, first);
        put_u64(out, last);
    }
}

fn encode_change(change: Change<&[u8]>, out: &mut Vec<u8>) {
    put_u64(out, change.index);
    put_u8(
        out,
        match change.operation {
            Operation::Put => 1,
            Operation::Delete => 2,
        },
    );
    put_bytes(out, change.key);
}

/// Cuts records into blocks.
struct BlockWriter<'a, W> {
    out: &'a mut W,
    section: u8,
    /// The block that is being filled: its head, still empty, and its payload.
    block: Vec<u8>,
    checksum: u32,
    blocks: u64,
    bytes: u64,
}

impl<'a, W: Write> BlockWriter<'a, W> {
    fn new(out: &'a mut W) -> io::Result<Self> {
        let mut preamble = MAGIC.to_vec();
        put_u32(&mut preamble, FORMAT_VERSION);
        out.write_all(&preamble)?;
        let mut block = Vec::with_capacity(BLOCK_HEAD_BYTES + BLOCK_BYTES + (BLOCK_BYTES >> 3));
        block.resize(BLOCK_HEAD_BYTES, 0);
        let bytes = preamble.len() as u64;
        Ok(BlockWriter { out, section: 0, block, checksum: crc32c::crc32c(&preamble), blocks: 0, bytes })
    }

    /// Appends what `encode` appends to the section.
    fn record(&mut self, section: u8, encode: impl FnOnce(&mut Vec<u8>)) -> io::Result<()> {
        if section != self.section {
            self.flush()?;
            self.section = section;
        }
        encode(&mut self.block);
        if self.block.len() >= BLOCK_HEAD_BYTES + BLOCK_BYTES { self.flush() } else { Ok(()) }
    }

    fn flush(&mut self) -> io::Result<()> {
        if self.block.len() == BLOCK_HEAD_BYTES {
            return Ok(());
        }
        let length = self.block.len() - BLOCK_HEAD_BYTES;
        assert!(length <= BLOCK_BYTES_MAX, "a block is at most BLOCK_BYTES_MAX long");
        let length = u32::try_from(length).expect("that is below 4 GiB");
        self.block[0] = self.section;
        self.block[1..5].copy_from_slice(&length.to_le_bytes());
        self.checksum = block_checksum(self.checksum, &self.block[..5], &self.block[BLOCK_HEAD_BYTES..]);
        self.block[5..BLOCK_HEAD_BYTES].copy_from_slice(&self.checksum.to_le_bytes());
        self.out.write_all(&self.block)?;
        self.blocks += 1;
        self.bytes += self.block.len() as u64;
        // One large value must not keep its memory until the end.
        self.block.truncate(BLOCK_HEAD_BYTES);
        self.block.shrink_to(2 * BLOCK_BYTES);
        Ok(())
    }

    /// Writes the last block.
    fn finish(mut self, mut totals: Totals) -> io::Result<Totals> {
        self.flush()?;
        totals.blocks = self.blocks;
        totals.bytes = self.bytes + (BLOCK_HEAD_BYTES + Totals::BYTES) as u64;
        self.section = Section::End as u8;
        totals.encode(&mut self.block);
        self.flush()?;
        self.out.flush()?;
        Ok(totals)
    }
}

fn block_checksum(before: u32, section_and_length: &[u8], payload: &[u8]) -> u32 {
    crc32c::crc32c_append(crc32c::crc32c_append(before, section_and_length), payload)
}

/// Reads blocks, and checks all that can be without knowing what is in them.
struct BlockReader<'a, R> {
    input: &'a mut R,
    section: Option<Section>,
    /// The payload of the block that was read last.
    payload: Vec<u8>,
    checksum: u32,
    blocks: u64,
    /// Where the block that was read last begins, and where it ends.
    offset: u64,
    end: u64,
    /// From the last block, once that has been read.
    totals: Totals,
}

impl<'a, R: Read> BlockReader<'a, R> {
    fn new(input: &'a mut R) -> Result<Self> {
        let mut preamble = [0; MAGIC.len() + 4];
        input.read_exact(&mut preamble).map_err(|error| match error.kind() {
            io::ErrorKind::UnexpectedEof => SnapshotError::NoSnapshot,
            _ => SnapshotError::Io(error),
        })?;
        let (magic, version) = preamble.split_first_chunk().expect("it is longer than the magic");
        if *magic != MAGIC {
            return Err(SnapshotError::NoSnapshot);
        }
        let version = u32::from_le_bytes(*version.first_chunk().expect("it is 4 bytes longer than the magic"));
        if version != FORMAT_VERSION {
            return Err(SnapshotError::UnknownFormat(version));
        }
        let offset = preamble.len() as u64;
        Ok(BlockReader {
            input,
            section: None,
            payload: Vec::new(),
            checksum: crc32c::crc32c(&preamble),
            blocks: 0,
            offset,
            end: offset,
            totals: Totals::default(),
        })
    }

    fn damaged(&self, what: &'static str) -> SnapshotError {
        SnapshotError::Damaged { offset: self.offset, what }
    }

    /// Reads the first block.
    fn header(&mut self) -> Result<Header> {
        self.next_section()?;
        Header::decode(&self.payload).map_err(|Malformed(what)| self.damaged(what))
    }

    /// Reads the next block that is known. `None` after the last one.
    fn next_section(&mut self) -> Result<Option<Section>> {
        loop {
            let byte = self.next_block()?;
            match Section::from_u8(byte) {
                Some(section) if section.may_follow(self.section) => {
                    self.section = Some(section);
                    if section != Section::End {
                        return Ok(Some(section));
                    }
                    self.check_end()?;
                    return Ok(None);
                }
                Some(_) => return Err(self.damaged("a section out of order")),
                // Not before the header, which is the first block in every version.
                None if byte & OPTIONAL != 0 && self.section.is_some() => {}
                None => return Err(SnapshotError::UnknownSection(byte)),
            }
        }
    }

    fn next_block(&mut self) -> Result<u8> {
        self.offset = self.end;
        let mut head = [0; BLOCK_HEAD_BYTES];
        self.read_exact(&mut head)?;
        let (section_and_length, checksum) = head.split_at(5);
        let mut fields = Fields::new(section_and_length, "block");
        let (section, length) =
            fields.u8().and_then(|section| Ok((section, fields.u32()? as usize))).expect("five bytes are there");
        if length > BLOCK_BYTES_MAX {
            return Err(self.damaged("too long a block"));
        }
        self.payload.clear();
        self.payload.shrink_to(2 * BLOCK_BYTES);
        // Grows with what arrives: a damaged length of 16 MiB costs nothing if the stream ends before.
        let read = self.input.by_ref().take(length as u64).read_to_end(&mut self.payload).map_err(SnapshotError::Io)?;
        if read < length {
            return Err(self.damaged("an early end"));
        }
        self.checksum = block_checksum(self.checksum, section_and_length, &self.payload);
        if self.checksum.to_le_bytes() != checksum {
            return Err(self.damaged("a wrong checksum"));
        }
        self.blocks += 1;
        self.end += (BLOCK_HEAD_BYTES + length) as u64;
        Ok(section)
    }

    fn read_exact(&mut self, buffer: &mut [u8]) -> Result<()> {
        self.input.read_exact(buffer).map_err(|error| match error.kind() {
            io::ErrorKind::UnexpectedEof => self.damaged("an early end"),
            _ => SnapshotError::Io(error),
        })
    }

    fn check_end(&mut self) -> Result<()> {
        self.totals = Totals::decode(&self.payload).map_err(|Malformed(what)| self.damaged(what))?;
        if self.totals.blocks != self.blocks - 1 || self.totals.bytes != self.end {
            return Err(self.damaged("wrong totals"));
        }
        let mut more = [0];
        match self.input.read_exact(&mut more) {
            Ok(()) => Err(self.damaged("more bytes after the end")),
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => Ok(()),
            Err(error) => Err(SnapshotError::Io(error)),
        }
    }
}

/// The state while it is being read.
struct Parts {
    header: Header,
    membership: Membership,
    keys: Keys,
    windows: Windows,
    tokens: Tokens,
    history: History,
}

impl Parts {
    fn new(header: Header) -> Self {
        Parts {
            header,
            membership: Membership::default(),
            keys: Keys::default(),
            windows: Windows::default(),
            tokens: Tokens::new(TOKENS_MAX),
            history: History::new(CHANGES_MAX, header.changes_known_after),
        }
    }

    fn take_block(&mut self, section: Section, payload: &[u8]) -> std::result::Result<(), Malformed> {
        if section == Section::Membership {
            self.membership = Membership::decode(payload)?;
            return Ok(());
        }
        let mut fields = Fields::new(
            payload,
            match section {
                Section::Keys => "keys",
                Section::Removed => "removed nodes",
                Section::Windows => "request windows",
                Section::Tokens => "idempotency tokens",
                Section::Changes => "changes",
                Section::Header | Section::Membership | Section::End => "order of sections",
            },
        );
        while !fields.rest().is_empty() {
            let fits = match section {
                Section::Keys => self.take_item(&mut fields)?,
                Section::Removed => self.windows.restore_removed(fields.u64()?),
                Section::Windows => self.take_window(&mut fields)?,
                Section::Tokens => self.take_token(&mut fields)?,
                Section::Changes => self.take_change(&mut fields)?,
                Section::Header | Section::Membership | Section::End => false,
            };
            if !fits {
                return Err(fields.malformed());
            }
        }
        Ok(())
    }

    fn take_item(&mut self, fields: &mut Fields<'_>) -> std::result::Result<bool, Malformed> {
        let etag = fields.u64()?;
        let (key, value) = (fields.bytes(KEY_BYTES_MAX)?, fields.bytes(VALUE_BYTES_MAX)?);
        let above = self.keys.last().is_none_or(|last| last.key() < key);
        let fits = above && !key.is_empty() && (1..=self.header.index).contains(&etag);
        if fits {
            self.keys.insert(Item::new(etag, key, value));
        }
        Ok(fits)
    }

    fn take_window(&mut self, fields: &mut Fields<'_>) -> std::result::Result<bool, Malformed> {
        let (node, boot, newest) = (fields.u64()?, fields.u64()?, fields.u64()?);
        let count = fields.count(16)?;
        if count > MISSING_RANGES_MAX {
            return Ok(false);
        }
        let ranges = (0..count).map(|_| Ok((fields.u64()?, fields.u64()?)));
        let missing = ranges.collect::<std::result::Result<_, Malformed>>()?;
        Ok(self.windows.restore(node, boot, Window { newest, missing }))
    }

    fn take_token(&mut self, fields: &mut Fields<'_>) -> std::result::Result<bool, Malformed> {
        let bytes = fields.take(Remembered::BYTES)?.first_chunk().expect("so many were taken");
        Ok(Remembered::decode(bytes).is_some_and(|remembered| self.tokens.restore(remembered)))
    }

    fn take_change(&mut self, fields: &mut Fields<'_>) -> std::result::Result<bool, Malformed> {
        let index = fields.u64()?;
        let operation = match fields.u8()? {
            1 => Operation::Put,
            2 => Operation::Delete,
            _ => return Ok(false),
        };
        let key = fields.bytes(KEY_BYTES_MAX)?;
        Ok(index <= self.header.index && self.history.restore(Change { index, operation, key }))
    }

    /// The state, if it is as large as the last block says.
    fn finish(self, totals: Totals) -> std::result::Result<Contents, &'static str> {
        let read = Totals {
            keys: self.keys.len() as u64,
            key_value_bytes: self.keys.bytes(),
            windows: self.windows.iter().count() as u64,
            tokens: self.tokens.log().len() as u64,
            changes: self.history.len() as u64,
            ..totals
        };
        if read != totals {
            return Err("wrong totals");
        }
        let applied = (self.header.index, self.header.term);
        let state = StateMachine::restore(applied, (self.keys, self.history), self.windows, self.tokens);
        Ok(Contents { header: self.header, membership: self.membership, state, totals })
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use bytes::Bytes;
    use proptest::prelude::*;
    use proptest::test_runner::TestRng;

    use super::*;
    use crate::command::{Command, Condition, Kind, RequestId, Tags, Token};
    use crate::fixtures::CLUSTER;
    use crate::membership::Member;
    use crate::store::Outcome;

    fn membership() -> Arc<Membership> {
        let mut membership = Membership::default();
        let member = Member { url: "http://127.0.0.1:12379".to_string(), directory: Some(5), promote: false };
        membership.members.insert(1, member);
        membership.removed.insert(9);
        membership.conf_state.voters.push(1);
        Arc::new(membership)
    }

    fn put(key: &[u8], value: &[u8], token: Option<&[u8]>) -> Command {
        let (key, value) = (Bytes::copy_from_slice(key), Bytes::copy_from_slice(value));
        let condition = Condition::default();
        let token = token.map(|token| Token::new(token, Kind::Put, &key, &condition, &value));
        Command::Put { key, value, condition, token }
    }

    fn delete(key: &[u8], condition: Condition, token: &[u8]) -> Command {
        let token = Some(Token::new(token, Kind::Delete, key, &condition, b""));
        Command::Delete { key: Bytes::copy_from_slice(key), condition, token }
    }

    fn apply(state: &mut StateMachine, sequence: u64, command: &Command) {
        let id = RequestId { node: 1, boot: 1, sequence };
        state.apply(state.applied_index() + 1, 3, id, command);
    }

    /// Something of everything.
    fn small() -> Capture {
        let mut state = StateMachine::new();
        state.advance(1, 1);
        apply(&mut state, 1, &put(b"\xff\xfe\0", b"\0\x80 no utf-8", None));
        apply(&mut state, 4, &put(b"key", b"value", Some(b"t1")));
        apply(&mut state, 2, &put(b"empty", b"", Some(b"t2")));
        apply(&mut state, 9, &delete(b"key", Condition::default(), b"t3"));
        apply(&mut state, 10, &delete(b"key", Condition::default(), b"t4"));
        let if_match = |tags| Condition { if_match: Some(tags), if_none_match: None };
        apply(&mut state, 11, &delete(b"key", if_match(Tags::Any), b"t5"));
        apply(&mut state, 12, &delete(b"empty", if_match(Tags::List(vec![1])), b"t6"));
        let id = RequestId { node: 9, boot: 1, sequence: 1 };
        state.apply(state.applied_index() + 1, 3, id, &put(b"k9", b"v9", None));
        state.forget_node(9);
        state.capture(membership())
    }

    /// Many blocks of every section that can be long.
    fn large(keys: u64) -> Capture {
        let mut state = StateMachine::new();
        let mut rng = TestRng::deterministic_rng(proptest::test_runner::RngAlgorithm::ChaCha);
        for n in 1..=keys {
            let mut value = vec![0; (rng.next_u32() % 200) as usize];
            rng.fill_bytes(&mut value);
            let token = n.is_multiple_of(3).then(|| n.to_le_bytes());
            let key = (rng.next_u64() % keys).to_be_bytes();
            apply(&mut state, 2 * n, &put(&key, &value, token.as_ref().map(|token| &token[..])));
        }
        apply(&mut state, 1, &put(b"large", &vec![7; 3 * BLOCK_BYTES], None));
        state.capture(membership())
    }

    fn encode(capture: &Capture) -> (Vec<u8>, Totals) {
        let mut out = Vec::new();
        let totals = write(capture, CLUSTER, &mut out).unwrap();
        assert_eq!(totals.bytes, out.len() as u64);
        (out, totals)
    }

    fn assert_round_trip(capture: &Capture) -> Contents {
        let (encoded, totals) = encode(capture);
        let contents = read(&mut &encoded[..]).unwrap();
        assert_eq!(contents.membership, **capture.membership());
        assert_eq!(contents.totals, totals);
        assert_eq!((contents.header.index, contents.header.term), (capture.index(), capture.term()));
        assert_eq!(peek(&mut &encoded[..]).unwrap(), contents.header);
        let again = contents.state.capture(Arc::new(contents.membership.clone()));
        assert!(encode(&again).0 == encoded, "the restored state makes another snapshot");
        assert_eq!(digest(&again), digest(capture));
        contents
    }

    /// Checks that these bytes are not taken for a snapshot.
    fn assert_refused(bytes: &[u8], what: impl fmt::Display) {
        assert!(read(&mut &bytes[..]).is_err(), "{what} was read");
    }

    #[test]
    fn everything_comes_back() {
        let Contents { header, mut state, totals, .. } = assert_round_trip(&small());
        assert_eq!(header, Header { cluster: CLUSTER, index: 9, term: 3, changes_known_after: 0 });
        assert_eq!((totals.keys, totals.windows, totals.tokens, totals.changes), (3, 1, 6, 5));
        let version = state.version();
        assert_eq!(version.get(b"\xff\xfe\0").unwrap().value(), b"\0\x80 no utf-8");
        assert_eq!(version.get(b"empty").unwrap().etag(), 4);
        assert_eq!(version.changes(b"key", 0, 9).unwrap().changes.len(), 2);

        let mut next = |node, sequence, command: &Command| {
            let id = RequestId { node, boot: 1, sequence };
            state.apply(state.applied_index() + 1, 3, id, command)
        };
        use crate::store::Applied::{First, Repeat};
        assert_eq!(next(1, 9, &put(b"a", b"", None)), Repeat, "an applied request");
        assert_eq!(next(9, 7, &put(b"a", b"", None)), Repeat, "a removed node");
        assert_eq!(next(1, 3, &put(b"key", b"value", Some(b"t1"))), First(Outcome::Put { etag: 3 }), "a token");
        assert_eq!(next(1, 5, &put(b"key", b"other", Some(b"t1"))), First(Outcome::TokenReused));
        assert_eq!(next(1, 6, &put(b"a", b"", None)), First(Outcome::Put { etag: 14 }), "a missing request");
    }

    #[test]
    fn an_empty_store_comes_back() {
        let contents = assert_round_trip(&StateMachine::new().capture(Arc::new(Membership::default())));
        assert_eq!((contents.state.applied_index(), contents.totals.keys, contents.totals.blocks), (0, 0, 2));
    }

    #[test]
    fn many_keys_come_back() {
        let contents = assert_round_trip(&large(20_000));
        assert!(contents.totals.blocks > 20, "{:?}", contents.totals);
    }

    #[test]
    fn a_million_keys_come_back() {
        let capture = StateMachine::with_keys(1_000_000).capture(membership());
        let contents = read(&mut &encode(&capture).0[..]).unwrap();
        assert_eq!(contents.totals.keys, 1_000_000);
        assert_eq!(digest(&contents.state.capture(membership())), digest(&capture));
    }

    #[test]
    fn every_flipped_bit_is_noticed() {
        let (mut encoded, _) = encode(&small());
        for position in 0..encoded.len() {
            for bit in 0..8 {
                encoded[position] ^= 1 << bit;
                assert_refused(&encoded, format_args!("a flip of bit {bit} in byte {position}"));
                encoded[position] ^= 1 << bit;
            }
        }
    }

    #[test]
    fn every_cut_and_every_addition_is_noticed() {
        let (mut encoded, _) = encode(&small());
        for end in 0..encoded.len() {
            assert_refused(&encoded[..end], format_args!("a cut at {end}"));
        }
        encoded.push(0);
        assert_refused(&encoded, "a byte behind the end");
    }

    #[test]
    fn damage_in_a_larger_snapshot_is_noticed() {
        let (mut encoded, _) = encode(&large(3000));
        let mut rng = TestRng::deterministic_rng(proptest::test_runner::RngAlgorithm::ChaCha);
        for _ in 0..200 {
            let position = (rng.next_u64() % encoded.len() as u64) as usize;
            let flip = 1 << (rng.next_u32() % 8);
            encoded[position] ^= flip;
            assert_refused(&encoded, format_args!("a flip in byte {position}"));
            encoded[position] ^= flip;
            assert_refused(&encoded[..position], format_args!("a cut at {position}"));
        }
    }

    /// Where each block begins, and the end.
    fn block_offsets(encoded: &[u8]) -> Vec<usize> {
        let mut offsets = vec![MAGIC.len() + 4];
        while let Some(&[_, a, b, c, d]) = encoded.get(offsets[offsets.len() - 1]..).and_then(<[u8]>::first_chunk) {
            let length = u32::from_le_bytes([a, b, c, d]) as usize;
            offsets.push(offsets[offsets.len() - 1] + BLOCK_HEAD_BYTES + length);
        }
        offsets
    }

    #[test]
    fn a_lost_repeated_or_foreign_block_is_noticed() {
        let (encoded, totals) = encode(&large(3000));
        let offsets = block_offsets(&encoded);
        assert_eq!(offsets.len() as u64, totals.blocks + 2);
        for (i, pair) in offsets.windows(2).enumerate() {
            let (before, block, after) = (&encoded[..pair[0]], &encoded[pair[0]..pair[1]], &encoded[pair[1]..]);
            assert_refused(&[before, after].concat(), format_args!("a snapshot without block {i}"));
            assert_refused(&[before, block, block, after].concat(), format_args!("block {i} twice"));
        }
        let (other, _) = encode(&large(3001));
        assert_refused(&[&encoded[..offsets[3]], &other[block_offsets(&other)[3]..]].concat(), "two halves");
    }

    /// A snapshot of these blocks, with right checksums.
    fn blocks(sections: &[(u8, Vec<u8>)], totals: Totals) -> Vec<u8> {
        let mut out = Vec::new();
        let mut blocks = BlockWriter::new(&mut out).unwrap();
        for (section, payload) in sections {
            blocks.record(*section, |out| out.extend_from_slice(payload)).unwrap();
            blocks.flush().unwrap();
        }
        blocks.finish(totals).unwrap();
        out
    }

    fn head() -> Vec<(u8, Vec<u8>)> {
        let mut header = Vec::new();
        Header { cluster: CLUSTER, index: 9, term: 3, changes_known_after: 4 }.encode(&mut header);
        vec![(1, header), (2, membership().encode())]
    }

    #[test]
    fn an_unknown_section_is_skipped_if_it_may_be() {
        for place in 0..=2 {
            let mut sections = head();
            sections.insert(place, (OPTIONAL | 55, b"from the future".to_vec()));
            let result = read(&mut &blocks(&sections, Totals::default())[..]).map(|contents| contents.membership);
            match place {
                0 => assert!(matches!(result, Err(SnapshotError::UnknownSection(183))), "before the header"),
                _ => assert_eq!(result.unwrap(), *membership()),
            }
            sections[place].0 = 55;
            let result = read(&mut &blocks(&sections, Totals::default())[..]).map(|contents| contents.header);
            assert!(matches!(result, Err(SnapshotError::UnknownSection(55))), "{result:?}");
        }
    }

    #[test]
    fn a_newer_format_is_told_from_damage() {
        let (mut encoded, _) = encode(&small());
        encoded[8] = 2;
        assert!(matches!(peek(&mut &encoded[..]), Err(SnapshotError::UnknownFormat(2))));
        encoded[0] = b'R';
        assert!(matches!(peek(&mut &encoded[..]), Err(SnapshotError::NoSnapshot)));
        assert!(matches!(peek(&mut &b"raft"[..]), Err(SnapshotError::NoSnapshot)));
    }

    #[test]
    fn sections_out_of_order_are_refused() {
        let (header, membership) = (head()[0].clone(), head()[1].clone());
        let removed = (4, 7_u64.to_le_bytes().to_vec());
        for sections in [
            vec![],
            vec![header.clone()],
            vec![membership.clone(), header.clone()],
            vec![header.clone(), header.clone(), membership.clone()],
            vec![header.clone(), membership.clone(), membership.clone()],
            vec![header.clone(), removed.clone(), membership.clone()],
            vec![header.clone(), membership.clone(), (8, vec![0; Totals::BYTES])],
            vec![header, membership, (5, vec![]), (6, vec![0; 41]), removed],
        ] {
            let order: Vec<_> = sections.iter().map(|(section, _)| *section).collect();
            assert_refused(&blocks(&sections, Totals::default()), format_args!("sections {order:?}"));
        }
    }

    #[test]
    fn contents_that_cannot_be_are_refused_behind_a_right_checksum() {
        let item = |etag, key: &[u8]| {
            let mut out = Vec::new();
            encode_item(&Item::new(etag, key, b"v"), &mut out);
            out
        };
        let change = |index, key: &[u8]| {
            let mut out = Vec::new();
            encode_change(Change { index, operation: Operation::Put, key }, &mut out);
            out
        };
        let ids = |ids: &[u64]| ids.iter().flat_map(|id| id.to_le_bytes()).collect::<Vec<_>>();
        let totals = |keys, changes| Totals { keys, key_value_bytes: 2 * keys, changes, ..Totals::default() };
        let with = |section, payload, totals| {
            let sections = [head(), vec![(section, payload)]].concat();
            read(&mut &blocks(&sections, totals)[..]).map(|contents| contents.header.index)
        };
        assert!(with(3, [item(9, b"a"), item(1, b"b")].concat(), totals(2, 0)).is_ok());
        assert!(with(7, change(5, b"k"), totals(0, 1)).is_ok());
        let mut remembered = vec![7; 40];
        remembered.insert(32, 6);
        for (what, section, payload, totals) in [
            ("wrong totals", 3, item(1, b"a"), totals(2, 0)),
            ("keys out of order", 3, [item(1, b"b"), item(1, b"a")].concat(), totals(2, 0)),
            ("a key twice", 3, [item(1, b"a"), item(2, b"a")].concat(), totals(2, 0)),
            ("an empty key", 3, item(1, b""), totals(1, 0)),
            ("an etag to come", 3, item(10, b"a"), totals(1, 0)),
            ("an etag of 0", 3, item(0, b"a"), totals(1, 0)),
            ("part of an item", 3, item(1, b"a")[..12].to_vec(), totals(0, 0)),
            ("a node removed twice", 4, ids(&[3, 3]), totals(0, 0)),
            ("a window without requests", 5, [ids(&[1, 1, 0]), vec![0; 4]].concat(), totals(0, 0)),
            ("more ranges than there are", 5, [ids(&[1, 1, 5]), vec![255; 4]].concat(), totals(0, 0)),
            ("an unknown outcome", 6, remembered, totals(0, 0)),
            ("a change to come", 7, change(10, b"k"), totals(0, 1)),
            ("a change before the history", 7, change(4, b"k"), totals(0, 1)),
        ] {
            let result = with(section, payload, totals);
            assert!(matches!(result, Err(SnapshotError::Damaged { .. })), "{what}: {result:?}");
        }
    }

    #[test]
    fn a_failing_stream_is_no_damage() {
        struct Failing;
        impl Read for Failing {
            fn read(&mut self, _: &mut [u8]) -> io::Result<usize> {
                Err(io::Error::other("no disk"))
            }
        }
        let (encoded, _) = encode(&small());
        for end in [0, 5, 20, 100, encoded.len()] {
            let result = read(&mut (&encoded[..end]).chain(Failing)).map(|contents| contents.header);
            assert!(matches!(result, Err(SnapshotError::Io(_))), "failed at {end}: {result:?}");
        }
    }

    proptest! {
        #[test]
        fn any_bytes_are_read_without_a_panic(bytes in proptest::collection::vec(any::<u8>(), 0..300), section in 3..8u8) {
            assert_refused(&bytes, "noise");
            let sections = [head(), vec![(section, bytes)]].concat();
            let _ = read(&mut &blocks(&sections, Totals::default())[..]);
        }
    }
}
