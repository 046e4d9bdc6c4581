//! `ovlctl policy`: lists and explains network policies.

use std::collections::BTreeMap;
use std::ops::ControlFlow;
use std::thread;
use std::time::Duration;

use clap::Subcommand;
use ovl_control::{PolicyDrop, PolicyJudgement, PolicyRow, Reply, Request};

use super::target::{Target, parse_target};
use crate::args::Output;
use crate::context::{Context, json_text, write_out, yaml_text};
use crate::error::{Error, Result};
use crate::text::{TextTable, comma_separated, optional, printable};
use crate::time::millis;

/// Poll interval of `policy drops --follow`.
const POLL_INTERVAL: Duration = Duration::from_secs(1);

/// Arguments of `policy`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    #[command(subcommand)]
    action: Action,
}

#[derive(Debug, Subcommand)]
enum Action {
    /// List the cluster's network policies, and how many packets each refused on this host
    #[command(visible_alias = "list")]
    Ls,
    /// Show whether a connection is allowed, and which policy and rule decide
    Explain {
        /// The source: an endpoint, as NAME or NAMESPACE/NAME, or an address
        from: String,
        /// The destination and its port: db:5432, shop/db:53/udp, [fd00::9]:80; without a port for a protocol
        /// that has no ports
        #[arg(value_name = "TO[:PORT[/PROTO]]", value_parser = parse_target)]
        to: Target,
    },
    /// List the connections that were recently refused on this host, latest first
    Drops {
        /// Print newly refused connections as they occur
        #[arg(short, long)]
        follow: bool,
    },
}

/// Runs a subcommand.
pub(crate) fn run(context: &Context, args: Args) -> Result<()> {
    match args.action {
        Action::Ls => {
            let Reply::Policies(rows) = context.request(&Request::PolicyLs)? else {
                return Err(Error::unexpected_reply());
            };
            context.print(&rows, |rows| render_rows(rows, context.output))
        }
        Action::Explain { from, to: Target { to, port, protocol } } => {
            let request = Request::PolicyExplain { from, to, port, protocol };
            let Reply::PolicyExplain(judgements) = context.request(&request)? else {
                return Err(Error::unexpected_reply());
            };
            context.print(&judgements, |judgements| judgements.iter().map(render_judgement).collect())
        }
        Action::Drops { follow: false } => context.print(&drops(context)?, |drops| render_drops(drops)),
        Action::Drops { follow: true } => follow(context),
    }
}

fn drops(context: &Context) -> Result<Vec<PolicyDrop>> {
    match context.request(&Request::PolicyDrops)? {
        Reply::PolicyDrops(drops) => Ok(drops),
        _ => Err(Error::unexpected_reply()),
    }
}

/// The fields that identify a connection.
fn connection_key(drop: &PolicyDrop) -> impl Ord + use<> {
    (drop.direction.clone(), drop.from, drop.to, drop.protocol.clone(), drop.port)
}

/// Prints the packets refused since the previous poll, until the reader closes the pipe.
fn follow(context: &Context) -> Result<()> {
    let mut seen: BTreeMap<_, u64> =
        drops(context)?.iter().map(|drop| (connection_key(drop), drop.packets)).collect();
    loop {
        thread::sleep(POLL_INTERVAL);
        let now = drops(context)?;
        for drop in now.iter().rev() {
            let before = seen.insert(connection_key(drop), drop.packets).unwrap_or(0);
            // The daemon forgets old connections; a new count starts at 0.
            let more = if drop.packets < before { drop.packets } else { drop.packets - before };
            if more == 0 {
                continue;
            }
            let grown = PolicyDrop { packets: more, ..drop.clone() };
            let text = match context.output {
                Output::Table | Output::Wide => line(&grown),
                Output::Json => json_text(serde_json::to_string(&grown))?,
                Output::Yaml => yaml_text(&grown)?,
            };
            if let ControlFlow::Break(()) = write_out(&text)? {
                return Ok(());
            }
        }
    }
}

fn describe_endpoint(address: std::net::IpAddr, endpoint: Option<&String>) -> String {
    endpoint.map_or_else(|| address.to_string(), |name| format!("{name} ({address})"))
}

fn port(drop: &PolicyDrop) -> String {
    drop.port.map_or_else(|| drop.protocol.clone(), |port| format!("{} {port}", drop.protocol))
}

fn line(drop: &PolicyDrop) -> String {
    let text = format!(
        "{} to {} {}: {} packets refused for {} by {}",
        describe_endpoint(drop.from, drop.from_endpoint.as_ref()),
        describe_endpoint(drop.to, drop.to_endpoint.as_ref()),
        port(drop),
        drop.packets,
        drop.direction,
        comma_separated(&drop.policies)
    );
    printable(&text) + "\n"
}

fn render_drops(drops: &[PolicyDrop]) -> String {
    TextTable::new()
        .column("LAST", drops.iter().map(|drop| millis(drop.last_ms)))
        .column("FROM", drops.iter().map(|drop| describe_endpoint(drop.from, drop.from_endpoint.as_ref())))
        .column("TO", drops.iter().map(|drop| describe_endpoint(drop.to, drop.to_endpoint.as_ref())))
        .column("PROTOCOL", drops.iter().map(|drop| &drop.protocol))
        .column("PORT", drops.iter().map(|drop| optional(drop.port)))
        .column("PACKETS", drops.iter().map(|drop| drop.packets))
        .column("DIRECTION", drops.iter().map(|drop| &drop.direction))
        .column("POLICIES", drops.iter().map(|drop| comma_separated(&drop.policies)))
        .render()
}

/// Returns the namespace, or the tier and the priority of a ClusterNetworkPolicy.
fn namespace(row: &PolicyRow) -> String {
    match (&row.tier, row.priority) {
        (Some(tier), Some(priority)) => format!("<{tier} {priority}>"),
        _ => row.namespace.clone(),
    }
}

fn render_rows(rows: &[PolicyRow], output: Output) -> String {
    let all =
        |row: &PolicyRow| if row.selects.is_empty() { "all pods".to_owned() } else { row.selects.clone() };
    let table = TextTable::new()
        .column("NAMESPACE", rows.iter().map(namespace))
        .column("NAME", rows.iter().map(|row| &row.name))
        .column("SELECTS", rows.iter().map(all))
        .column("ISOLATES", rows.iter().map(|row| comma_separated(&row.isolates)))
        .column("ENDPOINTS", rows.iter().map(|row| row.endpoints))
        .column("REFUSED", rows.iter().map(|row| row.refused));
    match output {
        Output::Wide => table.column("RULES", rows.iter().map(|row| row.rules.join("; "))).render(),
        Output::Table | Output::Json | Output::Yaml => table.render(),
    }
}

fn render_judgement(judgement: &PolicyJudgement) -> String {
    let word = if judgement.passes { "passes" } else { "is refused" };
    let text = format!("{} to {} {word}", judgement.from, judgement.to);
    let mut lines = printable(&text) + "\n";
    for (direction, side) in [("egress", &judgement.egress), ("ingress", &judgement.ingress)] {
        let word = if side.passes { "passes" } else { "refused" };
        lines += &format!("  {direction:7}  {word:7}  {}\n", printable(&side.why));
    }
    lines
}

#[cfg(test)]
mod tests {
    use ovl_control::PolicySide;

    use super::*;

    #[test]
    fn judgement_names_source_and_destination() {
        let side =
            |passes, why: &str| PolicySide { passes, policies: Vec::new(), rule: None, why: why.to_owned() };
        let judgement = PolicyJudgement {
            from: [10, 0, 0, 1].into(),
            to: [10, 0, 0, 2].into(),
            passes: false,
            egress: side(true, "no policy isolates default/web for egress"),
            ingress: side(false, "default/db is isolated"),
        };
        assert_eq!(
            render_judgement(&judgement),
            "10.0.0.1 to 10.0.0.2 is refused\n  egress   passes   no policy isolates default/web for egress\n  \
             ingress  refused  default/db is isolated\n"
        );
    }

    #[test]
    fn refused_connection_is_rendered_as_row_and_as_line() {
        let drop = PolicyDrop {
            direction: "ingress".into(),
            from: [10, 0, 0, 1].into(),
            from_endpoint: Some("default/web".into()),
            to: [10, 0, 0, 2].into(),
            to_endpoint: Some("default/db".into()),
            protocol: "TCP".into(),
            port: Some(5432),
            packets: 3,
            last_ms: 1200,
            policies: vec!["default/db-allow-api-only".into()],
        };
        assert_eq!(
            line(&drop),
            "default/web (10.0.0.1) to default/db (10.0.0.2) TCP 5432: 3 packets refused for ingress by \
             default/db-allow-api-only\n"
        );
        assert_eq!(
            render_drops(&[drop]),
            "\
LAST  FROM                    TO                     PROTOCOL  PORT  PACKETS  DIRECTION  POLICIES
1s    default/web (10.0.0.1)  default/db (10.0.0.2)  TCP       5432  3        ingress    default/db-allow-api-only
"
        );
    }
}
