//! What an engine is told, and what it tells.

use std::net::{IpAddr, Ipv6Addr, SocketAddr};
use std::time::Duration;

use ipnet::IpNet;

/// An X25519 private key (RFC 7748). Nothing shows it.
#[derive(Clone)]
pub struct PrivateKey(pub [u8; 32]);

impl std::fmt::Debug for PrivateKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("PrivateKey(..)")
    }
}

/// An X25519 public key.
pub type PublicKey = [u8; 32];

/// An Ethernet address.
pub type Mac = [u8; 6];

/// One end of a tunnel.
#[derive(Debug, Clone)]
pub struct InterfaceConfig {
    /// Its private key.
    pub key: PrivateKey,
    /// The address and port of its UDP socket.
    pub listen: SocketAddr,
    /// The own address inside of the tunnel: what VXLAN packets come from and go to.
    pub address: Ipv6Addr,
    /// The port of VXLAN packets inside of the tunnel.
    pub vxlan_port: u16,
}

/// The other end of a tunnel, as it is wanted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PeerConfig {
    /// Where it is, until an authenticated datagram comes from elsewhere.
    pub endpoint: SocketAddr,
    /// What it may send from, and what goes to it.
    pub allowed: Vec<IpNet>,
}

/// Who may use a MAC address as source on a switched network.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Source {
    /// The tunnel address of the host that it is on.
    pub from: Ipv6Addr,
    /// The addresses that go with it.
    pub addresses: Vec<IpAddr>,
}

/// The other end of a tunnel, as it is.
#[derive(Debug, Clone)]
pub struct PeerStatus {
    /// Its public key.
    pub key: PublicKey,
    /// As it was set.
    pub config: PeerConfig,
    /// Where the last authenticated datagram came from.
    pub endpoint: SocketAddr,
    /// Since the last handshake; none before the first, and where its session has ended.
    pub last_handshake: Option<Duration>,
    /// Bytes of IP packets sealed for it.
    pub sent: u64,
    /// Bytes of IP packets opened from it.
    pub received: u64,
}

/// What was dropped, by the reason.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Drops {
    /// Datagrams that are not WireGuard's, or that no key opens.
    pub unauthenticated: u64,
    /// Opened, and from an address that is not the sender's; or a frame whose source is not.
    pub spoofed: u64,
    /// To an address or a MAC address that nobody has.
    pub no_peer: u64,
    /// The socket or the device did not take it.
    pub full: u64,
}

/// Everything that an engine was told and holds.
#[derive(Debug, Clone, Default)]
pub struct State {
    /// Interfaces by name.
    pub interfaces: Vec<InterfaceState>,
    /// Switched networks by the names of their devices.
    pub taps: Vec<TapState>,
    /// See [`Drops`].
    pub drops: Drops,
}

/// One interface.
#[derive(Debug, Clone)]
pub struct InterfaceState {
    /// The TUN device.
    pub name: String,
    /// Of its private key.
    pub public_key: PublicKey,
    /// See [`InterfaceConfig::listen`].
    pub listen: SocketAddr,
    /// In order of their keys.
    pub peers: Vec<PeerStatus>,
}

/// One switched network.
#[derive(Debug, Clone)]
pub struct TapState {
    /// The TAP device.
    pub name: String,
    /// The VXLAN network identifier.
    pub vni: u32,
    /// Where each MAC address is.
    pub remotes: Vec<(Mac, Ipv6Addr)>,
    /// Who gets broadcast and multicast.
    pub floods: Vec<Ipv6Addr>,
    /// See [`Source`].
    pub sources: Vec<(Mac, Source)>,
}

/// The public key that belongs to a private one.
pub fn public_key(key: &PrivateKey) -> PublicKey {
    use boringtun::x25519::{PublicKey, StaticSecret};
    PublicKey::from(&StaticSecret::from(key.0)).to_bytes()
}
