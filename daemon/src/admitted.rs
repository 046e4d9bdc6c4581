//! The addresses that workloads of this host were told for domain names which network policies admit.
//!
//! [`AdmittedNames`] owns them, and whether the kernel has to be given them again. [`ovl_subsystems::policy::admitted`] decides
//! which they are. Begin to read at [`AdmittedNames::admit`].

use std::net::IpAddr;
use std::time::Duration;

use ovl_dataplane::nft::Table;
use ovl_dataplane::op::{NftOp, Op};
use ovl_dns::Found;
use ovl_kernel::{Outcome, TimedChange, TimedElement};
use ovl_metrics::{In, Page};
use ovl_subsystems::policy::Policies;
use ovl_subsystems::policy::admitted::{Admitted, AdmittedAt, Change};
use ovl_subsystems::policy::names::{MAX_ADDRESSES, NameKey};

use crate::problems::{Code, Problem};

/// How long it is reported that addresses left before their time.
const DISPLACED_LATELY: Duration = Duration::from_secs(300);

/// The addresses, and what the kernel did with them.
#[derive(Debug, Default)]
pub(crate) struct AdmittedNames {
    admitted: Admitted,
    /// Whether the table was written since the kernel was last given all of them.
    is_rewritten: bool,
    /// Why the kernel did not take the last changes. `None` if it did.
    refused: Option<String>,
}

impl AdmittedNames {
    /// Returns what is admitted at a moment of this run.
    pub(crate) fn at(&self, now: Duration) -> AdmittedAt<'_> {
        AdmittedAt { admitted: &self.admitted, now }
    }

    /// Admits what a workload is about to be told. Returns the changes of the kernel's sets, of those that `policies`, as they
    /// were last sent, have. The others follow when the table is written.
    pub(crate) fn admit(&mut self, now: Duration, policies: &Policies, found: &Found) -> Vec<TimedChange> {
        let changes = self.admitted.admit(now, &found.patterns, &found.name, &found.addresses);
        timed(policies, changes)
    }

    /// Takes over what an earlier run left in the kernel.
    pub(crate) fn adopt(&mut self, now: Duration, elements: Vec<TimedElement>) {
        for TimedElement { set, key, left_ms, comment } in elements {
            if let Some((key, address)) = NameKey::of_set(&set).zip(address_of(&key)) {
                self.admitted.adopt(now, key, address, Duration::from_millis(left_ms), &comment);
            }
        }
    }

    /// Records that the table may have been written anew.
    pub(crate) fn note_outcomes(&mut self, outcomes: &[Outcome]) {
        self.is_rewritten |= outcomes.iter().any(|Outcome { op, result }| {
            result.is_ok() && matches!(op, Op::Nft(NftOp::SetTable(Table::Policy, _)))
        });
    }

    /// Records that another program may have changed the table.
    pub(crate) fn note_drift(&mut self) {
        self.is_rewritten = true;
    }

    /// Returns the changes that give the kernel everything again. `None` if it has it.
    pub(crate) fn take_again(&mut self, now: Duration, policies: &Policies) -> Option<Vec<TimedChange>> {
        let again = std::mem::take(&mut self.is_rewritten);
        again.then(|| timed(policies, self.admitted.again(now))).filter(|changes| !changes.is_empty())
    }

    /// Records what the kernel said to changes: `None` if it made them.
    pub(crate) fn note_result(&mut self, refused: Option<String>) {
        self.refused = refused;
    }

    /// Returns what is wrong.
    pub(crate) fn problems(&self, now: Duration) -> impl Iterator<Item = Problem> {
        let lately = self.admitted.displaced_at().filter(|at| now.saturating_sub(*at) < DISPLACED_LATELY);
        let displaced = lately.map(|_| {
            let sentence = format!(
                "workloads of this host were told more addresses than are kept ({MAX_ADDRESSES}, and 1024 for each name): \
                 those that would have ended first were taken out of policies before their time, {} since the start. Admit \
                 such names by `networks`, or make the patterns of domain names narrower",
                self.admitted.displaced()
            );
            Code::NamesDisplaced.about("addresses", sentence)
        });
        let refused = self.refused.as_ref().map(|error| {
            let sentence = format!(
                "the kernel does not take addresses of domain names, so policies refuse connections to them: {error}"
            );
            Code::NamesDisplaced.about("kernel", sentence)
        });
        displaced.into_iter().chain(refused)
    }

    /// Adds the addresses to the metrics. `late` is how many answers were sent before their addresses were noted.
    pub(crate) fn add_to(&self, page: &mut Page, now: Duration, late: u64) {
        let help = "Addresses that workloads were told for domain names of network policies";
        page.gauge("policy_name_addresses", In::Numbers, help).is(self.admitted.count(now));
        let help = "Such addresses that left before their time, because there were too many";
        page.counter("policy_name_displaced", In::Numbers, help).is(self.admitted.displaced());
        let help = "Answers with such addresses that were sent before the addresses were admitted";
        page.counter("policy_name_late_answers", In::Numbers, help).is(late);
    }
}

/// Returns the changes of sets that the policies have.
fn timed(policies: &Policies, changes: Vec<Change>) -> Vec<TimedChange> {
    let timed = |change| match change {
        Change::Put { key, address, left, name } => TimedChange::Put(TimedElement {
            set: key.set(address.is_ipv4()),
            key: bytes_of(address),
            left_ms: u64::try_from(left.as_millis()).unwrap_or(u64::MAX),
            comment: name,
        }),
        Change::Delete { key, address } => TimedChange::Delete(key.set(address.is_ipv4()), bytes_of(address)),
    };
    changes.into_iter().filter(|change| policies.has_pattern(change.key())).map(timed).collect()
}

fn bytes_of(address: IpAddr) -> Box<[u8]> {
    match address {
        IpAddr::V4(address) => Box::new(address.octets()),
        IpAddr::V6(address) => Box::new(address.octets()),
    }
}

fn address_of(bytes: &[u8]) -> Option<IpAddr> {
    let v4 = || <[u8; 4]>::try_from(bytes).ok().map(IpAddr::from);
    v4().or_else(|| <[u8; 16]>::try_from(bytes).ok().map(IpAddr::from))
}
