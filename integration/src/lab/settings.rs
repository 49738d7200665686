//! What a lab is to be. Kept in its directory, so that a host that is powered
//! on again is the host it was.

use std::collections::BTreeMap;
use std::fmt;
use std::fs;
use std::net::{Ipv4Addr, SocketAddr};

use anyhow::{Context, Result, ensure};
use serde::{Deserialize, Serialize};

use super::clock;
use super::layout::Layout;

/// The most hosts that a lab can have.
pub const MAX_HOSTS: u8 = 8;
/// The port of every `migrd`; their addresses differ.
const PORT: u16 = 7070;
/// The private network, as `migrd serve --trust-network` takes it.
pub const NETWORK: &str = "10.99.0.0/24";

/// A host's number, from 1 on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(transparent)]
pub struct HostNumber(u8);

impl HostNumber {
    /// # Errors
    /// When there can't be a host of that number.
    pub fn new(number: u8) -> Result<Self> {
        ensure!((1..=MAX_HOSTS).contains(&number), "hosts have the numbers 1 to {MAX_HOSTS}");
        Ok(Self(number))
    }

    /// Its address in the private network.
    #[must_use]
    pub fn address(self) -> Ipv4Addr {
        Ipv4Addr::new(10, 99, 0, self.0)
    }

    /// Where its `migrd` serves.
    #[must_use]
    pub fn migrd(self) -> SocketAddr {
        SocketAddr::from((self.address(), PORT))
    }

    /// The address of its network card (locally administered).
    #[must_use]
    pub fn mac(self) -> String {
        format!("52:54:00:4c:42:{:02x}", self.0)
    }
}

impl fmt::Display for HostNumber {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl std::str::FromStr for HostNumber {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> Result<Self> {
        Self::new(text.parse().with_context(|| format!("{text:?} is not a host's number"))?)
    }
}

/// What a lab is to be.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Settings {
    /// How many hosts it has.
    pub hosts: u8,
    /// Memory of each, in MiB.
    pub memory_mib: u32,
    /// CPUs of each.
    pub cpus: u8,
    /// QEMU CPU models of hosts that are to differ from the others.
    pub models: BTreeMap<HostNumber, String>,
    /// How fast the machine's time stamp counter runs, if it says.
    pub tsc_khz: Option<u32>,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            hosts: 2,
            memory_mib: 2048,
            cpus: 2,
            models: BTreeMap::new(),
            tsc_khz: clock::tsc_khz(),
        }
    }
}

impl Settings {
    /// # Errors
    /// When no lab can be like that.
    pub fn check(&self) -> Result<()> {
        HostNumber::new(self.hosts).context("how many hosts")?;
        ensure!(self.memory_mib >= 512, "a host needs at least 512 MiB of memory");
        ensure!((1..=16).contains(&self.cpus), "a host has 1 to 16 CPUs");
        for number in self.models.keys() {
            ensure!(number.0 <= self.hosts, "a CPU model is for host {number}, which is not there");
        }
        Ok(())
    }

    /// The hosts' numbers.
    pub fn numbers(&self) -> impl Iterator<Item = HostNumber> + use<> {
        (1..=self.hosts).map(HostNumber)
    }

    /// # Errors
    /// Those of writing.
    pub fn save(&self, layout: &Layout) -> Result<()> {
        self.check()?;
        fs::write(layout.settings(), serde_json::to_vec_pretty(self)?)
            .with_context(|| format!("write {}", layout.settings().display()))
    }

    /// # Errors
    /// When there is no lab.
    pub fn load(layout: &Layout) -> Result<Self> {
        let text = fs::read(layout.settings()).with_context(|| {
            format!("no lab is up in {}: start one with `lab.sh up`", layout.root().display())
        })?;
        let settings: Self = serde_json::from_slice(&text)
            .with_context(|| format!("{} is damaged", layout.settings().display()))?;
        settings.check()?;
        Ok(settings)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hosts_have_addresses_in_the_network_that_they_trust() {
        let network = NETWORK.strip_suffix("0/24").expect("a network of 24 bits");
        for number in (Settings { hosts: MAX_HOSTS, ..Settings::default() }).numbers() {
            assert!(number.migrd().to_string().starts_with(network));
        }
    }

    #[test]
    fn a_lab_that_cannot_be_is_refused() {
        assert!(Settings::default().check().is_ok());
        for wrong in [
            Settings { hosts: 0, ..Settings::default() },
            Settings { hosts: MAX_HOSTS + 1, ..Settings::default() },
            Settings { memory_mib: 100, ..Settings::default() },
            Settings { cpus: 0, ..Settings::default() },
            Settings { models: [(HostNumber(3), "x".into())].into(), ..Settings::default() },
        ] {
            assert!(wrong.check().is_err(), "{wrong:?}");
        }
    }

    #[test]
    fn settings_survive_being_written() {
        let settings =
            Settings { models: [(HostNumber(2), "EPYC".into())].into(), ..Settings::default() };
        let text = serde_json::to_string(&settings).expect("text");
        assert_eq!(serde_json::from_str::<Settings>(&text).expect("settings"), settings);
    }
}
