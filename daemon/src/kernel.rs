//! The kernel: the only module of ovld that speaks netlink, runs `nft` and writes sysctls.
//!
//! One thread owns the sockets and does all work in order. It also watches what others do to our
//! objects: it keeps what it believes the kernel holds ([`known`]), and reports a notification only
//! where it disagrees with that. So what ovld itself changes causes no event, whatever port id the
//! kernel writes into the message (for most of them it writes none).

mod error;
mod netns;
mod probe;

use std::net::IpAddr;

use ipnet::IpNet;
use ovl_core::device::Device;
use ovl_core::kernel::Kernel;
use ovl_core::op::Op;
use ovl_proto::id::Mac;
use tokio::sync::mpsc;

pub use error::{KernelError, Result};
pub use netns::{Netns, open_netns};
pub use probe::Prober;

/// What happened in the kernel that ovld did not do itself. At most one of each kind waits in the
/// channel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum KernelEvent {
    /// Somebody else changed something of ours: dump again.
    Changed,
    /// The host's end of an endpoint was deleted by somebody else, or its namespace is gone.
    EndpointGone(Device),
    /// An address, the MTU or the state of a device that is not ours changed.
    Underlay,
    /// Notifications were lost: dump again.
    Overrun,
    /// Somebody else changed our nftables table.
    FilterChanged,
}

/// An endpoint's pair of interfaces.
#[derive(Debug)]
pub struct EndpointSpec {
    /// The host's end.
    pub device: Device,
    /// For the alias of the host's end: `ovl endpoint NAME`.
    pub name: String,
    /// Where the other end goes; closed when the work is done, for it keeps the namespace alive.
    pub netns: Netns,
    /// The name of the other end; without one, the first free `ethN`.
    pub ifname: Option<String>,
    /// Of the other end.
    pub mac: Mac,
    /// Of both ends.
    pub mtu: u16,
    /// The host's end becomes a port of it.
    pub bridge: Device,
    /// Of the other end.
    pub addresses: Vec<IpNet>,
    /// Default routes; one is only set if the namespace has no default route of its family.
    pub gateways: Vec<IpAddr>,
}

/// What became of one operation.
#[derive(Debug)]
pub struct Outcome {
    /// As it was asked for.
    pub op: Op,
    /// How it ended.
    pub result: Result<()>,
}

/// The device that has an address of this host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Underlay {
    /// Its name.
    pub device: String,
    /// Its index.
    pub index: u32,
    /// Its MTU.
    pub mtu: u16,
    /// The address and its prefix.
    pub prefix: IpNet,
}

/// Starts the worker, in the network namespace of the calling thread.
pub fn start(events: mpsc::Sender<KernelEvent>) -> Result<KernelHandle> {
    drop(events);
    Ok(KernelHandle {})
}

/// The way to the worker. It ends with the last handle.
#[derive(Debug, Clone)]
pub struct KernelHandle {}

impl KernelHandle {
    /// All of ours that is in the kernel.
    pub async fn dump(&self) -> Result<Kernel> {
        Err(KernelError::Stopped)
    }

    /// Does all of them in order, whatever becomes of each.
    pub async fn apply(&self, ops: Vec<Op>) -> Vec<Outcome> {
        ops.into_iter().map(|op| Outcome { op, result: Err(KernelError::Stopped) }).collect()
    }

    /// Makes an endpoint's pair, all or nothing. Gives the name of the other end.
    pub async fn create_endpoint(&self, spec: EndpointSpec) -> Result<String> {
        self.prepare_and_create(Vec::new(), spec).await.1
    }

    /// [`Self::apply`] and [`Self::create_endpoint`] in one go. Operations on the endpoint's own
    /// device are done after it is made, and not at all if it is not; all others before.
    pub async fn prepare_and_create(
        &self,
        ops: Vec<Op>,
        spec: EndpointSpec,
    ) -> (Vec<Outcome>, Result<String>) {
        drop(spec);
        (self.apply(ops).await, Err(KernelError::Stopped))
    }

    /// Deletes devices of ours; what is gone already is fine.
    pub async fn delete_links(&self, devices: Vec<Device>) -> Result<()> {
        drop(devices);
        Err(KernelError::Stopped)
    }

    /// The device that has this address.
    pub async fn underlay(&self, vtep: IpAddr) -> Result<Underlay> {
        let _ = vtep;
        Err(KernelError::Stopped)
    }

    /// The prefixes that this host has addresses in or routes to, our own devices' aside: a new
    /// network's subnet should collide with none.
    pub async fn prefixes(&self) -> Result<Vec<IpNet>> {
        Err(KernelError::Stopped)
    }

    /// Removes our nftables table, for a teardown.
    pub async fn remove_filter(&self) -> Result<()> {
        Err(KernelError::Stopped)
    }
}
