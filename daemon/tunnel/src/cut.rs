//! Cutting: a packet of up to 64 KiB, as TCP hands it to a device with segmentation offload, becomes
//! packets of the size that the path takes.

use std::net::IpAddr;
use std::ops::Range;

use crate::checksum;
use crate::packet::{ETHERNET, Gso, Ip, TCP, UDP, Vnet, pseudo, put, put_vxlan_length, u16_at, u32_at};

/// The largest headers that are cut: VXLAN's, Ethernet, IPv6 with options, TCP with all of its.
const HEADERS: usize = 512;

/// Why a packet is not passed on.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Malformed;

/// A packet in a buffer: `start..end` is what is sealed, with VXLAN's headers if it is a frame.
#[derive(Debug, Clone)]
pub(crate) struct Whole {
    /// Where what is sealed begins.
    pub(crate) start: usize,
    /// Where what the device gave begins: the IP packet, or the frame.
    pub(crate) given: usize,
    pub(crate) end: usize,
    pub(crate) is_frame: bool,
    pub(crate) vnet: Vnet,
}

/// Hands out each part. Their headers are written before their payload, over what came before, so a part
/// must be used before the next one is made; what is after a part must stay.
pub(crate) fn cut(
    buffer: &mut [u8],
    whole: &Whole,
    mut each: impl FnMut(&mut [u8], Range<usize>),
) -> Result<(), Malformed> {
    let Whole { start, given, end, is_frame, vnet } = *whole;
    let transport = given + usize::from(vnet.checksum_start);
    if vnet.gso == Gso::None {
        if vnet.needs_checksum {
            let place = transport + usize::from(vnet.checksum_offset);
            if place + 2 > end {
                return Err(Malformed);
            }
            // The field holds the sum of the pseudo-header.
            let sum = checksum::add(0, buffer.get(transport..end).ok_or(Malformed)?);
            // Zero would say that there is none (RFC 768); for TCP the two are the same.
            let sum = Some(checksum::finish(sum)).filter(|sum| *sum != 0).unwrap_or(0xffff);
            put(buffer, place, &sum.to_be_bytes());
        }
        each(buffer, start..end);
        return Ok(());
    }

    let network = given + if is_frame { ETHERNET } else { 0 };
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
    // Within the headers.
    let (network, transport) = (network - start, transport - start);
    let sum = pseudo(ip.source, ip.destination, protocol);
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
                // FIN and PSH belong to the last, CWR to the first.
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
