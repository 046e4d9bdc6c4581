//! A cluster in one process: daemons on tokio's virtual clock, a network and kernels in memory, and the invariants that
//! every schedule of faults must keep.
//!
//! | module | what is in it |
//! | --- | --- |
//! | [`world`] | the cluster: what is done to it, and what it has acknowledged |
//! | [`host`] | one host: its environment and its daemon |
//! | [`network`], [`nat`] | datagrams and streams in memory, with latency, loss, partitions and NAT |
//! | [`checks`], [`kernels`] | the invariants |
//! | [`storm`] | rounds of work and faults |
//! | [`run`] | one simulation: its thread, its runtime, and what ends it |
//! | [`random`], [`entropy`] | the generator that a seed starts, and the system's random numbers from it |
//!
//! `OVL_SIM_SEED` is the seed of the schedule. `OVL_SIM_MINUTES` is the simulated length of the storms, and
//! `OVL_SIM_HOSTS` the number of hosts of the large one. `OVL_SIM_LOG` is a level of the daemons' logs.
//!
//! The code is not a library, so that only tests are built with tokio's paused clock.
#![cfg(test)]
#![allow(clippy::unwrap_used, reason = "tests, and helpers of tests")]

mod checks;
mod entropy;
mod host;
mod kernels;
mod nat;
mod network;
mod random;
mod run;
mod storm;
mod world;

use std::collections::BTreeSet;
use std::time::Duration;

use ovl_proto::object::Mode;
use tokio::time::Instant;

use self::nat::Kind;
use self::run::{Slot, number, seed, simulate};
use self::storm::{Storm, networks};
use self::world::{Wanted, World};

fn endpoint(network: &str, name: &str) -> Wanted {
    Wanted { network: network.to_owned(), name: name.to_owned(), ..Wanted::default() }
}

#[test]
fn three_hosts_form_a_cluster_and_share_their_tables() {
    simulate(Slot::Three, seed(), async |world| {
        world.start(3).await?;
        networks(world).await?;
        world.settle(Duration::from_secs(60)).await?;
        for host in 0..3 {
            for network in ["blue", "red"] {
                world.attach(host, endpoint(network, &format!("{network}{host}")))?;
            }
        }
        world.settle(Duration::from_secs(10)).await?;
        assert_eq!(world.attached.len(), 6);
        world.restart(1, false).await?;
        world.settle(Duration::from_secs(60)).await?;
        world.detach(1, "blue1")?;
        world.settle(Duration::from_secs(10)).await?;
        assert_eq!(world.attached.len(), 5);
        Ok(())
    });
}

#[test]
fn a_rotation_reboots_and_a_death_are_survived() {
    simulate(Slot::Reboots, seed(), async |world| {
        world.start(4).await?;
        networks(world).await?;
        for host in 0..4 {
            world.attach(host, endpoint("blue", &format!("blue{host}")))?;
        }
        world.settle(Duration::from_secs(30)).await?;
        world.rotate_key(2)?;
        world.settle(Duration::from_secs(30)).await?;
        assert_eq!(world.acknowledged_key, 1);
        // A reboot takes the endpoints of a host away.
        world.power_off(1).await?;
        world.run_for(Duration::from_secs(10)).await;
        world.heal()?;
        world.settle(Duration::from_secs(60)).await?;
        assert_eq!(world.attached.len(), 3);
        // A rotation that a host without power misses.
        world.power_off(3).await?;
        world.run_for(Duration::from_secs(10)).await;
        world.rotate_key(0)?;
        world.run_for(Duration::from_secs(30)).await;
        world.heal()?;
        world.settle(Duration::from_secs(60)).await?;
        assert_eq!((world.acknowledged_key, world.attached.len()), (2, 2));
        world.bury(0).await?;
        world.settle(Duration::from_secs(60)).await?;
        world.add_host()?;
        world.settle(Duration::from_secs(60)).await?;
        assert_eq!(world.attached.len(), 1);
        world.create_network(4, "late", Mode::L2, "10.12.0.0/24").await?;
        world.attach(4, endpoint("late", "late4"))?;
        world.settle(Duration::from_secs(10)).await?;
        assert_eq!(world.attached.len(), 2);
        Ok(())
    });
}

/// The bytes that streams carry because hosts lack objects are at most three times the bytes of those objects.
#[test]
fn hosts_that_were_cut_off_fetch_once_what_they_lack() {
    simulate(Slot::Behind, seed(), async |world| {
        world.start(8).await?;
        world.settle(Duration::from_secs(60)).await?;
        let away = BTreeSet::from([5, 6, 7]);
        let mut streamed = Vec::new();
        let mut written = 0;
        for networks in [0, 100] {
            world.partition(&away);
            world.run_for(Duration::from_secs(30)).await;
            let before = world.network.streamed();
            for number in 0..networks {
                let subnet = format!("10.100.{number}.0/24");
                world.create_network(0, &format!("n{number}"), Mode::L2, &subnet).await?;
            }
            world.run_for(Duration::from_secs(5)).await;
            // They were pushed to the four other hosts of this side.
            written = (world.network.streamed() - before) / 4;
            let before = world.network.streamed();
            world.heal()?;
            world.settle(Duration::from_secs(60)).await?;
            streamed.push(world.network.streamed() - before);
        }
        let (needed, spent) = (written * 3, streamed[1].saturating_sub(streamed[0]));
        println!("{needed} bytes are missing on three hosts; {spent} bytes were sent for them");
        assert!(written > 20_000 && spent <= needed * 3, "{needed} bytes needed, {spent} sent");
        Ok(())
    });
}

#[test]
fn attaches_right_after_a_start_wait_and_eight_hosts_are_admitted_within_a_second() {
    simulate(Slot::Starts, seed(), async |world| {
        world.start(1).await?;
        networks(world).await?;
        for host in 1..8 {
            world.add_host()?;
            world.attach(host, endpoint("blue", &format!("blue{host}")))?;
            world.attach(host, endpoint("red", &format!("red{host}")))?;
        }
        let start = Instant::now();
        while world.inspect_all().await?.values().any(|seen| seen.members.len() < 8) {
            world.run_for(Duration::from_millis(10)).await;
            assert!(start.elapsed() < Duration::from_secs(30), "not admitted");
        }
        let took = start.elapsed();
        world.collect_all().await?;
        // None was refused because its host was not a member yet, or did not know the network.
        assert_eq!(world.attached.len(), 14);
        world.settle(Duration::from_secs(30)).await?;
        println!("eight hosts were admitted within {took:?}");
        assert!(took < Duration::from_secs(1), "{took:?}");
        Ok(())
    });
}

/// Waits until all hosts agree. Returns how long that took.
async fn agree(world: &mut World, what: &str) -> anyhow::Result<Duration> {
    let start = Instant::now();
    loop {
        world.run_for(Duration::from_millis(100)).await;
        match world.check_tables().await {
            Ok(()) => break,
            Err(error) if start.elapsed() > Duration::from_secs(60) => {
                return Err(error.context(format!("not agreed after {what}")));
            }
            Err(_) => {}
        }
    }
    println!("all hosts agree {:?} after {what}", start.elapsed());
    Ok(start.elapsed())
}

/// Most of many hosts are behind NAT, half of them behind one whose mappings depend on the destination.
#[test]
fn many_hosts_behind_nat_agree_also_after_the_boxes_forget_them() {
    simulate(Slot::Hidden, seed(), async |world| {
        let hosts = number("OVL_SIM_HIDDEN", 24);
        world.start(3).await?;
        networks(world).await?;
        for number in 0..hosts {
            world.add_hidden_host(if number % 2 == 0 { Kind::Symmetric } else { Kind::PortRestricted })?;
        }
        world.wait_for_members().await?;
        agree(world, "all were admitted").await?;
        let names = |round: &str, host: usize| endpoint("blue", &format!("{round}{host}"));
        for host in world.living() {
            world.attach(host, names("first", host))?;
        }
        world.collect_all().await?;
        agree(world, "each got an endpoint").await?;
        let hidden: Vec<usize> = world.living().into_iter().skip(3).collect();
        for host in hidden.iter().step_by(2) {
            let address = world.hosts[*host].address;
            world.network.forget_mappings(address);
        }
        for host in world.living() {
            world.attach(host, names("second", host))?;
        }
        world.collect_all().await?;
        let took = agree(world, "half of the boxes forgot their mappings").await?;
        assert!(took < Duration::from_secs(20), "{took:?}");
        Ok(())
    });
}

/// Milliseconds of a day.
const DAY: i64 = 24 * 60 * 60 * 1000;

#[test]
fn what_was_written_with_a_clock_ahead_reaches_all_hosts_once_it_is_right() {
    simulate(Slot::Clocks, seed(), async |world| {
        // The first host forms the cluster with its clock three days ahead.
        world.start(1).await?;
        world.step_clock(0, 3 * DAY)?;
        assert!(world.create_network(0, "early", Mode::L2, "10.12.0.0/24").await?);
        world.step_clock(0, -3 * DAY)?;
        assert!(world.create_network(0, "late", Mode::L2, "10.13.0.0/24").await?);
        world.start(2).await?;
        world.settle(Duration::from_secs(30)).await?;
        // A member whose clock is ahead may not write: the others would refuse it.
        world.step_clock(2, 3 * DAY)?;
        world.run_for(Duration::from_secs(3)).await;
        assert!(!world.create_network(2, "refused", Mode::L2, "10.14.0.0/24").await?);
        assert!(world.create_network(0, "other", Mode::L2, "10.15.0.0/24").await?);
        world.settle(Duration::from_secs(30)).await?;
        world.step_clock(2, -3 * DAY)?;
        world.run_for(Duration::from_secs(3)).await;
        assert!(world.create_network(2, "right", Mode::L2, "10.16.0.0/24").await?);
        world.settle(Duration::from_secs(30)).await?;
        // Ten years ahead, and alone: nobody refuses it until the others are back.
        world.partition(&[1].into());
        world.step_clock(1, 3650 * DAY)?;
        world.run_for(Duration::from_secs(20)).await;
        assert!(world.create_network(1, "alone", Mode::L2, "10.17.0.0/24").await?);
        assert!(world.remove_network(1, "late").await?);
        world.heal()?;
        world.settle(Duration::from_secs(60)).await?;
        assert!(world.create_network(1, "after", Mode::L2, "10.18.0.0/24").await?);
        world.settle(Duration::from_secs(30)).await?;
        // A host that starts in 1970 takes the networks of the others, and what it writes is taken.
        world.power_off(2).await?;
        world.step_clock(2, -20_254 * DAY)?;
        assert!(world.create_network(0, "meanwhile", Mode::L2, "10.19.0.0/24").await?);
        world.boot(2)?;
        world.settle(Duration::from_secs(30)).await?;
        assert!(world.create_network(2, "unset", Mode::L2, "10.20.0.0/24").await?);
        assert!(world.remove_network(2, "early").await?);
        world.settle(Duration::from_secs(30)).await?;
        Ok(())
    });
}

#[test]
fn five_hosts_survive_random_faults() {
    let length = Duration::from_secs(60 * number("OVL_SIM_MINUTES", 2));
    simulate(Slot::Five, seed(), async |world| Storm::begin(world, 5).await?.rage(world, length).await);
}

#[test]
fn twenty_hosts_survive_random_faults() {
    // A short storm unless OVL_SIM_MINUTES asks for more: forming the cluster is most of the work.
    let length = match number("OVL_SIM_MINUTES", 0) {
        0 => Duration::from_secs(10),
        minutes => Duration::from_secs(60 * minutes),
    };
    let hosts = usize::try_from(number("OVL_SIM_HOSTS", 20)).unwrap();
    simulate(Slot::Twenty, seed(), async |world| Storm::begin(world, hosts).await?.rage(world, length).await);
}

/// In two processes: one that does nothing else, and one that runs two other simulations at the same time.
#[test]
#[cfg(target_arch = "x86_64")]
fn the_same_seed_gives_the_same_run() {
    let storm = |slot, seed, seconds| {
        simulate(slot, seed, async |world| {
            Storm::begin(world, 3).await?.rage(world, Duration::from_secs(seconds)).await
        });
    };
    match std::env::var("OVL_SIM_CHILD").as_deref() {
        Ok("alone") => return storm(Slot::Same, 7, 20),
        Ok("beside others") => {
            return std::thread::scope(|scope| {
                // They print no round.
                let others = [Slot::Three, Slot::Five].map(|slot| {
                    scope.spawn(move || {
                        simulate(slot, 8, async |world| {
                            world.start(3).await?;
                            networks(world).await?;
                            world.settle(Duration::from_secs(60)).await?;
                            world.run_for(Duration::from_secs(60)).await;
                            Ok(())
                        });
                    })
                });
                storm(Slot::Same, 7, 20);
                others.into_iter().for_each(|other| other.join().unwrap());
            });
        }
        Ok(_) | Err(_) => {}
    }
    let run = |how| {
        let mut child = std::process::Command::new(std::env::current_exe().unwrap());
        child.args(["--exact", "the_same_seed_gives_the_same_run", "--nocapture"]);
        let output = child.env("OVL_SIM_CHILD", how).output().unwrap();
        assert!(output.status.success(), "{output:?}");
        let text = String::from_utf8(output.stdout).unwrap();
        text.lines().filter(|line| line.starts_with("round")).map(str::to_owned).collect::<Vec<_>>()
    };
    let alone = run("alone");
    assert!(!alone.is_empty());
    assert_eq!(alone, run("beside others"));
}
