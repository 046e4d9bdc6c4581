//! Switched networks: where frames are sent, and which frames are accepted.

use std::collections::{BTreeSet, HashMap};
use std::io::IoSlice;
use std::net::{IpAddr, Ipv6Addr};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard, Weak};

use crate::api::{Drops, FrameSource, Mac};
use crate::backend::{Backend, Device};
use crate::join::Output;
use crate::packet::{Claim, claim, macs};
use ovl_udp::threads::StopSignal;

/// The state that all threads of an engine share. A path is an interface that leads to an address.
pub(crate) struct Switch<B: Backend, P> {
    taps: RwLock<HashMap<u32, Arc<Tap<B>>>>,
    paths: RwLock<HashMap<Ipv6Addr, Weak<P>>>,
    pub(crate) counters: Counters,
}

impl<B: Backend, P> Default for Switch<B, P> {
    fn default() -> Self {
        Self { taps: RwLock::default(), paths: RwLock::default(), counters: Counters::default() }
    }
}

/// The counters behind [`Drops`].
#[derive(Default)]
pub(crate) struct Counters {
    pub(crate) unauthenticated: AtomicU64,
    pub(crate) spoofed: AtomicU64,
    pub(crate) no_peer: AtomicU64,
    pub(crate) full: AtomicU64,
}

impl Counters {
    pub(crate) fn count(counter: &AtomicU64) {
        counter.fetch_add(1, Ordering::Relaxed);
    }

    pub(crate) fn read(&self) -> Drops {
        let read = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        Drops {
            unauthenticated: read(&self.unauthenticated),
            spoofed: read(&self.spoofed),
            no_peer: read(&self.no_peer),
            full: read(&self.full),
        }
    }
}

pub(crate) fn reading<T>(lock: &RwLock<T>) -> RwLockReadGuard<'_, T> {
    lock.read().unwrap_or_else(PoisonError::into_inner)
}

pub(crate) fn writing<T>(lock: &RwLock<T>) -> RwLockWriteGuard<'_, T> {
    lock.write().unwrap_or_else(PoisonError::into_inner)
}

impl<B: Backend, P> Switch<B, P> {
    pub(crate) fn tap(&self, vni: u32) -> Option<Arc<Tap<B>>> {
        reading(&self.taps).get(&vni).cloned()
    }

    pub(crate) fn put_tap(&self, tap: &Arc<Tap<B>>) {
        writing(&self.taps).insert(tap.vni, Arc::clone(tap));
    }

    pub(crate) fn remove_tap(&self, vni: u32) {
        writing(&self.taps).remove(&vni);
    }

    pub(crate) fn path(&self, to: Ipv6Addr) -> Option<Arc<P>> {
        reading(&self.paths).get(&to).and_then(Weak::upgrade)
    }

    pub(crate) fn put_path(&self, to: Ipv6Addr, interface: &Arc<P>) {
        writing(&self.paths).insert(to, Arc::downgrade(interface));
    }

    pub(crate) fn remove_path(&self, to: Ipv6Addr) {
        writing(&self.paths).remove(&to);
    }
}

/// Writes packets to a device and counts those that it refuses.
pub(crate) struct DeviceOutput<'a, D> {
    pub(crate) device: &'a D,
    pub(crate) counters: &'a Counters,
}

impl<D: Device> Output for DeviceOutput<'_, D> {
    fn write(&self, pieces: &[IoSlice<'_>]) {
        // A device that is down refuses every packet.
        if self.device.write(pieces).is_err() {
            Counters::count(&self.counters.full);
        }
    }
}

/// A switched network on this host.
pub(crate) struct Tap<B: Backend> {
    pub(crate) name: String,
    pub(crate) vni: u32,
    /// `None` after [`Tap::close`]. Receiving threads may keep the `Tap` a while longer, but not its device.
    device: RwLock<Option<Arc<B::Device>>>,
    table: RwLock<ForwardingTable>,
    pub(crate) stop: Arc<StopSignal>,
}

/// Writes frames to the device of a switched network, as long as it has one.
pub(crate) struct TapOutput<'a, B: Backend> {
    pub(crate) tap: &'a Tap<B>,
    pub(crate) counters: &'a Counters,
}

impl<B: Backend> Output for TapOutput<'_, B> {
    fn write(&self, pieces: &[IoSlice<'_>]) {
        if let Some(device) = &*reading(&self.tap.device) {
            DeviceOutput { device: &**device, counters: self.counters }.write(pieces);
        }
    }
}

/// The forwarding and filter entries of a switched network.
#[derive(Debug, Default)]
pub(crate) struct ForwardingTable {
    /// The host behind which a MAC address is.
    pub(crate) remotes: HashMap<Mac, Ipv6Addr>,
    /// The hosts that get broadcast frames, and multicast frames whose MAC address is not in [`Self::groups`].
    pub(crate) floods: BTreeSet<Ipv6Addr>,
    /// The hosts that get frames for the MAC address of a multicast group.
    pub(crate) groups: HashMap<Mac, BTreeSet<Ipv6Addr>>,
    /// The accepted sources of received frames.
    pub(crate) sources: HashMap<Mac, FrameSource>,
}

impl<B: Backend> Tap<B> {
    pub(crate) fn new(name: &str, vni: u32, device: Arc<B::Device>, stop: Arc<StopSignal>) -> Self {
        let device = RwLock::new(Some(device));
        Self { name: name.to_owned(), vni, device, table: RwLock::default(), stop }
    }

    /// Lets go of the device. Waits until no thread writes to it.
    pub(crate) fn close(&self) {
        *writing(&self.device) = None;
    }

    pub(crate) fn table(&self) -> RwLockReadGuard<'_, ForwardingTable> {
        reading(&self.table)
    }

    pub(crate) fn change(&self, change: impl FnOnce(&mut ForwardingTable)) {
        change(&mut writing(&self.table));
    }
}

impl ForwardingTable {
    /// Finds the hosts that a frame is sent to.
    pub(crate) fn destinations(&self, frame: &[u8], to: &mut Vec<Ipv6Addr>) {
        to.clear();
        match macs(frame) {
            Some((destination, _)) if destination[0] & 1 != 0 => {
                to.extend(self.groups.get(&destination).unwrap_or(&self.floods));
            }
            // An unknown address may be a virtual one that several endpoints share (VRRP).
            Some((destination, _)) => match self.remotes.get(&destination) {
                Some(host) => to.push(*host),
                None => to.extend(&self.floods),
            },
            None => {}
        }
    }

    /// Returns whether this host may send this frame.
    pub(crate) fn is_allowed(&self, frame: &[u8], host: Ipv6Addr) -> bool {
        let Some((_, source)) = macs(frame) else { return false };
        let Some(known) = self.sources.get(&source).filter(|known| known.from.contains(&host)) else {
            return false;
        };
        match claim(frame) {
            Some(Claim::Address(address)) => is_unassigned(address) || known.addresses.contains(&address),
            Some(Claim::Nothing) => true,
            None => false,
        }
    }
}

/// Returns whether an address needs no assignment: unspecified (DHCP, duplicate address detection) or
/// link-local.
fn is_unassigned(address: IpAddr) -> bool {
    address.is_unspecified() || matches!(address, IpAddr::V6(v6) if v6.is_unicast_link_local())
}

#[cfg(test)]
mod tests {
    use super::*;

    const MAC: Mac = [2, 0, 0, 0, 0, 1];

    fn host(n: u128) -> Ipv6Addr {
        Ipv6Addr::from_bits(n)
    }

    fn table() -> ForwardingTable {
        let mut table = ForwardingTable::default();
        let addresses = vec!["10.0.0.1".parse().unwrap(), "fd00::1".parse().unwrap()];
        table.sources.insert(MAC, FrameSource { from: vec![host(1)], addresses });
        table.remotes.insert(MAC, host(1));
        table.floods.extend([host(1), host(2)]);
        table
    }

    fn frame(source: Mac, kind: u16, at: usize, address: &[u8]) -> Vec<u8> {
        let mut frame = vec![0; 60];
        frame[..6].copy_from_slice(&[0xff; 6]);
        frame[6..12].copy_from_slice(&source);
        frame[12..14].copy_from_slice(&kind.to_be_bytes());
        // The next header of IPv6: UDP.
        frame[20] = 17;
        frame[at..at + address.len()].copy_from_slice(address);
        frame
    }

    #[test]
    fn only_the_host_of_a_mac_address_may_send_from_it() {
        let table = table();
        let good = frame(MAC, 0x0800, 26, &[10, 0, 0, 1]);
        assert!(table.is_allowed(&good, host(1)));
        assert!(!table.is_allowed(&good, host(2)));
        assert!(!table.is_allowed(&frame([2, 0, 0, 0, 0, 2], 0x0800, 26, &[10, 0, 0, 1]), host(1)));
        assert!(!table.is_allowed(&frame(MAC, 0x0800, 26, &[10, 0, 0, 2]), host(1)));
        let v6 = |text: &str| text.parse::<Ipv6Addr>().unwrap().octets();
        assert!(table.is_allowed(&frame(MAC, 0x86dd, 22, &v6("fd00::1")), host(1)));
        assert!(table.is_allowed(&frame(MAC, 0x86dd, 22, &v6("fe80::9")), host(1)));
        assert!(table.is_allowed(&frame(MAC, 0x86dd, 22, &v6("::")), host(1)));
        assert!(!table.is_allowed(&frame(MAC, 0x86dd, 22, &v6("fd00::2")), host(1)));
        // Messages that announce addresses: ARP and neighbor advertisements.
        let arp = |mac: Mac, address: [u8; 4]| frame(MAC, 0x0806, 22, &[&mac[..], &address].concat());
        assert!(table.is_allowed(&arp(MAC, [10, 0, 0, 1]), host(1)));
        assert!(!table.is_allowed(&arp(MAC, [10, 0, 0, 2]), host(1)));
        assert!(!table.is_allowed(&arp([2, 0, 0, 0, 0, 2], [10, 0, 0, 1]), host(1)));
        let advertisement = |target: &str| {
            let mut frame = frame(MAC, 0x86dd, 22, &v6("fd00::1"));
            frame.resize(100, 0);
            (frame[20], frame[54]) = (58, 136);
            frame[62..78].copy_from_slice(&v6(target));
            frame
        };
        assert!(table.is_allowed(&advertisement("fd00::1"), host(1)));
        assert!(!table.is_allowed(&advertisement("fd00::2"), host(1)));
        // Router advertisements and redirects.
        for kind in [134, 137] {
            let mut router = advertisement("fd00::1");
            router[54] = kind;
            assert!(!table.is_allowed(&router, host(1)));
        }
        // Hidden behind options.
        let mut hidden = advertisement("fd00::2");
        (hidden[20], hidden[54]) = (60, 58);
        assert!(!table.is_allowed(&hidden, host(1)));
        hidden[20] = 0;
        assert!(!table.is_allowed(&hidden, host(1)));
        hidden[62] = 143;
        assert!(table.is_allowed(&hidden, host(1)));
        // Behind one VLAN tag, or two.
        let tagged = |tags: usize, frame: &[u8]| {
            [&frame[..12], &[0x81, 0, 0, 5].repeat(tags)[..], &frame[12..]].concat()
        };
        assert!(table.is_allowed(&tagged(1, &good), host(1)));
        assert!(!table.is_allowed(&tagged(2, &good), host(1)));
        for bad in [frame(MAC, 0x0800, 26, &[10, 0, 0, 2]), arp(MAC, [10, 0, 0, 2]), advertisement("fd00::2")]
        {
            assert!(!table.is_allowed(&tagged(1, &bad), host(1)));
        }
        // Other protocols have no address to check.
        let lldp = frame(MAC, 0x88cc, 26, &[]);
        assert!(table.is_allowed(&lldp, host(1)) && table.is_allowed(&tagged(1, &lldp), host(1)));
        assert!(!table.is_allowed(&lldp, host(2)));
        assert!(!table.is_allowed(&good[..20], host(1)));
        assert!(!table.is_allowed(&good[..7], host(1)));
    }

    #[test]
    fn a_frame_goes_to_the_host_of_its_destination() {
        let table = table();
        let mut to = Vec::new();
        table.destinations(&frame(MAC, 0x0800, 26, &[]), &mut to);
        assert_eq!(to, [host(1), host(2)]);
        let mut single = frame(MAC, 0x0800, 26, &[]);
        single[..6].copy_from_slice(&MAC);
        table.destinations(&single, &mut to);
        assert_eq!(to, [host(1)]);
        single[5] = 9;
        table.destinations(&single, &mut to);
        assert_eq!(to, [host(1), host(2)]);
        let mut table = table;
        table.groups.insert([1, 0, 0x5e, 1, 2, 3], [host(2)].into());
        single[..6].copy_from_slice(&[1, 0, 0x5e, 1, 2, 3]);
        table.destinations(&single, &mut to);
        assert_eq!(to, [host(2)]);
        single[5] = 4;
        table.destinations(&single, &mut to);
        assert_eq!(to, [host(1), host(2)]);
        table.destinations(&single[..5], &mut to);
        assert!(to.is_empty());
    }
}
