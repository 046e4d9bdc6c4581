//! A subsystem that this host does without: it wants nothing, so what an earlier run left in the kernel is deleted.

use ovl_dataplane::op::Op;
use ovl_dataplane::state::Dataplane;

use crate::subsystem::{Change, Cluster, Subsystem};

/// Stands for a subsystem that is turned off.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Off;

impl Subsystem for Off {
    fn changed(&mut self, _: &Change<'_>, _: &Cluster<'_>) {}

    fn desired(&self, _: &Cluster<'_>) -> Dataplane {
        Dataplane::default()
    }

    fn resync(&mut self, _: &Cluster<'_>) -> Dataplane {
        Dataplane::default()
    }

    fn plan(&mut self, _: &Cluster<'_>) -> Vec<Op> {
        Vec::new()
    }

    fn sent(&self) -> Option<Dataplane> {
        Some(Dataplane::default())
    }

    fn withdraw(&mut self) {}
}
