//! Where lanes come in: finds the migration a lane belongs to, and runs it.
//!
//! Reads the frames of the request's body as they come, without the copy into
//! a message of its own that a generated service makes.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::convert::Infallible;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};

use bytes::{BufMut, Bytes, BytesMut};
use futures::future::BoxFuture;
use http_body::Frame;
use http_body_util::{BodyExt, StreamBody};
use migr_proto::v1::BatchAck;
use prost::Message;
use tokio::sync::mpsc;
use tokio_stream::StreamExt;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Status;
use tonic::body::Body;
use tonic::server::NamedService;

use super::codec::Decoder;
use super::receive::{LaneApply, ReceiveError, Receiver, status};
use super::{LANE_KEY, MIGRATION_KEY, SERVICE, TRANSFER};
use crate::units::MigrationId;

/// The migrations that receive at the moment.
#[derive(Clone, Default)]
pub struct LaneDirectory(Arc<Mutex<HashMap<MigrationId, Arc<Receiver>>>>);

impl LaneDirectory {
    fn lock(&self) -> std::sync::MutexGuard<'_, HashMap<MigrationId, Arc<Receiver>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Lets the lanes of `migration` in. Says no if it is there already.
    #[must_use]
    pub fn insert(&self, migration: MigrationId, receiver: Arc<Receiver>) -> bool {
        match self.lock().entry(migration) {
            Entry::Occupied(_) => false,
            Entry::Vacant(free) => {
                free.insert(receiver);
                true
            }
        }
    }

    /// Lets no more lanes of `migration` in; those that are open go on until
    /// [`Receiver::close`].
    pub fn remove(&self, migration: MigrationId) -> Option<Arc<Receiver>> {
        self.lock().remove(&migration)
    }

    fn find(&self, headers: &http::HeaderMap) -> Result<(Arc<Receiver>, usize), Status> {
        let text = |key: &str| headers.get(key).and_then(|value| value.to_str().ok());
        let id = text(MIGRATION_KEY).and_then(|id| id.parse::<MigrationId>().ok());
        let id = id.ok_or_else(|| {
            Status::invalid_argument(format!("metadata {MIGRATION_KEY} must be a UUID"))
        })?;
        let lane = text(LANE_KEY).and_then(|lane| lane.parse::<usize>().ok());
        let lane = lane.ok_or_else(|| {
            Status::invalid_argument(format!("metadata {LANE_KEY} must be a number"))
        })?;
        let receiver = self.lock().get(&id).cloned();
        let receiver = receiver
            .ok_or_else(|| Status::not_found(format!("no migration {id} receives here")))?;
        receiver.take_lane(lane)?;
        Ok((receiver, lane))
    }
}

/// The gRPC service; add it to a tonic server or to its routes.
#[derive(Clone)]
pub struct LaneService {
    directory: LaneDirectory,
}

impl LaneService {
    /// Serves the migrations of `directory`.
    #[must_use]
    pub fn new(directory: LaneDirectory) -> Self {
        Self { directory }
    }

    fn serve(&self, request: http::Request<Body>) -> Result<http::Response<Body>, Status> {
        if request.uri().path() != TRANSFER {
            return Err(Status::unimplemented(format!("{SERVICE} has no such method")));
        }
        let (receiver, lane) = self.directory.find(request.headers())?;
        let (answers, body) = mpsc::channel(16);
        tokio::spawn(async move {
            let ended = receive(&receiver, lane, request.into_body(), &answers).await;
            let status = match ended {
                Ok(()) => Status::ok(""),
                Err(error) => status(&receiver.fail(error)),
            };
            let mut trailers = http::HeaderMap::new();
            if status.add_header(&mut trailers).is_ok() {
                // The one it is for may be gone.
                let _ = answers.send(Frame::trailers(trailers)).await;
            }
        });
        let frames = ReceiverStream::new(body).map(Ok::<_, Infallible>);
        let response = http::Response::builder()
            .header(http::header::CONTENT_TYPE, "application/grpc")
            .body(Body::new(StreamBody::new(frames)))
            .expect("constant headers");
        Ok(response)
    }
}

impl NamedService for LaneService {
    const NAME: &'static str = SERVICE;
}

impl tower::Service<http::Request<Body>> for LaneService {
    type Response = http::Response<Body>;
    type Error = Infallible;
    type Future = BoxFuture<'static, Result<Self::Response, Infallible>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: http::Request<Body>) -> Self::Future {
        let response = self.serve(request).unwrap_or_else(Status::into_http);
        Box::pin(std::future::ready(Ok(response)))
    }
}

fn ack(applied: u64) -> Bytes {
    let message = BatchAck { applied };
    let mut frame = BytesMut::with_capacity(16);
    frame.put_u8(0);
    frame.put_u32(u32::try_from(message.encoded_len()).expect("a few bytes"));
    message.encode(&mut frame).expect("a growing buffer");
    frame.freeze()
}

/// Receives one lane to its end.
async fn receive(
    receiver: &Receiver,
    lane: usize,
    mut body: Body,
    acks: &mpsc::Sender<Frame<Bytes>>,
) -> Result<(), ReceiveError> {
    let mut apply = LaneApply::new(receiver, lane);
    let mut decoder = Decoder::default();
    loop {
        let frame = tokio::select! {
            biased;
            error = receiver.failed() => return Err(error),
            frame = body.frame() => frame,
        };
        let lost = |message: String| ReceiveError::Lost { lane, message };
        let Some(frame) = frame else { break };
        let frame = frame.map_err(|e| lost(e.to_string()))?;
        let Ok(bytes) = frame.into_data() else { continue };
        receiver.touch();
        let had = apply.applied();
        decoder.feed(&bytes, &mut apply).map_err(|error| apply.error(error))?;
        if apply.applied() > had {
            let told = acks.send(Frame::data(ack(apply.applied()))).await;
            told.map_err(|_| lost("nobody reads acknowledgements".into()))?;
        }
    }
    decoder.finish().map_err(|error| ReceiveError::Batch { lane, error })
}
