//! Where the files of a lab are: outside, below its directory; inside a host,
//! at fixed places.

use std::fs;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};

use super::settings::HostNumber;

/// Inside a host: a directory that all hosts of the lab share.
pub const SHARED: &str = "/lab/shared";
/// Inside a host: its own disk, which survives a power cut as a disk does.
pub const DISK: &str = "/lab/disk";
/// Inside a host: the bridge that its network card and its guests' taps are in.
pub const BRIDGE: &str = "br0";
/// Command channels of a host; each serves one command at a time.
pub const CHANNELS: u8 = 6;

/// The longest path of a socket (`sun_path`, unix(7)) without its final zero.
const MAX_SOCKET_PATH: usize = 107;

/// The files of one lab.
#[derive(Clone, Debug)]
pub struct Layout {
    root: PathBuf,
    shared: PathBuf,
}

impl Layout {
    /// A lab below `root`.
    ///
    /// # Errors
    /// When that path is too long for the sockets in it.
    pub fn new(root: &Path) -> Result<Self> {
        let root = std::path::absolute(root)?;
        let layout = Self { shared: root.join("shared"), root };
        let longest = layout.channel(HostNumber::new(super::settings::MAX_HOSTS)?, CHANNELS);
        ensure!(
            longest.as_os_str().len() <= MAX_SOCKET_PATH,
            "{} is too long a path for the sockets in it: choose a shorter one with MIGR_LAB_DIR",
            layout.root.display()
        );
        // QEMU reads a comma in a path as the end of it.
        ensure!(
            !layout.root.as_os_str().as_encoded_bytes().contains(&b','),
            "the lab's path {} must not have a comma in it",
            layout.root.display()
        );
        Ok(layout)
    }

    /// Makes the directories, for this user alone: whoever reaches a host's
    /// sockets is root in it.
    ///
    /// # Errors
    /// When there is a lab already, or those of the file system.
    pub fn make(&self) -> Result<()> {
        let mut private = fs::DirBuilder::new();
        private.recursive(true).mode(0o700);
        private.create(&self.root).with_context(|| format!("make {}", self.root.display()))?;
        ensure!(
            !self.is_lab(),
            "there is a lab in {} already: end it with `lab.sh down`",
            self.root.display()
        );
        // All that is in it goes with the lab.
        ensure!(
            fs::read_dir(&self.root)?.next().is_none(),
            "{} is not empty: a lab needs a directory of its own",
            self.root.display()
        );
        fs::write(self.mark(), "the files of a migr lab; `lab.sh down` removes them\n")?;
        private.create(&self.shared)?;
        Ok(())
    }

    /// Whether a lab was made there.
    #[must_use]
    pub fn is_lab(&self) -> bool {
        self.mark().exists()
    }

    /// Removes the directory with all that is in it.
    ///
    /// # Errors
    /// Those of the file system.
    pub fn remove(&self) -> Result<()> {
        fs::remove_dir_all(&self.root).with_context(|| format!("remove {}", self.root.display()))
    }

    fn mark(&self) -> PathBuf {
        self.root.join("a-migr-lab")
    }

    /// The lab's directory.
    #[must_use]
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// What all hosts have at [`SHARED`].
    #[must_use]
    pub fn shared(&self) -> &Path {
        &self.shared
    }

    /// What the lab is like.
    #[must_use]
    pub fn settings(&self) -> PathBuf {
        self.root.join("settings.json")
    }

    /// The kernel that hosts boot.
    #[must_use]
    pub fn kernel(&self) -> PathBuf {
        self.root.join("vmlinuz")
    }

    /// The initramfs that they boot with it.
    #[must_use]
    pub fn initramfs(&self) -> PathBuf {
        self.root.join("initramfs")
    }

    /// Where the hosts' network cards are plugged in.
    #[must_use]
    pub fn switch(&self) -> PathBuf {
        self.root.join("switch.sock")
    }

    /// The process id of the switch.
    #[must_use]
    pub fn switch_pid(&self) -> PathBuf {
        self.root.join("switch.pid")
    }

    /// What the switch complains of.
    #[must_use]
    pub fn switch_log(&self) -> PathBuf {
        self.root.join("switch.log")
    }

    fn of(&self, host: HostNumber, what: &str) -> PathBuf {
        self.root.join(format!("host{host}.{what}"))
    }

    /// A host's disk, raw.
    #[must_use]
    pub fn disk(&self, host: HostNumber) -> PathBuf {
        self.of(host, "disk")
    }

    /// What a host's kernel and init print, over all its lives.
    #[must_use]
    pub fn console(&self, host: HostNumber) -> PathBuf {
        self.of(host, "console")
    }

    /// What its QEMU complains of.
    #[must_use]
    pub fn qemu_log(&self, host: HostNumber) -> PathBuf {
        self.of(host, "qemu")
    }

    /// The process id of its QEMU.
    #[must_use]
    pub fn pid(&self, host: HostNumber) -> PathBuf {
        self.of(host, "pid")
    }

    /// Where its QEMU takes orders.
    #[must_use]
    pub fn qmp(&self, host: HostNumber) -> PathBuf {
        self.of(host, "qmp")
    }

    /// Where its agent takes commands; channels have the numbers from 0 on.
    #[must_use]
    pub fn channel(&self, host: HostNumber, channel: u8) -> PathBuf {
        self.of(host, &format!("agent{channel}"))
    }

    /// Exists while the host's network cable is cut.
    #[must_use]
    pub fn cut(&self, host: HostNumber) -> PathBuf {
        self.of(host, "cut")
    }

    /// Every file that names a process of this lab, hosts first.
    ///
    /// # Errors
    /// Those of reading the directory.
    pub fn pid_files(&self) -> Result<Vec<PathBuf>> {
        let Ok(entries) = fs::read_dir(&self.root) else { return Ok(Vec::new()) };
        let mut found = Vec::new();
        for entry in entries {
            let path = entry?.path();
            if path.extension().is_some_and(|extension| extension == "pid") {
                found.push(path);
            }
        }
        found.sort();
        Ok(found)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_that_sockets_cannot_have_is_refused_with_the_way_out() {
        let long = format!("/{}", "x".repeat(100));
        let error = Layout::new(Path::new(&long)).expect_err("too long");
        assert!(error.to_string().contains("MIGR_LAB_DIR"), "{error}");
        assert!(Layout::new(Path::new("/tmp/a,b")).is_err());
    }

    #[test]
    fn a_second_lab_in_one_directory_is_refused() {
        let directory = tempfile::tempdir().expect("a directory");
        let layout = Layout::new(directory.path()).expect("a layout");
        layout.make().expect("a first lab");
        assert!(layout.make().is_err());
        layout.remove().expect("removed");
        layout.make().expect("another one");
    }

    #[test]
    fn a_directory_with_something_else_in_it_is_not_taken() {
        let directory = tempfile::tempdir().expect("a directory");
        fs::write(directory.path().join("precious"), "").expect("written");
        assert!(Layout::new(directory.path()).expect("a layout").make().is_err());
    }
}
