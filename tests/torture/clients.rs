//! Clients: each does one thing at a time, at any node, and writes down what it was told.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, PoisonError};
use std::time::Duration;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde_json::Value;

use crate::client::{self, Failure, Response};
use crate::history::{Condition, End, Item, Operation, Request, Run, bytes_of, value_of};
use crate::members::{Door, Doors};
use crate::random::Random;

/// Registers that are used at a time: few, so that clients get into each other's way.
const SLOTS: u64 = 6;

/// Requests after which a register is left for a new one: the search for an order of them takes memory and time that
/// grow faster than their number.
const REQUESTS_PER_REGISTER: u64 = 300;

/// The same for writes whose end nobody knows: each of them doubles what has to be tried.
const UNKNOWN_PER_REGISTER: u64 = 10;

/// How long a client waits for a connection: longer than a busy machine takes.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(1);

/// How long it waits for an answer: longer than a node may take, see `--request-timeout` of [`crate::torture`].
const ANSWER_TIMEOUT: Duration = Duration::from_secs(4);

/// Attempts under one token, at one node after the other.
const ATTEMPTS_MAX: u32 = 6;

/// Between two requests of a client, so that the machine has some air.
const THINKING_MAX: Duration = Duration::from_millis(8);

/// After a failure: all may be down.
const FAILURE_PAUSE_MAX: Duration = Duration::from_millis(60);

/// A register that is used for a while.
#[derive(Default)]
pub struct Slot {
    generation: AtomicU64,
    requests: AtomicU64,
    unknown: AtomicU64,
}

/// The registers of a run.
pub struct Slots(Vec<Slot>);

impl Slots {
    /// Those that all clients of a run share.
    pub fn new() -> Slots {
        Slots((0..SLOTS).map(|_| Slot::default()).collect())
    }

    /// The name of the register in a slot, which will be asked for something.
    fn take(&self, number: u64) -> String {
        let slot = &self.0[number as usize];
        if slot.requests.fetch_add(1, Ordering::Relaxed) == REQUESTS_PER_REGISTER {
            self.renew(slot);
        }
        format!("r/{number}/{}", slot.generation.load(Ordering::Relaxed))
    }

    fn lost(&self, number: u64) {
        let slot = &self.0[number as usize];
        if slot.unknown.fetch_add(1, Ordering::Relaxed) == UNKNOWN_PER_REGISTER {
            self.renew(slot);
        }
    }

    fn renew(&self, slot: &Slot) {
        slot.generation.fetch_add(1, Ordering::Relaxed);
        slot.requests.store(0, Ordering::Relaxed);
        slot.unknown.store(0, Ordering::Relaxed);
    }
}

/// A way in that is in use.
struct Connection {
    door: Door,
    client: client::Client,
}

/// One client.
pub struct Client {
    number: usize,
    random: Random,
    run: Arc<Run>,
    doors: Doors,
    slots: Arc<Slots>,
    connection: Option<Connection>,
    /// For each slot, the register and the last tag that a read or a write of it has told.
    tags: Vec<(String, Option<u64>)>,
    /// Keys of its own that it has added.
    added: u64,
    tokens: u64,
    /// What it has done.
    pub operations: Vec<Operation>,
}

/// An attempt without an answer.
enum Miss {
    /// It surely had no effect.
    Refused(u16),
    /// It may have had one.
    Unknown,
}

/// What is sent.
struct Message<'a> {
    method: &'a str,
    target: String,
    headers: Vec<(&'a str, String)>,
    body: Vec<u8>,
}

impl Client {
    pub fn new(number: usize, random: Random, run: Arc<Run>, doors: Doors, slots: Arc<Slots>) -> Client {
        let tags = vec![(String::new(), None); SLOTS as usize];
        let operations = Vec::new();
        Client { number, random, run, doors, slots, connection: None, tags, added: 0, tokens: 0, operations }
    }

    /// Goes on until it is to stop.
    pub fn work(mut self) -> Vec<Operation> {
        while !self.run.stopping() {
            match self.random.below(100) {
                0..78 => self.use_register(),
                78..88 => self.add(),
                88..95 => self.list(),
                _ => self.read_own(),
            }
            // The one who holds on to a node misses what only others see.
            if self.random.one_in(20) {
                self.connection = None;
            }
            let pause = self.random.time(&(Duration::ZERO..THINKING_MAX));
            std::thread::sleep(pause);
        }
        self.operations
    }

    fn use_register(&mut self) {
        let slot = self.random.below(SLOTS);
        let key = self.slots.take(slot);
        let tag = Some(&self.tags[slot as usize]).filter(|(known, _)| *known == key).and_then(|(_, tag)| *tag);
        let if_tag = |tag: Option<u64>| tag.map_or(Condition::Absent, Condition::Tag);
        let request = match self.random.below(100) {
            0..34 => Request::Read { fresh: true, after_index: None },
            34..42 => Request::Read { fresh: false, after_index: None },
            42..45 => Request::Read { fresh: true, after_index: Some(tag.unwrap_or_else(|| self.run.newest())) },
            45..72 => Request::Put(self.run.next_value(), Condition::Always),
            72..86 => Request::Put(self.run.next_value(), if_tag(tag)),
            86..94 => Request::Delete(Condition::Always),
            _ => Request::Delete(tag.map_or(Condition::Always, Condition::Tag)),
        };
        let token = request.is_write() && self.random.one_in(3);
        let plain_read = request == Request::Read { fresh: true, after_index: None };
        let (is_write, end) = (request.is_write(), self.perform(key.clone(), request, token));
        let told = match end {
            // Only what the check of this register knows of: a condition on another tag would make no sense to it.
            End::Found { value: Some(_), tag, .. } if plain_read => Some(Some(tag)),
            End::Missing { .. } if plain_read => Some(None),
            End::Stored(tag) => Some(Some(tag)),
            End::Deleted | End::Absent => Some(None),
            End::Failed(tag) => Some(tag),
            _ => None,
        };
        if let Some(tag) = told {
            self.tags[slot as usize] = (key, tag);
        }
        if is_write && end == End::Unknown {
            self.slots.lost(slot);
        }
    }

    /// Adds a key that nobody else has: it must be there at the end.
    fn add(&mut self) {
        let key = format!("s/{}/{}", self.number, self.added);
        self.added += 1;
        let condition = if self.random.one_in(2) { Condition::Absent } else { Condition::Always };
        let token = self.random.one_in(3);
        let value = self.run.next_value();
        self.perform(key, Request::Put(value, condition), token);
    }

    /// Reads a key that it may have added.
    fn read_own(&mut self) {
        let key = format!("s/{}/{}", self.number, self.random.below(self.added + 1));
        let fresh = !self.random.one_in(3);
        self.perform(key, Request::Read { fresh, after_index: None }, false);
    }

    fn list(&mut self) {
        let prefix = match self.random.below(3) {
            0 => "r/".to_owned(),
            1 => format!("s/{}/", self.number),
            _ => String::new(),
        };
        let after = self.random.one_in(2).then(|| format!("{prefix}{}", self.random.below(10)));
        let limit = 1 + self.random.below(40) as usize;
        let fresh = !self.random.one_in(3);
        self.perform(prefix, Request::List { fresh, after, limit }, false);
    }

    /// Sends a request until its end is known, as far as that is safe, and writes it down.
    fn perform(&mut self, key: String, request: Request, token: bool) -> End {
        let token_name = token.then(|| {
            self.tokens += 1;
            format!("client-{}-{}", self.number, self.tokens)
        });
        let mut operation = Operation {
            client: self.number,
            node: 0,
            boot: 0,
            key,
            request,
            token,
            attempts: 0,
            called: self.run.now(),
            returned: Duration::ZERO,
            floor: self.run.newest(),
            end: End::Refused(0),
        };
        let attempts_max = if token { ATTEMPTS_MAX } else { 1 };
        let mut refused = true;
        while operation.attempts < attempts_max {
            operation.attempts += 1;
            match self.attempt(&mut operation, token_name.as_deref()) {
                Ok(end) => {
                    operation.end = end;
                    break;
                }
                Err(miss) => {
                    refused &= matches!(miss, Miss::Refused(_));
                    operation.end = match miss {
                        Miss::Refused(status) if refused => End::Refused(status),
                        _ => End::Unknown,
                    };
                    self.connection = None;
                    let pause = self.random.time(&(Duration::ZERO..FAILURE_PAUSE_MAX));
                    self.run.pause(pause);
                }
            }
        }
        operation.returned = self.run.now();
        if self.doors().iter().all(|door| (door.id, door.boot) != (operation.node, operation.boot)) {
            // It was started again meanwhile, and nobody can tell which of the two has answered.
            operation.boot = 0;
            self.connection = None;
        }
        self.run.told(&operation);
        let end = operation.end.clone();
        if let Some(name) = token_name
            && end.is_answer()
            && self.random.one_in(6)
        {
            self.repeat(&operation, &name);
        }
        self.operations.push(operation);
        end
    }

    /// Sends a request under a token again whose end is known, or another one under that token.
    fn repeat(&mut self, operation: &Operation, token: &str) {
        self.connection = None;
        let other = self.random.one_in(8);
        let mut again = operation.clone();
        if other {
            again.key.push_str("/other");
        }
        let message = message(&again.key, &again.request, Some(token), &mut self.random);
        let Some(connection) = self.connect(&mut again) else { return };
        let Ok(response) = send(&mut connection.client, &message) else { return self.connection = None };
        if matches!(response.status, 503 | 504 | 507) {
            return;
        }
        if other {
            if response.status != 422 {
                let what = format!("a token of another write was answered with {}", response.status);
                self.run.violated(what, vec![operation.clone()]);
            }
            return;
        }
        let end = read_answer(&again, &response).unwrap_or(End::Unknown);
        if end != operation.end {
            let what = format!("a repeat under a token was answered with {end:?} and not with {:?}", operation.end);
            again.end = end;
            self.run.violated(what, vec![operation.clone(), again]);
        }
    }

    fn doors(&self) -> Vec<Door> {
        self.doors.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Writes a key of its own at one node; whether that was acknowledged.
    pub fn write_at(&mut self, door: Door) -> bool {
        let client = client::Client::with_timeouts(door.direct, CONNECT_TIMEOUT, ANSWER_TIMEOUT);
        self.connection = Some(Connection { door, client });
        let key = format!("h/{}/{}", self.number, self.added);
        self.added += 1;
        let value = self.run.next_value();
        matches!(self.perform(key, Request::Put(value, Condition::Always), false), End::Stored(_))
    }

    /// The connection in use, or a new one at any node.
    fn connect(&mut self, operation: &mut Operation) -> Option<&mut Connection> {
        if self.connection.is_none() {
            let doors = self.doors();
            let open: Vec<Door> = doors.iter().copied().filter(|door| door.boot > 0).collect();
            // Now and then one that is down: it must not answer, and a proxy before it must say so.
            let choice = if open.is_empty() || self.random.one_in(30) { &doors } else { &open };
            if choice.is_empty() {
                return None;
            }
            let door = *self.random.pick(choice);
            let address = if self.random.one_in(2) { door.direct } else { door.detour };
            let client = client::Client::with_timeouts(address, CONNECT_TIMEOUT, ANSWER_TIMEOUT);
            self.connection = Some(Connection { door, client });
        }
        let connection = self.connection.as_mut()?;
        (operation.node, operation.boot) = (connection.door.id, connection.door.boot);
        Some(connection)
    }

    fn attempt(&mut self, operation: &mut Operation, token: Option<&str>) -> Result<End, Miss> {
        let message = message(&operation.key, &operation.request, token, &mut self.random);
        let connection = self.connect(operation).ok_or(Miss::Refused(0))?;
        let response = send(&mut connection.client, &message).map_err(|failure| match failure {
            Failure::NotSent(_) => Miss::Refused(0),
            Failure::Lost(_) | Failure::TimedOut => Miss::Unknown,
        })?;
        let outcome = response.outcome();
        match (response.status, outcome.as_str(), operation.request.is_write()) {
            (503 | 507, "not-applied", true) | (503, "", false) | (410, "", false) => {
                Err(Miss::Refused(response.status))
            }
            (504, "unknown", true) => Err(Miss::Unknown),
            (status, ..) => read_answer(operation, &response).map_err(|problem| {
                let what = format!("an answer that makes no sense, {status}: {problem}: {}", response.text());
                self.run.violated(what, vec![operation.clone()]);
                Miss::Unknown
            }),
        }
    }
}

fn send(client: &mut client::Client, message: &Message<'_>) -> Result<Response, Failure> {
    let headers: Vec<(&str, &str)> = message.headers.iter().map(|(name, value)| (*name, value.as_str())).collect();
    client.request(message.method, &message.target, &headers, &message.body)
}

/// The HTTP request. Where there are several that ask for the same, any of them.
fn message<'a>(key: &str, request: &Request, token: Option<&str>, random: &mut Random) -> Message<'a> {
    let mut headers: Vec<(&str, String)> =
        token.map(|token| ("Idempotency-Key", token.to_owned())).into_iter().collect();
    if let Request::Put(_, condition) | Request::Delete(condition) = request {
        match condition {
            Condition::Always => {}
            Condition::Absent => headers.push(("If-None-Match", "*".to_owned())),
            // Another tag in the list, which no key can have.
            Condition::Tag(tag) if tag % 2 == 0 => headers.push(("If-Match", format!("\"0\", \"{tag}\""))),
            Condition::Tag(tag) => headers.push(("If-Match", format!("\"{tag}\""))),
        }
    }
    let consistency = |fresh: &bool| if *fresh { "" } else { "&consistency=stale" };
    let (method, target, body) = match request {
        Request::Put(value, _) => ("PUT", format!("/{key}"), bytes_of(*value)),
        Request::Delete(_) => ("DELETE", format!("/{key}"), Vec::new()),
        Request::Read { after_index: Some(index), .. } => {
            ("GET", format!("/{key}?after-index={index}&timeout={}ms", random.below(300)), Vec::new())
        }
        Request::Read { fresh: false, .. } => ("GET", format!("/{key}?consistency=stale"), Vec::new()),
        Request::Read { fresh: true, .. } => ("GET", format!("/{key}"), Vec::new()),
        Request::List { fresh, after, limit } => {
            let after = after.as_ref().map_or_else(String::new, |after| format!("&after={after}"));
            let values = if random.one_in(3) { "&values=true" } else { "" };
            let target = format!("/?prefix={key}&limit={limit}{after}{values}{}", consistency(fresh));
            ("GET", target, Vec::new())
        }
    };
    Message { method, target, headers, body }
}

/// Reads a tag as it stands in `ETag`.
fn tag_of(text: &str) -> Option<u64> {
    text.strip_prefix('"')?.strip_suffix('"')?.parse().ok()
}

/// What an answer says, if it makes sense for what was asked.
fn read_answer(operation: &Operation, response: &Response) -> Result<End, &'static str> {
    let tag = response.header("etag").map(|text| tag_of(text).ok_or("a malformed ETag")).transpose()?;
    let index = || {
        let text = response.header("raftexample-index").ok_or("no Raftexample-Index")?;
        text.parse::<u64>().map_err(|_| "a malformed Raftexample-Index")
    };
    match (&operation.request, response.status, tag) {
        (Request::Put(..), 204, Some(tag)) => Ok(End::Stored(tag)),
        (Request::Delete(_), 204, None) => Ok(End::Deleted),
        (Request::Delete(Condition::Always), 404, None) => Ok(End::Absent),
        (Request::Put(_, condition) | Request::Delete(condition), 412, tag) if *condition != Condition::Always => {
            Ok(End::Failed(tag))
        }
        (Request::Read { .. }, 200, Some(tag)) => {
            let value = value_of(&response.body).ok_or("a value that nobody has written")?;
            Ok(End::Found { value: Some(value), tag, index: index()? })
        }
        (Request::Read { .. }, 404, None) => Ok(End::Missing { index: index()? }),
        (Request::Read { after_index: Some(_), .. }, 304, Some(tag)) => {
            Ok(End::Found { value: None, tag, index: index()? })
        }
        (Request::Read { after_index: Some(_), .. }, 304, None) => Ok(End::Missing { index: index()? }),
        (Request::List { after, limit, .. }, 200, None) => {
            let listed = read_page(&response.body)?;
            check_page(&listed, &operation.key, after.as_deref(), *limit, index()?)?;
            Ok(listed)
        }
        _ => Err("another status, or another ETag, than such a request can have"),
    }
}

/// A page of a listing, from its JSON.
pub fn read_page(body: &[u8]) -> Result<End, &'static str> {
    let page: Value = serde_json::from_slice(body).map_err(|_| "no JSON")?;
    let index = page["index"].as_u64().ok_or("no index")?;
    let keys = page["keys"].as_array().ok_or("no keys")?;
    let item = |item: &Value| {
        let key = item["key"].as_str().ok_or("an item without a key")?.to_owned();
        let tag = item["etag"].as_str().and_then(tag_of).ok_or("an item without a tag")?;
        let value = match item["value"].as_str() {
            None => None,
            Some(text) => {
                let bytes = STANDARD.decode(text).map_err(|_| "a value that is no base64")?;
                Some(value_of(&bytes).ok_or("a value that nobody has written")?)
            }
        };
        Ok::<_, &'static str>(Item { key, tag, value })
    };
    let items = keys.iter().map(item).collect::<Result<Vec<Item>, _>>()?;
    Ok(End::Listed { index, items, more: !page["next"].is_null() })
}

fn check_page(page: &End, prefix: &str, after: Option<&str>, limit: usize, index: u64) -> Result<(), &'static str> {
    let End::Listed { index: cut, items, more } = page else { return Err("no page") };
    let sorted = items.windows(2).all(|pair| pair[0].key < pair[1].key);
    let within = items.iter().all(|item| item.key.starts_with(prefix) && after.is_none_or(|after| *item.key > *after));
    match () {
        () if *cut != index => Err("two indexes"),
        () if !sorted => Err("keys that are not in order"),
        () if !within => Err("keys that were not asked for"),
        () if items.len() > limit => Err("more keys than were asked for"),
        () if *more && items.is_empty() => Err("an empty page that is not the last"),
        () => Ok(()),
    }
}
