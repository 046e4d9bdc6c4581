//! Which rule of a packet filter drops a probe: a table of its own marks the probe for nftables' tracing, whose messages
//! name each rule that the packet passes.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::io;
use std::net::IpAddr;
use std::os::fd::{AsRawFd, RawFd};

use etherparse::LaxIpSlice;
use netlink_sys::protocols::NETLINK_NETFILTER;
use netlink_sys::{Socket, SocketAddr};
use nix::libc;
use ovl_dataplane::passage::FilterDrop;

use crate::attribute::{attributes, messages, text, u8_at};
use crate::error::{KernelError, Result};
use crate::filter;

use super::packet::{AROUND, IN_TRANSPORT, IPV4, IPV6};

/// The prefix of the names of these tables. Another number follows for each trace.
pub(super) const TABLE: &str = "ovl-trace-";
/// The families in which a probe can be dropped.
pub(super) const FAMILIES: [&str; 2] = ["inet", "bridge"];
/// The maximum number of traced packets and drops that are remembered.
const MOST: usize = 64;

/// The group of messages about traced packets, and their attributes (`linux/netfilter/nf_tables.h`).
const GROUP: u32 = 9;
pub(super) const TRACE: u16 = (libc::NFNL_SUBSYS_NFTABLES as u16) << 8 | 17;
const TABLE_NAME: u16 = 1;
const CHAIN_NAME: u16 = 2;
const RULE_HANDLE: u16 = 3;
const TYPE: u16 = 4;
const VERDICT: u16 = 5;
const ID: u16 = 6;
const NETWORK_HEADER: u16 = 8;
const TRANSPORT_HEADER: u16 = 9;
const FAMILY: u16 = 15;
const POLICY: u16 = 16;
const VERDICT_CODE: u16 = 1;
/// Values of [`TYPE`].
const BY_POLICY: u32 = 1;
const BY_RULE: u32 = 3;
/// `NF_DROP`.
const DROP: u32 = 0;

/// The tables that mark the packets of one trace, and the socket that hears of them. The tables are deleted when it is
/// dropped; those that a killed daemon leaves are deleted by [`remove_left`].
#[derive(Debug)]
pub(super) struct RuleTrace {
    table: String,
    socket: Socket,
    buffer: Vec<u8>,
    /// The packets of the trace, by their ids: where each comes from, and whether it is an answer.
    packets: BTreeMap<u32, (Option<IpAddr>, bool)>,
    drops: Vec<(FilterDrop, Option<u64>)>,
}

impl RuleTrace {
    /// Marks packets with a cookie from now on, also inside of VXLAN to these ports.
    pub(super) fn begin(cookie: u32, vxlan_ports: &[u16]) -> Result<Self> {
        let socket = open()?;
        let table = format!("{TABLE}{cookie:08x}");
        let trace = Self {
            table,
            socket,
            buffer: Vec::with_capacity(64 * 1024),
            packets: BTreeMap::new(),
            drops: Vec::new(),
        };
        change(&rules(&trace.table, cookie, vxlan_ports))?;
        Ok(trace)
    }

    /// The descriptor of the socket, to be polled.
    pub(super) fn descriptor(&self) -> RawFd {
        self.socket.as_raw_fd()
    }

    /// Reads all waiting messages.
    pub(super) fn drain(&mut self, at_us: u64) {
        loop {
            self.buffer.clear();
            match self.socket.recv(&mut self.buffer, libc::MSG_DONTWAIT) {
                Ok(_) => {
                    let buffer = std::mem::take(&mut self.buffer);
                    for message in messages(&buffer).filter(|message| message.kind == TRACE) {
                        self.note(message.payload, at_us);
                    }
                    self.buffer = buffer;
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                // Messages that are lost are about other traces as a rule: this one has few packets.
                Err(error) if error.raw_os_error() == Some(libc::ENOBUFS) => {}
                Err(_) => return,
            }
        }
    }

    fn note(&mut self, payload: &[u8], at_us: u64) {
        let Some(event) = Event::read(payload) else { return };
        // Packets that another trace has marked pass this table too, and the kernel tells of the ends of its chains. Only a rule
        // that matched says that the packet has the cookie.
        if event.is_match && event.table == self.table && self.packets.len() < MOST {
            self.packets.insert(event.id, (event.source, event.is_answer));
        }
        let Some((source, is_answer)) = self.packets.get(&event.id).copied() else { return };
        if event.drops && self.drops.len() < MOST {
            let drop = FilterDrop {
                at_us,
                family: event.family.to_owned(),
                table: event.table.to_owned(),
                chain: event.chain.to_owned(),
                rule: event.handle.map(|handle| format!("rule {handle}")),
                source,
                is_answer,
            };
            self.drops.push((drop, event.handle));
        }
    }

    /// Returns what dropped packets of the trace, with the text of the rules.
    pub(super) fn finish(mut self) -> Vec<FilterDrop> {
        let mut drops = std::mem::take(&mut self.drops);
        for (drop, handle) in &mut drops {
            look_up(drop, *handle);
        }
        drops.into_iter().map(|(drop, _)| drop).collect()
    }
}

impl Drop for RuleTrace {
    fn drop(&mut self) {
        if let Err(error) = change(&deletion(&self.table)) {
            tracing::warn!(%error, table = self.table, "cannot delete the tables of a trace");
        }
    }
}

/// Opens a socket that hears of traced packets.
pub(super) fn open() -> Result<Socket> {
    let open = || -> io::Result<Socket> {
        let mut socket = Socket::new(NETLINK_NETFILTER)?;
        socket.bind(&SocketAddr::new(0, 0))?;
        socket.add_membership(GROUP)?;
        Ok(socket)
    };
    open().map_err(|error| KernelError::io("cannot hear of packets that nftables traces", &error))
}

/// A message about a traced packet.
#[derive(Debug)]
pub(super) struct Event<'a> {
    pub(super) family: &'static str,
    pub(super) table: &'a str,
    pub(super) chain: &'a str,
    pub(super) handle: Option<u64>,
    pub(super) id: u32,
    /// Whether a rule matched. The end of a chain has the same type, and no handle.
    is_match: bool,
    pub(super) drops: bool,
    source: Option<IpAddr>,
    is_answer: bool,
    /// The beginnings of the IP header and of the transport header; empty in most messages about a packet.
    pub(super) headers: [&'a [u8]; 2],
}

impl<'a> Event<'a> {
    pub(super) fn read(payload: &'a [u8]) -> Option<Self> {
        let mut event = Self {
            family: "",
            table: "",
            chain: "",
            handle: None,
            id: 0,
            is_match: false,
            drops: false,
            source: None,
            is_answer: false,
            headers: [&[], &[]],
        };
        let (mut kind, mut verdict, mut policy) = (None, None, None);
        let (mut network, mut transport): (&[u8], &[u8]) = (&[], &[]);
        for (attribute, value) in attributes(payload, 4) {
            match attribute {
                TABLE_NAME => event.table = text(value),
                CHAIN_NAME => event.chain = text(value),
                RULE_HANDLE => event.handle = value.try_into().ok().map(u64::from_be_bytes),
                TYPE => kind = number(value),
                VERDICT => {
                    let mut parts = attributes(value, 0);
                    verdict =
                        parts.find(|(part, _)| *part == VERDICT_CODE).and_then(|(_, code)| number(code));
                }
                ID => event.id = number(value)?,
                NETWORK_HEADER => network = value,
                TRANSPORT_HEADER => transport = value,
                FAMILY => event.family = family(number(value)?),
                POLICY => policy = number(value),
                _ => {}
            }
        }
        event.is_match = kind == Some(BY_RULE) && event.handle.is_some();
        event.drops = match kind {
            Some(BY_RULE) => verdict == Some(DROP),
            Some(BY_POLICY) => policy == Some(DROP),
            _ => false,
        };
        event.headers = [network, transport];
        if let Ok((ip, _)) = LaxIpSlice::from_slice(network) {
            event.source = Some(ip.source_addr());
            event.is_answer = is_answer(ip.payload_ip_number().0, transport);
        }
        Some(event)
    }
}

/// Whether a transport header is that of an answer, or of an ICMP error.
fn is_answer(protocol: u8, header: &[u8]) -> bool {
    const ACK: u8 = 0x10;
    match protocol {
        1 => u8_at(header, 0).is_some_and(|kind| kind != 8),
        6 => u8_at(header, 13).is_some_and(|flags| flags & ACK != 0),
        58 => u8_at(header, 0).is_some_and(|kind| kind != 128),
        _ => false,
    }
}

fn number(value: &[u8]) -> Option<u32> {
    value.try_into().ok().map(u32::from_be_bytes)
}

/// The name of a family of nftables.
fn family(number: u32) -> &'static str {
    match number {
        1 => "inet",
        2 => "ip",
        5 => "netdev",
        7 => "bridge",
        10 => "ip6",
        _ => "",
    }
}

/// Returns the tables that mark the packets of a trace.
fn rules(table: &str, cookie: u32, vxlan_ports: &[u16]) -> String {
    let numbers = [cookie, cookie + 1];
    let mut text = String::new();
    for family in FAMILIES {
        let _ = writeln!(text, "table {family} {table} {{");
        for hook in ["prerouting", "output"] {
            // Before all chains of other programs, and before fragments are put together.
            let _ = writeln!(
                text,
                "\tchain {hook} {{\n\t\ttype filter hook {hook} priority -450; policy accept;"
            );
            let mut mark = |condition: &str, offset: u32| {
                for number in numbers {
                    let bits = offset * 8;
                    let _ = writeln!(text, "\t\t{condition}@th,{bits},32 {number:#x} meta nftrace set 1");
                }
            };
            for at in IN_TRANSPORT {
                mark("", at);
            }
            if family == "inet" {
                for port in vxlan_ports {
                    for header in [IPV4, IPV6] {
                        for at in IN_TRANSPORT {
                            mark(&format!("udp dport {port} "), AROUND + header + at);
                        }
                    }
                }
            }
            let _ = writeln!(text, "\t}}");
        }
        let _ = writeln!(text, "}}");
    }
    text
}

/// Returns the commands that delete the tables of a trace, whether they exist or not.
pub(crate) fn deletion(table: &str) -> String {
    FAMILIES.map(|family| format!("table {family} {table}\ndelete table {family} {table}\n")).concat()
}

/// Deletes what a daemon that was killed has left. It blocks.
///
/// # Errors
///
/// `nft` fails.
pub(super) fn remove_left() -> Result<()> {
    let listed = list(&["list", "tables"])?;
    let left =
        listed.lines().filter_map(|line| line.split(' ').nth(2)).filter(|name| name.starts_with(TABLE));
    let text: String = left.collect::<std::collections::BTreeSet<_>>().into_iter().map(deletion).collect();
    if text.is_empty() { Ok(()) } else { change(&text) }
}

/// Completes what is known of a drop. A message has the family of the packet, and the table may be one of `inet`.
pub(super) fn look_up(drop: &mut FilterDrop, handle: Option<u64>) {
    for family in [drop.family.clone(), "inet".to_owned()] {
        let Ok(chain) = list(&["-a", "-n", "list", "chain", &family, &drop.table, &drop.chain]) else {
            continue;
        };
        let Some(handle) = handle else {
            drop.family = family;
            return;
        };
        if let Some(rule) = rule_text(&chain, handle) {
            (drop.family, drop.rule) = (family, Some(rule));
            return;
        }
    }
}

/// Returns the rule with a handle in a chain, as `nft` prints it.
fn rule_text(chain: &str, handle: u64) -> Option<String> {
    let behind = format!(" # handle {handle}");
    let line = chain.lines().map(str::trim).find_map(|line| line.strip_suffix(&behind))?;
    // The counters of a moment say nothing.
    let mut words = line.split(' ').peekable();
    let mut rule: Vec<&str> = Vec::new();
    while let Some(word) = words.next() {
        rule.push(word);
        if word == "counter" && words.peek() == Some(&"packets") {
            for _ in 0..4 {
                words.next();
            }
        }
    }
    Some(rule.join(" "))
}

fn list(arguments: &[&str]) -> Result<String> {
    filter::run(arguments, "")?.check()
}

pub(crate) fn change(text: &str) -> Result<()> {
    filter::run(&["-f", "-"], text)?.check().map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A message that the kernel sent of a rule that dropped an echo request, up to the headers.
    #[test]
    fn dropping_rule_is_read() {
        let attribute = |kind: u16, value: &[u8]| {
            let mut bytes = (4 + value.len() as u16).to_ne_bytes().to_vec();
            bytes.extend_from_slice(&kind.to_ne_bytes());
            bytes.extend_from_slice(value);
            bytes.resize(bytes.len().next_multiple_of(4), 0);
            bytes
        };
        let mut echo = vec![0x45, 0, 0, 28, 0, 0, 0, 0, 64, 1, 0, 0, 10, 1, 0, 1, 10, 1, 0, 2];
        let mut payload = vec![0; 4];
        for part in [
            attribute(FAMILY, &[0, 0, 0, 2]),
            attribute(TYPE, &[0, 0, 0, 3]),
            attribute(ID, &[0, 0, 0, 9]),
            attribute(CHAIN_NAME, b"input\0"),
            attribute(TABLE_NAME, b"filter\0"),
            attribute(RULE_HANDLE, &[0, 0, 0, 0, 0, 0, 0, 5]),
            attribute(VERDICT, &attribute(VERDICT_CODE, &[0; 4])),
            attribute(NETWORK_HEADER, &echo),
            attribute(TRANSPORT_HEADER, &[8, 0, 0, 0]),
        ] {
            payload.extend(part);
        }
        let event = Event::read(&payload).unwrap();
        assert_eq!((event.family, event.table, event.chain, event.id), ("ip", "filter", "input", 9));
        assert!(event.is_match && event.drops && !event.is_answer && event.handle == Some(5));
        assert_eq!(event.source, Some([10, 1, 0, 1].into()));
        echo[9] = 6;
        assert!(is_answer(6, &[0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0x50, 0x12]));
        for cut in 0..payload.len() {
            Event::read(&payload[..cut]);
        }
        let end = [attribute(TYPE, &[0, 0, 0, 3]), attribute(ID, &[0, 0, 0, 9])].concat();
        assert!(!Event::read(&[&[0; 4], &*end].concat()).unwrap().is_match);
    }

    #[test]
    fn rule_is_found_by_its_handle_and_has_no_counts() {
        let chain = "table inet f {\n\tchain c { # handle 1\n\t\tudp dport 4789 counter packets 3 bytes 99 drop # handle 12\n\
                     \t\tip protocol 1 drop # handle 2\n\t}\n}\n";
        assert_eq!(rule_text(chain, 12).as_deref(), Some("udp dport 4789 counter drop"));
        assert_eq!(rule_text(chain, 2).as_deref(), Some("ip protocol 1 drop"));
        assert_eq!(rule_text(chain, 3), None);
    }

    #[test]
    fn tables_mark_the_cookie_and_what_acknowledges_it() {
        let text = rules("ovl-trace-1", 0x1000, &[4789]);
        assert!(text.contains("\t\t@th,32,32 0x1000 meta nftrace set 1\n"), "{text}");
        assert!(text.contains("\t\t@th,64,32 0x1001 meta nftrace set 1\n"), "{text}");
        assert!(text.contains("\t\tudp dport 4789 @th,464,32 0x1000 meta nftrace set 1\n"), "{text}");
        assert_eq!(text.matches("chain ").count(), 4);
    }
}
