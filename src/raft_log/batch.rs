//! Batches on disk: what is written at once, and holds as a whole or not at all.
//!
//! A batch begins at a sector of its own and fills whole sectors of [`SECTOR_BYTES`]. Each sector begins with a tag,
//! [`FIRST`] or [`NEXT`], and the other [`SECTOR_DATA_BYTES`] bytes are a slice of the batch: a header, then records,
//! then zeros up to the end of the last sector. Two things follow, and recovery stands on them:
//! * no sector of a batch is ever all zeros, so a sector that is was never written (segments are zeros before), and a
//!   batch that is damaged without such a sector was not torn by a crash but damaged later;
//! * no sector holds parts of two batches, so writing one batch cannot hurt the one before.
//!
//! The header holds a CRC32C of the records and one of itself. The latter covers the former and the header checksum of
//! the batch before, so that the batches of a log form a chain and old bytes never fit into it by accident. It also
//! says which batches were durable when this one was written: that tells a lost write from a damaged one.

use crate::codec::{Fields, Malformed, put_u32, put_u64};

/// What a disk writes whole or not at all. (Disks with sectors of 4096 bytes only write more at once.)
pub(super) const SECTOR_BYTES: usize = 512;

/// What a sector holds of a batch, behind its tag.
pub(super) const SECTOR_DATA_BYTES: usize = SECTOR_BYTES - 1;

/// Length of a batch header.
pub(super) const HEADER_BYTES: usize = 32;

/// The most record bytes in one batch. Far above what one Ready can hold, and far below what `u32` can.
pub(super) const BATCH_BYTES_MAX: usize = 1 << 30;

/// Tag of a batch's first sector. Several bits, so that no single flipped bit makes it zero or the other one.
const FIRST: u8 = 0xB6;

/// Tag of a batch's other sectors.
const NEXT: u8 = 0x6D;

/// Buffers above this size are given back after a large batch.
const BUFFER_BYTES_KEPT: usize = 4 << 20;

/// What stands before the records of a batch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct BatchHeader {
    /// Bytes of records.
    pub(super) len: u32,
    /// Counts the batches of a log from 1.
    pub(super) number: u64,
    /// The last batch that was known to be durable when this one was written.
    pub(super) synced: u64,
    /// The header checksum of the batch before; of the log's first batch: 0.
    pub(super) previous: u32,
    /// CRC32C of the records.
    pub(super) records_crc: u32,
    /// CRC32C of the header up to here: this batch's link of the chain.
    pub(super) crc: u32,
}

impl BatchHeader {
    /// The bytes on disk that the batch fills, tags and padding included.
    pub(super) fn disk_bytes(&self) -> u64 {
        disk_bytes(self.len as usize)
    }

    fn decode(bytes: &[u8]) -> Result<BatchHeader, Malformed> {
        let mut fields = Fields::new(bytes, "batch header");
        let header = BatchHeader {
            len: fields.u32()?,
            number: fields.u64()?,
            synced: fields.u64()?,
            previous: fields.u32()?,
            records_crc: fields.u32()?,
            crc: fields.u32()?,
        };
        let checksummed = HEADER_BYTES - 4;
        if crc32c::crc32c(&bytes[..checksummed]) != header.crc || header.len as usize > BATCH_BYTES_MAX {
            return Err(fields.malformed());
        }
        Ok(header)
    }
}

/// The bytes on disk of a batch with so many bytes of records.
pub(super) fn disk_bytes(records_len: usize) -> u64 {
    ((HEADER_BYTES + records_len).div_ceil(SECTOR_DATA_BYTES) * SECTOR_BYTES) as u64
}

/// Where a byte of a batch lies when the tags are not counted: `offset` is a sector's offset on disk.
pub(super) fn data_offset(offset: u64) -> u64 {
    offset / SECTOR_BYTES as u64 * SECTOR_DATA_BYTES as u64
}

/// What one sector says.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Sector {
    /// All zeros: not written.
    Unwritten,
    /// Begins a batch, and its header is whole.
    First(BatchHeader),
    /// Goes on with a batch.
    Next,
    /// None of these: no crash leaves that behind.
    Damaged,
}

impl Sector {
    /// Looks at one sector.
    ///
    /// # Panics
    /// If `bytes` is not one sector long.
    pub(super) fn read(bytes: &[u8]) -> Sector {
        assert_eq!(bytes.len(), SECTOR_BYTES, "a sector is looked at as a whole");
        match bytes[0] {
            FIRST => BatchHeader::decode(&bytes[1..1 + HEADER_BYTES]).map_or(Sector::Damaged, Sector::First),
            NEXT => Sector::Next,
            0 if bytes.iter().all(|byte| *byte == 0) => Sector::Unwritten,
            _ => Sector::Damaged,
        }
    }
}

/// Takes the tags out of sectors and appends the rest to `out`.
///
/// # Errors
/// If a tag is neither.
pub(super) fn strip_tags(sectors: &[u8], out: &mut Vec<u8>) -> Result<(), Malformed> {
    out.reserve(sectors.len());
    for sector in sectors.chunks(SECTOR_BYTES) {
        match sector.split_first() {
            Some((&(FIRST | NEXT), data)) => out.extend_from_slice(data),
            _ => return Err(Malformed("sector tag")),
        }
    }
    Ok(())
}

/// Checks a whole batch, as it lies on disk, against its header, and returns its records in `records`.
pub(super) fn read_batch(header: &BatchHeader, sectors: &[u8], records: &mut Vec<u8>) -> Result<(), Malformed> {
    records.clear();
    let others = sectors.iter().step_by(SECTOR_BYTES).skip(1);
    if sectors.first() != Some(&FIRST) || others.into_iter().any(|tag| *tag != NEXT) {
        return Err(Malformed("sector tag"));
    }
    strip_tags(sectors, records)?;
    let padding = records.split_off((HEADER_BYTES + header.len as usize).min(records.len()));
    if padding.iter().any(|byte| *byte != 0) {
        return Err(Malformed("padding of a batch"));
    }
    records.drain(..HEADER_BYTES);
    if records.len() != header.len as usize || crc32c::crc32c(records) != header.records_crc {
        return Err(Malformed("checksum of a batch"));
    }
    Ok(())
}

/// Collects the records of a batch and lays it out for the disk. Used again for every batch.
#[derive(Debug, Default)]
pub(super) struct BatchWriter {
    /// Room for the header, then records.
    data: Vec<u8>,
    sectors: Vec<u8>,
}

impl BatchWriter {
    /// Forgets the batch before and returns where to append records. The buffer already holds the room for the header,
    /// so that a place in it is a place in the batch.
    pub(super) fn begin(&mut self) -> &mut Vec<u8> {
        for buffer in [&mut self.data, &mut self.sectors] {
            buffer.clear();
            buffer.shrink_to(BUFFER_BYTES_KEPT);
        }
        self.data.resize(HEADER_BYTES, 0);
        &mut self.data
    }

    /// Bytes of records so far.
    pub(super) fn records_len(&self) -> usize {
        self.data.len() - HEADER_BYTES
    }

    /// Completes the batch and returns its link of the chain, and the sectors to write.
    ///
    /// # Panics
    /// If the records are longer than [`BATCH_BYTES_MAX`].
    pub(super) fn finish(&mut self, number: u64, synced: u64, previous: u32) -> (u32, &[u8]) {
        assert!(self.records_len() <= BATCH_BYTES_MAX, "the size of a batch is checked before it is laid out");
        let mut header = Vec::with_capacity(HEADER_BYTES);
        put_u32(&mut header, self.records_len() as u32);
        put_u64(&mut header, number);
        put_u64(&mut header, synced);
        put_u32(&mut header, previous);
        put_u32(&mut header, crc32c::crc32c(&self.data[HEADER_BYTES..]));
        let crc = crc32c::crc32c(&header);
        put_u32(&mut header, crc);
        self.data[..HEADER_BYTES].copy_from_slice(&header);

        self.sectors.reserve(disk_bytes(self.records_len()) as usize);
        for (count, piece) in self.data.chunks(SECTOR_DATA_BYTES).enumerate() {
            self.sectors.push(if count == 0 { FIRST } else { NEXT });
            self.sectors.extend_from_slice(piece);
        }
        self.sectors.resize(self.sectors.len().next_multiple_of(SECTOR_BYTES), 0);
        (crc, &self.sectors)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_batch_comes_back_and_no_sector_of_it_is_zero() {
        let mut writer = BatchWriter::default();
        for len in [0, 1, 478, 479, 480, 511, 989, 990, 991, 5000] {
            writer.begin().extend(std::iter::repeat_n(0, len));
            let (crc, sectors) = writer.finish(7, 5, 99);
            assert_eq!(sectors.len() as u64, disk_bytes(len));
            let Sector::First(header) = Sector::read(&sectors[..SECTOR_BYTES]) else { panic!("a first sector") };
            assert_eq!((header.number, header.synced, header.previous, header.crc), (7, 5, 99, crc));
            assert_eq!(header.disk_bytes(), sectors.len() as u64);
            assert!(sectors.chunks(SECTOR_BYTES).skip(1).all(|sector| Sector::read(sector) == Sector::Next));
            let mut records = vec![1];
            read_batch(&header, sectors, &mut records).unwrap();
            assert_eq!(records, vec![0; len]);
        }
    }

    #[test]
    fn every_flipped_bit_is_seen_and_none_looks_like_an_unwritten_sector() {
        let mut writer = BatchWriter::default();
        writer.begin().extend((0..700).map(|n| n as u8));
        let (_, sectors) = writer.finish(1, 0, 0);
        let mut sectors = sectors.to_vec();
        let mut records = Vec::new();
        for bit in 0..sectors.len() * 8 {
            sectors[bit / 8] ^= 1 << (bit % 8);
            let seen = match Sector::read(&sectors[..SECTOR_BYTES]) {
                Sector::First(header) => read_batch(&header, &sectors, &mut records).is_err(),
                other => other == Sector::Damaged,
            };
            assert!(seen, "bit {bit}");
            assert_ne!(Sector::read(&sectors[SECTOR_BYTES..]), Sector::Unwritten);
            sectors[bit / 8] ^= 1 << (bit % 8);
        }
    }
}
