//! A workload without a kernel, for driving the state machine in tests.
//!
//! A [`Guest`] is what outlives a daemon, as a VMM child does; [`FakeWorkload`]
//! and [`FakeArriving`] are a daemon's hands on it. Every guest of a test
//! shares a [`Census`], which fails the test the moment two of one workload run.

mod arriving;
mod leaving;

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::watch;

pub use arriving::FakeArriving;
pub use leaving::FakeWorkload;

use super::{
    Carry, ChunkSink, ChunkSource, OutOfStream, Problem, RunState, StreamHash, StreamKey,
    WorkloadError,
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
