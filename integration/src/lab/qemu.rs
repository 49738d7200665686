//! The arguments of a host's QEMU.

use std::fs;

use anyhow::Result;

use super::layout::{CHANNELS, Layout};
use super::settings::{HostNumber, Settings};
use crate::binaries::Program;

const PROGRAM: &str = "qemu-system-x86_64";

/// What runs a host's instructions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Accelerator {
    /// The machine's own virtualization, nested.
    Kvm,
    /// QEMU's translation of an AMD machine with SVM.
    Emulation,
}

impl Accelerator {
    /// The faster one that this machine has. A `/dev/kvm` alone does not do:
    /// hosts need one of their own, so the CPU must offer virtualization.
    #[must_use]
    pub fn of_this_machine() -> Self {
        let flags = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
        let offers = flags
            .lines()
            .filter(|line| line.starts_with("flags"))
            .any(|line| line.split_whitespace().any(|flag| flag == "vmx" || flag == "svm"));
        let nested = ["kvm_intel", "kvm_amd"].iter().any(|module| {
            let parameter = format!("/sys/module/{module}/parameters/nested");
            fs::read_to_string(parameter).is_ok_and(|value| matches!(value.trim(), "Y" | "1"))
        });
        let usable = fs::OpenOptions::new().read(true).write(true).open("/dev/kvm").is_ok();
        if offers && nested && usable { Self::Kvm } else { Self::Emulation }
    }

    /// For the reader of a table.
    #[must_use]
    pub fn describe(self) -> &'static str {
        match self {
            Self::Kvm => "nested KVM",
            Self::Emulation => "QEMU emulation of AMD SVM",
        }
    }

    /// Options of a `migctl migrate` between such hosts. A guest that is emulated
    /// twice dirties its memory faster than an emulated network carries it away
    /// within the default of 50 ms.
    #[must_use]
    pub fn patience(self) -> &'static [&'static str] {
        match self {
            Self::Kvm => &[],
            Self::Emulation => &["--max-downtime", "5s"],
        }
    }

    /// Words for the kernel command line of a guest in such a host. The emulation
    /// does not tell KVM when a guest switches AVX on, so that CPUID goes on
    /// saying how much room the registers took without it. Linux then complains
    /// and does without XSAVE; so it is told to from the start.
    #[must_use]
    pub fn guest_parameters(self) -> &'static str {
        match self {
            Self::Kvm => "",
            Self::Emulation => " noxsave",
        }
    }

    /// What hosts get that ask for nothing else.
    fn cpu(self) -> &'static str {
        match self {
            Self::Kvm => "host",
            Self::Emulation => "EPYC,+svm",
        }
    }

    /// What the host's kernel must know about the machine it is on.
    fn kernel_parameters(self) -> &'static str {
        match self {
            Self::Kvm => "",
            // Guests under emulated nested paging die of triple faults: their
            // page tables are shadowed instead. Mitigations cost an emulated
            // CPU much and protect nobody. A CPU was seen asleep with interrupts
            // pending: should QEMU forget one at an exit from a guest, a CPU that
            // waits for its one-shot timer waits for ever, and a periodic one asks
            // again at the next tick. The agent switches the other CPUs on.
            Self::Emulation => {
                " lab.kvm_amd=npt=0 mitigations=off tsc=reliable nohz=off highres=off maxcpus=1"
            }
        }
    }
}

/// The command that powers a host on.
///
/// # Errors
/// When the lab's own program was not built.
pub fn command(
    layout: &Layout,
    settings: &Settings,
    number: HostNumber,
    accelerator: Accelerator,
) -> Result<Vec<String>> {
    let model = settings.models.get(&number).map_or(accelerator.cpu(), String::as_str);
    let mut command = vec![PROGRAM.to_owned()];
    let mut add = |option: &str, value: &str| command.extend([option.into(), value.into()]);
    add("-name", &format!("migr-lab-host{number}"));
    add("-machine", "q35");
    match accelerator {
        Accelerator::Kvm => add("-accel", "kvm"),
        Accelerator::Emulation => add("-accel", "tcg,thread=multi"),
    }
    add("-cpu", model);
    add("-smp", &settings.cpus.to_string());
    add("-m", &settings.memory_mib.to_string());
    add("-display", "none");
    add("-rtc", "base=utc,clock=host");
    let console = layout.console(number).display().to_string();
    add("-chardev", &format!("file,id=console,path={console},append=on"));
    add("-serial", "chardev:console");
    add("-kernel", &layout.kernel().display().to_string());
    add("-initrd", &layout.initramfs().display().to_string());
    add("-append", &kernel_command_line(settings, number, accelerator)?);
    let lent = "security_model=none,multidevs=remap";
    add("-virtfs", &format!("local,path=/,mount_tag=host,readonly=on,{lent}"));
    let shared = layout.shared().display().to_string();
    add("-virtfs", &format!("local,path={shared},mount_tag=shared,{lent}"));
    let disk = layout.disk(number).display().to_string();
    add("-drive", &format!("file={disk},if=none,id=disk,format=raw,discard=unmap"));
    add("-device", "virtio-blk-pci,drive=disk");
    let switch = layout.switch().display().to_string();
    add("-netdev", &format!("stream,id=net,server=off,addr.type=unix,addr.path={switch}"));
    add("-device", &format!("virtio-net-pci,netdev=net,mac={}", number.mac()));
    add("-device", "virtio-rng-pci");
    add("-device", &format!("virtio-serial-pci,max_ports={}", CHANNELS + 1));
    for channel in 0..CHANNELS {
        let path = layout.channel(number, channel).display().to_string();
        let id = format!("agent{channel}");
        add("-chardev", &format!("socket,id={id},path={path},server=on,wait=off"));
        add("-device", &format!("virtserialport,chardev={id},name=lab.{channel}"));
    }
    let qmp = layout.qmp(number).display().to_string();
    add("-qmp", &format!("unix:{qmp},server=on,wait=off"));
    command.extend(["-nodefaults".into(), "-no-user-config".into(), "-no-reboot".into()]);
    Ok(command)
}

fn kernel_command_line(
    settings: &Settings,
    number: HostNumber,
    accelerator: Accelerator,
) -> Result<String> {
    let agent = Program::Lab.path()?;
    let frequency = match settings.tsc_khz {
        Some(khz) if accelerator == Accelerator::Emulation => format!(" tsc_early_khz={khz}"),
        _ => String::new(),
    };
    Ok(format!(
        "console=ttyS0 quiet panic=-1 net.ifnames=0{}{frequency} lab.host={number} \
         lab.address={} lab.agent={}",
        accelerator.kernel_parameters(),
        number.address(),
        agent.display(),
    ))
}
