//! `ovlctl top`: hosts, endpoints, networks and flows as they are, live in the terminal or once.

mod flows;
mod rows;
mod screen;

use std::io::IsTerminal as _;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{self, Receiver};
use std::thread;
use std::time::{Duration, Instant};

use ovl_control::{Client, ClientError, Flows, FlowsOf, Reply, Request};
use ratatui::crossterm::event::{self, Event, KeyEventKind};

use self::flows::{FlowRow, FlowTable};
use self::rows::{Rows, Sample};
use self::screen::{Screen, View, Wish};
use crate::args::Output;
use crate::context::Context;
use crate::error::{Error, Result};

/// Time for a reply of ovld, which waits for other hosts for 1.5 s.
const REPLY_WITHIN: Duration = Duration::from_secs(30);
/// Time after which the program looks for a new sample while no key is pressed.
const KEY_WITHIN: Duration = Duration::from_millis(100);
/// Time until ovld is asked for flows again after it refused or went away.
const AGAIN: Duration = Duration::from_secs(2);

/// Arguments of `top`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// What to list first
    #[arg(value_enum, default_value = "hosts")]
    view: View,
    /// Print one table and exit, as do the formats other than `table`
    #[arg(long)]
    once: bool,
    /// Seconds between two looks
    #[arg(long, value_name = "SECONDS", default_value = "2", value_parser = clap::value_parser!(u8).range(1..=60))]
    interval: u8,
}

/// Shows the cluster until `q` is pressed, or once.
pub(crate) fn run(context: &Context, args: &Args) -> Result<()> {
    let interval = Duration::from_secs(args.interval.into());
    if args.once || !matches!(context.output, Output::Table | Output::Wide) {
        return print_once(context, args.view, interval);
    }
    if !std::io::stdout().is_terminal() {
        return Err(Error::Usage("the output is not a terminal: use --once, or -o json".to_owned()));
    }
    watch(&context.socket, args.view, interval)
}

/// Prints what two samples say.
fn print_once(context: &Context, view: View, interval: Duration) -> Result<()> {
    let failed = |error| Error::request_failed(error, REPLY_WITHIN.as_secs());
    let mut client = Client::connect(&context.socket, Some(REPLY_WITHIN)).map_err(failed)?;
    let before = sample(&mut client)?;
    let mut flows = Vec::new();
    if view == View::Flows {
        // Flows are counted only for those that ask for them.
        flows = flows_within(&context.socket, interval)?;
    } else {
        thread::sleep(interval);
    }
    let rows = Rows { flows, ..Rows::new(Some(&before), &sample(&mut client)?) };
    context.print(&rows, |rows| Screen::new(view).text(rows))
}

/// Asks for the flows of all hosts, until the client is dropped.
fn follow(socket: &Path) -> Result<(Client, Flows)> {
    let failed = |error| Error::request_failed(error, REPLY_WITHIN.as_secs());
    let mut client = Client::connect(socket, Some(REPLY_WITHIN)).map_err(failed)?;
    match client.request(&Request::Flows { follow: true, of: FlowsOf::All }).map_err(failed)? {
        Reply::Flows(flows) => Ok((client, *flows)),
        _ => Err(Error::unexpected_reply()),
    }
}

fn next(client: &mut Client) -> Result<Flows> {
    match client.next_reply().map_err(|error| Error::request_failed(error, REPLY_WITHIN.as_secs()))? {
        Reply::Flows(flows) => Ok(*flows),
        _ => Err(Error::unexpected_reply()),
    }
}

/// Returns what is seen within a time.
fn flows_within(socket: &Path, time: Duration) -> Result<Vec<FlowRow>> {
    let (mut client, first) = follow(socket)?;
    let (begun, mut table) = (Instant::now(), FlowTable::default());
    table.take(first, begun);
    while begun.elapsed() < time {
        table.take(next(&mut client)?, Instant::now());
    }
    Ok(table.rows().0)
}

/// Follows flows in a thread of its own. It ends with the receiver.
fn take_flows(socket: &Path) -> Receiver<Result<Flows>> {
    let (tell, all) = mpsc::sync_channel(16);
    let socket: PathBuf = socket.to_owned();
    thread::spawn(move || {
        loop {
            let followed = follow(&socket).and_then(|(mut client, first)| {
                let mut flows = first;
                while tell.send(Ok(flows)).is_ok() {
                    flows = next(&mut client)?;
                }
                Ok(())
            });
            match followed {
                Ok(()) => return,
                Err(error) => {
                    if tell.send(Err(error)).is_err() {
                        return;
                    }
                    thread::sleep(AGAIN);
                }
            }
        }
    });
    all
}

fn sample(client: &mut Client) -> Result<Sample> {
    let failed = |error: ClientError| Error::request_failed(error, REPLY_WITHIN.as_secs());
    let Reply::Overview(overview) = client.request(&Request::Overview).map_err(failed)? else {
        return Err(Error::unexpected_reply());
    };
    let Reply::Reports(reports) = client.request(&Request::Reports).map_err(failed)? else {
        return Err(Error::unexpected_reply());
    };
    Ok(Sample { overview: *overview, reports })
}

/// Takes a sample every interval, in a thread of its own, so that a slow answer does not stop the keys. It ends with the
/// receiver.
fn take_samples(socket: &Path, interval: Duration) -> Receiver<Result<Sample>> {
    let (tell, samples) = mpsc::sync_channel(1);
    let socket: PathBuf = socket.to_owned();
    thread::spawn(move || {
        let mut client = None;
        loop {
            let taken = match client.take() {
                Some(client) => Ok(client),
                None => Client::connect(&socket, Some(REPLY_WITHIN))
                    .map_err(|error| Error::request_failed(error, REPLY_WITHIN.as_secs())),
            };
            let taken = taken.and_then(|mut connected| {
                let taken = sample(&mut connected)?;
                client = Some(connected);
                Ok(taken)
            });
            if tell.send(taken).is_err() {
                return;
            }
            thread::sleep(interval);
        }
    });
    samples
}

/// Shows the cluster until `q` is pressed.
fn watch(socket: &Path, view: View, interval: Duration) -> Result<()> {
    let samples = take_samples(socket, interval);
    let failed = |error: std::io::Error| Error::output(&error);
    let mut terminal = ratatui::try_init().map_err(failed)?;
    let result = (|| {
        let mut screen = Screen::new(view);
        let mut rows = Rows::default();
        let mut note = "connecting to ovld".to_owned();
        let mut last: Option<Sample> = None;
        let mut flows: Option<(Receiver<Result<Flows>>, FlowTable)> = None;
        loop {
            // Hosts count flows only while they are shown.
            flows = match flows.take().filter(|_| screen.shows_flows()) {
                None if screen.shows_flows() => Some((take_flows(socket), FlowTable::default())),
                flows => flows,
            };
            for taken in samples.try_iter() {
                match taken {
                    Ok(sample) => {
                        let flows = std::mem::take(&mut rows.flows);
                        rows = Rows { flows, ..Rows::new(last.as_ref(), &sample) };
                        last = Some(sample);
                        note.clear();
                    }
                    Err(error) => note = error.to_string(),
                }
            }
            if let Some((told, table)) = &mut flows {
                for taken in told.try_iter() {
                    match taken {
                        Ok(seen) => {
                            table.take(seen, Instant::now());
                            (rows.flows, note) = table.rows();
                        }
                        Err(error) => note = error.to_string(),
                    }
                }
            }
            terminal.draw(|frame| screen.draw(frame, &rows, &note))?;
            if event::poll(KEY_WITHIN)?
                && let Event::Key(key) = event::read()?
                && key.kind == KeyEventKind::Press
                && screen.key(key, &rows) == Wish::Quit
            {
                return Ok(());
            }
        }
    })();
    ratatui::restore();
    result.map_err(failed)
}
