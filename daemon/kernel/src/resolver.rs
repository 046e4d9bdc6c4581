//! Adds the routes to the host's resolver in a workload's namespace.

use std::net::{IpAddr, Ipv4Addr};

use ipnet::IpNet;
use netlink_packet_core::{DefaultNla, NLM_F_APPEND, NLM_F_CREATE, NLM_F_EXCL, NLM_F_REPLACE};
use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::link::{AfSpecInet, AfSpecUnspec, LinkAttribute};
use netlink_packet_route::route::{
    RouteAddress, RouteAttribute, RouteFlags, RouteMessage, RouteProtocol, RouteScope, RouteType,
};
use netlink_sys::protocols::NETLINK_NETFILTER;
use nix::libc::{self, EEXIST};
use ovl_dataplane::resolver::{ADDRESS_V4, ADDRESS_V6, LOOPBACK};
use ovl_dataplane::state::PROTOCOL;
use ovl_proto::id::Mac;

use super::attribute::Attributes;
use super::error::Result;
use super::message::{self, Target};
use super::nftables::{BATCH_BEGIN, BATCH_END, SUBSYSTEM, message_type};
use super::socket::{Batch, Netlink, Route};

/// IFLA_INET_CONF and IPV4_DEVCONF_ROUTE_LOCALNET, which `libc` does not define.
const INET_CONF: u16 = 1;
const ROUTE_LOCALNET: u16 = 26;

/// The addresses at which an endpoint reaches the host's resolver.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Resolver {
    /// The MAC address of the host.
    pub mac: Mac,
    /// Whether the endpoint reaches it at 127.0.0.11. Pods do not: their runtime configures their resolver.
    pub loopback: bool,
    /// The addresses of the cluster's DNS that no other route leads to.
    pub cluster: Vec<IpAddr>,
}

/// Adds the routes to the resolver through an interface. `route` is a socket in its namespace. With
/// `shared_segment` other endpoints are on the same segment; they must not reach programs that listen on loopback.
pub(super) fn add_routes(
    route: &mut Route,
    index: u32,
    ifname: &str,
    resolver: &Resolver,
    addresses: &[IpNet],
    shared_segment: bool,
) -> Result<()> {
    let mac = resolver.mac;
    let find = |v4| addresses.iter().map(IpNet::addr).find(|address| address.is_ipv4() == v4);
    // The interface may have entries of another network.
    let put = NLM_F_CREATE | NLM_F_REPLACE;
    let mut batch = Batch::default();
    for address in &resolver.cluster {
        batch.push(message::permanent_neighbour(index, *address, mac), put);
        batch.push(to_cluster(index, *address), NLM_F_CREATE | NLM_F_EXCL);
    }
    match (find(true), find(false)) {
        _ if !resolver.loopback => {}
        (Some(source), _) => {
            if shared_segment {
                protect_loopback()?;
            }
            batch.push(message::permanent_neighbour(index, ADDRESS_V4.into(), mac), put);
            batch.push(to_loopback(index, source), put);
            batch.push(message::set(Target::Index(index), vec![accept_loopback()]), 0);
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
        Err(refusal.into_error(format!("cannot add the routes to the resolver on {ifname} in the namespace")))
    })
}

/// A route to an address of the cluster's DNS. With several interfaces the first one is used, and the next one after
/// its deletion.
fn to_cluster(index: u32, address: IpAddr) -> RouteNetlinkMessage {
    let mut message = message::inner_route(index, IpNet::from(address), None);
    if let RouteNetlinkMessage::NewRoute(route) = &mut message {
        route.attributes.push(RouteAttribute::Priority(index));
    }
    message
}

/// A route to 127.0.0.11 through the interface, with the endpoint's address as source. With several interfaces the
/// first one is used, and the next one after its deletion.
fn to_loopback(index: u32, source: IpAddr) -> RouteNetlinkMessage {
    let mut message = RouteMessage::default();
    message.header.address_family = message::family(source);
    message.header.destination_prefix_length = 32;
    // The table that is looked up first, which contains 127.0.0.0/8.
    message.header.table = libc::RT_TABLE_LOCAL;
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

/// Turns `route_localnet` on, so that the interface accepts packets from 127.0.0.11.
fn accept_loopback() -> LinkAttribute {
    let mut settings = Attributes::default();
    settings.put(ROUTE_LOCALNET, &1u32.to_ne_bytes());
    let nested = DefaultNla::new(INET_CONF, settings.bytes().to_vec());
    LinkAttribute::AfSpecUnspec(vec![AfSpecUnspec::Inet(vec![AfSpecInet::Other(nested)])])
}

const TABLE: &str = "ovl-dns";
const NEW_TABLE: u16 = message_type(libc::NFT_MSG_NEWTABLE);
const NEW_CHAIN: u16 = message_type(libc::NFT_MSG_NEWCHAIN);
const NEW_RULE: u16 = message_type(libc::NFT_MSG_NEWRULE);

/// Creates a table that protects loopback, as `nft` would from
///
/// ```text
/// table ip ovl-dns {
///     chain prerouting {
///         type filter hook prerouting priority raw; policy accept;
///         ip daddr != 127.0.0.0/8 accept
///         iif "lo" accept
///         ip saddr 127.0.0.11 ip daddr 127.0.0.1 udp sport 53 accept
///         ip saddr 127.0.0.11 ip daddr 127.0.0.1 tcp sport 53 tcp flags & (syn | ack) != syn accept
///         drop
///     }
/// }
/// ```
///
/// in the namespace of the calling thread, unless the table exists. What is accepted last are answers of the resolver to
/// clients that are bound to 127.0.0.1. It does not run `nft`, because a process would take longer than the rest of an
/// attach.
fn protect_loopback() -> Result<()> {
    const HOOK: u32 = libc::NF_INET_PRE_ROUTING as u32;
    const RAW: i32 = libc::NF_IP_PRI_RAW;
    const ACCEPT: u32 = libc::NF_ACCEPT as u32;
    let about = |fields: &dyn Fn(&mut Attributes)| {
        let mut message = Attributes::after(&[libc::NFPROTO_IPV4 as u8, 0, 0, 0]);
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
    for write in [elsewhere, within, udp_answer, tcp_answer, drop_rest] {
        let rule = about(&|message| {
            message.put_text(2, "prerouting");
            message.nest(4, |list| write(&mut Rule(list)));
        });
        // Behind the rules before it.
        batch.push_built(NEW_RULE, NLM_F_CREATE | NLM_F_APPEND, rule.bytes());
    }
    batch.close_transaction(BATCH_END, &header);
    let (results, _) = Netlink::open(NETLINK_NETFILTER)?.execute(batch)?;
    match results.into_iter().find_map(std::result::Result::err) {
        Some(refusal) if refusal.errno != EEXIST => {
            Err(refusal
                .into_error("cannot create the nftables table that protects loopback in the namespace"))
        }
        Some(_) | None => Ok(()),
    }
}

/// The expressions of a rule.
struct Rule<'a>(&'a mut Attributes);

impl Rule<'_> {
    const REGISTER: [u8; 4] = (libc::NFT_REG_1 as u32).to_be_bytes();

    fn add(&mut self, name: &str, fields: impl FnOnce(&mut Attributes)) {
        self.0.nest(1, |element| {
            element.put_text(1, name);
            element.nest(2, fields);
        });
    }

    /// Loads a property of the packet.
    fn meta(&mut self, key: libc::c_int) {
        self.add("meta", |data| {
            data.put(1, &Self::REGISTER);
            data.put(2, &(key as u32).to_be_bytes());
        });
    }

    /// Loads `length` bytes of a header.
    fn payload(&mut self, header: libc::c_int, offset: u32, length: u32) {
        self.add("payload", |data| {
            data.put(1, &Self::REGISTER);
            data.put(2, &(header as u32).to_be_bytes());
            data.put(3, &offset.to_be_bytes());
            data.put(4, &length.to_be_bytes());
        });
    }

    /// Keeps these bits of the byte that was loaded.
    fn mask(&mut self, bits: u8) {
        self.add("bitwise", |data| {
            data.put(1, &Self::REGISTER);
            data.put(2, &Self::REGISTER);
            data.put(3, &1u32.to_be_bytes());
            data.nest(4, |mask| mask.put(1, &[bits]));
            data.nest(5, |xor| xor.put(1, &[0]));
        });
    }

    /// Ends the rule unless what was loaded compares so with a value.
    fn compare(&mut self, operator: libc::c_int, value: &[u8]) {
        self.add("cmp", |data| {
            data.put(1, &Self::REGISTER);
            data.put(2, &(operator as u32).to_be_bytes());
            data.nest(3, |data| data.put(1, value));
        });
    }

    fn verdict(&mut self, verdict: libc::c_int) {
        self.add("immediate", |data| {
            data.put(1, &(libc::NFT_REG_VERDICT as u32).to_be_bytes());
            data.nest(2, |data| data.nest(2, |code| code.put(1, &(verdict as u32).to_be_bytes())));
        });
    }

    /// Matches a packet from port 53 of the resolver at 127.0.0.11 to 127.0.0.1.
    fn answer(&mut self, protocol: libc::c_int) {
        let addresses = [LOOPBACK.octets(), Ipv4Addr::LOCALHOST.octets()].concat();
        self.payload(libc::NFT_PAYLOAD_NETWORK_HEADER, SOURCE, 8);
        self.compare(libc::NFT_CMP_EQ, &addresses);
        self.meta(libc::NFT_META_L4PROTO);
        self.compare(libc::NFT_CMP_EQ, &[protocol as u8]);
        self.payload(libc::NFT_PAYLOAD_TRANSPORT_HEADER, 0, 2);
        self.compare(libc::NFT_CMP_EQ, &53u16.to_be_bytes());
    }
}

/// The offset of the source address in an IPv4 header.
const SOURCE: u32 = 12;
/// The offset of the destination address in an IPv4 header. Its first byte identifies 127.0.0.0/8.
const DESTINATION: u32 = 16;
/// The offset of the flags in a TCP header (RFC 9293, section 3.1), and two of them.
const TCP_FLAGS: u32 = 13;
const SYN: u8 = 0x02;
const ACK: u8 = 0x10;

/// Accepts packets to other addresses than loopback's: almost all of them.
fn elsewhere(rule: &mut Rule<'_>) {
    rule.payload(libc::NFT_PAYLOAD_NETWORK_HEADER, DESTINATION, 1);
    rule.compare(libc::NFT_CMP_NEQ, &[127]);
    rule.verdict(libc::NF_ACCEPT);
}

/// Accepts packets that stay within the namespace.
fn within(rule: &mut Rule<'_>) {
    rule.meta(libc::NFT_META_IIF);
    rule.compare(libc::NFT_CMP_EQ, &super::sys::LOOPBACK.to_ne_bytes());
    rule.verdict(libc::NF_ACCEPT);
}

fn udp_answer(rule: &mut Rule<'_>) {
    rule.answer(libc::IPPROTO_UDP);
    rule.verdict(libc::NF_ACCEPT);
}

/// Accepts answers over TCP. A packet that would open a connection to the namespace is none.
fn tcp_answer(rule: &mut Rule<'_>) {
    rule.answer(libc::IPPROTO_TCP);
    rule.payload(libc::NFT_PAYLOAD_TRANSPORT_HEADER, TCP_FLAGS, 1);
    rule.mask(SYN | ACK);
    rule.compare(libc::NFT_CMP_NEQ, &[SYN]);
    rule.verdict(libc::NF_ACCEPT);
}

fn drop_rest(rule: &mut Rule<'_>) {
    rule.verdict(libc::NF_DROP);
}
