//! Limits the rate at which a device sends: its root queueing discipline is a token bucket (tc-tbf(8)).
//!
//! The module owns no state. Begin to read at [`limit`].

use netlink_packet_core::{NLM_F_CREATE, NLM_F_REPLACE};
use nix::libc::{self, ENOENT};
use ovl_proto::bandwidth::Rate;

use super::attribute::Attributes;
use super::error::{KernelError, Result};
use super::message::traffic_control;
use super::socket::{Batch, Route};

/// The parent of a root queueing discipline (`linux/pkt_sched.h`).
const ROOT: u32 = u32::MAX;
/// Attributes of the kind `tbf` (`linux/pkt_sched.h`); `libc` does not define them.
const TCA_TBF_PARMS: u16 = 1;
const TCA_TBF_RATE64: u16 = 4;
const TCA_TBF_BURST: u16 = 6;
/// `linklayer` of `struct tc_ratespec`: Ethernet, so that the kernel does not guess it from a table.
const ETHERNET: u8 = 1;
/// A packet waits at most this long in the queue, as with the reference plugin `bandwidth`.
const LATENCY_MS: u64 = 25;

/// Limits the rate at which a device sends. `name` is for errors, `mtu` in bytes.
///
/// # Errors
///
/// The kernel has no token buckets, or refuses this one.
pub(super) fn limit(route: &mut Route, (index, name): (u32, &str), mtu: u16, rate: Rate) -> Result<()> {
    let mut discipline = Attributes::after(&traffic_control(index, 0, ROOT, 0));
    discipline.put_text(libc::TCA_KIND, "tbf");
    let Bucket { bytes_per_second, burst, queue } = bucket(rate, mtu);
    discipline.nest(libc::TCA_OPTIONS, |options| {
        options.put(TCA_TBF_PARMS, &parameters(bytes_per_second, queue));
        if u32::try_from(bytes_per_second).is_err() {
            options.put(TCA_TBF_RATE64, &bytes_per_second.to_ne_bytes());
        }
        options.put(TCA_TBF_BURST, &burst.to_ne_bytes());
    });
    let mut batch = Batch::default();
    batch.push_built(libc::RTM_NEWQDISC, NLM_F_CREATE | NLM_F_REPLACE, discipline.bytes());
    let (results, _) = route.execute(batch)?;
    match results.into_iter().next_back() {
        Some(Err(refusal)) if refusal.errno == ENOENT => Err(KernelError::MissingFeature {
            feature: "token bucket, so the bandwidth of endpoints cannot be limited",
            module: "sch_tbf",
        }),
        Some(Err(refusal)) => Err(refusal.into_error(format!("cannot limit the bandwidth of {name}"))),
        Some(Ok(())) | None => Ok(()),
    }
}

/// A token bucket in the kernel's units.
#[derive(Debug, PartialEq, Eq)]
struct Bucket {
    bytes_per_second: u64,
    /// In bytes.
    burst: u32,
    /// The length of the queue, in bytes.
    queue: u32,
}

fn bucket(Rate { rate, burst }: Rate, mtu: u16) -> Bucket {
    let bytes_per_second = (rate / 8).max(1);
    // A packet that is longer than the bucket would never pass.
    let burst = (burst / 8).max(u64::from(mtu).saturating_mul(2));
    let queue = burst.saturating_add(bytes_per_second.saturating_mul(LATENCY_MS) / 1000);
    let narrow = |bytes: u64| u32::try_from(bytes).unwrap_or(u32::MAX);
    Bucket { bytes_per_second, burst: narrow(burst), queue: narrow(queue) }
}

/// Returns a `struct tc_tbf_qopt`: the rate, no peak rate, the queue, and no bucket, which has an attribute of its own.
fn parameters(bytes_per_second: u64, queue: u32) -> Vec<u8> {
    let rate = u32::try_from(bytes_per_second).unwrap_or(u32::MAX);
    // cell_log, linklayer, overhead, cell_align and mpu of `struct tc_ratespec`, then the rate.
    let mut bytes = vec![0, ETHERNET, 0, 0, 0, 0, 0, 0];
    bytes.extend(rate.to_ne_bytes());
    bytes.extend([0; 12]);
    bytes.extend(queue.to_ne_bytes());
    bytes.extend([0; 8]);
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bucket_holds_two_packets_and_values_stay_in_range() {
        let of = |rate, burst| bucket(Rate { rate, burst }, 1450);
        assert_eq!(
            of(8_000_000, 800_000),
            Bucket { bytes_per_second: 1_000_000, burst: 100_000, queue: 125_000 }
        );
        assert_eq!(of(1, 1), Bucket { bytes_per_second: 1, burst: 2900, queue: 2900 });
        // What containerd sends for an annotation.
        assert_eq!(of(1_000_000, u32::MAX.into()).burst, u32::MAX / 8);
        let most = of(u64::MAX, u64::MAX);
        assert_eq!((most.bytes_per_second, most.burst, most.queue), (u64::MAX / 8, u32::MAX, u32::MAX));
    }
}
