//! What a request asks for: the resource that its target names, and the parameters behind the `?`.
//!
//! Everything here works on the raw bytes and decodes them exactly once, so that every key can be named and no two
//! spellings that differ after decoding are taken for the same key.

use std::borrow::Cow;
use std::time::Duration;

use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, percent_encode};

use crate::config::parse_duration;

use super::problem::Problem;

/// What begins the keys that belong to the node.
const NODE_PREFIX: &[u8] = b"_/";

/// Keys in one page of a listing, and changes in one page of a history: a page is built in memory.
pub(super) const PAGE_ITEMS_MAX: usize = 1000;

/// The longest time that a client may ask to wait for a change; a longer one would look dead to what lies between.
pub(super) const WAIT_MAX: Duration = Duration::from_secs(5 * 60);

/// How long a client waits for a change if it does not say.
pub(super) const WAIT_DEFAULT: Duration = Duration::from_secs(30);

/// What stays as it is in a percent-encoded key: RFC 3986's unreserved characters, and the slash, because it stands
/// for itself in a path as in a query. The plus is escaped: other decoders take it for a space.
const ESCAPED_IN_KEYS: &AsciiSet = &NON_ALPHANUMERIC.remove(b'-').remove(b'.').remove(b'_').remove(b'~').remove(b'/');

/// The resource that a target names, decoded.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Resource<'a> {
    /// `/`: all keys.
    Keys,
    /// A key: any bytes but empty.
    Key(Cow<'a, [u8]>),
    /// What follows `/_/`.
    Node(Cow<'a, [u8]>),
}

/// Splits a request target, a path and perhaps a query, into its resource and the raw query, which is empty if there
/// is none.
///
/// # Errors
/// 400 for a `%` that is not followed by two hexadecimal digits.
pub(super) fn parse(target: &[u8]) -> Result<(Resource<'_>, &[u8]), Problem> {
    let (path, query) = split_once(target, b'?').unwrap_or((target, b""));
    let path = path.strip_prefix(b"/").unwrap_or(path);
    let key = percent_decode(path)
        .ok_or_else(|| Problem::bad_request("malformed percent-encoding in the path: write a literal '%' as '%25'"))?;
    let resource = if key.is_empty() {
        Resource::Keys
    } else if key.starts_with(NODE_PREFIX) {
        Resource::Node(match key {
            Cow::Borrowed(key) => Cow::Borrowed(&key[NODE_PREFIX.len()..]),
            Cow::Owned(mut key) => Cow::Owned(key.split_off(NODE_PREFIX.len())),
        })
    } else {
        Resource::Key(key)
    };
    Ok((resource, query))
}

fn split_once(bytes: &[u8], separator: u8) -> Option<(&[u8], &[u8])> {
    let at = bytes.iter().position(|byte| *byte == separator)?;
    Some((&bytes[..at], &bytes[at + 1..]))
}

/// Decodes once, and only what is well-formed; borrows what has nothing to decode.
fn percent_decode(bytes: &[u8]) -> Option<Cow<'_, [u8]>> {
    let Some(first) = bytes.iter().position(|byte| *byte == b'%') else {
        return Some(Cow::Borrowed(bytes));
    };
    let mut decoded = Vec::with_capacity(bytes.len());
    decoded.extend_from_slice(&bytes[..first]);
    let mut rest = &bytes[first..];
    while let Some((byte, behind)) = rest.split_first() {
        rest = behind;
        if *byte != b'%' {
            decoded.push(*byte);
            continue;
        }
        let ([high, low], behind) = rest.split_first_chunk()?;
        decoded.push(hex_digit(*high)? << 4 | hex_digit(*low)?);
        rest = behind;
    }
    Some(Cow::Owned(decoded))
}

fn hex_digit(digit: u8) -> Option<u8> {
    // `to_digit(16)` is below 16.
    char::from(digit).to_digit(16).map(|value| value as u8)
}

/// A key as it stands in JSON: appended to the node's URL and a slash, it names the key again.
pub(super) fn percent_encode_key(key: &[u8]) -> Cow<'_, str> {
    percent_encode(key, ESCAPED_IN_KEYS).into()
}

/// Reads an unsigned decimal number in its only form: digits, no sign, no leading zero.
pub(super) fn parse_decimal(digits: &[u8]) -> Option<u64> {
    let canonical = digits == b"0" || matches!(digits, [b'1'..=b'9', rest @ ..] if rest.iter().all(u8::is_ascii_digit));
    if !canonical {
        return None;
    }
    std::str::from_utf8(digits).ok()?.parse().ok()
}

/// How fresh a read must be.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum Consistency {
    /// Reflects every write that was answered before the read began.
    #[default]
    Linearizable,
    /// This node's own state, without asking anyone.
    Stale,
}

/// Names of query parameters, by the requests that take them.
pub(super) mod parameters {
    /// Requests without parameters.
    pub(crate) const NONE: &[&str] = &[];
    /// Reading a key.
    pub(crate) const KEY: &[&str] = &["consistency", "after-index", "timeout"];
    /// Reading the listing, or with `after-index` the changes.
    pub(crate) const KEYS: &[&str] = &["consistency", "prefix", "limit", "after", "values", "after-index", "timeout"];
    /// Adding or promoting a member.
    pub(crate) const MEMBER: &[&str] = &["role"];
}

/// The parameters of a request; what it does not give is at its default.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Query<'a> {
    /// `consistency`.
    pub(super) consistency: Consistency,
    /// `prefix`, decoded; empty matches every key.
    pub(super) prefix: Cow<'a, [u8]>,
    /// `limit`: how many items one page may have.
    pub(super) limit: Option<usize>,
    /// `after`: the key behind which the page begins; empty is before all keys.
    pub(super) after: Option<Cow<'a, [u8]>>,
    /// `values`: whether a listing has the values too.
    pub(super) values: Option<bool>,
    /// `after-index`: wait for a change after this index.
    pub(super) after_index: Option<u64>,
    /// `timeout`: how long to wait for that change.
    pub(super) timeout: Option<Duration>,
    /// `role`: whether the member votes.
    pub(super) voter: Option<bool>,
}

impl<'a> Query<'a> {
    /// Parses a raw query of a request that takes the parameters `allowed`, at most 8.
    ///
    /// # Errors
    /// 400, naming the parameter, for one that the request does not take, that is repeated or malformed, or that
    /// makes no sense with the others.
    pub(super) fn parse(raw: &'a [u8], allowed: &[&str]) -> Result<Self, Problem> {
        let mut query = Query::default();
        if raw.is_empty() {
            return Ok(query);
        }
        let mut seen = 0_u8;
        for parameter in raw.split(|byte| *byte == b'&') {
            let malformed = || {
                let text = String::from_utf8_lossy(parameter);
                Problem::bad_request(format!("malformed query parameter '{text}': expected name=value"))
            };
            let (name, value) = split_once(parameter, b'=').ok_or_else(malformed)?;
            let name = percent_decode(name).ok_or_else(malformed)?;
            let Some(position) = allowed.iter().position(|allowed| allowed.as_bytes() == &*name) else {
                return Err(unknown_parameter(&name, allowed));
            };
            let name = allowed[position];
            if seen & 1 << position != 0 {
                return Err(Problem::bad_request(format!("repeated query parameter '{name}'")));
            }
            seen |= 1 << position;
            let value = percent_decode(value).ok_or_else(malformed)?;
            query.set(name, value)?;
        }
        query.check_together()?;
        Ok(query)
    }

    fn set(&mut self, name: &str, value: Cow<'a, [u8]>) -> Result<(), Problem> {
        let (good, expected) = match name {
            "consistency" => {
                let stale = one_of(&value, b"stale", b"linearizable");
                if stale == Some(true) {
                    self.consistency = Consistency::Stale;
                }
                (stale.is_some(), "'linearizable' or 'stale'")
            }
            "prefix" => {
                self.prefix = value;
                return Ok(());
            }
            "limit" => {
                let limit = parse_decimal(&value).and_then(|limit| usize::try_from(limit).ok());
                self.limit = limit.filter(|limit| (1..=PAGE_ITEMS_MAX).contains(limit));
                (self.limit.is_some(), "a number from 1 to 1000")
            }
            "after" => {
                self.after = Some(value);
                return Ok(());
            }
            "values" => {
                self.values = one_of(&value, b"true", b"false");
                (self.values.is_some(), "'true' or 'false'")
            }
            "after-index" => {
                self.after_index = parse_decimal(&value);
                (self.after_index.is_some(), "a log index")
            }
            "timeout" => {
                let timeout = std::str::from_utf8(&value).ok().and_then(|text| parse_duration(text).ok());
                self.timeout = timeout.filter(|timeout| *timeout <= WAIT_MAX);
                (self.timeout.is_some(), "a duration like '500ms', '30s' or '5m', at most '5m'")
            }
            "role" => {
                self.voter = one_of(&value, b"voter", b"learner");
                (self.voter.is_some(), "'voter' or 'learner'")
            }
            _ => unreachable!("every parameter that a request takes is set here"),
        };
        if good {
            return Ok(());
        }
        let value = String::from_utf8_lossy(&value);
        Err(Problem::bad_request(format!("query parameter '{name}' is '{value}': expected {expected}")))
    }

    fn check_together(&self) -> Result<(), Problem> {
        let refuse = |name, why| Err(Problem::bad_request(format!("query parameter '{name}' {why}")));
        if self.after_index.is_none() {
            return match self.timeout {
                Some(_) => refuse("timeout", "goes with 'after-index' only"),
                None => Ok(()),
            };
        }
        if self.after.is_some() {
            return refuse("after", "does not go with 'after-index'");
        }
        if self.values.is_some() {
            return refuse("values", "does not go with 'after-index'");
        }
        Ok(())
    }
}

fn one_of(value: &[u8], yes: &[u8], no: &[u8]) -> Option<bool> {
    if value == yes { Some(true) } else { (value == no).then_some(false) }
}

fn unknown_parameter(name: &[u8], allowed: &[&str]) -> Problem {
    let name = String::from_utf8_lossy(name);
    Problem::bad_request(if allowed.is_empty() {
        format!("unknown query parameter '{name}': this request takes none")
    } else {
        format!("unknown query parameter '{name}': this request takes {}", allowed.join(", "))
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn key(bytes: &[u8]) -> Option<Resource<'static>> {
        Some(Resource::Key(Cow::Owned(bytes.to_vec())))
    }

    fn node(bytes: &[u8]) -> Option<Resource<'static>> {
        Some(Resource::Node(Cow::Owned(bytes.to_vec())))
    }

    #[test]
    fn targets_name_resources() {
        let cases: &[(&str, Option<Resource<'static>>)] = &[
            ("/", Some(Resource::Keys)),
            ("/a", key(b"a")),
            ("//", key(b"/")),
            ("//a//b/", key(b"/a//b/")),
            ("/./a/../b", key(b"./a/../b")),
            ("/%2e%2e/", key(b"../")),
            ("/a+b", key(b"a+b")),
            ("/%00%FF%ff", key(b"\x00\xff\xff")),
            ("/%2541", key(b"%41")),
            ("/a%3Fb", key(b"a?b")),
            ("/caf\u{e9}", key("caf\u{e9}".as_bytes())),
            ("/_", key(b"_")),
            ("/__/x", key(b"__/x")),
            ("//_/x", key(b"/_/x")),
            ("/_/status", node(b"status")),
            ("/%5F/x", node(b"x")),
            ("/_%2Fx", node(b"x")),
            ("/%5f%2f", node(b"")),
            ("/_/%zz", None),
            ("/%", None),
            ("/%4", None),
            ("/%zz", None),
            ("/%+1", None),
        ];
        for (target, expected) in cases {
            let parsed = parse(target.as_bytes()).ok().map(|(resource, _)| resource);
            assert_eq!(parsed, *expected, "{target}");
        }
    }

    #[test]
    fn the_query_begins_at_the_first_question_mark() {
        let query = |target| parse(target).expect("a good target").1;
        assert_eq!(query(b"/a"), b"");
        assert_eq!(query(b"/a?"), b"");
        assert_eq!(query(b"/a?b?c=d"), b"b?c=d");
    }

    #[test]
    fn queries_are_strict() {
        let parse = |raw: &'static str| Query::parse(raw.as_bytes(), parameters::KEYS);
        let query = parse("prefix=a%26+b&limit=7&after=%00&values=true&consistency=stale").expect("a good query");
        assert_eq!(&*query.prefix, b"a&+b");
        assert_eq!(query.limit, Some(7));
        assert_eq!(query.after.as_deref(), Some(&b"\x00"[..]));
        assert_eq!(query.values, Some(true));
        assert_eq!(query.consistency, Consistency::Stale);
        for good in ["", "prefix=", "after=", "limit=1", "limit=1000", "values=false", "consistency=linearizable"] {
            assert!(parse(good).is_ok(), "{good}");
        }
        for (text, millis) in [("500ms", 500), ("30s", 30_000), ("5m", 300_000), ("0s", 0)] {
            let raw = format!("after-index=0&timeout={text}");
            let query = Query::parse(raw.as_bytes(), parameters::KEY).expect("a good query");
            assert_eq!((query.after_index, query.timeout), (Some(0), Some(Duration::from_millis(millis))));
        }
        let bad = [
            ("x=1", "'x'"),
            ("role=voter", "'role'"),
            ("Prefix=a", "'Prefix'"),
            ("prefix", "'prefix'"),
            ("&", "''"),
            ("prefix=a&", "''"),
            ("prefix=%4", "'prefix=%4'"),
            ("prefix=a&prefix=a", "repeated query parameter 'prefix'"),
            ("limit=1&%6cimit=1", "repeated query parameter 'limit'"),
            ("limit=0", "'limit'"),
            ("limit=1001", "'limit'"),
            ("limit=-1", "'limit'"),
            ("limit=+1", "'limit'"),
            ("limit=01", "'limit'"),
            ("limit=", "'limit'"),
            ("limit=99999999999999999999", "'limit'"),
            ("values=1", "'values'"),
            ("values=True", "'values'"),
            ("consistency=strong", "'consistency'"),
            ("after-index=x", "'after-index'"),
            ("timeout=5s", "'timeout'"),
            ("after-index=1&values=true", "'values'"),
            ("after-index=1&after=a", "'after'"),
            ("after-index=1&timeout=5m1s", "'timeout'"),
            ("after-index=1&timeout=6m", "'timeout'"),
            ("after-index=1&timeout=300001ms", "'timeout'"),
            ("after-index=1&timeout=30", "'timeout'"),
            ("after-index=1&timeout=s", "'timeout'"),
            ("after-index=1&timeout=1.5s", "'timeout'"),
            ("after-index=1&timeout=18446744073709551615m", "'timeout'"),
        ];
        for (raw, named) in bad {
            let problem = parse(raw).expect_err(raw);
            assert_eq!(problem.status(), 400);
            assert!(problem.detail().contains(named), "{raw}: {}", problem.detail());
        }
    }

    proptest! {
        #[test]
        fn every_key_survives_its_encoding(key in prop::collection::vec(any::<u8>(), 1..40)) {
            let target = format!("/{}", percent_encode_key(&key));
            let decoded = match parse(target.as_bytes()).expect("a good target").0 {
                Resource::Keys => Vec::new(),
                Resource::Key(key) => key.into_owned(),
                Resource::Node(rest) => [NODE_PREFIX, &rest].concat(),
            };
            prop_assert_eq!(decoded, key);
        }

        #[test]
        fn no_target_and_no_query_panics(raw in prop::collection::vec(any::<u8>(), 0..40)) {
            let _ = parse(&raw);
            let _ = Query::parse(&raw, parameters::KEYS);
        }
    }
}
