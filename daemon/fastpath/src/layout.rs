//! The entries of the maps, as bytes: `daemon/bpf/maps.h` has the same structures.
//!
//! The module owns no state. Begin to read at [`Host`].

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// The number of this layout. A change of a structure, of a limit or of a map's type is a new number: maps of another one
/// are not adopted.
pub(crate) const LAYOUT: u32 = 3;

pub(crate) type AddressKey = [u8; 16];
pub(crate) type HostValue = [u8; 24];
pub(crate) type PodValue = [u8; 32];
pub(crate) type PathValue = [u8; 40];
/// Packets and bytes.
pub(crate) type CounterValue = [u64; 2];

/// The bits of a prefix length that every IPv4 prefix has more in a map.
const MAPPED: u8 = 96;

/// This host, as the programs know it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Host {
    /// Whether the programs do anything.
    pub on: bool,
    /// The index of the device of the underlay.
    pub underlay: u32,
    /// The address that VXLAN is sent from. `None` if VXLAN is left to the kernel's devices.
    pub vtep: Option<Ipv4Addr>,
    /// The UDP port of VXLAN.
    pub port: u16,
}

/// A local endpoint.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Pod {
    /// The index of the host's interface.
    pub ifindex: u32,
    /// A number that differs between endpoints that have an address one after another.
    pub epoch: u32,
    /// A number of the network.
    pub network: u64,
    /// The MAC address of the interface inside the namespace.
    pub mac: [u8; 6],
    /// The MAC address of the host's interface.
    pub gateway: [u8; 6],
    /// The MTU of both interfaces, in bytes.
    pub mtu: u16,
    /// Whether the fast path is for this endpoint.
    pub fast: bool,
    /// Whether the host's interface has a queueing discipline.
    pub queued: bool,
    /// Whether the network is switched: the host's interface is a port of a bridge.
    pub switched: bool,
    /// Whether a network policy selects the endpoint, so that the stack judges its flows.
    pub selected: bool,
}

/// What of the map of this host only counts. What was remembered with other numbers does not hold any more.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Generations {
    /// Of everything that is remembered of flows.
    pub(crate) flows: u32,
    /// Of what the stack has let through for selected endpoints. Never 0.
    pub(crate) verdicts: u32,
}

impl Generations {
    /// Returns the numbers with which nothing that was remembered of flows holds.
    pub(crate) fn next(self) -> Self {
        Self { flows: self.flows.wrapping_add(1), ..self }
    }

    /// Returns the numbers with which the stack judges the flows of selected endpoints again.
    pub(crate) fn judged_again(self) -> Self {
        Self { verdicts: self.verdicts.wrapping_add(1).max(1), ..self }
    }
}

/// How a block of another host, or an endpoint of another host on a switched network, is reached.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Path {
    /// The number of the network.
    pub network: u64,
    /// The length of the longest packet inside, in bytes.
    pub mtu: u16,
    /// In VXLAN. `None` if packets are sent as they are, by the host's routes.
    pub vxlan: Option<VxlanPath>,
}

/// VXLAN to another host.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct VxlanPath {
    /// The address of the other host.
    pub vtep: Ipv4Addr,
    /// Its UDP port.
    pub port: u16,
    /// VXLAN network identifier.
    pub vni: u32,
    /// The MAC address that frames inside are for: of its VXLAN device, or of the endpoint on a switched network.
    pub mac: [u8; 6],
    /// The MAC address of this host's VXLAN device. `None` on a switched network, where frames come from the endpoint's.
    pub own_mac: Option<[u8; 6]>,
}

const DIRECT: u32 = 1;
const VXLAN: u32 = 2;
const SWITCHED: u32 = 3;
const FAST: u16 = 1;
const QUEUED: u16 = 2;
/// The flag of an endpoint on a switched network.
const BRIDGED: u16 = 4;
const SELECTED: u16 = 8;

/// Fields of a structure, one after another.
struct Fields<const N: usize> {
    bytes: [u8; N],
    at: usize,
}

impl<const N: usize> Fields<N> {
    fn new() -> Self {
        Self { bytes: [0; N], at: 0 }
    }

    fn of(bytes: [u8; N]) -> Self {
        Self { bytes, at: 0 }
    }

    fn put<const M: usize>(mut self, field: [u8; M]) -> Self {
        if let Some(to) = self.bytes.get_mut(self.at..self.at + M) {
            to.copy_from_slice(&field);
        }
        self.at += M;
        self
    }

    fn take<const M: usize>(&mut self) -> [u8; M] {
        let field = self.bytes.get(self.at..self.at + M).and_then(|field| field.try_into().ok());
        self.at += M;
        field.unwrap_or([0; M])
    }
}

pub(crate) fn address_key(address: IpAddr) -> AddressKey {
    match address {
        IpAddr::V4(address) => address.to_ipv6_mapped().octets(),
        IpAddr::V6(address) => address.octets(),
    }
}

pub(crate) fn address_of(key: AddressKey) -> IpAddr {
    IpAddr::V6(Ipv6Addr::from(key)).to_canonical()
}

/// The address and the prefix length of a key in a trie.
pub(crate) fn prefix_key(address: IpAddr, length: u8) -> (u32, AddressKey) {
    let more = if address.is_ipv4() { MAPPED } else { 0 };
    (u32::from(length) + u32::from(more), address_key(address))
}

pub(crate) fn prefix_of((length, key): (u32, AddressKey)) -> (IpAddr, u8) {
    let (address, length) = (address_of(key), u8::try_from(length).unwrap_or(u8::MAX));
    (address, if address.is_ipv4() { length.saturating_sub(MAPPED) } else { length })
}

impl Host {
    pub(crate) fn encode(&self, generations: Generations) -> HostValue {
        Fields::new()
            .put(u32::from(self.on).to_ne_bytes())
            .put(generations.flows.to_ne_bytes())
            .put(self.underlay.to_ne_bytes())
            .put(self.vtep.unwrap_or(Ipv4Addr::UNSPECIFIED).octets())
            .put(self.port.to_be_bytes())
            .put([0; 2])
            .put(generations.verdicts.to_ne_bytes())
            .bytes
    }

    /// Returns the host and the numbers beside it.
    pub(crate) fn decode(value: HostValue) -> (Self, Generations) {
        let mut fields = Fields::of(value);
        let on = u32::from_ne_bytes(fields.take()) != 0;
        let flows = u32::from_ne_bytes(fields.take());
        let underlay = u32::from_ne_bytes(fields.take());
        let vtep = Ipv4Addr::from(fields.take::<4>());
        let port = u16::from_be_bytes(fields.take());
        let _: [u8; 2] = fields.take();
        let verdicts = u32::from_ne_bytes(fields.take()).max(1);
        let vtep = Some(vtep).filter(|vtep| !vtep.is_unspecified());
        (Self { on, underlay, vtep, port }, Generations { flows, verdicts })
    }
}

impl Pod {
    pub(crate) fn encode(&self) -> PodValue {
        let flags =
            [(self.fast, FAST), (self.queued, QUEUED), (self.switched, BRIDGED), (self.selected, SELECTED)];
        let flags: u16 = flags.into_iter().filter(|(is_set, _)| *is_set).map(|(_, flag)| flag).sum();
        Fields::new()
            .put(self.ifindex.to_ne_bytes())
            .put(self.epoch.to_ne_bytes())
            .put(self.network.to_ne_bytes())
            .put(self.mac)
            .put(self.gateway)
            .put(self.mtu.to_ne_bytes())
            .put(flags.to_ne_bytes())
            .bytes
    }

    pub(crate) fn decode(value: PodValue) -> Self {
        let mut fields = Fields::of(value);
        let (ifindex, epoch) = (u32::from_ne_bytes(fields.take()), u32::from_ne_bytes(fields.take()));
        let network = u64::from_ne_bytes(fields.take());
        let (mac, gateway) = (fields.take(), fields.take());
        let (mtu, flags) = (u16::from_ne_bytes(fields.take()), u16::from_ne_bytes(fields.take()));
        let is = |flag: u16| flags & flag != 0;
        let (fast, queued, switched, selected) = (is(FAST), is(QUEUED), is(BRIDGED), is(SELECTED));
        Self { ifindex, epoch, network, mac, gateway, mtu, fast, queued, switched, selected }
    }
}

impl Path {
    pub(crate) fn encode(&self) -> PathValue {
        let fields = Fields::new().put(self.network.to_ne_bytes());
        match &self.vxlan {
            None => fields.put(DIRECT.to_ne_bytes()).put([0; 10]).put(self.mtu.to_ne_bytes()),
            Some(VxlanPath { vtep, port, vni, mac, own_mac }) => fields
                .put(if own_mac.is_some() { VXLAN } else { SWITCHED }.to_ne_bytes())
                .put(vtep.octets())
                .put(vni.to_ne_bytes())
                .put(port.to_be_bytes())
                .put(self.mtu.to_ne_bytes())
                .put(*mac)
                .put(own_mac.unwrap_or_default()),
        }
        .bytes
    }

    pub(crate) fn decode(value: PathValue) -> Self {
        let mut fields = Fields::of(value);
        let network = u64::from_ne_bytes(fields.take());
        let kind = u32::from_ne_bytes(fields.take());
        let vtep = Ipv4Addr::from(fields.take::<4>());
        let vni = u32::from_ne_bytes(fields.take());
        let port = u16::from_be_bytes(fields.take());
        let mtu = u16::from_ne_bytes(fields.take());
        let (mac, own_mac) = (fields.take(), (kind != SWITCHED).then_some(fields.take()));
        let vxlan = (kind != DIRECT).then_some(VxlanPath { vtep, port, vni, mac, own_mac });
        Self { network, mtu, vxlan }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_are_read_as_they_were_written() {
        let host = Host { on: true, underlay: 7, vtep: Some(Ipv4Addr::new(192, 0, 2, 1)), port: 4789 };
        let generations = Generations { flows: 3, verdicts: 9 };
        assert_eq!(Host::decode(host.encode(generations)), (host, generations));
        let without = Host { on: false, vtep: None, ..host };
        assert_eq!(Host::decode(without.encode(generations.next())), (without, generations.next()));
        let pod = Pod {
            ifindex: 12,
            epoch: 77,
            network: 1 << 39,
            mac: [2, 1, 2, 3, 4, 5],
            gateway: [2, 9, 9, 9, 9, 9],
            mtu: 1450,
            fast: true,
            queued: false,
            switched: false,
            selected: false,
        };
        let others = [
            Pod { fast: false, queued: true, ..pod },
            Pod { switched: true, ..pod },
            Pod { selected: true, ..pod },
        ];
        for pod in others.into_iter().chain([pod]) {
            assert_eq!(Pod::decode(pod.encode()), pod);
        }
        let vxlan = VxlanPath {
            vtep: Ipv4Addr::new(192, 0, 2, 2),
            port: 4790,
            vni: 0x0012_3456,
            mac: [6; 6],
            own_mac: Some([7; 6]),
        };
        let switched = VxlanPath { own_mac: None, ..vxlan };
        for vxlan in [Some(vxlan), Some(switched), None] {
            let path = Path { network: 5, mtu: 1450, vxlan };
            assert_eq!(Path::decode(path.encode()), path);
        }
    }

    #[test]
    fn verdicts_are_never_those_of_flows_that_nothing_selects() {
        let first = Host::decode([0; 24]).1;
        assert_eq!(first, Generations { flows: 0, verdicts: 1 });
        assert_eq!(first.judged_again().verdicts, 2);
        assert_eq!(Generations { verdicts: u32::MAX, ..first }.judged_again().verdicts, 1);
    }

    #[test]
    fn ipv4_prefixes_are_mapped() {
        for (address, length) in [("10.1.2.0", 24), ("fd01::", 64), ("0.0.0.0", 0)] {
            let address: IpAddr = address.parse().unwrap();
            assert_eq!(prefix_of(prefix_key(address, length)), (address, length));
        }
        assert_eq!(prefix_key("10.1.2.0".parse().unwrap(), 24).0, 120);
    }
}
