//! What the program makes of a disk that fails, and of a data directory that is not as it was left: the program as a user
//! runs it, watched from between it and the kernel, and judged by what it promised to clients.
//!
//! A shim in C, compiled at the start with `cc` and loaded with LD_PRELOAD, sees each call on the data directory and lets a
//! chosen one fail. The program calls the kernel through two doors: `std` through libc, and `rustix` (here: `fallocate`
//! and `fstatfs`) directly, where a replaced function of libc would see nothing. So the shim has the kernel trap the
//! calls themselves, with seccomp, which takes no privilege and sees both. See `shim.c`.
//!
//! A run takes every so-manieth of all cases; `RAFTEXAMPLE_DISK_FAULTS=all cargo test --test disk_faults` takes all.

#![allow(clippy::unwrap_used, reason = "all of this is a test")]
#![allow(clippy::print_stdout, reason = "cargo shows it for a test that fails")]
#![allow(dead_code, reason = "other tests use the rest of what is shared with them")]

#[path = "../integration/client.rs"]
mod client;
#[path = "../integration/load.rs"]
mod load;
#[path = "../integration/support.rs"]
mod support;

/// Many cases, a few at a time.
mod cases;
/// Flipped bits, cut and lost files.
mod damage;
/// Each call on the data directory fails once.
mod failing_calls;
/// One node, its directory, and what it has promised.
mod node;
/// One failing disk of three.
mod of_three;
/// What there is in the files of a data directory, byte by byte.
mod places;
/// Builds the shim, and reads what it saw.
mod shim;
