//! Services of type LoadBalancer: the addresses that this host announces, and the ports at which it answers health
//! checks.

use std::collections::BTreeMap;

use ovl_control::AnnouncedAddress;
use ovl_dataplane::op::{AnnouncedOp, Op};
use ovl_proto::resource::{IpFamily, Name, Service};
use ovl_proto::table::{Entry, Key};
use ovl_subsystems::services::{allocation, ingress};

use super::state::State;
use super::{Failed, Node};
use crate::ports::Answer;
use crate::problems::Code;
use ovl_subsystems::TableChange;

/// How many addresses are announced again in one batch.
const AT_A_TIME: usize = 512;

/// Returns the addresses of a Service with the hosts that announce them.
pub(super) fn announced(state: &State, service: &Service) -> Vec<AnnouncedAddress> {
    let names =
        |address| ingress::announcers(&state.view, address).map(|node| node.record.name.clone()).collect();
    service
        .load_balancer_addresses()
        .map(|address| AnnouncedAddress { address, nodes: names(address) })
        .collect()
}

/// Says that a Service waits for an address of each of these families.
pub(super) fn waits(families: &[IpFamily]) -> String {
    let families: Vec<String> = families.iter().map(ToString::to_string).collect();
    format!(
        "waits for an {} address: all of the load_balancer_pool are in use. Delete a Service of type LoadBalancer, or add a \
         range to load_balancer_pool in ovld.toml on all hosts",
        families.join(" and an ")
    )
}

impl Node {
    /// Updates this host's owner table after the kernel was changed, and answers health checks.
    pub(super) fn tell_announced(&self) {
        self.report_denials();
        self.report_waiting();
        let changes: Vec<TableChange> = {
            let mut state = self.state.borrow_mut();
            let (cluster, subsystems) = state.parts();
            subsystems.into_iter().filter_map(|subsystem| subsystem.table_change(&cluster)).collect()
        };
        if changes.is_empty() {
            return;
        }
        for TableChange { set, unset } in changes {
            for entry in &set {
                if let Entry::Announced(address) = entry {
                    self.event("service", &address.to_string(), "announced by this host");
                }
            }
            for key in &unset {
                if let Key::Announced(address) = key {
                    self.event("service", &address.to_string(), "not announced by this host any more");
                }
            }
            if !set.is_empty() || !unset.is_empty() {
                self.write_table(set, unset);
            }
        }
        self.answer_health();
    }

    /// Reports what Services name and this host does not translate.
    fn report_denials(&self) {
        let mut guard = self.state.borrow_mut();
        let state = &mut *guard;
        let Some(denied) = state.subsystems.services.take_denied() else { return };
        let denied = denied.iter().map(|(name, denials)| {
            let denials: Vec<String> = denials.iter().map(ToString::to_string).collect();
            (format!("Service {name}"), denials.join("; "))
        });
        state.problems.replace(Code::ServiceDenied, denied);
    }

    /// Reports the Services that wait for an address of the pool.
    fn report_waiting(&self) {
        let mut guard = self.state.borrow_mut();
        let state = &mut *guard;
        let waiting =
            allocation::waiting(&state.view.resources, &self.config.ranges).map(|(name, families)| {
                (format!("Service {name}"), format!("Service {name} {}", waits(&families)))
            });
        let waiting: Vec<(String, String)> = waiting.collect();
        state.problems.replace(Code::PoolUsedUp, waiting);
    }

    /// Announces recently acquired addresses once more.
    pub(super) async fn announce_again(&self) {
        let again = self.state.borrow_mut().subsystems.announcements.again(AT_A_TIME);
        // A kernel worker that ended is detected elsewhere.
        if !again.is_empty()
            && let Err(error) = self.kernel.announce(again).await
        {
            tracing::debug!(%error, "cannot announce addresses");
        }
    }

    /// Answers at the `healthCheckNodePort`s of all Services. A port that another program has is reported and tried
    /// again.
    pub(super) fn answer_health(&self) {
        let mut guard = self.state.borrow_mut();
        let state = &mut *guard;
        let wanted: BTreeMap<u16, Answer> = state
            .subsystems
            .announcements
            .health()
            // A kube-proxy answers at the same ports.
            .filter(|_| state.subsystems.translates())
            .map(|(name, health)| {
                let Name { namespace, name } = name.clone();
                (health.port, Answer { namespace, name, local: health.local })
            })
            .collect();
        if let Some(taken) = self.health.update(wanted) {
            state.problems.replace(Code::HealthPort, taken);
        }
    }

    /// Deletes the announced addresses of this host from the kernel, when it leaves the cluster.
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
