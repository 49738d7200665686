//! What only block devices can do.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

mod request {
    #![allow(missing_docs)]
    nix::ioctl_none!(blkflsbuf, 0x12, 97);
}

/// Writes back and drops what this host has cached of a block device
/// (`BLKFLSBUF`). Needs the right to administer the system.
///
/// # Errors
/// When it is no block device, or that is not allowed.
pub fn drop_cache(device: &File) -> io::Result<()> {
    // SAFETY: the request takes no argument and touches no memory of ours; the
    // descriptor is open as long as `device` is borrowed.
    unsafe { request::blkflsbuf(device.as_raw_fd()) }.map(drop).map_err(Into::into)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_is_no_block_device() {
        assert!(drop_cache(&tempfile::tempfile().unwrap()).is_err());
    }
}
