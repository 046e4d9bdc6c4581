//! `run`: time of `docker run --rm` on an ovl network and on a bridge network of the Engine.

use std::time::Instant;

use anyhow::Result;
use serde_json::json;

use super::ground::{Ground, IMAGE, NETWORK};
use crate::Bench;
use crate::report::{Bar, Figure, Row};
use crate::stats::{Samples, ms};

const OWN: &str = "own";

pub(crate) fn measure(bench: &Bench) -> Result<Figure> {
    let ground = Ground::start(bench, 3)?;
    let engine = ground.engine(0)?;
    engine.call(&["network", "create", OWN])?;
    // Keep a container on each network, so that the devices of the network exist.
    ground.run(0, "stays", &[])?;
    engine.call(&[
        "run",
        "--detach",
        "--name",
        "stays-too",
        "--network",
        OWN,
        IMAGE,
        "busybox",
        "sleep",
        "100000",
    ])?;
    let run = |network: &str| -> Result<f64> {
        let start = Instant::now();
        engine.call(&["run", "--rm", "--network", network, IMAGE, "busybox", "true"])?;
        Ok(ms(start.elapsed()))
    };
    let (mut ours, mut own) = (Vec::new(), Vec::new());
    for turn in 0..bench.plan.docker_runs {
        // Alternate which network goes first.
        let order = if turn % 2 == 0 { [NETWORK, OWN] } else { [OWN, NETWORK] };
        for network in order {
            let took = run(network)?;
            if network == OWN { own.push(took) } else { ours.push(took) }
        }
    }
    let (ours, own) = (Samples::new(ours), Samples::new(own));
    Ok(Figure {
        setup: format!(
            "3 hosts with a Docker Engine ({}) each; on h1 `docker run --rm IMAGE true` {} times on an ovl network that all \
             have and as often, in turn, on a bridge network of that Engine's own; one container runs on each all the time; \
             from before the start of `docker` until its exit",
            engine.call(&["version", "--format", "{{.Server.Version}}"])?,
            bench.plan.docker_runs
        ),
        rows: vec![
            Row::with_bar(
                "`docker run --rm`, ovl / the Engine's bridge, medians",
                ours.median() / own.median(),
                "",
                Bar::AtMost(1.0),
            ),
            Row::context("`docker run --rm` on an ovl network, median", ours.median(), "ms"),
            Row::context("`docker run --rm` on the Engine's bridge, median", own.median(), "ms"),
        ],
        notes: Vec::new(),
        details: json!({"ovl_ms": ours.to_json(), "bridge_ms": own.to_json()}),
    })
}
