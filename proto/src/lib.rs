//! The types that ovl's binaries exchange, and the wire codec.
//!
//! | module | content |
//! | --- | --- |
//! | [`id`] | node, network and endpoint ids, MAC addresses |
//! | [`clock`] | the hybrid logical clock that orders cluster objects |
//! | [`record`] | the signed host record that travels in gossip |
//! | [`table`] | owner tables: what one host owns; one writer |
//! | [`object`] | cluster objects: networks and Kubernetes objects; many writers, the last write wins |
//! | [`resource`] | Kubernetes objects |
//! | [`publish`] | published ports |
//! | [`capture`] | captured packets |
//! | [`bandwidth`] | limits of an endpoint's traffic |
//! | [`alloc`] | the allocation map: members and address blocks, agreed on by a majority |
//! | [`sync`] | messages of the encrypted stream between two daemons |
//! | [`secret`] | values that are never printed |
//! | [`wire`] | the binary codec that all of the above share |

pub mod alloc;
pub mod bandwidth;
pub mod capture;
pub mod clock;
#[cfg(any(test, fuzzing))]
pub mod fuzz;
pub mod id;
pub mod object;
pub mod publish;
pub mod record;
pub mod resource;
pub mod secret;
pub mod sync;
pub mod table;
pub mod wire;

// For the macro `fields`.
#[doc(hidden)]
pub use serde;

/// The text that `--version` prints after a program's name: release, commit and features.
///
/// The features are the kinds of networks, then what workloads on them get, then who attaches workloads. Every
/// build has all of them.
pub const VERSION: &str = concat!(
    env!("CARGO_PKG_VERSION"),
    "\ncommit: ",
    env!("OVL_COMMIT"),
    "\nfeatures: switched, routed, bridge, encrypted, publish, dns, services, policy, sandbox, cni, docker"
);

/// The default port of gossip (UDP) and of streams (TCP). 7946 is Docker's.
pub const DEFAULT_PORT: u16 = 7940;
/// The VXLAN port that IANA assigned (RFC 7348).
pub const DEFAULT_VXLAN_PORT: u16 = 4789;
/// The default UDP port of the tunnel. During a key rotation the next port is in use too. 51820 is left to other
/// WireGuard interfaces of the host.
pub const DEFAULT_TUNNEL_PORT: u16 = 51940;
/// The UDP port of VXLAN inside the tunnel, the same on all hosts. It differs from the port outside, so that an
/// unencrypted packet never reaches an encrypted network.
pub const SEALED_VXLAN_PORT: u16 = 51942;
/// The default UDP port of relayed datagrams.
pub const DEFAULT_RELAY_PORT: u16 = 7942;
/// The EtherType of path probes, which hosts send each other through their VXLAN devices: local experimental EtherType 2
/// (IEEE 802, clause 9.2.4). No workload can send frames with it.
pub const PROBE_ETHERTYPE: u16 = 0x88b6;
/// The default path of the control socket.
pub const DEFAULT_SOCKET: &str = "/run/ovl/ovld.sock";
