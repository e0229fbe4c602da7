//! What a server asks of those who answer its requests.

use std::borrow::Cow;
use std::io::Read;
use std::net::SocketAddr;

use tiny_http::StatusCode;

use super::head::Head;
use super::response::Response;

/// Answers the requests of a server. One value serves all connections at once; what belongs to one connection lives in
/// its session. A panic in any of these ends the connection's thread and is not caught: what the process makes of it
/// is decided by its panic hook.
pub trait Service: Send + Sync + 'static {
    /// State of one connection, made anew for each and kept from request to request: reusable buffers, reply channels.
    type Session: Send;

    /// Begins a session, on the connection's own thread.
    fn session(&self, peer: SocketAddr) -> Self::Session;

    /// Decides about a request's body before any of it is read. Asked once per request, without a body too.
    fn admit(&self, session: &mut Self::Session, head: &Head<'_>) -> Admission;

    /// Answers an admitted request. May block as long as the service likes: the connection's thread is its own.
    fn answer(&self, session: &mut Self::Session, head: &Head<'_>, body: Body<'_>) -> Response;

    /// Words the refusal of what the server itself finds at fault: 400, 408, 413, 414, 417, 431, 501, 503, 505. The
    /// connection is closed behind it. `detail` is a sentence without its capital and period. A 503 without
    /// `Retry-After` gets one of a second.
    fn fault(&self, status: StatusCode, detail: &str) -> Response;
}

/// What becomes of a request's body.
pub enum Admission {
    /// Read it whole, at most so many bytes (a longer one gets 413), then answer.
    Buffer(usize),
    /// Answer at once and read it meanwhile, piece by piece.
    Stream,
    /// Leave it unread; this is the answer.
    Answer(Response),
}

/// A request's body as [`Service::answer`] gets it.
pub enum Body<'a> {
    /// The whole body: borrowed where it arrived together with its head, owned where it had to be gathered. Empty if
    /// the request has none.
    Buffered(Cow<'a, [u8]>),
    /// The body as it arrives. A read blocks until there is at least one byte and returns what is there, `Ok(0)` behind
    /// the last. Errors are `TimedOut` after a silence of `body_timeout`, `UnexpectedEof` if the client closed or this
    /// server stops, `InvalidData` for malformed chunks, and what the socket says. What is left unread costs the
    /// client its connection.
    Stream(&'a mut dyn Read),
}
