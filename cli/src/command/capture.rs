//! `ovlctl capture`: captures packets of endpoints, networks, Services and pairs of hosts.
//!
//! | module | content |
//! | --- | --- |
//! | [`program`] | filters, compiled by tcpdump |
//! | [`merge`] | packets of several hosts in the order of their times, with what dropped them |
//! | [`decode`] | packets in words |
//! | [`pcapng`] | files |

mod decode;
mod merge;
mod pcapng;
mod program;

use std::collections::{BTreeMap, BTreeSet};
use std::fs::OpenOptions;
use std::io::{self, Write as _};
use std::net::IpAddr;
use std::ops::ControlFlow;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use ovl_control::{CapturePlan, CaptureRequest, CaptureTarget, Client, Reply, Request};
use ovl_proto::capture::MAX_SNAPLEN;
use signal_hook::consts::{SIGINT, SIGTERM};

use crate::context::{Context, write_out};
use crate::error::{Error, Result};
use crate::text::{plural, printable};

use self::decode::Decoded;
use self::merge::{Merge, Merged};
use self::pcapng::Writer;

/// The number of bytes of a packet that are kept if they are shown and not written.
const SHOWN: u32 = 256;
/// The longest time without a word of ovld, which passes something on every tenth of a second.
const SILENT: Duration = Duration::from_secs(15);
/// How long a capture that the user ends waits for what hosts have captured until then.
const LINGERS: Duration = Duration::from_secs(1);
/// The maximum number of names that are remembered.
const MOST_NAMES: usize = 65_536;

/// Arguments of `capture`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// An endpoint, a network or a Service, as NAME or NAMESPACE/NAME; endpoint:NAME, network:NAME or service:NAME where a name
    /// is that of several; HOST,HOST for what passes between two hosts
    #[arg(value_name = "ENDPOINT|NETWORK|SERVICE|HOST,HOST", value_parser = parse_what)]
    what: CaptureTarget,
    /// A filter as tcpdump takes it, such as tcp port 80: pcap-filter(7). It needs tcpdump
    #[arg(value_name = "FILTER")]
    filter: Vec<String>,
    #[command(flatten)]
    limits: Limits,
}

/// Where captured packets go, and when a capture ends.
#[derive(Debug, Clone, clap::Args)]
pub(crate) struct Limits {
    /// Write the packets to this file in pcapng format; - is standard output
    #[arg(short, long, value_name = "FILE")]
    write: Option<PathBuf>,
    /// End after this many packets
    #[arg(short, long, value_name = "COUNT", value_parser = clap::value_parser!(u64).range(1..))]
    count: Option<u64>,
    /// End after this time
    #[arg(long, value_name = "TIME", default_value = "1h", value_parser = humantime::parse_duration)]
    duration: Duration,
    /// Keep at most this many bytes of each packet [default: 65553, or 256 without -w]
    #[arg(short, long, value_name = "BYTES", value_parser = clap::value_parser!(u32).range(1..=i64::from(MAX_SNAPLEN)))]
    snaplen: Option<u32>,
    /// Show addresses instead of names
    #[arg(short = 'n', long)]
    numeric: bool,
}

impl Limits {
    /// Shows packets until the user ends it.
    pub(crate) fn shown() -> Self {
        Self { write: None, count: None, duration: Duration::from_secs(3600), snaplen: None, numeric: false }
    }
}

fn parse_what(text: &str) -> std::result::Result<CaptureTarget, String> {
    if let Some((first, second)) = text.split_once(',') {
        let hosts = [first, second].map(str::to_owned);
        return match hosts.iter().any(String::is_empty) || second.contains(',') {
            true => Err("a pair of hosts is written HOST,HOST".to_owned()),
            false => Ok(CaptureTarget::Pair { hosts }),
        };
    }
    let named = |name: &str| Some(name.to_owned()).filter(|name| !name.is_empty());
    let target = match text.split_once(':') {
        Some(("endpoint", name)) => named(name).map(|name| CaptureTarget::Endpoint { name }),
        Some(("network", name)) => named(name).map(|name| CaptureTarget::Network { name }),
        Some(("service", name)) => named(name).map(|name| CaptureTarget::Service { name }),
        _ => named(text).map(|name| CaptureTarget::Any { name }),
    };
    target.ok_or_else(|| "a name is missing".to_owned())
}

/// Runs the command.
pub(crate) fn run(context: &Context, args: Args) -> Result<()> {
    let Args { what, filter, limits } = args;
    capture(context, what, &filter.join(" "), &limits)
}

/// Captures until the limits are reached, the user ends it, or all hosts have ended.
pub(crate) fn capture(context: &Context, target: CaptureTarget, filter: &str, limits: &Limits) -> Result<()> {
    let plan = match context.request(&Request::CapturePlan { target: target.clone() })? {
        Reply::CapturePlan(plan) => *plan,
        _ => return Err(Error::unexpected_reply()),
    };
    let default = if limits.write.is_some() { MAX_SNAPLEN } else { SHOWN };
    let snaplen = limits.snaplen.unwrap_or(default);
    let programs = program::programs(&plan, filter, snaplen)?;
    let seconds = u32::try_from(limits.duration.as_secs().max(1)).unwrap_or(u32::MAX);
    let request = Request::Capture(CaptureRequest { target, programs, snaplen, seconds });
    let stop = Arc::new(AtomicBool::new(false));
    for signal in [SIGINT, SIGTERM] {
        // A second signal ends ovlctl at once, if it hangs.
        signal_hook::flag::register_conditional_shutdown(signal, 1, Arc::clone(&stop))
            .and_then(|_| signal_hook::flag::register(signal, Arc::clone(&stop)))
            .map_err(|error| Error::Failed(format!("cannot handle signals: {error}")))?;
    }
    let mut out = Out::open(context, &plan, limits)?;
    let failed = |error| Error::request_failed(error, SILENT.as_secs());
    let mut client = Client::connect(&context.socket, Some(SILENT)).map_err(failed)?;
    let mut merge = Merge::new(&plan.hosts);
    let mut reply = client.request(&request).map_err(failed)?;
    say(&format!("capturing {} on {}; end with Ctrl-C", plan.what, plan.hosts.join(", ")));
    // What was there when the user ended it is captured, although hosts tell it a little later.
    let mut ends: Option<(u64, Instant)> = None;
    let result = loop {
        if stop.load(Ordering::Relaxed) {
            ends = ends.or_else(|| Some((now_ns(), Instant::now())));
        }
        let Reply::Captured(from) = reply else { break Err(Error::unexpected_reply()) };
        for note in merge.push(*from) {
            say(&note);
        }
        let is_ended = ends.is_some_and(|(at, since)| merge.is_past(at) || since.elapsed() > LINGERS);
        if out.put(merge.ready())?.is_break() || is_ended || merge.is_over() {
            break Ok(());
        }
        match client.next_reply() {
            Ok(next) => reply = next,
            Err(error) => break Err(failed(error)),
        }
    };
    // What ovld has said is kept, however it ended.
    let _ = out.put(merge.rest())?;
    out.finish()?;
    let lost = merge.lost();
    let lost = if lost > 0 {
        format!("; {lost} more were lost, because there were too many")
    } else {
        String::new()
    };
    say(&format!("{} captured{lost}", plural(out.written, "packet")));
    result
}

/// The time, as hosts stamp packets: nanoseconds since 1970.
fn now_ns() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_nanos()).unwrap_or(u64::MAX)
}

/// Writes a note to standard error, where it does not mix with packets.
fn say(text: &str) {
    // Not eprintln!: it panics if standard error is closed.
    let _ = writeln!(io::stderr(), "{}", printable(text));
}

/// Where packets go.
struct Out<'a> {
    context: &'a Context,
    writer: Option<Writer<Box<dyn io::Write>>>,
    vxlan_ports: BTreeSet<u16>,
    names: BTreeMap<IpAddr, Option<String>>,
    numeric: bool,
    written: u64,
    count: Option<u64>,
}

impl<'a> Out<'a> {
    fn open(context: &'a Context, plan: &CapturePlan, limits: &Limits) -> Result<Self> {
        let writer = match &limits.write {
            None => None,
            Some(path) => {
                let file: Box<dyn io::Write> = match path == Path::new("-") {
                    true => Box::new(io::stdout()),
                    // Packets have what others said: the file is for its owner alone.
                    false => Box::new(
                        OpenOptions::new()
                            .write(true)
                            .create(true)
                            .truncate(true)
                            .mode(0o600)
                            .open(path)
                            .map_err(|error| {
                                Error::Failed(format!("cannot write {}: {error}", path.display()))
                            })?,
                    ),
                };
                Some(Writer::new(file, &plan.what).map_err(|error| broken(&error))?)
            }
        };
        let carried = plan.scopes.iter().flat_map(|scope| &scope.carries).map(|carried| carried.port);
        Ok(Self {
            context,
            writer,
            vxlan_ports: carried
                .chain([ovl_proto::DEFAULT_VXLAN_PORT, ovl_proto::SEALED_VXLAN_PORT])
                .collect(),
            names: BTreeMap::new(),
            numeric: limits.numeric,
            written: 0,
            count: limits.count,
        })
    }

    /// Writes packets. Breaks if that were enough, or if no reader is left.
    fn put(&mut self, packets: Vec<Merged>) -> Result<ControlFlow<()>> {
        if packets.is_empty() {
            return Ok(ControlFlow::Continue(()));
        }
        let decoded: Vec<Decoded> = packets
            .iter()
            .map(|merged| decode::decode(&merged.packet.bytes, merged.point.link, &self.vxlan_ports))
            .collect();
        let found = self.find_names(&decoded);
        if let Some(writer) = &mut self.writer
            && let Err(error) = writer.names(&found)
        {
            return ended(&error);
        }
        let mut text = String::new();
        let mut flow = ControlFlow::Continue(());
        for (merged, decoded) in packets.iter().zip(&decoded) {
            if self.count.is_some_and(|count| self.written >= count) {
                flow = ControlFlow::Break(());
                break;
            }
            match &mut self.writer {
                Some(writer) => {
                    if let Err(error) = writer.packet(merged) {
                        return ended(&error);
                    }
                }
                None => text += &decode::line(merged, decoded, |address| self.name(address)),
            }
            self.written += 1;
        }
        if self.count.is_some_and(|count| self.written >= count) {
            flow = ControlFlow::Break(());
        }
        match &mut self.writer {
            Some(writer) => match writer.flush() {
                Ok(()) => Ok(flow),
                Err(error) => ended(&error),
            },
            None => Ok(if write_out(&text)?.is_break() { ControlFlow::Break(()) } else { flow }),
        }
    }

    /// Asks ovld for the names of addresses that are new, and returns those that it knows.
    fn find_names(&mut self, decoded: &[Decoded]) -> BTreeMap<IpAddr, String> {
        if self.numeric || self.names.len() > MOST_NAMES {
            return BTreeMap::new();
        }
        let all = decoded.iter().flat_map(|decoded| decoded.addresses());
        let new: BTreeSet<IpAddr> = all.filter(|address| !self.names.contains_key(address)).collect();
        if new.is_empty() {
            return BTreeMap::new();
        }
        let addresses: Vec<IpAddr> = new.into_iter().take(ovl_control::MAX_NAMES).collect();
        let found = match self.context.request(&Request::NamesOf { addresses: addresses.clone() }) {
            Ok(Reply::Names(found)) => found,
            // Packets are worth more than names.
            _ => BTreeMap::new(),
        };
        self.names.extend(addresses.into_iter().map(|address| (address, found.get(&address).cloned())));
        found
    }

    fn name(&self, address: IpAddr) -> String {
        self.names.get(&address).cloned().flatten().unwrap_or_else(|| address.to_string())
    }

    fn finish(&mut self) -> Result<()> {
        match &mut self.writer {
            Some(writer) => writer.flush().or_else(|error| ended(&error).map(drop)),
            None => Ok(()),
        }
    }
}

fn broken(error: &io::Error) -> Error {
    Error::Failed(format!("cannot write the packets: {error}. Is the disk full?"))
}

/// What an error of writing means: a reader that has closed its pipe has enough.
fn ended(error: &io::Error) -> Result<ControlFlow<()>> {
    match error.kind() {
        io::ErrorKind::BrokenPipe => Ok(ControlFlow::Break(())),
        _ => Err(broken(error)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn targets_are_named() {
        let name = || "a".to_owned();
        assert_eq!(parse_what("a"), Ok(CaptureTarget::Any { name: name() }));
        assert_eq!(parse_what("endpoint:a"), Ok(CaptureTarget::Endpoint { name: name() }));
        assert_eq!(parse_what("network:a"), Ok(CaptureTarget::Network { name: name() }));
        assert_eq!(parse_what("service:a"), Ok(CaptureTarget::Service { name: name() }));
        assert_eq!(parse_what("fd00::1"), Ok(CaptureTarget::Any { name: "fd00::1".to_owned() }));
        let hosts = ["h1".to_owned(), "h2".to_owned()];
        assert_eq!(parse_what("h1,h2"), Ok(CaptureTarget::Pair { hosts }));
        for wrong in ["", "h1,", "h1,h2,h3", "network:"] {
            assert!(parse_what(wrong).is_err(), "{wrong}");
        }
    }
}
