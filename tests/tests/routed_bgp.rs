//! Routed networks and BGP: routers can redistribute the routes of the backend `direct`.

#![allow(clippy::unwrap_used, reason = "tests, and helpers of tests")]

use std::fs;
use std::net::IpAddr;
use std::path::{Path, PathBuf};

use anyhow::{Result, ensure};
use netns_lab::{Host, Lab, LabConfig, Netns, Spawned, wait_until};
use ovl_tests::routed::{blocks, create_routed_network, seen_from};
use ovl_tests::{SOON, attach, ping_all_pairs, problems, wait_clean};

/// Directory of the daemons in Debian's package `frr`.
const FRR: &str = "/usr/lib/frr";

/// zebra and bgpd in a namespace. They are stopped when this is dropped.
struct BgpSpeaker {
    running: Vec<Spawned>,
    dir: PathBuf,
}

impl BgpSpeaker {
    fn start(at: &Host, config: &str) -> Result<Self> {
        ensure!(
            Path::new(FRR).join("bgpd").exists() && Path::new(FRR).join("zebra").exists(),
            "this test needs zebra and bgpd in {FRR}: apt-get install frr"
        );
        // The daemons drop their privileges before they create sockets and files, which they cannot do in the lab's
        // directory.
        let dir = PathBuf::from(format!("/tmp/{}-frr", at.netns_name()));
        fs::create_dir_all(&dir)?;
        let path = |name: &str| dir.join(name).display().to_string();
        fs::write(dir.join("bgpd.conf"), config)?;
        fs::write(dir.join("zebra.conf"), "")?;
        let mut speaker = Self { running: Vec::new(), dir: dir.clone() };
        at.exec_ok(["chown", "-R", "frr:frr", &dir.display().to_string()])?;
        for daemon in ["zebra", "bgpd"] {
            let (program, config) = (format!("{FRR}/{daemon}"), path(&format!("{daemon}.conf")));
            let (pid, socket, own) = (path(&format!("{daemon}.pid")), path("zserv.api"), path(""));
            let args = [
                &program,
                "-f",
                &config,
                "-i",
                &pid,
                "-z",
                &socket,
                "--vty_socket",
                &own,
                "-A",
                "127.0.0.1",
                "-P",
                "0",
                "--log",
                "stdout",
            ];
            speaker.running.push(at.spawn(args)?);
            // bgpd retries the connection to zebra only rarely, so zebra must be ready first.
            wait_until(SOON, "zebra's socket", || dir.join("zserv.api").exists())?;
        }
        Ok(speaker)
    }
}

impl Drop for BgpSpeaker {
    fn drop(&mut self) {
        if std::thread::panicking() {
            for each in &self.running {
                eprintln!("{}{}", each.stdout(), each.stderr());
            }
        }
        self.running.clear();
        fs::remove_dir_all(&self.dir).ok();
    }
}

/// BGP configuration of a host. It announces the blocks of the host, which are ovl's routes without a next hop, and
/// accepts the router's routes. All hosts have the same AS number, so none learns the blocks of others from the router.
fn host_config(address: IpAddr) -> String {
    format!(
        "ip prefix-list pods seq 5 permit 10.60.0.0/16 ge 17
route-map pods permit 10
 match ip address prefix-list pods
 match ip next-hop type blackhole
exit
router bgp 65001
 bgp router-id {address}
 no bgp ebgp-requires-policy
 neighbor 192.168.77.3 remote-as 65000
 neighbor 192.168.77.3 timers 1 3
 neighbor 192.168.77.3 timers connect 1
 address-family ipv4 unicast
  redistribute kernel route-map pods
 exit-address-family
exit
"
    )
}

const ROUTER: &str = "router bgp 65000
 bgp router-id 192.168.77.3
 no bgp ebgp-requires-policy
 neighbor 192.168.77.1 remote-as 65001
 neighbor 192.168.77.1 timers 1 3
 neighbor 192.168.77.1 timers connect 1
 neighbor 192.168.77.2 remote-as 65001
 neighbor 192.168.77.2 timers 1 3
 neighbor 192.168.77.2 timers connect 1
 address-family ipv4 unicast
  redistribute connected
 exit-address-family
exit
";

/// Creates a machine behind the router, whose only route leads there.
fn client_behind(router: &Host) -> Result<Netns> {
    let client = router.workload("client")?;
    let name = client.netns_name();
    router.exec_ok(["ip", "link", "add", "c0", "type", "veth", "peer", "name", "eth0", "netns", name])?;
    router.exec_ok(["ip", "addr", "add", "172.20.0.1/24", "dev", "c0"])?;
    router.exec_ok(["ip", "link", "set", "c0", "up"])?;
    router.exec_ok(["sysctl", "-qw", "net.ipv4.ip_forward=1"])?;
    client.exec_ok(["ip", "addr", "add", "172.20.0.2/24", "dev", "eth0"])?;
    client.exec_ok(["ip", "link", "set", "eth0", "up"])?;
    client.exec_ok(["ip", "route", "add", "default", "via", "172.20.0.1"])?;
    Ok((*client).clone())
}

/// Routes learned over BGP, with their next hops.
fn learned(at: &Netns) -> Result<Vec<String>> {
    let found = at.ip_json(&["route", "show", "proto", "bgp"])?;
    let mut all: Vec<String> = found
        .as_array()
        .into_iter()
        .flatten()
        .map(|route| format!("{} via {}", route["dst"], route["gateway"]).replace('"', ""))
        .collect();
    all.sort();
    Ok(all)
}

#[test]
fn bgp_speaker_redistributes_direct_routes() {
    // h3 is the router, not a member.
    let lab = Lab::new(LabConfig::hosts(3).config("masquerade = false")).unwrap();
    let (hosts, router) = (&lab.hosts()[..2], &lab["h3"]);
    for host in hosts {
        host.start().unwrap();
        host.wait_ready(SOON).unwrap();
    }
    create_routed_network(&lab, "pods", &["--subnet", "10.60.0.0/16", "--backend", "direct"]).unwrap();
    let client = client_behind(router).unwrap();
    let mut speakers = vec![BgpSpeaker::start(router, ROUTER).unwrap()];
    for host in hosts {
        speakers.push(BgpSpeaker::start(host, &host_config(host.address().unwrap())).unwrap());
    }
    let expected = || -> Result<Vec<String>> {
        let mut all = Vec::new();
        for host in hosts {
            let via = host.address()?;
            let held = blocks(&hosts[0], "pods", host.name())?;
            all.extend(held.iter().map(|block| format!("{block} via {via}")));
        }
        all.sort();
        Ok(all)
    };
    let wait_learned = || {
        wait_until(SOON, "the router to know all blocks", || -> Result<()> {
            let (found, expected) = (learned(router)?, expected()?);
            ensure!(found == expected && expected.len() >= 2, "{found:?} instead of {expected:?}");
            Ok(())
        })
        .unwrap();
    };
    wait_learned();
    for host in hosts {
        wait_until(SOON, "the route to the client", || -> Result<()> {
            let found = learned(host)?;
            ensure!(found == ["172.20.0.0/24 via 192.168.77.3"], "{found:?}");
            Ok(())
        })
        .unwrap();
    }
    let all: Vec<_> =
        hosts.iter().map(|host| attach(host, &format!("p-{}", host.name()), "pods", &[]).unwrap()).collect();
    ping_all_pairs(&all, SOON).unwrap();
    let there: IpAddr = "172.20.0.2".parse().unwrap();
    for pod in &all {
        let address: IpAddr = pod.address().parse().unwrap();
        client.ping_until(address, SOON).unwrap();
        // In both directions without NAT.
        assert_eq!(seen_from(&client, &pod.workload, address).unwrap(), (there, there));
        assert_eq!(seen_from(&pod.workload, &client, there).unwrap(), (address, address));
    }
    // ovl and BGP do not touch each other's routes.
    wait_clean(hosts, SOON).unwrap();
    for host in hosts {
        assert_eq!(problems(host).unwrap(), Vec::<String>::new());
    }
    // A new block is announced, and a released one is withdrawn.
    let fresh = attach(&hosts[0], "fresh", "pods", &["--ip", "10.60.200.7"]).unwrap();
    assert_eq!(blocks(&hosts[0], "pods", "h1").unwrap().len(), 2);
    wait_learned();
    client.ping_until(fresh.address(), SOON).unwrap();
    hosts[1].ctl_ok(&["teardown", "--yes"]).unwrap();
    hosts[1].wait_exit(SOON).unwrap();
    wait_until(SOON, "the router to forget h2", || -> Result<()> {
        let found = learned(router)?;
        ensure!(found.iter().all(|route| route.ends_with(" via 192.168.77.1")), "{found:?}");
        Ok(())
    })
    .unwrap();
    client.ping_until(all[0].address(), SOON).unwrap();
    drop(speakers);
}
