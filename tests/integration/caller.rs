use std::net::SocketAddr;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use crate::client::{Client, Failure, Response};
use crate::support::{Cluster, DEADLINE};

/// A client that does what a careful one does: it moves on to the next node when its own does not answer, and repeats
/// until the answer is final. Its writes carry an `Idempotency-Key`, so that a repeat is safe whatever became of the
/// request before it.
pub(crate) struct Caller {
    name: String,
    addresses: Vec<SocketAddr>,
    node: usize,
    client: Client,
    writes: usize,
    /// Requests that had to be sent again.
    pub(crate) repeats: usize,
}

impl Caller {
    /// So many callers, spread over the nodes. No two groups of one cluster have the same name, if they write.
    pub(crate) fn several(cluster: &Cluster, name: &str, count: usize) -> Vec<Self> {
        (0..count).map(|number| Self::new(cluster, name, number)).collect()
    }

    /// Caller `number` of a group begins at the node that this counts to, from the first one on, round and round.
    pub(crate) fn new(cluster: &Cluster, name: &str, number: usize) -> Self {
        let addresses: Vec<_> = cluster.ids().into_iter().map(|id| cluster.address(id)).collect();
        let node = number % addresses.len();
        let client = Client::new(addresses[node]);
        Self { name: format!("{name}-{number}"), addresses, node, client, writes: 0, repeats: 0 }
    }

    /// A write under a token of its own.
    #[track_caller]
    pub(crate) fn write(
        &mut self,
        method: &str,
        target: &str,
        condition: Option<(&str, &str)>,
        body: &[u8],
    ) -> Response {
        self.writes += 1;
        let token = format!("{}-{}", self.name, self.writes);
        let headers: Vec<_> = condition.into_iter().chain([("Idempotency-Key", token.as_str())]).collect();
        self.repeat(method, target, &headers, body)
    }

    /// A read of a key or a listing.
    #[track_caller]
    pub(crate) fn read(&mut self, target: &str) -> Response {
        self.repeat("GET", target, &[], b"")
    }

    /// Sends a request until its answer is final: neither 503 nor 504.
    #[track_caller]
    pub(crate) fn repeat(&mut self, method: &str, target: &str, headers: &[(&str, &str)], body: &[u8]) -> Response {
        let deadline = Instant::now() + DEADLINE;
        loop {
            match self.client.request(method, target, headers, body) {
                Ok(response) if !matches!(response.status, 503 | 504) => return response,
                Ok(_) => {}
                Err(Failure::NotSent(_) | Failure::Lost(_)) => {
                    self.node = (self.node + 1) % self.addresses.len();
                    self.client = Client::new(self.addresses[self.node]);
                    // All may be down: do not spin.
                    thread::sleep(Duration::from_millis(10));
                }
                Err(Failure::TimedOut) => panic!("{method} {target} was never answered"),
            }
            self.repeats += 1;
            assert!(Instant::now() < deadline, "{method} {target} found no final answer in {DEADLINE:?}");
        }
    }
}

/// Lets all callers work at the same time, each with its number; `meanwhile` happens while they do. Returned is what
/// each of them has to say.
#[track_caller]
pub(crate) fn together<T: Send>(
    callers: &mut [Caller],
    work: impl Fn(usize, &mut Caller) -> T + Sync,
    meanwhile: impl FnOnce(),
) -> Vec<T> {
    thread::scope(|scope| {
        let work = &work;
        let numbered = callers.iter_mut().enumerate();
        let threads: Vec<_> = numbered.map(|(number, caller)| scope.spawn(move || work(number, caller))).collect();
        meanwhile();
        threads.into_iter().map(|thread| thread.join().expect("a caller panicked")).collect()
    })
}

/// Takes one of what is left to do. `false` if that is nothing.
pub(crate) fn take(left: &AtomicUsize) -> bool {
    left.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| left.checked_sub(1)).is_ok()
}
