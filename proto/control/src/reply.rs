//! The replies of ovld. `ovlctl -o json` prints them unchanged.

use std::collections::BTreeMap;
use std::net::IpAddr;

use serde::{Deserialize, Serialize};

use crate::capture::{CapturePlan, CapturedFrom};
use crate::doctor::Diagnosis;
use crate::flows::Flows;
use crate::info::{
    CniError, DnsAnswer, EndpointInfo, Event, Failure, FdbRow, KeyStatus, Netns, NetworkInfo, PageAddress,
    PeerInfo, PolicyDrop, PolicyJudgement, PolicyRow, RecoveryPlan, RouteRow, SandboxInfo, Status, SubnetUse,
    Verify,
};
use crate::kubernetes::{ApiReport, Mirrored};
use crate::netcheck::Netcheck;
use crate::overview::{Overview, Reports};
use crate::resources::{AppliedAll, ManifestProblem, ResourceInfo, ServiceBackends};
use crate::trace::Trace;

/// A reply.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "reply", content = "value", rename_all = "kebab-case")]
pub enum Reply {
    /// The request succeeded.
    Done,
    /// The request failed.
    Error(Failure),
    /// Text to print unchanged.
    Text(String),
    /// The daemon's status.
    Status(Box<Status>),
    /// All hosts, the local host first.
    Peers(Vec<PeerInfo>),
    /// What is known about the loss of a majority, and what a recovery does.
    Recovery(Box<RecoveryPlan>),
    /// The keys of all hosts.
    Keys(Box<KeyStatus>),
    /// All blocks.
    Subnets(Vec<SubnetUse>),
    /// FDB entries of the kernel, with their neighbour entries.
    Fdb(Vec<FdbRow>),
    /// Routes and addresses of the kernel.
    Routes(Vec<RouteRow>),
    /// The commands that a reconciliation would apply now. Empty if there is no drift.
    Plan(Vec<String>),
    /// The result of a comparison with the kernel.
    Verify(Verify),
    /// What was checked and found.
    Doctor(Box<Diagnosis>),
    /// What was found of this host's connection to others.
    Netcheck(Box<Netcheck>),
    /// Events, oldest first.
    Events(Vec<Event>),
    /// What the cluster consists of.
    Overview(Box<Overview>),
    /// What the members say of themselves.
    Reports(Reports),
    /// Where the page is.
    Page(PageAddress),
    /// One network.
    Network(Box<NetworkInfo>),
    /// All networks, by name.
    Networks(Vec<NetworkInfo>),
    /// One endpoint.
    Endpoint(Box<EndpointInfo>),
    /// All endpoints of the cluster, by network and name.
    Endpoints(Vec<EndpointInfo>),
    /// A network namespace of a workload.
    Netns(Netns),
    /// The result that the CNI plugin prints; null if the call has no result.
    Cni(serde_json::Value),
    /// The error that the CNI plugin prints.
    CniError(CniError),
    /// One sandbox.
    Sandbox(Box<SandboxInfo>),
    /// All sandboxes of this host, by name.
    Sandboxes(Vec<SandboxInfo>),
    /// The response to a Docker Engine, including errors in `Err`.
    Docker(serde_json::Value),
    /// All network policies, by namespace and name.
    Policies(Vec<PolicyRow>),
    /// The decision of network policies on a connection, for each two addresses of one family.
    PolicyExplain(Vec<PolicyJudgement>),
    /// Connections that network policies recently refused on this host, the latest first.
    PolicyDrops(Vec<PolicyDrop>),
    /// The way of a packet.
    Trace(Box<Trace>),
    /// Which packets a capture means.
    CapturePlan(Box<CapturePlan>),
    /// What a host captured.
    Captured(Box<CapturedFrom>),
    /// Who talks to whom on a host.
    Flows(Box<Flows>),
    /// Who talks to whom on all hosts, the local host first.
    HostFlows(Vec<Flows>),
    /// The names of what has addresses, by address. What is not known is not listed.
    Names(BTreeMap<IpAddr, String>),
    /// The answer to a DNS query.
    Dns(Box<DnsAnswer>),
    /// What was done with each object.
    Applied(Box<AppliedAll>),
    /// Nothing was written, because of these problems.
    Refused(Vec<ManifestProblem>),
    /// Whether this host is to mirror the objects of its Kubernetes API server.
    MirrorTurn {
        /// Whether it is.
        acts: bool,
    },
    /// What ovld has to say to the API server.
    ApiReport(Box<ApiReport>),
    /// What was done with objects of an API server.
    Mirrored(Box<Mirrored>),
    /// Kubernetes objects.
    Resources(Vec<ResourceInfo>),
    /// Services with their backends.
    Backends(Vec<ServiceBackends>),
}
