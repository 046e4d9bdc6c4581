//! Reads what libyaml reads and YAML 1.2 forbids: inside flow collections and quoted texts, lines may have any
//! indentation. kubectl's parser is a port of libyaml, so charts have `}` in the column of its key.
//!
//! White space at the start of such a line has no meaning, so spaces are added to it, and the text is parsed again.

use saphyr_parser::ScanError;

/// The spaces that are added to a line. More are added if they do not suffice.
const PADDING: usize = 64;
/// The maximum number of bytes that are parsed because of repairs.
pub(super) const MAX_REPARSED: usize = 256 << 20;

/// Adds spaces to the lines that an error is about. Returns `false` if the error is of another kind.
pub(super) fn indent(text: &mut String, error: &ScanError) -> bool {
    let Some(lines) = lines_of(text, error) else { return false };
    let mut padded = String::with_capacity(text.len() + lines.len() * PADDING);
    let mut rest = 0;
    for line in lines {
        padded.push_str(text.get(rest..line).unwrap_or_default());
        padded.extend(std::iter::repeat_n(' ', PADDING));
        rest = line;
    }
    padded.push_str(text.get(rest..).unwrap_or_default());
    *text = padded;
    true
}

/// Returns the starts of the lines that need more spaces, in their order. `None` if that does not help.
fn lines_of(text: &str, error: &ScanError) -> Option<Vec<usize>> {
    let (line, column) = (error.marker().line().checked_sub(1)?, error.marker().col());
    let (start, content) = text
        .split_inclusive('\n')
        .scan(0, |at, line| {
            let start = *at;
            *at += line.len();
            Some((start, line))
        })
        .nth(line)?;
    let (at, _) = content.char_indices().nth(column)?;
    let is_first = content.get(..at)?.trim_start_matches([' ', '\t']).is_empty();
    match error.info() {
        "invalid indentation in quoted scalar" => continuation_lines(text, start + at),
        // The parser checks these only inside flow collections and quoted texts.
        "invalid indentation" | "invalid indentation in flow construct" if is_first => {
            Some(lines_of_collection(text, start))
        }
        "tab cannot be used as indentation" if is_first => Some(vec![start]),
        _ => None,
    }
}

/// Returns the starts of the line at `start`, which begins inside a flow collection, and of the lines after it as far as
/// they are certainly inside it too: up to its end, or to a line with a quoted text or a comment.
fn lines_of_collection(text: &str, start: usize) -> Vec<usize> {
    let (mut lines, mut at, mut depth) = (Vec::new(), start, 0_usize);
    for line in text.get(start..).unwrap_or_default().split_inclusive('\n') {
        if at != start && (line.starts_with("---") || line.starts_with("...")) {
            break;
        }
        lines.push(at);
        at += line.len();
        for c in line.chars() {
            match c {
                '[' | '{' => depth += 1,
                ']' | '}' if depth > 0 => depth -= 1,
                ']' | '}' | '"' | '\'' | '#' => return lines,
                _ => {}
            }
        }
    }
    lines
}

/// Returns the starts of the lines that a quoted text, which begins at `start`, continues on. `None` if it has no end.
fn continuation_lines(text: &str, start: usize) -> Option<Vec<usize>> {
    let mut chars = text.get(start..)?.char_indices().map(|(at, c)| (start + at, c)).peekable();
    let (_, quote) = chars.next().filter(|(_, c)| matches!(c, '"' | '\''))?;
    let mut lines = Vec::new();
    while let Some((at, c)) = chars.next() {
        match c {
            '\n' => lines.push(at + 1),
            // An escaped newline joins lines, and the white space after it has no meaning either.
            '\\' if quote == '"' => {
                if let Some((at, '\n')) = chars.next() {
                    lines.push(at + 1);
                }
            }
            // Two single quotation marks stand for one.
            c if c == quote && chars.next_if(|(_, next)| quote == '\'' && *next == quote).is_none() => {
                return Some(lines);
            }
            _ => {}
        }
    }
    None
}
