//! Builds rtnetlink requests.

use std::net::IpAddr;
use std::os::fd::{AsRawFd, BorrowedFd};

use ipnet::IpNet;
use netlink_packet_core::{NLM_F_APPEND, NLM_F_CREATE, NLM_F_EXCL, NLM_F_REPLACE};
use netlink_packet_route::address::{
    AddressAttribute, AddressFlags, AddressMessage, AddressProtocol, AddressScope, CacheInfo,
};
use netlink_packet_route::link::{
    AfSpecInet6, AfSpecUnspec, BridgeMulticastRouterType, BridgeStpState, In6AddrGenMode, InfoBridge,
    InfoBridgePort, InfoData, InfoKind, InfoPortData, InfoPortKind, InfoVeth, InfoVxlan, LinkAttribute,
    LinkExtentMask, LinkFlags, LinkInfo, LinkMessage,
};
use netlink_packet_route::neighbour::{
    NeighbourAddress, NeighbourAttribute, NeighbourFlags, NeighbourMessage, NeighbourState,
};
use netlink_packet_route::route::{
    RouteAddress, RouteAttribute, RouteFlags, RouteMessage, RouteMetric, RouteProtocol, RouteScope, RouteType,
};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};
use nix::libc::{self, RT_TABLE_MAIN};
use ovl_dataplane::device::{ALIAS, Device, Role};
use ovl_dataplane::op::{AddressOp, FdbOp, NeighbourOp, Op, PORT_GROUPS, RouteOp};
use ovl_dataplane::state::{Hop, Link, METRIC, PROTOCOL, Remote, TunnelKind};
use ovl_proto::id::{EndpointId, Mac};

/// The state that `bridge` calls static.
const STATIC: NeighbourState = NeighbourState::Other(libc::NUD_NOARP | libc::NUD_REACHABLE);

/// The number of queues of each interface of a veth pair. By default the kernel creates one for each processor, then
/// disables all but one and waits for its processors each time: a third of the cost of a pair.
const QUEUES: u32 = 1;

/// The maximum length of an alias in bytes: with its zero byte it must be shorter than IFALIASZ.
const MAX_ALIAS: usize = 254;

/// The address family of an address.
pub(super) fn family(address: IpAddr) -> AddressFamily {
    if address.is_ipv4() { AddressFamily::Inet } else { AddressFamily::Inet6 }
}

/// The request for an operation on an entry of the device with this index, and its flags. `None` for operations on
/// devices, sysctls and tables.
pub(super) fn entry(op: &Op, index: u32) -> Option<(RouteNetlinkMessage, u16)> {
    const PUT: u16 = NLM_F_CREATE | NLM_F_REPLACE;
    let new = |message| RouteNetlinkMessage::NewNeighbour(message);
    let del = |message| RouteNetlinkMessage::DelNeighbour(message);
    Some(match op {
        Op::Address(AddressOp::Add(_, net)) => (new_address(index, *net), PUT),
        Op::Address(AddressOp::Delete(_, net)) => (RouteNetlinkMessage::DelAddress(address(index, *net)), 0),
        Op::Fdb(FdbOp::SetRemote(_, mac, remote)) => (new(remote_entry(index, *mac, Some(*remote))), PUT),
        Op::Fdb(FdbOp::DeleteRemote(_, mac)) => (del(remote_entry(index, *mac, None)), 0),
        Op::Fdb(FdbOp::AddFlood(_, remote)) => {
            (new(remote_entry(index, Mac::default(), Some(*remote))), NLM_F_CREATE | NLM_F_APPEND)
        }
        Op::Fdb(FdbOp::DeleteFlood(_, remote)) => {
            (del(remote_entry(index, Mac::default(), Some(*remote))), 0)
        }
        Op::Fdb(FdbOp::AddGroup(_, mac, remote)) => {
            (new(remote_entry(index, *mac, Some(*remote))), NLM_F_CREATE | NLM_F_APPEND)
        }
        Op::Fdb(FdbOp::DeleteGroup(_, mac, remote)) => (del(remote_entry(index, *mac, Some(*remote))), 0),
        Op::Fdb(FdbOp::AddPort(_, mac)) => (new(port_entry(index, *mac)), PUT),
        Op::Fdb(FdbOp::DeletePort(_, mac)) => (del(port_entry(index, *mac)), 0),
        Op::Neighbour(NeighbourOp::Set(_, address, mac)) => (permanent_neighbour(index, *address, *mac), PUT),
        Op::Neighbour(NeighbourOp::Delete(_, address)) => (del(neighbour(index, *address)), 0),
        // Not `PUT`: that would replace a route of another program with the same destination and metric.
        Op::Route(RouteOp::Set(to, hop)) => {
            (RouteNetlinkMessage::NewRoute(route(*to, Some((hop, index)))), NLM_F_CREATE | NLM_F_EXCL)
        }
        Op::Route(RouteOp::Delete(to)) => (RouteNetlinkMessage::DelRoute(route(*to, None)), 0),
        Op::Link(_)
        | Op::Announced(_)
        | Op::Nft(_)
        | Op::Wireguard(_)
        | Op::Source(_)
        | Op::Sysctl(_)
        | Op::EndFlows(_)
        | Op::Fast(_) => return None,
    })
}

fn remote_entry(index: u32, mac: Mac, remote: Option<Remote>) -> NeighbourMessage {
    let mut message = NeighbourMessage::default();
    message.header.family = AddressFamily::Bridge;
    message.header.ifindex = index;
    message.header.state = STATIC;
    message.header.flags = NeighbourFlags::Own;
    message.attributes.push(NeighbourAttribute::LinkLayerAddress(mac.0.to_vec()));
    if let Some(remote) = remote {
        message.attributes.push(NeighbourAttribute::Destination(remote.vtep.into()));
        message.attributes.push(NeighbourAttribute::Port(remote.port));
    }
    message
}

fn port_entry(index: u32, mac: Mac) -> NeighbourMessage {
    let mut message = remote_entry(index, mac, None);
    message.header.flags = NeighbourFlags::Controller;
    message
}

fn neighbour(index: u32, at: IpAddr) -> NeighbourMessage {
    let mut message = NeighbourMessage::default();
    message.header.family = family(at);
    message.header.ifindex = index;
    message.attributes.push(NeighbourAttribute::Destination(NeighbourAddress::from(at)));
    message
}

/// A new address of a device. IPv6 addresses skip duplicate address detection, during which they could not be used:
/// ovl never allocates an address twice.
pub(super) fn new_address(index: u32, net: IpNet) -> RouteNetlinkMessage {
    let mut message = address(index, net);
    if net.addr().is_ipv6() {
        message.attributes.push(AddressAttribute::Flags(AddressFlags::Nodad));
    }
    RouteNetlinkMessage::NewAddress(message)
}

fn address(index: u32, net: IpNet) -> AddressMessage {
    let mut message = AddressMessage::default();
    message.header.family = family(net.addr());
    message.header.prefix_len = net.prefix_len();
    message.header.scope = AddressScope::Universe;
    message.header.index = index;
    message.attributes = vec![AddressAttribute::Local(net.addr()), AddressAttribute::Address(net.addr())];
    message
}

/// An announced address. The kernel must not select it as a source address, so an IPv4 address has host scope, and an
/// IPv6 address is deprecated at once.
pub(super) fn announced(index: u32, of: IpAddr) -> AddressMessage {
    let mut message = address(index, IpNet::from(of));
    message.attributes.push(AddressAttribute::Protocol(AddressProtocol::Other(PROTOCOL)));
    if of.is_ipv4() {
        message.header.scope = AddressScope::Host;
    } else {
        let flags = AddressFlags::Nodad | AddressFlags::Noprefixroute;
        message.attributes.push(AddressAttribute::Flags(flags));
        let mut lifetimes = CacheInfo::default();
        (lifetimes.ifa_preferred, lifetimes.ifa_valid) = (0, u32::MAX);
        message.attributes.push(AddressAttribute::CacheInfo(lifetimes));
    }
    message
}

/// A route of ovl in the main table, with the index of its output interface. Without a hop, the fields that delete it.
fn route(to: IpNet, hop: Option<(&Hop, u32)>) -> RouteMessage {
    let mut message = RouteMessage::default();
    message.header.address_family = family(to.addr());
    message.header.destination_prefix_length = to.prefix_len();
    message.header.table = RT_TABLE_MAIN;
    message.header.protocol = RouteProtocol::Other(PROTOCOL);
    message.header.scope = RouteScope::Universe;
    message.attributes =
        vec![RouteAttribute::Destination(RouteAddress::from(to.addr())), RouteAttribute::Priority(METRIC)];
    let Some((hop, index)) = hop else {
        message.header.scope = RouteScope::NoWhere;
        return message;
    };
    if *hop == Hop::UNREACHABLE {
        message.header.kind = RouteType::Unreachable;
        return message;
    }
    message.header.kind = RouteType::Unicast;
    if hop.device.is_some() {
        message.attributes.push(RouteAttribute::Oif(index));
    }
    match hop.gateway {
        Some(gateway) => {
            message.attributes.push(RouteAttribute::Gateway(RouteAddress::from(gateway)));
            if hop.device.is_some() {
                message.header.flags = RouteFlags::Onlink;
            }
        }
        None if to.addr().is_ipv4() => message.header.scope = RouteScope::Link,
        None => {}
    }
    if let Some(source) = hop.source {
        message.attributes.push(RouteAttribute::PrefSource(RouteAddress::from(source)));
    }
    if let Some(mtu) = hop.mtu {
        message.attributes.push(RouteAttribute::Metrics(vec![RouteMetric::Mtu(u32::from(mtu))]));
    }
    message
}

/// A route in a workload's namespace: through an interface, or through a gateway on it.
pub(super) fn inner_route(index: u32, to: IpNet, gateway: Option<IpAddr>) -> RouteNetlinkMessage {
    let mut message = RouteMessage::default();
    message.header.address_family = family(to.addr());
    message.header.destination_prefix_length = to.prefix_len();
    message.header.table = RT_TABLE_MAIN;
    message.header.protocol = RouteProtocol::Boot;
    message.header.kind = RouteType::Unicast;
    message.header.scope =
        if gateway.is_none() && to.addr().is_ipv4() { RouteScope::Link } else { RouteScope::Universe };
    message.attributes =
        vec![RouteAttribute::Destination(RouteAddress::from(to.addr())), RouteAttribute::Oif(index)];
    if let Some(gateway) = gateway {
        message.attributes.push(RouteAttribute::Gateway(RouteAddress::from(gateway)));
    }
    RouteNetlinkMessage::NewRoute(message)
}

/// A permanent neighbour.
pub(super) fn permanent_neighbour(index: u32, at: IpAddr, mac: Mac) -> RouteNetlinkMessage {
    let mut message = neighbour(index, at);
    message.header.state = NeighbourState::Permanent;
    message.attributes.push(NeighbourAttribute::LinkLayerAddress(mac.0.to_vec()));
    RouteNetlinkMessage::NewNeighbour(message)
}

/// A default route in the main table.
pub(super) fn default_route(index: u32, gateway: IpAddr) -> RouteNetlinkMessage {
    let mut message = RouteMessage::default();
    message.header.address_family = family(gateway);
    message.header.table = RT_TABLE_MAIN;
    message.header.protocol = RouteProtocol::Boot;
    message.header.scope = RouteScope::Universe;
    message.header.kind = RouteType::Unicast;
    message.attributes =
        vec![RouteAttribute::Gateway(RouteAddress::from(gateway)), RouteAttribute::Oif(index)];
    RouteNetlinkMessage::NewRoute(message)
}

/// A lookup of the route of packets to an address.
pub(super) fn get_route(address: IpAddr) -> RouteNetlinkMessage {
    let mut message = RouteMessage::default();
    message.header.address_family = family(address);
    message.header.destination_prefix_length = if address.is_ipv4() { 32 } else { 128 };
    message.attributes = vec![RouteAttribute::Destination(RouteAddress::from(address))];
    RouteNetlinkMessage::GetRoute(message)
}

/// A lookup of a device by name.
pub(super) fn get_link(device: Device) -> RouteNetlinkMessage {
    let mut message = LinkMessage::default();
    message.attributes = vec![
        LinkAttribute::IfName(device.as_str().to_owned()),
        LinkAttribute::ExtMask(vec![LinkExtentMask::SkipStats]),
    ];
    RouteNetlinkMessage::GetLink(message)
}

/// A lookup of a device by index.
pub(super) fn get_link_at(index: u32) -> RouteNetlinkMessage {
    let mut message = LinkMessage::default();
    message.header.index = index;
    message.attributes = vec![LinkAttribute::ExtMask(vec![LinkExtentMask::SkipStats])];
    RouteNetlinkMessage::GetLink(message)
}

/// Deletes a device by index.
pub(super) fn del_link(index: u32) -> RouteNetlinkMessage {
    let mut message = LinkMessage::default();
    message.header.index = index;
    RouteNetlinkMessage::DelLink(message)
}

/// Deletes a device by name. Only for a device that was just created, because the name does not prove that ovl owns it.
pub(super) fn del_link_named(device: Device) -> RouteNetlinkMessage {
    RouteNetlinkMessage::DelLink(change(Target::Name(device), Vec::new()))
}

/// Deletes all devices of a link group.
pub(super) fn del_group(group: u32) -> RouteNetlinkMessage {
    let mut message = LinkMessage::default();
    message.attributes = vec![LinkAttribute::Group(group)];
    RouteNetlinkMessage::DelLink(message)
}

/// The device that a change is for: by name if it was just created, because its index is not known yet.
#[derive(Debug, Clone, Copy)]
pub(super) enum Target {
    Name(Device),
    Index(u32),
}

/// A change of an existing device.
pub(super) fn change(target: Target, attributes: Vec<LinkAttribute>) -> LinkMessage {
    let mut message = LinkMessage::default();
    match target {
        Target::Name(device) => message.attributes.push(LinkAttribute::IfName(device.as_str().to_owned())),
        Target::Index(index) => message.header.index = index,
    }
    message.attributes.extend(attributes);
    message
}

/// Sets a device up or down.
pub(super) fn set_up(target: Target, up: bool) -> RouteNetlinkMessage {
    let mut message = change(target, Vec::new());
    message.header.flags = if up { LinkFlags::Up } else { LinkFlags::empty() };
    message.header.change_mask = LinkFlags::Up;
    RouteNetlinkMessage::NewLink(message)
}

/// Sets attributes of a device.
pub(super) fn set(target: Target, attributes: Vec<LinkAttribute>) -> RouteNetlinkMessage {
    RouteNetlinkMessage::NewLink(change(target, attributes))
}

/// The alias of a device of ovl, cut to [`MAX_ALIAS`].
pub(super) fn alias(text: &str) -> LinkAttribute {
    let mut whole = format!("{ALIAS}{text}");
    while whole.len() > MAX_ALIAS {
        whole.pop();
    }
    LinkAttribute::IfAlias(whole)
}

/// Turns off the generation of IPv6 link-local addresses.
pub(super) fn no_link_local() -> LinkAttribute {
    LinkAttribute::AfSpecUnspec(vec![AfSpecUnspec::Inet6(vec![AfSpecInet6::AddrGenMode(
        In6AddrGenMode::None,
    )])])
}

/// The MAC address of a device.
pub(super) fn hardware_address(mac: Mac) -> LinkAttribute {
    LinkAttribute::Address(mac.0.to_vec())
}

/// Creates a bridge, a VXLAN device or a WireGuard device, down and without entries. `None` for a link that the tunnel
/// engine or an attach creates.
pub(super) fn new_link(device: Device, link: &Link) -> Option<RouteNetlinkMessage> {
    let mut attributes = vec![LinkAttribute::IfName(device.as_str().to_owned())];
    let info = match link {
        Link::Bridge { mac, mtu, .. } => {
            attributes.push(hardware_address(*mac));
            // A bridge follows the MTU of its ports until its own MTU is changed. So it is created with a different
            // MTU, and a later request sets the wanted one.
            attributes.push(LinkAttribute::Mtu(u32::from(mtu ^ 1)));
            bridge_info()
        }
        Link::Vxlan { vni, local, port, mtu, mac, sealed, .. } => {
            attributes.push(hardware_address(*mac));
            attributes.push(LinkAttribute::Mtu(u32::from(*mtu)));
            let local = match local {
                IpAddr::V4(local) => InfoVxlan::Local(*local),
                IpAddr::V6(local) => InfoVxlan::Local6(*local),
            };
            let mut data =
                vec![InfoVxlan::Id(*vni), local, InfoVxlan::Port(*port), InfoVxlan::Learning(false)];
            if *sealed {
                data.extend([InfoVxlan::UDPZeroCsumTX(true), InfoVxlan::UDPZeroCsumRX(true)]);
            }
            vec![LinkInfo::Kind(InfoKind::Vxlan), LinkInfo::Data(InfoData::Vxlan(data))]
        }
        Link::Tunnel { kind: TunnelKind::Kernel, mtu, .. } => {
            attributes.push(LinkAttribute::Mtu(u32::from(*mtu)));
            vec![LinkInfo::Kind(InfoKind::Wireguard)]
        }
        // Created by the tunnel engine, or by an attach.
        Link::Tap { .. } | Link::Tunnel { kind: TunnelKind::Userspace, .. } | Link::Endpoint { .. } => {
            return None;
        }
    };
    attributes.push(LinkAttribute::LinkInfo(info));
    let mut message = LinkMessage::default();
    message.attributes = attributes;
    Some(RouteNetlinkMessage::NewLink(message))
}

/// The time in hundredths of a second within which members answer a bridge's query.
pub(super) const QUERY_RESPONSE_INTERVAL: u8 = 100;
/// The number of groups that a bridge follows.
pub(super) const MOST_GROUPS: u32 = 65_536;

/// The settings of a bridge: no spanning tree, no calls into iptables, and [`ovl_dataplane::op::SNOOPING`].
pub(super) fn bridge_info() -> Vec<LinkInfo> {
    vec![
        LinkInfo::Kind(InfoKind::Bridge),
        LinkInfo::Data(InfoData::Bridge(vec![
            InfoBridge::StpState(BridgeStpState::Disabled),
            InfoBridge::MulticastSnooping(true),
            InfoBridge::MulticastQuerier(true),
            InfoBridge::MulticastRouter(BridgeMulticastRouterType::Permanent),
            InfoBridge::MulticastIgmpVersion(3),
            InfoBridge::MulticastMldVersion(2),
            InfoBridge::MulticastQueryResponseInterval(u64::from(QUERY_RESPONSE_INTERVAL)),
            InfoBridge::MulticastHashMax(MOST_GROUPS),
            InfoBridge::NfCallIpTables(false),
            InfoBridge::NfCallIp6Tables(false),
            InfoBridge::NfCallArpTables(false),
        ])),
    ]
}

/// Turns off learning on a VXLAN device.
pub(super) fn no_learning() -> Vec<LinkInfo> {
    vec![LinkInfo::Kind(InfoKind::Vxlan), LinkInfo::Data(InfoData::Vxlan(vec![InfoVxlan::Learning(false)]))]
}

/// The settings of a bridge port: no learning, and all multicast goes there, whether it was joined or not; no neighbour
/// suppression on a VXLAN device, which passes nothing on to another one; the given hairpin mode and a limited number of groups on an endpoint.
pub(super) fn port(device: Device, hairpin: bool) -> LinkAttribute {
    let mut flags = vec![
        InfoBridgePort::Learning(false),
        // What was learned while another program had turned it on. Static entries stay.
        InfoBridgePort::Flush,
        InfoBridgePort::MulticastRouter(BridgeMulticastRouterType::Permanent),
    ];
    match device.role() {
        Some(Role::Vxlan(_)) => {
            flags.extend([InfoBridgePort::NeighSupress(false), InfoBridgePort::Isolated(true)]);
        }
        // A kernel before 6.3 ignores the limit.
        _ => flags
            .extend([InfoBridgePort::HairpinMode(hairpin), InfoBridgePort::MulticastMaxGroups(PORT_GROUPS)]),
    }
    LinkAttribute::LinkInfo(vec![
        LinkInfo::PortKind(InfoPortKind::Bridge),
        LinkInfo::PortData(InfoPortData::BridgePort(flags)),
    ])
}

/// The host's interface of a veth pair.
#[derive(Debug, Clone, Copy)]
pub(super) enum Outer {
    /// A port of the bridge with this index.
    Port(u32),
    /// A device without a bridge, with this MAC address.
    Alone(Mac),
}

/// Creates the veth pair of an endpoint, with the peer interface in its namespace. Both are down: the kernel cannot
/// set an interface up before its peer exists.
pub(super) fn new_pair(
    device: Device,
    outer: Outer,
    mtu: u16,
    netns: BorrowedFd<'_>,
    ifname: &str,
    mac: Mac,
) -> RouteNetlinkMessage {
    let mut peer = LinkMessage::default();
    peer.attributes = vec![
        LinkAttribute::IfName(ifname.to_owned()),
        hardware_address(mac),
        LinkAttribute::Mtu(u32::from(mtu)),
        LinkAttribute::NetNsFd(netns.as_raw_fd()),
        LinkAttribute::NumTxQueues(QUEUES),
        LinkAttribute::NumRxQueues(QUEUES),
    ];
    let mut message = LinkMessage::default();
    message.attributes = vec![
        LinkAttribute::IfName(device.as_str().to_owned()),
        LinkAttribute::Mtu(u32::from(mtu)),
        LinkAttribute::NumTxQueues(QUEUES),
        LinkAttribute::NumRxQueues(QUEUES),
        LinkAttribute::LinkInfo(vec![
            LinkInfo::Kind(InfoKind::Veth),
            LinkInfo::Data(InfoData::Veth(InfoVeth::Peer(peer))),
        ]),
    ];
    message.attributes.extend(match outer {
        Outer::Port(bridge) => vec![hardware_address(port_mac(device)), LinkAttribute::Controller(bridge)],
        Outer::Alone(mac) => vec![hardware_address(mac)],
    });
    RouteNetlinkMessage::NewLink(message)
}

/// The MAC address of the host's interface of an endpoint. No frame is sent from it; it is set so that udev sets no
/// other. Its first byte differs from that of endpoints and gateways.
pub fn port_mac(device: Device) -> Mac {
    match device.role() {
        Some(Role::Endpoint(EndpointId([a, b, c, d, e]))) => Mac([0x12, a, b, c, d, e]),
        Some(Role::Bridge(_) | Role::Vxlan(_) | Role::Tunnel(_)) | None => Mac([0x16, 0, 0, 0, 0, 0]),
    }
}

/// The length of `struct tcmsg`.
pub(super) const TRAFFIC_CONTROL: usize = 20;

/// Returns the `struct tcmsg` of a queueing discipline or a filter of the device with this index.
pub(super) fn traffic_control(index: u32, handle: u32, parent: u32, info: u32) -> [u8; TRAFFIC_CONTROL] {
    let mut bytes = [0; TRAFFIC_CONTROL];
    let fields = [0, index, handle, parent, info].into_iter().flat_map(u32::to_ne_bytes);
    bytes.iter_mut().zip(fields).for_each(|(at, byte)| *at = byte);
    bytes
}
