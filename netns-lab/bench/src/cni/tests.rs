//! Tests of the CNI measurements with the reference plugins and manually built networks. Need root and
//! Debian's containernetworking-plugins, but no daemon.

use std::time::Duration;

use netns_lab::{Lab, LabConfig};

use super::by_hand::{self, Way};
use super::plugin::{Pod, Reply, Verb};
use super::standing::{Standing, VETHS};
use super::{at_once, ground, reference, single, version};

#[test]
fn reference_pods_are_added_and_deleted() {
    reference::check().unwrap();
    let lab = Lab::new(LabConfig::hosts(1)).unwrap();
    let host = &lab["h1"];
    let pods = host.bare_workloads("pod", 16).unwrap();
    for masquerade in [false, true] {
        let plugin = reference::plugin(host, masquerade);
        let times = single::rounds(&plugin, host, &pods[..3], 2).unwrap();
        assert_eq!((times.add.len(), times.del.len()), (6, 6));
        assert!(times.add.iter().chain(&times.del).all(|time| (0.1..10_000.0).contains(time)));
        let rates = at_once::rounds(&plugin, host, &pods, 1).unwrap();
        assert!(rates.add.iter().chain(&rates.del).all(|rate| *rate > 1.0));
    }

    // Leaked objects are counted.
    let plugin = reference::plugin(host, true);
    let before = Standing::of_kernel(host).unwrap();
    let pod = Pod::new(&pods[0]);
    plugin.on_host(|caller| caller.call(Verb::Add, &pod)).unwrap().address().unwrap();
    let left = Standing::of_kernel(host).unwrap().since(&before);
    assert_eq!(left.get(VETHS), 1, "{}", left.text());
    plugin.on_host(|caller| caller.call(Verb::Del, &pod)).unwrap();
    ground::wait_veths(host, 1).unwrap();
    assert_eq!(Standing::of_kernel(host).unwrap().since(&before).text(), "");

    reference::clear(host).unwrap();
    assert!(!host.exec(["ip", "link", "show", "cni0"]).unwrap().success());
}

#[test]
fn plugin_error_is_distinguished_from_success() {
    let lab = Lab::new(LabConfig::hosts(1)).unwrap();
    let host = &lab["h1"];
    let pod = Pod::new(&host.workload("pod").unwrap());
    let mut plugin = reference::plugin(host, false);
    plugin.config["ipam"]["type"] = "no-such-plugin".into();
    let reply = plugin.on_host(|caller| caller.ask(Verb::Add, &pod)).unwrap();
    assert!(matches!(&reply, Reply::Refused(error) if error.contains("no-such-plugin")), "{reply:?}");
    assert!(plugin.on_host(|caller| caller.call(Verb::Add, &pod)).is_err());
    assert_eq!(version::times(&plugin, &pod, 3).unwrap().len(), 3);
    plugin.program = "/no/such/plugin".into();
    let error = plugin.on_host(|caller| caller.call(Verb::Version, &pod)).unwrap_err();
    assert!(format!("{error:#}").contains("cannot run /no/such/plugin"), "{error:#}");
}

#[test]
fn traffic_passes_manually_built_routes() {
    let lab = Lab::new(LabConfig::hosts(2)).unwrap();
    for (way, mtu) in [(Way::Vxlan, 1450), (Way::Direct, 1500)] {
        let [a, b] = by_hand::build(&lab, way, mtu).unwrap();
        a.0.ping_until(b.1, Duration::from_secs(5)).unwrap();
        let route = lab["h1"].ip_json(&["route", "get", &b.1.to_string()]).unwrap();
        let device = if way == Way::Vxlan { "handvx" } else { "eth0" };
        assert_eq!(route[0]["dev"], device, "{route}");
    }
}
