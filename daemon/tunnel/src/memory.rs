//! A backend in memory, for tests without privileges: devices and sockets are queues, and the test is the
//! network.

use std::collections::{HashMap, VecDeque};
use std::io::{self, IoSlice};
use std::net::SocketAddr;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, Weak};
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};
use ovl_udp::Received;

use crate::backend::{Backend, Device, DeviceKind, Socket};
use crate::packet::VnetHeader;
use crate::segments;
use crate::sys::VNET_HEADER;

/// The MTU of all devices, in bytes.
const MTU: usize = 1420;

/// A queue whose descriptor is readable while it has items.
struct Queue<T> {
    items: Mutex<VecDeque<T>>,
    /// Counts the items.
    event: EventFd,
}

impl<T> Queue<T> {
    fn new() -> Self {
        let flags = EfdFlags::EFD_SEMAPHORE | EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_CLOEXEC;
        Self { items: Mutex::default(), event: EventFd::from_flags(flags).unwrap() }
    }

    fn push(&self, item: T) {
        self.items.lock().unwrap().push_back(item);
        self.event.write(1).unwrap();
    }

    fn pop(&self) -> io::Result<T> {
        // The semaphore first: its owner is sure to find an item.
        self.event.read().map_err(io::Error::from)?;
        Ok(self.items.lock().unwrap().pop_front().unwrap())
    }

    fn pop_within(&self, patience: Duration) -> Option<T> {
        let until = Instant::now() + patience;
        loop {
            if let Ok(item) = self.pop() {
                return Some(item);
            }
            let left = until.checked_duration_since(Instant::now())?;
            let timeout = PollTimeout::try_from(left).unwrap();
            poll(&mut [PollFd::new(self.event.as_fd(), PollFlags::POLLIN)], timeout).unwrap();
        }
    }
}

/// A datagram on its way.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Datagram {
    pub(crate) from: SocketAddr,
    pub(crate) to: SocketAddr,
    pub(crate) bytes: Vec<u8>,
    /// It is one of several that the kernel would divide (`UDP_SEGMENT`).
    pub(crate) is_divided: bool,
}

type Inbox = Queue<Datagram>;
type Filter = Box<dyn FnMut(&Datagram) -> bool + Send>;

/// The network between the sockets of all hosts.
#[derive(Clone, Default)]
pub(crate) struct MemoryNetwork(Arc<NetworkState>);

#[derive(Default)]
struct NetworkState {
    inboxes: Mutex<HashMap<SocketAddr, Weak<Inbox>>>,
    filter: Mutex<Option<Filter>>,
}

impl MemoryNetwork {
    /// Sets a function that sees each datagram, and says whether it is delivered.
    pub(crate) fn set_filter(&self, filter: impl FnMut(&Datagram) -> bool + Send + 'static) {
        *self.0.filter.lock().unwrap() = Some(Box::new(filter));
    }

    /// Delivers all datagrams from now on.
    pub(crate) fn remove_filter(&self) {
        *self.0.filter.lock().unwrap() = None;
    }

    /// Delivers a datagram without asking the filter. A datagram to an address without socket is lost.
    pub(crate) fn deliver(&self, datagram: Datagram) {
        let inbox = self.0.inboxes.lock().unwrap().get(&datagram.to).and_then(Weak::upgrade);
        if let Some(inbox) = inbox {
            inbox.push(datagram);
        }
    }

    fn send(&self, datagram: Datagram) {
        let is_delivered = self.0.filter.lock().unwrap().as_mut().is_none_or(|filter| filter(&datagram));
        if is_delivered {
            self.deliver(datagram);
        }
    }
}

/// A host: the backend of one engine.
#[derive(Clone)]
pub(crate) struct MemoryHost {
    network: MemoryNetwork,
    devices: Arc<Mutex<HashMap<String, Weak<Ports>>>>,
}

/// Both directions of a device.
struct Ports {
    to_engine: Queue<Vec<u8>>,
    from_engine: Queue<Vec<u8>>,
    is_gone: AtomicBool,
}

impl MemoryHost {
    pub(crate) fn new(network: &MemoryNetwork) -> Self {
        Self { network: network.clone(), devices: Arc::default() }
    }

    fn find(&self, name: &str) -> Option<Arc<Ports>> {
        self.devices.lock().unwrap().get(name).and_then(Weak::upgrade)
    }

    pub(crate) fn has_device(&self, name: &str) -> bool {
        self.find(name).is_some()
    }

    /// Sends a packet by a device, as a program on the host would.
    pub(crate) fn inject(&self, device: &str, packet: &[u8]) {
        self.inject_with(device, VnetHeader::default(), packet);
    }

    /// As [`Self::inject`], with a header that says how the packet is to be cut.
    pub(crate) fn inject_with(&self, device: &str, header: VnetHeader, packet: &[u8]) {
        self.find(device).unwrap().to_engine.push([&header.to_bytes()[..], packet].concat());
    }

    /// Takes the next packet that the engine wrote to a device.
    pub(crate) fn take(&self, device: &str, patience: Duration) -> Option<Vec<u8>> {
        let packet = self.find(device).unwrap().from_engine.pop_within(patience)?;
        Some(packet[VNET_HEADER..].to_vec())
    }

    /// Deletes a device under the engine.
    pub(crate) fn delete_device(&self, name: &str) {
        let ports = self.find(name).unwrap();
        self.devices.lock().unwrap().remove(name);
        ports.is_gone.store(true, Ordering::SeqCst);
        // Wakes a reader of each queue of the engine.
        (0..16).for_each(|_| ports.to_engine.push(Vec::new()));
    }
}

pub(crate) struct MemoryDevice(Arc<Ports>);

pub(crate) struct MemorySocket {
    network: MemoryNetwork,
    address: SocketAddr,
    inbox: Arc<Inbox>,
}

impl Backend for MemoryHost {
    type Device = MemoryDevice;
    type Socket = MemorySocket;

    fn open_device(&self, name: &str, _kind: DeviceKind, queues: usize) -> io::Result<Vec<MemoryDevice>> {
        if self.has_device(name) {
            return Err(io::ErrorKind::ResourceBusy.into());
        }
        let (to_engine, from_engine) = (Queue::new(), Queue::new());
        let ports = Arc::new(Ports { to_engine, from_engine, is_gone: AtomicBool::new(false) });
        self.devices.lock().unwrap().insert(name.to_owned(), Arc::downgrade(&ports));
        Ok((0..queues).map(|_| MemoryDevice(Arc::clone(&ports))).collect())
    }

    fn open_sockets(&self, listen: SocketAddr, count: usize) -> io::Result<Vec<MemorySocket>> {
        let mut inboxes = self.network.0.inboxes.lock().unwrap();
        if inboxes.get(&listen).and_then(Weak::upgrade).is_some() {
            return Err(io::ErrorKind::AddrInUse.into());
        }
        let inbox = Arc::new(Queue::new());
        inboxes.insert(listen, Arc::downgrade(&inbox));
        let socket =
            |_| MemorySocket { network: self.network.clone(), address: listen, inbox: Arc::clone(&inbox) };
        Ok((0..count).map(socket).collect())
    }
}

impl AsFd for MemoryDevice {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.to_engine.event.as_fd()
    }
}

impl Device for MemoryDevice {
    fn read(&self, buffer: &mut [u8]) -> io::Result<usize> {
        let packet = self.0.to_engine.pop()?;
        if self.0.is_gone.load(Ordering::SeqCst) {
            return Err(io::ErrorKind::NotConnected.into());
        }
        buffer[..packet.len()].copy_from_slice(&packet);
        Ok(packet.len())
    }

    fn write(&self, pieces: &[IoSlice<'_>]) -> io::Result<()> {
        let packet: Vec<u8> = pieces.iter().flat_map(|piece| piece.iter().copied()).collect();
        match packet.get(VNET_HEADER..).and_then(segments::answer) {
            // The kernel of the host answers, and no program sees it.
            Some(reply) => self.0.to_engine.push([&[0; VNET_HEADER], &reply[..]].concat()),
            None => self.0.from_engine.push(packet),
        }
        Ok(())
    }
}

impl AsFd for MemorySocket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.inbox.event.as_fd()
    }
}

impl Socket for MemorySocket {
    type Batch = ();

    fn new_batch() {}

    fn receive(&self, (): &mut (), mut each: impl FnMut(Received<'_>)) -> io::Result<bool> {
        let Datagram { from, bytes, .. } = self.inbox.pop()?;
        each(Received {
            from,
            bytes: &bytes,
            segment_size: bytes.len().max(1),
            is_truncated: false,
            arrived: None,
        });
        Ok(false)
    }

    fn send(&self, to: SocketAddr, bytes: &[u8], segment_size: usize) -> io::Result<()> {
        for segment in bytes.chunks(segment_size) {
            let is_divided = bytes.len() > segment_size;
            self.network.send(Datagram { from: self.address, to, bytes: segment.to_vec(), is_divided });
        }
        Ok(())
    }

    fn device_mtu(&self, _device: &str) -> io::Result<usize> {
        Ok(MTU)
    }
}
