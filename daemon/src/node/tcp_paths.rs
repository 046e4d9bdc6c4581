//! Opens TCP paths to hosts to which UDP is blocked, as [`crate::tcp_paths`] decides.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use ovl_cluster::view::Node as Host;
use ovl_mesh::gossip::TcpEnd;
use ovl_mesh::streams::{DatagramStream, Datagrams, FrameCipher};
use ovl_proto::id::NodeId;
use ovl_proto::record::{NodeRecord, Presence};
use ovl_relay::{Cipher, TcpPath};
use tokio::time::Instant;

use super::Node;
use super::reach::relay_at;
use super::state::State;
use crate::peers::Peer;
use crate::problems::Code;
use crate::tcp_paths::{Evidence, LOST, Open, Turn};

/// The interval of the decisions.
const EVERY: Duration = Duration::from_millis(200);
/// The number of hosts that a problem names.
const NAMED: usize = 4;

/// The TCP paths that run.
#[derive(Debug, Default)]
pub(super) struct Running {
    paths: BTreeMap<(NodeId, Datagrams), Runs>,
    /// The generation of this host in which they were opened.
    generation: u64,
    /// What gossip was last told.
    told: Vec<TcpEnd>,
}

#[derive(Debug)]
struct Runs {
    path: TcpPath,
    remote: SocketAddr,
    known_as: Vec<SocketAddr>,
}

/// The cipher of a stream, for the threads of a path.
struct StreamCipher(FrameCipher);

impl Cipher for StreamCipher {
    fn seal(&mut self, frame: &[u8], sealed: &mut [u8]) -> Option<usize> {
        self.0.seal(frame, sealed)
    }

    fn open(&mut self, sealed: &[u8], frame: &mut [u8]) -> Option<usize> {
        self.0.open(sealed, frame)
    }
}

impl Node {
    /// Opens and closes TCP paths, forever.
    pub(super) async fn tcp_loop(self: Rc<Self>) {
        loop {
            self.turn_tcp_paths();
            tokio::select! {
                () = tokio::time::sleep(EVERY) => {}
                () = self.tcp_turn.notified() => {}
            }
        }
    }

    fn generation(&self) -> u64 {
        self.state.borrow().record().map_or(0, |record| record.generation)
    }

    fn turn_tcp_paths(self: &Rc<Self>) {
        self.close_tcp_paths();
        let now = Instant::now();
        let (work, seeds, is_without_udp) = {
            let mut guard = self.state.borrow_mut();
            let state = &mut *guard;
            let evidence = self.tcp_evidence(state, now);
            let work = state.tcp.decide(&evidence, self.gossip().patience(), now);
            let seeds = state.tcp.dial_seeds(&self.gossip().missing_seeds(), now);
            for (peer, turn) in &work.turns {
                let message = match turn {
                    Turn::Tcp => "it answers over streams but not by UDP, so it is reached by TCP",
                    Turn::Udp => "it answers by UDP again",
                };
                self.event("peer", &state.view.name_of(*peer), message);
            }
            note_blocked(state);
            (work, seeds, state.tcp.is_without_udp(now))
        };
        if is_without_udp {
            self.note_dialled(false);
        }
        if !work.turns.is_empty() {
            self.detour_turn.notify_one();
        }
        for &(peer, _) in &work.turns {
            self.renew_path_mtu(peer);
        }
        for peer in work.close {
            self.tcp.borrow_mut().paths.retain(|(host, _), _| *host != peer);
            let mut state = self.state.borrow_mut();
            for kind in [Datagrams::Gossip, Datagrams::Relayed] {
                state.tcp.closed(peer, kind);
            }
        }
        self.tell_tcp_ends();
        for (peer, copies) in work.tries {
            self.gossip().try_udp(peer, copies);
        }
        for (peer, kind) in work.dial {
            let address = self.state.borrow().view.nodes.get(&peer).map(|node| node.record.address);
            if let Some(address) = address {
                self.dial_tcp(address, kind, Some(peer));
            }
        }
        for seed in seeds {
            self.dial_tcp(seed, Datagrams::Gossip, None);
        }
    }

    /// Drops what has failed, and all paths if this host has begun anew.
    fn close_tcp_paths(&self) {
        let generation = self.generation();
        let mut guard = self.tcp.borrow_mut();
        let running = &mut *guard;
        let mut state = self.state.borrow_mut();
        if running.generation != generation {
            running.generation = generation;
            running.paths.clear();
            running.told.clear();
            state.tcp.begin_anew();
        }
        let now = std::time::Instant::now();
        let is_lost = |runs: &Runs| now.saturating_duration_since(runs.path.heard()) >= LOST;
        for ((peer, kind), runs) in
            running.paths.extract_if(.., |_, runs| runs.path.has_ended() || is_lost(runs))
        {
            tracing::debug!(%peer, ?kind, counters = ?runs.path.counters(), "TCP path closed");
            state.tcp.closed(peer, kind);
        }
        for ((peer, kind), runs) in &running.paths {
            state.tcp.heard(*peer, *kind, runs.path.heard().into());
        }
    }

    /// What is known of the way to each host that may be dialled, or has dialled.
    fn tcp_evidence(&self, state: &State, now: Instant) -> BTreeMap<NodeId, Evidence> {
        let Some(own) = state.view.own() else { return BTreeMap::new() };
        let (answers, heard) = (self.gossip().udp_answers(), self.gossip().udp_heard());
        let connected = self.links().connected();
        let since = |at: &Instant| now.saturating_duration_since(*at);
        let members = &state.view.alloc.members;
        let is_wanted = |node: &&Host| {
            let id = node.record.id;
            let is_known = members.contains(&id) || state.peers.get(id).is_some_and(Peer::is_proved);
            id != state.view.me && node.record.presence != Presence::Left && is_known
        };
        let has_relay = relay_at(own).is_some() && self.relay.get().is_some();
        state
            .view
            .nodes
            .values()
            .filter(is_wanted)
            .map(|node| {
                let id = node.record.id;
                let evidence = Evidence {
                    udp: answers.get(&id).map(since),
                    heard: heard.get(&id).map(since),
                    may_dial: !node.record.is_behind_nat() && !state.view.is_apart(node),
                    has_stream: connected.contains(&id),
                    is_first: own.record.is_behind_nat() || state.view.me < id,
                    is_nat: own.record.is_behind_nat() || node.record.is_behind_nat(),
                    relayed: has_relay && relay_at(node).is_some(),
                };
                (id, evidence)
            })
            .collect()
    }

    /// Dials a host for a path: a peer, or a host to join.
    fn dial_tcp(self: &Rc<Self>, to: SocketAddr, kind: Datagrams, peer: Option<NodeId>) {
        let dialling = self.links().dial_datagrams(to, kind);
        let (node, generation) = (Rc::clone(self), self.generation());
        tokio::task::spawn_local(async move {
            let dialled = dialling.await;
            if node.generation() != generation {
                // This host has begun anew.
                return;
            }
            let is_expected = |stream: &DatagramStream| peer.is_none_or(|peer| stream.record.id == peer);
            let opened = match dialled {
                Ok(stream) if is_expected(&stream) => node.take_datagram_stream(stream, to),
                Ok(stream) => Err(anyhow::anyhow!("another host answers: {}", stream.record.name)),
                Err(error) => Err(error),
            };
            let now = Instant::now();
            let tcp = &mut node.state.borrow_mut().tcp;
            match (peer, &opened) {
                (None, opened) => tcp.dialled_seed(to, opened.is_ok(), now),
                (Some(peer), Err(_)) => tcp.failed(peer, kind, now),
                (Some(_), Ok(())) => {}
            }
            if let Err(error) = opened {
                tracing::debug!(%to, "cannot open a TCP path: {error:#}");
            }
        });
    }

    /// Takes a stream for datagrams that a peer has opened.
    pub(super) fn accept_datagram_stream(self: &Rc<Self>, stream: DatagramStream) {
        let (peer, at) = (stream.record.id, stream.at);
        let opened = match self.state.borrow().tcp.admits(peer) {
            true => Ok(()),
            false => Err(anyhow::anyhow!("there are too many")),
        };
        if let Err(error) = opened.and_then(|()| self.take_datagram_stream(stream, at)) {
            tracing::debug!(%peer, "refused a TCP path: {error:#}");
        }
    }

    /// Starts a path on a stream, with a host that was dialled or seen at this address.
    fn take_datagram_stream(self: &Rc<Self>, stream: DatagramStream, at: SocketAddr) -> anyhow::Result<()> {
        let DatagramStream { kind, record, signed, at: remote, is_dialled, connection, cipher } = stream;
        let (peer, known_as) = (record.id, known_as(&record, at, is_dialled));
        let program = {
            let state = self.state.borrow();
            let own = state.record().ok_or_else(|| anyhow::anyhow!("this host has no record"))?;
            match kind {
                Datagrams::Gossip => SocketAddr::new(own.vtep, own.address.port()),
                Datagrams::Relayed if self.relay.get().is_some() => {
                    SocketAddr::new(self.config.advertise.ip(), self.config.relay_port)
                }
                Datagrams::Relayed => anyhow::bail!("this host has no port of relayed datagrams"),
            }
        };
        let wake = Arc::clone(&self.tcp_turn);
        let ended = move || wake.notify_one();
        let path = TcpPath::start(connection, Box::new(StreamCipher(cipher)), program, ended)?;
        let open = Open { local: path.local_addr(), is_dialled, heard: path.heard().into() };
        self.tcp.borrow_mut().paths.insert((peer, kind), Runs { path, remote, known_as });
        self.state.borrow_mut().tcp.opened(peer, kind, open, Instant::now());
        self.take_record(record, signed);
        self.note_proved(peer);
        self.turn_tcp_paths();
        // Relayed datagrams take it at once.
        self.detour_turn.notify_one();
        if is_dialled && kind == Datagrams::Gossip {
            self.gossip().ask_where(at);
        }
        Ok(())
    }

    /// Tells gossip which sockets stand in for hosts.
    fn tell_tcp_ends(&self) {
        let mut guard = self.tcp.borrow_mut();
        let running = &mut *guard;
        let state = self.state.borrow();
        let of_gossip = running.paths.iter().filter(|((_, kind), _)| *kind == Datagrams::Gossip);
        let ends: Vec<TcpEnd> = of_gossip
            .map(|((peer, _), runs)| TcpEnd {
                local: runs.path.local_addr(),
                remote: runs.remote,
                known_as: runs.known_as.clone(),
                is_used: state.tcp.is_used(*peer),
            })
            .collect();
        if running.told != ends {
            self.gossip().set_tcp_ends(ends.clone());
            running.told = ends;
        }
    }
}

/// The addresses by which a host is known that was dialled or seen at an address. None if it was seen elsewhere than it says, because
/// another host may have that address here.
fn known_as(record: &NodeRecord, at: SocketAddr, is_dialled: bool) -> Vec<SocketAddr> {
    let is_there = record.is_behind_nat() || record.addresses().any(|own| own.ip() == at.ip());
    let own = (is_there || is_dialled).then_some(record.address);
    let dialled = (is_dialled && at != record.address).then_some(at);
    own.into_iter().chain(dialled).collect()
}

/// Reports the hosts to which UDP is blocked.
fn note_blocked(state: &mut State) {
    let names: Vec<String> = state.tcp.used().map(|id| state.view.name_of(id)).collect();
    let more = names.len().saturating_sub(NAMED);
    let all = names.iter().take(NAMED).cloned().collect::<Vec<_>>().join(", ");
    let all = if more > 0 { format!("{all} and {more} more") } else { all };
    let sentence = (!names.is_empty()).then(|| {
        format!(
            "UDP does not pass between this host and {all}, which TCP reaches: encrypted networks, and those with encrypt \
             = auto, go on over TCP, slower, and others do not. Let UDP pass between them: the port of advertise and relay_port"
        )
    });
    state.problems.set(Code::UdpBlocked, "", sentence);
}

#[cfg(test)]
mod tests {
    use ovl_proto::record::name_address;

    use super::*;

    #[test]
    fn host_is_known_by_its_address_only_if_it_is_there() {
        let at = |text: &str| -> SocketAddr { text.parse().unwrap() };
        let mut record = crate::world::node(1).record;
        (record.address, record.vtep) = (at("192.0.2.1:7940"), [192, 0, 2, 1].into());
        assert_eq!(known_as(&record, at("192.0.2.1:50000"), false), [at("192.0.2.1:7940")]);
        assert_eq!(known_as(&record, at("198.51.100.1:50000"), false), []);
        assert_eq!(known_as(&record, at("192.0.2.1:7940"), true), [at("192.0.2.1:7940")]);
        let floating = at("203.0.113.1:7940");
        assert_eq!(known_as(&record, floating, true), [at("192.0.2.1:7940"), floating]);
        record.address = SocketAddr::new(name_address(record.id).into(), 7940);
        assert_eq!(known_as(&record, at("198.51.100.1:50000"), false), [record.address]);
    }
}
