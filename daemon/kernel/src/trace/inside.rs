//! Work in the network namespace of a workload, and what listens there.

use std::fs::File;
use std::io::{BufRead as _, BufReader, Read as _};
use std::net::IpAddr;

use nix::sched::{CloneFlags, setns};
use ovl_dataplane::passage::ProbeKind;

use crate::error::{KernelError, Result};
use crate::netns::Netns;

/// The maximum length of a list of sockets that is read, in bytes.
const LONGEST: u64 = 4 << 20;

/// Runs work in a namespace, in a thread of its own that ends with it. It blocks.
///
/// # Errors
///
/// The namespace cannot be entered.
pub(super) fn enter<T: Send + 'static>(netns: Netns, work: impl FnOnce() -> T + Send + 'static) -> Result<T> {
    let error = |error| KernelError::io("cannot enter the network namespace of a workload", &error);
    let thread = std::thread::Builder::new().name("trace".to_owned()).spawn(move || {
        setns(&netns.fd, CloneFlags::CLONE_NEWNET)?;
        Ok::<T, nix::Error>(work())
    });
    let joined = thread.map_err(error)?.join();
    joined
        .map_err(|_| KernelError::Other("a thread in the network namespace of a workload ended".to_owned()))?
        .map_err(|errno| error(errno.into()))
}

/// Whether a socket receives what is sent to an address, in a namespace or, without one, on this host. `None` if it
/// cannot be known, and for echo requests, which the kernel answers. It blocks.
///
/// # Errors
///
/// The namespace cannot be entered.
pub fn listens(netns: Option<Netns>, address: IpAddr, kind: ProbeKind) -> Result<Option<bool>> {
    let (file, port, listening) = match kind {
        ProbeKind::Echo => return Ok(None),
        ProbeKind::Tcp(port) => ("tcp", port, Some("0A")),
        ProbeKind::Udp(port) => ("udp", port, None),
    };
    let look = move || -> Option<bool> {
        // A socket of IPv6 receives IPv4 as a rule.
        let lists = ["", "6"].map(|family| has_socket(&format!("{file}{family}"), address, port, listening));
        match lists {
            [Some(false) | None, Some(false) | None] if lists == [None, None] => None,
            lists => Some(lists.contains(&Some(true))),
        }
    };
    match netns {
        Some(netns) => enter(netns, look),
        None => Ok(look()),
    }
}

/// Whether a list of sockets has one for an address and port. `None` if there is no list.
fn has_socket(list: &str, address: IpAddr, port: u16, state: Option<&str>) -> Option<bool> {
    let file = File::open(format!("/proc/thread-self/net/{list}")).ok()?;
    let lines = BufReader::new(file.take(LONGEST)).lines().map_while(std::io::Result::ok).skip(1);
    Some(lines.into_iter().any(|line| is_for(&line, address, port, state)))
}

/// Whether a line of `/proc/net/tcp` or another of its kind is a socket that receives what is sent to an address.
fn is_for(line: &str, address: IpAddr, port: u16, state: Option<&str>) -> bool {
    let mut words = line.split_ascii_whitespace().skip(1);
    let (Some(local), Some(remote), Some(found)) = (words.next(), words.next(), words.next()) else {
        return false;
    };
    let Some((on, number)) = local.split_once(':') else { return false };
    // A connected socket receives from one sender only.
    let is_open = remote.ends_with(":0000") && state.is_none_or(|state| state == found);
    let is_any = on.chars().all(|digit| digit == '0') && (on.len() == 32 || address.is_ipv4());
    is_open && number == format!("{port:04X}") && (is_any || on == written(address, on.len()))
}

/// An address as the kernel writes it: words of four bytes in the order of the processor. `digits` is the length of what
/// it is compared with.
fn written(address: IpAddr, digits: usize) -> String {
    let bytes: Vec<u8> = match address {
        IpAddr::V4(address) if digits == 32 => address.to_ipv6_mapped().octets().to_vec(),
        IpAddr::V4(address) => address.octets().to_vec(),
        IpAddr::V6(address) => address.octets().to_vec(),
    };
    let words = bytes.chunks_exact(4).filter_map(|word| word.try_into().ok());
    words.map(|word| format!("{:08X}", u32::from_ne_bytes(word))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sockets_are_found_by_address_and_port() {
        let v4: IpAddr = "10.1.0.9".parse().unwrap();
        let line =
            |local: &str, state: &str| format!("   0: {local} 00000000:0000 {state} 00000000:00000000 00");
        let word = format!("{:08X}", u32::from_ne_bytes([10, 1, 0, 9]));
        for local in ["00000000:0050", &format!("{word}:0050")] {
            assert!(is_for(&line(local, "0A"), v4, 80, Some("0A")), "{local}");
            assert!(!is_for(&line(local, "01"), v4, 80, Some("0A")));
            assert!(!is_for(&line(local, "0A"), v4, 81, Some("0A")));
        }
        assert!(!is_for(&line("0100007F:0050", "0A"), v4, 80, Some("0A")));
        let any6 = format!("{}:0050", "0".repeat(32));
        assert!(is_for(&line(&any6, "0A"), v4, 80, Some("0A")));
        assert!(is_for(&line(&any6, "07"), "fd00::9".parse().unwrap(), 80, None));
        assert!(!is_for(&line("00000000:0050", "0A"), "fd00::9".parse().unwrap(), 80, Some("0A")));
        assert!(!is_for("", v4, 80, None));
    }
}
