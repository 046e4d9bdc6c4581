//! A reference evaluation of network policies, which follows the Kubernetes documentation as simply as possible.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use ipnet::IpNet;
use serde_json::Value;

use super::{PORTS, Pod, Probe, Proto, Reached, port_name};
use crate::text;

/// The peers of ClusterNetworkPolicies that ovl acts on in any case.
const KNOWN_PEERS: [&str; 3] = ["namespaces", "networks", "pods"];

/// The policies, namespaces and nodes that were applied and not deleted.
#[derive(Debug, Clone, Default)]
pub struct Reference {
    policies: BTreeMap<(String, String), Value>,
    cluster: BTreeMap<String, Value>,
    namespaces: BTreeMap<String, Value>,
    nodes: BTreeMap<String, Value>,
}

fn key(object: &Value) -> (String, String) {
    (text(&object["metadata"]["namespace"]), text(&object["metadata"]["name"]))
}

impl Reference {
    /// Applies manifests.
    pub fn apply(&mut self, objects: &[Value]) {
        for object in objects {
            match object["kind"].as_str() {
                Some("NetworkPolicy") => drop(self.policies.insert(key(object), object["spec"].clone())),
                Some("ClusterNetworkPolicy") => {
                    drop(self.cluster.insert(key(object).1, object["spec"].clone()));
                }
                Some("Namespace") => {
                    drop(self.namespaces.insert(key(object).1, object["metadata"]["labels"].clone()));
                }
                Some("Node") => drop(self.nodes.insert(key(object).1, object.clone())),
                _ => {}
            }
        }
    }

    /// Deletes an object.
    pub fn delete(&mut self, kind: &str, namespace: &str, name: &str) {
        match kind {
            "networkpolicy" => drop(self.policies.remove(&(namespace.to_owned(), name.to_owned()))),
            "clusternetworkpolicy" => drop(self.cluster.remove(name)),
            "namespace" => drop(self.namespaces.remove(name)),
            "node" => drop(self.nodes.remove(name)),
            _ => {}
        }
    }

    /// All probes that should be answered.
    pub fn expected(&self, pods: &[Pod]) -> Reached {
        let mut all = BTreeSet::new();
        for from in pods {
            for to in pods.iter().filter(|to| to.full_name() != from.full_name()) {
                for (v4, proto, port) in attempts() {
                    if to.address(v4).is_some() && self.allows(from, to, v4, proto, port) {
                        all.insert(Probe { from: from.full_name(), to: to.full_name(), v4, proto, port });
                    }
                }
            }
        }
        Reached(all)
    }

    /// Whether the policies allow a connection.
    pub fn allows(&self, from: &Pod, to: &Pod, v4: bool, proto: Proto, port: u16) -> bool {
        let attempt = Attempt { v4, proto, port };
        self.side(from, to, "Egress", &attempt) && self.side(to, from, "Ingress", &attempt)
    }

    fn side(&self, own: &Pod, other: &Pod, direction: &str, attempt: &Attempt) -> bool {
        let (rules, peers) = if direction == "Egress" { ("egress", "to") } else { ("ingress", "from") };
        match self.tier("Admin", own, other, (rules, peers), attempt).as_deref() {
            Some("Accept") => return true,
            Some("Deny") => return false,
            _ => {}
        }
        let isolating: Vec<(&String, &Value)> = self
            .policies
            .iter()
            .filter(|((namespace, _), spec)| {
                *namespace == own.namespace
                    && selects(&spec["podSelector"], &own.labels)
                    && has_type(spec, direction)
            })
            .map(|((namespace, _), spec)| (namespace, spec))
            .collect();
        if isolating.is_empty() {
            let decided = self.tier("Baseline", own, other, (rules, peers), attempt);
            return decided.as_deref() != Some("Deny");
        }
        isolating.iter().any(|(namespace, spec)| {
            list(&spec[rules]).iter().any(|rule| {
                let peers = list(&rule[peers]);
                let ports = list(&rule["ports"]);
                (peers.is_empty()
                    || peers.iter().any(|peer| self.is_peer(peer, namespace, other, attempt.v4)))
                    && (ports.is_empty() || ports.iter().any(|port| attempt.is_at(port)))
            })
        })
    }

    /// Returns the action of the first rule of a tier that fits.
    fn tier(
        &self,
        tier: &str,
        own: &Pod,
        other: &Pod,
        (rules, peers): (&str, &str),
        attempt: &Attempt,
    ) -> Option<String> {
        let mut policies: Vec<&Value> = self.cluster.values().filter(|spec| spec["tier"] == tier).collect();
        policies.sort_by_key(|spec| spec["priority"].as_u64());
        let about = policies.into_iter().filter(|spec| self.is_of(&spec["subject"], own, attempt.v4));
        let mut all = about.flat_map(|spec| list(&spec[rules]));
        let fitting = all.find(|rule| {
            let protocols = list(&rule["protocols"]);
            // A peer that ovl does not act on fits, unless the rule accepts.
            let by_nodes = |peer: &Value| peer.get("nodes").is_some() && !self.nodes.is_empty();
            let is_known =
                |peer: &Value| by_nodes(peer) || KNOWN_PEERS.iter().any(|kind| peer.get(kind).is_some());
            let fits = |peer: &Value| match is_known(peer) {
                true => self.is_of(peer, other, attempt.v4),
                false => rule["action"] != "Accept",
            };
            list(&rule[peers]).iter().any(fits)
                && (protocols.is_empty() || protocols.iter().any(|protocol| attempt.is_of(protocol)))
        });
        fitting.map(|rule| text(&rule["action"]))
    }

    /// Whether a subject or peer of a ClusterNetworkPolicy is about a pod.
    fn is_of(&self, peer: &Value, pod: &Pod, v4: bool) -> bool {
        if let Some(networks) = peer.get("networks") {
            let address = pod.address(v4).and_then(|address| address.parse::<IpAddr>().ok());
            return list(networks).iter().any(|net| {
                let net = text(net).parse::<IpNet>();
                net.is_ok_and(|net| address.is_some_and(|address| net.contains(&address)))
            });
        }
        if let Some(selector) = peer.get("nodes") {
            let address = pod.address(v4);
            return self.nodes.values().any(|node| {
                let labels = node["metadata"]["labels"].as_object().into_iter().flatten();
                let labels = labels.map(|(key, value)| (key.clone(), text(value))).collect();
                let mut addresses = list(&node["status"]["addresses"]).iter();
                selects(selector, &labels) && addresses.any(|it| Some(text(&it["address"])) == address)
            });
        }
        if let Some(selector) = peer.get("namespaces") {
            return selects(selector, &self.namespace_labels(&pod.namespace));
        }
        let pods = &peer["pods"];
        selects(&pods["namespaceSelector"], &self.namespace_labels(&pod.namespace))
            && selects(&pods["podSelector"], &pod.labels)
    }

    fn namespace_labels(&self, namespace: &str) -> BTreeMap<String, String> {
        let labels = self.namespaces.get(namespace).and_then(Value::as_object);
        let labels = labels.into_iter().flatten().map(|(key, value)| (key.clone(), text(value)));
        labels.chain([("kubernetes.io/metadata.name".to_owned(), namespace.to_owned())]).collect()
    }

    fn is_peer(&self, peer: &Value, namespace: &str, pod: &Pod, v4: bool) -> bool {
        if let Some(block) = peer.get("ipBlock") {
            let Some(address) = pod.address(v4).and_then(|address| address.parse::<IpAddr>().ok()) else {
                return false;
            };
            let within = |net: &Value| text(net).parse::<IpNet>().is_ok_and(|net| net.contains(&address));
            return within(&block["cidr"]) && !list(&block["except"]).iter().any(within);
        }
        let namespace_fits = match peer.get("namespaceSelector") {
            None => pod.namespace == namespace,
            Some(selector) => selects(selector, &self.namespace_labels(&pod.namespace)),
        };
        namespace_fits && peer.get("podSelector").is_none_or(|selector| selects(selector, &pod.labels))
    }
}

struct Attempt {
    v4: bool,
    proto: Proto,
    port: u16,
}

impl Attempt {
    /// Whether a protocol of a ClusterNetworkPolicy fits.
    fn is_of(&self, protocol: &Value) -> bool {
        if let Some(name) = protocol.get("destinationNamedPort") {
            return *name == port_name(self.port, self.proto);
        }
        let Some(port) = protocol.get(self.proto.name()).map(|it| &it["destinationPort"]) else {
            return false;
        };
        match port.get("range") {
            Some(range) => {
                let end = |name: &str| range[name].as_u64().unwrap_or(0);
                (end("start")..=end("end")).contains(&u64::from(self.port))
            }
            None => port["number"] == self.port,
        }
    }

    fn is_at(&self, port: &Value) -> bool {
        let proto = port["protocol"].as_str().unwrap_or("TCP").to_lowercase();
        if proto != self.proto.name() {
            return false;
        }
        match &port["port"] {
            Value::Null => true,
            Value::String(name) => *name == port_name(self.port, self.proto),
            number => {
                let first = number.as_u64().unwrap_or(0);
                let last = port["endPort"].as_u64().unwrap_or(first);
                (first..=last).contains(&u64::from(self.port))
            }
        }
    }
}

fn attempts() -> Vec<(bool, Proto, u16)> {
    let mut all = Vec::new();
    for v4 in [true, false] {
        for proto in Proto::ALL {
            all.extend(PORTS.map(|port| (v4, proto, port)));
        }
    }
    all
}

fn list(value: &Value) -> &[Value] {
    value.as_array().map_or(&[], Vec::as_slice)
}

fn has_type(spec: &Value, direction: &str) -> bool {
    match spec.get("policyTypes") {
        Some(types) => list(types).iter().any(|each| each == direction),
        None => direction == "Ingress" || !list(&spec["egress"]).is_empty(),
    }
}

fn selects(selector: &Value, labels: &BTreeMap<String, String>) -> bool {
    let mut equal = selector["matchLabels"].as_object().into_iter().flatten();
    equal.all(|(key, value)| labels.get(key) == Some(&text(value)))
        && list(&selector["matchExpressions"]).iter().all(|requirement| {
            let value = labels.get(&text(&requirement["key"]));
            let among = || list(&requirement["values"]).iter().any(|each| Some(&text(each)) == value);
            match requirement["operator"].as_str() {
                Some("In") => among(),
                Some("NotIn") => !among(),
                Some("Exists") => value.is_some(),
                Some("DoesNotExist") => value.is_none(),
                _ => false,
            }
        })
}
