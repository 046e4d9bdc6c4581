//! The invariants of a healed cluster at rest.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use anyhow::{Context as _, Result, bail, ensure};
use ovl_control::{DnsAnswer, DnsQuestion, Reply, Request};
use ovl_dataplane::diff::diff;
use ovl_proto::id::{NetworkId, NodeId};
use ovl_proto::object::Mode;
use ovl_proto::table::{Endpoint, Entry};
use ovld::Inspection;

use crate::host::Host;
use crate::kernels::{self, Placed};
use crate::world::{Given, World};

/// The domain of all names.
const DOMAIN: &str = "ovl.internal";

impl World {
    /// Checks the invariants of a healed cluster at rest, and returns all endpoints by host and name.
    ///
    /// # Errors
    ///
    /// Names the invariant that does not hold.
    pub(crate) async fn check(&self) -> Result<BTreeMap<(usize, String), Given>> {
        let all = self.inspect_all().await?;
        self.check_agreement(&all)?;
        self.check_keys(&all)?;
        let endpoints = self.check_endpoints(&all)?;
        self.check_kernels(&all, &endpoints)?;
        self.check_names(&endpoints).await?;
        let given = |placed: &Placed<'_>| {
            let Placed { host, network, endpoint } = *placed;
            let given = Given { network: network.clone(), addresses: endpoint.addresses.clone() };
            ((host, endpoint.name.clone()), given)
        };
        Ok(endpoints.iter().map(given).collect())
    }

    /// Checks what all hosts agree on.
    ///
    /// # Errors
    ///
    /// Names what differs.
    pub(crate) async fn check_tables(&self) -> Result<()> {
        let all = self.inspect_all().await?;
        self.check_agreement(&all)?;
        self.check_keys(&all)
    }

    /// All hosts have the same members, map and networks, and the table of each host.
    fn check_agreement(&self, all: &BTreeMap<usize, Inspection>) -> Result<()> {
        let living = self.living();
        ensure!(all.keys().eq(&living), "not all daemons run");
        let Some(first) = all.values().next() else { return Ok(()) };
        for (at, seen) in all {
            ensure!(seen.members.len() == living.len(), "host{at} counts {} members", seen.members.len());
            ensure!(seen.members == first.members, "host{at} has other members");
            ensure!(seen.version == first.version, "host{at} has map {} of {}", seen.version, first.version);
            ensure!(seen.networks == first.networks, "host{at} has other networks than the first host");
            let names: BTreeSet<&String> = seen.networks.values().collect();
            for network in self.networks.keys() {
                ensure!(
                    names.contains(network),
                    "network {network} was acknowledged and is lost on host{at}"
                );
            }
            for network in &self.removed {
                ensure!(!names.contains(network), "network {network} was removed and is there on host{at}");
            }
            let own = own_table(seen)?;
            for (other, view) in all {
                ensure!(view.tables.get(&seen.id) == Some(own), "host{other} has another table of host{at}");
            }
        }
        Ok(())
    }

    /// Every host has only the agreed cluster key, and an acknowledged rotation was not lost.
    fn check_keys(&self, all: &BTreeMap<usize, Inspection>) -> Result<()> {
        for (at, seen) in all {
            let agreed = match seen.agreed_key {
                Some(agreed) => agreed,
                None => self.keys.first().context("the world has no key")?.id(),
            };
            let index = self.keys.iter().position(|key| key.id() == agreed);
            ensure!(
                index.is_some_and(|index| index >= self.acknowledged_key),
                "the rotation to key {} was acknowledged and is lost on host{at}",
                self.acknowledged_key
            );
            ensure!(
                seen.keys.seals == agreed && seen.keys.opens.is_empty(),
                "host{at} has the keys {:?}, and {agreed} was agreed on",
                seen.keys
            );
        }
        Ok(())
    }

    /// No address is given twice, acknowledged endpoints are there, and detached ones are not. Returns all endpoints.
    fn check_endpoints<'a>(&self, all: &'a BTreeMap<usize, Inspection>) -> Result<Vec<Placed<'a>>> {
        let mut addresses: BTreeMap<(NetworkId, IpAddr), &Endpoint> = BTreeMap::new();
        let mut placed = Vec::new();
        for (at, seen) in all {
            let endpoints = own_table(seen)?.iter().filter_map(|entry| match entry {
                Entry::Endpoint(endpoint) => Some(endpoint),
                _ => None,
            });
            let mut own: BTreeMap<&str, &Endpoint> = BTreeMap::new();
            for endpoint in endpoints {
                for net in &endpoint.addresses {
                    let holder = addresses.insert((endpoint.network, net.addr()), endpoint);
                    if let Some(holder) = holder {
                        bail!("{} belongs to {} and to {}", net.addr(), holder.name, endpoint.name);
                    }
                }
                let key = (*at, endpoint.name.clone());
                let known = self.attached.contains_key(&key) || self.unknown.contains(&key);
                ensure!(known, "{} on host{at} was detached and is there", endpoint.name);
                own.insert(&endpoint.name, endpoint);
                let network =
                    seen.networks.get(&endpoint.network).context("an endpoint without a network")?;
                placed.push(Placed { host: *at, network, endpoint });
            }
            for ((_, name), info) in self.attached.iter().filter(|((host, _), _)| host == at) {
                let kept = own.get(name.as_str());
                let kept =
                    kept.with_context(|| format!("{name} on host{at} was acknowledged and is lost"))?;
                ensure!(
                    kept.addresses == info.addresses,
                    "{name} on host{at} has other addresses than before"
                );
            }
        }
        Ok(placed)
    }

    /// Each kernel holds what its daemon wants, and what the tables of all hosts say.
    fn check_kernels(&self, all: &BTreeMap<usize, Inspection>, endpoints: &[Placed<'_>]) -> Result<()> {
        let vteps: BTreeMap<usize, IpAddr> =
            self.hosts.iter().map(|host: &Host| host.address).enumerate().collect();
        for (at, seen) in all {
            let kernel = self.host(*at)?.kernel.dataplane();
            let ops = diff(&kernel, &seen.desired, true);
            if let Some(op) = ops.first() {
                bail!("the kernel of host{at} differs by {} operations, first: {op}", ops.len());
            }
            for (id, name) in &seen.networks {
                let on = endpoints.iter().filter(|placed| placed.endpoint.network == *id);
                let on: Vec<&Placed<'_>> = on.collect();
                let checked = match self.networks.get(name) {
                    Some(Mode::L3) => kernels::check_routed(&kernel, *at, *id, &on, &vteps),
                    Some(Mode::L2) => kernels::check_switched(&kernel, *at, *id, &on, &vteps),
                    // Its creation was not acknowledged.
                    None => Ok(()),
                };
                checked.with_context(|| format!("the kernel of host{at}, network {name}"))?;
            }
        }
        Ok(())
    }

    /// Every host resolves the names of its endpoints' networks, and no others.
    async fn check_names(&self, endpoints: &[Placed<'_>]) -> Result<()> {
        let mut named: BTreeMap<(&str, String), BTreeSet<String>> = BTreeMap::new();
        let mut askers: BTreeMap<(usize, &str), &str> = BTreeMap::new();
        for Placed { host, network, endpoint } in endpoints {
            let addresses = || endpoint.addresses.iter().map(|net| net.addr().to_string());
            for name in endpoint.canonical_names() {
                named.entry((network.as_str(), name)).or_default().extend(addresses());
            }
            askers.insert((*host, network.as_str()), &endpoint.name);
        }
        for (network, name) in &self.detached {
            named.entry((network.as_str(), name.clone())).or_default();
        }
        let mut answers = Vec::new();
        for ((host, network), asker) in askers {
            for ((_, name), expected) in named.iter().filter(|((on, _), _)| *on == network) {
                let question = DnsQuestion {
                    name: format!("{name}.{network}.{DOMAIN}"),
                    kind: "A".to_owned(),
                    from: Some(asker.to_owned()),
                    network: Some(network.to_owned()),
                };
                let answer = self.host(host)?.ask(Request::Dns(question)).context("not all daemons run")?;
                answers.push((host, name, network, expected, answer));
            }
        }
        for (host, name, network, expected, answer) in answers {
            let found = match answer.await {
                Ok(Reply::Dns(answer)) => addresses_of(&answer),
                other => bail!("host{host} does not resolve {name} on {network}: {other:?}"),
            };
            ensure!(
                found == *expected,
                "host{host} resolves {name} on {network} to {found:?} in place of {expected:?}"
            );
        }
        Ok(())
    }
}

fn own_table(seen: &Inspection) -> Result<&Vec<Entry>> {
    let id: NodeId = seen.id;
    seen.tables.get(&id).context("a daemon without a table of its own")
}

fn addresses_of(answer: &DnsAnswer) -> BTreeSet<String> {
    answer.answers.iter().map(|record| record.data.clone()).collect()
}
