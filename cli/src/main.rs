//! `ovlctl`, the command line of ovl: one request to ovld's Unix socket, and its answer as a table
//! or as JSON.
//!
//! | module | what is in it |
//! | --- | --- |
//! | [`args`] | the global options and the list of commands |
//! | [`command`] | one file per group of commands: its arguments, its request, its table |
//! | [`context`] | asking ovld, and printing |
//! | [`error`] | how a command fails, and its exit status |
//! | [`text`] | tables, blocks, lines; control characters made harmless |
//! | [`time`] | durations and timestamps for people |

mod args;
mod command;
mod context;
mod error;
mod text;
mod time;

use std::process::ExitCode;

use clap::Parser;

fn main() -> ExitCode {
    match args::Cli::try_parse() {
        Ok(cli) => cli.run().unwrap_or_else(|error| error.report()),
        Err(error) => error::usage(&error),
    }
}
