//! Requests for Kubernetes objects: apply manifests, show and delete objects.

use std::collections::{BTreeMap, BTreeSet};

use ovl_cluster::backends::Readiness;
use ovl_cluster::claims::Claim;
use ovl_cluster::objects::{MAX_OBJECT_BYTES, MAX_OBJECTS};
use ovl_cluster::selectables::Selectable;
use ovl_control::{
    Action, Applied, AppliedAll, Apply, BackendInfo, BackendPort, Document, IgnoredFields, ManifestProblem,
    PodEndpoint, Reply, ResourceInfo, ResourceQuery, ServiceBackends,
};
use ovl_manifest::FieldProblem;
use ovl_manifest::object::{self as manifest, Identity};
use ovl_proto::id::NodeId;
use ovl_proto::object::Body;
use ovl_proto::resource::{
    ClusterNetworkPolicy, Created, HEADLESS_LABEL, Kind, Meta, Name, Namespace, NetworkPolicy, NodeObject,
    PROXY_NAME_LABEL, Pod, Protocol, Resource, ResourceKey, Service, ServiceCidr,
};
use ovl_proto::wire::fields::Unknown;
use ovl_subsystems::services::allocation::{self, Ranges, ReservedClaims, ServiceAllocator};
use ovl_subsystems::services::permits::Permits;
use serde_json::Value;
use tokio::task::yield_now;

use super::ready::READY_WITHIN;
use super::state::State;
use super::{Failed, Node};

/// How many documents are read or objects are written before other tasks may run.
pub(super) const AT_A_TIME: usize = 250;
/// How many problems, and how many warnings, are reported at most.
const MOST_PROBLEMS: usize = 200;

/// Why a mirrored object is not changed.
const MIRRORED: &str = "is mirrored from the Kubernetes API server, which would undo the change: change it there, for \
                        example with kubectl, and it changes here at once";

/// Objects to write; `true` marks a tombstone.
type Writes = Vec<(Body, bool)>;

/// How many kinds that ovl does not act on are told apart at most.
const MOST_FOREIGN: usize = 64;

/// The location of an object in the manifests.
#[derive(Debug, Clone)]
struct Place {
    file: String,
    line: usize,
    /// The path of the object within the document: empty, or the path of an item of a list.
    within: String,
    /// The kind and name of the object.
    object: String,
}

impl Place {
    fn problem(&self, problem: FieldProblem) -> ManifestProblem {
        let field = format!("{}{}", self.within, problem.field);
        ManifestProblem {
            file: self.file.clone(),
            line: self.line,
            object: self.object.clone(),
            field: field.trim_end_matches('.').to_owned(),
            reason: problem.reason,
        }
    }
}

impl std::fmt::Display for Place {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}:{}", self.file, self.line)
    }
}

/// Splits documents into objects and their locations.
fn objects_of(documents: Vec<Document>) -> impl Iterator<Item = (Place, Value)> {
    documents.into_iter().map(|Document { file, line, within, value }| {
        (Place { file, line, within, object: manifest::label(&value) }, value)
    })
}

/// Counts the objects of kinds that ovl does not act on.
#[derive(Default)]
struct Foreign(BTreeMap<String, usize>);

impl Foreign {
    fn add(&mut self, kind: String) {
        let known = self.0.len() < MOST_FOREIGN || self.0.contains_key(&kind);
        let kind = if known { kind } else { "of other kinds".to_owned() };
        *self.0.entry(kind).or_default() += 1;
    }
}

/// Collects the fields that ovl does not act on, by kind and reason.
#[derive(Default)]
struct Ignored(BTreeMap<(Kind, String), (BTreeSet<String>, usize)>);

impl Ignored {
    fn add(&mut self, kind: Kind, ignored: Vec<FieldProblem>) {
        let mut reasons = BTreeSet::new();
        for FieldProblem { field, reason } in ignored {
            let key = (kind, reason);
            let (fields, objects) = self.0.entry(key.clone()).or_default();
            fields.insert(manifest::without_indices(&field));
            *objects += usize::from(reasons.insert(key.1));
        }
    }

    fn into_list(self) -> Vec<IgnoredFields> {
        let each = self.0.into_iter();
        each.map(|((kind, reason), (fields, objects))| IgnoredFields { kind, reason, fields, objects })
            .collect()
    }
}

impl Node {
    /// Creates or changes the objects of the documents. If one of them is invalid, nothing is changed.
    pub(super) async fn apply(&self, documents: Vec<Document>, apply: &Apply) -> Result<Reply, Failed> {
        self.ready(READY_WITHIN).await?;
        // One request at a time: each is validated against the current objects, and other tasks run meanwhile.
        let _turn = self.applying.lock().await;
        let mut problems = Vec::new();
        let mut warnings = Vec::new();
        let (mut foreign, mut ignored) = (Foreign::default(), Ignored::default());
        let mut read: Vec<(Place, Resource)> = Vec::new();
        let mut known: BTreeMap<ResourceKey, usize> = BTreeMap::new();
        for (n, (place, value)) in objects_of(documents).enumerate() {
            if problems.len() >= MOST_PROBLEMS {
                break;
            }
            if n % AT_A_TIME == AT_A_TIME - 1 {
                yield_now().await;
            }
            let namespace = apply.namespace.as_deref();
            if let Ok(Identity::Foreign { kind, is_policy }) = manifest::identify(&value, namespace) {
                let reason = match (is_policy, apply.strict) {
                    (true, _) => Some(format!(
                        "ovl does not enforce {kind}, and what it forbids would be allowed: remove it, or write a \
                         networking.k8s.io/v1 NetworkPolicy"
                    )),
                    (false, true) => Some(format!("ovl does not act on {kind}")),
                    (false, false) => None,
                };
                match reason {
                    Some(reason) => {
                        problems.push(place.problem(FieldProblem { field: "kind".to_owned(), reason }))
                    }
                    None => foreign.add(kind),
                }
                continue;
            }
            match manifest::read(value, namespace, apply.validation) {
                Ok(found) => {
                    if apply.strict {
                        problems.extend(found.ignored.into_iter().map(|ignored| place.problem(ignored)));
                    } else {
                        ignored.add(found.resource.kind(), found.ignored);
                    }
                    warnings.extend(found.warnings.into_iter().map(|warning| place.problem(warning)));
                    // As with kubectl, the last one counts.
                    let first = known.entry(found.resource.key()).or_insert(read.len());
                    match read.get_mut(*first) {
                        Some(first) => {
                            let reason = format!("replaces the same object at {}", first.0);
                            warnings.push(place.problem(FieldProblem { field: String::new(), reason }));
                            *first = (place, found.resource);
                        }
                        None => read.push((place, found.resource)),
                    }
                }
                Err(found) => problems.extend(found.into_iter().map(|problem| place.problem(problem))),
            }
            warnings.truncate(MOST_PROBLEMS);
        }
        if problems.is_empty() {
            problems = self.mirrored(&read);
        }
        if problems.is_empty() && apply.create {
            problems = self.existing(&read);
        }
        if problems.is_empty() {
            problems = self.complete(&mut read).await;
        }
        if !problems.is_empty() {
            return Ok(Reply::Refused(problems));
        }
        let (objects, writes) = self.judge(read, apply.show).await?;
        if !apply.dry_run {
            self.write_resources(writes).await?;
            self.tell_applied(&objects);
        }
        let (ignored, foreign) = (ignored.into_list(), foreign.0);
        Ok(Reply::Applied(Box::new(AppliedAll { objects, warnings, ignored, foreign })))
    }

    /// Returns a problem for each object that is mirrored from a Kubernetes API server.
    fn mirrored(&self, read: &[(Place, Resource)]) -> Vec<ManifestProblem> {
        let state = self.state.borrow();
        let is_mirrored = |resource: &Resource| {
            state.view.resources.meta(&resource.key()).is_some_and(|it| it.source.is_some())
        };
        read.iter()
            .filter(|(_, resource)| is_mirrored(resource))
            .map(|(place, _)| {
                place.problem(FieldProblem { field: String::new(), reason: MIRRORED.to_owned() })
            })
            .take(MOST_PROBLEMS)
            .collect()
    }

    /// Returns a problem for each object that exists already.
    fn existing(&self, read: &[(Place, Resource)]) -> Vec<ManifestProblem> {
        let state = self.state.borrow();
        let exists = |resource: &Resource| state.view.resources.meta(&resource.key()).is_some();
        let reason = "already exists: use `ovlctl apply` to change it";
        read.iter()
            .filter(|(_, resource)| exists(resource))
            .map(|(place, _)| place.problem(FieldProblem { field: String::new(), reason: reason.to_owned() }))
            .take(MOST_PROBLEMS)
            .collect()
    }

    /// Sets the fields that the cluster chooses. Returns the problems, empty if there are none.
    async fn complete(&self, read: &mut [(Place, Resource)]) -> Vec<ManifestProblem> {
        if let Some(problem) = self.lacks_room(read) {
            return vec![problem];
        }
        let mut problems = Vec::new();
        for some in read.chunks_mut(AT_A_TIME) {
            self.created(some);
            problems.extend(some.iter().filter_map(|(place, resource)| too_long(place, resource)));
            yield_now().await;
        }
        // Services that request certain addresses or ports come first, so that no address or port that is chosen for
        // another Service collides with a requested one.
        let mut promised = ReservedClaims::default();
        for asking in [true, false] {
            for some in read.chunks_mut(AT_A_TIME) {
                problems.extend(self.allocate(some, asking, &mut promised));
                yield_now().await;
            }
        }
        problems.truncate(MOST_PROBLEMS);
        problems
    }

    /// Chooses addresses and ports for those Services that request certain ones (`asking`), or for all others.
    fn allocate(
        &self,
        read: &mut [(Place, Resource)],
        asking: bool,
        promised: &mut ReservedClaims,
    ) -> Vec<ManifestProblem> {
        let state = self.state.borrow();
        let mut allocator = ServiceAllocator::new(&state.view, &self.config.ranges, promised);
        let permits = Permits::of(&state.view, &self.config.ranges);
        let mut problems = Vec::new();
        for (place, resource) in read {
            if let Resource::Service(service) = resource
                && asks(service) == asking
            {
                let allocated = allocator.allocate(service);
                let found = allocated.err().unwrap_or_else(|| permits.check(service));
                problems.extend(found.into_iter().map(|problem| place.problem(problem)));
            }
        }
        problems
    }

    /// Returns a problem if the cluster would have too many objects, including tombstones. `None` if there is room.
    fn lacks_room(&self, read: &[(Place, Resource)]) -> Option<ManifestProblem> {
        let state = self.state.borrow();
        let is_new = |resource: &Resource| state.view.resources.meta(&resource.key()).is_none();
        let new = read.iter().filter(|(_, resource)| is_new(resource)).count();
        if state.objects.all().len() + new <= MAX_OBJECTS {
            return None;
        }
        let reason = format!("there would be more than {MAX_OBJECTS} objects, removed ones included");
        read.first().map(|(place, _)| place.problem(FieldProblem { field: String::new(), reason }))
    }

    /// Sets the creation timestamp of each object; an existing object keeps its own, and the fields that this release
    /// does not know.
    fn created(&self, read: &mut [(Place, Resource)]) {
        let mut guard = self.state.borrow_mut();
        let state = &mut *guard;
        for (_, resource) in read {
            self.keep_of_old(state, resource);
        }
    }

    /// Gives an object what an existing one keeps: its creation timestamp, which is now for a new object, and the fields
    /// that this release does not know.
    pub(super) fn keep_of_old(&self, state: &mut State, resource: &mut Resource) {
        let old = state.view.resources.get(&resource.key());
        if let Some(old) = &old {
            resource.keep_unknown(old);
        }
        let old = old.map(|old| old.meta().creation_timestamp);
        resource.meta_mut().creation_timestamp = old.unwrap_or_else(|| Created(self.stamp_creation(state)));
    }

    /// Determines the action for each object, and which objects have to be written.
    async fn judge(
        &self,
        read: Vec<(Place, Resource)>,
        show: bool,
    ) -> Result<(Vec<Applied>, Writes), Failed> {
        let (mut objects, mut writes) = (Vec::with_capacity(read.len()), Vec::new());
        for (n, (_, resource)) in read.into_iter().enumerate() {
            if n % AT_A_TIME == AT_A_TIME - 1 {
                yield_now().await;
            }
            let key = resource.key();
            let old = self.state.borrow().view.resources.get(&key);
            let action = match &old {
                None => Action::Created,
                Some(old) if *old == resource => Action::Unchanged,
                Some(_) => Action::Configured,
            };
            objects.push(Applied {
                kind: key.kind,
                namespace: key.name.namespace,
                name: key.name.name,
                action,
                before: shown(old.as_ref(), show)?,
                after: shown(Some(&resource), show)?,
            });
            if action != Action::Unchanged {
                writes.push((Body::Resource(resource), false));
            }
        }
        Ok((objects, writes))
    }

    /// Writes objects in batches. Returns once they are on this host's disk and were sent to all live peers.
    pub(super) async fn write_resources(&self, mut writes: Writes) -> Result<(), Failed> {
        if writes.is_empty() {
            return Ok(());
        }
        while !writes.is_empty() {
            let rest = writes.split_off(writes.len().min(AT_A_TIME));
            self.write_objects(writes)?;
            writes = rest;
            yield_now().await;
        }
        self.saved().await
    }

    /// Reports an event for the changed objects: its name for a single one, the number for several.
    fn tell_applied(&self, objects: &[Applied]) {
        let changed = objects.iter().filter(|it| !matches!(it.action, Action::Unchanged | Action::Absent));
        let changed: Vec<&Applied> = changed.collect();
        if let [one] = changed.as_slice() {
            let name = Name::new(&one.namespace, &one.name);
            self.event(one.kind.qualified(), &name.to_string(), &one.action.to_string());
        } else if !changed.is_empty() {
            self.event("objects", &changed.len().to_string(), "applied or deleted");
        }
    }

    /// Deletes the objects of the documents and those with the given keys.
    pub(super) async fn delete(
        &self,
        documents: Vec<Document>,
        mut keys: Vec<ResourceKey>,
        namespace: Option<&str>,
        dry_run: bool,
    ) -> Result<Reply, Failed> {
        self.ready(READY_WITHIN).await?;
        let mut problems = Vec::new();
        let mut foreign = Foreign::default();
        for (place, value) in objects_of(documents) {
            match manifest::identify(&value, namespace) {
                Ok(Identity::Object(key)) => keys.push(key),
                Ok(Identity::Foreign { kind, .. }) => foreign.add(kind),
                Err(found) => problems.extend(found.into_iter().map(|problem| place.problem(problem))),
            }
        }
        if !problems.is_empty() {
            problems.truncate(MOST_PROBLEMS);
            return Ok(Reply::Refused(problems));
        }
        let mut known = BTreeSet::new();
        keys.retain(|key| known.insert(key.clone()));
        let (mut objects, mut writes) = (Vec::new(), Vec::new());
        {
            let state = self.state.borrow();
            for key in keys {
                let meta = state.view.resources.meta(&key);
                if meta.is_some_and(|meta| meta.source.is_some()) {
                    return Err(Failed::conflict(format!("{key} {MIRRORED}. Nothing was deleted")));
                }
                let found = meta.is_some();
                let ResourceKey { kind, name } = key;
                if found {
                    writes.push((Body::Resource(tombstone(kind, &name)), true));
                }
                let action = if found { Action::Deleted } else { Action::Absent };
                objects.push(Applied {
                    kind,
                    namespace: name.namespace,
                    name: name.name,
                    action,
                    before: None,
                    after: None,
                });
            }
        }
        if !dry_run {
            self.write_resources(writes).await?;
            self.tell_applied(&objects);
        }
        Ok(Reply::Applied(Box::new(AppliedAll { objects, foreign: foreign.0, ..AppliedAll::default() })))
    }

    /// Returns the objects that match a query, in the form that users see.
    pub(super) fn resources(&self, query: &ResourceQuery) -> Result<Vec<ResourceInfo>, Failed> {
        let mut guard = self.state.borrow_mut();
        let state = &mut *guard;
        self.settle_backends(state);
        let names = state.view.resources.names(query.kind);
        let found = names.into_iter().filter(|name| is_asked_for(query, name));
        found.map(|name| info(state, query.kind, name)).collect()
    }

    /// Returns the Services that match a query, with their backends.
    pub(super) fn service_backends(&self, query: &ResourceQuery) -> Vec<ServiceBackends> {
        let mut guard = self.state.borrow_mut();
        let state = &mut *guard;
        self.settle_backends(state);
        let services = state.view.resources.services().iter();
        let asked_for = services.filter(|(name, _)| is_asked_for(query, name));
        asked_for.map(|(name, service)| backends(state, &self.config.ranges, name, service)).collect()
    }
}

/// Whether a Service requests certain addresses or ports.
fn asks(service: &Service) -> bool {
    let spec = &service.spec;
    !spec.cluster_ips.is_empty()
        || spec.load_balancer_ip.is_some()
        || spec.health_check_node_port.is_some()
        || spec.ports.iter().any(|port| port.node_port.is_some())
}

/// Returns the manifest of an object. `None` if there is no object, or `show` is not set.
fn shown(resource: Option<&Resource>, show: bool) -> Result<Option<Value>, Failed> {
    let manifest = resource.filter(|_| show).map(Resource::to_manifest).transpose();
    manifest.map_err(|error| Failed::internal(error.to_string()))
}

/// Returns a problem if the encoded object is too long. `None` if its length is valid.
fn too_long(place: &Place, resource: &Resource) -> Option<ManifestProblem> {
    // The rest is for the stamp and for the name, which is in the object twice.
    let most = MAX_OBJECT_BYTES - 512;
    let length = resource.encode().map_or(usize::MAX, |bytes| bytes.len());
    let reason = format!("is {length} bytes long and may be {most}");
    (length > most).then(|| place.problem(FieldProblem { field: String::new(), reason }))
}

/// Whether a query selects an object by its namespace and name.
fn is_asked_for(query: &ResourceQuery, name: &Name) -> bool {
    let in_namespace = !query.kind.is_namespaced()
        || query.namespace.as_ref().is_none_or(|namespace| *namespace == name.namespace);
    in_namespace && query.name.as_ref().is_none_or(|wanted| *wanted == name.name)
}

/// Returns the object to write as a tombstone: only the name of a deleted object is kept.
pub(super) fn tombstone(kind: Kind, name: &Name) -> Resource {
    let metadata = Meta { name: name.name.clone(), namespace: name.namespace.clone(), ..Meta::default() };
    match kind {
        Kind::Namespace => Resource::Namespace(Namespace { metadata, unknown: Unknown::default() }),
        Kind::Pod => Resource::Pod(Pod { metadata, ..Pod::default() }),
        Kind::Service => Resource::Service(Box::new(Service { metadata, ..Service::default() })),
        Kind::EndpointSlice => Resource::EndpointSlice(ovl_proto::resource::EndpointSlice {
            metadata,
            address_type: ovl_proto::resource::AddressType::IPv4,
            endpoints: Vec::new(),
            ports: Vec::new(),
            unknown: Unknown::default(),
        }),
        Kind::NetworkPolicy => {
            Resource::NetworkPolicy(NetworkPolicy { metadata, ..NetworkPolicy::default() })
        }
        Kind::ServiceCidr => Resource::ServiceCidr(ServiceCidr { metadata, ..ServiceCidr::default() }),
        Kind::ClusterNetworkPolicy => Resource::ClusterNetworkPolicy(ClusterNetworkPolicy {
            metadata,
            ..ClusterNetworkPolicy::default()
        }),
        Kind::Node => Resource::Node(NodeObject { metadata, ..NodeObject::default() }),
    }
}

/// Says why the addresses of a Service lead nowhere.
fn not_translated() -> String {
    format!(
        "not translated by ovl, because it has the label {PROXY_NAME_LABEL} or {HEADLESS_LABEL}: it has names in DNS alone"
    )
}

fn node_name(state: &State, host: Option<NodeId>) -> String {
    host.map(|host| state.view.name_of(host)).unwrap_or_default()
}

fn info(state: &State, kind: Kind, name: Name) -> Result<ResourceInfo, Failed> {
    let selectables = state.workloads.backends().selectables();
    let resource = state.view.resources.get(&ResourceKey { kind, name: name.clone() });
    let resource = resource.ok_or_else(|| Failed::internal("an object that is listed is not there"))?;
    let endpoint = |selectable: &Selectable| PodEndpoint {
        node: node_name(state, selectable.host),
        addresses: selectable.addresses.clone(),
        ready: selectable.ready,
    };
    let endpoints = match &resource {
        Resource::Pod(_) => selectables.of_pod(&name).map(|(_, selectable)| endpoint(selectable)).collect(),
        Resource::Namespace(_)
        | Resource::Service(_)
        | Resource::EndpointSlice(_)
        | Resource::NetworkPolicy(_)
        | Resource::ServiceCidr(_)
        | Resource::ClusterNetworkPolicy(_)
        | Resource::Node(_) => Vec::new(),
    };
    let mut selects: Vec<String> = match &resource {
        Resource::NetworkPolicy(policy) => {
            let here = selectables.iter().map(|(_, selectable)| selectable);
            let here = here.filter(|selectable| selectable.name.namespace == name.namespace);
            here.filter(|selectable| policy.spec.pod_selector.matches(&selectable.labels))
                .map(|selectable| selectable.name.name.clone())
                .collect()
        }
        Resource::Namespace(_)
        | Resource::Pod(_)
        | Resource::Service(_)
        | Resource::EndpointSlice(_)
        | Resource::ServiceCidr(_)
        | Resource::ClusterNetworkPolicy(_)
        | Resource::Node(_) => Vec::new(),
    };
    selects.sort_unstable();
    selects.dedup();
    Ok(ResourceInfo {
        kind,
        namespace: name.namespace,
        name: name.name,
        created_ms: resource.meta().creation_timestamp.0.wall_ms,
        manifest: resource.to_manifest().map_err(|error| Failed::internal(error.to_string()))?,
        endpoints,
        selects,
        source: resource.meta().source.as_deref().map(Into::into),
    })
}

fn lost(claim: &Claim, other: &Name) -> String {
    format!("external address {claim} is that of Service {other}")
}

fn backends(state: &State, ranges: &Ranges, name: &Name, service: &Service) -> ServiceBackends {
    let all = state.workloads.backends().of(name);
    let waits = allocation::families_waited_for(service, ranges);
    let of_port = |port: Option<usize>| {
        let each = all.iter().flat_map(|backend| {
            let number = port.and_then(|n| backend.ports.get(n).copied().flatten());
            let listens = port.is_none() || number.is_some();
            backend.addresses.iter().filter(move |_| listens).map(move |address| BackendInfo {
                address: *address,
                port: number,
                name: backend.name.clone(),
                node: node_name(state, backend.host),
                ready: backend.readiness == Readiness::Ready,
            })
        });
        each.collect()
    };
    let mut ports: Vec<BackendPort> = service
        .spec
        .ports
        .iter()
        .enumerate()
        .map(|(n, port)| BackendPort {
            name: port.name.clone(),
            protocol: port.protocol,
            port: Some(port.port),
            backends: of_port(Some(n)),
        })
        .collect();
    if ports.is_empty() && !all.is_empty() {
        ports.push(BackendPort {
            name: String::new(),
            protocol: Protocol::Tcp,
            port: None,
            backends: of_port(None),
        });
    }
    ServiceBackends {
        namespace: name.namespace.clone(),
        name: name.name.clone(),
        created_ms: service.metadata.creation_timestamp.0.wall_ms,
        ports,
        announced: super::ingress::announced(state, service),
        notes: state
            .view
            .resources
            .claims()
            .lost_externals(name, service)
            .map(|(claim, other)| lost(&claim, other))
            .chain((!waits.is_empty()).then(|| super::ingress::waits(&waits)))
            .chain((!service.is_translated()).then(not_translated))
            .collect(),
    }
}
