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
        // A socket is made anew, where its directory is.
        let path = match file.kind {
            Kind::Socket => file.path.parent().unwrap_or(&file.path),
            _ => &file.path,
        };
        let missing = match file.kind {
            Kind::MountPoint => "destination-mount-missing",
            _ => "destination-file-missing",
        };
        match Found::at(path) {
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
                missing,
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
    let wanted = match file.kind {
        Kind::Executable | Kind::Mapped | Kind::Open => SFlag::S_IFREG,
        Kind::Directory | Kind::Socket => SFlag::S_IFDIR,
        Kind::Device | Kind::NamedPipe | Kind::MountPoint => file.format(),
    };
    if found.format() != wanted {
        return Some(format!("is not a {} there", called(wanted)));
    }
    // Of these CRIU does not look at it.
    if matches!(file.kind, Kind::Device | Kind::Socket | Kind::MountPoint) {
        return None;
    }
    if found.stat.st_mode != file.mode {
        let (there, here) = (found.stat.st_mode & 0o7777, file.mode & 0o7777);
        return Some(format!("has the mode {there:04o} there and {here:04o} at the source"));
    }
    if matches!(file.kind, Kind::Directory | Kind::NamedPipe) {
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

fn called(format: SFlag) -> &'static str {
    match format {
        SFlag::S_IFDIR => "directory",
        SFlag::S_IFREG => "regular file",
        SFlag::S_IFIFO => "named pipe",
        SFlag::S_IFCHR => "character device",
        SFlag::S_IFBLK => "block device",
        _ => "file of the same type",
    }
}

fn describe(file: &UsedFile) -> String {
    let what = match file.kind {
        Kind::Executable => "the program",
        Kind::Mapped => "the mapped file",
        Kind::Open => "the open file",
        Kind::Directory => "the directory",
        Kind::Device => "the open device",
        Kind::NamedPipe => "the open named pipe",
        Kind::Socket => "the directory of the Unix socket",
        Kind::MountPoint => "the mount point",
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
        (Kind::Device, _) => {
            format!(
                "see why {path} is not there: a module that is not loaded, a device of another host"
            )
        }
        (Kind::NamedPipe, _) => format!("make {path} there with the same mode (mkfifo)"),
        (Kind::Socket, _) => format!("make the directory of {path} there"),
        (Kind::MountPoint, _) => {
            format!("make {path} there, and mount what is mounted there if the workload needs it")
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
