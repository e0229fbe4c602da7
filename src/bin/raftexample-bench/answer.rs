//! Reads as much of an answer as a load generator needs: the status, and where the answer ends.

/// No server of interest sends more than this before a body.
const HEAD_BYTES_MAX: usize = 64 << 10;

/// More fields than any server of interest sends.
const HEADERS_MAX: usize = 64;

/// The size of a chunk in hexadecimal, with extensions, or one trailer.
const CHUNK_LINE_BYTES_MAX: usize = 4 << 10;

/// What is known of a complete answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Answer {
    /// The status, 200 to 999.
    pub(crate) status: u16,
    /// Whether the server takes another request on this connection.
    pub(crate) keep_alive: bool,
}

/// What came is no answer to the request, or goes on after its end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Malformed;

/// Takes the bytes of one answer, in pieces of any size.
#[derive(Debug, Default)]
pub(crate) struct AnswerReader {
    state: State,
    /// What has come of a head, or of a line between chunks, that is not complete.
    partial: Vec<u8>,
    /// From the head.
    answer: Option<Answer>,
}

#[derive(Clone, Copy, Debug, Default)]
enum State {
    #[default]
    Head,
    /// So many bytes of body are still to come.
    Body(usize),
    /// The line with a chunk's size.
    ChunkSize,
    /// So many bytes of a chunk and of its line end are still to come.
    Chunk(usize),
    /// Lines after the last chunk, up to an empty one.
    Trailers,
}

impl AnswerReader {
    /// Takes what was read. Some: the answer is complete, and the reader ready for the next one.
    ///
    /// # Errors
    /// [`Malformed`], and then the connection cannot be used any more.
    pub(crate) fn read(&mut self, mut bytes: &[u8]) -> Result<Option<Answer>, Malformed> {
        loop {
            match self.state {
                State::Head => {
                    let Some(rest) = self.read_head(bytes)? else { return Ok(None) };
                    bytes = rest;
                }
                State::Body(left) | State::Chunk(left) => {
                    let taken = left.min(bytes.len());
                    bytes = &bytes[taken..];
                    match (self.state, left - taken) {
                        (State::Body(_), 0) => return self.finish(bytes),
                        (State::Body(_), left) => self.state = State::Body(left),
                        (_, 0) => self.state = State::ChunkSize,
                        (_, left) => self.state = State::Chunk(left),
                    }
                    if taken < left {
                        return Ok(None);
                    }
                }
                State::ChunkSize | State::Trailers => {
                    let Some(rest) = self.read_line(bytes)? else { return Ok(None) };
                    bytes = rest;
                    match self.state {
                        State::ChunkSize => self.state = after_chunk_size(&self.partial)?,
                        _ if self.partial == b"\r\n" => return self.finish(bytes),
                        _ => {}
                    }
                    self.partial.clear();
                }
            }
        }
    }

    /// Reads a head; None: it is not complete.
    fn read_head<'b>(&mut self, bytes: &'b [u8]) -> Result<Option<&'b [u8]>, Malformed> {
        let before = self.partial.len();
        // A head nearly always comes whole, and is then read where it is.
        let parsed = if before == 0 {
            parse_head(bytes)?
        } else {
            self.partial.extend_from_slice(bytes);
            parse_head(&self.partial)?
        };
        let Some(head) = parsed else {
            if before == 0 {
                self.partial.extend_from_slice(bytes);
            }
            return if self.partial.len() > HEAD_BYTES_MAX { Err(Malformed) } else { Ok(None) };
        };
        self.partial.clear();
        self.state = head.body;
        self.answer = head.answer;
        // What came before was not a whole head, so this one ends in the new bytes.
        Ok(Some(&bytes[head.bytes - before..]))
    }

    /// Gathers a line, its end included, in `partial`; None: it is not complete.
    fn read_line<'b>(&mut self, bytes: &'b [u8]) -> Result<Option<&'b [u8]>, Malformed> {
        let end = bytes.iter().position(|byte| *byte == b'\n').map(|at| at + 1);
        let (line, rest) = bytes.split_at(end.unwrap_or(bytes.len()));
        self.partial.extend_from_slice(line);
        if self.partial.len() > CHUNK_LINE_BYTES_MAX {
            return Err(Malformed);
        }
        Ok(end.map(|_| rest))
    }

    fn finish(&mut self, rest: &[u8]) -> Result<Option<Answer>, Malformed> {
        // One request is under way at a time, so there is nothing that more bytes could answer.
        if !rest.is_empty() {
            return Err(Malformed);
        }
        self.state = State::Head;
        self.partial.clear();
        self.answer.take().map(Some).ok_or(Malformed)
    }
}

struct Head {
    /// How long it is.
    bytes: usize,
    /// What follows.
    body: State,
    /// None for an interim answer, which another head follows.
    answer: Option<Answer>,
}

fn parse_head(bytes: &[u8]) -> Result<Option<Head>, Malformed> {
    let mut headers = [httparse::EMPTY_HEADER; HEADERS_MAX];
    let mut response = httparse::Response::new(&mut headers);
    let length = match response.parse(bytes) {
        Ok(httparse::Status::Complete(length)) => length,
        Ok(httparse::Status::Partial) => return Ok(None),
        Err(_) => return Err(Malformed),
    };
    let status = response.code.ok_or(Malformed)?;
    if status < 200 {
        return Ok(Some(Head { bytes: length, body: State::Head, answer: None }));
    }
    let mut keep_alive = response.version == Some(1);
    let mut body_bytes = None;
    let mut chunked = false;
    for header in &*response.headers {
        if header.name.eq_ignore_ascii_case("content-length") {
            body_bytes = Some(parse_number(header.value, 10).ok_or(Malformed)?);
        } else if header.name.eq_ignore_ascii_case("transfer-encoding") {
            chunked = header.value.eq_ignore_ascii_case(b"chunked");
        } else if header.name.eq_ignore_ascii_case("connection") {
            keep_alive = header.value.eq_ignore_ascii_case(b"keep-alive")
                || keep_alive && !header.value.eq_ignore_ascii_case(b"close");
        }
    }
    let body = match body_bytes {
        _ if status == 204 || status == 304 => State::Body(0),
        _ if chunked => State::ChunkSize,
        Some(bytes) => State::Body(bytes),
        // It would end with the connection. No server under test does that.
        None => return Err(Malformed),
    };
    Ok(Some(Head { bytes: length, body, answer: Some(Answer { status, keep_alive }) }))
}

fn after_chunk_size(line: &[u8]) -> Result<State, Malformed> {
    let size = line.split(|byte| matches!(byte, b';' | b'\r' | b'\n')).next().unwrap_or_default();
    match parse_number(size.trim_ascii(), 16).ok_or(Malformed)? {
        0 => Ok(State::Trailers),
        bytes => bytes.checked_add(b"\r\n".len()).map(State::Chunk).ok_or(Malformed),
    }
}

fn parse_number(text: &[u8], radix: u32) -> Option<usize> {
    // The standard parser would take a sign.
    if !text.iter().all(u8::is_ascii_hexdigit) {
        return None;
    }
    usize::from_str_radix(std::str::from_utf8(text).ok()?, radix).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    const OK: Answer = Answer { status: 200, keep_alive: true };

    const ANSWERS: &[(&str, Answer)] = &[
        ("HTTP/1.1 204 No Content\r\nETag: \"7\"\r\n\r\n", Answer { status: 204, keep_alive: true }),
        ("HTTP/1.1 200 OK\r\ncontent-LENGTH: 5\r\n\r\nhello", OK),
        ("HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n", OK),
        ("HTTP/1.1 200\r\nContent-Length: 1\r\nConnection: close\r\n\r\nx", Answer { status: 200, keep_alive: false }),
        ("HTTP/1.0 200 OK\r\nContent-Length: 1\r\n\r\nx", Answer { status: 200, keep_alive: false }),
        ("HTTP/1.0 200 OK\r\nContent-Length: 1\r\nConnection: keep-alive\r\n\r\nx", OK),
        ("HTTP/1.1 304 Not Modified\r\nContent-Length: 9\r\n\r\n", Answer { status: 304, keep_alive: true }),
        ("HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok", OK),
        ("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nA;x=y\r\n0123456789\r\n1\r\n.\r\n0\r\nT: v\r\n\r\n", OK),
        ("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", OK),
        ("HTTP/1.1 503 Service Unavailable\r\nContent-Length: 2\r\n\r\n{}", Answer { status: 503, keep_alive: true }),
    ];

    #[test]
    fn whole_answers() {
        let mut reader = AnswerReader::default();
        for (text, answer) in ANSWERS {
            assert_eq!(reader.read(text.as_bytes()), Ok(Some(*answer)), "{text}");
        }
    }

    #[test]
    fn answers_in_pieces_of_every_size() {
        let mut reader = AnswerReader::default();
        for piece_bytes in 1..40 {
            for (text, answer) in ANSWERS {
                let mut pieces = text.as_bytes().chunks(piece_bytes).peekable();
                while let Some(piece) = pieces.next() {
                    let expected = if pieces.peek().is_none() { Some(*answer) } else { None };
                    assert_eq!(reader.read(piece), Ok(expected), "{text} in pieces of {piece_bytes}");
                }
            }
        }
    }

    #[test]
    fn what_is_no_answer() {
        for text in [
            "SSH-2.0-x\r\n\r\n",
            "HTTP/1.1 200 OK\r\n\r\n",
            "HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\n",
            "HTTP/1.1 200 OK\r\nContent-Length: 99999999999999999999\r\n\r\n",
            "HTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\nxy",
            "HTTP/1.1 204 No Content\r\n\r\nx",
            "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nx\r\n",
            "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nffffffffffffffff\r\n",
        ] {
            assert_eq!(AnswerReader::default().read(text.as_bytes()), Err(Malformed), "{text}");
        }
        let endless = format!("HTTP/1.1 200 OK\r\nX: {}", "x".repeat(HEAD_BYTES_MAX));
        assert_eq!(AnswerReader::default().read(endless.as_bytes()), Err(Malformed));
    }
}
