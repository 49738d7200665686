//! Extended attributes, as far as they travel: capabilities of programs, access
//! control lists, and what users and root write down beside a file. Labels of security
//! modules are each host's own.

use std::io;
use std::path::Path;

use rustix::fs::{XattrFlags, flistxattr, fremovexattr, fsetxattr, lgetxattr, llistxattr};
use rustix::io::Errno;

/// The most of one file.
pub(super) const MOST: usize = 64;
/// The longest value (xattr(7)), and all names of a file together, in bytes.
pub(super) const LONGEST: usize = 64 << 10;
/// The longest name, in bytes.
const LONGEST_NAME: usize = 255;

/// A name and a value.
pub(super) type Attribute = (Vec<u8>, Vec<u8>);

/// Whether one of that name travels.
pub(super) fn travels(name: &[u8]) -> bool {
    let exact: [&[u8]; 3] =
        [b"security.capability", b"system.posix_acl_access", b"system.posix_acl_default"];
    let below = |prefix: &[u8]| name.len() > prefix.len() && name.starts_with(prefix);
    // What an overlay notes in its own layers would mean something else elsewhere.
    let of_overlay = below(b"trusted.overlay.") || below(b"user.overlay.");
    name.len() <= LONGEST_NAME
        && !name.contains(&0)
        && !of_overlay
        && (exact.contains(&name) || below(b"user.") || below(b"trusted."))
}

/// Those of a file that travel, sorted; of a symbolic link itself, not of what it leads
/// to.
pub(super) fn read(path: &Path) -> io::Result<Vec<Attribute>> {
    let mut names = vec![0; LONGEST];
    let length = match llistxattr(path, names.as_mut_slice()) {
        Ok(length) => length,
        Err(Errno::NOTSUP) => return Ok(Vec::new()),
        Err(error) => return Err(error.into()),
    };
    let mut found = Vec::new();
    let mut value = Vec::new();
    for name in names[..length].split(|byte| *byte == 0).filter(|name| travels(name)) {
        value.resize(LONGEST, 0);
        match lgetxattr(path, name, value.as_mut_slice()) {
            Ok(length) => found.push((name.to_vec(), value[..length].to_vec())),
            // It went meanwhile.
            Err(Errno::NODATA) => {}
            Err(error) => return Err(error.into()),
        }
    }
    found.sort();
    Ok(found)
}

/// Gives them to an open file, which then has no others that travel.
pub(super) fn write(file: impl std::os::fd::AsFd, all: &[Attribute]) -> io::Result<()> {
    let mut names = vec![0; LONGEST];
    let length = match flistxattr(&file, names.as_mut_slice()) {
        Ok(length) => length,
        Err(Errno::NOTSUP) if all.is_empty() => return Ok(()),
        Err(error) => return Err(error.into()),
    };
    let wanted = |name: &[u8]| all.iter().any(|(other, _)| other == name);
    // Some came from the directory that it was made in.
    for name in names[..length].split(|byte| *byte == 0).filter(|n| travels(n) && !wanted(n)) {
        fremovexattr(&file, name)?;
    }
    for (name, value) in all {
        fsetxattr(&file, name.as_slice(), value, XattrFlags::empty())?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn labels_of_a_host_stay_there() {
        for name in ["user.note", "security.capability", "trusted.x", "system.posix_acl_access"] {
            assert!(travels(name.as_bytes()), "{name}");
        }
        for name in [
            "user.",
            "security.selinux",
            "security.ima",
            "trusted.overlay.opaque",
            "system.nfs4_acl",
            "user.a\0b",
            "",
        ] {
            assert!(!travels(name.as_bytes()), "{name}");
        }
    }
}
