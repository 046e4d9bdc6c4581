//! Network policies: marks changes that affect them, and answers requests about them.

use std::collections::BTreeMap;
use std::net::IpAddr;

use ovl_cluster::view::Placed;
use ovl_control::{PolicyDrop, PolicyJudgement, PolicyRow, PolicySide};
use ovl_dataplane::nft::Table;
use ovl_proto::id::EndpointId;
use ovl_proto::resource::{Name, Protocol};
use ovl_proto::table::Endpoint;
use ovl_subsystems::policy::explain::{ConnectionEnd, Shown, Side, describe, explain};
use ovl_subsystems::policy::refused::{Connection, Counter, REMEMBERED_MS};
use ovl_subsystems::policy::{Direction, Policies, protocol_number};

use super::metrics::{head, line};
use super::state::State;
use super::{Failed, Node};
use ovl_subsystems::Change;

/// An endpoint that is being created, made known to policies. Dropped when it is in the table or the attach
/// failed.
pub(super) struct Policed<'a> {
    node: &'a Node,
    id: EndpointId,
}

impl Drop for Policed<'_> {
    fn drop(&mut self) {
        let mut guard = self.node.state.borrow_mut();
        let state = &mut *guard;
        if let Some(endpoint) = state.local.attaching.remove(&self.id) {
            state.changed(Change::Attaching(&endpoint));
            self.node.work.notify_one();
        }
    }
}

impl Node {
    /// Makes an endpoint known to policies before it exists.
    pub(super) fn police_attach(&self, endpoint: &Endpoint) -> Policed<'_> {
        let mut guard = self.state.borrow_mut();
        let state = &mut *guard;
        state.local.attaching.insert(endpoint.id, endpoint.clone());
        state.changed(Change::Attaching(endpoint));
        Policed { node: self, id: endpoint.id }
    }
}

/// Number of packets that policies dropped, by direction and endpoint address.
type Refused = BTreeMap<(Direction, IpAddr), u64>;

impl Node {
    async fn refused(&self) -> Result<Refused, Failed> {
        let sets = Counter::all().map(Counter::by_endpoint).to_vec();
        let counts = self.kernel.counts(Table::Policy, sets).await.map_err(Failed::from)?;
        let mut refused = Refused::new();
        for (counter, counts) in Counter::all().iter().zip(counts) {
            for counted in counts {
                if let Some(address) = counter.address(&counted.key) {
                    refused.insert((counter.direction, address), counted.packets);
                }
            }
        }
        Ok(refused)
    }

    /// Lists all policies, with the number of packets that each dropped on this host.
    pub(super) async fn policy_ls(&self) -> Result<Vec<PolicyRow>, Failed> {
        let refused = self.refused().await?;
        let state = self.state.borrow();
        let policies = Policies::new(&state.view.resources);
        let mut rows: BTreeMap<&Name, PolicyRow> = policies
            .iter()
            .map(|policy| {
                let isolating = Direction::ALL.into_iter().filter(|way| policy.rules(*way).is_some());
                let rules = Direction::ALL.into_iter().flat_map(|direction| {
                    let rules = policy.rules(direction).into_iter().flatten();
                    let policies = &policies;
                    rules.map(move |rule| {
                        format!("{}: {}", direction.name(), describe(policies, rule, direction))
                    })
                });
                let row = PolicyRow {
                    namespace: policy.name.namespace.clone(),
                    name: policy.name.name.clone(),
                    selects: Shown(&policy.selector).to_string(),
                    isolates: isolating.map(|way| way.name().to_owned()).collect(),
                    endpoints: 0,
                    refused: 0,
                    rules: rules.collect(),
                };
                (&policy.name, row)
            })
            .collect();
        for Placed { node, endpoint } in state.view.all_endpoints() {
            for policy in policies.selecting(&endpoint.namespace, &state.view.resources.labels(endpoint)) {
                let Some(row) = rows.get_mut(&policy.name) else { continue };
                row.endpoints += 1;
                if node.record.id != state.view.me {
                    continue;
                }
                for direction in Direction::ALL.into_iter().filter(|way| policy.rules(*way).is_some()) {
                    let addresses = endpoint.addresses.iter().map(|net| (direction, net.addr()));
                    row.refused += addresses.filter_map(|key| refused.get(&key)).sum::<u64>();
                }
            }
        }
        Ok(rows.into_values().collect())
    }

    /// Explains the verdict of all policies on a connection. `port` is `None` for a protocol without ports.
    pub(super) fn policy_explain(
        &self,
        from: &str,
        to: &str,
        port: Option<(Protocol, u16)>,
    ) -> Result<Vec<PolicyJudgement>, Failed> {
        let state = self.state.borrow();
        let policies = Policies::new(&state.view.resources);
        let (sources, targets) = (addresses(&state, from)?, addresses(&state, to)?);
        let mut judgements = Vec::new();
        for from in &sources {
            for to in targets.iter().filter(|to| to.is_ipv4() == from.is_ipv4()) {
                let [source, target] = [from, to].map(|address| ConnectionEnd::of(&state.view, *address));
                let judged = explain(&state.view, &policies, &source, &target, port);
                judgements.push(PolicyJudgement {
                    from: *from,
                    to: *to,
                    passes: judged.passes(),
                    egress: side(judged.egress, &source, Direction::Egress),
                    ingress: side(judged.ingress, &target, Direction::Ingress),
                });
            }
        }
        if judgements.is_empty() {
            return Err(Failed::invalid(format!("{from} and {to} have no addresses of one family")));
        }
        Ok(judgements)
    }

    /// Lists the connections of which packets were dropped recently.
    pub(super) async fn policy_drops(&self) -> Result<Vec<PolicyDrop>, Failed> {
        let sets = Counter::all().map(Counter::by_connection).to_vec();
        let counts = self.kernel.counts(Table::Policy, sets).await.map_err(Failed::from)?;
        let state = self.state.borrow();
        let policies = Policies::new(&state.view.resources);
        let mut drops = Vec::new();
        for (counter, counts) in Counter::all().iter().zip(counts) {
            for counted in counts {
                let Some(connection) = counter.connection(&counted.key) else { continue };
                let left = counted.left_ms.unwrap_or(REMEMBERED_MS);
                drops.push(PolicyDrop {
                    packets: counted.packets,
                    last_ms: REMEMBERED_MS.saturating_sub(left),
                    ..drop_of(&state, &policies, counter.direction, connection)
                });
            }
        }
        drops.sort_by_key(|drop| drop.last_ms);
        Ok(drops)
    }

    /// Renders the dropped packets in Prometheus' text format. Empty if there are no policies.
    pub(super) async fn policy_metrics(&self) -> Result<String, Failed> {
        let mut text = String::new();
        if self.state.borrow().view.resources.policies().is_empty() {
            return Ok(text);
        }
        let refused = self.refused().await?;
        let state = self.state.borrow();
        let count = state.view.resources.policies().len() as u64;
        head(&mut text, "ovl_policies", "Network policies in the cluster", "gauge");
        line(&mut text, "ovl_policies", &[], count);
        let name = "ovl_policy_refused_packets_total";
        head(
            &mut text,
            name,
            "Packets that no policy of an isolated endpoint of this host let pass",
            "counter",
        );
        for ((direction, address), packets) in &refused {
            let Some(placed) = ConnectionEnd::of(&state.view, *address).endpoint else { continue };
            let labels = [
                ("namespace", &*placed.endpoint.namespace),
                ("endpoint", &*placed.endpoint.name),
                ("address", &*address.to_string()),
                ("direction", direction.name()),
            ];
            line(&mut text, name, &labels, *packets);
        }
        Ok(text)
    }
}

/// Returns the addresses of an endpoint, given as its name, as `NAMESPACE/NAME` or as an address.
fn addresses(state: &State, text: &str) -> Result<Vec<IpAddr>, Failed> {
    if let Ok(address) = text.parse() {
        return Ok(vec![address]);
    }
    let (namespace, name) = text.split_once('/').unwrap_or(("default", text));
    let named = state
        .view
        .all_named(name)
        .filter(|placed| placed.endpoint.namespace == namespace && state.view.counts(placed.node));
    let addresses: Vec<IpAddr> =
        named.flat_map(|placed| &placed.endpoint.addresses).map(|net| net.addr()).collect();
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

fn side(side: Side, end: &ConnectionEnd<'_>, direction: Direction) -> PolicySide {
    let passes = side.passes();
    let who = full_name(end).unwrap_or_else(|| end.address.to_string());
    let direction = direction.name();
    let (policies, rule, why) = match side {
        Side::Outside => (Vec::new(), None, format!("{who} is no endpoint: policies are not about it")),
        Side::AtHome => (Vec::new(), None, format!("between {who} and itself, or its own host, all passes")),
        Side::NotIsolated => (Vec::new(), None, format!("no policy isolates {who} for {direction}")),
        Side::Passes { policy, rule, says } => (
            vec![policy.to_string()],
            Some(rule as u64),
            format!("{direction} rule {rule} of {policy}: {says}"),
        ),
        Side::Refused(policies) => {
            let names: Vec<String> = policies.iter().map(ToString::to_string).collect();
            let why = format!(
                "{who} is isolated for {direction} by {}, and no rule lets this pass",
                names.join(" and ")
            );
            (names, None, why)
        }
    };
    PolicySide { passes, policies, rule, why }
}

fn drop_of(state: &State, policies: &Policies, direction: Direction, connection: Connection) -> PolicyDrop {
    let Connection { from, to, protocol, port } = connection;
    let [source, target] = [from, to].map(|address| ConnectionEnd::of(&state.view, address));
    let own = match direction {
        Direction::Ingress => &target,
        Direction::Egress => &source,
    };
    let isolating = own.endpoint.map_or_else(Vec::new, |placed| {
        let labels = state.view.resources.labels(placed.endpoint);
        let selecting = policies.selecting(&placed.endpoint.namespace, &labels).into_iter();
        let isolating = selecting.filter(|policy| policy.rules(direction).is_some());
        isolating.map(|policy| policy.name.to_string()).collect()
    });
    let known = [Protocol::Tcp, Protocol::Udp, Protocol::Sctp];
    let known = known.into_iter().find(|known| protocol_number(*known) == protocol);
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
        policies: isolating,
    }
}
