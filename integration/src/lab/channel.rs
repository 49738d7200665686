//! A session with a host's agent: the end that is outside.

use std::fs::{File, OpenOptions, TryLockError};
use std::io::{BufReader, Read};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use uuid::Uuid;

use super::layout::{CHANNELS, Layout};
use super::protocol::{self, Data, MAX_DATA, Order, Reply, Request};
use super::settings::HostNumber;
use crate::wait;

/// Only a hang takes this long: between two messages of a program's life there
/// may be minutes.
pub const LIMIT: Duration = Duration::from_secs(15 * 60);

/// What a program in a host prints, as it comes: whether to standard error, and
/// what.
pub type Sink<'a> = &'a mut dyn FnMut(bool, &[u8]) -> Result<()>;

/// An open session.
#[derive(Debug)]
pub struct Channel {
    out: UnixStream,
    input: BufReader<UnixStream>,
    /// Held so that nobody else uses the channel.
    _lock: File,
}

impl Channel {
    /// Opens a session over a channel of the host that nobody uses, and waits
    /// until its agent answers. `alive` says what became of the host, should it
    /// take long. No message may be more than `limit` after the one before.
    ///
    /// # Errors
    /// When all channels are in use, or the host is off.
    pub fn open(
        layout: &Layout,
        host: HostNumber,
        limit: Duration,
        alive: &mut dyn FnMut() -> Result<()>,
    ) -> Result<Self> {
        let (channel, lock) = wait::until("a free channel to the host", || {
            alive()?;
            for channel in 0..CHANNELS {
                let path = layout.channel(host, channel).with_extension(format!("lock{channel}"));
                let file = OpenOptions::new().create(true).append(true).open(path)?;
                match file.try_lock() {
                    Ok(()) => return Ok(Some((channel, file))),
                    Err(TryLockError::WouldBlock) => {}
                    Err(TryLockError::Error(error)) => return Err(error.into()),
                }
            }
            Ok(None)
        })?;
        let socket = layout.channel(host, channel);
        // QEMU makes it a moment after its start.
        let out = wait::until(&format!("{}", socket.display()), || {
            alive()?;
            Ok(UnixStream::connect(&socket).ok())
        })?;
        out.set_read_timeout(Some(limit))?;
        let input = BufReader::new(out.try_clone()?);
        let mut session = Self { out, input, _lock: lock };
        session.greet()?;
        Ok(session)
    }

    fn greet(&mut self) -> Result<()> {
        let nonce = Uuid::new_v4().to_string();
        // The line before may have been left unfinished.
        std::io::Write::write_all(&mut self.out, b"\n")?;
        protocol::send(&mut self.out, &Request::Hello { nonce: nonce.clone() })?;
        loop {
            let reply = protocol::receive(&mut self.input, true).context("wait for the agent")?;
            match protocol::accepted(reply)? {
                Reply::Hello { nonce: given } if given == nonce => return Ok(()),
                // Of the session before.
                _ => {}
            }
        }
    }

    /// Does what needs no more than one reply.
    ///
    /// # Errors
    /// When the agent refuses.
    pub fn ask(&mut self, request: &Request) -> Result<Reply> {
        protocol::send(&mut self.out, request)?;
        let reply = protocol::receive(&mut self.input, false)?;
        protocol::accepted(reply)
    }

    /// Runs a program to its end; its exit status, -1 when a signal ended it.
    ///
    /// # Errors
    /// When it can't be started, or the host goes away meanwhile.
    pub fn run(
        &mut self,
        order: Order,
        input: Option<Box<dyn Read + Send>>,
        sink: Sink<'_>,
    ) -> Result<i32> {
        protocol::send(&mut self.out, &Request::Run { order })?;
        match input {
            // Ends with the program this is: standard input may never end.
            Some(input) => drop(std::thread::spawn({
                let out = self.out.try_clone()?;
                move || feed(input, out)
            })),
            None => protocol::send(&mut self.out, &Request::InputEnds)?,
        }
        loop {
            let reply = protocol::receive(&mut self.input, false)?;
            match protocol::accepted(reply)? {
                Reply::Output { error, data } => sink(error, &data.0)?,
                Reply::Exited { status } => return Ok(status),
                other => bail!("the agent said {other:?} while a program runs"),
            }
        }
    }

    /// Starts a program that goes on without this session; its process id.
    ///
    /// # Errors
    /// When it can't be started.
    pub fn spawn(&mut self, order: Order, log: &str) -> Result<u32> {
        match self.ask(&Request::Spawn { order, log: log.to_owned() })? {
            Reply::Spawned { pid } => Ok(pid),
            other => bail!("the agent said {other:?} to a program to start"),
        }
    }

    /// Sets the host's clock to this machine's.
    ///
    /// # Errors
    /// When the host does not let it.
    pub fn set_clock(&mut self) -> Result<()> {
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH)?;
        let reply = self.ask(&Request::SetClock { unix_ns: i64::try_from(now.as_nanos())? })?;
        ensure!(reply == Reply::Done, "the agent said {reply:?} to its clock");
        Ok(())
    }
}

fn feed(mut input: Box<dyn Read + Send>, mut out: UnixStream) -> Result<()> {
    let mut buffer = vec![0; MAX_DATA];
    loop {
        let read = input.read(&mut buffer)?;
        let Some(data) = buffer.get(..read).filter(|data| !data.is_empty()) else {
            return protocol::send(&mut out, &Request::InputEnds);
        };
        protocol::send(&mut out, &Request::Input { data: Data(data.to_vec()) })?;
    }
}
