//! One change of the kernel. Printed, it is the command that would do the same: logs, tests and
//! `ovlctl plan` speak the language that operators know.
//!
//! Each kind of change is one file: its type, its text, and what it does to a [`Dataplane`].

mod address;
mod announced;
mod fast;
mod fdb;
mod link;
mod neighbour;
mod nft;
mod route;
mod source;
mod sysctl;
mod wireguard;

use std::fmt;

use ovl_proto::id::NetworkId;

use crate::device::{Device, Role};
use crate::flows::Flows;
use crate::nft::{CURRENT_MARK, Element, Table};
use crate::state::Dataplane;

pub use self::address::AddressOp;
pub use self::announced::AnnouncedOp;
pub use self::fast::FastOp;
pub use self::fdb::FdbOp;
pub use self::link::{LinkOp, PORT_GROUPS, SNOOPING};
pub use self::neighbour::NeighbourOp;
pub use self::nft::NftOp;
pub use self::route::RouteOp;
pub use self::source::SourceOp;
pub use self::sysctl::{ANSWERS_LOCALHOST, SysctlOp};
pub use self::wireguard::WireguardOp;

/// One change. Every one of them can be repeated, and deleting what is gone succeeds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Op {
    /// A device.
    Link(LinkOp),
    /// An address on a device of ovl.
    Address(AddressOp),
    /// An address of a LoadBalancer, on a device that is not ours.
    Announced(AnnouncedOp),
    /// An entry of a forwarding database.
    Fdb(FdbOp),
    /// A permanent neighbour.
    Neighbour(NeighbourOp),
    /// A route.
    Route(RouteOp),
    /// A table of nftables, or an element in one.
    Nft(NftOp),
    /// A WireGuard interface, or a peer of one.
    Wireguard(WireguardOp),
    /// Who may use a MAC address as source.
    Source(SourceOp),
    /// A setting.
    Sysctl(SysctlOp),
    /// Ends flows of UDP that lead where they should not any more.
    EndFlows(Flows),
    /// The fast path.
    Fast(FastOp),
}

impl Op {
    /// Returns the kind of object, as metrics name it.
    pub fn kind(&self) -> &'static str {
        match self {
            Self::Link(_) => "link",
            Self::Address(_) => "address",
            Self::Announced(_) => "announced",
            Self::Fdb(_) => "fdb",
            Self::Neighbour(_) => "neighbour",
            Self::Route(_) => "route",
            Self::Nft(_) => "nft",
            Self::Wireguard(_) => "wireguard",
            Self::Source(_) => "source",
            Self::Sysctl(_) => "sysctl",
            Self::EndFlows(_) => "flows",
            Self::Fast(_) => "fast",
        }
    }

    /// The device of ovl that it is about, for the status of objects and for the scope of a pass.
    pub fn device(&self) -> Option<Device> {
        match self {
            Self::Link(op) => Some(op.device()),
            Self::Address(op) => Some(op.device()),
            Self::Fdb(op) => Some(op.device()),
            Self::Neighbour(op) => Some(op.device()),
            Self::Route(op) => op.device(),
            Self::Wireguard(op) => Some(op.device()),
            Self::Source(op) => Some(op.device()),
            Self::Sysctl(op) => op.device(),
            Self::Fast(op) => op.device(),
            Self::Announced(_) | Self::Nft(_) | Self::EndFlows(_) => None,
        }
    }

    /// The table of nftables that it changes. None for the base table, and for what is about no table.
    pub fn table(&self) -> Option<Table> {
        match self {
            Self::Nft(op) => op.table(),
            Self::Link(_)
            | Self::Address(_)
            | Self::Announced(_)
            | Self::Fdb(_)
            | Self::Neighbour(_)
            | Self::Route(_)
            | Self::Wireguard(_)
            | Self::Source(_)
            | Self::Sysctl(_)
            | Self::EndFlows(_)
            | Self::Fast(_) => None,
        }
    }

    /// Whether it is one entry of a table of the kernel's: many of them go in one batch of messages.
    pub fn is_entry(&self) -> bool {
        match self {
            Self::Address(_) | Self::Fdb(_) | Self::Neighbour(_) | Self::Route(_) => true,
            Self::Link(_)
            | Self::Announced(_)
            | Self::Nft(_)
            | Self::Wireguard(_)
            | Self::Source(_)
            | Self::Sysctl(_)
            | Self::EndFlows(_)
            | Self::Fast(_) => false,
        }
    }

    /// Whether it is about one element of a table of nftables.
    pub fn is_element(&self) -> bool {
        matches!(self, Self::Nft(op) if op.is_element())
    }

    /// Whether it deletes an entry: it succeeds where the entry, or its device, is gone.
    pub fn is_entry_deletion(&self) -> bool {
        match self {
            Self::Fdb(op) => op.is_deletion(),
            Self::Address(AddressOp::Delete(..))
            | Self::Announced(AnnouncedOp::Delete(..))
            | Self::Neighbour(NeighbourOp::Delete(..))
            | Self::Route(RouteOp::Delete(_)) => true,
            Self::Address(AddressOp::Add(..))
            | Self::Announced(AnnouncedOp::Add(..))
            | Self::Neighbour(NeighbourOp::Set(..))
            | Self::Route(RouteOp::Set(..))
            | Self::Link(_)
            | Self::Nft(_)
            | Self::Wireguard(_)
            | Self::Source(_)
            | Self::Sysctl(_)
            | Self::EndFlows(_)
            | Self::Fast(_) => false,
        }
    }

    /// The network that cannot be used if this operation is refused: it is about the network's devices or their
    /// addresses. An entry for a single endpoint is for the next pass to try again.
    pub fn breaks_network(&self) -> Option<NetworkId> {
        let device = match self {
            Self::Link(op) => op.device(),
            Self::Address(op) => op.device(),
            Self::Announced(_)
            | Self::Fdb(_)
            | Self::Neighbour(_)
            | Self::Route(_)
            | Self::Nft(_)
            | Self::Wireguard(_)
            | Self::Source(_)
            | Self::Sysctl(_)
            | Self::EndFlows(_)
            | Self::Fast(_) => return None,
        };
        match device.role()? {
            Role::Bridge(id) | Role::Vxlan(id) => Some(id),
            Role::Endpoint(_) | Role::Tunnel(_) => None,
        }
    }

    /// Whether network policies are not enforced if this operation is refused.
    pub fn is_policy(&self) -> bool {
        matches!(self.table(), Some(Table::Policy | Table::PolicyFrames))
    }

    /// Whether policies judge all connections again with this operation, also those that they have allowed before.
    pub fn judges_again(&self) -> bool {
        match self {
            Self::Nft(NftOp::SetElement(Element { set, .. })) => *set == CURRENT_MARK,
            Self::Nft(NftOp::SetTable(..) | NftOp::DeleteTable(_)) => self.is_policy(),
            _ => false,
        }
    }

    /// Whether endpoints of this host may send what they should not, or nothing, if this operation is refused.
    pub fn is_guard(&self) -> bool {
        matches!(self.table(), Some(Table::Guard | Table::GuardFrames))
    }

    /// Does to `state` what the kernel does.
    pub fn apply_to(&self, state: &mut Dataplane) {
        match self {
            Self::Link(op) => op.apply_to(state),
            Self::Address(op) => op.apply_to(state),
            Self::Announced(op) => op.apply_to(state),
            Self::Fdb(op) => op.apply_to(state),
            Self::Neighbour(op) => op.apply_to(state),
            Self::Route(op) => op.apply_to(state),
            Self::Nft(op) => op.apply_to(state),
            Self::Wireguard(op) => op.apply_to(state),
            Self::Source(op) => op.apply_to(state),
            Self::Sysctl(op) => op.apply_to(state),
            // Flows are no part of what the kernel should hold.
            Self::EndFlows(_) => {}
            Self::Fast(op) => op.apply_to(state),
        }
    }
}

impl fmt::Display for Op {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Link(op) => op.fmt(f),
            Self::Address(op) => op.fmt(f),
            Self::Announced(op) => op.fmt(f),
            Self::Fdb(op) => op.fmt(f),
            Self::Neighbour(op) => op.fmt(f),
            Self::Route(op) => op.fmt(f),
            Self::Nft(op) => op.fmt(f),
            Self::Wireguard(op) => op.fmt(f),
            Self::Source(op) => op.fmt(f),
            Self::Sysctl(op) => op.fmt(f),
            Self::EndFlows(flows) => flows.fmt(f),
            Self::Fast(op) => op.fmt(f),
        }
    }
}
