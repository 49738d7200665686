//! The thread of a device: waits for its driver, its source and its time, and
//! stands before the gate while that is closed.

use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::mpsc::Sender;
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use vmm_sys_util::eventfd::EventFd;

use super::mmio::Transport;
use super::queue::QueueAbuse;
use crate::sys::fds;
use crate::vmm::lifecycle::Lifecycle;
use crate::vmm::sandbox::{self, SandboxError};

/// A device calls into the kernel and does not go deep.
const STACK_BYTES: usize = 192 * 1024;

/// What there is to do.
#[derive(Debug, Default, PartialEq, Eq)]
struct Ready {
    /// Queues whose bell rang, a bit each.
    rung: u64,
    source: bool,
    timer: bool,
}

/// Starts the thread of a device, which tells `ready` when it is confined.
///
/// # Errors
/// When there is no room for a thread.
pub fn spawn(
    device: Arc<Transport>,
    lifecycle: Arc<Lifecycle>,
    ready: Sender<Result<(), SandboxError>>,
) -> std::io::Result<()> {
    let thread = std::thread::Builder::new().name(format!("virtio{}", device.slot()));
    thread.stack_size(STACK_BYTES).spawn(move || {
        let confined = sandbox::confine_device();
        let failed = confined.is_err();
        // The receiver gives up only together with the whole process.
        let _ = ready.send(confined);
        drop(ready);
        if !failed {
            live(&device, &lifecycle);
        }
    })?;
    Ok(())
}

/// Never returns: the thread ends with its process.
pub(super) fn live(device: &Transport, lifecycle: &Lifecycle) {
    loop {
        device.gate().stand(device.slot());
        if let Err(abuse) = work(device) {
            device.give_up();
            lifecycle.stop(device.abused(&abuse));
        }
        device.with_device(|device| device.stand());
    }
}

/// Works until the gate is closed.
fn work(device: &Transport) -> Result<(), QueueAbuse> {
    // A bell that was rung before a move is not heard here, so every queue is
    // looked at.
    let everything = Ready { rung: u64::MAX, ..Ready::default() };
    let restored = std::mem::take(&mut device.worker().restored);
    device.turn(|device, turn| device.resume(restored, turn))?;
    let mut cut = serve(device, &everything)?;
    while !device.gate().is_closed() {
        let ready = wait(device, cut);
        if device.gate().is_closed() {
            break;
        }
        cut = serve(device, if cut { &everything } else { &ready })?;
    }
    Ok(())
}

/// Waits until there is something to do; with `cut`, only looks.
fn wait(device: &Transport, cut: bool) -> Ready {
    let (source, deadline) = device.awaits();
    let event = |fd| PollFd::new(fds::of_event(fd), PollFlags::POLLIN);
    let mut all = vec![event(device.wake_fd())];
    all.extend(device.bells().iter().map(event));
    let bells = all.len();
    if let Some(source) = &source {
        all.push(PollFd::new(source.as_fd(), PollFlags::POLLIN));
    }
    let limit = if cut { PollTimeout::ZERO } else { timeout(deadline) };
    if poll(&mut all, limit).is_err() {
        // Interrupted: looks again.
        return Ready::default();
    }
    let rings =
        |at: usize| all.get(at).and_then(PollFd::revents).is_some_and(|events| !events.is_empty());
    let mut ready = Ready { source: rings(bells), ..Ready::default() };
    if rings(0) {
        clear(device.wake_fd());
    }
    for (queue, bell) in device.bells().iter().enumerate() {
        if rings(queue + 1) {
            clear(bell);
            ready.rung |= 1 << queue;
        }
    }
    ready.timer = deadline.is_some_and(|deadline| deadline <= Instant::now());
    ready
}

/// Until the deadline, rounded up so that it has passed then.
fn timeout(deadline: Option<Instant>) -> PollTimeout {
    let Some(deadline) = deadline else { return PollTimeout::NONE };
    let left = deadline.saturating_duration_since(Instant::now());
    let up = left.saturating_add(Duration::from_millis(1));
    PollTimeout::try_from(up.as_millis()).unwrap_or(PollTimeout::MAX)
}

fn clear(event: &EventFd) {
    // It rang, so there is something to read; if not, that is no harm.
    let _ = event.read();
}

/// Says whether it was interrupted before everything was done.
fn serve(device: &Transport, ready: &Ready) -> Result<bool, QueueAbuse> {
    device.turn(|device, turn| {
        for queue in 0..device.queue_sizes().len() {
            if ready.rung & (1 << queue) != 0 {
                device.serve(queue, turn)?;
            }
        }
        if ready.source && !turn.is_over() {
            device.source_ready(turn)?;
        }
        if ready.timer && !turn.is_over() {
            device.timer(turn)?;
        }
        Ok(())
    })
}
