use std::collections::VecDeque;
use std::io::{Read, Write};
use std::net::{Ipv4Addr, Shutdown, TcpListener, TcpStream};
use std::sync::{Arc, Condvar, Mutex};
use std::thread::Builder;

use raftexample::peer_protocol::SNAPSHOT_PATH;

use crate::support::{free_port, wait_for};

/// What becomes of the next snapshot that comes by.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Fate {
    /// The connection is closed when so many bytes of the request, its head included, were passed on.
    CutAfter(usize),
    /// Nothing more is passed on behind so many bytes, until [`Proxy::release`].
    HoldAfter(usize),
}

/// Lies between the members and one of them, passes everything on, and lays its hands on snapshots.
pub(crate) struct Proxy {
    port: u16,
    plan: Arc<Plan>,
}

#[derive(Default)]
struct Plan {
    state: Mutex<State>,
    released: Condvar,
}

#[derive(Default)]
struct State {
    fates: VecDeque<Fate>,
    seen: usize,
    holding: bool,
}

impl Proxy {
    /// Passes on to `listens_at` of this machine.
    pub(crate) fn start(listens_at: u16) -> Self {
        // Somebody may take a port between its choice and its use.
        let listener = wait_for("a port for the proxy", || TcpListener::bind((Ipv4Addr::LOCALHOST, free_port())).ok());
        let port = listener.local_addr().unwrap().port();
        let plan = Arc::new(Plan::default());
        let accepted = Arc::clone(&plan);
        // Ends with the process of the tests, as all that it starts.
        let accept = move || {
            for stream in listener.incoming() {
                let (plan, Ok(client)) = (Arc::clone(&accepted), stream) else { continue };
                if let Ok(server) = TcpStream::connect((Ipv4Addr::LOCALHOST, listens_at)) {
                    Builder::new().spawn(move || pass_on(client, server, &plan)).unwrap();
                }
            }
        };
        Builder::new().spawn(accept).unwrap();
        Self { port, plan }
    }

    pub(crate) fn port(&self) -> u16 {
        self.port
    }

    /// Decides about the next snapshots, in order; those behind them are passed on.
    pub(crate) fn plan(&self, fates: impl IntoIterator<Item = Fate>) {
        self.plan.state.lock().unwrap().fates.extend(fates);
    }

    /// Decisions that were not needed yet.
    pub(crate) fn left(&self) -> usize {
        self.plan.state.lock().unwrap().fates.len()
    }

    /// How many snapshots have come by.
    pub(crate) fn seen(&self) -> usize {
        self.plan.state.lock().unwrap().seen
    }

    /// Whether a snapshot is held.
    pub(crate) fn is_holding(&self) -> bool {
        self.plan.state.lock().unwrap().holding
    }

    /// Lets go of what is held.
    pub(crate) fn release(&self) {
        self.plan.state.lock().unwrap().holding = false;
        self.plan.released.notify_all();
    }
}

fn pass_on(client: TcpStream, server: TcpStream, plan: &Plan) {
    let (from_server, to_client) = (server.try_clone().unwrap(), client.try_clone().unwrap());
    Builder::new().spawn(move || copy(from_server, to_client, &mut None, None)).unwrap();
    let mut head = [0; 64];
    let length = client.peek(&mut head).unwrap_or(0);
    let snapshot = head[..length].starts_with(format!("POST {SNAPSHOT_PATH}").as_bytes());
    let mut fate = None;
    if snapshot {
        let mut state = plan.state.lock().unwrap();
        state.seen += 1;
        fate = state.fates.pop_front();
    }
    copy(client, server, &mut fate, Some(plan));
}

fn copy(mut from: TcpStream, mut to: TcpStream, fate: &mut Option<Fate>, plan: Option<&Plan>) {
    let mut passed = 0;
    let mut bytes = [0; 4096];
    while let Ok(length @ 1..) = from.read(&mut bytes) {
        let limit = match *fate {
            Some(Fate::CutAfter(limit) | Fate::HoldAfter(limit)) if passed + length >= limit => limit - passed,
            _ => length,
        };
        if to.write_all(&bytes[..limit]).is_err() {
            break;
        }
        let reached = matches!(*fate, Some(Fate::CutAfter(at) | Fate::HoldAfter(at)) if passed + limit == at);
        match (fate.take_if(|_| reached), plan) {
            (Some(Fate::CutAfter(_)), _) => break,
            (Some(Fate::HoldAfter(_)), Some(plan)) => hold(plan),
            _ => {}
        }
        if to.write_all(&bytes[limit..length]).is_err() {
            break;
        }
        passed += length;
    }
    let _ = from.shutdown(Shutdown::Both);
    let _ = to.shutdown(Shutdown::Both);
}

fn hold(plan: &Plan) {
    let mut state = plan.state.lock().unwrap();
    state.holding = true;
    while state.holding {
        state = plan.released.wait(state).unwrap();
    }
}
