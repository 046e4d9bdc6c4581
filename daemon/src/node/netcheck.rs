//! `ovlctl netcheck`: sends the probes that tell what kind of NAT this host is behind, and what is blocked.

use std::collections::{BTreeMap, BTreeSet};
use std::future::poll_fn;
use std::net::SocketAddr;
use std::time::Duration;

use ovl_control::{Netcheck, NetcheckMember};
use ovl_mesh::gossip::Answerer;
use ovl_mesh::transport::Datagrams;
use ovl_proto::id::NodeId;
use tokio::io::ReadBuf;
use tokio::task::JoinSet;
use tokio::time::{Instant, timeout, timeout_at};

use super::reach::{live_members, relay_at};
use super::{Failed, Node};
use crate::netcheck::{self, Observations};
use ovl_kernel::own_addresses;

/// The number of members that are asked, at most.
const ASKED: usize = 8;
/// How often a question is repeated that was not answered, and the interval.
const ROUNDS: u32 = 4;
const ROUND: Duration = Duration::from_millis(300);
/// How long a TCP connection may take.
const CONNECT: Duration = Duration::from_secs(2);
/// The maximum length of an answer in bytes.
const MAX_ANSWER: usize = 1500;

/// A member that is asked.
struct Asked {
    id: NodeId,
    /// Its socket of relayed datagrams.
    relay_at: Option<SocketAddr>,
    row: NetcheckMember,
}

/// A question to a member: where it is sent to, and a new datagram for each time.
struct Question<'a> {
    to: SocketAddr,
    nonce: u64,
    datagram: Box<dyn Fn(u64) -> Option<Vec<u8>> + 'a>,
}

type Socket = Box<dyn Datagrams>;

impl Node {
    /// Checks the connection of this host to others. Takes up to five seconds.
    pub(super) async fn netcheck(&self) -> Result<Netcheck, Failed> {
        // Each takes from what members answer a second.
        let _turn = self.netchecks.lock().await;
        let mut asked = self.netcheck_members();
        let mut seen = self.netcheck_host(&asked);
        let addresses: Vec<SocketAddr> = asked.iter().map(|asked| asked.row.address).collect();
        let (connected, by_udp) = tokio::join!(self.connects(&addresses), self.ask_by_udp(&asked, &mut seen));
        let answers =
            by_udp.map_err(|error| Failed::unavailable(format!("cannot send probes: {error:#}")))?;
        for asked in &mut asked {
            asked.row.tcp = connected.contains(&asked.row.address);
            asked.row.seen_at = answers.get(&asked.id).copied();
            asked.row.udp = asked.row.seen_at.is_some();
        }
        seen.members = asked.into_iter().map(|asked| asked.row).collect();
        Ok(netcheck::judge(&seen))
    }

    /// The members to ask: those that can be dialled, the nearest first.
    fn netcheck_members(&self) -> Vec<Asked> {
        let (state, gossip) = (self.state.borrow(), self.gossip());
        let Some(own) = state.view.own() else { return Vec::new() };
        let others = live_members(&state).filter(|node| node.record.id != own.record.id);
        let is_asked = |node: &&ovl_cluster::view::Node| {
            !node.record.is_behind_nat() && node.record.address.is_ipv4() == own.record.vtep.is_ipv4()
        };
        let mut asked: Vec<Asked> = others
            .filter(is_asked)
            .map(|node| {
                let (id, record) = (node.record.id, &node.record);
                let rtt_us = gossip.rtt(id).and_then(|rtt| u64::try_from(rtt.as_micros()).ok());
                let row = NetcheckMember {
                    name: record.name.clone(),
                    address: record.address,
                    rtt_us,
                    udp: false,
                    tcp: false,
                    path_mtu: gossip.path_mtu(id),
                    relays: record.relays && record.relay_port != 0,
                    seen_at: None,
                };
                Asked { id, relay_at: relay_at(node), row }
            })
            .collect();
        asked.sort_by_key(|asked| (asked.row.rtt_us.unwrap_or(u64::MAX), asked.id));
        asked.truncate(ASKED);
        asked
    }

    /// What is known without probes.
    fn netcheck_host(&self, asked: &[Asked]) -> Observations {
        let state = self.state.borrow();
        let hidden = live_members(&state)
            .filter(|node| node.record.is_behind_nat() && node.record.id != state.view.me)
            .count();
        let is_by_tcp = asked.iter().any(|asked| state.tcp.is_used(asked.id));
        Observations {
            own: own_addresses().into_iter().flatten().map(|(_, address)| address).collect(),
            link_mtu: state.record().map_or(0, |record| record.link_mtu),
            seen_by_tcp: state.reach.seen_at().filter(|_| is_by_tcp),
            hidden,
            ..Observations::default()
        }
    }

    /// The addresses at which a TCP connection is accepted.
    async fn connects(&self, addresses: &[SocketAddr]) -> BTreeSet<SocketAddr> {
        let mut connecting = JoinSet::new();
        for &address in addresses {
            let transport = self.environment.transport();
            connecting.spawn(async move {
                let connected = timeout(CONNECT, transport.connect(address)).await;
                matches!(connected, Ok(Ok(_))).then_some(address)
            });
        }
        connecting.join_all().await.into_iter().flatten().collect()
    }

    /// Asks members by UDP. Returns where each one sees one socket.
    async fn ask_by_udp(
        &self,
        asked: &[Asked],
        seen: &mut Observations,
    ) -> anyhow::Result<BTreeMap<NodeId, SocketAddr>> {
        let (open, filtered, hairpin) =
            (self.netcheck_socket()?, self.netcheck_socket()?, self.netcheck_socket()?);
        let same = |asked: &Asked| self.question(asked.id, asked.row.address, Answerer::SamePort);
        let questions: Vec<Question<'_>> = asked.iter().map(same).collect();
        let answers = self.probe_members(&open, &questions).await;
        let ids = asked.iter().zip(&questions);
        let answers: BTreeMap<NodeId, SocketAddr> =
            ids.filter_map(|(asked, question)| Some((asked.id, *answers.get(&question.nonce)?))).collect();
        let Some(first) = asked.iter().find(|asked| answers.contains_key(&asked.id)) else {
            return Ok(answers);
        };
        if let Some(relay_at) = first.relay_at {
            let question = self.question_to_relay(first.id, relay_at);
            seen.at_other_port =
                self.probe_members(&open, std::slice::from_ref(&question)).await.remove(&question.nonce);
        }
        // From now on only the first member may answer to this socket.
        let questions = [same(first)];
        self.probe_members(&filtered, &questions).await;
        let has_other = answers.len() > 1;
        let questions = [
            self.question(first.id, first.row.address, Answerer::OtherPort),
            self.question(first.id, first.row.address, Answerer::OtherHost),
        ];
        let asked_for = if has_other { &questions[..] } else { &questions[..1] };
        let arrived = self.probe_members(&filtered, asked_for).await;
        let [from_port, from_host] = questions.map(|question| arrived.contains_key(&question.nonce));
        seen.from_other_port = first.relay_at.map(|_| from_port);
        seen.from_other_host = has_other.then_some(from_host);
        let outer = answers.get(&first.id).copied();
        let question = same(first);
        let inner =
            self.probe_members(&hairpin, std::slice::from_ref(&question)).await.remove(&question.nonce);
        if let (Some(one), Some(other)) = (outer, inner) {
            seen.hairpin = Some(self.meets((&open, one), (&hairpin, other)).await);
        }
        Ok(answers)
    }

    fn netcheck_socket(&self) -> anyhow::Result<Socket> {
        Ok(self.environment.transport().datagrams(SocketAddr::new(self.config.advertise.ip(), 0))?)
    }

    fn question(&self, id: NodeId, to: SocketAddr, by: Answerer) -> Question<'_> {
        let nonce = u64::from_be_bytes(self.random());
        Question { to, nonce, datagram: Box::new(move |nonce| self.gossip().check(id, nonce, by)) }
    }

    /// A question to the socket of relayed datagrams of a member.
    fn question_to_relay(&self, id: NodeId, to: SocketAddr) -> Question<'_> {
        let nonce = u64::from_be_bytes(self.random());
        let datagram = move |nonce| {
            let payload = self.gossip().check(id, nonce, Answerer::SamePort)?;
            self.relay.get()?.probe_datagram(id.0, &payload)
        };
        Question { to, nonce, datagram: Box::new(datagram) }
    }

    /// Sends questions until all are answered, for at most [`ROUNDS`]. Returns where each one came from, by its nonce.
    async fn probe_members(&self, socket: &Socket, questions: &[Question<'_>]) -> BTreeMap<u64, SocketAddr> {
        let mut answers = BTreeMap::new();
        let mut buffer = vec![0; MAX_ANSWER];
        for _ in 0..ROUNDS {
            for question in questions.iter().filter(|question| !answers.contains_key(&question.nonce)) {
                if let Some(datagram) = (question.datagram)(question.nonce) {
                    // One that cannot be sent is not answered.
                    let _ = socket.send(&datagram, question.to);
                }
            }
            let until = Instant::now() + ROUND;
            while answers.len() < questions.len() {
                let Some(datagram) = receive(socket, &mut buffer, until).await else { break };
                if let Some((nonce, at)) = self.gossip().open_checked(datagram)
                    && questions.iter().any(|question| question.nonce == nonce)
                {
                    answers.insert(nonce, at);
                }
            }
            if answers.len() == questions.len() {
                break;
            }
        }
        answers
    }

    /// Whether two sockets of this host reach each other by their outer addresses.
    async fn meets(&self, one: (&Socket, SocketAddr), other: (&Socket, SocketAddr)) -> bool {
        let token: [u8; 16] = self.random();
        let mut buffer = vec![0; MAX_ANSWER];
        for _ in 0..ROUNDS {
            // Both, so that each is an answer to the other where only those are let in.
            let _ = one.0.send(&token, other.1);
            let _ = other.0.send(&token, one.1);
            for socket in [one.0, other.0] {
                let until = Instant::now() + ROUND / 2;
                while let Some(datagram) = receive(socket, &mut buffer, until).await {
                    if *datagram == token {
                        return true;
                    }
                }
            }
        }
        false
    }
}

/// Receives a datagram. `None` if none has arrived by that time.
async fn receive<'a>(socket: &Socket, buffer: &'a mut [u8], until: Instant) -> Option<&'a mut [u8]> {
    let length = {
        let mut buffer = ReadBuf::new(buffer);
        let received = poll_fn(|context| socket.poll_receive(context, &mut buffer));
        timeout_at(until, received).await.ok()?.ok()?;
        buffer.filled().len()
    };
    buffer.get_mut(..length)
}
