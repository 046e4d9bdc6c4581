//! What ovl's binaries say to each other and to the person at the terminal.
//!
//! | module | what is in it |
//! | --- | --- |
//! | [`id`] | node, network and endpoint ids, MAC addresses |
//! | [`clock`] | the hybrid logical clock that orders cluster objects |
//! | [`record`] | the signed node record that travels in gossip |
//! | [`table`] | owner tables: what one node owns, with one writer |
//! | [`object`] | cluster objects: networks and what manifests say; many writers, the last one wins |
//! | [`resource`] | Kubernetes' objects |
//! | [`publish`] | published ports |
//! | [`alloc`] | the map of members and address blocks that a majority agrees on |
//! | [`sync`] | messages of the encrypted stream between two daemons |
//! | [`secret`] | what does not print |
//! | [`wire`] | the binary codec all of the above share |

pub mod alloc;
pub mod clock;
pub mod id;
pub mod object;
pub mod publish;
pub mod record;
pub mod resource;
pub mod secret;
pub mod sync;
pub mod table;
pub mod wire;

/// What `--version` prints behind a program's name: the release, the commit that it was built from, and what
/// this release can do: kinds of networks, then what workloads on them get, then who attaches them. All of it is in every build.
pub const VERSION: &str = concat!(
    env!("CARGO_PKG_VERSION"),
    "\ncommit: ",
    env!("OVL_COMMIT"),
    "\nfeatures: switched, routed, bridge, encrypted, publish, dns, services, policy, sandbox, cni, docker"
);

/// The port of gossip (UDP) and of the sync streams (TCP). 7946 is Docker's.
pub const DEFAULT_PORT: u16 = 7940;
/// The VXLAN port that IANA assigned (RFC 7348).
pub const DEFAULT_VXLAN_PORT: u16 = 4789;
/// The tunnel's UDP port, and with the next one the second port that it has while keys are rotated; 51820 is what
/// people give to a WireGuard of their own.
pub const DEFAULT_TUNNEL_PORT: u16 = 51940;
/// The UDP port of VXLAN inside the tunnel, the same on all hosts: another one than outside, so that what
/// comes in plain can never meet an encrypted network.
pub const SEALED_VXLAN_PORT: u16 = 51942;
/// Where `ovlctl` finds the daemon unless told otherwise.
pub const DEFAULT_SOCKET: &str = "/run/ovl/ovld.sock";
