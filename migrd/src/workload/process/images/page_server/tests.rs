use std::thread::JoinHandle;

use super::super::rounds::Growing;
use super::super::{FIRST_STREAM, Image};
use super::*;
use crate::workload::{ChunkSource, StreamKey};

const SHARED: u64 = 7 << 8 | OF_SHARED;
const OWN: u64 = 1 << 8 | OF_PROCESS;

/// CRIU's side.
struct Criu {
    socket: UnixStream,
    served: JoinHandle<Result<(), ImagesError>>,
}

impl Criu {
    /// Of a tree whose only process, number 1, is this test.
    fn start(images: &Arc<Images>) -> Self {
        let (socket, theirs) = UnixStream::pair().unwrap();
        let images = Arc::clone(images);
        let served = std::thread::spawn(move || {
            let process = |number| match number {
                1 => Ok(std::process::id()),
                _ => Err(io::Error::other("it is gone")),
            };
            PageServer::new(&images, theirs, process)?.serve()
        });
        Self { socket, served }
    }

    fn say(&mut self, command: u32, flags: u32, pages: u64, address: u64, of: u64) {
        let first = (u64::from(flags) << 16) | u64::from(command);
        let words = [first, pages, address, of];
        self.socket.write_all(&words.map(u64::to_ne_bytes).concat()).unwrap();
    }

    fn open(&mut self, of: u64) {
        self.say(OPEN, 0, 0, 0, of);
        let mut answer = [1];
        self.socket.read_exact(&mut answer).unwrap();
        assert_eq!(answer, [0], "no images come before");
    }

    fn close(mut self) -> Result<(), ImagesError> {
        self.say(FORCE_CLOSE, 0, 0, 0, 0);
        let mut answer = [1; 4];
        self.socket.read_exact(&mut answer).unwrap();
        assert_eq!(answer, [0; 4]);
        self.end()
    }

    fn end(self) -> Result<(), ImagesError> {
        drop(self.socket);
        self.served.join().unwrap()
    }
}

/// Pages of this test's memory, at a page's beginning.
struct Pages(Vec<u8>);

impl Pages {
    fn new(count: usize, byte: u8) -> Self {
        Self(vec![byte; (count + 1) << 12])
    }

    fn address(&self) -> u64 {
        (self.0.as_ptr() as u64).next_multiple_of(PAGE_SIZE)
    }
}

fn images() -> Arc<Images> {
    Arc::new(Images::new(4, 1 << 20).unwrap())
}

fn entries(image: &[u8]) -> Vec<Entry> {
    assert_eq!(image[..8], [MAGIC[0].to_le_bytes(), MAGIC[1].to_le_bytes()].concat());
    let mut rest = &image[8..];
    let mut messages = Vec::new();
    while let Some((length, after)) = rest.split_first_chunk::<4>() {
        let (message, next) = after.split_at(u32::from_le_bytes(*length) as usize);
        messages.push(message);
        rest = next;
    }
    messages[1..].iter().map(|message| Entry::decode(*message).unwrap()).collect()
}

#[test]
fn memory_that_stays_in_its_process_is_read_there() {
    let images = images();
    let (stays, sent) = (Pages::new(3, 5), [6_u8; 4096]);
    let mut criu = Criu::start(&images);
    criu.open(OWN);
    criu.say(ADD, LAZY | PRESENT, 3, stays.address(), OWN);
    // What comes over the socket is not looked at.
    criu.socket.write_all(&[9; 3 << 12]).unwrap();
    criu.say(ADD, PRESENT, 1, 1 << 40, OWN);
    criu.socket.write_all(&sent).unwrap();
    criu.open(SHARED);
    criu.say(ADD, LAZY | PRESENT, 1, 0, SHARED);
    criu.socket.write_all(&sent).unwrap();
    criu.close().unwrap();

    let mut growing = Growing::default();
    assert!(growing.take(&images, true).unwrap().is_empty(), "all of them are small");
    let whole = |name: &str| images.read_whole(0, name).unwrap();
    assert_eq!(whole("pages-1.img"), [vec![5; 3 << 12], sent.to_vec()].concat());
    assert_eq!(whole("pages-2.img"), sent);
    let own = entries(&whole("pagemap-1.img"));
    let seen: Vec<_> = own.iter().map(|e| (e.vaddr, e.nr_pages, e.flags)).collect();
    let first = (stays.address(), Some(3), Some(LAZY | PRESENT));
    assert_eq!(seen, [first, (1 << 40, Some(1), Some(PRESENT))]);
    assert_eq!(entries(&whole("pagemap-shmem-7.img")).len(), 1);

    // A stream of it, as of a large file.
    let length = 4 << 12;
    images.announce(0, &Image { round: 0, name: "pages-1.img".into(), length }).unwrap();
    let key = StreamKey(FIRST_STREAM);
    assert!(!images.is_zero(key, 0, length).unwrap());
    let mut two = vec![0; 2 << 12];
    images.read(key, 2 << 12, &mut two).unwrap();
    assert_eq!(two, [vec![5; 4096], sent.to_vec()].concat());
}

#[test]
fn what_is_executable_is_kept_as_it_was_sent() {
    let images = images();
    // Of this very function.
    let code = (what_is_executable_is_kept_as_it_was_sent as *const () as u64) & !(PAGE_SIZE - 1);
    let mut criu = Criu::start(&images);
    criu.open(OWN);
    criu.say(ADD, LAZY | PRESENT, 1, code, OWN);
    criu.socket.write_all(&[3; 4096]).unwrap();
    criu.close().unwrap();
    assert_eq!(images.read_whole(0, "pages-1.img").unwrap(), [3; 4096]);
}

#[test]
fn what_can_not_be_is_refused() {
    type Say = fn(&mut Criu);
    let table: [(&str, Say); 7] = [
        ("command 99", |criu| criu.say(99, 0, 0, 0, 0)),
        ("memory of 0x103", |criu| criu.say(OPEN, 0, 0, 0, 0x103)),
        ("find a process", |criu| criu.say(OPEN, 0, 0, 0, 2 << 8 | OF_PROCESS)),
        ("can't be", |criu| criu.say(ADD, PRESENT, 1, 0, OWN)),
        ("can't be", |criu| {
            criu.open(OWN);
            criu.say(ADD, PRESENT, u64::MAX, 0, OWN);
        }),
        ("can't be", |criu| {
            criu.open(OWN);
            criu.say(ADD, PRESENT, 2, u64::MAX - PAGE_SIZE, OWN);
        }),
        ("1 MiB in one file were announced", |criu| {
            criu.open(OWN);
            criu.say(ADD, PRESENT | LAZY, 1 << 20, 0, OWN);
        }),
    ];
    for (said, say) in table {
        let mut criu = Criu::start(&images());
        say(&mut criu);
        let error = criu.served.join().unwrap().unwrap_err().to_string();
        assert!(error.contains(said), "{error}: {said}");
    }
}

#[test]
fn a_criu_that_ends_early_is_noticed() {
    let mut criu = Criu::start(&images());
    criu.open(OWN);
    criu.say(ADD, PRESENT, 2, 0, OWN);
    criu.socket.write_all(&[0; 100]).unwrap();
    assert!(matches!(criu.end(), Err(ImagesError::System { .. })));
}

#[test]
fn lines_of_mappings_say_what_is_executable() {
    let line = "7f00-8000 r-xp 00000000 fd:01 123 /usr/bin/x";
    assert_eq!(executable_line(line), Some(0x7f00..0x8000));
    assert_eq!(executable_line("7f00-8000 rwxp 00000000 00:00 0"), Some(0x7f00..0x8000));
    assert_eq!(executable_line("7f00-8000 rw-p 00000000 00:00 0"), None);
    assert_eq!(executable_line("nonsense"), None);
}
