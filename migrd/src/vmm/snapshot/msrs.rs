//! Model-specific registers.

use kvm_bindings::{Msrs, kvm_cpuid_entry2, kvm_msr_entry};
use kvm_ioctls::{Kvm, VcpuFd};

use super::SnapshotError;
use super::error::{restore_failed, save_failed};
use super::time::{MSR_TSC, MSR_TSC_DEADLINE};
use crate::vmm::cpu::{self, Place, Register};

/// What `KVM_GET_MSRS` takes at once (Linux: `MAX_IO_MSRS`).
const BATCH: usize = 256;
/// Far more than any KVM lists.
pub(super) const MSRS_MAX: usize = 4096;

/// Registers that KVM keeps for a guest and leaves out of its index list:
/// memory types (MTRRs) and the machine check banks.
fn unlisted() -> impl Iterator<Item = u32> {
    const MTRR_VARIABLE: std::ops::RangeInclusive<u32> = 0x200..=0x20f;
    const MTRR_FIXED: [u32; 11] =
        [0x250, 0x258, 0x259, 0x268, 0x269, 0x26a, 0x26b, 0x26c, 0x26d, 0x26e, 0x26f];
    const MTRR_DEFAULT_TYPE: u32 = 0x2ff;
    const MACHINE_CHECK_BANKS: std::ops::Range<u32> = 0x400..0x480;
    MTRR_VARIABLE.chain(MTRR_FIXED).chain([MTRR_DEFAULT_TYPE]).chain(MACHINE_CHECK_BANKS)
}

/// `MSR_KVM_WALL_CLOCK` and its newer number. Writing one makes KVM write the
/// host's time once to the address given. A guest does so whenever it wants to
/// know the time; at a restore it would overwrite whatever the guest keeps at
/// that address by now.
const WALL_CLOCK: [u32; 2] = [0x11, 0x4b56_4d00];

/// The numbers of the registers that are saved on this host, but for TSC and
/// deadline, which are saved as time, and those that only start a write.
pub(super) fn indices(kvm: &Kvm) -> Result<Vec<u32>, SnapshotError> {
    let list = kvm.get_msr_index_list().map_err(save_failed("list of MSRs"))?;
    let mut indices: Vec<u32> = list.as_slice().to_vec();
    let more: Vec<u32> = unlisted().filter(|index| !indices.contains(index)).collect();
    indices.extend(more);
    indices.retain(|index| ![MSR_TSC, MSR_TSC_DEADLINE].contains(index));
    indices.retain(|index| !WALL_CLOCK.contains(index));
    Ok(indices)
}

/// Registers that tell of the host and that KVM reads for a guest even when it
/// was not given the feature (the word of CPUID and the bit), and would then
/// refuse to set on a host where they tell something else.
const TELL_OF_HOST: [(u32, Place, u32); 2] = [
    // IA32_PERF_CAPABILITIES: PDCM.
    (0x345, Place { function: 0x1, index: 0, register: Register::Ecx }, 1 << 15),
    // IA32_ARCH_CAPABILITIES: ARCH_CAPABILITIES.
    (0x10a, Place { function: 0x7, index: 0, register: Register::Edx }, 1 << 29),
];

/// Those of `indices` that a guest with these leaves can have.
pub(super) fn of(indices: &[u32], leaves: &[kvm_cpuid_entry2]) -> Vec<u32> {
    let missing = |place: Place, bit: u32| {
        let mut here =
            leaves.iter().filter(|l| l.function == place.function && l.index == place.index);
        here.all(|leaf| cpu::register(leaf, place) & bit == 0)
    };
    let not_given = TELL_OF_HOST.into_iter().filter(|(_, place, bit)| missing(*place, *bit));
    let not_given: Vec<u32> = not_given.map(|(index, _, _)| index).collect();
    indices.iter().copied().filter(|index| !not_given.contains(index)).collect()
}

fn batch(entries: &[kvm_msr_entry]) -> Result<Msrs, SnapshotError> {
    Msrs::from_entries(entries)
        .map_err(|_| save_failed("MSRs")(kvm_ioctls::Error::new(libc::ENOMEM)))
}

/// Reads the registers. One that can't be read is left out: the list names
/// registers by what the host's CPU has, and a guest that was not given the
/// feature has no value there to lose.
pub(super) fn save(vcpu: &VcpuFd, indices: &[u32]) -> Result<Vec<(u32, u64)>, SnapshotError> {
    let mut saved = Vec::with_capacity(indices.len());
    let mut left = indices;
    while !left.is_empty() {
        let now = &left[..left.len().min(BATCH)];
        let entries: Vec<_> =
            now.iter().map(|&index| kvm_msr_entry { index, ..kvm_msr_entry::default() }).collect();
        let mut msrs = batch(&entries)?;
        let count = vcpu.get_msrs(&mut msrs).map_err(save_failed("MSRs"))?.min(now.len());
        saved.extend(msrs.as_slice()[..count].iter().map(|entry| (entry.index, entry.data)));
        // KVM stops at the first that it can't read.
        let skip = usize::from(count < now.len());
        left = &left[count + skip..];
    }
    Ok(saved)
}

/// Sets the registers. One that this host refuses is an error, unless its
/// value is 0: that is what every register a host does not have reads as for
/// its guests, so nothing the guest could notice is lost.
pub(super) fn restore(vcpu: &VcpuFd, msrs: &[(u32, u64)]) -> Result<(), SnapshotError> {
    let mut left = msrs;
    while !left.is_empty() {
        let now = &left[..left.len().min(BATCH)];
        let entries: Vec<_> = now
            .iter()
            .map(|&(index, data)| kvm_msr_entry { index, data, ..kvm_msr_entry::default() })
            .collect();
        let count = vcpu.set_msrs(&batch(&entries)?).map_err(restore_failed("MSRs"))?;
        let count = count.min(now.len());
        let skip = match now.get(count) {
            Some(&(index, value)) if value != 0 => {
                return Err(SnapshotError::Msr { index, value });
            }
            Some(_) => 1,
            None => 0,
        };
        left = &left[count + skip..];
    }
    Ok(())
}
