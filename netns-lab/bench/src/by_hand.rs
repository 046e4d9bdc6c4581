//! The reference overlay: a static one between two hosts, built with `ip` and `bridge`.

use std::net::IpAddr;

use anyhow::{Context, Result};
use netns_lab::{Host, Lab};

use super::flow::Party;

const VNI: u32 = 4242;
const PORT: u16 = 4789;

/// Builds a bridge and a VXLAN device with static entries on each of the lab's two hosts, and a workload on
/// each, which know each other's MAC addresses.
pub(crate) fn build(lab: &Lab, mtu: u64) -> Result<[Party; 2]> {
    let (first, second) = (side(lab, 0)?, side(lab, 1)?);
    Ok([first.build(&second, mtu)?, second.build(&first, mtu)?])
}

struct Side<'a> {
    host: &'a Host,
    underlay: IpAddr,
    address: IpAddr,
    mac: String,
}

fn side(lab: &Lab, index: usize) -> Result<Side<'_>> {
    let host = lab.hosts().get(index).with_context(|| format!("no host of index {index}"))?;
    let number = u8::try_from(index + 1)?;
    Ok(Side {
        host,
        underlay: host.address()?,
        address: IpAddr::from([10, 98, 0, number]),
        mac: format!("02:be:00:00:00:{number:02x}"),
    })
}

impl Side<'_> {
    fn build(&self, peer: &Side, mtu: u64) -> Result<Party> {
        let workload = self.host.workload("byhand")?;
        let (namespace, mac) = (workload.netns_name(), &self.mac);
        let (peer_mac, peer_underlay) = (&peer.mac, peer.underlay);
        let links = format!(
            "link add br1 mtu {mtu} type bridge\n\
             link add vx1 mtu {mtu} type vxlan id {VNI} dstport {PORT} local {} nolearning\n\
             link add ve1 mtu {mtu} type veth peer name eth0 address {mac} mtu {mtu} netns {namespace}\n\
             link set vx1 master br1\n\
             link set ve1 master br1\n\
             link set br1 up\n\
             link set vx1 up\n\
             link set ve1 up\n",
            self.underlay
        );
        let entries = format!(
            "fdb append 00:00:00:00:00:00 dev vx1 dst {peer_underlay}\n\
             fdb replace {peer_mac} dev vx1 dst {peer_underlay}\n\
             fdb replace {peer_mac} dev vx1 master static\n"
        );
        let inside = format!(
            "addr add {}/24 dev eth0\n\
             link set eth0 up\n\
             neigh replace {} lladdr {peer_mac} nud permanent dev eth0\n",
            self.address, peer.address
        );
        self.host.exec_input(["ip", "-batch", "-"], Some(&links))?;
        self.host.exec_input(["bridge", "-batch", "-"], Some(&entries))?;
        workload.exec_input(["ip", "-batch", "-"], Some(&inside))?;
        Ok((workload, self.address))
    }
}
