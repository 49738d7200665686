//! What makes the workloads of one kind on a host, lets them arrive there, and finds
//! them again.

use std::sync::Arc;

use async_trait::async_trait;

use super::{
    ChunkSink, Lacks, NetAddress, Problem, StreamHash, StreamSpec, Workload, WorkloadError,
};
use crate::units::WorkloadId;

/// The workload at the destination, from empty to running.
#[async_trait]
pub trait Arriving: Send + Sync {
    /// Writes its streams from any thread.
    fn chunks(&self) -> Arc<dyn ChunkSink>;

    /// The memory that it lacks or will lack, because it follows; `None` when it can lack
    /// none. It may lack some before [`load`](Self::load) is done.
    fn lacks(&self) -> Option<Arc<dyn Lacks>>;

    /// Takes what [`Workload::save`] gave. It does not run yet.
    async fn load(&mut self, state: &[u8]) -> Result<(), WorkloadError>;

    /// Hashes its streams.
    async fn hash(&mut self) -> Result<Vec<StreamHash>, WorkloadError>;

    /// Runs it, or leaves it paused if `paused`. May be called again after an
    /// error.
    async fn start(&mut self, paused: bool) -> Result<(), WorkloadError>;

    /// The workload, after `start`.
    fn arrived(self: Box<Self>) -> Box<dyn Workload>;

    /// Drops it and everything it holds.
    async fn discard(self: Box<Self>);
}

/// What a host needs to know to make room for a workload that arrives.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Manifest {
    /// The workload.
    pub workload: WorkloadId,
    /// Its name, valid and unused on this host when checked.
    pub name: String,
    /// Its kind.
    pub kind: Kind,
    /// Its streams.
    pub streams: Vec<StreamSpec>,
    /// What its kind makes it of.
    pub config: Vec<u8>,
    /// Memory to reserve, in bytes.
    pub memory_bytes: u64,
    /// Virtual CPUs; 0 where that says nothing.
    pub cpus: u32,
    /// It stays paused.
    pub paused: bool,
    /// When it was first created, in ms since the Unix epoch.
    pub created_unix_ms: i64,
    /// What it has to find on a host, as its kind writes that down; empty when
    /// that is nothing.
    pub needs: Vec<u8>,
    /// Memory of it stays at the source, and follows when it runs.
    pub follows: bool,
}

/// A kind of workload.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    /// A virtual machine.
    Vm,
    /// A process tree.
    Process,
    /// An OCI container: a process tree that runc makes.
    Container,
}

/// Makes workloads of one kind on this host.
#[async_trait]
pub trait Engine: Send + Sync {
    /// What keeps this host from running what the manifest announces; empty:
    /// nothing does. Nothing is made.
    async fn check(&self, manifest: &Manifest) -> Vec<Problem>;

    /// The addresses that a workload of that configuration has in networks that others
    /// of its host may be in. They are known only where it names the bridge; what can't
    /// be read has none.
    fn addresses(&self, _config: &[u8]) -> Vec<NetAddress> {
        Vec::new()
    }

    /// Ends what may be left of a workload that nobody holds, and deletes its
    /// files.
    async fn clear(&self, id: WorkloadId);

    /// Makes an empty workload that is ready to receive.
    async fn prepare(&self, manifest: &Manifest) -> Result<Box<dyn Arriving>, WorkloadError>;
}

/// Finds the workloads of one kind again that an earlier daemon has made.
#[async_trait]
pub trait Recovers: Engine {
    /// An owned workload, as an earlier daemon left it. It runs unless `paused`, or
    /// has ended.
    ///
    /// # Errors
    /// When what is left of it can't be read.
    async fn find(
        &self,
        id: WorkloadId,
        name: &str,
        config: &[u8],
        paused: bool,
    ) -> Result<Box<dyn Workload>, WorkloadError>;

    /// The same, standing still whatever it did: it is not known whose it is.
    ///
    /// # Errors
    /// When it can't be read or does not stand still.
    async fn find_released(
        &self,
        id: WorkloadId,
        name: &str,
        paused: bool,
    ) -> Result<Option<Box<dyn Workload>>, WorkloadError>;

    /// The sealed copy of a workload, if it still lives.
    ///
    /// # Errors
    /// When it can't be read.
    async fn find_sealed(
        &self,
        id: WorkloadId,
        name: &str,
    ) -> Result<Option<Box<dyn Arriving>>, WorkloadError>;

    /// Ends every workload that is not in `known`, and clears it away.
    async fn sweep(&self, known: &std::collections::BTreeSet<WorkloadId>);
}
