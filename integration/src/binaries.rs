//! Where the programs under test are: beside the program that tests them.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};

/// A program under test.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Program {
    /// The daemon, as users get it.
    Migrd,
    /// The daemon with its failpoints compiled in.
    MigrdFailpoints,
    /// The command line.
    Migctl,
    /// The lab's own program.
    Lab,
}

impl Program {
    fn name(self) -> &'static str {
        match self {
            Self::Migrd => "migrd",
            Self::MigrdFailpoints => "migrd-failpoints",
            Self::Migctl => "migctl",
            Self::Lab => "lab",
        }
    }

    /// Its path.
    ///
    /// # Errors
    /// When it was not built; the message names the command that builds it.
    pub fn path(self) -> Result<PathBuf> {
        let own = std::env::current_exe().context("cannot find the path of this program")?;
        let path = target_dir(&own).join(self.name());
        ensure!(
            path.is_file(),
            "{} is missing: build it with `integration/test.sh --build{}`",
            path.display(),
            if cfg!(debug_assertions) { "" } else { " --release" },
        );
        Ok(path)
    }
}

/// The directory that cargo builds into, with a directory for each profile.
///
/// # Errors
/// When this program is not in one of them.
pub fn build_dir() -> Result<PathBuf> {
    let own = std::env::current_exe().context("cannot find the path of this program")?;
    let above = target_dir(&own).parent().map(Path::to_path_buf);
    above.with_context(|| format!("{} is not where cargo builds", own.display()))
}

/// Tests are in `deps`, one below the programs.
fn target_dir(own: &Path) -> PathBuf {
    let directory = own.parent().unwrap_or(Path::new("."));
    match directory.parent() {
        Some(above) if directory.ends_with("deps") => above.to_path_buf(),
        _ => directory.to_path_buf(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn programs_are_looked_for_beside_the_tests_that_use_them() {
        assert_eq!(target_dir(Path::new("/t/debug/deps/demo-1")), Path::new("/t/debug"));
        assert_eq!(target_dir(Path::new("/t/release/bench")), Path::new("/t/release"));
    }
}
