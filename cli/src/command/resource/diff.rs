//! Line-by-line difference of two versions of an object.

use ovl_control::{Action, Applied};
use ovl_manifest::yaml::to_yaml;

use crate::text::printable_lines;

/// Number of unchanged lines shown around a change.
const CONTEXT: usize = 3;
/// Maximum number of lines to compare. Longer texts are shown as a whole, because the comparison is
/// quadratic.
const MAX_LINES: usize = 4000;

/// Renders the change of an object like `diff -u`. Empty if there is none.
pub(super) fn of_object(object: &Applied) -> String {
    if object.action == Action::Unchanged {
        return String::new();
    }
    let text = |value: &Option<serde_json::Value>| value.as_ref().map(to_yaml).unwrap_or_default();
    let slash = if object.namespace.is_empty() { "" } else { "/" };
    let name = format!("{}/{}{slash}{}", object.kind.qualified(), object.namespace, object.name);
    let unified = unified(&text(&object.before), &text(&object.after));
    printable_lines(&format!("--- {name} in the cluster\n+++ {name} as given\n{unified}")) + "\n"
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Line<'a> {
    Both(&'a str),
    Gone(&'a str),
    New(&'a str),
}

fn unified(before: &str, after: &str) -> String {
    let (before, after): (Vec<&str>, Vec<&str>) = (before.lines().collect(), after.lines().collect());
    let lines = compare(&before, &after);
    let changed: Vec<usize> =
        lines.iter().enumerate().filter(|(_, line)| !matches!(line, Line::Both(_))).map(|(n, _)| n).collect();
    let near = |n: usize| {
        let next = changed.partition_point(|change| *change + CONTEXT < n);
        changed.get(next).is_some_and(|change| *change <= n + CONTEXT)
    };
    let mut out = String::new();
    let mut skipped = true;
    let (mut old, mut new) = (0, 0);
    for (n, line) in lines.iter().enumerate() {
        if near(n) {
            if skipped {
                out.push_str(&format!("@@ -{} +{} @@\n", old + 1, new + 1));
            }
            let (sign, text) = match line {
                Line::Both(text) => (' ', text),
                Line::Gone(text) => ('-', text),
                Line::New(text) => ('+', text),
            };
            out.push(sign);
            out.push_str(text);
            out.push('\n');
        }
        skipped = !near(n);
        old += usize::from(!matches!(line, Line::New(_)));
        new += usize::from(!matches!(line, Line::Gone(_)));
    }
    out
}

/// Compares two texts by their longest common subsequence.
fn compare<'a>(before: &[&'a str], after: &[&'a str]) -> Vec<Line<'a>> {
    let gone = |line: &&'a str| Line::Gone(line);
    let new = |line: &&'a str| Line::New(line);
    if before.len() + after.len() > MAX_LINES {
        return before.iter().map(gone).chain(after.iter().map(new)).collect();
    }
    // `common[i][j]` is the length of the longest common subsequence of `before[i..]` and `after[j..]`.
    let mut common = vec![vec![0_u16; after.len() + 1]; before.len() + 1];
    let at = |common: &Vec<Vec<u16>>, i: usize, j: usize| {
        common.get(i).and_then(|row| row.get(j)).copied().unwrap_or_default()
    };
    for (i, old) in before.iter().enumerate().rev() {
        for (j, line) in after.iter().enumerate().rev() {
            let longest = if old == line {
                at(&common, i + 1, j + 1) + 1
            } else {
                at(&common, i + 1, j).max(at(&common, i, j + 1))
            };
            if let Some(cell) = common.get_mut(i).and_then(|row| row.get_mut(j)) {
                *cell = longest;
            }
        }
    }
    let (mut i, mut j, mut lines) = (0, 0, Vec::new());
    loop {
        match (before.get(i), after.get(j)) {
            (Some(old), Some(line)) if old == line => {
                lines.push(Line::Both(line));
                (i, j) = (i + 1, j + 1);
            }
            (Some(old), next) if next.is_none() || at(&common, i + 1, j) >= at(&common, i, j + 1) => {
                lines.push(gone(old));
                i += 1;
            }
            (_, Some(line)) => {
                lines.push(new(line));
                j += 1;
            }
            (_, None) => return lines,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn changes_are_shown_with_context() {
        let before = "a\nb\nc\nd\ne\nf\ng\nh\ni\n";
        let after = "a\nb\nc\nd\nE\nf\ng\nh\ni\nj\n";
        assert_eq!(unified(before, after), "@@ -2 +2 @@\n b\n c\n d\n-e\n+E\n f\n g\n h\n i\n+j\n");
        assert_eq!(unified("a\n", "a\n"), "");
        assert_eq!(unified("", "a\n"), "@@ -1 +1 @@\n+a\n");
        let far = "1\n2\n3\n4\n5\n6\n7\n8\n9\n";
        assert_eq!(unified(far, "1\n2\n3\n4\n5\n6\n7\n8\n").lines().count(), 5);
    }
}
