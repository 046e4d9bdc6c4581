//! The kernel's WireGuard devices: keys, ports and peers, over generic netlink. The devices themselves
//! are links like others, see [`super::message::new_link`].
//!
//! The messages are few and written here (`linux/wireguard.h`): those of `netlink-packet-wireguard` show
//! the private key in their `Debug`, and their parser refuses a whole dump for one attribute that it
//! does not know, and panics at an empty one. The tests have it speak for the other side.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv6Addr, SocketAddr, SocketAddrV6};
use std::time::{Duration, SystemTime};

use ipnet::IpNet;
use netlink_sys::protocols::NETLINK_GENERIC;
use nix::libc::{AF_INET, AF_INET6, EADDRINUSE, ENODEV, ENOENT, EOPNOTSUPP};
use ovl_dataplane::device::Device;
use ovl_dataplane::state::{Tunnel, TunnelPeer};
use ovl_proto::id::TunnelKey;

use super::attribute::{Attributes, attributes, ip, u8_at, u16_at, u16_be, u32_at};
use super::error::{KernelError, Result};
use super::socket::{Batch, Dump, Netlink, Refusal};

/// The length of a generic message's own header.
const GENERIC: usize = 4;
const GENL_ID_CTRL: u16 = 0x10;
const CTRL_CMD_GETFAMILY: u8 = 3;
const CTRL_ATTR_FAMILY_ID: u16 = 1;
const CTRL_ATTR_FAMILY_NAME: u16 = 2;

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

/// So many allowed addresses go into one message; each takes up to 44 bytes, and a list of them at most
/// 64 KiB.
const ALLOWED_AT_ONCE: usize = 512;

/// Seconds after which a session without traffic is kept up. With the first one, which is sent when the peer is
/// set, the kernel makes the session: it would not without traffic, and a new end gets none before it has one.
const KEEPALIVE: u16 = 25;

/// What stands in a dump for a key, or an endpoint, that goes with settings which ovl never makes: it is
/// different from all that is wanted, and what is set in its place undoes them.
const NO_KEY: TunnelKey = TunnelKey([0; 32]);
const NO_ENDPOINT: SocketAddr = SocketAddr::V6(SocketAddrV6::new(Ipv6Addr::UNSPECIFIED, 0, 0, 0));

/// How it goes with a peer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct PeerStatus {
    /// Where the last authenticated datagram came from; until then, as it was set.
    pub(super) endpoint: Option<SocketAddr>,
    /// Since the last handshake; none before the first.
    pub(super) last_handshake: Option<Duration>,
    /// Bytes.
    pub(super) received: u64,
    /// Bytes.
    pub(super) sent: u64,
}

/// A socket for WireGuard devices. Keeps no state: the kernel is asked each time.
#[derive(Debug)]
pub(super) struct Wireguard {
    netlink: Netlink,
}

impl Wireguard {
    /// For devices in the network namespace of the calling thread.
    pub(super) fn open() -> Result<Self> {
        Netlink::open(NETLINK_GENERIC).map(Self::over)
    }

    /// See [`Netlink::over`].
    pub(super) fn over(netlink: Netlink) -> Self {
        Self { netlink }
    }

    /// Whether this kernel can make WireGuard devices. The question loads the module where there is
    /// one, and leaves nothing else behind.
    pub(super) fn is_there(&mut self) -> Result<bool> {
        Ok(self.family()?.is_some())
    }

    /// Gives a device its private key and its UDP port; peers stay.
    pub(super) fn set(&mut self, device: Device, key: &[u8; 32], port: u16) -> Result<()> {
        let mut batch = Batch::default();
        let family = self.known_family()?;
        let mut message = about(device, SET_DEVICE);
        message.put(DEVICE_PRIVATE_KEY, key);
        message.put(DEVICE_PORT, &port.to_ne_bytes());
        message.put(DEVICE_MARK, &0u32.to_ne_bytes());
        batch.push_built(family, 0, message.bytes());
        self.change(batch, device).map_err(|refusal| match refusal {
            KernelError::Refused { errno: EADDRINUSE, .. } => KernelError::Other(format!(
                "UDP port {port}, which the tunnel needs, is in use by another program (`ss -ulnp sport = :{port}` shows it)"
            )),
            other => other,
        })
    }

    /// Adds a peer, or changes it: its allowed addresses become these, and nobody else has them any
    /// more. Sessions that stand go on.
    ///
    /// More than fit one message take several, between which the peer has a part of them.
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

    /// Ends its sessions at once. One that is gone, or whose device is, is no error.
    pub(super) fn delete_peer(&mut self, device: Device, key: TunnelKey) -> Result<()> {
        let Some(family) = self.family()? else { return Ok(()) };
        let mut batch = Batch::default();
        batch.push_built(family, 0, about_peer(device, key, REMOVE, |_| {}).bytes());
        match self.change(batch, device) {
            Err(KernelError::NoDevice(_)) => Ok(()),
            result => result,
        }
    }

    /// What a device holds. Settings that ovl never makes show as a key, or an endpoint, of nobody.
    pub(super) fn dump(&mut self, device: Device) -> Result<(Tunnel, BTreeMap<TunnelKey, TunnelPeer>)> {
        let read = self.read(device)?;
        let key = read.key.filter(|_| read.mark == 0).unwrap_or(NO_KEY);
        let peers = read.peers.into_iter().map(|(key, peer)| {
            let endpoint = peer.endpoint.filter(|_| !peer.is_foreign).unwrap_or(NO_ENDPOINT);
            (key, TunnelPeer { endpoint, allowed: peer.allowed })
        });
        Ok((Tunnel { key, port: read.port, local: None }, peers.collect()))
    }

    /// How it goes with each peer.
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

    fn read(&mut self, device: Device) -> Result<Read> {
        let mut batch = Batch::default();
        let family = self.known_family()?;
        batch.push_built(family, 0, about(device, GET_DEVICE).bytes());
        let dump = self.netlink.dump(batch)?;
        dump.map(|dump| Read::of(&dump, family)).map_err(|refusal| explain(device, refusal))
    }

    /// Does what a batch asks for; the first refusal counts.
    fn change(&mut self, batch: Batch, device: Device) -> Result<()> {
        let (results, _) = self.netlink.execute(batch)?;
        match results.into_iter().find_map(Result::err) {
            Some(refusal) => Err(explain(device, refusal)),
            None => Ok(()),
        }
    }

    fn known_family(&mut self) -> Result<u16> {
        self.family()?.ok_or_else(no_wireguard)
    }

    /// The number that the kernel has given to WireGuard's messages. Another one when the module comes
    /// back, so it is asked for each time.
    fn family(&mut self) -> Result<Option<u16>> {
        let mut message = Attributes::after(&[CTRL_CMD_GETFAMILY, 1, 0, 0]);
        message.put_text(CTRL_ATTR_FAMILY_NAME, FAMILY);
        let mut batch = Batch::default();
        batch.push_built(GENL_ID_CTRL, 0, message.bytes());
        let (mut results, answers) = self.netlink.execute(batch)?;
        match results.pop() {
            Some(Err(refusal)) if refusal.errno == ENOENT => Ok(None),
            Some(Err(refusal)) => Err(refusal.into_error("cannot ask the kernel for WireGuard")),
            Some(Ok(())) | None => Ok(answers
                .iter()
                .flat_map(|answer| attributes(&answer.payload, GENERIC))
                .find(|(kind, _)| *kind == CTRL_ATTR_FAMILY_ID)
                .and_then(|(_, value)| u16_at(value, 0))),
        }
    }
}

/// For users whose kernel has none.
pub(super) fn no_wireguard() -> KernelError {
    KernelError::Other(
        "this kernel has no WireGuard: install its module `wireguard`, or set `tunnel = \"userspace\"`"
            .to_owned(),
    )
}

fn explain(device: Device, refusal: Refusal) -> KernelError {
    match refusal.errno {
        ENODEV => KernelError::NoDevice(device),
        EOPNOTSUPP => KernelError::Other(format!(
            "{device} is no WireGuard device of this kernel: delete it (`ip link del {device}`), and ovl makes it anew"
        )),
        _ => refusal.into_error(format!("cannot set up the tunnel {device}")),
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

/// As a `sockaddr_in` or `sockaddr_in6`.
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

/// A device and its peers, as a dump describes them. The private key is left where it is.
#[derive(Debug, Default)]
struct Read {
    key: Option<TunnelKey>,
    port: u16,
    mark: u32,
    peers: BTreeMap<TunnelKey, ReadPeer>,
}

#[derive(Debug, Default)]
struct ReadPeer {
    endpoint: Option<SocketAddr>,
    allowed: BTreeSet<IpNet>,
    /// Since 1970.
    handshake: Option<Duration>,
    received: u64,
    sent: u64,
    /// It has a preshared key, or another keepalive.
    is_foreign: bool,
}

impl Read {
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

    /// One that does not fit a message goes on in the next, with its key and more allowed addresses.
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

/// Of a `__kernel_timespec`; all zero before the first.
fn handshake(bytes: &[u8]) -> Option<Duration> {
    let (seconds, nanoseconds) = (u64_of(bytes), u64_of(bytes.get(8..)?));
    let at = Duration::new(seconds, u32::try_from(nanoseconds).ok()?.min(999_999_999));
    (!at.is_zero()).then_some(at)
}

fn u64_of(bytes: &[u8]) -> u64 {
    bytes.get(..8).and_then(|bytes| bytes.try_into().ok()).map_or(0, u64::from_ne_bytes)
}
