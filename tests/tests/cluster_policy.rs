//! ClusterNetworkPolicies: connectivity as in the conformance tests of the network-policy-api project (priorities, actions,
//! tiers beside NetworkPolicies, protocols, networks), and those of an API server.

#![allow(clippy::unwrap_used, reason = "tests, and helpers of tests")]

use std::net::{IpAddr, SocketAddr, TcpStream};
use std::time::Duration;

use anyhow::{Result, ensure};
use netns_lab::{Host, LabConfig, wait_until};
use ovl_manifest::yaml;
use ovl_tests::kubernetes::{ApiServer, Kube, rights};
use ovl_tests::policy::{PolicyLab, Proto, policy, port_name};
use ovl_tests::routed::create_routed_network;
use ovl_tests::{Attached, SOON, assert_contains, attach, rows, start_lab_with, strings, text, wait_clean};
use serde_json::{Value, json};

/// An API server that lacks the kind is asked for it this often.
const ABSENT: Duration = Duration::from_secs(15);

fn selector(key: &str, value: &str) -> Value {
    json!({"matchLabels": {key: value}})
}

/// Returns a ClusterNetworkPolicy about the namespaces with a label `ns`, or about pods `[ns, pod]`.
fn cluster(name: &str, tier: &str, priority: u16, subject: &[&str], rules: Value) -> Value {
    let mut spec = json!({"tier": tier, "priority": priority, "subject": peer(subject)});
    for (direction, rules) in rules.as_object().unwrap() {
        spec[direction] = rules.clone();
    }
    json!({
        "apiVersion": "policy.networking.k8s.io/v1alpha2", "kind": "ClusterNetworkPolicy",
        "metadata": {"name": name}, "spec": spec,
    })
}

/// Returns a subject or peer: all namespaces, the namespaces with a label `ns`, or pods of them with a label `pod`.
fn peer(of: &[&str]) -> Value {
    match of {
        [] => json!({"namespaces": {}}),
        [ns] => json!({"namespaces": selector("ns", ns)}),
        [ns, pod, ..] => {
            json!({"pods": {"namespaceSelector": selector("ns", ns), "podSelector": selector("pod", pod)}})
        }
    }
}

fn from(action: &str, peers: &[&[&str]]) -> Value {
    json!({"action": action, "from": peers.iter().map(|of| peer(of)).collect::<Vec<_>>()})
}

fn to(action: &str, peers: &[&[&str]]) -> Value {
    json!({"action": action, "to": peers.iter().map(|of| peer(of)).collect::<Vec<_>>()})
}

fn at(mut rule: Value, protocols: Value) -> Value {
    rule["protocols"] = protocols;
    rule
}

fn to_nodes(action: &str, selector: Value) -> Value {
    json!({"action": action, "to": [{"nodes": selector}]})
}

/// Kinds of policies, with a name and the objects of each.
fn kinds(world: &PolicyLab) -> Vec<(&'static str, Vec<Value>)> {
    let address = |namespace: &str, name: &str, v4: bool| {
        let found = world.pod(namespace, name).unwrap().address(v4).unwrap();
        format!("{found}/{}", if v4 { 32 } else { 128 })
    };
    // To policies, nodes are addresses, whatever has these.
    let node = |name: &str, role: &str, pods: &[(&str, &str)]| {
        let pods = pods.iter().map(|(namespace, name)| world.pod(namespace, name).unwrap());
        let addresses = pods.flat_map(|pod| [true, false].map(|v4| pod.address(v4).unwrap()));
        let addresses = addresses.map(|address| json!({"type": "InternalIP", "address": address}));
        let addresses = addresses.chain([json!({"type": "Hostname", "address": name})]);
        json!({
            "apiVersion": "v1", "kind": "Node", "metadata": {"name": name, "labels": {"role": role}},
            "status": {"addresses": addresses.collect::<Vec<_>>()},
        })
    };
    let closed = || policy("x", "closed", json!({"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}));
    let open = || {
        policy(
            "x",
            "open",
            json!({"podSelector": {}, "ingress": [{}], "egress": [{}], "policyTypes": ["Ingress", "Egress"]}),
        )
    };
    vec![
        (
            "Admin denies ingress and egress, and a pod of the subject is another one's peer",
            vec![cluster(
                "deny",
                "Admin",
                50,
                &["x"],
                json!({
                    "ingress": [from("Deny", &[&["y"], &["z", "a"]])],
                    "egress": [to("Deny", &[&["x", "b"]])],
                }),
            )],
        ),
        (
            "the first rule that fits decides",
            vec![cluster(
                "order",
                "Admin",
                50,
                &["x"],
                json!({
                    "ingress": [from("Accept", &[&["y", "a"]]), from("Deny", &[&["y"]]), from("Accept", &[&["y", "b"]])],
                }),
            )],
        ),
        (
            "the lowest priority number decides",
            vec![
                cluster("a-late", "Admin", 60, &["x"], json!({"ingress": [from("Accept", &[&[]])]})),
                cluster(
                    "b-early",
                    "Admin",
                    0,
                    &["x", "a"],
                    json!({"ingress": [from("Deny", &[&["y"], &["z"]])]}),
                ),
                cluster("c-middle", "Admin", 30, &["x"], json!({"ingress": [from("Deny", &[&["z"]])]})),
            ],
        ),
        (
            "Admin denies what a NetworkPolicy allows",
            vec![
                open(),
                cluster(
                    "deny",
                    "Admin",
                    10,
                    &["x"],
                    json!({
                        "ingress": [from("Deny", &[&["y"]])], "egress": [to("Deny", &[&["z"]])],
                    }),
                ),
            ],
        ),
        (
            "Admin accepts what a NetworkPolicy does not allow",
            vec![
                closed(),
                cluster(
                    "accept",
                    "Admin",
                    10,
                    &["x"],
                    json!({
                        "ingress": [from("Accept", &[&["y"]])], "egress": [to("Accept", &[&["z", "b"]])],
                    }),
                ),
            ],
        ),
        (
            "Pass leaves the decision to NetworkPolicies",
            vec![
                policy(
                    "x",
                    "some",
                    json!({"podSelector": selector("pod", "a"),
                    "ingress": [{"from": [{"namespaceSelector": selector("ns", "y")}]}]}),
                ),
                cluster(
                    "pass",
                    "Admin",
                    10,
                    &["x", "a"],
                    json!({"ingress": [from("Pass", &[&["y"], &["z", "a"]])]}),
                ),
                cluster("deny", "Admin", 20, &["x"], json!({"ingress": [from("Deny", &[&[]])]})),
                cluster("base", "Baseline", 0, &["x"], json!({"ingress": [from("Deny", &[&[]])]})),
            ],
        ),
        (
            "Pass leaves the decision to Baseline where no NetworkPolicy isolates",
            vec![
                cluster(
                    "pass",
                    "Admin",
                    10,
                    &["x"],
                    json!({"ingress": [from("Pass", &[&["y"], &["z", "a"]])]}),
                ),
                cluster("deny", "Admin", 20, &["x"], json!({"ingress": [from("Deny", &[&["z"]])]})),
                cluster(
                    "base",
                    "Baseline",
                    0,
                    &["x"],
                    json!({"ingress": [from("Deny", &[&["y", "b"], &["z", "a"]])]}),
                ),
            ],
        ),
        (
            "Baseline decides for pods that no NetworkPolicy isolates",
            vec![
                policy("x", "some", json!({"podSelector": selector("pod", "a"), "ingress": [{}]})),
                cluster(
                    "base",
                    "Baseline",
                    10,
                    &[],
                    json!({
                        "ingress": [from("Accept", &[&["z", "c"]]), from("Pass", &[&["z", "b"]]), from("Deny", &[&[]])],
                    }),
                ),
                cluster("late", "Baseline", 11, &["y"], json!({"ingress": [from("Deny", &[&[]])]})),
            ],
        ),
        (
            "tenants: only namespaces of the same label reach each other",
            ["x", "y", "z"]
                .map(|ns| {
                    cluster(
                        ns,
                        "Admin",
                        5,
                        &[ns],
                        json!({
                            "ingress": [from("Pass", &[&[ns]]), from("Deny", &[&[]])],
                            "egress": [to("Pass", &[&[ns]]), to("Deny", &[&[]])],
                        }),
                    )
                })
                .into(),
        ),
        (
            "ports, ranges and named ports of TCP, UDP and SCTP",
            vec![cluster(
                "ports",
                "Admin",
                10,
                &["x"],
                json!({"ingress": [
                    at(from("Accept", &[&["y"]]), json!([
                        {"tcp": {"destinationPort": {"number": 80}}},
                        {"udp": {"destinationPort": {"range": {"start": 1, "end": 80}}}},
                        {"destinationNamedPort": port_name(81, Proto::Sctp)},
                    ])),
                    from("Deny", &[&["y"]]),
                ], "egress": [
                    at(to("Deny", &[&["z"]]), json!([
                        {"sctp": {"destinationPort": {"range": {"start": 80, "end": 81}}}},
                        {"destinationNamedPort": port_name(81, Proto::Tcp)},
                    ])),
                ]}),
            )],
        ),
        (
            "networks",
            vec![cluster(
                "nets",
                "Admin",
                10,
                &["x"],
                json!({"egress": [
                    {"action": "Accept", "to": [{"networks": [address("y", "b", true), address("y", "c", false)]}]},
                    {"action": "Deny", "to": [{"networks": ["10.60.0.0/16", "fd60::/48"]}],
                     "protocols": [{"tcp": {"destinationPort": {"number": 80}}}, {"udp": {"destinationPort": {"number": 81}}}]},
                ]}),
            )],
        ),
        (
            "domain names for which nothing was told: Accept fits nothing, and the rest of the rule holds",
            vec![cluster(
                "names",
                "Admin",
                10,
                &["x", "a"],
                json!({"egress": [
                    {"action": "Accept", "to": [{"domainNames": ["www.ovl.test"]}, peer(&["y"])]},
                    {"action": "Deny", "to": [{"networks": ["0.0.0.0/0", "::/0"]}]},
                ]}),
            )],
        ),
        (
            "nodes: the addresses of those that the selector chooses, and the rest of the rule holds",
            vec![
                node("db-1", "db", &[("y", "b")]),
                node("db-2", "db", &[("z", "a")]),
                node("web-1", "web", &[("x", "c"), ("z", "b")]),
                cluster(
                    "nodes",
                    "Admin",
                    10,
                    &["x", "a"],
                    json!({"egress": [
                        at(to_nodes("Accept", selector("role", "db")), json!([
                            {"tcp": {"destinationPort": {"number": 80}}},
                            {"udp": {"destinationPort": {"number": 81}}},
                        ])),
                        to_nodes("Deny", json!({"matchExpressions": [{"key": "role", "operator": "In", "values": ["db", "web"]}]})),
                        to("Accept", &[&["y"]]),
                    ]}),
                ),
                cluster(
                    "all",
                    "Baseline",
                    10,
                    &["x", "b"],
                    json!({"egress": [
                        {"action": "Pass", "to": [{"nodes": selector("role", "web")}, peer(&["z", "c"])]},
                        to_nodes("Deny", json!({})),
                    ]}),
                ),
                // Nothing has this label.
                cluster(
                    "none",
                    "Admin",
                    20,
                    &["x", "c"],
                    json!({"egress": [to_nodes("Deny", selector("role", "none"))]}),
                ),
            ],
        ),
        (
            "nodes while no Node is known: Deny denies everything",
            vec![cluster(
                "nodes",
                "Baseline",
                10,
                &["x", "a"],
                json!({"egress": [
                    to("Accept", &[&["y"]]),
                    {"action": "Deny", "to": [{"nodes": {}}, peer(&["z"]), peer(&["x"])]},
                ]}),
            )],
        ),
        (
            "more policies than slots",
            (0..7)
                .map(|n| {
                    let name = format!("p{n}");
                    let port = json!([{"tcp": {"destinationPort": {"number": 75 + n}}}]);
                    cluster(
                        &name,
                        "Admin",
                        7 - n,
                        &["x"],
                        json!({"ingress": [at(from("Deny", &[&[]]), port)]}),
                    )
                })
                .collect(),
        ),
    ]
}

fn assert_truth_tables(mode: &str) {
    let mut world = PolicyLab::new(mode, &[]).unwrap();
    for (kind, policies) in kinds(&world) {
        world.apply(&policies).unwrap();
        world.wait_settled(kind).unwrap();
        for policy in &policies {
            let meta = &policy["metadata"];
            let kind = text(&policy["kind"]).to_lowercase();
            world.delete(&kind, &text(&meta["namespace"]), &text(&meta["name"])).unwrap();
        }
    }
    world.wait_settled("full connectivity again").unwrap();
    wait_clean(world.lab.hosts(), SOON).unwrap();
}

#[test]
fn truth_tables_of_cluster_policies_on_a_routed_network() {
    assert_truth_tables("l3");
}

#[test]
fn truth_tables_of_cluster_policies_on_a_switched_network() {
    assert_truth_tables("l2");
}

fn connects(from: &Attached, to: &Attached, port: u16) -> bool {
    to.addresses().iter().all(|address| connects_to(from, address.parse().unwrap(), port))
}

fn connects_to(from: &Attached, to: IpAddr, port: u16) -> bool {
    let target = SocketAddr::new(to, port);
    from.workload.run(|| TcpStream::connect_timeout(&target, Duration::from_secs(1)).is_ok()).unwrap()
}

fn wait_for(what: &str, within: Duration, condition: impl Fn() -> bool) {
    wait_until(within, what, || -> Result<()> {
        ensure!(condition());
        Ok(())
    })
    .unwrap();
}

/// Objects that a host says are not in force.
fn not_in_force(host: &Host) -> Vec<(String, String)> {
    let status = host.ctl_json(&["status"]).unwrap();
    let all = status["problems"].as_array().unwrap().iter().filter(|it| it["code"] == "OVL-E090");
    all.map(|it| (text(&it["object"]), text(&it["message"]))).collect()
}

#[test]
fn cluster_policies_of_the_api_server_are_in_force_once_it_has_the_kind() {
    let lab = start_lab_with(LabConfig::hosts(2)).unwrap();
    create_routed_network(&lab, "pods", &["--subnet", "10.60.0.0/16", "--subnet", "fd60::/48"]).unwrap();
    let mut api = ApiServer::new();
    api.define("clusternetworkpolicies", false);
    let rbac = yaml::read(include_str!("../../packaging/kubernetes/manifests/rbac.yaml")).unwrap();
    let roles = rbac.iter().filter(|it| it.value["kind"] == "ClusterRole" || it.value["kind"] == "Role");
    api.set_rights(roles.flat_map(|role| rights(&role.value)).collect());
    let mut kubes: Vec<Kube> = lab.hosts().iter().map(|host| Kube::start(&mut api, host).unwrap()).collect();
    let web = attach(&lab["h1"], "web", "pods", &["--label", "app=web"]).unwrap();
    let client = attach(&lab["h2"], "client", "pods", &["--label", "app=client"]).unwrap();
    let _servers = [80, 81].map(|port| web.workload.tcp_echo(port).unwrap());
    wait_for("a host to mirror", SOON, || kubes.iter().any(Kube::mirrors));
    wait_for("objects of the API server", SOON, || {
        let found = lab["h2"].ctl_json(&["get", "ns"]).unwrap();
        found.to_string().contains("kube-system")
    });
    // A server without the kind is no trouble.
    for (kube, host) in kubes.iter_mut().zip(lab.hosts()) {
        kube.check_running().unwrap();
        assert!(!kube.log().contains("ClusterNetworkPolicy"), "{}", kube.log());
        let status = host.ctl_json(&["status"]).unwrap();
        assert!(!status.to_string().contains("OVL-E091"), "{status}");
    }

    api.define("clusternetworkpolicies", true);
    let subject = json!({"pods": {"namespaceSelector": {}, "podSelector": selector("app", "web")}});
    let clients = json!([{"pods": {"namespaceSelector": {}, "podSelector": selector("app", "client")}}]);
    let deny = |port: u16| {
        json!({
            "kind": "ClusterNetworkPolicy", "metadata": { "name": "no-clients" },
            "spec": { "tier": "Admin", "priority": 3, "subject": subject, "ingress": [{
                "name": "keep out", "action": "Deny", "from": clients,
                "protocols": [{ "tcp": { "destinationPort": { "number": port } } }],
            }] },
        })
    };
    api.put(&deny(80));
    wait_for("the policy to be in force", ABSENT + SOON, || !connects(&client, &web, 80));
    assert!(connects(&client, &web, 81));
    let found = lab["h1"].ctl_ok(&["get", "cnp", "-o", "wide"]).unwrap();
    assert_contains(&found, &["no-clients", "Admin", "3", "kubernetes"]);

    // The reasons.
    let explained = rows(&lab["h2"], &["policy", "explain", "client", "web:80"]).unwrap();
    assert_eq!(explained[0]["passes"], json!(false), "{explained:?}");
    assert_eq!(explained[0]["ingress"]["rule"], json!(1));
    assert_contains(
        &text(&explained[0]["ingress"]["why"]),
        &["ClusterNetworkPolicy no-clients", "'keep out'", "Deny", "app=client", "TCP 80"],
    );
    let explained = rows(&lab["h2"], &["policy", "explain", "client", "web:81"]).unwrap();
    assert_eq!(explained[0]["passes"], json!(true), "{explained:?}");
    let drops = rows(&lab["h1"], &["policy", "drops"]).unwrap();
    let dropped = drops.iter().find(|drop| drop["port"] == json!(80)).unwrap();
    assert_eq!(strings(&dropped["policies"]), ["no-clients"], "{drops:?}");
    let listed = rows(&lab["h1"], &["policy", "ls"]).unwrap();
    assert_eq!(
        (text(&listed[0]["tier"]), &listed[0]["endpoints"], text(&listed[0]["name"])),
        ("Admin".to_owned(), &json!(1), "no-clients".to_owned())
    );
    assert!(listed[0]["refused"].as_u64() > Some(0), "{listed:?}");

    // A change, while a connection that it forbids is open.
    let address = SocketAddr::new(web.addresses()[0].parse().unwrap(), 81);
    let open = client.workload.run(|| TcpStream::connect_timeout(&address, SOON)).unwrap().unwrap();
    api.put(&deny(81));
    wait_for("the change", SOON, || connects(&client, &web, 80) && !connects(&client, &web, 81));
    drop(open);

    // What ovl cannot read denies, and the object says so.
    let mut strange = deny(81);
    strange["spec"]["ingress"][0]["from"] = json!([{ "planets": {} }]);
    api.put(&strange);
    wait_for("everything to be denied", SOON, || {
        !connects(&client, &web, 80) && !connects(&client, &web, 81)
    });
    wait_for("the object to be named", SOON, || {
        lab.hosts().iter().flat_map(not_in_force).any(|(object, message)| {
            object == "ClusterNetworkPolicy no-clients" && message.contains("deny everything")
        })
    });
    wait_for("an Event", SOON, || {
        api.all("events").iter().any(|event| event["regarding"]["kind"] == "ClusterNetworkPolicy")
    });

    api.delete("clusternetworkpolicies", "", "no-clients").unwrap();
    wait_for("no policy", SOON, || connects(&client, &web, 80) && connects(&client, &web, 81));
    wait_clean(lab.hosts(), SOON).unwrap();
}

#[test]
fn nodes_of_the_api_server_are_peers_by_their_labels() {
    let lab = start_lab_with(LabConfig::hosts(3)).unwrap();
    create_routed_network(&lab, "pods", &["--subnet", "10.60.0.0/16", "--subnet", "fd60::/48"]).unwrap();
    let mut api = ApiServer::new();
    let addresses: Vec<IpAddr> = lab.hosts().iter().map(|host| host.address().unwrap()).collect();
    let node = |n: usize, role: &str| {
        json!({
            "kind": "Node", "metadata": { "name": format!("h{}", n + 1), "labels": { "role": role } },
            "status": {
                "addresses": [
                    { "type": "Hostname", "address": format!("h{}", n + 1) },
                    { "type": "InternalIP", "address": addresses[n].to_string() },
                ],
            },
        })
    };
    for (n, role) in ["db", "web", "web"].into_iter().enumerate() {
        api.put(&node(n, role));
    }
    let subject = json!({"pods": {"namespaceSelector": {}, "podSelector": selector("app", "client")}});
    api.put(&json!({
        "kind": "ClusterNetworkPolicy", "metadata": { "name": "nodes" },
        "spec": { "tier": "Admin", "priority": 3, "subject": subject, "egress": [
            { "action": "Accept", "to": [{ "nodes": {} }],
              "protocols": [{ "tcp": { "destinationPort": { "number": 81 } } }] },
            { "action": "Deny", "to": [{ "nodes": selector("role", "db") }] },
        ] },
    }));
    let _kubes: Vec<Kube> = lab.hosts().iter().map(|host| Kube::start(&mut api, host).unwrap()).collect();
    let client = attach(&lab["h2"], "client", "pods", &["--label", "app=client"]).unwrap();
    let other = attach(&lab["h2"], "other", "pods", &[]).unwrap();
    let _servers: Vec<_> =
        ["h1", "h3"].into_iter().flat_map(|h| [80, 81].map(|port| lab[h].tcp_echo(port).unwrap())).collect();
    let refuses = |n: usize| !connects_to(&client, addresses[n], 80);
    wait_for("the policy to be in force", SOON, || refuses(0) && !refuses(2));
    assert!(connects_to(&client, addresses[0], 81) && connects_to(&other, addresses[0], 80));
    let listed = lab["h3"].ctl_ok(&["get", "nodes", "-o", "wide"]).unwrap();
    assert_contains(&listed, &["h1", &addresses[0].to_string(), "role=db", "kubernetes"]);

    // A changed label, and a deleted Node.
    api.put(&node(0, "web"));
    api.put(&node(2, "db"));
    wait_for("the labels to change", SOON, || !refuses(0) && refuses(2));
    api.delete("nodes", "", "h3").unwrap();
    wait_for("the Node to be gone", SOON, || !refuses(2));
    wait_clean(lab.hosts(), SOON).unwrap();
}
