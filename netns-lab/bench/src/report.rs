//! What was measured: as a table for people, as JSON for programs.

use std::fmt::Write as _;
use std::fs;
use std::path::Path;

use anyhow::{Context, Result};
use serde_json::{Value, json};

use super::setup::Setup;
use super::stats::round;

/// What a value is held against.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Bar {
    AtMost(f64),
    AtLeast(f64),
}

/// A value, or why there is none.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Measured {
    Value(f64),
    /// It needs a peer that this machine does not have.
    NoPeer,
    /// It was tried; the figure's notes say what went wrong.
    Failed,
}

impl Measured {
    /// A ratio, where both are there.
    pub(crate) fn over(self, other: Measured) -> Measured {
        match (self, other) {
            (Measured::Value(this), Measured::Value(other)) => Measured::Value(this / other),
            (Measured::Failed, _) | (_, Measured::Failed) => Measured::Failed,
            _ => Measured::NoPeer,
        }
    }
}

/// One number.
#[derive(Clone, Debug)]
pub(crate) struct Row {
    what: String,
    value: Measured,
    unit: &'static str,
    bar: Option<Bar>,
}

impl Row {
    /// One without a bar, beside those that have one.
    pub(crate) fn context(what: &str, value: f64, unit: &'static str) -> Self {
        Row::of(what, Measured::Value(value), unit, None)
    }

    pub(crate) fn with_bar(what: &str, value: f64, unit: &'static str, bar: Bar) -> Self {
        Row::of(what, Measured::Value(value), unit, Some(bar))
    }

    /// One that may not have been measured.
    pub(crate) fn of(what: &str, value: Measured, unit: &'static str, bar: Option<Bar>) -> Self {
        Row { what: what.to_owned(), value, unit, bar }
    }

    /// A value that is no number meets no bar. None where there is no bar, or nothing to hold against it.
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
            // JSON has no way to write one that is no number; it becomes null.
            "value": value,
            "lack": lack,
            "unit": self.unit,
            "bar": bar,
            "met": self.met(),
        })
    }
}

/// Three or four digits, as far as they say something.
fn shown(value: f64) -> String {
    match value.abs() {
        _ if value.fract() == 0.0 => format!("{value:.0}"),
        0.0..0.095 => format!("{value:.3}"),
        0.095..100.0 => format!("{value:.2}"),
        _ => format!("{value:.0}"),
    }
}

/// A figure: its numbers, and all that is needed to judge them.
#[derive(Clone, Debug, Default)]
pub(crate) struct Figure {
    /// What it was measured in and how: a figure without that says nothing.
    pub(crate) setup: String,
    pub(crate) rows: Vec<Row>,
    /// What a reader must know, or what looks wrong.
    pub(crate) notes: Vec<String>,
    /// The samples' summaries and whatever else; in the JSON alone.
    pub(crate) details: Value,
}

/// A figure by its name, or why there is none.
pub(crate) type Outcome = (&'static str, Result<Figure>);

/// What is wrong with all of it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Tally {
    /// Bars that a value does not meet.
    pub(crate) missed: usize,
    /// Figures that could not be taken, or not all of them.
    pub(crate) failed: usize,
    /// Bars that need a peer that is not here.
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

/// The table, with each figure's set-up below it.
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
        // Writing to a String does not fail.
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
        (0, 0) => writeln!(text, "All bars that were measured are met."),
        _ => writeln!(text, "{missed} bars are MISSED, {failed} figures could not be taken."),
    }
    .ok();
    if unmeasured > 0 {
        writeln!(text, "{unmeasured} bars were NOT MEASURED for want of a peer.").ok();
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
    fn bars() {
        let met = |value, bar| Row::with_bar("x", value, "ms", bar).met();
        assert_eq!(met(15.0, Bar::AtMost(15.0)), Some(true));
        assert_eq!(met(15.1, Bar::AtMost(15.0)), Some(false));
        assert_eq!(met(0.94, Bar::AtLeast(0.95)), Some(false));
        assert_eq!(met(f64::NAN, Bar::AtLeast(0.95)), Some(false));
        assert_eq!(Row::context("x", 1.0, "").met(), None);
    }

    #[test]
    fn what_was_not_measured_is_neither_met_nor_missed() {
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
    fn values_show_what_they_say() {
        let all = [0.0, 0.0123, 0.5, 3.456, 99.994, 1234.56, 300.0].map(shown);
        assert_eq!(all, ["0", "0.012", "0.50", "3.46", "99.99", "1235", "300"]);
    }
}
