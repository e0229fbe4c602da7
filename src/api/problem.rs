//! Every answer that is no success: problem documents (RFC 9457), and what each refusal becomes.

use std::borrow::Cow;

use serde::Serialize;
use tiny_http::StatusCode;

use crate::message::Refusal;

/// What is known of a write that did not succeed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum WriteOutcome {
    /// Surely not applied, now or later: safe to send again.
    NotApplied,
    /// It may still take effect.
    Unknown,
}

/// An answer that is no success.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Problem {
    status: u16,
    detail: Cow<'static, str>,
    /// Said of writes only; `None` of what is no write, whatever its method.
    outcome: Option<WriteOutcome>,
    /// The key's current entity tag.
    etag: Option<u64>,
    /// The applied index that a read reflects.
    index: Option<u64>,
    /// The lowest `after-index` that can be answered.
    restart_index: Option<u64>,
    /// The methods that the resource has.
    allow: Option<&'static str>,
}

/// A problem document; `type` is left out, which means `about:blank`: the status says it all.
#[derive(Serialize)]
struct Document<'a> {
    title: &'a str,
    status: u16,
    detail: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    outcome: Option<WriteOutcome>,
    #[serde(skip_serializing_if = "Option::is_none")]
    index: Option<u64>,
}

impl Problem {
    /// A problem of this status; `detail` is for people. A write that ends in it was not applied.
    pub(super) fn new(status: u16, detail: impl Into<Cow<'static, str>>) -> Self {
        let outcome = Some(WriteOutcome::NotApplied);
        Problem { status, detail: detail.into(), outcome, etag: None, index: None, restart_index: None, allow: None }
    }

    /// 400: the request makes no sense.
    pub(super) fn bad_request(detail: impl Into<Cow<'static, str>>) -> Self {
        Problem::new(400, detail)
    }

    /// 404: there is nothing under this name.
    pub(super) fn not_found(detail: impl Into<Cow<'static, str>>) -> Self {
        Problem::new(404, detail)
    }

    /// 405, with the methods that the resource has.
    pub(super) fn method_not_allowed(allow: &'static str) -> Self {
        Problem { allow: Some(allow), ..Problem::new(405, format!("this resource has the methods {allow}")) }
    }

    /// 410: changes up to `known_after` are forgotten, so a client that waits has to begin again from the keys as they
    /// are.
    pub(super) fn gone(known_after: u64) -> Self {
        let detail = format!(
            "the changes up to index {known_after} are forgotten: read the keys again, and wait for changes after the \
             Raftexample-Index of that answer"
        );
        Problem { restart_index: Some(known_after), ..Problem::new(410, detail) }
    }

    /// 412, with the key's tag if it exists.
    pub(super) fn precondition_failed(etag: Option<u64>) -> Self {
        let detail = match etag {
            Some(etag) => format!("the condition does not hold: the key's entity tag is \"{etag}\"").into(),
            None => Cow::Borrowed("the condition does not hold: the key does not exist"),
        };
        Problem { etag, ..Problem::new(412, detail) }
    }

    /// 504: a change was handed to Raft and not seen applied; `known` is what is known of it, `again` whether a repeat
    /// is safe.
    pub(super) fn unknown(known: &str, again: &str) -> Self {
        let detail = format!("the outcome is unknown: {known}; it may still take effect. {again}");
        Problem { outcome: Some(WriteOutcome::Unknown), ..Problem::new(504, detail) }
    }

    /// The same, as the answer to a read that reflects this applied index.
    pub(super) fn at(self, index: u64) -> Self {
        Problem { index: Some(index), ..self }
    }

    /// The same, of a request that is no write although its method is that of one.
    pub(super) fn without_outcome(self) -> Self {
        Problem { outcome: None, ..self }
    }

    /// The status code.
    pub(super) fn status(&self) -> u16 {
        self.status
    }

    /// The explanation for people.
    #[cfg(test)]
    pub(super) fn detail(&self) -> &str {
        &self.detail
    }

    /// The entity tag that the key has.
    pub(super) fn etag(&self) -> Option<u64> {
        self.etag
    }

    /// The applied index that a read reflects.
    pub(super) fn index(&self) -> Option<u64> {
        self.index
    }

    /// The methods that the resource has.
    pub(super) fn allow(&self) -> Option<&'static str> {
        self.allow
    }

    /// Whether the same request may well succeed soon, so that the answer says when to try again.
    pub(super) fn is_temporary(&self) -> bool {
        self.status == 503
    }

    /// The document; `write` says whether the request was to change something.
    pub(super) fn to_json(&self, write: bool) -> Vec<u8> {
        let document = Document {
            title: StatusCode(self.status).default_reason_phrase(),
            status: self.status,
            detail: &self.detail,
            outcome: self.outcome.filter(|_| write),
            index: self.restart_index,
        };
        serde_json::to_vec(&document).expect("a struct of strings and numbers has a JSON form")
    }
}

impl From<Refusal> for Problem {
    fn from(refusal: Refusal) -> Self {
        match refusal {
            Refusal::NoLeader => Problem::new(503, "no leader, or no quorum, within the deadline"),
            Refusal::Overloaded(limit) => Problem::new(503, format!("the node is overloaded: {limit}")),
            Refusal::Stopping => Problem::new(503, "the node is shutting down"),
            Refusal::Full(why) => Problem::new(507, why),
            Refusal::Conflict(why) => Problem::new(409, why),
            Refusal::Invalid(why) => Problem::bad_request(why),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn document(problem: &Problem, write: bool) -> serde_json::Value {
        serde_json::from_slice(&problem.to_json(write)).expect("JSON")
    }

    #[test]
    fn refusals_have_the_statuses_of_the_contract() {
        let cases = [
            (Refusal::NoLeader, 503, "Service Unavailable"),
            (Refusal::Overloaded("too many waiting requests"), 503, "Service Unavailable"),
            (Refusal::Stopping, 503, "Service Unavailable"),
            (Refusal::Full("the store is full".to_owned()), 507, "Insufficient Storage"),
            (Refusal::Conflict("id 4 was removed".to_owned()), 409, "Conflict"),
            (Refusal::Invalid("a \"quoted\"\nthing".to_owned()), 400, "Bad Request"),
        ];
        for (refusal, status, title) in cases {
            let problem = Problem::from(refusal);
            let document = document(&problem, true);
            assert_eq!(document["status"], status);
            assert_eq!(document["title"], title);
            assert_eq!(document["detail"], problem.detail());
            assert_eq!(document["outcome"], "not-applied");
            assert_eq!(problem.is_temporary(), status == 503);
        }
    }

    #[test]
    fn only_writes_have_an_outcome() {
        let problem = Problem::unknown("it timed out", "Look first.");
        assert_eq!(document(&problem, true)["outcome"], "unknown");
        assert!(document(&problem, false).get("outcome").is_none());
    }
}
