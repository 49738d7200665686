//! What an operator asks of one workload: each goes through its owner.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;

use super::owner::Command;
use super::{FrozenWork, Looked, Registry, RegistryError, Saving, State, Status, Watching};
use crate::migration::link::Peer;
use crate::migration::phase::Report;
use crate::migration::plan::{Plan, Question};
use crate::migration::source::Request;
use crate::units::MigrationId;
use crate::workload::{Carry, Footprint, Terminal};

impl Registry {
    /// Its output, input and figures, while it is here.
    ///
    /// # Errors
    /// When there is no such workload.
    pub fn terminal(&self, name: &str) -> Result<Option<Arc<dyn Terminal>>, RegistryError> {
        Ok(self.owner(name)?.terminal())
    }

    /// Tells every change of how it stands.
    ///
    /// # Errors
    /// When there is no such workload.
    pub fn follow(&self, name: &str) -> Result<watch::Receiver<Status>, RegistryError> {
        Ok(self.owner(name)?.follow())
    }

    /// What it costs now; nothing for a workload that is not here.
    ///
    /// # Errors
    /// When there is no such workload, or it does not answer.
    pub async fn footprint(&self, name: &str) -> Result<Footprint, RegistryError> {
        match self.terminal(name)? {
            Some(terminal) => Ok(terminal.footprint().await?),
            None => Ok(Footprint::default()),
        }
    }

    /// The report of its last migration from this host, since the daemon started.
    ///
    /// # Errors
    /// When there is no such workload.
    pub fn last_report(&self, name: &str) -> Result<Option<Arc<Report>>, RegistryError> {
        Ok(self.owner(name)?.last_report())
    }

    /// Pauses it.
    ///
    /// # Errors
    /// When it does not run, or is being migrated.
    pub async fn pause(&self, name: &str) -> Result<Status, RegistryError> {
        self.ask(name, |reply| Command::Pause(true, reply)).await
    }

    /// Resumes it.
    ///
    /// # Errors
    /// When it is not paused, or is being migrated.
    pub async fn resume(&self, name: &str) -> Result<Status, RegistryError> {
        self.ask(name, |reply| Command::Pause(false, reply)).await
    }

    /// Ends it at once, or its start.
    ///
    /// # Errors
    /// When it has ended, or is being migrated.
    pub async fn stop(&self, name: &str) -> Result<Status, RegistryError> {
        if let Some(called_off) = self.call_off(name).await {
            return Ok(called_off);
        }
        self.ask(name, Command::Stop).await
    }

    /// Asks it to end, and waits for that as long as `patience`. Its owner goes
    /// on serving others meanwhile, so it may even be migrated. One that does not run yet
    /// is not started.
    ///
    /// # Errors
    /// When it has ended already, is being migrated, does not listen, has not
    /// ended in time, or has left this host.
    pub async fn ask_to_end(
        &self,
        name: &str,
        patience: Duration,
    ) -> Result<Status, RegistryError> {
        if let Some(called_off) = self.call_off(name).await {
            return Ok(called_off);
        }
        let owner = self.owner(name)?;
        let mut follow = owner.follow();
        owner.ask(Command::AskToEnd).await?;
        let over = |status: &Status| matches!(status.state, State::Stopped | State::Gone);
        let waited = tokio::time::timeout(patience, follow.wait_for(over)).await;
        let status = match waited {
            Ok(Ok(status)) => status.clone(),
            Ok(Err(_)) => return Err(RegistryError::ShuttingDown),
            Err(_) => {
                let seconds = patience.as_secs_f64();
                return Err(RegistryError::StillRuns { name: name.to_owned(), seconds });
            }
        };
        match status.state {
            State::Gone => Err(RegistryError::Left { name: name.to_owned(), to: status.peer }),
            _ => Ok(status),
        }
    }

    /// Forgets it and drops everything this host holds of it.
    ///
    /// # Errors
    /// When it has not ended, is in doubt, or is being migrated.
    pub async fn remove(&self, name: &str) -> Result<(), RegistryError> {
        let id = self.find(name)?.identity.id;
        let owner = self.owner(name)?;
        owner.ask(Command::Remove).await?;
        // It may have come back in this very moment, to a new owner.
        let mut table = self.shared.table();
        if table.owners.get(&id).is_some_and(|now| now.is(&owner)) {
            table.owners.remove(&id);
        }
        Ok(())
    }

    /// Lends it, frozen, to `work`, and sets it running again, or ends it.
    ///
    /// # Errors
    /// When it is not here, or `work` fails.
    pub async fn checkpoint(
        &self,
        name: &str,
        how: Saving,
        work: FrozenWork,
    ) -> Result<Duration, RegistryError> {
        self.ask(name, |reply| Command::Frozen(how, work, reply)).await
    }

    /// What keeps `what` of it from being saved as it is now, and how it is saved.
    ///
    /// # Errors
    /// When it is not here, or can't be looked at.
    pub async fn look(&self, name: &str, what: Carry) -> Result<Looked, RegistryError> {
        self.ask(name, |reply| Command::Look(what, reply)).await
    }

    /// Starts moving it.
    ///
    /// # Errors
    /// When it is not here or is being migrated already.
    pub async fn migrate(
        &self,
        name: &str,
        peer: Arc<dyn Peer>,
        request: Request,
    ) -> Result<Watching, RegistryError> {
        self.ask(name, |reply| Command::Migrate(peer, request, reply)).await
    }

    /// What moving it would do, and what would stop it.
    ///
    /// # Errors
    /// When it is not here.
    pub async fn plan(
        &self,
        name: &str,
        peer: Arc<dyn Peer>,
        request: Request,
    ) -> Result<Plan, RegistryError> {
        let question: Question =
            self.ask(name, |reply| Command::Question(peer, request, reply)).await?;
        Ok(crate::migration::plan::plan(&question).await)
    }

    /// The migration that is under way.
    ///
    /// # Errors
    /// When none is.
    pub fn watching(&self, name: &str) -> Result<Watching, RegistryError> {
        let watching = self.owner(name)?.watching();
        watching.ok_or_else(|| RegistryError::NotMigrating(name.to_owned()))
    }

    /// Cancels the migration that is under way.
    ///
    /// # Errors
    /// When none is, or it can't be cancelled any more.
    pub async fn cancel(&self, name: &str) -> Result<MigrationId, RegistryError> {
        self.ask(name, Command::Cancel).await
    }

    /// Settles a workload that was given away, on an operator's word.
    ///
    /// # Errors
    /// When it is not in doubt.
    pub async fn force(&self, name: &str, run_here: bool) -> Result<Status, RegistryError> {
        self.ask(name, |reply| Command::Force(run_here, reply)).await
    }
}
