//! Configures WireGuard devices of the kernel by generic netlink: keys, ports and peers. The devices themselves are
//! ordinary links, see [`super::message::new_link`].
//!
//! This module encodes the messages itself (`linux/wireguard.h`): those of `netlink-packet-wireguard` show the private
//! key in their `Debug`, and their parser rejects a whole dump for one unknown attribute, and panics at an empty one.
//! The tests use that crate for the side of the kernel.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv6Addr, SocketAddr, SocketAddrV6};
use std::time::{Duration, SystemTime};

use ipnet::IpNet;
use netlink_sys::protocols::NETLINK_GENERIC;
use nix::libc::{self, AF_INET, AF_INET6, EADDRINUSE, ENODEV, ENOENT, EOPNOTSUPP};
use ovl_dataplane::device::Device;
use ovl_dataplane::state::{Tunnel, TunnelPeer};
use ovl_proto::id::TunnelKey;

use super::attribute::{Attributes, attributes, ip, u8_at, u16_at, u16_be, u32_at};
use super::error::{KernelError, Result};
use super::socket::{Batch, Dump, Netlink, Refusal};

/// The length of `genlmsghdr`.
const GENERIC: usize = 4;
const GENL_ID_CTRL: u16 = libc::GENL_ID_CTRL as u16;
const CTRL_CMD_GETFAMILY: u8 = libc::CTRL_CMD_GETFAMILY as u8;
const CTRL_ATTR_FAMILY_ID: u16 = libc::CTRL_ATTR_FAMILY_ID as u16;
const CTRL_ATTR_FAMILY_NAME: u16 = libc::CTRL_ATTR_FAMILY_NAME as u16;

const FAMILY: &str = "wireguard";
const GET_DEVICE: u8 = 0;
const SET_DEVICE: u8 = 1;

const DEVICE_NAME: u16 = 2;
const DEVICE_PRIVATE_KEY: u16 = 3;
const DEVICE_PUBLIC_KEY: u16 = 4;
const DEVICE_PORT: u16 = 6;
const DEVICE_MARK: u16 = 7;
const DEVICE_PEERS: u16 = 8;

const PEER_KEY: u16 = 1;
const PEER_PRESHARED_KEY: u16 = 2;
const PEER_FLAGS: u16 = 3;
const PEER_ENDPOINT: u16 = 4;
const PEER_KEEPALIVE: u16 = 5;
const PEER_HANDSHAKE: u16 = 6;
const PEER_RECEIVED: u16 = 7;
const PEER_SENT: u16 = 8;
const PEER_ALLOWED: u16 = 9;

const REMOVE: u32 = 1;
const REPLACE_ALLOWED: u32 = 2;
const UPDATE_ONLY: u32 = 4;

const ALLOWED_FAMILY: u16 = 1;
const ALLOWED_ADDRESS: u16 = 2;
const ALLOWED_LENGTH: u16 = 3;

/// The maximum number of allowed addresses in a message: each takes up to 44 bytes, and a list has at most 64 KiB.
const ALLOWED_AT_ONCE: usize = 512;

/// The persistent keepalive interval, in seconds. The kernel sends the first keepalive when the peer is set, which
/// starts the handshake. Without it there would be no session: the kernel starts one only on traffic, and a device of
/// a new key epoch gets no traffic before it has a session.
const KEEPALIVE: u16 = 25;

/// The key and endpoint that a dump shows for a device or peer with settings that ovl never makes. They differ from
/// every desired value, and the operation that corrects them also resets those settings.
const NO_KEY: TunnelKey = TunnelKey([0; 32]);
const NO_ENDPOINT: SocketAddr = SocketAddr::V6(SocketAddrV6::new(Ipv6Addr::UNSPECIFIED, 0, 0, 0));

/// The status of a WireGuard peer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct PeerStatus {
    /// The source of the last authenticated datagram; until then, the configured endpoint.
    pub(super) endpoint: Option<SocketAddr>,
    /// The time since the last handshake; `None` before the first.
    pub(super) last_handshake: Option<Duration>,
    /// The number of bytes received from it.
    pub(super) received: u64,
    /// The number of bytes sent to it.
    pub(super) sent: u64,
}

/// A socket for WireGuard devices. It keeps no state about them.
#[derive(Debug)]
pub(super) struct Wireguard {
    netlink: Netlink,
}

impl Wireguard {
    /// Opens a socket for devices in the network namespace of the calling thread.
    pub(super) fn open() -> Result<Self> {
        Netlink::open(NETLINK_GENERIC).map(Self::over)
    }

    /// Uses an open socket, see [`Netlink::over`].
    pub(super) fn over(netlink: Netlink) -> Self {
        Self { netlink }
    }

    /// Whether this kernel supports WireGuard devices. The request loads the module if it is installed, and has no
    /// other side effect.
    pub(super) fn is_there(&mut self) -> Result<bool> {
        Ok(self.family()?.is_some())
    }

    /// Sets the private key and the UDP port of a device. Its peers are kept.
    pub(super) fn set(&mut self, device: Device, key: &[u8; 32], port: u16) -> Result<()> {
        let mut batch = Batch::default();
        let family = self.known_family()?;
        let mut message = about(device, SET_DEVICE);
        message.put(DEVICE_PRIVATE_KEY, key);
        message.put(DEVICE_PORT, &port.to_ne_bytes());
        message.put(DEVICE_MARK, &0u32.to_ne_bytes());
        batch.push_built(family, 0, message.bytes());
        self.change(batch, device).map_err(|refusal| match refusal {
            KernelError::Refused { errno: EADDRINUSE, .. } => {
                KernelError::UdpPortInUse { port, purpose: "the tunnel", setting: "tunnel_port" }
            }
            other => other,
        })
    }

    /// Adds or changes a peer. Its allowed addresses are replaced, and removed from other peers. Its session is kept.
    ///
    /// More allowed addresses than fit a message are sent in several, between which the peer has a part of them.
    pub(super) fn set_peer(&mut self, device: Device, key: TunnelKey, peer: &TunnelPeer) -> Result<()> {
        let family = self.known_family()?;
        let allowed: Vec<IpNet> = peer.allowed.iter().copied().collect();
        let mut batch = Batch::default();
        let (first, more) = allowed.split_at(allowed.len().min(ALLOWED_AT_ONCE));
        let message = about_peer(device, key, REPLACE_ALLOWED, |attributes| {
            attributes.put(PEER_PRESHARED_KEY, &[0; 32]);
            attributes.put(PEER_KEEPALIVE, &KEEPALIVE.to_ne_bytes());
            put_endpoint(attributes, peer.endpoint);
            put_allowed(attributes, first);
        });
        batch.push_built(family, 0, message.bytes());
        for some in more.chunks(ALLOWED_AT_ONCE) {
            let message = about_peer(device, key, UPDATE_ONLY, |attributes| put_allowed(attributes, some));
            batch.push_built(family, 0, message.bytes());
        }
        self.change(batch, device)
    }

    /// Deletes a peer and its session. An absent peer or device is no error.
    pub(super) fn delete_peer(&mut self, device: Device, key: TunnelKey) -> Result<()> {
        let Some(family) = self.family()? else { return Ok(()) };
        let mut batch = Batch::default();
        batch.push_built(family, 0, about_peer(device, key, REMOVE, |_| {}).bytes());
        match self.change(batch, device) {
            Err(KernelError::NoDevice(_)) => Ok(()),
            result => result,
        }
    }

    /// Reads the configuration of a device and its peers. Settings that ovl never makes show as [`NO_KEY`] or
    /// [`NO_ENDPOINT`].
    pub(super) fn dump(&mut self, device: Device) -> Result<(Tunnel, BTreeMap<TunnelKey, TunnelPeer>)> {
        let read = self.read(device)?;
        let key = read.key.filter(|_| read.mark == 0).unwrap_or(NO_KEY);
        let peers = read.peers.into_iter().map(|(key, peer)| {
            let endpoint = peer.endpoint.filter(|_| !peer.is_foreign).unwrap_or(NO_ENDPOINT);
            (key, TunnelPeer { endpoint, allowed: peer.allowed })
        });
        Ok((Tunnel { key, port: read.port, local: None }, peers.collect()))
    }

    /// Reads the status of each peer.
    pub(super) fn status(&mut self, device: Device) -> Result<BTreeMap<TunnelKey, PeerStatus>> {
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        let peers = self.read(device)?.peers.into_iter().map(|(key, peer)| {
            let status = PeerStatus {
                endpoint: peer.endpoint,
                last_handshake: peer.handshake.map(|at| now.saturating_sub(at)),
                received: peer.received,
                sent: peer.sent,
            };
            (key, status)
        });
        Ok(peers.collect())
    }

    fn read(&mut self, device: Device) -> Result<DeviceDump> {
        let mut batch = Batch::default();
        let family = self.known_family()?;
        batch.push_built(family, 0, about(device, GET_DEVICE).bytes());
        let dump = self.netlink.dump(batch)?;
        dump.map(|dump| DeviceDump::of(&dump, family)).map_err(|refusal| explain(device, refusal))
    }

    /// Sends a batch of changes. Returns the first error.
    fn change(&mut self, batch: Batch, device: Device) -> Result<()> {
        let (results, _) = self.netlink.execute(batch)?;
        match results.into_iter().find_map(Result::err) {
            Some(refusal) => Err(explain(device, refusal)),
            None => Ok(()),
        }
    }

    fn known_family(&mut self) -> Result<u16> {
        self.family()?.ok_or(KernelError::NoWireguard)
    }

    /// The message type that the kernel has assigned to WireGuard. `None` if it has no WireGuard. It changes when the
    /// module is loaded again, so it is looked up each time.
    fn family(&mut self) -> Result<Option<u16>> {
        let mut message = Attributes::after(&[CTRL_CMD_GETFAMILY, 1, 0, 0]);
        message.put_text(CTRL_ATTR_FAMILY_NAME, FAMILY);
        let mut batch = Batch::default();
        batch.push_built(GENL_ID_CTRL, 0, message.bytes());
        let (mut results, answers) = self.netlink.execute(batch)?;
        match results.pop() {
            Some(Err(refusal)) if refusal.errno == ENOENT => Ok(None),
            Some(Err(refusal)) => Err(refusal.into_error("cannot look up the netlink family of WireGuard")),
            Some(Ok(())) | None => Ok(answers
                .iter()
                .flat_map(|answer| attributes(&answer.payload, GENERIC))
                .find(|(kind, _)| *kind == CTRL_ATTR_FAMILY_ID)
                .and_then(|(_, value)| u16_at(value, 0))),
        }
    }
}

fn explain(device: Device, refusal: Refusal) -> KernelError {
    match refusal.errno {
        ENODEV => KernelError::NoDevice(device),
        EOPNOTSUPP => KernelError::Other(format!(
            "{device} is not a WireGuard device: delete it (`ip link del {device}`); ovld then creates a new one"
        )),
        _ => refusal.into_error(format!("cannot configure the tunnel device {device}")),
    }
}

fn about(device: Device, command: u8) -> Attributes {
    let mut message = Attributes::after(&[command, 1, 0, 0]);
    message.put_text(DEVICE_NAME, device.as_str());
    message
}

fn about_peer(device: Device, key: TunnelKey, flags: u32, more: impl FnOnce(&mut Attributes)) -> Attributes {
    let mut message = about(device, SET_DEVICE);
    message.nest(DEVICE_PEERS, |peers| {
        peers.nest(0, |peer| {
            peer.put(PEER_KEY, &key.0);
            peer.put(PEER_FLAGS, &flags.to_ne_bytes());
            more(peer);
        });
    });
    message
}

/// Writes an endpoint as a `sockaddr_in` or `sockaddr_in6`.
fn put_endpoint(peer: &mut Attributes, endpoint: SocketAddr) {
    let mut bytes = Vec::with_capacity(28);
    let family = if endpoint.is_ipv4() { AF_INET } else { AF_INET6 };
    bytes.extend_from_slice(&(family as u16).to_ne_bytes());
    bytes.extend_from_slice(&endpoint.port().to_be_bytes());
    match endpoint {
        SocketAddr::V4(endpoint) => {
            bytes.extend_from_slice(&endpoint.ip().octets());
            bytes.extend_from_slice(&[0; 8]);
        }
        SocketAddr::V6(endpoint) => {
            bytes.extend_from_slice(&[0; 4]);
            bytes.extend_from_slice(&endpoint.ip().octets());
            bytes.extend_from_slice(&endpoint.scope_id().to_ne_bytes());
        }
    }
    peer.put(PEER_ENDPOINT, &bytes);
}

fn endpoint(bytes: &[u8]) -> Option<SocketAddr> {
    let port = u16_be(bytes.get(2..)?)?;
    match i32::from(u16_at(bytes, 0)?) {
        AF_INET => Some((ip(bytes.get(4..8)?)?, port).into()),
        AF_INET6 => {
            let address = <[u8; 16]>::try_from(bytes.get(8..24)?).ok()?;
            Some(SocketAddrV6::new(address.into(), port, 0, u32_at(bytes, 24)?).into())
        }
        _ => None,
    }
}

fn put_allowed(peer: &mut Attributes, allowed: &[IpNet]) {
    peer.nest(PEER_ALLOWED, |list| {
        for net in allowed {
            list.nest(0, |entry| {
                let (family, address) = match net.addr() {
                    IpAddr::V4(address) => (AF_INET, address.octets().to_vec()),
                    IpAddr::V6(address) => (AF_INET6, address.octets().to_vec()),
                };
                entry.put(ALLOWED_FAMILY, &(family as u16).to_ne_bytes());
                entry.put(ALLOWED_ADDRESS, &address);
                entry.put(ALLOWED_LENGTH, &[net.prefix_len()]);
            });
        }
    });
}

fn allowed(entry: &[u8]) -> Option<IpNet> {
    let find = |wanted| attributes(entry, 0).find(|(kind, _)| *kind == wanted).map(|(_, value)| value);
    IpNet::new(ip(find(ALLOWED_ADDRESS)?)?, u8_at(find(ALLOWED_LENGTH)?, 0)?).ok()
}

/// A device and its peers in a dump. The private key is not copied.
#[derive(Debug, Default)]
struct DeviceDump {
    key: Option<TunnelKey>,
    port: u16,
    mark: u32,
    peers: BTreeMap<TunnelKey, PeerDump>,
}

#[derive(Debug, Default)]
struct PeerDump {
    endpoint: Option<SocketAddr>,
    allowed: BTreeSet<IpNet>,
    /// The time of the last handshake since the Unix epoch.
    handshake: Option<Duration>,
    received: u64,
    sent: u64,
    /// Whether it has settings that ovl never makes: a preshared key, or another keepalive interval.
    is_foreign: bool,
}

impl DeviceDump {
    fn of(dump: &Dump, family: u16) -> Self {
        let mut read = Self::default();
        for message in dump.messages().filter(|message| message.kind == family) {
            for (kind, value) in attributes(message.payload, GENERIC) {
                match kind {
                    DEVICE_PUBLIC_KEY => read.key = value.try_into().ok().map(TunnelKey),
                    DEVICE_PORT => read.port = u16_at(value, 0).unwrap_or_default(),
                    DEVICE_MARK => read.mark = u32_at(value, 0).unwrap_or_default(),
                    DEVICE_PEERS => attributes(value, 0).for_each(|(_, peer)| read.peer(peer)),
                    _ => {}
                }
            }
        }
        read
    }

    /// Parses a peer. A peer that does not fit a message continues in the next one, with its key and more allowed
    /// addresses.
    fn peer(&mut self, bytes: &[u8]) {
        let key = attributes(bytes, 0).find(|(kind, _)| *kind == PEER_KEY);
        let Some(key) = key.and_then(|(_, value)| value.try_into().ok()) else { return };
        let peer = self.peers.entry(TunnelKey(key)).or_default();
        for (kind, value) in attributes(bytes, 0) {
            match kind {
                PEER_ENDPOINT => peer.endpoint = endpoint(value),
                PEER_PRESHARED_KEY => peer.is_foreign |= value.iter().any(|byte| *byte != 0),
                PEER_KEEPALIVE => peer.is_foreign |= u16_at(value, 0) != Some(KEEPALIVE),
                PEER_HANDSHAKE => peer.handshake = handshake(value),
                PEER_RECEIVED => peer.received = u64_of(value),
                PEER_SENT => peer.sent = u64_of(value),
                PEER_ALLOWED => {
                    peer.allowed.extend(attributes(value, 0).filter_map(|(_, entry)| allowed(entry)));
                }
                _ => {}
            }
        }
    }
}

/// Runs bytes through the parsers of this module.
#[cfg(any(test, fuzzing))]
pub(super) fn fuzz(bytes: &[u8]) {
    let mut device = DeviceDump::default();
    attributes(bytes, 0).for_each(|(_, peer)| device.peer(peer));
    let _ = (endpoint(bytes), allowed(bytes), handshake(bytes));
}

/// Parses a `__kernel_timespec`. `None` if it is zero: there was no handshake.
fn handshake(bytes: &[u8]) -> Option<Duration> {
    let (seconds, nanoseconds) = (u64_of(bytes), u64_of(bytes.get(8..)?));
    let at = Duration::new(seconds, u32::try_from(nanoseconds).ok()?.min(999_999_999));
    (!at.is_zero()).then_some(at)
}

fn u64_of(bytes: &[u8]) -> u64 {
    bytes.get(..8).and_then(|bytes| bytes.try_into().ok()).map_or(0, u64::from_ne_bytes)
}
