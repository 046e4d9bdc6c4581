//! A fake of the generic netlink interface of WireGuard, behind a socket like the real one. It encodes messages with
//! `netlink-packet-wireguard`, so that two implementations must agree on the bytes. It behaves as
//! `drivers/net/wireguard/netlink.c`.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::os::fd::{AsRawFd, FromRawFd, IntoRawFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread::JoinHandle;

use ipnet::IpNet;
use netlink_packet_core::{
    Emitable, NetlinkBuffer, NetlinkHeader, NetlinkMessage, NetlinkPayload, NetlinkSerializable,
};
use netlink_packet_generic::ctrl::nlas::GenlCtrlAttrs;
use netlink_packet_generic::ctrl::{GenlCtrl, GenlCtrlCmd};
use netlink_packet_generic::{GenlFamily, GenlMessage};
use netlink_packet_wireguard::{
    WireguardAddressFamily, WireguardAllowedIp, WireguardAllowedIpAttr, WireguardAttribute, WireguardCmd,
    WireguardDeviceFlags, WireguardMessage, WireguardPeer, WireguardPeerAttribute, WireguardPeerFlags,
    WireguardTimeSpec,
};
use netlink_sys::Socket;
use nix::libc::{EADDRINUSE, EINVAL, ENODEV, ENOENT, EOPNOTSUPP};
use nix::sys::socket::{AddressFamily, MsgFlags, SockFlag, SockType, recv, send, socketpair};

use crate::socket::Netlink;

const CONTROL: u16 = 0x10;
const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;
const REQUEST: u16 = 1;
const MULTI: u16 = 2;
const ACK: u16 = 4;
const INTERRUPTED: u16 = 0x10;
const CAPPED: u16 = 0x100;
const DUMP: u16 = 0x300;

/// The state of the fake kernel.
#[derive(Debug, Default)]
pub(super) struct State {
    /// The message type of WireGuard; `None` for a kernel without WireGuard.
    pub(super) family: Option<u16>,
    pub(super) devices: BTreeMap<String, Device>,
    /// The size in bytes after which a dump starts a new message.
    pub(super) cut: usize,
    /// The number of dumps that a change interrupts half-way.
    pub(super) disturb: usize,
    /// The UDP ports of other programs.
    pub(super) taken: Vec<u16>,
    /// The number of dump messages that were sent.
    pub(super) dumped: usize,
    /// The number of requests that changed a device.
    pub(super) changes: usize,
}

#[derive(Debug, Default)]
pub(super) struct Device {
    pub(super) index: u32,
    pub(super) up: bool,
    pub(super) private: Option<[u8; 32]>,
    pub(super) port: u16,
    pub(super) mark: u32,
    /// The peers, in the order in which they were added.
    pub(super) peers: Vec<Peer>,
}

#[derive(Debug, Clone, Default)]
pub(super) struct Peer {
    pub(super) key: [u8; 32],
    pub(super) preshared: [u8; 32],
    pub(super) keepalive: u16,
    pub(super) endpoint: Option<SocketAddr>,
    pub(super) allowed: Vec<IpNet>,
    pub(super) handshake: WireguardTimeSpec,
    pub(super) received: u64,
    pub(super) sent: u64,
}

impl Device {
    pub(super) fn public(&self) -> Option<[u8; 32]> {
        self.private.map(public_of)
    }

    pub(super) fn peer(&mut self, key: [u8; 32]) -> &mut Peer {
        self.peers.iter_mut().find(|peer| peer.key == key).expect("peer")
    }
}

pub(super) fn public_of(private: [u8; 32]) -> [u8; 32] {
    x25519_dalek::PublicKey::from(&x25519_dalek::StaticSecret::from(private)).to_bytes()
}

/// A running fake kernel. It stops when its socket is closed, and then reports its failures.
pub(super) struct Fake {
    state: Arc<Mutex<State>>,
    thread: Option<JoinHandle<()>>,
}

impl Fake {
    pub(super) fn start(state: State) -> (Self, Netlink) {
        let (ours, its) = socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::empty())
            .expect("socket pair");
        let state = Arc::new(Mutex::new(state));
        let shared = state.clone();
        let thread = std::thread::spawn(move || serve(&its, &shared));
        // SAFETY: the descriptor is open, and its ownership is passed on.
        let socket = unsafe { Socket::from_raw_fd(ours.into_raw_fd()) };
        (Self { state, thread: Some(thread) }, Netlink::over(socket))
    }

    pub(super) fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("the fake kernel has failed")
    }

    /// Waits for its end, after the socket is closed.
    pub(super) fn end(mut self) {
        self.thread.take().expect("thread").join().expect("the fake kernel has failed");
    }
}

fn serve(socket: &OwnedFd, state: &Mutex<State>) {
    let mut buffer = vec![0; 1 << 20];
    loop {
        let length = recv(socket.as_raw_fd(), &mut buffer, MsgFlags::empty()).expect("request");
        if length == 0 {
            return;
        }
        let mut rest = &buffer[..length];
        while !rest.is_empty() {
            let message = NetlinkBuffer::new_checked(rest).expect("whole message");
            let size = message.length() as usize;
            for answer in state.lock().expect("state").answer(&rest[..size]) {
                // The requester may have closed its socket.
                let _ = send(socket.as_raw_fd(), &answer, MsgFlags::MSG_NOSIGNAL);
            }
            rest = &rest[size.next_multiple_of(4).min(rest.len())..];
        }
    }
}

type Outcome = Result<Vec<Vec<u8>>, i32>;

impl State {
    /// Handles one message. Returns the reply messages.
    fn answer(&mut self, bytes: &[u8]) -> Vec<Vec<u8>> {
        let header = NetlinkBuffer::new(bytes);
        let (kind, flags, sequence) = (header.message_type(), header.flags(), header.sequence_number());
        assert_eq!(flags & REQUEST, REQUEST, "not a request");
        let outcome = if kind == CONTROL {
            self.control(bytes)
        } else if Some(kind) == self.family {
            self.wireguard(bytes)
        } else {
            Err(ENOENT)
        };
        let (mut answers, errno) = match outcome {
            Ok(answers) => (answers, 0),
            Err(errno) => (Vec::new(), errno),
        };
        if flags & DUMP == DUMP && errno == 0 {
            answers.push(plain(NLMSG_DONE, MULTI, sequence, &[0; 4]));
        } else if errno != 0 || flags & ACK != 0 {
            let mut payload = (-errno).to_ne_bytes().to_vec();
            payload.extend_from_slice(&bytes[..16]);
            answers.push(plain(NLMSG_ERROR, CAPPED, sequence, &payload));
        }
        answers
    }

    fn control(&self, bytes: &[u8]) -> Outcome {
        let message = NetlinkMessage::<GenlMessage<GenlCtrl>>::deserialize(bytes).expect("control message");
        let NetlinkPayload::InnerMessage(inner) = message.payload else { panic!("no payload") };
        assert_eq!(inner.payload.cmd, GenlCtrlCmd::GetFamily);
        let [GenlCtrlAttrs::FamilyName(name)] = inner.payload.nlas.as_slice() else { panic!("{inner:?}") };
        let family = self.family.filter(|_| name == WireguardMessage::family_name()).ok_or(ENOENT)?;
        let mut answer = GenlMessage::from_payload(GenlCtrl {
            cmd: GenlCtrlCmd::NewFamily,
            nlas: vec![
                GenlCtrlAttrs::FamilyName(name.clone()),
                GenlCtrlAttrs::FamilyId(family),
                GenlCtrlAttrs::Version(1),
            ],
        });
        answer.finalize();
        Ok(vec![typed(answer, 0, message.header.sequence_number)])
    }

    fn wireguard(&mut self, bytes: &[u8]) -> Outcome {
        let message =
            NetlinkMessage::<GenlMessage<WireguardMessage>>::deserialize(bytes).expect("WireGuard message");
        let NetlinkPayload::InnerMessage(inner) = message.payload else { panic!("no payload") };
        let WireguardMessage { cmd, attributes } = inner.payload;
        let name = attributes.iter().find_map(|attribute| match attribute {
            WireguardAttribute::IfName(name) => Some(name.clone()),
            _ => None,
        });
        let name = name.expect("a name");
        match cmd {
            WireguardCmd::GetDevice => {
                assert_eq!(message.header.flags & DUMP, DUMP, "devices are only dumped");
                self.dump(&name, message.header.sequence_number)
            }
            WireguardCmd::SetDevice => {
                self.changes += 1;
                self.set(&name, attributes).map(|()| Vec::new())
            }
            WireguardCmd::Other(_) => Err(EOPNOTSUPP),
            _ => unreachable!("no other commands"),
        }
    }

    fn dump(&mut self, name: &str, sequence: u32) -> Outcome {
        let family = self.family.expect("family");
        let device = self.devices.get(name).ok_or(ENODEV)?;
        let disturbed = self.disturb > 0;
        self.disturb = self.disturb.saturating_sub(1);
        let mut first = vec![
            WireguardAttribute::ListenPort(device.port),
            WireguardAttribute::Fwmark(device.mark),
            WireguardAttribute::IfIndex(device.index),
            WireguardAttribute::IfName(name.to_owned()),
        ];
        if let Some((private, public)) = device.private.zip(device.public()) {
            first.push(WireguardAttribute::PrivateKey(private));
            first.push(WireguardAttribute::PublicKey(public));
        }
        let mut messages = vec![(first, Vec::new())];
        for peer in &device.peers {
            let mut rest = peer.allowed.as_slice();
            let mut attributes = vec![
                WireguardPeerAttribute::PublicKey(peer.key),
                WireguardPeerAttribute::PresharedKey(peer.preshared),
                WireguardPeerAttribute::LastHandshake(peer.handshake),
                WireguardPeerAttribute::PersistentKeepalive(peer.keepalive),
                WireguardPeerAttribute::TxBytes(peer.sent),
                WireguardPeerAttribute::RxBytes(peer.received),
                WireguardPeerAttribute::ProtocolVersion(1),
            ];
            attributes.extend(peer.endpoint.map(WireguardPeerAttribute::Endpoint));
            loop {
                let (device, peers) = messages.last().expect("a message");
                let used = device.as_slice().buffer_len() + peers.as_slice().buffer_len() + 24;
                let room = self.cut.saturating_sub(used + attributes.as_slice().buffer_len() + 8);
                // At least one, else it would never end.
                let some = rest.len().min((room / 48).max(usize::from(peers.is_empty())));
                let fits = room > 0 || peers.is_empty();
                if fits {
                    let (now, later) = rest.split_at(some);
                    rest = later;
                    let now = now.iter().map(|net| allowed(*net)).collect();
                    attributes.push(WireguardPeerAttribute::AllowedIps(now));
                    let part = WireguardPeer(std::mem::take(&mut attributes));
                    messages.last_mut().expect("a message").1.push(part);
                    if rest.is_empty() {
                        break;
                    }
                    // The next message continues with the key alone.
                    attributes = vec![WireguardPeerAttribute::PublicKey(peer.key)];
                }
                messages.push((Vec::new(), Vec::new()));
            }
        }
        let count = messages.len();
        self.dumped += count;
        let shown = if disturbed { count.div_ceil(2) } else { count };
        let messages = messages.into_iter().take(shown).enumerate().map(|(i, (mut attributes, peers))| {
            attributes.push(WireguardAttribute::Peers(peers));
            let payload = WireguardMessage { cmd: WireguardCmd::GetDevice, attributes };
            let mut message = GenlMessage::from_payload(payload);
            message.set_resolved_family_id(family);
            let interrupted = if disturbed && i + 1 == shown { INTERRUPTED } else { 0 };
            typed(message, MULTI | interrupted, sequence)
        });
        Ok(messages.collect())
    }

    fn set(&mut self, name: &str, attributes: Vec<WireguardAttribute>) -> Result<(), i32> {
        let mut taken = self.taken.clone();
        let others = self.devices.iter().filter(|(other, device)| *other != name && device.up);
        taken.extend(others.map(|(_, device)| device.port).filter(|port| *port != 0));
        let device = self.devices.get_mut(name).ok_or(ENODEV)?;
        let (mut flags, mut mark, mut port, mut key, mut peers) = (None, None, None, None, Vec::new());
        for attribute in attributes {
            match attribute {
                WireguardAttribute::IfName(_) => {}
                WireguardAttribute::Flags(value) => flags = Some(value),
                WireguardAttribute::Fwmark(value) => mark = Some(value),
                WireguardAttribute::ListenPort(value) => port = Some(value),
                WireguardAttribute::PrivateKey(value) => key = Some(value),
                WireguardAttribute::Peers(value) => peers = value,
                other => panic!("{other:?} is not for setting"),
            }
        }
        if flags.is_some_and(|flags| !WireguardDeviceFlags::ReplacePeers.contains(flags)) {
            return Err(EOPNOTSUPP);
        }
        device.mark = mark.unwrap_or(device.mark);
        if let Some(port) = port.filter(|port| *port != device.port) {
            if device.up && taken.contains(&port) {
                return Err(EADDRINUSE);
            }
            // The kernel chooses a port when it opens the socket, or when the device comes up.
            device.port = if device.up && port == 0 { 40_000 + device.index as u16 } else { port };
        }
        if flags == Some(WireguardDeviceFlags::ReplacePeers) {
            device.peers.clear();
        }
        if let Some(key) = key {
            // A zero key deletes it. A key is clamped when it is used, and `wg` shows it clamped.
            device.private = (key != [0; 32]).then_some(key);
            let own = device.public();
            device.peers.retain(|peer| Some(peer.key) != own);
        }
        peers.into_iter().try_for_each(|peer| set_peer(device, peer))
    }
}

fn set_peer(device: &mut Device, peer: WireguardPeer) -> Result<(), i32> {
    let (mut key, mut flags, mut preshared, mut endpoint, mut keepalive) = (None, None, None, None, None);
    let mut entries = Vec::new();
    for attribute in peer.0 {
        match attribute {
            WireguardPeerAttribute::PublicKey(value) => key = Some(value),
            WireguardPeerAttribute::Flags(value) => flags = Some(value),
            WireguardPeerAttribute::PresharedKey(value) => preshared = Some(value),
            WireguardPeerAttribute::Endpoint(value) => endpoint = Some(value),
            WireguardPeerAttribute::PersistentKeepalive(value) => keepalive = Some(value),
            WireguardPeerAttribute::AllowedIps(value) => entries = value,
            other => panic!("{other:?} is not for setting"),
        }
    }
    let key = key.ok_or(EINVAL)?;
    let flags = flags.unwrap_or(WireguardPeerFlags::empty());
    let known =
        WireguardPeerFlags::RemoveMe | WireguardPeerFlags::ReplaceAllowedIps | WireguardPeerFlags::UpdateOnly;
    if flags.bits() & !known.bits() != 0 {
        return Err(EOPNOTSUPP);
    }
    if !device.peers.iter().any(|peer| peer.key == key) {
        if flags.intersects(WireguardPeerFlags::RemoveMe | WireguardPeerFlags::UpdateOnly)
            || device.public() == Some(key)
        {
            return Ok(());
        }
        device.peers.push(Peer { key, ..Peer::default() });
    }
    if flags.contains(WireguardPeerFlags::RemoveMe) {
        device.peers.retain(|peer| peer.key != key);
        return Ok(());
    }
    let peer = device.peer(key);
    peer.preshared = preshared.unwrap_or(peer.preshared);
    peer.endpoint = endpoint.or(peer.endpoint);
    if flags.contains(WireguardPeerFlags::ReplaceAllowedIps) {
        peer.allowed.clear();
    }
    for entry in entries {
        let net = net(&entry).ok_or(EINVAL)?;
        // An address belongs to one peer: it is moved.
        device.peers.iter_mut().for_each(|peer| peer.allowed.retain(|other| *other != net));
        device.peer(key).allowed.push(net);
    }
    let peer = device.peer(key);
    peer.keepalive = keepalive.unwrap_or(peer.keepalive);
    Ok(())
}

/// The network of an allowed address: the kernel keeps the bits of the prefix.
fn net(entry: &WireguardAllowedIp) -> Option<IpNet> {
    let (mut family, mut address, mut length) = (None, None, None);
    for attribute in &entry.0 {
        match attribute {
            WireguardAllowedIpAttr::Family(value) => family = Some(*value),
            WireguardAllowedIpAttr::IpAddr(value) => address = Some(*value),
            WireguardAllowedIpAttr::Cidr(value) => length = Some(*value),
            other => panic!("{other:?} is not for setting"),
        }
    }
    let address: std::net::IpAddr = address?;
    let right = match family? {
        WireguardAddressFamily::Ipv4 => address.is_ipv4(),
        WireguardAddressFamily::Ipv6 => address.is_ipv6(),
        _ => false,
    };
    IpNet::new(address, length?).ok().filter(|_| right).map(|net| net.trunc())
}

fn allowed(net: IpNet) -> WireguardAllowedIp {
    let family =
        if net.addr().is_ipv4() { WireguardAddressFamily::Ipv4 } else { WireguardAddressFamily::Ipv6 };
    WireguardAllowedIp(vec![
        WireguardAllowedIpAttr::Cidr(net.prefix_len()),
        WireguardAllowedIpAttr::Family(family),
        WireguardAllowedIpAttr::IpAddr(net.addr()),
    ])
}

fn typed<T>(message: GenlMessage<T>, flags: u16, sequence: u32) -> Vec<u8>
where
    GenlMessage<T>: NetlinkSerializable,
{
    let mut header = NetlinkHeader::default();
    header.flags = flags;
    header.sequence_number = sequence;
    let mut message = NetlinkMessage::new(header, NetlinkPayload::InnerMessage(message));
    message.finalize();
    let mut bytes = vec![0; message.buffer_len()];
    message.serialize(&mut bytes);
    bytes
}

fn plain(kind: u16, flags: u16, sequence: u32, payload: &[u8]) -> Vec<u8> {
    let mut bytes = (16 + payload.len() as u32).to_ne_bytes().to_vec();
    bytes.extend_from_slice(&kind.to_ne_bytes());
    bytes.extend_from_slice(&flags.to_ne_bytes());
    bytes.extend_from_slice(&sequence.to_ne_bytes());
    bytes.extend_from_slice(&[0; 4]);
    bytes.extend_from_slice(payload);
    bytes
}
