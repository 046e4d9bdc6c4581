//! The elements that an endpoint's address has in the sets and maps of the policy tables.
//!
//! The module owns no state: the [`super::PolicyLedger`] keeps the memberships of each address. Begin to read at
//! `Membership`.

use std::borrow::Cow;
use std::net::IpAddr;

use ovl_proto::id::Mac;

use super::{Direction, Policies, protocol_name};
use ovl_dataplane::device::Device;
use ovl_dataplane::nft::{CURRENT_MARK, Data, Element, Field, Key, Set, Shape, Table, Type, Value};

/// The fixed bits of the mark of judged connections; the other bits are a generation.
pub(super) const MARK: u32 = 0xa000_0000;
/// The mask of the fixed bits.
pub(super) const MARK_MASK: u32 = 0xf000_0000;

const NFPROTO: Type = Type::Expression("meta nfproto", 1);

/// The map to the mark of connections that are judged now. The key is the address family, because nft requires a key.
pub(super) const GENERATION: Set = Set::new(
    Table::Policy,
    "generation",
    Shape { key: &[NFPROTO], data: Data::Fields(&[Type::Mark]), ranges: false },
);

/// The number of generations: they are counted in the bits that [`MARK`] does not use.
const GENERATIONS: u32 = 1 << 28;

/// Returns the abbreviation of a direction in names of sets and chains.
pub(super) fn short(direction: Direction) -> &'static str {
    match direction {
        Direction::Ingress => "in",
        Direction::Egress => "eg",
    }
}

/// Returns the abbreviation of an address family in names of sets and chains.
pub(super) fn family(v4: bool) -> char {
    if v4 { '4' } else { '6' }
}

fn set(table: Table, name: String, key: &'static [Type], data: Data) -> Set {
    Set { table, name: Cow::Owned(name), shape: Shape { key, data, ranges: false } }
}

fn address(v4: bool) -> &'static [Type] {
    if v4 { &[Type::Ipv4] } else { &[Type::Ipv6] }
}

/// Returns the map from isolated addresses to the number of the policy in a slot. The first policy is in slot 1.
pub(super) fn slot(direction: Direction, v4: bool, slot: usize) -> Set {
    let name = format!("{}{}.{slot}", short(direction), family(v4));
    set(Table::Policy, name, address(v4), Data::Fields(&[Type::Priority]))
}

/// Returns the map from addresses to the number of the policy of the tier Admin in a slot. The first one is in slot 1.
pub(super) fn admin_slot(direction: Direction, v4: bool, slot: usize) -> Set {
    let name = format!("admin.{}{}.{slot}", short(direction), family(v4));
    set(Table::Policy, name, address(v4), Data::Fields(&[Type::Priority]))
}

/// Returns the set of pairs of an isolated address with itself: an endpoint may always reach itself.
pub(super) fn itself(v4: bool) -> Set {
    let key: &[Type] = if v4 { &[Type::Ipv4, Type::Ipv4] } else { &[Type::Ipv6, Type::Ipv6] };
    set(Table::Policy, format!("itself.{}", family(v4)), key, Data::None)
}

/// Returns the set of the addresses that a selector matches. `None` if the index is out of range.
pub(super) fn pods(policies: &Policies, place: usize, v4: bool) -> Option<Set> {
    let key = policies.keys.get(place)?;
    Some(set(Table::Policy, format!("pods.{key}.{}", family(v4)), address(v4), Data::None))
}

/// Returns the set of addresses and numbers of a named port. `None` if the index is out of range.
pub(super) fn port(policies: &Policies, place: usize, v4: bool) -> Option<Set> {
    let (name, protocol) = policies.port(place)?;
    let key: &[Type] = if v4 { &[Type::Ipv4, Type::Port] } else { &[Type::Ipv6, Type::Port] };
    let name = format!("port.{name}.{}.{}", protocol_name(protocol), family(v4));
    Some(set(Table::Policy, name, key, Data::None))
}

/// Returns the map from addresses whose frames are diverted to the host's IP stack to their gateway's MAC address.
pub(super) fn diverted(v4: bool) -> Set {
    set(Table::PolicyFrames, format!("diverted.{}", family(v4)), address(v4), Data::Fields(&[Type::Mac]))
}

/// Returns the map from diverted addresses to the MAC address that is restored.
pub(super) fn macs(v4: bool) -> Set {
    set(Table::PolicyFrames, format!("macs.{}", family(v4)), address(v4), Data::Fields(&[Type::Mac]))
}

/// Returns the set of devices to which, or from which, no frame is bridged.
pub(super) fn closed(direction: Direction) -> Set {
    set(Table::PolicyFrames, format!("closed.{}", short(direction)), &[Type::Device], Data::None)
}

/// A membership of an address in sets and maps of the policy tables.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Membership {
    /// A selector matches it, by the selector's index.
    Pods(usize),
    /// It has a named port: the index of the name, and the port.
    Port(usize, u16),
    /// A policy selects it: direction, slot and policy number.
    Slot(Direction, usize, u32),
    /// A policy of the tier Admin selects it: direction, slot and policy number.
    Admin(Direction, usize, u32),
    /// It is isolated, and may reach itself.
    Itself,
    /// Its frames are diverted to the host: the gateway's MAC address and its own.
    Diverted(Mac, Mac),
    /// No frame is bridged to, or from, its device.
    Closed(Direction, Device),
}

impl Membership {
    /// Returns the elements of the membership.
    pub(super) fn elements(&self, policies: &Policies, address: IpAddr) -> Vec<Element> {
        let v4 = address.is_ipv4();
        let own = Key::of(&[Field::Ip(address)]);
        let element = |set, key, value| Element { set, key, value };
        let flag =
            |set: Option<Set>, key| set.map(|set| element(set, key, Value::None)).into_iter().collect();
        match *self {
            Self::Pods(place) => flag(pods(policies, place, v4), own),
            Self::Port(place, number) => {
                flag(port(policies, place, v4), Key::of(&[Field::Ip(address), Field::Port(number)]))
            }
            Self::Slot(direction, place, number) => {
                vec![element(slot(direction, v4, place), own, Value::of(&[Field::Number(number)]))]
            }
            Self::Admin(direction, place, number) => {
                vec![element(admin_slot(direction, v4, place), own, Value::of(&[Field::Number(number)]))]
            }
            Self::Itself => flag(Some(itself(v4)), Key::of(&[Field::Ip(address), Field::Ip(address)])),
            Self::Diverted(gateway, mac) => vec![
                element(diverted(v4), own.clone(), Value::of(&[Field::Mac(gateway)])),
                element(macs(v4), own, Value::of(&[Field::Mac(mac)])),
            ],
            Self::Closed(direction, device) => {
                flag(Some(closed(direction)), Key::of(&[Field::Device(&device.to_string())]))
            }
        }
    }
}

/// Returns the elements of a generation.
pub(super) fn generation(number: u32) -> Vec<Element> {
    let mark = Field::Number(MARK | (number % GENERATIONS));
    // NFPROTO_IPV4, NFPROTO_IPV6.
    let judged = [2_u8, 10].map(|family| Element {
        set: GENERATION,
        key: Key::of(&[Field::Bytes(&[family])]),
        value: Value::of(&[mark]),
    });
    let current = Element { set: CURRENT_MARK, key: Key::of(&[mark]), value: Value::None };
    judged.into_iter().chain([current]).collect()
}
