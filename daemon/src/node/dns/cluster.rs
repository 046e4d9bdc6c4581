//! Names of Services and pods in the zone: which of them come and go with what changed.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use ovl_dns::{Name, Records, Zone};
use ovl_proto::resource::Name as ResourceName;
use ovl_subsystems::names::cluster_names::{ClusterNames, Set, VERSION};

use super::records_of;

/// What the cluster says of itself, and no Service does (section 2.2 of the specification).
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
        zone.set_cluster(&name, Records { text: Some(VERSION), ..Records::default() });
    }
}

/// Whose a name is.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Owner {
    /// A Service's.
    Service(ResourceName),
    /// A pod's: its namespace and addresses.
    Pod(String, Vec<IpAddr>),
}

/// The names of Services and pods. One name can be several's: what is above others, and of an address.
#[derive(Debug, Default)]
pub(super) struct Cluster {
    of: BTreeMap<Owner, ClusterNames>,
    sets: BTreeMap<String, BTreeSet<Owner>>,
    reverse: BTreeMap<IpAddr, BTreeSet<Owner>>,
}

impl Cluster {
    /// Sets what an owner has, or that it has nothing any more.
    pub(super) fn change(&mut self, zone: &mut Zone, owner: Owner, names: Option<ClusterNames>) {
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
        // What is above others, all of a namespace's Services have: looked at only where it may be another.
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
            let names = names.filter_map(|name| Name::parse(name)).collect();
            zone.set_cluster(&Name::reverse_of(*address), Records { names, ..Records::default() });
        }
    }

    fn records(&self, name: &str) -> Records {
        let Some(owners) = self.sets.get(name) else { return Records::default() };
        let mut all = Set::default();
        owners.iter().filter_map(|owner| self.of.get(owner)?.sets.get(name)).for_each(|set| all.merge(set));
        let (above, unready) = (all == Set::default(), all.unready);
        let mut records = Records { above, unready, ..records_of(all.addresses) };
        records.alias = all.alias.and_then(|name| Name::parse(&name));
        let services = all.services.iter().filter_map(|(port, name)| Some((*port, Name::parse(name)?)));
        records.services = services.collect();
        records
    }
}

fn take<K: Ord>(sets: &mut BTreeMap<K, BTreeSet<Owner>>, key: &K, owner: &Owner) {
    if let Some(owners) = sets.get_mut(key) {
        owners.remove(owner);
        if owners.is_empty() {
            sets.remove(key);
        }
    }
}
