//! The connection to a child: its greeting, its end, and what it shares.

use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use migr_proto::v1::{self as proto, child_reply, child_request};
use tokio::io::AsyncReadExt;
use tokio::net::UnixStream;
use tokio::sync::watch;

use super::{Child, ChildError, ChildState, Device, SERIAL_LOG, VMM_LOG, system};
use crate::sys::mapping::GuestMapping;
use crate::sys::process::PidFd;
use crate::vmm::control::{FAILED, READY};
use crate::vmm::memory;
use crate::workload::outliving::{ended, greeting, last_words, watch_bell};
use crate::workload::vm::link::Link;

/// The serial log of a VM: its file, and when to look again.
#[derive(Clone, Debug)]
pub struct SerialOutput {
    /// Where it is.
    pub path: PathBuf,
    /// Changes after each write to it.
    pub written: watch::Receiver<u64>,
}

/// A child that has answered, but is not watched yet.
pub(super) struct Parts {
    link: Arc<Link>,
    config: proto::VmConfig,
    mapping: Arc<GuestMapping>,
    log: SerialOutput,
    states: watch::Receiver<ChildState>,
    reader: tokio::task::JoinHandle<io::Result<()>>,
    directory: PathBuf,
    held: Vec<Device>,
}

impl Child {
    /// Greets the child `pid` on the other end of `socket`.
    pub(super) async fn attach(
        socket: UnixStream,
        directory: &Path,
        pid: u32,
    ) -> Result<Parts, ChildError> {
        let died = || {
            ChildError::Dead(format!("process {pid} ended{}", last_words(&directory.join(VMM_LOG))))
        };
        let broken = |_: io::Error| died();
        let (first, shared) = greeting(&socket).await.map_err(broken)?;
        let (mut read, write) = socket.into_split();
        match first {
            Some(READY) => {}
            Some(FAILED) => return Err(ChildError::Dead(reason(&mut read).await)),
            Some(_) | None => return Err(died()),
        }
        let [memory, log, bell] = <[OwnedFd; 3]>::try_from(shared)
            .map_err(|_| ChildError::Protocol("its greeting lacks descriptors".into()))?;
        let (states, watched) = watch::channel(ChildState::Starting);
        let link = Link::new(write, states);
        let listener = Arc::clone(&link);
        let reader = tokio::spawn(async move { listener.listen(read).await });
        let hello = link.ask(child_request::Request::Hello(proto::ChildHello {})).await?;
        let child_reply::Reply::Hello(proto::ChildHelloReply { config, status, attached }) = hello
        else {
            return Err(ChildError::Protocol("no answer to hello".into()));
        };
        link.become_state(ChildState::from_wire(status.unwrap_or_default()));
        let config = config.unwrap_or_default();
        let extents = memory::extents(config.memory_bytes)?;
        let mapping = GuestMapping::new(memory.into(), extents);
        let mapping = Arc::new(mapping.map_err(system("map the guest's memory"))?);
        drop(log);
        let written = watch_bell(bell).map_err(system("watch the serial log"))?;
        let log = SerialOutput { path: directory.join(SERIAL_LOG), written };
        let directory = directory.to_owned();
        let held = attached.into_iter().filter_map(Device::from_wire).collect();
        Ok(Parts { link, config, mapping, log, states: watched, reader, directory, held })
    }

    /// From now on knows when the child ends.
    pub(super) fn watch(parts: Parts, process: PidFd, pid: u32) -> Self {
        let Parts { link, config, mapping, log, states, reader, directory, held } = parts;
        let process = Arc::new(process);
        let (watched, told) = (Arc::clone(&process), Arc::clone(&link));
        let (end, over) = watch::channel(false);
        tokio::spawn(async move {
            let status = ended(&watched).await;
            let how = status.map_or_else(String::new, |s| format!(" ({s})"));
            told.close(&format!(
                "process {pid} ended{how}{}",
                last_words(&directory.join(VMM_LOG))
            ));
            end.send_replace(true);
        });
        let (told, mut left) = (Arc::clone(&link), over.clone());
        tokio::spawn(async move {
            let _ = reader.await;
            // Usually it has ended, and then that is the better reason.
            let wait = std::time::Duration::from_secs(1);
            if tokio::time::timeout(wait, left.wait_for(|over| *over)).await.is_err() {
                told.close("another daemon has taken over its control connection");
            }
        });
        Self { link, config, mapping, log, pid, process, states, held, over }
    }
}

/// Why a child could not start, in its own words.
async fn reason(socket: &mut tokio::net::unix::OwnedReadHalf) -> String {
    use proto::child_message::Message::CannotStart;
    let mut bytes = Vec::new();
    let read = socket.take(1 << 20).read_to_end(&mut bytes).await;
    match crate::child::frame::decode::<proto::ChildMessage>(&mut bytes) {
        Ok(Some(proto::ChildMessage { message: Some(CannotStart(why)) })) => why,
        _ => format!("it could not start, and did not say why ({read:?})"),
    }
}
