//! IPsec policies of the host (ip-xfrm(8)): packets that bypass the IP stack bypass them, too.

use netlink_sys::{Socket, SocketAddr};

use super::attribute::{attributes, u16_at, u32_at};

/// The netlink protocol of IPsec (`NETLINK_XFRM`).
const NETLINK_XFRM: isize = 6;
// Of `linux/xfrm.h`, which `libc` does not define.
const XFRM_MSG_NEWSPDINFO: u16 = 0x24;
const XFRM_MSG_GETSPDINFO: u16 = 0x25;
/// The numbers of policies: in, out, forwarded, and those of sockets.
const XFRMA_SPD_INFO: u16 = 1;
/// The length of a netlink header.
const HEADER: usize = 16;

/// Whether there are IPsec policies in the network namespace of the calling thread. A kernel without IPsec has none.
pub(super) fn has_ipsec_policies() -> bool {
    counted().is_some_and(|count| count > 0)
}

fn counted() -> Option<u32> {
    let socket = Socket::new(NETLINK_XFRM).ok()?;
    socket.connect(&SocketAddr::new(0, 0)).ok()?;
    let length = u32::try_from(HEADER + 4).ok()?;
    let request = [
        length.to_ne_bytes().as_slice(),
        &XFRM_MSG_GETSPDINFO.to_ne_bytes(),
        &u16::try_from(nix::libc::NLM_F_REQUEST).ok()?.to_ne_bytes(),
        &1_u32.to_ne_bytes(),
        &[0; 8],
    ]
    .concat();
    socket.send(&request, 0).ok()?;
    let (answer, _) = socket.recv_from_full().ok()?;
    if u16_at(&answer, 4)? != XFRM_MSG_NEWSPDINFO {
        return None;
    }
    let payload = answer.get(HEADER..)?;
    let (_, counts) = attributes(payload, 4).find(|(kind, _)| *kind == XFRMA_SPD_INFO)?;
    // Policies of sockets are for packets of processes of the host.
    Some((0..3).filter_map(|n| u32_at(counts, n * 4)).sum())
}
