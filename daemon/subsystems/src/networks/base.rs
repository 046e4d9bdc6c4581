//! The subsystem of the base packet filter: the nftables table about all networks of this host, and IP forwarding.
//!
//! It is apart from [`super::Networks`] because it comes before all devices: nothing is sent or accepted by a device
//! that the filter does not know. [`BaseFilter`] owns what was last sent. The rules are in [`super::filter`]. Begin to
//! read at the `Subsystem` implementation.

use std::net::{IpAddr, SocketAddr};

use ipnet::IpNet;
use ovl_cluster::view::{Node, View};
use ovl_dataplane::diff::diff;
use ovl_dataplane::op::Op;
use ovl_dataplane::state::Dataplane;
use ovl_proto::object::Network;
use ovl_proto::table::Endpoint;

use super::filter::{self, FilterUnderlay};
use super::switched::routes_for_policies;
use crate::encryption::tunnel;
use crate::subsystem::{Change, Cluster, Part, Subsystem};

/// The base packet filter that was last sent, and whether it may have changed since.
#[derive(Debug, Default)]
pub struct BaseFilter {
    /// Whether traffic that leaves the cluster is masqueraded.
    masquerade: bool,
    /// Addresses of this host that endpoints of internal networks may reach.
    open: Vec<IpAddr>,
    sent: Dataplane,
    changed: bool,
}

impl BaseFilter {
    /// Begins with settings that do not change: whether traffic that leaves the cluster is masqueraded, and the
    /// addresses of this host that endpoints of internal networks may reach.
    pub fn new(masquerade: bool, open: Vec<IpAddr>) -> Self {
        Self { masquerade, open, ..Self::default() }
    }

    fn part(&self, cluster: &Cluster<'_>) -> Dataplane {
        let (view, local) = (cluster.view, cluster.local);
        let all = view.networks.values().map(|state| &state.network);
        let built: Vec<&Network> = all.filter(|network| local.is_built(view, network.id)).collect();
        let mut dataplane = Dataplane::default();
        let Some(underlay) = underlay(view) else { return dataplane };
        let gate = tunnel::gate(view, &local.key_epochs);
        let is_exposed = underlay.has_vxlan && !underlay.members.is_empty();
        if built.is_empty() && gate.is_none() && !is_exposed {
            return dataplane;
        }
        dataplane.filter = Some(filter::render(&built, &underlay, gate, self.masquerade, &self.open));
        for network in built.iter().filter(|network| !network.internal || routes_for_policies(view, network))
        {
            for subnet in &network.subnets {
                let name = match subnet.prefix {
                    IpNet::V4(_) => "net.ipv4.ip_forward",
                    IpNet::V6(_) => "net.ipv6.conf.all.forwarding",
                };
                dataplane.sysctls.insert(name.to_owned(), "1".to_owned());
            }
        }
        dataplane
    }
}

/// Returns the underlay as the packet filter sees it. `None` before this host has a record.
fn underlay(view: &View) -> Option<FilterUnderlay> {
    let at = |node: &Node| SocketAddr::new(node.record.vtep, node.record.vxlan_port);
    let members = view.nodes.values().filter(|node| {
        let id = node.record.id;
        // One that is reached at another address may send to the main one already, or still.
        let is_heard = !view.crosses_nat(node) && !view.has_other_family(node);
        id != view.me && view.alloc.members.contains(&id) && is_heard
    });
    Some(FilterUnderlay {
        own: at(view.own()?),
        members: members.map(at).collect(),
        has_vxlan: view.networks.values().any(|found| filter::has_vxlan(&found.network)),
    })
}

impl Subsystem for BaseFilter {
    fn changed(&mut self, change: &Change<'_>, cluster: &Cluster<'_>) {
        self.changed |= match *change {
            Change::Network(_) | Change::Built(_) | Change::Host(_) | Change::Tunnel | Change::ThisHost => {
                true
            }
            // With policies, the host routes between endpoints of an internal network.
            Change::Resources(keys) => {
                keys.iter().any(|key| key.kind.is_policy())
                    && cluster.view.switched().any(|network| network.internal)
            }
            Change::Entry { .. }
            | Change::Rights(_)
            | Change::HostRights { .. }
            | Change::Attaching(_)
            | Change::Backends(_)
            | Change::Groups(_)
            | Change::FastPath
            | Change::Uplink => false,
        };
    }

    fn desired(&self, cluster: &Cluster<'_>) -> Dataplane {
        self.part(cluster)
    }

    fn resync(&mut self, cluster: &Cluster<'_>) -> Dataplane {
        self.changed = false;
        self.sent = self.part(cluster);
        self.sent.clone()
    }

    fn plan(&mut self, cluster: &Cluster<'_>) -> Vec<Op> {
        if !std::mem::take(&mut self.changed) {
            return Vec::new();
        }
        let desired = self.part(cluster);
        let ops = diff(&self.sent, &desired, cluster.caught_up);
        self.sent = desired;
        ops
    }

    fn sent(&self) -> Option<Dataplane> {
        Some(self.sent.clone())
    }

    fn prepare(&mut self, _: &Endpoint, _: &Network, cluster: &Cluster<'_>) -> Part {
        Part { before: self.plan(cluster), wants: Dataplane::default() }
    }

    fn withdraw(&mut self) {
        *self = Self::new(self.masquerade, std::mem::take(&mut self.open));
    }
}
