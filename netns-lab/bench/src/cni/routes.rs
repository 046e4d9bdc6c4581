//! `routes`: the kernel entries that a host's pods need on its peers.

use std::collections::BTreeSet;
use std::net::IpAddr;

use anyhow::{Context, Result, ensure};
use netns_lab::Host;
use serde_json::{Value, json};

use super::ground;
use super::plugin::{Pod, Verb};
use crate::Bench;
use crate::report::{Bar, Figure, Row};

const HOSTS: usize = 3;
/// Number of pods of the bar. They fit into one block.
const PODS: usize = 250;

/// The entries of a peer's kernel for a host's pods.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Held {
    routes: usize,
    neighbours: usize,
    forwarding: usize,
}

pub(crate) fn measure(bench: &Bench) -> Result<Figure> {
    bench.ovl_cni()?;
    let lab = bench.lab(HOSTS)?;
    lab.start_all()?;
    // Name the backend explicitly: the entries in a peer's kernel depend on it.
    ground::network(&lab, ground::NETWORK, &["--subnet", ground::SUBNET, "--backend", "vxlan"])?;
    let host = &lab["h1"];
    let plugin = ground::plugin(bench, host, ground::NETWORK)?;
    let peers = &lab.hosts()[1..];
    let mut probes = Vec::new();
    for peer in peers {
        let plugin = ground::plugin(bench, peer, ground::NETWORK)?;
        probes.push(ground::pod(&plugin, peer, "probe")?);
    }
    let workloads = host.bare_workloads("pod", PODS)?;
    let pods = Pod::all(&workloads);
    let addresses = plugin.on_host(|caller| {
        pods.iter().map(|pod| caller.call(Verb::Add, pod)?.address()).collect::<Result<Vec<IpAddr>>>()
    })?;
    let distinct: BTreeSet<IpAddr> = addresses.iter().copied().collect();
    ensure!(distinct.len() == PODS, "{PODS} pods have {} addresses", distinct.len());

    // Count when the last pod is reachable: the entries that exist by then are sufficient.
    let last = *addresses.last().context("no pods")?;
    for (probe, _) in &probes {
        probe.ping_until(last, ground::SETTLE_TIMEOUT)?;
    }
    let held = peers.iter().map(|peer| held(peer, host, &addresses)).collect::<Result<Vec<_>>>()?;
    plugin.on_host(|caller| pods.iter().try_for_each(|pod| caller.call(Verb::Del, pod).map(drop)))?;

    let most = |of: fn(&Held) -> usize| held.iter().map(of).max().unwrap_or(usize::MAX) as f64;
    Ok(Figure {
        setup: format!(
            "{HOSTS} hosts, a routed network (vxlan), {PODS} pods on h1 and one on each of the others; counted in \
             the kernels of the others once their pods reach the last of the {PODS}: the routes that any of these \
             addresses match, the permanent neighbours that these go through, the FDB entries towards h1; the \
             most of any host"
        ),
        rows: vec![
            Row::with_bar(
                &format!("routes on a peer for {PODS} pods"),
                most(|held| held.routes),
                "",
                Bar::AtMost(1.0),
            ),
            Row::with_bar("neighbours", most(|held| held.neighbours), "", Bar::AtMost(1.0)),
            Row::with_bar("FDB entries", most(|held| held.forwarding), "", Bar::AtMost(1.0)),
        ],
        notes: Vec::new(),
        details: json!({
            "pods": PODS,
            "of_each_peer": held
                .iter()
                .map(|held| json!({
                    "routes": held.routes, "neighbours": held.neighbours, "fdb": held.forwarding,
                }))
                .collect::<Vec<_>>(),
        }),
    })
}

/// Counts a peer's entries for a host's pods. Fails if a pod has no route.
fn held(peer: &Host, host: &Host, pods: &[IpAddr]) -> Result<Held> {
    let routes = peer.ip_json(&["route", "show", "table", "all"])?;
    let used = routes_used(&routes, pods).with_context(|| format!("on {}", peer.name()))?;
    let gateways: BTreeSet<&str> = used.iter().filter_map(|route| route["gateway"].as_str()).collect();
    let neighbours = peer.ip_json(&["neigh", "show", "nud", "permanent"])?;
    let underlay = host.address()?;
    let is_neighbour = |entry: &&Value| entry["dst"].as_str().is_some_and(|dst| gateways.contains(dst));
    let forwarding = peer.bridge_json(&["fdb", "show"])?;
    let towards_host =
        |entry: &&Value| entry["dst"].as_str().and_then(|dst| dst.parse::<IpAddr>().ok()) == Some(underlay);
    Ok(Held {
        routes: used.len(),
        neighbours: neighbours.as_array().into_iter().flatten().filter(is_neighbour).count(),
        forwarding: forwarding.as_array().into_iter().flatten().filter(towards_host).count(),
    })
}

/// Returns the routes that match any of the addresses, except a default route and those of the kernel's own
/// tables.
fn routes_used<'a>(routes: &'a Value, addresses: &[IpAddr]) -> Result<Vec<&'a Value>> {
    let routes: Vec<(&Value, Prefix)> = routes
        .as_array()
        .into_iter()
        .flatten()
        .filter(|route| route["type"].as_str().is_none_or(|kind| kind == "unicast"))
        .filter_map(|route| Some((route, Prefix::parse(route["dst"].as_str()?)?)))
        .collect();
    for address in addresses {
        ensure!(routes.iter().any(|(_, prefix)| prefix.contains(*address)), "no route to {address}");
    }
    let used = routes
        .into_iter()
        .filter(|(_, prefix)| addresses.iter().any(|address| prefix.contains(*address)))
        .map(|(route, _)| route);
    Ok(used.collect())
}

/// A destination as printed by `ip`, which prints a single address without a prefix length.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Prefix {
    address: IpAddr,
    length: u32,
}

impl Prefix {
    /// Parses a prefix. `None` for `default` and anything else that is not a prefix.
    fn parse(text: &str) -> Option<Self> {
        let (address, length) = text.split_once('/').map_or((text, None), |(a, l)| (a, Some(l)));
        let address: IpAddr = address.parse().ok()?;
        let bits = if address.is_ipv4() { 32 } else { 128 };
        let length = length.map_or(Ok(bits), str::parse).ok().filter(|length| *length <= bits)?;
        Some(Prefix { address, length })
    }

    fn contains(self, other: IpAddr) -> bool {
        // Compare as 128 bits, aligned to the left.
        let left = |address: IpAddr| match address {
            IpAddr::V4(v4) => u128::from(v4.to_bits()) << 96,
            IpAddr::V6(v6) => v6.to_bits(),
        };
        let differing = left(self.address) ^ left(other);
        self.address.is_ipv4() == other.is_ipv4()
            && differing.checked_shr(128 - self.length).unwrap_or(0) == 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn prefixes_contain_their_addresses() {
        let contains =
            |prefix: &str, address: &str| Prefix::parse(prefix).unwrap().contains(address.parse().unwrap());
        assert!(contains("10.60.3.0/24", "10.60.3.255") && !contains("10.60.3.0/24", "10.60.4.0"));
        assert!(contains("10.60.3.7", "10.60.3.7") && !contains("10.60.3.7", "10.60.3.6"));
        assert!(contains("0.0.0.0/0", "1.2.3.4") && !contains("0.0.0.0/0", "::1"));
        assert!(contains("fd00:1::/64", "fd00:1::5") && !contains("fd00:1::/64", "fd00:2::5"));
        assert_eq!(Prefix::parse("default"), None);
        assert_eq!(Prefix::parse("10.0.0.0/33"), None);
    }

    #[test]
    fn only_routes_to_pods_are_counted() {
        let routes = json!([
            {"dst": "default", "gateway": "192.168.77.254"},
            {"dst": "10.60.2.0/24", "gateway": "10.60.2.0", "dev": "vx"},
            {"dst": "10.60.3.0/24", "gateway": "10.60.3.0", "dev": "vx"},
            {"dst": "10.60.0.0/16", "type": "unreachable"},
            {"dst": "10.60.3.1", "type": "local", "dev": "lo"},
            {"dst": "192.168.77.0/24", "dev": "eth0"},
        ]);
        let pods = |text: &[&str]| text.iter().map(|each| each.parse().unwrap()).collect::<Vec<IpAddr>>();
        let used = routes_used(&routes, &pods(&["10.60.3.1", "10.60.3.2"])).unwrap();
        assert_eq!(used, [&json!({"dst": "10.60.3.0/24", "gateway": "10.60.3.0", "dev": "vx"})]);
        assert_eq!(routes_used(&routes, &pods(&["10.60.3.1", "10.60.2.9"])).unwrap().len(), 2);
        assert!(routes_used(&routes, &pods(&["10.60.3.1", "10.60.4.1"])).is_err());
    }
}
