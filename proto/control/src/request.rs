//! The requests that ovld accepts.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::path::PathBuf;

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

use crate::capture::{CaptureRequest, CaptureTarget};
use crate::flows::FlowsOf;
use crate::kubernetes::{Join, Mirror, MirrorOffer, NodePods, Nodes, OwnNode};
use crate::resources::{Apply, Document, ResourceQuery};
use crate::trace::TraceRequest;
use ovl_proto::bandwidth::Bandwidth;
use ovl_proto::id::{Mac, NodeId};
use ovl_proto::object::{Backend, Driver, Mode};
use ovl_proto::publish::Publish;
use ovl_proto::resource::ResourceKey;
use ovl_proto::secret::Secret;

/// A request. Each variant's documentation names its reply.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "request", rename_all = "kebab-case", deny_unknown_fields)]
pub enum Request {
    /// Returns the daemon's status: [`crate::Reply::Status`].
    Status,
    /// Waits until this host is a member and knows what the other hosts announce: [`crate::Reply::Done`]. Requests that
    /// need it wait for ten seconds by themselves.
    WaitReady {
        /// How long to wait, in seconds.
        seconds: u16,
    },
    /// Lists all hosts: [`crate::Reply::Peers`].
    Peers,
    /// Lets a host return that [`Self::PeersForget`] removed: [`crate::Reply::Done`] when a majority has agreed.
    PeersAdmit {
        /// The host's id, or its name if it runs.
        node: String,
    },
    /// Removes a dead host from the cluster and frees its blocks: [`crate::Reply::Done`] when a majority has agreed.
    /// The host does not return before [`Self::PeersAdmit`] or a rotation of the cluster key.
    PeersForget {
        /// The host's name or id.
        node: String,
    },
    /// Recovers the cluster from the loss of its majority, or answers such a recovery of other hosts:
    /// [`crate::Reply::Recovery`].
    Recover(RecoverStep),
    /// Starts a rotation of the cluster key: [`crate::Reply::Keys`] when a majority has agreed.
    KeyRotateCluster {
        /// The new key, as the content of a key file.
        key: Secret<String>,
    },
    /// Starts a rotation of this host's tunnel key: [`crate::Reply::Keys`] when the new key is published.
    KeyRotateTunnel,
    /// Returns the keys of all hosts: [`crate::Reply::Keys`].
    KeyStatus,
    /// Withdraws this host from the cluster and ends the daemon: [`crate::Reply::Done`].
    Leave,
    /// As [`Self::Leave`], and deletes every kernel object of ovl: [`crate::Reply::Done`].
    Teardown,
    /// Lists all blocks: [`crate::Reply::Subnets`].
    Subnets,
    /// Lists FDB and neighbour entries: [`crate::Reply::Fdb`].
    Fdb,
    /// Lists routes and addresses: [`crate::Reply::Routes`].
    Routes,
    /// Returns the plan without applying it: [`crate::Reply::Plan`].
    Plan,
    /// Compares the kernel with the desired data plane: [`crate::Reply::Verify`].
    Verify,
    /// Checks what commonly breaks, within five seconds: [`crate::Reply::Doctor`].
    Doctor {
        /// Whether all members are asked, or only this host.
        #[serde(default)]
        all_hosts: bool,
    },
    /// Checks this host's connection to others, within five seconds: [`crate::Reply::Netcheck`].
    Netcheck,
    /// Returns events, oldest first: [`crate::Reply::Events`]. Without an end, the latest ones.
    Events {
        /// Whether to continue with each new event as it occurs, until the client closes the connection. The other fields
        /// then have no effect.
        follow: bool,
        /// Only events at this time or later, in milliseconds since 1970.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        since_ms: Option<u64>,
        /// Only events at this time or earlier.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        until_ms: Option<u64>,
    },
    /// Returns what the cluster consists of, without asking another host: [`crate::Reply::Overview`].
    Overview,
    /// Asks all members how they see each other, and for counters of their endpoints: [`crate::Reply::Reports`].
    Reports,
    /// Returns the URL of the page, with its token: [`crate::Reply::Page`]. Fails if no page is served.
    Page,
    /// Returns the metrics in Prometheus text format: [`crate::Reply::Text`].
    Metrics,
    /// Creates a network: [`crate::Reply::Network`].
    NetworkCreate(NetworkCreate),
    /// Lists all networks: [`crate::Reply::Networks`].
    NetworkLs,
    /// Returns a network: [`crate::Reply::Network`].
    NetworkInspect {
        /// The network's name or id.
        name: String,
    },
    /// Changes a network: [`crate::Reply::Network`].
    NetworkUpdate {
        /// The network's name or id.
        name: String,
        /// Larger prefixes, each of which contains a subnet of the network.
        #[serde(default)]
        subnets: Vec<IpNet>,
        /// A fixed MTU in bytes. 0: derived from the path MTUs. `None`: unchanged.
        #[serde(default)]
        mtu: Option<u16>,
    },
    /// Deletes a network; refused while it has endpoints: [`crate::Reply::Done`].
    NetworkRm {
        /// The network's name or id.
        name: String,
    },
    /// Creates an endpoint: [`crate::Reply::Endpoint`] when the kernel is configured.
    Attach(Box<Attach>),
    /// Deletes endpoints; succeeds if there are none: [`crate::Reply::Done`].
    Detach {
        /// The endpoint's name.
        name: String,
        /// Only on this network. `None`: on all networks.
        #[serde(default)]
        network: Option<String>,
        /// The Kubernetes namespace. `None`: `default`.
        #[serde(default)]
        namespace: Option<String>,
    },
    /// Lists all endpoints: [`crate::Reply::Endpoints`].
    Endpoints,
    /// Looks up the network namespace of an endpoint of this host: [`crate::Reply::Netns`].
    EndpointNetns {
        /// The endpoint's name.
        name: String,
        /// Only on this network. `None`: on all networks.
        #[serde(default)]
        network: Option<String>,
        /// The Kubernetes namespace. `None`: `default`.
        #[serde(default)]
        namespace: Option<String>,
    },
    /// Handles a call of a container runtime, forwarded by `ovl-cni`: [`crate::Reply::Cni`] or
    /// [`crate::Reply::CniError`].
    Cni(Box<CniCall>),
    /// Creates a sandbox with an endpoint on each network: [`crate::Reply::Sandbox`].
    SandboxCreate(SandboxCreate),
    /// Deletes a sandbox; succeeds if there is none, and is refused while processes are inside:
    /// [`crate::Reply::Done`].
    SandboxRm {
        /// The sandbox's name.
        name: String,
        /// Whether to delete it even if processes are inside.
        #[serde(default)]
        force: bool,
    },
    /// Lists the sandboxes of this host: [`crate::Reply::Sandboxes`].
    SandboxLs,
    /// Handles a call of a Docker Engine, forwarded by `ovl-docker`: [`crate::Reply::Docker`].
    Docker(DockerCall),
    /// Sets the names of a Docker Engine's endpoint: [`crate::Reply::Done`].
    DockerName(DockerName),
    /// Lists all network policies: [`crate::Reply::Policies`].
    PolicyLs,
    /// Explains whether network policies allow a connection: [`crate::Reply::PolicyExplain`].
    PolicyExplain {
        /// The source: an endpoint's name, `NAMESPACE/NAME`, or an address.
        from: String,
        /// The destination, in the same form.
        to: String,
        /// The destination port. `None` for a protocol without ports.
        #[serde(default)]
        port: Option<u16>,
        /// The protocol, TCP by default. Ignored without a port.
        #[serde(default)]
        protocol: ovl_proto::resource::Protocol,
    },
    /// Lists connections that network policies recently refused on this host: [`crate::Reply::PolicyDrops`].
    PolicyDrops,
    /// Follows a packet from one end to the other: [`crate::Reply::Trace`].
    Trace(TraceRequest),
    /// Says which packets a capture means: [`crate::Reply::CapturePlan`].
    CapturePlan {
        /// Whose packets.
        target: CaptureTarget,
    },
    /// Captures packets until the client closes the connection: [`crate::Reply::Captured`], whenever there is something and
    /// at least every few tenths of a second from each host, until each has ended.
    Capture(CaptureRequest),
    /// Says who talks to whom: [`crate::Reply::Flows`] of one host, and [`crate::Reply::HostFlows`] of all. With `follow`
    /// [`crate::Reply::Flows`], one from each host about once a second.
    Flows {
        /// Whether to go on each second, until the client closes the connection, with what was seen in it. Otherwise:
        /// connections that are tracked now, and those that were refused recently.
        #[serde(default)]
        follow: bool,
        /// On which hosts.
        #[serde(default)]
        of: FlowsOf,
    },
    /// Says what has addresses: [`crate::Reply::Names`].
    NamesOf {
        /// The addresses: at most [`crate::MAX_NAMES`].
        addresses: Vec<IpAddr>,
    },
    /// Resolves a DNS query and explains the answer: [`crate::Reply::Dns`].
    Dns(DnsQuestion),
    /// Returns the content of an endpoint's resolv.conf(5): [`crate::Reply::Text`].
    ResolvConf {
        /// The name of an endpoint on this host.
        endpoint: String,
        /// The network. `None`: the only network on which an endpoint has the name.
        #[serde(default)]
        network: Option<String>,
    },
    /// Sets whether Services send connections to an endpoint of this host: [`crate::Reply::Done`].
    EndpointReady {
        /// The endpoint's name.
        name: String,
        /// Only on this network. `None`: on all networks.
        #[serde(default)]
        network: Option<String>,
        /// The Kubernetes namespace. `None`: `default`.
        #[serde(default)]
        namespace: Option<String>,
        /// Whether it is ready.
        ready: bool,
    },
    /// Adds documents for the next [`Self::Apply`] or [`Self::Delete`] of this connection: [`crate::Reply::Done`].
    Stage {
        /// The documents, in order.
        documents: Vec<Document>,
    },
    /// Creates or changes the objects of the staged documents: all of them, or none if one is invalid.
    /// [`crate::Reply::Applied`] or [`crate::Reply::Refused`].
    Apply(Apply),
    /// Deletes the objects of the staged documents and the named objects: [`crate::Reply::Applied`] or
    /// [`crate::Reply::Refused`].
    Delete {
        /// The named objects.
        keys: Vec<ResourceKey>,
        /// The namespace of staged objects that do not name one. `None`: `default`.
        #[serde(default)]
        namespace: Option<String>,
        /// Whether to only check, without writing.
        #[serde(default)]
        dry_run: bool,
    },
    /// Says that `ovl-kube` runs, for as long as the connection lasts. Whenever it changes whether this host is to mirror
    /// the API server's objects, and at first: [`crate::Reply::MirrorTurn`].
    MirrorTurn(MirrorOffer),
    /// Asks what ovld has to say to the API server, for as long as the connection lasts. Whenever it changes, and at first:
    /// [`crate::Reply::ApiReport`].
    ApiReport,
    /// Takes over objects of a Kubernetes API server, each by itself: [`crate::Reply::Mirrored`]. Refused on a host whose
    /// turn it is not.
    Mirror(Mirror),
    /// Takes over what the API server says of the pods of this host: [`crate::Reply::Mirrored`].
    NodePods(NodePods),
    /// Names hosts to join through, to an ovld that is to join through the Nodes of an API server: [`crate::Reply::Done`].
    Join(Join),
    /// Says which Nodes an API server has, on the host whose turn it is to mirror: [`crate::Reply::Done`]. Members that are
    /// lost and whose Node was deleted are forgotten.
    Nodes(Nodes),
    /// Says what an API server has of the Node of this host: [`crate::Reply::Done`].
    OwnNode(OwnNode),
    /// Lists objects by namespace and name: [`crate::Reply::Resources`].
    Get(ResourceQuery),
    /// Lists Services with their backends, by namespace and name: [`crate::Reply::Backends`]. The kind of the query
    /// is Service.
    Backends(ResourceQuery),
}

/// A step of [`Request::Recover`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "step", rename_all = "kebab-case", deny_unknown_fields)]
pub enum RecoverStep {
    /// Changes nothing, and returns what a recovery would do.
    Plan,
    /// Makes the survivors the members of a new cluster, if what a plan said is still true.
    Confirm {
        /// The version of the plan.
        version: u64,
        /// The survivors of the plan.
        survivors: Vec<NodeId>,
    },
    /// Joins the cluster that other hosts recovered without this one.
    Accept,
    /// Goes on in spite of a recovery by other hosts.
    Reject,
}

/// An unmodified call of a Docker Engine. ovld interprets it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DockerCall {
    /// The method, such as `NetworkDriver.Join`.
    pub method: String,
    /// The body; null if absent.
    #[serde(default)]
    pub body: serde_json::Value,
}

/// The names of a Docker Engine's endpoint, which are not part of any call.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DockerName {
    /// The Engine's id of the endpoint.
    pub endpoint: String,
    /// The container's name.
    pub name: String,
    /// Further names that resolve to it.
    #[serde(default)]
    pub aliases: Vec<String>,
}

/// An unmodified call of a container runtime (CNI specification 1.1.0, section 2). ovld interprets it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CniCall {
    /// `CNI_COMMAND`. The plugin itself handles `VERSION`.
    pub command: CniCommand,
    /// `CNI_CONTAINERID`.
    #[serde(default)]
    pub container_id: String,
    /// `CNI_NETNS`; empty if absent.
    #[serde(default)]
    pub netns: String,
    /// `CNI_IFNAME`.
    #[serde(default)]
    pub ifname: String,
    /// `CNI_ARGS`.
    #[serde(default)]
    pub args: String,
    /// `CNI_PATH`.
    #[serde(default)]
    pub path: String,
    /// The network configuration from standard input.
    pub config: serde_json::Value,
}

/// A CNI command.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "UPPERCASE")]
pub enum CniCommand {
    /// Attaches a container to a network.
    Add,
    /// Detaches it.
    Del,
    /// Checks that the attachment is intact.
    Check,
    /// Deletes the attachments that the runtime no longer knows.
    Gc,
    /// Checks whether an `ADD` would succeed.
    Status,
}

/// A request to create a sandbox.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SandboxCreate {
    /// The name, with the rules of endpoint names.
    pub name: String,
    /// The names or ids of networks, in the order of the sandbox's interfaces; or only `host`, or only `none`.
    #[serde(default)]
    pub networks: Vec<String>,
    /// The Kubernetes namespace. `None`: `default`.
    #[serde(default)]
    pub namespace: Option<String>,
    /// The labels that selectors match.
    #[serde(default)]
    pub labels: BTreeMap<String, String>,
    /// The ports to publish, on its first network that is not internal.
    #[serde(default)]
    pub publish: Vec<Publish>,
}

/// A request to create a network.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NetworkCreate {
    /// The name: letters, digits, `-`, `_` and `.`, at most 63.
    pub name: String,
    /// The driver.
    pub driver: Driver,
    /// The mode.
    pub mode: Mode,
    /// The subnets. Empty: a free subnet of the configured pool.
    #[serde(default)]
    pub subnets: Vec<IpNet>,
    /// The VNI. `None`: a free VNI.
    #[serde(default)]
    pub vni: Option<u32>,
    /// Whether traffic between hosts passes only through the tunnel.
    #[serde(default)]
    pub encrypted: bool,
    /// Whether traffic passes through the tunnel to hosts to which there is no path in plain text.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub auto_encrypt: bool,
    /// Whether the network has no gateway.
    #[serde(default)]
    pub internal: bool,
    /// The MTU in bytes. `None`: derived from the path MTUs.
    #[serde(default)]
    pub mtu: Option<u16>,
    /// How a routed network reaches other hosts. `None`: VXLAN.
    #[serde(default)]
    pub backend: Option<Backend>,
    /// The block lengths, one for each of `subnets`. Empty: derived from the subnet's size.
    #[serde(default)]
    pub block_lengths: Vec<u8>,
    /// Whether to enable the resolver on a bridge network that is called `default` or `bridge`, too.
    #[serde(default)]
    pub dns: bool,
    /// Whether endpoints of an internal network get answers for names outside of the cluster.
    #[serde(default)]
    pub external_names: bool,
}

/// A request to create an endpoint.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Attach {
    /// The endpoint's name, unique on its network.
    pub name: String,
    /// The network's name or id.
    pub network: String,
    /// The network namespace of the interface.
    pub netns: NetnsRef,
    /// The requested addresses, at most one per address family, and no others. Empty: free addresses.
    #[serde(default)]
    pub addresses: Vec<IpAddr>,
    /// The MAC address. `None`: derived from the address.
    #[serde(default)]
    pub mac: Option<Mac>,
    /// The interface's name. `None`: the first free name of eth0, eth1, ...
    #[serde(default)]
    pub ifname: Option<String>,
    /// Further names that resolve to it.
    #[serde(default)]
    pub aliases: Vec<String>,
    /// The Kubernetes namespace. `None`: `default`.
    #[serde(default)]
    pub namespace: Option<String>,
    /// The labels that selectors match.
    #[serde(default)]
    pub labels: BTreeMap<String, String>,
    /// The ports to publish.
    #[serde(default)]
    pub publish: Vec<Publish>,
    /// Whether Services send it no connections until [`Request::EndpointReady`].
    #[serde(default)]
    pub not_ready: bool,
    /// Prefixes that it may send from, beside its own addresses.
    #[serde(default)]
    pub allowed: Vec<IpNet>,
    /// MAC addresses that it may send from, beside its own.
    #[serde(default)]
    pub allowed_macs: Vec<Mac>,
    /// The pod that it belongs to, in the same Kubernetes namespace. `None`: none is known.
    #[serde(default)]
    pub pod: Option<PodRef>,
    /// The limits of its traffic.
    #[serde(default)]
    pub bandwidth: Bandwidth,
}

/// A pod, as a container runtime names it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PodRef {
    /// The pod's name.
    pub name: String,
    /// The unique id that the Kubernetes API server gave the pod. Empty: not known.
    #[serde(default)]
    pub uid: String,
}

/// A hypothetical DNS query.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DnsQuestion {
    /// The queried name.
    pub name: String,
    /// The record type: `A`, `AAAA`, `PTR` and so on, or `TYPE` with a number.
    pub kind: String,
    /// The querying endpoint of this host. `None`: the host itself.
    #[serde(default)]
    pub from: Option<String>,
    /// The network of that endpoint, if its name is on several networks.
    #[serde(default)]
    pub network: Option<String>,
}

/// A network namespace.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum NetnsRef {
    /// A file such as `/run/netns/blue`.
    Path(PathBuf),
    /// The network namespace of a process, by its id as ovld sees it.
    Pid(u32),
}
