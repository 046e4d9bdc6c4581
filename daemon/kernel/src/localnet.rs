//! 127.0.0.1 for published ports: `route_localnet` of a device, and the filter that comes with it.
//!
//! With `route_localnet` a device accepts packets to 127.0.0.0/8, so that whoever is behind it could reach what listens
//! on the host's 127.0.0.1. Such packets are dropped at the device's ingress by a traffic-control filter. Rules of
//! nftables could do the same, but `nft flush ruleset` of anybody would open the host while it takes ovld to restore
//! them, or for good if ovld is not running.
//!
//! The module owns no state. Begin to read at [`allow`].

use std::io;
use std::path::Path;

use netlink_packet_core::{NLM_F_CREATE, NLM_F_EXCL};
use nix::libc::{self, ENODEV, ENOENT};
use nix::net::if_::if_nametoindex;
use ovl_dataplane::device::Device;
use ovl_dataplane::op::ANSWERS_LOCALHOST;
use ovl_dataplane::resolver::LOOPBACK;

use super::attribute::{Attributes, attributes, text, u32_at};
use super::error::{KernelError, Result};
use super::message::{TRAFFIC_CONTROL, traffic_control};
use super::socket::{Batch, Refusal, Route};

/// The parent of a `clsact` queueing discipline, and of the filters at the ingress of its device (`linux/pkt_sched.h`).
pub(super) const CLSACT: u32 = 0xffff_fff1;
pub(super) const INGRESS: u32 = 0xffff_fff2;
pub(super) const CLSACT_HANDLE: u32 = 0xffff_0000;
/// The place of ovl's filter: before those of other programs.
const PRIORITY: u32 = 1;
const HANDLE: u32 = 1;
/// `tcm_info`: the priority, and the protocol in network order. All protocols, since a frame with a VLAN tag is not one
/// of IPv4 to a filter; the program looks behind the tag.
const INFO: u32 = PRIORITY << 16 | (libc::ETH_P_ALL as u16).to_be() as u32;

/// Attributes of a filter of the kind `bpf` (`linux/pkt_cls.h`); `libc` does not define them.
const TCA_BPF_OPS_LEN: u16 = 4;
const TCA_BPF_OPS: u16 = 5;
pub(super) const TCA_BPF_FLAGS: u16 = 8;
/// The value that the program returns is the verdict.
pub(super) const TCA_BPF_FLAG_ACT_DIRECT: u32 = 1;

/// The filter in classic BPF, with the fields of `struct sock_filter`: drops IPv4 packets to 127.0.0.0/8, and passes all
/// others on to the next filter, as well as packets with the mark [`ANSWERS_LOCALHOST`] and queries to the resolver, whose
/// address is rewritten later.
const PROGRAM: [(u16, u8, u8, u32); 10] = {
    const LOAD_HALF: u16 = 0x28;
    const LOAD_WORD: u16 = 0x20;
    const AND: u16 = 0x54;
    const JUMP_EQUAL: u16 = 0x15;
    const JUMP_SET: u16 = 0x45;
    const RETURN: u16 = 0x06;
    /// The protocol of the packet behind its VLAN tag: SKF_AD_OFF + SKF_AD_PROTOCOL (`linux/filter.h`).
    const PROTOCOL: u32 = 0xffff_f000;
    const IPV4: u32 = 0x0800;
    /// SKF_AD_OFF + SKF_AD_MARK.
    const MARK: u32 = 0xffff_f014;
    /// The offset of the destination address, behind the Ethernet header.
    const DESTINATION: u32 = 14 + 16;
    const TC_ACT_SHOT: u32 = 2;
    const TC_ACT_UNSPEC: u32 = u32::MAX;
    [
        (LOAD_HALF, 0, 0, PROTOCOL),
        (JUMP_EQUAL, 0, 7, IPV4),
        (LOAD_WORD, 0, 0, MARK),
        (JUMP_SET, 5, 0, ANSWERS_LOCALHOST),
        (LOAD_WORD, 0, 0, DESTINATION),
        (JUMP_EQUAL, 3, 0, LOOPBACK.to_bits()),
        (AND, 0, 0, 0xff00_0000),
        (JUMP_EQUAL, 0, 1, 0x7f00_0000),
        (RETURN, 0, 0, TC_ACT_SHOT),
        (RETURN, 0, 0, TC_ACT_UNSPEC),
    ]
};

/// Lets packets from 127.0.0.1 leave by a device, after packets to 127.0.0.0/8 were kept from entering by it.
///
/// # Errors
///
/// The kernel cannot filter at the ingress of devices. Then the setting stays off.
pub(super) fn allow(route: &mut Route, device: Device) -> Result<()> {
    let index = if_nametoindex(device.as_str()).map_err(|_| KernelError::NoDevice(device))?;
    let mut batch = Batch::default();
    let mut discipline = Attributes::after(&traffic_control(index, CLSACT_HANDLE, CLSACT, 0));
    discipline.put_text(libc::TCA_KIND, "clsact");
    batch.push_built(libc::RTM_NEWQDISC, NLM_F_CREATE | NLM_F_EXCL, discipline.bytes());
    let mut filter = Attributes::after(&traffic_control(index, HANDLE, INGRESS, INFO));
    filter.put_text(libc::TCA_KIND, "bpf");
    filter.nest(libc::TCA_OPTIONS, |options| {
        options.put(TCA_BPF_OPS_LEN, &(PROGRAM.len() as u16).to_ne_bytes());
        options.put(TCA_BPF_OPS, &program());
        options.put(TCA_BPF_FLAGS, &TCA_BPF_FLAG_ACT_DIRECT.to_ne_bytes());
    });
    // Without NLM_F_EXCL, a filter that is there is replaced.
    batch.push_built(libc::RTM_NEWTFILTER, NLM_F_CREATE, filter.bytes());
    let (results, _) = route.execute(batch)?;
    // The filter tells all that matters: a discipline that is there already may be of the kind `ingress`.
    match results.into_iter().next_back() {
        Some(Err(refusal)) => Err(explained(refusal, device)),
        Some(Ok(())) | None => set(device, true),
    }
}

fn explained(refusal: Refusal, device: Device) -> KernelError {
    let missing = |feature, module| KernelError::MissingFeature { feature, module };
    match refusal.errno {
        ENODEV => KernelError::NoDevice(device),
        ENOENT => missing("classifier in BPF, so 127.0.0.1 does not work for published ports", "cls_bpf"),
        libc::EOPNOTSUPP | libc::EINVAL => {
            missing("filter at the ingress, so 127.0.0.1 does not work for published ports", "sch_ingress")
        }
        _ => refusal.into_error(format!("cannot filter what enters by {device}")),
    }
}

/// Keeps packets from 127.0.0.1 from leaving by a device. If the device does not exist, this does nothing.
pub(super) fn forbid(route: &mut Route, device: Device) -> Result<()> {
    set(device, false)?;
    let Ok(index) = if_nametoindex(device.as_str()) else { return Ok(()) };
    let mut filter = Attributes::after(&traffic_control(index, HANDLE, INGRESS, INFO));
    filter.put_text(libc::TCA_KIND, "bpf");
    let mut batch = Batch::default();
    batch.push_built(libc::RTM_DELTFILTER, 0, filter.bytes());
    let (results, _) = route.execute(batch)?;
    match results.into_iter().next_back() {
        Some(Err(refusal)) if !matches!(refusal.errno, ENOENT | ENODEV | libc::EINVAL) => {
            Err(refusal.into_error(format!("cannot delete the filter of what enters by {device}")))
        }
        Some(_) | None => Ok(()),
    }
}

/// Whether ovl's filter is at the ingress of a device.
pub(super) fn is_filtered(route: &mut Route, index: u32) -> Result<bool> {
    let mut batch = Batch::default();
    batch.push_built(libc::RTM_GETTFILTER, 0, &traffic_control(index, 0, INGRESS, 0));
    let Ok(dump) = route.dump_built(batch)? else { return Ok(false) };
    let is_ours = |payload: &[u8]| {
        let has = |at, value| u32_at(payload, at) == Some(value);
        has(8, HANDLE)
            && has(16, INFO)
            && attributes(payload, TRAFFIC_CONTROL)
                .any(|(kind, value)| kind == libc::TCA_KIND && text(value) == "bpf")
            && attributes(payload, TRAFFIC_CONTROL)
                .filter(|(kind, _)| *kind == libc::TCA_OPTIONS)
                .flat_map(|(_, options)| attributes(options, 0))
                .any(|(kind, value)| kind == TCA_BPF_OPS && value == program())
    };
    Ok(dump.messages().any(|message| message.kind == libc::RTM_NEWTFILTER && is_ours(message.payload)))
}

fn program() -> Vec<u8> {
    let instruction = |(code, yes, no, k): (u16, u8, u8, u32)| {
        code.to_ne_bytes().into_iter().chain([yes, no]).chain(k.to_ne_bytes())
    };
    PROGRAM.into_iter().flat_map(instruction).collect()
}

/// Writes the setting. To turn it off on a device that does not exist is no error.
fn set(device: Device, on: bool) -> Result<()> {
    let path = Path::new("/proc/sys/net/ipv4/conf").join(device.as_str()).join("route_localnet");
    match std::fs::write(path, if on { "1" } else { "0" }) {
        Err(error) if on || error.kind() != io::ErrorKind::NotFound => {
            Err(KernelError::io(format!("cannot set route_localnet of {device}"), &error))
        }
        Ok(()) | Err(_) => Ok(()),
    }
}
