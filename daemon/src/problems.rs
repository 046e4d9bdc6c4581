//! Problems of this host, as `ovlctl status` shows them. Each has a stable code, a severity, the object that
//! it is about, and a sentence that says what to do.

use std::collections::BTreeMap;

pub(crate) use ovl_control::{Problem, Severity};

/// Kind of a problem. Codes are stable, because scripts and runbooks rely on them. `docs/problems.md` lists
/// them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) enum Code {
    /// A member of the cluster is down, or its daemon is.
    HostDown,
    /// No majority of the members is alive.
    NoMajority,
    /// Hosts run different releases.
    VersionsDiffer,
    /// What another host announces does not arrive here.
    NotSynchronised,
    /// This host's address is on no device, or its new address cannot be used.
    Address,
    /// The state file cannot be written.
    StateFile,
    /// A file in the run directory is damaged and was moved away.
    DamagedFile,
    /// The kernel's state cannot be read.
    KernelDump,
    /// The kernel rejects an operation.
    KernelRefusal,
    /// This host does not understand what a later release of ovld wrote.
    NotUnderstood,
    /// The clock of this host is wrong.
    OwnClock,
    /// The clock of another host is wrong, or it is unclear which is.
    PeerClock,
    /// Objects are refused because their stamps are in the future.
    FutureStamp,
    /// What ovl has in the kernel is not as it should be for long, or is changed again and again.
    Contested,
    /// This host is not admitted to the cluster.
    Admission,
    /// Another host has the identity of this host or of a third one.
    IdentityClash,
    /// A host with the cluster key belongs to another cluster.
    ForeignCluster,
    /// Several hosts have one name.
    HostName,
    /// A live host cannot be reached directly.
    Unreachable,
    /// A host's VTEP is of another address family.
    VtepFamily,
    /// More hosts that are not members announce themselves than this host remembers.
    UnknownHosts,
    /// The table of a host is refused.
    TableRefused,
    /// A later allocation map cannot be verified.
    MapNotVerified,
    /// A host and this one speak no common wire version.
    WireVersion,
    /// The cluster key cannot be saved to the state directory.
    KeyDisk,
    /// The configured cluster key file does not contain the key in use.
    KeyFile,
    /// A rotation of the cluster key makes no progress.
    KeyRotation,
    /// A host seals with a key that this host does not have.
    KeyMissed,
    /// No VXLAN packet passes to or from a live host.
    PathBroken,
    /// Only small VXLAN packets pass to or from a host.
    PathNarrow,
    /// Networks use shorter packets, because a path loses longer ones.
    PathLimited,
    /// No directly routed packet passes to or from a live host.
    DirectBroken,
    /// Packets in VXLAN are lost whose checksums are left to the offload, so ovld computes them before.
    ChecksumOffload,
    /// The cluster was recovered from the loss of its majority, and hosts of both sides are there.
    Recovered,
    /// Two networks of the cluster overlap.
    NetworkOverlap,
    /// A bridge network is in conflict with a network of the cluster.
    BridgeConflict,
    /// This host has no block of a routed network.
    NoBlock,
    /// An endpoint is isolated: its address belongs to another host.
    EndpointIsolated,
    /// The interface of an endpoint has another MAC address than its entry.
    OtherMac,
    /// A network is not built here, because it covers addresses that this host needs.
    NetworkRange,
    /// An endpoint or a host has joined more multicast groups than are followed.
    MulticastGroups,
    /// Packets for endpoints leave by a route of another program.
    RouteDiverted,
    /// An object with a name of ovl belongs to nothing.
    Leftover,
    /// The interface of an endpoint is not as it was attached.
    EndpointInterface,
    /// This host has no tunnel.
    NoTunnel,
    /// Another host has no tunnel.
    PeerWithoutTunnel,
    /// Two hosts publish the same tunnel key.
    TunnelKeyCopied,
    /// No packet of the tunnel passes to or from a live host.
    TunnelBroken,
    /// The port of relayed datagrams cannot be opened.
    RelayPort,
    /// A network that is not encrypted has endpoints on two hosts between which there is NAT.
    PlainAcrossNat,
    /// UDP is blocked to other hosts, which are reached by TCP.
    UdpBlocked,
    /// A network is not encrypted although encryption is configured.
    NotEncrypted,
    /// Datagrams of the tunnel that the kernel divides arrive damaged, so it divides none.
    SegmentsDamaged,
    /// A published port is held by another program.
    PublishedPort,
    /// The health check port of a Service is held by another program.
    HealthPort,
    /// A Service names an address or port that this host does not translate.
    ServiceDenied,
    /// A Service waits for an address, because the load balancer pool is used up.
    PoolUsedUp,
    /// A range of Service addresses overlaps a network.
    PoolOverlap,
    /// Another program's firewall drops packets.
    Firewall,
    /// A Service has no ready backend.
    NoBackends,
    /// A program listens at a node port of a Service.
    NodePortTaken,
    /// The resolver is not running.
    ResolverDown,
    /// An upstream resolver of the host does not answer.
    UpstreamResolver,
    /// A client of the resolver has used up its share.
    ResolverShare,
    /// The host's resolv.conf names no resolver, or has lines that are not understood.
    ResolvConf,
    /// A name has two meanings.
    AmbiguousName,
    /// An upstream resolver answers slowly.
    ResolverSlow,
    /// A workload asks several questions for each name outside of the cluster.
    SearchLists,
    /// Strict reverse path filtering drops packets of a host.
    SourceValidation,
    /// The kernel's neighbour table is too small.
    NeighbourTable,
    /// Metrics are not served, because their address cannot be listened at.
    WebAddress,
    /// The kernel's table of connections is nearly full.
    ConnectionTable,
    /// This process has nearly as many open files as it may have.
    Descriptors,
    /// The file system of the state directory is nearly full.
    DiskSpace,
    /// A UDP port or a VNI that ovl needs is taken.
    PortTaken,
    /// The kernel or the host lacks something that ovl needs.
    KernelFeature,
    /// A device that ovl needs does not forward.
    Forwarding,
    /// Another machine has an address of this host.
    DuplicateAddress,
    /// An object of the Kubernetes API server is not in force as it is there.
    NotMirrored,
    /// The Kubernetes API server is not reached.
    ApiUnreachable,
    /// A kube-proxy translates Services as well.
    KubeProxy,
    /// Addresses that workloads were told for domain names of policies are not admitted as they should be.
    NamesDisplaced,
    /// A policy has domain names, and queries for them do not come to ovl.
    NamesUnheard,
    /// Another program's traffic control delays or drops packets of ovl.
    TrafficControl,
    /// The page is not served, because its address cannot be listened at or its token cannot be read.
    PageAddress,
    /// The fast path is configured and cannot be used.
    FastPath,
}

impl Code {
    /// All codes, in the order of their numbers.
    #[cfg(test)]
    pub(crate) const ALL: [Self; 86] = [
        Self::HostDown,
        Self::NoMajority,
        Self::VersionsDiffer,
        Self::NotSynchronised,
        Self::Address,
        Self::StateFile,
        Self::DamagedFile,
        Self::KernelDump,
        Self::KernelRefusal,
        Self::NotUnderstood,
        Self::OwnClock,
        Self::PeerClock,
        Self::FutureStamp,
        Self::Contested,
        Self::Admission,
        Self::IdentityClash,
        Self::ForeignCluster,
        Self::HostName,
        Self::Unreachable,
        Self::VtepFamily,
        Self::UnknownHosts,
        Self::TableRefused,
        Self::MapNotVerified,
        Self::WireVersion,
        Self::KeyDisk,
        Self::KeyFile,
        Self::KeyRotation,
        Self::KeyMissed,
        Self::PathBroken,
        Self::PathNarrow,
        Self::PathLimited,
        Self::Recovered,
        Self::DirectBroken,
        Self::ChecksumOffload,
        Self::NetworkOverlap,
        Self::BridgeConflict,
        Self::NoBlock,
        Self::EndpointIsolated,
        Self::NetworkRange,
        Self::OtherMac,
        Self::MulticastGroups,
        Self::RouteDiverted,
        Self::Leftover,
        Self::EndpointInterface,
        Self::NoTunnel,
        Self::PeerWithoutTunnel,
        Self::TunnelKeyCopied,
        Self::TunnelBroken,
        Self::RelayPort,
        Self::PlainAcrossNat,
        Self::UdpBlocked,
        Self::NotEncrypted,
        Self::SegmentsDamaged,
        Self::PublishedPort,
        Self::HealthPort,
        Self::Firewall,
        Self::ServiceDenied,
        Self::PoolUsedUp,
        Self::PoolOverlap,
        Self::NoBackends,
        Self::NodePortTaken,
        Self::ResolverDown,
        Self::UpstreamResolver,
        Self::ResolverShare,
        Self::ResolvConf,
        Self::AmbiguousName,
        Self::ResolverSlow,
        Self::SearchLists,
        Self::SourceValidation,
        Self::NeighbourTable,
        Self::WebAddress,
        Self::ConnectionTable,
        Self::Descriptors,
        Self::DiskSpace,
        Self::PortTaken,
        Self::KernelFeature,
        Self::Forwarding,
        Self::DuplicateAddress,
        Self::NotMirrored,
        Self::ApiUnreachable,
        Self::KubeProxy,
        Self::NamesDisplaced,
        Self::NamesUnheard,
        Self::TrafficControl,
        Self::PageAddress,
        Self::FastPath,
    ];

    /// Returns the code as users see it, such as `OVL-E011`. The tens digit names the area: 0 the cluster, 1 this host, 2
    /// members, 3 cluster key (34 to 36, 38 and 39: paths, 37: members again), 4 networks, 5 encryption, 6 published ports and Services, 7 names, 8 settings
    /// of the host, 9 Kubernetes, 10 settings of the host
    /// again and the fast path, 12 what shows the cluster.
    pub(crate) const fn as_str(self) -> &'static str {
        match self {
            Self::HostDown => "OVL-E001",
            Self::NoMajority => "OVL-E002",
            Self::VersionsDiffer => "OVL-E003",
            Self::NotSynchronised => "OVL-E004",
            Self::Address => "OVL-E010",
            Self::StateFile => "OVL-E011",
            Self::DamagedFile => "OVL-E012",
            Self::KernelDump => "OVL-E013",
            Self::KernelRefusal => "OVL-E014",
            Self::NotUnderstood => "OVL-E015",
            Self::OwnClock => "OVL-E016",
            Self::PeerClock => "OVL-E017",
            Self::FutureStamp => "OVL-E018",
            Self::Contested => "OVL-E019",
            Self::Admission => "OVL-E020",
            Self::IdentityClash => "OVL-E021",
            Self::ForeignCluster => "OVL-E022",
            Self::HostName => "OVL-E023",
            Self::Unreachable => "OVL-E024",
            Self::VtepFamily => "OVL-E025",
            Self::UnknownHosts => "OVL-E026",
            Self::TableRefused => "OVL-E027",
            Self::MapNotVerified => "OVL-E028",
            Self::WireVersion => "OVL-E029",
            Self::KeyDisk => "OVL-E030",
            Self::KeyFile => "OVL-E031",
            Self::KeyRotation => "OVL-E032",
            Self::KeyMissed => "OVL-E033",
            Self::PathBroken => "OVL-E034",
            Self::PathNarrow => "OVL-E035",
            Self::PathLimited => "OVL-E036",
            Self::Recovered => "OVL-E037",
            Self::DirectBroken => "OVL-E038",
            Self::ChecksumOffload => "OVL-E039",
            Self::NetworkOverlap => "OVL-E040",
            Self::BridgeConflict => "OVL-E041",
            Self::NoBlock => "OVL-E042",
            Self::EndpointIsolated => "OVL-E043",
            Self::NetworkRange => "OVL-E044",
            Self::OtherMac => "OVL-E045",
            Self::MulticastGroups => "OVL-E046",
            Self::RouteDiverted => "OVL-E047",
            Self::Leftover => "OVL-E048",
            Self::EndpointInterface => "OVL-E049",
            Self::NoTunnel => "OVL-E050",
            Self::PeerWithoutTunnel => "OVL-E051",
            Self::TunnelKeyCopied => "OVL-E052",
            Self::TunnelBroken => "OVL-E053",
            Self::NotEncrypted => "OVL-E054",
            Self::SegmentsDamaged => "OVL-E055",
            Self::RelayPort => "OVL-E056",
            Self::PlainAcrossNat => "OVL-E057",
            Self::UdpBlocked => "OVL-E058",
            Self::PublishedPort => "OVL-E060",
            Self::HealthPort => "OVL-E061",
            Self::Firewall => "OVL-E062",
            Self::ServiceDenied => "OVL-E063",
            Self::PoolUsedUp => "OVL-E064",
            Self::PoolOverlap => "OVL-E065",
            Self::NoBackends => "OVL-E066",
            Self::NodePortTaken => "OVL-E068",
            Self::ResolverDown => "OVL-E070",
            Self::UpstreamResolver => "OVL-E071",
            Self::ResolverShare => "OVL-E072",
            Self::ResolvConf => "OVL-E073",
            Self::AmbiguousName => "OVL-E074",
            Self::ResolverSlow => "OVL-E075",
            Self::SearchLists => "OVL-E076",
            Self::SourceValidation => "OVL-E080",
            Self::NeighbourTable => "OVL-E081",
            Self::WebAddress => "OVL-E082",
            Self::ConnectionTable => "OVL-E083",
            Self::Descriptors => "OVL-E084",
            Self::DiskSpace => "OVL-E085",
            Self::PortTaken => "OVL-E086",
            Self::KernelFeature => "OVL-E087",
            Self::Forwarding => "OVL-E088",
            Self::DuplicateAddress => "OVL-E089",
            Self::NotMirrored => "OVL-E090",
            Self::ApiUnreachable => "OVL-E091",
            Self::KubeProxy => "OVL-E092",
            Self::NamesDisplaced => "OVL-E095",
            Self::NamesUnheard => "OVL-E096",
            Self::TrafficControl => "OVL-E100",
            Self::PageAddress => "OVL-E120",
            Self::FastPath => "OVL-E101",
        }
    }

    /// Returns the severity of the problem.
    pub(crate) const fn severity(self) -> Severity {
        match self {
            Self::Address
            | Self::StateFile
            | Self::KernelDump
            | Self::KernelRefusal
            | Self::NotUnderstood
            | Self::OwnClock
            | Self::PeerClock
            | Self::FutureStamp
            | Self::Admission
            | Self::IdentityClash
            | Self::ForeignCluster
            | Self::Unreachable
            | Self::VtepFamily
            | Self::TableRefused
            | Self::MapNotVerified
            | Self::WireVersion
            | Self::KeyDisk
            | Self::KeyMissed
            | Self::PathBroken
            | Self::PathNarrow
            | Self::Recovered
            | Self::DirectBroken
            | Self::NoBlock
            | Self::EndpointIsolated
            | Self::NetworkRange
            | Self::OtherMac
            | Self::NoTunnel
            | Self::PeerWithoutTunnel
            | Self::TunnelKeyCopied
            | Self::TunnelBroken
            | Self::RelayPort
            | Self::PlainAcrossNat
            | Self::PublishedPort
            | Self::HealthPort
            | Self::Firewall
            | Self::ResolverDown
            | Self::SourceValidation
            | Self::NotMirrored
            | Self::HostDown
            | Self::NoMajority
            | Self::Contested
            | Self::RouteDiverted
            | Self::EndpointInterface
            | Self::PortTaken
            | Self::KernelFeature
            | Self::Forwarding
            | Self::DuplicateAddress => Severity::Error,
            Self::DamagedFile
            | Self::HostName
            | Self::UnknownHosts
            | Self::KeyFile
            | Self::KeyRotation
            | Self::PathLimited
            | Self::ChecksumOffload
            | Self::NetworkOverlap
            | Self::MulticastGroups
            | Self::BridgeConflict
            | Self::PageAddress
            | Self::FastPath
            | Self::UdpBlocked
            | Self::NotEncrypted
            | Self::SegmentsDamaged
            | Self::ServiceDenied
            | Self::PoolUsedUp
            | Self::PoolOverlap
            | Self::UpstreamResolver
            | Self::ResolverShare
            | Self::ResolvConf
            | Self::AmbiguousName
            | Self::NeighbourTable
            | Self::WebAddress
            | Self::ConnectionTable
            | Self::Descriptors
            | Self::DiskSpace
            | Self::ApiUnreachable
            | Self::VersionsDiffer
            | Self::NotSynchronised
            | Self::Leftover
            | Self::NoBackends
            | Self::NodePortTaken
            | Self::ResolverSlow
            | Self::SearchLists
            | Self::TrafficControl
            | Self::NamesDisplaced
            | Self::NamesUnheard
            | Self::KubeProxy => Severity::Warning,
        }
    }

    /// Creates a problem of this kind. `object` names what it is about and is empty for this host itself.
    pub(crate) fn about(self, object: impl Into<String>, message: impl Into<String>) -> Problem {
        Problem {
            code: self.as_str().to_owned(),
            severity: self.severity(),
            object: object.into(),
            message: message.into(),
        }
    }
}

/// Problems that last until they are cleared. There is at most one for each code and object.
#[derive(Debug, Default)]
pub(crate) struct Problems(BTreeMap<(Code, String), String>);

impl Problems {
    /// Raises a problem, or clears it if `message` is `None`.
    pub(crate) fn set(&mut self, code: Code, object: impl Into<String>, message: Option<String>) {
        let key = (code, object.into());
        match message {
            Some(message) => {
                if self.0.get(&key) != Some(&message) {
                    tracing::warn!(code = code.as_str(), object = key.1, "{message}");
                    self.0.insert(key, message);
                }
            }
            None => {
                self.0.remove(&key);
            }
        }
    }

    /// Replaces all problems of a code.
    pub(crate) fn replace(&mut self, code: Code, all: impl IntoIterator<Item = (String, String)>) {
        let mut gone: Vec<String> = self.objects(code).map(str::to_owned).collect();
        for (object, message) in all {
            gone.retain(|old| *old != object);
            self.set(code, object, Some(message));
        }
        for object in gone {
            self.set(code, object, None);
        }
    }

    /// Returns the message of a problem. `None` if it is not raised.
    pub(crate) fn get(&self, code: Code, object: &str) -> Option<&str> {
        self.of(code).find(|(about, _)| *about == object).map(|(_, message)| message)
    }

    /// Returns the objects and messages of all problems of a code.
    pub(crate) fn of(&self, code: Code) -> impl Iterator<Item = (&str, &str)> {
        let all = self.0.range((code, String::new())..).take_while(move |((of, _), _)| *of == code);
        all.map(|((_, object), message)| (object.as_str(), message.as_str()))
    }

    /// Returns the objects of all problems of a code.
    fn objects(&self, code: Code) -> impl Iterator<Item = &str> {
        self.of(code).map(|(object, _)| object)
    }

    /// Returns all problems as users see them, ordered by code and object.
    pub(crate) fn all(&self) -> impl Iterator<Item = Problem> {
        self.0.iter().map(|((code, object), message)| code.about(object, message))
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::{Code, Problems};

    #[test]
    fn codes_are_unique_and_documented() {
        let documented = include_str!("../../docs/problems.md");
        let codes: BTreeSet<&str> = Code::ALL.iter().map(|code| code.as_str()).collect();
        assert_eq!(codes.len(), Code::ALL.len());
        for code in codes {
            assert!(documented.contains(&format!("| {code} |")), "{code} is not in docs/problems.md");
        }
    }

    #[test]
    fn replacing_takes_back_what_is_not_given_again() {
        let mut problems = Problems::default();
        let sentences =
            |all: &[&str]| all.iter().map(|it| ((*it).to_owned(), "x".to_owned())).collect::<Vec<_>>();
        problems.replace(Code::Firewall, sentences(&["a", "b"]));
        problems.set(Code::Address, "", Some("gone".to_owned()));
        problems.replace(Code::Firewall, sentences(&["b", "c"]));
        assert_eq!(problems.of(Code::Firewall).map(|(object, _)| object).collect::<Vec<_>>(), ["b", "c"]);
        assert_eq!(problems.get(Code::Address, ""), Some("gone"));
        problems.set(Code::Address, "", None);
        assert_eq!(problems.all().count(), 2);
    }
}
