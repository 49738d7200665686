//! Process trees to look at, and CRIU to ask.

use std::collections::BTreeSet;
use std::io::{BufRead, BufReader, PipeReader};
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;
use std::process::{Child, ChildStdout, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};

use migrd::sys::process::{PidFd, isolate};
use migrd::workload::process::preflight::{Findings, Options, scan};

/// Makes a mount namespace with a /proc of its own and becomes the program, as
/// init of its pid namespace.
const INIT: &str = "
while umount -l /proc 2>/dev/null; do :; done
mount -t proc proc /proc
cd /
exec $2 python3 -u -c \"$1\"
";

/// What every program has: `take(NAME)` gives what [`Helper`] hands out.
const PRELUDE: &str = "
import ctypes, fcntl, mmap, os, pty, socket, subprocess, sys, tempfile, threading, time
libc = ctypes.CDLL(None, use_errno=True)
def check(result):
    if result == -1: sys.exit(os.strerror(ctypes.get_errno()))
    return result
def take(name):
    with socket.socket(socket.AF_UNIX) as s:
        s.connect('\\0' + name)
        return socket.recv_fds(s, 4096, 8)[:2]
def child(work):
    reader, writer = os.pipe()
    if os.fork() == 0:
        os.close(reader)
        work()
        os.write(writer, b'x')
        os.close(writer)
        time.sleep(100000)
    os.close(writer)
    if not os.read(reader, 1): sys.exit('the child failed')
    os.close(reader)
def ready():
    print('ready')
    while True: time.sleep(100000)
";

/// A tree that a python program is the init of.
pub struct Tree {
    pub init: u32,
    /// What it printed, by line.
    pub said: Vec<String>,
    /// Inode of the pipe that it prints to.
    output: u64,
    unshare: Child,
    _reader: BufReader<PipeReader>,
}

impl Tree {
    /// Runs `program` until it says that it is ready.
    pub fn start(program: &str) -> Self {
        Self::start_with(program, &[], "</dev/null setsid")
    }

    /// The same with more options of unshare(1), and begun by `by`.
    pub fn start_with(program: &str, unshare: &[&str], by: &str) -> Self {
        let (reader, writer) = std::io::pipe().unwrap();
        let inode = |fd: i32| std::fs::metadata(format!("/proc/self/fd/{fd}")).unwrap().ino();
        let output = inode(std::os::fd::AsRawFd::as_raw_fd(&reader));
        let script = INIT.replace("$2", by);
        let mut command = Command::new("unshare");
        // What the test's own parents left open is not the program's.
        isolate(&mut command, Vec::new());
        let mut unshare = command
            .args(["--fork", "--pid", "--mount", "--kill-child"])
            .args(unshare)
            .args(["sh", "-c", &script, "sh", &format!("{PRELUDE}{program}\nready()\n")])
            .stdin(Stdio::null())
            .stdout(writer.try_clone().unwrap())
            .stderr(writer)
            .spawn()
            .expect("unshare (util-linux) starts");
        let mut reader = BufReader::new(reader);
        let mut said = Vec::new();
        loop {
            let mut line = String::new();
            if reader.read_line(&mut line).unwrap() == 0 {
                let _ = unshare.wait();
                panic!("the program ended: {}", said.join("\n"));
            }
            if line == "ready\n" {
                break;
            }
            said.push(line.trim_end().to_owned());
        }
        let pid = unshare.id();
        let children = std::fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap();
        let init = children.split_whitespace().next().unwrap().parse().unwrap();
        Self { init, said, output, unshare, _reader: reader }
    }

    /// The options that fit it.
    pub fn options(&self) -> Options {
        Options { kept_pipes: vec![self.output], ..Options::default() }
    }

    pub fn scan(&self, options: &Options) -> Findings {
        scan(self.init, options).unwrap()
    }

    /// Has CRIU write it down and let it run on; what CRIU says when it refuses.
    pub fn dump(&self, options: &[&str]) -> Result<(), String> {
        let directory = tempfile::tempdir().unwrap();
        let mounts = std::fs::read_to_string(format!("/proc/{}/mountinfo", self.init)).unwrap();
        let points: BTreeSet<&str> =
            mounts.lines().map(|line| line.split(' ').nth(4).unwrap()).collect();
        let external = points.iter().filter(|point| !["/", "/proc"].contains(point));
        let done = Command::new("timeout")
            .arg("60")
            .arg(criu())
            .args(["dump", "--leave-running", "-v4", "-o", "log", "--tcp-established"])
            .args(["--manage-cgroups=ignore", "--network-lock", "skip"])
            .args(["--enable-external-sharing", "--enable-external-masters"])
            .args(external.flat_map(|p| ["--external".into(), format!("mnt[{p}]:{p}")]))
            .args(["-t", &self.init.to_string(), "-D"])
            .arg(directory.path())
            .args(options)
            .output()
            .unwrap();
        if done.status.success() {
            return Ok(());
        }
        let log = std::fs::read(directory.path().join("log")).unwrap_or_default();
        let log = String::from_utf8_lossy(&log).into_owned();
        let errors = log.lines().filter(|line| line.contains("Error"));
        Err(errors.collect::<Vec<_>>().join("\n"))
    }

    /// Exactly the problem `code` is found, told with process and remedy, and
    /// CRIU refuses it in words that have `reason` in them.
    pub fn is_refused(&self, code: &str, reason: &str) {
        self.is_a_problem(code, &self.options());
        let error = self.dump(&[]).expect_err("a false alarm: CRIU takes it");
        assert!(error.contains(reason), "CRIU refuses it for another reason:\n{error}");
    }

    /// Exactly the problem `code` is found.
    pub fn is_a_problem(&self, code: &str, options: &Options) {
        let found = self.scan(options);
        assert_eq!(codes(&found), [code], "{:#?}", found.problems);
        for problem in &found.problems {
            let names_process = problem.message.contains("python3 (");
            assert!(names_process && !problem.remedy.is_empty(), "{problem:?}");
        }
    }

    /// Nothing is found, and CRIU takes it.
    pub fn is_carried(&self, options: &Options, criu: &[&str]) {
        let found = self.scan(options);
        assert!(found.problems.is_empty(), "{:#?}", found.problems);
        self.dump(criu).expect("a miss: CRIU refuses it");
    }
}

impl Drop for Tree {
    fn drop(&mut self) {
        // The whole namespace goes with its init. That does not go with its parent if it has
        // changed its user (prctl(2), PR_SET_PDEATHSIG).
        if let Ok(init) = PidFd::open(self.init) {
            let _ = init.kill();
        }
        let _ = self.unshare.kill();
        let _ = self.unshare.wait();
    }
}

fn codes(found: &Findings) -> Vec<&'static str> {
    found.problems.iter().map(|p| p.code).collect::<BTreeSet<_>>().into_iter().collect()
}

fn criu() -> PathBuf {
    if let Some(path) = std::env::var_os("MIGR_CRIU") {
        return path.into();
    }
    let paths = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&paths)
        .map(|directory| directory.join("criu"))
        .find(|path| path.is_file())
        .expect("these tests need CRIU: set MIGR_CRIU to what integration/install-criu.sh prints")
}

/// A program outside of the tree, which hands out descriptors and keeps what it
/// has.
pub struct Helper {
    pub name: String,
    child: Child,
    _reader: BufReader<ChildStdout>,
}

impl Helper {
    /// `program` sets `text` (bytes) and `fds`, which the first to ask gets.
    pub fn start(program: &str) -> Self {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let name = format!("migr-preflight-{}-{number}", std::process::id());
        let program = format!(
            "{PRELUDE}text, fds = b'x', []\n{program}\n\
             s = socket.socket(socket.AF_UNIX); s.bind('\\0{name}'); s.listen()\nprint('up')\n\
             c, _ = s.accept(); socket.send_fds(c, [text], fds); c.close(); ready()\n"
        );
        let mut command = Command::new("python3");
        isolate(&mut command, Vec::new());
        let mut child = command
            .args(["-u", "-c", &program])
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .expect("python3 starts");
        let mut line = String::new();
        let mut reader = BufReader::new(child.stdout.take().unwrap());
        reader.read_line(&mut line).unwrap();
        assert_eq!(line, "up\n");
        Self { name, child, _reader: reader }
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }
}

impl Drop for Helper {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
