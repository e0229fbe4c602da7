use std::collections::BTreeMap;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::process::ExitStatus;

use crate::cases::Bench;
use crate::client::{Client, Failure, Response};
use crate::support::{Process, program, read_text, wait_for};

/// In every directory: the cluster's identity is made of it, and a directory is started at other ports.
const PEER_URL: &str = "http://127.0.0.1:1";

/// A value and its tag.
type Item = (Vec<u8>, String);

/// A write that was sent and not answered: a deletion without a value.
#[derive(Clone, Debug)]
struct Unknown {
    key: String,
    value: Option<Vec<u8>>,
}

/// What clients were told.
#[derive(Clone, Debug, Default)]
pub(crate) struct Promises {
    items: BTreeMap<String, Item>,
    /// Writes under a token, which must not be applied again: key, value, token, tag.
    tokens: Vec<(String, Vec<u8>, String, String)>,
    unknown: Option<Unknown>,
}

/// How a script ended.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum End {
    /// The node is still there.
    Whole,
    /// The node went away, or said that it does.
    Cut,
}

/// A cluster of one, in the directory of a [`Bench`].
pub(crate) struct Node {
    pub(crate) data_dir: PathBuf,
    log: PathBuf,
    address: SocketAddr,
    peer_port: u16,
    process: Option<Process>,
}

impl Node {
    pub(crate) fn new(bench: &Bench) -> Node {
        Node {
            data_dir: bench.path().join("data"),
            log: bench.path().join("log"),
            address: SocketAddr::from((Ipv4Addr::LOCALHOST, bench.client_port)),
            peer_port: bench.peer_port,
            process: None,
        }
    }

    /// Starts it, with a log of its own, and waits for nothing.
    pub(crate) fn start(&mut self, flags: &[&str], variables: &[(String, String)]) {
        drop(self.process.take());
        let _ = std::fs::remove_file(&self.log);
        let mut command = program();
        command.args(["--cluster", PEER_URL, "--port", &self.address.port().to_string()]);
        command.args(["--peer-listen", &format!("127.0.0.1:{}", self.peer_port), "--snapshot-count", "1000000"]);
        // It has nobody to wait for.
        command.args(["--heartbeat-interval", "10ms", "--election-timeout", "50ms"]).args(flags);
        command.arg("--data-dir").arg(&self.data_dir).envs(variables.iter().cloned());
        self.process = Some(Process::spawn(&mut command, &self.log));
    }

    /// Waits until it serves or has ended. `true`: it serves.
    pub(crate) fn wait_ready(&mut self) -> bool {
        wait_for("a node that serves, or ends", || {
            if self.has_ended() {
                return Some(false);
            }
            let ready = Client::new(self.address).request("GET", "/_/readyz", &[], b"");
            ready.is_ok_and(|ready| ready.status == 200).then_some(true)
        })
    }

    pub(crate) fn has_ended(&mut self) -> bool {
        self.process.as_mut().expect("it was started").exit_status().is_some()
    }

    pub(crate) fn wait_end(&mut self) -> ExitStatus {
        self.process.as_mut().expect("it was started").wait()
    }

    pub(crate) fn kill(&mut self) {
        drop(self.process.take());
    }

    pub(crate) fn log(&self) -> String {
        read_text(&self.log)
    }

    pub(crate) fn client(&self) -> Client {
        Client::new(self.address)
    }

    /// The one line that says why it ended with status 1.
    pub(crate) fn last_words(&mut self) -> Result<String, String> {
        let status = self.wait_end();
        let log = self.log();
        let words: Vec<&str> = log.lines().filter(|line| line.starts_with("raftexample: ")).collect();
        match (status.code(), &words[..]) {
            (Some(1), [word]) if log.lines().last() == Some(word) && !word.contains("panicked") => {
                Ok((*word).to_owned())
            }
            _ => Err(format!("it ended with {status} and these words: {words:?}")),
        }
    }
}

/// Writes to a node, and keeps what it answers. After the first sign of its end nothing more is sent.
pub(crate) struct Script<'a> {
    client: Client,
    promises: &'a mut Promises,
}

impl<'a> Script<'a> {
    pub(crate) fn new(node: &Node, promises: &'a mut Promises) -> Self {
        Script { client: node.client(), promises }
    }

    pub(crate) fn put(&mut self, key: &str, value: &[u8]) -> Result<End, String> {
        self.put_with(key, value, None)
    }

    pub(crate) fn put_with(&mut self, key: &str, value: &[u8], token: Option<&str>) -> Result<End, String> {
        let headers: Vec<(&str, &str)> = token.map(|token| ("Idempotency-Key", token)).into_iter().collect();
        let answer = self.client.request("PUT", &format!("/{key}"), &headers, value);
        let unknown = Unknown { key: key.to_owned(), value: Some(value.to_vec()) };
        let Some(answer) = self.judge(answer, unknown)? else { return Ok(End::Cut) };
        let etag = answer.header("etag").ok_or("no ETag")?.to_owned();
        self.promises.items.insert(key.to_owned(), (value.to_vec(), etag.clone()));
        if let Some(token) = token {
            self.promises.tokens.push((key.to_owned(), value.to_vec(), token.to_owned(), etag));
        }
        Ok(End::Whole)
    }

    pub(crate) fn delete(&mut self, key: &str) -> Result<End, String> {
        let answer = self.client.request("DELETE", &format!("/{key}"), &[], b"");
        let Some(_) = self.judge(answer, Unknown { key: key.to_owned(), value: None })? else { return Ok(End::Cut) };
        self.promises.items.remove(key);
        Ok(End::Whole)
    }

    /// Returns a success. Of anything else it keeps what it may mean.
    fn judge(&mut self, answer: Result<Response, Failure>, unknown: Unknown) -> Result<Option<Response>, String> {
        match answer {
            Ok(answer) if answer.status == 204 => return Ok(Some(answer)),
            // Surely not applied: it must not be there later.
            Ok(answer) if answer.status == 503 && answer.outcome() == "not-applied" => {}
            Ok(answer) if answer.status == 504 && answer.outcome() == "unknown" => {
                self.promises.unknown = Some(unknown);
            }
            Ok(answer) => return Err(format!("{} {}", answer.status, answer.text())),
            Err(Failure::NotSent(_)) => {}
            Err(Failure::Lost(_)) => self.promises.unknown = Some(unknown),
            Err(Failure::TimedOut) => return Err("no answer in time".to_owned()),
        }
        Ok(None)
    }

    /// Asks for a snapshot until there is one; how often it was refused.
    pub(crate) fn snapshot(&mut self) -> Result<(End, usize), String> {
        for refused in 0..3 {
            match self.client.request("POST", "/_/snapshot", &[], b"") {
                Ok(answer) if answer.status == 200 => return Ok((End::Whole, refused)),
                Ok(answer) if answer.status == 507 => {}
                Ok(answer) if answer.status == 503 || answer.status == 504 => return Ok((End::Cut, refused)),
                Ok(answer) => return Err(format!("a snapshot: {} {}", answer.status, answer.text())),
                Err(Failure::TimedOut) => return Err("no answer in time".to_owned()),
                Err(_) => return Ok((End::Cut, refused)),
            }
        }
        Err("the snapshot was refused again, without a further fault".to_owned())
    }
}

impl Promises {
    /// Whether a node that is ready holds what was promised, and nothing else; and takes another write.
    pub(crate) fn check(&self, node: &Node) -> Result<(), String> {
        let mut client = node.client();
        let mut get = |method: &str, target: &str, headers: &[(&str, &str)], body: &[u8]| {
            client.request(method, target, headers, body).map_err(|failure| format!("{method} {target}: {failure}"))
        };
        let listed = get("GET", "/?limit=1000", &[], b"")?.json();
        let mut found = BTreeMap::new();
        for key in listed["keys"].as_array().ok_or("no listing")? {
            let key = key["key"].as_str().ok_or("no key")?.to_owned();
            let answer = get("GET", &format!("/{key}"), &[], b"")?;
            let etag = answer.header("etag").unwrap_or_default().to_owned();
            found.insert(key, (answer.body, etag));
        }
        if !self.allows(found.clone()) {
            return Err(format!(
                "promised were {:?}, and perhaps {:?}; found were {:?}",
                brief(&self.items),
                self.unknown.as_ref().map(|unknown| &unknown.key),
                brief(&found)
            ));
        }
        for (key, value, token, etag) in &self.tokens {
            let again = get("PUT", &format!("/{key}"), &[("Idempotency-Key", token)], value)?;
            if (again.status, again.header("etag")) != (204, Some(etag)) {
                return Err(format!("the token of {key} is forgotten: {} {:?}", again.status, again.header("etag")));
            }
        }
        let put = get("PUT", "/afterwards", &[], b"value")?;
        if put.status == 204 { Ok(()) } else { Err(format!("afterwards: {} {}", put.status, put.text())) }
    }

    fn allows(&self, mut found: BTreeMap<String, Item>) -> bool {
        if found == self.items {
            return true;
        }
        let Some(Unknown { key, value }) = &self.unknown else { return false };
        let mut promised = self.items.clone();
        promised.remove(key);
        found.remove(key).map(|(value, _)| value) == *value && found == promised
    }
}

fn brief(items: &BTreeMap<String, Item>) -> Vec<String> {
    let item = |(key, (value, etag)): (&String, &Item)| format!("{key} {etag} {} bytes", value.len());
    items.iter().map(item).collect()
}

/// Puts a copy of a directory, which is flat, in another's place.
pub(crate) fn copy_directory(from: &Path, to: &Path) {
    let _ = std::fs::remove_dir_all(to);
    std::fs::create_dir(to).unwrap();
    for entry in std::fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        std::fs::copy(entry.path(), to.join(entry.file_name())).unwrap();
    }
}
