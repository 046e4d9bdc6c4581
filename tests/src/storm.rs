//! What tests with random faults share: the ways between hosts, and an open connection of each pair.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use netns_lab::Lab;

use crate::routed::create_routed_network;
use crate::{Attached, Connection, SOON, attach, ping_all_pairs, rows};

/// The places of two hosts in the list of all hosts.
pub type Pair = (usize, usize);

/// An open connection of each pair.
pub type Connections = Vec<(Pair, Connection)>;

/// How a host reaches another one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Way {
    /// The members between them.
    pub via: Vec<String>,
    /// Whether it begins with TCP.
    pub tcp: bool,
}

/// The ways from each host to each other one, by their names.
pub type Ways = BTreeMap<(String, String), Way>;

/// Returns the ways between all hosts, as they say themselves.
///
/// # Errors
///
/// A host is not alive for another one.
pub fn ways(lab: &Lab) -> Result<Ways> {
    let mut ways = BTreeMap::new();
    for host in lab.hosts() {
        for row in rows(host, &["peers"])?.iter().filter(|row| row["name"] != host.name()) {
            ensure!(row["state"] == "alive", "{} says {row}", host.name());
            let via = row["via"].as_array().context("no path")?;
            let via = via.iter().filter_map(|name| Some(name.as_str()?.to_owned())).collect();
            let name = row["name"].as_str().unwrap_or_default().to_owned();
            ways.insert((host.name().to_owned(), name), Way { via, tcp: row["tcp"] == true });
        }
    }
    let hosts = lab.hosts().len();
    ensure!(ways.len() == hosts * (hosts - 1), "{ways:?}");
    Ok(ways)
}

/// Attaches an endpoint of an encrypted routed network on each host, and opens a connection between each two of them, whose reads
/// fail after `patience`. The endpoints must outlive the connections.
///
/// # Errors
///
/// An endpoint cannot be attached, or does not reach another one.
pub fn connect_pairs(lab: &Lab, patience: Duration) -> Result<(Vec<Attached>, Connections)> {
    let options = ["--encrypted", "--subnet", "10.60.0.0/16", "--subnet", "fd60::/48"];
    create_routed_network(lab, "pods", &options)?;
    let attach = |host| attach(host, &format!("p{}", host.name()), "pods", &[]);
    let pods: Vec<Attached> = lab.hosts().iter().map(attach).collect::<Result<_>>()?;
    ping_all_pairs(&pods, SOON)?;
    let pairs = (0..pods.len()).flat_map(|one| (one + 1..pods.len()).map(move |other| (one, other)));
    let connect =
        |(one, other): Pair| Ok(((one, other), Connection::open(&pods[one], &pods[other], patience)?));
    let connections = pairs.map(connect).collect::<Result<_>>()?;
    Ok((pods, connections))
}

/// Uses all connections for two seconds.
///
/// # Errors
///
/// One of them fails, or waits for a second.
pub fn use_steadily(connections: &mut [(Pair, Connection)]) -> Result<()> {
    let start = Instant::now();
    while start.elapsed() < Duration::from_secs(2) {
        for ((one, other), connection) in &mut *connections {
            let took = connection.echo(2000)?;
            ensure!(took < Duration::from_secs(1), "{one} to {other}: {took:?} on a steady path");
        }
    }
    Ok(())
}

/// Runs a test of `OVL_STORM_MINUTES` (30) with the seed `OVL_STORM_SEED` (1): it gets the time, the least number of rounds, and the
/// seed.
pub fn for_long(storm: impl FnOnce(Duration, usize, u64)) {
    let number = |name: &str, default: u64| {
        std::env::var(name).ok().and_then(|text| text.parse().ok()).unwrap_or(default)
    };
    storm(Duration::from_secs(60 * number("OVL_STORM_MINUTES", 30)), 1, number("OVL_STORM_SEED", 1));
}
