//! What a VM's guest was given, as it travels with the VM.

use std::collections::BTreeMap;

use migr_proto::v1 as proto;

use super::HostCpu;
use super::features::{Place, Register, WORDS};

/// The longest name of a model, in bytes.
pub(super) const NAME_MAX: usize = 64;
/// Characters of a vendor (Intel SDM 2A, CPUID leaf 0).
const VENDOR_MAX: usize = 12;
/// More words than any version of migr will know.
const WORDS_MAX: usize = 256;

/// A model that no VM can have been given.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum ModelError {
    /// Its name or vendor is no such thing.
    #[error("the VM's CPU model is damaged: {what} is too long or holds odd characters")]
    Text {
        /// Which.
        what: &'static str,
    },
    /// Too many words of features.
    #[error("the VM's CPU model is damaged: it has {0} words of features, more than {WORDS_MAX}")]
    TooMany(usize),
    /// A register that does not exist.
    #[error("the VM's CPU model is damaged: leaf {function:#x}.{index} has no register {register}")]
    Register {
        /// The leaf.
        function: u32,
        /// The subleaf.
        index: u32,
        /// What it says.
        register: i32,
    },
    /// A word that is there twice.
    #[error("the VM's CPU model is damaged: a word of leaf {function:#x}.{index} is there twice")]
    Twice {
        /// The leaf.
        function: u32,
        /// The subleaf.
        index: u32,
    },
}

/// Which features a VM's guest has, for as long as the VM lives.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Model {
    /// `host`, `baseline`, or what the user calls the list.
    pub(super) name: String,
    /// Who made the CPUs it was first started on.
    pub(super) vendor: String,
    /// The words it says something of, also those without any bit. Of other
    /// words it says nothing: the guest has what its first host had.
    pub(super) words: BTreeMap<Place, u32>,
    /// The guest's TSC in kHz; 0: not known.
    pub(super) tsc_khz: u32,
}

impl Model {
    /// All that `host` offers.
    #[must_use]
    pub fn all_of(host: &HostCpu) -> Self {
        let words = WORDS.iter().map(|word| (word.place, host.offered_word(word.place)));
        Self {
            name: "host".to_owned(),
            vendor: host.vendor(),
            words: words.collect(),
            tsc_khz: host.tsc_khz(),
        }
    }

    /// What the user calls it.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Who made the CPUs.
    #[must_use]
    pub fn vendor(&self) -> &str {
        &self.vendor
    }

    /// The guest's TSC in kHz; 0: not known.
    #[must_use]
    pub fn tsc_khz(&self) -> u32 {
        self.tsc_khz
    }

    /// The bits that the guest has of the word at `place`; `None`: the model
    /// does not say.
    #[must_use]
    pub fn word(&self, place: Place) -> Option<u32> {
        self.words.get(&place).copied()
    }

    /// The names of all its features.
    #[must_use]
    pub fn names(&self) -> Vec<String> {
        let derived = |place: Place| WORDS.iter().any(|word| word.place == place && word.derived);
        let words = self.words.iter().filter(|(place, _)| !derived(**place));
        words.flat_map(|(place, bits)| place.names(*bits)).collect()
    }

    /// As it travels.
    #[must_use]
    pub fn to_wire(&self) -> proto::CpuModel {
        let Self { name, vendor, words, tsc_khz } = self;
        let features = words.iter().map(|(place, bits)| {
            let Place { function, index, register } = *place;
            let register = register.to_wire().into();
            proto::CpuFeatures { function, index, register, bits: *bits }
        });
        proto::CpuModel {
            name: name.clone(),
            vendor: vendor.clone(),
            features: features.collect(),
            tsc_khz: *tsc_khz,
        }
    }

    /// What a peer or a file says, which may be anything.
    ///
    /// # Errors
    /// When no VM can have been given that.
    pub fn from_wire(wire: &proto::CpuModel) -> Result<Self, ModelError> {
        let proto::CpuModel { name, vendor, features, tsc_khz } = wire;
        let plain = |text: &str, most: usize| {
            text.len() <= most && text.bytes().all(|b| b.is_ascii_graphic() || b == b' ')
        };
        if !plain(name, NAME_MAX) {
            return Err(ModelError::Text { what: "its name" });
        }
        if !plain(vendor, VENDOR_MAX) {
            return Err(ModelError::Text { what: "the vendor" });
        }
        if features.len() > WORDS_MAX {
            return Err(ModelError::TooMany(features.len()));
        }
        let mut words = BTreeMap::new();
        for &proto::CpuFeatures { function, index, register: number, bits } in features {
            let register = proto::CpuRegister::try_from(number).ok().and_then(Register::from_wire);
            let register =
                register.ok_or(ModelError::Register { function, index, register: number })?;
            if words.insert(Place { function, index, register }, bits).is_some() {
                return Err(ModelError::Twice { function, index });
            }
        }
        Ok(Self { name: name.clone(), vendor: vendor.clone(), words, tsc_khz: *tsc_khz })
    }
}
