//! Parses the calls of a container runtime.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::path::PathBuf;

use ipnet::IpNet;
use ovl_control::{CNI_VERSIONS, CniCall, CniCommand, CniError, PodRef};
use ovl_proto::bandwidth::Bandwidth;
use ovl_proto::id::{Mac, NodeId};
use ovl_proto::publish::Publish;
use ring::digest::{SHA256, digest};
use serde_json::{Map, Value};

use super::args::{MAX_NAME, is_identifier, is_identifier_char, wishes};
use super::value::{list, wrong};
use super::{Attachment, Version, code, error};

/// A parsed call.
#[derive(Debug, PartialEq)]
pub enum Call {
    /// Creates an attachment.
    Add(Box<Add>),
    /// Deletes an attachment.
    Del(Attachment),
    /// Compares an attachment with the one that was created.
    Check(Box<Check>),
    /// Deletes all attachments of a network that are not in a list.
    Gc(Gc),
    /// Checks whether an attachment could be created.
    Status(Status),
}

impl Call {
    /// Returns the command, as `CNI_COMMAND` has it.
    pub fn command(&self) -> &'static str {
        match self {
            Self::Add(_) => "ADD",
            Self::Del(_) => "DEL",
            Self::Check(_) => "CHECK",
            Self::Gc(_) => "GC",
            Self::Status(_) => "STATUS",
        }
    }
}

/// A request to create an attachment.
#[derive(Debug, PartialEq)]
pub struct Add {
    /// The version of the result.
    pub version: Version,
    /// The key of the attachment.
    pub attachment: Attachment,
    /// The container's namespace.
    pub netns: PathBuf,
    /// The network's name or id.
    pub network: String,
    /// More networks of the container, each with the name of the interface on it.
    pub more: Vec<(String, String)>,
    /// The endpoint's name, unless it is taken: then [`Add::other_name`].
    pub name: String,
    /// The Kubernetes namespace.
    pub namespace: Option<String>,
    /// The pod. `None` if the runtime names none, or not by a valid name.
    pub pod: Option<PodRef>,
    /// The requested addresses. Empty: any.
    pub addresses: Vec<IpAddr>,
    /// The requested MAC address.
    pub mac: Option<Mac>,
    /// Prefixes that it may send from, beside its own addresses.
    pub allowed: Vec<IpNet>,
    /// MAC addresses that it may send from, beside its own.
    pub allowed_macs: Vec<Mac>,
    /// The ports to publish.
    pub publish: Vec<Publish>,
    /// The limits of its traffic.
    pub bandwidth: Bandwidth,
    /// The endpoint's labels.
    pub labels: BTreeMap<String, String>,
    /// The DNS configuration for the result.
    pub dns: Map<String, Value>,
    /// The result of the plugins earlier in the chain.
    pub previous: Option<Map<String, Value>>,
}

/// A request to check an attachment.
#[derive(Debug, PartialEq)]
pub struct Check {
    /// The key of the attachment.
    pub attachment: Attachment,
    /// The container's namespace.
    pub netns: PathBuf,
    /// The result of the whole chain.
    pub previous: Map<String, Value>,
}

/// A request to delete all attachments but those listed.
#[derive(Debug, PartialEq)]
pub struct Gc {
    /// The name of the configuration.
    pub network: String,
    /// The attachments to keep: container ids and interface names.
    pub valid: BTreeSet<(String, String)>,
}

/// A request for the status of a network.
#[derive(Debug, PartialEq, Eq)]
pub struct Status {
    /// The network's name or id.
    pub network: String,
}

impl Gc {
    /// Whether the runtime keeps an attachment.
    pub fn keeps(&self, attachment: &Attachment) -> bool {
        self.valid.iter().any(|(id, ifname)| (id, ifname) == (&attachment.container_id, &attachment.ifname))
    }
}

impl Add {
    /// Returns a name that no other attachment requests, on this host or another.
    pub fn other_name(&self, host: NodeId) -> String {
        distinct(&self.name, &self.attachment, &host.to_string())
    }
}

/// Parses a call. Unknown keys of the configuration are ignored.
///
/// # Errors
///
/// If the configuration or an environment variable is invalid.
pub fn parse(call: &CniCall) -> Result<Call, CniError> {
    let Value::Object(config) = &call.config else {
        return Err(error(code::DECODE, "the network configuration is not a JSON object", ""));
    };
    // Deletions validate only what they need: they must succeed even if the configuration has become invalid. A DEL
    // prints no result, so even its version does not matter.
    if call.command == CniCommand::Del {
        return Ok(Call::Del(attachment(call, name(config)?)?));
    }
    let version = version(config, call.command)?;
    let name = name(config)?;
    if call.command == CniCommand::Gc {
        return gc(config, name);
    }
    let network = network(config, name)?;
    refuse_ipam(config)?;
    let netns = || match call.netns.as_str() {
        "" => Err(missing("CNI_NETNS", "the path of the container's network namespace")),
        path => Ok(PathBuf::from(path)),
    };
    let previous = match config.get("prevResult") {
        None | Some(Value::Null) => None,
        Some(Value::Object(result)) => Some(result.clone()),
        Some(_) => return Err(wrong("prevResult", "an object")),
    };
    if call.command == CniCommand::Status {
        return Ok(Call::Status(Status { network }));
    }
    let attachment = attachment(call, name)?;
    let netns = netns()?;
    if call.command == CniCommand::Check {
        let previous = previous.ok_or_else(|| {
            error(code::CONFIG, "prevResult is missing", "a CHECK compares with the result of the ADD")
        })?;
        return Ok(Call::Check(Box::new(Check { attachment, netns, previous })));
    }
    let wishes = wishes(&call.args, config)?;
    let dns = match (wishes.dns, config.get("dns")) {
        (Some(dns), _) => dns,
        (None, None | Some(Value::Null)) => Map::new(),
        (None, Some(Value::Object(dns))) => dns.clone(),
        (None, Some(_)) => return Err(wrong("dns", "an object")),
    };
    let allowed = list("moreNetworks", config.get("moreNetworks"))?;
    for (network, ifname) in &wishes.networks {
        if *ifname == attachment.ifname {
            let details = format!(
                "the annotation ovl.networks names {ifname}, which is the interface on {}",
                attachment.network
            );
            return Err(error(code::CONFIG, "invalid annotation", details));
        }
        // A right to create pods is not one to join every network.
        if !allowed.iter().any(|one| one == network) {
            let details = format!(
                "the annotation ovl.networks names the network {network}, which the key `moreNetworks` of the configuration \
                 does not list"
            );
            return Err(error(code::CONFIG, "pods may not choose this network", details));
        }
    }
    let name = match &wishes.pod {
        Some(pod) => endpoint_name(pod, &attachment),
        None => attachment.container_id.chars().take(12).collect(),
    };
    Ok(Call::Add(Box::new(Add {
        version,
        netns,
        network,
        more: wishes.networks,
        name,
        namespace: wishes.namespace,
        pod: wishes.pod.filter(|pod| is_identifier(pod)).map(|name| PodRef { name, uid: wishes.uid }),
        addresses: wishes.addresses,
        mac: wishes.mac,
        allowed: wishes.allowed,
        allowed_macs: wishes.allowed_macs,
        publish: wishes.publish,
        bandwidth: wishes.bandwidth,
        labels: wishes.labels,
        dns,
        previous,
        attachment,
    })))
}

fn version(config: &Map<String, Value>, command: CniCommand) -> Result<Version, CniError> {
    let supported = CNI_VERSIONS.join(", ");
    let text = match config.get("cniVersion") {
        // The version of configurations without the key.
        None => "0.1.0",
        Some(Value::String(text)) => text,
        Some(_) => return Err(wrong("cniVersion", "text")),
    };
    let version = Version::parse(text).ok_or_else(|| {
        error(
            code::VERSION,
            format!("CNI version {text} is not supported"),
            format!("ovl-cni supports {supported}: set `cniVersion` in the configuration to one of them"),
        )
    })?;
    let (name, since) = match command {
        CniCommand::Add | CniCommand::Del => return Ok(version),
        CniCommand::Check => ("CHECK", Version::V0_4_0),
        CniCommand::Gc => ("GC", Version::V1_1_0),
        CniCommand::Status => ("STATUS", Version::V1_1_0),
    };
    if version >= since {
        return Ok(version);
    }
    Err(error(
        code::VERSION,
        format!("CNI version {text} has no {name}"),
        format!("it needs version {}: set `cniVersion` in the configuration", since.as_str()),
    ))
}

/// Returns the name of the configuration.
fn name(config: &Map<String, Value>) -> Result<&str, CniError> {
    match config.get("name") {
        Some(Value::String(name)) if is_identifier(name) => Ok(name),
        Some(_) => {
            Err(wrong("name", "letters, digits, '-', '_' and '.', at most 253, a letter or digit first"))
        }
        None => Err(wrong("name", "set")),
    }
}

/// Returns the name or id of the network.
fn network(config: &Map<String, Value>, name: &str) -> Result<String, CniError> {
    match config.get("network") {
        None | Some(Value::Null) => Ok(name.to_owned()),
        Some(Value::String(network)) if !network.is_empty() => Ok(network.clone()),
        Some(_) => Err(wrong("network", "the name of a network, see `ovlctl network ls`")),
    }
}

fn refuse_ipam(config: &Map<String, Value>) -> Result<(), CniError> {
    match config.get("ipam") {
        None | Some(Value::Null) => Ok(()),
        Some(Value::Object(ipam)) if ipam.is_empty() => Ok(()),
        Some(_) => Err(error(
            code::UNSUPPORTED,
            "ovl-cni does not support `ipam`",
            "ovl itself allocates the addresses from the network's subnets, see `ovlctl network inspect`: remove the \
             key from the configuration",
        )),
    }
}

fn attachment(call: &CniCall, name: &str) -> Result<Attachment, CniError> {
    let attachment = Attachment {
        network: name.to_owned(),
        container_id: call.container_id.clone(),
        ifname: call.ifname.clone(),
    };
    if attachment.container_id.is_empty() {
        return Err(missing("CNI_CONTAINERID", "the container's id"));
    }
    if !is_identifier(&attachment.container_id) {
        return Err(bad(
            "CNI_CONTAINERID",
            &attachment.container_id,
            "letters, digits, '-', '_' and '.', at most 253, a letter or digit first",
        ));
    }
    if attachment.ifname.is_empty() {
        return Err(missing("CNI_IFNAME", "the name of the interface in the container"));
    }
    if !is_ifname(&attachment.ifname) {
        return Err(bad(
            "CNI_IFNAME",
            &attachment.ifname,
            "at most 15 bytes without spaces, slashes, colons and percent signs",
        ));
    }
    Ok(attachment)
}

fn gc(config: &Map<String, Value>, name: &str) -> Result<Call, CniError> {
    const KEY: &str = "cni.dev/valid-attachments";
    // The specification's code used the second key for a while.
    let Some(given) = config.get(KEY).or_else(|| config.get("cni.dev/attachments")) else {
        return Err(error(
            code::CONFIG,
            format!("`{KEY}` is missing"),
            "a GC without it would detach every container; an empty list does that",
        ));
    };
    let mut valid = BTreeSet::new();
    for attachment in list(KEY, Some(given))? {
        match (attachment["containerID"].as_str(), attachment["ifname"].as_str()) {
            (Some(id), Some(ifname)) => valid.insert((id.to_owned(), ifname.to_owned())),
            // An invalid list must not detach any container.
            _ => return Err(wrong(KEY, r#"a list of {"containerID": "...", "ifname": "..."}"#)),
        };
    }
    Ok(Call::Gc(Gc { network: name.to_owned(), valid }))
}

/// Returns the endpoint name for a pod: the pod's name, if necessary with its invalid characters replaced.
fn endpoint_name(pod: &str, attachment: &Attachment) -> String {
    if is_identifier(pod) {
        return pod.to_owned();
    }
    let fitting = |c: char| if is_identifier_char(c) { c } else { '-' };
    let name: String = pod.chars().map(fitting).skip_while(|c| !c.is_ascii_alphanumeric()).collect();
    distinct(if name.is_empty() { "pod" } else { &name }, attachment, "")
}

/// Appends digits to a name that are unique to the attachment. `host` makes them unique among hosts, since
/// containers of several hosts may have the same id.
fn distinct(name: &str, attachment: &Attachment, host: &str) -> String {
    let Attachment { network, container_id, ifname } = attachment;
    let hash = digest(&SHA256, format!("{container_id}/{ifname}/{network}/{host}").as_bytes());
    let digits: String = hash.as_ref().iter().take(5).map(|byte| format!("{byte:02x}")).collect();
    let room = MAX_NAME - digits.len() - 1;
    format!("{}-{digits}", name.chars().take(room).collect::<String>())
}

fn is_ifname(text: &str) -> bool {
    text.len() <= 15
        && !matches!(text, "." | "..")
        && !text.contains(|c: char| matches!(c, '/' | ':' | '%') || c.is_whitespace() || c.is_control())
}

fn missing(variable: &str, what: &str) -> CniError {
    error(code::ENVIRONMENT, format!("{variable} is not set"), format!("it is {what}"))
}

fn bad(variable: &str, value: &str, wanted: &str) -> CniError {
    error(code::ENVIRONMENT, format!("{variable} is {value:?}"), format!("it must be {wanted}"))
}
