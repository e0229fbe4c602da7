//! What lies between the parties where the kernel does not: connections that are late, held, cut and half-closed.
//!
//! A proxy stands before one port of one node. All of them obey the same [`Weather`], which says for each pair of
//! parties, and each direction, what becomes of the bytes between them. No byte is lost or changed: TCP would see to
//! that too. What is held comes later, and for connections that does mean that the newer one may overtake the older.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{self, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::ops::Range;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, Builder};
use std::time::Duration;

use raftexample::membership::NodeId;
use raftexample::peer_protocol::HELLO_BYTES_MAX;

use crate::random::Random;

/// Who sends and receives.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Party {
    /// All clients.
    Clients,
    /// A node.
    Node(NodeId),
}

/// A direction between two parties.
pub type Link = (Party, Party);

/// How long the node behind a proxy may take to accept a connection.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(2);

/// How long a peer may take to say who it is.
const INTRODUCTION_TIMEOUT: Duration = Duration::from_secs(5);

/// Bytes that are passed on at once.
const CHUNK_BYTES: usize = 64 << 10;

/// One connection that is passed on.
struct Connection {
    /// Who made it, and to whom.
    link: Link,
    client: TcpStream,
    server: TcpStream,
    held: bool,
}

#[derive(Default)]
struct State {
    blocked: BTreeSet<Link>,
    delays: BTreeMap<Link, Range<Duration>>,
    connections: BTreeMap<u64, Connection>,
    opened: u64,
}

/// What becomes of the bytes between the parties.
#[derive(Default)]
pub struct Weather {
    state: Mutex<State>,
    changed: Condvar,
}

impl Weather {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Holds all that goes this way, on connections of old and new.
    pub fn block(&self, link: Link) {
        self.state().blocked.insert(link);
    }

    /// Lets it go on.
    pub fn unblock(&self, link: Link) {
        self.state().blocked.remove(&link);
        self.changed.notify_all();
    }

    /// Delays all that goes this way: each connection by a time of its own in the range, so that they overtake each
    /// other.
    pub fn delay(&self, link: Link, range: Range<Duration>) {
        self.state().delays.insert(link, range);
    }

    /// Ends a delay.
    pub fn end_delay(&self, link: Link) {
        self.state().delays.remove(&link);
    }

    /// Holds what goes over the connections that there are now between two parties, made by the first. New ones are
    /// not held, and overtake them.
    pub fn hold(&self, link: Link) -> usize {
        self.each(link, |connection| connection.held = true)
    }

    /// Lets go of all that is held.
    pub fn release(&self) {
        for connection in self.state().connections.values_mut() {
            connection.held = false;
        }
        self.changed.notify_all();
    }

    /// Closes the connections that there are now, both ways.
    pub fn cut(&self, link: Link) -> usize {
        self.each(link, |connection| {
            let _ = connection.client.shutdown(Shutdown::Both);
            let _ = connection.server.shutdown(Shutdown::Both);
        })
    }

    /// Closes the connections that there are now one way only: the one who made them goes on sending to somebody who
    /// has heard the end, or waits for answers that have none.
    pub fn half_close(&self, link: Link, towards_server: bool) -> usize {
        self.each(link, |connection| {
            let deaf = if towards_server { &connection.server } else { &connection.client };
            let _ = deaf.shutdown(Shutdown::Write);
        })
    }

    fn each(&self, link: Link, mut change: impl FnMut(&mut Connection)) -> usize {
        let mut state = self.state();
        let concerned = state.connections.values_mut().filter(|connection| connection.link == link);
        concerned.map(&mut change).count()
    }

    fn open(&self, link: Link, client: &TcpStream, server: &TcpStream) -> io::Result<u64> {
        let connection = Connection { link, client: client.try_clone()?, server: server.try_clone()?, held: false };
        let mut state = self.state();
        state.opened += 1;
        let number = state.opened;
        state.connections.insert(number, connection);
        Ok(number)
    }

    fn close(&self, number: u64) {
        self.state().connections.remove(&number);
    }

    /// Waits as long as nothing gets through this way, then as long as what gets through is late.
    fn pass(&self, link: Link, number: Option<u64>) {
        let mut state = self.state();
        let stopped = |state: &State| {
            let held = number.and_then(|number| state.connections.get(&number)).is_some_and(|c| c.held);
            held || state.blocked.contains(&link)
        };
        while stopped(&state) {
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        let delay = state.delays.get(&link).map(|range| Random::new(number.unwrap_or(0)).time(range));
        drop(state);
        if let Some(delay) = delay {
            thread::sleep(delay);
        }
    }
}

/// Passes on what comes to `listener` to node `to` at `server`, for as long as this process lives. Peers are known by
/// what they say of themselves; `from` is who connects, if it is none of them.
pub fn start(listener: TcpListener, server: SocketAddr, from: Option<Party>, to: NodeId, weather: Arc<Weather>) {
    let accept = move || {
        for client in listener.incoming() {
            let (Ok(client), weather) = (client, Arc::clone(&weather)) else { continue };
            // What goes wrong with a connection is the end of it, for both sides.
            let serve = move || drop(serve(client, server, from, to, &weather));
            Builder::new().name("proxy".to_owned()).spawn(serve).unwrap();
        }
    };
    Builder::new().name(format!("proxy-{to}")).spawn(accept).unwrap();
}

fn serve(
    mut client: TcpStream,
    server: SocketAddr,
    from: Option<Party>,
    to: NodeId,
    weather: &Arc<Weather>,
) -> io::Result<()> {
    client.set_nodelay(true)?;
    let mut head = Vec::new();
    let from = match from {
        Some(from) => from,
        None => introduce(&mut client, &mut head)?,
    };
    let link = (from, Party::Node(to));
    weather.pass(link, None);
    let mut server = TcpStream::connect_timeout(&server, CONNECT_TIMEOUT)?;
    server.set_nodelay(true)?;
    // Before the server hears of it: whoever does can count on what is done to it.
    let number = weather.open(link, &client, &server)?;
    let passed_on = server.write_all(&head).and_then(|()| pass_on(client, server, link, number, weather));
    weather.close(number);
    passed_on
}

/// Both ways, until both have come to an end.
fn pass_on(client: TcpStream, server: TcpStream, link: Link, number: u64, weather: &Arc<Weather>) -> io::Result<()> {
    let back = (link.1, link.0);
    let answers = {
        let (weather, from, to) = (Arc::clone(weather), server.try_clone()?, client.try_clone()?);
        Builder::new().name("proxy-back".to_owned()).spawn(move || copy(from, to, back, number, &weather))?
    };
    copy(client, server, link, number, weather);
    let _ = answers.join();
    Ok(())
}

/// Reads until it is said who connects: in the hello that comes with every request of a peer.
fn introduce(client: &mut TcpStream, head: &mut Vec<u8>) -> io::Result<Party> {
    client.set_read_timeout(Some(INTRODUCTION_TIMEOUT))?;
    let mut bytes = [0; 1024];
    loop {
        if let Some(id) = hello_from(head) {
            client.set_read_timeout(None)?;
            return Ok(Party::Node(id));
        }
        let length = client.read(&mut bytes)?;
        if length == 0 || head.len() > 2 * HELLO_BYTES_MAX {
            return Err(io::ErrorKind::InvalidData.into());
        }
        head.extend_from_slice(&bytes[..length]);
    }
}

/// The sender in a hello, if all of its number is there.
fn hello_from(head: &[u8]) -> Option<NodeId> {
    const FIELD: &[u8] = b"\"from\":";
    let start = head.windows(FIELD.len()).position(|window| window == FIELD)? + FIELD.len();
    let length = head[start..].iter().position(|byte| !byte.is_ascii_digit())?;
    std::str::from_utf8(&head[start..start + length]).ok()?.parse().ok()
}

fn copy(mut from: TcpStream, mut to: TcpStream, link: Link, number: u64, weather: &Weather) {
    let mut bytes = vec![0; CHUNK_BYTES];
    loop {
        let read = from.read(&mut bytes);
        weather.pass(link, Some(number));
        match read {
            Ok(0) => {
                let _ = to.shutdown(Shutdown::Write);
                return;
            }
            Ok(length) if to.write_all(&bytes[..length]).is_ok() => {}
            _ => {
                let _ = from.shutdown(Shutdown::Both);
                let _ = to.shutdown(Shutdown::Both);
                return;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;
    use std::time::Instant;

    use super::*;

    const PEER: Link = (Party::Node(2), Party::Node(1));
    const BACK: Link = (Party::Node(1), Party::Node(2));

    /// A listener behind a proxy, and the proxy's address.
    fn behind_a_proxy(weather: &Arc<Weather>) -> (TcpListener, SocketAddr) {
        let server = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let address = listener.local_addr().unwrap();
        start(listener, server.local_addr().unwrap(), None, 1, Arc::clone(weather));
        (server, address)
    }

    /// What comes in a moment; nothing if nothing does.
    fn receive(stream: &mut TcpStream, moment: Duration) -> Vec<u8> {
        stream.set_read_timeout(Some(moment)).unwrap();
        let mut bytes = [0; 100];
        let length = stream.read(&mut bytes).unwrap_or(0);
        bytes[..length].to_vec()
    }

    const LONG: Duration = Duration::from_secs(20);
    const MOMENT: Duration = Duration::from_millis(100);

    fn introduced(address: SocketAddr, server: &TcpListener) -> (TcpStream, TcpStream) {
        let mut client = TcpStream::connect(address).unwrap();
        client.write_all(b"{\"from\":2,").unwrap();
        let (mut server, _) = server.accept().unwrap();
        assert_eq!(receive(&mut server, LONG), b"{\"from\":2,");
        (client, server)
    }

    #[test]
    fn what_is_blocked_comes_later_and_the_other_way_goes_on() {
        let weather = Arc::new(Weather::default());
        let (listener, address) = behind_a_proxy(&weather);
        let (mut client, mut server) = introduced(address, &listener);
        weather.block(PEER);
        client.write_all(b"late").unwrap();
        assert_eq!(receive(&mut server, MOMENT), b"");
        server.write_all(b"answer").unwrap();
        assert_eq!(receive(&mut client, LONG), b"answer");
        weather.block(BACK);
        server.write_all(b"more").unwrap();
        assert_eq!(receive(&mut client, MOMENT), b"");
        weather.unblock(PEER);
        assert_eq!(receive(&mut server, LONG), b"late");
        weather.unblock(BACK);
        assert_eq!(receive(&mut client, LONG), b"more");
    }

    #[test]
    fn a_held_connection_is_overtaken_by_a_new_one() {
        let weather = Arc::new(Weather::default());
        let (listener, address) = behind_a_proxy(&weather);
        let (mut old, mut old_server) = introduced(address, &listener);
        assert_eq!(weather.hold(PEER), 1);
        old.write_all(b"old").unwrap();
        drop(old);
        let (mut new, mut new_server) = introduced(address, &listener);
        new.write_all(b"new").unwrap();
        assert_eq!(receive(&mut new_server, LONG), b"new");
        assert_eq!(receive(&mut old_server, MOMENT), b"");
        weather.release();
        assert_eq!(receive(&mut old_server, LONG), b"old");
    }

    #[test]
    fn connections_are_cut_and_half_closed_and_late() {
        let weather = Arc::new(Weather::default());
        let (listener, address) = behind_a_proxy(&weather);
        let (mut client, mut server) = introduced(address, &listener);
        assert_eq!(weather.half_close(PEER, true), 1);
        assert_eq!(server.read(&mut [0]).unwrap(), 0, "it has heard the end");
        server.write_all(b"still here").unwrap();
        assert_eq!(receive(&mut client, LONG), b"still here");
        assert_eq!(weather.cut(BACK), 0, "nobody connected that way");
        assert_eq!(weather.cut(PEER), 1);
        assert_eq!(client.read(&mut [0]).unwrap_or(0), 0);
        weather.delay(PEER, MOMENT..MOMENT * 2);
        let (mut client, mut server) = introduced(address, &listener);
        let sent = Instant::now();
        client.write_all(b"late").unwrap();
        assert_eq!(receive(&mut server, LONG), b"late");
        assert!(sent.elapsed() >= MOMENT);
    }

    #[test]
    fn a_peer_is_known_when_its_number_is_complete() {
        assert_eq!(hello_from(b"POST / HTTP/1.1\r\nraftexample-hello: {\"from\":12"), None);
        assert_eq!(hello_from(b"POST / HTTP/1.1\r\nraftexample-hello: {\"from\":12,"), Some(12));
        assert_eq!(hello_from(b"{\"protocol_min\":1,\"cluster\":null,\"from\":3,\"to\":0}"), Some(3));
    }
}
