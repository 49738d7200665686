//! The file that holds a guest's memory, shared by the daemon and the child.

use std::fs::File;
use std::io;
use std::os::fd::AsFd;

use nix::errno::Errno;
use nix::fcntl::{FallocateFlags, FcntlArg, SealFlag, fallocate, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::unistd::{Whence, lseek};

/// Creates a memfd of `length` bytes whose size nobody can change any more, so
/// that neither side can make the other's mapping fault (memfd_create(2),
/// "File sealing").
///
/// # Errors
/// When the system has no room for it.
pub fn create(name: &std::ffi::CStr, length: u64) -> io::Result<File> {
    let fd = memfd_create(name, MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING)?;
    let file = File::from(fd);
    file.set_len(length)?;
    let seals = SealFlag::F_SEAL_SHRINK | SealFlag::F_SEAL_GROW | SealFlag::F_SEAL_SEAL;
    fcntl(&file, FcntlArg::F_ADD_SEALS(seals))?;
    Ok(file)
}

/// Whether the file's size is fixed for good.
///
/// # Errors
/// When it is not a file that can be sealed.
pub fn is_sealed(file: impl AsFd) -> io::Result<bool> {
    let seals = SealFlag::from_bits_truncate(fcntl(file, FcntlArg::F_GET_SEALS)?);
    Ok(seals.contains(SealFlag::F_SEAL_SHRINK | SealFlag::F_SEAL_GROW))
}

/// The first extent that holds data at or after `from` and before `end`, as
/// `(start, end)` in bytes; `None` when there are only holes.
///
/// # Errors
/// What lseek(2) says.
pub fn next_data(file: &File, from: u64, end: u64) -> io::Result<Option<(u64, u64)>> {
    if from >= end {
        return Ok(None);
    }
    let offset = i64::try_from(from).map_err(io::Error::other)?;
    let start = match lseek(file, offset, Whence::SeekData) {
        Ok(start) => start,
        Err(Errno::ENXIO) => return Ok(None),
        Err(e) => return Err(e.into()),
    };
    let unsigned = |n: i64| u64::try_from(n).map_err(io::Error::other);
    if unsigned(start)? >= end {
        return Ok(None);
    }
    let stop = lseek(file, start, Whence::SeekHole)?;
    Ok(Some((unsigned(start)?, unsigned(stop)?.min(end))))
}

/// Whether there is no data at or after `from` and before `end`. Quick where
/// there is: it looks no further, while [`next_data`] looks for the data's end.
///
/// # Errors
/// What lseek(2) says.
pub fn is_hole(file: &File, from: u64, end: u64) -> io::Result<bool> {
    let offset = i64::try_from(from).map_err(io::Error::other)?;
    match lseek(file, offset, Whence::SeekData) {
        Ok(start) => Ok(u64::try_from(start).map_err(io::Error::other)? >= end),
        Err(Errno::ENXIO) => Ok(true),
        Err(e) => Err(e.into()),
    }
}

/// Gives back the memory of a range, which then reads as zeros.
///
/// # Errors
/// What fallocate(2) says.
pub fn punch(file: &File, offset: u64, length: u64) -> io::Result<()> {
    let flags = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
    let signed = |n: u64| i64::try_from(n).map_err(io::Error::other);
    Ok(fallocate(file, flags, signed(offset)?, signed(length)?)?)
}
