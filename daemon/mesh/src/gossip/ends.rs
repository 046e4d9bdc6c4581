//! Where hosts are reached that are not simply at the address that they are known by.
//!
//! Others know a host behind NAT by an address that only names it (`ovl_proto::record::name_address`). Its NAT gives its datagrams
//! another one, which differs from receiver to receiver, and changes when the host moves or the NAT forgets it. It is reached at the
//! address that its datagrams come from.
//!
//! A host that can be dialled at several addresses is known by its main one, and reached at one of them: see [`candidates`](super::candidates).

use std::collections::{BTreeMap, HashMap};
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use ovl_proto::id::NodeId;
use ovl_proto::record::{MAX_FURTHER, named_by};
use tokio::time::Instant;

use super::candidates::{Candidates, Turn};

/// How long a host must have been silent at the address that is known before another one is taken at once. Two paths that both work
/// would otherwise take turns, and a copy of a datagram from elsewhere would win.
const STAYS: Duration = Duration::from_secs(1);
/// How long it must have been heard only at another one before that is taken.
const ELSEWHERE: Duration = Duration::from_millis(200);

/// The addresses at which hosts are reached from here.
#[derive(Debug)]
pub(super) struct Ends {
    families: Families,
    /// Hosts behind NAT.
    hidden: HashMap<NodeId, End>,
    /// Hosts that are not simply reached at their main address, by that one.
    several: HashMap<SocketAddr, Several>,
    /// The main address of each of those.
    names: HashMap<NodeId, SocketAddr>,
}

/// The address families of the sockets of this host.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Families {
    v4: bool,
    v6: bool,
}

impl Families {
    /// The families of these addresses.
    pub(super) fn of(addresses: impl IntoIterator<Item = SocketAddr>) -> Self {
        let none = Self { v4: false, v6: false };
        addresses
            .into_iter()
            .fold(none, |all, at| Self { v4: all.v4 || at.is_ipv4(), v6: all.v6 || at.is_ipv6() })
    }

    /// Whether a datagram can be sent to an address.
    pub(super) fn has(self, at: SocketAddr) -> bool {
        if at.is_ipv4() { self.v4 } else { self.v6 }
    }
}

#[derive(Debug)]
struct Several {
    host: NodeId,
    candidates: Candidates,
}

/// A trial of an address of a host.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Trial {
    /// The address that the host is known by.
    pub known_as: SocketAddr,
    /// The address to try.
    pub at: SocketAddr,
    /// The place of the address, for [`Ends::sent`].
    pub place: usize,
}

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
    /// Knows no host. The families are those of the sockets of this host.
    pub(super) fn new(families: Families) -> Self {
        Self { families, hidden: HashMap::new(), several: HashMap::new(), names: HashMap::new() }
    }

    /// Takes the addresses of a host, the main one first. Returns whether this host can send to none of them, because they are of the
    /// other family.
    pub(super) fn set(
        &mut self,
        host: NodeId,
        (main, further): (SocketAddr, &[SocketAddr]),
        now: Instant,
    ) -> bool {
        if self.names.get(&host).is_some_and(|known| *known != main) {
            self.forget(host);
        }
        if named_by(main.ip()).is_some() {
            return false;
        }
        let has_main = self.families.has(main);
        if has_main && further.is_empty() {
            self.forget(host);
            return false;
        }
        let mut all: Vec<SocketAddr> = Some(main).filter(|_| has_main).into_iter().collect();
        for at in further.iter().take(MAX_FURTHER) {
            if self.families.has(*at) && is_plausible(*at) && !all.contains(at) {
                all.push(*at);
            }
        }
        if has_main && all.len() == 1 {
            self.forget(host);
            return false;
        }
        match self.several.get_mut(&main).filter(|several| several.host == host) {
            Some(several) if several.candidates.are(&all, has_main) => {}
            Some(several) => several.candidates.replace(&all, has_main, now),
            None => {
                let candidates = Candidates::new(&all, has_main, now);
                self.several.insert(main, Several { host, candidates });
                self.names.insert(host, main);
            }
        }
        all.is_empty()
    }

    fn forget(&mut self, host: NodeId) {
        if let Some(main) = self.names.remove(&host)
            && self.several.get(&main).is_some_and(|several| several.host == host)
        {
            self.several.remove(&main);
        }
    }

    fn several(&mut self, host: NodeId) -> Option<&mut Several> {
        let main = self.names.get(&host)?;
        self.several.get_mut(main).filter(|several| several.host == host)
    }

    /// The main address of a host that is not simply reached there.
    pub(super) fn main_of(&self, host: NodeId) -> Option<SocketAddr> {
        self.names.get(&host).copied()
    }

    /// The host that has this address among several.
    pub(super) fn host_at(&self, at: SocketAddr) -> Option<NodeId> {
        self.several.values().find(|several| several.candidates.has(at)).map(|several| several.host)
    }

    /// The hosts that are reached at another address than the main one, each with it.
    pub(super) fn elsewhere(&self) -> BTreeMap<NodeId, SocketAddr> {
        let others = self.several.values().filter(|several| !several.candidates.is_main());
        others.filter_map(|several| Some((several.host, several.candidates.used()?))).collect()
    }

    /// The trials that are due, of hosts that are wanted.
    pub(super) fn trials(
        &self,
        is_wanted: impl Fn(NodeId) -> bool,
        silent_after: Duration,
        now: Instant,
    ) -> Vec<Trial> {
        let wanted = self.several.iter().filter(|(_, several)| is_wanted(several.host));
        wanted
            .flat_map(|(known_as, several)| {
                let due = several.candidates.due(silent_after, now).into_iter();
                due.map(|(place, at)| Trial { known_as: *known_as, at, place })
            })
            .collect()
    }

    /// Takes that a trial is sent.
    pub(super) fn sent(&mut self, trial: &Trial, nonce: u64, now: Instant) {
        if let Some(several) = self.several.get_mut(&trial.known_as) {
            several.candidates.sent(trial.place, nonce, now);
        }
    }

    /// Takes that a host has answered a trial. `None` if it has answered none.
    pub(super) fn tried(
        &mut self,
        host: NodeId,
        nonce: u64,
        silent_after: Duration,
        now: Instant,
    ) -> Option<Turn> {
        self.several(host)?.candidates.tried(nonce, silent_after, now)
    }

    /// Takes that a host has answered a ping from an address.
    pub(super) fn answered(
        &mut self,
        host: NodeId,
        at: SocketAddr,
        silent_after: Duration,
        now: Instant,
    ) -> Turn {
        let turn = |several: &mut Several| several.candidates.answered(at, silent_after, now);
        self.several(host).map_or(Turn::Stays, turn)
    }

    /// Takes that an authentic datagram of a host behind NAT has come from an address.
    pub(super) fn heard(&mut self, host: NodeId, from: SocketAddr, now: Instant) -> Heard {
        let end = self.hidden.entry(host).or_insert(End { at: from, heard: now, other: None });
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

    /// The address at which a host is reached that is known by this one. `None` if it is behind NAT and was not heard, or has no address
    /// of a family of this host.
    pub(super) fn of(&self, address: SocketAddr) -> Option<SocketAddr> {
        if let Some(several) = self.several.get(&address) {
            return several.candidates.used();
        }
        named_by(address.ip()).map_or(Some(address), |host| self.hidden.get(&host).map(|end| end.at))
    }

    /// Forgets all hosts but these.
    pub(super) fn retain(&mut self, is_known: impl Fn(NodeId) -> bool) {
        self.hidden.retain(|host, _| is_known(*host));
        self.several.retain(|_, several| is_known(several.host));
        self.names.retain(|host, _| is_known(*host));
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

    fn ends(own: &[&str]) -> Ends {
        Ends::new(Families::of(own.iter().map(|text| at(text))))
    }

    #[test]
    fn host_is_reached_at_an_address_of_a_family_that_both_have() {
        let (host, now) = (NodeId([7; 10]), Instant::now());
        let (v4, v6) = (at("192.0.2.1:7940"), at("[2001:db8::1]:7940"));
        let mut both = ends(&["192.0.2.9:7940", "[2001:db8::9]:7940"]);
        let mut only_v6 = ends(&["[2001:db8::9]:7940"]);
        for all in [&mut both, &mut only_v6] {
            assert!(!all.set(host, (v4, &[v6]), now));
            assert_eq!((all.main_of(host), all.host_at(v6)), (Some(v4), Some(host)));
        }
        assert_eq!((both.of(v4), both.elsewhere()), (Some(v4), BTreeMap::new()));
        assert_eq!((only_v6.of(v4), only_v6.elsewhere()), (Some(v6), BTreeMap::from([(host, v6)])));
        assert_eq!(both.trials(|_| true, STAYS, now + STAYS).len(), 1);
        assert!(both.trials(|_| false, STAYS, now + STAYS).is_empty());

        assert!(only_v6.set(host, (v4, &[]), now), "they have no family in common");
        assert_eq!((only_v6.of(v4), only_v6.elsewhere()), (None, BTreeMap::new()));
        assert!(!both.set(host, (v4, &[]), now));
        assert_eq!((both.of(v4), both.main_of(host)), (Some(v4), None));
        only_v6.retain(|_| false);
        assert_eq!((only_v6.of(v4), only_v6.main_of(host)), (Some(v4), None));
    }

    #[test]
    fn addresses_that_no_host_has_are_not_sent_to() {
        let (host, now) = (NodeId([7; 10]), Instant::now());
        let mut ends = ends(&["192.0.2.9:7940", "[2001:db8::9]:7940"]);
        let main = at("192.0.2.1:7940");
        assert!(!ends.set(host, (main, &[at("127.0.0.1:53"), at("224.0.0.1:1"), main]), now));
        assert_eq!(ends.main_of(host), None);
        let many: Vec<SocketAddr> =
            (1..=9).map(|port| SocketAddr::new([192, 0, 2, 2].into(), port)).collect();
        ends.set(host, (main, &many), now);
        let trials = ends.trials(|_| true, STAYS, now + STAYS);
        assert_eq!(trials.len(), MAX_FURTHER);
        let name = SocketAddr::new(name_address(host).into(), 7940);
        assert!(!ends.set(host, (name, &many), now), "it is behind NAT now");
        assert_eq!(ends.main_of(host), None);
    }

    #[test]
    fn host_behind_nat_is_where_its_datagrams_come_from_and_moves_only_when_it_is_silent_there() {
        let (host, now) = (NodeId([7; 10]), Instant::now());
        let name = SocketAddr::new(name_address(host).into(), 7940);
        let mut ends = ends(&["192.0.2.9:7940"]);
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
