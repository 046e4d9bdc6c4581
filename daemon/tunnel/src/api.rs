//! The configuration and the state of an engine.

use std::net::{IpAddr, Ipv6Addr, SocketAddr};
use std::time::Duration;

use ipnet::IpNet;
use ovl_udp::trial::Offload;
use zeroize::Zeroize as _;

/// An X25519 private key (RFC 7748). Its `Debug` output does not show it, and it is overwritten when it is dropped.
#[derive(Clone)]
pub struct PrivateKey(pub [u8; 32]);

impl Drop for PrivateKey {
    fn drop(&mut self) {
        self.0.zeroize();
    }
}

impl std::fmt::Debug for PrivateKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("PrivateKey(..)")
    }
}

/// An X25519 public key (RFC 7748).
pub type PublicKey = [u8; 32];

/// An Ethernet address.
pub type Mac = [u8; 6];

/// The configuration of a WireGuard interface.
#[derive(Debug, Clone)]
pub struct InterfaceConfig {
    /// The private key.
    pub key: PrivateKey,
    /// The address and port of the UDP socket.
    pub listen: SocketAddr,
    /// This host's address in the tunnel: the outer address of its VXLAN packets.
    pub address: Ipv6Addr,
    /// The UDP port of VXLAN packets in the tunnel.
    pub vxlan_port: u16,
}

/// The configuration of a peer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PeerConfig {
    /// The address and port to send to, until an authenticated datagram comes from elsewhere.
    pub endpoint: SocketAddr,
    /// The allowed IPs: the peer may send from them, and packets for them are sent to it. One of them is its tunnel address,
    /// whose first 48 bits are those of [`InterfaceConfig::address`].
    pub allowed: Vec<IpNet>,
}

/// The filter entry of a source MAC address on a switched network.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FrameSource {
    /// The tunnel addresses of the hosts that may send from the MAC address.
    pub from: Vec<Ipv6Addr>,
    /// The IP addresses that may be used with the MAC address.
    pub addresses: Vec<IpAddr>,
}

/// The state of a peer.
#[derive(Debug, Clone)]
pub struct PeerStatus {
    /// The public key.
    pub key: PublicKey,
    /// The configuration.
    pub config: PeerConfig,
    /// The address and port that datagrams are sent to: the source of the last authenticated one.
    pub endpoint: SocketAddr,
    /// The time since the last handshake. `None` before the first handshake and after the session's end.
    pub last_handshake: Option<Duration>,
    /// Bytes of IP packets sent to the peer.
    pub sent: u64,
    /// Bytes of IP packets received from the peer.
    pub received: u64,
    /// The number of its authenticated messages, handshakes and keepalives included.
    pub heard: u64,
    /// Whether datagrams that the kernel divides (`UDP_SEGMENT`) arrive at the peer. If they are damaged on the way, the engine
    /// sends it each datagram by itself.
    pub segments: Offload,
}

/// The numbers of dropped packets, by reason.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Drops {
    /// Datagrams that are not WireGuard messages, or that fail authentication.
    pub unauthenticated: u64,
    /// Packets from an address that is not allowed to the peer, and frames whose source the host may not use.
    pub spoofed: u64,
    /// Packets and frames to an address that no peer has.
    pub no_peer: u64,
    /// Packets that the socket or the device refused.
    pub full: u64,
}

/// The state of an engine.
#[derive(Debug, Clone, Default)]
pub struct EngineState {
    /// The interfaces, ordered by name.
    pub interfaces: Vec<InterfaceState>,
    /// The switched networks, ordered by the names of their devices.
    pub taps: Vec<TapState>,
    /// The numbers of dropped packets since the engine was created.
    pub drops: Drops,
}

/// The state of an interface.
#[derive(Debug, Clone)]
pub struct InterfaceState {
    /// The name of the TUN device.
    pub name: String,
    /// The public key.
    pub public_key: PublicKey,
    /// The address and port of the UDP socket.
    pub listen: SocketAddr,
    /// The peers, ordered by public key.
    pub peers: Vec<PeerStatus>,
}

/// The state of a switched network.
#[derive(Debug, Clone)]
pub struct TapState {
    /// The name of the TAP device.
    pub name: String,
    /// The VXLAN network identifier.
    pub vni: u32,
    /// The host behind which each MAC address is.
    pub remotes: Vec<(Mac, Ipv6Addr)>,
    /// The hosts that get broadcast frames, and multicast frames for MAC addresses that are not in [`Self::groups`].
    pub floods: Vec<Ipv6Addr>,
    /// Each host that gets frames for the MAC address of a multicast group, with that address.
    pub groups: Vec<(Mac, Ipv6Addr)>,
    /// The filter entries of source MAC addresses.
    pub sources: Vec<(Mac, FrameSource)>,
}

/// Computes the public key of a private key.
pub fn public_key(key: &PrivateKey) -> PublicKey {
    use boringtun::x25519::{PublicKey, StaticSecret};
    PublicKey::from(&StaticSecret::from(key.0)).to_bytes()
}
