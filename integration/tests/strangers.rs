//! Peers that speak the protocol, but not ours.

use std::net::SocketAddr;

use anyhow::{Context, Result};
use integration::daemon::free_address;
use integration::host_pair::HostPair;
use integration::scenario::{Pulse, expect_alive};
use migr_proto::v1::peer_server::{Peer, PeerServer};
use migr_proto::v1::{
    AbandonReply, AbandonRequest, ActivateReply, ActivateRequest, IdentifyReply, IdentifyRequest,
    OfferReply, OfferRequest, PullReply, PullRequest, ResolveReply, ResolveRequest, SealReply,
    SealRequest,
};
use tonic::{Request, Response, Status};

/// A daemon of some other protocol version.
#[derive(Clone, Copy, Debug)]
struct Newer(u32);

fn never<T>() -> Result<Response<T>, Status> {
    Err(Status::internal("a peer of another version was asked for more than its name"))
}

#[tonic::async_trait]
impl Peer for Newer {
    async fn identify(
        &self,
        _: Request<IdentifyRequest>,
    ) -> Result<Response<IdentifyReply>, Status> {
        Ok(Response::new(IdentifyReply {
            protocol: self.0,
            host_id: "6f1a8f3e-7d54-4c55-a0f4-2f4f5f0d9a11".into(),
            version: "99.0.0".into(),
            memory_total_bytes: 1 << 40,
            memory_free_bytes: 1 << 40,
            kvm: true,
            ..IdentifyReply::default()
        }))
    }
    async fn offer(&self, _: Request<OfferRequest>) -> Result<Response<OfferReply>, Status> {
        never()
    }
    async fn seal(&self, _: Request<SealRequest>) -> Result<Response<SealReply>, Status> {
        never()
    }
    async fn activate(
        &self,
        _: Request<ActivateRequest>,
    ) -> Result<Response<ActivateReply>, Status> {
        never()
    }
    async fn abandon(&self, _: Request<AbandonRequest>) -> Result<Response<AbandonReply>, Status> {
        never()
    }
    async fn resolve(&self, _: Request<ResolveRequest>) -> Result<Response<ResolveReply>, Status> {
        never()
    }
    async fn pull(&self, _: Request<PullRequest>) -> Result<Response<PullReply>, Status> {
        never()
    }
}

/// Serves it until the process ends.
fn serve(peer: Newer) -> Result<SocketAddr> {
    let listener = std::net::TcpListener::bind(free_address()?)?;
    let address = listener.local_addr()?;
    listener.set_nonblocking(true)?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    std::thread::spawn(move || {
        runtime.block_on(async move {
            let listener = tokio::net::TcpListener::from_std(listener)?;
            let incoming = tokio_stream::wrappers::TcpListenerStream::new(listener);
            let server = tonic::transport::Server::builder().add_service(PeerServer::new(peer));
            server.serve_with_incoming(incoming).await.context("serve")
        })
    });
    Ok(address)
}

fn refused(protocol: u32) -> Result<()> {
    let pair = HostPair::start()?;
    let pulse = Pulse::small();
    pulse.run(&pair, &pair.a)?;
    let to = serve(Newer(protocol))?.to_string();
    let words = ["protocol", &protocol.to_string(), &to, "version"];
    pair.a.migctl(&["migrate", pulse.name, "--to", &to])?.expect(3, &words)?;
    expect_alive(&pair.a, pulse.name, 5)?;
    pair.finish(pulse.name)
}

#[test]
fn a_peer_of_a_newer_protocol_is_refused_and_asked_nothing_else() -> Result<()> {
    refused(4711)
}

#[test]
fn a_peer_of_an_older_protocol_is_refused_and_asked_nothing_else() -> Result<()> {
    refused(0)
}
