//! Calls of container runtimes: parsing, decisions and responses, without I/O. Both ovld and the Docker plugin use
//! this crate, so it depends on nothing that only a daemon needs.

pub mod cni;
pub mod docker;
#[cfg(any(test, fuzzing))]
pub mod fuzz;
