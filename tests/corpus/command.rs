//! What entries say, and the memberships that snapshots and peers carry: there is one encoding of everything, and what
//! is no encoding is refused.

use bytes::Bytes;
use raftexample::command::{Command, RequestId};
use raftexample::membership::Membership;
use raftexample::membership_change::MembershipChange;
use raftexample::store::{Applied, StateMachine};

pub fn run(input: &[u8]) {
    let Some((kind, bytes)) = input.split_first() else { return };
    match kind % 4 {
        0 => command(bytes),
        1 => request_id(bytes),
        2 => membership(bytes),
        _ => membership_change(bytes),
    }
}

fn command(bytes: &[u8]) {
    let entry = Bytes::copy_from_slice(bytes);
    let Ok(command) = Command::decode(&entry) else { return };
    assert_eq!(command.encode(), bytes, "{command:?} has another encoding");
    only_whole(bytes, |bytes| Command::decode(&Bytes::copy_from_slice(bytes)).is_ok());
    // What can be read can be applied, once.
    let mut state = StateMachine::new();
    let id = RequestId { node: 1, boot: 1, sequence: 1 };
    let first = state.apply(1, 1, id, &command);
    assert!(!matches!(first, Applied::Repeat));
    if matches!(first, Applied::First(_)) {
        assert!(matches!(state.apply(2, 1, id, &command), Applied::Repeat), "{command:?} was applied twice");
    }
}

fn request_id(bytes: &[u8]) {
    if let Ok(id) = RequestId::decode(bytes) {
        assert_eq!(id.encode(), bytes);
    }
}

fn membership(bytes: &[u8]) {
    let Ok(membership) = Membership::decode(bytes) else { return };
    assert_eq!(membership.encode(), bytes, "{membership:?} has another encoding");
    only_whole(bytes, |bytes| Membership::decode(bytes).is_ok());
}

fn membership_change(bytes: &[u8]) {
    let Ok(change) = MembershipChange::decode(bytes) else { return };
    assert_eq!(change.encode(), bytes, "{change:?} has another encoding");
    only_whole(bytes, |bytes| MembershipChange::decode(bytes).is_ok());
    let url = |id| format!("http://127.0.0.1:1238{id}");
    let membership = Membership::founding((1..=3).map(|id| (id, url(id))));
    if let Ok(conf_change) = membership.conf_change(&change) {
        assert!(
            !conf_change.changes.is_empty() || change == MembershipChange::LeaveJoint,
            "{change:?} changes nothing"
        );
    }
}

/// No part of an encoding is one, and neither is one with a byte behind it.
fn only_whole(bytes: &[u8], decodes: impl Fn(&[u8]) -> bool) {
    for end in [0, bytes.len() / 2, bytes.len() - 1] {
        assert!(!decodes(&bytes[..end]), "the first {end} bytes of {} decode", bytes.escape_ascii());
    }
    assert!(!decodes(&[bytes, b"\0"].concat()), "{} decodes with a byte behind it", bytes.escape_ascii());
}
