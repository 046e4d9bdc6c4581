//! The problems of a manifest.

use serde::Serialize;

/// A problem with one field of a manifest.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct FieldProblem {
    /// The path of the field, such as `spec.ports[0].port`.
    pub field: String,
    /// What is wrong, and what is expected.
    pub reason: String,
}

/// The problems of one manifest, collected so that they are reported together.
#[derive(Debug, Default)]
pub struct FieldProblems(Vec<FieldProblem>);

impl FieldProblems {
    /// Adds a problem with a field.
    pub fn add(&mut self, field: impl Into<String>, reason: impl Into<String>) {
        self.0.push(FieldProblem { field: field.into(), reason: reason.into() });
    }

    /// Adds a problem.
    pub fn push(&mut self, problem: FieldProblem) {
        self.0.push(problem);
    }

    /// Moves all problems out of `others`.
    pub fn append(&mut self, others: &mut Vec<FieldProblem>) {
        self.0.append(others);
    }

    /// Whether there are no problems.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Returns the problems in the order in which they were added.
    pub fn into_inner(self) -> Vec<FieldProblem> {
        self.0
    }

    /// Adds a problem with a field unless `holds`.
    pub fn want(&mut self, holds: bool, field: impl Into<String>, reason: impl Into<String>) {
        if !holds {
            self.add(field, reason);
        }
    }
}
