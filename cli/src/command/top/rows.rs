//! The rows of `ovlctl top`: what two samples of the cluster say together. Pure.

use std::collections::BTreeMap;

use ovl_control::{EndpointCounters, EndpointState, HostReport, Overview, Pair, PeerState, Reports};
use ovl_proto::object::Encrypt;
use serde::Serialize;

use super::flows::FlowRow;

/// The cluster at one moment.
#[derive(Debug, Clone)]
pub(crate) struct Sample {
    /// What it consists of.
    pub(crate) overview: Overview,
    /// What the members say of themselves.
    pub(crate) reports: Reports,
}

/// What passed, a second. `None` if it is not known yet.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize)]
pub(crate) struct Rates {
    /// Bytes that endpoints sent.
    pub(crate) sent_bytes: Option<f64>,
    /// Bytes that endpoints received.
    pub(crate) received_bytes: Option<f64>,
    /// Packets that endpoints sent or received.
    pub(crate) packets: Option<f64>,
    /// Packets that were dropped: by network policies, by source checks, by the devices of endpoints.
    pub(crate) drops: Option<f64>,
}

impl Rates {
    fn between(before: &EndpointCounters, now: &EndpointCounters, seconds: f64) -> Self {
        let rate =
            |of: &dyn Fn(&EndpointCounters) -> u64| Some(of(now).saturating_sub(of(before)) as f64 / seconds);
        Self {
            sent_bytes: rate(&|it| it.sent_bytes),
            received_bytes: rate(&|it| it.received_bytes),
            packets: rate(&|it| it.sent_packets.saturating_add(it.received_packets)),
            drops: rate(&EndpointCounters::drops),
        }
    }

    /// Adds what is known.
    fn add(&mut self, other: Self) {
        let sum = |a: &mut Option<f64>, b: Option<f64>| {
            if let Some(b) = b {
                *a = Some(a.unwrap_or(0.0) + b);
            }
        };
        sum(&mut self.sent_bytes, other.sent_bytes);
        sum(&mut self.received_bytes, other.received_bytes);
        sum(&mut self.packets, other.packets);
        sum(&mut self.drops, other.drops);
    }
}

/// A host.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub(crate) struct HostRow {
    /// The name.
    pub(crate) host: String,
    /// The liveness.
    pub(crate) state: PeerState,
    /// Whether it said something of itself.
    pub(crate) answered: bool,
    /// The number of its endpoints.
    pub(crate) endpoints: u32,
    /// The number of its problems.
    pub(crate) problems: usize,
    /// The round trip from the local host, through the path of packets of workloads if one is probed, in microseconds.
    pub(crate) rtt_us: Option<u64>,
    /// The largest loss of a path from the local host to it or back, in percent.
    pub(crate) loss_percent: Option<u8>,
    /// What passed its endpoints.
    pub(crate) per_second: Rates,
}

/// An endpoint.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub(crate) struct EndpointRow {
    /// The Kubernetes namespace.
    pub(crate) namespace: String,
    /// The name.
    pub(crate) name: String,
    /// The network.
    pub(crate) network: String,
    /// The host.
    pub(crate) host: String,
    /// The addresses.
    pub(crate) addresses: Vec<std::net::IpAddr>,
    /// The state.
    pub(crate) state: EndpointState,
    /// What passed it.
    pub(crate) per_second: Rates,
    /// How many packets were dropped since it was attached.
    pub(crate) dropped: Option<u64>,
}

/// A network.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub(crate) struct NetworkRow {
    /// The name.
    pub(crate) network: String,
    /// Whether it is encrypted.
    pub(crate) encrypted: bool,
    /// When it is encrypted.
    pub(crate) encrypt: Encrypt,
    /// The number of its endpoints.
    pub(crate) endpoints: u32,
    /// The number of hosts with endpoints on it.
    pub(crate) hosts: usize,
    /// What passed its endpoints.
    pub(crate) per_second: Rates,
}

/// All rows.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub(crate) struct Rows {
    /// The host that was asked.
    pub(crate) node: String,
    /// The time, in milliseconds since 1970.
    pub(crate) time_ms: u64,
    /// The hosts.
    pub(crate) hosts: Vec<HostRow>,
    /// The endpoints.
    pub(crate) endpoints: Vec<EndpointRow>,
    /// The networks.
    pub(crate) networks: Vec<NetworkRow>,
    /// The flows, if they are watched.
    pub(crate) flows: Vec<FlowRow>,
    /// The members that did not answer.
    pub(crate) unanswered: Vec<String>,
}

/// An endpoint, as counters name it.
type Key<'a> = (&'a str, &'a str, &'a str);

fn counted(report: &HostReport) -> BTreeMap<Key<'_>, &EndpointCounters> {
    report.endpoints.iter().map(|it| ((&*it.namespace, &*it.name, &*it.network), it)).collect()
}

impl Rows {
    /// Compares a sample with an earlier one.
    pub(crate) fn new(before: Option<&Sample>, now: &Sample) -> Self {
        let mut of_endpoints: BTreeMap<(&str, Key<'_>), (&EndpointCounters, Rates)> = BTreeMap::new();
        for report in &now.reports.hosts {
            let earlier = before
                .and_then(|sample| sample.reports.hosts.iter().find(|it| it.host == report.host))
                .filter(|earlier| earlier.run == report.run && earlier.at_ms < report.at_ms);
            let known = earlier.map(counted).unwrap_or_default();
            let seconds = earlier.map_or(0.0, |earlier| (report.at_ms - earlier.at_ms) as f64 / 1e3);
            for (key, counters) in counted(report) {
                let rates = known.get(&key).map(|earlier| Rates::between(earlier, counters, seconds));
                of_endpoints.insert((&report.host, key), (counters, rates.unwrap_or_default()));
            }
        }
        let overview = &now.overview;
        let endpoints: Vec<EndpointRow> = overview
            .endpoints
            .iter()
            .map(|it| {
                let key: Key<'_> = (&it.namespace, &it.name, &it.network);
                let found = of_endpoints.get(&(&*it.node, key));
                EndpointRow {
                    namespace: it.namespace.clone(),
                    name: it.name.clone(),
                    network: it.network.clone(),
                    host: it.node.clone(),
                    addresses: it.addresses.iter().map(|net| net.addr()).collect(),
                    state: it.state,
                    per_second: found.map(|(_, rates)| *rates).unwrap_or_default(),
                    dropped: found.map(|(counters, _)| counters.drops()),
                }
            })
            .collect();
        let total = |is_part: &dyn Fn(&EndpointRow) -> bool| {
            let mut sum = Rates::default();
            endpoints.iter().filter(|row| is_part(row)).for_each(|row| sum.add(row.per_second));
            sum
        };
        let own = now.reports.hosts.iter().find(|report| report.host == overview.node);
        let hosts = overview.hosts.iter().map(|host| {
            let report = now.reports.hosts.iter().find(|report| report.host == host.name);
            let pair = own.and_then(|own| own.pairs.iter().find(|pair| pair.id == host.id));
            HostRow {
                host: host.name.clone(),
                state: host.state,
                answered: report.is_some(),
                endpoints: host.endpoints,
                problems: report.map_or(0, |report| report.problems.len()),
                rtt_us: pair.and_then(round_trip),
                loss_percent: pair.and_then(loss),
                per_second: total(&|row| row.host == host.name),
            }
        });
        let networks = overview.networks.iter().map(|network| NetworkRow {
            network: network.name.clone(),
            encrypted: network.encrypted,
            encrypt: network.encrypt,
            endpoints: network.endpoints,
            hosts: network.nodes.len(),
            per_second: total(&|row| row.network == network.name),
        });
        Self {
            node: overview.node.clone(),
            time_ms: overview.time_ms,
            hosts: hosts.collect(),
            networks: networks.collect(),
            unanswered: now.reports.unanswered.clone(),
            flows: Vec::new(),
            endpoints,
        }
    }
}

fn round_trip(pair: &Pair) -> Option<u64> {
    pair.paths.iter().filter_map(|path| path.rtt_us).max().or(pair.rtt_us)
}

fn loss(pair: &Pair) -> Option<u8> {
    let ways = pair.paths.iter().flat_map(|path| [path.sent.loss_percent, path.received.loss_percent]);
    ways.flatten().chain(pair.tunnel_loss_percent).max()
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use serde_json::json;

    const OTHER: &str = "hlo8h26dtem5hmii";

    /// A sample of two hosts with one endpoint each, whose counters have been counting for some seconds.
    pub(crate) fn sample(seconds: u64) -> Sample {
        let host = |name: &str, own: bool| {
            json!({
                "name": name, "id": if own { "elh8trqajkpdmctn" } else { OTHER }, "address": "192.0.2.1:7940",
                "vtep": "192.0.2.1", "state": "alive", "last_heard_ms": null, "rtt_us": null, "endpoints": 1,
                "version": "0.1.0", "encryption": "none", "tunnel": null, "self": own, "member": true,
                "reachable": true, "path_mtu": 1500
            })
        };
        let endpoint = |name: &str, host: &str| {
            json!({
                "name": name, "namespace": "default", "network": "blue", "node": host, "mac": "02:00:00:00:00:01",
                "addresses": ["10.1.0.2/24"], "aliases": [], "labels": {}, "state": "ready", "ifname": null,
                "device": null, "publish": [], "ready": true
            })
        };
        let report = |host: &str, name: &str, factor: u64| {
            let way = json!({ "state": "works", "loss_percent": 5 });
            let path = json!({
                "encapsulation": "vxlan", "network": "blue", "mtu": 1450, "sent": way, "received": way, "rtt_us": 300
            });
            let pair = json!({
                "to": "h2", "id": OTHER, "state": "alive", "reachable": true, "rtt_us": 900,
                "encryption": "none", "tunnel_loss_percent": null, "paths": [path]
            });
            json!({
                "host": host, "at_ms": 1000 * seconds, "run": 7, "state": "ready", "problems": [], "pairs": [pair],
                "endpoints": [{
                    "namespace": "default", "name": name, "network": "blue",
                    "sent_bytes": 1000 * factor * seconds, "received_bytes": 0, "sent_packets": 10 * factor * seconds,
                    "received_packets": 0, "dropped_packets": 0, "refused_frames": seconds, "policy_packets": 0
                }]
            })
        };
        Sample {
            overview: serde_json::from_value(json!({
                "node": "h1", "time_ms": 5, "hosts": [host("h1", true), host("h2", false)], "networks": [],
                "endpoints": [endpoint("a", "h1"), endpoint("b", "h2")], "services": []
            }))
            .unwrap(),
            reports: serde_json::from_value(json!({
                "hosts": [report("h1", "a", 1), report("h2", "b", 5)], "unanswered": []
            }))
            .unwrap(),
        }
    }

    #[test]
    fn rates_are_differences_over_the_time_of_the_host_that_counts() {
        let rows = Rows::new(Some(&sample(10)), &sample(14));
        let sent: Vec<_> = rows.endpoints.iter().map(|row| row.per_second.sent_bytes).collect();
        assert_eq!(sent, [Some(1000.0), Some(5000.0)]);
        assert_eq!(rows.endpoints[1].per_second.drops, Some(1.0));
        assert_eq!(rows.hosts[1].per_second.packets, Some(50.0));
        assert_eq!((rows.hosts[1].rtt_us, rows.hosts[1].loss_percent), (Some(300), Some(5)));
        assert_eq!(rows.hosts[0].rtt_us, None);
    }

    #[test]
    fn counters_of_another_run_and_a_first_sample_give_no_rates() {
        let mut earlier = sample(10);
        earlier.reports.hosts[0].run = 6;
        let rows = Rows::new(Some(&earlier), &sample(14));
        assert_eq!(rows.endpoints[0].per_second, Rates::default());
        assert_eq!(rows.endpoints[0].dropped, Some(14));
        assert_eq!(rows.endpoints[1].per_second.sent_bytes, Some(5000.0));
        assert_eq!(Rows::new(None, &sample(14)).endpoints[1].per_second, Rates::default());
    }
}
