//! Tests against the real kernel, each in network namespaces of its own, and against a fake of the features that the
//! kernels of build machines lack.

mod drift;
mod endpoints;
mod fake;
mod filters;
mod groups;
mod lab;
mod passes;
mod probes;
mod sources;
mod sweeping;
mod tables;
mod tunnels;
mod wireguard;
