//! Published ports: ports of a host that lead to ports of an endpoint on it.

use std::fmt;
use std::net::{IpAddr, Ipv6Addr};
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// A transport protocol of published ports.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Transport {
    /// TCP.
    #[default]
    Tcp,
    /// UDP.
    Udp,
    /// SCTP.
    Sctp,
}

impl Transport {
    /// Returns the protocol number of the IP header (IANA, "Protocol Numbers").
    pub fn number(self) -> u8 {
        match self {
            Self::Tcp => 6,
            Self::Udp => 17,
            Self::Sctp => 132,
        }
    }
}

impl fmt::Display for Transport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Tcp => "tcp",
            Self::Udp => "udp",
            Self::Sctp => "sctp",
        })
    }
}

/// A port, or a range of consecutive ports.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Ports {
    /// The first port, not 0.
    pub first: u16,
    /// The last port, not less than the first.
    pub last: u16,
}

impl Ports {
    /// Creates a range of one port.
    pub fn one(port: u16) -> Self {
        Self { first: port, last: port }
    }

    /// Returns the number of ports; 0 if the last is less than the first.
    pub fn count(self) -> u16 {
        self.last.checked_sub(self.first).map_or(0, |more| more.saturating_add(1))
    }
}

impl fmt::Display for Ports {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.first)?;
        if self.last == self.first { Ok(()) } else { write!(f, "-{}", self.last) }
    }
}

/// A request to publish ports, as `--publish` takes it: `[ADDR:][HOST[-END]:]CONTAINER[-END][/tcp|udp|sctp]`, with an
/// IPv6 address in brackets.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Publish {
    /// The address of the host. The unspecified address: all addresses of its family. `None`: all addresses.
    #[serde(default)]
    pub address: Option<IpAddr>,
    /// The ports of the host: as many as the endpoint's, or a range from which one is chosen for a single port of the
    /// endpoint. `None`: any free port.
    #[serde(default)]
    pub host: Option<Ports>,
    /// The ports of the endpoint.
    pub container: Ports,
    /// The transport protocol.
    #[serde(default)]
    pub transport: Transport,
}

/// Published ports.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Published {
    /// The transport protocol.
    pub transport: Transport,
    /// As [`Publish::address`].
    pub address: Option<IpAddr>,
    /// The first port on the host.
    pub host: u16,
    /// The first port of the endpoint.
    pub container: u16,
    /// The number of ports. Consecutive ports of the host lead to consecutive ports of the endpoint.
    pub count: u16,
}

impl Published {
    /// Returns each port of the host with the endpoint's port that it leads to.
    pub fn pairs(self) -> impl Iterator<Item = (u16, u16)> {
        (0..self.count)
            .filter_map(move |at| Some((self.host.checked_add(at)?, self.container.checked_add(at)?)))
    }

    /// Whether it applies to addresses of a family.
    pub fn is_for(self, v4: bool) -> bool {
        self.address.is_none_or(|address| address.is_ipv4() == v4)
    }

    /// Returns the first port of the host that both publish; `None` if they do not conflict.
    pub fn conflict_with(self, other: Self) -> Option<u16> {
        let same_address = match (self.address, other.address) {
            (None, _) | (_, None) => true,
            (Some(a), Some(b)) => {
                a == b || (a.is_ipv4() == b.is_ipv4() && (a.is_unspecified() || b.is_unspecified()))
            }
        };
        let first = self.host.max(other.host);
        let ends = |one: Self| u32::from(one.host) + u32::from(one.count);
        (self.transport == other.transport && same_address && u32::from(first) < ends(self).min(ends(other)))
            .then_some(first)
    }
}

impl fmt::Display for Published {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { transport, address, host, container, count } = *self;
        match address {
            None => {}
            Some(IpAddr::V4(address)) => write!(f, "{address}:")?,
            Some(IpAddr::V6(address)) => write!(f, "[{address}]:")?,
        }
        let ports = |first: u16| Ports { first, last: first.saturating_add(count.saturating_sub(1)) };
        write!(f, "{}:{}/{transport}", ports(host), ports(container))
    }
}

/// The error for an invalid `--publish` value.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PublishError(String);

impl fmt::Display for PublishError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for PublishError {}

impl FromStr for Publish {
    type Err = PublishError;

    fn from_str(text: &str) -> Result<Self, PublishError> {
        let (rest, transport) = match text.rsplit_once('/') {
            None => (text, Transport::Tcp),
            // In upper case as well, as Docker and Kubernetes write it.
            Some((rest, protocol)) => match protocol.to_ascii_lowercase().as_str() {
                "tcp" => (rest, Transport::Tcp),
                "udp" => (rest, Transport::Udp),
                "sctp" => (rest, Transport::Sctp),
                _ => {
                    return Err(PublishError(format!(
                        "invalid protocol '{protocol}': tcp, udp and sctp are supported"
                    )));
                }
            },
        };
        let (address, ports) = split_address(rest)?;
        let (host, container) = match ports.split_once(':') {
            Some(("", container)) if address.is_some() => (None, container),
            Some((host, container)) => (Some(parse_ports(host)?), container),
            None => (None, ports),
        };
        let container = parse_ports(container)?;
        match host {
            Some(host) if host.count() != container.count() && container.count() != 1 => {
                Err(PublishError(format!(
                    "{} ports of the host for {} ports of the endpoint: give as many, or one port of the endpoint",
                    host.count(),
                    container.count()
                )))
            }
            _ => Ok(Self { address, host, container, transport }),
        }
    }
}

/// Splits the address off, if there is one, and returns it with the rest.
fn split_address(text: &str) -> Result<(Option<IpAddr>, &str), PublishError> {
    if let Some(rest) = text.strip_prefix('[') {
        let parts = rest.split_once("]:").and_then(|(address, ports)| {
            let address: Ipv6Addr = address.parse().ok()?;
            Some((Some(IpAddr::V6(address)), ports))
        });
        return parts.ok_or_else(|| {
            PublishError("invalid IPv6 address: expected the form [fd00::1]:8080:80".to_owned())
        });
    }
    match text.split_once(':') {
        Some((first, rest)) if rest.contains(':') => match first.parse() {
            Ok(address) if !rest.contains("::") && rest.matches(':').count() == 1 => {
                Ok((Some(IpAddr::V4(address)), rest))
            }
            _ => Err(PublishError(
                "invalid address: expected an IPv4 address or an IPv6 address in brackets, such as 192.0.2.1:8080:80 or \
                 [fd00::1]:8080:80"
                    .to_owned(),
            )),
        },
        _ => Ok((None, text)),
    }
}

fn parse_ports(text: &str) -> Result<Ports, PublishError> {
    let (first, last) = text.split_once('-').unwrap_or((text, text));
    let number = |text: &str| text.parse::<u16>().ok().filter(|port| *port > 0 && !text.starts_with('+'));
    match (number(first), number(last)) {
        (Some(first), Some(last)) if first <= last => Ok(Ports { first, last }),
        _ => Err(PublishError(format!(
            "invalid port '{text}': expected 1 to 65535, or a range such as 8000-8009"
        ))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn publish(
        address: Option<&str>,
        host: Option<(u16, u16)>,
        container: (u16, u16),
        transport: Transport,
    ) -> Publish {
        Publish {
            address: address.map(|address| address.parse().unwrap()),
            host: host.map(|(first, last)| Ports { first, last }),
            container: Ports { first: container.0, last: container.1 },
            transport,
        }
    }

    #[test]
    fn all_forms_are_parsed() {
        use Transport::{Sctp, Tcp, Udp};
        for (text, meant) in [
            ("8080:80", publish(None, Some((8080, 8080)), (80, 80), Tcp)),
            ("80", publish(None, None, (80, 80), Tcp)),
            ("53:53/udp", publish(None, Some((53, 53)), (53, 53), Udp)),
            ("8000-8009:80-89/tcp", publish(None, Some((8000, 8009)), (80, 89), Tcp)),
            ("8000-8009:80", publish(None, Some((8000, 8009)), (80, 80), Tcp)),
            ("192.0.2.1:7:7/sctp", publish(Some("192.0.2.1"), Some((7, 7)), (7, 7), Sctp)),
            ("127.0.0.1::80", publish(Some("127.0.0.1"), None, (80, 80), Tcp)),
            ("[::1]:8080:80", publish(Some("::1"), Some((8080, 8080)), (80, 80), Tcp)),
            ("[fd00::1]::80/udp", publish(Some("fd00::1"), None, (80, 80), Udp)),
            ("[::]:1-65535:1-65535", publish(Some("::"), Some((1, 65535)), (1, 65535), Tcp)),
        ] {
            assert_eq!(text.parse(), Ok(meant), "{text}");
        }
    }

    #[test]
    fn invalid_values_are_rejected() {
        for text in [
            "",
            ":",
            "0",
            "8080:0",
            "65536",
            "8080:80:90",
            "a:80",
            "80/icmp",
            "80/",
            "9-8:9-8",
            "1-3:1-2",
            "+1:+1",
            "fd00::1:8080:80",
            "[fd00::1]80",
            "[fd00::1",
            "[192.0.2.1]:1:1",
            "192.0.2.1:80:",
            "192.0.2:1:1",
            ":80",
            "1-2-3:4",
            "1:2:3:4",
        ] {
            assert!(text.parse::<Publish>().is_err(), "{text}");
        }
    }

    #[test]
    fn published_ports_display_as_requested_and_conflict_where_they_overlap() {
        let published = |text: &str| {
            let Publish { address, host, container, transport } = text.parse().unwrap();
            let host = host.unwrap().first;
            Published { transport, address, host, container: container.first, count: container.count() }
        };
        for text in ["8080:80/tcp", "192.0.2.1:8000-8009:80-89/udp", "[fd00::1]:7:7/sctp"] {
            assert_eq!(published(text).to_string(), text);
        }
        let conflict = |a: &str, b: &str| {
            assert_eq!(
                published(a).conflict_with(published(b)),
                published(b).conflict_with(published(a)),
                "{a} {b}"
            );
            published(a).conflict_with(published(b))
        };
        assert_eq!(conflict("80:1", "80:2"), Some(80));
        assert_eq!(conflict("80:1", "80:1/udp"), None);
        assert_eq!(conflict("80:1", "81:1"), None);
        assert_eq!(conflict("80-90:80-90", "85-95:85-95"), Some(85));
        assert_eq!(conflict("80-90:80-90", "91-95:91-95"), None);
        assert_eq!(conflict("192.0.2.1:80:1", "80:1"), Some(80));
        assert_eq!(conflict("192.0.2.1:80:1", "192.0.2.2:80:1"), None);
        assert_eq!(conflict("192.0.2.1:80:1", "0.0.0.0:80:1"), Some(80));
        assert_eq!(conflict("192.0.2.1:80:1", "[::]:80:1"), None);
        assert_eq!(published("65530-65535:1-6").pairs().last(), Some((65535, 6)));
    }
}
