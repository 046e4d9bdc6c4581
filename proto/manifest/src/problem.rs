//! What is wrong with a manifest.

use serde::Serialize;

/// What is wrong with one field.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Problem {
    /// Its path, such as `spec.ports[0].port`.
    pub field: String,
    /// What is wrong, and what would be right.
    pub reason: String,
}

/// The problems of one manifest, collected so that all of them are told at once.
#[derive(Debug, Default)]
pub struct Problems(Vec<Problem>);

impl Problems {
    /// Adds a problem with a field.
    pub fn add(&mut self, field: impl Into<String>, reason: impl Into<String>) {
        self.0.push(Problem { field: field.into(), reason: reason.into() });
    }

    /// Adds a problem.
    pub fn push(&mut self, problem: Problem) {
        self.0.push(problem);
    }

    /// Moves all of `others` in.
    pub fn append(&mut self, others: &mut Vec<Problem>) {
        self.0.append(others);
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The problems, in the order in which they were added.
    pub fn into_inner(self) -> Vec<Problem> {
        self.0
    }

    /// Adds a problem with a field unless `holds`.
    pub fn want(&mut self, holds: bool, field: impl Into<String>, reason: impl Into<String>) {
        if !holds {
            self.add(field, reason);
        }
    }
}
