//! The fast path: hands operations on to `ovl-fastpath`, by the indexes of devices, and reads back what its maps have.
//!
//! [`FastPath`] owns the loaded programs. Begin to read at [`FastPath::apply`].

use std::collections::{BTreeMap, HashMap};
use std::path::PathBuf;

use ipnet::IpNet;
use nix::net::if_::if_nametoindex;
use ovl_dataplane::device::{Device, Role};
use ovl_dataplane::fast::{Fast, FastHost, FastPod, FastRoute, FastVxlan};
use ovl_dataplane::op::FastOp;
use ovl_fastpath as programs;
use ovl_proto::id::{Mac, NetworkId};

use super::apply::Devices;
use super::clsact::Clsact;
use super::dump::DeviceNames;
use super::error::{KernelError, Result};
use super::link::{LinkView, Traffic};
use super::message;
use super::socket::{Batch, Route};
use super::sys;

/// The queueing discipline of an interface that has none.
const NO_QUEUE: &str = "noqueue";

/// What stands for the device of an entry whose device is gone, in a dump: no device has this name.
const GONE: &str = "-";

/// What the programs of the fast path have counted.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct FastCounters {
    /// Packets and bytes that took the fast path, by the name of the way.
    pub fast: Vec<(&'static str, u64, u64)>,
    /// Packets and bytes that the programs left to the stack, by the name of the reason.
    pub slow: Vec<(&'static str, u64, u64)>,
    /// How the programs are attached to devices: `tcx` or `clsact`.
    pub attached_by: &'static str,
}

/// How programs are attached to devices.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Attachment {
    /// By links of tcx.
    Tcx,
    /// As filters of the queueing discipline `clsact`.
    Clsact,
}

impl Attachment {
    /// Returns what this kernel allows.
    pub(super) fn of_kernel() -> Self {
        if programs::has_tcx() { Self::Tcx } else { Self::Clsact }
    }

    /// Returns its name.
    fn as_str(self) -> &'static str {
        match self {
            Self::Tcx => "tcx",
            Self::Clsact => "clsact",
        }
    }
}

/// Returns the folder of the BPF file system in which the programs of this thread's network namespace are pinned. `None` if
/// the kernel does not number network namespaces.
pub fn fast_path_folder() -> Option<PathBuf> {
    sys::netns_cookie().ok().map(programs::folder_of)
}

/// The programs of the fast path in this network namespace.
#[derive(Debug)]
pub(super) struct FastPath {
    /// Where they are pinned. `None` if the network namespace has no cookie.
    folder: Option<PathBuf>,
    attachment: Attachment,
    loaded: Option<programs::FastPath>,
    /// The indexes of the devices with programs. A device may be gone when its programs are to be forgotten.
    hooks: BTreeMap<Device, u32>,
}

impl From<programs::Error> for KernelError {
    fn from(error: programs::Error) -> Self {
        Self::Other(error.to_string())
    }
}

impl FastPath {
    /// Of the network namespace of the calling thread. Loads nothing.
    pub(super) fn new(attachment: Attachment) -> Self {
        Self { folder: fast_path_folder(), attachment, loaded: None, hooks: BTreeMap::new() }
    }

    /// Loads the programs if they are not loaded.
    ///
    /// # Errors
    ///
    /// They cannot be loaded here.
    pub(super) fn open(&mut self) -> Result<&mut programs::FastPath> {
        if self.loaded.is_none() {
            let folder = self.folder.clone().ok_or_else(|| {
                KernelError::Other("the kernel does not number network namespaces (Linux 5.14)".to_owned())
            })?;
            let filters: Option<Box<dyn programs::Filters>> = match self.attachment {
                Attachment::Tcx => None,
                Attachment::Clsact => Some(Box::new(Clsact::open(&folder)?)),
            };
            self.loaded = Some(programs::FastPath::open(folder, filters)?);
        }
        self.loaded
            .as_mut()
            .ok_or_else(|| KernelError::Other("the programs of the fast path are not loaded".to_owned()))
    }

    /// Loads the programs if they are not loaded. Returns whether an earlier run has left them in use.
    ///
    /// # Errors
    ///
    /// They cannot be loaded here.
    pub(super) fn adopt(&mut self) -> Result<bool> {
        Ok(self.open()?.host()?.is_some())
    }

    /// Applies an operation.
    pub(super) fn apply(&mut self, route: &mut Route, devices: &mut Devices, op: &FastOp) -> Result<()> {
        match op {
            FastOp::SetHost(FastHost { on, underlay, vtep, port }) => {
                let underlay = index_of(route, devices, *underlay)?;
                let host = programs::Host { on: *on, underlay, vtep: *vtep, port: *port };
                self.open()?.set_host(host)?;
            }
            FastOp::Unload => {
                self.hooks.clear();
                self.unload()?;
            }
            FastOp::SetPod(at, pod) => {
                let ifindex = devices.get(route, pod.device)?.index;
                let queued = has_queue(route, ifindex)?;
                let FastPod { epoch, mac, mtu, fast, switched, selected, .. } = *pod;
                let pod = programs::Pod {
                    ifindex,
                    epoch,
                    network: number(pod.network),
                    mac: mac.0,
                    gateway: Mac::of_gateway(pod.network).0,
                    mtu,
                    fast,
                    queued,
                    switched,
                    selected,
                };
                self.open()?.set_pod(*at, pod)?;
            }
            // What was unloaded in the meantime is not loaded again for this.
            FastOp::DeletePod(at) => {
                self.loaded.as_mut().map_or(Ok(()), |loaded| loaded.delete_pod(*at))?;
            }
            FastOp::SetPath(to, FastRoute { network, mtu, vxlan }) => {
                let vxlan = vxlan.map(|FastVxlan { vtep, port, vni, mac, own_mac }| programs::VxlanPath {
                    vtep,
                    port,
                    vni,
                    mac: mac.0,
                    own_mac: own_mac.map(|mac| mac.0),
                });
                let path = programs::Path { network: number(*network), mtu: *mtu, vxlan };
                self.open()?.set_path((to.addr(), to.prefix_len()), path)?;
            }
            FastOp::DeletePath(to) => {
                let to = (to.addr(), to.prefix_len());
                self.loaded.as_mut().map_or(Ok(()), |loaded| loaded.delete_path(to))?;
            }
            FastOp::Attach(device) => {
                let ifindex = index_of(route, devices, *device)?;
                self.open()?.attach(ifindex, device.as_str(), kind_of(*device))?;
                self.hooks.insert(*device, ifindex);
            }
            FastOp::Detach(device) => {
                let ifindex = self.hooks.remove(device);
                if let (Some(ifindex), Some(loaded)) = (ifindex, self.loaded.as_mut()) {
                    loaded.detach(ifindex);
                }
            }
        }
        Ok(())
    }

    /// Has the stack judge the flows of endpoints again that network policies select. If that is not possible, everything
    /// is deleted, so that packets take the stack.
    pub(super) fn judge_again(&mut self) {
        let Some(loaded) = &mut self.loaded else { return };
        if let Err(error) = loaded.judge_again() {
            tracing::warn!(%error, "the fast path cannot be told of policies, and is unloaded");
            self.unload_or_warn();
        }
    }

    /// Reads what the programs know. What an earlier run has left is adopted. If that, or reading, is not possible,
    /// everything is deleted, so that packets take the stack.
    pub(super) fn dump(&mut self, names: &DeviceNames) -> Fast {
        let is_left = self.folder.as_deref().is_some_and(programs::is_there);
        if self.loaded.is_none() && !is_left {
            return Fast::default();
        }
        self.read(names).unwrap_or_else(|error| {
            tracing::warn!(%error, "the fast path cannot be read, and is unloaded");
            self.unload_or_warn();
            Fast::default()
        })
    }

    fn unload_or_warn(&mut self) {
        if let Err(error) = self.unload() {
            tracing::warn!(%error, "programs of the fast path are left");
        }
    }

    /// Detaches and deletes everything.
    fn unload(&mut self) -> Result<()> {
        let Some(folder) = &self.folder else { return Ok(()) };
        match self.loaded.take() {
            Some(loaded) => loaded.close(),
            None => programs::remove(folder),
        }
        match self.attachment {
            Attachment::Tcx => Ok(()),
            Attachment::Clsact => {
                Clsact::open(folder)?.remove_all()?;
                // The marks of clsact were in it.
                programs::remove(folder);
                Ok(())
            }
        }
    }

    fn read(&mut self, names: &DeviceNames) -> Result<Fast> {
        let loaded = self.open()?;
        let device = |ifindex: u32| names.all.get(&ifindex).copied();
        let gone = || Device::new(GONE);
        let mut fast = Fast::default();
        if let Some(host) = loaded.host()? {
            let programs::Host { on, underlay, vtep, port } = host;
            let underlay = device(underlay).or_else(gone);
            fast.host = underlay.map(|underlay| FastHost { on, underlay, vtep, port });
        }
        for (at, pod) in loaded.pods()? {
            let programs::Pod {
                ifindex, epoch, network, mac, mtu, fast: is_fast, switched, selected, ..
            } = pod;
            if let Some(device) = device(ifindex).or_else(gone) {
                let (network, mac) = (network_of(network), Mac(mac));
                let pod = FastPod { device, epoch, network, mac, mtu, switched, fast: is_fast, selected };
                fast.pods.insert(at, pod);
            }
        }
        for ((address, length), path) in loaded.paths()? {
            let Ok(to) = IpNet::new(address, length) else { continue };
            let programs::Path { network, mtu, vxlan } = path;
            let vxlan = vxlan.map(|programs::VxlanPath { vtep, port, vni, mac, own_mac }| FastVxlan {
                vtep,
                port,
                vni,
                mac: Mac(mac),
                own_mac: own_mac.map(Mac),
            });
            fast.paths.insert(to, FastRoute { network: network_of(network), mtu, vxlan });
        }
        let mut hooks = BTreeMap::new();
        for ifindex in loaded.devices()? {
            match device(ifindex) {
                Some(device) if loaded.is_complete(ifindex, kind_of(device)) => {
                    hooks.insert(device, ifindex);
                }
                Some(_) => {}
                // The kernel has detached the programs, and their files are left.
                None => loaded.detach(ifindex),
            }
        }
        fast.hooks = hooks.keys().copied().collect();
        self.hooks = hooks;
        Ok(fast)
    }

    /// Adds what went to endpoints past the counters of their interfaces.
    pub(super) fn add_delivered(
        &self,
        names: &HashMap<u32, Device>,
        traffic: &mut BTreeMap<Device, Traffic>,
    ) {
        let Some(delivered) = self.loaded.as_ref().and_then(|loaded| loaded.delivered().ok()) else { return };
        for (ifindex, counter) in delivered {
            if let Some(traffic) = names.get(&ifindex).and_then(|device| traffic.get_mut(device)) {
                traffic.received_packets = traffic.received_packets.saturating_add(counter.packets);
                traffic.received_bytes = traffic.received_bytes.saturating_add(counter.bytes);
            }
        }
    }

    /// Returns what the programs have counted. `None` if they are not loaded.
    pub(super) fn counters(&self) -> Option<FastCounters> {
        let counters = self.loaded.as_ref()?.counters().ok()?;
        let named: Vec<_> = programs::COUNTERS
            .into_iter()
            .zip(counters)
            .map(|(name, counter)| (name, counter.packets, counter.bytes))
            .collect();
        let (fast, slow) = named.split_at_checked(programs::FAST_COUNTERS)?;
        let attached_by = self.attachment.as_str();
        Some(FastCounters { fast: fast.to_vec(), slow: slow.to_vec(), attached_by })
    }
}

fn kind_of(device: Device) -> programs::DeviceKind {
    match device.role() {
        Some(Role::Endpoint(_)) => programs::DeviceKind::Pod,
        Some(Role::Vxlan(_)) => programs::DeviceKind::Vxlan,
        Some(Role::Bridge(_) | Role::Tunnel(_)) | None => programs::DeviceKind::Underlay,
    }
}

/// Returns the index of a device of ovl, or of the underlay.
fn index_of(route: &mut Route, devices: &mut Devices, device: Device) -> Result<u32> {
    match device.role() {
        Some(_) => Ok(devices.get(route, device)?.index),
        None => if_nametoindex(device.as_str()).map_err(|_| KernelError::NoDevice(device)),
    }
}

/// Whether packets to an endpoint wait in a queueing discipline of the host's interface, which limits their rate.
fn has_queue(route: &mut Route, ifindex: u32) -> Result<bool> {
    let mut batch = Batch::default();
    batch.push(message::get_link_at(ifindex), 0);
    let (_, answers) = route.execute(batch)?;
    let view = answers.first().and_then(|answer| LinkView::parse(&answer.payload));
    Ok(view.is_some_and(|view| view.qdisc != NO_QUEUE))
}

/// The number of a network, as the programs compare it.
fn number(network: NetworkId) -> u64 {
    network.0.iter().fold(0, |number, byte| number << 8 | u64::from(*byte))
}

fn network_of(number: u64) -> NetworkId {
    let [_, _, _, a, b, c, d, e] = number.to_be_bytes();
    NetworkId([a, b, c, d, e])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn networks_are_numbers_and_back() {
        let network = NetworkId([1, 2, 255, 4, 5]);
        assert_eq!(network_of(number(network)), network);
    }
}
