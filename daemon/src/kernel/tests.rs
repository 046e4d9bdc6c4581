//! Against the real kernel, each test in network namespaces of its own.

mod drift;
mod endpoints;
mod filters;
mod lab;
mod passes;
mod probes;
mod sweeping;
