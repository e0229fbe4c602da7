use criterion::{Criterion, Throughput};
use raftexample::http::{Limits, read_head};

/// What a load generator sends, and so do most programs that know what they want.
const PUT: &str = "PUT /key-000000004711 HTTP/1.1\r\nHost: 127.0.0.1:12380\r\nContent-Length: 128\r\n\r\n";

/// What curl sends.
const GET: &str =
    "GET /key-000000004711 HTTP/1.1\r\nHost: 127.0.0.1:12380\r\nUser-Agent: curl/8.14.1\r\nAccept: */*\r\n\r\n";

/// What it takes to find the end of a head, parse it, and settle how its body ends.
pub(crate) fn all(criterion: &mut Criterion) {
    let limits = Limits::default();
    let mut group = criterion.benchmark_group("http head");
    for (name, head, body_bytes) in [("put", PUT, 128), ("get", GET, 0)] {
        group.throughput(Throughput::Bytes(head.len() as u64));
        group.bench_function(name, |bencher| {
            bencher.iter(|| {
                let bytes = std::hint::black_box(head).as_bytes();
                let read = read_head(bytes, &limits, |head, length| (head.content_length(), length));
                assert_eq!(read, Ok(Some((Some(body_bytes), bytes.len()))));
            });
        });
    }
    group.finish();
}
