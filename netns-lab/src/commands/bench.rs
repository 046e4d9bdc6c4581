//! `bench`: the process becomes `netns-lab-bench`, a program of its own beside this one.

use std::env;
use std::ffi::OsString;
use std::os::unix::process::CommandExt;
use std::process::Command;

use anyhow::{Context, Result, ensure};

const PROGRAM: &str = "netns-lab-bench";

pub(crate) fn bench(args: &[OsString]) -> Result<()> {
    let program = env::current_exe().context("cannot find the program that runs")?.with_file_name(PROGRAM);
    ensure!(
        program.is_file(),
        "no {}: build it with `cargo build --release -p {PROGRAM}`, without `--release` for a debug build",
        program.display()
    );
    let error = Command::new(&program).args(args).exec();
    Err(error).with_context(|| format!("cannot run {}", program.display()))
}
