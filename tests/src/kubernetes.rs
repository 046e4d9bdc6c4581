//! A small Kubernetes API server, and `ovl-kube` beside a host.
//!
//! The server lists and watches as the real one does (resource versions, pages, bookmarks, 410 Gone), and takes statuses and
//! Events, over HTTP on the loopback device of each host. What its clients may do is as a ClusterRole says. Tests put objects
//! into it and make it fail.

mod kube;

use std::collections::{BTreeMap, BTreeSet};
use std::io::{BufRead as _, BufReader, Read as _, Write};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use anyhow::{Context as _, Result};
use netns_lab::Host;
use serde_json::{Value, json};

pub use kube::{Control, Kube};

/// How often a thread looks whether it is to end.
const POLL: Duration = Duration::from_millis(20);
/// How many objects a page of a list has, so that lists of a few objects have several.
const SMALL_PAGE: usize = 3;
/// The uid of the namespace `kube-system`, which names the Kubernetes cluster.
pub const CLUSTER: &str = "11111111-2222-4333-8444-555555555555";

/// The kinds that the server has: plural name, path of all objects, `apiVersion`, `kind`.
const KINDS: [(&str, &str, &str, &str); 10] = [
    ("namespaces", "/api/v1/namespaces", "v1", "Namespace"),
    ("pods", "/api/v1/pods", "v1", "Pod"),
    ("services", "/api/v1/services", "v1", "Service"),
    ("endpointslices", "/apis/discovery.k8s.io/v1/endpointslices", "discovery.k8s.io/v1", "EndpointSlice"),
    (
        "networkpolicies",
        "/apis/networking.k8s.io/v1/networkpolicies",
        "networking.k8s.io/v1",
        "NetworkPolicy",
    ),
    (
        "clusternetworkpolicies",
        "/apis/policy.networking.k8s.io/v1alpha2/clusternetworkpolicies",
        "policy.networking.k8s.io/v1alpha2",
        "ClusterNetworkPolicy",
    ),
    ("servicecidrs", "/apis/networking.k8s.io/v1/servicecidrs", "networking.k8s.io/v1", "ServiceCIDR"),
    ("nodes", "/api/v1/nodes", "v1", "Node"),
    ("leases", "/apis/coordination.k8s.io/v1/leases", "coordination.k8s.io/v1", "Lease"),
    ("events", "/apis/events.k8s.io/v1/events", "events.k8s.io/v1", "Event"),
];

/// The key of an object: plural name of its kind, namespace, name.
type Key = (String, String, String);

#[derive(Debug, Clone)]
struct Change {
    version: u64,
    plural: String,
    /// `ADDED`, `MODIFIED`, `DELETED` or `BOOKMARK`.
    event: &'static str,
    object: Value,
}

#[derive(Debug, Default)]
struct State {
    version: u64,
    objects: BTreeMap<Key, Value>,
    /// All changes since the version that is forgotten.
    history: Vec<Change>,
    /// Watches from an earlier version are refused with 410 Gone.
    forgotten: u64,
    /// What lists show in place of the objects, as a server behind the others does.
    old_lists: Option<(u64, BTreeMap<Key, Value>)>,
    /// Plural names of kinds that are not defined.
    undefined: BTreeSet<String>,
    /// Grows whenever all watches are to end.
    cut: u64,
    /// Whether connections are closed and refused.
    away: bool,
    /// Requests, for tests of the load: plural name, whether it is a watch, the field selector.
    requests: Vec<(String, bool, String)>,
    /// How many objects a page of a list has at most. `None`: [`SMALL_PAGE`].
    page: Option<usize>,
    /// What clients may do. `None`: everything.
    rules: Option<BTreeSet<Right>>,
    /// What clients did.
    used: BTreeSet<Right>,
    /// Writes of clients: the method and path.
    writes: Vec<String>,
}

/// A right: group of the API, resource or `resource/subresource`, verb.
pub type Right = (String, String, String);

/// Returns the rights that a ClusterRole gives.
pub fn rights(role: &Value) -> BTreeSet<Right> {
    let list = |rule: &Value, field: &str| -> Vec<String> {
        let all = rule[field].as_array().into_iter().flatten();
        all.filter_map(|it| it.as_str().map(str::to_owned)).collect()
    };
    let mut rights = BTreeSet::new();
    for rule in role["rules"].as_array().into_iter().flatten() {
        for group in list(rule, "apiGroups") {
            for resource in list(rule, "resources") {
                for verb in list(rule, "verbs") {
                    rights.insert((group.clone(), resource.clone(), verb));
                }
            }
        }
    }
    rights
}

impl State {
    fn put(&mut self, object: &Value) -> u64 {
        let (plural, _, version, kind) =
            KINDS.into_iter().find(|known| known.3 == object["kind"]).unwrap_or(("unknown", "", "", ""));
        let key = key(plural, object);
        self.version += 1;
        let now = self.version;
        let mut object = object.clone();
        object["apiVersion"] = version.into();
        object["kind"] = kind.into();
        let before = self.objects.get(&key).map(|before| before["metadata"]["uid"].clone());
        if object["metadata"]["uid"].is_null() {
            object["metadata"]["uid"] = before.clone().unwrap_or_else(|| format!("uid-{now}").into());
        }
        object["metadata"]["resourceVersion"] = now.to_string().into();
        let event = if before.is_some() { "MODIFIED" } else { "ADDED" };
        self.history.push(Change { version: now, plural: plural.to_owned(), event, object: object.clone() });
        self.objects.insert(key, object);
        now
    }

    /// Whether a client may do this. Records that it did.
    fn allows(&mut self, right: Right) -> bool {
        let allowed = self.rules.as_ref().is_none_or(|rules| rules.contains(&right));
        self.used.insert(right);
        allowed
    }

    /// Changes the status of an object, or an Event, as a patch says. Returns the status code and the answer.
    fn patch(&mut self, query: &Query, body: &Value) -> (u16, Value) {
        let Some(mut object) = self.objects.get(&query.key()).cloned() else {
            return (404, status(404, "NotFound"));
        };
        let version = &body["metadata"]["resourceVersion"];
        if !version.is_null() && *version != object["metadata"]["resourceVersion"] {
            return (409, status(409, "Conflict"));
        }
        let before = object.clone();
        if query.subresource == "status" {
            merge(&mut object["status"], &body["status"], query.strategic);
        } else {
            merge(&mut object, body, query.strategic);
        }
        // As the real server, which writes nothing if nothing has changed.
        if object != before {
            self.put(&object);
            object = self.objects.get(&query.key()).cloned().unwrap_or_default();
        }
        (200, object)
    }

    /// Creates an object.
    fn create(&mut self, query: &Query, body: &Value) -> (u16, Value) {
        let name = body["metadata"]["name"].as_str().unwrap_or_default();
        let query = Query { name: name.to_owned(), ..query.clone() };
        if body["metadata"]["namespace"] != query.namespace.as_str() {
            return (400, status(400, "BadRequest"));
        }
        if self.objects.contains_key(&query.key()) {
            return (409, status(409, "AlreadyExists"));
        }
        self.put(body);
        (201, self.objects.get(&query.key()).cloned().unwrap_or_default())
    }
}

/// Merges a patch into a value: a JSON merge patch, or a strategic one, by which conditions are merged by their type.
fn merge(value: &mut Value, patch: &Value, strategic: bool) {
    let Some(fields) = patch.as_object() else {
        *value = patch.clone();
        return;
    };
    if !value.is_object() {
        *value = json!({});
    }
    for (field, new) in fields {
        match (new, value[field].as_array_mut()) {
            (Value::Null, _) => {
                if let Some(fields) = value.as_object_mut() {
                    fields.remove(field);
                }
            }
            (Value::Array(new), Some(all)) if strategic && field == "conditions" => {
                for condition in new {
                    match all.iter_mut().find(|it| it["type"] == condition["type"]) {
                        Some(found) => merge(found, condition, strategic),
                        None => all.push(condition.clone()),
                    }
                }
            }
            (new, _) => merge(&mut value[field], new, strategic),
        }
    }
}

#[derive(Debug, Default)]
struct Shared {
    state: Mutex<State>,
    /// Signals a change.
    changed: Condvar,
    stop: AtomicBool,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The API server. It is stopped when dropped.
#[derive(Debug, Default)]
pub struct ApiServer {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
}

impl ApiServer {
    /// Creates a server with the namespaces `default` and `kube-system`.
    pub fn new() -> Self {
        let server = Self::default();
        server.put(&json!({ "kind": "Namespace", "metadata": { "name": "default" } }));
        server.put(&json!({ "kind": "Namespace", "metadata": { "name": "kube-system", "uid": CLUSTER } }));
        server
    }

    /// Serves on the loopback device of a host. Returns the content of a kubeconfig file.
    pub fn listen(&mut self, host: &Host) -> Result<String> {
        let port = self.listen_at(host, Ipv4Addr::LOCALHOST.into())?;
        Ok(kubeconfig(&format!("http://127.0.0.1:{port}")))
    }

    /// Serves at an address of a host. Returns the port.
    pub fn listen_at(&mut self, host: &Host, address: IpAddr) -> Result<u16> {
        let listener = host.run(|| TcpListener::bind(SocketAddr::new(address, 0)))??;
        let port = listener.local_addr()?.port();
        listener.set_nonblocking(true)?;
        let shared = Arc::clone(&self.shared);
        self.threads.push(thread::spawn(move || accept(&shared, &listener)));
        Ok(port)
    }

    /// Creates or changes an object, whose kind decides where it belongs. Returns its version.
    pub fn put(&self, object: &Value) -> u64 {
        let version = self.shared.lock().put(object);
        self.shared.changed.notify_all();
        version
    }

    /// Deletes an object.
    pub fn delete(&self, plural: &str, namespace: &str, name: &str) -> Result<()> {
        let key = (plural.to_owned(), namespace.to_owned(), name.to_owned());
        let mut state = self.shared.lock();
        let mut object = state.objects.remove(&key).with_context(|| format!("there is no {key:?}"))?;
        state.version += 1;
        let version = state.version;
        object["metadata"]["resourceVersion"] = version.to_string().into();
        state.history.push(Change { version, plural: plural.to_owned(), event: "DELETED", object });
        self.shared.changed.notify_all();
        Ok(())
    }

    /// Ends all watches. The server goes on to remember changes.
    pub fn cut_watches(&self) {
        self.shared.lock().cut += 1;
        self.shared.changed.notify_all();
    }

    /// Ends all watches and forgets all changes, so that clients must list again. Other clients change something
    /// meanwhile, as ever.
    pub fn forget_history(&self) {
        let mut state = self.shared.lock();
        state.history.clear();
        state.version += 1;
        state.forgotten = state.version;
        state.cut += 1;
        self.shared.changed.notify_all();
    }

    /// Sends a bookmark to all watches.
    pub fn bookmark(&self) {
        let mut state = self.shared.lock();
        let version = state.version;
        for (plural, _, api, kind) in KINDS {
            let object = json!({
                "apiVersion": api, "kind": kind, "metadata": { "resourceVersion": version.to_string() },
            });
            state.history.push(Change { version, plural: plural.to_owned(), event: "BOOKMARK", object });
        }
        self.shared.changed.notify_all();
    }

    /// Sets whether lists from now on show the objects of this moment.
    pub fn freeze_lists(&self, frozen: bool) {
        let mut state = self.shared.lock();
        state.old_lists = frozen.then(|| (state.version, state.objects.clone()));
    }

    /// Sets whether the server is away: it closes all connections and answers none.
    pub fn set_away(&self, away: bool) {
        self.shared.lock().away = away;
        self.shared.changed.notify_all();
    }

    /// Sets whether a kind is defined, as by a CustomResourceDefinition.
    pub fn define(&self, plural: &str, defined: bool) {
        let mut state = self.shared.lock();
        match defined {
            true => drop(state.undefined.remove(plural)),
            false => drop(state.undefined.insert(plural.to_owned())),
        }
    }

    /// Sets how many objects a page of a list has at most.
    pub fn set_page(&self, page: usize) {
        self.shared.lock().page = Some(page);
    }

    /// Sets what clients may do. Everything else is forbidden.
    pub fn set_rights(&self, rights: BTreeSet<Right>) {
        self.shared.lock().rules = Some(rights);
    }

    /// Returns what clients did so far.
    pub fn used_rights(&self) -> BTreeSet<Right> {
        self.shared.lock().used.clone()
    }

    /// Returns the writes of clients so far, each as its method and path.
    pub fn writes(&self) -> Vec<String> {
        self.shared.lock().writes.clone()
    }

    /// Returns an object.
    pub fn get(&self, plural: &str, namespace: &str, name: &str) -> Option<Value> {
        let key = (plural.to_owned(), namespace.to_owned(), name.to_owned());
        self.shared.lock().objects.get(&key).cloned()
    }

    /// Returns all objects of a kind.
    pub fn all(&self, plural: &str) -> Vec<Value> {
        let state = self.shared.lock();
        let of_kind = state.objects.iter().filter(|((other, ..), _)| other == plural);
        of_kind.map(|(_, object)| object.clone()).collect()
    }

    /// Returns the requests so far: plural name, whether it is a watch, the field selector.
    pub fn requests(&self) -> Vec<(String, bool, String)> {
        self.shared.lock().requests.clone()
    }
}

impl Drop for ApiServer {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Relaxed);
        self.shared.changed.notify_all();
        self.threads.drain(..).for_each(|thread| drop(thread.join()));
    }
}

/// Returns the content of a kubeconfig file.
fn kubeconfig(server: &str) -> String {
    json!({
        "apiVersion": "v1", "kind": "Config", "current-context": "tests",
        "clusters": [{ "name": "tests", "cluster": { "server": server } }],
        "users": [{ "name": "tests", "user": {} }],
        "contexts": [{ "name": "tests", "context": { "cluster": "tests", "user": "tests" } }],
    })
    .to_string()
}

fn key(plural: &str, object: &Value) -> Key {
    let text = |field: &str| object["metadata"][field].as_str().unwrap_or_default().to_owned();
    (plural.to_owned(), text("namespace"), text("name"))
}

fn accept(shared: &Arc<Shared>, listener: &TcpListener) {
    while !shared.stop.load(Ordering::Relaxed) {
        match listener.accept() {
            Ok((stream, _)) if !shared.lock().away => {
                let shared = Arc::clone(shared);
                // It ends with its client or with the server.
                thread::spawn(move || serve(&shared, stream));
            }
            Ok(_) => {}
            Err(_) => thread::sleep(POLL),
        }
    }
}

/// A request, as far as it matters.
#[derive(Debug, Clone)]
struct Query {
    method: String,
    plural: &'static str,
    /// The group of the API; empty for the core.
    group: String,
    namespace: String,
    /// Empty: all objects.
    name: String,
    subresource: String,
    /// Whether the body is a strategic merge patch.
    strategic: bool,
    watch: bool,
    selector: String,
    version: u64,
    limit: usize,
    token: String,
}

impl Query {
    fn parse(method: &str, target: &str, strategic: bool) -> Option<Self> {
        let (path, query) = target.split_once('?').unwrap_or((target, ""));
        let words: Vec<&str> = path.split('/').skip(1).collect();
        let (group, release, rest) = match words.as_slice() {
            ["api", "v1", rest @ ..] => ("", "v1", rest),
            ["apis", group, release, rest @ ..] => (*group, *release, rest),
            _ => return None,
        };
        let (namespace, rest) = match rest {
            ["namespaces", namespace, rest @ ..] if !rest.is_empty() => (*namespace, rest),
            rest => ("", rest),
        };
        let (resource, name, subresource) = match rest {
            [resource] => (*resource, "", ""),
            [resource, name] => (*resource, *name, ""),
            [resource, name, subresource] => (*resource, *name, *subresource),
            _ => return None,
        };
        let root = if group.is_empty() { "/api/v1".to_owned() } else { format!("/apis/{group}/{release}") };
        let (plural, ..) = KINDS.into_iter().find(|known| known.1 == format!("{root}/{resource}"))?;
        let value = |name: &str| {
            let found = query.split('&').find_map(|part| part.strip_prefix(name)?.strip_prefix('='));
            found.unwrap_or_default().replace("%3D", "=").replace("%3A", ":")
        };
        Some(Self {
            method: method.to_owned(),
            plural,
            group: group.to_owned(),
            namespace: namespace.to_owned(),
            name: name.to_owned(),
            subresource: subresource.to_owned(),
            strategic,
            watch: value("watch") == "true",
            selector: value("fieldSelector"),
            version: value("resourceVersion").parse().unwrap_or(0),
            limit: value("limit").parse().unwrap_or(usize::MAX),
            token: value("continue"),
        })
    }

    fn key(&self) -> Key {
        (self.plural.to_owned(), self.namespace.clone(), self.name.clone())
    }

    /// Returns the right that the request needs.
    fn right(&self) -> Right {
        let verb = match (self.method.as_str(), self.watch, self.name.is_empty()) {
            ("GET", true, _) => "watch",
            ("GET", false, true) => "list",
            ("GET", false, false) => "get",
            ("POST", ..) => "create",
            ("PATCH", ..) => "patch",
            ("DELETE", ..) => "delete",
            _ => "update",
        };
        let slash = if self.subresource.is_empty() { "" } else { "/" };
        (self.group.clone(), format!("{}{slash}{}", self.plural, self.subresource), verb.to_owned())
    }
}

/// Answers one request, and closes the connection.
fn serve(shared: &Shared, mut stream: TcpStream) {
    let _ = stream.set_nonblocking(false);
    let Ok(read) = stream.try_clone() else { return };
    let mut read = BufReader::new(read);
    let mut head: Vec<String> = Vec::new();
    let mut line = String::new();
    while read.read_line(&mut line).is_ok_and(|length| length > 0) && !line.trim().is_empty() {
        head.push(std::mem::take(&mut line));
    }
    let Some(first) = head.first() else { return };
    let header = |name: &str| {
        let lines = head.iter().map(|line| line.to_ascii_lowercase());
        lines
            .filter_map(|line| Some(line.strip_prefix(name)?.trim_matches([':', ' ', '\r', '\n']).to_owned()))
            .next()
    };
    let length = header("content-length").and_then(|length| length.parse().ok()).unwrap_or(0);
    let mut body = vec![0; length];
    if read.read_exact(&mut body).is_err() {
        return;
    }
    let body: Value = serde_json::from_slice(&body).unwrap_or_default();
    let strategic = header("content-type").is_some_and(|kind| kind.contains("strategic"));
    let mut words = first.split(' ');
    let (method, target) = (words.next().unwrap_or_default(), words.next().unwrap_or_default());
    // Who is gone needs no answer.
    let _ = match Query::parse(method, target, strategic) {
        None => answer(&mut stream, 404, &status(404, "NotFound")),
        Some(query) if !shared.lock().allows(query.right()) => {
            answer(&mut stream, 403, &status(403, "Forbidden"))
        }
        Some(query) if shared.lock().undefined.contains(query.plural) => {
            answer(&mut stream, 404, &status(404, "NotFound"))
        }
        Some(query) if method == "GET" && query.name.is_empty() => {
            let request = (query.plural.to_owned(), query.watch, query.selector.clone());
            shared.lock().requests.push(request);
            if query.watch { watch(shared, &mut stream, &query) } else { list(shared, &mut stream, &query) }
        }
        Some(query) => {
            let (code, body) = {
                let mut state = shared.lock();
                if method != "GET" {
                    state.writes.push(format!("{method} {target}"));
                }
                match method {
                    "GET" => match state.objects.get(&query.key()) {
                        Some(object) => (200, object.clone()),
                        None => (404, status(404, "NotFound")),
                    },
                    "PATCH" => state.patch(&query, &body),
                    "POST" => state.create(&query, &body),
                    _ => (405, status(405, "MethodNotAllowed")),
                }
            };
            shared.changed.notify_all();
            answer(&mut stream, code, &body)
        }
    };
}

fn status(code: u16, reason: &str) -> Value {
    json!({
        "kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure", "reason": reason, "code": code,
        "message": reason,
    })
}

fn answer(stream: &mut impl Write, code: u16, body: &Value) -> std::io::Result<()> {
    let body = body.to_string();
    write!(
        stream,
        "HTTP/1.1 {code} {}\r\nContent-Type: application/json\r\nContent-Length: {}\r\nConnection: close\r\n\r\n{body}",
        if code < 300 { "OK" } else { "Failure" },
        body.len()
    )
}

fn is_selected(selector: &str, object: &Value) -> bool {
    selector.strip_prefix("spec.nodeName=").is_none_or(|node| object["spec"]["nodeName"] == node)
}

/// Lists, in small pages, whatever the client wants.
fn list(shared: &Shared, stream: &mut TcpStream, query: &Query) -> std::io::Result<()> {
    let start: usize = query.token.parse().unwrap_or(0);
    let (version, size, items) = {
        let state = shared.lock();
        let now = (state.version, &state.objects);
        let (version, objects) =
            state.old_lists.as_ref().map_or(now, |(version, objects)| (*version, objects));
        let size = query.limit.min(state.page.unwrap_or(SMALL_PAGE));
        let all = objects.iter().filter(|((plural, ..), _)| plural == query.plural);
        let all = all.map(|(_, object)| object).filter(|object| is_selected(&query.selector, object));
        // One more, to see whether there are more.
        let items: Vec<Value> = all.skip(start).take(size + 1).cloned().collect();
        (version, size, items)
    };
    // Lists leave the kind out of their items.
    let items: Vec<Value> = items
        .into_iter()
        .map(|mut object| {
            if let Some(fields) = object.as_object_mut() {
                fields.remove("apiVersion");
                fields.remove("kind");
            }
            object
        })
        .collect();
    let mut metadata = json!({ "resourceVersion": version.to_string() });
    if items.len() > size {
        metadata["continue"] = (start + size).to_string().into();
    }
    let page: Vec<Value> = items.into_iter().take(size).collect();
    let (_, _, api, kind) = KINDS.into_iter().find(|known| known.0 == query.plural).unwrap_or(KINDS[0]);
    let body =
        json!({ "kind": format!("{kind}List"), "apiVersion": api, "metadata": metadata, "items": page });
    answer(stream, 200, &body)
}

fn watch(shared: &Shared, stream: &mut TcpStream, query: &Query) -> std::io::Result<()> {
    let (forgotten, cut, mut next) = {
        let state = shared.lock();
        (
            state.forgotten,
            state.cut,
            state.history.iter().take_while(|it| it.version <= query.version).count(),
        )
    };
    let gone = status(410, "Expired");
    // The real server has two ways to say it.
    if query.version < forgotten && query.plural == "services" {
        return answer(stream, 410, &gone);
    }
    write!(
        stream,
        "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"
    )?;
    if query.version < forgotten {
        chunk(stream, &json!({ "type": "ERROR", "object": gone }))?;
        return write!(stream, "0\r\n\r\n");
    }
    loop {
        let (changes, ends) = {
            let mut state = shared.lock();
            let is_idle = |state: &mut State| state.history.len() <= next && state.cut == cut && !state.away;
            state = shared
                .changed
                .wait_timeout_while(state, Duration::from_millis(500), is_idle)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
            let ends = (state.cut != cut, state.away || shared.stop.load(Ordering::Relaxed));
            let changes: Vec<Change> = state.history.get(next..).unwrap_or_default().to_vec();
            next = next.max(state.history.len());
            (changes, ends)
        };
        match ends {
            // Without the last chunk, as from a server that is killed.
            (_, true) => return Ok(()),
            (true, false) => return write!(stream, "0\r\n\r\n"),
            (false, false) => {}
        }
        for Change { plural, event, object, .. } in changes {
            if plural == query.plural && (event == "BOOKMARK" || is_selected(&query.selector, &object)) {
                chunk(stream, &json!({ "type": event, "object": object }))?;
            }
        }
    }
}

fn chunk(stream: &mut impl Write, event: &Value) -> std::io::Result<()> {
    let line = format!("{event}\n");
    write!(stream, "{:x}\r\n{line}\r\n", line.len())?;
    stream.flush()
}
