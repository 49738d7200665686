//! The start of the child: takes what it inherited, builds the machine,
//! confines itself, and only then looks at anything from outside.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, OwnedFd, RawFd};

use migr_proto::v1::{self as proto, child_message};
use prost::Message;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};
use vmm_sys_util::signal::{SIGRTMIN, register_signal_handler};

use super::control::{Control, FAILED, Images};
use super::machine::{Machine, MachineError};
use super::sandbox;
use crate::child::listener::Listener;
use crate::child::output::SerialLog;
use crate::child::{frame, words};
use crate::sys::fds;

/// The numbers under which the child finds its descriptors.
pub mod number {
    use std::os::fd::RawFd;

    /// Listening control socket.
    pub const LISTENER: RawFd = 3;
    /// Guest memory.
    pub const MEMORY: RawFd = 4;
    /// `/dev/kvm`.
    pub const KVM: RawFd = 5;
    /// Serial log.
    pub const LOG: RawFd = 6;
    /// Eventfd, rung after each write to the log.
    pub const BELL: RawFd = 7;
    /// An encoded `VmConfig`.
    pub const CONFIG: RawFd = 8;
    /// Kernel, if there is one to boot.
    pub const KERNEL: RawFd = 9;
    /// Initrd, if there is one.
    pub const INITRD: RawFd = 10;
    /// The first number that means nothing.
    pub const FIRST_FREE: RawFd = 11;
}

/// The longest configuration the daemon hands over (bytes).
const CONFIG_BYTES: u64 = 1 << 20;

/// The child cannot even say over its socket what is wrong.
#[derive(Debug, thiserror::Error)]
pub enum EntryError {
    /// Not started by a daemon.
    #[error("vmm-child is started by migrd, not by hand")]
    Inherit(#[source] io::Error),
    /// The system failed.
    #[error("the VMM cannot go on")]
    Io(#[from] io::Error),
}

/// What the child shares with every daemon that comes.
#[derive(Debug)]
pub struct Fds {
    /// The control socket.
    pub listener: Listener,
    /// Guest memory.
    pub memory: File,
    /// Serial log.
    pub log: File,
    /// Rung after each write to the log.
    pub bell: File,
}

/// Runs the child until it is told to quit.
///
/// # Errors
/// When it was not started as a child, or the system fails.
pub fn run() -> Result<(), EntryError> {
    abort_on_panic();
    let take = |number| fds::inherited(number).map_err(EntryError::Inherit);
    let listener = take(number::LISTENER)?;
    let shared = Fds {
        listener: Listener::take_over(listener)?,
        memory: take(number::MEMORY)?.into(),
        log: take(number::LOG)?.into(),
        bell: take(number::BELL)?.into(),
    };
    let (kvm, config) = (take(number::KVM)?, File::from(take(number::CONFIG)?));
    let optional = |number: RawFd| fds::inherited(number).ok().map(File::from);
    let images = Images { kernel: optional(number::KERNEL), initrd: optional(number::INITRD) };
    fds::close_from(number::FIRST_FREE)?;
    let ended = EventFd::new(EFD_NONBLOCK)?;
    match build(&shared, kvm, config, ended.try_clone()?) {
        Ok(machine) => Ok(Control::new(shared, machine, images, ended).serve()?),
        Err(e) => Ok(refuse(&shared, &words(&e))?),
    }
}

fn build(
    shared: &Fds,
    kvm: OwnedFd,
    mut config: File,
    ended: EventFd,
) -> Result<Machine, MachineError> {
    let failed = |what| move |source| MachineError::System { what, source };
    let mut bytes = Vec::new();
    let read = Read::by_ref(&mut config).take(CONFIG_BYTES).read_to_end(&mut bytes);
    read.map_err(failed("read the VM's configuration"))?;
    drop(config);
    let config = proto::VmConfig::decode(bytes.as_slice())
        .map_err(|e| failed("read the VM's configuration")(io::Error::other(e)))?;
    register_signal_handler(SIGRTMIN(), ignore_kick)
        .map_err(|e| failed("handle a signal")(e.into()))?;
    sandbox::limit_process()?;
    let clone = |file: &File| file.try_clone().map_err(failed("duplicate a descriptor"));
    let log = SerialLog::new(&shared.log, &shared.bell);
    let log = log.map_err(failed("duplicate a descriptor"))?;
    let machine = Machine::new(config, kvm, clone(&shared.memory)?, log, ended)?;
    sandbox::confine_control()?;
    Ok(machine)
}

/// Interrupts a system call, and has done its work with that.
extern "C" fn ignore_kick(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {}

/// A thread that dies alone would leave the others waiting for it.
fn abort_on_panic() {
    let print = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |info| {
        print(info);
        std::process::abort();
    }));
}

/// Tells the daemon, which is waiting, why there is no machine.
fn refuse(shared: &Fds, why: &str) -> io::Result<()> {
    eprintln!("{why}");
    let socket = loop {
        match shared.listener.accept() {
            Ok(socket) => break socket,
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
                let mut wait =
                    [nix::poll::PollFd::new(shared.listener.as_fd(), nix::poll::PollFlags::POLLIN)];
                nix::poll::poll(&mut wait, nix::poll::PollTimeout::NONE)?;
            }
            Err(e) => return Err(e),
        }
    };
    socket.set_nonblocking(false)?;
    let message = child_message::Message::CannotStart(why.to_owned());
    let mut bytes = vec![FAILED];
    frame::encode(&proto::ChildMessage { message: Some(message) }, &mut bytes)
        .map_err(io::Error::other)?;
    (&socket).write_all(&bytes)
}
