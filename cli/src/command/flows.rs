//! `ovlctl flows`: shows who talks to whom, on this host or on others.

use std::ops::ControlFlow;
use std::process::ExitCode;
use std::time::Duration;

use ovl_control::{Client, Flow, FlowVerdict, Flows, FlowsOf, Reply, Request};
use ovl_proto::clock::timestamp;

use crate::args::Output;
use crate::context::{Context, json_text, write_out, yaml_text};
use crate::error::{Error, Result};
use crate::text::{ABSENT, TextTable, printable};

/// The longest time without a word of ovld, which says something each second.
const SILENT: Duration = Duration::from_secs(15);

/// Arguments of `flows`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Only what network policies dropped
    #[arg(long)]
    drops: bool,
    /// Print what is seen each second, until Ctrl-C
    #[arg(short, long)]
    follow: bool,
    /// Of all members of the cluster
    #[arg(long)]
    all_hosts: bool,
    /// Of another host
    #[arg(long, value_name = "HOST", conflicts_with = "all_hosts")]
    host: Option<String>,
}

impl Args {
    fn of(&self) -> FlowsOf {
        match &self.host {
            Some(host) => FlowsOf::Host(host.clone()),
            None if self.all_hosts => FlowsOf::All,
            None => FlowsOf::Here,
        }
    }
}

/// Prints the connections of hosts, or follows them. Exit status 1 if a host did not answer.
pub(crate) fn run(context: &Context, args: &Args) -> Result<ExitCode> {
    if args.follow {
        return follow(context, args).map(|()| ExitCode::SUCCESS);
    }
    match context.request(&Request::Flows { follow: false, of: args.of() })? {
        Reply::Flows(flows) => {
            let flows = only(*flows, args.drops);
            note(context, &flows);
            context.print(&flows, |flows| table(std::slice::from_ref(flows)))?;
            Ok(ExitCode::SUCCESS)
        }
        Reply::HostFlows(all) => {
            let all: Vec<Flows> = all.into_iter().map(|flows| only(flows, args.drops)).collect();
            all.iter().for_each(|flows| note(context, flows));
            context.print(&all, |all| table(all))?;
            let is_whole = all.iter().all(|flows| flows.error.is_none());
            Ok(if is_whole { ExitCode::SUCCESS } else { ExitCode::FAILURE })
        }
        _ => Err(Error::unexpected_reply()),
    }
}

/// Says what is missing.
fn note(context: &Context, flows: &Flows) {
    let host = printable(&flows.host);
    if let Some(why) = &flows.error {
        context.note(&format!("{host}: no flows: {}", printable(why)));
    }
    if flows.incomplete {
        context.note(&format!("{host}: there are more flows than are shown."));
    }
}

fn only(flows: Flows, drops: bool) -> Flows {
    let is_meant = |flow: &Flow| !drops || flow.verdict == FlowVerdict::Dropped;
    Flows { flows: flows.flows.into_iter().filter(is_meant).collect(), ..flows }
}

/// Prints what is seen each second, until the reader closes the pipe.
fn follow(context: &Context, args: &Args) -> Result<()> {
    let failed = |error| Error::request_failed(error, SILENT.as_secs());
    let mut client = Client::connect(&context.socket, Some(SILENT)).map_err(failed)?;
    let mut reply = client.request(&Request::Flows { follow: true, of: args.of() }).map_err(failed)?;
    loop {
        let Reply::Flows(flows) = reply else { return Err(Error::unexpected_reply()) };
        let flows = only(*flows, args.drops);
        if let (Some(why), Some(host)) = (&flows.error, &args.host) {
            return Err(Error::Failed(format!("{host}: {why}")));
        }
        let text = match context.output {
            Output::Table | Output::Wide => flows.flows.iter().map(|flow| line(&flows, flow)).collect(),
            // A stream cannot be an array, so print one object per line.
            Output::Json => json_text(serde_json::to_string(&flows))?,
            Output::Yaml => yaml_text(&flows)?,
        };
        note(context, &flows);
        if let ControlFlow::Break(()) = write_out(&text)? {
            return Ok(());
        }
        reply = client.next_reply().map_err(failed)?;
    }
}

/// Returns the name of an end, or else its address.
pub(super) fn end(name: Option<&String>, address: std::net::IpAddr) -> String {
    name.cloned().unwrap_or_else(|| address.to_string())
}

/// Returns the port and the protocol of a flow.
pub(super) fn port(flow: &Flow) -> String {
    match flow.port {
        Some(port) => format!("{port}/{}", flow.protocol.to_lowercase()),
        None => flow.protocol.to_lowercase(),
    }
}

fn verdict(flow: &Flow) -> &'static str {
    match flow.verdict {
        FlowVerdict::Passed => "passed",
        FlowVerdict::Dropped => "dropped",
    }
}

/// Returns the backend of a flow. Empty if there is none.
pub(super) fn backend(flow: &Flow) -> String {
    flow.backend.map_or_else(String::new, |(address, port)| {
        format!("{}:{port}", end(flow.backend_name.as_ref(), address))
    })
}

fn bytes(flow: &Flow) -> String {
    match (flow.sent_bytes, flow.received_bytes) {
        (Some(sent), Some(received)) => format!("{sent}/{received}"),
        _ => String::new(),
    }
}

fn count(flow: &Flow) -> u64 {
    match flow.verdict {
        FlowVerdict::Passed => flow.opened,
        FlowVerdict::Dropped => flow.dropped,
    }
}

fn table(hosts: &[Flows]) -> String {
    let all = || hosts.iter().flat_map(|host| &host.flows);
    let names = hosts
        .iter()
        .flat_map(|host| host.flows.iter().map(|_| if hosts.len() > 1 { &*host.host } else { "" }));
    TextTable::new()
        .optional_column("HOST", "", names)
        .column("FROM", all().map(|flow| end(flow.from_name.as_ref(), flow.from)))
        .column("TO", all().map(|flow| end(flow.to_name.as_ref(), flow.to)))
        .column("PORT", all().map(port))
        .optional_column("BACKEND", "", all().map(backend))
        .column("VERDICT", all().map(verdict))
        .column("COUNT", all().map(count))
        .column("BYTES SENT/BACK", all().map(bytes))
        .column("POLICIES", all().map(|flow| flow.policies.join(", ")))
        .render()
}

fn line(flows: &Flows, flow: &Flow) -> String {
    let backend = backend(flow);
    let backend = if backend.is_empty() { backend } else { format!(" at {backend}") };
    let counts = match flow.verdict {
        FlowVerdict::Passed => format!("{} opened, {} closed", flow.opened, flow.closed),
        FlowVerdict::Dropped => format!("{} packets", flow.dropped),
    };
    let bytes = match bytes(flow) {
        none if none.is_empty() => ABSENT.to_owned(),
        bytes => bytes,
    };
    let why = flow.why.as_ref().map_or_else(String::new, |why| format!("  {why}"));
    let text = format!(
        "{}  {}  {} > {}  {}{backend}  {}  {counts}  {bytes} bytes{why}",
        timestamp(flows.time_ms),
        flows.host,
        end(flow.from_name.as_ref(), flow.from),
        end(flow.to_name.as_ref(), flow.to),
        port(flow),
        verdict(flow),
    );
    format!("{}\n", printable(&text))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn flows_are_rendered_as_a_table_and_as_lines() {
        let flow = Flow {
            from: [10, 1, 0, 1].into(),
            from_name: Some("default/\u{1b}a".to_owned()),
            to: [10, 96, 0, 1].into(),
            to_name: Some("Service default/shop".to_owned()),
            protocol: "TCP".to_owned(),
            port: Some(80),
            backend: Some(([10, 1, 0, 2].into(), 8080)),
            backend_name: None,
            verdict: FlowVerdict::Passed,
            policies: vec!["default/p".to_owned()],
            why: Some("ingress rule 1 of default/p".to_owned()),
            opened: 3,
            closed: 2,
            dropped: 0,
            sent_bytes: Some(10),
            received_bytes: Some(20),
        };
        let flows =
            Flows { host: "h1".to_owned(), time_ms: 0, flows: vec![flow.clone()], ..Flows::default() };
        let one = table(std::slice::from_ref(&flows));
        assert!(!one.contains("HOST"), "{one}");
        let two = [flows.clone(), Flows { host: "h\u{1b}2".to_owned(), ..flows.clone() }];
        let text = table(&two) + &line(&flows, &flow);
        assert!(!text.contains('\u{1b}'));
        for part in [
            "h1        default",
            "10.1.0.2:8080  passed   3      10/20",
            "Service default/shop  80/tcp at 10.1.0.2:8080  passed  3 opened, 2 closed  10/20 bytes  ingress rule 1",
        ] {
            assert!(text.contains(part), "{part:?} is not in\n{text}");
        }
        assert_eq!(only(flows, true).flows.len(), 0);
    }
}
