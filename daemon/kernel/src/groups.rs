//! The multicast groups behind the ports of bridges, which bridges learn from IGMP and MLD (`bridge mdb`).
//!
//! [`PortGroups`] owns what was read. It is no part of the data plane: members decide about it.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::IpAddr;

use nix::libc::{self, RTM_GETMDB};
use ovl_dataplane::device::{Device, Role};
use ovl_dataplane::op::PORT_GROUPS;
use ovl_proto::table::is_followed;

use super::attribute::{attributes, ip, u16_be, u32_at};
use super::error::Result;
use super::socket::{Batch, Route};

// Attributes of `linux/if_bridge.h`, which `libc` does not define.
const MDBA_MDB: u16 = 1;
const MDBA_MDB_ENTRY: u16 = 1;
const MDBA_MDB_ENTRY_INFO: u16 = 1;
const MDBA_MDB_EATTR_SOURCE: u16 = 4;
/// The length of `struct br_port_msg`.
const HEADER: usize = 8;
/// The length of `struct br_mdb_entry`, which attributes follow.
const ENTRY: usize = 28;

/// An entry of a bridge for one of its ports.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Joined {
    /// The index of the port.
    port: u32,
    group: IpAddr,
    /// The source that the entry is about. `None` for all.
    source: Option<IpAddr>,
}

/// The groups behind each port of a bridge, by the index of the port.
#[derive(Debug, Default)]
pub(super) struct PortGroups {
    ports: HashMap<u32, BTreeSet<(IpAddr, Option<IpAddr>)>>,
    /// Whether followed groups have changed since [`Self::take_changed`].
    changed: bool,
}

impl PortGroups {
    /// Reads the entries of all bridges.
    pub(super) fn dump(route: &mut Route) -> Result<Self> {
        let mut batch = Batch::default();
        let mut header = [0; HEADER];
        header[0] = libc::AF_BRIDGE as u8;
        batch.push_built(RTM_GETMDB, 0, &header);
        let mut groups = Self::default();
        // A kernel without multicast snooping refuses the request, and has no entries.
        if let Ok(dump) = route.dump_built(batch)? {
            // The kernel answers this request with messages of its own kind.
            let messages = dump.messages().filter(|message| message.kind == RTM_GETMDB);
            messages.flat_map(|message| entries(message.payload)).for_each(|entry| groups.insert(entry));
        }
        Ok(groups)
    }

    /// Replaces everything by a new dump. Only ports of endpoints count: bridges join groups themselves.
    pub(super) fn load(&mut self, mut new: Self, ours: &HashMap<u32, Device>) {
        new.ports.retain(|port, _| endpoint(*port, ours).is_some());
        let Self { changed, ports } = std::mem::take(self);
        *self = Self { changed: changed || ports != new.ports, ..new };
    }

    /// Updates it by a notification.
    pub(super) fn note(&mut self, payload: &[u8], new: bool, ours: &HashMap<u32, Device>) {
        for entry in entries(payload).filter(|entry| endpoint(entry.port, ours).is_some()) {
            if new { self.insert(entry) } else { self.remove(&entry) }
        }
    }

    fn insert(&mut self, Joined { port, group, source }: Joined) {
        let groups = self.ports.entry(port).or_default();
        // Only a kernel that has no such limit reports more.
        if groups.len() < PORT_GROUPS as usize && groups.insert((group, source)) {
            self.changed |= is_followed(group);
        }
    }

    fn remove(&mut self, Joined { port, group, source }: &Joined) {
        let Some(groups) = self.ports.get_mut(port) else { return };
        if groups.remove(&(*group, *source)) {
            self.changed |= is_followed(*group);
        }
        if groups.is_empty() {
            self.ports.remove(port);
        }
    }

    /// Forgets a port that was deleted.
    pub(super) fn forget(&mut self, port: u32) {
        self.changed |= self.ports.remove(&port).is_some();
    }

    /// Whether followed groups have changed since the last call.
    pub(super) fn take_changed(&mut self) -> bool {
        std::mem::take(&mut self.changed)
    }

    /// Returns the followed groups behind each port of an endpoint.
    pub(super) fn of_endpoints(&self, ours: &HashMap<u32, Device>) -> BTreeMap<Device, BTreeSet<IpAddr>> {
        let groups = self.ports.iter().filter_map(|(port, groups)| Some((endpoint(*port, ours)?, groups)));
        let followed = groups.map(|(device, groups)| {
            (device, groups.iter().map(|(group, _)| *group).filter(|group| is_followed(*group)).collect())
        });
        followed.collect()
    }
}

/// The endpoint whose port this is. `None` for another device.
fn endpoint(port: u32, ours: &HashMap<u32, Device>) -> Option<Device> {
    ours.get(&port).copied().filter(|device| matches!(device.role(), Some(Role::Endpoint(_))))
}

/// Parses the entries of a message.
fn entries(payload: &[u8]) -> impl Iterator<Item = Joined> {
    let of_kind = |wanted: u16| move |(kind, value)| (kind == wanted).then_some(value);
    attributes(payload, HEADER)
        .filter_map(of_kind(MDBA_MDB))
        .flat_map(|all| attributes(all, 0))
        .filter_map(of_kind(MDBA_MDB_ENTRY))
        .flat_map(|entry| attributes(entry, 0))
        .filter_map(of_kind(MDBA_MDB_ENTRY_INFO))
        .filter_map(entry)
}

/// Parses `struct br_mdb_entry` and the attributes after it. `None` for an entry of no IP group.
fn entry(info: &[u8]) -> Option<Joined> {
    let protocol = u16_be(info.get(24..)?)?;
    let length = match i32::from(protocol) {
        libc::ETH_P_IP => 4,
        libc::ETH_P_IPV6 => 16,
        _ => return None,
    };
    let group = ip(info.get(8..8 + length)?)?;
    let source = attributes(info, ENTRY).find(|(kind, _)| *kind == MDBA_MDB_EATTR_SOURCE);
    Some(Joined { port: u32_at(info, 0)?, group, source: source.and_then(|(_, value)| ip(value)) })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::attribute::Attributes;

    fn info(port: u32, group: &str, source: Option<&str>) -> Vec<u8> {
        let mut info = vec![0; ENTRY];
        info[..4].copy_from_slice(&port.to_ne_bytes());
        let group: IpAddr = group.parse().unwrap();
        let (protocol, octets) = match group {
            IpAddr::V4(group) => (0x0800_u16, group.octets().to_vec()),
            IpAddr::V6(group) => (0x86dd, group.octets().to_vec()),
        };
        info[8..8 + octets.len()].copy_from_slice(&octets);
        info[24..26].copy_from_slice(&protocol.to_be_bytes());
        let mut all = Attributes::after(&info);
        if let Some(IpAddr::V4(source)) = source.map(|source| source.parse().unwrap()) {
            all.put(MDBA_MDB_EATTR_SOURCE, &source.octets());
        }
        all.bytes().to_vec()
    }

    fn message(infos: &[Vec<u8>]) -> Vec<u8> {
        let mut message = Attributes::after(&[0; HEADER]);
        message.nest(MDBA_MDB, |all| {
            all.nest(MDBA_MDB_ENTRY, |entry| {
                infos.iter().for_each(|info| entry.put(MDBA_MDB_ENTRY_INFO, info));
            });
        });
        message.bytes().to_vec()
    }

    fn device(port: u8) -> Device {
        Device::endpoint(ovl_proto::id::EndpointId([port; 5]))
    }

    /// Ports 3 and 4 are of endpoints.
    fn ours() -> HashMap<u32, Device> {
        let bridge = Device::bridge(ovl_proto::id::NetworkId([1; 5]));
        HashMap::from([(2, bridge), (3, device(3)), (4, device(4))])
    }

    fn of(groups: &PortGroups, port: u8) -> Vec<String> {
        let found = groups.of_endpoints(&ours());
        found.get(&device(port)).into_iter().flatten().map(ToString::to_string).collect()
    }

    #[test]
    fn groups_are_followed_by_port_and_source() {
        let mut groups = PortGroups::default();
        groups.note(
            &message(&[
                info(3, "239.1.2.3", None),
                info(3, "239.1.2.3", Some("10.1.0.9")),
                info(3, "ff02::1:ff00:7", None),
                info(3, "ff15::7", None),
                info(4, "239.9.9.9", None),
                info(2, "ff02::6a", None),
                info(5, "239.9.9.9", None),
            ]),
            true,
            &ours(),
        );
        assert_eq!(of(&groups, 3), ["239.1.2.3", "ff15::7"]);
        assert!(groups.take_changed() && !groups.take_changed());
        // The entry without a source is left.
        groups.note(&message(&[info(3, "239.1.2.3", Some("10.1.0.9"))]), false, &ours());
        assert_eq!(of(&groups, 3), ["239.1.2.3", "ff15::7"]);
        groups.note(&message(&[info(3, "239.1.2.3", None), info(3, "ff15::7", None)]), false, &ours());
        assert!(of(&groups, 3).is_empty() && of(&groups, 4) == ["239.9.9.9"]);
        assert!(groups.take_changed());
        // Groups of neighbour discovery are not followed, so they are no change.
        groups.note(&message(&[info(3, "ff02::1:ff00:7", None)]), false, &ours());
        assert!(!groups.take_changed());
        groups.forget(4);
        assert!(of(&groups, 4).is_empty());
    }

    #[test]
    fn a_port_has_a_limited_number_of_groups() {
        let mut groups = PortGroups::default();
        for n in 0..10_000_u16 {
            let [high, low] = n.to_be_bytes();
            groups.note(&message(&[info(3, &format!("239.7.{high}.{low}"), None)]), true, &ours());
        }
        assert_eq!(of(&groups, 3).len(), PORT_GROUPS as usize);
    }

    #[test]
    fn damaged_messages_have_no_entries() {
        let whole = message(&[info(3, "239.1.2.3", Some("10.1.0.9"))]);
        for length in 0..whole.len() {
            let _ = entries(&whole[..length]).count();
        }
        assert_eq!(entries(&message(&[vec![0; 27]])).count(), 0);
    }
}
