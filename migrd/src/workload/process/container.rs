//! What containers need of a host, and what is left of them on it.

use std::ffi::OsStr;
use std::fs;
use std::io::{self, ErrorKind};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;

use crate::keeper::container::{BUNDLE, Network, RUNC, Spec, runc_root};
use crate::keeper::init::DEFAULT_PATH;
use crate::keeper::mounts;
use crate::workload::Problem;

/// How long runc may take to delete a container: it runs its last hooks.
const DELETE_LIMIT: Duration = Duration::from_secs(60);
const PAUSE: Duration = Duration::from_millis(5);

/// The runc of this host: what is `named`, or else the first in `PATH`.
///
/// # Errors
/// Why there is none, and what to do.
pub(super) fn find_runc(named: Option<&Path>) -> Result<PathBuf, String> {
    let program = |path: &PathBuf| {
        fs::metadata(path).is_ok_and(|m| m.is_file() && m.permissions().mode() & 0o111 != 0)
    };
    match named {
        Some(path) => match std::path::absolute(path) {
            Ok(path) if program(&path) => Ok(path),
            _ => Err(format!(
                "{} is not a program: name a runc with --runc PATH (or MIGR_RUNC)",
                path.display()
            )),
        },
        None => {
            let path = std::env::var_os("PATH").unwrap_or_default();
            let found = std::env::split_paths(&path)
                .filter(|directory| directory.is_absolute())
                .map(|directory| directory.join("runc"))
                .find(program);
            found.ok_or_else(|| {
                "there is no runc in PATH, so there are no containers here: install runc 1.1 or \
                 newer, or name one with --runc PATH (or MIGR_RUNC)"
                    .to_owned()
            })
        }
    }
}

/// What of a container's surroundings is not on this host. `brought`: its root file
/// system comes with it.
pub(super) fn lacking(spec: &Spec, brought: bool) -> Vec<Problem> {
    let mut problems = Vec::new();
    let mut missing = |code: &'static str, what: String, remedy: &str| {
        problems.push(Problem::new(code, what, remedy));
    };
    let rootfs = spec.rootfs();
    match fs::metadata(rootfs) {
        _ if brought => {}
        Ok(found) if found.is_dir() => {}
        Ok(_) => missing(
            "container-rootfs",
            format!("the root file system {} is not a directory", rootfs.display()),
            "put a copy of the one at the source there, or storage that both hosts share",
        ),
        Err(error) => missing(
            "container-rootfs",
            format!("the root file system {} is not there: {error}", rootfs.display()),
            "copy it there (rsync -aHAX --numeric-ids), put it on storage that both hosts share, or \
             start the container with --rootfs copy",
        ),
    }
    for (inside, source) in spec.binds() {
        if let Err(error) = fs::metadata(&source) {
            missing(
                "container-mount",
                format!(
                    "{}, mounted at {}, is not there: {error}",
                    source.display(),
                    inside.display()
                ),
                "make it there, or put it on storage that both hosts share",
            );
        }
    }
    for hook in spec.hooks() {
        if let Err(error) = fs::metadata(&hook) {
            missing(
                "container-hook",
                format!("the hook {} is not there: {error}", hook.display()),
                "install the package that it is of",
            );
        }
    }
    if let Network::At(path) = spec.network()
        && let Err(error) = fs::metadata(&path)
    {
        missing(
            "container-network",
            format!("the network namespace {} is not there: {error}", path.display()),
            "make it there (ip netns add), or give the container its own with --net",
        );
    }
    problems
}

/// Links a new container's directory to its runc, and makes the place for runc's
/// state.
pub(super) fn prepare(directory: &Path, runc: &Path) -> io::Result<()> {
    fs::create_dir_all(runc_root(directory))?;
    std::os::unix::fs::symlink(runc, directory.join(RUNC))
}

/// Deletes what runc knows of the container that had `directory`, its cgroups, and the
/// files that its keeper made. Nothing of it may run any more. Harmless when there is
/// nothing, or it is no container.
pub(super) async fn clear(directory: &Path, cgroup: &Path) {
    let (directory, cgroup) = (directory.to_owned(), cgroup.to_owned());
    let cleared = tokio::task::spawn_blocking(move || clear_here(&directory, &cgroup)).await;
    if let Ok(Err(error)) = cleared {
        tracing::warn!(%error, "something of a container stays behind");
    }
}

fn clear_here(directory: &Path, cgroup: &Path) -> io::Result<()> {
    let Ok(runc) = fs::read_link(directory.join(RUNC)) else { return Ok(()) };
    let Some(id) = directory.file_name() else { return Ok(()) };
    let root = runc_root(directory);
    let state = root.join(id);
    if state.exists() {
        // runc deletes this directory with everything below.
        let below = |mount: &mounts::MountPoint| Path::new(&mount.path).starts_with(&state);
        if mounts::of("self")?.iter().any(below) {
            return Err(io::Error::other(format!(
                "something is mounted in {}: unmount it",
                state.display()
            )));
        }
        delete(&runc, &root, id)?;
    }
    if let Some(name) = cgroup.file_name() {
        for mount in mounts::of("self")?.iter().filter(|m| m.kind.starts_with("cgroup")) {
            remove_cgroup(&Path::new(&mount.path).join(name))?;
        }
    }
    remove_files(&directory.join(BUNDLE))?;
    ignore_missing(fs::remove_file(directory.join(RUNC)))
}

fn delete(runc: &Path, root: &Path, id: &OsStr) -> io::Result<()> {
    let mut command = Command::new(runc);
    command.arg("--root").arg(root).args(["delete", "--force"]).arg(id);
    command.env_clear().env("PATH", DEFAULT_PATH).current_dir("/");
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    // Its hooks are in its group.
    command.process_group(0);
    let mut child = command.spawn()?;
    let started = Instant::now();
    loop {
        match child.try_wait()? {
            Some(status) if status.success() => return Ok(()),
            Some(status) => return Err(io::Error::other(format!("runc delete: {status}"))),
            None if started.elapsed() > DELETE_LIMIT => {
                if let Ok(group) = i32::try_from(child.id()) {
                    let _ = killpg(Pid::from_raw(group), Signal::SIGKILL);
                }
                child.kill()?;
                child.wait()?;
                return Err(io::Error::other("runc delete, or a hook of it, does not end"));
            }
            None => std::thread::sleep(PAUSE),
        }
    }
}

/// Removes a cgroup in which nothing runs, and those below.
fn remove_cgroup(path: &Path) -> io::Result<()> {
    let Ok(entries) = fs::read_dir(path) else { return Ok(()) };
    for entry in entries.flatten().filter(|e| e.file_type().is_ok_and(|kind| kind.is_dir())) {
        remove_cgroup(&entry.path())?;
    }
    ignore_missing(fs::remove_dir(path))
}

/// Deletes a directory that only has files.
fn remove_files(directory: &Path) -> io::Result<()> {
    let Ok(entries) = fs::read_dir(directory) else { return Ok(()) };
    for entry in entries {
        ignore_missing(fs::remove_file(entry?.path()))?;
    }
    ignore_missing(fs::remove_dir(directory))
}

fn ignore_missing(done: io::Result<()>) -> io::Result<()> {
    match done {
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(()),
        other => other,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_files_are_deleted() {
        let parent = tempfile::tempdir().unwrap();
        let bundle = parent.path().join(BUNDLE);
        fs::create_dir(&bundle).unwrap();
        fs::write(bundle.join("config.json"), "{}").unwrap();
        remove_files(&bundle).unwrap();
        remove_files(&bundle).unwrap();
        fs::create_dir_all(bundle.join("mounted/here")).unwrap();
        assert!(remove_files(&bundle).is_err());
        assert!(bundle.join("mounted/here").exists());
    }

    #[test]
    fn a_runc_that_is_named_must_be_a_program() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("runc");
        fs::write(&file, "").unwrap();
        let refused = find_runc(Some(&file)).unwrap_err();
        assert!(refused.contains("is not a program") && refused.contains("--runc"), "{refused}");
        fs::set_permissions(&file, fs::Permissions::from_mode(0o755)).unwrap();
        assert_eq!(find_runc(Some(&file)).unwrap(), file);
    }
}
