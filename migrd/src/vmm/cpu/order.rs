//! From what a user orders to the model of a new VM.
//!
//! A list names features; what every 64-bit guest needs is in it unasked, and
//! so are the parts of the XSAVE area that the features need.

use std::collections::{BTreeMap, BTreeSet};

use migr_proto::v1 as proto;

use super::features::{self, LEAF_1_EDX, LEAF_8000_0001_EDX, Place, WORDS, Word};
use super::fit::told;
use super::host::WITHHELD;
use super::model::{Model, NAME_MAX};
use super::{CpuidError, HostCpu};

/// The longest list, in names.
const NAMES_MAX: usize = 1024;

/// A VM can't be given the CPUs that are ordered.
#[derive(Debug, thiserror::Error)]
pub enum OrderError {
    /// The name of a list is no name.
    #[error(
        "the CPU model's name must have 1 to {NAME_MAX} printable ASCII characters: rename the file"
    )]
    Name,
    /// `host` and `baseline` have no list.
    #[error("the CPU model {0} has no list of features: rename the file")]
    Listed(String),
    /// More names than there are features.
    #[error("the CPU model lists {0} features, more than the {NAMES_MAX} that are taken")]
    TooMany(usize),
    /// Names of nothing.
    #[error(
        "the CPU model {model} names what is no CPU feature: {}; `migctl -o json hosts` lists \
         the names of those this host has", told(.names)
    )]
    Unknown {
        /// The model.
        model: String,
        /// The names, shortened.
        names: Vec<String>,
    },
    /// Features that no guest gets.
    #[error(
        "the CPU model {model} names {}, which no guest is given: their state can't move",
        told(.names)
    )]
    Withheld {
        /// The model.
        model: String,
        /// The names.
        names: Vec<String>,
    },
    /// A feature without the one it builds on.
    #[error("the CPU model {model} names {name} without {needs}, which it builds on: add {needs}")]
    Needs {
        /// The model.
        model: String,
        /// The feature.
        name: &'static str,
        /// What is not in the list.
        needs: &'static str,
    },
    /// Features that this host lacks.
    #[error(
        "this host's CPUs lack features of the CPU model {model}: {}; choose another host, or a \
         model without them", told(.names)
    )]
    Lacks {
        /// The model.
        model: String,
        /// What is missing.
        names: Vec<String>,
    },
    /// Features beyond the list that KVM does not hide.
    #[error(
        "this host's KVM shows every guest features beyond the CPU model {model}: {}; choose \
         another host, or add them to a list", told(.names)
    )]
    Unhidden {
        /// The model.
        model: String,
        /// What would be seen all the same.
        names: Vec<String>,
    },
    /// The host can't be asked.
    #[error(transparent)]
    Host(#[from] CpuidError),
}

impl OrderError {
    /// Whether the order itself is wrong, on whatever host.
    #[must_use]
    pub fn senseless(&self) -> bool {
        match self {
            Self::Name
            | Self::Listed(_)
            | Self::TooMany(_)
            | Self::Unknown { .. }
            | Self::Withheld { .. }
            | Self::Needs { .. } => true,
            Self::Lacks { .. } | Self::Unhidden { .. } | Self::Host(_) => false,
        }
    }
}

/// What a 64-bit kernel does not start without; in every list unasked.
const NEEDED: &[&str] = &[
    "fpu", "de", "pse", "tsc", "msr", "pae", "mce", "cx8", "mtrr", "pge", "mca", "cmov", "pat",
    "pse36", "clflush", "mmx", "fxsr", "sse", "sse2", "syscall", "nx", "lm",
];

/// The baseline beside [`NEEDED`]: the rest of x86-64-v2, and what makes
/// kvmclock. What is not in it, and why, is in `docs/decisions`.
const BASELINE: &[&str] = &[
    "pni",
    "ssse3",
    "sse4_1",
    "sse4_2",
    "popcnt",
    "cx16",
    "lahf_lm",
    "sep",
    "kvmclock",
    "kvmclock2",
    "kvmclock_stable",
    "kvm_nopiodelay",
    "kvm_pv_eoi",
];

/// What builds on what (Intel SDM 1, 13.1 and 14; AMD APM 1, 4 and 6).
const BUILDS_ON: &[(&str, &[&str])] = &[
    ("pni", &["ssse3", "sse4a"]),
    ("ssse3", &["sse4_1"]),
    ("sse4_1", &["sse4_2"]),
    ("sse4_2", &["avx"]),
    ("xsave", &["avx", "xsaveopt", "xsavec", "xgetbv1", "xsaves", "xfd", "pku", "mpx", "apx_f"]),
    ("xsavec", &["xsaves"]),
    ("xsaves", &["shstk", "ibt"]),
    ("xfd", &["amx_tile"]),
    ("xsave", &["amx_tile"]),
    ("amx_tile", &["amx_int8", "amx_bf16", "amx_fp16", "amx_complex"]),
    ("avx", &["avx2", "fma", "f16c", "xop", "fma4"]),
    ("avx2", &["avx512f", "avx_vnni", "avx_ifma", "avx_vnni_int8", "avx_vnni_int16"]),
    ("avx2", &["avx_ne_convert", "vaes", "vpclmulqdq", "avx10"]),
    ("avx512f", &["avx512dq", "avx512ifma", "avx512pf", "avx512er", "avx512cd", "avx512bw"]),
    ("avx512f", &["avx512vl", "avx512_vnni", "avx512_vpopcntdq", "avx512_4vnniw"]),
    ("avx512f", &["avx512_4fmaps", "avx512_vp2intersect"]),
    ("avx512bw", &["avx512vbmi", "avx512_vbmi2", "avx512_bitalg", "avx512_bf16", "avx512_fp16"]),
];

/// The parts of XCR0 (Intel SDM 1, 13.1) that a feature needs.
const COMPONENTS: &[(&str, u32)] = &[
    ("xsave", 0b11),
    ("avx", 1 << 2),
    ("mpx", 0b11 << 3),
    ("avx512f", 0b111 << 5),
    ("pku", 1 << 9),
    ("amx_tile", 0b11 << 17),
    ("apx_f", 1 << 19),
];

/// The parts of IA32_XSS that a feature needs.
const SUPERVISOR_COMPONENTS: &[(&str, u32)] = &[("shstk", 0b11 << 11), ("ibt", 0b11 << 11)];

/// Bits of leaf 0x80000001, EDX, that repeat those of leaf 1 on AMD's CPUs
/// (AMD APM 3, E.4.2).
const REPEATED: u32 = 0x0183_f3ff;

impl Model {
    /// The model that `order` asks for, on this host; without an order all of
    /// the host.
    ///
    /// # Errors
    /// When the order makes no sense or the host lacks something of it.
    pub fn ordered(order: Option<&proto::CpuOrder>, host: &HostCpu) -> Result<Self, OrderError> {
        let Some(proto::CpuOrder { name, features }) = order else {
            return Ok(Self::all_of(host));
        };
        match name.as_str() {
            "host" | "baseline" if !features.is_empty() => Err(OrderError::Listed(name.clone())),
            "host" => Ok(Self::all_of(host)),
            "baseline" => Self::listed(name, BASELINE.iter().copied(), host),
            _ => Self::listed(name, features.iter().map(String::as_str), host),
        }
    }

    fn listed<'a>(
        name: &str,
        features: impl ExactSizeIterator<Item = &'a str>,
        host: &HostCpu,
    ) -> Result<Self, OrderError> {
        let printable = name.bytes().all(|byte| byte.is_ascii_graphic() || byte == b' ');
        if name.is_empty() || name.len() > NAME_MAX || !printable {
            return Err(OrderError::Name);
        }
        if features.len() > NAMES_MAX {
            return Err(OrderError::TooMany(features.len()));
        }
        let chosen = chosen(name, features)?;
        let mut words: BTreeMap<Place, u32> = WORDS.iter().map(|word| (word.place, 0)).collect();
        for (word, bit) in chosen.iter().filter_map(|feature| features::find(feature)) {
            *words.entry(word.place).or_default() |= bit & !word.managed;
        }
        add_components(&mut words, &chosen);
        let missing = super::fit::lacking(&words, |place| host.offered_word(place));
        if !missing.is_empty() {
            return Err(OrderError::Lacks { model: name.to_owned(), names: missing });
        }
        repeat(&mut words, host);
        let (vendor, tsc_khz) = (host.vendor(), host.tsc_khz());
        let model = Self { name: name.to_owned(), vendor, words, tsc_khz };
        let names = super::fit::unhidden(&model, host);
        if !names.is_empty() {
            return Err(OrderError::Unhidden { model: model.name, names });
        }
        Ok(model)
    }
}

/// The features of a list and those it need not name; every one of them exists
/// and makes sense beside the others.
fn chosen<'a>(
    model: &str,
    listed: impl Iterator<Item = &'a str>,
) -> Result<BTreeSet<&'static str>, OrderError> {
    let mut chosen: BTreeSet<&'static str> = NEEDED.iter().copied().collect();
    let (mut unknown, mut withheld) = (Vec::new(), Vec::new());
    for name in listed {
        match features::find(name) {
            None => unknown.push(shortened(name)),
            Some(_) if WITHHELD.contains(&name) => withheld.push(name.to_owned()),
            Some((word, bit)) => chosen.extend(own_name(word, bit)),
        }
    }
    let model = model.to_owned();
    if !unknown.is_empty() {
        return Err(OrderError::Unknown { model, names: unknown });
    }
    if !withheld.is_empty() {
        return Err(OrderError::Withheld { model, names: withheld });
    }
    for (needs, dependents) in BUILDS_ON.iter().filter(|(needs, _)| !chosen.contains(needs)) {
        if let Some(name) = dependents.iter().find(|name| chosen.contains(*name)) {
            return Err(OrderError::Needs { model, name, needs });
        }
    }
    Ok(chosen)
}

fn own_name(word: &'static Word, mask: u32) -> Option<&'static str> {
    word.bits.iter().find(|(bit, _)| 1 << bit == mask).map(|(_, name)| *name)
}

/// What a user may have written instead of a name, fit for a message.
fn shortened(name: &str) -> String {
    const LONGEST: usize = 40;
    let mut text: String = name.escape_debug().take(LONGEST).collect();
    if name.len() > LONGEST {
        text.push('…');
    }
    text
}

fn add_components(words: &mut BTreeMap<Place, u32>, chosen: &BTreeSet<&'static str>) {
    let needed = |table: &[(&str, u32)]| {
        let of = table.iter().filter(|(name, _)| chosen.contains(name));
        of.fold(0, |bits, (_, more)| bits | more)
    };
    words.insert(features::XCR0_LOW, needed(COMPONENTS));
    words.insert(features::XSS_LOW, needed(SUPERVISOR_COMPONENTS));
}

fn repeat(words: &mut BTreeMap<Place, u32>, host: &HostCpu) {
    let repeats = host.word(LEAF_8000_0001_EDX) & REPEATED;
    // The APIC's bit is not in the model, and is repeated like the others.
    let apic = 1 << 9;
    let of = words.get(&LEAF_1_EDX).copied().unwrap_or(0) | apic;
    *words.entry(LEAF_8000_0001_EDX).or_default() |= of & repeats;
}
