//! Names, devices and MAC addresses that are reserved for attaches in flight.

use ovl_cluster::view::Placed;
use ovl_control::Attach;
use ovl_dataplane::device::Device;
use ovl_proto::id::{EndpointId, Mac, NetworkId};
use ovl_proto::object::Network;

use super::state::State;
use super::{Failed, Node};
use crate::endpoints::FullName;
use ovl_subsystems::Change;

/// The reservation of a name and a device for an attach in flight, released when dropped.
pub(super) struct ReservedName<'a> {
    node: &'a Node,
    network: NetworkId,
    name: FullName,
    /// The host interface.
    pub(super) device: Device,
}

/// The reservation of a MAC address for an attach in flight, released when dropped.
pub(super) struct ReservedMac<'a> {
    node: &'a Node,
    network: NetworkId,
    mac: Mac,
}

impl Drop for ReservedMac<'_> {
    fn drop(&mut self) {
        self.node.state.borrow_mut().endpoints.release_mac(self.network, self.mac);
    }
}

impl Drop for ReservedName<'_> {
    fn drop(&mut self) {
        let mut state = self.node.state.borrow_mut();
        state.endpoints.release_name(&self.name);
        state.endpoints.release_device(self.device);
        state.local.attaches.unwant(self.network);
        if !state.local.is_built(&state.view, self.network) {
            // The attach failed, and no other endpoint needs the devices of the network.
            state.changed(Change::Built(self.network));
            self.node.work.notify_one();
        }
    }
}

impl Node {
    /// Reserves the name and the device of an endpoint. To be called before the first `await` of an attach.
    pub(super) fn take_place(&self, request: &Attach, network: &Network) -> Result<ReservedName<'_>, Failed> {
        let namespace = request.namespace.clone().unwrap_or_else(|| "default".to_owned());
        let mut guard = self.state.borrow_mut();
        let state = &mut *guard;
        let name = (network.id, namespace, request.name.clone());
        if let Some(placed) = state.endpoint_named(&name) {
            return Err(Failed::conflict(format!(
                "network {} has an endpoint {} already, on host {}",
                network.name, placed.endpoint.name, placed.node.record.name
            )));
        }
        if !state.endpoints.reserve_name(&name) {
            return Err(Failed::conflict(format!(
                "endpoint {} is being attached at this moment",
                request.name
            )));
        }
        let device = loop {
            let id = EndpointId(self.random());
            if state.own_endpoint(id).is_none() && state.endpoints.reserve_device(Device::endpoint(id)) {
                break Device::endpoint(id);
            }
        };
        if !state.local.is_built(&state.view, network.id) {
            state.changed(Change::Built(network.id));
        }
        state.local.attaches.want(network.id);
        Ok(ReservedName { node: self, network: network.id, name, device })
    }

    /// Reserves a MAC address that no endpoint of the network has.
    pub(super) fn take_mac(&self, network: NetworkId, mac: Mac) -> Result<ReservedMac<'_>, Failed> {
        if !mac.is_unicast() {
            return Err(Failed::invalid(format!("{mac} is not the address of one interface")));
        }
        if mac == Mac::of_gateway(network) {
            return Err(Failed::conflict(format!("{mac} is the gateway's")));
        }
        let mut state = self.state.borrow_mut();
        check_free(&state, network, mac)?;
        if !state.endpoints.reserve_mac(network, mac) {
            return Err(Failed::conflict(format!("{mac} is being given to another endpoint at this moment")));
        }
        Ok(ReservedMac { node: self, network, mac })
    }
}

/// Checks that no endpoint of a network has a MAC address.
///
/// # Errors
///
/// Names the endpoint that has it.
pub(super) fn check_free(state: &State, network: NetworkId, mac: Mac) -> Result<(), Failed> {
    let mut holders = state.view.all_with_mac(network, mac);
    match holders.find(|placed| state.view.counts_on(placed.node, network)) {
        Some(Placed { node, endpoint }) => Err(Failed::conflict(format!(
            "{mac} is in use by endpoint {} on host {}",
            endpoint.name, node.record.name
        ))),
        None => Ok(()),
    }
}
