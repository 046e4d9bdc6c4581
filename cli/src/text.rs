//! Human-readable output: tables without borders, key-value blocks, lists.
//!
//! Names, labels and messages come from other hosts. All functions here escape control characters, so that
//! a workload's name cannot send escape sequences to the terminal.

use std::fmt::Display;

use comfy_table::{Table as Grid, presets::NOTHING};

/// The cell text of an absent value.
pub(crate) const ABSENT: &str = "-";

/// A table that is built column by column.
#[derive(Debug, Default)]
pub(crate) struct TextTable {
    headers: Vec<&'static str>,
    columns: Vec<Vec<String>>,
}

impl TextTable {
    /// Creates an empty table.
    pub(crate) fn new() -> Self {
        Self::default()
    }

    /// Adds a column. An empty cell becomes [`ABSENT`].
    pub(crate) fn column<C: Display>(mut self, header: &'static str, cells: impl Iterator<Item = C>) -> Self {
        self.headers.push(header);
        self.columns.push(cells.map(|cell| cell_text(&cell.to_string())).collect());
        self
    }

    /// Adds a column unless all of its cells equal `default`.
    pub(crate) fn optional_column<C: Display>(
        self,
        header: &'static str,
        default: &str,
        cells: impl Iterator<Item = C>,
    ) -> Self {
        let cells: Vec<String> = cells.map(|cell| cell.to_string()).collect();
        if cells.iter().all(|cell| cell == default) { self } else { self.column(header, cells.into_iter()) }
    }

    /// Renders the table: never wrapped, two spaces between columns, no trailing spaces.
    pub(crate) fn render(self) -> String {
        let mut grid = Grid::new();
        grid.load_style(NOTHING).set_header(self.headers);
        let rows = self.columns.first().map_or(0, Vec::len);
        for row in 0..rows {
            grid.add_row(self.columns.iter().filter_map(|column| column.get(row)));
        }
        for column in grid.column_iter_mut() {
            column.set_padding((0, 2));
        }
        grid.trim_fmt() + "\n"
    }
}

/// Renders one `key  value` pair per line, with aligned values.
pub(crate) fn key_value_block(pairs: &[(&str, String)]) -> String {
    let width = pairs.iter().map(|(key, _)| key.len()).max().unwrap_or_default();
    pairs.iter().map(|(key, value)| format!("{key:width$}  {}\n", cell_text(value))).collect()
}

/// Renders one item per line, each prefixed with `bullet`.
pub(crate) fn prefixed_lines(bullet: &str, items: &[String]) -> String {
    items.iter().map(|item| format!("{bullet}{}\n", printable(item))).collect()
}

/// Joins items with commas.
pub(crate) fn comma_separated<T: Display>(items: impl IntoIterator<Item = T>) -> String {
    items.into_iter().map(|item| item.to_string()).collect::<Vec<_>>().join(",")
}

/// Formats an optional value. The empty string if `None`, which tables show as [`ABSENT`].
pub(crate) fn optional<T: Display>(value: Option<T>) -> String {
    value.map(|value| value.to_string()).unwrap_or_default()
}

/// Returns `yes` or `no`.
pub(crate) fn yes_no(value: bool) -> String {
    if value { "yes" } else { "no" }.to_owned()
}

/// Formats a count with its noun: `1 thing`, `2 things`.
pub(crate) fn plural(number: u64, thing: &str) -> String {
    if number == 1 { format!("1 {thing}") } else { format!("{number} {thing}s") }
}

/// Escapes control characters, including newlines.
pub(crate) fn printable(text: &str) -> String {
    let escape = |c: char| if c.is_control() { c.escape_default().to_string() } else { c.to_string() };
    text.chars().map(escape).collect()
}

/// Escapes control characters except newlines, and removes trailing white space.
pub(crate) fn printable_lines(text: &str) -> String {
    text.trim_end().split('\n').map(printable).collect::<Vec<_>>().join("\n")
}

fn cell_text(cell: &str) -> String {
    if cell.is_empty() { ABSENT.to_owned() } else { printable(cell) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_separated_by_two_spaces_without_trailing_spaces() {
        let table = TextTable::new()
            .column("NAME", ["a", "longer"].iter())
            .column("N", [1, 22].iter())
            .column("LAST", ["", "x"].iter());
        assert_eq!(table.render(), "NAME    N   LAST\na       1   -\nlonger  22  x\n");
    }

    #[test]
    fn empty_table_prints_its_header() {
        assert_eq!(
            TextTable::new().column("A", [""; 0].iter()).column("B", [""; 0].iter()).render(),
            "A  B\n"
        );
    }

    #[test]
    fn optional_column_is_omitted_if_all_cells_are_the_default() {
        let table = |cells: [&'static str; 2]| {
            TextTable::new().column("A", [1, 2].iter()).optional_column("B", "none", cells.iter()).render()
        };
        assert_eq!(table(["none", "none"]), "A\n1\n2\n");
        assert_eq!(table(["none", "wg"]), "A  B\n1  none\n2  wg\n");
    }

    #[test]
    fn control_characters_are_escaped() {
        let table = TextTable::new().column("NAME", ["\u{1b}[2Jx\ny\u{9b}"].iter()).render();
        assert_eq!(table, "NAME\n\\u{1b}[2Jx\\ny\\u{9b}\n");
        assert_eq!(prefixed_lines("- ", &["a\rb".to_owned()]), "- a\\rb\n");
        assert_eq!(printable_lines("one\n\u{7}two\n"), "one\n\\u{7}two");
    }

    #[test]
    fn long_rows_are_not_wrapped() {
        let long = "x".repeat(500);
        assert_eq!(TextTable::new().column("A", [&long].iter()).render(), format!("A\n{long}\n"));
    }
}
