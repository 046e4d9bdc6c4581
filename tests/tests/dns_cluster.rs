//! Cluster DNS: names of pods and Services, and search lists that cost one query.

#![allow(clippy::unwrap_used, reason = "tests, and helpers of tests")]

use std::net::Ipv4Addr;
use std::path::PathBuf;

use anyhow::{Context as _, Result, ensure};
use netns_lab::{Host, Lab, Netns, Underlay, Workload, wait_until};
use ovl_tests::cni::{Conflist, Container};
use ovl_tests::ports::outsider;
use ovl_tests::resolver::{Behaviour, FakeResolver, ResolvConf, config, dig, status};
use ovl_tests::routed::create_routed_network;
use ovl_tests::service::apply;
use ovl_tests::{Attached, SOON, attach, create_network, problems, start_lab_with, text, wait_clean};
use serde_json::json;

/// Address of the cluster's DNS on every host.
const AT: &str = "10.96.0.10";
const SEARCH: &str = "shop.svc.cluster.local svc.cluster.local cluster.local";

/// A lab whose hosts forward to 127.0.0.1, with an endpoint on each host in the Kubernetes namespace `shop`.
fn lab_with_pods(hosts: usize, more: &str) -> (Lab, ResolvConf, Vec<Attached>) {
    let (config, file) = config(hosts, &["127.0.0.1"], more).unwrap();
    let lab = start_lab_with(config).unwrap();
    create_network(&lab, "blue", &["--subnet", "10.70.0.0/24"]).unwrap();
    let pods = lab.hosts().iter().enumerate();
    let pods =
        pods.map(|(i, host)| attach(host, &format!("p{i}"), "blue", &["--namespace", "shop"]).unwrap());
    let pods = pods.collect();
    (lab, file, pods)
}

/// A resolv.conf for `ip netns exec` in a namespace. It is removed when dropped.
struct NetnsResolvConf(PathBuf);

impl NetnsResolvConf {
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

impl Drop for NetnsResolvConf {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// Number of queries so far with an outcome, from `ovlctl metrics`.
fn count(lab: &Lab, outcome: &str) -> u64 {
    let metrics = lab.hosts()[0].ctl_ok(&["metrics"]).unwrap();
    let name = format!("ovl_dns_queries_total{{outcome=\"{outcome}\"}} ");
    let line = metrics.lines().find_map(|line| line.strip_prefix(&name)).map(str::to_owned);
    line.with_context(|| format!("no {name} in {metrics}")).unwrap().parse().unwrap()
}

#[test]
fn external_name_with_ndots_5_costs_one_upstream_query() {
    let (lab, _file, pods) = lab_with_pods(1, "");
    let upstream = FakeResolver::start(&lab.hosts()[0], Ipv4Addr::LOCALHOST, Behaviour::Answers).unwrap();
    let _inside = NetnsResolvConf::write(&pods[0].workload).unwrap();
    let name = pods[0].workload.netns_name().to_owned();
    let before = ["zone", "cache", "forwarded"].map(|outcome| count(&lab, outcome));
    let output = lab.hosts()[0]
        .exec_ok(["ip", "netns", "exec", &name, "getent", "ahostsv4", "api.example.org"])
        .unwrap();
    assert!(output.starts_with("192.0.2.7 "), "{output}");
    assert_eq!(upstream.udp_queries(), 1);
    let after = ["zone", "cache", "forwarded"].map(|outcome| count(&lab, outcome));
    // The C library sent one query, which was forwarded. No query of its search list was answered with NXDOMAIN.
    assert_eq!([0, 1, 2].map(|i| after[i] - before[i]), [0, 0, 1]);
    // The answer has a CNAME record to the external name, over UDP and TCP.
    let walked = "api.example.org.shop.svc.cluster.local";
    for how in ["+notcp", "+tcp"] {
        assert_eq!(dig(&pods[0].workload, AT, &[walked, how]).unwrap(), ["192.0.2.7", "api.example.org."]);
    }
    assert_eq!(upstream.udp_queries(), 1);
    let answer = lab.hosts()[0].ctl_json(&["dns", walked, "--from", "p0"]).unwrap();
    assert!(text(&answer["why"]).contains("it stands for api.example.org"), "{answer}");
}

#[test]
fn search_list_shortcut_applies_only_to_the_right_names() {
    let (lab, _file, pods) = lab_with_pods(1, "");
    let upstream = FakeResolver::start(&lab.hosts()[0], Ipv4Addr::LOCALHOST, Behaviour::Answers).unwrap();
    let ask = |name: &str| status(&pods[0].workload, AT, &[name]).unwrap();
    for name in [
        // A single label belongs to the cluster.
        "api.shop.svc.cluster.local",
        // The search list of another namespace, and later steps of the pod's own one.
        "api.example.org.default.svc.cluster.local",
        "api.example.org.svc.cluster.local",
        "api.example.org.cluster.local",
        // A cluster name that does not exist, in full: the shortcut would lead to the cluster's domain again.
        "db.shop.svc.cluster.local.shop.svc.cluster.local",
    ] {
        assert_eq!(ask(name), "NXDOMAIN", "{name}");
    }
    assert_eq!(upstream.udp_queries(), 0);
    // An upstream NXDOMAIN is passed on, and an upstream failure is SERVFAIL.
    drop(upstream);
    let denies = FakeResolver::start(&lab.hosts()[0], Ipv4Addr::LOCALHOST, Behaviour::NxDomain).unwrap();
    assert_eq!(ask("nobody.example.org.shop.svc.cluster.local"), "NXDOMAIN");
    assert_eq!(denies.udp_queries(), 1);
    drop(denies);
    assert_eq!(ask("later.example.org.shop.svc.cluster.local"), "SERVFAIL");
}

#[test]
fn search_list_shortcut_can_be_disabled() {
    let (lab, _file, pods) = lab_with_pods(1, "walk_search_lists = false\n");
    let upstream = FakeResolver::start(&lab.hosts()[0], Ipv4Addr::LOCALHOST, Behaviour::Answers).unwrap();
    let walked = "api.example.org.shop.svc.cluster.local";
    assert_eq!(status(&pods[0].workload, AT, &[walked]).unwrap(), "NXDOMAIN");
    assert_eq!(upstream.udp_queries(), 0);
    assert_eq!(dig(&pods[0].workload, AT, &["api.example.org"]).unwrap(), ["192.0.2.7"]);
}

#[test]
fn cluster_dns_has_one_address_on_every_host_and_resolves_pods_by_address() {
    let (lab, _file, pods) = lab_with_pods(2, "cluster_domain = \"k8s.test\"\n");
    for pod in &pods {
        assert_eq!(dig(&pod.workload, AT, &["dns-version.k8s.test", "TXT"]).unwrap(), ["\"1.1.0\""]);
        // Each pod's name resolves on each host.
        for other in &pods {
            let name = format!("{}.shop.pod.k8s.test", other.address().replace('.', "-"));
            wait_until(SOON, &name, || {
                let found = dig(&pod.workload, AT, &[&name])?;
                ensure!(found == [other.address()], "{found:?}");
                Ok(())
            })
            .unwrap();
        }
        // Names with names beneath them exist (NOERROR); all others do not (NXDOMAIN).
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
    wait_until(SOON, "the pod's name to be withdrawn", || {
        ensure!(status(&pods[0].workload, AT, &[&name])? == "NXDOMAIN");
        Ok(())
    })
    .unwrap();
    assert!(problems(h1).unwrap().is_empty());
}

#[test]
fn pods_on_an_internal_network_resolve_cluster_names_and_reach_nothing_outside() {
    let (lab, _file, _pods) = lab_with_pods(2, "");
    let [h1, h2] = lab.hosts() else { panic!() };
    let _upstream = FakeResolver::start(h1, Ipv4Addr::LOCALHOST, Behaviour::Answers).unwrap();
    apply(&lab, h1, SERVICES).unwrap();
    create_network(&lab, "inner", &["--subnet", "10.72.0.0/24", "--subnet", "fd72::/64", "--internal"])
        .unwrap();
    create_routed_network(
        &lab,
        "routed",
        &["--subnet", "10.73.0.0/16", "--subnet", "fd73::/48", "--internal"],
    )
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
        // No egress, and of the host only the resolver is reachable.
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
fn services_have_the_specified_names_and_resolve_through_the_search_list() {
    let (lab, _file, pods) = lab_with_pods(2, "");
    let [h1, h2] = lab.hosts() else { panic!() };
    let upstream = FakeResolver::start(h1, Ipv4Addr::LOCALHOST, Behaviour::Answers).unwrap();
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
        // Not the name on the network, `p1.blue`.
        (vec!["-x", &pod], vec!["my-pod.db.shop.svc.cluster.local.".to_owned()]),
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
    assert_eq!(upstream.udp_queries(), 1);
    let _inside = NetnsResolvConf::write(asker).unwrap();
    let name = asker.netns_name().to_owned();
    for (short, expected) in [("web", "10.96.0.50"), ("db.shop", &*pod), ("my-pod.db", &*pod)] {
        let found = h1.exec_ok(["ip", "netns", "exec", &name, "getent", "ahostsv4", short]).unwrap();
        assert!(found.starts_with(expected), "{short}: {found}");
    }
    assert_eq!(upstream.udp_queries(), 1);
    // A backend that is not ready has no record, and a headless Service without ready backends has no name (section
    // 2.4.1 of the specification).
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
    wait_until(SOON, "the Service's name to be withdrawn", || {
        ensure!(status(asker, AT, &["web.shop.svc.cluster.local"])? == "NXDOMAIN");
        Ok(())
    })
    .unwrap();
}

/// ExternalNames that lead to names of the cluster, and to each other.
const ALIASES: &str = "apiVersion: v1
kind: Service
metadata: {name: web, namespace: shop}
spec: {clusterIP: 10.96.0.50, ports: [{port: 80}]}
---
apiVersion: v1
kind: Service
metadata: {name: one, namespace: shop}
spec: {type: ExternalName, externalName: web.shop.svc.cluster.local}
---
apiVersion: v1
kind: Service
metadata: {name: two, namespace: shop}
spec: {type: ExternalName, externalName: one.shop.svc.cluster.local}
---
apiVersion: v1
kind: Service
metadata: {name: lost, namespace: shop}
spec: {type: ExternalName, externalName: no.other.svc.cluster.local}
---
apiVersion: v1
kind: Service
metadata: {name: loop, namespace: shop}
spec: {type: ExternalName, externalName: loop.shop.svc.cluster.local}
";

#[test]
fn external_names_that_lead_to_the_cluster_are_never_asked_of_others() {
    let (lab, _file, pods) = lab_with_pods(1, "");
    let h1 = &lab.hosts()[0];
    let upstream = FakeResolver::start(h1, Ipv4Addr::LOCALHOST, Behaviour::Answers).unwrap();
    apply(&lab, h1, ALIASES).unwrap();
    let asker = &pods[0].workload;
    let (web, one, two) =
        ("web.shop.svc.cluster.local.", "one.shop.svc.cluster.local.", "two.shop.svc.cluster.local.");
    let walked = "svc.cluster.local.shop.svc.cluster.local";
    wait_until(SOON, "the Services to have names", || {
        ensure!(dig(asker, AT, &["loop.shop.svc.cluster.local", "CNAME"])?.len() == 1);
        Ok(())
    })
    .unwrap();
    for how in ["+notcp", "+tcp"] {
        for (name, expected) in [
            (one.to_owned(), vec!["10.96.0.50", web]),
            (two.to_owned(), vec!["10.96.0.50", one, web]),
            (format!("one.shop.{walked}"), vec!["10.96.0.50", one, web]),
            (format!("two.shop.{walked}"), vec!["10.96.0.50", one, two, web]),
        ] {
            assert_eq!(dig(asker, AT, &[&name, how]).unwrap(), expected, "{name} {how}");
        }
        for (name, expected) in [
            ("lost.shop.svc.cluster.local".to_owned(), "NXDOMAIN"),
            (format!("lost.shop.{walked}"), "NXDOMAIN"),
            ("loop.shop.svc.cluster.local".to_owned(), "SERVFAIL"),
        ] {
            assert_eq!(status(asker, AT, &[&name, how]).unwrap(), expected, "{name} {how}");
        }
    }
    assert_eq!(upstream.udp_queries(), 0);
}

/// A pod with the host's network and `dnsPolicy: ClusterFirstWithHostNet` has the cluster's DNS as its only resolver.
#[test]
fn programs_of_a_host_reach_the_cluster_dns() {
    let (config, _file) = config(2, &["127.0.0.1"], "").unwrap();
    let lab = start_lab_with(config.underlay(Underlay::Dual)).unwrap();
    let [h1, h2] = lab.hosts() else { panic!() };
    let upstream = FakeResolver::start(h1, Ipv4Addr::LOCALHOST, Behaviour::Answers).unwrap();
    // Every kubelet has a rule that lets nothing from other addresses reach 127.0.0.0/8, unless it was translated.
    let to_loopback = "add rule ip kubelet out ip saddr != 127.0.0.0/8 ip daddr 127.0.0.0/8";
    let rules = [
        "add table ip kubelet".to_owned(),
        "add chain ip kubelet out { type filter hook output priority 0; }".to_owned(),
        format!("{to_loopback} ct state established,related accept"),
        format!("{to_loopback} ct status dnat accept"),
        format!("{to_loopback} drop"),
    ];
    h1.exec_ok(["nft", &rules.join("; ")]).unwrap();
    // As with any address that is not on a link, the kernel wants a route before packets can be led elsewhere.
    for route in ["default", "::/0"] {
        h1.exec_ok(["ip", "route", "replace", route, "dev", "eth0"]).unwrap();
    }
    let at = [AT, "fd00:10:96::a", "169.254.79.53", "fd6f:766c::53"];
    let web = "web.shop.svc.cluster.local";
    apply(&lab, h2, ALIASES).unwrap();
    let wait_resolved = || {
        for server in at {
            for how in ["+notcp", "+tcp"] {
                wait_until(SOON, &format!("{server} {how} to answer the host"), || {
                    let found = dig(h1, server, &[web, how])?;
                    ensure!(found == ["10.96.0.50"], "{found:?}");
                    Ok(())
                })
                .unwrap();
            }
        }
    };
    // Without a network on this host, and with one.
    wait_resolved();
    create_network(&lab, "blue", &["--subnet", "10.70.0.0/24"]).unwrap();
    let pod = attach(h1, "p0", "blue", &["--namespace", "shop"]).unwrap();
    wait_resolved();
    assert_eq!(dig(&pod.workload, AT, &[web]).unwrap(), ["10.96.0.50"]);
    assert_eq!(dig(h1, AT, &["-x", "10.96.0.50"]).unwrap(), [format!("{web}.")]);
    // Other names are those of the host's resolvers, and names of the cluster are never asked of them.
    assert_eq!(dig(h1, AT, &["api.example.org"]).unwrap(), ["192.0.2.7"]);
    assert_eq!(status(h1, AT, &["no.shop.svc.cluster.local"]).unwrap(), "NXDOMAIN");
    assert_eq!(upstream.udp_queries(), 1);
    h1.restart().unwrap();
    wait_resolved();
    // Nobody else reaches these ports.
    let outside = outsider(&lab).unwrap();
    outside.exec_ok(["ip", "route", "add", AT, "via", &h1.address().unwrap().to_string()]).unwrap();
    assert!(dig_fails(&outside, AT, web));
    wait_clean(lab.hosts(), SOON).unwrap();
}

/// Whether a query gets no answer.
fn dig_fails(from: &Netns, server: &str, name: &str) -> bool {
    let at = format!("@{server}");
    !from.exec(["dig", "+time=1", "+tries=1", &at, name]).unwrap().success()
}

#[test]
fn cni_result_has_cluster_dns_once_a_service_exists_unless_overridden() {
    let (lab, _file, _pods) = lab_with_pods(1, "");
    let host = &lab.hosts()[0];
    let add = |name: &str, list: &Conflist, args: &str| {
        let workload = host.workload(name).unwrap();
        let result = list.add(host, &Container::for_workload(&workload).args(args)).unwrap();
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
    // A container without a pod is in the default namespace.
    assert_eq!(add("plain", &list, "").1, of("default"));
    // The network's DNS configuration takes precedence.
    let own = json!({ "nameservers": ["192.0.2.53"] });
    assert_eq!(add("own", &list.with("dns", own.clone()), "").1, own);
    // With this resolv.conf the C library resolves the short name of a Service.
    let _inside = NetnsResolvConf::write(&pod).unwrap();
    let name = pod.netns_name().to_owned();
    let found = host.exec_ok(["ip", "netns", "exec", &name, "getent", "ahostsv4", "web"]).unwrap();
    assert!(found.starts_with("10.96.0.50"), "{found}");
}
