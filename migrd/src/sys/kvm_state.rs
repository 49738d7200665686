//! State of vCPUs and chips for which kvm-ioctls has no safe call.

use kvm_bindings::{
    KVM_VCPU_TSC_CTRL, KVM_VCPU_TSC_OFFSET, Xsave, kvm_device_attr, kvm_ioapic_state,
    kvm_ioapic_state__bindgen_ty_1, kvm_irqchip, kvm_pic_state, kvm_sregs2,
};
use kvm_ioctls::{Error, VcpuFd, VmFd};
use vmm_sys_util::ioctl::{ioctl_with_mut_ref, ioctl_with_ref};

/// Numbers of the calls, as functions made by a macro.
mod nr {
    #![allow(missing_docs)]

    use kvm_bindings::{KVMIO, kvm_device_attr, kvm_sregs2};
    use vmm_sys_util::{ioctl_ior_nr, ioctl_iow_nr};

    ioctl_ior_nr!(KVM_GET_SREGS2, KVMIO, 0xcc, kvm_sregs2);
    ioctl_iow_nr!(KVM_SET_SREGS2, KVMIO, 0xcd, kvm_sregs2);
    ioctl_iow_nr!(KVM_SET_DEVICE_ATTR, KVMIO, 0xe1, kvm_device_attr);
    ioctl_iow_nr!(KVM_GET_DEVICE_ATTR, KVMIO, 0xe2, kvm_device_attr);
}

fn checked(result: std::os::raw::c_int) -> Result<(), Error> {
    if result < 0 { Err(Error::last()) } else { Ok(()) }
}

/// `KVM_GET_SREGS2` (`KVM_CAP_SREGS2`).
///
/// # Errors
/// What KVM said.
pub fn sregs2(vcpu: &VcpuFd) -> Result<kvm_sregs2, Error> {
    let mut sregs = kvm_sregs2::default();
    // SAFETY: the ioctl writes one kvm_sregs2, which `sregs` is.
    checked(unsafe { ioctl_with_mut_ref(vcpu, nr::KVM_GET_SREGS2(), &mut sregs) })?;
    Ok(sregs)
}

/// `KVM_SET_SREGS2` (`KVM_CAP_SREGS2`).
///
/// # Errors
/// What KVM said.
pub fn set_sregs2(vcpu: &VcpuFd, sregs: &kvm_sregs2) -> Result<(), Error> {
    // SAFETY: the ioctl reads one kvm_sregs2, which `sregs` is.
    checked(unsafe { ioctl_with_ref(vcpu, nr::KVM_SET_SREGS2(), sregs) })
}

fn tsc_offset_attr(value: *mut u64) -> kvm_device_attr {
    kvm_device_attr {
        flags: 0,
        group: KVM_VCPU_TSC_CTRL,
        attr: KVM_VCPU_TSC_OFFSET.into(),
        addr: u64::try_from(value.addr()).unwrap_or_default(),
    }
}

/// What is added to the host's (scaled) TSC to give this vCPU's
/// (`KVM_VCPU_TSC_OFFSET`).
///
/// # Errors
/// `ENXIO` when this KVM can't say, or whatever else it said.
pub fn tsc_offset(vcpu: &VcpuFd) -> Result<u64, Error> {
    let mut offset = 0_u64;
    let attr = tsc_offset_attr(&raw mut offset);
    // SAFETY: `attr` points to `offset`, of the 8 bytes that KVM writes, and
    // `offset` outlives the call.
    checked(unsafe { ioctl_with_ref(vcpu, nr::KVM_GET_DEVICE_ATTR(), &attr) })?;
    Ok(offset)
}

/// Sets what [`tsc_offset`] tells.
///
/// # Errors
/// `ENXIO` when this KVM can't, or whatever else it said.
pub fn set_tsc_offset(vcpu: &VcpuFd, mut offset: u64) -> Result<(), Error> {
    let attr = tsc_offset_attr(&raw mut offset);
    // SAFETY: `attr` points to `offset`, of the 8 bytes that KVM reads, and
    // `offset` outlives the call.
    checked(unsafe { ioctl_with_ref(vcpu, nr::KVM_SET_DEVICE_ATTR(), &attr) })
}

/// The host's time stamp counter.
#[must_use]
pub fn host_tsc() -> u64 {
    // SAFETY: every x86-64 CPU has rdtsc; a kernel that forbids it to user
    // space (prctl PR_SET_TSC) would kill the process, not corrupt it.
    unsafe { std::arch::x86_64::_rdtsc() }
}

/// Fills `xsave`, whose length was asked of `KVM_CAP_XSAVE2`.
///
/// # Errors
/// What KVM said.
pub fn xsave(vcpu: &VcpuFd, host: XsaveBytes) -> Result<Vec<u8>, Error> {
    let mut xsave = host.area()?;
    // SAFETY: `XsaveBytes` holds what KVM_CHECK_EXTENSION(KVM_CAP_XSAVE2) said
    // about this VM, so the area is as long as what KVM writes.
    unsafe { vcpu.get_xsave2(&mut xsave) }?;
    let area = xsave.as_fam_struct_ref();
    let words = area.xsave.region.iter().chain(xsave.as_slice());
    Ok(words.flat_map(|word| word.to_le_bytes()).take(host.0).collect())
}

/// Loads an XSAVE area. `bytes` is padded with zeros to what this host uses.
///
/// # Errors
/// `E2BIG` when it is longer than that, or what KVM said.
pub fn set_xsave(vcpu: &VcpuFd, host: XsaveBytes, bytes: &[u8]) -> Result<(), Error> {
    if bytes.len() > host.0 {
        return Err(Error::new(libc::E2BIG));
    }
    let mut words = bytes.chunks(4).map(|chunk| {
        let mut word = [0; 4];
        word[..chunk.len()].copy_from_slice(chunk);
        u32::from_le_bytes(word)
    });
    let mut xsave = host.area()?;
    let extra = host.extra_words();
    {
        // SAFETY: only the words of the area are written, never its length.
        let area = unsafe { xsave.as_mut_fam_struct() };
        for (into, word) in area.xsave.region.iter_mut().zip(&mut words) {
            *into = word;
        }
    }
    for (into, word) in xsave.as_mut_slice().iter_mut().take(extra).zip(&mut words) {
        *into = word;
    }
    // SAFETY: as in `xsave`: the area is as long as what KVM reads.
    unsafe { vcpu.set_xsave2(&xsave) }
}

/// Length in bytes of the XSAVE area of a VM's vCPUs. Only made by asking KVM,
/// which is what the safety of [`xsave`] and [`set_xsave`] rests on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct XsaveBytes(usize);

impl XsaveBytes {
    /// Length of the area that every KVM has.
    pub const LEGACY: usize = 4096;

    /// Asks KVM.
    #[must_use]
    pub fn of(vm: &VmFd) -> Self {
        let said = vm.check_extension_int(kvm_ioctls::Cap::Xsave2);
        Self(usize::try_from(said).unwrap_or(0).max(Self::LEGACY))
    }

    /// The length.
    #[must_use]
    pub fn get(self) -> usize {
        self.0
    }

    fn extra_words(self) -> usize {
        (self.0 - Self::LEGACY).div_ceil(4)
    }

    fn area(self) -> Result<Xsave, Error> {
        Xsave::new(self.extra_words()).map_err(|_| Error::new(libc::ENOMEM))
    }
}

/// The state of one of the two 8259As.
///
/// # Errors
/// What KVM said.
pub fn pic(vm: &VmFd, chip_id: u32) -> Result<kvm_pic_state, Error> {
    let mut chip = kvm_irqchip { chip_id, ..kvm_irqchip::default() };
    vm.get_irqchip(&mut chip)?;
    // SAFETY: every byte of the union was initialised, and a kvm_pic_state is
    // made of bytes.
    Ok(unsafe { chip.chip.pic })
}

/// Sets what [`pic`] tells.
///
/// # Errors
/// What KVM said.
pub fn set_pic(vm: &VmFd, chip_id: u32, state: kvm_pic_state) -> Result<(), Error> {
    let mut chip = kvm_irqchip { chip_id, ..kvm_irqchip::default() };
    chip.chip.pic = state;
    vm.set_irqchip(&chip)
}

/// The IOAPIC, without KVM's unions.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Ioapic {
    /// Physical address of its registers.
    pub base_address: u64,
    /// The selected register.
    pub ioregsel: u32,
    /// Its id.
    pub id: u32,
    /// Lines that are asserted.
    pub irr: u32,
    /// The redirection table, in the chip's own format.
    pub redirections: [u64; 24],
}

/// The state of the IOAPIC.
///
/// # Errors
/// What KVM said.
pub fn ioapic(vm: &VmFd) -> Result<Ioapic, Error> {
    let mut chip =
        kvm_irqchip { chip_id: kvm_bindings::KVM_IRQCHIP_IOAPIC, ..kvm_irqchip::default() };
    vm.get_irqchip(&mut chip)?;
    // SAFETY: every byte of the union was initialised, and any bytes are a
    // valid kvm_ioapic_state.
    let kvm_ioapic_state { base_address, ioregsel, id, irr, pad: _, redirtbl } =
        unsafe { chip.chip.ioapic };
    // SAFETY: `bits` covers all of the entry, and any bits are valid.
    let redirections = redirtbl.map(|entry| unsafe { entry.bits });
    Ok(Ioapic { base_address, ioregsel, id, irr, redirections })
}

/// Sets what [`ioapic`] tells.
///
/// # Errors
/// What KVM said.
pub fn set_ioapic(vm: &VmFd, state: Ioapic) -> Result<(), Error> {
    let Ioapic { base_address, ioregsel, id, irr, redirections } = state;
    let mut chip =
        kvm_irqchip { chip_id: kvm_bindings::KVM_IRQCHIP_IOAPIC, ..kvm_irqchip::default() };
    chip.chip.ioapic = kvm_ioapic_state {
        base_address,
        ioregsel,
        id,
        irr,
        pad: 0,
        redirtbl: redirections.map(|bits| kvm_ioapic_state__bindgen_ty_1 { bits }),
    };
    vm.set_irqchip(&chip)
}

#[cfg(test)]
pub(crate) fn map_test_memory(vm: &VmFd, region: kvm_bindings::kvm_userspace_memory_region) {
    // SAFETY: the tests that call this keep the mapping until the VM is gone.
    unsafe { vm.set_user_memory_region(region) }.unwrap();
}
