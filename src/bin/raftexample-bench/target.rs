//! The nodes that get the load.

use std::net::{SocketAddr, ToSocketAddrs};
use std::time::{Duration, Instant};

use serde_json::Value;
use url::Url;

use crate::options::{Api, Options, TargetChoice};

/// How long to look for a leader: a few elections.
const ROLES_TIMEOUT: Duration = Duration::from_secs(10);

/// How long to wait before asking all nodes again.
const ROLES_RETRY_DELAY: Duration = Duration::from_millis(100);

/// How long one node may take to say what it is.
const STATUS_TIMEOUT: Duration = Duration::from_secs(2);

/// No status is larger.
const STATUS_BYTES_MAX: u64 = 1 << 20;

/// A node that gets load.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Target {
    /// As the user wrote it.
    pub(crate) url: Url,
    /// Where to connect.
    pub(crate) address: SocketAddr,
    /// What requests say in `Host`.
    pub(crate) host: String,
}

impl Target {
    /// Looks up the address of `url`.
    ///
    /// # Errors
    /// One line, when the name has no address.
    pub(crate) fn resolve(url: &Url) -> Result<Self, String> {
        let host = url.host_str().unwrap_or_default();
        let port = url.port_or_known_default().unwrap_or(80);
        let host = format!("{host}:{port}");
        let failed = |reason: String| format!("failed to resolve {url}: {reason}");
        let mut addresses = host.to_socket_addrs().map_err(|error| failed(error.to_string()))?;
        let address = addresses.next().ok_or_else(|| failed("no address".to_owned()))?;
        Ok(Self { url: url.clone(), address, host })
    }
}

/// What a node says of itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Role {
    Leader,
    Follower,
    /// It has none at the moment, or does not answer.
    Other,
}

/// Chooses the nodes that get the load, at least one. Asks again while there is no leader.
///
/// # Errors
/// One line, when there is no such node within [`ROLES_TIMEOUT`].
pub(crate) fn choose(options: &Options) -> Result<Vec<Target>, String> {
    let (role, name) = match &options.target {
        TargetChoice::All => return options.endpoints.iter().map(Target::resolve).collect(),
        TargetChoice::One(url) => return Ok(vec![Target::resolve(url)?]),
        TargetChoice::Leader => (Role::Leader, "leader"),
        TargetChoice::Follower => (Role::Follower, "follower"),
    };
    let agent: ureq::Agent = ureq::Agent::config_builder().timeout_global(Some(STATUS_TIMEOUT)).build().into();
    let deadline = Instant::now() + ROLES_TIMEOUT;
    loop {
        let answers: Vec<_> = options.endpoints.iter().map(|url| (url, ask_role(&agent, options.api, url))).collect();
        // With no leader, whoever follows now may lead in a moment.
        if answers.iter().any(|(_, answer)| *answer == Ok(Role::Leader)) {
            let chosen = answers.iter().filter(|(_, answer)| *answer == Ok(role));
            let targets = chosen.map(|(url, _)| Target::resolve(url)).collect::<Result<Vec<_>, _>>()?;
            if !targets.is_empty() {
                return Ok(targets);
            }
        }
        if Instant::now() >= deadline {
            let said: Vec<_> = answers.iter().map(|(url, answer)| format!("{url}: {}", in_words(answer))).collect();
            return Err(format!(
                "failed to find a {name} within {ROLES_TIMEOUT:?} ({}); --target all or a URL goes without",
                said.join(", ")
            ));
        }
        std::thread::sleep(ROLES_RETRY_DELAY);
    }
}

fn in_words(answer: &Result<Role, String>) -> &str {
    match answer {
        Ok(Role::Leader) => "leader",
        Ok(Role::Follower) => "follower",
        Ok(Role::Other) => "neither leader nor follower of one",
        Err(reason) => reason,
    }
}

fn ask_role(agent: &ureq::Agent, api: Api, url: &Url) -> Result<Role, String> {
    let answer = match api {
        Api::Raftexample | Api::Raw => agent.get(format!("{url}_/status")).call(),
        Api::EtcdV2 => agent.get(format!("{url}v2/stats/self")).call(),
        Api::EtcdV3Json => agent.post(format!("{url}v3/maintenance/status")).send("{}"),
    };
    let mut answer = answer.map_err(|error| error.to_string())?;
    let body =
        answer.body_mut().with_config().limit(STATUS_BYTES_MAX).read_to_vec().map_err(|error| error.to_string())?;
    let status: Value = serde_json::from_slice(&body).map_err(|error| format!("no JSON: {error}"))?;
    Ok(role(api, &status))
}

fn role(api: Api, status: &Value) -> Role {
    match api {
        Api::Raftexample | Api::Raw => match status["role"].as_str() {
            Some("leader") => Role::Leader,
            Some("follower") => Role::Follower,
            _ => Role::Other,
        },
        Api::EtcdV2 => match status["state"].as_str() {
            Some("StateLeader") => Role::Leader,
            Some("StateFollower") => Role::Follower,
            _ => Role::Other,
        },
        // Numbers of 64 bits, which JSON from protobuf holds as text. It leaves out what is 0, as with no leader.
        Api::EtcdV3Json => match (status["header"]["member_id"].as_str(), status["leader"].as_str()) {
            (Some(id), Some(leader)) if id == leader => Role::Leader,
            (Some(_), Some(leader)) if leader != "0" => Role::Follower,
            _ => Role::Other,
        },
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn roles_are_read_from_each_api() {
        let cases = [
            (Api::Raftexample, json!({"id": 1, "role": "leader", "leader": 1}), Role::Leader),
            (Api::Raftexample, json!({"id": 1, "role": "follower", "leader": 2}), Role::Follower),
            (Api::Raftexample, json!({"id": 1, "role": "candidate", "leader": 0}), Role::Other),
            (Api::EtcdV2, json!({"name": "a", "state": "StateLeader"}), Role::Leader),
            (Api::EtcdV2, json!({"name": "a", "state": "StateFollower"}), Role::Follower),
            (Api::EtcdV3Json, json!({"header": {"member_id": "9372"}, "leader": "9372"}), Role::Leader),
            (Api::EtcdV3Json, json!({"header": {"member_id": "9372"}, "leader": "17"}), Role::Follower),
            (Api::EtcdV3Json, json!({"header": {"member_id": "9372"}}), Role::Other),
        ];
        for (api, status, expected) in cases {
            assert_eq!(role(api, &status), expected, "{status}");
        }
    }

    #[test]
    fn host_names_always_carry_the_port() {
        let target = Target::resolve(&Url::parse("http://[::1]").unwrap()).unwrap();
        assert_eq!((target.host.as_str(), target.address.port()), ("[::1]:80", 80));
    }
}
