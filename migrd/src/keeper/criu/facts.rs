//! What is known of the CRIU of this host before it is needed.

use std::fmt;
use std::fs::File;
use std::io::{self, Read, Seek};
use std::os::fd::AsFd;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags};

use super::failure::{self, Failure};
use super::rpc::{FeatureSet, Request, Response, VersionReply};
use super::session::{CriuError, Event, Launch, PATH, Session, poll_until};
use crate::sys::process::PidFd;

/// The oldest version whose options are those that are used here: it is the one
/// of Debian 12, and what tests run against.
pub const OLDEST: Version = Version { major: 3, minor: 17, sublevel: 0 };

/// How long CRIU may take to answer a question or try the kernel. It takes well
/// under a second; a busy host gets much more.
const PATIENCE: Duration = Duration::from_secs(30);

/// A version of CRIU's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Version {
    /// The 4 of 4.2.1.
    pub major: u32,
    /// The 2 of 4.2.1.
    pub minor: u32,
    /// The 1 of 4.2.1.
    pub sublevel: u32,
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { major, minor, sublevel } = self;
        write!(f, "{major}.{minor}")?;
        if *sublevel == 0 { Ok(()) } else { write!(f, ".{sublevel}") }
    }
}

/// What CRIU and the kernel can do together. That they say so does not mean that
/// it works: the kernel may still refuse, for want of a capability.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Features {
    /// The kernel tells which pages were written to (soft-dirty), so memory can
    /// go ahead of the stop.
    pub mem_track: bool,
    /// Memory can follow after the processes run (userfaultfd).
    pub lazy_pages: bool,
}

/// There is no CRIU here that can be used.
#[derive(Debug, thiserror::Error)]
pub enum Unusable {
    /// Nowhere in `PATH`.
    #[error(
        "there is no criu in PATH, so processes cannot be moved: install CRIU {OLDEST} or newer, \
         or name it with --criu PATH"
    )]
    Missing,
    /// What was named is not a program.
    #[error("{} is not a program: name a CRIU {OLDEST} or newer with --criu PATH", .path.display())]
    NotAProgram {
        /// What was named.
        path: PathBuf,
        /// Why it is none.
        #[source]
        source: Option<io::Error>,
    },
    /// It does not answer like CRIU.
    #[error(
        "{} does not answer as CRIU does: name a CRIU {OLDEST} or newer with --criu PATH",
        .path.display()
    )]
    Silent {
        /// The program.
        path: PathBuf,
        /// What it did instead.
        source: CriuError,
    },
    /// Too old.
    #[error(
        "{} is CRIU {version}: install CRIU {OLDEST} or newer, or name one with --criu PATH",
        .path.display()
    )]
    TooOld {
        /// The program.
        path: PathBuf,
        /// Its version.
        version: Version,
    },
    /// `criu check` fails.
    #[error("CRIU {version} ({}) does not work on this kernel: {failure}", .path.display())]
    Unfit {
        /// The program.
        path: PathBuf,
        /// Its version.
        version: Version,
        /// Why.
        failure: Failure,
    },
    /// It could not be tried.
    #[error("cannot try CRIU ({})", .path.display())]
    Io {
        /// The program.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
}

/// A CRIU that works on this host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Criu {
    /// The program.
    pub path: PathBuf,
    /// Its version.
    pub version: Version,
    /// What it can do here.
    pub features: Features,
}

impl Criu {
    /// Takes the program `named`, or else the first `criu` in `PATH`, and tries
    /// it. Takes a moment; done once, when a daemon starts.
    ///
    /// # Errors
    /// When there is none, it is older than [`OLDEST`], or it does not work on
    /// this kernel.
    pub fn find(named: Option<&Path>) -> Result<Self, Unusable> {
        let path = match named {
            Some(path) => {
                program(path).map_err(|source| Unusable::NotAProgram {
                    path: path.to_owned(),
                    source: Some(source),
                })?;
                // A process of ours may have another working directory.
                std::path::absolute(path)
                    .map_err(|source| Unusable::Io { path: path.to_owned(), source })?
            }
            None => in_path(std::env::var_os("PATH").as_deref()).ok_or(Unusable::Missing)?,
        };
        let silent = |source| Unusable::Silent { path: path.clone(), source };
        let version = version(&path).map_err(silent)?;
        if version < OLDEST {
            return Err(Unusable::TooOld { path, version });
        }
        match check(&path) {
            Ok(None) => {}
            Ok(Some(failure)) => return Err(Unusable::Unfit { path, version, failure }),
            Err(source) => return Err(Unusable::Io { path, source }),
        }
        let features = features(&path).map_err(silent)?;
        Ok(Self { path, version, features })
    }
}

/// That `path` is a file that may be executed.
fn program(path: &Path) -> io::Result<()> {
    let metadata = std::fs::metadata(path)?;
    if metadata.is_file() && metadata.permissions().mode() & 0o111 != 0 {
        return Ok(());
    }
    Err(io::Error::new(io::ErrorKind::PermissionDenied, "it may not be executed"))
}

/// The first `criu` in the directories of `path`. Relative ones would mean
/// another program in another working directory.
fn in_path(path: Option<&std::ffi::OsStr>) -> Option<PathBuf> {
    std::env::split_paths(path?)
        .filter(|directory| directory.is_absolute())
        .map(|directory| directory.join("criu"))
        .find(|candidate| program(candidate).is_ok())
}

/// Asks `criu` for its version.
///
/// # Errors
/// When it does not answer.
pub fn version(criu: &Path) -> Result<Version, CriuError> {
    let response = ask(criu, &Request::version())?;
    let unexpected = CriuError::Unexpected { doing: "told its version", got: response.r#type };
    let VersionReply { major_number, minor_number, sublevel } =
        response.version.ok_or(unexpected)?;
    // A negative number is not one of CRIU's; as 0 it is too old.
    let number = |n: i32| u32::try_from(n).unwrap_or(0);
    Ok(Version {
        major: number(major_number),
        minor: number(minor_number),
        sublevel: number(sublevel.unwrap_or(0)),
    })
}

/// Asks `criu` which features it and the kernel have.
///
/// # Errors
/// When it does not answer.
pub fn features(criu: &Path) -> Result<Features, CriuError> {
    let wanted = FeatureSet { mem_track: Some(true), lazy_pages: Some(true) };
    let response = ask(criu, &Request::feature_check(wanted))?;
    // A CRIU that cannot tell has none that could be relied on.
    let FeatureSet { mem_track, lazy_pages } = response.features.unwrap_or_default();
    Ok(Features { mem_track: mem_track.unwrap_or(false), lazy_pages: lazy_pages.unwrap_or(false) })
}

fn ask(criu: &Path, request: &Request) -> Result<Response, CriuError> {
    let mut session = Session::start(Launch::plain(criu))?;
    session.request(request)?;
    match session.next_within(PATIENCE)? {
        Event::Done(response) => Ok(response),
        Event::Notify { .. } => Err(CriuError::Unexpected {
            doing: request.r#type().doing(),
            got: super::rpc::RequestType::Notify.into(),
        }),
    }
}

/// Has `criu` try what it needs of the kernel; `None` when all is there. By the
/// command, because over the socket it does not say what is missing.
///
/// # Errors
/// When it does not start, or takes longer than half a minute.
pub fn check(criu: &Path) -> io::Result<Option<Failure>> {
    let mut said = tempfile()?;
    let mut child = Command::new(criu)
        .args(["--no-default-config", "check"])
        .env_clear()
        .env("PATH", PATH)
        .stdin(Stdio::null())
        .stdout(said.try_clone()?)
        .stderr(said.try_clone()?)
        .spawn()?;
    let ended = PidFd::open(child.id()).and_then(|pidfd| {
        let mut wait = [PollFd::new(pidfd.as_fd(), PollFlags::POLLIN)];
        poll_until(&mut wait, Some(Instant::now() + PATIENCE))
    });
    if !matches!(ended, Ok(true)) {
        let _ = child.kill();
    }
    let status = child.wait()?;
    if !ended? {
        return Err(io::Error::new(io::ErrorKind::TimedOut, "\"criu check\" does not end"));
    }
    if status.success() {
        return Ok(None);
    }
    said.rewind()?;
    let said = failure::Log::read(said.by_ref())?;
    Ok(Some(Failure::of_check(&said)))
}

/// A file in memory, of this process alone.
fn tempfile() -> io::Result<File> {
    let flags = nix::sys::memfd::MFdFlags::MFD_CLOEXEC;
    Ok(nix::sys::memfd::memfd_create("criu-check", flags)?.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_ordered_by_number_and_not_by_spelling() {
        let version = |major, minor, sublevel| Version { major, minor, sublevel };
        assert!(version(3, 9, 0) < OLDEST);
        assert!(version(3, 16, 9) < OLDEST);
        assert!(version(3, 17, 1) >= OLDEST);
        assert!(version(4, 0, 0) >= OLDEST);
        assert_eq!(version(4, 2, 1).to_string(), "4.2.1");
        assert_eq!(version(3, 19, 0).to_string(), "3.19");
    }

    #[test]
    fn the_first_program_in_path_is_taken_and_nothing_that_cannot_be_executed() {
        let [empty, text, good, later] = [(); 4].map(|()| tempfile::tempdir().unwrap());
        std::fs::write(text.path().join("criu"), "no program").unwrap();
        for directory in [&good, &later] {
            let path = directory.path().join("criu");
            std::fs::write(&path, "").unwrap();
            std::fs::set_permissions(&path, PermissionsExt::from_mode(0o755)).unwrap();
        }
        let all = [Path::new("."), empty.path(), text.path(), good.path(), later.path()];
        let path = std::env::join_paths(all).unwrap();
        assert_eq!(in_path(Some(&path)), Some(good.path().join("criu")));
        assert_eq!(in_path(Some(text.path().as_os_str())), None);
        assert_eq!(in_path(None), None);
    }

    #[test]
    fn a_program_that_is_not_criu_is_refused_with_what_to_do() {
        let error = Criu::find(Some(Path::new("/bin/true"))).unwrap_err();
        assert!(matches!(error, Unusable::Silent { .. }), "{error:?}");
        assert!(error.to_string().contains("--criu PATH"), "{error}");
        let error = Criu::find(Some(Path::new("/bin"))).unwrap_err();
        assert!(matches!(error, Unusable::NotAProgram { .. }), "{error:?}");
    }
}
