//! Output of workloads and reports of migrations, as streams.

use std::pin::Pin;
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures::{Stream, StreamExt};
use migr_proto::v1 as proto;
use tokio::sync::{mpsc, watch};
use tonic::Status;

use super::{convert, status};
use crate::registry::{self, Registry, State, Watching};
use crate::workload::{Kind, Output, Terminal};

/// How often progress is reported at most.
const PROGRESS_EVERY: Duration = Duration::from_millis(100);
/// Bytes of output read at once.
const READ_BYTES: usize = 64 << 10;
/// Messages that wait for a slow client.
const QUEUE: usize = 16;

pub(super) type Chunks = Pin<Box<dyn Stream<Item = Result<proto::LogChunk, Status>> + Send>>;
pub(super) type Events = Pin<Box<dyn Stream<Item = Result<proto::MigrationEvent, Status>> + Send>>;

fn chunk(output: Output) -> proto::LogChunk {
    let Output { offset, data, line_unix_ns, starts_line } = output;
    proto::LogChunk {
        data: data.into(),
        line_unix_ns,
        starts_line,
        moved_to: String::new(),
        offset,
    }
}

fn moved(to: String, offset: u64) -> proto::LogChunk {
    proto::LogChunk { moved_to: to, offset, ..proto::LogChunk::default() }
}

/// Sends the output of one workload to one client.
struct Tail {
    host: String,
    terminal: Option<Arc<dyn Terminal>>,
    status: watch::Receiver<registry::Status>,
    at: u64,
    client: mpsc::Sender<Result<proto::LogChunk, Status>>,
}

impl Tail {
    /// Sends what there is; false when the client has gone or it went wrong.
    async fn catch_up(&mut self) -> bool {
        let Some(terminal) = self.terminal.clone() else { return true };
        loop {
            let from = self.at;
            let reading = terminal.clone();
            let read = tokio::task::spawn_blocking(move || reading.read(from, READ_BYTES)).await;
            let outputs = match read {
                Ok(Ok(outputs)) => outputs,
                Ok(Err(error)) => {
                    let _ = self.client.send(Err(status::workload(&self.host, &error))).await;
                    return false;
                }
                Err(_) => return false,
            };
            if outputs.is_empty() {
                return true;
            }
            for output in outputs {
                self.at = self.at.max(output.offset + output.data.len() as u64);
                if self.client.send(Ok(chunk(output))).await.is_err() {
                    return false;
                }
            }
        }
    }

    /// Where it went, once it is not here any more.
    fn gone_to(&self) -> Option<String> {
        let status = self.status.borrow();
        (status.state == State::Gone).then(|| status.peer.clone())
    }

    async fn run(mut self, follow: bool) {
        loop {
            if !self.catch_up().await {
                return;
            }
            if let Some(to) = self.gone_to() {
                // What it put out before it left is in the log by now.
                if self.catch_up().await {
                    let _ = self.client.send(Ok(moved(to, self.at))).await;
                }
                return;
            }
            let ended = self.status.borrow().state == State::Stopped;
            if !follow || ended {
                if ended {
                    self.catch_up().await;
                }
                return;
            }
            let terminal = self.terminal.clone();
            let more = async {
                match &terminal {
                    Some(terminal) => terminal.more_than(self.at).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                () = more => {}
                changed = self.status.changed() => if changed.is_err() { return },
                () = self.client.closed() => return,
            }
        }
    }
}

/// The output of `name` from byte `from` on; `None`: from now on.
pub(super) fn tail(
    registry: &Registry,
    name: &str,
    from: Option<u64>,
    follow: bool,
) -> Result<(Chunks, Option<Arc<dyn Terminal>>), Status> {
    let host = registry.here().to_owned();
    let refused = |e| status::registry(&host, &e);
    let terminal = registry.terminal(name).map_err(refused)?;
    let followed = registry.follow(name).map_err(refused)?;
    let (client, receiver) = mpsc::channel(QUEUE);
    let at = match (from, &terminal) {
        (Some(from), _) => from,
        (None, Some(terminal)) => terminal.end(),
        (None, None) => 0,
    };
    let tail =
        Tail { host: host.clone(), terminal: terminal.clone(), status: followed, at, client };
    tokio::spawn(tail.run(follow));
    Ok((Box::pin(tokio_stream::wrappers::ReceiverStream::new(receiver)), terminal))
}

/// Progress and result of a migration.
pub(super) fn events(watching: Watching, workload: String, kind: Kind) -> Events {
    let (client, receiver) = mpsc::channel(QUEUE);
    tokio::spawn(async move {
        let Watching { id, mut progress, mut result } = watching;
        let (id, started) = (id.to_string(), Instant::now());
        loop {
            let now = *progress.borrow_and_update();
            let message = convert::progress(&id, &workload, &now, started.elapsed());
            let event = proto::migration_event::Event::Progress(message);
            if client.send(Ok(proto::MigrationEvent { event: Some(event) })).await.is_err() {
                return;
            }
            let pause = async {
                tokio::time::sleep(PROGRESS_EVERY).await;
                if progress.changed().await.is_err() {
                    std::future::pending::<()>().await;
                }
            };
            let ended = tokio::select! {
                () = pause => false,
                ended = result.wait_for(Option::is_some) => match ended {
                    Ok(_) => true,
                    Err(_) => return,
                },
                () = client.closed() => return,
            };
            if ended {
                break;
            }
        }
        let report = result.borrow().clone();
        if let Some(report) = report {
            let event = proto::migration_event::Event::Result(convert::report(&report, kind));
            let _ = client.send(Ok(proto::MigrationEvent { event: Some(event) })).await;
        }
    });
    tokio_stream::wrappers::ReceiverStream::new(receiver).boxed()
}
