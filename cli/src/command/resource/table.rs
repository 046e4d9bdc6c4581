//! Tables of `ovlctl get`, with the columns of kubectl.

use ovl_control::{ResourceInfo, ServiceBackends};
use ovl_proto::resource::Kind;
use serde_json::Value;

use super::Found;
use crate::text::{TextTable, comma_separated};
use crate::time::{now_ms, seconds};

/// Maximum number of backends shown without `-o wide`.
const MAX_ENDPOINTS: usize = 3;
const NONE: &str = "<none>";

/// The optional columns of a table.
#[derive(Debug, Clone, Copy)]
pub(super) struct Show {
    pub(super) namespaces: bool,
    pub(super) wide: bool,
}

pub(super) fn render(found: &Found, show: Show) -> String {
    match found {
        Found::Objects(kind, objects) => of_kind(*kind, objects, show),
        Found::Endpoints(services) => endpoints(services, show),
    }
}

fn of_kind(kind: Kind, objects: &[ResourceInfo], show: Show) -> String {
    let mut table = TextTable::new();
    if show.namespaces && kind.is_namespaced() {
        table = table.column("NAMESPACE", objects.iter().map(|it| &it.namespace));
    }
    table = table.column("NAME", objects.iter().map(|it| &it.name));
    table = match kind {
        Kind::Namespace => table.column("STATUS", objects.iter().map(|_| "Active")),
        Kind::Pod => pods(table, objects),
        Kind::Service => services(table, objects),
        Kind::EndpointSlice => table
            .column("ADDRESSTYPE", cells(objects, |spec| text(spec.pointer("/addressType"))))
            .column("PORTS", cells(objects, |it| list_of(it, "/ports", |port| text(port.get("port")))))
            .column(
                "ENDPOINTS",
                cells(objects, |it| {
                    list_of(it, "/endpoints", |endpoint| text(endpoint.pointer("/addresses/0")))
                }),
            ),
        Kind::NetworkPolicy => {
            table.column("POD-SELECTOR", cells(objects, |it| selector(it.pointer("/spec/podSelector"))))
        }
        Kind::ClusterNetworkPolicy => table
            .column("TIER", cells(objects, |it| text(it.pointer("/spec/tier"))))
            .column("PRIORITY", cells(objects, |it| text(it.pointer("/spec/priority")))),
        Kind::ServiceCidr => {
            table.column("CIDRS", cells(objects, |it| list_of(it, "/spec/cidrs", |range| text(Some(range)))))
        }
        Kind::Node => table.column(
            "ADDRESSES",
            cells(objects, |it| list_of(it, "/status/addresses", |address| text(address.get("address")))),
        ),
    };
    table = table.column("AGE", objects.iter().map(|it| age(it.created_ms)));
    if show.wide {
        table = match kind {
            Kind::Service => {
                table.column("SELECTOR", cells(objects, |it| labels(it.pointer("/spec/selector"))))
            }
            Kind::Namespace | Kind::Pod | Kind::Node => {
                table.column("LABELS", cells(objects, |it| labels(it.pointer("/metadata/labels"))))
            }
            Kind::EndpointSlice | Kind::NetworkPolicy | Kind::ServiceCidr | Kind::ClusterNetworkPolicy => {
                table
            }
        };
        let source = |it: &ResourceInfo| if it.source.is_some() { "kubernetes" } else { "ovl" };
        table = table.column("SOURCE", objects.iter().map(source));
    }
    table.render()
}

fn pods(table: TextTable, objects: &[ResourceInfo]) -> TextTable {
    let ready = objects.iter().map(|it| match it.endpoints.as_slice() {
        [] => "-".to_owned(),
        all => format!("{}/{}", all.iter().filter(|endpoint| endpoint.ready).count(), all.len()),
    });
    let addresses = objects
        .iter()
        .map(|it| comma_separated(it.endpoints.iter().flat_map(|endpoint| &endpoint.addresses)));
    let nodes = objects.iter().map(|it| {
        let mut nodes: Vec<&str> = it.endpoints.iter().map(|endpoint| endpoint.node.as_str()).collect();
        nodes.retain(|node| !node.is_empty());
        nodes.dedup();
        comma_separated(nodes)
    });
    table.column("READY", ready).column("IP", addresses.map(or_none)).column("NODE", nodes.map(or_none))
}

fn services(table: TextTable, objects: &[ResourceInfo]) -> TextTable {
    let field = |it: &Value, path: &str| text(it.pointer(path));
    table
        .column("TYPE", cells(objects, |it| field(it, "/spec/type")))
        .column("CLUSTER-IP", cells(objects, |it| field(it, "/spec/clusterIP")))
        .column(
            "EXTERNAL-IP",
            cells(objects, |it| {
                let balanced = list_of(it, "/status/loadBalancer/ingress", |ingress| text(ingress.get("ip")));
                let given = list_of(it, "/spec/externalIPs", |ip| text(Some(ip)));
                let all = comma_separated([balanced, given].iter().filter(|part| !part.is_empty()));
                match (all.is_empty(), field(it, "/spec/type").as_str()) {
                    (false, _) => all,
                    (true, "LoadBalancer") => "<pending>".to_owned(),
                    (true, "ExternalName") => field(it, "/spec/externalName"),
                    (true, _) => String::new(),
                }
            }),
        )
        .column(
            "PORT(S)",
            cells(objects, |it| {
                list_of(it, "/spec/ports", |port| {
                    let node_port = port.get("nodePort").map(|port| format!(":{port}")).unwrap_or_default();
                    format!("{}{node_port}/{}", text(port.get("port")), text(port.get("protocol")))
                })
            }),
        )
}

fn endpoints(services: &[ServiceBackends], show: Show) -> String {
    let mut table = TextTable::new();
    if show.namespaces {
        table = table.column("NAMESPACE", services.iter().map(|it| &it.namespace));
    }
    table
        .column("NAME", services.iter().map(|it| &it.name))
        .column(
            "ENDPOINTS",
            services.iter().map(|service| {
                let ready: Vec<String> = service
                    .ports
                    .iter()
                    .flat_map(|port| &port.backends)
                    .filter(|backend| backend.ready)
                    .map(super::describe::address)
                    .collect();
                let shown =
                    comma_separated(ready.iter().take(if show.wide { usize::MAX } else { MAX_ENDPOINTS }));
                match ready.len().checked_sub(MAX_ENDPOINTS).filter(|more| *more > 0 && !show.wide) {
                    Some(more) => format!("{shown} + {more} more..."),
                    None => or_none(shown),
                }
            }),
        )
        .column("AGE", services.iter().map(|it| age(it.created_ms)))
        .render()
}

fn cells<'a>(
    objects: &'a [ResourceInfo],
    cell: impl Fn(&Value) -> String + 'a,
) -> impl Iterator<Item = String> + 'a {
    objects.iter().map(move |it| or_none(cell(&it.manifest)))
}

fn or_none(text: String) -> String {
    if text.is_empty() { NONE.to_owned() } else { text }
}

/// Formats a JSON value for a cell. The empty string for null and `None`.
pub(super) fn text(value: Option<&Value>) -> String {
    match value {
        Some(Value::String(text)) => text.clone(),
        Some(Value::Null) | None => String::new(),
        Some(other) => other.to_string(),
    }
}

fn list_of(value: &Value, path: &str, item: impl Fn(&Value) -> String) -> String {
    comma_separated(value.pointer(path).and_then(Value::as_array).into_iter().flatten().map(item))
}

/// Formats labels: `a=b,c=d`.
pub(super) fn labels(value: Option<&Value>) -> String {
    let fields = value.and_then(Value::as_object).into_iter().flatten();
    comma_separated(fields.map(|(key, value)| format!("{key}={}", text(Some(value)))))
}

/// Formats a label selector: `a=b,c in (d,e),!f`.
pub(super) fn selector(value: Option<&Value>) -> String {
    let exact = labels(value.and_then(|value| value.get("matchLabels")));
    let expressions = value.and_then(|value| value.get("matchExpressions")).and_then(Value::as_array);
    let expressions = expressions.into_iter().flatten().map(|it| {
        let (key, values) = (text(it.get("key")), list_of(it, "/values", |value| text(Some(value))));
        match it.get("operator").and_then(Value::as_str) {
            Some("In") => format!("{key} in ({values})"),
            Some("NotIn") => format!("{key} notin ({values})"),
            Some("DoesNotExist") => format!("!{key}"),
            _ => key,
        }
    });
    comma_separated([exact].into_iter().chain(expressions).filter(|part| !part.is_empty()))
}

/// Formats the time elapsed since `since_ms`, a Unix time in milliseconds.
fn age(since_ms: u64) -> String {
    seconds(now_ms().saturating_sub(since_ms) / 1000)
}
