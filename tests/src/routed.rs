//! Helpers for tests of routed networks.

use std::io::{Read as _, Write as _};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::thread;

use anyhow::{Context as _, Result, anyhow, ensure};
use netns_lab::{Host, Lab, Netns, uninterrupted, wait_until};
use serde_json::Value;

use crate::{Attached, SOON, attach_workload, create_network, rows, strings, text, wait_clean};

/// Creates a routed network with these arguments, and waits until it is complete on all hosts.
pub fn create_routed_network(lab: &Lab, name: &str, more: &[&str]) -> Result<()> {
    create_network(lab, name, &[&["--mode", "l3"], more].concat())?;
    wait_routed(lab, name)
}

/// Creates a switched (`l2`) or a routed (`l3`) network with these arguments, and waits until it is known or complete on all
/// hosts.
pub fn create_network_of_mode(lab: &Lab, mode: &str, name: &str, more: &[&str]) -> Result<()> {
    match mode {
        "l2" => create_network(lab, name, more),
        _ => create_routed_network(lab, name, more),
    }
}

/// Waits until each running host has a block of each subnet, all running hosts know these blocks, and `verify` finds
/// no difference.
pub fn wait_routed(lab: &Lab, name: &str) -> Result<()> {
    let running: Vec<Host> = lab.hosts().iter().filter(|host| host.is_running()).cloned().collect();
    for host in &running {
        wait_until(SOON, &format!("{} to know the blocks of {name} of all hosts", host.name()), || {
            let info = host.ctl_json(&["network", "inspect", name])?;
            let wanted = strings(&info["subnets"]).len();
            for holder in &running {
                let held = blocks(host, name, holder.name())?.len();
                ensure!(held >= wanted, "{} holds {held} of {wanted} blocks", holder.name());
            }
            Ok(())
        })?;
    }
    wait_clean(&running, SOON)
}

/// Blocks of a network that `holder` holds, as `asked` lists them.
pub fn blocks(asked: &Host, network: &str, holder: &str) -> Result<Vec<String>> {
    let all = rows(asked, &["subnets"])?;
    let of = all.iter().filter(|row| row["network"] == network && row["node"] == holder);
    Ok(of.map(|row| text(&row["prefix"])).collect())
}

/// ovl's routes on a host (protocol 79), of both families: destination, type, next hop, device, MTU.
pub fn routes(host: &Netns) -> Result<Vec<String>> {
    let mut all = Vec::new();
    for family in ["-4", "-6"] {
        let found = host.ip_json(&[family, "-d", "route", "show", "proto", "79"])?;
        for route in found.as_array().into_iter().flatten() {
            if route["metric"] != 79 {
                continue;
            }
            let mut line = text(&route["dst"]);
            for (key, word) in [("type", ""), ("gateway", " via"), ("dev", " dev")] {
                let value = text(&route[key]);
                if !value.is_empty() && value != "unicast" {
                    line.push_str(&format!("{word} {value}"));
                }
            }
            if let Some(mtu) = route["metrics"][0]["mtu"].as_u64() {
                line.push_str(&format!(" mtu {mtu}"));
            }
            all.push(line);
        }
    }
    Ok(all)
}

/// ovl's routes to these blocks.
pub fn routes_to(host: &Netns, blocks: &[String]) -> Result<Vec<String>> {
    let to = |route: &String| blocks.iter().any(|block| route.split(' ').next() == Some(block));
    Ok(routes(host)?.into_iter().filter(to).collect())
}

/// Name of a network's device on a host, by its prefix.
pub fn device_of(host: &Host, network: &str, prefix: &str) -> Result<String> {
    let info = host.ctl_json(&["network", "inspect", network])?;
    Ok(info["bridge"].as_str().context("the network has no bridge")?.replace("ovb-", prefix))
}

/// Attaches many endpoints on a host, one after the other.
pub fn attach_many(host: &Host, stem: &str, count: usize, network: &str) -> Result<Vec<Attached>> {
    let workloads = host.bare_workloads(stem, count)?;
    workloads.into_iter().map(|each| attach_workload(each, network, &[])).collect()
}

/// Source addresses that a listener sees of a sender over UDP and TCP. The sender connects to `address`.
pub fn seen_from(from: &Netns, to: &Netns, address: IpAddr) -> Result<(IpAddr, IpAddr)> {
    Ok((seen_udp(from, to, address)?, seen_tcp(from, to, address)?))
}

fn any_of(like: IpAddr) -> SocketAddr {
    SocketAddr::new(if like.is_ipv4() { [0; 4].into() } else { [0_u16; 8].into() }, 0)
}

fn seen_udp(from: &Netns, to: &Netns, address: IpAddr) -> Result<IpAddr> {
    let listener = to.run(|| UdpSocket::bind((address, 0)))??;
    listener.set_read_timeout(Some(SOON))?;
    let port = listener.local_addr()?.port();
    let sender = from.run(|| UdpSocket::bind(any_of(address)))??;
    sender.connect((address, port))?;
    sender.set_read_timeout(Some(SOON))?;
    sender.send(b"who am I")?;
    let (_, seen) = uninterrupted(|| listener.recv_from(&mut [0; 64])).context("no datagram arrived")?;
    listener.send_to(b"you", seen)?;
    uninterrupted(|| sender.recv(&mut [0; 64])).context("no reply arrived")?;
    Ok(seen.ip())
}

fn seen_tcp(from: &Netns, to: &Netns, address: IpAddr) -> Result<IpAddr> {
    let listener = to.run(|| TcpListener::bind((address, 0)))??;
    let at = listener.local_addr()?;
    let sender = from.run(|| TcpStream::connect_timeout(&at, SOON))?.context("cannot connect")?;
    let source = thread::spawn(move || -> Result<IpAddr> {
        let (mut stream, peer) = listener.accept()?;
        stream.set_read_timeout(Some(SOON))?;
        let mut text = String::new();
        stream.read_to_string(&mut text)?;
        ensure!(text == "who am I", "{text:?}");
        Ok(peer.ip())
    });
    let mut sender = sender;
    sender.write_all(b"who am I")?;
    drop(sender);
    source.join().map_err(|_| anyhow!("the listener panicked"))?
}

/// Checks that a receiver sees the sender's own address, over UDP and TCP, in each family.
pub fn ensure_sees_own_address(from: &Attached, to: &Attached) -> Result<()> {
    for (own, target) in from.addresses().iter().zip(to.addresses()) {
        let path = format!("from {} to {} at {target}", from.name, to.name);
        let own: IpAddr = own.parse()?;
        let seen = seen_from(&from.workload, &to.workload, target.parse()?).context(path.clone())?;
        ensure!(seen == (own, own), "{path}: the source is {seen:?}, not {own}");
    }
    Ok(())
}

/// Packets of a counter in the table `watch` of a namespace.
pub fn counted(at: &Netns, name: &str) -> Result<u64> {
    let listed = at.exec_ok(["nft", "-j", "list", "counter", "bridge", "watch", name])?;
    let listed: Value = serde_json::from_str(&listed)?;
    let all = listed["nftables"].as_array().into_iter().flatten();
    all.filter_map(|each| each["counter"]["packets"].as_u64())
        .next()
        .context("the counter has no packet count")
}

/// nftables rules for the switch: `inside` counts VXLAN packets other than path probes, `plain` counts unencapsulated
/// overlay packets.
pub const WATCH: &str = "table bridge watch {
    counter inside {}
    counter plain {}
    chain forward {
        type filter hook forward priority -10; policy accept;
        udp dport 4789 @th,224,16 0x88b6 accept
        udp dport 4789 counter name inside accept
        ip saddr 10.60.0.0/16 ip daddr 10.60.0.0/16 counter name plain
        ip6 saddr fd60::/48 ip6 daddr fd60::/48 counter name plain
    }
}";
