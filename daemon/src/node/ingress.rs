//! LoadBalancers: addresses that this host announces, and ports at which it says whether it has backends.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use ovl_core::ingress;
use ovl_core::op::{AnnouncedOp, Op};
use ovl_proto::control::AnnouncedAddress;
use ovl_proto::resource::{Name, Service};
use ovl_proto::table::{Entry, Key};

use super::state::State;
use super::{Failed, Node};
use crate::ports::{Answer, listen_everywhere};

/// So many addresses are announced again at a time.
const AT_A_TIME: usize = 512;

/// What LoadBalancers need beyond what was planned last; `all`: hosts may have come or gone.
pub(super) fn plan(state: &mut State, touched: &BTreeSet<Name>, all: bool) -> Vec<Op> {
    let all = std::mem::take(&mut state.dirty.announced) || all;
    let State { view, backends, ingress, uplink, leaving, .. } = state;
    let uplink = uplink.filter(|_| !*leaving);
    ingress.plan(view, backends, touched.iter(), all, uplink)
}

/// Who announces a Service's addresses.
pub(super) fn announced(state: &State, service: &Service) -> Vec<AnnouncedAddress> {
    let names =
        |address| ingress::announcers(&state.view, address).map(|node| node.record.name.clone()).collect();
    service
        .load_balancer_addresses()
        .map(|address| AnnouncedAddress { address, nodes: names(address) })
        .collect()
}

impl Node {
    /// Says in our table what this host announces, once the kernel has it, and answers health checks.
    pub(super) fn tell_announced(&self) {
        let (set, unset) = {
            let mut guard = self.state.borrow_mut();
            let state = &mut *guard;
            let Some(own) = state.view.own().filter(|_| state.caught_up) else { return };
            if !state.ingress.take_news() {
                return;
            }
            let (said, is) = (own.table.announced().collect::<BTreeSet<IpAddr>>(), state.ingress.said());
            let set: Vec<IpAddr> = is.difference(&said).copied().collect();
            let unset: Vec<IpAddr> = said.difference(&is).copied().collect();
            (set, unset)
        };
        for (addresses, what) in
            [(&set, "announced by this host"), (&unset, "not announced by this host any more")]
        {
            for address in addresses {
                self.event("service", &address.to_string(), what);
            }
        }
        if !set.is_empty() || !unset.is_empty() {
            let set = set.into_iter().map(Entry::Announced).collect();
            self.write_table(set, unset.into_iter().map(Key::Announced).collect());
        }
        self.answer_health();
    }

    /// Announces once more what was taken lately.
    pub(super) async fn announce_again(&self) {
        let again = self.state.borrow_mut().ingress.again(AT_A_TIME);
        // A worker that is gone is noticed elsewhere.
        if !again.is_empty()
            && let Err(error) = self.kernel.announce(again).await
        {
            tracing::debug!(%error, "cannot announce addresses");
        }
    }

    /// Answers at the `healthCheckNodePort`s of all Services. One that somebody else has is tried again.
    pub(super) fn answer_health(&self) {
        let mut guard = self.state.borrow_mut();
        let state = &mut *guard;
        let wanted: BTreeMap<u16, Answer> = state
            .ingress
            .health()
            .map(|(name, health)| {
                let Name { namespace, name } = name.clone();
                (health.port, Answer { namespace, name, local: health.local })
            })
            .collect();
        if wanted == state.health {
            return;
        }
        state.problems.retain(|key, _| {
            key.strip_prefix("health ")
                .is_none_or(|port| port.parse().is_ok_and(|port: u16| wanted.contains_key(&port)))
        });
        let mut new = Vec::new();
        let mut answered = BTreeMap::new();
        for (port, answer) in wanted {
            if !state.health.contains_key(&port) {
                match listen_everywhere(port) {
                    Ok(listener) => {
                        state.problem(format!("health {port}"), None);
                        new.push((port, listener));
                    }
                    Err(why) => {
                        let sentence = format!(
                            "load balancers cannot ask this host about Service {}/{}: its healthCheckNodePort {port} {why}",
                            answer.namespace, answer.name
                        );
                        state.problem(format!("health {port}"), Some(sentence));
                        continue;
                    }
                }
            }
            answered.insert(port, answer);
        }
        state.health.clone_from(&answered);
        self.ports.answer(answered, new);
    }

    /// Takes this host's addresses away: it leaves.
    pub(super) async fn stop_announcing(&self) -> Result<(), Failed> {
        let found = self.kernel.dump().await.map_err(Failed::from)?;
        let ops = found
            .announced
            .iter()
            .map(|(device, address)| Op::Announced(AnnouncedOp::Delete(*device, *address)))
            .collect();
        for outcome in self.kernel.apply(ops).await {
            outcome.result.map_err(Failed::from)?;
        }
        Ok(())
    }
}
