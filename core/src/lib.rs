//! Temporary: the module paths of the crate that the ones under daemon/ were made from.

pub use ovl_cluster::addresses as ipam;
pub use ovl_cluster::{backends, digest, keys, liveness, members, networks, objects, resources, table};
pub use ovl_dataplane::{device, diff, flows, ledger, nft, op};
pub use ovl_runtimes::{cni, docker};
pub use ovl_subsystems::encryption::ends;
pub use ovl_subsystems::names::{cluster_names, resolver, zone};
pub use ovl_subsystems::networks::touched;
pub use ovl_subsystems::services::ingress;
pub use ovl_subsystems::{firewall, policy, publish, services};

/// [`ovl_consensus`].
pub mod alloc {
    pub use ovl_consensus::Replica as Allocator;
    pub use ovl_consensus::*;
}

/// [`ovl_cluster::claims`] and [`ovl_subsystems::services::allocation`].
pub mod allocation {
    pub use ovl_cluster::claims::*;
    pub use ovl_proto::resource::NODE_PORTS;
    pub use ovl_subsystems::services::allocation::*;
}

/// [`ovl_subsystems::networks::desired`] and its neighbours.
pub mod desired {
    use ovl_cluster::view::View;
    use ovl_proto::id::NetworkId;
    use ovl_subsystems::local::Local;

    pub use ovl_subsystems::endpoints::endpoint_part;
    pub use ovl_subsystems::mtu::MIN_MTU;
    pub use ovl_subsystems::networks::desired::*;
    pub use ovl_subsystems::networks::mtu::network_mtu;

    /// [`Local::is_built`].
    pub fn is_built(view: &View, local: &Local, network: NetworkId) -> bool {
        local.is_built(view, network)
    }
}

/// [`ovl_subsystems::networks::filter`].
pub mod filter {
    pub use ovl_dataplane::nft::BASE_TABLE as TABLE;
    pub use ovl_subsystems::networks::filter::*;
}

/// [`ovl_dataplane::state`].
pub mod kernel {
    pub use ovl_dataplane::state::Dataplane as Kernel;
    pub use ovl_dataplane::state::*;
}

/// [`ovl_manifest`].
pub mod manifest {
    pub use ovl_manifest::Problem;
    pub use ovl_manifest::object::*;
}

/// Blocks and gateways, which [`ovl_cluster::view::View`] tells.
pub mod routed {
    use std::net::IpAddr;

    use ipnet::IpNet;
    use ovl_cluster::view::View;
    use ovl_proto::id::{NetworkId, NodeId};

    /// [`View::blocks_of`].
    pub fn blocks_of(view: &View, network: NetworkId, node: NodeId) -> impl Iterator<Item = IpNet> {
        view.blocks_of(network, node)
    }

    /// [`View::gateways`].
    pub fn gateways(view: &View, network: NetworkId, node: NodeId) -> impl Iterator<Item = IpAddr> {
        view.gateways(network, node)
    }
}

/// [`ovl_subsystems::encryption::tunnel`].
pub mod tunnel {
    use std::collections::BTreeMap;

    use ovl_cluster::view::View;
    use ovl_proto::id::NodeId;
    use ovl_subsystems::encryption::ends::Way;
    use ovl_subsystems::encryption::tunnel as inner;
    use ovl_subsystems::local::Local;

    pub use inner::{address, copies, is_wanted, own, peers, prefix};
    pub use ovl_subsystems::mtu::WIREGUARD_OVERHEAD as OVERHEAD;

    /// [`inner::ways`].
    pub fn ways(view: &View, local: &Local) -> BTreeMap<NodeId, Way> {
        inner::ways(view, &local.ends)
    }
}

/// [`ovl_cluster::view`] and [`ovl_subsystems::local`].
pub mod view {
    pub use ovl_cluster::view::*;
    pub use ovl_subsystems::local::Local;
}
