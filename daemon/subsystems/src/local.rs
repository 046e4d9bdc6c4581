//! State of this host that several subsystems read and that is in neither the view nor the owner table.
//!
//! The daemon keeps one [`Local`] and subsystems read it, through [`crate::Cluster`]. Each part is a type of its own,
//! whose file is the only one that writes its fields: [`Attaches`], [`Isolation`], [`Underlay`],
//! [`ranges::RefusedNetworks`], [`epochs::KeyEpochs`], [`Detours`], [`LostVxlan`] and [`FastPathUse`]. Begin to read at [`Attaches`].

mod attaches;
mod detours;
pub mod epochs;
mod fast;
mod isolation;
pub mod ranges;
mod underlay;
mod vxlan;

use ovl_cluster::view::View;
use ovl_proto::id::NetworkId;
use ovl_proto::object::Mode;
use ovl_proto::table::Endpoint;

use self::epochs::KeyEpochs;
use self::ranges::RefusedNetworks;

pub use self::attaches::Attaches;
pub use self::detours::Detours;
pub use self::fast::{FastPathUse, Obstacle};
pub use self::isolation::Isolation;
pub use self::underlay::Underlay;
pub use self::vxlan::LostVxlan;

/// Local state of the host, beside its owner table.
#[derive(Debug, Clone, Default)]
pub struct Local {
    /// Attaches in flight.
    pub attaches: Attaches,
    /// Disconnected endpoints.
    pub isolation: Isolation,
    /// Networks that are not built, because they cover addresses that this host needs.
    pub refused: RefusedNetworks,
    /// The segment of the underlay.
    pub underlay: Underlay,
    /// Keys and sessions of the tunnel.
    pub key_epochs: KeyEpochs,
    /// Sockets that stand in for hosts which are not reached directly.
    pub detours: Detours,
    /// Hosts to which nothing passes in VXLAN.
    pub lost_vxlan: LostVxlan,
    /// Whether packets may take the fast path.
    pub fast: FastPathUse,
}

impl Local {
    /// Whether the local host needs the devices of a network: it has endpoints there, holds a block of a routed
    /// network, or an attach is in flight. A bridge network always needs them. No host builds a network that covers
    /// addresses that it needs itself.
    pub fn is_built(&self, view: &View, network: NetworkId) -> bool {
        let is_routed = view.networks.get(&network).is_some_and(|state| state.network.mode == Mode::L3);
        !self.refused.contains(network)
            && (self.attaches.wants(network)
                || view.is_own(network)
                || (is_routed && view.has_block(network))
                || view.own().is_some_and(|own| own.table.endpoints_on(network).next().is_some()))
    }

    /// Whether an endpoint of the local host is disconnected: its addresses belong to another host, or its network is
    /// not built here.
    pub fn is_disconnected(&self, endpoint: &Endpoint) -> bool {
        self.isolation.contains(endpoint.id) || self.refused.contains(endpoint.network)
    }
}
