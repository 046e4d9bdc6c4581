//! Asks a link whether another machine has an address of this host: by an ARP probe (RFC 5227, section 2.1.1), or a neighbour
//! solicitation as for duplicate address detection (RFC 4862, section 5.4.2).
//!
//! Neither changes what a neighbour remembers, because neither names a sender. The function blocks.

use std::collections::BTreeSet;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::fd::{AsFd, AsRawFd};
use std::time::{Duration, Instant};

use etherparse::PacketBuilder;
use nix::libc;
use nix::sys::socket::{AddressFamily, LinkAddr, SockFlag, SockType, recvfrom, socket};
use ovl_proto::id::Mac;

use super::announce::arp_request;
use super::error::{KernelError, Result};
use super::sys;

/// How often it is asked, and for how long an answer is waited for each time.
const TRIES: u32 = 2;
const WAIT: Duration = Duration::from_millis(250);

const ARP: u16 = libc::ETH_P_ARP as u16;
const IPV6: u16 = libc::ETH_P_IPV6 as u16;
const NEIGHBOUR_SOLICITATION: u8 = 135;
const NEIGHBOUR_ADVERTISEMENT: u8 = 136;

/// Returns the MAC address of another machine that answers for an address of this host on the link of the device with this
/// index. `own` are the MAC addresses of all devices of this host, which may be on the same link. `None` if none answers
/// within half a second.
///
/// # Errors
///
/// A packet socket cannot be opened, or does not send.
pub fn other_owner(index: u32, mac: Mac, own: &BTreeSet<Mac>, address: IpAddr) -> Result<Option<Mac>> {
    let failed = |error: io::Error| KernelError::io("cannot look for duplicate addresses", &error);
    let protocol = if address.is_ipv4() { ARP } else { IPV6 };
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let socket =
        socket(AddressFamily::Packet, SockType::Raw, flags, None).map_err(|error| failed(error.into()))?;
    sys::bind_packet(socket.as_fd(), index, protocol).map_err(failed)?;
    let Some(frame) = frame(address, mac) else { return Ok(None) };
    let mut buffer = [0; 256];
    for _ in 0..TRIES {
        sys::send_frame(socket.as_fd(), index, protocol, &frame).map_err(failed)?;
        let end = Instant::now() + WAIT;
        while let Some(left) = end.checked_duration_since(Instant::now()) {
            let [ready] = sys::poll([Some(socket.as_raw_fd())], Some(left)).map_err(failed)?;
            if !ready {
                break;
            }
            let Ok((length, _)) = recvfrom::<LinkAddr>(socket.as_raw_fd(), &mut buffer) else { continue };
            let received = buffer.get(..length).unwrap_or_default();
            if let Some(other) = answer(received, address).filter(|other| !own.contains(other)) {
                return Ok(Some(other));
            }
        }
    }
    Ok(None)
}

fn frame(address: IpAddr, mac: Mac) -> Option<Vec<u8>> {
    match address {
        IpAddr::V4(address) => Some(arp_request(mac, Ipv4Addr::UNSPECIFIED, address)),
        IpAddr::V6(address) => {
            let [.., a, b, c] = address.octets();
            // The solicited-node multicast address (RFC 4291, section 2.7.1), and its MAC address (RFC 2464).
            let group = [0xff, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0xff, a, b, c];
            let builder = PacketBuilder::ethernet2(mac.0, [0x33, 0x33, 0xff, a, b, c])
                .ipv6(Ipv6Addr::UNSPECIFIED.octets(), group, 255)
                .icmpv6_raw(NEIGHBOUR_SOLICITATION, 0, [0; 4]);
            let payload = address.octets();
            let mut frame = Vec::with_capacity(builder.size(payload.len()));
            builder.write(&mut frame, &payload).ok()?;
            Some(frame)
        }
    }
}

/// Returns the MAC address that a received frame claims for an address. `None` if it claims none: a probe does not.
fn answer(frame: &[u8], address: IpAddr) -> Option<Mac> {
    let source = Mac(*frame.get(6..)?.first_chunk()?);
    let kind = u16::from_be_bytes(*frame.get(12..)?.first_chunk()?);
    let body = frame.get(14..)?;
    match address {
        // The sender's address of a request or an answer.
        IpAddr::V4(address) => {
            let claims = kind == ARP && body.get(14..18)? == address.octets();
            claims.then_some(Mac(*body.get(8..)?.first_chunk()?))
        }
        // The target of an advertisement, directly behind the header of IPv6.
        IpAddr::V6(address) => {
            const ICMPV6: u8 = 58;
            let is_advertisement = kind == IPV6
                && *body.get(6)? == ICMPV6
                && *body.get(40)? == NEIGHBOUR_ADVERTISEMENT
                && body.get(48..64)? == address.octets();
            is_advertisement.then_some(source)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const OWN: Mac = Mac([2, 0, 0, 0, 0, 1]);
    const OTHER: Mac = Mac([2, 0, 0, 0, 0, 2]);

    #[test]
    fn probe_claims_no_address() {
        for address in ["192.0.2.1", "fd00::1"] {
            let address: IpAddr = address.parse().unwrap();
            let probe = frame(address, OWN).unwrap();
            assert_eq!(answer(&probe, address), None, "{address}");
        }
    }

    #[test]
    fn answers_claim_the_address_of_their_sender() {
        let address: IpAddr = "192.0.2.1".parse().unwrap();
        let mut arp = frame(address, OTHER).unwrap();
        arp[21] = 2;
        arp[28..32].copy_from_slice(&[192, 0, 2, 1]);
        assert_eq!(answer(&arp, address), Some(OTHER));
        assert_eq!(answer(&arp, "192.0.2.2".parse().unwrap()), None);
        let address: IpAddr = "fd00::1".parse().unwrap();
        let mut advertisement = frame(address, OTHER).unwrap();
        advertisement[54] = NEIGHBOUR_ADVERTISEMENT;
        assert_eq!(answer(&advertisement, address), Some(OTHER));
        assert_eq!(answer(&advertisement, "fd00::2".parse().unwrap()), None);
        for length in 0..advertisement.len() {
            let _ =
                (answer(&advertisement[..length], address), answer(&arp[..length.min(arp.len())], address));
        }
    }
}
