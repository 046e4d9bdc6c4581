//! `packets`: rate of small datagrams from one sender.

use anyhow::Result;
use serde_json::json;

use super::ground::Ground;
use super::ovl::Network;
use super::system::Rate;
use crate::Bench;
use crate::report::{Figure, Row};
use crate::stats::{Samples, round};

pub(crate) fn measure(bench: &Bench) -> Result<Figure> {
    let mut ground = Ground::default();
    ground.raw();
    ground.ovl(bench, &[Network::Routed, Network::Switched, Network::Plain]);
    ground.peers(bench);
    let turns = bench.plan.tunnel_turns;
    let results = ground.in_turns(turns, |system| system.datagrams(bench.plan.stream));
    Ok(Figure {
        setup: format!(
            "2 hosts in each lab, UDP datagrams of 64 bytes without a pause, one system call each, {turns} rounds of {} s, the \
             median of the number that arrived per second; sender, tunnel and receiver share the machine's cores. ovl between \
             workloads, the other systems between the hosts. {}",
            bench.plan.stream.as_secs(),
            ground.setup()
        ),
        rows: results.names().map(|name| Row::of(name, results.of(name, median), "a second", None)).collect(),
        notes: results.notes(),
        details: results.to_json(|rates| {
            json!({
                "received_s": rates.iter().map(|rate| round(rate.received_s)).collect::<Vec<_>>(),
                "lost_percent": rates.iter().map(|rate| round(rate.lost_percent)).collect::<Vec<_>>(),
            })
        }),
    })
}

fn median(rates: &[Rate]) -> f64 {
    Samples::new(rates.iter().map(|rate| rate.received_s).collect()).median()
}
