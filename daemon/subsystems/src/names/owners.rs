//! The names of Services and pods in the zone, with their owners, updated for each Service or pod that changed.
//!
//! [`Owners`] owns the record of which Service has which name, and of which addresses pods have. Begin to read at
//! [`Owners::change`].

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use ovl_proto::resource::Name as ResourceName;
use ovl_zone::{Name, OtherRecords, Records, Zone};

use super::cluster_names::{self, ClusterNames, Set, VERSION};
use super::zone::records_of;

/// Adds the cluster domain and the names that belong to no Service (Kubernetes DNS specification, section 2.2).
pub(super) fn begin(zone: &mut Zone, domain: &str, walks: bool) {
    let Some(name) = Name::parse(domain) else { return };
    zone.begin_cluster(name, walks);
    let above = || Records { above: true, ..Records::default() };
    zone.set_cluster(&name, above());
    for kind in ["svc", "pod"] {
        if let Some(name) = Name::parse(&format!("{kind}.{domain}")) {
            zone.set_cluster(&name, above());
        }
    }
    if let Some(name) = Name::parse(&format!("dns-version.{domain}")) {
        zone.set_cluster(&name, OtherRecords { text: Some(VERSION), ..OtherRecords::default() }.into());
    }
}

/// The names of Services and pods. A name can have several owners: a name with other names below it, or the PTR name
/// of an address.
#[derive(Debug, Default)]
pub(super) struct Owners {
    of: BTreeMap<ResourceName, ClusterNames>,
    sets: BTreeMap<String, BTreeSet<ResourceName>>,
    reverse: BTreeMap<IpAddr, BTreeSet<ResourceName>>,
    /// How many pods of each namespace have an address. Their names follow from it, and none of them is that of a Service.
    pods: BTreeMap<String, BTreeMap<IpAddr, u32>>,
}

impl Owners {
    /// Adds or removes the names of a pod below the cluster domain `domain`.
    pub(super) fn change_pod(
        &mut self,
        zone: &mut Zone,
        domain: &str,
        (namespace, addresses, is_there): (&str, &[IpAddr], bool),
    ) {
        let pods = self.pods.entry(namespace.to_owned()).or_default();
        let was_empty = pods.is_empty();
        for address in addresses {
            let count = pods.entry(*address).or_default();
            let before = *count;
            *count = if is_there { before.saturating_add(1) } else { before.saturating_sub(1) };
            let after = *count;
            if after == 0 {
                pods.remove(address);
            }
            if (before == 0) != (after == 0)
                && let Some(name) = Name::parse(&cluster_names::of_pod(domain, namespace, *address))
            {
                zone.set_cluster(&name, records_of((after > 0).then_some(*address).into_iter().collect()));
            }
        }
        let is_empty = pods.is_empty();
        if is_empty {
            self.pods.remove(namespace);
        }
        if was_empty != is_empty
            && let Some(name) = Name::parse(&cluster_names::above_pods(domain, namespace))
        {
            zone.set_cluster(&name, Records { above: !is_empty, ..Records::default() });
        }
    }

    /// Sets the names of a Service. With `None`, it has none any more.
    pub(super) fn change(&mut self, zone: &mut Zone, owner: ResourceName, names: Option<ClusterNames>) {
        let was = self.of.remove(&owner).unwrap_or_default();
        let is = names.unwrap_or_default();
        for name in was.sets.keys().filter(|name| !is.sets.contains_key(*name)) {
            take(&mut self.sets, name, &owner);
        }
        for address in was.reverse.keys().filter(|address| !is.reverse.contains_key(*address)) {
            take(&mut self.reverse, address, &owner);
        }
        for name in is.sets.keys() {
            self.sets.entry(name.clone()).or_default().insert(owner.clone());
        }
        for address in is.reverse.keys() {
            self.reverse.entry(*address).or_default().insert(owner.clone());
        }
        if !is.sets.is_empty() {
            self.of.insert(owner, is.clone());
        }
        // All Services of a namespace share the names above theirs. Compute them only if their records may differ.
        let nothing = Set::default();
        let differs = |name: &&String| {
            let [before, after] = [&was, &is].map(|names| names.sets.get(*name).unwrap_or(&nothing));
            let is_shared = self.sets.get(*name).is_some_and(|owners| owners.len() > 1);
            before != after || (!is_shared && was.sets.contains_key(*name) != is.sets.contains_key(*name))
        };
        let all: BTreeSet<&String> = was.sets.keys().chain(is.sets.keys()).collect();
        for name in all.into_iter().filter(differs) {
            if let Some(key) = Name::parse(name) {
                zone.set_cluster(&key, self.records(name));
            }
        }
        for address in was.reverse.keys().chain(is.reverse.keys()) {
            let owners = self.reverse.get(address).into_iter().flatten();
            let names = owners.filter_map(|owner| self.of.get(owner)?.reverse.get(address)).flatten();
            let names = names.filter_map(|name| Name::parse(name)).map(Into::into).collect();
            zone.set_cluster(&Name::reverse_of(*address), Records { names, ..Records::default() });
        }
    }

    /// Merges the records of all owners of a name.
    fn records(&self, name: &str) -> Records {
        let Some(owners) = self.sets.get(name) else { return Records::default() };
        let mut all = Set::default();
        owners.iter().filter_map(|owner| self.of.get(owner)?.sets.get(name)).for_each(|set| all.merge(set));
        let (above, unready) = (all == Set::default(), all.unready);
        let alias = all.alias.and_then(|name| Name::parse(&name)).map(Into::into);
        let services =
            all.services.iter().filter_map(|(port, name)| Some((*port, Name::parse(name)?.into())));
        let others = OtherRecords { services: services.collect(), alias, text: None };
        Records { above, unready, others: Records::from(others).others, ..records_of(all.addresses) }
    }
}

/// Removes an owner from a set, and the set if it is empty.
fn take<K: Ord>(sets: &mut BTreeMap<K, BTreeSet<ResourceName>>, key: &K, owner: &ResourceName) {
    if let Some(owners) = sets.get_mut(key) {
        owners.remove(owner);
        if owners.is_empty() {
            sets.remove(key);
        }
    }
}
