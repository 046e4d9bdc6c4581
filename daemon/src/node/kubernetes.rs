//! Requests of `ovl-kube`: takes over objects of a Kubernetes API server, and what it says of this host's pods.

use std::collections::{BTreeMap, BTreeSet};
use std::rc::Rc;

use ovl_cluster::objects::MAX_OBJECT_BYTES;
use ovl_control::{
    ApiReport, Balanced, Document, Mirror, MirrorOffer, Mirrored, NodePods, NotMirrored, Reply,
};
use ovl_manifest::FieldProblem;
use ovl_manifest::object::{self as manifest, Identity};
use ovl_proto::id::EndpointId;
use ovl_proto::object::{Body, ObjectKey};
use ovl_proto::resource::{Kind, Name, Pod, Resource, ResourceKey, Source, Validation};
use ovl_proto::table::{Endpoint, Entry};
use ovl_proto::wire;
use ovl_subsystems::services::allocation::{ReservedClaims, ServiceAllocator};
use ovl_subsystems::services::permits::Permits;
use tokio::sync::watch;
use tokio::task::yield_now;

use super::apply::{AT_A_TIME, tombstone};
use super::ready::READY_WITHIN;
use super::state::State;
use super::tables::MAX_DESCRIBED;
use super::{Failed, Node};
use crate::endpoints::LocalEndpoint;
use crate::kubernetes::closed::stand_in;
use crate::kubernetes::{Verdict, balanced, chosen, judge, version_of};
use crate::problems::Code;

/// What stays free of the owner table for leases and what else the host must write, in bytes.
const RESERVE: usize = 1 << 20;
/// The number of documents from which on their memory is given back to the kernel.
const MANY: usize = 1000;
/// Why a policy with domain names is not in force as a whole.
const UNHEARD: &str = "it has domainNames, and queries to the cluster DNS go to a Service of the cluster: ovl does not see its \
                       answers, so the rules accept nothing by the names that are asked for there";
/// How many problems of an object its sentence has.
const MOST_REASONS: usize = 3;

/// What is taken over in one request.
#[derive(Default)]
struct Taken {
    /// The objects that the request names, whatever is done about them.
    heard: BTreeSet<ResourceKey>,
    writes: Vec<(Body, bool)>,
    reply: Mirrored,
}

impl Taken {
    fn fail(&mut self, key: &ResourceKey, reason: impl Into<String>) {
        self.reply.failed.push(NotMirrored { key: key.clone(), reason: reason.into() });
    }
}

impl Node {
    /// Begins a connection of `ovl-kube`. Returns its number, and whether it is this host's turn to mirror.
    pub(super) fn begin_mirror(self: &Rc<Self>, offer: MirrorOffer) -> (u64, watch::Receiver<bool>) {
        let begun = self.state.borrow_mut().kubernetes.begin(offer);
        self.note_offers();
        begun
    }

    /// Ends a connection of `ovl-kube`.
    pub(super) fn end_mirror(&self, connection: u64) {
        self.state.borrow_mut().kubernetes.end(connection);
        self.note_offers();
    }

    /// Announces whether this host can mirror.
    fn note_offers(&self) {
        let reaches = self.state.borrow().kubernetes.reaches();
        self.change_record(|record| record.mirrors = reaches);
        let mut guard = self.state.borrow_mut();
        let state = &mut *guard;
        let sentence = state.kubernetes.unreachable().map(|why| {
            format!(
                "ovl-kube of this host does not reach the Kubernetes API server: {why}. What is known goes on to be in \
                 force; check the address, the route and the credentials"
            )
        });
        let trouble = state.kubernetes.trouble().map(|why| {
            format!(
                "ovl-kube of this host cannot do all of its work at the Kubernetes API server: {why}. What is known goes on \
                 to be in force; see docs/kubernetes.md for the rights that it needs"
            )
        });
        state.problems.set(Code::ApiUnreachable, "", sentence.or(trouble));
        self.take_mirror_turn(state);
    }

    /// Finds out whether it is this host's turn to mirror.
    pub(super) fn take_mirror_turn(&self, state: &mut State) {
        let able = state.view.nodes.values().filter(|node| {
            node.record.mirrors
                && node.state == ovl_control::PeerState::Alive
                && state.view.alloc.members.contains(&node.record.id)
        });
        let acts = chosen(able.map(|node| node.record.id)) == Some(state.view.me);
        if state.kubernetes.set_turn(acts) {
            let message = if acts {
                "this host mirrors the objects of the API server"
            } else {
                "this host no longer mirrors the objects of the API server"
            };
            self.event("kubernetes", &self.config.node, message);
            note_failures(state);
            self.report_to_api(state);
        }
    }

    /// Returns what is to be said to the API server.
    pub(super) fn api_report(&self) -> watch::Receiver<ApiReport> {
        let state = self.state.borrow();
        let report = state.kubernetes.report();
        self.report_to_api(&state);
        report
    }

    /// Finds out what is to be said to the API server, if something hears it.
    pub(super) fn report_to_api(&self, state: &State) {
        if !state.kubernetes.is_heard() {
            return;
        }
        let ranges = &self.config.ranges;
        let of_all = || Balanced {
            pools: ranges.load_balancers.clone(),
            services: {
                let all = state.view.resources.services().values();
                all.filter_map(|service| balanced(service, ranges.is_balanced_by_others(service))).collect()
            },
        };
        state.kubernetes.set_report(ApiReport {
            unready: self.unready(state),
            balanced: state.kubernetes.acts().then(of_all),
            seeks: self.seeks_nodes(state),
        });
    }

    /// Takes over objects of an API server, each by itself.
    pub(super) async fn mirror(&self, documents: Vec<Document>, request: &Mirror) -> Result<Reply, Failed> {
        self.ready(READY_WITHIN).await?;
        if request.cluster.is_empty() || request.cluster.len() > Source::MAX_CLUSTER {
            return Err(Failed::invalid(format!(
                "the Kubernetes cluster needs a name of at most {} bytes: the uid of its namespace kube-system",
                Source::MAX_CLUSTER
            )));
        }
        // One request at a time: each is validated against the current objects, and other tasks run meanwhile.
        let _turn = self.applying.lock().await;
        if !self.state.borrow().kubernetes.acts() {
            return Err(Failed::conflict(
                "another host mirrors the objects of the API server, or ovl-kube does not say that it reaches it",
            ));
        }
        let many = documents.len() >= MANY;
        let mut taken = Taken::default();
        taken.heard.extend(request.failed.iter().map(|failed| failed.key.clone()));
        taken.reply.failed.extend(request.failed.iter().cloned());
        let mut read = Vec::new();
        for (n, document) in documents.into_iter().enumerate() {
            if n % AT_A_TIME == AT_A_TIME - 1 {
                yield_now().await;
            }
            read.extend(self.read_mirrored(document, &request.cluster, &mut taken));
        }
        for some in read.chunks_mut(AT_A_TIME) {
            self.complete_mirrored(some, &mut taken);
            yield_now().await;
        }
        for (n, resource) in read.into_iter().enumerate() {
            if n % AT_A_TIME == AT_A_TIME - 1 {
                yield_now().await;
            }
            match too_long(&resource) {
                Some(reason) => taken.fail(&resource.key(), reason),
                None if self.is_stored(&resource) => {}
                None => taken.writes.push((Body::Resource(resource), false)),
            }
        }
        self.find_deleted(request, &mut taken);
        let Taken { heard, writes, mut reply } = taken;
        reply.changed = writes.len();
        self.write_resources(writes).await?;
        // The Service of the cluster DNS may have come after the policy.
        let mut unheard = self.unheard_policies();
        unheard.retain(|unheard| reply.failed.iter().all(|failed| failed.key != unheard.key));
        reply.failed.extend(unheard);
        // No event: where pods come and go, slices change all the time.
        let (changed, stale, failed) = (reply.changed, reply.stale, reply.failed.len());
        tracing::debug!(changed, stale, failed, "mirrored");
        let mut guard = self.state.borrow_mut();
        let listed = |key: &ResourceKey| request.listed.iter().any(|listed| listed.kind == key.kind);
        let gone =
            |key: &ResourceKey| listed(key) || request.deleted.iter().any(|deleted| deleted.key == *key);
        guard.kubernetes.note(&heard, &reply.failed, gone);
        note_failures(&mut guard);
        self.report_to_api(&guard);
        drop(guard);
        if many {
            ovl_kernel::return_free_memory();
        }
        Ok(Reply::Mirrored(Box::new(reply)))
    }

    /// Reads an object of the API server. Returns it if it is to be written.
    fn read_mirrored(&self, document: Document, cluster: &str, taken: &mut Taken) -> Option<Resource> {
        let value = document.value;
        let key = match manifest::identify(&value, None) {
            Ok(Identity::Object(key)) => key,
            // An API server names its objects, and ovl-kube sends no other kinds.
            Ok(Identity::Foreign { .. }) | Err(_) => {
                tracing::warn!(object = manifest::label(&value), "not an object that can be mirrored");
                return None;
            }
        };
        taken.heard.insert(key.clone());
        let source = match version_of(&value) {
            Ok(version) => Source { cluster: cluster.to_owned(), version },
            Err(reason) => {
                taken.fail(&key, reason);
                return None;
            }
        };
        {
            let state = self.state.borrow();
            let object = ObjectKey::Resource(key.clone());
            if let Some((_, why)) = state.objects.not_understood(&object) {
                taken.fail(
                    &key,
                    format!("a later release of ovld wrote it, and this host does not know {why}"),
                );
                return None;
            }
            match judge(state.objects.all().get(&object), &source) {
                Verdict::Write => {}
                Verdict::Stale => {
                    taken.reply.stale += 1;
                    return None;
                }
                Verdict::Foreign => {
                    let (kind, name) = (key.kind.qualified(), &key.name);
                    let option = if key.kind.is_namespaced() {
                        format!(" -n {}", name.namespace)
                    } else {
                        String::new()
                    };
                    let reason = format!(
                        "ovl has an object of its own under this name, which stays: remove it with `ovlctl delete {kind} \
                         {}{option}`, and the API server's takes its place",
                        name.name
                    );
                    taken.fail(&key, reason);
                    return None;
                }
            }
        }
        // Boxed up only if the object cannot be read: a policy must not be lost silently.
        let policy = stand_in(&key, &value);
        let mut resource = match manifest::read(value, None, Validation::Ignore) {
            Ok(read) => read.resource,
            Err(problems) => {
                let closed = policy.filter(|(it, _)| manifest::check(it).is_ok());
                let mut reason = sentence(&problems);
                if let Some((_, effect)) = &closed {
                    reason += &format!(". {effect}");
                }
                taken.fail(&key, reason);
                closed?.0
            }
        };
        resource.meta_mut().source = Some(Box::new(source));
        // What a server keeps for its clients is no use here, and may be long.
        resource.meta_mut().annotations.retain(|name, _| !is_bookkeeping(name));
        Some(resource)
    }

    /// Returns the mirrored policies with domain names, if queries to the cluster DNS go to another program than ovl. They are in
    /// force, but without these peers.
    fn unheard_policies(&self) -> Vec<NotMirrored> {
        let state = self.state.borrow();
        let resources = &state.view.resources;
        let with_names = resources.cluster_policies().iter().filter(|(_, policy)| {
            let mut peers = policy.spec.egress.iter().flat_map(|rule| &rule.to);
            policy.metadata.source.is_some() && peers.any(|peer| !peer.domain_names.is_empty())
        });
        let mut with_names = with_names.peekable();
        if with_names.peek().is_none() || state.subsystems.names.handed_over(resources).is_empty() {
            return Vec::new();
        }
        let failed = |name: &String| NotMirrored {
            key: ResourceKey { kind: Kind::ClusterNetworkPolicy, name: Name::new("", name) },
            reason: UNHEARD.to_owned(),
        };
        with_names.map(|(name, _)| failed(name)).collect()
    }

    /// Whether an object is stored exactly so.
    fn is_stored(&self, resource: &Resource) -> bool {
        let state = self.state.borrow();
        let stored = state.objects.all().get(&ObjectKey::Resource(resource.key()));
        // Most differ in the version, which is cheap to see.
        let same = stored.filter(|stored| !stored.deleted && stored.source == resource.meta().source);
        same.and_then(|stored| stored.signed.object().ok())
            .is_some_and(|object| matches!(&object.body, Body::Resource(stored) if stored == resource))
    }

    /// Fills in what the cluster chooses.
    fn complete_mirrored(&self, read: &mut [Resource], taken: &mut Taken) {
        let mut guard = self.state.borrow_mut();
        let state = &mut *guard;
        for resource in read.iter_mut() {
            self.keep_of_old(state, resource);
        }
        let mut promised = ReservedClaims::default();
        let ranges = &self.config.ranges;
        let mut allocator = ServiceAllocator::new(&state.view, ranges, &mut promised);
        let permits = Permits::of(&state.view, ranges);
        for resource in read.iter_mut() {
            let key = resource.key();
            let Resource::Service(service) = resource else { continue };
            let mut completed = service.clone();
            let problems = match allocator.allocate(&mut completed) {
                Ok(()) => {
                    *service = completed;
                    permits.check(service)
                }
                // The API server has let it in, so it is taken as it is. What of it cannot be done is said.
                Err(problems) => problems,
            };
            if !problems.is_empty() {
                taken.fail(&key, sentence(&problems));
            }
        }
    }

    /// Finds the mirrored objects that the API server has no more.
    fn find_deleted(&self, request: &Mirror, taken: &mut Taken) {
        let state = self.state.borrow();
        let mut gone: BTreeMap<ResourceKey, u64> =
            request.deleted.iter().map(|deleted| (deleted.key.clone(), deleted.version)).collect();
        for listed in &request.listed {
            let absent = state.objects.all().mirrored().map(|(key, _)| key);
            let absent = absent.filter(|key| key.kind == listed.kind && !taken.heard.contains(*key));
            gone.extend(absent.map(|key| (key.clone(), listed.version)));
        }
        for (key, version) in gone {
            let source = Source { cluster: request.cluster.clone(), version };
            let stored = state.objects.all().get(&ObjectKey::Resource(key.clone()));
            let Some(stored) = stored.filter(|stored| !stored.deleted) else { continue };
            match judge(Some(stored), &source) {
                Verdict::Write => {
                    let mut body = tombstone(key.kind, &key.name);
                    body.meta_mut().source = Some(Box::new(source));
                    taken.writes.push((Body::Resource(body), true));
                }
                Verdict::Stale => taken.reply.stale += 1,
                // What is deleted there was never mirrored.
                Verdict::Foreign => {}
            }
        }
    }

    /// Takes over what the API server says of the pods of this host.
    pub(super) fn node_pods(&self, documents: Vec<Document>, request: &NodePods) -> Reply {
        let mut reply = Mirrored::default();
        let (mut heard, mut read) = (BTreeSet::new(), Vec::new());
        for Document { value, .. } in documents {
            let Ok(Identity::Object(key)) = manifest::identify(&value, None) else {
                tracing::warn!(object = manifest::label(&value), "not a pod that can be mirrored");
                continue;
            };
            heard.insert(key.clone());
            let uid = value.pointer("/metadata/uid").and_then(serde_json::Value::as_str);
            let uid = uid.unwrap_or_default().to_owned();
            let (uid, pod) = match manifest::read(value, None, Validation::Ignore) {
                Ok(found) => match found.resource {
                    Resource::Pod(pod) => {
                        let (uid, pod) = (pod.metadata.uid.clone(), facts(pod));
                        let fits = wire::encode_body(&pod).is_ok_and(|bytes| bytes.len() <= MAX_DESCRIBED);
                        if !fits {
                            let reason = "its labels and ports are too long, so it is isolated where a policy might select it";
                            reply.failed.push(NotMirrored { key: key.clone(), reason: reason.to_owned() });
                        }
                        (uid, Some(pod).filter(|_| fits))
                    }
                    Resource::Namespace(_)
                    | Resource::Service(_)
                    | Resource::EndpointSlice(_)
                    | Resource::NetworkPolicy(_)
                    | Resource::ServiceCidr(_)
                    | Resource::ClusterNetworkPolicy(_)
                    | Resource::Node(_) => continue,
                },
                Err(problems) => {
                    let reason = format!(
                        "{}. Its labels are therefore not known, and it is isolated where a policy might select it",
                        sentence(&problems)
                    );
                    reply.failed.push(NotMirrored { key: key.clone(), reason });
                    (uid, None)
                }
            };
            read.push((key.name, uid, pod));
        }
        {
            let mut guard = self.state.borrow_mut();
            let state = &mut *guard;
            for name in state.kubernetes.take_pods(request.whole, read, &request.deleted) {
                let key = ResourceKey { kind: Kind::Pod, name };
                let reason = "the node has more pods than ovl takes over".to_owned();
                reply.failed.push(NotMirrored { key, reason });
            }
            let is_deleted = |key: &ResourceKey| {
                request
                    .deleted
                    .iter()
                    .any(|it| (&it.namespace, &it.name) == (&key.name.namespace, &key.name.name))
            };
            state.kubernetes.note(&heard, &reply.failed, |key| {
                key.kind == Kind::Pod && (request.whole || is_deleted(key))
            });
            note_failures(state);
        }
        reply.changed = self.describe_endpoints(None);
        Reply::Mirrored(Box::new(reply))
    }

    /// Writes into the entries of this host's endpoints, or of `only` one, what the API server says of their pods. Returns
    /// how many have changed. A pod for which the owner table has no room is not described, so it is isolated where a policy
    /// might select it, and reported.
    pub(super) fn describe_endpoints(&self, only: Option<EndpointId>) -> usize {
        let (changed, full) = {
            let state = self.state.borrow();
            let (mut changed, mut full): (Vec<(Endpoint, LocalEndpoint)>, Vec<NotMirrored>) =
                Default::default();
            let mut bytes = RESERVE;
            for endpoint in state.own_endpoints().filter(|endpoint| only.is_none_or(|id| endpoint.id == id)) {
                let Some(mut described) = state.kubernetes.described(endpoint) else { continue };
                if endpoint.described.as_deref() == described {
                    continue;
                }
                if let Some(pod) = described {
                    bytes = bytes
                        .saturating_add(wire::encode_body(pod).map_or(MAX_DESCRIBED, |bytes| bytes.len()));
                    if state.view.own().is_some_and(|own| !own.table.has_room(0, bytes)) {
                        let key = ResourceKey { kind: Kind::Pod, name: endpoint.pod_name() };
                        let reason = "the table of this host is full, so its labels are not known to others, and it is \
                                      isolated where a policy might select it";
                        full.push(NotMirrored { key, reason: reason.to_owned() });
                        described = None;
                    }
                }
                if endpoint.described.as_deref() != described
                    && let Some(local) = state.endpoints.get(endpoint.id)
                {
                    let described = described.cloned().map(Box::new);
                    changed.push((Endpoint { described, ..endpoint.clone() }, local.clone()));
                }
            }
            (changed, full)
        };
        if !full.is_empty() {
            let mut state = self.state.borrow_mut();
            state.kubernetes.note(&BTreeSet::new(), &full, |_| false);
            note_failures(&mut state);
        }
        for (endpoint, local) in &changed {
            // The labels are in force nevertheless, and after a restart they come from the API server again.
            if let Err(error) = self.keep_endpoint(endpoint, local) {
                tracing::error!(
                    endpoint = endpoint.name,
                    error = format!("{error:#}"),
                    "cannot write its file"
                );
            }
        }
        let count = changed.len();
        if count > 0 {
            let entries = changed.into_iter().map(|(endpoint, _)| Entry::Endpoint(endpoint)).collect();
            self.write_table(entries, Vec::new());
        }
        count
    }
}

/// Shows what is not in force as the API server has it.
fn note_failures(state: &mut State) {
    let failures: Vec<(String, String)> = state.kubernetes.failures().collect();
    state.problems.replace(Code::NotMirrored, failures);
}

/// Returns the first problems of an object in a sentence.
fn sentence(problems: &[FieldProblem]) -> String {
    let each = problems.iter().take(MOST_REASONS).map(|problem| match problem.field.as_str() {
        "" => problem.reason.clone(),
        field => format!("{field}: {}", problem.reason),
    });
    each.collect::<Vec<_>>().join("; ")
}

/// Whether an annotation only serves clients of an API server.
fn is_bookkeeping(annotation: &str) -> bool {
    matches!(
        annotation,
        "kubectl.kubernetes.io/last-applied-configuration"
            | "endpoints.kubernetes.io/last-change-trigger-time"
            | "endpoints.kubernetes.io/over-capacity"
    )
}

/// Returns what of a pod the entry of its endpoint needs: the addresses are in the entry already.
fn facts(mut pod: Pod) -> Pod {
    pod.metadata.annotations.clear();
    (pod.status.pod_ip, pod.status.pod_ips) = (None, Vec::new());
    for container in &mut pod.spec.containers {
        container.ports.retain(|port| !port.name.is_empty());
    }
    pod.spec.containers.retain(|container| !container.ports.is_empty());
    pod
}

/// Returns a problem if the encoded object is too long to be written.
fn too_long(resource: &Resource) -> Option<String> {
    // The rest is for the stamp and for the name, which is in the object twice.
    let most = MAX_OBJECT_BYTES - 512;
    let length = resource.encode().map_or(usize::MAX, |bytes| bytes.len());
    (length > most).then(|| format!("is {length} bytes long and may be {most}"))
}
