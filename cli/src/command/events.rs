//! `ovlctl events`: shows recent events.

use std::ops::ControlFlow;

use ovl_control::{Client, ClientError, Event, Reply, Request};
use ovl_proto::clock::timestamp;

use crate::args::Output;
use crate::context::{Context, json_text, write_out, yaml_text};
use crate::error::{Error, Result};
use crate::text::printable;
use crate::time::{Moment, moment};

/// Arguments of `events`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Print new events as they occur
    #[arg(short, long)]
    follow: bool,
    /// Only events since then: 03:10, "2026-03-01 03:10" (UTC), or 10m for ten minutes ago
    #[arg(long, value_name = "TIME", value_parser = moment)]
    since: Option<Moment>,
    /// Only events until then
    #[arg(long, value_name = "TIME", value_parser = moment, conflicts_with = "follow")]
    until: Option<Moment>,
}

/// Prints the recent events, or follows them.
pub(crate) fn run(context: &Context, args: &Args) -> Result<()> {
    let since_ms = args.since.map(|since| since.ms);
    if args.follow {
        return follow(context, since_ms);
    }
    let until_ms = args.until.map(|until| until.end_of(args.since)).transpose();
    let until_ms = until_ms.map_err(Error::Usage)?;
    let request = Request::Events { follow: false, since_ms, until_ms };
    let events = events(context.request(&request)?)?;
    context.print(&events, |events| events.iter().map(line).collect())
}

/// Prints the latest events since a time, and then events as they occur, until the reader closes the pipe.
///
/// # Errors
///
/// If the connection to the daemon ends.
fn follow(context: &Context, since: Option<u64>) -> Result<()> {
    // No timeout: the next event may be a day away.
    let failed = |error: ClientError| Error::request_failed(error, 0);
    let mut client = Client::connect(&context.socket, None).map_err(failed)?;
    let mut reply =
        client.request(&Request::Events { follow: true, since_ms: None, until_ms: None }).map_err(failed)?;
    loop {
        for event in
            events(reply)?.into_iter().filter(|event| since.is_none_or(|since| since <= event.time_ms))
        {
            let text = match context.output {
                Output::Table | Output::Wide => line(&event),
                // A stream cannot be an array, so print one object per line.
                Output::Json => json_text(serde_json::to_string(&event))?,
                Output::Yaml => yaml_text(&event)?,
            };
            if let ControlFlow::Break(()) = write_out(&text)? {
                return Ok(());
            }
        }
        reply = client.next_reply().map_err(failed)?;
    }
}

fn events(reply: Reply) -> Result<Vec<Event>> {
    let Reply::Events(events) = reply else { return Err(Error::unexpected_reply()) };
    Ok(events)
}

/// Renders an event as one line. The kind has a fixed width, so that lines of a stream align too.
fn line(event: &Event) -> String {
    let (kind, object, message) =
        (printable(&event.kind), printable(&event.object), printable(&event.message));
    format!("{}  {kind:8}  {object}  {message}\n", timestamp(event.time_ms))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn event_is_rendered_as_one_line() {
        let event = Event {
            time_ms: 1_735_689_599_007,
            kind: "peer".into(),
            object: "host2".into(),
            message: "is suspect:\nno gossip for 4s".into(),
        };
        assert_eq!(
            line(&event),
            "2024-12-31T23:59:59.007Z  peer      host2  is suspect:\\nno gossip for 4s\n"
        );
    }
}
