//! The way from one host to the other, and what goes wrong on it.

use super::host::{Everything, SINKS, TestHost};
use super::{World, lock};
use crate::migration::destination::Arrivals;
use crate::migration::journal::Counterpart;
use crate::migration::link::{
    Activated, Blocker, LaneTotals, LinkError, Offer, PageLanes, Peer, PeerFacts, Pull, Pulled,
    SealOrder, SealReport, Standing,
};
use crate::units::{Epoch, HostId, MigrationId, PageRun, WorkloadId};
use crate::workload::fake::STREAM;
use crate::workload::{ChunkSink, ChunkSource, StreamKey, StreamSpec};
use async_trait::async_trait;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Weak};

/// A call over the link.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Call {
    Identify,
    Offer,
    Lanes,
    Send,
    Flush,
    Seal,
    Activate,
    Abandon,
    Resolve,
    Pull,
}

/// What goes wrong at a call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// The request does not arrive.
    RequestLost,
    /// The request is carried out, the answer does not arrive.
    ReplyLost,
    /// The destination's daemon dies before the request.
    TakerDiesBefore,
    /// The destination's daemon dies after the request.
    TakerDiesAfter,
    /// The source's daemon dies before the request leaves.
    GiverDiesBefore,
    /// The source's daemon dies after the request was carried out.
    GiverDiesAfter,
    /// Both die after the request.
    BothDie,
    /// From this call on the network is cut.
    Cut,
    /// The user cancels at that moment.
    Cancel,
    /// The connection is well and no answer ever comes.
    Silence,
    /// From this call on nothing is answered, and no connection breaks.
    Deaf,
    /// It is said to have arrived and has not.
    Swallowed,
}

/// The way from one host to the other.
pub(super) struct Link {
    pub(super) world: Weak<World>,
    pub(super) from: Arc<TestHost>,
    pub(super) to: Arc<TestHost>,
}

impl Link {
    fn lost(&self, cause: &str) -> LinkError {
        LinkError::Lost { peer: self.to.address.clone(), cause: cause.into() }
    }

    /// Carries one call, with whatever is planned to go wrong.
    async fn carry<T>(
        &self,
        call: Call,
        work: impl Future<Output = Result<T, LinkError>>,
    ) -> Result<T, LinkError> {
        let Some(world) = self.world.upgrade() else { return Err(self.lost("the end")) };
        let fault = world.fault(call);
        // A daemon's death must not be waited for by what dies with it.
        let crash = |host: &Arc<TestHost>| host.die();
        match fault {
            Some(Fault::RequestLost) => return Err(self.lost("request lost")),
            Some(Fault::Cut) => *lock(&world.cut) = true,
            Some(Fault::TakerDiesBefore) => crash(&self.to),
            Some(Fault::GiverDiesBefore) => {
                crash(&self.from);
                tokio::task::yield_now().await;
                return Err(self.lost("died"));
            }
            Some(Fault::Cancel) => world.cancel.cancel(),
            Some(Fault::Silence) => return std::future::pending().await,
            Some(Fault::Deaf) => *lock(&world.deaf) = true,
            Some(
                Fault::ReplyLost
                | Fault::TakerDiesAfter
                | Fault::GiverDiesAfter
                | Fault::BothDie
                | Fault::Swallowed,
            )
            | None => {}
        }
        if *lock(&world.cut) {
            return Err(self.lost("the network is cut"));
        }
        let deaf = *lock(&world.deaf);
        if deaf {
            return std::future::pending().await;
        }
        if self.to.arrivals().is_none() {
            return Err(self.lost("nobody listens"));
        }
        let done = work.await;
        match fault {
            Some(Fault::ReplyLost) => Err(self.lost("reply lost")),
            Some(Fault::TakerDiesAfter) => {
                crash(&self.to);
                Err(self.lost("died"))
            }
            Some(Fault::GiverDiesAfter) => {
                crash(&self.from);
                tokio::task::yield_now().await;
                done
            }
            Some(Fault::BothDie) => {
                crash(&self.to);
                crash(&self.from);
                tokio::task::yield_now().await;
                Err(self.lost("died"))
            }
            _ => done,
        }
    }

    fn taker(&self) -> Result<Arrivals, LinkError> {
        self.to.arrivals().ok_or_else(|| self.lost("nobody listens"))
    }

    /// Another daemon than the one that is meant refuses.
    fn is(&self, host: HostId) -> Result<(), LinkError> {
        if self.to.id == host { Ok(()) } else { Err(self.rejected("another host")) }
    }

    fn rejected(&self, error: impl ToString) -> LinkError {
        LinkError::Rejected { peer: self.to.address.clone(), message: error.to_string() }
    }
}

struct Lanes {
    link: Link,
    sink: Arc<dyn ChunkSink>,
    intake: Arc<Everything>,
    chunks: Arc<dyn ChunkSource>,
    totals: LaneTotals,
}

#[async_trait]
impl PageLanes for Lanes {
    async fn send(&mut self, key: StreamKey, run: PageRun) -> Result<(), LinkError> {
        let (sink, chunks) = (self.sink.clone(), self.chunks.clone());
        let swallowed = self.link.world.upgrade().is_some_and(|w| w.next_is_swallowed(Call::Send));
        let intake = self.intake.clone();
        let put = async move {
            assert_eq!(key, STREAM);
            if swallowed {
                return Ok(());
            }
            intake.arrived.fetch_add(1, Ordering::SeqCst);
            let mut bytes = vec![0; usize::try_from(run.len_bytes()).expect("small")];
            chunks.read(key, run.offset(), &mut bytes).expect("within the stream");
            sink.write(key, run.offset(), &bytes).expect("within the stream");
            Ok(())
        };
        self.link.carry(Call::Send, put).await?;
        self.totals.batches[0] += 1;
        self.totals.data_pages += run.count;
        self.totals.bytes_on_wire += run.len_bytes();
        Ok(())
    }

    async fn flush(&mut self) -> Result<LaneTotals, LinkError> {
        self.link.carry(Call::Flush, async { Ok(()) }).await?;
        Ok(self.totals.clone())
    }
}

#[async_trait]
impl Peer for Link {
    fn address(&self) -> &str {
        &self.to.address
    }

    async fn identify(&self) -> Result<PeerFacts, LinkError> {
        let (version, memory_free_bytes) = ("test".into(), 1 << 40);
        let facts = PeerFacts { host: self.to.id, version, memory_free_bytes };
        self.carry(Call::Identify, async { Ok(facts) }).await
    }

    async fn offer(&self, offer: &Offer) -> Result<Vec<Blocker>, LinkError> {
        let from = Counterpart {
            migration: offer.migration,
            address: self.from.address.clone(),
            host: self.from.id,
        };
        self.carry(Call::Offer, async { Ok(self.taker()?.offer(offer.clone(), from).await) }).await
    }

    async fn lanes(
        &self,
        migration: MigrationId,
        _: &[StreamSpec],
        chunks: Arc<dyn ChunkSource>,
        lanes: u32,
    ) -> Result<Box<dyn PageLanes>, LinkError> {
        self.carry(Call::Lanes, async { Ok(()) }).await?;
        let sink = lock(&SINKS).as_ref().and_then(|s| s.get(&migration).cloned());
        let (sink, intake) = sink.ok_or_else(|| self.rejected("unknown migration"))?;
        let link = Self { world: self.world.clone(), from: self.from.clone(), to: self.to.clone() };
        let batches = vec![0; usize::try_from(lanes).expect("few")];
        let totals = LaneTotals { batches, ..LaneTotals::default() };
        Ok(Box::new(Lanes { link, sink, intake, chunks, totals }))
    }

    async fn seal(&self, order: &SealOrder) -> Result<SealReport, LinkError> {
        let work = async { self.taker()?.seal(order.clone()).await.map_err(|e| self.rejected(e)) };
        self.carry(Call::Seal, work).await
    }

    async fn activate(
        &self,
        host: HostId,
        migration: MigrationId,
        epoch: Epoch,
    ) -> Result<Activated, LinkError> {
        self.is(host)?;
        let work =
            async { self.taker()?.activate(migration, epoch).await.map_err(|e| self.rejected(e)) };
        self.carry(Call::Activate, work).await
    }

    async fn abandon(&self, migration: MigrationId, reason: &str) -> Result<(), LinkError> {
        let work = async {
            let told = self.taker()?.abandon(migration, reason.into()).await;
            told.map_err(|e| self.rejected(e))
        };
        self.carry(Call::Abandon, work).await
    }

    async fn resolve(
        &self,
        host: HostId,
        migration: MigrationId,
        workload: WorkloadId,
        epoch: Epoch,
        from_source: bool,
    ) -> Result<Standing, LinkError> {
        let work = async {
            self.is(host)?;
            if from_source {
                let asked = self.taker()?.resolve(migration, workload, epoch).await;
                asked.map_err(|e| self.rejected(e))
            } else {
                Ok(self.to.standing(migration, workload, epoch))
            }
        };
        self.carry(Call::Resolve, work).await
    }

    async fn pull(&self, pull: &Pull) -> Result<Pulled, LinkError> {
        let work = async {
            self.is(pull.host)?;
            Ok(self.to.pulled(pull, self.from.id).await)
        };
        self.carry(Call::Pull, work).await
    }
}
