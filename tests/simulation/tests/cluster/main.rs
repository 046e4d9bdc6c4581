//! Random faults over whole clusters.
//!
//! `OVL_SIM_SEED` is the seed of the schedule, and `OVL_SIM_MINUTES` the simulated length of the storms; without it the
//! small one takes a minute and the large one ten seconds. `OVL_SIM_LOG` is a level of the daemons' logs.
#![cfg(test)]
#![allow(clippy::unwrap_used, reason = "tests, and helpers of tests")]

mod entropy;

use std::collections::BTreeSet;
use std::time::Duration;

use anyhow::{Context as _, Result};
use ovl_proto::object::Mode;
use ovl_simulation::world::World;
use tokio::task::LocalSet;

/// Runs a test on a paused clock.
fn simulate(seed: u64, test: impl AsyncFnOnce(&mut World) -> Result<()> + Send) {
    if let Ok(level) = std::env::var("OVL_SIM_LOG") {
        let level: tracing_subscriber::filter::LevelFilter = level.parse().unwrap();
        let _ = tracing_subscriber::fmt().with_max_level(level).with_test_writer().try_init();
    }
    // A thread of its own, for which nothing has been drawn yet.
    let result = std::thread::scope(|scope| scope.spawn(|| run(seed, test)).join().unwrap());
    if let Err(error) = result {
        panic!("seed {seed}: {error:#}");
    }
}

fn run(seed: u64, test: impl AsyncFnOnce(&mut World) -> Result<()>) -> Result<()> {
    entropy::seed(seed);
    let runtime =
        tokio::runtime::Builder::new_current_thread().enable_time().enable_io().start_paused(true).build()?;
    LocalSet::new().block_on(&runtime, async {
        let mut world = World::new(seed)?;
        test(&mut world).await
    })
}

fn seed() -> u64 {
    number("OVL_SIM_SEED", 1)
}

fn number(name: &str, default: u64) -> u64 {
    std::env::var(name).map_or(default, |text| text.parse().unwrap())
}

/// Two networks, one of each kind.
async fn networks(world: &World) -> Result<()> {
    world.create_network(0, "blue", Mode::L2, "10.9.0.0/16").await?;
    world.create_network(0, "red", Mode::L3, "10.10.0.0/16").await
}

/// Attaches and detaches at random on daemons that run.
fn work(world: &mut World, counter: &mut u32) -> Result<()> {
    let host = world.random.below(world.len());
    if !world.is_running(host) {
        return Ok(());
    }
    let own: Vec<String> =
        world.attached().filter(|(at, _)| *at == host).map(|(_, name)| name.to_owned()).collect();
    if own.len() > 8 || (!own.is_empty() && world.random.percent(30)) {
        let at = world.random.below(own.len());
        let name = own.get(at).context("no endpoint")?;
        world.detach(host, name)?;
    } else {
        *counter += 1;
        let network = if world.random.percent(50) { "blue" } else { "red" };
        world.attach(host, network, &format!("e{counter}"))?;
    }
    Ok(())
}

/// One fault at random.
async fn fault(world: &mut World) -> Result<()> {
    let host = world.random.below(world.len());
    match world.random.below(7) {
        0 => {
            let size = 1 + world.random.below(world.len() / 2);
            let away: BTreeSet<usize> = (0..size).map(|_| world.random.below(world.len())).collect();
            world.partition(&away);
        }
        1 => world.partition(&BTreeSet::new()),
        2 if world.is_running(host) => world.kill(host).await?,
        3 if world.is_running(host) => {
            let gently = world.random.percent(50);
            world.restart(host, gently).await?;
        }
        4 => {
            let by = i64::try_from(world.random.below(120_000))? - 60_000;
            world.step_clock(host, by)?;
        }
        5 => {
            let percent = world.random.below(20);
            world.network.set_loss(percent);
        }
        6 => world.interfere(host)?,
        _ if !world.is_running(host) => world.boot(host)?,
        _ => {}
    }
    Ok(())
}

/// Rounds of faults and work, each of which ends healed and settled.
async fn storm(world: &mut World, hosts: usize, length: Duration) -> Result<()> {
    world.start(hosts).await?;
    networks(world).await?;
    world.settle(Duration::from_secs(60)).await?;
    let (start, mut counter, mut rounds) = (tokio::time::Instant::now(), 0, 0);
    while start.elapsed() < length {
        for _ in 0..6 {
            for _ in 0..5 {
                work(world, &mut counter)?;
                let pause = 20 + world.random.below(2000);
                world.run_for(Duration::from_millis(u64::try_from(pause)?)).await;
                world.collect()?;
            }
            // Right after a request, so that some faults hit one in flight.
            work(world, &mut counter)?;
            let pause = world.random.below(8);
            world.run_for(Duration::from_millis(u64::try_from(pause)?)).await;
            fault(world).await?;
        }
        world.heal()?;
        let settled =
            world.settle(Duration::from_secs(180)).await.with_context(|| format!("round {rounds}"))?;
        println!(
            "round {rounds}: settled {settled:?} after the heal, {} endpoints, digest {:016x}",
            world.attached().count(),
            world.network.digest()
        );
        rounds += 1;
    }
    Ok(())
}

#[test]
fn three_hosts_form_a_cluster_and_share_their_tables() {
    simulate(seed(), async |world| {
        world.start(3).await?;
        networks(world).await?;
        world.settle(Duration::from_secs(60)).await?;
        for host in 0..3 {
            for network in ["blue", "red"] {
                world.attach(host, network, &format!("{network}{host}"))?;
            }
        }
        world.settle(Duration::from_secs(10)).await?;
        assert_eq!(world.attached().count(), 6);
        world.restart(1, false).await?;
        world.settle(Duration::from_secs(60)).await?;
        world.detach(1, "blue1")?;
        world.settle(Duration::from_secs(10)).await?;
        assert_eq!(world.attached().count(), 5);
        Ok(())
    });
}

/// In processes of their own: worlds that run at the same time in one process do not repeat exactly.
#[test]
#[cfg(target_arch = "x86_64")]
fn the_same_seed_gives_the_same_run() {
    if std::env::var_os("OVL_SIM_CHILD").is_some() {
        return simulate(7, async |world| storm(world, 3, Duration::from_secs(20)).await);
    }
    let run = || {
        let mut child = std::process::Command::new(std::env::current_exe().unwrap());
        child.args(["--exact", "the_same_seed_gives_the_same_run", "--nocapture"]);
        let output = child.env("OVL_SIM_CHILD", "1").output().unwrap();
        assert!(output.status.success(), "{output:?}");
        let text = String::from_utf8(output.stdout).unwrap();
        text.lines().filter(|line| line.starts_with("round")).map(str::to_owned).collect::<Vec<_>>()
    };
    let first = run();
    assert!(!first.is_empty());
    assert_eq!(first, run());
}

#[test]
fn five_hosts_survive_random_faults() {
    let minutes = number("OVL_SIM_MINUTES", 1);
    simulate(seed(), async |world| storm(world, 5, Duration::from_secs(60 * minutes)).await);
}

#[test]
fn twenty_hosts_survive_random_faults() {
    // A short storm unless OVL_SIM_MINUTES asks for more: forming the cluster is most of the work.
    let length = match number("OVL_SIM_MINUTES", 0) {
        0 => Duration::from_secs(10),
        minutes => Duration::from_secs(60 * minutes),
    };
    simulate(seed(), async |world| storm(world, 20, length).await);
}
