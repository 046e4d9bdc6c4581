//! `ovlctl`, the command-line client of ovl. It sends one request to ovld's Unix socket and prints the
//! reply as a table, JSON or YAML.
//!
//! | module | contents |
//! | --- | --- |
//! | [`args`] | the global options and the list of commands |
//! | [`command`] | one file per group of commands: its arguments, its request, its table |
//! | [`context`] | requests to ovld, and output |
//! | [`error`] | how a command fails, and its exit status |
//! | [`text`] | tables, key-value blocks, lists; escaping of control characters |
//! | [`time`] | human-readable durations |

mod args;
mod command;
mod context;
mod error;
mod text;
mod time;

use std::process::ExitCode;

use clap::{CommandFactory as _, Parser};

fn main() -> ExitCode {
    match args::Cli::try_parse() {
        Ok(cli) => cli.run().unwrap_or_else(|error| error.report()),
        Err(error) => error::usage(&error, &args::Cli::command()),
    }
}
