//! Programs that nobody here wrote: the machine's own, or those that
//! `integration/install-programs.sh` has fetched.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use crate::binaries::build_dir;

/// Libraries of Debian's packages, below where they were unpacked.
const LIBRARIES: &str = "usr/lib/x86_64-linux-gnu";

/// A program that is here.
#[derive(Clone, Debug)]
pub struct Installed {
    /// Its path.
    pub path: PathBuf,
    /// Where its libraries are, if not where the machine's are.
    libraries: Option<PathBuf>,
}

impl Installed {
    /// The program at `place` below `/`, or below the directory of what was fetched.
    ///
    /// # Errors
    /// When it is nowhere, with what to do.
    pub fn find(place: &str) -> Result<Self> {
        Self::newest(place, |root| Some(root.join(place)))
    }

    /// A program of PostgreSQL, whose directory is named by its version.
    ///
    /// # Errors
    /// When it is nowhere, with what to do.
    pub fn postgresql(name: &str) -> Result<Self> {
        Self::newest(name, |root| {
            let versions = fs::read_dir(root.join("usr/lib/postgresql")).ok()?.flatten();
            let versions = versions.filter_map(|entry| {
                let version: u32 = entry.file_name().to_str()?.parse().ok()?;
                Some((version, entry.path().join("bin").join(name)))
            });
            versions.filter(|(_, path)| path.is_file()).max().map(|(_, path)| path)
        })
    }

    fn newest(what: &str, place: impl Fn(&Path) -> Option<PathBuf>) -> Result<Self> {
        let fetched = build_dir()?.join("programs");
        let found = [Path::new("/"), &fetched].into_iter().find_map(|root| {
            let path = place(root).filter(|path| path.is_file())?;
            let libraries = (root == fetched).then(|| root.join(LIBRARIES));
            Some(Self { path, libraries })
        });
        found.with_context(|| format!("{what} is missing: run integration/install-programs.sh"))
    }

    /// Its path, as an argument.
    #[must_use]
    pub fn program(&self) -> String {
        self.path.display().to_string()
    }

    /// The variable that it needs in its environment, if it needs one: name and value.
    #[must_use]
    pub fn variable(&self) -> Option<(&'static str, String)> {
        let libraries = self.libraries.as_ref()?;
        Some(("LD_LIBRARY_PATH", libraries.display().to_string()))
    }
}
