//! Sandboxes: network namespaces that outlive the programs in them and this daemon, with an endpoint on each
//! of their networks.
//!
//! A sandbox is mounted only when it is complete. If the daemon is killed before that, the namespace
//! disappears, and with it the interfaces of the endpoints. The files on the disk say which sandboxes should
//! exist. A sandbox without its namespace was only partly created or deleted, and the rest of it is deleted.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::path::PathBuf;

use anyhow::Context as _;
use ovl_control::{Attach, EndpointInfo, NetnsRef, SandboxCreate, SandboxInfo};
use ovl_dataplane::device::{Device, Role};
use ovl_files::{Durability, replace};
use ovl_kernel::{self as kernel, MountPoint, NetnsCookie, NetnsHandle, Process};
use ovl_proto::id::{EndpointId, NetworkId};
use ovl_subsystems::names::resolver::resolv_conf;
use serde::{Deserialize, Serialize};

use super::{Failed, Node, remove_if_there};
use crate::config::is_name;
use crate::problems::Code;

/// Maximum number of processes that an error lists.
const NAMED: usize = 10;
/// Maximum number of networks of a sandbox. More interfaces are of no use.
const MAX_NETWORKS: usize = 32;

/// What a sandbox is connected to.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Joined {
    /// The host's own namespace under another name.
    Host,
    /// These networks, in the order of its interfaces. If there are none, it has only a loopback interface.
    Networks(Vec<NetworkId>),
}

/// A sandbox of this host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Sandbox {
    name: String,
    joined: Joined,
    /// Identifies the namespace, independent of what is mounted at its path.
    cookie: NetnsCookie,
    endpoints: Vec<EndpointId>,
}

/// A sandbox in the run directory. It is valid during one boot of the kernel.
#[derive(Debug, Serialize, Deserialize)]
struct Kept {
    boot_id: String,
    sandbox: Sandbox,
}

/// A lock on the name of a sandbox, released when dropped.
struct Busy<'a> {
    node: &'a Node,
    name: String,
}

impl Drop for Busy<'_> {
    fn drop(&mut self) {
        self.node.state.borrow_mut().pending.sandboxes.remove(&self.name);
    }
}

impl Node {
    /// Creates a sandbox with all its endpoints, or nothing.
    pub(super) async fn sandbox_create(&self, request: SandboxCreate) -> Result<SandboxInfo, Failed> {
        let joined = self.check_sandbox(&request)?;
        self.living_sandboxes().await?;
        let name = &request.name;
        let _busy = self.take_sandbox(name)?;
        let path = kernel::netns_file(name);
        if self.state.borrow().sandboxes.contains_key(name) {
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
        self.state.borrow_mut().sandboxes.insert(name.clone(), sandbox);
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
                return Err(Failed::no_network(&state, name));
            };
            if ids.contains(&found.network.id) {
                return Err(Failed::invalid(format!("network {} is given twice", found.network.name)));
            }
            ids.push(found.network.id);
        }
        Ok(ids)
    }

    fn take_sandbox(&self, name: &str) -> Result<Busy<'_>, Failed> {
        if !self.state.borrow_mut().pending.sandboxes.insert(name.to_owned()) {
            return Err(Failed::conflict(format!(
                "sandbox {name} is being made or removed at this moment: try again"
            )));
        }
        Ok(Busy { node: self, name: name.to_owned() })
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
                };
                let made = self.attach(attach).await?;
                sandbox.endpoints.push(endpoint_id(&made)?);
            }
        }
        self.keep_sandbox(sandbox).map_err(|error| Failed::internal(format!("{error:#}")))?;
        let resolv_conf = self.sandbox_resolv_conf(sandbox);
        let file = kernel::netns_file(&sandbox.name);
        kernel::mount_netns(&netns, file, resolv_conf).await.map_err(Failed::from)?;
        // A teardown that began meanwhile did not find this sandbox.
        if self.state.borrow().leaving {
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
        let _busy = self.take_sandbox(name)?;
        let Some(sandbox) = self.state.borrow().sandboxes.get(name).cloned() else { return Ok(()) };
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
        let names: Vec<String> = self.state.borrow().sandboxes.keys().cloned().collect();
        for name in names {
            self.sandbox_rm(&name, true).await?;
        }
        Ok(())
    }

    /// Returns the sandboxes whose namespaces are mounted at their paths, with the inodes of the namespaces.
    /// Deletes what is left of the others: those that were partly created or deleted when the last daemon
    /// stopped, and those that another program unmounted.
    pub(super) async fn living_sandboxes(&self) -> Result<Vec<(Sandbox, u64)>, Failed> {
        let all: Vec<Sandbox> = self.state.borrow().sandboxes.values().cloned().collect();
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
                    let Ok(_busy) = self.take_sandbox(&sandbox.name) else { continue };
                    let same = self.state.borrow().sandboxes.get(&sandbox.name) == Some(&sandbox);
                    if same {
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
        remove_if_there(&self.kept_sandbox(name)).map_err(|error| Failed::internal(format!("{error:#}")))?;
        if self.state.borrow_mut().sandboxes.remove(name).is_some() {
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

    fn kept_sandbox(&self, name: &str) -> PathBuf {
        self.run_dir.sandboxes().join(format!("{name}.json"))
    }

    fn keep_sandbox(&self, sandbox: &Sandbox) -> anyhow::Result<()> {
        let kept = Kept { boot_id: self.boot_id.clone(), sandbox: sandbox.clone() };
        let path = self.kept_sandbox(&sandbox.name);
        replace(&path, &serde_json::to_vec(&kept)?, Durability::Unsynced)
            .with_context(|| format!("writing {}", path.display()))
    }

    /// Reads the sandboxes that the last run saved. Deletes files of an earlier boot. A damaged file is moved
    /// away and reported.
    pub(super) fn read_sandboxes(&self) -> anyhow::Result<()> {
        let dir = self.run_dir.sandboxes();
        for file in fs::read_dir(&dir).with_context(|| format!("reading {}", dir.display()))? {
            let path = file?.path();
            if path.extension().is_none_or(|extension| extension != "json") {
                continue;
            }
            match fs::read(&path).ok().and_then(|bytes| serde_json::from_slice::<Kept>(&bytes).ok()) {
                Some(Kept { boot_id, sandbox }) if boot_id == self.boot_id => {
                    self.state.borrow_mut().sandboxes.insert(sandbox.name.clone(), sandbox);
                }
                Some(_) => remove_if_there(&path)?,
                None => {
                    let aside = path.with_extension("damaged");
                    fs::rename(&path, &aside).with_context(|| format!("setting {} aside", path.display()))?;
                    let sentence = format!(
                        "the file of a sandbox is damaged and was set aside as {}: ovld no longer knows the sandbox; \
                         its endpoints are in `ovlctl endpoints`, its namespace in `ip netns`",
                        aside.display()
                    );
                    self.state.borrow_mut().problems.set(
                        Code::DamagedFile,
                        path.display().to_string(),
                        Some(sentence),
                    );
                }
            }
        }
        Ok(())
    }
}

const HOST: &str = "host";
const NONE: &str = "none";

/// Meaning of the networks of a request.
#[derive(Debug, PartialEq, Eq)]
enum Wanted<'a> {
    Host,
    Networks(&'a [String]),
}

/// Parses the networks of a request. An empty list means the same as `none`, since a network must be named
/// explicitly.
fn wanted(networks: &[String]) -> Result<Wanted<'_>, String> {
    match networks {
        [] => Ok(Wanted::Networks(&[])),
        [one] if one == NONE => Ok(Wanted::Networks(&[])),
        [one] if one == HOST => Ok(Wanted::Host),
        several if several.len() > MAX_NETWORKS => {
            Err(format!("a sandbox joins at most {MAX_NETWORKS} networks, and {} are given", several.len()))
        }
        several => match several.iter().find(|name| *name == NONE || *name == HOST) {
            Some(word) => Err(format!(
                "'{word}' goes with no other network; one that is really called {word} is given by its id"
            )),
            None => Ok(Wanted::Networks(several)),
        },
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

/// Formats the error that a sandbox with processes is not deleted.
fn refusal(name: &str, inside: &BTreeSet<Process>) -> String {
    let count = inside.len();
    let mut list: Vec<String> = inside
        .iter()
        .take(NAMED)
        .map(|process| format!("{} ({})", process.pid, process.command.escape_default()))
        .collect();
    if count > NAMED {
        list.push(format!("{} more", count - NAMED));
    }
    let (are, them) = if count == 1 { ("a process is", "it") } else { ("processes are", "them") };
    format!(
        "{are} in sandbox {name}: {}; end {them}, or remove it with --force, which leaves {them} without networks",
        list.join(", ")
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(names: &[&str]) -> Vec<String> {
        names.iter().map(|&name| name.to_owned()).collect()
    }

    #[test]
    fn networks_or_one_of_two_words() {
        assert_eq!(wanted(&[]), Ok(Wanted::Networks(&[])));
        assert_eq!(wanted(&names(&["none"])), Ok(Wanted::Networks(&[])));
        assert_eq!(wanted(&names(&["host"])), Ok(Wanted::Host));
        let two = names(&["blue", "red"]);
        assert_eq!(wanted(&two), Ok(Wanted::Networks(&two)));
        for wrong in [["blue", "host"], ["none", "blue"], ["host", "none"], ["host", "host"]] {
            assert!(wanted(&names(&wrong)).is_err(), "{wrong:?}");
        }
        assert!(wanted(&vec!["blue".to_owned(); MAX_NETWORKS + 1]).is_err());
    }

    #[test]
    fn a_refusal_names_some_of_the_processes() {
        let process = |pid| Process { pid, command: "ngin\nx".to_owned() };
        assert_eq!(
            refusal("web", &BTreeSet::from([process(7)])),
            "a process is in sandbox web: 7 (ngin\\nx); end it, or remove it with --force, which leaves it without \
             networks"
        );
        let many = refusal("web", &(1..=12).map(process).collect());
        assert!(many.contains("10 (ngin\\nx), 2 more; end them") && !many.contains("11 ("), "{many}");
    }
}
