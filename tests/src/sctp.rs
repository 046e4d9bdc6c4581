//! SCTP by raw packets, for kernels that have no such sockets: an INIT chunk, and the INIT ACK that answers it
//! (RFC 9260, sections 3.3.2 and 3.3.3), with the checksum that connection tracking asks for.

use std::net::IpAddr;

use anyhow::{Context as _, Result, ensure};
use netns_lab::{Netns, Spawned, wait_until};

use crate::SOON;

/// `serve PORT` answers each INIT to a port; `ask ADDRESS PORT` sends INITs until one is answered from there, and prints
/// by whom.
const PEER: &str = r#"
    use IO::Select;
    use Socket qw(:all);
    $| = 1;
    my @crc = map { my $c = $_; $c = $c & 1 ? ($c >> 1) ^ 0x82f63b78 : $c >> 1 for 1 .. 8; $c } 0 .. 255;
    sub packet {
        my ($from, $to, $tag, $kind) = @_;
        my @head = ($from, $to, $tag);
        my $chunk = pack "CCnNNnnN", $kind, 0, 20, 7, 65536, 1, 1, 1;
        my $c = 0xffffffff;
        $c = $crc[($c ^ $_) & 255] ^ ($c >> 8) for unpack "C*", pack("nnNN", @head, 0) . $chunk;
        return pack("nnNV", @head, $c ^ 0xffffffff) . $chunk;
    }
    sub receive {
        my ($socket, $v4) = @_;
        my $from = recv($socket, my $data, 2048, 0) // return;
        $data = substr $data, 4 * (ord($data) & 15) if $v4;
        return ($from, unpack "nnNNCCnN", $data);
    }
    sub open_one { socket(my $socket, $_[0], SOCK_RAW, 132) or die "cannot open: $!\n"; return $socket }
    my ($what, $address, $port) = @ARGV;
    if ($what eq "serve") {
        my ($v4, $v6) = (open_one(AF_INET), open_one(AF_INET6));
        my $select = IO::Select->new($v4, $v6);
        print "listening\n";
        while (my @ready = $select->can_read) {
            for my $socket (@ready) {
                my ($from, $theirs, $ours, undef, undef, $kind, undef, undef, $tag) = receive($socket, $socket == $v4);
                send $socket, packet($ours, $theirs, $tag, 2), 0, $from if $ours == $address && $kind == 1;
            }
        }
    }
    my $v4 = $address !~ /:/;
    my $socket = open_one($v4 ? AF_INET : AF_INET6);
    my $to = $v4 ? pack_sockaddr_in(0, inet_pton(AF_INET, $address)) : pack_sockaddr_in6(0, inet_pton(AF_INET6, $address));
    setsockopt $socket, SOL_SOCKET, SO_RCVTIMEO, pack("l!l!", 0, 300_000);
    for my $try (1 .. 10) {
        send $socket, packet(40000 + $try, $port, 0, 1), 0, $to or next;
        while (my ($from, $theirs, $ours, undef, undef, $kind) = receive($socket, $v4)) {
            next if $kind != 2;
            my (undef, $host) = $v4 ? unpack_sockaddr_in($from) : unpack_sockaddr_in6($from);
            print inet_ntop($v4 ? AF_INET : AF_INET6, $host), " $theirs\n";
            exit;
        }
    }
    die "no answer\n";
"#;

/// Answers INITs to a port of a namespace, of both families, until this is dropped.
pub fn serve(at: &Netns, port: u16) -> Result<Spawned> {
    let server = at.spawn(["perl", "-e", PEER, "serve", &port.to_string()])?;
    wait_until(SOON, "SCTP to be answered", || {
        ensure!(server.stdout() == "listening\n", "{}", server.stderr());
        Ok(())
    })?;
    Ok(server)
}

/// Who answers an INIT that is sent there.
pub fn ask(from: &Netns, address: IpAddr, port: u16) -> Result<(IpAddr, u16)> {
    let said = from.exec_ok(["perl", "-e", PEER, "ask", &address.to_string(), &port.to_string()])?;
    let (address, port) = said.trim().split_once(' ').with_context(|| format!("{said:?}"))?;
    Ok((address.parse()?, port.parse()?))
}
