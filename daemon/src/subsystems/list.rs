//! What is done with a list of subsystems, whichever they are.

use ovl_core::kernel::Kernel as Dataplane;
use ovl_core::op::Op;
use ovl_proto::id::NetworkId;
use ovl_proto::object::Network;
use ovl_proto::table::Endpoint;

use super::{Cluster, Outcome, Part, Subsystem};

/// All that subsystems want.
pub(crate) fn desired(subsystems: &[&mut dyn Subsystem], cluster: &Cluster<'_>) -> Dataplane {
    merged(subsystems.iter().map(|subsystem| subsystem.desired(cluster)))
}

/// All that they want, which counts as sent from here on.
pub(crate) fn resync(subsystems: &mut [&mut dyn Subsystem], cluster: &Cluster<'_>) -> Dataplane {
    merged(subsystems.iter_mut().map(|subsystem| subsystem.resync(cluster)))
}

/// What has changed since their last plan, as operations in the order in which they are to be carried out.
pub(crate) fn plan(subsystems: &mut [&mut dyn Subsystem], cluster: &Cluster<'_>) -> Vec<Op> {
    let mut ops: Vec<Op> = subsystems.iter_mut().flat_map(|subsystem| subsystem.plan(cluster)).collect();
    ops.extend(afterwards(subsystems));
    #[cfg(debug_assertions)]
    compare(subsystems, cluster);
    ops
}

/// What waits until all that was planned is carried out.
pub(crate) fn afterwards(subsystems: &mut [&mut dyn Subsystem]) -> Vec<Op> {
    subsystems.iter_mut().flat_map(|subsystem| subsystem.afterwards()).collect()
}

/// Their parts of an endpoint that is about to be created.
pub(crate) fn prepare(
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
pub(crate) fn detached(
    subsystems: &mut [&mut dyn Subsystem],
    network: NetworkId,
    cluster: &Cluster<'_>,
) -> Vec<Op> {
    subsystems.iter_mut().flat_map(|subsystem| subsystem.detached(network, cluster)).collect()
}

/// Tells the kernel's answers to one batch; a batch of a full pass, which sent everything, is `full`.
pub(crate) fn outcomes<'a>(
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
pub(crate) fn refusal<'a>(subsystems: &'a [&mut dyn Subsystem], network: NetworkId) -> Option<&'a str> {
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
            let more = ovl_core::diff::diff(&sent, &desired, true);
            let more: Vec<String> = more.iter().map(ToString::to_string).collect();
            tracing::error!(index, ?more, "a quick pass differs from what is desired");
            debug_assert!(more.is_empty(), "subsystem {index}: a quick pass missed {more:?}");
        }
    }
}
