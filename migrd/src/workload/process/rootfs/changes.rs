//! What has become of a root file system between two looks at it. Pure.
//!
//! A file is the same when it has the same inode and nothing has changed since, which
//! the kernel notes with every write, of content or of anything else (`st_ctime`,
//! inode(7)). A clock that is set back does no harm: it is compared for being the same,
//! not for being later. Two things can hide a change, and make a file doubtful: a
//! change so close to the first look that a later one has the same time, and a write
//! that had begun before it and went on after, which only a file that is open for
//! writing can have.

use std::collections::{HashMap, HashSet};
use std::path::{Path, PathBuf};

use nix::sys::stat::{FileStat, SFlag};

use super::walk::{Found, Seen, Walk};

type Inode = (u64, u64);

/// The first look, and what of it may have changed without a sign.
pub(super) struct Before<'a> {
    walk: &'a Walk,
    numbers: HashMap<&'a Path, u32>,
    doubtful: HashSet<Inode>,
}

/// What the second look found.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Changes {
    /// Numbers of what is gone.
    pub(super) removed: Vec<u32>,
    /// The number of each thing that was found: its old one, or a new one.
    pub(super) numbers: Vec<u32>,
    /// Which of them are not as they were.
    pub(super) changed: Vec<bool>,
    /// Which of them are another name of a file, by its number.
    pub(super) same_as: Vec<Option<u32>>,
}

fn number(index: usize) -> u32 {
    u32::try_from(index).unwrap_or(u32::MAX)
}

fn inode(seen: &Seen) -> Inode {
    (seen.device, seen.inode)
}

impl<'a> Before<'a> {
    /// `is_suspect`: reading it failed. `written`: open for writing, by its path in the
    /// root. `early`: content was read then, and not only what is there.
    pub(super) fn new(
        walk: &'a Walk,
        is_suspect: impl Fn(u32) -> bool,
        written: &[PathBuf],
        early: bool,
    ) -> Self {
        let numbered = || walk.found.iter().enumerate().map(|(i, found)| (number(i), found));
        let numbers: HashMap<_, _> =
            numbered().map(|(n, found)| (found.path.as_path(), n)).collect();
        let mut doubtful = HashSet::new();
        if early {
            let fresh = |found: &Found| found.seen().is_fresh(walk.began);
            let in_doubt = numbered().filter(|(n, found)| fresh(found) || is_suspect(*n));
            doubtful.extend(in_doubt.map(|(_, found)| inode(&found.seen())));
            let open = written.iter().filter_map(|path| numbers.get(path.as_path()));
            let open = open.filter_map(|n| walk.found.get(*n as usize));
            doubtful.extend(open.map(|found| inode(&found.seen())));
        }
        Self { walk, numbers, doubtful }
    }

    fn found(&self, path: &Path) -> Option<(u32, &'a Found)> {
        let number = *self.numbers.get(path)?;
        Some((number, self.walk.found.get(number as usize)?))
    }

    /// Whether it is as it was, with no doubt.
    pub(super) fn is_same(&self, path: &Path, stat: &FileStat) -> bool {
        let now = Seen::of(stat);
        let before = self.found(path).map(|(_, found)| found.seen());
        before == Some(now) && !self.doubtful.contains(&inode(&now))
    }

    /// What was known of it, if it is as it was.
    pub(super) fn known(&self, found: &Found) -> Option<&'a Found> {
        let same = self.is_same(&found.path, &found.stat);
        same.then(|| self.found(&found.path).map(|(_, found)| found)).flatten()
    }

    /// Compares.
    pub(super) fn compare(&self, now: &[Found]) -> Changes {
        let count = number(self.walk.found.len());
        let mut next = count;
        let numbers: Vec<u32> = now
            .iter()
            .map(|found| {
                self.found(&found.path).map_or_else(
                    || {
                        next += 1;
                        next - 1
                    },
                    |(number, _)| number,
                )
            })
            .collect();
        let kept: HashSet<u32> = numbers.iter().copied().collect();
        // Of several names of a file the one with the lowest number has its content.
        let mut first: HashMap<Inode, u32> = HashMap::new();
        let has_names = |found: &Found| found.format() == SFlag::S_IFREG && found.stat.st_nlink > 1;
        for (found, number) in now.iter().zip(&numbers).filter(|(found, _)| has_names(found)) {
            let least = first.entry(inode(&found.seen())).or_insert(*number);
            *least = (*least).min(*number);
        }
        let same_as: Vec<Option<u32>> = now
            .iter()
            .zip(&numbers)
            .map(|(found, number)| {
                let least = has_names(found).then(|| first.get(&inode(&found.seen()))).flatten();
                least.copied().filter(|least| least != number)
            })
            .collect();
        let mut changed: Vec<bool> = now
            .iter()
            .zip(&same_as)
            .map(|(found, same_as)| match self.found(&found.path) {
                Some((_, before)) => {
                    before.same_as.map(number) != *same_as
                        || !self.is_same(&found.path, &found.stat)
                }
                None => true,
            })
            .collect();
        // One name of a file that has changed is all of them.
        let files: HashSet<Inode> = now
            .iter()
            .zip(&changed)
            .filter(|(found, changed)| **changed && has_names(found))
            .map(|(found, _)| inode(&found.seen()))
            .collect();
        for (found, changed) in now.iter().zip(&mut changed) {
            *changed |= has_names(found) && files.contains(&inode(&found.seen()));
        }
        let removed = (0..count).filter(|number| !kept.contains(number)).collect();
        Changes { removed, numbers, changed, same_as }
    }
}
