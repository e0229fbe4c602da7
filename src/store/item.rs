//! One key with its value, in one allocation.

use std::fmt;

use triomphe::ThinArc;

/// The bytes in front of the key: its length.
const KEY_LENGTH_BYTES: usize = 4;

/// A key, its value and its entity tag, immutable and shared: a clone is another reference.
///
/// `AsRef<[u8]>` is the value, so that a response can be written straight from the store, while the key is overwritten
/// or deleted by others.
#[derive(Clone)]
pub struct Item(ThinArc<u64, u8>);

impl Item {
    /// Copies key and value into one allocation, which costs 28 bytes besides them. They are not kept as slices of the
    /// entry, because that would keep all of the entry, and of the buffer it was read into.
    pub fn new(etag: u64, key: &[u8], value: &[u8]) -> Self {
        let key_len = u32::try_from(key.len()).expect("a key is at most 64 KiB long");
        let mut bytes = Vec::with_capacity(KEY_LENGTH_BYTES + key.len() + value.len());
        bytes.extend_from_slice(&key_len.to_le_bytes());
        bytes.extend_from_slice(key);
        bytes.extend_from_slice(value);
        Item(ThinArc::from_header_and_slice(etag, &bytes))
    }

    /// The log index of the entry that wrote the value.
    pub fn etag(&self) -> u64 {
        self.0.header.header
    }

    /// The key.
    pub fn key(&self) -> &[u8] {
        self.split().0
    }

    /// The value.
    pub fn value(&self) -> &[u8] {
        self.split().1
    }

    /// The length of key and value together in bytes: what counts against the limit of a store.
    pub fn bytes(&self) -> u64 {
        (self.0.slice.len() - KEY_LENGTH_BYTES) as u64
    }

    fn split(&self) -> (&[u8], &[u8]) {
        let (key_len, key_and_value) = self.0.slice.split_first_chunk().expect("the length is always there");
        key_and_value.split_at(u32::from_le_bytes(*key_len) as usize)
    }
}

impl AsRef<[u8]> for Item {
    fn as_ref(&self) -> &[u8] {
        self.value()
    }
}

impl fmt::Debug for Item {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} = {} bytes @ {}", self.key().escape_ascii(), self.value().len(), self.etag())
    }
}

impl PartialEq for Item {
    fn eq(&self, other: &Self) -> bool {
        self.etag() == other.etag() && self.0.slice == other.0.slice
    }
}

impl Eq for Item {}

#[cfg(test)]
mod tests {
    use super::*;

    impl Item {
        pub(crate) fn is_unshared(&self) -> bool {
            ThinArc::strong_count(&self.0) == 1
        }
    }

    #[test]
    fn an_item_gives_back_its_parts() {
        for (key, value) in [(&b"k"[..], &b"value"[..]), (b"\xff\0", b""), (&[7; 65_536], &[0; 1000])] {
            let item = Item::new(9, key, value);
            assert_eq!((item.key(), item.value(), item.as_ref()), (key, value, value));
            assert_eq!((item.etag(), item.bytes()), (9, (key.len() + value.len()) as u64));
        }
        assert_ne!(Item::new(1, b"ab", b"c"), Item::new(1, b"a", b"bc"));
    }
}
