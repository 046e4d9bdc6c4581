//! Requests: invalid ones are harmless and leave nothing behind, and valid ones are answered as documented.

use std::collections::BTreeSet;
use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::process::{Command, Stdio};
use std::thread;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use netns_lab::{Host, Lab, LabConfig, wait_until};
use ovl_tests::{
    SOON, assert_contains, attach, attach_workload, ctl_error, ensure_settled, ensure_status, ping_all_pairs,
    problems, rows, start_lab, strings, text, wait_clean, wait_endpoints, wait_network,
};
use serde_json::{Value, json};

/// A client that can send arbitrary bytes.
struct RawClient {
    read: BufReader<UnixStream>,
    write: UnixStream,
}

impl RawClient {
    fn connect(host: &Host) -> Result<Self> {
        let write = UnixStream::connect(host.socket())?;
        write.set_read_timeout(Some(SOON))?;
        write.set_write_timeout(Some(SOON))?;
        Ok(Self { read: BufReader::new(write.try_clone()?), write })
    }

    fn send(&mut self, bytes: &[u8]) -> Result<()> {
        Ok(self.write.write_all(bytes)?)
    }

    /// Reads the next response. `None` if ovld closed the connection.
    fn answer(&mut self) -> Result<Option<Value>> {
        let mut line = String::new();
        let length = self.read.read_line(&mut line).context("no response in time")?;
        Ok(if length == 0 { None } else { Some(serde_json::from_str(&line)?) })
    }

    fn ask(&mut self, bytes: &[u8]) -> Result<Value> {
        self.send(bytes)?;
        self.answer()?.context("the connection was closed without a response")
    }
}

/// Fails unless the response is an error whose message contains this part.
#[track_caller]
fn assert_error(answer: &Value, part: &str) {
    assert_eq!(answer["reply"], "error", "{answer}");
    assert!(text(&answer["value"]["message"]).contains(part), "{answer} does not contain {part:?}");
}

/// Names of ovl's devices in a host's namespace.
fn devices(host: &Host) -> Result<Vec<String>> {
    let links = host.ip_json(&["link", "show"])?;
    let names = links.as_array().into_iter().flatten().map(|link| text(&link["ifname"]));
    Ok(names.filter(|name| name.starts_with("ov")).collect())
}

#[test]
fn attaches_right_after_the_start_of_eight_hosts_wait_until_they_are_admitted() {
    let lab = Lab::new(LabConfig::hosts(8)).unwrap();
    let (first, others) = lab.hosts().split_first().unwrap();
    first.start().unwrap();
    first.wait_ready(SOON).unwrap();
    first.ctl_ok(&["network", "create", "blue", "--subnet", "10.99.0.0/16"]).unwrap();
    thread::scope(|scope| {
        let attach = |host: &Host| {
            let workload = host.workload(&format!("w-{}", host.name())).unwrap();
            host.start().unwrap();
            wait_until(SOON, "the socket", || {
                ensure!(host.socket().exists(), "none yet");
                Ok(())
            })
            .unwrap();
            attach_workload(workload, "blue", &[]).map(drop)
        };
        let attaches: Vec<_> = others.iter().map(|host| scope.spawn(move || attach(host))).collect();
        attaches.into_iter().for_each(|attach| attach.join().unwrap().unwrap());
    });
}

#[test]
fn request_that_waits_in_vain_says_what_it_waited_for() {
    let lab = Lab::new(LabConfig::hosts(2)).unwrap();
    // The host that it is to join does not run.
    let h2 = &lab["h2"];
    h2.start().unwrap();
    wait_until(SOON, "status", || h2.ctl_ok(&["status"]).map(drop)).unwrap();
    let error = ctl_error(h2, &["network", "create", "blue", "--timeout", "1"]).unwrap();
    assert_contains(&error, &["waited 1 s: ", "not admitted"]);
    // A bridge network needs no other host.
    h2.ctl_ok(&["network", "create", "local", "--driver", "bridge", "--subnet", "10.1.0.0/24"]).unwrap();
}

#[test]
fn invalid_bytes_on_the_control_socket_are_harmless() {
    let lab = start_lab(1).unwrap();
    let h1 = &lab["h1"];
    let pid = h1.pid();
    let good = b"{\"request\":\"status\"}\n";
    let mut raw = RawClient::connect(h1).unwrap();
    let bad: [(&[u8], &str); 17] = [
        (b"hello\n", "request"),
        (b"\n", "request"),
        (b"\0\0\0\0\0\0\0\0\n", "request"),
        (b"\xff\xfe\xfd\x80\n", "request"),
        (b"null\n", "request"),
        (b"[]\n", "request"),
        (b"\"status\"\n", "request"),
        (b"{\"request\":\n", "request"),
        (b"{}\n", "request"),
        (b"{\"request\":7}\n", "request"),
        (b"{\"request\":\"explode\"}\n", "explode"),
        (b"{\"request\":\"status\",\"loud\":true}\n", "loud"),
        (b"{\"request\":\"network-rm\"}\n", "name"),
        (b"{\"request\":\"network-rm\",\"name\":\"x\",\"force\":true}\n", "force"),
        (b"{\"request\":\"network-create\",\"name\":\"x\",\"driver\":\"overlay\",\"mode\":\"l2\",\"subnets\":[\"10.0.0.0/99\"]}\n", "request"),
        (b"{\"request\":\"network-create\",\"name\":\"x\",\"driver\":\"overlay\",\"mode\":\"l2\",\"vni\":-1}\n", "request"),
        (b"{\"request\":\"status\"} {\"request\":\"status\"}\n", "request"),
    ];
    for (bytes, part) in bad {
        assert_error(&raw.ask(bytes).unwrap(), part);
        // The connection stays usable.
        assert_eq!(raw.ask(good).unwrap()["reply"], "status", "after {bytes:?}");
    }
    // Values that the command line would reject are checked again.
    let attach = |fields: Value| {
        let mut request = json!({"request": "attach", "name": "x", "network": "none", "netns": {"path": "/run/netns/none"}});
        for (key, value) in fields.as_object().into_iter().flatten() {
            request[key] = value.clone();
        }
        format!("{request}\n").into_bytes()
    };
    assert_error(&raw.ask(&attach(json!({"mac": "ff:ff:ff:ff:ff:ff"}))).unwrap(), "none");
    assert_error(&raw.ask(&attach(json!({"netns": {"pid": -4}}))).unwrap(), "request");
    assert_error(&raw.ask(&attach(json!({"netns": {}}))).unwrap(), "request");
    let zero_vni = br#"{"request":"network-create","name":"x","driver":"overlay","mode":"l2","vni":0}"#;
    assert_error(&raw.ask(&[zero_vni, &b"\n"[..]].concat()).unwrap(), "VNI 0");
    let large_vni =
        br#"{"request":"network-create","name":"x","driver":"overlay","mode":"l2","vni":16777216}"#;
    assert_error(&raw.ask(&[large_vni, &b"\n"[..]].concat()).unwrap(), "16777216");

    // Deep nesting, which would overflow the stack of a recursive parser without a limit.
    let nested = [b"{\"request\":".to_vec(), vec![b'['; 400_000], b"\n".to_vec()].concat();
    assert_error(&raw.ask(&nested).unwrap(), "request");
    assert_eq!(raw.ask(good).unwrap()["reply"], "status");

    // A request above the size limit gets an error, and the connection is closed.
    let mut long = RawClient::connect(h1).unwrap();
    let line = vec![b'x'; 6 << 20];
    // ovld may close the connection before everything is sent.
    let _ = long.send(&line);
    match long.answer() {
        Ok(Some(answer)) => assert_error(&answer, "at most"),
        Ok(None) => panic!("the connection was closed without an error"),
        Err(error) => assert_contains(&format!("{error:#}"), &["reset"]),
    }
    // Half a line whose rest comes later, and half a line before the client closes.
    let mut half = RawClient::connect(h1).unwrap();
    half.send(b"{\"request\":\"sta").unwrap();
    let mut cut = RawClient::connect(h1).unwrap();
    cut.send(b"{\"request\":\"sta").unwrap();
    drop(cut);
    half.send(b"tus\"}\n").unwrap();
    assert_eq!(half.answer().unwrap().unwrap()["reply"], "status");
    // A request without a newline, before the client closes its sending side.
    let mut unended = RawClient::connect(h1).unwrap();
    unended.send(b"{\"request\":\"status\"}").unwrap();
    unended.write.shutdown(std::net::Shutdown::Write).unwrap();
    let mut rest = String::new();
    unended.read.read_to_string(&mut rest).unwrap();
    assert!(rest.is_empty() || rest.contains("status"), "{rest}");
    // Several requests at once are answered in order.
    let mut many = RawClient::connect(h1).unwrap();
    many.send(b"{\"request\":\"peers\"}\nnonsense\n{\"request\":\"subnets\"}\n").unwrap();
    let replies: Vec<String> = (0..3).map(|_| text(&many.answer().unwrap().unwrap()["reply"])).collect();
    assert_eq!(replies, ["peers", "error", "subnets"]);
    // A client that closes without reading the response.
    for _ in 0..50 {
        RawClient::connect(h1).unwrap().send(good).unwrap();
    }
    // 200 idle connections leave room for others.
    let idle: Vec<RawClient> = (0..200).map(|_| RawClient::connect(h1).unwrap()).collect();
    assert_eq!(h1.ctl_json(&["status"]).unwrap()["state"], "ready");
    drop(idle);
    assert_eq!(h1.pid(), pid, "the daemon was restarted");
    assert_eq!(rows(h1, &["network", "ls"]).unwrap().len(), 0);
    assert_eq!(problems(h1).unwrap(), Vec::<String>::new());
}

#[test]
fn refused_requests_get_a_reason_and_leave_nothing_behind() {
    let lab = start_lab(2).unwrap();
    let (h1, h2) = (&lab["h1"], &lab["h2"]);
    let long = "x".repeat(64);
    let at_most = "y".repeat(63);

    for name in ["", " ", "a b", "-a", ".a", "a/b", "ä", "名", "a\n", long.as_str()] {
        let output = h1.ctl(&["network", "create", "--", name]).unwrap();
        ensure_status(&output, &["network", "create", name], 1).unwrap();
        assert_contains(&output.stderr, &["ovlctl: ", "name"]);
    }
    for (args, parts) in [
        (&["--mtu", "1279", "--subnet", "fd01::/64"][..], &["1279", "1280"][..]),
        (&["--mtu", "575"][..], &["575", "576"][..]),
        (&["--mtu", "0"][..], &["0", "576"][..]),
        (
            &["--encrypted", "--mode", "l3", "--backend", "direct"][..],
            &["encrypted", "tunnel", "--backend"][..],
        ),
        (&["--subnet", "10.1.0.5/24"][..], &["10.1.0.5/24", "10.1.0.0/24"][..]),
    ] {
        assert_contains(&ctl_error(h1, &[&["network", "create", "bad"], args].concat()).unwrap(), parts);
    }
    // Usage errors never reach ovld.
    for args in [
        &["network", "create", "bad", "--vni", "0"][..],
        &["network", "create", "bad", "--vni", "16777216"],
        &["network", "create", "bad", "--mtu", "65536"],
        &["network", "create", "bad", "--subnet", "10.0.0.0"],
        &["network", "create", "bad", "--mode", "l9"],
        &["network", "update", "bad"],
        &["network", "create"],
        &["attach", "x", "--network", "demo"],
        &["attach", "x", "--network", "demo", "--netns", "a", "--pid", "1"],
        &["attach", "x", "--network", "demo", "--netns", "a", "--mac", "01:00:00:00:00:00"],
        &["attach", "x", "--network", "demo", "--netns", "a", "--ip", "10.1"],
        &["attach", "x", "--network", "demo", "--netns", "a", "--label", "novalue"],
        &["attach", "x", "--network", "demo", "--pid", "0"],
        &["nonsense"],
    ] {
        ensure_status(&h1.ctl(args).unwrap(), args, 2).unwrap();
    }
    assert_eq!(rows(h1, &["network", "ls"]).unwrap().len(), 0);

    h1.ctl_ok(&["network", "create", "demo", "--subnet", "10.1.0.0/24", "--vni", "77"]).unwrap();
    h1.ctl_ok(&["network", "create", &at_most, "--subnet", "10.2.0.0/24"]).unwrap();
    wait_network(h2, &at_most).unwrap();
    for host in [h1, h2] {
        let again = ["network", "create", "demo"];
        assert_contains(&ctl_error(host, &again).unwrap(), &["demo", "exists already"]);
        let taken = ["network", "create", "other", "--vni", "77"];
        assert_contains(&ctl_error(host, &taken).unwrap(), &["77", "demo"]);
        for command in ["inspect", "rm"] {
            assert_contains(
                &ctl_error(host, &["network", command, "nowhere"]).unwrap(),
                &["no network", "nowhere", "demo"],
            );
        }
        assert_contains(
            &ctl_error(host, &["network", "update", "nowhere", "--mtu", "1400"]).unwrap(),
            &["nowhere"],
        );
        assert_contains(
            &ctl_error(host, &["network", "update", "demo", "--mtu", "500"]).unwrap(),
            &["500", "576"],
        );
        assert_contains(
            &ctl_error(host, &["network", "update", "demo", "--subnet", "10.9.0.0/16"]).unwrap(),
            &["10.1.0.0/24"],
        );
    }

    // The first attach of a network on this host: a failed one must leave nothing behind.
    let web = h1.workload("web").unwrap();
    web.exec_ok(["ip", "link", "add", "taken", "type", "bridge"]).unwrap();
    let before = web.ip_json(&["link", "show"]).unwrap();
    let file = lab.dir().join("file");
    std::fs::write(&file, "no namespace").unwrap();
    let (file, directory) = (file.to_str().unwrap(), lab.dir().to_str().unwrap());
    let fifo = lab.dir().join("fifo");
    web.exec_ok(["mkfifo", fifo.to_str().unwrap()]).unwrap();
    let gone = {
        let mut child = Command::new("true").spawn().unwrap();
        child.wait().unwrap();
        child.id().to_string()
    };
    let netns = web.path_str();
    let own = h1.path_str();
    let daemon = h1.pid().unwrap().to_string();
    let mount = format!("/proc/{daemon}/ns/mnt");
    let cases: Vec<(Vec<&str>, Vec<&str>)> = vec![
        (vec!["", "--network", "demo", "--netns", netns], vec!["name"]),
        (vec![&long, "--network", "demo", "--netns", netns], vec!["63"]),
        (vec!["a b", "--network", "demo", "--netns", netns], vec!["a b"]),
        (vec!["ünï", "--network", "demo", "--netns", netns], vec!["letters"]),
        (vec!["web", "--network", "demo", "--netns", netns, "--alias", "no/name"], vec!["no/name"]),
        (vec!["web", "--network", "demo", "--netns", netns, "--namespace", ""], vec!["name"]),
        (vec!["web", "--network", "nowhere", "--netns", netns], vec!["nowhere", "demo"]),
        (vec!["web", "--network", "", "--netns", netns], vec!["network"]),
        (vec!["web", "--network", "demo", "--netns", "/run/netns/nowhere"], vec!["/run/netns/nowhere"]),
        (vec!["web", "--network", "demo", "--netns", "nowhere"], vec!["/run/netns/nowhere"]),
        (vec!["web", "--network", "demo", "--netns", file], vec![file, "not a network namespace"]),
        (vec!["web", "--network", "demo", "--netns", directory], vec![directory]),
        (vec!["web", "--network", "demo", "--netns", fifo.to_str().unwrap()], vec!["fifo"]),
        (
            vec!["web", "--network", "demo", "--netns", "/dev/null"],
            vec!["/dev/null", "not a network namespace"],
        ),
        (vec!["web", "--network", "demo", "--netns", &mount], vec!["not a network namespace"]),
        (vec!["web", "--network", "demo", "--netns", own], vec!["of ovld itself"]),
        (vec!["web", "--network", "demo", "--pid", &daemon], vec!["of ovld itself"]),
        (vec!["web", "--network", "demo", "--pid", &gone], vec![&gone]),
        (vec!["web", "--network", "demo", "--pid", "4294967295"], vec!["4294967295"]),
        (vec!["web", "--network", "demo", "--netns", netns, "--ifname", "taken"], vec!["taken"]),
        (vec!["web", "--network", "demo", "--netns", netns, "--ifname", "lo"], vec!["lo"]),
        (
            vec!["web", "--network", "demo", "--netns", netns, "--ifname", "sixteen-letters-"],
            vec!["sixteen-letters-"],
        ),
        (vec!["web", "--network", "demo", "--netns", netns, "--ifname", ""], vec!["interface"]),
        (vec!["web", "--network", "demo", "--netns", netns, "--ifname", "a/b"], vec!["a/b"]),
        (vec!["web", "--network", "demo", "--netns", netns, "--ifname", "eth%d"], vec!["eth%d"]),
        (vec!["web", "--network", "demo", "--netns", netns, "--ifname", "."], vec!["."]),
        (vec!["web", "--network", "demo", "--netns", netns, "--ip", "10.1.0.1"], vec!["10.1.0.1", "gateway"]),
        (
            vec!["web", "--network", "demo", "--netns", netns, "--ip", "fd00::7"],
            vec!["fd00::7", "10.1.0.0/24"],
        ),
    ];
    for (args, parts) in &cases {
        let all: Vec<&str> =
            ["attach", "--"].into_iter().filter(|each| *each != "--").chain(args.iter().copied()).collect();
        let error = ctl_error(h1, &all).unwrap_or_else(|error| panic!("{error:#}"));
        assert_contains(&error, parts);
    }
    assert_eq!(web.ip_json(&["link", "show"]).unwrap(), before);
    assert_eq!(rows(h1, &["endpoints"]).unwrap().len(), 0);
    wait_until(SOON, "no device to be left", || -> Result<()> {
        let left = devices(h1)?;
        ensure!(left.is_empty(), "{left:?}");
        Ok(())
    })
    .unwrap();
    wait_clean(lab.hosts(), SOON).unwrap();
    let used: u64 = rows(h1, &["subnets"]).unwrap().iter().filter_map(|row| row["used"].as_u64()).sum();
    assert_eq!(used, 0);

    // A name is unique on its network, on all hosts, but not across networks.
    let first = attach_workload(web.clone(), "demo", &[]).unwrap();
    wait_endpoints(h2, &["web on h1 is ready"], SOON).unwrap();
    for host in [h1, h2] {
        let second = host.workload("second").unwrap();
        let args = ["attach", "web", "--network", "demo", "--netns", second.path_str()];
        assert_contains(&ctl_error(host, &args).unwrap(), &["web", "h1"]);
        assert_eq!(second.ip_json(&["link", "show"]).unwrap().as_array().map(Vec::len), Some(1));
    }
    assert!(devices(h2).unwrap().is_empty(), "{:?}", devices(h2));
    let other = h1.ctl_json(&["attach", "web", "--network", &at_most, "--netns", netns]).unwrap();
    assert_eq!(other["ifname"], "eth1");
    let spaced = h1.workload("spaced").unwrap();
    let args = ["attach", "web", "--network", "demo", "--netns", spaced.path_str(), "--namespace", "shop"];
    h1.ctl_ok(&args).unwrap();

    // A network with endpoints cannot be removed, and the error names them.
    for host in [h1, h2] {
        wait_until(SOON, "all endpoints to be known", || -> Result<bool> {
            Ok(rows(host, &["endpoints"])?.len() == 3)
        })
        .unwrap();
        assert_contains(&ctl_error(host, &["network", "rm", "demo"]).unwrap(), &["web on h1"]);
    }
    // A detach works only on the endpoint's host. One of an unknown endpoint succeeds.
    assert_contains(&ctl_error(h2, &["detach", "web"]).unwrap(), &["web", "h1"]);
    h1.ctl_ok(&["detach", "nobody"]).unwrap();
    h2.ctl_ok(&["detach", "nobody", "--network", "demo"]).unwrap();
    assert_contains(&ctl_error(h1, &["detach", "web", "--network", "nowhere"]).unwrap(), &["nowhere"]);
    h1.ctl_ok(&["detach", "web", "--network", "demo"]).unwrap();
    assert_eq!(first.workload.ip_json(&["link", "show", "eth1"]).unwrap()[0]["ifname"], "eth1");
    h1.ctl_ok(&["detach", "web"]).unwrap();
    h1.ctl_ok(&["detach", "web"]).unwrap();
    h1.ctl_ok(&["detach", "web", "--namespace", "shop"]).unwrap();
    wait_until(SOON, "the detached interfaces to be deleted", || -> Result<bool> {
        Ok(web.ip_json(&["link", "show"])? == before)
    })
    .unwrap();
    assert_contains(&ctl_error(h1, &["peers", "forget", "nobody"]).unwrap(), &["nobody"]);
    assert_contains(&ctl_error(h1, &["peers", "forget", "h1"]).unwrap(), &["leave"]);
    assert_contains(&ctl_error(h1, &["peers", "forget", "h2"]).unwrap(), &["alive"]);
    for host in [h2, h1] {
        wait_until(SOON, "no endpoint", || -> Result<bool> { Ok(rows(host, &["endpoints"])?.is_empty()) })
            .unwrap();
    }
    h2.ctl_ok(&["network", "rm", "demo"]).unwrap();
    wait_until(SOON, "the network to be deleted", || h1.ctl_ok(&["network", "inspect", "demo"]).is_err())
        .unwrap();
    wait_clean(lab.hosts(), SOON).unwrap();
}

#[test]
fn concurrent_attach_and_network_removal_converge() {
    let lab = start_lab(2).unwrap();
    let (h1, h2) = (&lab["h1"], &lab["h2"]);
    let a = h1.workload("a").unwrap();
    let mut attached = 0;
    for round in 0..8 {
        let network = format!("net{round}");
        h1.ctl_ok(&["network", "create", &network, "--subnet", "10.1.0.0/24"]).unwrap();
        wait_network(h2, &network).unwrap();
        // Alternately removed on the same host and on the other one.
        let remover = if round % 2 == 0 { h1 } else { h2 };
        let args = ["attach", "a", "--network", &network, "--netns", a.path_str()];
        let (attach, remove) = thread::scope(|scope| {
            let attach = scope.spawn(|| h1.ctl(&args));
            let remove = scope.spawn(|| remover.ctl(&["network", "rm", &network]));
            (attach.join().unwrap().unwrap(), remove.join().unwrap().unwrap())
        });
        assert!(attach.success() || remove.success(), "both refused: {attach:?} {remove:?}");
        if attach.success() {
            attached += 1;
            // The endpoint works as long as it exists, whatever became of the removal.
            a.ping_until("10.1.0.1", SOON).unwrap();
            if remove.success() {
                wait_until(SOON, "the network to wait for its endpoint", || -> Result<bool> {
                    Ok(h2.ctl_json(&["network", "inspect", &network])?["removing"] == true)
                })
                .unwrap();
            }
            h1.ctl_ok(&["detach", "a"]).unwrap();
        } else {
            assert_contains(&attach.stderr, &["ovlctl: ", &network]);
        }
        if !remove.success() {
            wait_until(SOON, "the network to be removable", || {
                h1.ctl_ok(&["network", "rm", &network]).map(drop)
            })
            .unwrap();
        }
        for host in lab.hosts() {
            wait_until(SOON, "the network to be deleted", || -> Result<bool> {
                Ok(rows(host, &["network", "ls"])?.is_empty())
            })
            .unwrap();
        }
        wait_until(SOON, "the detached interface to be deleted", || -> Result<bool> {
            Ok(a.ip_json(&["link", "show"])?.as_array().is_some_and(|links| links.len() == 1))
        })
        .unwrap();
    }
    println!("the attach came first in {attached} of 8 rounds");
    wait_until(SOON, "no device to be left", || -> Result<bool> { Ok(devices(h1)?.is_empty()) }).unwrap();
    wait_clean(lab.hosts(), SOON).unwrap();
}

/// Fails unless the object has all of these fields, and none is null.
#[track_caller]
fn assert_fields(object: &Value, fields: &[&str]) {
    for field in fields {
        assert!(!object[field].is_null(), "no {field} in {object}");
    }
}

#[test]
fn responses_have_the_documented_fields() {
    let lab = start_lab(2).unwrap();
    let (h1, h2) = (&lab["h1"], &lab["h2"]);
    let mut follow = h1.ctl_spawn(&["events", "--follow", "-o", "json"]).unwrap();
    let created = h1.ctl_json(&["network", "create", "demo", "--subnet", "10.1.0.0/24"]).unwrap();
    wait_network(h2, "demo").unwrap();
    let more = ["--alias", "www", "--label", "app=shop", "--label", "tier=", "--namespace", "shop"];
    let a = attach(h1, "a", "demo", &more).unwrap();
    let b = attach(h2, "b", "demo", &[]).unwrap();
    ping_all_pairs(&[a.clone(), b], SOON).unwrap();
    wait_until(SOON, "b to be known", || -> Result<bool> { Ok(rows(h1, &["endpoints"])?.len() == 2) })
        .unwrap();

    let network = ["name", "driver", "mode", "vni", "subnets", "mtu", "encrypted", "internal"];
    assert_fields(&created, &network);
    let inspected = h1.ctl_json(&["network", "inspect", "demo"]).unwrap();
    assert_fields(&inspected, &network);
    assert_eq!(
        (&inspected["driver"], &inspected["mode"], &inspected["mtu"]),
        (&"overlay".into(), &"l2".into(), &1450.into())
    );
    assert_eq!(strings(&inspected["nodes"]), ["h1", "h2"]);
    assert_eq!(rows(h2, &["network", "ls"]).unwrap().len(), 1);
    assert_fields(&rows(h2, &["network", "ls"]).unwrap()[0], &network);
    assert_eq!(h2.ctl_json(&["network", "inspect", &text(&created["id"])]).unwrap()["name"], "demo");

    let endpoint = ["name", "network", "node", "mac", "addresses", "aliases", "labels", "state"];
    assert_fields(&a.json, &endpoint);
    for row in rows(h2, &["endpoints"]).unwrap() {
        assert_fields(&row, &endpoint);
    }
    let row = rows(h2, &["endpoints"]).unwrap().into_iter().find(|row| row["name"] == "a").unwrap();
    assert_eq!((&row["aliases"], &row["labels"]), (&json!(["www"]), &json!({"app": "shop", "tier": ""})));
    assert_eq!((&row["namespace"], &row["node"]), (&json!("shop"), &json!("h1")));
    assert_eq!(rows(h1, &["endpoints", "--node", "h2"]).unwrap().len(), 1);

    let status = h1.ctl_json(&["status"]).unwrap();
    assert_fields(
        &status,
        &["node", "version", "state", "problems", "id", "address", "vtep", "members", "gossip", "reconcile"],
    );
    assert_eq!(
        (&status["node"], &status["state"], &status["members"]),
        (&"h1".into(), &"ready".into(), &2.into())
    );
    assert_eq!(status["endpoints"], 1);
    let peers = rows(h1, &["peers"]).unwrap();
    assert_eq!((&peers[0]["self"], &peers[0]["name"]), (&true.into(), &"h1".into()));
    let fields = ["name", "id", "address", "vtep", "state", "endpoints", "version", "encryption"];
    peers.iter().for_each(|row| assert_fields(row, &fields));
    wait_until(SOON, "a round-trip time", || -> Result<bool> {
        let row = ovl_tests::peer(h1, "h2")?;
        Ok(row["rtt_us"].is_u64() && row["last_heard_ms"].is_u64())
    })
    .unwrap();
    for row in rows(h1, &["subnets"]).unwrap() {
        assert_fields(&row, &["network", "prefix", "node", "used", "size"]);
    }
    let fdb = rows(h1, &["fdb"]).unwrap();
    let remote = fdb.iter().find(|row| row["endpoint"] == "b").unwrap_or_else(|| panic!("{fdb:?}"));
    assert_eq!((&remote["destination"], &remote["node"]), (&"192.168.77.2".into(), &"h2".into()));
    assert_fields(&rows(h1, &["routes"]).unwrap()[0], &["network", "destination", "device"]);
    wait_clean(lab.hosts(), SOON).unwrap();
    ensure_settled(h1).unwrap();
    assert_eq!(h1.ctl_json(&["plan"]).unwrap(), json!([]));
    for event in rows(h1, &["events"]).unwrap() {
        assert_fields(&event, &["time_ms", "kind", "object", "message"]);
    }

    // Metrics: each line is a comment, or a name with labels and a number; each name has a type.
    let metrics = h1.ctl_ok(&["metrics"]).unwrap();
    let (mut typed, mut seen) = (BTreeSet::new(), BTreeSet::new());
    for line in metrics.lines() {
        if let Some(rest) = line.strip_prefix("# TYPE ") {
            typed.insert(rest.split(' ').next().unwrap().to_owned());
        } else if !line.starts_with('#') {
            let (name, value) = line.rsplit_once(' ').unwrap();
            assert!(value.parse::<f64>().is_ok(), "{line}");
            let (name, labels) = name.split_once('{').unwrap_or((name, "}"));
            assert!(
                labels.ends_with('}') && name.chars().all(|c| c.is_ascii_alphanumeric() || c == '_'),
                "{line}"
            );
            // Histograms have samples with suffixes.
            let stem = ["_bucket", "_sum", "_count"].iter().find_map(|suffix| name.strip_suffix(suffix));
            seen.insert(stem.filter(|stem| typed.contains(*stem)).unwrap_or(name).to_owned());
        }
    }
    assert!(seen.is_subset(&typed) && seen.len() > 10, "{metrics}");
    assert_contains(&metrics, &["ovl_endpoints 1\n", "ovl_peer_up{peer=\"h2\",id=\"", "ovl_members 2\n"]);
    assert_eq!(text(&h1.ctl_json(&["metrics"]).unwrap()["text"]).lines().count(), metrics.lines().count());

    // Attach by process ID, to a namespace without a name.
    let mut sleeper = Command::new("unshare")
        .args(["-n", "sleep", "600"])
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let pid = sleeper.id().to_string();
    wait_until(SOON, "the process to have its own namespace", || -> Result<bool> {
        let netns = std::fs::read_link(format!("/proc/{pid}/ns/net"))?;
        Ok(netns != std::fs::read_link("/proc/self/ns/net")?)
    })
    .unwrap();
    let by_pid = h1.ctl_json(&["attach", "process", "--network", "demo", "--pid", &pid]).unwrap();
    let address = strings(&by_pid["addresses"])[0].clone();
    a.workload.ping_until(&address, SOON).unwrap();
    // The namespace ends with its last process, and the endpoint with it.
    sleeper.kill().unwrap();
    sleeper.wait().unwrap();
    for host in lab.hosts() {
        wait_endpoints(host, &["a on h1 is ready", "b on h2 is ready"], SOON).unwrap();
    }

    // `events --follow` has printed the events since, one JSON object per line.
    h1.ctl_ok(&["detach", "a", "--namespace", "shop"]).unwrap();
    let expected =
        [("network", "demo", "created"), ("endpoint", "a", "attached"), ("endpoint", "a", "detached")];
    wait_until(SOON, "the events", || -> Result<()> {
        let lines: Vec<Value> = follow
            .stdout()
            .lines()
            .map(serde_json::from_str)
            .collect::<Result<_, _>>()
            .context("incomplete line")?;
        for (kind, object, message) in expected {
            let found = lines
                .iter()
                .any(|line| line["kind"] == kind && line["object"] == object && line["message"] == message);
            ensure!(found, "no {kind} {object} {message} in {lines:?}");
        }
        Ok(())
    })
    .unwrap();
    assert!(follow.is_running());
    // Not SIGINT, which is ignored in background jobs.
    follow.signal(netns_lab::Signal::SIGTERM).unwrap();
    follow.wait(Duration::from_secs(5)).unwrap();
}
