//! The bits of the packet mark that ovl uses, so that no two uses share one. Other bits are left unchanged.
//! 0x4000 is [`ovl_dataplane::op::ANSWERS_LOCALHOST`], which the kernel's part matches too.

/// A packet of a socket by which ovld itself speaks with its peers: it is never translated.
pub const OWN_SOCKET: u32 = 0x400;
/// A packet of a process of this host that goes into an overlay network. The kernel copies the mark to the VXLAN packet
/// around it, where it is cleared before the packet leaves the host. Path probes have it, too.
pub const FROM_HOST: u32 = 0x800;
/// A translated packet that comes from a workload: its answer may have to come back through the host.
pub(crate) const FROM_WORKLOAD: u32 = 0x1000;
/// A bridged frame that was translated and then judged by the network policies. The bit is cleared on arrival and before
/// a frame leaves.
pub(crate) const SEEN: u32 = 0x2000;
