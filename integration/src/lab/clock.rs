//! How fast this machine's time stamp counter runs. Emulated hosts see it as it
//! is, and measure its frequency at their boot against an emulated timer: on a
//! busy machine they get it wrong, each in another way, and then their clocks
//! run wrong and guests can't move between them. So they are told.

use std::fs;

use anyhow::Result;
use kvm_ioctls::Kvm;

/// The frequency in kHz; none when this machine does not say. Hosts measure it
/// themselves then.
#[must_use]
pub fn tsc_khz() -> Option<u32> {
    of_kvm().ok().or_else(|| {
        let info = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
        of_a_virtual_machine(&info)
    })
}

fn of_kvm() -> Result<u32> {
    let vcpu = Kvm::new()?.create_vm()?.create_vcpu(0)?;
    Ok(vcpu.get_tsc_khz()?)
}

/// In a virtual machine, whose CPUs do not change their frequency for all that
/// Linux knows, the CPU's frequency is that of the counter.
fn of_a_virtual_machine(cpuinfo: &str) -> Option<u32> {
    let value = |name: &str| {
        let line = cpuinfo.lines().find(|line| line.starts_with(name))?;
        Some(line.split_once(':')?.1.trim())
    };
    value("flags")?.split(' ').find(|flag| *flag == "hypervisor")?;
    let (mhz, fraction) = value("cpu MHz")?.split_once('.')?;
    // Three digits after the point.
    let fraction = fraction.get(..3)?;
    mhz.parse::<u32>().ok()?.checked_mul(1000)?.checked_add(fraction.parse().ok()?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_virtual_machine_knows_its_frequency_by_that_of_its_cpu() {
        let info = "processor\t: 0\ncpu MHz\t\t: 2299.998\nflags\t\t: fpu hypervisor sse\n";
        assert_eq!(of_a_virtual_machine(info), Some(2_299_998));
        assert_eq!(of_a_virtual_machine(&info.replace("hypervisor", "avx")), None);
        assert_eq!(of_a_virtual_machine(""), None);
    }
}
