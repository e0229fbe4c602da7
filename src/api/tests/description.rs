//! Holds answers against the OpenAPI document.

use std::collections::BTreeSet;
use std::sync::LazyLock;

use percent_encoding::percent_decode;
use serde_json::Value;

use super::client::Answer;
use crate::api::DESCRIPTION;

/// The document, read.
pub(super) static DOCUMENT: LazyLock<Value> =
    LazyLock::new(|| serde_json::from_str(DESCRIPTION).expect("the document is JSON"));

/// Statuses that answer a request which is no operation: another method, a path of the node that it does not have, or
/// bytes that are no request at all.
const STATUSES_OF_NO_OPERATION: &[u16] = &[400, 404, 405, 413, 414, 501];

/// A documented request.
#[derive(Clone, Copy)]
pub(super) struct Operation {
    pub(super) method: &'static str,
    pub(super) path: &'static str,
    document: &'static Value,
}

/// All of them.
pub(super) fn operations() -> Vec<Operation> {
    let mut operations = Vec::new();
    for (path, item) in object(&DOCUMENT["paths"]) {
        for (method, document) in object(item).iter().filter(|(name, _)| *name != "parameters") {
            let method = match &**method {
                "get" => "GET",
                "put" => "PUT",
                "post" => "POST",
                "delete" => "DELETE",
                other => panic!("{path} has '{other}', which this test does not know"),
            };
            operations.push(Operation { method, path, document });
        }
    }
    operations
}

impl Operation {
    /// Finds the operation that a request line asks for. `HEAD` is described with `GET`.
    pub(super) fn of(method: &str, target: &str) -> Option<Self> {
        let method = if method == "HEAD" { "GET" } else { method };
        let path = target.split('?').next().unwrap_or_default().trim_start_matches("http://test");
        let decoded: Vec<u8> = percent_decode(path.as_bytes()).collect();
        let path = match decoded.strip_prefix(b"/")? {
            b"" => "/".to_owned(),
            node if node.starts_with(b"_/members/") => "/_/members/{id}".to_owned(),
            node if node.starts_with(b"_/") => format!("/{}", String::from_utf8_lossy(node)),
            _ => "/{key}".to_owned(),
        };
        operations().into_iter().find(|operation| operation.path == path && operation.method == method)
    }

    pub(super) fn id(&self) -> &'static str {
        self.document["operationId"].as_str().expect("each operation has an id")
    }

    /// The documented statuses.
    pub(super) fn statuses(&self) -> BTreeSet<u16> {
        object(&self.document["responses"]).keys().map(|status| status.parse().expect("a status")).collect()
    }

    /// The names of its parameters that stand in `place`: path, query or header.
    pub(super) fn parameters(&self, place: &str) -> BTreeSet<&'static str> {
        let of_path = &DOCUMENT["paths"][self.path]["parameters"];
        let lists = [of_path, &self.document["parameters"]].into_iter().filter_map(Value::as_array).flatten();
        let parameters = lists.map(resolve).filter(|parameter| parameter["in"] == place);
        parameters.map(|parameter| parameter["name"].as_str().expect("a name")).collect()
    }

    /// Panics if an answer is not as documented.
    fn check(&self, answer: &Answer, head_only: bool) {
        let status = answer.status.to_string();
        let what = format!("{status} to {}", self.id());
        let response = self.document["responses"].get(&status).map(resolve);
        let response = response.unwrap_or_else(|| panic!("{what} is not documented: {answer:?}"));
        let headers = response.get("headers").map(object);
        for (name, header) in headers.into_iter().flatten() {
            let header = resolve(header);
            match answer.field(name) {
                Some(value) => check_field(&header["schema"], value, &format!("{name} of {what}")),
                None => assert_ne!(header.get("required"), Some(&Value::Bool(true)), "{what} lacks {name}"),
            }
        }
        for name in ["ETag", "Raftexample-Index", "Retry-After"] {
            let documented = headers.is_some_and(|headers| headers.contains_key(name));
            assert!(documented || answer.field(name).is_none(), "{name} of {what} is not documented");
        }
        let Some(content) = response.get("content").map(object) else {
            assert!(answer.body.is_empty(), "{what} has a body that is not documented");
            return;
        };
        let content_type = answer.field("Content-Type").unwrap_or_default();
        let media = content.get(content_type).unwrap_or_else(|| panic!("{what} has the type '{content_type}'"));
        if content_type.ends_with("json") && !head_only {
            let checked = check_schema(&media["schema"], &answer.json());
            checked.unwrap_or_else(|why| panic!("the body of {what} is not as documented: {why}"));
        }
    }
}

/// Panics if the answer to a request is not as documented. The operation, if the request is one.
pub(super) fn check(raw: &[u8], answer: &Answer) -> Option<Operation> {
    let line = raw.split(|byte| *byte == b'\r').next().unwrap_or_default();
    let line = String::from_utf8_lossy(line).into_owned();
    let mut words = line.split(' ');
    let (method, target) = (words.next().unwrap_or_default(), words.next().unwrap_or_default());
    let Some(operation) = Operation::of(method, target) else {
        let expected = STATUSES_OF_NO_OPERATION.contains(&answer.status);
        assert!(expected || method == "OPTIONS" && answer.status == 204, "{line} is not documented: {answer:?}");
        return None;
    };
    operation.check(answer, method == "HEAD");
    Some(operation)
}

fn object(value: &'static Value) -> &'static serde_json::Map<String, Value> {
    value.as_object().unwrap_or_else(|| panic!("{value} is no object"))
}

/// Follows a reference.
fn resolve(value: &'static Value) -> &'static Value {
    match value.get("$ref").and_then(Value::as_str) {
        Some(reference) => {
            let pointer = reference.strip_prefix('#').expect("references stay in the document");
            DOCUMENT.pointer(pointer).unwrap_or_else(|| panic!("nothing is at {reference}"))
        }
        None => value,
    }
}

fn check_field(schema: &'static Value, text: &str, what: &str) {
    let number = resolve(schema)["type"] == "integer";
    let value = if number { text.parse::<u64>().map_or(Value::Null, Value::from) } else { Value::from(text) };
    check_schema(schema, &value).unwrap_or_else(|why| panic!("{what}: {why}"));
}

/// What of JSON Schema the document uses; patterns are left to the tools that read it. Any other keyword panics, so
/// that none is passed over.
fn check_schema(schema: &'static Value, value: &Value) -> Result<(), String> {
    let schema = resolve(schema);
    let fail = |why: &str| Err(format!("{value} {why}"));
    for (keyword, expected) in object(schema) {
        match &**keyword {
            "description" | "examples" | "default" | "pattern" | "contentEncoding" | "minLength" | "required" => {}
            "type" if !has_type(expected, value) => return fail(&format!("is no {expected}")),
            "const" if expected != value => return fail(&format!("is not {expected}")),
            "enum" if !expected.as_array().expect("a list").contains(value) => return fail("is none of the values"),
            "minimum" if value.as_u64() < expected.as_u64() && value.is_u64() => return fail("is too small"),
            "maximum" if value.as_u64() > expected.as_u64() => return fail("is too large"),
            "maxItems" if value.as_array().map(Vec::len) > expected.as_u64().map(|n| n as usize) => {
                return fail("is too long");
            }
            "type" | "const" | "enum" | "minimum" | "maximum" | "maxItems" => {}
            "items" => {
                value.as_array().into_iter().flatten().try_for_each(|item| check_schema(expected, item))?;
            }
            "oneOf" => {
                let choices = expected.as_array().expect("a list").iter();
                if choices.filter(|choice| check_schema(choice, value).is_ok()).count() != 1 {
                    return fail("is not exactly one of the choices");
                }
            }
            "properties" => check_properties(schema, value)?,
            "additionalProperties" => {}
            other => panic!("the schema keyword '{other}' is not known to this test"),
        }
    }
    Ok(())
}

fn check_properties(schema: &'static Value, value: &Value) -> Result<(), String> {
    let (Some(found), properties) = (value.as_object(), object(&schema["properties"])) else {
        return Err(format!("{value} is no object"));
    };
    assert_eq!(schema["additionalProperties"], Value::Bool(false), "answers are documented completely: {schema}");
    for name in schema["required"].as_array().expect("a list") {
        let name = name.as_str().expect("a name");
        if !found.contains_key(name) {
            return Err(format!("{value} lacks {name}"));
        }
    }
    found.iter().try_for_each(|(name, value)| match properties.get(name) {
        Some(schema) => check_schema(schema, value).map_err(|why| format!("{name}: {why}")),
        None => Err(format!("{name} is not documented")),
    })
}

fn has_type(expected: &Value, value: &Value) -> bool {
    let is = |name: &str| match name {
        "object" => value.is_object(),
        "array" => value.is_array(),
        "string" => value.is_string(),
        "integer" => value.is_u64(),
        "null" => value.is_null(),
        other => panic!("the type '{other}' is not known to this test"),
    };
    match expected {
        Value::String(name) => is(name),
        Value::Array(names) => names.iter().filter_map(Value::as_str).any(is),
        other => panic!("{other} is no type"),
    }
}
