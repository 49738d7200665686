//! `console`: a terminal, or a script, on the serial line of a VM.

use std::io::{IsTerminal, Read};

use bytes::Bytes;
use migr_proto::v1::{ConsoleInput, LogChunk};
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::mpsc;
use tokio::time::Instant;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Streaming;

use super::Context;
use crate::args::ConsoleArgs;
use crate::client::{Client, ClientError};
use crate::failure::{Failure, exit, note};
use crate::follow::{Ended, Printer, Trail, patiently, received};
use crate::terminal::RawMode;

/// Messages that may wait on either side of the connection.
const QUEUE: usize = 16;
const READ_BYTES: usize = 4096;

pub async fn run(ctx: &Context, args: ConsoleArgs) -> Result<u8, Failure> {
    let mut session = Session::new(ctx, args)?;
    // Connected first: a daemon that does not answer leaves the terminal alone.
    let first = session.open().await?;
    if let Some(key) = session.escape {
        let key = char::from(key ^ 0x40);
        note(ctx.format, &format!("attached to {}; Ctrl-{key} detaches", session.name));
    }
    let raw = RawMode::enter().map_err(Failure::Terminal)?;
    session.read_stdin();
    let result = session.attach(first).await;
    drop(raw);
    result
}

struct Session {
    name: String,
    doing: String,
    escape: Option<u8>,
    detach_after: Option<std::time::Duration>,
    printer: Printer,
    trail: Trail,
    input: Input,
    signals: Signals,
}

/// Bytes from stdin on their way to the guest.
struct Input {
    stdin: Option<mpsc::Receiver<Bytes>>,
    pending: Option<Bytes>,
    /// The escape key was pressed after what is pending.
    escaped: bool,
    leave_at: Option<Instant>,
}

struct Line {
    client: Client,
    input: mpsc::Sender<ConsoleInput>,
    output: Streaming<LogChunk>,
}

impl Session {
    fn new(ctx: &Context, args: ConsoleArgs) -> Result<Self, Failure> {
        // Piped bytes are data: only a key on a terminal detaches.
        let escape = args.escape.0.filter(|_| std::io::stdin().is_terminal());
        Ok(Self {
            doing: format!("cannot attach to {}", args.name),
            trail: Trail::new(&args.name, &ctx.host),
            printer: Printer::new(ctx.format, false, None),
            escape,
            detach_after: args.detach_after,
            name: args.name,
            input: Input { stdin: None, pending: None, escaped: false, leave_at: None },
            signals: Signals::new()?,
        })
    }

    fn read_stdin(&mut self) {
        let (sender, receiver) = mpsc::channel(QUEUE);
        // A thread of its own: reading a terminal cannot be interrupted, and
        // the process must not wait for it at the end.
        std::thread::spawn(move || {
            let mut stdin = std::io::stdin().lock();
            let mut buffer = [0; READ_BYTES];
            while let Ok(length @ 1..) = stdin.read(&mut buffer) {
                if sender.blocking_send(Bytes::copy_from_slice(&buffer[..length])).is_err() {
                    return;
                }
            }
        });
        self.input.stdin = Some(receiver);
    }

    async fn open(&self) -> Result<Line, ClientError> {
        let client = Client::connect(self.trail.address(), &self.doing).await?;
        let (input, requests) = mpsc::channel(QUEUE);
        let hello = ConsoleInput {
            name: self.name.clone(),
            data: Bytes::new(),
            from_offset: self.printer.next(),
        };
        // The queue is empty and its receiver is held: this cannot fail.
        let _ = input.try_send(hello);
        match client.rpc().console(ReceiverStream::new(requests)).await {
            Ok(reply) => Ok(Line { client, input, output: reply.into_inner() }),
            Err(status) => Err(client.explain(&self.doing, &status)),
        }
    }

    async fn attach(&mut self, first: Line) -> Result<u8, Failure> {
        let mut line = first;
        loop {
            let mut printed = false;
            match self.talk(&mut line, &mut printed).await? {
                Talk::Leave(status) => return Ok(status),
                Talk::Ended(Ended::Finished) => return Ok(exit::DONE),
                Talk::Ended(Ended::MovedTo(address)) => self.trail.go_on(Some(address), printed)?,
                Talk::Ended(Ended::Lost(_)) => self.trail.go_on(None, printed)?,
            }
            self.printer.resume();
            let mut signals = Signals::new()?;
            line = tokio::select! {
                line = patiently(async || self.open().await) => line?,
                status = signals.recv() => return Ok(status),
            };
        }
    }

    /// Carries bytes both ways until the line ends or the user leaves.
    async fn talk(&mut self, line: &mut Line, printed: &mut bool) -> Result<Talk, Failure> {
        loop {
            if self.input.escaped && self.input.pending.is_none() {
                return Ok(Talk::Leave(exit::DONE));
            }
            let leave_at = self.input.leave_at.filter(|_| self.input.pending.is_none());
            let sending = self.input.pending.is_some();
            tokio::select! {
                message = line.output.message() => {
                    match received(&line.client, &self.doing, message)? {
                        Err(ended) => return Ok(Talk::Ended(ended)),
                        Ok(chunk) => {
                            *printed |= self.printer.print(&chunk)?;
                            if !chunk.moved_to.is_empty() {
                                return Ok(Talk::Ended(Ended::MovedTo(chunk.moved_to)));
                            }
                        }
                    }
                }
                read = self.input.next() => self.input.take(read, self.escape, self.detach_after),
                Ok(permit) = line.input.reserve(), if sending => {
                    let data = self.input.pending.take().unwrap_or_default();
                    permit.send(ConsoleInput { data, ..ConsoleInput::default() });
                }
                () = until(leave_at) => return Ok(Talk::Leave(exit::DONE)),
                status = self.signals.recv() => return Ok(Talk::Leave(status)),
            }
        }
    }
}

enum Talk {
    Leave(u8),
    Ended(Ended),
}

impl Input {
    /// The next bytes from stdin, none at its end. Waits for ever while there
    /// is nothing to read or something still to send.
    async fn next(&mut self) -> Option<Bytes> {
        match &mut self.stdin {
            Some(stdin) if self.pending.is_none() => stdin.recv().await,
            _ => std::future::pending().await,
        }
    }

    fn take(
        &mut self,
        read: Option<Bytes>,
        escape: Option<u8>,
        detach_after: Option<std::time::Duration>,
    ) {
        let Some(mut bytes) = read else {
            self.stdin = None;
            self.leave_at = detach_after.map(|after| Instant::now() + after);
            return;
        };
        if let Some(at) = bytes.iter().position(|byte| Some(*byte) == escape) {
            bytes.truncate(at);
            self.escaped = true;
            self.stdin = None;
        }
        self.pending = Some(bytes).filter(|bytes| !bytes.is_empty());
    }
}

async fn until(instant: Option<Instant>) {
    match instant {
        Some(instant) => tokio::time::sleep_until(instant).await,
        None => std::future::pending().await,
    }
}

/// The signals that end a session, so that the terminal is put back first.
struct Signals {
    interrupt: Signal,
    terminate: Signal,
    hangup: Signal,
}

impl Signals {
    fn new() -> Result<Self, Failure> {
        let listen = |kind| signal(kind).map_err(Failure::Signals);
        Ok(Self {
            interrupt: listen(SignalKind::interrupt())?,
            terminate: listen(SignalKind::terminate())?,
            hangup: listen(SignalKind::hangup())?,
        })
    }

    /// The exit status that the shell gives a program which the signal ended.
    async fn recv(&mut self) -> u8 {
        tokio::select! {
            _ = self.interrupt.recv() => 130,
            _ = self.terminate.recv() => 143,
            _ = self.hangup.recv() => 129,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn input() -> Input {
        Input { stdin: None, pending: None, escaped: false, leave_at: None }
    }

    #[test]
    fn keys_before_the_escape_key_are_still_sent() {
        let mut input = input();
        input.take(Some(Bytes::from_static(b"ls\r\x1drest")), Some(0x1d), None);
        assert_eq!(input.pending.as_deref(), Some(&b"ls\r"[..]));
        assert!(input.escaped);
    }

    #[test]
    fn without_an_escape_key_every_byte_is_sent() {
        let mut input = input();
        input.take(Some(Bytes::from_static(b"a\x1db")), None, None);
        assert_eq!(input.pending.as_deref(), Some(&b"a\x1db"[..]));
        assert!(!input.escaped);
    }
}
