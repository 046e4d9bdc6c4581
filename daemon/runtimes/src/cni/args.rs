//! The options for one container, from all the places where runtimes put them: `CNI_ARGS`, `args.cni` and
//! `runtimeConfig`. A later place in this list takes precedence.

use std::collections::BTreeMap;
use std::net::IpAddr;

use ipnet::IpNet;
use ovl_control::CniError;
use ovl_proto::bandwidth::Bandwidth;
use ovl_proto::id::Mac;
use ovl_proto::publish::Publish;
use serde_json::{Map, Value};

use super::value::{environment, invalid, list, wrong};
use super::{bandwidth, ports};

/// The capability with the pod's annotations in containerd and CRI-O.
const ANNOTATIONS: &str = "io.kubernetes.cri.pod-annotations";
/// The annotation that labels the endpoint: `app=shop,tier=front`.
const LABELS: &str = "ovl.labels";
/// The annotation with more networks for the container: `blue,green@eth2`. An interface is `net1`, `net2` and so on by its
/// place in the list, if none is named.
const NETWORKS: &str = "ovl.networks";
/// How many more networks a container may have.
const MAX_NETWORKS: usize = 8;
/// The capability with what the endpoint may send from beside its own addresses: lists `addresses` and `macs`.
const ALLOWED: &str = "ovl.allowed";

/// The maximum length of a pod name in Kubernetes.
pub const MAX_NAME: usize = 253;

/// The options for a container.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Wishes {
    pub(super) addresses: Vec<IpAddr>,
    pub(super) mac: Option<Mac>,
    pub(super) allowed: Vec<IpNet>,
    pub(super) allowed_macs: Vec<Mac>,
    pub(super) pod: Option<String>,
    /// The pod's unique id. Empty: not given.
    pub(super) uid: String,
    pub(super) namespace: Option<String>,
    pub(super) labels: BTreeMap<String, String>,
    /// More networks, each with the name of the interface on it.
    pub(super) networks: Vec<(String, String)>,
    /// The ports to publish.
    pub(super) publish: Vec<Publish>,
    /// The limits of the container's traffic.
    pub(super) bandwidth: Bandwidth,
    /// Replaces the DNS configuration of the network configuration.
    pub(super) dns: Option<Map<String, Value>>,
}

/// Whether a text is an identifier of the specification of at most [`MAX_NAME`] bytes.
pub(super) fn is_identifier(text: &str) -> bool {
    text.len() <= MAX_NAME
        && text.starts_with(|c: char| c.is_ascii_alphanumeric())
        && text.chars().all(is_identifier_char)
}

pub(super) fn is_identifier_char(c: char) -> bool {
    c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.')
}

/// Reads the options from all places.
pub(super) fn wishes(args: &str, config: &Map<String, Value>) -> Result<Wishes, CniError> {
    let mut wishes = Wishes::default();
    wishes.read_environment(args)?;
    let part = |name: &str| match config.get(name) {
        None | Some(Value::Null) => Ok(None),
        Some(Value::Object(object)) => Ok(Some(object)),
        Some(_) => Err(wrong(name, "an object")),
    };
    if let Some(Value::Object(args)) = part("args")?.and_then(|args| args.get("cni")) {
        wishes.read_args(args)?;
    }
    if let Some(runtime) = part("runtimeConfig")? {
        wishes.read_runtime(runtime)?;
    }
    Ok(wishes)
}

impl Wishes {
    /// Reads `CNI_ARGS`: `KEY=VALUE;KEY=VALUE`. Unknown keys are an error unless `IgnoreUnknown` is set.
    fn read_environment(&mut self, args: &str) -> Result<(), CniError> {
        let (mut unknown, mut tolerated) = (Vec::new(), false);
        for pair in args.split(';').filter(|pair| !pair.is_empty()) {
            let Some((key, value)) = pair.split_once('=') else {
                return Err(environment(format!("CNI_ARGS: {pair:?} is not KEY=VALUE")));
            };
            let given = || (!value.is_empty()).then(|| value.to_owned());
            match key {
                "IgnoreUnknown" => {
                    tolerated = match value.to_ascii_lowercase().as_str() {
                        "1" | "t" | "true" => true,
                        "0" | "f" | "false" => false,
                        _ => {
                            return Err(environment(format!(
                                "CNI_ARGS: invalid value IgnoreUnknown={value}: expected 1 or 0"
                            )));
                        }
                    }
                }
                "IP" => {
                    self.addresses = value
                        .split(',')
                        .map(|text| address("CNI_ARGS: IP", text))
                        .collect::<Result<_, _>>()?
                }
                "MAC" => self.mac = Some(mac("CNI_ARGS: MAC", value)?),
                "K8S_POD_NAME" => self.pod = given(),
                "K8S_POD_NAMESPACE" => self.namespace = given(),
                "K8S_POD_UID" if value.is_empty() || is_identifier(value) => value.clone_into(&mut self.uid),
                "K8S_POD_UID" => {
                    return Err(environment(format!(
                        "CNI_ARGS: K8S_POD_UID: {value:?} is not a unique id: letters, digits, '-', '_' and '.', at \
                         most 253, a letter or digit first"
                    )));
                }
                "K8S_POD_INFRA_CONTAINER_ID" => {}
                other => unknown.push(other),
            }
        }
        if unknown.is_empty() || tolerated {
            return Ok(());
        }
        Err(environment(format!(
            "CNI_ARGS: {} unknown to ovl-cni; IgnoreUnknown=1 makes it ignore unknown keys",
            match unknown.as_slice() {
                [one] => format!("{one} is"),
                many => format!("{} are", many.join(", ")),
            }
        )))
    }

    /// Reads `args.cni`, as the conventions of the specification define it for all plugins.
    fn read_args(&mut self, args: &Map<String, Value>) -> Result<(), CniError> {
        self.read_addresses("args.cni", args)?;
        for label in list("args.cni.labels", args.get("labels"))? {
            match (label["key"].as_str(), label["value"].as_str()) {
                (Some(key), Some(value)) if !key.is_empty() => {
                    self.labels.insert(key.to_owned(), value.to_owned());
                }
                _ => return Err(wrong("args.cni.labels", r#"a list of {"key": "app", "value": "shop"}"#)),
            }
        }
        Ok(())
    }

    fn read_runtime(&mut self, runtime: &Map<String, Value>) -> Result<(), CniError> {
        self.read_addresses("runtimeConfig", runtime)?;
        self.publish = ports::published(runtime.get("portMappings"))?;
        self.bandwidth = bandwidth::limits(runtime.get("bandwidth"))?;
        self.dns = match runtime.get("dns") {
            None | Some(Value::Null) => None,
            Some(Value::Object(dns)) => Some(runtime_dns(dns)?),
            Some(_) => return Err(wrong("runtimeConfig.dns", "an object")),
        };
        match runtime.get(ALLOWED) {
            None | Some(Value::Null) => {}
            Some(Value::Object(allowed)) => self.read_allowed(allowed)?,
            Some(_) => return Err(wrong(&format!("runtimeConfig.{ALLOWED}"), "an object")),
        }
        match runtime.get(ANNOTATIONS) {
            None | Some(Value::Null) => Ok(()),
            Some(Value::Object(annotations)) => {
                let text = |name: &str| match annotations.get(name) {
                    None => Ok(""),
                    Some(Value::String(text)) => Ok(text.as_str()),
                    Some(_) => Err(wrong(&format!("the annotation {name}"), "text")),
                };
                self.read_labels(text(LABELS)?)?;
                self.read_networks(text(NETWORKS)?)
            }
            Some(_) => Err(wrong(&format!("runtimeConfig.{ANNOTATIONS}"), "an object")),
        }
    }

    fn read_allowed(&mut self, allowed: &Map<String, Value>) -> Result<(), CniError> {
        let (addresses, macs) =
            (format!("runtimeConfig.{ALLOWED}.addresses"), format!("runtimeConfig.{ALLOWED}.macs"));
        for value in list(&addresses, allowed.get("addresses"))? {
            let text = value.as_str().ok_or_else(|| wrong(&addresses, "a list of texts"))?;
            let parsed = text.parse().ok().or_else(|| text.parse::<IpAddr>().ok().map(IpNet::from));
            let prefix = parsed.filter(|prefix: &IpNet| prefix.addr() == prefix.network());
            self.allowed.push(
                prefix
                    .ok_or_else(|| invalid(&addresses, format!("{addresses}: {text:?} is not a prefix")))?,
            );
        }
        for value in list(&macs, allowed.get("macs"))? {
            let text = value.as_str().ok_or_else(|| wrong(&macs, "a list of texts"))?;
            self.allowed_macs.push(mac(&macs, text)?);
        }
        Ok(())
    }

    fn read_addresses(&mut self, place: &str, from: &Map<String, Value>) -> Result<(), CniError> {
        let name = format!("{place}.ips");
        let ips = list(&name, from.get("ips"))?;
        if !ips.is_empty() {
            let parse = |value: &Value| match value.as_str() {
                Some(text) => address(&name, text),
                None => Err(wrong(&name, "a list of texts")),
            };
            self.addresses = ips.iter().map(parse).collect::<Result<_, _>>()?;
        }
        match from.get("mac") {
            None | Some(Value::Null) => {}
            Some(Value::String(text)) if text.is_empty() => {}
            Some(Value::String(text)) => self.mac = Some(mac(&format!("{place}.mac"), text)?),
            Some(_) => return Err(wrong(&format!("{place}.mac"), "text")),
        }
        Ok(())
    }

    fn read_networks(&mut self, text: &str) -> Result<(), CniError> {
        let place = format!("the annotation {NETWORKS}");
        for (n, item) in text.split(',').map(str::trim).filter(|item| !item.is_empty()).enumerate() {
            let (network, ifname) = match item.split_once('@') {
                Some((network, ifname)) => (network, ifname.to_owned()),
                None => (item, format!("net{}", n + 1)),
            };
            if network.is_empty() || !is_interface(&ifname) {
                return Err(wrong(&place, "a list like blue,green@eth2"));
            }
            if n >= MAX_NETWORKS {
                return Err(invalid(&place, format!("{place} names more than {MAX_NETWORKS} networks")));
            }
            if self.networks.iter().any(|(_, other)| *other == ifname) {
                return Err(invalid(&place, format!("{place} names the interface {ifname} twice")));
            }
            self.networks.push((network.to_owned(), ifname));
        }
        Ok(())
    }

    fn read_labels(&mut self, text: &str) -> Result<(), CniError> {
        for pair in text.split(',').map(str::trim).filter(|pair| !pair.is_empty()) {
            match pair.split_once('=') {
                Some((key, value)) if !key.is_empty() => {
                    self.labels.insert(key.to_owned(), value.to_owned());
                }
                _ => {
                    return Err(wrong(
                        &format!("the annotation {LABELS}"),
                        "a list like app=shop,tier=front",
                    ));
                }
            }
        }
        Ok(())
    }
}

/// Whether a text can be the name of an interface beside those that every container has.
fn is_interface(text: &str) -> bool {
    let is_allowed = |c: char| c.is_ascii_graphic() && !matches!(c, '/' | ':' | '%');
    (1..=15).contains(&text.len()) && text.chars().all(is_allowed) && !matches!(text, "." | ".." | "lo")
}

/// Translates the `dns` capability, whose keys differ from `nameservers` and `search` in a result.
fn runtime_dns(dns: &Map<String, Value>) -> Result<Map<String, Value>, CniError> {
    let mut result = Map::new();
    for (from, to) in [("servers", "nameservers"), ("searches", "search"), ("options", "options")] {
        let name = format!("runtimeConfig.dns.{from}");
        let values = list(&name, dns.get(from))?;
        if values.iter().any(|value| !value.is_string()) {
            return Err(wrong(&name, "a list of texts"));
        }
        if !values.is_empty() {
            result.insert(to.to_owned(), values.to_vec().into());
        }
    }
    Ok(result)
}

/// Parses an address. A prefix length is ignored, because the network defines it.
fn address(place: &str, text: &str) -> Result<IpAddr, CniError> {
    let text = text.trim();
    let parsed = text.parse().ok().or_else(|| text.parse::<IpNet>().ok().map(|net| net.addr()));
    parsed.ok_or_else(|| invalid(place, format!("{place}: {text:?} is not an address")))
}

fn mac(place: &str, text: &str) -> Result<Mac, CniError> {
    // Docker and Podman also accept the other forms of Go's net.ParseMAC.
    let parsed: Option<Mac> = text.replace('-', ":").parse().ok();
    parsed
        .filter(|mac| mac.is_unicast())
        .ok_or_else(|| invalid(place, format!("{place}: {text:?} is not a unicast MAC address")))
}
