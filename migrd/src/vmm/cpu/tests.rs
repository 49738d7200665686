//! Models on made-up hosts, and on the real one.

use kvm_bindings::{KVM_MAX_CPUID_ENTRIES, kvm_cpuid_entry2};
use kvm_ioctls::Kvm;
use migr_proto::v1 as proto;

use super::features::{LEAF_8000_0001_EDX, XCR0_LOW};
use super::*;

fn leaf(function: u32, index: u32, words: [u32; 4]) -> kvm_cpuid_entry2 {
    let [eax, ebx, ecx, edx] = words;
    kvm_cpuid_entry2 { function, index, eax, ebx, ecx, edx, ..Default::default() }
}

fn bits(names: &str) -> u32 {
    names.split(' ').map(|name| features::find(name).unwrap_or_else(|| panic!("{name}")).1).sum()
}

const LEAF_1: &str = "fpu de pse tsc msr pae mce cx8 apic sep mtrr pge mca cmov pat pse36 clflush \
                      mmx fxsr sse sse2";
const LEAF_1_ECX: &str =
    "pni pclmulqdq vmx ssse3 fma cx16 pdcm sse4_1 sse4_2 movbe popcnt aes xsave avx f16c";

/// A server of some years ago, of this vendor.
fn server(vendor: &[u8; 12]) -> Vec<kvm_cpuid_entry2> {
    let part = |at: usize| u32::from_le_bytes(vendor[at..at + 4].try_into().unwrap());
    vec![
        leaf(0x0, 0, [0x1f, part(0), part(8), part(4)]),
        leaf(0x1, 0, [0x5_0654, 0x0001_0800, bits(LEAF_1_ECX), bits(LEAF_1)]),
        leaf(0x7, 0, [1, bits("fsgsbase avx2 bmi1 bmi2 sgx avx512f clwb"), bits("pku"), 0]),
        leaf(0x7, 1, [0, 0, 0, 0]),
        leaf(0xa, 0, [0x0830_0802, 0, 0, 0x603]),
        leaf(0xd, 0, [0b10_1110_0111, 2696, 2696, 0]),
        leaf(0xd, 1, [bits("xsaveopt xsavec"), 0, 0, 0]),
        leaf(0xd, 2, [256, 576, 0, 0]),
        leaf(0xd, 5, [64, 1088, 0, 0]),
        leaf(0xd, 6, [512, 1152, 0, 0]),
        leaf(0xd, 7, [1024, 1664, 0, 0]),
        leaf(0xd, 9, [8, 2688, 0, 0]),
        leaf(0x8000_0001, 0, [0, 0, bits("lahf_lm abm"), bits("syscall nx rdtscp lm")]),
        leaf(0x8000_0007, 0, [0, 0, 0, bits("invtsc")]),
        leaf(
            0x4000_0001,
            0,
            [
                bits("kvmclock kvmclock2 kvmclock_stable kvm_nopiodelay kvm_pv_eoi kvm_pv_ipi"),
                0,
                0,
                0,
            ],
        ),
    ]
}

fn intel() -> HostCpu {
    HostCpu::made_of(server(b"GenuineIntel"), 2_300_000, false)
}

fn order(name: &str, features: &[&str]) -> proto::CpuOrder {
    let features = features.iter().map(|name| (*name).to_owned()).collect();
    proto::CpuOrder { name: name.to_owned(), features }
}

fn refusal(name: &str, features: &[&str], host: &HostCpu) -> String {
    Model::ordered(Some(&order(name, features)), host).unwrap_err().to_string()
}

fn find(leaves: &[kvm_cpuid_entry2], function: u32, index: u32) -> Option<kvm_cpuid_entry2> {
    leaves.iter().find(|l| l.function == function && l.index == index).copied()
}

#[test]
fn the_hosts_own_model_takes_nothing_away_that_guests_can_have() {
    let host = intel();
    let model = Model::ordered(None, &host).unwrap();
    assert_eq!(
        (model.name(), model.vendor(), model.tsc_khz()),
        ("host", "GenuineIntel", 2_300_000)
    );
    assert_eq!(mask::masked(&host.offered(), &model), host.offered());
    assert_eq!(missing(&model, &host), [""; 0]);
    assert_eq!(Model::ordered(Some(&order("host", &[])), &host).unwrap(), model);
    let mut lost = server(b"GenuineIntel");
    lost.retain(|leaf| !host.offered().contains(leaf));
    assert_eq!(lost.iter().map(|l| l.function).collect::<Vec<_>>(), [0x1, 0x7], "vmx and sgx");
    assert!(!host.names().iter().any(|name| name == "vmx" || name == "sgx"));
}

#[test]
fn the_baseline_is_the_same_words_on_every_host_that_has_it() {
    let host = intel();
    let model = Model::ordered(Some(&order("baseline", &[])), &host).unwrap();
    let leaves = mask::masked(&host.offered(), &model);
    let ecx = find(&leaves, 0x1, 0).unwrap().ecx;
    assert_eq!(ecx, bits("pni ssse3 cx16 sse4_1 sse4_2 popcnt"));
    assert_eq!(find(&leaves, 0x7, 0).unwrap().ebx, 0);
    assert_eq!(find(&leaves, 0x8000_0007, 0).unwrap().edx, 0);
    assert_eq!(find(&leaves, 0xd, 0), None, "no XSAVE, no area");
    assert_eq!(find(&leaves, 0xa, 0), None, "no counters");

    let mut small = server(b"GenuineIntel");
    for leaf in small.iter_mut().filter(|l| l.function == 0x7) {
        (leaf.ebx, leaf.ecx) = (0, 0);
    }
    let small = HostCpu::made_of(small, 2_300_000, false);
    assert_eq!(Model::ordered(Some(&order("baseline", &[])), &small).unwrap(), model);
    assert_eq!(missing(&model, &small), [""; 0]);
    let all = Model::ordered(None, &host).unwrap();
    let lost = ["fsgsbase", "bmi1", "avx2", "bmi2", "avx512f", "clwb", "pku"];
    assert_eq!(missing(&all, &small), lost);
}

#[test]
fn a_host_below_the_baseline_is_refused_by_the_names_of_what_it_lacks() {
    let mut leaves = server(b"GenuineIntel");
    for leaf in leaves.iter_mut().filter(|l| l.function == 0x1) {
        leaf.ecx &= !bits("popcnt sse4_2");
    }
    let message = refusal("baseline", &[], &HostCpu::made_of(leaves, 0, false));
    assert!(message.contains("baseline: sse4_2, popcnt;"), "{message}");
}

#[test]
fn the_xsave_area_has_the_parts_that_the_listed_features_need() {
    let host = intel();
    let list = ["pni", "ssse3", "sse4_1", "sse4_2", "xsave", "avx", "avx2"];
    let model = Model::ordered(Some(&order("rack", &list)), &host).unwrap();
    assert_eq!(model.word(XCR0_LOW), Some(0b111));
    let leaves = mask::masked(&host.offered(), &model);
    let area = find(&leaves, 0xd, 0).unwrap();
    assert_eq!((area.eax, area.ebx, area.ecx, area.edx), (0b111, 832, 832, 0));
    let parts: Vec<u32> = leaves.iter().filter(|l| l.function == 0xd).map(|l| l.index).collect();
    assert_eq!(parts, [0, 1, 2]);
    assert_eq!(find(&leaves, 0xd, 1).unwrap().eax, 0, "xsaveopt is not in the list");
    assert_eq!(find(&leaves, 0x7, 0).unwrap().ebx, bits("avx2"));
    for name in ["avx2", "sse2", "lm"] {
        assert!(model.names().iter().any(|n| n == name), "{name}");
    }
}

#[test]
fn lists_that_make_no_sense_are_refused_by_name() {
    let host = intel();
    for (name, list, hint) in [
        ("rack", &["avx2", "xsave"][..], "avx2 without avx"),
        ("rack", &["avx"], "avx without sse4_2"),
        ("rack", &["sse4_2"], "sse4_2 without sse4_1"),
        ("rack", &["pku"], "pku without xsave"),
        ("rack", &["avx22", "rep_good"], "no CPU feature: avx22, rep_good"),
        ("rack", &["xcr0_avx"], "no CPU feature: xcr0_avx"),
        ("rack", &["vmx"], "vmx, which no guest"),
        ("rack", &["rtm", "hle", "clwb"], "rack: hle, rtm;"),
        ("baseline", &["avx"], "rename the file"),
        ("", &["sse2"], "rename the file"),
        ("r\u{7}", &["sse2"], "rename the file"),
    ] {
        let message = refusal(name, list, &host);
        assert!(message.contains(hint), "{name} {list:?}: {message}");
    }
    let long = "x".repeat(5000);
    let message = refusal("rack", &[long.as_str()], &host);
    assert!(message.len() < 300, "{message}");
    let strange: Vec<String> = (0..1000).map(|number| format!("x{number}")).collect();
    let strange: Vec<&str> = strange.iter().map(String::as_str).collect();
    let message = refusal("rack", &strange, &host);
    assert!(message.contains("x59 and 940 more;"), "{message}");
    let many = vec!["sse2"; 1025];
    assert!(refusal("rack", &many, &host).contains("1025 features"));
}

#[test]
fn a_model_below_what_kvm_cannot_hide_is_refused_by_name() {
    let host = intel().not_hiding(vec![leaf(0x7, 0, [0, bits("avx2 bmi1"), bits("ospke"), 0])]);
    let message = refusal("baseline", &[], &host);
    assert!(message.contains("beyond the CPU model baseline: bmi1, avx2;"), "{message}");
    let elsewhere = Model::ordered(Some(&order("baseline", &[])), &intel()).unwrap();
    assert_eq!(unhidden(&elsewhere, &host), ["bmi1", "avx2"]);
    assert_eq!(unhidden(&Model::all_of(&host), &host), [""; 0]);
    let list = ["pni", "ssse3", "sse4_1", "sse4_2", "xsave", "avx", "avx2", "bmi1"];
    Model::ordered(Some(&order("rack", &list)), &host).unwrap();
}

#[test]
fn what_every_vm_has_need_not_be_left_out_of_a_list() {
    let list = ["apic", "x2apic", "hypervisor", "tsc_deadline_timer", "sse2"];
    let model = Model::ordered(Some(&order("rack", &list)), &intel()).unwrap();
    assert!(!model.names().iter().any(|name| name == "x2apic"), "it is not of the host");
}

#[test]
fn bits_that_amd_repeats_follow_the_bits_that_they_repeat() {
    let mut leaves = server(b"AuthenticAMD");
    for leaf in leaves.iter_mut().filter(|l| l.function == 0x8000_0001) {
        leaf.edx |= bits("fpu tsc apic cmov mmx");
    }
    let host = HostCpu::made_of(leaves, 0, false);
    let model = Model::ordered(Some(&order("baseline", &[])), &host).unwrap();
    let expected = bits("syscall nx lm") | bits("fpu tsc apic cmov mmx");
    assert_eq!(model.word(LEAF_8000_0001_EDX), Some(expected));
}

#[test]
fn a_model_survives_the_wire() {
    let model = Model::ordered(Some(&order("baseline", &[])), &intel()).unwrap();
    assert_eq!(Model::from_wire(&model.to_wire()).unwrap(), model);
}

#[test]
fn a_model_that_no_vm_can_have_is_refused() {
    let good = Model::all_of(&intel()).to_wire();
    type Damage = fn(&mut proto::CpuModel);
    let damages: [(&str, Damage); 7] = [
        ("long name", |m| m.name = "n".repeat(65)),
        ("odd name", |m| m.name = "\u{1b}[2J".into()),
        ("long vendor", |m| m.vendor = "n".repeat(13)),
        ("many words", |m| m.features = vec![Default::default(); 257]),
        ("no register", |m| m.features[0].register = 0),
        ("odd register", |m| m.features[0].register = 9),
        ("a word twice", |m| m.features.push(m.features[0])),
    ];
    for (what, damage) in damages {
        let mut bad = good.clone();
        damage(&mut bad);
        assert!(Model::from_wire(&bad).is_err(), "{what}");
    }
}

#[test]
fn a_word_that_only_a_newer_migr_knows_is_compared_by_its_bits() {
    let host = intel();
    let mut wire = Model::all_of(&host).to_wire();
    let register = proto::CpuRegister::Ebx.into();
    wire.features.push(proto::CpuFeatures { function: 0x29, index: 1, register, bits: 1 << 31 });
    let model = Model::from_wire(&wire).unwrap();
    assert_eq!(missing(&model, &host), ["leaf 0x29.1 ebx bit 31"]);
    let mut leaves = server(b"GenuineIntel");
    leaves.push(leaf(0x29, 1, [0, 1 << 31 | 1, 0, 0]));
    let newer = HostCpu::made_of(leaves, 0, false);
    assert_eq!(missing(&model, &newer), [""; 0]);
    let masked = mask::masked(&newer.offered(), &model);
    assert_eq!(find(&masked, 0x29, 1).unwrap().ebx, 1 << 31);
}

fn saved(leaves: &[kvm_cpuid_entry2]) -> proto::VcpuState {
    let wire = |l: &kvm_cpuid_entry2| proto::CpuidLeaf {
        function: l.function,
        index: l.index,
        eax: l.eax,
        ebx: l.ebx,
        ecx: l.ecx,
        edx: l.edx,
        ..Default::default()
    };
    proto::VcpuState { index: 3, cpuid: leaves.iter().map(wire).collect(), ..Default::default() }
}

#[test]
fn saved_leaves_beyond_the_model_or_the_host_are_refused_by_name() {
    let host = intel();
    let baseline = Model::ordered(Some(&order("baseline", &[])), &host).unwrap();
    let guest = saved(for_vcpu(&host, Some(&baseline), 3, 4).unwrap().as_slice());
    assert_eq!(of_leaves(&guest, Some(&baseline), &host), Ok(()));
    let mut more = guest.clone();
    more.cpuid
        .iter_mut()
        .filter(|l| (l.function, l.index) == (7, 0))
        .for_each(|l| l.ebx |= bits("avx2 rtm"));
    let error = of_leaves(&more, Some(&baseline), &host).unwrap_err();
    let names = vec!["avx2".to_owned(), "rtm".to_owned()];
    assert_eq!(error, CpuMisfit::BeyondModel { vcpu: 3, model: "baseline".into(), names });
    let error = of_leaves(&more, None, &host).unwrap_err();
    assert_eq!(error, CpuMisfit::BeyondHost { vcpu: 3, names: vec!["rtm".to_owned()] });
    // Said twice, the second time with more.
    let mut twice = guest;
    let hidden = proto::CpuidLeaf { function: 7, ebx: bits("rtm"), ..Default::default() };
    twice.cpuid.push(hidden);
    assert!(of_leaves(&twice, Some(&baseline), &host).is_err());
}

#[test]
fn rates_are_the_same_within_what_two_measurements_differ() {
    for (wanted, has, same) in [
        (2_300_000, 2_300_000, true),
        (2_300_575, 2_300_000, true),
        (2_299_425, 2_300_000, true),
        (2_300_576, 2_300_000, false),
        (2_299_424, 2_300_000, false),
        (0, 2_300_000, false),
        (2_300_000, 0, false),
        (u32::MAX, 1, false),
    ] {
        assert_eq!(same_rate(wanted, has), same, "{wanted} kHz at {has} kHz");
    }
}

fn kvm() -> Kvm {
    Kvm::new().expect("/dev/kvm must exist and be usable: load kvm_intel or kvm_amd")
}

#[test]
fn kvm_takes_the_leaves_and_the_guest_still_finds_kvm() {
    let kvm = kvm();
    let host = HostCpu::of(&kvm).unwrap();
    let vm = kvm.create_vm().unwrap();
    vm.create_irq_chip().unwrap();
    let vcpu = vm.create_vcpu(1).unwrap();
    let model = Model::all_of(&host);
    let cpuid = for_vcpu(&host, Some(&model), 1, 2).unwrap();
    assert_eq!(cpuid.as_slice(), for_vcpu(&host, None, 1, 2).unwrap().as_slice());
    vcpu.set_cpuid2(&cpuid).unwrap();
    let taken = vcpu.get_cpuid2(KVM_MAX_CPUID_ENTRIES).unwrap();
    assert_eq!(find(taken.as_slice(), 0x1, 0).unwrap().ebx >> 24, 1);
    let kvm = find(taken.as_slice(), 0x4000_0000, 0).unwrap();
    assert_eq!(kvm.ebx.to_le_bytes(), *b"KVMK");
}

/// A list of all that this host has but for one feature, which nothing else
/// builds on, and that feature.
fn all_but_one(host: &HostCpu) -> (proto::CpuOrder, String) {
    let all = host.names();
    let without = |name: &String| {
        let rest: Vec<&str> = all.iter().filter(|n| *n != name).map(String::as_str).collect();
        order("rest", &rest)
    };
    let model = |order: &proto::CpuOrder| Model::ordered(Some(order), host);
    let gone = |model: Model, name: &String| !model.names().contains(name);
    let found = all.iter().map(|name| (without(name), name.clone()));
    let mut found = found.filter(|(o, name)| model(o).is_ok_and(|m| gone(m, name)));
    found.next().expect("a feature that a guest can do without")
}

#[test]
fn kvm_holds_for_a_vcpu_what_its_model_leaves_out() {
    let kvm = kvm();
    let host = HostCpu::of(&kvm).unwrap();
    let (order, name) = all_but_one(&host);
    let (word, mask) = features::find(&name).unwrap();
    let model = Model::ordered(Some(&order), &host).unwrap();
    let vm = kvm.create_vm().unwrap();
    for (index, model, seen) in [(0, None, mask), (1, Some(&model), 0)] {
        let vcpu = vm.create_vcpu(index.into()).unwrap();
        vcpu.set_cpuid2(&for_vcpu(&host, model, index, 2).unwrap()).unwrap();
        let taken = vcpu.get_cpuid2(KVM_MAX_CPUID_ENTRIES).unwrap();
        let leaf = find(taken.as_slice(), word.place.function, word.place.index).unwrap();
        assert_eq!(register(&leaf, word.place) & mask, seen, "{name}");
        let edx = find(taken.as_slice(), 0x1, 0).unwrap().edx;
        assert_ne!(edx & bits("sse2"), 0, "what is left is there");
    }
}

#[test]
fn this_host_tells_its_vendor_and_its_rate() {
    let device = std::fs::OpenOptions::new().read(true).write(true).open("/dev/kvm").unwrap();
    let host = HostCpu::ask(device.into()).unwrap();
    assert_eq!(host.vendor().len(), 12);
    assert!(host.tsc_khz() > 0);
    assert!(host.names().iter().any(|name| name == "sse2"));
}
