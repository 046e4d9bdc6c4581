//! Decides which network of the cluster a network of a Docker Engine is, and which subnet a pool stands for.

use std::collections::BTreeMap;
use std::net::IpAddr;

use ipnet::IpNet;
use ovl_control::NetworkCreate;
use ovl_proto::id::NetworkId;
use ovl_proto::object::{Driver, Encrypt, Mode, Network, Subnet};
use ring::digest::{SHA256, digest};

use super::{EngineNetwork, NetworkWish, Pool, PoolWish};
use ovl_cluster::addresses;
use ovl_cluster::networks::overlaps;
use ovl_cluster::view::NetworkState;

type NetworkMap = BTreeMap<NetworkId, NetworkState>;

/// How to choose the subnet of a pool.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Choice {
    /// This subnet.
    Range(IpNet),
    /// A free subnet.
    Free {
        /// Whether it is an IPv6 subnet.
        v6: bool,
    },
}

/// What to do when an Engine creates a network.
#[derive(Debug, Clone, PartialEq)]
pub enum Plan {
    /// Join this network of the cluster.
    Join(NetworkId),
    /// Create a network.
    Make(Box<NetworkCreate>),
}

/// Chooses the subnet of a pool: the requested one, or that of the named network.
///
/// # Errors
///
/// If the request contradicts the named network, or the subnet overlaps another one or is invalid.
pub fn choose_pool(wish: &PoolWish, networks: &NetworkMap) -> Result<Choice, String> {
    let family = |prefix: &IpNet| prefix.addr().is_ipv4() != wish.v6;
    if let Some(prefix) = wish.prefix.filter(|prefix| !family(prefix)) {
        return Err(format!("subnet {prefix} is of the other family than requested"));
    }
    let named = wish.network.as_deref().and_then(|name| find(networks, name));
    if let (Some(network), None) = (named, wish.prefix) {
        let subnet = network.subnets.iter().find(|subnet| family(&subnet.prefix)).ok_or_else(|| {
            format!(
                "network {} has no {} addresses, only {}",
                network.name,
                if wish.v6 { "IPv6" } else { "IPv4" },
                ranges(network)
            )
        })?;
        return Ok(Choice::Range(subnet.prefix));
    }
    let Some(prefix) = wish.prefix else { return Ok(Choice::Free { v6: wish.v6 }) };
    let has = |network: &Network| network.subnets.iter().any(|subnet| subnet.prefix == prefix);
    if let Some(network) = named.filter(|network| !has(network)) {
        return Err(format!("network {} has {}, not {prefix}", network.name, ranges(network)));
    }
    if networks.values().any(|state| has(&state.network)) {
        return Ok(Choice::Range(prefix));
    }
    let overlapping = |subnet: &Subnet| overlaps(subnet.prefix, prefix);
    let other = networks
        .values()
        .find_map(|state| Some((&state.network, state.network.subnets.iter().find(|s| overlapping(s))?)));
    match other {
        Some((network, subnet)) => Err(format!(
            "subnet {prefix} overlaps {} of network {}: give exactly that subnet to join the network",
            subnet.prefix, network.name
        )),
        None => addresses::validate_subnet(prefix).map(|()| Choice::Range(prefix)).map_err(|e| e.to_string()),
    }
}

/// Decides whether to create a network or to join an existing one. Subnets for which `chosen` is true were chosen by
/// ovl itself, and are ignored if the network exists.
///
/// # Errors
///
/// If the request contradicts the existing network.
pub fn plan_network(
    wish: &NetworkWish,
    networks: &NetworkMap,
    chosen: impl Fn(IpNet) -> bool,
) -> Result<Plan, String> {
    let given: Vec<IpNet> = wish.prefixes.iter().copied().filter(|prefix| !chosen(*prefix)).collect();
    let has = |network: &Network, prefix: &IpNet| network.subnets.iter().any(|s| s.prefix == *prefix);
    let by_range = networks.values().find(|state| given.iter().any(|prefix| has(&state.network, prefix)));
    let found = match &wish.name {
        Some(name) => match networks.values().find(|state| is_called(&state.network, name)) {
            Some(state) => Some(state),
            None => match by_range {
                Some(other) => {
                    return Err(format!(
                        "{} is the subnet of network {}: omit -o ovl.network={name} to join it, or give another subnet",
                        ranges(&other.network),
                        other.network.name
                    ));
                }
                None => None,
            },
        },
        None => by_range,
    };
    let Some(found) = found else { return Ok(Plan::Make(Box::new(create(wish)))) };
    let network = &found.network;
    if found.removing {
        return Err(format!("network {} is being deleted: it waits for its last endpoints", network.name));
    }
    if let Some(prefix) = given.iter().find(|prefix| !has(network, prefix)) {
        return Err(format!("network {} has {}, not {prefix}", network.name, ranges(network)));
    }
    let lacks = |prefix: &&IpNet| !network.subnets.iter().any(|subnet| like(subnet, prefix.addr()));
    if let Some(prefix) = wish.prefixes.iter().find(lacks) {
        return Err(format!(
            "network {} has no addresses of the family of {prefix}, only {}",
            network.name,
            ranges(network)
        ));
    }
    differences(wish, network).map_or(Ok(Plan::Join(network.id)), Err)
}

/// Returns the first difference between the requested and the existing network.
fn differences(wish: &NetworkWish, network: &Network) -> Option<String> {
    let name = &network.name;
    let is_not = |what: &str| Some(format!("network {name} {what}"));
    if wish.encrypt.is_some_and(|encrypt| encrypt != network.encrypt()) {
        return is_not(match network.encrypt() {
            Encrypt::No => "is not encrypted",
            Encrypt::Yes => "is encrypted",
            Encrypt::Auto => "is encrypted only where hosts have no path in plain text",
        });
    }
    match (wish.internal, network.internal) {
        (true, false) => return is_not("is not internal: omit --internal to join it"),
        (false, true) => return is_not("is internal: add --internal to join it"),
        _ => {}
    }
    match wish.external_names {
        Some(true) if !network.external_names => return is_not("was created without ovl.external-names"),
        Some(false) if network.external_names => return is_not("was created with ovl.external-names"),
        _ => {}
    }
    if wish.mode.is_some_and(|mode| mode != network.mode) {
        return is_not(match network.mode {
            Mode::L2 => "is switched (l2)",
            Mode::L3 => "is routed (l3)",
        });
    }
    if let Some(vni) = wish.vni.filter(|vni| *vni != network.vni) {
        return Some(format!("network {name} has the VNI {}, not {vni}", network.vni));
    }
    if wish.mtu.is_some_and(|mtu| network.mtu != Some(mtu)) {
        return Some(format!(
            "network {name} has another MTU: `ovlctl network update {name} --mtu` changes it"
        ));
    }
    if wish.backend.is_some_and(|backend| network.mode != Mode::L3 || backend != network.backend) {
        return is_not("has another backend");
    }
    None
}

fn create(wish: &NetworkWish) -> NetworkCreate {
    NetworkCreate {
        name: wish.name.clone().unwrap_or_else(|| default_name(&wish.prefixes)),
        driver: Driver::Overlay,
        mode: wish.mode.unwrap_or(Mode::L2),
        subnets: wish.prefixes.clone(),
        vni: wish.vni,
        encrypted: wish.encrypt == Some(Encrypt::Yes),
        auto_encrypt: wish.encrypt == Some(Encrypt::Auto),
        internal: wish.internal,
        mtu: wish.mtu,
        backend: wish.backend,
        block_lengths: Vec::new(),
        dns: false,
        external_names: wish.external_names.unwrap_or_default(),
    }
}

/// Returns the name of an unnamed network. It derives from the subnet, so it is the same on all hosts.
fn default_name(prefixes: &[IpNet]) -> String {
    let range = prefixes.first().map(ToString::to_string).unwrap_or_default();
    format!("docker-{}", range.replace(['/', ':'], "-"))
}

/// Returns the id of a network that is created for an Engine. It is the same on every host, because several hosts may
/// create the network at the same instant. `attempt` is the number of ids that former networks have used.
pub fn network_id(name: &str, attempt: u32) -> NetworkId {
    let hash = digest(&SHA256, format!("network {attempt} {name}").as_bytes());
    let mut id = [0; 5];
    id.iter_mut().zip(hash.as_ref()).for_each(|(to, from)| *to = *from);
    NetworkId(id)
}

/// Returns the network and the subnet that a pool stands for: those of the Engine's network that was created with the
/// pool, or else of the network that has the pool's prefix.
///
/// # Errors
///
/// If no network has the pool.
pub fn subnet_of<'a>(
    pool: Pool,
    kept: impl Iterator<Item = &'a EngineNetwork>,
    networks: &'a NetworkMap,
) -> Result<(&'a Network, &'a Subnet), String> {
    let bound = kept.filter(|kept| pool.chosen.is_some() && kept.pools.contains(&pool));
    let by_pool = bound.filter_map(|kept| networks.get(&kept.network));
    let by_range = networks.values().filter(|_| pool.chosen.is_none());
    by_pool
        .chain(by_range)
        .filter(|state| !state.removing)
        .find_map(|state| {
            let subnets = &state.network.subnets;
            // The subnet may have grown since.
            let covers = |subnet: &&Subnet| subnet.prefix.contains(&pool.prefix);
            let family = |subnet: &&Subnet| pool.chosen.is_some() && like(subnet, pool.prefix.addr());
            let subnet = subnets.iter().find(covers).or_else(|| subnets.iter().find(family))?;
            Some((&state.network, subnet))
        })
        .ok_or_else(|| {
            format!(
                "pool {}: no network of the cluster has this subnet, see `ovlctl network ls`",
                pool.prefix
            )
        })
}

/// Returns the gateway that an Engine shows for a subnet, with its prefix length.
///
/// # Errors
///
/// If the Engine requests another gateway.
pub fn wanted_gateway(
    prefix: IpNet,
    subnet: Option<&Subnet>,
    wanted: Option<IpAddr>,
) -> Result<IpNet, String> {
    let gateway = subnet.map_or_else(|| addresses::gateway(prefix), |subnet| subnet.gateway);
    if let Some(wanted) = wanted.filter(|wanted| *wanted != gateway) {
        return Err(format!(
            "subnet {prefix}: the gateway is {gateway} on all hosts: omit --gateway {wanted}"
        ));
    }
    IpNet::new(gateway, prefix.prefix_len()).map_err(|error| error.to_string())
}

fn find<'a>(networks: &'a NetworkMap, name: &str) -> Option<&'a Network> {
    networks.values().map(|state| &state.network).find(|network| is_called(network, name))
}

fn is_called(network: &Network, name: &str) -> bool {
    network.name == name || network.id.to_string() == name
}

fn like(subnet: &Subnet, address: IpAddr) -> bool {
    super::same_family(subnet.prefix.addr(), address)
}

fn ranges(network: &Network) -> String {
    network.subnets.iter().map(|subnet| subnet.prefix.to_string()).collect::<Vec<_>>().join(" and ")
}
