//! The lab: several stock Debian hosts on this one machine, each a QEMU virtual
//! machine with a kernel, a KVM module, an address, a disk and a clock of its
//! own, joined by a private network. `docs/lab.md` explains it to users.
//!
//! Owns the files below the lab's directory and the processes that run from it:
//! one QEMU a host and one [`switch`]. It touches nothing outside: the machine's
//! root file system is lent to the hosts read-only.
//!
//! In the order in which a lab comes up: [`settings`] say what it is to be,
//! [`layout`] where its files are, [`initramfs`] makes what hosts boot,
//! [`qemu`] the arguments, [`process`] starts and ends, [`host`] is one host's
//! life, [`qmp`] and [`channel`] reach into it, where [`agent`] answers.
//! [`daemon`] runs `migrd` there, [`guest`] and [`client`] what scenarios are made
//! of; [`judge`] says how a guest fared. [`diagnosis`] is what a failure leaves
//! behind, unless [`watch`] saw that the emulation is to blame.

pub mod agent;
pub mod channel;
pub mod client;
pub mod clock;
pub mod cpio;
pub mod daemon;
pub mod diagnosis;
pub mod guest;
pub mod host;
pub mod initramfs;
pub mod judge;
pub mod layout;
pub mod process;
pub mod protocol;
pub mod qemu;
pub mod qmp;
pub mod scenario;
pub mod script;
pub mod settings;
pub mod still_vm;
pub mod switch;
pub mod watch;

use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::{Context, Result, ensure};
use tempfile::TempDir;

use host::Host;
use layout::Layout;
use process::Life;
use settings::{HostNumber, Settings};

use crate::tidy;

/// A lab of which this process is the owner: it goes when it is dropped, and
/// when this process dies.
#[derive(Debug)]
pub struct Lab {
    layout: Layout,
    hosts: Vec<Host>,
    done: AtomicBool,
    watch: watch::Watch,
    _directory: TempDir,
}

impl Lab {
    /// Hosts that are up, each with its `migrd` serving.
    ///
    /// Must be called by a thread that lives as long as the lab: the hosts go
    /// with it.
    ///
    /// # Errors
    /// When a host does not come up, with what its console said.
    pub fn start(settings: &Settings) -> Result<Self> {
        let lab = Self::boot(settings)?;
        for host in &lab.hosts {
            host.start_migrd(&[])?;
        }
        Ok(lab)
    }

    /// Hosts that are up, without a daemon.
    ///
    /// # Errors
    /// When a host does not come up, with what its console said.
    pub fn boot(settings: &Settings) -> Result<Self> {
        let directory = tempfile::Builder::new().prefix("migr-lab-").tempdir()?;
        let layout = Layout::new(directory.path())?;
        // The value exists before the first process does: whatever fails from
        // here on, dropping it ends what was started.
        let done = AtomicBool::new(false);
        layout.make()?;
        let watch = watch::Watch::start(&layout, settings);
        let mut lab = Self { layout, hosts: Vec::new(), done, watch, _directory: directory };
        lab.hosts = bring_up(&lab.layout, settings, Life::WithItsOwner)?;
        Ok(lab)
    }

    /// A host, by its number, from 1 on.
    ///
    /// # Errors
    /// When there is none of that number.
    pub fn host(&self, number: u8) -> Result<&Host> {
        let number = HostNumber::new(number)?;
        let found = self.hosts.iter().find(|host| host.number() == number);
        found.with_context(|| format!("this lab has no host {number}"))
    }

    /// All of them.
    #[must_use]
    pub fn hosts(&self) -> &[Host] {
        &self.hosts
    }

    /// The directory that every host has at [`layout::SHARED`].
    #[must_use]
    pub fn shared(&self) -> &Path {
        self.layout.shared()
    }

    /// Everything went well: nobody needs to see the hosts' logs at the end.
    pub fn done(&self) {
        self.done.store(true, Ordering::Relaxed);
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        if !self.done.load(Ordering::Relaxed) {
            report_failure(&self.layout);
        }
        if let Err(error) = tear_down(&self.layout) {
            eprintln!("the lab in {} is not gone: {error:#}", self.layout.root().display());
        }
        self.watch.end();
    }
}

/// Starts the switch and the hosts in a layout that was just made, and waits
/// until every host's agent answers.
///
/// # Errors
/// When one does not come up. What was started stays: [`tear_down`].
pub fn bring_up(layout: &Layout, settings: &Settings, life: Life) -> Result<Vec<Host>> {
    settings.save(layout)?;
    initramfs::write(layout)?;
    process::start_switch(layout, life)?;
    let hosts: Vec<Host> =
        settings.numbers().map(|number| Host::new(layout, settings, number)).collect();
    for host in &hosts {
        host.make_disk()?;
        host.power_on(life)?;
    }
    for host in &hosts {
        host.wait_up()?;
    }
    Ok(hosts)
}

/// Ends every process that runs from the layout, and says whether all went.
/// The files stay.
///
/// # Errors
/// When a process does not go.
pub fn tear_down(layout: &Layout) -> Result<()> {
    for file in layout.pid_files()? {
        process::end(&file)?;
    }
    Ok(())
}

/// Ends every process of a lab and removes its files.
///
/// # Errors
/// When there is no lab, or something of it stays.
pub fn remove(layout: &Layout) -> Result<()> {
    ensure!(layout.is_lab(), "no lab is in {}", layout.root().display());
    tear_down(layout)?;
    layout.remove()
}

/// From now on a signal that ends programs removes the lab first. Needs
/// [`crate::tidy::hold_signals`] before any thread is started.
pub fn remove_on_signal(layout: &Layout, script: Option<script::Group>) {
    let layout = layout.clone();
    tidy::on_signal(move |_| {
        ENDING.store(true, Ordering::Relaxed);
        if let Some(script) = &script {
            script.terminate();
        }
        process::start_no_more();
        if layout.is_lab()
            && let Err(error) = remove(&layout)
        {
            eprintln!("the lab in {} is not gone: {error:#}", layout.root().display());
        }
        if let Some(script) = &script {
            script.kill();
        }
    });
}

/// Whether a signal has begun to end this program.
static ENDING: AtomicBool = AtomicBool::new(false);

/// Says what the hosts have to say about a failure; unless it is that a signal
/// takes the lab down, whose end is awaited then.
pub fn report_failure(layout: &Layout) {
    while ENDING.load(Ordering::Relaxed) {
        std::thread::park();
    }
    eprintln!("{}", diagnosis::of(layout));
}

/// The hosts of a lab that another process has brought up.
///
/// # Errors
/// When there is no lab there.
pub fn attach(layout: &Layout) -> Result<Vec<Host>> {
    let settings = Settings::load(layout)?;
    Ok(settings.numbers().map(|number| Host::new(layout, &settings, number)).collect())
}
