#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| raftexample_fuzz::raft_log::run(input));
