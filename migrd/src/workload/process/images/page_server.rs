//! The page server's end of a dump: CRIU sends memory over a socket instead of writing
//! it into images (CRIU, "Page server"; `criu/page-xfer.c` of CRIU 4.2).
//!
//! A CRIU that writes images copies all memory once while the processes stand still.
//! What it sends here are the pages themselves, and those that can be read in the
//! processes just as well are dropped unread: only where they are is noted. What is
//! executable is kept as it was sent, since CRIU runs code of its own there meanwhile,
//! and so is what CRIU does not call lazy: files' pages, stacks, shared memory.

use std::fs::File;
use std::io::{self, BufWriter, Read, Write};
use std::ops::Range;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::sync::Arc;

use nix::fcntl::{FcntlArg, OFlag, SpliceFFlags, fcntl, splice};
use nix::unistd::pipe2;
use prost::Message;

use super::frozen::{Frozen, Process};
use super::{Images, ImagesError, system};
use crate::keeper::criu::pages::{
    ADD, CLOSE, COMMAND_BYTES, Command, Entry, FORCE_CLOSE, HOLE, Head, LAZY, MAGIC, OPEN, PARENT,
    PRESENT,
};
use crate::units::PAGE_SIZE;

// What `dst_id` is of (`PS_TYPE_*`).
const OF_PROCESS: u64 = 1;
const OF_SHARED: u64 = 2;
/// How much is dropped at once, in bytes.
const DROP: usize = 1 << 20;
/// How much is copied at once, in bytes.
const COPY: usize = 256 << 10;

/// An image that is being written.
struct Opened {
    of: u64,
    entries: BufWriter<File>,
    pages: File,
    /// Length of `pages` so far, in bytes.
    length: u64,
    frozen: Arc<Frozen>,
    /// None for what is no process'.
    process: Option<Arc<Process>>,
    executable: Vec<Range<u64>>,
}

/// Where the memory of a dump goes.
pub struct PageServer<'a, F> {
    images: &'a Images,
    /// The process of that number in its namespace.
    process: F,
    socket: UnixStream,
    waste: (OwnedFd, OwnedFd, File),
    opened: Option<Opened>,
    count: u32,
}

impl<'a, F: Fn(u32) -> io::Result<u32>> PageServer<'a, F> {
    /// For images that come to be in `images`, from the other end of `socket`. `process`
    /// says which process has a number in the namespace of the tree.
    ///
    /// # Errors
    /// When the system has no room.
    pub fn new(images: &'a Images, socket: UnixStream, process: F) -> Result<Self, ImagesError> {
        let failed = system("receive memory");
        let waste = || -> io::Result<_> {
            let (from, to) = pipe2(OFlag::O_CLOEXEC)?;
            // A smaller one does as well.
            let _ = fcntl(&to, FcntlArg::F_SETPIPE_SZ(i32::try_from(DROP).unwrap_or(i32::MAX)));
            Ok((from, to, File::options().write(true).open("/dev/null")?))
        };
        let waste = waste().map_err(failed)?;
        Ok(Self { images, process, socket, waste, opened: None, count: 0 })
    }

    /// Serves until CRIU says that it was all.
    ///
    /// # Errors
    /// When it ends before, or sends what it may not.
    pub fn serve(mut self) -> Result<(), ImagesError> {
        let failed = |e| system("receive memory from CRIU")(e);
        loop {
            let mut bytes = [0; COMMAND_BYTES];
            self.socket.read_exact(&mut bytes).map_err(failed)?;
            let command = Command::decode(&bytes);
            match command.command {
                OPEN => {
                    self.open(command.of)?;
                    // No images come before these.
                    self.socket.write_all(&[0]).map_err(failed)?;
                }
                PARENT => self.socket.write_all(&0_i32.to_ne_bytes()).map_err(failed)?,
                ADD | HOLE => self.add(command)?,
                CLOSE | FORCE_CLOSE => {
                    self.close()?;
                    return self.socket.write_all(&0_i32.to_ne_bytes()).map_err(failed);
                }
                other => return Err(ImagesError::Odd(format!("CRIU sent the command {other}"))),
            }
        }
    }

    fn open(&mut self, of: u64) -> Result<(), ImagesError> {
        self.close()?;
        let odd = || ImagesError::Odd(format!("CRIU sends memory of {of:#x}"));
        let number = of >> 8;
        let (name, process) = match of & 0xff {
            OF_PROCESS => {
                let process = u32::try_from(number).map_err(|_| odd())?;
                let found = (self.process)(process).map_err(system("find a process"))?;
                (format!("pagemap-{number}.img"), Some((found, process)))
            }
            OF_SHARED => (format!("pagemap-shmem-{number}.img"), None),
            _ => return Err(odd()),
        };
        self.count += 1;
        let pages_id = self.count;
        let pages_name = format!("pages-{pages_id}.img");
        let flags = OFlag::O_RDWR | OFlag::O_CREAT | OFlag::O_EXCL;
        let made = |name: &str| {
            self.images.open_file(0, name, flags).map_err(system(format!("make {name}")))
        };
        let (entries, pages) = (made(&name)?, made(&pages_name)?);
        let executable = match process {
            Some((pid, _)) => executable(pid).map_err(system("read the mappings of a process"))?,
            None => Vec::new(),
        };
        let process = process.map(|(pid, number)| Process::open(pid, number)).transpose();
        let process = process.map_err(system("read the memory of a process"))?.map(Arc::new);
        let frozen = self.images.keep_frozen(&pages_name);
        let mut entries = BufWriter::new(entries);
        let begun = entries
            .write_all(&[MAGIC[0].to_le_bytes(), MAGIC[1].to_le_bytes()].concat())
            .and_then(|()| put(&mut entries, &Head { pages_id }));
        begun.map_err(system("write an image"))?;
        self.opened = Some(Opened { of, entries, pages, length: 0, frozen, process, executable });
        Ok(())
    }

    fn add(&mut self, command: Command) -> Result<(), ImagesError> {
        let Command { flags, pages, address, of, .. } = command;
        let odd = || ImagesError::Odd("CRIU sends memory that can't be".into());
        let opened = self.opened.as_mut().filter(|opened| opened.of == of).ok_or_else(odd)?;
        let length = pages.checked_mul(PAGE_SIZE).filter(|l| address.checked_add(*l).is_some());
        let length = length.ok_or_else(odd)?;
        let entry =
            Entry { vaddr: address, compat_nr_pages: 0, flags: Some(flags), nr_pages: Some(pages) };
        put(&mut opened.entries, &entry).map_err(system("write an image"))?;
        if flags & PRESENT == 0 {
            return Ok(());
        }
        let end = opened.length.checked_add(length).ok_or_else(odd)?;
        self.images.allows(end)?;
        let stays = flags & LAZY != 0
            && !opened.executable.iter().any(|r| r.start < address + length && address < r.end);
        match &opened.process {
            Some(process) if stays => {
                drop_bytes(&self.socket, &self.waste, length)
                    .map_err(system("receive memory from CRIU"))?;
                opened.frozen.add(opened.length, length, process, address);
                opened.pages.set_len(end).map_err(system("write an image"))?;
            }
            _ => copy(&mut self.socket, &opened.pages, opened.length, length)
                .map_err(system("write an image"))?,
        }
        opened.length = end;
        Ok(())
    }

    fn close(&mut self) -> Result<(), ImagesError> {
        match self.opened.take() {
            Some(mut opened) => opened.entries.flush().map_err(system("write an image")),
            None => Ok(()),
        }
    }
}

/// One message of an image: its length (u32) and itself.
fn put(image: &mut impl Write, message: &impl Message) -> io::Result<()> {
    let bytes = message.encode_to_vec();
    let length = u32::try_from(bytes.len()).map_err(io::Error::other)?;
    image.write_all(&length.to_le_bytes())?;
    image.write_all(&bytes)
}

/// Takes so many bytes without looking at them.
fn drop_bytes(
    socket: &UnixStream,
    (from, to, nothing): &(OwnedFd, OwnedFd, File),
    length: u64,
) -> io::Result<()> {
    let mut left = length;
    while left > 0 {
        let most = usize::try_from(left).unwrap_or(usize::MAX).min(DROP);
        let mut taken = splice(socket, None, to, None, most, SpliceFFlags::SPLICE_F_MOVE)?;
        if taken == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        left -= taken as u64;
        while taken > 0 {
            let gone =
                splice(from, None, nothing.as_fd(), None, taken, SpliceFFlags::SPLICE_F_MOVE)?;
            taken = taken.saturating_sub(gone.max(1));
        }
    }
    Ok(())
}

fn copy(socket: &mut UnixStream, to: &File, offset: u64, length: u64) -> io::Result<()> {
    let mut buffer = vec![0; usize::try_from(length).unwrap_or(usize::MAX).min(COPY)];
    let mut done = 0;
    while done < length {
        let most = usize::try_from(length - done).unwrap_or(usize::MAX).min(buffer.len());
        socket.read_exact(&mut buffer[..most])?;
        to.write_all_at(&buffer[..most], offset + done)?;
        done += most as u64;
    }
    Ok(())
}

/// Where a process may execute what is there (proc(5), `/proc/PID/maps`).
fn executable(pid: u32) -> io::Result<Vec<Range<u64>>> {
    let maps = std::fs::read_to_string(format!("/proc/{pid}/maps"))?;
    Ok(maps.lines().filter_map(executable_line).collect())
}

fn executable_line(line: &str) -> Option<Range<u64>> {
    let (range, rest) = line.split_once(' ')?;
    if rest.as_bytes().get(2) != Some(&b'x') {
        return None;
    }
    let (start, end) = range.split_once('-')?;
    let address = |text| u64::from_str_radix(text, 16).ok();
    Some(address(start)?..address(end)?)
}

#[cfg(test)]
mod tests;
