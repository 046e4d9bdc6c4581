//! Hosts that are Nodes of a Kubernetes API server: they join through each other's Node objects, one of them begins the
//! cluster, the container runtime is configured once pods become reachable, and hosts whose Node was deleted are forgotten,
//! even if they were a majority. The API server is the tests' own.

#![allow(clippy::unwrap_used, reason = "tests, and helpers of tests")]

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::ensure;
use netns_lab::{Host, Lab, LabConfig, wait_until};
use ovl_manifest::yaml;
use ovl_tests::kubernetes::{ApiServer, Kube, Right, rights};
use ovl_tests::routed::blocks;
use ovl_tests::{SOON, text, wait_clean};
use serde_json::{Value, json};

/// A majority counts as lost for good after 30 s; then the survivors go on.
const RECOVERED: Duration = Duration::from_secs(75);

struct World {
    lab: Lab,
    api: ApiServer,
    kubes: Vec<Kube>,
    /// The names of the hosts, in the order of `kubes`.
    started: Vec<String>,
    /// What the manifests let ovl-kube do.
    rights: BTreeSet<Right>,
}

/// Creates hosts of which none runs yet, and an API server that has none as its Node. It lets its clients do what the
/// manifests say.
fn create(hosts: usize) -> World {
    let pool = "load_balancer_pool = [\"192.168.77.224/29\"]";
    let lab = Lab::new(LabConfig::hosts(hosts).config(pool)).unwrap();
    for host in lab.hosts() {
        host.set_join(&["kubernetes"]).unwrap();
        host.set_bootstrap(false).unwrap();
    }
    let api = ApiServer::new();
    let rbac = yaml::read(include_str!("../../packaging/kubernetes/manifests/rbac.yaml")).unwrap();
    let roles = rbac.iter().filter(|it| it.value["kind"] == "ClusterRole" || it.value["kind"] == "Role");
    let rights: BTreeSet<Right> = roles.flat_map(|role| rights(&role.value)).collect();
    api.set_rights(rights.clone());
    World { lab, api, kubes: Vec::new(), started: Vec::new(), rights }
}

fn conflist(host: &Host) -> PathBuf {
    host.dir().join("net.d/10-ovl.conflist")
}

impl World {
    /// Starts a host and its `ovl-kube`, and creates its Node.
    fn start(&mut self, name: &str) {
        self.start_with(name, &[]);
    }

    /// As [`Self::start`], with blocks that the API server gives to pods of the Node.
    fn start_with(&mut self, name: &str, pod_cidrs: &[&str]) {
        let host = &self.lab[name];
        host.start().unwrap();
        self.api.put(&json!({
            "kind": "Node", "metadata": { "name": name }, "spec": { "podCIDRs": pod_cidrs },
            "status": { "addresses": [
                { "type": "Hostname", "address": name },
                { "type": "InternalIP", "address": host.address().unwrap().to_string() },
            ] },
        }));
        std::fs::create_dir_all(conflist(host).parent().unwrap()).unwrap();
        let path = conflist(host).display().to_string();
        let more = ["--conflist", &path, "--subnet", "10.60.0.0/16"];
        self.kubes.push(Kube::start_with(&mut self.api, host, &more).unwrap());
        self.started.push(name.to_owned());
    }

    /// Returns the members of the cluster as a host knows them.
    fn members(&self, host: &str) -> anyhow::Result<Vec<String>> {
        let peers = self.lab[host].ctl_json(&["peers"])?;
        let members = peers.as_array().into_iter().flatten().filter(|peer| peer["member"] == true);
        let mut names: Vec<String> = members.map(|peer| text(&peer["name"])).collect();
        names.sort();
        Ok(names)
    }

    /// Waits until these hosts are the members, and each says so that runs.
    fn wait_members(&self, names: &[&str], within: Duration) {
        for name in names.iter().filter(|name| self.lab[name].is_running()) {
            wait_until(within, &format!("{names:?} to be the members on {name}"), || {
                let members = self.members(name)?;
                ensure!(members == names, "{members:?}");
                Ok(())
            })
            .unwrap();
        }
    }

    fn wait_conflist(&self, name: &str) {
        wait_until(SOON, &format!("the configuration of the runtime on {name}"), || {
            let found: Value = serde_json::from_str(&std::fs::read_to_string(conflist(&self.lab[name]))?)?;
            ensure!(found["plugins"][0]["network"] == "pods" && found["name"] == "10-ovl", "{found}");
            self.lab[name].ctl_ok(&["network", "inspect", "pods"]).map(drop)
        })
        .unwrap();
    }
}

#[test]
fn nodes_join_through_each_other_and_a_deleted_majority_does_not_keep_new_ones_out() {
    let mut world = create(6);
    // Without an API server there is nothing to join through, and no cluster is begun.
    world.lab["h1"].start().unwrap();
    wait_until(SOON, "h1 to say that it waits", || {
        let status = world.lab["h1"].ctl_json(&["status"])?;
        ensure!(status["members"] == 0 && status["problems"].to_string().contains("ovl-kube"), "{status}");
        Ok(())
    })
    .unwrap();
    world.lab["h1"].stop().unwrap();
    // What is left from before the boot: pods would fail.
    std::fs::create_dir_all(conflist(&world.lab["h1"]).parent().unwrap()).unwrap();
    std::fs::write(conflist(&world.lab["h1"]), "{}").unwrap();

    let began = Instant::now();
    for name in ["h1", "h2", "h3"] {
        world.start(name);
    }
    world.wait_members(&["h1", "h2", "h3"], SOON);
    println!("three hosts were a cluster after {:?}", began.elapsed());
    assert_eq!(world.api.all("leases").len(), 1);
    for name in ["h1", "h2", "h3"] {
        world.wait_conflist(name);
    }
    let networks = world.lab["h2"].ctl_json(&["network", "ls"]).unwrap();
    assert_eq!(networks.as_array().map(Vec::len), Some(1), "{networks}");
    // Only after the configuration is the node ready, and a restart of ovld changes nothing.
    world.lab["h2"].restart().unwrap();
    wait_clean(world.lab.hosts(), SOON).unwrap();
    assert!(conflist(&world.lab["h2"]).exists());

    // A host that vanishes stays a member, until its Node is deleted.
    world.lab["h3"].destroy().unwrap();
    wait_until(SOON, "h3 to be dead", || {
        let peers = world.lab["h1"].ctl_json(&["peers"])?;
        let all = peers.as_array().cloned().unwrap_or_default();
        ensure!(all.iter().any(|peer| peer["name"] == "h3" && peer["state"] == "dead"), "{peers}");
        Ok(())
    })
    .unwrap();
    world.wait_members(&["h1", "h2", "h3"], SOON);
    world.api.delete("nodes", "", "h3").unwrap();
    world.wait_members(&["h1", "h2"], SOON);
    world.start("h4");
    world.wait_members(&["h1", "h2", "h4"], SOON);
    world.wait_conflist("h4");

    // Two of three vanish at once, and a new host waits for its admission. Their Nodes are deleted: the third one goes on, and
    // admits the host that waits as well as one that starts later.
    for name in ["h1", "h4"] {
        world.lab[name].destroy().unwrap();
    }
    world.start("h5");
    wait_until(SOON, "h5 to know the cluster, and to wait", || {
        let members = world.members("h5")?;
        ensure!(members == ["h1", "h2", "h4"], "{members:?}");
        Ok(())
    })
    .unwrap();
    let began = Instant::now();
    for name in ["h1", "h4"] {
        world.api.delete("nodes", "", name).unwrap();
    }
    world.wait_members(&["h2", "h5"], RECOVERED);
    println!(
        "the host that waited was a member {:?} after the Nodes of two of three were deleted",
        began.elapsed()
    );
    world.start("h6");
    world.wait_members(&["h2", "h5", "h6"], SOON);
    for name in ["h2", "h5", "h6"] {
        world.wait_conflist(name);
        wait_clean(std::slice::from_ref(&world.lab[name]), SOON).unwrap();
    }

    // The manifests give exactly the rights that are used: a status, an Event, and its series after another host took over.
    world.api.put(&json!({
        "kind": "Service", "metadata": { "name": "web", "namespace": "default" },
        "spec": {
            "type": "LoadBalancer", "clusterIP": "10.96.0.70", "clusterIPs": ["10.96.0.70"],
            "ports": [{ "port": 80, "protocol": "TCP" }],
        },
    }));
    world.api.put(&json!({
        "kind": "EndpointSlice", "addressType": "FQDN", "metadata": { "name": "strange", "namespace": "default" },
        "endpoints": [{ "addresses": ["example.com"] }], "ports": [],
    }));
    wait_until(SOON, "an address and an Event", || {
        let service = world.api.get("services", "default", "web").unwrap();
        ensure!(service["status"]["loadBalancer"]["ingress"][0]["ip"].is_string(), "{service}");
        ensure!(world.api.all("events").len() == 1);
        Ok(())
    })
    .unwrap();
    let present = ["h2", "h5", "h6"].map(|name| world.started.iter().position(|it| it == name).unwrap());
    let acting = present.into_iter().find(|n| world.kubes[*n].mirrors()).unwrap();
    world.kubes[acting].kill().unwrap();
    wait_until(SOON, "the Event to go on", || {
        let events = world.api.all("events");
        ensure!(events[0]["series"]["count"] == 2, "{events:?}");
        Ok(())
    })
    .unwrap();
    assert_eq!(world.api.used_rights(), world.rights);
}

#[test]
fn blocks_of_hosts_are_those_that_the_api_server_gives_to_their_pods() {
    let mut world = create(3);
    world.start_with("h1", &["10.60.7.0/24"]);
    world.wait_members(&["h1"], SOON);
    world.start_with("h2", &["10.60.3.0/24"]);
    // The API server gives this one none, as without `--allocate-node-cidrs`.
    world.start_with("h3", &[]);
    world.wait_members(&["h1", "h2", "h3"], SOON);
    let h1 = &world.lab["h1"];
    wait_until(SOON, "the blocks", || {
        let of = |host: &str| blocks(h1, "pods", host);
        let third = of("h3")?;
        ensure!(
            of("h1")? == ["10.60.7.0/24"] && of("h2")? == ["10.60.3.0/24"],
            "{:?} {:?}",
            of("h1"),
            of("h2")
        );
        ensure!(third.len() == 1 && !["10.60.7.0/24", "10.60.3.0/24"].contains(&&*third[0]), "{third:?}");
        Ok(())
    })
    .unwrap();
    wait_clean(world.lab.hosts(), SOON).unwrap();
}
