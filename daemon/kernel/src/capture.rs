//! Captures packets of devices, for `ovlctl capture`.
//!
//! A thread reads packet sockets with a filter of the requester's, one for each device, and hears from nftables which packets
//! are dropped. What it has is handed on in batches, of which only as many are under way as the receiver allows: what the
//! receiver does not take stays in the sockets, and the kernel counts what they have no room for. Sockets end with the
//! thread, and with the process. Begin to read at [`Capture::start`].

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::{Duration, Instant};

use nix::libc;
use nix::sys::socket::{setsockopt, sockopt};
use ovl_proto::capture::{CaptureProgram, CapturedPacket, LinkType, MAX_SNAPLEN, PointKind};
use socket2::{Domain, SockFilter, Socket, Type};
use tokio::sync::mpsc;

use super::error::{KernelError, Result};
use super::netns::own_inode;
use super::received::{Received, receive};
use super::sys;
use super::trace::{DroppedPacket, DroppedPackets, wall_ns};

/// The number of bytes after which a batch is handed on.
const FULL: usize = 256 << 10;
/// The time after which a batch is handed on, also an empty one: it says that nothing earlier will follow.
const EVERY: Duration = Duration::from_millis(100);
/// The maximum number of batches that are under way.
pub const WINDOW: u32 = 4;
/// How long a capture lasts whose receiver takes nothing.
const SILENT: Duration = Duration::from_secs(10);
/// The room for packets that wait, in bytes: of all sockets together, and of one.
const ROOM: usize = 16 << 20;
const ROOM_OF_ONE: usize = 4 << 20;
/// Where the tag is in a frame with one.
const VLAN_AT: usize = 12;
/// The number of packets that are read from one socket before the next one's turn.
const AT_ONCE: usize = 64;

/// What to capture.
#[derive(Debug)]
pub struct CaptureSpec {
    /// The devices, each with its kind.
    pub devices: Vec<(PointKind, String)>,
    /// The filters. A device for which there is none has all its packets captured.
    pub programs: Vec<CaptureProgram>,
    /// The number of bytes of a packet that are kept where there is no filter.
    pub snaplen: u32,
    /// Of packets from or to these prefixes it is watched whether they are dropped. Empty: of none.
    pub watched: Vec<ipnet::IpNet>,
    /// The inodes of the network namespaces in which it is watched, besides that of this host.
    pub namespaces: BTreeSet<u64>,
    /// How long to capture at most.
    pub lasts: Duration,
}

/// What was captured.
#[derive(Debug, Default)]
pub struct Captured {
    /// Packets. The number of a point is that of its device.
    pub packets: Vec<CapturedPacket>,
    /// Packets that were dropped, with what dropped them.
    pub drops: Vec<DroppedPacket>,
    /// The number of packets for which there was no room.
    pub lost: u64,
    /// Nothing earlier follows: nanoseconds since 1970.
    pub until_ns: u64,
    /// Why it has ended.
    pub ended: Option<String>,
}

/// A running capture. It ends when this is dropped.
#[derive(Debug)]
pub struct Capture {
    stop: Arc<AtomicBool>,
    taken: Arc<AtomicU32>,
    /// The devices that could be opened, with how their packets begin. `None`: the reason is in the notes.
    pub links: Vec<Option<LinkType>>,
    /// What cannot be captured, in sentences.
    pub notes: Vec<String>,
}

impl Capture {
    /// Starts to capture. When it returns, packets are captured. It blocks.
    ///
    /// # Errors
    ///
    /// No device can be captured at, or there is no thread.
    pub fn start(spec: CaptureSpec, batches: mpsc::UnboundedSender<Captured>) -> Result<Self> {
        let CaptureSpec { devices, programs, snaplen, watched, mut namespaces, lasts } = spec;
        let room = (ROOM / devices.len().max(1)).clamp(64 << 10, ROOM_OF_ONE);
        let (mut points, mut links, mut notes) = (Vec::new(), Vec::new(), Vec::new());
        for (number, (kind, device)) in devices.iter().enumerate() {
            match Point::open(number, *kind, device, &programs, snaplen, room) {
                Ok((point, link)) => {
                    points.push(point);
                    links.push(Some(link));
                }
                Err(error) => {
                    // A network has a VXLAN device where it has endpoints, and the second tunnel is for rotations of its key.
                    let may_lack = matches!(kind, PointKind::Vxlan | PointKind::Tunnel);
                    if !(may_lack && error.raw_os_error() == Some(libc::ENODEV)) {
                        notes.push(format!("device {device} is not captured: {error}"));
                    }
                    links.push(None);
                }
            }
        }
        if points.is_empty() && !notes.is_empty() {
            return Err(KernelError::Other(notes.join("; ")));
        }
        let drops = match watched.is_empty() {
            true => None,
            false => {
                namespaces.insert(own_inode()?);
                let (drops, missing) = DroppedPackets::begin(&watched, &namespaces);
                notes.extend(missing);
                Some(drops)
            }
        };
        let (stop, taken) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU32::new(0)));
        let reader = Reader {
            points,
            drops,
            stop: Arc::clone(&stop),
            taken: Arc::clone(&taken),
            sent: 0,
            batches,
            batch: Captured::default(),
            bytes: 0,
            ends: Instant::now() + lasts,
            buffer: vec![0; MAX_SNAPLEN as usize],
        };
        std::thread::Builder::new()
            .name("capture".to_owned())
            .spawn(move || reader.run())
            .map_err(|error| KernelError::io("cannot start a thread that captures", &error))?;
        Ok(Self { stop, taken, links, notes })
    }

    /// Says that the receiver has taken batches, so that others may follow.
    pub fn take(&self, batches: u32) {
        self.taken.fetch_add(batches, Ordering::Relaxed);
    }
}

impl Drop for Capture {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
    }
}

/// A packet socket of one device.
#[derive(Debug)]
struct Point {
    number: u16,
    socket: Socket,
    /// Nothing earlier is in the socket: the time of the last packet that was read, or when it was empty.
    until_ns: u64,
}

impl Point {
    fn open(
        number: usize,
        kind: PointKind,
        device: &str,
        programs: &[CaptureProgram],
        snaplen: u32,
        room: usize,
    ) -> io::Result<(Self, LinkType)> {
        let index = nix::net::if_::if_nametoindex(device)?;
        // Without a protocol it receives nothing until it has its filter.
        let socket = Socket::new(Domain::PACKET, Type::RAW, None)?;
        sys::bind_packet(socket.as_fd(), index, 0)?;
        let link = match sys::bound_device(socket.as_fd())?.1 {
            libc::ARPHRD_ETHER | libc::ARPHRD_LOOPBACK => LinkType::Ethernet,
            _ => LinkType::Ip,
        };
        let program = programs.iter().find(|program| program.link == link && program.kinds.contains(&kind));
        let filter = match program {
            Some(program) => {
                program.code.iter().map(|(code, yes, no, k)| SockFilter::new(*code, *yes, *no, *k)).collect()
            }
            // `BPF_RET`.
            None => vec![SockFilter::new(6, 0, 0, snaplen)],
        };
        socket.attach_filter(&filter).map_err(|error| {
            io::Error::new(error.kind(), format!("the kernel refuses the filter: {error}"))
        })?;
        socket.set_nonblocking(true)?;
        setsockopt(&socket, sockopt::ReceiveTimestampns, &true)?;
        sys::describe_packets(socket.as_fd())?;
        // The limit of the host is passed over, because the room is bounded here.
        setsockopt(&socket, sockopt::RcvBufForce, &room)?;
        sys::bind_packet(socket.as_fd(), index, libc::ETH_P_ALL as u16)?;
        let number = u16::try_from(number).map_err(io::Error::other)?;
        Ok((Self { number, socket, until_ns: 0 }, link))
    }

    /// Whether the device was deleted: the kernel then unbinds the socket.
    fn is_unbound(&self) -> bool {
        sys::bound_device(self.socket.as_fd()).map_or(true, |(index, _)| index < 0)
    }
}

struct Reader {
    points: Vec<Point>,
    drops: Option<DroppedPackets>,
    stop: Arc<AtomicBool>,
    /// The number of batches that the receiver has taken, and of those that were sent.
    taken: Arc<AtomicU32>,
    sent: u32,
    batches: mpsc::UnboundedSender<Captured>,
    batch: Captured,
    /// The length of the packets in the batch.
    bytes: usize,
    ends: Instant,
    buffer: Vec<u8>,
}

impl Reader {
    fn run(mut self) {
        let mut next = Instant::now() + EVERY;
        let mut moved = (self.taken.load(Ordering::Relaxed), Instant::now());
        while !self.stop.load(Ordering::Relaxed) {
            let now = Instant::now();
            let taken = self.taken.load(Ordering::Relaxed);
            if taken != moved.0 {
                moved = (taken, now);
            }
            let may_send = self.sent.saturating_sub(taken) < WINDOW;
            let is_full = self.bytes >= FULL;
            if now >= self.ends {
                self.batch.ended = Some("the time limit is reached".to_owned());
                self.send();
                return;
            }
            if moved.1.elapsed() > SILENT && !may_send {
                return;
            }
            if may_send && (is_full || now >= next) {
                if !self.send() {
                    return;
                }
                next = now + EVERY;
                continue;
            }
            // With a full batch nothing is read: the sockets keep what fits.
            if is_full || !may_send {
                std::thread::sleep(Duration::from_millis(5));
                if is_full {
                    continue;
                }
            }
            let wait = next.saturating_duration_since(now);
            let mut descriptors: Vec<_> = self.points.iter().map(|point| point.socket.as_raw_fd()).collect();
            descriptors.extend(self.drops.iter().flat_map(DroppedPackets::descriptors));
            if sys::poll_any(&descriptors, wait).is_err() || !self.read() {
                self.batch.ended = Some("the devices are gone".to_owned());
                self.send();
                return;
            }
        }
    }

    /// Hands the batch on. Returns false if the receiver is gone.
    fn send(&mut self) -> bool {
        for point in &self.points {
            self.batch.lost += u64::from(sys::packets_lost(point.socket.as_fd()));
        }
        self.read();
        let until = self.points.iter().map(|point| point.until_ns).min();
        self.batch.until_ns = until.unwrap_or_else(wall_ns);
        self.bytes = 0;
        self.sent = self.sent.wrapping_add(1);
        self.batches.send(std::mem::take(&mut self.batch)).is_ok()
    }

    /// Reads what waits, until the batch is full. Returns false if no device is left.
    fn read(&mut self) -> bool {
        if let Some(drops) = &mut self.drops {
            self.batch.drops.extend(drops.drain());
        }
        // A packet that arrives from now on has a later time.
        let now_ns = wall_ns();
        let mut gone = Vec::new();
        loop {
            let mut found = 0;
            for point in &mut self.points {
                for n in 0..=AT_ONCE {
                    if self.bytes >= FULL || n == AT_ONCE {
                        break;
                    }
                    match captured(&point.socket, &mut self.buffer) {
                        Ok((packet, at_ns)) => {
                            found += 1;
                            point.until_ns = at_ns;
                            self.bytes += packet.bytes.len() + 64;
                            self.batch.packets.push(CapturedPacket { point: point.number, ..packet });
                        }
                        Err(nix::errno::Errno::EAGAIN | nix::errno::Errno::EINTR) => {
                            point.until_ns = point.until_ns.max(now_ns);
                            break;
                        }
                        // The device is down or deleted.
                        Err(_) => {
                            point.until_ns = point.until_ns.max(now_ns);
                            if point.is_unbound() {
                                gone.push(point.number);
                            }
                            break;
                        }
                    }
                }
            }
            if found == 0 || self.bytes >= FULL {
                break;
            }
        }
        self.points.retain(|point| !gone.contains(&point.number));
        !self.points.is_empty() || gone.is_empty()
    }
}

/// Receives a packet, and its time in nanoseconds since 1970.
fn captured(socket: &Socket, buffer: &mut [u8]) -> nix::Result<(CapturedPacket, u64)> {
    let Received { length, outgoing, at_ns, info, .. } = receive(socket, buffer)?;
    let at_ns = at_ns.unwrap_or_else(wall_ns);
    let mut bytes = buffer.get(..length).unwrap_or_default().to_vec();
    let mut length = info.map_or(u32::try_from(length).unwrap_or(u32::MAX), |info| info.length);
    // The kernel takes the VLAN tag out of the frame.
    if let Some(tag) = info.and_then(|info| info.vlan)
        && let Some((addresses, rest)) = bytes.split_at_checked(VLAN_AT)
    {
        bytes = [addresses, &tag, rest].concat();
        length += 4;
    }
    Ok((CapturedPacket { point: 0, at_ns, outgoing, length, bytes }, at_ns))
}

/// Returns the devices that have these addresses, by address.
///
/// # Errors
///
/// The addresses of this host cannot be read.
pub fn devices_with(addresses: &[std::net::IpAddr]) -> Result<BTreeMap<std::net::IpAddr, String>> {
    let all =
        sys::own_addresses().map_err(|error| KernelError::io("cannot read this host's addresses", &error))?;
    Ok(all.filter(|(_, own)| addresses.contains(own)).map(|(device, own)| (own, device)).collect())
}
