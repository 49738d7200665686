//! Sets of pages on the control socket.

use migr_proto::v1 as proto;

use crate::pages::{PageBitmap, PageSet};
use crate::workload::StreamKey;

/// As the message has it.
#[must_use]
pub fn to_wire(set: &PageSet) -> proto::DirtyPages {
    let regions = set.iter().map(|(key, pages)| {
        let words: Vec<u8> = pages.words().iter().flat_map(|w| w.to_le_bytes()).collect();
        proto::RegionPages { region: key.0, words: words.into() }
    });
    proto::DirtyPages { regions: regions.collect() }
}

/// From the message: as many pages as it has bits. Whether there are so many
/// is for the receiver to decide, who knows the regions.
#[must_use]
pub fn from_wire(pages: &proto::DirtyPages) -> PageSet {
    let mut set = PageSet::default();
    for proto::RegionPages { region, words } in &pages.regions {
        let words: Vec<u64> =
            words.as_chunks::<8>().0.iter().map(|w| u64::from_le_bytes(*w)).collect();
        let pages = (words.len() as u64) * 64;
        set.set(StreamKey(*region), PageBitmap::from_words(words, pages));
    }
    set
}
