//! Offered: the destination has checked the manifest, reserved memory and made
//! an empty workload; the lanes are open. Nothing of the workload was touched.

use std::time::Duration;

use super::precopy::Copied;
use super::{Aborted, Run, within};
use crate::migration::link::Offer;
use crate::migration::phase::{MigrationError, Mode, Phase};
use crate::workload::{Ahead, Manifest, Needs, WorkloadError, needed};

/// How long the peer has to prepare an empty workload, and to take the lanes.
const PREPARE_WAIT: Duration = Duration::from_secs(30);

/// The peer is ready to receive.
pub(super) struct Offered(Run);

impl Offered {
    pub(super) async fn make(mut run: Run) -> Result<Self, Aborted> {
        run.enter(Phase::Planning);
        let what = run.context().request.carry();
        let carried = run.workload.carry(what).await;
        let (run, ()) = run.or_abort(carried).await?;
        let mut interrupt = run.interrupt();
        let needs = interrupt.guard(needed(run.workload.needs())).await;
        let (mut run, needs) = run.or_abort(needs).await?;
        let wait = PREPARE_WAIT + needs.patience();
        let offer = offer(&run, needs);
        let (id, lanes) = (run.context().id, run.context().lanes);
        let peer = run.context().peer.clone();
        // From here on the peer may hold something, even if no answer comes.
        run.offered = true;
        let blockers = interrupt.guard(within(&peer, wait, peer.offer(&offer))).await;
        let (mut run, blockers) = run.or_abort(blockers).await?;
        if !blockers.is_empty() {
            run.offered = false;
            return Err(run.abort(MigrationError::Refused(blockers)).await);
        }
        run.enter(Phase::Offered);
        let (streams, chunks) = (run.workload.streams(), run.workload.chunks());
        let opening = within(&peer, PREPARE_WAIT, peer.lanes(id, &streams, chunks, lanes));
        let opened = interrupt.guard(opening).await;
        let (mut run, lanes) = run.or_abort(opened).await?;
        run.lanes = Some(lanes);
        Ok(Self(run))
    }

    /// Sends memory in rounds while the workload runs; in modes `stop` and `postcopy`
    /// only files that go ahead in any mode.
    pub(super) async fn precopy(self) -> Result<Copied, Aborted> {
        let run = self.0.send_files().await?;
        match (run.context().mode.mode, run.workload.ahead()) {
            (Mode::Stop | Mode::Postcopy, _) => Ok(Copied::nothing(run)),
            (Mode::Precopy, Ahead::Pages) => Copied::by_rounds(run).await,
            (Mode::Precopy, Ahead::Copies { .. }) => Copied::by_copies(run).await,
            (Mode::Precopy, Ahead::Not(why)) => {
                Err(run.abort(WorkloadError::new(why).into()).await)
            }
        }
    }
}

fn offer(run: &Run, needs: Needs) -> Offer {
    let context = run.context();
    let identity = &context.identity;
    Offer {
        migration: context.id,
        epoch: context.epoch.next(),
        manifest: Manifest {
            workload: identity.id,
            name: identity.name.clone(),
            kind: identity.kind,
            streams: run.workload.streams(),
            config: identity.config.clone(),
            memory_bytes: identity.memory_bytes,
            cpus: identity.cpus,
            paused: context.paused,
            created_unix_ms: identity.created_unix_ms,
            needs: needs.written,
            follows: context.mode.mode == Mode::Postcopy,
        },
        lanes: context.lanes,
        dry_run: false,
    }
}
