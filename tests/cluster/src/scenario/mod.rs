//! What is tried, in order: each scenario finds the cluster as those before have left it, whole.

mod encryption;
mod faults;
mod network;
mod package;
mod service;

use anyhow::Result;

use crate::world::World;

/// Something that must work.
pub(crate) struct Scenario {
    pub(crate) name: &'static str,
    pub(crate) run: fn(&World<'_>) -> Result<String>,
}

/// How many of [`ALL`] make the cluster that the others need.
pub(crate) const NEEDED: usize = 4;

/// All of them, in order.
pub(crate) const ALL: &[Scenario] = &[
    Scenario { name: "install", run: package::install },
    Scenario { name: "form", run: service::form },
    Scenario { name: "switched", run: network::switched },
    Scenario { name: "routed", run: network::routed },
    Scenario { name: "unit", run: service::unit },
    Scenario { name: "security", run: service::security },
    Scenario { name: "sandbox", run: service::sandbox },
    Scenario { name: "pods", run: network::pods },
    Scenario { name: "direct", run: network::direct },
    Scenario { name: "link-managers", run: network::link_managers },
    Scenario { name: "kill", run: service::kill },
    Scenario { name: "watchdog", run: service::watchdog },
    Scenario { name: "encryption", run: encryption::kernel },
    Scenario { name: "encryption-mixed", run: encryption::mixed },
    Scenario { name: "reboot", run: faults::reboot },
    Scenario { name: "power", run: faults::power },
    Scenario { name: "cut", run: faults::cut },
    Scenario { name: "upgrade", run: package::upgrade },
    Scenario { name: "remove", run: package::remove },
    Scenario { name: "purge", run: package::purge },
];
