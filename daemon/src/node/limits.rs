//! Checks of host settings that ovld must not change itself and that would break the overlay. Each is
//! reported as a problem.

use std::net::IpAddr;
use std::rc::Rc;
use std::time::Duration;

use ovl_control::PeerState;
use ovl_kernel as kernel;

use super::Node;
use crate::limits;
use crate::problems::Code;

/// Interval of the checks.
const EVERY: Duration = Duration::from_secs(30);
const STRICT: u32 = 1;

impl Node {
    /// Runs the checks forever.
    pub(super) async fn limits_loop(self: Rc<Self>) {
        loop {
            self.check_limits().await;
            tokio::select! {
                () = tokio::time::sleep(EVERY) => {}
                () = self.membership.notified() => {}
            }
        }
    }

    /// Makes all checks once.
    pub(super) async fn check_limits(&self) {
        self.check_source_filter().await;
        self.check_neighbour_table();
        self.check_stocks();
    }

    /// Checks whether strict `rp_filter` (RFC 3704, section 2.2) drops packets of a peer. It silently drops
    /// them if the route to the peer has another interface than the one on which they arrive.
    async fn check_source_filter(&self) {
        let (here, peers) = {
            let state = self.state.borrow();
            let Some(own) = state.record() else { return };
            let alive = state.view.nodes.values().filter(|node| {
                node.record.id != state.view.me
                    && node.state == PeerState::Alive
                    && node.record.vtep.is_ipv4()
            });
            let peers: Vec<(String, IpAddr)> =
                alive.map(|node| (node.record.name.clone(), node.record.vtep)).collect();
            (own.vtep, peers)
        };
        let mut sentence = None;
        if here.is_ipv4()
            && let Ok(underlay) = self.kernel.underlay(here, peers.iter().map(|(_, vtep)| *vtep).collect()).await
            // Peers are reached by any device there.
            && !underlay.by_peers
            && source_filter(&underlay.device) == STRICT
        {
            for (name, vtep) in peers {
                match self.kernel.output_interface(vtep).await {
                    Ok(Some(index)) if index != underlay.index => {
                        sentence = Some(format!(
                            "net.ipv4.conf.{0}.rp_filter is 1 (strict), and the way back to host {name} at {vtep} \
                             does not leave by {0}: the kernel drops what comes from there. Set it to 2",
                            underlay.device
                        ));
                        break;
                    }
                    Ok(_) | Err(_) => {}
                }
            }
        }
        self.state.borrow_mut().problems.set(Code::SourceValidation, "", sentence);
    }

    /// Checks what this host may run out of.
    fn check_stocks(&self) {
        let mut state = self.state.borrow_mut();
        for (code, stock) in [
            (Code::ConnectionTable, limits::connections()),
            (Code::Descriptors, limits::descriptors()),
            (Code::DiskSpace, limits::disk(&self.config.state_dir)),
        ] {
            let was = state.problems.get(code, "").is_some();
            // What cannot be read is no problem: without connection tracking there is no table.
            let sentence = stock.filter(|stock| stock.is_short(was)).map(|stock| stock.sentence);
            state.problems.set(code, "", sentence);
        }
    }

    /// Checks whether the kernel's neighbour table has room for the peers' underlay addresses. The entries
    /// that ovld creates are permanent, and the kernel does not count them.
    fn check_neighbour_table(&self) {
        let mut state = self.state.borrow_mut();
        let peers = state.view.nodes.len();
        let (family, is_v4) = match state.record() {
            Some(own) if own.vtep.is_ipv4() => ("ipv4", true),
            _ => ("ipv6", false),
        };
        let name = format!("net.{family}.neigh.default.gc_thresh3");
        let most = kernel::read_sysctl(&name).and_then(|value| value.parse::<usize>().ok());
        let near = state.view.nodes.values().filter(|node| node.record.vtep.is_ipv4() == is_v4);
        let near = match state.local.underlay.segment() {
            Some(segment) => near.filter(|node| segment.contains(&node.record.vtep)).count(),
            None => peers,
        };
        // Other programs need entries, too.
        let sentence = most.filter(|most| near.saturating_mul(2) > *most).map(|most| {
            format!(
                "{name} is {most}, and {near} hosts of the cluster are on this segment: set it to {} or more",
                near * 4
            )
        });
        state.problems.set(Code::NeighbourTable, "", sentence);
    }
}

/// Returns the effective `rp_filter` of a device: the larger of the settings of `all` and of the device
/// (ip-sysctl).
fn source_filter(device: &str) -> u32 {
    // The name of a device may contain dots. sysctl writes them as slashes.
    let of = |name: &str| {
        let value = kernel::read_sysctl(&format!("net.ipv4.conf.{}.rp_filter", name.replace('.', "/")));
        value.and_then(|value| value.parse().ok()).unwrap_or(0)
    };
    of("all").max(of(device))
}
