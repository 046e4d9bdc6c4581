//! LoadBalancer addresses: one host announces each on the underlay, another one takes it over, and health checks report
//! the state of a host.

use std::collections::BTreeSet;
use std::io::{Read as _, Write as _};
use std::net::{IpAddr, SocketAddr, TcpStream};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use netns_lab::{Host, Lab, LabConfig, Netns, Underlay, wait_until};
use ovl_tests::ports::outsider;
use ovl_tests::routed::{create_network_of_mode, create_routed_network};
use ovl_tests::service::{Connection, NamedServer, UdpClient, apply, ask, wait_answers};
use ovl_tests::{
    Attached, SOON, attach, create_network, problems, start_lab_with, strings, text, wait_clean, wait_problem,
};
use serde_json::Value;

const POOL: &str = "load_balancer_pool = [\"192.168.77.224/29\", \"fd77::e0/124\"]";
const SUBNETS: [&str; 4] = ["--subnet", "10.60.0.0/16", "--subnet", "fd60::/64"];

fn lab(hosts: usize) -> Result<Lab> {
    start_lab_with(LabConfig::hosts(hosts).underlay(Underlay::Dual).config(POOL))
}

/// A Service `web` of type LoadBalancer, with these additional fields in its spec.
fn web(more: &str) -> String {
    format!(
        "{{\"apiVersion\":\"v1\",\"kind\":\"Service\",\"metadata\":{{\"name\":\"web\"}},\"spec\":{{
            \"type\":\"LoadBalancer\",\"selector\":{{\"app\":\"web\"}},\"ipFamilyPolicy\":\"PreferDualStack\",
            \"ports\":[{{\"port\":80,\"targetPort\":8080}}]{more}}}}}"
    )
}

fn backend(host: &Host, name: &str) -> Result<(Attached, NamedServer)> {
    let at = attach(host, name, "blue", &["--label", "app=web"])?;
    let server = NamedServer::start(&at.workload, name, 8080)?;
    Ok((at, server))
}

/// Ingress addresses of the Service, as a host reports them.
fn ingress(host: &Host) -> Result<Vec<IpAddr>> {
    let found = host.ctl_json(&["get", "svc", "web"])?;
    let all =
        found.pointer("/status/loadBalancer/ingress").and_then(Value::as_array).context("no ingress")?;
    Ok(all.iter().map(|each| text(&each["ip"]).parse()).collect::<Result<_, _>>()?)
}

/// Hosts that have an address on their underlay interface.
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

/// Waits until one host of `among` has an address, and all running hosts report so. Returns its name.
fn wait_announced(lab: &Lab, address: IpAddr, among: &[&str]) -> Result<String> {
    wait_until(SOON, &format!("one of {among:?} to announce {address}"), || {
        let holders = holders(lab, address)?;
        let [holder] = holders.as_slice() else { anyhow::bail!("announced by {holders:?}") };
        ensure!(among.contains(&holder.as_str()), "announced by {holder}");
        for host in lab.hosts().iter().filter(|host| host.is_running()) {
            let reported = host.ctl_json(&["get", "endpoints", "web"])?;
            let reported = reported["announced"].as_array().context("no announcements")?.iter();
            let reported = reported.filter(|each| text(&each["address"]) == address.to_string());
            let nodes: Vec<String> = reported.flat_map(|each| strings(&each["nodes"])).collect();
            ensure!(nodes == holders, "{} reports {nodes:?} instead of {holders:?}", host.name());
        }
        Ok(Some(holder.clone()))
    })
}

/// Asks a health check port. Returns the HTTP status and the number of local endpoints.
fn health(from: &Netns, at: SocketAddr) -> Result<(u16, u64)> {
    let response = from.run(|| -> Result<String> {
        let mut stream = TcpStream::connect_timeout(&at, Duration::from_secs(2))?;
        stream.set_read_timeout(Some(Duration::from_secs(2)))?;
        stream.write_all(b"GET / HTTP/1.1\r\nHost: here\r\n\r\n")?;
        let mut response = String::new();
        stream.read_to_string(&mut response)?;
        Ok(response)
    })??;
    let (head, body) = response.split_once("\r\n\r\n").context("no response")?;
    let status = head.split(' ').nth(1).context("no status")?.parse()?;
    let body: Value = serde_json::from_str(body)?;
    ensure!(body["service"]["name"] == "web" && body["service"]["namespace"] == "default", "{body}");
    Ok((status, body["localEndpoints"].as_u64().context("no number")?))
}

#[test]
fn address_is_announced_by_one_host_and_taken_over() -> Result<()> {
    let lab = lab(4)?;
    let [h1, h2, h3, _] = lab.hosts() else { unreachable!() };
    create_routed_network(&lab, "blue", &SUBNETS)?;
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

    // The host with the address fails, so the client's neighbour entry for the address becomes stale.
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

    // When it returns, it announces the address again.
    host.restore()?;
    lab.start_all()?;
    wait_announced(&lab, to, &[&lost])?;
    wait_until(SOON, "an answer", || ask(&client, SocketAddr::new(to, 80)).map(drop))?;

    // A host that leaves withdraws the address at once, and a deleted Service leaves nothing behind.
    host.ctl_ok(&["leave"])?;
    wait_announced(&lab, to, &left)?;
    let alive = lab.host(left[0])?;
    alive.ctl_ok(&["delete", "svc", "web"])?;
    wait_until(SOON, "no host to announce the address", || {
        let holders = holders(&lab, to)?;
        ensure!(holders.is_empty(), "{holders:?}");
        Ok(())
    })
}

#[test]
fn connections_survive_a_kill_of_the_announcing_hosts_daemon() -> Result<()> {
    let lab = lab(3)?;
    let names = ["h1", "h2", "h3"];
    create_routed_network(&lab, "blue", &SUBNETS)?;
    apply(&lab, &lab.hosts()[0], &web(""))?;
    let (_one, _first) = backend(&lab.hosts()[0], "one")?;
    let client = outsider(&lab)?;
    let to = ingress(&lab.hosts()[0])?[0];
    let holder = wait_announced(&lab, to, &names)?;
    let at = SocketAddr::new(to, 80);
    wait_answers(&client, at, &["one"])?;
    let mut open = Connection::open(&client, at)??;
    open.read_answer()?;
    let host = lab.host(&holder)?;
    let was = host.ip_json(&["addr", "show", "dev", "eth0"])?;
    host.kill9()?;
    // The other hosts leave the address where it is, because the kernel of the holder still works. The attach is a
    // marker: it goes through each host's kernel queue after everything that followed from the failure.
    for other in lab.hosts().iter().filter(|other| other.name() != holder) {
        wait_until(SOON, &format!("{} to notice the failure", other.name()), || {
            let peer = ovl_tests::peer(other, &holder)?;
            ensure!(peer["state"] != "alive", "{peer}");
            Ok(())
        })?;
        attach(other, &format!("marker-{}", other.name()), "blue", &[])?;
    }
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
    // Another program deletes the address.
    let prefix = if to.is_ipv4() { 32 } else { 128 };
    host.exec_ok(["ip", "addr", "del", &format!("{to}/{prefix}"), "dev", "eth0"])?;
    wait_announced(&lab, to, &[&holder])?;
    open.ask()?;
    Ok(())
}

#[test]
fn external_traffic_policy_local_announces_only_from_hosts_with_backends() -> Result<()> {
    let lab = lab(3)?;
    let [h1, h2, h3] = lab.hosts() else { unreachable!() };
    create_network(&lab, "blue", &SUBNETS)?;
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
    let wait_health = |host: &Host, what: (u16, u64)| {
        let at = SocketAddr::new(host.address()?, 32001);
        wait_until(SOON, &format!("{} to report {what:?}", host.name()), || {
            let reported = health(&client, at)?;
            ensure!(reported == what, "{reported:?}");
            Ok(())
        })
    };
    for (host, what) in [(h1, (503, 0)), (h2, (200, 1)), (h3, (503, 0))] {
        wait_health(host, what)?;
    }
    // The last backend of h1 is shutting down: load balancers are told to go elsewhere.
    let slice = |conditions: &str| {
        let manifest = format!(
            "{{\"apiVersion\":\"discovery.k8s.io/v1\",\"kind\":\"EndpointSlice\",\"addressType\":\"IPv4\",
                \"metadata\":{{\"name\":\"web-1\",\"labels\":{{\"kubernetes.io/service-name\":\"web\"}}}},
                \"ports\":[{{\"port\":8080}}],\"endpoints\":[{{\"addresses\":[\"{}\"],\"nodeName\":\"h1\",
                \"conditions\":{{{conditions}}}}}]}}",
            h1.address()?
        );
        apply(&lab, h1, &manifest)
    };
    slice("\"ready\":true")?;
    wait_health(h1, (200, 1))?;
    slice("\"ready\":false,\"serving\":true,\"terminating\":true")?;
    wait_health(h1, (503, 0))?;
    h1.ctl_ok(&["delete", "endpointslice", "web-1"])?;
    // The address follows the backends.
    let (_three, _second) = backend(h3, "three")?;
    wait_health(h3, (200, 1))?;
    h2.ctl_ok(&["endpoint", "unready", "two"])?;
    wait_health(h2, (503, 0))?;
    for address in &addresses {
        wait_announced(&lab, *address, &["h3"])?;
        wait_answers(&client, SocketAddr::new(*address, 80), &["three"])?;
    }
    wait_clean(lab.hosts(), SOON)?;
    h1.ctl_ok(&["delete", "svc", "web"])?;
    wait_until(SOON, "health checks to be refused", || {
        ensure!(health(&client, SocketAddr::new(h3.address()?, 32001)).is_err());
        Ok(())
    })
}

#[test]
fn address_returns_to_its_holder_after_a_partition() -> Result<()> {
    let lab = lab(3)?;
    let names = ["h1", "h2", "h3"];
    create_routed_network(&lab, "blue", &SUBNETS)?;
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

#[test]
fn external_traffic_policy_local_leaves_all_backends_to_what_comes_from_this_host() -> Result<()> {
    for mode in ["l2", "l3"] {
        let lab = lab(2)?;
        let [h1, h2] = lab.hosts() else { unreachable!() };
        create_network_of_mode(&lab, mode, "blue", &SUBNETS)?;
        let service = web(",\"externalTrafficPolicy\":\"Local\"");
        apply(&lab, h1, &service.replace("8080}", "8080,\"nodePort\":30080}"))?;
        let (_two, _server) = backend(h2, "two")?;
        let near = attach(h1, "near", "blue", &[])?;
        let client = outsider(&lab)?;
        let balanced = ingress(h1)?[0];
        let [own, other] = [h1, h2].map(|host| host.address().map(|address| SocketAddr::new(address, 30080)));
        let (own, other) = (own?, other?);
        wait_announced(&lab, balanced, &["h2"])?;
        wait_answers(&client, other, &["two"])?;
        // As with kube-proxy, the policy is about clients outside.
        let from: [(&Netns, &str); 2] = [(&near.workload, "an endpoint"), (h1, "the host")];
        for (from, name) in from {
            for to in [own, SocketAddr::new(balanced, 80)] {
                wait_answers(from, to, &["two"]).with_context(|| format!("{mode}: from {name} to {to}"))?;
            }
        }
        // These still get no answer from a host without a backend, and keep their address elsewhere.
        let dropped = client.run(|| TcpStream::connect_timeout(&own, Duration::from_secs(1)))?;
        ensure!(
            dropped.is_err_and(|error| error.kind() == std::io::ErrorKind::TimedOut),
            "{mode}: from outside"
        );
        let seen = ask(&client, SocketAddr::new(balanced, 80))?.seen;
        ensure!(seen.to_string() == "192.168.77.250", "{mode}: the source became {seen}");
        wait_clean(lab.hosts(), SOON)?;
    }
    Ok(())
}

/// A Service of type LoadBalancer for pods with the label `app: NAME`, with this port and these additional fields.
fn balancer(name: &str, port: u16, protocol: &str, more: &str) -> String {
    format!(
        "{{\"apiVersion\":\"v1\",\"kind\":\"Service\",\"metadata\":{{\"name\":\"{name}\"}},\"spec\":{{
            \"type\":\"LoadBalancer\",\"selector\":{{\"app\":\"{name}\"}},
            \"ports\":[{{\"port\":{port},\"protocol\":\"{protocol}\",\"targetPort\":8080}}]{more}}}}}"
    )
}

#[test]
fn services_share_an_address_at_different_ports_and_protocols() -> Result<()> {
    let lab = lab(3)?;
    let [h1, h2, h3] = lab.hosts() else { unreachable!() };
    create_network(&lab, "blue", &SUBNETS)?;
    let asks = ",\"loadBalancerIP\":\"192.168.77.228\"";
    let address: IpAddr = "192.168.77.228".parse()?;
    // Both have their backends on the same two hosts of three, but not on a third.
    let mut servers = Vec::new();
    for (name, protocol) in [("dns-tcp", "TCP"), ("dns-udp", "UDP")] {
        apply(&lab, h1, &balancer(name, 53, protocol, asks))?;
        for host in [h2, h3] {
            let own = format!("{name}-{}", host.name());
            let at = attach(host, &own, "blue", &["--label", &format!("app={name}")])?;
            servers.push((NamedServer::start(&at.workload, &own, 8080)?, at));
        }
    }
    // One host announces it for both, and a Service that asks for none gets another one.
    apply(&lab, h2, &web(""))?;
    ensure!(ingress(h2)?.iter().all(|other| *other != address), "{:?}", ingress(h2)?);
    wait_until(SOON, "one host to announce the address", || {
        let holders = holders(&lab, address)?;
        ensure!(holders.len() == 1 && holders != ["h1"], "{holders:?}");
        Ok(())
    })?;
    let client = outsider(&lab)?;
    let at = SocketAddr::new(address, 53);
    wait_until(SOON, "an answer over TCP", || {
        let name = ask(&client, at)?.name;
        ensure!(name.starts_with("dns-tcp"), "{name}");
        Ok(())
    })?;
    wait_until(SOON, "an answer over UDP", || {
        let name = UdpClient::open(&client, at)?.ask()?.name;
        ensure!(name.starts_with("dns-udp"), "{name}");
        Ok(())
    })?;
    let refused = apply(&lab, h1, &balancer("late", 53, "UDP", asks)).err().context("the port is taken")?;
    let reason = "192.168.77.228 port 53/UDP is in use by Service default/dns-udp";
    ensure!(format!("{refused:#}").contains(reason), "{refused:#}");
    // The other one keeps the address.
    h1.ctl_ok(&["delete", "svc", "dns-udp"])?;
    let late = || apply(&lab, h3, &balancer("late", 53, "UDP", asks)).map(drop);
    wait_until(SOON, "the port to be free", late)?;
    ensure!(ask(&client, at)?.name.starts_with("dns-tcp"));
    wait_clean(lab.hosts(), SOON)
}

#[test]
fn service_waits_for_an_address_while_the_pool_is_used_up() -> Result<()> {
    let lab = start_lab_with(LabConfig::hosts(2).config("load_balancer_pool = [\"192.168.77.228/32\"]"))?;
    let [h1, h2] = lab.hosts() else { unreachable!() };
    create_routed_network(&lab, "blue", &SUBNETS)?;
    let plain = balancer("plain", 80, "TCP", "").replace("LoadBalancer", "ClusterIP");
    let all = [balancer("first", 80, "TCP", ""), balancer("web", 80, "TCP", ""), plain].join("\n---\n");
    apply(&lab, h1, &all)?;
    let (_one, _server) = backend(h2, "one")?;
    for host in lab.hosts() {
        wait_problem(host, &["waits for an IPv4 address", "load_balancer_pool"], SOON)?;
        let status = host.ctl_ok(&["status"])?;
        ensure!(status.contains("OVL-E064") && status.contains("Service default/web"), "{status}");
    }
    let shown = h2.ctl_ok(&["get", "svc"])?;
    let line = |name: &str| shown.lines().find(|line| line.starts_with(name)).unwrap_or_default().to_owned();
    ensure!(line("web").contains("<pending>") && line("first").contains("192.168.77.228"), "{shown}");
    ensure!(line("plain").contains("ClusterIP"), "{shown}");
    ensure!(h2.ctl_ok(&["describe", "svc", "web"])?.contains("Note:"), "describe says why");
    h2.ctl_ok(&["delete", "svc", "first"])?;
    let client = outsider(&lab)?;
    wait_answers(&client, SocketAddr::new("192.168.77.228".parse()?, 80), &["one"])?;
    for host in lab.hosts() {
        wait_until(SOON, "the problem to end", || {
            let found = problems(host)?;
            ensure!(!found.iter().any(|problem| problem.contains("waits for")), "{found:?}");
            Ok(())
        })?;
    }
    wait_clean(lab.hosts(), SOON)
}

/// MetalLB or a cloud gives the address and brings packets to the hosts, which translate as kube-proxy does.
#[test]
fn addresses_that_another_program_gave_are_translated_and_not_announced() -> Result<()> {
    let ranges = format!("{POOL}\nexternal_ranges = ['203.0.113.0/24', '2001:db8::/64']");
    let lab = start_lab_with(LabConfig::hosts(2).underlay(Underlay::Dual).config(&ranges))?;
    let [h1, h2] = lab.hosts() else { unreachable!() };
    create_routed_network(&lab, "blue", &SUBNETS)?;
    let given = |ingress: &str| {
        let class = web(",\"loadBalancerClass\":\"metallb.io/l2\"");
        let status = format!(",\"status\":{{\"loadBalancer\":{{\"ingress\":[{ingress}]}}}}}}");
        apply(&lab, h1, &format!("{}{status}", class.strip_suffix('}').unwrap_or_default()))
    };
    given(
        "{\"ip\":\"203.0.113.7\",\"ipMode\":\"VIP\"},{\"ip\":\"2001:db8::7\"},{\"hostname\":\"lb.example\"}",
    )?;
    let addresses: [IpAddr; 2] = ["203.0.113.7".parse()?, "2001:db8::7".parse()?];
    ensure!(ingress(h2)? == addresses, "{:?}", ingress(h2)?);
    let (_one, _first) = backend(h1, "one")?;
    let (_two, _second) = backend(h2, "two")?;
    let pod = attach(h2, "pod", "blue", &[])?;
    let client = outsider(&lab)?;
    for (address, by) in addresses.iter().zip(h1.addresses()) {
        client.exec_ok(["ip", "route", "add", &address.to_string(), "via", &by.to_string()])?;
        for from in [&client, &*pod.workload] {
            wait_answers(from, SocketAddr::new(*address, 80), &["one", "two"])?;
        }
        ensure!(holders(&lab, *address)?.is_empty(), "{address} is announced");
    }
    // A load balancer that changes packets itself, and an address that nobody allowed.
    given("{\"ip\":\"203.0.113.7\",\"ipMode\":\"Proxy\"},{\"ip\":\"198.51.100.7\"}")?;
    ensure!(ingress(h2)?.len() == 1, "{:?}", ingress(h2)?);
    wait_problem(h1, &["198.51.100.7", "external_ranges"], SOON)?;
    client.exec_ok(["ip", "route", "add", "198.51.100.7", "via", &h1.address()?.to_string()])?;
    for address in ["203.0.113.7", "198.51.100.7"] {
        let to = SocketAddr::new(address.parse()?, 80);
        wait_until(SOON, "no translation", || {
            ensure!(client.run(|| TcpStream::connect_timeout(&to, Duration::from_millis(500)))?.is_err());
            Ok(())
        })?;
    }
    wait_clean(lab.hosts(), SOON)
}

#[test]
fn source_ranges_let_nothing_else_in() -> Result<()> {
    let lab = lab(2)?;
    let [h1, h2] = lab.hosts() else { unreachable!() };
    create_routed_network(&lab, "blue", &SUBNETS)?;
    apply(&lab, h1, &web(""))?;
    let (_one, _first) = backend(h1, "one")?;
    let (_two, _second) = backend(h2, "two")?;
    let pod = attach(h2, "pod", "blue", &[])?;
    let client = outsider(&lab)?;
    let addresses = ingress(h1)?;
    let [v4, v6] = addresses.as_slice() else { anyhow::bail!("{addresses:?}") };
    for address in &addresses {
        wait_announced(&lab, *address, &["h1", "h2"])?;
        for from in [&client, &*pod.workload] {
            wait_answers(from, SocketAddr::new(*address, 80), &["one", "two"])?;
        }
    }
    let wait_let_in = |from: &Netns, address: IpAddr, wanted: bool| {
        let to = SocketAddr::new(address, 80);
        wait_until(SOON, &format!("{address} to let the source in: {wanted}"), || {
            let reached = from.run(|| TcpStream::connect_timeout(&to, Duration::from_millis(500)))?.is_ok();
            ensure!(reached == wanted);
            Ok(())
        })
    };
    // The outsider has 192.168.77.250 and fd77::fa, pods have 10.60.0.0/16 and fd60::/64.
    for (ranges, outside, inside) in [
        ("[\"192.168.77.248/29\", \"192.168.77.0/24\"]", [true, false], [false, false]),
        ("[\"10.60.0.0/16\", \"fd77::/64\"]", [false, true], [true, false]),
        ("[\"fd60::/64\", \"198.51.100.0/24\"]", [false, false], [false, true]),
        ("[]", [true, true], [true, true]),
        ("[\"198.51.100.0/24\"]", [false, false], [false, false]),
    ] {
        apply(&lab, h1, &web(&format!(",\"loadBalancerSourceRanges\":{ranges}")))?;
        for (n, address) in [*v4, *v6].into_iter().enumerate() {
            wait_let_in(&client, address, outside[n])?;
            wait_let_in(&pod.workload, address, inside[n])?;
        }
        wait_clean(lab.hosts(), SOON)?;
    }
    // Its cluster address and its node port take all.
    let service = h1.ctl_json(&["get", "svc", "web"])?;
    let cluster: IpAddr = text(&service["spec"]["clusterIP"]).parse()?;
    wait_answers(&pod.workload, SocketAddr::new(cluster, 80), &["one", "two"])?;
    let port = service["spec"]["ports"][0]["nodePort"].as_u64().context("no node port")?;
    wait_answers(&client, SocketAddr::new(h1.address()?, u16::try_from(port)?), &["one", "two"])?;
    // A trace says so.
    let traced = h2.ctl(&["trace", "pod", &format!("{v4}:80/tcp")])?;
    ensure!(traced.stdout.contains("loadBalancerSourceRanges"), "{traced:?}");
    Ok(())
}
