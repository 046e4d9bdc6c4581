//! What `ovl-kube` writes to a Kubernetes API server, with the rights of `packaging/kubernetes/manifests/rbac.yaml`: the addresses of
//! LoadBalancers, Events, and the condition of the Node. The API server is the tests' own.

#![allow(clippy::unwrap_used, reason = "tests, and helpers of tests")]

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use netns_lab::{Lab, LabConfig, Underlay, wait_until};
use ovl_manifest::yaml;
use ovl_tests::kubernetes::{ApiServer, Kube, rights};
use ovl_tests::routed::create_routed_network;
use ovl_tests::service::{NamedServer, wait_answers};
use ovl_tests::{SOON, assert_contains, attach, start_lab_with, text, wait_clean};
use serde_json::{Value, json};

/// Two addresses of each family, of which the first one of IPv4 is asked for by name.
const POOL: &str = "load_balancer_pool = [\"192.168.77.224/31\", \"fd77::e0/127\"]";
/// Within this time a restart of ovld is over, and an outage is said.
const OUTAGE: Duration = Duration::from_secs(30);

struct World {
    lab: Lab,
    api: ApiServer,
    kubes: Vec<Kube>,
}

/// Two hosts, an API server that lets its clients do what the ClusterRole says, and `ovl-kube` on each host.
fn start() -> World {
    let lab = start_lab_with(LabConfig::hosts(2).underlay(Underlay::Dual).config(POOL)).unwrap();
    create_routed_network(&lab, "pods", &["--subnet", "10.60.0.0/16", "--subnet", "fd60::/64"]).unwrap();
    let mut api = ApiServer::new();
    let rbac = yaml::read(include_str!("../../packaging/kubernetes/manifests/rbac.yaml")).unwrap();
    let roles = rbac.iter().filter(|it| it.value["kind"] == "ClusterRole" || it.value["kind"] == "Role");
    api.set_rights(roles.flat_map(|role| rights(&role.value)).collect());
    api.put(&json!({ "kind": "Namespace", "metadata": { "name": "shop" } }));
    for name in ["h1", "h2"] {
        api.put(&json!({ "kind": "Node", "metadata": { "name": name }, "status": {
            "conditions": [{ "type": "Ready", "status": "True" }],
        } }));
    }
    let kubes = lab.hosts().iter().map(|host| Kube::start(&mut api, host).unwrap()).collect();
    World { lab, api, kubes }
}

impl World {
    fn wait(&self, what: &str, within: Duration, condition: impl Fn() -> Result<()>) {
        wait_until(within, what, condition).unwrap();
    }

    /// Waits until the status of a Service at the API server has these addresses.
    fn wait_addresses(&self, name: &str, want: &[&str]) {
        self.wait(&format!("{want:?} in the status of {name}"), SOON, || {
            let found = self.addresses(name);
            ensure!(found == want, "{found:?}");
            Ok(())
        });
    }

    fn addresses(&self, name: &str) -> Vec<String> {
        let found = self.api.get("services", "shop", name).unwrap();
        let all = found["status"]["loadBalancer"]["ingress"].as_array().cloned().unwrap_or_default();
        all.iter().map(|ingress| text(&ingress["ip"])).collect()
    }

    /// Waits until there is exactly one Event about an object with these words, and returns it.
    fn wait_event(&self, object: &str, words: &[&str]) -> Value {
        wait_until(SOON, &format!("an Event about {object} with {words:?}"), || {
            let all = self.api.all("events");
            let about: Vec<&Value> = all
                .iter()
                .filter(|it| it["regarding"]["name"] == object)
                .filter(|it| words.iter().all(|word| text(&it["note"]).contains(word)))
                .collect();
            ensure!(about.len() == 1, "{about:?} of {all:?}");
            Ok(Some(about[0].clone()))
        })
        .unwrap()
    }

    /// Waits until the condition NetworkUnavailable of a Node has this status, and returns it.
    fn wait_condition(&self, node: &str, status: &str, within: Duration) -> Value {
        wait_until(within, &format!("NetworkUnavailable={status} of {node}"), || {
            let found = self.condition(node);
            ensure!(found["status"] == status, "{found}");
            Ok(Some(found))
        })
        .unwrap()
    }

    fn condition(&self, node: &str) -> Value {
        let found = self.api.get("nodes", "", node).unwrap();
        let all = found["status"]["conditions"].as_array().cloned().unwrap_or_default();
        all.into_iter().find(|it| it["type"] == "NetworkUnavailable").unwrap_or_default()
    }

    fn writes(&self, of: &str) -> usize {
        self.api.writes().iter().filter(|write| write.contains(of)).count()
    }
}

fn balancer(name: &str, address: &str, more: Value) -> Value {
    let mut spec = json!({
        "type": "LoadBalancer", "clusterIP": address, "clusterIPs": [address], "ipFamilies": ["IPv4"],
        "ipFamilyPolicy": "SingleStack", "ports": [{ "port": 80, "targetPort": 8080, "protocol": "TCP" }],
    });
    if let (Some(spec), Value::Object(more)) = (spec.as_object_mut(), more) {
        spec.extend(more);
    }
    json!({
        "kind": "Service", "metadata": { "name": name, "namespace": "shop" }, "spec": spec,
        "status": { "loadBalancer": {} },
    })
}

#[test]
fn load_balancers_get_their_addresses_at_the_api_server_and_what_others_wrote_stays() {
    let mut world = start();
    let server = attach(&world.lab["h2"], "server", "pods", &[]).unwrap();
    let client = attach(&world.lab["h1"], "client", "pods", &[]).unwrap();
    let _server = NamedServer::start(&server.workload, "server", 8080).unwrap();
    world.api.put(&json!({
        "kind": "EndpointSlice", "addressType": "IPv4",
        "metadata": { "name": "web-1", "namespace": "shop", "labels": { "kubernetes.io/service-name": "web" } },
        "endpoints": [{ "addresses": [server.addresses()[0]], "nodeName": "h2", "conditions": { "ready": true } }],
        "ports": [{ "name": "", "port": 8080, "protocol": "TCP" }],
    }));
    let began = Instant::now();
    world.api.put(&balancer("web", "10.96.0.70", json!({ "loadBalancerIP": "192.168.77.224" })));
    world.wait_addresses("web", &["192.168.77.224"]);
    println!("the status was there {:?} after the Service was made", began.elapsed());
    wait_answers(&client.workload, "192.168.77.224:80".parse().unwrap(), &["server"]).unwrap();

    // Another one shares the address, at another port.
    let mut shared = balancer("shared", "10.96.0.76", json!({ "loadBalancerIP": "192.168.77.224" }));
    shared["spec"]["ports"][0]["port"] = 81.into();
    world.api.put(&shared);
    world.wait_addresses("shared", &["192.168.77.224"]);

    // Both families, and the last address of IPv4.
    world.api.put(&balancer(
        "both",
        "10.96.0.71",
        json!({
            "clusterIPs": ["10.96.0.71", "fd00:10:96::71"], "ipFamilies": ["IPv4", "IPv6"],
            "ipFamilyPolicy": "RequireDualStack", "loadBalancerClass": "ovl.io/pool",
        }),
    ));
    world.wait("two addresses of `both`", SOON, || {
        let found = world.addresses("both");
        ensure!(
            found.len() == 2 && found[0] == "192.168.77.225" && found[1].starts_with("fd77::e"),
            "{found:?}"
        );
        Ok(())
    });
    // None is free for another one. It is said once, and it gets one when there is one.
    world.api.put(&balancer("late", "10.96.0.72", json!({})));
    let event = world.wait_event("late", &["load_balancer_pool", "free"]);
    assert_eq!(event["metadata"]["namespace"], "shop");
    assert_eq!((&event["regarding"]["kind"], &event["type"]), (&json!("Service"), &json!("Warning")));
    world.api.delete("services", "shop", "both").unwrap();
    world.wait_addresses("late", &["192.168.77.225"]);

    // Services of another class, and what another program wrote, stay as they are. The addresses are translated.
    let mut other = balancer("other", "10.96.0.73", json!({ "loadBalancerClass": "example.com/lb" }));
    other["status"] = json!({ "loadBalancer": { "ingress": [{ "ip": "203.0.113.9", "ipMode": "VIP" }, { "hostname": "lb.example.com" }] } });
    world.api.put(&other);
    let mut taken = balancer("taken", "10.96.0.74", json!({}));
    taken["status"] = json!({ "loadBalancer": { "ingress": [{ "ip": "203.0.113.10" }] } });
    world.api.put(&taken);
    world.wait("the Services on all hosts", SOON, || {
        for host in world.lab.hosts() {
            let found = host.ctl_json(&["get", "svc", "other", "-n", "shop"])?;
            ensure!(
                found["status"]["loadBalancer"]["ingress"] == json!([{ "ip": "203.0.113.9" }]),
                "{found}"
            );
            host.ctl_json(&["get", "svc", "taken", "-n", "shop"])?;
        }
        Ok(())
    });

    // No LoadBalancer any more.
    let mut changed = world.api.get("services", "shop", "late").unwrap();
    changed["spec"]["type"] = "ClusterIP".into();
    world.api.put(&changed);
    world.wait_addresses("late", &[]);
    world.wait_event("taken", &["another program", "loadBalancerClass"]);
    assert_eq!(world.addresses("taken"), ["203.0.113.10"]);
    assert_eq!(world.writes("/services/other/") + world.writes("/services/taken/"), 0);
    // It had the last address of the pool all the same.
    world.api.delete("services", "shop", "taken").unwrap();

    // Another host takes over, and a restart of ovld: nothing is written again, for nothing differs.
    let before = world.writes("/services/");
    let acting = world.kubes.iter().position(Kube::mirrors).unwrap();
    world.kubes[acting].kill().unwrap();
    world.wait("the other host to mirror", SOON, || {
        ensure!(world.kubes[1 - acting].mirrors());
        Ok(())
    });
    world.lab.hosts()[1 - acting].restart().unwrap();
    world.api.put(&balancer("last", "10.96.0.75", json!({})));
    world.wait_addresses("last", &["192.168.77.225"]);
    assert_eq!(world.writes("/services/"), before + 1, "{:?}", world.api.writes());
    wait_clean(world.lab.hosts(), SOON).unwrap();
}

#[test]
fn refused_objects_have_one_event_each_and_the_node_says_whether_ovld_works() {
    let mut world = start();
    for node in ["h1", "h2"] {
        let condition = world.wait_condition(node, "False", SOON);
        assert_eq!(condition["reason"], "OvldReady");
    }
    // What cannot be done is named at the object, once, however often it is tried again.
    let slice = |name: &str| {
        json!({
            "kind": "EndpointSlice", "addressType": "FQDN", "metadata": { "name": name, "namespace": "shop" },
            "endpoints": [{ "addresses": ["example.com"] }], "ports": [],
        })
    };
    world.api.put(&slice("strange"));
    let event = world.wait_event("strange", &["addressType"]);
    assert_eq!(event["regarding"]["kind"], "EndpointSlice");
    assert_eq!(
        event["regarding"]["uid"],
        world.api.get("endpointslices", "shop", "strange").unwrap()["metadata"]["uid"]
    );
    assert_contains(&text(&event["reportingController"]), &["ovl-kube"]);
    let mut pod = json!({
        "kind": "Pod", "metadata": { "name": "odd", "namespace": "shop", "labels": { "bad key!": "x" } },
        "spec": { "nodeName": "h2", "containers": [] },
    });
    pod["status"] = json!({ "phase": "Running" });
    world.api.put(&pod);
    let event = world.wait_event("odd", &["labels"]);
    assert_eq!((&event["regarding"]["kind"], &event["reportingInstance"]), (&json!("Pod"), &json!("h2")));
    // Many at once are no flood.
    for n in 0..60 {
        world.api.put(&slice(&format!("strange-{n}")));
    }
    world.wait("Events", SOON, || {
        let count = world.api.all("events").len();
        ensure!(count > 20, "{count}");
        Ok(())
    });
    let count = world.api.all("events").len();
    assert!(count <= 40, "{count} Events");

    // Another host takes over and finds the Event: it goes on as a series.
    let acting = world.kubes.iter().position(Kube::mirrors).unwrap();
    world.kubes[acting].kill().unwrap();
    let name = text(&world.wait_event("strange", &["addressType"])["metadata"]["name"]);
    world.wait("the Event to go on", SOON, || {
        let event = world.api.get("events", "shop", &name).unwrap();
        ensure!(event["series"]["count"] == 2, "{event}");
        Ok(())
    });

    // A restart of ovld says nothing at the Node. An outage does, and its end.
    let other = 1 - acting;
    let host = &world.lab.hosts()[other];
    let before = world.condition(host.name());
    host.restart().unwrap();
    wait_clean(std::slice::from_ref(host), SOON).unwrap();
    assert_eq!(world.condition(host.name()), before);
    host.kill9().unwrap();
    let condition = world.wait_condition(host.name(), "True", OUTAGE);
    assert_eq!(condition["reason"], "OvldNotRunning");
    host.start().unwrap();
    world.wait_condition(host.name(), "False", SOON);
    // Of its own Node alone.
    let other_node =
        world.writes("/nodes/").saturating_sub(world.writes(&format!("/nodes/{}/", host.name())));
    assert!(other_node <= 2, "{:?}", world.api.writes());

    // Rights that are missing are named.
    world.api.set_rights(Default::default());
    world.wait("the problem", SOON, || {
        let status = host.ctl_json(&["status"])?;
        let problems = status["problems"].to_string();
        ensure!(problems.contains("OVL-E091"), "{problems}");
        Ok(())
    });
}
