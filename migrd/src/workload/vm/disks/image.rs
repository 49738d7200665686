//! An image or block device: opened, measured, locked.

use std::fs::{File, OpenOptions};
use std::io::{self, Seek, SeekFrom};
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use migr_proto::v1::DiskConfig;
use nix::fcntl::{OFlag, PosixFadviseAdvice, posix_fadvise};

use super::config::SECTOR;
use super::error::DiskError;
use super::holder::{self, Holder, Note, Purpose, State};
use crate::sys::block;

/// An open image.
#[derive(Debug)]
pub struct Image {
    /// The image; its lock is this open file description's.
    pub file: File,
    /// Where it is.
    pub path: PathBuf,
    /// Nothing is written to it.
    pub read_only: bool,
    /// Its size in bytes.
    pub bytes: u64,
    /// It is a block device.
    pub device: bool,
    /// The note that was beside it when it was taken.
    before: Option<Note>,
}

fn io_error<'a>(what: &'static str, path: &'a Path) -> impl FnOnce(io::Error) -> DiskError + 'a {
    move |source| match source.kind() {
        io::ErrorKind::NotFound => DiskError::Missing { path: path.to_owned() },
        _ => DiskError::Io { what, path: path.to_owned(), source },
    }
}

impl Image {
    /// Opens what is at `path`, without locking it.
    ///
    /// # Errors
    /// When it is not there, no image, of a size that no disk can have, or not
    /// to be opened.
    pub fn open(path: &Path, read_only: bool) -> Result<Self, DiskError> {
        let kind = std::fs::metadata(path).map_err(io_error("open", path))?.file_type();
        let device = kind.is_block_device();
        if !kind.is_file() && !device {
            return Err(DiskError::NotAnImage { path: path.to_owned() });
        }
        // Not to wait for whatever has come there meanwhile; and a device that
        // is mounted or belongs to an array is refused (open(2), O_EXCL).
        let exclusive = if device && !read_only { OFlag::O_EXCL } else { OFlag::empty() };
        let flags = OFlag::O_NONBLOCK | exclusive;
        let mut options = OpenOptions::new();
        options.read(true).write(!read_only).custom_flags(flags.bits());
        let mut file = options.open(path).map_err(|source| match source.kind() {
            io::ErrorKind::ResourceBusy => DiskError::Locked {
                path: path.to_owned(),
                holder: "this host, which has mounted it or uses it otherwise".into(),
                note: None,
            },
            _ => io_error("open", path)(source),
        })?;
        let bytes = file.seek(SeekFrom::End(0)).map_err(io_error("measure", path))?;
        if bytes == 0 || !bytes.is_multiple_of(SECTOR) {
            return Err(DiskError::OddSize { path: path.to_owned(), bytes });
        }
        Ok(Self { file, path: path.to_owned(), read_only, bytes, device, before: None })
    }

    /// Opens the image that `disk` describes.
    ///
    /// # Errors
    /// As [`Self::open`], or when it has another size.
    pub fn open_as(disk: &DiskConfig) -> Result<Self, DiskError> {
        let image = Self::open(Path::new(&disk.path), disk.read_only)?;
        if image.bytes != disk.bytes {
            let (path, found) = (image.path, image.bytes);
            return Err(DiskError::SizeDiffers { path, found, bytes: disk.bytes });
        }
        Ok(image)
    }

    /// Whether a note beside it says who holds it: of a device one would be
    /// among devices, and of what is only read there is no one holder.
    #[must_use]
    pub fn has_note(&self) -> bool {
        !self.read_only && !self.device
    }

    /// Opens and locks the image that `disk` describes, for `by`, and forgets
    /// what this host has cached of it: another may have written to it since.
    ///
    /// # Errors
    /// As [`Self::open_as`], or who else holds it.
    pub fn take(disk: &DiskConfig, by: &Holder, purpose: Purpose) -> Result<Self, DiskError> {
        let mut image = Self::open_as(disk)?;
        holder::lock(&image.file, &image.path, image.read_only)?;
        if !image.device {
            let note = holder::read_note(&image.path)?;
            holder::may_take(&image.path, note.as_ref(), by, purpose)?;
            if image.has_note() {
                holder::write_note(&image.path, &Note::new(State::Held, by), false)?;
            } else if note.as_ref().is_some_and(|n| n.state == State::Arriving) {
                holder::delete_note(&image.path)?;
            }
            image.before = note;
        }
        // What has just been copied to here is nowhere newer.
        if image.before.as_ref().is_none_or(|note| note.state != State::Arriving) {
            image.drop_cache();
        }
        Ok(image)
    }

    /// Undoes [`Self::take`]: the note is what it was.
    ///
    /// # Errors
    /// When it can't be written.
    pub fn put_back(&self) -> Result<(), DiskError> {
        match &self.before {
            Some(note) => holder::write_note(&self.path, note, false),
            None if self.has_note() => holder::delete_note(&self.path),
            None => Ok(()),
        }
    }

    /// Forgets what this host has cached of it and is on the disk as well.
    pub fn drop_cache(&self) {
        let advice = PosixFadviseAdvice::POSIX_FADV_DONTNEED;
        let dropped = if self.device {
            block::drop_cache(&self.file)
        } else {
            posix_fadvise(&self.file, 0, 0, advice).map_err(io::Error::from)
        };
        if let Err(error) = dropped {
            tracing::debug!(path = %self.path.display(), %error, "its cache stays");
        }
    }

    /// Makes durable what was written to it.
    ///
    /// # Errors
    /// What fdatasync(2) says.
    pub fn sync(&self) -> Result<(), DiskError> {
        self.file.sync_data().map_err(io_error("write back", &self.path))
    }

    /// Another descriptor of the same open file, with the same lock.
    ///
    /// # Errors
    /// When there is no descriptor left.
    pub fn share(&self) -> Result<File, DiskError> {
        self.file.try_clone().map_err(io_error("share", &self.path))
    }
}
