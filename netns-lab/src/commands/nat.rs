//! `nat` and `renumber`: what is between a host and the underlay.

use std::net::IpAddr;

use anyhow::{Result, bail};
use netns_lab::{Access, Host, Lab, presets};

use super::open_to_change;

pub(crate) fn list() {
    let width = presets().iter().map(|preset| preset.name.len()).max().unwrap_or(0);
    for preset in presets() {
        println!("{:width$}  {}", preset.name, preset.about);
    }
}

pub(crate) fn show(lab: &str, host: &str) -> Result<()> {
    print(Lab::open(lab)?.host(host)?);
    Ok(())
}

pub(crate) fn change(lab: &str, host: &str, access: &Access) -> Result<()> {
    let lab = open_to_change(lab)?;
    let host = lab.host(host)?;
    if *access == host.access() {
        bail!("{} is connected so already: {access}", host.name());
    }
    host.set_access(access)?;
    print(host);
    Ok(())
}

pub(crate) fn forget(lab: &str, host: &str) -> Result<()> {
    open_to_change(lab)?.host(host)?.forget_mappings()
}

pub(crate) fn renumber(lab: &str, host: &str) -> Result<()> {
    let lab = open_to_change(lab)?;
    let host = lab.host(host)?;
    host.renumber()?;
    print(host);
    Ok(())
}

fn print(host: &Host) {
    println!("{}: {}, {}", host.name(), host.access(), describe_addresses(host));
}

/// Formats the addresses of a host, and those at which others see it if they differ: `192.168.1.2 as 192.168.77.2`.
pub(crate) fn describe_addresses(host: &Host) -> String {
    let join = |addresses: &[IpAddr]| addresses.iter().map(ToString::to_string).collect::<Vec<_>>().join(",");
    let (own, outer) = (host.addresses(), host.outer_addresses());
    if own == outer { join(&own) } else { format!("{} as {}", join(&own), join(&outer)) }
}
