//! Addresses of LoadBalancers: one host answers for each on the underlay, another takes it over, and those who check
//! hosts' health are told the truth.

use std::collections::BTreeSet;
use std::io::{Read as _, Write as _};
use std::net::{IpAddr, SocketAddr, TcpStream};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use netns_lab::{Host, Lab, LabConfig, Netns, Underlay, wait_until};
use ovl_tests::ports::outsider;
use ovl_tests::routed::make_routed;
use ovl_tests::service::{Connection, Named, apply, ask, wait_answers};
use ovl_tests::{Attached, SOON, attach, make_network, started_with, strings, text, wait_clean};
use serde_json::Value;

const POOL: &str = "load_balancer_pool = [\"192.168.77.224/29\", \"fd77::e0/124\"]";
const SUBNETS: [&str; 4] = ["--subnet", "10.60.0.0/16", "--subnet", "fd60::/64"];

fn lab(hosts: usize) -> Result<Lab> {
    started_with(LabConfig::hosts(hosts).underlay(Underlay::Dual).config(POOL))
}

/// A Service `web` of that kind, with this much more in its specification.
fn web(more: &str) -> String {
    format!(
        "{{\"apiVersion\":\"v1\",\"kind\":\"Service\",\"metadata\":{{\"name\":\"web\"}},\"spec\":{{
            \"type\":\"LoadBalancer\",\"selector\":{{\"app\":\"web\"}},\"ipFamilyPolicy\":\"PreferDualStack\",
            \"ports\":[{{\"port\":80,\"targetPort\":8080}}]{more}}}}}"
    )
}

fn backend(host: &Host, name: &str) -> Result<(Attached, Named)> {
    let at = attach(host, name, "blue", &["--label", "app=web"])?;
    let server = Named::start(&at.workload, name, 8080)?;
    Ok((at, server))
}

/// What the cluster gave the Service, as a host says it.
fn ingress(host: &Host) -> Result<Vec<IpAddr>> {
    let found = host.ctl_json(&["get", "svc", "web"])?;
    let all =
        found.pointer("/status/loadBalancer/ingress").and_then(Value::as_array).context("no ingress")?;
    Ok(all.iter().map(|each| text(&each["ip"]).parse()).collect::<Result<_, _>>()?)
}

/// Hosts whose kernel answers for an address.
fn holders(lab: &Lab, address: IpAddr) -> Result<Vec<String>> {
    let mut all = Vec::new();
    for host in lab.hosts().iter().filter(|host| host.is_present()) {
        let shown = host.ip_json(&["addr", "show", "dev", "eth0"])?;
        let addresses = shown[0]["addr_info"].as_array().context("no addresses")?;
        if addresses.iter().any(|each| text(&each["local"]) == address.to_string()) {
            all.push(host.name().to_owned());
        }
    }
    Ok(all)
}

/// The one host that answers for an address, once there is one, it is among these, and all hosts say so.
fn wait_announced(lab: &Lab, address: IpAddr, among: &[&str]) -> Result<String> {
    wait_until(SOON, &format!("one of {among:?} to announce {address}"), || {
        let holders = holders(lab, address)?;
        let [holder] = holders.as_slice() else { anyhow::bail!("announced by {holders:?}") };
        ensure!(among.contains(&holder.as_str()), "announced by {holder}");
        for host in lab.hosts().iter().filter(|host| host.is_running()) {
            let said = host.ctl_json(&["get", "endpoints", "web"])?;
            let said = said["announced"].as_array().context("nothing is said")?.iter();
            let said = said.filter(|each| text(&each["address"]) == address.to_string());
            let nodes: Vec<String> = said.flat_map(|each| strings(&each["nodes"])).collect();
            ensure!(nodes == holders, "{} says {nodes:?} and not {holders:?}", host.name());
        }
        Ok(Some(holder.clone()))
    })
}

/// What a host says at a port for health checks: the status, and the number of endpoints.
fn health(from: &Netns, at: SocketAddr) -> Result<(u16, u64)> {
    let answer = from.run(|| -> Result<String> {
        let mut stream = TcpStream::connect_timeout(&at, Duration::from_secs(2))?;
        stream.set_read_timeout(Some(Duration::from_secs(2)))?;
        stream.write_all(b"GET / HTTP/1.1\r\nHost: here\r\n\r\n")?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer)?;
        Ok(answer)
    })??;
    let (head, body) = answer.split_once("\r\n\r\n").context("no answer")?;
    let status = head.split(' ').nth(1).context("no status")?.parse()?;
    let body: Value = serde_json::from_str(body)?;
    ensure!(body["service"]["name"] == "web" && body["service"]["namespace"] == "default", "{body}");
    Ok((status, body["localEndpoints"].as_u64().context("no number")?))
}

#[test]
fn an_address_is_announced_by_one_host_and_taken_over() -> Result<()> {
    let lab = lab(4)?;
    let [h1, h2, h3, _] = lab.hosts() else { unreachable!() };
    make_routed(&lab, "blue", &SUBNETS)?;
    apply(&lab, h1, &web(""))?;
    let (_one, _first) = backend(h1, "one")?;
    let (_two, _second) = backend(h2, "two")?;
    let client = outsider(&lab)?;
    let addresses = ingress(h3)?;
    ensure!(addresses.len() == 2, "{addresses:?}");
    let shown = h3.ctl_ok(&["get", "svc", "web"])?;
    ensure!(addresses.iter().all(|address| shown.contains(&address.to_string())), "{shown}");
    for address in &addresses {
        let holder = wait_announced(&lab, *address, &["h1", "h2", "h3", "h4"])?;
        let described = h2.ctl_ok(&["describe", "svc", "web"])?;
        ensure!(described.contains(&format!("{address} by {holder}")), "{described}");
        wait_answers(&client, SocketAddr::new(*address, 80), &["one", "two"])?;
    }
    wait_clean(lab.hosts(), SOON)?;

    // The host that has it goes, and with it its neighbours' entry for the address is wrong.
    let to = addresses[0];
    let lost = wait_announced(&lab, to, &["h1", "h2", "h3", "h4"])?;
    let left: Vec<&str> = ["h1", "h2", "h3", "h4"].into_iter().filter(|name| *name != lost).collect();
    let host = lab.host(&lost)?;
    let answering: &[&str] = match lost.as_str() {
        "h1" => &["two"],
        "h2" => &["one"],
        _ => &["one", "two"],
    };
    host.destroy()?;
    wait_answers(&client, SocketAddr::new(to, 80), answering)?;
    wait_announced(&lab, to, &left)?;

    // It comes back and has it again.
    host.restore()?;
    lab.start_all()?;
    wait_announced(&lab, to, &[&lost])?;
    wait_until(SOON, "an answer", || ask(&client, SocketAddr::new(to, 80)).map(drop))?;

    // A host that leaves lets go at once, and nothing is left of a Service that is deleted.
    host.ctl_ok(&["leave"])?;
    wait_announced(&lab, to, &left)?;
    let alive = lab.host(left[0])?;
    alive.ctl_ok(&["delete", "svc", "web"])?;
    wait_until(SOON, "nobody to announce it", || {
        let holders = holders(&lab, to)?;
        ensure!(holders.is_empty(), "{holders:?}");
        Ok(())
    })
}

#[test]
fn connections_live_while_the_announcing_hosts_daemon_is_away() -> Result<()> {
    let lab = lab(3)?;
    let names = ["h1", "h2", "h3"];
    make_routed(&lab, "blue", &SUBNETS)?;
    apply(&lab, &lab.hosts()[0], &web(""))?;
    let (_one, _first) = backend(&lab.hosts()[0], "one")?;
    let client = outsider(&lab)?;
    let to = ingress(&lab.hosts()[0])?[0];
    let holder = wait_announced(&lab, to, &names)?;
    let at = SocketAddr::new(to, 80);
    wait_answers(&client, at, &["one"])?;
    let mut open = Connection::open(&client, at)??;
    open.hear()?;
    let host = lab.host(&holder)?;
    let was = host.ip_json(&["addr", "show", "dev", "eth0"])?;
    host.kill9()?;
    // The others know that its kernel goes on.
    let other = lab.hosts().iter().find(|other| other.name() != holder).context("no other")?;
    wait_until(SOON, "the host to be missed", || {
        let peer = ovl_tests::peer(other, &holder)?;
        ensure!(peer["state"] != "alive", "{peer}");
        Ok(())
    })?;
    ensure!(holders(&lab, to)? == [holder.as_str()], "{:?}", holders(&lab, to)?);
    open.ask()?;
    ask(&client, at)?;
    host.start()?;
    host.wait_ready(SOON)?;
    wait_clean(lab.hosts(), SOON)?;
    ensure!(wait_announced(&lab, to, &names)? == holder);
    let is = host.ip_json(&["addr", "show", "dev", "eth0"])?;
    ensure!(was[0]["addr_info"] == is[0]["addr_info"], "{was} became {is}");
    open.ask()?;
    // Somebody takes the address away under us.
    let prefix = if to.is_ipv4() { 32 } else { 128 };
    host.exec_ok(["ip", "addr", "del", &format!("{to}/{prefix}"), "dev", "eth0"])?;
    wait_announced(&lab, to, &[&holder])?;
    open.ask()?;
    Ok(())
}

#[test]
fn with_the_policy_local_only_hosts_with_backends_announce() -> Result<()> {
    let lab = lab(3)?;
    let [h1, h2, h3] = lab.hosts() else { unreachable!() };
    make_network(&lab, "blue", &SUBNETS)?;
    apply(&lab, h1, &web(",\"externalTrafficPolicy\":\"Local\",\"healthCheckNodePort\":32001"))?;
    let (_two, _first) = backend(h2, "two")?;
    let client = outsider(&lab)?;
    let addresses = ingress(h1)?;
    for address in &addresses {
        wait_announced(&lab, *address, &["h2"])?;
        wait_answers(&client, SocketAddr::new(*address, 80), &["two"])?;
        let seen = ask(&client, SocketAddr::new(*address, 80))?.seen;
        let own: BTreeSet<&str> = ["192.168.77.250", "fd77::fa"].into();
        ensure!(own.contains(seen.to_string().as_str()), "the source became {seen}");
    }
    let says = |host: &Host, what: (u16, u64)| {
        let at = SocketAddr::new(host.address()?, 32001);
        wait_until(SOON, &format!("{what:?} of {}", host.name()), || {
            let said = health(&client, at)?;
            ensure!(said == what, "{said:?}");
            Ok(())
        })
    };
    for (host, what) in [(h1, (503, 0)), (h2, (200, 1)), (h3, (503, 0))] {
        says(host, what)?;
    }
    // The address follows the backends.
    let (_three, _second) = backend(h3, "three")?;
    says(h3, (200, 1))?;
    h2.ctl_ok(&["endpoint", "unready", "two"])?;
    says(h2, (503, 0))?;
    for address in &addresses {
        wait_announced(&lab, *address, &["h3"])?;
        wait_answers(&client, SocketAddr::new(*address, 80), &["three"])?;
    }
    wait_clean(lab.hosts(), SOON)?;
    h1.ctl_ok(&["delete", "svc", "web"])?;
    wait_until(SOON, "no more answers to health checks", || {
        ensure!(health(&client, SocketAddr::new(h3.address()?, 32001)).is_err());
        Ok(())
    })
}

#[test]
fn a_side_that_was_split_off_gives_the_address_back() -> Result<()> {
    let lab = lab(3)?;
    let names = ["h1", "h2", "h3"];
    make_routed(&lab, "blue", &SUBNETS)?;
    apply(&lab, &lab.hosts()[0], &web(""))?;
    let to = ingress(&lab.hosts()[0])?[0];
    let holder = wait_announced(&lab, to, &names)?;
    let others: Vec<&str> = names.into_iter().filter(|name| *name != holder).collect();
    lab.partition(&[&[&holder], &others])?;
    wait_until(SOON, "both sides to announce it", || {
        let holders = holders(&lab, to)?;
        ensure!(holders.len() == 2, "{holders:?}");
        Ok(())
    })?;
    lab.heal()?;
    ensure!(wait_announced(&lab, to, &names)? == holder);
    Ok(())
}
