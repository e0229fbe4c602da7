//! What a run is asked for.
//!
//! | variable | meaning |
//! |---|---|
//! | `TORTURE_SECONDS` | how long the faults go on; without it, a short run on loopback addresses |
//! | `TORTURE_NODES` | how many members the cluster has, 3 unless set |
//! | `TORTURE_SEED` | the seed of a run that is to be tried again; else the clock gives one |
//! | `TORTURE_NETWORK` | `namespaces` or `loopback`; else the first of them that works here |
//! | `TORTURE_PROGRAM` | the program, else the one that was built for the tests |

use std::path::PathBuf;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// How long the faults of a run go on that nobody asked for.
const SHORT: Duration = Duration::from_secs(10);

/// The members of a cluster, unless told otherwise.
const NODES: u64 = 3;

/// The networks that a run can have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Each node in a network namespace of its own. Takes root, or a kernel that lets users be root in a namespace.
    Namespaces,
    /// All nodes on loopback addresses: proxies between them take the place of the network.
    Loopback,
}

/// A run.
#[derive(Clone, Debug)]
pub struct Settings {
    /// How long faults go on.
    pub chaos: Duration,
    /// How many members there are.
    pub nodes: u64,
    /// What follows from it: which operations and faults come, with which pauses, in which order.
    pub seed: u64,
    /// Which network; `None` if any will do.
    pub network: Option<Kind>,
    /// The program.
    pub program: PathBuf,
}

impl Settings {
    /// As the environment says.
    ///
    /// # Panics
    /// If a variable has a value that makes no sense.
    pub fn from_environment() -> Settings {
        let seconds = number("TORTURE_SECONDS").map(Duration::from_secs);
        let network =
            std::env::var("TORTURE_NETWORK").ok().filter(|name| !name.is_empty()).map(|name| match name.as_str() {
                "namespaces" => Kind::Namespaces,
                "loopback" => Kind::Loopback,
                other => panic!("TORTURE_NETWORK is namespaces or loopback, not {other:?}"),
            });
        let nodes = number("TORTURE_NODES").unwrap_or(NODES);
        assert!((1..=7).contains(&nodes), "TORTURE_NODES is a number from 1 to 7, not {nodes}");
        Settings {
            chaos: seconds.unwrap_or(SHORT),
            nodes,
            seed: number("TORTURE_SEED").unwrap_or_else(any_seed),
            // What is part of all tests runs anywhere, and leaves the machine's set-up alone.
            network: network.or(seconds.is_none().then_some(Kind::Loopback)),
            program: std::env::var_os("TORTURE_PROGRAM")
                .map_or_else(|| env!("CARGO_BIN_EXE_raftexample").into(), PathBuf::from),
        }
    }
}

fn number(name: &str) -> Option<u64> {
    let value = std::env::var(name).ok().filter(|value| !value.is_empty())?;
    Some(value.parse().unwrap_or_else(|_| panic!("{name} is a number, not {value:?}")))
}

/// A short one, to be typed again.
fn any_seed() -> u64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    now.as_micros() as u64 % 1_000_000
}
