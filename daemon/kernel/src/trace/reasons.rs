//! Why the kernel dropped packets while a probe was on its way: the tracepoint `skb:kfree_skb`, if the host has tracefs.
//!
//! The tracepoint does not say which packet was dropped. What counts are reasons that follow within a moment after a
//! sighting of the probe, again for each time that it was sent: [`likely`].

use std::collections::BTreeMap;
use std::fs;
use std::io::Read as _;
use std::path::{Path, PathBuf};

use ovl_dataplane::passage::{PacketKind, Sighting};

use crate::sys;

/// Where tracefs is, on present and on older systems.
const PLACES: [&str; 2] = ["/sys/kernel/tracing", "/sys/kernel/debug/tracing"];
/// The prefix of the names of the instances of tracefs. The process follows, and the number of the trace: daemons of a lab share
/// a kernel, and the hosts of a trace its number.
const INSTANCE: &str = "ovl-trace-";
/// The length of the log that is read, in bytes.
const LONGEST: u64 = 1 << 20;
/// How long after a sighting a drop may be of the same packet, in microseconds.
const WITHIN_US: u64 = 500;
/// How often a reason must follow a sighting, so that it is not by chance.
const OFTEN: usize = 2;
/// Reasons that say nothing.
const EMPTY: [&str; 3] = ["NOT_SPECIFIED", "CONSUMED", "NOT_DROPPED_YET"];

/// An instance of tracefs that logs dropped packets. It is deleted when this is dropped; those that a killed daemon leaves are
/// deleted by [`remove_left`].
#[derive(Debug)]
pub(super) struct DropLog {
    dir: PathBuf,
    /// What is added to times of the log, in microseconds, to get those since 1970.
    offset_us: u64,
}

/// A line of the log.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Dropped<'a> {
    at_us: u64,
    reason: &'a str,
    location: &'a str,
}

impl DropLog {
    /// Begins to log. `None` if the host has no tracefs, or ovld may not use it.
    pub(super) fn begin(cookie: u32, now_us: u64) -> Option<Self> {
        let place =
            PLACES.iter().map(|place| Path::new(place).join("instances")).find(|place| place.is_dir())?;
        // Both clocks are read at once: to create an instance takes some milliseconds.
        let offset_us = now_us.saturating_sub(sys::monotonic_us()?);
        let dir = place.join(format!("{INSTANCE}{}-{cookie:08x}", std::process::id()));
        fs::create_dir(&dir).ok()?;
        let log = Self { dir, offset_us };
        fs::write(log.dir.join("trace_clock"), "mono").ok()?;
        fs::write(log.dir.join("events/skb/kfree_skb/enable"), "1").ok()?;
        Some(log)
    }

    /// Returns the likely reasons why a probe with these sightings was dropped, in words.
    pub(super) fn finish(self, sightings: &[Sighting]) -> Vec<String> {
        let mut text = String::new();
        let file = fs::File::open(self.dir.join("trace"));
        if file.and_then(|file| file.take(LONGEST).read_to_string(&mut text)).is_err() {
            return Vec::new();
        }
        let drops: Vec<Dropped<'_>> = text.lines().filter_map(|line| parse(line, self.offset_us)).collect();
        likely(&drops, sightings)
    }
}

impl Drop for DropLog {
    fn drop(&mut self) {
        let _ = fs::write(self.dir.join("events/skb/kfree_skb/enable"), "0");
        if let Err(error) = fs::remove_dir(&self.dir) {
            tracing::warn!(%error, dir = %self.dir.display(), "cannot delete an instance of tracefs");
        }
    }
}

/// Deletes what a daemon that was killed has left.
pub(super) fn remove_left() {
    for place in PLACES {
        let entries = fs::read_dir(Path::new(place).join("instances")).into_iter().flatten().flatten();
        for entry in entries.filter(|entry| is_left(&entry.file_name().to_string_lossy())) {
            let _ = fs::remove_dir(entry.path());
        }
    }
}

/// Whether an instance is of a process that is gone, or had the number of this one.
fn is_left(name: &str) -> bool {
    let Some((process, _)) = name.strip_prefix(INSTANCE).and_then(|rest| rest.split_once('-')) else {
        return false;
    };
    process == std::process::id().to_string() || !Path::new("/proc").join(process).exists()
}

/// Reads a line such as `ping-7 [001] b.s.. 12.345678: kfree_skb: skbaddr=... location=f+0x1/0x2 reason: NETFILTER_DROP`.
fn parse(line: &str, offset_us: u64) -> Option<Dropped<'_>> {
    let (before, event) = line.split_once(": kfree_skb: ")?;
    let (seconds, rest) = before.rsplit(' ').next()?.split_once('.')?;
    let at_us = seconds.parse::<u64>().ok()?.checked_mul(1_000_000)? + rest.get(..6)?.parse::<u64>().ok()?;
    let reason = event.rsplit_once("reason: ")?.1.trim();
    let location = event.split(' ').find_map(|word| word.strip_prefix("location="))?;
    let location = location.split('+').next().unwrap_or(location);
    Some(Dropped { at_us: at_us + offset_us, reason, location })
}

/// Returns the reasons that follow the sightings of a probe, again and again.
fn likely(drops: &[Dropped<'_>], sightings: &[Sighting]) -> Vec<String> {
    let probes: Vec<u64> =
        sightings.iter().filter(|seen| seen.kind == PacketKind::Probe).map(|seen| seen.at_us).collect();
    // The time of a sighting is when it was read, which may be later than when the packet was dropped.
    let near = |drop: &Dropped<'_>| probes.iter().position(|at| at.abs_diff(drop.at_us) <= WITHIN_US);
    let mut counted: BTreeMap<(&str, &str), std::collections::BTreeSet<u64>> = BTreeMap::new();
    for drop in drops.iter().filter(|drop| !EMPTY.contains(&drop.reason)) {
        if let Some(at) = near(drop).and_then(|n| probes.get(n)) {
            // Sightings of one packet are close together.
            counted.entry((drop.reason, drop.location)).or_default().insert(at / 100_000);
        }
    }
    let often = counted.into_iter().filter(|(_, times)| times.len() >= OFTEN);
    often.map(|((reason, location), _)| format!("{reason} in {location}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const LINE: &str = "          <idle>-0       [001] b.s..    12.345678: kfree_skb: skbaddr=00000000c0ffee rx_sk=0000000000000000 \
                        protocol=2048 location=ip_rcv_finish_core+0x1a2/0x3b0 reason: IP_RPFILTER";

    #[test]
    fn instances_of_other_daemons_are_left_alone() {
        let own = std::process::id();
        assert!(is_left(&format!("{INSTANCE}{own}-0badcafe")) && is_left("ovl-trace-4194305-0badcafe"));
        for name in ["ovl-trace-1-0badcafe", "ovl-trace-", "ovl-trace-0badcafe", "foreign-4194305-1"] {
            assert!(!is_left(name), "{name}");
        }
    }

    #[test]
    fn line_of_the_log_is_read() {
        let drop = parse(LINE, 5).unwrap();
        assert_eq!(
            (drop.at_us, drop.reason, drop.location),
            (12_345_683, "IP_RPFILTER", "ip_rcv_finish_core")
        );
        for line in ["", "# tracer: nop", ": kfree_skb: ", "x 1.2: kfree_skb: reason: X"] {
            assert_eq!(parse(line, 0), None);
        }
    }

    #[test]
    fn reason_that_follows_each_probe_is_likely() {
        let seen = |at_us| Sighting {
            at_us,
            inside: false,
            device: "u0".to_owned(),
            outgoing: false,
            source: [10, 1, 0, 1].into(),
            destination: [10, 1, 0, 2].into(),
            kind: PacketKind::Probe,
            outer: None,
        };
        let drop = |at_us, reason| Dropped { at_us, reason, location: "f" };
        let probes = [seen(1_000_000), seen(1_350_000), seen(1_700_000)];
        let drops = [
            drop(1_000_100, "IP_RPFILTER"),
            drop(1_200_000, "NO_SOCKET"),
            drop(1_350_100, "IP_RPFILTER"),
            drop(1_350_200, "OTHERHOST"),
            drop(1_700_050, "NOT_SPECIFIED"),
        ];
        assert_eq!(likely(&drops, &probes), ["IP_RPFILTER in f"]);
        assert!(likely(&drops[..2], &probes).is_empty());
    }
}
