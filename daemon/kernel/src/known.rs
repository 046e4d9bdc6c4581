//! The model of what the kernel holds. It follows operations and notifications, and detects notifications of changes
//! that ovld did not make.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::IpAddr;

use ipnet::IpNet;
use ovl_dataplane::device::{Device, Role};
use ovl_dataplane::op::{LinkOp, Op};
use ovl_dataplane::state::{Dataplane, Link};
use ovl_proto::id::Mac;

use nix::libc::{
    RTM_DELADDR, RTM_DELLINK, RTM_DELMDB, RTM_DELNEIGH, RTM_DELROUTE, RTM_NEWADDR, RTM_NEWLINK, RTM_NEWMDB,
    RTM_NEWNEIGH, RTM_NEWNETCONF, RTM_NEWROUTE,
};

use super::attribute::{Message, attributes, u8_at, u32_at};
use super::dump::DeviceNames;
use super::fact::{self, EntryKey, EntryValue};
use super::groups::PortGroups;
use super::link::{LinkView, Neighbour};

/// Changes by other programs, as notifications reported them.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Changes {
    /// Whether an object of ovl changed.
    pub(super) changed: bool,
    /// Whether a device, an address or a default route of the host changed.
    pub(super) underlay: bool,
    /// Endpoints whose host interfaces were deleted.
    pub(super) gone: Vec<Device>,
    /// Endpoints whose peer interfaces came up, or have another MAC address than before.
    pub(super) peers: BTreeSet<Device>,
    /// Whether endpoints have joined or left multicast groups.
    pub(super) groups: bool,
}

/// The last dump, updated by the operations and notifications since.
#[derive(Debug, Default)]
pub(super) struct KernelModel {
    kernel: Dataplane,
    names: DeviceNames,
    changes: Changes,
    /// The last notification about each device of ovl, by index, since the last call of [`Self::changes`].
    notices: HashMap<u32, LinkNotice>,
    /// Whether the peer interface of each endpoint is up, and its MAC address, as far as it was reported.
    peers: HashMap<Device, (bool, Option<Mac>)>,
    groups: PortGroups,
}

#[derive(Debug, Default)]
/// The last notifications about a link.
struct LinkNotice {
    device: Option<LinkState>,
    /// Whether the bridge port is tuned, if the bridge reported it after that.
    port_is_tuned: Option<bool>,
}

#[derive(Debug)]
enum LinkState {
    Ours(Link),
    /// It has lost its name or alias of ovl, or does not have them yet.
    NotOurs,
}

impl KernelModel {
    /// Replaces the model by a new dump.
    pub(super) fn load(&mut self, kernel: Dataplane, names: DeviceNames, groups: PortGroups) {
        // Notifications of these deletions were lost, or arrive later and then find no device in the model.
        let gone = self.kernel.links.keys().filter(|device| !kernel.links.contains_key(device));
        self.changes.gone.extend(gone.filter(|device| matches!(device.role(), Some(Role::Endpoint(_)))));
        self.kernel = kernel;
        self.names = names;
        self.groups.load(groups, &self.names.ours);
        self.notices.clear();
        self.peers.retain(|device, _| self.kernel.links.contains_key(device));
    }

    /// The data plane that the kernel is believed to hold.
    pub(super) fn kernel(&self) -> &Dataplane {
        &self.kernel
    }

    /// Returns the followed multicast groups that each endpoint has joined.
    pub(super) fn groups(&self) -> BTreeMap<Device, BTreeSet<IpAddr>> {
        self.groups.of_endpoints(&self.names.ours)
    }

    /// Returns the devices of ovl, by their indexes.
    pub(super) fn devices(&self) -> &HashMap<u32, Device> {
        &self.names.ours
    }

    /// Returns the indexes of devices of ovl.
    pub(super) fn indexes(&self, devices: &[Device]) -> Vec<u32> {
        let ours = self.names.ours.iter();
        ours.filter(|(_, device)| devices.contains(device)).map(|(index, _)| *index).collect()
    }

    /// Updates the model by an operation that succeeded.
    pub(super) fn applied(&mut self, op: &Op) {
        match op {
            // The modules of the nftables tables have models of their own.
            Op::Nft(_) => {}
            Op::Link(LinkOp::Delete(device)) => self.deleted(*device),
            Op::Link(_)
            | Op::Address(_)
            | Op::Announced(_)
            | Op::Fdb(_)
            | Op::Neighbour(_)
            | Op::Route(_)
            | Op::Wireguard(_)
            | Op::Source(_)
            | Op::Sysctl(_)
            | Op::EndFlows(_)
            | Op::Fast(_) => op.apply_to(&mut self.kernel),
        }
    }

    /// Sets the state of the peer interface of an endpoint: whether it is up, and its MAC address.
    pub(super) fn peer_is(&mut self, device: Device, up: bool, mac: Mac) {
        self.peers.insert(device, (up, Some(mac)));
    }

    /// Updates the model by a notification of another namespace about a link there.
    pub(super) fn note_peer(&mut self, message: &Message<'_>) {
        if message.kind != RTM_NEWLINK {
            return;
        }
        let view = LinkView::parse(message.payload).filter(|view| !view.is_port_message && view.is_veth());
        let Some(view) = view else { return };
        // Two other namespaces may share a pair whose index is, by chance, that of an endpoint: then nothing is found
        // to put back.
        let Some(device) = view.peer.and_then(|index| self.names.ours.get(&index)) else { return };
        if !matches!(device.role(), Some(Role::Endpoint(_))) {
            return;
        }
        let now = (view.up, view.mac);
        if self.peers.insert(*device, now) != Some(now) && view.up {
            self.changes.peers.insert(*device);
        }
    }

    /// Removes a device that ovld deleted.
    pub(super) fn deleted(&mut self, device: Device) {
        self.peers.remove(&device);
        self.kernel.forget_device(device);
        let groups = &mut self.groups;
        self.names.ours.retain(|index, name| {
            let stays = *name != device;
            if !stays {
                groups.forget(*index);
            }
            stays
        });
    }

    /// Adds a device that ovld created.
    pub(super) fn created(&mut self, index: u32, device: Device, link: Link) {
        self.kernel.links.insert(device, link);
        self.names.ours.insert(index, device);
        self.names.all.insert(index, device);
    }

    /// Updates the model by a notification.
    pub(super) fn note(&mut self, message: &Message<'_>) {
        let payload = message.payload;
        match message.kind {
            RTM_NEWLINK => self.note_link(payload),
            RTM_DELLINK => self.note_deletion(payload),
            RTM_NEWADDR | RTM_DELADDR => {
                if let Some((index, net)) = fact::address(payload) {
                    let new = message.kind == RTM_NEWADDR;
                    if fact::is_announced(payload) {
                        self.note_announced(index, net.addr(), new);
                    } else {
                        self.note_address(index, net, new);
                    }
                }
            }
            RTM_NEWNEIGH | RTM_DELNEIGH => self.note_neighbour(payload, message.kind == RTM_NEWNEIGH),
            RTM_NEWROUTE | RTM_DELROUTE => {
                if let Some((to, hop)) = fact::route(payload, &self.names.ours) {
                    self.note_fact(EntryKey::Route(to), EntryValue::Hop(hop), message.kind == RTM_NEWROUTE);
                } else if fact::is_default_route(payload) {
                    self.changes.underlay = true;
                }
            }
            RTM_NEWNETCONF => self.note_forwarding(payload),
            RTM_NEWMDB | RTM_DELMDB => {
                self.groups.note(payload, message.kind == RTM_NEWMDB, &self.names.ours)
            }
            _ => {}
        }
    }

    /// Returns the changes since the last call.
    ///
    /// Call it only after all waiting notifications were noted: an operation of ovld can pass through intermediate
    /// states, so only the last state of a device counts.
    pub(super) fn changes(&mut self) -> Changes {
        for (index, told) in std::mem::take(&mut self.notices) {
            let Some(device) = self.names.ours.get(&index).copied() else { continue };
            let known = self.kernel.links.get(&device).copied();
            let mut now = match (told.device, known) {
                (Some(LinkState::Ours(link)), _) | (None, Some(link)) => link,
                (Some(LinkState::NotOurs), _) => {
                    self.names.ours.remove(&index);
                    lost(&mut self.kernel, &mut self.changes, device);
                    continue;
                }
                (None, None) => continue,
            };
            if let (Link::Tap { vni, .. }, Some(Link::Tap { vni: served, .. })) = (&mut now, known) {
                // The kernel does not know the VNI.
                *vni = served;
            }
            if let Some((port, was_tuned)) = told.port_is_tuned.zip(is_tuned(&mut now)) {
                // A message of the bridge is about the port alone. If the port is tuned and the device was not, only
                // a dump shows the state of the device.
                self.changes.changed |= port != *was_tuned;
                *was_tuned &= port;
            }
            if known != Some(now) {
                self.kernel.links.insert(device, now);
                self.changes.changed = true;
            }
        }
        self.changes.groups = self.groups.take_changed();
        std::mem::take(&mut self.changes)
    }

    fn note_link(&mut self, payload: &[u8]) {
        let Some(view) = LinkView::parse(payload) else { return };
        if view.is_port_message {
            if let Some(device) = self.names.ours.get(&view.index) {
                let is_vxlan = matches!(device.role(), Some(Role::Vxlan(_)));
                let told = self.notices.entry(view.index).or_default();
                told.port_is_tuned = view.port_is_tuned(is_vxlan).or(told.port_is_tuned);
            }
            return;
        }
        let Some(name) = view.device() else { return };
        self.names.all.insert(view.index, name);
        if let Some((device, link)) = view.ours().zip(view.model(&self.names.all)) {
            if let Some(renamed) = self.names.ours.insert(view.index, device).filter(|old| *old != device) {
                lost(&mut self.kernel, &mut self.changes, renamed);
            }
            self.notices
                .insert(view.index, LinkNotice { device: Some(LinkState::Ours(link)), port_is_tuned: None });
            return;
        }
        if self.names.ours.contains_key(&view.index) {
            self.notices
                .insert(view.index, LinkNotice { device: Some(LinkState::NotOurs), port_is_tuned: None });
        }
        // A device with a name of ovl and without its alias is about to get the alias.
        let state = (view.mtu, view.up);
        if name.role().is_none() && self.names.others.insert(view.index, state) != Some(state) {
            self.changes.underlay = true;
        }
    }

    fn note_deletion(&mut self, payload: &[u8]) {
        let Some(view) = LinkView::parse(payload) else { return };
        if view.is_port_message {
            return; // It is no longer a port. A message about the device itself reports the same.
        }
        self.names.all.remove(&view.index);
        self.notices.remove(&view.index);
        self.groups.forget(view.index);
        self.changes.underlay |= self.names.others.remove(&view.index).is_some();
        if let Some(device) = self.names.ours.remove(&view.index) {
            lost(&mut self.kernel, &mut self.changes, device);
        }
    }

    fn note_address(&mut self, index: u32, net: IpNet, new: bool) {
        let Some(device) = self.names.ours.get(&index) else {
            // A device of ovl that was just deleted is not part of the underlay.
            let name = self.names.all.get(&index);
            self.changes.underlay |= name.is_none_or(|name| name.role().is_none());
            return;
        };
        if fact::has_addresses(*device) {
            self.note_fact(EntryKey::Address(*device, net), EntryValue::Present, new);
        }
    }

    fn note_announced(&mut self, index: u32, address: IpAddr, new: bool) {
        let Some(device) = self.names.all.get(&index) else { return };
        let announced = &mut self.kernel.announced;
        let at = (*device, address);
        self.changes.changed |= if new { announced.insert(at) } else { announced.remove(&at) };
    }

    fn note_neighbour(&mut self, payload: &[u8], new: bool) {
        let Some(entry) = Neighbour::parse(payload) else { return };
        let Some(device) = self.names.ours.get(&entry.index) else { return };
        if let Some((key, value)) = fact::of_neighbour(&entry, *device, self.kernel.links.get(device)) {
            self.note_fact(key, value, new);
        }
    }

    fn note_fact(&mut self, key: EntryKey, value: EntryValue, new: bool) {
        self.changes.changed |=
            if new { fact::set(&mut self.kernel, key, value) } else { fact::unset(&mut self.kernel, key) };
    }

    fn note_forwarding(&mut self, payload: &[u8]) {
        // Attributes of `linux/netconf.h`, which `libc` does not define.
        const NETCONFA_IFINDEX: u16 = 1;
        const NETCONFA_FORWARDING: u16 = 2;
        /// The index for all devices (NETCONFA_IFINDEX_ALL).
        const ALL: u32 = u32::MAX;
        let find =
            |wanted| attributes(payload, 4).find(|(kind, _)| *kind == wanted).and_then(|(_, v)| u32_at(v, 0));
        let (Some(ALL), Some(forwarding)) = (find(NETCONFA_IFINDEX), find(NETCONFA_FORWARDING)) else {
            return;
        };
        let name = if u8_at(payload, 0).map(i32::from) == Some(nix::libc::AF_INET6) {
            "net.ipv6.conf.all.forwarding"
        } else {
            "net.ipv4.ip_forward"
        };
        let value = forwarding.to_string();
        if self.kernel.sysctls.get(name) != Some(&value) {
            self.kernel.sysctls.insert(name.to_owned(), value);
            self.changes.changed = true;
        }
    }
}

fn lost(kernel: &mut Dataplane, changes: &mut Changes, device: Device) {
    if kernel.links.contains_key(&device) {
        kernel.forget_device(device);
        changes.changed = true;
        if let Some(Role::Endpoint(_)) = device.role() {
            changes.gone.push(device);
        }
    }
}

fn is_tuned(link: &mut Link) -> Option<&mut bool> {
    match link {
        Link::Bridge { tuned, .. }
        | Link::Vxlan { tuned, .. }
        | Link::Tap { tuned, .. }
        | Link::Endpoint { tuned, .. } => Some(tuned),
        Link::Tunnel { .. } => None,
    }
}
