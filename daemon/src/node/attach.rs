//! Endpoints of this host: attach, what is kept of them for the next run, and what users see of them.

use std::net::IpAddr;
use std::path::{Path, PathBuf};

use ipnet::IpNet;
use ovl_cluster::addresses as ipam;
use ovl_cluster::view::{Placed, View};
use ovl_control::{Attach, EndpointInfo, EndpointState, FailureKind, NetnsRef, PodInfo, PodRef};
use ovl_dataplane::device::{Device, Role};
use ovl_dataplane::state::Dataplane;
use ovl_kernel::{CreatedEndpoint, EndpointSpec, HostEnd, Netns, Resolver};
use ovl_proto::id::{EndpointId, Mac};
use ovl_proto::object::{Driver, Mode, Network, Subnet};
use ovl_proto::resource::{Labels, Name};
use ovl_proto::table::{Endpoint, Entry, PodIdentity};
use ovl_proto::wire::fields::Unknown;
use ovl_runtimes::cni::{self, Attachment};
use ovl_subsystems::endpoints::hairpin;
use ovl_subsystems::guard;
use ovl_subsystems::networks::mtu::network_mtu;

use super::addresses::Reserved;
use super::reservations::{ReservedName, check_free};
use super::{Failed, Node};
use crate::config::{MAX_NAME, is_known_name, is_name_within};
use crate::endpoints::{LocalEndpoint, Restored};
use crate::problems::Code;
use crate::publish::{self, ReservedPorts};
use ovl_subsystems::{self as subsystems, Change, Part};

impl Node {
    /// Creates an endpoint. Returns once the kernel has it and all peers were told.
    pub(super) async fn attach(&self, request: Attach) -> Result<EndpointInfo, Failed> {
        self.attach_for(request, None, None).await.map(|(endpoint, _)| endpoint)
    }

    /// Creates an endpoint, for a container runtime if `cni` is set. Also returns what was created in the kernel.
    pub(super) async fn attach_for(
        &self,
        request: Attach,
        cni: Option<Attachment>,
        beside: Option<String>,
    ) -> Result<(EndpointInfo, CreatedEndpoint), Failed> {
        self.check_built(&request.network)?;
        self.ready_for(&request.network).await?;
        let network = self.check_attach(&request, if cni.is_some() { cni::MAX_NAME } else { MAX_NAME })?;
        let path = netns_path(&request.netns);
        let netns = self.kernel.open_netns(&path).map_err(Failed::from)?;
        let inode = netns.inode;
        let place = self.take_place(&request, &network)?;
        let ports = self.reserve_ports(&request.name, &network, &request.publish)?;
        let reserved = self.reserve(&request, &network).await?;
        let local = LocalEndpoint { ifname: String::new(), netns: path, inode, cni, beside, docker: None };
        self.make(request, &network, place, (reserved, ports), local, Some(netns)).await
    }

    /// Creates an endpoint whose name, addresses and ports are reserved.
    ///
    /// The container interface is created in the namespace `netns`. Without one, it stays in the host's namespace
    /// until a Docker Engine moves it.
    pub(super) async fn make(
        &self,
        request: Attach,
        network: &Network,
        place: ReservedName<'_>,
        (reserved, ports): (Vec<Reserved<'_>>, ReservedPorts<'_>),
        local: LocalEndpoint,
        netns: Option<Netns>,
    ) -> Result<(EndpointInfo, CreatedEndpoint), Failed> {
        // A container runtime writes resolv.conf of a pod, so pods do not use the resolver at 127.0.0.11.
        let resolver = local.cni.is_none();
        if resolver || self.has_services() {
            self.state.borrow_mut().subsystems.names.resolve(network.id);
        }
        let Some(first) = reserved.first() else {
            return Err(Failed::invalid(format!("network {} has no addresses", network.name)));
        };
        let mac = request.mac.unwrap_or_else(|| ipam::mac_of(network.id, first.net.addr()));
        let _mac = self.take_mac(network.id, mac)?;
        let Some(Role::Endpoint(id)) = place.device.role() else {
            return Err(Failed::internal("an endpoint's device without an id"));
        };
        let endpoint = Endpoint {
            id,
            name: request.name.clone(),
            namespace: request.namespace.clone().unwrap_or_else(|| "default".to_owned()),
            network: network.id,
            mac,
            addresses: reserved.iter().map(|reserved| reserved.net).collect(),
            aliases: request.aliases.clone(),
            labels: request.labels.clone().into(),
            ready: !request.not_ready,
            publish: ports.published().to_vec(),
            allowed: IpNet::aggregate(&request.allowed),
            allowed_macs: request.allowed_macs.clone(),
            groups: super::multicast::at_attach(&self.state.borrow(), network),
            pod: self.identify(&request, local.cni.as_ref()),
            described: None,
            unknown: Unknown::default().played(),
        };
        let endpoint = {
            // The labels are known before the pod can be reached.
            let state = self.state.borrow();
            let described = state.kubernetes.described(&endpoint).flatten().cloned().map(Box::new);
            Endpoint { described, ..endpoint }
        };
        let gateways = gateways(network, &endpoint);
        // Held until the endpoint is in the table or the attach has failed.
        let _policed = self.police_attach(&endpoint);
        if local.docker.is_some() {
            self.state.borrow_mut().local.attaches.set_by_engine(id);
        }
        self.refresh_names();
        let (part, mtu) = {
            let mut state = self.state.borrow_mut();
            let (cluster, mut subsystems) = state.parts();
            let part = subsystems::prepare(&mut subsystems, &endpoint, network, &cluster);
            (part, network_mtu(cluster.view, network))
        };
        let spec = EndpointSpec {
            device: place.device,
            name: request.name.clone(),
            netns,
            ifname: request.ifname.clone(),
            mac,
            mtu,
            host_end: host_end(&self.state.borrow().view, network, &endpoint),
            addresses: endpoint.addresses.clone(),
            gateways,
            resolver: self.ways_to_resolver(network, &endpoint, resolver),
            bandwidth: request.bandwidth,
        };
        let Part { before: ops, wants } = part;
        let (outcomes, made) = self.kernel.prepare_and_create(ops, spec).await;
        let refused = self.note_outcomes(&outcomes, Some((network.id, place.device)));
        let unpublished = || outcomes.iter().find_map(publish::refusal).map(ToString::to_string);
        let refused = refused.or_else(|| unpublished().filter(|_| !endpoint.publish.is_empty()));
        let made = match (made, refused) {
            (Ok(made), None) => made,
            (made, refused) => {
                self.leave_to_the_loop(&wants);
                if made.is_ok() {
                    self.take_back(&endpoint).await?;
                }
                self.state.borrow_mut().local.attaches.forget_engine(id);
                let error = refused.or_else(|| made.err().map(|error| error.to_string())).unwrap_or_default();
                return Err(Failed::kernel(format!(
                    "cannot attach {} to {}: {error}",
                    request.name, network.name
                )));
            }
        };
        let local = LocalEndpoint { ifname: made.ifname.clone(), ..local };
        if let Err(error) = self.keep_endpoint(&endpoint, &local) {
            self.leave_to_the_loop(&wants);
            self.take_back(&endpoint).await?;
            return Err(Failed::internal(format!("{error:#}")));
        }
        let mut info = self.commit(endpoint, local, wants)?;
        if !info.publish.is_empty() {
            self.published.serve(id, ports, &info.addresses);
            info.warnings = self.firewall_problems();
        }
        Ok((info, made))
    }

    /// Returns the identity of the pod that an endpoint is attached for.
    fn identify(&self, request: &Attach, cni: Option<&Attachment>) -> Option<Box<PodIdentity>> {
        let PodRef { name, uid } = request.pod.clone()?;
        let state = self.state.borrow();
        let namespace = request.namespace.as_deref().unwrap_or("default");
        let known = Name::new(namespace, &name);
        let of_same_sandbox = |endpoint: &&Endpoint| {
            let other = state.endpoints.get(endpoint.id).and_then(|local| local.cni.as_ref());
            cni.zip(other).is_some_and(|(one, other)| one.container_id == other.container_id)
        };
        let attaching = state.local.attaches.endpoints().filter(|endpoint| endpoint.pod_name() == known);
        let all = state.view.all_of_pod(&known).map(|placed| placed.endpoint).chain(attaching);
        let created = |endpoint: &Endpoint| endpoint.pod.as_ref().map(|pod| pod.created);
        let own = state.own_endpoints().filter(|endpoint| endpoint.pod_name() == known);
        let of_sandbox = own.filter(of_same_sandbox).filter_map(created).max();
        let last = all.filter_map(created).max().unwrap_or(0);
        Some(Box::new(PodIdentity { name, uid, created: sandbox_time(of_sandbox, last, state.wall_ms()) }))
    }

    /// Requests a full pass, which deletes the set elements that a failed attach may have left in the kernel.
    fn leave_to_the_loop(&self, part: &Dataplane) {
        if part.elements.sets().next().is_some() {
            self.state.borrow_mut().reconcile.ask_full();
            self.work.notify_one();
        }
    }

    /// Deletes an endpoint from the kernel that is not in the owner table yet.
    async fn take_back(&self, endpoint: &Endpoint) -> Result<(), Failed> {
        self.state.borrow_mut().local.attaches.forget_engine(endpoint.id);
        self.kernel.delete_links(vec![Device::endpoint(endpoint.id)]).await.map_err(Failed::from)
    }

    /// Adds an endpoint that the kernel has to the owner table.
    fn commit(
        &self,
        endpoint: Endpoint,
        local: LocalEndpoint,
        wants: Dataplane,
    ) -> Result<EndpointInfo, Failed> {
        let (id, network, name) = (endpoint.id, endpoint.network, endpoint.name.clone());
        {
            let mut guard = self.state.borrow_mut();
            let state = &mut *guard;
            if state.view.address_conflict(state.view.me, &endpoint).is_some() {
                // This host lost the block in the meantime: the next pass has to isolate the endpoint.
                state.changed(Change::Rights(network));
            }
            state.endpoints.add(id, local);
            let (_, subsystems) = state.parts();
            subsystems.into_iter().for_each(|subsystem| subsystem.attached(&endpoint, &wants));
        }
        self.write_table(vec![Entry::Endpoint(endpoint)], Vec::new());
        // The API server may have spoken of the pod meanwhile.
        self.describe_endpoints(Some(id));
        self.event("endpoint", &name, "attached");
        self.own_info(id)
    }

    /// Returns an endpoint of this host in the form that users see.
    fn own_info(&self, id: EndpointId) -> Result<EndpointInfo, Failed> {
        let state = self.state.borrow();
        let placed = state.view.own().and_then(|node| {
            let endpoint = node.table.endpoint(id)?;
            Some(Placed { node, endpoint })
        });
        placed
            .map(|placed| self.endpoint_info(&state, placed))
            .ok_or_else(|| Failed::internal("the endpoint is not in our own table"))
    }

    /// Validates a request and returns its network. `longest` is the maximum length of the endpoint's name in bytes.
    ///
    /// # Errors
    ///
    /// A name or size is invalid, the network is absent or being removed, or this host is not a member, which only a
    /// bridge network permits.
    pub(super) fn check_attach(&self, request: &Attach, longest: usize) -> Result<Network, Failed> {
        let others = request.aliases.iter().chain(&request.namespace).map(|name| (name, MAX_NAME));
        for (name, longest) in std::iter::once((&request.name, longest)).chain(others) {
            if !is_name_within(name, longest) {
                return Err(Failed::invalid(format!(
                    "invalid name '{name}': it must have letters, digits, '-', '_' and single dots between them, at most \
                     {longest} characters, and begin with a letter or digit"
                )));
            }
        }
        if let Some(ifname) = &request.ifname
            && (ifname.is_empty()
                || ifname.len() > 15
                || ifname.contains(|c: char| c == '/' || c.is_whitespace()))
        {
            return Err(Failed::invalid(format!("'{ifname}' is no name for an interface")));
        }
        check_sizes(&request.aliases, &request.labels.clone().into()).map_err(Failed::invalid)?;
        if let Some(PodRef { name, uid }) = &request.pod {
            check_pod(name, uid).map_err(Failed::invalid)?;
        }
        self.check_built(&request.network)?;
        let state = self.state.borrow();
        // Peers refuse a table that exceeds the limits. What is left is for leases and what else the host must write.
        if state.view.own().is_some_and(|own| !own.table.has_room(1024, 1 << 20)) {
            return Err(Failed::conflict(
                "this host has as many endpoints as a table can list: 64,512, or 15 MiB. Attach it on another host"
                    .to_owned(),
            ));
        }
        let found = state.view.network(&request.network);
        if found.is_none_or(|found| found.network.driver != Driver::Bridge) {
            state.check_member()?;
        }
        let Some(found) = found else {
            return Err(Failed::no_network(&state.view, &request.network));
        };
        if found.removing {
            return Err(Failed::conflict(format!(
                "network {} was removed and waits for its last endpoints to go",
                found.network.name
            )));
        }
        guard::check(&found.network, &request.allowed, &request.allowed_macs).map_err(Failed::invalid)?;
        for mac in &request.allowed_macs {
            check_free(&state, found.network.id, *mac)?;
        }
        Ok(found.network.clone())
    }

    /// Returns how the endpoint reaches the resolver. `None` if it does not use one.
    ///
    /// On an internal network, there is no default route, so the endpoint gets routes to the addresses of the cluster
    /// DNS.
    pub(super) fn ways_to_resolver(
        &self,
        network: &Network,
        endpoint: &Endpoint,
        loopback: bool,
    ) -> Option<Resolver> {
        let has = |v4| endpoint.addresses.iter().any(|net| net.addr().is_ipv4() == v4);
        let all = self.config.ranges.dns_addresses().filter(|address| has(address.is_ipv4()));
        let cluster: Vec<IpAddr> = all.filter(|_| network.internal).collect();
        let mac = Mac::of_gateway(network.id);
        (loopback || !cluster.is_empty()).then_some(Resolver { mac, loopback, cluster })
    }

    /// Reserves the requested addresses. For each family without a requested address, it reserves a free one of the
    /// first subnet that has any.
    async fn reserve(&self, request: &Attach, network: &Network) -> Result<Vec<Reserved<'_>>, Failed> {
        let mut reserved: Vec<Reserved<'_>> = Vec::new();
        for address in &request.addresses {
            if let Some(first) = reserved.iter().find(|first| first.net.addr().is_ipv4() == address.is_ipv4())
            {
                return Err(Failed::invalid(format!(
                    "{} and {address} are of one family: an endpoint has one IPv4 and one IPv6 address on a network",
                    first.net.addr()
                )));
            }
            reserved.push(self.reserve_exact(network, *address).await?);
        }
        for v4 in [true, false] {
            let has = |reserved: &Reserved<'_>| reserved.net.addr().is_ipv4() == v4;
            if reserved.iter().any(has) {
                continue;
            }
            let mut subnets =
                network.subnets.iter().filter(|subnet| subnet.prefix.addr().is_ipv4() == v4).peekable();
            while let Some(subnet) = subnets.next() {
                match self.reserve_any(network, subnet).await {
                    Ok(free) => {
                        reserved.push(free);
                        break;
                    }
                    Err(failed) if failed.0.kind == FailureKind::Exhausted && subnets.peek().is_some() => {}
                    Err(failed) => return Err(failed),
                }
            }
        }
        Ok(reserved)
    }

    /// Returns the endpoints of this host with a name.
    ///
    /// # Errors
    ///
    /// Only another host has such an endpoint; `advice` is the last part of that error.
    pub(super) fn own_named(
        &self,
        name: &str,
        network: Option<&str>,
        namespace: Option<&str>,
        advice: &str,
    ) -> Result<Vec<EndpointId>, Failed> {
        let state = self.state.borrow();
        let network = match network {
            Some(name) => {
                let found = state.view.network(name).map(|found| found.network.id);
                Some(found.ok_or_else(|| Failed::no_network(&state.view, name))?)
            }
            None => None,
        };
        let fits = |endpoint: &Endpoint| {
            network.is_none_or(|network| endpoint.network == network)
                && endpoint.namespace == namespace.unwrap_or("default")
        };
        let own = state.view.own().into_iter().flat_map(|own| own.table.named(name));
        let ids = as_spelled(own.filter(|endpoint| fits(endpoint)), name).map(|endpoint| endpoint.id);
        let ids: Vec<_> = ids.collect();
        if ids.is_empty()
            && let Some(elsewhere) = state
                .view
                .all_named(name)
                .find(|placed| fits(placed.endpoint) && state.view.counts(placed.node))
        {
            return Err(Failed::conflict(format!(
                "endpoint {name} is on host {}: {advice}",
                elsewhere.node.record.name
            )));
        }
        Ok(ids)
    }

    /// Sets whether Services send connections to an endpoint, on each network that it is on.
    pub(super) fn endpoint_ready(
        &self,
        name: &str,
        network: Option<&str>,
        namespace: Option<&str>,
        ready: bool,
    ) -> Result<(), Failed> {
        let ids = self.own_named(name, network, namespace, "say it there")?;
        if ids.is_empty() {
            let namespace = namespace.unwrap_or("default");
            return Err(Failed::not_found(format!(
                "there is no endpoint {name} in namespace {namespace}; `ovlctl endpoints` lists them"
            )));
        }
        let changed: Vec<(Endpoint, LocalEndpoint)> = {
            let state = self.state.borrow();
            let both = ids.iter().filter_map(|id| {
                let endpoint = Endpoint { ready, ..state.own_endpoint(*id)?.clone() };
                Some((endpoint, state.endpoints.get(*id)?.clone()))
            });
            both.collect()
        };
        for (endpoint, local) in &changed {
            self.keep_endpoint(endpoint, local).map_err(|error| Failed::internal(format!("{error:#}")))?;
        }
        let entries = changed.into_iter().map(|(endpoint, _)| Entry::Endpoint(endpoint)).collect();
        self.write_table(entries, Vec::new());
        self.event("endpoint", name, if ready { "ready" } else { "not ready" });
        Ok(())
    }

    /// Writes the file of an endpoint, from which a restarted daemon restores it.
    pub(super) fn keep_endpoint(&self, endpoint: &Endpoint, local: &LocalEndpoint) -> anyhow::Result<()> {
        self.state.borrow().endpoints.keep(&self.boot_id, endpoint, local)
    }

    /// Restores the endpoints that the previous run stored. A damaged file is moved away and reported.
    pub(super) fn read_kept(&self) -> anyhow::Result<Vec<Endpoint>> {
        let Restored { endpoints, damaged } = self.state.borrow().endpoints.read(&self.boot_id)?;
        for (file, sentence) in damaged {
            self.state.borrow_mut().problems.set(Code::DamagedFile, file, Some(sentence));
        }
        let mut restored = Vec::new();
        for (mut endpoint, local) in endpoints {
            // They may have changed while no daemon ran.
            endpoint.groups = None;
            if local.cni.is_none() || self.has_services() {
                self.state.borrow_mut().subsystems.names.resolve(endpoint.network);
            }
            let mut state = self.state.borrow_mut();
            if local.docker.is_some() {
                state.local.attaches.set_by_engine(endpoint.id);
            }
            let now = state.now();
            state.multicast.unsettle(endpoint.network, now);
            state.endpoints.add(endpoint.id, local);
            restored.push(endpoint);
        }
        Ok(restored)
    }

    /// Returns an endpoint in the form that users see.
    pub(super) fn endpoint_info(
        &self,
        state: &super::state::State,
        placed: ovl_cluster::view::Placed<'_>,
    ) -> EndpointInfo {
        let ovl_cluster::view::Placed { node, endpoint } = placed;
        let own = node.record.id == state.view.me;
        let local = own.then(|| state.endpoints.get(endpoint.id)).flatten();
        let known = state.view.known_labels(node.record.id, endpoint);
        let isolated = own && state.local.is_disconnected(endpoint)
            || state.view.address_conflict(node.record.id, endpoint).is_some();
        EndpointInfo {
            name: endpoint.name.clone(),
            namespace: endpoint.namespace.clone(),
            network: state
                .view
                .networks
                .get(&endpoint.network)
                .map_or_else(|| endpoint.network.to_string(), |state| state.network.name.clone()),
            node: node.record.name.clone(),
            mac: endpoint.mac,
            addresses: endpoint.addresses.clone(),
            aliases: endpoint.aliases.clone(),
            labels: known.as_deref().unwrap_or(&endpoint.labels).into(),
            state: if !own && !state.view.counts(node) {
                EndpointState::Suspended
            } else if isolated {
                EndpointState::Isolated
            } else {
                EndpointState::Ready
            },
            ifname: local.map(|local| local.ifname.clone()),
            device: own.then(|| Device::endpoint(endpoint.id).to_string()),
            publish: endpoint.publish.clone(),
            warnings: Vec::new(),
            ready: endpoint.ready,
            allowed: endpoint.allowed.clone(),
            allowed_macs: endpoint.allowed_macs.clone(),
            refused: None,
            pod: endpoint.pod.as_ref().map(|pod| PodInfo {
                name: pod.name.clone(),
                uid: pod.uid.clone(),
                current: state.view.is_named_as_pod(node.record.id, endpoint),
            }),
            undecided: match known {
                Some(_) => Vec::new(),
                None => state.subsystems.policy.undecided(&state.view.resources, &endpoint.namespace),
            },
        }
    }
}

/// Returns the time of a pod's sandbox: that of its other endpoints, or now, but after the last sandbox of a pod of its
/// name even if a host's clock is wrong.
fn sandbox_time(same: Option<u64>, last: u64, now: u64) -> u64 {
    same.unwrap_or_else(|| now.max(last.saturating_add(1)))
}

/// Returns the endpoints with exactly this name, or if there are none, those that are called so in another spelling.
pub(super) fn as_spelled<'a>(
    named: impl Iterator<Item = &'a Endpoint>,
    name: &str,
) -> impl Iterator<Item = &'a Endpoint> {
    let (exact, others): (Vec<_>, Vec<_>) = named.partition(|endpoint| endpoint.name == name);
    if exact.is_empty() { others } else { exact }.into_iter()
}

/// Checks the identity of a pod.
///
/// # Errors
///
/// A sentence with what is wrong.
pub(super) fn check_pod(name: &str, uid: &str) -> Result<(), String> {
    if !is_known_name(name, cni::MAX_NAME) || !(uid.is_empty() || is_known_name(uid, cni::MAX_NAME)) {
        return Err(format!(
            "invalid pod '{name}' with the uid '{uid}': both must have only letters, digits, '-', '_' and '.', at most \
             253, a letter or digit first"
        ));
    }
    Ok(())
}

/// Checks the limits for aliases and labels, which keep thousands of endpoints small.
///
/// # Errors
///
/// A sentence with the limits.
pub(super) fn check_sizes(aliases: &[String], labels: &Labels) -> Result<(), String> {
    let length: usize = labels.iter().map(|(key, value)| key.len() + value.len()).sum();
    let clean = labels.iter().all(|(key, value)| !key.chars().chain(value.chars()).any(char::is_control));
    if aliases.len() > 64 || labels.len() > 64 || length > 8192 || !clean {
        return Err(
            "at most 64 aliases, and 64 labels of 8 KiB together without control characters, are allowed"
                .to_owned(),
        );
    }
    Ok(())
}

/// Returns the path of a network namespace.
fn netns_path(netns: &NetnsRef) -> PathBuf {
    match netns {
        NetnsRef::Path(path) => path.clone(),
        NetnsRef::Pid(pid) => Path::new("/proc").join(pid.to_string()).join("ns/net"),
    }
}

/// Returns the gateways of an endpoint's default routes: one for each address family, none on an internal network.
pub(super) fn gateways(network: &Network, endpoint: &Endpoint) -> Vec<IpAddr> {
    let addresses = endpoint.addresses.iter().map(IpNet::addr);
    addresses.filter(|_| !network.internal).filter_map(|at| ipam::gateway_on(network, at)).collect()
}

/// Returns the configuration of the host interface: a bridge port, or routed with the subnets behind each gateway.
pub(super) fn host_end(view: &View, network: &Network, endpoint: &Endpoint) -> HostEnd {
    if network.mode == Mode::L2 {
        return HostEnd::Port(Device::bridge(network.id), hairpin::is_needed(view, network, endpoint));
    }
    let mut routes = Vec::new();
    for address in endpoint.addresses.iter().map(IpNet::addr) {
        let Some(gateway) = ipam::gateway_on(network, address) else { continue };
        let same_family = |subnet: &&Subnet| subnet.prefix.addr().is_ipv4() == address.is_ipv4();
        routes.extend(network.subnets.iter().filter(same_family).map(|subnet| (gateway, subnet.prefix)));
    }
    HostEnd::Routed { mac: Mac::of_gateway(network.id), routes }
}
