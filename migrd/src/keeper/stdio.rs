//! Standard input and output of a process tree: pipes whose other ends stay with
//! the keeper.

use std::fs::{File, OpenOptions};
use std::io::{self, ErrorKind, PipeReader, PipeWriter, Read, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::time::{Duration, Instant};

use migr_proto::v1 as proto;
use nix::fcntl::{FcntlArg, OFlag, fcntl};

use crate::child::console::{Console, ConsoleSink};
use crate::units::PAGE_BYTES;

/// How long output that was written before a tree stood still may take to arrive.
const DRAIN_LIMIT: Duration = Duration::from_secs(2);
/// What is read at once (bytes), and what of unread input is carried.
const BUFFER: usize = 64 << 10;

/// The pipes of one tree.
#[derive(Debug)]
pub struct Stdio {
    /// The tree's ends, until it has them.
    theirs: Option<(PipeReader, PipeWriter)>,
    input: PipeWriter,
    /// For looking how much is in it.
    output: PipeReader,
    /// As CRIU names the two pipes.
    names: (String, String),
}

impl Stdio {
    /// Makes them. A thread puts the output into `sink` from now on.
    ///
    /// # Errors
    /// When there is no room for descriptors or a thread.
    pub fn new(mut sink: ConsoleSink) -> io::Result<Self> {
        let (stdin, input) = io::pipe()?;
        let (output, stdout) = io::pipe()?;
        let names = (name(&stdin)?, name(&stdout)?);
        // A tree that does not read must not make the keeper wait.
        set_nonblocking(&input)?;
        let mut source = output.try_clone()?;
        std::thread::Builder::new().name("output".into()).spawn(move || {
            let mut buffer = vec![0; BUFFER];
            loop {
                match source.read(&mut buffer) {
                    Ok(0) => return,
                    // The sink takes everything.
                    Ok(length) => drop(sink.write_all(&buffer[..length])),
                    Err(error) if error.kind() == ErrorKind::Interrupted => {}
                    Err(_) => return,
                }
            }
        })?;
        Ok(Self { theirs: Some((stdin, stdout)), input, output, names })
    }

    /// The ends that the tree gets: to read from, and to write to.
    #[must_use]
    pub fn theirs(&self) -> Option<(BorrowedFd<'_>, BorrowedFd<'_>)> {
        self.theirs.as_ref().map(|(stdin, stdout)| (stdin.as_fd(), stdout.as_fd()))
    }

    /// The tree has its ends: this process closes its own, so that the end of the
    /// tree is the end of its output.
    pub fn handed_over(&mut self) {
        self.theirs = None;
    }

    /// What CRIU calls them.
    #[must_use]
    pub fn names(&self) -> Vec<proto::ProcessStdio> {
        let named = |fd, pipe: &String| proto::ProcessStdio { fd, pipe: pipe.clone() };
        vec![named(0, &self.names.0), named(1, &self.names.1), named(2, &self.names.1)]
    }

    /// Writes input: all of it, or nothing.
    ///
    /// # Errors
    /// When the tree has not read what came before, or reads nothing any more.
    pub fn input(&mut self, bytes: &[u8]) -> io::Result<()> {
        let holds = fcntl(&self.input, FcntlArg::F_GETPIPE_SZ)?;
        let room = usize::try_from(holds).unwrap_or(0);
        // A pipe is made of pages, and what is written fills up the last one first.
        let waiting = crate::sys::fds::unread(self.input.as_fd())?;
        if waiting + bytes.len() + PAGE_BYTES > room {
            return Err(io::Error::other("it has not read what came before"));
        }
        self.input.write_all(bytes).map_err(|error| match error.kind() {
            ErrorKind::BrokenPipe => io::Error::other("it has closed its standard input"),
            _ => error,
        })
    }

    /// Takes back what of the input a tree that stands still has not read.
    ///
    /// # Errors
    /// When the pipe can't be read.
    pub fn take_input_back(&self) -> io::Result<Vec<u8>> {
        let mut pipe = reopen(&self.input)?;
        let (mut all, mut buffer) = (Vec::new(), vec![0; BUFFER]);
        loop {
            match pipe.read(&mut buffer) {
                Ok(0) => return Ok(all),
                Ok(length) => all.extend_from_slice(&buffer[..length]),
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(all),
                Err(error) => return Err(error),
            }
        }
    }

    /// Returns when all output of a tree that stands still is in the log.
    pub fn drain(&self, console: &Console) {
        let started = Instant::now();
        while self.waiting() > 0 && started.elapsed() < DRAIN_LIMIT {
            std::thread::sleep(Duration::from_micros(200));
        }
        // What was read from the pipe last may not be in the console yet.
        std::thread::sleep(Duration::from_millis(1));
        console.flush();
    }

    /// How much output the pipe holds.
    fn waiting(&self) -> usize {
        crate::sys::fds::unread(self.output.as_fd()).unwrap_or(0)
    }
}

/// The pipe of a write end, opened for reading without waiting.
fn reopen(pipe: &PipeWriter) -> io::Result<File> {
    let path = format!("/proc/self/fd/{}", pipe.as_raw_fd());
    OpenOptions::new().read(true).custom_flags(OFlag::O_NONBLOCK.bits()).open(path)
}

fn set_nonblocking(pipe: &PipeWriter) -> io::Result<()> {
    let flags = OFlag::from_bits_truncate(fcntl(pipe, FcntlArg::F_GETFL)?);
    fcntl(pipe, FcntlArg::F_SETFL(flags | OFlag::O_NONBLOCK))?;
    Ok(())
}

fn name(pipe: &dyn AsFd) -> io::Result<String> {
    let file = File::from(pipe.as_fd().try_clone_to_owned()?);
    Ok(format!("pipe:[{}]", file.metadata()?.ino()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_not_read_is_taken_back() {
        let console = Console::default();
        let mut stdio = Stdio::new(console.sink()).unwrap();
        stdio.input(b"typed").unwrap();
        assert_eq!(stdio.take_input_back().unwrap(), b"typed");
        assert_eq!(stdio.take_input_back().unwrap(), b"");
        stdio.input(b"again").unwrap();
        assert_eq!(stdio.take_input_back().unwrap(), b"again");
        let flood = vec![b'x'; 1 << 20];
        assert!(stdio.input(&flood).is_err(), "nobody reads it");
        stdio.handed_over();
        assert!(stdio.input(b"x").is_err());
    }

    #[test]
    fn pipes_have_the_names_that_criu_gives_them() {
        let stdio = Stdio::new(Console::default().sink()).unwrap();
        let names = stdio.names();
        assert_eq!(names.iter().map(|n| n.fd).collect::<Vec<_>>(), [0, 1, 2]);
        assert_eq!(names[1].pipe, names[2].pipe);
        let (stdin, _) = stdio.theirs().unwrap();
        let link = std::fs::read_link(format!("/proc/self/fd/{}", stdin.as_raw_fd())).unwrap();
        assert_eq!(link.to_str(), Some(names[0].pipe.as_str()));
    }
}
