//! A WireGuard interface: a TUN device, UDP sockets and peers, and the threads that carry packets between
//! them.

use std::io;
use std::net::{IpAddr, Ipv6Addr, SocketAddr};
use std::ops::{Deref, Range};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, RwLock};
use std::time::{Duration, Instant};

use boringtun::noise::errors::WireGuardError;
use boringtun::noise::handshake::parse_handshake_anon;
use boringtun::noise::rate_limiter::RateLimiter;
use boringtun::noise::{Packet, Tunn, TunnResult};
use boringtun::x25519::{PublicKey as X25519PublicKey, StaticSecret};
use ovl_udp::Received;

use crate::api::{InterfaceConfig, PeerConfig, PublicKey};
use crate::backend::{Backend, Device, Socket};
use crate::cut::{UncutPacket, cut};
use crate::join::Joiner;
use crate::packet::{Ip, VXLAN_HEADERS, VnetHeader, VxlanFrame, put_vxlan};
use crate::peers::{PeerTable, Session, WireguardPeer};
use crate::segments::{self, PAIR};
use crate::switch::{Counters, DeviceOutput, Switch, Tap, TapOutput, reading, writing};
use crate::sys::VNET_HEADER;
use ovl_udp::threads::StopSignal;

/// What WireGuard adds to a packet, in bytes: a header of 16 and a tag of 16.
const OVERHEAD: usize = 32;
/// The first byte of a transport data message (WireGuard paper, section 5.4.6).
const DATA: u8 = 4;
/// The largest handshake message, in bytes.
const HANDSHAKE: usize = 148;
/// Handshake initiations that are answered per second before initiators have to prove their address with a
/// cookie. The limiter counts each of them twice: here, and in the session that it belongs to.
const HANDSHAKES_PER_SECOND: u64 = 2 * 500;
/// Packets that wait for a session and are sent at once when it is established.
const MAX_QUEUED: usize = 256;

/// Room in front of a packet, in bytes: for the device's header, or for the headers of VXLAN.
const HEADROOM: usize = 64;
/// The largest packet of a device, in bytes.
const MAX_PACKET: usize = 65_536;
/// Room for padding after a packet, in bytes.
const TAILROOM: usize = 16;
/// Room for the sealed segments of a super-packet, in bytes: enough for segments of 200 bytes.
const SEALED: usize = 96 * 1024;
/// Datagrams that one call sends at most (udp(7)).
const MAX_SEGMENTS: usize = 64;
/// Bytes that one call sends at most: a UDP length has 16 bits.
const MAX_DATAGRAM: usize = 65_487;
/// Room for opened packets that wait to be joined, in bytes.
const OPENED: usize = 4 * MAX_PACKET;

/// How often the timers of sessions are checked.
const TICK: Duration = Duration::from_millis(250);
/// The interval between two handshakes with one peer that are begun because its clock went back.
const TURN_EVERY: Duration = Duration::from_secs(1);

/// The private key of an interface and what depends on it.
struct Identity {
    secret: StaticSecret,
    public: X25519PublicKey,
    limiter: Arc<RateLimiter>,
}

impl Identity {
    fn new(key: [u8; 32]) -> Self {
        let secret = StaticSecret::from(key);
        let public = X25519PublicKey::from(&secret);
        Self { secret, public, limiter: Arc::new(RateLimiter::new(&public, HANDSHAKES_PER_SECOND)) }
    }
}

/// The switch of an engine, whose paths are interfaces.
pub(crate) type Paths<B> = Switch<B, Interface<B>>;

/// A WireGuard interface, as its threads share it.
pub(crate) struct Interface<B: Backend> {
    name: String,
    address: Ipv6Addr,
    vxlan_port: u16,
    /// The address of the sockets.
    own: RwLock<IpAddr>,
    identity: RwLock<Identity>,
    /// The sockets to send from; none after [`Interface::close`].
    sockets: RwLock<Vec<Arc<B::Socket>>>,
    peers: RwLock<PeerTable>,
    switch: Arc<Paths<B>>,
    /// The MTU of the device in bytes, as the last tick found it.
    mtu: AtomicUsize,
    /// The kernel divides datagrams (`UDP_SEGMENT`).
    has_segmentation: AtomicBool,
    /// Set when the device is gone, or when the interface is about to be deleted.
    pub(crate) stop: Arc<StopSignal>,
}

impl<B: Backend> Interface<B> {
    pub(crate) fn new(
        name: &str,
        config: &InterfaceConfig,
        sockets: Vec<Arc<B::Socket>>,
        switch: &Arc<Paths<B>>,
        stop: &Arc<StopSignal>,
    ) -> io::Result<Self> {
        let mtu = sockets.first().ok_or(io::ErrorKind::NotFound)?.device_mtu(name)?;
        Ok(Self {
            name: name.to_owned(),
            address: config.address,
            vxlan_port: config.vxlan_port,
            own: RwLock::new(config.listen.ip()),
            identity: RwLock::new(Identity::new(config.key.0)),
            sockets: RwLock::new(sockets),
            peers: RwLock::default(),
            switch: Arc::clone(switch),
            mtu: AtomicUsize::new(mtu),
            has_segmentation: AtomicBool::new(true),
            stop: Arc::clone(stop),
        })
    }

    pub(crate) fn peers(&self) -> impl Deref<Target = PeerTable> + '_ {
        reading(&self.peers)
    }

    /// Sends from other sockets at this address from now on. Waits until no thread sends from the old ones.
    pub(crate) fn set_sockets(&self, own: IpAddr, sockets: Vec<Arc<B::Socket>>) {
        *writing(&self.own) = own;
        self.peers().all().for_each(|peer| peer.session().own = own);
        *writing(&self.sockets) = sockets;
        self.has_segmentation.store(true, Ordering::Relaxed);
    }

    /// Lets go of the sockets. Waits until no thread sends from them.
    pub(crate) fn close(&self) {
        writing(&self.sockets).clear();
    }

    /// Changes the private key, which ends all sessions and begins new ones.
    pub(crate) fn set_key(&self, key: [u8; 32]) {
        *writing(&self.identity) = Identity::new(key);
        let all: Vec<_> = self.peers().status().into_iter().map(|peer| (peer.key, peer.config)).collect();
        for (key, config) in all {
            writing(&self.peers).remove(&key);
            self.set_peer(key, &config);
        }
    }

    /// Adds a peer and begins a handshake with it, or changes a peer.
    pub(crate) fn set_peer(&self, key: PublicKey, config: &PeerConfig) {
        // In this order, as receiving threads take the two locks.
        let identity = reading(&self.identity);
        let mut peers = writing(&self.peers);
        if let Some(peer) = peers.by_key(&key).cloned() {
            let is_elsewhere = {
                let mut session = peer.session();
                let before = std::mem::replace(&mut session.endpoint, config.endpoint);
                let is_new = before != config.endpoint && session.tunn.stats().0.is_none();
                if is_new {
                    session.first = (Instant::now(), 0);
                }
                is_new
            };
            peers.put(&peer, config);
            drop((peers, identity));
            if is_elsewhere {
                self.initiate_handshake(&peer, true);
            }
            return;
        }
        let slot = peers.free_slot();
        let limiter = Some(Arc::clone(&identity.limiter));
        let tunn = Tunn::new(identity.secret.clone(), X25519PublicKey::from(key), None, None, slot, limiter);
        let peer = Arc::new(WireguardPeer::new(key, slot, tunn, config.endpoint, *reading(&self.own)));
        peers.put(&peer, config);
        drop((peers, identity));
        // At once, not with the first packet: after a restart of ovld the peer still has a session that this
        // side does not know, and would go on using it.
        self.initiate_handshake(&peer, false);
    }

    /// Sends a handshake initiation; `is_forced` also if there is a handshake in flight.
    pub(crate) fn initiate_handshake(&self, peer: &WireguardPeer, is_forced: bool) {
        let mut message = [0; HANDSHAKE];
        let mut session = peer.session();
        if let TunnResult::WriteToNetwork(message) =
            session.tunn.format_handshake_initiation(&mut message, is_forced)
        {
            self.send_one(session.endpoint, message);
        }
    }

    pub(crate) fn delete_peer(&self, key: &PublicKey) {
        writing(&self.peers).remove(key);
    }

    /// Checks the timers of all sessions until told to end.
    pub(crate) fn run_timers(&self, stop: &StopSignal) {
        while stop.sleep(TICK) {
            self.tick();
        }
    }

    /// Begins handshakes that are due, ends expired sessions, and reads the device's MTU.
    fn tick(&self) {
        reading(&self.identity).limiter.reset_count();
        let mtu = reading(&self.sockets).first().and_then(|socket| socket.device_mtu(&self.name).ok());
        if let Some(mtu) = mtu {
            self.mtu.store(mtu, Ordering::Relaxed);
        }
        let mut message = [0; HANDSHAKE];
        for peer in reading(&self.peers).all() {
            let mut session = peer.session();
            if let TunnResult::WriteToNetwork(message) = session.tunn.update_timers(&mut message) {
                self.send_one(session.endpoint, message);
            } else if session.is_first_due()
                && let TunnResult::WriteToNetwork(message) =
                    session.tunn.format_handshake_initiation(&mut message, true)
            {
                self.send_one(session.endpoint, message);
            }
        }
        if self.has_segmentation.load(Ordering::Relaxed) {
            for (peer, address) in reading(&self.peers).all_with_addresses(self.address) {
                self.try_segments(peer, address);
            }
        }
    }

    /// Sends the packets that are due in the trial of `UDP_SEGMENT` with a peer, and follows its judgement.
    fn try_segments(&self, peer: &WireguardPeer, address: Ipv6Addr) {
        let mut session = peer.session();
        if session.tunn.time_since_last_handshake().is_none() {
            return;
        }
        let round = session.segments.next();
        peer.follow_trial(session.segments.verdict());
        let Some(round) = round else { return };
        const SEALED: usize = segments::LENGTH + OVERHEAD;
        let mut sealed = [0; (PAIR + 1) * SEALED];
        let (rooms, _) = sealed.as_chunks_mut::<SEALED>();
        for (place, room) in rooms.iter_mut().enumerate() {
            let request = session.segments.request(round, place, self.address, address);
            let TunnResult::WriteToNetwork(datagram) = session.tunn.encapsulate(&request, room) else {
                return;
            };
            if datagram.first() != Some(&DATA) {
                return;
            }
        }
        let to = session.endpoint;
        drop(session);
        let (pair, single) = sealed.split_at(PAIR * SEALED);
        if let Some(socket) = reading(&self.sockets).first()
            && let Err(error) = self.transmit(socket, to, pair, SEALED)
        {
            self.note_refusal(&error);
            return;
        }
        if round.has_control {
            self.send_one(to, single);
        }
    }

    /// Takes a refusal of datagrams to divide. Returns whether none can be divided: the kernel does not do so for a network
    /// device that computes no checksums.
    fn note_refusal(&self, error: &io::Error) -> bool {
        let is_for_good = error.raw_os_error() == Some(nix::libc::EIO);
        if is_for_good {
            self.has_segmentation.store(false, Ordering::Relaxed);
        }
        is_for_good
    }

    /// Sends datagrams, and waits for room in the socket's buffer.
    fn transmit(&self, socket: &B::Socket, to: SocketAddr, bytes: &[u8], size: usize) -> io::Result<()> {
        loop {
            match socket.send(to, bytes, size) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    if !self.stop.wait_writable(socket) {
                        return Err(error);
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                sent => return sent,
            }
        }
    }

    fn send_one(&self, to: SocketAddr, datagram: &[u8]) {
        let sockets = reading(&self.sockets);
        let sent = sockets.first().map(|socket| self.transmit(socket, to, datagram, datagram.len()));
        if !matches!(sent, Some(Ok(()))) {
            Counters::count(&self.switch.counters.full);
        }
    }

    /// Sends datagrams of `size` bytes that lie one after the other; the last one may be shorter. `is_divided` says that the
    /// kernel may divide them, if it can.
    fn send(&self, to: SocketAddr, datagrams: &[u8], size: usize, is_divided: bool) {
        let sockets = reading(&self.sockets);
        let Some(socket) = sockets.first() else { return };
        let transmit = |bytes: &[u8]| {
            let sent = self.transmit(socket, to, bytes, size);
            if sent.is_err() {
                Counters::count(&self.switch.counters.full);
            }
        };
        let at_once = size * (MAX_DATAGRAM / size.max(1)).clamp(1, MAX_SEGMENTS);
        for part in datagrams.chunks(at_once.max(1)) {
            if is_divided && self.has_segmentation.load(Ordering::Relaxed) {
                match self.transmit(socket, to, part, size) {
                    Err(error) if self.note_refusal(&error) => {}
                    Ok(()) => continue,
                    Err(_) => {
                        Counters::count(&self.switch.counters.full);
                        continue;
                    }
                }
            }
            part.chunks(size).for_each(transmit);
        }
    }

    /// Carries packets from the device to the peers until told to end or the device is gone.
    pub(crate) fn run_device(&self, device: &B::Device, stop: &StopSignal) {
        let mut sealer = Sealer::default();
        let mut buffer = vec![0; HEADROOM + MAX_PACKET + TAILROOM];
        while let Some((vnet, end)) = next_packet(device, &mut buffer, stop) {
            let Some(vnet) = vnet else { continue };
            let packet = buffer.get(HEADROOM..end).unwrap_or_default();
            let peer = Ip::parse(packet).and_then(|ip| reading(&self.peers).holder(ip.destination).cloned());
            let Some(peer) = peer else {
                Counters::count(&self.switch.counters.no_peer);
                continue;
            };
            let packet = UncutPacket { start: HEADROOM, given: HEADROOM, end, is_frame: false, vnet };
            sealer.seal(self, &peer, &mut buffer, &packet);
        }
        stop.set();
    }

    /// Carries packets from the peers to the devices until told to end.
    pub(crate) fn run_socket(&self, socket: &B::Socket, device: &B::Device, stop: &StopSignal) {
        let mut batch = B::Socket::new_batch();
        let mut opener = Opener::new(self, device);
        while !stop.is_set() && !self.stop.is_set() {
            // An error is that of an earlier datagram, as ICMP reported it: no reason to end.
            let is_drained = socket.receive(&mut batch, |received| opener.take(received)).unwrap_or(true);
            opener.flush();
            if is_drained && !stop.wait_readable(socket) {
                return;
            }
        }
    }
}

/// Reads the next packet of a device to [`HEADROOM`] and returns its header and its end. The header is `None`
/// if it asks for an unknown kind of segmentation. Returns `None` if the thread must end or the device is
/// gone.
fn next_packet(
    device: &impl Device,
    buffer: &mut [u8],
    stop: &StopSignal,
) -> Option<(Option<VnetHeader>, usize)> {
    while !stop.is_set() {
        match device.read(buffer.get_mut(HEADROOM - VNET_HEADER..HEADROOM + MAX_PACKET)?) {
            Ok(length) => {
                let vnet = buffer.get(HEADROOM - VNET_HEADER..HEADROOM).and_then(VnetHeader::parse);
                return Some((vnet, HEADROOM - VNET_HEADER + length.max(VNET_HEADER)));
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                if !stop.wait_readable(device) {
                    return None;
                }
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => {
                tracing::warn!(%error, "tunnel device is gone");
                return None;
            }
        }
    }
    None
}

/// Carries frames from a switched network to the peers until told to end or the device is gone.
pub(crate) fn run_tap<B: Backend>(tap: &Tap<B>, device: &B::Device, switch: &Paths<B>, stop: &StopSignal) {
    let mut sealer = Sealer::default();
    let mut buffer = vec![0; HEADROOM + MAX_PACKET + TAILROOM];
    let mut copy = Vec::new();
    let mut to = Vec::new();
    while let Some((vnet, end)) = next_packet(device, &mut buffer, stop) {
        let Some(vnet) = vnet else { continue };
        tap.table().destinations(buffer.get(HEADROOM..end).unwrap_or_default(), &mut to);
        if to.is_empty() {
            Counters::count(&switch.counters.no_peer);
        }
        copy.clear();
        if to.len() > 1 {
            copy.extend_from_slice(buffer.get(HEADROOM..end).unwrap_or_default());
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
            // Cutting overwrites the parts that it has handed out, so each host after the first needs the
            // copy.
            if let Some(place) = buffer.get_mut(HEADROOM..end).filter(|_| !copy.is_empty()) {
                place.copy_from_slice(&copy);
            }
            let start = HEADROOM - VXLAN_HEADERS;
            if let Some(place) = buffer.get_mut(start..HEADROOM) {
                let ports = (interface.vxlan_port, interface.vxlan_port);
                put_vxlan(place, interface.address, *host, ports, tap.vni, end - HEADROOM);
            }
            let packet = UncutPacket { start, given: HEADROOM, end, is_frame: true, vnet };
            sealer.seal(&interface, &peer, &mut buffer, &packet);
        }
    }
    stop.set();
}

/// Seals the segments of a packet and sends them with as few calls as possible.
struct Sealer {
    sealed: Vec<u8>,
}

impl Default for Sealer {
    fn default() -> Self {
        Self { sealed: vec![0; SEALED] }
    }
}

impl Sealer {
    fn seal<B: Backend>(
        &mut self,
        interface: &Interface<B>,
        peer: &WireguardPeer,
        buffer: &mut [u8],
        packet: &UncutPacket,
    ) {
        let mtu = interface.mtu.load(Ordering::Relaxed);
        let counters = &interface.switch.counters;
        let (mut used, mut size, mut bytes) = (0, 0, 0);
        let mut handshake = None;
        let result = cut(buffer, packet, |buffer, at| {
            let (packet, restore) = pad(buffer, &at, mtu);
            // boringtun panics if the destination is smaller than this.
            let room = self.sealed.get_mut(used..).filter(|room| room.len() >= HANDSHAKE + packet.len());
            // Locked for each segment rather than for all of them: then the receiving thread spins for a
            // moment, and does not sleep in the kernel, which costs both threads more.
            let mut session = peer.session();
            let Session { tunn, has_queued, .. } = &mut *session;
            match room.map(|room| tunn.encapsulate(packet, room)) {
                Some(TunnResult::WriteToNetwork(datagram)) if datagram.first() == Some(&DATA) => {
                    size = size.max(datagram.len());
                    used += datagram.len();
                    bytes += at.len() as u64;
                }
                // No session: boringtun queues the packet, and the first one begins a handshake.
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
            let is_divided = peer.has_segmentation.load(Ordering::Relaxed);
            interface.send(to, self.sealed.get(..used).unwrap_or_default(), size, is_divided);
            peer.sent.fetch_add(bytes, Ordering::Relaxed);
        }
    }
}

/// The bytes that padding has overwritten.
struct Overwritten {
    from: usize,
    length: usize,
    bytes: [u8; 16],
}

impl Overwritten {
    fn undo(&self, buffer: &mut [u8]) {
        if let Some(place) = buffer.get_mut(self.from..self.from + self.length) {
            place.copy_from_slice(&self.bytes[..self.length]);
        }
    }
}

/// Pads a packet with zeroes to a multiple of 16 bytes, but not beyond the MTU (WireGuard paper, section
/// 5.4.6). The bytes after a packet may be the payload of the next one, so they are kept to be restored.
fn pad<'a>(buffer: &'a mut [u8], at: &Range<usize>, mtu: usize) -> (&'a [u8], Overwritten) {
    let padded = at.len().next_multiple_of(16).min(mtu).max(at.len());
    let mut overwritten = Overwritten { from: at.end, length: padded - at.len(), bytes: [0; 16] };
    if let Some(place) = buffer.get_mut(at.end..at.end + overwritten.length) {
        overwritten.bytes[..place.len()].copy_from_slice(place);
        place.fill(0);
    }
    (buffer.get(at.start..at.start + padded).unwrap_or_default(), overwritten)
}

/// Opens the datagrams of peers, checks their sources, and writes their packets to the devices.
struct Opener<'a, B: Backend> {
    interface: &'a Interface<B>,
    /// This thread's queue of the device.
    device: &'a B::Device,
    opened: Vec<u8>,
    used: usize,
    /// Opened packets of one peer whose sources are not checked yet.
    packets: Vec<Range<usize>>,
    /// The last sender, and an address that it may send from. Kept until the next flush, to save lookups.
    last: Option<(Arc<WireguardPeer>, Option<IpAddr>)>,
    tun: Joiner,
    taps: Vec<(Arc<Tap<B>>, Joiner)>,
}

impl<'a, B: Backend> Opener<'a, B> {
    fn new(interface: &'a Interface<B>, device: &'a B::Device) -> Self {
        Self {
            interface,
            device,
            opened: vec![0; OPENED],
            used: 0,
            packets: Vec::new(),
            last: None,
            tun: Joiner::default(),
            taps: Vec::new(),
        }
    }

    fn output(&self) -> DeviceOutput<'a, B::Device> {
        DeviceOutput { device: self.device, counters: &self.interface.switch.counters }
    }

    /// Writes all packets that wait to be joined, which frees the buffer.
    fn flush(&mut self) {
        let output = self.output();
        self.tun.flush(&mut self.opened, &output);
        let counters = &self.interface.switch.counters;
        for (tap, joiner) in &mut self.taps {
            joiner.flush(&mut self.opened, &TapOutput { tap, counters });
        }
        self.taps.retain(|(tap, _)| !tap.stop.is_set());
        self.used = 0;
        self.last = None;
    }

    /// Handles datagrams of one sender.
    fn take(&mut self, received: Received<'_>) {
        if OPENED - self.used < received.bytes.len() + HANDSHAKE {
            self.flush();
        }
        let Received { from, bytes, segment_size, .. } = received;
        let mut datagrams = bytes.chunks(segment_size).peekable();
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

    /// Opens a transport data message.
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
            // A keepalive.
            TunnResult::Done => {}
            TunnResult::WriteToNetwork(_) => return,
            TunnResult::Err(_) => {
                Counters::count(&self.interface.switch.counters.unauthenticated);
                return;
            }
        }
        peer.heard.fetch_add(1, Ordering::Relaxed);
        session.follow(from);
        if session.has_queued {
            self.send_queued(&mut session);
        }
    }

    /// Sends the packets that were queued until the session was established.
    fn send_queued(&self, session: &mut Session) {
        session.has_queued = false;
        let mut room = vec![0; MAX_PACKET + OVERHEAD + TAILROOM];
        for _ in 0..MAX_QUEUED {
            let TunnResult::WriteToNetwork(datagram) = session.tunn.decapsulate(None, &[], &mut room) else {
                return;
            };
            self.interface.send_one(session.endpoint, datagram);
        }
    }

    /// Handles a datagram that is not transport data: a handshake message, a cookie, or an invalid datagram.
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
            // Under load the initiator must prove its address first (WireGuard paper, section 5.3).
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
                // A response to an authenticated initiation, or the first data after an authenticated
                // response: the peer is where the datagram came from.
                peer.heard.fetch_add(1, Ordering::Relaxed);
                session.follow(from);
                let is_first_data = message.first() == Some(&DATA);
                self.interface.send_one(from, message);
                if is_first_data {
                    self.send_queued(&mut session);
                }
            }
            TunnResult::Err(error) => {
                Counters::count(&counters.unauthenticated);
                // An authentic initiation whose timestamp is not the latest: a repetition, or the peer has restarted with
                // a clock that was set back. The peer could then not begin a handshake until its clock is past its last
                // timestamp, so this side does. To a repetition that is harmless: the initiation goes to the peer's
                // known endpoint and replaces nothing until the peer answers it.
                let due = session.turned_at.is_none_or(|at| at.elapsed() >= TURN_EVERY);
                if matches!(error, WireGuardError::WrongTai64nTimestamp) && due {
                    session.turned_at = Some(Instant::now());
                    drop(session);
                    self.interface.initiate_handshake(&peer, false);
                }
            }
            _ => {}
        }
    }

    /// Checks that the opened packets come from addresses of the peer, and delivers them.
    ///
    /// `last` is an address that is known to be the peer's, to save lookups; the return value is for the next
    /// call.
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
            if segments::may_be_answer(packet, &ip) && peer.session().segments.take(packet) {
                continue;
            }
            match VxlanFrame::parse(packet, &ip, interface.address, interface.vxlan_port) {
                Some(frame) => self.deliver_frame(at.start, frame),
                None => {
                    let output = self.output();
                    self.tun.add(&mut self.opened, at, false, &output);
                }
            }
        }
        self.packets = packets;
        last
    }

    fn deliver_frame(&mut self, start: usize, vxlan: VxlanFrame) {
        let counters = &self.interface.switch.counters;
        let index = match self.taps.iter().position(|(tap, _)| tap.vni == vxlan.vni) {
            Some(index) => index,
            None => {
                let Some(tap) = self.interface.switch.tap(vxlan.vni) else {
                    Counters::count(&counters.no_peer);
                    return;
                };
                self.taps.push((tap, Joiner::default()));
                self.taps.len() - 1
            }
        };
        let (tap, joiner) = &mut self.taps[index];
        let at = start + vxlan.start..start + vxlan.end;
        let frame = self.opened.get(at.clone()).unwrap_or_default();
        if !tap.table().is_allowed(frame, vxlan.from) {
            Counters::count(&counters.spoofed);
            return;
        }
        joiner.add(&mut self.opened, at, true, &TapOutput { tap, counters });
    }
}

/// Reads the peer's slot from a transport data message: the upper 24 bits of the receiver's index. `None` if
/// the datagram is another message.
fn slot_of_data(datagram: &[u8]) -> Option<u32> {
    let kind = datagram.first_chunk::<4>()?;
    let index = u32::from_le_bytes(*datagram.get(4..)?.first_chunk()?);
    (*kind == [DATA, 0, 0, 0] && datagram.len() >= OVERHEAD).then_some(index >> 8)
}
