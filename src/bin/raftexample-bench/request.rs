//! The bytes of requests, prepared once: sending one takes no more than writing its key's digits into them.

use base64::Engine;
use base64::engine::general_purpose::STANDARD;

use crate::options::{Api, Options, Workload};
use crate::random::{Keys, Random};
use crate::target::Target;

/// Before the digits of each key. Six bytes, and twelve digits: multiples of three, so that a key in base64 has no
/// padding and always the same length.
const KEY_PREFIX: &str = "bench-";

/// Every key has this many digits, so that every request is equally long.
pub(crate) const KEY_DIGITS: usize = 12;

/// What a key takes, prefix and digits.
pub(crate) const KEY_BYTES: usize = KEY_PREFIX.len() + KEY_DIGITS;

/// The value, which is the same in all requests, is made from this seed whatever `--seed` is.
const VALUE_SEED: u64 = 0x5EED;

/// What one request does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Operation {
    /// Writes.
    Put,
    /// Reads.
    Get,
}

/// The prepared requests of one worker, and what the next one is.
pub(crate) struct Requests {
    /// One pair for each target, in their order.
    templates: Vec<Templates>,
    keys: Keys,
    random: Random,
    /// The share of PUTs, from 0 to 1.
    put_ratio: f64,
}

struct Templates {
    put: Template,
    get: Template,
}

impl Requests {
    /// Prepares requests as `options` say, for `keys`, to each of `targets`.
    pub(crate) fn new(options: &Options, workload: Workload, keys: Keys, seed: u64, targets: &[Target]) -> Self {
        let value = value(options.value_bytes);
        let templates = targets
            .iter()
            .map(|target| Templates {
                put: Template::put(options.api, &target.host, &value),
                get: Template::get(options, &target.host, workload == Workload::StaleGet),
            })
            .collect();
        let put_ratio = match workload {
            Workload::Put => 1.0,
            Workload::Get | Workload::StaleGet => 0.0,
            Workload::Mixed => options.put_ratio,
        };
        Self { templates, keys, random: Random::new(seed), put_ratio }
    }

    /// The next request, for the target of this number, ready to send.
    pub(crate) fn next(&mut self, target: usize) -> (Operation, &[u8]) {
        let key = self.keys.next(&mut self.random);
        // A fraction is below 1, so a share of 1 is all, and one of 0 none.
        let put = self.random.fraction() < self.put_ratio;
        let templates = &mut self.templates[target];
        if put { (Operation::Put, templates.put.fill(key)) } else { (Operation::Get, templates.get.fill(key)) }
    }
}

/// One request with a place for the key.
struct Template {
    bytes: Vec<u8>,
    /// Where the key's digits are; None where the request has no key.
    key: Option<KeyPlace>,
}

#[derive(Clone, Copy)]
enum KeyPlace {
    /// The digits start here.
    Plain(usize),
    /// The base64 of the digits starts here.
    Base64(usize),
}

impl Template {
    fn put(api: Api, host: &str, value: &[u8]) -> Self {
        match api {
            Api::Raftexample | Api::Raw => Self::plain(&format!("PUT /{KEY_PREFIX}"), "", host, "", value),
            Api::EtcdV2 => {
                let body = [b"value=", value].concat();
                let form = "Content-Type: application/x-www-form-urlencoded\r\n";
                Self::plain(&format!("PUT /v2/keys/{KEY_PREFIX}"), "", host, form, &body)
            }
            Api::EtcdV3Json => {
                Self::base64("/v3/kv/put", host, &format!(r#"","value":"{}"}}"#, STANDARD.encode(value)))
            }
        }
    }

    fn get(options: &Options, host: &str, stale: bool) -> Self {
        match options.api {
            Api::Raftexample => {
                let query = if stale { "?consistency=stale" } else { "" };
                Self::plain(&format!("GET /{KEY_PREFIX}"), query, host, "", b"")
            }
            Api::EtcdV2 => {
                let query = if stale { "" } else { "?quorum=true" };
                Self::plain(&format!("GET /v2/keys/{KEY_PREFIX}"), query, host, "", b"")
            }
            Api::EtcdV3Json => {
                Self::base64("/v3/kv/range", host, if stale { r#"","serializable":true}"# } else { r#""}"# })
            }
            Api::Raw => {
                let bytes = format!("GET {} HTTP/1.1\r\nHost: {host}\r\n\r\n", options.path).into_bytes();
                Self { bytes, key: None }
            }
        }
    }

    /// A request with the key's digits in its path.
    fn plain(before_digits: &str, after_digits: &str, host: &str, headers: &str, body: &[u8]) -> Self {
        let digits = "0".repeat(KEY_DIGITS);
        // Only what has a body says how long it is.
        let length = if before_digits.starts_with("PUT") {
            format!("Content-Length: {}\r\n", body.len())
        } else {
            String::new()
        };
        let mut bytes =
            format!("{before_digits}{digits}{after_digits} HTTP/1.1\r\nHost: {host}\r\n{headers}{length}\r\n")
                .into_bytes();
        bytes.extend_from_slice(body);
        Self { bytes, key: Some(KeyPlace::Plain(before_digits.len())) }
    }

    /// A JSON request with the key in base64; `after_key` goes on from within the key's string.
    fn base64(path: &str, host: &str, after_key: &str) -> Self {
        let body_start = format!(r#"{{"key":"{}"#, STANDARD.encode(KEY_PREFIX));
        let digits = STANDARD.encode("0".repeat(KEY_DIGITS));
        let length = body_start.len() + digits.len() + after_key.len();
        let mut text = format!(
            "POST {path} HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\nContent-Length: {length}\r\n\r\n{body_start}"
        );
        let key = KeyPlace::Base64(text.len());
        text.push_str(&digits);
        text.push_str(after_key);
        Self { bytes: text.into_bytes(), key: Some(key) }
    }

    fn fill(&mut self, key: u64) -> &[u8] {
        match self.key {
            None => {}
            Some(KeyPlace::Plain(start)) => write_digits(&mut self.bytes[start..start + KEY_DIGITS], key),
            Some(KeyPlace::Base64(start)) => {
                let mut digits = [0; KEY_DIGITS];
                write_digits(&mut digits, key);
                let place = &mut self.bytes[start..start + KEY_DIGITS / 3 * 4];
                STANDARD.encode_slice(digits, place).expect("twelve bytes are sixteen characters of base64");
            }
        }
        &self.bytes
    }
}

/// The name of a key.
pub(crate) fn key_name(key: u64) -> String {
    format!("{KEY_PREFIX}{key:0digits$}", digits = KEY_DIGITS)
}

fn write_digits(place: &mut [u8], mut number: u64) {
    for digit in place.iter_mut().rev() {
        *digit = b'0' + (number % 10) as u8;
        number /= 10;
    }
}

/// Letters and digits, so that a form can hold them unescaped; not all the same, so that nothing compresses them away.
pub(crate) fn value(bytes: usize) -> Vec<u8> {
    const LETTERS: &[u8] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789";
    let mut random = Random::new(VALUE_SEED);
    (0..bytes).map(|_| LETTERS[random.below(LETTERS.len() as u64) as usize]).collect()
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;
    use crate::command_line::CommandLine;

    /// The second request, of key 1, as text.
    fn request(arguments: &[&str]) -> String {
        let line = [&["raftexample-bench", "--value-bytes=4"], arguments].concat();
        let options = Options::from_cli(CommandLine::try_parse_from(line).unwrap().load).unwrap();
        let targets = [Target::resolve(&"http://127.0.0.1:80".parse().unwrap()).unwrap()];
        let keys = Keys::EachOnce { next: 0, step: 1 };
        let mut requests = Requests::new(&options, options.workload, keys, 1, &targets);
        requests.next(0);
        String::from_utf8(requests.next(0).1.to_vec()).unwrap()
    }

    #[test]
    fn requests_are_what_each_api_expects() {
        let text = String::from_utf8(value(4)).unwrap();
        assert_eq!((key_name(1).as_str(), key_name(1).len()), ("bench-000000000001", KEY_BYTES));
        assert_eq!(
            request(&[]),
            format!("PUT /bench-000000000001 HTTP/1.1\r\nHost: 127.0.0.1:80\r\nContent-Length: 4\r\n\r\n{text}")
        );
        let first_line = |arguments: &[&str]| request(arguments).lines().next().unwrap().to_owned();
        assert_eq!(first_line(&["--operation=get"]), "GET /bench-000000000001 HTTP/1.1");
        assert_eq!(first_line(&["--operation=stale-get"]), "GET /bench-000000000001?consistency=stale HTTP/1.1");
        let v2 = "--api=etcd-v2";
        assert_eq!(first_line(&[v2, "--operation=get"]), "GET /v2/keys/bench-000000000001?quorum=true HTTP/1.1");
        assert_eq!(first_line(&[v2, "--operation=stale-get"]), "GET /v2/keys/bench-000000000001 HTTP/1.1");
        assert!(request(&[v2]).ends_with(&format!("Content-Length: 10\r\n\r\nvalue={text}")));
        assert_eq!(request(&["--api=raw", "--path=/a%20b?c"]), "GET /a%20b?c HTTP/1.1\r\nHost: 127.0.0.1:80\r\n\r\n");
    }

    #[test]
    fn json_requests_carry_key_and_value_in_base64() {
        for (operation, path, fields) in
            [("put", "/v3/kv/put", 2), ("get", "/v3/kv/range", 1), ("stale-get", "/v3/kv/range", 2)]
        {
            let text = request(&["--api=etcd-v3-json", "--operation", operation]);
            assert!(text.starts_with(&format!("POST {path} HTTP/1.1\r\n")), "{text}");
            let (head, body) = text.split_once("\r\n\r\n").unwrap();
            assert!(head.contains(&format!("Content-Length: {}", body.len())), "{text}");
            let body: serde_json::Value = serde_json::from_str(body).unwrap();
            let key = STANDARD.decode(body["key"].as_str().unwrap()).unwrap();
            assert_eq!(key, b"bench-000000000001");
            assert_eq!(body.as_object().unwrap().len(), fields);
            if operation == "put" {
                assert_eq!(STANDARD.decode(body["value"].as_str().unwrap()).unwrap(), value(4));
            }
        }
    }
}
