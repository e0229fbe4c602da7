//! What the death of a leader costs those who write.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{Builder, scope};
use std::time::{Duration, Instant};

use super::rows::Reading;
use super::systems::{System, Systems};
use crate::answer::AnswerReader;
use crate::options::{Options, TargetChoice};
use crate::run::measure;

/// The default of `--election-timeout`.
pub(crate) const ELECTION_TIMEOUT_MS: f64 = 1000.0;

/// How long to load before the kill.
const WARM_UP: Duration = Duration::from_millis(500);

/// How long the load goes on: the kill, an election, and the time after it.
const LOAD_DURATION: Duration = Duration::from_millis(3500);

/// Connections of the load, besides the writers that are timed.
const LOAD_CONNECTIONS: usize = 16;

/// How long an answer may take: more than a node waits for a leader.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(10);

/// What the timed writers write, over and over.
const REQUEST: &[u8] = b"PUT /in-flight HTTP/1.1\r\nHost: localhost\r\nContent-Length: 5\r\n\r\nvalue";

/// One write, from its start to its answer.
#[derive(Clone, Copy, Debug)]
struct TimedWrite {
    start: Instant,
    end: Instant,
    status: u16,
}

/// Kills the leader under load with SIGKILL; the answers are waited for at the nodes that are left. Then starts the
/// node again. The values are milliseconds from the kill to the answer of the write that was in flight, and to that of
/// the next one; at whichever node took longer.
pub(crate) fn kill_leader(systems: &mut Systems) -> Result<Reading, String> {
    let cluster = systems.cluster(System::Three)?;
    let (leader, followers) = (cluster.leader()?, cluster.followers()?);
    let options = Options {
        endpoints: followers.iter().map(|index| cluster.url(*index)).collect(),
        target: TargetChoice::All,
        warm_up: Duration::ZERO,
        duration: LOAD_DURATION,
        ..Options::closed_loop(Vec::new(), cluster.api())
    };
    let addresses: Vec<SocketAddr> = followers.iter().map(|index| cluster.address(*index)).collect();
    let enough = AtomicBool::new(false);
    let (killed_at, writes) = scope(|scope| {
        let failed = |error: std::io::Error| format!("failed to start a thread: {error}");
        let load = Builder::new()
            .name("load".to_owned())
            .spawn_scoped(scope, || measure(&options, LOAD_CONNECTIONS, None))
            .map_err(failed)?;
        let mut writers = Vec::new();
        for address in &addresses {
            let body = || write_until(*address, &enough);
            writers.push(Builder::new().name("writer".to_owned()).spawn_scoped(scope, body).map_err(failed)?);
        }
        std::thread::sleep(WARM_UP);
        let killed_at = Instant::now();
        cluster.kill(leader);
        // The load ends by the clock, later than an election usually takes; writers that still wait then go on.
        let loaded = load.join();
        enough.store(true, Ordering::Relaxed);
        let writes = writers.into_iter().map(|writer| writer.join().map_err(|_| "a writer panicked".to_owned())?);
        let writes = writes.collect::<Result<Vec<_>, String>>()?;
        loaded.map_err(|_| "the load panicked".to_owned())??;
        Ok::<_, String>((killed_at, writes))
    })?;
    let reading = times_after(killed_at, &writes)?;
    cluster.spawn(leader)?;
    (0..cluster.size()).try_for_each(|index| cluster.wait_ready(index))?;
    Ok(reading)
}

/// Writes until there is enough, one write after the other; the last write may begin a moment after.
fn write_until(address: SocketAddr, enough: &AtomicBool) -> Result<Vec<TimedWrite>, String> {
    let failed = |error: std::io::Error| format!("failed to write to {address}: {error}");
    let mut stream = TcpStream::connect_timeout(&address, ANSWER_TIMEOUT).map_err(failed)?;
    stream.set_nodelay(true).map_err(failed)?;
    stream.set_read_timeout(Some(ANSWER_TIMEOUT)).map_err(failed)?;
    let mut writes = Vec::new();
    let mut buffer = [0; 4096];
    while !enough.load(Ordering::Relaxed) {
        let start = Instant::now();
        stream.write_all(REQUEST).map_err(failed)?;
        let mut reader = AnswerReader::default();
        let answer = loop {
            let read = stream.read(&mut buffer).map_err(failed)?;
            if read == 0 {
                return Err(format!("{address} closed the connection under a write"));
            }
            match reader.read(&buffer[..read]) {
                Ok(Some(answer)) => break answer,
                Ok(None) => {}
                Err(_) => return Err(format!("{address} sent no answer")),
            }
        };
        writes.push(TimedWrite { start, end: Instant::now(), status: answer.status });
    }
    Ok(writes)
}

/// From the kill to the answer of the first write that had none yet, and to that of the one behind it.
fn times_after(killed_at: Instant, writes: &[Vec<TimedWrite>]) -> Result<Reading, String> {
    let mut worst = [Duration::ZERO; 2];
    let mut notes = Vec::new();
    for writes in writes {
        let unanswered = writes.partition_point(|write| write.end < killed_at);
        for (place, name) in ["in flight", "next"].into_iter().enumerate() {
            let write = writes.get(unanswered + place).ok_or("a writer had no answer after the kill")?;
            worst[place] = worst[place].max(write.end - killed_at);
            if write.status != 204 {
                let after = (write.start.max(killed_at) - killed_at).as_millis();
                notes.push(format!("the write {name}, begun {after} ms after, was answered with {}", write.status));
            }
        }
    }
    Ok(Reading { notes, ..Reading::of(worst.map(|time| time.as_secs_f64() * 1e3)) })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_write_in_flight_is_the_first_that_is_answered_after_the_kill() {
        let start = Instant::now();
        let at = |millis| start + Duration::from_millis(millis);
        let write = |from, to, status| TimedWrite { start: at(from), end: at(to), status };
        let one = vec![write(0, 90, 204), write(90, 1500, 204), write(1500, 1502, 204), write(1502, 1503, 204)];
        let other = vec![write(0, 99, 204), write(101, 102, 204), write(102, 1700, 503)];
        let reading = times_after(at(100), &[one.clone(), other]).unwrap();
        assert_eq!(reading.values, [1400.0, 1600.0]);
        assert_eq!(reading.notes.len(), 1, "{:?}", reading.notes);
        assert!(reading.notes[0].contains("next") && reading.notes[0].contains("503"), "{:?}", reading.notes);
        assert!(times_after(at(1503), &[one]).is_err(), "only one is left");
    }
}
