//! The quantities that everything else counts in, each with one home.
//!
//! Nothing here does I/O. Conversions that can lose something return a result.

use std::fmt;
use std::str::FromStr;

/// Size of a guest page in bytes: the granularity of KVM's dirty log (KVM API,
/// 4.8 `KVM_GET_DIRTY_LOG`).
pub const PAGE_SIZE: u64 = 4096;

/// [`PAGE_SIZE`] for indexing into buffers.
pub const PAGE_BYTES: usize = 4096;

/// A hardware address of a network interface (IEEE 802).
pub type Mac = [u8; 6];

/// A hardware address for people, or what was given for one: its first 8 bytes.
#[must_use]
pub fn show_mac(mac: &[u8]) -> String {
    let parts: Vec<_> = mac.iter().take(8).map(|byte| format!("{byte:02x}")).collect();
    parts.join(":")
}

/// Number of a page within one stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PageIndex(pub u64);

impl PageIndex {
    /// Offset of the page's first byte in its stream, in bytes.
    #[must_use]
    pub fn offset(self) -> u64 {
        self.0 * PAGE_SIZE
    }
}

/// Neighbouring pages of one stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PageRun {
    /// The first page.
    pub first: PageIndex,
    /// How many pages, at least one.
    pub count: u64,
}

impl PageRun {
    /// Offset of the first byte, in bytes.
    #[must_use]
    pub fn offset(self) -> u64 {
        self.first.offset()
    }

    /// Length in bytes.
    #[must_use]
    pub fn len_bytes(self) -> u64 {
        self.count * PAGE_SIZE
    }
}

/// How many times a workload has changed hands. A host may run a workload only
/// in the epoch its journal says it owns.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, serde::Serialize, serde::Deserialize,
)]
#[serde(transparent)]
pub struct Epoch(pub u64);

impl Epoch {
    /// The epoch of a workload that never moved.
    pub const FIRST: Self = Self(1);

    /// The epoch after this one.
    #[must_use]
    pub fn next(self) -> Self {
        Self(self.0 + 1)
    }
}

impl fmt::Display for Epoch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// A number or name from outside that is not what it should be.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("{value:?} is not a UUID")]
pub struct NotAUuid {
    value: String,
}

macro_rules! uuid_newtype {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, serde::Serialize, serde::Deserialize)]
        #[serde(transparent)]
        pub struct $name(uuid::Uuid);

        impl $name {
            /// A new random one.
            #[must_use]
            pub fn random() -> Self {
                Self(uuid::Uuid::new_v4())
            }

            /// Its 16 bytes, for keys.
            #[must_use]
            pub fn as_bytes(&self) -> &[u8; 16] {
                self.0.as_bytes()
            }

            /// The one with these 16 bytes.
            #[must_use]
            pub fn from_bytes(bytes: [u8; 16]) -> Self {
                Self(uuid::Uuid::from_bytes(bytes))
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.fmt(f)
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.fmt(f)
            }
        }

        impl FromStr for $name {
            type Err = NotAUuid;

            fn from_str(value: &str) -> Result<Self, NotAUuid> {
                uuid::Uuid::try_parse(value)
                    .map(Self)
                    .map_err(|_| NotAUuid { value: value.chars().take(64).collect() })
            }
        }
    };
}

uuid_newtype! {
    /// Names one migration, at both ends.
    MigrationId
}
uuid_newtype! {
    /// Names a workload for its whole life, on every host.
    WorkloadId
}
uuid_newtype! {
    /// Names a daemon: made at the first start with a state directory.
    HostId
}

uuid_newtype! {
    /// Names a snapshot of a process tree that others may build on.
    SnapshotId
}

/// Now, in ms since the Unix epoch.
#[must_use]
pub fn unix_ms() -> i64 {
    let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    since.map_or(0, |d| i64::try_from(d.as_millis()).unwrap_or(i64::MAX))
}
