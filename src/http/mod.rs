//! The HTTP/1.1 server behind the client port and the peer port.
//!
//! An event loop for many connections, or a named thread for each, on `std::net`; heads parsed by `httparse`; and the
//! vocabulary of `tiny_http` (`Method`, `StatusCode`, `Header`, `HTTPVersion`, `Response`) in what a [`Service`] sees and
//! returns. Its connection loop is not used: it has no limits on connections, heads, bodies or time, and it leaves
//! connections unserved when they arrive faster than its threads wake.
//!
//! ```text
//! Listener::bind -> serve -> accept thread
//!   -> event loop, for all connections: read a request -> Service::begin -> wait for replies -> Service::finish -> write
//!         | a request that may take long, or is odd
//!         v
//!      one thread for the connection, and from the start where there is no event loop:
//!         read a head -> Service::admit -> read the body (or not) -> Service::answer -> one write
//! ```
//!
//! What is bounded, and by what, stands in [`Limits`]. A connection reads nothing while a request of it is being
//! answered, so a client that pipelines is held back by TCP and its memory here stays one buffer.
//!
//! A request whose framing is doubtful is refused and its connection closed, never guessed at: two servers that guess
//! differently about where a request ends are how requests are smuggled.

pub mod limits;
mod fault;
mod head;
mod service;
mod response;
mod socket;
mod body;
mod registry;
mod mailbox;
mod connection;
mod event_loop;
mod server;
mod offline;

pub use head::{Head, read_head};
pub use limits::Limits;
pub use mailbox::{Caller, EventLoop, Mailbox};
#[doc(hidden)]
pub use offline::{OfflineConnection, Taking};
pub use response::{Payload, Response, respond};
pub use server::{Connections, Handle, Listener, Stopped};
pub use service::{Admission, Begun, Body, Service};
pub use tiny_http::{HTTPVersion, Header, Method, StatusCode};
