//! `pod-tcp`: one TCP stream from pod to pod across hosts, compared with manually built routes in alternating
//! rounds.

use anyhow::{Context, Result, bail, ensure};
use netns_lab::{Lab, wait_until};
use serde_json::{Map, Value, json};

use super::by_hand::{self, Way};
use super::ground;
use crate::Bench;
use crate::flow::Party;
use crate::report::{Bar, Figure, Row};
use crate::stream::{self, Cores, Path};
use crate::turns::{self, Turns};

const HOSTS: usize = 2;
const WAYS: [Way; 2] = [Way::Vxlan, Way::Direct];

pub(crate) fn measure(bench: &Bench) -> Result<Figure> {
    bench.ovl_cni()?;
    let mut rows = Vec::new();
    let mut details = Map::new();
    let mut mtus = Vec::new();
    for way in WAYS {
        // A host has only one of the two networks at a time.
        let lab = bench.lab(HOSTS)?;
        stream::check(&lab["h1"])?;
        lab.start_all()?;
        // A lab without daemons beside the other one, with identical kernel settings.
        let other = bench.lab(HOSTS)?;
        let ours = pods(bench, &lab, way)?;
        let mtu = turns::mtu_of(&ours[0].0)?;
        let hand = by_hand::build(&other, way, mtu)?;
        let (ours, hand) = (path(&ours)?, path(&hand)?);
        // A warm-up run that does not count.
        hand.run(bench.plan.stream, Cores::One)?;
        let bare = (0..bench.plan.turns.div_ceil(4))
            .map(|_| hand.run(bench.plan.stream, Cores::One))
            .collect::<Result<Vec<_>>>()?;
        by_hand::masquerade(&other, way)?;
        let one = Turns::take(&bench.plan, &ours, &hand, Cores::One)?;
        let name = way.name();
        rows.extend([
            Row::with_bar(&format!("{name}, ovl : manual"), one.best_ratio(), "", Bar::AtLeast(0.95)),
            Row::context(&format!("{name}, the same by medians"), one.ratio(), ""),
            Row::context(&format!("{name}, ovl"), one.overlay_gbit_s().max(), "Gbit/s"),
            Row::context(&format!("{name}, manual"), one.hand_gbit_s().max(), "Gbit/s"),
            Row::context(
                &format!("{name}, manual, without masquerading"),
                turns::gbit_s(&bare).max(),
                "Gbit/s",
            ),
        ]);
        details.insert(
            name.to_owned(),
            json!({"mtu": mtu, "one_core": one.to_json(), "by_hand_bare": turns::to_json(&bare)}),
        );
        mtus.push(format!("{name} {mtu}"));
    }
    Ok(Figure {
        setup: format!(
            "2 hosts, underlay MTU 1500, pods' MTU {}, one iperf3 stream (cubic) of {} s from a pod to one on the \
             other host, {} rounds each, ovl and the manual network alternating in two labs side by side, both ends \
             on one core; the best round of each, because other work can only slow a round down. Manual: pods on a veth \
             each with a host route, one route to the other host's pods, with vxlan also one neighbour and one FDB \
             entry; no daemon; masquerading by one nft rule, as ovl does and as pods need. The last row of each \
             is without masquerading: the path then has no packet filter and no connection tracking",
            mtus.join(", "),
            bench.plan.stream.as_secs(),
            bench.plan.turns
        ),
        rows,
        notes: Vec::new(),
        details: Value::Object(details),
    })
}

/// Creates an ovl network with this backend and a pod on each host.
fn pods(bench: &Bench, lab: &Lab, way: Way) -> Result<[Party; 2]> {
    let name = way.name();
    ground::network(lab, name, &["--subnet", "10.60.0.0/16", "--backend", name])?;
    let pod = |host| {
        let plugin = ground::plugin(bench, &lab[host], name)?;
        ground::pod(&plugin, &lab[host], &format!("pod-{name}"))
    };
    let parties = [pod("h1")?, pod("h2")?];
    wait_until(ground::SETTLE_TIMEOUT, "the route to the other host's pod", || {
        check_way(lab, way, &parties[1])
    })?;
    Ok(parties)
}

/// Checks that h1's packets to the pod on h2 use this backend.
fn check_way(lab: &Lab, way: Way, (_, pod): &Party) -> Result<()> {
    let routes = lab["h1"].ip_json(&["route", "get", &pod.to_string()])?;
    let device = routes[0]["dev"].as_str().with_context(|| format!("no route to {pod}: {routes}"))?;
    let link = lab["h1"].ip_json(&["-d", "link", "show", device])?;
    let kind = link[0]["linkinfo"]["info_kind"].as_str().unwrap_or_default();
    let gateway = routes[0]["gateway"].as_str().unwrap_or_default();
    let peer = lab["h2"].address()?.to_string();
    let right = match way {
        Way::Vxlan => kind == "vxlan",
        Way::Direct => kind != "vxlan" && gateway == peer,
    };
    ensure!(right, "the route to {pod} is not {}: {routes}", way.name());
    Ok(())
}

/// Returns the path from the first pod to the second, after checking that it carries packets.
fn path([from, to]: &[Party; 2]) -> Result<Path> {
    if let Err(error) = from.0.ping_until(to.1, ground::SETTLE_TIMEOUT) {
        bail!("{} does not reach {}: {error:#}", from.0.netns_name(), to.1);
    }
    Path::new(&from.0, &to.0, to.1)
}
