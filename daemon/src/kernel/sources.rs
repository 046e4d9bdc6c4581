//! Who may send what inside of the kernel's tunnel. WireGuard proves which host a packet comes from; that
//! the frame in a VXLAN packet comes from an endpoint of that host is looked up here, in a table of our
//! own with nftables: its rules are written once, by `nft`, and its elements changed by netlink.
//!
//! The rules are where packets are delivered to this host, not where they arrive: what passes through to
//! a pod that happens to use the same UDP port is none of theirs. They never let a frame pass that they
//! cannot read: fragments without the inner headers, tags and protocols other than ARP and IP are refused.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv6Addr};

use netlink_sys::protocols::NETLINK_NETFILTER;
use nix::libc::ENOENT;
use ovl_core::device::Device;
use ovl_core::kernel::Source;
use ovl_proto::id::Mac;

use super::attribute::{Attributes, attributes, ip, text};
use super::error::{KernelError, Result};
use super::filter;
use super::socket::{Batch, Netlink, Refusal};

/// Beside that of [`ovl_core::filter`], which is replaced as a whole whenever it changes.
pub(super) const TABLE: &str = "ovl-sources";

const NFPROTO_INET: u8 = 1;
/// NFNL_SUBSYS_NFTABLES, in the upper half of a message's kind.
const SUBSYSTEM: u16 = 10;
const BATCH_BEGIN: u16 = 0x10;
const BATCH_END: u16 = 0x11;
const GET_TABLE: u16 = SUBSYSTEM << 8 | 1;
const DEL_TABLE: u16 = SUBSYSTEM << 8 | 2;
const GET_CHAIN: u16 = SUBSYSTEM << 8 | 4;
const GET_RULE: u16 = SUBSYSTEM << 8 | 7;
const NEW_ELEMENTS: u16 = SUBSYSTEM << 8 | 12;
const GET_ELEMENTS: u16 = SUBSYSTEM << 8 | 13;
const DEL_ELEMENTS: u16 = SUBSYSTEM << 8 | 14;
const GET_OBJECT: u16 = SUBSYSTEM << 8 | 19;
const NLM_F_CREATE: u16 = 0x400;

/// The first attribute of all objects.
const IN_TABLE: u16 = 1;
const CHAIN_NAME: u16 = 3;
const ELEMENTS_SET: u16 = 2;
const ELEMENTS_LIST: u16 = 3;
const ELEMENT: u16 = 1;
const ELEMENT_KEY: u16 = 1;
const DATA_VALUE: u16 = 1;
const OBJECT_NAME: u16 = 2;
const OBJECT_TYPE: u16 = 3;
const OBJECT_DATA: u16 = 4;
const COUNTER: u32 = 1;
const COUNTER_PACKETS: u16 = 2;

/// So many elements go into one message: each takes at most 44 bytes, and a list of them at most 64 KiB.
const AT_ONCE: usize = 1000;

/// What a frame is looked up in: the sets' names.
const SETS: [&str; 3] = ["hosts", "v4", "v6"];

/// A change for one MAC address of a network.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Change {
    /// VXLAN network identifier.
    pub(super) vni: u32,
    /// What frames come from.
    pub(super) mac: Mac,
    /// Who may send them; none: nobody.
    pub(super) source: Option<Source>,
}

/// What one element allows to a MAC address of a network.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Allowed {
    /// To come from this host.
    From(Ipv6Addr),
    /// To send from, and speak for, this address.
    Address(IpAddr),
}

/// All elements, by network and MAC address.
type Elements = BTreeMap<(u32, Mac), BTreeSet<Allowed>>;

/// The table.
#[derive(Debug)]
pub(super) struct Sources {
    netlink: Netlink,
    /// Of VXLAN packets inside of the tunnel.
    port: u16,
    /// How the kernel describes the rules that we wrote.
    written: Option<Vec<u8>>,
    /// What the kernel holds, as far as we know.
    known: Option<Elements>,
}

impl Sources {
    /// In the network namespace of the calling thread; `port` is that of VXLAN packets inside of the
    /// tunnel. Changes nothing yet.
    pub(super) fn open(port: u16) -> Result<Self> {
        Ok(Self { netlink: Netlink::open(NETLINK_NETFILTER)?, port, written: None, known: None })
    }

    /// Makes the table, or puts its rules right, where they are not as we wrote them; elements stay. Until
    /// then whatever comes is let in: before the first device of an encrypted network comes up.
    pub(super) fn ensure(&mut self) -> Result<()> {
        if self.in_place()? {
            return Ok(());
        }
        self.known = None;
        let rules = rules(self.port);
        let kept = filter::run(&["-f", "-"], &rules)?.check();
        if kept.is_err() {
            // Made by another version, with other sets: all anew.
            let anew = format!("table inet {TABLE}\ndelete table inet {TABLE}\n{rules}");
            filter::run(&["-f", "-"], &anew)?.check()?;
        }
        self.written = self.described()?;
        Ok(())
    }

    /// Makes changes, all or none of them, in one transaction. A MAC address has what its last change says.
    pub(super) fn apply(&mut self, changes: &[Change]) -> Result<()> {
        let mut wanted: Elements = BTreeMap::new();
        for Change { vni, mac, source } in changes {
            wanted.insert((*vni, *mac), source.as_ref().map(allowed).transpose()?.unwrap_or_default());
        }
        self.ensure()?;
        // What we know may be old: then the kernel refuses to delete what is gone.
        let mut refused = None;
        for _ in 0..2 {
            let held = self.held()?;
            let none = BTreeSet::new();
            let (mut gone, mut new) = (Vec::new(), Vec::new());
            for (key, wanted) in &wanted {
                let held = held.get(key).unwrap_or(&none);
                gone.extend(held.difference(wanted).map(|allowed| (*key, *allowed)));
                new.extend(wanted.difference(held).map(|allowed| (*key, *allowed)));
            }
            match self.transact(&gone, &new)? {
                Ok(()) => {
                    if let Some(known) = &mut self.known {
                        known.extend(wanted);
                        known.retain(|_, allowed| !allowed.is_empty());
                    }
                    return Ok(());
                }
                Err(refusal) => {
                    self.known = None;
                    refused = Some(refusal);
                }
            }
        }
        refused
            .map_or(Ok(()), |refusal| Err(refusal.into_error("cannot set what may come out of the tunnel")))
    }

    /// Takes away what belongs to other networks than these: when one is gone, or another run left some.
    pub(super) fn retain(&mut self, vnis: &BTreeSet<u32>) -> Result<()> {
        if !self.in_place()? {
            return Ok(());
        }
        let strays = self.held()?.keys().filter(|(vni, _)| !vnis.contains(vni));
        let strays: Vec<Change> =
            strays.map(|(vni, mac)| Change { vni: *vni, mac: *mac, source: None }).collect();
        if strays.is_empty() { Ok(()) } else { self.apply(&strays) }
    }

    /// What is in the table for these networks' devices, by VNI: read from the kernel. Nothing where the
    /// rules are not as we wrote them, so that all is set again, and the rules with it. A MAC address that
    /// several hosts may send from, or none, shows as the unspecified address's.
    pub(super) fn dump(
        &mut self,
        devices: &BTreeMap<u32, Device>,
    ) -> Result<BTreeMap<(Device, Mac), Source>> {
        self.known = None;
        if !self.in_place()? {
            return Ok(BTreeMap::new());
        }
        let held = self.held()?.iter().filter_map(|((vni, mac), allowed)| {
            let mut hosts = Vec::new();
            let mut addresses = BTreeSet::new();
            for allowed in allowed {
                match allowed {
                    Allowed::From(host) => hosts.push(*host),
                    Allowed::Address(address) => {
                        addresses.insert(*address);
                    }
                }
            }
            let from = match hosts[..] {
                [host] => host,
                _ => Ipv6Addr::UNSPECIFIED,
            };
            Some(((*devices.get(vni)?, *mac), Source { from: from.into(), addresses }))
        });
        Ok(held.collect())
    }

    /// How many packets were refused since the table was made.
    pub(super) fn refused(&mut self) -> Result<u64> {
        let mut question = in_table();
        question.put_text(OBJECT_NAME, "refused");
        question.put(OBJECT_TYPE, &COUNTER.to_be_bytes());
        let Some(answer) = self.ask(GET_OBJECT, &question)? else { return Ok(0) };
        let find = |payload, fixed, wanted| {
            attributes(payload, fixed).find(|(kind, _)| *kind == wanted).map(|(_, value)| value)
        };
        let packets = find(&answer, FIXED, OBJECT_DATA).and_then(|data| find(data, 0, COUNTER_PACKETS));
        Ok(packets.and_then(|value| value.try_into().ok()).map_or(0, u64::from_be_bytes))
    }

    /// Removes the table; where there is none that is done.
    pub(super) fn remove(&mut self) -> Result<()> {
        self.written = None;
        self.known = None;
        let mut batch = begin();
        batch.push_built(DEL_TABLE, 0, in_table().bytes());
        match self.commit(batch)? {
            Err(refusal) if refusal.errno != ENOENT => {
                Err(refusal.into_error(format!("nft delete table inet {TABLE}")))
            }
            Ok(()) | Err(_) => Ok(()),
        }
    }

    fn in_place(&mut self) -> Result<bool> {
        Ok(self.written.is_some() && self.described()? == self.written)
    }

    /// How the kernel describes the table, the chain with the hook, and the rules, handles and all: other
    /// bytes where somebody has changed them, or written the same anew. None without the table.
    fn described(&mut self) -> Result<Option<Vec<u8>>> {
        let Some(mut bytes) = self.ask(GET_TABLE, &in_table())? else { return Ok(None) };
        let mut question = in_table();
        question.put_text(CHAIN_NAME, "input");
        let Some(chain) = self.ask(GET_CHAIN, &question)? else { return Ok(None) };
        bytes.drain(..FIXED.min(bytes.len()));
        bytes.extend_from_slice(chain.get(FIXED..).unwrap_or_default());
        let mut batch = Batch::default();
        batch.push_built(GET_RULE, 0, in_table().bytes());
        let dump = self.netlink.dump(batch)?;
        let dump = dump.map_err(|refusal| refusal.into_error(format!("cannot read the table {TABLE}")))?;
        for message in dump.messages() {
            // Some kernels tell of others' too.
            if attributes(message.payload, FIXED)
                .any(|(kind, value)| kind == IN_TABLE && text(value) == TABLE)
            {
                bytes.extend_from_slice(message.payload.get(FIXED..).unwrap_or_default());
            }
        }
        Ok(Some(bytes))
    }

    /// A question with one answer; none where there is no such thing.
    fn ask(&mut self, kind: u16, question: &Attributes) -> Result<Option<Vec<u8>>> {
        let mut batch = Batch::default();
        batch.push_built(kind, 0, question.bytes());
        let (mut results, answers) = self.netlink.execute(batch)?;
        match results.pop() {
            Some(Err(refusal)) if refusal.errno == ENOENT => Ok(None),
            Some(Err(refusal)) => Err(refusal.into_error(format!("cannot read the table {TABLE}"))),
            Some(Ok(())) | None => Ok(answers.into_iter().next().map(|answer| answer.payload)),
        }
    }

    /// What is known, or else read.
    fn held(&mut self) -> Result<&Elements> {
        let held = match self.known.take() {
            Some(known) => known,
            None => self.read()?,
        };
        Ok(self.known.insert(held))
    }

    fn read(&mut self) -> Result<Elements> {
        let mut elements = Elements::new();
        for set in SETS {
            let mut question = in_table();
            question.put_text(ELEMENTS_SET, set);
            let mut batch = Batch::default();
            batch.push_built(GET_ELEMENTS, 0, question.bytes());
            let dump = match self.netlink.dump(batch)? {
                Ok(dump) => dump,
                Err(refusal) if refusal.errno == ENOENT => continue,
                Err(refusal) => return Err(refusal.into_error(format!("cannot read the table {TABLE}"))),
            };
            for message in dump.messages().filter(|message| message.kind >> 8 == SUBSYSTEM) {
                let lists = attributes(message.payload, FIXED).filter(|(kind, _)| *kind == ELEMENTS_LIST);
                let keys = lists
                    .flat_map(|(_, list)| attributes(list, 0))
                    .flat_map(|(_, element)| attributes(element, 0))
                    .filter(|(kind, _)| *kind == ELEMENT_KEY)
                    .flat_map(|(_, key)| attributes(key, 0))
                    .filter(|(kind, _)| *kind == DATA_VALUE);
                for (at, allowed) in keys.filter_map(|(_, value)| parse(set, value)) {
                    elements.entry(at).or_default().insert(allowed);
                }
            }
        }
        Ok(elements)
    }

    /// Takes elements away and adds others, at once.
    fn transact(&mut self, gone: &[Entry], new: &[Entry]) -> Result<Result<(), Refusal>> {
        if gone.is_empty() && new.is_empty() {
            return Ok(Ok(()));
        }
        let mut batch = begin();
        for (kind, flags, entries) in [(DEL_ELEMENTS, 0, gone), (NEW_ELEMENTS, NLM_F_CREATE, new)] {
            for set in SETS {
                let keys: Vec<Vec<u8>> =
                    entries.iter().filter(|entry| set_of(entry) == set).map(key).collect();
                for some in keys.chunks(AT_ONCE) {
                    let mut message = in_table();
                    message.put_text(ELEMENTS_SET, set);
                    message.nest(ELEMENTS_LIST, |list| {
                        for key in some {
                            list.nest(ELEMENT, |element| {
                                element.nest(ELEMENT_KEY, |data| data.put(DATA_VALUE, key));
                            });
                        }
                    });
                    batch.push_built(kind, flags, message.bytes());
                }
            }
        }
        self.commit(batch)
    }

    fn commit(&mut self, mut batch: Batch) -> Result<Result<(), Refusal>> {
        batch.close_transaction(BATCH_END, &about_tables());
        let (results, _) = self.netlink.execute(batch)?;
        Ok(results.into_iter().find_map(Result::err).map_or(Ok(()), Err))
    }
}

/// The length of a message's fixed part, `nfgenmsg`.
const FIXED: usize = 4;

/// An element, with what it belongs to.
type Entry = ((u32, Mac), Allowed);

fn in_table() -> Attributes {
    let mut message = Attributes::after(&[NFPROTO_INET, 0, 0, 0]);
    message.put_text(IN_TABLE, TABLE);
    message
}

fn about_tables() -> [u8; FIXED] {
    [0, 0, 0, SUBSYSTEM as u8]
}

fn begin() -> Batch {
    let mut batch = Batch::default();
    batch.push_built(BATCH_BEGIN, 0, &about_tables());
    batch
}

fn allowed(source: &Source) -> Result<BTreeSet<Allowed>> {
    let IpAddr::V6(from) = source.from else {
        return Err(KernelError::Other(format!("{} is no address inside of the tunnel", source.from)));
    };
    let addresses = source.addresses.iter().map(|address| Allowed::Address(*address));
    Ok(addresses.chain([Allowed::From(from)]).collect())
}

fn set_of((_, allowed): &Entry) -> &'static str {
    match allowed {
        Allowed::From(_) => "hosts",
        Allowed::Address(IpAddr::V4(_)) => "v4",
        Allowed::Address(IpAddr::V6(_)) => "v6",
    }
}

/// Its bytes as in the rules' registers: each part is filled up to a multiple of four.
fn key(((vni, mac), allowed): &Entry) -> Vec<u8> {
    let [_, vni @ ..] = vni.to_be_bytes();
    let who = [&vni[..], &[0], &mac.0, &[0, 0]].concat();
    match allowed {
        Allowed::From(host) => [&host.octets()[..], &who].concat(),
        Allowed::Address(IpAddr::V4(address)) => [&who[..], &address.octets()].concat(),
        Allowed::Address(IpAddr::V6(address)) => [&who[..], &address.octets()].concat(),
    }
}

fn parse(set: &str, key: &[u8]) -> Option<Entry> {
    const WHO: usize = 12;
    let (who, address) = match set {
        "hosts" => key.split_at_checked(key.len().checked_sub(WHO)?).map(|(host, who)| (who, host))?,
        _ => key.split_at_checked(WHO)?,
    };
    let address = ip(address)?;
    let allowed = match (set, address) {
        ("hosts", IpAddr::V6(host)) => Allowed::From(host),
        ("hosts", IpAddr::V4(_)) => return None,
        _ => Allowed::Address(address),
    };
    let [a, b, c, _, mac @ .., _, _] = <[u8; WHO]>::try_from(who).ok()?;
    Some(((u32::from_be_bytes([0, a, b, c]), Mac(mac)), allowed))
}

/// The table's rules. They can be written again over what is there, and leave the elements. Bits are
/// counted from the UDP header: 96 is the VNI, 176 the frame's source, 224 its type, 240 what it carries.
/// A rule does not match a packet that ends before the bits that it names, so what lets pass is what
/// matches, and the end of each chain refuses.
///
/// An ARP message, and an advertisement of IPv6's neighbour discovery, speak for an address that is not
/// the packet's source: that is looked up too. Options that an advertisement could hide behind are
/// refused; those of multicast listener reports are not.
fn rules(port: u16) -> String {
    let definitions = format!(
        "table inet {TABLE} {{
    set hosts {{
        typeof ip6 saddr . @th,96,24 . @th,176,48
    }}
    set v4 {{
        typeof @th,96,24 . @th,176,48 . @th,336,32
    }}
    set v6 {{
        typeof @th,96,24 . @th,176,48 . @th,304,128
    }}
    counter refused {{
    }}
    chain refuse {{
    }}
    chain options {{
    }}
    chain advertisement {{
    }}
    chain check_ipv6 {{
    }}
    chain check_ipv4 {{
    }}
    chain check_arp {{
    }}
    chain check_frame {{
    }}
    chain check_vxlan {{
    }}
    chain input {{
        type filter hook input priority raw; policy accept;
    }}
}}
"
    );
    let flush: String = CHAINS.iter().map(|chain| format!("flush chain inet {TABLE} {chain}\n")).collect();
    let rules = format!(
        "table inet {TABLE} {{
    chain refuse {{
        counter name refused drop
    }}
    chain options {{
        @th,560,16 0x3a00 @th,624,8 {{ 130, 131, 132, 143 }} return
        goto refuse
    }}
    chain advertisement {{
        @th,560,8 != 136 return
        @th,96,24 . @th,176,48 . @th,624,128 @v6 return
        @th,624,10 0x3fa return
        goto refuse
    }}
    chain check_ipv6 {{
        @th,288,8 58 jump advertisement
        @th,288,8 0 jump options
        @th,288,8 {{ 43, 60 }} goto refuse
        @th,96,24 . @th,176,48 . @th,304,128 @v6 accept
        @th,304,10 0x3fa accept
        @th,304,128 0 accept
        goto refuse
    }}
    chain check_ipv4 {{
        @th,96,24 . @th,176,48 . @th,336,32 @v4 accept
        @th,336,32 0 accept
        goto refuse
    }}
    chain check_arp {{
        @th,352,32 0 accept
        @th,96,24 . @th,176,48 . @th,352,32 @v4 @th,96,24 . @th,304,48 . @th,352,32 @v4 accept
        goto refuse
    }}
    chain check_frame {{
        @th,224,16 0x0800 goto check_ipv4
        @th,224,16 0x86dd goto check_ipv6
        @th,224,16 0x0806 goto check_arp
        goto refuse
    }}
    chain check_vxlan {{
        ip6 saddr . @th,96,24 . @th,176,48 @hosts goto check_frame
        goto refuse
    }}
    chain input {{
        iifname \"ovt-*\" udp dport {port} goto check_vxlan
    }}
}}
"
    );
    definitions + &flush + &rules
}

const CHAINS: [&str; 9] = [
    "refuse",
    "options",
    "advertisement",
    "check_ipv6",
    "check_ipv4",
    "check_arp",
    "check_frame",
    "check_vxlan",
    "input",
];
