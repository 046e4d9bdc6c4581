//! What we believe the kernel holds, and what a notification says that is new.

use std::collections::HashMap;
use std::net::IpAddr;

use ipnet::IpNet;
use ovl_dataplane::device::{Device, Role};
use ovl_dataplane::op::{LinkOp, Op};
use ovl_dataplane::state::{Dataplane, Link};

use super::attribute::{Message, attributes, u8_at, u32_at};
use super::dump::Names;
use super::fact::{self, Place, Value};
use super::link::{LinkView, Neighbour};

pub(super) const RTM_NEWLINK: u16 = 16;
const RTM_DELLINK: u16 = 17;
pub(super) const RTM_NEWADDR: u16 = 20;
const RTM_DELADDR: u16 = 21;
pub(super) const RTM_NEWNEIGH: u16 = 28;
const RTM_DELNEIGH: u16 = 29;
pub(super) const RTM_NEWROUTE: u16 = 24;
const RTM_DELROUTE: u16 = 25;
const RTM_NEWNETCONF: u16 = 80;

/// What notifications said that was not known.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct News {
    pub(super) changed: bool,
    pub(super) underlay: bool,
    pub(super) gone: Vec<Device>,
}

/// The last dump, with our operations and the notifications since.
#[derive(Debug, Default)]
pub(super) struct Known {
    kernel: Dataplane,
    names: Names,
    news: News,
    /// Devices of ours that notifications were about, and what the last one said.
    told: HashMap<u32, Told>,
}

#[derive(Debug, Default)]
struct Told {
    device: Option<State>,
    /// By the bridge, after that.
    port_is_tuned: Option<bool>,
}

#[derive(Debug)]
enum State {
    Ours(Link),
    /// It has lost its name or alias, or has not got them yet.
    NotOurs,
}

impl Known {
    /// After a dump.
    pub(super) fn load(&mut self, kernel: Dataplane, names: Names) {
        // Their notifications were lost, or come only now and find nothing that they could end.
        let gone = self.kernel.links.keys().filter(|device| !kernel.links.contains_key(device));
        self.news.gone.extend(gone.filter(|device| matches!(device.role(), Some(Role::Endpoint(_)))));
        self.kernel = kernel;
        self.names = names;
        self.told.clear();
    }

    /// What we believe.
    pub(super) fn kernel(&self) -> &Dataplane {
        &self.kernel
    }

    /// After an operation that succeeded.
    pub(super) fn applied(&mut self, op: &Op) {
        match op {
            // The tables know themselves.
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
            | Op::EndFlows(_) => op.apply_to(&mut self.kernel),
        }
    }

    /// After we deleted a device.
    pub(super) fn deleted(&mut self, device: Device) {
        self.kernel.forget_device(device);
        self.names.ours.retain(|_, name| *name != device);
    }

    /// After we made one.
    pub(super) fn created(&mut self, index: u32, device: Device, link: Link) {
        self.kernel.links.insert(device, link);
        self.names.ours.insert(index, device);
        self.names.all.insert(index, device);
    }

    /// Takes in one notification.
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
                    self.note_fact(Place::Route(to), Value::Hop(hop), message.kind == RTM_NEWROUTE);
                }
            }
            RTM_NEWNETCONF => self.note_forwarding(payload),
            _ => {}
        }
    }

    /// Once all notifications that were waiting are noted: an operation of ours can pass through
    /// states that are not the one it leaves, so only the last state of a device counts.
    pub(super) fn news(&mut self) -> News {
        for (index, told) in std::mem::take(&mut self.told) {
            let Some(device) = self.names.ours.get(&index).copied() else { continue };
            let known = self.kernel.links.get(&device).copied();
            let mut now = match (told.device, known) {
                (Some(State::Ours(link)), _) | (None, Some(link)) => link,
                (Some(State::NotOurs), _) => {
                    self.names.ours.remove(&index);
                    lost(&mut self.kernel, &mut self.news, device);
                    continue;
                }
                (None, None) => continue,
            };
            if let (Link::Tap { vni, .. }, Some(Link::Tap { vni: served, .. })) = (&mut now, known) {
                // The kernel does not know it.
                *vni = served;
            }
            if let Some((port, was_tuned)) = told.port_is_tuned.zip(is_tuned(&mut now)) {
                // Of the bridge's message we learn about the port alone. If that is as it should
                // be and the device was not, a dump tells.
                self.news.changed |= port != *was_tuned;
                *was_tuned &= port;
            }
            if known != Some(now) {
                self.kernel.links.insert(device, now);
                self.news.changed = true;
            }
        }
        std::mem::take(&mut self.news)
    }

    fn note_link(&mut self, payload: &[u8]) {
        let Some(view) = LinkView::parse(payload) else { return };
        if view.is_port_message {
            if let Some(device) = self.names.ours.get(&view.index) {
                let is_vxlan = matches!(device.role(), Some(Role::Vxlan(_)));
                let told = self.told.entry(view.index).or_default();
                told.port_is_tuned = view.port_is_tuned(is_vxlan).or(told.port_is_tuned);
            }
            return;
        }
        let Some(name) = view.device() else { return };
        self.names.all.insert(view.index, name);
        if let Some((device, link)) = view.ours().zip(view.model(&self.names.all)) {
            if let Some(renamed) = self.names.ours.insert(view.index, device).filter(|old| *old != device) {
                lost(&mut self.kernel, &mut self.news, renamed);
            }
            self.told.insert(view.index, Told { device: Some(State::Ours(link)), port_is_tuned: None });
            return;
        }
        if self.names.ours.contains_key(&view.index) {
            self.told.insert(view.index, Told { device: Some(State::NotOurs), port_is_tuned: None });
        }
        // One with our name and without our alias is about to get it.
        let state = (view.mtu, view.up);
        if name.role().is_none() && self.names.others.insert(view.index, state) != Some(state) {
            self.news.underlay = true;
        }
    }

    fn note_deletion(&mut self, payload: &[u8]) {
        let Some(view) = LinkView::parse(payload) else { return };
        if view.is_port_message {
            return; // It is no port any more; a message about the device itself says the same.
        }
        self.names.all.remove(&view.index);
        self.told.remove(&view.index);
        self.news.underlay |= self.names.others.remove(&view.index).is_some();
        if let Some(device) = self.names.ours.remove(&view.index) {
            lost(&mut self.kernel, &mut self.news, device);
        }
    }

    fn note_address(&mut self, index: u32, net: IpNet, new: bool) {
        let Some(device) = self.names.ours.get(&index) else {
            // What was one of ours until a moment ago is not the underlay.
            let name = self.names.all.get(&index);
            self.news.underlay |= name.is_none_or(|name| name.role().is_none());
            return;
        };
        if fact::has_addresses(*device) {
            self.note_fact(Place::Address(*device, net), Value::There, new);
        }
    }

    fn note_announced(&mut self, index: u32, address: IpAddr, new: bool) {
        let Some(device) = self.names.all.get(&index) else { return };
        let announced = &mut self.kernel.announced;
        let at = (*device, address);
        self.news.changed |= if new { announced.insert(at) } else { announced.remove(&at) };
    }

    fn note_neighbour(&mut self, payload: &[u8], new: bool) {
        let Some(entry) = Neighbour::parse(payload) else { return };
        let Some(device) = self.names.ours.get(&entry.index) else { return };
        if let Some((place, value)) = fact::of_neighbour(&entry, *device, self.kernel.links.get(device)) {
            self.note_fact(place, value, new);
        }
    }

    fn note_fact(&mut self, place: Place, value: Value, new: bool) {
        self.news.changed |= if new {
            fact::set(&mut self.kernel, place, value)
        } else {
            fact::unset(&mut self.kernel, place)
        };
    }

    fn note_forwarding(&mut self, payload: &[u8]) {
        const ALL: u32 = u32::MAX;
        let find =
            |wanted| attributes(payload, 4).find(|(kind, _)| *kind == wanted).and_then(|(_, v)| u32_at(v, 0));
        let (Some(ALL), Some(forwarding)) = (find(1), find(2)) else { return };
        let name = if u8_at(payload, 0) == Some(10) {
            "net.ipv6.conf.all.forwarding"
        } else {
            "net.ipv4.ip_forward"
        };
        let value = forwarding.to_string();
        if self.kernel.sysctls.get(name) != Some(&value) {
            self.kernel.sysctls.insert(name.to_owned(), value);
            self.news.changed = true;
        }
    }
}

fn lost(kernel: &mut Dataplane, news: &mut News, device: Device) {
    if kernel.links.contains_key(&device) {
        kernel.forget_device(device);
        news.changed = true;
        if let Some(Role::Endpoint(_)) = device.role() {
            news.gone.push(device);
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
