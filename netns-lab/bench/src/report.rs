//! The report: a table for people and JSON for programs.

use std::fmt::Write as _;
use std::fs;
use std::path::Path;

use anyhow::{Context, Result};
use serde_json::{Value, json};

use super::setup::Setup;
use super::stats::round;

/// The target of a value.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Bar {
    AtMost(f64),
    AtLeast(f64),
}

/// A measured value, or the reason why there is none.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Measured {
    Value(f64),
    /// A required peer is unavailable on this machine.
    NoPeer,
    /// The measurement failed; the figure's notes say why.
    Failed,
}

impl Measured {
    /// Returns the ratio of two values, if both were measured.
    pub(crate) fn over(self, other: Measured) -> Measured {
        match (self, other) {
            (Measured::Value(this), Measured::Value(other)) => Measured::Value(this / other),
            (Measured::Failed, _) | (_, Measured::Failed) => Measured::Failed,
            _ => Measured::NoPeer,
        }
    }
}

/// One row of the table.
#[derive(Clone, Debug)]
pub(crate) struct Row {
    what: String,
    value: Measured,
    unit: &'static str,
    bar: Option<Bar>,
}

impl Row {
    /// Creates a row without a bar.
    pub(crate) fn context(what: &str, value: f64, unit: &'static str) -> Self {
        Row::of(what, Measured::Value(value), unit, None)
    }

    pub(crate) fn with_bar(what: &str, value: f64, unit: &'static str, bar: Bar) -> Self {
        Row::of(what, Measured::Value(value), unit, Some(bar))
    }

    /// Creates a row whose value may be missing.
    pub(crate) fn of(what: &str, value: Measured, unit: &'static str, bar: Option<Bar>) -> Self {
        Row { what: what.to_owned(), value, unit, bar }
    }

    /// Returns whether the bar is met. NaN does not meet a bar. `None` if there is no bar or a peer is
    /// unavailable.
    fn met(&self) -> Option<bool> {
        let Measured::Value(value) = self.value else { return None };
        self.bar.map(|bar| match bar {
            Bar::AtMost(most) => value <= most,
            Bar::AtLeast(least) => value >= least,
        })
    }

    fn lacks_peer(&self) -> bool {
        self.bar.is_some() && self.value == Measured::NoPeer
    }

    fn cells(&self) -> [String; 4] {
        let bar = match self.bar {
            None => String::new(),
            Some(Bar::AtMost(most)) => format!("at most {most}"),
            Some(Bar::AtLeast(least)) => format!("at least {least}"),
        };
        let met = match (self.met(), self.value) {
            (Some(true), _) => "yes",
            (Some(false), _) => "NO",
            (None, Measured::NoPeer) if self.bar.is_some() => "not measured",
            (None, Measured::Failed) if self.bar.is_some() => "NO",
            (None, _) => "",
        };
        let value = match self.value {
            Measured::Value(value) => format!("{} {}", shown(value), self.unit),
            Measured::NoPeer => "no peer".to_owned(),
            Measured::Failed => "failed".to_owned(),
        };
        [self.what.clone(), value.trim_end().to_owned(), bar, met.to_owned()]
    }

    fn to_json(&self) -> Value {
        let bar = self.bar.map(|bar| match bar {
            Bar::AtMost(most) => json!({"at_most": most}),
            Bar::AtLeast(least) => json!({"at_least": least}),
        });
        let (value, lack) = match self.value {
            Measured::Value(value) => (Some(round(value)), None),
            Measured::NoPeer => (None, Some("no peer")),
            Measured::Failed => (None, Some("failed")),
        };
        json!({
            "what": self.what,
            // JSON cannot represent NaN; it becomes null.
            "value": value,
            "lack": lack,
            "unit": self.unit,
            "bar": bar,
            "met": self.met(),
        })
    }
}

/// Formats a value with three or four significant digits.
fn shown(value: f64) -> String {
    match value.abs() {
        _ if value.fract() == 0.0 => format!("{value:.0}"),
        0.0..0.095 => format!("{value:.3}"),
        0.095..100.0 => format!("{value:.2}"),
        _ => format!("{value:.0}"),
    }
}

/// A figure: its values and the information to judge them.
#[derive(Clone, Debug, Default)]
pub(crate) struct Figure {
    /// Set-up and method of the measurement.
    pub(crate) setup: String,
    pub(crate) rows: Vec<Row>,
    /// Notes for the reader, such as irregularities.
    pub(crate) notes: Vec<String>,
    /// Summaries of the samples and other details, only in the JSON.
    pub(crate) details: Value,
}

/// The name of a figure, and its result or error.
pub(crate) type Outcome = (&'static str, Result<Figure>);

/// Number of missed, failed and unmeasured bars.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Tally {
    /// Bars that are missed.
    pub(crate) missed: usize,
    /// Figures that could not be measured, or not completely.
    pub(crate) failed: usize,
    /// Bars that need an unavailable peer.
    pub(crate) unmeasured: usize,
}

pub(crate) fn tally(outcomes: &[Outcome]) -> Tally {
    let figures = || outcomes.iter().filter_map(|(_, outcome)| outcome.as_ref().ok());
    let rows = || figures().flat_map(|figure| &figure.rows);
    let failed = |outcome: &Result<Figure>| match outcome {
        Ok(figure) => figure.rows.iter().any(|row| row.value == Measured::Failed),
        Err(_) => true,
    };
    Tally {
        missed: rows().filter(|row| row.met() == Some(false)).count(),
        failed: outcomes.iter().filter(|(_, outcome)| failed(outcome)).count(),
        unmeasured: rows().filter(|row| row.lacks_peer()).count(),
    }
}

/// Renders the table, with each figure's set-up below it.
pub(crate) fn table(setup: &Setup, outcomes: &[Outcome]) -> String {
    let mut lines = vec![["FIGURE", "VALUE", "BAR", "MET"].map(str::to_owned)];
    for (name, outcome) in outcomes {
        match outcome {
            Ok(figure) => lines.extend(figure.rows.iter().map(|row| {
                let [what, value, bar, met] = row.cells();
                [format!("{name}: {what}"), value, bar, met]
            })),
            Err(_) => lines.push([
                format!("{name}: failed, see below"),
                "-".to_owned(),
                String::new(),
                "NO".to_owned(),
            ]),
        }
    }
    let mut text = String::new();
    for line in &lines {
        let cells = line.iter().enumerate().map(|(column, cell)| {
            let width = lines.iter().map(|line| line[column].len()).max().unwrap_or(0);
            format!("{cell:width$}")
        });
        // Writing to a String cannot fail.
        writeln!(text, "{}", cells.collect::<Vec<_>>().join("  ").trim_end()).ok();
    }
    writeln!(text, "\nOn {setup}").ok();
    for (name, outcome) in outcomes {
        match outcome {
            Ok(figure) => {
                writeln!(text, "{name}: {}.", figure.setup).ok();
                for note in &figure.notes {
                    writeln!(text, "  note: {note}").ok();
                }
            }
            Err(error) => {
                writeln!(text, "{name}: failed: {error:#}").ok();
            }
        }
    }
    for warning in setup.warnings() {
        writeln!(text, "WARNING: {warning}").ok();
    }
    let Tally { missed, failed, unmeasured } = tally(outcomes);
    match (missed, failed) {
        (0, 0) if unmeasured == 0 => writeln!(text, "All bars are met."),
        (0, 0) => writeln!(text, "All measured bars are met."),
        _ => writeln!(text, "{missed} bars are MISSED, {failed} figures could not be measured."),
    }
    .ok();
    if unmeasured > 0 {
        writeln!(text, "{unmeasured} bars were NOT MEASURED because a peer is unavailable.").ok();
    }
    text
}

pub(crate) fn write_json(
    path: &Path,
    suite: &str,
    setup: &Setup,
    plan: Value,
    outcomes: &[Outcome],
) -> Result<()> {
    let figures: Vec<Value> = outcomes
        .iter()
        .map(|(name, outcome)| match outcome {
            Ok(figure) => json!({
                "name": name,
                "setup": figure.setup,
                "rows": figure.rows.iter().map(Row::to_json).collect::<Vec<_>>(),
                "notes": figure.notes,
                "details": figure.details,
            }),
            Err(error) => json!({"name": name, "error": format!("{error:#}")}),
        })
        .collect();
    let Tally { missed, failed, unmeasured } = tally(outcomes);
    let report = json!({
        "suite": suite,
        "setup": setup.to_json(),
        "plan": plan,
        "figures": figures,
        "bars_missed": missed,
        "figures_failed": failed,
        "bars_without_peer": unmeasured,
    });
    let context = || format!("cannot write {}", path.display());
    if let Some(dir) = path.parent() {
        fs::create_dir_all(dir).with_context(context)?;
    }
    fs::write(path, serde_json::to_string_pretty(&report)? + "\n").with_context(context)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bars_are_met_or_missed() {
        let met = |value, bar| Row::with_bar("x", value, "ms", bar).met();
        assert_eq!(met(15.0, Bar::AtMost(15.0)), Some(true));
        assert_eq!(met(15.1, Bar::AtMost(15.0)), Some(false));
        assert_eq!(met(0.94, Bar::AtLeast(0.95)), Some(false));
        assert_eq!(met(f64::NAN, Bar::AtLeast(0.95)), Some(false));
        assert_eq!(Row::context("x", 1.0, "").met(), None);
    }

    #[test]
    fn unmeasured_bars_are_neither_met_nor_missed() {
        let row = |value| Row::of("x", value, "", Some(Bar::AtLeast(2.0)));
        let (value, no_peer, failed) = (Measured::Value(8.0), Measured::NoPeer, Measured::Failed);
        assert_eq!(value.over(Measured::Value(2.0)), Measured::Value(4.0));
        assert_eq!((value.over(no_peer), no_peer.over(value)), (no_peer, no_peer));
        assert_eq!((no_peer.over(failed), failed.over(value)), (failed, failed));
        let figure = |rows| Figure { rows, ..Figure::default() };
        let rows = vec![row(value), row(no_peer), row(Measured::Value(1.0)), Row::of("y", no_peer, "", None)];
        let outcomes =
            [("a", Ok(figure(rows))), ("b", Ok(figure(vec![row(failed)]))), ("c", Ok(Figure::default()))];
        assert_eq!(tally(&outcomes), Tally { missed: 1, failed: 1, unmeasured: 1 });
        assert_eq!(row(no_peer).cells()[1..], ["no peer", "at least 2", "not measured"]);
    }

    #[test]
    fn values_have_three_or_four_digits() {
        let all = [0.0, 0.0123, 0.5, 3.456, 99.994, 1234.56, 300.0].map(shown);
        assert_eq!(all, ["0", "0.012", "0.50", "3.46", "99.99", "1235", "300"]);
    }
}
