//! containerd on the hosts of a lab, driven through the CRI as the kubelet drives it.

#![allow(clippy::unwrap_used, reason = "tests, and helpers of tests")]

use netns_lab::Signal;
use ovl_tests::runtime::{
    CommandTarget, Containerd, HostSnapshot, PodOptions, ensure_reaches, lab, wait_endpoint_count,
    wait_http_source,
};

#[test]
fn pods_on_two_hosts_communicate_with_the_addresses_that_the_runtime_reports() {
    let lab = lab().unwrap();
    let (h1, h2) = (&lab["h1"], &lab["h2"]);
    let (one, two) = (Containerd::start(h1).unwrap(), Containerd::start(h2).unwrap());
    let annotations = [
        ("ovl.example/team", "blue"),
        ("note", "two words, \"quoted\""),
        ("kubernetes.io/ingress-bandwidth", "80M"),
    ];
    let web = one.run("web", &PodOptions { annotations: &annotations, ..PodOptions::default() }).unwrap();
    let db = two.run("db", &PodOptions::default()).unwrap();
    ensure_reaches(&web, &db).unwrap();
    ensure_reaches(&db, &web).unwrap();
    wait_endpoint_count(h1, 2).unwrap();
    for pod in [&web, &db] {
        assert_eq!(pod.reported_addresses().unwrap(), pod.addresses().unwrap());
    }

    // Pod names are unique only within a Kubernetes namespace.
    let other = one.run("web", &PodOptions { namespace: "staging", ..PodOptions::default() }).unwrap();
    ensure_reaches(&other, &web).unwrap();
    ensure_reaches(&web, &other).unwrap();

    for (name, value) in annotations {
        assert_eq!(web.annotations().unwrap()[name], value);
    }
    let calls = one.cni.calls().unwrap();
    let [add, _] = &calls[..] else { panic!("{calls:?}") };
    assert_eq!((add.command.as_str(), &add.container), ("ADD", &web.id));
    let args: Vec<&str> = add.args.split(';').collect();
    for arg in ["K8S_POD_NAME=web", "K8S_POD_NAMESPACE=default", "K8S_POD_UID=uid-of-web-in-default"] {
        assert!(args.contains(&arg), "{args:?}");
    }
    let sent = &add.config["runtimeConfig"]["io.kubernetes.cri.pod-annotations"];
    assert_eq!(sent["ovl.example/team"], "blue", "{}", add.config);
    let limits = h1.exec_ok(["tc", "qdisc", "show"]).unwrap();
    assert!(limits.lines().any(|line| line.contains("tbf") && line.contains("rate 80Mbit")), "{limits}");
}

#[test]
fn pod_with_a_host_port_is_reachable_and_leaves_no_state() {
    let lab = lab().unwrap();
    let (h1, h2) = (&lab["h1"], &lab["h2"]);
    let containerd = Containerd::start(h1).unwrap();
    let before = HostSnapshot::take(h1).unwrap();
    let pod = containerd.run("web", &PodOptions { host_ports: &[(18080, 8080)], ..PodOptions::default() });
    let pod = pod.unwrap();
    for (server, client) in h1.addresses().into_iter().zip(h2.addresses()) {
        let seen = wait_http_source(h2, server, 18080).unwrap();
        assert_eq!(seen, client, "the pod sees the client's own address");
    }
    let addresses = pod.addresses().unwrap();

    pod.stop().unwrap();
    assert!(!pod.is_ready().unwrap());
    before.wait_nothing_left(&addresses).unwrap();
    h2.http_source(h1.addresses()[0], 18080).expect_err("the host port is not released");

    // As the kubelet does: a second stop, and a second remove, when the namespace does not exist any more.
    pod.stop().unwrap();
    pod.remove().unwrap();
    pod.remove().unwrap();
    let calls = containerd.cni.calls().unwrap();
    let deletes: Vec<_> = calls.iter().filter(|call| call.command == "DEL").collect();
    assert!(deletes.len() >= 2, "{calls:?}");
    assert!(deletes.iter().all(|call| call.container == pod.id), "{calls:?}");
    assert!(!deletes[0].netns.is_empty() && deletes[1].netns.is_empty(), "{calls:?}");
    before.wait_nothing_left(&addresses).unwrap();

    // The next pod can use the port.
    let next = containerd.run("web", &PodOptions { host_ports: &[(18080, 8080)], ..PodOptions::default() });
    let next = next.unwrap();
    wait_http_source(h2, h1.addresses()[0], 18080).unwrap();
    wait_endpoint_count(h1, 1).unwrap();
    next.stop().unwrap();
    next.remove().unwrap();
    wait_endpoint_count(h1, 0).unwrap();
}

#[test]
fn pods_survive_a_restart_of_the_runtime() {
    let lab = lab().unwrap();
    let (h1, h2) = (&lab["h1"], &lab["h2"]);
    let (mut one, two) = (Containerd::start(h1).unwrap(), Containerd::start(h2).unwrap());
    let before = HostSnapshot::take(h1).unwrap();
    let old = one.run("old", &PodOptions::default()).unwrap();
    let far = two.run("far", &PodOptions::default()).unwrap();
    ensure_reaches(&old, &far).unwrap();
    let addresses = old.addresses().unwrap();
    for signal in [Signal::SIGTERM, Signal::SIGKILL] {
        one.end_daemon(signal).unwrap();
        for &address in &addresses {
            far.ping(address).expect("pods stay reachable while the runtime is stopped");
        }
        one.start_daemon().unwrap();
        assert!(old.is_ready().unwrap());
        assert_eq!(old.addresses().unwrap(), addresses);
        ensure_reaches(&old, &far).unwrap();
    }
    let new = one.run("new", &PodOptions::default()).unwrap();
    assert!(new.addresses().unwrap().iter().all(|address| !addresses.contains(address)));
    ensure_reaches(&new, &old).unwrap();
    wait_endpoint_count(h1, 3).unwrap();

    let gone = [addresses, new.addresses().unwrap(), far.addresses().unwrap()].concat();
    for pod in [&old, &new, &far] {
        pod.stop().unwrap();
        pod.remove().unwrap();
    }
    before.wait_nothing_left(&gone).unwrap();
}
