//! TSC and kvmclock, and whether either ever goes backwards.

use core::arch::asm;
use core::cell::UnsafeCell;
use core::sync::atomic::{AtomicU64, Ordering::SeqCst};

use crate::port;
use crate::settings::MAX_CPUS;
use crate::state::CPUS;

/// What KVM keeps up to date for each vCPU (`struct pvclock_vcpu_time_info`).
#[repr(C, align(64))]
pub struct Page {
    version: u32,
    pad0: u32,
    tsc_timestamp: u64,
    system_time: u64,
    multiplier: u32,
    shift: i8,
    flags: u8,
    pad1: [u8; 2],
}

const TSC_STABLE: u8 = 1;
const NAMES: [&str; 3] = ["tsc", "kvmclock", "kvmclock-shared"];

/// The array whose addresses boot.s gives to KVM.
#[repr(transparent)]
pub struct Pages([UnsafeCell<Page>; MAX_CPUS]);
// SAFETY: only KVM writes, and the guest reads volatile under the version protocol.
unsafe impl Sync for Pages {}

#[unsafe(no_mangle)]
static kvmclock_pages: Pages = Pages(
    [const {
        UnsafeCell::new(Page {
            version: 0,
            pad0: 0,
            tsc_timestamp: 0,
            system_time: 0,
            multiplier: 0,
            shift: 0,
            flags: 0,
            pad1: [0; 2],
        })
    }; MAX_CPUS],
);

/// The highest kvmclock that any vCPU read while KVM called its clocks synchronized.
static SHARED_MAX: AtomicU64 = AtomicU64::new(0);

/// The time stamp counter, read after everything before it.
pub fn tsc() -> u64 {
    let (low, high): (u32, u32);
    // SAFETY: touches the two registers named. Memory is not declared untouched, so that
    // the compiler keeps the order as the fence makes the CPU keep it.
    unsafe { asm!("lfence", "rdtsc", out("eax") low, out("edx") high, options(nostack)) }
    u64::from(high) << 32 | u64::from(low)
}

/// The clocks of one vCPU.
pub struct Clock {
    cpu: usize,
    kvmclock: bool,
    calibrated_hz: u64,
    last_tsc: u64,
    last_ns: u64,
}

/// One look at the clocks.
pub struct Reading {
    /// Time stamp counter.
    pub tsc: u64,
    /// kvmclock in nanoseconds, if KVM offers it.
    pub ns: Option<u64>,
}

impl Clock {
    /// Clocks of vCPU `cpu`; without kvmclock the TSC is measured, which takes 10 ms.
    pub fn new(cpu: usize, kvmclock: bool) -> Self {
        let calibrated_hz = if kvmclock { 0 } else { calibrate() };
        Self { cpu, kvmclock, calibrated_hz, last_tsc: 0, last_ns: 0 }
    }

    /// Reads both clocks and reports what went backwards since the last reading.
    pub fn read(&mut self) -> Reading {
        let shared = SHARED_MAX.load(SeqCst);
        let now = tsc();
        if now < self.last_tsc {
            self.backwards(0, self.last_tsc, now);
        }
        self.last_tsc = now;
        let ns = self.kvmclock.then(|| {
            let (ns, stable) = self.kvmclock_ns();
            if ns < self.last_ns {
                self.backwards(1, self.last_ns, ns);
            } else if stable && ns < shared {
                self.backwards(2, shared, ns);
            }
            self.last_ns = ns;
            if stable {
                SHARED_MAX.fetch_max(ns, SeqCst);
            }
            ns
        });
        Reading { tsc: now, ns }
    }

    /// TSC ticks a second, as KVM says now: it may change with the host. 0 is unknown.
    pub fn hz(&self) -> u64 {
        if !self.kvmclock {
            return self.calibrated_hz;
        }
        let (page, _) = self.snapshot();
        let unscaled = (1_000_000_000_u128 << 32) / u128::from(page.multiplier.max(1));
        let hz = if page.shift < 0 {
            unscaled << u32::from(page.shift.unsigned_abs())
        } else {
            unscaled >> u32::from(page.shift.unsigned_abs())
        };
        hz as u64
    }

    /// How the banner calls the kvmclock.
    pub fn kind(&self) -> &'static str {
        match self.kvmclock {
            false => "none",
            true if self.snapshot().0.flags & TSC_STABLE != 0 => "stable",
            true => "unstable",
        }
    }

    fn kvmclock_ns(&self) -> (u64, bool) {
        let (page, now) = self.snapshot();
        let mut delta = now.saturating_sub(page.tsc_timestamp);
        if page.shift < 0 {
            delta >>= page.shift.unsigned_abs();
        } else {
            delta <<= page.shift.unsigned_abs();
        }
        let scaled = (u128::from(delta) * u128::from(page.multiplier)) >> 32;
        (page.system_time.wrapping_add(scaled as u64), page.flags & TSC_STABLE != 0)
    }

    /// A consistent copy and a TSC value to which it applies. The TSC is read inside the
    /// version check: a stop between copy and reading would pair old parameters with a new
    /// counter. KVM makes the version odd while it writes.
    fn snapshot(&self) -> (Page, u64) {
        let page = kvmclock_pages.0[self.cpu].get();
        loop {
            // SAFETY: always mapped and valid; volatile because KVM writes it. x86 keeps
            // loads in order, and the fence keeps the compiler from moving them.
            let (before, copy, now, after) = unsafe {
                let before = (&raw const (*page).version).read_volatile();
                let copy = page.read_volatile();
                core::sync::atomic::fence(SeqCst);
                let now = tsc();
                (before, copy, now, (&raw const (*page).version).read_volatile())
            };
            if before == after && before % 2 == 0 {
                return (copy, now);
            }
            core::hint::spin_loop();
        }
    }

    fn backwards(&self, clock: u64, from: u64, to: u64) {
        let cpu = &CPUS[self.cpu];
        for (slot, value) in cpu.backwards_last.iter().zip([clock, from, to]) {
            slot.store(value, SeqCst);
        }
        cpu.backwards.fetch_add(1, SeqCst);
    }
}

/// The name of a clock in a report.
pub fn name(clock: u64) -> &'static str {
    NAMES[clock as usize % NAMES.len()]
}

/// TSC ticks a second, measured against 10 ms of the PIT's channel 0, which needs no gate.
/// 0 if the counter does not move: there is no PIT.
fn calibrate() -> u64 {
    const PIT_HZ: u64 = 1_193_182;
    const LEAST: u16 = (PIT_HZ / 100) as u16;
    const PATIENCE: u32 = 50_000;
    // One countdown from 65535. Its interrupt stays pending: none is ever enabled.
    port::write(0x43, 0x30);
    port::write(0x40, 0xff);
    port::write(0x40, 0xff);
    let (first, start) = (pit_count(), tsc());
    for _ in 0..PATIENCE {
        let (count, now) = (pit_count(), tsc());
        let elapsed = first.wrapping_sub(count);
        if elapsed >= LEAST {
            return (now - start) * PIT_HZ / u64::from(elapsed);
        }
    }
    0
}

/// The present count of channel 0, latched.
fn pit_count() -> u16 {
    port::write(0x43, 0x00);
    let low = port::read(0x40);
    u16::from(port::read(0x40)) << 8 | u16::from(low)
}
