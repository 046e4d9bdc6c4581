//! Tunnel devices and the devices of encrypted networks, in two implementations: the engine in this process, whose TUN
//! and TAP devices exist as long as it does, and WireGuard and VXLAN devices of the kernel.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::net::{IpAddr, Ipv6Addr, SocketAddr};
use std::time::Duration;

use ipnet::IpNet;
use ovl_dataplane::device::{Device, Role};
use ovl_dataplane::op::{AddressOp, FdbOp, Op, RouteOp, SourceOp, WireguardOp};
use ovl_dataplane::state::{Dataplane, Link, Remote, Source, Tunnel, TunnelKind, TunnelPeer};
use ovl_proto::SEALED_VXLAN_PORT;
use ovl_proto::id::{Mac, TunnelKey};
use ovl_tunnel::{Engine, InterfaceConfig, Offload, PeerConfig, PrivateKey, public_key};

use super::error::{KernelError, Result};
use super::sources::{Change, Sources};
use super::wireguard::Wireguard;

/// The status of a tunnel device.
#[derive(Debug, Clone)]
pub struct TunnelStatus {
    /// The device.
    pub device: Device,
    /// Its peers.
    pub peers: Vec<TunnelPeerStatus>,
    /// The number of dropped packets by reason. Only the first device has them, for all devices together. WireGuard
    /// devices of the kernel do not count drops.
    pub drops: Vec<(&'static str, u64)>,
}

/// The status of a peer of a tunnel device.
#[derive(Debug, Clone)]
pub struct TunnelPeerStatus {
    /// The public key.
    pub key: TunnelKey,
    /// The source of its last authenticated datagram.
    pub endpoint: Option<SocketAddr>,
    /// The time since the last handshake; `None` before the first.
    pub last_handshake: Option<Duration>,
    /// The number of bytes sent to it.
    pub sent: u64,
    /// The number of bytes received from it.
    pub received: u64,
    /// A number that grows with each authenticated message from it, handshakes included.
    pub heard: u64,
    /// Whether datagrams that the kernel divides (`UDP_SEGMENT`) arrive at it. WireGuard in the kernel divides none.
    pub segments: Offload,
}

/// All tunnel devices, and the devices of encrypted networks. To delete an absent one is no error.
#[derive(Debug)]
pub(super) struct Tunnels {
    /// The private keys of this host, by their public halves.
    keys: BTreeMap<TunnelKey, PrivateKey>,
    engine: Engine,
    /// The devices of the engine.
    served: BTreeSet<Device>,
    kernel_tunnels: KernelTunnels,
    /// The wanted configuration of each tunnel device, which the engine needs to create it.
    wanted: BTreeMap<Device, Tunnel>,
    /// The tunnel address of this host on each tunnel device.
    addresses: BTreeMap<Device, Ipv6Addr>,
}

impl Tunnels {
    /// Creates the engine, without devices.
    pub(super) fn new(keys: Vec<PrivateKey>) -> Self {
        let mut tunnels = Self {
            keys: BTreeMap::new(),
            engine: Engine::new(),
            served: BTreeSet::new(),
            kernel_tunnels: KernelTunnels::default(),
            wanted: BTreeMap::new(),
            addresses: BTreeMap::new(),
        };
        keys.into_iter().for_each(|key| tunnels.learn(key));
        tunnels
    }

    /// Adds a private key that tunnel devices may be configured with.
    pub(super) fn learn(&mut self, key: PrivateKey) {
        self.keys.insert(TunnelKey(public_key(&key)), key);
    }

    /// Notes the configuration in operations that are about to be applied.
    pub(super) fn expect(&mut self, ops: &[Op]) {
        for op in ops {
            match op {
                Op::Wireguard(WireguardOp::SetInterface(device, tunnel)) => {
                    self.wanted.insert(*device, *tunnel);
                }
                Op::Address(AddressOp::Add(device, net)) if is_tunnel(*device) => {
                    if let IpAddr::V6(address) = net.addr() {
                        self.addresses.insert(*device, address);
                    }
                }
                _ => {}
            }
        }
    }

    /// Whether [`Self::apply`] applies an operation, and not rtnetlink.
    pub(super) fn takes(&self, op: &Op) -> bool {
        match op {
            Op::Wireguard(_) | Op::Source(_) => true,
            Op::Fdb(op) => op.is_remote() && self.served.contains(&op.device()),
            _ => false,
        }
    }

    /// Creates a TUN or TAP device, administratively down.
    pub(super) fn make(&mut self, device: Device, link: &Link) -> Result<()> {
        // Another program may have deleted a device that the engine still serves.
        self.delete(device);
        let name = device.as_str();
        match link {
            Link::Tap { vni, .. } => self.engine.add_tap(name, *vni),
            Link::Tunnel { kind: TunnelKind::Userspace, .. } => {
                let wanted = self.wanted.get(&device).copied();
                let config = wanted.map(|wanted| self.config(device, wanted)).transpose()?.ok_or_else(|| {
                    KernelError::Other(format!("cannot create {device}: its key is not known yet"))
                })?;
                self.engine.set_interface(name, &config)
            }
            _ => return Err(KernelError::Other(format!("{device} is not a device of the tunnel engine"))),
        }
        .map_err(|error| match (error.kind(), link) {
            (io::ErrorKind::NotFound, _) => KernelError::Other(format!(
                "cannot create {device}: /dev/net/tun is missing (`modprobe tun`, or pass the device into the container)"
            )),
            (io::ErrorKind::AddrInUse, _) => KernelError::UdpPortInUse {
                port: self.wanted.get(&device).map_or(0, |wanted| wanted.port),
                purpose: "the tunnel",
                setting: "tunnel_port",
            },
            (io::ErrorKind::AlreadyExists, Link::Tap { vni, .. }) => {
                KernelError::Other(format!("VNI {vni} is in use by another encrypted network"))
            }
            _ => KernelError::io(format!("cannot create {device}"), &error),
        })?;
        self.served.insert(device);
        Ok(())
    }

    fn config(&self, device: Device, tunnel: Tunnel) -> Result<InterfaceConfig> {
        let key = self.private(tunnel.key)?;
        let listen = tunnel
            .local
            .ok_or_else(|| KernelError::Other(format!("{device} has no underlay address to listen on")))?;
        let address = self.addresses.get(&device).copied();
        Ok(InterfaceConfig {
            key,
            listen: SocketAddr::new(listen, tunnel.port),
            address: address.ok_or_else(|| KernelError::Other(format!("{device} has no tunnel address")))?,
            vxlan_port: SEALED_VXLAN_PORT,
        })
    }

    fn private(&self, key: TunnelKey) -> Result<PrivateKey> {
        let found = self.keys.get(&key).cloned();
        found.ok_or_else(|| KernelError::Other(format!("the private key of tunnel key {key} is unknown")))
    }

    /// Prepares for the VXLAN device of a switched network in the kernel's tunnel: creates the anti-spoofing filter.
    pub(super) fn guard(&mut self, device: Device, vni: u32) -> Result<()> {
        self.kernel_tunnels.guard(device, vni)
    }

    /// Whether an operation changes the anti-spoofing filter of the kernel's tunnel, see [`Self::change_sources`].
    pub(super) fn is_source(&self, op: &Op) -> bool {
        matches!(op, Op::Source(op) if !self.served.contains(&op.device()))
    }

    /// Applies changes of the anti-spoofing filter in one transaction.
    pub(super) fn change_sources(&mut self, ops: &[Op]) -> Result<()> {
        self.kernel_tunnels.change_sources(ops)
    }

    /// Deletes the anti-spoofing filter, for a teardown.
    pub(super) fn remove(&mut self) -> Result<()> {
        self.kernel_tunnels.sources()?.remove()
    }

    /// Prepares for the deletion of a device: releases its filter elements, and deletes it if the engine serves it.
    pub(super) fn delete(&mut self, device: Device) {
        if let Err(error) = self.kernel_tunnels.release(device) {
            // They accept frames that no device receives any more. The next start deletes them.
            tracing::warn!(%error, %device, "cannot delete the anti-spoofing elements of a deleted network");
        }
        if self.served.remove(&device) {
            match device.role() {
                Some(Role::Tunnel(_)) => self.engine.delete_interface(device.as_str()),
                _ => self.engine.delete_tap(device.as_str()),
            }
        }
    }

    /// Applies an operation for which [`Self::takes`] returns true.
    pub(super) fn apply(&mut self, op: &Op) -> Result<()> {
        let Some(device) = op.device() else { return Ok(()) };
        if self.served.contains(&device) {
            self.by_engine(device, op).map_err(|error| match error {
                EngineError::Io(error) => KernelError::io(op.to_string(), &error),
                EngineError::Known(error) => error,
            })
        } else {
            self.by_kernel(op)
        }
    }

    fn by_engine(&self, device: Device, op: &Op) -> Result<(), EngineError> {
        let (engine, name) = (&self.engine, device.as_str());
        match op {
            Op::Wireguard(WireguardOp::SetInterface(_, tunnel)) => {
                engine.set_interface(name, &self.config(device, *tunnel)?)?
            }
            Op::Wireguard(WireguardOp::SetPeer(_, key, TunnelPeer { endpoint, allowed })) => {
                let config = PeerConfig { endpoint: *endpoint, allowed: allowed.iter().copied().collect() };
                engine.set_peer(name, key.0, &config)?;
            }
            Op::Wireguard(WireguardOp::DeletePeer(_, key)) => engine.delete_peer(name, key.0),
            Op::Fdb(FdbOp::SetRemote(_, mac, remote)) => {
                engine.set_remote(name, mac.0, inner(remote.vtep)?)?
            }
            Op::Fdb(FdbOp::DeleteRemote(_, mac)) => engine.delete_remote(name, mac.0),
            Op::Fdb(FdbOp::AddFlood(_, remote)) => engine.add_flood(name, inner(remote.vtep)?)?,
            Op::Fdb(FdbOp::DeleteFlood(_, remote)) => engine.delete_flood(name, inner(remote.vtep)?),
            Op::Fdb(FdbOp::AddGroup(_, mac, remote)) => engine.add_group(name, mac.0, inner(remote.vtep)?)?,
            Op::Fdb(FdbOp::DeleteGroup(_, mac, remote)) => {
                engine.delete_group(name, mac.0, inner(remote.vtep)?)
            }
            Op::Source(SourceOp::Set(_, mac, Source { from, addresses })) => {
                let addresses = addresses.iter().copied().collect();
                let from = from.iter().map(|host| inner(*host)).collect::<Result<_>>()?;
                engine.set_source(name, mac.0, ovl_tunnel::FrameSource { from, addresses })?;
            }
            Op::Source(SourceOp::Delete(_, mac)) => engine.delete_source(name, mac.0),
            _ => {}
        }
        Ok(())
    }

    fn by_kernel(&mut self, op: &Op) -> Result<()> {
        match op {
            Op::Wireguard(WireguardOp::SetInterface(device, tunnel)) => {
                let key = self.private(tunnel.key)?;
                self.kernel_tunnels.wireguard()?.set(*device, &key.0, tunnel.port)
            }
            Op::Wireguard(WireguardOp::SetPeer(device, key, peer)) => {
                self.kernel_tunnels.wireguard()?.set_peer(*device, *key, peer)
            }
            Op::Wireguard(WireguardOp::DeletePeer(device, key)) => {
                self.kernel_tunnels.wireguard()?.delete_peer(*device, *key)
            }
            op => self.kernel_tunnels.change_sources(std::slice::from_ref(op)),
        }
    }

    /// Updates the engine after a route to the tunnel address of a host was set or deleted: the route selects the
    /// tunnel device through which the host is reached.
    pub(super) fn routed(&self, op: &Op) -> Result<()> {
        match op {
            Op::Route(RouteOp::Set(IpNet::V6(to), hop)) if to.prefix_len() == 128 => {
                // Devices of the kernel need only the route.
                if let Some(device) = hop.device.filter(|at| is_tunnel(*at) && self.served.contains(at)) {
                    self.engine
                        .set_path(to.addr(), device.as_str())
                        .map_err(|error| KernelError::io(op.to_string(), &error))?;
                }
            }
            Op::Route(RouteOp::Delete(IpNet::V6(to))) if to.prefix_len() == 128 => {
                self.engine.delete_path(to.addr())
            }
            _ => {}
        }
        Ok(())
    }

    /// Adds the configuration of tunnels to a dump of links. Devices that are not in the dump are skipped.
    pub(super) fn fill(&mut self, kernel: &mut Dataplane) -> Result<()> {
        let state = self.engine.state();
        for interface in state.interfaces {
            let Some(device) = Device::new(&interface.name) else { continue };
            let Some(Link::Tunnel { kind: TunnelKind::Userspace, .. }) = kernel.links.get(&device) else {
                continue;
            };
            let (key, listen) = (TunnelKey(interface.public_key), interface.listen);
            kernel.tunnels.insert(device, Tunnel { key, port: listen.port(), local: Some(listen.ip()) });
            for peer in interface.peers {
                let PeerConfig { endpoint, allowed } = peer.config;
                let peer_is = TunnelPeer { endpoint, allowed: allowed.into_iter().collect() };
                kernel.tunnel_peers.insert((device, TunnelKey(peer.key)), peer_is);
            }
        }
        for tap in state.taps {
            let Some(device) = Device::new(&tap.name) else { continue };
            let Some(Link::Tap { vni, .. }) = kernel.links.get_mut(&device) else { continue };
            *vni = tap.vni;
            let at = |to: Ipv6Addr| Remote { vtep: to.into(), port: SEALED_VXLAN_PORT };
            kernel.remotes.extend(tap.remotes.into_iter().map(|(mac, to)| ((device, Mac(mac)), at(to))));
            kernel.floods.extend(tap.floods.into_iter().map(|to| (device, at(to))));
            kernel.groups.extend(tap.groups.into_iter().map(|(mac, to)| (device, Mac(mac), at(to))));
            kernel.sources.extend(tap.sources.into_iter().map(|(mac, source)| {
                let addresses = source.addresses.into_iter().collect();
                let from = source.from.into_iter().map(IpAddr::V6).collect();
                ((device, Mac(mac)), Source { from, addresses })
            }));
        }
        self.kernel_tunnels.fill(kernel)
    }

    /// Reads the status of each tunnel device.
    pub(super) fn status(&mut self, kernel: &Dataplane) -> Result<Vec<TunnelStatus>> {
        let state = self.engine.state();
        let drops = state.drops;
        let mut all: Vec<TunnelStatus> = state
            .interfaces
            .into_iter()
            .filter_map(|interface| Device::new(&interface.name).map(|device| (device, interface)))
            .map(|(device, interface)| TunnelStatus {
                device,
                peers: interface
                    .peers
                    .into_iter()
                    .map(|peer| TunnelPeerStatus {
                        key: TunnelKey(peer.key),
                        endpoint: Some(peer.endpoint),
                        last_handshake: peer.last_handshake,
                        sent: peer.sent,
                        received: peer.received,
                        heard: peer.heard,
                        segments: peer.segments,
                    })
                    .collect(),
                drops: Vec::new(),
            })
            .collect();
        if let Some(first) = all.first_mut() {
            // The engine counts drops for all its interfaces together.
            first.drops = vec![
                ("unauthenticated", drops.unauthenticated),
                ("spoofed", drops.spoofed),
                ("no_peer", drops.no_peer),
                ("full", drops.full),
            ];
        }
        for device in kernel_tunnel_devices(kernel) {
            let peers = self.kernel_tunnels.status(device)?;
            all.push(TunnelStatus { device, peers, drops: Vec::new() });
        }
        if let Some(first) = all.first_mut().filter(|first| first.drops.is_empty()) {
            first.drops = self.kernel_tunnels.drops()?;
        }
        Ok(all)
    }
}

fn is_tunnel(device: Device) -> bool {
    matches!(device.role(), Some(Role::Tunnel(_)))
}

fn kernel_tunnel_devices(kernel: &Dataplane) -> Vec<Device> {
    let links = kernel.links.iter();
    links
        .filter(|(_, link)| matches!(link, Link::Tunnel { kind: TunnelKind::Kernel, .. }))
        .map(|(device, _)| *device)
        .collect()
}

/// An error of an operation of the engine.
enum EngineError {
    Io(io::Error),
    Known(KernelError),
}

impl From<io::Error> for EngineError {
    fn from(error: io::Error) -> Self {
        Self::Io(error)
    }
}

impl From<KernelError> for EngineError {
    fn from(error: KernelError) -> Self {
        Self::Known(error)
    }
}

/// The tunnel address of a host, which must be IPv6.
fn inner(address: IpAddr) -> Result<Ipv6Addr, KernelError> {
    match address {
        IpAddr::V6(address) => Ok(address),
        IpAddr::V4(_) => Err(KernelError::NotTunnelAddress(address)),
    }
}

/// Whether this kernel supports WireGuard devices.
pub(super) fn kernel_has_wireguard() -> bool {
    match Wireguard::open().and_then(|mut wireguard| wireguard.is_there()) {
        Ok(is_there) => is_there,
        Err(error) => {
            tracing::warn!(%error, "cannot check whether the kernel has WireGuard");
            false
        }
    }
}

/// The WireGuard devices of the kernel, and their anti-spoofing filter. The sockets are opened at the first use: most
/// hosts need neither.
#[derive(Debug, Default)]
struct KernelTunnels {
    wireguard: Option<Wireguard>,
    sources: Option<Sources>,
    /// The VNIs of the switched networks in the kernel's tunnel.
    vnis: BTreeMap<Device, u32>,
}

impl KernelTunnels {
    fn wireguard(&mut self) -> Result<&mut Wireguard> {
        match &mut self.wireguard {
            Some(wireguard) => Ok(wireguard),
            closed => Ok(closed.insert(Wireguard::open()?)),
        }
    }

    fn sources(&mut self) -> Result<&mut Sources> {
        match &mut self.sources {
            Some(sources) => Ok(sources),
            closed => Ok(closed.insert(Sources::open(SEALED_VXLAN_PORT)?)),
        }
    }

    /// Adds a network before its device is created, so that the filter applies from the first frame.
    fn guard(&mut self, device: Device, vni: u32) -> Result<()> {
        self.vnis.insert(device, vni);
        self.sources()?.ensure()
    }

    /// Removes a network whose device was deleted, with its filter elements.
    fn release(&mut self, device: Device) -> Result<()> {
        if self.vnis.remove(&device).is_none() {
            return Ok(());
        }
        let left: BTreeSet<u32> = self.vnis.values().copied().collect();
        let sources = self.sources()?;
        if left.is_empty() { sources.remove() } else { sources.retain(&left) }
    }

    /// Applies changes of the filter in one transaction.
    fn change_sources(&mut self, ops: &[Op]) -> Result<()> {
        let mut changes = Vec::with_capacity(ops.len());
        for op in ops {
            let (device, mac, source) = match op {
                Op::Source(SourceOp::Set(device, mac, source)) => (device, *mac, Some(source.clone())),
                Op::Source(SourceOp::Delete(device, mac)) => (device, *mac, None),
                _ => continue,
            };
            match (self.vnis.get(device), &source) {
                (Some(vni), _) => changes.push(Change { vni: *vni, mac, source }),
                // It was deleted with its device.
                (None, None) => {}
                (None, Some(_)) => return Err(KernelError::NoDevice(*device)),
            }
        }
        self.sources()?.apply(&changes)
    }

    fn fill(&mut self, kernel: &mut Dataplane) -> Result<()> {
        for device in kernel_tunnel_devices(kernel) {
            let (tunnel, peers) = self.wireguard()?.dump(device)?;
            kernel.tunnels.insert(device, tunnel);
            kernel.tunnel_peers.extend(peers.into_iter().map(|(key, peer)| ((device, key), peer)));
        }
        let is_first = self.sources.is_none();
        self.vnis = kernel
            .links
            .iter()
            .filter_map(|(device, link)| match link {
                Link::Vxlan { vni, sealed: true, .. } => Some((*device, *vni)),
                _ => None,
            })
            .collect();
        if self.vnis.is_empty() {
            return Ok(());
        }
        if is_first {
            // Delete elements that an earlier process left of deleted networks.
            let there = self.vnis.values().copied().collect();
            self.sources()?.retain(&there)?;
        }
        let devices = self.vnis.iter().map(|(device, vni)| (*vni, *device)).collect();
        kernel.sources.extend(self.sources()?.dump(&devices)?);
        Ok(())
    }

    fn status(&mut self, device: Device) -> Result<Vec<TunnelPeerStatus>> {
        let peers = self.wireguard()?.status(device)?;
        let status = |(key, peer): (TunnelKey, super::wireguard::PeerStatus)| TunnelPeerStatus {
            key,
            endpoint: peer.endpoint,
            last_handshake: peer.last_handshake,
            sent: peer.sent,
            received: peer.received,
            // Handshakes count as well.
            heard: peer.received,
            segments: Offload::Unknown,
        };
        Ok(peers.into_iter().map(status).collect())
    }

    fn drops(&mut self) -> Result<Vec<(&'static str, u64)>> {
        match &mut self.sources {
            Some(sources) if !self.vnis.is_empty() => Ok(vec![("spoofed", sources.refused()?)]),
            _ => Ok(Vec::new()),
        }
    }
}
