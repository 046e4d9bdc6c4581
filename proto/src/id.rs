//! Ids and MAC addresses: fixed bytes on the wire, short text (RFC 4648 base32hex) for people.

use std::fmt;
use std::net::IpAddr;
use std::str::FromStr;

use data_encoding::{BASE32_DNSSEC as TEXT, BASE64};
use serde::de::Error as _;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// The error for a text that is not an id, MAC address or key.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("invalid {what} '{text}'")]
pub struct ParseIdError {
    what: &'static str,
    text: String,
}

macro_rules! id {
    ($(#[$doc:meta])* $name:ident, $len:literal, $what:literal) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
        pub struct $name(pub [u8; $len]);

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&TEXT.encode(&self.0))
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&TEXT.encode(&self.0))
            }
        }

        impl FromStr for $name {
            type Err = ParseIdError;

            fn from_str(text: &str) -> Result<Self, ParseIdError> {
                TEXT.decode(text.as_bytes())
                    .ok()
                    .and_then(|bytes| bytes.try_into().ok())
                    .map(Self)
                    .ok_or_else(|| ParseIdError { what: $what, text: text.to_owned() })
            }
        }

        text_or_bytes!($name, $len);
    };
}

/// Implements serde for a type: text in JSON, plain bytes on the wire.
macro_rules! text_or_bytes {
    ($name:ident, $len:literal) => {
        impl Serialize for $name {
            fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                if serializer.is_human_readable() {
                    serializer.collect_str(self)
                } else {
                    self.0.serialize(serializer)
                }
            }
        }

        impl<'de> Deserialize<'de> for $name {
            fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                if deserializer.is_human_readable() {
                    String::deserialize(deserializer)?.parse().map_err(D::Error::custom)
                } else {
                    <[u8; $len]>::deserialize(deserializer).map(Self)
                }
            }
        }
    };
}

id!(
    /// The id of a host: the first ten bytes of the SHA-256 of its Ed25519 public key, so that no host can sign as
    /// another one. It is short because every gossip digest repeats it.
    NodeId, 10, "node id"
);
id!(
    /// The id of a network, drawn at random by the host that creates it.
    NetworkId, 5, "network id"
);
id!(
    /// The id of an endpoint, drawn at random by its host and unique there.
    EndpointId, 5, "endpoint id"
);
id!(
    /// The public id of a cluster key, derived from the key by HKDF. It reveals nothing about the key.
    ClusterKeyId, 4, "cluster key id"
);

/// An Ethernet (MAC) address.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Mac(pub [u8; 6]);

impl Mac {
    /// Returns the MAC address of a network's gateway, the same on every host: locally administered, then the
    /// network's id.
    pub fn of_gateway(network: NetworkId) -> Self {
        let [a, b, c, d, e] = network.0;
        Self([0x0a, a, b, c, d, e])
    }

    /// Returns the MAC address of an encrypted switched network's device to other hosts. It is only ever a bridge port, so
    /// all hosts use the same address.
    pub fn of_vxlan(network: NetworkId) -> Self {
        let [a, b, c, d, e] = network.0;
        Self([0x0e, a, b, c, d, e])
    }

    /// Returns the MAC address to which packets for a multicast group are sent (RFC 1112, section 6.4; RFC 2464, section
    /// 7). Several groups have the same one.
    pub fn of_group(group: IpAddr) -> Self {
        match group {
            IpAddr::V4(group) => {
                let [_, b, c, d] = group.octets();
                Self([0x01, 0x00, 0x5e, b & 0x7f, c, d])
            }
            IpAddr::V6(group) => {
                let [.., a, b, c, d] = group.octets();
                Self([0x33, 0x33, a, b, c, d])
            }
        }
    }

    /// Whether an interface may have the address: false for group addresses and for the all-zero address.
    pub fn is_unicast(self) -> bool {
        self.0[0] & 1 == 0 && self.0 != [0; 6]
    }
}

impl fmt::Display for Mac {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

impl fmt::Debug for Mac {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for Mac {
    type Err = ParseIdError;

    fn from_str(text: &str) -> Result<Self, ParseIdError> {
        let error = || ParseIdError { what: "MAC address", text: text.to_owned() };
        let mut bytes = [0; 6];
        let mut parts = text.split(':');
        for byte in &mut bytes {
            let part = parts.next().filter(|p| p.len() == 2 && !p.starts_with('+')).ok_or_else(error)?;
            *byte = u8::from_str_radix(part, 16).map_err(|_| error())?;
        }
        if parts.next().is_some() {
            return Err(error());
        }
        Ok(Self(bytes))
    }
}

text_or_bytes!(Mac, 6);

/// The public half of a tunnel key pair (X25519, RFC 7748). Its text form is that of `wg`.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct TunnelKey(pub [u8; 32]);

impl fmt::Display for TunnelKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&BASE64.encode(&self.0))
    }
}

impl fmt::Debug for TunnelKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for TunnelKey {
    type Err = ParseIdError;

    fn from_str(text: &str) -> Result<Self, ParseIdError> {
        BASE64
            .decode(text.as_bytes())
            .ok()
            .and_then(|bytes| bytes.try_into().ok())
            .map(Self)
            .ok_or_else(|| ParseIdError { what: "WireGuard key", text: text.to_owned() })
    }
}

text_or_bytes!(TunnelKey, 32);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn id_round_trips_through_text() {
        let id = NodeId([0, 1, 2, 3, 4, 250, 251, 252, 253, 255]);
        assert_eq!(id.to_string().len(), 16);
        assert_eq!(id.to_string().parse(), Ok(id));
        assert_eq!(NetworkId([255; 5]).to_string(), "vvvvvvvv");
    }

    #[test]
    fn invalid_ids_are_rejected() {
        for text in ["", "abc", "aaaaaaaz", "aaaaaaaaa", "aaaa aaa"] {
            assert!(text.parse::<NetworkId>().is_err(), "{text}");
        }
        for text in ["", "02:00:00:00:00", "02:00:00:00:00:0g", "02:00:00:00:00:00:00", "+2:00:00:00:00:00"] {
            assert!(text.parse::<Mac>().is_err(), "{text}");
        }
    }

    #[test]
    fn mac_round_trips_through_text() {
        let mac = Mac([2, 0x4f, 0, 0xff, 9, 1]);
        assert_eq!(mac.to_string(), "02:4f:00:ff:09:01");
        assert_eq!(mac.to_string().parse(), Ok(mac));
    }
}
