//! The subsystem of networks: bridges, VXLAN devices, FDB entries, neighbours, routes and endpoints.
//!
//! [`Networks`] owns the data plane that was last sent, separately for each network. If only single endpoints changed,
//! the plan looks at these alone ([`touched`]); any other change compares the whole network. [`BaseFilter`] is the packet
//! filter about all networks. Begin to read at [`desired::network_part`], and then at the `Subsystem` implementation of
//! [`Networks`].

mod base;
pub mod desired;
pub mod filter;
pub mod mtu;
mod multicast;
pub mod ranges;
mod routed;
mod switched;
pub mod touched;

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use ipnet::IpNet;
use ovl_cluster::addresses;
use ovl_cluster::view::View;
use ovl_dataplane::device::Device;
use ovl_dataplane::diff::diff;
use ovl_dataplane::op::{LinkOp, NftOp, Op};
use ovl_dataplane::state::{Dataplane, Link, Remote};
use ovl_proto::id::{NetworkId, NodeId};
use ovl_proto::object::{Mode, Network};
use ovl_proto::table::{Endpoint, Entry};

pub use self::base::BaseFilter;
use self::mtu::network_mtu;
pub use self::multicast::MOST_OF_HOST;
pub(crate) use self::routed::{PeerPath, path_to};
use self::touched::TouchedEndpoints;
use crate::endpoints::{endpoint_part, hairpin};
use crate::mtu::{path_mtu, vxlan_overhead};
use crate::subsystem::{Change, Cluster, Outcome, Part, Subsystem};

/// The data plane of networks that was last sent, what may have changed since, and what the kernel rejected.
#[derive(Debug, Default)]
pub struct Networks {
    sent: BTreeMap<NetworkId, Dataplane>,
    /// Whether the table of guards for ports in hairpin mode was sent. It stays until a full pass finds it without
    /// elements.
    has_guards: bool,
    /// Whether there were Services when the ports were last planned: then all ports are in hairpin mode.
    served: bool,
    /// Networks that must be compared as a whole.
    changed: BTreeSet<NetworkId>,
    /// Changed endpoints of networks that need no whole comparison.
    touched: BTreeMap<NetworkId, TouchedEndpoints>,
    /// Networks with a rejected operation since the last full pass, with the first reason.
    refused: BTreeMap<NetworkId, String>,
    batch: BatchNetworks,
}

/// The networks whose devices were created or rejected in the current batch.
#[derive(Debug, Default)]
struct BatchNetworks {
    created: BTreeSet<NetworkId>,
    refused: BTreeSet<NetworkId>,
}

/// How frames for a remote host leave this one in VXLAN.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct VxlanHop {
    /// The network.
    pub network: NetworkId,
    /// Its VXLAN device on this host.
    pub device: Device,
    /// The VTEP and VXLAN port of the remote host.
    pub remote: Remote,
    /// The largest IP packet that endpoints send to the remote host by the device, in bytes.
    pub mtu: u16,
}

/// How packets of workloads reach a remote host by a direct route.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DirectHop {
    /// The network.
    pub network: NetworkId,
    /// The subnet of the network that the addresses are in.
    pub subnet: IpNet,
    /// The gateway address of a block of the remote host. What this host sends to it has a gateway address of its own as its
    /// source, and takes the way of workloads' packets.
    pub gateway: IpAddr,
    /// The largest IP packet that passes to the remote host, in bytes.
    pub mtu: u16,
}

impl Networks {
    /// Returns how packets are routed directly to each remote host, on the network with the smallest id that does so and is
    /// built there.
    ///
    /// Internal networks do not count: no host answers other hosts there.
    pub fn direct_hops(&self, view: &View) -> BTreeMap<NodeId, DirectHop> {
        let mut hops = BTreeMap::new();
        for (id, sent) in &self.sent {
            let Some(network) = view.networks.get(id).map(|state| &state.network) else { continue };
            if network.internal || network.encrypted || network.mode != Mode::L3 {
                continue;
            }
            for (block, holder) in view.blocks(*id) {
                let Some(peer) = view.nodes.get(&holder) else { continue };
                let is_direct = sent.routes.get(&block).is_some_and(|hop| {
                    hop.device.is_none() && hop.gateway == Some(peer.record.vtep) && hop.source.is_some()
                });
                let subnet = network.subnets.iter().find(|subnet| subnet.prefix.contains(&block));
                let Some(subnet) = subnet.filter(|_| is_direct && !peer.record.not_built.contains(id)) else {
                    continue;
                };
                let Some(mtu) = view.own().map(|own| path_mtu(own, peer)) else { continue };
                let (subnet, gateway) = (subnet.prefix, addresses::gateway(block));
                hops.entry(holder).or_insert(DirectHop { network: *id, subnet, gateway, mtu });
            }
        }
        hops
    }

    /// Returns the VXLAN devices of unencrypted networks that are built here.
    pub fn vxlan_devices(&self) -> impl Iterator<Item = Device> {
        self.sent.values().flat_map(|sent| {
            let links = sent.links.iter();
            links
                .filter(|(_, link)| matches!(link, Link::Vxlan { sealed: false, .. }))
                .map(|(device, _)| *device)
        })
    }

    /// Returns how frames are sent to a remote host in unencrypted VXLAN, on the network with the smallest id that has
    /// an FDB entry for the host itself and is built there. `None` if there is none.
    pub fn vxlan_to(&self, view: &View, host: NodeId) -> Option<VxlanHop> {
        let not_built = &view.nodes.get(&host)?.record.not_built;
        self.sent.iter().filter(|(id, _)| !not_built.contains(id)).find_map(|(id, sent)| {
            let device = Device::vxlan(*id);
            let remote = *sent.remotes.get(&(device, addresses::mac_of_host(*id, host)))?;
            let Some(Link::Vxlan { mtu, sealed: false, .. }) = sent.links.get(&device) else { return None };
            let path = path_mtu(view.own()?, view.nodes.get(&host)?);
            Some(VxlanHop {
                network: *id,
                device,
                remote,
                mtu: (*mtu).min(path.saturating_sub(vxlan_overhead(remote.vtep))),
            })
        })
    }

    fn all_sent(&self) -> Dataplane {
        let mut all = Dataplane::default();
        self.sent.values().for_each(|part| all.merge(part.clone()));
        if self.has_guards {
            all.tables.extend([hairpin::table()]);
        }
        all
    }

    /// Puts the table of guards before operations that need it.
    fn with_guards(&mut self, ops: Vec<Op>) -> Vec<Op> {
        let guards =
            |op: &Op| matches!(op, Op::Nft(NftOp::SetElement(element)) if element.set == hairpin::HAIRPINS);
        if self.has_guards || !ops.iter().any(guards) {
            return ops;
        }
        self.has_guards = true;
        let (table, skeleton) = hairpin::table();
        [Op::Nft(NftOp::SetTable(table, skeleton))].into_iter().chain(ops).collect()
    }

    fn mark(&mut self, network: NetworkId) {
        self.changed.insert(network);
    }

    /// Returns the operations for the touched endpoints of a network. `None` if the network must be compared as a
    /// whole; it is then marked for that.
    fn plan_touched(&mut self, network: NetworkId, cluster: &Cluster<'_>) -> Option<Vec<Op>> {
        if self.changed.contains(&network) {
            return None;
        }
        let touched = self.touched.remove(&network).unwrap_or_default();
        let prune = cluster.may_prune(network);
        let ops = self
            .sent
            .get_mut(&network)
            .and_then(|sent| touched::plan(cluster.view, cluster.local, network, touched, sent, prune));
        if ops.is_none() {
            self.mark(network);
        }
        ops
    }

    fn plan_network(&mut self, network: NetworkId, cluster: &Cluster<'_>) -> Vec<Op> {
        if let Some(ops) = self.plan_touched(network, cluster) {
            return ops;
        }
        self.changed.remove(&network);
        self.touched.remove(&network);
        let desired = desired::network_part(cluster.view, cluster.local, network);
        let prune = cluster.may_prune(network);
        let sent = self.sent.entry(network).or_default();
        let ops = diff(sent, &desired, prune);
        let empty = desired == Dataplane::default();
        if prune {
            *sent = desired;
        } else {
            sent.merge(desired);
        }
        if empty && prune {
            self.sent.remove(&network);
        }
        ops
    }
}

fn has_guards(part: &Dataplane) -> bool {
    part.elements.of(&hairpin::HAIRPINS).is_some()
}

impl Subsystem for Networks {
    fn changed(&mut self, change: &Change<'_>, cluster: &Cluster<'_>) {
        match *change {
            Change::Entry { host, entry: Entry::Endpoint(endpoint) } => {
                self.touched.entry(endpoint.network).or_default().note(cluster.view.me, host, endpoint);
            }
            Change::Attaching(endpoint) => {
                self.touched.entry(endpoint.network).or_default().note_attach(endpoint.id);
            }
            Change::Groups(network) => self.touched.entry(network).or_default().note_groups(),
            Change::Rights(network)
            | Change::HostRights { network, .. }
            | Change::Network(network)
            | Change::Built(network) => self.mark(network),
            Change::Tunnel => {
                let networks = cluster.view.networks.values().map(|found| &found.network);
                self.changed
                    .extend(networks.filter(|network| network.may_be_sealed()).map(|network| network.id));
            }
            Change::ThisHost => self.changed.extend(self.sent.keys().copied()),
            Change::Resources(keys) => {
                if keys.iter().any(|key| key.kind.is_policy()) {
                    // With policies, the host routes between endpoints of an internal network.
                    let networks = cluster.view.switched().filter(|network| network.internal);
                    self.changed.extend(networks.map(|network| network.id));
                }
                let served = cluster.view.has_services();
                if std::mem::replace(&mut self.served, served) != served {
                    self.changed.extend(cluster.view.switched().map(|network| network.id));
                }
            }
            Change::Entry { .. }
            | Change::Host(_)
            | Change::Backends(_)
            | Change::FastPath
            | Change::Uplink => {}
        }
    }

    fn desired(&self, cluster: &Cluster<'_>) -> Dataplane {
        let parts = cluster.view.networks.keys();
        let parts = parts.map(|network| desired::network_part(cluster.view, cluster.local, *network));
        let mut all = Dataplane::default();
        parts.for_each(|part| all.merge(part));
        if self.has_guards || has_guards(&all) {
            all.tables.extend([hairpin::table()]);
        }
        all
    }

    fn resync(&mut self, cluster: &Cluster<'_>) -> Dataplane {
        self.changed.clear();
        self.touched.clear();
        self.sent.clear();
        self.served = cluster.view.has_services();
        for network in cluster.view.networks.keys() {
            let part = desired::network_part(cluster.view, cluster.local, *network);
            if part != Dataplane::default() {
                self.sent.insert(*network, part);
            }
        }
        self.has_guards = self.sent.values().any(has_guards);
        self.all_sent()
    }

    fn plan(&mut self, cluster: &Cluster<'_>) -> Vec<Op> {
        let networks: BTreeSet<NetworkId> = self.changed.iter().chain(self.touched.keys()).copied().collect();
        let ops = networks.into_iter().flat_map(|network| self.plan_network(network, cluster)).collect();
        self.with_guards(ops)
    }

    fn sent(&self) -> Option<Dataplane> {
        self.refused.is_empty().then(|| self.all_sent())
    }

    fn prepare(&mut self, endpoint: &Endpoint, network: &Network, cluster: &Cluster<'_>) -> Part {
        let mut before = self.plan_network(network.id, cluster);
        let mtu = network_mtu(cluster.view, network);
        let wants = endpoint_part(cluster.view, cluster.local, network, endpoint, mtu);
        // Attach creates the veth pair itself, without an operation.
        let there = Dataplane { links: wants.links.clone(), ..Dataplane::default() };
        before.extend(diff(&there, &wants, false));
        Part { before: self.with_guards(before), wants }
    }

    fn detached(&mut self, network: NetworkId, cluster: &Cluster<'_>) -> Vec<Op> {
        let ops = self.plan_touched(network, cluster).unwrap_or_default();
        self.with_guards(ops)
    }

    fn attached(&mut self, endpoint: &Endpoint, wants: &Dataplane) {
        self.sent.entry(endpoint.network).or_default().merge(wants.clone());
    }

    fn outcome(&mut self, outcome: Outcome<'_>) {
        match (outcome.refusal, outcome.op.breaks_network()) {
            (None, Some(network)) if matches!(outcome.op, Op::Link(LinkOp::Add(..))) => {
                self.batch.created.insert(network);
            }
            (Some(reason), Some(network)) => {
                self.batch.refused.insert(network);
                // An attach must not take the devices as created: neither the next one, nor one that was planned while
                // these operations were in flight.
                self.sent.remove(&network);
                self.refused.entry(network).or_insert_with(|| reason.to_owned());
            }
            (None, _) | (Some(_), None) => {}
        }
    }

    fn batch_done(&mut self, full: bool) {
        let BatchNetworks { created, refused } = std::mem::take(&mut self.batch);
        if full {
            // Keep only networks that this pass could not repair.
            self.refused.retain(|network, _| refused.contains(network));
        } else {
            // Keep the first failure until one batch has created all of the network's devices. A later batch is
            // partial, so its success proves nothing.
            for network in created.difference(&refused) {
                self.refused.remove(network);
            }
        }
    }

    fn refusal(&self, network: NetworkId) -> Option<&str> {
        self.refused.get(&network).map(String::as_str)
    }

    fn withdraw(&mut self) {
        *self = Self::default();
    }
}
