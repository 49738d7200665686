//! A workload without a kernel, for driving the state machine in tests.
//!
//! A [`Guest`] is what outlives a daemon, as a VMM child does; [`FakeWorkload`]
//! and [`FakeArriving`] are a daemon's hands on it. Every guest of a test
//! shares a [`Census`], which fails the test the moment two of one workload run.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use async_trait::async_trait;
use tokio::sync::watch;

use super::{
    Ahead, Arriving, Carry, ChunkSink, ChunkSource, Follows, Footprint, Lacks, LeftMemory, Needing,
    Needs, OutOfStream, Output, Piece, Problem, RunState, StreamHash, StreamKey, StreamSpec,
    Terminal, Workload, WorkloadError,
};
use crate::pages::{PageBitmap, PageSet};
use crate::units::{PAGE_BYTES, PAGE_SIZE, PageIndex, PageRun};

/// The one stream of a fake.
pub const STREAM: StreamKey = StreamKey(0);

/// Counts how many guests run, and the most that ever did at once.
#[derive(Debug, Default)]
pub struct Census(Mutex<(u64, u64)>);

impl Census {
    fn enter(&self) {
        let mut counts = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        counts.0 += 1;
        counts.1 = counts.1.max(counts.0);
    }

    fn leave(&self) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).0 -= 1;
    }

    /// Guests that run now, and the most that ever ran at once.
    pub fn counts(&self) -> (u64, u64) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// An operation that a guest can be made to refuse.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Op {
    /// `copy_ahead`.
    CopyAhead,
    /// `start_tracking`.
    StartTracking,
    /// `dirty`.
    Dirty,
    /// `clear`.
    Clear,
    /// `drain`.
    Drain,
    /// `freeze`.
    Freeze,
    /// `let_go`.
    LetGo,
    /// `rest`.
    Rest,
    /// `save`.
    Save,
    /// `hash`.
    Hash,
    /// `load`.
    Load,
    /// `start`.
    Start,
}

/// What lives on when a daemon dies.
pub struct Guest {
    census: Arc<Census>,
    memory: Mutex<Vec<u8>>,
    inner: Mutex<Inner>,
    state: watch::Sender<RunState>,
    /// Pages it writes whenever it is looked at while it runs.
    dirties: u64,
    written: AtomicU64,
}

#[derive(Default)]
struct Inner {
    counted: bool,
    frozen: bool,
    paused: bool,
    dead: bool,
    takes_its_time: bool,
    dirty: Option<PageBitmap>,
    failing: BTreeMap<Op, u32>,
    /// How many calls of an operation are let through before those that fail.
    spared: BTreeMap<Op, u32>,
    calls: Vec<Op>,
    hangs_after: Option<u32>,
    never_loads: bool,
    carried: Carry,
    problems: Vec<Problem>,
    /// Into how many parts its rest falls; 0 counts as 1.
    parts: u64,
    /// What of its rest was not asked for yet; `None`: it was not asked at all.
    rest: Option<VecDeque<PageSet>>,
    /// Its memory goes in copies, each of so many parts; 0: page by page.
    copies: u64,
    /// What of the copy that it makes was not asked for yet; `None`: it makes none.
    copy: Option<VecDeque<PageSet>>,
    /// How many copies it has room for.
    room: Option<u32>,
    /// The pages that follow and have not come; `None`: it is not known yet which do.
    lacking: Option<BTreeSet<u64>>,
}

impl Guest {
    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn memory(&self) -> MutexGuard<'_, Vec<u8>> {
        self.memory.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A guest that does not run yet, of so many pages.
    pub fn empty(census: &Arc<Census>, pages: u64) -> Arc<Self> {
        Self::dirtying(census, pages, 0)
    }

    /// The same, that writes its first `dirties` pages whenever it is looked at.
    pub fn dirtying(census: &Arc<Census>, pages: u64, dirties: u64) -> Arc<Self> {
        let bytes = usize::try_from(pages * PAGE_SIZE).expect("a small guest");
        Arc::new(Self {
            census: census.clone(),
            memory: Mutex::new(vec![0; bytes]),
            inner: Mutex::default(),
            state: watch::Sender::new(RunState::Paused),
            dirties,
            written: AtomicU64::new(0),
        })
    }

    /// Makes the next `times` calls of `op` fail.
    pub fn failing_at(&self, op: Op, times: u32) {
        self.lock().failing.insert(op, times);
    }

    /// From now on its rest comes in so many parts, and it is saved only after
    /// the last: what comes later was written while it stood still.
    pub fn in_parts(&self, parts: u64) {
        self.lock().parts = parts;
    }

    /// From now on its memory goes in copies, each of so many parts, and it is saved
    /// after the last part of its rest.
    pub fn copies_in(&self, parts: u64) {
        self.in_parts(1);
        self.lock().copies = parts;
    }

    /// It can make so many copies and not more.
    pub fn has_room_for(&self, copies: u32) {
        self.lock().room = Some(copies);
    }

    /// Whether writes to its memory are noted.
    pub fn is_tracked(&self) -> bool {
        self.lock().dirty.is_some()
    }

    /// From now on these keep it from being saved.
    pub fn has(&self, problems: Vec<Problem>) {
        self.lock().problems = problems;
    }

    /// What of it travels.
    pub fn carried(&self) -> Carry {
        self.lock().carried
    }

    /// Makes the next `times` calls of `op` fail after the first `after`.
    pub fn failing_after(&self, op: Op, after: u32, times: u32) {
        let mut inner = self.lock();
        inner.spared.insert(op, after);
        inner.failing.insert(op, times);
    }

    /// From now on its `rest` never returns after the first `parts` calls, until
    /// its future is dropped.
    pub fn hangs_after(&self, parts: u32) {
        self.lock().hangs_after = Some(parts);
    }

    /// From now on its `load` never returns, until its future is dropped.
    pub fn never_loads(&self) {
        self.lock().never_loads = true;
    }

    /// Whether this call of `rest` is to hang.
    fn hangs(&self) -> bool {
        let mut inner = self.lock();
        let hangs = inner.hangs_after == Some(0);
        inner.hangs_after = inner.hangs_after.map(|parts| parts.saturating_sub(1));
        hangs
    }

    /// Which operations were called so far.
    pub fn calls(&self) -> Vec<Op> {
        self.lock().calls.clone()
    }

    fn check(&self, op: Op) -> Result<(), WorkloadError> {
        let mut inner = self.lock();
        inner.calls.push(op);
        if inner.dead {
            return Err(WorkloadError::new("the fake is dead"));
        }
        if let Some(spared @ 1..) = inner.spared.get_mut(&op) {
            *spared -= 1;
            return Ok(());
        }
        match inner.failing.get_mut(&op) {
            Some(times @ 1..) => {
                *times -= 1;
                Err(WorkloadError::new(format!("the fake fails at {op:?}")))
            }
            Some(0) | None => Ok(()),
        }
    }

    fn count(&self) {
        let mut inner = self.lock();
        let runs = !inner.frozen && !inner.paused && !inner.dead;
        if runs != inner.counted {
            inner.counted = runs;
            if runs { self.census.enter() } else { self.census.leave() }
        }
    }

    /// Runs, unless it is dead.
    pub fn run(&self) {
        {
            let mut inner = self.lock();
            inner.frozen = false;
            inner.paused = false;
        }
        self.count();
        self.state.send_replace(RunState::Running);
    }

    /// Stands still until it is resumed.
    pub fn pause(&self) {
        self.lock().paused = true;
        self.count();
        self.state.send_replace(RunState::Paused);
    }

    /// Stands still.
    pub fn hold(&self) {
        self.lock().frozen = true;
        self.count();
    }

    /// Whether it runs.
    pub fn runs(&self) -> bool {
        self.lock().counted
    }

    /// From now on it does not end at once when it is asked to.
    pub fn takes_its_time(&self) {
        self.lock().takes_its_time = true;
    }

    /// Ends by itself.
    pub fn end(&self, reason: &str) {
        self.lock().dead = true;
        self.count();
        self.state.send_replace(RunState::Ended(reason.to_owned()));
    }

    /// Its memory, as a checksum.
    pub fn checksum(&self) -> u32 {
        crc32fast::hash(&self.memory())
    }

    /// Writes `value` all over page `page`, as the guest would.
    pub fn write_page(&self, page: u64, value: u8) {
        let at = usize::try_from(page * PAGE_SIZE).expect("a small guest");
        self.memory()[at..at + PAGE_BYTES].fill(value);
        if let Some(dirty) = &mut self.lock().dirty {
            dirty.insert(PageRun { first: PageIndex(page), count: 1 });
        }
    }

    /// How many pages have not come.
    pub fn lacking(&self) -> usize {
        self.lock().lacking.as_ref().map_or(0, BTreeSet::len)
    }

    fn scribble(&self) {
        if self.runs() {
            let turn = self.written.fetch_add(1, Ordering::Relaxed);
            for page in 0..self.dirties {
                self.write_page(page, u8::try_from((turn + page) % 255 + 1).expect("a byte"));
            }
        }
    }

    fn populated(&self) -> PageBitmap {
        let memory = self.memory();
        let mut set = PageBitmap::none(memory.len() as u64 / PAGE_SIZE);
        for (index, page) in (0u64..).zip(memory.chunks(PAGE_BYTES)) {
            if page.iter().any(|b| *b != 0) {
                set.insert(PageRun { first: PageIndex(index), count: 1 });
            }
        }
        set
    }

    fn hashes(&self) -> Vec<StreamHash> {
        vec![StreamHash { key: STREAM, hash: *blake3::hash(&self.memory()).as_bytes() }]
    }

    fn range(
        &self,
        key: StreamKey,
        offset: u64,
        length: u64,
    ) -> Result<std::ops::Range<usize>, OutOfStream> {
        let end = offset.checked_add(length).and_then(|e| usize::try_from(e).ok());
        match end {
            Some(end) if key == STREAM && end <= self.memory().len() => {
                Ok(usize::try_from(offset).unwrap_or(end)..end)
            }
            _ => Err(OutOfStream { key, offset, length }),
        }
    }
}

impl ChunkSource for Guest {
    fn read(&self, key: StreamKey, offset: u64, into: &mut [u8]) -> Result<(), OutOfStream> {
        let range = self.range(key, offset, into.len() as u64)?;
        into.copy_from_slice(&self.memory()[range]);
        Ok(())
    }

    fn is_zero(&self, key: StreamKey, offset: u64, length: u64) -> Result<bool, OutOfStream> {
        let range = self.range(key, offset, length)?;
        Ok(self.memory()[range].iter().all(|b| *b == 0))
    }

    fn waits(&self, _: StreamKey) -> bool {
        false
    }
}

impl ChunkSink for Guest {
    fn write(&self, key: StreamKey, offset: u64, bytes: &[u8]) -> Result<(), OutOfStream> {
        let range = self.range(key, offset, bytes.len() as u64)?;
        self.memory()[range].copy_from_slice(bytes);
        Ok(())
    }

    fn zero(&self, key: StreamKey, offset: u64, length: u64) -> Result<(), OutOfStream> {
        let range = self.range(key, offset, length)?;
        self.memory()[range].fill(0);
        Ok(())
    }
}

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

/// What a guest lacks, as one daemon has asked for it.
struct FakeLacks {
    guest: Arc<Guest>,
    asked: Mutex<BTreeSet<u64>>,
}

impl FakeLacks {
    fn of(guest: &Arc<Guest>) -> Self {
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
