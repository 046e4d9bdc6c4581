//! ovl's own networks: encrypted ones through the tunnel in its process, and a plain one.

use std::net::IpAddr;
use std::time::Duration;

use anyhow::{Context, Result};
use netns_lab::{Lab, Workload, wait_until};

use super::processes::Processes;
use crate::Bench;
use crate::client::{self, Client};
use crate::cluster::address_of;

const SETTLE_TIMEOUT: Duration = Duration::from_secs(20);
/// Also where the kernel has WireGuard: it is the process that is measured.
const CONFIG: &str = "tunnel = \"userspace\"\n";

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Network {
    /// Routed, encrypted: straight through the tunnel.
    Routed,
    /// Switched, encrypted: VXLAN through the tunnel.
    Switched,
    /// Switched, in plain: VXLAN.
    Plain,
}

impl Network {
    /// Of the contender; its first word is the network's name.
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

/// A lab whose daemons carry encrypted networks in their processes.
pub(crate) fn start(bench: &Bench, hosts: usize) -> Result<Lab> {
    let lab = bench.lab_with(hosts, CONFIG)?;
    lab.start_all()?;
    Ok(lab)
}

/// Makes a network with a workload on each host. Gives them with their addresses.
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

/// The daemons that the network's packets pass.
pub(crate) fn processes(lab: &Lab, network: Network) -> Result<Processes> {
    if network == Network::Plain {
        return Ok(Processes::default());
    }
    let pid =
        |host: &netns_lab::Host| host.pid().with_context(|| format!("ovld has ended on {}", host.name()));
    Ok(Processes(lab.hosts().iter().map(pid).collect::<Result<_>>()?))
}
