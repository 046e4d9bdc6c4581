//! Which packets of a capture packet filters drop, and by which rule: nftables traces a bounded number of packets a second,
//! as for a probe.
//!
//! A packet of an established connection is not traced, because it is hardly ever dropped and there are many.

use std::collections::{BTreeMap, VecDeque};
use std::fmt::Write as _;
use std::io;
use std::net::IpAddr;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::atomic::{AtomicU32, Ordering};

use ipnet::IpNet;
use netlink_sys::Socket;
use nix::libc;
use ovl_dataplane::passage::FilterDrop;
use ovl_proto::capture::PacketKey;

use crate::attribute::messages;
use crate::error::Result;

use super::packet::IPV6;
use super::rules::{self, Event, FAMILIES, TABLE, TRACE};

/// The number of packets that are traced in each hook, a second and at once.
const RATE: u32 = 50;
const BURST: u32 = 100;
/// The maximum number of packets whose headers are remembered.
const MOST: usize = 1024;
/// The maximum number of rules whose text is remembered.
const MOST_RULES: usize = 64;
/// The maximum number of messages that are read at once.
const AT_ONCE: usize = 4096;

/// The number of the next table of this process. Traces of probes have random numbers, which are even.
static NEXT: AtomicU32 = AtomicU32::new(1);

/// Tables that mark packets, and the socket that hears of them. The tables are deleted when it is dropped.
#[derive(Debug)]
pub(super) struct DropTrace {
    table: String,
    socket: Socket,
    buffer: Vec<u8>,
    headers: BTreeMap<u32, Headers>,
    /// The ids in `headers`, oldest first.
    order: VecDeque<u32>,
    rules: BTreeMap<(String, String, u64), FilterDrop>,
}

/// What is remembered of a packet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Headers {
    pub(super) key: PacketKey,
    /// Its destination and its port; 0 for a protocol without ports.
    pub(super) to: (IpAddr, u16),
}

impl Headers {
    /// Reads the beginning of a packet, from its IP header on.
    pub(super) fn of_packet(packet: &[u8]) -> Option<Self> {
        let length = match packet.first()? >> 4 {
            4 => usize::from(packet.first()? & 0xf) * 4,
            _ => IPV6 as usize,
        };
        let (network, transport) = packet.split_at_checked(length)?;
        Self::read(network, transport)
    }

    /// Reads the beginnings of an IP header and of a transport header.
    pub(super) fn read(network: &[u8], transport: &[u8]) -> Option<Self> {
        let short = |bytes: &[u8], at: usize| match bytes.get(at..at + 2) {
            Some(&[high, low]) => u16::from_be_bytes([high, low]),
            _ => 0,
        };
        let v4 = |at: usize| Some(IpAddr::from(<[u8; 4]>::try_from(network.get(at..at + 4)?).ok()?));
        let v6 = |at: usize| Some(IpAddr::from(<[u8; 16]>::try_from(network.get(at..at + 16)?).ok()?));
        let (source, to, protocol, id) = match network.first()? >> 4 {
            4 => (v4(12)?, v4(16)?, *network.get(9)?, short(network, 4)),
            6 => (v6(8)?, v6(24)?, *network.get(6)?, 0),
            _ => return None,
        };
        let port = if matches!(protocol, 6 | 17 | 132) { short(transport, 2) } else { 0 };
        Some(Self { key: PacketKey::new(source, protocol, id, transport), to: (to, port) })
    }
}

impl DropTrace {
    /// Traces packets from or to prefixes from now on. It blocks.
    ///
    /// # Errors
    ///
    /// `nft` fails, or there is no socket.
    pub(super) fn begin(watched: &[IpNet]) -> Result<Self> {
        let socket = rules::open()?;
        let table = format!("{TABLE}capture-{:08x}", NEXT.fetch_add(2, Ordering::Relaxed));
        let trace = Self {
            table,
            socket,
            buffer: Vec::with_capacity(64 * 1024),
            headers: BTreeMap::new(),
            order: VecDeque::new(),
            rules: BTreeMap::new(),
        };
        rules::change(&tables(&trace.table, watched))?;
        Ok(trace)
    }

    /// The descriptor of the socket, to be polled.
    pub(super) fn descriptor(&self) -> RawFd {
        self.socket.as_raw_fd()
    }

    /// Reads waiting messages, and returns the packets that were dropped, and by what. It runs `nft` for each new rule.
    pub(super) fn drain(&mut self) -> Vec<(Headers, FilterDrop)> {
        let mut drops = Vec::new();
        for _ in 0..AT_ONCE {
            self.buffer.clear();
            match self.socket.recv(&mut self.buffer, libc::MSG_DONTWAIT) {
                Ok(_) => {
                    let buffer = std::mem::take(&mut self.buffer);
                    let all = messages(&buffer).filter(|message| message.kind == TRACE);
                    drops.extend(all.filter_map(|message| self.note(message.payload)));
                    self.buffer = buffer;
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.raw_os_error() == Some(libc::ENOBUFS) => {}
                Err(_) => break,
            }
        }
        drops
    }

    fn note(&mut self, payload: &[u8]) -> Option<(Headers, FilterDrop)> {
        let event = Event::read(payload)?;
        let [network, transport] = event.headers;
        if let Some(headers) = Headers::read(network, transport)
            && self.headers.insert(event.id, headers).is_none()
        {
            self.order.push_back(event.id);
            if self.order.len() > MOST
                && let Some(oldest) = self.order.pop_front()
            {
                self.headers.remove(&oldest);
            }
        }
        if !event.drops {
            return None;
        }
        let headers = *self.headers.get(&event.id)?;
        let (table, chain, handle) = (event.table.to_owned(), event.chain.to_owned(), event.handle);
        let rule = (table.clone(), chain.clone(), handle.unwrap_or_default());
        let by = match self.rules.get(&rule) {
            Some(known) => known.clone(),
            None => {
                let mut found = FilterDrop {
                    at_us: 0,
                    family: event.family.to_owned(),
                    table,
                    chain,
                    rule: handle.map(|handle| format!("rule {handle}")),
                    source: None,
                    is_answer: false,
                };
                rules::look_up(&mut found, handle);
                if self.rules.len() < MOST_RULES {
                    self.rules.insert(rule, found.clone());
                }
                found
            }
        };
        Some((headers, by))
    }
}

impl Drop for DropTrace {
    fn drop(&mut self) {
        if let Err(error) = rules::change(&rules::deletion(&self.table)) {
            tracing::warn!(%error, table = self.table, "cannot delete the tables of a capture");
        }
    }
}

/// Returns the tables that mark packets from or to prefixes.
fn tables(table: &str, watched: &[IpNet]) -> String {
    let mut text = String::new();
    // nft refuses sets whose prefixes overlap.
    let watched = IpNet::aggregate(&watched.to_vec());
    for family in FAMILIES {
        let _ = writeln!(text, "table {family} {table} {{");
        // Behind connection tracking, which the bridge does not have.
        let state = if family == "inet" { "ct state new,invalid,untracked " } else { "" };
        let hooks: &[_] = if family == "inet" { &["prerouting", "output"] } else { &["prerouting"] };
        for hook in hooks {
            let _ = writeln!(
                text,
                "\tchain {hook} {{\n\t\ttype filter hook {hook} priority -190; policy accept;"
            );
            for (is_v4, ip) in [(true, "ip"), (false, "ip6")] {
                let prefixes: Vec<String> = watched
                    .iter()
                    .filter(|net| net.addr().is_ipv4() == is_v4 && net.prefix_len() > 0)
                    .map(|net| match net.prefix_len() == net.max_prefix_len() {
                        true => net.addr().to_string(),
                        false => net.trunc().to_string(),
                    })
                    .collect();
                if prefixes.is_empty() {
                    continue;
                }
                let set = prefixes.join(", ");
                for end in ["saddr", "daddr"] {
                    let _ = writeln!(
                        text,
                        "\t\t{state}{ip} {end} {{ {set} }} limit rate {RATE}/second burst {BURST} packets meta nftrace set 1"
                    );
                }
            }
            let _ = writeln!(text, "\t}}");
        }
        let _ = writeln!(text, "}}");
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn headers_are_read_as_those_of_a_captured_packet() {
        let mut packet = Vec::new();
        let builder = etherparse::PacketBuilder::ipv4([10, 1, 0, 1], [10, 1, 0, 2], 64);
        builder.tcp(1000, 80, 7, 1024).syn().write(&mut packet, &[]).unwrap();
        let headers = Headers::read(&packet[..20], &packet[20..40]).unwrap();
        assert_eq!(headers.to, ([10, 1, 0, 2].into(), 80));
        assert_eq!((headers.key.port, headers.key.sequence, headers.key.protocol), (1000, 7, 6));
        assert_eq!(Headers::of_packet(&packet), Some(headers));
        assert!(Headers::of_packet(&packet[..12]).is_none() && Headers::of_packet(&[0x4f; 32]).is_none());
        let mut packet = Vec::new();
        let builder = etherparse::PacketBuilder::ipv6([1; 16], [2; 16], 64);
        builder.udp(1000, 53).write(&mut packet, &[]).unwrap();
        assert_eq!(Headers::of_packet(&packet), Headers::read(&packet[..40], &packet[40..]));
        assert!(Headers::read(&packet[..12], &[]).is_none());
        assert!(Headers::read(&[], &[]).is_none());
    }

    #[test]
    fn tables_name_prefixes_by_family() {
        let text = tables("t", &["10.1.0.0/16".parse().unwrap(), "fd00::1/128".parse().unwrap()]);
        assert!(text.contains("ct state new,invalid,untracked ip saddr { 10.1.0.0/16 } limit"), "{text}");
        assert!(text.contains("ip6 daddr { fd00::1 } limit"), "{text}");
        assert_eq!(text.matches("nftrace").count(), 12, "{text}");
    }
}
