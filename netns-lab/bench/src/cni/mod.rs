//! `bench cni`: the figures that issue 3 asks for. Pods come and go as a container runtime makes
//! them: one process of the plugin for each call, in the host's namespace.

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
