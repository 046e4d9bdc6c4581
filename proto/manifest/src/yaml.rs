//! Parses files of YAML or JSON documents into values, and writes values as YAML.
//!
//! Scalars follow the core schema of YAML 1.2: `yes` and `on` are strings. Duplicate keys are an error. Otherwise what
//! libyaml reads is read, because kubectl's parser is a port of it.
//! An alias is a copy that counts towards the size limits each time, so that a short file cannot expand to fill the
//! memory. Merge keys (`<<`) are rejected.

mod emit;
mod repair;
mod unique;

use std::borrow::Cow;
use std::collections::HashMap;

use saphyr_parser::{Event, Parser, ScalarStyle, ScanError, Tag};
use serde_json::{Map, Number, Value};

pub use self::emit::to_yaml;
use self::unique::Unique;

/// The maximum size of a file in bytes.
pub const MAX_FILE: usize = 64 << 20;
/// The maximum number of documents in a file.
pub const MAX_DOCUMENTS: usize = 65_536;
/// The maximum number of values in a document, including copies by aliases.
pub const MAX_NODES: usize = 1 << 20;
/// The maximum size of all strings in a document in bytes, including copies by aliases.
pub const MAX_TEXT: usize = 8 << 20;
/// The maximum nesting depth of lists and maps.
pub const MAX_DEPTH: usize = 64;

/// The byte order mark.
const BYTE_ORDER_MARK: char = '\u{feff}';

/// Why a file cannot be read.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("line {line}: {reason}")]
pub struct Unreadable {
    /// The line, from 1.
    pub line: usize,
    /// What is wrong.
    pub reason: String,
}

/// A document of a file.
#[derive(Debug, Clone, PartialEq)]
pub struct FileDocument {
    /// The line where its content begins, from 1.
    pub line: usize,
    /// The lines of its items, if it is a YAML map with a list `items`.
    pub items: Vec<usize>,
    /// The content; never null.
    pub value: Value,
}

/// Returns the non-empty documents of a file.
///
/// # Errors
///
/// If the file is malformed or exceeds a limit.
pub fn read(text: &str) -> Result<Vec<FileDocument>, Unreadable> {
    if text.len() > MAX_FILE {
        return Err(Unreadable {
            line: 1,
            reason: format!("the file is larger than {} MiB", MAX_FILE >> 20),
        });
    }
    // A byte order mark may begin each line, as after `cat` of two files.
    let text: Cow<'_, str> = if text.contains(BYTE_ORDER_MARK) {
        let lines = text.split_inclusive('\n');
        lines.map(|line| line.strip_prefix(BYTE_ORDER_MARK).unwrap_or(line)).collect::<String>().into()
    } else {
        text.into()
    };
    // JSON is also YAML, except for tabs, but a JSON parser is faster. What only looks like JSON is left to the YAML
    // parser, which has better error messages.
    if text.trim_start().starts_with(['{', '['])
        && let Ok(documents) = read_json(&text)
    {
        return Ok(documents);
    }
    let mut text = text.into_owned();
    let mut reparsed = 0;
    loop {
        let error = match read_yaml(&text) {
            Ok(documents) => return Ok(documents),
            Err(Failed::Unreadable(error)) => return Err(error),
            Err(Failed::Parser(error)) => error,
        };
        reparsed += text.len();
        if reparsed > repair::MAX_REPARSED || !repair::indent(&mut text, &error) {
            return Err(Unreadable { line: error.marker().line(), reason: error.info().to_owned() });
        }
    }
}

/// Decodes the bytes of a file: UTF-8, or UTF-16 with a byte order mark.
///
/// # Errors
///
/// If the bytes are not of the encoding.
pub fn decode(bytes: Vec<u8>) -> Result<String, Unreadable> {
    let unit: fn([u8; 2]) -> u16 = match bytes.as_slice() {
        [0xff, 0xfe, ..] => u16::from_le_bytes,
        [0xfe, 0xff, ..] => u16::from_be_bytes,
        _ => {
            return String::from_utf8(bytes).map_err(|error| {
                let before = error.as_bytes().get(..error.utf8_error().valid_up_to()).unwrap_or_default();
                let line = before.iter().filter(|byte| **byte == b'\n').count() + 1;
                Unreadable { line, reason: "is not text in UTF-8".to_owned() }
            });
        }
    };
    let (units, rest) = bytes.as_chunks::<2>();
    let mut line = 1;
    let mut text = String::with_capacity(units.len());
    for found in char::decode_utf16(units.iter().copied().map(unit)) {
        let Ok(found) = found else {
            return Err(Unreadable { line, reason: "is not text in UTF-16".to_owned() });
        };
        line += usize::from(found == '\n');
        text.push(found);
    }
    match rest {
        [] => Ok(text),
        _ => Err(Unreadable { line, reason: "is not text in UTF-16".to_owned() }),
    }
}

/// Why a text cannot be parsed.
enum Failed {
    Parser(ScanError),
    Unreadable(Unreadable),
}

fn read_yaml(text: &str) -> Result<Vec<FileDocument>, Failed> {
    let mut reader = Reader { documents: Vec::new(), state: DocumentState::default() };
    for event in Parser::new_from_str(text) {
        let (event, span) = event.map_err(Failed::Parser)?;
        let line = span.start.line();
        reader.take(event, line).map_err(|reason| Failed::Unreadable(Unreadable { line, reason }))?;
    }
    Ok(reader.documents)
}

fn read_json(text: &str) -> Result<Vec<FileDocument>, serde_json::Error> {
    let mut documents = Vec::new();
    let mut stream = serde_json::Deserializer::from_str(text).into_iter::<Unique>();
    let (mut at, mut line) = (0, 1);
    while let Some(value) = stream.next() {
        let Unique(value) = value?;
        let part = text.get(at..stream.byte_offset()).unwrap_or_default();
        let lead = part.len() - part.trim_start().len();
        let newlines = |part: &str| part.bytes().filter(|byte| *byte == b'\n').count();
        let begins = line + newlines(part.get(..lead).unwrap_or_default());
        line += newlines(part);
        at = stream.byte_offset();
        if !value.is_null() && documents.len() < MAX_DOCUMENTS {
            documents.push(FileDocument { line: begins, items: Vec::new(), value });
        }
    }
    Ok(documents)
}

/// An incomplete list or map.
enum Container {
    List { anchor: usize, items: Vec<Value> },
    Map { anchor: usize, fields: Map<String, Value>, key: Option<String> },
}

#[derive(Default)]
struct DocumentState {
    line: Option<usize>,
    items: Vec<usize>,
    open: Vec<Container>,
    root: Option<Value>,
    anchors: HashMap<usize, Value>,
    nodes: usize,
    text: usize,
}

struct Reader {
    documents: Vec<FileDocument>,
    state: DocumentState,
}

impl Reader {
    fn take(&mut self, event: Event<'_>, line: usize) -> Result<(), String> {
        let state = &mut self.state;
        if let Event::Scalar(..) | Event::SequenceStart(..) | Event::MappingStart(..) | Event::Alias(_) =
            &event
        {
            state.begins(line);
        }
        match event {
            Event::DocumentStart(_) => *state = DocumentState::default(),
            Event::DocumentEnd => {
                let value = state.root.take().unwrap_or_default();
                if self.documents.len() >= MAX_DOCUMENTS {
                    return Err(format!("the file has more than {MAX_DOCUMENTS} documents"));
                }
                if !value.is_null() {
                    let items = std::mem::take(&mut state.items);
                    self.documents.push(FileDocument { line: state.line.unwrap_or(1), items, value });
                }
            }
            Event::Scalar(text, style, anchor, tag) => {
                state.text += text.len();
                let value = scalar(&text, style, tag.as_deref())?;
                state.complete(value, anchor)?;
            }
            Event::SequenceStart(anchor, _) => state.open(Container::List { anchor, items: Vec::new() })?,
            Event::MappingStart(anchor, _) => {
                state.open(Container::Map { anchor, fields: Map::new(), key: None })?;
            }
            Event::SequenceEnd | Event::MappingEnd => match state.open.pop() {
                Some(Container::List { anchor, items }) => state.complete(Value::Array(items), anchor)?,
                Some(Container::Map { anchor, fields, .. }) => {
                    state.complete(Value::Object(fields), anchor)?
                }
                None => {}
            },
            Event::Alias(anchor) => {
                let value = state.anchors.get(&anchor).cloned().ok_or("an alias within its own anchor")?;
                let (nodes, text) = size(&value);
                state.nodes += nodes;
                state.text += text;
                state.complete(value, 0)?;
            }
            Event::Nothing | Event::StreamStart | Event::StreamEnd => {}
        }
        Ok(())
    }
}

impl DocumentState {
    /// Notes the line where a value begins.
    fn begins(&mut self, line: usize) {
        self.line.get_or_insert(line);
        if let [Container::Map { key: Some(key), .. }, Container::List { .. }] = self.open.as_slice()
            && key == "items"
        {
            self.items.push(line);
        }
    }

    fn open(&mut self, open: Container) -> Result<(), String> {
        if self.open.len() >= MAX_DEPTH {
            return Err(format!("lists and maps are nested more than {MAX_DEPTH} levels deep"));
        }
        self.open.push(open);
        Ok(())
    }

    /// Adds a complete value to its container.
    fn complete(&mut self, value: Value, anchor: usize) -> Result<(), String> {
        self.nodes += 1;
        if self.nodes > MAX_NODES || self.text > MAX_TEXT {
            return Err(format!(
                "a document may have {MAX_NODES} values and {} MiB of text, including copies by aliases",
                MAX_TEXT >> 20
            ));
        }
        if anchor != 0 {
            // The copy is kept until the document is complete.
            let (nodes, text) = size(&value);
            self.nodes += nodes;
            self.text += text;
            self.anchors.insert(anchor, value.clone());
        }
        match self.open.last_mut() {
            None => self.root = Some(value),
            Some(Container::List { items, .. }) => items.push(value),
            Some(Container::Map { fields, key, .. }) => match key.take() {
                None => *key = Some(key_text(value)?),
                Some(name) => {
                    if fields.contains_key(&name) {
                        return Err(format!("duplicate key {name}"));
                    }
                    fields.insert(name, value);
                }
            },
        }
        Ok(())
    }
}

fn key_text(value: Value) -> Result<String, String> {
    match value {
        Value::String(text) if text == "<<" => Err("merge keys (<<) are not supported".to_owned()),
        Value::String(text) => Ok(text),
        // JSON has only string keys, and users of YAML expect `1: x` and `true: x` to work.
        Value::Number(number) => Ok(number.to_string()),
        Value::Bool(truth) => Ok(truth.to_string()),
        Value::Null => Ok(String::new()),
        Value::Array(_) | Value::Object(_) => Err("a list or a map cannot be a key".to_owned()),
    }
}

/// Returns the number of values and the size of all strings in bytes.
fn size(value: &Value) -> (usize, usize) {
    let add = |(a, b): (usize, usize), (c, d): (usize, usize)| (a + c, b + d);
    match value {
        Value::Null | Value::Bool(_) | Value::Number(_) => (1, 0),
        Value::String(text) => (1, text.len()),
        Value::Array(items) => items.iter().map(size).fold((1, 0), add),
        Value::Object(fields) => {
            fields.iter().map(|(key, value)| add((0, key.len()), size(value))).fold((1, 0), add)
        }
    }
}

fn scalar(text: &str, style: ScalarStyle, tag: Option<&Tag>) -> Result<Value, String> {
    let core = tag.filter(|tag| tag.is_yaml_core_schema()).map(|tag| tag.suffix.as_str());
    match (core, style) {
        (Some("str"), _) => return Ok(Value::String(text.to_owned())),
        (None, ScalarStyle::Plain) | (Some("int" | "float" | "bool" | "null"), _) => {}
        (None, _) if tag.is_none() || tag.is_some_and(|tag| tag.handle == "!" && tag.suffix.is_empty()) => {
            return Ok(Value::String(text.to_owned()));
        }
        (_, _) => return Err("a tag without a corresponding JSON type".to_owned()),
    }
    Ok(plain(text))
}

/// Parses a plain scalar of the core schema (YAML 1.2.2, section 10.3.2).
pub(crate) fn plain(text: &str) -> Value {
    match text {
        "" | "~" | "null" | "Null" | "NULL" => return Value::Null,
        "true" | "True" | "TRUE" => return Value::Bool(true),
        "false" | "False" | "FALSE" => return Value::Bool(false),
        _ => {}
    }
    let number = |digits: &str, radix| u64::from_str_radix(digits, radix).ok().map(Number::from);
    let read = match (text.strip_prefix("0o"), text.strip_prefix("0x")) {
        (Some(octal), _) if !octal.starts_with('+') => number(octal, 8),
        (_, Some(hex)) if !hex.starts_with('+') => number(hex, 16),
        _ => decimal(text),
    };
    read.map_or_else(|| Value::String(text.to_owned()), Value::Number)
}

/// Parses `[-+]? [0-9]+`, or `[-+]? ( \. [0-9]+ | [0-9]+ ( \. [0-9]* )? ) ( [eE] [-+]? [0-9]+ )?`.
fn decimal(text: &str) -> Option<Number> {
    let unsigned = text.strip_prefix(['-', '+']).unwrap_or(text);
    if !unsigned.starts_with(|c: char| c.is_ascii_digit() || c == '.')
        || !unsigned.chars().all(|c| c.is_ascii_digit() || matches!(c, '.' | 'e' | 'E' | '-' | '+'))
        || !unsigned.contains(|c: char| c.is_ascii_digit())
    {
        return None;
    }
    let text = text.strip_prefix('+').unwrap_or(text);
    let whole = text.parse::<u64>().map(Number::from).or_else(|_| text.parse::<i64>().map(Number::from));
    whole.ok().or_else(|| text.parse::<f64>().ok().and_then(Number::from_f64))
}

#[cfg(test)]
mod tests;
