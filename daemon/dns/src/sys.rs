//! Datagrams many at a time, and sockets for addresses that are not there yet.

use std::io;
use std::mem;
use std::net::{SocketAddr, SocketAddrV4, SocketAddrV6, TcpListener, UdpSocket};
use std::os::fd::{AsFd as _, AsRawFd as _};
use std::time::Duration;

use nix::libc;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use socket2::{Domain, Protocol, Socket, Type};

/// So many datagrams are taken at once.
pub(crate) const AT_ONCE: usize = 64;
/// Longer queries there are none.
pub(crate) const MAX_QUERY: usize = 1024;
/// And answers by UDP neither.
pub(crate) const MAX_ANSWER: usize = crate::wire::MAX_UDP;
/// A burst that comes while this thread does not run.
const BUFFER: usize = 4 << 20;

fn socket(listen: SocketAddr, kind: Type, protocol: Protocol) -> io::Result<Socket> {
    let socket = Socket::new(Domain::for_address(listen), kind, Some(protocol))?;
    if listen.is_ipv6() {
        socket.set_only_v6(true)?;
        socket.set_freebind_v6(true)?;
    } else {
        socket.set_freebind_v4(true)?;
    }
    Ok(socket)
}

/// A socket of several that share the address: the kernel spreads askers over them.
pub(crate) fn open_udp(listen: SocketAddr) -> io::Result<UdpSocket> {
    let socket = socket(listen, Type::DGRAM, Protocol::UDP)?;
    socket.set_reuse_port(true)?;
    // For safety only: what the kernel refuses, goes with less.
    let _ = socket.set_recv_buffer_size(BUFFER);
    let _ = socket.set_send_buffer_size(BUFFER);
    socket.set_nonblocking(true)?;
    socket.bind(&listen.into())?;
    Ok(socket.into())
}

/// For streams.
pub(crate) fn open_tcp(listen: SocketAddr) -> io::Result<TcpListener> {
    let socket = socket(listen, Type::STREAM, Protocol::TCP)?;
    socket.set_reuse_address(true)?;
    socket.set_nonblocking(true)?;
    socket.bind(&listen.into())?;
    socket.listen(128)?;
    Ok(socket.into())
}

/// Waits until one of the sockets has something, or the time is over.
pub(crate) fn wait(sockets: &[&UdpSocket], at_most: Duration) -> io::Result<()> {
    let mut fds: Vec<PollFd<'_>> =
        sockets.iter().map(|socket| PollFd::new(socket.as_fd(), PollFlags::POLLIN)).collect();
    let timeout = PollTimeout::try_from(at_most).unwrap_or(PollTimeout::MAX);
    match poll(&mut fds, timeout) {
        Ok(_) | Err(nix::errno::Errno::EINTR) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

/// Room for datagrams that come and for their answers.
pub(crate) struct Batch {
    queries: Box<[[u8; MAX_QUERY]]>,
    answers: Box<[[u8; MAX_ANSWER]]>,
    from: Box<[libc::sockaddr_storage]>,
    headers: Box<[libc::mmsghdr]>,
    pieces: Box<[libc::iovec]>,
}

/// One that came, and room for its answer.
pub(crate) struct Datagram<'a> {
    pub(crate) query: &'a [u8],
    pub(crate) answer: &'a mut [u8],
    pub(crate) from: SocketAddr,
}

impl Batch {
    pub(crate) fn new() -> Self {
        // SAFETY: all of these are plain numbers and pointers, for which zeros are valid.
        let (from, header, piece) = unsafe { (mem::zeroed(), mem::zeroed(), mem::zeroed()) };
        Self {
            queries: vec![[0; MAX_QUERY]; AT_ONCE].into(),
            answers: vec![[0; MAX_ANSWER]; AT_ONCE].into(),
            from: vec![from; AT_ONCE].into(),
            headers: vec![header; AT_ONCE].into(),
            pieces: vec![piece; AT_ONCE].into(),
        }
    }

    /// Takes what waits, has each handled, and sends the answers: `handle` gives an answer's length, or
    /// nothing. Gives how many came.
    pub(crate) fn serve(
        &mut self,
        socket: &UdpSocket,
        mut handle: impl FnMut(Datagram<'_>) -> Option<usize>,
    ) -> io::Result<usize> {
        let Self { queries, answers, from, headers, pieces } = self;
        let places = headers.iter_mut().zip(pieces.iter_mut()).zip(queries.iter_mut().zip(from.iter_mut()));
        for ((header, piece), (query, from)) in places {
            *piece = libc::iovec { iov_base: query.as_mut_ptr().cast(), iov_len: MAX_QUERY };
            set(header, piece, from, mem::size_of::<libc::sockaddr_storage>());
        }
        // SAFETY: there are as many headers as we say; each points to one piece and one address of ours,
        // which are as long as it says and outlive the call.
        let received = check(unsafe {
            libc::recvmmsg(
                socket.as_raw_fd(),
                headers.as_mut_ptr(),
                AT_ONCE as libc::c_uint,
                libc::MSG_DONTWAIT,
                std::ptr::null_mut(),
            )
        })?;
        let mut ready = 0;
        for i in 0..received {
            let (Some(header), Some(query), Some(answer)) =
                (headers.get(i), queries.get(i), answers.get_mut(i))
            else {
                break;
            };
            let length = header.msg_len as usize;
            let is_cut = header.msg_hdr.msg_flags & libc::MSG_TRUNC != 0;
            let name_length = header.msg_hdr.msg_namelen as usize;
            let Some(address) = from.get(i).and_then(|from| address(from, name_length)) else { continue };
            let Some(query) = query.get(..length).filter(|_| !is_cut) else { continue };
            let Some(length) = handle(Datagram { query, answer, from: address }) else { continue };
            let (Some(piece), Some(from)) = (pieces.get_mut(ready), from.get_mut(i)) else { break };
            *piece = libc::iovec { iov_base: answer.as_mut_ptr().cast(), iov_len: length.min(MAX_ANSWER) };
            // At or before the one that was just read.
            if let Some(header) = headers.get_mut(ready) {
                set(header, piece, from, name_length);
            }
            ready += 1;
        }
        let mut sent = 0;
        while sent < ready {
            let Some(rest) = headers.get_mut(sent..ready) else { break };
            // SAFETY: as above.
            let result = check(unsafe {
                libc::sendmmsg(
                    socket.as_raw_fd(),
                    rest.as_mut_ptr(),
                    rest.len() as libc::c_uint,
                    libc::MSG_DONTWAIT,
                )
            });
            // The first that fails is reported alone: whoever asked from there asks again.
            sent += result.unwrap_or(1).max(1);
        }
        Ok(received)
    }
}

fn set(
    header: &mut libc::mmsghdr,
    piece: &mut libc::iovec,
    from: &mut libc::sockaddr_storage,
    length: usize,
) {
    header.msg_hdr.msg_name = std::ptr::from_mut(from).cast();
    header.msg_hdr.msg_namelen = length as libc::socklen_t;
    header.msg_hdr.msg_iov = piece;
    header.msg_hdr.msg_iovlen = 1;
    header.msg_hdr.msg_control = std::ptr::null_mut();
    header.msg_hdr.msg_controllen = 0;
    header.msg_hdr.msg_flags = 0;
    header.msg_len = 0;
}

fn check(result: libc::c_int) -> io::Result<usize> {
    usize::try_from(result).map_err(|_| io::Error::last_os_error())
}

fn address(from: &libc::sockaddr_storage, length: usize) -> Option<SocketAddr> {
    match i32::from(from.ss_family) {
        libc::AF_INET if length >= mem::size_of::<libc::sockaddr_in>() => {
            // SAFETY: the kernel wrote an address of this family, and it fits.
            let v4 = unsafe { *std::ptr::from_ref(from).cast::<libc::sockaddr_in>() };
            let ip = u32::from_be(v4.sin_addr.s_addr).into();
            Some(SocketAddrV4::new(ip, u16::from_be(v4.sin_port)).into())
        }
        libc::AF_INET6 if length >= mem::size_of::<libc::sockaddr_in6>() => {
            // SAFETY: as above.
            let v6 = unsafe { *std::ptr::from_ref(from).cast::<libc::sockaddr_in6>() };
            let port = u16::from_be(v6.sin6_port);
            Some(SocketAddrV6::new(v6.sin6_addr.s6_addr.into(), port, 0, v6.sin6_scope_id).into())
        }
        _ => None,
    }
}
