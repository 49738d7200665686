//! Why a VM can't be booted.

use super::acpi::CPUS_MAX;
use super::layout::{CMDLINE_MAX, KERNEL_START};

/// A kernel, initrd or command line that can't be loaded, or a vCPU that can't
/// be pointed at it. Guest memory may hold part of what was loaded.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum BootError {
    /// Not an ELF file, not a bzImage.
    #[error("the kernel is neither an ELF file nor a Linux bzImage: give one of these")]
    UnknownFormat,
    /// An ELF file for another machine, or one that is not an executable.
    #[error(
        "the kernel's ELF header is not usable: {what}; give an x86-64 little-endian executable"
    )]
    ElfHeader {
        /// What is wrong with it.
        what: &'static str,
    },
    /// The file ends before something that its headers promise.
    #[error("the kernel file is truncated: {what} would end at byte {end}, the file has {length}")]
    Truncated {
        /// What is cut.
        what: &'static str,
        /// Where it would end, in bytes.
        end: u64,
        /// Length of the file, in bytes.
        length: u64,
    },
    /// The kernel does not fit where it wants to be.
    #[error(
        "the kernel needs memory from {start:#x} to {end:#x}, and the VM's RAM there ends at \
         {ram_end:#x}: give it more memory"
    )]
    KernelOutsideMemory {
        /// First address.
        start: u64,
        /// Address after the last.
        end: u64,
        /// Where RAM ends below 4 GiB.
        ram_end: u64,
    },
    /// The kernel wants to lie where the loader's own tables are.
    #[error(
        "the kernel has a segment at {start:#x}, below {KERNEL_START:#x}, where boot tables are: \
         link it higher"
    )]
    KernelTooLow {
        /// First address.
        start: u64,
    },
    /// Two segments want the same memory.
    #[error("two segments of the kernel overlap at {at:#x}: the file is damaged")]
    SegmentsOverlap {
        /// First shared address.
        at: u64,
    },
    /// Nothing to load.
    #[error("the kernel has no loadable segment: the file is damaged or not a kernel")]
    NoSegments,
    /// The entry point lies in nothing that was loaded.
    #[error("the kernel's entry point {entry:#x} is outside its segments: the file is damaged")]
    EntryOutsideKernel {
        /// Its address.
        entry: u64,
    },
    /// A bzImage that can't be entered in the way that is supported.
    #[error("the bzImage can't be booted: {what}")]
    SetupHeader {
        /// What it lacks.
        what: &'static str,
    },
    /// More bytes than the kernel takes.
    #[error(
        "the command line has {length} bytes and {limit} are allowed (never over {CMDLINE_MAX}): shorten it"
    )]
    CmdlineTooLong {
        /// Its length in bytes.
        length: usize,
        /// What is allowed, in bytes.
        limit: usize,
    },
    /// The command line is passed as a C string.
    #[error("the command line has a NUL at byte {at}: remove it")]
    CmdlineNul {
        /// Its position.
        at: usize,
    },
    /// No room for the initrd.
    #[error(
        "the initrd has {length} bytes and {room} are free between the kernel and {limit:#x}: \
         give the VM more memory"
    )]
    InitrdTooLarge {
        /// Its length in bytes.
        length: u64,
        /// Bytes there are.
        room: u64,
        /// Where it must end.
        limit: u64,
    },
    /// An empty initrd is a mistake that a guest would only show much later.
    #[error("the initrd is empty: give another file, or none")]
    InitrdEmpty,
    /// No vCPU, or more than the tables can describe.
    #[error("{cpus} vCPUs: give 1 to {CPUS_MAX}")]
    Cpus {
        /// What was asked for.
        cpus: u32,
    },
    /// Too small for any kernel, or not the layout of `layout.rs`.
    #[error("{memory_bytes} bytes of memory can't hold a kernel: give the VM more")]
    MemoryTooSmall {
        /// What was asked for.
        memory_bytes: u64,
    },
    /// The file could not be read.
    #[error("cannot read the {what}")]
    Read {
        /// Kernel or initrd.
        what: &'static str,
        /// What the system said.
        #[source]
        source: std::io::Error,
    },
    /// Guest memory could not be written, or the file shrank while it was read.
    #[error("cannot write the {what} to guest memory")]
    GuestMemory {
        /// What was being written.
        what: &'static str,
        /// What vm-memory said.
        #[source]
        source: vm_memory::GuestMemoryError,
    },
    /// KVM refused the first vCPU's state.
    #[error("KVM refused the {what} of the first vCPU")]
    Vcpu {
        /// What was being set.
        what: &'static str,
        /// What KVM said.
        #[source]
        source: kvm_ioctls::Error,
    },
    /// A device whose registers are not below 4 GiB.
    #[error("a device's registers at {address:#x} can't be described to the guest")]
    DeviceAddress {
        /// Guest-physical.
        address: u64,
    },
}
