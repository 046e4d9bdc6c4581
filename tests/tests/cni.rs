//! The CNI plugin with a real daemon, called as container runtimes call it.

#![allow(clippy::unwrap_used, reason = "tests, and helpers of tests")]

use std::collections::BTreeSet;
use std::fs;
use std::io::{self, Write as _};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::path::Path;
use std::thread;
use std::time::Instant;

use anyhow::ensure;
use netns_lab::{Lab, Workload, wait_until};
use ovl_tests::cni::{
    self, Conflist, Container, PluginOutput, addresses, assert_refused, interfaces, wait_nothing_left,
};
use ovl_tests::{
    SOON, assert_contains, create_network, endpoints, ensure_settled, rows, start_lab, strings, text,
    wait_endpoints,
};
use serde_json::{Value, json};

/// A lab with a switched network of both address families.
fn lab(hosts: usize) -> Lab {
    let lab = start_lab(hosts).unwrap();
    create_network(&lab, "pods", &["--subnet", "10.99.0.0/24", "--subnet", "fd99::/64"]).unwrap();
    lab
}

/// A lab with a routed network of both address families.
fn routed_lab(hosts: usize) -> Lab {
    let lab = start_lab(hosts).unwrap();
    create_network(&lab, "pods", &["--mode", "l3", "--subnet", "10.99.0.0/16", "--subnet", "fd99::/48"])
        .unwrap();
    lab
}

#[test]
fn containers_of_a_switched_network_attach_reach_each_other_and_detach() {
    check_attach_and_detach(&lab(2), &["ovb-", "ove-"]);
}

#[test]
fn containers_of_a_routed_network_attach_reach_each_other_and_detach() {
    check_attach_and_detach(&routed_lab(2), &["ove-"]);
}

/// Attaches a container on each of two hosts, checks the result, and detaches both. `outside` has the name prefixes of
/// the host's devices in a result.
fn check_attach_and_detach(lab: &Lab, outside: &[&str]) {
    let all: Vec<_> = ["h1", "h2"]
        .into_iter()
        .map(|name| {
            let host = &lab[name];
            let workload = host.workload("a").unwrap();
            let list = Conflist::new(host, "pods");
            let pod = format!(
                "K8S_POD_NAME=web-{name};K8S_POD_NAMESPACE=shop;K8S_POD_UID=u;K8S_POD_INFRA_CONTAINER_ID=c"
            );
            let container = Container::for_workload(&workload).args(&pod);
            let result = list.add(host, &container).unwrap();
            (host, workload, list, container, result)
        })
        .collect();
    for (host, workload, list, container, result) in &all {
        // The result matches the kernel.
        let inside = &result["interfaces"][outside.len()];
        assert_eq!(
            (&inside["name"], text(&inside["sandbox"]).as_str()),
            (&json!("eth0"), workload.path_str())
        );
        let eth0 = &workload.ip_json(&["link", "show", "eth0"]).unwrap()[0];
        assert_eq!((&eth0["address"], &eth0["mtu"]), (&inside["mac"], &inside["mtu"]));
        for (at, prefix) in outside.iter().enumerate() {
            let device = &result["interfaces"][at];
            let name = text(&device["name"]);
            assert!(name.starts_with(prefix), "{result}");
            assert_eq!(host.ip_json(&["link", "show", &name]).unwrap()[0]["address"], device["mac"]);
        }
        let reported: Vec<Value> =
            result["routes"].as_array().unwrap().iter().map(|route| route["gw"].clone()).collect();
        let routes = ["-4", "-6"].map(|family| {
            workload.ip_json(&[family, "route", "show", "default"]).unwrap()[0]["gateway"].clone()
        });
        assert_eq!(reported, routes);
        let row =
            rows(host, &["endpoints"]).unwrap().into_iter().find(|row| row["node"] == host.name()).unwrap();
        assert_eq!((text(&row["name"]), &row["namespace"]), (format!("web-{}", host.name()), &json!("shop")));
        let listed: Vec<_> = strings(&row["addresses"])
            .iter()
            .map(|each| each.split('/').next().unwrap().to_owned())
            .collect();
        assert_eq!(listed, addresses(result));
        list.check(host, container, result).unwrap();
    }
    for (from, to) in [(0, 1), (1, 0)] {
        for address in addresses(&all[to].4) {
            all[from].1.ping_until(address, SOON).unwrap();
        }
    }
    for (host, workload, list, container, result) in &all {
        list.del(host, container, Some(result)).unwrap();
        assert!(interfaces(workload).unwrap().is_empty());
        // DEL can be repeated, also without a namespace, and with one that does not exist.
        list.del(host, container, None).unwrap();
        list.del(host, &container.without_netns(), None).unwrap();
        list.del(host, &Container { netns: "/run/netns/never".into(), ..container.clone() }, None).unwrap();
    }
    for (host, ..) in &all {
        wait_nothing_left(host).unwrap();
    }
    // DEL also succeeds after the network was deleted.
    let (host, _, list, container, _) = &all[0];
    host.ctl_ok(&["network", "rm", "pods"]).unwrap();
    list.del(host, container, None).unwrap();
}

#[test]
fn requested_parameters_are_applied_and_pod_names_never_conflict() {
    let lab = lab(1);
    let host = &lab["h1"];
    let list = Conflist::new(host, "pods").with(
        "capabilities",
        json!({ "ips": true, "mac": true, "dns": true, "io.kubernetes.cri.pod-annotations": true }),
    );
    let a = Container::for_workload(&host.workload("a").unwrap());
    let requested = a
        .args("IgnoreUnknown=1;K8S_POD_NAME=web;IP=10.99.0.50;COLOR=red")
        .capability("mac", json!("02:aa:00:00:00:01"))
        .capability("dns", json!({ "servers": ["10.99.0.1"] }))
        .capability("io.kubernetes.cri.pod-annotations", json!({ "ovl.labels": "app=shop,tier=front" }));
    let result = list.add(host, &requested).unwrap();
    assert_eq!(
        (addresses(&result)[0].as_str(), &result["interfaces"][2]["mac"]),
        ("10.99.0.50", &json!("02:aa:00:00:00:01"))
    );
    assert_eq!(result["dns"], json!({ "nameservers": ["10.99.0.1"] }));
    assert_eq!(rows(host, &["endpoints"]).unwrap()[0]["labels"], json!({ "app": "shop", "tier": "front" }));
    // A second interface: the default routes stay on the first one.
    let more = list.add(host, &a.args("K8S_POD_NAME=web").interface("net1")).unwrap();
    assert_eq!(more["routes"], Value::Null);
    assert_eq!(addresses(&more).len(), 2);
    // A second pod of this name, one with a long name, one with an invalid name, and a container without a pod name.
    let names = ["web".to_owned(), "p".repeat(253), "a/b c".to_owned()];
    for (n, name) in names.iter().enumerate() {
        let workload = host.workload(&format!("w{n}")).unwrap();
        list.add(host, &Container::for_workload(&workload).args(&format!("K8S_POD_NAME={name}"))).unwrap();
    }
    let nameless = Container::new("0123456789abcdef", host.workload("n").unwrap().path_str());
    list.add(host, &nameless).unwrap();
    let found: Vec<String> =
        rows(host, &["endpoints"]).unwrap().iter().map(|row| text(&row["name"])).collect();
    assert_eq!(found.iter().filter(|name| name.starts_with("web-")).count(), 2, "{found:?}");
    for name in ["web", "0123456789ab", &"p".repeat(253)] {
        assert!(found.iter().any(|each| each == name), "{name} in {found:?}");
    }
    assert!(found.iter().any(|name| name.starts_with("a-b-c-")), "{found:?}");
    // A DEL detaches only its own interface.
    list.del(host, &requested, None).unwrap();
    assert_eq!(interfaces(&host.find_workload("a").unwrap()).unwrap(), ["net1".to_owned()].into());
    ensure_settled(host).unwrap();
}

/// Container IDs are unique only within a runtime, so containers on several hosts may have the same one.
#[test]
fn containers_with_the_same_id_can_be_attached_on_all_hosts() {
    let lab = lab(3);
    let mut names = BTreeSet::new();
    for host in lab.hosts() {
        let workload = host.workload("a").unwrap();
        let container = Container::new("0123456789abcdef", workload.path_str());
        Conflist::new(host, "pods").add(host, &container).unwrap();
        let own = |row: &Value| row["node"] == host.name();
        names.extend(
            rows(host, &["endpoints"]).unwrap().iter().filter(|row| own(row)).map(|row| text(&row["name"])),
        );
        // The next host must know which names are taken.
        for other in lab.hosts() {
            wait_until(SOON, &format!("{} to list the endpoints {names:?}", other.name()), || {
                let seen: BTreeSet<String> =
                    rows(other, &["endpoints"])?.iter().map(|row| text(&row["name"])).collect();
                ensure!(seen == names, "{seen:?}");
                Ok(())
            })
            .unwrap();
        }
    }
    assert_eq!(names.len(), 3, "{names:?}");
    assert!(names.contains("0123456789ab"), "{names:?}");
}

#[test]
fn results_have_the_requested_cni_version() {
    let lab = lab(1);
    let host = &lab["h1"];
    let container = Container::for_workload(&host.workload("a").unwrap());
    for version in ["0.3.1", "0.4.0", "1.0.0", "1.1.0"] {
        let list = Conflist::new(host, "pods").with_version(version);
        let result = list.add(host, &container).unwrap();
        assert_eq!(result["cniVersion"], version);
        let old = version.starts_with('0');
        assert_eq!(result["ips"][0]["version"], if old { json!("4") } else { Value::Null }, "{result}");
        assert_eq!(result["ips"][1]["version"], if old { json!("6") } else { Value::Null }, "{result}");
        assert_eq!(result["interfaces"][2]["mtu"].is_u64(), version == "1.1.0", "{result}");
        if version != "0.3.1" {
            list.check(host, &container, &result).unwrap();
        }
        list.del(host, &container, Some(&result)).unwrap();
    }
    wait_nothing_left(host).unwrap();
    // VERSION needs neither a daemon nor valid input.
    host.stop().unwrap();
    for (input, version) in
        [(&br#"{"cniVersion":"0.4.0"}"#[..], "0.4.0"), (b"", "1.1.0"), (b"nonsense", "1.1.0")]
    {
        let mut command = cni::plugin_command("ovl-cni").unwrap();
        command.env("CNI_COMMAND", "VERSION");
        let printed = cni::run(host, command, input).unwrap().result().unwrap();
        let supported = json!(["0.3.1", "0.4.0", "1.0.0", "1.1.0"]);
        assert_eq!(printed, json!({ "cniVersion": version, "supportedVersions": supported }));
    }
}

#[test]
fn each_error_has_its_code_and_leaves_no_state() {
    let lab = lab(1);
    let host = &lab["h1"];
    create_network(&lab, "tiny", &["--subnet", "10.98.0.0/29"]).unwrap();
    let workload = host.workload("a").unwrap();
    let container = Container::for_workload(&workload);
    let list = Conflist::new(host, "pods");
    let add = |list: &Conflist, container: &Container| list.call_ovl(host, "ADD", container).unwrap();

    let raw = |command: Option<&str>, input: &[u8]| {
        let mut program = cni::plugin_command("ovl-cni").unwrap();
        program.envs(command.map(|command| ("CNI_COMMAND", command)));
        cni::run(host, program, input).unwrap()
    };
    assert_refused(raw(None, b"{}"), 4, &["CNI_COMMAND"]);
    assert_refused(raw(Some("EXPLODE"), b"{}"), 4, &["EXPLODE"]);
    assert_refused(raw(Some("ADD"), b""), 6, &["standard input"]);
    assert_refused(raw(Some("ADD"), b"[]"), 6, &["not a JSON object"]);
    assert_refused(raw(Some("ADD"), &vec![b' '; 4 << 20]), 6, &["too long"]);

    assert_refused(add(&list, &Container::new("", &container.netns)), 4, &["CNI_CONTAINERID"]);
    assert_refused(add(&list, &container.without_netns()), 4, &["CNI_NETNS"]);
    assert_refused(add(&list, &container.interface("")), 4, &["CNI_IFNAME"]);
    assert_refused(add(&list, &container.args("COLOR=red")), 4, &["COLOR", "IgnoreUnknown"]);
    assert_refused(add(&list.clone().with_version("0.2.0"), &container), 1, &["0.2.0", "0.3.1"]);
    assert_refused(
        add(&list.clone().with("ipam", json!({ "type": "host-local" })), &container),
        2,
        &["ipam"],
    );
    let ports = list.clone().with("runtimeConfig", json!({ "portMappings": [{ "hostPort": 1 }] }));
    assert_refused(add(&ports, &container), 7, &["portMappings.containerPort"]);
    let gone = Container { netns: "/run/netns/never".into(), ..container.clone() };
    assert_refused(add(&list, &gone), 3, &["/run/netns/never"]);
    let file = Container { netns: "/etc/passwd".into(), ..container.clone() };
    assert_refused(add(&list, &file), 104, &["not a network namespace"]);
    assert_refused(add(&Conflist::new(host, "none"), &container), 7, &["there is no network none", "pods"]);
    assert_refused(add(&list, &container.args("IP=10.1.2.3")), 7, &["10.1.2.3"]);
    assert_refused(add(&list, &container.args("K8S_POD_NAMESPACE=a/b")), 7, &["a/b"]);
    workload.exec_ok(["ip", "link", "add", "eth0", "type", "bridge"]).unwrap();
    assert_refused(add(&list, &container), 104, &["already has an interface eth0"]);
    workload.exec_ok(["ip", "link", "del", "eth0"]).unwrap();
    let long = vec!["x"; 200].join("=1,");
    let labels = json!({ "io.kubernetes.cri.pod-annotations": { "ovl.labels": format!("{long}=1") } });
    let many = (0..70).map(|n| format!("l{n}=1")).collect::<Vec<_>>().join(",");
    add(&list.clone().with("runtimeConfig", labels), &container).result().unwrap();
    list.del(host, &container, None).unwrap();
    let labels = json!({ "io.kubernetes.cri.pod-annotations": { "ovl.labels": many } });
    assert_refused(add(&list.clone().with("runtimeConfig", labels), &container), 7, &["64 labels"]);
    wait_nothing_left(host).unwrap();

    // A second ADD without a DEL is ctl_error, and the existing attachment stays as it is.
    let result = list.add(host, &container).unwrap();
    assert_refused(add(&list, &container), 101, &["already", &container.id]);
    list.check(host, &container, &result).unwrap();
    let other = Container::for_workload(&host.workload("b").unwrap());
    assert_refused(add(&list, &other.args(&format!("IP={}", addresses(&result)[0]))), 102, &["in use"]);
    list.del(host, &container, None).unwrap();

    // More containers than addresses.
    let tiny = Conflist::new(host, "tiny");
    let mut attached = Vec::new();
    let full = (0..9).find_map(|n| {
        let container = Container::for_workload(&host.workload(&format!("t{n}")).unwrap());
        let ran = add(&tiny, &container);
        if ran.code == Some(0) {
            attached.push(container);
            return None;
        }
        Some(ran)
    });
    assert_refused(full.unwrap(), 103, &["network update"]);
    assert_eq!(attached.len(), 5);
    for container in &attached {
        tiny.del(host, container, None).unwrap();
    }
    wait_nothing_left(host).unwrap();
}

#[test]
fn del_succeeds_whatever_version_the_configuration_names() {
    let lab = lab(1);
    let host = &lab["h1"];
    for (number, version) in ["0.2.0", "2.0.0", ""].into_iter().enumerate() {
        let workload = host.workload(&format!("w{number}")).unwrap();
        let container = Container::for_workload(&workload);
        let list = Conflist::new(host, "pods");
        list.add(host, &container).unwrap();
        let other = list.with_version(version);
        assert!(other.call_ovl(host, "ADD", &container).unwrap().error().is_ok(), "{version:?}");
        let printed = other.call_ovl(host, "DEL", &container).unwrap().result().unwrap();
        assert!(printed.is_null(), "{version:?}: {printed}");
        assert_eq!(interfaces(&workload).unwrap(), BTreeSet::new(), "{version:?}");
    }
    wait_nothing_left(host).unwrap();
}

#[test]
fn check_reports_what_changed() {
    let lab = lab(1);
    let host = &lab["h1"];
    let workload = host.workload("a").unwrap();
    let container = Container::for_workload(&workload);
    let list = Conflist::new(host, "pods");
    let check =
        |result: Option<&Value>| list.call(host, &list.plugins[0], "CHECK", &container, result).unwrap();
    assert_refused(check(Some(&json!({}))), 100, &["is not attached to pods"]);
    let result = list.add(host, &container).unwrap();
    assert_refused(check(None), 7, &["prevResult"]);
    assert_refused(
        list.clone().with_version("0.3.1").call_ovl(host, "CHECK", &container).unwrap(),
        1,
        &["CHECK"],
    );
    let [v4, v6] = &addresses(&result)[..] else { panic!("{result}") };
    let v4 = format!("{v4}/24");
    for (change, undo, part) in [
        (vec!["link", "set", "eth0", "mtu", "1400"], vec!["link", "set", "eth0", "mtu", "1300"], ""),
        (
            vec!["-6", "route", "del", "default"],
            vec!["-6", "route", "replace", "default", "via", "fd99::1"],
            "fd99::1",
        ),
        (
            vec!["link", "set", "eth0", "address", "02:00:00:00:00:99"],
            vec!["link", "set", "eth0", "address", &text(&result["interfaces"][2]["mac"])],
            "02:00:00:00:00:99",
        ),
        (vec!["addr", "del", &v4, "dev", "eth0"], vec!["addr", "replace", &v4, "dev", "eth0"], v4.as_str()),
    ] {
        workload.exec_ok([&["ip"], &change[..]].concat()).unwrap();
        if part.is_empty() {
            // The MTU follows the path, so CHECK ignores it.
            check(Some(&result)).result().unwrap();
        } else {
            assert_refused(check(Some(&result)), 100, &[part]);
        }
        // ovld may have put it back already.
        workload.exec_ok([&["ip"], &undo[..]].concat()).unwrap();
    }
    // The kernel deleted the default route with the IPv4 address.
    assert_refused(check(Some(&result)), 100, &["10.99.0.1"]);
    workload.exec_ok(["ip", "route", "replace", "default", "via", "10.99.0.1"]).unwrap();
    check(Some(&result)).result().unwrap();
    workload.exec_ok(["ip", "link", "set", "eth0", "down"]).unwrap();
    assert_refused(check(Some(&result)), 100, &["eth0 is down"]);
    let mut other = result.clone();
    other["ips"][1]["address"] = json!("fd99::77/64");
    workload.exec_ok(["ip", "link", "set", "eth0", "up"]).unwrap();
    wait_until(SOON, "the address to be restored", || {
        workload.exec_ok(["ip", "addr", "replace", &format!("{v6}/64"), "dev", "eth0", "nodad"]).map(drop)
    })
    .unwrap();
    assert_refused(check(Some(&other)), 100, &["prevResult"]);
    workload.exec_ok(["ip", "link", "del", "eth0"]).unwrap();
    let (code, _) = check(Some(&result)).error().unwrap();
    assert_eq!(code, 100);
    list.del(host, &container, Some(&result)).unwrap();
    wait_nothing_left(host).unwrap();
}

#[test]
fn gc_removes_attachments_that_the_runtime_does_not_list() {
    let lab = lab(1);
    let host = &lab["h1"];
    let list = Conflist::new(host, "pods");
    let other = list.clone().with_name("others");
    let containers: Vec<Container> =
        ["a", "b", "c"].map(|name| Container::for_workload(&host.workload(name).unwrap())).into();
    for container in &containers {
        list.add(host, container).unwrap();
    }
    list.add(host, &containers[0].interface("net1")).unwrap();
    // Attachments of another configuration of the same network, and of `ovlctl attach`, are not subject to this GC.
    other.add(host, &Container::for_workload(&host.workload("d").unwrap())).unwrap();
    ovl_tests::attach(host, "e", "pods", &[]).unwrap();
    let gc = |valid: Value| {
        list.clone()
            .with("cni.dev/valid-attachments", valid)
            .call_ovl(host, "GC", &Container::new("", ""))
            .unwrap()
    };
    assert_refused(list.call_ovl(host, "GC", &containers[0]).unwrap(), 7, &["cni.dev/valid-attachments"]);
    assert_refused(gc(json!([{ "containerID": 7 }])), 7, &["containerID"]);
    assert_refused(
        list.clone().with_version("1.0.0").call_ovl(host, "GC", &containers[0]).unwrap(),
        1,
        &["GC"],
    );
    assert_eq!(endpoints(host).unwrap().len(), 6);
    let valid = json!([
        { "containerID": containers[0].id, "ifname": "eth0" },
        { "containerID": containers[2].id, "ifname": "eth0" },
        { "containerID": "unheard-of", "ifname": "eth0" },
    ]);
    for _ in 0..2 {
        assert_eq!(gc(valid.clone()), PluginOutput { code: Some(0), printed: Value::Null });
        let found = endpoints(host).unwrap();
        assert_eq!(found.len(), 4, "{found:?}");
    }
    assert_eq!(interfaces(&host.find_workload("a").unwrap()).unwrap(), ["eth0".to_owned()].into());
    assert!(interfaces(&host.find_workload("b").unwrap()).unwrap().is_empty());
    // The remaining attachments are known after a restart.
    host.restart().unwrap();
    host.wait_ready(SOON).unwrap();
    gc(json!([])).result().unwrap();
    wait_endpoints(host, &["d-container on h1 is ready", "e on h1 is ready"], SOON).unwrap();
    ensure_settled(host).unwrap();
}

#[test]
fn status_reports_whether_an_add_would_work() {
    let lab = lab(3);
    let (h1, h2) = (&lab["h1"], &lab["h2"]);
    let none = Container::new("", "");
    let list = Conflist::new(h1, "pods");
    list.call_ovl(h1, "STATUS", &none).unwrap().result().unwrap();
    assert_refused(
        Conflist::new(h1, "none").call_ovl(h1, "STATUS", &none).unwrap(),
        50,
        &["there is no network none"],
    );
    assert_refused(list.clone().with_version("1.0.0").call_ovl(h1, "STATUS", &none).unwrap(), 1, &["STATUS"]);
    assert_refused(
        list.clone().with("ipam", json!({ "type": "x" })).call_ovl(h1, "STATUS", &none).unwrap(),
        2,
        &["ipam"],
    );
    // The path between h1 and h2 is cut in both directions, while h3 still reports h2 as alive.
    let cut = |verb: &str| {
        for (host, other) in [(h1, h2), (h2, h1)] {
            host.exec_ok(["ip", "route", verb, "blackhole", &other.address().unwrap().to_string()]).unwrap();
        }
    };
    cut("add");
    wait_until(SOON, "STATUS to report that h2 is unreachable", || {
        let (code, message) = list.call_ovl(h1, "STATUS", &none)?.error()?;
        ensure!(code == 51 && message.contains("h2"), "{code}: {message}");
        Ok(())
    })
    .unwrap();
    // h3 reaches both.
    Conflist::new(&lab["h3"], "pods").call_ovl(&lab["h3"], "STATUS", &none).unwrap().result().unwrap();
    cut("del");
    wait_until(SOON, "STATUS to succeed again", || list.call_ovl(h1, "STATUS", &none)?.result().map(drop))
        .unwrap();
    // A dead host is no reason to fail STATUS on another host.
    h2.destroy().unwrap();
    wait_until(SOON, "h2 to be dead", || {
        Ok::<_, anyhow::Error>(ovl_tests::peer(h1, "h2")?["state"] == "dead")
    })
    .unwrap();
    list.call_ovl(h1, "STATUS", &none).unwrap().result().unwrap();
}

#[test]
fn status_and_add_fail_on_a_host_that_is_not_admitted() {
    let lab = Lab::new(netns_lab::LabConfig::hosts(2)).unwrap();
    let h2 = &lab["h2"];
    h2.start().unwrap();
    wait_until(SOON, "the control socket to answer", || h2.ctl_ok(&["status"]).map(drop)).unwrap();
    let list = Conflist::new(h2, "pods");
    assert_refused(list.call_ovl(h2, "STATUS", &Container::new("", "")).unwrap(), 50, &["not ready"]);
    let container = Container::for_workload(&h2.workload("a").unwrap());
    assert_refused(list.call_ovl(h2, "ADD", &container).unwrap(), 11, &["not ready"]);
    list.del(h2, &container, None).unwrap();
}

#[test]
fn deleting_a_namespace_deletes_its_attachment() {
    let lab = lab(1);
    let host = &lab["h1"];
    let list = Conflist::new(host, "pods");
    let workload = host.workload("a").unwrap();
    let container = Container::for_workload(&workload);
    list.add(host, &container).unwrap();
    workload.destroy().unwrap();
    wait_endpoints(host, &[], SOON).unwrap();
    wait_nothing_left(host).unwrap();
    list.del(host, &container, None).unwrap();
    // The container ID can be used again.
    let workload = host.workload("a").unwrap();
    list.add(host, &Container::for_workload(&workload)).unwrap();
    list.del(host, &container, None).unwrap();
    wait_nothing_left(host).unwrap();
}

#[test]
fn concurrent_calls_do_not_conflict() {
    let lab = lab(1);
    let host = &lab["h1"];
    let list = Conflist::new(host, "pods");
    let workloads = host.bare_workloads("w", 24).unwrap();
    let containers: Vec<_> = workloads
        .iter()
        .map(|workload| Container::for_workload(workload).args("K8S_POD_NAME=same"))
        .collect();
    for _ in 0..3 {
        let results: Vec<Value> = thread::scope(|scope| {
            let adds: Vec<_> = containers
                .iter()
                .map(|container| scope.spawn(|| list.add(host, container).unwrap()))
                .collect();
            adds.into_iter().map(|add| add.join().unwrap()).collect()
        });
        let all: BTreeSet<String> = results.iter().flat_map(addresses).collect();
        assert_eq!(all.len(), 2 * containers.len());
        thread::scope(|scope| {
            for (container, result) in containers.iter().zip(&results) {
                scope.spawn(|| list.check(host, container, result).unwrap());
            }
        });
        thread::scope(|scope| {
            for container in &containers {
                // Two concurrent DELs of each container both succeed.
                scope.spawn(|| list.del(host, container, None).unwrap());
                scope.spawn(|| list.del(host, &container.without_netns(), None).unwrap());
            }
        });
        wait_nothing_left(host).unwrap();
    }
    // ADD and DEL of one container at the same time: the state is that of the later one.
    let container = &containers[0];
    for _ in 0..10 {
        thread::scope(|scope| {
            let add = scope.spawn(|| list.call_ovl(host, "ADD", container).unwrap());
            scope.spawn(|| list.del(host, container, None).unwrap());
            let add = add.join().unwrap();
            add.result().unwrap();
        });
        let interface_count = interfaces(&workloads[0]).unwrap().len();
        assert_eq!(endpoints(host).unwrap().len(), interface_count);
        list.del(host, container, None).unwrap();
        assert!(interfaces(&workloads[0]).unwrap().is_empty());
    }
    wait_nothing_left(host).unwrap();
}

#[test]
fn reference_plugins_can_be_chained() {
    let lab = lab(2);
    let (h1, h2) = (&lab["h1"], &lab["h2"]);
    let address = h1.address().unwrap();
    let workload = h1.workload("a").unwrap();
    let rate = json!({ "type": "bandwidth", "ingressRate": 80_000_000, "ingressBurst": 8_000_000,
        "egressRate": 80_000_000, "egressBurst": 8_000_000 });
    let list = Conflist::new(h1, "pods")
        .with_version("1.0.0")
        .with_first(json!({ "type": "loopback" }))
        .with_last(json!({ "type": "portmap", "capabilities": { "portMappings": true } }))
        .with_last(json!({ "type": "firewall", "backend": "iptables" }))
        .with_last(json!({ "type": "tuning", "sysctl": { "net.core.somaxconn": "500" }, "promisc": true }))
        .with_last(rate);
    let ports = json!([{ "hostPort": 8080, "containerPort": 80, "protocol": "tcp" }]);
    let container = Container::for_workload(&workload).capability("portMappings", ports);
    let result = list.add(h1, &container).unwrap();
    let sandboxed =
        result["interfaces"].as_array().unwrap().iter().filter(|each| each["sandbox"].is_string());
    assert_eq!(sandboxed.map(|each| text(&each["name"])).collect::<Vec<_>>(), ["lo", "eth0"]);
    let mut checked = list.clone();
    // Debian's portmap 1.1.1 looks for its IPv4 rules in ip6tables too, and misses them.
    checked.plugins.retain(|plugin| plugin["type"] != "portmap");
    checked.check(h1, &container, &result).unwrap();
    // The other host reaches the published port through the whole chain.
    let echo = workload.tcp_echo(80).unwrap();
    wait_until(SOON, "the published port", || {
        let answer = h2.tcp_roundtrip(address, 8080, b"through")?;
        ensure!(answer == b"through");
        Ok(())
    })
    .unwrap();
    drop(echo);
    let link = workload.ip_json(&["-d", "link", "show", "eth0"]).unwrap();
    assert_eq!(link[0]["promiscuity"], 1, "{link}");
    // Objects of the other plugins are not drift.
    ensure_settled(h1).unwrap();
    list.del(h1, &container, Some(&result)).unwrap();
    list.del(h1, &container.without_netns(), None).unwrap();
    assert!(h2.tcp_roundtrip(address, 8080, b"through").is_err());
    wait_nothing_left(h1).unwrap();
}

#[test]
fn plugin_publishes_ports_itself() {
    for lab in [lab(2), routed_lab(2)] {
        check_published_ports(&lab);
    }
}

/// Publishes ports of a container on the first of two hosts, restarts the daemon there, and deletes the container.
fn check_published_ports(lab: &Lab) {
    let (h1, h2) = (&lab["h1"], &lab["h2"]);
    let address = h1.address().unwrap();
    let workload = h1.workload("a").unwrap();
    let list = Conflist::new(h1, "pods")
        .with_version("1.0.0")
        .with("capabilities", json!({ "portMappings": true }))
        .with_last(json!({ "type": "tuning", "sysctl": { "net.core.somaxconn": "500" } }));
    let ports = json!([
        { "hostPort": 8080, "containerPort": 80, "protocol": "tcp" },
        { "hostPort": 8081, "containerPort": 81, "protocol": "TCP", "hostIP": "" },
        { "hostPort": 8053, "containerPort": 53, "protocol": "udp", "hostIP": "0.0.0.0" },
        { "hostPort": 0, "containerPort": 99, "protocol": "tcp" },
    ]);
    let container = Container::for_workload(&workload).capability("portMappings", ports);
    let result = list.add(h1, &container).unwrap();
    let row = &rows(h1, &["endpoints"]).unwrap()[0];
    assert_eq!(row["publish"].as_array().map(Vec::len), Some(2), "{row}");
    let _servers = [80, 81].map(|port| workload.tcp_echo(port).unwrap());
    let answers = |port: u16| -> anyhow::Result<()> {
        for (host, address) in [(h2, address), (h1, address), (h1, IpAddr::V4(Ipv4Addr::LOCALHOST))] {
            ensure!(
                host.tcp_roundtrip(address, port, b"through")? == b"through",
                "{} {address}",
                host.name()
            );
        }
        Ok(())
    };
    wait_until(SOON, "the published ports", || [8080, 8081].into_iter().try_for_each(answers)).unwrap();
    list.check(h1, &container, &result).unwrap();
    // A port belongs to one container until its DEL.
    let other = h1.workload("b").unwrap();
    let ports = json!([{ "hostPort": 8081, "containerPort": 1 }]);
    let rival = Container::for_workload(&other).capability("portMappings", ports);
    assert_refused(list.call_ovl(h1, "ADD", &rival).unwrap(), 102, &["8081"]);
    h1.kill9().unwrap();
    answers(8080).unwrap();
    h1.start().unwrap();
    h1.wait_ready(SOON).unwrap();
    answers(8081).unwrap();
    ensure_settled(h1).unwrap();
    list.del(h1, &container, Some(&result)).unwrap();
    assert!(h2.tcp_roundtrip(address, 8080, b"through").is_err());
    let result = list.add(h1, &rival).unwrap();
    list.del(h1, &rival, Some(&result)).unwrap();
    wait_nothing_left(h1).unwrap();
}

#[test]
fn plugin_limits_bandwidth_itself() {
    for lab in [lab(2), routed_lab(2)] {
        let [h1, h2] = ["h1", "h2"].map(|name| &lab[name]);
        let [limited, other] = [h1, h2].map(|host| host.workload("a").unwrap());
        let list = Conflist::new(h1, "pods").with("capabilities", json!({ "bandwidth": true }));
        // The bursts are a quarter of what is sent.
        let bandwidth = json!({ "ingressRate": 16_000_000, "ingressBurst": 2_000_000,
            "egressRate": 8_000_000, "egressBurst": 2_000_000 });
        let container = Container::for_workload(&limited).capability("bandwidth", bandwidth);
        let result = list.add(h1, &container).unwrap();
        let far = Container::for_workload(&other);
        let far_list = Conflist::new(h2, "pods");
        let far_result = far_list.add(h2, &far).unwrap();
        let [address, far_address] = [&result, &far_result].map(|result| addresses(result)[0].clone());
        other.ping_until(&address, SOON).unwrap();
        list.check(h1, &container, &result).unwrap();
        ensure_settled(h1).unwrap();
        for (from, to, at, rate) in
            [(&other, &limited, &address, 2_000_000.0), (&limited, &other, &far_address, 1_000_000.0)]
        {
            let seconds = seconds_to_send(from, to, at, 1_000_000).unwrap();
            // Without a limit it takes some milliseconds.
            let least = 750_000.0 / rate;
            assert!((0.9 * least..10.0 * least + 5.0).contains(&seconds), "{seconds} s at {rate} bytes/s");
        }
        list.del(h1, &container, Some(&result)).unwrap();
        far_list.del(h2, &far, Some(&far_result)).unwrap();
        wait_nothing_left(h1).unwrap();
    }
}

/// Returns the time until a workload has received some bytes from another one by TCP.
fn seconds_to_send(from: &Workload, to: &Workload, at: &str, bytes: usize) -> anyhow::Result<f64> {
    let at: SocketAddr = SocketAddr::new(at.parse()?, 7000);
    let listener = to.run(|| TcpListener::bind(at))??;
    let mut sender = from.run(|| TcpStream::connect_timeout(&at, SOON))??;
    let (mut receiver, _) = listener.accept()?;
    let started = Instant::now();
    thread::scope(|scope| {
        let sent = scope.spawn(move || sender.write_all(&vec![7; bytes]));
        let received = io::copy(&mut receiver, &mut io::sink())?;
        sent.join().unwrap()?;
        ensure!(received == bytes as u64, "{received} bytes arrived");
        Ok(started.elapsed().as_secs_f64())
    })
}

#[test]
fn installed_conflist_and_plugin_work() {
    let lab = lab(1);
    let host = &lab["h1"];
    let dir = host.dir().join("cni");
    let (conf, bin) = (dir.join("net.d"), dir.join("bin"));
    let plugin = cni::binary().unwrap();
    let args = [
        "cni",
        "install",
        "--name",
        "k8s",
        "--portmap",
        "--binary",
        plugin.to_str().unwrap(),
        "--conf-dir",
        conf.to_str().unwrap(),
        "--bin-dir",
        bin.to_str().unwrap(),
    ];
    // The plugin loopback is brought where it is missing.
    let (conflist, binary) = (conf.join("k8s.conflist"), bin.join("ovl-cni"));
    let first = json!({ "conflist": conflist, "binary": binary, "loopback": bin.join("loopback") });
    for expected in [first, json!({ "conflist": conflist, "binary": binary })] {
        assert_eq!(host.ctl_json(&args).unwrap(), expected);
    }
    let names = |dir: &Path| -> BTreeSet<String> {
        let files = fs::read_dir(dir).unwrap();
        files.map(|file| file.unwrap().file_name().into_string().unwrap()).collect()
    };
    assert_eq!(names(&conf), ["k8s.conflist".to_owned()].into());
    assert_eq!(names(&bin), ["loopback", "ovl-cni"].map(str::to_owned).into());
    let mode = |path: &Path| {
        use std::os::unix::fs::PermissionsExt as _;
        fs::metadata(path).unwrap().permissions().mode() & 0o7777
    };
    assert_eq!((mode(&conf.join("k8s.conflist")), mode(&bin.join("ovl-cni"))), (0o644, 0o755));
    assert_eq!(fs::read(bin.join("ovl-cni")).unwrap(), fs::read(plugin).unwrap());
    let list = Conflist::read(&conf.join("k8s.conflist")).unwrap();
    assert_eq!((list.name.as_str(), list.version.as_str()), ("k8s", "1.0.0"));
    let container =
        Container::for_workload(&host.workload("a").unwrap()).capability("portMappings", json!([]));
    let result = list.add(host, &container).unwrap();
    list.check(host, &container, &result).unwrap();
    list.del(host, &container, Some(&result)).unwrap();
    wait_nothing_left(host).unwrap();
    // A failed install leaves nothing behind.
    let error = ovl_tests::ctl_error(
        host,
        &[
            "cni",
            "install",
            "--binary",
            "/none",
            "--conf-dir",
            conf.to_str().unwrap(),
            "--bin-dir",
            bin.to_str().unwrap(),
        ],
    )
    .unwrap();
    assert_contains(&error, &["/none", "--binary"]);
    assert_eq!(names(&conf).len(), 1);
}
