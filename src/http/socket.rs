//! One connection's bytes: a socket with deadlines, and the buffer that its input arrives in.

use std::io::{self, ErrorKind, IoSlice, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::time::{Duration, Instant};

use super::limits::allowance;

/// Input buffer of a connection. Grows for a head that needs more and shrinks again behind it.
pub(super) const INPUT_BYTES: usize = 8 * 1024;

/// How long a read may take.
#[derive(Clone, Copy, Debug)]
pub(super) enum Patience {
    /// So long from the read's beginning: a limit on silence.
    For(Duration),
    /// Up to a point in time, however many reads there are until then: a limit on slowness.
    Until(Instant),
}

/// A blocking socket whose reads and writes end. The kernel's timeouts are set only when they change, so the usual
/// request costs one read and one write and nothing else.
#[derive(Debug)]
pub(super) struct Socket<'a> {
    stream: &'a TcpStream,
    read_timeout: Option<Duration>,
    write_timeout: Option<Duration>,
}

impl<'a> Socket<'a> {
    pub(super) fn new(stream: &'a TcpStream) -> Socket<'a> {
        Socket { stream, read_timeout: None, write_timeout: None }
    }

    pub(super) fn stream(&self) -> &'a TcpStream {
        self.stream
    }

    /// See [`Source::read`].
    fn read_some(&mut self, buffer: &mut [u8], patience: Patience) -> io::Result<usize> {
        let timeout = coarse(left(patience)?);
        if self.read_timeout != Some(timeout) {
            self.stream.set_read_timeout(Some(timeout))?;
            self.read_timeout = Some(timeout);
        }
        loop {
            match self.stream.read(buffer) {
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Err(ErrorKind::TimedOut.into()),
                result => return result,
            }
        }
    }

    /// Writes `head` and `tail` completely, in one system call if the kernel takes all.
    ///
    /// # Errors
    /// `TimedOut` if the client takes nothing for `timeout`, or not all within that and the time that so many bytes are
    /// allowed; else what the socket says.
    pub(super) fn write(&mut self, head: &[u8], tail: &[u8], timeout: Duration) -> io::Result<()> {
        let mut slices = [IoSlice::new(head), IoSlice::new(tail)];
        let mut unwritten = &mut slices[..];
        let mut patience = Patience::For(timeout);
        let mut bytes = head.len() + tail.len();
        while bytes > 0 {
            let written = self.write_some(unwritten, patience)?;
            bytes -= written;
            IoSlice::advance_slices(&mut unwritten, written);
            // Only a client that does not take all at once costs a look at the clock.
            if let (Patience::For(_), true) = (patience, bytes > 0) {
                patience = Patience::Until(Instant::now() + allowance(timeout, bytes as u64));
            }
        }
        Ok(())
    }

    fn write_some(&mut self, slices: &[IoSlice<'_>], patience: Patience) -> io::Result<usize> {
        let timeout = coarse(left(patience)?);
        if self.write_timeout != Some(timeout) {
            self.stream.set_write_timeout(Some(timeout))?;
            self.write_timeout = Some(timeout);
        }
        loop {
            let result = match slices {
                [only] => self.stream.write(only),
                [head, tail] if tail.is_empty() => self.stream.write(head),
                all => self.stream.write_vectored(all),
            };
            match result {
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Err(ErrorKind::TimedOut.into()),
                Ok(0) => return Err(ErrorKind::WriteZero.into()),
                result => return result,
            }
        }
    }

    /// Tells the client that nothing more will come.
    pub(super) fn finish(&self) {
        // A connection that is gone already is finished too.
        let _ = self.stream.shutdown(Shutdown::Write);
    }
}

/// Where the bytes of a connection come from: its socket, or without a connection whatever stands in for one.
pub(super) trait Source {
    /// Reads what is there, waiting for the first byte. `Ok(0)` is the client's end, or ours if this server stops.
    ///
    /// # Errors
    /// `TimedOut` when patience ends; else what the socket says.
    fn read(&mut self, buffer: &mut [u8], patience: Patience) -> io::Result<usize>;
}

impl Source for Socket<'_> {
    fn read(&mut self, buffer: &mut [u8], patience: Patience) -> io::Result<usize> {
        self.read_some(buffer, patience)
    }
}

/// The time left.
fn left(patience: Patience) -> io::Result<Duration> {
    match patience {
        Patience::For(duration) => Ok(duration),
        Patience::Until(deadline) => {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() { Err(ErrorKind::TimedOut.into()) } else { Ok(left) }
        }
    }
}

/// `timeout` rounded up, to the second or below one to 10 ms, so that the reads of one body rarely change the kernel's
/// setting. A deadline is passed by no more than that, since it is looked at again before each read.
fn coarse(timeout: Duration) -> Duration {
    let step: u128 = if timeout >= Duration::from_secs(1) { 1_000 } else { 10 };
    let rounded = timeout.as_micros().div_ceil(step * 1_000).max(1) * step;
    // The kernel counts in jiffies in a long: a year is as good as for ever.
    Duration::from_millis(u64::try_from(rounded).unwrap_or(u64::MAX)).min(Duration::from_secs(365 * 24 * 3600))
}

/// What arrived on a connection and has not been used yet.
#[derive(Debug)]
pub(super) struct Input {
    bytes: Vec<u8>,
    start: usize,
    end: usize,
}

impl Input {
    pub(super) fn new() -> Input {
        Input { bytes: vec![0; INPUT_BYTES], start: 0, end: 0 }
    }

    /// What is there, unused.
    pub(super) fn unread(&self) -> &[u8] {
        &self.bytes[self.start..self.end]
    }

    pub(super) fn is_empty(&self) -> bool {
        self.start == self.end
    }

    /// Uses up the first `length` bytes and lends them until more is read.
    pub(super) fn take(&mut self, length: usize) -> &[u8] {
        let taken = self.start..self.start + length;
        self.start = taken.end;
        &self.bytes[taken]
    }

    /// Forgets everything that is there, and gives back what a large head needed.
    pub(super) fn clear(&mut self) {
        self.start = 0;
        self.end = 0;
        if self.bytes.len() != INPUT_BYTES {
            self.bytes = vec![0; INPUT_BYTES];
        }
    }

    /// No bytes, and no room for any yet.
    pub(super) fn empty() -> Input {
        Input { bytes: Vec::new(), start: 0, end: 0 }
    }

    /// Reads more, once. The buffer grows if it is nearly full: how far, the caller limits by what it leaves unused.
    ///
    /// # Errors
    /// As [`Source::read`].
    pub(super) fn fill(&mut self, source: &mut impl Source, patience: Patience) -> io::Result<usize> {
        self.fill_with(|buffer| source.read(buffer, patience))
    }

    /// The same with a read of the caller's.
    pub(super) fn fill_with(&mut self, read: impl FnOnce(&mut [u8]) -> io::Result<usize>) -> io::Result<usize> {
        if self.is_empty() {
            self.clear();
        } else if self.bytes.len() - self.end < self.bytes.len() / 4 {
            self.make_room();
        }
        let read = read(&mut self.bytes[self.end..])?;
        self.end += read;
        Ok(read)
    }

    fn make_room(&mut self) {
        self.bytes.copy_within(self.start..self.end, 0);
        self.end -= self.start;
        self.start = 0;
        if self.bytes.len() - self.end < self.bytes.len() / 4 {
            self.bytes.resize(self.bytes.len() * 2, 0);
        }
    }
}
