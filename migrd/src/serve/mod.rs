//! The daemon: its state directory, its listener, its start and its end.
//!
//! Owns the order of both. At the start the journal says what has to be done
//! about each workload ([`recover`]) before anybody is served.

mod recover;

use std::fs::{DirBuilder, File, OpenOptions};
use std::io;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use migr_proto::v1::FILE_DESCRIPTOR_SET;
use migr_proto::v1::control_server::ControlServer;
use migr_proto::v1::peer_server::PeerServer;
use tokio::net::{TcpListener, TcpStream};
use tokio_stream::StreamExt;
use tokio_util::sync::CancellationToken;
use tonic::transport::Server;

use crate::api::{ControlService, PeerService};
use crate::child::words;
use crate::config::{ConfigError, ServeArgs};
use crate::keeper::criu::Criu;
use crate::migration::destination::{Arrivals, Patience};
use crate::migration::journal::{Journal, JournalError};
use crate::registry::{Registry, Setup};
use crate::wire::receive::{LaneDirectory, LaneService};
use crate::wire::{Peers, incoming, server_settings};
use crate::workload::process::ProcessEngine;
use crate::workload::vm::{Site, VmEngine};
use crate::workload::{Engine, Kind, Recovers};

/// The largest message of a peer that is not a batch: the state of a VM.
const MAX_PEER_MESSAGE: usize = 32 << 20;
/// How long clients that still listen may hold up the daemon's end.
const LAST_WORDS: Duration = Duration::from_secs(2);

/// The daemon can't start or go on.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// How it was started.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The state directory.
    #[error(
        "cannot use the state directory {path}: {source}; it must be writable for migrd, on a file system that is not full"
    )]
    StateDir {
        /// Its path.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// Another daemon has it.
    #[error(
        "another migrd uses the state directory {0}; stop it, or give this one a directory of its own"
    )]
    InUse(PathBuf),
    /// The address.
    #[error("cannot listen on {address}: {source}; is another migrd there?")]
    Listen {
        /// The address.
        address: String,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// The journal.
    #[error(transparent)]
    Journal(#[from] JournalError),
    /// The gRPC server.
    #[error("the server failed: {0}")]
    Server(#[from] tonic::transport::Error),
    /// Reflection could not be set up.
    #[error("the protocol's description is not usable: {0}")]
    Reflection(#[from] tonic_reflection::server::Error),
}

/// Holds the state directory for this daemon alone while it lives.
struct StateDir {
    path: PathBuf,
    _lock: File,
}

impl StateDir {
    fn open(path: &Path) -> Result<Self, ServeError> {
        let failed = |source| ServeError::StateDir { path: path.to_owned(), source };
        // What is in it says which guests there are and what they print.
        DirBuilder::new().recursive(true).mode(0o700).create(path).map_err(failed)?;
        let path = path.canonicalize().map_err(failed)?;
        let mut options = OpenOptions::new();
        options.write(true).create(true).truncate(false).mode(0o600);
        let lock = options.open(path.join("lock")).map_err(failed)?;
        match lock.try_lock() {
            Ok(()) => Ok(Self { path, _lock: lock }),
            Err(std::fs::TryLockError::WouldBlock) => Err(ServeError::InUse(path)),
            Err(std::fs::TryLockError::Error(source)) => Err(failed(source)),
        }
    }
}

/// Serves until `shutdown` resolves. `ready` hears the address that is served.
///
/// # Errors
/// When the daemon can't start, or its server fails. Workloads go on in every
/// case.
pub async fn serve(
    args: ServeArgs,
    shutdown: impl Future<Output = ()> + Send + 'static,
    ready: impl FnOnce(&str),
) -> Result<(), ServeError> {
    args.check()?;
    let state = StateDir::open(&args.state_dir)?;
    let listening = |source| ServeError::Listen { address: args.listen.to_string(), source };
    let listener = TcpListener::bind(args.listen).await.map_err(listening)?;
    let here = listener.local_addr().map_err(listening)?.to_string();
    let failed = |source| ServeError::StateDir { path: state.path.clone(), source };
    let journal = Journal::open(&state.path.join("journal.redb"))?;
    let host = journal.host_id()?;
    let site = Site { host, address: here.clone() };
    let vms = VmEngine::new(state.path.join("vms"), site.clone()).map_err(failed)?;
    let criu = find_criu(args.criu.clone()).await;
    let containers = ProcessEngine::new(state.path.join("containers"), site.clone(), criu.clone());
    let containers = containers.and_then(|engine| engine.of_containers(args.runc.as_deref()));
    let containers = containers.map_err(failed)?;
    let processes = ProcessEngine::new(state.path.join("processes"), site, criu).map_err(failed)?;
    let peers = Peers::new(&here, host);
    let down = CancellationToken::new();
    let found = peers.clone();
    let registry = Registry::new(Setup {
        here: here.clone(),
        host,
        journal: journal.clone(),
        engines: vec![
            (Kind::Vm, Arc::new(vms.clone()) as Arc<dyn Engine>),
            (Kind::Process, Arc::new(processes.clone())),
            (Kind::Container, Arc::new(containers.clone())),
        ],
        peers: Arc::new(move |address| found.find(address)),
        lanes: args.lanes,
        shutdown: down.clone(),
    });
    let gate = LaneDirectory::default();
    let arrivals = Arrivals::new(
        Arc::new(registry.clone()),
        journal.clone(),
        Arc::new(gate.clone()),
        Patience::default(),
    );
    let engines: [(Kind, Arc<dyn Recovers>); 3] = [
        (Kind::Vm, Arc::new(vms.clone())),
        (Kind::Process, Arc::new(processes.clone())),
        (Kind::Container, Arc::new(containers.clone())),
    ];
    recover::recover(&registry, &arrivals, &journal, &engines, &peers).await?;

    let processes = Arc::new(processes);
    let control = ControlService::new(
        registry.clone(),
        arrivals.clone(),
        vms.clone(),
        Some(processes.clone()),
        peers.clone(),
    )
    .with_containers(Arc::new(containers));
    let peer = PeerServer::new(PeerService::new(registry.clone(), arrivals.clone(), processes));
    let (health, health_service) = tonic_health::server::health_reporter();
    health.set_serving::<ControlServer<ControlService>>().await;
    health.set_serving::<PeerServer<PeerService>>().await;
    let reflection = tonic_reflection::server::Builder::configure()
        .register_encoded_file_descriptor_set(FILE_DESCRIPTOR_SET)
        .build_v1()?;
    let router = server_settings(Server::builder())
        .add_service(ControlServer::new(control))
        .add_service(peer.max_decoding_message_size(MAX_PEER_MESSAGE))
        .add_service(LaneService::new(gate))
        .add_service(health_service)
        .add_service(reflection);

    tracing::info!(address = here, host = %host, state = %state.path.display(), "serving");
    ready(&here);
    let (drain, drained) = (CancellationToken::new(), CancellationToken::new());
    let draining = drain.clone();
    let connections = incoming(listener).filter(move |connection| served(&args, connection));
    let server = tokio::spawn(async move {
        let served =
            router.serve_with_incoming_shutdown(connections, draining.cancelled_owned()).await;
        drained.cancel();
        served
    });
    shutdown.await;
    tracing::info!("shutting down; workloads go on");
    registry.shut_down().await;
    arrivals.abort_all();
    drain.cancel();
    match tokio::time::timeout(LAST_WORDS, server).await {
        Ok(Ok(served)) => Ok(served?),
        Ok(Err(_)) | Err(_) => Ok(()),
    }
}

/// The CRIU that works here, or why none does. Trying it takes a moment.
async fn find_criu(named: Option<PathBuf>) -> Result<Criu, String> {
    let found = tokio::task::spawn_blocking(move || Criu::find(named.as_deref())).await;
    let found = found.map_err(|e| e.to_string())?.map_err(|e| words(&e));
    match &found {
        Ok(criu) => {
            tracing::info!(criu = %criu.path.display(), version = %criu.version, "process trees can be had")
        }
        Err(why) => tracing::info!(why, "process trees can't be had"),
    }
    found
}

/// Whether that connection may be served. What went wrong with it is the
/// server's to see.
fn served(args: &ServeArgs, connection: &io::Result<TcpStream>) -> bool {
    let Ok(Ok(client)) = connection.as_ref().map(TcpStream::peer_addr) else { return true };
    let serves = args.serves(client.ip());
    if !serves {
        tracing::warn!(%client, "refused a connection from outside of the trusted network");
    }
    serves
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    fn mode(path: &Path) -> u32 {
        std::fs::metadata(path).unwrap().permissions().mode() & 0o777
    }

    #[test]
    fn a_state_directory_that_is_made_is_for_its_user_alone() {
        let parent = tempfile::tempdir().unwrap();
        let path = parent.path().join("state");
        let state = StateDir::open(&path).unwrap();
        assert_eq!(mode(&state.path), 0o700);
        assert_eq!(mode(&state.path.join("lock")), 0o600);
    }

    #[test]
    fn a_state_directory_is_for_one_daemon_at_a_time() {
        let directory = tempfile::tempdir().unwrap();
        let first = StateDir::open(directory.path()).unwrap();
        assert!(matches!(StateDir::open(directory.path()), Err(ServeError::InUse(_))));
        drop(first);
        assert!(StateDir::open(directory.path()).is_ok());
    }
}
