//! The tunnel: its implementation, measurements, key rotation and problems.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::net::IpAddr;
use std::rc::Rc;
use std::time::Duration;

use ovl_control::{KeyStatus, PeerState, PeerTunnel};
use ovl_dataplane::device::Device;
use ovl_dataplane::state::TunnelKind;
use ovl_kernel::{self as kernel, KernelHandle, TunnelPeerStatus, TunnelStatus};
use ovl_mesh::keys::TunnelSecret;
use ovl_proto::id::{NodeId, TunnelKey};
use ovl_proto::record;
use ovl_subsystems::encryption::tunnel;
use ovl_subsystems::local::epochs;
use tokio::time::Instant;

use super::state::State;
use super::{Failed, Node};
use crate::config::{Config, TunnelMode};
use crate::problems::{Code, Problem};
use ovl_subsystems::Change;

/// Interval of the probes of each peer. Probes also keep sessions up, so that the first packet need not wait
/// for a handshake.
const EVERY: Duration = Duration::from_secs(3);
/// Interval of the checks during a rotation.
const SOON: Duration = Duration::from_millis(250);
/// Time without received data after which a peer no longer sends through a WireGuard interface. It is longer
/// than two probe intervals.
const QUIET: Duration = Duration::from_secs(7);
/// Time limit for the answer to a probe. A later answer counts as lost.
const ANSWER_WITHIN: Duration = Duration::from_secs(2);
/// Number of probes over which loss is measured.
const WINDOW: usize = 20;
/// Time limit for the first handshake with a new peer.
const FIRST_WITHIN: Duration = Duration::from_secs(15);
/// Maximum age of a handshake. WireGuard's sessions expire after three minutes and are renewed after two.
const RENEWED_WITHIN: Duration = Duration::from_secs(180);

/// WireGuard interfaces, each with the key of a peer on it.
type Places = BTreeSet<(Device, TunnelKey)>;

/// State of the tunnel.
#[derive(Debug)]
pub(super) struct Tunnel {
    /// The tunnel keys that are on the disk.
    secret: TunnelSecret,
    /// Received bytes by WireGuard interface and key, and the time of the last increase.
    heard: BTreeMap<(Device, TunnelKey), (u64, Instant)>,
    /// Reason why this host has no tunnel. `None` if it has one.
    missing: Option<String>,
    /// Number of dropped packets by reason.
    drops: Vec<(&'static str, u64)>,
    peers: BTreeMap<NodeId, Watched>,
}

/// A peer that is reached through the tunnel, or should be.
#[derive(Debug)]
struct Watched {
    since: Instant,
    status: Option<TunnelPeerStatus>,
    /// Whether each of the last probes was answered.
    answered: VecDeque<bool>,
    round_trip: Option<Duration>,
}

/// Chooses the tunnel that this host publishes, or returns the reason why it has none.
pub(super) async fn choose(
    config: &Config,
    secret: &TunnelSecret,
    kernel: &KernelHandle,
) -> (Option<record::Tunnel>, Option<String>) {
    if !kernel::has_inet6() {
        let sentence = "this kernel has no IPv6 (ipv6.disable=1), which the tunnel needs inside, whatever the \
                        underlay is: nothing passes between this host and others on encrypted networks. Start the \
                        kernel with IPv6";
        return (None, Some(sentence.to_owned()));
    }
    let has_wireguard = match config.tunnel {
        TunnelMode::Userspace => false,
        TunnelMode::Auto | TunnelMode::Kernel => kernel.has_wireguard().await.unwrap_or(false),
    };
    if config.tunnel == TunnelMode::Kernel && !has_wireguard {
        let sentence = "tunnel = \"kernel\", and this kernel makes no WireGuard devices (`modprobe wireguard`): \
                        nothing passes between this host and others on encrypted networks. Load the module and \
                        restart ovld, or let ovld do it with tunnel = \"userspace\"";
        return (None, Some(sentence.to_owned()));
    }
    let end = record::Tunnel {
        key: secret.public(),
        port: epochs::port_in(config.tunnel_port, secret.epoch()),
        epoch: secret.epoch(),
        rotating: secret.previous().is_some(),
        kernel: has_wireguard,
    };
    (Some(end), None)
}

/// Returns the name of a kind of tunnel, as `encryption` shows it.
pub(super) fn name(kind: TunnelKind) -> &'static str {
    match kind {
        TunnelKind::Kernel => "wireguard (kernel)",
        TunnelKind::Userspace => "wireguard (userspace)",
    }
}

/// Returns the kind of tunnel in use. `None` if this host has no tunnel, or no network needs it.
pub(super) fn kind(state: &State) -> Option<TunnelKind> {
    let (_, end) = tunnel::own(&state.view).filter(|_| tunnel::is_wanted(&state.view))?;
    Some(if end.kernel { TunnelKind::Kernel } else { TunnelKind::Userspace })
}

impl Tunnel {
    /// Creates the state of a tunnel without measurements. `missing` is the reason why there is none.
    pub(super) fn new(secret: TunnelSecret, missing: Option<String>) -> Self {
        Self { secret, heard: BTreeMap::new(), missing, drops: Vec::new(), peers: BTreeMap::new() }
    }

    /// Returns the peers with a session on each WireGuard interface, and those that no longer send anything.
    fn listen(&mut self, found: &[TunnelStatus]) -> (Places, Places) {
        let all = || found.iter().flat_map(|end| end.peers.iter().map(|peer| ((end.device, peer.key), peer)));
        let mut heard = BTreeMap::new();
        for (place, peer) in all() {
            let before = self.heard.get(&place).copied().filter(|(received, _)| *received == peer.received);
            heard.insert(place, before.unwrap_or((peer.received, Instant::now())));
        }
        self.heard = heard;
        let is_fresh =
            |peer: &TunnelPeerStatus| peer.last_handshake.is_some_and(|last| last < RENEWED_WITHIN);
        let sessions = all().filter(|(_, peer)| is_fresh(peer)).map(|(place, _)| place).collect();
        let quiet = self.heard.iter().filter(|(_, (_, since))| since.elapsed() > QUIET);
        (sessions, quiet.map(|(place, _)| *place).collect())
    }
}

impl Node {
    /// Watches the tunnel forever.
    pub(super) async fn tunnel_loop(self: Rc<Self>) {
        let mut probed: Option<Instant> = None;
        loop {
            self.look_at_tunnel().await;
            self.settle_tunnel();
            self.follow_tunnel().await;
            if probed.is_none_or(|at| at.elapsed() >= EVERY) {
                probed = Some(Instant::now());
                for (id, address) in self.tunnel_targets() {
                    let node = Rc::clone(&self);
                    tokio::task::spawn_local(async move { node.probe_tunnel(id, address).await });
                }
            }
            let pause = if self.is_tunnel_moving() { SOON } else { EVERY };
            tokio::select! {
                () = tokio::time::sleep(pause) => {}
                () = self.tunnel_turn.notified() => {}
            }
        }
    }

    /// Whether this host or a peer is changing to another key epoch.
    fn is_tunnel_moving(&self) -> bool {
        let state = self.state.borrow();
        let own = tunnel::own(&state.view).filter(|_| tunnel::is_wanted(&state.view));
        own.is_some_and(|(_, own)| {
            own.rotating || tunnel::peers(&state.view).values().any(|(_, end)| end.rotating)
        })
    }

    /// Changes to the key epoch that a peer has changed to.
    async fn follow_tunnel(&self) {
        let (epoch, stands) = {
            let state = self.state.borrow();
            let Some((_, own)) = tunnel::own(&state.view) else { return };
            let peers = tunnel::peers(&state.view);
            let Some(epoch) = epochs::to_follow(own, peers.values().map(|(_, end)| *end)) else { return };
            // Two interfaces are needed only if the ports differ and a network is encrypted.
            (epoch, tunnel::is_wanted(&state.view) && (epoch ^ own.epoch) & 1 == 1)
        };
        let before = self.tunnel.borrow().secret.clone();
        let moved = before.with_epoch(epoch, Some(&before).filter(|_| stands));
        if let Err(failed) = self.move_tunnel(moved).await {
            let sentence = failed.0.message;
            tracing::warn!("the tunnel cannot follow to another epoch: {sentence}");
        }
    }

    /// Saves the tunnel keys with their epoch, and then publishes them.
    async fn move_tunnel(&self, secret: TunnelSecret) -> Result<(), Failed> {
        let io = |error: anyhow::Error| Failed::unavailable(format!("{error:#}"));
        secret.save(&self.config.state_dir.join("tunnel.key")).map_err(io)?;
        for key in secret.private() {
            self.kernel.learn_key(key).await.map_err(Failed::from)?;
        }
        self.state.borrow_mut().local.key_epochs.set_own_previous(secret.previous());
        self.change_record(|record| {
            if let Some(end) = &mut record.tunnel {
                (end.key, end.epoch, end.rotating) =
                    (secret.public(), secret.epoch(), secret.previous().is_some());
                end.port = epochs::port_in(self.config.tunnel_port, end.epoch);
            }
        });
        self.tunnel.borrow_mut().secret = secret;
        self.state.borrow_mut().changed(Change::Tunnel);
        self.work.notify_one();
        self.tunnel_turn.notify_one();
        Ok(())
    }

    /// Asks the kernel worker for the state of each WireGuard peer.
    pub(super) async fn look_at_tunnel(&self) {
        let wanted = kind(&self.state.borrow()).is_some();
        let ends = match wanted {
            true => self.kernel.tunnels().await,
            false => Ok(Vec::new()),
        };
        let ends = ends.unwrap_or_else(|error| {
            tracing::warn!(%error, "cannot ask how the tunnel does");
            Vec::new()
        });
        let mut guard = self.tunnel.borrow_mut();
        let watch = &mut *guard;
        let (sessions, quiet) = watch.listen(&ends);
        {
            let mut guard = self.state.borrow_mut();
            let state = &mut *guard;
            let before = tunnel::peer_routes(&state.view, &state.local.key_epochs);
            state.local.key_epochs.set_sessions(sessions, quiet);
            if tunnel::peer_routes(&state.view, &state.local.key_epochs) != before {
                state.changed(Change::Tunnel);
                self.work.notify_one();
            }
        }
        let state = self.state.borrow();
        let reached = if wanted { tunnel::peers(&state.view) } else { BTreeMap::new() };
        let routes = tunnel::peer_routes(&state.view, &state.local.key_epochs);
        watch.drops = ends.iter().flat_map(|end| end.drops.iter().copied()).collect();
        watch.peers.retain(|id, _| reached.contains_key(id));
        for id in reached.into_keys() {
            let watched = watch.peers.entry(id).or_insert_with(|| Watched {
                since: Instant::now(),
                status: None,
                answered: VecDeque::with_capacity(WINDOW),
                round_trip: None,
            });
            // Measure the WireGuard interface that carries packets to this host now.
            let Some(route) = routes.get(&id) else { continue };
            let mut here =
                ends.iter().filter(|end| Some(end.device) == route.output()).flat_map(|end| &end.peers);
            let keys: Vec<TunnelKey> = route
                .interfaces()
                .iter()
                .filter(|(device, ..)| Some(*device) == route.output())
                .map(|(_, key, _)| *key)
                .collect();
            watched.status = here.rfind(|status| keys.contains(&status.key)).cloned();
        }
    }

    /// Rotates the tunnel key of this host, for `ovlctl key rotate`. Returns when the new key is saved and
    /// published. The peers follow without further requests.
    pub(super) async fn rotate_tunnel_key(&self) -> Result<KeyStatus, Failed> {
        let (epoch, stands) = {
            let state = self.state.borrow();
            let Some((_, own)) = tunnel::own(&state.view) else {
                return Err(Failed::unavailable(
                    "this host has no tunnel, or is no member of the cluster yet; `ovlctl status` says why",
                ));
            };
            if own.rotating {
                return Err(Failed::conflict(
                    "a tunnel key is being rotated, and this host takes part; `ovlctl key status` says who is waited for",
                ));
            }
            let peers = tunnel::peers(&state.view);
            let busy = peers.values().find(|(_, end)| end.rotating || end.epoch != own.epoch);
            if let Some((node, _)) = busy {
                return Err(Failed::conflict(format!(
                    "a tunnel key is being rotated, and host {} takes part; try again in some seconds",
                    node.record.name
                )));
            }
            (own.epoch, tunnel::is_wanted(&state.view))
        };
        let before = self.tunnel.borrow().secret.clone();
        let fresh = before.with_new_key().map_err(|error| Failed::unavailable(format!("{error:#}")))?;
        // Without an encrypted network, there are no sessions to preserve.
        let moved = if stands { fresh.with_epoch(epoch.wrapping_add(1), Some(&before)) } else { fresh };
        let key = moved.public();
        self.move_tunnel(moved).await?;
        self.event("key", &key.to_string(), "this host has a new tunnel key, by request");
        self.key_status()
    }

    /// Ends the rotation of the tunnel key and deletes the previous key, when no host uses that any more.
    fn settle_tunnel(&self) {
        {
            let state = self.state.borrow();
            let is_moving = tunnel::own(&state.view).is_some_and(|(_, own)| own.rotating);
            if !is_moving || self.tunnel_awaits(&state).next().is_some() {
                return;
            }
        }
        let settled = self.tunnel.borrow().secret.without_previous();
        if let Err(error) = settled.save(&self.config.state_dir.join("tunnel.key")) {
            tracing::warn!("the old key of the tunnel cannot be given up: {error:#}");
            return;
        }
        self.tunnel.borrow_mut().secret = settled;
        self.state.borrow_mut().local.key_epochs.set_own_previous(None);
        self.change_record(|record| {
            if let Some(end) = &mut record.tunnel {
                end.rotating = false;
            }
        });
        self.event("key", "", "the tunnel has moved: all hosts use the new keys");
        self.state.borrow_mut().changed(Change::Tunnel);
        self.work.notify_one();
    }

    /// Returns the hosts that must change to the new key epoch before this host's rotation ends.
    pub(super) fn tunnel_awaits<'a>(&self, state: &'a State) -> impl Iterator<Item = NodeId> + 'a {
        let own = tunnel::own(&state.view).map(|(_, own)| own).filter(|own| own.rotating);
        own.into_iter().flat_map(|own| {
            let peers = tunnel::peers(&state.view).into_iter().map(|(id, (_, end))| (id, end));
            epochs::awaited(own, &state.local.key_epochs, peers)
        })
    }

    /// Returns the peers to probe, with their addresses in the tunnel.
    fn tunnel_targets(&self) -> Vec<(NodeId, IpAddr)> {
        let cluster = self.state.borrow().view.alloc.cluster;
        let address = |id: &NodeId| (*id, tunnel::address(cluster, *id).into());
        self.tunnel.borrow().peers.keys().map(address).collect()
    }

    async fn probe_tunnel(&self, id: NodeId, address: IpAddr) {
        let start = Instant::now();
        let answered = self.prober.probe(address, ANSWER_WITHIN).await;
        let took = start.elapsed();
        let mut watch = self.tunnel.borrow_mut();
        let Some(watched) = watch.peers.get_mut(&id) else { return };
        if watched.answered.len() == WINDOW {
            watched.answered.pop_front();
        }
        watched.answered.push_back(answered);
        if answered {
            // Smoothed as in TCP (RFC 6298).
            watched.round_trip = Some(watched.round_trip.map_or(took, |old| (old * 7 + took) / 8));
        }
    }

    /// Returns the problems of encrypted networks on this host.
    pub(super) fn tunnel_problems(&self, state: &State) -> Vec<Problem> {
        let mut problems = Vec::new();
        let view = &state.view;
        if self.config.encrypt {
            for found in view.networks.values().filter(|found| !found.network.encrypted) {
                let sentence = format!(
                    "encrypt = true, and network {} is not encrypted: make it anew to have it so",
                    found.network.name
                );
                problems.push(Code::NotEncrypted.about(&found.network.name, sentence));
            }
        }
        if !tunnel::is_wanted(view) || !state.is_member() {
            return problems;
        }
        let watch = self.tunnel.borrow();
        problems.extend(watch.missing.iter().map(|sentence| Code::NoTunnel.about("", sentence)));
        let copies = tunnel::copies(view);
        for node in view.nodes.values() {
            let record = &node.record;
            if record.id == view.me || !view.counts(node) {
                continue;
            }
            if record.tunnel.is_none() {
                let sentence = format!(
                    "host {} has no tunnel, and gets nothing of encrypted networks: `ovlctl status` there says why",
                    record.name
                );
                problems.push(Code::PeerWithoutTunnel.about(&record.name, sentence));
            }
            if copies.contains(&record.id) {
                let sentence = format!(
                    "host {} publishes the tunnel key of another host, and gets nothing of encrypted networks: on \
                     it, stop ovld, remove tunnel.key from its state directory, and start it again",
                    record.name
                );
                problems.push(Code::TunnelKeyCopied.about(&record.name, sentence));
            }
        }
        for (id, watched) in &watch.peers {
            let Some(node) = view.nodes.get(id).filter(|node| node.state == PeerState::Alive) else {
                continue;
            };
            let Some(end) = node.record.tunnel else { continue };
            let last = watched.status.as_ref().and_then(|status| status.last_handshake);
            if last.is_none_or(|last| last > RENEWED_WITHIN) && watched.since.elapsed() > FIRST_WITHIN {
                let sentence = format!(
                    "the tunnel to host {} at {} port {} has no session: nothing passes on encrypted networks. \
                     Check the path and the firewalls for UDP port {} there and {} here",
                    node.record.name, node.record.vtep, end.port, end.port, self.config.tunnel_port
                );
                problems.push(Code::NoTunnelSession.about(&node.record.name, sentence));
            }
        }
        problems
    }

    /// Returns the state of the tunnel to a host. `None` if it is not reached through the tunnel.
    pub(super) fn peer_tunnel(&self, id: NodeId) -> Option<PeerTunnel> {
        let watch = self.tunnel.borrow();
        let watched = watch.peers.get(&id)?;
        let status = watched.status.as_ref();
        let lost = watched.answered.iter().filter(|answered| !**answered).count();
        Some(PeerTunnel {
            endpoint: status.and_then(|status| status.endpoint),
            last_handshake_s: status.and_then(|status| status.last_handshake).map(|last| last.as_secs()),
            sent_bytes: status.map_or(0, |status| status.sent),
            received_bytes: status.map_or(0, |status| status.received),
            rtt_us: watched.round_trip.map(|took| u64::try_from(took.as_micros()).unwrap_or(u64::MAX)),
            loss_percent: (!watched.answered.is_empty())
                .then(|| u8::try_from(lost * 100 / watched.answered.len()).unwrap_or(100)),
        })
    }

    /// Returns the number of packets that the tunnel dropped, by reason.
    pub(super) fn tunnel_drops(&self) -> Vec<(&'static str, u64)> {
        self.tunnel.borrow().drops.clone()
    }
}
