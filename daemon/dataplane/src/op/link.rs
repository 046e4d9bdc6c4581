//! Devices.

use std::fmt;

use crate::device::Device;
use crate::state::{Dataplane, Link, TunnelKind};

/// The settings of a bridge about multicast, in the words of `ip link`: it follows groups and asks for members, and the
/// host itself gets all multicast. The version of the queries is that in which each member answers for itself. An answer
/// takes at most a second. The number of groups is far from what the ports can have together, because at that limit the
/// kernel would stop to follow any.
pub const SNOOPING: &str = "mcast_snooping 1 mcast_querier 1 mcast_router 2 mcast_igmp_version 3 mcast_mld_version 2 \
                            mcast_query_response_interval 100 mcast_hash_max 65536";

/// The number of groups that the kernel follows at the port of an endpoint, those of neighbour discovery among them.
pub const PORT_GROUPS: u32 = 512;

/// The settings of the port of an endpoint, in the words of `bridge link`, with [`PORT_GROUPS`].
const ENDPOINT_PORT: &str = "learning off mcast_router 2 mcast_max_groups 512";

/// A change of a device of ovl.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LinkOp {
    /// Makes a device. An endpoint's is made by an attach, never by this.
    Add(Device, Link),
    /// Brings a device that is there to the second state; the first is what was found.
    Set(Device, Link, Link),
    /// Deletes a device, and all that hangs on it.
    Delete(Device),
}

impl LinkOp {
    /// The device.
    pub fn device(&self) -> Device {
        match self {
            Self::Add(device, _) | Self::Set(device, _, _) | Self::Delete(device) => *device,
        }
    }

    /// Does to `state` what the kernel does.
    pub fn apply_to(&self, state: &mut Dataplane) {
        match self {
            Self::Add(device, link) | Self::Set(device, _, link) => {
                state.links.insert(*device, *link);
            }
            Self::Delete(device) => state.forget_device(*device),
        }
    }
}

impl fmt::Display for LinkOp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Add(device, link) => add_link(f, *device, link),
            Self::Set(device, from, to) => set_link(f, *device, from, to),
            Self::Delete(device) => write!(f, "ip link del {device}"),
        }
    }
}

fn up_word(up: bool) -> &'static str {
    if up { "up" } else { "down" }
}

fn add_link(f: &mut fmt::Formatter<'_>, device: Device, link: &Link) -> fmt::Result {
    match link {
        Link::Bridge { mac, mtu, up, .. } => write!(
            f,
            "ip link add {device} address {mac} mtu {mtu} {} type bridge stp_state 0 {SNOOPING} nf_call_iptables 0 \
             nf_call_ip6tables 0",
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
                write!(
                    f,
                    " && bridge link set dev {device} learning off neigh_suppress off isolated on mcast_router 2"
                )?;
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
                write!(
                    f,
                    " && bridge link set dev {device} learning off neigh_suppress off isolated on mcast_router 2"
                )?;
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
                words +=
                    &format!(" type bridge stp_state 0 {SNOOPING} nf_call_iptables 0 nf_call_ip6tables 0");
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
                also += "learning off neigh_suppress off isolated on mcast_router 2";
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
            let tuning = (tuned != tuned_was).then_some(ENDPOINT_PORT);
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
                also += "learning off neigh_suppress off isolated on mcast_router 2";
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
