//! What a server grants one connection and all of them together.

use std::time::Duration;

/// Connections open at once. Each costs a descriptor and 8 KiB, and one that needs a thread 16 to 30 KiB more.
pub const CONNECTIONS_MAX: usize = 4096;
/// Bytes of a request line: a key of 4 KiB with every byte percent-encoded, and room for a query.
pub const REQUEST_LINE_BYTES_MAX: usize = 16 * 1024;
/// Bytes of all header lines together: what common servers grant, twice.
pub const HEADER_BYTES_MAX: usize = 16 * 1024;
/// Header lines of a request. Also the size of the array on the connection's stack, so no setting exceeds it.
pub const HEADERS_MAX: usize = 100;
/// From the first byte of a head to its last: many times a slow mobile link's round trip.
pub const HEAD_TIMEOUT: Duration = Duration::from_secs(10);
/// For a body to begin and, with [`BYTES_PER_SECOND_MIN`], to end.
pub const BODY_TIMEOUT: Duration = Duration::from_secs(30);
/// Between two requests: longer than clients' pools keep a connection they do not use (15 s in ureq, 50 s in Envoy's
/// common setting), so that it is the client who closes and no request meets a closing connection.
pub const IDLE_TIMEOUT: Duration = Duration::from_secs(90);
/// For an answer to be taken, with [`BYTES_PER_SECOND_MIN`].
pub const WRITE_TIMEOUT: Duration = Duration::from_secs(30);
/// Below this pace a body or an answer of known size is given up: its deadline grows by one second per so many bytes.
pub const BYTES_PER_SECOND_MIN: u64 = 64 * 1024;
/// Stack of a connection thread. Heads and header slots take 4 KiB of it; the rest is the service's.
pub const STACK_BYTES: usize = 256 * 1024;
/// Bytes of a refused body that are read and thrown away so that the client, which often reads nothing before it has
/// sent everything, sees the refusal and not a reset.
pub const DRAIN_BYTES_MAX: u64 = 16 * 1024 * 1024;
/// How long that may take.
pub const DRAIN_TIMEOUT: Duration = Duration::from_secs(2);

/// A body longer than this keeps a thread busy for a while anyway.
pub const GATHERED_BYTES_MAX: u64 = 64 << 10;

/// The limits of one server. [`Limits::default`] suits a port that strangers reach.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Connections open at once; further ones get 503 and are closed.
    pub connections: usize,
    /// Bytes of a request line; a longer one gets 414.
    pub request_line_bytes: usize,
    /// Bytes of all header lines together; more get 431.
    pub header_bytes: usize,
    /// Header lines; more get 431. Values above 100 mean 100.
    pub headers: usize,
    /// From the first byte of a head to its last, however steadily it trickles; then 408.
    pub head_timeout: Duration,
    /// For a buffered body to arrive whole, plus one second per 64 KiB of it; then 408. For a streamed body the
    /// longest silence, after which the reader gets `TimedOut`.
    pub body_timeout: Duration,
    /// Bytes of a body that an event loop waits for; a request with a longer one moves to a thread as soon as its head is
    /// here, which may refuse it without waiting.
    pub gathered_bytes: u64,
    /// How long a connection may stay open without a byte of a request; then it is closed.
    pub idle_timeout: Duration,
    /// How long a client may take nothing of its answer, and, plus one second per 64 KiB, for the whole of it; then the
    /// connection is closed.
    pub write_timeout: Duration,
    /// Stack of each connection thread in bytes.
    pub stack_bytes: usize,
    /// Bytes of an unread body that are read and dropped after an early answer, before the connection is closed or
    /// used again.
    pub drain_bytes: u64,
    /// How long that may take.
    pub drain_timeout: Duration,
}

impl Default for Limits {
    fn default() -> Limits {
        Limits {
            connections: CONNECTIONS_MAX,
            request_line_bytes: REQUEST_LINE_BYTES_MAX,
            header_bytes: HEADER_BYTES_MAX,
            headers: HEADERS_MAX,
            head_timeout: HEAD_TIMEOUT,
            body_timeout: BODY_TIMEOUT,
            gathered_bytes: GATHERED_BYTES_MAX,
            idle_timeout: IDLE_TIMEOUT,
            write_timeout: WRITE_TIMEOUT,
            stack_bytes: STACK_BYTES,
            drain_bytes: DRAIN_BYTES_MAX,
            drain_timeout: DRAIN_TIMEOUT,
        }
    }
}

/// `timeout`, and the time that `bytes` take at the slowest pace a server bears.
pub(super) fn allowance(timeout: Duration, bytes: u64) -> Duration {
    timeout.saturating_add(Duration::from_secs(bytes / BYTES_PER_SECOND_MIN))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn allowance_grows_with_size_and_never_overflows() {
        assert_eq!(allowance(Duration::from_secs(30), 128), Duration::from_secs(30));
        assert_eq!(allowance(Duration::from_secs(30), 1024 * 1024), Duration::from_secs(46));
        assert!(allowance(Duration::MAX, u64::MAX) == Duration::MAX);
    }
}
