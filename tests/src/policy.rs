//! Helpers for tests of network policies: nine pods in three namespaces that all probe each other, and a reference
//! evaluation of the policies that shares no code with ovl.

mod probe;
mod reference;

use std::collections::BTreeMap;
use std::fs;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use netns_lab::{EchoServer, Host, Lab, LabConfig, wait_until};
use serde_json::{Value, json};

use crate::routed::create_routed_network;
use crate::{Attached, SOON, create_network, sctp, start_lab_with};

pub use probe::{PORTS, Probe, Proto, Reached};
pub use reference::Reference;

/// A policy for the endpoints `app=web` that lets only `app=api` connect, to port 80.
pub const ONLY_API: &str = "apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata:
  name: only-api
  namespace: default
spec:
  podSelector:
    matchLabels:
      app: web
  policyTypes:
  - Ingress
  ingress:
  - from:
    - podSelector:
        matchLabels:
          app: api
    ports:
    - protocol: TCP
      port: 80
";

/// How long to wait until all hosts enforce a manifest. Each round of probes takes a second, because refused probes
/// time out.
const SETTLE_TIMEOUT: Duration = Duration::from_secs(60);

/// Name of a pod's port, such as `serve-80-tcp`.
pub fn port_name(port: u16, proto: Proto) -> String {
    format!("serve-{port}-{}", proto.name())
}

/// One of the pods.
#[derive(Debug, Clone)]
pub struct Pod {
    /// `x`, `y` or `z`.
    pub namespace: String,
    /// `a`, `b` or `c`.
    pub name: String,
    /// Labels, which selectors match.
    pub labels: BTreeMap<String, String>,
    /// Its endpoint.
    pub attached: Attached,
}

impl Pod {
    /// Namespace and name, such as `x/a`.
    pub fn full_name(&self) -> String {
        format!("{}/{}", self.namespace, self.name)
    }

    /// Its address of a family.
    pub fn address(&self, v4: bool) -> Option<String> {
        self.attached.addresses().into_iter().find(|address| address.contains('.') == v4)
    }
}

/// Three hosts, a network, and the pods on it, all listening.
#[derive(Debug)]
pub struct PolicyLab {
    /// The pods, which are dropped before the lab.
    pub pods: Vec<Pod>,
    servers: BTreeMap<String, (Vec<EchoServer>, sctp::Server)>,
    reference: Reference,
    /// The lab.
    pub lab: Lab,
}

const SUBNETS: &[&str] = &["--subnet", "10.60.0.0/16", "--subnet", "fd60::/48"];
const FLAT_SUBNETS: &[&str] = &["--subnet", "10.60.0.0/16", "--subnet", "fd60::/64"];

impl PolicyLab {
    /// Creates a lab with a routed (`l3`) or switched (`l2`) network, with these arguments beside its subnets.
    pub fn new(mode: &str, more: &[&str]) -> Result<Self> {
        let lab = start_lab_with(LabConfig::hosts(3))?;
        match mode {
            "l3" => create_routed_network(&lab, "pods", &[SUBNETS, more].concat())?,
            _ => create_network(&lab, "pods", &[FLAT_SUBNETS, more].concat())?,
        }
        let mut world =
            Self { pods: Vec::new(), servers: BTreeMap::new(), reference: Reference::default(), lab };
        let namespaces = ["x", "y", "z"];
        let objects: Vec<Value> = namespaces.iter().map(|name| namespace(name, &[("ns", name)])).collect();
        world.apply(&objects)?;
        for (number, namespace) in namespaces.iter().enumerate() {
            for (other, name) in ["a", "b", "c"].iter().enumerate() {
                // Each namespace has pods on all hosts, and each host has pods of all namespaces.
                let host = world.lab.hosts()[(number + other) % 3].clone();
                world.add(&host, namespace, name)?;
            }
        }
        Ok(world)
    }

    /// Attaches a pod that listens on all ports, and applies its v1 Pod.
    pub fn add(&mut self, host: &Host, namespace: &str, name: &str) -> Result<()> {
        let workload = host.workload(&format!("{namespace}{name}"))?;
        let (key, label) = (format!("{namespace}/{name}"), format!("pod={name}"));
        let mut servers = Vec::new();
        for port in PORTS {
            servers.extend([workload.tcp_echo(port)?, workload.udp_echo(port)?]);
        }
        self.servers.insert(key, (servers, sctp::Server::start(&workload, &PORTS)?));
        let args =
            ["attach", name, "--namespace", namespace, "--network", "pods", "--label", &label, "--netns"];
        let json = host.ctl_json(&[&args[..], &[workload.path_str()]].concat())?;
        let attached = Attached { workload, name: name.to_owned(), json };
        let labels = BTreeMap::from([("pod".to_owned(), name.to_owned())]);
        self.apply(&[pod(namespace, name, &labels)])?;
        self.pods.push(Pod { namespace: namespace.to_owned(), name: name.to_owned(), labels, attached });
        Ok(())
    }

    /// Deletes and detaches a pod, and deletes its network namespace.
    pub fn remove(&mut self, namespace: &str, name: &str) -> Result<()> {
        let position = self.pods.iter().position(|pod| (&*pod.namespace, &*pod.name) == (namespace, name));
        let pod = self.pods.remove(position.context("no such pod")?);
        self.servers.remove(&pod.full_name());
        self.delete("pod", namespace, name)?;
        pod.attached.workload.host().ctl_ok(&["detach", name, "--namespace", namespace])?;
        pod.attached.workload.clone().destroy()
    }

    /// Looks a pod up.
    pub fn pod(&self, namespace: &str, name: &str) -> Result<&Pod> {
        let found = self.pods.iter().find(|pod| (&*pod.namespace, &*pod.name) == (namespace, name));
        found.with_context(|| format!("no pod {namespace}/{name}"))
    }

    /// Replaces the labels of a pod.
    pub fn relabel(&mut self, namespace: &str, name: &str, labels: &[(&str, &str)]) -> Result<()> {
        let labels: BTreeMap<String, String> =
            labels.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect();
        self.apply(&[pod(namespace, name, &labels)])?;
        let found = self.pods.iter_mut().find(|pod| (&*pod.namespace, &*pod.name) == (namespace, name));
        found.with_context(|| format!("no pod {namespace}/{name}"))?.labels = labels;
        Ok(())
    }

    /// Applies manifests on the first running host.
    pub fn apply(&mut self, objects: &[Value]) -> Result<()> {
        self.reference.apply(objects);
        let texts: Vec<String> = objects.iter().map(Value::to_string).collect();
        let file = self.lab.dir().join("manifest.yaml");
        fs::write(&file, texts.join("\n---\n"))?;
        self.host()?.ctl_ok(&["apply", "-f", &file.to_string_lossy()]).map(drop)
    }

    /// Deletes an object.
    pub fn delete(&mut self, kind: &str, namespace: &str, name: &str) -> Result<()> {
        self.reference.delete(kind, namespace, name);
        self.host()?.ctl_ok(&["delete", kind, name, "-n", namespace]).map(drop)
    }

    fn host(&self) -> Result<&Host> {
        self.lab.hosts().iter().find(|host| host.is_running()).context("no daemon runs")
    }

    /// Waits until every pod reaches exactly the pods and ports that the reference allows, over TCP, UDP and SCTP, IPv4
    /// and IPv6.
    pub fn wait_settled(&self, what: &str) -> Result<()> {
        let expected = self.reference.expected(&self.pods);
        wait_until(SETTLE_TIMEOUT, what, || {
            let reached = probe::all(&self.pods)?;
            let wrong = reached.differences(&expected);
            ensure!(wrong.is_empty(), "{} of {}: {}", wrong.len(), expected.len(), wrong.join(", "));
            Ok(())
        })
    }
}

/// Returns a v1 Namespace.
pub fn namespace(name: &str, labels: &[(&str, &str)]) -> Value {
    let labels: BTreeMap<&str, &str> = labels.iter().copied().collect();
    json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name, "labels": labels}})
}

/// Returns a v1 Pod with named ports.
pub fn pod(namespace: &str, name: &str, labels: &BTreeMap<String, String>) -> Value {
    let ports: Vec<Value> = PORTS
        .iter()
        .flat_map(|port| {
            Proto::ALL.map(|proto| {
                let upper = proto.name().to_uppercase();
                json!({"name": port_name(*port, proto), "containerPort": port, "protocol": upper})
            })
        })
        .collect();
    json!({
        "apiVersion": "v1", "kind": "Pod",
        "metadata": {"namespace": namespace, "name": name, "labels": labels},
        "spec": {"containers": [{"name": "c", "ports": ports}]},
    })
}

/// Returns a NetworkPolicy.
pub fn policy(namespace: &str, name: &str, spec: Value) -> Value {
    json!({
        "apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy",
        "metadata": {"namespace": namespace, "name": name}, "spec": spec,
    })
}

/// Waits until a host enforces its policies: `ovlctl verify` finds no difference.
pub fn wait_enforced(host: &Host) -> Result<()> {
    crate::wait_clean(std::slice::from_ref(host), SOON)
}
