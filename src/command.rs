//! What a log entry says.
//!
//! A normal entry carries a [`RequestId`] as its context and an encoded [`Command`] as its data. The encoding is
//! versioned, because it lies in logs and travels between nodes of neighbouring versions.

use std::fmt;

use bytes::Bytes;
use sha2::{Digest, Sha256};

use crate::codec::{Fields, Malformed, put_bytes, put_u8, put_u32, put_u64, put_u128};
use crate::membership::NodeId;

/// The longest key in bytes that a command, a snapshot or a peer may carry. A node's own limit for its clients is
/// configured and never higher.
pub const KEY_BYTES_MAX: usize = 64 << 10;

/// The longest value in bytes that a command, a snapshot or a peer may carry. A node's own limit for its clients is
/// configured and never higher.
pub const VALUE_BYTES_MAX: usize = 16 << 20;

/// The most entity tags in one condition: more than fit into the header fields of any request.
pub const TAGS_MAX: usize = 1 << 16;

/// The most bytes of an encoded command: key and value, two lists of tags, and less than 128 bytes around them.
pub const COMMAND_BYTES_MAX: usize = KEY_BYTES_MAX + VALUE_BYTES_MAX + 2 * 8 * TAGS_MAX + 128;

/// The encoding that this version writes, and the only one it reads.
const COMMAND_VERSION: u8 = 1;

/// Identifies one request for all time: which node took it, in which of its runs, as its how-manieth.
///
/// It is the context of the entry. The state machine remembers which ones it has applied, so the same request can be
/// proposed twice (a duplicated message, or a second leader after the first died) and is applied once. `boot` is
/// different for every start of a process, so an old entry that is replayed never answers a new request.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RequestId {
    /// The node that took the request from its client.
    pub node: NodeId,
    /// That node's boot: a counter in the upper half, random in the lower; later boots compare greater.
    pub boot: u64,
    /// Counts this boot's requests from 1.
    pub sequence: u64,
}

/// The entity tags of an `If-Match` or `If-None-Match`; a key's tag is the log index of its last write.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Tags {
    /// `*`: any tag at all, so long as the key exists.
    Any,
    /// One of these. A client's tag that no key could have is left out; an empty list matches nothing.
    List(Vec<u64>),
}

/// What must hold for a write to take effect, decided at apply (RFC 9110 section 13).
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Condition {
    /// The key must have one of these tags.
    pub if_match: Option<Tags>,
    /// The key must have none of these tags.
    pub if_none_match: Option<Tags>,
}

/// A client's `Idempotency-Key`, in the compact form that is remembered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Token {
    /// The first 16 bytes of the SHA-256 of the client's token.
    pub id: [u8; 16],
    /// The first 16 bytes of the SHA-256 of method, key, condition and value: the same for a true repeat.
    pub fingerprint: [u8; 16],
}

/// A change of the replicated state.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Command {
    /// Sets a key.
    Put {
        /// Any bytes, not empty.
        key: Bytes,
        /// Any bytes.
        value: Bytes,
        /// What must hold.
        condition: Condition,
        /// The client's own name for this write, if it gave one.
        token: Option<Token>,
    },
    /// Removes a key.
    Delete {
        /// Any bytes, not empty.
        key: Bytes,
        /// What must hold.
        condition: Condition,
        /// The client's own name for this write, if it gave one.
        token: Option<Token>,
    },
    /// Records the data directory of a member, so that a wiped or swapped disk is noticed for ever. Applied to the
    /// membership, not to the keys.
    RecordDirectory {
        /// The member.
        member: NodeId,
        /// The identity of its data directory.
        directory: u128,
    },
}

/// What a command does, readable from its first two bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// [`Command::Put`].
    Put = 1,
    /// [`Command::Delete`].
    Delete = 2,
    /// [`Command::RecordDirectory`].
    RecordDirectory = 3,
}

/// Why bytes are no command.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum CommandError {
    /// Written by a newer node: this one must stop before the entry, as skipping it would fork the state.
    UnknownVersion(u8),
    /// Written by a newer node, as above.
    UnknownKind(u8),
    /// Damaged, or not a command at all.
    Malformed(Malformed),
}

impl fmt::Display for CommandError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            CommandError::UnknownVersion(version) => {
                write!(f, "unknown command version {version}: a newer node wrote it, upgrade this one")
            }
            CommandError::UnknownKind(kind) => {
                write!(f, "unknown command kind {kind}: a newer node wrote it, upgrade this one")
            }
            CommandError::Malformed(malformed) => malformed.fmt(f),
        }
    }
}

impl std::error::Error for CommandError {}

impl From<Malformed> for CommandError {
    fn from(malformed: Malformed) -> Self {
        CommandError::Malformed(malformed)
    }
}

impl RequestId {
    /// The length of the encoding in bytes.
    pub const BYTES: usize = 24;

    /// The context of the entry: node, boot and sequence, each little-endian.
    pub fn encode(&self) -> [u8; Self::BYTES] {
        let mut out = [0; Self::BYTES];
        out[..8].copy_from_slice(&self.node.to_le_bytes());
        out[8..16].copy_from_slice(&self.boot.to_le_bytes());
        out[16..].copy_from_slice(&self.sequence.to_le_bytes());
        out
    }

    /// Reads the context of an entry.
    ///
    /// # Errors
    /// If it is not exactly [`RequestId::BYTES`] long.
    pub fn decode(bytes: &[u8]) -> Result<Self, Malformed> {
        let mut fields = Fields::new(bytes, "request id");
        let id = RequestId { node: fields.u64()?, boot: fields.u64()?, sequence: fields.u64()? };
        fields.finish()?;
        Ok(id)
    }
}

impl Tags {
    fn encoded_len(&self) -> usize {
        match self {
            Tags::Any => 1,
            Tags::List(tags) => 1 + 4 + 8 * tags.len(),
        }
    }

    fn encode(&self, out: &mut Vec<u8>) {
        match self {
            Tags::Any => put_u8(out, 1),
            Tags::List(tags) => {
                put_u8(out, 2);
                put_u32(out, u32::try_from(tags.len()).expect("a condition has at most TAGS_MAX tags"));
                for &tag in tags {
                    put_u64(out, tag);
                }
            }
        }
    }

    fn decode(fields: &mut Fields<'_>) -> Result<Option<Self>, Malformed> {
        match fields.u8()? {
            0 => Ok(None),
            1 => Ok(Some(Tags::Any)),
            2 => {
                let count = fields.count(8)?;
                if count > TAGS_MAX {
                    return Err(fields.malformed());
                }
                (0..count).map(|_| fields.u64()).collect::<Result<_, _>>().map(|tags| Some(Tags::List(tags)))
            }
            _ => Err(fields.malformed()),
        }
    }

    /// Whether one of these is `current`, the tag of an existing key.
    fn match_tag(&self, current: Option<u64>) -> bool {
        match (self, current) {
            (_, None) => false,
            (Tags::Any, Some(_)) => true,
            (Tags::List(tags), Some(tag)) => tags.contains(&tag),
        }
    }
}

impl Condition {
    /// Whether a key whose tag is `current`, or that does not exist, may be written. `If-Match` is asked first; both
    /// must hold.
    pub fn holds(&self, current: Option<u64>) -> bool {
        self.if_match.as_ref().is_none_or(|tags| tags.match_tag(current))
            && self.if_none_match.as_ref().is_none_or(|tags| !tags.match_tag(current))
    }

    fn encoded_len(&self) -> usize {
        let len = |tags: &Option<Tags>| tags.as_ref().map_or(1, Tags::encoded_len);
        len(&self.if_match) + len(&self.if_none_match)
    }

    fn encode(&self, out: &mut Vec<u8>) {
        for tags in [&self.if_match, &self.if_none_match] {
            match tags {
                None => put_u8(out, 0),
                Some(tags) => tags.encode(out),
            }
        }
    }

    fn decode(fields: &mut Fields<'_>) -> Result<Self, Malformed> {
        Ok(Condition { if_match: Tags::decode(fields)?, if_none_match: Tags::decode(fields)? })
    }

    fn assert_within_limits(&self) {
        for tags in [&self.if_match, &self.if_none_match] {
            if let Some(Tags::List(tags)) = tags {
                assert!(tags.len() <= TAGS_MAX, "a condition has at most TAGS_MAX tags");
            }
        }
    }
}

impl Token {
    /// The length of the encoding in bytes, behind the byte that says whether there is one.
    const BYTES: usize = 32;

    /// The token of a write that a client named `client_token`. A delete has an empty value.
    ///
    /// The hashes are compared with remembered ones for as long as a cluster lives, across versions of this program:
    /// what goes into them cannot change.
    pub fn new(client_token: &[u8], kind: Kind, key: &[u8], condition: &Condition, value: &[u8]) -> Self {
        let mut parts = Vec::with_capacity(1 + 4 + key.len() + condition.encoded_len());
        put_u8(&mut parts, kind as u8);
        put_bytes(&mut parts, key);
        condition.encode(&mut parts);
        let fingerprint = Sha256::new().chain_update(&parts).chain_update(value).finalize();
        Token { id: first_16(&Sha256::digest(client_token)), fingerprint: first_16(&fingerprint) }
    }

    fn encode(token: Option<&Token>, out: &mut Vec<u8>) {
        match token {
            None => put_u8(out, 0),
            Some(token) => {
                put_u8(out, 1);
                out.extend_from_slice(&token.id);
                out.extend_from_slice(&token.fingerprint);
            }
        }
    }

    fn decode(fields: &mut Fields<'_>) -> Result<Option<Self>, Malformed> {
        match fields.u8()? {
            0 => Ok(None),
            1 => Ok(Some(Token { id: fields.bytes16()?, fingerprint: fields.bytes16()? })),
            _ => Err(fields.malformed()),
        }
    }
}

fn first_16(hash: &[u8]) -> [u8; 16] {
    *hash.first_chunk().expect("a SHA-256 has 32 bytes")
}

impl Command {
    /// The encoding of a put that holds the given parts: for callers that have no `Bytes` of key and value yet.
    ///
    /// # Panics
    /// As [`Command::encode`].
    pub fn encode_put(key: &[u8], value: &[u8], condition: &Condition, token: Option<&Token>) -> Vec<u8> {
        assert!(value.len() <= VALUE_BYTES_MAX, "a value is at most VALUE_BYTES_MAX long");
        let mut out = encode_head(Kind::Put, key, condition, 4 + value.len());
        Token::encode(token, &mut out);
        put_bytes(&mut out, key);
        put_bytes(&mut out, value);
        out
    }

    /// The data of an entry, in one allocation.
    ///
    /// # Panics
    /// If a part is beyond its limit or the key is empty: every node would stop at such an entry, so it must end here.
    /// The node's own limits for its clients are lower.
    pub fn encode(&self) -> Vec<u8> {
        match self {
            Command::Put { key, value, condition, token } => Command::encode_put(key, value, condition, token.as_ref()),
            Command::Delete { key, condition, token } => {
                let mut out = encode_head(Kind::Delete, key, condition, 0);
                Token::encode(token.as_ref(), &mut out);
                put_bytes(&mut out, key);
                out
            }
            Command::RecordDirectory { member, directory } => {
                let mut out = Vec::with_capacity(2 + 8 + 16);
                put_u8(&mut out, COMMAND_VERSION);
                put_u8(&mut out, Kind::RecordDirectory as u8);
                put_u64(&mut out, *member);
                put_u128(&mut out, *directory);
                out
            }
        }
    }

    /// Reads the data of an entry. Key and value are slices of it, not copies.
    ///
    /// # Errors
    /// If a newer node wrote it, or the bytes are no command within the limits.
    pub fn decode(entry: &Bytes) -> Result<Self, CommandError> {
        let kind = Command::kind_of(entry)?;
        let mut fields = Fields::new(&entry[2..], "command");
        let command = match kind {
            Kind::Put => {
                let condition = Condition::decode(&mut fields)?;
                let token = Token::decode(&mut fields)?;
                let key = decode_key(entry, &mut fields)?;
                let value = entry.slice_ref(fields.bytes(VALUE_BYTES_MAX)?);
                Command::Put { key, value, condition, token }
            }
            Kind::Delete => {
                let condition = Condition::decode(&mut fields)?;
                let token = Token::decode(&mut fields)?;
                Command::Delete { key: decode_key(entry, &mut fields)?, condition, token }
            }
            Kind::RecordDirectory => Command::RecordDirectory { member: fields.u64()?, directory: fields.u128()? },
        };
        fields.finish()?;
        Ok(command)
    }

    /// The key that the entry's data sets or removes, if that is quickly said: `None` also for what is malformed, and behind
    /// a condition that lists tags.
    pub fn key_of(entry: &[u8]) -> Option<&[u8]> {
        let mut fields = match Command::kind_of(entry).ok()? {
            Kind::Put | Kind::Delete => Fields::new(&entry[2..], "command"),
            Kind::RecordDirectory => return None,
        };
        for _condition in ["If-Match", "If-None-Match"] {
            // None, or any tag at all.
            fields.u8().ok().filter(|tags| *tags < 2)?;
        }
        Token::decode(&mut fields).ok()?;
        fields.bytes(KEY_BYTES_MAX).ok()
    }

    /// What the entry's data does, without reading the rest of it.
    ///
    /// # Errors
    /// If a newer node wrote it, or there is too little to tell.
    pub fn kind_of(entry: &[u8]) -> Result<Kind, CommandError> {
        let mut fields = Fields::new(entry, "command");
        let version = fields.u8()?;
        if version != COMMAND_VERSION {
            return Err(CommandError::UnknownVersion(version));
        }
        match fields.u8()? {
            1 => Ok(Kind::Put),
            2 => Ok(Kind::Delete),
            3 => Ok(Kind::RecordDirectory),
            kind => Err(CommandError::UnknownKind(kind)),
        }
    }
}

/// Begins a command that has a key; `more` is how many bytes follow behind it.
fn encode_head(kind: Kind, key: &[u8], condition: &Condition, more: usize) -> Vec<u8> {
    assert!(!key.is_empty() && key.len() <= KEY_BYTES_MAX, "a key is 1 to KEY_BYTES_MAX bytes long");
    condition.assert_within_limits();
    let mut out = Vec::with_capacity(2 + condition.encoded_len() + 1 + Token::BYTES + 4 + key.len() + more);
    put_u8(&mut out, COMMAND_VERSION);
    put_u8(&mut out, kind as u8);
    condition.encode(&mut out);
    out
}

fn decode_key(entry: &Bytes, fields: &mut Fields<'_>) -> Result<Bytes, Malformed> {
    let key = fields.bytes(KEY_BYTES_MAX)?;
    if key.is_empty() {
        return Err(fields.malformed());
    }
    Ok(entry.slice_ref(key))
}

#[cfg(test)]
mod tests {
    use proptest::collection::vec;
    use proptest::prelude::*;

    use super::*;

    impl Command {
        fn key(&self) -> Option<&Bytes> {
            match self {
                Command::Put { key, .. } | Command::Delete { key, .. } => Some(key),
                Command::RecordDirectory { .. } => None,
            }
        }

        fn condition(&self) -> Option<&Condition> {
            match self {
                Command::Put { condition, .. } | Command::Delete { condition, .. } => Some(condition),
                Command::RecordDirectory { .. } => None,
            }
        }
    }

    fn tags() -> impl Strategy<Value = Option<Tags>> {
        prop_oneof![Just(None), Just(Some(Tags::Any)), vec(any::<u64>(), 0..5).prop_map(|tags| Some(Tags::List(tags)))]
    }

    fn condition() -> impl Strategy<Value = Condition> {
        (tags(), tags()).prop_map(|(if_match, if_none_match)| Condition { if_match, if_none_match })
    }

    fn token() -> impl Strategy<Value = Option<Token>> {
        proptest::option::of(
            (any::<[u8; 16]>(), any::<[u8; 16]>()).prop_map(|(id, fingerprint)| Token { id, fingerprint }),
        )
    }

    fn bytes(len: std::ops::Range<usize>) -> impl Strategy<Value = Bytes> {
        vec(any::<u8>(), len).prop_map(Bytes::from)
    }

    fn command() -> impl Strategy<Value = Command> {
        prop_oneof![
            (bytes(1..40), bytes(0..200), condition(), token())
                .prop_map(|(key, value, condition, token)| Command::Put { key, value, condition, token }),
            (bytes(1..40), condition(), token()).prop_map(|(key, condition, token)| Command::Delete {
                key,
                condition,
                token
            }),
            (any::<u64>(), any::<u128>())
                .prop_map(|(member, directory)| Command::RecordDirectory { member, directory }),
        ]
    }

    proptest! {
        #[test]
        fn a_command_survives_its_encoding_and_no_part_of_it_is_one(command in command()) {
            let encoded = command.encode();
            prop_assert!(encoded.capacity() <= encoded.len() + Token::BYTES);
            let encoded = Bytes::from(encoded);
            prop_assert_eq!(Command::decode(&encoded), Ok(command.clone()));
            if let Some(key) = Command::key_of(&encoded) {
                prop_assert!(command.key().is_some_and(|other| *key == **other), "{:?}", key);
            } else if let Some(condition) = command.condition() {
                let lists = [&condition.if_match, &condition.if_none_match].map(|tags| matches!(tags, Some(Tags::List(_))));
                prop_assert!(lists.contains(&true), "its key is quickly said: {:?}", command);
            }
            for end in 0..encoded.len() {
                let cut = Command::decode(&encoded.slice(..end));
                prop_assert!(matches!(cut, Err(CommandError::Malformed(_))), "cut at {}: {:?}", end, cut);
            }
            let mut longer = encoded.to_vec();
            longer.push(0);
            prop_assert!(matches!(Command::decode(&Bytes::from(longer)), Err(CommandError::Malformed(_))));
        }

        #[test]
        fn any_bytes_are_decoded_without_a_panic(bytes in vec(any::<u8>(), 0..100), kind in 1..4u8) {
            let mut entry = vec![COMMAND_VERSION, kind];
            entry.extend(bytes);
            let entry = Bytes::from(entry);
            let _ = Command::key_of(&entry);
            if let Ok(command) = Command::decode(&entry) {
                prop_assert_eq!(command.encode(), entry.to_vec(), "two encodings of one command");
            }
        }

        #[test]
        fn a_request_id_survives_its_encoding(node: u64, boot: u64, sequence: u64) {
            let id = RequestId { node, boot, sequence };
            prop_assert_eq!(RequestId::decode(&id.encode()), Ok(id));
            prop_assert!(RequestId::decode(&id.encode()[1..]).is_err());
            prop_assert!(RequestId::decode(&[&id.encode()[..], &[0]].concat()).is_err());
        }
    }

    #[test]
    fn key_and_value_are_slices_of_the_entry() {
        let entry = Bytes::from(Command::encode_put(b"key", b"value", &Condition::default(), None));
        let Ok(Command::Put { key, value, .. }) = Command::decode(&entry) else { panic!("a put") };
        let range = entry.as_ptr_range();
        assert!(range.contains(&key.as_ptr()) && range.contains(&value.as_ptr()));
    }

    #[test]
    fn a_newer_nodes_command_is_told_from_a_damaged_one() {
        let mut entry = Command::RecordDirectory { member: 1, directory: 2 }.encode();
        assert_eq!(Command::kind_of(&entry), Ok(Kind::RecordDirectory));
        entry[1] = 77;
        assert_eq!(Command::decode(&Bytes::from(entry.clone())), Err(CommandError::UnknownKind(77)));
        entry[0] = 2;
        assert_eq!(Command::decode(&Bytes::from(entry)), Err(CommandError::UnknownVersion(2)));
        assert!(matches!(Command::kind_of(&[]), Err(CommandError::Malformed(_))));
    }

    #[test]
    fn the_largest_command_fits_its_limit_and_more_is_refused() {
        let condition = Condition {
            if_match: Some(Tags::List(vec![1; TAGS_MAX])),
            if_none_match: Some(Tags::List(vec![2; TAGS_MAX])),
        };
        let token = Some(Token { id: [1; 16], fingerprint: [2; 16] });
        let (key, value) = (Bytes::from(vec![3; KEY_BYTES_MAX]), Bytes::from(vec![4; VALUE_BYTES_MAX]));
        let command = Command::Put { key, value, condition, token };
        let encoded = Bytes::from(command.encode());
        assert!(encoded.len() <= COMMAND_BYTES_MAX);
        assert_eq!(Command::decode(&encoded), Ok(command));

        let mut too_long = vec![COMMAND_VERSION, Kind::Put as u8, 0, 0, 0];
        put_bytes(&mut too_long, &[3; KEY_BYTES_MAX + 1]);
        put_bytes(&mut too_long, b"");
        assert!(Command::decode(&Bytes::from(too_long)).is_err());
        let mut empty_key = vec![COMMAND_VERSION, Kind::Delete as u8, 0, 0, 0];
        put_bytes(&mut empty_key, b"");
        assert!(Command::decode(&Bytes::from(empty_key)).is_err());
    }

    #[test]
    fn a_token_tells_every_part_of_a_write_from_another() {
        let any = Condition { if_match: Some(Tags::Any), if_none_match: None };
        let none = Condition { if_match: None, if_none_match: Some(Tags::Any) };
        let plain = Condition::default();
        let tokens = [
            Token::new(b"t", Kind::Put, b"ab", &plain, b"c"),
            Token::new(b"t", Kind::Put, b"a", &plain, b"bc"),
            Token::new(b"t", Kind::Put, b"ab", &plain, b""),
            Token::new(b"t", Kind::Delete, b"ab", &plain, b""),
            Token::new(b"t", Kind::Put, b"ab", &any, b"c"),
            Token::new(b"t", Kind::Put, b"ab", &none, b"c"),
        ];
        for (i, a) in tokens.iter().enumerate() {
            assert_eq!(a.id, tokens[0].id);
            assert!(tokens[..i].iter().all(|b| a.fingerprint != b.fingerprint), "token {i}");
        }
        assert_ne!(Token::new(b"u", Kind::Put, b"ab", &plain, b"c").id, tokens[0].id);
    }

    #[test]
    fn a_token_hashes_the_same_in_every_version() {
        let token = Token::new(b"order-17", Kind::Put, b"key", &Condition::default(), b"value");
        assert_eq!(token.id, first_16(&Sha256::digest(b"order-17")));
        assert_eq!(token.fingerprint, first_16(&Sha256::digest(b"\x01\x03\0\0\0key\0\0value")));
    }

    #[test]
    fn conditions_hold_as_http_says() {
        let condition = |if_match: Option<Tags>, if_none_match: Option<Tags>| Condition { if_match, if_none_match };
        let list = |tags: &[u64]| Some(Tags::List(tags.to_vec()));
        for (condition, absent, tag_7) in [
            (condition(None, None), true, true),
            (condition(Some(Tags::Any), None), false, true),
            (condition(list(&[5, 7]), None), false, true),
            (condition(list(&[5]), None), false, false),
            (condition(list(&[]), None), false, false),
            (condition(None, Some(Tags::Any)), true, false),
            (condition(None, list(&[5, 7])), true, false),
            (condition(None, list(&[5])), true, true),
            (condition(None, list(&[])), true, true),
            (condition(list(&[7]), list(&[7])), false, false),
            (condition(list(&[7]), list(&[8])), false, true),
        ] {
            assert_eq!(condition.holds(None), absent, "{condition:?} of an absent key");
            assert_eq!(condition.holds(Some(7)), tag_7, "{condition:?} of tag 7");
        }
    }
}
