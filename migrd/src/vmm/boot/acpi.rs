//! The ACPI tables: what the guest can't find out by probing.
//!
//! Hardware-reduced ACPI (ACPI 6.5, 4.1): no PM1 registers, no SCI, no PM
//! timer, so that nothing is announced that no device implements.

mod platform;

use acpi_tables::Aml;
use acpi_tables::aml::{
    Device, EISAName, IO, Interrupt, Memory32Fixed, Name, Package, Path, ResourceTemplate, Scope,
};
use acpi_tables::fadt::{FADTBuilder, Flags};
use acpi_tables::gas::{AccessSize, AddressSpace, GAS};
use acpi_tables::madt::{
    EnabledStatus, IoApic, LocalInterruptController, MADT, ProcessorLocalApic,
};
use acpi_tables::rsdp::Rsdp;
use acpi_tables::sdt::Sdt;
use acpi_tables::xsdt::XSDT;
use vm_memory::GuestMemoryBackend;

use super::{BootError, layout, write};
use crate::vmm::devices::clock_chip;

/// Most vCPUs of a VM: local APIC ids are 8 bits wide here and 255 means all.
pub const CPUS_MAX: u32 = 255;

/// I/O port of the sleep control register (ACPI 6.5, 4.8.3.7), one byte.
pub const SLEEP_CONTROL_PORT: u16 = 0x600;
/// I/O port of the sleep status register, one byte. Reads as 0.
pub const SLEEP_STATUS_PORT: u16 = 0x601;
/// What a guest that powers itself off writes to [`SLEEP_CONTROL_PORT`]: sleep
/// type 5, and the bit that starts it.
pub const SLEEP_CONTROL_POWER_OFF: u8 = (SLEEP_TYPE_S5 << 2) | 0x20;
const SLEEP_TYPE_S5: u8 = 5;

/// I/O port and value of the reset register: the i8042's reset pulse.
pub const RESET_PORT: u16 = 0x64;
/// See [`RESET_PORT`].
pub const RESET_VALUE: u8 = 0xfe;

const OEM: [u8; 6] = *b"MIGR  ";
const OEM_TABLE: [u8; 8] = *b"MIGRVM  ";
const OEM_REVISION: u32 = 1;

const LOCAL_APIC: u32 = 0xfee0_0000;
const IO_APIC: u32 = 0xfec0_0000;
const COM1_PORT: u16 = 0x3f8;
const COM1_IRQ: u32 = 4;

/// IA-PC boot flags (ACPI 6.5, table 5.11): no VGA to look for. The bit for the
/// keyboard controller stays 0: only its reset line exists.
const NO_VGA: u16 = 1 << 2;
/// And no CMOS clock.
const NO_CLOCK: u16 = 1 << 5;

/// What the tables describe beside what every VM has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Described<'a> {
    /// vCPUs, whose APIC ids count from 0.
    pub cpus: u32,
    /// There are a clock chip and a power button.
    pub platform: bool,
    /// The virtio devices.
    pub devices: &'a [MmioDevice],
}

/// A device that the guest can't find by probing: a virtio-mmio device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MmioDevice {
    /// Guest-physical address of its registers.
    pub address: u64,
    /// Bytes that they take.
    pub length: u64,
    /// Its interrupt, edge-triggered.
    pub gsi: u32,
}

/// Refuses what [`write_tables`] can't describe.
pub(super) fn check_cpus(cpus: u32) -> Result<(), BootError> {
    if cpus == 0 || cpus > CPUS_MAX { Err(BootError::Cpus { cpus }) } else { Ok(()) }
}

/// Writes the tables and returns the address of the RSDP.
pub(super) fn write_tables<M: GuestMemoryBackend>(
    mem: &M,
    described: Described<'_>,
) -> Result<u64, BootError> {
    let Described { cpus, platform, devices } = described;
    let rsdp_at = layout::ACPI_TABLES;
    let mut area = Area { next: rsdp_at + 64, bytes: vec![0; 64] };
    let dsdt_at = area.add(&dsdt(platform, devices)?);
    let fadt_at = area.add(&fadt(dsdt_at, platform));
    let madt_at = area.add(&madt(cpus)?);
    let mut xsdt = XSDT::new(OEM, OEM_TABLE, OEM_REVISION);
    xsdt.add_entry(fadt_at);
    xsdt.add_entry(madt_at);
    let xsdt_at = area.add(&xsdt);

    let rsdp = bytes_of(&Rsdp::new(OEM, xsdt_at));
    area.bytes[..rsdp.len()].copy_from_slice(&rsdp);
    debug_assert!(area.next - rsdp_at <= layout::ACPI_LENGTH, "255 vCPUs take under 4 KiB");
    write(mem, rsdp_at, &area.bytes, "ACPI tables")?;
    Ok(rsdp_at)
}

/// Tables laid one after the other.
struct Area {
    next: u64,
    bytes: Vec<u8>,
}

impl Area {
    fn add(&mut self, table: &dyn Aml) -> u64 {
        const ALIGN: usize = 16;
        let at = self.next;
        let before = self.bytes.len();
        table.to_aml_bytes(&mut self.bytes);
        self.bytes.resize(self.bytes.len().next_multiple_of(ALIGN), 0);
        self.next += u64::try_from(self.bytes.len() - before).unwrap_or(u64::MAX);
        at
    }
}

fn bytes_of(table: &dyn Aml) -> Vec<u8> {
    let mut bytes = Vec::new();
    table.to_aml_bytes(&mut bytes);
    bytes
}

/// The devices, and which sleep type powers the machine off.
fn dsdt(platform: bool, devices: &[MmioDevice]) -> Result<Sdt, BootError> {
    const HEADER_BYTES: u32 = 36;
    let uart = EISAName::new("PNP0501");
    let ports = IO::new(COM1_PORT, COM1_PORT, 1, 8);
    let irq = Interrupt::new(true, true, false, false, COM1_IRQ);
    let resources = ResourceTemplate::new(vec![&ports, &irq]);
    let hid = Name::new(Path::new("_HID"), &uart);
    let uid = Name::new(Path::new("_UID"), &1_u8);
    let crs = Name::new(Path::new("_CRS"), &resources);
    let com1 = Device::new(Path::new("COM1"), vec![&hid, &uid, &crs]);
    let mut scope = bytes_of(&com1);
    for (slot, device) in (0_u8..).zip(devices) {
        scope.extend(virtio(slot, *device)?);
    }
    let scope = Scope::raw(Path::new("_SB_"), scope);
    let power_off = Package::new(vec![&SLEEP_TYPE_S5]);
    let s5 = Name::new(Path::new("_S5_"), &power_off);

    let mut table = Sdt::new(*b"DSDT", HEADER_BYTES, 6, OEM, OEM_TABLE, OEM_REVISION);
    table.append_slice(&scope);
    table.append_slice(&bytes_of(&s5));
    if platform {
        table.append_slice(&platform::devices());
    }
    Ok(table)
}

/// A virtio-mmio device, under the id by which Linux knows them.
fn virtio(slot: u8, device: MmioDevice) -> Result<Vec<u8>, BootError> {
    let MmioDevice { address, length, gsi } = device;
    let word = |value| u32::try_from(value).map_err(|_| BootError::DeviceAddress { address });
    let registers = Memory32Fixed::new(true, word(address)?, word(length)?);
    // Consumer, edge, active high, exclusive.
    let irq = Interrupt::new(true, true, false, false, gsi);
    let resources = ResourceTemplate::new(vec![&registers, &irq]);
    let hid = Name::new(Path::new("_HID"), &"LNRO0005");
    let uid = Name::new(Path::new("_UID"), &slot);
    // It snoops caches, as everything on a PC: without this some kernels would
    // treat its memory with care that it does not need.
    let cca = Name::new(Path::new("_CCA"), &1_u8);
    let crs = Name::new(Path::new("_CRS"), &resources);
    let name = format!("VR{slot:02}");
    Ok(bytes_of(&Device::new(Path::new(&name), vec![&hid, &uid, &cca, &crs])))
}

fn fadt(dsdt: u64, platform: bool) -> impl Aml {
    let port =
        |port: u16| GAS::new(AddressSpace::SystemIo, 8, 0, AccessSize::ByteAccess, port.into());
    let mut fadt = FADTBuilder::new(OEM, OEM_TABLE, OEM_REVISION)
        .dsdt_64(dsdt)
        .flag(Flags::HwReducedAcpi)
        .flag(Flags::ResetRegSup)
        .flag(Flags::PwrButton)
        .flag(Flags::SlpButton)
        .flag(Flags::Wbinvd);
    let flags = if platform { NO_VGA } else { NO_VGA | NO_CLOCK };
    fadt.iapc_boot_arch = flags.into();
    fadt.century = if platform { clock_chip::CENTURY } else { 0 };
    fadt.reset_reg = port(RESET_PORT);
    fadt.reset_value = RESET_VALUE;
    fadt.sleep_control_reg = port(SLEEP_CONTROL_PORT);
    fadt.sleep_status_reg = port(SLEEP_STATUS_PORT);
    fadt.finalize()
}

fn madt(cpus: u32) -> Result<MADT, BootError> {
    let apic = LocalInterruptController::Address(LOCAL_APIC);
    let mut madt = MADT::new(OEM, OEM_TABLE, OEM_REVISION, apic);
    for cpu in 0..cpus {
        let id = u8::try_from(cpu).map_err(|_| BootError::Cpus { cpus })?;
        madt.add_structure(ProcessorLocalApic::new(id, id, EnabledStatus::Enabled));
    }
    // Its id after reset is 0 in KVM; pin n is GSI n, the timer's pin included,
    // as in KVM's default routing, so no override is needed.
    madt.add_structure(IoApic::new(0, IO_APIC, 0));
    Ok(madt)
}
