//! Source checks: reads the number of frames and packets that they refused.

use std::collections::BTreeMap;

use ovl_control::EndpointInfo;
use ovl_proto::id::EndpointId;
use ovl_subsystems::guard::{REFUSED, TABLES, refused_endpoint};

use super::{Failed, Node};

impl Node {
    /// Counts the frames and packets of each endpoint of this host that source checks refused.
    pub(super) async fn refused_frames(&self) -> Result<BTreeMap<EndpointId, u64>, Failed> {
        let mut refused = BTreeMap::new();
        for table in TABLES {
            let counts = self.kernel.counts(table, vec![REFUSED.to_owned()]).await.map_err(Failed::from)?;
            for counted in counts.into_iter().flatten() {
                if let Some(id) = refused_endpoint(&counted.key) {
                    *refused.entry(id).or_default() += counted.packets;
                }
            }
        }
        Ok(refused)
    }

    /// Lists the endpoints of all hosts, those of this host with the number of frames that were refused.
    pub(super) async fn endpoints(&self) -> Result<Vec<EndpointInfo>, Failed> {
        let refused = self.refused_frames().await?;
        let state = self.state.borrow();
        let mut all: Vec<EndpointInfo> = state
            .view
            .all_endpoints()
            .map(|placed| {
                let own = placed.node.record.id == state.view.me;
                let count = || refused.get(&placed.endpoint.id).copied().unwrap_or(0);
                EndpointInfo { refused: own.then(count), ..self.endpoint_info(&state, placed) }
            })
            .collect();
        all.sort_by(|a, b| (&a.network, &a.name, &a.node).cmp(&(&b.network, &b.name, &b.node)));
        Ok(all)
    }
}
