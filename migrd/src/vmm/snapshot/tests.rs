//! State goes through real VMs, and damaged state through the decoder.

mod codecs;

use kvm_bindings::{kvm_pit_config, kvm_regs};
use prost::Message;
use vm_memory::{Bytes, GuestMemoryBackend};

use super::*;
use crate::sys::kvm_state;
use crate::vmm::cpu;

struct Machine {
    vm: VmFd,
    vcpus: Vec<VcpuFd>,
    host: Host,
}

fn machine(cpus: u32) -> Machine {
    machine_of(cpus, None)
}

fn this_host() -> cpu::HostCpu {
    let kvm = Kvm::new().expect("/dev/kvm must exist and be usable: load kvm_intel or kvm_amd");
    cpu::HostCpu::of(&kvm).unwrap()
}

fn machine_of(cpus: u32, model: Option<&cpu::Model>) -> Machine {
    let kvm = Kvm::new().expect("/dev/kvm must exist and be usable: load kvm_intel or kvm_amd");
    let vm = kvm.create_vm().unwrap();
    vm.set_tss_address(0xfffb_d000).unwrap();
    vm.create_irq_chip().unwrap();
    vm.create_pit2(kvm_pit_config::default()).unwrap();
    let vcpus = (0..cpus)
        .map(|index| {
            let vcpu = vm.create_vcpu(index.into()).unwrap();
            vcpu.set_cpuid2(&cpu::for_vcpu(&this_host(), model, index, cpus).unwrap()).unwrap();
            vcpu
        })
        .collect();
    let host = Host::probe(&kvm, &vm).unwrap();
    Machine { vm, vcpus, host }
}

fn save(machine: &Machine) -> (proto::VmDevices, Vec<proto::VcpuState>) {
    let clock = VmClock::read(&machine.vm).unwrap();
    let devices = save_vm(&machine.vm, clock).unwrap();
    let vcpus = (0..)
        .zip(&machine.vcpus)
        .map(|(index, vcpu)| save_vcpu(vcpu, index, &machine.host, clock).unwrap())
        .collect();
    (devices, vcpus)
}

fn restore(machine: &Machine, devices: &proto::VmDevices, vcpus: &[proto::VcpuState]) {
    let clock = restore_clock(&machine.vm, devices).unwrap();
    for (vcpu, state) in machine.vcpus.iter().zip(vcpus) {
        restore_vcpu(vcpu, state, &machine.host, clock).unwrap();
    }
    restore_vm(&machine.vm, devices).unwrap();
    for vcpu in &machine.vcpus {
        was_paused(vcpu).unwrap();
    }
}

fn whole(devices: proto::VmDevices, vcpus: Vec<proto::VcpuState>) -> proto::VmState {
    let cpus = u32::try_from(vcpus.len()).unwrap();
    proto::VmState {
        version: state::VERSION,
        config: Some(proto::VmConfig { version: state::VERSION, cpus, ..Default::default() }),
        devices: Some(devices),
        vcpus,
        serial: Some(proto::SerialState::default()),
        i8042: Some(proto::I8042State {}),
        clock_chip: Some(proto::ClockChipState::default()),
        power: Some(proto::PowerState::default()),
        ..Default::default()
    }
}

/// As the first version wrote it.
fn whole_of_version_1(state: proto::VmState) -> proto::VmState {
    let config = state.config.map(|config| proto::VmConfig { version: 1, ..config });
    proto::VmState { version: 1, config, clock_chip: None, power: None, ..state }
}

/// Gives every part of a machine a value that it does not have after reset.
fn disturb(machine: &Machine) {
    const STAR: u32 = 0xc000_0081;
    for (index, vcpu) in (0_u64..).zip(&machine.vcpus) {
        let regs = kvm_regs {
            rax: 0x1111 + index,
            r15: 0xffff_ffff_ffff_fff0,
            rip: 0x1234,
            rflags: 0x46,
            ..kvm_regs::default()
        };
        vcpu.set_regs(&regs).unwrap();
        let mut sregs = vcpu.get_sregs().unwrap();
        sregs.cs.base = 0xabc0_0000;
        sregs.ds.selector = 0x1230;
        sregs.gdt.limit = 0x7f;
        sregs.idt.base = 0x5000;
        sregs.cr2 = 0xdead_0000;
        sregs.cr8 = 3;
        sregs.cr4 |= 1 << 18 | 1 << 9;
        vcpu.set_sregs(&sregs).unwrap();
        let mut xcrs = vcpu.get_xcrs().unwrap();
        xcrs.xcrs[0].value = 3;
        vcpu.set_xcrs(&xcrs).unwrap();
        let mut area = kvm_state::xsave(vcpu, machine.host.xsave).unwrap();
        area[160..176].copy_from_slice(&[0x5a; 16]);
        area[512] = 3;
        kvm_state::set_xsave(vcpu, machine.host.xsave, &area).unwrap();
        let mut debug = vcpu.get_debug_regs().unwrap();
        debug.db[1] = 0x4000;
        vcpu.set_debug_regs(&debug).unwrap();
        msrs::restore(vcpu, &[(STAR, 0x0023_0010_0000_0000 + index), (0x277, 0x0007_0406)])
            .unwrap();
        let mut lapic = vcpu.get_lapic().unwrap();
        lapic.regs[0xf0] = -1;
        lapic.regs[0xf1] = 1;
        lapic.regs[0x3e0] = 0xb;
        vcpu.set_lapic(&lapic).unwrap();
        let mut events = vcpu.get_vcpu_events().unwrap();
        events.interrupt.injected = 1;
        events.interrupt.nr = 0x31;
        events.nmi.masked = 1;
        vcpu.set_vcpu_events(&events).unwrap();
    }
    let mut pic = kvm_state::pic(&machine.vm, 0).unwrap();
    (pic.imr, pic.irq_base) = (0xfb, 0x20);
    kvm_state::set_pic(&machine.vm, 0, pic).unwrap();
    let mut ioapic = kvm_state::ioapic(&machine.vm).unwrap();
    ioapic.redirections[4] = 0x0100_0000_0001_0034;
    (ioapic.ioregsel, ioapic.id) = (7, 2);
    kvm_state::set_ioapic(&machine.vm, ioapic).unwrap();
    let mut pit = machine.vm.get_pit2().unwrap();
    pit.channels[2].count = 0x4321;
    pit.channels[2].mode = 3;
    machine.vm.set_pit2(&pit).unwrap();
}

/// Takes out what goes on by itself, and returns it: kvmclock and each TSC.
fn without_time(devices: &mut proto::VmDevices, vcpus: &mut [proto::VcpuState]) -> Vec<u64> {
    let mut times = vec![std::mem::take(&mut devices.clock_ns)];
    for vcpu in vcpus {
        times.push(std::mem::take(&mut vcpu.tsc));
    }
    // Set by KVM when the counter is loaded, from its own clock.
    for channel in &mut devices.pit.as_mut().unwrap().channels {
        channel.count_load_time = 0;
    }
    times
}

#[test]
fn state_that_went_to_another_vm_reads_the_same_there() {
    let source = machine(2);
    disturb(&source);
    let (devices, vcpus) = save(&source);
    let bytes = whole(devices, vcpus).encode_to_vec();

    let arrived = state::decode(&bytes).unwrap();
    let (mut devices, mut vcpus) = (arrived.devices.unwrap(), arrived.vcpus);
    let destination = machine(2);
    restore(&destination, &devices, &vcpus);
    let (mut devices_there, mut vcpus_there) = save(&destination);

    let before = without_time(&mut devices, &mut vcpus);
    let after = without_time(&mut devices_there, &mut vcpus_there);
    for (before, after) in before.iter().zip(&after) {
        assert!(before <= after, "a clock went back from {before} to {after}");
    }
    assert_eq!(devices, devices_there);
    for (vcpu, there) in vcpus.iter().zip(&vcpus_there) {
        assert_eq!(vcpu, there);
    }
}

#[test]
fn disturbed_state_is_really_in_what_is_saved() {
    let machine = machine(1);
    let (fresh_devices, fresh_vcpus) = save(&machine);
    disturb(&machine);
    let (devices, vcpus) = save(&machine);
    assert_ne!(fresh_devices.pic_master, devices.pic_master);
    assert_ne!(fresh_devices.ioapic, devices.ioapic);
    assert_ne!(fresh_devices.pit, devices.pit);
    let (fresh, vcpu) = (&fresh_vcpus[0], &vcpus[0]);
    assert_ne!(fresh.registers, vcpu.registers);
    assert_ne!(fresh.system, vcpu.system);
    assert_ne!(fresh.xsave, vcpu.xsave);
    assert_ne!(fresh.xcrs, vcpu.xcrs);
    assert_ne!(fresh.debug, vcpu.debug);
    assert_ne!(fresh.msrs, vcpu.msrs);
    assert_ne!(fresh.lapic, vcpu.lapic);
    assert_ne!(fresh.events, vcpu.events);
}

#[test]
fn msr_that_this_host_refuses_is_named() {
    let machine = machine(1);
    const NO_SUCH_MSR: u32 = 0x1234_5678;
    let error = msrs::restore(&machine.vcpus[0], &[(0x277, 6), (NO_SUCH_MSR, 1)]).unwrap_err();
    let SnapshotError::Msr { index, value } = error else { panic!("{error}") };
    assert_eq!((index, value), (NO_SUCH_MSR, 1));
    msrs::restore(&machine.vcpus[0], &[(NO_SUCH_MSR, 0), (0x277, 6)]).unwrap();
}

#[test]
fn msr_that_cannot_be_read_is_left_out() {
    let machine = machine(1);
    let saved = msrs::save(&machine.vcpus[0], &[0x1234_5678, 0x277, 0x1234_5679, 0x2ff]).unwrap();
    assert_eq!(saved.iter().map(|(index, _)| *index).collect::<Vec<_>>(), [0x277, 0x2ff]);
}

#[test]
fn restoring_writes_nothing_to_guest_memory() {
    const WALL_CLOCK: u32 = 0x4b56_4d00;
    const SYSTEM_TIME: u32 = 0x4b56_4d01;
    const PAGE: usize = 4096;
    let memory = |fill: u8| {
        let range = (vm_memory::GuestAddress(0), 16 * PAGE);
        let memory = vm_memory::GuestMemoryMmap::<()>::from_ranges(&[range]).unwrap();
        memory.write_slice(&vec![fill; 16 * PAGE], range.0).unwrap();
        memory
    };
    let give = |machine: &Machine, memory: &vm_memory::GuestMemoryMmap| {
        let host = memory.get_host_address(vm_memory::GuestAddress(0)).unwrap();
        let region = kvm_bindings::kvm_userspace_memory_region {
            memory_size: u64::try_from(16 * PAGE).unwrap(),
            userspace_addr: u64::try_from(host.addr()).unwrap(),
            ..Default::default()
        };
        kvm_state::map_test_memory(&machine.vm, region);
    };
    let content = |memory: &vm_memory::GuestMemoryMmap| {
        let mut bytes = vec![0; 16 * PAGE];
        memory.read_slice(&mut bytes, vm_memory::GuestAddress(0)).unwrap();
        bytes
    };
    let (source_memory, destination_memory) = (memory(0xaa), memory(0xaa));
    let source = machine(1);
    give(&source, &source_memory);
    msrs::restore(&source.vcpus[0], &[(WALL_CLOCK, 0x1000), (SYSTEM_TIME, 0x2001)]).unwrap();
    assert_ne!(content(&source_memory), content(&destination_memory), "KVM wrote the wall clock");
    let (devices, vcpus) = save(&source);
    let before = content(&destination_memory);
    let destination = machine(1);
    give(&destination, &destination_memory);
    restore(&destination, &devices, &vcpus);
    assert_eq!(content(&destination_memory), before);
    let saved = save(&destination).1;
    assert!(saved[0].msrs.contains(&proto::Msr { index: SYSTEM_TIME, value: 0x2001 }));
}

#[test]
fn tsc_deadline_survives() {
    let source = machine(1);
    let mut lapic = source.vcpus[0].get_lapic().unwrap();
    // Software-enabled, and the timer in deadline mode.
    (lapic.regs[0xf0], lapic.regs[0xf1]) = (-1, 1);
    (lapic.regs[0x320], lapic.regs[0x322]) = (0x40, 4);
    source.vcpus[0].set_lapic(&lapic).unwrap();
    const FAR: u64 = 1 << 62;
    msrs::restore(&source.vcpus[0], &[(time::MSR_TSC_DEADLINE, FAR)]).unwrap();
    let (devices, vcpus) = save(&source);
    assert_eq!(vcpus[0].tsc_deadline, FAR);
    let destination = machine(1);
    restore(&destination, &devices, &vcpus);
    let (_, vcpus) = save(&destination);
    assert_eq!(vcpus[0].tsc_deadline, FAR);
}

#[test]
fn clocks_of_an_old_vm_go_on_in_a_new_one() {
    let source = machine(2);
    let (mut devices, vcpus) = save(&source);
    const HOURS: u64 = 7_200_000_000_000;
    devices.clock_ns += HOURS;
    let destination = machine(2);
    restore(&destination, &devices, &vcpus);
    let (devices_there, vcpus_there) = save(&destination);
    assert!(devices_there.clock_ns >= devices.clock_ns);
    assert!(devices_there.clock_ns < devices.clock_ns + HOURS);
    for (vcpu, there) in vcpus.iter().zip(&vcpus_there) {
        assert!(vcpu.tsc <= there.tsc);
    }
}

#[test]
fn xsave_area_of_a_larger_cpu_is_refused_if_it_is_in_use() {
    let machine = machine(1);
    let (devices, mut vcpus) = save(&machine);
    let room = machine.host.xsave.get();
    let mut area = vcpus[0].xsave.to_vec();
    area.resize(room + 64, 0);
    vcpus[0].xsave = area.clone().into();
    restore(&machine, &devices, &vcpus);
    area[room + 7] = 1;
    vcpus[0].xsave = area.into();
    let clock = restore_clock(&machine.vm, &devices).unwrap();
    let error = restore_vcpu(&machine.vcpus[0], &vcpus[0], &machine.host, clock).unwrap_err();
    let SnapshotError::Xsave { length, .. } = error else { panic!("{error}") };
    assert_eq!(length, room + 8);
}

fn state_of_two() -> proto::VmState {
    let machine = machine(2);
    let (devices, vcpus) = save(&machine);
    whole(devices, vcpus)
}

#[test]
fn state_of_another_version_is_refused_by_name() {
    let newer = proto::VmState { version: 3, ..state_of_two() };
    let error = state::decode(&newer.encode_to_vec()).unwrap_err();
    assert_eq!(error, WireError::Version { version: 3, known: 2 });
    // The rest of a newer state need not decode.
    let mut bytes = vec![0x08, 0x03];
    bytes.extend_from_slice(&[0x10, 0x01]);
    let error = state::decode(&bytes).unwrap_err();
    assert_eq!(error, WireError::Version { version: 3, known: 2 });
    assert_eq!(state::decode(&[]).unwrap_err(), WireError::Version { version: 0, known: 2 });
}

#[test]
fn state_of_the_first_version_is_still_read() {
    let old = whole_of_version_1(state_of_two());
    assert_eq!(state::decode(&old.encode_to_vec()).unwrap(), old);
}

#[test]
fn a_state_and_its_configuration_are_of_one_version() {
    let mixed = proto::VmState { version: 1, ..state_of_two() };
    let error = state::decode(&mixed.encode_to_vec()).unwrap_err();
    assert_eq!(error, WireError::OtherVersion { version: 1, config: 2 });
}

#[test]
fn state_that_no_vm_can_have_is_refused() {
    let good = state_of_two();
    state::decode(&good.encode_to_vec()).unwrap();
    type Damage = fn(&mut proto::VmState);
    let damages: [(&str, Damage); 19] = [
        ("no clock chip", |s| s.clock_chip = None),
        ("no power button", |s| s.power = None),
        ("no config", |s| s.config = None),
        ("no devices", |s| s.devices = None),
        ("no serial", |s| s.serial = None),
        ("no i8042", |s| s.i8042 = None),
        ("a vCPU less", |s| drop(s.vcpus.pop())),
        ("vCPUs swapped", |s| s.vcpus.swap(0, 1)),
        ("no registers", |s| s.vcpus[0].registers = None),
        ("short APIC", |s| s.vcpus[0].lapic = vec![0; 1023].into()),
        ("short XSAVE", |s| s.vcpus[1].xsave = vec![0; 512].into()),
        ("long XSAVE", |s| s.vcpus[1].xsave = vec![0; 1 << 20].into()),
        ("many leaves", |s| s.vcpus[0].cpuid = vec![Default::default(); 257]),
        ("many MSRs", |s| s.vcpus[0].msrs = vec![Default::default(); 4097]),
        ("many XCRs", |s| s.vcpus[0].xcrs = vec![Default::default(); 17]),
        ("unknown run state", |s| s.vcpus[0].mp_state = 9),
        ("unknown event", |s| s.vcpus[0].events.as_mut().unwrap().flags = 1 << 30),
        ("PIT of 2", |s| s.devices.as_mut().unwrap().pit.as_mut().unwrap().channels.truncate(2)),
        ("wide byte", |s| s.devices.as_mut().unwrap().pic_slave.as_mut().unwrap().imr = 256),
    ];
    for (what, damage) in damages {
        let mut state = good.clone();
        damage(&mut state);
        assert!(state::decode(&state.encode_to_vec()).is_err(), "{what}");
    }
}

#[test]
fn oversized_state_is_refused_unread() {
    let error = state::decode(&vec![0xff; (16 << 20) + 1]).unwrap_err();
    assert!(matches!(error, WireError::TooLarge { .. }), "{error}");
}

#[test]
fn guest_with_fewer_features_keeps_its_leaves_where_there_are_more() {
    let host = this_host();
    let features = host.names().into_iter().filter(|name| !name.starts_with("kvm_pv_"));
    let order = proto::CpuOrder { name: "rack".into(), features: features.collect() };
    let model = cpu::Model::ordered(Some(&order), &host).unwrap();
    let source = machine_of(2, Some(&model));
    let (devices, vcpus) = save(&source);
    let destination = machine(2);
    let (_, fresh) = save(&destination);
    let allowed = Cpu { host, model: Some(model) };
    for (vcpu, there) in vcpus.iter().zip(&fresh) {
        assert_ne!(vcpu.cpuid, there.cpuid);
        allowed.check(vcpu).unwrap();
        let error = allowed.check(there).unwrap_err().to_string();
        assert!(error.contains("beyond the VM's model rack: kvm_pv_"), "{error}");
    }
    restore(&destination, &devices, &vcpus);
    let (_, after) = save(&destination);
    for (vcpu, there) in vcpus.iter().zip(&after) {
        assert_eq!(vcpu.cpuid, there.cpuid);
    }
}

#[test]
fn vcpu_with_a_feature_that_no_kvm_gives_is_refused_by_name() {
    const CONTEXT_ID: u32 = 1 << 10;
    let (_, mut vcpus) = save(&machine(1));
    let allowed = Cpu { host: this_host(), model: None };
    allowed.check(&vcpus[0]).unwrap();
    for leaf in vcpus[0].cpuid.iter_mut().filter(|leaf| leaf.function == 1) {
        leaf.ecx |= CONTEXT_ID;
    }
    let error = allowed.check(&vcpus[0]).unwrap_err().to_string();
    assert!(error.contains("vCPU 0 of the guest was given: cid;"), "{error}");
}

#[test]
fn tsc_of_a_host_that_was_calibrated_a_little_differently_goes_on() {
    let source = machine(2);
    let (devices, mut vcpus) = save(&source);
    for vcpu in &mut vcpus {
        vcpu.tsc_khz += vcpu.tsc_khz / 5000;
    }
    let destination = machine(2);
    restore(&destination, &devices, &vcpus);
    let (_, after) = save(&destination);
    for (vcpu, there) in vcpus.iter().zip(&after) {
        assert_eq!(vcpu.tsc_khz, there.tsc_khz, "the guest still has the rate it knows");
        assert!(vcpu.tsc <= there.tsc);
    }
}

#[test]
fn tsc_of_another_rate_is_refused_where_kvm_cannot_scale() {
    let machine = machine(1);
    let vcpu = &machine.vcpus[0];
    let has = vcpu.get_tsc_khz().unwrap();
    for wanted in [has + has / 100, has - has / 100, 0, u32::MAX] {
        let error = time::set_rate(vcpu, wanted, false).unwrap_err();
        assert!(matches!(error, SnapshotError::TscFrequency { .. }), "{wanted}: {error}");
        assert_eq!(vcpu.get_tsc_khz().unwrap(), has);
    }
}
