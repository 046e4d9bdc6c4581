//! A host that is asked what its subsystems want.
#![allow(dead_code, reason = "not each of the tests uses all of it")]

use std::collections::BTreeMap;

use ipnet::IpNet;
use ovl_cluster::backends::Backends;
use ovl_cluster::view::View;
use ovl_dataplane::state::Dataplane;
use ovl_proto::id::EndpointId;
use ovl_subsystems::local::{Isolation, Local, Underlay};
use ovl_subsystems::services::allocation::{NodePortRange, Ranges};
use ovl_subsystems::services::cluster_dns::ClusterDns;
use ovl_subsystems::{Cluster, Settings, Subsystems, desired as desired_of};

pub(crate) fn settings() -> Settings {
    Settings {
        generation: 7,
        masquerade: true,
        own_domain: "ovl.internal".to_owned(),
        cluster_domain: "cluster.local".to_owned(),
        walk_search_lists: true,
        cluster_dns: vec![[10, 96, 0, 10].into()],
        ranges: ranges(),
        ..Settings::default()
    }
}

/// Ranges that contain the addresses of all Services in the tests.
pub(crate) fn ranges() -> Ranges {
    let parse = |text: &str| vec![text.parse().unwrap()];
    Ranges {
        services: parse("10.64.0.0/10"),
        dns: ClusterDns::Own,
        follows_cidrs: false,
        load_balancers: parse("192.0.2.0/24"),
        external: parse("192.0.2.0/24"),
        node_ports: NodePortRange::default(),
    }
}

pub(crate) fn cluster<'a>(view: &'a View, local: &'a Local, backends: &'a Backends) -> Cluster<'a> {
    Cluster { view, backends, local, caught_up: true }
}

pub(crate) fn desired_with(view: &View, local: &Local, settings: Settings) -> Dataplane {
    let backends = Backends::default();
    desired_of(&Subsystems::new(settings).all(), &cluster(view, local, &backends))
}

/// What all subsystems of a host want that has no Services.
pub(crate) fn desired(view: &View, local: &Local) -> Dataplane {
    desired_with(view, local, settings())
}

pub(crate) fn isolation(endpoints: impl IntoIterator<Item = EndpointId>) -> Isolation {
    let mut isolation = Isolation::default();
    let reason = |id| (id, "its block went to another host".to_owned());
    isolation.replace(endpoints.into_iter().map(reason).collect::<BTreeMap<_, _>>());
    isolation
}

pub(crate) fn underlay(segment: IpNet) -> Underlay {
    let mut underlay = Underlay::default();
    underlay.set_segment(segment);
    underlay
}
