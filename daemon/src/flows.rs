//! Who talks to whom: names, verdicts and policies of what the kernel counted.
//!
//! [`DropsSeen`] owns what policies had dropped when a client was told last. Begin to read at [`render`].

use std::collections::BTreeMap;
use std::net::IpAddr;

use ipnet::IpNet;
use ovl_cluster::view::View;
use ovl_control::{Flow, FlowVerdict, PolicyDrop, PolicySide};
use ovl_kernel::{FlowCounts, FlowKey, SeenFlows};
use ovl_subsystems::policy::protocol_of;

use crate::policy;
use crate::trace::question::known;

/// The maximum number of clients that follow at a time.
pub(crate) const MOST_FOLLOWERS: usize = 4;
/// The maximum number of flows in an answer.
const MOST_FLOWS: usize = 1000;

/// What a client that follows has been told of drops: they are counted since the connection was first refused.
#[derive(Debug, Default)]
pub(crate) struct DropsSeen(BTreeMap<(String, IpAddr, IpAddr, String, Option<u16>), u64>);

impl DropsSeen {
    /// Returns what was dropped since the last call.
    pub(crate) fn new_of(&mut self, drops: Vec<PolicyDrop>) -> Vec<PolicyDrop> {
        let mut now = BTreeMap::new();
        let mut new = Vec::new();
        for drop in drops {
            let key = (drop.direction.clone(), drop.from, drop.to, drop.protocol.clone(), drop.port);
            let before = self.0.get(&key).copied().filter(|before| *before <= drop.packets).unwrap_or(0);
            now.insert(key, drop.packets);
            if drop.packets > before {
                new.push(PolicyDrop { packets: drop.packets - before, ..drop });
            }
        }
        self.0 = now;
        new
    }
}

/// Returns the prefixes whose flows are shown: those of all networks and Services.
pub(crate) fn shown_prefixes(view: &View, services: &[IpNet]) -> Vec<IpNet> {
    let networks =
        view.networks.values().flat_map(|found| &found.network.subnets).map(|subnet| subnet.prefix);
    networks.chain(services.iter().copied()).collect()
}

/// Returns flows with names, verdicts and policies, those with the most connections first, and whether there are more.
pub(crate) fn render(view: &View, seen: &SeenFlows, drops: Vec<PolicyDrop>) -> (Vec<Flow>, bool) {
    let has_policies = view.resources.has_policies();
    let mut most: Vec<(&FlowKey, &FlowCounts)> = seen.iter().collect();
    most.sort_by_key(|(_, counts)| std::cmp::Reverse((counts.opened + counts.closed, counts.bytes)));
    let incomplete = most.len() > MOST_FLOWS;
    let passed = most.into_iter().take(MOST_FLOWS).map(|(key, counts)| {
        let protocol = protocol_of(key.protocol);
        let is_translated = key.target != (key.to, key.port) && protocol.is_some();
        let mut flow = Flow {
            from: key.from,
            from_name: known(view, key.from),
            to: key.to,
            to_name: known(view, key.to),
            protocol: match (protocol, key.protocol) {
                (Some(protocol), _) => protocol.to_string(),
                (None, 1 | 58) => "ICMP".to_owned(),
                (None, other) => other.to_string(),
            },
            port: protocol.map(|_| key.port),
            backend: is_translated.then_some(key.target),
            backend_name: is_translated.then(|| known(view, key.target.0)).flatten(),
            verdict: FlowVerdict::Passed,
            policies: Vec::new(),
            why: None,
            opened: counts.opened,
            closed: counts.closed,
            dropped: 0,
            sent_bytes: counts.bytes.map(|[sent, _]| sent),
            received_bytes: counts.bytes.map(|[_, received]| received),
        };
        if has_policies {
            let port = protocol.map(|protocol| (protocol, key.target.1));
            let judged = policy::judgement(view, key.from, key.target.0, port);
            let deciding: Vec<PolicySide> = [judged.egress, judged.ingress]
                .into_iter()
                .filter(|side| side.passes && side.rule.is_some())
                .collect();
            let why: Vec<&str> = deciding.iter().map(|side| &*side.why).collect();
            flow.why = Some(why.join("; ")).filter(|why| !why.is_empty());
            flow.policies = deciding.into_iter().flat_map(|side| side.policies).collect();
        }
        flow
    });
    let dropped = drops.into_iter().take(MOST_FLOWS).map(|drop| Flow {
        from: drop.from,
        from_name: drop.from_endpoint.or_else(|| known(view, drop.from)),
        to: drop.to,
        to_name: drop.to_endpoint.or_else(|| known(view, drop.to)),
        protocol: drop.protocol,
        port: drop.port,
        backend: None,
        backend_name: None,
        verdict: FlowVerdict::Dropped,
        why: Some(format!("no {} rule of {} lets it pass", drop.direction, drop.policies.join(" and "))),
        policies: drop.policies,
        opened: 0,
        closed: 0,
        dropped: drop.packets,
        sent_bytes: None,
        received_bytes: None,
    });
    (dropped.chain(passed).collect(), incomplete)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::world::World;

    fn refused(packets: u64) -> PolicyDrop {
        PolicyDrop {
            direction: "ingress".to_owned(),
            from: [10, 9, 0, 18].into(),
            from_endpoint: None,
            to: [10, 9, 0, 9].into(),
            to_endpoint: None,
            protocol: "TCP".to_owned(),
            port: Some(80),
            packets,
            last_ms: 0,
            policies: vec!["default/only-db".to_owned()],
        }
    }

    #[test]
    fn drops_are_told_once() {
        let mut seen = DropsSeen::default();
        let packets = |new: Vec<PolicyDrop>| new.into_iter().map(|drop| drop.packets).collect::<Vec<_>>();
        assert_eq!(packets(seen.new_of(vec![refused(3)])), [3]);
        assert!(seen.new_of(vec![refused(3)]).is_empty());
        assert_eq!(packets(seen.new_of(vec![refused(5)])), [2]);
        // The element has ended and begun again.
        assert_eq!(packets(seen.new_of(vec![refused(1)])), [1]);
    }

    #[test]
    fn flows_have_names_and_verdicts() {
        let mut world = World::new();
        world.attach(1, 1, &[], true);
        let key = FlowKey {
            from: [10, 9, 0, 9].into(),
            to: [192, 0, 2, 1].into(),
            port: 443,
            protocol: 6,
            target: ([192, 0, 2, 1].into(), 443),
        };
        let counts = FlowCounts { opened: 2, closed: 1, bytes: Some([5, 7]) };
        let (flows, incomplete) = render(&world.view, &SeenFlows::from([(key, counts)]), vec![refused(4)]);
        assert!(!incomplete && flows.len() == 2);
        assert_eq!(
            (flows[0].verdict, flows[0].dropped, flows[0].to_name.as_deref()),
            (FlowVerdict::Dropped, 4, Some("default/w1"))
        );
        assert_eq!(flows[1].from_name.as_deref(), Some("default/w1"));
        assert_eq!(
            (flows[1].to_name.as_deref(), flows[1].backend, flows[1].sent_bytes),
            (None, None, Some(5))
        );
    }
}
