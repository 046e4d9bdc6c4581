//! Path probes: sends and receives them, and shows what they find.

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::net::SocketAddr;
use std::rc::Rc;
use std::time::Duration;

use ovl_cluster::addresses;
use ovl_control::{PathDirection, PathVerdict, PeerPath, PeerState};
use ovl_dataplane::device::Device;
use ovl_kernel::PathSocket;
use ovl_mesh::keys::ClusterKey;
use ovl_proto::id::NodeId;
use ovl_proto::record::{NodeRecord, Presence, probe_kinds};
use ovl_subsystems::Change;
use ovl_subsystems::networks::{DirectHop, VxlanHop};
use ovl_udp::trial::Offload;
use tokio::time::{Instant, MissedTickBehavior, interval, sleep_until};

use super::Node;
use super::state::State;
use crate::paths::frame::{Frame, Size, Verdict};
use crate::paths::{self, Candidate, DirectEnds, Direction, Ends, PathState, Paths};
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

/// Receives forever, at most [`BATCH`] packets in each [`PERIOD`]. `what` names them in the log.
async fn receive_batches(what: &str, mut receive: impl AsyncFnMut(&mut [u8]) -> io::Result<()>) {
    let mut buffer = vec![0; MAX_FRAME];
    loop {
        let started = Instant::now();
        for _ in 0..BATCH {
            if let Err(error) = receive(&mut buffer).await {
                tracing::debug!(%error, "cannot receive {what}");
                break;
            }
        }
        sleep_until(started + PERIOD).await;
    }
}

impl Node {
    /// Sends path probes forever.
    pub(super) async fn path_loop(self: Rc<Self>) {
        let Some(socket) = &self.path_socket else { return std::future::pending().await };
        let mut ticks = interval(paths::TICK);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let (mut hops, mut direct_hops) = (BTreeMap::new(), BTreeMap::new());
        let mut offloads = BTreeSet::new();
        for count in 0u32.. {
            ticks.tick().await;
            if count.is_multiple_of(TICKS_OF_CHOICE) {
                hops = self.path_hops();
                direct_hops = self.direct_hops();
                self.follow_paths(&self.paths, hops.iter().map(|(id, hop)| (*id, hop.mtu)));
                self.follow_paths(&self.direct_paths, direct_hops.iter().map(|(id, hop)| (*id, hop.mtu)));
                self.note_offloads();
                self.set_offloads(socket, &mut offloads);
            }
            let vouches = self.vouches();
            self.send_probes(socket, &hops, &vouches);
            self.send_direct_probes(socket, &direct_hops, &vouches);
            self.tell_paths();
        }
    }

    /// Tells the paths of a kind which hosts can be probed, each with the length of the longest packet to it in bytes.
    fn follow_paths(&self, paths: &RefCell<Paths>, hosts: impl Iterator<Item = (NodeId, u16)>) {
        let state = self.state.borrow();
        let candidates = hosts.filter_map(|(id, mtu)| {
            let record = &state.view.nodes.get(&id)?.record;
            let tries_offload =
                record.probe_kinds & probe_kinds::OFFLOAD != 0 && !state.path_faults.has_damage();
            Some((id, Candidate { run: record.generation, mtu, tries_offload }))
        });
        paths.borrow_mut().follow(candidates.collect(), state.clock.elapsed());
    }

    /// Receives path probes forever.
    pub(super) async fn path_receive_loop(self: Rc<Self>) {
        let Some(socket) = &self.path_socket else { return std::future::pending().await };
        receive_batches("path probes", async |buffer| {
            if let Some(length) = socket.receive(buffer).await? {
                self.take_probe(buffer.get(..length).unwrap_or_default());
            }
            Ok(())
        })
        .await;
    }

    /// Receives path probes by direct routes forever.
    pub(super) async fn direct_receive_loop(self: Rc<Self>) {
        let Some(socket) = &self.path_socket else { return std::future::pending().await };
        receive_batches("path probes by direct routes", async |buffer| {
            if let Some(payload) = socket.receive_echo(buffer).await? {
                self.take_echo(buffer.get(payload).unwrap_or_default());
            }
            Ok(())
        })
        .await;
    }

    /// Receives probes of the offload of checksums forever.
    pub(super) async fn offload_receive_loop(self: Rc<Self>) {
        let Some(socket) = &self.path_socket else { return std::future::pending().await };
        receive_batches("path probes in datagrams", async |buffer| {
            let length = socket.receive_datagram(buffer).await?;
            self.take_datagram(buffer.get(..length).unwrap_or_default());
            Ok(())
        })
        .await;
    }

    /// Lets new VXLAN devices leave checksums to what is below; lets all compute checksums themselves while that is known to
    /// damage packets. `done` has the devices that are known.
    fn set_offloads(&self, socket: &PathSocket, done: &mut BTreeSet<Device>) {
        let state = self.state.borrow();
        let on = !state.path_faults.has_damage();
        let devices: BTreeSet<Device> = state.subsystems.networks.vxlan_devices().collect();
        done.retain(|device| devices.contains(device));
        for device in devices {
            // A device that was made again has the offload.
            if on && done.contains(&device) {
                continue;
            }
            match socket.set_checksum_offload(device, on) {
                Ok(()) => _ = done.insert(device),
                Err(error) => tracing::debug!(%device, %error, "cannot change the offload of checksums"),
            }
        }
    }

    /// Notes the hosts to which packets are lost whose checksums are left to the offload.
    fn note_offloads(&self) {
        let mut state = self.state.borrow_mut();
        let now = state.clock.elapsed();
        let State { view, path_faults, .. } = &mut *state;
        path_faults.keep(|id| view.nodes.contains_key(id));
        let paths = self.paths.borrow();
        let damaged = paths.all(now).filter(|(_, path)| path.offload == Offload::Damages);
        damaged.for_each(|(id, _)| path_faults.note_damage(id));
    }

    /// Returns the hosts that can be probed, with the VXLAN device that leads to each.
    fn path_hops(&self) -> BTreeMap<NodeId, VxlanHop> {
        let state = self.state.borrow();
        let networks = &state.subsystems.networks;
        let others = state
            .peers
            .iter()
            .map(|(id, _)| id)
            .filter(|id| is_probed(&state, *id, |record| record.probes == paths::frame::VERSION));
        others.filter_map(|id| Some((id, networks.vxlan_to(&state.view, id)?))).collect()
    }

    /// Returns the hosts that can be probed by a direct route, with the way to each.
    fn direct_hops(&self) -> BTreeMap<NodeId, DirectHop> {
        let state = self.state.borrow();
        let mut hops = state.subsystems.networks.direct_hops(&state.view);
        hops.retain(|id, _| is_probed(&state, *id, |record| record.probe_kinds & probe_kinds::DIRECT != 0));
        hops
    }

    /// Returns whether gossip heard a host a moment ago.
    fn vouches(&self) -> impl Fn(NodeId) -> bool {
        let gossip = self.gossip();
        move |id| gossip.last_heard(id).is_some_and(|heard| heard.elapsed() < VOUCHED)
    }

    fn send_probes(
        &self,
        socket: &PathSocket,
        hops: &BTreeMap<NodeId, VxlanHop>,
        vouches: impl Fn(NodeId) -> bool,
    ) {
        let state = self.state.borrow();
        let Some(own) = state.record() else { return };
        let due = self.paths.borrow_mut().tick(state.clock.elapsed(), own.generation, vouches);
        for (frame, mtu) in due.probes {
            let (Some(hop), Some(key)) = (hops.get(&frame.to), key_to(&state, frame.to)) else { continue };
            let macs = [frame.from, frame.to].map(|host| addresses::mac_of_host(hop.network, host));
            let sent = match frame.size {
                Size::Partial | Size::Complete => {
                    let Some(peer) = state.view.nodes.get(&frame.to) else { continue };
                    let port = peer.record.address.port();
                    let is_complete = frame.size == Size::Complete;
                    socket.send_datagram(hop.device, macs, port, &frame.encode_payload(key), is_complete)
                }
                Size::Small | Size::Large | Size::Trial | Size::Direct => {
                    socket.send(hop.device, &frame.encode(macs, key, mtu))
                }
            };
            if let Err(error) = sent {
                tracing::debug!(to = %frame.to, device = %hop.device, %error, "cannot send a path probe");
            }
        }
        drop(state);
        for (host, mtu) in due.limits {
            self.limit_path(host, mtu);
        }
    }

    fn send_direct_probes(
        &self,
        socket: &PathSocket,
        hops: &BTreeMap<NodeId, DirectHop>,
        vouches: impl Fn(NodeId) -> bool,
    ) {
        let state = self.state.borrow();
        let Some(own) = state.record() else { return };
        let due = self.direct_paths.borrow_mut().tick(state.clock.elapsed(), own.generation, vouches);
        for (frame, _) in due.probes {
            let (Some(hop), Some(key)) = (hops.get(&frame.to), key_to(&state, frame.to)) else { continue };
            if let Err(error) = socket.send_echo(hop.gateway, &frame.encode_payload(key)) {
                tracing::debug!(to = %frame.to, gateway = %hop.gateway, %error, "cannot send a path probe");
            }
        }
    }

    /// Publishes that only packets of workloads up to a length pass to a host.
    fn limit_path(&self, host: NodeId, mtu: u16) {
        {
            let mut state = self.state.borrow_mut();
            let State { view, path_faults, .. } = &mut *state;
            path_faults.keep(|id| view.nodes.contains_key(id));
            path_faults.note_limit(host, mtu);
        }
        self.renew_path_mtu(host);
    }

    /// Raises and clears the problems of all paths.
    fn tell_paths(&self) {
        let paths = self.paths.borrow();
        let mut state = self.state.borrow_mut();
        let now = state.clock.elapsed();
        let Some(own) = state.record() else { return };
        let (mut broken, mut narrow, mut lost) = (Vec::new(), Vec::new(), BTreeSet::new());
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
            let sentence = ends.broken(&path);
            lost.extend(sentence.is_some().then_some(id));
            broken.extend(sentence.map(|sentence| (peer.name.clone(), sentence)));
            narrow.extend(ends.narrow(&path).map(|sentence| (peer.name.clone(), sentence)));
        }
        let direct = self.broken_direct_paths(&state);
        let said = |id: &NodeId, sentence: &dyn Fn(&str) -> String| {
            let name = &state.view.nodes.get(id)?.record.name;
            Some((name.clone(), sentence(name)))
        };
        let limits = state.path_faults.limits();
        let limited =
            limits.filter_map(|(id, limit)| said(&id, &|name| paths::limited(name, limit))).collect();
        let damaged = state.path_faults.damaged();
        let unfinished = damaged.filter_map(|id| said(&id, &paths::unfinished)).collect();
        for (code, found) in [
            (Code::PathBroken, broken),
            (Code::PathNarrow, narrow),
            (Code::PathLimited, limited),
            (Code::DirectBroken, direct),
            (Code::ChecksumOffload, unfinished),
        ] {
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
        if state.local.lost_vxlan.replace(lost) {
            state.changed(Change::Tunnel);
            self.work.notify_one();
        }
    }

    /// Returns the name of each host to which or from which no directly routed packet passes, with the sentence that says so.
    fn broken_direct_paths(&self, state: &State) -> Vec<(String, String)> {
        let paths = self.direct_paths.borrow();
        let broken: Vec<(NodeId, PathState)> =
            paths.all(state.clock.elapsed()).filter(|(_, path)| path.is_broken()).collect();
        if broken.is_empty() {
            return Vec::new();
        }
        let Some(own) = state.record() else { return Vec::new() };
        let hops = state.subsystems.networks.direct_hops(&state.view);
        let sentence = |(id, path): (NodeId, PathState)| {
            let (hop, peer) = (hops.get(&id)?, &state.view.nodes.get(&id)?.record);
            let ends = DirectEnds {
                name: &peer.name,
                network: &state.view.networks.get(&hop.network)?.network.name,
                subnet: hop.subnet,
                here: own.vtep,
                there: peer.vtep,
            };
            Some((peer.name.clone(), ends.broken(&path)?))
        };
        broken.into_iter().filter_map(sentence).collect()
    }

    /// Returns the probed paths to a host, for `ovlctl peers`. `direct_hops` are the direct ways to all hosts.
    pub(super) fn peer_paths(
        &self,
        state: &State,
        direct_hops: &BTreeMap<NodeId, DirectHop>,
        host: NodeId,
    ) -> Vec<PeerPath> {
        let (now, networks) = (state.clock.elapsed(), &state.subsystems.networks);
        let shown = |encapsulation: &str, network, mtu, path: PathState| {
            let network = state.view.networks.get(&network).map(|found| found.network.name.clone());
            let why_not_fast = why_not_fast(state, encapsulation).map(str::to_owned);
            PeerPath {
                encapsulation: encapsulation.to_owned(),
                network: network.unwrap_or_default(),
                mtu,
                sent: direction(path.sent),
                received: direction(path.received),
                rtt_us: path.round_trip.map(|trip| u64::try_from(trip.as_micros()).unwrap_or(u64::MAX)),
                fast: why_not_fast.is_none(),
                why_not_fast,
            }
        };
        let vxlan = self.paths.borrow().state(host, now).and_then(|path| {
            let hop = networks.vxlan_to(&state.view, host)?;
            Some(shown("vxlan", hop.network, hop.mtu, path))
        });
        let direct = self.direct_paths.borrow().state(host, now).and_then(|path| {
            let hop = direct_hops.get(&host)?;
            Some(shown("direct", hop.network, hop.mtu, path))
        });
        vxlan.into_iter().chain(direct).collect()
    }

    fn take_probe(&self, bytes: &[u8]) {
        let state = self.state.borrow();
        let Some(own) = state.record() else { return };
        match Frame::decode(bytes, own.id, state.keys.ring()) {
            // Probes of the offload come by another socket.
            Ok(Frame { size: Size::Partial | Size::Complete, .. }) => {}
            Ok(frame) => self.paths.borrow_mut().take(&frame, own.generation, state.clock.elapsed()),
            Err(error) => tracing::debug!(%error, "passed over a path probe"),
        }
    }

    fn take_datagram(&self, bytes: &[u8]) {
        let state = self.state.borrow();
        let Some(own) = state.record() else { return };
        match Frame::decode_payload(bytes, own.id, state.keys.ring()) {
            Ok(frame) if matches!(frame.size, Size::Partial | Size::Complete) => {
                self.paths.borrow_mut().take(&frame, own.generation, state.clock.elapsed());
            }
            Ok(_) => {}
            Err(error) => tracing::debug!(%error, "passed over a path probe in a datagram"),
        }
    }

    fn take_echo(&self, bytes: &[u8]) {
        let state = self.state.borrow();
        let Some(own) = state.record() else { return };
        // Most echo requests are pings of other programs.
        if let Ok(frame) = Frame::decode_payload(bytes, own.id, state.keys.ring()) {
            self.direct_paths.borrow_mut().take(&frame, own.generation, state.clock.elapsed());
        }
    }
}

/// Whether a host is a member that is there, and `answers` probes by its record.
fn is_probed(state: &State, id: NodeId, answers: impl Fn(&NodeRecord) -> bool) -> bool {
    state.is_member()
        && state.view.alloc.members.contains(&id)
        && state.view.nodes.get(&id).is_some_and(|node| {
            node.record.presence == Presence::Running
                && node.state == PeerState::Alive
                && answers(&node.record)
        })
}

/// Returns the key to authenticate a probe to a host with. `None` if the host is unknown.
fn key_to(state: &State, host: NodeId) -> Option<&ClusterKey> {
    let (ring, peer) = (state.keys.ring(), state.view.nodes.get(&host)?);
    let mut opened = ring.all().filter(|key| peer.record.keys.has(key.id()));
    Some(opened.next().unwrap_or(ring.sealing()))
}

/// Returns why packets to other hosts do not take the fast path by this encapsulation.
fn why_not_fast<'a>(state: &'a State, encapsulation: &str) -> Option<&'a str> {
    let is_ipv6 = state.record().is_some_and(|own| own.vtep.is_ipv6());
    let over_ipv6 =
        (is_ipv6 && encapsulation == "vxlan").then_some("the kernel's device writes VXLAN over IPv6");
    let paused = state.local.fast.is_paused().then_some("it pauses, because packets are followed");
    state.local.fast.why_not().or(over_ipv6).or(paused)
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
