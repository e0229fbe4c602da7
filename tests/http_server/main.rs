//! The HTTP server as its clients see it: what a request gets, what a hostile one gets, and what neither leaves behind.
//! All of it twice, because there are two ways to serve a connection, and no client may see a difference.
//!
//! Tests that look at the whole process (descriptors, threads, memory) run alone in a process of their own.

// All of this is test code; the exception made for tests in .clippy.toml does not see its helpers.
#![allow(clippy::unwrap_used)]

/// Each connection in a thread of its own, from its first byte.
mod in_threads {
    const EVENT_LOOPS: usize = 0;
    include!("cases.rs");

    #[test]
    fn running_out_of_threads_is_told_and_survived() {
        // No address space has room for such a stack, so no thread starts.
        let (_, server) = serve(Limits { stack_bytes: 1 << 60, ..Limits::default() }, "http");
        for refused in 1..4 {
            let answer = Client::connect(&server).answer();
            assert_eq!((answer.status, answer.closes()), (503, true));
            assert_eq!(server.connections_refused(), refused);
            assert_eq!(server.connections_open(), 0);
        }
    }
}

/// Connections in an event loop, until they ask for what takes a thread.
mod in_event_loops {
    const EVENT_LOOPS: usize = 1;
    include!("cases.rs");

    #[test]
    fn a_reply_that_does_not_come_is_given_up() {
        let (_, server) = start();
        let mut client = Client::connect(&server);
        for _ in 0..2 {
            let started = Instant::now();
            assert_eq!(client.get("/never").status, 504);
            assert!(started.elapsed() >= NEVER_TIMEOUT);
        }
        assert_eq!(client.get("/size/1").status, 200);
    }

    #[test]
    fn a_reply_that_comes_too_late_is_not_taken_for_the_next() {
        let (paths, server) = start();
        let mut client = Client::connect(&server);
        assert_eq!(client.get("/never").status, 504);
        let late = paths.never.lock().unwrap().take().unwrap();
        client.send(get("/never"));
        eventually("the next request waits", || paths.never.lock().unwrap().is_some());
        late.reply(b"late".to_vec());
        assert_eq!(client.answer().status, 504);
    }

    #[test]
    fn requests_of_many_connections_are_answered() {
        let (paths, server) = start();
        let mut clients: Vec<Client> = (0..50).map(|_| Client::connect(&server)).collect();
        for client in &mut clients {
            assert_eq!(client.get("/size/1").status, 200);
        }
        for client in &mut clients {
            client.send(get("/echo"));
        }
        for client in &mut clients {
            assert_eq!(client.answer().status, 200);
        }
        assert_eq!(paths.submitted.load(Ordering::SeqCst), 50);
    }

    #[test]
    fn a_connection_that_needs_a_thread_keeps_it() {
        alone("a_connection_that_needs_a_thread_keeps_it", || {
            let (_, server) = serve(Limits::default(), "th");
            let mut client = Client::connect(&server);
            assert_eq!(client.get("/size/1").status, 200);
            assert_eq!(threads_named("th-"), 1 + EVENT_LOOPS);
            // Counted are the requests that the connection's thread has seen.
            assert_eq!(client.get("/count").body, b"1");
            assert_eq!(client.get("/size/1").status, 200);
            assert_eq!(client.get("/count").body, b"3");
            assert_eq!(threads_named("th-"), 2 + EVENT_LOOPS);
            drop(client);
            eventually("its thread ends", || threads_named("th-") == 1 + EVENT_LOOPS);
        });
    }

    #[test]
    fn running_out_of_threads_costs_only_who_needs_one() {
        let (_, server) = serve(Limits { stack_bytes: 1 << 60, ..Limits::default() }, "http");
        let mut client = Client::connect(&server);
        assert_eq!(client.get("/size/1").status, 200);
        let refused = client.get("/count");
        assert_eq!((refused.status, refused.closes()), (503, true));
        assert_eq!(server.connections_refused(), 1);
        eventually("the connection ends", || server.connections_open() == 0);
        assert_eq!(Client::connect(&server).get("/size/1").status, 200);
    }
}
