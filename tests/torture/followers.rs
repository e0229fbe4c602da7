//! Who watches: followers of all changes, and an observer of the nodes.

use std::collections::BTreeMap;
use std::sync::PoisonError;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use raftexample::membership::NodeId;
use serde_json::Value;

use crate::client::Client;
use crate::history::Run;
use crate::members::{Door, Doors};
use crate::random::Random;

/// How long a follower lets a node wait for a change.
const WAIT: Duration = Duration::from_millis(500);

/// How long a request of an onlooker may take.
const CONNECT_TIMEOUT: Duration = Duration::from_millis(500);
const ANSWER_TIMEOUT: Duration = Duration::from_secs(4);

/// How often the nodes are asked how they are.
const OBSERVATION_INTERVAL: Duration = Duration::from_millis(200);

/// How long a node may take to say how it is.
const STATUS_TIMEOUT: Duration = Duration::from_millis(300);

/// How long followers may take, at the end of a run, to come to the last change.
const END_TIMEOUT: Duration = Duration::from_secs(60);

/// One change, as it was told.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Change {
    /// The log index.
    pub index: u64,
    /// Whether the key was set; else it was removed.
    pub put: bool,
    /// The key.
    pub key: String,
}

/// What a follower was told: all changes, in their order, if there are no gaps.
#[derive(Clone, Debug, Default)]
pub struct Feed {
    /// The changes.
    pub changes: Vec<Change>,
    /// There is nothing untold up to here.
    pub index: u64,
    /// Where history had been forgotten before the follower came to it.
    pub gaps: Vec<(u64, u64)>,
    /// Pages that had a change.
    pub pages: usize,
}

fn any_door(doors: &Doors, random: &mut Random) -> Option<Door> {
    let doors = doors.read().unwrap_or_else(PoisonError::into_inner);
    let open: Vec<&Door> = doors.iter().filter(|door| door.boot > 0).collect();
    (!open.is_empty()).then(|| **random.pick(&open))
}

/// Follows all changes, at any node and moving on from those that do not answer, until it has come to the index `end`,
/// which is not known before the end.
pub fn follow(run: &Run, doors: &Doors, mut random: Random, end: &AtomicU64) -> Feed {
    let mut feed = Feed::default();
    let mut client: Option<Client> = None;
    let mut deadline = None;
    while feed.index < end.load(Ordering::Relaxed) {
        if end.load(Ordering::Relaxed) != u64::MAX {
            let deadline = *deadline.get_or_insert_with(|| Instant::now() + END_TIMEOUT);
            if Instant::now() > deadline {
                run.violated(
                    format!("a follower came to index {} in {END_TIMEOUT:?}, not to the end", feed.index),
                    vec![],
                );
                break;
            }
        }
        if random.one_in(50) {
            client = None;
        }
        let Some(connection) = client.take().or_else(|| {
            let door = any_door(doors, &mut random)?;
            Some(Client::with_timeouts(door.direct, CONNECT_TIMEOUT, ANSWER_TIMEOUT))
        }) else {
            std::thread::sleep(CONNECT_TIMEOUT);
            continue;
        };
        match follow_once(connection, &mut feed) {
            Ok(connection) => client = connection,
            Err(problem) => {
                run.violated(format!("a page of changes that makes no sense: {problem}"), Vec::new());
                break;
            }
        }
    }
    feed
}

/// One request. Returns the connection, if it is good for another one.
fn follow_once(mut connection: Client, feed: &mut Feed) -> Result<Option<Client>, String> {
    let target = format!("/?prefix=&after-index={}&timeout={}ms", feed.index, WAIT.as_millis());
    let Ok(response) = connection.request("GET", &target, &[], b"") else { return Ok(None) };
    match response.status {
        200 => {
            let page: Value = serde_json::from_slice(&response.body).map_err(|error| error.to_string())?;
            let index = feed.index;
            take_page(&page, feed).ok_or_else(|| format!("after index {index}: {}", response.text()))?;
        }
        410 => {
            let page: Value = serde_json::from_slice(&response.body).map_err(|error| error.to_string())?;
            let restart = page["index"].as_u64().filter(|index| *index > feed.index).ok_or_else(|| response.text())?;
            feed.gaps.push((feed.index, restart));
            feed.index = restart;
        }
        503 => return Ok(None),
        other => return Err(format!("{other}: {}", response.text())),
    }
    Ok(Some(connection))
}

fn take_page(page: &Value, feed: &mut Feed) -> Option<()> {
    let index = page["index"].as_u64().filter(|index| *index >= feed.index)?;
    let mut last = feed.index;
    let changes = page["changes"].as_array()?;
    for change in changes {
        let change = Change {
            index: change["index"].as_u64().filter(|index| *index > last)?,
            put: match change["op"].as_str()? {
                "put" => true,
                "delete" => false,
                _ => return None,
            },
            key: change["key"].as_str()?.to_owned(),
        };
        last = change.index;
        feed.changes.push(change);
    }
    feed.pages += usize::from(!changes.is_empty());
    feed.index = index;
    (last <= index).then_some(())
}

/// What a node said of itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Observation {
    /// When.
    pub at: Duration,
    /// Which node.
    pub node: NodeId,
    /// `leader` and the like.
    pub role: String,
    /// Its term.
    pub term: u64,
}

/// Asks all nodes how they are until the run is over, and writes down what changes. No two may lead in one term.
pub fn observe(run: &Run, doors: &Doors, over: &AtomicU64) -> Vec<Observation> {
    let mut observations: Vec<Observation> = Vec::new();
    let mut last: BTreeMap<NodeId, (String, u64)> = BTreeMap::new();
    let mut leaders: BTreeMap<u64, NodeId> = BTreeMap::new();
    while over.load(Ordering::Relaxed) == u64::MAX {
        let open = doors.read().unwrap_or_else(PoisonError::into_inner).clone();
        for door in open.iter().filter(|door| door.boot > 0) {
            let mut client = Client::with_timeouts(door.direct, STATUS_TIMEOUT, STATUS_TIMEOUT);
            let Ok(response) = client.request("GET", "/_/status", &[], b"") else { continue };
            let Ok(status) = serde_json::from_slice::<Value>(&response.body) else { continue };
            let (Some(role), Some(term)) = (status["role"].as_str(), status["term"].as_u64()) else { continue };
            if role == "leader" && *leaders.entry(term).or_insert(door.id) != door.id {
                run.violated(format!("nodes {} and {} both lead in term {term}", leaders[&term], door.id), Vec::new());
            }
            let now = (role.to_owned(), term);
            if last.insert(door.id, now.clone()).as_ref() != Some(&now) {
                observations.push(Observation { at: run.now(), node: door.id, role: now.0, term });
            }
        }
        std::thread::sleep(OBSERVATION_INTERVAL);
    }
    observations
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn taken(page: &Value) -> Option<Feed> {
        let mut feed = Feed { index: 10, ..Feed::default() };
        take_page(page, &mut feed).map(|()| feed)
    }

    #[test]
    fn pages_that_go_back_or_skip_their_own_end_are_found() {
        let change = |index: u64, op: &str| json!({"index": index, "op": op, "key": "k"});
        let good = json!({"index": 20, "changes": [change(11, "put"), change(15, "delete")]});
        let feed = taken(&good).unwrap();
        assert_eq!((feed.index, feed.changes.len(), feed.changes[1].put), (20, 2, false));
        assert!(taken(&json!({"index": 10, "changes": []})).is_some());
        for bad in [
            json!({"index": 9, "changes": []}),
            json!({"index": 20, "changes": [change(10, "put")]}),
            json!({"index": 20, "changes": [change(12, "put"), change(12, "put")]}),
            json!({"index": 20, "changes": [change(21, "put")]}),
            json!({"index": 20, "changes": [change(12, "moved")]}),
            json!({"changes": []}),
        ] {
            assert!(taken(&bad).is_none(), "{bad}");
        }
    }
}
