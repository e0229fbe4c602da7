//! Namespaces around a whole run: whatever it makes of networks, mounts and processes ends with it, also if it is
//! killed, and nothing has a name that another run could use too.

use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use signal_hook::consts::{SIGINT, SIGTERM};

/// Set for the process that runs inside: to a number that no other run on this machine has now.
const INSIDE: &str = "TORTURE_INSIDE";

/// `--kill-child`: all inside ends with the process outside. The process inside is the first of its process
/// namespace, so the kernel ends all others with it.
const FLAGS: &[&str] = &["--net", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"];

/// Where a user who is not root is, in namespaces of its own.
const USER_FLAGS: &[&str] = &["--user", "--map-root-user"];

/// Whether this process has been started by [`enter`].
pub fn is_inside() -> bool {
    std::env::var_os(INSIDE).is_some()
}

/// A number that no other run on this machine has now. The process id is one outside, but not inside.
pub fn number() -> String {
    std::env::var(INSIDE).unwrap_or_else(|_| std::process::id().to_string())
}

fn unshare() -> Command {
    let mut command = Command::new("unshare");
    if !rustix::process::geteuid().is_root() {
        command.args(USER_FLAGS);
    }
    command.args(FLAGS);
    command
}

/// Starts this very program again, with the same arguments, in namespaces of its own and in place of this process.
/// Returns only if that is not possible here, with the reason.
pub fn enter() -> String {
    // As much of the set-up of a network as shows whether one can be set up.
    let attempt = "mount -t tmpfs tmpfs /mnt && ip link set lo up && ip rule add pref 10 from 10.0.0.1 blackhole && \
                   ip link add probe0 type veth peer name probe1 && echo 1 >/proc/sys/net/ipv4/ip_forward";
    match unshare().args(["sh", "-c", attempt]).stdin(Stdio::null()).output() {
        Err(error) => return format!("unshare can't be started: {error}"),
        Ok(output) if !output.status.success() => return String::from_utf8_lossy(&output.stderr).trim().to_owned(),
        Ok(_) => {}
    }
    match std::env::current_exe() {
        Err(error) => format!("this program has no path: {error}"),
        Ok(program) => {
            let error = unshare().arg(program).args(std::env::args_os().skip(1)).env(INSIDE, number()).exec();
            format!("unshare can't be started: {error}")
        }
    }
}

/// Becomes true at the first SIGINT or SIGTERM; the second one ends the process at once.
pub fn interruption() -> Arc<AtomicBool> {
    let interrupted = Arc::new(AtomicBool::new(false));
    for signal in [SIGINT, SIGTERM] {
        signal_hook::flag::register_conditional_shutdown(signal, 130, Arc::clone(&interrupted)).unwrap();
        signal_hook::flag::register(signal, Arc::clone(&interrupted)).unwrap();
    }
    interrupted
}
