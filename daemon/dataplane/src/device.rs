//! Names of our kernel devices. Whatever is named so and carries our alias is ours, and nothing
//! else is ever changed or removed.

use std::fmt;

use ovl_proto::id::{EndpointId, NetworkId};

/// The longest name that the kernel takes (IFNAMSIZ less the zero byte).
const MAX: usize = 15;

/// How the name of a network's second VXLAN device ends.
const SEALED: &str = "-s";

/// What the alias (`ip link show`) of each of our devices begins with.
pub const ALIAS: &str = "ovl ";

/// A device's name, without an allocation: tables hold thousands.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Device {
    bytes: [u8; MAX],
    length: u8,
}

/// What a device of ovl is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// `ovb-` and the network's id.
    Bridge(NetworkId),
    /// `ovx-` and the network's id; `-s` after it for the one in the tunnel of a network that has both.
    Vxlan(NetworkId),
    /// `ove-` and the endpoint's id: the host's end of the pair.
    Endpoint(EndpointId),
    /// `ovt-` and 0 or 1: an end of the tunnel. There is a second one while keys are being rotated.
    Tunnel(u8),
}

impl Device {
    /// Nothing if the name is empty or too long for the kernel.
    pub fn new(name: &str) -> Option<Self> {
        let mut bytes = [0; MAX];
        bytes.get_mut(..name.len())?.copy_from_slice(name.as_bytes());
        (!name.is_empty()).then_some(Self { bytes, length: name.len() as u8 })
    }

    fn with_id(prefix: &str, id: &dyn fmt::Display) -> Self {
        let name = format!("{prefix}{id}");
        let mut bytes = [0; MAX];
        for (byte, c) in bytes.iter_mut().zip(name.bytes()) {
            *byte = c;
        }
        Self { bytes, length: name.len().min(MAX) as u8 }
    }

    /// The bridge of a network.
    pub fn bridge(network: NetworkId) -> Self {
        Self::with_id("ovb-", &network)
    }

    /// The VXLAN device of a network.
    pub fn vxlan(network: NetworkId) -> Self {
        Self::with_id("ovx-", &network)
    }

    /// The second VXLAN device of a network that is encrypted only to some hosts: what it sends is in the tunnel.
    pub fn sealed_vxlan(network: NetworkId) -> Self {
        Self::with_id("ovx-", &format_args!("{network}{SEALED}"))
    }

    /// The host's end of an endpoint's pair.
    pub fn endpoint(endpoint: EndpointId) -> Self {
        Self::with_id("ove-", &endpoint)
    }

    /// An end of the tunnel: the first one, or the second one (`true`) of a rotation.
    pub fn tunnel(second: bool) -> Self {
        Self::with_id("ovt-", &u8::from(second))
    }

    /// What the name says that the device is for; nothing if it is not one of our names.
    pub fn role(&self) -> Option<Role> {
        let (prefix, id) = self.as_str().split_at_checked(4)?;
        match prefix {
            "ovb-" => id.parse().ok().map(Role::Bridge),
            "ovx-" => id.strip_suffix(SEALED).unwrap_or(id).parse().ok().map(Role::Vxlan),
            "ove-" => id.parse().ok().map(Role::Endpoint),
            "ovt-" => matches!(id, "0" | "1").then(|| Role::Tunnel(u8::from(id == "1"))),
            _ => None,
        }
    }

    /// As text.
    pub fn as_str(&self) -> &str {
        let bytes = self.bytes.get(..usize::from(self.length)).unwrap_or_default();
        std::str::from_utf8(bytes).unwrap_or_default()
    }
}

impl fmt::Display for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}

impl fmt::Debug for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_tell_what_a_device_is_for() {
        let network = NetworkId([1, 2, 3, 4, 5]);
        let endpoint = EndpointId([250; 5]);
        assert_eq!(Device::bridge(network).role(), Some(Role::Bridge(network)));
        assert_eq!(Device::vxlan(network).role(), Some(Role::Vxlan(network)));
        assert_eq!(Device::sealed_vxlan(network).role(), Some(Role::Vxlan(network)));
        assert_eq!(Device::sealed_vxlan(network).as_str(), format!("{}-s", Device::vxlan(network)));
        assert_eq!(Device::endpoint(endpoint).role(), Some(Role::Endpoint(endpoint)));
        assert_eq!(Device::endpoint(endpoint).as_str().len(), 12);
        assert_eq!(Device::tunnel(false).role(), Some(Role::Tunnel(0)));
        assert_eq!(Device::tunnel(true).role(), Some(Role::Tunnel(1)));
    }

    #[test]
    fn other_names_are_not_ours() {
        for name in ["eth0", "ovb-", "ovb-zzzzzzzz", "ovt-2", "ovt-00", "ovl0", "ovx--s", "ové-"] {
            assert_eq!(Device::new(name).and_then(|device| device.role()), None, "{name}");
        }
        assert_eq!(Device::new("a-name-too-long-"), None);
    }
}
