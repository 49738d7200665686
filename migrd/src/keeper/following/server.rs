//! The page server that `criu lazy-pages` asks.
//!
//! One thread hears what it asks, so that everything it waits for is known at once; the
//! other answers, in the order in which it was asked, as it expects.

use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, PoisonError};

use super::Following;
use super::known::{Pages, Place};
use crate::keeper::criu::pages::{ADD, CLOSE, COMMAND_BYTES, Command, FORCE_CLOSE, GET, PRESENT};
use crate::sys::memfd;
use crate::units::PAGE_SIZE;

/// The most pages of one answer: 1 MiB. It takes fewer than it has asked for.
const ANSWER: u64 = 256;

/// Starts both threads.
pub(super) fn start(following: &Arc<Following>, socket: UnixStream) -> io::Result<()> {
    let answers = socket.try_clone()?;
    let (hears, says) = (Arc::clone(following), Arc::clone(following));
    std::thread::Builder::new().name("page-asks".into()).spawn(move || {
        if let Err(error) = hear(&hears, socket) {
            eprintln!("`criu lazy-pages` is not heard any more: {error}");
        }
        hears.lock().over = true;
        hears.changed.notify_all();
    })?;
    std::thread::Builder::new().name("pages".into()).spawn(move || {
        if let Err(error) = answer(&says, &answers) {
            eprintln!("`criu lazy-pages` gets no more memory: {error}");
            says.end();
            // It may be closed already.
            let _ = answers.shutdown(Shutdown::Both);
        }
    })?;
    Ok(())
}

/// Notes what is asked, until the connection ends.
fn hear(following: &Following, mut socket: UnixStream) -> io::Result<()> {
    let mut bytes = [0; COMMAND_BYTES];
    loop {
        match socket.read_exact(&mut bytes) {
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(()),
            Err(error) if error.kind() == io::ErrorKind::ConnectionReset => return Ok(()),
            other => other?,
        }
        let command = Command::decode(&bytes);
        let mut inner = following.lock();
        if command.command == GET {
            let process = u32::try_from(command.of).map_err(io::Error::other)?;
            let found = inner.known.find(process, command.address, 1).map_err(io::Error::other)?;
            if found.is_none() && inner.known.want(process, command.address) {
                (following.bell)();
            }
        }
        inner.asked.push_back(command);
        following.changed.notify_all();
    }
}

/// Answers one after the other.
fn answer(following: &Following, mut socket: &UnixStream) -> io::Result<()> {
    while let Some(command) = next(following) {
        match command.command {
            GET => give(following, socket, command)?,
            CLOSE | FORCE_CLOSE => return socket.write_all(&0_i32.to_ne_bytes()),
            other => return Err(io::Error::other(format!("it sent the command {other}"))),
        }
    }
    Ok(())
}

/// What was asked first and not answered; none when it is over.
fn next(following: &Following) -> Option<Command> {
    let mut inner = following.lock();
    loop {
        if let Some(command) = inner.asked.pop_front() {
            return Some(command);
        }
        if inner.over {
            return None;
        }
        inner = following.changed.wait(inner).unwrap_or_else(PoisonError::into_inner);
    }
}

fn give(following: &Following, mut socket: &UnixStream, asked: Command) -> io::Result<()> {
    let process = u32::try_from(asked.of).map_err(io::Error::other)?;
    let Some(place) = wait_for(following, process, asked)? else { return Ok(()) };
    let image = following.images.get(place.image).ok_or(io::ErrorKind::NotFound)?;
    let length = place.pages * PAGE_SIZE;
    let head = Command { command: ADD, flags: PRESENT, pages: place.pages, ..asked };
    let mut bytes = head.encode().to_vec();
    bytes.resize(COMMAND_BYTES + usize::try_from(length).map_err(io::Error::other)?, 0);
    image.read_exact_at(&mut bytes[COMMAND_BYTES..], place.offset)?;
    socket.write_all(&bytes)?;
    if place.once {
        // In this order: once they are said to be given they may come again.
        memfd::punch(image, place.offset, length)?;
        let pages = Pages { process, address: asked.address, count: place.pages };
        following.lock().known.given(pages);
    }
    Ok(())
}

/// Where the pages are that were asked for, once they are there; none when they never will
/// be.
fn wait_for(following: &Following, process: u32, asked: Command) -> io::Result<Option<Place>> {
    let most = asked.pages.clamp(1, ANSWER);
    let mut inner = following.lock();
    loop {
        let found = inner.known.find(process, asked.address, most).map_err(io::Error::other)?;
        if found.is_some() {
            inner.known.has_come(process, asked.address);
            return Ok(found);
        }
        if inner.over {
            return Ok(None);
        }
        // It was there when it was heard of, and given to another since.
        if inner.known.want(process, asked.address) {
            (following.bell)();
        }
        inner = following.changed.wait(inner).unwrap_or_else(PoisonError::into_inner);
    }
}
