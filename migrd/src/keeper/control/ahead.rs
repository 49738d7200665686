//! Memory of a tree is written while it runs, or comes to it while it runs.

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
    /// Not all of its memory is there yet.
    filling: bool,
    /// Who waits for that.
    waits: Option<u64>,
    /// What was asked meanwhile and has to wait, with its descriptors.
    later: Vec<Later>,
}

/// A request, with its descriptors.
type Later = (proto::KeeperRequest, Vec<OwnedFd>);

impl Ahead {
    /// Takes what would stop the tree in CRIU's hands, to be served later; gives back
    /// what need not wait.
    pub(super) fn put_off(
        &mut self,
        request: proto::KeeperRequest,
        fds: Vec<OwnedFd>,
    ) -> Option<Later> {
        let waits = match &request.request {
            Some(Request::Pause(_)) => self.writing,
            // What is not there yet can't be written.
            Some(Request::Dump(_) | Request::Ahead(_) | Request::Settle(_)) => {
                self.writing || self.filling
            }
            _ => false,
        };
        if !waits {
            return Some((request, fds));
        }
        self.later.push((request, fds));
        None
    }

    /// From now on its memory comes to it.
    pub(super) fn fill(&mut self) {
        self.filling = true;
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
        self.ahead = Ahead { writing: true, waits: Some(id), ..Ahead::default() };
        Ok(())
    }

    pub(super) fn ahead_over(&mut self, result: Result<(), Failure>) {
        let Ahead { waits, later, .. } = std::mem::take(&mut self.ahead);
        if let Some(id) = waits {
            self.reply(id, result.map_err(|failure| failure.to_string()));
        }
        self.serve_later(later);
    }

    /// What brings its memory has failed.
    pub(super) fn losing(&mut self) {
        // Of a tree that has ended by itself nobody needs it any more.
        if !matches!(self.phase, Phase::Ended(_)) {
            self.lacking.pager_failed();
        }
    }

    /// All memory is there, or the tree has been killed.
    pub(super) fn filled(&mut self, result: Result<(), Failure>) {
        if let Err(failure) = result {
            eprintln!("{failure}");
        }
        self.nothing_follows();
        let Ahead { later, .. } = std::mem::take(&mut self.ahead);
        self.serve_later(later);
    }

    fn serve_later(&mut self, later: Vec<Later>) {
        for (request, fds) in later {
            // The first of them may begin the next; none of them ends the keeper.
            if let Some((request, fds)) = self.ahead.put_off(request, fds) {
                let _ = self.carry_out(request, fds);
            }
        }
    }
}
