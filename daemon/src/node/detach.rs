//! Detach: endpoints leave the owner table and the kernel, by request or with their network namespace.

use std::collections::BTreeSet;

use ovl_dataplane::device::{Device, Role};
use ovl_dataplane::op::Op;
use ovl_kernel::{PeerLocation, RetiredEndpoint};
use ovl_proto::id::{EndpointId, NetworkId};
use ovl_proto::table::{Endpoint, Key};

use super::{Failed, Node};
use crate::problems::Code;
use ovl_subsystems as subsystems;

impl Node {
    /// Detaches an endpoint of this host. Succeeds if it does not exist.
    pub(super) async fn detach(
        &self,
        name: &str,
        network: Option<&str>,
        namespace: Option<&str>,
    ) -> Result<(), Failed> {
        let ids = self.own_named(name, network, namespace, "detach it there")?;
        self.take_away(&ids).await
    }

    /// Deletes endpoints from the owner table and from the kernel.
    pub(super) async fn take_away(&self, ids: &[EndpointId]) -> Result<(), Failed> {
        let (retired, networks) = self.retired(ids);
        let namespaces = self.namespaces(ids);
        self.withdraw(ids, "detached")?;
        let ops = {
            let mut state = self.state.borrow_mut();
            let (cluster, mut subsystems) = state.parts();
            // Only changes of entries are planned here. The rest takes longer and is left to the next pass.
            let ops = networks
                .into_iter()
                .flat_map(|network| subsystems::detached(&mut subsystems, network, &cluster));
            let is_theirs = |op: &Op| retired.iter().any(|one| op.device() == Some(one.device));
            ops.filter(|op| !is_theirs(op)).collect()
        };
        let (outcomes, result) = self.kernel.retire(retired, ops).await;
        self.note_outcomes(&outcomes, None);
        result.map_err(|error| {
            self.state.borrow_mut().reconcile.ask_full();
            self.work.notify_one();
            Failed::from(error)
        })?;
        self.hand_default_routes_on(namespaces).await;
        Ok(())
    }

    /// Returns the inodes of the namespaces in which ovl configured these endpoints.
    fn namespaces(&self, ids: &[EndpointId]) -> BTreeSet<u64> {
        let state = self.state.borrow();
        let all = ids.iter().filter_map(|id| state.endpoints.get(*id));
        all.filter(|local| local.docker.is_none()).map(|local| local.inode).collect()
    }

    /// Returns what the kernel worker needs to delete these endpoints, and the networks that they are on.
    fn retired(&self, ids: &[EndpointId]) -> (Vec<RetiredEndpoint>, BTreeSet<NetworkId>) {
        let state = self.state.borrow();
        let other = |id| match state.endpoints.get(id) {
            Some(local) if local.docker.is_some() => PeerLocation::Moved,
            Some(local) => {
                self.kernel.open_netns(&local.netns).map_or(PeerLocation::Unknown, PeerLocation::Netns)
            }
            None => PeerLocation::Unknown,
        };
        let retired =
            ids.iter().map(|id| RetiredEndpoint { device: Device::endpoint(*id), other: other(*id) });
        let networks = ids.iter().filter_map(|id| state.own_endpoint(*id)).map(|endpoint| endpoint.network);
        (retired.collect(), networks.collect())
    }

    /// Deletes endpoints from the owner table, and their files from the run directory.
    pub(super) fn withdraw(&self, ids: &[EndpointId], why: &str) -> Result<(), Failed> {
        let mut names = Vec::new();
        {
            let mut state = self.state.borrow_mut();
            for id in ids {
                names.extend(state.own_endpoint(*id).map(|endpoint| endpoint.name.clone()));
                state.endpoints.remove(*id);
                state.local.attaches.forget_engine(*id);
                state.local.isolation.forget(*id);
                state.problems.set(Code::EndpointIsolated, id.to_string(), None);
                state.problems.set(Code::OtherMac, id.to_string(), None);
                self.published.release(*id);
            }
        }
        for id in ids {
            let removed = self.state.borrow().endpoints.forget_file(*id);
            removed.map_err(|error| Failed::internal(format!("{error:#}")))?;
        }
        if names.is_empty() {
            return Ok(());
        }
        let networks = self.own_networks();
        self.write_table(Vec::new(), ids.iter().map(|id| Key::Endpoint(*id)).collect());
        for name in names {
            self.event("endpoint", &name, why);
        }
        if networks != self.own_networks() {
            // A removed network is served until its last endpoint is deleted.
            self.recompute_networks();
        }
        Ok(())
    }

    fn own_networks(&self) -> Vec<NetworkId> {
        self.state.borrow().view.own().map_or_else(Vec::new, |own| own.table.networks().collect())
    }

    /// Withdraws the endpoints whose host interfaces are gone: the kernel deletes them with the namespace.
    pub(super) fn lost(&self, devices: impl IntoIterator<Item = Device>) {
        let ids: Vec<EndpointId> = {
            let state = self.state.borrow();
            devices
                .into_iter()
                .filter(|device| !state.endpoints.reserved_devices().contains(device))
                .filter_map(|device| match device.role() {
                    Some(Role::Endpoint(id)) => Some(id),
                    Some(Role::Bridge(_) | Role::Vxlan(_) | Role::Tunnel(_)) | None => None,
                })
                .filter(|id| state.own_endpoint(*id).is_some())
                .collect()
        };
        if ids.is_empty() {
            return;
        }
        if let Err(failed) = self.withdraw(&ids, "gone with its namespace") {
            tracing::error!(error = failed.0.message, "cannot withdraw an endpoint");
        }
    }

    /// Deletes what an interrupted attach left in the kernel. An endpoint without a file was never announced, and its
    /// interface would collide with the next attach.
    pub(super) async fn remove_unfinished(&self, kept: &[Endpoint]) {
        let is_kept = |device: &Device| kept.iter().any(|endpoint| Device::endpoint(endpoint.id) == *device);
        let removed = async {
            let links = self.kernel.dump().await?.links.into_keys();
            let ends = links.filter(|device| matches!(device.role(), Some(Role::Endpoint(_))));
            self.kernel.delete_links(ends.filter(|device| !is_kept(device)).collect()).await?;
            // An interrupted detach may have left the container interface unchanged.
            self.kernel.sweep().await
        };
        // The reconcile loop tries again once gossip has caught up.
        if let Err(error) = removed.await {
            tracing::warn!(%error, "cannot remove what was left of attaches");
        }
    }
}
