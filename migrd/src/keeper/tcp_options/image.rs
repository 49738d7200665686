//! The file that they travel in, beside CRIU's images.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::OwnedFd;

use nix::errno::Errno;
use nix::fcntl::{OFlag, openat};
use nix::sys::stat::Mode;
use prost::Message;

use super::table::Known;

/// Its name. None of CRIU's begins like it.
pub const NAME: &str = "migr-tcp-options.img";
/// How long it may be (bytes).
pub(super) const FILE_BYTES: u64 = 8 << 20;
/// How many sockets it may have, and how many options of one.
const SOCKETS: usize = 65_536;
const OPTIONS: usize = 64;

/// All of them.
#[derive(Clone, PartialEq, Message)]
pub(super) struct Saved {
    #[prost(message, repeated, tag = "1")]
    pub(super) sockets: Vec<Socket>,
}

/// One socket, by one of its descriptors.
#[derive(Clone, PartialEq, Message)]
pub(super) struct Socket {
    /// The process, as the tree's PID namespace numbers it.
    #[prost(uint32, tag = "1")]
    pub(super) process: u32,
    #[prost(int32, tag = "2")]
    pub(super) descriptor: i32,
    #[prost(message, repeated, tag = "3")]
    pub(super) options: Vec<Value>,
}

/// One option of it, as setsockopt(2) has it.
#[derive(Clone, PartialEq, Message)]
pub(super) struct Value {
    #[prost(int32, tag = "1")]
    pub(super) level: i32,
    #[prost(int32, tag = "2")]
    pub(super) number: i32,
    #[prost(bytes = "vec", tag = "3")]
    pub(super) value: Vec<u8>,
}

/// It is not what a keeper writes.
#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    /// It can't be read.
    #[error("{NAME} can't be read: {0}")]
    Read(#[source] io::Error),
    /// It is no plain file of a length that it may have.
    #[error("{NAME} is no plain file of at most {FILE_BYTES} bytes")]
    NoFile,
    /// It is no message of that kind.
    #[error("{NAME} has another form: {0}")]
    Form(#[from] prost::DecodeError),
    /// It has too much.
    #[error("{NAME} has more than {SOCKETS} sockets, or {OPTIONS} options of one")]
    TooMany,
    /// A value that its option can't have.
    #[error("{NAME} has a value of {} bytes for {option} that it can't have", value.len())]
    Value {
        /// The option.
        option: &'static str,
        /// The value.
        value: Vec<u8>,
    },
}

/// Writes it into a directory of images.
///
/// # Errors
/// When it can't be written to its end.
pub(super) fn write(images: &OwnedFd, saved: &Saved) -> io::Result<()> {
    let flags = OFlag::O_WRONLY | OFlag::O_CREAT | OFlag::O_TRUNC | OFlag::O_CLOEXEC;
    let opened = openat(images, NAME, flags | OFlag::O_NOFOLLOW, Mode::from_bits_truncate(0o600))?;
    File::from(opened).write_all(&saved.encode_to_vec())
}

/// Reads it; nothing if it is not there: a keeper that knew nothing of it has written the
/// images. Options that are not known here are left out.
///
/// # Errors
/// When it is not as it must be. A peer may have written it, or a user.
pub(super) fn read(images: &OwnedFd) -> Result<Saved, ImageError> {
    let flags = OFlag::O_RDONLY | OFlag::O_NOFOLLOW | OFlag::O_NONBLOCK | OFlag::O_CLOEXEC;
    let file = match openat(images, NAME, flags, Mode::empty()) {
        Ok(file) => File::from(file),
        Err(Errno::ENOENT) => return Ok(Saved::default()),
        Err(error) => return Err(ImageError::Read(error.into())),
    };
    let found = file.metadata().map_err(ImageError::Read)?;
    if !found.is_file() || found.len() > FILE_BYTES {
        return Err(ImageError::NoFile);
    }
    let mut bytes = Vec::new();
    file.take(FILE_BYTES).read_to_end(&mut bytes).map_err(ImageError::Read)?;
    parse(&bytes)
}

fn parse(bytes: &[u8]) -> Result<Saved, ImageError> {
    let mut saved = Saved::decode(bytes)?;
    if saved.sockets.len() > SOCKETS || saved.sockets.iter().any(|s| s.options.len() > OPTIONS) {
        return Err(ImageError::TooMany);
    }
    for socket in &mut saved.sockets {
        // A newer keeper may know more.
        socket.options.retain(|option| option.known().is_some());
        for Value { level, number, value } in &socket.options {
            if let Some(known) = Known::find(*level, *number).filter(|known| !known.takes(value)) {
                return Err(ImageError::Value { option: known.name, value: value.clone() });
            }
        }
    }
    Ok(saved)
}

impl Value {
    pub(super) fn known(&self) -> Option<&'static Known> {
        Known::find(self.level, self.number)
    }
}

/// What of `sockets` there is room for, and whether that is all.
pub(super) fn fitting(mut sockets: Vec<Socket>) -> (Saved, bool) {
    let all = sockets.len();
    // What one message takes in another: a tag, and a length of at most five bytes.
    let around = |socket: &Socket| u64::try_from(socket.encoded_len() + 6).unwrap_or(FILE_BYTES);
    let mut bytes = 0;
    let fit = sockets.iter().take(SOCKETS).take_while(|socket| {
        bytes += around(socket);
        bytes <= FILE_BYTES
    });
    let count = fit.count();
    sockets.truncate(count);
    (Saved { sockets }, count == all)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    fn saved(level: i32, number: i32, value: &[u8]) -> Saved {
        let options = vec![Value { level, number, value: value.to_vec() }];
        Saved { sockets: vec![Socket { process: 7, descriptor: 3, options }] }
    }

    fn directory(path: &std::path::Path) -> OwnedFd {
        File::open(path).unwrap().into()
    }

    #[test]
    fn what_was_written_is_read_and_nothing_is_no_mistake() {
        let at = tempfile::tempdir().unwrap();
        let images = directory(at.path());
        assert_eq!(read(&images).unwrap(), Saved::default());
        let saved = saved(libc::IPPROTO_TCP, libc::TCP_CONGESTION, b"reno");
        write(&images, &saved).unwrap();
        assert_eq!(read(&images).unwrap(), saved);
        write(&images, &Saved::default()).unwrap();
        assert_eq!(read(&images).unwrap(), Saved::default(), "a dump that is made once more");
    }

    #[test]
    fn options_that_are_not_known_are_left_out() {
        let (tcp, socket) = (libc::IPPROTO_TCP, libc::SOL_SOCKET);
        // TCP_REPAIR, SO_RCVBUF, SO_ATTACH_FILTER: known, and not carried.
        for (level, number) in [(tcp, 9999), (9999, 1), (tcp, 19), (socket, 8), (socket, 26)] {
            let bytes = saved(level, number, &[0; 400]).encode_to_vec();
            assert_eq!(parse(&bytes).unwrap().sockets[0].options, []);
        }
        // A field that is not known: number 9, two bytes.
        let mut bytes = saved(tcp, libc::TCP_SYNCNT, &[3, 0, 0, 0]).encode_to_vec();
        let before = parse(&bytes).unwrap();
        bytes.extend([9 << 3 | 2, 2, 0, 0]);
        assert_eq!(parse(&bytes).unwrap(), before);
    }

    #[test]
    fn values_that_no_option_has_are_refused() {
        let cases: &[(i32, i32, &[u8])] = &[
            (libc::IPPROTO_TCP, libc::TCP_SYNCNT, b""),
            (libc::IPPROTO_TCP, libc::TCP_SYNCNT, &[1]),
            (libc::IPPROTO_TCP, libc::TCP_SYNCNT, &[0; 8]),
            (libc::SOL_SOCKET, libc::SO_MAX_PACING_RATE, &[0; 4]),
            (libc::IPPROTO_TCP, libc::TCP_CONGESTION, b""),
            (libc::IPPROTO_TCP, libc::TCP_CONGESTION, b"../../module"),
            (libc::IPPROTO_TCP, libc::TCP_CONGESTION, b"reno\0"),
            (libc::IPPROTO_TCP, libc::TCP_CONGESTION, b"sixteen-letters-"),
        ];
        for (level, number, value) in cases {
            let read = parse(&saved(*level, *number, value).encode_to_vec());
            assert!(matches!(read, Err(ImageError::Value { .. })), "{read:?}");
        }
    }

    #[test]
    fn too_much_is_refused_and_other_forms_are() {
        let one = saved(libc::IPPROTO_TCP, libc::TCP_SYNCNT, &[3, 0, 0, 0]).sockets.remove(0);
        let many = Socket { options: vec![one.options[0].clone(); OPTIONS + 1], ..one.clone() };
        for sockets in [vec![many], vec![Socket::default(); SOCKETS + 1]] {
            let read = parse(&Saved { sockets }.encode_to_vec());
            assert!(matches!(read, Err(ImageError::TooMany)), "{read:?}");
        }
        let good = Saved { sockets: vec![one; 3] }.encode_to_vec();
        for cut in [1, good.len() / 2, good.len() - 1] {
            assert!(matches!(parse(&good[..cut]), Err(ImageError::Form(_))), "{cut}");
        }
        assert!(parse(&[0xff; 64]).is_err());
    }

    #[test]
    fn only_a_plain_file_of_a_sane_length_is_read() {
        let at = tempfile::tempdir().unwrap();
        let (images, path) = (directory(at.path()), at.path().join(NAME));
        symlink("/dev/zero", &path).unwrap();
        assert!(matches!(read(&images), Err(ImageError::Read(_))));
        std::fs::remove_file(&path).unwrap();
        std::fs::create_dir(&path).unwrap();
        assert!(matches!(read(&images), Err(ImageError::NoFile)));
        std::fs::remove_dir(&path).unwrap();
        nix::unistd::mkfifo(&path, Mode::S_IRWXU).unwrap();
        assert!(matches!(read(&images), Err(ImageError::NoFile)));
        std::fs::remove_file(&path).unwrap();
        File::create(&path).unwrap().set_len(FILE_BYTES + 1).unwrap();
        assert!(matches!(read(&images), Err(ImageError::NoFile)));
    }

    #[test]
    fn what_there_is_no_room_for_is_left_out() {
        let one = saved(libc::IPPROTO_TCP, libc::TCP_SYNCNT, &[3, 0, 0, 0]).sockets.remove(0);
        let (few, all) = fitting(vec![one.clone(); 9]);
        assert!(all && few.sockets.len() == 9);
        let large = Socket { options: vec![one.options[0].clone(); OPTIONS], ..one.clone() };
        for (sockets, least) in [(vec![one; SOCKETS + 1], SOCKETS), (vec![large; 20_000], 5000)] {
            let (some, all) = fitting(sockets);
            assert!(!all && some.sockets.len() >= least);
            let bytes = some.encode_to_vec();
            assert!(u64::try_from(bytes.len()).unwrap() <= FILE_BYTES && parse(&bytes).is_ok());
        }
    }
}
