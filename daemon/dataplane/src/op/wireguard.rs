//! WireGuard interfaces and their peers.

use std::fmt;

use ipnet::IpNet;
use ovl_proto::id::TunnelKey;

use crate::device::Device;
use crate::state::{Dataplane, Tunnel, TunnelPeer};

/// A change of a WireGuard interface, beside its link.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum WireguardOp {
    /// Gives an interface its key and port.
    SetInterface(Device, Tunnel),
    /// Adds or changes a peer.
    SetPeer(Device, TunnelKey, TunnelPeer),
    /// Deletes a peer: its sessions end at once.
    DeletePeer(Device, TunnelKey),
}

impl WireguardOp {
    /// The interface.
    pub fn device(&self) -> Device {
        match self {
            Self::SetInterface(device, _) | Self::SetPeer(device, _, _) | Self::DeletePeer(device, _) => {
                *device
            }
        }
    }

    /// Does to `state` what the kernel does.
    pub fn apply_to(&self, state: &mut Dataplane) {
        match self {
            Self::SetInterface(device, tunnel) => {
                state.tunnels.insert(*device, *tunnel);
            }
            Self::SetPeer(device, key, peer) => {
                state.tunnel_peers.insert((*device, *key), peer.clone());
            }
            Self::DeletePeer(device, key) => {
                state.tunnel_peers.remove(&(*device, *key));
            }
        }
    }
}

impl fmt::Display for WireguardOp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::SetInterface(device, Tunnel { key, port, .. }) => {
                write!(f, "wg set {device} listen-port {port} private-key FILE # of {key}")
            }
            Self::SetPeer(device, key, TunnelPeer { endpoint, allowed }) => {
                let allowed: Vec<String> = allowed.iter().map(IpNet::to_string).collect();
                let allowed = allowed.join(",");
                write!(f, "wg set {device} peer {key} endpoint {endpoint} allowed-ips {allowed}")
            }
            Self::DeletePeer(device, key) => write!(f, "wg set {device} peer {key} remove"),
        }
    }
}
