//! Files in pcapng format: one interface for each place of each host, names, and what dropped a packet as its comment.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::io::{self, BufWriter, Write};
use std::net::IpAddr;
use std::time::Duration;

use ovl_proto::capture::{LinkType, MAX_SNAPLEN, PointKind};
use pcap_file::pcapng::PcapNgWriter;
use pcap_file::pcapng::blocks::enhanced_packet::{EnhancedPacketBlock, EnhancedPacketOption};
use pcap_file::pcapng::blocks::interface_description::{
    InterfaceDescriptionBlock, InterfaceDescriptionOption,
};
use pcap_file::pcapng::blocks::name_resolution::{Ipv4Record, Ipv6Record, NameResolutionBlock, Record};
use pcap_file::pcapng::blocks::section_header::{SectionHeaderBlock, SectionHeaderOption};
use pcap_file::{DataLink, Endianness, PcapError};

use super::merge::Merged;

/// Nanoseconds, as a power of ten (`if_tsresol`).
const NANOSECONDS: u8 = 9;

/// A file that is being written.
pub(super) struct Writer<W: Write> {
    inner: PcapNgWriter<BufWriter<W>>,
    /// The numbers of interfaces, by host and number of the point.
    interfaces: BTreeMap<(String, u16), u32>,
}

impl<W: Write> Writer<W> {
    /// Begins a file.
    ///
    /// # Errors
    ///
    /// It cannot be written.
    pub(super) fn new(out: W, what: &str) -> io::Result<Self> {
        let application = format!("ovlctl {}", env!("CARGO_PKG_VERSION"));
        let options = vec![
            SectionHeaderOption::UserApplication(Cow::Owned(application)),
            SectionHeaderOption::Comment(Cow::Owned(format!("ovlctl capture of {what}"))),
        ];
        let header =
            SectionHeaderBlock { endianness: Endianness::native(), options, ..SectionHeaderBlock::default() };
        let inner = PcapNgWriter::with_section_header(BufWriter::new(out), header).map_err(error)?;
        Ok(Self { inner, interfaces: BTreeMap::new() })
    }

    /// Writes names of addresses, for the packets that follow.
    ///
    /// # Errors
    ///
    /// It cannot be written.
    pub(super) fn names(&mut self, names: &BTreeMap<IpAddr, String>) -> io::Result<()> {
        if names.is_empty() {
            return Ok(());
        }
        let records = names.iter().map(|(address, name)| {
            let names = vec![Cow::Owned(host_name(name))];
            match address {
                IpAddr::V4(address) => {
                    Record::Ipv4(Ipv4Record { ip_addr: Cow::Owned(address.octets().to_vec()), names })
                }
                IpAddr::V6(address) => {
                    Record::Ipv6(Ipv6Record { ip_addr: Cow::Owned(address.octets().to_vec()), names })
                }
            }
        });
        let block = NameResolutionBlock { records: records.collect(), options: Vec::new() };
        self.inner.write_pcapng_block(block).map(drop).map_err(error)
    }

    /// Writes a packet.
    ///
    /// # Errors
    ///
    /// It cannot be written.
    pub(super) fn packet(&mut self, merged: &Merged) -> io::Result<()> {
        let Merged { host, point, packet, dropped, lost, .. } = merged;
        let place = (host.to_string(), packet.point);
        let next = u32::try_from(self.interfaces.len()).map_err(io::Error::other)?;
        let interface_id = match self.interfaces.get(&place) {
            Some(known) => *known,
            None => {
                let kind = match point.kind {
                    PointKind::Endpoint => "endpoint, from its host",
                    PointKind::Vxlan => "VXLAN device of the network",
                    PointKind::Tunnel => "inside of the tunnel",
                    PointKind::Underlay => "underlay",
                };
                let linktype = match point.link {
                    LinkType::Ethernet => DataLink::ETHERNET,
                    LinkType::Ip => DataLink::RAW,
                };
                let options = vec![
                    InterfaceDescriptionOption::IfName(Cow::Owned(format!("{host}:{}", point.name))),
                    InterfaceDescriptionOption::IfDescription(Cow::Owned(format!(
                        "{}: {kind}",
                        point.device
                    ))),
                    InterfaceDescriptionOption::IfTsResol(NANOSECONDS),
                ];
                let block = InterfaceDescriptionBlock { linktype, snaplen: MAX_SNAPLEN, options };
                self.inner.write_pcapng_block(block).map_err(error)?;
                self.interfaces.insert(place, next);
                next
            }
        };
        // Inbound and outbound are those of the workload or, elsewhere, of the host.
        let mut options = vec![EnhancedPacketOption::Flags(if merged.is_sent() { 2 } else { 1 })];
        options.extend(dropped.clone().map(|reason| EnhancedPacketOption::Comment(Cow::Owned(reason))));
        options.extend((*lost > 0).then_some(EnhancedPacketOption::DropCount(*lost)));
        let block = EnhancedPacketBlock {
            interface_id,
            timestamp: Duration::from_nanos(packet.at_ns),
            original_len: packet.length,
            data: Cow::Borrowed(&packet.bytes),
            options,
        };
        self.inner.write_pcapng_block(block).map(drop).map_err(error)
    }

    /// Writes what is buffered, so that the file is whole.
    ///
    /// # Errors
    ///
    /// It cannot be written.
    pub(super) fn flush(&mut self) -> io::Result<()> {
        self.inner.get_mut().flush()
    }
}

fn error(error: PcapError) -> io::Error {
    match error {
        PcapError::IoError(error) => error,
        other => io::Error::other(other),
    }
}

/// Returns a name as programs that read the file expect it: like one in DNS.
fn host_name(name: &str) -> String {
    let (name, suffix) = match name.strip_prefix("Service ") {
        Some(name) => (name, ".svc"),
        None => (name.strip_prefix("host ").unwrap_or(name), ""),
    };
    match name.split_once('/') {
        Some((namespace, name)) => format!("{name}.{namespace}{suffix}"),
        None => format!("{name}{suffix}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_like_those_in_dns() {
        for (name, expected) in
            [("shop/db", "db.shop"), ("host h1", "h1"), ("Service shop/db", "db.shop.svc"), ("x", "x")]
        {
            assert_eq!(host_name(name), expected);
        }
    }
}
