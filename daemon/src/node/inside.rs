//! What ovl gave the interfaces of workloads: puts back what they lost, hands default routes on, and follows MAC addresses
//! that another CNI plugin set.
//!
//! A workload that sets its interface down and up again loses its IPv6 addresses and all routes. The kernel worker sees
//! that it is up again ([`KernelEvent::PeerChanged`](ovl_kernel::KernelEvent)); nothing is looked at otherwise.

use std::collections::BTreeSet;
use std::rc::Rc;
use std::time::Duration;

use ovl_dataplane::device::{Device, Role};
use ovl_kernel::{HostEnd, Mended, PeerSpec};
use ovl_proto::id::{EndpointId, Mac};
use ovl_proto::object::Network;
use ovl_proto::table::{Endpoint, Entry};

use super::attach::{gateways, host_end};
use super::{Failed, Node};
use crate::endpoints::LocalEndpoint;
use crate::problems::Code;

/// The time for which a workload is left alone after its interface came up: it may change more at once. It also bounds
/// what a workload costs that sets its interface up again and again.
const SETTLE: Duration = Duration::from_millis(100);

/// An endpoint of this host whose peer interface ovl configured, with its network.
pub(super) struct Configured {
    pub(super) endpoint: Endpoint,
    pub(super) local: LocalEndpoint,
    pub(super) network: Network,
}

impl Node {
    /// Handles a change of the peer interface of an endpoint: after a moment, puts back what it lost.
    pub(super) fn look_inside(self: &Rc<Self>, device: Device) {
        if !self.state.borrow_mut().endpoints.begin_look(device) {
            return;
        }
        let node = Rc::clone(self);
        tokio::task::spawn_local(async move {
            tokio::time::sleep(SETTLE).await;
            node.state.borrow_mut().endpoints.end_look(device);
            if let Err(Failed(failure)) = node.mend(device).await {
                // The workload may have ended, or set its interface down again.
                tracing::info!(%device, error = failure.message, "cannot put back what an interface of a workload lost");
            }
        });
    }

    async fn mend(&self, device: Device) -> Result<(), Failed> {
        let Some(Role::Endpoint(id)) = device.role() else { return Ok(()) };
        let Some(configured) = self.configured(id) else { return Ok(()) };
        let Configured { endpoint, local, network } = &configured;
        let netns = self.kernel.open_netns(&local.netns).map_err(Failed::from)?;
        if netns.inode != local.inode {
            return Ok(());
        }
        let spec = PeerSpec {
            device,
            addresses: endpoint.addresses.clone(),
            gateways: gateways(network, endpoint),
            host_end: host_end(&self.state.borrow().view, network, endpoint),
            resolver: self.ways_to_resolver(network, endpoint, local.cni.is_none()),
        };
        let mended = self.kernel.mend(netns, vec![spec]).await.map_err(Failed::from)?;
        for Mended { mac, changed, .. } in mended {
            if changed {
                self.event(
                    "endpoint",
                    &endpoint.name,
                    "addresses and routes that its interface lost were put back",
                );
            }
            if let Some(mac) = mac {
                self.follow_mac(id, mac);
            }
        }
        Ok(())
    }

    /// Gives the default routes of endpoints that were removed from a namespace to the endpoint there that was attached
    /// next, and has a gateway. `namespaces` are inodes.
    pub(super) async fn hand_default_routes_on(&self, namespaces: BTreeSet<u64>) {
        for inode in namespaces {
            let left: Vec<Configured> = {
                let state = self.state.borrow();
                let all = state.endpoints.iter().filter(|(_, local)| local.inode == inode);
                let ids: Vec<EndpointId> = all.map(|(id, _)| id).collect();
                drop(state);
                ids.into_iter().filter_map(|id| self.configured(id)).collect()
            };
            let Some(first) = left.first() else { continue };
            let netns = self.kernel.open_netns(&first.local.netns);
            let Some(netns) = netns.ok().filter(|netns| netns.inode == inode) else { continue };
            let specs = left.iter().map(|Configured { endpoint, network, .. }| PeerSpec {
                device: Device::endpoint(endpoint.id),
                addresses: Vec::new(),
                gateways: gateways(network, endpoint),
                host_end: HostEnd::Port(Device::bridge(network.id), false),
                resolver: None,
            });
            if let Err(error) = self.kernel.mend(netns, specs.collect()).await {
                tracing::warn!(%error, "cannot hand on the default route of a workload");
            }
        }
    }

    /// Returns an endpoint of this host that ovl configured, and that is connected. `None` for another one.
    pub(super) fn configured(&self, id: EndpointId) -> Option<Configured> {
        let state = self.state.borrow();
        let endpoint = state.own_endpoint(id).filter(|endpoint| !state.local.is_disconnected(endpoint))?;
        let local = state.endpoints.get(id).filter(|local| local.docker.is_none())?;
        let network = &state.view.networks.get(&endpoint.network)?.network;
        Some(Configured { endpoint: endpoint.clone(), local: local.clone(), network: network.clone() })
    }

    /// Follows the MAC address that the interface of an endpoint has. Only a later plugin of a runtime's chain sets one
    /// on purpose; what another workload does is reported, and frames from that address are refused.
    pub(super) fn follow_mac(&self, id: EndpointId, mac: Mac) {
        let Some(Configured { endpoint, local, network }) = self.configured(id) else { return };
        let object = id.to_string();
        if mac == endpoint.mac || endpoint.allowed_macs.contains(&mac) {
            self.state.borrow_mut().problems.set(Code::OtherMac, object, None);
            return;
        }
        let reason = if local.cni.is_some() {
            match self.take_mac(network.id, mac) {
                Ok(_taken) => match self.change_mac(&endpoint, &local, mac) {
                    Ok(()) => {
                        self.state.borrow_mut().problems.set(Code::OtherMac, object, None);
                        return;
                    }
                    Err(error) => format!("{error:#}"),
                },
                Err(Failed(failure)) => failure.message,
            }
        } else {
            "it is followed only for container runtimes, whose plugins may set it".to_owned()
        };
        let sentence = format!(
            "endpoint {} on network {}: its interface {} has the MAC address {mac} instead of {}, so nothing reaches it: \
             {reason}. Set the address back in its namespace (`ip link set {} address {}`), or attach it with `--mac {mac}`",
            endpoint.name, network.name, local.ifname, endpoint.mac, local.ifname, endpoint.mac
        );
        self.state.borrow_mut().problems.set(Code::OtherMac, object, Some(sentence));
    }

    fn change_mac(&self, endpoint: &Endpoint, local: &LocalEndpoint, mac: Mac) -> anyhow::Result<()> {
        let changed = Endpoint { mac, ..endpoint.clone() };
        self.keep_endpoint(&changed, local)?;
        self.write_table(vec![Entry::Endpoint(changed)], Vec::new());
        self.event(
            "endpoint",
            &endpoint.name,
            &format!("has the MAC address {mac} now, which another plugin set"),
        );
        Ok(())
    }
}
