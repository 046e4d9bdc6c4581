//! The ends of tunnels and the devices of encrypted networks, by who does the work: the engine in this process,
//! whose TUN and TAP devices live as long as it does, or the kernel's own devices.

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
use ovl_tunnel::{Engine, InterfaceConfig, PeerConfig, PrivateKey, public_key};

use super::error::{KernelError, Result};
use super::sources::{Change, Sources};
use super::wireguard::Wireguard;

/// One end of a tunnel, as it is.
#[derive(Debug, Clone)]
pub struct TunnelStatus {
    /// Which.
    pub device: Device,
    /// The other ends.
    pub peers: Vec<TunnelPeerStatus>,
    /// What was dropped so far, by the reason; the kernel's device does not tell.
    pub drops: Vec<(&'static str, u64)>,
}

/// The other end of a tunnel, as it is.
#[derive(Debug, Clone)]
pub struct TunnelPeerStatus {
    /// Whose.
    pub key: TunnelKey,
    /// Where its last authenticated datagram came from.
    pub endpoint: Option<SocketAddr>,
    /// Since the last handshake.
    pub last_handshake: Option<Duration>,
    /// Bytes of packets for it.
    pub sent: u64,
    /// Bytes of packets from it.
    pub received: u64,
}

/// All of them. Deleting what is gone succeeds.
#[derive(Debug)]
pub(super) struct Tunnels {
    /// This host's private keys, by their public halves.
    keys: BTreeMap<TunnelKey, PrivateKey>,
    engine: Engine,
    /// Devices of the engine.
    served: BTreeSet<Device>,
    in_kernel: InKernel,
    /// Of each end: what it is about to be, for the engine's cannot be made without that.
    wanted: BTreeMap<Device, Tunnel>,
    /// Of each end: the own address inside.
    addresses: BTreeMap<Device, Ipv6Addr>,
}

impl Tunnels {
    pub(super) fn new(keys: Vec<PrivateKey>) -> Self {
        let mut tunnels = Self {
            keys: BTreeMap::new(),
            engine: Engine::new(),
            served: BTreeSet::new(),
            in_kernel: InKernel::default(),
            wanted: BTreeMap::new(),
            addresses: BTreeMap::new(),
        };
        keys.into_iter().for_each(|key| tunnels.learn(key));
        tunnels
    }

    /// Takes another private key that an end may get.
    pub(super) fn learn(&mut self, key: PrivateKey) {
        self.keys.insert(TunnelKey(public_key(&key)), key);
    }

    /// Takes note of operations that are about to be done.
    pub(super) fn expect(&mut self, ops: &[Op]) {
        for op in ops {
            match op {
                Op::Wireguard(WireguardOp::SetInterface(device, tunnel)) => {
                    self.wanted.insert(*device, *tunnel);
                }
                Op::Address(AddressOp::Add(device, net)) if is_end(*device) => {
                    if let IpAddr::V6(address) = net.addr() {
                        self.addresses.insert(*device, address);
                    }
                }
                _ => {}
            }
        }
    }

    /// Whether [`Self::apply`] does it, and not netlink.
    pub(super) fn takes(&self, op: &Op) -> bool {
        match op {
            Op::Wireguard(_) | Op::Source(_) => true,
            Op::Fdb(op) => op.is_remote() && self.served.contains(&op.device()),
            _ => false,
        }
    }

    /// Makes a TUN or a TAP device, administratively down.
    pub(super) fn make(&mut self, device: Device, link: &Link) -> Result<()> {
        // Somebody may have deleted the device of one that is still served.
        self.delete(device);
        let name = device.as_str();
        match link {
            Link::Tap { vni, .. } => self.engine.add_tap(name, *vni),
            Link::Tunnel { kind: TunnelKind::Userspace, .. } => {
                let wanted = self.wanted.get(&device).copied();
                let config = wanted.map(|wanted| self.config(device, wanted)).transpose()?.ok_or_else(|| {
                    KernelError::Other(format!("{device} cannot be made before its key is known"))
                })?;
                self.engine.set_interface(name, &config)
            }
            _ => return Err(KernelError::Other(format!("{device} is no device of the tunnel"))),
        }
        .map_err(|error| match (error.kind(), link) {
            (io::ErrorKind::NotFound, _) => KernelError::Other(format!(
                "cannot make {device}: /dev/net/tun is missing (`modprobe tun`, or pass the device into the container)"
            )),
            (io::ErrorKind::AddrInUse, _) => KernelError::Other(
                "the tunnel's UDP port is in use by another program (`ss -ulnp` shows it): give another one with \
                 tunnel_port"
                    .to_owned(),
            ),
            (io::ErrorKind::AlreadyExists, Link::Tap { vni, .. }) => {
                KernelError::Other(format!("VNI {vni} is in use by another encrypted network"))
            }
            _ => KernelError::io(format!("cannot make {device}"), &error),
        })?;
        self.served.insert(device);
        Ok(())
    }

    fn config(&self, device: Device, tunnel: Tunnel) -> Result<InterfaceConfig> {
        let key = self.private(tunnel.key)?;
        let listen = tunnel
            .local
            .ok_or_else(|| KernelError::Other(format!("{device} has no address to listen on")))?;
        let address = self.addresses.get(&device).copied();
        Ok(InterfaceConfig {
            key,
            listen: SocketAddr::new(listen, tunnel.port),
            address: address.ok_or_else(|| KernelError::Other(format!("{device} has no address inside")))?,
            vxlan_port: SEALED_VXLAN_PORT,
        })
    }

    fn private(&self, key: TunnelKey) -> Result<PrivateKey> {
        let found = self.keys.get(&key).cloned();
        found.ok_or_else(|| KernelError::Other(format!("the private half of the key {key} is not at hand")))
    }

    /// The VXLAN device of a switched network inside the kernel's tunnel is about to be made.
    pub(super) fn guard(&mut self, device: Device, vni: u32) -> Result<()> {
        self.in_kernel.guard(device, vni)
    }

    /// Whether it is about sources of frames that nftables looks at: [`Self::change_sources`] does many at once.
    pub(super) fn is_source(&self, op: &Op) -> bool {
        matches!(op, Op::Source(op) if !self.served.contains(&op.device()))
    }

    /// All of them or none.
    pub(super) fn change_sources(&mut self, ops: &[Op]) -> Result<()> {
        self.in_kernel.change_sources(ops)
    }

    /// For a teardown: what no device takes with it.
    pub(super) fn remove(&mut self) -> Result<()> {
        self.in_kernel.sources()?.remove()
    }

    /// A device is about to be deleted: the engine ends it, if it is one of its own.
    pub(super) fn delete(&mut self, device: Device) {
        if let Err(error) = self.in_kernel.release(device) {
            // They let through what no device takes any more; the next start sees to it.
            tracing::warn!(%error, %device, "sources of a network that is gone are left over");
        }
        if self.served.remove(&device) {
            match device.role() {
                Some(Role::Tunnel(_)) => self.engine.delete_interface(device.as_str()),
                _ => self.engine.delete_tap(device.as_str()),
            }
        }
    }

    /// Does an operation that [`Self::takes`] says is ours.
    pub(super) fn apply(&mut self, op: &Op) -> Result<()> {
        let Some(device) = op.device() else { return Ok(()) };
        if self.served.contains(&device) {
            self.by_engine(device, op).map_err(|error| match error {
                Refused::Io(error) => KernelError::io(op.to_string(), &error),
                Refused::Known(error) => error,
            })
        } else {
            self.by_kernel(op)
        }
    }

    fn by_engine(&self, device: Device, op: &Op) -> Result<(), Refused> {
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
            Op::Source(SourceOp::Set(_, mac, Source { from, addresses })) => {
                let addresses = addresses.iter().copied().collect();
                engine.set_source(name, mac.0, ovl_tunnel::FrameSource { from: inner(*from)?, addresses })?;
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
                self.in_kernel.wireguard()?.set(*device, &key.0, tunnel.port)
            }
            Op::Wireguard(WireguardOp::SetPeer(device, key, peer)) => {
                self.in_kernel.wireguard()?.set_peer(*device, *key, peer)
            }
            Op::Wireguard(WireguardOp::DeletePeer(device, key)) => {
                self.in_kernel.wireguard()?.delete_peer(*device, *key)
            }
            op => self.in_kernel.change_sources(std::slice::from_ref(op)),
        }
    }

    /// After a route was set or deleted: by which end a host is reached follows from the routes to the hosts'
    /// addresses.
    pub(super) fn routed(&self, op: &Op) -> Result<()> {
        match op {
            Op::Route(RouteOp::Set(IpNet::V6(to), hop)) if to.prefix_len() == 128 => {
                // The kernel's own devices need no more than the route.
                if let Some(device) = hop.device.filter(|at| is_end(*at) && self.served.contains(at)) {
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

    /// Adds to a dump what netlink does not tell: only of devices that are there.
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
            kernel.sources.extend(tap.sources.into_iter().map(|(mac, source)| {
                let addresses = source.addresses.into_iter().collect();
                ((device, Mac(mac)), Source { from: source.from.into(), addresses })
            }));
        }
        self.in_kernel.fill(kernel)
    }

    /// How each end does that is there.
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
                    })
                    .collect(),
                drops: Vec::new(),
            })
            .collect();
        if let Some(first) = all.first_mut() {
            // The engine counts them for all its interfaces together.
            first.drops = vec![
                ("unauthenticated", drops.unauthenticated),
                ("spoofed", drops.spoofed),
                ("no_peer", drops.no_peer),
                ("full", drops.full),
            ];
        }
        for device in ends_in_kernel(kernel) {
            let peers = self.in_kernel.status(device)?;
            all.push(TunnelStatus { device, peers, drops: Vec::new() });
        }
        if let Some(first) = all.first_mut().filter(|first| first.drops.is_empty()) {
            first.drops = self.in_kernel.drops()?;
        }
        Ok(all)
    }
}

fn is_end(device: Device) -> bool {
    matches!(device.role(), Some(Role::Tunnel(_)))
}

fn ends_in_kernel(kernel: &Dataplane) -> Vec<Device> {
    let links = kernel.links.iter();
    links
        .filter(|(_, link)| matches!(link, Link::Tunnel { kind: TunnelKind::Kernel, .. }))
        .map(|(device, _)| *device)
        .collect()
}

/// Why the engine did not do something.
enum Refused {
    Io(io::Error),
    Known(KernelError),
}

impl From<io::Error> for Refused {
    fn from(error: io::Error) -> Self {
        Self::Io(error)
    }
}

impl From<KernelError> for Refused {
    fn from(error: KernelError) -> Self {
        Self::Known(error)
    }
}

/// Hosts have IPv6 addresses in the tunnel.
fn inner(address: IpAddr) -> Result<Ipv6Addr, KernelError> {
    match address {
        IpAddr::V6(address) => Ok(address),
        IpAddr::V4(address) => Err(KernelError::Other(format!("{address} is no address in the tunnel"))),
    }
}

/// Whether this kernel makes WireGuard devices.
pub(super) fn kernel_has_wireguard() -> bool {
    match Wireguard::open().and_then(|mut wireguard| wireguard.is_there()) {
        Ok(is_there) => is_there,
        Err(error) => {
            tracing::warn!(%error, "the kernel does not say whether it has WireGuard");
            false
        }
    }
}

/// The kernel's WireGuard devices, and nftables for what may come out of them. Their sockets are opened with the
/// first use: most hosts need neither.
#[derive(Debug, Default)]
struct InKernel {
    wireguard: Option<Wireguard>,
    sources: Option<Sources>,
    /// Switched networks whose frames come through the kernel's tunnel.
    vnis: BTreeMap<Device, u32>,
}

impl InKernel {
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

    /// A network's device is about to be made: what is not known to be honest is refused from the first frame.
    fn guard(&mut self, device: Device, vni: u32) -> Result<()> {
        self.vnis.insert(device, vni);
        self.sources()?.ensure()
    }

    /// A network's device is gone, and what was known of its sources with it.
    fn release(&mut self, device: Device) -> Result<()> {
        if self.vnis.remove(&device).is_none() {
            return Ok(());
        }
        let left: BTreeSet<u32> = self.vnis.values().copied().collect();
        let sources = self.sources()?;
        if left.is_empty() { sources.remove() } else { sources.retain(&left) }
    }

    /// One transaction for all of them.
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
                // It went with its device.
                (None, None) => {}
                (None, Some(_)) => return Err(KernelError::NoDevice(*device)),
            }
        }
        self.sources()?.apply(&changes)
    }

    fn fill(&mut self, kernel: &mut Dataplane) -> Result<()> {
        for device in ends_in_kernel(kernel) {
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
            // What another run left of networks that are gone.
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
