//! What an interface in another namespace is like.

use std::net::IpAddr;

use netlink_packet_route::address::AddressMessage;
use netlink_packet_route::route::RouteMessage;
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};
use ovl_dataplane::device::Device;
use ovl_dataplane::observed::Inside;

use super::attribute::{attributes, ip, u8_at, u32_at};
use super::error::{KernelError, Result};
use super::fact;
use super::known::RTM_NEWADDR;
use super::link::LinkView;
use super::message;
use super::socket::{Batch, Route};

const RTM_NEWROUTE: u16 = 24;
/// RTN_UNICAST, and the two attributes that a default route is known by.
const UNICAST: u8 = 1;
const RTA_OIF: u16 = 4;
const RTA_GATEWAY: u16 = 5;

/// Nothing if there is no interface of that name. `route` is a socket in the namespace.
pub(super) fn inspect(route: &mut Route, ifname: &str) -> Result<Option<Inside>> {
    let name = Device::new(ifname)
        .ok_or_else(|| KernelError::Other(format!("'{ifname}' cannot be the name of an interface")))?;
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
        message.header.table = 254;
        let dump = route.dump(&RouteNetlinkMessage::GetRoute(message))?;
        for message in dump.messages().filter(|message| message.kind == RTM_NEWROUTE) {
            let default = u8_at(message.payload, 1) == Some(0) && u8_at(message.payload, 7) == Some(UNICAST);
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
