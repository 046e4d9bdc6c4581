//! Protocols and ports.

use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// A transport protocol, as Kubernetes writes it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize)]
#[serde(rename_all = "UPPERCASE")]
pub enum Protocol {
    /// TCP.
    #[default]
    Tcp,
    /// UDP.
    Udp,
    /// SCTP.
    Sctp,
}

impl std::fmt::Display for Protocol {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Tcp => "TCP",
            Self::Udp => "UDP",
            Self::Sctp => "SCTP",
        })
    }
}

/// A port by number, or by a container's name for it.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub enum IntOrString {
    /// 1 to 65535.
    Int(u16),
    /// The name of a container port. Its number may differ between pods.
    String(String),
}

impl std::fmt::Display for IntOrString {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Int(port) => write!(f, "{port}"),
            Self::String(name) => f.write_str(name),
        }
    }
}

/// The form on the wire, which is not self-describing and so needs a tag.
#[derive(Serialize, Deserialize)]
#[serde(rename = "IntOrString")]
enum Tagged {
    Int(u16),
    String(String),
}

impl Serialize for IntOrString {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match (self, serializer.is_human_readable()) {
            (Self::Int(port), true) => serializer.serialize_u16(*port),
            (Self::String(name), true) => serializer.serialize_str(name),
            (Self::Int(port), false) => Tagged::Int(*port).serialize(serializer),
            (Self::String(name), false) => Tagged::String(name.clone()).serialize(serializer),
        }
    }
}

impl<'de> Deserialize<'de> for IntOrString {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        if deserializer.is_human_readable() {
            deserializer.deserialize_any(Visitor)
        } else {
            Ok(match Tagged::deserialize(deserializer)? {
                Tagged::Int(port) => Self::Int(port),
                Tagged::String(name) => Self::String(name),
            })
        }
    }
}

struct Visitor;

impl serde::de::Visitor<'_> for Visitor {
    type Value = IntOrString;

    fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("a port number or a port name")
    }

    fn visit_u64<E: serde::de::Error>(self, number: u64) -> Result<IntOrString, E> {
        u16::try_from(number)
            .map(IntOrString::Int)
            .map_err(|_| E::invalid_value(serde::de::Unexpected::Unsigned(number), &self))
    }

    fn visit_str<E: serde::de::Error>(self, name: &str) -> Result<IntOrString, E> {
        Ok(IntOrString::String(name.to_owned()))
    }
}
