//! The operator: hands leadership over, asks for snapshots, and replaces members, while all else goes on.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use raftexample::membership::NodeId;
use serde_json::{Value, json};

use crate::chaos::{Log, lock};
use crate::client::{Client, Response};
use crate::history::Run;
use crate::members::{Doors, Members, Standing};
use crate::random::Random;

/// Between two things that the operator does.
const PAUSE: std::ops::Range<Duration> = Duration::from_millis(300)..Duration::from_secs(4);

/// Before a request that was refused is sent again.
const REPEAT_PAUSE: Duration = Duration::from_millis(200);

const CONNECT_TIMEOUT: Duration = Duration::from_secs(1);
const ANSWER_TIMEOUT: Duration = Duration::from_secs(6);

/// How long a change of the members may take from the moment when all faults are over.
const CHANGE_TIMEOUT: Duration = Duration::from_secs(60);

/// The operator.
pub struct Operator {
    /// What the run shares.
    pub run: Arc<Run>,
    /// The nodes.
    pub members: Arc<Mutex<Members>>,
    /// Where they are.
    pub doors: Doors,
    /// What was done.
    pub log: Arc<Log>,
    /// Chooses what to do.
    pub random: Random,
}

impl Operator {
    /// Goes on until the run stops, and brings to an end what was begun.
    pub fn work(mut self) {
        while !self.run.stopping() {
            let pause = self.random.time(&PAUSE);
            self.run.pause(pause);
            match self.random.below(10) {
                _ if self.run.stopping() => {}
                0..4 => self.hand_over(),
                4..7 => self.take_snapshot(),
                _ => self.replace(),
            }
        }
    }

    /// Asks any node that is up; `None` if there is no answer.
    fn ask(&mut self, method: &str, target: &str, body: &[u8]) -> Option<Response> {
        let doors = self.doors.read().unwrap_or_else(PoisonError::into_inner).clone();
        let open: Vec<_> = doors.iter().filter(|door| door.boot > 0).collect();
        if open.is_empty() {
            return None;
        }
        let address = self.random.pick(&open).direct;
        Client::with_timeouts(address, CONNECT_TIMEOUT, ANSWER_TIMEOUT).request(method, target, &[], body).ok()
    }

    fn hand_over(&mut self) {
        let nodes = lock(&self.members).staying();
        let to = *self.random.pick(&nodes);
        let event = self.log.begin(&self.run, "hand-over", format!("leadership to {to}"), &[to]);
        let response = self.ask("PUT", "/_/leader", to.to_string().as_bytes());
        self.expect(&["204", "409", "503", "504"], "a hand-over", response.as_ref());
        self.log.end(&self.run, event);
    }

    fn take_snapshot(&mut self) {
        let event = self.log.begin(&self.run, "snapshot", "a snapshot somewhere".to_owned(), &[]);
        let response = self.ask("POST", "/_/snapshot", b"");
        self.expect(&["200", "503", "504", "507"], "a snapshot", response.as_ref());
        self.log.end(&self.run, event);
    }

    fn expect(&self, statuses: &[&str], what: &str, response: Option<&Response>) {
        if let Some(response) = response.filter(|response| !statuses.contains(&response.status.to_string().as_str())) {
            let what = format!("{what} was answered with {}: {}", response.status, response.text());
            self.run.violated(what, Vec::new());
        }
    }

    /// One member for another, one step after the other or in one.
    fn replace(&mut self) {
        let staying = lock(&self.members).staying();
        let old = *self.random.pick(&staying);
        let behind_proxy = self.random.one_in(2);
        let prepared = lock(&self.members).prepare_joiner(behind_proxy);
        let (new, url) = match prepared {
            Ok(prepared) => prepared,
            Err(problem) => return self.run.violated(format!("no place for a new node: {problem}"), Vec::new()),
        };
        lock(&self.members).start(new);
        let event = self.log.begin(&self.run, "replacement", format!("{new} for {old}"), &[old, new]);
        let done = if self.random.one_in(3) {
            self.replace_at_once(old, new, &url)
        } else {
            self.repeat("PUT", &format!("/_/members/{new}"), url.as_bytes(), "204")
                && self.repeat("PUT", &format!("/_/members/{new}?role=voter"), url.as_bytes(), "204")
                && self.remove(old, new)
        };
        if done {
            self.log.end(&self.run, event);
        }
    }

    fn remove(&mut self, old: NodeId, new: NodeId) -> bool {
        self.takes_over(old, new);
        self.repeat("DELETE", &format!("/_/members/{old}"), b"", "204")
    }

    /// From here on the old one may end.
    fn takes_over(&self, old: NodeId, new: NodeId) {
        let mut members = lock(&self.members);
        members.member_mut(new).standing = Standing::Member;
        members.member_mut(old).standing = Standing::Leaving;
    }

    fn replace_at_once(&mut self, old: NodeId, new: NodeId, url: &str) -> bool {
        let members = lock(&self.members);
        let mut wanted: Vec<Value> = Vec::new();
        for id in members.staying().into_iter().filter(|id| *id != old && *id != new) {
            wanted.push(json!({"id": id, "url": members.member(id).place.peer_url, "role": "voter"}));
        }
        drop(members);
        wanted.push(json!({"id": new, "url": url, "role": "voter"}));
        self.takes_over(old, new);
        let wanted = Value::from(wanted).to_string();
        self.repeat("PUT", "/_/members", wanted.as_bytes(), "200")
    }

    /// Sends a request until it is answered with `success`.
    fn repeat(&mut self, method: &str, target: &str, body: &[u8], success: &str) -> bool {
        let mut deadline = None;
        let mut last = String::new();
        loop {
            let response = self.ask(method, target, body);
            match &response {
                Some(response) if response.status.to_string() == success => return true,
                Some(response) => last = format!("{} {}", response.status, response.text()),
                None => {}
            }
            self.expect(&["409", "503", "504"], &format!("{method} {target}"), response.as_ref());
            if self.run.is_violated() {
                return false;
            }
            // As long as there are faults, it may take any time.
            if self.run.stopping() {
                let deadline = *deadline.get_or_insert_with(|| Instant::now() + CHANGE_TIMEOUT);
                if Instant::now() > deadline {
                    let what = format!("{method} {target} is not done {CHANGE_TIMEOUT:?} after the end of all faults");
                    self.run.violated(format!("{what}; the last answer: {last}"), Vec::new());
                    return false;
                }
            }
            std::thread::sleep(REPEAT_PAUSE);
        }
    }
}
