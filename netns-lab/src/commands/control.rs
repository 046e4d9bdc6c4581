//! Commands that change a host: its daemon, its link, its workloads.

use std::time::Duration;

use anyhow::Result;
use netns_lab::{Lab, PortMtu};

use super::open_to_change;

const READY_TIMEOUT: Duration = Duration::from_secs(20);

pub(crate) fn start(lab: &str, host: &str) -> Result<()> {
    let lab = open_to_change(lab)?;
    let host = lab.host(host)?;
    host.start()?;
    host.wait_ready(READY_TIMEOUT)?;
    println!("ovld on {} is ready, process {}", host.name(), host.pid().unwrap_or_default());
    Ok(())
}

pub(crate) fn stop(lab: &str, host: &str) -> Result<()> {
    let lab = open_to_change(lab)?;
    let took = lab.host(host)?.stop()?;
    println!("ovld on {host} stopped in {} ms", took.as_millis());
    Ok(())
}

pub(crate) fn kill(lab: &str, host: &str) -> Result<()> {
    open_to_change(lab)?.host(host)?.kill9()
}

pub(crate) fn destroy(lab: &str, host: &str) -> Result<()> {
    open_to_change(lab)?.host(host)?.destroy()
}

pub(crate) fn restore(lab: &str, host: &str) -> Result<()> {
    open_to_change(lab)?.host(host)?.restore()
}

pub(crate) fn link(lab: &str, host: &str, up: bool) -> Result<()> {
    let lab = open_to_change(lab)?;
    let host = lab.host(host)?;
    if up { host.link_up() } else { host.link_down() }
}

pub(crate) fn mtu(lab: &str, host: &str, mtu: u32, port_only: bool) -> Result<()> {
    let lab = open_to_change(lab)?;
    let host = lab.host(host)?;
    if port_only { host.set_port_mtu(mtu) } else { host.set_mtu(mtu, PortMtu::Follow) }
}

pub(crate) fn workload_add(lab: &str, host: &str, name: &str) -> Result<()> {
    let lab: Lab = open_to_change(lab)?;
    println!("{}", lab.host(host)?.workload(name)?.path_str());
    Ok(())
}

pub(crate) fn workload_rm(lab: &str, host: &str, name: &str) -> Result<()> {
    open_to_change(lab)?.host(host)?.find_workload(name)?.destroy()
}
