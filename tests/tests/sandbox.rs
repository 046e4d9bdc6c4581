//! Sandboxes: namespaces that outlive the programs in them and the daemon.

#![allow(clippy::unwrap_used, reason = "tests, and helpers of tests")]

use std::fs;
use std::io::Read as _;
use std::net::TcpStream;
use std::os::unix::fs::PermissionsExt as _;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use netns_lab::{Host, Lab, LabConfig, Netns, Signal, Spawned, Workload, wait_until};
use ovl_tests::{
    Attached, Flow, SOON, assert_contains, attach, create_network, ctl_error, endpoints, ping_all_pairs,
    problems, rows, start_lab, strings, text, wait_clean, wait_endpoints,
};
use serde_json::{Value, json};

/// Port of [`serve`].
const PORT: u16 = 7000;

/// Perl server that answers each connection with `from`, its process ID, and the address that the client connected to.
const SERVER: &str = r#"
    use IO::Socket::INET;
    $| = 1;
    my $server = IO::Socket::INET->new(LocalAddr => "0.0.0.0", LocalPort => 7000, Listen => 5, ReuseAddr => 1)
        or die "cannot listen: $!\n";
    print "listening\n";
    while (my $client = $server->accept) { print $client "from $$ at ", $client->sockhost; close $client }
"#;

/// Creates a sandbox on these networks, under a name that is unique on this machine.
fn sandbox(host: &Host, name: &str, networks: &[&str]) -> Result<Attached> {
    create_sandbox(host.promised_workload(name)?, networks, &[])
}

fn create_sandbox(workload: Workload, networks: &[&str], more: &[&str]) -> Result<Attached> {
    let name = workload.netns_name().to_owned();
    let networks = networks.iter().flat_map(|network| ["--network", network]);
    let args: Vec<&str> =
        ["sandbox", "create", &name].into_iter().chain(networks).chain(more.iter().copied()).collect();
    let json = workload.host().ctl_json(&args)?;
    Ok(Attached { workload, name, json })
}

fn remove(sandbox: &Attached) -> Result<()> {
    sandbox.workload.host().ctl_ok(&["sandbox", "rm", &sandbox.name]).map(drop)
}

/// The sandbox's row in `sandbox ls`; null if there is none.
fn row(sandbox: &Attached) -> Result<Value> {
    let all = rows(sandbox.workload.host(), &["sandbox", "ls"])?;
    Ok(all.into_iter().find(|row| row["name"] == sandbox.name.as_str()).unwrap_or_default())
}

/// Runs a program with `ip netns exec`, which finds the sandbox by its name.
fn run_in(sandbox: &Attached, program: &[&str]) -> Result<Spawned> {
    sandbox.workload.host().spawn([&["ip", "netns", "exec", &sandbox.name], program].concat())
}

fn serve(sandbox: &Attached) -> Result<Spawned> {
    let server = run_in(sandbox, &["perl", "-e", SERVER])?;
    wait_until(SOON, "a server to listen", || {
        ensure!(server.stdout() == "listening\n", "{}", server.stderr());
        Ok(())
    })?;
    Ok(server)
}

/// Connects to the server at an address from a namespace, and returns its answer.
fn server_answer(from: &Workload, address: &str) -> Result<String> {
    let stream = from.run(|| TcpStream::connect((address, PORT)))?;
    let mut answer = String::new();
    stream?.read_to_string(&mut answer)?;
    Ok(answer)
}

/// Host side interfaces of endpoints.
fn endpoint_devices(host: &Host) -> Result<Vec<String>> {
    let links = host.ip_json(&["link", "show"])?;
    let names = links.as_array().into_iter().flatten().map(|link| text(&link["ifname"]));
    Ok(names.filter(|name| name.starts_with("ove-")).collect())
}

fn interfaces(netns: &Netns) -> Vec<String> {
    let links = netns.ip_json(&["link", "show"]).unwrap();
    links.as_array().unwrap().iter().map(|link| text(&link["ifname"])).collect()
}

/// Waits until no running host has a trace of a sandbox.
fn wait_gone(lab: &Lab, sandbox: &str) {
    for host in lab.hosts().iter().filter(|host| host.is_running()) {
        wait_until(SOON, &format!("no trace of {sandbox} on {}", host.name()), || {
            let listed = rows(host, &["sandbox", "ls"])?.iter().any(|row| row["name"] == sandbox);
            ensure!(!listed, "the sandbox is listed");
            ensure!(!endpoints(host)?.iter().any(|row| row.starts_with(sandbox)), "{:?}", endpoints(host)?);
            let kept = host.run_dir().join("sandboxes").join(format!("{sandbox}.json"));
            ensure!(!kept.exists(), "{} exists", kept.display());
            Ok(())
        })
        .unwrap();
    }
    assert!(!fs::exists(format!("/run/netns/{sandbox}")).unwrap());
    wait_clean(lab.hosts(), SOON).unwrap();
}

#[test]
fn programs_in_a_sandbox_can_be_replaced_and_share_its_address() {
    let lab = start_lab(2).unwrap();
    create_network(&lab, "blue", &["--subnet", "10.99.0.0/24", "--subnet", "fd99::/64"]).unwrap();
    let a = sandbox(&lab["h1"], "a", &["blue"]).unwrap();
    let b = sandbox(&lab["h2"], "b", &["blue"]).unwrap();
    assert_eq!(a.json["netns"], format!("/run/netns/{}", a.name));
    assert_eq!((strings(&a.json["networks"]), a.addresses().len()), (vec!["blue".to_owned()], 2));
    assert_eq!(interfaces(&a.workload), ["lo", "eth0"]);
    // Both families, in both directions.
    for (from, to) in [(&a, &b), (&b, &a)] {
        for address in to.addresses() {
            from.workload.ping_until(address, SOON).unwrap();
        }
    }
    let address = a.address();
    let mut server = serve(&a).unwrap();
    let pid = server.pid();
    // The same process answers to the other host, at localhost, and at the sandbox's address.
    let expected = |at: &str| format!("from {pid} at {at}");
    assert_eq!(server_answer(&b.workload, &address).unwrap(), expected(&address));
    assert_eq!(server_answer(&a.workload, "127.0.0.1").unwrap(), expected("127.0.0.1"));
    let second = run_in(&a, &["perl", "-e", SERVER]).unwrap().finish(SOON).unwrap();
    assert_contains(&second.stderr, &["Address already in use"]);
    assert!(!second.status.success());
    let path = format!("--net=/run/netns/{}", a.name);
    let seen = lab["h1"].exec_ok(["nsenter", &path, "ss", "-Hltn", "sport", "=", "7000"]).unwrap();
    assert_contains(&seen, &["0.0.0.0:7000"]);
    assert_eq!(row(&a).unwrap()["processes"], json!([pid]));
    assert_eq!(row(&b).unwrap()["processes"], json!([]));
    // After the process is killed, its successor has the same address.
    server.signal(Signal::SIGKILL).unwrap();
    server.wait(SOON).unwrap();
    assert_eq!(row(&a).unwrap()["addresses"], a.json["addresses"]);
    let again = serve(&a).unwrap();
    assert_eq!(server_answer(&b.workload, &address).unwrap(), format!("from {} at {address}", again.pid()));
    // `ip netns` lists it too, and the table has the number of processes.
    let named = lab["h1"].exec_ok(["ip", "netns", "pids", &a.name]).unwrap();
    assert_eq!(named.trim(), again.pid().to_string());
    let table = lab["h1"].ctl_ok(&["sandbox", "ls"]).unwrap();
    let columns: Vec<&str> = table.lines().nth(1).unwrap().split_whitespace().collect();
    assert_eq!(columns[..2], [a.name.as_str(), "blue"]);
    assert_eq!(columns[3..], ["1", &format!("/run/netns/{}", a.name)]);
}

#[test]
fn sandbox_has_an_interface_for_each_network_in_order() {
    let lab = start_lab(2).unwrap();
    create_network(&lab, "blue", &["--subnet", "10.99.0.0/24"]).unwrap();
    create_network(&lab, "red", &["--subnet", "10.98.0.0/24"]).unwrap();
    let more = ["--namespace", "shop", "--label", "app=web"];
    let web = lab["h1"].promised_workload("web").unwrap();
    let web = create_sandbox(web, &["red", "blue"], &more).unwrap();
    assert_eq!(interfaces(&web.workload), ["lo", "eth0", "eth1"]);
    assert_eq!(strings(&web.json["networks"]), ["red", "blue"]);
    let addresses = web.addresses();
    assert!(addresses[0].starts_with("10.98.0.") && addresses[1].starts_with("10.99.0."), "{addresses:?}");
    let shown = web.workload.ip_json(&["-4", "addr", "show", "eth1"]).unwrap();
    assert_eq!(shown[0]["addr_info"][0]["local"], addresses[1].as_str());
    // The default route goes through the first network.
    let routes = web.workload.ip_json(&["route", "show", "default"]).unwrap();
    assert_eq!((routes.as_array().unwrap().len(), &routes[0]["gateway"]), (1, &Value::from("10.98.0.1")));
    for (network, address) in [("red", &addresses[0]), ("blue", &addresses[1])] {
        let other = attach(&lab["h2"], network, network, &[]).unwrap();
        other.workload.ping_until(address, SOON).unwrap();
        let row = &rows(&lab["h2"], &["endpoints", "--network", network, "--node", "h1"]).unwrap()[0];
        assert_eq!((&row["namespace"], &row["labels"]["app"]), (&"shop".into(), &"web".into()));
    }
    remove(&web).unwrap();
    wait_gone(&lab, &web.name);
}

#[test]
fn none_has_only_a_loopback_and_host_shares_the_hosts_namespace() {
    let lab = start_lab(1).unwrap();
    let h1 = &lab["h1"];
    for (name, networks) in [("none", &["none"][..]), ("nothing", &[])] {
        let lone = sandbox(h1, name, networks).unwrap();
        assert_eq!((&lone.json["networks"], &lone.json["addresses"]), (&json!(["none"]), &json!([])));
        assert_eq!(interfaces(&lone.workload), ["lo"]);
        assert!(lone.workload.ping("127.0.0.1", SOON));
        remove(&lone).unwrap();
        wait_gone(&lab, &lone.name);
    }
    let own = sandbox(h1, "own", &["host"]).unwrap();
    assert_eq!(interfaces(&own.workload), interfaces(h1));
    h1.kill9().unwrap();
    h1.start().unwrap();
    h1.wait_ready(SOON).unwrap();
    let listed = row(&own).unwrap();
    assert_eq!((&listed["networks"], &listed["processes"]), (&json!(["host"]), &json!([])));
    // The daemon itself runs in this namespace, which must not keep the sandbox from being removed.
    remove(&own).unwrap();
    wait_gone(&lab, &own.name);
    assert!(h1.exists() && h1.is_running());
}

#[test]
fn invalid_sandboxes_are_refused_and_leave_nothing() {
    let lab = start_lab(2).unwrap();
    create_network(&lab, "blue", &["--subnet", "10.99.0.0/24"]).unwrap();
    create_network(&lab, "red", &["--subnet", "10.98.0.0/24"]).unwrap();
    let h1 = &lab["h1"];
    let create =
        |name: &str, more: &[&str]| ctl_error(h1, &[&["sandbox", "create", name], more].concat()).unwrap();
    assert_contains(&create("../web", &[]), &["'../web' is no name"]);
    assert_contains(&create("web", &["--network", "green"]), &["no network green"]);
    assert_contains(
        &create("web", &["--network", "host", "--network", "blue"]),
        &["'host' goes with no other"],
    );
    assert_contains(&create("web", &["--network", "blue", "--network", "blue"]), &["given twice"]);
    assert_contains(&create("web", &["--namespace", "shop"]), &["namespace and labels"]);
    // The second network has an endpoint with the name on another host, so the endpoint on the first one is rolled
    // back.
    let web = h1.promised_workload("web").unwrap();
    let name = web.netns_name().to_owned();
    let other = lab["h2"].workload("other").unwrap();
    lab["h2"].ctl_ok(&["attach", &name, "--network", "red", "--netns", other.path_str()]).unwrap();
    wait_endpoints(h1, &[&format!("{name} on h2 is ready")], SOON).unwrap();
    let error = create(&name, &["--network", "blue", "--network", "red"]);
    assert_contains(&error, &["red has an endpoint", "h2"]);
    wait_endpoints(&lab["h2"], &[&format!("{name} on h2 is ready")], SOON).unwrap();
    assert!(!web.exists() && endpoint_devices(h1).unwrap().is_empty());
    assert_eq!(rows(h1, &["sandbox", "ls"]).unwrap(), Vec::<Value>::new());
    // A foreign file or namespace at the path stays as it is, also when it is "removed".
    fs::write(web.path(), "mine").unwrap();
    assert_contains(&create(&name, &[]), &[web.path_str(), "is there already", "ip netns del"]);
    h1.ctl_ok(&["sandbox", "rm", &name, "--force"]).unwrap();
    assert_eq!(fs::read_to_string(web.path()).unwrap(), "mine");
    fs::remove_file(web.path()).unwrap();
    let foreign = h1.workload("foreign").unwrap();
    assert_contains(&create(foreign.netns_name(), &[]), &["is there already"]);
    h1.ctl_ok(&["sandbox", "rm", foreign.netns_name()]).unwrap();
    assert_eq!(interfaces(&foreign), ["lo"]);
    // Names are unique.
    let web = create_sandbox(web, &["blue"], &[]).unwrap();
    assert_contains(&create(&web.name, &["--network", "blue"]), &["there is a sandbox", "already"]);
    assert_eq!(row(&web).unwrap()["addresses"], web.json["addresses"]);
    remove(&web).unwrap();
    remove(&web).unwrap();
}

#[test]
fn sandbox_with_a_process_is_removed_only_with_force() {
    let lab = start_lab(2).unwrap();
    create_network(&lab, "blue", &["--subnet", "10.99.0.0/24"]).unwrap();
    let web = sandbox(&lab["h1"], "web", &["blue"]).unwrap();
    let far = attach(&lab["h2"], "far", "blue", &[]).unwrap();
    let mut server = serve(&web).unwrap();
    let error = ctl_error(&lab["h1"], &["sandbox", "rm", &web.name]).unwrap();
    assert_contains(&error, &["a process is in sandbox", &format!("{} (perl)", server.pid()), "--force"]);
    assert_eq!(
        server_answer(&far.workload, &web.address()).unwrap(),
        format!("from {} at {}", server.pid(), web.address())
    );
    lab["h1"].ctl_ok(&["sandbox", "rm", &web.name, "--force"]).unwrap();
    wait_gone(&lab, &web.name);
    assert!(server.is_running() && endpoint_devices(&lab["h1"]).unwrap().is_empty());
    // The process keeps the disconnected namespace, and the name is free.
    let inside = format!("--net=/proc/{}/ns/net", server.pid());
    let links = lab["h1"].exec_ok(["nsenter", &inside, "ip", "-o", "link"]).unwrap();
    assert!(links.lines().count() == 1 && links.contains("lo:"), "{links}");
    let args = ["sandbox", "create", &web.name, "--network", "blue"];
    lab["h1"].ctl_ok(&args).unwrap();
    assert_eq!(row(&web).unwrap()["processes"], json!([]));
    server.signal(Signal::SIGKILL).unwrap();
    remove(&web).unwrap();
    wait_gone(&lab, &web.name);
}

#[test]
fn sandbox_survives_a_kill_of_the_daemon() {
    let lab = start_lab(2).unwrap();
    create_network(&lab, "blue", &["--subnet", "10.99.0.0/24"]).unwrap();
    let [a, b] = [("h1", "a"), ("h2", "b")].map(|(host, name)| sandbox(&lab[host], name, &["blue"]).unwrap());
    let flow = Flow::start(&a, &b).unwrap();
    let server = serve(&a).unwrap();
    let before = row(&a).unwrap();
    lab["h1"].kill9().unwrap();
    let expected = format!("from {} at {}", server.pid(), a.address());
    assert_eq!(server_answer(&b.workload, &a.address()).unwrap(), expected);
    lab["h1"].start().unwrap();
    lab["h1"].wait_ready(SOON).unwrap();
    assert_eq!(row(&a).unwrap(), before);
    flow.finish_without_loss().unwrap();
    ping_all_pairs(&[a.clone(), b], SOON).unwrap();
    // The new daemon has taken the sandbox over.
    ctl_error(&lab["h1"], &["sandbox", "rm", &a.name]).unwrap();
    drop(server);
    remove(&a).unwrap();
    wait_gone(&lab, &a.name);
}

/// Starts a command, kills the daemon as soon as `time` returns true for the time that the command has run, and starts
/// the daemon again.
fn kill_during(host: &Host, args: &[&str], time: &dyn Fn(Duration) -> bool) {
    let begun = Instant::now();
    let command = host.ctl_spawn(args).unwrap();
    while !time(begun.elapsed()) && begun.elapsed() < SOON {
        std::hint::spin_loop();
    }
    host.kill9().unwrap();
    command.finish(SOON).unwrap();
    host.start().unwrap();
    host.wait_ready(SOON).unwrap();
}

/// Points in time from the start of an operation of this duration until shortly after its end.
fn kill_times(took: Duration) -> impl Iterator<Item = Duration> {
    (0..=8).map(move |part| took * part / 7)
}

#[test]
fn kill_during_sandbox_creation_or_removal_leaves_nothing_half_done() {
    let lab = start_lab(2).unwrap();
    create_network(&lab, "blue", &["--subnet", "10.99.0.0/24"]).unwrap();
    create_network(&lab, "red", &["--subnet", "10.98.0.0/24"]).unwrap();
    let far = attach(&lab["h2"], "far", "red", &[]).unwrap();
    let h1 = &lab["h1"];
    let web = h1.promised_workload("web").unwrap();
    let begun = Instant::now();
    let web = create_sandbox(web, &["blue", "red"], &[]).unwrap();
    let making = begun.elapsed();
    let begun = Instant::now();
    remove(&web).unwrap();
    let removing = begun.elapsed();
    let create = ["sandbox", "create", &web.name, "--network", "blue", "--network", "red"];
    // The sandbox is complete, or does not exist at all.
    let is_complete = || -> bool {
        let listed = row(&web).unwrap();
        if listed.is_null() {
            wait_gone(&lab, &web.name);
            assert!(endpoint_devices(h1).unwrap().is_empty());
            return false;
        }
        assert_eq!(interfaces(&web.workload), ["lo", "eth0", "eth1"]);
        assert_eq!(strings(&listed["addresses"]).len(), 2);
        far.workload.ping_until(text(&listed["addresses"][1]).split('/').next().unwrap(), SOON).unwrap();
        wait_clean(lab.hosts(), SOON).unwrap();
        true
    };
    let mut created = 0;
    let mut kill_while_creating = |time: &dyn Fn(Duration) -> bool| {
        kill_during(h1, &create, time);
        created += u32::from(is_complete());
        remove(&web).unwrap();
        wait_gone(&lab, &web.name);
    };
    kill_times(making).for_each(|time| kill_while_creating(&|elapsed| elapsed >= time));
    // Kill once the first endpoint exists, once the sandbox is recorded, and once its file (and perhaps the mount)
    // exists.
    let [endpoints, sandboxes] = ["endpoints", "sandboxes"].map(|part| h1.run_dir().join(part));
    kill_while_creating(&|_| fs::read_dir(&endpoints).unwrap().next().is_some());
    kill_while_creating(&|_| fs::read_dir(&sandboxes).unwrap().next().is_some());
    kill_while_creating(&|_| web.workload.exists());
    let mut left = 0;
    let mut kill_while_removing = |time: &dyn Fn(Duration) -> bool| {
        h1.ctl_ok(&create).unwrap();
        kill_during(h1, &["sandbox", "rm", &web.name], time);
        left += u32::from(is_complete());
        remove(&web).unwrap();
        wait_gone(&lab, &web.name);
    };
    kill_times(removing).for_each(|time| kill_while_removing(&|elapsed| elapsed >= time));
    kill_while_removing(&|_| !web.workload.exists());
    kill_while_removing(&|_| fs::read_dir(&endpoints).unwrap().next().is_none());
    eprintln!(
        "{created} of 12 sandboxes existed after a kill during creation, {left} of 11 after one during removal"
    );
}

#[test]
fn externally_deleted_sandboxes_are_forgotten_and_foreign_namespaces_untouched() {
    let lab = start_lab(2).unwrap();
    create_network(&lab, "blue", &["--subnet", "10.99.0.0/24"]).unwrap();
    let h1 = &lab["h1"];
    let web = sandbox(h1, "web", &["blue"]).unwrap();
    // The new namespace may well have the inode number of the old one.
    for line in ["del", "add"] {
        h1.exec_ok(["ip", "netns", line, &web.name]).unwrap();
    }
    assert_eq!(rows(h1, &["sandbox", "ls"]).unwrap(), Vec::<Value>::new());
    remove(&web).unwrap();
    assert_eq!(interfaces(&web.workload), ["lo"]);
    wait_endpoints(&lab["h2"], &[], SOON).unwrap();
    h1.exec_ok(["ip", "netns", "del", &web.name]).unwrap();
    // Deleted while ovld is not running: a process keeps the namespace alive, and the file stays.
    let created = h1.ctl_ok(&["sandbox", "create", &web.name, "--network", "blue"]);
    created.unwrap();
    let server = serve(&web).unwrap();
    h1.kill9().unwrap();
    h1.exec_ok(["umount", web.workload.path_str()]).unwrap();
    h1.start().unwrap();
    h1.wait_ready(SOON).unwrap();
    wait_gone(&lab, &web.name);
    assert!(endpoint_devices(h1).unwrap().is_empty());
    drop(server);
    // A damaged file is reported, and does not keep ovld from starting.
    h1.ctl_ok(&["sandbox", "create", &web.name]).unwrap();
    h1.kill9().unwrap();
    fs::write(h1.run_dir().join("sandboxes").join(format!("{}.json", web.name)), "{").unwrap();
    h1.start().unwrap();
    h1.wait_ready(SOON).unwrap();
    assert_contains(&problems(h1).unwrap().concat(), &["the file of a sandbox is damaged", &web.name]);
}

#[test]
fn concurrent_creates_succeed_once_for_each_name() {
    let lab = start_lab(1).unwrap();
    create_network(&lab, "blue", &["--subnet", "10.99.0.0/24"]).unwrap();
    let h1 = &lab["h1"];
    let all: Vec<Workload> =
        (1..=20).map(|number| h1.promised_workload(&format!("s{number}")).unwrap()).collect();
    let begun: Vec<Spawned> = all
        .iter()
        .chain([&all[0], &all[0]])
        .map(|workload| {
            h1.ctl_spawn(&["sandbox", "create", workload.netns_name(), "--network", "blue"]).unwrap()
        })
        .collect();
    let ended: Vec<bool> =
        begun.into_iter().map(|command| command.finish(SOON).unwrap().status.success()).collect();
    assert_eq!(ended.iter().filter(|done| **done).count(), 20);
    let listed = rows(h1, &["sandbox", "ls"]).unwrap();
    let mut addresses: Vec<String> = listed.iter().flat_map(|row| strings(&row["addresses"])).collect();
    addresses.sort();
    addresses.dedup();
    assert_eq!((listed.len(), addresses.len()), (20, 20));
    h1.ctl_ok(&["teardown"]).unwrap();
    h1.wait_exit(SOON).unwrap();
    assert!(all.iter().all(|workload| !workload.exists()));
}

#[test]
fn teardown_deletes_sandboxes_and_leaves_their_programs_running() {
    let lab = start_lab(1).unwrap();
    create_network(&lab, "blue", &["--subnet", "10.99.0.0/24"]).unwrap();
    let h1 = &lab["h1"];
    let web = sandbox(h1, "web", &["blue"]).unwrap();
    let own = sandbox(h1, "own", &["host"]).unwrap();
    let mut server = serve(&web).unwrap();
    h1.ctl_ok(&["teardown"]).unwrap();
    h1.wait_exit(SOON).unwrap();
    assert!(!web.workload.exists() && !own.workload.exists() && server.is_running() && h1.exists());
    assert!(endpoint_devices(h1).unwrap().is_empty());
    h1.start().unwrap();
    h1.wait_ready(SOON).unwrap();
    assert_eq!(rows(h1, &["sandbox", "ls"]).unwrap(), Vec::<Value>::new());
}

/// Script that starts ovld as systemd does: with the unit's capabilities, and in a read-only mount namespace that is a
/// slave of the first process's one. That first process is the script.
const AS_A_SERVICE: &str = r#"#!/bin/sh
exec unshare --pid --fork --kill-child --mount --mount-proc sh -c '
    mount --make-rshared /
    mount -t tmpfs none /run/netns && mount --make-shared /run/netns
    unshare --mount --propagation slave sh -c "
        mount -o remount,bind,ro /run/netns
        exec setpriv --no-new-privs --bounding-set CAPABILITIES OVLD \"\$@\"" ovld "$@" &
    wait' ovld "$@"
"#;

/// The unit's capabilities for `setpriv`, such as `-all,+net_admin`.
fn capabilities() -> String {
    let unit = include_str!("../../daemon/systemd/ovld.service");
    let line = unit.lines().find_map(|line| line.strip_prefix("CapabilityBoundingSet=")).unwrap();
    let names = line.split_whitespace().map(|name| name.strip_prefix("CAP_").unwrap().to_lowercase());
    names.fold("-all".to_owned(), |all, name| format!("{all},+{name}"))
}

#[test]
fn sandboxes_of_a_daemon_in_its_own_mount_namespace_are_visible_on_the_host() {
    let mut config = LabConfig::hosts(1);
    let script = std::env::temp_dir().join(format!("ovld-as-a-service-{}", std::process::id()));
    let ovld = netns_lab::find_binary("ovld").unwrap();
    let text = AS_A_SERVICE.replace("CAPABILITIES", &capabilities()).replace("OVLD", ovld.to_str().unwrap());
    fs::write(&script, text).unwrap();
    fs::set_permissions(&script, fs::Permissions::from_mode(0o755)).unwrap();
    config.ovld = Some(script.clone());
    let lab = Lab::new(config).unwrap();
    lab.start_all().unwrap();
    fs::remove_file(script).unwrap();
    create_network(&lab, "blue", &["--subnet", "10.99.0.0/24"]).unwrap();
    let h1 = &lab["h1"];
    let web = sandbox(h1, "web", &["blue"]).unwrap();
    // The sandbox is visible in the script's mount namespace, not in the test's.
    assert!(!web.workload.exists());
    let unshare = h1.pid().unwrap();
    let first = fs::read_to_string(format!("/proc/{unshare}/task/{unshare}/children")).unwrap();
    let on_host = |command: &[&str]| {
        h1.exec([&["nsenter", "--mount", "--pid", "--target", first.trim()], command].concat()).unwrap()
    };
    let seen = on_host(&["ip", "netns", "exec", &web.name, "ip", "-o", "-4", "addr", "show", "eth0"]);
    assert_contains(&seen.stdout, &[&web.address()]);
    assert_eq!(row(&web).unwrap()["addresses"], web.json["addresses"]);
    // The daemon sees namespaces that others mount there later.
    assert!(on_host(&["ip", "netns", "add", "later"]).status.success());
    h1.ctl_ok(&["attach", "later", "--network", "blue", "--netns", "later"]).unwrap();
    remove(&web).unwrap();
    assert!(!on_host(&["test", "-e", web.workload.path_str()]).status.success());
    assert!(endpoint_devices(h1).unwrap().len() == 1);
}
