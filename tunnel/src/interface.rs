//! One end of a tunnel: a TUN device, a socket and the peers behind it, and the threads that carry packets
//! between the two.

use std::fs::File;
use std::io;
use std::net::{IpAddr, Ipv6Addr, SocketAddr, UdpSocket};
use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, RwLock};
use std::thread::available_parallelism;

use boringtun::noise::handshake::parse_handshake_anon;
use boringtun::noise::rate_limiter::RateLimiter;
use boringtun::noise::{Packet, Tunn, TunnResult};
use boringtun::x25519::{PublicKey as Public, StaticSecret};

use crate::api::{InterfaceConfig, PeerConfig, PublicKey};
use crate::cut::{UncutPacket, cut};
use crate::join::Joiner;
use crate::packet::{Ip, VXLAN_HEADERS, VnetHeader, VxlanFrame, put_vxlan};
use crate::peers::{PeerTable, Session, WireguardPeer};
use crate::switch::{Counters, Device, Switch, Tap, reading, writing};
use crate::sys::{self, Kind, Received, Receiver, VNET_HEADER};

/// What WireGuard puts around a packet: a header of 16 bytes and a tag of 16.
const OVERHEAD: usize = 32;
/// Its first byte tells a message with data from the three kinds of a handshake.
const DATA: u8 = 4;
/// The largest message of a handshake.
const HANDSHAKE: usize = 148;
/// Handshakes begun by others that are answered in a second before they have to prove their address. The
/// limiter sees each of them twice: here, and in the session that it is for.
const HANDSHAKES: u64 = 2 * 500;
/// Packets that waited for a session and are sent at once when there is one.
const WAITING: usize = 256;

/// Before a packet in a buffer: the device's header, or those of VXLAN.
const HEAD: usize = 64;
/// The largest packet of a device.
const PACKET: usize = 65_536;
/// After it, for padding.
const TAIL: usize = 16;
/// A super-packet, sealed: segments of 200 bytes still fit.
const SEALED: usize = 96 * 1024;
/// What one call sends: so many datagrams, in a UDP packet's length of 16 bits (udp(7)).
const MAX_SEGMENTS: usize = 64;
const MAX_DATAGRAM: usize = 65_487;

/// Threads in each direction, where the machine has as many cores.
const THREADS: usize = 4;

/// Joined datagrams that are received at once.
const SLOTS: usize = 64;
/// Opened packets that wait to be joined.
const OPENED: usize = 4 * PACKET;

/// Who this end is.
struct Identity {
    secret: StaticSecret,
    public: Public,
    limiter: Arc<RateLimiter>,
}

impl Identity {
    fn new(key: [u8; 32]) -> Self {
        let secret = StaticSecret::from(key);
        let public = Public::from(&secret);
        Self { secret, public, limiter: Arc::new(RateLimiter::new(&public, HANDSHAKES)) }
    }
}

/// One end of a tunnel.
pub(crate) struct Interface {
    pub(crate) name: String,
    address: Ipv6Addr,
    vxlan_port: u16,
    /// The queues of the device, one for each pair of threads.
    files: Vec<File>,
    identity: RwLock<Identity>,
    /// As many.
    sockets: RwLock<Vec<Arc<UdpSocket>>>,
    peers: RwLock<PeerTable>,
    switch: Arc<Switch>,
    /// The device's, as it was found a moment ago.
    mtu: AtomicUsize,
    /// The kernel cuts what we send.
    cuts: AtomicBool,
    pub(crate) stopped: AtomicBool,
}

impl Interface {
    /// Makes the device and the socket.
    pub(crate) fn open(name: &str, config: &InterfaceConfig, switch: &Arc<Switch>) -> io::Result<Self> {
        let threads = available_parallelism().map_or(1, usize::from).min(THREADS);
        let sockets = sys::open_sockets(config.listen, threads)?;
        let files = sys::open_device(name, Kind::Tun, threads)?;
        let mtu = sys::mtu(name, sockets.first().ok_or(io::ErrorKind::NotFound)?)?;
        Ok(Self {
            name: name.to_owned(),
            address: config.address,
            vxlan_port: config.vxlan_port,
            files,
            identity: RwLock::new(Identity::new(config.key.0)),
            sockets: RwLock::new(sockets),
            peers: RwLock::default(),
            switch: Arc::clone(switch),
            mtu: AtomicUsize::new(mtu),
            cuts: AtomicBool::new(true),
            stopped: AtomicBool::new(false),
        })
    }

    /// How many threads serve it in each direction.
    pub(crate) fn threads(&self) -> usize {
        self.files.len()
    }

    pub(crate) fn peers(&self) -> impl std::ops::Deref<Target = PeerTable> + '_ {
        reading(&self.peers)
    }

    fn socket(&self, thread: usize) -> Option<Arc<UdpSocket>> {
        reading(&self.sockets).get(thread).cloned()
    }

    /// Other sockets; gives the old ones, which are closed when the receiving threads have let go of them.
    pub(crate) fn listen_at(&self, listen: SocketAddr) -> io::Result<Vec<Arc<UdpSocket>>> {
        let sockets = sys::open_sockets(listen, self.threads())?;
        self.cuts.store(true, Ordering::Relaxed);
        Ok(std::mem::replace(&mut *writing(&self.sockets), sockets))
    }

    /// Another key: all sessions are new ones.
    pub(crate) fn set_key(&self, key: [u8; 32]) {
        *writing(&self.identity) = Identity::new(key);
        let all: Vec<_> = self.peers().status().into_iter().map(|peer| (peer.key, peer.config)).collect();
        for (key, config) in all {
            writing(&self.peers).remove(&key);
            self.set_peer(key, &config);
        }
    }

    /// Adds a peer and says hello to it, or changes one.
    pub(crate) fn set_peer(&self, key: PublicKey, config: &PeerConfig) {
        let mut peers = writing(&self.peers);
        if let Some(peer) = peers.by_key(&key).cloned() {
            peer.session().endpoint = config.endpoint;
            peers.put(&peer, config);
            return;
        }
        let slot = peers.free_slot();
        let identity = reading(&self.identity);
        let limiter = Some(Arc::clone(&identity.limiter));
        let tunn = Tunn::new(identity.secret.clone(), Public::from(key), None, None, slot, limiter);
        let peer = Arc::new(WireguardPeer::new(key, slot, tunn, config.endpoint));
        peers.put(&peer, config);
        drop(peers);
        // Not with the first packet: after a restart the peer has a session that we know nothing of, and
        // would go on using it.
        let mut message = [0; HANDSHAKE];
        let mut session = peer.session();
        if let TunnResult::WriteToNetwork(message) =
            session.tunn.format_handshake_initiation(&mut message, false)
        {
            self.send_one(session.endpoint, message);
        }
    }

    pub(crate) fn delete_peer(&self, key: &PublicKey) {
        writing(&self.peers).remove(key);
    }

    /// What time makes necessary: new handshakes, the end of old sessions. Several times a second.
    pub(crate) fn tick(&self) {
        reading(&self.identity).limiter.reset_count();
        if let Some(mtu) = self.socket(0).and_then(|socket| sys::mtu(&self.name, &socket).ok()) {
            self.mtu.store(mtu, Ordering::Relaxed);
        }
        let mut message = [0; HANDSHAKE];
        for peer in reading(&self.peers).all() {
            let mut session = peer.session();
            if let TunnResult::WriteToNetwork(message) = session.tunn.update_timers(&mut message) {
                self.send_one(session.endpoint, message);
            }
        }
    }

    fn send_one(&self, to: SocketAddr, datagram: &[u8]) {
        let sent = self.socket(0).map(|socket| sys::send(&socket, to, datagram, datagram.len()));
        if !matches!(sent, Some(Ok(_))) {
            Counters::count(&self.switch.counters.full);
        }
    }

    /// Sends datagrams of one size, the last of which may be shorter.
    fn send(&self, to: SocketAddr, datagrams: &[u8], size: usize) {
        let Some(socket) = self.socket(0) else { return };
        let at_once = size * (MAX_DATAGRAM / size.max(1)).clamp(1, MAX_SEGMENTS);
        for part in datagrams.chunks(at_once.max(1)) {
            if self.cuts.load(Ordering::Relaxed) {
                match sys::send(&socket, to, part, size) {
                    // A network card that computes no checksums: then the kernel does not cut.
                    Err(error) if error.raw_os_error() == Some(nix::libc::EIO) => {
                        self.cuts.store(false, Ordering::Relaxed);
                    }
                    Ok(_) => continue,
                    Err(_) => {
                        Counters::count(&self.switch.counters.full);
                        continue;
                    }
                }
            }
            for datagram in part.chunks(size) {
                self.send_one(to, datagram);
            }
        }
    }

    /// From the device to the peers, until told to stop or the device is gone.
    pub(crate) fn run_device(&self, thread: usize) {
        let mut sealer = Sealer::default();
        let mut buffer = vec![0; HEAD + PACKET + TAIL];
        let Some(file) = self.files.get(thread) else { return };
        while let Some((vnet, end)) = next(file, &mut buffer, &self.stopped) {
            let Some(vnet) = vnet else { continue };
            let packet = buffer.get(HEAD..end).unwrap_or_default();
            let peer = Ip::parse(packet).and_then(|ip| reading(&self.peers).holder(ip.destination).cloned());
            let Some(peer) = peer else {
                Counters::count(&self.switch.counters.no_peer);
                continue;
            };
            let whole = UncutPacket { start: HEAD, given: HEAD, end, is_frame: false, vnet };
            sealer.seal(self, &peer, &mut buffer, &whole);
        }
        self.stopped.store(true, Ordering::Relaxed);
    }

    /// From the peers to the devices, until told to stop.
    pub(crate) fn run_socket(&self, thread: usize) {
        let mut receiver = Receiver::new(SLOTS);
        let Some(file) = self.files.get(thread) else { return };
        let mut opener = Opener::new(self, file);
        while !self.stopped.load(Ordering::Relaxed) {
            let Some(socket) = self.socket(thread) else { return };
            // Interrupted, or told of an error of an earlier datagram: neither is a reason to stop.
            let _ = receiver.receive(&socket, |received| opener.take(received));
            opener.flush();
        }
    }
}

/// The next packet of a device, at `HEAD`: its header, if we understand it, and its end. None at the end.
fn next(file: &File, buffer: &mut [u8], stopped: &AtomicBool) -> Option<(Option<VnetHeader>, usize)> {
    loop {
        if stopped.load(Ordering::Relaxed) {
            return None;
        }
        match sys::read(file, buffer.get_mut(HEAD - VNET_HEADER..HEAD + PACKET)?) {
            Ok(length) => {
                let vnet = buffer.get(HEAD - VNET_HEADER..HEAD).and_then(VnetHeader::parse);
                return Some((vnet, HEAD - VNET_HEADER + length.max(VNET_HEADER)));
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => {
                tracing::warn!(%error, "a device of the tunnel is gone");
                return None;
            }
        }
    }
}

/// From a switched network to the peers, until told to stop or the device is gone.
pub(crate) fn run_tap(tap: &Tap, switch: &Switch) {
    let mut sealer = Sealer::default();
    let mut buffer = vec![0; HEAD + PACKET + TAIL];
    let mut copy = Vec::new();
    let mut to = Vec::new();
    while let Some((vnet, end)) = next(&tap.file, &mut buffer, &tap.stopped) {
        let Some(vnet) = vnet else { continue };
        tap.table().destinations(buffer.get(HEAD..end).unwrap_or_default(), &mut to);
        if to.is_empty() {
            Counters::count(&switch.counters.no_peer);
        }
        copy.clear();
        if to.len() > 1 {
            copy.extend_from_slice(buffer.get(HEAD..end).unwrap_or_default());
        }
        for host in &to {
            let Some(interface) = switch.path(*host) else {
                Counters::count(&switch.counters.no_peer);
                continue;
            };
            let peer = reading(&interface.peers).holder(IpAddr::V6(*host)).cloned();
            let Some(peer) = peer else {
                Counters::count(&switch.counters.no_peer);
                continue;
            };
            // Cutting writes over what it has handed out.
            if let Some(place) = buffer.get_mut(HEAD..end).filter(|_| !copy.is_empty()) {
                place.copy_from_slice(&copy);
            }
            let start = HEAD - VXLAN_HEADERS;
            if let Some(place) = buffer.get_mut(start..HEAD) {
                let ports = (interface.vxlan_port, interface.vxlan_port);
                put_vxlan(place, interface.address, *host, ports, tap.vni, end - HEAD);
            }
            let whole = UncutPacket { start, given: HEAD, end, is_frame: true, vnet };
            sealer.seal(&interface, &peer, &mut buffer, &whole);
        }
    }
    tap.stopped.store(true, Ordering::Relaxed);
}

/// Seals what a packet is cut into, and sends it with as few calls as can be.
struct Sealer {
    sealed: Vec<u8>,
}

impl Default for Sealer {
    fn default() -> Self {
        Self { sealed: vec![0; SEALED] }
    }
}

impl Sealer {
    fn seal(&mut self, interface: &Interface, peer: &WireguardPeer, buffer: &mut [u8], whole: &UncutPacket) {
        let mtu = interface.mtu.load(Ordering::Relaxed);
        let counters = &interface.switch.counters;
        let (mut used, mut size, mut bytes) = (0, 0, 0);
        let mut handshake = None;
        let result = cut(buffer, whole, |buffer, at| {
            let (packet, restore) = pad(buffer, &at, mtu);
            // As much as the library asks for; it would panic with less.
            let room = self.sealed.get_mut(used..).filter(|room| room.len() >= HANDSHAKE + packet.len());
            // For one packet and not for all: the other direction waits by turning round, and not in the
            // kernel, which costs both more.
            let mut session = peer.session();
            let Session { tunn, has_queued, .. } = &mut *session;
            match room.map(|room| tunn.encapsulate(packet, room)) {
                Some(TunnResult::WriteToNetwork(datagram)) if datagram.first() == Some(&DATA) => {
                    size = size.max(datagram.len());
                    used += datagram.len();
                    bytes += at.len() as u64;
                }
                // No session: the packet waits for one, and the first of them asks for it.
                Some(TunnResult::WriteToNetwork(message)) => {
                    *has_queued = true;
                    handshake = <[u8; HANDSHAKE]>::try_from(&*message).ok();
                }
                Some(TunnResult::Done) => *has_queued = true,
                _ => Counters::count(&counters.full),
            }
            drop(session);
            restore.undo(buffer);
        });
        let to = peer.session().endpoint;
        if result.is_err() {
            Counters::count(&counters.no_peer);
        }
        if let Some(message) = handshake {
            interface.send_one(to, &message);
        }
        if used > 0 {
            interface.send(to, self.sealed.get(..used).unwrap_or_default(), size);
            peer.sent.fetch_add(bytes, Ordering::Relaxed);
        }
    }
}

/// What was where padding is now.
struct Restore {
    from: usize,
    length: usize,
    bytes: [u8; 16],
}

impl Restore {
    fn undo(&self, buffer: &mut [u8]) {
        if let Some(place) = buffer.get_mut(self.from..self.from + self.length) {
            place.copy_from_slice(&self.bytes[..self.length]);
        }
    }
}

/// Packets are padded with zeroes to a multiple of 16 bytes, if the path takes it (the WireGuard paper,
/// section 5.4.6). What comes after a packet may be the payload of the next one.
fn pad<'a>(buffer: &'a mut [u8], at: &Range<usize>, mtu: usize) -> (&'a [u8], Restore) {
    let padded = at.len().next_multiple_of(16).min(mtu).max(at.len());
    let mut restore = Restore { from: at.end, length: padded - at.len(), bytes: [0; 16] };
    if let Some(place) = buffer.get_mut(at.end..at.end + restore.length) {
        restore.bytes[..place.len()].copy_from_slice(place);
        place.fill(0);
    }
    (buffer.get(at.start..at.start + padded).unwrap_or_default(), restore)
}

/// Opens what comes from peers, checks whose it is, and writes it to the devices.
struct Opener<'a> {
    interface: &'a Interface,
    /// The queue of the device that is this thread's.
    file: &'a File,
    opened: Vec<u8>,
    used: usize,
    /// Packets of one peer that are still to be looked at.
    packets: Vec<Range<usize>>,
    /// The last sender, and an address that it may send from: until the next flush nothing is asked twice.
    last: Option<(Arc<WireguardPeer>, Option<IpAddr>)>,
    tun: Joiner,
    taps: Vec<(Arc<Tap>, Joiner)>,
}

impl<'a> Opener<'a> {
    fn new(interface: &'a Interface, file: &'a File) -> Self {
        Self {
            interface,
            file,
            opened: vec![0; OPENED],
            used: 0,
            packets: Vec::new(),
            last: None,
            tun: Joiner::default(),
            taps: Vec::new(),
        }
    }

    fn device(&self) -> Device<'a> {
        Device { file: self.file, counters: &self.interface.switch.counters }
    }

    /// Writes what waits, so that the buffer is free.
    fn flush(&mut self) {
        let device = self.device();
        self.tun.flush(&mut self.opened, &device);
        let counters = &self.interface.switch.counters;
        for (tap, joiner) in &mut self.taps {
            joiner.flush(&mut self.opened, &Device { file: &tap.file, counters });
        }
        self.taps.retain(|(tap, _)| !tap.stopped.load(Ordering::Relaxed));
        self.used = 0;
        self.last = None;
    }

    /// Datagrams of one sender.
    fn take(&mut self, received: Received<'_>) {
        if OPENED - self.used < received.bytes.len() + HANDSHAKE {
            self.flush();
        }
        let Received { from, bytes, size } = received;
        let mut datagrams = bytes.chunks(size).peekable();
        while let Some(datagram) = datagrams.next() {
            let Some(slot) = slot_of_data(datagram) else {
                self.handshake(from, datagram);
                continue;
            };
            let known = self.last.take().filter(|(peer, _)| peer.slot == slot);
            let known = known.or_else(|| {
                let peers = reading(&self.interface.peers);
                peers.by_slot(slot).map(|peer| (Arc::clone(peer), None))
            });
            let Some((peer, source)) = known else {
                Counters::count(&self.interface.switch.counters.unauthenticated);
                continue;
            };
            self.open(&peer, from, datagram);
            while let Some(datagram) = datagrams.next_if(|next| slot_of_data(next) == Some(slot)) {
                self.open(&peer, from, datagram);
            }
            let source = self.deliver(&peer, source);
            self.last = Some((peer, source));
        }
    }

    /// A message with data.
    fn open(&mut self, peer: &WireguardPeer, from: SocketAddr, datagram: &[u8]) {
        let Some(room) = self.opened.get_mut(self.used..).filter(|room| room.len() >= datagram.len()) else {
            return;
        };
        let mut session = peer.session();
        match session.tunn.decapsulate(Some(from.ip()), datagram, room) {
            TunnResult::WriteToTunnelV4(packet, _) | TunnResult::WriteToTunnelV6(packet, _) => {
                peer.received.fetch_add(packet.len() as u64, Ordering::Relaxed);
                self.packets.push(self.used..self.used + packet.len());
                self.used += packet.len();
            }
            // Without content: it says that the peer is there.
            TunnResult::Done => {}
            TunnResult::WriteToNetwork(_) => return,
            TunnResult::Err(_) => {
                Counters::count(&self.interface.switch.counters.unauthenticated);
                return;
            }
        }
        session.endpoint = from;
        if session.has_queued {
            self.send_waiting(&mut session);
        }
    }

    /// There is a session: what waited for it goes out.
    fn send_waiting(&self, session: &mut Session) {
        session.has_queued = false;
        let mut room = vec![0; PACKET + OVERHEAD + TAIL];
        for _ in 0..WAITING {
            let TunnResult::WriteToNetwork(datagram) = session.tunn.decapsulate(None, &[], &mut room) else {
                return;
            };
            self.interface.send_one(session.endpoint, datagram);
        }
    }

    /// A message of a handshake, or nonsense.
    fn handshake(&mut self, from: SocketAddr, datagram: &[u8]) {
        let counters = &self.interface.switch.counters;
        let mut reply = [0; HANDSHAKE];
        let identity = reading(&self.interface.identity);
        let verified = identity.limiter.verify_packet(Some(from.ip()), datagram, &mut reply);
        let peers = reading(&self.interface.peers);
        let peer = match verified {
            Ok(Packet::HandshakeInit(message)) => {
                parse_handshake_anon(&identity.secret, &identity.public, &message)
                    .ok()
                    .and_then(|half| peers.by_key(&half.peer_static_public).cloned())
            }
            Ok(Packet::HandshakeResponse(message)) => peers.by_slot(message.receiver_idx >> 8).cloned(),
            Ok(Packet::PacketCookieReply(message)) => peers.by_slot(message.receiver_idx >> 8).cloned(),
            Ok(Packet::PacketData(_)) => None,
            // Many at once: whoever it is shall show that it is where it says.
            Err(TunnResult::WriteToNetwork(cookie)) => {
                self.interface.send_one(from, cookie);
                return;
            }
            Err(_) => None,
        };
        drop(peers);
        drop(identity);
        let Some(peer) = peer else {
            Counters::count(&counters.unauthenticated);
            return;
        };
        let mut session = peer.session();
        match session.tunn.decapsulate(Some(from.ip()), datagram, &mut reply) {
            TunnResult::WriteToNetwork(message) => {
                // Either the answer, which a stranger could not have asked for, or the first data.
                session.endpoint = from;
                let is_first_data = message.first() == Some(&DATA);
                self.interface.send_one(from, message);
                if is_first_data {
                    self.send_waiting(&mut session);
                }
            }
            TunnResult::Err(_) => Counters::count(&counters.unauthenticated),
            _ => {}
        }
    }

    /// Packets that this peer sealed: are they its own, and where do they go?
    ///
    /// Takes and gives an address that is known to be its own.
    fn deliver(&mut self, peer: &WireguardPeer, mut last: Option<IpAddr>) -> Option<IpAddr> {
        let interface = self.interface;
        let counters = &interface.switch.counters;
        let mut packets = std::mem::take(&mut self.packets);
        for at in packets.drain(..) {
            let Some(ip) = self.opened.get(at.clone()).and_then(Ip::parse) else {
                Counters::count(&counters.spoofed);
                continue;
            };
            if last != Some(ip.source) {
                let is_own = reading(&interface.peers)
                    .holder(ip.source)
                    .is_some_and(|holder| holder.slot == peer.slot);
                if !is_own {
                    Counters::count(&counters.spoofed);
                    continue;
                }
                last = Some(ip.source);
            }
            let packet = self.opened.get(at.clone()).unwrap_or_default();
            match VxlanFrame::parse(packet, &ip, interface.address, interface.vxlan_port) {
                Some(inner) => self.deliver_frame(at.start, inner),
                None => {
                    let device = self.device();
                    self.tun.add(&mut self.opened, at, false, &device);
                }
            }
        }
        self.packets = packets;
        last
    }

    fn deliver_frame(&mut self, start: usize, inner: VxlanFrame) {
        let counters = &self.interface.switch.counters;
        let index = match self.taps.iter().position(|(tap, _)| tap.vni == inner.vni) {
            Some(index) => index,
            None => {
                let Some(tap) = self.interface.switch.tap(inner.vni) else {
                    Counters::count(&counters.no_peer);
                    return;
                };
                self.taps.push((tap, Joiner::default()));
                self.taps.len() - 1
            }
        };
        let (tap, joiner) = &mut self.taps[index];
        let at = start + inner.start..start + inner.end;
        let frame = self.opened.get(at.clone()).unwrap_or_default();
        if !tap.table().is_honest(frame, inner.from) {
            Counters::count(&counters.spoofed);
            return;
        }
        joiner.add(&mut self.opened, at, true, &Device { file: &tap.file, counters });
    }
}

/// The upper bits of the receiver's index in a message with data.
fn slot_of_data(datagram: &[u8]) -> Option<u32> {
    let kind = datagram.first_chunk::<4>()?;
    let index = u32::from_le_bytes(*datagram.get(4..)?.first_chunk()?);
    (*kind == [DATA, 0, 0, 0] && datagram.len() >= OVERHEAD).then_some(index >> 8)
}
