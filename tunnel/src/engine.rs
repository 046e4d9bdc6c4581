//! The engine's control side.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::net::Ipv6Addr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::api::{
    Drops, InterfaceConfig, InterfaceState, Mac, PeerConfig, PeerStatus, PublicKey, Source, State, TapState,
    public_key,
};

/// Interfaces and switched networks. All that it is asked can be repeated, and deleting what is gone
/// succeeds. Clones are handles of the same engine; with the last one its devices go.
#[derive(Debug, Clone, Default)]
pub struct Engine(Arc<Mutex<Control>>);

#[derive(Debug, Default)]
struct Control {
    interfaces: BTreeMap<String, Interface>,
    taps: BTreeMap<String, Tap>,
    paths: BTreeMap<Ipv6Addr, String>,
}

#[derive(Debug)]
struct Interface {
    config: InterfaceConfig,
    peers: BTreeMap<PublicKey, PeerConfig>,
}

#[derive(Debug)]
struct Tap {
    vni: u32,
    remotes: BTreeMap<Mac, Ipv6Addr>,
    floods: BTreeSet<Ipv6Addr>,
    sources: BTreeMap<Mac, Source>,
}

impl Engine {
    /// One without anything.
    pub fn new() -> Self {
        Self::default()
    }

    fn control(&self) -> MutexGuard<'_, Control> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Makes a TUN device of this name (in the network namespace of the calling thread, administratively
    /// down) and a socket, and serves them. One that is there gets another key, address or port; with
    /// another key, its sessions end.
    pub fn set_interface(&self, name: &str, config: &InterfaceConfig) -> io::Result<()> {
        let mut control = self.control();
        let peers = control.interfaces.remove(name).map(|old| old.peers).unwrap_or_default();
        control.interfaces.insert(name.to_owned(), Interface { config: config.clone(), peers });
        Ok(())
    }

    /// Ends it; its device goes.
    pub fn delete_interface(&self, name: &str) {
        self.control().interfaces.remove(name);
    }

    /// Sets the other end. Its sessions stay as long as its key does.
    ///
    /// Fails with [`io::ErrorKind::NotFound`] where there is no such interface.
    pub fn set_peer(&self, interface: &str, key: PublicKey, config: &PeerConfig) -> io::Result<()> {
        let mut control = self.control();
        let found = control.interfaces.get_mut(interface).ok_or(io::ErrorKind::NotFound)?;
        found.peers.insert(key, config.clone());
        Ok(())
    }

    /// Its sessions end at once.
    pub fn delete_peer(&self, interface: &str, key: PublicKey) {
        if let Some(found) = self.control().interfaces.get_mut(interface) {
            found.peers.remove(&key);
        }
    }

    /// By which interface a host's tunnel address is reached; without one, frames to it are dropped.
    pub fn set_path(&self, to: Ipv6Addr, interface: &str) {
        self.control().paths.insert(to, interface.to_owned());
    }

    /// No way leads there any more.
    pub fn delete_path(&self, to: Ipv6Addr) {
        self.control().paths.remove(&to);
    }

    /// Makes a TAP device of this name, administratively down, and serves it.
    ///
    /// Fails with [`io::ErrorKind::AlreadyExists`] where the network identifier belongs to another.
    pub fn add_tap(&self, name: &str, vni: u32) -> io::Result<()> {
        let mut control = self.control();
        if control.taps.iter().any(|(other, tap)| other != name && tap.vni == vni) {
            return Err(io::ErrorKind::AlreadyExists.into());
        }
        control.taps.entry(name.to_owned()).or_insert_with(|| Tap {
            vni,
            remotes: BTreeMap::new(),
            floods: BTreeSet::new(),
            sources: BTreeMap::new(),
        });
        Ok(())
    }

    /// Ends it; its device goes.
    pub fn delete_tap(&self, name: &str) {
        self.control().taps.remove(name);
    }

    fn with_tap(&self, name: &str, change: impl FnOnce(&mut Tap)) -> io::Result<()> {
        self.control().taps.get_mut(name).map(change).ok_or_else(|| io::ErrorKind::NotFound.into())
    }

    /// Frames for a MAC address go to this host.
    pub fn set_remote(&self, tap: &str, mac: Mac, to: Ipv6Addr) -> io::Result<()> {
        self.with_tap(tap, |tap| _ = tap.remotes.insert(mac, to))
    }

    /// No more.
    pub fn delete_remote(&self, tap: &str, mac: Mac) {
        let _ = self.with_tap(tap, |tap| _ = tap.remotes.remove(&mac));
    }

    /// Broadcast and multicast go to this host too.
    pub fn add_flood(&self, tap: &str, to: Ipv6Addr) -> io::Result<()> {
        self.with_tap(tap, |tap| _ = tap.floods.insert(to))
    }

    /// No more.
    pub fn delete_flood(&self, tap: &str, to: Ipv6Addr) {
        let _ = self.with_tap(tap, |tap| _ = tap.floods.remove(&to));
    }

    /// Frames from this MAC address are taken, if they are what `source` says. Without one they are not.
    pub fn set_source(&self, tap: &str, mac: Mac, source: Source) -> io::Result<()> {
        self.with_tap(tap, |tap| drop(tap.sources.insert(mac, source)))
    }

    /// No more.
    pub fn delete_source(&self, tap: &str, mac: Mac) {
        let _ = self.with_tap(tap, |tap| drop(tap.sources.remove(&mac)));
    }

    /// All of it, to be compared with what is wanted and to be shown.
    pub fn state(&self) -> State {
        let control = self.control();
        let peer = |(key, config): (&PublicKey, &PeerConfig)| PeerStatus {
            key: *key,
            config: config.clone(),
            endpoint: config.endpoint,
            last_handshake: None,
            sent: 0,
            received: 0,
        };
        State {
            interfaces: control
                .interfaces
                .iter()
                .map(|(name, interface)| InterfaceState {
                    name: name.clone(),
                    public_key: public_key(&interface.config.key),
                    listen: interface.config.listen,
                    peers: interface.peers.iter().map(peer).collect(),
                })
                .collect(),
            taps: control
                .taps
                .iter()
                .map(|(name, tap)| TapState {
                    name: name.clone(),
                    vni: tap.vni,
                    remotes: tap.remotes.iter().map(|(mac, to)| (*mac, *to)).collect(),
                    floods: tap.floods.iter().copied().collect(),
                    sources: tap.sources.iter().map(|(mac, source)| (*mac, source.clone())).collect(),
                })
                .collect(),
            drops: Drops::default(),
        }
    }
}
