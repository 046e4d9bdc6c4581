//! The bounded decoder of chitchat messages.
//!
//! The delta of a message is a series of blocks, and each may be a zstd frame of up to 64 KiB. chitchat bounds neither
//! their number nor the number of operations in them: a datagram of 108 bytes would cost 2 GiB. So messages are parsed
//! here, within bounds, and chitchat gets an encoding that has no compressed block.
//!
//! ```text
//! message: magic (2) | version (1) | type (1) | digest, if SYN or SYN-ACK | delta, if SYN-ACK or ACK | cluster, if SYN
//! digest:  number of hosts (2) | host, heartbeat (8), last deletion (8), version (8), for each host
//! host:    name (text) | generation (8) | address
//! delta:   block: 1 for zstd or 2 for plain | length (2) | data, repeated | 0
//! data:    operation: 0, host, last deletion (8), base (8) | 1, key (text), value (text), version (8), status (1)
//!                     | 2, version (8)
//! ```
//!
//! Integers are little-endian, and a text is its length (2) and its bytes.

use std::net::{IpAddr, SocketAddr};

use chitchat::{ChitchatMessage, Deserializable};
use ovl_proto::id::NodeId;

use super::decompress::decompress;

/// The maximum size of a delta in bytes, decompressed. chitchat keeps the compressed size below 64 KiB, and signed
/// records do not compress by more than a quarter.
pub(super) const MAX_DELTA: usize = 256 << 10;
/// The maximum number of blocks of a delta. A sender fills blocks of 16 KiB.
const MAX_BLOCKS: usize = 64;
/// The maximum number of hosts in a digest or delta: a digest of 64 KiB has fewer.
const MAX_HOSTS: usize = 2048;
/// The maximum number of operations for one host: a sender has one for each key.
const MAX_OPERATIONS: usize = 16;
/// The first bytes of a message: the magic number and the version.
const MAGIC: [u8; 3] = [0x53, 0xb0, 0];

/// Why a message is refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(super) enum DecodeError {
    /// It ends too early, or has an invalid field.
    #[error("malformed message: {0}")]
    Malformed(&'static str),
    /// It is larger than a correct sender's.
    #[error("message with too many {0}")]
    TooMany(&'static str),
}

/// A run of a host, as chitchat names it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) struct Incarnation {
    pub(super) node: NodeId,
    pub(super) generation: u64,
    pub(super) address: SocketAddr,
}

/// The type of a message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Syn = 0,
    SynAck = 1,
    Ack = 2,
}

/// What the sender knows of a host: heartbeat, version of the last deletion, version.
pub(super) type HostDigest = [u64; 3];

/// A message of chitchat.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Exchange {
    kind: Kind,
    cluster: Vec<u8>,
    pub(super) digest: Vec<(Incarnation, HostDigest)>,
    pub(super) delta: Vec<HostDelta>,
}

/// The news of a host.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct HostDelta {
    pub(super) host: Incarnation,
    /// The version of the last deletion, and the version on which the news builds.
    pub(super) base: [u64; 2],
    pub(super) operations: Vec<Operation>,
}

/// A change of a host's state.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Operation {
    Set { key: String, value: String, version: u64, status: u8 },
    Version(u64),
}

impl Exchange {
    /// Parses a message. It allocates at most [`MAX_DELTA`] for the delta, and a small multiple of the message.
    ///
    /// # Errors
    ///
    /// The message is malformed, exceeds a bound, or says that the sender is of another cluster.
    pub(super) fn decode(bytes: &[u8]) -> Result<Self, DecodeError> {
        let mut input = Input(bytes);
        if input.array()? != MAGIC {
            return Err(DecodeError::Malformed("magic number or version"));
        }
        let kind = match input.u8()? {
            0 => Kind::Syn,
            1 => Kind::SynAck,
            2 => Kind::Ack,
            _ => return Err(DecodeError::Malformed("type")),
        };
        let digest = if kind == Kind::Ack { Vec::new() } else { digest(&mut input)? };
        let delta = if kind == Kind::Syn { Vec::new() } else { delta(&inflate(&mut input)?)? };
        let cluster = if kind == Kind::Syn { input.counted()?.to_vec() } else { Vec::new() };
        if !input.0.is_empty() {
            return Err(DecodeError::Malformed("bytes left over"));
        }
        Ok(Self { kind, cluster, digest, delta })
    }

    /// Converts it to a message for chitchat.
    ///
    /// # Errors
    ///
    /// chitchat refuses it: a host occurs twice in the delta, or its versions do not grow.
    pub(super) fn into_message(self) -> Result<ChitchatMessage, DecodeError> {
        ChitchatMessage::deserialize(&mut self.encode()?.as_slice())
            .map_err(|_| DecodeError::Malformed("refused by chitchat"))
    }

    /// A SYN with a digest, for tests.
    #[cfg(test)]
    pub(super) fn syn(digest: Vec<(Incarnation, HostDigest)>) -> Self {
        Self { kind: Kind::Syn, cluster: b"ovl".to_vec(), digest, delta: Vec::new() }
    }

    pub(super) fn encode(&self) -> Result<Vec<u8>, DecodeError> {
        let mut out = MAGIC.to_vec();
        out.push(self.kind as u8);
        if self.kind != Kind::Ack {
            let count = u16::try_from(self.digest.len()).map_err(|_| DecodeError::TooMany("hosts"))?;
            out.extend_from_slice(&count.to_le_bytes());
            for (host, numbers) in &self.digest {
                put_host(&mut out, host);
                numbers.iter().for_each(|number| out.extend_from_slice(&number.to_le_bytes()));
            }
        }
        if self.kind != Kind::Syn {
            let mut plain = Vec::new();
            for HostDelta { host, base, operations } in &self.delta {
                plain.push(0);
                put_host(&mut plain, host);
                base.iter().for_each(|number| plain.extend_from_slice(&number.to_le_bytes()));
                for operation in operations {
                    put_operation(&mut plain, operation)?;
                }
            }
            for block in plain.chunks(usize::from(u16::MAX)) {
                out.push(2);
                put_counted(&mut out, block)?;
            }
            out.push(0);
        }
        if self.kind == Kind::Syn {
            put_counted(&mut out, &self.cluster)?;
        }
        Ok(out)
    }
}

/// Reads the digest.
fn digest(input: &mut Input<'_>) -> Result<Vec<(Incarnation, HostDigest)>, DecodeError> {
    let count = usize::from(input.u16()?);
    if count > MAX_HOSTS {
        return Err(DecodeError::TooMany("hosts"));
    }
    (0..count).map(|_| Ok((input.host()?, [input.u64()?, input.u64()?, input.u64()?]))).collect()
}

/// Reads the blocks of a delta, and returns the decompressed data.
fn inflate(input: &mut Input<'_>) -> Result<Vec<u8>, DecodeError> {
    let mut plain = Vec::new();
    for _ in 0..MAX_BLOCKS {
        let kind = input.u8()?;
        if kind == 0 {
            return Ok(plain);
        }
        let block = input.counted()?;
        let room = MAX_DELTA.saturating_sub(plain.len()).min(usize::from(u16::MAX));
        match kind {
            1 => {
                let more = decompress(block, room)
                    .map_err(|_| DecodeError::Malformed("compressed block, damaged or too large"))?;
                plain.extend_from_slice(&more);
            }
            2 if block.len() <= room => plain.extend_from_slice(block),
            2 => return Err(DecodeError::TooMany("bytes")),
            _ => return Err(DecodeError::Malformed("block type")),
        }
    }
    Err(DecodeError::TooMany("blocks"))
}

/// Parses the data of a delta.
fn delta(plain: &[u8]) -> Result<Vec<HostDelta>, DecodeError> {
    let mut input = Input(plain);
    let mut hosts: Vec<HostDelta> = Vec::new();
    while !input.0.is_empty() {
        let kind = input.u8()?;
        if kind == 0 {
            if hosts.len() >= MAX_HOSTS {
                return Err(DecodeError::TooMany("hosts"));
            }
            let (host, base) = (input.host()?, [input.u64()?, input.u64()?]);
            hosts.push(HostDelta { host, base, operations: Vec::new() });
            continue;
        }
        let operation = match kind {
            1 => Operation::Set {
                key: input.text()?.to_owned(),
                value: input.text()?.to_owned(),
                version: input.u64()?,
                status: input.u8()?,
            },
            2 => Operation::Version(input.u64()?),
            _ => return Err(DecodeError::Malformed("operation")),
        };
        let host = hosts.last_mut().ok_or(DecodeError::Malformed("operation without a host"))?;
        if host.operations.len() >= MAX_OPERATIONS {
            return Err(DecodeError::TooMany("operations"));
        }
        host.operations.push(operation);
    }
    Ok(hosts)
}

fn put_host(out: &mut Vec<u8>, host: &Incarnation) {
    let name = host.node.to_string();
    // The text of an id has 16 bytes.
    out.extend_from_slice(&(name.len() as u16).to_le_bytes());
    out.extend_from_slice(name.as_bytes());
    out.extend_from_slice(&host.generation.to_le_bytes());
    match host.address.ip() {
        IpAddr::V4(ip) => {
            out.push(4);
            out.extend_from_slice(&ip.octets());
        }
        IpAddr::V6(ip) => {
            out.push(6);
            out.extend_from_slice(&ip.octets());
        }
    }
    out.extend_from_slice(&host.address.port().to_le_bytes());
}

fn put_operation(out: &mut Vec<u8>, operation: &Operation) -> Result<(), DecodeError> {
    match operation {
        Operation::Set { key, value, version, status } => {
            out.push(1);
            put_counted(out, key.as_bytes())?;
            put_counted(out, value.as_bytes())?;
            out.extend_from_slice(&version.to_le_bytes());
            out.push(*status);
        }
        Operation::Version(version) => {
            out.push(2);
            out.extend_from_slice(&version.to_le_bytes());
        }
    }
    Ok(())
}

fn put_counted(out: &mut Vec<u8>, bytes: &[u8]) -> Result<(), DecodeError> {
    let length = u16::try_from(bytes.len()).map_err(|_| DecodeError::TooMany("bytes"))?;
    out.extend_from_slice(&length.to_le_bytes());
    out.extend_from_slice(bytes);
    Ok(())
}

/// The bytes that are not read yet.
struct Input<'a>(&'a [u8]);

impl<'a> Input<'a> {
    fn array<const N: usize>(&mut self) -> Result<[u8; N], DecodeError> {
        let (array, rest) = self.0.split_first_chunk().ok_or(DecodeError::Malformed("truncated"))?;
        self.0 = rest;
        Ok(*array)
    }

    fn u8(&mut self) -> Result<u8, DecodeError> {
        self.array().map(|[byte]| byte)
    }

    fn u16(&mut self) -> Result<u16, DecodeError> {
        self.array().map(u16::from_le_bytes)
    }

    fn u64(&mut self) -> Result<u64, DecodeError> {
        self.array().map(u64::from_le_bytes)
    }

    /// Reads a length, and as many bytes.
    fn counted(&mut self) -> Result<&'a [u8], DecodeError> {
        let length = usize::from(self.u16()?);
        let (bytes, rest) = self.0.split_at_checked(length).ok_or(DecodeError::Malformed("truncated"))?;
        self.0 = rest;
        Ok(bytes)
    }

    fn text(&mut self) -> Result<&'a str, DecodeError> {
        std::str::from_utf8(self.counted()?).map_err(|_| DecodeError::Malformed("text"))
    }

    fn host(&mut self) -> Result<Incarnation, DecodeError> {
        let node = self.text()?.parse().map_err(|_| DecodeError::Malformed("name of a host"))?;
        let generation = self.u64()?;
        let ip = match self.u8()? {
            4 => IpAddr::from(self.array::<4>()?),
            6 => IpAddr::from(self.array::<16>()?),
            _ => return Err(DecodeError::Malformed("address")),
        };
        Ok(Incarnation { node, generation, address: SocketAddr::new(ip, self.u16()?) })
    }
}

#[cfg(test)]
pub(super) mod tests {
    use proptest::prelude::*;

    use super::*;

    /// A message of 108 bytes, compressed, whose delta has this many blocks of 64 KiB of the same operation.
    pub(crate) fn bomb(blocks: usize) -> Vec<u8> {
        let operation = [[2; 1].as_slice(), &[2; 8]].concat();
        let plain: Vec<u8> = operation.iter().copied().cycle().take(9 * 7281).collect();
        let block = zstd::bulk::compress(&plain, 19).unwrap();
        let mut message = MAGIC.to_vec();
        message.push(2);
        let mut first = vec![0];
        let host = Incarnation { node: NodeId([1; 10]), generation: 1, address: ([10, 0, 0, 1], 1).into() };
        put_host(&mut first, &host);
        first.extend_from_slice(&[0; 16]);
        message.push(2);
        put_counted(&mut message, &first).unwrap();
        for _ in 0..blocks {
            message.push(1);
            put_counted(&mut message, &block).unwrap();
        }
        message.push(0);
        message
    }

    fn sample(kind: Kind) -> Exchange {
        let host = |last| Incarnation {
            node: NodeId([last; 10]),
            generation: 7,
            address: if last == 1 { ([10, 0, 0, 1], 7940).into() } else { "[fd00::2]:7940".parse().unwrap() },
        };
        let set =
            |version| Operation::Set { key: "r".to_owned(), value: "x".repeat(60_000), version, status: 0 };
        let news = |last, operations| HostDelta { host: host(last), base: [0, 3], operations };
        Exchange {
            kind,
            cluster: if kind == Kind::Syn { b"ovl".to_vec() } else { Vec::new() },
            digest: if kind == Kind::Ack {
                Vec::new()
            } else {
                vec![(host(1), [5, 0, 4]), (host(2), [1, 2, 3])]
            },
            delta: if kind == Kind::Syn {
                Vec::new()
            } else {
                vec![news(1, vec![set(4), set(5)]), news(2, vec![Operation::Version(9)])]
            },
        }
    }

    /// The encoding of the sample with a compressed delta, as chitchat makes it.
    fn compressed(kind: Kind) -> Vec<u8> {
        let bytes = sample(kind).encode().unwrap();
        if kind == Kind::Syn {
            return bytes;
        }
        let empty = Exchange { delta: Vec::new(), ..sample(kind) }.encode().unwrap();
        let start = empty.len() - 1;
        let mut out = bytes[..start].to_vec();
        let plain = inflate(&mut Input(&bytes[start..])).unwrap();
        for block in plain.chunks(16 << 10) {
            out.push(1);
            put_counted(&mut out, &zstd::bulk::compress(block, 0).unwrap()).unwrap();
        }
        out.push(0);
        out
    }

    #[test]
    fn messages_of_all_types_are_the_same_for_chitchat() {
        for kind in [Kind::Syn, Kind::SynAck, Kind::Ack] {
            let bytes = sample(kind).encode().unwrap();
            assert!(ChitchatMessage::deserialize(&mut bytes.as_slice()).is_ok());
            assert_eq!(Exchange::decode(&bytes).unwrap(), sample(kind));
            let compressed = compressed(kind);
            assert!(kind == Kind::Syn || compressed.len() < bytes.len());
            assert_eq!(Exchange::decode(&compressed).unwrap(), sample(kind));
            let direct = ChitchatMessage::deserialize(&mut compressed.as_slice()).unwrap();
            // The length that chitchat notes is that of the encoding, and differs.
            let debug = |message| {
                let text = format!("{message:?}");
                text.split("serialized_len").next().unwrap_or_default().to_owned()
            };
            assert_eq!(debug(sample(kind).into_message().unwrap()), debug(direct));
            for length in 0..compressed.len() {
                assert!(Exchange::decode(&compressed[..length]).is_err(), "{length}");
            }
        }
    }

    #[test]
    fn bomb_within_the_compressed_message_is_refused() {
        for blocks in [3, 5, 60, 3600] {
            let bomb = bomb(blocks);
            assert!(zstd::bulk::compress(&bomb, 19).unwrap().len() < 150, "it fits a datagram");
            assert!(Exchange::decode(&bomb).is_err(), "{blocks}");
        }
        let mut many = MAGIC.to_vec();
        many.push(2);
        many.extend([2, 0, 0].repeat(MAX_BLOCKS));
        assert_eq!(Exchange::decode(&many), Err(DecodeError::TooMany("blocks")));
    }

    #[test]
    #[ignore = "a measurement"]
    fn cost_of_the_largest_message() {
        let mut exchange = sample(Kind::Ack);
        let value = "x".repeat(600);
        exchange.delta = (0..MAX_DELTA / 700)
            .map(|number| HostDelta {
                host: Incarnation {
                    node: NodeId([0, 0, 0, 0, 0, 0, 0, 0, (number >> 8) as u8, number as u8]),
                    generation: 1,
                    address: ([10, 0, 0, 1], 7940).into(),
                },
                base: [0, 0],
                operations: vec![Operation::Set {
                    key: "r".to_owned(),
                    value: value.clone(),
                    version: 1,
                    status: 0,
                }],
            })
            .collect();
        let bytes = exchange.encode().unwrap();
        let start = std::time::Instant::now();
        for _ in 0..100 {
            Exchange::decode(&bytes).unwrap().into_message().unwrap();
        }
        println!("{} bytes: {:?}", bytes.len(), start.elapsed() / 100);
    }

    proptest! {
        #[test]
        fn garbage_never_panics(kind in 0_u8..4, bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
            let message = [&MAGIC[..], &[kind], &bytes].concat();
            if let Ok(exchange) = Exchange::decode(&message) {
                let _ = exchange.into_message();
            }
        }
    }
}
