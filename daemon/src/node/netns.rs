//! Where a workload's network namespace is, for commands that are run in it.

use std::collections::BTreeMap;

use ovl_control::Netns;

use super::{Failed, Node};
use ovl_subsystems::names::resolver::resolv_conf;

impl Node {
    /// Returns the network namespace of an endpoint of this host.
    ///
    /// # Errors
    ///
    /// There is no such endpoint here, it is in several namespaces, or its namespace is gone.
    pub(super) fn netns_of(
        &self,
        name: &str,
        network: Option<&str>,
        namespace: Option<&str>,
    ) -> Result<Netns, Failed> {
        let ids = self.own_named(name, network, namespace, "run the command there")?;
        let state = self.state.borrow();
        let places: BTreeMap<u64, _> = ids
            .iter()
            .filter_map(|id| state.endpoints.get(*id))
            .map(|local| (local.inode, local.netns.clone()))
            .collect();
        let mut places = places.into_iter();
        let (inode, path) = match (places.next(), places.next()) {
            (None, _) => {
                let namespace = namespace.unwrap_or("default");
                return Err(Failed::not_found(format!(
                    "there is no endpoint {name} in namespace {namespace} on this host; `ovlctl endpoints` lists them"
                )));
            }
            (Some(place), None) => place,
            (Some(_), Some(_)) => {
                return Err(Failed::invalid(format!(
                    "{name} is the name of several workloads: name the network with --network"
                )));
            }
        };
        let found = self.kernel.open_netns(&path).map_err(Failed::from)?;
        if found.inode != inode {
            return Err(Failed::not_found(format!(
                "{} is the namespace of another workload by now: that of {name} has no path any more",
                path.display()
            )));
        }
        // The workload has all its networks' addresses, and the resolver answers for them together.
        let addresses: Vec<_> = state
            .own_endpoints()
            .filter(|endpoint| state.endpoints.get(endpoint.id).is_some_and(|local| local.inode == inode))
            .flat_map(|endpoint| endpoint.addresses.iter().copied())
            .collect();
        Ok(Netns { path, inode, resolv_conf: resolv_conf(&addresses) })
    }
}
