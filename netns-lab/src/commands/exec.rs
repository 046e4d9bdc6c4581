//! `exec` and `ctl`. The process replaces itself with the command, so that input, output, signals and the
//! exit status are those of the command.

use std::ffi::OsString;
use std::os::unix::process::CommandExt;
use std::process::Command;

use anyhow::{Context, Result};
use netns_lab::{Host, Lab, Netns};

pub(crate) fn exec(lab: &str, place: &str, words: &[OsString]) -> Result<()> {
    let netns = find(&Lab::open(lab)?, place)?;
    let (program, args) = words.split_first().context("no command")?;
    let mut command = Command::new(program);
    command.args(args);
    become_command(&netns, command)
}

pub(crate) fn ctl(lab: &str, host: &str, args: &[String]) -> Result<()> {
    let lab = Lab::open(lab)?;
    let host = lab.host(host)?.clone();
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    let command = host.ctl_command(&args)?;
    // Release the lab's lock: the command may run for a long time.
    drop(lab);
    become_command(&host, command)
}

fn find(lab: &Lab, place: &str) -> Result<Netns> {
    if place == "sw" {
        return Ok(lab.switch());
    }
    let boxes = lab.hosts().iter().flat_map(Host::nat_boxes);
    if let Some(found) = boxes.into_iter().find(|each| each.netns_name() == format!("{}-{place}", lab.name()))
    {
        return Ok(found);
    }
    match place.split_once('/') {
        Some((host, workload)) => Ok(Netns::clone(&*lab.host(host)?.find_workload(workload)?)),
        None => Ok(Netns::clone(lab.host(place)?)),
    }
}

fn become_command(netns: &Netns, mut command: Command) -> Result<()> {
    netns.enter()?;
    let error = command.exec();
    Err(error).with_context(|| format!("cannot run {}", command.get_program().display()))
}
