//! What a daemon does first: finds its workloads again.
//!
//! A workload whose record says that this host owns it is taken back, one that
//! was given away or waits for its source stands still until the peer has
//! spoken, and whatever no record speaks of is cleared away.

use std::collections::BTreeSet;
use std::sync::Arc;

use crate::migration::destination::{Arrivals, Remembered};
use crate::migration::journal::{
    Event, Identity, Journal, JournalError, Ownership, WorkloadRecord,
};
use crate::migration::recovery::{Duty, duty};
use crate::migration::source::released::Released;
use crate::registry::Registry;
use crate::wire::Peers;
use crate::workload::{Kind, Recovers, Workload};

struct Recovery<'a> {
    registry: &'a Registry,
    arrivals: &'a Arrivals,
    journal: &'a Journal,
    engines: &'a [(Kind, Arc<dyn Recovers>)],
    peers: &'a Peers,
}

pub(super) async fn recover(
    registry: &Registry,
    arrivals: &Arrivals,
    journal: &Journal,
    engines: &[(Kind, Arc<dyn Recovers>)],
    peers: &Peers,
) -> Result<(), JournalError> {
    let recovery = Recovery { registry, arrivals, journal, engines, peers };
    let records = journal.all()?;
    let here = |record: &&WorkloadRecord| duty(record) != Duty::Nothing;
    let known: BTreeSet<_> = records.iter().filter(here).map(|r| r.identity.id).collect();
    for (_, engine) in engines {
        engine.sweep(&known).await;
    }
    for record in records {
        let name = record.identity.name.clone();
        let standing = record.standing();
        tracing::info!(workload = name, standing, epoch = %record.epoch, "found in the journal");
        match duty(&record) {
            Duty::Run { paused, filling: _ } => recovery.run(record, paused).await,
            Duty::Settle(_) => recovery.settle(record).await,
            Duty::Await(_) => recovery.wait(record).await?,
            Duty::Nothing if matches!(record.ownership, Ownership::Gone(_)) => {
                registry.remember_gone(record);
            }
            Duty::Nothing => {}
        }
    }
    Ok(())
}

impl Recovery<'_> {
    /// What finds workloads of that kind again, if this daemon can.
    fn engine(&self, kind: Kind) -> Option<&dyn Recovers> {
        self.engines.iter().find(|(of, _)| *of == kind).map(|(_, engine)| engine.as_ref())
    }

    async fn run(&self, record: WorkloadRecord, paused: bool) {
        let identity = &record.identity;
        let Some(engine) = self.engine(identity.kind) else {
            tracing::error!(workload = identity.name, "this daemon has nothing that runs its kind");
            self.registry.take_in(record, None);
            return;
        };
        match engine.find(identity.id, &identity.name, &identity.config, paused).await {
            Ok(workload) => {
                self.arrivals.fill(&record, workload.lacks());
                self.registry.take_in(record, Some(workload));
            }
            Err(error) => {
                tracing::error!(workload = identity.name, %error, "it could not be taken back");
                self.registry.take_in(record, None);
            }
        }
    }

    async fn settle(&self, record: WorkloadRecord) {
        let Duty::Settle(to) = duty(&record) else { return };
        let identity = record.identity.clone();
        let workload = match self.engine(identity.kind) {
            Some(engine) => released_copy(engine, &identity, record.paused).await,
            None => None,
        };
        let released = Released::remembered(
            record.clone(),
            &to,
            self.peers.find(&to.address),
            self.journal.clone(),
            workload,
            self.registry.serving(),
        );
        self.registry.settle(record, released);
    }

    async fn wait(&self, record: WorkloadRecord) -> Result<(), JournalError> {
        let Duty::Await(sealed) = duty(&record) else { return Ok(()) };
        let Some(engine) = self.engine(record.identity.kind) else {
            // As below: another daemon may find it whole.
            tracing::error!(
                workload = record.identity.name,
                "a sealed copy is here and this daemon has nothing that runs its kind"
            );
            return Ok(());
        };
        let found = engine.find_sealed(record.identity.id, &record.identity.name).await;
        let found = match found {
            Ok(found) => found,
            Err(error) => {
                // It may be whole: nothing is promised and nothing is dropped.
                tracing::error!(workload = record.identity.name, %error,
                    "a sealed copy is here and can't be taken back; restart migrd to try again");
                return Ok(());
            }
        };
        if let Some(workload) = found {
            let claim = self.registry.claim_remembered(&record.identity, sealed.from.migration);
            self.arrivals.remember(Remembered { record, workload, claim });
            return Ok(());
        }
        // The copy is gone, so this host can't ever run it: the source may.
        tracing::warn!(workload = record.identity.name, "a sealed copy did not survive");
        let event = Event::Discarded(sealed.from.migration);
        let record = self.journal.record(&record.identity, &event)?;
        engine.clear(record.identity.id).await;
        if matches!(record.ownership, Ownership::Gone(_)) {
            self.registry.remember_gone(record);
        }
        Ok(())
    }
}

/// The stopped copy of a workload that was given away; where there is none,
/// what may be left of it is cleared away.
async fn released_copy(
    engine: &dyn Recovers,
    identity: &Identity,
    paused: bool,
) -> Option<Box<dyn Workload>> {
    let found = engine.find_released(identity.id, &identity.name, paused).await;
    let workload = found.unwrap_or_else(|error| {
        tracing::error!(workload = identity.name, %error, "its stopped copy is not usable");
        None
    });
    if workload.is_none() {
        engine.clear(identity.id).await;
    }
    workload
}
