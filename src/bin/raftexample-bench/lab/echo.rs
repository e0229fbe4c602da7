//! What HTTP alone costs: this crate's connection loop, answering every request with the same bytes.

use std::convert::Infallible;
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use clap::Args;
use raftexample::http::{
    Admission, Begun, Body, Caller, EventLoop, Head, Header, Limits, Listener, Payload, Response, Service, StatusCode,
    respond,
};
use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::iterator::Signals;

use crate::request::value;

/// Bodies that are taken: more than any value of a measurement.
const BODY_BYTES_MAX: usize = 1 << 20;

/// How long answers under way may take at the end.
const STOP_TIMEOUT: Duration = Duration::from_secs(1);

#[derive(Clone, Debug, Args)]
pub(crate) struct EchoCli {
    /// The port, on the loopback address
    #[arg(long)]
    port: u16,

    /// How large the body of each answer is
    #[arg(long, default_value = "128")]
    value_bytes: usize,
}

/// Serves until SIGTERM or SIGINT.
///
/// # Errors
/// One line.
pub(crate) fn run(cli: &EchoCli) -> Result<(), String> {
    let address = SocketAddr::from((Ipv4Addr::LOCALHOST, cli.port));
    let failed = |error: std::io::Error| format!("failed to serve {address}: {error}");
    let mut signals = Signals::new([SIGINT, SIGTERM]).map_err(failed)?;
    let listener = Listener::bind(address).map_err(failed)?;
    let service = Echo { body: Bytes::from(value(cli.value_bytes)), headers: headers()? };
    let limits = Limits::default();
    let event_loop = EventLoop::new(limits.connections).map_err(failed)?;
    let handle = listener.serve_in_loops(Arc::new(service), limits, "http", vec![event_loop]).map_err(failed)?;
    signals.forever().next();
    handle.stop(STOP_TIMEOUT);
    Ok(())
}

/// Those of a node's answer to a GET.
fn headers() -> Result<Vec<Header>, String> {
    let fields = [
        ("Content-Type", "application/octet-stream"),
        ("ETag", "\"1000000\""),
        ("Raftexample-Index", "1000000"),
        ("Cache-Control", "no-cache"),
    ];
    let header = |(name, text): (&str, &str)| {
        Header::from_bytes(name, text).map_err(|()| format!("{name}: {text} is no header"))
    };
    fields.into_iter().map(header).collect()
}

struct Echo {
    body: Bytes,
    headers: Vec<Header>,
}

impl Echo {
    fn echo(&self) -> Response {
        let mut response = respond(200, Payload::from(self.body.clone()));
        for header in &self.headers {
            response.add_header(header.clone());
        }
        response
    }
}

impl Service for Echo {
    type Session = ();
    type Turn = ();
    type Pending = Infallible;
    type Reply = Infallible;

    fn session(&self, _: SocketAddr) {}

    fn admit(&self, (): &mut (), _: &Head<'_>) -> Admission {
        Admission::Buffer(BODY_BYTES_MAX)
    }

    fn answer(&self, (): &mut (), _: &Head<'_>, _: Body<'_>) -> Response {
        self.echo()
    }

    fn begin(&self, (): &mut (), _: &Head<'_>, _: &[u8], _: Caller<Infallible>, _: Instant) -> Begun<Infallible> {
        Begun::Answered(self.echo())
    }

    fn submit(&self, (): &mut ()) {}

    fn finish(&self, pending: Infallible, _: Option<Infallible>, _: Instant) -> Response {
        match pending {}
    }

    fn fault(&self, status: StatusCode, detail: &str) -> Response {
        respond(status.0, detail.to_owned())
    }
}
