//! What a VM's description says of its disks, checked before it is believed:
//! it comes from a user, a snapshot or a peer.

use std::path::Path;

use migr_proto::v1::DiskConfig;

use crate::units::PAGE_SIZE;
use crate::workload::{StreamKey, StreamSpec, WorkloadError};

/// The most disks of a VM.
pub const MAX_DISKS: usize = 8;
/// The unit of a disk's size (virtio 1.2, 5.2.4: capacity is in 512-byte sectors).
pub const SECTOR: u64 = 512;
/// The stream of the first disk; the others follow.
pub const FIRST_STREAM: u32 = 128;
/// The longest path that is taken, in bytes (`PATH_MAX`).
const MAX_PATH: usize = 4096;
/// The most that disks may have together to be sent along, in bytes: the maps of
/// their written pages go in one message ([`crate::child::frame::FRAME_BYTES`]).
const MAX_COPIED: u64 = 1 << 40;
/// The largest disk, in bytes: as long as a stream may be.
const MAX_BYTES: u64 = 1 << 46;

/// The stream of the disk of that index.
#[must_use]
pub fn stream(index: usize) -> StreamKey {
    StreamKey(FIRST_STREAM.saturating_add(u32::try_from(index).unwrap_or(u32::MAX)))
}

/// The disk that a stream is, if it is one's.
#[must_use]
pub fn index_of(key: StreamKey) -> Option<usize> {
    let index = usize::try_from(key.0.checked_sub(FIRST_STREAM)?).ok()?;
    (index < MAX_DISKS).then_some(index)
}

/// The streams of `disks`, the last page filled up with zeros.
#[must_use]
pub fn streams(disks: &[DiskConfig]) -> Vec<StreamSpec> {
    let spec = |(index, disk): (usize, &DiskConfig)| StreamSpec {
        key: stream(index),
        name: format!("disk{index}"),
        length: disk.bytes.next_multiple_of(PAGE_SIZE),
        used: 0,
    };
    disks.iter().enumerate().map(spec).collect()
}

/// Whether a VM can have these disks; no file is looked at.
///
/// # Errors
/// What can't be, and what could.
pub fn check(disks: &[DiskConfig]) -> Result<(), WorkloadError> {
    if disks.len() > MAX_DISKS {
        let text = format!("{} disks are not possible: at most {MAX_DISKS} are", disks.len());
        return Err(WorkloadError::new(text));
    }
    for (index, disk) in disks.iter().enumerate() {
        check_path(&disk.path)?;
        check_size(&disk.path, disk.bytes)?;
        if disks[..index].iter().any(|other| other.path == disk.path) {
            let text = format!("{} is named twice: each disk needs an image", disk.path);
            return Err(WorkloadError::new(text));
        }
    }
    Ok(())
}

/// Whether these disks can be sent along.
///
/// # Errors
/// When they are too large together.
pub fn check_copied(disks: &[DiskConfig]) -> Result<(), WorkloadError> {
    let total = disks.iter().fold(0_u64, |sum, disk| sum.saturating_add(disk.bytes));
    if total <= MAX_COPIED {
        return Ok(());
    }
    Err(WorkloadError::new(
        "disks of more than 1 TiB together can't be sent along: share them between the hosts, and \
         leave out --copy-disks",
    ))
}

/// Whether that can be the path of an image.
///
/// # Errors
/// What is wrong with it.
pub fn check_path(path: &str) -> Result<(), WorkloadError> {
    let plain = Path::new(path).is_absolute() && !path.contains('\0') && path.len() <= MAX_PATH;
    if plain {
        return Ok(());
    }
    let shown: String = path.chars().take(80).collect();
    Err(WorkloadError::new(format!(
        "{shown:?} can't be a disk: give an absolute path of at most {MAX_PATH} bytes"
    )))
}

fn check_size(path: &str, bytes: u64) -> Result<(), WorkloadError> {
    if bytes == 0 || !bytes.is_multiple_of(SECTOR) || bytes > MAX_BYTES {
        return Err(WorkloadError::new(format!(
            "{path} has {bytes} bytes: a disk has a multiple of {SECTOR} bytes, at least {SECTOR}"
        )));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn disk(path: &str, bytes: u64) -> DiskConfig {
        DiskConfig { path: path.into(), read_only: false, bytes }
    }

    fn said(disks: &[DiskConfig]) -> String {
        check(disks).map_or_else(|e| e.to_string(), |()| String::new())
    }

    #[test]
    fn disks_of_whole_sectors_at_absolute_paths_are_possible() {
        assert_eq!(said(&[]), "");
        assert_eq!(said(&[disk("/a", 512), disk("/b", 1 << 40)]), "");
    }

    #[test]
    fn what_a_peer_may_not_name_is_refused() {
        assert!(said(&[disk("a", 512)]).contains("absolute"));
        assert!(said(&[disk("/a\0b", 512)]).contains("absolute"));
        assert!(said(&[disk(&format!("/{}", "a".repeat(4096)), 512)]).contains("4096"));
        for bytes in [0, 511, 513, (1 << 46) + 512] {
            assert!(said(&[disk("/a", bytes)]).contains("multiple of 512"), "{bytes}");
        }
        assert!(said(&[disk("/a", 512), disk("/a", 512)]).contains("twice"));
        assert!(check_copied(&[disk("/a", 1 << 39), disk("/b", 1 << 39)]).is_ok());
        assert!(check_copied(&[disk("/a", 1 << 40), disk("/b", 512)]).is_err());
        let many: Vec<_> = (0..9).map(|i| disk(&format!("/{i}"), 512)).collect();
        assert!(said(&many).contains("at most 8"));
    }

    #[test]
    fn a_stream_reaches_to_the_end_of_the_last_page() {
        let streams = streams(&[disk("/a", 4096), disk("/b", 4608)]);
        let all: Vec<_> = streams.iter().map(|s| (s.key.0, s.length)).collect();
        assert_eq!(all, [(128, 4096), (129, 8192)]);
        assert_eq!(index_of(StreamKey(129)), Some(1));
        assert_eq!(index_of(StreamKey(127)), None);
        assert_eq!(index_of(StreamKey(136)), None);
        assert_eq!(index_of(stream(usize::MAX)), None);
    }
}
