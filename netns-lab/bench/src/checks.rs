//! `checks`: one TCP stream through a switched network with the checks of its endpoints' sources, compared with the same
//! network without them in alternating rounds.

use anyhow::{Context, Result, bail};
use serde_json::json;

use super::Bench;
use super::cluster::Cluster;
use super::report::{Bar, Figure, Row};
use super::stream::{self, Cores, Path};
use super::turns::Turns;

const HOSTS: usize = 2;
/// The table of the source checks for bridged frames.
const TABLE: [&str; 2] = ["bridge", "ovl-guard"];

pub(crate) fn measure(bench: &Bench) -> Result<Figure> {
    let (checked, unchecked) = (Cluster::start(bench.lab(HOSTS)?)?, Cluster::start(bench.lab(HOSTS)?)?);
    stream::check(checked.host(0)?)?;
    let (with, without) = (path(&checked)?, path(&unchecked)?);
    // A running daemon would restore the table.
    for host in checked.hosts().iter().chain(unchecked.hosts()) {
        host.kill9()?;
    }
    let [family, table] = TABLE;
    for host in checked.hosts() {
        let listed = host.exec(["nft", "list", "table", family, table])?;
        if !listed.stdout.contains("hook prerouting") {
            bail!("{} has no source checks", host.name());
        }
    }
    for host in unchecked.hosts() {
        host.exec_ok(["nft", "delete", "table", family, table])?;
    }

    // A warm-up run that does not count.
    without.run(bench.plan.stream, Cores::One)?;
    let turns = Turns::take(&bench.plan, &with, &without, Cores::One)?;
    Ok(Figure {
        setup: format!(
            "2 hosts, a switched network, one iperf3 stream (cubic) of {} s, both ends on one core, {} rounds each, \
             alternating in two labs side by side whose daemons are killed; in one of them the table of the source \
             checks is deleted. The best round of each, because other work can only slow a round down",
            bench.plan.stream.as_secs(),
            bench.plan.turns
        ),
        rows: vec![
            Row::with_bar(
                "with source checks : without, best rounds",
                turns.best_ratio(),
                "",
                Bar::AtLeast(0.98),
            ),
            Row::context("the same by medians", turns.ratio(), ""),
            Row::context("with source checks", turns.overlay_gbit_s().max(), "Gbit/s"),
            Row::context("without", turns.hand_gbit_s().max(), "Gbit/s"),
        ],
        notes: Vec::new(),
        details: json!({ "one_core": turns.to_json() }),
    })
}

/// Returns the path from the workload of the first host to that of the second.
fn path(cluster: &Cluster) -> Result<Path> {
    let workloads = cluster.one_workload_each()?;
    let [(from, _), (to, target)] = workloads.as_slice() else { bail!("not {HOSTS} workloads") };
    Path::new(from, to, *target).context("the path through the network")
}
