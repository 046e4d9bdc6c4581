//! The cluster's DNS: pods' names, and search lists that cost one query.

#![allow(clippy::unwrap_used, reason = "tests, and helpers of tests")]

use std::net::Ipv4Addr;
use std::path::PathBuf;

use anyhow::{Context as _, Result, ensure};
use netns_lab::{Host, Lab, Workload, wait_until};
use ovl_tests::cni::{Conflist, Container};
use ovl_tests::resolver::{FakeResolver, Mood, ResolvConf, config, dig, status};
use ovl_tests::routed::make_routed;
use ovl_tests::service::apply;
use ovl_tests::{Attached, SOON, attach, make_network, problems, started_with, text, wait_clean};
use serde_json::json;

/// Where the cluster's DNS is, on every host.
const AT: &str = "10.96.0.10";
const SEARCH: &str = "shop.svc.cluster.local svc.cluster.local cluster.local";

/// Hosts whose other resolver is at 127.0.0.1, and an endpoint on each in the Kubernetes namespace `shop`.
fn world(hosts: usize, more: &str) -> (Lab, ResolvConf, Vec<Attached>) {
    let (config, file) = config(hosts, &["127.0.0.1"], more).unwrap();
    let lab = started_with(config).unwrap();
    make_network(&lab, "blue", &["--subnet", "10.70.0.0/24"]).unwrap();
    let pods = lab.hosts().iter().enumerate();
    let pods =
        pods.map(|(i, host)| attach(host, &format!("p{i}"), "blue", &["--namespace", "shop"]).unwrap());
    let pods = pods.collect();
    (lab, file, pods)
}

/// A resolv.conf that `ip netns exec` shows inside; removed when dropped.
struct Inside(PathBuf);

impl Inside {
    fn write(workload: &Workload) -> Result<Self> {
        let dir = PathBuf::from("/etc/netns").join(workload.netns_name());
        std::fs::create_dir_all(&dir)?;
        std::fs::write(
            dir.join("resolv.conf"),
            format!("nameserver {AT}\nsearch {SEARCH}\noptions ndots:5\n"),
        )?;
        Ok(Self(dir))
    }
}

impl Drop for Inside {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// Queries so far, by what became of them.
fn count(lab: &Lab, outcome: &str) -> u64 {
    let metrics = lab.hosts()[0].ctl_ok(&["metrics"]).unwrap();
    let name = format!("ovl_dns_queries_total{{outcome=\"{outcome}\"}} ");
    let line = metrics.lines().find_map(|line| line.strip_prefix(&name)).map(str::to_owned);
    line.with_context(|| format!("no {name} in {metrics}")).unwrap().parse().unwrap()
}

#[test]
fn ndots_5_an_external_name_costs_one_query_upstream_and_one_answer() {
    let (lab, _file, pods) = world(1, "");
    let upstream = FakeResolver::start(&lab.hosts()[0], Ipv4Addr::LOCALHOST, Mood::Answers).unwrap();
    let _inside = Inside::write(&pods[0].workload).unwrap();
    let name = pods[0].workload.netns_name().to_owned();
    let before = ["zone", "cache", "forwarded"].map(|outcome| count(&lab, outcome));
    let output = lab.hosts()[0]
        .exec_ok(["ip", "netns", "exec", &name, "getent", "ahostsv4", "api.example.org"])
        .unwrap();
    assert!(output.starts_with("192.0.2.7 "), "{output}");
    assert_eq!(upstream.asked(), 1);
    let after = ["zone", "cache", "forwarded"].map(|outcome| count(&lab, outcome));
    // The one query of the C library was the one that went out; none was answered with nothing.
    assert_eq!([0, 1, 2].map(|i| after[i] - before[i]), [0, 0, 1]);
    // The answer says what it stands for, by UDP and TCP.
    let walked = "api.example.org.shop.svc.cluster.local";
    for how in ["+notcp", "+tcp"] {
        assert_eq!(dig(&pods[0].workload, AT, &[walked, how]).unwrap(), ["192.0.2.7", "api.example.org."]);
    }
    assert_eq!(upstream.asked(), 1);
    let answer = lab.hosts()[0].ctl_json(&["dns", walked, "--from", "p0"]).unwrap();
    assert!(text(&answer["why"]).contains("it stands for api.example.org"), "{answer}");
}

#[test]
fn a_walk_is_never_answered_for_a_name_that_it_should_not() {
    let (lab, _file, pods) = world(1, "");
    let upstream = FakeResolver::start(&lab.hosts()[0], Ipv4Addr::LOCALHOST, Mood::Answers).unwrap();
    let ask = |name: &str| status(&pods[0].workload, AT, &[name]).unwrap();
    for name in [
        // One label is the cluster's, or nobody's.
        "api.shop.svc.cluster.local",
        // The search list of another namespace, and later steps of the own one.
        "api.example.org.default.svc.cluster.local",
        "api.example.org.svc.cluster.local",
        "api.example.org.cluster.local",
        // A name of the cluster that there is not, in full: its walk ends where it begins.
        "db.shop.svc.cluster.local.shop.svc.cluster.local",
    ] {
        assert_eq!(ask(name), "NXDOMAIN", "{name}");
    }
    assert_eq!(upstream.asked(), 0);
    // What others deny is denied, and what they cannot say is a failure.
    drop(upstream);
    let denies = FakeResolver::start(&lab.hosts()[0], Ipv4Addr::LOCALHOST, Mood::Denies).unwrap();
    assert_eq!(ask("nobody.example.org.shop.svc.cluster.local"), "NXDOMAIN");
    assert_eq!(denies.asked(), 1);
    drop(denies);
    assert_eq!(ask("later.example.org.shop.svc.cluster.local"), "SERVFAIL");
}

#[test]
fn walking_search_lists_can_be_switched_off() {
    let (lab, _file, pods) = world(1, "walk_search_lists = false\n");
    let upstream = FakeResolver::start(&lab.hosts()[0], Ipv4Addr::LOCALHOST, Mood::Answers).unwrap();
    let walked = "api.example.org.shop.svc.cluster.local";
    assert_eq!(status(&pods[0].workload, AT, &[walked]).unwrap(), "NXDOMAIN");
    assert_eq!(upstream.asked(), 0);
    assert_eq!(dig(&pods[0].workload, AT, &["api.example.org"]).unwrap(), ["192.0.2.7"]);
}

#[test]
fn the_clusters_dns_is_at_one_address_on_every_node_and_knows_pods_by_address() {
    let (lab, _file, pods) = world(2, "cluster_domain = \"k8s.test\"\n");
    for pod in &pods {
        assert_eq!(dig(&pod.workload, AT, &["dns-version.k8s.test", "TXT"]).unwrap(), ["\"1.1.0\""]);
        // Each is found from each host.
        for other in &pods {
            let name = format!("{}.shop.pod.k8s.test", other.address().replace('.', "-"));
            wait_until(SOON, &name, || {
                let found = dig(&pod.workload, AT, &[&name])?;
                ensure!(found == [other.address()], "{found:?}");
                Ok(())
            })
            .unwrap();
        }
        // What has names beneath it is there; what is not, is not.
        for (name, expected) in [
            ("k8s.test", "NOERROR"),
            ("svc.k8s.test", "NOERROR"),
            ("shop.pod.k8s.test", "NOERROR"),
            ("10-70-0-250.shop.pod.k8s.test", "NXDOMAIN"),
            ("nobody.shop.svc.k8s.test", "NXDOMAIN"),
        ] {
            assert_eq!(status(&pod.workload, AT, &[name]).unwrap(), expected, "{name}");
        }
    }
    let [h1, h2] = lab.hosts() else { panic!() };
    h2.ctl_ok(&["detach", "p1", "--namespace", "shop"]).unwrap();
    let name = format!("{}.shop.pod.k8s.test", pods[1].address().replace('.', "-"));
    wait_until(SOON, "the pod's name to be gone", || {
        ensure!(status(&pods[0].workload, AT, &[&name])? == "NXDOMAIN");
        Ok(())
    })
    .unwrap();
    assert!(problems(h1).unwrap().is_empty());
}

#[test]
fn pods_on_an_internal_network_resolve_the_clusters_names_and_reach_nothing_outside() {
    let (lab, _file, _pods) = world(2, "");
    let [h1, h2] = lab.hosts() else { panic!() };
    let _upstream = FakeResolver::start(h1, Ipv4Addr::LOCALHOST, Mood::Answers).unwrap();
    apply(&lab, h1, SERVICES).unwrap();
    make_network(&lab, "inner", &["--subnet", "10.72.0.0/24", "--subnet", "fd72::/64", "--internal"])
        .unwrap();
    make_routed(&lab, "routed", &["--subnet", "10.73.0.0/16", "--subnet", "fd73::/48", "--internal"])
        .unwrap();
    for network in ["inner", "routed"] {
        let named = |host: &Host| {
            attach(host, &format!("{network}-{}", host.name()), network, &["--namespace", "shop"])
        };
        let (pod, other) = (named(h1).unwrap(), named(h2).unwrap());
        let by_address = format!("{}.shop.pod.cluster.local", other.address().replace('.', "-"));
        let questions =
            [(&*by_address, other.address()), ("web.shop.svc.cluster.local", "10.96.0.50".to_owned())];
        for at in [AT, "fd00:10:96::a", "127.0.0.11"] {
            for how in ["+notcp", "+tcp"] {
                for (name, expected) in &questions {
                    wait_until(SOON, &format!("{name} at {at} on {network} {how}"), || {
                        let found = dig(&pod.workload, at, &[name, how])?;
                        ensure!(found == std::slice::from_ref(expected), "{found:?}");
                        Ok(())
                    })
                    .unwrap();
                }
            }
        }
        // No way out, and none to the host but for its resolver.
        for address in [h1.address().unwrap().to_string(), h2.address().unwrap().to_string()] {
            let ping = pod.workload.exec(["ping", "-n", "-c1", "-W1", &address]).unwrap();
            assert!(!ping.success(), "{network}: {address} answers");
        }
    }
    wait_clean(lab.hosts(), SOON).unwrap();
}

const SERVICES: &str = "\
apiVersion: v1
kind: Service
metadata: {name: web, namespace: shop}
spec:
  clusterIP: 10.96.0.50
  selector: {app: web}
  ports: [{name: http, port: 80, targetPort: 8080}]
---
apiVersion: v1
kind: Service
metadata: {name: db, namespace: shop}
spec:
  clusterIP: None
  selector: {app: web}
  ports: [{name: pg, port: 5432}]
---
apiVersion: v1
kind: Pod
metadata: {name: p1, namespace: shop, labels: {app: web}}
spec: {hostname: my-pod, subdomain: db}
---
apiVersion: v1
kind: Service
metadata: {name: ext, namespace: other}
spec: {type: ExternalName, externalName: db.example.org}
";

#[test]
fn services_have_the_names_of_the_specification_and_my_api_resolves_through_the_search_list() {
    let (lab, _file, pods) = world(2, "");
    let [h1, h2] = lab.hosts() else { panic!() };
    let upstream = FakeResolver::start(h1, Ipv4Addr::LOCALHOST, Mood::Answers).unwrap();
    apply(&lab, h2, SERVICES).unwrap();
    let asker = &pods[0].workload;
    let pod = pods[1].address();
    for (question, expected) in [
        (vec!["web.shop.svc.cluster.local"], vec!["10.96.0.50".to_owned()]),
        (vec!["-x", "10.96.0.50"], vec!["web.shop.svc.cluster.local.".to_owned()]),
        (
            vec!["_http._tcp.web.shop.svc.cluster.local", "SRV"],
            vec!["0 1 80 web.shop.svc.cluster.local.".to_owned()],
        ),
        (vec!["db.shop.svc.cluster.local"], vec![pod.clone()]),
        (vec!["my-pod.db.shop.svc.cluster.local"], vec![pod.clone()]),
        (
            vec!["_pg._tcp.db.shop.svc.cluster.local", "SRV"],
            vec!["0 1 5432 my-pod.db.shop.svc.cluster.local.".to_owned()],
        ),
        (vec!["ext.other.svc.cluster.local"], vec!["192.0.2.7".to_owned(), "db.example.org.".to_owned()]),
        (
            vec!["web.shop.shop.svc.cluster.local"],
            vec!["10.96.0.50".to_owned(), "web.shop.svc.cluster.local.".to_owned()],
        ),
    ] {
        wait_until(SOON, &question.join(" "), || {
            let found = dig(asker, AT, &question)?;
            ensure!(found == expected, "{found:?}");
            Ok(())
        })
        .unwrap();
    }
    assert_eq!(upstream.asked(), 1);
    let _inside = Inside::write(asker).unwrap();
    let name = asker.netns_name().to_owned();
    for (short, expected) in [("web", "10.96.0.50"), ("db.shop", &*pod), ("my-pod.db", &*pod)] {
        let found = h1.exec_ok(["ip", "netns", "exec", &name, "getent", "ahostsv4", short]).unwrap();
        assert!(found.starts_with(expected), "{short}: {found}");
    }
    assert_eq!(upstream.asked(), 1);
    // A backend that is not ready has no record, a headless Service without ready ones no name (section 2.4.1 of the
    // specification), and a Service that is deleted neither.
    h2.ctl_ok(&["endpoint", "unready", "p1", "--namespace", "shop"]).unwrap();
    for (gone, expected) in
        [("my-pod.db.shop.svc.cluster.local", "NXDOMAIN"), ("db.shop.svc.cluster.local", "NXDOMAIN")]
    {
        wait_until(SOON, gone, || {
            ensure!(dig(asker, AT, &[gone])?.is_empty() && status(asker, AT, &[gone])? == expected);
            Ok(())
        })
        .unwrap();
    }
    h1.ctl_ok(&["delete", "service", "web", "--namespace", "shop"]).unwrap();
    wait_until(SOON, "the Service's name to be gone", || {
        ensure!(status(asker, AT, &["web.shop.svc.cluster.local"])? == "NXDOMAIN");
        Ok(())
    })
    .unwrap();
}

#[test]
fn a_runtime_is_told_the_clusters_dns_once_there_is_a_service_unless_it_knows_better() {
    let (lab, _file, _pods) = world(1, "");
    let host = &lab.hosts()[0];
    let add = |name: &str, list: &Conflist, args: &str| {
        let workload = host.workload(name).unwrap();
        let result = list.add(host, &Container::of(&workload).args(args)).unwrap();
        (workload, result["dns"].clone())
    };
    let list = Conflist::new(host, "blue");
    let shop = "K8S_POD_NAME=a;K8S_POD_NAMESPACE=shop;K8S_POD_INFRA_CONTAINER_ID=c";
    let (_early, dns) = add("early", &list, shop);
    assert_eq!(dns, json!({}));
    apply(&lab, host, SERVICES).unwrap();
    let of = |namespace: &str| {
        let svc = "svc.cluster.local";
        json!({
            "nameservers": [AT, "fd00:10:96::a"],
            "domain": "cluster.local",
            "search": [format!("{namespace}.{svc}"), svc, "cluster.local"],
            "options": ["ndots:5"],
        })
    };
    let (pod, dns) = add("pod", &list, &shop.replace("=a;", "=b;"));
    assert_eq!(dns, of("shop"));
    // Of no pod: in the namespace that it is counted to.
    assert_eq!(add("plain", &list, "").1, of("default"));
    // The network's own, and what the runtime asks for.
    let own = json!({ "nameservers": ["192.0.2.53"] });
    assert_eq!(add("own", &list.with("dns", own.clone()), "").1, own);
    // And it is so: with this resolv.conf the C library finds a Service by its short name.
    let _inside = Inside::write(&pod).unwrap();
    let name = pod.netns_name().to_owned();
    let found = host.exec_ok(["ip", "netns", "exec", &name, "getent", "ahostsv4", "web"]).unwrap();
    assert!(found.starts_with("10.96.0.50"), "{found}");
}
