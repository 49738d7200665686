//! What of a model, or of a guest's own leaves, a host lacks.

use std::collections::BTreeMap;

use migr_proto::v1 as proto;

use super::features::{Place, Register, WORDS};
use super::{HostCpu, Model};

/// How far, in parts per million, a host's TSC may run beside the guest's and
/// still be taken for the same: what KVM itself tolerates before it scales
/// (its `tsc_tolerance_ppm`), because two measurements of one rate differ.
const TOLERANCE_PPM: u64 = 250;

/// A guest whose CPUs are more than they may be.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum CpuMisfit {
    /// More than the VM's model.
    #[error("the saved vCPU {vcpu} has CPU features beyond the VM's model {model}: {}", told(.names))]
    BeyondModel {
        /// Its index.
        vcpu: u32,
        /// The model's name.
        model: String,
        /// The features.
        names: Vec<String>,
    },
    /// More than the host.
    #[error(
        "this host's CPUs lack features that vCPU {vcpu} of the guest was given: {}; choose \
         another host, and start guests that shall move between these hosts with --cpu baseline",
        told(.names)
    )]
    BeyondHost {
        /// Its index.
        vcpu: u32,
        /// The features.
        names: Vec<String>,
    },
}

/// The most features that one message names.
const TOLD_MAX: usize = 60;

/// Features in a message.
#[must_use]
pub fn told(names: &[String]) -> String {
    let mut text = names.iter().take(TOLD_MAX).cloned().collect::<Vec<_>>().join(", ");
    if names.len() > TOLD_MAX {
        text.push_str(&format!(" and {} more", names.len() - TOLD_MAX));
    }
    text
}

/// The names of the bits of `words` that are not in what `has` tells.
pub(super) fn lacking(words: &BTreeMap<Place, u32>, has: impl Fn(Place) -> u32) -> Vec<String> {
    words.iter().flat_map(|(place, bits)| place.names(bits & !has(*place))).collect()
}

/// The names of the features of `model` that `host` lacks.
#[must_use]
pub fn missing(model: &Model, host: &HostCpu) -> Vec<String> {
    lacking(&model.words, |place| host.word(place))
}

/// The names of the features beyond `model` that `host` can't hide.
#[must_use]
pub fn unhidden(model: &Model, host: &HostCpu) -> Vec<String> {
    let words = model.words.keys().map(|place| (*place, host.unhidden_word(*place)));
    lacking(&words.collect(), |place| model.word(place).unwrap_or(u32::MAX))
}

/// Whether a guest's TSC that ran at `wanted` kHz can go on at `has` kHz
/// without scaling: the rates differ by no more than two measurements of one
/// rate do.
#[must_use]
pub fn same_rate(wanted: u32, has: u32) -> bool {
    u64::from(wanted.abs_diff(has)) * 1_000_000 <= u64::from(has) * TOLERANCE_PPM
}

/// Checks the CPUID that a vCPU comes with.
///
/// # Errors
/// When it has a feature beyond the model or beyond the host.
pub fn of_leaves(
    vcpu: &proto::VcpuState,
    model: Option<&Model>,
    host: &HostCpu,
) -> Result<(), CpuMisfit> {
    let words = WORDS.iter().map(|word| (word.place, saved(vcpu, word.place) & !word.managed));
    let words: BTreeMap<_, _> = words.collect();
    let index = vcpu.index;
    if let Some(model) = model {
        let names = lacking(&words, |place| model.word(place).unwrap_or(u32::MAX));
        if !names.is_empty() {
            let model = model.name().to_owned();
            return Err(CpuMisfit::BeyondModel { vcpu: index, model, names });
        }
    }
    let names = lacking(&words, |place| host.word(place));
    if names.is_empty() { Ok(()) } else { Err(CpuMisfit::BeyondHost { vcpu: index, names }) }
}

fn saved(vcpu: &proto::VcpuState, place: Place) -> u32 {
    let here = vcpu.cpuid.iter().filter(|l| l.function == place.function && l.index == place.index);
    let word = |leaf: &proto::CpuidLeaf| match place.register {
        Register::Eax => leaf.eax,
        Register::Ebx => leaf.ebx,
        Register::Ecx => leaf.ecx,
        Register::Edx => leaf.edx,
    };
    // A leaf that is there twice counts with all it says.
    here.map(word).fold(0, |bits, more| bits | more)
}
