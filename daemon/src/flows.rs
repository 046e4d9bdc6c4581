//! Who talks to whom: names, verdicts and policies of what the kernel counted.
//!
//! [`FlowFollowers`] owns who follows, and what other hosts were asked for; [`DropsSeen`] what policies had dropped when a client was
//! told last. Begin to read at [`render`].

use std::collections::{BTreeMap, HashMap};
use std::net::IpAddr;

use ipnet::IpNet;
use ovl_cluster::view::View;
use ovl_control::{Flow, FlowVerdict, Flows, PolicyDrop, PolicySide};
use ovl_kernel::{FlowCounts, FlowKey, SeenFlows};
use ovl_proto::id::NodeId;
use ovl_subsystems::policy::admitted::AdmittedAt;
use ovl_subsystems::policy::protocol_of;

use tokio::sync::mpsc;

use crate::policy;
use crate::slots::{ClientSlot, ClientSlots};
use crate::trace::question::known;

/// The maximum number of clients and other hosts that follow at a time.
const MOST: usize = 4;
/// The maximum number of flows in an answer.
pub(crate) const MOST_FLOWS: usize = 1000;
/// The longest answer to another host, in bytes.
const MOST_BYTES: usize = 512 << 10;

/// Those that follow flows of this host, and what other hosts were asked for.
#[derive(Debug)]
pub(crate) struct FlowFollowers {
    /// Slots for clients and other hosts that follow the flows of this host.
    slots: ClientSlots,
    /// Other hosts that follow, by the number that each gave: where it is told that they took what was sent.
    others: HashMap<(NodeId, u64), mpsc::Sender<()>>,
    /// The number of the last request to another host.
    last: u64,
    /// Hosts that were asked: where it is told what they saw.
    asked: HashMap<u64, (NodeId, mpsc::Sender<Flows>)>,
}

impl FlowFollowers {
    /// None yet. For `last` see [`crate::asked::Asked::new`].
    pub(crate) fn new(last: u64) -> Self {
        Self { slots: ClientSlots::new(MOST), others: HashMap::new(), last, asked: HashMap::new() }
    }

    /// Begins to follow, for a client or for another host. `None` if there are too many.
    pub(crate) fn begin(&self) -> Option<ClientSlot> {
        self.slots.take()
    }

    /// Notes that another host follows, and returns where it is told that it took something. It ends with [`Self::stop`].
    pub(crate) fn keep(&mut self, by: NodeId, id: u64) -> mpsc::Receiver<()> {
        let (tell, taken) = mpsc::channel(1);
        self.others.insert((by, id), tell);
        taken
    }

    /// Notes that another host took what was sent.
    pub(crate) fn taken(&self, by: NodeId, id: u64) {
        if let Some(tell) = self.others.get(&(by, id)) {
            // Of a host that says so twice, once is enough.
            let _ = tell.try_send(());
        }
    }

    /// Notes that another host follows no longer.
    pub(crate) fn stop(&mut self, by: NodeId, id: u64) {
        self.others.remove(&(by, id));
    }

    /// Notes that another host is asked, and returns the number of the request and where it is told what that host saw.
    pub(crate) fn ask(&mut self, host: NodeId) -> (u64, mpsc::Receiver<Flows>) {
        // A host sends the next one after the last was taken.
        let (tell, seconds) = mpsc::channel(1);
        self.last = self.last.wrapping_add(1);
        self.asked.insert(self.last, (host, tell));
        (self.last, seconds)
    }

    /// Takes what a host saw that was asked. Returns false if nothing waits for it, so that the host is to stop.
    pub(crate) fn second(&mut self, from: NodeId, id: u64, flows: Flows) -> bool {
        match self.asked.get(&id) {
            Some((host, tell)) if *host == from => {
                !matches!(tell.try_send(flows), Err(mpsc::error::TrySendError::Closed(_)))
            }
            _ => false,
        }
    }

    /// Forgets what a host was asked for.
    pub(crate) fn give_up(&mut self, id: u64) {
        self.asked.remove(&id);
    }
}

/// Leaves out flows until there are at most `most`: the last ones, which have the fewest connections.
pub(crate) fn cut(flows: &mut Flows, most: usize) {
    if flows.flows.len() > most {
        flows.flows.truncate(most);
        flows.incomplete = true;
    }
}

/// Encodes flows for another host. Leaves out those with the fewest connections if they are too long.
pub(crate) fn encode(mut flows: Flows) -> serde_json::Result<String> {
    loop {
        let text = serde_json::to_string(&flows)?;
        if text.len() <= MOST_BYTES || flows.flows.is_empty() {
            return Ok(text);
        }
        let half = flows.flows.len() / 2;
        cut(&mut flows, half);
    }
}

/// Reads what another host encoded. `None` if it is too long or not understood.
pub(crate) fn decode(text: &str) -> Option<Flows> {
    if text.len() > 2 * MOST_BYTES {
        return None;
    }
    serde_json::from_str(text).ok()
}

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
pub(crate) fn render(
    view: &View,
    admitted: AdmittedAt<'_>,
    seen: &SeenFlows,
    drops: Vec<PolicyDrop>,
) -> (Vec<Flow>, bool) {
    let has_policies = view.resources.has_policies();
    let judgement = policy::judgements(view, admitted);
    let mut most: Vec<(&FlowKey, &FlowCounts)> = seen.iter().collect();
    most.sort_by_key(|(_, counts)| std::cmp::Reverse((counts.opened + counts.closed, counts.bytes)));
    let incomplete = most.len() > MOST_FLOWS;
    let passed = most.into_iter().take(MOST_FLOWS).filter_map(|(key, counts)| {
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
            let judged = judgement(key.from, key.target.0, port);
            // Packets are counted before policies drop them, also at the other end. The host that drops them says so.
            let is_unanswered = counts.closed == 0 && counts.bytes.is_some_and(|[_, back]| back == 0);
            if is_unanswered && !judged.passes {
                return None;
            }
            let deciding: Vec<PolicySide> = [judged.egress, judged.ingress]
                .into_iter()
                .filter(|side| side.passes && side.rule.is_some())
                .collect();
            let why: Vec<&str> = deciding.iter().map(|side| &*side.why).collect();
            flow.why = Some(why.join("; ")).filter(|why| !why.is_empty());
            flow.policies = deciding.into_iter().flat_map(|side| side.policies).collect();
        }
        Some(flow)
    });
    let is_cut = incomplete || drops.len() > MOST_FLOWS;
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
    (dropped.chain(passed).collect(), is_cut)
}

#[cfg(test)]
mod tests {
    use ovl_subsystems::policy::admitted::Admitted;

    use super::*;
    use crate::world::World;

    fn none(admitted: &Admitted) -> AdmittedAt<'_> {
        AdmittedAt { admitted, now: std::time::Duration::ZERO }
    }

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
        let (flows, incomplete) = render(
            &world.view,
            none(&Admitted::default()),
            &SeenFlows::from([(key, counts)]),
            vec![refused(4)],
        );
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

    const HOST: NodeId = NodeId([1; 10]);
    const OTHER: NodeId = NodeId([2; 10]);

    #[test]
    fn only_the_host_that_was_asked_tells_and_one_second_at_a_time() {
        let mut followers = FlowFollowers::new(u64::MAX);
        let (id, mut seconds) = followers.ask(HOST);
        assert!(!followers.second(OTHER, id, Flows::default()));
        assert!(!followers.second(HOST, id.wrapping_add(1), Flows::default()));
        let named = |host: &str| Flows { host: host.to_owned(), ..Flows::default() };
        // One that sends more than it may loses that.
        assert!(followers.second(HOST, id, named("first")) && followers.second(HOST, id, named("second")));
        assert_eq!(seconds.try_recv().unwrap().host, "first");
        assert!(seconds.try_recv().is_err());
        followers.give_up(id);
        assert!(!followers.second(HOST, id, Flows::default()));
        // What another host took is told to what is for that host.
        let mut taken = followers.keep(HOST, 7);
        followers.taken(OTHER, 7);
        assert!(taken.try_recv().is_err());
        (0..3).for_each(|_| followers.taken(HOST, 7));
        assert!(taken.try_recv().is_ok() && taken.try_recv().is_err());
        followers.stop(HOST, 7);
        assert_eq!(taken.try_recv(), Err(mpsc::error::TryRecvError::Disconnected));
    }

    #[test]
    fn answers_to_other_hosts_are_bounded() {
        let world = World::new();
        let (mut flows, _) =
            render(&world.view, none(&Admitted::default()), &SeenFlows::new(), vec![refused(4)]);
        flows[0].why = Some("x".repeat(4096));
        let flows = vec![flows[0].clone(); MOST_FLOWS];
        let text = encode(Flows { flows, ..Flows::default() }).unwrap();
        assert!(text.len() <= MOST_BYTES);
        let read = decode(&text).unwrap();
        assert!(read.incomplete && (50..MOST_FLOWS).contains(&read.flows.len()), "{}", read.flows.len());
        assert!(decode(&format!("{}{text}", " ".repeat(2 * MOST_BYTES))).is_none() && decode("{").is_none());
    }
}
