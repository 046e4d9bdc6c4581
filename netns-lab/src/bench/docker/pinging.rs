//! `pinging`: somebody on another host pings an address that nobody has, until a container takes it.

use std::net::IpAddr;
use std::thread;
use std::time::{Duration, SystemTime};

use anyhow::Result;
use serde_json::json;

use super::ground::{Ground, Pings, ms_between};
use super::links::Links;
use crate::bench::Bench;
use crate::bench::report::{Bar, Figure, Row};
use crate::bench::stats::Samples;

const HOSTS: usize = 3;
const PERIOD: Duration = Duration::from_millis(5);
/// Not a whole number of the seconds between two questions for a neighbour, so that they are met at
/// any moment.
const BEFORE: Duration = Duration::from_millis(2_350);
const TIMEOUT: Duration = Duration::from_secs(20);

pub(crate) fn measure(bench: &Bench) -> Result<Figure> {
    let ground = Ground::start(bench, HOSTS)?;
    for index in 0..HOSTS {
        ground.run(index, "stays", &[])?;
    }
    let (pinger, _) = ground.workload(1, "pinger")?;
    let links = Links::start(ground.host(0)?)?;
    let mut samples = [Vec::new(), Vec::new(), Vec::new()];
    for number in 0..bench.plan.docker_pings {
        let name = format!("c{number}");
        let address = IpAddr::from([10, 99, 200, u8::try_from(10 + number)?]);
        let pings = Pings::start(&pinger, address, PERIOD)?;
        thread::sleep(BEFORE + PERIOD * u32::try_from(number * 37 % 200)?);
        links.clear();
        let called = SystemTime::now();
        ground.run(0, &name, &["--ip", &address.to_string()])?;
        let link = links.wait_up(TIMEOUT)?;
        let answered = pings.answered_after(called, TIMEOUT)?;
        for (all, start) in samples.iter_mut().zip([link.up.unwrap_or(called), link.created, called]) {
            all.push(ms_between(start, answered).unwrap_or(0.0));
        }
        drop(pings);
        ground.remove(0, &name)?;
    }
    let [up, created, called] = samples.map(Samples::new);
    Ok(Figure {
        setup: format!(
            "{HOSTS} hosts with a Docker Engine and one container each; on h2 a workload pings an address every {} ms, for more \
             than two seconds before a container with that address is started on h1, {} times, each with another address; the \
             answer's time is that of `ping -D`, the link's the kernel's word of it. Swarm's overlay: 354 ms",
            PERIOD.as_millis(),
            bench.plan.docker_pings
        ),
        rows: vec![
            Row::with_bar(
                "the container's link is up until the first answer, p50",
                up.percentile(50.0),
                "ms",
                Bar::AtMost(100.0),
            ),
            Row::context("the same, max", up.max(), "ms"),
            Row::context(
                "its pair of interfaces is made until the first answer, p50",
                created.percentile(50.0),
                "ms",
            ),
            Row::context("`docker run` called until the first answer, p50", called.percentile(50.0), "ms"),
        ],
        notes: Vec::new(),
        details: json!({"up_ms": up.to_json(), "created_ms": created.to_json(), "called_ms": called.to_json()}),
    })
}
