//! Little-endian building blocks of every format of ours: log records, commands, snapshots, peer frames.
//!
//! Writing never fails: it appends to a `Vec<u8>`. Reading checks every length against what is left, so that
//! bytes from a damaged file or a hostile peer end in [`Malformed`], never in a panic or a large allocation.

use std::fmt;

/// Bytes that are not what their format says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Malformed(pub &'static str);

impl fmt::Display for Malformed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "malformed {}", self.0)
    }
}

impl std::error::Error for Malformed {}

/// Appends `bytes` behind their length as a `u32`.
///
/// # Panics
/// If `bytes` is longer than `u32::MAX`: every caller has a limit far below.
pub fn put_bytes(out: &mut Vec<u8>, bytes: &[u8]) {
    let len = u32::try_from(bytes.len()).expect("a field is shorter than 4 GiB");
    out.extend_from_slice(&len.to_le_bytes());
    out.extend_from_slice(bytes);
}

/// Appends a `u8`.
pub fn put_u8(out: &mut Vec<u8>, value: u8) {
    out.push(value);
}

/// Appends a `u32`.
pub fn put_u32(out: &mut Vec<u8>, value: u32) {
    out.extend_from_slice(&value.to_le_bytes());
}

/// Appends a `u64`.
pub fn put_u64(out: &mut Vec<u8>, value: u64) {
    out.extend_from_slice(&value.to_le_bytes());
}

/// Appends a `u128`.
pub fn put_u128(out: &mut Vec<u8>, value: u128) {
    out.extend_from_slice(&value.to_le_bytes());
}

/// Takes fields off the front of a byte slice.
#[derive(Clone, Debug)]
pub struct Fields<'a> {
    rest: &'a [u8],
    what: &'static str,
}

impl<'a> Fields<'a> {
    /// Reads `bytes`; `what` names them in errors.
    pub fn new(bytes: &'a [u8], what: &'static str) -> Self {
        Fields { rest: bytes, what }
    }

    /// The error that names these bytes.
    pub fn malformed(&self) -> Malformed {
        Malformed(self.what)
    }

    /// What has not been taken yet.
    pub fn rest(&self) -> &'a [u8] {
        self.rest
    }

    /// Exactly `len` bytes.
    pub fn take(&mut self, len: usize) -> Result<&'a [u8], Malformed> {
        let (head, rest) = self.rest.split_at_checked(len).ok_or(Malformed(self.what))?;
        self.rest = rest;
        Ok(head)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], Malformed> {
        let (head, rest) = self.rest.split_first_chunk().ok_or(Malformed(self.what))?;
        self.rest = rest;
        Ok(*head)
    }

    /// The next `u8`.
    pub fn u8(&mut self) -> Result<u8, Malformed> {
        Ok(self.array::<1>()?[0])
    }

    /// The next `u32`.
    pub fn u32(&mut self) -> Result<u32, Malformed> {
        self.array().map(u32::from_le_bytes)
    }

    /// The next `u64`.
    pub fn u64(&mut self) -> Result<u64, Malformed> {
        self.array().map(u64::from_le_bytes)
    }

    /// The next `u128`.
    pub fn u128(&mut self) -> Result<u128, Malformed> {
        self.array().map(u128::from_le_bytes)
    }

    /// The next 16 bytes.
    pub fn bytes16(&mut self) -> Result<[u8; 16], Malformed> {
        self.array()
    }

    /// A length and so many bytes, at most `max`.
    pub fn bytes(&mut self, max: usize) -> Result<&'a [u8], Malformed> {
        let len = self.u32()? as usize;
        if len > max {
            return Err(self.malformed());
        }
        self.take(len)
    }

    /// A number of items that follow, each of at least `item_bytes_min` bytes: never more than could be there.
    pub fn count(&mut self, item_bytes_min: usize) -> Result<usize, Malformed> {
        let count = self.u32()? as usize;
        if count > self.rest.len() / item_bytes_min.max(1) {
            return Err(self.malformed());
        }
        Ok(count)
    }

    /// Nothing may be left.
    pub fn finish(self) -> Result<(), Malformed> {
        if self.rest.is_empty() { Ok(()) } else { Err(self.malformed()) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_truncation_is_an_error() {
        let mut out = Vec::new();
        put_u8(&mut out, 7);
        put_u32(&mut out, 8);
        put_u64(&mut out, 9);
        put_u128(&mut out, 10);
        put_bytes(&mut out, b"value");
        let read = |bytes: &[u8]| -> Result<(u8, u32, u64, u128, Vec<u8>), Malformed> {
            let mut fields = Fields::new(bytes, "test");
            let all = (fields.u8()?, fields.u32()?, fields.u64()?, fields.u128()?, fields.bytes(5)?.to_vec());
            fields.finish()?;
            Ok(all)
        };
        assert_eq!(read(&out), Ok((7, 8, 9, 10, b"value".to_vec())));
        for end in 0..out.len() {
            assert_eq!(read(&out[..end]), Err(Malformed("test")), "cut at {end}");
        }
        out.push(0);
        assert_eq!(read(&out), Err(Malformed("test")));
    }

    #[test]
    fn a_length_beyond_the_limit_is_refused_before_it_is_read() {
        let mut out = Vec::new();
        put_bytes(&mut out, &[0; 6]);
        assert!(Fields::new(&out, "test").bytes(5).is_err());
        assert!(Fields::new(&u32::MAX.to_le_bytes(), "test").count(1).is_err());
    }
}
