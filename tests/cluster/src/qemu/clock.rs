//! What a machine is told of its clock.

use std::time::{Duration, Instant};

/// How long the rate is measured.
const MEASURED: Duration = Duration::from_millis(300);

/// The part of the kernel's command line.
///
/// A kernel measures the rate of the time-stamp counter as it boots. On a busy host it is wrong by any factor then, and
/// an hour passes in a few minutes. The emulated counter is the host's own, whose rate can be found out here, with
/// patience; the kernel measures again later, and keeps what it was told when it finds more than a hundredth beside it.
pub(super) fn parameters() -> String {
    match rate() {
        Some(khz) => format!("tsc=reliable tsc_early_khz={khz}"),
        // The rate of this one is known, but each look at it costs as much as some thousand instructions.
        None => "tsc=unstable clocksource=acpi_pm".to_owned(),
    }
}

/// In kHz.
fn rate() -> Option<u64> {
    let (began, from) = sample()?;
    std::thread::sleep(MEASURED);
    let (ended, to) = sample()?;
    let passed = u64::try_from((ended - began).as_micros()).ok()?;
    to.checked_sub(from)?.saturating_mul(1000).checked_div(passed)
}

/// The counter and the time of one instant: the pair that was read most quickly, so that nothing came in between.
fn sample() -> Option<(Instant, u64)> {
    (0..1000)
        .filter_map(|_| {
            let before = Instant::now();
            let count = counter()?;
            Some((before.elapsed(), before, count))
        })
        .min()
        .map(|(_, at, count)| (at, count))
}

#[cfg(target_arch = "x86_64")]
fn counter() -> Option<u64> {
    // SAFETY: the instruction reads a register, and every processor that QEMU's emulation is used on has it.
    Some(unsafe { std::arch::x86_64::_rdtsc() })
}

#[cfg(not(target_arch = "x86_64"))]
fn counter() -> Option<u64> {
    None
}
