//! Gathers the metrics of all parts of the daemon, and serves them over HTTP if `metrics_listen` is set.

use std::net::SocketAddr;
use std::rc::Rc;
use std::time::Duration;

use hyper::StatusCode;
use hyper::header::ACCEPT;
use ovl_dataplane::device::Device;
use ovl_kernel::Traffic;
use ovl_metrics::{Format, In, Page};
use serde_json::json;
use tokio::time::Instant;

use super::{Failed, Node};
use crate::metrics;
use crate::problems::Code;
use crate::web::{self, Answer, Asked, Pages};

/// How long rendered metrics are served again, so that many clients cost no more than one.
const FRESH: Duration = Duration::from_secs(1);
/// Time until the next attempt to listen.
const RETRY: Duration = Duration::from_secs(5);

impl Node {
    /// Renders the metrics of this host.
    pub(super) async fn metrics(self: &Rc<Self>, format: Format) -> Result<String, Failed> {
        self.look_at_tunnel().await;
        let mut page = Page::default();
        metrics::add_status(&mut page, &self.status(), &self.peers());
        let family =
            page.counter("tunnel_dropped_packets", In::Numbers, "Packets that the tunnel dropped, by reason");
        for (reason, count) in self.tunnel.borrow().drops() {
            family.with(&[("reason", reason)], count);
        }
        self.add_names(&mut page);
        self.add_cluster(&mut page);
        self.measured.borrow().add_to(&mut page);
        self.add_endpoints(&mut page).await?;
        self.add_policies(&mut page).await?;
        self.add_fast_path(&mut page).await;
        metrics::add_process(&mut page);
        Ok(page.render(format))
    }

    /// Adds the metrics of the resolver.
    fn add_names(&self, page: &mut Page) {
        let family = page.counter("dns_queries", In::Numbers, "DNS queries, by what became of them");
        for (outcome, count) in self.resolver.counts() {
            family.with(&[("outcome", outcome)], count);
        }
        if let Some(waits) = self.resolver.waits() {
            let help = "Time until an upstream resolver answered, or until none had";
            page.durations("dns_upstream_duration", help, [(Vec::new(), &waits)]);
        }
    }

    /// Adds what this host holds of the cluster, and what others changed in its kernel.
    fn add_cluster(&self, page: &mut Page) {
        let state = self.state.borrow();
        let resources = &state.view.resources;
        page.gauge("services", In::Numbers, "Services in the cluster").is(resources.services().len());
        page.gauge("policies", In::Numbers, "Network policies in the cluster")
            .is(resources.policies().len() + resources.cluster_policies().len());
        let tables: Vec<_> =
            state.view.nodes.values().map(|node| (node.record.name.as_str(), node.table.size())).collect();
        let family = page.gauge("table_entries", In::Numbers, "Entries of a host's owner table");
        for (host, (entries, _)) in &tables {
            family.with(&[("host", host)], *entries);
        }
        let family = page.gauge("table", In::Bytes, "Size of a host's owner table, encoded");
        for (host, (_, bytes)) in &tables {
            family.with(&[("host", host)], *bytes);
        }
        let family = page.counter(
            "reconcile_repairs",
            In::Numbers,
            "Changes that undid somebody else's, by the kind of object",
        );
        for (kind, count) in state.reconcile.repairs() {
            family.with(&[("kind", kind)], count);
        }
    }

    /// Adds what the endpoints of this host sent, received, and may not send.
    async fn add_endpoints(&self, page: &mut Page) -> Result<(), Failed> {
        let traffic = self.kernel.traffic().await.map_err(Failed::from)?;
        let refused = self.refused_frames().await?;
        let state = self.state.borrow();
        let rows: Vec<_> = state
            .own_endpoints()
            .map(|endpoint| {
                let network = state.view.networks.get(&endpoint.network);
                let labels = [
                    ("namespace", &*endpoint.namespace),
                    ("endpoint", &*endpoint.name),
                    ("network", network.map_or("", |found| &*found.network.name)),
                ];
                let device = Device::endpoint(endpoint.id);
                (labels, traffic.get(&device).copied(), refused.get(&endpoint.id).copied().unwrap_or(0))
            })
            .collect();
        let mut each = |name, unit, help, value: &dyn Fn(&Traffic) -> u64| {
            let family = page.counter(name, unit, help);
            for (labels, traffic, _) in &rows {
                family.with_some(labels, traffic.as_ref().map(value));
            }
        };
        each("endpoint_sent", In::Bytes, "Bytes that an endpoint of this host sent", &|t| t.sent_bytes);
        each("endpoint_received", In::Bytes, "Bytes that an endpoint of this host received", &|t| {
            t.received_bytes
        });
        each("endpoint_sent_packets", In::Numbers, "Packets that an endpoint of this host sent", &|t| {
            t.sent_packets
        });
        each(
            "endpoint_received_packets",
            In::Numbers,
            "Packets that an endpoint of this host received",
            &|t| t.received_packets,
        );
        each("endpoint_dropped_packets", In::Numbers, "Packets that an endpoint's device dropped", &|t| {
            t.dropped_packets
        });
        let help = "Frames that an endpoint of this host may not send";
        let family = page.counter("endpoint_refused_frames", In::Numbers, help);
        for (labels, _, refused) in &rows {
            family.with(labels, *refused);
        }
        Ok(())
    }

    /// Returns the hosts that serve metrics, as Prometheus' service discovery over HTTP reads them.
    fn targets(&self) -> String {
        let state = self.state.borrow();
        let members = &state.view.alloc.members;
        let serving = state
            .view
            .nodes
            .values()
            .filter(|node| node.record.metrics_port != 0 && members.contains(&node.record.id));
        let targets: Vec<_> = serving
            .map(|node| {
                let at = SocketAddr::new(node.record.address.ip(), node.record.metrics_port);
                json!({ "targets": [at.to_string()], "labels": { "host": node.record.name } })
            })
            .collect();
        json!(targets).to_string()
    }

    /// Serves metrics forever, if it is configured.
    pub(super) async fn web_loop(self: Rc<Self>) {
        let Some(listen) = self.config.metrics_listen.clone() else { return std::future::pending().await };
        let server = Rc::new(Server { node: Rc::clone(&self), rendered: tokio::sync::Mutex::default() });
        loop {
            let opened = || self.state.borrow_mut().problems.set(Code::WebAddress, "", None);
            if let Err(error) = web::serve(Rc::clone(&server), &listen, opened).await {
                let sentence = format!(
                    "the metrics are not served at {listen}: {error}. Free it, or change metrics_listen in ovld.toml; ovld \
                     tries again every {} s",
                    RETRY.as_secs()
                );
                self.state.borrow_mut().problems.set(Code::WebAddress, "", Some(sentence));
            }
            tokio::time::sleep(RETRY).await;
        }
    }
}

/// The pages of the server.
struct Server {
    node: Rc<Node>,
    /// The last metrics, with their format and time.
    rendered: tokio::sync::Mutex<Option<(Instant, Format, String)>>,
}

impl Server {
    async fn metrics(&self, format: Format) -> Answer {
        let mut rendered = self.rendered.lock().await;
        let text = match &*rendered {
            Some((at, of, text)) if *of == format && at.elapsed() < FRESH => text.clone(),
            _ => {
                let text = match self.node.metrics(format).await {
                    Ok(text) => text,
                    Err(Failed(failure)) => {
                        return Answer::other(StatusCode::SERVICE_UNAVAILABLE, &failure.message);
                    }
                };
                *rendered = Some((Instant::now(), format, text.clone()));
                text
            }
        };
        Answer::document(format.content_type(), text)
    }
}

impl Pages for Server {
    const HEADERS: &'static [(&'static str, &'static str)] = &[];

    async fn answer(self: &Rc<Self>, asked: &Asked<'_>) -> Answer {
        let format = match asked.header(ACCEPT).contains("application/openmetrics-text") {
            true => Format::OpenMetrics,
            false => Format::Prometheus,
        };
        match asked.path {
            "/metrics" => self.metrics(format).await,
            "/targets" => Answer::document("application/json", self.node.targets()),
            _ => Answer::other(StatusCode::NOT_FOUND, "there are /metrics and /targets"),
        }
    }
}
