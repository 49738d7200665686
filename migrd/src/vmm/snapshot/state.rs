//! The whole state of a stopped VM as bytes.

use migr_proto::v1 as proto;
use prost::Message;

use super::WireError;

/// The newest version that is read, all before it too. What is written is of
/// the version of the VM.
pub const VERSION: u32 = 2;
/// The first with a clock chip and a power button.
const PLATFORM: u32 = 2;

/// Most bytes a state can have: 255 vCPUs with 16 KiB each, and room.
const BYTES_MAX: usize = 16 << 20;
/// What of console input may wait outside the UART, in bytes.
const PENDING_INPUT_MAX: usize = 1 << 20;

/// Decodes what a peer or a snapshot directory holds, and checks what can be
/// checked without KVM: the version, that every part is there, and that the
/// vCPUs are those of the configuration.
///
/// # Errors
/// Names what is wrong.
pub fn decode(bytes: &[u8]) -> Result<proto::VmState, WireError> {
    if bytes.len() > BYTES_MAX {
        return Err(WireError::TooLarge { length: bytes.len(), limit: BYTES_MAX });
    }
    check_version(bytes)?;
    let state = proto::VmState::decode(bytes)
        .map_err(|error| WireError::Undecodable { reason: error.to_string() })?;
    check(&state)?;
    Ok(state)
}

/// Reads nothing but the version, because the rest of a newer state need not
/// decode at all.
fn check_version(bytes: &[u8]) -> Result<(), WireError> {
    #[derive(Clone, PartialEq, Message)]
    struct Versioned {
        #[prost(uint32, tag = "1")]
        version: u32,
    }
    let Versioned { version } = Versioned::decode(bytes)
        .map_err(|error| WireError::Undecodable { reason: error.to_string() })?;
    if version == 0 || version > VERSION {
        return Err(WireError::Version { version, known: VERSION });
    }
    Ok(())
}

fn check(state: &proto::VmState) -> Result<(), WireError> {
    let proto::VmState {
        version,
        config,
        devices,
        vcpus,
        serial,
        i8042,
        pending_serial_input,
        paused: _,
        virtio: _,
        clock_chip,
        power,
    } = state;
    let missing = |what| WireError::Missing { what };
    let config = config.as_ref().ok_or_else(|| missing("its configuration"))?;
    if config.version != *version {
        return Err(WireError::OtherVersion { version: *version, config: config.version });
    }
    if *version >= PLATFORM {
        clock_chip.as_ref().ok_or_else(|| missing("its clock chip"))?;
        power.as_ref().ok_or_else(|| missing("its power button"))?;
    }
    let devices = devices.as_ref().ok_or_else(|| missing("its devices"))?;
    super::devices::Devices::from_wire(devices)?;
    serial.as_ref().ok_or_else(|| missing("its serial port"))?;
    i8042.as_ref().ok_or_else(|| missing("its keyboard controller"))?;
    if usize::try_from(config.cpus) != Ok(vcpus.len()) {
        return Err(WireError::VcpuCount { found: vcpus.len(), expected: config.cpus });
    }
    for (expected, vcpu) in (0..).zip(vcpus) {
        if vcpu.index != expected {
            return Err(WireError::VcpuIndex { found: vcpu.index, expected });
        }
        super::vcpu::Vcpu::from_wire(vcpu)?;
    }
    if pending_serial_input.len() > PENDING_INPUT_MAX {
        return Err(WireError::Count {
            what: "bytes of waiting console input",
            found: pending_serial_input.len(),
            expected: "at most 1 MiB",
        });
    }
    Ok(())
}
