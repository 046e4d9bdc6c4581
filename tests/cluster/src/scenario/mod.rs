//! The scenarios, in order. Each one finds the cluster intact, as the previous ones have left it.

mod encryption;
mod fast_path;
mod faults;
mod host;
mod network;
mod package;
mod reach;
mod service;
mod underlay;

use anyhow::Result;

use crate::world::World;

/// A scenario.
pub(crate) struct Scenario {
    pub(crate) name: &'static str,
    pub(crate) run: fn(&World<'_>) -> Result<String>,
    /// Whether CI runs it, within its time limit of a few minutes.
    pub(crate) ci: bool,
}

/// Number of scenarios at the start of [`ALL`] that create the cluster for the others.
pub(crate) const NEEDED: usize = 4;

/// All scenarios, in order.
pub(crate) const ALL: &[Scenario] = &[
    Scenario { name: "install", run: package::install, ci: true },
    Scenario { name: "form", run: service::form, ci: true },
    Scenario { name: "switched", run: network::switched, ci: true },
    Scenario { name: "routed", run: network::routed, ci: true },
    Scenario { name: "unit", run: service::unit, ci: true },
    Scenario { name: "security", run: service::security, ci: true },
    Scenario { name: "drops", run: reach::drops, ci: true },
    Scenario { name: "sandbox", run: service::sandbox, ci: false },
    Scenario { name: "pods", run: network::pods, ci: false },
    Scenario { name: "direct", run: network::direct, ci: false },
    Scenario { name: "fast_path", run: fast_path::fast_path, ci: false },
    Scenario { name: "link-managers", run: network::link_managers, ci: false },
    Scenario { name: "restart", run: service::restart, ci: false },
    Scenario { name: "kill", run: service::kill, ci: false },
    Scenario { name: "watchdog", run: service::watchdog, ci: false },
    Scenario { name: "encryption", run: encryption::kernel, ci: true },
    Scenario { name: "encryption-mixed", run: encryption::mixed, ci: false },
    Scenario { name: "detour", run: reach::detour, ci: false },
    Scenario { name: "nat", run: reach::nat, ci: true },
    Scenario { name: "address", run: underlay::address, ci: false },
    Scenario { name: "netem", run: underlay::netem, ci: false },
    Scenario { name: "ufw", run: underlay::ufw, ci: false },
    Scenario { name: "firewalld", run: underlay::firewalld, ci: false },
    Scenario { name: "network-manager", run: host::network_manager, ci: false },
    Scenario { name: "reboot", run: faults::reboot, ci: false },
    Scenario { name: "power", run: faults::power, ci: false },
    Scenario { name: "cut", run: faults::cut, ci: false },
    Scenario { name: "features", run: host::features, ci: false },
    Scenario { name: "upgrade", run: package::upgrade, ci: true },
    Scenario { name: "remove", run: package::remove, ci: false },
    Scenario { name: "purge", run: package::purge, ci: true },
];
