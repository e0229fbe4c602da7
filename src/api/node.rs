//! The node API, under `/_/`: what the node says of itself, and changes of the membership and the leadership.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use crate::config::PeerUrl;
use crate::http::Response;
use crate::membership::{Membership, NodeId};
use crate::message::{AdminReply, AdminRequest, Backend, MemberProgress, Status, Transfer};

use super::problem::Problem;
use super::request::parse_id;
use super::{Api, answer};

/// How long `/_/readyz` may take: a probe wants to know now.
const READY_TIMEOUT: Duration = Duration::from_secs(1);

/// How long `/_/status` waits for the driver, which is never busy for longer unless the disk is.
const STATUS_TIMEOUT: Duration = Duration::from_secs(5);

/// How long a snapshot may take: it writes the whole store, a gigabyte by default.
const SNAPSHOT_TIMEOUT: Duration = Duration::from_secs(60);

/// What is said behind a membership change whose outcome is unknown.
const LOOK_FIRST: &str = "Read /_/members and /_/status before you send it again.";

#[derive(Serialize)]
struct StatusDocument<'s> {
    id: NodeId,
    role: &'static str,
    leader: NodeId,
    term: u64,
    commit_index: u64,
    applied_index: u64,
    first_index: u64,
    last_index: u64,
    snapshot_index: u64,
    members: Vec<MemberDocument<'s>>,
    /// What the leader does at present for a request to change the cluster.
    #[serde(skip_serializing_if = "Option::is_none")]
    change: Option<&'s str>,
    keys: u64,
    uptime_ms: u64,
    version: &'static str,
}

#[derive(Serialize)]
struct MembersDocument<'s> {
    members: Vec<MemberDocument<'s>>,
}

#[derive(Serialize)]
struct MemberDocument<'s> {
    id: NodeId,
    url: &'s str,
    role: MemberRole,
    #[serde(flatten)]
    progress: Option<ProgressDocument>,
}

/// What only the leader knows of a member.
#[derive(Serialize)]
struct ProgressDocument {
    match_index: u64,
    /// Entries of the leader's log that are not known to be in the member's.
    lag: u64,
    /// `null` if it was not heard from in this term.
    last_contact_ms: Option<u64>,
    /// A snapshot that is being sent to it.
    #[serde(skip_serializing_if = "Option::is_none")]
    snapshot: Option<TransferDocument>,
}

#[derive(Serialize)]
struct TransferDocument {
    index: u64,
    /// Bytes sent so far, of `size`.
    sent: u64,
    size: u64,
}

/// A member as `PUT /_/members` takes it.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct WantedMember {
    id: NodeId,
    url: String,
    role: MemberRole,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
enum MemberRole {
    Voter,
    Learner,
}

#[derive(Serialize)]
struct SnapshotDocument {
    index: u64,
    size: u64,
}

/// What a probe gets that only looks at the status code.
#[derive(Serialize)]
struct GoodDocument {
    status: &'static str,
}

const GOOD: GoodDocument = GoodDocument { status: "ok" };

impl<B: Backend> Api<B> {
    pub(super) fn status(&self) -> Result<Response, Problem> {
        // These first: what is applied was committed before the status is asked for.
        let (applied_index, keys) = self.backend.applied();
        let status = self.backend.status(Instant::now() + STATUS_TIMEOUT)?;
        let document = StatusDocument {
            id: status.id,
            role: status.role,
            leader: status.leader,
            term: status.term,
            commit_index: status.commit_index,
            applied_index,
            first_index: status.first_index,
            last_index: status.last_index,
            snapshot_index: status.snapshot_index,
            members: members_with_progress(&status),
            change: status.change.as_deref(),
            keys,
            uptime_ms: millis(self.backend.uptime()),
            version: env!("CARGO_PKG_VERSION"),
        };
        Ok(answer::json(&document, None))
    }

    pub(super) fn live(&self) -> Result<Response, Problem> {
        self.backend
            .live()
            .map_err(|thread| Problem::new(503, format!("the {thread} has made no progress for 10 seconds")))?;
        Ok(answer::json(&GOOD, None))
    }

    pub(super) fn ready(&self, session: &mut B::Session) -> Result<Response, Problem> {
        let version = self.backend.read(session, Instant::now() + READY_TIMEOUT)?;
        Ok(answer::json(&GOOD, Some(version.applied_index())))
    }

    /// Asks nobody: what the other threads have to say they have counted, or left where it can be seen.
    pub(super) fn metrics(&self) -> Response {
        answer::metrics(self.metrics.text())
    }

    pub(super) fn members(&self, session: &mut B::Session) -> Result<Response, Problem> {
        let deadline = self.deadline();
        // The driver has applied the membership of whatever this confirms.
        let version = self.backend.read(session, deadline)?;
        let status = self.backend.status(deadline)?;
        Ok(answer::json(&members_document(&status.membership), Some(version.applied_index())))
    }

    pub(super) fn add_member(&self, id: NodeId, voter: Option<bool>, body: &[u8]) -> Result<Response, Problem> {
        let url = parse_url(text(body)?)?;
        self.administer(AdminRequest::AddMember { id, url, voter })?;
        Ok(answer::done())
    }

    pub(super) fn remove_member(&self, id: NodeId) -> Result<Response, Problem> {
        self.administer(AdminRequest::RemoveMember { id })?;
        Ok(answer::done())
    }

    pub(super) fn replace_members(&self, body: &[u8]) -> Result<Response, Problem> {
        let members = parse_members(body)?;
        let membership = self.administer(AdminRequest::ReplaceMembers(members))?;
        Ok(answer::json(&members_document(&membership), None))
    }

    pub(super) fn transfer_leader(&self, body: &[u8]) -> Result<Response, Problem> {
        let id = parse_id(text(body)?.as_bytes())?;
        self.administer(AdminRequest::TransferLeader { id })?;
        Ok(answer::done())
    }

    pub(super) fn snapshot(&self) -> Result<Response, Problem> {
        let snapshot = self.backend.snapshot(Instant::now() + SNAPSHOT_TIMEOUT);
        // One that is not on disk in time may still get there, and no client's data depends on it.
        let snapshot = snapshot.map_err(|refusal| Problem::from(refusal).without_outcome())?;
        Ok(answer::json(&SnapshotDocument { index: snapshot.index, size: snapshot.bytes }, None))
    }

    fn administer(&self, request: AdminRequest) -> Result<Arc<Membership>, Problem> {
        match self.backend.admin(request, self.deadline()) {
            AdminReply::Done(membership) => Ok(membership),
            AdminReply::Refused(refusal) => Err(refusal.into()),
            AdminReply::Unknown(known) => Err(Problem::unknown(known, LOOK_FIRST)),
        }
    }
}

fn members_document(membership: &Membership) -> MembersDocument<'_> {
    MembersDocument { members: members(membership).collect() }
}

fn members(membership: &Membership) -> impl Iterator<Item = MemberDocument<'_>> {
    membership.members.iter().map(|(id, member)| MemberDocument {
        id: *id,
        url: &member.url,
        role: role(membership, *id),
        progress: None,
    })
}

fn members_with_progress(status: &Status) -> Vec<MemberDocument<'_>> {
    let mut documents: Vec<_> = members(&status.membership).collect();
    for document in &mut documents {
        let progress = status.progress.iter().find(|progress| progress.id == document.id);
        document.progress = progress.map(|progress| progress_document(progress, status.last_index));
    }
    documents
}

fn progress_document(progress: &MemberProgress, last_index: u64) -> ProgressDocument {
    ProgressDocument {
        match_index: progress.match_index,
        lag: last_index.saturating_sub(progress.match_index),
        last_contact_ms: progress.last_contact.map(millis),
        snapshot: progress.transfer.map(|Transfer { index, sent, bytes }| TransferDocument {
            index,
            sent,
            size: bytes,
        }),
    }
}

/// During a joint change who votes in one of both sets is a voter.
fn role(membership: &Membership, id: NodeId) -> MemberRole {
    let roles = &membership.conf_state;
    if roles.voters.contains(&id) || roles.voters_outgoing.contains(&id) {
        MemberRole::Voter
    } else {
        MemberRole::Learner
    }
}

/// A short body as text, without the line's end that many tools append.
fn text(body: &[u8]) -> Result<&str, Problem> {
    let text = std::str::from_utf8(body).map_err(|_| Problem::bad_request("the body is not UTF-8"))?;
    Ok(text.trim_ascii())
}

fn parse_url(url: &str) -> Result<String, Problem> {
    let parsed = PeerUrl::parse(url);
    let parsed = parsed.map_err(|why| Problem::bad_request(format!("malformed peer URL '{url}': {why}")))?;
    Ok(parsed.to_string())
}

/// Reads the members that the cluster is to have; whether it can is the leader's to say.
fn parse_members(body: &[u8]) -> Result<Vec<(NodeId, String, bool)>, Problem> {
    let wanted: Vec<WantedMember> = serde_json::from_slice(body)
        .map_err(|error| Problem::bad_request(format!("the body is no list of {{id, url, role}}: {error}")))?;
    let mut ids = BTreeSet::new();
    let mut urls = BTreeSet::new();
    let mut members = Vec::with_capacity(wanted.len());
    for WantedMember { id, url, role } in wanted {
        if id == 0 {
            return Err(Problem::bad_request("0 is no member's id: expected a number from 1"));
        }
        if !ids.insert(id) {
            return Err(Problem::bad_request(format!("id {id} is listed twice")));
        }
        let url = parse_url(&url)?;
        if !urls.insert(url.clone()) {
            return Err(Problem::bad_request(format!("URL '{url}' is listed twice")));
        }
        members.push((id, url, role == MemberRole::Voter));
    }
    Ok(members)
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}
