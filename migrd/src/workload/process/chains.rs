//! Snapshots of one tree that build on each other: each has what memory has changed
//! since the one before.
//!
//! The kernel forgets what was written before whenever it is asked to note what is
//! written from then on. So only the snapshot at which it was asked last can be built on,
//! and only this handle of the tree knows which that is: after a restart of the daemon,
//! or a move, none can.

use crate::units::SnapshotId;
use crate::workload::{Chain, Problem};

/// What a tree's next snapshot can build on.
#[derive(Debug, Default)]
pub(super) struct Chains {
    /// What was chosen for the one that is made next.
    chosen: Chain,
    /// Where the images before are, relative to the new ones; empty: there are none.
    onto: String,
    /// The snapshot since which the kernel tells what is written.
    last: Option<SnapshotId>,
}

impl Chains {
    /// Chooses for the next.
    pub(super) fn choose(&mut self, chain: Chain) {
        self.chosen = chain;
        self.onto.clear();
    }

    /// Says where the images before are.
    pub(super) fn onto(&mut self, place: String) {
        self.onto = place;
    }

    /// The kernel is asked anew, for something else, or may have been.
    pub(super) fn broken(&mut self) {
        self.last = None;
    }

    /// The next one is made now: what it builds on, and whether others are to build on
    /// it.
    pub(super) fn begin(&mut self, tracks: bool) -> (String, bool) {
        self.broken();
        (std::mem::take(&mut self.onto), tracks && self.chosen.id.is_some())
    }

    /// It is written.
    pub(super) fn written(&mut self, tracks: bool) {
        self.last = self.chosen.id.filter(|_| tracks);
    }

    /// What keeps the next one from building on what was chosen.
    pub(super) fn problem(&self, tracks: bool) -> Option<Problem> {
        let after = self.chosen.after?;
        if !tracks {
            let what = "the kernel of this host does not track what processes write to their \
                memory (CONFIG_MEM_SOFT_DIRTY), so a snapshot can't build on another";
            let all = "leave --parent out: all memory is written then";
            return Some(Problem::new("chain-not-tracked", what, all));
        }
        (self.last != Some(after)).then(|| {
            Problem::new(
                "chain-not-last",
                "what its memory has changed since the parent snapshot is not known: another \
                 snapshot was written since, or begun, or it has moved, or was about to, or the \
                 daemon was restarted",
                "build on the last snapshot of it, or leave --parent out: all memory is written \
                 then",
            )
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chosen(chains: &mut Chains, after: Option<SnapshotId>) -> SnapshotId {
        let id = SnapshotId::random();
        chains.choose(Chain { id: Some(id), after });
        id
    }

    fn code(chains: &Chains) -> Option<&'static str> {
        chains.problem(true).map(|problem| problem.code)
    }

    #[test]
    fn a_snapshot_builds_on_the_last_one_and_on_no_other() {
        let mut chains = Chains::default();
        let first = chosen(&mut chains, None);
        assert_eq!(code(&chains), None);
        assert_eq!(chains.begin(true), (String::new(), true));
        chains.written(true);
        let second = chosen(&mut chains, Some(first));
        chains.onto("../../1/images".into());
        assert_eq!(code(&chains), None);
        assert_eq!(chains.begin(true), ("../../1/images".to_owned(), true));
        // It was not written, and the kernel may have been asked.
        chosen(&mut chains, Some(first));
        assert_eq!(code(&chains), Some("chain-not-last"));
        let third = chosen(&mut chains, None);
        chains.begin(true);
        chains.written(true);
        chosen(&mut chains, Some(second));
        assert_eq!(code(&chains), Some("chain-not-last"));
        chosen(&mut chains, Some(third));
        assert_eq!(code(&chains), None);
        chains.broken();
        assert_eq!(code(&chains), Some("chain-not-last"));
    }

    #[test]
    fn what_can_t_be_is_said_by_name() {
        let mut chains = Chains::default();
        let first = chosen(&mut chains, None);
        assert_eq!(chains.begin(false), (String::new(), false));
        chains.written(false);
        chosen(&mut chains, Some(first));
        let problem = chains.problem(false).unwrap();
        assert_eq!(problem.code, "chain-not-tracked");
        assert!(problem.remedy.contains("--parent"), "{problem:?}");
    }
}
