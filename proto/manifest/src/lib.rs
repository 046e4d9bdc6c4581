//! Kubernetes manifests: parses files of YAML or JSON into values ([`yaml`]), and values into typed objects that are
//! completed and validated field by field ([`object`]).

#[cfg(any(test, fuzzing))]
pub mod fuzz;
pub mod object;
mod problem;
pub mod yaml;

pub use problem::{FieldProblem, FieldProblems};
