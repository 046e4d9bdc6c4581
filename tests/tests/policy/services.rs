//! Policies apply to connections through Services.

use std::io::Read as _;
use std::net::{IpAddr, SocketAddr, TcpStream};
use std::time::Duration;

use anyhow::{Result, ensure};
use netns_lab::{Lab, Netns, wait_until};
use ovl_tests::policy::policy;
use ovl_tests::routed::create_routed_network;
use ovl_tests::service::{NamedServer, apply};
use ovl_tests::{Attached, SOON, create_network, rows, set_bridge_nf_call, start_lab, strings, wait_clean};
use serde_json::{Value, json};

use crate::{BOTH, FLAT, labelled, selector};

/// Checks that policies apply to Services by the pods at both ends, so a Service neither bypasses a policy nor is
/// blocked.
fn assert_policies_apply_to_services(create: impl Fn(&Lab)) {
    let lab = start_lab(2).unwrap();
    create(&lab);
    let database = labelled(&lab, "h2", "database", "database");
    let _server = NamedServer::start(&database.workload, "database", 8080).unwrap();
    let [api, near, web] = [("h1", "api"), ("h2", "api"), ("h1", "web")]
        .map(|(host, app)| labelled(&lab, host, &format!("{app}-{host}"), app));
    let service = json!({
        "apiVersion": "v1", "kind": "Service", "metadata": {"name": "database"},
        "spec": {
            "type": "NodePort", "selector": {"app": "database"}, "ipFamilyPolicy": "PreferDualStack",
            "ports": [{"port": 80, "targetPort": 8080, "nodePort": 30080}],
        },
    });
    apply(&lab, &lab["h1"], &service.to_string()).unwrap();
    let service = lab["h1"].ctl_json(&["get", "svc", "database"]).unwrap();
    let addresses: Vec<IpAddr> =
        strings(&service["spec"]["clusterIPs"]).iter().map(|it| it.parse().unwrap()).collect();
    assert_eq!(addresses.len(), 2, "{service}");
    let node = SocketAddr::new(lab["h2"].address().unwrap(), 30080);
    // Pods connect to the Service. h1, which is not a pod, connects to the node port on the backend's host.
    let expect = |what: &str, reaching: &[&Attached], outside: bool| {
        wait_until(SOON, what, || -> Result<()> {
            for from in [&api, &near, &web, &database] {
                let expected = reaching.iter().any(|each| each.name == from.name);
                for address in &addresses {
                    let found = answers(&from.workload, SocketAddr::new(*address, 80), expected);
                    ensure!(found == expected, "{} to {address}: {found}", from.name);
                }
            }
            let found = answers(&lab["h1"], node, outside);
            ensure!(found == outside, "from outside: {found}");
            Ok(())
        })
        .unwrap();
    };
    expect("full connectivity", &[&api, &near, &web, &database], true);
    let ingress = |from: Value, port: u16| {
        let spec = json!({"podSelector": selector("app", "database"), "policyTypes": ["Ingress"],
            "ingress": [{"from": from, "ports": [{"port": port}]}]});
        apply(&lab, &lab["h1"], &policy("default", "in", spec).to_string()).unwrap();
    };
    let apis = json!({"podSelector": selector("app", "api")});
    ingress(json!([apis]), 8080);
    expect("the allowed pods and the backend itself", &[&api, &near, &database], false);
    ingress(json!([apis]), 80);
    expect("the ingress port is the pod's, not the Service's", &[&database], false);
    ingress(json!([apis, {"ipBlock": {"cidr": "192.168.77.0/24"}}]), 8080);
    expect("a client outside is known by its own address", &[&api, &near, &database], true);
    let egress = |port: u16| {
        let spec = json!({"podSelector": selector("app", "api"), "policyTypes": ["Egress"],
            "egress": [{"to": [{"podSelector": selector("app", "database")}], "ports": [{"port": port}]}]});
        apply(&lab, &lab["h1"], &policy("default", "out", spec).to_string()).unwrap();
    };
    egress(80);
    expect("the egress port is the pod's, not the Service's", &[&database], true);
    egress(8080);
    expect("the egress policy applies to the backend", &[&api, &near, &database], true);
    // `policy explain` gives the same answer.
    let explained = rows(&lab["h1"], &["policy", "explain", "web-h1", "database:8080"]).unwrap();
    assert_eq!(explained[0]["passes"], json!(false), "{explained:?}");
    wait_clean(lab.hosts(), SOON).unwrap();
}

/// Whether a server answers. A refused connection leaves no event to wait for, so if none is expected, this tries for a
/// second.
fn answers(from: &Netns, to: SocketAddr, expected: bool) -> bool {
    let timeout = if expected { SOON } else { Duration::from_secs(1) };
    let answer = from.run(|| -> Result<usize> {
        let mut stream = TcpStream::connect_timeout(&to, timeout)?;
        stream.set_read_timeout(Some(timeout))?;
        Ok(stream.read(&mut [0; 64])?)
    });
    answer.unwrap().is_ok_and(|length| length > 0)
}

#[test]
fn policies_apply_to_services_on_a_routed_network() {
    assert_policies_apply_to_services(|lab| create_routed_network(lab, "pods", BOTH).unwrap());
}

#[test]
fn policies_apply_to_services_on_a_switched_network() {
    assert_policies_apply_to_services(|lab| create_network(lab, "pods", FLAT).unwrap());
}

#[test]
fn policies_apply_to_services_where_bridged_frames_are_translated() {
    assert_policies_apply_to_services(|lab| {
        lab.hosts().iter().for_each(|host| set_bridge_nf_call(host, true).unwrap());
        create_network(lab, "pods", FLAT).unwrap();
    });
}
