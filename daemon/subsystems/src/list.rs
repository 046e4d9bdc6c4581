//! The list of subsystems, and what is done with such a list, whichever they are.

use ovl_dataplane::op::Op;
use ovl_dataplane::state::Dataplane;
use ovl_proto::id::NetworkId;
use ovl_proto::object::Network;
use ovl_proto::table::Endpoint;

use crate::names::NameTracker;
use crate::networks::Networks;
use crate::policy::Enforcement;
use crate::services::{Announcements, Translation};
use crate::subsystem::{Cluster, Outcome, Part, Subsystem};

/// The list of a daemon's subsystems.
pub type SubsystemList<'a> = [&'a mut dyn Subsystem; 5];

/// All subsystems of a daemon.
pub struct Subsystems {
    /// Network policies.
    pub policy: Enforcement,
    /// Names of endpoints, Services and pods.
    pub names: NameTracker,
    /// Devices, forwarding entries, neighbours and routes.
    pub networks: Networks,
    /// Translation of Services.
    pub services: Translation,
    /// Addresses of LoadBalancers that this host announces.
    pub announcements: Announcements,
}

impl Subsystems {
    /// The list, in the order in which plans are carried out. Policies come first: an endpoint that they isolate is
    /// not reachable before they are in force.
    pub fn all(&mut self) -> SubsystemList<'_> {
        let Self { policy, names, networks, services, announcements } = self;
        [policy, names, networks, services, announcements]
    }
}

/// All that subsystems want.
pub fn desired(subsystems: &[&mut dyn Subsystem], cluster: &Cluster<'_>) -> Dataplane {
    merged(subsystems.iter().map(|subsystem| subsystem.desired(cluster)))
}

/// All that they want, which counts as sent from here on.
pub fn resync(subsystems: &mut [&mut dyn Subsystem], cluster: &Cluster<'_>) -> Dataplane {
    merged(subsystems.iter_mut().map(|subsystem| subsystem.resync(cluster)))
}

/// What has changed since their last plan, as operations in the order in which they are to be carried out.
pub fn plan(subsystems: &mut [&mut dyn Subsystem], cluster: &Cluster<'_>) -> Vec<Op> {
    let mut ops: Vec<Op> = subsystems.iter_mut().flat_map(|subsystem| subsystem.plan(cluster)).collect();
    ops.extend(afterwards(subsystems));
    #[cfg(debug_assertions)]
    compare(subsystems, cluster);
    ops
}

/// What waits until all that was planned is carried out.
pub fn afterwards(subsystems: &mut [&mut dyn Subsystem]) -> Vec<Op> {
    subsystems.iter_mut().flat_map(|subsystem| subsystem.afterwards()).collect()
}

/// Their parts of an endpoint that is about to be created.
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

/// The operations that belong to endpoints that were detached from a network, as far as they are cheap.
pub fn detached(subsystems: &mut [&mut dyn Subsystem], network: NetworkId, cluster: &Cluster<'_>) -> Vec<Op> {
    subsystems.iter_mut().flat_map(|subsystem| subsystem.detached(network, cluster)).collect()
}

/// Tells the kernel's answers to one batch; a batch of a full pass, which sent everything, is `full`.
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

/// Why an endpoint cannot be attached to a network: something that it needs was refused.
pub fn refusal<'a>(subsystems: &'a [&mut dyn Subsystem], network: NetworkId) -> Option<&'a str> {
    subsystems.iter().find_map(|subsystem| subsystem.refusal(network))
}

fn merged(parts: impl Iterator<Item = Dataplane>) -> Dataplane {
    let mut all = Dataplane::default();
    parts.for_each(|part| all.merge(part));
    all
}

/// A quick pass must leave what a full one would. Before gossip has caught up more may stand than is wanted.
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
