//! Sealing of datagrams: one sealer for each cluster key, and which one an address gets.

use std::collections::HashMap;
use std::io;
use std::net::SocketAddr;

use ovl_proto::id::{ClusterKeyId, NodeId};

use super::seal::{RunId, Sealer};
use crate::keys::{ClusterKey, Keyring};

/// The maximum number of addresses whose last key is remembered.
const MAX_ADDRESSES: usize = 1024;

/// The selection of the key to seal with for each address during a rotation. A host that joins or returns then does
/// not have the new key yet.
#[derive(Default)]
struct KeySelection {
    /// The keys according to the records of the hosts.
    known: HashMap<SocketAddr, ClusterKeyId>,
    /// The keys of the last datagrams from the addresses.
    heard: HashMap<SocketAddr, ClusterKeyId>,
}

impl KeySelection {
    fn key(&self, to: SocketAddr, usual: ClusterKeyId) -> ClusterKeyId {
        let heard = self.heard.get(&to).copied();
        // A host that seals with the usual key has it, even if an old record says otherwise.
        if heard == Some(usual) {
            return usual;
        }
        self.known.get(&to).copied().or(heard).unwrap_or(usual)
    }

    fn heard(&mut self, from: SocketAddr, key: ClusterKeyId) {
        if self.heard.len() >= MAX_ADDRESSES && !self.heard.contains_key(&from) {
            self.heard.clear();
        }
        self.heard.insert(from, key);
    }
}

/// The sealers of all cluster keys.
pub(super) struct Sealing {
    /// The first one is used unless the selection has another.
    sealers: Vec<Sealer>,
    selection: KeySelection,
}

impl Sealing {
    /// Begins a run for each key.
    ///
    /// # Errors
    ///
    /// The system has no random numbers.
    pub(super) fn new(keyring: &Keyring) -> anyhow::Result<Self> {
        let sealers = keyring.all().map(Sealer::new).collect::<anyhow::Result<Vec<_>>>()?;
        Ok(Self { sealers, selection: KeySelection::default() })
    }

    /// Replaces the keys, and what is known of the keys of each address.
    ///
    /// # Errors
    ///
    /// The system has no random numbers. Nothing has changed then.
    pub(super) fn set_keys(
        &mut self,
        keyring: &Keyring,
        known: HashMap<SocketAddr, ClusterKeyId>,
    ) -> anyhow::Result<()> {
        // Sealers of keys that remain are kept, because peers have authenticated their runs.
        let lacking = keyring.all().filter(|key| self.sealer_of(key.id()).is_none());
        let new = lacking.map(Sealer::new).collect::<anyhow::Result<Vec<_>>>()?;
        self.sealers.extend(new);
        let order: Vec<ClusterKeyId> = keyring.all().map(ClusterKey::id).collect();
        self.sealers.retain(|sealer| order.contains(&sealer.key_id()));
        self.sealers.sort_by_key(|sealer| order.iter().position(|id| *id == sealer.key_id()));
        self.selection.known = known;
        if keyring.ids().opens.is_empty() {
            self.selection = KeySelection::default();
        }
        Ok(())
    }

    /// Whether a run is one of the local host.
    pub(super) fn is_own(&self, run: RunId) -> bool {
        self.sealers.iter().any(|sealer| sealer.run() == run)
    }

    /// Whether there is more than one key, so that the key of each address counts.
    pub(super) fn selects(&self) -> bool {
        self.sealers.len() > 1
    }

    /// Notes the key of a datagram from an address.
    pub(super) fn heard(&mut self, from: SocketAddr, key: ClusterKeyId) {
        self.selection.heard(from, key);
    }

    /// Seals a datagram to an address into `datagram`. It opens on `receiver` alone if that is known.
    ///
    /// # Errors
    ///
    /// There is no key, or the encryption fails.
    pub(super) fn seal(
        &mut self,
        to: SocketAddr,
        (version, plain): (u8, &[u8]),
        receiver: Option<NodeId>,
        datagram: &mut Vec<u8>,
    ) -> io::Result<()> {
        let sealer = self.sealer_to(to).ok_or_else(|| io::Error::other("there is no cluster key"))?;
        let sealed = sealer.seal_version(version, plain, receiver, datagram);
        sealed.ok_or_else(|| io::Error::other("cannot seal the datagram"))
    }

    /// The run in which datagrams to an address are sealed. `None` if there is no key.
    pub(super) fn run_to(&mut self, to: SocketAddr) -> Option<RunId> {
        self.sealer_to(to).map(|sealer| sealer.run())
    }

    fn sealer_to(&mut self, to: SocketAddr) -> Option<&mut Sealer> {
        let usual = self.sealers.first().map(Sealer::key_id).unwrap_or_default();
        let key = if self.selects() { self.selection.key(to, usual) } else { usual };
        let at = self.sealer_of(key).unwrap_or_default();
        self.sealers.get_mut(at)
    }

    fn sealer_of(&self, key: ClusterKeyId) -> Option<usize> {
        self.sealers.iter().position(|sealer| sealer.key_id() == key)
    }
}
