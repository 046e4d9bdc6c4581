//! Services from outside and at external addresses: externalIPs, traffic policies, and SCTP.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use netns_lab::{Host, Lab, LabConfig, Netns, Underlay, wait_until};
use ovl_tests::ports::outsider;
use ovl_tests::routed::{create_network_of_mode, create_routed_network};
use ovl_tests::service::{Connection, NamedServer, UdpClient, apply, ask, wait_answers};
use ovl_tests::{
    Attached, SOON, attach, create_network, sctp, start_lab, start_lab_with, strings, text, wait_clean,
};

const SUBNETS: [&str; 4] = ["--subnet", "10.60.0.0/16", "--subnet", "fd60::/64"];
/// An address that no host has; clients need a route to it.
const EXTERNAL: &str = "203.0.113.7";
const RANGES: &str = "external_ranges = ['203.0.113.0/24']";

/// A Service of this name for pods with the label, with these additional fields in its spec.
fn service(name: &str, label: &str, more: &str) -> String {
    format!(
        "{{\"apiVersion\":\"v1\",\"kind\":\"Service\",\"metadata\":{{\"name\":\"{name}\"}},\"spec\":{{
            \"selector\":{{\"app\":\"{label}\"}},\"ports\":[{{\"port\":80,\"targetPort\":8080}}]{more}}}}}"
    )
}

fn backend(host: &Host, name: &str, label: &str) -> Result<(Attached, NamedServer)> {
    let at = attach(host, name, "blue", &["--label", &format!("app={label}")])?;
    let server = NamedServer::start(&at.workload, name, 8080)?;
    Ok((at, server))
}

/// A machine outside the cluster, with a route to the external address through one of the hosts.
fn outside(lab: &Lab, by: &Host) -> Result<Netns> {
    let outside = outsider(lab)?;
    outside.exec_ok(["ip", "route", "add", EXTERNAL, "via", &by.address()?.to_string()])?;
    Ok(outside)
}

fn cluster_address(host: &Host, name: &str) -> Result<IpAddr> {
    Ok(text(&host.ctl_json(&["get", "svc", name])?["spec"]["clusterIP"]).parse()?)
}

#[test]
fn external_address_leads_to_the_backends() -> Result<()> {
    let lab = start_lab_with(LabConfig::hosts(2).config(RANGES))?;
    let [h1, h2] = lab.hosts() else { unreachable!() };
    create_routed_network(&lab, "blue", &SUBNETS)?;
    let external = format!(",\"externalIPs\":[\"{EXTERNAL}\"]");
    apply(&lab, h1, &service("web", "web", &external))?;
    let (_one, _first) = backend(h1, "one", "web")?;
    let (_two, _second) = backend(h2, "two", "web")?;
    let client = attach(h2, "client", "blue", &[])?;
    let outside = outside(&lab, h1)?;
    let at = SocketAddr::new(EXTERNAL.parse()?, 80);
    for from in [&outside, &*client.workload] {
        wait_answers(from, at, &["one", "two"])?;
    }
    // The source address is kept for a backend on the host that the packet reaches. Otherwise the reply would take
    // another path.
    let source: IpAddr = "192.168.77.250".parse()?;
    for _ in 0..12 {
        let answer = ask(&outside, at)?;
        ensure!((answer.seen == source) == (answer.name == "one"), "{answer:?}");
    }
    // With externalTrafficPolicy Local, that host uses only its own backends, and endpoints still reach all.
    apply(&lab, h2, &service("web", "web", &(external + ",\"externalTrafficPolicy\":\"Local\"")))?;
    wait_answers(&outside, at, &["one"])?;
    ensure!(ask(&outside, at)?.seen == source);
    wait_answers(&client.workload, at, &["one", "two"])?;
    wait_clean(lab.hosts(), SOON)
}

#[test]
fn external_port_conflict_is_won_by_the_older_service() -> Result<()> {
    let lab = start_lab_with(LabConfig::hosts(2).config(RANGES))?;
    let [h1, h2] = lab.hosts() else { unreachable!() };
    create_routed_network(&lab, "blue", &SUBNETS)?;
    let external = format!(",\"externalIPs\":[\"{EXTERNAL}\"]");
    // By name the younger one would come first.
    apply(&lab, h1, &service("older", "old", &external))?;
    apply(&lab, h1, &service("b-younger", "young", &external))?;
    let (_old, _first) = backend(h1, "old", "old")?;
    let (_young, _second) = backend(h2, "young", "young")?;
    let outside = outside(&lab, h2)?;
    let at = SocketAddr::new(EXTERNAL.parse()?, 80);
    wait_answers(&outside, at, &["old"])?;
    for host in lab.hosts() {
        let described = host.ctl_ok(&["describe", "svc", "b-younger"])?;
        let note = format!("external address {EXTERNAL} port 80/TCP is that of Service default/older");
        ensure!(described.contains(&note), "{described}");
        ensure!(!host.ctl_ok(&["describe", "svc", "older"])?.contains("Note:"));
    }
    // The younger Service is reachable at its cluster IP, and at the external address once the older one is deleted.
    let client = attach(h1, "client", "blue", &[])?;
    wait_answers(&client.workload, SocketAddr::new(cluster_address(h1, "b-younger")?, 80), &["young"])?;
    h2.ctl_ok(&["delete", "svc", "older"])?;
    wait_answers(&outside, at, &["young"])?;
    let notes = h1.ctl_json(&["get", "endpoints", "b-younger"])?;
    ensure!(strings(&notes["notes"]).is_empty(), "{notes}");
    // A Service cannot claim the cluster IP of another one.
    let own = cluster_address(h1, "b-younger")?;
    let claimant = service("a-claimant", "old", &format!(",\"externalIPs\":[\"{own}\"]"));
    let refused = apply(&lab, h1, &claimant).err().context("the claim is refused")?;
    ensure!(format!("{refused:#}").contains("external_ranges"), "{refused:#}");
    wait_answers(&client.workload, SocketAddr::new(own, 80), &["young"])?;
    wait_clean(lab.hosts(), SOON)
}

#[test]
fn internal_traffic_policy_local_uses_only_local_backends() -> Result<()> {
    for mode in ["l2", "l3"] {
        let lab = start_lab(3)?;
        let [h1, h2, h3] = lab.hosts() else { unreachable!() };
        create_network_of_mode(&lab, mode, "blue", &SUBNETS)?;
        apply(&lab, h1, &service("web", "web", ",\"internalTrafficPolicy\":\"Local\""))?;
        let at = SocketAddr::new(cluster_address(h1, "web")?, 80);
        let (_one, _first) = backend(h1, "one", "web")?;
        let (_two, _second) = backend(h2, "two", "web")?;
        for (host, name) in [(h1, "one"), (h2, "two")] {
            let client = attach(host, &format!("client-{name}"), "blue", &[])?;
            wait_answers(&client.workload, at, &[name]).with_context(|| mode.to_owned())?;
        }
        let without = attach(h3, "client-none", "blue", &[])?;
        wait_until(SOON, "a refusal on the host without backends", || {
            match Connection::open(&without.workload, at)? {
                Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => Ok(()),
                other => anyhow::bail!("{mode}: {other:?}"),
            }
        })?;
    }
    Ok(())
}

#[test]
fn sctp_is_translated_in_both_directions() -> Result<()> {
    for mode in ["l2", "l3"] {
        let lab = start_lab(2)?;
        let [h1, h2] = lab.hosts() else { unreachable!() };
        create_network_of_mode(&lab, mode, "blue", &SUBNETS)?;
        let manifest = service("web", "web", ",\"ipFamilyPolicy\":\"PreferDualStack\"")
            .replace("\"targetPort\":8080", "\"targetPort\":9000,\"protocol\":\"SCTP\"");
        apply(&lab, h1, &manifest)?;
        let found = h1.ctl_json(&["get", "svc", "web"])?;
        let services = strings(&found["spec"]["clusterIPs"])
            .iter()
            .map(|address| Ok(SocketAddr::new(address.parse()?, 80)))
            .collect::<Result<Vec<_>>>()?;
        ensure!(services.len() == 2, "{services:?}");
        let client = attach(h1, "client", "blue", &[])?;
        for host in [h1, h2] {
            let name = format!("at-{}", host.name());
            let at = attach(host, &name, "blue", &["--label", "app=web"])?;
            let _server = sctp::Server::start(&at.workload, &[9000])?;
            wait_until(SOON, &format!("{mode}: an answer of {name}"), || {
                let answered = sctp::probe(&client.workload, &services, Duration::from_secs(1))?;
                ensure!(answered == services.iter().map(|at| (*at, *at)).collect(), "{answered:?}");
                Ok(())
            })?;
            host.ctl_ok(&["detach", &name])?;
        }
    }
    Ok(())
}

#[test]
fn remote_backends_of_switched_networks_are_reachable_from_outside() -> Result<()> {
    let lab = start_lab_with(LabConfig::hosts(3).config(RANGES))?;
    let [h1, h2, h3] = lab.hosts() else { unreachable!() };
    create_network(&lab, "blue", &SUBNETS)?;
    let kind = format!(",\"type\":\"NodePort\",\"externalIPs\":[\"{EXTERNAL}\"]");
    let manifest =
        service("web", "web", &kind).replace("\"targetPort\"", "\"nodePort\":30080,\"targetPort\"");
    apply(&lab, h1, &manifest)?;
    let (_one, _first) = backend(h1, "one", "web")?;
    let (_two, _second) = backend(h2, "two", "web")?;
    let (_three, _third) = backend(h2, "three", "web")?;
    // Through a host that has nothing of the network, and through hosts with some of the backends.
    let outside = outside(&lab, h3)?;
    let source: IpAddr = "192.168.77.250".parse()?;
    let external = SocketAddr::new(EXTERNAL.parse()?, 80);
    let mut all = vec![external];
    for host in lab.hosts() {
        all.push(SocketAddr::new(host.address()?, 30080));
    }
    for to in &all {
        wait_answers(&outside, *to, &["one", "three", "two"]).with_context(|| format!("at {to}"))?;
    }
    // The source address is kept for a backend on the host that the packet reaches.
    let by_first = SocketAddr::new(h1.address()?, 30080);
    for _ in 0..12 {
        let answer = ask(&outside, by_first)?;
        ensure!((answer.seen == source) == (answer.name == "one"), "{answer:?}");
    }
    // Connections are balanced equally, on every path.
    let mut counts: BTreeMap<String, f64> = BTreeMap::new();
    const ASKED: u16 = 300;
    for _ in 0..ASKED {
        *counts.entry(ask(&outside, external)?.name).or_default() += 1.0;
    }
    let expected = f64::from(ASKED) / 3.0;
    let chi2: f64 = counts.values().map(|count| (count - expected).powi(2) / expected).sum();
    // Chi-square with two degrees of freedom: a balanced run exceeds this once in a million.
    ensure!(counts.len() == 3 && chi2 < 27.6, "{counts:?}: chi square {chi2}");
    // Programs on the hosts themselves reach the Service too, also at its cluster IP.
    let own = SocketAddr::new(cluster_address(h1, "web")?, 80);
    h3.exec_ok(["ip", "route", "add", "default", "via", &h1.address()?.to_string()])?;
    for (from, to) in [(h3, own), (h3, SocketAddr::new(h3.address()?, 30080))] {
        wait_answers(from, to, &["one", "three", "two"])
            .with_context(|| format!("{to} from {}", from.name()))?;
    }
    // An unready backend gets no new connections, and the loss of a host leaves the others.
    h2.ctl_ok(&["endpoint", "unready", "two"])?;
    wait_answers(&outside, external, &["one", "three"])?;
    wait_clean(lab.hosts(), SOON)?;
    h2.destroy()?;
    wait_answers(&outside, external, &["one"])?;
    wait_clean(lab.hosts(), SOON)
}

/// An EndpointSlice of the Service `web` with these endpoints.
fn slice(family: &str, endpoints: &str, port: u16) -> String {
    format!(
        "---\n{{\"apiVersion\":\"discovery.k8s.io/v1\",\"kind\":\"EndpointSlice\",\"addressType\":\"{family}\",
            \"metadata\":{{\"name\":\"web-{}\",\"labels\":{{\"kubernetes.io/service-name\":\"web\"}}}},
            \"endpoints\":[{endpoints}],\"ports\":[{{\"port\":{port}}}]}}\n",
        family.to_lowercase()
    )
}

/// A pod with `hostNetwork` on another host and a database outside of the cluster would answer to the client by a path of
/// their own. So the host that translates puts its own address in place of the client's.
#[test]
fn backends_that_are_no_endpoints_are_reachable_from_outside() -> Result<()> {
    let lab = start_lab_with(LabConfig::hosts(3).underlay(Underlay::Dual).config(RANGES))?;
    let [h1, h2, h3] = lab.hosts() else { unreachable!() };
    let _on_host = NamedServer::start(h2, "on-host", 8083)?;
    let _here = NamedServer::start(h1, "here", 8083)?;
    let kind = format!(
        ",\"type\":\"NodePort\",\"ipFamilyPolicy\":\"PreferDualStack\",\"externalIPs\":[\"{EXTERNAL}\"]"
    );
    let mut manifest = service("web", "", &kind)
        .replace("\"selector\":{\"app\":\"\"},", "")
        .replace("\"targetPort\"", "\"nodePort\":30302,\"targetPort\"");
    manifest.push('\n');
    for (n, family) in ["IPv4", "IPv6"].into_iter().enumerate() {
        let on = [h1, h2].map(|host| {
            let address = host.addresses().into_iter().nth(n).map(|address| address.to_string());
            format!(
                "{{\"addresses\":[\"{}\"],\"nodeName\":\"{}\"}}",
                address.unwrap_or_default(),
                host.name()
            )
        });
        manifest += &slice(family, &on.join(","), 8083);
    }
    apply(&lab, h1, &manifest)?;
    let outside = outside(&lab, h1)?;
    let sources: [IpAddr; 2] = ["192.168.77.250".parse()?, "fd77::fa".parse()?];
    let mut all = vec![SocketAddr::new(EXTERNAL.parse()?, 80)];
    all.extend(h1.addresses().into_iter().map(|address| SocketAddr::new(address, 30302)));
    for at in all {
        wait_answers(&outside, at, &["here", "on-host"]).with_context(|| format!("at {at}"))?;
        // The address of a client is kept for what is on this host.
        for _ in 0..12 {
            let answer = ask(&outside, at)?;
            let of_family = |address: &&IpAddr| address.is_ipv4() == at.is_ipv4();
            let own = h1.addresses();
            let seen = if answer.name == "here" {
                sources.iter().find(of_family)
            } else {
                own.iter().find(of_family)
            };
            ensure!(Some(&answer.seen) == seen, "{at}: {answer:?}");
        }
    }
    // The host's own programs, and those of a host without a backend.
    for (from, by) in [(h1, h1), (h3, h3), (h3, h1)] {
        for address in by.addresses() {
            wait_answers(from, SocketAddr::new(address, 30302), &["here", "on-host"])
                .with_context(|| format!("{} by {address}", from.name()))?;
        }
    }
    // No host has the address of a database outside of the cluster.
    let _database = NamedServer::start(&outside, "database", 5432)?;
    apply(&lab, h1, &slice("IPv4", "{\"addresses\":[\"192.168.77.250\"]}", 5432))?;
    apply(&lab, h1, &slice("IPv6", "{\"addresses\":[\"fd77::fa\"]}", 5432))?;
    for by in [h1, h2] {
        for address in by.addresses() {
            wait_answers(h3, SocketAddr::new(address, 30302), &["database"])?;
        }
    }
    wait_clean(lab.hosts(), SOON)
}

#[test]
fn services_at_one_external_address_keep_their_own_affinity() -> Result<()> {
    let lab =
        start_lab_with(LabConfig::hosts(1).config("external_ranges = ['203.0.113.0/24', 'fd99::/64']"))?;
    let [h1] = lab.hosts() else { unreachable!() };
    create_routed_network(&lab, "blue", &SUBNETS)?;
    let more = format!(
        ",\"externalIPs\":[\"{EXTERNAL}\",\"fd99::7\"],\"sessionAffinity\":\"ClientIP\",\"ipFamilyPolicy\":\"PreferDualStack\""
    );
    let mut servers = Vec::new();
    // The last two differ by their protocols alone.
    for (name, port, protocol) in
        [("one", 80, "TCP"), ("two", 81, "TCP"), ("three", 82, "TCP"), ("four", 82, "UDP")]
    {
        let text = service(name, name, &more);
        let text = text.replace("\"port\":80", &format!("\"port\":{port},\"protocol\":\"{protocol}\""));
        apply(&lab, h1, &text)?;
        for n in 0..3 {
            servers.push(backend(h1, &format!("{name}-{n}"), name)?);
        }
    }
    let client = attach(h1, "client", "blue", &[])?;
    for address in [EXTERNAL, "fd99::7"] {
        let mut seen: BTreeMap<&str, BTreeSet<String>> = BTreeMap::new();
        for round in 0..12 {
            for (name, port) in [("one", 80), ("two", 81), ("three", 82), ("four", 82)] {
                let to = SocketAddr::new(address.parse()?, port);
                let ask = || -> Result<String> {
                    match name {
                        "four" => Ok(UdpClient::open(&client.workload, to)?.ask()?.name),
                        _ => Ok(ask(&client.workload, to)?.name),
                    }
                };
                let found =
                    if round == 0 { wait_until(SOON, "an answer", || ask().map(Some))? } else { ask()? };
                seen.entry(name).or_default().insert(found);
            }
        }
        ensure!(seen.len() == 4 && seen.values().all(|backends| backends.len() == 1), "{address}: {seen:?}");
    }
    wait_clean(lab.hosts(), SOON)
}
