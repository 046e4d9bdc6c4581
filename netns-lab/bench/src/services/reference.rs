//! Measurement of the reference layouts between two namespaces.

use std::net::{Ipv4Addr, SocketAddr, SocketAddrV4};
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use netns_lab::{Host, Workload};

use super::layouts::{Layout, Reference};
use super::{BACKEND_PORT, endpoint_addresses, service_address};
use crate::stats::{Samples, ms};
use crate::{Bench, connect};

/// Results of one layout.
pub(super) struct Shown {
    pub(super) layout: Layout,
    /// Load time in seconds.
    pub(super) load: f64,
    /// Times to add or remove one endpoint, in milliseconds.
    pub(super) change: Samples,
    pub(super) direct: Samples,
    pub(super) through: Samples,
}

/// kube-proxy's nft layout takes minutes on a slow machine.
const PATIENCE: Duration = Duration::from_secs(400);
/// Number of changes; each takes long.
const CHANGES: usize = 3;

pub(super) fn measure(bench: &Bench) -> Result<Vec<Shown>> {
    let lab = bench.lab(1)?;
    let host = lab.host("h1")?;
    let (client, server) = (leaf(host, "client", 1)?, leaf(host, "server", 2)?);
    host.exec_ok(["sysctl", "-qw", "net.ipv4.ip_forward=1"])?;
    let to = Ipv4Addr::new(10, 98, 2, 2);
    let ports = [0, 1, 2].map(|more| BACKEND_PORT + more);
    ports.iter().try_for_each(|port| connect::serve(&server, *port))?;
    let count = bench.plan.services;
    let services: Vec<Reference> = (0..count)
        .map(|number| {
            let endpoints = match number + 1 == count {
                true => ports.map(|port| SocketAddrV4::new(to, port)),
                false => endpoint_addresses(number)?.map(|address| SocketAddrV4::new(address, BACKEND_PORT)),
            };
            Ok(Reference { address: service_address(number)?, endpoints })
        })
        .collect::<Result<_>>()?;
    Layout::ALL.into_iter().map(|layout| one(bench, host, &client, layout, &services, to)).collect()
}

/// Creates a namespace behind a router.
fn leaf(host: &Host, name: &str, number: u8) -> Result<Workload> {
    let workload = host.workload(name)?;
    let outside = format!(
        "link add leaf{number} type veth peer name eth0 netns {}\naddr add 10.98.{number}.1/24 dev leaf{number}\n\
         link set leaf{number} up\n",
        workload.netns_name()
    );
    let inside = format!(
        "addr add 10.98.{number}.2/24 dev eth0\nlink set eth0 up\nroute add default via 10.98.{number}.1\n"
    );
    host.exec_input(["ip", "-batch", "-"], Some(&outside))?;
    workload.exec_input(["ip", "-batch", "-"], Some(&inside))?;
    Ok(workload)
}

fn one(
    bench: &Bench,
    host: &Host,
    client: &Workload,
    layout: Layout,
    services: &[Reference],
    to: Ipv4Addr,
) -> Result<Shown> {
    let load = |text: &str| -> Result<f64> {
        let start = Instant::now();
        let done = host.spawn_with(layout.loader().iter().copied(), text)?.finish(PATIENCE)?;
        ensure!(done.status.success(), "cannot load {}: {}", layout.text(), done.stderr.trim());
        Ok(ms(start.elapsed()))
    };
    let whole = load(&layout.whole(services))? / 1000.0;
    let middle = services.len() / 2;
    let more = SocketAddrV4::new(Ipv4Addr::new(10, 201, 0, 1), BACKEND_PORT);
    let mut changes = Vec::new();
    for _ in 0..CHANGES {
        for add in [true, false] {
            if let Some(service) = services.get(middle) {
                changes.push(load(&layout.one_more(middle, service, more, add))?);
            }
        }
    }
    let last = service_address(services.len() - 1)?;
    let (direct, through) = connect::in_turns(
        client,
        SocketAddr::from((to, BACKEND_PORT)),
        SocketAddr::from((last, super::PORT)),
        bench.plan.connects,
    )?;
    match layout {
        Layout::Iptables => host.exec_input(["iptables-legacy-restore"], Some("*nat\nCOMMIT\n"))?,
        Layout::Nft | Layout::ByHand => host.exec_ok(["nft", "flush", "ruleset"])?,
    };
    Ok(Shown { layout, load: whole, change: Samples::new(changes), direct, through })
}
