//! An MP floating pointer (MultiProcessor Specification 1.4, 4.1) that leads to
//! no table.
//!
//! The vCPUs are described by ACPI, and Linux then ignores MP tables. But it
//! looks for the pointer first, 16 bytes at a time through 66 KiB, and maps and
//! unmaps each step. With shadow paging (no EPT or NPT) that takes seconds. The
//! search ends where it finds one.

use vm_memory::GuestMemoryBackend;

use super::{BootError, layout, write};

/// The structure's length, in units of 16 bytes.
const LENGTH: u8 = 1;
/// Version 1.4 of the specification.
const REVISION: u8 = 4;
/// Feature byte 1: default configuration 6 (two CPUs, EISA and PCI) stands
/// instead of a table. Nobody reads it but a kernel told to ignore ACPI.
const DEFAULT_CONFIGURATION: u8 = 6;

/// Writes the pointer at the start of the last KiB of base memory, the second
/// place where it may be.
pub(super) fn write_pointer<M: GuestMemoryBackend>(mem: &M) -> Result<(), BootError> {
    write(mem, layout::LOW_RESERVED, &pointer(), "MP pointer")
}

fn pointer() -> [u8; 16] {
    let mut bytes = [0; 16];
    bytes[..4].copy_from_slice(b"_MP_");
    bytes[8] = LENGTH;
    bytes[9] = REVISION;
    bytes[11] = DEFAULT_CONFIGURATION;
    let sum = bytes.iter().fold(0_u8, |sum, byte| sum.wrapping_add(*byte));
    bytes[10] = sum.wrapping_neg();
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_pointer_has_the_sum_zero_and_leads_to_no_table() {
        let bytes = pointer();
        assert_eq!(&bytes[..4], b"_MP_");
        assert_eq!(bytes.iter().fold(0_u8, |sum, byte| sum.wrapping_add(*byte)), 0);
        assert_eq!(bytes[4..8], [0; 4]);
    }
}
