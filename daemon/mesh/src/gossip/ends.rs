//! Where hosts behind NAT are reached: at the address that their datagrams come from.
//!
//! Others know such a host by an address that only names it (`ovl_proto::record::name_address`). Its NAT gives its datagrams another
//! one, which differs from receiver to receiver, and changes when the host moves or the NAT forgets it.

use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use ovl_proto::id::NodeId;
use ovl_proto::record::named_by;
use tokio::time::Instant;

/// How long a host must have been silent at the address that is known before another one is taken at once. Two paths that both work
/// would otherwise take turns, and a copy of a datagram from elsewhere would win.
const STAYS: Duration = Duration::from_secs(1);
/// How long it must have been heard only at another one before that is taken.
const ELSEWHERE: Duration = Duration::from_millis(200);

/// The addresses of hosts behind NAT, as this host sees them.
#[derive(Debug, Default)]
pub(super) struct Ends(HashMap<NodeId, End>);

#[derive(Debug)]
struct End {
    at: SocketAddr,
    heard: Instant,
    /// Where it has been heard since, and since when.
    other: Option<(SocketAddr, Instant)>,
}

/// Where a datagram of a host behind NAT came from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Heard {
    /// From where it is known to be.
    There,
    /// From another address, for the first time since it was heard there. It may be known soon whether it has moved if both addresses are
    /// sent to.
    Elsewhere,
    /// From another address, where it is now.
    Moved,
}

impl Ends {
    /// Takes that an authentic datagram of a host behind NAT has come from an address.
    pub(super) fn heard(&mut self, host: NodeId, from: SocketAddr, now: Instant) -> Heard {
        let end = self.0.entry(host).or_insert(End { at: from, heard: now, other: None });
        if end.at == from {
            (end.heard, end.other) = (now, None);
            return Heard::There;
        }
        let since = end.other.filter(|(at, _)| *at == from).map(|(_, since)| since);
        let is_only = since.is_some_and(|since| now.saturating_duration_since(since) >= ELSEWHERE);
        if is_only || now.saturating_duration_since(end.heard) >= STAYS {
            *end = End { at: from, heard: now, other: None };
            return Heard::Moved;
        }
        if since.is_none() {
            end.other = Some((from, now));
            return Heard::Elsewhere;
        }
        Heard::There
    }

    /// The address at which a host is reached that is known by this one. `None` if it is behind NAT and was not heard.
    pub(super) fn of(&self, address: SocketAddr) -> Option<SocketAddr> {
        named_by(address.ip()).map_or(Some(address), |host| self.0.get(&host).map(|end| end.at))
    }

    /// Forgets all hosts but these.
    pub(super) fn retain(&mut self, is_known: impl Fn(NodeId) -> bool) {
        self.0.retain(|host, _| is_known(*host));
    }
}

/// Whether a datagram may be sent to an address because a member says that a host is there.
pub(super) fn is_plausible(address: SocketAddr) -> bool {
    let ip = address.ip();
    let is_bad = match ip {
        IpAddr::V4(v4) => v4.is_broadcast() || v4.is_link_local(),
        IpAddr::V6(v6) => v6.is_unicast_link_local() || v6.to_ipv4_mapped().is_some(),
    };
    address.port() != 0
        && !is_bad
        && !ip.is_unspecified()
        && !ip.is_multicast()
        && !ip.is_loopback()
        && named_by(ip).is_none()
}

#[cfg(test)]
mod tests {
    use ovl_proto::record::name_address;

    use super::*;

    fn at(text: &str) -> SocketAddr {
        text.parse().unwrap()
    }

    #[test]
    fn host_behind_nat_is_where_its_datagrams_come_from_and_moves_only_when_it_is_silent_there() {
        let (host, now) = (NodeId([7; 10]), Instant::now());
        let name = SocketAddr::new(name_address(host).into(), 7940);
        let mut ends = Ends::default();
        assert_eq!(ends.of(at("192.0.2.1:7940")), Some(at("192.0.2.1:7940")));
        assert_eq!(ends.of(name), None);
        let (old, new) = (at("198.51.100.1:4000"), at("198.51.100.2:4000"));
        assert_eq!(ends.heard(host, old, now), Heard::There);
        assert_eq!(ends.heard(host, new, now + STAYS / 2), Heard::Elsewhere);
        assert_eq!(ends.heard(host, new, now + STAYS / 2 + ELSEWHERE / 2), Heard::There);
        assert_eq!(ends.of(name), Some(old));
        assert_eq!(ends.heard(host, old, now + STAYS / 2 + ELSEWHERE / 2), Heard::There);
        assert_eq!(ends.heard(host, new, now + STAYS), Heard::Elsewhere, "it was heard there meanwhile");
        assert_eq!(ends.of(name), Some(old));
        assert_eq!(ends.heard(host, new, now + STAYS + ELSEWHERE), Heard::Moved);
        assert_eq!(ends.of(name), Some(new));
        assert_eq!(ends.heard(host, old, now + STAYS * 3), Heard::Moved, "it was silent there");
        ends.retain(|_| false);
        assert_eq!(ends.of(name), None);
    }

    #[test]
    fn members_cannot_have_datagrams_sent_to_groups_or_to_this_host() {
        for good in ["10.0.0.1:7940", "198.51.100.1:1", "[2001:db8::1]:7940"] {
            assert!(is_plausible(at(good)), "{good}");
        }
        let name = SocketAddr::new(name_address(NodeId([7; 10])).into(), 7940);
        let bad = ["127.0.0.1:53", "[::1]:53", "0.0.0.0:1", "224.0.0.1:1", "255.255.255.255:1", "10.0.0.1:0"];
        let bad = bad.into_iter().chain(["169.254.169.254:80", "[fe80::1]:1", "[::ffff:127.0.0.1]:53"]);
        for bad in bad.map(at).chain([name]) {
            assert!(!is_plausible(bad), "{bad}");
        }
    }
}
