//! One host of the model: its journal, its daemon and the copies it holds.

use std::collections::BTreeSet;

use crate::migration::journal::{Counterpart, Event, Identity, Ownership, Sealed, WorkloadRecord};
use crate::migration::link::Standing;
use crate::migration::recovery::{Duty, duty, standing_at_destination, standing_at_source};
use crate::units::{Epoch, HostId, MigrationId, WorkloadId};
use crate::workload::Kind;

/// Migration `number`.
pub fn id(number: u8) -> MigrationId {
    MigrationId::from_bytes([number; 16])
}

fn number(id: MigrationId) -> u8 {
    id.as_bytes()[0]
}

fn counterpart(number: u8) -> Counterpart {
    Counterpart { migration: id(number), address: String::new(), host: HostId::from_bytes([0; 16]) }
}

fn identity() -> Identity {
    Identity {
        id: WorkloadId::from_bytes([1; 16]),
        name: String::new(),
        kind: Kind::Vm,
        config: Vec::new(),
        memory_bytes: 0,
        cpus: 0,
        created_unix_ms: 0,
    }
}

/// What travels. The number is the migration's; an epoch where the protocol
/// carries one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Message {
    Offer(u8, u64),
    Accepted(u8),
    Seal(u8),
    SealDone(u8),
    SealFailed(u8),
    Activate(u8, u64),
    Running(u8),
    Abandon(u8),
    AskDestination(u8, u64),
    AskSource(u8, u64),
    ToldOwned(u8),
    ToldDiscarded(u8),
    ToldReleased(u8),
    ToldAborted(u8),
}

/// How far a migration under way is at its source.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Giving {
    /// It runs here; the peer may have accepted.
    Copying,
    /// It stands still; the peer seals.
    Stopped,
    /// The peer holds it.
    Sealed,
}

/// How far an arrival is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Taking {
    Receiving,
    Sealed,
    /// Owned by the journal; its first instruction did not run yet.
    Starting,
}

/// Everything of one host.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Host {
    pub record: WorkloadRecord,
    pub promised: BTreeSet<u8>,
    pub up: bool,
    /// It runs here.
    pub runs: bool,
    /// A whole copy is here: running, stopped or sealed.
    pub copy: bool,
    pub giving: Option<(u8, Giving)>,
    pub taking: Option<(u8, u64, Taking)>,
    /// Memory of what comes here stays at its source until it runs.
    pub follows: bool,
}

impl Host {
    pub fn new(first: bool, follows: bool) -> Self {
        let never = WorkloadRecord::never(identity());
        let record = if first { never.after(&Event::Created).expect("new") } else { never };
        Self {
            record,
            promised: BTreeSet::new(),
            up: true,
            runs: first,
            copy: first,
            giving: None,
            taking: None,
            follows,
        }
    }

    /// Whose memory it still needs.
    pub fn fills_from(&self) -> Option<u8> {
        self.record.filling.as_ref().map(|from| number(from.migration))
    }

    /// The last of its memory has come.
    pub fn fill(&mut self) {
        if let Some(m) = self.fills_from() {
            assert!(self.journal(&Event::Filled(id(m))), "{self:?}");
        }
    }

    /// What `Journal::record` does: the rule, and the promises next to it.
    fn journal(&mut self, event: &Event) -> bool {
        let promised = match event {
            Event::Sealed(s) => self.promised.contains(&number(s.from.migration)),
            Event::Activated(id) => self.promised.contains(&number(*id)),
            _ => false,
        };
        let Ok(next) = self.record.after(event) else { return false };
        if promised {
            return false;
        }
        self.record = next;
        if let Event::Discarded(id) | Event::NeverRan(Counterpart { migration: id, .. }) = event {
            self.promised.insert(number(*id));
        }
        true
    }

    pub fn released(&self) -> Option<(u8, u64)> {
        match &self.record.ownership {
            Ownership::Released(to) => Some((number(to.migration), self.record.epoch.0)),
            _ => None,
        }
    }

    pub fn may_start(&self) -> bool {
        self.up
            && self.record.owned()
            && self.runs
            && self.giving.is_none()
            && self.taking.is_none()
            && self.record.filling.is_none()
    }

    pub fn start(&mut self, migration: u8) -> Vec<Message> {
        self.giving = Some((migration, Giving::Copying));
        vec![Message::Offer(migration, self.record.epoch.next().0)]
    }

    pub fn abort(&mut self) -> Vec<Message> {
        let Some((migration, _)) = self.giving.take() else { return Vec::new() };
        self.runs = true;
        vec![Message::Abandon(migration)]
    }

    pub fn release(&mut self) -> Vec<Message> {
        let Some((migration, _)) = self.giving.take() else { return Vec::new() };
        assert!(self.journal(&Event::Released(counterpart(migration))), "{self:?}");
        self.settle()
    }

    pub fn settle(&mut self) -> Vec<Message> {
        let asked = |(m, e)| vec![Message::Activate(m, e), Message::AskDestination(m, e)];
        self.released().map_or_else(Vec::new, asked)
    }

    /// The destination's half of Seal.
    pub fn seal(&mut self, migration: u8, good: bool) -> Vec<Message> {
        let Some((m, epoch, Taking::Receiving)) = self.taking else { return Vec::new() };
        let from = counterpart(m);
        let (epoch_of, follows) = (Epoch(epoch), self.follows);
        let event = Event::Sealed(Sealed { from, epoch: epoch_of, paused: false, follows });
        if good && self.journal(&event) {
            self.taking = Some((m, epoch, Taking::Sealed));
            self.copy = true;
            return vec![Message::SealDone(migration)];
        }
        self.discard();
        vec![Message::SealFailed(migration)]
    }

    fn discard(&mut self) {
        match self.taking.take() {
            Some((m, _, Taking::Receiving)) => {
                self.promised.insert(m);
            }
            Some((m, _, Taking::Sealed)) => {
                assert!(self.journal(&Event::Discarded(id(m))), "{self:?}");
                self.copy = false;
            }
            taking @ (Some((_, _, Taking::Starting)) | None) => self.taking = taking,
        }
    }

    fn own(&mut self) {
        let Some((m, epoch, Taking::Sealed)) = self.taking else { return };
        if self.journal(&Event::Activated(id(m))) {
            self.taking = Some((m, epoch, Taking::Starting));
        }
    }

    /// The end of Starting.
    pub fn begin(&mut self, good: bool) -> Vec<Message> {
        let Some((m, _, Taking::Starting)) = self.taking else { return Vec::new() };
        self.taking = None;
        if good {
            self.runs = true;
            // The other has to keep what this one lacks.
            let whole = self.record.filling.is_none();
            return whole.then_some(Message::Running(m)).into_iter().collect();
        }
        assert!(self.journal(&Event::NeverRan(counterpart(m))), "{self:?}");
        self.copy = false;
        Vec::new()
    }

    pub fn tick(&mut self) -> Vec<Message> {
        match self.taking {
            Some((m, epoch, Taking::Sealed)) => vec![Message::AskSource(m, epoch)],
            Some((_, _, Taking::Receiving)) => {
                self.discard();
                Vec::new()
            }
            Some((_, _, Taking::Starting)) | None => Vec::new(),
        }
    }

    pub fn crash(&mut self) {
        self.up = false;
        self.giving = None;
        self.taking = None;
    }

    /// What recovery does; `survived`: a sealed copy is still there.
    pub fn restart(&mut self, survived: bool) {
        self.up = true;
        match duty(&self.record) {
            Duty::Run { .. } => {
                assert!(self.copy, "owned and lost: {self:?}");
                self.runs = true;
            }
            Duty::Settle(_) => self.runs = false,
            Duty::Await(sealed) => {
                self.taking = Some((number(sealed.from.migration), sealed.epoch.0, Taking::Sealed));
                if !survived {
                    self.discard();
                }
            }
            Duty::Nothing => (self.runs, self.copy) = (false, false),
        }
    }

    pub fn operator(&mut self, event: &Event) {
        assert!(self.journal(event), "{event:?}: {self:?}");
        if *event == Event::GivenUp {
            self.copy = false;
        }
    }

    /// A message arrives; what is said in return.
    pub fn receive(&mut self, message: Message) -> Vec<Message> {
        match message {
            Message::Offer(m, epoch) => self.offered(m, epoch),
            Message::Seal(_) => Vec::new(),
            Message::Accepted(m) if self.giving == Some((m, Giving::Copying)) => {
                self.giving = Some((m, Giving::Stopped));
                self.runs = false;
                vec![Message::Seal(m)]
            }
            Message::SealDone(m) if self.giving == Some((m, Giving::Stopped)) => {
                self.giving = Some((m, Giving::Sealed));
                Vec::new()
            }
            Message::SealFailed(m) if self.giving == Some((m, Giving::Stopped)) => self.abort(),
            Message::Activate(m, epoch) => {
                if self.taking == Some((m, epoch, Taking::Sealed)) {
                    self.own();
                }
                Vec::new()
            }
            Message::Abandon(m) => {
                if self.taking.is_some_and(|(now, ..)| now == m) {
                    self.discard();
                }
                Vec::new()
            }
            Message::Running(m) | Message::ToldOwned(m) => {
                if self.journal(&Event::Confirmed(id(m))) {
                    self.copy = false;
                }
                Vec::new()
            }
            Message::ToldDiscarded(m) => {
                if self.journal(&Event::TakenBack(id(m))) {
                    self.runs = true;
                }
                Vec::new()
            }
            Message::AskDestination(m, epoch) => self.asked_by_source(m, epoch),
            Message::AskSource(m, epoch) => {
                let under_way = self.giving.is_some_and(|(now, _)| now == m);
                match standing_at_source(Some(&self.record), id(m), Epoch(epoch), under_way) {
                    Standing::Released => vec![Message::ToldReleased(m)],
                    Standing::Aborted => vec![Message::ToldAborted(m)],
                    _ => Vec::new(),
                }
            }
            Message::ToldReleased(m) | Message::ToldAborted(m) => {
                if self.taking.is_some_and(|(now, _, t)| now == m && t == Taking::Sealed) {
                    match message {
                        Message::ToldReleased(_) => self.own(),
                        _ => self.discard(),
                    }
                }
                Vec::new()
            }
            Message::Accepted(_) | Message::SealDone(_) | Message::SealFailed(_) => Vec::new(),
        }
    }

    fn offered(&mut self, m: u8, epoch: u64) -> Vec<Message> {
        let from = counterpart(m);
        let (epoch_of, follows) = (Epoch(epoch), self.follows);
        let event = Event::Sealed(Sealed { from, epoch: epoch_of, paused: false, follows });
        let free = self.taking.is_none() && !self.promised.contains(&m);
        if !free || self.record.after(&event).is_err() {
            return Vec::new();
        }
        self.taking = Some((m, epoch, Taking::Receiving));
        vec![Message::Accepted(m)]
    }

    fn asked_by_source(&mut self, m: u8, epoch: u64) -> Vec<Message> {
        match self.taking {
            Some((now, _, Taking::Sealed | Taking::Starting)) if now == m => return Vec::new(),
            Some((now, _, Taking::Receiving)) if now == m => self.discard(),
            _ => {}
        }
        let promised = self.promised.contains(&m);
        match standing_at_destination(Some(&self.record), id(m), Epoch(epoch), promised) {
            Some(Standing::Owned) => vec![Message::ToldOwned(m)],
            Some(Standing::Discarded) => vec![Message::ToldDiscarded(m)],
            Some(_) => Vec::new(),
            None => {
                self.promised.insert(m);
                vec![Message::ToldDiscarded(m)]
            }
        }
    }
}
