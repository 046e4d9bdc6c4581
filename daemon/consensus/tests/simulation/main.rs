//! A simulation of the consensus on the allocation map under faults of networks and hosts: messages are lost,
//! duplicated and reordered, hosts crash before and after they write to disk, the network splits, hosts join and
//! are forgotten, and all of them claim at once. It is deterministic: a failure names the seed. `OVL_SIM_SEED=n`
//! runs only that seed, `OVL_SIM_SEEDS=n` runs n seeds.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests, and helpers of tests")]

#[path = "../fake/mod.rs"]
mod fake;
mod lies;
mod recoveries;
mod storm;
mod world;

use ovl_consensus::Signatures;
use ovl_proto::alloc::Refusal;

use world::{Stats, World, network};

fn number(variable: &str) -> Option<u64> {
    std::env::var(variable).ok().and_then(|text| text.parse().ok())
}

/// Runs a storm in the world of each seed. Then everything is healed, and every host gets what it asks for. See
/// [`run_seeds`].
fn run_storms(many: u64, world_of: impl Fn(u64) -> World) -> Option<Stats> {
    run_seeds(many, world_of, |world| {
        world.storm(5000);
        world.heal_and_claim();
    })
}

/// Runs something in the world of each seed: `OVL_SIM_SEED` alone, or the first `OVL_SIM_SEEDS`, by default `many`. Returns
/// the sums if at least `many` seeds ran.
fn run_seeds(many: u64, world_of: impl Fn(u64) -> World, each: impl Fn(&mut World)) -> Option<Stats> {
    let only = number("OVL_SIM_SEED");
    let count = number("OVL_SIM_SEEDS").unwrap_or(many);
    let mut total = Stats::default();
    for seed in only.map_or(0..count, |seed| seed..seed + 1) {
        let mut world = world_of(seed);
        // The panic message does not contain the seed.
        let run = std::panic::AssertUnwindSafe(|| each(&mut world));
        if std::panic::catch_unwind(run).is_err() {
            panic!("seed {seed} failed");
        }
        total.add(&world.stats);
    }
    println!("{total:?}");
    (only.is_none() && count >= many).then_some(total)
}

#[test]
fn no_block_ever_has_two_holders() {
    let total = run_storms(1200, |seed| World::new(seed, 1 + (seed % 7) as usize));
    if let Some(total) = total {
        // The simulation is only meaningful if all faults occur often.
        assert!(total.decrees > 20_000 && total.done > 40_000, "{total:?}");
        assert!(total.no_majority > 4000 && total.crashes > 6000 && total.forgets > 6000, "{total:?}");
    }
}

#[test]
fn lies_of_a_member_and_of_an_outsider_change_nothing() {
    // The lies go on while everything is healed.
    let total = run_storms(600, |seed| {
        let count = 1 + (seed % 7) as usize;
        let mut world = World::new(seed, count);
        world.liar = Some((seed / 7) as usize % count);
        world
    });
    if let Some(total) = total {
        assert!(total.decrees > 5_000 && total.done > 10_000 && total.lies > 200_000, "{total:?}");
    }
}

#[test]
fn minority_side_of_a_split_reports_no_majority() {
    for seed in 0..20 {
        let mut world = World::new(seed, 5);
        world.heal_and_claim();
        world.split(&[0, 0, 1, 1, 1]);
        for node in 0..5 {
            world.claim(node, network(9), "10.50.0.0/16", 24, 1);
        }
        world.run(3100);
        for node in 0..2 {
            let refusal = Refusal::NoMajority { answered: 2, needed: 3, members: 5 };
            assert_eq!(world.nodes[node].last, Some(Err(refusal)), "seed {seed}");
        }
        for node in 2..5 {
            assert!(matches!(world.nodes[node].last, Some(Ok(_))), "seed {seed}");
        }
        world.split(&[0; 5]);
        world.claim(0, network(9), "10.50.0.0/16", 24, 1);
        world.run(500);
        assert!(matches!(world.nodes[0].last, Some(Ok(_))), "seed {seed}");
    }
}

#[test]
fn hosts_that_start_at_the_same_instant_claim_in_few_decrees() {
    let mut world = World::new(1, 7);
    world.heal_and_claim();
    let before = world.agreed.len();
    for node in 0..7 {
        world.claim(node, network(9), "10.50.0.0/16", 24, 1);
    }
    world.run(500);
    assert!(world.nodes.iter().all(|node| matches!(node.last, Some(Ok(_)))));
    assert!(world.agreed.len() - before <= 3, "{} decrees", world.agreed.len() - before);
}
