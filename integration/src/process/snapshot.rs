//! What is in a snapshot of a process tree.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};

/// The directory of images in a snapshot.
#[must_use]
pub fn images(snapshot: &Path) -> PathBuf {
    snapshot.join("images")
}

/// The names of CRIU's images and migr's, sorted.
///
/// # Errors
/// When there are none, or what is there is none.
pub fn image_names(snapshot: &Path) -> Result<Vec<String>> {
    let mut names = Vec::new();
    for entry in fs::read_dir(images(snapshot)).context("a snapshot without images")? {
        let entry = entry?;
        let name = entry.file_name().to_string_lossy().into_owned();
        ensure!(entry.file_type()?.is_file() && name.ends_with(".img"), "{name} is no image");
        names.push(name);
    }
    names.sort();
    ensure!(!names.is_empty(), "no image is there");
    Ok(names)
}

/// The one image whose name begins so that is the largest.
///
/// # Errors
/// When there is none.
pub fn largest(snapshot: &Path, begins: &str) -> Result<String> {
    let length = |name: &String| fs::metadata(images(snapshot).join(name)).map_or(0, |m| m.len());
    let names = image_names(snapshot)?.into_iter().filter(|name| name.starts_with(begins));
    names.max_by_key(length).with_context(|| format!("no image {begins}…"))
}

/// Every file and its content.
///
/// # Errors
/// When one can't be read.
pub fn content(snapshot: &Path) -> Result<BTreeMap<PathBuf, Vec<u8>>> {
    let mut all = BTreeMap::new();
    for directory in [snapshot.to_path_buf(), images(snapshot)] {
        for entry in fs::read_dir(&directory)? {
            let entry = entry?;
            if entry.file_type()?.is_file() {
                all.insert(entry.path(), fs::read(entry.path())?);
            }
        }
    }
    Ok(all)
}

/// Copies a snapshot, file by file.
///
/// # Errors
/// When it can't be copied.
pub fn copy(from: &Path, to: &Path) -> Result<()> {
    fs::create_dir(to)?;
    fs::create_dir(images(to))?;
    for (path, bytes) in content(from)? {
        fs::write(to.join(path.strip_prefix(from)?), bytes)?;
    }
    Ok(())
}
