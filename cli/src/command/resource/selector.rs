//! Label selectors in the syntax of kubectl: `app=web,tier!=front,env in (a,b),!old`.

use ovl_proto::resource::{Labels, Operator, Requirement};

/// Requirements on labels, all of which must hold.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Selector(Vec<Requirement>);

impl Selector {
    /// Whether the selector matches labels.
    pub(crate) fn matches(&self, labels: &Labels) -> bool {
        self.0.iter().all(|requirement| requirement.matches(labels))
    }
}

/// Parses a selector.
///
/// # Errors
///
/// If a requirement is malformed.
pub(crate) fn parse(text: &str) -> Result<Selector, String> {
    let parts = split(text);
    parts.into_iter().map(str::trim).map(requirement).collect::<Result<_, _>>().map(Selector)
}

/// Splits at the commas that are not in parentheses.
fn split(text: &str) -> Vec<&str> {
    let (mut parts, mut start, mut depth) = (Vec::new(), 0, 0_usize);
    for (at, c) in text.char_indices() {
        match c {
            '(' => depth += 1,
            ')' => depth = depth.saturating_sub(1),
            ',' if depth == 0 => {
                parts.extend(text.get(start..at));
                start = at + 1;
            }
            _ => {}
        }
    }
    parts.extend(text.get(start..));
    parts
}

fn requirement(text: &str) -> Result<Requirement, String> {
    let malformed = || format!("'{text}' is not KEY=VALUE, KEY!=VALUE, KEY in (VALUE,...), KEY or !KEY");
    let (key, operator, values) = if let Some((key, list)) = text.split_once(" in ") {
        (key, Operator::In, values(list).ok_or_else(malformed)?)
    } else if let Some((key, list)) = text.split_once(" notin ") {
        (key, Operator::NotIn, values(list).ok_or_else(malformed)?)
    } else if let Some((key, value)) = text.split_once("!=") {
        (key, Operator::NotIn, vec![value.trim().to_owned()])
    } else if let Some((key, value)) = text.split_once('=') {
        (key, Operator::In, vec![value.strip_prefix('=').unwrap_or(value).trim().to_owned()])
    } else if let Some(key) = text.strip_prefix('!') {
        (key, Operator::DoesNotExist, Vec::new())
    } else {
        (text, Operator::Exists, Vec::new())
    };
    let key = key.trim().to_owned();
    let is_word =
        |word: &str| word.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.' | '/'));
    if key.is_empty() || !is_word(&key) || !values.iter().all(|value| is_word(value)) {
        return Err(malformed());
    }
    Ok(Requirement { key, operator, values })
}

/// Parses `(a, b)`.
fn values(list: &str) -> Option<Vec<String>> {
    let list = list.trim().strip_prefix('(')?.strip_suffix(')')?;
    Some(list.split(',').map(|value| value.trim().to_owned()).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn selectors_match_as_those_of_kubectl() {
        let labels: Labels =
            [("app", "web"), ("a.b/tier", "front")].map(|(k, v)| (k.to_owned(), v.to_owned())).into();
        for (text, expected) in [
            ("app=web", true),
            ("app==web", true),
            ("app = web , a.b/tier", true),
            ("app=db", false),
            ("app!=db", true),
            ("app!=web", false),
            ("none!=web", true),
            ("app in (db, web),a.b/tier notin (back)", true),
            ("app in (db)", false),
            ("app notin (web)", false),
            ("!none", true),
            ("!app", false),
            ("none", false),
            ("app=", false),
        ] {
            assert_eq!(parse(text).unwrap().matches(&labels), expected, "{text}");
        }
        for text in ["", "=web", "app in web", "app=web,", "a b", "app=x y", "app in (a", "!"] {
            assert!(parse(text).is_err(), "{text}");
        }
    }
}
