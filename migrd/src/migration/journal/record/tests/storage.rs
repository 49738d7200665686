//! Storage that loses power: what was written and not synced is lost, in part
//! or whole, and from some operation on nothing works any more.

use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use redb::StorageBackend;
use redb::backends::InMemoryBackend;

/// A backend that can be opened again.
#[derive(Clone, Debug)]
pub struct Shared(pub Arc<InMemoryBackend>);

impl StorageBackend for Shared {
    fn len(&self) -> io::Result<u64> {
        self.0.len()
    }
    fn read(&self, offset: u64, out: &mut [u8]) -> io::Result<()> {
        self.0.read(offset, out)
    }
    fn set_len(&self, len: u64) -> io::Result<()> {
        self.0.set_len(len)
    }
    fn sync_data(&self) -> io::Result<()> {
        self.0.sync_data()
    }
    fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.0.write(offset, data)
    }
}

/// Which of the writes that were not synced reach the disk nevertheless.
#[derive(Clone, Copy, Debug)]
pub enum Survivors {
    None,
    All,
    Even,
    Odd,
}

#[derive(Debug, Default)]
struct State {
    /// What is on the disk.
    durable: Vec<u8>,
    /// What the system shows: the disk and its cache.
    seen: Vec<u8>,
    /// Writes and changes of length since the last sync, in order.
    unsynced: Vec<Unsynced>,
    /// Writes, syncs and changes of length done so far.
    done: u64,
    /// The first of them that fails.
    fails_at: Option<u64>,
}

#[derive(Clone, Debug)]
enum Unsynced {
    Write(usize, Vec<u8>),
    Length(usize),
}

fn carry_out(bytes: &mut Vec<u8>, change: &Unsynced) {
    match change {
        Unsynced::Write(offset, data) => {
            let end = offset + data.len();
            if bytes.len() < end {
                bytes.resize(end, 0);
            }
            bytes[*offset..end].copy_from_slice(data);
        }
        Unsynced::Length(length) => bytes.resize(*length, 0),
    }
}

/// A disk with a cache.
#[derive(Clone, Debug, Default)]
pub struct Disk(Arc<Mutex<State>>);

fn small(number: u64) -> usize {
    usize::try_from(number).expect("a small disk")
}

impl Disk {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Everything fails from the operation after `more` others on.
    pub fn fail_after(&self, more: u64) {
        let mut state = self.lock();
        state.fails_at = Some(state.done + more);
    }

    /// What is there when the power is back.
    pub fn power_cut(&self, survivors: Survivors) -> Self {
        let state = self.lock();
        let mut durable = state.durable.clone();
        for (number, change) in state.unsynced.iter().enumerate() {
            let survives = match (survivors, change) {
                (Survivors::None, _) => false,
                // A file that did not grow could not hold the write behind it.
                (Survivors::All, _) | (_, Unsynced::Length(_)) => true,
                (Survivors::Even, Unsynced::Write(..)) => number % 2 == 0,
                (Survivors::Odd, Unsynced::Write(..)) => number % 2 == 1,
            };
            if survives {
                carry_out(&mut durable, change);
            }
        }
        Self(Arc::new(Mutex::new(State { seen: durable.clone(), durable, ..State::default() })))
    }

    fn change(&self, change: Unsynced) -> io::Result<()> {
        let mut state = self.lock();
        step(&mut state)?;
        carry_out(&mut state.seen, &change);
        state.unsynced.push(change);
        Ok(())
    }
}

fn step(state: &mut State) -> io::Result<()> {
    if state.fails_at.is_some_and(|at| state.done >= at) {
        return Err(io::Error::other("the power is gone"));
    }
    state.done += 1;
    Ok(())
}

impl StorageBackend for Disk {
    fn len(&self) -> io::Result<u64> {
        Ok(u64::try_from(self.lock().seen.len()).expect("64 bits"))
    }

    fn read(&self, offset: u64, out: &mut [u8]) -> io::Result<()> {
        let state = self.lock();
        let offset = small(offset);
        let bytes = state.seen.get(offset..offset + out.len());
        out.copy_from_slice(bytes.ok_or(io::ErrorKind::UnexpectedEof)?);
        Ok(())
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.change(Unsynced::Length(small(len)))
    }

    fn sync_data(&self) -> io::Result<()> {
        let mut state = self.lock();
        step(&mut state)?;
        state.durable = state.seen.clone();
        state.unsynced.clear();
        Ok(())
    }

    fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.change(Unsynced::Write(small(offset), data.to_vec()))
    }
}
