//! The network between nodes and clients, and how it is cut.
//!
//! In namespaces each node has one of its own, and a cable to that of this process, which routes between them. A rule
//! of the routing policy drops, in silence, what goes from one party to another: one direction of one pair. Some
//! members announce the address of a [`proxy`] on this side of the cable instead of their own, so that their peers'
//! connections can be delayed, held and half-closed too.
//!
//! On loopback addresses every member is behind a proxy, and proxies do it all.

use std::fs::File;
use std::net::{Ipv4Addr, SocketAddr, TcpListener, UdpSocket};
use std::os::fd::AsFd;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use raftexample::membership::NodeId;
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

use crate::proxy::{self, Link, Party, Weather};
use crate::settings::Kind;
use crate::support::{Process, free_port, wait_for};

/// Ports of every node that has its addresses for itself.
const PEER_PORT: u16 = 9021;
const KEY_VALUE_PORT: u16 = 9121;

/// How long a datagram may take between two namespaces of one machine.
const DATAGRAM_TIMEOUT: Duration = Duration::from_millis(500);

/// Where a member is.
pub struct Place {
    /// Where its peers reach it.
    pub peer_url: String,
    /// Flags for its addresses and ports.
    pub flags: Vec<String>,
    /// Where clients reach it.
    pub direct: SocketAddr,
    /// Where they reach it through a proxy.
    pub detour: SocketAddr,
    /// What keeps its namespace; none on loopback addresses.
    namespace: Option<Process>,
}

impl Place {
    /// A command that will run where the member is, but for its arguments.
    pub fn command(&self, program: &Path) -> Command {
        match &self.namespace {
            None => Command::new(program),
            Some(holder) => {
                let mut command = Command::new("nsenter");
                command.arg(format!("--net=/proc/{}/ns/net", holder.id())).arg("--").arg(program);
                command
            }
        }
    }

    /// Does something where the member is.
    fn within<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
        let holder = self.namespace.as_ref().expect("only asked of members with a namespace").id();
        let namespace = File::open(format!("/proc/{holder}/ns/net")).unwrap();
        // A thread for itself: sockets belong to the namespace that their thread is in when it opens them.
        let body = move || {
            move_into_link_name_space(namespace.as_fd(), Some(LinkNameSpaceType::Network)).unwrap();
            work()
        };
        thread::scope(|scope| scope.spawn(body).join().expect("it does not panic"))
    }
}

/// The network of one run.
pub struct Network {
    kind: Kind,
    /// What the proxies obey.
    pub weather: Arc<Weather>,
    /// Where the logs of helpers go.
    log: PathBuf,
}

/// Runs a command of iproute2 or the like to its end.
fn run(command: &str) -> Result<(), String> {
    let words: Vec<&str> = command.split_whitespace().collect();
    let output = Command::new(words[0]).args(&words[1..]).stdin(Stdio::null()).output();
    match output {
        Ok(output) if output.status.success() => Ok(()),
        Ok(output) => Err(format!("{command}: {}", String::from_utf8_lossy(&output.stderr).trim())),
        Err(error) => Err(format!("{command}: {error}")),
    }
}

/// The two networks on the cable of a node: what its peers and clients use, and what only proxies use. Each has the
/// address .1 at this end and .2 at the node's.
fn subnet(id: NodeId, of_proxies: bool) -> [u8; 3] {
    let [low, high, ..] = id.to_le_bytes();
    [10, if of_proxies { 128 } else { 64 } + high, low]
}

fn address(id: NodeId, of_proxies: bool, host: u8) -> Ipv4Addr {
    let [a, b, c] = subnet(id, of_proxies);
    Ipv4Addr::new(a, b, c, host)
}

impl Network {
    /// Prepares this process's part.
    pub fn new(kind: Kind, log: PathBuf) -> Result<Network, String> {
        if kind == Kind::Namespaces {
            run("ip link set lo up")?;
            for (name, value) in [("ip_forward", "1"), ("conf/all/rp_filter", "0"), ("conf/default/rp_filter", "0")] {
                let path = format!("/proc/sys/net/ipv4/{name}");
                std::fs::write(&path, value).map_err(|error| format!("{path}: {error}"))?;
            }
            // The rules of cuts come before what this process receives itself, as the end of a proxy.
            run("ip rule add pref 100 lookup local")?;
            run("ip rule del pref 0")?;
        }
        Ok(Network { kind, weather: Arc::default(), log })
    }

    /// Which kind it is.
    pub fn kind(&self) -> Kind {
        self.kind
    }

    /// Makes a place for a member that nobody has seen yet. `behind_proxy` says how its peers reach it, where there
    /// is a choice.
    pub fn place(&self, id: NodeId, behind_proxy: bool) -> Result<Place, String> {
        match self.kind {
            Kind::Loopback => Ok(self.loopback_place(id)),
            Kind::Namespaces => self.namespace_place(id, behind_proxy),
        }
    }

    fn loopback_place(&self, id: NodeId) -> Place {
        let local = |port| SocketAddr::from((Ipv4Addr::LOCALHOST, port));
        let (peer_listen, direct) = (local(free_port()), local(free_port()));
        let listen = || wait_for("a port", || TcpListener::bind(local(free_port())).ok());
        let peers = listen();
        let peer_url = format!("http://{}", peers.local_addr().unwrap());
        proxy::start(peers, peer_listen, None, id, Arc::clone(&self.weather));
        let clients = listen();
        let detour = clients.local_addr().unwrap();
        proxy::start(clients, direct, Some(Party::Clients), id, Arc::clone(&self.weather));
        let flags = ["--port", &direct.port().to_string(), "--peer-listen", &peer_listen.to_string()];
        Place { peer_url, flags: flags.map(str::to_owned).into(), direct, detour, namespace: None }
    }

    fn namespace_place(&self, id: NodeId, behind_proxy: bool) -> Result<Place, String> {
        let holder = self.new_namespace()?;
        let within = format!("nsenter --net=/proc/{}/ns/net --", holder.id());
        run(&format!("ip link add node{id} type veth peer name eth0 netns {}", holder.id()))?;
        run(&format!("{within} ip link set lo up"))?;
        for of_proxies in [false, true] {
            run(&format!("ip addr add {}/30 dev node{id}", address(id, of_proxies, 1)))?;
            run(&format!("{within} ip addr add {}/30 dev eth0", address(id, of_proxies, 2)))?;
        }
        run(&format!("ip link set node{id} up"))?;
        run(&format!("{within} ip link set eth0 up"))?;
        run(&format!("{within} ip route add default via {}", address(id, false, 1)))?;

        let (own, outer) = (address(id, false, 2), address(id, false, 1));
        let listen = |port| TcpListener::bind((outer, port)).map_err(|error| format!("{outer}:{port}: {error}"));
        let inner = |port| SocketAddr::from((address(id, true, 2), port));
        let clients = listen(KEY_VALUE_PORT)?;
        proxy::start(clients, inner(KEY_VALUE_PORT), Some(Party::Clients), id, Arc::clone(&self.weather));
        if behind_proxy {
            proxy::start(listen(PEER_PORT)?, inner(PEER_PORT), None, id, Arc::clone(&self.weather));
        }
        let known_as = if behind_proxy { outer } else { own };
        let peer_listen = format!("0.0.0.0:{PEER_PORT}");
        let flags = ["--host", "0.0.0.0", "--port", &KEY_VALUE_PORT.to_string(), "--peer-listen", &peer_listen]
            .map(str::to_owned);
        Ok(Place {
            peer_url: format!("http://{known_as}:{PEER_PORT}"),
            flags: flags.into(),
            direct: SocketAddr::from((own, KEY_VALUE_PORT)),
            detour: SocketAddr::from((outer, KEY_VALUE_PORT)),
            namespace: Some(holder),
        })
    }

    /// A process in a network namespace of its own, which lasts as long as the process.
    fn new_namespace(&self) -> Result<Process, String> {
        let mut command = Command::new("unshare");
        command.args(["--net", "sleep", "infinity"]).stdin(Stdio::null()).process_group(0);
        let holder = Process::spawn(&mut command, &self.log);
        let namespace_of = |process: &str| std::fs::read_link(format!("/proc/{process}/ns/net")).ok();
        let id = holder.id().to_string();
        wait_for("a namespace", || namespace_of(&id).filter(|own| Some(own) != namespace_of("self").as_ref()));
        Ok(holder)
    }

    /// Lets nothing through this way, from now on.
    pub fn block(&self, link: Link) {
        self.rule("add", link);
        self.weather.block(link);
    }

    /// Lets everything through again.
    pub fn unblock(&self, link: Link) {
        self.rule("del", link);
        self.weather.unblock(link);
    }

    fn rule(&self, verb: &str, link: Link) {
        if self.kind == Kind::Loopback {
            return;
        }
        let whole = |id| format!("{}/30", address(id, false, 0));
        let (from, to) = match link {
            (Party::Node(from), Party::Node(to)) => (whole(from), whole(to)),
            (Party::Clients, Party::Node(id)) => (address(id, false, 1).to_string(), address(id, false, 2).to_string()),
            (Party::Node(id), Party::Clients) => (address(id, false, 2).to_string(), address(id, false, 1).to_string()),
            (Party::Clients, Party::Clients) => return,
        };
        run(&format!("ip rule {verb} pref 10 from {from} to {to} blackhole")).expect("rules were tried at the start");
    }

    /// Makes sure that a cut is one, in one direction, and that it ends. A fault that is none would prove nothing.
    pub fn prove(&self, (a, one): (NodeId, &Place), (b, other): (NodeId, &Place)) -> Result<(), String> {
        if self.kind == Kind::Loopback {
            return Ok(());
        }
        let passes = |from: &Place, from_id, to: &Place, to_id| {
            let port = KEY_VALUE_PORT + 1;
            let receiver = to.within(|| UdpSocket::bind((address(to_id, false, 2), port)).unwrap());
            receiver.set_read_timeout(Some(DATAGRAM_TIMEOUT)).unwrap();
            let sender = from.within(|| UdpSocket::bind((address(from_id, false, 2), port)).unwrap());
            let sent = sender.send_to(b"word", (address(to_id, false, 2), port)).is_ok();
            sent && receiver.recv(&mut [0; 4]).is_ok()
        };
        let state = || (passes(one, a, other, b), passes(other, b, one, a));
        let link = (Party::Node(a), Party::Node(b));
        let before = state();
        self.block(link);
        let cut = state();
        self.unblock(link);
        match (before, cut, state()) {
            ((true, true), (false, true), (true, true)) => Ok(()),
            seen => Err(format!("cutting {a} from {b} does not do that: before, meanwhile and after: {seen:?}")),
        }
    }
}
