//! `up`, `down`, `preflight` and `sweep`: create, remove and check labs.

use std::fs;
use std::path::PathBuf;

use anyhow::{Context, Result, bail};
use netns_lab::{Access, Lab, LabConfig, Underlay};

/// The options of `up`.
pub(crate) struct Wanted {
    pub(crate) hosts: usize,
    pub(crate) underlay: Underlay,
    pub(crate) nat: Vec<(String, Access)>,
    pub(crate) families: bool,
    pub(crate) mtu: u32,
    pub(crate) config: Option<PathBuf>,
    pub(crate) start: bool,
}

pub(crate) fn up(name: &str, wanted: &Wanted) -> Result<()> {
    let mut config = LabConfig::hosts(wanted.hosts).name(name).underlay(wanted.underlay).mtu(wanted.mtu);
    if wanted.families {
        config = config.families();
    }
    config.accesses.extend(wanted.nat.iter().cloned());
    if let Some(path) = &wanted.config {
        let text = fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
        config = config.config(&text);
    }
    config.persistent = true;
    let lab = Lab::new(config)?;
    if wanted.start {
        let took = lab.start_all().inspect_err(|_| {
            eprintln!(
                "netns-lab: lab {name} is kept for inspection; remove it with `netns-lab --lab {name} down`"
            );
        })?;
        println!("{} hosts ready in {} ms", lab.hosts().len(), took.as_millis());
    }
    super::status::print(&lab);
    Ok(())
}

pub(crate) fn down(name: &str, all: bool) -> Result<()> {
    if !all {
        netns_lab::remove(name)?;
        println!("lab {name} removed");
        return Ok(());
    }
    let mut failed = 0;
    for name in netns_lab::lab_names()? {
        match netns_lab::remove(&name) {
            Ok(()) => println!("lab {name} removed"),
            Err(error) => {
                failed += 1;
                eprintln!("netns-lab: {error:#}");
            }
        }
    }
    if failed > 0 {
        bail!("{failed} labs could not be removed");
    }
    Ok(())
}

pub(crate) fn preflight() -> Result<()> {
    match netns_lab::preflight() {
        Ok(()) => {
            println!("this machine can hold a lab");
            Ok(())
        }
        Err(failures) => bail!("this machine cannot hold a lab:\n  {}", failures.join("\n  ")),
    }
}

pub(crate) fn sweep() -> Result<()> {
    let swept = netns_lab::sweep()?;
    for lab in &swept {
        match &lab.failure {
            None => println!("lab {} removed", lab.name),
            Some(failure) => eprintln!("netns-lab: cannot remove lab {}: {failure}", lab.name),
        }
    }
    if swept.is_empty() {
        println!("nothing to sweep");
    }
    if swept.iter().any(|lab| lab.failure.is_some()) {
        bail!("some labs could not be removed");
    }
    Ok(())
}
