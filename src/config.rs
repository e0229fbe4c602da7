//! The command line, and the checked settings it becomes.
//!
//! Two steps: [`Cli`] is what was typed or found in the environment, as text; [`Config::from_cli`] is the one place
//! where it is checked. Whoever holds a [`Config`] may use each field as it is.

use std::collections::BTreeMap;
use std::fmt;
use std::net::{IpAddr, Ipv4Addr};
use std::ops::RangeInclusive;
use std::path::PathBuf;
use std::time::Duration;

use clap::Parser;
use clap::builder::BoolishValueParser;
use sha2::{Digest, Sha256};
use url::Host;

use crate::membership::{ClusterId, NodeId};

/// The most that `--max-value-bytes` may be. The limits of log records, peer messages and snapshot blocks are
/// constants above it, so that what one node has accepted no other refuses, whatever its own flags say.
pub const MAX_VALUE_BYTES_MAX: usize = 16 << 20;

/// The most that `--max-key-bytes` may be, for the same reason as [`MAX_VALUE_BYTES_MAX`]. A key also has to fit into
/// a request line, escaped, at three bytes for each of its own.
pub const MAX_KEY_BYTES_MAX: usize = 64 << 10;

/// An election timeout has at least this many heartbeats: a follower must be able to miss a few, to a busy processor
/// or a lost packet, without calling an election.
pub const HEARTBEATS_PER_ELECTION_TIMEOUT_MIN: u32 = 5;

/// The longest of all durations on the command line. Longer is a typing mistake, and would bring deadlines near the
/// end of what an `Instant` can hold.
pub const DURATION_MAX: Duration = Duration::from_secs(60 * 60);

/// What was typed, as text, with the environment and the defaults filled in.
///
/// The comments of the fields are the text of `--help`.
#[derive(Clone, Debug, Parser)]
#[command(
    name = "raftexample",
    version,
    about = "A key-value store with a REST API, replicated by Raft",
    long_about = None,
    after_help = "A flag wins over its environment variable. RUST_LOG sets the log level (default: info); logs go to \
                  standard error.",
    allow_negative_numbers = true
)]
pub struct Cli {
    /// This node's Raft id, from 1
    #[arg(long, env = "RAFTEXAMPLE_ID", hide_env_values = true, value_name = "N", default_value = "1")]
    pub id: String,

    /// Peer URLs of the founding members, in id order; an item may be written ID=URL. With --join: any members of the
    /// running cluster, and this node itself
    #[arg(
        long,
        env = "RAFTEXAMPLE_CLUSTER",
        hide_env_values = true,
        value_name = "URL,URL,…",
        default_value = "http://127.0.0.1:9021"
    )]
    pub cluster: String,

    /// The key-value port; 0 takes any free one, and the log says which
    #[arg(long, env = "RAFTEXAMPLE_PORT", hide_env_values = true, value_name = "P", default_value = "9121")]
    pub port: String,

    /// The address the key-value port binds
    #[arg(long, env = "RAFTEXAMPLE_HOST", hide_env_values = true, value_name = "ADDR", default_value = "127.0.0.1")]
    pub host: String,

    /// What the peer port binds, where it differs from the URL that others use [default: host and port of this node's
    /// own URL]
    #[arg(long, env = "RAFTEXAMPLE_PEER_LISTEN", hide_env_values = true, value_name = "ADDR:PORT")]
    pub peer_listen: Option<String>,

    /// Join a running cluster instead of founding one
    #[arg(long, env = "RAFTEXAMPLE_JOIN", hide_env_values = true, value_parser = BoolishValueParser::new())]
    pub join: bool,

    /// Log and snapshots of this node; locked against a second process
    #[arg(
        long,
        env = "RAFTEXAMPLE_DATA_DIR",
        hide_env_values = true,
        value_name = "DIR",
        help = "Log and snapshots of this node; locked against a second process [default: raftexample-<id>]"
    )]
    pub data_dir: Option<PathBuf>,

    /// Entries applied between snapshots, from 1
    #[arg(long, env = "RAFTEXAMPLE_SNAPSHOT_COUNT", hide_env_values = true, value_name = "N", default_value = "10000")]
    pub snapshot_count: String,

    /// Entries kept behind a snapshot for slow followers, from 0
    #[arg(
        long,
        env = "RAFTEXAMPLE_SNAPSHOT_CATCHUP_ENTRIES",
        hide_env_values = true,
        value_name = "N",
        default_value = "5000"
    )]
    pub snapshot_catchup_entries: String,

    /// One Raft tick
    #[arg(
        long,
        env = "RAFTEXAMPLE_HEARTBEAT_INTERVAL",
        hide_env_values = true,
        value_name = "D",
        default_value = "100ms"
    )]
    pub heartbeat_interval: String,

    /// At least 5 heartbeats; rounded up to whole ones
    #[arg(
        long,
        env = "RAFTEXAMPLE_ELECTION_TIMEOUT",
        hide_env_values = true,
        value_name = "D",
        default_value = "1000ms"
    )]
    pub election_timeout: String,

    /// How long a client request may wait for a leader, a commit or a read index
    #[arg(long, env = "RAFTEXAMPLE_REQUEST_TIMEOUT", hide_env_values = true, value_name = "D", default_value = "5s")]
    pub request_timeout: String,

    /// Larger bodies get 413; at most 16MiB
    #[arg(long, env = "RAFTEXAMPLE_MAX_VALUE_BYTES", hide_env_values = true, value_name = "N", default_value = "1MiB")]
    pub max_value_bytes: String,

    /// Longer keys get 414; at most 64KiB
    #[arg(long, env = "RAFTEXAMPLE_MAX_KEY_BYTES", hide_env_values = true, value_name = "N", default_value = "4KiB")]
    pub max_key_bytes: String,

    /// Keys and values a leader accepts before it answers PUT with 507; DELETE still works
    #[arg(long, env = "RAFTEXAMPLE_MAX_STORE_BYTES", hide_env_values = true, value_name = "N", default_value = "1GiB")]
    pub max_store_bytes: String,
}

/// The settings of one node, checked: no field needs a second look.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Config {
    /// This node, from 1; one of `members`.
    pub id: NodeId,
    /// The founding members; with `join`, members to ask and this node itself. No id and no URL twice.
    pub members: BTreeMap<NodeId, PeerUrl>,
    /// Where the others reach this node: its own item of `members`.
    pub url: PeerUrl,
    /// Where clients are listened for. Port 0 stands for any free one.
    pub listen: Address,
    /// Where peers are listened for. The port is not 0.
    pub peer_listen: Address,
    /// Joins a running cluster instead of founding one; then `members` names at least one other.
    pub join: bool,
    /// Where log and snapshots lie. Not empty; need not exist.
    pub data_dir: PathBuf,
    /// Entries applied between snapshots, from 1.
    pub snapshot_count: u64,
    /// Entries kept behind a snapshot, from 0.
    pub snapshot_catchup_entries: u64,
    /// The length of one Raft tick, from 1 ms to [`DURATION_MAX`].
    pub heartbeat_interval: Duration,
    /// The election timeout in ticks, at least [`HEARTBEATS_PER_ELECTION_TIMEOUT_MIN`]. Raft draws each single timeout
    /// between this and twice this.
    pub election_ticks: usize,
    /// How long a client's request may wait, from 1 ms to [`DURATION_MAX`].
    pub request_timeout: Duration,
    /// The longest value a client may send, from 1 to [`MAX_VALUE_BYTES_MAX`].
    pub max_value_bytes: usize,
    /// The longest key a client may send, from 1 to [`MAX_KEY_BYTES_MAX`].
    pub max_key_bytes: usize,
    /// Bytes of keys and values above which a leader refuses PUT, from 1.
    pub max_store_bytes: u64,
}

impl Config {
    /// Checks what was typed.
    ///
    /// # Errors
    /// One line that names the flag, what was typed, what is wrong with it, and the way out.
    pub fn from_cli(cli: Cli) -> Result<Self, String> {
        let id = whole_number("--id", &cli.id, 1..=u64::MAX)?;
        let members = parse_members(&cli.cluster)?;
        let Some(url) = members.get(&id).cloned() else {
            let ids: Vec<String> = members.keys().map(u64::to_string).collect();
            let ids = ids.join(", ");
            return Err(refusal(
                "--id",
                &cli.id,
                format!("--cluster names only {ids}; choose one of these, or add it"),
            ));
        };
        if cli.join && members.len() == 1 {
            let reason = "--join needs a member of the running cluster here too, as in 1=http://10.0.0.1:9021";
            return Err(refusal("--cluster", &cli.cluster, reason));
        }
        let listen = Address { host: parse_host("--host", &cli.host)?, port: parse_port(&cli.port)? };
        let peer_listen = match &cli.peer_listen {
            None => url.address.clone(),
            Some(text) => Address::parse(text).map_err(|reason| refusal("--peer-listen", text, reason))?,
        };
        if listen.collides_with(&peer_listen) {
            let reason = format!("the peer port {peer_listen} is the same; choose another for one of them");
            return Err(refusal("--port", &cli.port, reason));
        }
        let (heartbeat_interval, election_ticks) = parse_ticks(&cli.heartbeat_interval, &cli.election_timeout)?;
        let data_dir = cli.data_dir.unwrap_or_else(|| PathBuf::from(format!("raftexample-{id}")));
        if data_dir.as_os_str().is_empty() {
            return Err(refusal("--data-dir", "", "name a directory, or leave the flag out"));
        }
        Ok(Self {
            id,
            members,
            url,
            listen,
            peer_listen,
            join: cli.join,
            data_dir,
            snapshot_count: whole_number("--snapshot-count", &cli.snapshot_count, 1..=u64::MAX)?,
            snapshot_catchup_entries: whole_number(
                "--snapshot-catchup-entries",
                &cli.snapshot_catchup_entries,
                0..=u64::MAX,
            )?,
            heartbeat_interval,
            election_ticks,
            request_timeout: duration("--request-timeout", &cli.request_timeout)?,
            max_value_bytes: size("--max-value-bytes", &cli.max_value_bytes, MAX_VALUE_BYTES_MAX as u64)? as usize,
            max_key_bytes: size("--max-key-bytes", &cli.max_key_bytes, MAX_KEY_BYTES_MAX as u64)? as usize,
            max_store_bytes: size("--max-store-bytes", &cli.max_store_bytes, u64::MAX)?,
        })
    }

    /// The shortest time without a leader's message after which this node calls an election: whole ticks.
    pub fn election_timeout(&self) -> Duration {
        self.heartbeat_interval * u32::try_from(self.election_ticks).unwrap_or(u32::MAX)
    }

    /// The identity of the cluster that `members` founds. Without meaning for a node that joins.
    pub fn cluster_id(&self) -> ClusterId {
        cluster_id(&self.members)
    }
}

/// Names the cluster that these members found: the first 16 bytes of the SHA-256 of `ID=URL,ID=URL,…`, sorted by id.
///
/// All founders compute it for themselves, so URLs are normalized first: two spellings of one list are one cluster.
pub fn cluster_id(members: &BTreeMap<NodeId, PeerUrl>) -> ClusterId {
    let items: Vec<String> = members.iter().map(|(id, url)| format!("{id}={url}")).collect();
    let hash = Sha256::digest(items.join(","));
    let mut id = [0; 16];
    id.copy_from_slice(&hash[..16]);
    ClusterId(id)
}

/// A host, by name or number, and a port. Displayed as `host:port`, which `TcpListener::bind` understands.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Address {
    /// Names are in lower case.
    pub host: Host<String>,
    /// From 1, or 0 where the owner of the value says so.
    pub port: u16,
}

impl Address {
    /// Reads `host:port`; an IPv6 address stands in brackets.
    ///
    /// # Errors
    /// What is wrong, in a few words.
    pub fn parse(text: &str) -> Result<Self, String> {
        let (host, port) = text.rsplit_once(':').ok_or("the port is missing; write host:port")?;
        let host = match host {
            "" => return Err("the host is missing; write host:port".to_owned()),
            _ if host.contains(':') && !host.starts_with('[') => {
                return Err("write an IPv6 address in brackets, as in [::1]:9021".to_owned());
            }
            _ => Host::parse(host).map_err(|_| format!("'{}' is no host name or address", host.escape_debug()))?,
        };
        match parse_digits(port).and_then(|port| u16::try_from(port).ok()) {
            Some(port) if port > 0 => Ok(Self { host, port }),
            _ => Err(format!("'{}' is no port; write a number from 1 to 65535", port.escape_debug())),
        }
    }

    /// Whether both cannot be bound at the same time. Different names of one interface are not seen through.
    fn collides_with(&self, other: &Self) -> bool {
        let overlap = self.host == other.host || is_unspecified(&self.host) || is_unspecified(&other.host);
        self.port == other.port && overlap
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.host, self.port)
    }
}

/// Where a node's peers reach it: `http://host:port`, normalized, so that equal addresses are equal values.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PeerUrl {
    address: Address,
}

impl PeerUrl {
    /// Reads `http://host:port`. A single slash at the end is dropped, capital letters are made small.
    ///
    /// # Errors
    /// What is wrong, in a few words: another scheme, no host, no port, a user, a path, a query, or an address such as
    /// `0.0.0.0`, which others cannot reach.
    pub fn parse(text: &str) -> Result<Self, String> {
        let (scheme, rest) = text.split_once("://").ok_or("no URL; write http://host:port")?;
        if !scheme.eq_ignore_ascii_case("http") {
            return Err("peers talk plain http; write http://host:port".to_owned());
        }
        let authority = rest.strip_suffix('/').unwrap_or(rest);
        if authority.contains(['/', '?', '#', '@', '\\']) {
            return Err("only a host and a port may stand in it; write http://host:port".to_owned());
        }
        let address = Address::parse(authority)?;
        if is_unspecified(&address.host) {
            return Err(format!(
                "no other node can reach {}; write this machine's address, and give {address} to --peer-listen",
                address.host
            ));
        }
        Ok(Self { address })
    }

    /// The host and the port.
    pub fn address(&self) -> &Address {
        &self.address
    }
}

impl fmt::Display for PeerUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "http://{}", self.address)
    }
}

/// Reads a duration: a whole number directly followed by `ms`, `s`, `m` or `h`.
///
/// # Errors
/// What is wrong, in a few words; also for what no `u64` of milliseconds can hold.
pub fn parse_duration(text: &str) -> Result<Duration, String> {
    let (number, unit) = split_unit(text);
    let millis_per_unit = match unit {
        "ms" => 1,
        "s" => 1000,
        "m" => 60_000,
        "h" => 3_600_000,
        _ => return Err("no duration; write a whole number and ms, s, m or h, as in 100ms or 5s".to_owned()),
    };
    let millis = parse_digits(number).and_then(|number| number.checked_mul(millis_per_unit));
    millis.map(Duration::from_millis).ok_or_else(|| "no duration; write one such as 100ms or 5s".to_owned())
}

/// Reads a size in bytes: a whole number, alone or with `B`, `KiB`, `MiB`, `GiB` or `TiB`, in any case.
///
/// # Errors
/// What is wrong, in a few words; also for what no `u64` can hold.
pub fn parse_size(text: &str) -> Result<u64, String> {
    let (number, unit) = split_unit(text);
    let shift = match unit.trim_start().to_ascii_lowercase().as_str() {
        "" | "b" => 0,
        "kib" => 10,
        "mib" => 20,
        "gib" => 30,
        "tib" => 40,
        _ => return Err("no size; write bytes, or a whole number and KiB, MiB or GiB".to_owned()),
    };
    let bytes = parse_digits(number).and_then(|number| number.checked_mul(1 << shift));
    bytes.ok_or_else(|| "no size; write one such as 65536 or 64KiB".to_owned())
}

/// The line that `error` comes down to: its first one, with clap's hints, and without the usage below them.
pub fn usage_error(error: &clap::Error) -> String {
    let text = error.render().to_string();
    let mut lines = text.lines();
    let first = lines.next().unwrap_or_default();
    let mut message = first.strip_prefix("error: ").unwrap_or(first).to_owned();
    for tip in lines.filter_map(|line| line.trim_start().strip_prefix("tip: ")) {
        message.push_str("; ");
        message.push_str(tip);
    }
    message + "; try --help"
}

/// One line about a flag, whatever was typed: control characters are shown escaped.
fn refusal(flag: &str, text: &str, reason: impl fmt::Display) -> String {
    format!("{flag} '{}': {reason}", text.escape_debug())
}

fn split_unit(text: &str) -> (&str, &str) {
    text.split_at(text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len()))
}

/// Digits and nothing else: the standard parser would take a plus sign.
fn parse_digits(text: &str) -> Option<u64> {
    if text.bytes().all(|byte| byte.is_ascii_digit()) { text.parse().ok() } else { None }
}

fn whole_number(flag: &str, text: &str, range: RangeInclusive<u64>) -> Result<u64, String> {
    match parse_digits(text) {
        Some(number) if range.contains(&number) => Ok(number),
        _ if *range.end() == u64::MAX => {
            Err(refusal(flag, text, format!("write a whole number from {}", range.start())))
        }
        _ => Err(refusal(flag, text, format!("write a whole number from {} to {}", range.start(), range.end()))),
    }
}

fn duration(flag: &str, text: &str) -> Result<Duration, String> {
    let duration = parse_duration(text).map_err(|reason| refusal(flag, text, reason))?;
    if duration.is_zero() || duration > DURATION_MAX {
        return Err(refusal(flag, text, "write a duration from 1ms to 1h"));
    }
    Ok(duration)
}

fn size(flag: &str, text: &str, max: u64) -> Result<u64, String> {
    let bytes = parse_size(text).map_err(|reason| refusal(flag, text, reason))?;
    match bytes {
        0 => Err(refusal(flag, text, "nothing would fit; write at least 1")),
        _ if bytes > max => Err(refusal(flag, text, format!("write at most {max} bytes"))),
        _ => Ok(bytes),
    }
}

/// The heartbeat interval, and the election timeout in ticks of it. Rounded up: an election timeout may be longer than
/// what was asked for, by less than one tick, and never shorter.
fn parse_ticks(heartbeat_text: &str, election_text: &str) -> Result<(Duration, usize), String> {
    let heartbeat = duration("--heartbeat-interval", heartbeat_text)?;
    let election = duration("--election-timeout", election_text)?;
    if election < heartbeat * HEARTBEATS_PER_ELECTION_TIMEOUT_MIN {
        let reason = format!(
            "shorter than {HEARTBEATS_PER_ELECTION_TIMEOUT_MIN} heartbeats of {heartbeat:?}; write {:?} or more, or \
             shorten --heartbeat-interval",
            heartbeat * HEARTBEATS_PER_ELECTION_TIMEOUT_MIN
        );
        return Err(refusal("--election-timeout", election_text, reason));
    }
    let ticks = election.as_nanos().div_ceil(heartbeat.as_nanos());
    Ok((heartbeat, usize::try_from(ticks).expect("an hour has fewer milliseconds than usize can count")))
}

fn parse_members(text: &str) -> Result<BTreeMap<NodeId, PeerUrl>, String> {
    let refuse = |item: &str, reason: String| refusal("--cluster", item, reason);
    let mut members = BTreeMap::new();
    for (position, item) in text.split(',').map(str::trim).enumerate() {
        // A URL of ours has no equals sign, so the first one ends an id.
        let (id, url) = match item.split_once('=') {
            Some((id, url)) => match parse_digits(id) {
                Some(id) if id > 0 => (id, url),
                _ => return Err(refuse(item, "write ID=URL with an id from 1, or the URL alone".to_owned())),
            },
            None => (position as u64 + 1, item),
        };
        let url = PeerUrl::parse(url).map_err(|reason| refuse(item, reason))?;
        if let Some((other, _)) = members.iter().find(|(_, known)| **known == url) {
            return Err(refuse(item, format!("member {other} has this URL already; give each member its own")));
        }
        if let Some(known) = members.insert(id, url) {
            return Err(refuse(item, format!("{known} has id {id} already; give each member its own")));
        }
    }
    Ok(members)
}

fn parse_host(flag: &str, text: &str) -> Result<Host<String>, String> {
    match text.parse() {
        Ok(IpAddr::V4(address)) => Ok(Host::Ipv4(address)),
        Ok(IpAddr::V6(address)) => Ok(Host::Ipv6(address)),
        Err(_) => Host::parse(text)
            .map_err(|_| refusal(flag, text, "no host name or address; write one such as 127.0.0.1 or 0.0.0.0")),
    }
}

fn parse_port(text: &str) -> Result<u16, String> {
    let port = whole_number("--port", text, 0..=u64::from(u16::MAX))?;
    Ok(u16::try_from(port).expect("the range was checked"))
}

fn is_unspecified(host: &Host<String>) -> bool {
    match host {
        Host::Domain(_) => false,
        Host::Ipv4(address) => *address == Ipv4Addr::UNSPECIFIED,
        Host::Ipv6(address) => address.is_unspecified(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What the flags become. The environment is not looked at: tests run wherever somebody has set RAFTEXAMPLE_ID.
    fn config(flags: &[&str]) -> Result<Config, String> {
        use clap::{CommandFactory, FromArgMatches};
        let command = Cli::command().mut_args(|arg| arg.env(None::<&str>));
        let matches = command.try_get_matches_from(std::iter::once("raftexample").chain(flags.iter().copied()));
        let matches = matches.map_err(|error| usage_error(&error))?;
        Config::from_cli(Cli::from_arg_matches(&matches).map_err(|error| usage_error(&error))?)
    }

    /// Asserts that the flags are refused in one line that has all of `words`.
    #[track_caller]
    fn assert_refused(flags: &[&str], words: &[&str]) {
        let line = config(flags).expect_err("accepted");
        for word in words {
            assert!(line.contains(word), "{word:?} is missing in: {line}");
        }
        assert!(!line.contains('\n'), "more than one line: {line}");
        assert!(!line.ends_with('.'), "ends with a period: {line}");
    }

    #[test]
    fn defaults() {
        let config = config(&[]).unwrap();
        assert_eq!(config.id, 1);
        assert_eq!(config.url.to_string(), "http://127.0.0.1:9021");
        assert_eq!(config.members, BTreeMap::from([(1, config.url.clone())]));
        assert_eq!(config.listen.to_string(), "127.0.0.1:9121");
        assert_eq!(config.peer_listen.to_string(), "127.0.0.1:9021");
        assert!(!config.join);
        assert_eq!(config.data_dir, PathBuf::from("raftexample-1"));
        assert_eq!(config.snapshot_count, 10_000);
        assert_eq!(config.snapshot_catchup_entries, 5000);
        assert_eq!(config.heartbeat_interval, Duration::from_millis(100));
        assert_eq!(config.election_ticks, 10);
        assert_eq!(config.election_timeout(), Duration::from_secs(1));
        assert_eq!(config.request_timeout, Duration::from_secs(5));
        assert_eq!(config.max_value_bytes, 1 << 20);
        assert_eq!(config.max_key_bytes, 4 << 10);
        assert_eq!(config.max_store_bytes, 1 << 30);
    }

    #[test]
    fn ids_by_position_and_by_name() {
        let config = config(&["--id", "7", "--cluster", "http://a:1, 7=http://B:2/,http://[::1]:3"]).unwrap();
        let members: Vec<String> = config.members.iter().map(|(id, url)| format!("{id}={url}")).collect();
        assert_eq!(members, ["1=http://a:1", "3=http://[::1]:3", "7=http://b:2"]);
        assert_eq!(config.url.to_string(), "http://b:2");
        assert_eq!(config.peer_listen.to_string(), "b:2");
        assert_eq!(config.data_dir, PathBuf::from("raftexample-7"));
    }

    #[test]
    fn bad_ids() {
        for id in ["0", "-1", "x", "", "+1", "1.0", "18446744073709551616", "\n"] {
            assert_refused(&["--id", id], &["--id", "whole number from 1"]);
        }
        assert_refused(&["--id", "4", "--cluster", "http://a:1,http://b:1"], &["--id '4'", "--cluster", "1, 2"]);
    }

    #[test]
    fn bad_members() {
        for (list, words) in [
            ("", ["''", "http://host:port"]),
            ("http://a:1,", ["''", "http://host:port"]),
            ("a:1", ["'a:1'", "http://host:port"]),
            ("https://a:1", ["'https://a:1'", "plain http"]),
            ("http://a", ["'http://a'", "port is missing"]),
            ("http://:1", ["'http://:1'", "host is missing"]),
            ("http://a:0", ["'0'", "1 to 65535"]),
            ("http://a:65536", ["'65536'", "1 to 65535"]),
            ("http://a:+1", ["'+1'", "1 to 65535"]),
            ("http://a:", ["''", "1 to 65535"]),
            ("http://a:1/x", ["'http://a:1/x'", "only a host and a port"]),
            ("http://a:1?x", ["'http://a:1?x'", "only a host and a port"]),
            ("http://u@a:1", ["'http://u@a:1'", "only a host and a port"]),
            ("http://a b:1", ["'a b'", "no host name"]),
            ("http://::1:1", ["'http://::1:1'", "in brackets"]),
            ("http://[::1:1", ["'[::1'", "no host name"]),
            ("http://256.0.0.1:1", ["'256.0.0.1'", "no host name"]),
            ("http://0.0.0.0:1", ["0.0.0.0:1", "--peer-listen"]),
            ("http://[::]:1", ["[::]:1", "--peer-listen"]),
            ("0=http://a:1", ["'0=http://a:1'", "id from 1"]),
            ("x=http://a:1", ["'x=http://a:1'", "id from 1"]),
            ("=http://a:1", ["'=http://a:1'", "id from 1"]),
            ("http://a:1,1=http://b:1", ["'1=http://b:1'", "has id 1 already"]),
            ("http://a:1,HTTP://A:1/", ["'HTTP://A:1/'", "member 1 has this URL"]),
        ] {
            assert_refused(&["--cluster", list], &["--cluster", words[0], words[1]]);
        }
    }

    #[test]
    fn addresses_to_listen_on() {
        let listen = |flags: &[&str]| config(flags).map(|config| (config.listen.to_string(), config.peer_listen));
        assert_eq!(listen(&["--host", "0.0.0.0", "--port", "0"]).unwrap().0, "0.0.0.0:0");
        assert_eq!(listen(&["--host", "::1"]).unwrap().0, "[::1]:9121");
        assert_eq!(listen(&["--host", "[::1]"]).unwrap().0, "[::1]:9121");
        assert_eq!(listen(&["--peer-listen", "[::]:5"]).unwrap().1.to_string(), "[::]:5");
        assert_refused(&["--host", "a b"], &["--host 'a b'", "127.0.0.1"]);
        assert_refused(&["--host", ""], &["--host ''"]);
        assert_refused(&["--port", "65536"], &["--port '65536'", "to 65535"]);
        assert_refused(&["--port", "http"], &["--port 'http'"]);
        assert_refused(&["--peer-listen", "9021"], &["--peer-listen '9021'", "host:port"]);
        assert_refused(&["--peer-listen", "a:0"], &["--peer-listen 'a:0'", "1 to 65535"]);
        assert_refused(&["--port", "9021"], &["--port '9021'", "127.0.0.1:9021", "choose another"]);
        assert_refused(&["--port", "5", "--peer-listen", "0.0.0.0:5"], &["--port '5'", "choose another"]);
    }

    #[test]
    fn election_timeouts_are_whole_ticks() {
        let ticks = |heartbeat, election| {
            config(&["--heartbeat-interval", heartbeat, "--election-timeout", election]).map(|c| c.election_ticks)
        };
        assert_eq!(ticks("100ms", "500ms"), Ok(5));
        assert_eq!(ticks("100ms", "501ms"), Ok(6));
        assert_eq!(ticks("1ms", "1h"), Ok(3_600_000));
        assert_eq!(ticks("7s", "1m"), Ok(9));
        let shorter = ["--election-timeout '499ms'", "5 heartbeats of 100ms", "500ms or more"];
        assert_refused(&["--election-timeout", "499ms"], &shorter);
        assert_refused(&["--heartbeat-interval", "1s"], &["--election-timeout '1000ms'", "--heartbeat-interval"]);
    }

    #[test]
    fn bad_durations() {
        for flag in ["--heartbeat-interval", "--election-timeout", "--request-timeout"] {
            for text in ["", "5", "s", "5 s", "-5", "1.5s", "5x", "0s", "61m", "99999999999999999999s", "2h"] {
                assert_refused(&[flag, text], &[flag, "write"]);
            }
        }
        assert_eq!(parse_duration("2m"), Ok(Duration::from_secs(120)));
    }

    #[test]
    fn sizes() {
        let sizes = |value, key, store| {
            config(&["--max-value-bytes", value, "--max-key-bytes", key, "--max-store-bytes", store])
                .map(|c| (c.max_value_bytes, c.max_key_bytes, c.max_store_bytes))
        };
        assert_eq!(sizes("16MiB", "64KiB", "3TiB"), Ok((16 << 20, 64 << 10, 3 << 40)));
        assert_eq!(sizes("1", "1b", "2 gib"), Ok((1, 1, 2 << 30)));
        assert_refused(&["--max-value-bytes", "16777217"], &["--max-value-bytes", "at most 16777216"]);
        assert_refused(&["--max-key-bytes", "65KiB"], &["--max-key-bytes", "at most 65536"]);
        for flag in ["--max-value-bytes", "--max-key-bytes", "--max-store-bytes"] {
            for text in ["", "0", "-1", "MiB", "1MB", "1.5MiB", "99999999999TiB", "99999999999999999999"] {
                assert_refused(&[flag, text], &[flag, "write"]);
            }
        }
    }

    #[test]
    fn snapshot_numbers() {
        let config = config(&["--snapshot-count", "1", "--snapshot-catchup-entries", "0"]).unwrap();
        assert_eq!((config.snapshot_count, config.snapshot_catchup_entries), (1, 0));
        assert_refused(&["--snapshot-count", "0"], &["--snapshot-count '0'", "from 1"]);
        assert_refused(&["--snapshot-catchup-entries", "-1"], &["--snapshot-catchup-entries '-1'", "from 0"]);
    }

    #[test]
    fn joining_needs_somebody_to_join() {
        assert_refused(&["--join"], &["--cluster", "--join"]);
        let config = config(&["--join", "--id", "4", "--cluster", "1=http://a:1,4=http://b:1"]).unwrap();
        assert!(config.join);
        assert_eq!(config.id, 4);
    }

    #[test]
    fn data_directories() {
        assert_eq!(config(&["--data-dir", "/x/y"]).unwrap().data_dir, PathBuf::from("/x/y"));
        assert_refused(&["--data-dir", ""], &["--data-dir"]);
    }

    #[test]
    fn errors_of_the_parser_are_one_line_too() {
        assert_refused(&["--prot", "1"], &["'--prot'", "'--port'", "try --help"]);
        assert_refused(&["--port"], &["--port", "value is required", "try --help"]);
        assert_refused(&["--id", "1", "--id", "2"], &["--id", "multiple times", "try --help"]);
        assert_refused(&["stray"], &["'stray'", "try --help"]);
    }

    #[test]
    fn every_flag_has_its_environment_variable() {
        use clap::CommandFactory;
        for arg in Cli::command().get_arguments().filter(|arg| !matches!(arg.get_id().as_str(), "help" | "version")) {
            let name = arg.get_long().expect("all are flags");
            let variable = format!("RAFTEXAMPLE_{}", name.replace('-', "_").to_ascii_uppercase());
            assert_eq!(arg.get_env().and_then(|name| name.to_str()), Some(variable.as_str()), "--{name}");
        }
    }

    #[test]
    fn cluster_ids_name_the_normalized_list() {
        let id = |list| config(&["--cluster", list]).unwrap().cluster_id().to_string();
        // The first half of `printf '1=http://a:1,2=http://b:2' | sha256sum`.
        assert_eq!(id("http://a:1,http://b:2"), "770c5e90c064010fb33cd16a622ebdc4");
        assert_eq!(id("2=HTTP://B:2/,1=http://a:1"), id("http://a:1,http://b:2"));
        assert_ne!(id("http://b:2,http://a:1"), id("http://a:1,http://b:2"));
    }
}
