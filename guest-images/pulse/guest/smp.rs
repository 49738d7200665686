//! Starts the other vCPUs: INIT and start-up IPIs through the local APIC, from ring 3.

use core::sync::atomic::{AtomicU32, Ordering::SeqCst};

use crate::clock::{self, Clock};
use crate::state::CPUS;

/// Where boot.s expects its real-mode code to be copied.
const TRAMPOLINE: u64 = 0x8000;
const SPURIOUS: u64 = 0xfee0_00f0;
const ENABLED: u32 = 0x1ff;
const ICR_LOW: u64 = 0xfee0_0300;
const ICR_HIGH: u64 = 0xfee0_0310;
const INIT: u32 = 0x4500;
const START_UP: u32 = 0x4600 | (TRAMPOLINE >> 12) as u32;

/// Read by boot.s: vCPUs start one after the other, and this is the one.
#[unsafe(no_mangle)]
static starting_vcpu: AtomicU32 = AtomicU32::new(0);

unsafe extern "C" {
    static ap_trampoline: u8;
    static ap_trampoline_end: u8;
}

/// Starts vCPUs 1 to `count` - 1, whose APIC ids must be their numbers. The error is the
/// number of the first that did not come up within a second of its second start-up IPI.
///
/// # Safety
/// Only vCPU 0 may call this, once, when nothing at `TRAMPOLINE` is needed any more.
pub unsafe fn start(count: usize, clock: &Clock) -> Result<(), usize> {
    let hz = clock.hz();
    // SAFETY: the symbols delimit code in the image; low RAM is ours, says the caller.
    unsafe {
        let code = &raw const ap_trampoline;
        let len = (&raw const ap_trampoline_end).offset_from_unsigned(code);
        core::ptr::copy_nonoverlapping(code, TRAMPOLINE as *mut u8, len);
    }
    if count > 1 {
        // SAFETY: as in `send`. An operating system enables its local APIC before the first
        // IPI, and KVM may know all vCPUs as destinations only from then on.
        unsafe { (SPURIOUS as *mut u32).write_volatile(ENABLED) }
    }
    for cpu in 1..count {
        starting_vcpu.store(cpu as u32, SeqCst);
        send(cpu, INIT);
        wait(hz / 100);
        // The second is for real processors, which may miss the first (Intel SDM 3, 9.4.4).
        let mut up = false;
        for patience in [hz / 100, hz] {
            if !up {
                send(cpu, START_UP);
                up = wait_until_up(cpu, patience);
            }
        }
        if !up {
            return Err(cpu);
        }
    }
    Ok(())
}

fn send(cpu: usize, command: u32) {
    // SAFETY: the local APIC's registers at their reset address, identity-mapped.
    unsafe {
        (ICR_HIGH as *mut u32).write_volatile((cpu as u32) << 24);
        (ICR_LOW as *mut u32).write_volatile(command);
    }
}

fn wait(ticks: u64) {
    let start = clock::tsc();
    while clock::tsc().wrapping_sub(start) < ticks {
        core::hint::spin_loop();
    }
}

fn wait_until_up(cpu: usize, ticks: u64) -> bool {
    let start = clock::tsc();
    while clock::tsc().wrapping_sub(start) < ticks {
        if CPUS[cpu].up.load(SeqCst) {
            return true;
        }
        core::hint::spin_loop();
    }
    CPUS[cpu].up.load(SeqCst)
}
