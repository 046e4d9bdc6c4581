//! What users see of network policies: the list, judgements, dropped packets, metrics.
//!
//! The module owns no state: it renders what the view and the kernel's counters say. What policies mean is in
//! [`ovl_subsystems::policy`]. Begin to read at [`rows`].

use std::collections::BTreeMap;
use std::net::IpAddr;

use ovl_cluster::view::{Placed, View};
use ovl_control::{PolicyDrop, PolicyJudgement, PolicyRow, PolicySide};
use ovl_kernel::CountedElement;
use ovl_metrics::{In, Page};
use ovl_proto::resource::{Name, Protocol};
use ovl_subsystems::policy::admitted::AdmittedAt;
use ovl_subsystems::policy::explain::{
    ConnectionEnd, Judgement, Shown, Side, describe, describe_cluster, explain,
};
use ovl_subsystems::policy::refused::{Connection, Counter, REMEMBERED_MS};
use ovl_subsystems::policy::{ClusterPolicy, Direction, Namespaces, Policies, protocol_of};

use crate::failed::Failed;

/// Number of packets that policies dropped, by direction and endpoint address.
pub(crate) type Refused = BTreeMap<(Direction, IpAddr), u64>;

/// Reads the counters of dropped packets by endpoint. `counts` has the elements of [`Counter::by_endpoint`] of each
/// counter, in the order of [`Counter::all`].
pub(crate) fn refused(counts: Vec<Vec<CountedElement>>) -> Refused {
    let mut refused = Refused::new();
    for (counter, counts) in Counter::all().iter().zip(counts) {
        for counted in counts {
            if let Some(address) = counter.address(&counted.key) {
                refused.insert((counter.direction, address), counted.packets);
            }
        }
    }
    refused
}

/// Lists all policies, with the number of packets that each dropped on this host.
pub(crate) fn rows(view: &View, refused: &Refused) -> Vec<PolicyRow> {
    let policies = Policies::new(&view.resources);
    let mut rows: BTreeMap<&Name, PolicyRow> = policies
        .iter()
        .map(|policy| {
            let isolating = Direction::ALL.into_iter().filter(|way| policy.rules(*way).is_some());
            let rules = Direction::ALL.into_iter().flat_map(|direction| {
                let rules = policy.rules(direction).into_iter().flatten();
                let policies = &policies;
                rules
                    .map(move |rule| format!("{}: {}", direction.name(), describe(policies, rule, direction)))
            });
            let row = PolicyRow {
                namespace: policy.name.namespace.clone(),
                name: policy.name.name.clone(),
                tier: None,
                priority: None,
                selects: Shown(&policy.selector).to_string(),
                isolates: isolating.map(|way| way.name().to_owned()).collect(),
                endpoints: 0,
                refused: 0,
                rules: rules.collect(),
            };
            (&policy.name, row)
        })
        .chain(policies.cluster().iter().map(|policy| (&policy.name, cluster_row(&policies, policy))))
        .collect();
    for Placed { node, endpoint } in view.all_endpoints() {
        let labels = view.known_labels(node.record.id, endpoint);
        let (namespace, labels) = (&endpoint.namespace, labels.as_deref());
        let selecting = policies
            .selecting(namespace, labels)
            .into_iter()
            .map(|policy| (&policy.name, Direction::ALL.map(|direction| policy.rules(direction).is_some())));
        let about = policies.about(&view.resources, namespace, labels).into_iter().map(|policy| {
            (&policy.name, Direction::ALL.map(|direction| !policy.rules(direction).is_empty()))
        });
        for (name, decides) in selecting.chain(about) {
            let Some(row) = rows.get_mut(name) else { continue };
            row.endpoints += 1;
            if node.record.id != view.me {
                continue;
            }
            for (direction, _) in Direction::ALL.into_iter().zip(decides).filter(|(_, decides)| *decides) {
                let addresses = endpoint.addresses.iter().map(|net| (direction, net.addr()));
                row.refused += addresses.filter_map(|key| refused.get(&key)).sum::<u64>();
            }
        }
    }
    rows.into_values().collect()
}

/// Describes a ClusterNetworkPolicy.
fn cluster_row(policies: &Policies, policy: &ClusterPolicy) -> PolicyRow {
    let namespaces = match &policy.subject.namespaces {
        Namespaces::Selected(selector) => Shown(selector).to_string(),
        Namespaces::One(name) => name.clone(),
    };
    let of = if namespaces.is_empty() { String::new() } else { format!("namespaces with {namespaces}") };
    let pods = Shown(&policy.subject.labels).to_string();
    let between = if of.is_empty() || pods.is_empty() { "" } else { "; " };
    let decides = Direction::ALL.into_iter().filter(|way| !policy.rules(*way).is_empty());
    let rules = Direction::ALL.into_iter().flat_map(|direction| {
        let rules = policy.rules(direction).iter();
        rules
            .map(move |rule| format!("{}: {}", direction.name(), describe_cluster(policies, rule, direction)))
    });
    PolicyRow {
        namespace: String::new(),
        name: policy.name.name.clone(),
        tier: Some(policy.tier.to_string()),
        priority: Some(policy.priority),
        selects: format!("{pods}{between}{of}"),
        isolates: decides.map(|way| way.name().to_owned()).collect(),
        endpoints: 0,
        refused: 0,
        rules: rules.collect(),
    }
}

/// Explains the verdict of all policies on a connection. `port` is `None` for a protocol without ports.
///
/// # Errors
///
/// An end is no endpoint, or the ends have no addresses of one family.
pub(crate) fn judge(
    view: &View,
    admitted: AdmittedAt<'_>,
    from: &str,
    to: &str,
    port: Option<(Protocol, u16)>,
) -> Result<Vec<PolicyJudgement>, Failed> {
    let policies = Policies::new(&view.resources);
    let (sources, targets) = (addresses(view, from)?, addresses(view, to)?);
    let mut judgements = Vec::new();
    for from in &sources {
        for to in targets.iter().filter(|to| to.is_ipv4() == from.is_ipv4()) {
            judgements.push(judged(view, &policies, admitted, *from, *to, port));
        }
    }
    if judgements.is_empty() {
        return Err(Failed::invalid(format!("{from} and {to} have no addresses of one family")));
    }
    Ok(judgements)
}

/// Explains the verdict of all policies on a connection between two addresses.
pub(crate) fn judgement(
    view: &View,
    admitted: AdmittedAt<'_>,
    from: IpAddr,
    to: IpAddr,
    port: Option<(Protocol, u16)>,
) -> PolicyJudgement {
    judged(view, &Policies::new(&view.resources), admitted, from, to, port)
}

/// Returns what explains many connections: as [`judgement`], but the policies are read once.
pub(crate) fn judgements<'a>(
    view: &'a View,
    admitted: AdmittedAt<'a>,
) -> impl Fn(IpAddr, IpAddr, Option<(Protocol, u16)>) -> PolicyJudgement + 'a {
    let policies = Policies::new(&view.resources);
    move |from, to, port| judged(view, &policies, admitted, from, to, port)
}

fn judged(
    view: &View,
    policies: &Policies,
    admitted: AdmittedAt<'_>,
    from: IpAddr,
    to: IpAddr,
    port: Option<(Protocol, u16)>,
) -> PolicyJudgement {
    let [source, target] = [from, to].map(|address| ConnectionEnd::of(view, address));
    let judged = explain(view, policies, admitted, &source, &target, port);
    PolicyJudgement {
        from,
        to,
        passes: judged.passes(),
        egress: elsewhere(view, policies, &source, side(judged.egress, &source, Direction::Egress)),
        ingress: side(judged.ingress, &target, Direction::Ingress),
    }
}

/// Lists the connections of which packets were dropped recently. `counts` has the elements of
/// [`Counter::by_connection`] of each counter, in the order of [`Counter::all`].
pub(crate) fn drops(
    view: &View,
    admitted: AdmittedAt<'_>,
    counts: Vec<Vec<CountedElement>>,
) -> Vec<PolicyDrop> {
    let policies = Policies::new(&view.resources);
    let mut drops = Vec::new();
    for (counter, counts) in Counter::all().iter().zip(counts) {
        for counted in counts {
            let Some(connection) = counter.connection(&counted.key) else { continue };
            let left = counted.left_ms.unwrap_or(REMEMBERED_MS);
            drops.push(PolicyDrop {
                packets: counted.packets,
                last_ms: REMEMBERED_MS.saturating_sub(left),
                ..drop_of(view, &policies, admitted, counter.direction, connection)
            });
        }
    }
    drops.sort_by_key(|drop| drop.last_ms);
    drops
}

/// Adds the dropped packets to the metrics.
pub(crate) fn add_refused(page: &mut Page, view: &View, refused: &Refused) {
    let help = "Packets that no policy of an isolated endpoint of this host let pass";
    let family = page.counter("policy_refused_packets", In::Numbers, help);
    let policies = Policies::new(&view.resources);
    for ((direction, address), packets) in refused {
        let Some(placed) = ConnectionEnd::of(view, *address).endpoint else { continue };
        let network = view.networks.get(&placed.endpoint.network);
        let labels = [
            ("namespace", &*placed.endpoint.namespace),
            ("endpoint", &*placed.endpoint.name),
            ("address", &*address.to_string()),
            ("direction", direction.name()),
            ("network", network.map_or("", |found| &*found.network.name)),
            (
                "policies",
                &*deciding(view, &policies, placed, *direction)
                    .iter()
                    .map(Name::to_string)
                    .collect::<Vec<_>>()
                    .join(", "),
            ),
        ];
        family.with(&labels, *packets);
    }
}

/// Returns the addresses of an endpoint, given as its name, as `NAMESPACE/NAME` or as an address.
fn addresses(view: &View, text: &str) -> Result<Vec<IpAddr>, Failed> {
    if let Ok(address) = text.parse() {
        return Ok(vec![address]);
    }
    let (namespace, name) = text.split_once('/').unwrap_or(("default", text));
    let pod = Name::new(namespace, name);
    let of_pod = view.all_of_pod(&pod).filter(|placed| {
        view.counts(placed.node) && view.is_named_as_pod(placed.node.record.id, placed.endpoint)
    });
    let mut found: Vec<Placed<'_>> = of_pod.collect();
    if found.is_empty() {
        let named = view.all_named(name).filter(|placed| placed.endpoint.namespace == namespace);
        found.extend(named.filter(|placed| view.counts(placed.node)));
    }
    let addresses: Vec<IpAddr> =
        found.iter().flat_map(|placed| &placed.endpoint.addresses).map(|net| net.addr()).collect();
    if addresses.is_empty() {
        return Err(Failed::not_found(format!(
            "there is no endpoint {name} in the namespace {namespace}: give NAME, NAMESPACE/NAME or an address"
        )));
    }
    Ok(addresses)
}

fn full_name(end: &ConnectionEnd<'_>) -> Option<String> {
    let placed = end.endpoint?;
    Some(format!("{}/{}", placed.endpoint.namespace, placed.endpoint.name))
}

/// Adds that the addresses of domain names are only known on the source's host, if policies with such rules decide about an
/// endpoint of another host.
fn elsewhere(view: &View, policies: &Policies, end: &ConnectionEnd<'_>, mut side: PolicySide) -> PolicySide {
    let Some(Placed { node, endpoint }) = end.endpoint.filter(|_| !end.is_on(view.me)) else { return side };
    if policies.has_patterns() {
        let labels = view.known_labels(node.record.id, endpoint);
        let patterns = policies.patterns_of(&view.resources, &endpoint.namespace, labels.as_deref());
        if !patterns.is_empty() {
            side.why += &format!(
                " (as far as it is known here: which addresses its rules about domain names admit is known on {})",
                node.record.name
            );
        }
    }
    side
}

fn side(side: Side, end: &ConnectionEnd<'_>, direction: Direction) -> PolicySide {
    let passes = side.passes();
    let who = full_name(end).unwrap_or_else(|| end.address.to_string());
    let direction = direction.name();
    let (policies, rule, why) = match side {
        Side::Outside => (Vec::new(), None, format!("{who} is no endpoint: policies are not about it")),
        Side::AtHome => (Vec::new(), None, format!("between {who} and itself, or its own host, all passes")),
        Side::NotIsolated => (Vec::new(), None, format!("no policy isolates {who} for {direction}")),
        Side::Default => {
            let why =
                format!("no {direction} rule of a ClusterNetworkPolicy about {who} decides, so all passes");
            (Vec::new(), None, why)
        }
        Side::Passes { policy, rule, says } | Side::Denied { policy, rule, says } => (
            vec![policy.to_string()],
            Some(rule as u64),
            format!("{direction} rule {rule} of {}: {says}", called(&policy)),
        ),
        Side::Refused(policies) => {
            let names: Vec<String> = policies.iter().map(ToString::to_string).collect();
            let why = format!(
                "{who} is isolated for {direction} by {}, and no rule lets this pass",
                names.join(" and ")
            );
            (names, None, why)
        }
        Side::Undecided(policies) => {
            let names: Vec<String> = policies.iter().map(called).collect();
            let pod = end.endpoint.map_or_else(String::new, |placed| placed.endpoint.pod_name().to_string());
            let why = format!(
                "the labels of {who} are not known: there is no v1 Pod {pod} of its uid, or another endpoint stands for \
                 that pod. Until then it is isolated for {direction}, because {} may select it",
                names.join(" or ")
            );
            (policies.iter().map(ToString::to_string).collect(), None, why)
        }
    };
    PolicySide { passes, policies, rule, why }
}

/// Returns the policies that decide about an endpoint in a direction.
fn deciding(view: &View, policies: &Policies, placed: Placed<'_>, direction: Direction) -> Vec<Name> {
    let Placed { node, endpoint } = placed;
    let labels = view.known_labels(node.record.id, endpoint);
    let deciding = policies.deciding(&view.resources, &endpoint.namespace, labels.as_deref(), direction);
    deciding.names().cloned().collect()
}

/// Returns the name of a policy for a sentence.
fn called(name: &Name) -> String {
    if name.namespace.is_empty() { format!("ClusterNetworkPolicy {name}") } else { name.to_string() }
}

fn drop_of(
    view: &View,
    policies: &Policies,
    admitted: AdmittedAt<'_>,
    direction: Direction,
    connection: Connection,
) -> PolicyDrop {
    let Connection { from, to, protocol, port } = connection;
    let [source, target] = [from, to].map(|address| ConnectionEnd::of(view, address));
    let own = match direction {
        Direction::Ingress => &target,
        Direction::Egress => &source,
    };
    let known = protocol_of(protocol);
    let judged = explain(view, policies, admitted, &source, &target, known.map(|known| (known, port)));
    let refusing = match (direction, judged) {
        (Direction::Ingress, Judgement { ingress: side, .. })
        | (Direction::Egress, Judgement { egress: side, .. }) => {
            match side {
                Side::Denied { policy, .. } => vec![policy],
                Side::Refused(policies) | Side::Undecided(policies) => policies,
                // It was refused before a change.
                Side::Outside | Side::AtHome | Side::NotIsolated | Side::Default | Side::Passes { .. } => {
                    own.endpoint.map_or_else(Vec::new, |placed| deciding(view, policies, placed, direction))
                }
            }
        }
    };
    PolicyDrop {
        direction: direction.name().to_owned(),
        from,
        from_endpoint: full_name(&source),
        to,
        to_endpoint: full_name(&target),
        protocol: known.map_or_else(|| protocol.to_string(), |known| known.to_string()),
        port: known.map(|_| port),
        packets: 0,
        last_ms: 0,
        policies: refusing.iter().map(ToString::to_string).collect(),
    }
}

#[cfg(test)]
mod tests {
    use ovl_proto::resource::Kind;
    use ovl_subsystems::policy::admitted::Admitted;
    use serde_json::json;

    use super::*;
    use crate::world::{World, read};

    fn none(admitted: &Admitted) -> AdmittedAt<'_> {
        AdmittedAt { admitted, now: std::time::Duration::ZERO }
    }

    const WEB: &[(&str, &str)] = &[("app", "web")];

    /// w1 on this host and w2 on another are isolated for ingress, and only `app=db` may come in; w3 is `app=db`.
    fn world() -> World {
        let mut world = World::new();
        world.attach(1, 1, WEB, true);
        world.attach(2, 2, WEB, true);
        world.attach(3, 3, &[("app", "db")], true);
        world.put(read(
            Kind::NetworkPolicy,
            json!({
                "metadata": { "name": "only-db", "namespace": "default" },
                "spec": {
                    "podSelector": { "matchLabels": { "app": "web" } },
                    "policyTypes": ["Ingress"],
                    "ingress": [{ "from": [{ "podSelector": { "matchLabels": { "app": "db" } } }] }],
                },
            }),
        ));
        world
    }

    fn ip(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    /// An element of the first counter, which is of ingress and IPv4.
    fn counted(key: &[u8], packets: u64, left_ms: Option<u64>) -> Vec<Vec<CountedElement>> {
        vec![vec![CountedElement { key: key.into(), packets, bytes: 0, left_ms }]]
    }

    #[test]
    fn policy_is_listed_with_what_it_selects_and_dropped_here() {
        let world = world();
        let refused = refused(counted(&[10, 9, 0, 9], 7, None));
        assert_eq!(refused, Refused::from([((Direction::Ingress, ip("10.9.0.9")), 7)]));
        let rows = rows(&world.view, &refused);
        assert_eq!(rows.len(), 1);
        assert_eq!((&*rows[0].name, rows[0].endpoints, rows[0].refused), ("only-db", 2, 7));
        assert_eq!(rows[0].isolates.len(), 1);
    }

    #[test]
    fn element_with_a_key_of_another_length_is_passed_over() {
        assert!(refused(counted(&[10, 9, 0], 7, None)).is_empty());
        assert!(drops(&world().view, none(&Admitted::default()), counted(&[10, 9, 0], 7, None)).is_empty());
    }

    #[test]
    fn connection_is_judged_by_names_and_addresses() {
        let world = world();
        let admitted = Admitted::default();
        let judge =
            |from: &str, to: &str| judge(&world.view, none(&admitted), from, to, Some((Protocol::Tcp, 80)));
        let judged = judge("w3", "w1").unwrap();
        assert!(judged.len() == 1 && judged[0].passes, "{judged:?}");
        let judged = judge("default/w2", "10.9.0.9").unwrap();
        assert!(!judged[0].passes && judged[0].ingress.why.contains("isolated"), "{judged:?}");
        let failed = judge("w9", "w1").unwrap_err();
        assert!(failed.0.message.starts_with("there is no endpoint w9 in the namespace default"));
        let failed = judge("fd00::1", "w1").unwrap_err();
        assert!(failed.0.message.contains("no addresses of one family"));
    }

    #[test]
    fn dropped_connections_come_with_their_ends_and_policies() {
        let world = world();
        // From w2 to w1, TCP port 80: addresses, protocol with padding, port with padding.
        let key = [10, 9, 0, 18, 10, 9, 0, 9, 6, 0, 0, 0, 0, 80, 0, 0];
        let drops =
            drops(&world.view, none(&Admitted::default()), counted(&key, 3, Some(REMEMBERED_MS - 500)));
        assert_eq!(drops.len(), 1);
        let drop = &drops[0];
        assert_eq!((drop.packets, drop.last_ms, drop.port), (3, 500, Some(80)));
        assert_eq!(drop.from_endpoint.as_deref(), Some("default/w2"));
        assert_eq!(drop.to_endpoint.as_deref(), Some("default/w1"));
        assert_eq!((drop.policies.len(), &*drop.direction), (1, Direction::Ingress.name()));
    }

    #[test]
    fn metrics_name_the_endpoint() {
        let mut page = Page::default();
        add_refused(&mut page, &world().view, &refused(counted(&[10, 9, 0, 9], 7, None)));
        let text = page.render(ovl_metrics::Format::Prometheus);
        assert!(text.contains("endpoint=\"w1\",address=\"10.9.0.9\"") && text.contains("} 7\n"), "{text}");
        assert!(
            text.contains("direction=\"ingress\",network=\"") && text.contains(",policies=\"default/"),
            "{text}"
        );
    }
}
