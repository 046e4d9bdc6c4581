//! UDP has no connections that end: what is remembered of its flows leads where it led, for as long as something is
//! sent. So when a port leads elsewhere, they are ended.

use std::collections::BTreeSet;
use std::fmt;
use std::net::IpAddr;

use crate::nft::{self, Contents, Data, Elements, Key, Set, Table, Type, Value};

/// The number of UDP.
const UDP: u8 = 17;

/// UDP at a port of a Service's or of this host: what leads elsewhere than it should is to end.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Flows {
    /// The address; none: any of this host's.
    pub address: Option<IpAddr>,
    /// The port there.
    pub port: u16,
    /// Where it leads now; of one family.
    pub keep: BTreeSet<(IpAddr, u16)>,
    /// Whether it is about IPv4.
    pub ipv4: bool,
    /// Whether no program of the host's own can have the port at any of its addresses: then what leads to the host
    /// itself is older than that.
    pub held: bool,
}

impl fmt::Display for Flows {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let family = if self.ipv4 { "ipv4" } else { "ipv6" };
        write!(f, "conntrack -D -f {family} -p udp")?;
        if !self.held {
            write!(f, " --dst-nat")?;
        }
        if let Some(address) = self.address {
            write!(f, " --orig-dst {address}")?;
        }
        write!(f, " --orig-port-dst {} # but for {} backends", self.port, self.keep.len())
    }
}

/// The flows that are to end with a change of the published ports' elements: they lead to an endpoint that has the
/// port no more, or to the host itself, from before the port was published.
pub fn ended(actual: &Elements, desired: &Elements, prune: bool) -> Vec<Flows> {
    let none = Contents::new();
    let translates = |set: &&Set| set.table == Table::Publish && matches!(set.shape.data, Data::Fields(_));
    let sets: BTreeSet<&Set> =
        actual.sets().chain(desired.sets()).map(|(set, _)| set).filter(translates).collect();
    let mut ended = Vec::new();
    for set in sets {
        let (held, wanted) = (actual.of(set).unwrap_or(&none), desired.of(set).unwrap_or(&none));
        let gone = held.keys().filter(|key| prune && !wanted.contains_key(*key)).map(|key| (key, None));
        let new = wanted.iter().filter(|(key, value)| held.get(*key) != Some(*value));
        let new = new.map(|(key, value)| (key, Some(value)));
        ended.extend(gone.chain(new).filter_map(|(key, value)| flows_of(set, key, value)));
    }
    ended
}

/// The flows of an element, if it is about UDP.
fn flows_of(set: &Set, key: &Key, value: Option<&Value>) -> Option<Flows> {
    let (address, rest) = match set.shape.key {
        [Type::Ipv4 | Type::Ipv6, ..] => key.first().split_at_checked(key.first().len().checked_sub(8)?)?,
        _ => (&[][..], key.first()),
    };
    let [UDP, _, _, _, at_port @ ..] = rest else { return None };
    let port = |bytes: &[u8]| Some(u16::from_be_bytes(bytes.get(..2)?.try_into().ok()?));
    let target = |value: &Value| {
        let Value::Data(bytes) = value else { return None };
        let (address, to) = bytes.split_at_checked(bytes.len().checked_sub(4)?)?;
        Some((nft::address(address)?, port(to)?))
    };
    Some(Flows {
        address: nft::address(address),
        port: port(at_port)?,
        keep: value.and_then(target).into_iter().collect(),
        ipv4: matches!(set.shape.data, Data::Fields([Type::Ipv4, ..])),
        held: true,
    })
}
