//! Networks: creation, update, deletion and description.

use std::collections::BTreeSet;
use std::net::IpAddr;

use ipnet::IpNet;
use ovl_cluster::addresses as ipam;
use ovl_cluster::networks;
use ovl_cluster::view::NetworkState;
use ovl_dataplane::device::Device;
use ovl_runtimes::docker;
use ovl_subsystems::encryption::tunnel;
use ovl_subsystems::mtu::{MIN_MTU_V6, min_mtu};
use ovl_subsystems::networks::mtu::network_mtu;
use ovl_subsystems::services::allocation::Ranges;

use ovl_control::{NetworkCreate, NetworkInfo};
use ovl_proto::clock::Stamp;
use ovl_proto::id::NetworkId;
use ovl_proto::object::{Backend, Driver, Encrypt, Mode, Network, ObjectKey};
use ovl_proto::table::is_same_name;
use ovl_proto::wire::fields::Unknown;

use super::ready::READY_WITHIN;
use super::state::State;
use super::{Failed, Node, multicast};
use crate::config::is_name;

/// Prefix lengths of a subnet that is chosen automatically.
const AUTO_LENGTH_V4: u8 = 20;
const AUTO_LENGTH_V6: u8 = 64;
/// Usual names of the network that containers are on by default. Names do not resolve there, as on Docker's
/// default network.
const UNNAMED: [&str; 2] = ["default", "bridge"];

impl Node {
    /// Creates a network. Returns when it is on this host's disk and has been sent to all live peers.
    pub(super) async fn network_create(&self, request: NetworkCreate) -> Result<NetworkInfo, Failed> {
        self.network_create_for(request, false).await
    }

    /// Creates a network for a container engine (`on_demand`) or for a user.
    pub(super) async fn network_create_for(
        &self,
        mut request: NetworkCreate,
        on_demand: bool,
    ) -> Result<NetworkInfo, Failed> {
        // A bridge network is local to one host, so there is no traffic between hosts to encrypt.
        let configured = self.config.encrypt;
        if request.driver == Driver::Overlay {
            request.encrypted |= configured == Encrypt::Yes;
            request.auto_encrypt |= configured == Encrypt::Auto;
        }
        if !is_name(&request.name) {
            return Err(Failed::invalid(format!(
                "invalid name '{}' for a network: it must have letters, digits, '-', '_' and single dots between them, at \
                 most 63 characters, and begin with a letter or digit",
                request.name
            )));
        }
        if request.driver == Driver::Overlay {
            self.ready(READY_WITHIN).await?;
            self.check_clock()?;
        }
        check_bridge(&request)?;
        check_routed(&request, self.config.advertise.ip())?;
        let taken = self.kernel.prefixes().await.map_err(Failed::from)?;
        check_names(&request)?;
        let network = {
            let mut state = self.state.borrow_mut();
            let network = self.plan_create(&state, &request, &taken, on_demand)?;
            check_mtu(&network)?;
            Network { created: self.stamp_creation(&mut state), ..network }
        };
        let id = network.id;
        self.put_network(network)?;
        self.event("network", &request.name, "created");
        self.saved().await?;
        self.network_info_by_id(id)
    }

    /// Stores a network among the cluster objects, or among the bridge networks of this host.
    fn put_network(&self, network: Network) -> Result<(), Failed> {
        match network.driver {
            Driver::Overlay => self.write_network(network, false),
            Driver::Bridge => {
                self.put_bridge(network);
                Ok(())
            }
        }
    }

    /// Builds a network from a request, without the stamp of a cluster object.
    fn plan_create(
        &self,
        state: &State,
        request: &NetworkCreate,
        taken: &[IpNet],
        on_demand: bool,
    ) -> Result<Network, Failed> {
        let own = request.driver == Driver::Bridge;
        if !own {
            state.check_member()?;
        }
        if state.objects.all().len() >= ovl_cluster::objects::MAX_OBJECTS {
            return Err(Failed::exhausted(format!(
                "the cluster has {} objects, removed ones included, and can have no more; removed ones are forgotten \
                 after 30 days",
                state.objects.all().len()
            )));
        }
        let is_other = |other: &&NetworkState| is_same_name(&other.network.name, &request.name);
        if let Some(Network { id, name, .. }) =
            state.view.networks.values().find(is_other).map(|other| &other.network)
        {
            let same = if *name == request.name { "" } else { ": in DNS, these are one name" };
            return Err(Failed::conflict(format!("network {name} exists already, with id {id}{same}")));
        }
        let is_free = |id: &NetworkId| {
            !state.view.networks.contains_key(id)
                && state.objects.all().get(&ObjectKey::Network(*id)).is_none()
        };
        // Engines on several hosts may create the same network at the same time. A derived id makes it one
        // network.
        let id = match on_demand {
            true => (0..).map(|attempt| docker::network_id(&request.name, attempt)).find(is_free),
            false => std::iter::repeat_with(|| NetworkId(self.random())).find(is_free),
        };
        let id = id.ok_or_else(|| Failed::internal("no id is free"))?;
        let vni = match request.vni {
            _ if own => 0,
            Some(vni) if !(1..=networks::MAX_VNI).contains(&vni) => {
                return Err(Failed::invalid(format!("VNI {vni}: from 1 to {}", networks::MAX_VNI)));
            }
            Some(vni) => match state.view.networks.values().find(|other| other.network.vni == vni) {
                Some(other) => {
                    return Err(Failed::conflict(format!(
                        "VNI {vni} belongs to network {}",
                        other.network.name
                    )));
                }
                None => vni,
            },
            None => networks::choose_vni(&state.view.networks, id),
        };
        let prefixes = if request.subnets.is_empty() {
            vec![self.choose_subnet(state, taken, own)?]
        } else {
            request.subnets.clone()
        };
        let mut subnets = Vec::new();
        for (index, prefix) in prefixes.iter().enumerate() {
            let subnet = match request.mode {
                Mode::L2 => ipam::new_subnet(*prefix),
                Mode::L3 => ipam::new_routed_subnet(*prefix, request.block_lengths.get(index).copied()),
            };
            let subnet = subnet.map_err(|error| Failed::invalid(error.to_string()))?;
            if let Some(other) =
                prefixes.iter().take(index).find(|other| networks::overlaps(**other, *prefix))
            {
                return Err(Failed::invalid(format!("{prefix} overlaps {other}")));
            }
            check_overlap(state, None, *prefix)?;
            let Ranges { load_balancers, external, .. } = &self.config.ranges;
            let services = self.config.ranges.of_services(&state.view);
            let named = [
                ("service_range", &services),
                ("load_balancer_pool", load_balancers),
                ("external_ranges", external),
            ];
            for (name, ranges) in named {
                if let Some(range) = ranges.iter().find(|range| networks::overlaps(**range, *prefix)) {
                    return Err(Failed::conflict(format!("{prefix} overlaps the {name} {range}")));
                }
            }
            self.check_needed(state, *prefix)?;
            subnets.push(subnet);
        }
        Ok(Network {
            id,
            name: request.name.clone(),
            created: Stamp::default(),
            driver: request.driver,
            mode: request.mode,
            vni,
            subnets,
            mtu: request.mtu,
            encrypted: request.encrypted,
            auto_encrypt: request.auto_encrypt && !request.encrypted,
            internal: request.internal,
            backend: request.backend.unwrap_or_default(),
            // Docker's own default network has no names either.
            names: request.dns || !(own && UNNAMED.contains(&request.name.as_str())),
            on_demand,
            external_names: request.external_names,
            unknown: Unknown::default().played().played_marked(),
        })
    }

    /// Chooses a subnet of the pool that overlaps no network, nothing that this host needs, and no prefix that it
    /// has a route to. A bridge network gets the last free subnet, because the host cannot know which one another
    /// host chooses next.
    pub(super) fn choose_subnet(&self, state: &State, taken: &[IpNet], own: bool) -> Result<IpNet, Failed> {
        let used =
            state.view.networks.values().flat_map(|other| other.network.subnets.iter().map(|s| s.prefix));
        let taken = used.chain(taken.iter().copied().filter(|net| net.prefix_len() > 0));
        let ranges = &self.config.ranges;
        let taken: Vec<IpNet> =
            taken.chain(ranges.all()).chain(self.needed_ranges(state).prefixes()).collect();
        let pool = self.config.pool;
        let length =
            if pool.addr().is_ipv4() { AUTO_LENGTH_V4 } else { AUTO_LENGTH_V6 }.max(pool.prefix_len());
        let full =
            || Failed::exhausted(format!("no range of the pool {pool} is free: give one with --subnet"));
        if own {
            return networks::choose_last_subnet(pool, length, &taken).ok_or_else(full);
        }
        let members = &state.view.alloc.members;
        let rank = members.iter().position(|member| *member == state.view.me).unwrap_or(0);
        networks::choose_subnet(pool, length, &taken, rank, members.len()).ok_or_else(full)
    }

    /// Enlarges subnets or changes the MTU of a network in use.
    pub(super) async fn network_update(
        &self,
        name: &str,
        larger: &[IpNet],
        mtu: Option<u16>,
    ) -> Result<NetworkInfo, Failed> {
        let network = {
            let state = self.state.borrow();
            let mut network = live_network(&state, name)?.clone();
            for prefix in larger {
                let Some(subnet) = network.subnets.iter_mut().find(|subnet| prefix.contains(&subnet.prefix))
                else {
                    let ranges: Vec<String> = network.subnets.iter().map(|s| s.prefix.to_string()).collect();
                    return Err(Failed::invalid(format!(
                        "{prefix} contains no range of network {}, which has {}",
                        network.name,
                        ranges.join(", ")
                    )));
                };
                *subnet =
                    ipam::can_grow(subnet, *prefix).map_err(|error| Failed::invalid(error.to_string()))?;
                check_overlap(&state, Some(network.id), *prefix)?;
                self.check_needed(&state, *prefix)?;
            }
            for (index, subnet) in network.subnets.iter().enumerate() {
                if network
                    .subnets
                    .iter()
                    .skip(index + 1)
                    .any(|other| networks::overlaps(subnet.prefix, other.prefix))
                {
                    return Err(Failed::invalid(format!(
                        "{} would overlap another range of its own",
                        subnet.prefix
                    )));
                }
            }
            match mtu {
                Some(0) => network.mtu = None,
                Some(_) => network.mtu = mtu,
                None => {}
            }
            check_mtu(&network)?;
            network
        };
        let id = network.id;
        self.put_network(network)?;
        self.event("network", name, "updated");
        self.saved().await?;
        self.network_info_by_id(id)
    }

    /// Deletes a network that has no endpoints.
    pub(super) async fn network_rm(&self, name: &str) -> Result<(), Failed> {
        let network = {
            let state = self.state.borrow();
            let network = live_network(&state, name)?;
            let users: Vec<String> = state
                .view
                .all_endpoints_on(network.id)
                .filter(|placed| {
                    let host = placed.node.record.id;
                    host == state.view.me || state.view.alloc.members.contains(&host)
                })
                .map(|placed| format!("{} on {}", placed.endpoint.name, placed.node.record.name))
                .collect();
            if !users.is_empty() {
                let shown = users.iter().take(8).cloned().collect::<Vec<_>>().join(", ");
                let more = users.len().saturating_sub(8);
                let more = if more > 0 { format!(" and {more} more") } else { String::new() };
                return Err(Failed::conflict(format!(
                    "network {} has endpoints: {shown}{more}. Detach them first; those of a host that is gone for \
                     good go with `ovlctl peers forget`",
                    network.name
                )));
            }
            if state.local.attaches.wants(network.id) {
                return Err(Failed::conflict(format!("an endpoint is being attached to network {name}")));
            }
            network.clone()
        };
        if !self.drop_bridge(network.id) {
            self.write_network(network, true)?;
        }
        self.event("network", name, "removed");
        self.saved().await
    }

    /// Describes one network.
    pub(super) fn network_inspect(&self, name: &str) -> Result<NetworkInfo, Failed> {
        let state = self.state.borrow();
        match state.view.network(name) {
            Some(found) => Ok(self.network_info(&state, found)),
            None => Err(Failed::no_network(&state.view, name)),
        }
    }

    fn network_info_by_id(&self, id: NetworkId) -> Result<NetworkInfo, Failed> {
        let state = self.state.borrow();
        match state.view.networks.get(&id) {
            Some(found) => Ok(self.network_info(&state, found)),
            None => Err(Failed::not_found("the network is gone again")),
        }
    }

    /// Lists all networks by name.
    pub(super) fn networks(&self) -> Vec<NetworkInfo> {
        let state = self.state.borrow();
        let mut all: Vec<_> =
            state.view.networks.values().map(|found| self.network_info(&state, found)).collect();
        all.sort_by(|a, b| a.name.cmp(&b.name));
        all
    }

    /// Returns a network as users see it.
    pub(super) fn network_info(&self, state: &State, found: &NetworkState) -> NetworkInfo {
        let network = &found.network;
        let placed: Vec<_> = state.view.all_endpoints_on(network.id).collect();
        let nodes: BTreeSet<String> = placed.iter().map(|placed| placed.node.record.name.clone()).collect();
        let (groups, all_groups) = multicast::groups_on(&state.view, network);
        NetworkInfo {
            name: network.name.clone(),
            id: network.id,
            driver: network.driver,
            mode: network.mode,
            vni: network.vni,
            subnets: network.subnets.iter().map(|subnet| subnet.prefix).collect(),
            gateways: match network.mode {
                _ if network.internal => Vec::new(),
                Mode::L2 => network.subnets.iter().map(|subnet| subnet.gateway).collect(),
                Mode::L3 => state.view.gateways(network.id, state.view.me).collect(),
            },
            mtu: network_mtu(&state.view, network),
            encrypted: network.encrypted,
            encrypt: network.encrypt(),
            sealed_to: sealed_to(state, network),
            internal: network.internal,
            backend: (network.mode == Mode::L3).then_some(network.backend),
            removing: found.removing,
            endpoints: u32::try_from(placed.len()).unwrap_or(u32::MAX),
            nodes: nodes.into_iter().collect(),
            bridge: state
                .local
                .is_built(&state.view, network.id)
                .then(|| Device::bridge(network.id).to_string()),
            dns: network.names,
            external_names: network.names && (!network.internal || network.external_names),
            groups,
            all_groups,
        }
    }
}

/// Returns the hosts to which this host sends through the tunnel because there is no path in plain text.
fn sealed_to(state: &State, network: &Network) -> Vec<String> {
    if network.encrypt() != Encrypt::Auto {
        return Vec::new();
    }
    let others = state.view.nodes.values().filter(|node| {
        node.record.id != state.view.me
            && state.view.counts(node)
            && tunnel::is_sealed(&state.view, &state.local, network, node)
    });
    others.map(|node| node.record.name.clone()).collect()
}

fn live_network<'a>(state: &'a State, name: &str) -> Result<&'a Network, Failed> {
    match state.view.network(name) {
        Some(found) if found.removing => Err(Failed::conflict(format!(
            "network {name} was removed and waits for its last endpoints to go"
        ))),
        Some(found) => Ok(&found.network),
        None => Err(Failed::no_network(&state.view, name)),
    }
}

fn check_overlap(state: &State, own: Option<NetworkId>, prefix: IpNet) -> Result<(), Failed> {
    for other in state.view.networks.values().filter(|other| Some(other.network.id) != own) {
        if let Some(subnet) = other.network.subnets.iter().find(|s| networks::overlaps(s.prefix, prefix)) {
            return Err(Failed::conflict(format!(
                "{prefix} overlaps {} of network {}",
                subnet.prefix, other.network.name
            )));
        }
    }
    if let Some(node) = state.view.nodes.values().find(|node| prefix.contains(&node.record.vtep)) {
        return Err(Failed::conflict(format!(
            "{prefix} contains {}, the underlay address of host {}",
            node.record.vtep, node.record.name
        )));
    }
    Ok(())
}

/// Checks that the request has no option that a bridge network does not support.
fn check_bridge(request: &NetworkCreate) -> Result<(), Failed> {
    if request.driver != Driver::Bridge {
        return Ok(());
    }
    let unfit = [
        (request.mode == Mode::L3, "--mode l3"),
        (request.vni.is_some(), "--vni"),
        (request.encrypted, "--encrypted"),
        (request.auto_encrypt, "--encrypt auto"),
    ];
    match unfit.iter().find(|(given, _)| *given) {
        Some((_, option)) => Err(Failed::invalid(format!(
            "{option} is for networks of several hosts, and a bridge network is on one: leave it out, or leave out \
             --driver bridge"
        ))),
        None => Ok(()),
    }
}

/// Checks the option that only an internal network supports.
fn check_names(request: &NetworkCreate) -> Result<(), Failed> {
    if request.external_names && !request.internal {
        return Err(Failed::invalid(
            "--external-names is for internal networks: on others, names outside of the cluster resolve anyway",
        ));
    }
    Ok(())
}

/// Checks the options that only a routed network supports.
fn check_routed(request: &NetworkCreate, underlay: IpAddr) -> Result<(), Failed> {
    let blocks = request.block_lengths.len();
    if request.mode == Mode::L2 && (request.backend.is_some() || blocks > 0) {
        return Err(Failed::invalid("a backend and the length of blocks are for routed networks: --mode l3"));
    }
    if blocks > 0 && blocks != request.subnets.len() {
        return Err(Failed::invalid(format!(
            "{blocks} lengths of blocks and {} subnets: give one for each, in their order",
            request.subnets.len()
        )));
    }
    if let (true, Some(Backend::Direct | Backend::Auto)) = (request.encrypted, request.backend) {
        let why = "an encrypted network goes through the tunnel, whatever the segment: leave --backend out, or make it \
                   without --encrypted (and encrypt = true)";
        return Err(Failed::invalid(why));
    }
    let other = request.subnets.iter().find(|subnet| subnet.addr().is_ipv4() != underlay.is_ipv4());
    if let (Some(Backend::Direct), Some(subnet)) = (request.backend, other) {
        return Err(Failed::invalid(format!(
            "{subnet} cannot be routed directly: the hosts' addresses, such as {underlay}, are of the other family. \
             With --backend auto it goes in VXLAN"
        )));
    }
    Ok(())
}

fn check_mtu(network: &Network) -> Result<(), Failed> {
    let least = min_mtu(network);
    match network.mtu {
        Some(mtu) if mtu < least => {
            let why =
                if least == MIN_MTU_V6 { "the smallest that IPv6 allows" } else { "what every host accepts" };
            Err(Failed::invalid(format!("MTU {mtu}: at least {least}, {why}")))
        }
        Some(_) | None => Ok(()),
    }
}
