//! The system's random numbers, from a seed on threads that have one.
//!
//! The standard library (`HashMap`), tokio (`select!`), chitchat (whom to gossip with), ring and snow (keys) all draw
//! from the system, and cannot be given another source. So this program replaces the C functions that they call.
//! Elsewhere than on x86-64 keys stay random: ring calls `syscall` there, too.

use std::cell::Cell;

use crate::random::Random;
use nix::libc::{self, c_int, c_long, c_uint, c_void, size_t, ssize_t};

thread_local! {
    static STATE: Cell<Option<u64>> = const { Cell::new(None) };
}

/// Gives this thread a seed.
pub(crate) fn seed(seed: u64) {
    STATE.set(Some(seed));
}

/// Fills a buffer. `false` on a thread without a seed.
///
/// # Safety
///
/// `buffer` must be valid for writes of `length` bytes.
unsafe fn fill(buffer: *mut u8, length: usize) -> bool {
    let Ok(Some(state)) = STATE.try_with(Cell::get) else { return false };
    if length == 0 {
        // A crate asks once for each process whether the system call is there: that must not count.
        return true;
    }
    let mut random = Random::new(state);
    STATE.set(Some(random.next_u64()));
    // SAFETY: promised by the caller.
    random.fill(unsafe { std::slice::from_raw_parts_mut(buffer, length) });
    true
}

/// Replaces the function of the C library.
///
/// # Safety
///
/// As `getrandom(2)`.
#[unsafe(no_mangle)]
unsafe extern "C" fn getrandom(buffer: *mut c_void, length: size_t, flags: c_uint) -> ssize_t {
    // SAFETY: promised by the caller.
    if unsafe { fill(buffer.cast(), length) } {
        return length as ssize_t;
    }
    // SAFETY: promised by the caller.
    unsafe { libc::syscall(libc::SYS_getrandom, buffer, length, flags) as ssize_t }
}

/// Replaces the function of the C library.
///
/// # Safety
///
/// As `getentropy(3)`.
#[unsafe(no_mangle)]
unsafe extern "C" fn getentropy(buffer: *mut c_void, length: size_t) -> c_int {
    // SAFETY: promised by the caller.
    let filled = unsafe { getrandom(buffer, length, 0) };
    if filled == length as ssize_t { 0 } else { -1 }
}

/// Replaces the function of the C library, for those who do not call `getrandom` by its name.
///
/// # Safety
///
/// As `syscall(2)`.
#[cfg(target_arch = "x86_64")]
#[unsafe(no_mangle)]
unsafe extern "C" fn syscall(
    number: c_long,
    a: c_long,
    b: c_long,
    c: c_long,
    d: c_long,
    e: c_long,
    f: c_long,
) -> c_long {
    // SAFETY: promised by the caller.
    if number == libc::SYS_getrandom && unsafe { fill(a as *mut u8, b as usize) } {
        return b;
    }
    let result: c_long;
    // SAFETY: the system call that the caller asks for, with its arguments in the registers of the kernel's ABI.
    unsafe {
        std::arch::asm!(
            "syscall",
            inlateout("rax") number => result,
            in("rdi") a,
            in("rsi") b,
            in("rdx") c,
            in("r10") d,
            in("r8") e,
            in("r9") f,
            lateout("rcx") _,
            lateout("r11") _,
            options(nostack),
        );
    }
    if (-4095..0).contains(&result) {
        // SAFETY: errno of this thread.
        unsafe { *libc::__errno_location() = -result as c_int };
        return -1;
    }
    result
}
