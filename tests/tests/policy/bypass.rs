//! Traffic that other switches treat apart: broadcast, link-local, and frames that bridges pass to the packet filter.

use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

use anyhow::Result;
use netns_lab::{uninterrupted, wait_until};
use ovl_tests::policy::wait_enforced;
use ovl_tests::service::apply;
use ovl_tests::{Attached, SOON, create_network, set_bridge_nf_call, start_lab};

use crate::{EXAMPLE, connects, labelled};

#[test]
fn isolated_endpoint_reaches_its_neighbours_over_ipv6_where_bridges_call_the_packet_filter() {
    let lab = start_lab(1).unwrap();
    let h1 = &lab["h1"];
    set_bridge_nf_call(h1, true).unwrap();
    create_network(&lab, "pods", &["--subnet", "10.60.0.0/16", "--subnet", "fd60::/64"]).unwrap();
    let database = labelled(&lab, "h1", "database", "database");
    let web = labelled(&lab, "h1", "web", "web");
    apply(&lab, h1, EXAMPLE).unwrap();
    wait_enforced(h1).unwrap();
    for address in web.addresses() {
        database.workload.ping_until(&address, SOON).unwrap();
    }
    let _server = web.workload.tcp_echo(5432).unwrap();
    assert!(connects(&database, &web, 5432, SOON));
    let _server = database.workload.tcp_echo(5432).unwrap();
    assert!(!connects(&web, &database, 5432, Duration::from_secs(1)));
}

#[test]
fn policies_apply_to_broadcast_and_link_local_traffic() {
    for nf_call in [false, true] {
        assert_no_bypass(nf_call);
    }
}

fn assert_no_bypass(nf_call: bool) {
    let lab = start_lab(2).unwrap();
    lab.hosts().iter().for_each(|host| set_bridge_nf_call(host, nf_call).unwrap());
    create_network(&lab, "pods", &["--subnet", "10.60.0.0/16"]).unwrap();
    let database = labelled(&lab, "h1", "database", "database");
    let other = labelled(&lab, "h1", "other", "other");
    let senders = ["h1", "h2"].map(|host| labelled(&lab, host, &format!("web-{host}"), "web"));
    apply(&lab, &lab["h1"], EXAMPLE).unwrap();
    lab.hosts().iter().for_each(|host| wait_enforced(host).unwrap());
    let listen = |at: &Attached| {
        let socket = at.workload.run(|| std::net::UdpSocket::bind("0.0.0.0:5432")).unwrap().unwrap();
        socket.set_read_timeout(Some(Duration::from_secs(1))).unwrap();
        socket
    };
    let (isolated, free) = (listen(&database), listen(&other));
    isolated.set_nonblocking(true).unwrap();
    let api = labelled(&lab, "h2", "api", "api");
    let _servers = [&database, &other].map(|at| at.workload.tcp_echo(5432).unwrap());
    for from in &senders {
        wait_until(SOON, &format!("a broadcast of {}", from.name), || -> Result<()> {
            from.workload.run(|| -> std::io::Result<()> {
                let socket = std::net::UdpSocket::bind("0.0.0.0:0")?;
                socket.set_broadcast(true)?;
                socket.send_to(b"all", "10.60.255.255:5432").map(drop)
            })??;
            free.recv_from(&mut [0; 8])?;
            Ok(())
        })
        .unwrap();
        // Marker: a connection that the policy allows, and which needs ARP, is made after the broadcast.
        wait_until(SOON, "the api's connection", || connects(&api, &database, 5432, SOON)).unwrap();
        let received = uninterrupted(|| isolated.recv_from(&mut [0; 8]));
        assert!(received.is_err(), "bridge-nf-call-iptables={nf_call}: {received:?}");
        // Link-local addresses, which are not assigned by ovl. The sender's own one may still be tentative.
        let connects = |to: &Attached, timeout| {
            let target = link_local(to, from);
            from.workload.run(|| TcpStream::connect_timeout(&target, timeout)).unwrap()
        };
        let what = format!("{} to {}, bridge-nf-call-iptables={nf_call}", from.name, other.name);
        wait_until(SOON, &what, || connects(&other, SOON).map(drop)).unwrap();
        let connected = connects(&database, Duration::from_secs(1));
        assert!(connected.is_err(), "{} to {}, bridge-nf-call-iptables={nf_call}", from.name, database.name);
    }
}

/// Link-local address of an endpoint, with the interface index of another one.
fn link_local(of: &Attached, from: &Attached) -> SocketAddr {
    let found = wait_until(SOON, "a link-local address", || -> Result<Option<std::net::Ipv6Addr>> {
        let shown = of.workload.exec_ok([
            "ip",
            "-6",
            "-o",
            "addr",
            "show",
            "dev",
            "eth0",
            "scope",
            "link",
            "-tentative",
        ])?;
        let net = shown.split_whitespace().skip_while(|word| *word != "inet6").nth(1);
        Ok(net.and_then(|net| net.split('/').next()?.parse().ok()))
    })
    .unwrap();
    let index = from.workload.run(|| nix::net::if_::if_nametoindex("eth0")).unwrap().unwrap();
    std::net::SocketAddrV6::new(found, 5432, 0, index).into()
}
