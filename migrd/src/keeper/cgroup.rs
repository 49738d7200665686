//! The cgroup of one process tree: by it the tree is frozen and killed as a whole
//! (cgroup v2, `cgroup.freeze` and `cgroup.kill`).

use std::fs::{self, File};
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use super::mounts;

/// How long a tree may take to stand still: a process in the middle of a slow
/// system call keeps all others waiting.
const FREEZE_LIMIT: Duration = Duration::from_secs(10);
/// How long a tree may take to die.
const KILL_LIMIT: Duration = Duration::from_secs(10);
const PAUSE: Duration = Duration::from_micros(500);

/// A cgroup.
#[derive(Debug)]
pub struct Cgroup {
    path: PathBuf,
}

/// Where this host has cgroup v2 mounted.
///
/// # Errors
/// When it has not.
pub fn root() -> io::Result<PathBuf> {
    let mounts = mounts::of("self")?;
    let found = mounts.into_iter().find(|mount| mount.kind == "cgroup2");
    let text = "no cgroup v2 is mounted, by which process trees are frozen: mount one \
                (mount -t cgroup2 none /sys/fs/cgroup)";
    Ok(found.ok_or_else(|| io::Error::other(text))?.path.into())
}

/// Moves a process into the cgroup that this process is in.
///
/// # Errors
/// When the kernel refuses.
pub fn take_in(process: u32) -> io::Result<()> {
    let own = fs::read_to_string("/proc/self/cgroup")?;
    let own = own.lines().find_map(|line| line.strip_prefix("0::/")).unwrap_or_default();
    fs::write(root()?.join(own).join("cgroup.procs"), process.to_string())
}

impl Cgroup {
    /// The one at `path`, whether it is there or not.
    #[must_use]
    pub fn at(path: &Path) -> Self {
        Self { path: path.to_owned() }
    }

    /// Where it is.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Makes it.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn make(&self) -> io::Result<()> {
        match fs::create_dir(&self.path) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
            other => other,
        }
    }

    /// Its directory, to start processes in.
    ///
    /// # Errors
    /// When it is not there.
    pub fn directory(&self) -> io::Result<OwnedFd> {
        Ok(File::open(&self.path)?.into())
    }

    /// The file that takes the number of a process that is to be in it.
    #[must_use]
    pub fn processes_file(&self) -> PathBuf {
        self.path.join("cgroup.procs")
    }

    /// The processes in it and below.
    ///
    /// # Errors
    /// When it is not there.
    pub fn processes(&self) -> io::Result<Vec<u32>> {
        self.members("cgroup.procs")
    }

    /// The threads of the processes in it and below.
    ///
    /// # Errors
    /// When it is not there.
    pub fn threads(&self) -> io::Result<Vec<u32>> {
        self.members("cgroup.threads")
    }

    /// The numbers in a file of it, and of every cgroup below.
    fn members(&self, file: &str) -> io::Result<Vec<u32>> {
        let mut members = Vec::new();
        for directory in self.all()? {
            let text = match fs::read_to_string(directory.join(file)) {
                // One below it may be removed at any time.
                Err(_) if directory != self.path => continue,
                other => other?,
            };
            members.extend(text.lines().filter_map(|line| line.parse::<u32>().ok()));
        }
        Ok(members)
    }

    /// It and every cgroup below, each before those below it: a tree that has
    /// privileges may make some.
    fn all(&self) -> io::Result<Vec<PathBuf>> {
        let mut all = vec![self.path.clone()];
        let mut next = 0;
        while let Some(directory) = all.get(next).cloned() {
            match fs::read_dir(&directory) {
                Ok(entries) => all.extend(
                    entries
                        .flatten()
                        .filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()))
                        .map(|entry| entry.path()),
                ),
                Err(error) if next == 0 => return Err(error),
                Err(_) => {}
            }
            next += 1;
        }
        Ok(all)
    }

    /// Has everything in it stand still or go on, and does not wait for that.
    ///
    /// # Errors
    /// When it is not there.
    pub fn set_frozen(&self, frozen: bool) -> io::Result<()> {
        fs::write(self.path.join("cgroup.freeze"), if frozen { "1" } else { "0" })
    }

    /// Returns when everything in it stands still.
    ///
    /// # Errors
    /// When it does not within some seconds; it goes on then.
    pub fn freeze(&self) -> io::Result<()> {
        self.set_frozen(true)?;
        if self.wait_for("frozen 1", FREEZE_LIMIT)? {
            return Ok(());
        }
        self.set_frozen(false)?;
        Err(io::Error::other(format!(
            "its processes do not stand still within {FREEZE_LIMIT:?}: one waits in the kernel \
             for storage or for the network"
        )))
    }

    /// Kills everything in it and returns when nothing is left.
    ///
    /// # Errors
    /// When something does not die within some seconds.
    pub fn kill(&self) -> io::Result<()> {
        match fs::write(self.path.join("cgroup.kill"), "1") {
            Err(error) if error.kind() == io::ErrorKind::NotFound && !self.path.exists() => {
                return Ok(());
            }
            other => other?,
        }
        if self.wait_for("populated 0", KILL_LIMIT)? {
            return Ok(());
        }
        Err(io::Error::other(format!("its processes do not end within {KILL_LIMIT:?}")))
    }

    /// Waits for a line of `cgroup.events`.
    fn wait_for(&self, line: &str, limit: Duration) -> io::Result<bool> {
        let started = Instant::now();
        loop {
            let events = fs::read_to_string(self.path.join("cgroup.events"))?;
            if events.lines().any(|found| found == line) {
                return Ok(true);
            }
            if started.elapsed() > limit {
                return Ok(false);
            }
            std::thread::sleep(PAUSE);
        }
    }

    /// Removes it and every cgroup below, with everything in them killed. Harmless
    /// when it is not there.
    ///
    /// # Errors
    /// When something in it does not die.
    pub fn remove(&self) -> io::Result<()> {
        self.kill()?;
        let all = match self.all() {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            other => other?,
        };
        for directory in all.iter().rev() {
            match fs::remove_dir(directory) {
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                other => other?,
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    #[test]
    fn what_is_in_cgroups_below_is_seen_and_goes_with_it() {
        let name = format!("migr-test-{}", std::process::id());
        let cgroup = Cgroup::at(&root().unwrap().join(name));
        cgroup.make().expect("run the tests as root");
        let below = cgroup.path().join("a/b");
        fs::create_dir_all(&below).unwrap();
        let mut child = Command::new("sleep").arg("1000").spawn().unwrap();
        fs::write(below.join("cgroup.procs"), child.id().to_string()).unwrap();
        assert_eq!(cgroup.processes().unwrap(), [child.id()]);
        assert_eq!(cgroup.threads().unwrap(), [child.id()]);
        cgroup.remove().unwrap();
        assert!(!cgroup.path().exists());
        assert!(!child.wait().unwrap().success(), "it was killed");
        cgroup.remove().unwrap();
    }
}
