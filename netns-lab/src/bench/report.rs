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

/// One number.
#[derive(Clone, Debug)]
pub(crate) struct Row {
    what: String,
    value: f64,
    unit: &'static str,
    bar: Option<Bar>,
}

impl Row {
    /// One without a bar, beside those that have one.
    pub(crate) fn context(what: &str, value: f64, unit: &'static str) -> Self {
        Row { what: what.to_owned(), value, unit, bar: None }
    }

    pub(crate) fn with_bar(what: &str, value: f64, unit: &'static str, bar: Bar) -> Self {
        Row { bar: Some(bar), ..Row::context(what, value, unit) }
    }

    /// A value that is no number meets no bar.
    fn met(&self) -> Option<bool> {
        self.bar.map(|bar| match bar {
            Bar::AtMost(most) => self.value <= most,
            Bar::AtLeast(least) => self.value >= least,
        })
    }

    fn cells(&self) -> [String; 4] {
        let bar = match self.bar {
            None => String::new(),
            Some(Bar::AtMost(most)) => format!("at most {most}"),
            Some(Bar::AtLeast(least)) => format!("at least {least}"),
        };
        let met = match self.met() {
            None => "",
            Some(true) => "yes",
            Some(false) => "NO",
        };
        let value = format!("{} {}", shown(self.value), self.unit);
        [self.what.clone(), value.trim_end().to_owned(), bar, met.to_owned()]
    }

    fn to_json(&self) -> Value {
        let bar = self.bar.map(|bar| match bar {
            Bar::AtMost(most) => json!({"at_most": most}),
            Bar::AtLeast(least) => json!({"at_least": least}),
        });
        json!({
            "what": self.what,
            // JSON has no way to write one that is no number; it becomes null.
            "value": round(self.value),
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

/// How many bars were missed, and how many figures could not be taken.
pub(crate) fn failures(outcomes: &[Outcome]) -> (usize, usize) {
    let figures = outcomes.iter().filter_map(|(_, outcome)| outcome.as_ref().ok());
    let missed = figures.flat_map(|figure| &figure.rows).filter(|row| row.met() == Some(false)).count();
    (missed, outcomes.iter().filter(|(_, outcome)| outcome.is_err()).count())
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
    let (missed, failed) = failures(outcomes);
    match (missed, failed) {
        (0, 0) => writeln!(text, "All bars are met."),
        _ => writeln!(text, "{missed} bars are MISSED, {failed} figures could not be taken."),
    }
    .ok();
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
    let (missed, failed) = failures(outcomes);
    let report = json!({
        "suite": suite,
        "setup": setup.to_json(),
        "plan": plan,
        "figures": figures,
        "bars_missed": missed,
        "figures_failed": failed,
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
    fn values_show_what_they_say() {
        let all = [0.0, 0.0123, 0.5, 3.456, 99.994, 1234.56, 300.0].map(shown);
        assert_eq!(all, ["0", "0.012", "0.50", "3.46", "99.99", "1235", "300"]);
    }
}
