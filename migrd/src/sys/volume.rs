//! Files behind disks: read into guest memory and written from it, without a
//! copy in between.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

use vm_memory::bitmap::Bitmap;

use super::vm::Slice;

/// Most pieces of memory that one call takes (`IOV_MAX`).
const PIECES: usize = 1024;

/// Reads from `offset` (bytes) on into `pieces`, one after the other, and says
/// how many bytes there were. What was filled counts as written by the VMM.
///
/// # Errors
/// What preadv(2) says.
pub fn read_at(file: &File, offset: u64, pieces: &[Slice<'_>]) -> io::Result<usize> {
    let at = libc::off_t::try_from(offset).map_err(io::Error::other)?;
    let (vectors, count) = vectors(pieces)?;
    // SAFETY: the vectors describe guest memory that stays mapped as long as
    // `pieces` borrows it. It belongs to no Rust object.
    let read = unsafe { libc::preadv(file.as_raw_fd(), vectors.as_ptr(), count, at) };
    let read = usize::try_from(read).map_err(|_| io::Error::last_os_error());
    // After the bytes, so that nobody takes the pages for clean in between. A
    // read that failed may have filled a part.
    let mut left = read.as_ref().map_or(usize::MAX, |read| *read);
    for piece in pieces {
        let filled = piece.len().min(left);
        piece.bitmap().mark_dirty(0, filled);
        left -= filled;
    }
    read
}

/// Writes `pieces`, one after the other, from `offset` (bytes) on, and says how
/// many bytes it were.
///
/// # Errors
/// What pwritev(2) says.
pub fn write_at(file: &File, offset: u64, pieces: &[Slice<'_>]) -> io::Result<usize> {
    let at = libc::off_t::try_from(offset).map_err(io::Error::other)?;
    let (vectors, count) = vectors(pieces)?;
    // SAFETY: as above; the kernel only reads.
    let written = unsafe { libc::pwritev(file.as_raw_fd(), vectors.as_ptr(), count, at) };
    usize::try_from(written).map_err(|_| io::Error::last_os_error())
}

fn vectors(pieces: &[Slice<'_>]) -> io::Result<(Vec<libc::iovec>, libc::c_int)> {
    if pieces.len() > PIECES {
        return Err(io::Error::from_raw_os_error(libc::EINVAL));
    }
    let vector = |piece: &Slice<'_>| libc::iovec {
        iov_base: piece.ptr_guard_mut().as_ptr().cast(),
        iov_len: piece.len(),
    };
    let count = libc::c_int::try_from(pieces.len()).map_err(io::Error::other)?;
    Ok((pieces.iter().map(vector).collect(), count))
}
