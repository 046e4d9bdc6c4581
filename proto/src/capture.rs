//! Packets that are captured for `ovlctl capture`: what is asked of a host, and what it says.

use std::net::IpAddr;

use serde::{Deserialize, Serialize};

/// The maximum number of instructions of a filter: what the kernel accepts (`BPF_MAXINSNS`).
pub const MAX_INSTRUCTIONS: usize = 4096;
/// The maximum number of bytes of a packet that are captured: the longest IP packet with an Ethernet header and a VLAN tag.
pub const MAX_SNAPLEN: u32 = 65_535 + 18;
/// The maximum length of a message about a capture, in bytes.
pub const MAX_MESSAGE: usize = 1 << 20;

/// An instruction of classic BPF (`struct sock_filter` of `linux/filter.h`): operation, jumps if true and false, operand.
pub type Instruction = (u16, u8, u8, u32);

/// How the packets of a device begin.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum LinkType {
    /// With an Ethernet header.
    Ethernet,
    /// With an IP header, as on WireGuard interfaces.
    Ip,
}

/// The kind of a device at which packets are captured.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum PointKind {
    /// The host's interface of an endpoint. It carries what the endpoint sends and receives.
    Endpoint,
    /// The VXLAN device of a network: packets between hosts, before they are encapsulated and after.
    Vxlan,
    /// The tunnel: packets between hosts, before they are encrypted and after.
    Tunnel,
    /// The device of the host's own address.
    Underlay,
}

impl PointKind {
    /// Whether a filter of plain packets is used, as the packets of workloads are.
    pub fn is_plain(self) -> bool {
        matches!(self, Self::Endpoint | Self::Vxlan)
    }
}

/// A device at which a host captures.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CapturePoint {
    /// Its kind.
    pub kind: PointKind,
    /// The endpoint as NAMESPACE/NAME, or the network.
    pub name: String,
    /// The name of the device.
    pub device: String,
    /// How its packets begin.
    pub link: LinkType,
}

/// A filter for the devices of some kinds.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CaptureProgram {
    /// For which kinds of devices.
    pub kinds: Vec<PointKind>,
    /// For which packets.
    pub link: LinkType,
    /// The filter, which returns how many bytes of a packet are kept.
    pub code: Vec<Instruction>,
}

/// A packet.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CapturedPacket {
    /// The number of the point in the list of the host.
    pub point: u16,
    /// The time, in nanoseconds since 1970, by the clock of the host.
    pub at_ns: u64,
    /// Whether the device sent it.
    pub outgoing: bool,
    /// The length of the whole packet.
    pub length: u32,
    /// The bytes that were kept.
    #[serde(with = "base64")]
    pub bytes: Vec<u8>,
}

/// A packet that was dropped.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CapturedDrop {
    /// The time, in nanoseconds since 1970, by the clock of the host.
    pub at_ns: u64,
    /// Which packet it was.
    pub key: PacketKey,
    /// What dropped it, in a sentence.
    pub reason: String,
}

/// Recognizes a packet at several places of its way: what neither routers nor the translation of destinations change.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct PacketKey {
    /// The source.
    pub source: IpAddr,
    /// The IP protocol.
    pub protocol: u8,
    /// The identification of IPv4; 0 for IPv6.
    pub id: u16,
    /// The source port, or identifier of an echo request.
    pub port: u16,
    /// The sequence number of TCP, the sequence of an echo request, or the length of a UDP datagram.
    pub sequence: u32,
}

impl PacketKey {
    /// Returns the key of a packet with these headers. `id` is the identification of IPv4, 0 for IPv6.
    pub fn new(source: IpAddr, protocol: u8, id: u16, transport: &[u8]) -> Self {
        let short = |at: usize| match transport.get(at..at + 2) {
            Some(&[high, low]) => u16::from_be_bytes([high, low]),
            _ => 0,
        };
        let (port, sequence) = match protocol {
            // TCP.
            6 => (short(0), u32::from(short(4)) << 16 | u32::from(short(6))),
            // ICMP, also of IPv6: identifier and sequence.
            1 | 58 => (short(4), u32::from(short(6))),
            _ => (short(0), u32::from(short(4))),
        };
        Self { source, protocol, id, port, sequence }
    }
}

/// What a host captured since its last message.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct CaptureBatch {
    /// The points, in the first message.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub points: Vec<CapturePoint>,
    /// Packets, in the order of each point.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub packets: Vec<CapturedPacket>,
    /// Packets that were dropped.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub drops: Vec<CapturedDrop>,
    /// The number of packets that passed the filter and could not be kept, because there were too many.
    #[serde(default)]
    pub lost: u64,
    /// No packet that follows is earlier than this, in nanoseconds since 1970.
    pub until_ns: u64,
    /// What could not be captured, in sentences.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub notes: Vec<String>,
    /// Why the capture has ended, in the last message.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ended: Option<String>,
}

/// Packets in JSON.
mod base64 {
    use data_encoding::BASE64;
    use serde::{Deserialize as _, Deserializer, Serializer, de::Error as _};

    pub(super) fn serialize<S: Serializer>(bytes: &[u8], serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&BASE64.encode(bytes))
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<u8>, D::Error> {
        let text = std::borrow::Cow::<str>::deserialize(deserializer)?;
        BASE64.decode(text.as_bytes()).map_err(D::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn key_survives_translation_of_the_destination_and_routers() {
        let source = "10.1.0.1".parse().unwrap();
        let tcp = |port: u8, checksum: u8| {
            [4, 0, 0, port, 0, 0, 0, 9, 0, 0, 0, 0, 0x50, 2, 1, 1, checksum, 0, 0, 0]
        };
        assert_eq!(PacketKey::new(source, 6, 7, &tcp(80, 1)), PacketKey::new(source, 6, 7, &tcp(81, 2)));
        assert_ne!(PacketKey::new(source, 6, 7, &tcp(80, 1)), PacketKey::new(source, 6, 8, &tcp(80, 1)));
        let echo = |sequence: u8| [8, 0, 1, 2, 0, 5, 0, sequence];
        assert_ne!(PacketKey::new(source, 1, 7, &echo(1)), PacketKey::new(source, 1, 7, &echo(2)));
        assert_eq!(PacketKey::new(source, 1, 7, &[]).port, 0);
    }

    #[test]
    fn batch_reads_back() {
        let packet = CapturedPacket { point: 1, at_ns: 2, outgoing: true, length: 9, bytes: vec![0, 255, 7] };
        let batch = CaptureBatch { packets: vec![packet], until_ns: 5, ..CaptureBatch::default() };
        let text = serde_json::to_string(&batch).unwrap();
        assert_eq!(serde_json::from_str::<CaptureBatch>(&text).unwrap(), batch);
        assert!(serde_json::from_str::<CaptureBatch>(&text.replace("AP8H", "!!")).is_err());
    }
}
