//! ovl's own networks: encrypted ones through the userspace tunnel, and one in plain text.

use std::net::IpAddr;
use std::time::Duration;

use anyhow::{Context, Result};
use netns_lab::{Lab, Workload, wait_until};

use super::processes::Processes;
use crate::Bench;
use crate::client::{self, Client};
use crate::cluster::address_of;

const SETTLE_TIMEOUT: Duration = Duration::from_secs(20);
/// Configuration that forces the userspace tunnel, even if the kernel supports WireGuard.
const CONFIG: &str = "tunnel = \"userspace\"\n";

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Network {
    /// Routed, encrypted: straight through the tunnel.
    Routed,
    /// Switched, encrypted: VXLAN through the tunnel.
    Switched,
    /// Switched, in plain text: VXLAN.
    Plain,
}

impl Network {
    /// Returns the name of the contender.
    pub(crate) fn contender(self) -> &'static str {
        match self {
            Network::Routed => "ovl, routed",
            Network::Switched => "ovl, switched",
            Network::Plain => "ovl, plain VXLAN",
        }
    }

    fn name(self) -> &'static str {
        match self {
            Network::Routed => "routed",
            Network::Switched => "switched",
            Network::Plain => "plain",
        }
    }

    fn options(self) -> &'static [&'static str] {
        match self {
            Network::Routed => &["--mode", "l3", "--encrypted", "--subnet", "10.80.0.0/16"],
            Network::Switched => &["--mode", "l2", "--encrypted", "--subnet", "10.81.0.0/16"],
            Network::Plain => &["--mode", "l2", "--subnet", "10.82.0.0/16"],
        }
    }
}

/// Starts a lab whose daemons use the userspace tunnel.
pub(crate) fn start(bench: &Bench, hosts: usize) -> Result<Lab> {
    let lab = bench.lab_with(hosts, CONFIG)?;
    lab.start_all()?;
    Ok(lab)
}

/// Creates a network with a workload on each host, and returns these with their addresses.
pub(crate) fn network(lab: &Lab, network: Network) -> Result<Vec<(Workload, IpAddr)>> {
    let name = network.name();
    let first = lab.hosts().first().context("a lab without hosts")?;
    first.ctl_ok(&[&["network", "create", name], network.options()].concat())?;
    lab.hosts()
        .iter()
        .map(|host| {
            let what = format!("network {name} on {}", host.name());
            wait_until(SETTLE_TIMEOUT, &what, || host.ctl_ok(&["network", "inspect", name]).map(drop))?;
            let workload = host.workload(name)?;
            let endpoint = format!("{name}-{}", host.name());
            let request = client::attach(&endpoint, name, workload.path(), None);
            let endpoint = Client::connect(&host.socket())?.ask(&request)?;
            Ok((workload, address_of(&endpoint)?))
        })
        .collect()
}

/// Returns the daemons that the network's packets pass.
pub(crate) fn processes(lab: &Lab, network: Network) -> Result<Processes> {
    if network == Network::Plain {
        return Ok(Processes::default());
    }
    let pid =
        |host: &netns_lab::Host| host.pid().with_context(|| format!("ovld on {} has exited", host.name()));
    Ok(Processes(lab.hosts().iter().map(pid).collect::<Result<_>>()?))
}
