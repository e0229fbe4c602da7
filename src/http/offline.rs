//! Requests out of bytes alone, read as a connection reads them: for tests that have no time for sockets.

use std::borrow::Cow;
use std::io::{self, Read};
use std::mem::MaybeUninit;
use std::time::Duration;

use tiny_http::StatusCode;

use super::body::BodyReader;
use super::head::{Head, HeadScan, HeaderSlots};
use super::limits::{HEADERS_MAX, Limits};
use super::socket::{Input, Patience, Source};

/// Nothing here waits.
const PATIENCE: Patience = Patience::For(Duration::MAX);

/// How a request's body is taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Taking {
    /// Whole, at most so many bytes.
    Whole(usize),
    /// In pieces of at most so many bytes, as a stream.
    Pieces(usize),
    /// Not at all: it is read and dropped.
    Skipped,
}

/// A connection whose bytes come from a reader, in the pieces in which that gives them.
#[derive(Debug)]
pub struct OfflineConnection<R> {
    source: Counted<R>,
    input: Input,
}

#[derive(Debug)]
struct Counted<R> {
    reader: R,
    bytes: usize,
}

impl<R: Read> Source for Counted<R> {
    fn read(&mut self, buffer: &mut [u8], _patience: Patience) -> io::Result<usize> {
        let read = self.reader.read(buffer)?;
        self.bytes += read;
        Ok(read)
    }
}

impl<R: Read> OfflineConnection<R> {
    /// Nothing of `reader` is read yet.
    pub fn new(reader: R) -> OfflineConnection<R> {
        OfflineConnection { source: Counted { reader, bytes: 0 }, input: Input::new() }
    }

    /// How many bytes the requests so far have taken.
    pub fn taken(&self) -> usize {
        self.source.bytes - self.input.unread().len()
    }

    /// Reads the next request: what `look` makes of its head, and of its body or the status of its refusal. `None` if
    /// the bytes end before the head does.
    ///
    /// # Errors
    /// The status that a head is refused with.
    pub fn next<T>(
        &mut self,
        limits: &Limits,
        taking: Taking,
        look: impl FnOnce(&Head<'_>, Result<Vec<u8>, StatusCode>) -> T,
    ) -> Result<Option<T>, StatusCode> {
        let mut scan = HeadScan::default();
        let span = loop {
            if let Some(span) = scan.advance(self.input.unread(), limits).map_err(|fault| fault.status)? {
                break span;
            }
            match self.input.fill(&mut self.source, PATIENCE) {
                Ok(0) | Err(_) => return Ok(None),
                Ok(_) => {}
            }
        };
        let head = self.input.take(span.end)[span.start..].to_vec();
        let mut slots: HeaderSlots<'_> = [const { MaybeUninit::uninit() }; HEADERS_MAX];
        let slots = &mut slots[..limits.headers.min(HEADERS_MAX)];
        let head = Head::parse(&head, slots).map_err(|fault| fault.status)?;
        let mut reader = BodyReader::new(&mut self.input, &mut self.source, head.framing(), PATIENCE);
        let body = match taking {
            Taking::Whole(bytes_max) => reader.read_whole(bytes_max).map(Cow::into_owned).map_err(|fault| fault.status),
            Taking::Pieces(bytes) => read_pieces(&mut reader, bytes),
            Taking::Skipped => match reader.skip() {
                true => Ok(Vec::new()),
                false => Err(StatusCode(400)),
            },
        };
        Ok(Some(look(&head, body)))
    }
}

fn read_pieces(reader: &mut BodyReader<'_, impl Source>, bytes: usize) -> Result<Vec<u8>, StatusCode> {
    let mut body = Vec::new();
    let mut piece = vec![0; bytes];
    loop {
        match reader.read(&mut piece) {
            Ok(0) if reader.is_at_end() => return Ok(body),
            Ok(read) => body.extend_from_slice(&piece[..read]),
            Err(_) => return Err(StatusCode(400)),
        }
    }
}
