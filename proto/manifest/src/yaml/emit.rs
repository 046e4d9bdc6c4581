//! Writes values as YAML in the form of kubectl: block style, keys in order.

use serde_json::Value;

/// The maximum length of an implicit key, in characters (YAML 1.2, section 7.4).
const MAX_IMPLICIT_KEY: usize = 1024;

/// Returns a value as a YAML document with a final newline.
pub fn to_yaml(value: &Value) -> String {
    let mut out = String::new();
    match value {
        Value::Object(fields) if !fields.is_empty() => map(&mut out, value, 0),
        Value::Array(items) if !items.is_empty() => list(&mut out, value, 0),
        _ => {
            out.push_str(&scalar(value));
            out.push('\n');
        }
    }
    out
}

fn map(out: &mut String, value: &Value, indent: usize) {
    let Value::Object(fields) = value else { return };
    for (n, (key, value)) in fields.iter().enumerate() {
        // The first field of a list item is on the line of its dash.
        if n > 0 || !out.ends_with("- ") {
            pad(out, indent);
        }
        let key = text(key);
        if key.chars().count() > MAX_IMPLICIT_KEY {
            out.push_str("? ");
            out.push_str(&key);
            out.push('\n');
            pad(out, indent);
        } else {
            out.push_str(&key);
        }
        out.push(':');
        match value {
            Value::Object(inner) if !inner.is_empty() => {
                out.push('\n');
                map(out, value, indent + 2);
            }
            // Like kubectl, do not indent a list beneath its key.
            Value::Array(items) if !items.is_empty() => {
                out.push('\n');
                list(out, value, indent);
            }
            _ => {
                out.push(' ');
                out.push_str(&scalar(value));
                out.push('\n');
            }
        }
    }
}

fn list(out: &mut String, value: &Value, indent: usize) {
    let Value::Array(items) = value else { return };
    for item in items {
        if !out.ends_with("- ") {
            pad(out, indent);
        }
        out.push_str("- ");
        match item {
            Value::Object(fields) if !fields.is_empty() => map(out, item, indent + 2),
            Value::Array(inner) if !inner.is_empty() => list(out, item, indent + 2),
            _ => {
                out.push_str(&scalar(item));
                out.push('\n');
            }
        }
    }
}

fn pad(out: &mut String, indent: usize) {
    out.extend(std::iter::repeat_n(' ', indent));
}

fn scalar(value: &Value) -> String {
    match value {
        Value::Null => "null".to_owned(),
        Value::Bool(truth) => truth.to_string(),
        Value::Number(number) => number.to_string(),
        Value::String(string) => text(string),
        Value::Array(_) => "[]".to_owned(),
        Value::Object(_) => "{}".to_owned(),
    }
}

/// Returns a string as a plain scalar if no parser, including those of YAML 1.1, reads it as another type.
/// Otherwise in double quotes, as in JSON.
fn text(string: &str) -> String {
    let first = |c: char| c.is_ascii_alphabetic() || matches!(c, '/' | '_');
    let rest = |c: char| c.is_ascii_alphanumeric() || matches!(c, '/' | '_' | '.' | '-');
    let words = ["y", "n", "yes", "no", "on", "off", "true", "false", "null"];
    // An IPv4 address is not a number. An IPv6 address with only colons could be read as base 60.
    let address = string.parse::<std::net::Ipv4Addr>().is_ok() || string.parse::<ipnet::Ipv4Net>().is_ok();
    let plain = address
        || (string.starts_with(first)
            && string.chars().all(rest)
            && !words.contains(&string.to_ascii_lowercase().as_str()));
    if plain { string.to_owned() } else { Value::String(string.to_owned()).to_string() }
}
