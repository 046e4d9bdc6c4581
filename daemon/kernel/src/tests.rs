//! Against the real kernel, each test in network namespaces of its own; and against a fake of what the
//! build machines' kernel does not have.

mod drift;
mod endpoints;
mod fake;
mod filters;
mod lab;
mod passes;
mod probes;
mod sources;
mod sweeping;
mod tables;
mod tunnels;
mod wireguard;
