//! `bench cni`: the CNI figures. Pods are added and deleted as by a container runtime: one process of the
//! plugin for each call, in the host's namespace.

pub(super) mod at_once;
mod by_hand;
pub(super) mod ground;
mod plugin;
pub(super) mod pod_tcp;
mod reference;
pub(super) mod routes;
pub(super) mod single;
pub(super) mod soak;
mod standing;
#[cfg(test)]
mod tests;
pub(super) mod version;
