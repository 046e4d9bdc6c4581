//! Resolves conflicts between networks of cluster objects, so that names, VNIs and subnets are unique even after a
//! split in which both sides created networks.

use std::collections::{BTreeMap, BTreeSet};

use ipnet::IpNet;
use ovl_proto::id::NetworkId;
use ovl_proto::object::Network;

use crate::view::NetworkState;

/// The largest VXLAN network identifier.
pub const MAX_VNI: u32 = (1 << 24) - 1;
/// The smallest automatic VNI, as in Docker. Smaller ones are left to users.
pub const FIRST_AUTO_VNI: u32 = 4096;

/// The networks after conflicts are resolved.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Resolution {
    /// All networks, including those that are being deleted.
    pub networks: BTreeMap<NetworkId, NetworkState>,
    /// Networks whose name or VNI had to change. Any host writes them: all hosts compute the same result, so the
    /// order of the writes does not matter.
    pub rewritten: Vec<Network>,
    /// Pairs of networks with overlapping subnets, the later one of each pair first.
    pub overlaps: Vec<(NetworkId, NetworkId)>,
}

/// Resolves conflicts: of two networks with the same name or VNI the older one keeps it, then the one with the
/// smaller id. The other one gets a name that contains its id, or the next free VNI.
///
/// `networks` yields each network and whether it was deleted. `in_use` returns whether a deleted network still has
/// endpoints anywhere.
pub fn resolve<'a>(
    networks: impl Iterator<Item = (&'a Network, bool)>,
    in_use: impl Fn(NetworkId) -> bool,
) -> Resolution {
    let mut all: Vec<(&Network, bool)> =
        networks.filter(|(network, deleted)| !deleted || in_use(network.id)).collect();
    all.sort_by_key(|(network, _)| (network.created, network.id));
    let mut result = Resolution::default();
    let asked_for: BTreeSet<u32> = all.iter().map(|(network, _)| network.vni).collect();
    let (mut names, mut vnis) = (BTreeSet::new(), BTreeSet::new());
    for (network, removing) in all {
        let mut settled = network.clone();
        if !names.insert(settled.name.clone()) {
            settled.name = format!("{}-{}", settled.name.chars().take(54).collect::<String>(), settled.id);
            names.insert(settled.name.clone());
        }
        if !vnis.insert(settled.vni) {
            // A VNI that another network requested would force that one to change too.
            while asked_for.contains(&settled.vni) || vnis.contains(&settled.vni) {
                settled.vni = next_vni(settled.vni);
            }
            vnis.insert(settled.vni);
        }
        for other in result.networks.values() {
            if overlap(&other.network, &settled) {
                result.overlaps.push((settled.id, other.network.id));
            }
        }
        if settled != *network && !removing {
            result.rewritten.push(settled.clone());
        }
        result.networks.insert(settled.id, NetworkState { network: settled, removing });
    }
    result
}

fn next_vni(vni: u32) -> u32 {
    if vni >= MAX_VNI { FIRST_AUTO_VNI } else { vni + 1 }
}

/// Whether two networks have an address in common.
pub fn overlap(a: &Network, b: &Network) -> bool {
    a.subnets.iter().any(|a| b.subnets.iter().any(|b| overlaps(a.prefix, b.prefix)))
}

/// Whether two ranges have an address in common.
pub fn overlaps(a: IpNet, b: IpNet) -> bool {
    a.contains(&b) || b.contains(&a)
}

/// Returns a VNI for a new network that no existing one has. The search starts at a value that depends on the id, so
/// that hosts which create networks at the same instant rarely choose the same one.
pub fn choose_vni(networks: &BTreeMap<NetworkId, NetworkState>, id: NetworkId) -> u32 {
    let [_, a, b, c, d] = id.0;
    let span = MAX_VNI - FIRST_AUTO_VNI + 1;
    let mut vni = FIRST_AUTO_VNI + u32::from_be_bytes([a, b, c, d]) % span;
    let taken: BTreeSet<u32> = networks.values().map(|state| state.network.vni).collect();
    while taken.contains(&vni) {
        vni = next_vni(vni);
    }
    vni
}

/// Returns a subnet of `length` from `pool` that overlaps none of `taken`; `None` if there is none.
///
/// Each of `hosts` hosts, by its `rank`, first tries candidates that no other host tries. So hosts that choose at the
/// same instant, or on two sides of a split, do not choose the same one.
pub fn choose_subnet(pool: IpNet, length: u8, taken: &[IpNet], rank: usize, hosts: usize) -> Option<IpNet> {
    // Each taken subnet excludes at most a few consecutive candidates, so a bounded search of a large pool is
    // enough to find a free one.
    let candidates = || Some(pool.subnets(length).ok()?.take(1 << 16));
    let free = |candidate: &IpNet| !taken.iter().any(|other| overlaps(*candidate, *other));
    candidates()?.skip(rank).step_by(hosts.max(1)).find(free).or_else(|| candidates()?.find(free))
}

/// Returns the last such subnet, which is far from those that other hosts choose.
pub fn choose_last_subnet(pool: IpNet, length: u8, taken: &[IpNet]) -> Option<IpNet> {
    let candidates: Vec<IpNet> = pool.subnets(length).ok()?.take(1 << 16).collect();
    let free = |candidate: &IpNet| !taken.iter().any(|other| overlaps(*candidate, *other));
    candidates.into_iter().rev().find(free)
}

#[cfg(test)]
mod tests {
    use ovl_proto::clock::Stamp;
    use ovl_proto::object::{Backend, Driver, Mode};
    use ovl_proto::wire::fields::Unknown;

    use super::*;

    fn network(id: u8, name: &str, vni: u32, made_at: u64) -> Network {
        Network {
            id: NetworkId([id; 5]),
            name: name.to_owned(),
            created: Stamp { wall_ms: made_at, ..Stamp::default() },
            driver: Driver::Overlay,
            mode: Mode::L2,
            backend: Backend::Vxlan,
            on_demand: false,
            external_names: false,
            vni,
            subnets: vec![],
            mtu: None,
            encrypted: false,
            auto_encrypt: false,
            internal: false,
            names: true,
            unknown: Unknown::default(),
        }
    }

    fn settle(networks: &[Network]) -> Resolution {
        resolve(networks.iter().map(|network| (network, false)), |_| false)
    }

    #[test]
    fn older_network_keeps_its_name_and_vni() {
        let networks = [network(1, "blue", 5000, 20), network(2, "blue", 5000, 10)];
        let result = settle(&networks);
        assert_eq!(result.networks[&NetworkId([2; 5])].network.name, "blue");
        assert_eq!(result.networks[&NetworkId([2; 5])].network.vni, 5000);
        let other = &result.networks[&NetworkId([1; 5])].network;
        assert_eq!(other.name, format!("blue-{}", other.id));
        assert_eq!(other.vni, 5001);
        assert_eq!(result.rewritten, std::slice::from_ref(other));
    }

    #[test]
    fn result_does_not_depend_on_the_order() {
        let mut networks =
            [network(3, "a", 7, 1), network(1, "a", 7, 1), network(2, "a", 8, 1), network(4, "b", 7, 0)];
        let first = settle(&networks);
        networks.reverse();
        assert_eq!(settle(&networks), first);
        let vnis: BTreeSet<_> = first.networks.values().map(|state| state.network.vni).collect();
        assert_eq!(vnis.len(), 4);
    }

    #[test]
    fn deleted_network_stays_while_it_is_used() {
        let removed = [network(1, "a", 7, 1)];
        let removed = || removed.iter().map(|network| (network, true));
        assert!(resolve(removed(), |_| false).networks.is_empty());
        assert!(resolve(removed(), |_| true).networks[&NetworkId([1; 5])].removing);
    }

    #[test]
    fn a_free_subnet_is_found() {
        let pool = "10.0.0.0/8".parse().unwrap();
        let taken = ["10.0.0.0/15".parse().unwrap(), "10.2.3.0/24".parse().unwrap()];
        assert_eq!(choose_subnet(pool, 16, &taken, 0, 1), "10.3.0.0/16".parse().ok());
        assert_eq!(choose_subnet("10.0.0.0/16".parse().unwrap(), 24, &taken, 0, 1), None);
        let taken = ["10.255.0.0/17".parse().unwrap()];
        assert_eq!(choose_last_subnet(pool, 16, &taken), "10.254.0.0/16".parse().ok());
    }

    #[test]
    fn hosts_that_choose_at_once_choose_different_subnets() {
        let pool = "10.0.0.0/14".parse().unwrap();
        let chosen: Vec<_> = (0..3).filter_map(|rank| choose_subnet(pool, 16, &[], rank, 3)).collect();
        assert_eq!(chosen.iter().collect::<BTreeSet<_>>().len(), 3, "{chosen:?}");
        // When its own candidates are exhausted, a host takes another host's.
        assert_eq!(choose_subnet(pool, 16, &chosen, 2, 3), "10.3.0.0/16".parse().ok());
    }
}
