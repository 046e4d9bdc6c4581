//! `ovlctl events`: shows recent events.

use std::ops::ControlFlow;

use ovl_control::{Client, ClientError, Event, Reply, Request};
use ovl_proto::clock::timestamp;

use crate::args::Output;
use crate::context::{Context, json_text, write_out, yaml_text};
use crate::error::{Error, Result};
use crate::text::printable;

/// Arguments of `events`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Print new events as they occur
    #[arg(short, long)]
    follow: bool,
}

/// Prints the recent events, or follows them.
pub(crate) fn run(context: &Context, args: &Args) -> Result<()> {
    if args.follow {
        return follow(context);
    }
    let events = events(context.request(&Request::Events { follow: false })?)?;
    context.print(&events, |events| events.iter().map(line).collect())
}

/// Prints events as they occur, until the reader closes the pipe.
///
/// # Errors
///
/// If the connection to the daemon ends.
fn follow(context: &Context) -> Result<()> {
    // No timeout: the next event may be a day away.
    let failed = |error: ClientError| Error::request_failed(error, 0);
    let mut client = Client::connect(&context.socket, None).map_err(failed)?;
    let mut reply = client.request(&Request::Events { follow: true }).map_err(failed)?;
    loop {
        for event in events(reply)? {
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
