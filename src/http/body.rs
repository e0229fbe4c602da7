//! Request bodies: of a declared length or in chunks, whole or as they arrive.

use std::borrow::Cow;
use std::io::{self, ErrorKind, Read};

use super::fault::Fault;
use super::head::Framing;
use super::socket::{INPUT_BYTES, Input, Patience, Source};

/// First allocation for a body of declared length: a client that only claims to send much gets no more than this.
const FIRST_BODY_BYTES: usize = 64 * 1024;
/// First allocation for a body in chunks, which seldom is large.
const FIRST_CHUNKS_BYTES: usize = 4 * 1024;
/// A chunk's size line with its extensions, which nobody uses.
const CHUNK_LINE_BYTES_MAX: usize = 256;
/// All trailer lines together. They are read and dropped.
const TRAILER_BYTES_MAX: usize = 4096;

/// Where in a body its reader is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Position {
    /// In a body of known length, with so many bytes to come.
    Length(u64),
    /// Before the size line of a chunk.
    ChunkSize,
    /// In a chunk's data, with so many bytes to come.
    ChunkData(u64),
    /// Before the line break behind a chunk's data.
    ChunkEnd,
    /// Behind the last chunk, with room for so many bytes of trailers.
    Trailers(usize),
    /// Behind the body.
    End,
    /// Nowhere: a read failed, and what follows in the input must not be taken for anything.
    Lost,
}

/// Reads one request's body and leaves what follows it for the next request.
#[derive(Debug)]
pub(super) struct BodyReader<'c, S> {
    input: &'c mut Input,
    socket: &'c mut S,
    position: Position,
    patience: Patience,
}

impl<'c, S: Source> BodyReader<'c, S> {
    pub(super) fn new(
        input: &'c mut Input,
        socket: &'c mut S,
        framing: Framing,
        patience: Patience,
    ) -> BodyReader<'c, S> {
        let position = match framing {
            Framing::Length(0) => Position::End,
            Framing::Length(bytes) => Position::Length(bytes),
            Framing::Chunked => Position::ChunkSize,
        };
        BodyReader { input, socket, position, patience }
    }

    /// Whether the body has been read to its end, so that the next request begins here.
    pub(super) fn is_at_end(&self) -> bool {
        self.position == Position::End
    }

    /// Reads the whole body. One that is there already is lent, not copied.
    ///
    /// # Errors
    /// The fault to answer: 413 if it has more than `bytes_max` bytes, 408 if patience ended, 400 if it broke off or
    /// its chunks are malformed.
    pub(super) fn read_whole(mut self, bytes_max: usize) -> Result<Cow<'c, [u8]>, Fault> {
        let Position::Length(length) = self.position else { return self.gather(bytes_max).map(Cow::Owned) };
        let length = usize::try_from(length).ok().filter(|length| *length <= bytes_max).ok_or(TOO_LARGE)?;
        if length <= self.input.unread().len() {
            return Ok(Cow::Borrowed(self.input.take(length)));
        }
        self.gather(length).map(Cow::Owned)
    }

    /// Reads to the end into memory that grows with what arrives, up to `bytes_max`.
    fn gather(&mut self, bytes_max: usize) -> Result<Vec<u8>, Fault> {
        let (first, room) = match self.position {
            Position::Length(_) => (FIRST_BODY_BYTES, bytes_max),
            // One byte more than allowed shows that there is more.
            _ => (FIRST_CHUNKS_BYTES, bytes_max.saturating_add(1)),
        };
        let mut body = Vec::new();
        let mut filled = 0;
        while !self.is_at_end() {
            if filled == body.len() {
                let grown = filled.saturating_mul(2).max(first).min(room);
                body.reserve_exact(grown - filled);
                body.resize(grown, 0);
            }
            filled += self.read(&mut body[filled..]).map_err(|error| fault_of(&error))?;
            if filled > bytes_max {
                return Err(TOO_LARGE);
            }
        }
        body.truncate(filled);
        body.shrink_to_fit();
        Ok(body)
    }

    /// Reads and drops what is left of the body. True if the next request begins here.
    pub(super) fn skip(&mut self) -> bool {
        let mut scratch = [0; 4096];
        loop {
            match self.read(&mut scratch) {
                Ok(0) => return self.is_at_end(),
                Ok(_) => {}
                Err(_) => return false,
            }
        }
    }

    /// Reads data of which `left` bytes are to come: from the input first, and past it if the caller's buffer is no
    /// smaller.
    fn data(&mut self, buffer: &mut [u8], left: u64) -> io::Result<usize> {
        let wanted = usize::try_from(left).unwrap_or(usize::MAX).min(buffer.len());
        if self.input.is_empty() {
            if wanted >= INPUT_BYTES {
                return at_least_one(self.socket.read(&mut buffer[..wanted], self.patience)?);
            }
            at_least_one(self.input.fill(self.socket, self.patience)?)?;
        }
        let read = wanted.min(self.input.unread().len());
        buffer[..read].copy_from_slice(self.input.take(read));
        Ok(read)
    }

    fn read_some(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        loop {
            match self.position {
                Position::End => return Ok(0),
                Position::Lost => return Err(malformed("an earlier read of this body failed")),
                _ if buffer.is_empty() => return Ok(0),
                Position::Length(left) => {
                    let read = self.data(buffer, left)?;
                    let left = left - read as u64;
                    self.position = if left == 0 { Position::End } else { Position::Length(left) };
                    return Ok(read);
                }
                Position::ChunkData(left) => {
                    let read = self.data(buffer, left)?;
                    let left = left - read as u64;
                    self.position = if left == 0 { Position::ChunkEnd } else { Position::ChunkData(left) };
                    return Ok(read);
                }
                Position::ChunkEnd => {
                    self.line(0, |_| Ok(()))?;
                    self.position = Position::ChunkSize;
                }
                Position::ChunkSize => {
                    let size = self.line(CHUNK_LINE_BYTES_MAX, chunk_size)?;
                    self.position =
                        if size == 0 { Position::Trailers(TRAILER_BYTES_MAX) } else { Position::ChunkData(size) };
                }
                Position::Trailers(room) => {
                    let length = self.line(room, trailer)?;
                    self.position = if length == 0 { Position::End } else { Position::Trailers(room - length) };
                }
            }
        }
    }

    /// Takes a line of at most `bytes_max` bytes and gives it to `parse` without its CR LF.
    fn line<T>(&mut self, bytes_max: usize, parse: impl FnOnce(&[u8]) -> io::Result<T>) -> io::Result<T> {
        let mut scanned = 0;
        loop {
            let unread = self.input.unread();
            if let Some(offset) = unread[scanned..].iter().position(|byte| *byte == b'\n') {
                let line = self.input.take(scanned + offset + 1);
                let line = line.strip_suffix(b"\r\n").ok_or_else(|| malformed("a line does not end in CR LF"))?;
                return if line.len() > bytes_max { Err(malformed("a line is too long")) } else { parse(line) };
            }
            scanned = unread.len();
            // The CR may be here already.
            if scanned > bytes_max + 1 {
                return Err(malformed("a line is too long"));
            }
            at_least_one(self.input.fill(self.socket, self.patience)?)?;
        }
    }
}

impl<S: Source> Read for BodyReader<'_, S> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.read_some(buffer).inspect_err(|_| self.position = Position::Lost)
    }
}

/// The size at the head of a chunk: hexadecimal digits, then perhaps an extension, which is ignored.
fn chunk_size(line: &[u8]) -> io::Result<u64> {
    // Sixteen digits fill a u64.
    const DIGITS_MAX: usize = 16;
    let digits = line.iter().take_while(|byte| byte.is_ascii_hexdigit()).count();
    let (digits, rest) = line.split_at(digits);
    let extension = rest.trim_ascii_start();
    if digits.is_empty() || digits.len() > DIGITS_MAX || !(rest.is_empty() || extension.starts_with(b";")) {
        return Err(malformed("a chunk size is malformed"));
    }
    if rest.iter().any(|byte| byte.is_ascii_control() && *byte != b'\t') {
        return Err(malformed("a chunk extension is malformed"));
    }
    let append = |size: u64, digit: &u8| size << 4 | u64::from(char::from(*digit).to_digit(16).unwrap_or(0));
    Ok(digits.iter().fold(0, append))
}

/// Checks a trailer line and returns its length.
fn trailer(line: &[u8]) -> io::Result<usize> {
    let valid = line.iter().all(|byte| !byte.is_ascii_control() || *byte == b'\t');
    let named = line.iter().position(|byte| *byte == b':').is_some_and(|colon| colon > 0);
    if valid && (named || line.is_empty()) { Ok(line.len()) } else { Err(malformed("a trailer is malformed")) }
}

/// Refuses the end of input where a byte must come.
fn at_least_one(read: usize) -> io::Result<usize> {
    if read == 0 { Err(ErrorKind::UnexpectedEof.into()) } else { Ok(read) }
}

fn malformed(detail: &'static str) -> io::Error {
    io::Error::new(ErrorKind::InvalidData, detail)
}

const TOO_LARGE: Fault = Fault::new(413, "the body is too large");
/// The client ended before its request did.
pub(super) const BROKEN_OFF: Fault = Fault::bad_request("the body broke off");

/// What the client is told about a body that could not be read. To one that is gone it is told in vain.
fn fault_of(error: &io::Error) -> Fault {
    match error.kind() {
        ErrorKind::TimedOut => Fault::new(408, "the body did not arrive in time"),
        ErrorKind::InvalidData => Fault::bad_request("the chunked body is malformed"),
        _ => BROKEN_OFF,
    }
}

#[cfg(test)]
mod tests {
    use super::super::socket::Socket;
    use super::*;
    use proptest::prelude::*;
    use std::io::Write;
    use std::net::{TcpListener, TcpStream};
    use std::time::Duration;

    /// Lets `bytes` arrive, split at `split`, and the client close behind them; reads them as a body.
    fn receive(bytes: &[u8], split: usize, framing: Framing, bytes_max: usize) -> (Result<Vec<u8>, u16>, Vec<u8>) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let mut client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (server, _) = listener.accept().unwrap();
        let mut socket = Socket::new(&server);
        let mut input = Input::new();
        if split > 0 {
            client.write_all(&bytes[..split]).unwrap();
            input.fill(&mut socket, Patience::For(Duration::from_secs(10))).unwrap();
        }
        client.write_all(&bytes[split..]).unwrap();
        drop(client);
        let reader = BodyReader::new(&mut input, &mut socket, framing, Patience::For(Duration::from_secs(10)));
        let body = reader.read_whole(bytes_max).map(Cow::into_owned).map_err(|fault| fault.status.0);
        let mut rest = input.unread().to_vec();
        (&server).read_to_end(&mut rest).unwrap();
        (body, rest)
    }

    fn chunked(bytes: &[u8]) -> Result<Vec<u8>, u16> {
        receive(bytes, 0, Framing::Chunked, 100).0
    }

    #[test]
    fn bodies_end_where_they_say_wherever_they_are_split() {
        let length: &[u8] = b"hello worldGET /next";
        let chunks: &[u8] = b"5\r\nhello\r\n006;x=\"y\"\r\n world\r\n0\r\nTrailer: z\r\n\r\nGET /next";
        for (bytes, framing) in [(length, Framing::Length(11)), (chunks, Framing::Chunked)] {
            for split in 0..=bytes.len() {
                let (body, rest) = receive(bytes, split, framing, 11);
                assert_eq!(body.unwrap(), b"hello world", "split at {split}");
                assert_eq!(rest, b"GET /next", "split at {split}");
            }
        }
    }

    #[test]
    fn bodies_that_break_off_are_refused() {
        let chunks = b"5\r\nhello\r\n0\r\nA: b\r\n\r\n";
        for length in 0..chunks.len() {
            assert_eq!(chunked(&chunks[..length]), Err(400), "{length} bytes");
        }
        assert_eq!(receive(b"hell", 0, Framing::Length(5), 5).0, Err(400));
        assert_eq!(receive(b"hell", 4, Framing::Length(5), 5).0, Err(400));
    }

    #[test]
    fn sizes_are_limited_to_the_byte() {
        assert_eq!(receive(b"hello", 0, Framing::Length(5), 4).0, Err(413));
        assert_eq!(receive(b"", 0, Framing::Length(u64::MAX), usize::MAX - 1).0, Err(413));
        assert_eq!(receive(b"5\r\nhello\r\n0\r\n\r\n", 0, Framing::Chunked, 4).0, Err(413));
        assert_eq!(receive(b"5\r\nhello\r\n0\r\n\r\n", 0, Framing::Chunked, 5).0, Ok(b"hello".to_vec()));
        assert_eq!(receive(b"ffffffffffffffff\r\nhello", 0, Framing::Chunked, 4).0, Err(413));
        let large = vec![7; 300_000];
        assert_eq!(receive(&large, 1000, Framing::Length(300_000), 300_000).0.unwrap(), large);
        let mut chunks = format!("{:x}\r\n", large.len()).into_bytes();
        chunks.extend_from_slice(&large);
        chunks.extend_from_slice(b"\r\n0\r\n\r\n");
        assert_eq!(receive(&chunks, 1000, Framing::Chunked, 300_000).0.unwrap(), large);
    }

    #[test]
    fn malformed_chunks_are_refused() {
        let long_extension = format!("5;{}\r\nhello\r\n0\r\n\r\n", "x".repeat(300));
        let endless_extension = format!("5;{}", "x".repeat(100_000));
        let long_trailers = format!("0\r\n{}\r\n", "A: b\r\n".repeat(2000));
        let malformed: &[&str] = &[
            "\r\n\r\n",
            ";x\r\nhello\r\n0\r\n\r\n",
            "g\r\n\r\n",
            "-5\r\nhello\r\n0\r\n\r\n",
            "+5\r\nhello\r\n0\r\n\r\n",
            "0x5\r\nhello\r\n0\r\n\r\n",
            " 5\r\nhello\r\n0\r\n\r\n",
            "5 5\r\nhello\r\n0\r\n\r\n",
            "5\nhello\r\n0\r\n\r\n",
            "5\r\nhello\n0\r\n\r\n",
            "5\r\nhello0\r\n\r\n",
            "5\r\nhelloo\r\n0\r\n\r\n",
            "5;a\nb\r\nhello\r\n0\r\n\r\n",
            "5;a\0b\r\nhello\r\n0\r\n\r\n",
            "5;a\rb\r\nhello\r\n0\r\n\r\n",
            "10000000000000000\r\n",
            "0\r\nno trailer\r\n\r\n",
            "0\r\n: b\r\n\r\n",
            "0\r\nA: \0\r\n\r\n",
            "0\r\nA: b\n\r\n",
            &long_extension,
            &endless_extension,
            &long_trailers,
        ];
        for chunks in malformed {
            assert_eq!(chunked(chunks.as_bytes()), Err(400), "{}", chunks.escape_debug());
        }
    }

    #[test]
    fn a_failed_body_stays_failed() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let mut client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (server, _) = listener.accept().unwrap();
        client.write_all(b"x\r\n5\r\nhello\r\n0\r\n\r\n").unwrap();
        let (mut socket, mut input) = (Socket::new(&server), Input::new());
        let patience = Patience::For(Duration::from_secs(10));
        let mut reader = BodyReader::new(&mut input, &mut socket, Framing::Chunked, patience);
        let mut buffer = [0; 16];
        assert_eq!(reader.read(&mut buffer).unwrap_err().kind(), ErrorKind::InvalidData);
        assert_eq!(reader.read(&mut buffer).unwrap_err().kind(), ErrorKind::InvalidData);
        assert!(!reader.is_at_end());
    }

    proptest! {
        #[test]
        fn chunk_sizes_are_hexadecimal_or_refused(line in "[0-9a-fA-F; \tx\0]{0,20}") {
            if let Ok(size) = chunk_size(line.as_bytes()) {
                let digits: String = line.chars().take_while(char::is_ascii_hexdigit).collect();
                prop_assert_eq!(u64::from_str_radix(&digits, 16), Ok(size));
            }
        }

        #[test]
        fn random_lines_never_panic(line in proptest::collection::vec(any::<u8>(), 0..40)) {
            let _ = chunk_size(&line);
            let _ = trailer(&line);
        }
    }
}
