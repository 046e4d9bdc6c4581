//! Reads the state of an interface in another namespace.

use std::net::IpAddr;

use netlink_packet_route::address::AddressMessage;
use netlink_packet_route::route::RouteMessage;
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};
use nix::libc::{RT_TABLE_MAIN, RTA_GATEWAY, RTA_OIF, RTM_NEWADDR, RTM_NEWROUTE, RTN_UNICAST};
use ovl_dataplane::device::Device;
use ovl_dataplane::observed::Inside;

use super::attribute::{attributes, ip, u8_at, u32_at};
use super::error::{KernelError, Result};
use super::fact;

use super::link::LinkView;
use super::message;
use super::socket::{Batch, Route};

/// Reads the state of an interface through a socket in its namespace. `None` if there is no such interface.
pub(super) fn inspect(route: &mut Route, ifname: &str) -> Result<Option<Inside>> {
    let name = Device::new(ifname).ok_or_else(|| KernelError::InvalidInterfaceName(ifname.to_owned()))?;
    let mut batch = Batch::default();
    batch.push(message::get_link(name), 0);
    let (_, answers) = route.execute(batch)?;
    let Some(view) = answers.first().and_then(|answer| LinkView::parse(&answer.payload)) else {
        return Ok(None);
    };
    let index = view.index;
    let mut inside = Inside {
        mac: view.mac.unwrap_or_default(),
        mtu: view.mtu,
        up: view.up,
        addresses: Vec::new(),
        gateways: Vec::new(),
    };
    let dump = route.dump(&RouteNetlinkMessage::GetAddress(AddressMessage::default()))?;
    let addresses = dump.messages().filter(|message| message.kind == RTM_NEWADDR);
    let ours = addresses.filter_map(|message| fact::address(message.payload)).filter(|(on, _)| *on == index);
    inside.addresses.extend(ours.map(|(_, net)| net).filter(|net| !is_link_local(net.addr())));
    for family in [AddressFamily::Inet, AddressFamily::Inet6] {
        let mut message = RouteMessage::default();
        message.header.address_family = family;
        message.header.table = RT_TABLE_MAIN;
        let dump = route.dump(&RouteNetlinkMessage::GetRoute(message))?;
        for message in dump.messages().filter(|message| message.kind == RTM_NEWROUTE) {
            let default =
                u8_at(message.payload, 1) == Some(0) && u8_at(message.payload, 7) == Some(RTN_UNICAST);
            let (mut gateway, mut on) = (None, None);
            for (kind, value) in attributes(message.payload, 12) {
                match kind {
                    RTA_OIF => on = u32_at(value, 0),
                    RTA_GATEWAY => gateway = ip(value),
                    _ => {}
                }
            }
            if default && on == Some(index) {
                inside.gateways.extend(gateway);
            }
        }
    }
    Ok(Some(inside))
}

fn is_link_local(address: IpAddr) -> bool {
    matches!(address, IpAddr::V6(address) if address.is_unicast_link_local())
}
