//! The cgroup of one process tree: by it the tree is frozen and killed as a whole
//! (cgroup v2, `cgroup.freeze` and `cgroup.kill`).

use std::collections::HashMap;
use std::fs::{self, File};
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use super::mounts;
use crate::sys::process::PidFd;

/// How long a tree may take to stand still: a process in the middle of a slow
/// system call keeps all others waiting.
const FREEZE_LIMIT: Duration = Duration::from_secs(10);
/// How long a tree may take to die.
const KILL_LIMIT: Duration = Duration::from_secs(10);
/// How long it is waited for that before it is killed again.
const KILL_PAUSE: Duration = Duration::from_millis(100);
const PAUSE: Duration = Duration::from_micros(500);
/// How long what was started in it from outside is given to end by itself, as a check
/// of a container's health does; and how often to look.
const STRANGER_LIMIT: Duration = Duration::from_secs(2);
const STRANGER_PAUSE: Duration = Duration::from_millis(50);

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

    /// Returns when everything in it stands still, and all of that is `init` and what is
    /// below: CRIU does not see what was started in a container from outside, and would
    /// be waited for in vain to have it in its hand.
    ///
    /// # Errors
    /// When something does not stand still, or such a process does not end, within some
    /// seconds; everything is as before then.
    pub fn freeze_tree(&self, init: u32) -> io::Result<()> {
        let was_frozen = self.has_event("frozen 1")?;
        let started = Instant::now();
        loop {
            self.freeze()?;
            let Some(stranger) = self.stranger(init)? else { return Ok(()) };
            if !was_frozen {
                self.set_frozen(false)?;
            }
            if was_frozen || started.elapsed() > STRANGER_LIMIT {
                let name = fs::read_to_string(format!("/proc/{stranger}/comm"));
                return Err(io::Error::other(format!(
                    "{} ({stranger}) was started in it from outside and can't move with it: end \
                     what was started with `runc exec`",
                    name.as_deref().unwrap_or("a process").trim_end()
                )));
            }
            std::thread::sleep(STRANGER_PAUSE);
        }
    }

    /// A process in it that is not below `init`.
    fn stranger(&self, init: u32) -> io::Result<Option<u32>> {
        let parent = |pid: &u32| Some((*pid, parent_of(*pid)?));
        let parents: HashMap<u32, u32> = self.processes()?.iter().filter_map(parent).collect();
        let is_below = |pid: u32| {
            let ancestors = std::iter::successors(Some(pid), |pid| parents.get(pid).copied());
            // Numbers that are used again meanwhile may make a ring.
            ancestors.take(parents.len() + 1).any(|pid| pid == init)
        };
        Ok(parents.keys().copied().find(|pid| !is_below(*pid)))
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
        if self.wait_for("populated 0", KILL_PAUSE)? {
            return Ok(());
        }
        // The kernel signals the first thread of each process, which does nothing where that
        // has ended before the others.
        let started = Instant::now();
        while started.elapsed() < KILL_LIMIT {
            self.kill_one_by_one()?;
            if self.wait_for("populated 0", KILL_PAUSE)? {
                return Ok(());
            }
        }
        Err(io::Error::other(format!("its processes do not end within {KILL_LIMIT:?}")))
    }

    fn kill_one_by_one(&self) -> io::Result<()> {
        let named = self.processes()?.into_iter().map(|pid| (pid, PidFd::open(pid)));
        let named: Vec<_> = named.collect();
        // Those that are still here are those that were named.
        let here = self.processes()?;
        for (pid, process) in named {
            if let Ok(process) = process
                && here.contains(&pid)
            {
                process.kill()?;
            }
        }
        Ok(())
    }

    /// Waits for a line of `cgroup.events`.
    fn wait_for(&self, line: &str, limit: Duration) -> io::Result<bool> {
        let started = Instant::now();
        loop {
            if self.has_event(line)? {
                return Ok(true);
            }
            if started.elapsed() > limit {
                return Ok(false);
            }
            std::thread::sleep(PAUSE);
        }
    }

    fn has_event(&self, line: &str) -> io::Result<bool> {
        let events = fs::read_to_string(self.path.join("cgroup.events"))?;
        Ok(events.lines().any(|found| found == line))
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

/// The parent of a process that is still there; from `/proc/PID/stat` (proc(5)), where its
/// name may have anything in it, and is in parentheses.
fn parent_of(pid: u32) -> Option<u32> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let (_, fields) = stat.rsplit_once(')')?;
    fields.split_whitespace().nth(1)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::process::{Command, Stdio};

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

    #[test]
    fn a_process_whose_first_thread_has_ended_is_killed_all_the_same() {
        let name = format!("migr-headless-{}", std::process::id());
        let cgroup = Cgroup::at(&root().unwrap().join(name));
        cgroup.make().expect("run the tests as root");
        let script = "import ctypes, threading, time\n\
                      threading.Thread(target=time.sleep, args=(1000,)).start()\n\
                      ctypes.CDLL(None).syscall(60, 0)";
        let mut child = Command::new("python3").args(["-c", script]).spawn().unwrap();
        fs::write(cgroup.processes_file(), child.id().to_string()).unwrap();
        let status = format!("/proc/{}/status", child.id());
        while !fs::read_to_string(&status).unwrap().contains("State:\tZ") {
            std::thread::sleep(PAUSE);
        }
        assert!(cgroup.has_event("populated 1").unwrap(), "its other thread is there");
        cgroup.remove().unwrap();
        assert!(!child.wait().unwrap().success(), "it was killed");
    }

    #[test]
    fn a_tree_with_a_stranger_in_its_cgroup_is_left_running() {
        let name = format!("migr-strangers-{}", std::process::id());
        let cgroup = Cgroup::at(&root().unwrap().join(name));
        cgroup.make().expect("run the tests as root");
        // What it starts comes after it was put there.
        let start = |command: &str| {
            let script = format!("read go; {command}");
            let mut shell = Command::new("sh");
            let mut child = shell.args(["-c", &script]).stdin(Stdio::piped()).spawn().unwrap();
            fs::write(cgroup.processes_file(), child.id().to_string()).unwrap();
            child.stdin.take().unwrap().write_all(b"go\n").unwrap();
            child
        };
        let mut init = start("sleep 1000; true");
        while cgroup.processes().unwrap().len() < 2 {
            std::thread::sleep(PAUSE);
        }
        cgroup.freeze_tree(init.id()).unwrap();
        assert!(cgroup.has_event("frozen 1").unwrap());
        cgroup.set_frozen(false).unwrap();
        let mut stranger = start("exec sleep 1000");
        let error = cgroup.freeze_tree(init.id()).unwrap_err().to_string();
        assert!(error.contains(&format!("({})", stranger.id())), "{error}");
        assert!(cgroup.wait_for("frozen 0", KILL_LIMIT).unwrap(), "it stands still");
        stranger.kill().unwrap();
        stranger.wait().unwrap();
        cgroup.freeze_tree(init.id()).unwrap();
        cgroup.remove().unwrap();
        init.wait().unwrap();
    }
}
