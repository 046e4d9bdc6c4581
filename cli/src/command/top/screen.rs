//! The screen of `ovlctl top`: what a key changes, and what is drawn. Pure: it neither asks ovld nor touches the terminal.

use std::cmp::Ordering;

use ovl_control::FlowVerdict;
use ratatui::Frame;
use ratatui::crossterm::event::{KeyCode, KeyEvent, KeyModifiers};
use ratatui::layout::{Alignment, Constraint, Layout};
use ratatui::style::{Modifier, Style};
use ratatui::text::Text;
use ratatui::widgets::{Cell, Paragraph, Row, Table, TableState, Wrap};

use super::flows::FlowRow;
use super::rows::{Rates, Rows};
use crate::text::printable;
use crate::time::micros;

/// What is listed.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum View {
    /// Hosts.
    #[default]
    Hosts,
    /// Endpoints.
    Endpoints,
    /// Networks.
    Networks,
    /// Flows: who talks to whom.
    Flows,
}

impl View {
    const ALL: [Self; 4] = [Self::Hosts, Self::Endpoints, Self::Networks, Self::Flows];

    const fn name(self) -> &'static str {
        match self {
            Self::Hosts => "hosts",
            Self::Endpoints => "endpoints",
            Self::Networks => "networks",
            Self::Flows => "flows",
        }
    }
}

/// A value of a row: what is shown, and what it is sorted by.
#[derive(Debug, Clone, PartialEq)]
enum Value {
    Text(String),
    Number(Option<f64>, String),
}

impl Value {
    fn count(count: impl Into<f64>) -> Self {
        let count = count.into();
        Self::Number(Some(count), format!("{count}"))
    }

    fn rate(rate: Option<f64>) -> Self {
        Self::Number(rate, rate.map(short).unwrap_or_default())
    }

    fn text(&self) -> &str {
        match self {
            Self::Text(text) | Self::Number(_, text) => text,
        }
    }

    /// Compares numbers from the largest one, texts from the first one. What is not known comes last.
    fn order(&self, other: &Self) -> Ordering {
        match (self, other) {
            (Self::Number(a, _), Self::Number(b, _)) => b.partial_cmp(a).unwrap_or(Ordering::Equal),
            (a, b) => a.text().cmp(b.text()),
        }
    }
}

/// Formats a number in at most four characters, with decimal prefixes.
fn short(number: f64) -> String {
    let (mut number, mut prefix) = (number, "");
    for next in ["k", "M", "G", "T"] {
        if number < 999.5 {
            break;
        }
        (number, prefix) = (number / 1000.0, next);
    }
    let tenths = (number * 10.0).round();
    let is_whole = tenths % 10.0 == 0.0 || tenths >= 100.0;
    if is_whole { format!("{number:.0}{prefix}") } else { format!("{number:.1}{prefix}") }
}

/// A row as it is listed: its values, and what it stands for.
struct Line {
    values: Vec<Value>,
    /// What `Enter` lists.
    inside: Option<Inside>,
    /// What a filter finds besides the values.
    hidden: String,
}

/// What a list is limited to.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Inside {
    /// The endpoints of a host.
    Host(String),
    /// The endpoints of a network.
    Network(String),
    /// The flows of an endpoint.
    Endpoint(String),
}

/// The columns of a view: title and width. The first one has the rest of the line.
const HOSTS: &[(&str, u16)] = &[
    ("HOST", 0),
    ("STATE", 8),
    ("EPS", 4),
    ("RTT", 7),
    ("LOSS", 4),
    ("SENT/S", 6),
    ("RECV/S", 6),
    ("PKT/S", 5),
    ("DROP/S", 6),
    ("PROBLEMS", 8),
];
const ENDPOINTS: &[(&str, u16)] = &[
    ("ENDPOINT", 0),
    ("NETWORK", 10),
    ("HOST", 10),
    ("STATE", 9),
    ("SENT/S", 6),
    ("RECV/S", 6),
    ("PKT/S", 5),
    ("DROP/S", 6),
    ("DROPS", 5),
];
const NETWORKS: &[(&str, u16)] = &[
    ("NETWORK", 0),
    ("ENCRYPTED", 9),
    ("EPS", 5),
    ("HOSTS", 5),
    ("SENT/S", 6),
    ("RECV/S", 6),
    ("PKT/S", 5),
    ("DROP/S", 6),
];
const FLOWS: &[(&str, u16)] = &[
    ("FROM", 0),
    ("TO", 0),
    ("PORT", 9),
    ("VERDICT", 8),
    ("CONN/S", 6),
    ("SENT/S", 6),
    ("BACK/S", 6),
    ("DROP/S", 6),
];

/// What a key asks of the program.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Wish {
    /// Nothing but to draw.
    Stay,
    /// To end.
    Quit,
}

/// What is shown, as far as the user chose it.
#[derive(Debug, Clone, Default)]
pub(crate) struct Screen {
    view: View,
    inside: Option<Inside>,
    /// The column by which each view is sorted.
    sort: [usize; 4],
    reversed: bool,
    filter: String,
    /// Whether keys are for the filter.
    is_typing: bool,
    selected: usize,
    /// The flow whose details are shown: ends, port and verdict.
    detail: Option<[String; 4]>,
}

impl Screen {
    /// Shows a view.
    pub(crate) fn new(view: View) -> Self {
        Self { view, ..Self::default() }
    }

    /// Whether flows are shown, so that hosts are to count them.
    pub(crate) fn shows_flows(&self) -> bool {
        self.view == View::Flows
    }

    /// Takes a key.
    pub(crate) fn key(&mut self, key: KeyEvent, rows: &Rows) -> Wish {
        if key.modifiers.contains(KeyModifiers::CONTROL) {
            return if key.code == KeyCode::Char('c') { Wish::Quit } else { Wish::Stay };
        }
        if self.is_typing {
            self.type_filter(key.code);
            return Wish::Stay;
        }
        let last = self.lines(rows).len().saturating_sub(1);
        let columns = self.columns().len();
        let sort = &mut self.sort[self.view as usize];
        match key.code {
            KeyCode::Char('q') => return Wish::Quit,
            KeyCode::Char('/') => self.is_typing = true,
            KeyCode::Char('r') => self.reversed = !self.reversed,
            KeyCode::Char('1' | 'h') => self.open(View::Hosts),
            KeyCode::Char('2' | 'e') => self.open(View::Endpoints),
            KeyCode::Char('3' | 'n') => self.open(View::Networks),
            KeyCode::Char('4' | 'f') => self.open(View::Flows),
            KeyCode::Tab => {
                let next = (self.view as usize + 1) % View::ALL.len();
                self.open(View::ALL[next]);
            }
            KeyCode::Right => *sort = (*sort + 1) % columns,
            KeyCode::Left => *sort = (*sort + columns - 1) % columns,
            KeyCode::Up => self.selected = self.selected.saturating_sub(1),
            KeyCode::Down => self.selected = (self.selected + 1).min(last),
            KeyCode::PageUp => self.selected = self.selected.saturating_sub(10),
            KeyCode::PageDown => self.selected = (self.selected + 10).min(last),
            KeyCode::Home => self.selected = 0,
            KeyCode::End => self.selected = last,
            KeyCode::Enter => self.enter(rows),
            KeyCode::Esc | KeyCode::Backspace => self.back(),
            _ => {}
        }
        Wish::Stay
    }

    fn type_filter(&mut self, code: KeyCode) {
        match code {
            KeyCode::Char(c) if self.filter.len() < 64 => self.filter.push(c),
            KeyCode::Backspace => drop(self.filter.pop()),
            KeyCode::Enter => self.is_typing = false,
            KeyCode::Esc => {
                self.is_typing = false;
                self.filter.clear();
            }
            _ => {}
        }
        self.selected = 0;
    }

    fn open(&mut self, view: View) {
        (self.view, self.inside, self.selected, self.detail) = (view, None, 0, None);
    }

    /// Lists the endpoints of the selected host or network, or the flows of the selected endpoint, or shows the selected flow.
    fn enter(&mut self, rows: &Rows) {
        let Some(line) = self.lines(rows).into_iter().nth(self.selected) else { return };
        if self.view == View::Flows {
            let mut parts = line.values.iter().map(|value| value.text().to_owned());
            self.detail = Some(std::array::from_fn(|_| parts.next().unwrap_or_default()));
        } else if let Some(inside) = line.inside {
            self.open(match inside {
                Inside::Host(_) | Inside::Network(_) => View::Endpoints,
                Inside::Endpoint(_) => View::Flows,
            });
            self.inside = Some(inside);
            self.filter.clear();
        }
    }

    /// Takes the last step back.
    fn back(&mut self) {
        if self.detail.take().is_some() {
            return;
        }
        if !self.filter.is_empty() {
            self.filter.clear();
        } else if let Some(inside) = self.inside.take() {
            self.open(match inside {
                Inside::Host(_) => View::Hosts,
                Inside::Network(_) => View::Networks,
                Inside::Endpoint(_) => View::Endpoints,
            });
        }
    }

    fn columns(&self) -> &'static [(&'static str, u16)] {
        match self.view {
            View::Hosts => HOSTS,
            View::Endpoints => ENDPOINTS,
            View::Networks => NETWORKS,
            View::Flows => FLOWS,
        }
    }

    /// Returns the rows that are listed, in their order.
    fn lines(&self, rows: &Rows) -> Vec<Line> {
        let mut lines = match self.view {
            View::Hosts => hosts(rows),
            View::Endpoints => endpoints(rows, self.inside.as_ref()),
            View::Networks => networks(rows),
            View::Flows => flows(rows, self.inside.as_ref()),
        };
        let is_meant = |line: &Line| {
            line.values.iter().any(|value| value.text().contains(&self.filter))
                || line.hidden.contains(&self.filter)
        };
        lines.retain(is_meant);
        let column = self.sort[self.view as usize];
        lines.sort_by(|a, b| match (a.values.get(column), b.values.get(column)) {
            (Some(a), Some(b)) => a.order(b),
            _ => Ordering::Equal,
        });
        if self.reversed {
            lines.reverse();
        }
        lines
    }

    /// Renders what is listed as a text table.
    pub(crate) fn text(&self, rows: &Rows) -> String {
        let lines = self.lines(rows);
        let mut table = crate::text::TextTable::new();
        for (n, (title, _)) in self.columns().iter().enumerate() {
            table = table.column(title, lines.iter().map(|line| line.values.get(n).map_or("", Value::text)));
        }
        table.render()
    }

    /// Draws everything. `note` is what went wrong last, or empty.
    pub(crate) fn draw(&self, frame: &mut Frame<'_>, rows: &Rows, note: &str) {
        let [head, body, foot] =
            Layout::vertical([Constraint::Length(1), Constraint::Min(1), Constraint::Length(1)])
                .areas(frame.area());
        frame.render_widget(Paragraph::new(self.headline(rows, note)), head);
        frame.render_widget(Paragraph::new(self.footline()), foot);
        if let Some(detail) = &self.detail {
            let text = self.detail_of(detail, rows);
            frame.render_widget(Paragraph::new(text).wrap(Wrap { trim: false }), body);
            return;
        }
        let lines = self.lines(rows);
        let columns = self.columns();
        let sort = self.sort[self.view as usize];
        let titles = columns.iter().enumerate().map(|(n, (title, width))| {
            let style = if n == sort { Modifier::REVERSED } else { Modifier::BOLD };
            cell(title, n > 0 && (1..8).contains(width)).style(Style::new().add_modifier(style))
        });
        let listed = lines.iter().map(|line| {
            Row::new(line.values.iter().map(|value| cell(value.text(), matches!(value, Value::Number(..)))))
        });
        let widths = columns.iter().map(|(_, width)| match width {
            0 => Constraint::Fill(1),
            width => Constraint::Length(*width),
        });
        let table = Table::new(listed, widths)
            .header(Row::new(titles))
            .column_spacing(1)
            .row_highlight_style(Style::new().add_modifier(Modifier::REVERSED));
        let selected = self.selected.min(lines.len().saturating_sub(1));
        let mut state = TableState::default().with_selected((!lines.is_empty()).then_some(selected));
        frame.render_stateful_widget(table, body, &mut state);
    }

    /// Says all that is known of a flow.
    fn detail_of(&self, detail: &[String; 4], rows: &Rows) -> String {
        let is_meant = |row: &&FlowRow| flow_values(row).iter().zip(detail).all(|(a, b)| a.text() == b);
        let Some(row) = rows.flows.iter().find(is_meant) else {
            return "It is not seen any more.".to_owned();
        };
        let FlowRow { from, to, port, backend, verdict, hosts, why, per_second, total } = row;
        let mut lines = vec![
            format!("from      {from}"),
            format!("to        {to}"),
            format!("port      {port}"),
            format!("verdict   {}", verdict_text(*verdict)),
            format!("decided   {}", if why.is_empty() { "by no policy" } else { why }),
            format!("seen by   {}", hosts.join(", ")),
            format!("count     {total}, {} a second", short(per_second.opened + per_second.drops)),
            format!("sent      {} bytes a second", short(per_second.sent_bytes)),
            format!("back      {} bytes a second", short(per_second.received_bytes)),
        ];
        if !backend.is_empty() {
            lines.insert(3, format!("backend   {backend}"));
        }
        lines.iter().map(|line| printable(line)).collect::<Vec<_>>().join("\n")
    }

    fn headline(&self, rows: &Rows, note: &str) -> String {
        if !note.is_empty() {
            return format!("ovl top: {}", printable(note));
        }
        let inside = match &self.inside {
            Some(Inside::Host(name) | Inside::Network(name) | Inside::Endpoint(name)) => {
                format!(" of {}", printable(name))
            }
            None => String::new(),
        };
        let alive = rows.hosts.iter().filter(|row| row.answered).count();
        let drops: f64 = rows.endpoints.iter().filter_map(|row| row.per_second.drops).sum();
        format!(
            "ovl top: {}{inside}, seen from {}: {alive}/{} hosts, {} endpoints, {} drops/s",
            self.view.name(),
            printable(&rows.node),
            rows.hosts.len(),
            rows.endpoints.len(),
            short(drops)
        )
    }

    fn footline(&self) -> String {
        if self.is_typing || !self.filter.is_empty() {
            let cursor = if self.is_typing { "_" } else { "" };
            return format!("filter: {}{cursor}   Enter keep  Esc clear", printable(&self.filter));
        }
        "1 hosts 2 endpoints 3 networks 4 flows <-> sort r reverse / filter Enter q quit".to_owned()
    }
}

fn cell(text: &str, is_number: bool) -> Cell<'_> {
    let alignment = if is_number { Alignment::Right } else { Alignment::Left };
    Cell::new(Text::raw(text).alignment(alignment))
}

fn rates(rates: &Rates) -> [Value; 4] {
    [rates.sent_bytes, rates.received_bytes, rates.packets, rates.drops].map(Value::rate)
}

fn hosts(rows: &Rows) -> Vec<Line> {
    let line = |row: &super::rows::HostRow| {
        let number = |value: Option<u64>, text: fn(u64) -> String| {
            Value::Number(value.map(|value| value as f64), value.map(text).unwrap_or_default())
        };
        let state = if row.answered { row.state.to_string() } else { format!("{}, ?", row.state) };
        let mut values = vec![
            Value::Text(printable(&row.host)),
            Value::Text(state),
            Value::count(row.endpoints),
            number(row.rtt_us, micros),
            number(row.loss_percent.map(u64::from), |loss| format!("{loss}%")),
        ];
        values.extend(rates(&row.per_second));
        values.push(Value::count(row.problems as f64));
        Line { values, inside: Some(Inside::Host(row.host.clone())), hidden: String::new() }
    };
    rows.hosts.iter().map(line).collect()
}

fn endpoints(rows: &Rows, inside: Option<&Inside>) -> Vec<Line> {
    let is_inside = |row: &&super::rows::EndpointRow| match inside {
        Some(Inside::Host(host)) => row.host == *host,
        Some(Inside::Network(network)) => row.network == *network,
        Some(Inside::Endpoint(_)) | None => true,
    };
    let line = |row: &super::rows::EndpointRow| {
        let name = match row.namespace.as_str() {
            "default" => row.name.clone(),
            namespace => format!("{namespace}/{}", row.name),
        };
        let mut values = vec![
            Value::Text(printable(&name)),
            Value::Text(printable(&row.network)),
            Value::Text(printable(&row.host)),
            Value::Text(row.state.to_string()),
        ];
        values.extend(rates(&row.per_second));
        values.push(Value::rate(row.dropped.map(|count| count as f64)));
        let full = format!("{}/{}", row.namespace, row.name);
        Line { values, inside: Some(Inside::Endpoint(full)), hidden: String::new() }
    };
    rows.endpoints.iter().filter(is_inside).map(line).collect()
}

fn networks(rows: &Rows) -> Vec<Line> {
    let line = |row: &super::rows::NetworkRow| {
        let mut values = vec![
            Value::Text(printable(&row.network)),
            Value::Text(row.encrypt.to_string()),
            Value::count(row.endpoints),
            Value::count(row.hosts as f64),
        ];
        values.extend(rates(&row.per_second));
        Line { values, inside: Some(Inside::Network(row.network.clone())), hidden: String::new() }
    };
    rows.networks.iter().map(line).collect()
}

fn verdict_text(verdict: FlowVerdict) -> &'static str {
    match verdict {
        FlowVerdict::Passed => "passed",
        FlowVerdict::Dropped => "dropped",
    }
}

fn flow_values(row: &FlowRow) -> Vec<Value> {
    let rates = &row.per_second;
    let numbers = [rates.opened, rates.sent_bytes, rates.received_bytes, rates.drops];
    let mut values = vec![
        Value::Text(printable(&row.from)),
        Value::Text(printable(&row.to)),
        Value::Text(printable(&row.port)),
        Value::Text(verdict_text(row.verdict).to_owned()),
    ];
    values.extend(numbers.map(|rate| Value::rate(Some(rate))));
    values
}

fn flows(rows: &Rows, inside: Option<&Inside>) -> Vec<Line> {
    let is_inside = |row: &&FlowRow| match inside {
        // A backend is named with its port.
        Some(Inside::Endpoint(name)) => {
            row.from == *name
                || row.to == *name
                || row.backend.rsplit_once(':').is_some_and(|(of, _)| of == name)
        }
        _ => true,
    };
    let line = |row: &FlowRow| Line {
        values: flow_values(row),
        inside: None,
        hidden: format!("{} {} {}", row.hosts.join(" "), row.backend, row.why),
    };
    rows.flows.iter().filter(is_inside).map(line).collect()
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use ratatui::Terminal;
    use ratatui::backend::TestBackend;

    use super::super::flows::FlowTable;
    use super::super::flows::tests::seen;
    use super::super::rows::tests::sample;
    use super::*;

    fn rows() -> Rows {
        Rows::new(Some(&sample(10)), &sample(14))
    }

    fn press(screen: &mut Screen, rows: &Rows, keys: &[KeyCode]) {
        for code in keys {
            assert_eq!(screen.key(KeyEvent::from(*code), rows), Wish::Stay, "{code:?}");
        }
    }

    /// Draws on a terminal of some columns and eight lines.
    fn drawn(screen: &Screen, rows: &Rows, columns: u16) -> Vec<String> {
        let mut terminal = Terminal::new(TestBackend::new(columns, 8)).unwrap();
        terminal.draw(|frame| screen.draw(frame, rows, "")).unwrap();
        let buffer = terminal.backend().buffer();
        let lines = buffer.content().chunks(usize::from(columns));
        lines
            .map(|line| line.iter().map(|cell| cell.symbol()).collect::<String>().trim_end().to_owned())
            .collect()
    }

    #[test]
    fn hosts_fit_in_eighty_columns() {
        let lines = drawn(&Screen::default(), &rows(), 80);
        assert_eq!(lines[0], "ovl top: hosts, seen from h1: 2/2 hosts, 2 endpoints, 2 drops/s");
        let words = |n: usize| lines[n].split_whitespace().collect::<Vec<_>>();
        assert_eq!(
            words(1),
            ["HOST", "STATE", "EPS", "RTT", "LOSS", "SENT/S", "RECV/S", "PKT/S", "DROP/S", "PROBLEMS"]
        );
        assert_eq!(words(2), ["h1", "alive", "1", "1k", "0", "10", "1", "0"]);
        assert_eq!(words(3), ["h2", "alive", "1", "0.3ms", "5%", "5k", "0", "50", "1", "0"]);
        assert!(lines[7].ends_with("q quit"), "{lines:?}");
    }

    #[test]
    fn keys_sort_filter_and_go_in_and_back() {
        let rows = rows();
        let mut screen = Screen::default();
        // By what was sent, the largest first.
        press(&mut screen, &rows, &[KeyCode::Right; 5]);
        assert!(drawn(&screen, &rows, 80)[2].starts_with("h2"));
        press(&mut screen, &rows, &[KeyCode::Char('r')]);
        assert!(drawn(&screen, &rows, 80)[2].starts_with("h1"));
        press(&mut screen, &rows, &[KeyCode::Char('r'), KeyCode::Enter]);
        let lines = drawn(&screen, &rows, 80);
        assert!(lines[0].contains("endpoints of h2"), "{lines:?}");
        assert!(lines[2].starts_with("b ") && lines[3].is_empty(), "{lines:?}");
        press(&mut screen, &rows, &[KeyCode::Esc]);
        assert!(drawn(&screen, &rows, 80)[0].contains("hosts"));
        press(
            &mut screen,
            &rows,
            &[KeyCode::Char('e'), KeyCode::Char('/'), KeyCode::Char('h'), KeyCode::Char('1')],
        );
        let lines = drawn(&screen, &rows, 80);
        assert!(lines[2].starts_with("a ") && lines[3].is_empty(), "{lines:?}");
        assert!(lines[7].starts_with("filter: h1_"), "{lines:?}");
        press(
            &mut screen,
            &rows,
            &[KeyCode::Char('q'), KeyCode::Esc, KeyCode::Tab, KeyCode::Tab, KeyCode::Tab],
        );
        assert_eq!(screen.view, View::Hosts);
        assert_eq!(screen.key(KeyEvent::from(KeyCode::Char('q')), &rows), Wish::Quit);
        let control = KeyEvent::new(KeyCode::Char('c'), KeyModifiers::CONTROL);
        assert_eq!(screen.key(control, &rows), Wish::Quit);
    }

    fn rows_with_flows() -> Rows {
        let mut table = FlowTable::default();
        table.take(seen("h1", 1_000), Instant::now());
        Rows { flows: table.rows().0, ..rows() }
    }

    #[test]
    fn flows_fit_in_eighty_columns_and_have_details() {
        let rows = rows_with_flows();
        let mut screen = Screen::new(View::Endpoints);
        press(&mut screen, &rows, &[KeyCode::Enter]);
        let lines = drawn(&screen, &rows, 80);
        assert!(lines[0].contains("flows of default/a"), "{lines:?}");
        let words = |n: usize| lines[n].split_whitespace().collect::<Vec<_>>();
        assert_eq!(words(1), ["FROM", "TO", "PORT", "VERDICT", "CONN/S", "SENT/S", "BACK/S", "DROP/S"]);
        assert_eq!(words(2), ["default/a", "default/b", "80/tcp", "passed", "4", "2k", "500k", "0"]);
        assert_eq!(words(3), ["default/a", "default/b", "81/tcp", "dropped", "0", "0", "0", "6"]);
        // By drops, and what decides of the first one.
        press(&mut screen, &rows, &[KeyCode::Left, KeyCode::Enter]);
        let lines = drawn(&screen, &rows, 80).join("\n");
        assert!(
            lines.contains("verdict   dropped") && lines.contains("decided   no ingress rule"),
            "{lines}"
        );
        press(&mut screen, &rows, &[KeyCode::Esc, KeyCode::Esc]);
        assert_eq!(screen.view, View::Endpoints);
        // A filter finds what decides, and a flow that is gone has no details.
        press(&mut screen, &rows, &[KeyCode::Char('f'), KeyCode::Char('/')]);
        press(&mut screen, &rows, &"only-api".chars().map(KeyCode::Char).collect::<Vec<_>>());
        let lines = drawn(&screen, &rows, 80);
        assert!(lines[2].contains("dropped") && lines[3].is_empty(), "{lines:?}");
        press(&mut screen, &rows, &[KeyCode::Enter, KeyCode::Enter]);
        let empty = Rows { flows: Vec::new(), ..rows };
        assert!(drawn(&screen, &empty, 80)[1].contains("not seen any more"));
    }

    #[test]
    fn small_and_empty_screens_are_drawn() {
        let empty = Rows::default();
        for rows in [&empty, &rows_with_flows()] {
            for view in View::ALL {
                let mut screen = Screen::new(view);
                press(&mut screen, rows, &[KeyCode::Down, KeyCode::End, KeyCode::PageUp, KeyCode::Enter]);
                for columns in [1, 20, 200] {
                    drawn(&screen, rows, columns);
                }
            }
        }
    }

    #[test]
    fn numbers_are_short() {
        for (number, expected) in [
            (0.0, "0"),
            (0.3, "0.3"),
            (9.0, "9"),
            (950.0, "950"),
            (999.7, "1k"),
            (1_250_000.0, "1.2M"),
            (3e13, "30T"),
        ] {
            assert_eq!(short(number), expected);
        }
    }

    #[test]
    fn control_characters_of_names_do_not_reach_the_terminal() {
        let mut rows = rows();
        rows.endpoints[0].name = "a\u{1b}[2J".to_owned();
        rows.node = "\u{1b}]0;x\u{7}".to_owned();
        rows.flows = rows_with_flows().flows;
        rows.flows.iter_mut().for_each(|row| row.why = "\u{1b}[31m".to_owned());
        let mut flows = Screen::new(View::Flows);
        press(&mut flows, &rows, &[KeyCode::Enter]);
        assert!(!drawn(&flows, &rows, 80).join("").contains('\u{1b}'));
        let lines = drawn(&Screen::new(View::Endpoints), &rows, 120).join("");
        assert!(!lines.contains('\u{1b}') && lines.contains("a\\u{1b}[2J"), "{lines}");
    }
}
