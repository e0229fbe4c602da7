//! Conditional requests (RFC 9110 section 13) and the `Idempotency-Key`.
//!
//! A key's entity tag is the log index of its last write in quotes, and is always a strong one. Conditions of writes
//! travel in the command and are decided when it is applied; those of reads are decided here. `If-Modified-Since`,
//! `If-Unmodified-Since`, `Range` and `If-Range` are ignored, as RFC 9110 allows: there is no modification date
//! (13.1.3, 13.1.4), and a server may ignore `Range` (14.2), without which `If-Range` means nothing.

use crate::command::{Condition, Tags};

use super::problem::Problem;
use super::target::parse_decimal;

/// The most entity tags that one field may list: many more than a cache has versions of one key, and a condition
/// stays small beside its key and value.
const TAGS_MAX: usize = 100;

/// The longest `Idempotency-Key` in characters: room for any UUID or hash in any notation.
const IDEMPOTENCY_KEY_CHARS_MAX: usize = 128;

/// What a read has to answer in place of the key's value.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Unmet {
    /// 304: the client has this value already.
    NotModified,
    /// 412: the client wants another one.
    Failed,
}

/// How tags are compared (RFC 9110 section 8.8.3.2). As ours are strong, only the client's can be weak.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Comparison {
    /// A weak tag matches nothing.
    Strong,
    /// A weak tag matches like a strong one.
    Weak,
}

/// Parses the lines of `If-Match` and of `If-None-Match`.
///
/// # Errors
/// 400 for a field that is not `*` or a list of entity tags.
pub(super) fn parse_condition<'a>(
    if_match: impl Iterator<Item = &'a [u8]>,
    if_none_match: impl Iterator<Item = &'a [u8]>,
) -> Result<Condition, Problem> {
    let malformed = |field, why| Problem::bad_request(format!("malformed {field}: {why}"));
    Ok(Condition {
        if_match: parse_tags(if_match, Comparison::Strong).map_err(|why| malformed("If-Match", why))?,
        if_none_match: parse_tags(if_none_match, Comparison::Weak).map_err(|why| malformed("If-None-Match", why))?,
    })
}

/// Reads the lines of one field as one list, and keeps the tags that a key could have.
///
/// An empty field is refused although RFC 9110's lists may be empty: it comes from a script whose variable was unset,
/// and would make an unconditional write of one that was meant to be guarded.
fn parse_tags<'a>(lines: impl Iterator<Item = &'a [u8]>, comparison: Comparison) -> Result<Option<Tags>, &'static str> {
    let mut present = false;
    let mut any = false;
    let mut elements = 0;
    let mut tags = Vec::new();
    for line in lines {
        present = true;
        let mut rest = trim_start(line);
        while let Some(first) = rest.first() {
            rest = match first {
                b',' => &rest[1..],
                b'*' => {
                    any = true;
                    elements += 1;
                    end_of_element(&rest[1..])?
                }
                _ => {
                    let (tag, behind) = parse_tag(rest, comparison)?;
                    tags.extend(tag);
                    elements += 1;
                    end_of_element(behind)?
                }
            };
            rest = trim_start(rest);
        }
    }
    match elements {
        0 if present => Err("it lists no entity tag"),
        0 => Ok(None),
        1 if any => Ok(Some(Tags::Any)),
        _ if any => Err("'*' stands alone"),
        1..=TAGS_MAX => Ok(Some(Tags::List(tags))),
        _ => Err("it lists more than 100 entity tags"),
    }
}

/// Takes one entity tag off the front; the tag is `None` if no key could match it.
fn parse_tag(bytes: &[u8], comparison: Comparison) -> Result<(Option<u64>, &[u8]), &'static str> {
    const MALFORMED: &str = "expected '*' or a list of quoted entity tags";
    let strong = bytes.strip_prefix(b"W/");
    let weak = strong.is_some();
    let opaque = strong.unwrap_or(bytes).strip_prefix(b"\"").ok_or(MALFORMED)?;
    let end = opaque.iter().position(|byte| *byte == b'"').ok_or(MALFORMED)?;
    let (opaque, behind) = (&opaque[..end], &opaque[end + 1..]);
    if !opaque.iter().all(|byte| matches!(byte, 0x21..=0x7e | 0x80..)) {
        return Err(MALFORMED);
    }
    let comparable = !(weak && comparison == Comparison::Strong);
    // Index 0 is before all entries.
    let tag = parse_decimal(opaque).filter(|index| comparable && *index > 0);
    Ok((tag, behind))
}

/// Behind an element comes a comma or nothing.
fn end_of_element(bytes: &[u8]) -> Result<&[u8], &'static str> {
    let rest = trim_start(bytes);
    if matches!(rest.first(), None | Some(b',')) { Ok(rest) } else { Err("expected a comma between entity tags") }
}

fn trim_start(bytes: &[u8]) -> &[u8] {
    let blanks = bytes.iter().take_while(|byte| matches!(byte, b' ' | b'\t')).count();
    &bytes[blanks..]
}

/// Decides a read of a key whose tag is `current`.
///
/// Asked for keys that exist only: without conditions an absent key is a 404, and then they do not count (RFC 9110
/// section 13.2.1).
pub(super) fn check_read(condition: &Condition, current: u64) -> Result<(), Unmet> {
    let matches = |tags: &Tags| match tags {
        Tags::Any => true,
        Tags::List(tags) => tags.contains(&current),
    };
    if condition.if_match.as_ref().is_some_and(|tags| !matches(tags)) {
        return Err(Unmet::Failed);
    }
    if condition.if_none_match.as_ref().is_some_and(matches) {
        return Err(Unmet::NotModified);
    }
    Ok(())
}

/// Reads the client's own name for a write from the lines of `Idempotency-Key`, taken literally: quotes are part of it.
///
/// # Errors
/// 400 if it is repeated, empty, too long, or not visible ASCII.
pub(super) fn parse_idempotency_key<'a>(
    mut lines: impl Iterator<Item = &'a [u8]>,
) -> Result<Option<&'a [u8]>, Problem> {
    let Some(name) = lines.next() else {
        return Ok(None);
    };
    if lines.next().is_some() {
        return Err(Problem::bad_request("repeated Idempotency-Key"));
    }
    let good = (1..=IDEMPOTENCY_KEY_CHARS_MAX).contains(&name.len()) && name.iter().all(u8::is_ascii_graphic);
    if good {
        Ok(Some(name))
    } else {
        Err(Problem::bad_request("malformed Idempotency-Key: expected 1 to 128 visible ASCII characters"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tags(lines: &[&str], comparison: Comparison) -> Result<Option<Tags>, &'static str> {
        parse_tags(lines.iter().map(|line| line.as_bytes()), comparison)
    }

    #[test]
    fn tags_are_read_as_http_says() {
        let cases: &[(&[&str], Option<Tags>)] = &[
            (&[], None),
            (&["*"], Some(Tags::Any)),
            (&[" * ,"], Some(Tags::Any)),
            (&["\"7\""], Some(Tags::List(vec![7]))),
            (&["\"7\",\"8\" , ,\t\"9\","], Some(Tags::List(vec![7, 8, 9]))),
            (&["\"7\"", "\"8\""], Some(Tags::List(vec![7, 8]))),
            (&["\"07\", \"x\", \"\", \"0\", \"-1\", \"a,b\", \"18446744073709551616\""], Some(Tags::List(vec![]))),
            (&["\"18446744073709551615\""], Some(Tags::List(vec![u64::MAX]))),
        ];
        for (lines, expected) in cases {
            for comparison in [Comparison::Strong, Comparison::Weak] {
                assert_eq!(tags(lines, comparison).as_ref(), Ok(expected), "{lines:?}");
            }
        }
        assert_eq!(tags(&["W/\"7\", \"8\""], Comparison::Strong), Ok(Some(Tags::List(vec![8]))));
        assert_eq!(tags(&["W/\"7\", \"8\""], Comparison::Weak), Ok(Some(Tags::List(vec![7, 8]))));
    }

    #[test]
    fn malformed_tags_are_refused() {
        let many = vec!["\"1\""; TAGS_MAX + 1].join(",");
        let cases: &[&[&str]] = &[
            &[""],
            &[","],
            &["7"],
            &["\"7"],
            &["7\""],
            &["\"7\"8"],
            &["\"7\" \"8\""],
            &["'7'"],
            &["w/\"7\""],
            &["W/7"],
            &["W/"],
            &["\"7 8\""],
            &["*, \"7\""],
            &["*", "*"],
            &["**"],
            &["*\"7\""],
            &[&many],
        ];
        for lines in cases {
            assert!(tags(lines, Comparison::Weak).is_err(), "{lines:?}");
        }
    }

    #[test]
    fn reads_are_decided_in_the_order_of_rfc_9110() {
        let list = |tags: &[u64]| Some(Tags::List(tags.to_vec()));
        let cases = [
            (None, None, Ok(())),
            (list(&[7]), None, Ok(())),
            (list(&[8, 7]), None, Ok(())),
            (list(&[8]), None, Err(Unmet::Failed)),
            (list(&[]), None, Err(Unmet::Failed)),
            (Some(Tags::Any), None, Ok(())),
            (None, list(&[7]), Err(Unmet::NotModified)),
            (None, list(&[8]), Ok(())),
            (None, list(&[]), Ok(())),
            (None, Some(Tags::Any), Err(Unmet::NotModified)),
            (list(&[8]), list(&[7]), Err(Unmet::Failed)),
            (list(&[7]), list(&[7]), Err(Unmet::NotModified)),
        ];
        for (if_match, if_none_match, expected) in cases {
            let condition = Condition { if_match, if_none_match };
            assert_eq!(check_read(&condition, 7), expected, "{condition:?}");
        }
    }

    #[test]
    fn idempotency_keys_are_visible_ascii() {
        let parse = |lines: &[&'static str]| parse_idempotency_key(lines.iter().map(|line| line.as_bytes()));
        assert_eq!(parse(&[]).expect("none"), None);
        for good in ["a", "\"8e03978e-40d5-43dd-bc93-6894a57f9324\"", "!~"] {
            assert_eq!(parse(&[good]).expect(good), Some(good.as_bytes()));
        }
        let long: &'static str = "x".repeat(128).leak();
        assert_eq!(parse(&[long]).expect("the longest"), Some(long.as_bytes()));
        let too_long: &'static str = "x".repeat(129).leak();
        for bad in [&[""][..], &["a b"], &["caf\u{e9}"], &["a", "a"], &["a\tb"], &[too_long]] {
            assert_eq!(parse(bad).expect_err("refused").status(), 400, "{bad:?}");
        }
    }
}
