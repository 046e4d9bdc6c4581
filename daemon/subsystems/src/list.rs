//! The list of all subsystems, and the functions that apply a step to each of them.
//!
//! [`Subsystems`] owns one value of each subsystem. Begin to read at [`Subsystems::all`]: its order is the order in
//! which plans are applied. The functions below take any list, so tests can add a subsystem of their own.

use std::net::IpAddr;

use ovl_dataplane::op::Op;
use ovl_dataplane::state::Dataplane;
use ovl_proto::id::NetworkId;
use ovl_proto::object::Network;
use ovl_proto::table::Endpoint;

use crate::encryption::Encryption;
use crate::fastpath::FastPath;
use crate::guard::Guard;
use crate::names::Names;
use crate::names::resolver::HOST_ADDRESSES;
use crate::networks::{BaseFilter, Networks};
use crate::off::Off;
use crate::policy::Enforcement;
use crate::publish::PublishedPorts;
use crate::services::allocation::Ranges;
use crate::services::cluster_dns::ClusterDns;
use crate::services::{Announcements, Translation};
use crate::subsystem::{Cluster, Outcome, Part, Subsystem};

/// The subsystems of a daemon, as trait objects.
pub type SubsystemList<'a> = [&'a mut dyn Subsystem; 10];

/// What subsystems begin with.
#[derive(Debug, Clone, Default)]
pub struct Settings {
    /// The first generation of policies. Connections that an earlier run marked with another one are judged again.
    pub generation: u32,
    /// Whether traffic that leaves the cluster is masqueraded.
    pub masquerade: bool,
    /// The domain of the names of endpoints.
    pub own_domain: String,
    /// The domain of the names of Services and pods.
    pub cluster_domain: String,
    /// Whether a query that is the first step of a client's search list gets the answer at which the search ends.
    pub walk_search_lists: bool,
    /// Addresses of the cluster DNS, at most one of each family.
    pub cluster_dns: Vec<IpAddr>,
    /// The ranges of Service addresses.
    pub ranges: Ranges,
    /// Whether this host does without network policies.
    pub without_policies: bool,
    /// Whether this host does without the resolver of endpoints.
    pub without_names: bool,
    /// Whether this host does without translation of Services at first.
    pub without_services: bool,
}

/// All subsystems of a daemon.
#[derive(Debug)]
pub struct Subsystems {
    /// What endpoints may send.
    pub guard: Guard,
    /// Network policies.
    pub policy: Enforcement,
    /// The packet filter about all networks.
    pub base_filter: BaseFilter,
    /// The tunnel of encrypted networks.
    pub encryption: Encryption,
    /// Devices, forwarding entries, neighbours, routes and endpoints.
    pub networks: Networks,
    /// Published ports.
    pub publish: PublishedPorts,
    /// Names of endpoints, Services and pods.
    pub names: Names,
    /// Address translation for Services.
    pub services: Translation,
    /// Announcements of LoadBalancer addresses.
    pub announcements: Announcements,
    /// What the programs of the fast path know.
    pub fast_path: FastPath,
    without_policies: bool,
    without_names: bool,
    without_services: bool,
    /// Stand for those that are turned off.
    off: [Off; 3],
}

impl Subsystems {
    /// Creates all subsystems.
    pub fn new(settings: Settings) -> Self {
        Self {
            guard: Guard::default(),
            policy: Enforcement::new(settings.generation),
            base_filter: BaseFilter::new(settings.masquerade, HOST_ADDRESSES.to_vec()),
            encryption: Encryption::default(),
            networks: Networks::default(),
            publish: PublishedPorts::default(),
            names: Names::new(
                &settings.own_domain,
                &settings.cluster_domain,
                settings.walk_search_lists,
                settings.cluster_dns,
                settings.ranges.dns == ClusterDns::Auto,
            ),
            services: Translation::new(settings.ranges.clone()),
            fast_path: FastPath::new(&settings.ranges, !settings.without_policies),
            announcements: Announcements::new(settings.ranges),
            without_policies: settings.without_policies,
            without_names: settings.without_names,
            without_services: settings.without_services,
            off: [Off; 3],
        }
    }

    /// Sets whether this host translates addresses of Services. Returns whether that is new; a full pass must follow then.
    pub fn set_translates(&mut self, translates: bool) -> bool {
        let before = std::mem::replace(&mut self.without_services, !translates);
        if before == translates {
            self.services.withdraw();
        }
        before == translates
    }

    /// Whether this host translates addresses of Services.
    pub fn translates(&self) -> bool {
        !self.without_services
    }

    /// Returns the subsystems in the order in which their plans are applied. Source checks and policies come first, so
    /// that no endpoint can send before the checks, nor be reached before the policies, are in force. The base filter
    /// comes before the devices that it protects. Routes of networks lead through devices of encryption; published ports and names need devices of
    /// networks. What takes the fast path comes last: it bypasses all of these.
    pub fn all(&mut self) -> SubsystemList<'_> {
        let Self {
            guard,
            policy,
            base_filter,
            encryption,
            networks,
            publish,
            names,
            services,
            announcements,
            fast_path,
            off: [no_policy, no_names, no_services],
            ..
        } = self;
        let policy: &mut dyn Subsystem = if self.without_policies { no_policy } else { policy };
        let names: &mut dyn Subsystem = if self.without_names { no_names } else { names };
        let services: &mut dyn Subsystem = if self.without_services { no_services } else { services };
        [guard, policy, base_filter, encryption, networks, publish, names, services, announcements, fast_path]
    }
}

/// Returns the desired data plane of all subsystems.
pub fn desired(subsystems: &[&mut dyn Subsystem], cluster: &Cluster<'_>) -> Dataplane {
    merged(subsystems.iter().map(|subsystem| subsystem.desired(cluster)))
}

/// Returns the desired data plane of all subsystems and records it as sent.
pub fn resync(subsystems: &mut [&mut dyn Subsystem], cluster: &Cluster<'_>) -> Dataplane {
    merged(subsystems.iter_mut().map(|subsystem| subsystem.resync(cluster)))
}

/// Returns the operations for all changes since the last plan, in the order in which they must be applied.
pub fn plan(subsystems: &mut [&mut dyn Subsystem], cluster: &Cluster<'_>) -> Vec<Op> {
    let mut ops: Vec<Op> = subsystems.iter_mut().flat_map(|subsystem| subsystem.plan(cluster)).collect();
    ops.extend(afterwards(subsystems));
    #[cfg(debug_assertions)]
    compare(subsystems, cluster);
    ops
}

/// Returns the operations that must follow everything that was planned.
pub fn afterwards(subsystems: &mut [&mut dyn Subsystem]) -> Vec<Op> {
    subsystems.iter_mut().flat_map(|subsystem| subsystem.afterwards()).collect()
}

/// Returns the merged parts of all subsystems for an endpoint that is about to be created.
pub fn prepare(
    subsystems: &mut [&mut dyn Subsystem],
    endpoint: &Endpoint,
    network: &Network,
    cluster: &Cluster<'_>,
) -> Part {
    let mut all = Part::default();
    for subsystem in subsystems {
        let Part { before, wants } = subsystem.prepare(endpoint, network, cluster);
        all.before.extend(before);
        all.wants.merge(wants);
    }
    all
}

/// Returns the operations for endpoints that were detached from a network, if they are cheap to compute.
pub fn detached(subsystems: &mut [&mut dyn Subsystem], network: NetworkId, cluster: &Cluster<'_>) -> Vec<Op> {
    subsystems.iter_mut().flat_map(|subsystem| subsystem.detached(network, cluster)).collect()
}

/// Reports the kernel's answers to one batch. `full` is set for the batch of a full pass, which compared everything.
pub fn outcomes<'a>(
    subsystems: &mut [&mut dyn Subsystem],
    outcomes: impl IntoIterator<Item = Outcome<'a>>,
    full: bool,
) {
    for outcome in outcomes {
        subsystems.iter_mut().for_each(|subsystem| subsystem.outcome(outcome));
    }
    subsystems.iter_mut().for_each(|subsystem| subsystem.batch_done(full));
}

/// Returns why an endpoint cannot be attached to a network: the kernel rejected an operation that it depends on. `None`
/// if it can.
pub fn refusal<'a>(subsystems: &'a [&mut dyn Subsystem], network: NetworkId) -> Option<&'a str> {
    subsystems.iter().find_map(|subsystem| subsystem.refusal(network))
}

fn merged(parts: impl Iterator<Item = Dataplane>) -> Dataplane {
    let mut all = Dataplane::default();
    parts.for_each(|part| all.merge(part));
    all
}

/// Asserts that a quick pass left what a full pass would leave. Before gossip has caught up, the kernel may hold more
/// than is wanted.
#[cfg(debug_assertions)]
fn compare(subsystems: &[&mut dyn Subsystem], cluster: &Cluster<'_>) {
    if !cluster.caught_up {
        return;
    }
    for (index, subsystem) in subsystems.iter().enumerate() {
        let Some(sent) = subsystem.sent() else { continue };
        let desired = subsystem.desired(cluster);
        if sent != desired {
            let more = ovl_dataplane::diff::diff(&sent, &desired, true);
            let more: Vec<String> = more.iter().map(ToString::to_string).collect();
            tracing::error!(index, ?more, "a quick pass differs from what is desired");
            debug_assert!(more.is_empty(), "subsystem {index}: a quick pass missed {more:?}");
        }
    }
}
