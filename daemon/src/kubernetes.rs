//! What this host knows from a Kubernetes API server: the pods of its node, whether its `ovl-kube` reaches the server and
//! whether it is this host's turn to mirror the server's objects, and what could not be mirrored.
//!
//! [`Kubernetes`] owns that. What is decided about one object is in free functions: [`judge`], [`closed::stand_in`]. Begin to read at
//! [`judge`].

pub(crate) mod closed;

use std::collections::{BTreeMap, BTreeSet};

use ipnet::IpNet;
use ovl_cluster::objects::Stored;
use ovl_control::{ApiReport, BalancedService, DeletedPod, MirrorOffer, NotMirrored};
use ovl_proto::id::NodeId;
use ovl_proto::resource::{Kind, Name, Pod, ResourceKey, Service, ServiceType, Source};
use ovl_proto::table::Endpoint;
use serde_json::Value;
use tokio::sync::watch;

/// How many blocks a Node has at most: one of each family.
const MOST_BLOCKS: usize = 2;
/// How many pods of the node are known at most: no node runs as many.
const MOST_PODS: usize = 4096;
/// How many objects are reported at most that are not in force as the API server has them.
const MOST_FAILURES: usize = 200;

/// What is known of a pod of this node.
#[derive(Debug, Clone, PartialEq, Eq)]
struct KnownPod {
    uid: String,
    /// The pod as the API server has it. `None` if it cannot be read, so nothing may be concluded from its labels.
    pod: Option<Box<Pod>>,
}

/// What this host knows from a Kubernetes API server.
#[derive(Debug)]
pub(crate) struct Kubernetes {
    pods: BTreeMap<Name, KnownPod>,
    /// What each connected `ovl-kube` says of itself, by a number of this run.
    offers: BTreeMap<u64, MirrorOffer>,
    next: u64,
    turn: watch::Sender<bool>,
    /// Why objects are not in force as the API server has them, at most [`MOST_FAILURES`].
    failures: BTreeMap<ResourceKey, String>,
    /// What is to be said to the API server.
    report: watch::Sender<ApiReport>,
    /// The names of the Nodes that the API server has. `None` if they are not known, or if it is not this host's turn.
    nodes: Option<BTreeSet<String>>,
    /// The blocks that the API server gives to pods of this host. `None`: it has not said yet.
    pod_cidrs: watch::Sender<Option<Vec<IpNet>>>,
}

impl Default for Kubernetes {
    fn default() -> Self {
        Self {
            pods: BTreeMap::new(),
            offers: BTreeMap::new(),
            next: 0,
            turn: watch::Sender::new(false),
            failures: BTreeMap::new(),
            report: watch::Sender::default(),
            nodes: None,
            pod_cidrs: watch::Sender::new(None),
        }
    }
}

impl Kubernetes {
    /// Records that an `ovl-kube` is connected. Returns the number of its connection, and whether it is this host's turn.
    pub(crate) fn begin(&mut self, offer: MirrorOffer) -> (u64, watch::Receiver<bool>) {
        self.next = self.next.wrapping_add(1);
        self.offers.insert(self.next, offer);
        (self.next, self.turn.subscribe())
    }

    /// Records that an `ovl-kube` is no longer connected.
    pub(crate) fn end(&mut self, connection: u64) {
        self.offers.remove(&connection);
    }

    /// Whether a connected `ovl-kube` reaches the API server.
    pub(crate) fn reaches(&self) -> bool {
        self.offers.values().any(|offer| offer.unreachable.is_none())
    }

    /// Returns why the API server is not reached. `None` if it is, or if no `ovl-kube` is connected.
    pub(crate) fn unreachable(&self) -> Option<&str> {
        let mut all = self.offers.values().filter_map(|offer| offer.unreachable.as_deref());
        all.next_back().filter(|_| !self.reaches())
    }

    /// Returns what a connected `ovl-kube` cannot follow although it reaches the API server.
    pub(crate) fn trouble(&self) -> Option<&str> {
        self.offers.values().filter_map(|offer| offer.trouble.as_deref()).next_back()
    }

    /// Whether it is this host's turn to mirror.
    pub(crate) fn acts(&self) -> bool {
        *self.turn.borrow()
    }

    /// Sets whether it is this host's turn to mirror. Returns whether that is new. The host
    /// that mirrors knows what is not in force, so failures about objects of the cluster end with the turn.
    pub(crate) fn set_turn(&mut self, acts: bool) -> bool {
        let is_new = self.turn.send_if_modified(|turn| std::mem::replace(turn, acts) != acts);
        if is_new && !acts {
            self.failures.retain(|key, _| key.kind == Kind::Pod);
            self.nodes = None;
        }
        is_new
    }

    /// Sets the blocks that the API server gives to pods of this host.
    pub(crate) fn set_pod_cidrs(&mut self, blocks: Vec<IpNet>) {
        self.pod_cidrs
            .send_replace(Some(blocks.into_iter().map(|block| block.trunc()).take(MOST_BLOCKS).collect()));
    }

    /// Returns the blocks that the API server gives to pods of this host, now and later.
    pub(crate) fn pod_cidrs(&self) -> watch::Receiver<Option<Vec<IpNet>>> {
        self.pod_cidrs.subscribe()
    }

    /// Sets the names of the Nodes that the API server has.
    pub(crate) fn set_nodes(&mut self, nodes: BTreeSet<String>) {
        self.nodes = Some(nodes);
    }

    /// Returns the names of the Nodes that the API server has. `None` if they are not known, or not any more.
    pub(crate) fn nodes(&self) -> Option<&BTreeSet<String>> {
        self.nodes.as_ref().filter(|_| self.acts() && self.reaches())
    }

    /// Returns what is to be said to the API server.
    pub(crate) fn report(&self) -> watch::Receiver<ApiReport> {
        self.report.subscribe()
    }

    /// Whether something hears what is to be said to the API server.
    pub(crate) fn is_heard(&self) -> bool {
        self.report.receiver_count() > 0
    }

    /// Sets what is to be said to the API server.
    pub(crate) fn set_report(&self, report: ApiReport) {
        self.report.send_if_modified(|last| {
            let is_new = *last != report;
            *last = report;
            is_new
        });
    }

    /// Takes over pods of the node, and what is not readable of them. With `whole`, these are all. Returns those that
    /// are too many.
    pub(crate) fn take_pods(
        &mut self,
        whole: bool,
        read: Vec<(Name, String, Option<Pod>)>,
        deleted: &[DeletedPod],
    ) -> Vec<Name> {
        if whole {
            self.pods.clear();
        }
        for DeletedPod { namespace, name, uid } in deleted {
            let name = Name::new(namespace, name);
            // Another pod may have the name by now.
            if self.pods.get(&name).is_some_and(|known| known.uid == *uid) {
                self.pods.remove(&name);
            }
        }
        let mut too_many = Vec::new();
        for (name, uid, pod) in read {
            if self.pods.len() >= MOST_PODS && !self.pods.contains_key(&name) {
                too_many.push(name);
                continue;
            }
            self.pods.insert(name, KnownPod { uid, pod: pod.map(Box::new) });
        }
        too_many
    }

    /// Returns what is known of an endpoint's pod; `Some(None)`: it cannot be read. `None` if the server did not speak of
    /// the pod, or not any more: what was known of it stays true of an endpoint that outlives it.
    #[allow(clippy::option_option, reason = "unknown is not unreadable")]
    pub(crate) fn described(&self, endpoint: &Endpoint) -> Option<Option<&Pod>> {
        if self.pods.is_empty() {
            return None;
        }
        let known = self.pods.get(&endpoint.pod_name())?;
        let uid = endpoint.pod.as_ref().map_or("", |identity| &identity.uid);
        (uid.is_empty() || known.uid == uid).then_some(known.pod.as_deref())
    }

    /// Records which of these objects are not in force as the API server has them. `gone` have no failures any more.
    pub(crate) fn note(
        &mut self,
        heard: &BTreeSet<ResourceKey>,
        failed: &[NotMirrored],
        gone: impl Fn(&ResourceKey) -> bool,
    ) {
        self.failures.retain(|key, _| !heard.contains(key) && !gone(key));
        for NotMirrored { key, reason } in failed {
            if self.failures.len() < MOST_FAILURES {
                self.failures.insert(key.clone(), reason.clone());
            }
        }
    }

    /// Returns the objects that are not in force as the API server has them, each with a sentence.
    pub(crate) fn failures(&self) -> impl Iterator<Item = (String, String)> {
        let sentence = |(key, reason): (&ResourceKey, &String)| {
            let sentence =
                format!("{key} of the Kubernetes API server is not in force as it is there: {reason}");
            (key.to_string(), sentence)
        };
        self.failures.iter().map(sentence)
    }
}

/// Returns the host whose turn it is to mirror: of the live members that reach the API server, the one with the smallest
/// id. Hosts that do not know the same for a moment may both mirror, which does no harm: see [`judge`].
pub(crate) fn chosen(able: impl Iterator<Item = NodeId>) -> Option<NodeId> {
    able.min()
}

/// A member of the cluster other than this host.
#[derive(Debug, Clone, Copy)]
pub(crate) struct NodeMember<'a> {
    /// The host.
    pub id: NodeId,
    /// Its name, which is that of its Node object.
    pub name: &'a str,
    /// Whether it is a Node of an API server.
    pub is_node: bool,
    /// Whether neither its ovld nor its kernel answers, or it has left.
    pub is_lost: bool,
}

/// Returns the members that are lost and whose Node was deleted. `nodes` are the Nodes that there are. If this host's own one
/// is not among them, it is another API server or one that has lost its objects, and says nothing.
pub(crate) fn deleted<'a>(
    nodes: &BTreeSet<String>,
    own: &str,
    members: impl Iterator<Item = NodeMember<'a>>,
) -> BTreeSet<NodeId> {
    let is_deleted =
        |member: &NodeMember<'_>| member.is_lost && member.is_node && !nodes.contains(member.name);
    members.filter(|member| nodes.contains(own) && is_deleted(member)).map(|member| member.id).collect()
}

/// What is to be done about an object of an API server.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Verdict {
    /// Write it.
    Write,
    /// A later state of it is known.
    Stale,
    /// The cluster has an object of its own under the name.
    Foreign,
}

/// Decides about a state of an object, or its deletion, beside what is stored.
///
/// The API server's versions decide and not the time of the write: a mirror that is behind cannot undo what another one
/// has written.
pub(crate) fn judge(stored: Option<&Stored>, new: &Source) -> Verdict {
    let Some(stored) = stored else { return Verdict::Write };
    match &stored.source {
        Some(source) if new.is_before(source) => Verdict::Stale,
        Some(_) => Verdict::Write,
        None if stored.deleted => Verdict::Write,
        None => Verdict::Foreign,
    }
}

/// Returns what the status of a Service at the API server is to say. `None`: nothing, because it was not mirrored, another
/// program gives it its addresses, or ovl does not translate it.
pub(crate) fn balanced(service: &Service, by_others: bool) -> Option<BalancedService> {
    let metadata = &service.metadata;
    let is_served = service.spec.kind == ServiceType::LoadBalancer && !by_others && service.is_translated();
    metadata.source.as_ref().filter(|_| is_served).map(|source| BalancedService {
        name: Name::new(&metadata.namespace, &metadata.name),
        version: source.version,
        addresses: service.load_balancer_addresses().collect(),
    })
}

/// Returns the API's `resourceVersion` of an object.
///
/// # Errors
///
/// It is absent or not a number, in a sentence.
pub(crate) fn version_of(document: &Value) -> Result<u64, String> {
    let version = document.pointer("/metadata/resourceVersion").and_then(Value::as_str).unwrap_or_default();
    version.parse().map_err(|_| {
        format!("metadata.resourceVersion is '{version}' and not a number: versions of this API server have no order")
    })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]

    use ovl_cluster::objects::Objects;
    use ovl_cluster::resources::Resources;
    use ovl_proto::clock::Stamp;
    use ovl_proto::object::{Body, Object, ObjectKey, SignedObject};
    use ovl_proto::record::Signature;
    use ovl_proto::resource::{Meta, Namespace, Resource};
    use ovl_proto::wire::fields::Unknown;
    use serde_json::json;

    use super::*;

    fn source(cluster: &str, version: u64) -> Source {
        Source { cluster: cluster.to_owned(), version }
    }

    /// What is stored of an object that was written, or deleted, with this source.
    fn stored(source: Option<Source>, deleted: bool) -> Stored {
        let metadata = Meta { name: "shop".to_owned(), source: source.map(Box::new), ..Meta::default() };
        let body = Body::Resource(Resource::Namespace(Namespace { metadata, unknown: Unknown::default() }));
        let key = ResourceKey { kind: Kind::Namespace, name: Name::new("", "shop") };
        let object = Object { stamp: Stamp::default(), deleted, body };
        let signed = SignedObject { body: Vec::new(), writer_key: [0; 32], signature: Signature([0; 64]) };
        let mut objects = Objects::default();
        objects.replace(signed, object, &mut Resources::default()).unwrap();
        objects.get(&ObjectKey::Resource(key)).unwrap().clone()
    }

    #[test]
    fn later_versions_win_whenever_they_are_written() {
        let at = |version| stored(Some(source("c", version)), false);
        assert_eq!(judge(None, &source("c", 1)), Verdict::Write);
        assert_eq!(judge(Some(&at(5)), &source("c", 4)), Verdict::Stale);
        assert_eq!(judge(Some(&at(5)), &source("c", 5)), Verdict::Write);
        assert_eq!(judge(Some(&at(5)), &source("c", 6)), Verdict::Write);
        // A deletion is not undone by what was before it.
        let deleted = stored(Some(source("c", 9)), true);
        assert_eq!(judge(Some(&deleted), &source("c", 8)), Verdict::Stale);
        assert_eq!(judge(Some(&deleted), &source("c", 10)), Verdict::Write);
        // The cluster was made anew, and counts from the beginning.
        assert_eq!(judge(Some(&at(5)), &source("d", 1)), Verdict::Write);
    }

    #[test]
    fn own_objects_of_the_cluster_stay() {
        assert_eq!(judge(Some(&stored(None, false)), &source("c", 1)), Verdict::Foreign);
        assert_eq!(judge(Some(&stored(None, true)), &source("c", 1)), Verdict::Write);
    }

    #[test]
    fn versions_are_numbers() {
        assert_eq!(version_of(&json!({ "metadata": { "resourceVersion": "17" } })), Ok(17));
        for wrong in [json!({}), json!({ "metadata": { "resourceVersion": "x1" } })] {
            assert!(version_of(&wrong).unwrap_err().contains("not a number"));
        }
    }

    #[test]
    fn the_smallest_able_host_mirrors() {
        let id = |n| NodeId([n; 10]);
        assert_eq!(chosen([id(3), id(1), id(2)].into_iter()), Some(id(1)));
        assert_eq!(chosen(std::iter::empty()), None);
    }

    #[test]
    fn lost_members_without_a_node_are_deleted_ones() {
        let id = |n| NodeId([n; 10]);
        let member = |n, name, is_node, is_lost| NodeMember { id: id(n), name, is_node, is_lost };
        let members = [
            member(1, "n1", true, true),
            member(2, "n2", true, true),
            member(3, "n3", true, false),
            member(4, "docker", false, true),
        ];
        let nodes = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect::<BTreeSet<_>>();
        let found = |names| deleted(&nodes(names), "n0", members.into_iter());
        assert_eq!(found(&["n0", "n1"]), BTreeSet::from([id(2)]));
        assert_eq!(found(&["n0", "n1", "n2"]), BTreeSet::new());
        // An API server that does not know this host either.
        assert_eq!(found(&[]), BTreeSet::new());
    }

    #[test]
    fn a_turn_needs_a_connection_that_reaches_the_server() {
        let mut kubernetes = Kubernetes::default();
        let (first, mut turn) =
            kubernetes.begin(MirrorOffer { unreachable: Some("refused".to_owned()), trouble: None });
        assert!(!kubernetes.reaches());
        assert_eq!(kubernetes.unreachable(), Some("refused"));
        let (second, _) = kubernetes.begin(MirrorOffer::default());
        assert!(kubernetes.reaches());
        assert_eq!(kubernetes.unreachable(), None);
        assert!(kubernetes.set_turn(true) && !kubernetes.set_turn(true));
        assert!(*turn.borrow_and_update() && kubernetes.acts());
        kubernetes.end(second);
        assert!(!kubernetes.reaches());
        kubernetes.end(first);
        assert_eq!(kubernetes.unreachable(), None);
    }

    #[test]
    fn failures_end_with_the_turn_except_those_about_pods() {
        let key = |kind, name: &str| ResourceKey { kind, name: Name::new("shop", name) };
        let failed = |kind, name| NotMirrored { key: key(kind, name), reason: "x".to_owned() };
        let mut kubernetes = Kubernetes::default();
        kubernetes.set_turn(true);
        let all = [failed(Kind::Service, "web"), failed(Kind::Pod, "p"), failed(Kind::Service, "api")];
        kubernetes.note(&BTreeSet::new(), &all, |_| false);
        kubernetes.note(&BTreeSet::from([key(Kind::Service, "api")]), &[], |_| false);
        let objects = |kubernetes: &Kubernetes| -> Vec<String> {
            kubernetes.failures().map(|(object, _)| object).collect()
        };
        assert_eq!(objects(&kubernetes), ["Pod shop/p", "Service shop/web"]);
        kubernetes.set_turn(false);
        assert_eq!(objects(&kubernetes), ["Pod shop/p"]);
    }
}
