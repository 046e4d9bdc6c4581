//! Counts of the objects on a host. The difference of two counts shows leaks.

use std::collections::BTreeMap;
use std::fs;
use std::net::Ipv6Addr;
use std::path::Path;

use anyhow::{Context, Result};
use netns_lab::{Host, Netns};
use serde_json::Value;

pub(crate) const VETHS: &str = "veths";
pub(crate) const DESCRIPTORS: &str = "file descriptors of ovld";
pub(crate) const NFT: &str = "nft objects and elements";

/// Number of objects by kind.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Standing(BTreeMap<&'static str, i64>);

impl Standing {
    /// Counts the kernel objects in a host's namespace.
    pub(crate) fn of_kernel(host: &Netns) -> Result<Self> {
        let count = |value: Value| value.as_array().map_or(0, Vec::len);
        let nft = host.exec_ok(["nft", "-j", "list", "ruleset"])?;
        let nft: Value = serde_json::from_str(&nft).context("`nft -j` gave no JSON")?;
        Ok(Standing::from([
            (VETHS, count(host.ip_json(&["link", "show", "type", "veth"])?)),
            ("links", count(host.ip_json(&["link", "show"])?)),
            ("addresses of the host", count(host.ip_json(&["address", "show"])?)),
            ("routes", count(host.ip_json(&["-4", "route", "show", "table", "all"])?)),
            ("IPv6 routes", stated(&host.ip_json(&["-6", "route", "show", "table", "all"])?)),
            ("rules", count(host.ip_json(&["rule", "show"])?)),
            ("permanent neighbours", count(host.ip_json(&["neigh", "show", "nud", "permanent"])?)),
            ("FDB entries", count(host.bridge_json(&["fdb", "show"])?)),
            (NFT, nft_count(&nft)),
        ]))
    }

    /// Counts the kernel objects of a host and the objects of its daemon.
    pub(crate) fn of_host(host: &Host) -> Result<Self> {
        let endpoints = host.ctl_json(&["endpoints"])?;
        let pid = host.pid().with_context(|| format!("ovld is not running on {}", host.name()))?;
        Ok(Standing::of_kernel(host)?
            .with("endpoints of ovld", endpoints.as_array().map_or(0, Vec::len))
            .with(DESCRIPTORS, fs::read_dir(format!("/proc/{pid}/fd"))?.count())
            .with("files of ovld", files_in(&host.state_dir())? + files_in(&host.run_dir())?))
    }

    /// Adds a count.
    pub(crate) fn with(mut self, name: &'static str, count: usize) -> Self {
        self.0.insert(name, i64::try_from(count).unwrap_or(i64::MAX));
        self
    }

    /// Returns the differences to an earlier count; negative if there are fewer now.
    pub(crate) fn since(&self, before: &Standing) -> Standing {
        let names = self.0.keys().chain(before.0.keys());
        Standing(
            names
                .map(|name| (*name, self.get(name) - before.get(name)))
                .filter(|(_, difference)| *difference != 0)
                .collect(),
        )
    }

    pub(crate) fn get(&self, name: &str) -> i64 {
        self.0.get(name).copied().unwrap_or(0)
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Formats the counts: `+2 veths, -1 routes`.
    pub(crate) fn text(&self) -> String {
        self.0.iter().map(|(name, count)| format!("{count:+} {name}")).collect::<Vec<_>>().join(", ")
    }
}

impl<const N: usize> From<[(&'static str, usize); N]> for Standing {
    fn from(counts: [(&'static str, usize); N]) -> Self {
        counts.into_iter().fold(Standing::default(), |standing, (name, count)| standing.with(name, count))
    }
}

/// Counts the routes that somebody has set. The kernel itself adds those to own link-local addresses, and to the anycast
/// address of routers, once it knows that no neighbour has the address. That takes seconds (RFC 4862, section 5.4), and begins
/// again when a bridge gets its first port.
fn stated(routes: &Value) -> usize {
    let routes = routes.as_array().into_iter().flatten();
    routes.filter(|route| !(of_this_host(route) && is_link_local(&route["dst"]))).count()
}

fn of_this_host(route: &Value) -> bool {
    route["type"] == "local" || route["type"] == "anycast"
}

fn is_link_local(destination: &Value) -> bool {
    let address = destination.as_str().and_then(|text| text.parse::<Ipv6Addr>().ok());
    address.is_some_and(|address| address.is_unicast_link_local())
}

/// Counts tables, chains, rules, sets, maps and elements.
fn nft_count(ruleset: &Value) -> usize {
    let objects = ruleset["nftables"].as_array().into_iter().flatten();
    let objects = objects.filter_map(Value::as_object).flat_map(|object| object.iter());
    objects
        .filter(|(kind, _)| *kind != "metainfo")
        .map(|(_, object)| 1 + object["elem"].as_array().map_or(0, Vec::len))
        .sum()
}

fn files_in(dir: &Path) -> Result<usize> {
    let mut count = 0;
    for entry in fs::read_dir(dir).with_context(|| format!("cannot list {}", dir.display()))? {
        let entry = entry?;
        count += if entry.file_type()?.is_dir() { files_in(&entry.path())? } else { 1 };
    }
    Ok(count)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn differences_are_computed_and_formatted() {
        let before = Standing::from([("a", 1), ("b", 2), ("c", 3)]);
        let after = Standing::from([("a", 1), ("b", 4), ("c", 1), ("d", 1)]);
        let difference = after.since(&before);
        assert_eq!(difference.text(), "+2 b, -2 c, +1 d");
        assert_eq!((difference.get("b"), difference.get("a")), (2, 0));
        assert!(before.since(&before).is_empty());
    }

    #[test]
    fn routes_that_the_kernel_adds_after_a_while_are_not_counted() {
        let mut routes = json!([
            {"dst": "fe80::/64", "dev": "cni0", "protocol": "kernel"},
            {"type": "local", "dst": "fd00::1", "dev": "lo", "table": "local"},
            {"type": "local", "dst": "10.0.0.1", "dev": "lo", "table": "local"},
        ]);
        assert_eq!(stated(&routes), 3);
        for (kind, address) in [("local", "fe80::5c1a:7dff:fe16:8e1f"), ("anycast", "fe80::")] {
            let added = json!({"type": kind, "dst": address, "dev": "cni0", "table": "local"});
            routes.as_array_mut().unwrap().push(added);
        }
        assert_eq!(stated(&routes), 3);
    }

    #[test]
    fn elements_are_counted() {
        let ruleset = json!({"nftables": [
            {"metainfo": {"version": "1.0.6"}},
            {"table": {"name": "t"}},
            {"set": {"name": "s", "elem": ["10.0.0.1", "10.0.0.2"]}},
            {"map": {"name": "m", "elem": [["10.0.0.1", "x"]]}},
            {"set": {"name": "empty"}},
            {"rule": {"expr": []}},
        ]});
        assert_eq!(nft_count(&ruleset), 8);
        assert_eq!(nft_count(&json!({})), 0);
    }
}
