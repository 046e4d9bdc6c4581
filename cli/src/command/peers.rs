//! `ovlctl peers`: lists the hosts of the cluster, forgets one, or lets a forgotten one return.

use clap::Subcommand;
use ovl_control::{PathVerdict, PeerInfo, PeerState, PeerTunnel, Reply, Request};

use crate::args::Output;
use crate::context::Context;
use crate::error::{Error, Result};
use crate::text::{TextTable, optional};
use crate::time::{micros, millis, seconds};

/// Arguments of `peers`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    #[command(subcommand)]
    action: Option<Action>,
}

#[derive(Debug, Subcommand)]
enum Action {
    /// Remove a dead host from the cluster and free its address blocks
    ///
    /// Returns when a majority of the hosts has agreed. The forgotten host still knows the cluster
    /// key: see `ovlctl key rotate`.
    Forget {
        /// Name or id of the host
        node: String,
    },
    /// Let a host return that was forgotten
    ///
    /// Returns when a majority of the hosts has agreed. The host then joins by itself.
    Admit {
        /// Id of the host, or its name while it runs
        node: String,
    },
}

/// Prints the peers, forgets one, or lets a forgotten one return.
pub(crate) fn run(context: &Context, args: Args) -> Result<()> {
    match args.action {
        Some(Action::Forget { node }) => {
            context.request_done(&Request::PeersForget { node })?;
            context.note(
                "The forgotten host still knows the cluster key. If it is no longer trusted, rotate the key of the \
                 other hosts:\n  ovlctl key generate > FILE\n  ovlctl key rotate --cluster FILE",
            );
            return Ok(());
        }
        Some(Action::Admit { node }) => return context.request_done(&Request::PeersAdmit { node }),
        None => {}
    }
    let Reply::Peers(peers) = context.request(&Request::Peers)? else {
        return Err(Error::unexpected_reply());
    };
    context.print(&peers, |peers| render(peers, context.output == Output::Wide))
}

fn render(peers: &[PeerInfo], wide: bool) -> String {
    let tunnels = || peers.iter().map(|peer| peer.tunnel.as_ref());
    let names = peers.iter().map(|peer| format!("{}{}", peer.name, if peer.own { " *" } else { "" }));
    let table =
        TextTable::new().column("NAME", names).column("ADDRESS", peers.iter().map(|peer| peer.address));
    // Most often it is the address again, and the table is wide.
    let has_vteps =
        wide || peers.iter().any(|peer| !peer.nat && !peer.sealed && peer.vtep != peer.address.ip());
    let table = if has_vteps { table.column("VTEP", peers.iter().map(|peer| peer.vtep)) } else { table };
    let table = table
        .column("STATE", peers.iter().map(|peer| peer.state))
        .column("HEARD", peers.iter().map(|peer| optional(peer.last_heard_ms.map(millis))))
        .column("RTT", peers.iter().map(|peer| optional(peer.rtt_us.map(micros))))
        .optional_column("PATH", "", peers.iter().map(path))
        .optional_column("PATH-LOSS", "", peers.iter().map(path_loss))
        .column("ENDPOINTS", peers.iter().map(|peer| peer.endpoints))
        .column("VERSION", peers.iter().map(|peer| &peer.version))
        .optional_column(
            "ENCRYPTION",
            if wide { "" } else { "none" },
            peers.iter().map(|peer| &peer.encryption),
        );
    let table = if wide {
        table
            .column("ENDPOINT", tunnels().map(|tunnel| optional(tunnel.and_then(|tunnel| tunnel.endpoint))))
            .column(
                "HANDSHAKE",
                tunnels().map(|tunnel| optional(tunnel.and_then(|t| t.last_handshake_s).map(seconds))),
            )
            .column("SENT", tunnels().map(|tunnel| optional(tunnel.map(|tunnel| tunnel.sent_bytes))))
            .column("RECEIVED", tunnels().map(|tunnel| optional(tunnel.map(|tunnel| tunnel.received_bytes))))
            .column("TUNNEL-RTT", tunnels().map(|tunnel| optional(tunnel.and_then(|t| t.rtt_us).map(micros))))
            .column("LOSS", tunnels().map(|tunnel| tunnel.map_or_else(String::new, loss)))
    } else {
        table.optional_column(
            "TUNNEL-LOSS",
            "",
            tunnels().map(|tunnel| tunnel.map_or_else(String::new, some_loss)),
        )
    };
    table.optional_column("NOTE", "", peers.iter().map(note)).render()
}

/// Formats how packets of workloads reach the host, with the round-trip time. The empty string if that is not probed.
fn path(peer: &PeerInfo) -> String {
    let each = peer.paths.iter().map(|path| {
        let trip = path.rtt_us.map(|trip| format!(" {}", micros(trip))).unwrap_or_default();
        format!("{}{}{trip}", if path.fast { "fast " } else { "" }, path.encapsulation)
    });
    let crosses = match (peer.tcp, peer.via.is_empty()) {
        (false, true) if peer.nat => Some("nat".to_owned()),
        (false, true) => peer.sealed.then(|| "sealed".to_owned()),
        (true, true) => Some("tcp".to_owned()),
        (false, false) => Some(format!("via {}", peer.via.join(" "))),
        (true, false) => Some(format!("tcp via {}", peer.via.join(" "))),
    };
    crosses.into_iter().chain(each).collect::<Vec<_>>().join(", ")
}

/// Formats the loss of the paths, in each direction. The empty string if there is none.
fn path_loss(peer: &PeerInfo) -> String {
    let directions = peer.paths.iter().flat_map(|path| [("in", &path.received), ("out", &path.sent)]);
    let losses = directions.filter_map(|(word, direction)| match (direction.state, direction.loss_percent) {
        (PathVerdict::SmallOnly, _) => Some(format!("{word} large")),
        (_, None | Some(0)) => None,
        (_, Some(percent)) => Some(format!("{word} {percent}%")),
    });
    losses.collect::<Vec<_>>().join(", ")
}

fn loss(tunnel: &PeerTunnel) -> String {
    optional(tunnel.loss_percent.map(|percent| format!("{percent}%")))
}

/// Formats the loss. The empty string if there is none.
fn some_loss(tunnel: &PeerTunnel) -> String {
    if tunnel.loss_percent == Some(0) { String::new() } else { loss(tunnel) }
}

/// Returns the `NOTE` of a host: irregularities that its state does not show.
fn note(peer: &PeerInfo) -> String {
    let mut notes = Vec::new();
    if !peer.member {
        notes.push("not a member");
    }
    // In every other state, nothing arrives from the host, directly or through others.
    if !peer.own && !peer.reachable && !peer.nat && peer.state == PeerState::Alive {
        notes.push("heard only through others");
    }
    notes.join(", ")
}

#[cfg(test)]
mod tests {
    use ovl_control::{PathDirection, PeerPath};

    use super::*;

    fn peer(number: u8) -> PeerInfo {
        PeerInfo {
            name: format!("host{number}"),
            id: "0410c3g8kt7o2s00".parse().unwrap(),
            address: format!("192.0.2.{number}:7940").parse().unwrap(),
            vtep: format!("192.0.2.{number}").parse().unwrap(),
            state: PeerState::Alive,
            last_heard_ms: Some(120),
            rtt_us: Some(412),
            endpoints: 4,
            version: "0.1.0".into(),
            encryption: "none".into(),
            tunnel: None,
            own: false,
            member: true,
            reachable: true,
            path_mtu: Some(1500),
            via: Vec::new(),
            via_s: None,
            tcp: false,
            tcp_s: None,
            why: None,
            nat: false,
            sealed: false,
            unreached: Vec::new(),
            paths: Vec::new(),
        }
    }

    #[test]
    fn local_host_is_marked_and_default_columns_are_omitted() {
        let own = PeerInfo { own: true, last_heard_ms: None, rtt_us: None, ..peer(1) };
        let dead =
            PeerInfo { state: PeerState::Dead, last_heard_ms: Some(72_000), reachable: false, ..peer(3) };
        assert_eq!(
            render(&[own, peer(2), dead], false),
            "\
NAME     ADDRESS         STATE  HEARD  RTT    ENDPOINTS  VERSION
host1 *  192.0.2.1:7940  alive  -      -      4          0.1.0
host2    192.0.2.2:7940  alive  120ms  0.4ms  4          0.1.0
host3    192.0.2.3:7940  dead   1m12s  0.4ms  4          0.1.0
"
        );
    }

    #[test]
    fn path_is_shown_with_its_loss_in_each_direction_within_80_columns() {
        let path = |sent, received, loss_percent| PeerPath {
            encapsulation: "vxlan".into(),
            network: "blue".into(),
            mtu: 1450,
            sent: PathDirection { state: sent, loss_percent },
            received: PathDirection { state: received, loss_percent: Some(0) },
            rtt_us: Some(300),
            fast: false,
            why_not_fast: None,
        };
        let own = PeerInfo { own: true, last_heard_ms: None, rtt_us: None, ..peer(1) };
        let works = path(PathVerdict::Works, PathVerdict::Works, Some(0));
        let blocked = path(PathVerdict::Broken, PathVerdict::SmallOnly, Some(100));
        let with = |number, path: &PeerPath| PeerInfo { paths: vec![path.clone()], ..peer(number) };
        assert_eq!(
            render(&[own.clone(), with(2, &works)], false),
            "\
NAME     ADDRESS         STATE  HEARD  RTT    PATH         ENDPOINTS  VERSION
host1 *  192.0.2.1:7940  alive  -      -      -            4          0.1.0
host2    192.0.2.2:7940  alive  120ms  0.4ms  vxlan 0.3ms  4          0.1.0
"
        );
        let fast = PeerPath { fast: true, ..works.clone() };
        assert!(render(&[with(2, &fast)], false).contains("  fast vxlan 0.3ms  4"));
        let text = render(&[own, with(2, &works), with(3, &blocked)], false);
        assert!(text.contains("vxlan 0.3ms  in large, out 100%  4"), "{text}");
        let moved = PeerInfo { vtep: "198.51.100.7".parse().unwrap(), ..peer(2) };
        assert!(render(&[moved], false).contains("VTEP"));
    }

    #[test]
    fn wide_table_shows_the_tunnel_and_narrow_table_shows_loss() {
        let tunnel = PeerTunnel {
            endpoint: Some("192.0.2.2:51940".parse().unwrap()),
            last_handshake_s: Some(72),
            sent_bytes: 1200,
            received_bytes: 900,
            rtt_us: Some(412),
            loss_percent: Some(5),
        };
        let own = PeerInfo { own: true, encryption: "wireguard (userspace)".into(), ..peer(1) };
        let other = PeerInfo { tunnel: Some(tunnel.clone()), ..PeerInfo { own: false, ..own.clone() } };
        let last = |text: String| {
            text.lines()
                .map(|line| {
                    line.split_once("ENCRYPTION").map_or_else(
                        || line.split_once("(userspace)").unwrap().1.trim().to_owned(),
                        |(_, end)| end.trim().to_owned(),
                    )
                })
                .collect::<Vec<_>>()
        };
        assert_eq!(
            last(render(&[own.clone(), other.clone()], true)),
            [
                "ENDPOINT         HANDSHAKE  SENT  RECEIVED  TUNNEL-RTT  LOSS",
                "-                -          -     -         -           -",
                "192.0.2.2:51940  1m12s      1200  900       0.4ms       5%",
            ]
        );
        assert_eq!(last(render(&[own.clone(), other.clone()], false)), ["TUNNEL-LOSS", "-", "5%"]);
        let well = PeerInfo { tunnel: Some(PeerTunnel { loss_percent: Some(0), ..tunnel }), ..other };
        assert_eq!(last(render(&[own, well], false)), ["", "", ""]);
    }

    #[test]
    fn irregular_hosts_have_a_note() {
        let odd = PeerInfo { reachable: false, encryption: "wireguard".into(), ..peer(2) };
        let new = PeerInfo { member: false, reachable: false, ..peer(3) };
        let text = render(&[odd, new], false);
        let ends: Vec<_> = text
            .lines()
            .filter_map(|line| line.split_once("ENDPOINTS  ").or(line.split_once(" 4  ")))
            .map(|(_, end)| end.trim_start())
            .collect();
        assert_eq!(
            ends,
            [
                "VERSION  ENCRYPTION  NOTE",
                "0.1.0    wireguard   heard only through others",
                "0.1.0    none        not a member, heard only through others",
            ]
        );
    }
}
