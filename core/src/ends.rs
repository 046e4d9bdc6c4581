//! Which of a host's two ends of the tunnel leads to a peer. There are two only while a key is rotated: one end
//! has one private key, and takes a peer's addresses from one key alone, so for a while the old and the new
//! pair of keys need ends of their own on both hosts.
//!
//! A host that rotates makes a second end with the new key, and publishes that with the other port. Its peers
//! make a second end with the key that they have, and meet it there. Each host sends by the new ends as soon as
//! they have a session; the old ones still receive. When nothing comes by its old end any more, the host gives
//! that up and says so; its peers move over to the end that they had before, and give up the second one.

use std::collections::{BTreeMap, BTreeSet};

use ovl_proto::id::{NodeId, TunnelKey};
use ovl_proto::record::Tunnel;

use crate::device::Device;

/// What a host remembers and sees, beside the records.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Ends {
    /// The key before the published one, while that is being rotated.
    pub own_old: Option<TunnelKey>,
    /// Of peers that rotate: what they published before.
    pub old: BTreeMap<NodeId, Tunnel>,
    /// Keys of peers with which an end has a session.
    pub sessions: BTreeSet<(Device, TunnelKey)>,
    /// Of those, the ones from which nothing has come for a while.
    pub quiet: BTreeSet<(Device, TunnelKey)>,
}

/// The way to a peer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Way {
    /// Where packets for it are received and, by one of them, sent: the end, the peer's key and port there.
    pub ends: Vec<(Device, TunnelKey, u16)>,
    /// By which of these they are sent.
    pub by: Device,
}

/// The end that has a port. A host has a pair of ports, the second one odd.
pub fn end_of(port: u16) -> Device {
    Device::tunnel(port & 1 == 1)
}

/// The other port of a host.
pub fn other_port(port: u16) -> u16 {
    port ^ 1
}

/// The key of one of this host's ends; none if it has no such end.
pub fn key_of(own: Tunnel, ends: &Ends, device: Device) -> Option<TunnelKey> {
    let is_first = device == end_of(own.port);
    if is_first || !own.rotating { Some(own.key) } else { ends.own_old }
}

/// The way to a peer that publishes `peer`.
pub fn way(own: Tunnel, ends: &Ends, id: NodeId, peer: Tunnel) -> Way {
    let (first, second) = (end_of(own.port), end_of(other_port(own.port)));
    let met = |device| ends.sessions.contains(&(device, peer.key));
    let old = ends.old.get(&id).copied();
    let at_first = (first, peer.key, peer.port);
    let (all, is_first) = match (own.rotating, peer.rotating) {
        (false, false) => {
            // It had rotated: until there is a session at the place where it belongs.
            let is_late = met(second) && !met(first);
            let late = is_late.then_some((second, peer.key, peer.port));
            ([Some(at_first), late], !is_late)
        }
        // We had rotated together, and were ready before.
        (false, true) if met(first) => ([Some(at_first), None], true),
        (false, true) => {
            let before = old.map(|old| (first, old.key, old.port));
            ([Some((second, peer.key, peer.port)), before], before.is_some() && !met(second))
        }
        (true, false) => {
            let there = (first, peer.key, other_port(peer.port));
            ([Some(there), Some((second, peer.key, peer.port))], met(first))
        }
        (true, true) => {
            let before = old.map(|old| (second, old.key, old.port));
            ([Some(at_first), before], before.is_none() || met(first))
        }
    };
    Way { ends: all.into_iter().flatten().collect(), by: if is_first { first } else { second } }
}

/// Peers of whose rotation this host is not done yet: its second end is in use, and a rotation of its own key
/// would need it.
pub fn unsettled<'a>(
    own: Tunnel,
    ends: &'a Ends,
    peers: impl Iterator<Item = (NodeId, Tunnel)> + 'a,
) -> impl Iterator<Item = NodeId> + 'a {
    let first = end_of(own.port);
    peers
        .filter(move |(id, peer)| {
            let way = way(own, ends, *id, *peer);
            peer.rotating || way.by != first || way.ends.len() != 1
        })
        .map(|(id, _)| id)
}

/// The peers that a rotation of the own key still waits for.
pub fn awaited<'a>(
    own: Tunnel,
    ends: &'a Ends,
    peers: impl Iterator<Item = (NodeId, Tunnel)> + 'a,
) -> impl Iterator<Item = NodeId> + 'a {
    let (first, second) = (end_of(own.port), end_of(other_port(own.port)));
    peers
        .filter(move |(id, peer)| {
            let has_moved = ends.sessions.contains(&(first, peer.key));
            let mut before = vec![peer.key];
            before.extend(ends.old.get(id).map(|old| old.key));
            let still_comes = before
                .iter()
                .any(|key| ends.sessions.contains(&(second, *key)) && !ends.quiet.contains(&(second, *key)));
            !has_moved || still_comes
        })
        .map(|(id, _)| id)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const HOSTS: usize = 3;

    fn id(n: usize) -> NodeId {
        NodeId([n as u8; 10])
    }

    /// One host, as far as tunnels go.
    #[derive(Debug, Clone)]
    struct Host {
        own: Tunnel,
        ends: Ends,
        /// What it knows of each host.
        known: Vec<Tunnel>,
        /// What it has set up.
        ways: Vec<Option<Way>>,
    }

    impl Host {
        fn key(&self, device: Device) -> Option<TunnelKey> {
            key_of(self.own, &self.ends, device)
        }

        fn port(&self, device: Device) -> u16 {
            if device == end_of(self.own.port) { self.own.port } else { other_port(self.own.port) }
        }
    }

    /// Whether an end of one and an end of another meet: each has the other's key, and at least one knows where
    /// the other is.
    fn meet(hosts: &[Host], a: usize, at_a: Device, b: usize, at_b: Device) -> bool {
        let find = |x: usize, at: Device, y: usize| {
            hosts[x].ways[y].as_ref()?.ends.iter().find(|(device, ..)| *device == at).copied()
        };
        let (Some(from_a), Some(from_b)) = (find(a, at_a, b), find(b, at_b, a)) else { return false };
        let keys = Some(from_a.1) == hosts[b].key(at_b) && Some(from_b.1) == hosts[a].key(at_a);
        keys && (from_a.2 == hosts[b].port(at_b) || from_b.2 == hosts[a].port(at_a))
    }

    const ENDS: [bool; 2] = [false, true];

    /// Sets up what is wanted now; sessions that neither end was taken away from stay, others begin.
    fn settle(hosts: &mut [Host], n: usize) {
        for peer in (0..HOSTS).filter(|peer| *peer != n) {
            let host = &hosts[n];
            let wanted = way(host.own, &host.ends, id(peer), host.known[peer]);
            hosts[n].ways[peer] = Some(wanted);
        }
        see(hosts);
    }

    fn see(hosts: &mut [Host]) {
        let sessions: Vec<BTreeSet<(Device, TunnelKey)>> = (0..HOSTS)
            .map(|a| {
                let mut all = BTreeSet::new();
                for b in (0..HOSTS).filter(|b| *b != a) {
                    for (at_a, at_b) in
                        ENDS.iter().flat_map(|x| ENDS.map(|y| (Device::tunnel(*x), Device::tunnel(y))))
                    {
                        if meet(hosts, a, at_a, b, at_b) {
                            all.extend(hosts[b].key(at_b).map(|key| (at_a, key)));
                        }
                    }
                }
                all
            })
            .collect();
        for (host, sessions) in hosts.iter_mut().zip(sessions) {
            host.ends.sessions = sessions;
        }
        // Quiet is an end by which the peer does not send.
        for a in 0..HOSTS {
            let mut quiet = BTreeSet::new();
            for b in (0..HOSTS).filter(|b| *b != a) {
                for at in ENDS.map(Device::tunnel) {
                    let comes = hosts[b].ways[a].as_ref().is_some_and(|way| meet(hosts, b, way.by, a, at));
                    let keys = ENDS.map(|end| hosts[b].key(Device::tunnel(end)));
                    if !comes {
                        quiet.extend(keys.iter().flatten().map(|key| (at, *key)));
                    }
                }
            }
            // Whoever shares a key on both ends is heard if it comes by either.
            for b in (0..HOSTS).filter(|b| *b != a) {
                if let Some(way) = &hosts[b].ways[a] {
                    for at in ENDS.map(Device::tunnel) {
                        if meet(hosts, b, way.by, a, at) {
                            let key = hosts[b].key(way.by);
                            quiet.retain(|(device, other)| (*device, Some(*other)) != (at, key));
                        }
                    }
                }
            }
            hosts[a].ends.quiet = quiet;
        }
    }

    /// Whether what each sends to each other arrives.
    fn lost(hosts: &[Host]) -> Option<(usize, usize)> {
        let pairs = (0..HOSTS).flat_map(|a| (0..HOSTS).map(move |b| (a, b))).filter(|(a, b)| a != b);
        pairs.into_iter().find(|(a, b)| {
            let by = hosts[*a].ways[*b].as_ref().map(|way| way.by);
            !ENDS.iter().any(|at| by.is_some_and(|by| meet(hosts, *a, by, *b, Device::tunnel(*at))))
        })
    }

    fn hosts() -> Vec<Host> {
        let tunnels: Vec<Tunnel> = (0..HOSTS)
            .map(|n| Tunnel { key: TunnelKey([n as u8; 32]), port: 51940, rotating: false, kernel: true })
            .collect();
        let mut hosts: Vec<Host> = tunnels
            .iter()
            .map(|own| Host {
                own: *own,
                ends: Ends::default(),
                known: tunnels.clone(),
                ways: vec![None; HOSTS],
            })
            .collect();
        (0..HOSTS).for_each(|n| settle(&mut hosts, n));
        hosts
    }

    fn hear(hosts: &mut [Host], from: usize, to: usize) {
        let (was, is) = (hosts[to].known[from], hosts[from].own);
        let old = &mut hosts[to].ends.old;
        if is.rotating && was.key != is.key {
            old.insert(id(from), was);
        } else if !is.rotating {
            old.remove(&id(from));
        }
        hosts[to].known[from] = is;
    }

    fn waits(host: &Host, n: usize) -> bool {
        let peers = host.known.iter().copied().enumerate().filter(|(peer, _)| *peer != n);
        awaited(host.own, &host.ends, peers.map(|(peer, tunnel)| (id(peer), tunnel))).next().is_some()
    }

    fn is_settled(host: &Host, n: usize) -> bool {
        let peers = host.known.iter().copied().enumerate().filter(|(peer, _)| *peer != n);
        let peers = peers.map(|(peer, tunnel)| (id(peer), tunnel));
        // And the second end is gone from the kernel too.
        let by_first = |way: &Way| way.by == end_of(host.own.port) && way.ends.len() == 1;
        unsettled(host.own, &host.ends, peers).next().is_none() && host.ways.iter().flatten().all(by_first)
    }

    fn rotate(host: &mut Host, fresh: u8) {
        host.ends.own_old = Some(host.own.key);
        host.own = Tunnel {
            key: TunnelKey([fresh; 32]),
            port: other_port(host.own.port),
            rotating: true,
            ..host.own
        };
    }

    #[derive(Debug, Clone, Copy)]
    enum Event {
        Rotate(usize),
        Hear(usize, usize),
        Settle(usize),
        Finish(usize),
    }

    fn event() -> impl Strategy<Value = Event> {
        let host = || 0..HOSTS;
        prop_oneof![
            1 => host().prop_map(Event::Rotate),
            6 => (host(), host()).prop_map(|(a, b)| Event::Hear(a, b)),
            6 => host().prop_map(Event::Settle),
            3 => host().prop_map(Event::Finish),
        ]
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(2_000))]
        #[test]
        fn at_no_moment_of_a_rotation_is_a_packet_lost(events in prop::collection::vec(event(), 1..80)) {
            let mut hosts = hosts();
            let mut fresh = 100;
            for event in events {
                match event {
                    // A rotation that a host knows of is waited for by it.
                    Event::Rotate(n) if !hosts[n].own.rotating && is_settled(&hosts[n], n) => {
                        fresh += 1;
                        rotate(&mut hosts[n], fresh);
                        settle(&mut hosts, n);
                    }
                    Event::Hear(from, to) if from != to => {
                        hear(&mut hosts, from, to);
                        settle(&mut hosts, to);
                    }
                    Event::Settle(n) => settle(&mut hosts, n),
                    Event::Finish(n) if hosts[n].own.rotating && !waits(&hosts[n], n) => {
                        hosts[n].own.rotating = false;
                        hosts[n].ends.own_old = None;
                        settle(&mut hosts, n);
                    }
                    _ => {}
                }
                prop_assert_eq!(lost(&hosts), None, "{:?}", event);
            }
        }
    }

    #[test]
    fn a_rotation_comes_to_its_end() {
        let mut hosts = hosts();
        for round in 0..3 {
            rotate(&mut hosts[0], 50 + round);
            settle(&mut hosts, 0);
            assert!(waits(&hosts[0], 0));
            for peer in 1..HOSTS {
                hear(&mut hosts, 0, peer);
                settle(&mut hosts, peer);
                settle(&mut hosts, peer);
                settle(&mut hosts, 0);
            }
            assert!(!waits(&hosts[0], 0));
            hosts[0].own.rotating = false;
            hosts[0].ends.own_old = None;
            settle(&mut hosts, 0);
            for peer in 1..HOSTS {
                hear(&mut hosts, 0, peer);
                (0..3).for_each(|_| settle(&mut hosts, peer));
            }
            assert_eq!(lost(&hosts), None);
            // One end each is left.
            for (n, host) in hosts.iter().enumerate() {
                for way in host.ways.iter().flatten() {
                    assert_eq!(way.ends.len(), 1, "host {n}: {way:?}");
                    assert_eq!(way.by, end_of(host.own.port));
                }
            }
        }
    }
}
