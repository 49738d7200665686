//! Port I/O, which IOPL 3 allows to ring 3, and the ways for the machine to end.

use core::arch::asm;

/// Writes a byte to a port.
pub fn write(port: u16, value: u8) {
    // SAFETY: the devices of this machine do no DMA: a port write cannot touch memory.
    unsafe { asm!("out dx, al", in("dx") port, in("al") value, options(nomem, nostack)) }
}

/// Reads a byte from a port.
pub fn read(port: u16) -> u8 {
    let value;
    // SAFETY: as for writing.
    unsafe { asm!("in al, dx", in("dx") port, out("al") value, options(nomem, nostack)) }
    value
}

/// Pulls the reset line through the keyboard controller.
pub fn reset() -> ! {
    loop {
        write(0x64, 0xfe);
    }
}

/// Switches the machine off as migr's ACPI tables say: sleep type 5 into the sleep control
/// register. Where that does nothing, the machine is reset.
pub fn power_off() -> ! {
    write(0x600, 0x34);
    reset()
}

/// Raises an exception that nobody handles: the IDT is empty, so it ends in a triple fault.
pub fn triple_fault() -> ! {
    // SAFETY: control does not come back.
    unsafe { asm!("ud2", options(noreturn, nomem, nostack)) }
}
