//! Whether this host has what a tree from elsewhere needs.

use std::io;

use nix::sys::stat::SFlag;

use super::hash::{Budget, Found};
use super::{Access, Kind, UsedFile, time_ns};
use crate::workload::Problem;
use crate::workload::process::preflight::report::Report;

/// What is missing on this host, or is another file than at the source. Blocks
/// as long as it takes to read the files that are compared by content, which is
/// as much as [`hash`](super::hash()) takes on.
#[must_use]
pub fn compare(files: &[UsedFile]) -> Vec<Problem> {
    let mut report = Report::default();
    let mut budget = Budget::new();
    for file in files {
        match Found::at(&file.path) {
            Ok(found) => {
                if let Some(how) = differs(file, &found, &mut budget) {
                    report.add(
                        "destination-file-differs",
                        format!("{} {how}", describe(file)),
                        remedy(file),
                    );
                }
            }
            Err(error) => report.add(
                "destination-file-missing",
                match error.kind() {
                    io::ErrorKind::NotFound => format!("{} is not there", describe(file)),
                    _ => format!("{} can't be looked at: {error}", describe(file)),
                },
                remedy(file),
            ),
        }
    }
    report.finish()
}

fn differs(file: &UsedFile, found: &Found, budget: &mut Budget) -> Option<String> {
    let wanted = if file.kind == Kind::Directory { SFlag::S_IFDIR } else { SFlag::S_IFREG };
    if found.format() != wanted {
        let what = if wanted == SFlag::S_IFDIR { "directory" } else { "regular file" };
        return Some(format!("is not a {what} there"));
    }
    if found.stat.st_mode != file.mode {
        let (there, here) = (found.stat.st_mode & 0o7777, file.mode & 0o7777);
        return Some(format!("has the mode {there:04o} there and {here:04o} at the source"));
    }
    if file.kind == Kind::Directory {
        return None;
    }
    let size = u64::try_from(found.stat.st_size).unwrap_or(0);
    let time = time_ns(found.stat.st_mtime, found.stat.st_mtime_nsec);
    // On shared storage it has grown since it was looked at.
    let goes_on = file.access != Access::Read && time > file.mtime_ns;
    if size != file.size && file.access != Access::Append && !goes_on {
        return Some(format!("has {size} bytes there and {} at the source", file.size));
    }
    let hash = file.blake3?;
    if !budget.take(size) {
        return None;
    }
    match found.hash(file.size) {
        Ok(there) if there == hash => None,
        Ok(_) => {
            let age = match time.cmp(&file.mtime_ns) {
                std::cmp::Ordering::Less => "an older",
                std::cmp::Ordering::Equal => "an equally old",
                std::cmp::Ordering::Greater => "a newer",
            };
            Some(format!("has another content there, of the same size, in {age} file"))
        }
        Err(error) => Some(format!("can't be read there: {error}")),
    }
}

fn describe(file: &UsedFile) -> String {
    let what = match file.kind {
        Kind::Executable => "the program",
        Kind::Mapped => "the mapped file",
        Kind::Open => "the open file",
        Kind::Directory => "the directory",
    };
    format!("{what} {}", file.path.display())
}

fn remedy(file: &UsedFile) -> String {
    let path = file.path.display();
    match (file.kind, file.access) {
        (Kind::Executable | Kind::Mapped, Access::Read) => {
            "install the same version of its package on both hosts, or run it from storage that \
             both share"
                .to_owned()
        }
        (Kind::Directory, _) => {
            format!("make {path} there with the same mode, or put it on storage that both share")
        }
        (_, Access::Read) => {
            format!("copy {path} there with its mode (rsync -a), or put it on shared storage")
        }
        (_, Access::Append | Access::Write) => format!(
            "put {path} on storage that both hosts share: the workload writes to it, so a copy \
             is soon an old one"
        ),
    }
}
