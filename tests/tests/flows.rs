//! `ovlctl flows`: who talks to whom, over switched and routed networks, with what policies decide.

#![allow(clippy::unwrap_used, reason = "tests, and helpers of tests")]

use std::collections::BTreeSet;
use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use netns_lab::{Host, Lab, Signal, Spawned, cpu_time, wait_until};
use ovl_tests::policy::ONLY_API;
use ovl_tests::routed::create_routed_network;
use ovl_tests::service::{SHOP, apply};
use ovl_tests::{SOON, attach, create_network, ctl_error, start_lab, text, wait_clean};
use serde_json::Value;

/// A host's flows as they are followed.
struct Followed(Spawned);

impl Followed {
    fn start(host: &Host) -> Result<Self> {
        Self::start_with(host, &[])
    }

    fn start_with(host: &Host, options: &[&str]) -> Result<Self> {
        let args = [&["flows", "--follow", "-o", "json"], options].concat();
        let followed = Self(host.ctl_spawn(&args)?);
        wait_until(SOON, "the first second", || {
            ensure!(!followed.0.stdout().is_empty(), "{}", followed.0.stderr());
            Ok(())
        })?;
        Ok(followed)
    }

    /// All flows so far with these ends and port, and this verdict.
    fn of(&self, from: &str, to: &str, port: u64, verdict: &str) -> Vec<Value> {
        let text = self.0.stdout();
        // The last line may be half written.
        let all = text.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
        let flows = all.flat_map(|second| second["flows"].as_array().cloned().unwrap_or_default());
        flows
            .filter(|flow| {
                flow["from_name"] == from
                    && flow["to_name"] == to
                    && flow["port"] == port
                    && flow["verdict"] == verdict
            })
            .collect()
    }

    /// What hosts said besides flows: why there are none.
    fn errors(&self) -> Vec<(String, String)> {
        let text = self.0.stdout();
        let all = text.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
        all.filter_map(|second| Some((text_of(&second["host"]), second["error"].as_str()?.to_owned())))
            .collect()
    }

    /// The hosts that said what they saw.
    fn hosts(&self) -> BTreeSet<String> {
        let text = self.0.stdout();
        let all = text.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
        all.filter(|second| second["error"].is_null()).map(|second| text_of(&second["host"])).collect()
    }

    /// Waits until these fields of such flows have these sums or more.
    fn wait(&self, ends: (&str, &str, u64, &str), sums: &[(&str, u64)]) -> Vec<Value> {
        let (from, to, port, verdict) = ends;
        wait_until(SOON, &format!("flows from {from} to {to}"), || {
            let found = self.of(from, to, port, verdict);
            for (field, least) in sums {
                let sum: u64 = found.iter().filter_map(|flow| flow[*field].as_u64()).sum();
                ensure!(sum >= *least, "{field} is {sum}: {found:?} of {}", self.0.stdout());
            }
            Ok(Some(found))
        })
        .unwrap()
    }

    fn end(mut self) {
        self.0.signal(Signal::SIGINT).unwrap();
        let _ = self.0.wait(SOON);
    }
}

/// Waits until nothing is left of followed flows.
fn wait_nothing_left(host: &Host) {
    wait_until(SOON, "tables to be gone", || {
        let tables = host.exec_ok(["nft", "list", "tables"])?;
        ensure!(!tables.contains("ovl-trace"), "{tables}");
        Ok(())
    })
    .unwrap();
}

fn text_of(value: &Value) -> String {
    value.as_str().unwrap_or_default().to_owned()
}

type Create = fn(&Lab) -> Result<()>;

#[test]
fn flows_have_names_bytes_and_the_policy_that_decides() {
    let kinds: [(Create, bool); 2] = [
        (|lab| create_network(lab, "net", &["--subnet", "10.60.0.0/16", "--subnet", "fd60::/64"]), false),
        (
            |lab| create_routed_network(lab, "net", &["--subnet", "10.60.0.0/16", "--subnet", "fd60::/48"]),
            true,
        ),
    ];
    for (create, routed) in kinds {
        let lab = start_lab(2).unwrap();
        create(&lab).unwrap();
        let [h1, h2] = lab.hosts() else { unreachable!() };
        let web = attach(h2, "web", "net", &["--label", "app=web"]).unwrap();
        let _servers = [web.workload.tcp_echo(80).unwrap(), web.workload.tcp_echo(81).unwrap()];
        let api = attach(h1, "api", "net", &["--label", "app=api"]).unwrap();
        let other = attach(h1, "other", "net", &[]).unwrap();
        for from in [&api, &other] {
            from.workload.ping_until(web.address(), SOON).unwrap();
        }

        // Without policies: switched frames are not in connection tracking.
        let followed = [h1, h2].map(|host| Followed::start(host).unwrap());
        for address in web.addresses() {
            for _ in 0..3 {
                other.workload.tcp_roundtrip(&address, 80, b"hello").unwrap();
            }
        }
        for followed in &followed {
            let ends = ("default/other", "default/web", 80, "passed");
            let found =
                followed.wait(ends, &[("opened", 6), ("sent_bytes", 6 * 100), ("received_bytes", 6 * 100)]);
            let opened: u64 = found.iter().filter_map(|flow| flow["opened"].as_u64()).sum();
            assert_eq!(opened, 6, "{found:?}");
            let families =
                [true, false].map(|is_v4| found.iter().any(|flow| text(&flow["to"]).contains('.') == is_v4));
            assert_eq!(families, [true, true], "{found:?}");
        }
        if routed {
            let now = h1.ctl_json(&["flows"]).unwrap();
            let all = now["flows"].as_array().unwrap();
            let is_found = |flow: &&Value| flow["from_name"] == "default/other" && flow["port"] == 80;
            assert!(all.iter().any(|flow| is_found(&flow)), "{now:#}");
        }

        // With policies: which rule lets it pass, and which policy does not.
        apply(&lab, h1, ONLY_API).unwrap();
        apply(&lab, h1, SHOP).unwrap();
        wait_clean(lab.hosts(), SOON).unwrap();
        let service = h1.ctl_json(&["get", "svc", "shop"]).unwrap();
        let service = service["spec"]["clusterIP"].as_str().unwrap().to_owned();
        wait_until(SOON, "the Service to answer", || {
            api.workload.tcp_roundtrip(&service, 8000, b"hello").map(drop)
        })
        .unwrap();
        let found = followed[0]
            .wait(("default/api", "Service default/shop", 8000, "passed"), &[("opened", 1), ("closed", 0)]);
        let first = found.iter().find(|flow| flow["opened"] != 0).unwrap();
        assert_eq!(text(&first["backend_name"]), "default/web", "{first}");
        assert_eq!(text(&first["policies"][0]), "default/only-api", "{first}");
        assert!(text(&first["why"]).contains("ingress rule 1"), "{first}");
        for address in web.addresses() {
            assert!(other.workload.tcp_roundtrip(&address, 80, b"hello").is_err());
        }
        let found = followed[1].wait(("default/other", "default/web", 80, "dropped"), &[("dropped", 2)]);
        assert_eq!(text(&found[0]["policies"][0]), "default/only-api", "{found:?}");
        let shown = h2.ctl_ok(&["flows", "--drops"]).unwrap();
        assert!(shown.contains("default/other") && shown.contains("default/only-api"), "{shown}");
        assert!(!shown.contains("passed"), "{shown}");

        // The fifth is refused, and nothing is left when no client looks.
        let more: Vec<Followed> = (0..3).map(|_| Followed::start(h1).unwrap()).collect();
        assert!(ctl_error(h1, &["flows", "--follow"]).unwrap().contains("too many"));
        followed.into_iter().chain(more).for_each(Followed::end);
        for host in lab.hosts() {
            wait_nothing_left(host);
        }
    }
}

#[test]
fn flows_of_other_hosts_come_over_the_streams_and_end_with_the_client() {
    let lab = start_lab(3).unwrap();
    create_network(&lab, "net", &["--subnet", "10.60.0.0/16", "--subnet", "fd60::/64"]).unwrap();
    let [h1, h2, h3] = lab.hosts() else { unreachable!() };
    let web = attach(h2, "web", "net", &["--label", "app=web"]).unwrap();
    let other = attach(h3, "other", "net", &[]).unwrap();
    let _server = web.workload.tcp_echo(80).unwrap();
    other.workload.ping_until(web.address(), SOON).unwrap();
    let connect = || {
        for address in web.addresses() {
            other.workload.tcp_roundtrip(&address, 80, b"hello").unwrap();
        }
    };
    let all = Followed::start_with(h1, &["--all-hosts"]).unwrap();
    let named = Followed::start_with(h1, &["--host", "h2"]).unwrap();
    wait_until(SOON, "all hosts", || {
        ensure!(all.hosts().len() == 3 && named.hosts().len() == 1, "{:?} {:?}", all.hosts(), named.hosts());
        Ok(())
    })
    .unwrap();
    connect();
    // The host that is asked sees nothing of it; both that see it say so.
    all.wait(("default/other", "default/web", 80, "passed"), &[("opened", 4), ("sent_bytes", 400)]);
    named.wait(("default/other", "default/web", 80, "passed"), &[("opened", 2)]);
    assert_eq!(named.hosts(), BTreeSet::from(["h2".to_owned()]));

    // What policies refuse is told by the host that refuses it, in both forms.
    apply(&lab, h1, ONLY_API).unwrap();
    wait_clean(lab.hosts(), SOON).unwrap();
    let passed = || all.of("default/other", "default/web", 80, "passed").len();
    let before = passed();
    for address in web.addresses() {
        assert!(other.workload.tcp_roundtrip(&address, 80, b"hello").is_err());
    }
    let found = all.wait(("default/other", "default/web", 80, "dropped"), &[("dropped", 2)]);
    assert!(text(&found[0]["why"]).contains("default/only-api"), "{found:?}");
    // The host of the sender counts the packets as well, and does not take them for passed.
    assert_eq!(passed(), before, "{}", all.0.stdout());
    let now = h1.ctl_json(&["flows", "--all-hosts"]).unwrap();
    let hosts: Vec<String> = now.as_array().unwrap().iter().map(|host| text_of(&host["host"])).collect();
    assert_eq!(hosts, ["h1", "h2", "h3"], "{now:#}");
    let table = h1.ctl_ok(&["flows", "--all-hosts", "--drops"]).unwrap();
    assert!(table.starts_with("HOST") && table.contains("\nh2 ") && table.contains("only-api"), "{table}");
    let one = h1.ctl_json(&["flows", "--host", "h2", "--drops"]).unwrap();
    assert_eq!(text(&one["flows"][0]["from_name"]), "default/other", "{one:#}");
    assert!(ctl_error(h1, &["flows", "--host", "h9"]).unwrap().contains("no member h9"));

    // A host that hangs is named once, and seen again when it goes on. The others are still seen.
    h3.signal(Signal::SIGSTOP).unwrap();
    let within = Duration::from_secs(20);
    wait_until(within, "the host that hangs to be named", || {
        ensure!(all.errors().iter().any(|(host, _)| host == "h3"), "{:?}", all.errors());
        Ok(())
    })
    .unwrap();
    let output = h1.ctl(&["flows", "--all-hosts"]).unwrap();
    assert!(!output.status.success() && output.stderr.contains("h3: no flows"), "{output:?}");
    assert_eq!(all.errors().iter().filter(|(host, _)| host == "h3").count(), 1, "{:?}", all.errors());
    h3.signal(Signal::SIGCONT).unwrap();
    let api = attach(h3, "api", "net", &["--label", "app=api"]).unwrap();
    api.workload.ping_until(web.address(), SOON).ok();
    wait_until(within, "flows of the host that hung", || {
        let _ = api.workload.tcp_roundtrip(web.address(), 80, b"hello");
        let seen = all.of("default/api", "default/web", 80, "passed");
        let opened: u64 = seen.iter().filter_map(|flow| flow["opened"].as_u64()).sum();
        let text = all.0.stdout();
        let of_h3 = text.lines().any(|line| line.contains("\"h3\"") && line.contains("default/api"));
        ensure!(opened > 0 && of_h3, "{opened}");
        Ok(())
    })
    .unwrap();

    // Nothing is left on any host once the clients are gone, also if the daemon that asked is killed.
    named.end();
    h1.kill9().unwrap();
    for host in [h2, h3] {
        wait_nothing_left(host);
    }
    drop(all);
    h1.restart().unwrap();
    h1.wait_ready(SOON).unwrap();
    wait_nothing_left(h1);
}

/// Opens 1,000 connections a second, each for one byte there and back, and returns how many succeeded.
fn open_connections(to: SocketAddr, during: Duration) -> u64 {
    let begun = Instant::now();
    let (mut opened, mut succeeded) = (0, 0);
    let open = || -> std::io::Result<()> {
        let mut stream = TcpStream::connect_timeout(&to, SOON)?;
        stream.write_all(b"x")?;
        stream.read_exact(&mut [0])
    };
    while begun.elapsed() < during {
        while opened < begun.elapsed().as_millis() {
            opened += 1;
            succeeded += u64::from(open().is_ok());
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    succeeded
}

/// What it costs to follow 1,000 connections a second: at most 1 % of a core on each host, also if all hosts are followed. Measured
/// by hand with `cargo test -p ovl-tests --test flows cost -- --ignored --nocapture`, because a busy machine says nothing.
#[test]
#[ignore = "a measurement"]
fn cost_of_following_a_thousand_connections_a_second() {
    const SECONDS: u64 = 20;
    let lab = start_lab(2).unwrap();
    create_routed_network(&lab, "net", &["--subnet", "10.60.0.0/16"]).unwrap();
    let [h1, h2] = lab.hosts() else { unreachable!() };
    let web = attach(h2, "web", "net", &[]).unwrap();
    let api = attach(h1, "api", "net", &[]).unwrap();
    let _server = web.workload.tcp_echo(80).unwrap();
    api.workload.ping_until(web.address(), SOON).unwrap();
    let server = SocketAddr::new(web.address().parse().unwrap(), 80);
    // Else the ports of closed connections are not free again in time.
    api.workload.exec_ok(["sysctl", "-w", "net.ipv4.tcp_tw_reuse=1"]).unwrap();
    let pids = [h1, h2].map(|host| host.pid().unwrap());
    let used = || pids.map(|pid| cpu_time(pid).unwrap().as_secs_f64());
    let measure = |followed: Option<&[&str]>| {
        let following = followed.map(|options| Followed::start_with(h1, options).unwrap());
        let (begun, before) = (Instant::now(), used());
        let connections =
            api.workload.run(|| open_connections(server, Duration::from_secs(SECONDS))).unwrap();
        let after = used();
        drop(following);
        let seconds = begun.elapsed().as_secs_f64();
        let rate = connections as f64 / seconds;
        assert!(rate > 950.0, "{rate:.0} connections a second: the machine is too busy");
        let shares = [0, 1].map(|n| (after[n] - before[n]) / seconds);
        println!(
            "followed {followed:?}: {rate:.0} connections a second, {:.2} and {:.2} % of a core",
            shares[0] * 100.0,
            shares[1] * 100.0
        );
        shares
    };
    let idle = measure(None);
    for followed in [measure(Some(&[])), measure(Some(&["--all-hosts"]))] {
        for (followed, idle) in followed.iter().zip(idle) {
            assert!(followed - idle < 0.01, "{:.2} %", (followed - idle) * 100.0);
        }
    }
}
