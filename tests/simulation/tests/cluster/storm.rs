//! Rounds of work and faults, drawn from a seed.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use ovl_proto::object::Mode;
use tokio::time::Instant;

use crate::world::{Wanted, World};

/// How long a healed cluster may take until all invariants hold.
const SETTLED_WITHIN: Duration = Duration::from_secs(120);
/// From this number of endpoints on, a host detaches.
const MANY: usize = 10;
/// The networks of endpoints. `green` is so small that hosts lease addresses from each other, and that it gets full.
const NETWORKS: [&str; 3] = ["blue", "green", "red"];

/// Rounds of faults and work, each of which ends healed and settled.
pub(crate) struct Storm {
    /// Number of the last endpoint, and of the last network.
    counter: u32,
    /// Hosts that died in this round.
    deaths: usize,
    /// A network whose creation was acknowledged right before all daemons were killed.
    spare: Option<String>,
}

impl Storm {
    /// Forms a cluster with its networks.
    pub(crate) async fn begin(world: &mut World, hosts: usize) -> Result<Self> {
        world.start(hosts).await?;
        networks(world).await?;
        world.settle(SETTLED_WITHIN).await?;
        Ok(Self { counter: 0, deaths: 0, spare: None })
    }

    /// Goes on for at least this long.
    pub(crate) async fn rage(&mut self, world: &mut World, length: Duration) -> Result<()> {
        let start = Instant::now();
        for round in 0.. {
            if start.elapsed() >= length {
                break;
            }
            let settled = self.round(world).await.with_context(|| format!("round {round}"))?;
            println!(
                "round {round}: settled {settled:?} after the heal, {} endpoints, digest {:016x}",
                world.attached.len(),
                world.network.digest()
            );
        }
        Ok(())
    }

    async fn round(&mut self, world: &mut World) -> Result<Duration> {
        for _ in 0..6 {
            for _ in 0..5 {
                self.work(world)?;
                let pause = world.random.duration_ms(20, 2000);
                world.run_for(pause).await;
                world.collect()?;
            }
            // Right after a request, so that some faults hit one in flight.
            self.work(world)?;
            let pause = world.random.duration_ms(0, 8);
            world.run_for(pause).await;
            self.fault(world).await?;
        }
        world.heal()?;
        let settled = world.settle(SETTLED_WITHIN).await?;
        // Before new hosts start, which know no network yet.
        if let Some(spare) = self.spare.take() {
            let host = world.random.pick(&world.running()).context("no daemon runs")?;
            ensure!(world.remove_network(host, &spare).await?, "network {spare} was not removed");
        }
        for _ in 0..std::mem::take(&mut self.deaths) {
            world.add_host()?;
        }
        Ok(settled)
    }

    /// Attaches and detaches on daemons that run.
    fn work(&mut self, world: &mut World) -> Result<()> {
        let running = world.running();
        let Some(host) = world.random.pick(&running) else { return Ok(()) };
        let own = world.attached_on(host);
        if own.len() > MANY {
            let half: Vec<&String> = own.iter().filter(|_| world.random.percent(50)).collect();
            return half.into_iter().try_for_each(|name| world.detach(host, name));
        }
        match world.random.below(10) {
            0..3 => match world.random.pick(&own) {
                Some(name) => world.detach(host, &name),
                None => Ok(()),
            },
            3..5 => self.burst(world, &running),
            _ => {
                let wanted = self.endpoint(world);
                world.attach(host, wanted)
            }
        }
    }

    /// Many attaches at one instant: on one host or on several, on one network, and on other hosts with the addresses
    /// that are about to be given.
    fn burst(&mut self, world: &mut World, running: &[usize]) -> Result<()> {
        let Some(network) = world.random.pick(&NETWORKS) else { return Ok(()) };
        for _ in 0..=world.random.below(3) {
            let Some(host) = world.random.pick(running) else { return Ok(()) };
            let next = world.newest_address(host, network);
            for _ in 0..2 + world.random.below(4) {
                let wanted = Wanted { network: network.to_owned(), ..self.endpoint(world) };
                world.attach(host, wanted)?;
            }
            let Some(address) = next else { continue };
            for _ in 0..2 {
                let (Some(other), step) = (world.random.pick(running), 1 + world.random.below(4)) else {
                    continue;
                };
                let address = after(address, u32::try_from(step)?);
                let wanted = Wanted { network: network.to_owned(), address, ..self.endpoint(world) };
                if is_for_endpoints(network, address) {
                    world.attach(other, wanted)?;
                }
            }
        }
        Ok(())
    }

    fn endpoint(&mut self, world: &mut World) -> Wanted {
        self.counter += 1;
        let network = world.random.pick(&NETWORKS).unwrap_or("blue").to_owned();
        let alias = world.random.percent(30).then(|| format!("service{}", world.random.below(3)));
        let free: Vec<(String, String)> = world.detached.iter().cloned().collect();
        let known = world.random.pick(&free).filter(|_| world.random.percent(20));
        let taken = |name: &String| {
            world.attached.keys().any(|(_, other)| other == name)
                || world.unknown.iter().any(|(_, other)| other == name)
        };
        match known.filter(|(_, name)| !taken(name)) {
            Some((_, name)) => Wanted { network, name, alias, address: None, used_before: true },
            None => {
                let name = format!("e{}", self.counter);
                Wanted { network, name, alias, address: None, used_before: false }
            }
        }
    }

    /// One fault.
    async fn fault(&mut self, world: &mut World) -> Result<()> {
        let living = world.living();
        let Some(host) = world.random.pick(&living) else { return Ok(()) };
        match world.random.below(15) {
            0 | 1 => {
                let size = 1 + world.random.below(living.len() / 2);
                let away: BTreeSet<usize> = (0..size).filter_map(|_| world.random.pick(&living)).collect();
                world.partition(&away);
            }
            2 => world.partition(&BTreeSet::new()),
            3 if world.is_running(host) => world.kill(&[host]).await?,
            4 if world.is_running(host) => {
                let gently = world.random.percent(50);
                world.restart(host, gently).await?;
            }
            5 => {
                let by = i64::try_from(world.random.below(120_000))? - 60_000;
                world.step_clock(host, by)?;
            }
            6 => {
                let percent = world.random.below(20);
                world.set_loss(percent);
            }
            7 => world.interfere(host)?,
            8 | 9 => world.toggle_disk(host)?,
            10 if world.is_running(host) => world.rotate_key(host)?,
            11 if world.is_running(host) => world.power_off(host).await?,
            12 if world.is_running(host) && self.spare.is_none() => self.kill_all(world, host).await?,
            // Not with a network that perhaps only this host knows.
            13 if self.deaths == 0
                && self.spare.is_none()
                && living.len() > 3
                && world.random.percent(50) =>
            {
                self.deaths += 1;
                world.bury(host).await?;
            }
            // Days or years ahead, or never set. The heal sets it right.
            14 => {
                const DAY: i64 = 24 * 60 * 60 * 1000;
                let by = world.random.pick(&[3 * DAY, 4000 * DAY, -100 * DAY, -19_000 * DAY]).unwrap_or(DAY);
                world.step_clock(host, by)?;
            }
            _ if !world.is_running(host) => world.boot(host)?,
            _ => {}
        }
        Ok(())
    }

    /// Kills all daemons at the moment when one of them has acknowledged a network, with slow disks.
    async fn kill_all(&mut self, world: &mut World, host: usize) -> Result<()> {
        for host in &world.hosts {
            host.slow_disk.set(true);
        }
        self.counter += 1;
        let name = format!("spare{}", self.counter);
        // One of the last 200, apart from the ranges of Services.
        let subnet = format!("10.20.{}.0/24", self.counter % 200);
        if world.create_network(host, &name, Mode::L2, &subnet).await? {
            self.spare = Some(name);
        }
        let running = world.running();
        world.kill(&running).await?;
        for host in &world.hosts {
            host.slow_disk.set(false);
        }
        running.into_iter().try_for_each(|host| world.boot(host))
    }
}

/// The networks of endpoints.
pub(crate) async fn networks(world: &mut World) -> Result<()> {
    let made = world.create_network(0, "blue", Mode::L2, "10.9.0.0/16").await?
        && world.create_network(0, "red", Mode::L3, "10.10.0.0/16").await?
        && world.create_network(0, "green", Mode::L2, "10.11.0.0/27").await?;
    ensure!(made, "the networks were not created");
    Ok(())
}

fn after(address: IpAddr, step: u32) -> Option<IpAddr> {
    match address {
        IpAddr::V4(address) => Some(IpAddr::from(address.to_bits().checked_add(step)?.to_be_bytes())),
        IpAddr::V6(_) => None,
    }
}

/// Whether a particular address may be asked for: on a routed network each block has a gateway, which nobody gets.
fn is_for_endpoints(network: &str, address: Option<IpAddr>) -> bool {
    let Some(IpAddr::V4(address)) = address else { return false };
    let [.., last] = address.octets();
    match network {
        "blue" => last > 1 && last < 255,
        "green" => last > 1 && last < 31,
        _ => false,
    }
}
