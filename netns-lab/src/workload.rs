//! A workload: a namespace on a host, such as that of a container.

use std::ops::Deref;

use anyhow::Result;

use crate::host::Host;
use crate::netns::Netns;
use crate::switch::{remove_namespaces, workload_namespace};

/// A namespace to attach to a network. It dereferences to its namespace: `workload.ping(...)`. Dropping this
/// handle has no effect.
#[derive(Clone, Debug)]
pub struct Workload {
    host: Host,
    name: String,
    netns: Netns,
}

impl Deref for Workload {
    type Target = Netns;

    fn deref(&self) -> &Netns {
        &self.netns
    }
}

impl Workload {
    pub(crate) fn new(host: Host, name: &str) -> Self {
        let netns = Netns::new(workload_namespace(&host.shared.name, host.name(), name));
        Workload { host, name: name.to_owned(), netns }
    }

    /// Returns its name on its host.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Returns its host.
    pub fn host(&self) -> &Host {
        &self.host
    }

    /// Kills its processes and deletes its namespace, without notifying the daemon.
    pub fn destroy(self) -> Result<()> {
        if self.exists() {
            remove_namespaces(&[self.netns_name().to_owned()])?;
        }
        self.host.update(|host| host.workloads.retain(|each| *each != self.name))
    }
}
