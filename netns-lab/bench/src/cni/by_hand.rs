//! The reference pod networks: static routed networks between two hosts, built with `ip` and `bridge`. Each
//! pod is connected by a veth pair with a route on its host; a host has one route to the other host's pods.

use std::net::IpAddr;

use anyhow::{Context, Result};
use netns_lab::{Host, Lab};

use crate::flow::Party;

const VNI: u32 = 4243;
const PORT: u16 = 4789;
/// The gateway of every pod. No host has this address; the pod has a static neighbour entry for it.
const GATEWAY: &str = "169.254.1.1";

/// How packets reach the other host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Way {
    Vxlan,
    Direct,
}

impl Way {
    /// Returns the value of `ovlctl network create --backend`, which is also part of names.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Way::Vxlan => "vxlan",
            Way::Direct => "direct",
        }
    }

    /// Returns the first two bytes of the network's addresses.
    fn network(self) -> [u8; 2] {
        match self {
            Way::Vxlan => [10, 71],
            Way::Direct => [10, 72],
        }
    }
}

/// Builds a pod on each of the lab's two hosts, which reach each other through this backend. Both backends
/// can be built in the same lab.
pub(crate) fn build(lab: &Lab, way: Way, mtu: u64) -> Result<[Party; 2]> {
    let (first, second) = (side(lab, way, 0)?, side(lab, way, 1)?);
    let parties = [first.build(way, mtu)?, second.build(way, mtu)?];
    first.reach(&second, way)?;
    second.reach(&first, way)?;
    Ok(parties)
}

/// Masquerades the pods' traffic to other networks, as a useful pod network does.
pub(crate) fn masquerade(lab: &Lab, way: Way) -> Result<()> {
    let [first, second] = way.network();
    let subnet = format!("{first}.{second}.0.0/16");
    let table = format!(
        "table ip hand {{ chain out {{ type nat hook postrouting priority srcnat;\n\
         ip saddr {subnet} ip daddr != {subnet} masquerade\n}}\n}}\n"
    );
    lab.hosts().iter().try_for_each(|host| host.exec_input(["nft", "-f", "-"], Some(&table)).map(drop))
}

struct Side<'a> {
    host: &'a Host,
    underlay: IpAddr,
    /// The block of the host's pods; its address number 0 is that of the VXLAN device.
    block: [u8; 3],
    /// MAC address of the VXLAN device.
    mac: String,
}

fn side(lab: &Lab, way: Way, index: usize) -> Result<Side<'_>> {
    let host = lab.hosts().get(index).with_context(|| format!("no host of index {index}"))?;
    let number = u8::try_from(index + 1)?;
    let [first, second] = way.network();
    Ok(Side {
        host,
        underlay: host.address()?,
        block: [first, second, number],
        mac: format!("02:bf:00:00:00:{number:02x}"),
    })
}

impl Side<'_> {
    fn address(&self, number: u8) -> IpAddr {
        let [first, second, third] = self.block;
        IpAddr::from([first, second, third, number])
    }

    /// Builds the host's own part: its pod and the VXLAN device.
    fn build(&self, way: Way, mtu: u64) -> Result<Party> {
        let address = self.address(2);
        let workload = self.host.workload(&format!("byhand-{}", way.name()))?;
        let namespace = workload.netns_name();
        let (veth, veth_mac) = (format!("hand-{}", way.name()), "02:bf:00:00:01:01");
        let mut host = format!(
            "link add {veth} address {veth_mac} mtu {mtu} type veth peer name eth0 mtu {mtu} netns {namespace}\n\
             link set {veth} up\n\
             route add {address}/32 dev {veth}\n"
        );
        if way == Way::Vxlan {
            host += &format!(
                "link add handvx address {} mtu {mtu} type vxlan id {VNI} dstport {PORT} local {} nolearning\n\
                 addr add {}/32 dev handvx\n\
                 link set handvx up\n",
                self.mac,
                self.underlay,
                self.address(0)
            );
        }
        let pod = format!(
            "addr add {address}/32 dev eth0\n\
             link set eth0 up\n\
             neigh replace {GATEWAY} lladdr {veth_mac} nud permanent dev eth0\n\
             route add {GATEWAY} dev eth0 scope link\n\
             route add default via {GATEWAY} dev eth0\n"
        );
        self.host.exec_ok(["sysctl", "-qw", "net.ipv4.ip_forward=1"])?;
        self.host.exec_input(["ip", "-batch", "-"], Some(&host))?;
        workload.exec_input(["ip", "-batch", "-"], Some(&pod))?;
        Ok((workload, address))
    }

    /// Adds the path to the other host's pods: a route, and with VXLAN a neighbour and an FDB entry.
    fn reach(&self, peer: &Side, way: Way) -> Result<()> {
        let (block, underlay) = (peer.address(0), peer.underlay);
        let lines = match way {
            Way::Direct => format!("route add {block}/24 via {underlay}\n"),
            Way::Vxlan => format!(
                "neigh replace {block} lladdr {} nud permanent dev handvx\n\
                 route add {block}/24 via {block} dev handvx onlink\n",
                peer.mac
            ),
        };
        self.host.exec_input(["ip", "-batch", "-"], Some(&lines))?;
        if way == Way::Vxlan {
            let entry = format!("bridge fdb replace {} dev handvx dst {underlay}", peer.mac);
            self.host.exec_ok(entry.split(' '))?;
        }
        Ok(())
    }
}
