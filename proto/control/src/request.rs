//! What can be asked of ovld.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::path::PathBuf;

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

use crate::resources::{Apply, Document, ResourceQuery};
use ovl_proto::id::Mac;
use ovl_proto::object::{Backend, Driver, Mode};
use ovl_proto::publish::Publish;
use ovl_proto::resource::ResourceKey;
use ovl_proto::secret::Secret;

/// One request.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "request", rename_all = "kebab-case", deny_unknown_fields)]
pub enum Request {
    /// Answered with [`crate::Reply::Status`].
    Status,
    /// Answered with [`crate::Reply::Peers`].
    Peers,
    /// Take a dead host out of the cluster and free its blocks. Answered with
    /// [`crate::Reply::Done`] when a majority has agreed.
    PeersForget {
        /// Name or id.
        node: String,
    },
    /// Begin to change the cluster key on all hosts. Answered with [`crate::Reply::Keys`] when a
    /// majority has agreed.
    KeyRotateCluster {
        /// The new key, as the content of a key file.
        key: Secret<String>,
    },
    /// Change this host's tunnel key. Answered with [`crate::Reply::Keys`] when the new one is published.
    KeyRotateTunnel,
    /// Answered with [`crate::Reply::Keys`].
    KeyStatus,
    /// Withdraw this host from the cluster and end the daemon. [`crate::Reply::Done`].
    Leave,
    /// The same, and remove every kernel object of ours. [`crate::Reply::Done`].
    Teardown,
    /// Answered with [`crate::Reply::Subnets`].
    Subnets,
    /// Answered with [`crate::Reply::Fdb`].
    Fdb,
    /// Answered with [`crate::Reply::Routes`].
    Routes,
    /// Answered with [`crate::Reply::Plan`].
    Plan,
    /// Answered with [`crate::Reply::Verify`].
    Verify,
    /// The latest events; with `follow`, then each new one as it happens.
    Events {
        /// Go on until the client closes the connection.
        follow: bool,
    },
    /// In Prometheus' text format: [`crate::Reply::Text`].
    Metrics,
    /// Answered with [`crate::Reply::Network`].
    NetworkCreate(NetworkCreate),
    /// Answered with [`crate::Reply::Networks`].
    NetworkLs,
    /// Answered with [`crate::Reply::Network`].
    NetworkInspect {
        /// Name or id.
        name: String,
    },
    /// Answered with [`crate::Reply::Network`].
    NetworkUpdate {
        /// Name or id.
        name: String,
        /// Larger ranges, each of which holds one that the network has.
        #[serde(default)]
        subnets: Vec<IpNet>,
        /// A fixed MTU; 0 means what the paths carry.
        #[serde(default)]
        mtu: Option<u16>,
    },
    /// Refused while the network has endpoints. [`crate::Reply::Done`].
    NetworkRm {
        /// Name or id.
        name: String,
    },
    /// Answered with [`crate::Reply::Endpoint`] when the kernel holds it.
    Attach(Attach),
    /// Succeeds where nothing is attached. [`crate::Reply::Done`].
    Detach {
        /// The endpoint's name.
        name: String,
        /// Only from this network.
        #[serde(default)]
        network: Option<String>,
        /// Its Kubernetes namespace.
        #[serde(default)]
        namespace: Option<String>,
    },
    /// Answered with [`crate::Reply::Endpoints`].
    Endpoints,
    /// One call of a container runtime, passed on by `ovl-cni`. Answered with
    /// [`crate::Reply::Cni`] or [`crate::Reply::CniError`].
    Cni(Box<CniCall>),
    /// Makes a network namespace that outlives its programs and this daemon, with an endpoint on
    /// each network. Answered with [`crate::Reply::Sandbox`].
    SandboxCreate(SandboxCreate),
    /// Succeeds where there is none. Refused while processes are inside. [`crate::Reply::Done`].
    SandboxRm {
        /// The sandbox's name.
        name: String,
        /// Whatever is inside.
        #[serde(default)]
        force: bool,
    },
    /// Answered with [`crate::Reply::Sandboxes`].
    SandboxLs,
    /// One call of a Docker Engine, passed on by `ovl-docker`. Answered with [`crate::Reply::Docker`].
    Docker(DockerCall),
    /// What an Engine calls one of its endpoints. [`crate::Reply::Done`].
    DockerName(DockerName),
    /// Answered with [`crate::Reply::Policies`].
    PolicyLs,
    /// What network policies say of a connection. Answered with [`crate::Reply::PolicyExplain`].
    PolicyExplain {
        /// An endpoint's name, with its namespace and a slash before it or not; or an address.
        from: String,
        /// The same.
        to: String,
        /// The destination's port; none: of a protocol that has none.
        #[serde(default)]
        port: Option<u16>,
        /// TCP unless given; without a port of no meaning.
        #[serde(default)]
        protocol: ovl_proto::resource::Protocol,
    },
    /// What network policies refused lately on this host. Answered with [`crate::Reply::PolicyDrops`].
    PolicyDrops,
    /// What a DNS query would be answered, and why. Answered with [`crate::Reply::Dns`].
    Dns(DnsQuestion),
    /// What belongs into an endpoint's resolv.conf(5). Answered with [`crate::Reply::Text`].
    ResolvConf {
        /// The endpoint, on this host.
        endpoint: String,
        /// Its network; nothing: the one network on which there is an endpoint of the name.
        #[serde(default)]
        network: Option<String>,
    },
    /// Says whether Services send connections to an endpoint of this host. [`crate::Reply::Done`].
    EndpointReady {
        /// The endpoint's name.
        name: String,
        /// Only on this network.
        #[serde(default)]
        network: Option<String>,
        /// Its Kubernetes namespace.
        #[serde(default)]
        namespace: Option<String>,
        /// Whether it is.
        ready: bool,
    },
    /// More documents for the next [`Self::Apply`] or [`Self::Delete`] of this connection.
    /// [`crate::Reply::Done`].
    Stage {
        /// In their order.
        documents: Vec<Document>,
    },
    /// Makes or changes the objects of the staged documents: all of them, or none if any is wrong. Answered
    /// with [`crate::Reply::Applied`] or [`crate::Reply::Refused`].
    Apply(Apply),
    /// Deletes the objects of the staged documents, and these. Answered with [`crate::Reply::Applied`] or
    /// [`crate::Reply::Refused`].
    Delete {
        /// By name.
        keys: Vec<ResourceKey>,
        /// For staged objects that name none; nothing: `default`.
        #[serde(default)]
        namespace: Option<String>,
        /// Everything but writing.
        #[serde(default)]
        dry_run: bool,
    },
    /// Answered with [`crate::Reply::Resources`], by namespace and name.
    Get(ResourceQuery),
    /// Answered with [`crate::Reply::Backends`], by namespace and name; the query's kind is Service.
    Backends(ResourceQuery),
}

/// A call as the Engine made it: all that it means is decided in the daemon.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DockerCall {
    /// `NetworkDriver.Join` and the like.
    pub method: String,
    /// Null where it has none.
    #[serde(default)]
    pub body: serde_json::Value,
}

/// The names of an Engine's endpoint, which no call tells.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DockerName {
    /// The Engine's id of the endpoint.
    pub endpoint: String,
    /// The container's name.
    pub name: String,
    /// What else it is to answer to.
    #[serde(default)]
    pub aliases: Vec<String>,
}

/// What a container runtime handed to the plugin (CNI specification 1.1.0, section 2), as it came:
/// all that it means is decided in the daemon.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CniCall {
    /// `CNI_COMMAND`; `VERSION` is answered by the plugin itself.
    pub command: CniCommand,
    /// `CNI_CONTAINERID`.
    #[serde(default)]
    pub container_id: String,
    /// `CNI_NETNS`; empty where the runtime has none.
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

/// What the runtime wants.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "UPPERCASE")]
pub enum CniCommand {
    /// Put a container on a network.
    Add,
    /// Take it off.
    Del,
    /// Say whether it is as it was.
    Check,
    /// Take off all that the runtime does not know any more.
    Gc,
    /// Say whether an `ADD` would work.
    Status,
}

/// A sandbox to be made.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SandboxCreate {
    /// As an endpoint's.
    pub name: String,
    /// Names or ids of networks, in the order of its interfaces; or only `host`, or only `none`.
    #[serde(default)]
    pub networks: Vec<String>,
    /// The Kubernetes namespace; nothing: `default`.
    #[serde(default)]
    pub namespace: Option<String>,
    /// What selectors match.
    #[serde(default)]
    pub labels: BTreeMap<String, String>,
    /// Ports of this host that lead to it, at its first network that is not internal.
    #[serde(default)]
    pub publish: Vec<Publish>,
}

/// A network to be made.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NetworkCreate {
    /// Letters, digits, `-`, `_` and `.`, at most 63.
    pub name: String,
    /// How it is built.
    pub driver: Driver,
    /// What it carries.
    pub mode: Mode,
    /// Nothing: a free range of the configured pool.
    #[serde(default)]
    pub subnets: Vec<IpNet>,
    /// Nothing: a free one.
    #[serde(default)]
    pub vni: Option<u32>,
    /// Only ever through the tunnel.
    #[serde(default)]
    pub encrypted: bool,
    /// Without a gateway.
    #[serde(default)]
    pub internal: bool,
    /// Nothing: what the paths carry.
    #[serde(default)]
    pub mtu: Option<u16>,
    /// How a routed network reaches other hosts; nothing: in VXLAN.
    #[serde(default)]
    pub backend: Option<Backend>,
    /// The prefix length of each host's block, one for each of `subnets`; none: what fits.
    #[serde(default)]
    pub block_lengths: Vec<u8>,
    /// Names resolve, also on a bridge network that is called `default` or `bridge`.
    #[serde(default)]
    pub dns: bool,
}

/// An endpoint to be made.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Attach {
    /// The endpoint's name, unique on its network.
    pub name: String,
    /// Name or id.
    pub network: String,
    /// Where the interface goes.
    pub netns: NetnsRef,
    /// These addresses and no others; one an address family.
    #[serde(default)]
    pub addresses: Vec<IpAddr>,
    /// This MAC address; nothing: one made from the address.
    #[serde(default)]
    pub mac: Option<Mac>,
    /// The interface's name; nothing: the first free one of eth0, eth1, ...
    #[serde(default)]
    pub ifname: Option<String>,
    /// More names.
    #[serde(default)]
    pub aliases: Vec<String>,
    /// The Kubernetes namespace; nothing: `default`.
    #[serde(default)]
    pub namespace: Option<String>,
    /// What selectors match.
    #[serde(default)]
    pub labels: BTreeMap<String, String>,
    /// Ports of this host that lead to it.
    #[serde(default)]
    pub publish: Vec<Publish>,
    /// Services send it nothing before [`Request::EndpointReady`].
    #[serde(default)]
    pub not_ready: bool,
}

/// A DNS query that is only thought of.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DnsQuestion {
    /// The name that is asked for.
    pub name: String,
    /// `A`, `AAAA`, `PTR` and so on, or `TYPE` with a number.
    pub kind: String,
    /// The endpoint of this host that asks; nothing: the host itself.
    #[serde(default)]
    pub from: Option<String>,
    /// Of that endpoint, where its name is on several networks.
    #[serde(default)]
    pub network: Option<String>,
}

/// A network namespace.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum NetnsRef {
    /// A file such as `/run/netns/blue`.
    Path(PathBuf),
    /// That of a process, by its id as ovld sees it.
    Pid(u32),
}
