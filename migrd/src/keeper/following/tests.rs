use std::io::{Read, Write};

use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};
use prost::Message;

use super::*;
use crate::keeper::criu::pages::{ADD, COMMAND_BYTES, Entry, FORCE_CLOSE, GET, Head, MAGIC, OPEN};
use crate::units::PAGE_BYTES;

/// Where the memory of process 7 begins: four lazy pages, one that is not, two lazy ones.
const FIRST: u64 = 0x10000;
const LAST: u64 = 0x90000;
const WORD: [u8; 4] = *b"done";

struct Images(tempfile::TempDir, OwnedFd);

impl Images {
    fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let entry = |vaddr, pages, flags| Entry {
            vaddr,
            compat_nr_pages: 0,
            flags: Some(flags),
            nr_pages: Some(pages),
        };
        let entries = [
            entry(FIRST, 4, LAZY | PRESENT),
            entry(0x40000, 1, PRESENT),
            entry(LAST, 2, LAZY | PRESENT),
        ];
        let mut image = MAGIC.map(u32::to_le_bytes).concat();
        let head = Head { pages_id: 1 }.encode_to_vec();
        let all = entries.iter().map(Message::encode_to_vec);
        for message in std::iter::once(head).chain(all) {
            image.extend(u32::try_from(message.len()).unwrap().to_le_bytes());
            image.extend(message);
        }
        std::fs::write(directory.path().join("pagemap-7.img"), image).unwrap();
        // Of the seven pages the first four are at the source.
        let pages = (0..7_u8).flat_map(|page| [if page < 4 { 0 } else { page }; PAGE_BYTES]);
        std::fs::write(directory.path().join("pages-1.img"), pages.collect::<Vec<_>>()).unwrap();
        let opened = File::open(directory.path()).unwrap().into();
        Self(directory, opened)
    }

    fn follow(&self, stays: &[ProcessStay]) -> io::Result<Arc<Following>> {
        Following::new(&self.1, stays, || {})
    }
}

fn stay(process: u32, address: u64, pages: u64) -> ProcessStay {
    ProcessStay { process, address, length: pages * PAGE_SIZE }
}

/// A page that follows, as its source has it.
fn page(number: u8) -> Vec<u8> {
    vec![100 + number; PAGE_BYTES]
}

/// What stands for `criu lazy-pages`: its socket, and where it hears that the tree is
/// complete.
struct Pager(UnixStream, OwnedFd);

impl Pager {
    fn of(following: &Arc<Following>) -> Self {
        let (theirs, ours) = UnixStream::pair().unwrap();
        let mut child = std::process::Command::new("true").spawn().unwrap();
        let pager = PidFd::open(child.id()).unwrap();
        child.wait().unwrap();
        following.serve(ours, pager).unwrap();
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        let (told, to) = socketpair(AddressFamily::Unix, SockType::Stream, None, flags).unwrap();
        following.complete(to, WORD).unwrap();
        Self(theirs, told)
    }

    fn asks(&mut self, address: u64, pages: u64) {
        let get = Command { command: GET, flags: 0, pages, address, of: 7 };
        self.0.write_all(&get.encode()).unwrap();
    }

    fn gets(&mut self) -> (u64, Vec<u8>) {
        let mut head = [0; COMMAND_BYTES];
        self.0.read_exact(&mut head).unwrap();
        let head = Command::decode(&head);
        assert_eq!((head.command, head.flags, head.of), (ADD, PRESENT, 7));
        let mut bytes = vec![0; usize::try_from(head.pages * PAGE_SIZE).unwrap()];
        self.0.read_exact(&mut bytes).unwrap();
        (head.address, bytes)
    }

    fn has_heard(&self) -> bool {
        let mut word = [0; 4];
        nix::unistd::read(&self.1, &mut word).is_ok_and(|length| length == 4 && word == WORD)
    }
}

/// What is asked for next, as soon as there is something.
fn next(following: &Following, urgent: bool) -> Pages {
    loop {
        if let Some(pages) = following.next(urgent) {
            return pages;
        }
        std::thread::yield_now();
    }
}

#[test]
fn what_is_here_is_given_at_once_and_the_rest_when_it_has_come() {
    let images = Images::new();
    let following = images.follow(&[stay(7, FIRST, 4)]).unwrap();
    let mut pager = Pager::of(&following);
    pager.asks(LAST, 2);
    assert_eq!(pager.gets(), (LAST, [vec![5; PAGE_BYTES], vec![6; PAGE_BYTES]].concat()));
    pager.asks(FIRST + PAGE_SIZE, 1);
    let wanted = next(&following, true);
    assert_eq!(wanted, Pages { process: 7, address: FIRST + PAGE_SIZE, count: 3 });
    following.arrived(7, FIRST + PAGE_SIZE, &[page(1), page(2), page(3)].concat()).unwrap();
    assert_eq!(pager.gets(), (FIRST + PAGE_SIZE, page(1)));
    assert!(!pager.has_heard(), "one page has not come");
    assert_eq!(next(&following, false), Pages { process: 7, address: FIRST, count: 1 });
    following.arrived(7, FIRST, &page(0)).unwrap();
    assert!(pager.has_heard());
    // It asks for all it knows of; what was given already is not among the rest.
    pager.asks(FIRST, 1);
    pager.asks(FIRST + 2 * PAGE_SIZE, 2);
    assert_eq!(pager.gets(), (FIRST, page(0)));
    assert_eq!(pager.gets(), (FIRST + 2 * PAGE_SIZE, [page(2), page(3)].concat()));
    let close = Command { command: FORCE_CLOSE, flags: 0, pages: 0, address: 0, of: 0 };
    pager.0.write_all(&close.encode()).unwrap();
    let mut answer = [1; 4];
    pager.0.read_exact(&mut answer).unwrap();
    assert_eq!(answer, [0; 4]);
}

#[test]
fn a_page_that_a_child_wants_once_more_is_asked_of_the_source_once_more() {
    let images = Images::new();
    let following = images.follow(&[stay(7, FIRST, 4)]).unwrap();
    let mut pager = Pager::of(&following);
    for _ in 0..2 {
        pager.asks(FIRST, 1);
        let wanted = next(&following, true);
        assert_eq!(wanted.address, FIRST);
        let count = usize::try_from(wanted.count).unwrap();
        following.arrived(7, FIRST, &page(0).repeat(count)).unwrap();
        assert_eq!(pager.gets(), (FIRST, page(0)));
    }
}

#[test]
fn what_was_not_asked_for_is_refused() {
    let images = Images::new();
    let following = images.follow(&[stay(7, FIRST, 4)]).unwrap();
    assert!(following.arrived(7, FIRST, &page(0)).is_err(), "nobody was asked");
    let wanted = next(&following, false);
    assert_eq!(wanted, Pages { process: 7, address: FIRST, count: 4 });
    for (process, address, length) in [
        (8, FIRST, 4096),
        (7, FIRST + 1, 4096),
        (7, FIRST, 5 << 12),
        (7, FIRST, 100),
        (7, LAST, 4096),
    ] {
        let refused = following.arrived(process, address, &vec![1; length]);
        assert!(refused.is_err(), "{process} {address:#x} {length}");
    }
    following.forget_asked();
    assert!(following.arrived(7, FIRST, &page(0)).is_err(), "another daemon was");
    assert_eq!(next(&following, false), wanted);
}

#[test]
fn images_that_do_not_go_with_what_stays_are_refused() {
    let images = Images::new();
    for odd in [stay(7, FIRST, 3), stay(7, FIRST + PAGE_SIZE, 3), stay(7, 0x40000, 1)] {
        assert!(images.follow(&[odd]).is_err(), "{odd:?}");
    }
    assert!(images.follow(&[stay(8, FIRST, 4)]).is_ok(), "nothing of this one is in them");
    let short = File::options().write(true).open(images.0.path().join("pages-1.img")).unwrap();
    short.set_len(6 * PAGE_SIZE).unwrap();
    let refused = images.follow(&[stay(7, FIRST, 4)]).unwrap_err();
    assert!(refused.to_string().contains("too short"), "{refused}");
    std::fs::write(images.0.path().join("pagemap-7.img"), b"nothing").unwrap();
    assert!(images.follow(&[]).is_err());
}

#[test]
fn a_pager_that_asks_for_what_is_not_there_or_speaks_otherwise_gets_nothing() {
    for (command, address) in [(GET, 0x50000), (OPEN, FIRST)] {
        let images = Images::new();
        let following = images.follow(&[stay(7, FIRST, 4)]).unwrap();
        let mut pager = Pager::of(&following);
        let odd = Command { command, flags: 0, pages: 1, address, of: 7 };
        pager.0.write_all(&odd.encode()).unwrap();
        let mut bytes = Vec::new();
        let ended = pager.0.read_to_end(&mut bytes);
        assert!(ended.is_err() || bytes.is_empty(), "{command}: {bytes:?}");
    }
}
