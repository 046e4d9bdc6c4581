//! What a captured packet is for a trace: the probe, an answer to it, or an error about it, also inside of VXLAN.
//!
//! A probe is recognized by its cookie: the first four bytes of the payload of an echo request or a datagram, and the
//! sequence number of a TCP segment. Cookies are even, so that the next number, which TCP acknowledges, differs in one bit.

use std::net::IpAddr;

use etherparse::LaxIpSlice;
use ovl_dataplane::passage::{IcmpError, PacketKind};
use socket2::SockFilter;

/// IP protocol numbers.
const ICMP: u8 = 1;
const TCP: u8 = 6;
const UDP: u8 = 17;
const ICMPV6: u8 = 58;

/// Lengths of headers without options, in bytes.
pub(super) const IPV4: u32 = 20;
pub(super) const IPV6: u32 = 40;
const UDP_HEADER: u32 = 8;
const ICMP_HEADER: u32 = 8;
/// UDP, VXLAN and Ethernet, which are before a packet in VXLAN.
pub(super) const AROUND: u32 = 8 + 8 + 14;
/// The offsets of the cookie in a transport header and what follows: of a TCP sequence number, and of a TCP acknowledgement
/// or a payload.
pub(super) const IN_TRANSPORT: [u32; 2] = [4, 8];

/// A packet that belongs to a trace.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Packet {
    pub(super) source: IpAddr,
    pub(super) destination: IpAddr,
    pub(super) kind: PacketKind,
    /// The addresses of the VXLAN packet around it.
    pub(super) outer: Option<(IpAddr, IpAddr)>,
}

/// Returns the offsets in a packet, from its IP header, at which a cookie may be.
fn offsets() -> Vec<u32> {
    let inner = [0, IPV4 + AROUND, IPV6 + AROUND];
    let mut all: Vec<u32> = inner
        .into_iter()
        .flat_map(|ip| [IPV4, IPV6].map(|header| (ip + header, header)))
        .flat_map(|(transport, header)| [transport, transport + ICMP_HEADER + header])
        .flat_map(|transport| IN_TRANSPORT.map(|at| transport + at))
        .collect();
    // A load behind the end of a packet refuses it, so the packet must be searched from its beginning.
    all.sort_unstable();
    all.dedup();
    all
}

/// Returns a filter that passes packets with the cookie at a place where it may be. [`parse`] looks exactly.
pub(super) fn filter(cookie: u32) -> Vec<SockFilter> {
    /// The instructions of classic BPF that are used (`linux/bpf_common.h`).
    const LOAD: u16 = 0x20;
    const AND: u16 = 0x54;
    const JUMP_IF_EQUAL: u16 = 0x15;
    const RETURN: u16 = 0x06;
    let offsets = offsets();
    let mut program = Vec::with_capacity(offsets.len() * 3 + 2);
    for (n, at) in offsets.iter().enumerate() {
        program.push(SockFilter::new(LOAD, 0, 0, *at));
        program.push(SockFilter::new(AND, 0, 0, !1));
        // To the last instruction: behind the remaining tests and the refusal.
        let behind = (offsets.len() - n - 1) * 3 + 1;
        program.push(SockFilter::new(JUMP_IF_EQUAL, behind as u8, 0, cookie));
    }
    program.push(SockFilter::new(RETURN, 0, 0, 0));
    program.push(SockFilter::new(RETURN, 0, 0, u32::MAX));
    program
}

/// Returns what a packet is, which begins with its IP header. `None` if it does not belong to the trace.
pub(super) fn parse(bytes: &[u8], cookie: u32) -> Option<Packet> {
    let (ip, _) = LaxIpSlice::from_slice(bytes).ok()?;
    let (source, destination) = (ip.source_addr(), ip.destination_addr());
    let (protocol, rest) = (ip.payload_ip_number().0, ip.payload().payload);
    if let Some(kind) = kind(protocol, rest, cookie) {
        return Some(Packet { source, destination, kind, outer: None });
    }
    if protocol != UDP {
        return None;
    }
    let inner = LaxIpSlice::from_slice(rest.get(AROUND as usize..)?).ok()?.0;
    let kind = kind(inner.payload_ip_number().0, inner.payload().payload, cookie)?;
    let outer = Some((source, destination));
    Some(Packet { source: inner.source_addr(), destination: inner.destination_addr(), kind, outer })
}

/// Returns what a transport segment is.
fn kind(protocol: u8, bytes: &[u8], cookie: u32) -> Option<PacketKind> {
    const SYN: u8 = 2;
    const RST: u8 = 4;
    match protocol {
        UDP => has(bytes, UDP_HEADER as usize, cookie).then_some(PacketKind::Probe),
        TCP => {
            let flags = *bytes.get(13)?;
            if flags & RST != 0 {
                // A host that refuses the probe acknowledges it. The sender resets the connection with the number that follows.
                return has(bytes, 8, cookie + 1).then_some(PacketKind::Reset);
            }
            match flags & SYN != 0 {
                true if has(bytes, 4, cookie) => Some(PacketKind::Probe),
                true if has(bytes, 8, cookie + 1) => Some(PacketKind::Answer),
                _ => None,
            }
        }
        ICMP => icmp(bytes, cookie, 8, 0, |kind, code| match (kind, code) {
            (3, 3) => Some(IcmpError::PortUnreachable),
            (3, 4) => {
                Some(IcmpError::TooBig(u32::from(u16::from_be_bytes([*bytes.get(6)?, *bytes.get(7)?]))))
            }
            (3, 9 | 10 | 13) => Some(IcmpError::Prohibited),
            (3, _) => Some(IcmpError::Unreachable),
            (11, _) => Some(IcmpError::Expired),
            _ => None,
        }),
        ICMPV6 => icmp(bytes, cookie, 128, 129, |kind, code| match (kind, code) {
            (1, 4) => Some(IcmpError::PortUnreachable),
            (1, 1 | 5 | 6) => Some(IcmpError::Prohibited),
            (1, _) => Some(IcmpError::Unreachable),
            (2, _) => Some(IcmpError::TooBig(number(bytes, 4)?)),
            (3, _) => Some(IcmpError::Expired),
            _ => None,
        }),
        _ => None,
    }
}

/// Returns what an ICMP message is. `request` and `reply` are the types of echo messages.
fn icmp(
    bytes: &[u8],
    cookie: u32,
    request: u8,
    reply: u8,
    error: impl Fn(u8, u8) -> Option<IcmpError>,
) -> Option<PacketKind> {
    let (kind, code) = (*bytes.first()?, *bytes.get(1)?);
    if kind == request || kind == reply {
        let kind = if kind == request { PacketKind::Probe } else { PacketKind::Answer };
        return has(bytes, ICMP_HEADER as usize, cookie).then_some(kind);
    }
    let error = error(kind, code)?;
    let about = LaxIpSlice::from_slice(bytes.get(ICMP_HEADER as usize..)?).ok()?.0;
    let quoted = about.payload().payload;
    // Of TCP, only the first eight bytes need to be quoted.
    IN_TRANSPORT.iter().any(|at| has(quoted, *at as usize, cookie)).then_some(PacketKind::Error(error))
}

fn has(bytes: &[u8], at: usize, wanted: u32) -> bool {
    number(bytes, at) == Some(wanted)
}

fn number(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_be_bytes(bytes.get(at..at + 4)?.try_into().ok()?))
}

#[cfg(test)]
mod tests {
    use etherparse::PacketBuilder;
    use proptest::prelude::*;

    use super::*;

    const COOKIE: u32 = 0x6f76_6c2e;

    /// Runs the filter as the kernel does, for the instructions that it uses.
    fn passes(bytes: &[u8]) -> bool {
        let at = |offset: u32| number(bytes, offset as usize);
        offsets().into_iter().map_while(at).any(|found| found & !1 == COOKIE)
    }

    fn check(bytes: &[u8], kind: PacketKind) -> Packet {
        assert!(passes(bytes), "{kind:?} does not pass the filter");
        let found = parse(bytes, COOKIE).unwrap();
        assert_eq!(found.kind, kind);
        assert!(parse(bytes, COOKIE + 2).is_none());
        found
    }

    fn v4() -> etherparse::PacketBuilderStep<etherparse::IpHeaders> {
        PacketBuilder::ipv4([10, 1, 0, 1], [10, 1, 0, 2], 64)
    }

    fn v6() -> etherparse::PacketBuilderStep<etherparse::IpHeaders> {
        PacketBuilder::ipv6([1; 16], [2; 16], 64)
    }

    fn payload() -> Vec<u8> {
        [&COOKIE.to_be_bytes()[..], b"and more"].concat()
    }

    fn echo(request: bool) -> [Vec<u8>; 2] {
        let (mut four, mut six) = (Vec::new(), Vec::new());
        if request {
            v4().icmpv4_echo_request(1, 2).write(&mut four, &payload()).unwrap();
            v6().icmpv6_echo_request(1, 2).write(&mut six, &payload()).unwrap();
        } else {
            v4().icmpv4_echo_reply(1, 2).write(&mut four, &payload()).unwrap();
            v6().icmpv6_echo_reply(1, 2).write(&mut six, &payload()).unwrap();
        }
        [four, six]
    }

    #[test]
    fn probes_and_answers_are_recognized() {
        for packet in echo(true) {
            check(&packet, PacketKind::Probe);
        }
        for packet in echo(false) {
            check(&packet, PacketKind::Answer);
        }
        for step in [v4(), v6()] {
            let mut udp = Vec::new();
            step.udp(1000, 53).write(&mut udp, &payload()).unwrap();
            check(&udp, PacketKind::Probe);
        }
        for step in [v4(), v6()] {
            let mut syn = Vec::new();
            step.tcp(1000, 80, COOKIE, 1024).syn().write(&mut syn, &[]).unwrap();
            check(&syn, PacketKind::Probe);
        }
        for step in [v4(), v6()] {
            let mut answer = Vec::new();
            step.tcp(80, 1000, 7, 1024).syn().ack(COOKIE + 1).write(&mut answer, &[]).unwrap();
            check(&answer, PacketKind::Answer);
        }
        for step in [v4(), v6()] {
            let mut reset = Vec::new();
            step.tcp(80, 1000, 0, 0).rst().ack(COOKIE + 1).write(&mut reset, &[]).unwrap();
            check(&reset, PacketKind::Reset);
        }
    }

    #[test]
    fn packets_in_vxlan_and_errors_are_recognized() {
        for inner in echo(true) {
            let vxlan = [&[8, 0, 0, 0, 0, 0, 7, 0][..], &[0; 14], &inner].concat();
            for step in [v4(), v6()] {
                let mut outer = Vec::new();
                step.udp(5000, 4789).write(&mut outer, &vxlan).unwrap();
                assert!(check(&outer, PacketKind::Probe).outer.is_some());
            }
        }
        let mut udp = Vec::new();
        v4().udp(1000, 53).write(&mut udp, &payload()).unwrap();
        let mut error = Vec::new();
        v4().icmpv4_raw(3, 3, [0; 4]).write(&mut error, &udp).unwrap();
        check(&error, PacketKind::Error(IcmpError::PortUnreachable));
        let mut syn = Vec::new();
        v4().tcp(1000, 80, COOKIE, 1024).syn().write(&mut syn, &[]).unwrap();
        let mut error = Vec::new();
        v4().icmpv4_raw(3, 4, [0, 0, 0x05, 0x14]).write(&mut error, &syn[..28]).unwrap();
        check(&error, PacketKind::Error(IcmpError::TooBig(1300)));
    }

    proptest! {
        #[test]
        fn random_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            parse(&bytes, COOKIE);
        }
    }
}
