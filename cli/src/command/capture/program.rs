//! Filters. tcpdump compiles the expressions, so they mean what its manual says; here programs are only combined, and moved
//! to the frames inside of VXLAN packets.

use std::process::{Command, Stdio};

use ovl_control::{CapturePlan, CaptureScope, Encapsulated};
use ovl_proto::capture::{CaptureProgram, Instruction, LinkType, MAX_INSTRUCTIONS, PointKind};

use crate::error::{Error, Result};

/// `BPF_RET | BPF_K` and `BPF_JMP | BPF_JA` of `linux/bpf_common.h`.
const RETURN: u16 = 0x06;
const JUMP: u16 = 0x05;
/// The lengths of headers: Ethernet, IPv4 and IPv6, UDP with VXLAN.
const ETHERNET: u32 = 14;
const IPV4: u32 = 20;
const IPV6: u32 = 40;
const VXLAN: u32 = 16;

type Program = Vec<Instruction>;

/// Returns the programs of a capture. None if all packets are meant, for which tcpdump is not needed.
///
/// # Errors
///
/// tcpdump is missing, or refuses the filter.
pub(super) fn programs(plan: &CapturePlan, filter: &str, snaplen: u32) -> Result<Vec<CaptureProgram>> {
    let filter = filter.trim();
    let mut scopes = plan.scopes.clone();
    if scopes.is_empty() && !filter.is_empty() {
        let kinds = vec![PointKind::Endpoint, PointKind::Vxlan];
        scopes.push(CaptureScope { kinds, expression: String::new(), carries: Vec::new() });
    }
    let mut programs = Vec::new();
    for scope in &scopes {
        let links: &[LinkType] = match scope.kinds.as_slice() {
            [PointKind::Tunnel] => &[LinkType::Ip],
            [PointKind::Underlay] => &[LinkType::Ethernet, LinkType::Ip],
            _ => &[LinkType::Ethernet],
        };
        for link in links {
            let code = program(scope, filter, *link, snaplen)?;
            if code.len() > MAX_INSTRUCTIONS {
                return Err(Error::Failed(format!(
                    "the filter has {} instructions, and the kernel takes {MAX_INSTRUCTIONS}: use a shorter one",
                    code.len()
                )));
            }
            programs.push(CaptureProgram { kinds: scope.kinds.clone(), link: *link, code });
        }
    }
    Ok(programs)
}

fn program(scope: &CaptureScope, filter: &str, link: LinkType, snaplen: u32) -> Result<Program> {
    let scoped = compile(&scope.expression, link, snaplen)?;
    if filter.is_empty() {
        return Ok(scoped);
    }
    let mut wanted = compile(filter, link, snaplen)?;
    for Encapsulated { port, ipv4 } in &scope.carries {
        let family = if *ipv4 { "ip" } else { "ip6" };
        let outer = compile(&format!("{family} and udp dst port {port}"), link, snaplen)?;
        let inner = compile(filter, LinkType::Ethernet, snaplen)?;
        let before = if link == LinkType::Ethernet { ETHERNET } else { 0 };
        let header = if *ipv4 { IPV4 } else { IPV6 };
        wanted = or(wanted, and(outer, moved(inner, before + header + VXLAN)));
    }
    Ok(and(scoped, wanted))
}

/// Compiles an expression. The empty one means all packets.
fn compile(expression: &str, link: LinkType, snaplen: u32) -> Result<Program> {
    if expression.is_empty() {
        return Ok(vec![(RETURN, 0, 0, snaplen)]);
    }
    let link = match link {
        LinkType::Ethernet => "EN10MB",
        LinkType::Ip => "RAW",
    };
    let output = Command::new("tcpdump")
        .args(["-ddd", "-s", &snaplen.to_string(), "-y", link, "--", expression])
        .stdin(Stdio::null())
        .output()
        .map_err(|error| {
            Error::Failed(format!(
                "cannot run tcpdump, which compiles filters: {error}. Install tcpdump on this host, or capture an endpoint or a \
                 network without a filter"
            ))
        })?;
    if !output.status.success() {
        let text = String::from_utf8_lossy(&output.stderr);
        let text = text.lines().last().unwrap_or_default().trim_start_matches("tcpdump: ").to_owned();
        return Err(Error::Failed(format!("filter `{expression}`: {text}; pcap-filter(7) has the syntax")));
    }
    parse(&String::from_utf8_lossy(&output.stdout)).ok_or_else(|| {
        Error::Failed(format!(
            "tcpdump printed no program for the filter `{expression}`: is it a release that knows -ddd?"
        ))
    })
}

/// Reads a program as `tcpdump -ddd` prints it.
fn parse(text: &str) -> Option<Program> {
    let mut lines = text.lines();
    let count: usize = lines.next()?.trim().parse().ok()?;
    let instruction = |line: &str| {
        let mut numbers = line.split_ascii_whitespace();
        let code = numbers.next()?.parse().ok()?;
        let [yes, no] = [numbers.next()?.parse().ok()?, numbers.next()?.parse().ok()?];
        Some((code, yes, no, numbers.next()?.parse().ok()?))
    };
    let program = lines.map(instruction).collect::<Option<Program>>()?;
    (program.len() == count && count > 0).then_some(program)
}

/// Returns a program that accepts what both accept.
fn and(first: Program, second: Program) -> Program {
    joined(first, second, |result| result != 0)
}

/// Returns a program that accepts what one of two accepts.
fn or(first: Program, second: Program) -> Program {
    joined(first, second, |result| result == 0)
}

/// Returns a program that goes on with the second where the first returns what `goes_on` says.
fn joined(first: Program, second: Program, goes_on: impl Fn(u32) -> bool) -> Program {
    let length = first.len();
    let begin = first.into_iter().enumerate().map(|(at, (code, yes, no, operand))| {
        match code == RETURN && goes_on(operand) {
            true => (JUMP, 0, 0, u32::try_from(length - at - 1).unwrap_or(u32::MAX)),
            false => (code, yes, no, operand),
        }
    });
    begin.chain(second).collect()
}

/// Returns a program for what begins later in the packet.
fn moved(program: Program, by: u32) -> Program {
    /// Offsets from here on are not in the packet (`SKF_LL_OFF`).
    const SPECIAL: u32 = 0xffe0_0000;
    let is_load = |code: u16| matches!(code & 0x07, 0 | 1) && matches!(code & 0xe0, 0x20 | 0x40 | 0xa0);
    let all = program.into_iter().map(|(code, yes, no, operand)| match is_load(code) && operand < SPECIAL {
        true => (code, yes, no, operand + by),
        false => (code, yes, no, operand),
    });
    all.collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const ICMP: &str = "6\n40 0 0 12\n21 0 3 2048\n48 0 0 23\n21 0 1 1\n6 0 0 262144\n6 0 0 0\n";

    /// Runs a program as the kernel does, for the instructions of these tests.
    fn run(program: &[Instruction], packet: &[u8]) -> u32 {
        let (mut at, mut a) = (0, 0);
        loop {
            let (code, yes, no, k) = program[at];
            let byte = |n: u32| packet.get(n as usize).copied().map(u32::from);
            let loaded = match code {
                0x28 => byte(k).zip(byte(k + 1)).map(|(high, low)| high << 8 | low),
                0x30 => byte(k),
                _ => Some(a),
            };
            let Some(loaded) = loaded else { return 0 };
            a = loaded;
            at += 1 + match code {
                0x06 => return k,
                0x05 => k as usize,
                0x15 => usize::from(if a == k { yes } else { no }),
                _ => 0,
            };
        }
    }

    fn icmp() -> Vec<u8> {
        let mut packet = Vec::new();
        let builder = etherparse::PacketBuilder::ethernet2([1; 6], [2; 6]);
        builder
            .ipv4([10, 1, 0, 1], [10, 1, 0, 2], 9)
            .icmpv4_echo_request(1, 2)
            .write(&mut packet, &[])
            .unwrap();
        packet
    }

    #[test]
    fn program_is_read() {
        let program = parse(ICMP).unwrap();
        assert_eq!(program.len(), 6);
        assert_eq!(run(&program, &icmp()), 262_144);
        for wrong in ["", "2\n6 0 0 0\n", "1\n6 0 0\n", "1\n6 0 0 x\n", "0\n"] {
            assert!(parse(wrong).is_none(), "{wrong:?}");
        }
    }

    #[test]
    fn programs_are_combined() {
        let [all, none] = [vec![(RETURN, 0, 0, 9)], vec![(RETURN, 0, 0, 0)]];
        let icmp_alone = || parse(ICMP).unwrap();
        for (packet, is_icmp) in [(icmp(), true), (vec![0; 60], false)] {
            let accepts = |program: Program| run(&program, &packet) != 0;
            assert_eq!(accepts(and(icmp_alone(), all.clone())), is_icmp);
            assert!(!accepts(and(icmp_alone(), none.clone())));
            assert_eq!(accepts(or(icmp_alone(), none.clone())), is_icmp);
            assert!(accepts(or(icmp_alone(), all.clone())));
            assert_eq!(accepts(or(none.clone(), and(all.clone(), icmp_alone()))), is_icmp);
        }
    }

    #[test]
    fn program_is_moved_behind_headers() {
        let packet = [vec![0; 50], icmp()].concat();
        assert_eq!(run(&parse(ICMP).unwrap(), &packet), 0);
        assert_ne!(run(&moved(parse(ICMP).unwrap(), ETHERNET + IPV4 + VXLAN), &packet), 0);
        // A load of the packet's length, and of what is not in the packet.
        let other = vec![(0x80, 0, 0, 0), (0x28, 0, 0, 0xffff_f000), (RETURN, 0, 0, 1)];
        assert_eq!(moved(other.clone(), 50), other);
    }
}
