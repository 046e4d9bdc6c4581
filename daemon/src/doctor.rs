//! What `ovlctl doctor` checks: which checks there are, what each finding is called, and which of them comes first.
//!
//! All of it is pure. What was read of the host is judged in [`host`], of networks and workloads in [`network`], of names in
//! [`names`], of other hosts in [`cluster`]. The problems that `ovlctl status` shows are findings too. Begin to read at
//! [`diagnose`].

pub(crate) mod cluster;
pub(crate) mod host;
pub(crate) mod names;
pub(crate) mod network;

use std::collections::BTreeMap;

use ovl_control::{Check, CheckResult, Finding, HostDiagnosis, Problem};

use crate::problems::Code;

/// The most findings of one host that are shown. The first ones are the causes of most others.
const MOST_FINDINGS: usize = 100;

/// All checks: the group, the check, and the codes of what it finds.
const CHECKS: &[(&str, &str, &[Code])] = &[
    ("cluster", "members", &[Code::HostDown, Code::NoMajority, Code::Admission, Code::UnknownHosts]),
    ("cluster", "identity", &[Code::IdentityClash, Code::ForeignCluster, Code::HostName, Code::Recovered]),
    ("cluster", "agreement", &[Code::NotSynchronised, Code::TableRefused, Code::MapNotVerified]),
    ("cluster", "versions", &[Code::VersionsDiffer, Code::WireVersion, Code::NotUnderstood]),
    ("cluster", "clocks", &[Code::OwnClock, Code::PeerClock, Code::FutureStamp]),
    ("cluster", "keys", &[Code::KeyDisk, Code::KeyFile, Code::KeyRotation, Code::KeyMissed]),
    ("host", "address", &[Code::Address, Code::DuplicateAddress]),
    ("host", "disk", &[Code::StateFile, Code::DamagedFile, Code::DiskSpace]),
    ("host", "open files", &[Code::Descriptors]),
    ("host", "features", &[Code::KernelFeature, Code::KernelDump, Code::FastPath]),
    ("host", "ports", &[Code::PortTaken, Code::RelayPort, Code::WebAddress, Code::PageAddress]),
    ("host", "forwarding", &[Code::Forwarding]),
    ("host", "source validation", &[Code::SourceValidation]),
    ("host", "neighbour table", &[Code::NeighbourTable]),
    ("host", "connection tracking", &[Code::ConnectionTable]),
    ("host", "firewalls", &[Code::Firewall]),
    ("host", "traffic control", &[Code::TrafficControl]),
    ("host", "leftovers", &[Code::Leftover]),
    ("paths", "hosts", &[Code::Unreachable, Code::VtepFamily, Code::PlainAcrossNat, Code::UdpBlocked]),
    ("paths", "vxlan", &[Code::PathBroken]),
    ("paths", "direct routes", &[Code::DirectBroken]),
    ("paths", "mtu", &[Code::PathNarrow, Code::PathLimited]),
    ("paths", "offload", &[Code::ChecksumOffload, Code::SegmentsDamaged]),
    (
        "paths",
        "tunnel",
        &[
            Code::NoTunnel,
            Code::PeerWithoutTunnel,
            Code::TunnelKeyCopied,
            Code::TunnelBroken,
            Code::NotEncrypted,
        ],
    ),
    ("networks", "kernel", &[Code::KernelRefusal, Code::Contested]),
    ("networks", "routes", &[Code::RouteDiverted]),
    ("networks", "subnets", &[Code::NetworkOverlap, Code::BridgeConflict, Code::NoBlock, Code::NetworkRange]),
    (
        "networks",
        "endpoints",
        &[Code::EndpointIsolated, Code::OtherMac, Code::EndpointInterface, Code::MulticastGroups],
    ),
    ("services", "backends", &[Code::NoBackends]),
    ("services", "ports", &[Code::PublishedPort, Code::HealthPort, Code::NodePortTaken, Code::KubeProxy]),
    ("services", "addresses", &[Code::ServiceDenied, Code::PoolUsedUp, Code::PoolOverlap]),
    ("names", "resolver", &[Code::ResolverDown, Code::ResolverShare]),
    ("names", "upstream", &[Code::UpstreamResolver, Code::ResolverSlow, Code::ResolvConf]),
    ("names", "search lists", &[Code::SearchLists]),
    ("names", "meanings", &[Code::AmbiguousName]),
    ("names", "policies", &[Code::NamesDisplaced, Code::NamesUnheard]),
    ("kubernetes", "API server", &[Code::NotMirrored, Code::ApiUnreachable]),
];

/// Something that is wrong, before it is put in order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Found {
    /// What kind of problem it is.
    pub code: Code,
    /// What it is about. Empty: this host.
    pub object: String,
    /// What is wrong, in a sentence.
    pub cause: String,
    /// What to do.
    pub fix: String,
}

impl Found {
    /// Creates a finding.
    pub(crate) fn new(
        code: Code,
        object: impl Into<String>,
        cause: impl Into<String>,
        fix: impl Into<String>,
    ) -> Self {
        Self { code, object: object.into(), cause: cause.into(), fix: fix.into() }
    }
}

/// Returns the place of a problem among the causes of others: what has the smaller number is likely to be the cause of what
/// has a larger one.
const fn rank(code: Code) -> u8 {
    match code {
        // The host itself: without it nothing works.
        Code::OwnClock
        | Code::DiskSpace
        | Code::Descriptors
        | Code::KernelFeature
        | Code::PortTaken
        | Code::ConnectionTable
        | Code::NeighbourTable => 10,
        Code::Address | Code::DuplicateAddress | Code::IdentityClash | Code::ForeignCluster => 12,
        // What another program or the administrator has put in the way.
        Code::Firewall
        | Code::Forwarding
        | Code::SourceValidation
        | Code::TrafficControl
        | Code::RouteDiverted
        | Code::Leftover => 20,
        // Other hosts.
        Code::PeerClock | Code::WireVersion | Code::NotUnderstood | Code::Recovered | Code::KeyMissed => 30,
        Code::Unreachable | Code::HostDown => 32,
        Code::NoMajority => 34,
        // Paths: an effect of the above, if there is any.
        Code::PathBroken | Code::DirectBroken | Code::TunnelBroken => 40,
        Code::PathNarrow | Code::ChecksumOffload | Code::SegmentsDamaged => 42,
        Code::PathLimited => 44,
        // What follows from nearly anything.
        Code::KernelRefusal | Code::KernelDump | Code::StateFile => 70,
        Code::Contested => 72,
        Code::NotSynchronised | Code::KeyRotation | Code::FutureStamp => 74,
        Code::NoBackends => 80,
        Code::VersionsDiffer => 90,
        _ => 50,
    }
}

/// Judges a host: `problems` are those of its status, `found` what else was found, and `remarks` what is to be said of
/// checks: the group, the check, a result at least as bad as which it has, and the sentence.
pub(crate) fn diagnose(
    host: String,
    took_ms: u64,
    problems: &[Problem],
    found: Vec<Found>,
    remarks: &[Remark],
) -> HostDiagnosis {
    let place: BTreeMap<&str, (Code, &str, &str)> = CHECKS
        .iter()
        .flat_map(|(group, check, codes)| {
            codes.iter().map(move |code| (code.as_str(), (*code, *group, *check)))
        })
        .collect();
    let of_status = problems.iter().filter_map(|problem| {
        let (code, ..) = place.get(problem.code.as_str())?;
        Some(Found::new(*code, &problem.object, &problem.message, ""))
    });
    let mut all: Vec<Found> = of_status.chain(found).collect();
    all.sort_by(|a, b| {
        let key = |it: &Found| (rank(it.code), it.code.severity(), it.code);
        // Of two that are the same but for the words, the one with advice of its own says more.
        (key(a), &a.object, a.fix.is_empty()).cmp(&(key(b), &b.object, b.fix.is_empty()))
    });
    all.dedup_by(|next, before| (next.code, &next.object) == (before.code, &before.object));
    all.truncate(MOST_FINDINGS);
    let findings: Vec<Finding> = all
        .into_iter()
        .filter_map(|Found { code, object, cause, fix }| {
            let (_, group, check) = place.get(code.as_str())?;
            Some(Finding {
                code: code.as_str().to_owned(),
                severity: code.severity(),
                group: (*group).to_owned(),
                check: (*check).to_owned(),
                object,
                cause,
                fix,
            })
        })
        .collect();
    let checks = CHECKS.iter().map(|(group, check, _)| {
        let of_check = findings.iter().filter(|found| (&*found.group, &*found.check) == (*group, *check));
        let remark = remarks.iter().find(|it| (it.group, it.check) == (*group, *check));
        let worst = of_check.map(|found| CheckResult::from(found.severity)).max().unwrap_or(CheckResult::Ok);
        Check {
            group: (*group).to_owned(),
            check: (*check).to_owned(),
            result: worst.max(remark.map_or(CheckResult::Ok, |it| it.at_least)),
            detail: remark.map_or_else(String::new, |it| it.detail.clone()),
        }
    });
    HostDiagnosis { host, took_ms, checks: checks.collect(), findings }
}

/// Something to say of a check that is no finding.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Remark {
    group: &'static str,
    check: &'static str,
    at_least: CheckResult,
    detail: String,
}

impl Remark {
    /// Says that a check could not be made.
    pub(crate) fn unknown(group: &'static str, check: &'static str, why: impl Into<String>) -> Self {
        Self { group, check, at_least: CheckResult::Unknown, detail: why.into() }
    }

    /// Says what is in progress.
    pub(crate) fn note(group: &'static str, check: &'static str, what: impl Into<String>) -> Self {
        Self { group, check, at_least: CheckResult::Ok, detail: what.into() }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use ovl_control::Severity;

    use super::*;

    #[test]
    fn each_code_belongs_to_one_check() {
        let codes: Vec<Code> = CHECKS.iter().flat_map(|(_, _, codes)| codes.iter().copied()).collect();
        assert_eq!(codes.iter().collect::<BTreeSet<_>>().len(), codes.len());
        for code in Code::ALL {
            assert!(codes.contains(&code), "{} has no check", code.as_str());
        }
        let names: BTreeSet<(&str, &str)> = CHECKS.iter().map(|(group, check, _)| (*group, *check)).collect();
        assert_eq!(names.len(), CHECKS.len());
    }

    #[test]
    fn healthy_host_has_no_findings_and_all_checks() {
        let found =
            diagnose("h1".to_owned(), 7, &[], Vec::new(), &[Remark::unknown("names", "upstream", "none")]);
        assert_eq!((found.findings.len(), found.checks.len()), (0, CHECKS.len()));
        let other: Vec<&Check> =
            found.checks.iter().filter(|check| check.result != CheckResult::Ok).collect();
        assert_eq!((other.len(), &*other[0].detail), (1, "none"));
    }

    #[test]
    fn causes_come_before_what_follows_from_them() {
        let problems = [
            Code::KernelRefusal.about("ip link add ovx-1", "the kernel refuses: UDP port 4789 is in use"),
            Code::PathBroken.about("h2", "no VXLAN packet arrives"),
        ];
        let taken = Found::new(Code::PortTaken, "UDP 4789", "nc has it", "stop it");
        let again = Found::new(Code::PathBroken, "h2", "the same in other words", "allow it");
        let found = diagnose("h1".to_owned(), 7, &problems, vec![again, taken], &[]);
        let codes: Vec<&str> = found.findings.iter().map(|found| &*found.code).collect();
        assert_eq!(codes, ["OVL-E086", "OVL-E034", "OVL-E014"]);
        assert_eq!(found.findings[1].fix, "allow it");
        let check = |name: &str| found.checks.iter().find(|check| check.check == name).unwrap().result;
        assert_eq!((check("vxlan"), check("ports")), (CheckResult::Error, CheckResult::Error));
        assert_eq!(found.findings[0].severity, Severity::Error);
    }

    #[test]
    fn number_of_findings_is_bounded() {
        let many = (0..1000).map(|n| Found::new(Code::Leftover, n.to_string(), "x", "y")).collect();
        assert_eq!(diagnose(String::new(), 0, &[], many, &[]).findings.len(), MOST_FINDINGS);
    }
}
