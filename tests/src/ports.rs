//! Helpers for tests of published ports: a server that returns the client's address, and its clients.

use std::io::Read as _;
use std::net::{IpAddr, SocketAddr, TcpStream, UdpSocket};
use std::time::Duration;

use anyhow::{Result, ensure};
use netns_lab::{Host, Lab, Netns, Spawned, uninterrupted, wait_until};

use crate::SOON;

/// Time limit of one request.
const ANSWER: Duration = Duration::from_secs(2);

/// Perl server that returns each client's address, over TCP and UDP, IPv4 and IPv6.
const SERVER: &str = r#"
    use IO::Select;
    use IO::Socket::IP;
    use Socket qw(getnameinfo NI_NUMERICHOST NI_NUMERICSERV);
    $| = 1;
    my %all = (LocalHost => "::", LocalPort => $ARGV[0], V6Only => 0, ReuseAddr => 1);
    my $tcp = IO::Socket::IP->new(%all, Listen => 64) or die "cannot listen: $@\n";
    my $udp = IO::Socket::IP->new(%all, Proto => "udp") or die "cannot bind: $@\n";
    my $select = IO::Select->new($tcp, $udp);
    print "listening\n";
    while (my @ready = $select->can_read) {
        for my $socket (@ready) {
            if ($socket == $tcp) {
                my $client = $tcp->accept or next;
                print $client $client->peerhost;
                close $client;
            } elsif (defined(my $from = $udp->recv(my $seen_client, 2048))) {
                my ($error, $host) = getnameinfo($from, NI_NUMERICHOST | NI_NUMERICSERV);
                $udp->send($host, 0, $from);
            }
        }
    }
"#;

/// Starts the server on this port of a namespace. It is stopped when the value is dropped.
pub fn start_address_server(at: &Netns, port: u16) -> Result<Spawned> {
    let server = at.spawn(["perl", "-e", SERVER, &port.to_string()])?;
    wait_until(SOON, "the address server to listen", || {
        ensure!(server.stdout() == "listening\n", "{}", server.stderr());
        Ok(())
    })?;
    Ok(server)
}

/// Connects to the server over TCP, and returns the client address that it saw.
pub fn seen_client(from: &Netns, at: SocketAddr) -> Result<IpAddr> {
    let said = from.run(|| -> Result<String> {
        let mut stream = TcpStream::connect_timeout(&at, ANSWER)?;
        stream.set_read_timeout(Some(ANSWER))?;
        let mut said = String::new();
        stream.read_to_string(&mut said)?;
        Ok(said)
    })??;
    ensure!(!said.is_empty(), "{at} closed the connection without data");
    Ok(said.parse::<IpAddr>()?.to_canonical())
}

/// Asks the server over UDP, and returns the client address that it saw.
pub fn seen_client_udp(from: &Netns, at: SocketAddr) -> Result<IpAddr> {
    let said = from.run(|| -> Result<String> {
        let any: SocketAddr = if at.is_ipv4() { "0.0.0.0:0".parse()? } else { "[::]:0".parse()? };
        let socket = UdpSocket::bind(any)?;
        socket.set_read_timeout(Some(ANSWER))?;
        socket.connect(at)?;
        socket.send(b"who?")?;
        let mut answer = [0; 64];
        let length = uninterrupted(|| socket.recv(&mut answer))?;
        Ok(String::from_utf8_lossy(&answer[..length]).into_owned())
    })??;
    Ok(said.parse::<IpAddr>()?.to_canonical())
}

/// Creates a bridge network on one host, and returns the name of its bridge.
pub fn create_bridge_network(host: &Host, name: &str, more: &[&str]) -> Result<String> {
    let made = host.ctl_json(&[&["network", "create", name, "--driver", "bridge"], more].concat())?;
    Ok(crate::text(&made["bridge"]))
}

/// Assigns underlay addresses to the switch, which then acts as a machine that is not a member and has no overlay
/// route.
pub fn outsider(lab: &Lab) -> Result<Netns> {
    let switch = lab.switch();
    switch.exec_ok(["ip", "addr", "add", "192.168.77.250/24", "dev", "br0"])?;
    switch.exec_ok(["ip", "addr", "add", "fd77::fa/64", "dev", "br0", "nodad"])?;
    Ok(switch)
}
