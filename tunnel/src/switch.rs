//! Switched networks: which frames go where, and which are taken.

use std::collections::{BTreeSet, HashMap};
use std::fs::File;
use std::io::IoSlice;
use std::net::{IpAddr, Ipv6Addr};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard, Weak};

use crate::api::{Drops, FrameSource, Mac};
use crate::interface::Interface;
use crate::join::Output;
use crate::packet::{macs, sender};
use crate::sys;

/// What all threads of an engine share.
#[derive(Default)]
pub(crate) struct Switch {
    taps: RwLock<HashMap<u32, Arc<Tap>>>,
    paths: RwLock<HashMap<Ipv6Addr, Weak<Interface>>>,
    pub(crate) counters: Counters,
}

/// See [`Drops`].
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

impl Switch {
    pub(crate) fn tap(&self, vni: u32) -> Option<Arc<Tap>> {
        reading(&self.taps).get(&vni).cloned()
    }

    pub(crate) fn put_tap(&self, tap: &Arc<Tap>) {
        writing(&self.taps).insert(tap.vni, Arc::clone(tap));
    }

    pub(crate) fn remove_tap(&self, vni: u32) {
        writing(&self.taps).remove(&vni);
    }

    pub(crate) fn path(&self, to: Ipv6Addr) -> Option<Arc<Interface>> {
        reading(&self.paths).get(&to).and_then(Weak::upgrade)
    }

    pub(crate) fn put_path(&self, to: Ipv6Addr, interface: &Arc<Interface>) {
        writing(&self.paths).insert(to, Arc::downgrade(interface));
    }

    pub(crate) fn remove_path(&self, to: Ipv6Addr) {
        writing(&self.paths).remove(&to);
    }
}

/// A device, as threads write to it.
pub(crate) struct Device<'a> {
    pub(crate) file: &'a File,
    pub(crate) counters: &'a Counters,
}

impl Output for Device<'_> {
    fn write(&self, pieces: &[IoSlice<'_>]) {
        // A device that is down takes nothing.
        if sys::write(self.file, pieces).is_err() {
            Counters::count(&self.counters.full);
        }
    }
}

/// One switched network on this host.
pub(crate) struct Tap {
    pub(crate) name: String,
    pub(crate) vni: u32,
    pub(crate) file: File,
    table: RwLock<Table>,
    pub(crate) stopped: AtomicBool,
}

/// What is where.
#[derive(Debug, Default)]
pub(crate) struct Table {
    pub(crate) remotes: HashMap<Mac, Ipv6Addr>,
    pub(crate) floods: BTreeSet<Ipv6Addr>,
    pub(crate) sources: HashMap<Mac, FrameSource>,
}

impl Tap {
    pub(crate) fn new(name: &str, vni: u32, file: File) -> Self {
        Self { name: name.to_owned(), vni, file, table: RwLock::default(), stopped: AtomicBool::new(false) }
    }

    pub(crate) fn table(&self) -> RwLockReadGuard<'_, Table> {
        reading(&self.table)
    }

    pub(crate) fn change(&self, change: impl FnOnce(&mut Table)) {
        change(&mut writing(&self.table));
    }
}

impl Table {
    /// The hosts that get a frame.
    pub(crate) fn destinations(&self, frame: &[u8], to: &mut Vec<Ipv6Addr>) {
        to.clear();
        match macs(frame) {
            Some((destination, _)) if destination[0] & 1 != 0 => to.extend(&self.floods),
            Some((destination, _)) => to.extend(self.remotes.get(&destination)),
            None => {}
        }
    }

    /// Whether a frame is one that this host may send.
    pub(crate) fn is_honest(&self, frame: &[u8], host: Ipv6Addr) -> bool {
        let Some((_, source)) = macs(frame) else { return false };
        let Some(known) = self.sources.get(&source).filter(|known| known.from == host) else { return false };
        sender(frame).is_some_and(|address| is_common(address) || known.addresses.contains(&address))
    }
}

/// What an interface sends from before it knows its address, or beside it.
fn is_common(address: IpAddr) -> bool {
    address.is_unspecified() || matches!(address, IpAddr::V6(v6) if v6.is_unicast_link_local())
}

#[cfg(test)]
mod tests {
    use super::*;

    const MAC: Mac = [2, 0, 0, 0, 0, 1];

    fn host(n: u128) -> Ipv6Addr {
        Ipv6Addr::from_bits(n)
    }

    fn table() -> Table {
        let mut table = Table::default();
        let addresses = vec!["10.0.0.1".parse().unwrap(), "fd00::1".parse().unwrap()];
        table.sources.insert(MAC, FrameSource { from: host(1), addresses });
        table.remotes.insert(MAC, host(1));
        table.floods.extend([host(1), host(2)]);
        table
    }

    fn frame(source: Mac, kind: u16, at: usize, address: &[u8]) -> Vec<u8> {
        let mut frame = vec![0; 60];
        frame[..6].copy_from_slice(&[0xff; 6]);
        frame[6..12].copy_from_slice(&source);
        frame[12..14].copy_from_slice(&kind.to_be_bytes());
        // UDP, where it is IPv6.
        frame[20] = 17;
        frame[at..at + address.len()].copy_from_slice(address);
        frame
    }

    #[test]
    fn a_frame_is_taken_from_its_own_host_alone() {
        let table = table();
        let good = frame(MAC, 0x0800, 26, &[10, 0, 0, 1]);
        assert!(table.is_honest(&good, host(1)));
        assert!(!table.is_honest(&good, host(2)));
        assert!(!table.is_honest(&frame([2, 0, 0, 0, 0, 2], 0x0800, 26, &[10, 0, 0, 1]), host(1)));
        assert!(!table.is_honest(&frame(MAC, 0x0800, 26, &[10, 0, 0, 2]), host(1)));
        let v6 = |text: &str| text.parse::<Ipv6Addr>().unwrap().octets();
        assert!(table.is_honest(&frame(MAC, 0x86dd, 22, &v6("fd00::1")), host(1)));
        assert!(table.is_honest(&frame(MAC, 0x86dd, 22, &v6("fe80::9")), host(1)));
        assert!(table.is_honest(&frame(MAC, 0x86dd, 22, &v6("::")), host(1)));
        assert!(!table.is_honest(&frame(MAC, 0x86dd, 22, &v6("fd00::2")), host(1)));
        // Where addresses are told: ARP, and advertisements of neighbours.
        let arp = |mac: Mac, address: [u8; 4]| frame(MAC, 0x0806, 22, &[&mac[..], &address].concat());
        assert!(table.is_honest(&arp(MAC, [10, 0, 0, 1]), host(1)));
        assert!(!table.is_honest(&arp(MAC, [10, 0, 0, 2]), host(1)));
        assert!(!table.is_honest(&arp([2, 0, 0, 0, 0, 2], [10, 0, 0, 1]), host(1)));
        let advertisement = |target: &str| {
            let mut frame = frame(MAC, 0x86dd, 22, &v6("fd00::1"));
            frame.resize(100, 0);
            (frame[20], frame[54]) = (58, 136);
            frame[62..78].copy_from_slice(&v6(target));
            frame
        };
        assert!(table.is_honest(&advertisement("fd00::1"), host(1)));
        assert!(!table.is_honest(&advertisement("fd00::2"), host(1)));
        // Hidden behind options, in another protocol, or with a tag.
        let mut hidden = advertisement("fd00::2");
        (hidden[20], hidden[54]) = (60, 58);
        assert!(!table.is_honest(&hidden, host(1)));
        hidden[20] = 0;
        assert!(!table.is_honest(&hidden, host(1)));
        hidden[62] = 143;
        assert!(table.is_honest(&hidden, host(1)));
        assert!(!table.is_honest(&frame(MAC, 0x8100, 26, &[10, 0, 0, 1]), host(1)));
        assert!(!table.is_honest(&good[..20], host(1)));
        assert!(!table.is_honest(&good[..7], host(1)));
    }

    #[test]
    fn frames_go_where_their_address_is() {
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
        assert!(to.is_empty());
    }
}
