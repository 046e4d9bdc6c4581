//! A netlink socket for requests: many in one send, with replies matched by sequence number.

use std::{fmt, io};

use netlink_packet_core::{
    NLM_F_ACK, NLM_F_ACK_TLVS, NLM_F_CAPPED, NLM_F_DUMP, NLM_F_DUMP_INTR, NLM_F_REQUEST, NetlinkMessage,
};
use netlink_packet_route::RouteNetlinkMessage;
use netlink_sys::protocols::NETLINK_ROUTE;
use netlink_sys::{Socket, SocketAddr};
use nix::libc;
use nix::sys::socket::{setsockopt, sockopt};
use nix::sys::time::{TimeVal, TimeValLike};

use super::attribute::{HEADER, Message, attributes, messages, text, u16_at, u32_at};
use super::error::{KernelError, Result};

const NLMSG_ERROR: u16 = libc::NLMSG_ERROR as u16;
const NLMSG_DONE: u16 = libc::NLMSG_DONE as u16;
/// The text of an extended acknowledgement; `libc` does not define it.
const NLMSGERR_ATTR_MSG: u16 = 1;

/// The size of the buffer for a datagram. The kernel writes at most 32 KiB at once in a dump; a single reply can be
/// somewhat longer.
const RECEIVE: usize = 64 * 1024;

/// The size of a batch, in bytes, up to which the default send buffer is large enough.
const SEND: usize = 128 * 1024;

/// The number of attempts at a dump during which the dumped objects change.
const MAX_DUMPS: usize = 5;

/// The receive timeout. The kernel replies within the sending call, so it never expires in practice.
const TIMEOUT_SECONDS: i64 = 20;

/// The error with which the kernel refused a request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Refusal {
    pub(super) errno: i32,
    pub(super) reason: Option<String>,
}

impl Refusal {
    /// The error of a failed action.
    pub(super) fn into_error(self, action: impl Into<String>) -> KernelError {
        KernelError::Refused { action: action.into(), errno: self.errno, reason: self.reason }
    }
}

/// Requests that are sent together. The kernel handles them in order; one that fails does not stop the others.
#[derive(Default)]
pub(super) struct Batch {
    bytes: Vec<u8>,
    starts: Vec<usize>,
    /// Whether the first request begins a transaction. If it is refused, the kernel skips all others.
    is_transaction: bool,
}

/// Shows no content: the requests may contain a private key.
impl fmt::Debug for Batch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Batch").field("requests", &self.starts.len()).finish_non_exhaustive()
    }
}

impl Batch {
    /// Adds a request; NLM_F_REQUEST is implied.
    pub(super) fn push(&mut self, message: RouteNetlinkMessage, flags: u16) {
        let mut message = NetlinkMessage::from(message);
        message.header.flags = NLM_F_REQUEST | flags;
        message.finalize();
        let start = self.bytes.len();
        self.bytes.resize(start + message.buffer_len().next_multiple_of(4), 0);
        if let Some(room) = self.bytes.get_mut(start..) {
            message.serialize(room);
        }
        self.starts.push(start);
    }

    /// Adds a request with an encoded payload; NLM_F_REQUEST is implied.
    pub(super) fn push_built(&mut self, kind: u16, flags: u16, payload: &[u8]) {
        self.starts.push(self.bytes.len());
        self.append(kind, flags, payload);
    }

    /// Ends the transaction that the first request begins. The kernel sends no reply to this message.
    pub(super) fn close_transaction(&mut self, kind: u16, payload: &[u8]) {
        self.append(kind, 0, payload);
        self.is_transaction = true;
    }

    fn append(&mut self, kind: u16, flags: u16, payload: &[u8]) {
        let start = self.bytes.len();
        let length = HEADER + payload.len();
        self.bytes.extend_from_slice(&(length as u32).to_ne_bytes());
        self.bytes.extend_from_slice(&kind.to_ne_bytes());
        self.bytes.extend_from_slice(&(NLM_F_REQUEST | flags).to_ne_bytes());
        // The sequence number is set when it is sent. The kernel fills in the port id.
        self.bytes.extend_from_slice(&[0; 8]);
        self.bytes.extend_from_slice(payload);
        self.bytes.resize(start + length.next_multiple_of(4), 0);
    }

    /// The number of requests.
    pub(super) fn len(&self) -> usize {
        self.starts.len()
    }
}

/// A reply with a payload.
pub(super) struct Answer {
    /// The position of its request in the batch.
    pub(super) request: usize,
    /// The message without its header.
    pub(super) payload: Vec<u8>,
}

/// The result of each request, and the replies with a payload.
pub(super) type Replies = (Vec<Result<(), Refusal>>, Vec<Answer>);

/// The messages of a dump.
pub(super) struct Dump(Vec<u8>);

impl Dump {
    pub(super) fn messages(&self) -> impl Iterator<Item = Message<'_>> {
        messages(&self.0)
    }
}

/// A netlink socket of any family.
pub(super) struct Netlink {
    socket: Socket,
    sequence: u32,
    buffer: Vec<u8>,
}

/// Shows no buffer: it may contain a private key.
impl fmt::Debug for Netlink {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Netlink").field("socket", &self.socket).finish_non_exhaustive()
    }
}

impl Netlink {
    /// Opens a socket in the network namespace of the calling thread. The family is a NETLINK_... number.
    pub(super) fn open(family: isize) -> Result<Self> {
        Self::try_open(family).map_err(|error| KernelError::io("cannot open a netlink socket", &error))
    }

    fn try_open(family: isize) -> io::Result<Self> {
        let mut socket = Socket::new(family)?;
        socket.bind_auto()?;
        socket.connect(&SocketAddr::new(0, 0))?;
        // Acknowledgements without a copy of the request, and with an error text.
        socket.set_cap_ack(true)?;
        socket.set_ext_ack(true)?;
        socket.set_netlink_get_strict_chk(true)?;
        // Both are precautions: a batch has one acknowledgement unless requests fail.
        setsockopt(&socket, sockopt::RcvBufForce, &(2 << 20))
            .or_else(|_| setsockopt(&socket, sockopt::RcvBuf, &(2 << 20)))?;
        setsockopt(&socket, sockopt::ReceiveTimeout, &TimeVal::seconds(TIMEOUT_SECONDS))?;
        Ok(Self::over(socket))
    }

    /// The port id of the socket, by which notifications name the sender of a change.
    pub(super) fn port(&self) -> u32 {
        let mut address = SocketAddr::new(0, 0);
        let _ = self.socket.get_address(&mut address);
        address.port_number()
    }

    /// Uses a socket that is connected to the kernel, or to a fake of it.
    pub(super) fn over(socket: Socket) -> Self {
        Self { socket, sequence: 0, buffer: Vec::with_capacity(RECEIVE) }
    }

    /// Sends all requests. Returns the result of each, and the replies with a payload.
    ///
    /// Only the last request asks for an acknowledgement: the kernel always reports errors and handles requests in
    /// order, so that the others succeeded if there is no error message for them. In a transaction one refused
    /// request means that no change was made.
    pub(super) fn execute(&mut self, mut batch: Batch) -> Result<Replies> {
        let count = batch.len();
        let mut results = vec![Ok(()); count];
        let mut answers = Vec::new();
        if count == 0 {
            return Ok((results, answers));
        }
        let first = self.next_sequence(count);
        for (i, start) in batch.starts.iter().enumerate() {
            put(&mut batch.bytes, start + 8, first.wrapping_add(i as u32).to_ne_bytes());
        }
        if let Some(last) = batch.starts.last() {
            let flags = u16_at(&batch.bytes, last + 6).unwrap_or(NLM_F_REQUEST) | NLM_F_ACK;
            put(&mut batch.bytes, last + 6, flags.to_ne_bytes());
        }
        self.send(&batch.bytes)?;
        loop {
            self.receive()?;
            for message in messages(&self.buffer) {
                let request = message.sequence.wrapping_sub(first) as usize;
                let Some(result) = results.get_mut(request) else {
                    continue; // A late reply to an earlier request.
                };
                if message.kind != NLMSG_ERROR {
                    answers.push(Answer { request, payload: message.payload.to_vec() });
                    continue;
                }
                let refusal = refusal(&message);
                let is_over = request + 1 == count || (batch.is_transaction && request == 0);
                if let Some(refusal) = refusal {
                    *result = Err(refusal);
                }
                if is_over {
                    return Ok((results, answers));
                }
            }
        }
    }

    /// Dumps all objects that the single request of the batch selects.
    pub(super) fn dump(&mut self, mut batch: Batch) -> Result<Result<Dump, Refusal>> {
        let mut bytes = Vec::new();
        if let Some(start) = batch.starts.first() {
            let flags = u16_at(&batch.bytes, start + 6).unwrap_or(NLM_F_REQUEST) | NLM_F_DUMP;
            put(&mut batch.bytes, start + 6, flags.to_ne_bytes());
        }
        for _ in 0..MAX_DUMPS {
            bytes.clear();
            match self.dump_once(&mut batch, &mut bytes)? {
                Ok(true) => break,
                Ok(false) => {}
                Err(refusal) => return Ok(Err(refusal)),
            }
        }
        // If the last attempt was inconsistent too, the notifications of the changes correct it.
        Ok(Ok(Dump(bytes)))
    }

    /// Dumps once. Returns false if objects were added or deleted meanwhile, so that some may be missing.
    fn dump_once(&mut self, batch: &mut Batch, bytes: &mut Vec<u8>) -> Result<Result<bool, Refusal>> {
        let sequence = self.next_sequence(1);
        put(&mut batch.bytes, 8, sequence.to_ne_bytes());
        self.send(&batch.bytes)?;
        let mut whole = true;
        loop {
            self.receive()?;
            let mut done = None;
            for message in messages(&self.buffer).filter(|message| message.sequence == sequence) {
                whole &= message.flags & NLM_F_DUMP_INTR == 0;
                match message.kind {
                    NLMSG_ERROR => done = Some(refusal(&message)),
                    // A dump that fails half-way has the error in its last message.
                    NLMSG_DONE => {
                        done = Some(errno_of(&message).map(|errno| Refusal { errno, reason: None }))
                    }
                    _ => {}
                }
            }
            match done {
                Some(Some(refusal)) => return Ok(Err(refusal)),
                Some(None) => {
                    bytes.extend_from_slice(&self.buffer);
                    return Ok(Ok(whole));
                }
                None => bytes.extend_from_slice(&self.buffer),
            }
        }
    }

    fn next_sequence(&mut self, count: usize) -> u32 {
        let first = self.sequence.wrapping_add(1);
        self.sequence = self.sequence.wrapping_add(count as u32);
        first
    }

    fn send(&self, bytes: &[u8]) -> Result<()> {
        if bytes.len() > SEND {
            // A transaction must be one datagram, which must fit the send buffer.
            setsockopt(&self.socket, sockopt::SndBufForce, &bytes.len())
                .map_err(|error| KernelError::io("cannot enlarge a netlink send buffer", &error.into()))?;
        }
        loop {
            match self.socket.send(bytes, 0) {
                Ok(_) => return Ok(()),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(KernelError::io("cannot send a netlink request", &error)),
            }
        }
    }

    fn receive(&mut self) -> Result<()> {
        loop {
            self.buffer.clear();
            match self.socket.recv(&mut self.buffer, 0) {
                Ok(_) => return Ok(()),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(KernelError::io("cannot receive a netlink reply", &error)),
            }
        }
    }
}

/// A socket of the family NETLINK_ROUTE.
#[derive(Debug)]
pub(super) struct Route(Netlink);

impl Route {
    /// Opens a socket in the network namespace of the calling thread.
    pub(super) fn open() -> Result<Self> {
        Netlink::open(NETLINK_ROUTE).map(Self)
    }

    /// Sends all requests, see [`Netlink::execute`].
    pub(super) fn execute(&mut self, batch: Batch) -> Result<Replies> {
        self.0.execute(batch)
    }

    /// Sends one request.
    pub(super) fn request(
        &mut self,
        message: RouteNetlinkMessage,
        flags: u16,
    ) -> Result<Result<(), Refusal>> {
        let mut batch = Batch::default();
        batch.push(message, flags);
        let (mut results, _) = self.execute(batch)?;
        Ok(results.pop().unwrap_or(Ok(())))
    }

    /// Dumps all objects that a request selects.
    pub(super) fn dump(&mut self, message: &RouteNetlinkMessage) -> Result<Dump> {
        let mut batch = Batch::default();
        batch.push(message.clone(), 0);
        self.dump_built(batch)?.map_err(|refusal| refusal.into_error("cannot dump the state of the kernel"))
    }

    /// Dumps all objects that the single encoded request of the batch selects.
    pub(super) fn dump_built(&mut self, batch: Batch) -> Result<Result<Dump, Refusal>> {
        self.0.dump(batch)
    }
}

/// Parses an error message. `None` if it is an acknowledgement.
pub(super) fn refusal(message: &Message<'_>) -> Option<Refusal> {
    let errno = errno_of(message)?;
    let request = if message.flags & NLM_F_CAPPED == 0 {
        u32_at(message.payload, 4).map_or(HEADER, |length| (length as usize).next_multiple_of(4))
    } else {
        HEADER
    };
    let reason = (message.flags & NLM_F_ACK_TLVS != 0)
        .then(|| {
            attributes(message.payload, 4 + request)
                .find(|(kind, _)| *kind == NLMSGERR_ATTR_MSG)
                .map(|(_, value)| text(value).to_owned())
        })
        .flatten();
    Some(Refusal { errno, reason })
}

fn errno_of(message: &Message<'_>) -> Option<i32> {
    let code = u32_at(message.payload, 0)? as i32;
    (code != 0).then(|| code.saturating_abs())
}

fn put<const N: usize>(bytes: &mut [u8], at: usize, value: [u8; N]) {
    if let Some(room) = bytes.get_mut(at..at + N) {
        room.copy_from_slice(&value);
    }
}
