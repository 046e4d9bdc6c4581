//! Real Docker Engines as clients, whose networks are networks of the cluster.

#![allow(clippy::unwrap_used, reason = "tests, and helpers of tests")]

use anyhow::Context as _;
use std::net::IpAddr;
use std::path::Path;
use std::time::Instant;

use anyhow::ensure;
use netns_lab::{Host, Lab, LabConfig, Signal, find_binary, wait_until};
use ovl_tests::runtime::{
    CommandTarget, Docker, HostSnapshot, ensure_reaches, wait_endpoint_count, wait_http_source,
};
use ovl_tests::{SOON, assert_contains, attach, rows, start_lab, strings, text, wait_clean, wait_network};
use serde_json::{Value, json};

/// Runs `docker network create` with ovl's driver and IPAM.
fn create(docker: &Docker, name: &str, more: &[&str]) -> String {
    docker
        .call(&[&["network", "create", "-d", "ovl", "--ipam-driver", "ovl"], more, &[name]].concat())
        .unwrap()
}

fn networks(host: &Host) -> Vec<String> {
    rows(host, &["network", "ls"]).unwrap().iter().map(|row| text(&row["name"])).collect()
}

/// The row of a container's endpoint in `ovlctl endpoints`.
fn endpoint(host: &Host, address: IpAddr) -> Option<Value> {
    let prefix = format!("{address}/");
    let all = rows(host, &["endpoints"]).unwrap();
    all.into_iter().find(|row| strings(&row["addresses"]).iter().any(|each| each.starts_with(&prefix)))
}

#[test]
fn containers_of_three_engines_reach_each_other() {
    let lab = start_lab(3).unwrap();
    let hosts = [&lab["h1"], &lab["h2"], &lab["h3"]];
    let docker = hosts.map(|host| Docker::start(host, &[]).unwrap());
    let before = hosts.map(|host| HostSnapshot::take(host).unwrap());
    let [d1, d2, d3] = &docker;

    // One Engine creates the network, one joins it by its name, and one by its subnet.
    create(d1, "blue", &["-o", "ovl.network=blue", "--subnet", "10.77.0.0/16"]);
    hosts.iter().for_each(|host| wait_network(host, "blue").unwrap());
    create(d2, "other-name", &["-o", "ovl.network=blue"]);
    create(d3, "blue", &["--subnet", "10.77.0.0/16"]);
    assert_eq!(networks(hosts[2]), ["blue"]);
    let inspected = d1.inspect("network", "blue").unwrap();
    assert_eq!(
        (text(&inspected["Driver"]), text(&inspected["Scope"])),
        ("ovl".to_owned(), "local".to_owned())
    );
    assert_eq!(text(&inspected["IPAM"]["Config"][0]["Subnet"]), "10.77.0.0/16");

    let a = d1.run("aa", &["--network", "blue"]).unwrap();
    let b = d2.run("bb", &["--network", "other-name"]).unwrap();
    let c = d3
        .run("cc", &["--network", "blue", "--ip", "10.77.9.9", "--mac-address", "02:00:5e:00:00:07"])
        .unwrap();
    for (from, to) in [(&a, &b), (&a, &c), (&b, &a), (&b, &c), (&c, &a), (&c, &b)] {
        ensure_reaches(from, to).unwrap();
    }
    let addresses: Vec<IpAddr> = [&a, &b, &c].iter().map(|each| each.addresses().unwrap()[0]).collect();
    assert_eq!(a.reported_address("blue").unwrap(), addresses[0]);
    assert_eq!(addresses[2].to_string(), "10.77.9.9");
    assert_eq!(text(&endpoint(hosts[0], addresses[2]).unwrap()["mac"]), "02:00:5e:00:00:07");
    // Two containers of one Engine, despite the Engine's own forwarding rules.
    let near = d1.run("near", &["--network", "blue"]).unwrap();
    ensure_reaches(&near, &a).unwrap();

    // Egress.
    near.ping(hosts[1].address().unwrap()).unwrap();
    // By name: the Engine resolves its own containers, and forwards other names to ovl's resolver.
    let asker = d1.run("asker", &["--network", "blue", "--dns", "169.254.79.53"]).unwrap();
    for (name, address) in
        [("near", near.addresses().unwrap()[0]), ("bb", addresses[1]), ("cc", addresses[2])]
    {
        wait_until(SOON, &format!("{name} to resolve"), || {
            let output = asker.command(&["busybox", "nslookup", name])?;
            ensure!(output.contains(&address.to_string()), "{output}");
            Ok(())
        })
        .unwrap();
    }
    d1.call(&["rm", "--force", "asker"]).unwrap();

    // An address is assigned once, whichever Engine requests it.
    let taken =
        d1.refused(&["run", "--rm", "--network", "blue", "--ip", "10.77.9.9", "localhost/ovl-test"]).unwrap();
    assert_contains(&taken, &["10.77.9.9"]);

    // A container leaves a network, joins another one, and is on both. Both Engines create the network at the same
    // time, and it is one network.
    let make = ["network", "create", "-d", "ovl", "--ipam-driver", "ovl", "-o", "ovl.network=red"];
    let make = [&make[..], &["--subnet", "10.78.0.0/24", "red"]].concat();
    let creates = [d1, d2].map(|each| each.host().spawn(each.command(&make)).unwrap());
    for create in creates {
        let output = create.finish(SOON).unwrap();
        assert!(output.success(), "{}", output.stderr);
    }
    let red = d2.run("red", &["--network", "red"]).unwrap();
    let red_address = red.addresses().unwrap()[0];
    near.ping(red_address).expect_err("networks must be isolated");
    d1.call(&["network", "connect", "red", "near"]).unwrap();
    near.ping(red_address).unwrap();
    ensure_reaches(&near, &a).unwrap();
    d1.call(&["network", "disconnect", "blue", "near"]).unwrap();
    near.ping(red_address).unwrap();
    wait_until(SOON, "near to be disconnected from blue", || near.ping(addresses[0]).is_err()).unwrap();

    // After a restart the Engine has another endpoint; the requested address stays.
    d3.call(&["restart", "--time", "0", "cc"]).unwrap();
    ensure_reaches(&a, &c).unwrap();
    assert_eq!(c.addresses().unwrap(), [addresses[2]]);
    wait_clean(lab.hosts(), SOON).unwrap();

    // A network in use cannot be removed. Then each Engine removes its own, and the last one removes the cluster's.
    assert_contains(&d1.refused(&["network", "rm", "blue"]).unwrap(), &["active endpoints"]);
    d1.call(&["rm", "--force", "aa", "near"]).unwrap();
    d2.call(&["rm", "--force", "bb", "red"]).unwrap();
    d1.call(&["network", "rm", "blue", "red"]).unwrap();
    assert_eq!(networks(hosts[0]), ["blue", "red"], "other Engines still use them");
    d2.call(&["network", "rm", "red", "other-name"]).unwrap();
    ensure_reaches(&c, &c).unwrap();
    d3.call(&["rm", "--force", "cc"]).unwrap();
    d3.call(&["network", "rm", "blue"]).unwrap();
    for host in hosts {
        wait_until(SOON, "no networks", || networks(host).is_empty()).unwrap();
    }
    for each in before {
        each.wait_nothing_left(&addresses).unwrap();
    }
}

#[test]
fn invalid_options_are_refused_with_a_reason() {
    let lab = start_lab(1).unwrap();
    let h1 = &lab["h1"];
    h1.ctl_ok(&["network", "create", "plain", "--subnet", "10.70.0.0/24"]).unwrap();
    let docker = Docker::start(h1, &[]).unwrap();
    let refused = |more: &[&str]| {
        let driver = ["network", "create", "-d", "ovl", "--ipam-driver", "ovl"];
        docker.refused(&[&driver, more, &["wrong"]].concat()).unwrap()
    };
    assert_contains(&refused(&["-o", "ovl.netwrok=x"]), &["ovl.netwrok"]);
    assert_contains(&refused(&["--subnet", "10.70.0.0/25"]), &["overlaps 10.70.0.0/24 of network plain"]);
    assert_contains(&refused(&["-o", "ovl.network=plain", "-o", "encrypted"]), &["plain is not encrypted"]);
    assert_contains(&refused(&["--subnet", "10.70.0.0/24", "--internal"]), &["plain is not internal"]);
    assert_contains(&refused(&["--subnet", "10.71.0.0/24", "--ip-range", "10.71.0.0/25"]), &["--ip-range"]);
    assert_contains(&refused(&["--subnet", "10.71.0.0/24", "--gateway", "10.71.0.9"]), &["10.71.0.1"]);
    assert_contains(
        &refused(&["--subnet", "10.71.0.0/24", "--aux-address", "x=10.71.0.9"]),
        &["--aux-address"],
    );
    let own =
        docker.refused(&["network", "create", "-d", "ovl", "--subnet", "10.71.0.0/24", "wrong"]).unwrap();
    assert_contains(&own, &["--ipam-driver ovl"]);
    assert_eq!(networks(h1), ["plain"], "a refused create left a network");

    // A network that `ovlctl` created stays when the Engine removes its own.
    create(&docker, "plain", &["--ipam-opt", "ovl.network=plain"]);
    let inspected = docker.inspect("network", "plain").unwrap();
    assert_eq!(text(&inspected["IPAM"]["Config"][0]["Subnet"]), "10.70.0.0/24");
    docker.call(&["network", "rm", "plain"]).unwrap();
    assert_eq!(networks(h1), ["plain"]);

    // Names and labels that an Engine passes on.
    create(&docker, "plain", &["-o", "ovl.network=plain"]);
    let options = "name=plain,driver-opt=ovl.name=web,driver-opt=ovl.alias=www,driver-opt=ovl.label.app=shop";
    docker.run("container", &["--network", options]).unwrap();
    let row = &rows(h1, &["endpoints"]).unwrap()[0];
    assert_eq!((text(&row["name"]), text(&row["labels"]["app"])), ("web".to_owned(), "shop".to_owned()));
    assert!(strings(&row["aliases"]).contains(&"www".to_owned()), "{row}");
    // The container's own name, which ovl-docker gets from the Engine.
    let named =
        || strings(&rows(h1, &["endpoints"]).unwrap()[0]["aliases"]).contains(&"container".to_owned());
    wait_until(SOON, "the container's name as an alias", named).unwrap();
    let second = docker.run("second", &["--network", "plain", "--network-alias", "two"]).unwrap();
    let address = second.addresses().unwrap()[0];
    wait_until(SOON, "the container's name and alias", || {
        let row = endpoint(h1, address).unwrap();
        text(&row["name"]) == "second" && strings(&row["aliases"]).contains(&"two".to_owned())
    })
    .unwrap();

    // An Engine does not announce a rename, so the endpoint gets the new name with the container's next start.
    docker.call(&["rename", "second", "third"]).unwrap();
    assert_eq!(text(&endpoint(h1, address).unwrap()["name"]), "second");
    docker.call(&["restart", "--time", "0", "third"]).unwrap();
    let renamed = || rows(h1, &["endpoints"]).unwrap().iter().any(|row| text(&row["name"]) == "third");
    wait_until(SOON, "the container's new name", renamed).unwrap();
}

/// Containers stop with an Engine without live-restore, and start again if their restart policy says so.
#[test]
fn restart_and_kill_of_an_engine_without_live_restore() {
    let lab = start_lab(2).unwrap();
    let (h1, h2) = (&lab["h1"], &lab["h2"]);
    let mut docker = Docker::start(h1, &[]).unwrap();
    create(&docker, "blue", &["-o", "ovl.network=blue", "--subnet", "10.77.0.0/16"]);
    wait_network(h2, "blue").unwrap();
    let other = attach(h2, "other", "blue", &[]).unwrap();
    let fixed = IpAddr::from([10, 77, 9, 9]);
    let stays = ["--network", "blue", "--restart", "always", "-p", "18080:8080"];
    docker.run("web", &[&stays[..], &["--ip", &fixed.to_string()]].concat()).unwrap();
    docker.run("once", &["--network", "blue"]).unwrap();
    other.workload.ping_until(fixed, SOON).unwrap();
    for signal in [Signal::SIGTERM, Signal::SIGKILL] {
        docker.end_daemon(signal).unwrap();
        docker.start_daemon().unwrap();
        // One container is back with its address and port. The other one left nothing.
        other.workload.ping_until(fixed, SOON).unwrap();
        wait_http_source(h2, h1.address().unwrap(), 18080).unwrap();
        wait_endpoint_count(h1, 2).unwrap();
        wait_clean(lab.hosts(), SOON).unwrap();
        let row = endpoint(h1, fixed).unwrap();
        wait_until(SOON, "the container's name", || text(&endpoint(h1, fixed).unwrap()["name"]) == "web")
            .unwrap_or_else(|error| panic!("{signal}: {error:#} {row}"));
        docker.call(&["start", "once"]).unwrap();
        ensure_reaches(&docker.container("once"), &docker.container("web")).unwrap();
    }
}

/// Calls a plugin on a host as an Engine does.
fn call(host: &Host, socket: &Path, method: &str, body: &Value) -> Value {
    let (socket, url) = (socket.to_str().unwrap(), format!("http://plugin/{method}"));
    let response = host
        .exec_ok(["curl", "-sS", "-X", "POST", "--unix-socket", socket, "-d", &body.to_string(), &url])
        .unwrap();
    serde_json::from_str(&response).with_context(|| format!("{method}: {response}")).unwrap()
}

#[test]
fn plugin_handles_repeated_and_incomplete_calls_of_an_engine() {
    let lab = Lab::new(LabConfig::hosts(2)).unwrap();
    let (h1, h2) = (&lab["h1"], &lab["h2"]);
    h1.start().unwrap();
    h1.wait_ready(SOON).unwrap();
    // No host has this address.
    h2.set_join(&["192.168.77.99"]).unwrap();
    h2.start().unwrap();
    let plugin = |host: &Host| {
        let socket = host.dir().join("ovl.sock");
        let words = [
            find_binary("ovl-docker").unwrap(),
            "--listen".into(),
            socket.clone(),
            "--socket".into(),
            host.socket(),
        ];
        let none = ["--engine", "none"].map(Into::into);
        let running = host.spawn(words.into_iter().chain(none)).unwrap();
        wait_until(SOON, "ovl-docker", || socket.exists()).unwrap();
        (socket, running)
    };
    let (unadmitted, _unadmitted) = plugin(h2);
    let pool =
        json!({ "AddressSpace": "ovl", "Pool": "10.77.0.0/24", "SubPool": "", "Options": {}, "V6": false });
    let begun = Instant::now();
    let answer = call(h2, &unadmitted, "IpamDriver.RequestPool", &pool);
    assert_contains(&text(&answer["Error"]), &["ovld is not ready", "not admitted"]);
    assert!(begun.elapsed().as_secs() < 10, "the error took {:?}", begun.elapsed());

    let (socket, _plugin) = plugin(h1);
    let ask = |method: &str, body: Value| call(h1, &socket, method, &body);
    assert_eq!(ask("Plugin.Activate", Value::Null)["Implements"], json!(["NetworkDriver", "IpamDriver"]));
    assert_contains(&text(&ask("NetworkDriver.Fly", json!({}))["Err"]), &["NetworkDriver.Fly"]);
    let pool = text(&ask("IpamDriver.RequestPool", pool)["PoolID"]);
    let made = json!({
        "NetworkID": "n1", "Options": { "com.docker.network.generic": { "ovl.network": "blue" } },
        "IPv4Data": [{ "AddressSpace": "ovl", "Pool": "10.77.0.0/24" }], "IPv6Data": [],
    });
    // Repeated, as after a lost response.
    assert_eq!(ask("NetworkDriver.CreateNetwork", made.clone()), json!({}));
    assert_eq!(ask("NetworkDriver.CreateNetwork", made), json!({}));

    let mac = |n: u8| format!("02:42:00:00:00:{n:02x}");
    let address = |n: u8| {
        let options = json!({ "com.docker.network.endpoint.macaddress": mac(n) });
        text(
            &ask("IpamDriver.RequestAddress", json!({ "PoolID": pool, "Address": "", "Options": options }))["Address"],
        )
    };
    let id = |n: u8| json!({ "NetworkID": "n1", "EndpointID": format!("e{n}") });
    let endpoint = |n: u8, address: &str| {
        let mut body = id(n);
        body["Interface"] = json!({ "Address": address, "AddressIPv6": "", "MacAddress": mac(n) });
        ask("NetworkDriver.CreateEndpoint", body)
    };
    let [first, second] = [1, 2].map(address);
    assert_ne!(first, second, "both are reserved");
    assert_eq!(endpoint(1, &first), json!({ "Interface": {} }));
    assert_eq!(endpoint(1, &first), json!({ "Interface": {} }), "a repeated call");
    assert_contains(&text(&endpoint(3, &first)["Err"]), &[first.split('/').next().unwrap(), "in use"]);
    let joined = ask("NetworkDriver.Join", id(1));
    h1.exec_ok(["ip", "link", "show", joined["InterfaceName"]["SrcName"].as_str().unwrap()]).unwrap();
    assert_contains(&text(&ask("NetworkDriver.Join", id(9))["Err"]), &["gone"]);

    // A released address is free, and so is everything of its endpoint that the Engine forgot to remove.
    assert_eq!(endpoint(2, &second), json!({ "Interface": {} }));
    wait_endpoint_count(h1, 2).unwrap();
    let gone = json!({ "PoolID": pool, "Address": second.split('/').next().unwrap() });
    assert_eq!(ask("IpamDriver.ReleaseAddress", gone), json!({}));
    wait_endpoint_count(h1, 1).unwrap();
    // Deleting a network deletes its remaining endpoints.
    assert_eq!(ask("NetworkDriver.DeleteNetwork", json!({ "NetworkID": "n1" })), json!({}));
    wait_endpoint_count(h1, 0).unwrap();
    assert_eq!(networks(h1), [""; 0]);
    for method in ["NetworkDriver.Leave", "NetworkDriver.DeleteEndpoint"] {
        assert_eq!(ask(method, id(1)), json!({}), "a call for a deleted object succeeds");
    }
    assert_eq!(ask("NetworkDriver.DeleteNetwork", json!({ "NetworkID": "n1" })), json!({}));
    assert_contains(&text(&endpoint(1, &first)["Err"]), &["docker network rm"]);
}

#[test]
fn encrypted_internal_and_routed_networks() {
    let lab = start_lab(2).unwrap();
    let hosts = [&lab["h1"], &lab["h2"]];
    let docker = hosts.map(|host| Docker::start(host, &[]).unwrap());
    let [d1, d2] = &docker;
    for (name, options) in [
        ("sealed", &["-o", "encrypted", "--subnet", "10.79.0.0/24", "--ipv6", "--subnet", "fd79::/64"][..]),
        ("inside", &["--internal", "--subnet", "10.80.0.0/24"]),
        ("routed", &["-o", "ovl.mode=l3", "--subnet", "10.60.0.0/16", "--ipv6", "--subnet", "fd60::/48"]),
    ] {
        let named = format!("ovl.network={name}");
        let options = [&["-o", &named], options].concat();
        create(d1, name, &options);
        wait_network(hosts[1], name).unwrap();
        create(d2, name, &options);
        let a = d1.run(&format!("{name}-a"), &["--network", name]).unwrap();
        let b = d2.run(&format!("{name}-b"), &["--network", name]).unwrap();
        ensure_reaches(&a, &b).unwrap();
        ensure_reaches(&b, &a).unwrap();
        let near = d1.run(&format!("{name}-near"), &["--network", name]).unwrap();
        ensure_reaches(&near, &a).unwrap();
        let inspected = hosts[0].ctl_json(&["network", "inspect", name]).unwrap();
        assert_eq!(
            (&inspected["encrypted"], &inspected["internal"]),
            (&json!(name == "sealed"), &json!(name == "inside"))
        );
        // One interface beside the loopback, with a default route unless the network is internal.
        let links = a.command(&["busybox", "ip", "-o", "link"]).unwrap();
        assert_eq!(links.lines().count(), 2, "{links}");
        let routes = a.command(&["busybox", "ip", "route"]).unwrap();
        assert_eq!(routes.contains("default"), name != "inside", "{routes}");
        assert_eq!(a.ping(hosts[1].address().unwrap()).is_ok(), name != "inside");
    }
    wait_clean(lab.hosts(), SOON).unwrap();
}

#[test]
fn published_ports_of_containers() {
    let lab = start_lab(2).unwrap();
    let (h1, h2) = (&lab["h1"], &lab["h2"]);
    let docker = Docker::start(h1, &[]).unwrap();
    create(&docker, "blue", &["-o", "ovl.network=blue", "--subnet", "10.77.0.0/16"]);
    let ports = ["--network", "blue", "-p", "18080:8080", "-p", "127.0.0.1:18081:8080"];
    let web = docker.run("web", &ports).unwrap();
    let near = docker.run("near", &["--network", "blue"]).unwrap();
    let (server, client) = (h1.address().unwrap(), h2.address().unwrap());
    let local = IpAddr::from([127, 0, 0, 1]);
    assert_eq!(
        wait_http_source(h2, server, 18080).unwrap(),
        client,
        "the container sees the client's own address"
    );
    wait_http_source(h1, server, 18080).unwrap();
    wait_http_source(h1, local, 18080).unwrap();
    wait_http_source(h1, local, 18081).unwrap();
    // Hairpin: from another container of the host, and from itself.
    wait_http_source(&near, server, 18080).unwrap();
    wait_http_source(&web, server, 18080).unwrap();
    h2.http_source(server, 18081).expect_err("a port of 127.0.0.1 must not be reachable from another host");
    let row = endpoint(h1, web.addresses().unwrap()[0]).unwrap();
    assert!(row["publish"].to_string().contains("18080"), "{row}");

    let run = ["run", "--rm", "--network", "blue", "-p", "18080:8080", "localhost/ovl-test"];
    assert_contains(&docker.refused(&run).unwrap(), &["18080", "web"]);
    docker.call(&["restart", "--time", "0", "web"]).unwrap();
    assert_eq!(wait_http_source(h2, server, 18080).unwrap(), client);
    docker.call(&["rm", "--force", "web"]).unwrap();
    h2.http_source(server, 18080).expect_err("the port is not released");
    docker.run("web", &ports).unwrap();
    wait_http_source(h2, server, 18080).unwrap();
}

#[test]
fn engines_plugins_and_daemons_can_be_restarted_and_killed() {
    let lab = start_lab(2).unwrap();
    let (h1, h2) = (&lab["h1"], &lab["h2"]);
    let mut d1 = Docker::start(h1, &["--live-restore"]).unwrap();
    let d2 = Docker::start(h2, &[]).unwrap();
    create(&d1, "blue", &["-o", "ovl.network=blue", "--subnet", "10.77.0.0/16"]);
    wait_network(h2, "blue").unwrap();
    create(&d2, "blue", &["-o", "ovl.network=blue", "--subnet", "10.77.0.0/16"]);
    d1.run("aa", &["--network", "blue"]).unwrap();
    let b = d2.run("bb", &["--network", "blue"]).unwrap();
    ensure_reaches(&d1.container("aa"), &b).unwrap();
    let own = d1.container("aa").addresses().unwrap()[0];

    // The Engine and the plugin are restarted, then killed, while a container runs.
    for signal in [Signal::SIGTERM, Signal::SIGKILL] {
        d1.end_daemon(signal).unwrap();
        b.ping(own).expect("the container must stay reachable");
        d1.end_plugin(signal).unwrap();
        d1.start_plugin().unwrap();
        d1.start_daemon().unwrap();
        ensure_reaches(&d1.container("aa"), &b).unwrap();
        let more = d1.run("more", &["--network", "blue"]).unwrap();
        ensure_reaches(&more, &b).unwrap();
        d1.call(&["rm", "--force", "more"]).unwrap();
    }

    // ovld is killed under a running Engine, and started again.
    h1.kill9().unwrap();
    b.ping(own).expect("the data plane must keep working");
    let begun = Instant::now();
    let refused = d1.refused(&["run", "--rm", "--network", "blue", "localhost/ovl-test", "true"]).unwrap();
    assert_contains(&refused, &["ovld is not running", "systemctl start ovld"]);
    assert!(begun.elapsed().as_secs() < 10, "the error took {:?}", begun.elapsed());
    d1.call(&["ps"]).expect("the Engine must not hang");
    // A container that is removed meanwhile is gone, and ovld learns it later.
    d1.call(&["rm", "--force", "aa"]).unwrap();
    // An Engine also starts without ovld.
    d1.end_daemon(Signal::SIGTERM).unwrap();
    d1.start_daemon().unwrap();
    h1.start().unwrap();
    h1.wait_ready(SOON).unwrap();
    wait_endpoint_count(h1, 1).unwrap();
    d1.run("aa", &["--network", "blue"]).unwrap();
    ensure_reaches(&b, &d1.container("aa")).unwrap();
    ensure_reaches(&d1.container("aa"), &b).unwrap();

    // During a restart of ovld, calls are not refused.
    h1.restart().unwrap();
    let more = d1.run("more", &["--network", "blue"]).unwrap();
    h1.wait_ready(SOON).unwrap();
    ensure_reaches(&more, &b).unwrap();
    wait_clean(lab.hosts(), SOON).unwrap();
    d1.call(&["rm", "--force", "aa", "more"]).unwrap();
    wait_endpoint_count(h1, 1).unwrap();

    // A network that is removed while ovld is stopped is left once ovld runs.
    h1.stop().unwrap();
    d1.call(&["network", "rm", "blue"]).unwrap();
    h1.start().unwrap();
    h1.wait_ready(SOON).unwrap();
    wait_until(SOON, "ovld to leave blue", || h1.log().contains("left by a Docker Engine")).unwrap();
    d2.call(&["rm", "--force", "bb"]).unwrap();
    d2.call(&["network", "rm", "blue"]).unwrap();
    wait_until(SOON, "no networks", || networks(h1).is_empty()).unwrap();
}
