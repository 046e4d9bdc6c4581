//! `ovlctl trace`: follows a packet from one end to the other.

use std::process::ExitCode;

use ovl_control::{
    CaptureTarget, Reply, Request, Trace, TraceHop, TraceRequest, TraceSeen, TraceStage, TraceState,
    TraceVerdict,
};

use super::capture::{Limits, capture};
use super::target::{Target, parse_target};
use crate::args::Output;
use crate::context::Context;
use crate::error::{Error, Result};
use crate::text::printable;

/// The width of the output that is aimed at, in characters. Only addresses and commands are longer.
const WIDTH: usize = 96;
/// The width of the columns before the details: host, stage, model and probe.
const BEFORE: usize = 8 + 1 + 14 + 1 + 6 + 1 + 8 + 1;

/// Arguments of `trace`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// The sender: an endpoint of any host, as NAME or NAMESPACE/NAME or by an address; `host` or the name of a host
    from: String,
    /// The destination and its port: an endpoint, a Service, a host, a name in DNS or an address, such as db:5432,
    /// shop/db:53/udp, [fd00::9]:80, 192.0.2.1; without a port by ICMP
    #[arg(value_name = "TO[:PORT[/PROTO]]", value_parser = parse_target)]
    to: Target,
    /// Say what should happen, and send no packet
    #[arg(long)]
    no_probe: bool,
    /// Watch what passes between the two at both ends, and send no packet. It needs tcpdump
    #[arg(long, conflicts_with = "no_probe")]
    follow: bool,
}

/// Runs the command. Exit status 1 if the packet does not arrive.
pub(crate) fn run(context: &Context, args: Args) -> Result<ExitCode> {
    let Args { from, to: Target { to, port, protocol }, no_probe, follow } = args;
    if follow {
        let target = CaptureTarget::Flow { from, to, port, protocol };
        capture(context, target, "", &Limits::shown())?;
        return Ok(ExitCode::SUCCESS);
    }
    let request = Request::Trace(TraceRequest { from, to, port, protocol, no_probe });
    let Reply::Trace(trace) = context.request(&request)? else {
        return Err(Error::unexpected_reply());
    };
    context.print(&trace, |trace| render(trace, context.output))?;
    Ok(if trace.arrived { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn render(trace: &Trace, output: Output) -> String {
    let Trace { from, to, protocol, arrived, reason, advice, limited, .. } = trace;
    let Trace { model, probe, agree, backend, hops, notes, .. } = trace;
    let mut text = format!("{}\n\n", printable(&format!("{from} to {to}, {protocol}")));
    text += &format!(
        "{:8} {:14} {:6} {:8} {}\n",
        "HOST", "HOP", "MODEL", "PROBE", "WHAT, AND THE COMMAND THAT SHOWS IT"
    );
    for hop in hops {
        text += &render_hop(hop, output);
    }
    text.push('\n');
    let mut say = |key: &str, value: &str| {
        for (n, line) in wrapped(&printable(value), WIDTH - 11).into_iter().enumerate() {
            let key = if n == 0 { key } else { "" };
            text += &format!("{key:<10} {line}\n");
        }
    };
    say("arrived", if *arrived { "yes" } else { "no" });
    if let Some(reason) = reason {
        say("reason", reason);
    }
    if let Some(advice) = advice {
        say("do", advice);
    }
    if let Some(limited) = limited {
        say("but", limited);
    }
    if let Some(backend) = backend {
        say("backend", &backend.to_string());
    }
    say("model", &verdict(model));
    if let Some(probe) = probe {
        say("probe", &verdict(probe));
    }
    if !agree {
        say(
            "disagree",
            "the model does not know what the probe met, such as a rule of another program. If there is none, report \
             it with `ovlctl bugreport`",
        );
    }
    for note in notes {
        say("note", note);
    }
    text
}

fn verdict(verdict: &TraceVerdict) -> String {
    let word = match verdict.arrives {
        Some(true) => "arrives",
        Some(false) => "does not arrive",
        None => "not known",
    };
    format!("{word}: {}", verdict.why)
}

fn render_hop(hop: &TraceHop, output: Output) -> String {
    let TraceHop { host, stage, model, probe, detail, command } = hop;
    let model = match model {
        TraceState::Passes => "ok",
        TraceState::Stops => "STOPS",
        TraceState::Unknown => "?",
    };
    let probe = match probe {
        None => "-".to_owned(),
        Some(TraceSeen { seen: false, .. }) => "not seen".to_owned(),
        Some(TraceSeen { seen: true, after_us: None }) => "seen".to_owned(),
        Some(TraceSeen { seen: true, after_us: Some(us) }) => {
            format!("+{}.{:02}ms", us / 1000, us % 1000 / 10)
        }
    };
    let width = if output == Output::Wide { usize::MAX } else { WIDTH - BEFORE };
    let mut lines = wrapped(&printable(detail), width).into_iter();
    let first = lines.next().unwrap_or_default();
    let mut text = format!("{:8} {:14} {model:6} {probe:8} {first}\n", printable(host), name(*stage));
    for line in lines {
        text += &format!("{:BEFORE$}{line}\n", "");
    }
    text + &format!("{:BEFORE$}$ {}\n", "", printable(command))
}

/// Breaks a text at spaces into lines of at most `width` characters. A longer word has a line of its own.
fn wrapped(text: &str, width: usize) -> Vec<String> {
    let mut lines = vec![String::new()];
    for word in text.split(' ') {
        match lines.last_mut() {
            Some(line) if line.is_empty() => line.push_str(word),
            Some(line) if line.chars().count() + 1 + word.chars().count() <= width => {
                line.push(' ');
                line.push_str(word);
            }
            _ => lines.push(word.to_owned()),
        }
    }
    lines
}

fn name(stage: TraceStage) -> &'static str {
    match stage {
        TraceStage::Sender => "sender",
        TraceStage::Name => "name",
        TraceStage::SourceCheck => "source check",
        TraceStage::Service => "service",
        TraceStage::EgressPolicy => "egress policy",
        TraceStage::Isolation => "isolation",
        TraceStage::Route => "route",
        TraceStage::Neighbour => "neighbour",
        TraceStage::Fdb => "fdb",
        TraceStage::Leaves => "leaves",
        TraceStage::Host => "host",
        TraceStage::Enters => "enters",
        TraceStage::Decapsulated => "decapsulated",
        TraceStage::PublishedPort => "published port",
        TraceStage::IngressPolicy => "ingress policy",
        TraceStage::Delivery => "delivery",
        TraceStage::Destination => "destination",
        TraceStage::Answer => "answer",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn trace_fits_a_terminal_and_escapes_what_hosts_say() {
        let hop = |stage, model, seen: Option<bool>, detail: &str| TraceHop {
            host: "h1".to_owned(),
            stage,
            model,
            probe: seen.map(|seen| TraceSeen { seen, after_us: seen.then_some(1234) }),
            detail: detail.to_owned(),
            command: "bridge fdb show dev ovx-abcdefgh".to_owned(),
        };
        let trace = Trace {
            from: "default/a (10.1.0.1) on h1".to_owned(),
            to: "default/b (10.1.0.9) on h2".to_owned(),
            protocol: "tcp/80".to_owned(),
            arrived: false,
            reason: Some("a \u{1b}[2J reason".to_owned()),
            advice: Some("do something ".repeat(12)),
            limited: Some("large packets are lost".to_owned()),
            model: TraceVerdict { arrives: Some(false), why: "ends on h1".to_owned() },
            probe: Some(TraceVerdict { arrives: Some(true), why: "answered".to_owned() }),
            agree: false,
            backend: None,
            hops: vec![
                hop(TraceStage::Fdb, TraceState::Passes, Some(true), &"a long detail ".repeat(9)),
                hop(TraceStage::IngressPolicy, TraceState::Stops, None, "refused"),
                hop(TraceStage::Destination, TraceState::Unknown, Some(false), "what"),
            ],
            notes: Vec::new(),
        };
        let text = render(&trace, Output::Table);
        assert!(text.lines().all(|line| line.chars().count() <= 100), "{text}");
        assert!(!text.contains('\u{1b}'));
        for part in [
            "h1       fdb            ok     +1.23ms  a long detail",
            "h1       ingress policy STOPS  -        refused\n",
            "h1       destination    ?      not seen what\n",
            "$ bridge fdb show dev ovx-abcdefgh",
            "model      does not arrive: ends on h1\nprobe      arrives: answered\ndisagree ",
        ] {
            assert!(text.contains(part), "{part:?} is not in\n{text}");
        }
    }
}
