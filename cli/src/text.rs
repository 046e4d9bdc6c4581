//! Text for people: tables without borders, blocks of keys and values, lists.
//!
//! Names, labels and messages come from other hosts. Whatever goes through here has its control
//! characters escaped, so that no workload's name can move the cursor of whoever lists it.

use std::fmt::Display;

use comfy_table::{Table as Grid, presets::NOTHING};

/// What stands for a value that is not there.
pub(crate) const ABSENT: &str = "-";

/// A table under construction, column by column.
#[derive(Debug, Default)]
pub(crate) struct Table {
    headers: Vec<&'static str>,
    columns: Vec<Vec<String>>,
}

impl Table {
    /// An empty one.
    pub(crate) fn new() -> Self {
        Self::default()
    }

    /// Adds a column. An empty cell becomes [`ABSENT`].
    pub(crate) fn column<C: Display>(mut self, header: &'static str, cells: impl Iterator<Item = C>) -> Self {
        self.headers.push(header);
        self.columns.push(cells.map(|cell| filled(&cell.to_string())).collect());
        self
    }

    /// Adds a column, unless each of its cells is the usual one: it would only take space.
    pub(crate) fn unusual<C: Display>(
        self,
        header: &'static str,
        usual: &str,
        cells: impl Iterator<Item = C>,
    ) -> Self {
        let cells: Vec<String> = cells.map(|cell| cell.to_string()).collect();
        if cells.iter().all(|cell| cell == usual) { self } else { self.column(header, cells.into_iter()) }
    }

    /// The table as text: never wrapped, two spaces between columns, none at the end of a line.
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

/// Keys and values, one pair a line, the values aligned.
pub(crate) fn block(pairs: &[(&str, String)]) -> String {
    let width = pairs.iter().map(|(key, _)| key.len()).max().unwrap_or_default();
    pairs.iter().map(|(key, value)| format!("{key:width$}  {}\n", filled(value))).collect()
}

/// One item a line, each after `bullet`.
pub(crate) fn lines(bullet: &str, items: &[String]) -> String {
    items.iter().map(|item| format!("{bullet}{}\n", printable(item))).collect()
}

/// Items with commas between them.
pub(crate) fn list<T: Display>(items: impl IntoIterator<Item = T>) -> String {
    items.into_iter().map(|item| item.to_string()).collect::<Vec<_>>().join(",")
}

/// The value, or nothing, which a table shows as [`ABSENT`].
pub(crate) fn maybe<T: Display>(value: Option<T>) -> String {
    value.map(|value| value.to_string()).unwrap_or_default()
}

/// `yes` or `no`.
pub(crate) fn yes(value: bool) -> String {
    if value { "yes" } else { "no" }.to_owned()
}

/// `1 thing`, `2 things`.
pub(crate) fn count(number: u64, thing: &str) -> String {
    if number == 1 { format!("1 {thing}") } else { format!("{number} {thing}s") }
}

/// The text with control characters escaped.
pub(crate) fn printable(text: &str) -> String {
    let escape = |c: char| if c.is_control() { c.escape_default().to_string() } else { c.to_string() };
    text.chars().map(escape).collect()
}

/// The same for a text that may have several lines.
pub(crate) fn printable_lines(text: &str) -> String {
    text.trim_end().split('\n').map(printable).collect::<Vec<_>>().join("\n")
}

fn filled(cell: &str) -> String {
    if cell.is_empty() { ABSENT.to_owned() } else { printable(cell) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_table_has_two_spaces_between_columns_and_none_at_the_end() {
        let table = Table::new()
            .column("NAME", ["a", "longer"].iter())
            .column("N", [1, 22].iter())
            .column("LAST", ["", "x"].iter());
        assert_eq!(table.render(), "NAME    N   LAST\na       1   -\nlonger  22  x\n");
    }

    #[test]
    fn a_table_without_rows_is_its_header() {
        assert_eq!(Table::new().column("A", [""; 0].iter()).column("B", [""; 0].iter()).render(), "A  B\n");
    }

    #[test]
    fn a_column_of_usual_values_is_left_out() {
        let table = |cells: [&'static str; 2]| {
            Table::new().column("A", [1, 2].iter()).unusual("B", "none", cells.iter()).render()
        };
        assert_eq!(table(["none", "none"]), "A\n1\n2\n");
        assert_eq!(table(["none", "wg"]), "A  B\n1  none\n2  wg\n");
    }

    #[test]
    fn control_characters_do_not_reach_the_terminal() {
        let table = Table::new().column("NAME", ["\u{1b}[2Jx\ny\u{9b}"].iter()).render();
        assert_eq!(table, "NAME\n\\u{1b}[2Jx\\ny\\u{9b}\n");
        assert_eq!(lines("- ", &["a\rb".to_owned()]), "- a\\rb\n");
        assert_eq!(printable_lines("one\n\u{7}two\n"), "one\n\\u{7}two");
    }

    #[test]
    fn a_long_row_is_not_wrapped() {
        let long = "x".repeat(500);
        assert_eq!(Table::new().column("A", [&long].iter()).render(), format!("A\n{long}\n"));
    }
}
