//! What a server asks of those who answer its requests.

use std::borrow::Cow;
use std::io::Read;
use std::net::SocketAddr;
use std::time::Instant;

use tiny_http::StatusCode;

use super::head::Head;
use super::mailbox::Caller;
use super::response::Response;

/// Answers the requests of a server. One value serves all connections at once; what belongs to one connection lives in
/// its session. A panic in any of these ends the thread that called, of one connection or of an event loop, and is not
/// caught: what the process makes of it is decided by its panic hook.
pub trait Service: Send + Sync + 'static {
    /// State of one connection, made anew for each and kept from request to request: reusable buffers, reply channels.
    type Session: Send;

    /// What an event loop gathers from the requests of one pass, to be handed over in one piece. Of no use to a service
    /// that is served by threads only, as are the next two.
    type Turn: Default + Send;
    /// What is kept of a request of an event loop that waits for its answer.
    type Pending: Send;
    /// What comes back for such a request, by its [`Caller`].
    type Reply: Send;

    /// Begins a session, on the connection's own thread.
    fn session(&self, peer: SocketAddr) -> Self::Session;

    /// Decides about a request's body before any of it is read. Asked once per request, without a body too.
    fn admit(&self, session: &mut Self::Session, head: &Head<'_>) -> Admission;

    /// Answers an admitted request, on a thread. May block as long as the service likes: the thread is the
    /// connection's own.
    fn answer(&self, session: &mut Self::Session, head: &Head<'_>, body: Body<'_>) -> Response;

    /// Begins to answer a request on an event loop, without waiting for anything: what it takes long to answer belongs
    /// to a thread. `body` is whole; `now` is when the pass began. The same request in [`Service::answer`] must get the
    /// same answer.
    fn begin(
        &self,
        turn: &mut Self::Turn,
        head: &Head<'_>,
        body: &[u8],
        caller: Caller<Self::Reply>,
        now: Instant,
    ) -> Begun<Self::Pending>;

    /// Hands over what the requests of a pass have put into `turn`, and empties it. Does not wait.
    fn submit(&self, turn: &mut Self::Turn);

    /// Ends what [`Service::begin`] began, in a pass that began at `now`. `None`: no reply came until the time it had
    /// named.
    fn finish(&self, pending: Self::Pending, reply: Option<Self::Reply>, now: Instant) -> Response;

    /// Words the refusal of what the server itself finds at fault: 400, 408, 413, 414, 417, 431, 501, 503, 505. The
    /// connection is closed behind it. `detail` is a sentence without its capital and period. A 503 without
    /// `Retry-After` gets one of a second.
    fn fault(&self, status: StatusCode, detail: &str) -> Response;
}

/// What became of a request on an event loop.
pub enum Begun<P> {
    /// This is the answer.
    Answered(Response),
    /// The answer will be made of this and of the reply; if none has come until then, of this alone.
    Waits(P, Instant),
    /// It may have to wait: it is for [`Service::answer`], on a thread. Nothing was done about it.
    ForThread,
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
