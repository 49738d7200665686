//! A fake at its destination, and the memory that it lacks there.

use std::collections::BTreeSet;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, PoisonError};

use async_trait::async_trait;

use super::{FakeWorkload, Guest, Op, STREAM};
use crate::units::PAGE_SIZE;
use crate::workload::{Arriving, ChunkSink, Lacks, Piece, StreamHash, Workload, WorkloadError};

/// A daemon's hand on a guest that arrives.
pub struct FakeArriving(pub Arc<Guest>);

#[async_trait]
impl Arriving for FakeArriving {
    fn chunks(&self) -> Arc<dyn ChunkSink> {
        self.0.clone()
    }

    fn lacks(&self) -> Option<Arc<dyn Lacks>> {
        Some(Arc::new(FakeLacks::of(&self.0)))
    }

    async fn load(&mut self, state: &[u8]) -> Result<(), WorkloadError> {
        self.0.check(Op::Load)?;
        let never = self.0.lock().never_loads;
        if never {
            return std::future::pending().await;
        }
        let (words, odd) = state.as_chunks::<8>();
        let (Some((turn, pages)), []) = (words.split_first(), odd) else {
            return Err(WorkloadError::new("the state is not of whole words"));
        };
        self.0.written.store(u64::from_le_bytes(*turn), Ordering::Relaxed);
        let pages = pages.iter().map(|page| u64::from_le_bytes(*page));
        self.0.lock().lacking = Some(pages.collect());
        Ok(())
    }

    async fn hash(&mut self) -> Result<Vec<StreamHash>, WorkloadError> {
        Ok(self.0.hashes())
    }

    async fn start(&mut self, paused: bool) -> Result<(), WorkloadError> {
        self.0.check(Op::Start)?;
        if !paused {
            self.0.run();
        }
        Ok(())
    }

    fn arrived(self: Box<Self>) -> Box<dyn Workload> {
        Box::new(FakeWorkload(self.0))
    }

    async fn discard(self: Box<Self>) {
        self.0.end("discarded");
    }
}

/// What a guest lacks, as one daemon has asked for it.
pub(super) struct FakeLacks {
    guest: Arc<Guest>,
    asked: Mutex<BTreeSet<u64>>,
}

impl FakeLacks {
    pub(super) fn of(guest: &Arc<Guest>) -> Self {
        Self { guest: guest.clone(), asked: Mutex::default() }
    }

    /// What there is to say now, if anything.
    fn now(&self) -> Option<Result<Option<Piece>, WorkloadError>> {
        let inner = self.guest.lock();
        if inner.dead {
            return Some(Err(WorkloadError::new("the fake is dead")));
        }
        let lacking = inner.lacking.as_ref()?;
        if lacking.is_empty() {
            return Some(Ok(None));
        }
        // Before it runs it waits for nothing.
        if !inner.counted {
            return None;
        }
        let mut asked = self.asked.lock().unwrap_or_else(PoisonError::into_inner);
        let page = *lacking.iter().find(|page| !asked.contains(page))?;
        asked.insert(page);
        Some(Ok(Some(Piece { process: 1, address: page * PAGE_SIZE, pages: 1 })))
    }
}

#[async_trait]
impl Lacks for FakeLacks {
    async fn next(&self, _: bool) -> Result<Option<Piece>, WorkloadError> {
        loop {
            if let Some(said) = self.now() {
                return said;
            }
            tokio::time::sleep(std::time::Duration::from_millis(1)).await;
        }
    }

    async fn put(&self, piece: Piece, bytes: Vec<u8>) -> Result<(), WorkloadError> {
        let written = ChunkSink::write(self.guest.as_ref(), STREAM, piece.address, &bytes);
        written.map_err(|e| WorkloadError::caused("there is no such memory", e))?;
        let mut inner = self.guest.lock();
        inner.lacking.as_mut().map(|lacking| lacking.remove(&(piece.address / PAGE_SIZE)));
        Ok(())
    }

    async fn lost(&self, why: &str) -> Result<(), WorkloadError> {
        self.guest.end(why);
        Ok(())
    }
}
