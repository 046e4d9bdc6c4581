//! A workload: a namespace such as a container's, on a host.

use std::ops::Deref;

use anyhow::Result;

use crate::host::Host;
use crate::netns::Netns;
use crate::switch::{remove_namespaces, workload_namespace};

/// A namespace to be attached to a network. It can be used like its namespace:
/// `workload.ping(...)`. Dropping this handle changes nothing.
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

    /// Its name on its host.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Its host.
    pub fn host(&self) -> &Host {
        &self.host
    }

    /// Ends its processes and deletes its namespace, without a word to the daemon.
    pub fn destroy(self) -> Result<()> {
        if self.exists() {
            remove_namespaces(&[self.netns_name().to_owned()])?;
        }
        self.host.update(|host| host.workloads.retain(|each| *each != self.name))
    }
}
