//! `ovl-kube`: a Kubernetes API server as one more source of what the cluster knows, over real packets. The API server is
//! the tests' own.

#![allow(clippy::unwrap_used, reason = "tests, and helpers of tests")]

use std::net::{IpAddr, SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use ipnet::IpNet;
use netns_lab::{Host, Lab, LabConfig, Netns, Workload, wait_until};
use ovl_proto::id::NodeId;
use ovl_tests::cni::{Conflist, Container, addresses};
use ovl_tests::kubernetes::{ApiServer, CLUSTER, Control, Kube};
use ovl_tests::routed::create_routed_network;
use ovl_tests::service::{NamedServer, apply, ask, wait_answers};
use ovl_tests::{SOON, assert_contains, attach, ctl_error, rows, start_lab_with, strings, text, wait_clean};
use serde_json::{Value, json};

/// The addresses of the Service `web`.
const WEB: [&str; 2] = ["10.96.0.70:80", "[fd00:10:96::70]:80"];
/// The same, in a range that a ServiceCIDR adds.
const LATER: [&str; 2] = ["10.97.0.70:80", "[fd00:10:97::70]:80"];
/// Within this time another host takes over what the first one mirrored.
const TAKEN_OVER: Duration = Duration::from_secs(4);

/// Two hosts with a routed network, an API server, and `ovl-kube` on each host.
struct World {
    lab: Lab,
    api: ApiServer,
    kubes: Vec<Kube>,
}

fn start() -> World {
    start_with("")
}

/// Starts with more configuration.
fn start_with(config: &str) -> World {
    let lab = start_lab_with(LabConfig::hosts(2).config(config)).unwrap();
    create_routed_network(&lab, "pods", &["--subnet", "10.60.0.0/16", "--subnet", "fd60::/48"]).unwrap();
    let mut api = ApiServer::new();
    let kubes = lab.hosts().iter().map(|host| Kube::start(&mut api, host).unwrap()).collect();
    let mut world = World { lab, api, kubes };
    world.wait_mirror(&[0, 1]);
    world
}

impl World {
    /// Waits until the one of these hosts mirrors whose turn it is once all of them reach the API server, and returns which. The
    /// first one to reach it mirrors until then.
    fn wait_mirror(&mut self, of: &[usize]) -> usize {
        let id = |n: &&usize| -> NodeId {
            let status = self.lab.hosts()[**n].ctl_json(&["status"]).unwrap();
            text(&status["id"]).parse().unwrap()
        };
        let chosen = *of.iter().min_by_key(id).unwrap();
        wait_until(SOON, "the host whose turn it is to mirror", || {
            let mut acting = Vec::new();
            for n in of {
                let kube = &mut self.kubes[*n];
                kube.check_running()?;
                acting.extend(kube.mirrors().then_some(*n));
            }
            ensure!(acting == [chosen], "{acting:?} mirror, and it is the turn of {chosen}");
            Ok(())
        })
        .unwrap();
        chosen
    }

    /// Waits until a host has an object as `ovlctl get -o json` shows it.
    fn wait_object(&self, host: &str, args: &[&str], want: impl Fn(&Value) -> bool) -> Value {
        let args = [&["get"], args].concat();
        wait_until(SOON, &format!("`ovlctl {}` on {host}", args.join(" ")), || {
            let found = self.lab[host].ctl_json(&args)?;
            ensure!(want(&found), "{found}");
            Ok(Some(found))
        })
        .unwrap()
    }

    fn wait_gone(&self, host: &str, args: &[&str]) {
        let args = [&["get"], args].concat();
        wait_until(SOON, &format!("`ovlctl {}` to find nothing on {host}", args.join(" ")), || {
            ensure!(self.lab[host].ctl(&args)?.code() == Some(1));
            Ok(())
        })
        .unwrap();
    }
}

fn web() -> Value {
    json!({
        "kind": "Service", "metadata": { "name": "web", "namespace": "shop", "labels": { "tier": "front" } },
        "spec": {
            "type": "ClusterIP", "clusterIP": "10.96.0.70", "clusterIPs": ["10.96.0.70", "fd00:10:96::70"],
            "ipFamilies": ["IPv4", "IPv6"], "ipFamilyPolicy": "RequireDualStack",
            // The API server's controllers evaluate it: what it would select here is no backend.
            "selector": { "app": "decoy" }, "sessionAffinity": "None", "internalTrafficPolicy": "Cluster",
            "ports": [{ "port": 80, "targetPort": 8080, "protocol": "TCP" }],
        },
        "status": { "loadBalancer": {} },
    })
}

fn slice(name: &str, node: &str, address: &str) -> Value {
    let family = if address.contains(':') { "IPv6" } else { "IPv4" };
    json!({
        "kind": "EndpointSlice",
        "metadata": { "name": name, "namespace": "shop", "labels": { "kubernetes.io/service-name": "web" } },
        "addressType": family,
        "endpoints": [{
            "addresses": [address], "nodeName": node, "zone": "z1",
            "conditions": { "ready": true, "serving": true, "terminating": false },
        }],
        "ports": [{ "name": "", "port": 8080, "protocol": "TCP" }],
    })
}

fn pod(node: &str, name: &str, uid: &str, app: &str) -> Value {
    json!({
        "kind": "Pod",
        "metadata": { "name": name, "namespace": "shop", "uid": uid, "labels": { "app": app } },
        "spec": {
            "nodeName": node,
            "containers": [{ "name": "c", "image": "i", "ports": [{ "name": "pg", "containerPort": 5432 }] }],
        },
        "status": { "phase": "Running", "conditions": [{ "type": "Ready", "status": "True" }] },
    })
}

fn policy() -> Value {
    json!({
        "kind": "NetworkPolicy", "metadata": { "name": "db", "namespace": "shop" },
        "spec": {
            "podSelector": { "matchLabels": { "app": "db" } }, "policyTypes": ["Ingress"],
            "ingress": [{
                "from": [{ "podSelector": { "matchLabels": { "app": "api" } } }],
                "ports": [{ "port": "pg", "protocol": "TCP" }],
            }],
        },
    })
}

/// A pod that was attached by the CNI plugin.
struct Attached {
    workload: Workload,
    addresses: Vec<String>,
}

fn add(host: &Host, workload: &str, name: &str, uid: &str) -> Attached {
    let workload = host.workload(workload).unwrap();
    let args = format!("IgnoreUnknown=1;K8S_POD_NAMESPACE=shop;K8S_POD_NAME={name};K8S_POD_UID={uid}");
    let container = Container::for_workload(&workload).args(&args);
    let result = Conflist::new(host, "pods").add(host, &container).unwrap();
    Attached { workload, addresses: addresses(&result) }
}

/// Whether connections are accepted at all of these addresses.
fn connects(from: &Netns, to: &[String], port: u16) -> bool {
    reached(from, to, port).iter().all(|reached| *reached)
}

/// Whether connections are accepted at none of these addresses.
fn refused(from: &Netns, to: &[String], port: u16) -> bool {
    reached(from, to, port).iter().all(|reached| !reached)
}

fn reached(from: &Netns, to: &[String], port: u16) -> Vec<bool> {
    let each = |address: &String| {
        let to = SocketAddr::new(address.parse::<IpAddr>().unwrap(), port);
        from.run(|| TcpStream::connect_timeout(&to, Duration::from_secs(1)).is_ok()).unwrap()
    };
    to.iter().map(each).collect()
}

fn wait_for(what: &str, condition: impl Fn() -> bool) {
    wait_until(SOON, what, || -> Result<()> {
        ensure!(condition());
        Ok(())
    })
    .unwrap();
}

/// Problems of a host with this code.
fn problems(host: &Host, code: &str) -> Result<Vec<Value>> {
    let status = host.ctl_json(&["status"])?;
    let all = status["problems"].as_array().context("no problems")?;
    Ok(all.iter().filter(|it| it["code"] == code).cloned().collect())
}

#[test]
fn services_of_the_api_server_are_reached_and_its_objects_are_changed_only_there() {
    let mut world = start();
    let (h1, h2) = (&world.lab["h1"], &world.lab["h2"]);
    let server = attach(h2, "server", "pods", &[]).unwrap();
    let decoy = attach(h2, "decoy", "pods", &["--namespace", "shop", "--label", "app=decoy"]).unwrap();
    let client = attach(h1, "client", "pods", &[]).unwrap();
    let _server = NamedServer::start(&server.workload, "server", 8080).unwrap();
    let _decoy = NamedServer::start(&decoy.workload, "decoy", 8080).unwrap();
    // An object of ovl's own stays beside those of the API server.
    let own = "{apiVersion: v1, kind: Service, metadata: {name: own, namespace: shop}, \
               spec: {clusterIP: 10.96.0.71, ports: [{port: 80}]}}";
    apply(&world.lab, h1, own).unwrap();

    let began = Instant::now();
    world.api.put(&json!({ "kind": "Namespace", "metadata": { "name": "shop", "labels": { "team": "a" } } }));
    world.api.put(&web());
    for (n, address) in server.addresses().iter().enumerate() {
        world.api.put(&slice(&format!("web-{n}"), "h2", address));
    }
    for address in WEB {
        wait_answers(&client.workload, address.parse().unwrap(), &["server"]).unwrap();
    }
    println!("reached {:?} after the Service was made", began.elapsed());

    // Every host has them, and shows where they are from.
    for host in ["h1", "h2"] {
        let found = world.wait_object(host, &["svc", "web", "-n", "shop"], |it| it["kind"] == "Service");
        assert_eq!(text(&found["metadata"]["labels"]["tier"]), "front");
        let listed = world.lab[host].ctl_ok(&["get", "svc", "-n", "shop", "-o", "wide"]).unwrap();
        let line = |name: &str| listed.lines().find(|line| line.starts_with(name)).unwrap().to_owned();
        assert!(line("web").ends_with("kubernetes") && line("own").ends_with("ovl"), "{listed}");
        let described = world.lab[host].ctl_ok(&["describe", "svc", "web", "-n", "shop"]).unwrap();
        assert_contains(&described, &["Source:", CLUSTER]);
        let described = world.lab[host].ctl_ok(&["describe", "ns", "shop"]).unwrap();
        assert_contains(&described, &["team=a", "Source:"]);
    }
    // They cannot be changed here.
    let path = world.lab.dir().join("web.yaml");
    std::fs::write(
        &path,
        json!({ "apiVersion": "v1", "kind": "Service",
        "metadata": { "name": "web", "namespace": "shop" }, "spec": { "ports": [{ "port": 81 }] } })
        .to_string(),
    )
    .unwrap();
    let path = path.display().to_string();
    let said = ctl_error(&world.lab["h2"], &["apply", "-f", &path]).unwrap();
    assert_contains(&said, &["shop/web", "mirrored from the Kubernetes API server", "change it there"]);
    let said = ctl_error(&world.lab["h2"], &["delete", "svc", "web", "-n", "shop"]).unwrap();
    assert_contains(&said, &["Service shop/web", "mirrored from the Kubernetes API server"]);

    // One object that cannot be done stops no other, and is named. So is one whose name is taken.
    let acting = world.wait_mirror(&[0, 1]);
    let mut strange = slice("strange", "h2", "10.60.0.1");
    strange["addressType"] = "FQDN".into();
    strange["endpoints"][0]["addresses"][0] = "example.com".into();
    world.api.put(&strange);
    let mut taken = web();
    taken["metadata"]["name"] = "own".into();
    taken["spec"]["clusterIP"] = "10.96.0.72".into();
    taken["spec"]["clusterIPs"] = json!(["10.96.0.72", "fd00:10:96::72"]);
    world.api.put(&taken);
    let mut other = web();
    other["metadata"]["name"] = "other".into();
    other["spec"]["clusterIP"] = "10.96.0.73".into();
    other["spec"]["clusterIPs"] = json!(["10.96.0.73", "fd00:10:96::73"]);
    world.api.put(&other);
    world.wait_object("h2", &["svc", "other", "-n", "shop"], |it| it["kind"] == "Service");
    let host = &world.lab.hosts()[acting];
    let named = wait_until(SOON, "the objects to be named", || {
        let found = problems(host, "OVL-E090")?;
        ensure!(found.len() == 2, "{found:?}");
        Ok(Some(found))
    })
    .unwrap();
    assert_eq!(text(&named[0]["object"]), "EndpointSlice shop/strange");
    assert_eq!(text(&named[1]["object"]), "Service shop/own");
    assert_contains(
        &text(&named[1]["message"]),
        &["an object of its own", "ovlctl delete service own -n shop"],
    );
    let own = world.wait_object("h1", &["svc", "own", "-n", "shop"], |it| it["kind"] == "Service");
    assert_eq!(text(&own["spec"]["clusterIP"]), "10.96.0.71");
    // As the message says.
    world.lab["h1"].ctl_ok(&["delete", "svc", "own", "-n", "shop"]).unwrap();
    world.wait_object("h2", &["svc", "own", "-n", "shop"], |it| it["spec"]["clusterIP"] == "10.96.0.72");
    world.api.delete("endpointslices", "shop", "strange").unwrap();
    wait_for("no problem", || problems(host, "OVL-E090").unwrap().is_empty());

    // What is deleted there goes here.
    world.api.delete("services", "shop", "web").unwrap();
    for host in ["h1", "h2"] {
        world.wait_gone(host, &["svc", "web", "-n", "shop"]);
    }
    wait_for("the Service to be unreachable", || ask(&client.workload, WEB[0].parse().unwrap()).is_err());

    // One watch for each kind in the whole cluster at a time, and one for the pods of each node.
    let requests = world.api.requests();
    let turns: usize = world.kubes.iter().map(Kube::turns).sum();
    let kinds = [
        "namespaces",
        "services",
        "endpointslices",
        "networkpolicies",
        "clusternetworkpolicies",
        "servicecidrs",
        "nodes",
    ];
    for plural in kinds {
        let watches = requests.iter().filter(|(other, watch, _)| other == plural && *watch).count();
        assert!((1..=turns).contains(&watches), "{watches} watches of {plural} in {turns} turns");
    }
    let mut nodes: Vec<&str> = requests
        .iter()
        .filter(|(plural, watch, _)| plural == "pods" && *watch)
        .map(|it| it.2.as_str())
        .collect();
    nodes.sort_unstable();
    assert_eq!(nodes, ["spec.nodeName=h1", "spec.nodeName=h2"]);
    wait_clean(world.lab.hosts(), SOON).unwrap();
}

#[test]
fn ranges_of_services_follow_those_of_the_api_server() {
    let ranges = "service_range = [\"10.96.0.0/16\", \"fd00:10:96::/112\", \"kubernetes\"]";
    let mut world = start_with(ranges);
    let acting = world.wait_mirror(&[0, 1]);
    let (h1, h2) = (&world.lab["h1"], &world.lab["h2"]);
    let server = attach(h2, "server", "pods", &[]).unwrap();
    let client = attach(h1, "client", "pods", &[]).unwrap();
    let _server = NamedServer::start(&server.workload, "server", 8080).unwrap();
    let mut later = web();
    later["spec"]["clusterIP"] = "10.97.0.70".into();
    later["spec"]["clusterIPs"] = json!(["10.97.0.70", "fd00:10:97::70"]);
    world.api.put(&later);
    for (n, address) in server.addresses().iter().enumerate() {
        world.api.put(&slice(&format!("web-{n}"), "h2", address));
    }
    // No range has its addresses yet.
    wait_until(SOON, "the Service to be named", || {
        let found = problems(&world.lab.hosts()[acting], "OVL-E090")?;
        ensure!(found.len() == 1 && found[0]["message"].to_string().contains("service_range"), "{found:?}");
        Ok(())
    })
    .unwrap();
    let range = |name: &str, cidrs: &[&str]| json!({ "kind": "ServiceCIDR", "metadata": { "name": name }, "spec": { "cidrs": cidrs } });
    // The first one is that of the configuration, as the API server has it too; the last one has the hosts' addresses.
    world.api.put(&range("kubernetes", &["10.96.0.0/16", "fd00:10:96::/112"]));
    world.api.put(&range("more", &["10.97.0.0/24", "fd00:10:97::/112"]));
    let wide: IpNet = format!("{}/8", h1.address().unwrap()).parse().unwrap();
    world.api.put(&range("wide", &[&wide.trunc().to_string()]));
    for address in LATER {
        wait_answers(&client.workload, address.parse().unwrap(), &["server"]).unwrap();
    }
    wait_for("no problem", || problems(&world.lab.hosts()[acting], "OVL-E090").unwrap().is_empty());
    // What no Service has is refused at once, as in a configured range.
    for address in ["10.97.0.71", "fd00:10:97::71"] {
        let to = SocketAddr::new(address.parse().unwrap(), 80);
        let answer = client.workload.run(|| TcpStream::connect_timeout(&to, Duration::from_secs(5))).unwrap();
        assert_eq!(answer.unwrap_err().kind(), std::io::ErrorKind::ConnectionRefused, "{address}");
    }
    let listed = world.lab["h2"].ctl_ok(&["get", "servicecidrs", "-o", "wide"]).unwrap();
    assert_contains(&listed, &["more", "10.97.0.0/24,fd00:10:97::/112", "kubernetes"]);
    // They outlive restarts without an API server.
    world.api.set_away(true);
    for host in ["h1", "h2"] {
        world.lab[host].restart().unwrap();
    }
    wait_clean(world.lab.hosts(), SOON).unwrap();
    wait_answers(&client.workload, LATER[0].parse().unwrap(), &["server"]).unwrap();
    world.api.set_away(false);
    world.api.delete("servicecidrs", "", "more").unwrap();
    wait_for("the Service to be unreachable", || ask(&client.workload, LATER[0].parse().unwrap()).is_err());
}

#[test]
fn zone_of_the_node_chooses_between_backends() {
    let world = start();
    for (name, zone) in [("h1", "a"), ("h2", "b")] {
        let labels = json!({ "topology.kubernetes.io/zone": zone });
        world.api.put(&json!({ "kind": "Node", "metadata": { "name": name, "labels": labels } }));
    }
    let servers = [("h1", "one"), ("h2", "two")]
        .map(|(host, name)| attach(&world.lab[host], name, "pods", &[]).unwrap());
    let _one = NamedServer::start(&servers[0].workload, "one", 8080).unwrap();
    let _two = NamedServer::start(&servers[1].workload, "two", 8080).unwrap();
    let client = attach(&world.lab["h1"], "client", "pods", &[]).unwrap();
    world.api.put(&web());
    // The backend on the other host is the one for the client's zone.
    for (n, (host, zone)) in [("h1", "b"), ("h2", "a")].into_iter().enumerate() {
        let mut one = slice(&format!("web-{n}"), host, &servers[n].addresses()[0]);
        one["endpoints"][0]["hints"] = json!({ "forZones": [{ "name": zone }] });
        world.api.put(&one);
    }
    wait_answers(&client.workload, WEB[0].parse().unwrap(), &["two"]).unwrap();
    // A restarted ovld hears it again.
    world.lab["h1"].restart().unwrap();
    wait_clean(world.lab.hosts(), SOON).unwrap();
    wait_answers(&client.workload, WEB[0].parse().unwrap(), &["two"]).unwrap();
}

#[test]
fn policies_of_the_api_server_hold_by_labels_that_are_changed_there() {
    let world = start();
    let (h1, h2) = (&world.lab["h1"], &world.lab["h2"]);
    world.api.put(&policy());
    for host in ["h1", "h2"] {
        world.wait_object(host, &["netpol", "db", "-n", "shop"], |it| it["kind"] == "NetworkPolicy");
    }
    // Known to the API server before it is attached: the labels are there from the first packet on.
    world.api.put(&pod("h2", "db-0", "uid-db", "db"));
    world.api.put(&pod("h1", "client", "uid-client", "web"));
    // A pod of a node says nothing on others.
    world.api.put(&pod("h1", "stray", "uid-stray", "api"));
    let of_node = |host: &Host, pod: &Attached| -> Result<Vec<String>> {
        let all = rows(host, &["endpoints"])?;
        let has = |row: &&Value| text(&row["addresses"][0]).starts_with(&format!("{}/", pod.addresses[0]));
        Ok(strings(&all.iter().find(has).context("no endpoint")?["undecided"]))
    };
    let db = add(h2, "db", "db-0", "uid-db");
    let client = add(h1, "client", "client", "uid-client");
    let _server = db.workload.tcp_echo(5432).unwrap();
    let _other = db.workload.tcp_echo(80).unwrap();
    wait_for("the labels of the server", || of_node(h1, &db).is_ok_and(|it| it.is_empty()));
    assert!(refused(&client.workload, &db.addresses, 5432));

    // A changed label is in force at once, in both directions.
    for (app, passes) in [("api", true), ("web", false), ("api", true)] {
        let began = Instant::now();
        world.api.put(&pod("h1", "client", "uid-client", app));
        let to = SocketAddr::new(db.addresses[0].parse().unwrap(), 5432);
        let passes_now = || {
            let connect = || TcpStream::connect_timeout(&to, Duration::from_millis(50)).is_ok();
            client.workload.run(connect).unwrap()
        };
        wait_for(&format!("app={app}"), || passes_now() == passes);
        println!("app={app} was in force on the other host {:?} after the API's change", began.elapsed());
        if passes {
            assert!(connects(&client.workload, &db.addresses, 5432));
        } else {
            assert!(refused(&client.workload, &db.addresses, 5432));
        }
    }
    // The policy names the port by the pod's name for it.
    assert!(refused(&client.workload, &db.addresses, 80));

    // A pod of which the API server has not spoken is isolated where a policy might select it.
    let unknown = add(h2, "unknown", "unknown", "uid-unknown");
    let _server = unknown.workload.tcp_echo(5432).unwrap();
    assert!(refused(&client.workload, &unknown.addresses, 5432));
    assert_eq!(of_node(h2, &unknown).unwrap(), ["ingress"]);
    // What it says of another pod of the name is not about this one.
    world.api.put(&pod("h2", "unknown", "uid-other", "web"));
    world.api.put(&pod("h2", "known", "uid-known", "web"));
    let known = add(h2, "known", "known", "uid-known");
    let _known = known.workload.tcp_echo(5432).unwrap();
    wait_for("a pod that no policy selects", || connects(&client.workload, &known.addresses, 5432));
    assert!(refused(&client.workload, &unknown.addresses, 5432));
    world.api.put(&pod("h2", "unknown", "uid-unknown", "web"));
    wait_for("the pod to be known", || connects(&client.workload, &unknown.addresses, 5432));

    // A pod whose object cannot be read is isolated, too, and named.
    let mut odd = pod("h2", "unknown", "uid-unknown", "web");
    odd["metadata"]["labels"]["bad key!"] = "x".into();
    world.api.put(&odd);
    wait_for("the pod to be isolated", || refused(&client.workload, &unknown.addresses, 5432));
    let named = problems(h2, "OVL-E090").unwrap();
    assert_eq!(text(&named[0]["object"]), "Pod shop/unknown");
    world.api.put(&pod("h2", "unknown", "uid-unknown", "web"));
    wait_for("the pod to be readable", || connects(&client.workload, &unknown.addresses, 5432));

    // The labels outlive ovld, and a pod that is gone at the API server keeps them while it is still there.
    world.api.delete("pods", "shop", "client").unwrap();
    world.lab["h1"].restart().unwrap();
    wait_for("the labels after a restart", || connects(&client.workload, &db.addresses, 5432));
    assert_eq!(of_node(h2, &client).unwrap(), [""; 0]);

    // A policy that ovl cannot read lets nothing pass.
    let mut strange = policy();
    strange["spec"]["ingress"][0]["until"] = "tomorrow".into();
    world.api.put(&strange);
    wait_for("the policy to isolate", || refused(&client.workload, &db.addresses, 5432));
    world.api.delete("networkpolicies", "shop", "db").unwrap();
    wait_for("no policy", || connects(&client.workload, &db.addresses, 80));
    wait_clean(world.lab.hosts(), SOON).unwrap();
}

#[test]
fn network_goes_on_without_the_api_server_and_another_host_takes_over() {
    let mut world = start();
    let server = attach(&world.lab["h2"], "server", "pods", &[]).unwrap();
    let client = attach(&world.lab["h1"], "client", "pods", &[]).unwrap();
    let _server = NamedServer::start(&server.workload, "server", 8080).unwrap();
    world.api.put(&web());
    world.api.put(&slice("web-4", "h2", &server.addresses()[0]));
    world.api.put(&policy());
    let to: SocketAddr = WEB[0].parse().unwrap();
    wait_answers(&client.workload, to, &["server"]).unwrap();

    // Watches that are cut, forgotten versions, bookmarks: nothing is missed.
    let mut extra = web();
    for (n, fault) in ["cut", "forget", "bookmark and cut"].into_iter().enumerate() {
        match fault {
            "cut" => world.api.cut_watches(),
            "forget" => world.api.forget_history(),
            _ => {
                world.api.bookmark();
                world.api.cut_watches();
            }
        }
        extra["metadata"]["name"] = format!("extra-{n}").into();
        extra["spec"]["clusterIP"] = format!("10.96.0.8{n}").into();
        extra["spec"]["clusterIPs"] = json!([format!("10.96.0.8{n}"), format!("fd00:10:96::8{n}")]);
        world.api.put(&extra);
        let name = format!("extra-{n}");
        world.wait_object("h1", &["svc", &name, "-n", "shop"], |it| it["kind"] == "Service");
    }
    // A list of a server that is behind undoes nothing.
    world.api.freeze_lists(true);
    world.api.delete("services", "shop", "extra-0").unwrap();
    extra["metadata"]["name"] = "late".into();
    extra["spec"]["clusterIP"] = "10.96.0.89".into();
    extra["spec"]["clusterIPs"] = json!(["10.96.0.89", "fd00:10:96::89"]);
    world.api.put(&extra);
    world.wait_object("h2", &["svc", "late", "-n", "shop"], |it| it["kind"] == "Service");
    world.wait_gone("h2", &["svc", "extra-0", "-n", "shop"]);
    world.api.forget_history();
    let lists = |world: &World| {
        let requests = world.api.requests();
        requests.iter().filter(|(plural, watch, _)| plural == "services" && !watch).count()
    };
    let before = lists(&world);
    wait_for("lists that are behind", || lists(&world) > before + 1);
    world.wait_object("h2", &["svc", "late", "-n", "shop"], |it| it["kind"] == "Service");
    world.wait_gone("h2", &["svc", "extra-0", "-n", "shop"]);
    world.api.freeze_lists(false);

    // The API server goes away. Everything goes on, restarts of ovld included, and the problem is named.
    world.api.set_away(true);
    wait_for("the problem", || problems(&world.lab["h1"], "OVL-E091").unwrap().len() == 1);
    for host in world.lab.hosts() {
        host.restart().unwrap();
        wait_answers(&client.workload, to, &["server"]).unwrap();
        world.wait_object(host.name(), &["svc", "late", "-n", "shop"], |it| {
            it["spec"]["clusterIP"] == "10.96.0.89"
        });
    }
    let said = ctl_error(&world.lab["h1"], &["delete", "svc", "late", "-n", "shop"]).unwrap();
    assert_contains(&said, &["mirrored"]);
    // What was deleted meanwhile is found when it is back.
    world.api.delete("services", "shop", "late").unwrap();
    world.api.set_away(false);
    for host in ["h1", "h2"] {
        world.wait_gone(host, &["svc", "late", "-n", "shop"]);
    }
    wait_for("no problem", || {
        world.lab.hosts().iter().all(|host| problems(host, "OVL-E091").unwrap().is_empty())
    });

    // ovl-kube of the host that mirrors is killed: the other one takes over.
    let acting = world.wait_mirror(&[0, 1]);
    let other = 1 - acting;
    world.kubes[acting].kill().unwrap();
    let began = Instant::now();
    world.api.put(&slice("web-4", "h2", "10.60.99.99"));
    world.api.delete("services", "shop", "extra-1").unwrap();
    let host = world.lab.hosts()[acting].clone();
    wait_for("the change on the host of the killed one", || {
        host.ctl(&["get", "svc", "extra-1", "-n", "shop"]).unwrap().code() == Some(1)
    });
    let after = began.elapsed();
    println!("taken over after {after:?}");
    assert!(after < TAKEN_OVER, "{after:?}");
    assert_eq!(world.wait_mirror(&[other]), other);
    wait_for("the change of the slice", || {
        let found = host.ctl_json(&["get", "endpointslice", "web-4", "-n", "shop"]).unwrap();
        found["endpoints"][0]["addresses"][0] == "10.60.99.99"
    });
    wait_clean(world.lab.hosts(), SOON).unwrap();
}

/// A host that is cut off mirrors an earlier state, and deletes what is there again, after the other host has mirrored the
/// later states. When they meet, the later ones hold on both.
#[test]
fn mirror_that_is_behind_undoes_nothing_when_hosts_meet_again() {
    let mut world = start();
    let old = world.api.put(&web());
    world.api.put(&policy());
    for host in ["h1", "h2"] {
        world.wait_object(host, &["svc", "web", "-n", "shop"], |it| it["kind"] == "Service");
        world.wait_object(host, &["netpol", "db", "-n", "shop"], |it| it["kind"] == "NetworkPolicy");
    }
    world.lab.partition(&[&["h1"], &["h2"]]).unwrap();
    // Each takes the other one for dead, and its own turn.
    wait_until(SOON, "both hosts to mirror", || -> Result<()> {
        ensure!(world.kubes.iter().all(Kube::mirrors));
        Ok(())
    })
    .unwrap();
    world.kubes[1].kill().unwrap();
    let mut later = web();
    later["metadata"]["labels"]["tier"] = "later".into();
    world.api.put(&later);
    world.api.delete("networkpolicies", "shop", "db").unwrap();
    world.api.put(&policy());
    world.wait_object("h1", &["svc", "web", "-n", "shop"], |it| it["metadata"]["labels"]["tier"] == "later");
    // On the other host, a mirror that is behind writes now, so with later stamps.
    let h2 = &world.lab["h2"];
    let mut turn = Control::open(h2).unwrap();
    let mut acts = turn.ask(&json!({ "request": "mirror-turn" })).unwrap();
    while acts["value"]["acts"] != true {
        acts = turn.next_reply().unwrap();
    }
    let mut stale = web();
    stale["apiVersion"] = "v1".into();
    stale["metadata"]["labels"]["tier"] = "stale".into();
    stale["metadata"]["resourceVersion"] = (old + 1).to_string().into();
    let mut control = Control::open(h2).unwrap();
    let staged = json!({ "request": "stage", "documents": [{ "file": "", "line": 1, "value": stale }] });
    assert_eq!(control.ask(&staged).unwrap()["reply"], "done");
    let key = json!({ "kind": "NetworkPolicy", "name": { "namespace": "shop", "name": "db" } });
    let mirror = json!({
        "request": "mirror", "cluster": CLUSTER, "deleted": [{ "key": key, "version": old + 2 }],
    });
    let reply = control.ask(&mirror).unwrap();
    assert_eq!((&reply["reply"], &reply["value"]["changed"]), (&json!("mirrored"), &json!(2)), "{reply}");
    world.wait_object("h2", &["svc", "web", "-n", "shop"], |it| it["metadata"]["labels"]["tier"] == "stale");
    world.wait_gone("h2", &["netpol", "db", "-n", "shop"]);
    drop(turn);

    world.lab.heal().unwrap();
    for host in ["h1", "h2"] {
        world.wait_object(host, &["svc", "web", "-n", "shop"], |it| {
            it["metadata"]["labels"]["tier"] == "later"
        });
        world.wait_object(host, &["netpol", "db", "-n", "shop"], |it| it["kind"] == "NetworkPolicy");
    }
    // It stays so, and both have the same.
    wait_clean(world.lab.hosts(), SOON).unwrap();
    for host in ["h1", "h2"] {
        let found = world.lab[host].ctl_json(&["get", "svc", "web", "-n", "shop"]).unwrap();
        assert_eq!(text(&found["metadata"]["labels"]["tier"]), "later", "{host}");
    }
}
