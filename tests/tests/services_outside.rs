//! Services at addresses of others and from outside: externalIPs, traffic policies, and SCTP.

use std::collections::BTreeMap;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use netns_lab::{Host, Lab, Netns, wait_until};
use ovl_tests::ports::outsider;
use ovl_tests::routed::make_routed;
use ovl_tests::service::{Connection, Named, apply, ask, wait_answers};
use ovl_tests::{Attached, SOON, attach, make_network, sctp, started, strings, text, wait_clean};

const SUBNETS: [&str; 4] = ["--subnet", "10.60.0.0/16", "--subnet", "fd60::/64"];
/// Of nobody: others have to have a route to it.
const EXTERNAL: &str = "203.0.113.7";

/// A Service of that name for pods with the label, with this much more in its specification.
fn service(name: &str, label: &str, more: &str) -> String {
    format!(
        "{{\"apiVersion\":\"v1\",\"kind\":\"Service\",\"metadata\":{{\"name\":\"{name}\"}},\"spec\":{{
            \"selector\":{{\"app\":\"{label}\"}},\"ports\":[{{\"port\":80,\"targetPort\":8080}}]{more}}}}}"
    )
}

fn backend(host: &Host, name: &str, label: &str) -> Result<(Attached, Named)> {
    let at = attach(host, name, "blue", &["--label", &format!("app={label}")])?;
    let server = Named::start(&at.workload, name, 8080)?;
    Ok((at, server))
}

/// A machine outside that reaches an external address by one of the hosts.
fn outside(lab: &Lab, by: &Host) -> Result<Netns> {
    let outside = outsider(lab)?;
    outside.exec_ok(["ip", "route", "add", EXTERNAL, "via", &by.address()?.to_string()])?;
    Ok(outside)
}

fn cluster_address(host: &Host, name: &str) -> Result<IpAddr> {
    Ok(text(&host.ctl_json(&["get", "svc", name])?["spec"]["clusterIP"]).parse()?)
}

#[test]
fn an_external_address_leads_to_the_backends() -> Result<()> {
    let lab = started(2)?;
    let [h1, h2] = lab.hosts() else { unreachable!() };
    make_routed(&lab, "blue", &SUBNETS)?;
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
    // Kept where the backend is on the host that it comes to; from another one the answer would go another way.
    let source: IpAddr = "192.168.77.250".parse()?;
    for _ in 0..12 {
        let answer = ask(&outside, at)?;
        ensure!((answer.seen == source) == (answer.name == "one"), "{answer:?}");
    }
    // With the policy Local the host that it comes to has its own alone, and endpoints have all.
    apply(&lab, h2, &service("web", "web", &(external + ",\"externalTrafficPolicy\":\"Local\"")))?;
    wait_answers(&outside, at, &["one"])?;
    ensure!(ask(&outside, at)?.seen == source);
    wait_answers(&client.workload, at, &["one", "two"])?;
    wait_clean(lab.hosts(), SOON)
}

#[test]
fn of_two_services_with_one_external_port_the_older_has_it() -> Result<()> {
    let lab = started(2)?;
    let [h1, h2] = lab.hosts() else { unreachable!() };
    make_routed(&lab, "blue", &SUBNETS)?;
    let external = format!(",\"externalIPs\":[\"{EXTERNAL}\"]");
    // By its name the younger one would be first.
    apply(&lab, h1, &service("older", "old", &external))?;
    apply(&lab, h1, &service("b-younger", "young", &external))?;
    let (_old, _first) = backend(h1, "old", "old")?;
    let (_young, _second) = backend(h2, "young", "young")?;
    let outside = outside(&lab, h2)?;
    let at = SocketAddr::new(EXTERNAL.parse()?, 80);
    wait_answers(&outside, at, &["old"])?;
    for host in lab.hosts() {
        let said = host.ctl_ok(&["describe", "svc", "b-younger"])?;
        let note = format!("external address {EXTERNAL} port 80/TCP is that of Service default/older");
        ensure!(said.contains(&note), "{said}");
        ensure!(!host.ctl_ok(&["describe", "svc", "older"])?.contains("Note:"));
    }
    // At its own address it is reached all the same, and at the external one when the other is gone.
    let client = attach(h1, "client", "blue", &[])?;
    wait_answers(&client.workload, SocketAddr::new(cluster_address(h1, "b-younger")?, 80), &["young"])?;
    h2.ctl_ok(&["delete", "svc", "older"])?;
    wait_answers(&outside, at, &["young"])?;
    let notes = h1.ctl_json(&["get", "endpoints", "b-younger"])?;
    ensure!(strings(&notes["notes"]).is_empty(), "{notes}");
    // Nobody takes another Service's own address away by naming it.
    let own = cluster_address(h1, "b-younger")?;
    apply(&lab, h1, &service("a-thief", "old", &format!(",\"externalIPs\":[\"{own}\"]")))?;
    wait_until(SOON, "the claim to be refused", || {
        let said = h1.ctl_ok(&["describe", "svc", "a-thief"])?;
        ensure!(said.contains("is that of Service default/b-younger"), "{said}");
        Ok(())
    })?;
    wait_answers(&client.workload, SocketAddr::new(own, 80), &["young"])?;
    wait_clean(lab.hosts(), SOON)
}

#[test]
fn inside_the_policy_local_leads_to_the_hosts_own_backends() -> Result<()> {
    for mode in ["l2", "l3"] {
        let lab = started(3)?;
        let [h1, h2, h3] = lab.hosts() else { unreachable!() };
        match mode {
            "l2" => make_network(&lab, "blue", &SUBNETS)?,
            _ => make_routed(&lab, "blue", &SUBNETS)?,
        }
        apply(&lab, h1, &service("web", "web", ",\"internalTrafficPolicy\":\"Local\""))?;
        let at = SocketAddr::new(cluster_address(h1, "web")?, 80);
        let (_one, _first) = backend(h1, "one", "web")?;
        let (_two, _second) = backend(h2, "two", "web")?;
        for (host, name) in [(h1, "one"), (h2, "two")] {
            let client = attach(host, &format!("client-{name}"), "blue", &[])?;
            wait_answers(&client.workload, at, &[name]).with_context(|| mode.to_owned())?;
        }
        let without = attach(h3, "client-none", "blue", &[])?;
        wait_until(SOON, "a refusal where there is none", || {
            match Connection::open(&without.workload, at)? {
                Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => Ok(()),
                other => anyhow::bail!("{mode}: {other:?}"),
            }
        })?;
    }
    Ok(())
}

#[test]
fn sctp_is_translated_there_and_back() -> Result<()> {
    for mode in ["l2", "l3"] {
        let lab = started(2)?;
        let [h1, h2] = lab.hosts() else { unreachable!() };
        match mode {
            "l2" => make_network(&lab, "blue", &SUBNETS)?,
            _ => make_routed(&lab, "blue", &SUBNETS)?,
        }
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
            wait_until(SOON, &format!("{mode}: answers of {name}"), || {
                let answered = sctp::ask(&client.workload, &services, Duration::from_secs(1))?;
                ensure!(answered == services.iter().map(|at| (*at, *at)).collect(), "{answered:?}");
                Ok(())
            })?;
            host.ctl_ok(&["detach", &name])?;
        }
    }
    Ok(())
}

#[test]
fn backends_of_switched_networks_on_other_hosts_are_reached_from_outside() -> Result<()> {
    let lab = started(3)?;
    let [h1, h2, h3] = lab.hosts() else { unreachable!() };
    make_network(&lab, "blue", &SUBNETS)?;
    let kind = format!(",\"type\":\"NodePort\",\"externalIPs\":[\"{EXTERNAL}\"]");
    let manifest =
        service("web", "web", &kind).replace("\"targetPort\"", "\"nodePort\":30080,\"targetPort\"");
    apply(&lab, h1, &manifest)?;
    let (_one, _first) = backend(h1, "one", "web")?;
    let (_two, _second) = backend(h2, "two", "web")?;
    let (_three, _third) = backend(h2, "three", "web")?;
    // By a host that has nothing of the network, and by those that have some of the backends.
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
    // Sources are kept where the backend is on the host that it comes to.
    let by_first = SocketAddr::new(h1.address()?, 30080);
    for _ in 0..12 {
        let answer = ask(&outside, by_first)?;
        ensure!((answer.seen == source) == (answer.name == "one"), "{answer:?}");
    }
    // Each backend has its part, whichever way leads to it.
    let mut counts: BTreeMap<String, f64> = BTreeMap::new();
    const ASKED: u16 = 300;
    for _ in 0..ASKED {
        *counts.entry(ask(&outside, external)?.name).or_default() += 1.0;
    }
    let expected = f64::from(ASKED) / 3.0;
    let chi2: f64 = counts.values().map(|count| (count - expected).powi(2) / expected).sum();
    // Two degrees of freedom: one run in a million is beyond.
    ensure!(counts.len() == 3 && chi2 < 27.6, "{counts:?}: chi square {chi2}");
    // So do programs of the hosts themselves, at the Service's own address too.
    let own = SocketAddr::new(cluster_address(h1, "web")?, 80);
    h3.exec_ok(["ip", "route", "add", "default", "via", &h1.address()?.to_string()])?;
    for (from, to) in [(h3, own), (h3, SocketAddr::new(h3.address()?, 30080))] {
        wait_answers(from, to, &["one", "three", "two"])
            .with_context(|| format!("{to} from {}", from.name()))?;
    }
    // What goes is not asked any more, and nobody is left out when a host is lost.
    h2.ctl_ok(&["endpoint", "unready", "two"])?;
    wait_answers(&outside, external, &["one", "three"])?;
    wait_clean(lab.hosts(), SOON)?;
    h2.destroy()?;
    wait_answers(&outside, external, &["one"])?;
    wait_clean(lab.hosts(), SOON)
}
