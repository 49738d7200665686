//! A fake on its host, and what it leaves behind when it has moved.

use std::collections::VecDeque;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use async_trait::async_trait;
use tokio::sync::watch;

use super::arriving::FakeLacks;
use super::{Guest, Op, STREAM};
use crate::pages::{PageBitmap, PageSet};
use crate::units::{PAGE_SIZE, PageIndex, PageRun};
use crate::workload::{
    Ahead, Carry, ChunkSource, Follows, Footprint, Lacks, LeftMemory, Needing, Needs, Output,
    Piece, Problem, RunState, StreamHash, StreamSpec, Terminal, Workload, WorkloadError,
};

/// A daemon's hand on a guest that runs or ran on its host.
pub struct FakeWorkload(pub Arc<Guest>);

struct Silent;

#[async_trait]
impl Terminal for Silent {
    fn read(&self, _: u64, _: usize) -> Result<Vec<Output>, WorkloadError> {
        Ok(Vec::new())
    }

    fn end(&self) -> u64 {
        0
    }

    async fn more_than(&self, _: u64) {
        std::future::pending().await
    }

    async fn input(&self, _: &[u8]) -> Result<(), WorkloadError> {
        Ok(())
    }

    fn populated_bytes(&self) -> u64 {
        0
    }

    async fn footprint(&self) -> Result<Footprint, WorkloadError> {
        Ok(Footprint::default())
    }
}

#[async_trait]
impl Workload for FakeWorkload {
    fn streams(&self) -> Vec<StreamSpec> {
        let length = self.0.memory().len() as u64;
        vec![StreamSpec { key: STREAM, name: "fake".into(), length, used: 0 }]
    }

    fn chunks(&self) -> Arc<dyn ChunkSource> {
        self.0.clone()
    }

    fn state(&self) -> watch::Receiver<RunState> {
        self.0.state.subscribe()
    }

    fn terminal(&self) -> Arc<dyn Terminal> {
        Arc::new(Silent)
    }

    async fn carry(&mut self, what: Carry) -> Result<(), WorkloadError> {
        self.0.lock().carried = what;
        Ok(())
    }

    fn needs(&self) -> Needing {
        Arc::new(Needs::default)
    }

    fn saves_files(&self) -> bool {
        false
    }

    async fn save_files_in(&mut self, _: OwnedFd, _: String) -> Result<(), WorkloadError> {
        Err(WorkloadError::new("it is saved in streams and has no files"))
    }

    async fn problems(&mut self) -> Result<Vec<Problem>, WorkloadError> {
        Ok(self.0.lock().problems.clone())
    }

    fn ahead(&self) -> Ahead {
        let inner = self.0.lock();
        match (inner.copies, inner.room) {
            (0, _) => Ahead::Pages,
            (_, Some(0)) => Ahead::Not("the fake has no room for another copy".into()),
            _ => Ahead::Copies { pays: true, why: "the fake makes copies".into() },
        }
    }

    fn follows(&self) -> Follows {
        Follows::Can
    }

    fn left_behind(&self) -> Option<Arc<dyn LeftMemory>> {
        let inner = self.0.lock();
        let left = inner.carried.follows && inner.frozen;
        left.then(|| Arc::new(FakeLeft(self.0.clone())) as Arc<dyn LeftMemory>)
    }

    fn lacks(&self) -> Option<Arc<dyn Lacks>> {
        Some(Arc::new(FakeLacks::of(&self.0)))
    }

    async fn files_ahead(&mut self) -> Result<Option<PageSet>, WorkloadError> {
        Ok(None)
    }

    async fn copy_ahead(&mut self) -> Result<Option<PageSet>, WorkloadError> {
        self.0.check(Op::CopyAhead)?;
        if self.0.hangs() {
            return std::future::pending().await;
        }
        if self.0.lock().copy.is_none() {
            self.0.scribble();
            let populated = self.0.populated();
            let mut inner = self.0.lock();
            inner.room = inner.room.map(|room| room.saturating_sub(1));
            let clean = PageBitmap::none(populated.pages());
            let mut set = PageSet::default();
            set.set(STREAM, inner.dirty.replace(clean).unwrap_or(populated));
            inner.copy = Some(split(&set, inner.copies));
        }
        let mut inner = self.0.lock();
        let part = inner.copy.as_mut().and_then(VecDeque::pop_front);
        if part.is_none() {
            inner.copy = None;
        }
        Ok(part)
    }

    async fn start_tracking(&mut self) -> Result<(), WorkloadError> {
        self.0.check(Op::StartTracking)?;
        let populated = self.0.populated();
        self.0.lock().dirty = Some(populated);
        Ok(())
    }

    async fn stop_tracking(&mut self) -> Result<(), WorkloadError> {
        let mut inner = self.0.lock();
        inner.dirty = None;
        inner.copy = None;
        Ok(())
    }

    async fn dirty(&mut self) -> Result<PageSet, WorkloadError> {
        self.0.check(Op::Dirty)?;
        self.0.scribble();
        let dirty = self.0.lock().dirty.clone();
        let mut set = PageSet::default();
        set.set(STREAM, dirty.unwrap_or_else(|| self.0.populated()));
        Ok(set)
    }

    async fn clear(&mut self, pages: &PageSet) -> Result<(), WorkloadError> {
        self.0.check(Op::Clear)?;
        if let (Some(dirty), Some(clean)) = (&mut self.0.lock().dirty, pages.get(STREAM)) {
            dirty.subtract(clean);
        }
        Ok(())
    }

    async fn drain(&mut self) -> Result<(), WorkloadError> {
        self.0.check(Op::Drain)
    }

    async fn freeze(&mut self) -> Result<(), WorkloadError> {
        self.0.check(Op::Freeze)?;
        self.0.scribble();
        self.0.hold();
        self.0.lock().rest = None;
        Ok(())
    }

    async fn rest(&mut self) -> Result<Option<PageSet>, WorkloadError> {
        self.0.check(Op::Rest)?;
        if self.0.hangs() {
            return std::future::pending().await;
        }
        if self.0.lock().carried.follows {
            return Ok(None);
        }
        if self.0.lock().rest.is_none() {
            let dirty = self.dirty().await?;
            let parts = self.0.lock().parts.max(1);
            self.0.lock().rest = Some(split(&dirty, parts));
        }
        Ok(self.0.lock().rest.as_mut().and_then(VecDeque::pop_front))
    }

    fn saves_early(&self) -> bool {
        self.0.lock().parts == 0
    }

    async fn hash(&mut self) -> Result<Vec<StreamHash>, WorkloadError> {
        self.0.check(Op::Hash)?;
        Ok(self.0.hashes())
    }

    async fn save(&mut self) -> Result<Vec<u8>, WorkloadError> {
        self.0.check(Op::Save)?;
        let mut state = self.0.written.load(Ordering::Relaxed).to_le_bytes().to_vec();
        if self.0.lock().carried.follows {
            // The pages that follow.
            let pages = self.0.populated();
            let pages = (0..pages.pages()).filter(|page| pages.contains(PageIndex(*page)));
            state.extend(pages.flat_map(u64::to_le_bytes));
        }
        Ok(state)
    }

    async fn let_go(&mut self) -> Result<(), WorkloadError> {
        self.0.check(Op::LetGo)
    }

    async fn thaw(&mut self) -> Result<(), WorkloadError> {
        self.0.lock().frozen = false;
        self.0.count();
        Ok(())
    }

    async fn pause(&mut self) -> Result<(), WorkloadError> {
        self.0.pause();
        Ok(())
    }

    async fn resume(&mut self) -> Result<(), WorkloadError> {
        self.0.run();
        Ok(())
    }

    async fn ask_to_end(&mut self) -> Result<(), WorkloadError> {
        let takes_its_time = self.0.lock().takes_its_time;
        if !takes_its_time {
            self.0.end("ended when asked to");
        }
        Ok(())
    }

    async fn stop(&mut self) -> Result<(), WorkloadError> {
        let ended = self.0.lock().dead;
        if !ended {
            self.0.end("stopped");
        }
        Ok(())
    }

    async fn discard(self: Box<Self>) {
        self.0.end("discarded");
    }
}

/// `pages` in at most so many parts, none of them empty.
fn split(pages: &PageSet, parts: u64) -> VecDeque<PageSet> {
    let Some(all) = pages.get(STREAM) else { return VecDeque::new() };
    let single: Vec<_> = (0..all.pages()).filter(|page| all.contains(PageIndex(*page))).collect();
    let size = all.count().div_ceil(parts).max(1);
    let part = |pages: &[u64]| {
        let mut part = PageBitmap::none(all.pages());
        for page in pages {
            part.insert(PageRun { first: PageIndex(*page), count: 1 });
        }
        let mut set = PageSet::default();
        set.set(STREAM, part);
        set
    };
    single.chunks(usize::try_from(size).expect("a small guest")).map(part).collect()
}

/// Memory of a guest that has left.
struct FakeLeft(Arc<Guest>);

impl LeftMemory for FakeLeft {
    fn bytes(&self) -> u64 {
        self.0.populated().count() * PAGE_SIZE
    }

    fn read(&self, piece: Piece) -> Result<Vec<u8>, WorkloadError> {
        if self.0.lock().dead {
            return Err(WorkloadError::new("the fake that left is dead"));
        }
        let mut bytes = vec![0; usize::try_from(piece.len_bytes()).expect("small")];
        let read = ChunkSource::read(self.0.as_ref(), STREAM, piece.address, &mut bytes);
        read.map_err(|e| WorkloadError::caused("there is no such memory", e))?;
        Ok(bytes)
    }
}
