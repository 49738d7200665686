//! The clock chip and the power button, as the DSDT describes them.

use acpi_tables::Aml;
use acpi_tables::aml::{
    And, Device, EISAName, Field, FieldAccessType, FieldEntry, FieldLockRule, FieldUpdateRule, IO,
    If, Interrupt, Local, Method, Name, Notify, OpRegion, OpRegionSpace, Path, ResourceTemplate,
    Scope, Store, ZERO,
};

use crate::vmm::devices::{clock_chip, power_button};

/// What `Notify` tells a power button that was pressed (ACPI 6.5, 5.6.6).
const BUTTON_PRESSED: u8 = 0x80;

/// Both devices, in their scope.
pub(super) fn devices() -> Vec<u8> {
    let mut bytes = Vec::new();
    with_clock(&mut bytes);
    with_button(&mut bytes);
    Scope::raw(Path::new("_SB_"), bytes)
}

/// The chip has no interrupt, so none is named.
fn with_clock(bytes: &mut Vec<u8>) {
    let hid = Name::new(Path::new("_HID"), &EISAName::new("PNP0B00"));
    let ports = IO::new(clock_chip::INDEX, clock_chip::INDEX, 1, 2);
    let resources = ResourceTemplate::new(vec![&ports]);
    let crs = Name::new(Path::new("_CRS"), &resources);
    Device::new(Path::new("RTC_"), vec![&hid, &crs]).to_aml_bytes(bytes);
}

/// The button, and the device whose interrupt says that it was pressed.
fn with_button(bytes: &mut Vec<u8>) {
    let hid = Name::new(Path::new("_HID"), &EISAName::new("PNP0C0C"));
    let uid = Name::new(Path::new("_UID"), &ZERO);
    Device::new(Path::new("PWRB"), vec![&hid, &uid]).to_aml_bytes(bytes);

    let hid = Name::new(Path::new("_HID"), &"ACPI0013");
    let uid = Name::new(Path::new("_UID"), &ZERO);
    // Consumed here, edge-triggered, active high, not shared.
    let irq = Interrupt::new(true, true, false, false, power_button::GSI);
    let resources = ResourceTemplate::new(vec![&irq]);
    let crs = Name::new(Path::new("_CRS"), &resources);
    let (at, length) = (power_button::EVENTS, 1_u8);
    let region = OpRegion::new(Path::new("EVTR"), OpRegionSpace::SystemIO, &at, &length);
    let field = Field::new(
        Path::new("EVTR"),
        FieldAccessType::Byte,
        FieldLockRule::NoLock,
        FieldUpdateRule::WriteAsZeroes,
        vec![FieldEntry::Named(*b"EVTS", 8)],
    );
    // One read, because it empties the register.
    let (events, local) = (Path::new("EVTS"), Local(0));
    let read = Store::new(&local, &events);
    let (button, pressed) = (Path::new("\\_SB_.PWRB"), BUTTON_PRESSED);
    let notify = Notify::new(&button, &pressed);
    let bit = And::new(&ZERO, &local, &power_button::PRESSED);
    let if_pressed = If::new(&bit, vec![&notify]);
    let event = Method::new(Path::new("_EVT"), 1, true, vec![&read, &if_pressed]);
    let parts: Vec<&dyn Aml> = vec![&hid, &uid, &crs, &region, &field, &event];
    Device::new(Path::new("GED_"), parts).to_aml_bytes(bytes);
}
