//! `pinging`: time until a new container answers pings to its address, which were sent before it existed. On
//! ovl's network and on the overlay of a Swarm of the same Engines.

use std::net::IpAddr;
use std::thread;
use std::time::{Duration, SystemTime};

use anyhow::Result;
use serde_json::json;

use super::ground::{Ground, Pings, ms_between};
use super::links::{ENDPOINTS, Link, Links};
use crate::Bench;
use crate::report::{Bar, Figure, Row};
use crate::stats::Samples;

const HOSTS: usize = 3;
const PERIOD: Duration = Duration::from_millis(5);
/// Time of pings before the container starts. Not a multiple of the interval of neighbour probes, so that the
/// phase varies.
const BEFORE: Duration = Duration::from_millis(2_350);
const TIMEOUT: Duration = Duration::from_secs(20);
/// Name of the Swarm's network.
const SWARM: &str = "swarm";
const SWARM_SUBNET: &str = "10.98.0.0/16";

/// The times until an address answered.
struct Taken {
    called: SystemTime,
    link: Link,
    answered: SystemTime,
}

pub(crate) fn measure(bench: &Bench) -> Result<Figure> {
    let ground = Ground::start(bench, HOSTS)?;
    for index in 0..HOSTS {
        ground.run(index, "stays", &[])?;
    }
    ground.swarm(SWARM, SWARM_SUBNET)?;
    for index in 0..HOSTS {
        ground.run_on(SWARM, index, "stays-too", &[])?;
    }
    let (pinger, _) = ground.workload(1, "pinger")?;
    let theirs = ground.netns_of(1, "stays-too")?;
    let host = ground.host(0)?;
    let (our_links, their_links) = (Links::start(host, ENDPOINTS)?, Links::start(host, "veth")?);
    let count = bench.plan.docker_pings;
    let (mut ours, mut swarms) = (Vec::new(), Vec::new());
    for number in 0..count {
        let wait = |called| our_links.wait_up(called);
        ours.push(taken(&ground, super::ground::NETWORK, (99, number), pinger.path_str(), wait)?);
        let wait = |called| their_links.wait(called);
        swarms.push(taken(&ground, SWARM, (98, number), &theirs, wait)?);
    }
    let since = |all: &[Taken], start: fn(&Taken) -> SystemTime| {
        Samples::new(
            all.iter().map(|taken| ms_between(start(taken), taken.answered).unwrap_or(0.0)).collect(),
        )
    };
    let up = since(&ours, |taken| taken.link.up.unwrap_or(taken.called));
    let [created, swarm_created] = [&ours, &swarms].map(|all| since(all, |taken| taken.link.created));
    let [called, swarm_called] = [&ours, &swarms].map(|all| since(all, |taken| taken.called));
    let p50 = |samples: &Samples| samples.percentile(50.0);
    Ok(Figure {
        setup: format!(
            "{HOSTS} hosts with a Docker Engine, all of one Swarm, and a container on each network; on h2 a workload pings an \
             address every {} ms, for more than two seconds before a container with that address is started on h1, {count} times \
             on ovl's network and as often, in turn, on the Swarm's, each with another address; the answer's time is that of \
             `ping -D`, the link's that of the kernel's notification. Between the pair and its other side being up the Engine creates the \
             container. Swarm's overlay on another machine: 354 ms",
            PERIOD.as_millis(),
        ),
        rows: vec![
            Row::with_bar(
                "container's link up until the first answer, p50",
                p50(&up),
                "ms",
                Bar::AtMost(100.0),
            ),
            Row::context("the same, max", up.max(), "ms"),
            Row::context("creation of its veth pair until the first answer, p50", p50(&created), "ms"),
            Row::context("the same in the Swarm, p50", p50(&swarm_created), "ms"),
            Row::context("call of `docker run` until the first answer, p50", p50(&called), "ms"),
            Row::context("the same in the Swarm, p50", p50(&swarm_called), "ms"),
            Row::context("the same in the Swarm, max", swarm_called.max(), "ms"),
        ],
        notes: Vec::new(),
        details: json!({
            "up_ms": up.to_json(), "created_ms": created.to_json(), "called_ms": called.to_json(),
            "swarm_created_ms": swarm_created.to_json(), "swarm_called_ms": swarm_called.to_json(),
        }),
    })
}

/// Pings an address from a namespace on h2, starts a container with it on h1, and returns the times until it
/// answers.
fn taken(
    ground: &Ground,
    network: &str,
    (range, number): (u8, usize),
    from: &str,
    link: impl Fn(SystemTime) -> Result<Link>,
) -> Result<Taken> {
    let name = format!("{network}{number}");
    let address = IpAddr::from([10, range, 200, u8::try_from(10 + number)?]);
    let pings = Pings::start_in(ground.host(1)?, from, address, PERIOD)?;
    thread::sleep(BEFORE + PERIOD * u32::try_from(number * 37 % 200)?);
    let called = SystemTime::now();
    ground.run_on(network, 0, &name, &["--ip", &address.to_string()])?;
    let link = link(called)?;
    let answered = pings.answered_after(called, TIMEOUT)?;
    drop(pings);
    ground.remove(0, &name)?;
    Ok(Taken { called, link, answered })
}
