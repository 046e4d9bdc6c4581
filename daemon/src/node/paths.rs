//! Path probes: sends and receives them, and shows what they find.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::rc::Rc;
use std::time::Duration;

use ovl_cluster::addresses;
use ovl_control::{PathDirection, PathVerdict, PeerPath, PeerState};
use ovl_kernel::PathSocket;
use ovl_proto::id::NodeId;
use ovl_proto::record::Presence;
use ovl_subsystems::networks::VxlanHop;
use tokio::time::{Instant, MissedTickBehavior, interval, sleep_until};

use super::Node;
use super::state::State;
use crate::paths::frame::{Frame, Verdict};
use crate::paths::{self, Candidate, Direction, Ends};
use crate::problems::Code;

/// Time without a direct datagram of gossip after which a host is not vouched for. Gossip pings every 0.6 s.
const VOUCHED: Duration = Duration::from_millis(1300);
/// The longest frame that is received, in bytes.
const MAX_FRAME: usize = 9216 + 14;
/// The number of frames that are read in each [`PERIOD`], which bounds what a flood costs.
const BATCH: usize = 64;
/// See [`BATCH`].
const PERIOD: Duration = Duration::from_millis(50);
/// The ticks between two choices of the hosts that are watched.
const TICKS_OF_CHOICE: u32 = 5;

impl Node {
    /// Sends path probes forever.
    pub(super) async fn path_loop(self: Rc<Self>) {
        let Some(socket) = &self.path_socket else { return std::future::pending().await };
        let mut ticks = interval(paths::TICK);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut hops = BTreeMap::new();
        for count in 0u32.. {
            ticks.tick().await;
            if count.is_multiple_of(TICKS_OF_CHOICE) {
                hops = self.path_hops();
                let state = self.state.borrow();
                let candidates = hops.iter().filter_map(|(id, hop)| {
                    let run = state.view.nodes.get(id)?.record.generation;
                    Some((*id, Candidate { run, mtu: hop.mtu }))
                });
                self.paths.borrow_mut().follow(candidates.collect(), state.epoch.elapsed());
            }
            self.send_probes(socket, &hops);
        }
    }

    /// Receives path probes forever.
    pub(super) async fn path_receive_loop(self: Rc<Self>) {
        let Some(socket) = &self.path_socket else { return std::future::pending().await };
        let mut buffer = vec![0; MAX_FRAME];
        loop {
            let started = Instant::now();
            for _ in 0..BATCH {
                match socket.receive(&mut buffer).await {
                    Ok(Some(length)) => self.take_probe(buffer.get(..length).unwrap_or_default()),
                    Ok(None) => {}
                    Err(error) => {
                        tracing::debug!(%error, "cannot receive path probes");
                        break;
                    }
                }
            }
            sleep_until(started + PERIOD).await;
        }
    }

    /// Returns the hosts that can be probed, with the VXLAN device that leads to each.
    fn path_hops(&self) -> BTreeMap<NodeId, VxlanHop> {
        let state = self.state.borrow();
        if !state.is_member() {
            return BTreeMap::new();
        }
        let is_probed = |id: &NodeId| {
            state.view.nodes.get(id).is_some_and(|node| {
                node.record.probes == paths::frame::VERSION
                    && node.record.presence == Presence::Running
                    && node.state == PeerState::Alive
                    && state.view.alloc.members.contains(id)
            })
        };
        let networks = &state.subsystems.networks;
        let others = state.peers.keys().filter(|id| is_probed(id));
        others.filter_map(|id| Some((*id, networks.vxlan_to(&state.view, *id)?))).collect()
    }

    fn send_probes(&self, socket: &PathSocket, hops: &BTreeMap<NodeId, VxlanHop>) {
        let contacts = self.gossip().contacts();
        let vouches = |id| contacts.get(&id).is_some_and(|contact| contact.last_heard.elapsed() < VOUCHED);
        let state = self.state.borrow();
        let Some(own) = state.record() else { return };
        let due = self.paths.borrow_mut().tick(state.epoch.elapsed(), own.generation, vouches);
        for (frame, mtu) in due.probes {
            let (Some(hop), Some(peer)) = (hops.get(&frame.to), state.view.nodes.get(&frame.to)) else {
                continue;
            };
            let ring = &state.keys.ring;
            let mut opened = ring.all().filter(|key| peer.record.keys.has(key.id()));
            let key = opened.next().unwrap_or(ring.sealing());
            let macs = [frame.from, frame.to].map(|host| addresses::mac_of_host(hop.network, host));
            if let Err(error) = socket.send(hop.device, &frame.encode(macs, key, mtu)) {
                tracing::debug!(to = %frame.to, device = %hop.device, %error, "cannot send a path probe");
            }
        }
        drop(state);
        for (host, mtu) in due.limits {
            self.limit_path(host, mtu);
        }
        self.tell_paths();
    }

    /// Publishes that only packets of workloads up to a length pass to a host.
    fn limit_path(&self, host: NodeId, mtu: u16) {
        let link = {
            let mut state = self.state.borrow_mut();
            let State { view, path_limits, .. } = &mut *state;
            let Some(own) = view.own() else { return };
            path_limits.retain(|id, _| view.nodes.contains_key(id));
            path_limits.insert(host, mtu);
            own.record.link_mtu
        };
        let known = self.gossip().path_mtus().get(&host).copied().unwrap_or(link);
        self.note_path_mtu(host, known);
    }

    /// Raises and clears the problems of all paths.
    fn tell_paths(&self) {
        let paths = self.paths.borrow();
        let mut state = self.state.borrow_mut();
        let now = state.epoch.elapsed();
        let Some(own) = state.record() else { return };
        let (mut broken, mut narrow) = (Vec::new(), Vec::new());
        for (id, path) in paths.all(now) {
            if !path.is_broken() {
                continue;
            }
            let Some(peer) = state.view.nodes.get(&id).map(|node| &node.record) else { continue };
            let Some(hop) = state.subsystems.networks.vxlan_to(&state.view, id) else { continue };
            let ends = Ends {
                name: &peer.name,
                here: SocketAddr::new(own.vtep, own.vxlan_port),
                there: SocketAddr::new(hop.remote.vtep, hop.remote.port),
                mtu: hop.mtu,
            };
            broken.extend(ends.broken(&path).map(|sentence| (peer.name.clone(), sentence)));
            narrow.extend(ends.narrow(&path).map(|sentence| (peer.name.clone(), sentence)));
        }
        let limits = state.path_limits.iter();
        let limited: Vec<(String, String)> = limits
            .filter_map(|(id, limit)| {
                let peer = &state.view.nodes.get(id)?.record;
                Some((peer.name.clone(), paths::limited(&peer.name, *limit)))
            })
            .collect();
        for (code, found) in
            [(Code::PathBroken, broken), (Code::PathNarrow, narrow), (Code::PathLimited, limited)]
        {
            let before: BTreeSet<String> =
                state.problems.of(code).map(|(object, _)| object.to_owned()).collect();
            for (name, sentence) in found.iter().filter(|(name, _)| !before.contains(name)) {
                self.event("path", name, sentence);
            }
            for name in before.iter().filter(|name| !found.iter().any(|(found, _)| found == *name)) {
                self.event("path", name, "packets pass again");
            }
            state.problems.replace(code, found);
        }
    }

    /// Returns the probed paths to a host, for `ovlctl peers`.
    pub(super) fn peer_paths(&self, state: &State, host: NodeId) -> Vec<PeerPath> {
        let Some(path) = self.paths.borrow().state(host, state.epoch.elapsed()) else { return Vec::new() };
        let Some(hop) = state.subsystems.networks.vxlan_to(&state.view, host) else { return Vec::new() };
        let network = state.view.networks.get(&hop.network).map(|found| found.network.name.clone());
        vec![PeerPath {
            encapsulation: "vxlan".to_owned(),
            network: network.unwrap_or_default(),
            mtu: hop.mtu,
            sent: direction(path.sent),
            received: direction(path.received),
            rtt_us: path.round_trip.map(|trip| u64::try_from(trip.as_micros()).unwrap_or(u64::MAX)),
        }]
    }

    fn take_probe(&self, bytes: &[u8]) {
        let state = self.state.borrow();
        let Some(own) = state.record() else { return };
        match Frame::decode(bytes, own.id, &state.keys.ring) {
            Ok(frame) => self.paths.borrow_mut().take(&frame, own.generation, state.epoch.elapsed()),
            Err(error) => tracing::debug!(%error, "passed over a path probe"),
        }
    }
}

fn direction(of: Direction) -> PathDirection {
    let state = match (of.small, of.large) {
        (Verdict::Unknown, _) => PathVerdict::Unknown,
        (Verdict::Broken, _) => PathVerdict::Broken,
        (Verdict::Works | Verdict::Doubtful, Verdict::Broken) => PathVerdict::SmallOnly,
        (Verdict::Works | Verdict::Doubtful, _) => PathVerdict::Works,
    };
    PathDirection { state, loss_percent: of.loss_percent }
}
