//! Memory that stays at the source of a tree until it is asked for.
//!
//! The keeper is the page server of the `criu lazy-pages` that puts memory in place
//! ([`server`]): what has come is in the images, what has not is asked of the daemon, and
//! what is known of it ([`known`]) outlives that. Only what the tree waits for is put in
//! place until all has come; then `criu lazy-pages` hears that the tree is complete and
//! fetches the rest in order. It would ask for that without a pause as long as it lacks
//! something, and everything else would have to wait for the answer.

pub mod known;
mod server;

use std::collections::VecDeque;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use migr_proto::v1::ProcessStay;
use nix::fcntl::{OFlag, openat};
use nix::sys::socket::{MsgFlags, send};
use nix::sys::stat::Mode;

use super::criu::pages::{self, Command, LAZY, PRESENT};
use crate::host_memory::HostMemory;
use crate::sys::process::PidFd;
use crate::units::PAGE_SIZE;
use known::{Known, Pages, Run};

/// The longest image of entries (bytes).
const PAGEMAP_BYTES: u64 = 1 << 30;

/// Memory of one tree.
pub struct Following {
    images: Vec<File>,
    inner: Mutex<Inner>,
    /// Something has come, or it is over.
    changed: Condvar,
    /// Somebody waits for something that nobody was asked for.
    bell: Box<dyn Fn() + Send + Sync>,
}

#[derive(Default)]
struct Inner {
    known: Known,
    /// What `criu lazy-pages` has asked and was not answered.
    asked: VecDeque<Command>,
    /// Where it hears that the tree is complete, and what that is called.
    complete: Option<(OwnedFd, [u8; 4])>,
    pager: Option<PidFd>,
    over: bool,
}

impl std::fmt::Debug for Following {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Following").finish_non_exhaustive()
    }
}

impl Following {
    /// That of the images in a directory, all of which are there but for what `stays`. Both
    /// are from a peer. `bell` wakes whoever answers the daemon.
    ///
    /// # Errors
    /// When they can't be right.
    pub fn new(
        directory: &OwnedFd,
        stays: &[ProcessStay],
        bell: impl Fn() + Send + Sync + 'static,
    ) -> io::Result<Arc<Self>> {
        let (images, runs) = read(directory, stays)?;
        let known = Known::new(runs).map_err(io::Error::other)?;
        let (total, _) = HostMemory::of_this_host().read();
        if total > 0 && known.left() > total / PAGE_SIZE {
            return Err(io::Error::other("more memory is to follow than this host has"));
        }
        let inner = Mutex::new(Inner { known, ..Inner::default() });
        let (changed, bell) = (Condvar::new(), Box::new(bell));
        Ok(Arc::new(Self { images, inner, changed, bell }))
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Serves `criu lazy-pages`, which has the other end of the socket.
    ///
    /// # Errors
    /// When there is no room for threads.
    pub fn serve(self: &Arc<Self>, socket: UnixStream, pager: PidFd) -> io::Result<()> {
        self.lock().pager = Some(pager);
        server::start(self, socket)
    }

    /// The tree is complete: `criu lazy-pages` is told so, by `word` through `to`, when
    /// everything has come.
    ///
    /// # Errors
    /// When it can't be told.
    pub fn complete(&self, to: OwnedFd, word: [u8; 4]) -> io::Result<()> {
        let mut inner = self.lock();
        inner.complete = Some((to, word));
        inner.tell_when_all_is_here()
    }

    /// The next pages to ask for; with `urgent` only those that the tree waits for.
    pub fn next(&self, urgent: bool) -> Option<Pages> {
        let known = &mut self.lock().known;
        if urgent { known.urgent() } else { known.in_order() }
    }

    /// Puts what has come into the images.
    ///
    /// # Errors
    /// When it was not asked for, or there is no room.
    pub fn arrived(&self, process: u32, address: u64, data: &[u8]) -> io::Result<()> {
        let length = data.len() as u64;
        let pages = Pages { process, address, count: length / PAGE_SIZE };
        let place = self.lock().known.arriving(pages).map_err(io::Error::other)?;
        let image = self.images.get(place.image).filter(|_| length.is_multiple_of(PAGE_SIZE));
        let odd = || io::Error::other("memory has come that is not of whole pages");
        // The place is this caller's until it is said to be there.
        image.ok_or_else(odd)?.write_all_at(data, place.offset)?;
        let mut inner = self.lock();
        inner.known.arrived(pages);
        self.changed.notify_all();
        inner.tell_when_all_is_here()
    }

    /// Another daemon has come, which was asked for nothing.
    pub fn forget_asked(&self) {
        self.lock().known.forget_asked();
    }

    /// Nothing more can come, or is needed: whoever waits for it ends.
    pub fn end(&self) {
        let mut inner = self.lock();
        inner.over = true;
        self.changed.notify_all();
        if let Some(Err(error)) = inner.pager.take().map(|pager| pager.kill()) {
            eprintln!("`criu lazy-pages` can't be ended: {error}");
        }
    }
}

impl Inner {
    fn tell_when_all_is_here(&mut self) -> io::Result<()> {
        if self.known.left() > 0 {
            return Ok(());
        }
        let Some((to, word)) = self.complete.take() else { return Ok(()) };
        send(to.as_raw_fd(), &word, MsgFlags::MSG_NOSIGNAL)?;
        Ok(())
    }
}

/// The images that have memory, and which pages of which process are where in them.
fn read(directory: &OwnedFd, stays: &[ProcessStay]) -> io::Result<(Vec<File>, Vec<Run>)> {
    let odd = |what: &str| io::Error::other(format!("the images can't be right: {what}"));
    let (mut images, mut runs) = (Vec::new(), Vec::new());
    let mut stays = stays.to_vec();
    stays.sort_unstable_by_key(|stay| (stay.process, stay.address));
    for process in processes(directory)? {
        let name = format!("pagemap-{process}.img");
        let entries = open(directory, &name, OFlag::O_RDONLY)?;
        if entries.metadata()?.len() > PAGEMAP_BYTES {
            return Err(odd("one is too long"));
        }
        let (id, entries) = pages::entries(&whole(&entries)?).map_err(io::Error::other)?;
        let image = open(directory, &format!("pages-{id}.img"), OFlag::O_RDWR)?;
        let length = image.metadata()?.len();
        let (index, mut offset) = (images.len(), 0_u64);
        images.push(image);
        for entry in entries {
            let flags = entry.flags.unwrap_or(0);
            if flags & PRESENT == 0 {
                continue;
            }
            let (address, pages) = (entry.vaddr, entry.nr_pages.unwrap_or(0));
            let bytes = pages.checked_mul(PAGE_SIZE).filter(|_| pages > 0);
            let bytes = bytes.filter(|bytes| address.checked_add(*bytes).is_some());
            let bytes = bytes.ok_or_else(|| odd("memory is where it can't be"))?;
            let end = offset.checked_add(bytes).filter(|end| *end <= length);
            let end = end.ok_or_else(|| odd("one is too short"))?;
            let stays = stays_there(&stays, process, address, bytes)
                .ok_or_else(|| odd("a part stays at the source that is in the images"))?;
            match (flags & LAZY != 0, stays) {
                (true, _) => {
                    let image = index;
                    runs.push(Run { process, address, pages, image, offset, stays });
                }
                (false, true) => return Err(odd("what stays at the source is needed at once")),
                (false, false) => {}
            }
            offset = end;
        }
    }
    Ok((images, runs))
}

/// Whether memory stays at the source, by what is sorted there; `None` when only a part of
/// it does.
fn stays_there(stays: &[ProcessStay], process: u32, address: u64, bytes: u64) -> Option<bool> {
    let after = stays.partition_point(|stay| (stay.process, stay.address) <= (process, address));
    let of_process = |stay: &&ProcessStay| stay.process == process;
    let before = after.checked_sub(1).and_then(|index| stays.get(index)).filter(of_process);
    match before.map(|stay| stay.address.saturating_add(stay.length)) {
        Some(end) if end > address => (end >= address + bytes).then_some(true),
        _ => {
            let next = stays.get(after).filter(of_process);
            next.is_none_or(|stay| stay.address >= address + bytes).then_some(false)
        }
    }
}

/// The processes that have memory in the images.
fn processes(directory: &OwnedFd) -> io::Result<Vec<u32>> {
    let again = openat(directory, ".", OFlag::O_RDONLY | OFlag::O_DIRECTORY, Mode::empty())?;
    let mut listed = nix::dir::Dir::from_fd(again)?;
    let mut found = Vec::new();
    for entry in listed.iter() {
        let entry = entry?;
        let name = entry.file_name().to_string_lossy();
        let number = name.strip_prefix("pagemap-").and_then(|rest| rest.strip_suffix(".img"));
        // Those of shared memory have another name.
        found.extend(number.and_then(|number| number.parse::<u32>().ok()));
    }
    found.sort_unstable();
    Ok(found)
}

fn open(directory: &OwnedFd, name: &str, flags: OFlag) -> io::Result<File> {
    let flags = flags | OFlag::O_CLOEXEC | OFlag::O_NOFOLLOW;
    Ok(openat(directory.as_fd(), name, flags, Mode::empty())?.into())
}

fn whole(file: &File) -> io::Result<Vec<u8>> {
    let length = usize::try_from(file.metadata()?.len()).map_err(io::Error::other)?;
    let mut bytes = vec![0; length];
    file.read_exact_at(&mut bytes, 0)?;
    Ok(bytes)
}

#[cfg(test)]
mod tests;
