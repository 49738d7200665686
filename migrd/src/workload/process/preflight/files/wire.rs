//! The list of files as it is sent.

use std::ffi::OsString;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Component, Path, PathBuf};

use migr_proto::v1::{self as proto, UsedFileAccess, UsedFileKind};

use super::{Access, Kind, MAX_FILES, UsedFile};

/// The longest path that the kernel takes, in bytes (`PATH_MAX` without its NUL).
const MAX_PATH: usize = 4095;

/// A list of files that no migrd sends.
#[derive(Clone, Debug, thiserror::Error, PartialEq, Eq)]
pub enum BadFiles {
    /// Too long.
    #[error("{0} files: at most {MAX_FILES} are compared")]
    TooMany(usize),
    /// A path that is not absolute, or leads back up.
    #[error("{0:?} is not the path of a file")]
    Path(PathBuf),
    /// A field of the file that can't be.
    #[error("{what} of {path:?} is not one that a file has")]
    Field {
        /// Which.
        what: &'static str,
        /// Of what.
        path: PathBuf,
    },
}

/// As messages.
#[must_use]
pub fn to_wire(files: &[UsedFile]) -> Vec<proto::UsedFile> {
    files.iter().map(message).collect()
}

fn message(file: &UsedFile) -> proto::UsedFile {
    let UsedFile { path, kind, access, size, mode, mtime_ns, blake3 } = file;
    let kind = match kind {
        Kind::Executable => UsedFileKind::Executable,
        Kind::Mapped => UsedFileKind::Mapped,
        Kind::Open => UsedFileKind::Open,
        Kind::Directory => UsedFileKind::Directory,
        Kind::Device => UsedFileKind::Device,
        Kind::NamedPipe => UsedFileKind::NamedPipe,
        Kind::Socket => UsedFileKind::Socket,
        Kind::MountPoint => UsedFileKind::MountPoint,
    };
    let access = match access {
        Access::Read => UsedFileAccess::Read,
        Access::Append => UsedFileAccess::Append,
        Access::Write => UsedFileAccess::Write,
    };
    proto::UsedFile {
        path: path.as_os_str().as_bytes().to_vec().into(),
        kind: kind.into(),
        access: access.into(),
        size: *size,
        mode: *mode,
        mtime_ns: *mtime_ns,
        blake3: blake3.map(|hash| hash.to_vec()).unwrap_or_default().into(),
    }
}

/// From a peer's messages.
///
/// # Errors
/// When one of them can't be of a file, or there are too many.
pub fn from_wire(files: Vec<proto::UsedFile>) -> Result<Vec<UsedFile>, BadFiles> {
    if files.len() > MAX_FILES {
        return Err(BadFiles::TooMany(files.len()));
    }
    files.into_iter().map(file).collect()
}

fn file(file: proto::UsedFile) -> Result<UsedFile, BadFiles> {
    let (kind, access) = (file.kind(), file.access());
    let proto::UsedFile { path, kind: _, access: _, size, mode, mtime_ns, blake3 } = file;
    let path = PathBuf::from(OsString::from_vec(path.into()));
    if !is_of_a_file(&path) {
        return Err(BadFiles::Path(path));
    }
    let bad = |what| BadFiles::Field { what, path: path.clone() };
    let kind = match kind {
        UsedFileKind::Executable => Kind::Executable,
        UsedFileKind::Mapped => Kind::Mapped,
        UsedFileKind::Open => Kind::Open,
        UsedFileKind::Directory => Kind::Directory,
        UsedFileKind::Device => Kind::Device,
        UsedFileKind::NamedPipe => Kind::NamedPipe,
        UsedFileKind::Socket => Kind::Socket,
        UsedFileKind::MountPoint => Kind::MountPoint,
        UsedFileKind::Unspecified => return Err(bad("the kind")),
    };
    let access = match access {
        UsedFileAccess::Read => Access::Read,
        UsedFileAccess::Append => Access::Append,
        UsedFileAccess::Write => Access::Write,
        UsedFileAccess::Unspecified => return Err(bad("the access")),
    };
    let blake3 = match blake3.len() {
        0 => None,
        _ => Some(<[u8; 32]>::try_from(&blake3[..]).map_err(|_| bad("the hash"))?),
    };
    let file = UsedFile { path: path.clone(), kind, access, size, mode, mtime_ns, blake3 };
    if blake3.is_some() && !super::hash::is_hashed(&file) {
        return Err(bad("the hash"));
    }
    Ok(file)
}

/// Absolute, in one way only, and short enough.
fn is_of_a_file(path: &Path) -> bool {
    let bytes = path.as_os_str().as_bytes();
    let plain = |part: &[u8]| !matches!(part, b"" | b"." | b"..");
    bytes.len() <= MAX_PATH
        && !bytes.contains(&0)
        && path.components().next() == Some(Component::RootDir)
        && (bytes == b"/" || bytes[1..].split(|byte| *byte == b'/').all(plain))
}
