//! Kernel parameters for the clock of an emulated machine.

use std::time::{Duration, Instant};

/// How long the rate is measured.
const MEASURED: Duration = Duration::from_millis(300);

/// Kernel parameters for the clock source.
///
/// A kernel measures the rate of the time-stamp counter at boot. On a busy host the result can be wrong by any
/// factor, and an hour passes in a few minutes. The emulated counter is the host's, whose rate can be measured here
/// over a longer time. The kernel measures again later, and keeps the given rate if its own result differs by more
/// than 1 %.
pub(super) fn parameters() -> String {
    match rate() {
        Some(khz) => format!("tsc=reliable tsc_early_khz={khz}"),
        // The rate of this clock is known, but reading it costs as much as some thousand instructions.
        None => "tsc=unstable clocksource=acpi_pm".to_owned(),
    }
}

/// Measures the rate of the time-stamp counter in kHz.
fn rate() -> Option<u64> {
    let (began, from) = sample()?;
    std::thread::sleep(MEASURED);
    let (ended, to) = sample()?;
    let passed = u64::try_from((ended - began).as_micros()).ok()?;
    to.checked_sub(from)?.saturating_mul(1000).checked_div(passed)
}

/// Reads the counter and the time together: of many pairs, the one that was read most quickly, without interruption.
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
    // SAFETY: the instruction only reads a register, and every processor that runs QEMU here has it.
    Some(unsafe { std::arch::x86_64::_rdtsc() })
}

#[cfg(not(target_arch = "x86_64"))]
fn counter() -> Option<u64> {
    None
}
