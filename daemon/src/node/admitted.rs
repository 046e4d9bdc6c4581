//! What the resolver tells workloads of domain names that policies admit reaches the kernel first.

use std::rc::Rc;

use ovl_dataplane::nft::Table;
use ovl_dns::Told;
use ovl_kernel::TimedChange;
use ovl_subsystems::names::resolver::ADDRESS_V4;
use ovl_subsystems::policy::Policies;
use ovl_subsystems::policy::admitted::AdmittedAt;
use ovl_subsystems::policy::names::SETS;
use tokio::sync::mpsc;

use super::Node;
use super::state::State;
use crate::problems::{Code, Problem};

/// How many answers are looked at together: the kernel is asked once for them.
const TOGETHER: usize = 64;

impl Node {
    /// Admits what the resolver is about to tell, forever.
    pub(super) async fn told_loop(self: Rc<Self>, mut told: mpsc::Receiver<Told>) {
        let mut waiting = Vec::new();
        while told.recv_many(&mut waiting, TOGETHER).await > 0 {
            let changes = {
                let mut state = self.state.borrow_mut();
                let now = state.clock.elapsed();
                let State { admitted, subsystems, .. } = &mut *state;
                let policies = subsystems.policy.policies();
                waiting
                    .iter()
                    .flat_map(|told: &Told| admitted.admit(now, policies, &told.found))
                    .collect::<Vec<_>>()
            };
            self.change_admitted(changes).await;
            for Told { noted, .. } in waiting.drain(..) {
                // The answer may have been sent already.
                let _ = noted.send(());
            }
        }
        // Names are not resolved here.
        std::future::pending::<()>().await;
    }

    /// Takes over what an earlier run left in the kernel, before the table is written.
    pub(super) async fn adopt_admitted(&self) {
        match self.kernel.timed(Table::Policy, SETS.to_owned()).await {
            Ok(elements) => {
                let mut state = self.state.borrow_mut();
                let now = state.clock.elapsed();
                state.admitted.adopt(now, elements);
            }
            Err(error) => tracing::warn!(%error, "cannot read which addresses of domain names are admitted"),
        }
    }

    /// Gives the kernel all addresses again if the table was written anew. It keeps its elements then, unless it was
    /// deleted.
    pub(super) async fn admit_again(&self) {
        let changes = {
            let mut state = self.state.borrow_mut();
            let now = state.clock.elapsed();
            let State { admitted, subsystems, .. } = &mut *state;
            admitted.take_again(now, subsystems.policy.policies())
        };
        if let Some(changes) = changes {
            self.change_admitted(changes).await;
        }
    }

    async fn change_admitted(&self, changes: Vec<TimedChange>) {
        if changes.is_empty() {
            return;
        }
        tracing::debug!(changes = changes.len(), "addresses of domain names");
        let result = self.kernel.change_timed(Table::Policy, changes).await;
        if let Err(error) = &result {
            tracing::warn!(%error, "addresses of domain names are not admitted");
        }
        self.state.borrow_mut().admitted.note_result(result.err().map(|error| error.to_string()));
    }
}

impl State {
    /// Returns what is admitted now for domain names.
    pub(crate) fn admitted_now(&self) -> AdmittedAt<'_> {
        self.admitted.at(self.clock.elapsed())
    }

    /// Returns a problem for each policy with domain names that selects an endpoint of this host, if queries of endpoints go to
    /// another program than ovl. `answers` says whether ovl answers any here.
    pub(super) fn unheard_names(&self, answers: bool) -> Vec<Problem> {
        let policies: &Policies = self.subsystems.policy.policies();
        let why = match answers {
            false => "endpoints of this host have no resolver of ovl (dns = \"off\")",
            true => "queries to the cluster DNS go to a Service of the cluster",
        };
        let is_heard = answers && self.subsystems.names.handed_over(&self.view.resources).is_empty();
        if is_heard || !policies.has_patterns() {
            return Vec::new();
        }
        let selects = |name: &ovl_proto::resource::Name| {
            self.own_endpoints().any(|endpoint| {
                let labels = self.view.known_labels(self.view.me, endpoint);
                let about = policies.about(&self.view.resources, &endpoint.namespace, labels.as_deref());
                about.iter().any(|policy| policy.name == *name)
            })
        };
        let with_names = policies.cluster().iter().filter(|policy| policy.has_patterns());
        with_names
            .filter(|policy| selects(&policy.name))
            .map(|policy| {
                let sentence = format!(
                    "ClusterNetworkPolicy {} has domain names, and {why}: ovl does not see the answers, so nothing is admitted \
                     for names that are asked for there. Set dns = \"on\" in ovld.toml, or let the pods ask ovl at {}",
                    policy.name, ADDRESS_V4
                );
                Code::NamesUnheard.about(policy.name.to_string(), sentence)
            })
            .collect()
    }
}
