//! Memory of a tree is written while it runs.

use std::io;
use std::os::fd::OwnedFd;

use migr_proto::v1::{self as proto, keeper_request::Request};

use super::phase::{Phase, Told};
use super::{Control, Failure};
use crate::keeper::ahead;

/// CRIU at work on a tree that runs, if it is.
#[derive(Debug, Default)]
pub(super) struct Ahead {
    writing: bool,
    /// Who waits for that.
    waits: Option<u64>,
    /// What was asked meanwhile and has to wait, with its descriptor.
    later: Vec<(proto::KeeperRequest, Option<OwnedFd>)>,
}

impl Ahead {
    /// Takes what would stop the tree in CRIU's hands, to be served later; gives back
    /// what need not wait.
    pub(super) fn put_off(
        &mut self,
        request: proto::KeeperRequest,
        directory: Option<OwnedFd>,
    ) -> Option<(proto::KeeperRequest, Option<OwnedFd>)> {
        let stops = matches!(
            &request.request,
            Some(Request::Dump(_) | Request::Pause(_) | Request::Ahead(_))
        );
        if !(stops && self.writing) {
            return Some((request, directory));
        }
        self.later.push((request, directory));
        None
    }

    /// Another daemon has come: the one before waits for nothing any more.
    pub(super) fn forget_daemon(&mut self) {
        self.waits = None;
        self.later.clear();
    }
}

impl Control {
    pub(super) fn write_ahead(
        &mut self,
        order: proto::KeeperAhead,
        images: Option<OwnedFd>,
        id: u64,
    ) -> io::Result<()> {
        self.expect(matches!(self.phase, Phase::Running), "be written while it runs")?;
        let proto::KeeperAhead { options, parent } = order;
        let work = self.writing(images, options, parent)?;
        let teller = self.teller.clone();
        ahead::write(work, self.init, move |news| teller.tell(Told::Work(news)))?;
        self.ahead = Ahead { writing: true, waits: Some(id), later: Vec::new() };
        Ok(())
    }

    pub(super) fn ahead_over(&mut self, result: Result<(), Failure>) {
        let Ahead { waits, later, .. } = std::mem::take(&mut self.ahead);
        if let Some(id) = waits {
            self.reply(id, result.map_err(|failure| failure.to_string()));
        }
        for (request, directory) in later {
            // The first of them may begin the next; none of them ends the keeper.
            if let Some((request, directory)) = self.ahead.put_off(request, directory) {
                let _ = self.carry_out(request, directory);
            }
        }
    }
}
