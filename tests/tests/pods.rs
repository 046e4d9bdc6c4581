//! Pods that come again under their name, and pods whose labels are not known yet, with the real CNI plugin.

#![allow(clippy::unwrap_used, reason = "tests, and helpers of tests")]

use std::net::{IpAddr, SocketAddr, TcpStream};
use std::time::Duration;

use anyhow::{Result, ensure};
use netns_lab::{Lab, Netns, Workload, wait_until};
use ovl_tests::cni::{Conflist, Container, addresses};
use ovl_tests::resolver::{dig, status};
use ovl_tests::routed::create_routed_network;
use ovl_tests::service::{NamedServer, apply, ask};
use ovl_tests::{
    SOON, assert_contains, attach, create_network, endpoints, rows, start_lab, strings, text, wait_clean,
};
use serde_json::{Value, json};

const SERVICE: &str = "10.96.0.50:5432";

/// A Service and a policy about pods with `app: db`, which only those with `app: api` may connect to.
const OBJECTS: &str = "apiVersion: v1
kind: Service
metadata: {name: db, namespace: shop}
spec:
  selector: {app: db}
  clusterIP: 10.96.0.50
  ports: [{port: 5432, targetPort: pg}]
---
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: db, namespace: shop}
spec:
  podSelector: {matchLabels: {app: db}}
  ingress: [{from: [{podSelector: {matchLabels: {app: api}}}]}]
";

/// A v1 Pod `db-0` with this uid, empty: none.
fn pod(uid: &str) -> String {
    json!({
        "apiVersion": "v1", "kind": "Pod",
        "metadata": { "name": "db-0", "namespace": "shop", "labels": { "app": "db" }, "uid": uid },
        "spec": { "containers": [{ "name": "c", "ports": [{ "name": "pg", "containerPort": 5432 }] }] },
    })
    .to_string()
}

fn lab(mode: &str, hosts: usize) -> Lab {
    let lab = start_lab(hosts).unwrap();
    match mode {
        "l3" => create_routed_network(&lab, "pods", &["--subnet", "10.60.0.0/16", "--subnet", "fd60::/48"]),
        _ => create_network(&lab, "pods", &["--subnet", "10.60.0.0/16", "--subnet", "fd60::/64"]),
    }
    .unwrap();
    lab
}

/// A pod that was attached by the plugin.
struct Pod {
    workload: Workload,
    container: Container,
    addresses: Vec<String>,
}

fn add(lab: &Lab, host: &str, workload: &str, name: &str, uid: &str) -> Pod {
    let workload = lab[host].workload(workload).unwrap();
    let args = format!("IgnoreUnknown=1;K8S_POD_NAMESPACE=shop;K8S_POD_NAME={name};K8S_POD_UID={uid}");
    let container = Container::for_workload(&workload).args(&args);
    let result = Conflist::new(&lab[host], "pods").add(&lab[host], &container).unwrap();
    Pod { workload, container, addresses: addresses(&result) }
}

/// Whether each connection to these addresses is accepted. A refused one costs a second.
fn reached(from: &Netns, to: &[String], port: u16) -> Vec<bool> {
    let each = |address: &String| {
        let to = SocketAddr::new(address.parse::<IpAddr>().unwrap(), port);
        from.run(|| TcpStream::connect_timeout(&to, Duration::from_secs(1)).is_ok()).unwrap()
    };
    to.iter().map(each).collect()
}

/// Whether connections are accepted at all of these addresses.
fn connects(from: &Netns, to: &[String], port: u16) -> bool {
    reached(from, to, port).iter().all(|reached| *reached)
}

/// Whether connections are accepted at none of these addresses.
fn refused(from: &Netns, to: &[String], port: u16) -> bool {
    reached(from, to, port).iter().all(|reached| !reached)
}

/// Waits until connections are accepted at all of these addresses.
fn wait_connects(from: &Netns, to: &[String], port: u16) {
    wait_until(SOON, "the expected connections", || -> Result<()> {
        ensure!(connects(from, to, port));
        Ok(())
    })
    .unwrap();
}

/// Waits until these addresses, and no others, have the name of the pod and are behind the Service.
fn wait_meant(client: &Netns, server: &str, addresses: &[String]) {
    wait_until(SOON, &format!("{server} to be db-0"), || -> Result<()> {
        let mut found = dig(client, "127.0.0.11", &["db-0.pods", "A"])?;
        found.extend(dig(client, "127.0.0.11", &["db-0.pods", "AAAA"])?);
        ensure!(found == addresses, "db-0.pods is {found:?} instead of {addresses:?}");
        for _ in 0..8 {
            let name = ask(client, SERVICE.parse()?)?.name;
            ensure!(name == server, "{name} answers");
        }
        Ok(())
    })
    .unwrap();
}

/// Returns a row of `ovlctl endpoints` by its first address.
fn endpoint(lab: &Lab, host: &str, pod: &Pod) -> Value {
    let all = rows(&lab[host], &["endpoints"]).unwrap();
    let has = |row: &&Value| text(&row["addresses"][0]).starts_with(&format!("{}/", pod.addresses[0]));
    let found = all.iter().find(has);
    assert!(found.is_some(), "{:?} in {all:?}", pod.addresses);
    found.unwrap().clone()
}

/// The old sandbox of a pod stays on one host while the pod comes again on another one.
fn comes_again(mode: &str) {
    let lab = lab(mode, 2);
    apply(&lab, &lab["h1"], OBJECTS).unwrap();
    apply(&lab, &lab["h1"], &pod("")).unwrap();
    let labelled = |name: &str, app: &str| {
        let more = ["--namespace", "shop", "--label", &format!("app={app}")];
        attach(&lab["h2"], name, "pods", &more).unwrap().workload
    };
    let (api, web) = (labelled("api", "api"), labelled("web", "web"));
    let old = add(&lab, "h1", "old", "db-0", "uid-1");
    let _old_server = NamedServer::start(&old.workload, "old", 5432).unwrap();
    wait_meant(&api, "old", &old.addresses);
    wait_until(SOON, "the old one to be isolated", || -> Result<()> {
        ensure!(connects(&api, &old.addresses, 5432) && refused(&web, &old.addresses, 5432));
        Ok(())
    })
    .unwrap();

    let new = add(&lab, "h2", "new", "db-0", "uid-2");
    let _new_server = NamedServer::start(&new.workload, "new", 5432).unwrap();
    // The policy applies from the first packet on, with no wait.
    assert!(refused(&web, &new.addresses, 5432));
    wait_meant(&api, "new", &new.addresses);
    assert!(connects(&api, &new.addresses, 5432) && refused(&web, &new.addresses, 5432));
    let found = endpoint(&lab, "h1", &new);
    assert!(text(&found["name"]).starts_with("db-0-"), "{found}");
    assert_eq!(found["pod"], json!({ "name": "db-0", "uid": "uid-2", "current": true }));
    assert_eq!(endpoint(&lab, "h2", &old)["pod"]["current"], json!(false));
    let judged = rows(&lab["h2"], &["policy", "explain", "shop/web", "shop/db-0:5432"]).unwrap();
    assert_eq!((judged.len(), text(&judged[0]["to"])), (2, new.addresses[0].clone()));
    assert_eq!(strings(&judged[0]["ingress"]["policies"]), ["shop/db"]);
    // The old one is isolated for good: no labels are known of it.
    wait_until(SOON, "the old one to be isolated", || -> Result<()> {
        ensure!(refused(&api, &old.addresses, 5432));
        Ok(())
    })
    .unwrap();

    // A v1 Pod with a uid says which one is meant.
    apply(&lab, &lab["h1"], &pod("uid-1")).unwrap();
    wait_until(SOON, "the uid to decide", || -> Result<()> {
        ensure!(connects(&api, &old.addresses, 5432) && refused(&api, &new.addresses, 5432));
        Ok(())
    })
    .unwrap();
    wait_meant(&api, "old", &old.addresses);
    apply(&lab, &lab["h2"], &pod("uid-2")).unwrap();
    wait_meant(&api, "new", &new.addresses);

    // The identity outlives the daemon, and the old sandbox goes at last.
    lab["h2"].restart().unwrap();
    wait_meant(&api, "new", &new.addresses);
    Conflist::new(&lab["h1"], "pods").del(&lab["h1"], &old.container, None).unwrap();
    wait_until(SOON, "the old one to be gone", || -> Result<()> {
        ensure!(!endpoints(&lab["h2"])?.iter().any(|name| name == "db-0"));
        Ok(())
    })
    .unwrap();
    wait_meant(&api, "new", &new.addresses);
    assert!(refused(&web, &new.addresses, 5432));
    wait_clean(lab.hosts(), SOON).unwrap();
}

#[test]
fn pod_that_comes_again_on_another_host_is_the_pod_at_once_on_a_routed_network() {
    comes_again("l3");
}

#[test]
fn pod_that_comes_again_on_another_host_is_the_pod_at_once_on_a_switched_network() {
    comes_again("l2");
}

/// Until the labels of a pod are known, it is isolated in the directions in which a policy may select it.
fn isolated_until_known(mode: &str) {
    let lab = lab(mode, 2);
    let client = attach(&lab["h2"], "client", "pods", &["--namespace", "shop"]).unwrap();
    // Without a policy in the namespace, nothing is isolated.
    let early = add(&lab, "h1", "early", "early", "uid-0");
    let _early_server = early.workload.tcp_echo(5432).unwrap();
    wait_connects(&client.workload, &early.addresses, 5432);
    apply(&lab, &lab["h1"], OBJECTS).unwrap();
    wait_until(SOON, "the first pod to be isolated", || -> Result<()> {
        ensure!(refused(&client.workload, &early.addresses, 5432));
        Ok(())
    })
    .unwrap();

    let pod_0 = add(&lab, "h1", "w", "db-0", "uid-1");
    let _server = pod_0.workload.tcp_echo(5432).unwrap();
    let client_server = client.workload.tcp_echo(80).unwrap();
    assert!(refused(&client.workload, &pod_0.addresses, 5432), "from the first packet on");
    // No policy isolates for egress.
    wait_connects(&pod_0.workload, &client.addresses(), 80);
    drop(client_server);
    let found = endpoint(&lab, "h2", &pod_0);
    assert_eq!(strings(&found["undecided"]), ["ingress"]);
    let judged = rows(&lab["h1"], &["policy", "explain", "shop/client", "shop/db-0:5432"]).unwrap();
    assert_eq!(judged[0]["passes"], json!(false));
    assert_contains(&text(&judged[0]["ingress"]["why"]), &["not known", "v1 Pod shop/db-0", "shop/db"]);
    let drops = rows(&lab["h1"], &["policy", "drops"]).unwrap();
    assert!(drops.iter().any(|drop| strings(&drop["policies"]) == ["shop/db"]), "{drops:?}");
    // Runtimes can give labels with the ADD.
    let workload = lab["h1"].workload("labelled").unwrap();
    let list = Conflist::new(&lab["h1"], "pods")
        .with("args", json!({ "cni": { "labels": [{ "key": "app", "value": "other" }] } }));
    let container = Container::for_workload(&workload).args("K8S_POD_NAMESPACE=shop;K8S_POD_NAME=labelled");
    let labelled = addresses(&list.add(&lab["h1"], &container).unwrap());
    let _labelled_server = workload.tcp_echo(5432).unwrap();
    wait_connects(&client.workload, &labelled, 5432);

    // Its v1 Pod has other labels than those that the policy selects.
    let unselected = pod("uid-1").replace("\"app\":\"db\"", "\"app\":\"web\"");
    apply(&lab, &lab["h2"], &unselected).unwrap();
    wait_until(SOON, "the pod to be known", || -> Result<()> {
        ensure!(connects(&client.workload, &pod_0.addresses, 5432));
        Ok(())
    })
    .unwrap();
    assert_eq!(strings(&endpoint(&lab, "h2", &pod_0)["undecided"]), [""; 0]);
    // The v1 Pod of another pod of the name says nothing about this one.
    apply(&lab, &lab["h2"], &unselected.replace("uid-1", "uid-2")).unwrap();
    wait_until(SOON, "the pod to be unknown", || -> Result<()> {
        ensure!(refused(&client.workload, &pod_0.addresses, 5432));
        Ok(())
    })
    .unwrap();
    lab["h1"].ctl_ok(&["delete", "networkpolicy", "db", "-n", "shop"]).unwrap();
    wait_until(SOON, "nothing to be isolated", || -> Result<()> {
        ensure!(connects(&client.workload, &pod_0.addresses, 5432));
        ensure!(connects(&client.workload, &early.addresses, 5432));
        Ok(())
    })
    .unwrap();
    wait_clean(lab.hosts(), SOON).unwrap();
}

#[test]
fn pod_is_isolated_until_its_labels_are_known_on_a_routed_network() {
    isolated_until_known("l3");
}

#[test]
fn pod_is_isolated_until_its_labels_are_known_on_a_switched_network() {
    isolated_until_known("l2");
}

/// The Kubernetes API bounds a part of a name between dots only by the whole name's 253 characters. Such a name is none of
/// DNS, and labels and policies hold all the same.
fn long_names(mode: &str) {
    let lab = lab(mode, 2);
    let name = "x".repeat(95);
    let manifest = OBJECTS.replace(
        "metadata: {name: db, namespace: shop}\nspec:\n  podSelector",
        &format!("metadata: {{name: {}, namespace: shop}}\nspec:\n  podSelector", "p".repeat(70)),
    );
    assert_ne!(manifest, OBJECTS);
    apply(&lab, &lab["h1"], &manifest).unwrap();
    apply(&lab, &lab["h1"], &pod("").replace("db-0", &name)).unwrap();
    let labelled = |name: &str, app: &str| {
        let more = ["--namespace", "shop", "--label", &format!("app={app}")];
        attach(&lab["h2"], name, "pods", &more).unwrap().workload
    };
    let (api, web) = (labelled("api", "api"), labelled("web", "web"));
    let added = add(&lab, "h1", "w", &name, "uid-1");
    let _server = NamedServer::start(&added.workload, "long", 5432).unwrap();
    wait_connects(&api, &added.addresses, 5432);
    assert!(refused(&web, &added.addresses, 5432));
    // Its labels put it behind the Service, at the named port of its v1 Pod.
    wait_until(SOON, "the Service to have the pod", || -> Result<()> {
        ensure!(ask(&api, SERVICE.parse()?)?.name == "long");
        Ok(())
    })
    .unwrap();
    assert_eq!(dig(&api, "127.0.0.11", &["api.pods", "A"]).unwrap().len(), 1);
    // In Kubernetes, an address has the names of headless Services alone.
    let back = |address: &str| status(&api, "127.0.0.11", &["-x", address]).unwrap();
    assert_eq!(added.addresses.iter().map(|address| back(address)).collect::<Vec<_>>(), ["NXDOMAIN"; 2]);
    wait_clean(lab.hosts(), SOON).unwrap();
}

#[test]
fn pods_and_policies_with_names_that_are_too_long_for_dns_are_held_to_on_a_routed_network() {
    long_names("l3");
}

#[test]
fn pods_and_policies_with_names_that_are_too_long_for_dns_are_held_to_on_a_switched_network() {
    long_names("l2");
}

/// A pod is on more networks, as its annotation says, until its `DEL`.
#[test]
fn pods_are_on_more_networks_by_annotation() {
    let lab = lab("l3", 2);
    create_network(&lab, "blue", &["--subnet", "10.70.0.0/24", "--subnet", "fd70::/64"]).unwrap();
    let (h1, h2) = (&lab["h1"], &lab["h2"]);
    let other = attach(h2, "other", "blue", &[]).unwrap();
    let first = attach(h2, "first", "pods", &[]).unwrap();
    let workload = h1.workload("pod").unwrap();
    let networks = |text: &str| {
        let annotations = json!({ "ovl.networks": text });
        Container::for_workload(&workload)
            .args("K8S_POD_NAMESPACE=shop;K8S_POD_NAME=web-0;K8S_POD_UID=u1")
            .capability("io.kubernetes.cri.pod-annotations", annotations)
    };
    let list = Conflist::new(h1, "pods")
        .with("capabilities", json!({ "io.kubernetes.cri.pod-annotations": true }))
        .with("moreNetworks", json!(["blue", "gone"]));
    // One that is not allowed, and one that there is not: nothing is left of the pod.
    for wrong in ["secret", "blue,gone"] {
        list.add(h1, &networks(wrong)).unwrap_err();
        list.del(h1, &networks(wrong), None).unwrap();
        assert!(rows(h1, &["endpoints"]).unwrap().iter().all(|row| row["name"] != "web-0"));
    }
    let pod = networks("blue@eth9");
    let result = list.add(h1, &pod).unwrap();
    let on = |network: &str| -> Vec<String> {
        let all = rows(h1, &["endpoints"]).unwrap();
        let row = all.iter().find(|row| row["name"] == "web-0" && row["network"] == network);
        let addresses = row.map(|row| strings(&row["addresses"])).unwrap_or_default();
        addresses.iter().map(|net| net.split('/').next().unwrap_or_default().to_owned()).collect()
    };
    assert_eq!(addresses(&result), on("pods"));
    let (pods, blue) = (on("pods"), on("blue"));
    assert_eq!((pods.len(), blue.len()), (2, 2), "{pods:?} {blue:?}");
    let _server = workload.tcp_echo(80).unwrap();
    wait_connects(&other.workload, &blue, 80);
    wait_connects(&first.workload, &pods, 80);
    assert!(workload.exec_ok(["ip", "addr", "show", "dev", "eth9"]).unwrap().contains(&blue[0]));
    // The first network has the default route.
    let route = workload.exec_ok(["ip", "route", "get", "192.0.2.1"]).unwrap();
    assert!(route.contains("dev eth0"), "{route}");
    // Policies know it on each of its networks.
    let object = "{apiVersion: v1, kind: Pod, metadata: {name: web-0, namespace: shop, uid: u1, labels: {app: web}}, \
                  spec: {containers: [{name: c}]}}";
    apply(&lab, h1, object).unwrap();
    let policy = "{apiVersion: networking.k8s.io/v1, kind: NetworkPolicy, metadata: {name: web, namespace: shop}, \
                  spec: {podSelector: {matchLabels: {app: web}}, ingress: []}}";
    apply(&lab, h2, policy).unwrap();
    for (from, to) in [(&other, &blue), (&first, &pods)] {
        wait_until(SOON, "the policy", || -> Result<()> {
            ensure!(refused(&from.workload, to, 80));
            Ok(())
        })
        .unwrap();
    }
    list.check(h1, &pod, &result).unwrap();
    h1.restart().unwrap();
    wait_clean(lab.hosts(), SOON).unwrap();
    assert_eq!((on("pods"), on("blue")), (pods, blue));
    // A DEL does not need to know them.
    let plain = Container::for_workload(&workload);
    list.del(h1, &plain, None).unwrap();
    assert!(on("pods").is_empty() && on("blue").is_empty());
    assert!(workload.exec(["ip", "link", "show", "dev", "eth9"]).unwrap().status.code() != Some(0));
    wait_clean(lab.hosts(), SOON).unwrap();
}
