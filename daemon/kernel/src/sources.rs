//! The anti-spoofing filter of the kernel's tunnel: an nftables table with the hosts and addresses that each MAC
//! address may send from. WireGuard authenticates the host of a packet; the table checks that the frame in a VXLAN
//! packet comes from an endpoint of that host. `nft` writes the rules once, and netlink changes the elements.
//!
//! The rules are in the input hook, not in prerouting, so that they do not see packets that are forwarded to a pod
//! which uses the same UDP port. They drop every frame that they cannot parse, such as fragments without the inner
//! headers. Of protocols other than ARP and IP they check the MAC address alone.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv6Addr};
use std::sync::Arc;

use ovl_dataplane::device::Device;
use ovl_dataplane::nft::{Chain, Data, Field, Key, Object, Set, Shape, Skeleton, Table, Type, Value};
use ovl_dataplane::state::Source;
use ovl_proto::id::Mac;

use super::attribute::ip;
use super::error::{KernelError, Result};
use super::tables::{Tables, Wanted};

/// A table of its own, because the base table is replaced as a whole whenever it changes.
const TABLE: Table = Table::Sources;

/// The VNI and the source MAC address of the inner frame.
const VNI: Type = Type::Expression("@th,96,24", 3);
const MAC: Type = Type::Expression("@th,176,48", 6);

const fn set(name: &'static str, key: &'static [Type]) -> Set {
    Set::new(TABLE, name, Shape { key, data: Data::None, ranges: false })
}

/// The sets in which a frame is looked up.
const HOSTS: Set = set("hosts", &[Type::Ipv6, VNI, MAC]);
const V4: Set = set("v4", &[VNI, MAC, Type::Expression("@th,336,32", 4)]);
const V6: Set = set("v6", &[VNI, MAC, Type::Expression("@th,304,128", 16)]);

/// A change of the allowed source of a MAC address in a network.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Change {
    /// The VXLAN network identifier.
    pub(super) vni: u32,
    /// The source MAC address of frames.
    pub(super) mac: Mac,
    /// The host and addresses that may send them; `None` if none may.
    pub(super) source: Option<Source>,
}

/// What an element allows a MAC address of a network.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Allowed {
    /// Frames from this host.
    From(Ipv6Addr),
    /// Packets from this address, and ARP and neighbour discovery for it.
    Address(IpAddr),
}

/// All elements, by VNI and MAC address.
type Elements = BTreeMap<(u32, Mac), BTreeSet<Allowed>>;

/// The table of allowed sources.
#[derive(Debug)]
pub(super) struct Sources {
    tables: Tables,
    rules: Arc<Skeleton>,
    /// The elements in the kernel; `None` if they must be read.
    known: Option<Elements>,
}

impl Sources {
    /// Opens a socket in the network namespace of the calling thread, and changes nothing in the kernel. `port` is the
    /// UDP port of VXLAN packets in the tunnel.
    pub(super) fn open(port: u16) -> Result<Self> {
        Ok(Self { tables: Tables::open()?, rules: Arc::new(rules(port)), known: None })
    }

    /// Creates the table, or repairs its rules; elements are kept. It must be called before the first device of an
    /// encrypted network is up, because without the table every frame passes.
    pub(super) fn ensure(&mut self) -> Result<()> {
        if self.tables.is_as_written(TABLE)? {
            return Ok(());
        }
        self.known = None;
        self.tables.write(TABLE, &self.rules, None)
    }

    /// Applies changes in one transaction. For each MAC address the last change counts.
    pub(super) fn apply(&mut self, changes: &[Change]) -> Result<()> {
        let mut wanted: Elements = BTreeMap::new();
        for Change { vni, mac, source } in changes {
            wanted.insert((*vni, *mac), source.as_ref().map(allowed).transpose()?.unwrap_or_default());
        }
        self.ensure()?;
        let held = self.held()?;
        let none = BTreeSet::new();
        let mut entries = Vec::new();
        for (key, wanted) in &wanted {
            let held = held.get(key).unwrap_or(&none);
            entries.extend(held.difference(wanted).map(|allowed| (entry(*key, *allowed), None)));
            entries
                .extend(wanted.difference(held).map(|allowed| (entry(*key, *allowed), Some(&Value::None))));
        }
        let mut keys = Wanted::new();
        for ((set, key), value) in &entries {
            keys.entry(set).or_default().insert(key, *value);
        }
        let result = self.tables.change(&keys);
        match &mut self.known {
            Some(known) if result.is_ok() => {
                known.extend(wanted);
                known.retain(|_, allowed| !allowed.is_empty());
            }
            known => *known = None,
        }
        result
    }

    /// Deletes the elements of all other networks: of deleted ones, and of those that an earlier process left.
    pub(super) fn retain(&mut self, vnis: &BTreeSet<u32>) -> Result<()> {
        if !self.tables.is_as_written(TABLE)? {
            return Ok(());
        }
        let strays = self.held()?.keys().filter(|(vni, _)| !vnis.contains(vni));
        let strays: Vec<Change> =
            strays.map(|(vni, mac)| Change { vni: *vni, mac: *mac, source: None }).collect();
        if strays.is_empty() { Ok(()) } else { self.apply(&strays) }
    }

    /// Reads the elements of these networks from the kernel. `devices` are the devices by VNI.
    ///
    /// The result is empty if the rules are not as written, so that all elements, and with them the rules, are set
    /// again.
    pub(super) fn dump(
        &mut self,
        devices: &BTreeMap<u32, Device>,
    ) -> Result<BTreeMap<(Device, Mac), Source>> {
        self.known = None;
        self.tables.forget(TABLE);
        if !self.tables.is_as_written(TABLE)? {
            return Ok(BTreeMap::new());
        }
        let held = self.held()?.iter().filter_map(|((vni, mac), allowed)| {
            let (mut from, mut addresses) = (BTreeSet::new(), BTreeSet::new());
            for allowed in allowed {
                match allowed {
                    Allowed::From(host) => from.insert(IpAddr::from(*host)),
                    Allowed::Address(address) => addresses.insert(*address),
                };
            }
            Some(((*devices.get(vni)?, *mac), Source { from, addresses }))
        });
        Ok(held.collect())
    }

    /// The number of packets that were dropped since the table was created.
    pub(super) fn refused(&mut self) -> Result<u64> {
        self.tables.counted(TABLE, "refused")
    }

    /// Deletes the table. An absent table is no error.
    pub(super) fn remove(&mut self) -> Result<()> {
        self.known = None;
        self.tables.remove(TABLE)
    }

    /// The elements in the kernel, which are read unless they are known.
    fn held(&mut self) -> Result<&Elements> {
        let held = match self.known.take() {
            Some(known) => known,
            None => self.read()?,
        };
        Ok(self.known.insert(held))
    }

    fn read(&mut self) -> Result<Elements> {
        let mut elements = Elements::new();
        for set in [HOSTS, V4, V6] {
            let contents = self.tables.held(&set)?;
            for (at, allowed) in contents.keys().filter_map(|key| parse(&set, key.first())) {
                elements.entry(at).or_default().insert(allowed);
            }
        }
        Ok(elements)
    }
}

fn allowed(source: &Source) -> Result<BTreeSet<Allowed>> {
    let hosts = source.from.iter().map(|from| match from {
        IpAddr::V6(from) => Ok(Allowed::From(*from)),
        IpAddr::V4(_) => Err(KernelError::NotTunnelAddress(*from)),
    });
    hosts.chain(source.addresses.iter().map(|address| Ok(Allowed::Address(*address)))).collect()
}

/// The set and key of an element.
fn entry((vni, mac): (u32, Mac), allowed: Allowed) -> (Set, Key) {
    let [_, vni @ ..] = vni.to_be_bytes();
    let who = [Field::Bytes(&vni), Field::Mac(mac)];
    match allowed {
        Allowed::From(host) => (HOSTS, Key::of(&[Field::Ip(host.into()), who[0], who[1]])),
        Allowed::Address(at) => {
            (if at.is_ipv4() { V4 } else { V6 }, Key::of(&[who[0], who[1], Field::Ip(at)]))
        }
    }
}

/// Parses the key of an element: VNI, MAC address, and what is allowed.
fn parse(set: &Set, key: &[u8]) -> Option<((u32, Mac), Allowed)> {
    const WHO: usize = 12;
    let is_host = *set == HOSTS;
    let (who, address) = match is_host {
        true => key.split_at_checked(key.len().checked_sub(WHO)?).map(|(host, who)| (who, host))?,
        false => key.split_at_checked(WHO)?,
    };
    let address = ip(address)?;
    let allowed = match (is_host, address) {
        (true, IpAddr::V6(host)) => Allowed::From(host),
        (true, IpAddr::V4(_)) => return None,
        (false, _) => Allowed::Address(address),
    };
    let [a, b, c, _, mac @ .., _, _] = <[u8; WHO]>::try_from(who).ok()?;
    Some(((u32::from_be_bytes([0, a, b, c]), Mac(mac)), allowed))
}

/// Runs bytes through the parser of elements: what it accepts is written as it was.
#[cfg(any(test, fuzzing))]
pub(super) fn fuzz(bytes: &[u8]) {
    for set in [&HOSTS, &V4, &V6] {
        let _ = parse(set, bytes);
    }
}

/// The rules of the table. Bit offsets start at the UDP header: 96 is the VNI, 176 the source MAC address, 224 the
/// EtherType, 240 the payload of the frame. A rule does not match a packet that ends before the named bits, so
/// rules accept what matches, and the end of each chain drops.
///
/// Receivers ignore a tag of VLAN 0, so the packet behind one tag is checked like one without, by the same chains with
/// all offsets 32 bits further. A second tag is refused. Frames that are neither IP nor ARP claim no address.
fn rules(port: u16) -> Skeleton {
    let input = Chain {
        hook: Some("type filter hook input priority raw; policy accept;".to_owned()),
        ..chain("input", [format!("iifname \"ovt-*\" udp dport {port} goto check_vxlan")])
    };
    let check_vxlan =
        ["ip6 saddr . @th,96,24 . @th,176,48 @hosts goto check_frame", "goto refuse"].map(str::to_owned);
    let mut chains = vec![chain("refuse", ["counter name refused drop".to_owned()])];
    chains.extend(frame_chains("_tagged", 32));
    chains.extend(frame_chains("", 0));
    chains.extend([chain("check_vxlan", check_vxlan), input]);
    Skeleton {
        sets: vec![HOSTS, V4, V6],
        objects: vec![Object { kind: "counter", name: "refused".to_owned(), body: String::new() }],
        chains,
    }
}

/// The chains that check a frame whose EtherType is `shift` bits behind its MAC addresses. `suffix` ends their names.
///
/// Router advertisements and redirects are refused: an endpoint is no router.
///
/// An ARP message and a neighbour advertisement are about an address that is not the source of the packet: it is
/// looked up too. Extension headers that could hide an advertisement are dropped, except the hop-by-hop options of
/// multicast listener reports.
fn frame_chains(suffix: &str, shift: u16) -> Vec<Chain> {
    let th = |bit: u16, length: u16| format!("@th,{},{length}", bit + shift);
    let kind = th(224, 16);
    let (next, after) = (th(288, 8), th(560, 8));
    // Looks up the MAC address of the frame with an address in it.
    let own = |address: &str, set: &str| format!("@th,96,24 . @th,176,48 . {address} @{set}");
    let (source4, source6) = (th(336, 32), th(304, 128));
    let (sender, target) = (th(352, 32), th(624, 128));
    let options = [
        format!("{} 0x3a00 {} {{ 130, 131, 132, 143 }} return", th(560, 16), th(624, 8)),
        "goto refuse".to_owned(),
    ];
    let advertisement = [
        format!("{after} {{ 134, 137 }} goto refuse"),
        format!("{after} != 136 return"),
        format!("{} return", own(&target, "v6")),
        format!("{} 0x3fa return", th(624, 10)),
        "goto refuse".to_owned(),
    ];
    let check_ipv6 = [
        format!("{next} 58 jump advertisement{suffix}"),
        format!("{next} 0 jump options{suffix}"),
        format!("{next} {{ 43, 60 }} goto refuse"),
        format!("{} accept", own(&source6, "v6")),
        format!("{} 0x3fa accept", th(304, 10)),
        format!("{source6} 0 accept"),
        "goto refuse".to_owned(),
    ];
    let check_ipv4 =
        [format!("{} accept", own(&source4, "v4")), format!("{source4} 0 accept"), "goto refuse".to_owned()];
    let check_arp = [
        format!("{sender} 0 accept"),
        format!("{} @th,96,24 . {} . {sender} @v4 accept", own(&sender, "v4"), th(304, 48)),
        "goto refuse".to_owned(),
    ];
    let mut check_frame = vec![
        format!("{kind} 0x0800 goto check_ipv4{suffix}"),
        format!("{kind} 0x86dd goto check_ipv6{suffix}"),
        format!("{kind} 0x0806 goto check_arp{suffix}"),
    ];
    if shift == 0 {
        check_frame.push(format!("{kind} {{ 0x8100, 0x88a8 }} goto check_frame_tagged"));
    }
    check_frame.push(format!("{kind} != {{ 0x8100, 0x88a8 }} accept"));
    check_frame.push("goto refuse".to_owned());
    let named = |name: &str, rules: Vec<String>| chain(&format!("{name}{suffix}"), rules);
    vec![
        named("options", options.to_vec()),
        named("advertisement", advertisement.to_vec()),
        named("check_ipv6", check_ipv6.to_vec()),
        named("check_ipv4", check_ipv4.to_vec()),
        named("check_arp", check_arp.to_vec()),
        named("check_frame", check_frame),
    ]
}

fn chain(name: &str, rules: impl IntoIterator<Item = String>) -> Chain {
    Chain { name: name.to_owned(), hook: None, rules: rules.into_iter().collect() }
}
