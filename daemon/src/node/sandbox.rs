//! Sandboxes: network namespaces that outlive the programs in them and this daemon, with an endpoint on each
//! of their networks.
//!
//! A sandbox is mounted only when it is complete. If the daemon is killed before that, the namespace
//! disappears, and with it the interfaces of the endpoints. The files on the disk say which sandboxes should
//! exist. A sandbox without its namespace was only partly created or deleted, and the rest of it is deleted.

use std::collections::{BTreeMap, BTreeSet};
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::path::PathBuf;

use ovl_control::{Attach, EndpointInfo, NetnsRef, SandboxCreate, SandboxInfo};
use ovl_dataplane::device::{Device, Role};
use ovl_kernel::{self as kernel, MountPoint, NetnsHandle, Process};
use ovl_proto::bandwidth::Bandwidth;
use ovl_proto::id::{EndpointId, NetworkId};
use ovl_subsystems::names::resolver::resolv_conf;

use super::{Failed, Node};
use crate::config::is_name;
use crate::problems::Code;
use crate::sandboxes::{HOST, Joined, NONE, Sandbox, Wanted, refusal, wanted};

impl Node {
    /// Creates a sandbox with all its endpoints, or nothing.
    pub(super) async fn sandbox_create(&self, request: SandboxCreate) -> Result<SandboxInfo, Failed> {
        let joined = self.check_sandbox(&request)?;
        self.living_sandboxes().await?;
        let name = &request.name;
        let _busy = self.sandboxes.take(name)?;
        let path = kernel::netns_file(name);
        if self.sandboxes.get(name).is_some() {
            return Err(Failed::conflict(format!(
                "there is a sandbox {name} already: `ovlctl sandbox rm {name}` removes it"
            )));
        }
        if mount_point(path.clone()).await? != MountPoint::Free {
            return Err(Failed::conflict(format!(
                "{} is there already, and is not ovl's: choose another name, or remove it (`ip netns del {name}`)",
                path.display()
            )));
        }
        let NetnsHandle { netns, cookie } = match joined {
            Joined::Host => kernel::own_netns().await,
            Joined::Networks(_) => kernel::new_netns().await,
        }
        .map_err(Failed::from)?;
        let mut sandbox = Sandbox { name: name.clone(), joined, cookie, endpoints: Vec::new() };
        if let Err(failed) = self.build(&mut sandbox, &request, netns).await {
            if let Err(left) = self.discard(&sandbox, "not completed").await {
                tracing::warn!(
                    error = left.0.message,
                    sandbox = name,
                    "something is left of a sandbox that failed"
                );
            }
            return Err(failed);
        }
        let mut info = self.sandbox_info(&sandbox, &BTreeSet::new());
        if !request.publish.is_empty() {
            info.warnings = self.firewall_problems();
        }
        self.sandboxes.add(sandbox);
        self.event("sandbox", name, "created");
        Ok(info)
    }

    /// Validates a request and resolves its networks.
    fn check_sandbox(&self, request: &SandboxCreate) -> Result<Joined, Failed> {
        if !is_name(&request.name) {
            return Err(Failed::invalid(format!(
                "'{}' is no name for a sandbox: letters, digits, '-', '_' and '.', at most 63, a letter or digit first",
                request.name
            )));
        }
        let joined = match wanted(&request.networks).map_err(Failed::invalid)? {
            Wanted::Host => Joined::Host,
            Wanted::Networks(names) => Joined::Networks(self.network_ids(names)?),
        };
        let endpoints = matches!(&joined, Joined::Networks(ids) if !ids.is_empty());
        if !request.publish.is_empty() && !endpoints {
            return Err(Failed::invalid(
                "no port is published for a sandbox on no network, or on the host's own: there a program's port is the \
                 host's anyway",
            ));
        }
        if !endpoints && (request.namespace.is_some() || !request.labels.is_empty()) {
            return Err(Failed::invalid(
                "a namespace and labels are an endpoint's, and a sandbox on no network has none: leave them out",
            ));
        }
        Ok(joined)
    }

    fn network_ids(&self, names: &[String]) -> Result<Vec<NetworkId>, Failed> {
        let state = self.state.borrow();
        let mut ids = Vec::new();
        for name in names {
            let Some(found) = state.view.network(name) else {
                return Err(Failed::no_network(&state.view, name));
            };
            if ids.contains(&found.network.id) {
                return Err(Failed::invalid(format!("network {} is given twice", found.network.name)));
            }
            ids.push(found.network.id);
        }
        Ok(ids)
    }

    /// Attaches the namespace to its networks, saves the sandbox, and then mounts the namespace.
    async fn build(
        &self,
        sandbox: &mut Sandbox,
        request: &SandboxCreate,
        netns: OwnedFd,
    ) -> Result<(), Failed> {
        if let Joined::Networks(networks) = &sandbox.joined {
            let outward = {
                let state = self.state.borrow();
                let is_open =
                    |id: &NetworkId| state.view.networks.get(id).is_some_and(|found| !found.network.internal);
                networks.iter().position(is_open).unwrap_or(0)
            };
            for (number, network) in networks.iter().enumerate() {
                let attach = Attach {
                    name: sandbox.name.clone(),
                    network: network.to_string(),
                    netns: NetnsRef::Path(format!("/proc/self/fd/{}", netns.as_raw_fd()).into()),
                    addresses: Vec::new(),
                    mac: None,
                    ifname: Some(format!("eth{number}")),
                    aliases: Vec::new(),
                    namespace: request.namespace.clone(),
                    labels: request.labels.clone(),
                    publish: if number == outward { request.publish.clone() } else { Vec::new() },
                    not_ready: false,
                    allowed: Vec::new(),
                    allowed_macs: Vec::new(),
                    pod: None,
                    bandwidth: Bandwidth::default(),
                };
                let made = self.attach(attach).await?;
                sandbox.endpoints.push(endpoint_id(&made)?);
            }
        }
        let kept = self.sandboxes.keep(&self.boot_id, sandbox);
        kept.map_err(|error| Failed::internal(format!("{error:#}")))?;
        let resolv_conf = self.sandbox_resolv_conf(sandbox);
        let file = kernel::netns_file(&sandbox.name);
        kernel::mount_netns(&netns, file, resolv_conf).await.map_err(Failed::from)?;
        // A teardown that began meanwhile did not find this sandbox.
        if self.state.borrow().phase.is_leaving() {
            return Err(Failed::unavailable("ovld is stopping"));
        }
        Ok(())
    }

    /// Returns the `resolv.conf` of a sandbox. `None` if it has no resolver.
    fn sandbox_resolv_conf(&self, sandbox: &Sandbox) -> Option<String> {
        let state = self.state.borrow();
        let endpoints = sandbox.endpoints.iter().filter_map(|id| state.own_endpoint(*id));
        let addresses: Vec<_> = endpoints.flat_map(|endpoint| &endpoint.addresses).copied().collect();
        (!addresses.is_empty()).then(|| resolv_conf(&addresses))
    }

    /// Deletes a sandbox. Does nothing if it does not exist.
    pub(super) async fn sandbox_rm(&self, name: &str, force: bool) -> Result<(), Failed> {
        let _busy = self.sandboxes.take(name)?;
        let Some(sandbox) = self.sandboxes.get(name) else { return Ok(()) };
        if !force
            && sandbox.joined != Joined::Host
            && let MountPoint::Netns(cookie, inode) = mount_point(kernel::netns_file(name)).await?
            && cookie == sandbox.cookie
        {
            let inside = kernel::processes_in(BTreeSet::from([inode])).await.map_err(Failed::from)?;
            if let Some(inside) = inside.get(&inode) {
                return Err(Failed::conflict(refusal(name, inside)));
            }
        }
        self.discard(&sandbox, "removed").await
    }

    /// Lists all sandboxes by name.
    pub(super) async fn sandbox_ls(&self) -> Result<Vec<SandboxInfo>, Failed> {
        let living = self.living_sandboxes().await?;
        let inodes =
            living.iter().filter(|(sandbox, _)| sandbox.joined != Joined::Host).map(|(_, inode)| *inode);
        let inside = kernel::processes_in(inodes.collect()).await.map_err(Failed::from)?;
        let nobody = BTreeSet::new();
        Ok(living
            .iter()
            .map(|(sandbox, inode)| self.sandbox_info(sandbox, inside.get(inode).unwrap_or(&nobody)))
            .collect())
    }

    /// Deletes all sandboxes, for teardown. Programs continue to run in namespaces with only a loopback
    /// interface.
    pub(super) async fn remove_sandboxes(&self) -> Result<(), Failed> {
        for sandbox in self.sandboxes.all() {
            self.sandbox_rm(&sandbox.name, true).await?;
        }
        Ok(())
    }

    /// Returns the sandboxes whose namespaces are mounted at their paths, with the inodes of the namespaces.
    /// Deletes what is left of the others: those that were partly created or deleted when the last daemon
    /// stopped, and those that another program unmounted.
    pub(super) async fn living_sandboxes(&self) -> Result<Vec<(Sandbox, u64)>, Failed> {
        let all = self.sandboxes.all();
        if all.is_empty() {
            return Ok(Vec::new());
        }
        let paths = all.iter().map(|sandbox| kernel::netns_file(&sandbox.name)).collect();
        let places = kernel::mount_points(paths).await.map_err(Failed::from)?;
        let mut living = Vec::new();
        for (sandbox, place) in all.into_iter().zip(places) {
            match place {
                MountPoint::Netns(cookie, inode) if cookie == sandbox.cookie => living.push((sandbox, inode)),
                _ => {
                    // The name is locked by a request that creates or deletes this sandbox. It also cleans
                    // up.
                    let Ok(_busy) = self.sandboxes.take(&sandbox.name) else { continue };
                    if self.sandboxes.get(&sandbox.name).as_ref() == Some(&sandbox) {
                        self.discard(&sandbox, "gone with its namespace").await?;
                    }
                }
            }
        }
        Ok(living)
    }

    /// Deletes a sandbox with its endpoints. The namespace is deleted first: a daemon that is killed later
    /// finishes the rest after its restart.
    async fn discard(&self, sandbox: &Sandbox, why: &str) -> Result<(), Failed> {
        let name = &sandbox.name;
        kernel::unmount_netns(kernel::netns_file(name), sandbox.cookie).await.map_err(Failed::from)?;
        self.withdraw(&sandbox.endpoints, why)?;
        let devices = sandbox.endpoints.iter().copied().map(Device::endpoint).collect();
        self.kernel.delete_links(devices).await.map_err(Failed::from)?;
        let known = self.sandboxes.forget(name);
        if known.map_err(|error| Failed::internal(format!("{error:#}")))? {
            self.event("sandbox", name, why);
        }
        Ok(())
    }

    fn sandbox_info(&self, sandbox: &Sandbox, inside: &BTreeSet<Process>) -> SandboxInfo {
        let state = self.state.borrow();
        let name_of = |id: &NetworkId| {
            state.view.networks.get(id).map_or_else(|| id.to_string(), |found| found.network.name.clone())
        };
        let addresses: BTreeMap<EndpointId, _> =
            state.own_endpoints().map(|endpoint| (endpoint.id, &endpoint.addresses)).collect();
        SandboxInfo {
            name: sandbox.name.clone(),
            netns: kernel::netns_file(&sandbox.name),
            networks: match &sandbox.joined {
                Joined::Host => vec![HOST.to_owned()],
                Joined::Networks(ids) if ids.is_empty() => vec![NONE.to_owned()],
                Joined::Networks(ids) => ids.iter().map(name_of).collect(),
            },
            addresses: sandbox
                .endpoints
                .iter()
                .filter_map(|id| addresses.get(id))
                .copied()
                .flatten()
                .copied()
                .collect(),
            processes: inside.iter().map(|process| process.pid).collect(),
            warnings: Vec::new(),
        }
    }

    /// Reads the sandboxes that the last run saved. A damaged file is moved away and reported.
    pub(super) fn read_sandboxes(&self) -> anyhow::Result<()> {
        for (file, sentence) in self.sandboxes.read(&self.boot_id)? {
            self.state.borrow_mut().problems.set(Code::DamagedFile, file, Some(sentence));
        }
        Ok(())
    }
}

fn endpoint_id(made: &EndpointInfo) -> Result<EndpointId, Failed> {
    match made.device.as_deref().and_then(Device::new).and_then(|device| device.role()) {
        Some(Role::Endpoint(id)) => Ok(id),
        _ => Err(Failed::internal("an endpoint's device without an id")),
    }
}

async fn mount_point(path: PathBuf) -> Result<MountPoint, Failed> {
    let places = kernel::mount_points(vec![path]).await.map_err(Failed::from)?;
    places.first().copied().ok_or_else(|| Failed::internal("a path was not looked at"))
}
