//! How CRIU speaks of pages: to page servers, and in the images that say which pages of a
//! process are where (`criu/page-xfer.c`, `criu/pagemap.c` of CRIU 4.2).

use prost::Message;

// Commands (`PS_IOV_*`).
/// Pages that images before have.
pub const HOLE: u32 = 2;
/// Pages of a process begin.
pub const OPEN: u32 = 4;
/// Are there images before?
pub const PARENT: u32 = 5;
/// Pages, which follow; also the answer to [`GET`].
pub const ADD: u32 = 6;
/// Asks for pages.
pub const GET: u32 = 7;
/// It was all.
pub const CLOSE: u32 = 0x1023;
/// The same, and the server is to end.
pub const FORCE_CLOSE: u32 = 0x1024;
// Flags of an entry (`PE_*`).
/// It can be put in place when the process runs.
pub const LAZY: u32 = 2;
/// It is in the image of pages.
pub const PRESENT: u32 = 4;
/// How an image of entries begins: `IMG_COMMON_MAGIC`, `PAGEMAP_MAGIC`.
pub const MAGIC: [u32; 2] = [0x5456_4319, 0x5608_4025];
/// The length of a command in bytes.
pub const COMMAND_BYTES: usize = 32;
/// The longest entry that is believed (bytes).
const ENTRY_BYTES: usize = 256;

/// `pagemap_head`.
#[derive(Clone, PartialEq, Eq, Message)]
pub struct Head {
    /// Number of the image of the pages.
    #[prost(uint32, required, tag = "1")]
    pub pages_id: u32,
}

/// `pagemap_entry`.
#[derive(Clone, PartialEq, Eq, Message)]
pub struct Entry {
    /// Of the first page.
    #[prost(uint64, required, tag = "1")]
    pub vaddr: u64,
    /// Of older versions.
    #[prost(uint32, required, tag = "2")]
    pub compat_nr_pages: u32,
    /// See above.
    #[prost(uint32, optional, tag = "4")]
    pub flags: Option<u32>,
    /// How many.
    #[prost(uint64, optional, tag = "5")]
    pub nr_pages: Option<u64>,
}

/// `page_server_iov`: a command, with its flags above.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Command {
    /// Which.
    pub command: u32,
    /// Of the pages.
    pub flags: u32,
    /// How many.
    pub pages: u64,
    /// Of the first.
    pub address: u64,
    /// What they are of.
    pub of: u64,
}

impl Command {
    /// As it came.
    #[must_use]
    pub fn decode(bytes: &[u8; COMMAND_BYTES]) -> Self {
        let word = |at: usize| {
            let mut word = [0; 8];
            word.copy_from_slice(&bytes[at..at + 8]);
            u64::from_ne_bytes(word)
        };
        // The upper half of the first is padding.
        let first = u32::try_from(word(0) & u64::from(u32::MAX)).unwrap_or(0);
        Self {
            command: first & 0xffff,
            flags: first >> 16,
            pages: word(8),
            address: word(16),
            of: word(24),
        }
    }

    /// As it is sent.
    #[must_use]
    pub fn encode(&self) -> [u8; COMMAND_BYTES] {
        let first = (u64::from(self.flags) << 16) | u64::from(self.command);
        let mut bytes = [0; COMMAND_BYTES];
        let words = [first, self.pages, self.address, self.of];
        for (place, word) in bytes.chunks_exact_mut(8).zip(words) {
            place.copy_from_slice(&word.to_ne_bytes());
        }
        bytes
    }
}

/// An image of entries could not be read: a peer may have sent it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("an image that says which pages a process has is damaged")]
pub struct Damaged;

/// The number of the image of pages that goes with an image of entries, and the entries.
///
/// # Errors
/// When it is not one.
pub fn entries(image: &[u8]) -> Result<(u32, Vec<Entry>), Damaged> {
    let magic = MAGIC.map(u32::to_le_bytes).concat();
    let mut rest = image.strip_prefix(magic.as_slice()).ok_or(Damaged)?;
    let head = Head::decode(next(&mut rest)?).map_err(|_| Damaged)?;
    let mut entries = Vec::new();
    while !rest.is_empty() {
        entries.push(Entry::decode(next(&mut rest)?).map_err(|_| Damaged)?);
    }
    Ok((head.pages_id, entries))
}

/// Takes a message off an image: its length (u32) and itself.
fn next<'a>(rest: &mut &'a [u8]) -> Result<&'a [u8], Damaged> {
    let (length, after) = rest.split_first_chunk::<4>().ok_or(Damaged)?;
    let length = usize::try_from(u32::from_le_bytes(*length)).map_err(|_| Damaged)?;
    let whole = (length <= ENTRY_BYTES).then(|| after.split_at_checked(length)).flatten();
    let (message, after) = whole.ok_or(Damaged)?;
    *rest = after;
    Ok(message)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn image() -> Vec<u8> {
        let mut image = MAGIC.map(u32::to_le_bytes).concat();
        let entry = Entry { vaddr: 4096, compat_nr_pages: 0, flags: Some(6), nr_pages: Some(3) };
        for message in [Head { pages_id: 9 }.encode_to_vec(), entry.encode_to_vec()] {
            image.extend(u32::try_from(message.len()).unwrap().to_le_bytes());
            image.extend(message);
        }
        image
    }

    #[test]
    fn a_command_arrives_as_it_was_sent() {
        let command = Command { command: GET, flags: 4, pages: 2, address: 8192, of: 77 };
        assert_eq!(Command::decode(&command.encode()), command);
    }

    #[test]
    fn an_image_of_entries_is_read_and_a_damaged_one_refused() {
        let (pages_id, read) = entries(&image()).unwrap();
        assert_eq!((pages_id, read.len(), read[0].nr_pages), (9, 1, Some(3)));
        for end in (0..image().len()).filter(|end| ![14, image().len()].contains(end)) {
            let cut = entries(&image()[..end]);
            assert!(cut.is_err(), "cut at {end}: {cut:?}");
        }
        let mut long = image();
        long[8..12].copy_from_slice(&u32::MAX.to_le_bytes());
        assert_eq!(entries(&long), Err(Damaged));
    }
}
