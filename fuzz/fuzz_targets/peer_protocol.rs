#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| raftexample_fuzz::peer_protocol::run(input));
