//! Encrypted traffic between hosts: the tunnel of this host, what is measured of it, and when its key changes.
//!
//! [`Tunnel`] owns the keys that are on the disk, the measurements of each peer and the drops. Which peers are reached
//! through the tunnel, and by which interface, is decided by [`ovl_subsystems::encryption`]. Begin to read at
//! [`Tunnel::hear`] and [`rotation`].

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::net::IpAddr;
use std::time::Duration;

use ovl_cluster::view::View;
use ovl_control::{PeerState, PeerTunnel};
use ovl_dataplane::device::Device;
use ovl_dataplane::state::TunnelKind;
use ovl_kernel::{self as kernel, KernelHandle, Offload, TunnelPeerStatus, TunnelStatus};
use ovl_mesh::keys::TunnelSecret;
use ovl_proto::id::{NodeId, TunnelKey};
use ovl_proto::object::Encrypt;
use ovl_proto::record;
use ovl_subsystems::encryption::tunnel;
use ovl_subsystems::local::epochs::{self, KeyEpochs};
use tokio::time::Instant;

use crate::config::{Config, TunnelMode};
use crate::failed::Failed;
use crate::problems::{Code, Problem};

/// Time without received data after which a peer no longer sends through a WireGuard interface. It is longer
/// than two probe intervals.
const QUIET: Duration = Duration::from_secs(7);
/// Number of probes over which loss is measured.
const WINDOW: usize = 20;
/// The unanswered probes in a row after which the tunnel to a peer fails.
const FAILING: u32 = 3;
/// Time without any message of a peer after which nothing arrives from it. It is longer than the intervals of probes and of
/// repeated handshakes.
const SILENT: Duration = Duration::from_secs(9);
/// Time from the first unanswered probe after which a message of the peer shows that its direction works: one that was on its
/// way may have been counted later.
const LATER: Duration = Duration::from_millis(3500);
/// Time limit for the first handshake with a new peer.
const FIRST_WITHIN: Duration = Duration::from_secs(15);
/// Maximum age of a handshake. WireGuard's sessions expire after three minutes and are renewed after two.
const RENEWED_WITHIN: Duration = Duration::from_secs(180);

/// WireGuard interfaces, each with the key of a peer on it.
type Places = BTreeSet<(Device, TunnelKey)>;

/// The tunnel of this host.
#[derive(Debug)]
pub(crate) struct Tunnel {
    /// The tunnel keys that are on the disk.
    secret: TunnelSecret,
    heard: Heard,
    /// Reason why this host has no tunnel. `None` if it has one.
    missing: Option<String>,
    /// Number of dropped packets by reason.
    drops: Vec<(&'static str, u64)>,
    peers: BTreeMap<NodeId, Watched>,
}

/// Received bytes by WireGuard interface and key, and the time of the last increase.
#[derive(Debug, Default)]
struct Heard(BTreeMap<(Device, TunnelKey), (u64, Instant)>);

/// A peer that is reached through the tunnel, or should be.
#[derive(Debug)]
struct Watched {
    since: Instant,
    status: Option<TunnelPeerStatus>,
    /// What its messages were counted up to, and when that last grew.
    heard: Option<(u64, Instant)>,
    /// The time of the first of the last unanswered probes, and their number. `None` if the last one was answered.
    failing: Option<(Instant, u32)>,
    /// Whether each of the last probes was answered.
    answered: VecDeque<bool>,
    round_trip: Option<Duration>,
}

/// The direction in which nothing passes through the tunnel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Lost {
    /// To the peer, whose messages arrive.
    Outbound,
    /// From the peer.
    Inbound,
}

/// Chooses the tunnel that this host publishes, or returns the reason why it has none.
pub(crate) async fn choose(
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
pub(crate) fn name(kind: TunnelKind) -> &'static str {
    match kind {
        TunnelKind::Kernel => "wireguard (kernel)",
        TunnelKind::Userspace => "wireguard (userspace)",
    }
}

/// Returns the kind of tunnel in use. `None` if this host has no tunnel, or no network needs it.
pub(crate) fn kind(view: &View) -> Option<TunnelKind> {
    let (_, end) = tunnel::own(view).filter(|_| tunnel::is_wanted(view))?;
    Some(if end.kernel { TunnelKind::Kernel } else { TunnelKind::Userspace })
}

/// A change to another key epoch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Move {
    /// The epoch. `None`: the epoch stays, and the key is new.
    pub epoch: Option<u32>,
    /// Whether the previous key stays in use until no host needs it.
    pub keeps_previous: bool,
}

/// Returns the change that a rotation of this host's key begins with.
///
/// # Errors
///
/// This host has no tunnel, or a key is being rotated.
pub(crate) fn rotation(view: &View) -> Result<Move, Failed> {
    let Some((_, own)) = tunnel::own(view) else {
        return Err(Failed::unavailable(
            "this host has no tunnel, or is no member of the cluster yet; `ovlctl status` says why",
        ));
    };
    if own.rotating {
        return Err(Failed::conflict(
            "a tunnel key is being rotated, and this host takes part; `ovlctl key status` says who is waited for",
        ));
    }
    let peers = tunnel::peers(view);
    let busy = peers.values().find(|(_, end)| end.rotating || end.epoch != own.epoch);
    if let Some((node, _)) = busy {
        return Err(Failed::conflict(format!(
            "a tunnel key is being rotated, and host {} takes part; try again in some seconds",
            node.record.name
        )));
    }
    // Without an encrypted network, there are no sessions to preserve.
    let is_wanted = tunnel::is_wanted(view);
    Ok(Move { epoch: is_wanted.then(|| own.epoch.wrapping_add(1)), keeps_previous: is_wanted })
}

/// Returns the change to the key epoch that a peer has changed to. `None` if there is nothing to follow.
pub(crate) fn to_follow(view: &View) -> Option<Move> {
    let (_, own) = tunnel::own(view)?;
    let peers = tunnel::peers(view);
    let epoch = epochs::to_follow(own, peers.values().map(|(_, end)| *end))?;
    // Two interfaces are needed only if the ports differ and a network is encrypted.
    let keeps_previous = tunnel::is_wanted(view) && (epoch ^ own.epoch) & 1 == 1;
    Some(Move { epoch: Some(epoch), keeps_previous })
}

/// Whether this host or a peer is changing to another key epoch.
pub(crate) fn is_moving(view: &View) -> bool {
    let own = tunnel::own(view).filter(|_| tunnel::is_wanted(view));
    own.is_some_and(|(_, own)| own.rotating || tunnel::peers(view).values().any(|(_, end)| end.rotating))
}

/// Whether this host's rotation has ended: no host uses the previous key any more.
pub(crate) fn is_settled(view: &View, key_epochs: &KeyEpochs) -> bool {
    let is_moving = tunnel::own(view).is_some_and(|(_, own)| own.rotating);
    is_moving && awaited(view, key_epochs).next().is_none()
}

/// Returns the hosts that must change to the new key epoch before this host's rotation ends.
pub(crate) fn awaited<'a>(view: &'a View, key_epochs: &'a KeyEpochs) -> impl Iterator<Item = NodeId> + 'a {
    let own = tunnel::own(view).map(|(_, own)| own).filter(|own| own.rotating);
    own.into_iter().flat_map(move |own| {
        let peers = tunnel::peers(view).into_iter().map(|(id, (_, end))| (id, end));
        epochs::awaited(own, key_epochs, peers)
    })
}

impl Tunnel {
    /// Creates the state of a tunnel without measurements. `missing` is the reason why there is none.
    pub(crate) fn new(secret: TunnelSecret, missing: Option<String>) -> Self {
        Self { secret, heard: Heard::default(), missing, drops: Vec::new(), peers: BTreeMap::new() }
    }

    /// Returns the tunnel keys that are on the disk.
    pub(crate) fn secret(&self) -> &TunnelSecret {
        &self.secret
    }

    /// Records the tunnel keys that are on the disk now.
    pub(crate) fn set_secret(&mut self, secret: TunnelSecret) {
        self.secret = secret;
    }

    /// Takes what the WireGuard interfaces say. Returns the peers with a session on each of them, and those that no
    /// longer send anything.
    pub(crate) fn hear(&mut self, found: &[TunnelStatus]) -> (Places, Places) {
        self.heard.hear(found)
    }

    /// Records what the WireGuard interfaces say of each peer that is reached through the tunnel.
    pub(crate) fn measure(&mut self, ends: &[TunnelStatus], view: &View, key_epochs: &KeyEpochs) {
        let reached = if kind(view).is_some() { tunnel::peers(view) } else { BTreeMap::new() };
        let routes = tunnel::peer_routes(view, key_epochs);
        self.drops = ends.iter().flat_map(|end| end.drops.iter().copied()).collect();
        self.peers.retain(|id, _| reached.contains_key(id));
        for id in reached.into_keys() {
            let watched = self.peers.entry(id).or_insert_with(Watched::new);
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
            let status = here.rfind(|status| keys.contains(&status.key)).cloned();
            watched.measured(status, Instant::now());
        }
    }

    /// Returns the peers to probe, with their addresses in the tunnel of this cluster.
    pub(crate) fn targets(&self, cluster: u64) -> Vec<(NodeId, IpAddr)> {
        self.peers.keys().map(|id| (*id, tunnel::address(cluster, *id).into())).collect()
    }

    /// Records the result of a probe that was sent at a time: how long the answer took, or `None` if there was none in time.
    /// `is_alive` says that the host runs, so that an answer was to be expected.
    pub(crate) fn probed(&mut self, id: NodeId, sent_at: Instant, took: Option<Duration>, is_alive: bool) {
        if let Some(watched) = self.peers.get_mut(&id) {
            watched.probed(sent_at, took, is_alive);
        }
    }

    /// Whether a peer has not answered the last probe.
    pub(crate) fn is_in_doubt(&self) -> bool {
        self.peers.values().any(|watched| watched.failing.is_some())
    }

    /// Whether nothing passes through the tunnel to a peer, although it is alive.
    pub(crate) fn is_lost(&self, id: NodeId) -> bool {
        self.peers.get(&id).is_some_and(|watched| watched.lost(Instant::now()).is_some())
    }

    /// Returns the problems of encrypted networks on this host.
    pub(crate) fn problems(&self, view: &View, config: &Config) -> Vec<Problem> {
        let mut problems = Vec::new();
        for network in view.networks.values().map(|found| &found.network) {
            let name = &network.name;
            let what = match config.encrypt {
                Encrypt::Yes if !network.encrypted => {
                    format!("encrypt = true, and network {name} is not encrypted")
                }
                Encrypt::Auto if !network.may_be_sealed() => {
                    format!("encrypt = \"auto\", and network {name} is in plain text everywhere")
                }
                Encrypt::No | Encrypt::Yes | Encrypt::Auto => continue,
            };
            problems.push(Code::NotEncrypted.about(name, format!("{what}: make it anew to have it so")));
        }
        if !tunnel::is_wanted(view) || !view.alloc.members.contains(&view.me) {
            return problems;
        }
        problems.extend(self.missing.iter().map(|sentence| Code::NoTunnel.about("", sentence)));
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
        for (id, watched) in &self.peers {
            let Some(node) = view.nodes.get(id).filter(|node| node.state == PeerState::Alive) else {
                continue;
            };
            let (Some(there), Some((own, here))) = (node.record.tunnel, tunnel::own(view)) else { continue };
            if let Some(lost) = watched.lost(Instant::now()) {
                let ends = [(own.record.vtep, here.port), (node.record.vtep, there.port)];
                let sentence = lost.sentence(&node.record.name, ends);
                problems.push(Code::TunnelBroken.about(&node.record.name, sentence));
            }
            if watched.status.as_ref().is_some_and(|status| status.segments == Offload::Damages) {
                problems.push(Code::SegmentsDamaged.about(&node.record.name, damaged(&node.record.name)));
            }
        }
        problems
    }

    /// Returns the state of the tunnel to a host. `None` if it is not reached through the tunnel.
    pub(crate) fn peer(&self, id: NodeId) -> Option<PeerTunnel> {
        self.peers.get(&id).map(Watched::shown)
    }

    /// Returns the number of packets that the tunnel dropped, by reason.
    pub(crate) fn drops(&self) -> Vec<(&'static str, u64)> {
        self.drops.clone()
    }
}

impl Lost {
    /// Returns the sentence that says so, and what to do. `here` and `there` are the addresses and ports of the tunnel.
    fn sentence(self, name: &str, [here, there]: [(IpAddr, u16); 2]) -> String {
        let (what, (from, _), (to, port)) = match self {
            Self::Outbound => (
                format!(
                    "host {name} answers nothing that this host sends into the tunnel, and its own packets arrive"
                ),
                here,
                there,
            ),
            Self::Inbound => {
                (format!("no packet of the tunnel from host {name} arrives at this host"), there, here)
            }
        };
        format!(
            "{what}, and host {name} is alive: nothing passes between the two on encrypted networks. Allow UDP port {port} \
             from {from} to {to} in the firewalls and security groups of the two hosts and between them"
        )
    }
}

/// Returns the sentence that says that datagrams to a host are not divided by the kernel, because that damages them.
fn damaged(name: &str) -> String {
    format!(
        "datagrams of the tunnel to host {name} that the kernel or a network card divides (UDP_SEGMENT) arrive damaged, and \
         others arrive: ovld sends each one by itself now, which works and is slower. Some releases of Linux (7.0 to 7.1.4) \
         and some drivers do this: update the kernel of this host, or turn the offload off on the link to host {name} with \
         'ethtool -K LINK tx-udp-segmentation off'. ovld divides datagrams again when they arrive"
    )
}

impl Heard {
    fn hear(&mut self, found: &[TunnelStatus]) -> (Places, Places) {
        let all = || found.iter().flat_map(|end| end.peers.iter().map(|peer| ((end.device, peer.key), peer)));
        let mut heard = BTreeMap::new();
        for (place, peer) in all() {
            let before = self.0.get(&place).copied().filter(|(received, _)| *received == peer.received);
            heard.insert(place, before.unwrap_or((peer.received, Instant::now())));
        }
        self.0 = heard;
        let is_fresh =
            |peer: &TunnelPeerStatus| peer.last_handshake.is_some_and(|last| last < RENEWED_WITHIN);
        let sessions = all().filter(|(_, peer)| is_fresh(peer)).map(|(place, _)| place).collect();
        let quiet = self.0.iter().filter(|(_, (_, since))| since.elapsed() > QUIET);
        (sessions, quiet.map(|(place, _)| *place).collect())
    }
}

impl Watched {
    fn new() -> Self {
        Self {
            since: Instant::now(),
            status: None,
            heard: None,
            failing: None,
            answered: VecDeque::with_capacity(WINDOW),
            round_trip: None,
        }
    }

    /// Takes what the WireGuard interface that carries packets to the peer says.
    fn measured(&mut self, status: Option<TunnelPeerStatus>, now: Instant) {
        if let Some(status) = &status {
            let is_more = |before: u64| status.heard != before && status.heard > 0;
            if is_more(self.heard.map_or(0, |(before, _)| before)) {
                self.heard = Some((status.heard, now));
            }
        }
        self.status = status;
    }

    /// Returns the direction in which nothing passes. `None` if packets pass, or if it is too early to judge.
    fn lost(&self, now: Instant) -> Option<Lost> {
        let last = self.status.as_ref().and_then(|status| status.last_handshake);
        let has_session = last.is_some_and(|last| last <= RENEWED_WITHIN);
        let since = match self.failing {
            Some((since, count)) if has_session && count >= FAILING => since,
            Some((since, _)) if !has_session && now.duration_since(self.since) > FIRST_WITHIN => since,
            _ => return None,
        };
        match self.heard {
            Some((_, at)) if now.duration_since(at) < SILENT => {
                (at.saturating_duration_since(since) >= LATER).then_some(Lost::Outbound)
            }
            _ => Some(Lost::Inbound),
        }
    }

    fn probed(&mut self, sent_at: Instant, took: Option<Duration>, is_alive: bool) {
        self.failing = match (took, self.failing) {
            (None, Some((since, count))) if is_alive => Some((since, count.saturating_add(1))),
            (None, None) if is_alive => Some((sent_at, 1)),
            _ => None,
        };
        if self.answered.len() == WINDOW {
            self.answered.pop_front();
        }
        self.answered.push_back(took.is_some());
        if let Some(took) = took {
            // Smoothed as in TCP (RFC 6298).
            self.round_trip = Some(self.round_trip.map_or(took, |old| (old * 7 + took) / 8));
        }
    }

    fn shown(&self) -> PeerTunnel {
        let status = self.status.as_ref();
        let lost = self.answered.iter().filter(|answered| !**answered).count();
        PeerTunnel {
            endpoint: status.and_then(|status| status.endpoint),
            last_handshake_s: status.and_then(|status| status.last_handshake).map(|last| last.as_secs()),
            sent_bytes: status.map_or(0, |status| status.sent),
            received_bytes: status.map_or(0, |status| status.received),
            rtt_us: self.round_trip.map(|took| u64::try_from(took.as_micros()).unwrap_or(u64::MAX)),
            loss_percent: (!self.answered.is_empty())
                .then(|| u8::try_from(lost * 100 / self.answered.len()).unwrap_or(100)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::world::{encrypt, id, switched, tunnel_key};

    /// A view in which all hosts have a tunnel and the network is encrypted.
    fn encrypted() -> View {
        let mut view = switched();
        encrypt(&mut view, true);
        view
    }

    fn end(view: &mut View, n: u8) -> &mut record::Tunnel {
        view.nodes.get_mut(&id(n)).unwrap().record.tunnel.as_mut().unwrap()
    }

    fn refused(view: &View) -> String {
        rotation(view).unwrap_err().0.message
    }

    #[test]
    fn rotation_waits_for_the_one_before() {
        let mut view = encrypted();
        assert_eq!(rotation(&view).unwrap(), Move { epoch: Some(1), keeps_previous: true });
        end(&mut view, 2).rotating = true;
        assert!(refused(&view).contains("host h2 takes part"));
        end(&mut view, 2).rotating = false;
        end(&mut view, 3).epoch = 1;
        assert!(refused(&view).contains("host h3 takes part"));
        end(&mut view, 1).rotating = true;
        assert!(refused(&view).contains("this host takes part"));
        view.nodes.get_mut(&id(1)).unwrap().record.tunnel = None;
        assert!(refused(&view).contains("no tunnel"));
    }

    #[test]
    fn rotation_without_encrypted_networks_preserves_no_session() {
        let mut view = encrypted();
        view.networks.values_mut().for_each(|state| state.network.encrypted = false);
        assert_eq!(rotation(&view).unwrap(), Move { epoch: None, keeps_previous: false });
        assert!(!is_moving(&view));
    }

    #[test]
    fn host_follows_a_peer_to_its_epoch_and_settles_when_all_have() {
        let mut view = encrypted();
        assert!(to_follow(&view).is_none() && !is_moving(&view));
        (end(&mut view, 2).epoch, end(&mut view, 2).rotating) = (1, true);
        assert_eq!(to_follow(&view), Some(Move { epoch: Some(1), keeps_previous: true }));
        end(&mut view, 2).epoch = 2;
        assert_eq!(
            to_follow(&view),
            Some(Move { epoch: Some(2), keeps_previous: false }),
            "the ports are equal"
        );
        assert!(is_moving(&view));

        let none = KeyEpochs::default();
        assert!(!is_settled(&view, &none), "this host does not rotate");
        for n in 1..=2 {
            (end(&mut view, n).epoch, end(&mut view, n).rotating) = (1, true);
        }
        assert!(awaited(&view, &none).any(|awaited| awaited == id(3)), "h3 uses the old key");
        assert!(!is_settled(&view, &none));
    }

    #[test]
    fn probes_are_smoothed_and_counted_over_a_window() {
        let mut watched = Watched::new();
        assert_eq!((watched.shown().rtt_us, watched.shown().loss_percent), (None, None));
        let mut probed = |took| {
            watched.probed(Instant::now(), took, true);
            (watched.shown().rtt_us, watched.shown().loss_percent)
        };
        assert_eq!(probed(Some(Duration::from_micros(800))), (Some(800), Some(0)));
        assert_eq!(probed(Some(Duration::from_micros(1600))), (Some(900), Some(0)));
        probed(None);
        assert_eq!(probed(None), (Some(900), Some(50)));
        for _ in 0..WINDOW {
            probed(None);
        }
        assert_eq!((watched.answered.len(), watched.shown().loss_percent), (WINDOW, Some(100)));
    }

    #[test]
    fn direction_of_the_tunnel_that_fails_is_known_from_what_arrives() {
        let second = Duration::from_secs(1);
        let status = |heard| {
            let last_handshake = Some(second);
            let (key, endpoint) = (tunnel_key(2), None);
            let segments = Offload::Unknown;
            Some(TunnelPeerStatus { key, endpoint, last_handshake, sent: 0, received: 0, heard, segments })
        };
        let start = Instant::now();
        for (arrives, expected) in [(true, Lost::Outbound), (false, Lost::Inbound)] {
            let mut watched = Watched::new();
            watched.measured(status(1), start);
            watched.probed(start, Some(second), true);
            let mut found = Vec::new();
            for at in 1..20u32 {
                let now = start + second * at;
                if at % 3 == 0 {
                    watched.probed(now - second * 2, None, true);
                    watched.measured(status(if arrives { 1 + u64::from(at) } else { 2 }), now);
                }
                found.extend(watched.lost(now).map(|lost| (at, lost)));
            }
            assert!(found.iter().all(|(_, lost)| *lost == expected), "{found:?}");
            assert!(found.first().is_some_and(|(at, _)| (9..=12).contains(at)), "{found:?}");
            watched.probed(start + second * 20, Some(second), true);
            assert_eq!(watched.lost(start + second * 20), None);
        }
        let mut watched = Watched::new();
        for _ in 0..5 {
            watched.probed(start, None, false);
        }
        assert_eq!(watched.lost(start + second * 20), None, "the host is down");
        watched.probed(start, None, true);
        assert_eq!(watched.lost(start + second * 20), Some(Lost::Inbound), "no session from the start");
        let sentence = Lost::Inbound.sentence("h2", [([10, 0, 0, 1].into(), 1), ([10, 0, 0, 2].into(), 2)]);
        assert!(sentence.contains("Allow UDP port 1 from 10.0.0.2 to 10.0.0.1"), "{sentence}");
    }

    #[test]
    fn peer_that_sends_nothing_more_is_quiet_after_a_while() {
        let device = Device::tunnel(true);
        let status = |received, last_handshake| TunnelStatus {
            device,
            drops: Vec::new(),
            peers: vec![TunnelPeerStatus {
                key: tunnel_key(2),
                endpoint: None,
                last_handshake,
                sent: 0,
                received,
                heard: received,
                segments: Offload::Unknown,
            }],
        };
        let mut heard = Heard::default();
        let place = (device, tunnel_key(2));
        let (sessions, quiet) = heard.hear(&[status(1, Some(Duration::from_secs(1)))]);
        assert!(sessions.contains(&place) && quiet.is_empty());
        let before = Instant::now().checked_sub(QUIET + Duration::from_secs(1)).unwrap();
        heard.0.insert(place, (1, before));
        let (sessions, quiet) = heard.hear(&[status(1, Some(RENEWED_WITHIN))]);
        assert!(sessions.is_empty() && quiet.contains(&place));
        let (_, quiet) = heard.hear(&[status(2, None)]);
        assert!(quiet.is_empty(), "it was heard again");
    }
}
