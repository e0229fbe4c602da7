//! Faults of a request that the connection loop finds by itself.

use tiny_http::StatusCode;

/// Why a request is refused before any service saw it, or while its body was read. Its connection is always closed
/// afterwards: behind a request that was not understood nobody knows where the next one begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Fault {
    pub(super) status: StatusCode,
    pub(super) detail: &'static str,
}

impl Fault {
    pub(super) const fn new(status: u16, detail: &'static str) -> Fault {
        Fault { status: StatusCode(status), detail }
    }

    pub(super) const fn bad_request(detail: &'static str) -> Fault {
        Fault::new(400, detail)
    }
}
