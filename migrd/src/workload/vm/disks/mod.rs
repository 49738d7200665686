//! The disks of a VM, as the daemon holds them.
//!
//! Owns images, their locks and notes, and their bytes as streams. The child
//! gets open descriptors and never a path. May not touch the network, the
//! phases of a migration, or what a guest does with its disks.

mod config;
mod copies;
mod error;
mod holder;
mod image;
mod offer;
mod same;
mod stream;

use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::Arc;

use migr_proto::v1::DiskConfig;

use super::child::{Backing, Child, Device};
use super::told;
use crate::workload::{Problem, WorkloadError};
use holder::{Note, State};

pub use config::{MAX_DISKS, check, check_copied, check_path, index_of, stream, streams};
pub use copies::undo;
pub use error::DiskError;
pub use holder::{Holder, Purpose};
pub use image::Image;
pub use offer::{are_brought, make_copies, problems};
pub use stream::{DiskStreams, Use};

/// Where the disks of a VM are open.
#[derive(Debug)]
enum Hold {
    /// Here and in the child.
    Here(Vec<Image>),
    /// In the child, which an earlier daemon gave them.
    Child,
    /// Nowhere.
    Nowhere,
}

/// The disks of one VM.
#[derive(Debug)]
pub struct Disks {
    disks: Arc<[DiskConfig]>,
    by: Holder,
    hold: Hold,
}

/// Does file work, which may take a while, on a thread of its own.
async fn apart<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, DiskError> + Send + 'static,
) -> Result<T, WorkloadError> {
    match tokio::task::spawn_blocking(work).await {
        Ok(done) => done.map_err(Into::into),
        Err(error) => Err(WorkloadError::caused("working on its disks failed", error)),
    }
}

impl Disks {
    /// The disks of `child`, which may have them open already.
    #[must_use]
    pub fn of(child: &Child, by: Holder) -> Self {
        let disks: Arc<[DiskConfig]> = child.config().disks.clone().into();
        let open = |device: &Device| matches!(device, Device::Disk(_));
        let hold = if child.held().iter().any(open) { Hold::Child } else { Hold::Nowhere };
        Self { disks, by, hold }
    }

    /// Whether they are open, or there are none.
    #[must_use]
    pub fn are_held(&self) -> bool {
        self.disks.is_empty() || !matches!(self.hold, Hold::Nowhere)
    }

    /// Opens and locks them and gives them to the child, unless they are open.
    /// All of them or none.
    ///
    /// # Errors
    /// Which disk can't be had, and why.
    pub async fn take(&mut self, child: &Child, purpose: Purpose) -> Result<(), WorkloadError> {
        if self.are_held() {
            return Ok(());
        }
        let (disks, by) = (self.disks.clone(), self.by.clone());
        let images = apart(move || take_all(&disks, &by, purpose)).await?;
        let shared: Result<Vec<OwnedFd>, DiskError> =
            images.iter().map(|image| image.share().map(Into::into)).collect();
        self.hold = Hold::Here(images);
        let given = match shared {
            Ok(fds) => {
                let backing =
                    |(index, fd): (u32, OwnedFd)| Backing { device: Device::Disk(index), fd };
                let backings = (0..).zip(fds).map(backing).collect();
                child.give(backings).await.map_err(told("give it its disks"))
            }
            Err(error) => Err(error.into()),
        };
        if given.is_err() {
            self.put_back().await;
        }
        given
    }

    /// Undoes [`Self::take`], of a VM that did not run since.
    pub async fn put_back(&mut self) {
        if let Hold::Here(images) = std::mem::replace(&mut self.hold, Hold::Nowhere) {
            let closed = tokio::task::spawn_blocking(move || put_back(&images));
            if let Err(error) = closed.await {
                tracing::error!(%error, "its disks were not put back");
            }
        }
    }

    /// Makes everything durable that was written to them, and closes them in
    /// the child and here. `copied`: the workload takes copies along.
    ///
    /// # Errors
    /// When it is not certain that everything is durable or closed.
    pub async fn let_go(&mut self, child: &Child, copied: bool) -> Result<(), WorkloadError> {
        if self.disks.is_empty() || !self.are_held() {
            return Ok(());
        }
        let detached = child.detach().await.map_err(told("let go of its disks"));
        let state = if copied { State::Moved } else { State::Released };
        let noted = self.note(state, copied).await;
        // The child has closed them even where not everything is durable.
        self.close();
        detached.and(noted)
    }

    fn close(&mut self) {
        if let Hold::Here(images) = std::mem::replace(&mut self.hold, Hold::Nowhere) {
            for image in &images {
                // The child may not have closed its descriptor of it yet.
                if let Err(error) = image.file.unlock() {
                    tracing::warn!(path = %image.path.display(), %error, "it stays locked");
                }
            }
            // Another host may write to it before this one reads it again.
            tokio::task::spawn_blocking(move || images.iter().for_each(Image::drop_cache));
        }
    }

    async fn note(&self, state: State, durable: bool) -> Result<(), WorkloadError> {
        let (disks, by) = (self.disks.clone(), self.by.clone());
        apart(move || {
            let note = Note::new(state, &by);
            for path in noted(&disks) {
                if holder::read_note(path)?.is_none_or(|there| there.is_of(&by)) {
                    holder::write_note(path, &note, durable)?;
                }
            }
            Ok(())
        })
        .await
    }

    /// Of a VM that has ended: they are anybody's now.
    pub async fn release(&mut self) {
        if !self.are_held() || self.disks.is_empty() {
            return;
        }
        let (disks, by) = (self.disks.clone(), self.by.clone());
        let deleted = apart(move || {
            for path in noted(&disks) {
                let note = holder::read_note(path)?;
                if note.is_some_and(|n| n.is_of(&by) && n.state == State::Held) {
                    holder::delete_note(path)?;
                }
            }
            Ok(())
        });
        if let Err(error) = deleted.await {
            tracing::warn!(%error, "a note beside a disk stays behind");
        }
        self.close();
    }

    /// Which of them can't be found by their paths any more: something else is there, or
    /// nothing. Whoever opens them anew would get another disk.
    ///
    /// # Errors
    /// When `child` can't be looked into.
    pub async fn strayed(&self, child: &Child) -> Result<Vec<Problem>, WorkloadError> {
        if self.disks.is_empty() || !self.are_held() {
            return Ok(Vec::new());
        }
        let (disks, pid) = (self.disks.clone(), child.pid());
        apart(move || {
            let open = same::open_in(pid)?;
            let found = disks.iter().filter_map(|disk| same::check(disk, &open).err());
            Ok(found.map(|error| error.problem()).collect())
        })
        .await
    }

    /// Makes durable what was written to them so far. They stay open.
    ///
    /// # Errors
    /// Which disk does not take it.
    pub async fn sync(&self, child: &Child) -> Result<(), WorkloadError> {
        if !self.are_held() {
            return Ok(());
        }
        let (disks, pid) = (self.disks.clone(), child.pid());
        apart(move || {
            let open = same::open_in(pid)?;
            // Whatever descriptor it is done through, it is the same file.
            let writable = disks.iter().filter(|disk| !disk.read_only);
            writable.into_iter().try_for_each(|disk| {
                same::check(disk, &open)?;
                Image::open(Path::new(&disk.path), true).and_then(|image| image.sync())
            })
        })
        .await
    }

    /// Their bytes.
    ///
    /// # Errors
    /// Which disk can't be read.
    pub async fn read(&self, child: &Child) -> Result<DiskStreams, WorkloadError> {
        config::check_copied(&self.disks)?;
        let (disks, pid) = (self.disks.clone(), child.pid());
        apart(move || {
            let open = same::open_in(pid)?;
            let mut streams = DiskStreams::default();
            for disk in disks.iter() {
                same::check(disk, &open)?;
                let image = Image::open_as(&DiskConfig { read_only: true, ..disk.clone() })?;
                streams.push(image.file, image.path, image.bytes, Use::Read);
            }
            Ok(streams)
        })
        .await
    }
}

/// The images that have a note beside them.
fn noted(disks: &[DiskConfig]) -> impl Iterator<Item = &Path> {
    let paths = disks.iter().filter(|disk| !disk.read_only).map(|disk| Path::new(&disk.path));
    paths.filter(|path| path.is_file())
}

fn take_all(disks: &[DiskConfig], by: &Holder, purpose: Purpose) -> Result<Vec<Image>, DiskError> {
    let mut images: Vec<Image> = Vec::new();
    for disk in disks {
        match Image::take(disk, by, purpose) {
            Ok(image) => images.push(image),
            Err(error) => {
                put_back(&images);
                return Err(error);
            }
        }
    }
    Ok(images)
}

fn put_back(images: &[Image]) {
    for image in images {
        if let Err(error) = image.put_back() {
            tracing::warn!(%error, "a note beside a disk is not up to date");
        }
        // The child may not have closed its descriptor of it yet.
        if let Err(error) = image.file.unlock() {
            tracing::warn!(path = %image.path.display(), %error, "it stays locked");
        }
    }
}

/// What keeps this host from running a VM with images that both hosts reach.
#[must_use]
fn shared_problems(disks: &[DiskConfig], by: &Holder) -> Vec<DiskError> {
    disks.iter().filter_map(|disk| shared_problem(disk, by).err()).collect()
}

fn shared_problem(disk: &DiskConfig, by: &Holder) -> Result<(), DiskError> {
    // A device that its source on this very machine has can't be opened to write.
    let looked = Image::open_as(&DiskConfig { read_only: true, ..disk.clone() })?;
    let image = if looked.device { looked } else { Image::open_as(disk)? };
    let note = if image.device { None } else { holder::read_note(&image.path)? };
    if note.as_ref().is_some_and(|n| {
        n.holder.workload == by.workload && matches!(n.state, State::Held | State::Released)
    }) {
        // Its source has it, and will let go of it.
        return Ok(());
    }
    holder::may_take(&image.path, note.as_ref(), by, Purpose::New)?;
    // Only looked at: the lock goes with `image`. Of a device nothing says who
    // has it; it may be the source.
    if !image.device && !holder::try_lock(&image.file, &image.path, true)? {
        return Err(holder::in_use(&image.path));
    }
    Ok(())
}

/// The size of the image that a user names.
///
/// # Errors
/// Why it can't be a disk.
pub async fn measure(path: String, read_only: bool) -> Result<u64, WorkloadError> {
    let measured = tokio::task::spawn_blocking(move || Image::open(Path::new(&path), read_only));
    match measured.await {
        Ok(Ok(image)) => Ok(image.bytes),
        // Nothing is on its way to anywhere.
        Ok(Err(error @ DiskError::Missing { .. })) => Err(WorkloadError::new(format!(
            "{error}: make it (`truncate -s 1G FILE`), or name another"
        ))),
        Ok(Err(error)) => Err(error.into()),
        Err(error) => Err(WorkloadError::caused("working on its disks failed", error)),
    }
}

#[cfg(test)]
mod tests;
