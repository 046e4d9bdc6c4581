//! Templates of `-o jsonpath=`, with the syntax of kubectl: text, and expressions in braces.
//!
//! Supported are fields (`.spec.clusterIP`, `['a.b/c']`), items (`[0]`, `[-1]`, `[*]`), filters (`[?(@.name=="http")]`),
//! `{range PATH}...{end}`, and quoted text (`{"\n"}`).

use std::str::Chars;

use serde_json::Value;

use crate::text::printable;

/// A template.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Template(Vec<Part>);

#[derive(Debug, Clone, PartialEq)]
enum Part {
    Text(String),
    Path(Vec<Step>),
    Range(Vec<Step>, Vec<Self>),
}

#[derive(Debug, Clone, PartialEq)]
enum Step {
    Field(String),
    Item(i64),
    All,
    /// Items in which the path leads to a value that equals this one, or differs from it.
    Filter {
        path: Vec<Step>,
        equal: bool,
        value: Value,
    },
}

/// Parses a template.
///
/// # Errors
///
/// If it is malformed or uses what is not supported.
pub(crate) fn parse(text: &str) -> Result<Template, String> {
    let mut chars = text.chars();
    let parts = parts(&mut chars, false)?;
    Ok(Template(parts))
}

fn parts(chars: &mut Chars<'_>, within_range: bool) -> Result<Vec<Part>, String> {
    let mut all = Vec::new();
    let mut text = String::new();
    while let Some(c) = chars.next() {
        if c != '{' {
            text.push(c);
            continue;
        }
        if !text.is_empty() {
            all.push(Part::Text(std::mem::take(&mut text)));
        }
        let inner = braced(chars)?;
        let inner = inner.trim();
        if inner == "end" {
            return if within_range { Ok(all) } else { Err("{end} without {range}".to_owned()) };
        }
        if let Some(path) = inner.strip_prefix("range ") {
            let path = steps(path.trim())?;
            all.push(Part::Range(path, parts(chars, true)?));
        } else if inner.starts_with(['"', '\'']) {
            all.push(Part::Text(unquoted(inner)?));
        } else {
            all.push(Part::Path(steps(inner)?));
        }
    }
    if within_range {
        return Err("{range} without {end}".to_owned());
    }
    if !text.is_empty() {
        all.push(Part::Text(text));
    }
    Ok(all)
}

/// Returns what is before the closing brace, which may be in quotation marks too.
fn braced(chars: &mut Chars<'_>) -> Result<String, String> {
    let (mut inner, mut quote) = (String::new(), None);
    while let Some(c) = chars.next() {
        match (quote, c) {
            (None, '}') => return Ok(inner),
            (None, '"' | '\'') => quote = Some(c),
            (Some(open), c) if c == open => quote = None,
            (Some(_), '\\') => {
                inner.push(c);
                inner.extend(chars.next());
                continue;
            }
            _ => {}
        }
        inner.push(c);
    }
    Err("a '{' without '}'".to_owned())
}

/// Returns the text of a literal in quotation marks.
fn unquoted(literal: &str) -> Result<String, String> {
    let malformed = || format!("{literal} is not a text in quotation marks");
    let mut chars = literal.chars();
    let quote = chars.next().ok_or_else(malformed)?;
    let mut text = String::new();
    while let Some(c) = chars.next() {
        match c {
            '\\' => text.push(match chars.next().ok_or_else(malformed)? {
                'n' => '\n',
                't' => '\t',
                'r' => '\r',
                other => other,
            }),
            c if c == quote => {
                return if chars.next().is_none() { Ok(text) } else { Err(malformed()) };
            }
            c => text.push(c),
        }
    }
    Err(malformed())
}

fn steps(path: &str) -> Result<Vec<Step>, String> {
    let mut rest = path.strip_prefix(['$', '@']).unwrap_or(path);
    let mut steps = Vec::new();
    let unsupported = |rest: &str| Err(format!("'{rest}' in '{path}' is not supported"));
    while !rest.is_empty() {
        if rest.starts_with("..") {
            return unsupported(rest);
        }
        if let Some(bracket) = rest.strip_prefix('[') {
            let end = closing(bracket).ok_or_else(|| format!("a '[' without ']' in '{path}'"))?;
            steps.push(subscript(bracket.get(..end).unwrap_or_default().trim())?);
            rest = bracket.get(end + 1..).unwrap_or_default();
            continue;
        }
        // The first dot may be omitted.
        let Some(field) = rest.strip_prefix('.').or_else(|| steps.is_empty().then_some(rest)) else {
            return unsupported(rest);
        };
        let (name, length) = name(field);
        rest = field.get(length..).unwrap_or_default();
        match name.as_str() {
            // `{.}` is the value itself.
            "" if rest.is_empty() && steps.is_empty() => {}
            "" if rest.starts_with('[') => {}
            "" => return unsupported(field),
            "*" => steps.push(Step::All),
            _ => steps.push(Step::Field(name)),
        }
    }
    Ok(steps)
}

/// Reads a field's name, in which a backslash precedes a dot. Returns it and its length in the path.
fn name(path: &str) -> (String, usize) {
    let mut name = String::new();
    let mut chars = path.char_indices();
    while let Some((at, c)) = chars.next() {
        match c {
            '.' | '[' => return (name, at),
            '\\' => name.extend(chars.next().map(|(_, c)| c)),
            c => name.push(c),
        }
    }
    (name, path.len())
}

/// Returns where the bracket that is open ends.
fn closing(text: &str) -> Option<usize> {
    let (mut depth, mut quote) = (0_usize, None);
    for (at, c) in text.char_indices() {
        match (quote, c) {
            (None, ']') if depth == 0 => return Some(at),
            (None, ']') => depth -= 1,
            (None, '[') => depth += 1,
            (None, '"' | '\'') => quote = Some(c),
            (Some(open), c) if c == open => quote = None,
            _ => {}
        }
    }
    None
}

fn subscript(text: &str) -> Result<Step, String> {
    if text == "*" {
        return Ok(Step::All);
    }
    if text.starts_with(['"', '\'']) {
        return unquoted(text).map(Step::Field);
    }
    if let Some(filter) = text.strip_prefix("?(").and_then(|rest| rest.strip_suffix(')')) {
        let (path, equal, value) = match (filter.split_once("=="), filter.split_once("!=")) {
            (Some((path, value)), _) => (path, true, value),
            (None, Some((path, value))) => (path, false, value),
            (None, None) => return Err(format!("'{filter}' is not supported: use == or !=")),
        };
        let value = value.trim();
        let value = if value.starts_with(['"', '\'']) {
            Value::String(unquoted(value)?)
        } else {
            serde_json::from_str(value).map_err(|_| format!("'{value}' is not a value"))?
        };
        return Ok(Step::Filter { path: steps(path.trim())?, equal, value });
    }
    text.parse().map(Step::Item).map_err(|_| format!("'[{text}]' is not supported"))
}

impl Template {
    /// Renders the template for a value. Absent fields are empty.
    pub(crate) fn render(&self, value: &Value) -> String {
        let mut out = String::new();
        render(&self.0, value, &mut out);
        out
    }
}

fn render(parts: &[Part], value: &Value, out: &mut String) {
    for part in parts {
        match part {
            Part::Text(text) => out.push_str(text),
            Part::Path(path) => {
                let found: Vec<String> = follow(value, path).into_iter().map(text).collect();
                out.push_str(&found.join(" "));
            }
            Part::Range(path, parts) => {
                follow(value, path).into_iter().for_each(|value| render(parts, value, out));
            }
        }
    }
}

fn text(value: &Value) -> String {
    let text = match value {
        Value::String(text) => text.clone(),
        Value::Null => String::new(),
        other => other.to_string(),
    };
    // Values come from other hosts: they must not send escape sequences to the terminal.
    text.split('\n').map(printable).collect::<Vec<_>>().join("\n")
}

/// Returns the values that a path leads to.
fn follow<'a>(value: &'a Value, path: &[Step]) -> Vec<&'a Value> {
    path.iter()
        .fold(vec![value], |values, step| values.into_iter().flat_map(|value| next(value, step)).collect())
}

fn next<'a>(value: &'a Value, step: &Step) -> Vec<&'a Value> {
    let items = || value.as_array().into_iter().flatten();
    match step {
        Step::Field(name) => value.get(name).into_iter().collect(),
        Step::All => match value {
            Value::Object(fields) => fields.values().collect(),
            _ => items().collect(),
        },
        Step::Item(n) => {
            let length = value.as_array().map_or(0, Vec::len);
            let index = usize::try_from(*n)
                .ok()
                .or_else(|| usize::try_from(n.unsigned_abs()).ok().and_then(|back| length.checked_sub(back)));
            index.and_then(|index| value.get(index)).into_iter().collect()
        }
        Step::Filter { path, equal, value } => {
            let fits =
                |item: &&Value| follow(item, path).first().is_some_and(|found| (*found == value) == *equal);
            items().filter(fits).collect()
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn templates_are_rendered_as_by_kubectl() {
        let list = json!({ "items": [
            {
                "metadata": { "name": "web", "labels": { "a.b/c": "x" } },
                "spec": { "clusterIP": "10.96.0.7", "ports": [
                    { "name": "http", "port": 80, "nodePort": 30080 },
                    { "name": "dns", "port": 53 },
                ] },
            },
            { "metadata": { "name": "db" }, "spec": { "clusterIP": "None", "ports": [] } },
        ] });
        let web = &list["items"][0];
        for (template, value, expected) in [
            ("{.spec.clusterIP}", web, "10.96.0.7"),
            ("{$.spec.clusterIP}", web, "10.96.0.7"),
            ("ip={.spec.clusterIP};", web, "ip=10.96.0.7;"),
            ("{.metadata.labels.a\\.b/c}", web, "x"),
            ("{.metadata.labels['a.b/c']}", web, "x"),
            ("{.spec.ports[0].port}", web, "80"),
            ("{.spec.ports[-1].port}", web, "53"),
            ("{.spec.ports[7].port}", web, ""),
            ("{.spec.ports[-7].port}", web, ""),
            ("{.spec.ports[*].port}", web, "80 53"),
            ("{.spec.ports[?(@.name==\"http\")].nodePort}", web, "30080"),
            ("{.spec.ports[?(@.port!=80)].name}", web, "dns"),
            ("{.spec.ports[1]}", web, "{\"name\":\"dns\",\"port\":53}"),
            ("{.spec.none.at.all}", web, ""),
            ("{.items[*].metadata.name}", &list, "web db"),
            (
                "{range .items[*]}{.metadata.name}{\"\\t\"}{.spec.clusterIP}{'\\n'}{end}",
                &list,
                "web\t10.96.0.7\ndb\tNone\n",
            ),
            ("{range .items[*]}{range .spec.ports[*]}{.name},{end};{end}", &list, "http,dns,;;"),
            ("{\"}\"}", &list, "}"),
            ("plain", &list, "plain"),
        ] {
            assert_eq!(parse(template).unwrap().render(value), expected, "{template}");
        }
        for template in
            ["{.a", "{range .a}", "{end}", "{.a[}", "{.a[x]}", "{..a}", "{.a[?(@.b)]}", "{\"a}", "{.a[0:2]}"]
        {
            assert!(parse(template).is_err(), "{template}");
        }
    }
}
