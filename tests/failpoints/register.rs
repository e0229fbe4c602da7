use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{Builder, JoinHandle};
use std::time::Duration;

use crate::client::Client;
use crate::support::Cluster;

/// One writer that counts up, at one node after the other, and a reader at each node: no read may find less than what
/// was acknowledged before it began.
pub(crate) struct Register {
    stop: Arc<AtomicBool>,
    writer: JoinHandle<()>,
    readers: Vec<JoinHandle<Reads>>,
}

/// The key that is written now, and what was acknowledged of it.
type Acknowledged = Arc<Mutex<(String, u64)>>;

#[derive(Default)]
struct Reads {
    succeeded: usize,
    stale: Vec<String>,
}

impl Register {
    pub(crate) fn start(cluster: &Cluster) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let acknowledged = Acknowledged::new(Mutex::new((key(0), 0)));
        let clients: Vec<Client> = cluster.ids().into_iter().map(|id| cluster.client(id)).collect();
        let (stopped, written) = (stop.clone(), acknowledged.clone());
        let writer = Builder::new().name("register".to_owned()).spawn(move || write(clients, &written, &stopped));
        let readers = cluster.ids().into_iter().map(|id| {
            let (client, stop, acknowledged) = (cluster.client(id), stop.clone(), acknowledged.clone());
            Builder::new().name(format!("reader-{id}")).spawn(move || read(client, &acknowledged, &stop)).unwrap()
        });
        let (writer, readers) = (writer.unwrap(), readers.collect());
        Self { stop, writer, readers }
    }

    /// Ends it, and panics if a read was stale, or there was none at a node.
    #[track_caller]
    pub(crate) fn stop(self) {
        self.stop.store(true, Ordering::Relaxed);
        self.writer.join().expect("the writer panicked");
        for reader in self.readers {
            let Reads { succeeded, stale } = reader.join().expect("a reader panicked");
            println!("{succeeded} reads");
            assert!(stale.is_empty(), "stale reads: {stale:#?}");
            assert!(succeeded > 0, "nothing was read, so nothing is tested");
        }
    }
}

fn key(generation: usize) -> String {
    format!("/register-{generation}")
}

fn write(mut clients: Vec<Client>, acknowledged: &Acknowledged, stop: &AtomicBool) {
    let (mut generation, mut node) = (0, 0);
    for value in 1.. {
        if stop.load(Ordering::Relaxed) {
            return;
        }
        let answer = clients[node].request("PUT", &key(generation), &[], value.to_string().as_bytes());
        match answer.as_ref().map(|response| (response.status, response.outcome())) {
            Ok((204, _)) => acknowledged.lock().unwrap_or_else(PoisonError::into_inner).1 = value,
            Ok((503, outcome)) if outcome == "not-applied" => {}
            // It may take effect at any later time, and would hide what comes then: another key, from its beginning.
            _ => {
                generation += 1;
                *acknowledged.lock().unwrap_or_else(PoisonError::into_inner) = (key(generation), 0);
            }
        }
        node = (node + 1) % clients.len();
        std::thread::sleep(Duration::from_millis(2));
    }
}

fn read(mut client: Client, acknowledged: &Acknowledged, stop: &AtomicBool) -> Reads {
    let mut reads = Reads::default();
    while !stop.load(Ordering::Relaxed) {
        let (key, least) = acknowledged.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let found = match client.request("GET", &key, &[], b"") {
            Ok(response) if response.status == 200 => response.text().parse().expect("only numbers are written"),
            Ok(response) if response.status == 404 => 0,
            // Refused, or the node is down: it has said nothing, then.
            _ => {
                std::thread::sleep(Duration::from_millis(10));
                continue;
            }
        };
        reads.succeeded += 1;
        if found < least {
            reads.stale.push(format!("{key}: {found} after {least}"));
        }
        std::thread::sleep(Duration::from_millis(2));
    }
    reads
}
