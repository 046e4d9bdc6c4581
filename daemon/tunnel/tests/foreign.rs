//! Interoperability with WireGuard's implementation in Go (Debian's `wireguard-go`), which the test
//! configures over its configuration socket.

#![allow(clippy::unwrap_used, reason = "tests and their helpers")]

use std::io::{Read as _, Write as _};
use std::net::{Ipv6Addr, Shutdown, SocketAddr};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::time::Duration;

use netns_lab::{Host, Lab, LabConfig, Spawned, wait_until};
use ovl_tunnel::{Engine, InterfaceConfig, PeerConfig, PrivateKey, public_key};

const PATIENCE: Duration = Duration::from_secs(20);

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn ip(host: &Host, line: &str) {
    host.exec_ok(["ip"].into_iter().chain(line.split_whitespace())).unwrap();
}

fn key(n: u8) -> PrivateKey {
    PrivateKey([n; 32])
}

fn allowed(n: u8) -> [String; 2] {
    [format!("10.9.{n}.0/24"), format!("fd00::{n}/128")]
}

/// Sets the addresses and routes of a device.
fn address(host: &Host, device: &str, n: u8) {
    ip(host, &format!("link set {device} mtu 1420 up"));
    ip(host, &format!("addr add 10.9.{n}.1/32 dev {device}"));
    ip(host, &format!("addr add fd00::{n}/128 dev {device} nodad"));
    ip(host, &format!("route add 10.9.0.0/16 dev {device}"));
    ip(host, &format!("route add fd00::/64 dev {device}"));
}

/// Sends a request in the configuration protocol (wireguard.com/xplatform).
fn configure(device: &str, request: &str) {
    let path = PathBuf::from(format!("/var/run/wireguard/{device}.sock"));
    let mut socket =
        wait_until(PATIENCE, "the configuration socket", || UnixStream::connect(&path).ok()).unwrap();
    socket.write_all(request.as_bytes()).unwrap();
    socket.shutdown(Shutdown::Write).unwrap();
    let mut answer = String::new();
    socket.read_to_string(&mut answer).unwrap();
    assert_eq!(answer.trim(), "errno=0", "{request}");
}

/// Starts `wireguard-go` on `h2`. The device name is unique, because the configuration sockets of all labs
/// are in one folder.
fn start_wireguard_go(lab: &Lab) -> (Spawned, String) {
    let host = &lab["h2"];
    let device = format!("wg{}", lab.name());
    // It warns that the kernel may have WireGuard, and continues.
    let program = host.spawn(["wireguard-go", "-f", &device]).unwrap();
    let endpoint = SocketAddr::new(lab["h1"].address().unwrap(), 51940);
    let [v4, v6] = allowed(1);
    configure(
        &device,
        &format!(
            "set=1\nprivate_key={}\nlisten_port=51820\npublic_key={}\nendpoint={endpoint}\nallowed_ip={v4}\n\
             allowed_ip={v6}\n\n",
            hex(&key(2).0),
            hex(&public_key(&key(1)))
        ),
    );
    address(host, &device, 2);
    (program, device)
}

fn start_engine(lab: &Lab) -> Engine {
    let host = &lab["h1"];
    let engine = Engine::new();
    let config = InterfaceConfig {
        key: key(1),
        listen: SocketAddr::new(host.address().unwrap(), 51940),
        address: "fd00::1".parse::<Ipv6Addr>().unwrap(),
        vxlan_port: 51942,
    };
    host.run(|| engine.set_interface("ovt-0", &config)).unwrap().unwrap();
    address(host, "ovt-0", 1);
    let endpoint = SocketAddr::new(lab["h2"].address().unwrap(), 51820);
    let allowed = allowed(2).iter().map(|net| net.parse().unwrap()).collect();
    engine.set_peer("ovt-0", public_key(&key(2)), &PeerConfig { endpoint, allowed }).unwrap();
    engine
}

/// Sends packets of all sizes and both families in both directions.
fn exchange_packets(lab: &Lab) {
    let payload: Vec<u8> = (0..500_000).map(|n| (n % 251) as u8).collect();
    for (from, to, n) in [("h1", "h2", 2), ("h2", "h1", 1)] {
        for address in [format!("10.9.{n}.1"), format!("fd00::{n}")] {
            lab[from].ping_until(&address, PATIENCE).unwrap();
            let port = 7000 + n;
            let tcp = lab[to].tcp_echo(port).unwrap();
            let back = lab[from].tcp_roundtrip(&address, tcp.port(), &payload).unwrap();
            assert!(back == payload, "{from} to {address}");
            let udp = lab[to].udp_echo(port).unwrap();
            for length in [0, 1, 1000, 1372] {
                let back = lab[from].udp_roundtrip(&address, udp.port(), &payload[..length]).unwrap();
                assert!(back == payload[..length], "{length} bytes from {from} to {address}");
            }
        }
    }
}

#[test]
fn packets_cross_whichever_side_begins_the_handshake() {
    let lab = Lab::new(LabConfig::hosts(2)).unwrap();
    // First the engine begins the handshake, then wireguard-go, and each is restarted once.
    let engine = start_engine(&lab);
    let (program, _) = start_wireguard_go(&lab);
    exchange_packets(&lab);
    drop(engine);
    let engine = start_engine(&lab);
    exchange_packets(&lab);
    drop(program);
    let (_program, _) = start_wireguard_go(&lab);
    exchange_packets(&lab);
    let state = engine.state();
    assert!(state.interfaces[0].peers[0].last_handshake.is_some());
    assert_eq!(state.drops.spoofed, 0);
}
