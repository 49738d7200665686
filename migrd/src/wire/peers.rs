//! Other daemons: connections to them, kept and shared, and the calls a
//! migration makes.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use migr_proto::v1 as proto;
use migr_proto::v1::peer_client::PeerClient;
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Status};

use super::kept::Kept;
use super::send::SendLanes;
use super::{PROTOCOL, client_settings, deepest, manifest_to_wire};
use crate::migration::link::{
    Activated, Blocker, LinkError, Offer, PageLanes, Peer, PeerFacts, Pull, Pulled, SealOrder,
    SealReport, Standing,
};
use crate::units::{Epoch, HostId, MigrationId, WorkloadId};
use crate::workload::{ChunkSource, StreamSpec};

/// The largest message a peer may answer with, in bytes: the longest piece of memory.
const MAX_ANSWER: usize = 2 << 20;

/// The daemons this one talks to. Cheap to clone.
#[derive(Clone)]
pub struct Peers {
    here: Arc<str>,
    host: HostId,
    known: Arc<Mutex<HashMap<String, Kept>>>,
}

/// An address that can't be one, in words.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct BadAddress(String);

impl Peers {
    /// `here` is this daemon's address, as its peers reach it.
    #[must_use]
    pub fn new(here: &str, host: HostId) -> Self {
        Self { here: here.into(), host, known: Arc::default() }
    }

    /// The daemon at `address`. Nothing is asked of it yet.
    ///
    /// # Errors
    /// When that is not of the form `ADDR:PORT`.
    pub fn get(&self, address: &str) -> Result<Arc<dyn Peer>, BadAddress> {
        Ok(Arc::new(Remote {
            address: address.to_owned(),
            here: self.here.clone(),
            host: self.host,
            kept: self.kept(address)?,
        }))
    }

    /// The daemon at an address that a daemon has written down before. If it
    /// can't be one after all, every call fails.
    #[must_use]
    pub fn find(&self, address: &str) -> Arc<dyn Peer> {
        self.get(address).unwrap_or_else(|error| {
            Arc::new(Nowhere { address: address.to_owned(), cause: error.to_string() })
        })
    }

    fn kept(&self, address: &str) -> Result<Kept, BadAddress> {
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(found) = known.get(address) {
            return Ok(found.clone());
        }
        check(address)?;
        let endpoint = Endpoint::from_shared(format!("http://{address}"))
            .map_err(|e| BadAddress(e.to_string()))?;
        let made = Kept::new(client_settings(endpoint));
        known.insert(address.to_owned(), made.clone());
        Ok(made)
    }

    /// Everything the daemon at `address` says of itself.
    ///
    /// # Errors
    /// When nobody answers there, or somebody else.
    pub async fn identify_whole(
        &self,
        address: &str,
        host: HostId,
    ) -> Result<proto::IdentifyReply, LinkError> {
        let stranger =
            |e: BadAddress| LinkError::Stranger { peer: address.into(), cause: e.to_string() };
        identify(&self.kept(address).map_err(stranger)?, address, host).await
    }
}

/// A host and a port, and nothing else.
fn check(address: &str) -> Result<(), BadAddress> {
    let (host, port) =
        address.rsplit_once(':').ok_or_else(|| BadAddress("it has no port".into()))?;
    let plain = |c: char| c.is_ascii_alphanumeric() || ".-_[]:".contains(c);
    if host.is_empty() || !host.chars().all(plain) {
        return Err(BadAddress("it has no host name or address".into()));
    }
    match port.parse::<u16>() {
        Ok(1..) => Ok(()),
        Ok(0) | Err(_) => Err(BadAddress("its port is not a number from 1 to 65535".into())),
    }
}

struct Remote {
    address: String,
    here: Arc<str>,
    host: HostId,
    kept: Kept,
}

/// Whether the transport made the status up, or the peer said it.
fn link_error(peer: &str, status: &Status) -> LinkError {
    let peer = peer.to_owned();
    let transport = std::error::Error::source(status).is_some();
    let made_up = matches!(
        status.code(),
        Code::Unavailable | Code::Cancelled | Code::Unknown | Code::Internal
    );
    if transport && made_up {
        return LinkError::Lost { peer, cause: deepest(status) };
    }
    if status.code() == Code::Unimplemented || status.code() == Code::Unknown {
        return LinkError::Stranger { peer, cause: status.message().to_owned() };
    }
    LinkError::Rejected { peer, message: status.message().to_owned() }
}

async fn identify(
    kept: &Kept,
    address: &str,
    host: HostId,
) -> Result<proto::IdentifyReply, LinkError> {
    let request = proto::IdentifyRequest { protocol: PROTOCOL, host_id: host.to_string() };
    let reply = kept.call(async |channel| client(channel).identify(request).await);
    let reply = reply.await.map_err(|e| link_error(address, &e))?.into_inner();
    if reply.protocol != PROTOCOL {
        return Err(LinkError::Stranger {
            peer: address.to_owned(),
            cause: format!(
                "it speaks protocol {}, this migrd speaks protocol {PROTOCOL}",
                reply.protocol
            ),
        });
    }
    Ok(reply)
}

fn client(channel: Channel) -> PeerClient<Channel> {
    PeerClient::new(channel).max_decoding_message_size(MAX_ANSWER)
}

impl Remote {
    fn odd(&self, cause: &str) -> LinkError {
        LinkError::Stranger { peer: self.address.clone(), cause: cause.to_owned() }
    }
}

/// A time that a peer claims to have taken; nonsense counts as none.
fn claimed(ms: f64) -> Duration {
    Duration::try_from_secs_f64(ms / 1e3).unwrap_or_default()
}

#[async_trait]
impl Peer for Remote {
    fn address(&self) -> &str {
        &self.address
    }

    async fn identify(&self) -> Result<PeerFacts, LinkError> {
        let reply = identify(&self.kept, &self.address, self.host).await?;
        let host = reply.host_id.parse().map_err(|_| self.odd("its host id is not a UUID"))?;
        Ok(PeerFacts { host, version: reply.version, memory_free_bytes: reply.memory_free_bytes })
    }

    async fn offer(&self, offer: &Offer) -> Result<Vec<Blocker>, LinkError> {
        let request = proto::OfferRequest {
            protocol: PROTOCOL,
            migration_id: offer.migration.to_string(),
            epoch: offer.epoch.0,
            source_address: self.here.to_string(),
            source_host_id: self.host.to_string(),
            manifest: Some(manifest_to_wire(&offer.manifest)),
            lanes: offer.lanes,
            dry_run: offer.dry_run,
        };
        let reply = self.kept.call(async |channel| client(channel).offer(request).await).await;
        let reply = reply.map_err(|e| link_error(&self.address, &e))?;
        let blocker = |p: proto::OfferProblem| Blocker {
            code: p.code,
            message: p.message,
            remedy: p.remedy,
            host: self.address.clone(),
        };
        Ok(reply.into_inner().problems.into_iter().map(blocker).collect())
    }

    async fn lanes(
        &self,
        migration: MigrationId,
        _streams: &[StreamSpec],
        chunks: Arc<dyn ChunkSource>,
        lanes: u32,
    ) -> Result<Box<dyn PageLanes>, LinkError> {
        let lanes = usize::try_from(lanes).unwrap_or(1);
        let open = SendLanes::connect(self.kept.endpoint(), migration, lanes, chunks).await?;
        Ok(Box::new(open))
    }

    async fn seal(&self, order: &SealOrder) -> Result<SealReport, LinkError> {
        let hash = |h: &crate::workload::StreamHash| proto::StreamHash {
            key: h.key.0,
            blake3: h.hash.to_vec().into(),
        };
        let request = proto::SealRequest {
            migration_id: order.migration.to_string(),
            lane_batches: order.batches.clone(),
            state_crc32: crc32fast::hash(&order.state),
            state: order.state.clone().into(),
            hashes: order.hashes.iter().map(hash).collect(),
        };
        let reply = self.kept.call(async |channel| client(channel).seal(request).await).await;
        let reply = reply.map_err(|e| link_error(&self.address, &e))?.into_inner();
        Ok(SealReport {
            restore: claimed(reply.restore_ms),
            verify: claimed(reply.verify_ms),
            verified: reply.verified,
        })
    }

    async fn activate(
        &self,
        host: HostId,
        migration: MigrationId,
        epoch: Epoch,
    ) -> Result<Activated, LinkError> {
        let request = proto::ActivateRequest {
            migration_id: migration.to_string(),
            epoch: epoch.0,
            host_id: host.to_string(),
        };
        let reply = self.kept.call(async |channel| client(channel).activate(request).await).await;
        let reply = reply.map_err(|e| link_error(&self.address, &e))?.into_inner();
        Ok(Activated { took: claimed(reply.resume_ms), filling: reply.filling })
    }

    async fn abandon(&self, migration: MigrationId, reason: &str) -> Result<(), LinkError> {
        let (migration_id, reason) = (migration.to_string(), reason.to_owned());
        let request = proto::AbandonRequest { migration_id, reason };
        let reply = self.kept.call(async |channel| client(channel).abandon(request).await).await;
        reply.map(drop).map_err(|e| link_error(&self.address, &e))
    }

    async fn resolve(
        &self,
        host: HostId,
        migration: MigrationId,
        workload: WorkloadId,
        epoch: Epoch,
        from_source: bool,
    ) -> Result<Standing, LinkError> {
        let request = proto::ResolveRequest {
            migration_id: migration.to_string(),
            workload_id: workload.to_string(),
            epoch: epoch.0,
            from_source,
            host_id: host.to_string(),
        };
        let reply = self.kept.call(async |channel| client(channel).resolve(request).await).await;
        let reply = reply.map_err(|e| link_error(&self.address, &e))?.into_inner();
        match reply.standing() {
            proto::Standing::Unspecified => Err(self.odd("it did not say how that stands")),
            proto::Standing::Pending => Ok(Standing::Pending),
            proto::Standing::Released => Ok(Standing::Released),
            proto::Standing::Aborted => Ok(Standing::Aborted),
            proto::Standing::Sealed => Ok(Standing::Sealed),
            proto::Standing::Owned => Ok(Standing::Owned),
            proto::Standing::Discarded => Ok(Standing::Discarded),
            proto::Standing::Filling => Ok(Standing::Filling),
        }
    }

    async fn pull(&self, pull: &Pull) -> Result<Pulled, LinkError> {
        let Pull { host, migration, workload, epoch, piece } = *pull;
        let request = proto::PullRequest {
            migration_id: migration.to_string(),
            workload_id: workload.to_string(),
            epoch: epoch.0,
            host_id: host.to_string(),
            asker_id: self.host.to_string(),
            process: piece.process,
            address: piece.address,
            pages: piece.pages,
        };
        let reply = self.kept.call(async |channel| client(channel).pull(request).await).await;
        let reply = reply.map_err(|e| link_error(&self.address, &e))?.into_inner();
        let broken = |message: &str| {
            let peer = self.address.clone();
            LinkError::Misbehaved { peer, message: message.to_owned() }
        };
        match reply.reply.ok_or_else(|| broken("an answer to Pull says nothing"))? {
            proto::pull_reply::Reply::Lost(why) => Ok(Pulled::Lost(why)),
            proto::pull_reply::Reply::Later(why) => Ok(Pulled::Later(why)),
            proto::pull_reply::Reply::Pages(proto::PulledPages { crc32, data }) => {
                if crc32fast::hash(&data) != crc32 {
                    return Err(broken("memory was damaged on its way: its CRC-32 differs"));
                }
                let length = usize::try_from(piece.len_bytes()).unwrap_or(0);
                let bytes = if data.is_empty() { vec![0; length] } else { data.to_vec() };
                Ok(Pulled::Bytes(bytes))
            }
        }
    }
}

/// A daemon at an address that can't be one.
struct Nowhere {
    address: String,
    cause: String,
}

impl Nowhere {
    fn lost<T>(&self) -> Result<T, LinkError> {
        Err(LinkError::Lost { peer: self.address.clone(), cause: self.cause.clone() })
    }
}

#[async_trait]
impl Peer for Nowhere {
    fn address(&self) -> &str {
        &self.address
    }

    async fn identify(&self) -> Result<PeerFacts, LinkError> {
        self.lost()
    }

    async fn offer(&self, _: &Offer) -> Result<Vec<Blocker>, LinkError> {
        self.lost()
    }

    async fn lanes(
        &self,
        _: MigrationId,
        _: &[StreamSpec],
        _: Arc<dyn ChunkSource>,
        _: u32,
    ) -> Result<Box<dyn PageLanes>, LinkError> {
        self.lost()
    }

    async fn seal(&self, _: &SealOrder) -> Result<SealReport, LinkError> {
        self.lost()
    }

    async fn activate(&self, _: HostId, _: MigrationId, _: Epoch) -> Result<Activated, LinkError> {
        self.lost()
    }

    async fn abandon(&self, _: MigrationId, _: &str) -> Result<(), LinkError> {
        self.lost()
    }

    async fn resolve(
        &self,
        _: HostId,
        _: MigrationId,
        _: WorkloadId,
        _: Epoch,
        _: bool,
    ) -> Result<Standing, LinkError> {
        self.lost()
    }

    async fn pull(&self, _: &Pull) -> Result<Pulled, LinkError> {
        self.lost()
    }
}

#[cfg(test)]
mod tests {
    use super::check;

    #[test]
    fn an_address_is_a_host_and_a_port() {
        for good in ["127.0.0.1:7070", "host-b.example:1", "[::1]:65535"] {
            assert!(check(good).is_ok(), "{good}");
        }
        for bad in ["", "host", ":7070", "host:", "host:0", "host:65536", "a b:1", "u@h:1", "h/x:1"]
        {
            assert!(check(bad).is_err(), "{bad}");
        }
    }
}
