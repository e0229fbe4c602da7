//! Segments: the files of the log.
//!
//! A segment is called after its sequence number and never renamed or shortened after that. It is one header sector,
//! a batch that begins with a checkpoint, more batches, and in the end a batch with a seal; behind that zeros. It is
//! made under a temporary name and renamed when header and checkpoint are durable, so a segment that has its name is
//! whole. The header's checksum covers the last link of the segment before, and the checkpoint's link covers the header.

use std::io;
use std::path::PathBuf;

use super::batch::{self, BatchWriter, SECTOR_BYTES, SECTOR_DATA_BYTES};
use super::{LogError, LogIdentity};
use crate::codec::{Fields, put_u32, put_u64, put_u128};
use crate::disk::{Disk, DiskFile, TEMPORARY_SUFFIX, remove_if_there};
use crate::membership::ClusterId;

/// The version of the format that this program writes, and the only one it reads.
pub(super) const FORMAT_VERSION: u32 = 1;

const MAGIC: &[u8; 8] = b"RAFTLOG\n";
const HEADER_BYTES: usize = 8 + 4 + 16 + 8 + 16 + 8 + 8 + 8 + 4 + 4;
const SUFFIX: &str = ".log";

/// Where the first batch lies.
pub(super) const BATCHES_START: u64 = SECTOR_BYTES as u64;

/// What the file of a segment is called.
pub(super) fn name(sequence: u64) -> String {
    format!("{sequence:016x}{SUFFIX}")
}

/// The sequence number of a segment's file; `None` if it is none.
pub(super) fn sequence_of(file_name: &str) -> Option<u64> {
    let digits = file_name.strip_suffix(SUFFIX)?;
    let sequence = u64::from_str_radix(digits, 16).ok()?;
    (name(sequence) == file_name).then_some(sequence)
}

/// Whether this is a segment that was never finished.
pub(super) fn is_unfinished(file_name: &str) -> bool {
    file_name.strip_suffix(TEMPORARY_SUFFIX).and_then(sequence_of).is_some()
}

/// What the first sector of a segment says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct SegmentHeader {
    pub(super) identity: LogIdentity,
    /// Counts segments from 1.
    pub(super) sequence: u64,
    /// The length of the file: it never changes, so a file of another length was cut.
    pub(super) file_bytes: u64,
    /// The number of the first batch.
    pub(super) first_batch: u64,
    /// The link of the last batch of the segment before; 0 in the first segment.
    pub(super) previous: u32,
}

impl SegmentHeader {
    /// The sector, and its checksum: what the first batch is chained to.
    fn encode(&self) -> (Vec<u8>, u32) {
        let mut bytes = MAGIC.to_vec();
        put_u32(&mut bytes, FORMAT_VERSION);
        bytes.extend_from_slice(&self.identity.cluster.0);
        put_u64(&mut bytes, self.identity.node);
        put_u128(&mut bytes, self.identity.directory);
        put_u64(&mut bytes, self.sequence);
        put_u64(&mut bytes, self.file_bytes);
        put_u64(&mut bytes, self.first_batch);
        put_u32(&mut bytes, self.previous);
        let crc = crc32c::crc32c(&bytes);
        put_u32(&mut bytes, crc);
        bytes.resize(SECTOR_BYTES, 0);
        (bytes, crc)
    }

    fn decode(sector: &[u8]) -> Result<(SegmentHeader, u32), HeaderProblem> {
        let damaged = |_| HeaderProblem::Damaged;
        let mut fields = Fields::new(sector, "segment header");
        if fields.take(MAGIC.len()).map_err(damaged)? != MAGIC {
            return Err(HeaderProblem::Damaged);
        }
        let version = fields.u32().map_err(damaged)?;
        if version != FORMAT_VERSION {
            return Err(HeaderProblem::Version(version));
        }
        let mut read = || {
            let cluster = ClusterId(fields.bytes16()?);
            let identity = LogIdentity { cluster, node: fields.u64()?, directory: fields.u128()? };
            let (sequence, file_bytes, first_batch) = (fields.u64()?, fields.u64()?, fields.u64()?);
            let previous = fields.u32()?;
            Ok((SegmentHeader { identity, sequence, file_bytes, first_batch, previous }, fields.u32()?))
        };
        let (header, crc) = read().map_err(|_: crate::codec::Malformed| HeaderProblem::Damaged)?;
        let padding_is_zero = sector[HEADER_BYTES..].iter().all(|byte| *byte == 0);
        if crc32c::crc32c(&sector[..HEADER_BYTES - 4]) != crc || !padding_is_zero {
            return Err(HeaderProblem::Damaged);
        }
        Ok((header, crc))
    }
}

enum HeaderProblem {
    Damaged,
    Version(u32),
}

/// An open segment.
pub(super) struct Segment {
    pub(super) sequence: u64,
    pub(super) bytes: u64,
    pub(super) file: Box<dyn DiskFile>,
    /// For messages.
    pub(super) path: PathBuf,
}

impl Segment {
    /// Makes a segment durable, with its name: the header and, as its first batch, the one that `checkpoint` holds.
    /// Returns it with its last link and the offset behind its first batch.
    pub(super) fn create(
        disk: &dyn Disk,
        header: &SegmentHeader,
        checkpoint: &mut BatchWriter,
        synced: u64,
    ) -> Result<(Segment, u32, u64), LogError> {
        let name = name(header.sequence);
        let temporary = format!("{name}{TEMPORARY_SUFFIX}");
        let (mut bytes, header_crc) = header.encode();
        let (link, sectors) = checkpoint.finish(header.first_batch, synced, header_crc);
        bytes.extend_from_slice(sectors);
        let make = || -> io::Result<Box<dyn DiskFile>> {
            remove_if_there(disk, &temporary)?;
            let mut file = disk.create(&temporary, header.file_bytes)?;
            file.write_all_at(&bytes, 0)?;
            file.sync_data()?;
            disk.rename(&temporary, &name)?;
            Ok(file)
        };
        let path = disk.path(&name);
        let failed = |action| {
            let path = path.clone();
            move |source| LogError::Io { action, path, source }
        };
        let file = make().map_err(failed("create log segment"))?;
        disk.sync_directory().map_err(failed("sync the directory of log segment"))?;
        Ok((Segment { sequence: header.sequence, bytes: header.file_bytes, file, path }, link, bytes.len() as u64))
    }

    /// Opens a segment and checks its header and length. Returns it with its header and the header's checksum.
    pub(super) fn open(
        disk: &dyn Disk,
        sequence: u64,
        identity: &LogIdentity,
    ) -> Result<(Segment, SegmentHeader, u32), LogError> {
        let name = name(sequence);
        let path = disk.path(&name);
        let io_error = |source| LogError::Io { action: "open log segment", path: path.clone(), source };
        let file = disk.open(&name).map_err(io_error)?;
        let len = file.len().map_err(io_error)?;
        let corrupt = |reason: String| LogError::Corrupt { path: path.clone(), offset: 0, reason };
        if len < BATCHES_START {
            return Err(corrupt(format!("the file is {len} bytes long, shorter than its header")));
        }
        let mut sector = [0; SECTOR_BYTES];
        file.read_exact_at(&mut sector, 0).map_err(io_error)?;
        let (header, crc) = SegmentHeader::decode(&sector).map_err(|problem| match problem {
            HeaderProblem::Damaged => corrupt("the segment header is not valid".to_string()),
            HeaderProblem::Version(found) => LogError::UnsupportedVersion { path: path.clone(), found },
        })?;
        if header.identity != *identity {
            return Err(LogError::ForeignLog { path, found: header.identity, expected: *identity });
        }
        if header.sequence != sequence {
            return Err(corrupt(format!("the file has another segment's header, number {}", header.sequence)));
        }
        if header.file_bytes != len || !len.is_multiple_of(SECTOR_BYTES as u64) {
            return Err(corrupt(format!("the file is {len} bytes long and was created with {}", header.file_bytes)));
        }
        Ok((Segment { sequence, bytes: len, file, path }, header, crc))
    }

    /// Reads `len` bytes of batches, tags not counted, from `offset`, counted likewise.
    pub(super) fn read_data(&self, offset: u64, len: usize) -> Result<Vec<u8>, LogError> {
        let first_sector = offset / SECTOR_DATA_BYTES as u64;
        let before = (offset % SECTOR_DATA_BYTES as u64) as usize;
        let mut sectors = vec![0; (before + len).div_ceil(SECTOR_DATA_BYTES) * SECTOR_BYTES];
        self.read(&mut sectors, first_sector * SECTOR_BYTES as u64)?;
        let mut data = Vec::new();
        batch::strip_tags(&sectors, &mut data)
            .map_err(|malformed| self.corrupt(first_sector * SECTOR_BYTES as u64, malformed.to_string()))?;
        data.truncate(before + len);
        data.drain(..before);
        Ok(data)
    }

    /// Reads raw bytes.
    pub(super) fn read(&self, buffer: &mut [u8], offset: u64) -> Result<(), LogError> {
        self.file.read_exact_at(buffer, offset).map_err(|source| self.io("read", source))
    }

    /// Writes raw bytes.
    pub(super) fn write(&mut self, bytes: &[u8], offset: u64) -> Result<(), LogError> {
        let result = self.file.write_all_at(bytes, offset);
        result.map_err(|source| self.io("write", source))
    }

    /// Makes all writes so far durable.
    pub(super) fn sync(&mut self) -> Result<(), LogError> {
        let result = self.file.sync_data();
        result.map_err(|source| self.io("sync", source))
    }

    pub(super) fn io(&self, action: &'static str, source: io::Error) -> LogError {
        LogError::Io { action, path: self.path.clone(), source }
    }

    pub(super) fn corrupt(&self, offset: u64, reason: impl Into<String>) -> LogError {
        LogError::Corrupt { path: self.path.clone(), offset, reason: reason.into() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_numbers_and_nothing_else_is_one() {
        assert_eq!(name(0x1f), "000000000000001f.log");
        assert_eq!(sequence_of("000000000000001f.log"), Some(0x1f));
        for other in ["1f.log", "000000000000001F.log", "000000000000001f.snapshot", "000000000000001f.log.tmp", ".log"]
        {
            assert_eq!(sequence_of(other), None, "{other}");
        }
        assert!(is_unfinished("000000000000001f.log.tmp"));
        assert!(!is_unfinished("boot.tmp"));
    }
}
