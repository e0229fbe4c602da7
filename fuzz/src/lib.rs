//! What the fuzz targets run: the same modules that `tests/corpus` replays kept inputs with.

#[path = "../../tests/corpus/choices.rs"]
pub mod choices;
#[path = "../../tests/corpus/http.rs"]
pub mod http;
#[path = "../../tests/corpus/api.rs"]
pub mod api;
#[path = "../../tests/corpus/command.rs"]
pub mod command;
#[path = "../../tests/corpus/snapshot.rs"]
pub mod snapshot;
#[path = "../../tests/corpus/raft_log.rs"]
pub mod raft_log;
#[path = "../../tests/corpus/forged_log.rs"]
pub mod forged_log;
#[path = "../../tests/corpus/peer_protocol.rs"]
pub mod peer_protocol;
#[path = "../../tests/corpus/replica.rs"]
pub mod replica;
#[path = "../../tests/corpus/peers.rs"]
pub mod peers;
#[path = "../../tests/corpus/node.rs"]
pub mod node;
