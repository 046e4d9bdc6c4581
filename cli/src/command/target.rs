//! A destination with a port, as `policy explain` and `trace` take it.

use ovl_proto::resource::Protocol;

/// The destination of a connection.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Target {
    /// The name or the address.
    pub(crate) to: String,
    /// The port, if one is given.
    pub(crate) port: Option<u16>,
    /// The protocol; TCP if none is given.
    pub(crate) protocol: Protocol,
}

/// Parses `TO[:PORT[/PROTO]]`.
pub(crate) fn parse_target(text: &str) -> Result<Target, String> {
    let wrong =
        || format!("invalid destination '{text}': write it like db:5432, shop/db:53/udp or [fd00::9]:80");
    // An IPv6 address contains colons itself.
    let port_at = match text.rsplit_once(']') {
        Some((before, after)) => after.starts_with(':').then_some(before.len() + 1),
        None if text.matches(':').count() > 1 => None,
        None => text.find(':'),
    };
    let (to, port) = match port_at.and_then(|at| text.split_at_checked(at)) {
        Some((to, port)) => (to, Some(port.trim_start_matches(':'))),
        None => (text, None),
    };
    let to = to.trim_start_matches('[').trim_end_matches(']').to_owned();
    let Some(port) = port else { return Ok(Target { to, port: None, protocol: Protocol::Tcp }) };
    let (port, protocol) = port.split_once('/').unwrap_or((port, "tcp"));
    let protocol = match protocol.to_ascii_lowercase().as_str() {
        "tcp" => Protocol::Tcp,
        "udp" => Protocol::Udp,
        "sctp" => Protocol::Sctp,
        _ => return Err(wrong()),
    };
    let port = port.parse().ok().filter(|port| *port != 0).ok_or_else(wrong)?;
    Ok(Target { to, port: Some(port), protocol })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn destinations() {
        let of = |to: &str, port, protocol| Target { to: to.to_owned(), port, protocol };
        for (text, expected) in [
            ("db:5432", of("db", Some(5432), Protocol::Tcp)),
            ("shop/db:53/UDP", of("shop/db", Some(53), Protocol::Udp)),
            ("shop/db", of("shop/db", None, Protocol::Tcp)),
            ("10.1.0.9:80/sctp", of("10.1.0.9", Some(80), Protocol::Sctp)),
            ("[fd00::9]:80", of("fd00::9", Some(80), Protocol::Tcp)),
            ("fd00::9", of("fd00::9", None, Protocol::Tcp)),
        ] {
            assert_eq!(parse_target(text), Ok(expected), "{text}");
        }
        for text in ["db:", "db:x", "db:0", "db:80/icmp", "db:65536"] {
            assert!(parse_target(text).is_err(), "{text}");
        }
    }
}
