//! Deletes stale UDP flows from connection tracking by netlink, after the backends of a port have changed.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use netlink_packet_core::NLA_F_NESTED;
use netlink_sys::protocols::NETLINK_NETFILTER;
use nix::libc::ENOENT;
use ovl_dataplane::flows::Flows;

use super::attribute::{Attributes, attributes, ip, u16_be};
use super::error::{KernelError, Result};
use super::nftables::FIXED;
use super::socket::{Batch, Netlink};
use super::sys;

/// The subsystem of connection tracking, in the upper half of a message type.
pub(super) const SUBSYSTEM: u16 = nix::libc::NFNL_SUBSYS_CTNETLINK as u16;
// The message types and attributes (`IPCTNL_...` and `CTA_...` in `linux/netfilter/nfnetlink_conntrack.h`), which
// `libc` does not define.
pub(super) const GET: u16 = SUBSYSTEM << 8 | 1;
pub(super) const DELETE: u16 = SUBSYSTEM << 8 | 2;

pub(super) const TUPLE_ORIGINAL: u16 = 1;
pub(super) const TUPLE_REPLY: u16 = 2;
const ID: u16 = 12;
const ZONE: u16 = 18;
const TUPLE_IP: u16 = 1;
const TUPLE_PROTO: u16 = 2;
const PROTO_NUMBER: u16 = 1;
const PROTO_SOURCE: u16 = 2;
const PROTO_DESTINATION: u16 = 3;
const UDP: u8 = nix::libc::IPPROTO_UDP as u8;

/// The number of flows that are deleted in one batch.
const AT_ONCE: usize = 512;

/// Deletes stale flows. A flow that ends meanwhile is no error.
pub(super) fn end(flows: &[&Flows]) -> Result<()> {
    let mut netlink = None;
    for (ipv4, family) in [(true, nix::libc::AF_INET), (false, nix::libc::AF_INET6)] {
        let mut wanted: Wanted<'_> = BTreeMap::new();
        for flows in flows.iter().filter(|flows| flows.ipv4 == ipv4) {
            wanted.insert((flows.port, flows.address), *flows);
        }
        if wanted.is_empty() {
            continue;
        }
        let netlink = match &mut netlink {
            Some(netlink) => netlink,
            none => none.insert(Netlink::open(NETLINK_NETFILTER)?),
        };
        end_of_family(netlink, family as u8, &wanted)?;
    }
    Ok(())
}

/// The wanted flows by destination port and address. For each destination the last operation counts.
type Wanted<'a> = BTreeMap<(u16, Option<IpAddr>), &'a Flows>;

fn end_of_family(netlink: &mut Netlink, family: u8, wanted: &Wanted<'_>) -> Result<()> {
    let mut own = BTreeSet::new();
    if wanted.keys().any(|(_, address)| address.is_none()) {
        let all = sys::own_addresses();
        let all = all.map_err(|error| KernelError::io("cannot read the addresses of this host", &error))?;
        own.extend(all.map(|(_, address)| address));
    }
    let mut batch = Batch::default();
    batch.push_built(GET, 0, &[family, 0, 0, 0]);
    let dump =
        netlink.dump(batch)?.map_err(|refusal| refusal.into_error("cannot dump connection tracking"))?;
    let doomed: Vec<Attributes> = dump
        .messages()
        .filter(|message| message.kind >> 8 == SUBSYSTEM)
        .filter(|message| is_stale(message.payload, wanted, &own))
        .map(|message| named(family, message.payload))
        .collect();
    for some in doomed.chunks(AT_ONCE) {
        let mut batch = Batch::default();
        some.iter().for_each(|entry| batch.push_built(DELETE, 0, entry.bytes()));
        let (results, _) = netlink.execute(batch)?;
        if let Some(refusal) = results.into_iter().filter_map(Result::err).find(|r| r.errno != ENOENT) {
            return Err(refusal.into_error("cannot delete a flow from connection tracking"));
        }
    }
    Ok(())
}

/// The attributes that identify an entry: its original tuple, and its id, so that no later entry is deleted.
fn named(family: u8, payload: &[u8]) -> Attributes {
    let mut message = Attributes::after(&[family, 0, 0, 0]);
    for (kind, value) in attributes(payload, FIXED) {
        match kind {
            TUPLE_ORIGINAL => message.put(kind | NLA_F_NESTED, value),
            ID | ZONE => message.put(kind, value),
            _ => {}
        }
    }
    message
}

fn is_stale(payload: &[u8], wanted: &Wanted<'_>, own: &BTreeSet<IpAddr>) -> bool {
    let tuple = |wanted| {
        let (_, value) = attributes(payload, FIXED).find(|(kind, _)| *kind == wanted)?;
        Tuple::of(value)
    };
    let (Some(original), Some(reply)) = (tuple(TUPLE_ORIGINAL), tuple(TUPLE_REPLY)) else { return false };
    if original.protocol != UDP {
        return false;
    }
    let to = original.destination;
    if let Some(flows) = wanted.get(&(to.1, Some(to.0))) {
        return !flows.keep.contains(&reply.source);
    }
    // A program on the host may listen on a node port as well.
    let any = wanted.get(&(to.1, None)).filter(|flows| flows.held || reply.source != to);
    any.is_some_and(|flows| own.contains(&to.0) && !flows.keep.contains(&reply.source))
}

/// Runs bytes through the parsers of this module.
#[cfg(any(test, fuzzing))]
pub(super) fn fuzz(bytes: &[u8]) {
    assert!(!is_stale(bytes, &Wanted::new(), &BTreeSet::new()));
    // Copied attributes are aligned: each takes at most three bytes more.
    assert!(named(0, bytes).bytes().len() <= 2 * bytes.len() + FIXED);
}

/// One direction of a connection.
pub(super) struct Tuple {
    pub(super) protocol: u8,
    pub(super) source: (IpAddr, u16),
    pub(super) destination: (IpAddr, u16),
}

impl Tuple {
    pub(super) fn of(tuple: &[u8]) -> Option<Self> {
        let (mut protocol, mut addresses) = (None, [None; 2]);
        let mut ports = [None; 2];
        for (kind, value) in attributes(tuple, 0) {
            match kind {
                // CTA_IP_V4_SRC and CTA_IP_V6_SRC.
                TUPLE_IP => attributes(value, 0).for_each(|(kind, value)| match kind {
                    1 | 3 => addresses[0] = ip(value),
                    _ => addresses[1] = ip(value),
                }),
                TUPLE_PROTO => attributes(value, 0).for_each(|(kind, value)| match kind {
                    PROTO_NUMBER => protocol = value.first().copied(),
                    PROTO_SOURCE => ports[0] = u16_be(value),
                    PROTO_DESTINATION => ports[1] = u16_be(value),
                    _ => {}
                }),
                _ => {}
            }
        }
        let [source, destination] = addresses;
        let [from, to] = ports;
        let ports = [from, to].map(Option::unwrap_or_default);
        Some(Self { protocol: protocol?, source: (source?, ports[0]), destination: (destination?, ports[1]) })
    }
}
