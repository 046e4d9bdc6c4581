//! The whole cluster at one moment, for `ovlctl top` and the page: what this host knows, and what the members say of
//! themselves when they are asked.

use std::time::Duration;

use ovl_control::{EndpointCounters, EndpointInfo, HostReport, MAX_COUNTED, Overview, Pair, Reports};
use ovl_dataplane::device::Device;
use ovl_proto::resource::Kind;
use ovl_subsystems::policy::Direction;

use super::asking::Topic;
use super::{Failed, Node};
use crate::policy::Refused;

/// Time for the reports of other hosts. One that is not there by then is left out of this round.
const WITHIN: Duration = Duration::from_millis(1_500);

impl Node {
    /// Returns what the cluster consists of, as this host knows it.
    pub(super) async fn overview(&self) -> Overview {
        self.look_at_tunnel().await;
        let mut endpoints: Vec<EndpointInfo> = {
            let state = self.state.borrow();
            state.view.all_endpoints().map(|placed| self.endpoint_info(&state, placed)).collect()
        };
        endpoints.sort_by(|a, b| (&a.network, &a.name, &a.node).cmp(&(&b.network, &b.name, &b.node)));
        let all = ovl_control::ResourceQuery { kind: Kind::Service, namespace: None, name: None };
        Overview {
            node: self.config.node.clone(),
            time_ms: self.wall_ms(),
            hosts: self.peers(),
            networks: self.networks(),
            endpoints,
            services: self.service_backends(&all),
        }
    }

    /// Returns a number that changes with the overview, at little cost: not with what changes all the time, such as round trips,
    /// which reports have.
    pub(super) fn overview_version(&self) -> u64 {
        use std::hash::{DefaultHasher, Hash as _, Hasher as _};
        let state = self.state.borrow();
        let mut hasher = DefaultHasher::new();
        for node in state.view.nodes.values() {
            (node.record.id, node.record.revision, node.table.revision()).hash(&mut hasher);
            (node.state as u8).hash(&mut hasher);
        }
        // A record that is replaced without a change for the kernel, and objects that no subsystem hears of, count too.
        (state.objects.digest(), state.view.alloc.version, state.reconcile.changes()).hash(&mut hasher);
        hasher.finish()
    }

    /// Asks all members what they say of themselves.
    pub(super) async fn reports(&self) -> Reports {
        let (own, (others, mut unanswered)) =
            tokio::join!(self.report(), self.ask_members(Topic::Report, WITHIN));
        // What a host says of itself is shown under the name that its record has.
        let others = others.into_iter().map(|(host, report)| HostReport { host, ..report });
        unanswered.sort();
        Reports { hosts: std::iter::once(own).chain(others).collect(), unanswered }
    }

    /// Returns what this host says of itself.
    pub(super) async fn report(&self) -> HostReport {
        self.look_at_tunnel().await;
        let endpoints = self.endpoint_counters().await.unwrap_or_else(|Failed(failure)| {
            tracing::warn!(error = failure.message, "cannot read the counters of endpoints");
            Vec::new()
        });
        let status = self.status();
        let (at_ms, run) = {
            let state = self.state.borrow();
            (state.now(), state.record().map_or(0, |record| record.generation))
        };
        let pairs = self.peers().into_iter().filter(|peer| !peer.own).map(|peer| Pair {
            to: peer.name,
            id: peer.id,
            state: peer.state,
            reachable: peer.reachable,
            rtt_us: peer.rtt_us,
            encryption: peer.encryption,
            tunnel_loss_percent: peer.tunnel.and_then(|tunnel| tunnel.loss_percent),
            paths: peer.paths,
        });
        HostReport {
            host: status.node,
            at_ms,
            run,
            state: status.state,
            problems: status.problems,
            pairs: pairs.collect(),
            endpoints,
        }
    }

    async fn endpoint_counters(&self) -> Result<Vec<EndpointCounters>, Failed> {
        let traffic = self.kernel.traffic().await.map_err(Failed::from)?;
        let frames = self.refused_frames().await?;
        let has_policies = self.state.borrow().view.resources.has_policies();
        let by_policies = if has_policies { self.refused().await? } else { Refused::new() };
        let state = self.state.borrow();
        let counters = state.own_endpoints().take(MAX_COUNTED).map(|endpoint| {
            let network = state.view.networks.get(&endpoint.network);
            let passed = traffic.get(&Device::endpoint(endpoint.id)).copied().unwrap_or_default();
            let addresses = endpoint.addresses.iter().map(|net| net.addr());
            let refused = addresses
                .flat_map(|address| Direction::ALL.map(|way| (way, address)))
                .filter_map(|key| by_policies.get(&key));
            EndpointCounters {
                namespace: endpoint.namespace.clone(),
                name: endpoint.name.clone(),
                network: network.map_or_else(String::new, |found| found.network.name.clone()),
                sent_bytes: passed.sent_bytes,
                received_bytes: passed.received_bytes,
                sent_packets: passed.sent_packets,
                received_packets: passed.received_packets,
                dropped_packets: passed.dropped_packets,
                refused_frames: frames.get(&endpoint.id).copied().unwrap_or(0),
                policy_packets: refused.sum(),
            }
        });
        Ok(counters.collect())
    }
}
