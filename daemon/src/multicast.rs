//! The multicast groups that endpoints of this host have joined on switched networks, as their bridges report them.
//!
//! [`Multicast`] owns what was reported, and decides what the owner table says. Times are milliseconds of this run. Begin
//! to read at [`Multicast::of`].

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use ovl_proto::id::{EndpointId, NetworkId};
use ovl_proto::table::Endpoint;

/// The time after which the reports of a bridge are complete that was not followed before: members answer its first query
/// within a second.
const SETTLE_MS: u64 = 4_000;
/// The time for which a group stays announced that its last known member has left. The endpoint is asked meanwhile: there
/// may be another member behind its port.
const LINGER_MS: u64 = 2_000;
/// The time between two changes of the owner table, in which a workload may join and leave many times.
const PAUSE_MS: u64 = 100;
/// The time between two queries for members.
const ASK_MS: u64 = 60_000;

/// The groups of this host's endpoints.
#[derive(Debug, Default)]
pub(crate) struct Multicast {
    /// The groups of each endpoint. For one that the bridge reports no longer: when it ends.
    groups: BTreeMap<EndpointId, BTreeMap<IpAddr, Option<u64>>>,
    /// Networks whose bridges may not have reported everything yet, and until when.
    unsettled: BTreeMap<NetworkId, u64>,
    /// When the endpoints were last asked. `None` if they are to be asked at once.
    asked: Option<u64>,
    /// When the owner table was last compared.
    told: u64,
    /// Whether something was reported since then.
    reported: bool,
}

impl Multicast {
    /// Records that the bridge of a network has not been followed until now.
    pub(crate) fn unsettle(&mut self, network: NetworkId, now: u64) {
        self.unsettled.insert(network, now.saturating_add(SETTLE_MS));
        self.asked = None;
        self.reported = true;
    }

    /// Whether the reports about the endpoints on a network are complete.
    pub(crate) fn is_settled(&self, network: NetworkId) -> bool {
        !self.unsettled.contains_key(&network)
    }

    /// Records the groups of all endpoints. Returns the endpoints that are to be asked for other members.
    pub(crate) fn report(
        &mut self,
        found: &BTreeMap<EndpointId, BTreeSet<IpAddr>>,
        now: u64,
    ) -> BTreeSet<EndpointId> {
        let mut ask = BTreeSet::new();
        for (endpoint, groups) in &mut self.groups {
            let there = found.get(endpoint);
            for (group, ends) in groups {
                let is_there = there.is_some_and(|there| there.contains(group));
                if !is_there && ends.is_none() {
                    *ends = Some(now.saturating_add(LINGER_MS));
                    // The bridge asks for IPv4.
                    if group.is_ipv6() {
                        ask.insert(*endpoint);
                    }
                }
            }
        }
        for (endpoint, groups) in found {
            let known = self.groups.entry(*endpoint).or_default();
            known.extend(groups.iter().map(|group| (*group, None)));
        }
        self.reported = true;
        ask
    }

    /// Whether it is time to ask all endpoints for their groups. Then it takes the question as asked.
    pub(crate) fn is_time_to_ask(&mut self, now: u64) -> bool {
        let due = self.asked.is_none_or(|asked| now.saturating_sub(asked) >= ASK_MS);
        if due {
            self.asked = Some(now);
        }
        due
    }

    /// Whether the owner table may have to say something else: if so, it takes the table as compared, and forgets what has
    /// ended.
    pub(crate) fn is_time_to_tell(&mut self, now: u64) -> bool {
        if now.saturating_sub(self.told) < PAUSE_MS {
            return false;
        }
        let settled = self.unsettled.len();
        self.unsettled.retain(|_, until| *until > now);
        let mut due = std::mem::take(&mut self.reported) || self.unsettled.len() != settled;
        self.groups.retain(|_, groups| {
            let before = groups.len();
            groups.retain(|_, ends| ends.is_none_or(|ends| ends > now));
            due |= groups.len() != before;
            !groups.is_empty()
        });
        if due {
            self.told = now;
        }
        due
    }

    /// Returns the groups that the owner table says of an endpoint, and how many more it has joined. `None` if they are not
    /// followed yet, so that the endpoint gets the packets of all groups.
    pub(crate) fn of(&self, network: NetworkId, endpoint: EndpointId) -> Option<(Vec<IpAddr>, usize)> {
        if !self.is_settled(network) {
            return None;
        }
        let groups = self.groups.get(&endpoint);
        let all = groups.map_or(0, BTreeMap::len);
        let first = groups.into_iter().flat_map(BTreeMap::keys).take(Endpoint::MAX_GROUPS).copied();
        Some((first.collect(), all.saturating_sub(Endpoint::MAX_GROUPS)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NET: NetworkId = NetworkId([1; 5]);
    const WEB: EndpointId = EndpointId([2; 5]);

    fn found(groups: &[&str]) -> BTreeMap<EndpointId, BTreeSet<IpAddr>> {
        [(WEB, groups.iter().map(|group| group.parse().unwrap()).collect())].into()
    }

    fn told(multicast: &Multicast) -> Vec<String> {
        multicast.of(NET, WEB).unwrap().0.iter().map(ToString::to_string).collect()
    }

    #[test]
    fn a_group_is_told_at_once_and_taken_back_without_an_answer() {
        let mut multicast = Multicast::default();
        assert!(!multicast.is_time_to_tell(1_000));
        assert!(multicast.report(&found(&["239.1.2.3", "ff15::7"]), 1_000).is_empty());
        assert!(multicast.is_time_to_tell(1_000));
        assert_eq!(told(&multicast), ["239.1.2.3", "ff15::7"]);
        // Both have left; only for IPv6 does the bridge not ask.
        assert_eq!(multicast.report(&found(&[]), 1_010), [WEB].into());
        assert!(!multicast.is_time_to_tell(1_050));
        assert!(multicast.is_time_to_tell(1_100));
        assert_eq!(told(&multicast), ["239.1.2.3", "ff15::7"]);
        // Another member has answered.
        assert!(multicast.report(&found(&["ff15::7"]), 1_500).is_empty());
        assert!(multicast.is_time_to_tell(3_010));
        assert_eq!(told(&multicast), ["ff15::7"]);
        // The endpoint is gone.
        multicast.report(&BTreeMap::new(), 4_000);
        assert!(multicast.is_time_to_tell(6_000));
        assert!(told(&multicast).is_empty() && multicast.groups.is_empty());
        assert!(!multicast.is_time_to_tell(9_000));
    }

    #[test]
    fn nothing_is_told_of_a_network_until_members_had_time_to_answer() {
        let mut multicast = Multicast::default();
        multicast.unsettle(NET, 100);
        assert!(multicast.is_time_to_ask(100) && !multicast.is_time_to_ask(60_099));
        assert!(multicast.is_time_to_tell(200));
        assert_eq!(multicast.of(NET, WEB), None);
        assert!(!multicast.is_time_to_tell(4_099));
        assert!(multicast.is_time_to_tell(4_100));
        assert_eq!(multicast.of(NET, WEB), Some((Vec::new(), 0)));
        assert!(multicast.is_time_to_ask(60_100));
        // Another program turned snooping off.
        multicast.unsettle(NET, 70_000);
        assert!(multicast.of(NET, WEB).is_none() && multicast.is_time_to_ask(70_000));
    }

    #[test]
    fn the_groups_of_an_endpoint_are_limited() {
        let mut multicast = Multicast::default();
        let all = (0..300_u16).map(|n| IpAddr::from([239, 7, n.to_be_bytes()[0], n.to_be_bytes()[1]]));
        multicast.report(&[(WEB, all.collect())].into(), 0);
        let (groups, more) = multicast.of(NET, WEB).unwrap();
        assert_eq!((groups.len(), more), (Endpoint::MAX_GROUPS, 300 - Endpoint::MAX_GROUPS));
    }
}
