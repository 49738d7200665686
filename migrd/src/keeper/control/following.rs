//! Memory of the tree that its daemon has yet to bring.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use migr_proto::v1::{self as proto, keeper_reply};

use super::Control;
use super::phase::{Phase, Told};
use crate::child::words;
use crate::keeper::following::Following;
use crate::units::PAGE_SIZE;

/// What the tree lacks, and who waits to hear of it.
#[derive(Debug, Default)]
pub(super) struct Lacking {
    following: Option<Arc<Following>>,
    /// Requests that have no answer yet, and whether each is for what is urgent.
    waits: Vec<(u64, bool)>,
    loss: proto::KeeperLoss,
}

impl Lacking {
    pub(super) fn lacks(&self) -> bool {
        self.following.is_some()
    }

    pub(super) fn loss(&self) -> proto::KeeperLoss {
        self.loss
    }

    /// What brings its memory has failed.
    pub(super) fn pager_failed(&mut self) {
        if self.loss == proto::KeeperLoss::Unspecified {
            self.loss = proto::KeeperLoss::Pager;
        }
    }

    /// Another daemon has come: the one before waits for nothing any more.
    pub(super) fn forget_daemon(&mut self) {
        self.waits.clear();
        if let Some(following) = &self.following {
            following.forget_asked();
        }
    }
}

impl Control {
    /// What is to follow of images, if anything `stays` at their source.
    pub(super) fn follow_memory(
        &mut self,
        images: &OwnedFd,
        stays: &[proto::ProcessStay],
    ) -> io::Result<Option<Arc<Following>>> {
        if stays.is_empty() {
            return Ok(None);
        }
        let teller = self.teller.clone();
        let following = Following::new(images, stays, move || teller.tell(Told::Wanted))?;
        self.lacking.following = Some(Arc::clone(&following));
        Ok(Some(following))
    }

    /// Names a piece that is lacking, now or as soon as there is one.
    pub(super) fn name_lacking(&mut self, urgent: bool, id: u64) {
        self.lacking.waits.push((id, urgent));
        self.name_what_is_lacking();
    }

    /// Answers whoever can be answered now.
    pub(super) fn name_what_is_lacking(&mut self) {
        // What is to come is not known before its images are.
        let unknown = matches!(self.phase, Phase::Empty);
        for (id, urgent) in std::mem::take(&mut self.lacking.waits) {
            let next = match &self.lacking.following {
                Some(following) => following.next(urgent).map(Some),
                None if unknown => None,
                None => Some(None),
            };
            let Some(pages) = next else {
                self.lacking.waits.push((id, urgent));
                continue;
            };
            let piece = pages.map(|pages| proto::ProcessStay {
                process: pages.process,
                address: pages.address,
                length: pages.count * PAGE_SIZE,
            });
            let reply = proto::KeeperLackingReply { piece };
            self.reply_with(id, keeper_reply::Reply::Lacking(reply));
        }
    }

    pub(super) fn memory_arrived(&mut self, arrived: &proto::KeeperArrived) -> Result<(), String> {
        let proto::KeeperArrived { process, address, data } = arrived;
        match &self.lacking.following {
            Some(following) => following.arrived(*process, *address, data).map_err(|e| words(&e)),
            None => Err("it lacks no memory".into()),
        }
    }

    /// What it lacks can't be had any more, and it can't go on without.
    pub(super) fn memory_lost(&mut self, why: &str) -> Result<(), String> {
        if self.lacking.following.is_none() {
            return Err("it lacks no memory".into());
        }
        eprintln!("memory of its processes can't be had any more: {why}");
        self.lacking.loss = proto::KeeperLoss::Source;
        let killed = self.cgroup.kill().map_err(|e| words(&e));
        self.nothing_follows();
        killed
    }

    /// Nothing more is lacking: all is here, or nobody needs it any more.
    pub(super) fn nothing_follows(&mut self) {
        if let Some(following) = self.lacking.following.take() {
            following.end();
        }
        self.name_what_is_lacking();
    }
}
