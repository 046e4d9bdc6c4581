//! The sockets and threads of relayed datagrams.

use std::collections::HashMap;
use std::io;
use std::net::{SocketAddr, UdpSocket};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};
use std::time::{Duration, Instant};

use nix::sys::socket::{setsockopt, sockopt};
use ovl_udp::threads::{StopSignal, ThreadGroup};
use ovl_udp::{MAX_COALESCED, ReceiveBatch, Sharing};

use crate::frame::{self, Channel, HEADER, Header, HostId, RelayKey};
use crate::limits::Limits;
use crate::run::{self, Kind, MOST_SENT, Run};

/// The number of coalesced datagrams that one call receives.
const SLOTS: usize = 8;
/// The interval at which a host without a detour is named again.
const NAME_EVERY: Duration = Duration::from_millis(100);
/// The maximum number of hosts that were named lately.
const MOST_NAMED: usize = 1024;

/// The configuration of a relay.
#[derive(Debug, Clone)]
pub struct RelayConfig {
    /// The address and port of the socket to other hosts.
    pub listen: SocketAddr,
    /// The same of the other address family. `None` if this host has none.
    pub listen_also: Option<SocketAddr>,
    /// The mark of packets to other hosts (`SO_MARK`).
    pub mark: u32,
    /// The id of this host.
    pub me: HostId,
    /// Whether datagrams between other hosts are passed on.
    pub forwards: bool,
    /// How much each pair of other hosts may have passed on, in bytes a second. `None`: any amount.
    pub limit: Option<u64>,
}

/// The numbers of datagrams.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Counters {
    /// Sent by this host's WireGuard to others.
    pub sent: u64,
    /// Received for this host's WireGuard.
    pub received: u64,
    /// Passed on for other hosts.
    pub forwarded: u64,
    /// Dropped: not of this cluster.
    pub unauthenticated: u64,
    /// Dropped: to a host to which there is no next hop, from one without a detour, or past its hop limit.
    pub no_path: u64,
    /// Dropped: its two hosts have sent more than they may.
    pub limited: u64,
    /// Dropped: the socket refused it.
    pub full: u64,
}

#[derive(Default)]
struct Counted {
    sent: AtomicU64,
    received: AtomicU64,
    forwarded: AtomicU64,
    unauthenticated: AtomicU64,
    no_path: AtomicU64,
    limited: AtomicU64,
    full: AtomicU64,
}

fn count(counter: &AtomicU64, number: usize) {
    counter.fetch_add(number as u64, Ordering::Relaxed);
}

/// A detour to a host: a socket to which WireGuard sends in place of that host.
#[derive(Debug)]
pub struct Detour {
    to: HostId,
    channel: Channel,
    socket: UdpSocket,
    wireguard: SocketAddr,
}

impl Detour {
    /// The address and port that stand in for the host.
    ///
    /// # Errors
    ///
    /// What `getsockname(2)` reports.
    pub fn local_addr(&self) -> io::Result<SocketAddr> {
        self.socket.local_addr()
    }
}

/// What the threads look up.
#[derive(Default)]
struct Table {
    /// The first one is used for what this host sends.
    keys: Vec<RelayKey>,
    next: HashMap<HostId, SocketAddr>,
    detours: HashMap<(HostId, Channel), Arc<Detour>>,
}

/// Told of a host to which there is no detour, with the address that sent its datagram.
type Heard = Box<dyn Fn(HostId, SocketAddr) + Send + Sync>;
/// Given a probe: the address that sent it, and its payload.
type Probed = Box<dyn Fn(SocketAddr, &[u8]) + Send + Sync>;

struct Shared {
    me: HostId,
    forwards: bool,
    limit: Option<u64>,
    socket: UdpSocket,
    /// That of the other address family.
    other: Option<UdpSocket>,
    /// Whether `socket` is of IPv4.
    is_ipv4: bool,
    table: RwLock<Table>,
    counted: Counted,
    /// Hosts from which datagrams come and to which there is no detour, with the relay that sent them.
    named: Mutex<HashMap<HostId, (SocketAddr, Instant)>>,
    heard: Heard,
    probed: Probed,
}

/// A running relay. Dropping it ends its threads and closes its sockets.
pub struct Relay {
    shared: Arc<Shared>,
    /// The thread that reads the socket to other hosts.
    _threads: ThreadGroup,
    detours: Mutex<HashMap<(HostId, Channel), ThreadGroup>>,
}

impl Relay {
    /// Starts a relay without keys, which drops all. `heard` is called, at most ten times a second for each host, for a host from
    /// which a datagram came although there is no detour to it, with the address that sent it. `probed` is called for each probe, with
    /// the address that sent it and its payload, which is not authenticated.
    ///
    /// # Errors
    ///
    /// [`io::ErrorKind::AddrInUse`] if another program has the port, and what the kernel reports.
    pub fn start(
        config: &RelayConfig,
        heard: impl Fn(HostId, SocketAddr) + Send + Sync + 'static,
        probed: impl Fn(SocketAddr, &[u8]) + Send + Sync + 'static,
    ) -> io::Result<Self> {
        let open = |at: SocketAddr| -> io::Result<UdpSocket> {
            let socket = ovl_udp::open(at, Sharing::Alone)?;
            // Without CAP_NET_ADMIN, which ovld has, it stays unmarked.
            let _ = setsockopt(&socket, sockopt::Mark, &config.mark);
            Ok(socket)
        };
        let (socket, other) = (open(config.listen)?, config.listen_also.map(open).transpose()?);
        let shared = Arc::new(Shared {
            me: config.me,
            forwards: config.forwards,
            limit: config.limit,
            socket,
            other,
            is_ipv4: config.listen.is_ipv4(),
            table: RwLock::default(),
            counted: Counted::default(),
            named: Mutex::default(),
            heard: Box::new(heard),
            probed: Box::new(probed),
        });
        let mut threads = ThreadGroup::new()?;
        let reader = Arc::clone(&shared);
        threads.spawn("relay".to_owned(), move |stop| reader.run(&reader.socket, stop))?;
        if shared.other.is_some() {
            let reader = Arc::clone(&shared);
            let read =
                move |stop: &StopSignal| reader.other.iter().for_each(|socket| reader.run(socket, stop));
            threads.spawn("relay-other".to_owned(), read)?;
        }
        Ok(Self { shared, _threads: threads, detours: Mutex::default() })
    }

    /// Replaces the keys. The first one is used for what this host sends.
    pub fn set_keys(&self, keys: Vec<RelayKey>) {
        self.shared.table_mut().keys = keys;
    }

    /// Sends a probe to a host at an address. It is lost if there is no key, or if the kernel refuses it.
    pub fn probe(&self, to: HostId, at: SocketAddr, payload: &[u8]) {
        if let Some(datagram) = self.probe_datagram(to, payload) {
            self.knock(at, &datagram);
        }
    }

    /// The datagram of a probe to a host. `None` if there is no key.
    pub fn probe_datagram(&self, to: HostId, payload: &[u8]) -> Option<Vec<u8>> {
        let table = self.shared.table();
        let key = table.keys.first()?;
        let mut datagram = vec![0; HEADER];
        datagram.extend_from_slice(payload);
        frame::write(&mut datagram, frame::PROBE, self.shared.me, to, key);
        Some(datagram)
    }

    /// Sends a datagram as it is. It is lost if the kernel refuses it.
    pub fn knock(&self, at: SocketAddr, datagram: &[u8]) {
        let _ = ovl_udp::send(self.shared.socket_to(at), at, datagram, datagram.len());
    }

    /// Replaces the next hops: the address and port of the relay, or of the host itself, to which datagrams to each host are sent.
    pub fn set_next(&self, next: HashMap<HostId, SocketAddr>) {
        self.shared.table_mut().next = next;
    }

    /// Opens the detour to a host, which stands in for it at this host's WireGuard interface with the address and port
    /// `wireguard`. An open one is kept.
    ///
    /// # Errors
    ///
    /// What the kernel reports.
    pub fn open_detour(&self, to: HostId, channel: Channel, wireguard: SocketAddr) -> io::Result<SocketAddr> {
        let key = (to, channel);
        if let Some(detour) = self.shared.table().detours.get(&key)
            && detour.wireguard == wireguard
        {
            return detour.local_addr();
        }
        let socket = ovl_udp::open(SocketAddr::new(wireguard.ip(), 0), Sharing::Alone)?;
        // Datagrams of other senders do not arrive.
        socket.connect(wireguard)?;
        let detour = Arc::new(Detour { to, channel, socket, wireguard });
        let local = detour.local_addr()?;
        let mut threads = ThreadGroup::new()?;
        let (shared, reader) = (Arc::clone(&self.shared), Arc::clone(&detour));
        threads.spawn("detour".to_owned(), move |stop| shared.run_detour(&reader, stop))?;
        self.shared.table_mut().detours.insert(key, detour);
        self.groups().insert(key, threads);
        Ok(local)
    }

    /// Closes the detour to a host, if there is one.
    pub fn close_detour(&self, to: HostId, channel: Channel) {
        self.shared.table_mut().detours.remove(&(to, channel));
        let threads = self.groups().remove(&(to, channel));
        drop(threads);
    }

    /// The numbers of datagrams since the start.
    pub fn counters(&self) -> Counters {
        let Counted { sent, received, forwarded, unauthenticated, no_path, limited, full } =
            &self.shared.counted;
        let read = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        Counters {
            sent: read(sent),
            received: read(received),
            forwarded: read(forwarded),
            unauthenticated: read(unauthenticated),
            no_path: read(no_path),
            limited: read(limited),
            full: read(full),
        }
    }

    fn groups(&self) -> MutexGuard<'_, HashMap<(HostId, Channel), ThreadGroup>> {
        self.detours.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl std::fmt::Debug for Relay {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Relay").field("counters", &self.counters()).finish_non_exhaustive()
    }
}

impl Shared {
    fn table(&self) -> RwLockReadGuard<'_, Table> {
        self.table.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn table_mut(&self) -> RwLockWriteGuard<'_, Table> {
        self.table.write().unwrap_or_else(PoisonError::into_inner)
    }

    /// The socket to other hosts of the family of an address.
    fn socket_to(&self, at: SocketAddr) -> &UdpSocket {
        let other = self.other.as_ref().filter(|_| at.is_ipv4() != self.is_ipv4);
        other.unwrap_or(&self.socket)
    }

    /// Reads a socket to other hosts, until the signal is set.
    fn run(&self, socket: &UdpSocket, stop: &StopSignal) {
        let mut batch = ReceiveBatch::new(SLOTS, MAX_COALESCED);
        let mut run = Run::new(MOST_SENT);
        let mut limits = self.limit.map(Limits::new);
        while !stop.is_set() {
            match batch.receive(socket, SLOTS) {
                Ok(received) => {
                    let (table, now) = (self.table(), Instant::now());
                    for datagrams in (0..received).filter_map(|slot| batch.get(slot)) {
                        for datagram in datagrams.bytes.chunks(datagrams.segment_size) {
                            let limits = limits.as_mut().map(|limits| (limits, now));
                            self.take(&table, &mut run, datagram, datagrams.from, limits);
                        }
                        self.flush(&table, &mut run);
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    stop.wait_readable(socket);
                }
                // The ICMP error of an earlier datagram.
                Err(_) => {}
            }
        }
    }

    /// Adds a received datagram to the run, after sending the run if it is of another kind.
    fn take(
        &self,
        table: &Table,
        run: &mut Run,
        datagram: &[u8],
        sender: SocketAddr,
        limits: Option<(&mut Limits, Instant)>,
    ) {
        let Some(header) =
            Header::parse(datagram).filter(|header| header.is_made_with(&table.keys, datagram))
        else {
            return count(&self.counted.unauthenticated, 1);
        };
        let Header { channel, from, to, hop_limit, .. } = header;
        let kind = Kind { channel, from, to };
        let is_here = to == self.me;
        if channel == frame::PROBE {
            return match datagram.get(HEADER..).filter(|_| is_here) {
                Some(payload) => (self.probed)(sender, payload),
                None => count(&self.counted.no_path, 1),
            };
        }
        if is_here && !table.detours.contains_key(&(from, channel)) {
            self.name(from, sender);
            return count(&self.counted.no_path, 1);
        }
        let passes = self.forwards && hop_limit > 1 && from != self.me && table.next.contains_key(&to);
        if !is_here && !passes {
            return count(&self.counted.no_path, 1);
        }
        if !is_here && limits.is_some_and(|(limits, now)| !limits.take(from, to, datagram.len(), now)) {
            return count(&self.counted.limited, 1);
        }
        let bytes = if is_here { datagram.get(HEADER..).unwrap_or_default() } else { datagram };
        if !run.takes(kind, bytes.len()) {
            self.flush(table, run);
        }
        let Some(place) = run.add(kind, bytes.len()) else { return };
        place.copy_from_slice(bytes);
        if !is_here {
            frame::set_hop_limit(place, hop_limit - 1);
        }
    }

    /// Sends a run to this host's WireGuard, or on to the next hop.
    fn flush(&self, table: &Table, run: &mut Run) {
        let Some((kind, bytes, segment)) = run.take() else { return };
        if kind.to == self.me {
            let Some(detour) = table.detours.get(&(kind.from, kind.channel)) else { return };
            self.send(&detour.socket, detour.wireguard, bytes, segment, &self.counted.received);
        } else if let Some(next) = table.next.get(&kind.to) {
            self.send(self.socket_to(*next), *next, bytes, segment, &self.counted.forwarded);
        }
    }

    /// Reads what this host's WireGuard sends to a host, until the signal is set.
    fn run_detour(&self, detour: &Detour, stop: &StopSignal) {
        let mut batch = ReceiveBatch::new(SLOTS, MAX_COALESCED);
        let mut run = Run::new(MOST_SENT);
        let kind = Kind { channel: detour.channel, from: self.me, to: detour.to };
        while !stop.is_set() {
            match batch.receive(&detour.socket, SLOTS) {
                Ok(received) => {
                    let table = self.table();
                    let path = table.keys.first().zip(table.next.get(&detour.to));
                    for datagrams in (0..received).filter_map(|slot| batch.get(slot)) {
                        let payloads = datagrams.bytes.chunks(datagrams.segment_size);
                        let Some((key, next)) = path else {
                            count(&self.counted.no_path, payloads.len());
                            continue;
                        };
                        let send = |run: &mut Run| {
                            if let Some((_, bytes, segment)) = run.take() {
                                let socket = self.socket_to(*next);
                                self.send(socket, *next, bytes, segment, &self.counted.sent);
                            }
                        };
                        for payload in payloads {
                            let length = HEADER + payload.len();
                            if !run.takes(kind, length) {
                                send(&mut run);
                            }
                            let Some(place) = run.add(kind, length) else { continue };
                            if let Some(body) = place.get_mut(HEADER..) {
                                body.copy_from_slice(payload);
                            }
                            frame::write(place, kind.channel, kind.from, kind.to, key);
                        }
                        send(&mut run);
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    stop.wait_readable(&detour.socket);
                }
                // WireGuard does not listen at the moment.
                Err(_) => {}
            }
        }
    }

    /// Sends datagrams that lie one after the other.
    fn send(&self, socket: &UdpSocket, to: SocketAddr, bytes: &[u8], segment: usize, counter: &AtomicU64) {
        let (sent, refused) = run::send(socket, to, bytes, segment);
        count(counter, sent);
        count(&self.counted.full, refused);
    }

    /// Tells of a host to which there is no detour.
    fn name(&self, from: HostId, sender: SocketAddr) {
        let now = Instant::now();
        let mut named = self.named.lock().unwrap_or_else(PoisonError::into_inner);
        let is_recent =
            |(at, when): &(SocketAddr, Instant)| *at == sender && now.duration_since(*when) < NAME_EVERY;
        if named.get(&from).is_some_and(is_recent) {
            return;
        }
        if named.len() >= MOST_NAMED {
            named.retain(|_, named| is_recent(named));
        }
        if named.len() < MOST_NAMED {
            named.insert(from, (sender, now));
            drop(named);
            (self.heard)(from, sender);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::net::{Ipv4Addr, Ipv6Addr};
    use std::sync::mpsc;

    use super::*;

    const A: HostId = [1; 10];
    const B: HostId = [2; 10];
    const C: HostId = [3; 10];

    fn local() -> SocketAddr {
        (Ipv4Addr::LOCALHOST, 0).into()
    }

    struct Host {
        relay: Relay,
        at: SocketAddr,
        /// Its address of the other family.
        other_at: SocketAddr,
        wireguard: UdpSocket,
        heard: mpsc::Receiver<(HostId, SocketAddr)>,
    }

    fn host(me: HostId) -> Host {
        limited(me, None)
    }

    fn limited(me: HostId, limit: Option<u64>) -> Host {
        let (tell, heard) = mpsc::channel();
        // The other family has a port of its own here.
        let listen_also = Some((Ipv6Addr::LOCALHOST, 0).into());
        let heard_from = move |from, sender| tell.send((from, sender)).unwrap();
        let relay = Relay::start(
            &RelayConfig { listen: local(), listen_also, mark: 0, me, forwards: true, limit },
            heard_from,
            |_, _| {},
        )
        .unwrap();
        relay.set_keys(vec![RelayKey::new([7; 4], &[7; 32])]);
        let at = relay.shared.socket.local_addr().unwrap();
        let other_at = relay.shared.other.as_ref().unwrap().local_addr().unwrap();
        let wireguard = UdpSocket::bind(local()).unwrap();
        wireguard.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
        Host { relay, at, other_at, wireguard, heard }
    }

    impl Host {
        fn detour(&self, to: HostId) -> SocketAddr {
            self.relay.open_detour(to, 0, self.wireguard.local_addr().unwrap()).unwrap()
        }

        fn receive(&self) -> (Vec<u8>, SocketAddr) {
            let mut bytes = [0; 2048];
            let (length, from) = self.wireguard.recv_from(&mut bytes).unwrap();
            (bytes[..length].to_vec(), from)
        }
    }

    #[test]
    fn what_two_hosts_send_beyond_their_limit_is_dropped_and_counted() {
        let (a, relay, b) = (host(A), limited(C, Some(1_000_000)), host(B));
        a.relay.set_next(HashMap::from([(B, relay.at)]));
        relay.relay.set_next(HashMap::from([(B, b.at)]));
        let (to_b, _) = (a.detour(B), b.detour(A));
        // The bucket holds 128 KiB.
        let datagram = [1; 1000];
        let sent = 300;
        for number in 1..=sent {
            a.wireguard.send_to(&datagram, to_b).unwrap();
            wait(|| a.relay.counters().sent == number);
            wait(|| {
                let Counters { forwarded, limited, .. } = relay.relay.counters();
                forwarded + limited == number
            });
        }
        let Counters { forwarded, limited, .. } = relay.relay.counters();
        assert!(forwarded >= 120 && limited > 0, "{forwarded} {limited}");
    }

    #[test]
    fn datagrams_cross_a_relay_both_ways_and_the_first_one_names_its_sender() {
        let [a, b, c] = [A, B, C].map(host);
        a.relay.set_next([(B, c.at)].into());
        b.relay.set_next([(A, c.at)].into());
        c.relay.set_next([(A, a.at), (B, b.at)].into());
        let to_b = a.detour(B);
        a.wireguard.send_to(b"lost", to_b).unwrap();
        assert_eq!(b.heard.recv_timeout(Duration::from_secs(5)).unwrap(), (A, c.at));
        let to_a = b.detour(A);
        a.wireguard.send_to(b"hello", to_b).unwrap();
        assert_eq!(b.receive(), (b"hello".to_vec(), to_a));
        b.wireguard.send_to(b"answer", to_a).unwrap();
        assert_eq!(a.receive(), (b"answer".to_vec(), to_b));
        // The last one is counted after it was sent.
        let start = Instant::now();
        while c.relay.counters().forwarded < 3 {
            assert!(start.elapsed() < Duration::from_secs(5));
            std::thread::yield_now();
        }
        let counters = c.relay.counters();
        assert_eq!((counters.forwarded, counters.received, counters.no_path), (3, 0, 0));
    }

    #[test]
    fn datagrams_cross_a_relay_from_a_host_of_one_address_family_to_one_of_the_other() {
        let [a, b, c] = [A, B, C].map(host);
        a.relay.set_next([(B, c.at)].into());
        b.relay.set_next([(A, c.other_at)].into());
        c.relay.set_next([(A, a.at), (B, b.other_at)].into());
        let (to_b, to_a) = (a.detour(B), b.detour(A));
        a.wireguard.send_to(b"hello", to_b).unwrap();
        assert_eq!(b.receive(), (b"hello".to_vec(), to_a));
        b.wireguard.send_to(b"answer", to_a).unwrap();
        assert_eq!(a.receive(), (b"answer".to_vec(), to_b));
    }

    #[test]
    fn datagrams_without_a_key_or_a_path_or_in_a_loop_are_counted_and_dropped() {
        let [a, b, c] = [A, B, C].map(host);
        // B and C each take the other one for the next hop to A, which they do not reach.
        a.relay.set_next([(B, b.at)].into());
        b.relay.set_next([(A, c.at)].into());
        c.relay.set_next([(A, b.at)].into());
        let to_a = c.detour(A);
        c.wireguard.send_to(b"around", to_a).unwrap();
        let passed = || b.relay.counters().forwarded + c.relay.counters().forwarded;
        let dropped = || b.relay.counters().no_path + c.relay.counters().no_path;
        wait(|| dropped() == 1);
        assert!(passed() < u64::from(frame::HOP_LIMIT));
        let stranger = UdpSocket::bind(local()).unwrap();
        stranger.send_to(&[0xd7; 100], b.at).unwrap();
        stranger.send_to(b"x", b.at).unwrap();
        wait(|| b.relay.counters().unauthenticated == 2);
        // Nothing is opened twice, and a closed detour is closed.
        assert_eq!(c.detour(A), to_a);
        c.relay.close_detour(A, 0);
        assert!(c.relay.shared.table().detours.is_empty());
    }

    fn wait(mut is_so: impl FnMut() -> bool) {
        let start = Instant::now();
        while !is_so() {
            assert!(start.elapsed() < Duration::from_secs(5));
            std::thread::yield_now();
        }
    }
}
