//! One change of the kernel. Printed, it is the command that would do the same: logs, tests and
//! `ovlctl plan` speak the language that operators know.

use std::fmt;
use std::net::IpAddr;
use std::sync::Arc;

use ipnet::IpNet;
use ovl_proto::id::{Mac, TunnelKey};

use crate::device::Device;
use crate::flows::Flows;
use crate::nft::{BASE_TABLE, Element, Key, Set, Skeleton, Table, Value};
use crate::state::{Hop, Link, METRIC, PROTOCOL, Remote, Source, Tunnel, TunnelKind, TunnelPeer};

/// One change. Every one of them can be repeated, and deleting what is gone succeeds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Op {
    /// Set a sysctl.
    Sysctl {
        /// By its name with dots.
        name: String,
        /// The value.
        value: String,
    },
    /// Replace our nftables table in one transaction.
    Filter(String),
    /// Remove our nftables table.
    DelFilter,
    /// Let packets from 127.0.0.1 leave by a device.
    SetLocalnet(Device),
    /// No more.
    DelLocalnet(Device),
    /// Write the skeleton of another table of ours. Elements of sets that stay are kept.
    Table(Table, Arc<Skeleton>),
    /// Remove that table.
    DelTable(Table),
    /// Put an element into one of its sets, instead of one with the same key.
    SetElement(Element),
    /// Take one out.
    DelElement(Set, Key),
    /// End flows of UDP that lead where they should not any more.
    EndFlows(Flows),
    /// Make a bridge or a VXLAN device.
    AddLink(Device, Link),
    /// Bring a device that is there to the second state; the first is what was found.
    SetLink(Device, Link, Link),
    /// Delete a device, and all that hangs on it.
    DelLink(Device),
    /// Give a bridge an address.
    AddAddress(Device, IpNet),
    /// Take it away.
    DelAddress(Device, IpNet),
    /// Answer for an address of a LoadBalancer on a device that is not ours.
    AddAnnounced(Device, IpAddr),
    /// No more.
    DelAnnounced(Device, IpAddr),
    /// Send frames for a MAC address to a VTEP.
    SetRemote(Device, Mac, Remote),
    /// No more.
    DelRemote(Device, Mac),
    /// Send broadcast and multicast to a VTEP too.
    AddFlood(Device, Remote),
    /// No more.
    DelFlood(Device, Remote),
    /// A MAC address is behind this port of its bridge.
    AddPort(Device, Mac),
    /// No more.
    DelPort(Device, Mac),
    /// An address has this MAC address.
    SetNeighbour(Device, IpAddr, Mac),
    /// No more.
    DelNeighbour(Device, IpAddr),
    /// A destination is reached so.
    SetRoute(IpNet, Hop),
    /// No more.
    DelRoute(IpNet),
    /// Give an end of the tunnel its key and port.
    SetTunnel(Device, Tunnel),
    /// Who is at the other end.
    SetTunnelPeer(Device, TunnelKey, TunnelPeer),
    /// No more: its sessions end at once.
    DelTunnelPeer(Device, TunnelKey),
    /// Who may use a MAC address as source.
    SetSource(Device, Mac, Source),
    /// No more.
    DelSource(Device, Mac),
}

impl Op {
    /// The device that it is about, for the status of objects and for the scope of a pass.
    pub fn device(&self) -> Option<Device> {
        match self {
            Self::Sysctl { .. }
            | Self::Filter(_)
            | Self::DelFilter
            | Self::Table(..)
            | Self::DelTable(_)
            | Self::SetElement(_)
            | Self::DelElement(..)
            | Self::EndFlows(_)
            | Self::AddAnnounced(..)
            | Self::DelAnnounced(..)
            | Self::DelRoute(_) => None,
            Self::SetRoute(_, hop) => hop.device,
            Self::SetLocalnet(device)
            | Self::DelLocalnet(device)
            | Self::AddLink(device, _)
            | Self::SetLink(device, _, _)
            | Self::DelLink(device)
            | Self::AddAddress(device, _)
            | Self::DelAddress(device, _)
            | Self::SetRemote(device, _, _)
            | Self::DelRemote(device, _)
            | Self::AddFlood(device, _)
            | Self::DelFlood(device, _)
            | Self::AddPort(device, _)
            | Self::DelPort(device, _)
            | Self::SetTunnel(device, _)
            | Self::SetTunnelPeer(device, _, _)
            | Self::DelTunnelPeer(device, _)
            | Self::SetSource(device, _, _)
            | Self::DelSource(device, _)
            | Self::SetNeighbour(device, _, _)
            | Self::DelNeighbour(device, _) => Some(*device),
        }
    }
}

impl fmt::Display for Op {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Sysctl { name, value } => write!(f, "sysctl -w {name}={value}"),
            Self::Filter(_) => write!(f, "nft -f - # table inet {}", BASE_TABLE),
            Self::DelFilter => write!(f, "nft delete table inet {}", BASE_TABLE),
            Self::Table(table, _) => write!(f, "nft -f - # table {table}"),
            Self::DelTable(table) => write!(f, "nft delete table {table}"),
            Self::SetElement(element) => {
                write!(f, "nft add element {} '{{ {element} }}'", element.set.path())
            }
            Self::DelElement(set, key) => {
                let element = Element { set: set.clone(), key: key.clone(), value: Value::None };
                write!(f, "nft delete element {} '{{ {element} }}'", set.path())
            }
            Self::SetLocalnet(device) => write!(f, "sysctl -w net.ipv4.conf.{device}.route_localnet=1"),
            Self::DelLocalnet(device) => write!(f, "sysctl -w net.ipv4.conf.{device}.route_localnet=0"),
            Self::EndFlows(flows) => flows.fmt(f),
            Self::AddLink(device, link) => add_link(f, *device, link),
            Self::SetLink(device, from, to) => set_link(f, *device, from, to),
            Self::DelLink(device) => write!(f, "ip link del {device}"),
            Self::AddAddress(device, address) => write!(f, "ip addr replace {address} dev {device}"),
            Self::DelAddress(device, address) => write!(f, "ip addr del {address} dev {device}"),
            Self::AddAnnounced(device, address) => {
                let rest = if address.is_ipv4() { "scope host" } else { "nodad preferred_lft 0" };
                write!(f, "ip addr add {} dev {device} proto {PROTOCOL} {rest}", IpNet::from(*address))
            }
            Self::DelAnnounced(device, address) => {
                write!(f, "ip addr del {} dev {device}", IpNet::from(*address))
            }
            Self::SetRemote(device, mac, remote) => {
                write!(f, "bridge fdb replace {mac} dev {device} self static {}", To(*remote))
            }
            Self::DelRemote(device, mac) => write!(f, "bridge fdb del {mac} dev {device} self"),
            Self::AddFlood(device, remote) => {
                write!(f, "bridge fdb append 00:00:00:00:00:00 dev {device} self static {}", To(*remote))
            }
            Self::DelFlood(device, remote) => {
                write!(f, "bridge fdb del 00:00:00:00:00:00 dev {device} self {}", To(*remote))
            }
            Self::AddPort(device, mac) => write!(f, "bridge fdb replace {mac} dev {device} master static"),
            Self::DelPort(device, mac) => write!(f, "bridge fdb del {mac} dev {device} master"),
            Self::SetNeighbour(device, address, mac) => {
                write!(f, "ip neigh replace {address} lladdr {mac} dev {device} nud permanent")
            }
            Self::DelNeighbour(device, address) => write!(f, "ip neigh del {address} dev {device}"),
            Self::SetRoute(to, hop) => set_route(f, *to, hop),
            Self::DelRoute(to) => write!(f, "ip route del {to} proto {PROTOCOL} metric {METRIC}"),
            Self::SetTunnel(device, Tunnel { key, port, .. }) => {
                write!(f, "wg set {device} listen-port {port} private-key FILE # of {key}")
            }
            Self::SetTunnelPeer(device, key, TunnelPeer { endpoint, allowed }) => {
                let allowed: Vec<String> = allowed.iter().map(IpNet::to_string).collect();
                let allowed = allowed.join(",");
                write!(f, "wg set {device} peer {key} endpoint {endpoint} allowed-ips {allowed}")
            }
            Self::DelTunnelPeer(device, key) => write!(f, "wg set {device} peer {key} remove"),
            Self::SetSource(device, mac, Source { from, addresses }) => {
                write!(f, "# {device}: frames from {mac} are {from}'s")?;
                addresses.iter().try_for_each(|address| write!(f, " {address}"))
            }
            Self::DelSource(device, mac) => write!(f, "# {device}: frames from {mac} are nobody's"),
        }
    }
}

fn set_route(f: &mut fmt::Formatter<'_>, to: IpNet, hop: &Hop) -> fmt::Result {
    f.write_str("ip route replace ")?;
    if *hop == Hop::UNREACHABLE {
        f.write_str("unreachable ")?;
    }
    write!(f, "{to}")?;
    if let Some(gateway) = hop.gateway {
        write!(f, " via {gateway}")?;
    }
    if let Some(device) = hop.device {
        write!(f, " dev {device}")?;
        f.write_str(if hop.gateway.is_some() { " onlink" } else { " scope link" })?;
    }
    if let Some(source) = hop.source {
        write!(f, " src {source}")?;
    }
    if let Some(mtu) = hop.mtu {
        write!(f, " mtu {mtu}")?;
    }
    write!(f, " proto {PROTOCOL} metric {METRIC}")
}

/// `dst` and `port` of a VXLAN entry.
struct To(Remote);

impl fmt::Display for To {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "dst {} port {}", self.0.vtep, self.0.port)
    }
}

fn up_word(up: bool) -> &'static str {
    if up { "up" } else { "down" }
}

fn add_link(f: &mut fmt::Formatter<'_>, device: Device, link: &Link) -> fmt::Result {
    match link {
        Link::Bridge { mac, mtu, up, .. } => write!(
            f,
            "ip link add {device} address {mac} mtu {mtu} {} type bridge stp_state 0 mcast_snooping 0 \
             nf_call_iptables 0 nf_call_ip6tables 0",
            up_word(*up)
        ),
        Link::Vxlan { vni, local, port, mtu, master, mac, up, sealed, .. } => {
            write!(f, "ip link add {device} address {mac} mtu {mtu}")?;
            if let Some(master) = master {
                write!(f, " master {master}")?;
            }
            write!(f, " {} type vxlan id {vni} local {local} dstport {port} nolearning", up_word(*up))?;
            if *sealed {
                f.write_str(" udp6zerocsumtx udp6zerocsumrx")?;
            }
            if master.is_some() {
                write!(f, " && bridge link set dev {device} learning off neigh_suppress on")?;
            }
            Ok(())
        }
        Link::Tap { mtu, master, up, .. } => {
            write!(f, "ip tuntap add {device} mode tap vnet_hdr && ip link set {device} mtu {mtu}")?;
            if let Some(master) = master {
                write!(f, " master {master}")?;
            }
            write!(f, " {}", up_word(*up))?;
            if master.is_some() {
                write!(f, " && bridge link set dev {device} learning off neigh_suppress on")?;
            }
            Ok(())
        }
        Link::Tunnel { kind: TunnelKind::Kernel, mtu, up } => {
            write!(f, "ip link add {device} mtu {mtu} {} type wireguard", up_word(*up))
        }
        Link::Tunnel { kind: TunnelKind::Userspace, mtu, up } => write!(
            f,
            "ip tuntap add {device} mode tun vnet_hdr && ip link set {device} mtu {mtu} {}",
            up_word(*up)
        ),
        Link::Endpoint { .. } => write!(f, "# {device} is made by `ovlctl attach`"),
    }
}

fn set_link(f: &mut fmt::Formatter<'_>, device: Device, from: &Link, to: &Link) -> fmt::Result {
    let mut words = format!("ip link set dev {device}");
    let mut also = String::new();
    match (from, to) {
        (
            Link::Bridge { mac: mac_was, mtu: mtu_was, up: up_was, tuned: tuned_was },
            Link::Bridge { mac, mtu, up, tuned },
        ) => {
            if mac != mac_was {
                words += &format!(" address {mac}");
            }
            mtu_and_up(&mut words, (*mtu_was, *up_was), (*mtu, *up));
            if tuned != tuned_was {
                words += " type bridge stp_state 0 mcast_snooping 0 nf_call_iptables 0 nf_call_ip6tables 0";
            }
        }
        (
            Link::Vxlan {
                mtu: mtu_was, up: up_was, master: master_was, mac: mac_was, tuned: tuned_was, ..
            },
            Link::Vxlan { mtu, up, master, mac, tuned, .. },
        ) => {
            if mac != mac_was {
                words += &format!(" address {mac}");
            }
            mtu_and_up(&mut words, (*mtu_was, *up_was), (*mtu, *up));
            set_master(&mut words, *master_was, *master);
            if tuned != tuned_was {
                also += "learning off neigh_suppress on";
            }
        }
        (
            Link::Endpoint {
                mtu: mtu_was,
                up: up_was,
                master: master_was,
                tuned: tuned_was,
                hairpin: hairpin_was,
            },
            Link::Endpoint { mtu, up, master, tuned, hairpin },
        ) => {
            mtu_and_up(&mut words, (*mtu_was, *up_was), (*mtu, *up));
            set_master(&mut words, *master_was, *master);
            let tuning = (tuned != tuned_was).then_some("learning off");
            let turning =
                (hairpin != hairpin_was).then_some(if *hairpin { "hairpin on" } else { "hairpin off" });
            also = tuning.into_iter().chain(turning).collect::<Vec<_>>().join(" ");
        }
        (
            Link::Tap { mtu: mtu_was, up: up_was, master: master_was, tuned: tuned_was, .. },
            Link::Tap { mtu, up, master, tuned, .. },
        ) => {
            mtu_and_up(&mut words, (*mtu_was, *up_was), (*mtu, *up));
            set_master(&mut words, *master_was, *master);
            if tuned != tuned_was {
                also += "learning off neigh_suppress on";
            }
        }
        (Link::Tunnel { mtu: mtu_was, up: up_was, .. }, Link::Tunnel { mtu, up, .. }) => {
            mtu_and_up(&mut words, (*mtu_was, *up_was), (*mtu, *up));
        }
        _ => words += " # of another kind",
    }
    f.write_str(&words)?;
    if !also.is_empty() {
        write!(f, " && bridge link set dev {device} {also}")?;
    }
    Ok(())
}

fn mtu_and_up(words: &mut String, was: (u16, bool), is: (u16, bool)) {
    if is.0 != was.0 {
        *words += &format!(" mtu {}", is.0);
    }
    if is.1 != was.1 {
        *words += " ";
        *words += up_word(is.1);
    }
}

fn set_master(words: &mut String, was: Option<Device>, is: Option<Device>) {
    if was != is {
        match is {
            Some(master) => *words += &format!(" master {master}"),
            None => *words += " nomaster",
        }
    }
}
