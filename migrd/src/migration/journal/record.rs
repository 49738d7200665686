//! What a host's journal says of one workload, and the only ways that may change.
//!
//! Pure: `WorkloadRecord::after` is the whole hand-over rule of
//! `docs/failure-model.md`, tested by tables and by replaying random histories.

use serde::{Deserialize, Serialize};

use crate::units::{Epoch, HostId, MigrationId, WorkloadId};
use crate::workload::Kind;

/// The other host of a hand-over.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Counterpart {
    /// The migration that connects the two.
    pub migration: MigrationId,
    /// Where the other daemon listens.
    pub address: String,
    /// Who the other daemon is: whoever else answers at its address knows
    /// nothing of the matter.
    pub host: HostId,
}

/// Whose the workload is, as far as this host may say.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Ownership {
    /// It was never here.
    Never,
    /// This host may run it, in the record's epoch.
    Owned,
    /// Given away in the record's epoch; whether the peer took it is not known.
    Released(Counterpart),
    /// The peer took it in the record's epoch.
    Gone(Counterpart),
    /// An operator removed it here; who had it then, if it was elsewhere: that
    /// one may still ask whether it was released to it.
    Removed(Option<Counterpart>),
}

/// A complete copy that waits for the source's word.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Sealed {
    /// Where it came from.
    pub from: Counterpart,
    /// The epoch it will be owned in.
    pub epoch: Epoch,
    /// It stays paused when it is activated.
    pub paused: bool,
    /// Memory of it stays at its source, and follows when it runs.
    #[serde(default)]
    pub follows: bool,
}

/// What a workload is made of; it does not change while the workload lives.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Identity {
    /// Its id, on every host.
    pub id: WorkloadId,
    /// Its name.
    pub name: String,
    /// Its kind.
    pub kind: Kind,
    /// What its kind makes it of.
    pub config: Vec<u8>,
    /// Memory it may use, in bytes.
    pub memory_bytes: u64,
    /// Virtual CPUs; 0 where that says nothing.
    pub cpus: u32,
    /// When it was first created, in ms since the Unix epoch.
    pub created_unix_ms: i64,
}

/// The journal's entry for one workload.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct WorkloadRecord {
    /// Who it is.
    pub identity: Identity,
    /// The highest epoch this host knows of: the one it owns it in, gave it
    /// away in, or saw it in last. 0 if it was never here.
    pub epoch: Epoch,
    /// Whose it is.
    pub ownership: Ownership,
    /// A copy that has arrived and waits.
    pub sealed: Option<Sealed>,
    /// An operator paused it; it stays so over a restart of the daemon.
    pub paused: bool,
    /// Who still has memory of it, and has to keep that. Only of one that is owned.
    #[serde(default)]
    pub filling: Option<Counterpart>,
    /// Why it has ended, in words. Only of one that is owned.
    #[serde(default)]
    pub ended: Option<String>,
}

/// Something that happens to a record.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// It was created here.
    Created,
    /// An operator paused or resumed it.
    Paused(bool),
    /// It has ended by itself or was stopped: why. It never runs again.
    Ended(String),
    /// The source gives it away. The one irrevocable step.
    Released(Counterpart),
    /// The peer says that it owns it.
    Confirmed(MigrationId),
    /// The peer has promised never to run that migration.
    TakenBack(MigrationId),
    /// A complete copy is here.
    Sealed(Sealed),
    /// The source has released it to this host.
    Activated(MigrationId),
    /// Nothing more comes from the source of that migration: all is here, or it has ended.
    Filled(MigrationId),
    /// This host will never run that migration.
    Discarded(MigrationId),
    /// Owned, but not one instruction of it ran here, nor ever will: its
    /// source, which still holds it, may take it back.
    NeverRan(Counterpart),
    /// An operator says that it runs here, whatever the peer does.
    ForcedHere,
    /// An operator says that what was released is not this host's any more. A
    /// sealed copy is given up by `Discarded`, which promises it to the source.
    GivenUp,
    /// An operator removed what he knew in this epoch.
    Removed(Epoch),
}

/// An event that a record does not allow: a mistake of a peer or of ours.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the journal does not allow {event} for {name}, which is {standing} in epoch {epoch}")]
pub struct NotAllowed {
    event: String,
    name: String,
    standing: &'static str,
    epoch: Epoch,
}

impl WorkloadRecord {
    /// A record of a workload that was never on this host.
    #[must_use]
    pub fn never(identity: Identity) -> Self {
        Self {
            identity,
            epoch: Epoch(0),
            ownership: Ownership::Never,
            sealed: None,
            paused: false,
            filling: None,
            ended: None,
        }
    }

    /// Whether this host may run it.
    #[must_use]
    pub fn owned(&self) -> bool {
        self.ownership == Ownership::Owned
    }

    /// One word for how it stands.
    #[must_use]
    pub fn standing(&self) -> &'static str {
        match (&self.ownership, &self.sealed) {
            (_, Some(_)) => "sealed",
            (Ownership::Never, None) => "unknown",
            (Ownership::Owned, None) => "owned",
            (Ownership::Released(_), None) => "released",
            (Ownership::Gone(_), None) => "gone",
            (Ownership::Removed(_), None) => "removed",
        }
    }

    fn released_in(&self, migration: MigrationId) -> Option<&Counterpart> {
        match &self.ownership {
            Ownership::Released(to) if to.migration == migration => Some(to),
            Ownership::Released(_)
            | Ownership::Never
            | Ownership::Owned
            | Ownership::Gone(_)
            | Ownership::Removed(_) => None,
        }
    }

    /// The record after `event`.
    ///
    /// # Errors
    /// [`NotAllowed`] when the event can't follow; nothing has changed then.
    pub fn after(&self, event: &Event) -> Result<Self, NotAllowed> {
        let refused = || NotAllowed {
            event: format!("{event:?}").chars().take(40).collect(),
            name: self.identity.name.clone(),
            standing: self.standing(),
            epoch: self.epoch,
        };
        let mut next = self.clone();
        match event {
            Event::Created => {
                if self.ownership != Ownership::Never || self.sealed.is_some() {
                    return Err(refused());
                }
                (next.epoch, next.ownership) = (Epoch::FIRST, Ownership::Owned);
            }
            Event::Paused(paused) => {
                if !self.owned() || self.ended.is_some() {
                    return Err(refused());
                }
                next.paused = *paused;
            }
            Event::Ended(why) => {
                if !self.owned() || self.ended.is_some() {
                    return Err(refused());
                }
                next.ended = Some(why.clone());
            }
            Event::Released(to) => {
                if !self.owned() || self.filling.is_some() || self.ended.is_some() {
                    return Err(refused());
                }
                (next.epoch, next.ownership) = (self.epoch.next(), Ownership::Released(to.clone()));
            }
            Event::Confirmed(migration) => {
                let to = self.released_in(*migration).ok_or_else(refused)?;
                next.ownership = Ownership::Gone(to.clone());
            }
            Event::TakenBack(migration) => {
                self.released_in(*migration).ok_or_else(refused)?;
                (next.epoch, next.ownership) = (self.epoch.next(), Ownership::Owned);
            }
            Event::Sealed(sealed) => {
                let elsewhere = matches!(
                    self.ownership,
                    Ownership::Never | Ownership::Gone(_) | Ownership::Removed(_)
                );
                if !elsewhere || self.sealed.is_some() || sealed.epoch <= self.epoch {
                    return Err(refused());
                }
                next.sealed = Some(sealed.clone());
            }
            Event::Activated(migration) => {
                let sealed = next.sealed.take().filter(|s| s.from.migration == *migration);
                let sealed = sealed.ok_or_else(refused)?;
                (next.epoch, next.ownership) = (sealed.epoch, Ownership::Owned);
                (next.paused, next.ended) = (sealed.paused, None);
                next.filling = sealed.follows.then_some(sealed.from);
            }
            Event::Filled(migration) => {
                let filling = next.filling.take().filter(|from| from.migration == *migration);
                filling.ok_or_else(refused)?;
            }
            Event::Discarded(migration) => {
                let sealed = next.sealed.take().filter(|s| s.from.migration == *migration);
                sealed.ok_or_else(refused)?;
            }
            Event::NeverRan(source) => {
                if !self.owned() || self.ended.is_some() {
                    return Err(refused());
                }
                next.ownership = Ownership::Gone(source.clone());
                next.filling = None;
            }
            Event::ForcedHere => next.force_here().ok_or_else(refused)?,
            Event::GivenUp => next.give_up().ok_or_else(refused)?,
            Event::Removed(epoch) => {
                // What has come back since is not what was to be removed.
                if self.sealed.is_some() || self.epoch != *epoch {
                    return Err(refused());
                }
                (next.filling, next.ended) = (None, None);
                next.ownership = match &self.ownership {
                    Ownership::Owned => Ownership::Removed(None),
                    Ownership::Gone(to) => Ownership::Removed(Some(to.clone())),
                    Ownership::Removed(_) => return Ok(next),
                    Ownership::Never | Ownership::Released(_) => return Err(refused()),
                };
            }
        }
        Ok(next)
    }

    /// Owns it two epochs on, so that a peer that did own the one between loses
    /// against it wherever the two are compared.
    fn force_here(&mut self) -> Option<()> {
        if let Some(sealed) = self.sealed.take() {
            self.epoch = sealed.epoch.next();
            self.paused = sealed.paused;
            self.filling = sealed.follows.then_some(sealed.from);
        } else if matches!(self.ownership, Ownership::Released(_)) {
            self.epoch = self.epoch.next();
        } else {
            return None;
        }
        (self.ownership, self.ended) = (Ownership::Owned, None);
        Some(())
    }

    fn give_up(&mut self) -> Option<()> {
        let Ownership::Released(to) = &self.ownership else { return None };
        self.ownership = Ownership::Gone(to.clone());
        Some(())
    }
}

#[cfg(test)]
mod tests;
