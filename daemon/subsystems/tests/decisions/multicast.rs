//! Tests of which other hosts get the multicast of a switched network.

use std::net::IpAddr;

use ovl_cluster::view::View;
use ovl_dataplane::diff::diff;
use ovl_dataplane::multicast::{JOINED, OPEN};
use ovl_dataplane::op::{FdbOp, NftOp, Op};
use ovl_dataplane::state::Dataplane;
use ovl_proto::id::Mac;
use ovl_proto::record::PeerState;
use ovl_proto::table::{Endpoint, Entry};
use ovl_subsystems::local::Local;
use ovl_subsystems::networks::MOST_OF_HOST;
use ovl_subsystems::networks::desired::network_part;

use super::world::{NET, encrypt, endpoint, give, id, switched};

fn with(n: u8, address: &str, groups: Option<&[&str]>) -> Entry {
    let Entry::Endpoint(bare) = endpoint(n, address) else { unreachable!() };
    let groups = groups.map(|groups| groups.iter().map(|group| group.parse().unwrap()).collect());
    Entry::Endpoint(Endpoint { groups, ..bare })
}

/// A view in which every host has an endpoint, with these groups on hosts 2 and 3.
fn view(second: Option<&[&str]>, third: Option<&[&str]>) -> View {
    let mut view = switched();
    give(&mut view, 1, vec![with(1, "10.9.0.9/24", Some(&["239.9.9.9"]))]);
    give(&mut view, 2, vec![with(2, "10.9.0.17/24", second)]);
    give(&mut view, 3, vec![with(3, "10.9.0.25/24", third)]);
    view
}

fn part(view: &View) -> Dataplane {
    network_part(view, &Local::default(), NET)
}

/// The entries of groups, as text.
fn groups(part: &Dataplane) -> Vec<String> {
    part.groups.iter().map(|(_, mac, remote)| format!("{mac} {}", remote.vtep)).collect()
}

fn joined(part: &Dataplane) -> usize {
    part.elements.of(&JOINED).map_or(0, |held| held.len())
}

fn is_open(part: &Dataplane) -> bool {
    part.elements.of(&OPEN).is_some()
}

#[test]
fn frames_go_to_the_hosts_of_members() {
    let view = view(Some(&["239.1.2.3", "ff15::7"]), Some(&["239.1.2.3"]));
    let part = part(&view);
    assert_eq!(
        groups(&part),
        [
            "01:00:5e:01:02:03 192.168.77.2",
            "01:00:5e:01:02:03 192.168.77.3",
            "33:33:00:00:00:07 192.168.77.2"
        ]
    );
    assert_eq!((joined(&part), is_open(&part)), (2, false));
}

#[test]
fn groups_with_one_address_have_the_members_of_all() {
    let part = part(&view(Some(&["239.1.2.3"]), Some(&["225.129.2.3"])));
    assert_eq!(groups(&part).len(), 2);
    assert_eq!(joined(&part), 1);
}

#[test]
fn an_address_of_groups_that_are_not_followed_goes_to_all() {
    let part = part(&view(Some(&["239.0.0.18"]), Some(&[])));
    assert_eq!((groups(&part).len(), joined(&part), is_open(&part)), (0, 1, false));
}

#[test]
fn a_host_that_does_not_follow_gets_everything() {
    let both = part(&view(Some(&["239.1.2.3"]), None));
    assert_eq!(groups(&both), ["01:00:5e:01:02:03 192.168.77.2", "01:00:5e:01:02:03 192.168.77.3"]);
    assert!(is_open(&both));
    // Its own endpoints say nothing about what others send.
    assert!(!is_open(&part(&view(Some(&[]), Some(&[])))));
}

#[test]
fn a_host_without_endpoints_or_life_gets_nothing() {
    let mut view = view(Some(&["239.1.2.3"]), None);
    view.nodes.get_mut(&id(3)).unwrap().state = PeerState::Dead;
    let dead = part(&view);
    assert_eq!((groups(&dead).len(), is_open(&dead)), (1, false));
    view.nodes.get_mut(&id(2)).unwrap().state = PeerState::Suspect;
    assert_eq!(groups(&part(&view)).len(), 1);
    view.nodes.get_mut(&id(2)).unwrap().state = PeerState::Left;
    assert_eq!(groups(&part(&view)).len(), 0);
}

#[test]
fn an_encrypted_network_sends_into_the_tunnel() {
    let mut view = view(Some(&["239.1.2.3"]), Some(&[]));
    encrypt(&mut view, false);
    let part = part(&view);
    let [(_, mac, remote)] = part.groups.iter().copied().collect::<Vec<_>>()[..] else { panic!() };
    assert_eq!(mac, Mac::of_group("239.1.2.3".parse::<IpAddr>().unwrap()));
    assert!(part.floods.iter().any(|(_, flood)| *flood == remote) && remote.vtep.is_ipv6());
}

#[test]
fn what_one_host_has_joined_is_limited() {
    let mut view = view(Some(&[]), Some(&[]));
    let all: Vec<IpAddr> =
        (0..=u8::MAX).flat_map(|high| (0..10).map(move |low| IpAddr::from([239, 7, high, low]))).collect();
    assert!(all.len() > MOST_OF_HOST);
    let Entry::Endpoint(bare) = endpoint(2, "10.9.0.17/24") else { unreachable!() };
    give(&mut view, 2, vec![Entry::Endpoint(Endpoint { groups: Some(all), ..bare })]);
    let part = part(&view);
    assert_eq!((part.groups.len(), joined(&part)), (MOST_OF_HOST, MOST_OF_HOST));
}

#[test]
fn frames_leave_only_once_their_entry_exists() {
    let before = part(&view(Some(&[]), Some(&[])));
    let after = part(&view(Some(&["239.1.2.3"]), Some(&[])));
    let entry = |op: &Op| matches!(op, Op::Fdb(FdbOp::AddGroup(..) | FdbOp::DeleteGroup(..)));
    let element = |op: &Op| matches!(op, Op::Nft(NftOp::SetElement(_) | NftOp::DeleteElement(..)));
    let ops = diff(&before, &after, true);
    assert!(ops.len() == 2 && entry(&ops[0]) && element(&ops[1]), "{ops:?}");
    let ops = diff(&after, &before, true);
    assert!(ops.len() == 2 && element(&ops[0]) && entry(&ops[1]), "{ops:?}");
    // The daemon of the member starts again, and then follows the group again: its frames may always leave.
    let unknown = part(&view(None, Some(&[])));
    for (from, to) in [(&after, &unknown), (&unknown, &after)] {
        let ops = diff(from, to, true);
        let at = |wanted: fn(&Op) -> bool| ops.iter().position(wanted).unwrap();
        let set = at(|op| matches!(op, Op::Nft(NftOp::SetElement(_))));
        let delete = at(|op| matches!(op, Op::Nft(NftOp::DeleteElement(..))));
        assert!(set < delete, "{ops:?}");
    }
}
