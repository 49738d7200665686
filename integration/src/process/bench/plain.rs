//! What CRIU alone takes: `criu dump` to a file system in memory, the images copied to
//! another directory over a loopback connection, as from host to host, `criu restore`.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, ensure};
use nix::errno::Errno;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::{Log, PROGRAM};
use crate::process::PYTHON;
use crate::wait;

/// A file system in memory that every Linux has.
const MEMORY: &str = "/dev/shm";

/// What one took, in ms.
#[derive(Clone, Copy, Debug)]
pub struct Plain {
    /// How long the process stood still.
    pub frozen: f64,
    pub dump: f64,
    pub copy: f64,
    pub restore: f64,
}

/// Takes a process of `memory` MiB apart and makes it anew.
pub fn cycle(memory: u32) -> Result<Plain> {
    let directory = tempfile::Builder::new().prefix("migr-plain-").tempdir_in(MEMORY)?;
    let path = |name: &str| directory.path().join(name);
    let log = Log(path("log"));
    fs::create_dir(path("from"))?;
    fs::create_dir(path("to"))?;
    // CRIU wants a tree that began its own session.
    let mut command = Command::new("setsid");
    command.args([PYTHON, "-c", PROGRAM, &memory.to_string()]).arg(&log.0).current_dir("/");
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    let mut process = Started(command.spawn().context("install util-linux")?);
    log.wait_for("ready")?;
    let seen = log.times()?.len();

    let pid = process.0.id().to_string();
    let dump = criu(&path("from"), &["dump", "--network-lock", "skip", "-t", &pid])?;
    // Its number is free for its copy once nobody waits for the original any more.
    process.0.wait()?;
    let copy = copy_over_tcp(&path("from"), &path("to"))?;
    let restore = criu(&path("to"), &["restore", "--restore-detached"])?;
    let restored = Restored(Pid::from_raw(i32::try_from(process.0.id())?));
    let frozen = log.longest_after(seen)?;
    restored.end()?;
    log.wait_for("right")?;
    let ms = |took: Duration| took.as_secs_f64() * 1000.0;
    Ok(Plain { frozen, dump: ms(dump), copy: ms(copy), restore: ms(restore) })
}

/// Runs CRIU on the images of a directory.
fn criu(images: &Path, args: &[&str]) -> Result<Duration> {
    let criu = std::env::var_os("MIGR_CRIU").map_or_else(|| PathBuf::from("criu"), PathBuf::from);
    let started = Instant::now();
    let ran = Command::new(&criu)
        .arg("--no-default-config")
        .args(args)
        .args(["--manage-cgroups=ignore", "--log-file", "criu.log", "--images-dir"])
        .arg(images)
        .stdin(Stdio::null())
        .output()
        .with_context(|| format!("start {}", criu.display()))?;
    let took = started.elapsed();
    let log = fs::read_to_string(images.join("criu.log")).unwrap_or_default();
    let errors: Vec<_> = log.lines().filter(|line| line.contains("Error")).collect();
    ensure!(ran.status.success(), "criu {}: {}", args.join(" "), errors.join("\n"));
    Ok(took)
}

/// Copies the files of a directory, one after the other, as they are.
fn copy_over_tcp(from: &Path, to: &Path) -> Result<Duration> {
    let mut names = Vec::new();
    for entry in fs::read_dir(from)? {
        let entry = entry?;
        // Its log is not one of them, and neither is a socket of CRIU's.
        if entry.file_type()?.is_file() && entry.path().extension().is_some_and(|e| e == "img") {
            names.push((entry.file_name(), entry.metadata()?.len()));
        }
    }
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
    let address = listener.local_addr()?;
    let (arriving, to) = (names.clone(), to.to_owned());
    let started = Instant::now();
    let receiver = std::thread::spawn(move || -> Result<()> {
        let (mut stream, _) = listener.accept()?;
        for (name, length) in arriving {
            let mut file = File::create(to.join(name))?;
            copy(&mut stream, &mut file, length)?;
        }
        Ok(stream.write_all(&[1])?)
    });
    let mut stream = TcpStream::connect(address)?;
    for (name, length) in names {
        copy(&mut File::open(from.join(name))?, &mut stream, length)?;
    }
    stream.read_exact(&mut [0])?;
    let took = started.elapsed();
    receiver.join().map_err(|_| anyhow!("the receiver panicked"))??;
    Ok(took)
}

fn copy(from: &mut impl Read, to: &mut impl Write, length: u64) -> Result<()> {
    let mut buffer = vec![0; 1 << 20];
    let mut left = length;
    while left > 0 {
        let most = usize::try_from(left)?.min(buffer.len());
        let read = from.read(&mut buffer[..most])?;
        ensure!(read > 0, "it ended early");
        to.write_all(&buffer[..read])?;
        left -= read as u64;
    }
    Ok(())
}

/// A process that is killed when this is dropped.
struct Started(Child);

impl Drop for Started {
    fn drop(&mut self) {
        // Usually it has ended long since.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// One that CRIU has made: nobody's child.
struct Restored(Pid);

impl Restored {
    /// Asks it to end and waits until it has.
    fn end(self) -> Result<()> {
        // What it inherited from this program has other signals blocked.
        kill(self.0, Signal::SIGUSR1)?;
        wait::until("the restored process to end", || match kill(self.0, None) {
            Err(Errno::ESRCH) => Ok(Some(())),
            // What adopted it may take its time.
            Ok(()) => Ok(is_zombie(self.0).then_some(())),
            Err(error) => Err(error.into()),
        })?;
        // Its number may be another's now.
        std::mem::forget(self);
        Ok(())
    }
}

impl Drop for Restored {
    fn drop(&mut self) {
        let _ = kill(self.0, Signal::SIGKILL);
    }
}

fn is_zombie(pid: Pid) -> bool {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.rsplit_once(") ").is_some_and(|(_, rest)| rest.starts_with('Z'))
}
