//! Ports of this machine that nobody listens on.

use std::collections::HashSet;
use std::net::{Ipv4Addr, TcpListener};
use std::sync::{Mutex, PoisonError};

/// Below are ports of programs that people know by number.
const FIRST_PORT: u16 = 10_000;

/// Where the kernel's own choice usually begins.
const EPHEMERAL_PORTS_START: u16 = 32_768;

/// Picks a port that is free now, and that this process has not picked before.
///
/// Not one of the kernel's own choice: while a node is down, such a port may be given to an outgoing connection.
///
/// # Errors
/// One line, when all are taken.
pub(crate) fn free_port() -> Result<u16, String> {
    static PICKED: Mutex<Option<HashSet<u16>>> = Mutex::new(None);
    let mut picked = PICKED.lock().unwrap_or_else(PoisonError::into_inner);
    let picked = picked.get_or_insert_default();
    let end = ephemeral_ports_start().max(FIRST_PORT + 10_000);
    let count = end - FIRST_PORT;
    // Another run at the same time starts somewhere else.
    let offset = (std::process::id().wrapping_mul(97) % u32::from(count)) as u16;
    let ports = (0..count).map(|n| FIRST_PORT + ((u32::from(n) + u32::from(offset)) % u32::from(count)) as u16);
    for port in ports {
        if picked.insert(port) && TcpListener::bind((Ipv4Addr::LOCALHOST, port)).is_ok() {
            return Ok(port);
        }
    }
    Err(format!("no port from {FIRST_PORT} to {end} is free"))
}

fn ephemeral_ports_start() -> u16 {
    let range = std::fs::read_to_string("/proc/sys/net/ipv4/ip_local_port_range").unwrap_or_default();
    range.split_whitespace().next().and_then(|start| start.parse().ok()).unwrap_or(EPHEMERAL_PORTS_START)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_port_is_picked_twice() {
        let ports: Vec<_> = (0..20).map(|_| free_port().unwrap()).collect();
        let different: HashSet<_> = ports.iter().collect();
        assert_eq!(different.len(), ports.len());
        assert!(ports.iter().all(|port| *port >= FIRST_PORT));
    }
}
