//! Applies operations on links, addresses, forwarding entries, neighbours and routes.

use std::collections::HashMap;
use std::net::IpAddr;

use netlink_packet_core::{NLM_F_CREATE, NLM_F_EXCL, NLM_F_REPLACE};
use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::link::LinkAttribute;
use nix::libc::{EACCES, EADDRINUSE, EADDRNOTAVAIL, EEXIST, EINVAL, ENODEV, ENOENT, EOPNOTSUPP, ESRCH};
use nix::net::if_::if_nametoindex;
use ovl_dataplane::device::{Device, Role};
use ovl_dataplane::op::{AddressOp, FdbOp, LinkOp, NeighbourOp, Op, RouteOp};
use ovl_dataplane::state::{Link, METRIC, TunnelKind};
use ovl_proto::id::Mac;

use super::dump;
use super::error::{KernelError, Result};
use super::link::{DOOMED, LinkView};
use super::message::{self, Target};
use super::socket::{Batch, Refusal, Route};
use super::sysctl;
use super::tunnel::Tunnels;

/// The indexes of an existing device of ovl and of its peer interface.
#[derive(Debug, Clone, Copy)]
pub(super) struct Located {
    pub(super) index: u32,
    pub(super) peer: Option<u32>,
    pub(super) peer_netns: Option<i32>,
}

/// Devices per lookup batch: the replies, some KiB each, wait in the receive buffer of the socket.
pub(super) const QUESTIONS: usize = 128;

/// The devices that were looked up for one request to the worker. Each request looks them up again, so that
/// no entry is written to a device that has reused an index, or that ovl does not own.
#[derive(Debug, Default)]
pub(super) struct Devices(HashMap<Device, Result<Located>>);

impl Devices {
    /// Looks up the devices that were not looked up yet, in batches.
    pub(super) fn find(&mut self, route: &mut Route, devices: impl Iterator<Item = Device>) -> Result<()> {
        let mut wanted: Vec<Device> = devices.filter(|device| !self.0.contains_key(device)).collect();
        wanted.sort();
        wanted.dedup();
        wanted.chunks(QUESTIONS).try_for_each(|some| self.ask(route, some))
    }

    fn ask(&mut self, route: &mut Route, wanted: &[Device]) -> Result<()> {
        let mut batch = Batch::default();
        for device in wanted {
            batch.push(message::get_link(*device), 0);
        }
        let (results, answers) = route.execute(batch)?;
        for (device, result) in wanted.iter().zip(results) {
            let result = match result {
                Ok(()) => Err(KernelError::NoDevice(*device)),
                Err(refusal) if refusal.errno == ENODEV => Err(KernelError::NoDevice(*device)),
                Err(refusal) => Err(refusal.into_error(format!("cannot look up {device}"))),
            };
            self.0.insert(*device, result);
        }
        for answer in answers {
            let Some((device, view)) = wanted.get(answer.request).zip(LinkView::parse(&answer.payload))
            else {
                continue;
            };
            let found = if view.ours() == Some(*device) {
                Ok(Located { index: view.index, peer: view.peer, peer_netns: view.peer_netns })
            } else if view.is_doomed() {
                Err(KernelError::NoDevice(*device))
            } else {
                Err(KernelError::Foreign(*device))
            };
            self.0.insert(*device, found);
        }
        Ok(())
    }

    /// The indexes of a device.
    ///
    /// # Errors
    ///
    /// [`KernelError::NoDevice`], or [`KernelError::Foreign`] if ovl does not own it.
    pub(super) fn get(&mut self, route: &mut Route, device: Device) -> Result<Located> {
        self.find(route, std::iter::once(device))?;
        self.0.get(&device).cloned().unwrap_or(Err(KernelError::NoDevice(device)))
    }

    /// Stores the indexes of a device that was just created.
    pub(super) fn add(&mut self, device: Device, located: Located) {
        self.0.insert(device, Ok(located));
    }

    /// Forgets the lookup of a device that is being created or deleted.
    pub(super) fn forget(&mut self, device: Device) {
        self.0.remove(&device);
    }
}

/// Applies operations on entries of devices in one batch. Returns the result of each.
pub(super) fn entries(route: &mut Route, devices: &mut Devices, ops: &[Op]) -> Result<Vec<Result<()>>> {
    devices.find(route, ops.iter().filter_map(Op::device))?;
    let mut batch = Batch::default();
    let mut asked = Vec::new();
    // `None` for operations in the batch, whose results come from the kernel.
    let mut results: Vec<Option<Result<()>>> = Vec::with_capacity(ops.len());
    for op in ops {
        let located = op.device().map(|device| devices.get(route, device));
        results.push(match located {
            Some(Ok(located)) => {
                if let Some((message, flags)) = message::entry(op, located.index) {
                    batch.push(message, flags);
                    asked.push((op, located.index));
                }
                None
            }
            Some(Err(KernelError::NoDevice(_))) if op.is_entry_deletion() => Some(Ok(())),
            Some(Err(error)) => Some(Err(error)),
            // A route without a device.
            None => {
                if let Some((message, flags)) = message::entry(op, 0) {
                    batch.push(message, flags);
                    asked.push((op, 0));
                }
                None
            }
        });
    }
    let (mut sent, _) = route.execute(batch)?;
    change_routes(route, &asked, &mut sent)?;
    let mut sent = sent.into_iter();
    Ok(ops
        .iter()
        .zip(results)
        .map(|(op, result)| {
            result.unwrap_or_else(|| ignore_if_done(route, op, sent.next().unwrap_or(Ok(()))))
        })
        .collect())
}

/// Retries refused routes whose destination has a route of ovl, and replaces that route. Routes of other programs are
/// kept.
fn change_routes(
    route: &mut Route,
    asked: &[(&Op, u32)],
    results: &mut [std::result::Result<(), Refusal>],
) -> Result<()> {
    let mut again = Vec::new();
    for ((op, index), result) in asked.iter().zip(results.iter_mut()) {
        if let (Op::Route(RouteOp::Set(to, _)), Err(Refusal { errno: EEXIST | EINVAL, .. })) = (op, &*result)
        {
            again.push((*op, *to, *index, result));
        }
    }
    if again.is_empty() {
        return Ok(());
    }
    let ours = dump::routes(route, &HashMap::new())?;
    again.retain(|(_, to, _, _)| ours.contains_key(to));
    let mut batch = Batch::default();
    for (op, to, index, result) in &again {
        // The next hop is inside its own destination: the old route there must be deleted first.
        let blocked = matches!(result, Err(Refusal { errno: EINVAL, .. }));
        if let Some((message, flags)) =
            message::entry(&Op::Route(RouteOp::Delete(*to)), *index).filter(|_| blocked)
        {
            batch.push(message, flags);
        }
        if let Some((message, _)) = message::entry(op, *index) {
            batch.push(message, NLM_F_CREATE | NLM_F_REPLACE);
        }
    }
    let (sent, _) = route.execute(batch)?;
    let mut sent = sent.into_iter();
    for (_, _, _, result) in again {
        if matches!(result, Err(Refusal { errno: EINVAL, .. })) {
            sent.next();
        }
        *result = sent.next().unwrap_or(Ok(()));
    }
    Ok(())
}

/// Adds an announced address to a device of the host, or deletes it. An address that ovl did not add is kept.
pub(super) fn announced(
    route: &mut Route,
    op: &Op,
    device: Device,
    address: IpAddr,
    add: bool,
) -> Result<()> {
    let Ok(index) = if_nametoindex(device.as_str()) else {
        return if add { Err(KernelError::NoDevice(device)) } else { Ok(()) };
    };
    let ours =
        |route: &mut Route| -> Result<bool> { Ok(dump::announced(route)?.contains(&(index, address))) };
    let message = message::announced(index, address);
    if !add {
        // The kernel ignores the protocol of a deletion, and would delete an address of another program.
        if !ours(route)? {
            return Ok(());
        }
        let result = route.request(RouteNetlinkMessage::DelAddress(message), 0)?;
        return ignore_if_done(route, op, result);
    }
    match route.request(RouteNetlinkMessage::NewAddress(message), NLM_F_CREATE | NLM_F_EXCL)? {
        Ok(()) => Ok(()),
        Err(refusal) if refusal.errno == EEXIST => match ours(route)? {
            true => Ok(()),
            false => Err(KernelError::Other(format!(
                "{device} already has address {address}, which ovl did not add: delete it, or exclude it from load_balancer_pool"
            ))),
        },
        Err(refusal) => Err(refusal.into_error(op.to_string())),
    }
}

/// Maps a refusal to success if the kernel is already in the wanted state.
fn ignore_if_done(route: &mut Route, op: &Op, result: Result<(), Refusal>) -> Result<()> {
    let Err(refusal) = result else { return Ok(()) };
    match (op, refusal.errno) {
        (op, ENOENT | ENODEV | EADDRNOTAVAIL | ESRCH) if op.is_entry_deletion() => Ok(()),
        // The device is no longer a bridge port, so its entries are gone.
        (Op::Fdb(FdbOp::DeletePort(..)), EOPNOTSUPP) => Ok(()),
        (Op::Fdb(FdbOp::AddFlood(..) | FdbOp::AddGroup(..)) | Op::Address(AddressOp::Add(..)), EEXIST) => {
            Ok(())
        }
        (Op::Route(RouteOp::Set(to, _)), EEXIST) => Err(KernelError::Other(format!(
            "another program has added a route to {to} with metric {METRIC}, which ovl does not replace: change its metric"
        ))),
        // IPv6 is off on devices of ovl until they need it.
        (_, EACCES | EINVAL) => match needs_v6(op) {
            Some(device) => {
                sysctl::set_host_v6(device, true)?;
                let located = Devices::default().get(route, device)?;
                let Some((message, flags)) = message::entry(op, located.index) else { return Ok(()) };
                route.request(message, flags)?.map_err(|refusal| refusal.into_error(op.to_string()))
            }
            None => Err(refusal.into_error(op.to_string())),
        },
        _ => Err(refusal.into_error(op.to_string())),
    }
}

/// The device on which an operation needs IPv6. `None` if it needs it on none.
fn needs_v6(op: &Op) -> Option<Device> {
    match op {
        Op::Address(AddressOp::Add(device, net)) if net.addr().is_ipv6() => Some(*device),
        Op::Neighbour(NeighbourOp::Set(device, address, _)) if address.is_ipv6() => Some(*device),
        Op::Route(RouteOp::Set(to, hop)) if to.addr().is_ipv6() => hop.device,
        _ => None,
    }
}

/// Creates a device. On failure no device remains. An existing device of ovl is not changed: the next full pass finds
/// the differences.
pub(super) fn add_link(
    route: &mut Route,
    devices: &mut Devices,
    tunnels: &mut Tunnels,
    op: &Op,
    device: Device,
    link: &Link,
) -> Result<()> {
    if let Link::Endpoint { .. } = link {
        return Err(KernelError::Other(format!("{device} is created by an attach, not by reconciliation")));
    }
    let (alias, master, up) = match link {
        Link::Bridge { up, .. } => ("bridge", None, *up),
        Link::Vxlan { master, up, .. } => ("vxlan", *master, *up),
        Link::Tap { master, up, .. } => ("tap", *master, *up),
        Link::Tunnel { up, .. } => ("tunnel", None, *up),
        Link::Endpoint { .. } => return Ok(()),
    };
    let master = master.map(|bridge| devices.get(route, bridge)).transpose()?;
    devices.forget(device);
    // If a device had this name, all requests of the batch but the first would change that device.
    match devices.get(route, device) {
        Ok(_) => return Ok(()),
        Err(KernelError::NoDevice(_)) => devices.forget(device),
        Err(error) => return Err(error),
    }
    let target = Target::Name(device);
    let mut attributes = vec![message::alias(alias)];
    if with_mtu_has_inet6(LinkSettings::of(link).mtu) {
        attributes.push(message::no_link_local());
    }
    if let Link::Bridge { mtu, .. } | Link::Tap { mtu, .. } | Link::Tunnel { mtu, .. } = link {
        attributes.push(LinkAttribute::Mtu(u32::from(*mtu)));
    }
    if let (Link::Tap { .. }, Some(Role::Vxlan(network))) = (link, device.role()) {
        attributes.push(message::hardware_address(Mac::of_vxlan(network)));
    }
    if let Some(master) = master {
        attributes.push(LinkAttribute::Controller(master.index));
    }
    // One batch: a daemon that is killed in between would leave a device without its alias, which ovl would not own.
    let mut batch = Batch::default();
    let new = message::new_link(device, link);
    let by_engine = new.is_none();
    match new {
        Some(new) => batch.push(new, NLM_F_CREATE | NLM_F_EXCL),
        None => tunnels.make(device, link)?,
    }
    batch.push(message::set(target, attributes), 0);
    if master.is_some() {
        batch.push(message::set(target, vec![message::port(device, false)]), 0);
    }
    let (results, _) = route.execute(batch)?;
    let made = by_engine || results.first().is_some_and(Result::is_ok);
    let result = match results.into_iter().find_map(Result::err) {
        // Before the device is up. A tunnel interface has an IPv6 address; the others get one, or a route, later.
        None => sysctl::set_host_v6(device, matches!(link, Link::Tunnel { .. }))
            .and_then(|()| if up { set_up(route, device, link, op) } else { Ok(()) }),
        Some(refusal) => Err(explain(route, device, link, refusal, op)),
    };
    let Err(error) = result else { return Ok(()) };
    tunnels.delete(device);
    if made {
        let _ = route.request(message::del_link_named(device), 0)?;
    }
    Err(error)
}

fn set_up(route: &mut Route, device: Device, link: &Link, op: &Op) -> Result<()> {
    let result = route.request(message::set_up(Target::Name(device), true), 0)?;
    result.map_err(|refusal| explain(route, device, link, refusal, op))
}

/// Changes the settings of a device in which `from` and `to` differ. Returns its indexes.
pub(super) fn set_link(
    route: &mut Route,
    devices: &mut Devices,
    op: &Op,
    device: Device,
    from: &Link,
    to: &Link,
) -> Result<Located> {
    let located = devices.get(route, device)?;
    let target = Target::Index(located.index);
    let was = LinkSettings::of(from);
    let is = LinkSettings::of(to);
    let mut batch = Batch::default();
    let mut attributes = Vec::new();
    if was.mac != is.mac
        && let Some(mac) = is.mac
    {
        // Only if it differs: the change makes the kernel forget all neighbours.
        attributes.push(message::hardware_address(mac));
    }
    if was.mtu != is.mtu {
        attributes.push(LinkAttribute::Mtu(u32::from(is.mtu)));
    }
    if was.master != is.master {
        let master = is.master.map(|bridge| devices.get(route, bridge)).transpose()?;
        attributes.push(LinkAttribute::Controller(master.map_or(0, |bridge| bridge.index)));
    }
    let tune = is.tuned && (!was.tuned || was.master != is.master);
    // The kernel turns IPv6 on when the MTU becomes large enough for it.
    let gains_v6 = was.mtu < MIN_MTU_V6 && with_mtu_has_inet6(is.mtu);
    if tune && !gains_v6 && with_mtu_has_inet6(is.mtu) {
        attributes.push(message::no_link_local());
    }
    if tune {
        match to {
            Link::Bridge { .. } => attributes.push(LinkAttribute::LinkInfo(message::bridge_info())),
            Link::Vxlan { .. } => attributes.push(LinkAttribute::LinkInfo(message::no_learning())),
            Link::Tap { .. } | Link::Tunnel { .. } | Link::Endpoint { .. } => {}
        }
    }
    if !attributes.is_empty() {
        batch.push(message::set(target, attributes), 0);
    }
    if gains_v6 {
        batch.push(message::set(target, vec![message::no_link_local()]), 0);
    }
    if is.master.is_some() && (tune || was.hairpin != is.hairpin) {
        batch.push(message::set(target, vec![message::port(device, is.hairpin)]), 0);
    }
    if tune {
        sysctl::distrust(device)?;
    }
    if was.up != is.up {
        batch.push(message::set_up(target, is.up), 0);
        // For the side effect, as for a new endpoint.
        batch.push(message::get_link_at(located.index), 0);
    }
    let (results, _) = route.execute(batch)?;
    if let Some(refusal) = results.into_iter().find_map(Result::err) {
        return Err(explain(route, device, to, refusal, op));
    }
    if gains_v6 {
        // With so small an MTU, it was of a network without IPv6.
        sysctl::set_host_v6(device, false)?;
    }
    Ok(located)
}

/// The settings that links of all kinds, or most of them, have.
struct LinkSettings {
    mac: Option<Mac>,
    mtu: u16,
    master: Option<Device>,
    up: bool,
    tuned: bool,
    hairpin: bool,
}

impl LinkSettings {
    fn of(link: &Link) -> Self {
        match *link {
            Link::Bridge { mac, mtu, up, tuned } => {
                Self { mac: Some(mac), mtu, master: None, up, tuned, hairpin: false }
            }
            Link::Vxlan { mtu, master, mac, up, tuned, .. } => {
                Self { mac: Some(mac), mtu, master, up, tuned, hairpin: false }
            }
            Link::Tunnel { mtu, up, .. } => {
                Self { mac: None, mtu, master: None, up, tuned: true, hairpin: false }
            }
            Link::Tap { mtu, master, up, tuned, .. } => {
                Self { mac: None, mtu, master, up, tuned, hairpin: false }
            }
            Link::Endpoint { mtu, master, up, tuned, hairpin } => {
                Self { mac: None, mtu, master, up, tuned, hairpin }
            }
        }
    }
}

/// Converts the refusal of a link. The error names the device that uses the VNI or port, or the missing kernel
/// feature.
fn explain(route: &mut Route, device: Device, link: &Link, refusal: Refusal, op: &Op) -> KernelError {
    if let (Op::Link(LinkOp::Add(..)), EOPNOTSUPP) = (op, refusal.errno) {
        return match link {
            Link::Bridge { .. } => KernelError::MissingFeature { feature: "bridges", module: "bridge" },
            Link::Vxlan { .. } => KernelError::MissingFeature { feature: "VXLAN", module: "vxlan" },
            Link::Tunnel { kind: TunnelKind::Kernel, .. } => KernelError::NoWireguard,
            Link::Tunnel { .. } | Link::Tap { .. } | Link::Endpoint { .. } => {
                refusal.into_error(op.to_string())
            }
        };
    }
    let Link::Vxlan { vni, port, .. } = link else { return refusal.into_error(op.to_string()) };
    let holder = |route: &mut Route, vni: Option<u32>| {
        dump::all_links(route)
            .ok()?
            .messages()
            .filter_map(|message| LinkView::parse(message.payload))
            .find_map(|view| {
                let (its_vni, its_port) = view.vxlan()?;
                let conflicts = its_port == *port && (vni.is_none() || its_vni.is_none() || its_vni == vni);
                (conflicts && view.name != device.as_str()).then(|| view.name.to_owned())
            })
    };
    match refusal.errno {
        EEXIST => match holder(route, Some(*vni)) {
            Some(name) => KernelError::Other(format!("VNI {vni} on port {port} is in use by device {name}")),
            None => refusal.into_error(op.to_string()),
        },
        EADDRINUSE => match holder(route, None) {
            Some(name) => KernelError::Other(format!(
                "UDP port {port} is in use by VXLAN device {name}, whose configuration does not allow {device} to share it"
            )),
            None => KernelError::UdpPortInUse { port: *port, purpose: "VXLAN", setting: "vxlan_port" },
        },
        _ => refusal.into_error(op.to_string()),
    }
}

/// The smallest MTU of a device with IPv6, in bytes (RFC 8200, section 5).
const MIN_MTU_V6: u16 = 1280;

/// Whether this kernel has IPv6. The boot parameter `ipv6.disable=1` disables it.
pub fn has_inet6() -> bool {
    std::path::Path::new("/proc/sys/net/ipv6").exists()
}

/// Whether devices with an MTU have IPv6.
pub(super) fn with_mtu_has_inet6(mtu: u16) -> bool {
    mtu >= MIN_MTU_V6 && has_inet6()
}

/// Deletes devices of ovl. Returns the result of each; an absent device is no error.
///
/// The kernel waits for all processors once per request, not per device, so deleting many takes as long as
/// deleting one.
pub(super) fn delete(route: &mut Route, devices: &mut Devices, doomed: &[Device]) -> Result<Vec<Result<()>>> {
    for device in doomed {
        devices.forget(*device);
    }
    devices.find(route, doomed.iter().copied())?;
    let mut results = Vec::new();
    let mut there = Vec::new();
    for device in doomed {
        results.push(match devices.get(route, *device) {
            Ok(located) => {
                there.push(located.index);
                Ok(())
            }
            Err(KernelError::NoDevice(_)) => Ok(()),
            Err(error) => Err(error),
        });
        devices.forget(*device);
    }
    there.sort_unstable();
    there.dedup();
    if there.len() > 1 && delete_group(route, &there)?.is_ok() {
        return Ok(results);
    }
    for (device, result) in doomed.iter().zip(&mut results).filter(|(_, result)| result.is_ok()) {
        *result = match devices.get(route, *device) {
            Ok(located) => match route.request(message::del_link(located.index), 0)? {
                Err(refusal) if refusal.errno != ENODEV => {
                    Err(refusal.into_error(Op::Link(LinkOp::Delete(*device)).to_string()))
                }
                Ok(()) | Err(_) => Ok(()),
            },
            Err(KernelError::NoDevice(_)) => Ok(()),
            Err(error) => Err(error),
        };
        devices.forget(*device);
    }
    Ok(results)
}

/// Deletes devices that were just looked up, in one request: it moves them to a new link group and deletes the
/// group.
pub(super) fn delete_group(route: &mut Route, there: &[u32]) -> Result<Result<(), Refusal>> {
    if there.is_empty() {
        return Ok(Ok(()));
    }
    // A random group, because all its members are deleted. Its upper half marks the members as doomed in
    // notifications.
    let mut random = [0; 2];
    if ring::rand::SecureRandom::fill(&ring::rand::SystemRandom::new(), &mut random).is_err() {
        return Err(KernelError::Other(
            "cannot delete devices: the kernel returned no random numbers".to_owned(),
        ));
    }
    let group = DOOMED & !0xffff | u32::from(u16::from_ne_bytes(random));
    let group = if group == DOOMED { group ^ 1 } else { group };
    let mut batch = Batch::default();
    for index in there {
        batch.push(message::set(Target::Index(*index), vec![LinkAttribute::Group(group)]), 0);
    }
    let (results, _) = route.execute(batch)?;
    // Absent devices cannot join the group. If all are absent, the group does not exist.
    if results.iter().all(Result::is_err) {
        return Ok(Ok(()));
    }
    route.request(message::del_group(group), 0)
}

/// The new MTU of an endpoint, which the peer interface needs too. `None` if the MTU does not change or the device is
/// not an endpoint.
pub(super) fn peer_mtu(device: Device, from: &Link, to: &Link) -> Option<u16> {
    let Some(Role::Endpoint(_)) = device.role() else { return None };
    let (was, is) = (LinkSettings::of(from).mtu, LinkSettings::of(to).mtu);
    (was != is).then_some(is)
}
