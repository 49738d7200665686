//! Who holds an image: a lock, and a note beside it.
//!
//! The lock (flock(2), of the open file description that daemon and child
//! share) lasts as long as one of the two lives, and tells programs of one host
//! apart. Not all storage carries it to other hosts, and it says no name: that
//! is what the note `IMAGE.migr` is for. A note is written only while the lock
//! is held. One that names this host proves nothing once the lock is free; one
//! that names another host counts until it is deleted, except for the workload
//! that it names: which host may run that, the journals say.

use std::ffi::OsString;
use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{self, Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::fcntl::OFlag;
use serde::{Deserialize, Serialize};

use super::error::DiskError;
use crate::units::{HostId, WorkloadId, unix_ms};

/// The longest note that is read, in bytes.
const MAX_NOTE: u64 = 64 << 10;
/// Version of a note's layout.
const VERSION: u32 = 1;
/// How long, and how often, a lock is tried for: whoever had it may be closing
/// it right now.
const LOCK_PAUSE: Duration = Duration::from_millis(25);
const LOCK_TRIES: u32 = 40;

/// A workload on a host.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Holder {
    /// The workload.
    pub workload: WorkloadId,
    /// Its name.
    pub name: String,
    /// The host it is on.
    pub host: HostId,
    /// That host's address.
    pub address: String,
}

impl std::fmt::Display for Holder {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} on the host at {}", self.name, self.address)
    }
}

/// What the holder does with the image.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum State {
    /// It writes to it.
    Held,
    /// It has let go, to move: the workload goes on with it somewhere.
    Released,
    /// It went on elsewhere with a copy: this one is old.
    Moved,
    /// It is being copied to here.
    Arriving,
}

/// The note beside an image.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Note {
    version: u32,
    /// What the holder does with it.
    pub state: State,
    /// Who.
    #[serde(flatten)]
    pub holder: Holder,
    /// migrd has made the image, for a copy that arrives.
    #[serde(default)]
    pub made: bool,
    since_unix_ms: i64,
}

impl Note {
    /// From now on.
    #[must_use]
    pub fn new(state: State, holder: &Holder) -> Self {
        let holder = holder.clone();
        Self { version: VERSION, state, holder, made: false, since_unix_ms: unix_ms() }
    }

    /// The same, in another state.
    #[must_use]
    pub fn becoming(self, state: State) -> Self {
        Self { state, since_unix_ms: unix_ms(), ..self }
    }

    /// The same, of an image that migrd has made if `made`.
    #[must_use]
    pub fn made(self, made: bool) -> Self {
        Self { made, ..self }
    }

    /// Whether it speaks of that workload on that host.
    #[must_use]
    pub fn is_of(&self, by: &Holder) -> bool {
        self.holder.workload == by.workload && self.holder.host == by.host
    }
}

/// Where the note of an image is: beside the file, whatever links lead to it.
#[must_use]
pub fn note_path(image: &Path) -> PathBuf {
    let real = image.canonicalize().unwrap_or_else(|_| image.to_owned());
    let mut name = OsString::from(real);
    name.push(".migr");
    PathBuf::from(name)
}

fn failed<'a>(what: &'static str, note: &'a Path) -> impl FnOnce(io::Error) -> DiskError + 'a {
    move |source| DiskError::Note { what, note: note.to_owned(), source }
}

/// Reads the note of an image, if there is one.
///
/// # Errors
/// When it can't be read or says nothing that can be understood.
pub fn read_note(image: &Path) -> Result<Option<Note>, DiskError> {
    let path = note_path(image);
    let flags = OFlag::O_NONBLOCK | OFlag::O_NOFOLLOW;
    let opened = OpenOptions::new().read(true).custom_flags(flags.bits()).open(&path);
    let file = match opened {
        Ok(file) => file,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(e) => return Err(failed("read", &path)(e)),
    };
    let damaged = || DiskError::DamagedNote { note: path.clone() };
    if !file.metadata().map_err(failed("read", &path))?.is_file() {
        return Err(damaged());
    }
    let mut text = Vec::new();
    file.take(MAX_NOTE).read_to_end(&mut text).map_err(failed("read", &path))?;
    let note: Note = serde_json::from_slice(&text).map_err(|_| damaged())?;
    // It goes into messages, and whoever shares the storage may have written it.
    let plain =
        |text: &str| text.len() <= 255 && text.bytes().all(|b| b.is_ascii_graphic() || b == b' ');
    if note.version != VERSION || !plain(&note.holder.name) || !plain(&note.holder.address) {
        return Err(damaged());
    }
    Ok(Some(note))
}

/// Replaces the note of an image. `durable`: it must outlive a power cut.
///
/// # Errors
/// When it can't be written.
pub fn write_note(image: &Path, note: &Note, durable: bool) -> Result<(), DiskError> {
    let path = note_path(image);
    let mut part = OsString::from(&path);
    part.push(".part");
    let part = PathBuf::from(part);
    let write = || {
        let text = serde_json::to_vec_pretty(note).map_err(io::Error::other)?;
        let _ = fs::remove_file(&part);
        let mut options = OpenOptions::new();
        let mut file = options.write(true).create_new(true).mode(0o644).open(&part)?;
        file.write_all(&text)?;
        if durable {
            file.sync_all()?;
        }
        fs::rename(&part, &path)?;
        if durable && let Some(directory) = path.parent() {
            File::open(directory)?.sync_all()?;
        }
        Ok(())
    };
    write().map_err(|source| {
        let _ = fs::remove_file(&part);
        failed("write", &path)(source)
    })
}

/// Deletes the note of an image, if it is there.
///
/// # Errors
/// When it stays.
pub fn delete_note(image: &Path) -> Result<(), DiskError> {
    let path = note_path(image);
    match fs::remove_file(&path) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(failed("delete", &path)(e)),
        _ => Ok(()),
    }
}

/// What an image is taken for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Purpose {
    /// A VM that begins here.
    New,
    /// A VM that has arrived here.
    Arrived,
    /// A VM that is this host's and does not have it: it had let go of it and
    /// stays, or the daemon was killed before it could open it.
    TakenBack,
}

/// Whether `by` may take an image, whose lock is free, with that note.
///
/// # Errors
/// Who has it, or had it.
pub fn may_take(
    image: &Path,
    note: Option<&Note>,
    by: &Holder,
    purpose: Purpose,
) -> Result<(), DiskError> {
    let Some(Note { state, holder, .. }) = note else { return Ok(()) };
    let path = image.to_owned();
    let (note, who) = (note_path(image), holder.to_string());
    let (same, here) = (holder.workload == by.workload, holder.host == by.host);
    match state {
        State::Held | State::Released if same => Ok(()),
        State::Held if here => Ok(()),
        State::Held => Err(DiskError::Locked { path, holder: who, note: Some(note) }),
        State::Released => {
            let holder =
                format!("{} while it moves from the host at {}", holder.name, holder.address);
            Err(DiskError::Locked { path, holder, note: Some(note) })
        }
        State::Moved if same && here && purpose == Purpose::TakenBack => Ok(()),
        State::Moved => Err(DiskError::Stale { path, holder: who, note }),
        // Owned by now: a daemon that was killed right after that finds it so.
        State::Arriving if same && here && purpose != Purpose::New => Ok(()),
        State::Arriving => Err(DiskError::Incomplete { path, holder: who, note }),
    }
}

/// Locks an image: for its holder alone, or together with other readers.
///
/// # Errors
/// Who has it.
pub fn lock(file: &File, path: &Path, shared: bool) -> Result<(), DiskError> {
    for _ in 1..LOCK_TRIES {
        if try_lock(file, path, shared)? {
            return Ok(());
        }
        std::thread::sleep(LOCK_PAUSE);
    }
    if try_lock(file, path, shared)? { Ok(()) } else { Err(in_use(path)) }
}

/// The same, without waiting.
///
/// # Errors
/// When it can't be locked at all.
pub fn try_lock(file: &File, path: &Path, shared: bool) -> Result<bool, DiskError> {
    let tried = if shared { file.try_lock_shared() } else { file.try_lock() };
    match tried {
        Ok(()) => Ok(true),
        Err(TryLockError::WouldBlock) => Ok(false),
        Err(TryLockError::Error(source)) => {
            Err(DiskError::Io { what: "lock", path: path.to_owned(), source })
        }
    }
}

/// Who has an image whose lock is taken, as far as its note tells.
#[must_use]
pub fn in_use(path: &Path) -> DiskError {
    let holder = match read_note(path) {
        Ok(Some(note)) => note.holder.to_string(),
        Ok(None) | Err(_) => "another program of this host (`lslocks` shows it)".into(),
    };
    DiskError::Locked { path: path.to_owned(), holder, note: None }
}
