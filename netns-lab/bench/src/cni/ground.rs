//! A lab whose hosts have a routed pod network.

use std::net::IpAddr;
use std::time::Duration;

use anyhow::{Context, Result};
use netns_lab::{Host, Lab, Workload, wait_until};
use serde_json::json;

use super::plugin::{CNI_VERSION, Plugin, Pod, Verb, dir_of};
use crate::Bench;
use crate::stats::ms;

/// Network of the figures that need only one.
pub(crate) const NETWORK: &str = "pods";
/// Subnet with room for a /24 on each of many hosts.
pub(crate) const SUBNET: &str = "10.60.0.0/16";
/// Timeout of operations that should take milliseconds.
pub(crate) const SETTLE_TIMEOUT: Duration = Duration::from_secs(20);

/// Starts the daemons and creates a pod network, masqueraded by default.
pub(crate) fn start(lab: &Lab) -> Result<()> {
    lab.start_all()?;
    network(lab, NETWORK, &["--subnet", SUBNET])
}

/// Creates a routed network and waits until all hosts know it.
pub(crate) fn network(lab: &Lab, name: &str, options: &[&str]) -> Result<()> {
    create_network(lab, name, &[&["--mode", "l3"], options].concat())
}

/// Creates a network, switched unless the options say otherwise, and waits until all hosts know it.
pub(crate) fn create_network(lab: &Lab, name: &str, options: &[&str]) -> Result<()> {
    let first = lab.hosts().first().context("a lab without hosts")?;
    first.ctl_ok(&[&["network", "create", name], options].concat())?;
    for host in lab.hosts() {
        let what = format!("network {name} on {}", host.name());
        wait_until(SETTLE_TIMEOUT, &what, || host.ctl_ok(&["network", "inspect", name]).map(drop))?;
    }
    Ok(())
}

/// Returns `ovl-cni` on a host, configured for one of its networks.
pub(crate) fn plugin(bench: &Bench, host: &Host, network: &str) -> Result<Plugin> {
    let program = bench.ovl_cni()?;
    Ok(Plugin {
        host: (**host).clone(),
        dir: dir_of(&program),
        program,
        config: json!({
            "cniVersion": CNI_VERSION,
            "name": network,
            "type": "ovl-cni",
            "network": network,
            "socket": host.socket(),
        }),
    })
}

/// Creates a workload, adds it as a pod, and returns it with its address.
pub(crate) fn pod(plugin: &Plugin, host: &Host, name: &str) -> Result<(Workload, IpAddr)> {
    let workload = host.workload(name)?;
    let pod = Pod::new(&workload);
    let address = plugin.on_host(|caller| caller.call(Verb::Add, &pod)?.address())?;
    Ok((workload, address))
}

/// Adds a pod that stays, as on a typical host, and returns the time in milliseconds. The first pod of an
/// empty host also creates the network's devices, while the reference never deletes its bridge.
pub(crate) fn resident(plugin: &Plugin, host: &Host) -> Result<f64> {
    let pod = Pod::new(&host.workload("resident")?);
    plugin.on_host(|caller| caller.call(Verb::Add, &pod)).map(|answer| ms(answer.took))
}

/// Waits until a host has `count` veths again: their deletion may continue after a plugin has answered.
pub(crate) fn wait_veths(host: &Host, count: usize) -> Result<()> {
    let what = format!("{count} veths on {}", host.name());
    wait_until(SETTLE_TIMEOUT, &what, || -> Result<()> {
        let found = veths(host)?;
        anyhow::ensure!(found == count, "{found} veths");
        Ok(())
    })
}

/// Returns the number of veths of a host, including its own link to the switch.
pub(crate) fn veths(host: &Host) -> Result<usize> {
    let links = host.ip_json(&["link", "show", "type", "veth"])?;
    Ok(links.as_array().map_or(0, Vec::len))
}
