//! Chooses the WireGuard interface for each peer while tunnel keys are rotated.
//!
//! A host has two interfaces only during a rotation. A WireGuard interface has one private key and accepts the allowed
//! IPs of a peer from one public key only, so the old and the new key need an interface each, on both hosts.
//!
//! All hosts move from one key epoch to the next. Each epoch uses one of the two UDP ports of a host, with an interface
//! on it. A host that rotates its key creates the interface of the next epoch with the new key and publishes both; the
//! other hosts follow with the keys that they have. Two hosts can exchange packets in each epoch in which both have an
//! interface. They send by the later interface as soon as it has a session; the earlier one still receives. A host
//! deletes its earlier interface when all peers have followed and no packet arrives by it any more.
//!
//! [`KeyEpochs`] owns the state: encryption reads it for its peers, and networks for their routes. Begin to read at [`route_to`].

use std::collections::{BTreeMap, BTreeSet};

use ovl_proto::id::{NodeId, TunnelKey};
use ovl_proto::record::Tunnel;

use ovl_dataplane::device::Device;

/// Previous keys and sessions of the local WireGuard interfaces, which the records do not contain.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct KeyEpochs {
    /// The local host's previous key, while it rotates.
    own_previous: Option<TunnelKey>,
    /// The previous key of each peer that rotates.
    previous: BTreeMap<NodeId, TunnelKey>,
    /// Interfaces and the keys of peers with which they have a session.
    sessions: Sessions,
    /// The sessions from which no packet has arrived for a while.
    quiet: Sessions,
}

/// Local interfaces and the keys of peers with which they have a session.
pub type Sessions = BTreeSet<(Device, TunnelKey)>;

impl KeyEpochs {
    /// Sets the local host's previous key. `None` when it does not rotate.
    pub fn set_own_previous(&mut self, key: Option<TunnelKey>) {
        self.own_previous = key;
    }

    /// Records the new tunnel of a peer. The key that it published before it changed to another epoch is accepted
    /// until its rotation ends.
    pub fn note_peer(&mut self, peer: NodeId, before: Option<Tunnel>, now: Option<Tunnel>) {
        match (before, now) {
            (Some(old), Some(new)) if new.rotating && new.epoch != old.epoch => {
                self.previous.insert(peer, old.key);
            }
            (_, Some(new)) if new.rotating => {}
            _ => {
                self.previous.remove(&peer);
            }
        }
    }

    /// Sets the sessions of the local interfaces, and those of them from which no packet has arrived for a while.
    pub fn set_sessions(&mut self, sessions: Sessions, quiet: Sessions) {
        (self.sessions, self.quiet) = (sessions, quiet);
    }
}

/// The route to a peer through the tunnel.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PeerRoute {
    interfaces: Vec<(Device, TunnelKey, u16)>,
    output: Option<Device>,
}

impl PeerRoute {
    /// Returns the local interfaces that have the peer, with its key and port there. All of them receive. Empty while
    /// the two hosts have no epoch in common: then one of them is about to follow.
    pub fn interfaces(&self) -> &[(Device, TunnelKey, u16)] {
        &self.interfaces
    }

    /// Returns the output interface. `None` if there is no interface.
    pub fn output(&self) -> Option<Device> {
        self.output
    }
}

/// Returns the interface that listens on a port. A host has a pair of ports, of which the second is odd.
pub fn interface_of(port: u16) -> Device {
    Device::tunnel(port & 1 == 1)
}

/// Returns the other port of the pair.
pub fn other_port(port: u16) -> u16 {
    port ^ 1
}

/// Returns a host's port in an epoch, from the pair that begins with `first`.
pub fn port_in(first: u16, epoch: u32) -> u16 {
    first & !1 | u16::from(epoch & 1 == 1)
}

/// Returns the key of a local interface. `None` if the host does not have that interface now.
pub fn key_of(own: Tunnel, epochs: &KeyEpochs, device: Device) -> Option<TunnelKey> {
    match (device == interface_of(own.port), own.rotating) {
        (true, _) => Some(own.key),
        (false, true) => Some(epochs.own_previous.unwrap_or(own.key)),
        (false, false) => None,
    }
}

/// Returns the route to a peer that publishes `peer`.
pub fn route_to(own: Tunnel, epochs: &KeyEpochs, id: NodeId, peer: Tunnel) -> PeerRoute {
    let meet = |port: u16| {
        let device = interface_of(port);
        key_of(own, epochs, device)?;
        if device == interface_of(peer.port) {
            return Some((device, peer.key, peer.port));
        }
        // Without a known previous key, assume that the peer follows with the key that it has.
        let old = epochs.previous.get(&id).copied().unwrap_or(peer.key);
        peer.rotating.then_some((device, old, other_port(peer.port)))
    };
    let (later, earlier) = (meet(own.port), meet(other_port(own.port)));
    let has_session =
        |(device, key, _): &(Device, TunnelKey, u16)| epochs.sessions.contains(&(*device, *key));
    let output = match (&later, &earlier) {
        (Some(later), Some(earlier)) if !has_session(later) => Some(earlier.0),
        (Some(later), _) => Some(later.0),
        (None, earlier) => earlier.as_ref().map(|earlier| earlier.0),
    };
    PeerRoute { interfaces: [later, earlier].into_iter().flatten().collect(), output }
}

/// Returns the epoch that this host must follow to: the latest of its peers. `None` if it is there already, or until
/// its current rotation is complete.
pub fn to_follow(own: Tunnel, peers: impl Iterator<Item = Tunnel>) -> Option<u32> {
    let latest = peers.map(|peer| peer.epoch).max().filter(|epoch| *epoch > own.epoch)?;
    (!own.rotating).then_some(latest)
}

/// Returns the peers that this host waits for before it deletes its earlier interface.
pub fn awaited<'a>(
    own: Tunnel,
    epochs: &'a KeyEpochs,
    peers: impl Iterator<Item = (NodeId, Tunnel)> + 'a,
) -> impl Iterator<Item = NodeId> + 'a {
    let (later, earlier) = (interface_of(own.port), interface_of(other_port(own.port)));
    peers
        .filter(move |(id, peer)| {
            let has_moved = epochs.sessions.contains(&(later, peer.key)) && interface_of(peer.port) == later;
            let old = epochs.previous.get(id).copied().unwrap_or(peer.key);
            let session = (earlier, old);
            !has_moved || (epochs.sessions.contains(&session) && !epochs.quiet.contains(&session))
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

    /// The tunnel state of one host.
    #[derive(Debug, Clone)]
    struct Host {
        own: Tunnel,
        epochs: KeyEpochs,
        /// The tunnel that it knows of each host.
        known: Vec<Tunnel>,
        /// The routes that it has set up.
        routes: Vec<Option<PeerRoute>>,
    }

    impl Host {
        fn key(&self, device: Device) -> Option<TunnelKey> {
            key_of(self.own, &self.epochs, device)
        }

        fn port(&self, device: Device) -> u16 {
            if device == interface_of(self.own.port) { self.own.port } else { other_port(self.own.port) }
        }
    }

    /// Whether interfaces of two hosts can exchange packets: each has the other's key, and at least one knows the
    /// other's port.
    fn meet(hosts: &[Host], a: usize, at_a: Device, b: usize, at_b: Device) -> bool {
        let find = |x: usize, at: Device, y: usize| {
            hosts[x].routes[y].as_ref()?.interfaces.iter().find(|(device, ..)| *device == at).copied()
        };
        let (Some(from_a), Some(from_b)) = (find(a, at_a, b), find(b, at_b, a)) else { return false };
        let keys = Some(from_a.1) == hosts[b].key(at_b) && Some(from_b.1) == hosts[a].key(at_a);
        keys && (from_a.2 == hosts[b].port(at_b) || from_b.2 == hosts[a].port(at_a))
    }

    const INTERFACES: [bool; 2] = [false, true];

    /// Sets up the routes that are wanted now. Sessions whose interfaces both remain are kept, others begin.
    fn settle(hosts: &mut [Host], n: usize) {
        for peer in (0..HOSTS).filter(|peer| *peer != n) {
            let host = &hosts[n];
            let wanted = route_to(host.own, &host.epochs, id(peer), host.known[peer]);
            hosts[n].routes[peer] = Some(wanted);
        }
        see(hosts);
    }

    fn see(hosts: &mut [Host]) {
        let sessions: Vec<BTreeSet<(Device, TunnelKey)>> = (0..HOSTS)
            .map(|a| {
                let mut all = BTreeSet::new();
                for b in (0..HOSTS).filter(|b| *b != a) {
                    for (at_a, at_b) in INTERFACES
                        .iter()
                        .flat_map(|x| INTERFACES.map(|y| (Device::tunnel(*x), Device::tunnel(y))))
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
            host.epochs.sessions = sessions;
        }
        // A session is quiet if the peer sends by another interface.
        for a in 0..HOSTS {
            let mut quiet = BTreeSet::new();
            for b in (0..HOSTS).filter(|b| *b != a) {
                for at in INTERFACES.map(Device::tunnel) {
                    let by = hosts[b].routes[a].as_ref().and_then(|route| route.output);
                    let comes = by.is_some_and(|by| meet(hosts, b, by, a, at));
                    quiet.extend(hosts[b].key(at).filter(|_| !comes).map(|key| (at, key)));
                }
            }
            hosts[a].epochs.quiet = quiet;
        }
    }

    /// Returns a pair of hosts between which packets are lost. `None` if all packets arrive.
    fn lost(hosts: &[Host]) -> Option<(usize, usize)> {
        let pairs = (0..HOSTS).flat_map(|a| (0..HOSTS).map(move |b| (a, b))).filter(|(a, b)| a != b);
        pairs.into_iter().find(|(a, b)| {
            let by = hosts[*a].routes[*b].as_ref().and_then(|route| route.output);
            !INTERFACES.iter().any(|at| by.is_some_and(|by| meet(hosts, *a, by, *b, Device::tunnel(*at))))
        })
    }

    fn hosts() -> Vec<Host> {
        let tunnels: Vec<Tunnel> = (0..HOSTS)
            .map(|n| Tunnel {
                key: TunnelKey([n as u8; 32]),
                port: 51940,
                epoch: 0,
                rotating: false,
                kernel: true,
            })
            .collect();
        let mut hosts: Vec<Host> = tunnels
            .iter()
            .map(|own| Host {
                own: *own,
                epochs: KeyEpochs::default(),
                known: tunnels.clone(),
                routes: vec![None; HOSTS],
            })
            .collect();
        (0..HOSTS).for_each(|n| settle(&mut hosts, n));
        hosts
    }

    fn hear(hosts: &mut [Host], from: usize, to: usize) {
        let (was, is) = (hosts[to].known[from], hosts[from].own);
        let old = &mut hosts[to].epochs.previous;
        if is.rotating && was.epoch < is.epoch {
            old.insert(id(from), was.key);
        } else if !is.rotating {
            old.remove(&id(from));
        }
        hosts[to].known[from] = is;
    }

    fn waits(host: &Host, n: usize) -> bool {
        let peers = host.known.iter().copied().enumerate().filter(|(peer, _)| *peer != n);
        awaited(host.own, &host.epochs, peers.map(|(peer, tunnel)| (id(peer), tunnel))).next().is_some()
    }

    /// Moves a host to an epoch, with a new key or without.
    fn move_on(host: &mut Host, epoch: u32, fresh: Option<u8>) {
        host.epochs.own_previous = Some(host.own.key);
        let key = fresh.map_or(host.own.key, |fresh| TunnelKey([fresh; 32]));
        let rotating = (epoch ^ host.own.epoch) & 1 == 1;
        host.own = Tunnel { key, epoch, port: port_in(51940, epoch), rotating, ..host.own };
    }

    fn follow(hosts: &mut [Host], n: usize) {
        let peers = hosts[n].known.iter().copied().enumerate().filter(|(peer, _)| *peer != n);
        if let Some(epoch) = to_follow(hosts[n].own, peers.map(|(_, peer)| peer)) {
            move_on(&mut hosts[n], epoch, None);
        }
        settle(hosts, n);
    }

    #[derive(Debug, Clone, Copy)]
    enum Event {
        Rotate(usize),
        Hear(usize, usize),
        Settle(usize),
        Follow(usize),
        Finish(usize),
    }

    fn event() -> impl Strategy<Value = Event> {
        let host = || 0..HOSTS;
        prop_oneof![
            1 => host().prop_map(Event::Rotate),
            6 => (host(), host()).prop_map(|(a, b)| Event::Hear(a, b)),
            6 => host().prop_map(Event::Settle),
            4 => host().prop_map(Event::Follow),
            3 => host().prop_map(Event::Finish),
        ]
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(2_000))]
        #[test]
        fn no_packet_is_lost_at_any_moment_of_a_rotation(events in prop::collection::vec(event(), 1..80)) {
            let mut hosts = hosts();
            let mut fresh = 100;
            for event in events {
                match event {
                    // A host does not begin a rotation while it knows of another one.
                    Event::Rotate(n) if !hosts[n].own.rotating
                        && hosts[n].known.iter().all(|known| !known.rotating && known.epoch == hosts[n].own.epoch) => {
                        fresh += 1;
                        let epoch = hosts[n].own.epoch + 1;
                        move_on(&mut hosts[n], epoch, Some(fresh));
                        settle(&mut hosts, n);
                    }
                    Event::Hear(from, to) if from != to => {
                        hear(&mut hosts, from, to);
                        settle(&mut hosts, to);
                    }
                    Event::Settle(n) => settle(&mut hosts, n),
                    Event::Follow(n) => follow(&mut hosts, n),
                    Event::Finish(n) if hosts[n].own.rotating && !waits(&hosts[n], n) => {
                        hosts[n].own.rotating = false;
                        hosts[n].epochs.own_previous = None;
                        settle(&mut hosts, n);
                    }
                    _ => {}
                }
                prop_assert_eq!(lost(&hosts), None, "{:?}", event);
            }
        }
    }

    #[test]
    fn a_rotation_completes() {
        let mut hosts = hosts();
        for round in 0..3_u32 {
            move_on(&mut hosts[1], round + 1, Some(50 + round as u8));
            settle(&mut hosts, 1);
            assert!(waits(&hosts[1], 1));
            for _ in 0..3 {
                for (from, to) in
                    (0..HOSTS).flat_map(|a| (0..HOSTS).map(move |b| (a, b))).filter(|(a, b)| a != b)
                {
                    hear(&mut hosts, from, to);
                    follow(&mut hosts, to);
                    assert_eq!(lost(&hosts), None);
                }
                for n in 0..HOSTS {
                    settle(&mut hosts, n);
                    if hosts[n].own.rotating && !waits(&hosts[n], n) {
                        hosts[n].own.rotating = false;
                        hosts[n].epochs.own_previous = None;
                        settle(&mut hosts, n);
                    }
                    assert_eq!(lost(&hosts), None);
                }
            }
            // Only the new interface is left on each host.
            for (n, host) in hosts.iter().enumerate() {
                assert!(!host.own.rotating, "host {n} in round {round}");
                for route in host.routes.iter().flatten() {
                    assert_eq!(
                        (route.interfaces.len(), route.output),
                        (1, Some(interface_of(host.own.port))),
                        "host {n}: {route:?}"
                    );
                }
            }
        }
    }

    #[test]
    fn a_host_that_missed_epochs_reaches_the_others_again() {
        let mut hosts = hosts();
        for other in &mut hosts[1..] {
            move_on(other, 5, None);
            other.own.rotating = false;
        }
        for (from, to) in [(1, 0), (2, 0), (0, 1), (0, 2), (1, 2), (2, 1)] {
            hear(&mut hosts, from, to);
            follow(&mut hosts, to);
        }
        (0..HOSTS).for_each(|n| settle(&mut hosts, n));
        assert_eq!((hosts[0].own.epoch, hosts[0].own.port), (5, 51941));
        assert_eq!(lost(&hosts), None);
        // Two epochs later, the port is the same.
        let far = || [Tunnel { epoch: 7, ..hosts[1].own }].into_iter();
        assert_eq!(to_follow(Tunnel { rotating: false, ..hosts[0].own }, far()), Some(7));
        // It does not follow during a rotation of its own.
        assert_eq!(to_follow(Tunnel { rotating: true, ..hosts[0].own }, far()), None);
    }
}
