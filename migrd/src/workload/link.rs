//! The daemon's end of the socket to a process that it has started and that
//! outlives it: requests go out, replies find who waits for them, and the state of
//! what the process runs is always known.

use std::collections::HashMap;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use prost::Message;
use tokio::io::{AsyncReadExt, AsyncWriteExt, Interest};
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::sync::{mpsc, oneshot, watch};

use crate::child::frame::{self, FrameError};
use crate::sys::fds;

/// What such a process understands and says.
pub trait Dialect: std::fmt::Debug + Send + Sync + Sized + 'static {
    /// What it can be asked.
    type Request: Send + 'static;
    /// What it answers.
    type Reply: std::fmt::Debug + Send + 'static;
    /// What comes over the socket.
    type Message: Message + Default;
    /// What it runs does.
    type State: Clone + std::fmt::Debug + PartialEq + Send + Sync + 'static;

    /// Appends a request as a frame to `out`.
    ///
    /// # Errors
    /// When it is too long.
    fn frame(id: u64, request: Self::Request, out: &mut Vec<u8>) -> Result<(), FrameError>;

    /// What a message means; `None` when it means nothing.
    fn hear(message: Self::Message, state: &Self::State) -> Option<Heard<Self>>;

    /// The state of what is gone.
    fn dead(why: String) -> Self::State;

    /// Why it is gone, if it is.
    fn why_dead(state: &Self::State) -> Option<&str>;
}

/// What a message means.
#[derive(Debug)]
pub enum Heard<D: Dialect> {
    /// The answer to a request, or why it was not done.
    Reply(u64, Result<D::Reply, String>),
    /// What it runs does this now.
    State(D::State),
}

/// A request was not done.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum LinkError {
    /// There is nobody who could.
    #[error("its process is dead: {0}")]
    Dead(String),
    /// The process did not do it.
    #[error("{0}")]
    Refused(String),
    /// The process speaks another language.
    #[error("its process does not answer as it should: {0}")]
    Protocol(String),
}

type Waiting<D> = HashMap<u64, oneshot::Sender<Result<<D as Dialect>::Reply, String>>>;

/// A whole frame, with the descriptors that go beside it.
#[derive(Debug)]
struct Outgoing {
    bytes: Vec<u8>,
    beside: Vec<OwnedFd>,
}

/// A connection to such a process.
#[derive(Debug)]
pub struct Link<D: Dialect> {
    /// Whole frames, for the task that writes them: a caller who gives up must
    /// not leave half of one behind.
    frames: mpsc::UnboundedSender<Outgoing>,
    /// `None` once the connection is gone.
    waiting: Mutex<Option<Waiting<D>>>,
    next: AtomicU64,
    states: watch::Sender<D::State>,
}

impl<D: Dialect> Link<D> {
    /// Speaks through `socket`; what comes is for [`Self::listen`] to hear.
    pub fn new(mut socket: OwnedWriteHalf, states: watch::Sender<D::State>) -> Arc<Self> {
        let (frames, mut queued) = mpsc::unbounded_channel::<Outgoing>();
        tokio::spawn(async move {
            while let Some(frame) = queued.recv().await {
                if write(&mut socket, frame).await.is_err() {
                    return;
                }
            }
        });
        Arc::new(Self {
            frames,
            waiting: Mutex::new(Some(HashMap::new())),
            next: AtomicU64::new(1),
            states,
        })
    }

    fn waiting(&self) -> MutexGuard<'_, Option<Waiting<D>>> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What it runs does.
    pub fn states(&self) -> &watch::Sender<D::State> {
        &self.states
    }

    /// Why there is no answer.
    fn lost(&self) -> LinkError {
        let state = self.states.borrow();
        LinkError::Dead(D::why_dead(&state).unwrap_or("its control connection is gone").to_owned())
    }

    /// Asks, and waits for the answer.
    ///
    /// # Errors
    /// What it says, or that it is dead.
    pub async fn ask(&self, request: D::Request) -> Result<D::Reply, LinkError> {
        self.ask_with(request, Vec::new()).await
    }

    /// The same, with descriptors that it gets. This process's own are
    /// closed once they were sent.
    ///
    /// # Errors
    /// What it says, or that it is dead.
    pub async fn ask_with(
        &self,
        request: D::Request,
        beside: Vec<OwnedFd>,
    ) -> Result<D::Reply, LinkError> {
        let id = self.next.fetch_add(1, Ordering::Relaxed);
        let mut bytes = Vec::new();
        D::frame(id, request, &mut bytes).map_err(|e| LinkError::Protocol(e.to_string()))?;
        let (answer, answered) = oneshot::channel();
        match &mut *self.waiting() {
            Some(waiting) => waiting.insert(id, answer),
            None => return Err(self.lost()),
        };
        if self.frames.send(Outgoing { bytes, beside }).is_err() {
            return Err(self.lost());
        }
        match answered.await {
            Ok(reply) => reply.map_err(LinkError::Refused),
            Err(_) => Err(self.lost()),
        }
    }

    /// Hears what it says until the connection ends.
    ///
    /// # Errors
    /// When the connection breaks or what comes makes no sense.
    pub async fn listen(&self, mut socket: OwnedReadHalf) -> io::Result<()> {
        let mut received = Vec::new();
        while socket.read_buf(&mut received).await? > 0 {
            while let Some(message) =
                frame::decode::<D::Message>(&mut received).map_err(io::Error::other)?
            {
                self.heard(message);
            }
            if received.is_empty() {
                received.shrink_to(1 << 16);
            }
        }
        Ok(())
    }

    fn heard(&self, message: D::Message) {
        let heard = D::hear(message, &self.states.borrow());
        match heard {
            Some(Heard::Reply(id, reply)) => {
                let waiting = self.waiting().as_mut().and_then(|w| w.remove(&id));
                if let Some(waiting) = waiting {
                    // Whoever asked may have given up.
                    let _ = waiting.send(reply);
                }
            }
            Some(Heard::State(state)) => self.become_state(state),
            None => {}
        }
    }

    /// Notes what it does. What is dead stays dead.
    pub fn become_state(&self, state: D::State) {
        self.states.send_if_modified(|old| {
            let news = D::why_dead(old).is_none() && *old != state;
            if news {
                *old = state;
            }
            news
        });
    }

    /// Whoever waits for an answer will get none.
    pub fn close(&self, reason: &str) {
        self.become_state(D::dead(reason.to_owned()));
        self.waiting().take();
    }
}

/// Writes a frame. What goes beside it is sent with its first byte: the kernel
/// gives descriptors to whoever reads the byte that they came with (unix(7)).
async fn write(socket: &mut OwnedWriteHalf, frame: Outgoing) -> io::Result<()> {
    let Outgoing { bytes, beside } = frame;
    let Some((first, rest)) = bytes.split_first_chunk::<1>() else { return Ok(()) };
    if beside.is_empty() {
        return socket.write_all(&bytes).await;
    }
    let given: Vec<_> = beside.iter().map(AsFd::as_fd).collect();
    loop {
        socket.writable().await?;
        let stream: &tokio::net::UnixStream = (*socket).as_ref();
        match stream.try_io(Interest::WRITABLE, || fds::send(stream, first, &given)) {
            Ok(()) => break,
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => {}
            Err(e) => return Err(e),
        }
    }
    socket.write_all(rest).await
}
