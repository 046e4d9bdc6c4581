//! Kubernetes manifests: files of YAML or JSON as values ([`yaml`]), and such values as objects, filled in and
//! checked field by field ([`object`]).

pub mod object;
mod problem;
pub mod yaml;

pub use problem::{Problem, Problems};
