//! Calls of container runtimes. [`ovl_runtimes::cni`] parses them; this module carries them out, one call at a time
//! for each container.

mod alone;
mod deleted;

use std::collections::BTreeSet;
use std::path::Path;

use ipnet::IpNet;
use ovl_cluster::addresses as ipam;
use ovl_control::{Attach, CniCall, CniError, EndpointInfo, FailureKind, NetnsRef, PeerState};
use ovl_dataplane::device::Device;
use ovl_dataplane::observed::Inside;
use ovl_kernel::{self as kernel, KernelError, Netns, open_netns, port_mac};
use ovl_proto::bandwidth::Bandwidth;
use ovl_proto::id::{EndpointId, Mac};
use ovl_proto::object::{Driver, Mode, Network};
use ovl_runtimes::cni::{self, Add, Attachment, Call, Check, Gc, Made, Status, code, error};
use serde_json::Value;
use tokio::time::Instant;

pub(super) use self::alone::Containers;
use super::peers::UNREACHABLE;
use super::{Failed, Node};
use crate::problems::Code;

impl Node {
    /// Carries out a call of a runtime, and returns what the plugin prints.
    pub(super) async fn cni(&self, call: &CniCall) -> Result<Value, CniError> {
        let started = Instant::now();
        let call = cni::parse(call)?;
        let command = call.command();
        let result = match call {
            Call::Add(add) => self.cni_add(&add).await,
            Call::Del(attachment) => self.cni_del(&attachment).await.map(|()| Value::Null),
            Call::Check(check) => self.cni_check(&check).await.map(|()| Value::Null),
            Call::Gc(gc) => self.cni_gc(&gc).await.map(|()| Value::Null),
            Call::Status(status) => self.cni_status(&status).map(|()| Value::Null),
        };
        self.measured.borrow_mut().cni(command, result.is_ok(), started.elapsed());
        result
    }

    async fn cni_add(&self, add: &Add) -> Result<Value, CniError> {
        let _alone = self.containers.alone(&add.attachment.container_id).await;
        // That DEL came before this ADD.
        self.carry_out_deleted(&add.attachment).await?;
        if let Some(id) = self.attached(&add.attachment) {
            return Err(error(
                code::ATTACHED,
                format!("{} is attached to {} already", add.attachment.ifname, add.attachment.network),
                format!(
                    "container {} has the endpoint {} there: a DEL must come before the next ADD",
                    add.attachment.container_id,
                    self.name_of(id)
                ),
            ));
        }
        // A network may be unknown until the host is a member.
        let ready = self.ready_for(&add.network).await;
        ready.map_err(|Failed(failure)| error(code::LATER, "ovld is not ready", failure.message))?;
        let network = self.cni_network(&add.network)?;
        let more = add.more.iter().map(|(name, ifname)| Ok((self.cni_network(name)?, ifname.as_str())));
        let more: Vec<(Network, &str)> = more.collect::<Result<_, CniError>>()?;
        // Opened once before the attach, so that an absent namespace has an error code of its own.
        container_netns(&add.netns)?;
        let request = Attach {
            name: self.free_name(add, &network),
            network: network.id.to_string(),
            netns: NetnsRef::Path(add.netns.clone()),
            addresses: add.addresses.clone(),
            mac: add.mac,
            ifname: Some(add.attachment.ifname.clone()),
            aliases: Vec::new(),
            namespace: add.namespace.clone(),
            labels: add.labels.clone(),
            publish: add.publish.clone(),
            not_ready: false,
            allowed: add.allowed.clone(),
            allowed_macs: add.allowed_macs.clone(),
            pod: add.pod.clone(),
            bandwidth: add.bandwidth,
        };
        let (endpoint, made) =
            self.attach_for(request, Some(add.attachment.clone()), None).await.map_err(explain)?;
        for (network, ifname) in &more {
            if let Err(mut error) = self.cni_add_beside(add, network, ifname).await {
                // A DEL follows, but it may be long in coming.
                if let Err(left) = self.cni_take_away(&add.attachment).await {
                    tracing::error!(
                        error = left.details,
                        "cannot take away what was attached before a failure"
                    );
                }
                error.details = format!("{ifname} on network {}: {}", network.name, error.details);
                return Err(error);
            }
        }
        let mut result = render(add, &network, &endpoint, made);
        // If the configuration has no `dns`, pods get the cluster DNS.
        let silent = result["dns"].as_object().is_none_or(serde_json::Map::is_empty);
        if let Some(dns) = self.pod_dns(&endpoint.namespace).filter(|_| silent) {
            result["dns"] = dns;
        }
        Ok(result)
    }

    /// Attaches a container to one more network, which the runtime does not know of.
    async fn cni_add_beside(&self, add: &Add, network: &Network, ifname: &str) -> Result<(), CniError> {
        let request = Attach {
            name: self.free_name(add, network),
            network: network.id.to_string(),
            netns: NetnsRef::Path(add.netns.clone()),
            addresses: Vec::new(),
            mac: None,
            ifname: Some(ifname.to_owned()),
            aliases: Vec::new(),
            namespace: add.namespace.clone(),
            labels: add.labels.clone(),
            publish: Vec::new(),
            not_ready: false,
            allowed: Vec::new(),
            allowed_macs: Vec::new(),
            pod: add.pod.clone(),
            bandwidth: Bandwidth::default(),
        };
        let attachment = Attachment { ifname: ifname.to_owned(), ..add.attachment.clone() };
        let beside = Some(add.attachment.ifname.clone());
        self.attach_for(request, Some(attachment), beside).await.map(drop).map_err(explain)
    }

    async fn cni_del(&self, attachment: &Attachment) -> Result<(), CniError> {
        let _alone = self.containers.alone(&attachment.container_id).await;
        self.cni_take_away(attachment).await?;
        self.forget_deleted(attachment)
    }

    /// Detaches an attachment and those that were made with it. Succeeds if it does not exist. The caller must hold the lock
    /// of the container.
    async fn cni_take_away(&self, attachment: &Attachment) -> Result<(), CniError> {
        let ids: Vec<EndpointId> = {
            let state = self.state.borrow();
            let all = state.endpoints.iter();
            let theirs = all.filter(|(_, local)| local.known_attachment().as_ref() == Some(attachment));
            theirs.map(|(id, _)| id).collect()
        };
        if ids.is_empty() { Ok(()) } else { self.take_away(&ids).await.map_err(explain) }
    }

    async fn cni_check(&self, check: &Check) -> Result<(), CniError> {
        let _alone = self.containers.alone(&check.attachment.container_id).await;
        let difference = |details: String| {
            Err(error(
                code::DIFFERENCE,
                "the container's attachment differs from the one that was created",
                details,
            ))
        };
        let endpoint = {
            let state = self.state.borrow();
            let id = self.attached(&check.attachment);
            let Some(endpoint) = state.own_endpoints().find(|endpoint| Some(endpoint.id) == id) else {
                return difference(format!(
                    "{} of container {} is not attached to {}",
                    check.attachment.ifname, check.attachment.container_id, check.attachment.network
                ));
            };
            if let Some(address) = state.view.address_conflict(state.view.me, endpoint) {
                return difference(format!(
                    "{address} belongs to another host now, and the endpoint {} is cut off: attach it anew",
                    endpoint.name
                ));
            }
            endpoint.clone()
        };
        let inside = self.inside(&check.netns, &check.attachment.ifname).await?;
        // A later plugin of the chain may have set another MAC address a moment ago.
        if let Some(inside) = &inside {
            self.follow_mac(endpoint.id, inside.mac);
        }
        let endpoint = self.state.borrow().own_endpoint(endpoint.id).cloned().unwrap_or(endpoint);
        cni::check(check, &endpoint, inside.as_ref())
    }

    /// Deletes the stale attachments of a network. If one cannot be deleted, the others still are.
    async fn cni_gc(&self, gc: &Gc) -> Result<(), CniError> {
        let stale: BTreeSet<Attachment> = {
            let state = self.state.borrow();
            let all = state.endpoints.iter().filter_map(|(_, local)| local.known_attachment());
            all.filter(|attachment| attachment.network == gc.network && !gc.keeps(attachment)).collect()
        };
        let mut failed = Vec::new();
        for attachment in &stale {
            if let Err(error) = self.cni_del(attachment).await {
                failed
                    .push(format!("{} of {}: {}", attachment.ifname, attachment.container_id, error.details));
            }
        }
        if failed.is_empty() {
            return Ok(());
        }
        let msg = format!("{} of {} stale attachments could not be taken away", failed.len(), stale.len());
        Err(error(code::KERNEL, msg, failed.join("; ")))
    }

    fn cni_status(&self, status: &Status) -> Result<(), CniError> {
        self.cni_network(&status.network).map_err(|mut error| {
            error.code = code::UNAVAILABLE;
            error
        })?;
        if self.state.borrow().clock.elapsed() <= UNREACHABLE {
            return Ok(());
        }
        let alive = self
            .peers()
            .into_iter()
            .filter(|peer| !peer.own && peer.member && peer.state == PeerState::Alive);
        let (near, far): (Vec<_>, Vec<_>) = alive.partition(|peer| peer.reachable);
        // If a minority of the hosts is unreachable, the fault is most likely there, and must not take this host out
        // of service.
        if far.is_empty() || far.len() < near.len() {
            return Ok(());
        }
        let names: Vec<String> = far.into_iter().map(|peer| peer.name).collect();
        Err(error(
            code::LIMITED,
            "containers may not reach those on other hosts",
            format!(
                "nothing comes directly from {}, which others hear: check the paths and the firewalls of this host, see \
                 `ovlctl status`",
                names.join(", ")
            ),
        ))
    }

    /// Returns the network if an attachment could be created now.
    fn cni_network(&self, name: &str) -> Result<Network, CniError> {
        let state = self.state.borrow();
        let found = state.view.network(name);
        if found.is_none_or(|found| found.network.driver != Driver::Bridge) && !state.is_member() {
            let why = state.problems.get(Code::Admission, "");
            let why = why.unwrap_or("this host is not admitted to the cluster yet");
            return Err(error(code::LATER, "ovld is not ready", why));
        }
        let Some(found) = found else {
            let details = format!(
                "{}; the configuration's key `network`, or else its `name`, says which one is meant",
                Failed::no_network(&state.view, name).0.message
            );
            return Err(error(code::CONFIG, format!("there is no network {name}"), details));
        };
        if found.removing {
            let details = format!(
                "it waits for its last endpoints to go; `ovlctl network create {name}` makes it anew"
            );
            return Err(error(code::CONFIG, format!("network {name} was removed"), details));
        }
        Ok(found.network.clone())
    }

    /// Returns the endpoint of an attachment. `None` if there is none.
    fn attached(&self, attachment: &Attachment) -> Option<EndpointId> {
        let state = self.state.borrow();
        state.endpoints.find(|local| local.cni.as_ref() == Some(attachment))
    }

    fn name_of(&self, id: EndpointId) -> String {
        let state = self.state.borrow();
        let found = state.own_endpoints().find(|endpoint| endpoint.id == id);
        found.map_or_else(|| id.to_string(), |endpoint| endpoint.name.clone())
    }

    /// Returns the name that the runtime requests, or a derived name if that is taken. A pod may be created again
    /// with the same name, maybe on another host, before its previous endpoint is deleted.
    fn free_name(&self, add: &Add, network: &Network) -> String {
        let state = self.state.borrow();
        let namespace = add.namespace.clone().unwrap_or_else(|| "default".to_owned());
        let place = (network.id, namespace, add.name.clone());
        if state.endpoint_named(&place).is_some() || state.endpoints.is_name_reserved(&place) {
            add.other_name(state.view.me)
        } else {
            place.2
        }
    }

    async fn inside(&self, netns: &Path, ifname: &str) -> Result<Option<Inside>, CniError> {
        let netns = container_netns(netns)?;
        self.kernel.inspect(netns, ifname.to_owned()).await.map_err(|cause| kernel_error(&cause))
    }
}

/// Returns the result of an `ADD`.
fn render(add: &Add, network: &Network, endpoint: &EndpointInfo, made: kernel::CreatedEndpoint) -> Value {
    let host = |device: Device, mac: Mac| (device.to_string(), mac);
    let bridge =
        (network.mode == Mode::L2).then(|| host(Device::bridge(network.id), Mac::of_gateway(network.id)));
    let end_mac = |device| match network.mode {
        Mode::L2 => port_mac(device),
        Mode::L3 => Mac::of_gateway(network.id),
    };
    let end = endpoint.device.as_deref().and_then(Device::new).map(|device| host(device, end_mac(device)));
    let gateway = |net: &IpNet| ipam::gateway_on(network, net.addr()).filter(|_| !network.internal);
    let inside = Inside {
        mac: endpoint.mac,
        mtu: made.mtu.into(),
        up: true,
        addresses: endpoint.addresses.clone(),
        gateways: made.gateways,
    };
    let made = Made {
        host: bridge.into_iter().chain(end).collect(),
        inside: &inside,
        addresses: endpoint.addresses.iter().map(|net| (*net, gateway(net))).collect(),
    };
    cni::render(add, &made)
}

/// Opens the network namespace of a container.
fn container_netns(path: &Path) -> Result<Netns, CniError> {
    open_netns(path).map_err(|cause| {
        if path.exists() {
            kernel_error(&cause)
        } else {
            error(code::NO_CONTAINER, "the container's network namespace does not exist", cause.to_string())
        }
    })
}

fn kernel_error(cause: &KernelError) -> CniError {
    error(code::KERNEL, "the kernel refused", cause.to_string())
}

/// Converts a failure of ovld to a CNI error.
fn explain(Failed(failure): Failed) -> CniError {
    let (code, msg) = match failure.kind {
        FailureKind::Invalid | FailureKind::NotFound => {
            (code::CONFIG, "the attachment cannot be made as it is asked for")
        }
        FailureKind::Conflict => (code::TAKEN, "what is asked for is taken"),
        FailureKind::Exhausted => (code::EXHAUSTED, "no address is free"),
        FailureKind::Unavailable => (code::LATER, "ovld cannot do this now"),
        FailureKind::Kernel => (code::KERNEL, "the kernel refused"),
        FailureKind::Internal => (code::INTERNAL, "ovld failed"),
    };
    error(code, msg, failure.message)
}
