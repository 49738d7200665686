//! CRIU's own tool for images, which says whether a directory is in CRIU's format.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};

use crate::binaries::build_dir;

/// Runs crit; what it printed.
///
/// # Errors
/// When there is none, or it fails, with what it said.
pub fn crit(args: &[&str]) -> Result<String> {
    let crit = find()?;
    let ran = Command::new(&crit).args(args).output();
    let ran = ran.with_context(|| format!("run {}", crit.display()))?;
    let said = String::from_utf8_lossy(&ran.stderr);
    ensure!(ran.status.success(), "crit {}: {said}", args.join(" "));
    Ok(String::from_utf8(ran.stdout)?)
}

/// Where `integration/install-criu.sh` looks for it, in that order.
fn find() -> Result<PathBuf> {
    let beside = std::env::var_os("MIGR_CRIU")
        .and_then(|criu| Some(Path::new(&criu).parent()?.join("crit")));
    let path = std::env::var_os("PATH").unwrap_or_else(|| OsString::from("/usr/bin"));
    let in_path = std::env::split_paths(&path).map(|directory| directory.join("crit"));
    let built = build_dir()?.join("criu/crit");
    let mut all = beside.into_iter().chain(in_path).chain([built]);
    all.find(|path| path.is_file())
        .context("these scenarios need crit: integration/install-criu.sh installs it")
}
