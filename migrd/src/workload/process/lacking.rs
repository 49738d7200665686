//! Memory that a tree of this host lacks: its keeper knows which.

use std::sync::Arc;

use async_trait::async_trait;
use migr_proto::v1 as proto;
use migr_proto::v1::keeper_request::Request;

use super::keeper::Keeper;
use super::told;
use crate::units::PAGE_SIZE;
use crate::workload::{Lacks, Piece, WorkloadError};

/// What the tree of a keeper lacks.
pub(super) struct Lacking(pub(super) Arc<Keeper>);

#[async_trait]
impl Lacks for Lacking {
    async fn next(&self, urgent: bool) -> Result<Option<Piece>, WorkloadError> {
        let piece = self.0.lacking(urgent).await.map_err(told("hear what memory it lacks"))?;
        let Some(proto::ProcessStay { process, address, length }) = piece else {
            return Ok(None);
        };
        let pages = u32::try_from(length / PAGE_SIZE).unwrap_or(u32::MAX);
        Piece::checked(process, address, pages).map(Some).map_err(WorkloadError::new)
    }

    async fn put(&self, piece: Piece, bytes: Vec<u8>) -> Result<(), WorkloadError> {
        if bytes.len() as u64 != piece.len_bytes() {
            return Err(WorkloadError::new("more or less memory has come than was asked for"));
        }
        let Piece { process, address, pages: _ } = piece;
        let arrived = proto::KeeperArrived { process, address, data: bytes.into() };
        self.0.done(Request::Arrived(arrived)).await.map_err(told("put memory in its place"))
    }

    async fn lost(&self, why: &str) -> Result<(), WorkloadError> {
        let lost = proto::KeeperLost { why: why.to_owned() };
        self.0.done(Request::Lost(lost)).await.map_err(told("end it"))
    }
}
