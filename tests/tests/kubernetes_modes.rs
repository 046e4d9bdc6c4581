//! Beside other programs: a kube-proxy whose rules are on the host translates Services in ovl's place, and DNS and policies can
//! be turned off.

#![allow(clippy::unwrap_used, reason = "tests, and helpers of tests")]

use anyhow::{Result, ensure};
use netns_lab::{Host, Lab, LabConfig, wait_until};
use ovl_tests::routed::create_routed_network;
use ovl_tests::service::{NamedServer, apply, ask, wait_answers};
use ovl_tests::{SOON, attach, start_lab_with, text, wait_clean};

const OBJECTS: &str = "{apiVersion: v1, kind: List, items: [
  {apiVersion: v1, kind: Service, metadata: {name: web}, spec: {clusterIP: 10.96.0.70, selector: {app: web}, \
     ports: [{port: 80, targetPort: 8080}]}},
  {apiVersion: networking.k8s.io/v1, kind: NetworkPolicy, metadata: {name: closed}, \
     spec: {podSelector: {matchLabels: {app: shut}}, policyTypes: [Ingress]}}]}";

fn wait_tables(host: &Host, with: &[&str], without: &[&str]) {
    wait_until(SOON, &format!("the tables {with:?} and not {without:?}"), || -> Result<()> {
        let found = host.exec_ok(["nft", "list", "tables"])?;
        let has = |table: &&&str| found.lines().any(|line| line == format!("table inet {table}"));
        ensure!(with.iter().all(|table| has(&table)) && !without.iter().any(|table| has(&table)), "{found}");
        Ok(())
    })
    .unwrap();
}

#[test]
fn a_kube_proxy_translates_services_in_the_place_of_ovl() {
    let lab = start_lab_with(LabConfig::hosts(1)).unwrap();
    create_routed_network(&lab, "pods", &["--subnet", "10.60.0.0/16"]).unwrap();
    let host = &lab["h1"];
    let server = attach(host, "server", "pods", &["--label", "app=web"]).unwrap();
    let client = attach(host, "client", "pods", &[]).unwrap();
    let _server = NamedServer::start(&server.workload, "server", 8080).unwrap();
    apply(&lab, host, OBJECTS).unwrap();
    let to = "10.96.0.70:80".parse().unwrap();
    wait_answers(&client.workload, to, &["server"]).unwrap();
    wait_tables(host, &["ovl-services", "ovl-policy", "ovl-resolver"], &[]);

    // As kube-proxy in its mode nftables.
    host.exec_ok(["nft", "add", "table", "ip", "kube-proxy"]).unwrap();
    let chain = "{ type filter hook forward priority 0; policy accept; }";
    host.exec_ok(["nft", "add", "chain", "ip", "kube-proxy", "filter-forward", chain]).unwrap();
    wait_tables(host, &["ovl-policy", "ovl-resolver"], &["ovl-services"]);
    assert!(ask(&client.workload, to).is_err());
    wait_clean(lab.hosts(), SOON).unwrap();
    let events = host.ctl_ok(&["events"]).unwrap();
    assert!(events.contains("kube-proxy translates the Services"), "{events}");
    // Names go on to be answered.
    let named = host.ctl_json(&["dns", "web.default.svc.cluster.local"]).unwrap();
    assert_eq!(text(&named["answers"][0]["data"]), "10.96.0.70", "{named}");

    host.exec_ok(["nft", "delete", "table", "ip", "kube-proxy"]).unwrap();
    wait_answers(&client.workload, to, &["server"]).unwrap();
    wait_clean(lab.hosts(), SOON).unwrap();
}

#[test]
fn dns_and_policies_can_be_turned_off_and_on_again() {
    let lab = Lab::new(LabConfig::hosts(1)).unwrap();
    lab["h1"].set_config("dns = \"off\"\npolicy = \"off\"\nproxy = \"off\"\n").unwrap();
    lab.start_all().unwrap();
    create_routed_network(&lab, "pods", &["--subnet", "10.60.0.0/16"]).unwrap();
    let host = &lab["h1"];
    let shut = attach(host, "shut", "pods", &["--label", "app=shut"]).unwrap();
    let web = attach(host, "web", "pods", &["--label", "app=web"]).unwrap();
    let _server = NamedServer::start(&shut.workload, "shut", 8080).unwrap();
    apply(&lab, host, OBJECTS).unwrap();
    wait_clean(lab.hosts(), SOON).unwrap();
    wait_tables(host, &[], &["ovl-services", "ovl-policy", "ovl-resolver"]);
    let to = format!("{}:8080", shut.addresses()[0]).parse().unwrap();
    wait_answers(&web.workload, to, &["shut"]).unwrap();
    // The cluster DNS is another program's, which is behind a Service as any other.
    host.set_config("dns = \"off\"\npolicy = \"off\"\n").unwrap();
    host.restart().unwrap();
    host.wait_ready(SOON).unwrap();
    let dns = "{apiVersion: v1, kind: Service, metadata: {name: dns}, \
               spec: {clusterIP: 10.96.0.10, selector: {app: shut}, ports: [{port: 53, targetPort: 8080}]}}";
    apply(&lab, host, dns).unwrap();
    wait_answers(&web.workload, "10.96.0.10:53".parse().unwrap(), &["shut"]).unwrap();
    host.ctl_ok(&["delete", "svc", "dns"]).unwrap();

    // All of it comes with the next start, for endpoints that are there.
    host.set_config("").unwrap();
    host.restart().unwrap();
    wait_tables(host, &["ovl-services", "ovl-policy", "ovl-resolver"], &[]);
    wait_until(SOON, "the policy", || {
        ensure!(ask(&web.workload, to).is_err());
        Ok(())
    })
    .unwrap();
    wait_clean(lab.hosts(), SOON).unwrap();
}
