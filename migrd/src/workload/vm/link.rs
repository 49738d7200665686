//! The daemon's end of the socket to a VMM child: requests go out, replies
//! find who waits for them, and the guest's state is always known.

use std::collections::HashMap;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use migr_proto::v1::{self as proto, child_message, child_reply, child_request};
use tokio::io::{AsyncReadExt, AsyncWriteExt, Interest};
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::sync::{mpsc, oneshot, watch};

use super::child::{ChildError, ChildState};
use crate::sys::fds;
use crate::vmm::frame;

type Waiting = HashMap<u64, oneshot::Sender<child_reply::Reply>>;

/// A whole frame, with the descriptors that go beside it.
#[derive(Debug)]
struct Outgoing {
    bytes: Vec<u8>,
    beside: Vec<OwnedFd>,
}

/// A connection to a child.
#[derive(Debug)]
pub struct Link {
    /// Whole frames, for the task that writes them: a caller who gives up must
    /// not leave half of one behind.
    frames: mpsc::UnboundedSender<Outgoing>,
    /// `None` once the connection is gone.
    waiting: Mutex<Option<Waiting>>,
    next: AtomicU64,
    states: watch::Sender<ChildState>,
}

impl Link {
    /// Speaks through `socket`; what comes is for [`Self::listen`] to hear.
    pub fn new(mut socket: OwnedWriteHalf, states: watch::Sender<ChildState>) -> Arc<Self> {
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

    fn waiting(&self) -> MutexGuard<'_, Option<Waiting>> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What the guest does.
    pub fn states(&self) -> &watch::Sender<ChildState> {
        &self.states
    }

    /// Why there is no answer.
    fn dead(&self) -> ChildError {
        match &*self.states.borrow() {
            ChildState::Dead(reason) => ChildError::Dead(reason.clone()),
            _ => ChildError::Dead("its control connection is gone".into()),
        }
    }

    /// Asks, and waits for the answer.
    ///
    /// # Errors
    /// What the child says, or that it is dead.
    pub async fn ask(
        &self,
        request: child_request::Request,
    ) -> Result<child_reply::Reply, ChildError> {
        self.ask_with(request, Vec::new()).await
    }

    /// The same, with descriptors that the child gets. This process's own are
    /// closed once they were sent.
    ///
    /// # Errors
    /// What the child says, or that it is dead.
    pub async fn ask_with(
        &self,
        request: child_request::Request,
        beside: Vec<OwnedFd>,
    ) -> Result<child_reply::Reply, ChildError> {
        let id = self.next.fetch_add(1, Ordering::Relaxed);
        let mut bytes = Vec::new();
        frame::encode(&proto::ChildRequest { id, request: Some(request) }, &mut bytes)
            .map_err(|e| ChildError::Protocol(e.to_string()))?;
        let (answer, answered) = oneshot::channel();
        match &mut *self.waiting() {
            Some(waiting) => waiting.insert(id, answer),
            None => return Err(self.dead()),
        };
        if self.frames.send(Outgoing { bytes, beside }).is_err() {
            return Err(self.dead());
        }
        match answered.await {
            Ok(child_reply::Reply::Error(message)) => Err(ChildError::Refused(message)),
            Ok(reply) => Ok(reply),
            Err(_) => Err(self.dead()),
        }
    }

    /// Hears what the child says until the connection ends.
    ///
    /// # Errors
    /// When the connection breaks or what comes makes no sense.
    pub async fn listen(&self, mut socket: OwnedReadHalf) -> io::Result<()> {
        let mut received = Vec::new();
        while socket.read_buf(&mut received).await? > 0 {
            while let Some(message) =
                frame::decode::<proto::ChildMessage>(&mut received).map_err(io::Error::other)?
            {
                self.heard(message.message);
            }
            if received.is_empty() {
                received.shrink_to(1 << 16);
            }
        }
        Ok(())
    }

    fn heard(&self, message: Option<child_message::Message>) {
        match message {
            Some(child_message::Message::Reply(proto::ChildReply { id, reply })) => {
                let waiting = self.waiting().as_mut().and_then(|w| w.remove(&id));
                if let (Some(waiting), Some(reply)) = (waiting, reply) {
                    // Whoever asked may have given up.
                    let _ = waiting.send(reply);
                }
            }
            Some(child_message::Message::StateChanged(status)) => {
                self.become_state(ChildState::from_wire(status));
            }
            Some(child_message::Message::CannotStart(reason)) => {
                self.become_state(ChildState::Dead(reason));
            }
            None => {}
        }
    }

    /// Notes what the guest does. What is dead stays dead.
    pub fn become_state(&self, state: ChildState) {
        self.states.send_if_modified(|old| {
            let news = !matches!(old, ChildState::Dead(_)) && *old != state;
            if news {
                *old = state;
            }
            news
        });
    }

    /// Whoever waits for an answer will get none.
    pub fn close(&self, reason: &str) {
        self.become_state(ChildState::Dead(reason.to_owned()));
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

#[cfg(test)]
mod tests;
