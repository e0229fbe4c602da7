//! What arrives on a connection, however it is cut: heads that are accepted are unambiguous, and every request ends
//! where a simple reading of HTTP/1.1 says.

use raftexample::http::{Limits, OfflineConnection, Taking, read_head};

use crate::choices::{Choices, Pieces};

/// Requests of one connection that are looked at.
const REQUESTS_MAX: usize = 8;

const BODY_BYTES_MAX: usize = 300;

/// One request as it was understood; a status where its body was refused.
type Request = (Head, Result<Vec<u8>, u16>);

#[derive(Clone, Debug, PartialEq, Eq)]
struct Head {
    method: String,
    target: Vec<u8>,
    content_length: Option<u64>,
    fields: Vec<(String, Vec<u8>)>,
}

/// How a connection ended: behind the last byte, in the middle of a head, or with a refusal.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum End {
    Silence,
    Refused,
    BadBody,
    Enough,
}

pub fn run(input: &[u8]) {
    let mut choices = Choices::new(input);
    let limits = match choices.below(3) {
        0 => Limits { request_line_bytes: 40, header_bytes: 80, headers: 3, ..Limits::default() },
        _ => Limits::default(),
    };
    let piece = 1 + choices.below(40);
    let stream = choices.rest();
    let (requests, taken, end) = receive(stream, stream.len().max(1), &limits, Taking::Whole(BODY_BYTES_MAX));
    check(stream, &requests, taken, end, &limits);

    let (cut, cut_taken, cut_end) = receive(stream, piece, &limits, Taking::Whole(BODY_BYTES_MAX));
    assert_eq!((&cut, cut_end), (&requests, end), "in pieces of {piece}");
    if end != End::BadBody {
        assert_eq!(cut_taken, taken, "in pieces of {piece}");
    }
    // As a stream a body has no limit, and one that is skipped ends where it would have ended if it had been read.
    let (streamed, streamed_taken, streamed_end) = receive(stream, 64, &limits, Taking::Pieces(piece));
    let (skipped, skipped_taken, skipped_end) = receive(stream, piece, &limits, Taking::Skipped);
    assert_eq!((streamed.len(), streamed_end), (skipped.len(), skipped_end));
    if streamed_end != End::BadBody {
        assert_eq!(streamed_taken, skipped_taken);
    }
    for ((whole, pieces), skipped) in requests.iter().zip(&streamed).zip(&skipped) {
        assert_eq!((&whole.0, &whole.0), (&pieces.0, &skipped.0));
        match &whole.1 {
            Ok(body) => assert!(pieces.1.as_ref() == Ok(body) && skipped.1.is_ok()),
            Err(413) => {}
            Err(_) => assert!(pieces.1.is_err() && skipped.1.is_err(), "{whole:?} is a body as a stream"),
        }
    }
}

fn receive(stream: &[u8], piece: usize, limits: &Limits, taking: Taking) -> (Vec<Request>, usize, End) {
    let mut connection = OfflineConnection::new(Pieces { stream, piece });
    let mut requests = Vec::new();
    let mut taken = 0;
    while requests.len() < REQUESTS_MAX {
        let next = connection.next(limits, taking, |head, body| {
            let fields = head.headers().map(|(name, value)| (name.to_owned(), value.to_vec())).collect();
            let (method, target) = (head.method().as_str().to_owned(), head.target().to_vec());
            (Head { method, target, content_length: head.content_length(), fields }, body)
        });
        match next {
            Ok(None) => return (requests, taken, End::Silence),
            Err(_) => return (requests, taken, End::Refused),
            Ok(Some((head, body))) => {
                taken = connection.taken();
                let failed = body.is_err();
                requests.push((head, body.map_err(|status| status.0)));
                if failed {
                    return (requests, taken, End::BadBody);
                }
            }
        }
    }
    (requests, taken, End::Enough)
}

/// Reads the same once more, simply.
fn check(stream: &[u8], requests: &[Request], taken: usize, end: End, limits: &Limits) {
    let mut rest = stream;
    for (head, body) in requests {
        let length = check_head(rest, head, limits);
        let behind = &rest[length..];
        let expected = match head.content_length {
            Some(length) if length > BODY_BYTES_MAX as u64 => Err(413),
            Some(length) if length > behind.len() as u64 => Err(400),
            Some(length) => Ok((behind[..length as usize].to_vec(), length as usize)),
            None => chunks(behind),
        };
        match (body, expected) {
            (Ok(body), Ok((expected, length))) => {
                assert_eq!(body.escape_ascii().to_string(), expected.escape_ascii().to_string());
                rest = &behind[length..];
            }
            // Which of two faults is seen first is open.
            (Err(400 | 413), Err(_)) => return,
            (body, expected) => panic!("the body is {body:?}, and should be {expected:?}"),
        }
    }
    assert_eq!(stream.len() - rest.len(), taken, "where the requests end");
    if end == End::Silence {
        assert!(
            !rest.strip_prefix(b"\r\n").unwrap_or(rest).windows(4).any(|bytes| bytes == b"\r\n\r\n"),
            "a head is left"
        );
    }
}

/// What must be true of a head that was accepted, whoever reads it; its length.
fn check_head(stream: &[u8], head: &Head, limits: &Limits) -> usize {
    let start = if stream.starts_with(b"\r\n") { 2 } else { 0 };
    let end = stream[start..].windows(4).position(|bytes| bytes == b"\r\n\r\n").expect("an end") + start + 4;
    let text = &stream[start..end - 4];
    assert!(!text.contains(&0), "{}", text.escape_ascii());
    let ends = text.iter().filter(|byte| matches!(byte, b'\r' | b'\n')).count();
    let lines: Vec<&[u8]> = lines(text);
    assert_eq!(ends, 2 * (lines.len() - 1), "a bare CR or LF in {}", text.escape_ascii());
    let (line, fields) = lines.split_first().expect("a request line");
    assert!(line.len() <= limits.request_line_bytes && lines.len() - 1 <= limits.headers);
    assert!(fields.iter().map(|line| line.len() + 2).sum::<usize>() + 2 <= limits.header_bytes);
    let parts: Vec<&[u8]> = line.split(|byte| *byte == b' ').collect();
    let [method, target, version] = parts[..] else { panic!("the line {} was accepted", line.escape_ascii()) };
    assert!(version == b"HTTP/1.1" || version == b"HTTP/1.0");
    assert_eq!(method, head.method.as_bytes());
    assert!(
        target.ends_with(&head.target) || head.target.starts_with(b"/?") || head.target == b"/" || {
            head.target.starts_with(b"/#")
        }
    );
    assert!(head.target.starts_with(b"/") || (head.target == b"*" && head.method == "OPTIONS"));
    let mut told: Vec<(String, Vec<u8>)> = Vec::new();
    for field in fields {
        let colon = field.iter().position(|byte| *byte == b':').expect("a colon");
        let name = &field[..colon];
        assert!(!name.is_empty() && name.iter().all(u8::is_ascii_graphic), "the name {}", name.escape_ascii());
        let value = field[colon + 1..].trim_ascii();
        told.push((String::from_utf8_lossy(name).to_ascii_lowercase(), value.to_vec()));
    }
    let seen: Vec<_> =
        head.fields.iter().map(|(name, value)| (name.to_ascii_lowercase(), value.trim_ascii().to_vec())).collect();
    assert_eq!(seen, told);
    let values =
        |name: &str| told.iter().filter(|(other, _)| other == name).map(|(_, value)| value).collect::<Vec<_>>();
    assert!(values("host").len() + usize::from(version == b"HTTP/1.0") >= 1 && values("host").len() <= 1);
    match (&values("content-length")[..], &values("transfer-encoding")[..]) {
        ([], []) => assert_eq!(head.content_length, Some(0)),
        ([length], []) => {
            let length = std::str::from_utf8(length).expect("digits");
            assert!(!length.is_empty() && length.bytes().all(|byte| byte.is_ascii_digit()));
            assert_eq!(head.content_length, Some(length.parse().unwrap_or(u64::MAX)));
        }
        ([], [coding]) => {
            assert!(coding.eq_ignore_ascii_case(b"chunked") && version == b"HTTP/1.1");
            assert_eq!(head.content_length, None);
        }
        both => panic!("the framing {both:?} was accepted"),
    }
    let read = read_head(stream, limits, |head, end| (head.target().to_vec(), end));
    assert_eq!(read, Ok(Some((head.target.clone(), end))));
    end
}

fn lines(text: &[u8]) -> Vec<&[u8]> {
    let mut lines = Vec::new();
    let mut rest = text;
    while let Some(at) = rest.windows(2).position(|bytes| bytes == b"\r\n") {
        lines.push(&rest[..at]);
        rest = &rest[at + 2..];
    }
    lines.push(rest);
    lines
}

/// A body in chunks, and its length with all that frames it; or the status of its refusal.
fn chunks(stream: &[u8]) -> Result<(Vec<u8>, usize), u16> {
    let mut body = Vec::new();
    let mut rest = stream;
    loop {
        let line = take_line(&mut rest, 256)?;
        let digits = line.iter().take_while(|byte| byte.is_ascii_hexdigit()).count();
        let (size, extension) = (std::str::from_utf8(&line[..digits]).map_err(|_| 400_u16)?, &line[digits..]);
        let size = if digits <= 16 { u64::from_str_radix(size, 16).map_err(|_| 400_u16)? } else { return Err(400) };
        let named = extension.is_empty() || extension.trim_ascii_start().starts_with(b";");
        if !named || extension.iter().any(|byte| byte.is_ascii_control() && *byte != b'\t') {
            return Err(400);
        }
        if size == 0 {
            break;
        }
        let data = usize::try_from(size).ok().and_then(|size| rest.split_at_checked(size));
        let Some((data, behind)) = data else { return Err(400) };
        body.extend_from_slice(data);
        rest = behind.strip_prefix(b"\r\n").ok_or(400_u16)?;
    }
    let mut room = 4096;
    loop {
        let line = take_line(&mut rest, room)?;
        if line.is_empty() {
            break;
        }
        let clean = line.iter().all(|byte| !byte.is_ascii_control() || *byte == b'\t');
        if !clean || line.iter().position(|byte| *byte == b':').is_none_or(|colon| colon == 0) {
            return Err(400);
        }
        room -= line.len();
    }
    if body.len() > BODY_BYTES_MAX { Err(413) } else { Ok((body, stream.len() - rest.len())) }
}

fn take_line<'a>(rest: &mut &'a [u8], bytes_max: usize) -> Result<&'a [u8], u16> {
    let end = rest.iter().position(|byte| *byte == b'\n').ok_or(400_u16)?;
    let line = rest[..end].strip_suffix(b"\r").ok_or(400_u16)?;
    *rest = &rest[end + 1..];
    if line.len() > bytes_max { Err(400) } else { Ok(line) }
}
