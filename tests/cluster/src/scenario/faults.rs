//! Reboot, power failure and isolation of a machine.

use anyhow::{Result, ensure};

use super::network::DIRECT;
use crate::flow::{Flow, none_lost};
use crate::machine::Machine;
use crate::world::World;

/// Reboots a machine gracefully: the others do not notice, and it returns with its networks.
pub(super) fn reboot(world: &World<'_>) -> Result<String> {
    without(world, |machine| machine.reboot())
}

/// Powers a machine off and on again.
pub(super) fn power(world: &World<'_>) -> Result<String> {
    without(world, |machine| {
        machine.power_off()?;
        wait_state(world, machine, "dead")?;
        machine.power_on()
    })
}

/// Takes the last machine down and up, while the first two ping each other.
fn without(world: &World<'_>, take_down_and_up: impl Fn(&dyn Machine) -> Result<()>) -> Result<String> {
    let last = world.last();
    let (flat, pods) = (world.workloads("flat")?, world.workloads("pods")?);
    let others = Flow::start(&[(&flat[0], &flat[1]), (&pods[0], &pods[1])])?;
    world.network("straight", DIRECT)?;
    take_down_and_up(last)?;
    last.wait("systemctl is-active ovld")?;
    world.wait_settled()?;
    // The machine gets its block and its routes back by itself.
    let blocks = last.ctl("subnets")?;
    let own = blocks.as_array().into_iter().flatten();
    ensure!(own.clone().any(|each| each["node"] == last.name() && each["network"] == "pods"), "{blocks}");
    // Endpoints do not survive a reboot. New ones are reachable from everywhere.
    for network in ["flat", "pods", "straight"] {
        let all = world.workloads(network)?;
        world.ping_all(&all)?;
    }
    Ok(format!("between the others {}", none_lost(others)?))
}

/// Cuts a machine off until the others declare it dead, and reconnects it with all that it had.
pub(super) fn cut(world: &World<'_>) -> Result<String> {
    let last = world.last();
    let (flat, pods) = (world.workloads("flat")?, world.workloads("pods")?);
    let others = Flow::start(&[(&flat[0], &flat[1]), (&pods[0], &pods[1])])?;
    last.cut()?;
    wait_state(world, last, "dead")?;
    last.heal()?;
    wait_state(world, last, "alive")?;
    world.wait_settled()?;
    for all in [&flat, &pods] {
        world.ping_all(all)?;
    }
    Ok(format!("between the others {}", none_lost(others)?))
}

/// Waits until the other machines list a machine in this state.
fn wait_state(world: &World<'_>, machine: &dyn Machine, state: &str) -> Result<()> {
    for other in world.machines.iter().filter(|other| other.name() != machine.name()) {
        other.wait_ctl("peers", &format!("{} {state}", machine.name()), |peers| {
            let all = peers.as_array()?;
            all.iter().any(|peer| peer["name"] == machine.name() && peer["state"] == state).then_some(())
        })?;
    }
    Ok(())
}
