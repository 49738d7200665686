//! Images that build on each other: rounds that were written while the tree ran, and
//! what was written when it stood still. Each round's directory has a link `parent` to
//! that of the one before, by which CRIU finds what it left out.

use std::collections::BTreeMap;
use std::os::fd::{AsFd, OwnedFd};

use migr_proto::v1 as proto;
use nix::fcntl::AtFlags;
use nix::sys::stat::{Mode, fstatat, mkdirat};
use nix::unistd::symlinkat;

use super::{APPENDED, FIRST_STREAM, Image, Images, ImagesError, WHOLE_BYTES, system};
use crate::pages::PageBitmap;
use crate::sys::memfd;
use crate::units::{PAGE_SIZE, PageIndex, PageRun};
use crate::workload::StreamKey;

/// The most rounds of one tree.
const ROUNDS: u32 = 64;
/// What CRIU calls the link to the images before.
const PARENT: &str = "parent";
/// What the small files of all rounds may come to until even those are streams
/// (bytes): those of the stop have to fit beside them.
const ROUNDS_WHOLE_BYTES: u64 = 4 << 20;

/// Where a file of a round is, below the images.
pub(super) fn path_of(round: u32, name: &str) -> String {
    match round {
        0 => name.to_owned(),
        round => format!("{}/{name}", directory_of(round)),
    }
}

fn directory_of(round: u32) -> String {
    format!("round-{round}")
}

/// The images before those of a round (0: of the stop), when there were `rounds`:
/// relative to theirs, as CRIU is told. Empty: none.
#[must_use]
pub fn parent_of(round: u32, rounds: u32) -> String {
    match (round, rounds) {
        (0, 0) | (1, _) => String::new(),
        (0, last) => directory_of(last),
        (round, _) => format!("../{}", directory_of(round - 1)),
    }
}

impl Images {
    /// Makes the directory of a round.
    ///
    /// # Errors
    /// When there is one, or no room.
    pub fn begin_round(&self, round: u32) -> Result<OwnedFd, ImagesError> {
        self.make_directory(round)?;
        self.open_directory(round)
    }

    /// The image files of all rounds and of the stop.
    ///
    /// # Errors
    /// When they can't be listed.
    pub fn list_all(&self) -> Result<Vec<Image>, ImagesError> {
        let mut images = self.list(0)?;
        for round in 1..=ROUNDS {
            if !self.has_round(round) {
                break;
            }
            images.extend(self.list(round)?);
        }
        Ok(images)
    }

    fn has_round(&self, round: u32) -> bool {
        let name = directory_of(round);
        fstatat(&self.directory, name.as_str(), AtFlags::AT_SYMLINK_NOFOLLOW).is_ok()
    }

    fn make_directory(&self, round: u32) -> Result<(), ImagesError> {
        let name = directory_of(round);
        let made = mkdirat(self.directory.as_fd(), name.as_str(), Mode::S_IRWXU);
        made.map_err(|e| system("make a directory of images")(e.into()))
    }

    /// Makes the directories of all rounds that a peer's state speaks of, each with its
    /// link.
    pub(super) fn make_rounds(&self, images: &[proto::ProcessImage]) -> Result<(), ImagesError> {
        let rounds = images.iter().map(|image| image.round).max().unwrap_or(0);
        if rounds > ROUNDS {
            return Err(ImagesError::Odd("it was written in too many rounds".into()));
        }
        for round in 1..=rounds {
            self.make_directory(round)?;
        }
        for round in 0..=rounds {
            let (to, at) = (parent_of(round, rounds), path_of(round, PARENT));
            if !to.is_empty() {
                let linked = symlinkat(to.as_str(), self.directory.as_fd(), at.as_str());
                linked.map_err(|e| system("link images to those before")(e.into()))?;
            }
        }
        Ok(())
    }

    /// How many streams there can be.
    #[must_use]
    pub fn streams(&self) -> u32 {
        self.streams
    }

    /// Where the first `pages` of a stream of this source's hold nothing.
    fn holes(&self, key: StreamKey, pages: u64) -> Result<PageBitmap, ImagesError> {
        let mut holes = PageBitmap::none(self.pages());
        let Some(opened) = self.source(key) else { return Ok(holes) };
        let failed = |e| system("look for holes in an image")(e);
        let length = opened.file.metadata().map_err(failed)?.len();
        let end = length.min(pages * PAGE_SIZE);
        let mut at = 0;
        while at < end {
            let (start, stop) =
                memfd::next_data(&opened.file, at, end).map_err(failed)?.unwrap_or((end, end));
            let (first, after) = (at.div_ceil(PAGE_SIZE), start / PAGE_SIZE);
            if after > first {
                holes.insert(PageRun { first: PageIndex(first), count: after - first });
            }
            at = stop.max(start);
        }
        Ok(holes)
    }
}

/// A file that is handed out.
#[derive(Debug)]
struct Given {
    number: u32,
    /// Pages handed out so far, from its beginning.
    pages: u64,
    /// Pages that were handed out once more, because nothing is in them any more.
    emptied: PageBitmap,
}

/// What of growing files was not handed out yet.
#[derive(Debug, Default)]
pub struct Growing {
    /// The round whose files grow; 0: those of the stop.
    round: u32,
    known: BTreeMap<(u32, String), Given>,
    /// What the small files of all complete rounds come to (bytes).
    small: u64,
}

impl Growing {
    /// From now on the files of that round grow, and those before do not any more.
    pub fn enter(&mut self, round: u32) {
        self.round = round;
    }

    /// The pages that have become complete since the last call; the last, begun,
    /// ones too when it is `all`.
    ///
    /// # Errors
    /// When there is more than was announced.
    pub fn take(
        &mut self,
        images: &Images,
        all: bool,
    ) -> Result<Vec<(StreamKey, PageBitmap)>, ImagesError> {
        let mut parts = Vec::new();
        if images.stay {
            return Ok(parts);
        }
        // Of others CRIU may write the beginning last.
        for image in images.list_of(self.round, |name| all || name.starts_with(APPENDED))? {
            if !self.is_stream(&image, all) {
                continue;
            }
            images.fits(&image)?;
            let next = self.streams();
            let name = (image.round, image.name.clone());
            if !self.known.contains_key(&name) {
                images.announce(next, &image)?;
            }
            let emptied = PageBitmap::none(images.pages());
            let given = self.known.entry(name).or_insert(Given { number: next, pages: 0, emptied });
            let pages =
                if all { image.length.div_ceil(PAGE_SIZE) } else { image.length / PAGE_SIZE };
            if pages > given.pages {
                let mut bitmap = PageBitmap::none(images.pages());
                let count = pages - given.pages;
                bitmap.insert(PageRun { first: PageIndex(given.pages), count });
                parts.push((StreamKey(FIRST_STREAM + given.number), bitmap));
                given.pages = pages;
            }
        }
        Ok(parts)
    }

    /// Whether a file is a stream. Of rounds even small ones are when the small ones
    /// have come to much.
    fn is_stream(&mut self, image: &Image, all: bool) -> bool {
        if image.length > WHOLE_BYTES || self.round == 0 || !all {
            return image.length > WHOLE_BYTES;
        }
        let much = self.small + image.length > ROUNDS_WHOLE_BYTES;
        if !much {
            self.small += image.length;
        }
        much
    }

    /// The pages of earlier rounds in which nothing is any more since the last call:
    /// what replaced them is in a later one.
    ///
    /// # Errors
    /// When that can't be seen.
    pub fn emptied(
        &mut self,
        images: &Images,
    ) -> Result<Vec<(StreamKey, PageBitmap)>, ImagesError> {
        let round = self.round;
        let mut parts = Vec::new();
        let earlier = self.known.iter_mut().filter(|((of, name), _)| {
            (round == 0 || *of < round) && *of > 0 && name.starts_with(APPENDED)
        });
        for (_, given) in earlier {
            let key = StreamKey(FIRST_STREAM + given.number);
            let mut holes = images.holes(key, given.pages)?;
            holes.subtract(&given.emptied);
            if !holes.is_empty() {
                given.emptied.union(&holes);
                parts.push((key, holes));
            }
        }
        Ok(parts)
    }

    /// How many streams there are.
    #[must_use]
    pub fn streams(&self) -> u32 {
        u32::try_from(self.known.len()).unwrap_or(u32::MAX)
    }

    /// The number of each file's stream.
    #[must_use]
    pub fn numbers(&self) -> BTreeMap<(u32, String), u32> {
        self.known.iter().map(|(name, given)| (name.clone(), given.number)).collect()
    }
}

#[cfg(test)]
mod tests;
