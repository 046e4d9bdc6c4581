//! Segmentation: divides a packet of up to 64 KiB, as TCP passes it to a device with segmentation offload
//! (TSO, USO), into packets that fit the path's MTU.

use std::net::IpAddr;
use std::ops::Range;

use crate::checksum;
use crate::packet::{
    Gso, Ip, TCP, UDP, VnetHeader, ethernet_header, pseudo_header_sum, put, put_vxlan_length, u16_at, u32_at,
};

/// Room for the headers of a segment, in bytes: VXLAN, Ethernet, IPv6 with extensions, TCP with all options.
const HEADERS: usize = 512;

/// The headers of a packet contradict each other or its length.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Malformed;

/// A packet in a buffer, as a device gave it, that may be too large for the path. `start..end` is to be
/// sealed, including the VXLAN headers of a frame.
#[derive(Debug, Clone)]
pub(crate) struct UncutPacket {
    /// The start of the bytes to seal.
    pub(crate) start: usize,
    /// The start of the IP packet or frame that the device gave.
    pub(crate) given: usize,
    pub(crate) end: usize,
    pub(crate) is_frame: bool,
    pub(crate) vnet: VnetHeader,
}

/// Passes each segment to `each`. The headers of a segment are written in front of its payload, over the
/// payload of the one before, so `each` must use a segment at once. It must not change the bytes after the
/// segment.
///
/// # Errors
///
/// [`Malformed`] if the headers do not match the packet. No segment was passed then.
pub(crate) fn cut(
    buffer: &mut [u8],
    packet: &UncutPacket,
    mut each: impl FnMut(&mut [u8], Range<usize>),
) -> Result<(), Malformed> {
    let UncutPacket { start, given, end, is_frame, vnet } = *packet;
    let transport = given + usize::from(vnet.checksum_start);
    if vnet.gso == Gso::None {
        if vnet.needs_checksum {
            let place = transport + usize::from(vnet.checksum_offset);
            if place + 2 > end {
                return Err(Malformed);
            }
            // The kernel has put the sum of the pseudo-header into the field.
            let sum = checksum::add(0, buffer.get(transport..end).ok_or(Malformed)?);
            // Zero means no checksum in UDP (RFC 768). In TCP zero and 0xffff are equivalent.
            let sum = Some(checksum::finish(sum)).filter(|sum| *sum != 0).unwrap_or(0xffff);
            put(buffer, place, &sum.to_be_bytes());
        }
        each(buffer, start..end);
        return Ok(());
    }

    let frame = buffer.get(given..end).ok_or(Malformed)?;
    let network = given + if is_frame { ethernet_header(frame) } else { 0 };
    let ip = Ip::parse(buffer.get(network..end).ok_or(Malformed)?).ok_or(Malformed)?;
    let protocol = if vnet.gso == Gso::Udp { UDP } else { TCP };
    let header_end = transport
        + match protocol {
            UDP => 8,
            _ => usize::from(buffer.get(transport + 12).ok_or(Malformed)? >> 4) * 4,
        };
    let size = usize::from(vnet.gso_size);
    let payload = end.checked_sub(header_end).ok_or(Malformed)?;
    let least = transport + if protocol == UDP { 8 } else { 20 };
    if !vnet.needs_checksum
        || size == 0
        || header_end < least
        || transport < network + ip.payload
        || header_end - start > HEADERS
    {
        return Err(Malformed);
    }
    let mut template = [0; HEADERS];
    let headers = header_end - start;
    put(&mut template, 0, buffer.get(start..header_end).ok_or(Malformed)?);
    // From here on these are offsets in the template.
    let (network, transport) = (network - start, transport - start);
    let sum = pseudo_header_sum(ip.source, ip.destination, protocol);
    let sequence = u32_at(&template, transport + 4).ok_or(Malformed)?;
    let identification = u16_at(&template, network + 4).ok_or(Malformed)?;
    let parts = payload.div_ceil(size).max(1);
    for part in 0..parts {
        let from = header_end + part * size;
        let to = (from + size).min(end);
        let first = from - headers;
        let header = buffer.get_mut(first..from).ok_or(Malformed)?;
        header.copy_from_slice(&template[..headers]);
        let length = headers + (to - from);
        if is_frame {
            put_vxlan_length(header, length - (given - start));
        }
        match ip.source {
            IpAddr::V4(_) => {
                put(header, network + 2, &((length - network) as u16).to_be_bytes());
                put(header, network + 4, &identification.wrapping_add(part as u16).to_be_bytes());
                put(header, network + 10, &[0, 0]);
                let sum = checksum::add(0, &header[network..network + ip.payload]);
                put(header, network + 10, &checksum::finish(sum).to_be_bytes());
            }
            IpAddr::V6(_) => {
                put(header, network + 4, &((length - network - 40) as u16).to_be_bytes());
            }
        }
        let field = match protocol {
            UDP => {
                put(header, transport + 4, &((length - transport) as u16).to_be_bytes());
                transport + 6
            }
            _ => {
                put(header, transport + 4, &sequence.wrapping_add((part * size) as u32).to_be_bytes());
                let flags = &mut header[transport + 13];
                // FIN and PSH belong to the last segment, CWR to the first.
                if part + 1 < parts {
                    *flags &= !0x09;
                }
                if part > 0 {
                    *flags &= !0x80;
                }
                transport + 16
            }
        };
        put(header, field, &[0, 0]);
        let sum = checksum::add(sum + (length - transport) as u64, &buffer[first + transport..to]);
        let sum = Some(checksum::finish(sum)).filter(|sum| *sum != 0 || protocol == TCP).unwrap_or(0xffff);
        put(buffer, first + field, &sum.to_be_bytes());
        each(buffer, first..to);
    }
    Ok(())
}
