//! Which multicast frames leave a host by the device of a switched network to other hosts.
//!
//! The kernel sends a frame to the hosts in [`crate::state::Dataplane::groups`] for its MAC address, and without such an
//! entry to all hosts. So a filter decides before that whether it leaves at all: a set has the MAC addresses of the groups
//! that other hosts have joined ([`JOINED`]), and another one the devices by which all groups leave ([`OPEN`]).

use crate::nft::{Data, Set, Shape, Table, Type};
use crate::op::{NftOp, Op};
use ovl_proto::id::Mac;

/// The MAC addresses of groups that other hosts have joined, by the device to them.
pub static JOINED: Set = Set::new(
    Table::GuardFrames,
    "joined",
    Shape { key: &[Type::Leaves, Type::Mac], data: Data::None, ranges: false },
);

/// The devices by which the frames of all groups leave: a host behind them does not follow groups.
pub static OPEN: Set =
    Set::new(Table::GuardFrames, "open", Shape { key: &[Type::Leaves], data: Data::None, ranges: false });

/// Whether frames to a group's MAC address always go to all hosts, because groups that are not followed have the same one:
/// those of 224.0.0.0/24, ff02::1 and ff02::1:ff00:0/104.
pub fn is_for_all(mac: Mac) -> bool {
    matches!(
        mac.0,
        [0x01, 0x00, 0x5e, 0x00, 0x00, _] | [0x33, 0x33, 0x00, 0x00, 0x00, 0x01] | [0x33, 0x33, 0xff, ..]
    )
}

/// Whether an operation changes which frames leave. What lets frames leave must follow the entries of their MAC addresses,
/// without which they would go to all hosts, and precede what stops them: a group may pass from one of the sets to the
/// other.
pub(crate) fn is_filter(op: &Op) -> bool {
    match op {
        Op::Nft(NftOp::SetElement(element)) => element.set == JOINED || element.set == OPEN,
        Op::Nft(NftOp::DeleteElement(set, _)) => *set == JOINED || *set == OPEN,
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use std::net::IpAddr;

    use ovl_proto::table::is_followed;

    use super::*;

    #[test]
    fn groups_that_are_not_followed_have_addresses_for_all() {
        let all =
            ["224.0.0.1", "224.0.0.18", "224.0.0.251", "ff02::1", "ff02::1:ff00:1", "ff02::1:ffab:cdef"];
        for group in all.map(|group| group.parse::<IpAddr>().unwrap()) {
            assert!(!is_followed(group) && is_for_all(Mac::of_group(group)), "{group}");
        }
        for group in ["224.0.1.1", "239.1.2.3", "232.9.9.9", "ff02::fb", "ff02::12", "ff15::1234", "ff02::2"]
        {
            let group = group.parse::<IpAddr>().unwrap();
            assert!(is_followed(group) && !is_for_all(Mac::of_group(group)), "{group}");
        }
        // They share their address with groups that go to all hosts.
        for group in ["239.0.0.1", "239.128.0.251", "ff05::1", "ff05::1:ff00:1", "ff15::ff00:1"] {
            let group = group.parse::<IpAddr>().unwrap();
            assert!(is_followed(group) && is_for_all(Mac::of_group(group)), "{group}");
        }
        for group in ["10.1.0.1", "fd00::1", "ff01::5", "ff00::5", "255.255.255.255"] {
            assert!(!is_followed(group.parse().unwrap()), "{group}");
        }
    }
}
