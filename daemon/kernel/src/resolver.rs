//! Inside of a namespace: the way to the resolver of the host.

use std::net::IpAddr;

use ipnet::IpNet;
use netlink_packet_core::{DefaultNla, NLM_F_CREATE, NLM_F_EXCL, NLM_F_REPLACE};
use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::link::{AfSpecInet, AfSpecUnspec, LinkAttribute};
use netlink_packet_route::route::{
    RouteAddress, RouteAttribute, RouteFlags, RouteMessage, RouteProtocol, RouteScope, RouteType,
};
use netlink_sys::protocols::NETLINK_NETFILTER;
use nix::libc::EEXIST;
use ovl_dataplane::resolver::{ADDRESS_V4, ADDRESS_V6, LOOPBACK};
use ovl_dataplane::state::PROTOCOL;
use ovl_proto::id::Mac;

use super::attribute::Attributes;
use super::error::Result;
use super::message::{self, Target};
use super::socket::{Batch, Netlink, Route};

/// The table that is looked up first: 127.0.0.0/8 is there.
const LOCAL_TABLE: u8 = 255;
/// IFLA_INET_CONF, and in it the setting `route_localnet` (IPV4_DEVCONF_ROUTE_LOCALNET).
const INET_CONF: u16 = 1;
const ROUTE_LOCALNET: u16 = 26;

/// The ways to the resolver of the host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Resolver {
    /// The MAC address behind which it is.
    pub mac: Mac,
    /// Whether it is at 127.0.0.11; pods are told by their runtime where it is.
    pub loopback: bool,
    /// The addresses of the cluster's DNS to which no other route leads.
    pub cluster: Vec<IpAddr>,
}

/// Leads to the resolver by an interface. `guarded`: there are neighbours on the interface's segment, who must not reach
/// what listens on loopback.
pub(super) fn lead(
    route: &mut Route,
    index: u32,
    ifname: &str,
    resolver: &Resolver,
    addresses: &[IpNet],
    guarded: bool,
) -> Result<()> {
    let mac = resolver.mac;
    let find = |v4| addresses.iter().map(IpNet::addr).find(|address| address.is_ipv4() == v4);
    // The interface may have been in use with another network.
    let put = NLM_F_CREATE | NLM_F_REPLACE;
    let mut batch = Batch::default();
    for address in &resolver.cluster {
        batch.push(message::permanent_neighbour(index, *address, mac), put);
        batch.push(to_cluster(index, *address), NLM_F_CREATE | NLM_F_EXCL);
    }
    match (find(true), find(false)) {
        _ if !resolver.loopback => {}
        (Some(source), _) => {
            if guarded {
                guard()?;
            }
            batch.push(message::permanent_neighbour(index, ADDRESS_V4.into(), mac), put);
            batch.push(to_loopback(index, source), put);
            batch.push(message::set(Target::Index(index), vec![takes_loopback()]), 0);
        }
        (None, Some(_)) => {
            batch.push(message::permanent_neighbour(index, ADDRESS_V6.into(), mac), put);
            let there = message::inner_route(index, IpNet::from(IpAddr::from(ADDRESS_V6)), None);
            batch.push(there, NLM_F_CREATE | NLM_F_EXCL);
        }
        (None, None) => return Ok(()),
    }
    let (results, _) = route.execute(batch)?;
    let refused =
        results.into_iter().filter_map(std::result::Result::err).find(|error| error.errno != EEXIST);
    refused.map_or(Ok(()), |refusal| {
        Err(refusal.into_error(format!("cannot lead to the resolver by {ifname} in the namespace")))
    })
}

/// With several interfaces the first counts, and the next one when that goes.
fn to_cluster(index: u32, address: IpAddr) -> RouteNetlinkMessage {
    let mut message = message::inner_route(index, IpNet::from(address), None);
    if let RouteNetlinkMessage::NewRoute(route) = &mut message {
        route.attributes.push(RouteAttribute::Priority(index));
    }
    message
}

/// The resolver's address leads out, from the endpoint's own address. With several interfaces the first counts,
/// and the next one when that goes.
fn to_loopback(index: u32, source: IpAddr) -> RouteNetlinkMessage {
    let mut message = RouteMessage::default();
    message.header.address_family = message::family(source);
    message.header.destination_prefix_length = 32;
    message.header.table = LOCAL_TABLE;
    message.header.protocol = RouteProtocol::Other(PROTOCOL);
    message.header.scope = RouteScope::Universe;
    message.header.kind = RouteType::Unicast;
    message.header.flags = RouteFlags::Onlink;
    message.attributes = vec![
        RouteAttribute::Destination(RouteAddress::Inet(LOOPBACK)),
        RouteAttribute::Gateway(RouteAddress::Inet(ADDRESS_V4)),
        RouteAttribute::Oif(index),
        RouteAttribute::PrefSource(RouteAddress::from(source)),
        RouteAttribute::Priority(index),
    ];
    RouteNetlinkMessage::NewRoute(message)
}

/// Packets from 127.0.0.11 are taken from the interface.
fn takes_loopback() -> LinkAttribute {
    let mut settings = Attributes::default();
    settings.put(ROUTE_LOCALNET, &1u32.to_ne_bytes());
    let nested = DefaultNla::new(INET_CONF, settings.bytes().to_vec());
    LinkAttribute::AfSpecUnspec(vec![AfSpecUnspec::Inet(vec![AfSpecInet::Other(nested)])])
}

const TABLE: &str = "ovl-dns";
const NFPROTO_IPV4: u8 = 2;
const SUBSYSTEM: u16 = 10;
const BATCH_BEGIN: u16 = 0x10;
const BATCH_END: u16 = 0x11;
const NEW_TABLE: u16 = SUBSYSTEM << 8;
const NEW_CHAIN: u16 = SUBSYSTEM << 8 | 3;
const NEW_RULE: u16 = SUBSYSTEM << 8 | 6;

/// What `nft` would make of
///
/// ```text
/// table ip ovl-dns {
///     chain prerouting {
///         type filter hook prerouting priority raw; policy accept;
///         iif != "lo" ip daddr 127.0.0.0/8 drop
///     }
/// }
/// ```
///
/// in the calling thread's namespace, unless the table is there. A process would take longer than all else
/// that an attach does.
fn guard() -> Result<()> {
    /// NF_INET_PRE_ROUTING, before all else.
    const HOOK: u32 = 0;
    const RAW: i32 = -300;
    const ACCEPT: u32 = 1;
    let about = |fields: &dyn Fn(&mut Attributes)| {
        let mut message = Attributes::after(&[NFPROTO_IPV4, 0, 0, 0]);
        message.put_text(1, TABLE);
        fields(&mut message);
        message
    };
    let header = [0, 0, 0, SUBSYSTEM as u8];
    let mut batch = Batch::default();
    batch.push_built(BATCH_BEGIN, 0, &header);
    batch.push_built(NEW_TABLE, NLM_F_CREATE | NLM_F_EXCL, about(&|_| {}).bytes());
    let chain = about(&|message| {
        message.put_text(3, "prerouting");
        message.nest(4, |hook| {
            hook.put(1, &HOOK.to_be_bytes());
            hook.put(2, &RAW.to_be_bytes());
        });
        message.put(5, &ACCEPT.to_be_bytes());
        message.put_text(7, "filter");
    });
    batch.push_built(NEW_CHAIN, NLM_F_CREATE, chain.bytes());
    let rule = about(&|message| {
        message.put_text(2, "prerouting");
        message.nest(4, expressions);
    });
    batch.push_built(NEW_RULE, NLM_F_CREATE, rule.bytes());
    batch.close_transaction(BATCH_END, &header);
    let (results, _) = Netlink::open(NETLINK_NETFILTER)?.execute(batch)?;
    match results.into_iter().find_map(std::result::Result::err) {
        Some(refusal) if refusal.errno != EEXIST => {
            Err(refusal
                .into_error("cannot keep neighbours away from what listens on loopback in the namespace"))
        }
        Some(_) | None => Ok(()),
    }
}

/// Of the one rule.
fn expressions(list: &mut Attributes) {
    const REGISTER: [u8; 4] = 1u32.to_be_bytes();
    const IIF: u32 = 4;
    const EQUAL: u32 = 0;
    const OTHER: u32 = 1;
    const NETWORK_HEADER: u32 = 1;
    /// Of the destination in an IPv4 header, of which the first byte tells 127.0.0.0/8.
    const DESTINATION: u32 = 16;
    let mut expression = |name: &str, fields: &dyn Fn(&mut Attributes)| {
        list.nest(1, |element| {
            element.put_text(1, name);
            element.nest(2, fields);
        });
    };
    let compare = |operator: u32, value: &[u8]| {
        let value = value.to_vec();
        move |data: &mut Attributes| {
            data.put(1, &REGISTER);
            data.put(2, &operator.to_be_bytes());
            data.nest(3, |data| data.put(1, &value));
        }
    };
    expression("meta", &|data| {
        data.put(1, &REGISTER);
        data.put(2, &IIF.to_be_bytes());
    });
    expression("cmp", &compare(OTHER, &super::endpoint::LOOPBACK.to_ne_bytes()));
    expression("payload", &|data| {
        data.put(1, &REGISTER);
        data.put(2, &NETWORK_HEADER.to_be_bytes());
        data.put(3, &DESTINATION.to_be_bytes());
        data.put(4, &1u32.to_be_bytes());
    });
    expression("cmp", &compare(EQUAL, &[127]));
    expression("immediate", &|data| {
        // The verdict's register, and NF_DROP in it.
        data.put(1, &0u32.to_be_bytes());
        data.nest(2, |data| data.nest(2, |verdict| verdict.put(1, &0u32.to_be_bytes())));
    });
}
