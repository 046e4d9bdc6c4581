//! `size`: memory, and time until everything is in force, with the objects of a large cluster.

use std::net::{IpAddr, Ipv4Addr};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use netns_lab::{Host, wait_until};
use ovl_tests::kubernetes::{ApiServer, Kube};
use serde_json::json;

use super::{NAMESPACE, NETWORK, PORT, pod, service, slice};
use crate::Bench;
use crate::cni::ground::network;
use crate::idle::field;
use crate::report::{Bar, Figure, Row};

const PATIENCE: Duration = Duration::from_secs(300);
/// Endpoints of each Service.
const ENDPOINTS: usize = 10;
/// Pods on each node.
const PODS: usize = 100;
/// The range of pods is 10.60.0.0/14, that of Services 10.96.0.0/16.
const SUBNET: &str = "10.60.0.0/14";
/// Every so many Services one is looked for in the kernel.
const EVERY: usize = 50;

pub(crate) fn measure(bench: &Bench) -> Result<Figure> {
    let services = bench.plan.kube_services;
    let pods = services * 2;
    let nodes = pods.div_ceil(PODS);
    let lab = bench.lab(1)?;
    lab.start_all()?;
    let host = lab.hosts().first().context("no host")?;
    network(&lab, NETWORK, &["--subnet", SUBNET])?;
    let mut api = ApiServer::new();
    api.set_page(500);
    api.put(&json!({ "kind": "Namespace", "metadata": { "name": NAMESPACE } }));
    let node = |number: usize| format!("h{}", number / PODS + 1);
    for number in 0..nodes {
        api.put(&json!({ "kind": "Node", "metadata": { "name": format!("h{}", number + 1) } }));
    }
    for number in 0..pods {
        api.put(&pod(&node(number), &format!("p{number}"), &format!("app{}", number % services)));
    }
    for number in 0..services {
        let endpoints = (0..ENDPOINTS).map(|n| (number * ENDPOINTS + n) % pods);
        let endpoints: Vec<_> =
            endpoints.map(|pod| Ok((pod_address(pod)?, node(pod), true))).collect::<Result<_>>()?;
        api.put(&service(&format!("s{number}"), service_address(number)?));
        api.put(&slice(&format!("s{number}"), &endpoints));
    }
    let probes: Vec<IpAddr> = (0..services)
        .filter(|n| n % EVERY == 0 || n + 1 == services)
        .map(service_address)
        .collect::<Result<_>>()?;

    let start = Instant::now();
    let kube = Kube::start_program(&bench.ovl_kube()?, &mut api, host, &[])?;
    wait_until(PATIENCE, "all Services in the kernel", || in_force(host, &probes))?;
    let mirrored = start.elapsed().as_secs_f64();
    wait_until(PATIENCE, "a state without a difference", || host.ctl_ok(&["verify"]).map(drop))?;
    let ovld = host.rss_kib()? as f64 / 1024.0;
    let status = PathBuf::from(format!("/proc/{}/status", kube.pid()));
    let ovl_kube = field(&status, "VmRSS:")? / 1024.0;

    // A host that boots without an API server has all of it.
    api.set_away(true);
    host.kill9()?;
    host.exec_ok(["nft", "flush", "ruleset"])?;
    let start = Instant::now();
    host.start()?;
    wait_until(PATIENCE, "all Services in the kernel", || in_force(host, &probes))?;
    let restarted = start.elapsed().as_secs_f64();

    Ok(Figure {
        setup: format!(
            "one host, an API server of the tests with {services} Services, {} endpoints in as many slices, and {pods} pods of \
             {nodes} nodes, of which one is real; {} of the Services are looked for in the kernel",
            services * ENDPOINTS,
            probes.len()
        ),
        rows: vec![
            Row::with_bar("resident memory of ovld", ovld, "MiB", Bar::AtMost(128.0)),
            Row::with_bar("resident memory of ovl-kube", ovl_kube, "MiB", Bar::AtMost(64.0)),
            Row::with_bar("start of ovl-kube until all is in force", mirrored, "s", Bar::AtMost(10.0)),
            Row::with_bar(
                "start of ovld without an API server, with an empty kernel, until all is in force",
                restarted,
                "s",
                Bar::AtMost(10.0),
            ),
        ],
        notes: Vec::new(),
        details: json!({}),
    })
}

/// Checks that the kernel has the Services at these addresses.
fn in_force(host: &Host, addresses: &[IpAddr]) -> Result<()> {
    let elements: Vec<String> = addresses.iter().map(|address| format!("{address} . tcp . {PORT}")).collect();
    let elements = format!("{{ {} }}", elements.join(", "));
    let found = host.exec(["nft", "get", "element", "inet", "ovl-services", "inside4", &elements])?;
    ensure!(found.status.success(), "not all of them are there");
    Ok(())
}

fn pod_address(number: usize) -> Result<IpAddr> {
    address(Ipv4Addr::new(10, 61, 0, 0), number + 1)
}

fn service_address(number: usize) -> Result<IpAddr> {
    address(Ipv4Addr::new(10, 96, 4, 0), number)
}

fn address(first: Ipv4Addr, offset: usize) -> Result<IpAddr> {
    Ok(Ipv4Addr::from(u32::from(first) + u32::try_from(offset)?).into())
}
