//! `round-trip`: round trip of a datagram, with everything on one core.

use anyhow::Result;
use serde_json::{Value, json};

use super::ground::Ground;
use super::ovl::Network;
use crate::Bench;
use crate::report::{Bar, Figure, Row};
use crate::stats::{Samples, round};

pub(crate) fn measure(bench: &Bench) -> Result<Figure> {
    let mut ground = Ground::default();
    ground.raw();
    ground.ovl(bench, &[Network::Routed, Network::Switched, Network::Plain]);
    ground.peers(bench);
    let (turns, count) = (bench.plan.tunnel_turns, bench.plan.round_trips);
    let results = ground.in_turns(turns, |system| system.round_trips(count));
    let bar = |name: &str| (name == Network::Routed.contender()).then_some(Bar::AtMost(25.0));
    let rows =
        results.names().map(|name| Row::of(&format!("{name}, p50"), results.of(name, p50), "us", bar(name)));
    Ok(Figure {
        setup: format!(
            "2 hosts in each lab, 64 bytes in a UDP datagram, one at a time; both ends and all threads of the \
             tunnel's two processes on one core, so that no other core can help by spinning; {turns} rounds \
             of {count}, the median of the rounds' p50. ovl between workloads, the other systems between the hosts. {}",
            ground.setup()
        ),
        rows: rows.collect(),
        notes: results.notes(),
        details: results.to_json(|turns| {
            let percentiles = |percent| -> Vec<Value> {
                turns.iter().map(|turn| json!(round(turn.percentile(percent)))).collect()
            };
            json!({"p50_us": percentiles(50.0), "p99_us": percentiles(99.0)})
        }),
    })
}

fn p50(turns: &[Samples]) -> f64 {
    Samples::new(turns.iter().map(|turn| turn.percentile(50.0)).collect()).median()
}
