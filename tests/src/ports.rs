//! Helpers for tests of published ports: a server that says who asks, and asking it.

use std::io::Read as _;
use std::net::{IpAddr, SocketAddr, TcpStream, UdpSocket};
use std::time::Duration;

use anyhow::{Result, ensure};
use netns_lab::{Host, Lab, Netns, Spawned, wait_until};

use crate::SOON;

/// How long an answer may take that is on its way.
const ANSWER: Duration = Duration::from_secs(2);

/// Tells each client its own address, over TCP and UDP, IPv4 and IPv6.
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
            } elsif (defined(my $from = $udp->recv(my $asked, 2048))) {
                my ($error, $host) = getnameinfo($from, NI_NUMERICHOST | NI_NUMERICSERV);
                $udp->send($host, 0, $from);
            }
        }
    }
"#;

/// A server at this port of a namespace; it ends when this is dropped.
pub fn who_asks(at: &Netns, port: u16) -> Result<Spawned> {
    let server = at.spawn(["perl", "-e", SERVER, &port.to_string()])?;
    wait_until(SOON, "a server to listen", || {
        ensure!(server.stdout() == "listening\n", "{}", server.stderr());
        Ok(())
    })?;
    Ok(server)
}

/// Whom the server takes us for that answers there over TCP, or an error without one.
pub fn asked(from: &Netns, at: SocketAddr) -> Result<IpAddr> {
    let said = from.run(|| -> Result<String> {
        let mut stream = TcpStream::connect_timeout(&at, ANSWER)?;
        stream.set_read_timeout(Some(ANSWER))?;
        let mut said = String::new();
        stream.read_to_string(&mut said)?;
        Ok(said)
    })??;
    ensure!(!said.is_empty(), "{at} ended the connection");
    Ok(said.parse::<IpAddr>()?.to_canonical())
}

/// The same over UDP.
pub fn asked_udp(from: &Netns, at: SocketAddr) -> Result<IpAddr> {
    let said = from.run(|| -> Result<String> {
        let any: SocketAddr = if at.is_ipv4() { "0.0.0.0:0".parse()? } else { "[::]:0".parse()? };
        let socket = UdpSocket::bind(any)?;
        socket.set_read_timeout(Some(ANSWER))?;
        socket.connect(at)?;
        socket.send(b"who?")?;
        let mut answer = [0; 64];
        let length = socket.recv(&mut answer)?;
        Ok(String::from_utf8_lossy(&answer[..length]).into_owned())
    })??;
    Ok(said.parse::<IpAddr>()?.to_canonical())
}

/// Makes a bridge network on one host.
pub fn make_bridge(host: &Host, name: &str, more: &[&str]) -> Result<String> {
    let made = host.ctl_json(&[&["network", "create", name, "--driver", "bridge"], more].concat())?;
    Ok(crate::text(&made["bridge"]))
}

/// Gives the switch addresses of the underlay: a machine that is no member, and knows no network of ours.
pub fn outsider(lab: &Lab) -> Result<Netns> {
    let switch = lab.switch();
    switch.exec_ok(["ip", "addr", "add", "192.168.77.250/24", "dev", "br0"])?;
    switch.exec_ok(["ip", "addr", "add", "fd77::fa/64", "dev", "br0", "nodad"])?;
    Ok(switch)
}
