//! Without the API server: connections go on, new pods are attached, and each ovld is restarted meanwhile. And the cluster
//! DNS, which a Service of the API server takes over and gives back.

#![allow(clippy::unwrap_used, reason = "tests, and helpers of tests")]

use std::net::{IpAddr, SocketAddr, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use netns_lab::{Host, Lab, LabConfig, Netns, Workload, wait_until};
use ovl_tests::cni::{Conflist, Container, addresses};
use ovl_tests::kubernetes::{ApiServer, Kube};
use ovl_tests::resolver::dig;
use ovl_tests::routed::create_routed_network;
use ovl_tests::service::{Connection, NamedServer, ask, wait_answers};
use ovl_tests::{SOON, attach, start_lab_with, text, wait_clean};
use serde_json::{Value, json};

/// Between two messages of a connection, and between two new connections.
const INTERVAL: Duration = Duration::from_millis(20);
/// How long the API server is away, if the environment does not say it, in seconds.
const AWAY: u64 = 10;

fn start() -> (Lab, ApiServer, Vec<Kube>) {
    let lab = start_lab_with(LabConfig::hosts(2)).unwrap();
    create_routed_network(&lab, "pods", &["--subnet", "10.60.0.0/16", "--subnet", "fd60::/48"]).unwrap();
    let mut api = ApiServer::new();
    let kubes: Vec<Kube> = lab.hosts().iter().map(|host| Kube::start(&mut api, host).unwrap()).collect();
    wait_for("a host to mirror", || kubes.iter().any(Kube::mirrors));
    (lab, api, kubes)
}

fn wait_for(what: &str, condition: impl Fn() -> bool) {
    wait_until(SOON, what, || -> Result<()> {
        ensure!(condition());
        Ok(())
    })
    .unwrap();
}

fn service(namespace: &str, name: &str, addresses: [&str; 2], port: u16) -> Value {
    json!({
        "kind": "Service", "metadata": { "name": name, "namespace": namespace },
        "spec": {
            "type": "ClusterIP", "clusterIP": addresses[0], "clusterIPs": addresses,
            "ipFamilies": ["IPv4", "IPv6"], "ipFamilyPolicy": "RequireDualStack",
            "ports": [{ "port": port, "targetPort": 8080, "protocol": "TCP" }],
        },
    })
}

fn slice(namespace: &str, service: &str, node: &str, address: &str, ready: bool) -> Value {
    let family = if address.contains(':') { "IPv6" } else { "IPv4" };
    json!({
        "kind": "EndpointSlice",
        "metadata": {
            "name": format!("{service}-{}", family.to_lowercase()), "namespace": namespace,
            "labels": { "kubernetes.io/service-name": service },
        },
        "addressType": family,
        "endpoints": [{
            "addresses": [address], "nodeName": node,
            "conditions": { "ready": ready, "serving": ready, "terminating": false },
        }],
        "ports": [{ "name": "", "port": 8080, "protocol": "TCP" }],
    })
}

/// Connections through a Service: one that stays, and new ones all the time.
struct Load {
    stop: Arc<AtomicBool>,
    done: Arc<AtomicUsize>,
    threads: Vec<JoinHandle<Vec<String>>>,
}

impl Load {
    /// Starts. The connection that stays is one to a server of this name.
    fn start(from: &Netns, to: SocketAddr, name: &str) -> Result<Self> {
        let (stop, done) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicUsize::new(0)));
        let mut open = wait_until(SOON, &format!("a connection to {name}"), || {
            let mut open = Connection::open(from, to)??;
            let answer = open.read_answer()?;
            ensure!(answer.name == name, "{answer:?}");
            Ok(Some(open))
        })?;
        let mut threads = Vec::new();
        let (stopped, count) = (Arc::clone(&stop), Arc::clone(&done));
        threads.push(thread::spawn(move || {
            let mut failures = Vec::new();
            while !stopped.load(Ordering::Relaxed) && failures.is_empty() {
                match open.ask() {
                    Ok(_) => drop(count.fetch_add(1, Ordering::Relaxed)),
                    Err(error) => failures.push(format!("the connection that stays: {error:#}")),
                }
                thread::sleep(INTERVAL);
            }
            failures
        }));
        let (stopped, count, from) = (Arc::clone(&stop), Arc::clone(&done), from.clone());
        threads.push(thread::spawn(move || {
            let mut failures = Vec::new();
            while !stopped.load(Ordering::Relaxed) {
                let began = Instant::now();
                match ask(&from, to) {
                    Ok(_) => drop(count.fetch_add(1, Ordering::Relaxed)),
                    Err(error) => failures.push(format!("a new one after {:?}: {error:#}", began.elapsed())),
                }
                thread::sleep(INTERVAL);
            }
            failures
        }));
        Ok(Self { stop, done, threads })
    }

    /// Waits until more messages and connections were answered.
    fn go_on(&self) -> Result<()> {
        let enough = self.done.load(Ordering::Relaxed) + 20;
        wait_until(SOON, "more connections", || {
            ensure!(self.done.load(Ordering::Relaxed) >= enough);
            Ok(())
        })
    }

    /// Ends the load. Returns how many were answered, and those that were not.
    fn finish(self) -> (usize, Vec<String>) {
        self.stop.store(true, Ordering::Relaxed);
        let failures = self.threads.into_iter().flat_map(|thread| thread.join().unwrap()).collect();
        (self.done.load(Ordering::Relaxed), failures)
    }
}

struct Pod {
    workload: Workload,
    addresses: Vec<String>,
}

fn add(host: &Host, namespace: &str, name: &str) -> Pod {
    let workload = host.workload(name).unwrap();
    let args =
        format!("IgnoreUnknown=1;K8S_POD_NAMESPACE={namespace};K8S_POD_NAME={name};K8S_POD_UID=uid-{name}");
    let container = Container::for_workload(&workload).args(&args);
    let result = Conflist::new(host, "pods").add(host, &container).unwrap();
    Pod { workload, addresses: addresses(&result) }
}

fn connects(from: &Netns, to: &[String], port: u16) -> bool {
    to.iter().all(|address| {
        let to = SocketAddr::new(address.parse::<IpAddr>().unwrap(), port);
        from.run(|| TcpStream::connect_timeout(&to, Duration::from_secs(1)).is_ok()).unwrap()
    })
}

#[test]
fn nothing_is_lost_and_new_pods_work_while_the_api_server_is_away() {
    let away = std::env::var("OVL_TEST_AWAY_SECONDS").ok();
    let away = Duration::from_secs(away.map_or(AWAY, |text| text.parse().unwrap()));
    let (lab, api, _kubes) = start();
    let (h1, h2) = (&lab["h1"], &lab["h2"]);
    let server = attach(h2, "server", "pods", &[]).unwrap();
    let client = attach(h1, "client", "pods", &[]).unwrap();
    let _server = NamedServer::start(&server.workload, "server", 8080).unwrap();
    api.put(&service("shop", "web", ["10.96.0.70", "fd00:10:96::70"], 80));
    for address in server.addresses() {
        api.put(&slice("shop", "web", "h2", &address, true));
    }
    // It isolates some pods of one namespace.
    api.put(&json!({
        "kind": "NetworkPolicy", "metadata": { "name": "db", "namespace": "shop" },
        "spec": { "podSelector": { "matchLabels": { "app": "db" } }, "policyTypes": ["Ingress"] },
    }));
    let to: [SocketAddr; 2] = ["10.96.0.70:80", "[fd00:10:96::70]:80"].map(|at| at.parse().unwrap());
    for to in to {
        wait_answers(&client.workload, to, &["server"]).unwrap();
    }
    for host in lab.hosts() {
        wait_for("the policy", || host.ctl(&["get", "netpol", "db", "-n", "shop"]).unwrap().success());
    }
    let loads = to.map(|to| Load::start(&client.workload, to, "server").unwrap());
    let began = Instant::now();
    api.set_away(true);

    let mut pods = Vec::new();
    for (n, host) in lab.hosts().iter().enumerate() {
        host.restart().unwrap();
        host.wait_ready(SOON).unwrap();
        loads.iter().for_each(|load| load.go_on().unwrap());
        // Without a policy about its namespace, a new pod is reached. With one, it is isolated, because its labels are
        // not known; what it opens itself passes.
        let free = add(host, "free", &format!("free-{n}"));
        let shut = add(host, "shop", &format!("shut-{n}"));
        let _servers = [&free, &shut].map(|pod| pod.workload.tcp_echo(5432).unwrap());
        wait_for("the new pod", || connects(&client.workload, &free.addresses, 5432));
        assert!(!connects(&client.workload, &shut.addresses[..1], 5432), "its labels are not known");
        for to in to {
            wait_answers(&shut.workload, to, &["server"]).unwrap();
        }
        pods.push((host, free, shut));
    }
    // The measured run is longer: each ovld is restarted again and again.
    let mut restarts = lab.hosts().len();
    while began.elapsed() < away {
        loads.iter().for_each(|load| load.go_on().unwrap());
        if away > Duration::from_secs(60) {
            let host = &lab.hosts()[restarts % 2];
            host.restart().unwrap();
            host.wait_ready(SOON).unwrap();
            restarts += 1;
        }
    }
    loads.iter().for_each(|load| load.go_on().unwrap());
    let finished = loads.map(Load::finish);
    let answered: usize = finished.iter().map(|(answered, _)| answered).sum();
    let lost: Vec<&String> = finished.iter().flat_map(|(_, lost)| lost).collect();
    println!(
        "away for {:?}: {answered} messages and connections answered, {} lost, {restarts} restarts of ovld",
        began.elapsed(),
        lost.len()
    );
    assert!(lost.is_empty(), "{lost:?}");

    // It is back, and says what the labels are.
    api.set_away(false);
    for (n, (host, _, shut)) in pods.iter().enumerate() {
        let name = format!("shut-{n}");
        api.put(&json!({
            "kind": "Pod",
            "metadata": {
                "name": name, "namespace": "shop", "uid": format!("uid-{name}"), "labels": { "app": "web" },
            },
            "spec": { "nodeName": host.name(), "containers": [{ "name": "c", "image": "i" }] },
            "status": { "phase": "Running" },
        }));
        let _server = shut.workload.tcp_echo(5432).unwrap();
        wait_for("the labels", || connects(&client.workload, &shut.addresses, 5432));
    }
    wait_clean(lab.hosts(), SOON).unwrap();
}

#[test]
fn a_node_is_drained_under_load() {
    let (lab, api, _kubes) = start();
    let client = attach(&lab["h1"], "client", "pods", &[]).unwrap();
    let mut servers = Vec::new();
    for (host, name) in [("h1", "stay"), ("h2", "one"), ("h2", "two"), ("h2", "three")] {
        let pod = attach(&lab[host], name, "pods", &[]).unwrap();
        let server = NamedServer::start(&pod.workload, name, 8080).unwrap();
        servers.push((host, name, pod, server));
    }
    let addresses = ["10.96.0.70", "fd00:10:96::70"];
    api.put(&service("shop", "web", addresses, 80));
    let tell = |servers: &[(&str, &str, ovl_tests::Attached, NamedServer)], terminating: Option<&str>| {
        for (n, family) in ["IPv4", "IPv6"].into_iter().enumerate() {
            let endpoints: Vec<Value> = servers
                .iter()
                .map(|(host, name, pod, _)| {
                    let ends = terminating == Some(*name);
                    json!({
                        "addresses": [pod.addresses()[n]], "nodeName": host,
                        "conditions": { "ready": !ends, "serving": true, "terminating": ends },
                    })
                })
                .collect();
            let mut all = slice("shop", "web", "", addresses[n], true);
            all["addressType"] = family.into();
            all["endpoints"] = endpoints.into();
            api.put(&all);
        }
    };
    tell(&servers, None);
    let to: [SocketAddr; 2] = ["10.96.0.70:80", "[fd00:10:96::70]:80"].map(|at| at.parse().unwrap());
    for to in to {
        wait_answers(&client.workload, to, &["one", "stay", "three", "two"]).unwrap();
    }
    let loads = to.map(|to| Load::start(&client.workload, to, "stay").unwrap());
    while let Some(name) = servers.get(1).map(|(_, name, ..)| *name) {
        // As the API server's controllers: it gets no new connections, ends, and is deleted.
        tell(&servers, Some(name));
        let mut left: Vec<&str> =
            servers.iter().map(|(_, name, ..)| *name).filter(|it| *it != name).collect();
        left.sort_unstable();
        for to in to {
            wait_answers(&client.workload, to, &left).unwrap();
        }
        let (_, _, pod, server) = servers.remove(1);
        // A connection that was begun just now ends before the pod does, as the grace period lets it.
        loads.iter().for_each(|load| load.go_on().unwrap());
        drop(server);
        lab["h2"].ctl_ok(&["detach", name]).unwrap();
        drop(pod);
        tell(&servers, None);
        loads.iter().for_each(|load| load.go_on().unwrap());
    }
    lab["h2"].stop().unwrap();
    loads.iter().for_each(|load| load.go_on().unwrap());
    let finished = loads.map(Load::finish);
    let answered: usize = finished.iter().map(|(answered, _)| answered).sum();
    let lost: Vec<&String> = finished.iter().flat_map(|(_, lost)| lost).collect();
    println!("drained: {answered} messages and connections answered, {} lost", lost.len());
    assert!(lost.is_empty(), "{lost:?}");
}

#[test]
fn a_node_reaches_the_api_server_through_the_service_that_ovl_provides() {
    let lab = start_lab_with(LabConfig::hosts(2)).unwrap();
    create_routed_network(&lab, "pods", &["--subnet", "10.60.0.0/16", "--subnet", "fd60::/48"]).unwrap();
    let (h1, h2) = (&lab["h1"], &lab["h2"]);
    let mut api = ApiServer::new();
    let server = h1.address().unwrap();
    let port = api.listen_at(h1, server).unwrap();
    let mut kubernetes = service("default", "kubernetes", ["10.96.0.1", "fd00:10:96::1"], 443);
    kubernetes["spec"]["ports"][0]["targetPort"] = port.into();
    api.put(&kubernetes);
    let mut endpoint = slice("default", "kubernetes", "", &server.to_string(), true);
    endpoint["ports"][0]["port"] = port.into();
    api.put(&endpoint);
    let follows = |api: &ApiServer| {
        let wanted = "spec.nodeName=h2";
        api.requests()
            .iter()
            .filter(|(plural, watch, selector)| plural == "pods" && *watch && selector == wanted)
            .count()
    };

    // As real hosts: a program's packet needs a route before it is translated.
    for route in ["default", "::/0"] {
        h2.exec_ok(["ip", "route", "replace", route, "dev", "eth0"]).unwrap();
    }
    // Its only address of the API server is the one that ovl provides, once another node has said what is behind it.
    let mut second = Kube::start_at("http://10.96.0.1:443", h2).unwrap();
    let mut first = Kube::start(&mut api, h1).unwrap();
    wait_for("the second node to follow its pods", || follows(&api) > 0);
    wait_for("a node to mirror", || first.mirrors() || second.mirrors());
    // Alone, it mirrors for the whole cluster.
    first.kill().unwrap();
    wait_for("the second node to mirror", || second.mirrors());
    api.put(&service("shop", "later", ["10.96.0.77", "fd00:10:96::77"], 80));
    wait_for("a Service", || h1.ctl(&["get", "svc", "later", "-n", "shop"]).unwrap().success());

    // What is behind the Service is on disk: the node starts with neither the other one's ovl-kube nor its own state of
    // the kernel.
    second.kill().unwrap();
    let before = follows(&api);
    h2.kill9().unwrap();
    h2.exec_ok(["nft", "flush", "ruleset"]).unwrap();
    h2.start().unwrap();
    let mut again = Kube::start_at("http://10.96.0.1:443", h2).unwrap();
    wait_for("the second node to follow its pods again", || follows(&api) > before);
    again.check_running().unwrap();
    wait_clean(lab.hosts(), SOON).unwrap();
}

#[test]
fn service_at_the_address_of_the_cluster_dns_takes_it_over_and_gives_it_back() {
    let (lab, api, _kubes) = start();
    let (h1, h2) = (&lab["h1"], &lab["h2"]);
    let dns = attach(h2, "dns", "pods", &[]).unwrap();
    let client = attach(h1, "client", "pods", &[]).unwrap();
    let _dns = NamedServer::start(&dns.workload, "coredns", 8080).unwrap();
    // The tests' server does not speak DNS, so it is known by what it says.
    let at: [SocketAddr; 2] = ["10.96.0.10:53", "[fd00:10:96::a]:53"].map(|at| at.parse().unwrap());
    let by_ovl = || {
        let found =
            dig(&client.workload, "10.96.0.10", &["+tries=1", "+time=1", "dns-version.cluster.local", "TXT"]);
        found.is_ok_and(|found| found == ["\"1.1.0\""])
    };
    let problems = |host: &Host| -> Result<Vec<String>> {
        let status = host.ctl_json(&["status"])?;
        let all = status["problems"].as_array().context("no problems")?;
        Ok(all.iter().filter(|it| it["code"] == "OVL-E090").map(|it| text(&it["message"])).collect())
    };
    // Without endpoints, ovl is the cluster DNS.
    api.put(&service("kube-system", "kube-dns", ["10.96.0.10", "fd00:10:96::a"], 53));
    for host in lab.hosts() {
        wait_for("the Service", || {
            host.ctl(&["get", "svc", "kube-dns", "-n", "kube-system"]).unwrap().success()
        });
    }
    wait_for("ovl to answer", by_ovl);

    let tell = |ready| {
        for address in dns.addresses() {
            api.put(&slice("kube-system", "kube-dns", "h2", &address, ready));
        }
    };
    for _ in 0..2 {
        tell(true);
        for at in at {
            wait_answers(&client.workload, at, &["coredns"]).unwrap();
        }
        assert!(!by_ovl());
        // ovl goes on to answer at its own address.
        let own = dig(&client.workload, "169.254.79.53", &["dns-version.cluster.local", "TXT"]).unwrap();
        assert_eq!(own, ["\"1.1.0\""]);
        wait_clean(lab.hosts(), SOON).unwrap();
        tell(false);
        wait_for("ovl to answer again", by_ovl);
        wait_clean(lab.hosts(), SOON).unwrap();
    }
    // It is in force after a restart without the API server, too.
    tell(true);
    wait_answers(&client.workload, at[0], &["coredns"]).unwrap();
    api.set_away(true);
    h1.restart().unwrap();
    h1.wait_ready(SOON).unwrap();
    for at in at {
        wait_answers(&client.workload, at, &["coredns"]).unwrap();
    }
    api.set_away(false);
    api.delete("services", "kube-system", "kube-dns").unwrap();
    wait_for("ovl to answer without the Service", by_ovl);
    for host in lab.hosts() {
        wait_for("no problem", || problems(host).unwrap().is_empty());
    }
    wait_clean(lab.hosts(), SOON).unwrap();
}
