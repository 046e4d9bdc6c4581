//! Calls of Docker Engines. [`ovl_runtimes::docker`] parses them; this module carries them out. [`crate::engines`]
//! knows what the Engines have.
//!
//! An Engine does not repeat its calls after a restart, and ignores a failed deletion. Therefore its networks are in
//! the state file, its endpoints are in the run directory with all others, and what it leaves behind is deleted
//! later.

mod collect;

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::time::Duration;

use ipnet::IpNet;
use nix::net::if_::if_nametoindex;
use ovl_cluster::addresses as ipam;
use ovl_cluster::view::NetworkState;
use ovl_control::{Attach, DockerCall, DockerName, FailureKind, NetnsRef};
use ovl_dataplane::device::Device;
use ovl_proto::bandwidth::Bandwidth;
use ovl_proto::id::{EndpointId, NetworkId};
use ovl_proto::object::{Mode, Network};
use ovl_proto::publish::Publish;
use ovl_proto::table::{Endpoint, Entry, Key, canonical_name};
use ovl_runtimes::docker::{
    self, AddressWish, Call, Choice, EndpointWish, EngineEndpoint, EngineNetwork, Joined, Later, NetworkWish,
    Plan, Pool, PoolWish,
};
use serde_json::Value;

use super::state::State;
use super::{Failed, Node};
use crate::endpoints::LocalEndpoint;

/// How long a call waits for gossip to catch up. The Engine must get its response in time.
const SETTLED: Duration = Duration::from_secs(2);
/// The host's own network namespace, from which the Engine moves interfaces into containers.
const HERE: &str = "/proc/thread-self/ns/net";

/// Whether a call needs the agreement of the cluster.
fn needs_member(call: &Call) -> bool {
    matches!(
        call,
        Call::RequestPool(_)
            | Call::RequestAddress(AddressWish::Endpoint(..))
            | Call::CreateNetwork(_)
            | Call::CreateEndpoint(_)
    )
}

impl Node {
    /// Carries out a call of an Engine, and returns the response.
    ///
    /// # Errors
    ///
    /// Only a temporary failure: `ovl-docker` then repeats the call. Any other failure is part of the response.
    pub(super) async fn docker(&self, call: &DockerCall) -> Result<Value, Failed> {
        let outcome = match docker::parse(&call.method, &call.body) {
            Ok(call) => self.docker_call(call).await,
            Err(why) => Err(Failed::invalid(why)),
        };
        match outcome {
            Err(failed) if failed.0.kind != FailureKind::Unavailable => {
                tracing::warn!(
                    call = call.method,
                    error = failed.0.message,
                    "refused a Docker Engine's call"
                );
                Ok(docker::failed(&failed.0.message))
            }
            outcome => outcome,
        }
    }

    async fn docker_call(&self, call: Call) -> Result<Value, Failed> {
        if let Some(answer) = docker::always(&call) {
            return Ok(answer);
        }
        if needs_member(&call) {
            self.ready(SETTLED).await?;
        } else if docker::later(&call) == Later::No
            && tokio::time::timeout(SETTLED, self.settled()).await.is_err()
        {
            return Err(Failed::unavailable(
                "ovld has just started and hears from the other hosts what has happened meanwhile",
            ));
        }
        match call {
            Call::RequestPool(wish) => self.docker_pool(&wish).await.map(docker::pool),
            Call::RequestAddress(wish) => self.docker_address(wish).await.map(docker::address),
            Call::ReleaseAddress { pool, address } => self.docker_release(pool, address).await,
            Call::CreateNetwork(wish) => self.docker_network(*wish).await,
            Call::DeleteNetwork(id) => self.docker_network_rm(&id).await,
            Call::CreateEndpoint(wish) => self.docker_endpoint(*wish).await,
            Call::DeleteEndpoint(id) | Call::Leave(id) => self.docker_endpoint_rm(&id).await,
            Call::Join(id) => self.docker_join(&id),
            Call::Publish(id, ports) => self.docker_publish(&id, &ports).await,
            Call::Revoke(id) => self.docker_revoke(&id).await,
            Call::Activate
            | Call::DriverCapabilities
            | Call::IpamCapabilities
            | Call::AddressSpaces
            | Call::Describe(_)
            | Call::Nothing => Err(Failed::internal("this is answered before")),
        }
    }

    /// Returns an address pool. The Engine requests it before it creates the network.
    async fn docker_pool(&self, wish: &PoolWish) -> Result<Pool, Failed> {
        let choice = {
            let state = self.state.borrow();
            state.check_member()?;
            docker::choose_pool(wish, &state.view.networks).map_err(Failed::invalid)?
        };
        let v6 = match choice {
            Choice::Range(prefix) => return Ok(Pool { prefix, chosen: None }),
            Choice::Free { v6 } => v6,
        };
        if self.config.pool.addr().is_ipv4() == v6 {
            let family = if v6 { "IPv6" } else { "IPv4" };
            return Err(Failed::invalid(format!(
                "the pool {}, from which ranges are chosen, has no {family} addresses: give a range with --subnet",
                self.config.pool
            )));
        }
        let mut taken = self.kernel.prefixes().await.map_err(Failed::from)?;
        let mut guard = self.state.borrow_mut();
        let state = &mut *guard;
        taken.extend(state.engines.chosen().map(|pool| pool.prefix));
        let prefix = self.choose_subnet(state, &taken, false)?;
        let pool = Pool { prefix, chosen: Some(u32::from_le_bytes(self.random())) };
        let now = state.now();
        state.engines.choose(pool, now);
        Ok(pool)
    }

    /// Reserves an address for an endpoint that the Engine has yet to create, or returns the address of a gateway.
    async fn docker_address(&self, wish: AddressWish) -> Result<IpNet, Failed> {
        let (pool, wanted) = match wish {
            AddressWish::Gateway(pool, wanted) => {
                let state = self.state.borrow();
                let subnet = subnet_of(&state, pool).ok().map(|(_, subnet)| subnet);
                return docker::wanted_gateway(pool.prefix, subnet, wanted).map_err(Failed::invalid);
            }
            AddressWish::Endpoint(pool, wanted) => (pool, wanted),
        };
        let (network, subnet) = {
            let state = self.state.borrow();
            state.check_member()?;
            let (network, subnet) = subnet_of(&state, pool)?;
            (network.clone(), *subnet)
        };
        let reserved = match wanted {
            Some(address) => self.reserve_exact(&network, address).await?,
            None => self.reserve_any(&network, &subnet).await?,
        };
        let net = reserved.keep();
        let mut state = self.state.borrow_mut();
        let now = state.now();
        state.engines.reserve(network.id, net.addr(), now);
        Ok(net)
    }

    /// Releases an address. An endpoint of the Engine that still has it is deleted.
    async fn docker_release(&self, pool: Pool, address: IpAddr) -> Result<Value, Failed> {
        let left: Vec<EndpointId> = {
            let mut guard = self.state.borrow_mut();
            let state = &mut *guard;
            let Ok((network, _)) = subnet_of(state, pool) else { return Ok(docker::nothing()) };
            let network = network.id;
            if state.engines.take_reserved(network, address) {
                state.addresses.release(network, address);
            }
            let own = state.view.own().into_iter().flat_map(|own| own.table.with_address(network, address));
            own.map(|endpoint| endpoint.id).filter(|id| engine_endpoint(state, *id).is_some()).collect()
        };
        if !left.is_empty() {
            self.take_away(&left).await?;
        }
        Ok(docker::nothing())
    }

    /// Creates or joins a network. Returns once the association is on this host's disk.
    async fn docker_network(&self, wish: NetworkWish) -> Result<Value, Failed> {
        let (plan, pools) = {
            let mut guard = self.state.borrow_mut();
            let state = &mut *guard;
            state.check_member()?;
            if state.engines.network(&wish.id).is_some() {
                return Ok(docker::nothing());
            }
            let pools = state.engines.chosen_of(&wish.prefixes);
            let is_chosen = |prefix| pools.iter().any(|pool| pool.prefix == prefix);
            let plan =
                docker::plan_network(&wish, &state.view.networks, is_chosen).map_err(Failed::invalid)?;
            state.engines.use_pools(&pools);
            (plan, pools)
        };
        let network = match plan {
            Plan::Join(network) => network,
            Plan::Make(create) => match self.network_create_for(*create, true).await {
                Ok(made) => made.id,
                // A host of another Engine may have created the network at the same time.
                Err(failed) => {
                    let is_chosen = |prefix| pools.iter().any(|pool: &Pool| pool.prefix == prefix);
                    match docker::plan_network(&wish, &self.state.borrow().view.networks, is_chosen) {
                        Ok(Plan::Join(network)) => network,
                        Ok(Plan::Make(_)) | Err(_) => return Err(failed),
                    }
                }
            },
        };
        let kept = EngineNetwork { network, pools };
        self.state.borrow_mut().engines.join(&wish.id, kept);
        self.write_table(vec![Entry::Held(network)], Vec::new());
        self.save_soon();
        if let Err(failed) = self.saved().await {
            self.leave_network(&wish.id)?;
            return Err(failed);
        }
        self.event("network", &self.network_name(network), "joined by a Docker Engine");
        Ok(docker::nothing())
    }

    /// Leaves a network. Endpoints on it that the Engine failed to delete are deleted first.
    async fn docker_network_rm(&self, id: &str) -> Result<Value, Failed> {
        let left: Vec<EndpointId> = {
            let state = self.state.borrow();
            let is_there =
                |local: &LocalEndpoint| local.docker.as_ref().is_some_and(|docker| docker.network == id);
            state.endpoints.iter().filter(|(_, local)| is_there(local)).map(|(id, _)| id).collect()
        };
        self.take_away(&left).await?;
        self.leave_network(id)?;
        self.saved().await?;
        Ok(docker::nothing())
    }

    /// Forgets a network of the Engine. If it was the last one on this host for a network of the cluster, that
    /// network is no longer held here, and is removed if it was created for Engines and is unused.
    fn leave_network(&self, id: &str) -> Result<(), Failed> {
        let left = self.state.borrow_mut().engines.leave(id);
        let Some((network, is_last)) = left else { return Ok(()) };
        self.save_soon();
        if !is_last {
            return Ok(());
        }
        let name = self.network_name(network);
        self.write_table(Vec::new(), vec![Key::Held(network)]);
        self.event("network", &name, "left by a Docker Engine");
        // Before gossip has caught up, the other holders are unknown. The network is then removed later if it is
        // unused.
        if self.state.borrow().phase.is_caught_up() { self.remove_unused(network) } else { Ok(()) }
    }

    /// Removes a network that was created for Engines and is unused. Does nothing otherwise.
    fn remove_unused(&self, network: NetworkId) -> Result<(), Failed> {
        let unused = {
            let state = self.state.borrow();
            let found = state.view.networks.get(&network);
            found.filter(|found| is_unused(&state, found)).map(|found| found.network.clone())
        };
        let Some(unused) = unused else { return Ok(()) };
        let name = unused.name.clone();
        self.write_network(unused, true)?;
        self.event("network", &name, "removed: no Engine has it any more");
        Ok(())
    }

    /// Creates an endpoint. Succeeds if it exists with the same addresses; one with other addresses is replaced.
    async fn docker_endpoint(&self, wish: EndpointWish) -> Result<Value, Failed> {
        let _alone = self.containers.alone(&wish.id.endpoint).await;
        let network = {
            let state = self.state.borrow();
            state.check_member()?;
            let kept = state.engines.network(&wish.id.network);
            kept.filter(|network| state.view.networks.contains_key(network)).ok_or_else(|| {
                Failed::not_found(
                    "the network that this one of the Engine stands for is gone: `docker network rm` it and make it again",
                )
            })?
        };
        if let Some((id, there)) = self.of_engine(&wish.id) {
            // The response was lost, and the Engine repeats the call.
            if there.addresses.iter().map(IpNet::addr).eq(wish.addresses.iter().copied()) {
                return Ok(docker::endpoint());
            }
            self.take_away(&[id]).await?;
        }
        let EndpointWish { id, addresses, mac, name, aliases, namespace, labels, allowed, allowed_macs } =
            wish;
        let mut request = Attach {
            name,
            network: network.to_string(),
            netns: NetnsRef::Path(HERE.into()),
            addresses,
            mac: Some(mac),
            ifname: None,
            aliases,
            namespace,
            labels,
            publish: Vec::new(),
            not_ready: false,
            allowed,
            allowed_macs,
            pod: None,
            bandwidth: Bandwidth::default(),
        };
        let network = self.check_attach(&request, docker::MAX_NAME)?;
        let place = self.take_place(&request, &network)?;
        request.ifname = Some(docker::waiting_name(place.device.as_str()));
        let mut reserved = Vec::new();
        for address in &request.addresses {
            let known = self.state.borrow_mut().engines.take_reserved(network.id, *address);
            let kept = if known { self.reserve_kept(&network, *address) } else { None };
            reserved.push(match kept {
                Some(kept) => kept,
                None => self.reserve_exact(&network, *address).await?,
            });
        }
        let local = LocalEndpoint {
            ifname: String::new(),
            inode: 0,
            cni: None,
            beside: None,
            docker: Some(id),
            netns: HERE.into(),
        };
        let first = self.state.borrow().view.own().is_none_or(|own| own.table.networks().next().is_none());
        let ports = self.reserve_ports(&request.name, &network, &[])?;
        self.make(request, &network, place, (reserved, ports), local, None).await?;
        if first && let Err(failed) = self.mind_firewalls_now().await {
            tracing::warn!(error = failed.0.message, "cannot look after the Engine's firewall");
        }
        Ok(docker::endpoint())
    }

    /// Deletes an endpoint. Succeeds if it does not exist.
    async fn docker_endpoint_rm(&self, id: &EngineEndpoint) -> Result<Value, Failed> {
        let _alone = self.containers.alone(&id.endpoint).await;
        if let Some((id, _)) = self.of_engine(id) {
            self.take_away(&[id]).await?;
        }
        Ok(docker::nothing())
    }

    /// Replaces the published ports of an endpoint.
    async fn docker_publish(&self, id: &EngineEndpoint, ports: &[Publish]) -> Result<Value, Failed> {
        let _alone = self.containers.alone(&id.endpoint).await;
        let (id, _) = self
            .of_engine(id)
            .ok_or_else(|| Failed::not_found("the endpoint is gone: start the container again"))?;
        self.revoke(id).await?;
        if !ports.is_empty() {
            self.publish(id, ports).await?;
        }
        Ok(docker::nothing())
    }

    /// Withdraws all published ports of an endpoint. Succeeds if it does not exist.
    async fn docker_revoke(&self, id: &EngineEndpoint) -> Result<Value, Failed> {
        let _alone = self.containers.alone(&id.endpoint).await;
        if let Some((id, _)) = self.of_engine(id) {
            self.revoke(id).await?;
        }
        Ok(docker::nothing())
    }

    /// Returns the interface and the routes that the Engine configures in the container.
    fn docker_join(&self, id: &EngineEndpoint) -> Result<Value, Failed> {
        let gone = || Failed::not_found("the endpoint is gone: start the container again");
        let (_, endpoint) = self.of_engine(id).ok_or_else(gone)?;
        let state = self.state.borrow();
        let network: &Network = &state.view.networks.get(&endpoint.network).ok_or_else(gone)?.network;
        let device = docker::waiting_name(Device::endpoint(endpoint.id).as_str());
        if if_nametoindex(device.as_str()).is_err() {
            return Err(gone());
        }
        let addresses = endpoint.addresses.iter().map(IpNet::addr);
        let joined = Joined {
            device,
            gateways: addresses.filter_map(|address| ipam::gateway_on(network, address)).collect(),
            ranges: match network.mode {
                Mode::L2 => Vec::new(),
                Mode::L3 => network.subnets.iter().map(|subnet| subnet.prefix).collect(),
            },
        };
        Ok(docker::joined(&joined, network.internal))
    }

    /// Gives an endpoint the name that its container has in the Engine. If the name is taken on the network, it
    /// becomes an alias.
    pub(super) fn name_docker(&self, names: &DockerName) -> Result<(), Failed> {
        let found = {
            let state = self.state.borrow();
            let is_it = |local: &LocalEndpoint| {
                local.docker.as_ref().is_some_and(|docker| docker.endpoint == names.endpoint)
            };
            let id = state.endpoints.find(is_it);
            id.and_then(|id| state.own_endpoint(id).cloned())
        };
        let Some(mut endpoint) = found else { return Err(Failed::not_found("no such endpoint")) };
        let given = endpoint.name != names.endpoint.chars().take(12).collect::<String>();
        // The Engine accepts names with a dot at the end, which are the same names in DNS.
        let as_name = |name: &str| {
            let name = name.trim_end_matches('.');
            crate::config::is_name_within(name, docker::MAX_NAME).then(|| name.to_owned())
        };
        let name = as_name(&names.name);
        let place = (endpoint.network, endpoint.namespace.clone(), name.clone().unwrap_or_default());
        let taken = {
            let state = self.state.borrow();
            state.endpoint_named(&place).is_some() || state.endpoints.is_name_reserved(&place)
        };
        let mut aliases: Vec<String> = std::mem::take(&mut endpoint.aliases);
        aliases.extend(names.aliases.iter().filter_map(|alias| as_name(alias)));
        match name {
            Some(name) if given || taken => aliases.push(name),
            Some(name) => endpoint.name = name,
            None => tracing::warn!(container = names.name, "the name of a container cannot be a name in DNS"),
        }
        let mut seen = BTreeSet::from([canonical_name(&endpoint.name)]);
        // Peers refuse a table with a longer alias.
        aliases.retain(|alias| alias.len() <= crate::config::MAX_NAME && seen.insert(canonical_name(alias)));
        endpoint.aliases = aliases;
        super::attach::check_sizes(&endpoint.aliases, &endpoint.labels).map_err(Failed::invalid)?;
        let local = self.state.borrow().endpoints.get(endpoint.id).cloned();
        if let Some(local) = local {
            self.keep_endpoint(&endpoint, &local).map_err(|error| Failed::internal(format!("{error:#}")))?;
        }
        self.event("endpoint", &endpoint.name, "named as its container");
        self.write_table(vec![Entry::Endpoint(endpoint)], Vec::new());
        Ok(())
    }

    /// Returns the endpoint of this host by the Engine's id. `None` if it does not exist.
    fn of_engine(&self, id: &EngineEndpoint) -> Option<(EndpointId, Endpoint)> {
        let state = self.state.borrow();
        let found = state.endpoints.find(|local| local.docker.as_ref() == Some(id))?;
        Some((found, state.own_endpoint(found)?.clone()))
    }

    /// Returns the name of a network, or its id if it is unknown.
    fn network_name(&self, id: NetworkId) -> String {
        let state = self.state.borrow();
        state.view.networks.get(&id).map_or_else(|| id.to_string(), |found| found.network.name.clone())
    }
}

/// Whether a network was created for Engines, and no member holds it or has an endpoint on it.
fn is_unused(state: &State, found: &NetworkState) -> bool {
    let id = found.network.id;
    let members = state.view.nodes.values().filter(|node| state.view.alloc.members.contains(&node.record.id));
    found.network.on_demand
        && !found.removing
        && !state.local.attaches.wants(id)
        && !members
            .into_iter()
            .any(|node| node.table.holds(id) || node.table.endpoints_on(id).next().is_some())
}

/// Returns the Engine's id of an endpoint. `None` if no Engine created it.
fn engine_endpoint(state: &State, id: EndpointId) -> Option<&EngineEndpoint> {
    state.endpoints.get(id)?.docker.as_ref()
}

/// Returns the network and subnet of an address pool.
fn subnet_of(state: &State, pool: Pool) -> Result<(&Network, &ovl_proto::object::Subnet), Failed> {
    docker::subnet_of(pool, state.engines.networks(), &state.view.networks).map_err(Failed::not_found)
}
