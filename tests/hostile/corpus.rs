/// A request that is wrong, doubtful or none.
pub(crate) struct Case {
    pub(crate) name: &'static str,
    pub(crate) bytes: Vec<u8>,
    /// What it gets, alone: no request that may hide in it or behind it is answered.
    pub(crate) status: u16,
}

/// What must never be taken for a request: it would write this key.
pub(crate) const SMUGGLED_KEY: &str = "/smuggled";
const SMUGGLED: &str = "PUT /smuggled HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\n\r\n!";

/// The head of a PUT with these lines, and what follows.
fn put(lines: &str, rest: impl AsRef<[u8]>) -> Vec<u8> {
    [format!("PUT /hostile HTTP/1.1\r\nHost: x\r\n{lines}\r\n\r\n").as_bytes(), rest.as_ref()].concat()
}

fn chunked(rest: impl AsRef<[u8]>) -> Vec<u8> {
    put("Transfer-Encoding: chunked", rest)
}

fn get(lines: &str) -> Vec<u8> {
    format!("GET /missing HTTP/1.1\r\nHost: x\r\n{lines}\r\n\r\n").into_bytes()
}

/// The table. Behind each request whose end is in doubt lies one that would be smuggled.
pub(crate) fn cases() -> Vec<Case> {
    let with_smuggled = |mut bytes: Vec<u8>| {
        bytes.extend_from_slice(SMUGGLED.as_bytes());
        bytes
    };
    let smuggled_length = SMUGGLED.len();
    let mut all = Vec::new();
    let mut case = |name, status, bytes: Vec<u8>| all.push(Case { name, bytes, status });

    // Where does the body end?
    let both = "Content-Length: 5\r\nTransfer-Encoding: chunked";
    case("length and chunks", 400, with_smuggled(put(both, "0\r\n\r\n")));
    case(
        "chunks and length",
        400,
        put(&format!("Transfer-Encoding: chunked\r\nContent-Length: {smuggled_length}"), SMUGGLED),
    );
    case("two lengths", 400, with_smuggled(put("Content-Length: 0\r\nContent-Length: 5", "")));
    case("the same length twice", 400, with_smuggled(put("Content-Length: 5\r\nContent-Length: 5", "hello")));
    case("a list of lengths", 400, with_smuggled(put("Content-Length: 5, 5", "hello")));
    for (name, length) in [
        ("a signed length", "+5"),
        ("a negative length", "-5"),
        ("a hexadecimal length", "0x5"),
        ("a length with a fraction", "5.0"),
        ("a length with a blank in it", "1 5"),
        ("no length", ""),
        ("a length in other digits", "٥"),
    ] {
        case(name, 400, with_smuggled(put(&format!("Content-Length: {length}"), "hello")));
    }
    for (name, status, coding) in [
        ("chunked twice", 400, "chunked, chunked"),
        ("a coding before chunked", 501, "gzip, chunked"),
        ("a coding behind chunked", 501, "chunked, identity"),
        ("no coding", 400, ""),
        ("nearly chunked", 501, "xchunked"),
        ("chunked and a control character", 400, "chunked\x0b"),
        ("chunked in quotes", 501, "\"chunked\""),
        ("chunked with a parameter", 501, "chunked;q=1"),
    ] {
        case(name, status, with_smuggled(put(&format!("Transfer-Encoding: {coding}"), "0\r\n\r\n")));
    }
    case(
        "two codings in two lines",
        400,
        with_smuggled(put("Transfer-Encoding: chunked\r\nTransfer-Encoding: x", "0\r\n\r\n")),
    );
    case("a blank before the colon", 400, with_smuggled(put("Transfer-Encoding : chunked", "0\r\n\r\n")));
    case("a folded coding", 400, with_smuggled(put("Transfer-Encoding:\r\n chunked", "0\r\n\r\n")));
    case("chunks of HTTP/1.0", 400, b"PUT /hostile HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n".to_vec());

    // Chunks.
    for (name, body) in [
        ("a chunk size of no digits", "\r\nhello\r\n0\r\n\r\n"),
        ("a chunk size that is no number", "x\r\nhello\r\n0\r\n\r\n"),
        ("a negative chunk size", "-5\r\nhello\r\n0\r\n\r\n"),
        ("a chunk size with a prefix", "0x5\r\nhello\r\n0\r\n\r\n"),
        ("a chunk size with a blank before it", " 5\r\nhello\r\n0\r\n\r\n"),
        ("a chunk size with a blank behind it", "5 \r\nhello\r\n0\r\n\r\n"),
        ("a chunk size beyond 64 bits", "10000000000000005\r\nhello\r\n0\r\n\r\n"),
        ("a chunk size that ends in LF", "5\nhello\r\n0\r\n\r\n"),
        ("a chunk size that ends in CR", "5\rhello\r\n0\r\n\r\n"),
        ("a chunk that is longer than it says", "4\r\nhello\r\n0\r\n\r\n"),
        ("a chunk that ends in LF", "5\r\nhello\n0\r\n\r\n"),
        ("an extension with a NUL", "5;a=\0\r\nhello\r\n0\r\n\r\n"),
        ("an extension with a CR", "5;a=\rb\r\nhello\r\n0\r\n\r\n"),
        ("a trailer without a name", "5\r\nhello\r\n0\r\n: x\r\n\r\n"),
        ("a trailer without a colon", "5\r\nhello\r\n0\r\nx\r\n\r\n"),
        ("a folded trailer", "5\r\nhello\r\n0\r\nX: a\r\n b\r\n\r\n"),
    ] {
        case(name, 400, with_smuggled(chunked(body)));
    }
    case("an extension without end", 400, chunked(["5;", &"x".repeat(4096), "\r\nhello\r\n0\r\n\r\n"].concat()));
    case("trailers without end", 400, chunked(["0\r\n", &"X: x\r\n".repeat(4096), "\r\n"].concat()));
    case("an extension", 204, chunked("5;name=\"value\"\r\nhello\r\n0\r\n\r\n"));
    case("a chunk for each byte", 204, chunked(["1\r\nx\r\n".repeat(5000), "0\r\n\r\n".to_owned()].concat()));
    case("a size with many zeros before it", 204, chunked("0000000000000005\r\nhello\r\n0\r\n\r\n"));
    case("chunks beyond the limit of values", 413, chunked(["200000\r\n".to_owned(), "x".repeat(2 << 20)].concat()));
    case("an absurd chunk size", 413, chunked(["fffffffffffffff0\r\n".to_owned(), "x".repeat(2 << 20)].concat()));

    // Sizes.
    case("a long target", 414, format!("GET /{} HTTP/1.1\r\nHost: x\r\n\r\n", "k".repeat(40_000)).into_bytes());
    case("a long key", 414, format!("GET /{} HTTP/1.1\r\nHost: x\r\n\r\n", "k".repeat(4097)).into_bytes());
    case("a target without end", 414, vec![b'A'; 1 << 20]);
    case("a long header", 431, get(&format!("X: {}", "x".repeat(20_000))));
    case("headers without end", 431, get(&["X: x\r\n"; 100_000].concat()));
    case("101 headers", 431, get(&format!("{}X: x", "X: x\r\n".repeat(99))));
    case("a long name of a header", 431, get(&format!("{}: x", "X".repeat(20_000))));
    case("a long body", 413, put("Content-Length: 1048577", vec![0; 1 << 20]));
    for (name, length) in [
        ("a length of 1 TB", "1099511627776"),
        ("the longest length of 64 bits", "18446744073709551615"),
        ("a length beyond 64 bits", "184467440737095516160"),
    ] {
        case(name, 413, put(&format!("Content-Length: {length}"), "hello"));
    }

    // Lines.
    for (name, bytes) in [
        ("lines that end in LF", "GET /missing HTTP/1.1\nHost: x\n\n"),
        ("one line that ends in LF", "GET /missing HTTP/1.1\r\nHost: x\nX: x\r\n\r\n"),
        ("a CR in a value", "GET /missing HTTP/1.1\r\nHost: x\r\nX: a\rb\r\n\r\n"),
        ("a folded line", "GET /missing HTTP/1.1\r\nHost: x\r\nX: a\r\n\tb\r\n\r\n"),
        ("a line that begins with a blank", "GET /missing HTTP/1.1\r\n Host: x\r\n\r\n"),
        ("a NUL in a value", "GET /missing HTTP/1.1\r\nHost: x\r\nX: a\0b\r\n\r\n"),
        ("a NUL in a name", "GET /missing HTTP/1.1\r\nHost: x\r\nX\0: a\r\n\r\n"),
        ("a NUL in the target", "GET /miss\0ing HTTP/1.1\r\nHost: x\r\n\r\n"),
        ("a NUL in the method", "G\0T /missing HTTP/1.1\r\nHost: x\r\n\r\n"),
        ("a line without a colon", "GET /missing HTTP/1.1\r\nHost: x\r\nnonsense\r\n\r\n"),
        ("a line without a name", "GET /missing HTTP/1.1\r\nHost: x\r\n: x\r\n\r\n"),
        ("two blanks in the request line", "GET  /missing HTTP/1.1\r\nHost: x\r\n\r\n"),
        ("a request line of three words and one", "GET /missing more HTTP/1.1\r\nHost: x\r\n\r\n"),
        ("no target", "GET HTTP/1.1\r\nHost: x\r\n\r\n"),
        ("empty lines before the request", "\r\n\r\n\r\nGET /missing HTTP/1.1\r\nHost: x\r\n\r\n"),
        ("no host", "GET /missing HTTP/1.1\r\n\r\n"),
        ("two hosts", "GET /missing HTTP/1.1\r\nHost: x\r\nHost: y\r\n\r\n"),
        ("a host with a slash", "GET /missing HTTP/1.1\r\nHost: x/y\r\n\r\n"),
        ("a target that is neither", "GET missing HTTP/1.1\r\nHost: x\r\n\r\n"),
        ("an answer instead of a request", "HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"),
    ] {
        case(name, 400, bytes.into());
    }

    // Other protocols.
    case("the preface of HTTP/2", 505, b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0".to_vec());
    case("HTTP/0.9", 400, b"GET /missing\r\n".to_vec());
    case("HTTP/3", 505, b"GET /missing HTTP/3\r\nHost: x\r\n\r\n".to_vec());
    case("no version of HTTP", 400, b"GET /missing FTP/1.1\r\nHost: x\r\n\r\n".to_vec());
    case(
        "a version of many digits",
        505,
        [b"GET /missing HTTP/1.1".to_vec(), vec![b'1'; 100], b"\r\n".to_vec()].concat(),
    );
    case("a hello of TLS", 400, [&[22, 3, 1, 2, 0, 1, 0, 1, 252, 3, 3][..], &[7; 512]].concat());
    case("SSH", 400, b"SSH-2.0-OpenSSH_9.2\r\n".to_vec());
    case("a request of SOCKS", 400, vec![5, 1, 0]);
    case("CONNECT", 501, b"CONNECT example.com:443 HTTP/1.1\r\nHost: example.com\r\n\r\n".to_vec());
    case(
        "an upgrade to HTTP/2",
        404,
        get("Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABk"),
    );
    let web_socket =
        "Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: eA==";
    case("an upgrade to a WebSocket", 404, get(web_socket));
    case("an unknown expectation", 417, put("Expect: the-unexpected\r\nContent-Length: 5", "hello"));
    case("an unknown method", 405, b"BREW /hostile HTTP/1.1\r\nHost: x\r\n\r\n".to_vec());
    all
}
